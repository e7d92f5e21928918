"""The small run that faults.py breaks, and what kills it from inside.

The module has no hooks: a watched run patches the functions around which a kill would hurt.
"""

import dataclasses
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path

import torch
from running import quiet

import vqa_helpers as vqa

SETTINGS = {
    "num_epochs": 2,
    "n_folds": 2,
    "batch_size": 4,
    "grad_accum_steps": 2,
    "zeroshot_rows": 8,
    "lora_dropout": 0.1,
    "use_swa": True,
    "tta_rotations": 2,
    "infer_batch_size": 4,
    "save_every_steps": 1,
    "max_fallback_share": 0.5,
    "use_base_member": "on",
}
STAGES = ["train", "predict", "base"]  # after zero-shot
# The children share the parent's imports: nothing is computed before.
FORK = multiprocessing.get_context("fork")


# --- The small run --------------------------------------------------------------------------------
def start_run(data: Path, place: Path, overrides: dict) -> vqa.Run:
    """The run of this place, on this competition."""
    places = {
        "data_dir": str(data),
        "output_dir": str(place / "outputs"),
        "run_name": "run",
        "cache_dir": str(place / "cache"),
    }
    config = vqa.Config.preset("demo", **{**SETTINGS, **places, **overrides})
    competition = vqa.load_competition(config.data_dir, config.max_fallback_share)
    folds = vqa.make_folds(competition.train, config.n_folds, config.seed)
    return vqa.start_run(config, competition, folds)


def run_all(data: Path, place: Path, overrides: dict) -> None:
    """What Run all does, in this process."""
    torch.set_num_threads(1)
    run = start_run(data, place, overrides)
    with run.lock_folds([0, 1]):
        vqa.run_stages(run, [0], ["zeroshot"], quiet)
        vqa.run_stages(run, [0, 1], STAGES, quiet)
    vqa.write_submissions(run, vqa.evaluate_run(run))


def launch(data: Path, place: Path) -> None:
    """As the notebook does: the stages run in worker processes."""
    write_output_to_log(place)
    run = start_run(data, place, {})
    os.environ["OMP_NUM_THREADS"] = "1"  # the bits of the reference
    vqa.run_zeroshot(run)
    vqa.run_folds(run.config)


def results(place: Path) -> dict[str, bytes]:
    """The files that must not depend on what happened on the way."""
    run = place / "outputs" / "run"
    patterns = (
        "fold_*/adapter_*/adapter_model.safetensors",
        "fold_*/oof.npz",
        "fold_*/test.npz",
        "fold_*/base_*.npz",
        "submission_*.csv",
    )
    contents = {}
    for pattern in patterns:
        for path in run.glob(pattern):
            contents[str(path.relative_to(run))] = path.read_bytes()
    return contents


def steps_done(place: Path) -> int:
    """Optimizer steps that all processes of this place have taken; a worker's do not count."""
    path = place / "steps"
    return path.stat().st_size if path.exists() else 0


def read_log(place: Path) -> str:
    return (place / "log").read_text()


def write_output_to_log(place: Path) -> None:
    """Let this process write to the log of its place."""
    place.mkdir(parents=True, exist_ok=True)
    log = (place / "log").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)


# --- Watching and killing from inside -------------------------------------------------------------
@dataclasses.dataclass
class Watch:
    """Counts the places where a kill would hurt, and kills this process at the chosen one."""

    place: Path
    kind: str = ""  # of the place where to kill
    number: int = -1  # of the place, among those of its kind
    seen: Counter = dataclasses.field(default_factory=Counter)  # places by kind

    def is_reached(self, kind: str) -> bool:
        """Whether this is the chosen one; notes every place for the plan of the cases."""
        self.seen[kind] += 1
        with (self.place / "events").open("a") as file:
            file.write(f"{kind}\n")
        return kind == self.kind and self.seen[kind] == self.number

    def die_at(self, kind: str) -> None:
        if self.is_reached(kind):
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner, name: str, kind: str) -> None:
        """Patch a function so that it may be the one that is not called any more."""
        function = getattr(owner, name)

        def watched(*arguments, **options):
            self.die_at(kind)
            return function(*arguments, **options)

        setattr(owner, name, watched)

    def watch_files(self) -> None:
        """Patch the writing of files so that one may be half written."""
        write_file = vqa._write_file

        def half_written(path: Path, content: bytes, durable: bool = True) -> None:
            inside = "checkpoint file" if "checkpoints" in str(path) else "file"
            if self.is_reached(f"in the middle of writing a {inside}"):
                path.write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            write_file(path, content, durable)

        vqa._write_file = half_written

    def watch_steps(self) -> None:
        """Patch the end of an optimizer step so that it is counted, and may be the last."""
        update = vqa.FoldTrainer.update_schedule_and_averages

        def counted(trainer, epoch: int) -> None:
            with (self.place / "steps").open("a") as file:
                file.write("x")
            update(trainer, epoch)
            self.die_at("after an optimizer step")

        vqa.FoldTrainer.update_schedule_and_averages = counted

    def watch_inference(self) -> None:
        """Patch scoring so that any batch may be the last; the base model's have their own kind."""
        score_batch = vqa.score_batch
        stage_base = vqa.stage_base
        kinds = ["during inference"]

        def watched_stage(*arguments) -> None:
            kinds.append("during the base model's inference")
            stage_base(*arguments)
            kinds.pop()

        def watched_batch(*arguments):
            self.die_at(kinds[-1])
            return score_batch(*arguments)

        vqa.STAGES["base"] = watched_stage
        vqa.score_batch = watched_batch

    def install(self) -> None:
        if (self.place / "keep one").exists():
            vqa.CheckpointManager.__init__.__defaults__ = (1,)
        self.watch_files()
        self.watch_steps()
        self.watch(vqa.os, "replace", "before a rename")
        self.watch(vqa, "_fsync_folder", "after a rename")
        self.watch(vqa.shutil, "rmtree", "before a folder is removed")
        self.watch(vqa.CheckpointManager, "prune", "before pruning")
        self.watch(vqa, "training_loss", "in the middle of accumulation")
        self.watch(vqa.FoldTrainer, "end_epoch", "at the end of an epoch")
        self.watch(vqa.FoldTrainer, "finish", "after the last epoch")
        self.watch(vqa, "attach_lora", "between folds")
        self.watch(vqa.VisionCache, "compute_features", "during caching")
        self.watch_inference()
        self.watch(vqa, "select_weights", "before the weights are selected")


def child(data: Path, place: Path, kind: str, number: int, overrides: dict) -> None:
    write_output_to_log(place)
    Watch(place, kind, number).install()
    run_all(data, place, overrides)


def start(data: Path, place: Path, kind: str = "", number: int = -1, **overrides) -> int:
    """Run in a process of its own; its exit code, negative for a signal."""
    process = FORK.Process(target=child, args=(data, place, kind, number, overrides))
    process.start()
    process.join()
    return process.exitcode
