"""Part 3, Memory plan: the fastest way to spread a training step over passes that fits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import plain_prompts, quiet

import vqa_helpers as vqa


def test_the_last_layers_keep_their_activations(session):
    vqa.recompute_layers(session, 1)
    flags = [layer.recompute for layer in session.decoder_layers]
    assert flags == [True] * (len(flags) - 1) + [False]


def test_plans_fit_the_memory_and_halve_the_step():
    costs = vqa.PassCosts(fixed=10.0, question=1.0, stored_layer=0.5)
    for budget in (12, 20, 40, 100, 1000):
        plans = vqa.candidate_plans(costs, budget, layers=36, step=32, recompute=True)
        for micro_batch, stored in plans:
            assert 10 + micro_batch * (1 + max(1, stored) * 0.5) <= budget
    assert vqa.candidate_plans(costs, 60, 36, 32, recompute=True) == [
        (32, 0),
        (16, 4),
        (11, 7),
        (8, 10),
        (7, 12),
        (6, 14),
        (5, 18),
        (4, 23),
        (3, 31),
        (2, 36),
        (1, 36),
    ]
    assert vqa.candidate_plans(costs, 60, 36, 32, recompute=False) == [(2, 36), (1, 36)]
    assert vqa.candidate_plans(costs, 5, 36, 32, recompute=True) == []
    assert [size for size, _ in vqa.candidate_plans(costs, 1000, 36, 10, True)] == [10, 5, 3, 2, 1]
    assert vqa.candidate_plans(costs, 1000, 36, 1, True) == [(1, 36)]


def test_on_a_cpu_the_plan_is_the_configs(session, demo_rows, replace):
    prompts = plain_prompts(session, demo_rows.train, [0])
    layers = len(session.decoder_layers)
    assert vqa.plan_memory(session, prompts, 0) == vqa.MemoryPlan(8, layers)
    session.config = replace(session.config, gradient_checkpointing=True, batch_size=3)
    assert vqa.plan_memory(session, prompts, 0) == vqa.MemoryPlan(3, 0)


@pytest.fixture
def planned(session, demo_rows, replace, monkeypatch):
    """planned(room, layers) -> the plan of a GPU of `room` bytes, where a pass costs so much."""

    def plan(room, layers=36, state=0, expert=0.0, recompute=True):
        def measure_pass(_, prompts, stored, is_captured):
            """Seconds and bytes of a pass; infinite where it does not fit."""
            kept_layers = max(1, stored)
            questions = len(prompts)
            peak = 1000 * (10 + questions * (1 + 0.5 * kept_layers) + expert * kept_layers)
            if peak + state > room:
                return np.inf, np.inf
            return questions * (3 - stored / layers) + 1, peak

        on_a_gpu = SimpleNamespace(
            device=torch.device("cuda"),
            decoder_layers=[None] * layers,
            captured_passes=None,
            is_frugal=True,
            config=replace(
                session.config,
                batch_size=16,
                grad_accum_steps=2,
                gradient_checkpointing=recompute,
            ),
        )
        monkeypatch.setattr(vqa, "measure_pass", measure_pass)
        monkeypatch.setattr(vqa, "memory_budget", lambda: 0.92 * room)
        monkeypatch.setattr(vqa, "clear_memory", lambda: None)  # seconds, after other tests
        prompts = plain_prompts(session, demo_rows.train, [0])
        return vqa.plan_memory(on_a_gpu, prompts, state)

    return plan


def gib(thousands):
    """Of that many thousands of bytes."""
    return thousands * 1000 / 2**30


def test_the_fastest_plan_that_fits_is_chosen(planned):
    assert planned(10**6) == vqa.MemoryPlan(32, 36, gib(10 + 32 * 19))
    middle = planned(100_000)
    assert middle == vqa.MemoryPlan(4, 36, gib(10 + 4 * 19))
    later = planned(100_000, state=40_000)  # what the optimizer will allocate counts
    assert later.micro_batch < 4
    assert middle.peak_gib / 2 < later.peak_gib <= 92_000 / 2**30


def test_a_small_model_and_a_small_card_get_a_plan_too(planned):
    assert planned(10**6, layers=4).stored_layers == 4
    assert planned(12_000) == planned(5_000) == vqa.MemoryPlan(1, 0)


def test_layers_that_cannot_keep_their_weights_out_of_4_bits_still_share_a_pass(planned):
    """One layer of a mixture of experts takes as much as several questions, for one already."""
    assert planned(40_000, expert=15.0) == vqa.MemoryPlan(4, 0, gib(10 + 4 * 1.5 + 15))
    last_resort = vqa.MemoryPlan(1, 36)  # nothing fits
    assert planned(40_000, expert=15.0, recompute=False) == last_resort


def test_a_pass_without_memory_leaves_no_gradient_behind(session, demo_rows, monkeypatch):
    model = vqa.attach_lora(session.model, session.config, seed=0).train()
    vqa.use_fast_layers(session, model, 1)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", quiet)
    monkeypatch.setattr(torch.cuda, "synchronize", quiet)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: (5, 7)[gpu])
    prompts = plain_prompts(session, demo_rows.train, [0])
    loss = vqa.training_loss
    _, peak = vqa.measure_pass(session, prompts, 0)
    assert peak == 7  # of the fuller one

    def failing(*arguments):
        value = loss(*arguments)
        value.backward()  # some gradients are there
        raise torch.OutOfMemoryError("a test")

    monkeypatch.setattr(vqa, "training_loss", failing)
    assert vqa.measure_pass(session, prompts, 0) == (np.inf, np.inf)
    assert all(value.grad is None for value in vqa.trainable_parameters(model).values())
