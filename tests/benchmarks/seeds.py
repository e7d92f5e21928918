"""Two seeds for each fold against one, on the demo: out-of-fold and hidden answers, seconds.

    python tests/benchmarks/seeds.py             # seeds 42 and 7, 6 epochs
    python tests/benchmarks/seeds.py --epochs 12 --seeds 7 8 9

One run serves for both: the models of its first seed are those of a run without `seeds`.
"""

import argparse
import json

import numpy as np
import pandas as pd
from leaderboard import finished_run, hidden_labels

import vqa_helpers as vqa

COLUMNS = ["accuracy", "nll", "cost", "against", "gain", "gain_low", "gain_high", "nll_change"]


def let_seeds_score(run: vqa.Run, count: int) -> None:
    """Take another decision than `select_weights` has taken."""
    path = run.directory / "selection.json"
    content = json.loads(path.read_text())
    vqa.atomic_write(path, json.dumps({**content, "seeds": count}))


def row(run: vqa.Run, count: int) -> dict:
    """Scores of the run with so many seeds of each fold, and what these models took."""
    let_seeds_score(run, count)
    evaluation = vqa.evaluate_run(run)
    labels = hidden_labels(run)
    folds = vqa.predict_test(run, evaluation)
    ensemble = np.mean(list(folds.values()), axis=0)
    names = [vqa.member_name(run.config, member) for member in run.submission_members]
    ends = tuple(f"fold {name}" for name in names)
    records = vqa.read_json_lines(run.directory / "stages.jsonl")
    seconds = sum(record["seconds"] for record in records if record["label"].endswith(ends))
    return {
        "OOF accuracy": vqa.accuracy(evaluation.probabilities, evaluation.oof.labels),
        "OOF NLL": vqa.negative_log_likelihood(evaluation.probabilities, evaluation.oof.labels),
        "hidden, mean of folds alone": np.mean([vqa.accuracy(p, labels) for p in folds.values()]),
        "hidden, ensemble": vqa.accuracy(ensemble, labels),
        "hidden NLL": vqa.negative_log_likelihood(ensemble, labels),
        "workers' seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[7], help="beside the demo's own")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rotations", type=int, default=4)
    parser.add_argument("--output-dir", default="outputs")
    options = parser.parse_args()
    seeds = (vqa.Config.seed, *options.seeds)
    run = finished_run(
        output_dir=options.output_dir,
        num_epochs=options.epochs,
        tta_rotations=options.rotations,
        seeds=seeds,
    )
    chosen = run.selected_seeds
    rows = {f"of seeds: {count}": row(run, count) for count in range(1, len(seeds) + 1)}
    let_seeds_score(run, chosen)
    print(vqa.markdown_table(vqa.evaluate_run(run).ladder[COLUMNS].round(4)), end="\n\n")
    print(vqa.markdown_table(pd.DataFrame(rows).T.round(4)), end="\n\n")
    print(f"chosen: {chosen} of {len(seeds)} seeds")


if __name__ == "__main__":
    main()
