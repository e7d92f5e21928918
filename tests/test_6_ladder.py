"""Part 6, Ladder, Evaluation and Test answers: the submission is what the ladder judged."""

import numpy as np
import pytest
from planted import VIEWS, longer, one_hot, planted_run, planted_two_views, rows_of_fold
from running import read_logits, selected_weights
from scipy.special import log_softmax

import vqa_helpers as vqa

# --- The ladder -----------------------------------------------------------------------------------


def test_the_ladder_compares_ways_to_combine_views(finished, monkeypatch):
    oof = vqa.read_oof(finished)
    _, table = vqa.admit_views(oof)
    assert table["cost"].iloc[0] == 1
    assert table["cost"].is_monotonic_increasing

    admitted = [0, 1, 2, 3]
    everything = table.assign(admitted=True)
    monkeypatch.setattr(vqa, "admit_views", lambda *_: (admitted, everything))
    ladder = vqa.evaluate_run(finished).ladder
    raw_is_selected = selected_weights(finished) == "raw"
    other_weights = "with EMA weights" if raw_is_selected else "with raw weights"
    one_view = vqa.scoring_cost(1, 1)
    four_views = vqa.scoring_cost(1, 4)
    costs = {
        "zero-shot": one_view,
        "fine-tuned, one view": one_view,
        other_weights: one_view,
        "mean of 4 views": four_views,
        "mean of 5 views": oof.cost(range(5)),
        "temperature": four_views,
        "vote of views": four_views,
        "weighted views": four_views,
        "stacked views": four_views,
        vqa.STEP_AUTOMATIC: four_views,
    }
    assert one_view == 1
    assert ladder.index.tolist() == list(costs)
    assert ladder["cost"].tolist() == list(costs.values())
    assert ladder.loc["mean of 5 views", "against"] == "mean of 4 views"
    assert ladder.loc["temperature", "against"] == "mean of 4 views"
    assert not ladder["used"]["mean of 5 views"]

    two_folds = 2 * finished.seconds_per_question() * len(finished.test)
    zeroshot, *others = [round(cost * two_folds, 1) for cost in ladder["cost"]]
    assert ladder["seconds"].tolist() == [zeroshot / 2, *others]  # zero-shot is one model
    assert two_folds > 0


def test_a_zero_shot_sample_without_a_row_of_the_trained_folds_is_no_obstacle(mini_run):
    run = mini_run(train_folds=(0,))
    evaluation = vqa.evaluate_run(planted_two_views(run, rows_of_fold(run, 1)))
    step = evaluation.ladder.loc["fine-tuned, one view"]
    assert step["against"] == "zero-shot"
    assert np.isnan([step["gain"], step["gain_low"], step["p_value"]]).all()


def test_a_letter_that_a_fit_would_not_see_leaves_stacking_out(mini_run, replace):
    run = mini_run()
    number = np.arange(36)

    def steps(labels):
        with_labels = replace(run, train=run.train.assign(label=labels))
        scored = planted_two_views(with_labels, with_labels.train)
        return set(vqa.evaluate_run(scored).ladder.index)

    assert {"weighted views", "stacked views"} <= steps(number % 4)
    in_one_part_only = np.where(number % vqa.CROSS_FIT_PARTS == 5, 3, number % 3)
    of_rare_letter = steps(in_one_part_only)
    assert "weighted views" in of_rare_letter
    assert "stacked views" not in of_rare_letter


def test_a_set_of_views_that_loses_is_not_marked_although_a_wider_one_wins(mini_run):
    run = planted_run(mini_run(ensemble_method="mean"))
    names = ["rotation 0", "rotation 2", "scale 1.5"]
    random = np.random.default_rng(0)
    strengths = np.array([1.0, -0.5, 9.0])[:, None]
    for fold in (0, 1):
        rows = rows_of_fold(run, fold)
        signal = one_hot(rows["label"])[:, None] * strengths
        logits = signal + 0.1 * random.normal(size=signal.shape)
        vqa.write_logits(run.fold_dir(fold) / "oof.npz", rows, logits, names, run.fingerprint)
    evaluation = vqa.evaluate_run(run)
    assert evaluation.views == [0, 1, 2]
    assert evaluation.view_table["admitted"].tolist() == [True, False, True]
    assert not evaluation.ladder["used"]["mean of 2 views"]
    assert evaluation.ladder["used"]["mean of 3 views"]
    assert evaluation.ladder.loc["mean of 3 views", "against"] == vqa.STEP_ONE_VIEW


def test_weights_that_were_not_selected_have_a_step_of_their_own(mini_run):
    run = planted_run(mini_run(mix_weights=True), signals=(0.5, 0.5))
    vqa.atomic_write(run.directory / "selection.json", '{"weights": "raw"}')
    for fold in (0, 1):
        rows = rows_of_fold(run, fold)[::-1]
        for kind, strength in (("raw", 0), ("ema", 9)):
            logits = strength * one_hot(rows["label"])[:, None]
            path = run.fold_dir(fold) / f"validation_{kind}.npz"
            vqa.write_logits(path, rows, logits, VIEWS[:1], run.fingerprint)
    ladder = vqa.evaluate_run(run).ladder
    steps = ["zero-shot", vqa.STEP_ONE_VIEW, "with EMA weights", "with all kinds of weights"]
    assert ladder.index[:4].tolist() == steps
    assert ladder["cost"].iloc[:4].tolist() == [1, 1, 1, 2]
    assert ladder.loc["with EMA weights", "accuracy"] == 1
    assert not ladder.loc["with EMA weights", "used"]
    assert ladder.loc["with EMA weights", "against"] == vqa.STEP_ONE_VIEW


def test_a_vote_of_views_is_shown_but_never_chosen(mini_run):
    """It has no probabilities: where all answers are right, its NLL of 0 would beat all others."""
    settings = {"ensemble_method": "auto", "use_temperature_scaling": False}
    evaluation = vqa.evaluate_run(planted_run(mini_run(**settings), signals=(6.0, 6.0)))
    ladder = evaluation.ladder
    assert ladder.loc["vote of views", "accuracy"] == 1
    assert evaluation.probabilities.max() < 1
    assert ladder.loc[vqa.STEP_AUTOMATIC, "nll"] > 0


# --- Decisions ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_views_are_weighted_where_the_evidence_asks_for_it(mini_run, replace, monkeypatch):
    """The second view knows half as much: its weight falls, as the ladder's row says."""
    run = longer(mini_run(ensemble_method="auto"), replace, times=30)
    planted_run(run, signals=(2.0, 1.0))
    oof = vqa.read_oof(run)
    evaluation = vqa.evaluate_run(run)
    ladder = evaluation.ladder
    assert evaluation.method in ("weighted", "stacked")
    step = vqa.VIEW_BLEND_STEPS[evaluation.method]
    used = ladder.index[ladder["used"]].tolist()
    assert used == [vqa.STEP_ONE_VIEW, step, vqa.STEP_AUTOMATIC]
    nll = vqa.negative_log_likelihood(evaluation.probabilities, oof.labels)
    assert ladder.loc[vqa.STEP_AUTOMATIC, "nll"] == pytest.approx(nll)

    views = vqa.softmax(oof.logits).swapaxes(0, 1)
    test_views = vqa.softmax(read_logits(run, 1, "test")).swapaxes(0, 1)
    expected = vqa.fit_and_blend(evaluation.method, views, oof.labels, test_views)
    np.testing.assert_allclose(vqa.predict_test(run, evaluation)[1], expected)
    mean_run = replace(run, config=replace(run.config, ensemble_method="mean"))
    mean = vqa.evaluate_run(mean_run)
    assert mean.method == "mean"
    assert not mean.ladder.loc[step, "used"]
    monkeypatch.setattr(vqa, "count_fitted_parameters", lambda *_: 1e6)
    # Nobody knows what so many numbers are worth.
    assert vqa.evaluate_run(run).ladder.loc[step, "nll_high"] > 1


def test_a_temperature_that_loses_is_left_out(mini_run, replace, monkeypatch):
    run = planted_run(longer(mini_run(), replace), signals=(3.0, 3.0))
    evaluation = vqa.evaluate_run(run)
    assert evaluation.ladder.loc["temperature", "used"]
    assert evaluation.calibration.temperatures[0] < 0.7
    oof = evaluation.oof
    unscaled = vqa.softmax(vqa.combine_views(oof.logits[:, evaluation.views]))
    before = vqa.row_scores(unscaled, oof.labels)
    after = vqa.row_scores(evaluation.calibration.probabilities, oof.labels)
    ends = vqa.bootstrap_interval(after - before, oof.groups)[:, 1]  # one number is fitted
    step = evaluation.ladder.loc["temperature"]
    assert step[["nll_low", "nll_high"]].tolist() == ends.tolist()

    monkeypatch.setattr(vqa, "fold_temperatures", lambda *rows: {0: 20.0, 1: 20.0})
    evaluation = vqa.evaluate_run(run)
    assert not evaluation.ladder.loc["temperature", "used"]
    assert evaluation.calibration.temperatures == {0: 1, 1: 1}


def test_the_score_to_expect_of_the_automatic_choice_is_that_of_choices_made_without_the_row(
    mini_run, replace
):
    """The second view is a little worse.

    Chance decides how to combine them, and parts of the rows differ in what they choose.
    """
    run = longer(mini_run(ensemble_method="auto"), replace, times=6)
    planted_run(run, signals=(2.0, 1.0), seed=8)
    evaluation = vqa.evaluate_run(run)
    oof = evaluation.oof
    members = vqa._view_members(evaluation.oof.logits, evaluation.views)
    blends = vqa.cross_fitted_blends(members, oof.labels, oof.groups, vqa.VIEW_BLEND_STEPS)
    mean = vqa.Candidate(evaluation.calibration.probabilities)
    candidates = {"mean": mean, **blends}
    expected = vqa.choose_cross_fitted(candidates, oof.labels, oof.groups)
    np.testing.assert_array_equal(evaluation.probabilities, expected)
    assert not np.array_equal(expected, candidates[evaluation.method].probabilities)
    step = evaluation.ladder.loc[vqa.STEP_AUTOMATIC]
    low, high = vqa.choice_interval(candidates, oof.labels, oof.groups)
    assert step[["gain_low", "nll_low"]].tolist() == low.tolist()
    assert step[["gain_high", "nll_high"]].tolist() == high.tolist()
    assert step["nll"] == pytest.approx(vqa.negative_log_likelihood(expected, oof.labels))
    assert step["used"]


def test_without_temperature_scaling_no_way_to_combine_views_is_scaled(mini_run, replace):
    """Otherwise a blend would win over the plain mean by its confidence alone."""
    settings = {"ensemble_method": "auto", "use_temperature_scaling": False}
    run = planted_run(longer(mini_run(**settings), replace), signals=(3.0, 3.0))
    evaluation = vqa.evaluate_run(run)
    assert "temperature" not in evaluation.ladder.index
    oof = evaluation.oof
    members = vqa._view_members(evaluation.oof.logits, evaluation.views)

    def nll_of_weighted_views(scaling):
        blends = vqa.cross_fitted_blends(members, oof.labels, oof.groups, ["weighted"], scaling)
        return vqa.negative_log_likelihood(blends["weighted"].probabilities, oof.labels)

    unscaled = nll_of_weighted_views(scaling=False)
    assert evaluation.ladder.loc["weighted views", "nll"] == pytest.approx(unscaled)
    assert nll_of_weighted_views(scaling=True) < unscaled - 0.02
    assert set(evaluation.calibration.temperatures.values()) == {1}

    weighted_run = replace(run, config=replace(run.config, ensemble_method="weighted"))
    weighted = vqa.evaluate_run(weighted_run)
    test = vqa.softmax(vqa.read_scores(run, 0, "test")["logits"]).swapaxes(0, 1)
    weights = vqa.optimize_ensemble_weights(members, oof.labels)
    expected = vqa.average_probabilities(test, weights)
    np.testing.assert_allclose(vqa.predict_test(run, weighted)[0], expected)


# --- Test answers ---------------------------------------------------------------------------------


def test_ensemble_is_the_mean_of_the_folds_after_view_mean_and_temperature(finished):
    """DESIGN: log-softmax of each view, mean of views, over T, softmax, mean of folds."""
    evaluation = vqa.evaluate_run(finished)

    def probabilities(fold):
        logits = read_logits(finished, fold, "test").astype(float)
        views = [log_softmax(logits[:, view], axis=1) for view in evaluation.views]
        scores = np.nanmean(views, axis=0) / evaluation.calibration.temperatures[fold]
        return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)

    mean = (probabilities(0) + probabilities(1)) / 2
    answers = vqa.write_submissions(finished, evaluation)["ensemble"]["answer"]
    assert answers.tolist() == [vqa.CHOICES[label] for label in mean.argmax(axis=1)]
