"""Damage every file of a run, one at a time, and run everything again: faults.py does it.

Each ends in one of three ways. "made anew": the second run finishes with the bytes of the
undisturbed one. "named": it stops with an error of our own that names the file and says what to
do; after the file is deleted, as it says, the next run finishes with these bytes. All else is a
dead end.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fault_run import FORK, STAGES, results, start_run, write_output_to_log
from running import quiet

import vqa_helpers as vqa

OWN_ERRORS = (vqa.CheckpointError, vqa.DataError, vqa.SubmissionError, vqa.TemplateError)


# --- Damages --------------------------------------------------------------------------------------
def halved(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: len(content) // 2]


def empty(path: Path) -> bytes:
    return b""


def garbage(path: Path) -> bytes:
    return random.Random(0).randbytes(max(64, path.stat().st_size))


def of_another_type(path: Path) -> bytes:
    """A readable file of its kind that says nothing that is expected."""
    if path.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, other=np.zeros(3))
        return buffer.getvalue()
    if path.suffix == ".csv":
        return b"other\n1\n"
    if path.suffix == ".safetensors":
        header = json.dumps({}).encode()
        return len(header).to_bytes(8, "little") + header
    return b'["other"]\n'


DAMAGES = {
    "half": halved,
    "empty": empty,
    "garbage": garbage,
    "another type": of_another_type,
}


@dataclass(frozen=True)
class Case:
    """One file of one state of the run, and what is done to it."""

    state: str  # finished, or unfinished
    source: Path  # the place of the run in that state
    file: Path  # relative to the place
    damage: str  # a key of DAMAGES

    @property
    def name(self) -> str:
        return f"{self.state}: {file_kind(self.file)} ({self.damage})"


def file_kind(path: Path) -> str:
    """A file's name without the numbers and hashes in which its like differ."""
    name = path.as_posix().removeprefix("outputs/").removeprefix("run/")
    name = re.sub(r"fold_\d+", "fold_N", name)
    name = re.sub(r"step_\d+\+*", "step_N", name)
    return re.sub(r"[0-9a-f]{16,}", "HASH", name)


def files_by_kind(place: Path) -> dict[str, Path]:
    """One file of every kind, the last by name: of checkpoints the newest."""
    files = {}
    for folder in ("outputs", "cache"):
        for path in sorted((place / folder).rglob("*")):
            if path.is_file():
                relative = path.relative_to(place)
                files[file_kind(relative)] = relative
    return files


def make_cases(state: str, source: Path, every: bool) -> Iterator[Case]:
    """Each file with every damage, or with one of them that its name decides."""
    names = list(DAMAGES)
    for kind, file in files_by_kind(source).items():
        damages = names if every else [names[zlib.crc32(kind.encode()) % len(names)]]
        for damage in damages:
            yield Case(state, source, file, damage)


# --- Running again --------------------------------------------------------------------------------
def run_notebook(data: Path, place: Path) -> None:
    """All that Run all reads and writes of a run, in this process."""
    torch.set_num_threads(1)
    run = start_run(data, place, {})
    with run.lock_folds([0, 1]):
        vqa.run_stages(run, [0], ["zeroshot"], quiet)
        vqa.run_stages(run, [0, 1], STAGES, quiet)
    run.seconds_left()
    vqa.note_start(run)
    evaluation = vqa.evaluate_run(run)
    vqa.write_submissions(run, evaluation)
    vqa.write_report(run, evaluation)
    vqa.experiment_table(run.directory.parent)
    vqa.wrap_up_table(run)
    for fold in run.finished_folds:
        vqa.read_fold_result(run, fold)


def says_what_to_do(error: Exception, file: Path) -> bool:
    remedies = ("delete it", "choose a new run_name", "run again")
    message = str(error)
    is_remedy = any(remedy in message for remedy in remedies)
    return isinstance(error, OWN_ERRORS) and file.name in message and is_remedy


def try_case(case: Case, data: Path, expected: dict, folder: Path) -> str:
    """How it ends."""
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        shutil.copytree(case.source, place, dirs_exist_ok=True)
        path = place / case.file
        path.write_bytes(DAMAGES[case.damage](path))
        outcome = "made anew"
        try:
            run_notebook(data, place)
        except Exception as error:
            if not says_what_to_do(error, case.file):
                return f"dead end: {type(error).__name__}: {error}"
            outcome = "named"
            path.unlink()
            run_notebook(data, place)
        return outcome if results(place) == expected else "dead end: other bytes"
    except Exception as error:
        return f"dead end: after the advice: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(place, ignore_errors=True)


def try_cases(queue, cases: list[Case], data: Path, expected: dict, folder: Path) -> None:
    """One process that goes through its share of the cases."""
    write_output_to_log(folder / f"damages {os.getpid()}")
    for case in cases:
        queue.put((case.name, try_case(case, data, expected, folder)))
    queue.put(None)


def finish(data: Path, place: Path) -> None:
    write_output_to_log(place)
    run_notebook(data, place)


def complete(data: Path, place: Path) -> None:
    """Let a process write what the notebook writes of a run beside its scores."""
    process = FORK.Process(target=finish, args=(data, place))
    process.start()
    process.join()
    assert process.exitcode == 0, (place / "log").read_text()[-3000:]


def outcomes(
    cases: list[Case], data: Path, expected: dict, folder: Path, jobs: int
) -> dict[str, str]:
    """Name of each case -> how it ended; so many processes at a time."""
    queue = FORK.Queue()
    shares = [cases[number::jobs] for number in range(jobs)]
    processes = []
    for share in filter(None, shares):
        arguments = (queue, share, data, expected, folder)
        processes.append(FORK.Process(target=try_cases, args=arguments))
    for process in processes:
        process.start()
    found = {}
    running = len(processes)
    while running:
        item = queue.get()
        if item is None:
            running -= 1
            continue
        name, outcome = item
        found[name] = outcome
        if outcome.startswith("dead end"):
            print(f"{name} | {outcome}", flush=True)
    for process in processes:
        process.join()
    with contextlib.suppress(OSError):
        queue.close()
    return found
