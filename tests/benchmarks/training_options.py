"""Train the demo with one option and without it: out-of-fold and hidden scores, and their changes.

    python tests/benchmarks/training_options.py                    # the demo's own run only
    python tests/benchmarks/training_options.py final augment paraphrases mix    # four more

Prints one table; changes have 90 % intervals by image. It runs on any machine; every run that is
not there yet is trained, as long as the demo.

The answers in data/test_answers.csv are read here only; no line of the pipeline opens them.
"""

import argparse
import sys
from dataclasses import dataclass
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
NO_OPTION = "none"


@dataclass(frozen=True)
class Answers:
    """A run's answers to the rows of one split."""

    probabilities: np.ndarray  # (n, 4)
    labels: np.ndarray  # (n,)
    groups: np.ndarray  # (n,) number of each row's image


def read_answers(run: vqa.Run) -> dict[str, Answers]:
    """The answers to the OOF rows and to the hidden test rows."""
    evaluation = vqa.evaluate_run(run)
    oof = evaluation.oof
    hidden = np.mean(list(vqa.predict_test(run, evaluation).values()), axis=0)
    images = pd.factorize(run.test["pixel_hash"])[0]
    return {
        "OOF": Answers(evaluation.probabilities, oof.labels, oof.groups),
        "hidden": Answers(hidden, hidden_labels(run), images),
    }


def describe_changes(before: Answers, after: Answers) -> list[str]:
    """The mean changes of accuracy and NLL, each with its 90 % interval."""
    changes = vqa.row_scores(after.probabilities, after.labels)
    changes = changes - vqa.row_scores(before.probabilities, after.labels)
    low_ends, high_ends = vqa.bootstrap_interval(changes, after.groups)
    texts = []
    for mean, low, high in zip(changes.mean(axis=0), low_ends, high_ends, strict=True):
        texts.append(f"{mean:+.3f} ({low:+.3f} to {high:+.3f})")
    return texts


def table_row(name: str, plain: dict[str, Answers], found: dict[str, Answers]) -> dict:
    """The scores of a run on both splits, and their changes against the plain run."""
    row = {}
    for split, answers in found.items():
        scores = vqa.score_row(answers.probabilities, answers.labels)
        accuracy_change, nll_change = describe_changes(plain[split], answers)
        has_changes = name != NO_OPTION
        row[f"{split} accuracy"] = scores["accuracy"]
        row[f"{split} change"] = accuracy_change if has_changes else ""
        row[f"{split} nll"] = scores["nll"]
        row[f"{split} nll change"] = nll_change if has_changes else ""
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "options", nargs="*", choices=OPTIONS, help="without one: only the demo's own run"
    )
    parser.add_argument("--output-dir", default="outputs")
    options = parser.parse_args()
    plain = read_answers(finished_run(output_dir=options.output_dir))
    rows = {}
    for name in [NO_OPTION, *options.options]:
        run = finished_run(output_dir=options.output_dir, **OPTIONS.get(name, {}))
        rows[name] = table_row(name, plain, read_answers(run))
        print(f"{name}: {run.directory}", flush=True)
    print(vqa.markdown_table(pd.DataFrame(rows).T.rename_axis("option")))


if __name__ == "__main__":
    main()
