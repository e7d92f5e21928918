"""Plant a letter bias and over-confidence, and see what rotations and temperature repair.

    python tests/benchmarks/planted_bias.py    # the demo's run in outputs/, on any machine

Prints a table for each damage: accuracy and NLL on OOF and hidden rows of one view, of all
rotations, and of what the run would submit. A finished run takes no training; where there is none,
the demo is trained first.

The damage is done to a run's saved scores: the letter that stands first gets +1.5 in every view (a
model that likes to say "a"), or all scores are multiplied by 3.

Then a bias that rotations leave is planted in made-up scores: what a choice gets depends on its
letter and on that of the row's strongest choice. Printed are the accuracy, and how far a choice's
probability is from that without the bias, in sets of 1 to 24 choice orders.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from leaderboard import finished_run, hidden_labels

import vqa_helpers as vqa

DAMAGES = {  # name -> (what is added to the first letter's scores, factor on all scores)
    "as it is": (0, 1),
    "+1.5 on a": (1.5, 1),
    "scores x 3": (0, 3),
    "both": (1.5, 3),
}


def plant_damage(run: vqa.Run, directory: Path, bias: float, factor: float) -> vqa.Run:
    """A copy of the run with changed scores, in that directory.

    They are `bias` higher for the letter that stands first, then `factor` times as large.
    """
    shutil.copytree(run.directory, directory)
    for path in directory.glob("fold_*/*.npz"):
        content = vqa.read_arrays(path, run.fingerprint)
        fingerprint = content.pop("fingerprint").item()
        logits = content["logits"].copy()
        for number, name in enumerate(content["view_names"]):
            turn = int(name.split()[1]) if name.startswith("rotation") else 0
            first_choice = vqa.TTAView("", turn).order[0]
            logits[:, number, first_choice] += bias
        content["logits"] = factor * logits
        vqa.write_arrays(path, fingerprint, **content)
    return vqa.Run.open(directory)


def view_probabilities(
    run: vqa.Run, evaluation: vqa.Evaluation, views: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(n, 4) probabilities by those views: of the OOF rows, and of the test rows over all folds."""
    oof = vqa.softmax(vqa.combine_views(evaluation.oof.logits[:, views]))
    test = []
    for fold in run.finished_folds:
        content = vqa.read_arrays(run.fold_dir(fold) / "test.npz", run.fingerprint)
        test.append(vqa.softmax(vqa.combine_views(content["logits"][:, views])))
    return oof, np.mean(test, axis=0)


def score_table(run: vqa.Run) -> pd.DataFrame:
    """Scores on OOF and hidden rows: one view, all rotations, and what the run would submit.

    "says a" is the share of the test rows that are answered so.
    """
    evaluation = vqa.evaluate_run(run)
    labels = hidden_labels(run)
    rotations = vqa.view_sets(evaluation.oof.view_names)["rotations"]
    submitted = list(vqa.predict_test(run, evaluation).values())
    answers = {
        "one view": view_probabilities(run, evaluation, [0]),
        "rotations": view_probabilities(run, evaluation, rotations),
        "as submitted": (evaluation.probabilities, np.mean(submitted, axis=0)),
    }
    table = {}
    for name, (oof, hidden) in answers.items():
        row = {}
        for metric, value in vqa.score_row(oof, evaluation.oof.labels).items():
            row[f"OOF {metric}"] = value
        for metric, value in vqa.score_row(hidden, labels).items():
            row[f"hidden {metric}"] = value
        row["says a"] = float((hidden.argmax(axis=1) == 0).mean())
        table[name] = row
    return pd.DataFrame(table).T


def neighbour_table(size: float, rows: int = 4000, seed: int = 0) -> pd.DataFrame:
    """What sets of choice orders leave of a bias by two letters, whose mean is zero."""
    random = np.random.default_rng(seed)
    labels = random.integers(4, size=rows)
    content = 2.0 * np.eye(4)[labels] + random.normal(size=(rows, 4))
    strongest = content.argmax(axis=1)
    bias = size * random.normal(size=(4, 4))
    np.fill_diagonal(bias, 0)
    bias -= bias.sum() / 12 * (1 - np.eye(4))
    without_bias = vqa.softmax(content)
    table = {"without the bias": {"accuracy": (strongest == labels).mean(), "largest error": 0.0}}
    for count in (1, 4, 8, 12, 24):
        views = []
        for order in vqa.balanced_orders(24)[:count]:
            letters = np.argsort(order)
            views.append(content + bias[letters, letters[strongest][:, None]])
        found = vqa.softmax(vqa.combine_views(np.stack(views, axis=1)))
        table[f"{count} orders"] = {
            "accuracy": (found.argmax(axis=1) == labels).mean(),
            "largest error": np.abs(found - without_bias).max(),
        }
    return pd.DataFrame.from_dict(table, orient="index")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default="outputs")
    parser.add_argument("--neighbours-only", action="store_true", help="the made-up scores only")
    options = parser.parse_args()
    table = neighbour_table(size=1.5).rename_axis("a bias by two letters")
    print(vqa.markdown_table(table))
    if options.neighbours_only:
        return
    run = finished_run(output_dir=options.output_dir)
    with tempfile.TemporaryDirectory() as place:
        for name, (bias, factor) in DAMAGES.items():
            directory = Path(place) / name.replace(" ", "_")
            damaged = plant_damage(run, directory, bias, factor)
            table = score_table(damaged).rename_axis(name)
            print(f"\n{vqa.markdown_table(table)}", flush=True)


if __name__ == "__main__":
    main()
