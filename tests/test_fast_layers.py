"""Fast layers compute what the plain ones compute: PEFT's LoRA, torch without compile, every layer checkpointed."""

import bitsandbytes
import numpy as np
import peft
import pytest
import torch
from conftest import perturb_adapter
from torch._dynamo.backends.debugging import aot_eager

import vqa_helpers as vqa


def outputs_and_gradients(model, x):
    """Output, gradient of the input and of every trainable weight."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    return [y, x.grad, *(value.grad for value in vqa.trainable_parameters(model).values())]


def lora_pair(make, dropout=0.0):
    """The same layer with PEFT's own forward pass and with ours."""
    pair = []
    for fast in (False, True):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["layer"], lora_dropout=dropout)
        model = peft.get_peft_model(torch.nn.ModuleDict({"layer": make()}), config)
        perturb_adapter(model)
        layer = model.base_model.model["layer"]
        if fast:
            vqa.use_fast_lora(model)
        pair.append(layer)
    return pair


@pytest.mark.parametrize("bias", [True, False])
def test_lora_forward_equals_pefts_own_layer(bias):
    plain, fast = lora_pair(lambda: torch.nn.Linear(24, 40, bias=bias).requires_grad_(False))
    x = torch.randn(3, 5, 24)
    for ours, theirs in zip(
        outputs_and_gradients(fast, x), outputs_and_gradients(plain, x), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def quantised_layer():
    linear = torch.nn.Linear(128, 192, bias=False)
    options = {"compute_dtype": torch.bfloat16, "compress_statistics": True, "quant_type": "nf4"}
    layer = bitsandbytes.nn.Linear4bit(128, 192, bias=False, **options)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu").requires_grad_(False)


@pytest.mark.parametrize("unpacked", [True, False])
def test_lora_forward_on_4_bit_weights_equals_pefts_within_half_precision(unpacked, monkeypatch):
    monkeypatch.setattr(vqa, "MAX_UNPACKED_SCALE_BYTES", 2**28 if unpacked else 0)
    plain, fast = lora_pair(quantised_layer)
    assert plain.base_layer.weight.quant_state.nested
    assert (fast.scale_names == ("scale",)) is unpacked
    x = torch.randn(6, 7, 128, dtype=torch.bfloat16)
    for ours, theirs in zip(
        outputs_and_gradients(fast, x), outputs_and_gradients(plain, x), strict=True
    ):
        assert (ours.float() - theirs.float()).norm() <= 0.02 * theirs.float().norm()
        assert ours.dtype == theirs.dtype


def test_dropout_of_lora_forward_is_pefts_in_training_and_off_in_inference():
    plain, fast = lora_pair(lambda: torch.nn.Linear(24, 40).requires_grad_(False), dropout=0.5)
    x = torch.randn(3, 5, 24)
    for training in (True, False):
        results = []
        for layer in (fast, plain):
            torch.manual_seed(1)
            results.append(outputs_and_gradients(layer.train(training), x))
        assert all(
            torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(*results, strict=True)
        )


def test_the_operator_is_a_sound_one():
    """torch's own check of schema, fake kernel and gradient formula."""
    vqa.register_lora_operators()
    x, a, b = (
        torch.randn(2, 3, 8),
        torch.randn(2, 8, requires_grad=True),
        torch.randn(6, 2, requires_grad=True),
    )
    weight = torch.randn(6, 8)
    for dropped in (None, torch.randn(2, 3, 8, requires_grad=True)):
        arguments = (x.requires_grad_(), dropped, a, b, 2.0, weight, torch.randn(6), [], [6, 8])
        torch.library.opcheck(torch.ops.vqa.lora_linear.default, arguments)


def gradients(session, frame, **overrides):
    """LoRA gradients of one training batch after `prepare`."""
    model = perturb_adapter(vqa.attach_lora(session.model, session.config, seed=0)).train()
    try:
        for name, change in overrides.items():
            getattr(vqa, name)(session, *change(model))
        prompts = [vqa.make_prompt(session, frame, row, [(0, 1, 2, 3)]) for row in range(3)]
        batch = vqa.collate(session, prompts)
        vqa.training_loss(session, vqa.answer_hidden_states(session, batch), batch).backward()
        return torch.cat(
            [value.grad.flatten() for value in vqa.trainable_parameters(model).values()]
        )
    finally:
        model.unload()


def test_fast_and_selectively_checkpointed_gradients_are_the_plain_ones(session, demo_rows):
    plain = gradients(session, demo_rows.train)
    quick = gradients(session, demo_rows.train, use_fast_layers=lambda model: (model, 1))
    assert (quick - plain).norm() <= 1e-5 * plain.norm()
    for stored in (0, 1):
        steps = {
            "use_fast_layers": lambda model: (model, 1),
            "recompute_layers": lambda model, stored=stored: (stored,),
        }
        again = gradients(session, demo_rows.train, **steps)
        assert (again - plain).norm() <= 1e-6 * plain.norm()


def test_the_last_layers_keep_their_activations(session):
    vqa.recompute_layers(session, 1)
    flags = [layer.recompute for layer in session.decoder_layers]
    assert flags == [True] * (len(flags) - 1) + [False]


def test_compiled_layers_give_the_plain_gradients_and_one_compilation_serves_all(
    session, demo_rows, monkeypatch
):
    """Through torch's own tracing and differentiation, without a C compiler: the code generator is torch's affair."""
    plain = gradients(session, demo_rows.train)
    compiled = []

    def counting(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    original = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **options: original(function, backend=counting, **options),
    )
    session.config = vqa.dataclasses.replace(session.config, compile_layers="on")
    quick = gradients(session, demo_rows.train, use_fast_layers=lambda model: (model, 1))
    assert (quick - plain).norm() <= 1e-5 * plain.norm()
    assert len(compiled) == 1
    again = gradients(
        session, demo_rows.train, use_fast_layers=lambda model: (model, 1)
    )  # the next fold's adapter
    assert torch.equal(again, quick) and len(compiled) == 1


@pytest.mark.parametrize(
    ("wish", "device", "questions", "expected", "reason"),
    [
        ("on", "cpu", 1, True, "set in the config"),
        ("off", "cuda", 10**6, False, "set in the config"),
        ("auto", "cpu", 10**6, False, "needs a GPU"),
        ("auto", "cuda", 100, False, "less time than compiling"),
        ("auto", "cuda", 10**6, True, "to come"),
    ],
)
def test_layers_are_compiled_where_it_pays(wish, device, questions, expected, reason, monkeypatch):
    monkeypatch.setattr(vqa.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(vqa.shutil, "which", lambda name: name)
    use, why = vqa.decide_compile(wish, device, questions)
    assert use is expected and reason in why


def test_plans_fit_the_memory_and_halve_the_step():
    costs = (10.0, 1.0, 0.5)  # fixed, a question, each of its kept layers
    for budget in (12, 20, 40, 100, 1000):
        for micro_batch, stored in vqa.candidate_plans(
            costs, budget, layers=36, step=32, recompute=True
        ):
            assert 10 + micro_batch * (1 + max(1, stored) * 0.5) <= budget
    assert vqa.candidate_plans(costs, 60, 36, 32, recompute=True) == [
        (32, 0),
        (16, 4),
        (8, 10),
        (4, 23),
        (2, 36),
    ]
    assert vqa.candidate_plans(costs, 60, 36, 32, recompute=False) == [(2, 36)]
    assert vqa.candidate_plans(costs, 5, 36, 32, recompute=True) == []
    assert [size for size, _ in vqa.candidate_plans(costs, 1000, 36, 10, True)] == [10, 5, 3, 2]
    assert vqa.candidate_plans(costs, 1000, 36, 1, True) == [(1, 36)]


def test_on_a_cpu_the_plan_is_the_configs(session, demo_rows, replace):
    prompts = [vqa.make_prompt(session, demo_rows.train, 0, [(0, 1, 2, 3)])]
    layers = len(session.decoder_layers)
    assert vqa.plan_memory(session, prompts, 0) == vqa.MemoryPlan(8, layers)
    session.config = replace(session.config, gradient_checkpointing=True, batch_size=3)
    assert vqa.plan_memory(session, prompts, 0) == vqa.MemoryPlan(3, 0)


def test_items_are_prepared_ahead_in_order():
    begun = []
    items = vqa.prefetch(begun.append(number) or number for number in range(4))
    assert next(items) == 0 and [*items] == [1, 2, 3] and begun == [0, 1, 2, 3]


@pytest.fixture
def planned(session, demo_rows, monkeypatch):
    """planned(room, layers) -> the plan of a GPU of `room` bytes on which a pass costs what the formula says."""

    def plan(room, layers=36, state=0, expert=0.0, recompute=True):
        def measure_pass(_, prompts, stored):
            peak = 1000 * (10 + len(prompts) * (1 + 0.5 * max(1, stored)) + expert * max(1, stored))
            fits = peak + state <= room
            return (len(prompts) * (3 - stored / layers) + 1, peak) if fits else (np.inf, np.inf)

        class Layers:
            device, config, decoder_layers = torch.device("cuda"), session.config, [None] * layers

        settings = {"batch_size": 16, "grad_accum_steps": 2, "gradient_checkpointing": recompute}
        Layers.config = vqa.dataclasses.replace(session.config, **settings)
        monkeypatch.setattr(vqa, "measure_pass", measure_pass)
        monkeypatch.setattr(vqa, "memory_budget", lambda: 0.92 * room)
        monkeypatch.setattr(vqa, "clear_memory", lambda: None)  # seconds, after other tests
        prompts = [vqa.make_prompt(session, demo_rows.train, 0, [(0, 1, 2, 3)])]
        return vqa.plan_memory(Layers(), prompts, state)

    return plan


def test_the_fastest_plan_that_fits_is_chosen(planned):
    assert planned(10**6) == vqa.MemoryPlan(32, 36, (10 + 32 * 19) * 1000 / 2**30)
    middle = planned(100_000)
    assert middle == vqa.MemoryPlan(4, 36, (10 + 4 * 19) * 1000 / 2**30)
    later = planned(100_000, state=40_000)  # what the optimizer will allocate counts
    assert later.micro_batch < 4 and middle.peak_gib / 2 < later.peak_gib <= 92_000 / 2**30


def test_a_small_model_and_a_small_card_get_a_plan_too(planned):
    assert planned(10**6, layers=4).stored_layers == 4
    assert planned(12_000) == planned(5_000) == vqa.MemoryPlan(1, 0)


def test_layers_that_cannot_keep_their_weights_out_of_4_bits_still_share_a_pass(planned):
    """Each layer of a mixture of experts takes as much as several questions, for one question already."""
    assert planned(40_000, expert=15.0) == vqa.MemoryPlan(4, 0, (10 + 4 * 1.5 + 15) * 1000 / 2**30)
    assert planned(40_000, expert=15.0, recompute=False) == vqa.MemoryPlan(
        1, 36
    )  # nothing fits: the last resort


def test_a_pass_without_memory_leaves_no_gradient_behind(session, demo_rows, monkeypatch):
    model = vqa.attach_lora(session.model, session.config, seed=0).train()
    vqa.use_fast_layers(session, model, 1)
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "max_memory_allocated", lambda gpu: (5, 7)[gpu]
    )  # the fuller one counts
    prompts, loss = (
        [vqa.make_prompt(session, demo_rows.train, 0, [(0, 1, 2, 3)])],
        vqa.training_loss,
    )
    assert vqa.measure_pass(session, prompts, 0)[1] == 7

    def failing(*arguments):
        value = loss(*arguments)
        value.backward()  # some gradients are there
        raise torch.OutOfMemoryError("a test")

    monkeypatch.setattr(vqa, "training_loss", failing)
    assert vqa.measure_pass(session, prompts, 0) == (np.inf, np.inf)
    assert all(value.grad is None for value in vqa.trainable_parameters(model).values())


def test_layers_of_another_kind_keep_pefts_forward():
    class Other(torch.nn.Linear):
        """As FP8Linear: its weight alone does not say what it computes."""

    for make, lean in ((torch.nn.Linear, True), (Other, False)):
        _, fast = lora_pair(lambda make=make: make(24, 40).requires_grad_(False))
        assert type(fast).__name__.startswith("Fast") is lean
