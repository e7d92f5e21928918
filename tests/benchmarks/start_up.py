"""From *Run all* to the first optimizer step: where the seconds go.

    python tests/benchmarks/start_up.py                  # on a GPU: a random 8B in 4 bits
    python tests/benchmarks/start_up.py --tiny           # the demo on this CPU
    python tests/benchmarks/start_up.py --modules before/vqa_helpers.py vqa_helpers.py --repeats 3

Runs the notebook's code cells up to training, with the module that is given, in fresh processes
with nothing compiled or cached before, and stops at the first optimizer step. The model is on
the disk and, where the system lets us, not in memory. Prints every mark as it comes, then a table
of phases. The marks are lines of the run's own logs, stamped by this process as they appear
(every 10 ms), and the times of its files; nothing is installed. A start that takes more than
--limit seconds is ended there, and its table has what it did until then. With several modules
these take turns.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "Kaggle_AllInOne.ipynb"
POLL_SECONDS = 0.01
CELL_MARK = "@cell "  # begins a line of the notebook's process: a cell begins
TOTAL = "from start to the first step"
LIMIT = "(ended by --limit)"
CPU = "CPU seconds until then, all processes"
# Of a real-size run; so many epochs that layers are compiled, as in a real job.
OVERRIDES = {"n_folds": 2, "train_folds": [0], "num_epochs": 20, "max_fallback_share": 0.5}


# === The notebook's process =======================================================================
def pretend_ipython() -> None:
    """Where there is no IPython: what the cells import of it."""
    display = types.ModuleType("IPython.display")
    display.HTML = str
    display.display = lambda *_: None
    package = types.ModuleType("IPython")
    package.version_info = (9, 0)  # matplotlib asks
    package.get_ipython = lambda: None
    package.display = display
    sys.modules.update({"IPython": package, "IPython.display": display})


def run_cells() -> None:
    """Run the notebook's code cells up to training in this process, and say when each begins."""
    try:
        import IPython.display  # noqa: F401
    except ImportError:
        pretend_ipython()
    names = {"__name__": "__main__"}
    heading = ""
    for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            title = re.search(r"^## (.+?) ·", source, re.M)
            heading = title[1] if title else heading
            continue
        first = next(line for line in source.splitlines() if re.match(r"[^#%\s]", line))
        sys.stdout.write(f"{CELL_MARK}{heading}: {first[:40]}\n")
        sys.stdout.flush()
        plain = "\n".join(line for line in source.splitlines() if not line.startswith("%"))
        exec(compile(plain, heading, "exec"), names)
        if "run_folds" in source:
            return


# === Marks ========================================================================================
@dataclass(frozen=True)
class Mark:
    """A line that somebody wrote, or a file that appeared."""

    time: float  # seconds since 1970
    source: str  # notebook, preflight, zeroshot, train
    text: str


# What a line ends, by the first pattern that it matches; each counts once for each source.
PHASES = (
    (r"Libraries and processor: ", "process, imports, processor"),
    (r"Tables, and tokens", "tables and images read, tokens counted"),
    (r"Memory: ", "memory computed from shapes"),
    (r"Decision: precision", "process and first imports"),
    (r"Decision: .*(pixel|tile)", "other imports, processor"),
    (r"Decision: chat template", "chat template checked"),
    (r"model loaded: ", "model loaded and quantised"),
    (r"Decision: vision cache", "decision on the vision cache"),
    (r"Vision cache: ", "vision cache, all images"),
    (r"Trying the longest row", "vision cache, scoring, adapter"),
    (r" INFO zeroshot: ", "zero-shot scored"),
    (r"Decision: torch.compile", "adapter attached (LoRA)"),
    (r"MemoryPlan\(", "first passes, compiling, first plan tried"),
    (r"Decision: of \d+ questions", "other plans tried"),
    (r"@first step", "prompts and first optimizer step"),
    (re.escape(LIMIT), LIMIT),
)


def phase_of(text: str) -> str:
    """The phase that a line ends; "" for any other line."""
    for pattern, phase in PHASES:
        if re.search(pattern, text):
            return phase
    return ""


@dataclass
class Watch:
    """Reads the logs of a start while they grow."""

    folder: Path  # everything that the start writes
    started: float
    marks: list[Mark] = field(default_factory=list)
    read: dict[Path, int] = field(default_factory=dict)  # file -> bytes that were read
    source: str = "notebook"  # whose turn it is, by the notebook's cell

    def add(self, source: str, text: str, when: float | None = None) -> None:
        """Keep a mark and print it."""
        mark = Mark(when or time.time(), source, text)
        self.marks.append(mark)
        shown = text[:110]
        sys.stdout.write(f"  {mark.time - self.started:7.2f}  {source:9}  {shown}\n")
        sys.stdout.flush()

    def new_lines(self, path: Path) -> Iterator[str]:
        """The whole lines that were added to a file since the last look."""
        size = path.stat().st_size
        before = self.read.get(path, 0)
        if size <= before:
            return
        with path.open("rb") as file:
            file.seek(before)
            content = file.read(size - before)
        end = content.rfind(b"\n") + 1
        self.read[path] = before + end
        yield from content[:end].decode("utf-8", "replace").splitlines()

    def look(self) -> bool:
        """Read what is new; whether the first optimizer step is done."""
        for line in self.new_lines(self.folder / "notebook.log"):
            if line.startswith(CELL_MARK):
                text = line.removeprefix(CELL_MARK)
                for name in ("preflight", "zeroshot", "run_folds"):
                    if name in text:
                        self.source = {"run_folds": "train"}.get(name, name)
                        break
                else:
                    self.source = "notebook"
                self.add("notebook", f"{CELL_MARK}{text}")
        logs = [*self.folder.glob("tmp/*/output"), *self.folder.glob("runs/run/worker_0.log")]
        for path in logs:
            for line in self.new_lines(path):
                if phase_of(line):
                    self.add(self.source, line)
        for path in self.folder.glob("runs/run/fold_*/metrics.jsonl"):
            if path.stat().st_size:
                self.add("train", "@first step")
                return True
        return False


def phases_of_start(marks: Sequence[Mark]) -> dict[str, float]:
    """Phase -> seconds. A phase lasts from the mark before it to its own."""
    seconds = {}
    cell = "Python"
    before = marks[0].time
    seen = set()
    for mark in marks[1:]:
        if mark.text.startswith(CELL_MARK):
            name = f"notebook: {cell}"
            cell = mark.text.removeprefix(CELL_MARK)
        else:
            name = f"{mark.source}: {phase_of(mark.text)}"
            if name in seen:  # later ones of a kind belong to what follows
                continue
            seen.add(name)
        seconds[name] = seconds.get(name, 0.0) + mark.time - before
        before = mark.time
    in_all = marks[-1].time - marks[0].time
    short = [name for name in seconds if name.startswith("notebook") and seconds[name] < 0.1]
    others = sum(seconds.pop(name) for name in short)
    return {**seconds, "notebook: other cells": others, TOTAL: in_all}


# === One start ====================================================================================
def forget_files(folder: Path) -> None:
    """Let the system drop a folder's files from memory, as after a restart (Linux)."""
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def family_of(process: subprocess.Popen) -> list[psutil.Process]:
    """A process and those that it has started; none where it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        return [first, *first.children(recursive=True)]
    return []


def cpu_seconds(process: subprocess.Popen) -> float:
    """What a process, and those that it has started, have taken of the cores until now.

    On a machine that others use, too, this says more than the wall time.
    """
    total = 0.0
    for member in family_of(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def end_all(process: subprocess.Popen) -> None:
    """End a process and those that it has started."""
    for member in family_of(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def write_metadata(folder: Path) -> None:
    """Write down for pip the versions of required packages that it does not know as they are.

    A package that was unpacked into a folder of PYTHONPATH without its metadata counts as missing
    else, or as the version that another folder has, and the notebook would install it.
    """
    for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines():
        requirement = re.match(r"([\w-]+)>=([\d.]+)", line)
        spec = requirement and importlib.util.find_spec(requirement[1].replace("-", "_"))
        if not spec:
            continue
        name, lowest = requirement.groups()
        known = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known = importlib.metadata.version(name)
        source = Path(spec.origin).read_text("utf-8")
        said = re.search(r"""^__version__ = ["'](.+)["']""", source, re.M)
        version = said[1] if said else known or lowest
        if version != known:
            sys.stdout.write(f"metadata written: {name} {version}, which pip knows as {known}\n")
            metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
            metadata.mkdir()
            text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            (metadata / "METADATA").write_text(text)


def environment_of(folder: Path, options: argparse.Namespace) -> dict[str, str]:
    """The environment variables of a start: no cache but those in `folder`."""
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder / "code"), *filter(None, others)]),
        "VQA_MODEL": str(options.model),
        "VQA_DATA_DIR": str(options.data),
        "VQA_OUTPUT_DIR": str(folder / "runs"),
        "VQA_PRESET": options.preset,
        "VQA_RUN_NAME": "run",
        "VQA_OVERRIDES": json.dumps({} if options.tiny else OVERRIDES),
        "TMPDIR": str(folder / "tmp"),  # vision cache, compiled kernels, preflight's files
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "tmp/inductor"),
        "TRITON_CACHE_DIR": str(folder / "tmp/triton"),
    }


def measure_start(module: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds by phase of one start with that module, until the first optimizer step."""
    folder = Path(tempfile.mkdtemp(dir=options.place))
    (folder / "tmp").mkdir()
    (folder / "code").mkdir()  # the notebook takes the module of its working folder
    shutil.copy(module, folder / "code/vqa_helpers.py")
    (folder / "code/data").symlink_to(ROOT / "data")
    write_metadata(folder / "code")
    forget_files(Path(options.model))
    with (folder / "notebook.log").open("wb") as log:
        watch = Watch(folder, time.time())
        process = subprocess.Popen(
            [sys.executable, __file__, "--cells"],
            stdout=log,
            stderr=log,
            cwd=folder / "code",
            env=environment_of(folder, options),
        )
    try:
        while not watch.look():
            if process.poll() is not None:
                sys.stdout.write((folder / "notebook.log").read_text("utf-8", "replace")[-5000:])
                raise RuntimeError(f"the notebook's process ended, status {process.returncode}")
            if time.time() - watch.started > options.limit:
                watch.add(watch.source, LIMIT)
                break
            time.sleep(POLL_SECONDS)
        cpu = cpu_seconds(process)
    finally:
        end_all(process)
    shutil.rmtree(folder)
    marks = [Mark(watch.started, "notebook", "start"), *watch.marks]
    return {**phases_of_start(marks), CPU: cpu}


# === Table ========================================================================================
def print_table(starts: dict[str, list[dict[str, float]]]) -> None:
    """The median of each phase for each module, and the ratios of the last to the first."""
    columns = {name: pd.DataFrame(rows).median() for name, rows in starts.items()}
    order = {}  # of the phases, as they come
    for rows in starts.values():
        for phases in rows:
            order.update(dict.fromkeys(phases))
    phases = [phase for phase in order if phase not in (TOTAL, CPU)]
    table = pd.DataFrame(columns).reindex([*phases, TOTAL, CPU])
    sys.stdout.write("| phase | " + " | ".join(table) + " |\n")
    sys.stdout.write("|---" * (len(table.columns) + 1) + "|\n")
    for phase, row in table.iterrows():
        cells = ["" if pd.isna(value) else f"{value:.2f}" for value in row]
        sys.stdout.write(f"| {phase} | " + " | ".join(cells) + " |\n")
    for name, rows in starts.items():
        totals = [round(phases[TOTAL], 1) for phases in rows]
        cpu = [round(phases[CPU], 1) for phases in rows]
        sys.stdout.write(f"{name}: {totals} s, {cpu} CPU s\n")
    if len(columns) > 1:
        first, *_, final = columns
        ratios = table[final] / table[first]
        sys.stdout.write(f"{final} / {first}: {ratios[TOTAL]:.2f}, CPU seconds {ratios[CPU]:.2f}\n")


# === Command line =================================================================================
BUILD = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/benchmarks"]
import dataclasses, pathlib
import bench_gpu, rehearsal
place = pathlib.Path({place!r})
def shapes(token):
    config = bench_gpu.qwen3_8b(token)
    config.text_config.num_hidden_layers = {layers}
    return config
if {model_too}:
    bench_gpu.build(dataclasses.replace(bench_gpu.SIZES["8b"], make_config=shapes), place)
rehearsal.enlarge_demo(place / "data", rows={rows}, pixels=512, test_rows=64)
"""


def build(options: argparse.Namespace) -> None:
    """Data of a real-size run, and its model unless it is stored, made by a process of its own."""
    values = {
        "model_too": not options.folder,
        "root": str(ROOT),
        "place": str(options.place),
        "layers": options.layers,
        "rows": options.rows,
    }
    begin = time.time()
    subprocess.run([sys.executable, "-c", BUILD.format(**values)], check=True)
    sys.stdout.write(f"made in {time.time() - begin:.0f} s\n")
    options.model = options.folder or options.place / "model"
    options.data = options.place / "data"
    options.preset = "gpu_24gb"


def parse_arguments() -> argparse.Namespace:
    """Options of the command line, and where the run finds its model and data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the demo on this CPU")
    parser.add_argument(
        "--modules",
        nargs="+",
        type=Path,
        default=[ROOT / "vqa_helpers.py"],
        help="files of vqa_helpers to be compared, the older one first",
    )
    parser.add_argument("--repeats", type=int, default=1, help="starts of each module")
    parser.add_argument("--limit", type=float, default=220, help="seconds that a start may take")
    parser.add_argument("--folder", default="", help="a stored model, else random weights are made")
    parser.add_argument("--layers", type=int, default=36, help="of the 8B that is made")
    parser.add_argument("--rows", type=int, default=256, help="training rows of a real-size run")
    parser.add_argument("--place", type=Path, help="folder for model and runs")
    parser.add_argument("--cells", action="store_true", help="be the notebook's process")
    options = parser.parse_args()
    options.data = ROOT / "data"
    options.model = options.data / "tiny_qwen3_vl"
    options.preset = "demo"
    return options


def main() -> None:
    options = parse_arguments()
    if options.cells:
        run_cells()
        return
    options.place = Path(options.place or tempfile.mkdtemp())
    if not options.tiny:
        build(options)
    starts = {}
    for repeat in range(options.repeats):
        for number, module in enumerate(options.modules):
            name = f"{number + 1}: {module.resolve().parent.name}/{module.name}"
            sys.stdout.write(f"start {repeat + 1} of {name}\n")
            starts.setdefault(name, []).append(measure_start(module, options))
            print_table({name: starts[name][-1:]})
    print_table(starts)


if __name__ == "__main__":
    main()
