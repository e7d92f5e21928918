"""Break a small run in every way we know, run it again, and compare it with one that was left alone.

    python tests/faults.py                     # all faults, ten to fifteen minutes on two cores
    python tests/faults.py --kills 1           # one kill in each kind of place: less than half of the time
    python tests/faults.py --only checkpoint   # the cases whose name contains this
    python tests/faults.py --demo              # three kills of the full demo, about fifteen minutes

Each case runs the whole pipeline (zero-shot, two folds, test, submission) in a process of its own, injects one fault by
patching from here (the module has no hooks), and starts it again without the fault. The second run must finish by
itself, and its adapters, logits and submissions must be the same bytes as those of the undisturbed run.
"""

import argparse
import dataclasses
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import vqa_helpers as vqa  # noqa: E402

SETTINGS = {
    "num_epochs": 2,
    "n_folds": 2,
    "batch_size": 4,
    "grad_accum_steps": 2,
    "zeroshot_rows": 8,
}
SETTINGS |= {
    "lora_dropout": 0.1,
    "use_swa": True,
    "tta_rotations": 2,
    "infer_batch_size": 4,
    "save_every_steps": 1,
}
SETTINGS |= {"max_fallback_share": 0.5}
FORK = multiprocessing.get_context(
    "fork"
)  # the children share the parent's imports: nothing is computed before


# ---------------------------------------------------------------------------------------------------------------------
# The small run
# ---------------------------------------------------------------------------------------------------------------------
def make_data(folder: Path) -> Path:
    """A competition of 24 training and 8 test rows of the demo."""
    for name, rows in (("train", 24), ("test", 8), ("sample_submission", 8)):
        frame = pd.read_csv(vqa.DEMO / f"{name}.csv", dtype=str, keep_default_na=False).head(rows)
        folder.mkdir(exist_ok=True)
        frame.to_csv(folder / f"{name}.csv", index=False)
        for path in frame.get("path", ()):
            (folder / path).parent.mkdir(exist_ok=True)
            shutil.copy(vqa.DEMO / "images" / path, folder / path)
    return folder


def run_all(data: Path, place: Path, overrides: dict) -> None:
    """What Run all does, in this process."""
    torch.set_num_threads(1)
    places = {
        "output_dir": str(place / "outputs"),
        "run_name": "run",
        "cache_dir": str(place / "cache"),
    }
    config = vqa.Config.preset("demo", data_dir=str(data), **{**SETTINGS, **places, **overrides})
    competition = vqa.load_competition(config.data_dir, config.max_fallback_share)
    folds = vqa.make_folds(competition.train, config.n_folds, config.seed)
    run = vqa.start_run(config, competition, folds)
    with run.lock_folds([0, 1]):
        vqa.run_stages(run, [0], ["zeroshot"], lambda *_, **__: None)
        vqa.run_stages(run, [0, 1], ["train", "predict"], lambda *_, **__: None)
    vqa.write_submissions(run, vqa.evaluate_run(run))


def results(place: Path) -> dict[str, bytes]:
    """The files that must not depend on what happened on the way."""
    run = place / "outputs" / "run"
    patterns = (
        "fold_*/adapter_*/adapter_model.safetensors",
        "fold_*/oof.npz",
        "fold_*/test.npz",
        "submission_*.csv",
    )
    return {
        str(path.relative_to(run)): path.read_bytes()
        for pattern in patterns
        for path in run.glob(pattern)
    }


def steps_done(place: Path) -> int:
    """Optimizer steps that all processes of this place have taken."""
    path = place / "steps"
    return path.stat().st_size if path.exists() else 0


# ---------------------------------------------------------------------------------------------------------------------
# Watching and killing from outside
# ---------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Watch:
    """Counts the places where a kill would hurt, and kills this process at the chosen one."""

    place: Path
    kind: str = ""
    number: int = -1
    seen: Counter = dataclasses.field(default_factory=Counter)

    def reached(self, kind: str) -> bool:
        """Whether this is the chosen one; notes every kind for the plan of the cases."""
        self.seen[kind] += 1
        with (self.place / "events").open("a") as file:
            file.write(f"{kind}\n")
        return kind == self.kind and self.seen[kind] == self.number

    def die_at(self, kind: str) -> None:
        if self.reached(kind):
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, owner, name: str, kind: str) -> None:
        """Patch a function so that it can be the last one that is called."""
        function = getattr(owner, name)

        def watched(*arguments, **options):
            self.die_at(kind)
            return function(*arguments, **options)

        setattr(owner, name, watched)

    def install(self) -> None:
        if (self.place / "keep one").exists():
            vqa.CheckpointManager.__init__.__defaults__ = (1,)
        write_file, step = vqa._write_file, vqa.FoldTrainer.after_step

        def half_written(path: Path, content: bytes, durable: bool = True) -> None:
            inside = "checkpoint file" if "checkpoints" in str(path) else "file"
            if self.reached(f"in the middle of writing a {inside}"):
                path.write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            write_file(path, content, durable)

        def counted(trainer, epoch: int) -> None:
            with (self.place / "steps").open("a") as file:
                file.write("x")
            step(trainer, epoch)
            self.die_at("after an optimizer step")

        vqa._write_file, vqa.FoldTrainer.after_step = half_written, counted
        self.before(vqa.os, "replace", "before a rename")
        self.before(vqa, "_fsync_folder", "after a rename")
        self.before(vqa.shutil, "rmtree", "before a folder is removed")
        self.before(vqa.CheckpointManager, "prune", "before pruning")
        self.before(vqa, "training_loss", "in the middle of accumulation")
        self.before(vqa.FoldTrainer, "end_epoch", "at the end of an epoch")
        self.before(vqa.FoldTrainer, "finish", "after the last epoch")
        self.before(vqa, "attach_lora", "between folds")
        self.before(vqa.VisionCache, "compute", "during caching")
        self.before(vqa, "score_batch", "during inference")
        self.before(vqa, "select_weights", "before the weights are selected")


def child(data: Path, place: Path, kind: str, number: int, overrides: dict) -> None:
    place.mkdir(parents=True, exist_ok=True)
    log = (place / "log").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    Watch(place, kind, number).install()
    run_all(data, place, overrides)


def start(data: Path, place: Path, kind: str = "", number: int = -1, **overrides) -> int:
    """Run in a process of its own; its exit code, negative for a signal."""
    process = FORK.Process(target=child, args=(data, place, kind, number, overrides))
    process.start()
    process.join()
    return process.exitcode


# ---------------------------------------------------------------------------------------------------------------------
# Cases: what is done to a run before it is started again
# ---------------------------------------------------------------------------------------------------------------------
def killed(kind: str, number: int):
    """SIGKILL at the `number`th place of a kind."""

    def break_it(data: Path, place: Path) -> dict:
        assert start(data, place, kind, number) == -signal.SIGKILL, "the fault was not reached"
        return {}

    return break_it


def killed_with_one_kept(kind: str, number: int):
    """The same in a run that keeps no older checkpoint to fall back on."""

    def break_it(data: Path, place: Path) -> dict:
        (place / "keep one").touch()
        return killed(kind, number)(data, place)

    return break_it


def newest_checkpoint(place: Path) -> Path:
    return max(
        (place / "outputs" / "run").glob("fold_*/checkpoints/step_*"),
        key=lambda path: path.stat().st_mtime,
    )


def damaged(name: str, damage: str):
    """A kill in the second epoch, then one file of the newest checkpoint truncated, flipped or deleted."""

    def break_it(data: Path, place: Path) -> dict:
        assert start(data, place, "after an optimizer step", 3) == -signal.SIGKILL
        path = newest_checkpoint(place) / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[:-7] if damage == "truncated" else content)
        if damage == "deleted":
            path.unlink()
        return {}

    return break_it


def littered(data: Path, place: Path) -> dict:
    """A kill, and temporary files and folders of earlier ones lying around."""
    assert start(data, place, "after an optimizer step", 3) == -signal.SIGKILL
    checkpoints = newest_checkpoint(place).parent
    (checkpoints / ".incomplete-old").mkdir()
    (checkpoints / ".incomplete-old" / "state.pt").write_bytes(b"half")
    (checkpoints.parents[1] / ".folds.csv.1.tmp").write_bytes(b"half")
    (place / "cache").mkdir(exist_ok=True)
    (next((place / "cache").iterdir()) / ".shard.1.tmp").write_bytes(b"half")
    return {}


def damaged_afterwards(pattern: str):
    """Finished adapters or cached features damaged between two sessions."""

    def break_it(data: Path, place: Path) -> dict:
        assert start(data, place, "before the weights are selected", 1) == -signal.SIGKILL
        paths = list(place.glob(pattern))
        assert paths, f"nothing matches {pattern}"
        for path in paths:  # all of them: which kind of weights will be selected is not known yet
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        return {}

    return break_it


def full_disk(data: Path, place: Path) -> dict:
    """A file system too small for the second checkpoint; then the run moves to a larger one."""
    small = place / "small"
    small.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", small], check=True)
    try:
        assert start(data, place, output_dir=str(small)) == 1
        said = (place / "log").read_text()
        assert "the disk is full" in said and "bytes are needed" in said and "are free" in said, (
            said[-500:]
        )
        manager = vqa.CheckpointManager(small / "run" / "fold_0" / "checkpoints")
        assert manager.latest_verified() is not None, "the old checkpoint is lost"
        shutil.copytree(small / "run", place / "outputs" / "run")
    finally:
        subprocess.run(["umount", small], check=True)
    return {}


def read_only_session(data: Path, place: Path) -> dict:
    """The output of a killed session, attached read-only to a new one that starts in an empty folder."""
    assert start(data, place, "after an optimizer step", 3) == -signal.SIGKILL
    mount = place / "input" / "old-notebook"
    mount.mkdir(parents=True)
    shutil.move(place / "outputs", mount / "outputs")
    shutil.rmtree(place / "cache")
    subprocess.run(["chmod", "-R", "a-w", mount], check=True)
    return {"resume_from": (str(place / "input"),)}


def kill_the_worker(data: Path, place: Path) -> dict:
    """A real worker process, killed from outside while it trains."""
    kill_when(data, place, "checkpoints", parent_too=False)
    return {}


def kill_the_notebook(data: Path, place: Path) -> dict:
    """The process that started the worker is killed; the worker notices, saves and ends."""
    kill_when(data, place, "checkpoints", parent_too=True)
    return {}


def kill_when(data: Path, place: Path, sign: str, parent_too: bool) -> None:
    """Kill the worker, or the process that started it, once a checkpoint is there."""
    process = FORK.Process(target=launch, args=(data, place))
    process.start()
    deadline = time.monotonic() + 240
    while not list((place / "outputs").glob(f"run/fold_*/{sign}/step_*")):
        assert time.monotonic() < deadline and process.is_alive(), (place / "log").read_text()[
            -800:
        ]
        time.sleep(0.02)
    if parent_too:
        process.kill()
    else:
        command = ["pkill", "-KILL", "-f", f"worker --run {place / 'outputs' / 'run'}"]
        subprocess.run(command, check=True)
    process.join()
    while subprocess.run(
        ["pgrep", "-f", f"worker --run {place / 'outputs' / 'run'}"],
        check=False,
        capture_output=True,
    ).stdout:
        time.sleep(0.1)


def launch(data: Path, place: Path) -> None:
    """As the notebook does: the stages run in a worker process."""
    place.mkdir(parents=True, exist_ok=True)
    log = (place / "log").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    places = {
        "output_dir": str(place / "outputs"),
        "run_name": "run",
        "cache_dir": str(place / "cache"),
    }
    config = vqa.Config.preset("demo", data_dir=str(data), **{**SETTINGS, **places})
    competition = vqa.load_competition(config.data_dir, config.max_fallback_share)
    run = vqa.start_run(
        config, competition, vqa.make_folds(competition.train, config.n_folds, config.seed)
    )
    os.environ["OMP_NUM_THREADS"] = "1"  # the bits of the reference
    vqa.run_zeroshot(run)
    vqa.run_folds(run.config)


def kill_cases(events: Counter, most: int) -> dict:
    """Up to `most` evenly spaced kills of every kind of place that the undisturbed run has passed."""
    cases = {}
    for kind, count in sorted(events.items()):
        numbers = sorted({round(1 + part * (count - 1) / max(1, most - 1)) for part in range(most)})
        cases |= {
            f"SIGKILL {kind}, {number} of {count}": killed(kind, number) for number in numbers
        }
    return cases


FILES = ("tensors.safetensors", "state.pt", "metadata.json", "manifest.json")
OTHER_CASES = {
    **{f"{name} of the newest checkpoint {how}": damaged(name, how) for name in FILES for how in
       ("truncated", "bit-flipped", "deleted")},
    "SIGKILL before pruning, one kept checkpoint": killed_with_one_kept("before pruning", 4),
    "SIGKILL while pruning, one kept checkpoint": killed_with_one_kept("before a folder is removed", 4),
    "SIGKILL in a checkpoint file, one kept checkpoint": killed_with_one_kept(
        "in the middle of writing a checkpoint file", 15
    ),
    "stale temporary files": littered,
    "a finished adapter bit-flipped": damaged_afterwards("outputs/run/fold_0/adapter_*/adapter_model.safetensors"),
    "cached features bit-flipped": damaged_afterwards("cache/*/*.safetensors"),
    "a full disk": full_disk,
    "a read-only earlier session": read_only_session,
    "SIGKILL of a worker": kill_the_worker,
    "SIGKILL of the notebook": kill_the_notebook,
}  # fmt: skip


def run_case(name: str, break_it, data: Path, folder: Path, reference: dict, steps: int) -> dict:
    """Break a run, start it again, compare; a row of the table."""
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        overrides = break_it(data, place)
        status = start(data, place, **overrides)
        outcome = (
            "finished"
            if status == 0
            else f"exit status {status}: {(place / 'log').read_text()[-3000:]}"
        )
        same = results(place) == reference
        lost = max(
            0, steps_done(place) - steps
        )  # a worker's steps, in another process, are not counted
    except (
        Exception
    ) as error:  # a case that cannot be staged is a failure to show, not the end of the others
        outcome, same, lost = f"{type(error).__name__}: {error}", False, 0
    subprocess.run(["chmod", "-R", "u+w", place], check=True)
    shutil.rmtree(place)
    return {"fault": name, "outcome": outcome, "byte-equal": same, "steps lost": lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cases at a time")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument(
        "--kills", type=int, default=4, help="at most so many in each kind of place, evenly spaced"
    )
    parser.add_argument(
        "--demo", action="store_true", help="three kills of the whole demo, one at a time"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder, began = Path(name), time.time()
        data = vqa.DEMO if options.demo else make_data(folder / "data")
        if options.demo:
            SETTINGS.clear()
            options.jobs = 1
        assert start(data, folder / "reference") == 0, (folder / "reference" / "log").read_text()
        reference, steps = results(folder / "reference"), steps_done(folder / "reference")
        events = Counter((folder / "reference" / "events").read_text().splitlines())
        print(
            f"undisturbed run: {time.time() - began:.0f} s, {steps} optimizer steps, {len(reference)} files compared"
        )
        common = (data, folder, reference, steps)
        cases = {
            case: fault
            for case, fault in (kill_cases(events, options.kills) | OTHER_CASES).items()
            if options.only in case
        }
        if options.demo:
            kinds = (
                "after an optimizer step",
                "in the middle of writing a checkpoint file",
                "during inference",
            )
            middle = {kind: events[kind] // 2 for kind in kinds}
            cases = {
                f"SIGKILL {kind}, {number}": killed(kind, number) for kind, number in middle.items()
            }
        rows, queue = [], FORK.Queue()
        waiting, running = list(cases.items()), 0
        while waiting or running:
            while waiting and running < options.jobs:
                FORK.Process(
                    target=lambda *case: queue.put(run_case(*case)), args=(*waiting.pop(0), *common)
                ).start()
                running += 1
            rows.append(queue.get())
            running -= 1
            print(" | ".join(map(str, rows[-1].values())), flush=True)
    table = pd.DataFrame(rows)
    interval = SETTINGS.get("save_every_steps", vqa.Config.save_every_steps)
    table["good"] = (
        (table["outcome"] == "finished") & table["byte-equal"] & (table["steps lost"] <= interval)
    )
    table["kind"] = (
        table["fault"]
        .str.split(",")
        .str[0]
        .str.replace(r"^\S+ of the newest", "a file of the newest", regex=True)
    )
    grouped = table.groupby("kind").agg(
        faults=("good", "size"),
        same_bytes_after_the_second_run=("good", "sum"),
        steps_lost_at_most=("steps lost", "max"),
    )
    kills = table["fault"].str.startswith("SIGKILL").sum()
    print(
        "",
        vqa.markdown_table(grouped.rename(columns=lambda name: name.replace("_", " "))),
        sep="\n",
    )
    print(
        f"\n{len(table)} faults, {kills} of them kills; {(~table['good']).sum()} bad; {time.time() - began:.0f} s"
    )
    sys.exit(not table["good"].all())


if __name__ == "__main__":
    main()
