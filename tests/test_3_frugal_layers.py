"""Part 3, Frugal layers and Remade activations: less is kept, and the gradients are the same."""

import contextlib
import functools
import re
import threading
from types import SimpleNamespace

import bitsandbytes
import new_models
import peft
import pytest
import torch
import transformers
from references import flat_gradients, perturb_adapter
from running import batch_loss, count_compilations, plain_batch
from stored_models import config_of

import vqa_helpers as vqa

DECIDE = vqa.decide_frugal
FAMILIES = ["qwen3_vl", "qwen2_5_vl", "qwen3_vl_moe", "internvl", "qwen3_5", "qwen3_5_moe"]


class SeededDropout(torch.nn.Dropout):
    """Dropout of the plain layers that drops what frugal ones drop."""

    def __init__(self, rate, name, seeds, is_step):
        super().__init__(rate)
        self.name = name
        self.seeds = seeds  # the last one, of all of a model's layers
        self.is_step = is_step  # else autograd computes its layer, and dropout as it is

    def forward(self, x):
        if self.name in ("q_proj", "in_proj_qkv"):
            self.seeds[:] = [vqa.draw_seed(x.device)]
        if not self.is_step:
            return super().forward(x)
        places = {
            "o_proj": vqa.SEED_OF_OUTPUT,
            "gate_proj": vqa.SEED_OF_MLP,
            "up_proj": vqa.SEED_OF_MLP,
            "down_proj": vqa.SEED_OF_DOWN,
        }
        return vqa.drop(x, self.p, self.seeds[0] + places.get(self.name, 0))


@contextlib.contextmanager
def training_model(session, frugal):
    """The model with an adapter, in frugal layers or plain ones, as on a GPU."""
    model = perturb_adapter(vqa.attach_lora(session.model, session.config, seed=0)).train()
    seeds = []
    left_to_autograd = "shared_expert"
    if vqa.is_hybrid(session.decoder_layers[0]):
        left_to_autograd += "|self_attn|out_proj"
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_dropout") and not frugal and session.config.lora_dropout:
            is_step = not re.search(left_to_autograd, name)
            kind = name.split(".")[-1]
            dropout = SeededDropout(session.config.lora_dropout, kind, seeds, is_step)
            layer.lora_dropout["default"] = dropout
    vqa.decide_frugal = lambda session: (frugal, "")
    try:
        yield vqa.use_fast_layers(session, model, 1)
    finally:
        vqa.decide_frugal = DECIDE
        model.unload()


def loss_and_gradients(session, frame, frugal, rows=3, stored_layers=None):
    """One value and the LoRA gradients of a batch; only so many layers keep their activations."""
    with training_model(session, frugal) as model:
        if frugal:
            assert all(vqa.is_frugal(layer) for layer in session.decoder_layers)
        if stored_layers is not None:
            vqa.recompute_layers(session, stored_layers)
        torch.manual_seed(3)
        loss = batch_loss(session, plain_batch(session, frame, range(rows)))
        # On a GPU the backward pass has a thread of its own, where torch's options are others.
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        return torch.cat([loss.detach()[None], flat_gradients(model)])


def assert_plain_to_the_bit(session, frame, rows, kept):
    """Each number in `kept`: so many layers keep their activations, the first ones recompute."""
    plain = loss_and_gradients(session, frame, frugal=False, rows=rows)
    for stored_layers in kept:
        frugal = loss_and_gradients(session, frame, True, rows, stored_layers)
        assert torch.equal(frugal, plain), stored_layers


def test_loss_and_gradients_are_the_plain_layers_to_the_bit(open_tiny, demo_rows):
    """Padded questions, dropout, one layer of each kind."""
    session = open_tiny("qwen3_vl", lora_dropout=0.3)
    assert_plain_to_the_bit(session, demo_rows.train, rows=3, kept=[1])


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "dropout"), [(3, 0.3), (1, 0.0)], ids=["mask", "no mask"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_each_family_are_the_plain_ones_to_the_bit(
    family, rows, dropout, open_tiny, demo_rows
):
    session = open_tiny(family, lora_dropout=dropout)
    assert_plain_to_the_bit(session, demo_rows.train, rows, kept=[0, 2])


@pytest.mark.parametrize("family", ["qwen3_vl", pytest.param("qwen3_5", marks=pytest.mark.slow)])
def test_gradients_on_16_bit_weights_are_the_plain_ones(family, open_tiny, demo_rows):
    session = open_tiny(family, lora_dropout=0.5)  # of 0.3 the CPU rounds the scale to bf16
    session.model.to(torch.bfloat16)
    assert session.decoder_layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    plain = loss_and_gradients(session, demo_rows.train, frugal=False)
    frugal = loss_and_gradients(session, demo_rows.train, frugal=True)
    assert torch.equal(frugal, plain)


@pytest.mark.slow
def test_gradients_on_4_bit_weights_are_the_plain_ones(
    stored_double, four_bits_on_the_cpu, demo_rows
):
    session = vqa.open_session(config_of(stored_double), demo_rows.train.iloc[0])
    plain = loss_and_gradients(session, demo_rows.train, frugal=False)
    frugal = loss_and_gradients(session, demo_rows.train, frugal=True)
    assert (frugal - plain).norm() <= 1e-6 * plain.norm()
    packed = session.decoder_layers[0].mlp.up_proj.weight
    assert packed.dtype == torch.uint8


@pytest.mark.parametrize("double", [False, True])
def test_weights_come_out_of_their_4_bits_as_bitsandbytes_has_them(double):
    torch.manual_seed(0)
    weight = torch.randn(96, 64, dtype=torch.bfloat16)
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double, quant_type="nf4"
    )
    layer = torch.nn.Module()
    layer.base_layer = SimpleNamespace(weight=packed)
    vqa._add_packed_weight(layer, state, unpack_scales=False)
    scales = [getattr(layer, name) for name in layer.scale_names]
    assert len(scales) == (4 if double else 1)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        arguments = (scales, layer.packed_shape, dtype)
        ours = vqa.unpack_nf4(layer.packed, layer.nf4_values, *arguments)
        assert torch.equal(ours, vqa.dequantize_weight(layer.packed, *arguments))
        assert ours.shape == weight.shape


@pytest.mark.slow
def test_compiled_steps_give_the_plain_gradients_and_serve_all_layers_and_lengths(
    open_tiny, demo_rows, replace, monkeypatch
):
    """Through torch's own tracing, but without a C compiler."""
    session = open_tiny("qwen3_vl", lora_dropout=0.3)
    frame = demo_rows.train
    plain = [loss_and_gradients(session, frame, frugal=False, rows=rows) for rows in (3, 5)]
    compiled = count_compilations(monkeypatch)
    session.config = replace(session.config, compile_layers="on")
    frugal = loss_and_gradients(session, frame, frugal=True, rows=3)
    assert (frugal - plain[0]).norm() <= 1e-6 * plain[0].norm()
    assert len(compiled) == 5
    # Other lengths; recomputed layers; another fold.
    frugal = loss_and_gradients(session, frame, frugal=True, rows=5, stored_layers=0)
    assert (frugal - plain[1]).norm() <= 1e-6 * plain[1].norm()
    assert len(compiled) == 5
    # One question: the steps see its tokens alone. `PassPlanner.is_compiled_alone` relies on it.
    loss_and_gradients(session, frame, frugal=True, rows=1)
    assert len(compiled) == 5


def test_dropout_keeps_the_asked_share_and_neighbours_say_nothing_of_each_other():
    torch.manual_seed(0)
    seed = vqa.draw_seed("cpu")
    other = vqa.draw_seed("cpu")
    x = torch.ones(1000, 1000)
    kept = vqa.survives_dropout(x, 0.05, seed)
    assert torch.equal(kept, vqa.survives_dropout(x, 0.05, seed))
    # The share of what is dropped is known to 0.0002; both of a pair in 0.0025 of all cases.
    dropped = ~kept
    assert dropped.float().mean().item() == pytest.approx(0.05, abs=0.001)
    pairs = {
        "next number": dropped[:, 1:] & dropped[:, :-1],
        "next row": dropped[1:] & dropped[:-1],
        "other seed": dropped & ~vqa.survives_dropout(x, 0.05, other),
        "next seed": dropped & ~vqa.survives_dropout(x, 0.05, seed + 1),
    }
    for name, both in pairs.items():
        assert both.float().mean().item() == pytest.approx(0.0025, abs=0.0003), name
    assert vqa.drop(x, 0.05, seed).mean().item() == pytest.approx(1, abs=0.001)


@pytest.mark.gpu
def test_a_gpu_that_does_not_compile_draws_the_same_numbers_again():
    seed = vqa.draw_seed("cpu")
    x = torch.ones(1000, 1000, device="cuda")
    kept = vqa.survives_dropout(x, 0.05, seed)
    assert torch.equal(kept, vqa.survives_dropout(x, 0.05, seed))
    assert kept.float().mean().item() == pytest.approx(0.95, abs=0.001)


def test_the_compilers_options_are_set_in_the_thread_that_calls_a_step(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, dynamic: step)
    options = []
    step = vqa._compile_step(lambda: options.append(torch._dynamo.config.specialize_float))
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert options == [True]


def test_plain_layers_recompute_under_the_compilers_options_in_another_thread(
    open_tiny, demo_rows, replace, monkeypatch
):
    """Under others they would keep other tensors, and torch's checkpointing refuses that."""
    options = []

    def compile_nothing(forward, dynamic):
        def note(*arguments, **named):
            options.append(torch._dynamo.config.specialize_float)
            return forward(*arguments, **named)

        return note

    monkeypatch.setattr(torch, "compile", compile_nothing)
    session = open_tiny("qwen3_vl")
    session.config = replace(session.config, compile_layers="on")
    loss_and_gradients(session, demo_rows.train, frugal=False, rows=1, stored_layers=1)
    assert options == [True] * (2 * len(session.decoder_layers) - 1)  # all but one once more


def test_a_gpu_takes_frugal_layers_where_it_knows_them_and_a_cpu_none(session, monkeypatch):
    with training_model(session, frugal=False):
        assert DECIDE(session) == (False, "layers keep all activations: not on a GPU")
        session.device = SimpleNamespace(type="cuda")
        assert DECIDE(session)[0] is True
        config = session.decoder_layers[1].self_attn.config
        for name, other in (("hidden_act", "gelu"), ("_attn_implementation", "eager")):
            with monkeypatch.context() as patch:
                patch.setattr(config, name, other)
                uses, reason = DECIDE(session)
            assert uses is False
            assert "not all of a kind" in reason
        vars(session.decoder_layers[1].mlp.up_proj).pop("packed_shape")  # PEFT's own layer
        assert DECIDE(session)[0] is False


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_only_what_is_frugal_as_a_whole_is_captured_and_goes_without_a_mask(
    family, open_tiny, replace
):
    session = open_tiny(family)
    session.config = replace(session.config, compile_layers="on")
    with training_model(session, frugal=True):
        assert session.is_frugal is (family == "qwen3_vl")
        assert (session.captured_passes is not None) is (family == "qwen3_vl")


# --- What is kept ---------------------------------------------------------------------------------


def kept_bytes(compute) -> int:
    """Bytes that are still taken behind `compute`, which returns one tensor, beside that."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        output = compute()
    taken = sum(event.self_cpu_memory_usage for event in profile.function_events)
    return taken - output.nbytes


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_a_layer_keeps_its_input_and_what_is_not_made_again_for_nothing(dropout, model_folders):
    tokens = 256
    shapes = transformers.AutoConfig.from_pretrained(model_folders["qwen3_vl"])
    shapes.text_config._attn_implementation = "sdpa"
    text = transformers.Qwen3VLTextModel(shapes.text_config).to(torch.bfloat16)
    config = vqa.Config(lora_dropout=dropout, lora_r=4)
    wrapped = torch.nn.ModuleDict({"text": text.requires_grad_(False)})
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(
        wrapped, peft.LoraConfig(r=4, lora_dropout=dropout, target_modules=linears)
    )
    vqa.use_fast_lora(adapted)
    layer = text.layers[0].train()
    layer.recompute = False
    hidden = shapes.text_config.hidden_size
    states = torch.randn(2, tokens, hidden, dtype=torch.bfloat16).requires_grad_()
    positions = torch.arange(tokens).expand(3, 2, tokens)
    mask = torch.ones(2, 1, tokens, tokens, dtype=torch.bool).tril()
    options = {"position_embeddings": text.rotary_emb(states, positions), "attention_mask": mask}
    steps = vqa.LayerSteps(lambda step: step, False)
    seed = steps.draw_seed("cpu")
    frugal = kept_bytes(lambda: vqa.frugal_forward(steps, seed, layer, states, **options))
    plain = kept_bytes(lambda: type(layer).forward(layer, states, **options))
    mask_copy = 2 * mask.numel()  # in numbers
    frugal = (frugal - mask_copy) / (2 * tokens) + 2 * hidden  # with the input
    plain = (plain - mask_copy) / (2 * tokens) + 2 * hidden
    computed = vqa.activation_bytes(config, layer, tokens, 2, False, False, frugal=True).kept
    assert frugal == pytest.approx(computed, rel=0.02)
    assert frugal < (0.3 if dropout else 0.45) * plain


def qwen35_layer(make_shapes, number, tokens, dtype):
    """(config, layer `number` of a small model with LoRA, its input, its other inputs)."""
    torch.manual_seed(0)
    shapes = make_shapes(dict.fromkeys(["image_token_id"], 5), tiny=True)
    model = transformers.AutoModelForImageTextToText.from_config(shapes, dtype=dtype)
    config = vqa.Config(lora_r=4, lora_dropout=0.0)
    adapted = vqa.attach_lora(model.requires_grad_(False), config, seed=0)
    vqa.use_fast_lora(perturb_adapter(adapted))
    vqa.use_recurrent_layers(model, False, "on a CPU")
    text = model.model.language_model
    layer = text.layers[number].train()
    assert vqa.is_frugal(layer)
    states = torch.randn(1, tokens, shapes.text_config.hidden_size, dtype=dtype).requires_grad_()
    positions = torch.arange(tokens).expand(3, 1, tokens)
    mask = None
    if number == 3:  # then there are as many heads of k and v as of q
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    options = {"position_embeddings": text.rotary_emb(states, positions), "attention_mask": mask}
    return config, layer, states, options


QWEN35_LAYERS = {
    "recurrent": (new_models.qwen35_9b, 0),
    "attention": (new_models.qwen35_9b, 3),
    "recurrent, mixture": (new_models.qwen35_35b_a3b, 0),
}
NOT_COMPILED = vqa.LayerSteps(lambda step: step, False)
SEED = torch.tensor(0)


def output_and_gradients(forward, layer, states, options):
    output = forward(layer, states, **options)
    trained = [states, *(value for value in layer.parameters() if value.requires_grad)]
    gradients = torch.autograd.grad(output.square().sum(), trained)
    return torch.cat([value.flatten() for value in (output, *gradients)])


@pytest.mark.parametrize(
    ("make_shapes", "number"), QWEN35_LAYERS.values(), ids=QWEN35_LAYERS.keys()
)
def test_qwen35_gives_the_layer_before_the_plain_gradients_to_the_bit(make_shapes, number):
    _, *inputs = qwen35_layer(make_shapes, number, 70, torch.float32)
    plain = output_and_gradients(type(inputs[0]).forward, *inputs)
    frugal = functools.partial(vqa.hybrid_forward, NOT_COMPILED, SEED)
    assert torch.equal(output_and_gradients(frugal, *inputs), plain)


@pytest.mark.slow
def test_compiled_steps_of_recurrent_layers_give_the_plain_gradients(monkeypatch):
    """Another layer and another length are served by the same ones."""
    compiled = count_compilations(monkeypatch)
    frugal = functools.partial(vqa.hybrid_forward, vqa.LayerSteps(vqa._compile_step, True), SEED)
    for number, length in ((0, 130), (1, 300)):
        _, *inputs = qwen35_layer(new_models.qwen35_9b, number, length, torch.float32)
        plain = output_and_gradients(type(inputs[0]).forward, *inputs)
        found = output_and_gradients(frugal, *inputs)
        assert (found - plain).norm() <= 1e-6 * plain.norm()
        assert len(compiled) == 8  # `rule_half` in four parts: the rule itself is not compiled


@pytest.mark.parametrize(
    ("make_shapes", "number"), QWEN35_LAYERS.values(), ids=QWEN35_LAYERS.keys()
)
def test_a_layer_of_qwen35_keeps_what_is_not_made_again_for_nothing_but_in_attention(
    make_shapes, number
):
    """Without dropout, of which a CPU keeps other masks."""
    tokens = 256
    config, layer, states, options = qwen35_layer(make_shapes, number, tokens, torch.bfloat16)
    hidden = states.shape[-1]
    frugal = kept_bytes(lambda: vqa.hybrid_forward(NOT_COMPILED, SEED, layer, states, **options))
    plain = kept_bytes(lambda: type(layer).forward(layer, states, **options))
    mask = options["attention_mask"]
    mask_copy = 0 if mask is None else 2 * mask.numel()  # in numbers
    frugal = (frugal - mask_copy) / tokens + 2 * hidden * (number == 0)  # with the input
    plain = (plain - mask_copy) / tokens
    for measured, is_frugal in ((frugal, True), (plain, False)):
        computed = vqa.activation_bytes(config, layer, tokens, 2, False, False, is_frugal).kept
        assert measured == pytest.approx(computed, rel=0.05)
    # The norm's input in fp32 is not kept, but in 16 bits; nor what goes into each LoRA layer.
    of_mlp = 0
    if not vqa.is_mixture(layer):
        of_mlp = 4 * hidden + 4 * layer.mlp.intermediate_size
    of_rule = 0
    if number == 0:  # and of the gated norm three tensors in fp32 less one in 16 bits
        of_rule = 4 * hidden + (3 * 4 - 2) * layer.linear_attn.value_dim
    assert plain - frugal == pytest.approx(of_mlp + of_rule, rel=0.03)


def test_layers_of_qwen35_are_frugal_where_their_mlp_is_the_known_one():
    known = []
    for make_shapes in (new_models.qwen35_9b, new_models.qwen35_35b_a3b):
        shapes = make_shapes(dict.fromkeys(["image_token_id"], 5), tiny=True)
        for activation in ("silu", "gelu"):
            shapes.text_config.hidden_act = activation
            with torch.device("meta"):
                model = transformers.AutoModelForImageTextToText.from_config(shapes)
            layers = model.model.language_model.layers
            known.append([vqa.has_known_pass(layer) for layer in layers])
    assert known == [
        [True] * 4,
        [False] * 4,
        [True] * 4,
        [True] * 4,
    ]  # a mixture is left to autograd
