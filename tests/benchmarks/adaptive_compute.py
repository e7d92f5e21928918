"""Plant a letter bias that makes rotations worth some points; buy them for rows in doubt alone.

    python tests/benchmarks/adaptive_compute.py    # the demo's run in outputs/, on any machine

Prints a table for each bias: by the share of the rotations' cost that is spent, the accuracy and
the share of the rotations' gain that is reached. It also draws the OOF curve. A finished run takes
no training; where there is none, the demo is trained first.

The cost is the ladder's: a second pass repeats the prefix, so that half the cost of three more
orders behind the first (3/7 of a question) pays for them in a second pass (1 + 2/7) in a sixth of
the rows only.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from leaderboard import finished_run, hidden_labels
from planted_bias import plant_damage

import vqa_helpers as vqa


def scores_in_budget(
    logits: np.ndarray, view_names: list[str], preference: np.ndarray, share: float
) -> np.ndarray:
    """(n, 4) scores over the views of each row, if that share of the rows gets the later views.

    logits: (n, views, 4). Those of least margin get them, once the letters' `preference` (4,) is
    taken off.
    """
    count = len(logits)
    first, later = vqa.split_views(view_names)
    margins = vqa.answer_margins(vqa.combine_views(logits[:, first]), preference)
    in_doubt = vqa.rows_in_doubt(margins, np.ones(count), share * count)
    not_in_doubt = np.delete(np.arange(count), in_doubt)
    scored = logits.copy()
    scored[np.ix_(not_in_doubt, later)] = np.nan
    return vqa.combine_views(scored)


def correct_answers(run: vqa.Run, share: float) -> dict[str, np.ndarray]:
    """Whether each answer is right, if that share of the rows gets all rotations, by method.

    OOF rows by the module's margin and by the plain one (n,); hidden answers of each fold
    (folds, n) and of the folds' mean (n,).
    """
    oof = vqa.read_oof(run)
    labels = hidden_labels(run)
    first, _ = vqa.split_views(oof.view_names)
    by_plain_margin = np.empty((len(oof.labels), 4))
    test = []  # probabilities of each fold
    for fold in run.finished_folds:
        is_in_fold = oof.folds == fold
        fold_logits = oof.logits[is_in_fold]
        preference = vqa.letter_preference(
            vqa.combine_views(fold_logits[:, first]), vqa.combine_views(fold_logits)
        )
        content = vqa.read_arrays(run.fold_dir(fold) / "test.npz", run.fingerprint)
        scores = scores_in_budget(content["logits"], oof.view_names, preference, share)
        test.append(vqa.softmax(scores))
        by_plain_margin[is_in_fold] = scores_in_budget(
            fold_logits, oof.view_names, np.zeros(4), share
        )
    in_doubt = vqa.simulate_views_in_doubt(oof, dict.fromkeys(run.finished_folds, share))
    return {
        "OOF": vqa.combine_views(in_doubt.logits).argmax(1) == oof.labels,
        "OOF by plain margin": by_plain_margin.argmax(1) == oof.labels,
        "hidden, one fold": np.stack(test).argmax(2) == labels,
        "hidden, mean of folds": np.mean(test, axis=0).argmax(1) == labels,
    }


def budget_table(run: vqa.Run) -> pd.DataFrame:
    """Accuracy by budget on OOF and hidden rows, and the share of the rotations' gain reached."""
    without_rotations = correct_answers(run, 0.0)
    all_rotations = correct_answers(run, 1.0)
    rows = {}
    for budget, share, cost in vqa.adaptive_curve(run)[["rows", "cost"]].itertuples():
        correct = correct_answers(run, share)
        row = {
            "rows": share,
            "cost": cost,
            "OOF": correct["OOF"].mean(),
            "hidden, mean of folds": correct["hidden, mean of folds"].mean(),
        }
        for name, is_right in correct.items():
            least = without_rotations[name].mean()
            most = all_rotations[name].mean()
            row[f"gain: {name}"] = (is_right.mean() - least) / (most - least)
        rows[budget] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("adaptive_tta")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default="outputs")
    parser.add_argument(
        "--bias",
        type=float,
        nargs="*",
        default=[2.0, 2.5, 3.0, 3.5],
        help="what is added to the scores of the letter that stands first",
    )
    options = parser.parse_args()
    run = finished_run(output_dir=options.output_dir)
    with tempfile.TemporaryDirectory() as place:
        for bias in options.bias:
            damaged = plant_damage(run, Path(place) / str(bias), bias, 1)
            table = vqa.markdown_table(budget_table(damaged))
            print(f"\n+{bias} on the first letter\n\n{table}", flush=True)
            name = f"adaptive_curve_bias_{bias}"
            axes = vqa.plot_adaptive_curve(vqa.adaptive_curve(damaged))
            vqa.save_figure(axes, run, name)
            print(f"\n{run.directory}/figures/{name}.png")


if __name__ == "__main__":
    main()
