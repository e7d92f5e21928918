"""What a checkpoint costs: milliseconds, bytes, and its share of training.

    python tests/benchmarks/checkpoint_cost.py                        # the demo, on this CPU
    VQA_MODEL=/folder VQA_DATA_DIR=/folder \\
        python tests/benchmarks/checkpoint_cost.py --preset colab_t4  # a real model, on a GPU

Prints one table. The share of training is at the default interval between checkpoints. A few
optimizer steps are timed; before them the features of all training images are computed, unless an
earlier run has stored them.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import vqa_helpers as vqa


def open_trainer(preset: str, folder: str) -> vqa.FoldTrainer:
    """A trainer of fold 0 with cached features, whose run lies in `folder`."""
    config = vqa.load_config(preset, {"output_dir": folder, "max_fallback_share": 0.1})
    competition = vqa.load_competition(config.data_dir, config.max_fallback_share)
    folds = vqa.make_folds(competition.train, config.n_folds, config.seed)
    run = vqa.start_run(config, competition, folds)
    session = vqa.open_session(config, run.train.iloc[0])
    budget = vqa.pixel_budget(config, session.processor)
    session.vision_cache.fill(run.train, budget, session.progress)
    return vqa.FoldTrainer(session, run, 0)


def time_steps(trainer: vqa.FoldTrainer, count: int) -> float:
    """Median seconds of the last `count` optimizer steps of an epoch, the first one left out."""
    ends = []
    trainer.log_step = lambda *_: ends.append(time.perf_counter())
    steps = trainer.schedule.phase(0).steps
    trainer.train_epoch(0, max(0, steps - count))
    return float(np.median(np.diff(ends)))


def time_saves(trainer: vqa.FoldTrainer, count: int) -> float:
    """Median seconds of `count` checkpoints, which hold the best epoch's weights as well."""
    best_tensors = {}
    for name, value in trainer.parameters.items():
        best_tensors[name] = value.detach().cpu().clone()
    # As after the first epoch.
    trainer.best = {"score": [0.5, -1.0], "epoch": 0, "tensors": best_tensors}
    seconds = []
    for step in range(count):
        start = time.perf_counter()
        trainer.save(1, step)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def measure(options: argparse.Namespace, folder: str) -> dict:
    """The table's numbers by name."""
    trainer = open_trainer(options.preset, folder)
    config = trainer.config
    step_seconds = time_steps(trainer, options.steps)
    save_seconds = time_saves(trainer, options.saves)
    checkpoint = trainer.checkpoints.latest_verified()
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    parameters = sum(value.numel() for value in trainer.parameters.values())
    interval = min(60 * config.save_every_minutes, config.save_every_steps * step_seconds)
    return {
        "model": config.model_id,
        "trainable parameters": f"{parameters:,}",
        "checkpoint, ms": round(1000 * save_seconds),
        "checkpoint, MB": round(size / 1e6, 1),
        "optimizer step, ms": round(1000 * step_seconds),
        "seconds between checkpoints": round(interval),
        "share of training time": f"{save_seconds / interval:.2%}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="demo")
    parser.add_argument(
        "--steps", type=int, default=6, help="optimizer steps to time; the first one is left out"
    )
    parser.add_argument("--saves", type=int, default=5, help="checkpoints to time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(options, folder)
    table = pd.DataFrame([row]).set_index("model").T.rename_axis("cost")
    print(vqa.markdown_table(table))


if __name__ == "__main__":
    main()
