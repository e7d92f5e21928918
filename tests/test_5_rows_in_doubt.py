"""Part 5, Rows in doubt, and part 6, Out-of-fold rows in doubt.

Which rows get more views, at what cost, and that everything fitted sees rows as they are.
"""

import dataclasses
import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from fault_run import FORK
from planted import write_16_bit_scores, write_result, write_scores
from running import ROTATIONS, quiet, read_logits

import vqa_helpers as vqa

STEPS = (("rotations", 0.7), ("orders", 0.5), ("pixels", 1.5), ("base", 0.5))
SETTINGS = {
    "doubt_steps": STEPS,
    "doubt_orders": 8,
    "max_pixels": 4 * 32 * 32,
    "infer_max_pixels": 9 * 32 * 32,
}


def with_random_adapter(session):
    """An adapter that changes every answer; its B would be zero at first."""
    adapted = vqa.attach_lora(session.model, session.config, seed=0)
    weights = vqa.trainable_parameters(adapted)
    with torch.no_grad():
        for name, weight in weights.items():
            if ".lora_B." in name:
                weight.normal_(std=0.3)
    return adapted


@pytest.mark.slow
def test_rows_in_doubt_are_scored_as_if_all_views_had_been_asked_for(session, demo_rows, replace):
    """And no others, within each step's budget; the last step by the base model."""
    session.config = replace(session.config, **SETTINGS)
    frame = demo_rows.test[demo_rows.test["type"] != "ocr"].head(8).reset_index(drop=True)
    views = vqa.all_views(session.config, session.processor)
    names = [view.name for view in views]
    of_base = vqa.predict_logits(session, frame, views)
    vqa.use_fast_lora(with_random_adapter(session))
    full = vqa.predict_logits(session, frame, views)
    base = vqa.step_views(names, "base")
    assert np.abs(full - of_base).max() > 0.1
    full[:, base] = of_base[:, base]
    found = vqa.predict_in_steps(session, frame, views, "oof", None)
    again = vqa.predict_in_steps(session, frame, views, "test", None, found.pilot)
    for scores in (found, again):
        is_scored = ~np.isnan(scores.logits)
        assert np.abs(scores.logits - full)[is_scored].max() < 1e-4
        for number, (step, share) in enumerate(STEPS):
            has_step = is_scored[:, vqa.step_views(names, step)].all(axis=(1, 2))
            n_added = len(vqa.step_views(names, step))
            cost = vqa.scoring_cost(1, n_added) * (9 / 4 if step == "pixels" else 1)
            assert has_step.sum() == int(share * 8 / cost)
            margins = scores.margins[:, number]
            if step != "orders":  # only rows with all rotations may take it
                assert margins[has_step].max() <= margins[~has_step].min()
    assert np.abs(found.pilot.logits - full)[:, :8].max() < 1e-4
    has_rotations = is_scored[:, 1:4].all(axis=(1, 2))
    assert has_rotations[is_scored[:, 4].all(axis=1)].all()


@pytest.mark.parametrize("fast", [False, True])
def test_an_adapter_that_is_switched_off_leaves_the_base_model_to_the_bit(session, demo_rows, fast):
    frame = demo_rows.test.head(3)
    of_base = vqa.predict_logits(session, frame, ROTATIONS)
    adapted = with_random_adapter(session)
    if fast:
        vqa.use_fast_layers(session, adapted, 3)
    with_adapter = vqa.predict_logits(session, frame, ROTATIONS)
    with pytest.raises(vqa.Interrupted), vqa.adapter_switched_off(session.model):
        assert np.array_equal(vqa.predict_logits(session, frame, ROTATIONS), of_base)
        raise vqa.Interrupted
    assert np.array_equal(vqa.predict_logits(session, frame, ROTATIONS), with_adapter)
    assert not np.array_equal(with_adapter, of_base)


def test_a_step_is_charged_for_the_prefix_that_it_repeats(session, demo_rows, replace):
    session.config = replace(session.config, **SETTINGS)
    row = demo_rows.test[demo_rows.test["type"] != "ocr"].head(1)
    views = vqa.all_views(session.config, session.processor)

    def cost(step):
        names = [view.name for view in views]
        added = [views[number] for number in vqa.step_views(names, step)]
        return vqa.step_costs(session, row, views, added).item()

    assert cost("rotations") == pytest.approx(1 + 2 / 7)
    assert cost("base") == pytest.approx(1 + 3 / 7)
    assert cost("pixels") == pytest.approx(9 / 4 * (1 + 3 / 7))
    session.runtime = replace(session.runtime, attention="eager")  # without shared prefixes
    assert cost("rotations") == 3


def test_a_size_without_a_grid_of_its_own_and_smaller_text_are_not_paid_for(
    session, demo_rows, replace
):
    session.config = replace(session.config, **SETTINGS)
    smaller = [replace(view, name=f"pixels 0.5 {view.name}", scale=0.5) for view in ROTATIONS]
    views = [*ROTATIONS, *smaller]
    rows = [demo_rows.test[demo_rows.test["type"] == name].head(1) for name in ("ocr", "color")]
    costs = vqa.step_costs(session, pd.concat(rows), views, smaller)
    assert costs == pytest.approx([0, 1 + 3 / 7])
    same_grid = [replace(view, scale=1.0) for view in smaller]
    costs = vqa.step_costs(session, rows[1], [*ROTATIONS, *same_grid], same_grid)
    assert costs.tolist() == [0]


def test_rows_that_cost_nothing_take_no_place_and_the_budget_is_kept():
    margins = np.array([0.1, 0.0, 0.3, 0.2, 0.2])
    costs = np.array([2.0, 0.0, 1.0, 1.0, 1.0])
    assert vqa.rows_in_doubt(margins, costs, 3.0).tolist() == [0, 3]
    assert vqa.rows_in_doubt(margins, costs, 1.9).tolist() == []
    assert vqa.rows_in_doubt(margins, costs, 99.0).tolist() == [0, 2, 3, 4]


def scores_with_bias(bias, n=400):
    """Labels, and logits of four rotations of a model that likes whatever stands first."""
    random = np.random.default_rng(0)
    labels = np.arange(n) % 4
    signal = 2 * np.eye(4)[labels][:, None]
    noise_of_the_row = random.normal(size=(n, 1, 4))
    noise_of_the_view = 0.1 * random.normal(size=(n, 4, 4))
    logits = signal + noise_of_the_row + noise_of_the_view
    for number, view in enumerate(ROTATIONS):
        logits[:, number, view.order[0]] += bias
    return labels, logits


def out_of_fold(labels, logits):
    """Rows of two folds, each with an image of its own."""
    frame = pd.DataFrame({"pixel_hash": np.arange(len(labels))})
    folds = labels // 2 % 2
    names = tuple(view.name for view in ROTATIONS)
    return vqa.OofLogits(frame, logits, labels, folds, names)


def test_the_answers_that_a_letter_bias_has_changed_are_in_doubt_however_sure_they_look():
    labels, logits = scores_with_bias(bias=2.5)
    one = vqa.combine_views(logits[:, :1])
    every = vqa.combine_views(logits)
    preference = vqa.letter_preference(one, every)
    assert preference - preference[1:].mean() == pytest.approx([2.5, 0, 0, 0], abs=0.1)
    changed = one.argmax(1) != every.argmax(1)
    assert changed.sum() > 60

    def in_doubt(margins):
        return vqa.rows_in_doubt(margins, np.ones(400), changed.sum())

    found = in_doubt(vqa.answer_margins(one, preference))
    found_without_preference = in_doubt(vqa.answer_margins(one, np.zeros(4)))
    assert changed[found].mean() > 0.9
    assert changed[found_without_preference].mean() < 0.6


def test_a_blank_choice_has_no_part_in_preference_and_margin():
    scores = np.full((2, 4), -np.inf)
    scores[:, :3] = np.log([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    assert vqa.letter_preference(scores, scores).tolist() == [0, 0, 0, 0]
    assert vqa.answer_margins(scores, np.zeros(4)) == pytest.approx(np.log([5 / 3, 2]))


# --- Steps on made-up scores ----------------------------------------------------------------------

NAMES = ["rotation 0", "rotation 1", "rotation 2", "rotation 3", "base rotation 0"]


def steps_on(logits, steps, is_held_out=True, pilot=None):
    """`score_in_steps` where every view of every row is known before."""

    def score_step(step, rows):
        added = vqa.step_views(NAMES, step)
        scores = np.full((len(rows), len(NAMES), 4), np.nan)
        scores[:, added] = logits[np.ix_(rows, added)]
        return scores

    first = vqa.first_views(NAMES, dict(steps))
    in_first = np.full(logits.shape, np.nan)
    in_first[:, first] = logits[:, first]
    if pilot is None:
        rows = np.arange(0, len(logits), 5)
        pilot_logits = logits[rows].copy()
        pilot_logits[:, 4] = np.nan
        pilot = vqa.Pilot(rows, pilot_logits)
    costs = dict.fromkeys(dict(steps), np.ones(len(logits)))
    return vqa.score_in_steps(steps, NAMES, in_first, costs, pilot, is_held_out, score_step)


def scores_of_all_views(bias):
    labels, logits = scores_with_bias(bias)
    base = np.random.default_rng(1).normal(size=(len(labels), 1, 4))
    return labels, np.concatenate([logits, base], axis=1)


def test_held_out_rows_take_the_very_steps_that_test_rows_take():
    _, logits = scores_of_all_views(bias=2.5)
    steps = (("rotations", 0.25), ("base", 0.1))
    held_out = steps_on(logits, steps)
    test = steps_on(logits, steps, is_held_out=False, pilot=held_out.pilot)
    for scores in (held_out, test):
        has_view = ~np.isnan(scores.logits).all(axis=2)
        assert has_view.sum(axis=0).tolist() == [400, 100, 100, 100, 40]
    # Only rows of the pilot have another preference: that of the pilot's other rows.
    others = np.setdiff1d(np.arange(400), held_out.pilot.rows)
    assert np.array_equal(held_out.margins[others, 0], test.margins[others, 0])
    assert (held_out.margins[held_out.pilot.rows, 0] != test.margins[held_out.pilot.rows, 0]).all()


def test_no_pilot_row_is_chosen_by_what_the_pilot_scored_of_it():
    _, logits = scores_of_all_views(bias=2.5)
    steps = (("rotations", 0.25),)
    before = steps_on(logits, steps)
    changed = logits.copy()
    row = before.pilot.rows[3]
    changed[row, 1:4] += [99.0, 0.0, 0.0, 0.0]
    after = steps_on(changed, steps)
    same = (np.arange(len(before.pilot.rows)) % vqa.PREFERENCE_PARTS) == 3
    rows = before.pilot.rows
    assert np.array_equal(before.margins[rows[same]], after.margins[rows[same]])
    assert not np.array_equal(before.margins[rows[~same]], after.margins[rows[~same]])


def test_after_a_step_doubt_is_measured_by_the_views_that_a_row_has_now():
    _, logits = scores_of_all_views(bias=2.5)
    found = steps_on(logits, (("rotations", 0.25), ("base", 0.1)))
    has_rotations = ~np.isnan(found.logits[:, 1]).all(axis=1)
    every = vqa.combine_views(logits[:, :4])
    without_preference = vqa.answer_margins(every, np.zeros(4))
    assert found.margins[has_rotations, 1] == pytest.approx(without_preference[has_rotations])
    preferences = vqa.letter_preferences(found.pilot, found.logits, NAMES, is_held_out=False)
    assert preferences[has_rotations] == pytest.approx(0)
    lead = preferences[~has_rotations] - preferences[~has_rotations][:, 1:].mean()
    assert lead == pytest.approx(np.tile([2.5, 0, 0, 0], (300, 1)), abs=0.15)


def test_larger_images_halve_the_preference_of_the_orders_before_them():
    _, logits = scores_with_bias(2.5)
    names = [*NAMES[:4], "pixels 2 rotation 0"]
    with_larger = np.concatenate([logits, logits.mean(axis=1, keepdims=True)], axis=1)
    pilot_logits = with_larger.copy()
    pilot_logits[:, 4] = np.nan
    pilot = vqa.Pilot(np.arange(400), pilot_logits)
    with_larger[:, 1:4] = np.nan
    with_larger[200:, 4] = np.nan
    preferences = vqa.letter_preferences(pilot, with_larger, names, is_held_out=False)
    assert preferences[0] == pytest.approx(preferences[200] / 2)
    assert preferences[200, 0] > 1


# --- Out-of-fold rows -----------------------------------------------------------------------------


def oof_after_steps(labels, logits, steps):
    scores = steps_on(logits, steps)
    oof = out_of_fold(labels, scores.logits)
    return dataclasses.replace(
        oof, view_names=tuple(NAMES), steps=tuple(dict(steps)), margins=scores.margins
    )


def test_rows_without_further_views_have_a_part_in_what_is_fitted_and_its_cost():
    labels, logits = scores_of_all_views(bias=1.5)
    oof = oof_after_steps(labels, logits, (("rotations", 0.25),))
    assert oof.cost(range(4)) == pytest.approx(1 + 0.25 * (1 + 2 / 7))
    full = out_of_fold(labels, logits[:, :4])
    assert full.cost(range(4)) == pytest.approx(10 / 7)
    views, table = vqa.admit_views(oof)
    assert views == [0, 1, 2, 3]
    assert table.loc["rotations", "cost"] == pytest.approx(oof.cost(range(4)))
    _, full_table = vqa.admit_views(full)
    of_one_view, of_all_views = full_table["accuracy"]
    assert of_one_view < table.loc["rotations", "accuracy"] <= of_all_views


def test_a_step_that_loses_on_oof_is_not_used_and_the_next_one_is_tried_without_it():
    names = ("rotation 0", "pixels 2 rotation 0", "base rotation 0")
    labels, logits = scores_with_bias(bias=0)
    random = np.random.default_rng(0)
    sure_and_wrong = 9 * np.eye(4)[random.integers(4, size=400)]
    good = logits[:, 0] + np.eye(4)[labels]
    scores = np.stack([logits[:, 0], sure_and_wrong, good], axis=1)
    oof = out_of_fold(labels, scores)
    oof = dataclasses.replace(oof, view_names=names, steps=("pixels", "base"))
    views, table = vqa.admit_views(oof)
    assert table["admitted"].to_dict() == {
        "single view": True,
        "more pixels": False,
        "base model": True,
    }
    assert views == [0, 2]
    ladder_steps = vqa.view_ladder_steps(oof, table["admitted"], views, averaged=True)
    found = [(name, step.views, step.against, step.used) for name, step in ladder_steps.items()]
    assert found == [
        ("fine-tuned, one view", [0], "zero-shot", True),
        ("more pixels, for rows in doubt", [0, 1], "fine-tuned, one view", False),
        ("base model, for rows in doubt", [0, 2], "fine-tuned, one view", True),
    ]


def test_more_orders_are_tried_with_the_rotations_even_where_these_lost():
    names = ("rotation 0", "rotation 1", "order acbd", "pixels 2 rotation 0")
    oof = dataclasses.replace(
        out_of_fold(np.arange(8) % 4, np.zeros((8, 4, 4))),
        view_names=names,
        steps=("rotations", "orders", "pixels"),
    )
    sets = vqa.views_to_try(oof, {"single view": True, "rotations": False})
    assert sets["more orders"] == [0, 1, 2]
    sets = vqa.views_to_try(oof, {"rotations": False, "more orders": False})
    assert sets["more pixels"] == [0, 3]
    sets = vqa.views_to_try(oof, {"rotations": False, "more orders": True})
    assert sets["more pixels"] == [0, 1, 2, 3]  # which were admitted together


def test_the_curve_has_a_point_for_each_quarter_of_a_step():
    labels, logits = scores_of_all_views(bias=2.5)
    oof = oof_after_steps(labels, logits, (("rotations", 0.25), ("base", 0.1)))
    points = vqa._points_of_steps(oof)
    assert list(points)[:2] == ["first views", "rotations, 25%"]
    assert list(points)[-1] == "base, 100%"
    logits_of_steps = [point.oof.logits[:, point.added] for point in points.values()]
    shares = [vqa.has_any_view(logits).mean() for logits in logits_of_steps]
    assert shares == [1, 0.0625, 0.125, 0.1875, 0.25, 0.025, 0.05, 0.075, 0.1]
    last = points["base, 100%"].oof.logits
    assert np.array_equal(last, oof.logits, equal_nan=True)
    first = points["rotations, 25%"].oof.logits
    given = ~np.isnan(first[:, 1]).all(axis=1)
    assert oof.margins[given, 0].max() <= np.sort(oof.margins[:, 0])[24]


def test_the_last_step_is_simulated_without_a_look_at_labels():
    labels, logits = scores_with_bias(bias=1.0)

    def simulated(labels):
        return vqa.simulate_last_step(out_of_fold(labels, logits), 0.25).logits

    found = simulated(labels)
    missing = np.isnan(found).all(axis=2)
    has_all_views = (~missing[:, 1:]).all(axis=1)
    assert has_all_views.sum() == 100
    assert not missing[:, 0].any()
    assert np.array_equal(found, simulated(np.roll(labels, 4)), equal_nan=True)


def test_the_curve_of_views_in_doubt_is_of_one_precision(mini_run):
    run = mini_run(quantization="4bit", score_precision="16bit")
    for fold in (0, 1):
        write_result(run, fold, raw=1.0, ema=1.1)
        write_scores(run, fold, 1.0)
    plain = vqa.doubt_curve(run)
    for fold in (0, 1):
        write_16_bit_scores(run, fold, 1.0)
    assert run.is_rescored
    assert vqa.doubt_curve(run).equals(plain)


# --- Whole runs -----------------------------------------------------------------------------------


@pytest.fixture
def run_in_steps(mini_run):
    """A run whose first fold is trained, before its rows are scored."""
    run = mini_run(
        train_folds=(0,), infer_batch_size=2, save_every_steps=1, run_name="steps", **SETTINGS
    )
    vqa.run_stages(run, [0], ["zeroshot", "train"], quiet)
    return run


def predict(run):
    vqa.run_stages(run, [0], ["predict"], quiet)


def predict_until_killed(run, step):
    """Score the fold's rows in a process of its own, which dies in the second batch of a step."""
    score_batches = vqa.score_batches
    score_views = vqa.StepScorer.score_views

    def killing(*arguments):
        for number, scores in enumerate(score_batches(*arguments)):
            if number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield scores

    def watched(scorer, name, *arguments):
        if name == step and (step == "pilot" or "test" in scorer.label):
            vqa.score_batches = killing
        return score_views(scorer, name, *arguments)

    vqa.StepScorer.score_views = watched
    predict(run)


@pytest.mark.slow
def test_a_run_killed_in_each_of_its_steps_ends_with_the_same_bytes(run_in_steps):
    """Submissions, report and curve come out of what is there."""
    run = run_in_steps
    for step in ("pilot", *dict(STEPS)):
        process = FORK.Process(target=predict_until_killed, args=(run, step))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, step
        assert list(run.directory.glob(f"fold_0/*.{step}.partial.npz"))
    assert not run.is_done("predict", 0)
    predict(run)
    assert not list(run.directory.glob("fold_*/*partial*"))

    paths = [run.fold_dir(0) / "oof.npz", run.fold_dir(0) / "test.npz"]
    resumed = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    predict(run)
    assert resumed == [path.read_bytes() for path in paths]

    has_view = ~np.isnan(read_logits(run, 0, "test")).all(axis=2)
    assert has_view[:, [0, 1, 4]].sum(axis=0).tolist() == [12, 6, 4]
    evaluation = vqa.evaluate_run(run)
    assert "rotations, for rows in doubt" in evaluation.ladder.index
    assert list(vqa.predict_test(run, evaluation)) == [0]
    for frame in vqa.write_submissions(run, evaluation).values():
        assert set(frame["answer"]) <= set(vqa.CHOICES)
    report = vqa.write_report(run, evaluation).read_text(encoding="utf-8")
    assert "Views for rows in doubt only" in report

    curve = pd.read_csv(run.directory / "tables" / "doubt_curve.csv", index_col=0)
    assert curve["cost"].is_monotonic_increasing
    assert curve.index[-1] == "base, 100%"
    assert len(curve) == 1 + 4 * 4
    assert np.isfinite(curve).all(axis=None)
    axes = vqa.plot_doubt_curve(curve)
    assert [text.get_text() for text in axes[0].texts] == list(dict(STEPS))
    assert len(axes[0].lines) == 1
    vqa.ensemble_runs([run.directory], run.directory / "alone")


def test_the_curve_of_a_run_with_all_views_ends_with_all_rows(finished):
    curve = vqa.doubt_curve(finished)
    assert curve.index[0] == "rotations and scales, 0%"
    assert curve.index[-1] == "all rows"
    assert len(curve) == 12
    axes = vqa.plot_doubt_curve(curve)
    assert len(axes[0].lines) == 3


@pytest.mark.slow
def test_a_group_agrees_on_the_rows_in_doubt_even_where_one_process_gets_none(
    mini_run, monkeypatch
):
    run = mini_run(n_folds=2, train_folds=(0,), doubt_steps=(("rotations", 0.25), ("base", 0.3)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(vqa, "worker_devices", lambda config: [None, None])
    vqa.run_folds(run.config)
    logits = read_logits(run, 0, "test")
    assert np.isfinite(logits[:, 0]).all()
    has_all_views = np.isfinite(logits[:, 1:4]).all(axis=(1, 2))
    assert has_all_views.sum() == 2  # one batch


def test_a_steps_cost_is_computed_once_for_rows_of_one_type_and_size(
    session, demo_rows, replace, monkeypatch
):
    session.config = replace(session.config, **SETTINGS)
    rows = demo_rows.test[demo_rows.test["type"].isin(["ocr", "color"])].head(40)
    views = [*ROTATIONS, vqa.TTAView("scale 0.5", scale=0.5)]
    calls = []
    group_views = vqa.group_views_by_prompt

    def counted(*arguments):
        calls.append(1)
        return group_views(*arguments)

    monkeypatch.setattr(vqa, "group_views_by_prompt", counted)
    costs = vqa.step_costs(session, rows.assign(width=96, height=96), views, views[4:])
    assert len(calls) == 2
    assert np.array_equal(costs == 0, rows["type"] == "ocr")  # no text is made smaller
