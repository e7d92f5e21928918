"""Break a small run in every way we know, run it again, and compare it with an undisturbed one.

    python tests/faults.py                     # all faults, ten to fifteen minutes on two cores
    python tests/faults.py --kills 1           # one kill in each kind of place: less than half
    python tests/faults.py --only checkpoint   # the cases whose name contains this
    python tests/faults.py --demo              # three kills of the full demo
    python tests/faults.py --kills 0           # only the damaged files

Each case runs the whole pipeline (zero-shot, two folds, test, submission) in a process of its own,
injects one fault by patching from here (the module has no hooks), and starts it again without the
fault. The second run must finish by itself, and its adapters, logits and submissions must be the
same bytes as those of the undisturbed run.

Then every file of a finished and of an unfinished run directory is damaged, one at a time, as
damaged_files.py says: cut in half, emptied, replaced by garbage or by a file that says nothing;
with --kills 1 in one of these ways, which its name decides.
"""

import argparse
import contextlib
import dataclasses
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
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from competition_folder import copy_demo_rows  # noqa: E402
from damaged_files import Case, complete, make_cases, outcomes  # noqa: E402
from fault_run import (  # noqa: E402
    FORK,
    SETTINGS,
    launch,
    read_log,
    results,
    start,
    steps_done,
)

import vqa_helpers as vqa  # noqa: E402


# --- Cases: what is done to a run before it is started again --------------------------------------
# Each takes the data and the place of the run, and returns settings of the second start.
def killed(kind: str, number: int):
    """SIGKILL at the `number`th place of a kind."""

    def break_it(data: Path, place: Path) -> dict:
        assert start(data, place, kind, number) == -signal.SIGKILL, "the fault was not reached"
        return {}

    return break_it


def kill_in_second_epoch(data: Path, place: Path) -> None:
    assert start(data, place, "after an optimizer step", 3) == -signal.SIGKILL


def killed_with_one_kept(kind: str, number: int):
    """The same in a run that keeps no older checkpoint to fall back on."""

    def break_it(data: Path, place: Path) -> dict:
        (place / "keep one").touch()
        return killed(kind, number)(data, place)

    return break_it


def newest_checkpoint(place: Path) -> Path:
    checkpoints = (place / "outputs" / "run").glob("fold_*/checkpoints/step_*")
    return max(checkpoints, key=lambda path: path.stat().st_mtime)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES = {"truncated": truncate, "bit-flipped": flip_a_bit, "deleted": Path.unlink}


def damaged(name: str, damage: str):
    """A kill in the second epoch, then one file of the newest checkpoint damaged."""

    def break_it(data: Path, place: Path) -> dict:
        kill_in_second_epoch(data, place)
        DAMAGES[damage](newest_checkpoint(place) / name)
        return {}

    return break_it


def littered(data: Path, place: Path) -> dict:
    """A kill, and temporary files and folders of earlier ones lying around."""
    kill_in_second_epoch(data, place)
    checkpoints = newest_checkpoint(place).parent
    (checkpoints / ".incomplete-old").mkdir()
    (checkpoints / ".incomplete-old" / "state.pt").write_bytes(b"half")
    (checkpoints.parents[1] / ".folds.csv.1.tmp").write_bytes(b"half")
    (place / "cache").mkdir(exist_ok=True)
    first_cache, *_ = (place / "cache").iterdir()
    (first_cache / ".shard.1.tmp").write_bytes(b"half")
    return {}


def damaged_afterwards(pattern: str):
    """Finished adapters or cached features damaged between two sessions."""

    def break_it(data: Path, place: Path) -> dict:
        assert start(data, place, "before the weights are selected", 1) == -signal.SIGKILL
        paths = list(place.glob(pattern))
        assert paths, f"nothing matches {pattern}"
        for path in paths:  # all of them: which weights will be selected is not known yet
            flip_a_bit(path)
        return {}

    return break_it


@contextlib.contextmanager
def small_disk(place: Path):
    """A file system too small for the second checkpoint."""
    disk = place / "small"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def full_disk(data: Path, place: Path) -> dict:
    """The disk is full at the second checkpoint; then the run moves to a larger one."""
    with small_disk(place) as disk:
        assert start(data, place, output_dir=str(disk)) == 1
        log = read_log(place)
        for part in ("the disk is full", "bytes are needed", "are free"):
            assert part in log, log[-500:]
        manager = vqa.CheckpointManager(disk / "run" / "fold_0" / "checkpoints")
        assert manager.latest_verified() is not None, "the old checkpoint is lost"
        shutil.copytree(disk / "run", place / "outputs" / "run")
    return {}


def read_only_session(data: Path, place: Path) -> dict:
    """The output of a killed session, attached read-only to one that starts in an empty folder."""
    kill_in_second_epoch(data, place)
    mount = place / "input" / "old-notebook"
    mount.mkdir(parents=True)
    shutil.move(place / "outputs", mount / "outputs")
    shutil.rmtree(place / "cache")
    subprocess.run(["chmod", "-R", "a-w", mount], check=True)
    return {"resume_from": (str(place / "input"),)}


def kill_the_workers(data: Path, place: Path) -> dict:
    """Real worker processes, killed from outside while they train."""
    process, workers = launch_until_a_checkpoint(data, place)
    for worker in workers:
        worker.kill()
    process.join()
    psutil.wait_procs(workers)
    return {}


def kill_the_notebook(data: Path, place: Path) -> dict:
    """The process that started the workers is killed; they notice, save and end."""
    process, workers = launch_until_a_checkpoint(data, place)
    process.kill()
    process.join()
    psutil.wait_procs(workers)
    return {}


def launch_until_a_checkpoint(data: Path, place: Path):
    """A process that has started workers, and the workers, of which one has just saved."""
    process = FORK.Process(target=launch, args=(data, place))
    process.start()
    deadline = time.monotonic() + 240
    while not list((place / "outputs").glob("run/fold_*/checkpoints/step_*")):
        assert time.monotonic() < deadline, read_log(place)[-800:]
        assert process.is_alive(), read_log(place)[-800:]
        time.sleep(0.02)
    return process, psutil.Process(process.pid).children()


OTHER_CASES = {
    "SIGKILL before pruning, one kept checkpoint": killed_with_one_kept("before pruning", 4),
    "SIGKILL while pruning, one kept checkpoint": killed_with_one_kept(
        "before a folder is removed", 4
    ),
    "SIGKILL in a checkpoint file, one kept checkpoint": killed_with_one_kept(
        "in the middle of writing a checkpoint file", 15
    ),
    "stale temporary files": littered,
    "a finished adapter bit-flipped": damaged_afterwards(
        "outputs/run/fold_0/adapter_*/adapter_model.safetensors"
    ),
    "cached features bit-flipped": damaged_afterwards("cache/*/*.safetensors"),
    "a full disk": full_disk,
    "a read-only earlier session": read_only_session,
    "SIGKILL of a worker": kill_the_workers,
    "SIGKILL of the notebook": kill_the_notebook,
}


def damage_cases() -> dict:
    """Every file of the newest checkpoint, damaged in every way."""
    cases = {}
    for name in ("tensors.safetensors", "state.pt", "metadata.json", "manifest.json"):
        for damage in DAMAGES:
            cases[f"{name} of the newest checkpoint {damage}"] = damaged(name, damage)
    return cases


def kill_cases(events: Counter, most: int) -> dict:
    """Up to `most` evenly spaced kills of every kind of place that the undisturbed run passed."""
    cases = {}
    for kind, count in sorted(events.items()):
        spacing = (count - 1) / max(1, most - 1)
        numbers = {round(1 + part * spacing) for part in range(most)}
        for number in sorted(numbers):
            cases[f"SIGKILL {kind}, {number} of {count}"] = killed(kind, number)
    return cases


def demo_cases(events: Counter) -> dict:
    """Three kills, each in the middle of what it interrupts."""
    cases = {}
    for kind in (
        "after an optimizer step",
        "in the middle of writing a checkpoint file",
        "during inference",
    ):
        number = events[kind] // 2
        cases[f"SIGKILL {kind}, {number}"] = killed(kind, number)
    return cases


def file_cases(reference: "Reference", every: bool) -> list[Case]:
    """The files of a run that is done, and of one that was killed in its last inference."""
    finished = reference.folder / "reference"
    complete(reference.data, finished)
    unfinished = reference.folder / "unfinished"
    number = reference.events["during inference"] - 1
    assert start(reference.data, unfinished, "during inference", number) == -signal.SIGKILL
    return [
        *make_cases("finished", finished, every),
        *make_cases("unfinished", unfinished, every),
    ]


# --- Running and telling --------------------------------------------------------------------------
@dataclasses.dataclass
class Reference:
    """The undisturbed run."""

    data: Path
    folder: Path  # of the places of all runs
    files: dict[str, bytes]
    steps: int
    events: Counter  # places where a kill would hurt, by kind


def undisturbed(data: Path, folder: Path) -> Reference:
    place = folder / "reference"
    assert start(data, place) == 0, read_log(place)
    events = Counter((place / "events").read_text().splitlines())
    return Reference(data, folder, results(place), steps_done(place), events)


def run_case(name: str, break_it, reference: Reference) -> dict:
    """Break a run, start it again, compare; a row of the table."""
    place = Path(tempfile.mkdtemp(dir=reference.folder))
    row = {"fault": name, "outcome": "finished", "byte-equal": False, "steps lost": 0}
    try:
        overrides = break_it(reference.data, place)
        status = start(reference.data, place, **overrides)
        if status != 0:
            row["outcome"] = f"exit status {status}: {read_log(place)[-3000:]}"
        row["byte-equal"] = results(place) == reference.files
        row["steps lost"] = max(0, steps_done(place) - reference.steps)
    except Exception as error:  # a case that cannot be staged is shown, and the others go on
        row["outcome"] = f"{type(error).__name__}: {error}"
    subprocess.run(["chmod", "-R", "u+w", place], check=True)
    shutil.rmtree(place)
    return row


def put_row(queue, name: str, break_it, reference: Reference) -> None:
    queue.put(run_case(name, break_it, reference))


def run_cases(cases: dict, reference: Reference, jobs: int) -> pd.DataFrame:
    """All cases, so many at a time, each in a process of its own; printed as they end."""
    rows = []
    queue = FORK.Queue()
    waiting = list(cases.items())
    running = 0
    while waiting or running:
        while waiting and running < jobs:
            name, break_it = waiting.pop(0)
            FORK.Process(target=put_row, args=(queue, name, break_it, reference)).start()
            running += 1
        row = queue.get()
        running -= 1
        rows.append(row)
        print(" | ".join(map(str, row.values())), flush=True)
    return pd.DataFrame(rows)


def judge(table: pd.DataFrame) -> pd.DataFrame:
    """The table with what is good of it, and the kind of each fault."""
    interval = SETTINGS.get("save_every_steps", vqa.Config.save_every_steps)
    finished = table["outcome"] == "finished"
    few_lost = table["steps lost"] <= interval
    kind = table["fault"].str.split(",").str[0]
    kind = kind.str.replace(r"^\S+ of the newest", "a file of the newest", regex=True)
    return table.assign(good=finished & table["byte-equal"] & few_lost, kind=kind)


def by_kind(table: pd.DataFrame) -> pd.DataFrame:
    grouped = table.groupby("kind").agg(
        faults=("good", "size"),
        same_bytes_after_the_second_run=("good", "sum"),
        steps_lost_at_most=("steps lost", "max"),
    )
    return grouped.rename(columns=lambda name: name.replace("_", " "))


def by_outcome(found: dict[str, str]) -> pd.DataFrame:
    """How many files of each state were made anew, named with the remedy, or a dead end."""
    states = pd.Series([name.split(":")[0] for name in found], name="state")
    ends = pd.Series([outcome.split(":")[0] for outcome in found.values()], name="outcome")
    return pd.crosstab(states, ends)


def try_damages(reference: "Reference", options: argparse.Namespace) -> int:
    """Damage file by file, print the outcomes, and return the number of dead ends."""
    began = time.time()
    cases = file_cases(reference, every=options.kills != 1)
    cases = [case for case in cases if options.only in case.name]
    found = outcomes(cases, reference.data, reference.files, reference.folder, options.jobs)
    dead_ends = sum(outcome.startswith("dead end") for outcome in found.values())
    print("", vqa.markdown_table(by_outcome(found)), "", sep="\n")
    seconds = time.time() - began
    print(f"{len(found)} damaged files; {dead_ends} dead ends; {seconds:.0f} s", flush=True)
    return dead_ends


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cases at a time")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument(
        "--kills", type=int, default=4, help="at most so many in each kind of place"
    )
    parser.add_argument("--demo", action="store_true", help="three kills of the whole demo")
    return parser.parse_args()


def print_kinds(table: pd.DataFrame, began: float) -> None:
    """The faults that were injected, by kind."""
    print("", vqa.markdown_table(by_kind(table)), "", sep="\n")
    kills = table["fault"].str.startswith("SIGKILL").sum()
    bad = (~table["good"]).sum()
    seconds = time.time() - began
    print(f"{len(table)} faults, {kills} of them kills; {bad} bad; {seconds:.0f} s", flush=True)


def main() -> None:
    options = parse_options()
    began = time.time()
    dead_ends = 0
    good = True
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        if options.demo:
            SETTINGS.clear()
            reference = undisturbed(vqa.DEMO, folder)
            cases = demo_cases(reference.events)
            jobs = 1
        else:
            data = copy_demo_rows(folder / "data", train=24, test=8)
            reference = undisturbed(data, folder)
            all_cases = {
                **kill_cases(reference.events, options.kills),
                **damage_cases(),
                **OTHER_CASES,
            }
            if options.kills:
                cases = {case: fault for case, fault in all_cases.items() if options.only in case}
            else:
                cases = {}
            jobs = options.jobs
        print(
            f"undisturbed run: {time.time() - began:.0f} s, {reference.steps} optimizer steps, "
            f"{len(reference.files)} files compared"
        )
        if cases:
            table = judge(run_cases(cases, reference, jobs))
            print_kinds(table, began)
            good = table["good"].all()
        if not options.demo:
            dead_ends = try_damages(reference, options)
    sys.exit(not good or dead_ends > 0)


if __name__ == "__main__":
    main()
