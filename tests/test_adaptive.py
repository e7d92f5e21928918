"""More views for the rows in doubt only: which rows, at what cost, and that everything fitted sees them as they are."""

import numpy as np
import pandas as pd
import pytest

import vqa_helpers as vqa

ROTATIONS = [vqa.TTAView(f"rotation {turn}", turn) for turn in range(4)]
FIELDS = {"adaptive_tta": 0.5, "max_pixels": 6 * 32 * 32}


def test_rows_in_doubt_are_scored_as_if_all_views_had_been_asked_for(session, demo_rows, replace):
    """And no others, within the budget; a scale without a grid of its own is not paid for."""
    session.config = replace(session.config, **FIELDS)
    frame = demo_rows.test[demo_rows.test["type"] != "ocr"].head(12).reset_index(drop=True)
    views = [*ROTATIONS, vqa.TTAView("scale 1.01", 0, 1.01), vqa.TTAView("scale 2", 0, 2.0)]
    full = vqa.predict_logits(session, frame, views)
    found = vqa.predict_in_doubt(session, frame, views, full, "test", None)
    assert [
        numbers for _, numbers in vqa.plan_prompts(session, frame.head(2), views, ROTATIONS)
    ] == [[5], [5]]
    scored = ~np.isnan(found[:, 5]).all(axis=1)
    assert scored.sum() == 6 and np.isnan(found[:, 4]).all()  # half of the cost of one prompt a row
    assert (
        np.abs(found[:, :4] - full[:, :4]).max() < 1e-4
        and np.abs(found - full)[scored, 5].max() < 1e-4
    )
    first, _ = vqa.split_views([view.name for view in views])
    margins = vqa.answer_margins(vqa.combine_views(full[:, first]), np.zeros(4))
    assert margins[scored].mean() < margins[~scored].mean()


def test_a_second_pass_is_charged_for_the_prefix_that_it_repeats(session, demo_rows, replace):
    session.config = replace(session.config, **FIELDS)
    first, again, together = vqa.pass_costs(
        session, demo_rows.test.head(1), ROTATIONS, ROTATIONS[:1]
    )[0]
    assert (first, again, together) == pytest.approx((1, 1 + 2 / 7, 1 + 3 / 7))
    session.runtime = replace(session.runtime, attention="eager")  # without shared prefixes
    assert vqa.pass_costs(session, demo_rows.test.head(1), ROTATIONS, ROTATIONS[:1]).tolist() == [
        [1, 3, 4]
    ]


def test_rows_that_cost_nothing_take_no_place_and_the_budget_is_kept():
    margins, costs = np.array([0.1, 0.0, 0.3, 0.2, 0.2]), np.array([2.0, 0.0, 1.0, 1.0, 1.0])
    assert vqa.rows_in_doubt(margins, costs, 3.0).tolist() == [0, 3]
    assert vqa.rows_in_doubt(margins, costs, 1.9).tolist() == []
    assert vqa.rows_in_doubt(margins, costs, 99.0).tolist() == [0, 2, 3, 4]


def scores_with_bias(bias, n=400):
    """Labels, and logits of four rotations of a model that likes whatever stands first."""
    random, labels = np.random.default_rng(0), np.arange(n) % 4
    logits = (
        2 * np.eye(4)[labels][:, None]
        + random.normal(size=(n, 1, 4))
        + 0.1 * random.normal(size=(n, 4, 4))
    )
    for number, view in enumerate(ROTATIONS):
        logits[:, number, view.order[0]] += bias
    return labels, logits


def out_of_fold(labels, logits):
    names = tuple(view.name for view in ROTATIONS)
    return vqa.OofLogits(
        pd.DataFrame({"pixel_hash": np.arange(len(labels))}), logits, labels, labels // 2 % 2, names
    )


def test_the_answers_that_a_letter_bias_has_changed_are_in_doubt_however_sure_they_look():
    labels, logits = scores_with_bias(bias=2.5)
    one, every = vqa.combine_views(logits[:, :1]), vqa.combine_views(logits)
    preference = vqa.letter_preference(one, every)
    assert preference - preference[1:].mean() == pytest.approx([2.5, 0, 0, 0], abs=0.1)
    changed = one.argmax(1) != every.argmax(1)
    rows = vqa.rows_in_doubt(vqa.answer_margins(one, preference), np.ones(400), changed.sum())
    plain = vqa.rows_in_doubt(vqa.answer_margins(one, np.zeros(4)), np.ones(400), changed.sum())
    assert changed.sum() > 60 and changed[rows].mean() > 0.9 > 0.6 > changed[plain].mean()


def test_a_blank_choice_has_no_part_in_preference_and_margin():
    scores = np.log(
        [[0.5, 0.3, 0.2, 0.0], [0.1, 0.6, 0.3, 0.0]],
        out=np.full((2, 4), -np.inf),
        where=[1, 1, 1, 0],
    )
    assert vqa.letter_preference(scores, scores).tolist() == [0, 0, 0, 0]
    assert vqa.answer_margins(scores, np.zeros(4)) == pytest.approx(np.log([5 / 3, 2]))


def test_oof_rows_are_treated_like_test_rows_without_a_look_at_labels():
    labels, logits = scores_with_bias(bias=1.0)
    found = [
        vqa.simulate_views_in_doubt(out_of_fold(each, logits), {0: 0.25, 1: 0.1}).logits
        for each in (labels, np.roll(labels, 4))
    ]
    missing = np.isnan(found[0]).all(axis=2)
    assert (~missing[:, 1:]).all(axis=1)[labels // 2 == 0].sum() == 50
    assert (~missing[:, 1:]).all(axis=1)[labels // 2 == 1].sum() == 20
    assert not missing[:, 0].any() and np.array_equal(found[0], found[1], equal_nan=True)


def test_rows_without_further_views_have_a_part_in_what_is_fitted_and_its_cost():
    labels, logits = scores_with_bias(bias=1.5)
    oof = out_of_fold(labels, logits)
    doubt = vqa.simulate_views_in_doubt(oof, {0: 0.25, 1: 0.25})
    assert doubt.cost(range(4)) == pytest.approx(1 + 0.25 * (1 + 2 / 7)) and oof.cost(
        range(4)
    ) == pytest.approx(10 / 7)
    views, table = vqa.admit_views(doubt)
    assert views == [0, 1, 2, 3] and table.loc["rotations", "cost"] == pytest.approx(
        doubt.cost(range(4))
    )
    one, every = vqa.admit_views(oof)[1]["accuracy"]
    assert one < table.loc["rotations", "accuracy"] <= every
    calibration = vqa.calibrate(vqa.combine_views(doubt.logits), labels, doubt.folds)
    plain = vqa.calibrate(vqa.combine_views(logits), labels, doubt.folds)
    assert calibration.temperatures != plain.temperatures


@pytest.fixture
def adaptive_run(mini_run):
    run = mini_run(adaptive_tta=0.9, infer_batch_size=2, run_name="adaptive")
    vqa.run_stages(run, [0, 1], ["zeroshot", "train"], lambda *_, **__: None)
    return run


@pytest.mark.slow
def test_a_run_killed_in_its_second_pass_ends_with_the_same_bytes(adaptive_run):
    """The first pass is not done again, and submissions, report and curve come out of what there is."""
    calls = []

    def stop(label, done, *_, **__):
        calls.append(label)
        if label == "fold 0 test, in doubt" and done == 1 and calls.count(label) == 1:
            raise vqa.Interrupted

    with pytest.raises(vqa.Interrupted):
        vqa.run_stages(adaptive_run, [0, 1], ["predict"], stop)
    assert calls.count("fold 0 test") == 6
    vqa.run_stages(adaptive_run, [0, 1], ["predict"], stop)
    assert calls.count("fold 0 test") == 6 and not list(
        adaptive_run.directory.glob("fold_*/*partial*")
    )
    paths = [adaptive_run.fold_dir(fold) / "test.npz" for fold in (0, 1)]
    resumed = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    vqa.run_stages(adaptive_run, [0, 1], ["predict"], lambda *_, **__: None)
    assert resumed == [path.read_bytes() for path in paths]
    logits = vqa.read_arrays(paths[0], adaptive_run.fingerprint)["logits"]
    assert (
        ~np.isnan(logits[:, 1:]).all(axis=(1, 2))
    ).sum() == 3  # 0.9 * 3/7 of twelve questions, 9/7 each
    evaluation = vqa.evaluate_run(adaptive_run)
    assert np.isnan(evaluation.oof.logits[:, 1:]).all(axis=(1, 2)).sum() == 36 - 8
    assert "mean of up to 4 views" in evaluation.ladder.index
    for frame in vqa.write_submissions(adaptive_run, evaluation).values():
        assert set(frame["answer"]) <= set(vqa.CHOICES)
    assert "Views for rows in doubt only" in vqa.write_report(adaptive_run, evaluation).read_text(
        encoding="utf-8"
    )
    curve = pd.read_csv(adaptive_run.directory / "tables" / "adaptive_curve.csv", index_col=0)
    assert (
        curve["cost"].is_monotonic_increasing and curve.index[-1] == "all rows" and len(curve) == 12
    )
    assert np.isfinite(curve).all(axis=None) and len(vqa.plot_adaptive_curve(curve)[0].lines) == 3
    vqa.ensemble_runs([adaptive_run.directory], adaptive_run.directory / "alone")


def test_a_budget_makes_the_time_estimate_smaller(mini_run, session, replace):
    run = mini_run(adaptive_tta=0.5)
    whole = replace(run, config=replace(run.config, adaptive_tta=None))
    seconds = []
    for each in (run, whole):
        session.config = each.config
        seconds.append(vqa.inference_seconds(each, 1.0, session, training=1))
    assert seconds[1] - seconds[0] == pytest.approx(1.25 * 12 * 0.5 * 3 / 7)


def test_a_budget_needs_views_to_save_on():
    wrong = ({"use_tta": False}, {"tta_rotations": 1}, {"adaptive_tta": 1.0}, {"adaptive_tta": 0.0})
    for fields in (*wrong, {"score_precision": "16bit"}):
        with pytest.raises(ValueError, match="'adaptive_tta'"):
            vqa.Config(**{"adaptive_tta": 0.5} | fields)
    assert vqa.Config(adaptive_tta=0.5, tta_rotations=1, tta_scales=(0.9, 1.0)).adaptive_tta == 0.5


@pytest.mark.slow
def test_a_team_agrees_on_the_rows_in_doubt_even_where_one_process_gets_none(mini_run, monkeypatch):
    run = mini_run(n_folds=2, train_folds=(0,), adaptive_tta=0.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(vqa, "worker_devices", lambda config: [None, None])
    vqa.run_folds(run.config)
    logits = vqa.read_arrays(run.fold_dir(0) / "test.npz", run.fingerprint)["logits"]
    assert (
        np.isfinite(logits[:, 0]).all() and np.isfinite(logits[:, 1:]).all(axis=(1, 2)).sum() == 2
    )  # one batch
