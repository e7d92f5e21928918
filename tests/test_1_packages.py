"""Part 1, Packages: what is missing is installed, from where it can be, and nothing else."""

import os
import re
import socket
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from machine import FIND, IMPORT, INSTALL, T4_CARD
from running import raising
from twins import TINY

import vqa_helpers as vqa


def test_with_everything_there_nothing_is_installed_and_no_socket_opened(machine, capsys):
    """Setup, config and data of an offline session whose model is a local folder."""
    refuse = raising(OSError("there is no network"))
    machine.monkeypatch.setattr(socket.socket, "connect", refuse)
    machine.monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    machine.monkeypatch.setattr(socket, "getaddrinfo", refuse)
    machine.helper()
    machine.gpus(T4_CARD, T4_CARD)
    machine.competition()
    machine.environment(VQA_MODEL=str(TINY))
    assert machine.run().config.model_path == str(TINY)
    assert machine.pip_calls == []
    assert "installed: nothing, all there" in capsys.readouterr().out


@pytest.mark.slow
def test_only_what_is_missing_or_old_is_installed(machine, capsys):
    machine.versions["bitsandbytes"] = None
    machine.versions["transformers"] = "5.0.0"
    machine.helper()
    machine.run(FIND, IMPORT, INSTALL)
    wanted = ["transformers>=5.18", "bitsandbytes>=0.50"]
    assert machine.pip_calls == [["install", "--quiet", *wanted]]
    assert f"installed: {', '.join(wanted)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("torchao", "torch", "is_replaced"),
    [
        (None, "2.8.0", False),
        ("0.10.0", "2.10.0", True),
        ("0.15.0", "2.6.0", True),
        ("0.16.0", "2.6.0+cu124", False),
        ("0.17.0", "2.6.0", True),
        ("0.17.0", "2.7.1", False),
        ("0.18.0", "2.8.0", True),
        ("0.18.0", "2.9.1", True),
        ("0.18.0", "2.10.0", False),
        ("0.20.0", "2.14.1", False),
    ],
)
def test_torchao_is_replaced_where_peft_or_torch_does_not_take_it(
    machine, torchao, torch, is_replaced
):
    machine.versions |= {"torchao": torchao, "torch": torch}
    machine.helper()
    machine.run(FIND, IMPORT, INSTALL)
    wanted = [["torchao>=0.16,<0.17"]] if is_replaced else []
    assert [call[2:] for call in machine.pip_calls] == wanted


def test_without_internet_and_wheels_the_error_has_the_command_that_makes_them(machine):
    machine.versions["bitsandbytes"] = None
    machine.pip_answer = (1, "ERROR: No matching distribution found for bitsandbytes>=0.50")
    machine.helper()
    with pytest.raises(RuntimeError) as caught:
        machine.run(FIND, IMPORT, INSTALL)
    first, command, last = str(caught.value).splitlines()
    assert first.startswith(
        "pip could not take bitsandbytes>=0.50 from the internet. Switch Internet on, or "
    )
    assert command.startswith(
        "pip download -d wheels --only-binary=:all: --python-version 3.12 --platform manylinux"
    )
    assert command.endswith(' "bitsandbytes>=0.50"')
    assert last == machine.pip_answer[1]


def test_the_readme_has_the_same_command_for_all_packages(machine):
    machine.versions |= dict.fromkeys(vqa.MINIMUM_VERSIONS)
    machine.versions["torchao"] = "0.10.0"
    machine.pip_answer = (1, "")
    machine.helper()
    with pytest.raises(RuntimeError) as caught:
        machine.run(FIND, IMPORT, INSTALL)
    command = str(caught.value).splitlines()[1]
    assert command in (vqa.HERE / "README.md").read_text(encoding="utf-8")


WHEEL_FOLDERS = {
    "attached": "kaggle/input/datasets/me/offline/wheels",
    "VQA_WHEELS": "my files",
}


@pytest.mark.parametrize("given", WHEEL_FOLDERS)
def test_wheels_are_taken_instead_of_the_internet(machine, given):
    folder = machine.root / WHEEL_FOLDERS[given]
    folder.mkdir(parents=True)
    (folder / "bitsandbytes-0.50.2-py3-none-any.whl").touch()
    if given == "VQA_WHEELS":
        machine.environment(VQA_WHEELS=str(folder))
    machine.versions["bitsandbytes"] = None
    machine.helper()
    machine.run(FIND, IMPORT, INSTALL)
    found = ["--no-index", "--find-links", str(folder)]
    assert machine.pip_calls == [["install", "--quiet", *found, "bitsandbytes>=0.50"]]


@pytest.mark.parametrize(
    ("installed", "pip_calls"),
    [("5.0.0", 1), ("5.20.0", 0)],
    ids=["just installed", "installed, run again"],
)
def test_an_old_package_that_is_loaded_asks_for_a_restart(machine, installed, pip_calls):
    loaded = ModuleType("transformers")
    loaded.__version__ = "5.0.0"
    machine.monkeypatch.setitem(sys.modules, "transformers", loaded)
    machine.versions["transformers"] = installed
    machine.helper()
    with pytest.raises(
        RuntimeError,
        match=r"^transformers 5.0.0 was loaded before 5.18 was there: restart the session",
    ):
        machine.run(FIND, IMPORT, INSTALL)
    assert len(machine.pip_calls) == pip_calls


def test_missing_and_old_packages_are_named():
    minimum = {"pandas": "1.0", "transformers": "999.0", "no-such-package": "1.2"}
    assert vqa.missing_requirements(minimum) == ["transformers>=999.0", "no-such-package>=1.2"]


# --- Packages that are replaced while they are loaded ---------------------------------------------

# In a process of the little environment: what a session does until section 1, and section 1.
SESSION = """
import logging
import sys

import tiny_base
import tiny_other
import vqa_helpers as vqa

logging.basicConfig(level="INFO", format="%(levelname)s %(message)s", stream=sys.stdout)
vqa.MINIMUM_VERSIONS.clear()
vqa.MINIMUM_VERSIONS["tiny-top"] = "2.0"
print("installed:", vqa.install_requirements())
print("again:", vqa.install_requirements())
"""


def wheel(folder, name, version, requires=()):
    """A wheel of one module, which does not say its version."""
    module = name.replace("-", "_")
    information = f"{module}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in requires]
    files = {
        f"{module}.py": "",
        f"{information}/METADATA": "\n".join(metadata) + "\n",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{information}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as opened:
        for path, text in files.items():
            opened.writestr(path, text)


@pytest.fixture(scope="module")
def little_environment(tmp_path_factory):
    """Python of a virtual environment with what is installed here and with four tiny packages."""
    root = tmp_path_factory.mktemp("packages")
    wheels = root / "wheels"
    wheels.mkdir()
    wheel(wheels, "tiny-base", "1.0")
    wheel(wheels, "tiny-base", "2.0")
    wheel(wheels, "tiny-other", "1.0")
    wheel(wheels, "tiny-top", "2.0", ["tiny-base>=2"])
    wheel(wheels, "tiny-show", "1.5", ["tiny-base<2"])
    venv.create(root / "environment")
    python = root / "environment/bin/python"
    query = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    found = subprocess.run(query, check=True, capture_output=True, text=True)
    here = sysconfig.get_path("purelib")
    Path(found.stdout.strip(), "here.pth").write_text(f"{here}\n")
    first = ["tiny-base==1.0", "tiny-other", "tiny-show"]
    command = [python, "-m", "pip", "install", "-q", "--no-index", "--find-links", wheels]
    subprocess.run([*command, *first], check=True)
    return python, wheels


@pytest.fixture(scope="module")
def said_by_section_1(little_environment):
    """What section 1 prints and logs where pip replaces a dependency that is loaded."""
    python, wheels = little_environment
    environment = {**os.environ, "VQA_WHEELS": str(wheels), "PYTHONPATH": str(vqa.HERE)}
    finished = subprocess.run(
        [python, "-c", SESSION], check=True, capture_output=True, text=True, env=environment
    )
    return finished.stdout


@pytest.mark.slow
def test_a_loaded_dependency_that_pip_replaced_is_named_with_the_cure(said_by_section_1):
    (warning,) = re.findall("^WARNING Replaced.*", said_by_section_1, re.M)
    assert warning.startswith(
        "WARNING Replaced while loaded in this session: tiny-base (1.0 is loaded, 2.0 is "
        "installed). Run all works, because models are trained in processes of their own."
    )
    assert warning.endswith(
        "The cure: restart the session (Kaggle: Run > Restart, Colab: Runtime > Restart session) "
        "and press Run all; what was installed stays."
    )
    assert "installed: ['tiny-top>=2.0']" in said_by_section_1
    assert "again: []" in said_by_section_1


def test_what_pip_says_of_other_packages_is_shown(said_by_section_1):
    (warning,) = re.findall("^WARNING These.*", said_by_section_1, re.M)
    assert warning == (
        "WARNING These packages want other versions than this notebook, and may fail if you use "
        "them in this session: tiny-show 1.5 requires tiny-base<2, but you have tiny-base 2.0 "
        "which is incompatible"
    )


@pytest.mark.parametrize(
    ("module", "package", "loaded", "installed", "is_named"),
    [
        ("safetensors", "safetensors", "0.7.0", "0.8.0", True),
        ("PIL", "pillow", "11.0.0", "13.0.0", True),
        ("tokenizers", "tokenizers", "0.23.1", "0.23.1", False),
        ("numpy", "numpy", "2.0.2+local", "2.0.2", False),
    ],
)
def test_a_library_that_was_replaced_before_section_1_is_named(
    machine, caplog, module, package, loaded, installed, is_named
):
    """As by a cell of one's own with `pip install -U`, or when section 1 runs a second time."""
    for name, distribution in vqa.LIBRARIES.items():
        machine.monkeypatch.delitem(sys.modules, name, raising=False)
        machine.versions.setdefault(distribution, "1.0")
    library = ModuleType(module)
    library.__version__ = loaded
    machine.monkeypatch.setitem(sys.modules, module, library)
    machine.versions[package] = installed
    vqa.install_requirements()
    assert machine.pip_calls == []
    named = f"{package} ({loaded} is loaded, {installed} is installed)"
    assert (named in caplog.text) == is_named


def test_nothing_is_loaded_before_section_1_that_it_replaces():
    """What transformers and its dependencies require, but numpy, which nothing here raises."""
    code = """
import sys
import vqa_helpers
print([name for name in ("safetensors", "tokenizers", "huggingface_hub") if name in sys.modules])
"""
    finished = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=vqa.HERE
    )
    assert finished.stdout == "[]\n"


def test_a_folder_of_wheels_that_is_not_there_is_named_before_pip_is_asked(machine):
    machine.versions["bitsandbytes"] = None
    machine.environment(VQA_WHEELS="/no such folder")
    machine.helper()
    with pytest.raises(
        RuntimeError,
        match="^VQA_WHEELS is '/no such folder', and there is no such folder, .*or unset it",
    ):
        machine.run(FIND, IMPORT, INSTALL)
    assert machine.pip_calls == []
