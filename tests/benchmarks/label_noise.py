"""Plant wrong labels in the demo, find them, and train without the suspects: precision, recall, gain.

    python tests/benchmarks/label_noise.py              # 8 % wrong labels; two demo runs, about eight minutes

The suspects are what a run's tables/label_suspects.csv names, from out-of-fold probabilities of models that were
trained on the spoiled labels themselves.
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


def spoiled_copy(folder: Path, share: float, seed: int) -> tuple[Path, set[str]]:
    """The demo with wrong answers in that share of the training rows, and the ids of those rows."""
    shutil.copytree(
        vqa.DEMO, folder, ignore=shutil.ignore_patterns("tiny_qwen3_vl", "*.py", "__pycache__")
    )
    train = pd.read_csv(folder / "train.csv", dtype=str, keep_default_na=False)
    generator = np.random.default_rng(seed)
    rows = generator.choice(len(train), round(share * len(train)), replace=False)
    answers = train["answer"].map(vqa.CHOICES.index).to_numpy(copy=True)
    answers[rows] = (answers[rows] + generator.integers(1, 4, len(rows))) % 4
    train.assign(answer=np.array(vqa.CHOICES)[answers]).to_csv(folder / "train.csv", index=False)
    return folder, set(train["id"].iloc[rows])


def without(folder: Path, ids: set[str], target: Path) -> Path:
    """A copy of a competition without those training rows."""
    shutil.copytree(folder, target)
    train = pd.read_csv(target / "train.csv", dtype=str, keep_default_na=False)
    train[~train["id"].isin(ids)].to_csv(target / "train.csv", index=False)
    return target


def ensemble_correct(run: vqa.Run) -> np.ndarray:
    """Whether the mean over folds gets each hidden answer right."""
    members = np.stack(list(vqa.predict_test(run, vqa.evaluate_run(run)).values()))
    return members.mean(axis=0).argmax(axis=1) == hidden_labels(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.08)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, planted = spoiled_copy(Path(place) / "spoiled", options.share, options.seed)
        run = finished_run(data_dir=str(folder), output_dir=f"{place}/spoiled_outputs")
        suspects = vqa.write_error_tables(run, vqa.evaluate_run(run), vqa.image_groups(run.train))[
            "label_suspects"
        ]
        found = suspects["id"].isin(planted)
        print(f"\n{len(planted)} planted, {len(suspects)} suspected, of them planted {found.sum()}")
        print(f"precision {found.mean():.2f}, recall {found.sum() / len(planted):.2f}")
        print(f"precision of the first 20: {found.head(20).mean():.2f}", flush=True)
        cleaned = without(folder, set(suspects["id"]), Path(place) / "cleaned")
        after = finished_run(data_dir=str(cleaned), output_dir=f"{place}/cleaned_outputs")
        before, now = ensemble_correct(run), ensemble_correct(after)
        change = vqa.compare_paired(before, now)
        draws = np.random.default_rng(0).integers(len(now), size=(10_000, len(now)))
        low, high = np.quantile((now.astype(int) - before)[draws].mean(axis=1), [0.05, 0.95])
        print(f"\nhidden answers: {before.mean():.3f} with the suspects, {now.mean():.3f} without")
        print(
            f"gain {change['gain']:+.3f}, 90 % interval {low:+.3f} to {high:+.3f}, McNemar p {change['p_value']:.3f}"
        )


if __name__ == "__main__":
    main()
