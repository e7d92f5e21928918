"""Plant a letter bias, a neighbour bias and blur in made-up scores; buy views for rows in doubt.

    python tests/benchmarks/adaptive_compute.py    # a minute on any machine; nothing is trained

Prints what the steps of `doubt_steps` reach on OOF rows, on the hidden rows of one fold and on
those of the folds' mean: accuracy, and the share of the gain of everything for all rows. Every line
spends a part of what everything would cost, where all orders share one pass.

The models, one a fold, see the right choice through noise of the row that all share, noise of the
fold and noise of the view. They like the letter that stands first, and rate a choice by its letter
and that of the row's strongest choice beside it, which four rotations leave. In a part of the rows
the image is too small: they see little of the answer there, and nearly all of it with more pixels.
The base model has noise and likings of its own.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import vqa_helpers as vqa

STEPS = ("rotations", "orders", "pixels", "base")
ORDERS = 24
SHARES = {"rotations": 0.45, "orders": 0.2, "pixels": 0.2, "base": 0.15}  # of what is spent
FOLDS = 3


def views_of_steps() -> list[vqa.TTAView]:
    """The views of all steps, as a run with all of them has them."""
    views = [vqa.TTAView(f"rotation {turn}", turn) for turn in range(4)]
    for order in vqa.balanced_orders(ORDERS)[4:]:
        views.append(vqa.TTAView(f"order {order}", other_order=order))
    for turn in range(4):
        views.append(vqa.TTAView(f"pixels 2 rotation {turn}", turn, 2.0))
    for turn in range(4):
        views.append(vqa.TTAView(f"base rotation {turn}", turn, by_base_model=True))
    return views


@dataclass(frozen=True)
class Damage:
    """What is planted in the scores."""

    letter_bias: float  # more for the letter that stands first
    neighbour_bias: float  # standard deviation, by two letters
    blurred: float  # share of the rows whose image is too small


@dataclass(frozen=True)
class Questions:
    """Rows, and what every model sees of them."""

    labels: np.ndarray  # (n,)
    content: np.ndarray  # (n, 4) scores without any damage
    is_blurred: np.ndarray  # (n,)


def draw_questions(count: int, damage: Damage, random: np.random.Generator) -> Questions:
    labels = random.integers(4, size=count)
    content = 3.0 * np.eye(4)[labels] + random.normal(size=(count, 4))
    return Questions(labels, content, random.random(count) < damage.blurred)


def neighbour_bias(size: float, random: np.random.Generator) -> np.ndarray:
    """(4, 4) by a choice's letter and that of the row's strongest choice; its mean is zero."""
    bias = size * random.normal(size=(4, 4))
    np.fill_diagonal(bias, 0)
    return bias - bias.sum() / 12 * (1 - np.eye(4))


def score_all_views(
    questions: Questions,
    views: list[vqa.TTAView],
    damage: Damage,
    random: np.random.Generator,
) -> np.ndarray:
    """(n, views, 4) of one fold's model, and of the base model, in every view."""
    shape = questions.content.shape
    of_fold = questions.content + 0.5 * random.normal(size=shape)
    blurred = 0.2 * of_fold + random.normal(size=shape)
    of_base = 0.8 * questions.content + 0.8 * random.normal(size=shape)
    by_neighbour = neighbour_bias(damage.neighbour_bias, random)
    strongest = questions.content.argmax(axis=1)
    logits = np.empty((len(questions.labels), len(views), 4))
    for number, view in enumerate(views):
        seen = of_base if view.by_base_model else of_fold
        if view.scale == 1 and not view.by_base_model:
            seen = np.where(questions.is_blurred[:, None], blurred, seen)
        letters = np.argsort(view.order)
        scores = seen + 0.2 * random.normal(size=shape)
        scores[:, view.order[0]] += damage.letter_bias
        scores += by_neighbour[letters, letters[strongest][:, None]]
        logits[:, number] = scores
    return logits


def full_costs(view_names: list[str]) -> dict[str, float]:
    """Time of each step for all rows, in a pass of its own; in rows with one view."""
    return {step: vqa.scoring_cost(1, len(vqa.step_views(view_names, step))) for step in STEPS}


def cost_of_everything() -> float:
    """Of all views of a row, all orders in one pass."""
    return vqa.scoring_cost(1, ORDERS) + 2 * vqa.scoring_cost(1, 4)


def take_steps(
    logits: np.ndarray,
    view_names: list[str],
    steps: list[tuple[str, float]],
    pilot: vqa.Pilot | None,
) -> vqa.ScoresInDoubt:
    """`score_in_steps` where every view of every row is known before."""
    in_first = np.full(logits.shape, np.nan)
    in_first[:, 0] = logits[:, 0]
    is_held_out = pilot is None
    if is_held_out:
        rows = np.linspace(0, len(logits) - 1, vqa.PILOT_ROWS).astype(int)
        in_all_orders = logits[rows].copy()
        for step in ("pixels", "base"):
            in_all_orders[:, vqa.step_views(view_names, step)] = np.nan
        pilot = vqa.Pilot(rows, in_all_orders)

    def score_step(step: str, rows: np.ndarray) -> np.ndarray:
        added = vqa.step_views(view_names, step)
        scores = np.full((len(rows), len(view_names), 4), np.nan)
        scores[:, added] = logits[np.ix_(rows, added)]
        return scores

    costs = {}
    for step, cost in full_costs(view_names).items():
        costs[step] = np.full(len(logits), cost)
    return vqa.score_in_steps(steps, view_names, in_first, costs, pilot, is_held_out, score_step)


def time_spent(scores: vqa.ScoresInDoubt, view_names: list[str]) -> float:
    """Mean time of a row, in rows with one view."""
    spent = 1.0
    for step, cost in full_costs(view_names).items():
        added = vqa.step_views(view_names, step)
        has_step = ~np.isnan(scores.logits[:, added]).all(axis=(1, 2))
        spent += cost * has_step.mean()
    return spent


def accuracies(
    oof_rows: list[Questions],
    hidden: Questions,
    scores: list[tuple[np.ndarray, np.ndarray]],
    view_names: list[str],
) -> dict[str, float]:
    """Accuracy on OOF rows, hidden rows by one fold, and hidden rows by the folds' mean.

    `scores`: for each fold (n, views, 4) of its held-out rows and of the hidden rows.
    """
    oof = []
    members = []
    for rows, (held_out, test) in zip(oof_rows, scores, strict=True):
        oof.append(vqa.combine_steps(held_out, view_names).argmax(axis=1) == rows.labels)
        members.append(vqa.softmax(vqa.combine_steps(test, view_names)))
    one_fold = np.stack(members).argmax(axis=2) == hidden.labels
    mean = np.mean(members, axis=0).argmax(axis=1) == hidden.labels
    return {
        "OOF": np.concatenate(oof).mean(),
        "hidden, one fold": one_fold.mean(),
        "hidden, mean of folds": mean.mean(),
    }


def budget_table(damage: Damage, count: int, seed: int) -> pd.DataFrame:
    """Accuracies by the part of everything's cost that is spent, and shares of the gain."""
    random = np.random.default_rng(seed)
    views = views_of_steps()
    names = [view.name for view in views]
    oof_rows = [draw_questions(count, damage, random) for _ in range(FOLDS)]
    hidden = draw_questions(count, damage, random)
    full = []
    for rows in oof_rows:
        both = Questions(
            np.concatenate([rows.labels, hidden.labels]),
            np.concatenate([rows.content, hidden.content]),
            np.concatenate([rows.is_blurred, hidden.is_blurred]),
        )
        logits = score_all_views(both, views, damage, random)
        full.append((logits[:count], logits[count:]))
    everything = cost_of_everything()
    table = {}
    for part in (0.25, 0.375, 0.5, 0.75):
        to_spend = part * everything - 1
        steps = [(step, share * to_spend) for step, share in SHARES.items()]
        scores = []
        spent = []
        for held_out, test in full:
            of_oof = take_steps(held_out, names, steps, None)
            of_test = take_steps(test, names, steps, of_oof.pilot)
            scores.append((of_oof.logits, of_test.logits))
            spent.append(time_spent(of_test, names))
        row = {"cost": np.mean(spent) / everything}
        table[f"{part:.1%}"] = row | accuracies(oof_rows, hidden, scores, names)
    one_view = [(held_out[:, :1], test[:, :1]) for held_out, test in full]
    least = {"cost": 1 / everything} | accuracies(oof_rows, hidden, one_view, names[:1])
    most = {"cost": 1.0} | accuracies(oof_rows, hidden, full, names)
    rows = {"one view": least, **table, "everything": most}
    for name in list(least)[1:]:
        for row in rows.values():
            row[f"gain: {name}"] = (row[name] - least[name]) / (most[name] - least[name])
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("spent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000, help="of each fold, and hidden ones")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    damages = {
        "letter bias": Damage(2.5, 0.0, 0.0),
        "blur": Damage(0.0, 0.0, 0.2),
        "letter bias and blur": Damage(2.5, 0.0, 0.2),
        "letter bias, neighbour bias and blur": Damage(2.5, 0.7, 0.2),
    }
    for name, damage in damages.items():
        table = budget_table(damage, options.rows, options.seed)
        print(f"\n{name}\n\n{vqa.markdown_table(table)}", flush=True)


if __name__ == "__main__":
    main()
