"""Train the demo on another run's probabilities: distillation and pseudo-labels.

    python tests/benchmarks/soft_targets.py             # the demo's run in outputs/, and two more
    python tests/benchmarks/soft_targets.py --larger    # also a teacher of rank 32, and its student

Prints what rows each model trained on, then two tables, one on out-of-fold rows and one on the
hidden answers. Each run is compared with the plain one, with 90 % intervals that respect images.
An interval knows which questions were asked, not that another seed would have trained other models.
It runs on any machine; every run that is not there yet is trained, as long as the demo.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from leaderboard import finished_run, hidden_labels

import vqa_helpers as vqa

NOT_SHOWN = {"brier", "ece", "against", "used"}  # of the ladder
COLUMNS = [name for name in vqa.LADDER_COLUMNS if name not in NOT_SHOWN]


def all_runs(output_dir: str, larger: bool) -> dict[str, vqa.Run]:
    """Name -> finished run, the plain one first."""
    runs = {}
    runs["plain"] = finished_run(output_dir=output_dir)
    teacher = str(runs["plain"].directory)
    runs["distilled from plain"] = finished_run(output_dir=output_dir, distill_from=teacher)
    runs["pseudo-labels of plain"] = finished_run(output_dir=output_dir, pseudo_label_from=teacher)
    if larger:
        runs["LoRA r 32"] = finished_run(output_dir=output_dir, lora_r=32, lora_alpha=64)
        teacher = str(runs["LoRA r 32"].directory)
        runs["distilled from LoRA r 32"] = finished_run(output_dir=output_dir, distill_from=teacher)
    return runs


def print_table(
    name: str, rows: pd.DataFrame, steps: Mapping[str, vqa.LadderStep], labels: np.ndarray
) -> None:
    """Print the scores of all runs on those rows, and how far each is from the plain one."""
    table = vqa.ladder_table(steps, labels, vqa.image_groups(rows))
    print(f"\n{vqa.markdown_table(table[COLUMNS].rename_axis(name))}", flush=True)


def print_tables(runs: Mapping[str, vqa.Run]) -> None:
    """What each run scores out of fold and on the hidden answers, beside the plain one."""
    plain = runs["plain"]
    oof = {}
    hidden = {}
    for name, run in runs.items():
        evaluation = vqa.evaluate_run(run)
        against = "" if run is plain else "plain"
        answers = np.mean(list(vqa.predict_test(run, evaluation).values()), axis=0)
        oof[name] = vqa.LadderStep(evaluation.probabilities, against)
        hidden[name] = vqa.LadderStep(answers, against)
        sources = vqa.source_table(run).to_dict("index")
        print(f"{name}: rows trained on by fold and file {sources}")
    print_table("out of fold", plain.train, oof, plain.train["label"].to_numpy())
    print_table("hidden answers", plain.test, hidden, hidden_labels(plain))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default="outputs")
    parser.add_argument(
        "--larger", action="store_true", help="also distil from a run with LoRA of rank 32"
    )
    options = parser.parse_args()
    print_tables(all_runs(options.output_dir, options.larger))


if __name__ == "__main__":
    main()
