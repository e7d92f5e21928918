"""Test tables of 1,000 to 100,000 rows: does anything grow faster than they do?

    python tests/benchmarks/many_rows.py --kill 0.2        # 1,000, 10,000 and 100,000 rows
    python tests/benchmarks/many_rows.py --rows 10000      # smaller
    python tests/benchmarks/many_rows.py --rows 1000 --rotations 4

Each size is a competition of its own: the demo's training rows, and test rows on the demo's
pictures, each row with a file of its own (a hard link), a number in its question and its choices
shuffled. One fold of two is trained for one epoch of 200 rows. A process of its own does what the
notebook does, with the worker process that it starts. With --kill the largest table's worker gets
SIGKILL at this share of its scoring, and the stage is run again.

Prints the seconds of every step, rows a second of scoring (of time, and of the worker's time on
the CPU, which other programs do not disturb), the peaks of memory (VmHWM; the worker's is taken
from the first scores of test rows on, the model itself among it), and the sizes of large files.
With one thread a row takes about 10 ms in one view, and 20 ms in four.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import psutil
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import vqa_helpers as vqa  # noqa: E402

SETTINGS = {
    "n_folds": 2,
    "train_folds": [0],
    "num_epochs": 1,
    "use_sample": True,
    "sample_size": 200,
    "zeroshot_rows": 32,
    "use_base_member": "off",
}
POLL_SECONDS = 0.1
TEST_LABEL = "fold 0 test"  # of the worker's progress while it scores test rows


# === The competition ==============================================================================
def many_questions(count: int, seed: int = 0) -> Iterator[dict]:
    """Test rows on the demo's pictures: their choices shuffled, their questions with a number."""
    demo = pd.read_csv(vqa.DEMO / "test.csv", dtype=str, keep_default_na=False)
    records = demo.to_dict("records")
    generator = random.Random(seed)
    for number in range(count):
        row = records[number % len(records)]
        choices = [row[letter] for letter in vqa.CHOICES]
        generator.shuffle(choices)
        yield {
            "id": f"row_{number:06}",
            "picture": row["path"],
            "path": f"many/{number // 1000:03}/{number:06}.jpg",
            "question": f"{number % 977 + 1}번 문제. {row['question']}",
            **dict(zip(vqa.CHOICES, choices, strict=True)),
        }


def write_competition(folder: Path, count: int) -> Path:
    """A competition with the demo's training rows and `count` test rows, each with its own file."""
    shutil.copytree(vqa.DEMO / "images", folder / "images")
    shutil.copy(vqa.DEMO / "train.csv", folder / "train.csv")
    test = pd.DataFrame(many_questions(count))
    for picture, path in zip(test["picture"], test["path"], strict=True):
        link = folder / "images" / path
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / "images" / picture, link)
    test.drop(columns="picture").to_csv(folder / "test.csv", index=False)
    test[["id"]].assign(answer="").to_csv(folder / "sample_submission.csv", index=False)
    return folder


def cut_model(folder: Path, layers: int) -> Path:
    """The demo's model with its first layers only."""
    shutil.copytree(vqa.DEMO / "tiny_qwen3_vl", folder)
    shapes = json.loads((folder / "config.json").read_text())
    shapes["text_config"]["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(shapes))
    file = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        layer = re.search(r"language_model\.layers\.(\d+)\.", name)
        if layer is None or int(layer[1]) < layers:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


# === Watching =====================================================================================
def peak_mib(pid: int | str = "self") -> float:
    """Peak of the resident memory of a process so far, in MiB; 0 where it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return 0.0


@dataclass
class WorkerWatch:
    """What is seen of the worker from outside, while it scores test rows."""

    run: vqa.Run
    kill_at: float = 1.0  # share of the batches after which it gets SIGKILL; 1: never
    peak: float = 0.0  # MiB, since the first batch of test rows
    first: tuple[float, float, int] | None = None  # time, CPU seconds, batches done
    last: tuple[float, float, int] | None = None
    began: float = field(default_factory=time.monotonic)
    is_over: bool = False

    def look(self) -> None:
        state = {}
        with contextlib.suppress(OSError):
            state = json.loads((self.run.directory / "progress_0.json").read_text())
        if state.get("stage") != TEST_LABEL:
            return
        for worker in psutil.Process().children():
            with contextlib.suppress(psutil.Error, OSError):
                if self.first is None:
                    Path(f"/proc/{worker.pid}/clear_refs").write_text("5")  # forget the peak
                self.last = (time.monotonic(), sum(worker.cpu_times()[:2]), state["done"])
                self.first = self.first or self.last
                self.peak = max(self.peak, peak_mib(worker.pid))
                if state["done"] >= self.kill_at * state["total"] and self.kill_at < 1:
                    worker.send_signal(signal.SIGKILL)
                    self.is_over = True

    def watch(self) -> None:
        while not self.is_over:
            self.look()
            time.sleep(POLL_SECONDS)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self.watch)
        thread.start()
        try:
            yield
        finally:
            self.is_over = True
            thread.join()


@dataclass
class Steps:
    """The seconds of each step, and the peak of this process's memory after it."""

    rows: dict[str, dict] = field(default_factory=dict)

    def do(self, name: str, work: Callable, *arguments):
        """What the work returns."""
        begin = time.monotonic()
        with contextlib.redirect_stdout(sys.stderr):  # progress
            result = work(*arguments)
        seconds = time.monotonic() - begin
        self.rows[name] = {"seconds": f"{seconds:.1f}", "peak MiB": round(peak_mib())}
        return result


# === One size =====================================================================================
def prepare(
    folder: Path, count: int, rotations: int, layers: int, steps: Steps
) -> tuple[vqa.Run, pd.Series]:
    """The run, and the group of each training row; without preflight and figures."""
    data = steps.do("make the competition", write_competition, folder / "data", count)
    model = cut_model(folder / "model", layers)
    settings = {**SETTINGS, "tta_rotations": rotations, "data_dir": str(data)}
    places = {"output_dir": str(folder), "run_name": "run", "cache_dir": str(folder / "features")}
    config = vqa.Config.preset("demo", model_id=str(model), **settings, **places)
    vqa.setup_logging(config.run_dir, "WARNING", to_file=False)
    competition = steps.do(
        "read tables and images",
        vqa.load_competition,
        config.data_dir,
        config.max_fallback_share,
        config.rows_to_use,
    )
    leakage = steps.do("leakage report", vqa.leakage_report, competition.train, competition.test)
    folds = vqa.make_folds(competition.train, config.n_folds, config.seed, leakage.image_group)
    run = steps.do("start the run", vqa.start_run, config, competition, folds)
    steps.do("tables of copies", vqa.save_table, leakage.groups, run, "copies")
    vqa.save_table(leakage.copies, run, "copy_pairs")
    steps.do("zero-shot", vqa.run_zeroshot, run)
    return run, leakage.image_group


def score(run: vqa.Run, kill: float, steps: Steps, facts: dict) -> list[vqa.FoldResult]:
    """Train and predict in the worker, which may be killed once."""
    if kill:
        killed = WorkerWatch(run, kill_at=kill)
        with contextlib.suppress(RuntimeError), killed.watching():
            steps.do("training and scoring until SIGKILL", vqa.run_folds, run.config)
        facts["batches done at SIGKILL"] = killed.last[2]
    watch = WorkerWatch(run)
    with watch.watching():
        results = steps.do("training and scoring", vqa.run_folds, run.config)
    if kill:
        facts["batches done when it goes on"] = watch.first[2]
        facts["seconds until the next batch"] = round(watch.first[0] - watch.began, 1)
    seconds = watch.last[0] - watch.first[0]
    on_cpu = watch.last[1] - watch.first[1]
    rows = (watch.last[2] - watch.first[2]) * run.config.infer_batch_size
    facts["rows/s"] = round(rows / seconds, 1)
    facts["rows per second on the CPU"] = round(rows / on_cpu, 1)
    facts["MiB of the worker at its peak"] = round(watch.peak)
    return results


def write_results(
    run: vqa.Run, results: Sequence[vqa.FoldResult], image_group: pd.Series, steps: Steps
) -> None:
    """Tables, submission and report, as the notebook writes them."""
    evaluation = steps.do("evaluation", vqa.evaluate_run, run)
    verdict = steps.do("verdict", vqa.make_verdict, run, evaluation, results, "", 0.0)
    figures = steps.do("a figure", vqa.plot_ladder, evaluation.ladder)
    vqa.save_figure(figures, run, "ladder")
    steps.do("tables of errors", vqa.write_error_tables, run, evaluation, image_group)
    steps.do("submission", vqa.write_submissions, run, evaluation)
    steps.do("report", vqa.write_report, run, evaluation, verdict)


def file_sizes(run: vqa.Run) -> dict[str, float]:
    """MB of each file of at least 1 MB that grows with the test rows."""
    sizes = {}
    for path in sorted(run.directory.rglob("*")):
        size = path.stat().st_size / 1e6
        name = str(path.relative_to(run.directory))
        if path.is_file() and size >= 1 and "checkpoints" not in name:
            sizes[f"MB of {name}"] = round(size, 1)
    return sizes


def measure(count: int, rotations: int, layers: int, kill: float) -> None:
    """One size, in this process; prints what it took."""
    steps = Steps()
    facts = {}
    with tempfile.TemporaryDirectory() as place:
        run, image_group = prepare(Path(place), count, rotations, layers, steps)
        results = score(run, kill, steps, facts)
        write_results(run, results, image_group, steps)
        submission = (run.directory / "submission_ensemble.csv").read_bytes()
        facts["MiB of the notebook's process at its peak"] = round(peak_mib())
        facts.update(file_sizes(run))
        facts["SHA-256 of the submission"] = hashlib.sha256(submission).hexdigest()[:8]
        table = pd.DataFrame.from_dict(steps.rows, orient="index").rename_axis("step")
        text = pd.Series(facts).to_string()
        heading = f"\n{count} rows, {rotations} views\n"
        sys.stdout.write(f"{heading}{vqa.markdown_table(table)}\n{text}\n")
        sys.stdout.flush()
        steps.do("preflight", vqa.run_preflight, run.config)
        sys.stdout.write(f"seconds of preflight: {steps.rows['preflight']['seconds']}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--rotations", type=int, nargs="+", default=[1])
    parser.add_argument("--layers", type=int, default=4, help="of the demo's model, at most 4")
    parser.add_argument("--kill", type=float, default=0, help="SIGKILL at this share of scoring")
    options = parser.parse_args()
    sizes = [(rows, views) for rows in options.rows for views in options.rotations]
    if len(sizes) == 1:
        [(rows, views)] = sizes
        measure(rows, views, options.layers, options.kill)
        return
    for rows, views in sizes:  # each in a process of its own, whose peak is its own
        command = [sys.executable, __file__, "--rows", str(rows), "--rotations", str(views)]
        # Small tables are scored before the signal comes.
        kill = options.kill if rows == max(options.rows) else 0
        subprocess.run([*command, "--layers", str(options.layers), "--kill", str(kill)], check=True)


if __name__ == "__main__":
    main()
