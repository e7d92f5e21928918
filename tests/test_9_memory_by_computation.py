"""Part 9, Memory by computation: against what GPUs took, and on every card that a preset is for."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import memory_plan
import new_models
import pytest
import rehearsal
import torch
import transformers
from cards import CARDS
from running import plain_batch, plain_prompts
from stored_models import LANGUAGE_MODEL_ONLY, config_of, store_in_4_bit

import vqa_helpers as vqa

# GiB on one H200 under bench_gpu.py's settings, with the optimizer's state, by questions in a
# pass and layers that keep their activations.
CAPPED = {(32, 0): 11.70, (16, 3): 10.86, (8, 9): 11.53, (4, 21): 11.89, (2, 36): 10.77}
UNCAPPED = {(32, 36): 93.54, (16, 36): 49.70, (8, 36): 27.81, (4, 36): 16.88}
# Layers that keep little for the backward pass, capped and not.
FRUGAL_CAPPED = {(32, 2): 11.67, (16, 10): 11.93, (8, 25): 11.85, (4, 36): 9.76, (2, 36): 7.53}
FRUGAL_UNCAPPED = {(32, 36): 40.94, (16, 36): 23.12, (11, 36): 17.55}
NOT_COMPILED = {(8, 36): 30.88, (4, 36): 18.09, (2, 36): 11.70}
SMALL = {(32, 6): 11.63, (16, 14): 11.96, (8, 30): 12.13, (4, 36): 8.22, (2, 36): 5.35}
# Shapes, tokens a question, whether layers are compiled and frugal, peaks.
MEASURED = {
    "8B": (memory_plan.qwen3_8b, 366, True, True, FRUGAL_CAPPED | FRUGAL_UNCAPPED),
    "8B, plain layers": (memory_plan.qwen3_8b, 366, True, False, CAPPED | UNCAPPED),
    "8B, plain layers, not compiled": (memory_plan.qwen3_8b, 366, False, False, NOT_COMPILED),
    "3B, plain layers": (memory_plan.qwen25_3b, 306, True, False, SMALL),
}


@pytest.mark.parametrize(
    ("make_shapes", "tokens", "compiled", "frugal", "peaks"), MEASURED.values(), ids=MEASURED
)
def test_the_computed_peak_is_within_5_percent_of_every_measured_one(
    make_shapes, tokens, compiled, frugal, peaks
):
    config = vqa.Config()
    costs = vqa.memory_costs(config, make_shapes({}), tokens, "bf16", compiled, frugal=frugal)
    for plan, measured in peaks.items():
        peak = sum(costs.peak(vqa.MemoryPlan(*plan)).values())
        assert peak == pytest.approx(measured, rel=0.05), plan


@dataclass(frozen=True)
class Measured:
    """What the planner of passes measured under new_models.py.

    In 4 bits and fp16 on a card told to be a T4 (the mixture: with the memory of two), the 27B in
    bf16 below 78 GiB of an H200.
    """

    make_shapes: Callable
    tokens: int
    compiled: bool
    loaded: float  # GiB
    peaks: dict[tuple[int, int], float]  # (questions in a pass, layers kept) -> GiB
    quantization: str = "4bit"
    precision: str = "fp16"


MEASURED_MODELS = {
    "Qwen3.5-9B": Measured(
        new_models.qwen35_9b,
        tokens=348,
        compiled=True,
        loaded=7.97,
        peaks={(16, 3): 11.08, (8, 9): 11.80, (4, 20): 11.86, (2, 32): 10.57},
    ),
    "Qwen3.5-9B, not compiled": Measured(
        new_models.qwen35_9b,
        tokens=348,
        compiled=False,
        loaded=7.97,
        peaks={(16, 2): 10.66, (8, 6): 11.23, (4, 14): 11.55, (2, 31): 11.89},
    ),
    "InternVL3.5-8B": Measured(
        new_models.internvl35_8b,
        tokens=349,
        compiled=True,
        loaded=6.29,
        peaks={(32, 0): 11.09, (16, 4): 11.67, (8, 10): 11.75, (4, 22): 11.81, (2, 36): 10.49},
    ),
    "Qwen3.5-27B, 16 bits": Measured(
        new_models.qwen35_27b,
        tokens=348,
        compiled=True,
        loaded=50.96,
        peaks={(32, 4): 69.44, (16, 12): 71.37, (8, 27): 71.62, (4, 59): 72.46, (2, 64): 61.87},
        quantization="none",
        precision="bf16",
    ),
    "Qwen3.5-27B, 4 bits": Measured(
        new_models.qwen35_27b,
        tokens=348,
        compiled=True,
        loaded=17.33,
        peaks={(32, 15): 68.77, (16, 34): 70.70, (8, 64): 65.60, (4, 64): 40.78, (2, 64): 28.37},
        precision="bf16",
    ),
    "Qwen3.5-35B-A3B": Measured(
        new_models.qwen35_35b_a3b,
        tokens=348,
        compiled=False,
        loaded=19.14,
        peaks={(16, 0): 21.59, (8, 0): 20.33, (4, 0): 19.71, (2, 0): 19.39},
    ),
}


@pytest.mark.parametrize("measured", MEASURED_MODELS.values(), ids=MEASURED_MODELS)
def test_computed_memory_of_todays_models_is_the_measured_one(measured):
    shapes = measured.make_shapes(dict.fromkeys(["image_token_id"], 5))
    costs = vqa.memory_costs(
        vqa.Config(quantization=measured.quantization),
        shapes,
        measured.tokens,
        measured.precision,
        measured.compiled,
    )
    assert costs.loaded == pytest.approx(measured.loaded, rel=0.015)
    for plan, gib in measured.peaks.items():
        computed = sum(costs.peak(vqa.MemoryPlan(*plan)).values())
        assert computed == pytest.approx(gib, rel=0.055), plan


def test_computed_weights_are_those_measured_after_loading_and_at_rest():
    big = vqa.memory_costs(vqa.Config(), memory_plan.qwen3_8b({}), 1, "bf16", True)
    small = vqa.memory_costs(vqa.Config(), memory_plan.qwen25_3b({}), 1, "bf16", True)
    assert big.loaded == pytest.approx(6.73, abs=0.01)
    assert small.loaded == pytest.approx(3.16, abs=0.01)
    assert big.rows["weights"] == pytest.approx(4.5, abs=0.01)
    scales = 0.16  # of its 4-bit blocks, unpacked; its head is tied and stays
    assert small.rows["weights"] == pytest.approx(small.loaded - small.tower + scales, abs=0.01)

    plan = vqa.MemoryPlan(1, 0)
    cached = big.table(plan, True, 0)["computed GiB"]
    not_cached = big.table(plan, False, 0)["computed GiB"]
    for row in ("weights", "all of these"):
        assert not_cached[row] == pytest.approx(cached[row] + big.tower)


def test_settings_change_the_rows_that_they_should():
    def costs(**settings):
        config = vqa.Config(**settings)
        return vqa.memory_costs(config, memory_plan.qwen3_8b({}), 366, "bf16", True)

    plain = costs()
    assert costs(quantization="none").rows["weights"] == pytest.approx(14.1, abs=0.05)
    with_head = costs(loss="vocabulary").rows["weights"]
    assert with_head == pytest.approx(plain.rows["weights"] + 1.16, abs=0.01)
    assert costs(lora_r=32).rows["optimizer"] == 2 * plain.rows["optimizer"]
    assert costs(use_ema=False).rows["averages"] == 0
    assert costs(use_swa=True).rows["averages"] == plain.rows["optimizer"]
    assert costs(lora_dropout=0.0).layer < 0.8 * plain.layer


@pytest.mark.parametrize(("cards", "preset", "_"), CARDS.values(), ids=CARDS)
def test_what_auto_picks_fits_on_the_card_by_computation(cards, preset, _):
    smallest = min(memory for _, memory, _ in cards)
    row = memory_plan.Row(preset, "T4")
    assert memory_plan.largest_pass(row, smallest) >= 8
    row = memory_plan.memory_row(row, smallest)
    assert row["sum"] <= row["free"]
    assert row["loading"] <= row["free"]


@pytest.mark.parametrize("name", ["RTX 12 GB", "T4", "L4", "A100 40 GB"])
def test_qwen35_9b_fits_by_computation_where_auto_picks_the_8b(name):
    ((_, memory, _),), preset, _ = CARDS[name]
    row = memory_plan.Row(preset, "T4", model_id="Qwen/Qwen3.5-9B")
    computed = memory_plan.memory_row(row, memory)
    assert memory_plan.largest_pass(row, memory) >= 4
    assert computed["sum"] <= computed["free"]
    assert computed["loading"] <= computed["free"]


@pytest.mark.parametrize(("preset", "card"), [("kaggle_t4x2", "T4"), ("colab_a100", "A100 80 GB")])
def test_the_hours_of_the_real_job_are_those_of_the_computed_plan(preset, card):
    computed = memory_plan.memory_row(memory_plan.Row(preset, card))
    assert rehearsal.MACHINES[preset].stored_layers == computed["layers kept"]


@pytest.mark.parametrize("with_fla", [False, True])
def test_the_preset_for_80_gb_takes_its_whole_step_in_one_pass(with_fla):
    row = memory_plan.Row("gpu_80gb", "", with_fla=with_fla)
    assert memory_plan.largest_pass(row, 81559) == 8
    row = memory_plan.memory_row(row, 81559)
    assert row["sum"] <= row["free"]
    assert row["model"] == "Qwen3.5-27B, 16 bits"


def test_a_card_below_the_smallest_preset_is_too_small_by_computation_for_the_larger_model():
    costs = vqa.memory_costs(vqa.Config(), memory_plan.qwen3_8b({}), 878, "fp16", False)
    verdict = costs.verdict(memory_plan.free_memory(6144))
    figures = "6.7 GiB for one question at a time, 5.1 GiB free"
    assert verdict.startswith(f"does not fit by computation: {figures}")
    assert "smaller model_id" in verdict
    assert "max_pixels" in verdict


@pytest.mark.slow
def test_the_readme_of_the_benchmarks_shows_what_the_script_prints():
    readme = (vqa.HERE / "tests" / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert memory_plan.memory_table() in readme


def test_computed_vision_features_are_the_bytes_of_the_cache(session, demo_rows):
    """In both families, with and without DeepStack."""
    batch = plain_batch(session, demo_rows.train, [0])
    (features,) = session.vision_cache.compute_for_batch(batch)
    costs = vqa.memory_costs(session.config, session.model.config, 1, "fp32", compiled=False)
    tokens = len(features[0])
    bytes_of_features = sum(tensor.nbytes for tensor in features)
    assert bytes_of_features == pytest.approx(tokens * costs.image_token * 2**30)


def test_before_loading_memory_is_that_of_the_longest_prompt_with_the_runs_own_templates(
    session, demo_rows, replace
):
    longer = {}
    for question_type, template in vqa.PROMPT_TEMPLATES.items():
        longer[question_type] = "Look closely. " * 9 + template
    session.config = replace(session.config, prompt_templates=longer)
    frame = demo_rows.train.head(12)
    prompts = plain_prompts(session, frame, range(12))
    longest = max(len(prompt.input_ids) for prompt in prompts)
    known = vqa.memory_costs(session.config, session.model.config, longest, "fp32", compiled=False)
    assert vqa.expected_memory(session.config, frame) == known


@pytest.mark.parametrize(("family", "is_compiled"), [("qwen3_vl", True), ("qwen3_5_moe", False)])
def test_memory_before_loading_is_that_of_compiled_layers_where_the_family_is_compiled(
    family, is_compiled, model_folders, demo_rows
):
    costs = []
    for wish in ("on", "off"):
        model_id = str(model_folders[family])
        config = vqa.Config.preset("demo", model_id=model_id, compile_layers=wish)
        costs.append(vqa.expected_memory(config, demo_rows.train.head(2)))
    assert (costs[0] != costs[1]) is is_compiled


def kept_bytes(layer, hidden_states, **inputs) -> int:
    """Bytes of all that autograd keeps of a pass of the layer, but for its weights."""
    weights = {value.untyped_storage().data_ptr() for value in layer.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held: its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = layer(hidden_states, **inputs)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("make_shapes", [new_models.qwen35_9b, new_models.qwen35_35b_a3b])
@pytest.mark.parametrize("number", [0, 3], ids=["recurrent", "attention"])
def test_what_a_layer_is_computed_to_keep_is_what_autograd_keeps(make_shapes, number):
    """In bf16, which recurrent layers leave for fp32; dropout keeps other masks on a CPU."""
    torch.manual_seed(0)
    shapes = make_shapes(dict.fromkeys(["image_token_id"], 5), tiny=True)
    model = transformers.AutoModelForImageTextToText.from_config(shapes, dtype=torch.bfloat16)
    config = vqa.Config(lora_r=4, lora_dropout=0.0)
    vqa.use_fast_lora(vqa.attach_lora(model.requires_grad_(False), config, seed=0))
    vqa.use_recurrent_layers(model, False, "on a CPU")
    language_model = model.model.language_model
    layer = language_model.layers[number].train()
    batch, length, hidden = 2, 128, shapes.text_config.hidden_size
    states = torch.randn(batch, length, hidden, dtype=torch.bfloat16).requires_grad_()
    positions = torch.arange(length).expand(3, batch, length)
    mask = None
    if number == 3:  # as many heads of k and v as of q, as behind a mask on a GPU
        mask = torch.ones(batch, 1, length, length, dtype=torch.bool).tril()
    rotations = language_model.rotary_emb(states, positions)
    measured = kept_bytes(layer, states, position_embeddings=rotations, attention_mask=mask)
    measured /= batch * length
    if mask is not None:
        measured -= 2 * length  # the mask as numbers, which is counted for itself
    computed = vqa.activation_bytes(config, layer, length, 2, compiled=False, with_fla=False).kept
    assert computed == pytest.approx(measured, rel=0.05)


# --- Stored in 4 bits -----------------------------------------------------------------------------


def bytes_of(model):
    """What a model's weights take, with the scales of those that are packed."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes
            total += state.state2.absmax.nbytes if state.nested else 0
    return total


@pytest.mark.parametrize(
    "settings",
    [
        {"bnb_4bit_use_double_quant": False},
        {"llm_int8_skip_modules": [*LANGUAGE_MODEL_ONLY, "model.language_model.layers.1"]},
    ],
    ids=["single", "dynamic"],
)
def test_the_weights_of_a_checkpoint_in_4_bits_are_counted_as_they_are_stored(
    settings, model_folders, four_bits_on_the_cpu, demo_rows, tmp_path
):
    stored = store_in_4_bit(model_folders["qwen3_vl"], tmp_path / "stored", **settings)
    config = config_of(stored)
    shapes = transformers.AutoConfig.from_pretrained(stored)
    costs = vqa.memory_costs(config, shapes, 1, "fp32", compiled=False)
    model = vqa.load_model(config, vqa.detect_runtime())
    assert costs.loaded * 2**30 == pytest.approx(bytes_of(model), rel=0.005)


def test_a_model_that_was_quantised_while_loading_takes_what_its_files_say(
    model_folders, four_bits_on_the_cpu
):
    config = config_of(model_folders["qwen3_vl"])
    files = transformers.AutoConfig.from_pretrained(model_folders["qwen3_vl"])
    model = vqa.load_model(config, vqa.detect_runtime())
    by_files = vqa.memory_costs(config, files, 100, "fp32", compiled=False)
    assert vqa.memory_costs(config, model.config, 100, "fp32", compiled=False) == by_files


def test_what_the_gated_delta_rule_is_computed_to_keep_is_what_autograd_keeps():
    heads = SimpleNamespace(
        num_k_heads=2,
        num_v_heads=6,
        head_k_dim=48,
        head_v_dim=80,
        key_dim=2 * 48,
        value_dim=6 * 80,
    )
    length = 150  # two whole chunks and a part of one
    query, key = torch.randn(2, 1, length, 2, 48).requires_grad_().unbind()
    value = torch.randn(1, length, 6, 80).requires_grad_()
    decay, beta = torch.rand(2, 1, length, 6).neg().requires_grad_().unbind()
    given = {value.untyped_storage().data_ptr() for value in (query, key, value, decay, beta)}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        vqa.gated_delta_rule(query, key, value, decay, beta)
    measured = sum(storage.nbytes() for storage in kept.values()) / length / 4
    whole_chunks = 3 * 64 / length
    gradients = 2 * whole_chunks * (6 * 80 + 3 * 6 * 48 + 6 * 64)
    assert vqa.rule_numbers(heads, length) - gradients == pytest.approx(measured, rel=0.03)
