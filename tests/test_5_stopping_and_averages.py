"""Part 5, Early stopping and weight averages: for any training loop, without a Config."""

import math

import numpy as np
import pytest
import torch

import vqa_helpers as vqa

# --- Early stopping -------------------------------------------------------------------------------


def test_early_stopping_stops_a_loop():
    early_stopping = vqa.EarlyStopping(patience=2, mode="max", min_delta=0.01)
    seen = []
    for val_acc in (0.5, 0.6, 0.605, 0.60, 0.9):  # 0.605 is no gain of more than 0.01
        seen.append(val_acc)
        if early_stopping(val_acc):
            break
    assert seen[-1] == 0.60
    assert early_stopping.best == 0.6


def test_early_stopping_takes_nan_for_no_gain_and_the_next_value_for_the_best():
    early_stopping = vqa.EarlyStopping(patience=2)
    assert not early_stopping(math.nan)
    assert not early_stopping(0.5)
    assert early_stopping.best == 0.5


def test_early_stopping_can_minimise_and_continues_from_its_state():
    first = vqa.EarlyStopping(patience=2, mode="min")
    assert not first(1.0)
    assert not first(1.1)
    second = vqa.EarlyStopping(patience=2, mode="min")
    second.load_state_dict(first.state_dict())
    assert second(1.2)
    with pytest.raises(ValueError, match="mode must be"):
        vqa.EarlyStopping(patience=1, mode="largest")


# --- Weight averages ------------------------------------------------------------------------------


def run_average(kind, values, decay=0.999):
    parameter = torch.nn.Parameter(torch.tensor([float(values[0])]))
    averager = vqa.WeightAverager(kind, {"w": parameter}, decay)
    for value in values:
        with torch.no_grad():
            parameter.fill_(value)
        averager.update()
    return averager.average["w"].item()


def test_ema_equals_its_closed_form_and_forgets_the_start():
    values = [5.0, *np.linspace(0, 1, 99)]
    expected = values[0]
    for step in range(1, 100):
        decay = min(0.999, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * values[step]
    assert run_average("ema", values) == pytest.approx(expected, rel=1e-5)
    weights = np.prod([(1 + step) / (10 + step) for step in range(1, 100)])
    assert weights < 1e-6  # with a constant 0.999 the first value would still weigh 0.905


def test_ema_decay_is_bounded_by_the_configured_one():
    assert run_average("ema", [0.0, 0.0, 1.0], decay=0.1) == pytest.approx(0.9)


def test_swa_is_the_plain_mean():
    assert run_average("swa", [1.0, 2.0, 6.0]) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="kind must be"):
        vqa.WeightAverager("mean", {})
