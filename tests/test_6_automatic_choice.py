"""Part 6, Automatic choice: another way than the mean only where it clearly wins."""

import numpy as np
import pandas as pd
from planted import one_hot

import vqa_helpers as vqa


def planted_candidates(gains, n=400, **fitted_parameters):
    """Labels, and for each gain a candidate whose answers have that much higher log-odds.

    All have the same noise, and a little of their own. They fit no number unless it is given.
    """
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, n)
    noise = random.normal(size=(n, 4))
    candidates = {}
    for name, gain in gains.items():
        signal = (1 + gain) * one_hot(labels)
        probabilities = vqa.softmax(signal + noise + 0.05 * random.normal(size=(n, 4)))
        candidates[name] = vqa.Candidate(probabilities, fitted_parameters.get(name, 0.0))
    return labels, candidates


def with_chance(labels, chance):
    """A candidate that gives the label this chance, and shares the rest out evenly."""
    is_label = one_hot(labels) == 1
    return vqa.Candidate(np.where(is_label, chance[:, None], (1 - chance[:, None]) / 3))


def change_from_mean(candidates, name, labels):
    """What accuracy and NLL of each row change by from the mean to this way."""
    mean = vqa.row_scores(candidates["mean"].probabilities, labels)
    return vqa.row_scores(candidates[name].probabilities, labels) - mean


def test_a_way_that_is_clearly_better_is_chosen_and_noise_is_not():
    gains = {"mean": 0.0, "noise": 0.0, "better": 0.5, "best": 1.0, "worse": -0.5}
    labels, candidates = planted_candidates(gains)
    groups = np.arange(len(labels))
    assert vqa.choose_blend(candidates, labels, groups) == "best"
    no_better = {name: candidates[name] for name in ("mean", "noise", "worse")}
    assert vqa.choose_blend(no_better, labels, groups) == "mean"


def test_evidence_from_few_images_does_not_replace_the_mean():
    """Twenty questions on one image gain, twenty on another lose less.

    That is much for forty rows, and little for two images.
    """
    labels = np.arange(400) % 4
    image = np.r_[np.repeat([0, 1], 20), np.arange(2, 362)]
    candidates = {
        "mean": with_chance(labels, np.repeat([0.4, 0.8, 0.7], (20, 20, 360))),
        "other": with_chance(labels, np.repeat([0.8, 0.5, 0.7], (20, 20, 360))),
    }
    assert vqa.choose_blend(candidates, labels, np.arange(400)) == "other"
    assert vqa.choose_blend(candidates, labels, image) == "mean"


def test_a_lower_loss_does_not_buy_wrong_answers():
    labels, candidates = planted_candidates({"mean": 0.0})
    mean = candidates["mean"].probabilities
    correct = mean.argmax(1) == labels
    surer = one_hot(labels) * 0.98 + 0.005
    less_sure = 0.2 + 0.2 * mean
    other = np.where(correct[:, None], surer, less_sure)
    first = np.flatnonzero(correct)[0]
    other[first] = np.roll(other[first], 1)
    candidates["other"] = vqa.Candidate(other)
    loss_of_mean = vqa.negative_log_likelihood(mean, labels)
    assert vqa.negative_log_likelihood(other, labels) < loss_of_mean - 0.1
    assert vqa.choose_blend(candidates, labels, np.arange(400)) == "mean"


def test_the_automatic_choice_is_scored_on_rows_that_did_not_make_it():
    """A candidate that is right on one part only is not credited with that part.

    The other parts do not ask for it.
    """
    labels, candidates = planted_candidates({"mean": 0.0})
    groups = np.arange(400)
    in_first_part = groups % vqa.CROSS_FIT_PARTS == 0
    right = one_hot(labels) * 0.96 + 0.01
    mean = candidates["mean"].probabilities
    lucky = np.where(in_first_part[:, None], right, mean)
    candidates["lucky"] = vqa.Candidate(lucky, fitted_parameters=1)
    result = vqa.choose_cross_fitted(candidates, labels, groups)
    np.testing.assert_array_equal(result[in_first_part], mean[in_first_part])
    np.testing.assert_array_equal(result[~in_first_part], lucky[~in_first_part])
    # It is chosen in all parts but its own.
    nothing = 0.95 * vqa.bootstrap_interval(np.zeros((400, 2)), groups)
    interval = vqa.choice_interval(candidates, labels, groups)
    np.testing.assert_allclose(interval, nothing)


def choice_by_the_rule(candidates, labels, image):
    """The way with the largest gain in NLL that loses no accuracy and is beyond its error."""
    chosen = "mean"
    largest_gain = 0.0
    for name in candidates:
        accuracy_change, nll_change = change_from_mean(candidates, name, labels).T
        gain = -nll_change.mean()
        deviations = pd.Series(nll_change - nll_change.mean()).groupby(image).sum()
        error = np.sqrt((deviations**2).sum()) / len(labels)
        if gain > max(largest_gain, error) and accuracy_change.mean() >= 0:
            chosen = name
            largest_gain = gain
    return chosen


def test_the_choice_follows_the_rule_as_it_is_written_down():
    """On 500 sets of candidates near the border, with few images, of one to three rows."""
    chosen = set()
    random = np.random.default_rng(0)
    image = np.repeat(np.arange(12), random.integers(1, 4, 12))
    for _ in range(500):
        other, third = random.normal(0.02, 0.05, 2)
        gains = {"mean": 0.0, "other": other, "third": third}
        labels, candidates = planted_candidates(gains, len(image))
        expected = choice_by_the_rule(candidates, labels, image)
        assert vqa.choose_blend(candidates, labels, image) == expected
        chosen.add(expected)
    assert len(chosen) == 3


# --- Its interval ---------------------------------------------------------------------------------


def test_a_choice_that_every_resample_makes_has_the_interval_of_what_it_chooses():
    labels, candidates = planted_candidates({"mean": 0.0, "best": 1.0, "worse": -0.5}, best=7)
    image = np.repeat(np.arange(200), 2)
    change = change_from_mean(candidates, "best", labels)
    interval = vqa.choice_interval(candidates, labels, image)
    np.testing.assert_allclose(interval, vqa.bootstrap_interval(change, image, [1, 7]))


def test_a_choice_that_no_resample_makes_gains_nothing_for_certain():
    labels, candidates = planted_candidates({"mean": 0.0, "worse": -0.5}, worse=7)
    interval = vqa.choice_interval(candidates, labels, np.arange(400))
    np.testing.assert_array_equal(interval, np.zeros((2, 2)))


def test_a_choice_that_chance_decides_has_an_interval_from_none_of_the_gain_to_all_of_it():
    """Thirty images gain, the others lose less.

    Together that is nearly one standard error, so that resamples differ.
    """
    labels = np.arange(400) % 4
    image = np.arange(400)
    candidates = {
        "mean": vqa.Candidate(np.where(one_hot(labels) == 1, 0.7, 0.1)),
        "other": with_chance(labels, np.where(image < 30, 0.9, 0.688)),
    }
    nll_change = change_from_mean(candidates, "other", labels)[:, 1].mean()
    interval = vqa.choice_interval(candidates, labels, image)
    low, high = interval[:, 1]
    assert vqa.choose_blend(candidates, labels, image) == "mean"
    assert low < nll_change < 0 < high
