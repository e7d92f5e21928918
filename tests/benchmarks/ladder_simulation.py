"""Simulate competitions of known truth: do the intervals hold it, does the automatic choice harm?

    python tests/benchmarks/ladder_simulation.py
    python tests/benchmarks/ladder_simulation.py --truths 4   # a quick look

Simulates 500 data sets of 200 rows and 500 of 2,000. Prints a table of all blends, one of what the
automatic choice gains, and the seconds taken. It uses all CPU cores, a process on each; it needs
no GPU and no run.

A truth is a population of questions, some of which share an image, and two to five models whose
errors are correlated and whose strengths may differ. Each data set has fresh images of that
population as OOF rows. What a blend truly gains over the mean is measured on 120,000 other rows of
the truth, after fitting it on all OOF rows as for a submission.

"covered" is the share of 90 % intervals that hold the blend's true gain on average over data sets
of that truth and size, which is what cross-fitting estimates; "covered own" asks for the gain of
the very fit, which varies around it. Accuracy is in points.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# Before numpy is loaded: the processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import pandas as pd
from scipy import special

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import vqa_helpers as vqa

FRESH_IMAGES = 60_000  # 120,000 rows
ROW_COUNTS = (200, 2000)  # of the data sets


# === Truths and rows ==============================================================================
def equal_strengths(generator: np.random.Generator, n_models: int) -> np.ndarray:
    """All models are as good as one another."""
    return np.full(n_models, 1.0)


def unequal_strengths(generator: np.random.Generator, n_models: int) -> np.ndarray:
    """The best may be more than twice as good as the worst."""
    return generator.uniform(0.5, 1.2, n_models)


def one_much_better(generator: np.random.Generator, n_models: int) -> np.ndarray:
    """The first is at least twice as good as every other."""
    return np.r_[1.3, generator.uniform(0.4, 0.6, n_models - 1)]


STRENGTHS: dict[str, Callable] = {  # how much the strengths of the models differ
    "equal": equal_strengths,
    "unequal": unequal_strengths,
    "one much better": one_much_better,
}


@dataclass
class Truth:
    """A population of questions and the models that answer them."""

    strengths: np.ndarray  # (members,) how good each model is
    correlation: float  # of the models' errors, 0 to 1
    skill: float  # how good all of them are
    temperatures: np.ndarray  # (members,) by which each model's logits are divided


@dataclass
class Rows:
    """Questions with the models' answers."""

    members: np.ndarray  # (members, n, 4) log-probabilities or, once calibrated, probabilities
    labels: np.ndarray  # (n,) numbers of the right choices
    images: np.ndarray  # (n,) numbers of the images

    def first(self, count: int) -> "Rows":
        """The first `count` of them."""
        return Rows(self.members[:, :count], self.labels[:count], self.images[:count])


def draw_rows(truth: Truth, n_images: int, generator: np.random.Generator) -> Rows:
    """Fresh questions, one to three on each image, with the models' log-probabilities."""
    n_models = len(truth.strengths)
    images = np.repeat(np.arange(n_images), generator.integers(1, 4, n_images))
    count = len(images)
    labels = generator.integers(0, 4, count)
    # How well an image shows what is asked, and how well each model sees it.
    clarity = np.exp(0.6 * generator.normal(size=n_images))[images]
    vision = generator.normal(size=(n_models, n_images))[:, images, None]
    common_noise = generator.normal(size=(count, 4))
    own_noise = generator.normal(size=(n_models, count, 4))
    noise = np.sqrt(truth.correlation) * common_noise + np.sqrt(1 - truth.correlation) * own_noise
    strengths = truth.strengths[:, None, None] * clarity[:, None] * (1 + 0.3 * vision)
    signal = truth.skill * strengths * np.eye(4)[labels]
    members = special.log_softmax(2 * (signal + noise), axis=2)
    return Rows(members, labels, images)


def make_truth(name: str, generator: np.random.Generator) -> Truth:
    """A truth whose models' temperatures are fitted once, on rows of their own."""
    n_models = generator.integers(2, 6)
    truth = Truth(
        strengths=STRENGTHS[name](generator, n_models),
        correlation=generator.uniform(0.2, 0.95),
        skill=generator.uniform(1.2, 2.4),
        temperatures=np.ones(n_models),
    )
    rows = draw_rows(truth, 3000, generator)
    scalers = [vqa.TemperatureScaler().fit(member, rows.labels) for member in rows.members]
    truth.temperatures = np.array([scaler.temperature for scaler in scalers])
    return truth


def draw_calibrated(truth: Truth, n_images: int, generator: np.random.Generator) -> Rows:
    """As `draw_rows`, with probabilities at the models' temperatures."""
    rows = draw_rows(truth, n_images, generator)
    rows.members = vqa.softmax(rows.members / truth.temperatures[:, None, None])
    return rows


# === Simulation ===================================================================================
def blend_intervals(oof: Rows, blends: dict[str, vqa.Candidate]) -> dict[str, np.ndarray]:
    """The 90 % interval of what each blend gains on the mean, and of the automatic choice.

    By name, (2, 2): low and high end; accuracy and NLL.
    """
    mean_scores = vqa.row_scores(blends["mean"].probabilities, oof.labels)
    names = [name for name in blends if name != "mean"]
    changes = []
    fitted_parameters = []
    for name in names:
        changes.append(vqa.row_scores(blends[name].probabilities, oof.labels) - mean_scores)
        # Of the accuracy's column and the NLL's.
        fitted_parameters += [1, blends[name].fitted_parameters]
    ends = vqa.bootstrap_interval(np.hstack(changes), oof.images, np.array(fitted_parameters))
    intervals = dict(zip(names, ends.reshape(2, -1, 2).swapaxes(0, 1), strict=True))
    intervals["automatic"] = vqa.choice_interval(blends, oof.labels, oof.images)
    return intervals


def simulate_data_set(oof: Rows, fresh: Rows) -> list[dict]:
    """For each blend, and for the automatic choice, its interval and its true gain on the mean."""
    blends = vqa.cross_fitted_blends(oof.members, oof.labels, oof.images)
    chosen = vqa.choose_blend(blends, oof.labels, oof.images)
    intervals = blend_intervals(oof, blends)
    true_scores = {}
    for name in blends:
        answers = vqa.fit_and_blend(name, oof.members, oof.labels, fresh.members)
        true_scores[name] = vqa.row_scores(answers, fresh.labels).mean(axis=0)
    true_scores["automatic"] = true_scores[chosen]
    rows = []
    for name, ends in intervals.items():
        gain = true_scores[name] - true_scores["mean"]
        row = {"blend": name, "chosen": name == chosen}
        for column, score in enumerate(("accuracy", "nll")):
            row[f"{score} change"] = gain[column]
            row[f"{score} low"] = ends[0, column]
            row[f"{score} high"] = ends[1, column]
        rows.append(row)
    return rows


def simulate_truth(number: int, n_data_sets: int) -> list[dict]:
    """A row for each data set of this truth and each blend, see `simulate_data_set`."""
    generator = np.random.default_rng(number)
    name = list(STRENGTHS)[number % len(STRENGTHS)]
    truth = make_truth(name, generator)
    fresh = draw_calibrated(truth, FRESH_IMAGES, generator)
    rows = []
    for n_rows in ROW_COUNTS:
        for _ in range(n_data_sets):
            oof = draw_calibrated(truth, n_rows, generator).first(n_rows)
            for row in simulate_data_set(oof, fresh):
                rows.append({"rows": n_rows, "truth": number, "strengths": name, **row})
    return rows


def simulate(n_truths: int, n_data_sets: int) -> pd.DataFrame:
    """The rows of all truths, one process on each core; accuracy in points."""
    with ProcessPoolExecutor() as pool:
        parts = pool.map(simulate_truth, range(n_truths), itertools.repeat(n_data_sets))
        results = pd.DataFrame(itertools.chain.from_iterable(parts))
    results[["accuracy change", "accuracy low", "accuracy high"]] *= 100
    return results


def coverage_table(results: pd.DataFrame) -> pd.DataFrame:
    """Share of the intervals that hold the blend's true change, by number of rows and blend.

    On average over a truth's data sets ("covered"), and its own ("covered own").
    """
    results = results.copy()
    cases = results.groupby(["rows", "truth", "blend"])
    for score in ("accuracy", "nll"):
        low = results[f"{score} low"]
        high = results[f"{score} high"]
        own_change = results[f"{score} change"]
        mean_change = cases[f"{score} change"].transform("mean")
        results[f"{score} covered"] = mean_change.between(low, high)
        results[f"{score} covered own"] = own_change.between(low, high)
    columns = [name for name in results if "covered" in name or "change" in name]
    table = results.groupby(["rows", "blend"])[[*columns, "chosen"]].mean()
    nll_columns = [name for name in columns if "nll" in name]
    table.loc[(slice(None), "vote"), nll_columns] = np.nan  # a vote has no probabilities
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--truths", type=int, default=25)
    parser.add_argument("--data-sets", type=int, default=20, help="of each truth and size")
    options = parser.parse_args()
    started = time.perf_counter()
    results = simulate(options.truths, options.data_sets)
    print(vqa.markdown_table(coverage_table(results)), end="\n\n")
    automatic = results[results["blend"] == "automatic"].groupby(["rows", "strengths"])
    gains = automatic[["accuracy change", "nll change"]].agg(["mean", "min"])
    print(vqa.markdown_table(gains))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
