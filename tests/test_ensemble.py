"""Ensemble: stated tie rules, weights that are really optimal, and numbers that no row helped to make about itself."""

import logging

import numpy as np
import pytest
from scipy.optimize import OptimizeResult
from scipy.stats import binomtest

import vqa_helpers as vqa


def planted_members(n, noise, seed=0):
    """(members, n, 4) probabilities of members that see the label through their own noise, and the labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, n)
    signal = 2 * np.eye(4)[labels]
    return np.stack(
        [vqa.softmax(signal + generator.normal(scale=scale, size=(n, 4))) for scale in noise]
    ), labels


def one_row(*members):
    return np.array(members)[:, None, :]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        # Two votes for b beat one very sure vote for a.
        (one_row([0.97, 0.01, 0.01, 0.01], [0.3, 0.4, 0.2, 0.1], [0.3, 0.4, 0.2, 0.1]), 1),
        # One vote each for a and c: c has the higher mean.
        (one_row([0.4, 0.3, 0.2, 0.1], [0.0, 0.1, 0.9, 0.0]), 2),
        # One vote each for a and c; b has the highest mean of all, but no vote.
        (one_row([0.5, 0.49, 0.01, 0.0], [0.0, 0.49, 0.51, 0.0]), 2),
        # Equal votes and equal means: the earlier letter.
        (one_row([0.1, 0.1, 0.2, 0.6], [0.1, 0.1, 0.6, 0.2]), 2),
    ],
    ids=["majority", "higher mean", "only among the tied", "earlier letter"],
)
def test_majority_vote_and_its_tie_rule(members, expected):
    assert vqa.majority_vote(members).tolist() == [expected]


def test_average_is_the_arithmetic_mean_of_probabilities():
    members = one_row([0.8, 0.2, 0.0, 0.0], [0.2, 0.2, 0.6, 0.0])
    np.testing.assert_allclose(vqa.average_probabilities(members), [[0.5, 0.2, 0.3, 0.0]])
    np.testing.assert_allclose(vqa.average_probabilities(members, [3, 1]), [[0.65, 0.2, 0.15, 0.0]])


def test_weights_recover_a_planted_mixture():
    """Labels drawn from 0.7 of one member and 0.3 of another: the likelihood is then best at these weights."""
    members, _ = planted_members(40_000, noise=(2.0, 2.0, 2.0))
    mixture = 0.7 * members[0] + 0.3 * members[2]
    uniform = np.random.default_rng(1).random((len(mixture), 1))
    labels = (uniform > mixture.cumsum(axis=1)[:, :-1]).sum(axis=1)
    np.testing.assert_allclose(
        vqa.optimize_ensemble_weights(members, labels), [0.7, 0.0, 0.3], atol=0.03
    )


def test_weights_lie_on_the_simplex_and_no_grid_point_is_better(caplog):
    members, labels = planted_members(150, noise=(0.8, 1.5, 2.5))
    weights = vqa.optimize_ensemble_weights(members, labels)
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()

    def loss(candidate):
        return vqa.negative_log_likelihood(vqa.average_probabilities(members, candidate), labels)

    grid = [(a / 20, b / 20, (20 - a - b) / 20) for a in range(21) for b in range(21 - a)]
    assert loss(weights) <= min(map(loss, grid)) + 1e-7
    assert not caplog.text


def test_a_failed_weight_search_says_why_and_is_uniform(monkeypatch, caplog):
    failed = OptimizeResult(
        success=False, message="Iteration limit reached", x=np.array([1.0, 0.0])
    )
    monkeypatch.setattr(vqa, "minimize", lambda *args, **kwargs: failed)
    members, labels = planted_members(20, noise=(1.0, 1.0))
    weights = vqa.optimize_ensemble_weights(
        members, labels, logging.getLogger("somebody_elses_notebook")
    )
    np.testing.assert_allclose(weights, [0.5, 0.5])
    assert (
        "ensemble weights are uniform: SLSQP did not converge: Iteration limit reached"
        in caplog.text
    )


def test_stack_learns_to_trust_the_better_member_and_keeps_masked_choices_at_zero():
    members, labels = planted_members(400, noise=(0.7, 3.0))
    keep = labels != 3
    members[:, : len(labels) // 2, 3] = 0
    members /= members.sum(axis=2, keepdims=True)
    keep[len(labels) // 2 :] = True
    members, labels = members[:, keep], labels[keep]
    masked = (members[:, :, 3] == 0).all(axis=0)
    stacked = vqa.stack(members, labels).predict_proba(members)
    assert (stacked[masked, 3] == 0).all() and (stacked[~masked, 3] > 0).all()
    np.testing.assert_allclose(stacked.sum(axis=1), 1)
    assert vqa.accuracy(stacked, labels) > vqa.accuracy(members.mean(axis=0), labels)


def test_a_stack_counts_as_many_numbers_as_its_penalty_leaves_free():
    """Four features and an intercept for each of four choices, of which three are free; or the intercepts alone."""
    members, labels = planted_members(4000, noise=(1.5,))
    assert vqa.stack(members, labels, strength=1e6).fitted() == pytest.approx(15, abs=0.1)
    assert vqa.stack(members, labels, strength=1e-9).fitted() == pytest.approx(3, abs=0.1)
    stacked = vqa.stack(members, labels)
    inputs = np.column_stack([np.log(np.maximum(members[0], vqa.STACK_FLOOR)), np.ones(4000)])
    chances = stacked.predict_proba(members)
    spread = np.einsum("na,ab->nab", chances, np.eye(4)) - np.einsum("na,nb->nab", chances, chances)
    hessian = np.einsum("nab,nx,ny->axby", spread, inputs, inputs, optimize=True).reshape(20, 20)
    penalty = np.diag([1 / 0.03, 1 / 0.03, 1 / 0.03, 1 / 0.03, 0] * 4)
    shares = np.linalg.eigvals(np.linalg.pinv(hessian + penalty) @ hessian)
    assert stacked.fitted() == pytest.approx((shares**2).sum().real)


def test_a_blend_fits_the_weights_that_it_uses_but_one():
    members, labels = planted_members(1000, noise=(1.0, 1.0, 9.0))
    fitted = {name: vqa.count_fitted_parameters(name, members, labels) for name in vqa.BLENDS}
    assert (
        fitted["weighted"] == fitted["greedy"] == 1
        and fitted["stacked"] == vqa.stack(members, labels).fitted()
    )
    assert fitted["mean"] == fitted["geometric mean"] == fitted["vote"] == 0


def test_stacking_without_an_example_of_every_letter_is_refused():
    members, _ = planted_members(6, noise=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"choices \[3\] never occur"):
        vqa.stack(members, [0, 1, 2, 0, 1, 2])


def test_cross_fit_never_predicts_a_row_with_something_fitted_on_it():
    members, labels = planted_members(12, noise=(1.0, 1.0))
    folds = np.arange(12) % 3
    seen = []

    def remember(fit_inputs, fit_labels, predict_inputs):
        rows = [int(np.flatnonzero((members[0] == row).all(axis=1))[0]) for row in fit_inputs[0]]
        assert (labels[rows] == fit_labels).all()
        held_out = [
            int(np.flatnonzero((members[0] == row).all(axis=1))[0]) for row in predict_inputs[0]
        ]
        assert not set(rows) & set(held_out) and len(rows) + len(held_out) == 12
        seen.extend(held_out)
        return predict_inputs[1]

    np.testing.assert_array_equal(vqa.cross_fit(remember, members, labels, folds), members[1])
    assert sorted(seen) == list(range(12))


def test_cross_fitted_stack_admits_that_noise_was_memorised():
    """Members that know nothing: on its own rows a loose stack looks good, cross-fitted it is worse than chance."""
    members = np.random.default_rng(0).dirichlet(np.ones(4), size=(10, 120))
    labels, folds = np.arange(120) % 4, np.arange(120) // 4 % 3

    def fit_and_predict(fit_inputs, fit_labels, predict_inputs):
        return vqa.stack(fit_inputs, fit_labels, strength=10).predict_proba(predict_inputs)

    own_rows = vqa.negative_log_likelihood(fit_and_predict(members, labels, members), labels)
    cross_fitted = vqa.negative_log_likelihood(
        vqa.cross_fit(fit_and_predict, members, labels, folds), labels
    )
    assert own_rows < np.log(4) < cross_fitted


def test_cross_fit_serves_temperatures_too():
    logits = np.random.default_rng(0).normal(size=(40, 4))
    logits[:, 3] = -np.inf
    labels, folds = np.arange(40) % 3, np.arange(40) % 2

    def fit_and_predict(fit_inputs, fit_labels, predict_inputs):
        return vqa.TemperatureScaler().fit(fit_inputs, fit_labels).transform(predict_inputs)

    probabilities = vqa.cross_fit(fit_and_predict, logits, labels, folds)
    expected = vqa.TemperatureScaler().fit(logits[1::2], labels[1::2]).transform(logits[::2])
    np.testing.assert_allclose(probabilities[::2], expected)
    with pytest.raises(ValueError, match="at least two folds"):
        vqa.cross_fit(fit_and_predict, logits, labels, np.zeros(40))


def test_compare_paired_equals_the_binomial_test_by_hand():
    reference = np.array([True] * 60 + [False] * 40)
    candidate = reference.copy()
    candidate[:3] = False  # 3 losses
    candidate[60:72] = True  # 12 wins
    result = vqa.compare_paired(reference, candidate)
    assert result == {
        "gain": 0.09,
        "wins": 12,
        "losses": 3,
        "p_value": binomtest(12, 15, 0.5).pvalue,
    }
    assert result["p_value"] == pytest.approx(2 * (1 + 15 + 105 + 455) / 2**15)
    assert vqa.compare_paired(candidate, reference)["gain"] == -0.09


def test_compare_paired_without_a_difference_proves_nothing():
    assert vqa.compare_paired([1, 0], [1, 0]) == {
        "gain": 0.0,
        "wins": 0,
        "losses": 0,
        "p_value": 1.0,
    }
    assert vqa.compare_paired([], []) == {"gain": 0.0, "wins": 0, "losses": 0, "p_value": 1.0}
    with pytest.raises(ValueError, match="need the same rows twice"):
        vqa.compare_paired([1, 0], [1, 0, 1])
