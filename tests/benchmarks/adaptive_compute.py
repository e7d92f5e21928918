"""Plant a letter bias that makes rotations worth some points, and buy them back for the rows in doubt alone.

    python tests/benchmarks/adaptive_compute.py         # the demo's run in outputs/, made first if it is not there

Prints what share of the rotations' gain in accuracy is reached by the share of their cost that is spent, and draws the
OOF curve. The cost is the ladder's: a second pass repeats the prefix, so that half the cost of three more orders behind
the first (3/7 of a question) pays for them in a second pass (1 + 2/7) in a sixth of the rows only.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from leaderboard import finished_run, hidden_labels
from planted_bias import spoil

import vqa_helpers as vqa


def answered(run: vqa.Run, share: float) -> dict[str, np.ndarray]:
    """Whether each answer is right, if that share of the rows gets all rotations; the folds' own hidden answers too."""
    oof, labels, test = vqa.read_oof(run), hidden_labels(run), []
    first, later = vqa.split_views(oof.view_names)
    plain = oof.logits.copy()
    for fold in run.finished_folds:
        inside = np.flatnonzero(oof.folds == fold)
        scores, every = (
            vqa.combine_views(oof.logits[inside][:, first]),
            vqa.combine_views(oof.logits[inside]),
        )
        logits = vqa.read_arrays(run.fold_dir(fold) / "test.npz", run.fingerprint)["logits"]
        margins = vqa.answer_margins(
            vqa.combine_views(logits[:, first]), vqa.letter_preference(scores, every)
        )
        rows = vqa.rows_in_doubt(margins, np.ones(len(logits)), share * len(logits))
        logits[np.ix_(np.delete(np.arange(len(logits)), rows), later)] = np.nan
        test.append(vqa.softmax(vqa.combine_views(logits)))
        margins = vqa.answer_margins(scores, np.zeros(4))
        rows = vqa.rows_in_doubt(margins, np.ones(len(inside)), share * len(inside))
        plain[np.ix_(np.delete(inside, rows), later)] = np.nan
    doubt = vqa.simulate_views_in_doubt(oof, dict.fromkeys(run.finished_folds, share))
    return {
        "OOF": vqa.combine_views(doubt.logits).argmax(1) == oof.labels,
        "OOF by plain margin": vqa.combine_views(plain).argmax(1) == oof.labels,
        "hidden, one fold": np.stack(test).argmax(2) == labels,
        "hidden, mean of folds": np.mean(test, axis=0).argmax(1) == labels,
    }


def table(run: vqa.Run) -> pd.DataFrame:
    """Accuracy on OOF and hidden rows by budget, and the share of the rotations' gain that is reached."""
    rows, ends = {}, [answered(run, share) for share in (0.0, 1.0)]
    for budget, share, cost in vqa.adaptive_curve(run)[["rows", "cost"]].itertuples():
        rows[budget] = {"rows": share, "cost": cost}
        now = answered(run, share)
        rows[budget] |= {name: now[name].mean() for name in ("OOF", "hidden, mean of folds")}
        for name, correct in now.items():
            least, most = (end[name].mean() for end in ends)
            rows[budget][f"gain: {name}"] = (correct.mean() - least) / (most - least)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("adaptive_tta")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default="outputs")
    parser.add_argument("--bias", type=float, nargs="*", default=[2.0, 2.5, 3.0, 3.5])
    options = parser.parse_args()
    run = finished_run(output_dir=options.output_dir)
    with tempfile.TemporaryDirectory() as place:
        for bias in options.bias:
            spoiled = spoil(run, Path(place) / str(bias), bias, 1)
            print(
                f"\n+{bias} on the first letter\n\n{vqa.markdown_table(table(spoiled))}", flush=True
            )
            vqa.save_figure(
                vqa.plot_adaptive_curve(vqa.adaptive_curve(spoiled)),
                run,
                f"adaptive_curve_bias_{bias}",
            )
            print(f"\n{run.directory}/figures/adaptive_curve_bias_{bias}.png")


if __name__ == "__main__":
    main()
