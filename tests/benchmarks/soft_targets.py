"""Train the demo on another run's probabilities: distillation and pseudo-labels beside the plain run.

    python tests/benchmarks/soft_targets.py             # the demo's run in outputs/, and two more
    python tests/benchmarks/soft_targets.py --larger    # also a teacher with LoRA of rank 32, and its student

Each run is compared with the plain one, on out-of-fold rows and on the hidden answers, with 90 % intervals that respect
images. An interval knows which questions were asked, not that another seed would have trained other models.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from leaderboard import finished_run, hidden_labels

import vqa_helpers as vqa


def all_runs(output_dir: str, larger: bool) -> dict[str, vqa.Run]:
    """Name -> finished run, the plain one first."""
    runs = {"plain": finished_run(output_dir=output_dir)}
    teacher = str(runs["plain"].directory)
    runs["distilled from plain"] = finished_run(output_dir=output_dir, distill_from=teacher)
    runs["pseudo-labels of plain"] = finished_run(output_dir=output_dir, pseudo_label_from=teacher)
    if larger:
        runs["LoRA r 32"] = finished_run(output_dir=output_dir, lora_r=32, lora_alpha=64)
        teacher = str(runs["LoRA r 32"].directory)
        runs["distilled from LoRA r 32"] = finished_run(output_dir=output_dir, distill_from=teacher)
    return runs


def print_tables(runs: dict[str, vqa.Run]) -> None:
    """What each run scores out of fold and on the hidden answers, and how far it is from the first one."""
    oof, hidden, plain = {}, {}, runs["plain"]
    for name, run in runs.items():
        evaluation, against = vqa.evaluate_run(run), "plain" if run is not plain else ""
        oof[name] = vqa.LadderStep(evaluation.probabilities, against)
        hidden[name] = vqa.LadderStep(
            np.mean(list(vqa.predict_test(run, evaluation).values()), axis=0), against
        )
        print(f"{name}: rows trained on by fold and file {vqa.source_table(run).to_dict('index')}")
    for name, rows, steps, labels in (
        ("out of fold", plain.train, oof, plain.train["label"].to_numpy()),
        ("hidden answers", plain.test, hidden, hidden_labels(plain)),
    ):
        table = vqa.ladder_table(steps, labels, vqa.image_groups(rows))
        columns = [
            "accuracy",
            "nll",
            "gain",
            "gain_low",
            "gain_high",
            "p_value",
            "nll_change",
            "nll_low",
            "nll_high",
        ]
        print(f"\n{vqa.markdown_table(table[columns].rename_axis(name))}", flush=True)


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
