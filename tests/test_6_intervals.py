"""Part 6, Intervals and paired tests: how sure a gain is, where several rows show one image."""

import numpy as np
import pytest
from planted import one_hot
from scipy.stats import binomtest

import vqa_helpers as vqa


def interval(changes, groups, *arguments):
    """Low and high end of the first column's interval."""
    return vqa.bootstrap_interval(changes, groups, *arguments)[:, 0]


def width(changes, groups):
    low, high = interval(changes, groups)
    return high - low


def test_the_interval_is_that_of_the_mean_when_rows_are_independent():
    changes = np.random.default_rng(0).normal(loc=0.3, size=(400, 1))
    low, high = interval(changes, np.arange(400))
    error = changes.std() / 20
    assert low == pytest.approx(changes.mean() - 1.645 * error, abs=0.012)
    assert high == pytest.approx(changes.mean() + 1.645 * error, abs=0.012)


def test_rows_of_one_image_count_as_one_observation():
    """The same 100 values four times over hold no more evidence than once."""
    values = np.random.default_rng(0).normal(size=(100, 1))
    once = width(values, np.arange(100))
    repeated = np.repeat(values, 4, axis=0)
    copies = width(repeated, np.repeat(np.arange(100), 4))
    independent = width(repeated, np.arange(400))
    assert copies == pytest.approx(once, rel=0.05)
    assert independent < 0.6 * once


def test_rows_that_one_step_has_not_scored_are_left_out_of_the_interval():
    changes = np.array([[1.0], [np.nan]] * 500)
    np.testing.assert_allclose(interval(changes, np.arange(1000)), [1.0, 1.0], atol=0.02)
    nothing = interval(np.full((9, 1), np.nan), np.arange(9))
    np.testing.assert_allclose(nothing, [-(0.5**0.5), 0.5**0.5])


def test_no_difference_on_few_rows_is_no_certainty():
    low, high = interval(np.zeros((100, 1)), np.arange(100))
    assert -0.04 < low < -0.01
    assert 0.01 < high < 0.04


def test_the_more_numbers_a_step_fits_the_less_its_nll_is_known():
    """Nothing changes: what is left of the interval is the uncertainty of fitting, sqrt(p) / n."""
    low, high = vqa.bootstrap_interval(np.zeros((100, 2)), np.arange(100), [1, 4])
    one, four = high - low
    assert four == pytest.approx(2 * one)
    assert one == pytest.approx(4 * 0.5**0.5 / 102)

    labels = np.arange(200) % 4
    same = one_hot(labels) * 0.6 + 0.1
    steps = {
        "old": vqa.LadderStep(same),
        "none": vqa.LadderStep(same, "old"),
        "one": vqa.LadderStep(same, "old", fitted_parameters=1),
        "four": vqa.LadderStep(same, "old", fitted_parameters=4),
    }
    table = vqa.ladder_table(steps, labels, np.arange(200))
    expected = [0, (0.5**0.5) * 2 / 202, (0.5**0.5) * 4 / 202]
    assert table["nll_high"].tolist()[1:] == pytest.approx(expected)
    assert table["gain_high"].nunique() == 1


def test_the_table_shows_gain_interval_and_exact_test_of_the_same_rows():
    labels = np.arange(200) % 4
    right = one_hot(labels) * 0.6 + 0.1
    wrong = one_hot((labels + 1) % 4) * 0.6 + 0.1
    number = np.arange(200)[:, None]
    old = np.where(number < 150, right, wrong)
    new = np.where(number < 170, right, wrong)
    steps = {"old": vqa.LadderStep(old), "new": vqa.LadderStep(new, "old", used=True)}
    row = vqa.ladder_table(steps, labels, np.arange(200)).loc["new"]
    assert row["gain"] == pytest.approx(0.1)
    assert row["p_value"] == pytest.approx(2 * 0.5**20)
    assert 0.05 < row["gain_low"] < 0.1 < row["gain_high"] < 0.15
    assert row["nll_change"] == pytest.approx(0.1 * np.log(0.1 / 0.7))
    assert row["nll_high"] < 0
    assert row["against"] == "old"
    assert row["used"]


# --- Paired tests ---------------------------------------------------------------------------------


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
    nothing = {"gain": 0.0, "wins": 0, "losses": 0, "p_value": 1.0}
    assert vqa.compare_paired([1, 0], [1, 0]) == nothing
    assert vqa.compare_paired([], []) == nothing
    with pytest.raises(ValueError, match="need the same rows twice"):
        vqa.compare_paired([1, 0], [1, 0, 1])
