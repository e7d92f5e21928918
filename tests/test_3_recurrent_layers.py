"""Part 3, Recurrent layers: choice orders go on from one prefix's state as from their own."""

import dataclasses
import importlib.util
import shutil
import sys
from types import SimpleNamespace

import accelerate
import pytest
import torch
from cards import A100, T4
from references import gradients, perturb_adapter
from running import ROTATIONS, plain_batch
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.qwen3_5 import modeling_qwen3_5

import vqa_helpers as vqa

PLAIN = (0, 1, 2, 3)
TURNED = (1, 2, 3, 0)
REVERSED = (3, 2, 1, 0)


@pytest.fixture
def session(model_folders, demo_rows):
    config = vqa.Config.preset("demo", model_id=str(model_folders["qwen3_5"]), label_smoothing=0.0)
    session = vqa.open_session(config, demo_rows.train.iloc[0])
    perturb_adapter(vqa.attach_lora(session.model, session.config, seed=0)).eval()
    return session


@pytest.fixture
def rows(demo_rows):
    """Questions of several lengths; the second has a blank choice."""
    frame = demo_rows.test.head(4).copy()
    frame.loc[frame.index[1], "c"] = ""
    frame.loc[frame.index[2], "a"] = "a much longer choice than all others, of several words"
    return frame


def states_of(session, frame, orders):
    """Hidden states (answers, hidden) of a batch with these orders of each row."""
    prompts = []
    for row, row_orders in enumerate(orders):
        if row_orders:
            prompts.append(vqa.make_prompt(session, frame, row, row_orders))
    return vqa.answer_hidden_states(session, vqa.collate(session, prompts))


def states_alone(session, frame, orders):
    """The same states, each from a prompt and a forward pass of its own."""
    alone = []
    for row, row_orders in enumerate(orders):
        for order in row_orders:
            only = [[]] * row + [[order]]
            alone.append(states_of(session, frame, only))
    return torch.cat(alone)


ORDERS = {
    "ends and prefixes of several lengths": [[PLAIN, TURNED], [PLAIN, REVERSED], [TURNED, PLAIN]],
    "four orders beside one": [[PLAIN], [PLAIN, TURNED, REVERSED, (2, 3, 0, 1)], [PLAIN]],
    # The same order twice: all but the last token is common.
    "ends of a single token": [[PLAIN, PLAIN], [TURNED, TURNED]],
    "one question": [[PLAIN, TURNED, REVERSED]],
}


@pytest.mark.parametrize("orders", ORDERS.values(), ids=ORDERS.keys())
@torch.inference_mode()
def test_orders_behind_one_prefix_have_the_states_of_prompts_of_their_own(session, rows, orders):
    together = states_of(session, rows, orders)
    alone = states_alone(session, rows, orders)
    assert torch.allclose(together, alone, rtol=0, atol=1e-5)
    assert alone.std(0).max() > 1e-2 or len(orders) == 1  # the prompts differ


def test_prefixes_and_ends_are_padded_with_tokens_of_their_own():
    segments = torch.tensor([[-1, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 1]])
    parts = vqa.split_at_prefixes(segments)
    assert parts.prefix_tokens.tolist() == [[1, 1, 1, 1, 2], [6, 7, 8, 9, 10]]
    assert parts.prefix_mask.tolist() == [[False, False, False, True, True], [True] * 5]
    assert parts.end_tokens.tolist() == [[3, 4], [5, 5], [11, 11]]
    assert parts.questions.tolist() == [0, 0, 1]
    # Prefixes take the places 0 to 9, ends 10 to 15; padding reads the zeros behind them.
    assert parts.places.tolist() == [[16, 3, 4, 10, 11, 12], [5, 6, 7, 8, 9, 14]]


def test_padding_leaves_a_recurrent_layer_as_zeros(session):
    segments = torch.tensor([[-1, -1, 0, 0, 1, 2], [0, 0, 0, 1, 1, 2]])
    hidden = torch.randn(2, 6, 64)
    hidden[0, :2] = 1e4  # and is not read
    mixer = session.decoder_layers[0].linear_attn
    with torch.no_grad():
        outputs = mixer(hidden, attention_mask=vqa.split_at_prefixes(segments))
    assert (outputs[0, :2] == 0).all()
    assert outputs.isfinite().all()
    assert (outputs[0, 2:].abs().amax(-1) > 0).all()


def test_gradients_flow_through_the_copied_states_and_recomputed_layers(session, rows):
    session.model.train()
    vqa.use_fast_layers(session, session.model, questions=3)
    found = []
    for recompute in (False, True):
        for layer in session.decoder_layers:
            layer.recompute = recompute
        together = states_of(session, rows, [[PLAIN, TURNED], [PLAIN]])
        found.append(gradients(session.model, together.square().sum()))
    alone = states_alone(session, rows, [[PLAIN, TURNED], [PLAIN]])
    expected = gradients(session.model, alone.square().sum())
    assert expected.norm() > 1e-2
    for ours in found:
        assert (ours - expected).norm() <= 1e-4 * expected.norm()


@torch.inference_mode()
def test_orders_behind_one_prefix_agree_in_half_precision_as_far_as_it_goes(session, rows):
    session.model.bfloat16()
    orders = [[PLAIN, TURNED], [PLAIN, REVERSED]]
    together = states_of(session, rows, orders).float()
    alone = states_alone(session, rows, orders).float()
    assert torch.allclose(together, alone, rtol=0.05, atol=0.05)


@torch.inference_mode()
def test_text_is_generated_with_transformers_own_cache(session, rows):
    answers = vqa.generate_baseline(session, rows, max_new_tokens=3)
    assert len(answers) == 4
    prompt = vqa.make_prompt(session, rows, 0, [PLAIN])
    batch = vqa.collate(session, [prompt])
    inputs = {"input_ids": batch["input_ids"], "mm_token_type_ids": batch["mm_token_type_ids"]}
    image = {
        "image_grid_thw": batch["image_grid_thw"],
        "pixel_values": vqa._load_pixels(session, prompt),
    }
    options = {"max_new_tokens": 3, "do_sample": False}
    generated = session.model.generate(**inputs, **image, **options, use_cache=True)
    uncached = session.model.generate(**inputs, **image, **options, use_cache=False)
    assert torch.equal(generated, uncached)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 3


@torch.inference_mode()
def test_a_model_with_accelerates_hooks_shares_prefixes(session, rows):
    orders = [[PLAIN, TURNED], [PLAIN]]
    plain = states_of(session, rows, orders)
    places = ["model.visual", "model.language_model", "lm_head"]
    for number in range(len(session.decoder_layers)):
        places.append(f"model.language_model.layers.{number}")
    accelerate.dispatch_model(session.model, dict.fromkeys(places, "cpu"), force_hooks=True)
    assert hasattr(session.decoder_layers[0].linear_attn, "_hf_hook")
    assert torch.equal(states_of(session, rows, orders), plain)


@torch.inference_mode()
def test_a_t4_gets_a_mask_for_attention_only(session, rows):
    prompts = [vqa.make_prompt(session, rows, 0, [PLAIN])] * 2
    batch = vqa.collate(session, prompts)
    plain = vqa.answer_hidden_states(session, batch)
    assert "attention_mask" not in vqa._model_inputs(session, batch)
    session.runtime = dataclasses.replace(session.runtime, gpus=(T4,))
    masks = vqa._model_inputs(session, batch)["attention_mask"]
    assert masks["full_attention"].shape == (2, 1, *[batch["input_ids"].shape[1]] * 2)
    assert masks["linear_attention"] is None
    assert torch.allclose(vqa.answer_hidden_states(session, batch), plain, atol=1e-6)


@torch.inference_mode()
def test_a_recurrent_layer_keeps_the_hook_that_fetches_its_inputs(session, rows):
    orders = [[PLAIN, TURNED], [PLAIN]]
    plain = states_of(session, rows, orders)
    fetched = []

    class FetchingHook(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *inputs, **options):
            fetched.append(module)
            return inputs, options

    mixer = session.decoder_layers[0].linear_attn
    vars(mixer).pop("forward")  # back to transformers' own, as it is just after loading
    accelerate.hooks.add_hook_to_module(mixer, FetchingHook())
    vqa.use_recurrent_layers(session.model, False, "on a CPU")
    assert torch.equal(states_of(session, rows, orders), plain)
    assert fetched == [mixer]


@torch.inference_mode()
def test_padding_changes_no_prompt_of_a_recurrent_family(session, rows):
    batch = plain_batch(session, rows, range(4))
    assert batch["masked"]
    together = vqa.answer_hidden_states(session, batch)
    alone = []
    for row in range(4):
        alone.append(vqa.answer_hidden_states(session, plain_batch(session, rows, [row])))
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_four_orders_of_a_recurrent_family_cost_less_than_four_prompts(session, rows):
    planned = vqa.plan_prompts(session, rows, ROTATIONS)
    assert [len(item.view_numbers) for item in planned] == [4, 4, 4, 4]
    assert vqa.views_cost(session, ROTATIONS) == pytest.approx(1 + 3 / 7)
    session.runtime = dataclasses.replace(session.runtime, attention="flash_attention_2")
    assert len(vqa.plan_prompts(session, rows, ROTATIONS)) == 16


# --- The rule -------------------------------------------------------------------------------------


def rule_inputs(length, similar=False):
    """Random query, key, value, g, beta and first state; keys may be nearly the same."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    key = draw(2, length, 2, 16)
    if similar:
        key = draw(2, 1, 2, 16) + 0.05 * key
    forgets = 0.01 if similar else 1.0
    tensors = [
        draw(2, length, 2, 16),
        key,
        draw(2, length, 4, 24),
        -forgets * draw(2, length, 4).abs(),
        torch.full((2, length, 4), 0.99) if similar else draw(2, length, 4).sigmoid(),
        0.1 * draw(2, 4, 16, 24),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def outputs_and_gradients(rule, inputs):
    """Outputs, last state, and the gradients of all inputs."""
    outputs, state = rule(*inputs)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(outputs.shape, generator=generator)
    loss = (outputs * weights).sum() + state.square().sum()
    return [outputs, state, *torch.autograd.grad(loss, inputs)]


def transformers_rule(query, key, value, g, beta, state):
    """transformers' own; before 5.24 it takes as many heads of query and key as of value."""
    group = value.shape[2] // key.shape[2]
    return modeling_qwen3_5.torch_chunk_gated_delta_rule(
        query.repeat_interleave(group, dim=2),
        key.repeat_interleave(group, dim=2),
        value,
        g,
        beta,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )


@pytest.mark.parametrize("similar", [False, True], ids=["", "keys alike"])
@pytest.mark.parametrize("length", [1, 63, 64, 150])
def test_the_gated_delta_rule_computes_what_transformers_does(length, similar):
    inputs = rule_inputs(length, similar)
    ours = outputs_and_gradients(vqa.recompute_gated_delta_rule, inputs)
    theirs = outputs_and_gradients(transformers_rule, inputs)
    for our_tensor, their_tensor in zip(ours, theirs, strict=True):
        assert (our_tensor - their_tensor).norm() <= 2e-5 * their_tensor.norm()


def test_of_the_rule_only_what_goes_in_is_kept_for_the_backward_pass():
    inputs = rule_inputs(150)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        vqa.recompute_gated_delta_rule(*inputs)
    goes_in = {tensor.data_ptr() for tensor in inputs}
    assert {tensor.data_ptr() for tensor in kept} <= goes_in
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        vqa.gated_delta_rule(*inputs)
    assert sum(tensor.nbytes for tensor in kept) > 5 * sum(tensor.nbytes for tensor in inputs)


def test_states_of_half_precision_are_in_fp32():
    inputs = [tensor.detach().bfloat16() for tensor in rule_inputs(20)[:5]]
    outputs, state = vqa.gated_delta_rule(*inputs)
    assert outputs.dtype == torch.bfloat16
    assert state.dtype == torch.float32


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_a_triangular_matrix_is_inverted_with_its_gradient(size):
    lower = (0.2 * torch.randn(3, size, size, dtype=torch.float64)).tril(-1).requires_grad_()
    weights = torch.randn(3, size, size, dtype=torch.float64)
    found = []
    unit = torch.eye(size, dtype=torch.float64) + lower
    for inverse in (vqa.inverse_of_unit_triangular(lower), torch.linalg.inv(unit)):
        (gradient,) = torch.autograd.grad((inverse * weights).sum(), lower)
        found.append((inverse, gradient))
    (ours, our_gradient), (theirs, their_gradient) = found
    assert (ours - theirs).norm() <= 1e-9 * theirs.norm()
    assert (our_gradient - their_gradient).norm() <= 1e-9 * their_gradient.norm() + 1e-12


# --- Their kernels --------------------------------------------------------------------------------

H200 = {"index": 1, "name": "NVIDIA H200", "memory_gib": 140.0, "capability": 9.0}
PLAIN_PYTORCH = "recurrent layers (Qwen3.5 and later) in plain PyTorch: flash-linear-attention "


def modules_of_kernels():
    return [name for name in sys.modules if name.split(".")[0] == "fla"]


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A package that stands for flash-linear-attention: its folder, and what is imported of it."""
    gated = tmp_path / "fla" / "ops" / "gated_delta_rule"
    gated.mkdir(parents=True)
    gated.joinpath("__init__.py").write_text("def chunk_gated_delta_rule(): return 'kernel'\n")
    metadata = tmp_path / "flash_linear_attention-0.6.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Name: flash-linear-attention\nVersion: 0.6.0\n")
    if importlib.util.find_spec("triton") is None:  # torch for a CPU brings none
        tmp_path.joinpath("triton.py").touch()
    real_version = vqa.installed_version
    versions = {"torch": vqa.Version("2.8.0"), "triton": vqa.Version("3.4.0")}
    monkeypatch.setattr(
        vqa, "installed_version", lambda name: versions.get(name) or real_version(name)
    )
    for name in modules_of_kernels():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path / "fla"
    for name in modules_of_kernels():
        del sys.modules[name]


def implementation():
    """What transformers takes for a function of which there is a kernel."""

    def chunk_gated_delta_rule():
        return "plain"

    decorate = use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fla")
    return decorate(chunk_gated_delta_rule)()


@pytest.mark.parametrize(
    ("gpus", "strict", "obstacle"),
    [
        ([], False, "needs a GPU"),
        ([A100, T4], False, "needs capability 8.0, as Triton does; Tesla T4 has 7.5"),
        (
            [A100, H200],
            False,
            "needs Triton 3.7.1 to train on NVIDIA H200; torch brought 3.4.0, update torch",
        ),
        ([A100], True, "chooses its kernels by their speed, unlike strict_determinism wants it"),
    ],
)
def test_recurrent_kernels_are_not_used_where_they_cannot_work(kernels, gpus, strict, obstacle):
    assert vqa.decide_recurrent_kernels(gpus, strict) == (False, PLAIN_PYTORCH + obstacle)


def test_recurrent_kernels_need_triton_and_a_recent_torch(kernels, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    _, why = vqa.decide_recurrent_kernels([A100])
    assert why == PLAIN_PYTORCH + "needs Triton, which comes with torch on Linux only"
    monkeypatch.setattr(vqa, "installed_version", lambda name: vqa.Version("2.6.0+cu124"))
    _, why = vqa.decide_recurrent_kernels([A100])
    assert why == PLAIN_PYTORCH + "needs torch 2.7; 2.6.0+cu124 is installed"


@pytest.mark.parametrize(("triton", "chosen"), [("3.3.1", True), ("3.6.0", False), ("3.7.1", True)])
def test_recurrent_kernels_train_on_hopper_with_some_versions_of_triton(
    kernels, monkeypatch, triton, chosen
):
    monkeypatch.setattr(vqa, "installed_version", lambda name: vqa.Version(triton))
    assert vqa.decide_recurrent_kernels([H200])[0] is chosen


def test_recurrent_kernels_are_advised_where_they_pay_and_used_where_they_are(kernels):
    chosen, why = vqa.decide_recurrent_kernels([A100])
    assert chosen
    assert why == (
        "recurrent layers (Qwen3.5 and later) by flash-linear-attention 0.6.0: "
        "its kernels are compiled at their first use, which can take minutes"
    )
    shutil.rmtree(kernels)
    importlib.invalidate_caches()
    chosen, why = vqa.decide_recurrent_kernels([A100])
    assert not chosen
    assert why == PLAIN_PYTORCH + (
        "is not installed; `pip install flash-linear-attention` before training "
        "can make them faster"
    )


@pytest.mark.parametrize("version", ["0.4.2", "0.5.1"])
def test_kernels_that_would_mix_up_heads_are_not_used(kernels, version):
    metadata = kernels.parent / "flash_linear_attention-0.6.0.dist-info" / "METADATA"
    metadata.write_text(f"Name: flash-linear-attention\nVersion: {version}\n")
    importlib.invalidate_caches()
    chosen, why = vqa.decide_recurrent_kernels([A100])
    assert not chosen
    assert why == PLAIN_PYTORCH + (
        f"{version} is too old; `pip install -U flash-linear-attention` before training "
        "can make them faster"
    )


def kernel_of(change=lambda outputs: outputs):
    """A stand-in for the kernels: transformers' rule, with changed outputs."""
    calls = []

    def chunk_gated_delta_rule(query, key, value, *, g, beta, initial_state, **options):
        assert options == {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        calls.append(initial_state is not None)
        outputs, state = transformers_rule(query, key, value, g, beta, initial_state)
        return change(outputs), state

    return SimpleNamespace(chunk_gated_delta_rule=chunk_gated_delta_rule, calls=calls)


def test_recurrent_layers_compute_the_same_by_the_kernels(session, rows, monkeypatch, caplog):
    caplog.set_level("INFO", "vqa")
    orders = [[PLAIN, TURNED], [PLAIN]]
    kernels = kernel_of()
    with torch.no_grad():
        plain = states_of(session, rows, orders)
        monkeypatch.setattr(vqa, "fla_rules", kernels)
        vqa.use_recurrent_layers(session.model, True, "by kernels")
        assert kernels.calls == [False]  # tried once
        assert torch.allclose(states_of(session, rows, orders), plain, atol=1e-5)
    assert kernels.calls == [False, False, True]  # one recurrent layer: its prefixes, then the ends
    assert "Decision: by kernels" in caplog.text


class _HalvedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, outputs):
        return outputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


def raise_like_kernels(outputs):
    raise RuntimeError("Triton error: misaligned address")


FAULTY_KERNELS = {
    "wrong outputs": (lambda outputs: 1.1 * outputs, "their outputs or gradients are wrong here"),
    "wrong gradients": (_HalvedGradient.apply, "their outputs or gradients are wrong here"),
    "not a number": (lambda outputs: outputs * torch.nan, "(off by nan)"),
    "an error": (raise_like_kernels, "Triton error: misaligned address"),
}


@pytest.mark.parametrize(("change", "fault"), FAULTY_KERNELS.values(), ids=FAULTY_KERNELS.keys())
def test_kernels_that_compute_something_else_are_not_used(
    change, fault, session, rows, monkeypatch, caplog
):
    kernels = kernel_of(change)
    monkeypatch.setattr(vqa, "fla_rules", kernels)
    vqa.use_recurrent_layers(session.model, True, "by kernels")
    assert "flash-linear-attention is installed, but does not work here: " in caplog.text
    assert fault in caplog.text
    assert states_of(session, rows, [[PLAIN]]).isfinite().all()
    assert len(kernels.calls) == 1


def test_transformers_takes_the_kernels_unless_they_are_hidden(kernels):
    assert implementation() == "kernel"
    vqa.hide_recurrent_kernels()
    assert implementation() == "plain"


def test_a_session_hides_kernels_from_a_cpu_and_says_how_recurrent_layers_compute(
    kernels, model_folders, demo_rows, caplog
):
    caplog.set_level("INFO", "vqa")
    for family in ("qwen3_vl", "qwen3_5"):
        caplog.clear()
        config = vqa.Config.preset("demo", model_id=str(model_folders[family]))
        vqa.open_session(config, demo_rows.train.iloc[0])
        decision = f"Decision: {PLAIN_PYTORCH}needs a GPU"
        assert caplog.messages.count(decision) == (family == "qwen3_5")
        assert implementation() == "plain"


def test_kernels_that_cannot_be_imported_are_a_warning(kernels, session, caplog):
    (kernels / "__init__.py").write_text("raise ImportError('another torch')\n")
    sys.modules.pop("fla", None)  # the session has hidden it
    assert implementation() == "plain"
    assert not vqa.check_recurrent_kernels(session.decoder_layers[0].linear_attn, True, "")
    assert caplog.messages == [
        "Recurrent layers compute in plain PyTorch, slower: flash-linear-attention is installed, "
        "but does not work here: another torch"
    ]
