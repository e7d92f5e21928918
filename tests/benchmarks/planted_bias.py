"""Plant a letter bias and over-confidence into a finished run's scores, and see what rotations and temperature repair.

    python tests/benchmarks/planted_bias.py             # the demo's run in outputs/, made first if it is not there

The letter that stands first gets +1.5 in every view (a model that likes to say "a"), or all scores are multiplied by 3.
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


def spoil(run: vqa.Run, directory: Path, bias: float, factor: float) -> vqa.Run:
    """A copy of the run whose saved scores are `bias` higher for the first letter, then `factor` times as large."""
    shutil.copytree(run.directory, directory)
    for path in directory.glob("fold_*/*.npz"):
        content = vqa.read_arrays(path, run.fingerprint)
        logits = content["logits"].copy()
        for number, name in enumerate(content["view_names"]):
            turn = int(name.split()[1]) if name.startswith("rotation") else 0
            logits[:, number, vqa.TTAView("", turn).order[0]] += bias
        vqa.write_arrays(
            path, content.pop("fingerprint").item(), **content | {"logits": factor * logits}
        )
    return vqa.Run.open(directory)


def scores(run: vqa.Run) -> dict[str, dict]:
    """Accuracy and NLL on OOF and hidden rows: one view, all rotations, and what the run would submit."""
    evaluation, labels = vqa.evaluate_run(run), hidden_labels(run)
    rotations = vqa.view_sets(evaluation.oof.view_names)["rotations"]
    test = [
        vqa.read_arrays(run.fold_dir(fold) / "test.npz", run.fingerprint)["logits"]
        for fold in run.finished_folds
    ]
    rows = {}
    for name, views in {"one view": [0], "rotations": rotations}.items():
        hidden = np.mean(
            [vqa.softmax(vqa.combine_views(logits[:, views])) for logits in test], axis=0
        )
        oof = vqa.softmax(vqa.combine_views(evaluation.oof.logits[:, views]))
        rows[name] = (oof, hidden)
    rows["as submitted"] = (
        evaluation.probabilities,
        np.mean(list(vqa.predict_test(run, evaluation).values()), axis=0),
    )
    table = {}
    for name, (oof, hidden) in rows.items():
        table[name] = {
            f"OOF {key}": value for key, value in vqa.score_row(oof, evaluation.oof.labels).items()
        }
        table[name] |= {
            f"hidden {key}": value for key, value in vqa.score_row(hidden, labels).items()
        }
        table[name]["says a"] = float((hidden.argmax(axis=1) == 0).mean())
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default="outputs")
    options = parser.parse_args()
    run = finished_run(output_dir=options.output_dir)
    with tempfile.TemporaryDirectory() as place:
        for name, bias, factor in (
            ("as it is", 0, 1),
            ("+1.5 on a", 1.5, 1),
            ("scores x 3", 0, 3),
            ("both", 1.5, 3),
        ):
            spoiled = spoil(run, Path(place) / name.replace(" ", "_"), bias, factor)
            print(
                f"\n{vqa.markdown_table(pd.DataFrame(scores(spoiled)).T.rename_axis(name))}",
                flush=True,
            )


if __name__ == "__main__":
    main()
