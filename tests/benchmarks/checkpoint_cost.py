"""What a checkpoint costs: milliseconds, bytes, and its share of training at the default interval.

python tests/benchmarks/checkpoint_cost.py                       # the demo
VQA_MODEL=/folder VQA_DATA_DIR=/folder python tests/benchmarks/checkpoint_cost.py --preset kaggle_t4x2
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="demo")
    parser.add_argument(
        "--steps", type=int, default=6, help="optimizer steps to time; the first one is left out"
    )
    parser.add_argument("--saves", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = vqa.load_config(options.preset, {"output_dir": folder, "max_fallback_share": 0.1})
        competition = vqa.load_competition(config.data_dir, config.max_fallback_share)
        run = vqa.start_run(
            config, competition, vqa.make_folds(competition.train, config.n_folds, config.seed)
        )
        session = vqa.open_session(config, run.train.iloc[0])
        session.vision_cache.fill(
            run.train, vqa.pixel_budget(config, session.processor), session.progress
        )
        trainer = vqa.FoldTrainer(session, run, 0)
        took = []
        trainer.report = lambda *_: took.append(time.perf_counter())
        trainer.train_epoch(0, max(0, trainer.steps_per_epoch - options.steps))
        tensors = {name: value.detach().cpu().clone() for name, value in trainer.parameters.items()}
        trainer.best = {
            "score": [0.5, -1.0],
            "epoch": 0,
            "tensors": tensors,
        }  # as after the first epoch
        saves = []
        for step in range(options.saves):
            start = time.perf_counter()
            trainer.save(1, step)
            saves.append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in trainer.checkpoints.latest_verified().iterdir())
        step_seconds, save_seconds = float(np.median(np.diff(took))), float(np.median(saves))
        interval = min(60 * config.save_every_minutes, config.save_every_steps * step_seconds)
        row = {
            "model": config.model_id,
            "trainable parameters": f"{sum(value.numel() for value in tensors.values()):,}",
            "checkpoint, ms": round(1000 * save_seconds),
            "checkpoint, MB": round(size / 1e6, 1),
            "optimizer step, ms": round(1000 * step_seconds),
            "seconds between checkpoints": round(interval),
            "share of training time": f"{save_seconds / interval:.2%}",
        }
        print(vqa.markdown_table(pd.DataFrame([row]).set_index("model").T.rename_axis("cost")))


if __name__ == "__main__":
    main()
