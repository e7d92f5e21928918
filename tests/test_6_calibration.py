"""Part 6, Calibration: the temperature is the right one, and nothing is silently lost."""

import logging

import numpy as np
import pytest
import torch
from planted import calibrated, planted_two_views, rotated_views, sample_labels

import vqa_helpers as vqa

NEG_INF = -np.inf
# The module's own stops propagating once it is set up.
LOGGER = logging.getLogger("somebody_elses_notebook")


def test_the_scaler_works_as_users_call_it(caplog):
    val_logits, val_labels = calibrated(500)
    test_logits, _ = calibrated(20, seed=5)
    with caplog.at_level(logging.INFO, logger=LOGGER.name):
        scaler = vqa.TemperatureScaler()
        scaler.fit(val_logits, val_labels, LOGGER)
        probabilities = scaler.transform(test_logits)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert f"temperature {scaler.temperature:.3f} fitted on 500 rows" in caplog.text


@pytest.mark.parametrize("true_temperature", [0.4, 1.0, 2.0, 5.0])
def test_a_known_temperature_is_recovered(true_temperature):
    logits, labels = calibrated(20_000)
    overconfident = logits * true_temperature
    scaler = vqa.TemperatureScaler().fit(overconfident, labels)
    assert scaler.temperature == pytest.approx(true_temperature, rel=0.04)
    probabilities = scaler.transform(overconfident)
    np.testing.assert_allclose(probabilities, vqa.softmax(logits), atol=0.02)


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
    model = FrozenEstimator(Logits().fit(logits, labels))
    oracle = CalibratedClassifierCV(model, method="temperature")
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
    before = vqa.negative_log_likelihood(vqa.softmax(logits), labels)
    after = vqa.negative_log_likelihood(probabilities, labels)
    assert after < before - 0.1


def test_masked_choices_stay_at_zero_and_do_not_disturb_the_temperature():
    logits, _ = calibrated(20_000)
    logits[::2, 3] = NEG_INF
    labels = sample_labels(logits)
    scaler = vqa.TemperatureScaler().fit(logits * 2, labels)
    probabilities = scaler.transform(logits)
    assert scaler.temperature == pytest.approx(2, rel=0.05)
    assert (probabilities[::2, 3] == 0).all()
    assert (probabilities[1::2, 3] > 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)


def test_views_are_combined_before_scaling():
    logits, labels = calibrated(300)
    views = rotated_views(logits, bias=np.array([2.0, 0.0, 0.0, -1.0]))
    from_views = vqa.TemperatureScaler().fit(views, labels)
    from_content = vqa.TemperatureScaler().fit(logits, labels)
    assert from_views.temperature == pytest.approx(from_content.temperature, rel=1e-4)
    expected = from_content.transform(logits)
    np.testing.assert_allclose(from_views.transform(views), expected, atol=1e-4)


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
    # Halfway from 1 to 4 in log T is 2.
    np.testing.assert_allclose(shrunk, [1.0, 2.0, 1.0], rtol=1e-6)


# --- In a run -------------------------------------------------------------------------------------


def test_without_temperature_scaling_every_temperature_is_one(finished, replace):
    run = replace(finished, config=replace(finished.config, use_temperature_scaling=False))
    assert set(vqa.evaluate_run(run).calibration.temperatures.values()) == {1.0}


def test_a_fold_with_one_row_is_scaled_by_the_pooled_temperature(mini_run, replace):
    run = mini_run()
    run = replace(run, train=run.train.assign(fold=[1] + [0] * 35))
    evaluation = vqa.evaluate_run(planted_two_views(run, run.train))
    assert np.isfinite(evaluation.calibration.probabilities).all()
    assert set(evaluation.calibration.temperatures) == {0, 1}
    assert len(vqa.predict_test(run, evaluation)) == 2
    # Row 0 is in the first of five parts: its temperature comes from the others.
    in_other_parts = np.arange(36) % 5 != 0
    fitted = (evaluation.oof.folds == 0) & in_other_parts
    scores = vqa.combine_views(evaluation.oof.logits[:, evaluation.views])
    scaler = vqa.TemperatureScaler().fit(scores[fitted], evaluation.oof.labels[fitted])
    (expected,) = scaler.transform(scores[:1])
    assert np.allclose(evaluation.calibration.probabilities[0], expected)
