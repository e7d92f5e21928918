"""Run the tests with the lowest versions of requirements.txt, and with versions like Kaggle's.

    python tests/environments.py                             # both
    python tests/environments.py lowest                      # one of them
    python tests/environments.py --only "test_2 or test_5"   # pytest's -k: these tests
    python tests/environments.py --check                     # import everything, run no test
    python tests/environments.py kaggle --python ~/.pyenv/versions/3.12.1/bin/python

Each environment is a folder of 6 to 8 GB in outputs/environments. uv makes it (pip install uv) the
first time; `--fresh` makes it anew. In the one like Kaggle's the module itself installs what it
lacks, as section 1 of the notebook does. What pytest printed is in <environment>.log beside the
folder. The exit status is 1 where something failed. Not part of CI: both suites need an hour.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "outputs" / "environments"

# As on Kaggle and Colab in autumn 2026; what section 1 replaces is as old as there.
KAGGLE = [
    "torch==2.10.0",
    "torchvision==0.25.0",
    "torchao==0.10.0",
    "transformers==5.0.0",
    "tokenizers==0.22.2",
    "safetensors==0.7.0",
    "huggingface-hub==1.3.0",
    "accelerate==1.11.0",
    "peft==0.18.1",
    "numpy==2.0.2",
    "pandas==2.2.3",
    "scipy==1.15.3",
    "scikit-learn==1.6.1",
    "matplotlib==3.10.0",
    "pillow==11.3.0",
    "tqdm==4.67.1",
]
# What only the tests need; on Kaggle the notebook runs in a kernel that is there.
FOR_TESTS = ("nbclient", "nbconvert", "ipykernel", "pytest", "hypothesis")
SHOWN = ("torch", "transformers", "peft", "torchao", "numpy", "pandas", "scikit-learn", "pillow")
INSTALL = "import vqa_helpers as vqa; print('section 1 installs:', *vqa.install_requirements())"
CHECK = """
import importlib.metadata, sys
import accelerate, bitsandbytes, matplotlib.pyplot, nbclient, nbconvert, peft, scipy, sklearn
import qwen_vl_utils, torchvision, tqdm, transformers
import vqa_helpers as vqa
from peft.tuners.lora.model import LoraModel
from transformers import AutoModelForImageTextToText
for name in sys.argv[1:]:
    print(f"{name}={vqa.installed_version(name)}")
"""


@dataclass(frozen=True)
class Environment:
    """A kind of environment, and how it is made."""

    name: str
    python: str  # version
    install: tuple[str, ...]  # arguments of `uv pip install`
    runs_section_1: bool  # whether the module installs what is missing


def requirements_of_tests() -> list[str]:
    """The lines of requirements.txt that only the tests need."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith(FOR_TESTS)]


ENVIRONMENTS = {
    "lowest": Environment(
        name="lowest",
        python="3.11",
        install=("--resolution", "lowest-direct", "-r", str(ROOT / "requirements.txt")),
        runs_section_1=False,
    ),
    "kaggle": Environment(
        name="kaggle",
        python="3.12",
        install=(*KAGGLE, *requirements_of_tests()),
        runs_section_1=True,
    ),
}


def call(*command, **options) -> subprocess.CompletedProcess:
    """Run a command in the project's folder; its output is returned as text."""
    options = {"check": False, "text": True, **options}
    return subprocess.run([*command], cwd=ROOT, **options)  # noqa: PLW1510


def build(environment: Environment, version: str) -> Path:
    """Make the environment where it is not there yet; returns its Python.

    `version`: of Python, or the path of one.
    """
    folder = PLACE / environment.name
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    if shutil.which("uv") is None:
        raise SystemExit("This needs uv, which makes the environments: pip install uv")
    # With pip in it, because section 1 calls pip.
    call("uv", "venv", "--seed", "--clear", "--python", version, folder, check=True)
    call("uv", "pip", "install", "--python", python, *environment.install, check=True)
    if environment.runs_section_1:
        call(python, "-c", INSTALL, check=True)
    (folder / "complete").touch()
    return python


def count(word: str, text: str) -> int:
    """The number that stands before `word` in pytest's last line."""
    found = re.search(rf"(\d+) {word}", text)
    return int(found[1]) if found else 0


def run_tests(python: Path, log: Path, only: str) -> dict:
    """pytest's counts, and the tests that failed; everything that it printed is in `log`."""
    selected = ["-k", only] if only else []
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        finished = call(
            python, "-m", "pytest", "-q", *selected, stdout=stream, stderr=subprocess.STDOUT
        )
    lines = log.read_text(encoding="utf-8").splitlines()
    last = lines[-1] if lines else ""
    return {
        "passed": count("passed", last),
        "failed": count("failed", last) + count("error", last),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "exit": finished.returncode,
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
    }


def try_environment(environment: Environment, version: str, only: str, only_check: bool) -> dict:
    """One column of the table: the versions that are there, and what the tests say."""
    python = build(environment, version)
    checked = call(python, "-c", CHECK, *SHOWN, capture_output=True)
    row = {"environment": environment.name, "exit": checked.returncode, "failures": []}
    if checked.returncode:
        row["failures"] = [f"imports: {checked.stderr.strip().splitlines()[-1]}"]
        return row
    row |= dict(line.split("=") for line in checked.stdout.splitlines() if "=" in line)
    if not only_check:
        row |= run_tests(python, PLACE / f"{environment.name}.log", only)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", choices=ENVIRONMENTS, help="by default both")
    parser.add_argument("--python", help="version or path of the Python to make it with")
    parser.add_argument("--only", default="", help="pytest's -k: the tests to run")
    parser.add_argument("--check", action="store_true", help="import everything, run no test")
    parser.add_argument("--fresh", action="store_true", help="make the environments anew")
    arguments = parser.parse_args()
    rows = []
    for name in [arguments.name] if arguments.name else ENVIRONMENTS:
        environment = ENVIRONMENTS[name]
        if arguments.fresh:
            shutil.rmtree(PLACE / name, ignore_errors=True)
        version = arguments.python or environment.python
        rows.append(try_environment(environment, version, arguments.only, arguments.check))
    print(pd.DataFrame(rows).drop(columns="failures").fillna("").T.to_string(header=False))
    for row in rows:
        for failure in row["failures"]:
            print(f"{row['environment']}: {failure}")
    return max(row["exit"] != 0 for row in rows)


if __name__ == "__main__":
    sys.exit(main())
