"""Calibration and metrics: the temperature is the right one, and no choice, view or row is silently lost."""

import logging
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

import vqa_helpers as vqa

NEG_INF = -np.inf
LOGGER = logging.getLogger(
    "somebody_elses_notebook"
)  # the module's own stops propagating once it is set up


def sample_labels(logits, seed=0):
    """Labels drawn from softmax(logits), so that these logits are calibrated by construction."""
    cumulative = vqa.softmax(logits).cumsum(axis=1)
    return (np.random.default_rng(seed).random((len(logits), 1)) > cumulative[:, :-1]).sum(axis=1)


def calibrated(n, seed=0):
    logits = np.random.default_rng(seed).normal(scale=2, size=(n, 4))
    return logits, sample_labels(logits, seed + 1)


# Views -----------------------------------------------------------------------------------------------------------


def rotated_views(content, bias):
    """(n, 4, 4) logits of four rotations of the choices; the model adds bias[p] to whatever stands at position p."""
    views = []
    for shift in range(4):
        order = np.roll(np.arange(4), shift)  # order[position] = original index
        prompt = content[:, order] + bias
        original = np.empty_like(prompt)
        original[:, order] = prompt
        views.append(original)
    return np.stack(views, axis=1).astype(np.float32)


def test_four_rotations_cancel_a_planted_letter_bias_exactly():
    content = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    views = rotated_views(content, bias=np.array([3.0, -1.0, 0.5, 0.0]))
    one_view, all_views = vqa.softmax(views[:, 0]), vqa.softmax(vqa.combine_views(views))
    np.testing.assert_allclose(all_views, vqa.softmax(content), atol=1e-6)
    assert np.abs(one_view - vqa.softmax(content)).max() > 0.3  # the bias was there to cancel
    assert np.abs(vqa.softmax(vqa.combine_views(views[:, :2])) - vqa.softmax(content)).max() > 0.1


def test_four_rotations_cancel_the_bias_of_a_row_with_a_masked_choice():
    content = np.array([[1.0, NEG_INF, 0.2, -0.5]])
    combined = vqa.combine_views(rotated_views(content, bias=np.array([3.0, -1.0, 0.5, 0.0])))
    assert combined[0, 1] == NEG_INF
    np.testing.assert_allclose(vqa.softmax(combined), vqa.softmax(content), atol=1e-6)


def test_views_are_averaged_after_the_log_softmax_and_missing_views_do_not_count():
    first, second = np.array([2.0, 0.0, 0.0, 0.0]), np.array([100.0, 103.0, 100.0, 100.0])
    logits = np.array([[first, second], [first, np.full(4, np.nan)]])
    combined = vqa.combine_views(logits)
    np.testing.assert_allclose(combined[0], (log_softmax(first) + log_softmax(second)) / 2)
    np.testing.assert_allclose(combined[1], log_softmax(first))


@pytest.mark.parametrize(
    "views",
    [
        [[np.nan] * 4, [np.nan] * 4],
        [[0, np.nan, 0, 0], [0, 0, 0, 0]],
        [[NEG_INF] * 4, [0, 0, 0, 0]],
        [[0, NEG_INF, 0, 0], [0, 0, 0, 0]],
        [[0, NEG_INF, 0, 0], [np.nan] * 4, [0, 0, 0, 0]],
    ],
    ids=["no view", "partly NaN", "all masked", "masked in one", "masked in one of two"],
)
def test_broken_views_are_refused_with_their_row(views):
    with pytest.raises(
        ValueError, match="row 1: no view, a view with NaN, or a choice masked in some views only"
    ):
        vqa.combine_views([np.zeros((len(views), 4)), views])


# Temperature -----------------------------------------------------------------------------------------------------


def test_the_scaler_works_as_users_call_it(caplog):
    logger = LOGGER
    val_logits, val_labels = calibrated(500)
    test_logits, _ = calibrated(20, seed=5)
    with caplog.at_level(logging.INFO, logger=LOGGER.name):
        scaler = vqa.TemperatureScaler()
        scaler.fit(val_logits, val_labels, logger)
        probabilities = scaler.transform(test_logits)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert f"temperature {scaler.temperature:.3f} fitted on 500 rows" in caplog.text


@pytest.mark.parametrize("true_temperature", [0.4, 1.0, 2.0, 5.0])
def test_a_known_temperature_is_recovered(true_temperature):
    logits, labels = calibrated(20_000)
    scaler = vqa.TemperatureScaler().fit(logits * true_temperature, labels)
    assert scaler.temperature == pytest.approx(true_temperature, rel=0.04)
    np.testing.assert_allclose(
        scaler.transform(logits * true_temperature), vqa.softmax(logits), atol=0.02
    )


def test_the_temperature_is_the_one_sklearn_finds():
    pytest.importorskip(
        "sklearn", minversion="1.8", reason="sklearn has temperature scaling from 1.8 on"
    )
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator

    class Logits(ClassifierMixin, BaseEstimator):
        def fit(self, X, y):
            self.classes_ = np.unique(y)
            return self

        def decision_function(self, X):
            return X

        def predict(self, X):
            return X.argmax(axis=1)

    logits, labels = calibrated(800)
    logits *= 1.7
    oracle = CalibratedClassifierCV(
        FrozenEstimator(Logits().fit(logits, labels)), method="temperature"
    )
    oracle.fit(logits, labels)
    scaler = vqa.TemperatureScaler().fit(logits, labels)
    sklearn_temperature = 1 / oracle.calibrated_classifiers_[0].calibrators[0].beta_
    assert scaler.temperature == pytest.approx(sklearn_temperature, rel=1e-4)
    np.testing.assert_allclose(scaler.transform(logits), oracle.predict_proba(logits), atol=1e-4)


def test_scaling_never_changes_an_answer_and_lowers_the_loss():
    logits, labels = calibrated(400)
    logits *= 3
    probabilities = vqa.TemperatureScaler().fit(logits, labels).transform(logits)
    assert (probabilities.argmax(axis=1) == logits.argmax(axis=1)).all()
    before, after = (
        vqa.negative_log_likelihood(p, labels) for p in (vqa.softmax(logits), probabilities)
    )
    assert after < before - 0.1


def test_masked_choices_stay_at_zero_and_do_not_disturb_the_temperature():
    logits, _ = calibrated(20_000)
    logits[::2, 3] = NEG_INF
    labels = sample_labels(logits)
    scaler = vqa.TemperatureScaler().fit(logits * 2, labels)
    probabilities = scaler.transform(logits)
    assert scaler.temperature == pytest.approx(2, rel=0.05)
    assert (probabilities[::2, 3] == 0).all() and (probabilities[1::2, 3] > 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)


def test_views_are_combined_before_scaling():
    logits, labels = calibrated(300)
    views = rotated_views(logits, bias=np.array([2.0, 0.0, 0.0, -1.0]))
    from_views, from_content = (vqa.TemperatureScaler().fit(x, labels) for x in (views, logits))
    assert from_views.temperature == pytest.approx(from_content.temperature, rel=1e-4)
    np.testing.assert_allclose(
        from_views.transform(views), from_content.transform(logits), atol=1e-4
    )


@pytest.mark.parametrize(("label", "bound"), [(0, 0.05), (1, 20.0)], ids=["all right", "all wrong"])
def test_a_temperature_at_its_bound_is_logged(label, bound, caplog):
    logits = np.tile([1.0, 0.0, 0.0, 0.0], (30, 1))
    scaler = vqa.TemperatureScaler().fit(logits, np.full(30, label), LOGGER)
    assert scaler.temperature == pytest.approx(bound, rel=1e-3)
    assert f"temperature {bound:g} is at its bound" in caplog.text
    assert scaler.at_bound


def test_lists_and_torch_tensors_give_the_temperature_of_arrays():
    logits, labels = calibrated(200)
    logits = torch.tensor(logits).bfloat16().requires_grad_()  # as a model leaves them
    plain = logits.detach().float().numpy()
    expected = vqa.TemperatureScaler().fit(plain, labels).temperature
    assert vqa.TemperatureScaler().fit(logits, torch.tensor(labels)).temperature == expected
    assert vqa.TemperatureScaler().fit(plain.tolist(), labels.tolist()).temperature == expected


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((0, 4)), [], "0 rows but labels of shape"),
        (np.zeros((3, 4)), [0, 1], "3 rows but labels of shape"),
        (
            np.zeros((3, 4)),
            [0, -1, 2],
            "1 unlabelled rows, the first is row 1 with label -1: drop them",
        ),
        (np.zeros((3, 4)), [0, 1, 4], "row 2 with label 4"),
        ([[0, 0, 0, 0], [0, np.nan, 0, 0]], [0, 0], "row 1: no view, a view with NaN"),
        (
            [[0, 0, 0, NEG_INF], [0, 0, 0, NEG_INF]],
            [0, 3],
            "row 1 is labelled with a masked choice",
        ),
    ],
)
def test_rows_that_cannot_be_fitted_are_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        vqa.TemperatureScaler().fit(logits, labels)


def test_transform_before_fit_is_refused():
    with pytest.raises(ValueError, match=r"not fitted: call fit"):
        vqa.TemperatureScaler().transform(np.zeros((1, 4)))


def test_small_folds_are_pulled_towards_the_pooled_temperature():
    shrunk = vqa.shrink_temperatures([4.0, 4.0, 1.0], [0, 50, 10**9], pooled=1.0)
    np.testing.assert_allclose(
        shrunk, [1.0, 2.0, 1.0], rtol=1e-6
    )  # halfway from 1 to 4 in log T is 2


# Metrics ---------------------------------------------------------------------------------------------------------

PROBABILITIES = np.array([[0.7, 0.1, 0.1, 0.1], [0.2, 0.6, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]])


def test_metrics_equal_hand_computed_values():
    labels = [0, 1, 2]
    assert vqa.accuracy(PROBABILITIES, labels) == pytest.approx(2 / 3)
    assert vqa.negative_log_likelihood(PROBABILITIES, labels) == pytest.approx(
        -math.log(0.7 * 0.6 * 0.3) / 3
    )
    assert vqa.negative_log_likelihood(PROBABILITIES[1:2], [3]) == pytest.approx(-math.log(1e-12))


def test_logits_passed_as_probabilities_are_refused():
    with pytest.raises(ValueError, match="are these logits"):
        vqa.accuracy([[2.0, -1.0, 0.0, 0.0]], [0])


def test_reliability_curve_and_error_equal_hand_computed_values():
    probabilities = [[0.9, 0.1, 0, 0], [0.86, 0.14, 0, 0], [0.6, 0.4, 0, 0], [0.6, 0.4, 0, 0]]
    labels = [0, 1, 0, 0]
    curve = vqa.reliability_curve(probabilities, labels, n_bins=5)
    assert list(curve.columns) == ["confidence", "accuracy", "count"]
    assert curve["count"].tolist() == [
        0,
        0,
        2,
        0,
        2,
    ]  # 0.6 lies on a bin's right edge and belongs to it
    np.testing.assert_allclose(curve["confidence"], [np.nan, np.nan, 0.6, np.nan, 0.88])
    np.testing.assert_allclose(curve["accuracy"], [np.nan, np.nan, 1.0, np.nan, 0.5])
    assert vqa.expected_calibration_error(probabilities, labels, n_bins=5) == pytest.approx(
        0.5 * 0.4 + 0.5 * 0.38
    )


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
    honest, sure = (vqa.calibration_row(vqa.softmax(logits * factor), labels) for factor in (1, 3))
    assert honest["excess_low"] < 0 < honest["excess_high"] and sure["excess_low"] > 2 * null
    assert honest["ece_excess"] == pytest.approx(honest["ece"] - null)


def test_the_brier_score_is_the_squared_distance_from_the_truth():
    assert vqa.brier_score([[1, 0, 0, 0], [0.5, 0.5, 0, 0]], [0, 0]) == pytest.approx((0 + 0.5) / 2)
    assert vqa.brier_score([[1, 0, 0, 0]], [1]) == 2


def test_mode_collapse_raises_the_alarm():
    labels = np.arange(200) % 4
    alarm = vqa.prediction_diversity(["b"] * 195 + ["a"] * 5, labels)
    assert alarm["collapsed"]
    assert (alarm["top_letter"], alarm["top_share"], alarm["label_share"]) == ("b", 0.975, 0.25)
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
