"""Part 6, Ensembles: stated tie rules, optimal weights, and no number helped by its own row."""

import logging

import numpy as np
import pandas as pd
import pytest
from planted import draw_labels, one_hot
from scipy.optimize import OptimizeResult

import vqa_helpers as vqa

# --- Votes and means ------------------------------------------------------------------------------


def planted_members(n, noise, seed=0):
    """Probabilities (members, n, 4), and the labels, which each member sees through its noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, n)
    signal = 2 * one_hot(labels)
    members = [vqa.softmax(signal + random.normal(scale=scale, size=(n, 4))) for scale in noise]
    return np.stack(members), labels


def one_row(*members):
    """The members' probabilities of a single question."""
    return np.array(members)[:, None, :]


VOTES = {
    # Two votes for b beat one very sure vote for a.
    "majority": (one_row([0.97, 0.01, 0.01, 0.01], [0.3, 0.4, 0.2, 0.1], [0.3, 0.4, 0.2, 0.1]), 1),
    # One vote each for a and c: c has the higher mean.
    "higher mean": (one_row([0.4, 0.3, 0.2, 0.1], [0.0, 0.1, 0.9, 0.0]), 2),
    # One vote each for a and c; b has the highest mean of all, but no vote.
    "only among the tied": (one_row([0.5, 0.49, 0.01, 0.0], [0.0, 0.49, 0.51, 0.0]), 2),
    # Equal votes and equal means: the earlier letter.
    "earlier letter": (one_row([0.1, 0.1, 0.2, 0.6], [0.1, 0.1, 0.6, 0.2]), 2),
}


@pytest.mark.parametrize(("members", "expected"), VOTES.values(), ids=VOTES)
def test_majority_vote_and_its_tie_rule(members, expected):
    assert vqa.majority_vote(members).tolist() == [expected]


def test_average_is_the_arithmetic_mean_of_probabilities():
    members = one_row([0.8, 0.2, 0.0, 0.0], [0.2, 0.2, 0.6, 0.0])
    mean = vqa.average_probabilities(members)
    np.testing.assert_allclose(mean, [[0.5, 0.2, 0.3, 0.0]])
    weighted = vqa.average_probabilities(members, [3, 1])
    np.testing.assert_allclose(weighted, [[0.65, 0.2, 0.15, 0.0]])


def test_the_geometric_mean_is_that_of_probabilities():
    members = np.array([[[0.8, 0.1, 0.1, 0.0]], [[0.1, 0.4, 0.5, 0.0]]])
    mixed = vqa.apply_blend("geometric mean", None, None, members)
    expected = np.sqrt([0.08, 0.04, 0.05, 0.0])
    np.testing.assert_allclose(mixed, [expected / expected.sum()], atol=1e-9)


# --- Weights --------------------------------------------------------------------------------------


def test_weights_recover_a_planted_mixture():
    """Labels drawn from 0.7 of one member and 0.3 of another are likeliest at these weights."""
    members, _ = planted_members(40_000, noise=(2.0, 2.0, 2.0))
    mixture = 0.7 * members[0] + 0.3 * members[2]
    labels = draw_labels(mixture, np.random.default_rng(1))
    weights = vqa.optimize_ensemble_weights(members, labels)
    np.testing.assert_allclose(weights, [0.7, 0.0, 0.3], atol=0.03)


def test_weights_lie_on_the_simplex_and_no_grid_point_is_better(caplog):
    members, labels = planted_members(150, noise=(0.8, 1.5, 2.5))
    weights = vqa.optimize_ensemble_weights(members, labels)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()

    def loss(candidate):
        return vqa.negative_log_likelihood(vqa.average_probabilities(members, candidate), labels)

    grid = [(a / 20, b / 20, (20 - a - b) / 20) for a in range(21) for b in range(21 - a)]
    assert loss(weights) <= min(map(loss, grid)) + 1e-7
    assert not caplog.text


def test_a_failed_weight_search_says_why_and_is_uniform(monkeypatch, caplog):
    failed = OptimizeResult(
        success=False,
        message="Iteration limit reached",
        x=np.array([1.0, 0.0]),
    )
    monkeypatch.setattr(vqa, "minimize", lambda *_, **__: failed)
    members, labels = planted_members(20, noise=(1.0, 1.0))
    logger = logging.getLogger("somebody_elses_notebook")
    weights = vqa.optimize_ensemble_weights(members, labels, logger)
    np.testing.assert_allclose(weights, [0.5, 0.5])
    reason = "SLSQP did not converge: Iteration limit reached"
    assert f"ensemble weights are uniform: {reason}" in caplog.text


def test_greedy_selection_finds_the_planted_mixture():
    """Labels drawn from 0.7 of one member and 0.3 of another."""
    random = np.random.default_rng(0)
    members = random.dirichlet(np.ones(4), size=(3, 20_000))
    mixture = 0.7 * members[0] + 0.3 * members[2]
    labels = draw_labels(mixture, random)
    weights = vqa.greedy_weights(members, labels)
    np.testing.assert_allclose(weights, [0.7, 0, 0.3], atol=0.051)
    assert (weights * vqa.GREEDY_ROUNDS % 1 == 0).all()


# --- Stacks ---------------------------------------------------------------------------------------


def test_stack_learns_to_trust_the_better_member_and_keeps_masked_choices_at_zero():
    members, labels = planted_members(400, noise=(0.7, 3.0))
    # Choice d is masked in the first half of the rows, where it is then never the label.
    members[:, :200, 3] = 0
    members /= members.sum(axis=2, keepdims=True)
    possible = (labels != 3) | (np.arange(400) >= 200)
    members = members[:, possible]
    labels = labels[possible]
    masked = (members[:, :, 3] == 0).all(axis=0)
    stacked = vqa.stack(members, labels).predict_proba(members)
    assert (stacked[masked, 3] == 0).all()
    assert (stacked[~masked, 3] > 0).all()
    np.testing.assert_allclose(stacked.sum(axis=1), 1)
    assert vqa.accuracy(stacked, labels) > vqa.accuracy(members.mean(axis=0), labels)


def test_a_stack_counts_as_many_numbers_as_its_penalty_leaves_free():
    """Four features and an intercept for each of three free choices, or intercepts alone."""
    members, labels = planted_members(4000, noise=(1.5,))
    assert vqa.stack(members, labels, strength=1e6).fitted_parameters() == pytest.approx(
        15, abs=0.1
    )
    assert vqa.stack(members, labels, strength=1e-9).fitted_parameters() == pytest.approx(
        3, abs=0.1
    )

    stacked = vqa.stack(members, labels)
    features = np.log(np.maximum(members[0], vqa.STACK_FLOOR))
    inputs = np.column_stack([features, np.ones(4000)])
    chances = stacked.predict_proba(members)
    variances = np.einsum("na,ab->nab", chances, np.eye(4))
    spread = variances - np.einsum("na,nb->nab", chances, chances)
    hessian = np.einsum("nab,nx,ny->axby", spread, inputs, inputs, optimize=True).reshape(20, 20)
    penalty = np.diag([1 / 0.03, 1 / 0.03, 1 / 0.03, 1 / 0.03, 0] * 4)
    shares = np.linalg.eigvals(np.linalg.pinv(hessian + penalty) @ hessian)
    assert stacked.fitted_parameters() == pytest.approx((shares**2).sum().real)


def test_a_blend_fits_the_weights_that_it_uses_but_one():
    members, labels = planted_members(1000, noise=(1.0, 1.0, 9.0))
    fitted = {name: vqa.count_fitted_parameters(name, members, labels) for name in vqa.BLENDS}
    assert fitted["weighted"] == fitted["greedy"] == 1
    assert fitted["stacked"] == vqa.stack(members, labels).fitted_parameters()
    assert fitted["mean"] == fitted["geometric mean"] == fitted["vote"] == 0


def test_stacking_without_an_example_of_every_letter_is_refused():
    members, _ = planted_members(6, noise=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"choices \[3\] never occur"):
        vqa.stack(members, [0, 1, 2, 0, 1, 2])


# --- Cross-fitting --------------------------------------------------------------------------------


def test_cross_fit_never_predicts_a_row_with_something_fitted_on_it():
    members, labels = planted_members(12, noise=(1.0, 1.0))
    folds = np.arange(12) % 3
    predicted = []

    def row_numbers(inputs):
        """Which rows these are, found by the first member's probabilities."""
        is_row = (inputs[0][:, None] == members[0]).all(axis=2)
        return is_row.argmax(axis=1).tolist()

    def remember(fit_inputs, fit_labels, predict_inputs):
        fitted = row_numbers(fit_inputs)
        assert (labels[fitted] == fit_labels).all()
        held_out = row_numbers(predict_inputs)
        assert not set(fitted) & set(held_out)
        assert len(fitted) + len(held_out) == 12
        predicted.extend(held_out)
        return predict_inputs[1]

    np.testing.assert_array_equal(vqa.cross_fit(remember, members, labels, folds), members[1])
    assert sorted(predicted) == list(range(12))


def test_cross_fitted_stack_admits_that_noise_was_memorised():
    """On its own rows a loose stack of members that know nothing looks better than chance."""
    members = np.random.default_rng(0).dirichlet(np.ones(4), size=(10, 120))
    labels = np.arange(120) % 4
    folds = np.arange(120) // 4 % 3

    def fit_and_predict(fit_inputs, fit_labels, predict_inputs):
        return vqa.stack(fit_inputs, fit_labels, strength=10).predict_proba(predict_inputs)

    on_its_own_rows = fit_and_predict(members, labels, members)
    cross_fitted = vqa.cross_fit(fit_and_predict, members, labels, folds)
    chance = np.log(4)
    assert vqa.negative_log_likelihood(on_its_own_rows, labels) < chance
    assert vqa.negative_log_likelihood(cross_fitted, labels) > chance


def test_cross_fit_serves_temperatures_too():
    logits = np.random.default_rng(0).normal(size=(40, 4))
    logits[:, 3] = -np.inf
    labels = np.arange(40) % 3
    folds = np.arange(40) % 2

    def fit_and_predict(fit_inputs, fit_labels, predict_inputs):
        return vqa.TemperatureScaler().fit(fit_inputs, fit_labels).transform(predict_inputs)

    probabilities = vqa.cross_fit(fit_and_predict, logits, labels, folds)
    expected = vqa.TemperatureScaler().fit(logits[1::2], labels[1::2]).transform(logits[::2])
    np.testing.assert_allclose(probabilities[::2], expected)
    with pytest.raises(ValueError, match="at least two folds"):
        vqa.cross_fit(fit_and_predict, logits, labels, np.zeros(40))


def test_a_masked_choice_gets_no_share_from_the_temperature_of_a_blend():
    members = np.array([[[0.5, 0.5, 0, 0]] * 40, [[0.4, 0.6, 0, 0]] * 40])
    mixed = vqa.fit_and_blend("mean", members, np.arange(40) % 2, members)
    assert (mixed[:, 2:] == 0).all()
    assert np.allclose(mixed.sum(axis=1), 1)


def test_a_blend_gets_its_temperature_from_the_rows_it_was_fitted_on():
    """A mean of honest, independent members is too timid; scaled, it is honest again."""
    members, labels = planted_members(8000, noise=(2**0.5, 2**0.5, 2**0.5))
    old = members[:, :4000]
    new = members[:, 4000:]
    scaled = vqa.fit_and_blend("mean", old, labels[:4000], new)
    plain = new.mean(axis=0)
    assert (scaled.argmax(1) == plain.argmax(1)).all()
    loss = vqa.negative_log_likelihood(plain, labels[4000:])
    scaled_loss = vqa.negative_log_likelihood(scaled, labels[4000:])
    assert scaled_loss < loss - 0.02
    temperature = vqa.TemperatureScaler().fit(np.log(old.mean(axis=0)), labels[:4000])
    np.testing.assert_allclose(scaled, temperature.transform(np.log(plain)))


def test_blends_of_rows_that_all_show_one_image_are_cross_fitted_by_row():
    """As in the control with grey images, which are all copies of one another."""
    random = np.random.default_rng(0)
    labels = np.arange(40) % 4
    groups = vqa.image_groups(pd.DataFrame({"pixel_hash": ["grey"] * 40}))
    assert groups.tolist() == list(range(40))
    members = vqa.softmax(2 * one_hot(labels) + random.normal(size=(2, 40, 4)))
    candidates = vqa.cross_fitted_blends(members, labels, groups)
    for candidate in candidates.values():
        assert np.isfinite(candidate.probabilities).all()
    assert np.isfinite(vqa.choose_cross_fitted(candidates, labels, groups)).all()
    assert np.isfinite(vqa.choice_interval(candidates, labels, groups)).all()
