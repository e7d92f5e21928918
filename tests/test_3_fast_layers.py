"""Part 3, Fast layers: they compute what PEFT's LoRA and torch without compiling compute."""

import functools
import logging

import bitsandbytes
import peft
import pytest
import torch
from references import flat_gradients, perturb_adapter
from running import ROTATIONS, batch_loss, count_compilations, plain_batch

import vqa_helpers as vqa

# --- LoRA -----------------------------------------------------------------------------------------


def outputs_and_gradients(model, x):
    """Output, gradient of the input and of every trainable weight."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    return [y, x.grad, *(value.grad for value in vqa.trainable_parameters(model).values())]


def lora_pair(make, dropout=0.0, rank=4):
    """The same layer with PEFT's own forward pass and with ours."""
    pair = []
    for fast in (False, True):
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=["layer"], lora_dropout=dropout
        )
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
    ours = outputs_and_gradients(fast, x)
    theirs = outputs_and_gradients(plain, x)
    for our_tensor, their_tensor in zip(ours, theirs, strict=True):
        assert torch.allclose(our_tensor, their_tensor, rtol=1e-5, atol=1e-5)


def quantised_layer():
    linear = torch.nn.Linear(128, 192, bias=False)
    layer = bitsandbytes.nn.Linear4bit(
        128,
        192,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu").requires_grad_(False)


@pytest.mark.parametrize("unpacked", [True, False])
def test_lora_forward_on_4_bit_weights_equals_pefts_within_half_precision(unpacked, monkeypatch):
    monkeypatch.setattr(vqa, "MAX_UNPACKED_SCALE_BYTES", 2**28 if unpacked else 0)
    plain, fast = lora_pair(quantised_layer)
    assert plain.base_layer.weight.quant_state.nested
    assert (fast.scale_names == ("scale",)) is unpacked
    x = torch.randn(6, 7, 128, dtype=torch.bfloat16)
    ours = outputs_and_gradients(fast, x)
    theirs = outputs_and_gradients(plain, x)
    for our_tensor, their_tensor in zip(ours, theirs, strict=True):
        difference = our_tensor.float() - their_tensor.float()
        assert difference.norm() <= 0.02 * their_tensor.float().norm()
        assert our_tensor.dtype == their_tensor.dtype


def test_dropout_of_lora_forward_is_pefts_in_training_and_off_in_inference():
    plain, fast = lora_pair(lambda: torch.nn.Linear(24, 40).requires_grad_(False), dropout=0.5)
    x = torch.randn(3, 5, 24)
    for training in (True, False):
        torch.manual_seed(1)
        ours = outputs_and_gradients(fast.train(training), x)
        torch.manual_seed(1)
        theirs = outputs_and_gradients(plain.train(training), x)
        for our_tensor, their_tensor in zip(ours, theirs, strict=True):
            assert torch.allclose(our_tensor, their_tensor, atol=1e-5)


def test_the_operator_is_a_sound_one():
    """torch's own check of schema, fake kernel and gradient formula."""
    vqa.register_lora_operators()
    x = torch.randn(2, 3, 8)
    a = torch.randn(2, 8, requires_grad=True)
    b = torch.randn(6, 2, requires_grad=True)
    weight = torch.randn(6, 8)
    for dropped in (None, torch.randn(2, 3, 8, requires_grad=True)):
        arguments = (x.requires_grad_(), dropped, a, b, 2.0, weight, torch.randn(6), [], [6, 8])
        torch.library.opcheck(torch.ops.vqa.lora_linear.default, arguments)


def test_layers_of_another_kind_keep_pefts_forward():
    class Other(torch.nn.Linear):
        """As FP8Linear: its weight alone does not say what it computes."""

    _, linear = lora_pair(lambda: torch.nn.Linear(24, 40).requires_grad_(False))
    assert type(linear).__name__.startswith("Fast")
    _, other = lora_pair(lambda: Other(24, 40).requires_grad_(False))
    assert not type(other).__name__.startswith("Fast")


# --- Decoder layers -------------------------------------------------------------------------------


def lora_gradients(session, frame, fast=True, stored_layers=None):
    """LoRA gradients of one training batch, by fast layers or plain ones.

    With `stored_layers`, only so many layers keep their activations.
    """
    model = perturb_adapter(vqa.attach_lora(session.model, session.config, seed=0)).train()
    try:
        if fast:
            vqa.use_fast_layers(session, model, 1)
        if stored_layers is not None:
            vqa.recompute_layers(session, stored_layers)
        batch_loss(session, plain_batch(session, frame, range(3))).backward()
        return flat_gradients(model)
    finally:
        model.unload()


def test_fast_and_selectively_checkpointed_gradients_are_the_plain_ones(session, demo_rows):
    plain = lora_gradients(session, demo_rows.train, fast=False)
    fast = lora_gradients(session, demo_rows.train)
    assert (fast - plain).norm() <= 1e-5 * plain.norm()
    for stored_layers in (0, 1):
        again = lora_gradients(session, demo_rows.train, stored_layers=stored_layers)
        assert (again - plain).norm() <= 1e-6 * plain.norm()


@pytest.mark.slow
def test_compiled_layers_give_the_plain_gradients_and_one_compilation_serves_all(
    session, demo_rows, replace, monkeypatch
):
    """Through torch's own tracing and differentiation, but without a C compiler.

    The code generator is torch's affair.
    """
    plain = lora_gradients(session, demo_rows.train, fast=False)
    compiled = count_compilations(monkeypatch)
    session.config = replace(session.config, compile_layers="on")
    fast = lora_gradients(session, demo_rows.train)
    assert (fast - plain).norm() <= 1e-5 * plain.norm()
    assert len(compiled) == 1
    of_the_next_fold = lora_gradients(session, demo_rows.train)
    assert torch.equal(of_the_next_fold, fast)
    assert len(compiled) == 1


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
    assert use is expected
    assert reason in why


@pytest.mark.slow
def test_recurrent_layers_are_compiled_around_their_rule(
    model_folders, demo_rows, replace, monkeypatch
):
    config = vqa.Config.preset("demo", model_id=str(model_folders["qwen3_5"]), label_smoothing=0.0)
    session = vqa.open_session(config, demo_rows.train.iloc[0])
    plain = lora_gradients(session, demo_rows.train, fast=False)
    scores = vqa.predict_logits(session, demo_rows.test.head(5), ROTATIONS)
    compiled = count_compilations(monkeypatch)
    session.config = replace(config, compile_layers="on")
    fast = lora_gradients(session, demo_rows.train)
    assert (fast - plain).norm() <= 1e-5 * plain.norm()
    # Three before the rule, two behind it, and the layer with attention.
    assert len(compiled) == 6
    assert torch.equal(lora_gradients(session, demo_rows.train, stored_layers=0), fast)
    assert len(compiled) == 6
    compiled_scores = vqa.predict_logits(session, demo_rows.test.head(5), ROTATIONS)
    assert abs(compiled_scores - scores).max() <= 1e-5
    behind_prefixes = len(compiled)
    assert behind_prefixes > 6
    vqa.predict_logits(session, demo_rows.test.iloc[5:8], ROTATIONS)  # of other lengths
    assert len(compiled) == behind_prefixes


def test_every_kind_of_layer_is_compiled_also_where_there_are_many(monkeypatch):
    compiled = count_compilations(monkeypatch)
    forward = vqa._compile_forward(lambda layer, states: layer(states))
    for count in range(1, 11):
        layer = torch.nn.Sequential(*[torch.nn.ReLU() for _ in range(count)])
        assert forward(layer, torch.ones(2)).tolist() == [1, 1]
    assert len(compiled) == 10


# --- Several kinds of layers ----------------------------------------------------------------------


def packed_layer(
    quant_type="nf4", double=False, storage=torch.uint8, inputs=128, outputs=192, bias=False
):
    layer = bitsandbytes.nn.Linear4bit(
        inputs,
        outputs,
        bias=bias,
        compute_dtype=torch.float32,
        compress_statistics=double,
        quant_type=quant_type,
        quant_storage=storage,
    )
    layer.load_state_dict(torch.nn.Linear(inputs, outputs, bias=bias).state_dict())
    return layer.to("cpu").requires_grad_(False)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_weights_whose_scales_are_not_quantised_go_through_our_layer_too(storage):
    plain, fast = lora_pair(lambda: packed_layer(storage=storage))
    assert not plain.base_layer.weight.quant_state.nested
    assert type(fast).__name__.startswith("Fast")
    assert fast.scale_names == ("scale",)
    x = torch.randn(3, 5, 128)
    ours = outputs_and_gradients(fast.train(), x)
    theirs = outputs_and_gradients(plain.train(), x)
    for our_tensor, their_tensor in zip(ours, theirs, strict=True):
        assert (our_tensor - their_tensor).norm() <= 1e-5 * their_tensor.norm()


def test_each_layer_of_a_mixed_model_is_computed_by_its_own_kind(caplog):
    kinds = {
        "in_fp4": lambda: packed_layer("fp4"),
        "in_single_nf4": packed_layer,
        "in_double_nf4": lambda: packed_layer(double=True),
        "in_fp32": lambda: torch.nn.Linear(128, 192).requires_grad_(False),
    }
    layers = torch.nn.ModuleDict({name: make() for name, make in kinds.items()})
    adapted = peft.get_peft_model(layers, peft.LoraConfig(r=4, target_modules=list(kinds)))
    caplog.set_level(logging.INFO, "vqa")
    vqa.use_fast_lora(adapted)
    is_ours = {}
    for name in kinds:
        layer = adapted.base_model.model[name]
        is_ours[name] = type(layer).__name__.startswith("Fast")
    assert is_ours == {
        "in_fp4": False,
        "in_single_nf4": True,
        "in_double_nf4": True,
        "in_fp32": True,
    }
    assert "Decision: 1 Linear4bit layers of PEFT stay as they are" in caplog.text


def score_compiled(layer, x, monkeypatch):
    """A layer's output as compiled decoder layers score, and what the compiled graph calls."""
    compiled = count_compilations(monkeypatch)
    forward = vqa._compile_forward(lambda layer, x: layer(x))
    with torch.inference_mode():
        output = forward(layer.eval(), x)
    [graph] = compiled
    return output, [str(node.target) for node in graph.graph.nodes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize(("double", "bias"), [(False, True), (True, False)])
def test_compiled_scoring_takes_the_adapter_into_the_product_with_4_bit_weights(
    double, bias, storage, dtype, monkeypatch
):
    make = functools.partial(packed_layer, double=double, bias=bias, storage=storage)
    _, layer = lora_pair(make, dropout=0.5, rank=8)
    if bias:
        layer.base_layer.bias.data = torch.randn(192, dtype=dtype)
    x = torch.randn(3, 5, 128, dtype=dtype)
    found, names = score_compiled(layer, x, monkeypatch)
    expected = layer(x)
    assert found.shape == expected.shape
    # Half precision rounds the plain layer's sum twice.
    tolerance = 4 * torch.finfo(dtype).eps
    assert (found - expected).norm() <= tolerance * expected.norm()
    assert len([name for name in names if "linear" in name]) == 1
    assert len([name for name in names if "cat" in name]) == 2  # x with A x, W with B


@pytest.mark.parametrize(("inputs", "rank"), [(128, 4), (192, 8), (256, 8)])
def test_an_adapter_stays_beside_a_product_that_would_gain_nothing(inputs, rank, monkeypatch):
    """A tensor core wants multiples of 8, and more inputs than outputs are long to copy."""
    _, layer = lora_pair(lambda: packed_layer(inputs=inputs), rank=rank)
    x = torch.randn(3, 5, inputs)
    found, names = score_compiled(layer, x, monkeypatch)
    assert torch.equal(found, layer(x))
    assert [name for name in names if "vqa.lora_linear" in name]


def test_an_adapter_that_asks_for_gradients_in_scoring_gets_them(monkeypatch):
    _, layer = lora_pair(packed_layer, rank=8)
    count_compilations(monkeypatch)
    forward = vqa._compile_forward(lambda layer, x: layer(x))
    forward(layer.eval(), torch.randn(3, 5, 128)).square().sum().backward()
    gradient = layer.lora_B["default"].weight.grad
    assert gradient.norm() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_is_not_compiled_computes_the_operators_numbers_without_it(
    bias, dropout, monkeypatch
):
    _, layer = lora_pair(lambda: torch.nn.Linear(24, 40, bias=bias).requires_grad_(False), dropout)
    x = torch.randn(3, 5, 24)
    operator = torch.ops.vqa.lora_linear
    results = []
    for compute in (operator, vqa.direct_lora()):
        monkeypatch.setattr(vqa, "direct_lora", lambda compute=compute: compute)
        torch.manual_seed(1)  # of dropout
        results.append(outputs_and_gradients(layer, x))
    for by_operator, direct in zip(*results, strict=True):
        assert torch.equal(by_operator, direct)
    with torch.profiler.profile() as profile:
        outputs_and_gradients(layer, x)
    assert not [event.key for event in profile.key_averages() if "vqa::" in event.key]
