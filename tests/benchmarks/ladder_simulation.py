"""Simulate competitions of known truth: do the ladder's intervals cover, and does the automatic choice do harm?

    python tests/benchmarks/ladder_simulation.py              # 500 data sets of 200 rows and 500 of 2,000
    python tests/benchmarks/ladder_simulation.py --truths 4   # a quick look

A truth is a population of questions, some of which share an image, and two to five models whose errors are correlated
and whose strengths may differ. Each data set has fresh images of that population as OOF rows. What a blend truly gains
over the mean is measured on 120,000 other rows of the truth, after fitting it on all OOF rows as for a submission.

"covered" is the share of 90 % intervals that hold the blend's true gain on average over data sets of that truth and
size, which is what cross-fitting estimates; "covered own" asks for the gain of the very fit, which varies around it.
Accuracy is in points.
"""

import argparse
import itertools
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before numpy is loaded: the processes share the cores
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import vqa_helpers as vqa

STRENGTHS = {  # how much the strengths of the models differ
    "equal": lambda generator, n: np.full(n, 1.0),
    "unequal": lambda generator, n: generator.uniform(0.5, 1.2, n),
    "one much better": lambda generator, n: np.r_[1.3, generator.uniform(0.4, 0.6, n - 1)],
}
FRESH_IMAGES = 60_000  # 120,000 rows


def draw_rows(truth: dict, n_images: int, generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(members, n, 4) log-probabilities, labels and images of fresh questions: one to three on each image."""
    image = np.repeat(np.arange(n_images), generator.integers(1, 4, n_images))
    labels, shape = generator.integers(0, 4, len(image)), (len(image), 4)
    clear = np.exp(0.6 * generator.normal(size=n_images))[
        image
    ]  # how well the image shows what is asked
    seen = generator.normal(size=(len(truth["strengths"]), n_images))[
        :, image, None
    ]  # how well a model sees it
    common, own = (
        generator.normal(size=shape),
        generator.normal(size=(len(truth["strengths"]), *shape)),
    )
    noise = np.sqrt(truth["correlation"]) * common + np.sqrt(1 - truth["correlation"]) * own
    strengths = truth["strengths"][:, None, None] * clear[:, None] * (1 + 0.3 * seen)
    return (
        vqa.special.log_softmax(
            2 * (truth["skill"] * strengths * np.eye(4)[labels] + noise), axis=2
        ),
        labels,
        image,
    )


def make_truth(name: str, generator) -> dict:
    """A truth with its models' temperatures, which are fitted once on rows of their own."""
    n_models = generator.integers(2, 6)
    truth = {
        "strengths": STRENGTHS[name](generator, n_models),
        "correlation": generator.uniform(0.2, 0.95),
    }
    truth["skill"] = generator.uniform(1.2, 2.4)
    logits, labels, _ = draw_rows(truth, 3000, generator)
    truth["temperatures"] = [
        vqa.TemperatureScaler().fit(member, labels).temperature for member in logits
    ]
    return truth


def calibrated(truth: dict, n_images: int, generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    logits, labels, image = draw_rows(truth, n_images, generator)
    return vqa.softmax(logits / np.array(truth["temperatures"])[:, None, None]), labels, image


def first_rows(drawn: tuple, n_rows: int) -> tuple:
    return drawn[0][:, :n_rows], drawn[1][:n_rows], drawn[2][:n_rows]


def one_data_set(oof: tuple, fresh: tuple) -> list[dict]:
    """For each blend its interval and its true gain against the mean, and the same of the automatic choice."""
    members, labels, groups = oof
    blends = vqa.cross_fitted_blends(members, labels, groups)
    chosen = vqa.choose_blend(blends, labels, groups)
    scores = {name: vqa.row_scores(probabilities, labels) for name, probabilities in blends.items()}
    names = [name for name in scores if name != "mean"]
    fitted = {name: vqa.count_fitted_parameters(name, members, labels) for name in blends}
    each = np.ravel([(1, fitted[name]) for name in names])
    intervals = vqa.bootstrap_interval(
        np.hstack([scores[name] - scores["mean"] for name in names]), groups, each
    )
    intervals = [
        *intervals.reshape(2, -1, 2).swapaxes(0, 1),
        vqa.choice_interval(blends, labels, groups, fitted),
    ]
    true = {}
    for name in blends:
        true[name] = vqa.row_scores(
            vqa.fit_and_blend(name, members, labels, fresh[0]), fresh[1]
        ).mean(axis=0)
    true["automatic"] = true[chosen]
    rows = []
    for name, ends in zip([*names, "automatic"], intervals, strict=True):
        gain, row = true[name] - true["mean"], {"blend": name, "chosen": name == chosen}
        for column, score in enumerate(("accuracy", "nll")):
            row |= {
                f"{score} change": gain[column],
                f"{score} low": ends[0, column],
                f"{score} high": ends[1, column],
            }
        rows.append(row)
    return rows


def simulate_truth(number: int, n_data_sets: int) -> list[dict]:
    """A row for each data set of this truth and each blend: interval, and true change when fitted on this data set."""
    generator, name = np.random.default_rng(number), list(STRENGTHS)[number % len(STRENGTHS)]
    truth = make_truth(name, generator)
    fresh, rows = calibrated(truth, FRESH_IMAGES, generator), []
    for n_rows in (200, 2000):
        for _ in range(n_data_sets):
            oof = first_rows(calibrated(truth, n_rows, generator), n_rows)
            settings = {"rows": n_rows, "truth": number, "strengths": name}
            rows += [settings | row for row in one_data_set(oof, fresh)]
    return rows


def simulate(n_truths: int, n_data_sets: int) -> pd.DataFrame:
    """The rows of all truths, one process on each core."""
    with ProcessPoolExecutor() as pool:
        parts = pool.map(simulate_truth, range(n_truths), itertools.repeat(n_data_sets))
        return pd.DataFrame(itertools.chain.from_iterable(parts))


def coverage(results: pd.DataFrame) -> pd.DataFrame:
    """Share of the intervals that hold the blend's true change, on average over a truth's data sets and its own."""
    cases = results.groupby(["rows", "truth", "blend"])
    for score in ("accuracy", "nll"):
        for kind, true in (
            ("", cases[f"{score} change"].transform("mean")),
            (" own", results[f"{score} change"]),
        ):
            results[f"{score} covered{kind}"] = true.between(
                results[f"{score} low"], results[f"{score} high"]
            )
    kept = [name for name in results if "covered" in name or "change" in name]
    table = results.groupby(["rows", "blend"])[[*kept, "chosen"]].mean()
    table.loc[(slice(None), "vote"), [name for name in kept if "nll" in name]] = (
        np.nan
    )  # it has no probabilities
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--truths", type=int, default=25)
    parser.add_argument("--data-sets", type=int, default=20, help="of each truth and size")
    options, started = parser.parse_args(), time.perf_counter()
    results = simulate(options.truths, options.data_sets)
    results["accuracy change"] *= 100
    results[["accuracy low", "accuracy high"]] *= 100
    print(vqa.markdown_table(coverage(results)), end="\n\n")
    automatic = results[results["blend"] == "automatic"].groupby(["rows", "strengths"])
    print(vqa.markdown_table(automatic[["accuracy change", "nll change"]].agg(["mean", "min"])))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
