"""Plant wrong labels in the demo, find them, and train without the suspects.

    python tests/benchmarks/label_noise.py    # 8 % wrong labels; trains the demo twice

Prints precision and recall of the suspects, then what training without them gains on the hidden
answers, with a 90 % interval. It runs on any machine, as long as two runs of the demo take.

The suspects are what a run's tables/label_suspects.csv names, from out-of-fold probabilities of
models that were trained on the spoiled labels themselves.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from leaderboard import copy_demo, finished_run, hidden_labels

import vqa_helpers as vqa


def spoiled_copy(folder: Path, share: float, seed: int) -> set[str]:
    """Write the demo with wrong answers in that share of its training rows; the ids of these."""
    copy_demo(folder)
    train = pd.read_csv(folder / "train.csv", dtype=str, keep_default_na=False)
    generator = np.random.default_rng(seed)
    rows = generator.choice(len(train), round(share * len(train)), replace=False)
    answers = train["answer"].map(vqa.CHOICES.index).to_numpy(copy=True)
    answers[rows] = (answers[rows] + generator.integers(1, 4, len(rows))) % 4
    train["answer"] = np.array(vqa.CHOICES)[answers]
    train.to_csv(folder / "train.csv", index=False)
    return set(train["id"].iloc[rows])


def copy_without(folder: Path, ids: set[str], target: Path) -> None:
    """Copy a competition without those training rows."""
    shutil.copytree(folder, target)
    train = pd.read_csv(target / "train.csv", dtype=str, keep_default_na=False)
    train[~train["id"].isin(ids)].to_csv(target / "train.csv", index=False)


def find_suspects(run: vqa.Run) -> pd.DataFrame:
    """The rows whose labels the run doubts, the most suspicious first."""
    groups = vqa.image_groups(run.train)
    tables = vqa.write_error_tables(run, vqa.evaluate_run(run), groups)
    return tables["label_suspects"]


def print_found(planted: set[str], suspects: pd.DataFrame) -> None:
    """Print how many of the suspects have planted labels."""
    is_planted = suspects["id"].isin(planted)
    found = is_planted.sum()
    print(f"\n{len(planted)} planted, {len(suspects)} suspected, of them planted {found}")
    print(f"precision {is_planted.mean():.2f}, recall {found / len(planted):.2f}")
    print(f"precision of the first 20: {is_planted.head(20).mean():.2f}", flush=True)


def ensemble_correct(run: vqa.Run) -> np.ndarray:
    """(n,) whether the mean over folds gets each hidden answer right."""
    members = np.stack(list(vqa.predict_test(run, vqa.evaluate_run(run)).values()))
    return members.mean(axis=0).argmax(axis=1) == hidden_labels(run)


def print_gain(before: np.ndarray, after: np.ndarray) -> None:
    """Print the change of the hidden score between two runs, from whether each row is right."""
    comparison = vqa.compare_paired(before, after)
    draws = np.random.default_rng(0).integers(len(after), size=(10_000, len(after)))
    changes = after.astype(int) - before
    low, high = np.quantile(changes[draws].mean(axis=1), [0.05, 0.95])
    print(f"\nhidden answers: {before.mean():.3f} with the suspects, {after.mean():.3f} without")
    print(
        f"gain {comparison['gain']:+.3f}, 90 % interval {low:+.3f} to {high:+.3f}, "
        f"McNemar p {comparison['p_value']:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.08, help="of the training rows")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        spoiled = Path(place) / "spoiled"
        planted = spoiled_copy(spoiled, options.share, options.seed)
        run = finished_run(data_dir=str(spoiled), output_dir=f"{place}/spoiled_outputs")
        suspects = find_suspects(run)
        print_found(planted, suspects)
        cleaned = Path(place) / "cleaned"
        copy_without(spoiled, set(suspects["id"]), cleaned)
        cleaned_run = finished_run(data_dir=str(cleaned), output_dir=f"{place}/cleaned_outputs")
        print_gain(ensemble_correct(run), ensemble_correct(cleaned_run))


if __name__ == "__main__":
    main()
