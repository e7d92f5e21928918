"""Part 5, Metrics: accuracy, NLL, calibration error and collapse equal what a hand computes."""

import math

import numpy as np
import pytest
from planted import calibrated, rotated_views, sample_labels
from scipy.special import log_softmax

import vqa_helpers as vqa

# --- Views ----------------------------------------------------------------------------------------


NEG_INF = -np.inf
LETTER_BIAS = np.array([3.0, -1.0, 0.5, 0.0])


def test_four_rotations_cancel_a_planted_letter_bias_exactly():
    content = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    unbiased = vqa.softmax(content)
    views = rotated_views(content, LETTER_BIAS)
    one_view = vqa.softmax(views[:, 0])
    two_views = vqa.softmax(vqa.combine_views(views[:, :2]))
    all_views = vqa.softmax(vqa.combine_views(views))
    np.testing.assert_allclose(all_views, unbiased, atol=1e-6)
    assert np.abs(one_view - unbiased).max() > 0.3  # the bias was there to cancel
    assert np.abs(two_views - unbiased).max() > 0.1


def test_four_rotations_cancel_the_bias_of_a_row_with_a_masked_choice():
    content = np.array([[1.0, NEG_INF, 0.2, -0.5]])
    combined = vqa.combine_views(rotated_views(content, LETTER_BIAS))
    assert combined[0, 1] == NEG_INF
    np.testing.assert_allclose(vqa.softmax(combined), vqa.softmax(content), atol=1e-6)


def test_views_are_averaged_after_the_log_softmax_and_missing_views_do_not_count():
    first = np.array([2.0, 0.0, 0.0, 0.0])
    second = np.array([100.0, 103.0, 100.0, 100.0])
    logits = np.array([[first, second], [first, np.full(4, np.nan)]])
    combined = vqa.combine_views(logits)
    np.testing.assert_allclose(combined[0], (log_softmax(first) + log_softmax(second)) / 2)
    np.testing.assert_allclose(combined[1], log_softmax(first))


EQUAL = [0, 0, 0, 0]
MISSING = [np.nan] * 4
BROKEN_VIEWS = {
    "no view": [MISSING, MISSING],
    "partly NaN": [[0, np.nan, 0, 0], EQUAL],
    "all masked": [[NEG_INF] * 4, EQUAL],
    "masked in one": [[0, NEG_INF, 0, 0], EQUAL],
    "masked in one of two": [[0, NEG_INF, 0, 0], MISSING, EQUAL],
}


@pytest.mark.parametrize("views", BROKEN_VIEWS.values(), ids=BROKEN_VIEWS)
def test_broken_views_are_refused_with_their_row(views):
    sound_row = np.zeros((len(views), 4))
    with pytest.raises(
        ValueError, match="row 1: no view, a view with NaN, or a choice masked in some views only"
    ):
        vqa.combine_views([sound_row, views])


# --- Scores ---------------------------------------------------------------------------------------


PROBABILITIES = np.array(
    [
        [0.7, 0.1, 0.1, 0.1],
        [0.2, 0.6, 0.2, 0.0],
        [0.1, 0.2, 0.3, 0.4],
    ]
)


def test_metrics_equal_hand_computed_values():
    labels = [0, 1, 2]
    assert vqa.accuracy(PROBABILITIES, labels) == pytest.approx(2 / 3)
    nll = vqa.negative_log_likelihood(PROBABILITIES, labels)
    assert nll == pytest.approx(-math.log(0.7 * 0.6 * 0.3) / 3)
    nll_of_the_impossible = vqa.negative_log_likelihood(PROBABILITIES[1:2], [3])
    assert nll_of_the_impossible == pytest.approx(-math.log(1e-12))


def test_logits_passed_as_probabilities_are_refused():
    with pytest.raises(ValueError, match="are these logits"):
        vqa.accuracy([[2.0, -1.0, 0.0, 0.0]], [0])


def test_reliability_curve_and_error_equal_hand_computed_values():
    probabilities = [
        [0.9, 0.1, 0, 0],
        [0.86, 0.14, 0, 0],
        [0.6, 0.4, 0, 0],
        [0.6, 0.4, 0, 0],
    ]
    labels = [0, 1, 0, 0]
    curve = vqa.reliability_curve(probabilities, labels, n_bins=5)
    assert list(curve.columns) == ["confidence", "accuracy", "count"]
    # 0.6 lies on a bin's right edge and belongs to it
    assert curve["count"].tolist() == [0, 0, 2, 0, 2]
    np.testing.assert_allclose(curve["confidence"], [np.nan, np.nan, 0.6, np.nan, 0.88])
    np.testing.assert_allclose(curve["accuracy"], [np.nan, np.nan, 1.0, np.nan, 0.5])
    error = vqa.expected_calibration_error(probabilities, labels, n_bins=5)
    assert error == pytest.approx(0.5 * 0.4 + 0.5 * 0.38)


def test_the_null_is_the_error_that_a_calibrated_model_shows():
    logits, labels = calibrated(500)
    probabilities = vqa.softmax(logits)
    null, low, high = vqa.calibration_error_null(probabilities)
    errors = [
        vqa.expected_calibration_error(probabilities, sample_labels(logits, seed))
        for seed in range(100)
    ]
    assert null == pytest.approx(np.mean(errors), rel=0.08)
    assert 0.8 < np.mean([low < error < high for error in errors]) < 0.98
    assert null == vqa.calibration_error_null(probabilities)[0]  # seeded
    honest = vqa.calibration_row(vqa.softmax(logits), labels)
    sure = vqa.calibration_row(vqa.softmax(logits * 3), labels)
    assert honest["excess_low"] < 0 < honest["excess_high"]
    assert sure["excess_low"] > 2 * null
    assert honest["ece_excess"] == pytest.approx(honest["ece"] - null)


def test_the_brier_score_is_the_squared_distance_from_the_truth():
    score = vqa.brier_score([[1, 0, 0, 0], [0.5, 0.5, 0, 0]], [0, 0])
    assert score == pytest.approx((0 + 0.5) / 2)
    assert vqa.brier_score([[1, 0, 0, 0]], [1]) == 2


# --- Collapse -------------------------------------------------------------------------------------


def test_mode_collapse_raises_the_alarm():
    labels = np.arange(200) % 4
    alarm = vqa.prediction_diversity(["b"] * 195 + ["a"] * 5, labels)
    assert alarm["collapsed"]
    assert alarm["top_letter"] == "b"
    assert alarm["top_share"] == 0.975
    assert alarm["label_share"] == 0.25
    assert alarm["entropy"] < 0.1
    assert vqa.prediction_diversity(["a", "c"] * 100, labels)["collapsed"]  # two letters only


@pytest.mark.parametrize(
    ("predicted", "labels"),
    [
        (["a", "b", "c", "d"] * 50, np.arange(200) % 4),
        (["a"] * 3, [0, 1, 2, 3]),  # three rows prove nothing
        (["a"] * 940 + ["b"] * 60, ["a"] * 900 + ["b"] * 100),  # the answers really are like this
    ],
    ids=["even", "few rows", "uneven labels"],
)
def test_diverse_predictions_raise_no_alarm(predicted, labels):
    assert not vqa.prediction_diversity(predicted, labels)["collapsed"]


def test_diversity_of_probabilities_letters_and_indices_agree():
    expected = vqa.prediction_diversity(["a", "b", "d"], [0, 1, 2])
    assert vqa.prediction_diversity(PROBABILITIES, ["a", "b", "c"]) == expected
    assert vqa.prediction_diversity([0, 1, 3], [0, 1, 2]) == expected
    assert expected["entropy"] == pytest.approx(math.log(3) / math.log(4))
    with pytest.raises(ValueError, match="row 1 with label -1"):
        vqa.prediction_diversity(["a", "e"], [0])


def top_letter(times, rows, label_times, labels):
    """Whether `a` in so many of the predictions, and of the labels, is an alarm."""
    predicted = ["a"] * times + [*"bcd"] * rows
    truth = ["a"] * label_times + [*"bcd"] * labels
    return vqa.prediction_diversity(predicted[:rows], truth[:labels])


@pytest.mark.parametrize(
    ("times", "rows", "label_times", "labels", "collapsed"),
    [
        (4, 13, 3, 13, False),  # 31%, of which the module once said "almost everything"
        (29, 29, 7, 28, False),
        (30, 30, 7, 28, True),
        (44, 100, 25, 100, False),
        (45, 100, 25, 100, True),
        (74, 100, 50, 100, False),
        (75, 100, 50, 100, True),
        (14, 31, 25, 100, False),  # 45%, which chance gives to 1 of 90 such models
        (100, 100, 70, 100, False),
    ],
    ids=[
        "31 percent of 13",
        "29 rows",
        "30 rows",
        "19 points more",
        "20 points more",
        "1.48 times as many",
        "1.5 times as many",
        "p 0.01",
        "nothing but what most labels are",
    ],
)
def test_the_alarm_of_a_preferred_letter_needs_an_effect_and_evidence(
    times, rows, label_times, labels, collapsed
):
    assert top_letter(times, rows, label_times, labels)["collapsed"] is collapsed


def test_the_alarm_speaks_of_what_it_measured():
    alarm = top_letter(1061, 1200, 270, 1000)
    assert vqa.describe_preference(alarm) == (
        "the model answered a in 1,061 of 1,200 rows (88%); a is right in 27%"
    )
