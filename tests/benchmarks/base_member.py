"""Simulate the base model as a member: what a mixture gains, and whether its interval is right.

    python tests/benchmarks/base_member.py                  # 384 data sets of each size
    python tests/benchmarks/base_member.py --data-sets 4    # a quick look

Each data set has 500 or 4,000 out-of-fold rows, answered by a fine-tuned model and a base model.
A case fixes how accurate both are and how far their errors overlap (Jaccard: rows that both have
wrong, over rows that either has wrong; teams measured 0.45 for a trained and an untrained model,
0.65 for two that were trained alike). What a mixture truly gains on the fine-tuned model alone is
measured on 60,000 other rows, after fitting it on all out-of-fold rows as for a submission.
"covered" is the share of 90 % intervals that hold the mean true gain of that case and size.
Accuracy is in points. It uses two processes at most; it needs no GPU and no run.
"""

import argparse
import functools
import itertools
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# Before numpy is loaded: the processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import pandas as pd
from scipy import optimize, special

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import vqa_helpers as vqa

FRESH_ROWS = 60_000
ROW_COUNTS = (500, 4000)  # of the data sets
FINE_TUNED_ACCURACY = 0.85  # at 0.95 no overlap of 0.65 is possible 5 points behind


@dataclass(frozen=True)
class Case:
    """How good both models are, and how alike."""

    behind: float  # points of accuracy that the base model lacks
    jaccard: float  # of both models' errors


CASES = [Case(*pair) for pair in itertools.product((0, 2, 5), (0.45, 0.65))]
CASES += [Case(10, 0.45), Case(20, 0.35)]  # where does it end?


@dataclass(frozen=True)
class Truth:
    """A population of questions and the two models that answer them."""

    skills: tuple[float, float]  # of the fine-tuned and the base model
    correlation: float  # of their errors, 0 to 1
    temperatures: tuple[float, float] = (1.0, 1.0)


def draw(truth: Truth, count: int, seed) -> tuple[np.ndarray, np.ndarray]:
    """(2, count, 4) log-probabilities of both models, and (count,) labels; a pure function."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, count)
    clarity = np.exp(0.6 * generator.normal(size=count))
    common = generator.normal(size=(count, 4))
    own = generator.normal(size=(2, count, 4))
    noise = np.sqrt(truth.correlation) * common + np.sqrt(1 - truth.correlation) * own
    strength = np.array(truth.skills)[:, None, None] * clarity[:, None]
    scores = special.log_softmax(2 * (strength * np.eye(4)[labels] + noise), axis=2)
    return scores / np.array(truth.temperatures)[:, None, None], labels


def errors(truth: Truth) -> np.ndarray:
    """(2, rows): which rows each model has wrong."""
    scores, labels = draw(truth, 100_000, seed=0)
    return scores.argmax(axis=2) != labels


def jaccard(wrong: np.ndarray) -> float:
    return (wrong[0] & wrong[1]).sum() / (wrong[0] | wrong[1]).sum()


@functools.cache
def skill_for(accuracy: float) -> float:
    """The skill at which a model has that accuracy."""

    def lack(skill: float) -> float:
        return 1 - errors(Truth((skill, skill), 0.5))[0].mean() - accuracy

    return optimize.brentq(lack, 0.2, 6, xtol=1e-3)


def make_truth(case: Case) -> Truth:
    """The truth of a case; temperatures are fitted once, on rows of their own."""
    skills = (
        skill_for(FINE_TUNED_ACCURACY),
        skill_for(FINE_TUNED_ACCURACY - case.behind / 100),
    )

    def lack(correlation: float) -> float:
        return jaccard(errors(Truth(skills, correlation))) - case.jaccard

    correlation = optimize.brentq(lack, 0.0, 0.999, xtol=1e-3)
    scores, labels = draw(Truth(skills, correlation), 20_000, seed=1)
    fitted = [vqa.TemperatureScaler().fit(member, labels).temperature for member in scores]
    return Truth(skills, correlation, tuple(fitted))


def true_changes(member: vqa.BaseMember, fresh: np.ndarray, labels: np.ndarray) -> dict:
    """Mixture -> (2,) true change of accuracy and NLL on the fine-tuned model alone."""
    before = vqa.row_scores(fresh[0], labels).mean(axis=0)
    changes = {vqa.WITHOUT_BASE: np.zeros(2)}
    for name in vqa.BASE_MIXTURES:
        mixed = member.mix(name, member.members, member.labels, fresh)
        changes[name] = vqa.row_scores(mixed, labels).mean(axis=0) - before
    return changes


def simulate_data_set(truth: Truth, n_rows: int, seed, fresh) -> list[dict]:
    """For each mixture, and for the automatic choice: interval and true change."""
    scores, labels = draw(truth, n_rows, seed)
    member = vqa.BaseMember(vqa.softmax(scores), labels, scaling=True)
    groups = np.arange(n_rows)
    candidates = member.candidates(groups)
    chosen = vqa.choose_blend(candidates, labels, groups)
    truths = true_changes(member, *fresh)
    truths["automatic"] = truths[chosen]

    before = vqa.row_scores(member.members[0], labels)
    changes = []
    fitted_parameters = []
    for name in vqa.BASE_MIXTURES:
        changes.append(vqa.row_scores(candidates[name].probabilities, labels) - before)
        fitted_parameters += [1, candidates[name].fitted_parameters]
    ends = vqa.bootstrap_interval(np.hstack(changes), groups, np.array(fitted_parameters))
    intervals = dict(zip(vqa.BASE_MIXTURES, ends.reshape(2, -1, 2).swapaxes(0, 1), strict=True))
    intervals["automatic"] = vqa.choice_interval(candidates, labels, groups)
    rows = []
    for name, interval in intervals.items():
        row = {"mixture": name, "chosen": name == chosen, "kept out": chosen == vqa.WITHOUT_BASE}
        for column, score in enumerate(("accuracy", "nll")):
            row[f"{score} change"] = truths[name][column]
            row[f"{score} low"], row[f"{score} high"] = interval[:, column]
        rows.append(row)
    return rows


def simulate_case(number: int, n_data_sets: int) -> list[dict]:
    """A row for each data set of this case and each mixture."""
    case = CASES[number]
    truth = make_truth(case)
    scores, labels = draw(truth, FRESH_ROWS, seed=(2, number))
    fresh = vqa.softmax(scores), labels
    rows = []
    for n_rows in ROW_COUNTS:
        for data_set in range(n_data_sets):
            seed = (3, number, n_rows, data_set)
            for row in simulate_data_set(truth, n_rows, seed, fresh):
                facts = {"rows": n_rows, "behind": case.behind, "Jaccard": case.jaccard}
                rows.append({**facts, **row})
    return rows


def simulate(n_data_sets: int) -> pd.DataFrame:
    """The rows of all cases; accuracy in points, and whether the intervals hold the truth."""
    with ProcessPoolExecutor(min(2, os.cpu_count())) as pool:
        parts = pool.map(simulate_case, range(len(CASES)), itertools.repeat(n_data_sets))
        results = pd.DataFrame(itertools.chain.from_iterable(parts))
    columns = ["accuracy change", "accuracy low", "accuracy high"]
    results[columns] *= 100
    cases = results.groupby(["rows", "behind", "Jaccard", "mixture"])
    for score in ("accuracy", "nll"):
        expected = cases[f"{score} change"].transform("mean")
        held = expected.between(results[f"{score} low"], results[f"{score} high"])
        results[f"{score} covered"] = held
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-sets", type=int, default=48, help="of each case and size")
    options = parser.parse_args()
    started = time.perf_counter()
    results = simulate(options.data_sets)
    by_case = results.groupby(["rows", "Jaccard", "behind", "mixture"], sort=False)
    for score in ("accuracy", "nll"):
        table = by_case[f"{score} change"].mean().unstack("mixture").round(4)
        print(f"true change of {score}", vqa.markdown_table(table.reset_index()), sep="\n\n")
        print()
    columns = ["accuracy change", "nll change", "accuracy covered", "nll covered", "chosen"]
    covered = results.groupby(["rows", "mixture"], sort=False)[columns].mean()
    print(vqa.markdown_table(covered.reset_index()), end="\n\n")
    automatic = results[results["mixture"] == "automatic"]
    choice = automatic.groupby(["rows", "Jaccard", "behind"])
    table = choice.agg(
        data_sets=("kept out", "size"),
        kept_out=("kept out", "mean"),
        mean_points=("accuracy change", "mean"),
        least_points=("accuracy change", "min"),
    )
    print(vqa.markdown_table(table.reset_index()))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
