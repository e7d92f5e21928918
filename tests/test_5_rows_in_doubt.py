"""Part 5, Rows in doubt, and part 6, Out-of-fold rows in doubt.

Which rows get more views, at what cost, and that everything fitted sees rows as they are.
"""

import numpy as np
import pandas as pd
import pytest
from planted import write_16_bit_scores, write_result, write_scores
from running import ROTATIONS, quiet, read_logits

import vqa_helpers as vqa

SETTINGS = {"adaptive_tta": 0.5, "max_pixels": 6 * 32 * 32}


def test_rows_in_doubt_are_scored_as_if_all_views_had_been_asked_for(session, demo_rows, replace):
    """And no others, within the budget; a scale without a grid of its own is not paid for."""
    session.config = replace(session.config, **SETTINGS)
    frame = demo_rows.test[demo_rows.test["type"] != "ocr"].head(12).reset_index(drop=True)
    views = [*ROTATIONS, vqa.TTAView("scale 1.01", 0, 1.01), vqa.TTAView("scale 2", 0, 2.0)]
    full = vqa.predict_logits(session, frame, views)
    found = vqa.predict_in_doubt(session, frame, views, full, "test", None)
    planned = vqa.plan_prompts(session, frame.head(2), views, ROTATIONS)
    assert [item.view_numbers for item in planned] == [[5], [5]]
    scored = ~np.isnan(found[:, 5]).all(axis=1)
    assert scored.sum() == 6  # half of the cost of one prompt a row
    assert np.isnan(found[:, 4]).all()
    assert np.abs(found[:, :4] - full[:, :4]).max() < 1e-4
    assert np.abs(found - full)[scored, 5].max() < 1e-4
    first, _ = vqa.split_views([view.name for view in views])
    margins = vqa.answer_margins(vqa.combine_views(full[:, first]), np.zeros(4))
    assert margins[scored].mean() < margins[~scored].mean()


def test_a_second_pass_is_charged_for_the_prefix_that_it_repeats(session, demo_rows, replace):
    session.config = replace(session.config, **SETTINGS)
    row = demo_rows.test.head(1)
    costs = vqa.pass_costs(session, row, ROTATIONS, ROTATIONS[:1])
    first, again, together = costs[0]
    assert (first, again, together) == pytest.approx((1, 1 + 2 / 7, 1 + 3 / 7))
    session.runtime = replace(session.runtime, attention="eager")  # without shared prefixes
    costs = vqa.pass_costs(session, row, ROTATIONS, ROTATIONS[:1])
    assert costs.tolist() == [[1, 3, 4]]


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


# --- Out-of-fold rows -----------------------------------------------------------------------------


def test_oof_rows_are_treated_like_test_rows_without_a_look_at_labels():
    labels, logits = scores_with_bias(bias=1.0)

    def simulated(labels):
        shares = {0: 0.25, 1: 0.1}
        return vqa.simulate_views_in_doubt(out_of_fold(labels, logits), shares).logits

    found = simulated(labels)
    missing = np.isnan(found).all(axis=2)
    has_all_views = (~missing[:, 1:]).all(axis=1)
    assert has_all_views[labels // 2 == 0].sum() == 50
    assert has_all_views[labels // 2 == 1].sum() == 20
    assert not missing[:, 0].any()
    assert np.array_equal(found, simulated(np.roll(labels, 4)), equal_nan=True)


def test_rows_without_further_views_have_a_part_in_what_is_fitted_and_its_cost():
    labels, logits = scores_with_bias(bias=1.5)
    oof = out_of_fold(labels, logits)
    doubt = vqa.simulate_views_in_doubt(oof, {0: 0.25, 1: 0.25})
    assert doubt.cost(range(4)) == pytest.approx(1 + 0.25 * (1 + 2 / 7))
    assert oof.cost(range(4)) == pytest.approx(10 / 7)
    views, table = vqa.admit_views(doubt)
    assert views == [0, 1, 2, 3]
    assert table.loc["rotations", "cost"] == pytest.approx(doubt.cost(range(4)))
    _, full_table = vqa.admit_views(oof)
    of_one_view, of_all_views = full_table["accuracy"]
    assert of_one_view < table.loc["rotations", "accuracy"] <= of_all_views
    calibration = vqa.calibrate(vqa.combine_views(doubt.logits), labels, doubt.folds)
    plain = vqa.calibrate(vqa.combine_views(logits), labels, doubt.folds)
    assert calibration.temperatures != plain.temperatures


def test_the_curve_of_views_in_doubt_is_of_one_precision(mini_run):
    run = mini_run(quantization="4bit", score_precision="16bit")
    for fold in (0, 1):
        write_result(run, fold, raw=1.0, ema=1.1)
        write_scores(run, fold, 1.0)
    plain = vqa.adaptive_curve(run)
    for fold in (0, 1):
        write_16_bit_scores(run, fold, 1.0)
    assert run.is_rescored
    assert vqa.adaptive_curve(run).equals(plain)


# --- Whole runs -----------------------------------------------------------------------------------


@pytest.fixture
def adaptive_run(mini_run):
    run = mini_run(adaptive_tta=0.9, infer_batch_size=2, run_name="adaptive")
    vqa.run_stages(run, [0, 1], ["zeroshot", "train"], quiet)
    return run


@pytest.mark.slow
def test_a_run_killed_in_its_second_pass_ends_with_the_same_bytes(adaptive_run):
    """The first pass is not done again; submissions, report and curve come out of what is there."""
    run = adaptive_run
    calls = []

    def stop(label, done, *_, **__):
        calls.append(label)
        if label == "fold 0 test, in doubt" and done == 1 and calls.count(label) == 1:
            raise vqa.Interrupted

    with pytest.raises(vqa.Interrupted):
        vqa.run_stages(run, [0, 1], ["predict"], stop)
    assert calls.count("fold 0 test") == 6
    vqa.run_stages(run, [0, 1], ["predict"], stop)
    assert calls.count("fold 0 test") == 6
    assert not list(run.directory.glob("fold_*/*partial*"))

    paths = [run.fold_dir(fold) / "test.npz" for fold in (0, 1)]
    resumed = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    vqa.run_stages(run, [0, 1], ["predict"], quiet)
    assert resumed == [path.read_bytes() for path in paths]

    has_one_view = np.isnan(read_logits(run, 0, "test")[:, 1:]).all(axis=(1, 2))
    assert (~has_one_view).sum() == 3  # 0.9 * 3/7 of twelve questions, 9/7 each
    evaluation = vqa.evaluate_run(run)
    has_one_view = np.isnan(evaluation.oof.logits[:, 1:]).all(axis=(1, 2))
    assert has_one_view.sum() == 36 - 8
    assert "mean of up to 4 views" in evaluation.ladder.index
    for frame in vqa.write_submissions(run, evaluation).values():
        assert set(frame["answer"]) <= set(vqa.CHOICES)
    report = vqa.write_report(run, evaluation).read_text(encoding="utf-8")
    assert "Views for rows in doubt only" in report

    curve = pd.read_csv(run.directory / "tables" / "adaptive_curve.csv", index_col=0)
    assert curve["cost"].is_monotonic_increasing
    assert curve.index[-1] == "all rows"
    assert len(curve) == 12
    assert np.isfinite(curve).all(axis=None)
    axes = vqa.plot_adaptive_curve(curve)
    assert len(axes[0].lines) == 3
    vqa.ensemble_runs([run.directory], run.directory / "alone")


@pytest.mark.slow
def test_a_group_agrees_on_the_rows_in_doubt_even_where_one_process_gets_none(
    mini_run, monkeypatch
):
    run = mini_run(n_folds=2, train_folds=(0,), adaptive_tta=0.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(vqa, "worker_devices", lambda config: [None, None])
    vqa.run_folds(run.config)
    logits = read_logits(run, 0, "test")
    assert np.isfinite(logits[:, 0]).all()
    has_all_views = np.isfinite(logits[:, 1:]).all(axis=(1, 2))
    assert has_all_views.sum() == 2  # one batch
