"""Train the demo with one option and without it: out-of-fold and hidden scores, changes with 90 % intervals by image.

    python tests/benchmarks/training_options.py final augment paraphrases mix   # four more runs beside the demo's own

The answers in data/test_answers.csv are read here only; no line of the pipeline opens them.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from leaderboard import finished_run, hidden_labels

import vqa_helpers as vqa

OPTIONS = {
    "final": {"final_retrain": True},
    "augment": {"augment_images": 2},
    "paraphrases": {"paraphrases": 4},
    "mix": {"mix_weights": True},
}


def answers(run: vqa.Run) -> dict[str, tuple]:
    """Probabilities, labels and image groups of the OOF rows and of the hidden test rows."""
    evaluation = vqa.evaluate_run(run)
    hidden = np.mean(list(vqa.predict_test(run, evaluation).values()), axis=0)
    return {
        "OOF": (evaluation.probabilities, evaluation.oof.labels, evaluation.oof.groups),
        "hidden": (hidden, hidden_labels(run), pd.factorize(run.test["pixel_hash"])[0]),
    }


def change(before: np.ndarray, now: np.ndarray, groups: np.ndarray) -> list[str]:
    """Mean change of each column of row scores, with its 90 % interval."""
    ends = vqa.bootstrap_interval(now - before, groups)
    rows = zip((now - before).mean(axis=0), *ends, strict=True)
    return [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" for mean, low, high in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "options", nargs="*", choices=OPTIONS, help="without one: only the demo's own run"
    )
    parser.add_argument("--output-dir", default="outputs")
    options = parser.parse_args()
    plain, rows = answers(finished_run(output_dir=options.output_dir)), {}
    for name in ["none", *options.options]:
        run = finished_run(output_dir=options.output_dir, **OPTIONS.get(name, {}))
        for split, (probabilities, labels, groups) in answers(run).items():
            scores = vqa.score_row(probabilities, labels)
            before, now = (
                vqa.row_scores(each, labels) for each in (plain[split][0], probabilities)
            )
            accuracy, loss = change(before, now, groups)
            accuracy, loss = ("", "") if name == "none" else (accuracy, loss)
            cells = {
                "accuracy": scores["accuracy"],
                "change": accuracy,
                "nll": scores["nll"],
                "nll change": loss,
            }
            rows[name] = rows.get(name, {}) | {
                f"{split} {title}": cell for title, cell in cells.items()
            }
        print(f"{name}: {run.directory}", flush=True)
    print(vqa.markdown_table(pd.DataFrame(rows).T.rename_axis("option")))


if __name__ == "__main__":
    main()
