"""Decisions on out-of-fold rows: intervals that know of images, losers left out, several runs combined or refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import vqa_helpers as vqa

sys.path.append(str(Path(__file__).parent / "benchmarks"))
import reensemble

VIEWS = ["rotation 0", "rotation 1"]


def hidden_labels(ids):
    """What the planted runs take for the answers of the test rows."""
    return ids.str.extract(r"(\d+)", expand=False).astype(int) % 4


def planted_run(run, signals=(2.0, 2.0), seed=0):
    """The run with made-up scores of two views: `signals` times the answer, plus noise."""
    random = np.random.default_rng(seed)
    for fold in run.config.folds_to_train:
        for name, frame in (("oof", run.train[run.train["fold"] == fold]), ("test", run.test)):
            labels = frame.get("label", hidden_labels(frame["id"])).to_numpy()
            signal = np.eye(4)[labels][:, None] * np.array(signals)[:, None]
            logits = signal + random.normal(size=(len(frame), 2, 4))
            vqa.write_logits(
                run.fold_dir(fold) / f"{name}.npz", frame, logits, VIEWS, run.fingerprint
            )
        vqa.atomic_write(run.fold_dir(fold) / "result.json", "{}")
    vqa.MetricLogger(run.directory / "stages.jsonl").log(label="train fold 0", seconds=60 + seed)
    logits = random.normal(size=(len(run.train), 1, 4))
    vqa.write_logits(run.directory / "zeroshot.npz", run.train, logits, VIEWS[:1], run.fingerprint)
    return run


def longer(run, replace, times=10):
    """The run with each training row `times` over under other ids, so that a difference can show."""
    frames = [run.train.assign(id=run.train["id"] + f"_{number}") for number in range(times)]
    train = pd.concat(frames, ignore_index=True).assign(pixel_hash=lambda frame: frame["id"])
    vqa.write_table(train, run.directory / "folds.csv")
    return replace(run, train=train)


@pytest.fixture
def two_runs(mini_run, replace):
    """A good run and a poor one on the same rows, with folds of their own."""
    poor = planted_run(longer(mini_run(run_name="poor"), replace), signals=(0.3, 0.3), seed=1)
    good = planted_run(
        longer(mini_run(run_name="good", seed=7), replace), signals=(1.5, 1.5), seed=2
    )
    return poor, good


# Intervals -------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_mean_when_rows_are_independent():
    changes = np.random.default_rng(0).normal(loc=0.3, size=(400, 1))
    low, high = vqa.bootstrap_interval(changes, np.arange(400))[:, 0]
    error = changes.std() / 20
    assert (low, high) == pytest.approx(
        (changes.mean() - 1.645 * error, changes.mean() + 1.645 * error), abs=0.012
    )


def test_rows_of_one_image_count_as_one_observation():
    """The same 100 values four times over hold no more evidence than once."""
    values = np.random.default_rng(0).normal(size=(100, 1))
    once = np.diff(vqa.bootstrap_interval(values, np.arange(100)), axis=0)
    repeated = np.repeat(values, 4, axis=0)
    copies = np.diff(vqa.bootstrap_interval(repeated, np.repeat(np.arange(100), 4)), axis=0)
    independent = np.diff(vqa.bootstrap_interval(repeated, np.arange(400)), axis=0)
    assert copies == pytest.approx(once, rel=0.05) and independent < 0.6 * once


def test_rows_that_one_step_has_not_scored_are_left_out_of_the_interval():
    changes = np.array([[1.0], [np.nan]] * 500)
    np.testing.assert_allclose(
        vqa.bootstrap_interval(changes, np.arange(1000)), [[1.0], [1.0]], atol=0.02
    )
    nothing = vqa.bootstrap_interval(np.full((9, 1), np.nan), np.arange(9))
    np.testing.assert_allclose(nothing, [[-(0.5**0.5)], [0.5**0.5]])


def test_no_difference_on_few_rows_is_no_certainty():
    low, high = vqa.bootstrap_interval(np.zeros((100, 1)), np.arange(100))[:, 0]
    assert -0.04 < low < -0.01 and 0.01 < high < 0.04


def test_the_more_numbers_a_step_fits_the_less_its_nll_is_known():
    """Nothing changes: what is left of the interval is the uncertainty of fitting, sqrt(p) / n."""
    one, four = np.diff(vqa.bootstrap_interval(np.zeros((100, 2)), np.arange(100), [1, 4]), axis=0)[
        0
    ]
    assert four == pytest.approx(2 * one) and one == pytest.approx(4 * 0.5**0.5 / 102)
    labels, same = np.arange(200) % 4, np.eye(4)[np.arange(200) % 4] * 0.6 + 0.1
    steps = {"old": vqa.LadderStep(same), "none": vqa.LadderStep(same, "old")}
    steps |= {
        "one": vqa.LadderStep(same, "old", fitted=1),
        "four": vqa.LadderStep(same, "old", fitted=4),
    }
    table = vqa.ladder_table(steps, labels, np.arange(200))
    assert table["nll_high"].tolist()[1:] == pytest.approx(
        [0, (0.5**0.5) * 2 / 202, (0.5**0.5) * 4 / 202]
    )
    assert table["gain_high"].nunique() == 1


def test_the_table_shows_gain_interval_and_exact_test_of_the_same_rows():
    labels = np.arange(200) % 4
    right, wrong = np.eye(4)[labels] * 0.6 + 0.1, np.eye(4)[(labels + 1) % 4] * 0.6 + 0.1
    old = np.where(np.arange(200)[:, None] < 150, right, wrong)
    new = np.where(np.arange(200)[:, None] < 170, right, wrong)
    steps = {"old": vqa.LadderStep(old), "new": vqa.LadderStep(new, "old", used=True)}
    row = vqa.ladder_table(steps, labels, np.arange(200)).loc["new"]
    assert row["gain"] == pytest.approx(0.1) and row["p_value"] == pytest.approx(2 * 0.5**20)
    assert 0.05 < row["gain_low"] < 0.1 < row["gain_high"] < 0.15
    assert row["nll_change"] == pytest.approx(0.1 * np.log(0.1 / 0.7)) and row["nll_high"] < 0
    assert row["against"] == "old" and row["used"]


# Choices ---------------------------------------------------------------------------------------------------------


def ways(gains, n=400):
    """Labels, and one way for each gain: log-odds of the answer with that much added, under the same noise."""
    random = np.random.default_rng(0)
    labels, noise = random.integers(0, 4, n), random.normal(size=(n, 4))
    return labels, {
        name: vqa.softmax(
            (1 + gain) * np.eye(4)[labels] + noise + 0.05 * random.normal(size=(n, 4))
        )
        for name, gain in gains.items()
    }


def test_a_way_that_is_clearly_better_is_chosen_and_noise_is_not():
    labels, candidates = ways(
        {"mean": 0.0, "noise": 0.0, "better": 0.5, "best": 1.0, "worse": -0.5}
    )
    groups = np.arange(len(labels))
    assert vqa.choose_blend(candidates, labels, groups) == "best"
    assert (
        vqa.choose_blend(
            {name: candidates[name] for name in ("mean", "noise", "worse")}, labels, groups
        )
        == "mean"
    )


def test_evidence_from_few_images_does_not_replace_the_mean():
    """Twenty questions on one image gain, twenty on another lose less: much for forty rows, little for two images."""
    labels, image = np.arange(400) % 4, np.r_[np.repeat([0, 1], 20), np.arange(2, 362)]
    chance = {
        "mean": np.repeat([0.4, 0.8, 0.7], (20, 20, 360)),
        "other": np.repeat([0.8, 0.5, 0.7], (20, 20, 360)),
    }
    wrong = 1 - np.eye(4)[labels]
    candidates = {
        name: np.where(wrong, (1 - p[:, None]) / 3, p[:, None]) for name, p in chance.items()
    }
    assert vqa.choose_blend(candidates, labels, np.arange(400)) == "other"
    assert vqa.choose_blend(candidates, labels, image) == "mean"


def test_a_lower_loss_does_not_buy_wrong_answers():
    labels, candidates = ways({"mean": 0.0})
    correct = candidates["mean"].argmax(1) == labels
    other = np.where(
        correct[:, None], np.eye(4)[labels] * 0.98 + 0.005, 0.2 + 0.2 * candidates["mean"]
    )
    first = np.flatnonzero(correct)[0]
    other[first] = np.roll(other[first], 1)
    candidates["other"] = other
    assert (
        vqa.negative_log_likelihood(other, labels)
        < vqa.negative_log_likelihood(candidates["mean"], labels) - 0.1
    )
    assert vqa.choose_blend(candidates, labels, np.arange(400)) == "mean"


def test_the_automatic_choice_is_scored_on_rows_that_did_not_make_it():
    """A candidate that is right on one part only is not credited with it: the other parts do not ask for it."""
    labels, candidates = ways({"mean": 0.0})
    part = np.arange(400) % vqa.CROSS_FIT_PARTS
    lucky = np.where((part == 0)[:, None], np.eye(4)[labels] * 0.96 + 0.01, candidates["mean"])
    candidates["lucky"] = lucky
    result = vqa.choose_cross_fitted(candidates, labels, np.arange(400))
    np.testing.assert_array_equal(result[part == 0], candidates["mean"][part == 0])
    np.testing.assert_array_equal(result[part != 0], lucky[part != 0])
    fitted = {"mean": 0, "lucky": 1}
    nothing = 0.95 * vqa.bootstrap_interval(
        np.zeros((400, 2)), np.arange(400)
    )  # chosen in all parts but its own
    np.testing.assert_allclose(
        vqa.choice_interval(candidates, labels, np.arange(400), fitted), nothing
    )


def test_the_choice_follows_the_rule_as_it_is_written_down():
    """On 500 sets of candidates near the border, with few images, of one to three rows."""
    chosen, random = [], np.random.default_rng(0)
    image = np.repeat(np.arange(12), random.integers(1, 4, 12))
    for _ in range(500):
        gains = dict(zip(["other", "third"], random.normal(0.02, 0.05, 2), strict=True))
        labels, candidates = ways({"mean": 0.0} | gains, len(image))
        expected, best = "mean", 0.0
        for name, probabilities in candidates.items():
            gain = vqa.row_scores(candidates["mean"], labels) - vqa.row_scores(
                probabilities, labels
            )
            spread = pd.Series(gain[:, 1] - gain[:, 1].mean()).groupby(image).sum()
            error = np.sqrt((spread**2).sum()) / len(gain)
            if gain[:, 1].mean() > max(best, error) and gain[:, 0].mean() <= 0:
                expected, best = name, gain[:, 1].mean()
        assert vqa.choose_blend(candidates, labels, image) == expected
        chosen.append(expected)
    assert len(set(chosen)) == 3


def test_a_choice_that_every_resample_makes_has_the_interval_of_what_it_chooses():
    labels, candidates = ways({"mean": 0.0, "best": 1.0, "worse": -0.5})
    image = np.repeat(np.arange(200), 2)
    change = vqa.row_scores(candidates["best"], labels) - vqa.row_scores(candidates["mean"], labels)
    interval = vqa.choice_interval(candidates, labels, image, {"mean": 0, "best": 7, "worse": 0})
    np.testing.assert_allclose(interval, vqa.bootstrap_interval(change, image, [1, 7]))


def test_a_choice_that_no_resample_makes_gains_nothing_for_certain():
    labels, candidates = ways({"mean": 0.0, "worse": -0.5})
    interval = vqa.choice_interval(candidates, labels, np.arange(400), {"mean": 0, "worse": 7})
    np.testing.assert_array_equal(interval, np.zeros((2, 2)))


def test_a_choice_that_chance_decides_has_an_interval_from_none_of_the_gain_to_all_of_it():
    """Thirty images gain, the others lose less: nearly one standard error together, so that resamples differ."""
    labels, image = np.arange(400) % 4, np.arange(400)
    chance = np.where(image < 30, 0.9, 0.688)
    wrong = 1 - np.eye(4)[labels]
    mean = np.where(wrong, 0.1, 0.7)
    candidates = {
        "mean": mean,
        "other": np.where(wrong, (1 - chance[:, None]) / 3, chance[:, None]),
    }
    change = vqa.row_scores(candidates["other"], labels) - vqa.row_scores(mean, labels)
    low, high = vqa.choice_interval(candidates, labels, image, {"mean": 0, "other": 0})[:, 1]
    assert vqa.choose_blend(candidates, labels, image) == "mean"
    assert low < change[:, 1].mean() < 0 < high


def test_views_are_weighted_where_the_evidence_asks_for_it(mini_run, replace, monkeypatch):
    """The second view knows half as much: its weight falls, and the ladder's row is about what is submitted."""
    run = planted_run(
        longer(mini_run(ensemble_method="auto"), replace, times=30), signals=(2.0, 1.0)
    )
    oof = vqa.read_oof(run)
    evaluation = vqa.evaluate_run(run)
    assert evaluation.method in ("weighted", "stacked")
    step = vqa.VIEW_BLEND_STEPS[evaluation.method]
    assert evaluation.ladder.index[evaluation.ladder["used"]].tolist() == [
        vqa.STEP_ONE_VIEW,
        step,
        vqa.STEP_AUTOMATIC,
    ]
    assert evaluation.ladder.loc[vqa.STEP_AUTOMATIC, "nll"] == pytest.approx(
        vqa.negative_log_likelihood(evaluation.probabilities, oof.labels)
    )
    test = vqa.read_arrays(run.fold_dir(1) / "test.npz", run.fingerprint)["logits"]
    views, test_views = (vqa.softmax(logits).swapaxes(0, 1) for logits in (oof.logits, test))
    expected = vqa.fit_and_blend(evaluation.method, views, oof.labels, test_views)
    np.testing.assert_allclose(vqa.predict_test(run, evaluation)[1], expected)
    mean = vqa.evaluate_run(replace(run, config=replace(run.config, ensemble_method="mean")))
    assert mean.method == "mean" and not mean.ladder.loc[step, "used"]
    monkeypatch.setattr(vqa, "count_fitted_parameters", lambda *_: 1e6)
    assert (
        vqa.evaluate_run(run).ladder.loc[step, "nll_high"] > 1
    )  # nobody knows what so many numbers are worth


def test_a_temperature_that_loses_is_left_out(mini_run, replace, monkeypatch):
    run = planted_run(longer(mini_run(), replace), signals=(3.0, 3.0))
    evaluation = vqa.evaluate_run(run)
    assert (
        evaluation.ladder.loc["temperature", "used"]
        and evaluation.calibration.temperatures[0] < 0.7
    )
    before = vqa.softmax(vqa.combine_views(evaluation.oof.logits[:, evaluation.views]))
    scores = (
        vqa.row_scores(each, evaluation.oof.labels)
        for each in (evaluation.calibration.probabilities, before)
    )
    ends = vqa.bootstrap_interval(np.subtract(*scores), evaluation.oof.groups)[
        :, 1
    ]  # one number is fitted
    assert evaluation.ladder.loc["temperature", ["nll_low", "nll_high"]].tolist() == ends.tolist()
    monkeypatch.setattr(vqa, "fold_temperatures", lambda *rows: {0: 20.0, 1: 20.0})
    evaluation = vqa.evaluate_run(run)
    assert not evaluation.ladder.loc[
        "temperature", "used"
    ] and evaluation.calibration.temperatures == {0: 1, 1: 1}


def test_the_score_to_expect_of_the_automatic_choice_is_that_of_choices_made_without_the_row(
    mini_run, replace
):
    """The second view is a little worse, so that chance decides how to combine them, and parts of the rows differ."""
    run = planted_run(
        longer(mini_run(ensemble_method="auto"), replace, times=6), signals=(2.0, 1.0), seed=8
    )
    evaluation = vqa.evaluate_run(run)
    oof, members = evaluation.oof, vqa._view_members(evaluation.oof.logits, evaluation.views)
    ways = vqa.cross_fitted_blends(members, oof.labels, oof.groups, vqa.VIEW_BLEND_STEPS)
    ways = {"mean": evaluation.calibration.probabilities} | ways
    fitted = {name: vqa.count_fitted_parameters(name, members, oof.labels) for name in ways}
    expected = vqa.choose_cross_fitted(ways, oof.labels, oof.groups)
    np.testing.assert_array_equal(evaluation.probabilities, expected)
    assert not np.array_equal(expected, ways[evaluation.method])
    step, ends = (
        evaluation.ladder.loc[vqa.STEP_AUTOMATIC],
        vqa.choice_interval(ways, oof.labels, oof.groups, fitted),
    )
    assert (
        step[["gain_low", "gain_high", "nll_low", "nll_high"]].tolist() == ends.T.ravel().tolist()
    )
    assert (
        step["nll"] == pytest.approx(vqa.negative_log_likelihood(expected, oof.labels))
        and step["used"]
    )


def test_without_temperature_scaling_no_way_to_combine_views_is_scaled(mini_run, replace):
    """Otherwise a blend would win over the plain mean by its confidence alone."""
    settings = {"ensemble_method": "auto", "use_temperature_scaling": False}
    run = planted_run(longer(mini_run(**settings), replace), signals=(3.0, 3.0))
    evaluation = vqa.evaluate_run(run)
    assert "temperature" not in evaluation.ladder.index
    oof, members = evaluation.oof, vqa._view_members(evaluation.oof.logits, evaluation.views)
    plain, scaled = (
        vqa.cross_fitted_blends(members, oof.labels, oof.groups, ["weighted"], scaling)["weighted"]
        for scaling in (False, True)
    )
    losses = [
        vqa.negative_log_likelihood(probabilities, oof.labels) for probabilities in (plain, scaled)
    ]
    assert (
        evaluation.ladder.loc["weighted views", "nll"] == pytest.approx(losses[0])
        and losses[1] < losses[0] - 0.02
    )
    assert set(evaluation.calibration.temperatures.values()) == {1}
    weighted = vqa.evaluate_run(
        replace(run, config=replace(run.config, ensemble_method="weighted"))
    )
    test = vqa.softmax(vqa.read_scores(run, 0, "test")["logits"]).swapaxes(0, 1)
    expected = vqa.average_probabilities(test, vqa.optimize_ensemble_weights(members, oof.labels))
    np.testing.assert_allclose(vqa.predict_test(run, weighted)[0], expected)


def test_a_vote_of_views_is_shown_but_never_chosen(mini_run):
    """It has no probabilities: where all answers are right, its NLL of 0 would beat every honest way."""
    settings = {"ensemble_method": "auto", "use_temperature_scaling": False}
    evaluation = vqa.evaluate_run(planted_run(mini_run(**settings), signals=(6.0, 6.0)))
    ladder = evaluation.ladder
    assert ladder.loc["vote of views", "accuracy"] == 1 and evaluation.probabilities.max() < 1
    assert ladder.loc[vqa.STEP_AUTOMATIC, "nll"] > 0


def test_a_set_of_views_that_loses_is_not_marked_although_a_wider_one_wins(mini_run):
    run, names = (
        planted_run(mini_run(ensemble_method="mean")),
        ["rotation 0", "rotation 2", "scale 1.5"],
    )
    random = np.random.default_rng(0)
    for fold in (0, 1):
        rows = run.train[run.train["fold"] == fold]
        logits = np.eye(4)[rows["label"]][:, None] * np.array([1.0, -0.5, 9.0])[:, None]
        logits = logits + 0.1 * random.normal(size=logits.shape)
        vqa.write_logits(run.fold_dir(fold) / "oof.npz", rows, logits, names, run.fingerprint)
    evaluation = vqa.evaluate_run(run)
    assert evaluation.views == [0, 1, 2] and evaluation.view_table["admitted"].tolist() == [
        True,
        False,
        True,
    ]
    assert (
        not evaluation.ladder["used"]["mean of 2 views"]
        and evaluation.ladder["used"]["mean of 3 views"]
    )
    assert evaluation.ladder.loc["mean of 3 views", "against"] == vqa.STEP_ONE_VIEW


def test_wider_views_that_lose_accuracy_are_not_admitted_although_they_lower_the_nll():
    """A first view that is right but far too sure; the mean with the second is timid, and more often wrong."""
    random = np.random.default_rng(0)
    labels = np.arange(400) % 4
    sure = 12 * np.eye(4)[np.where(random.random(400) < 0.8, labels, (labels + 1) % 4)]
    other = 14 * np.eye(4)[np.where(random.random(400) < 0.65, labels, (labels + 2) % 4)]
    frame = pd.DataFrame({"pixel_hash": np.arange(400).astype(str)})
    oof = vqa.OofLogits(
        frame, np.stack([sure, other], axis=1), labels, labels * 0, ("rotation 0", "rotation 1")
    )
    views, table = vqa.admit_views(oof, use_temperature_scaling=False)
    assert (
        table["nll"].is_monotonic_decreasing
        and table["accuracy"].iloc[1] < table["accuracy"].iloc[0] - 0.05
    )
    assert views == [0] and table["admitted"].tolist() == [True, False]


def test_a_scale_that_no_row_has_does_not_cost_the_others():
    random = np.random.default_rng(0)
    labels = np.arange(200) % 4
    logits = np.stack([np.eye(4)[labels] + random.normal(size=(200, 4)) for _ in range(3)], axis=1)
    logits[:, 1] = np.nan
    frame = pd.DataFrame({"pixel_hash": np.arange(200).astype(str)})
    oof = vqa.OofLogits(frame, logits, labels, labels * 0, ("rotation 0", "scale 0.9", "scale 1.1"))
    assert vqa.views_by_set(oof) == {"single view": [0], "rotations and scales": [0, 2]}
    views, table = vqa.admit_views(oof)
    assert views == [0, 2] and table["admitted"].all()


def test_weights_that_were_not_selected_have_a_step_of_their_own(mini_run):
    run = planted_run(mini_run(mix_weights=True), signals=(0.5, 0.5))
    vqa.atomic_write(run.directory / "selection.json", '{"weights": "raw"}')
    for fold in (0, 1):
        rows = run.train[run.train["fold"] == fold][::-1]
        for kind, signal in (("raw", 0), ("ema", 9)):
            logits = signal * np.eye(4)[rows["label"]][:, None]
            path = run.fold_dir(fold) / f"validation_{kind}.npz"
            vqa.write_logits(path, rows, logits, VIEWS[:1], run.fingerprint)
    ladder = vqa.evaluate_run(run).ladder
    steps = ["zero-shot", vqa.STEP_ONE_VIEW, "with EMA weights", "with all kinds of weights"]
    assert ladder.index[:4].tolist() == steps and ladder["cost"].iloc[:4].tolist() == [1, 1, 1, 2]
    assert (
        ladder.loc["with EMA weights", "accuracy"] == 1
        and not ladder.loc["with EMA weights", "used"]
    )
    assert ladder.loc["with EMA weights", "against"] == vqa.STEP_ONE_VIEW


def test_a_masked_choice_gets_no_share_from_the_temperature_of_a_blend():
    members = np.array([[[0.5, 0.5, 0, 0]] * 40, [[0.4, 0.6, 0, 0]] * 40])
    mixed = vqa.fit_and_blend("mean", members, np.arange(40) % 2, members)
    assert (mixed[:, 2:] == 0).all() and np.allclose(mixed.sum(axis=1), 1)


def test_an_unfinished_run_says_what_is_missing_and_what_to_do(mini_run):
    with pytest.raises(FileNotFoundError, match="no fold is trained; run its notebook"):
        vqa.read_oof(mini_run())
    run = planted_run(mini_run())
    (run.fold_dir(1) / "test.npz").unlink()
    with pytest.raises(
        FileNotFoundError, match=f"{run.directory.name}: fold 1 is trained, but not scored"
    ):
        vqa.read_oof(run)


def test_greedy_selection_finds_the_planted_mixture():
    """Labels drawn from 0.7 of one member and 0.3 of another."""
    random = np.random.default_rng(0)
    members = random.dirichlet(np.ones(4), size=(3, 20_000))
    mixture = 0.7 * members[0] + 0.3 * members[2]
    labels = (random.random((20_000, 1)) > mixture.cumsum(axis=1)[:, :-1]).sum(axis=1)
    weights = vqa.greedy_weights(members, labels)
    np.testing.assert_allclose(weights, [0.7, 0, 0.3], atol=0.051)
    assert (weights * vqa.GREEDY_ROUNDS % 1 == 0).all()


def test_the_geometric_mean_is_that_of_probabilities():
    members = np.array([[[0.8, 0.1, 0.1, 0.0]], [[0.1, 0.4, 0.5, 0.0]]])
    mixed = vqa.BLENDS["geometric mean"](None, None, members)
    expected = np.sqrt([0.08, 0.04, 0.05, 0.0])
    np.testing.assert_allclose(mixed, [expected / expected.sum()], atol=1e-9)


def test_a_blend_gets_its_temperature_from_the_rows_it_was_fitted_on():
    """A mean of honest, independent members is too timid; scaled, its probabilities are honest again."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 8000)
    members = np.stack(
        [
            vqa.softmax(2 * np.eye(4)[labels] + random.normal(scale=2**0.5, size=(8000, 4)))
            for _ in "123"
        ]
    )
    old, new = members[:, :4000], members[:, 4000:]
    scaled = vqa.fit_and_blend("mean", old, labels[:4000], new)
    plain = new.mean(axis=0)
    assert (scaled.argmax(1) == plain.argmax(1)).all()
    loss, scaled_loss = (
        vqa.negative_log_likelihood(each, labels[4000:]) for each in (plain, scaled)
    )
    assert scaled_loss < loss - 0.02
    temperature = vqa.TemperatureScaler().fit(np.log(old.mean(axis=0)), labels[:4000])
    np.testing.assert_allclose(scaled, temperature.transform(np.log(plain)))


# Several runs ----------------------------------------------------------------------------------------------------


def test_runs_are_compared_side_by_side_and_the_better_answers_are_submitted(
    two_runs, tmp_path, monkeypatch
):
    poor, good = two_runs
    table, answers = vqa.ensemble_runs([poor.directory, good.directory], tmp_path / "both")
    alone = [str(poor.directory), str(good.directory)]
    assert table.index.tolist() == [*alone, *vqa.BLENDS, "automatic choice"]
    assert table.loc["mean", "against"] == alone[1] and set(table["against"].drop("mean")) == {
        "mean"
    }
    assert table["seconds"].tolist() == [61, 62] + [123] * 7
    chosen = table.index[table["used"]]
    assert len(chosen) == 2 and chosen[-1] == "automatic choice" and chosen[0] != "mean"
    assert (table["gain_low"] <= table["gain"]).all() and (
        table["gain"] <= table["gain_high"]
    ).all()
    assert table.loc["automatic choice", "accuracy"] > table.loc["mean", "accuracy"]
    assert (
        answers["id"].tolist() == good.sample["id"].tolist()
        and answers["answer"].isin([*vqa.CHOICES]).all()
    )
    assert vqa.validate_submission(tmp_path / "both" / "submission.csv", good.sample)["rows"] == 12
    monkeypatch.setattr(
        vqa, "count_fitted_parameters", lambda name, *_: 1e6 if name == "stacked" else 0.0
    )
    table, _ = vqa.ensemble_runs([poor.directory, good.directory], tmp_path / "both")
    assert table.loc["stacked", "nll_high"] > 1 > table.loc["weighted", "nll_high"]


def test_rows_are_matched_by_id_although_the_runs_have_other_folds(two_runs, tmp_path):
    """A run's own row of the table is its own score, whatever the order in which its folds were scored."""
    poor, good = two_runs
    assert not np.array_equal(poor.train["fold"], good.train["fold"])
    table, _ = vqa.ensemble_runs([poor.directory, good.directory], tmp_path)
    for run in two_runs:
        evaluation = vqa.evaluate_run(run)
        own = vqa.accuracy(evaluation.probabilities, evaluation.oof.labels)
        assert table.loc[str(run.directory), "accuracy"] == pytest.approx(own)


def test_test_rows_are_matched_by_id_too(two_runs, replace, tmp_path):
    poor, good = two_runs
    backwards = replace(good, test=good.test[::-1].reset_index(drop=True))
    vqa.write_table(backwards.test, good.directory / "test_rows.csv")
    planted_run(backwards, signals=(9.0, 9.0))
    _, answers = vqa.ensemble_runs([poor.directory, good.directory], tmp_path)
    assert (
        answers["answer"].map(vqa.CHOICES.index).tolist() == hidden_labels(answers["id"]).tolist()
    )


@pytest.mark.slow
def test_combining_three_runs_again_writes_the_same_bytes(two_runs, mini_run, replace, tmp_path):
    third = planted_run(longer(mini_run(run_name="third", seed=8), replace), seed=3)
    table = reensemble.repeated([run.directory for run in (*two_runs, third)], tmp_path)
    assert len(table) == 2 and (table[["submission.csv", "ladder.csv"]].nunique() == 1).all()
    ladder = pd.read_csv(tmp_path / "repetition_1" / "ladder.csv")
    assert (
        ladder["step"].str.startswith(str(third.directory)).sum() == 1
        and len(ladder) == 3 + len(vqa.BLENDS) + 1
    )


@pytest.mark.parametrize(
    ("table", "column", "message"),
    [
        ("test_rows", "id", r"other: 2 test rows differ from those of .*good, such as \['test_"),
        ("test_rows", "question", r"other: 1 test rows differ"),
        ("folds", "a", r"other: 1 train rows differ"),
        ("folds", "id", r"other: 2 train rows differ"),
    ],
)
def test_runs_on_other_rows_are_refused_by_name(mini_run, tmp_path, table, column, message):
    good, other = (planted_run(mini_run(run_name=name)) for name in ("good", "other"))
    path = other.directory / f"{table}.csv"
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    frame.loc[0, column] += "_changed"
    vqa.write_table(frame, path)
    with pytest.raises(ValueError, match=message):
        vqa.ensemble_runs([good.directory, other.directory], tmp_path / "ensemble")
    assert not (tmp_path / "ensemble").exists()


def test_one_run_given_twice_is_refused(mini_run, tmp_path):
    run = planted_run(mini_run())
    shutil.copytree(run.directory, tmp_path / "copy")
    with pytest.raises(ValueError, match="copy are the same run, which would count twice"):
        vqa.ensemble_runs([run.directory, tmp_path / "copy"], tmp_path / "ensemble")
    with pytest.raises(ValueError, match=f"{run.directory.name} are the same run"):
        vqa.ensemble_runs([run.directory, str(run.directory)], tmp_path / "ensemble")


def test_on_kaggle_the_combined_answers_are_offered_for_submission(two_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    vqa.ensemble_runs([run.directory for run in two_runs], tmp_path / "both")
    assert (tmp_path / "submission.csv").read_bytes() == (
        tmp_path / "both" / "submission.csv"
    ).read_bytes()


def test_a_run_in_a_folder_called_vote_keeps_its_scores(two_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(two_runs[0].directory.parent)
    Path("good").rename("voter")
    table, _ = vqa.ensemble_runs(["poor", "voter"], tmp_path / "both")
    assert np.isfinite(table.loc["voter", ["nll", "brier"]].astype(float)).all() and np.isnan(
        table.loc["vote", "nll"]
    )


def test_runs_of_which_each_trained_another_fold_share_no_row(mini_run, tmp_path):
    runs = [
        planted_run(mini_run(run_name=name, train_folds=folds))
        for name, folds in (("x", (0,)), ("y", (1,)))
    ]
    with pytest.raises(ValueError, match="no training row is out of fold in all of them"):
        vqa.ensemble_runs([run.directory for run in runs], tmp_path)


def test_combining_runs_loads_no_torch(two_runs, tmp_path):
    folders = [str(run.directory) for run in two_runs]
    code = (
        f"import sys, vqa_helpers as vqa; vqa.ensemble_runs({folders}, {str(tmp_path / 'e')!r}); "
    )
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=vqa.HERE)


def test_blends_of_rows_that_all_show_one_image_are_cross_fitted_by_row():
    """As in the control with grey images, which are all copies of one another."""
    random = np.random.default_rng(0)
    labels, groups = (
        np.arange(40) % 4,
        vqa.image_groups(pd.DataFrame({"pixel_hash": ["grey"] * 40})),
    )
    assert groups.tolist() == list(range(40))
    members = vqa.softmax(2 * np.eye(4)[labels] + random.normal(size=(2, 40, 4)))
    candidates = vqa.cross_fitted_blends(members, labels, groups)
    assert all(np.isfinite(probabilities).all() for probabilities in candidates.values())
    assert np.isfinite(vqa.choose_cross_fitted(candidates, labels, groups)).all()
    assert np.isfinite(
        vqa.choice_interval(candidates, labels, groups, dict.fromkeys(candidates, 1))
    ).all()
