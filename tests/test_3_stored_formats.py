"""Part 3, Stored formats: checkpoints in 4 bits are used like those that we quantise ourselves."""

import dataclasses
import functools
import json
import logging
import shutil

import huggingface_hub.constants
import numpy as np
import peft
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from chat_templates import THINKS_BY_DEFAULT
from references import flat_gradients, perturb_adapter
from running import ONE_VIEW, batch_loss, plain_batch, quiet, read_logits, run_all
from safetensors.torch import load_file, save_file
from stored_models import config_of, copy_with, edit_config, store_in_4_bit
from torch._dynamo.backends.debugging import aot_eager

import vqa_helpers as vqa


def scores_and_gradients(config, rows):
    """Of the letters before training, (rows, 4), and one training step's LoRA gradients."""
    session = vqa.open_session(config, rows.iloc[0])
    scores = vqa.predict_logits(session, rows.head(3), ONE_VIEW)[:, 0]
    adapted = perturb_adapter(vqa.attach_lora(session.model, config, seed=0)).train()
    vqa.use_fast_layers(session, adapted, questions=1)
    batch_loss(session, plain_batch(session, rows, range(3))).backward()
    assert type(session.decoder_layers[0].self_attn.q_proj).__name__ == "FastLinear4bit"
    return torch.from_numpy(scores), flat_gradients(adapted)


# --- The same as quantised while loading ----------------------------------------------------------


def quantise_singly(monkeypatch, precision):
    """Let our own quantisation leave the scales as they are."""
    own = vqa.quantization_config("4bit", precision)
    own.bnb_4bit_use_double_quant = False
    monkeypatch.setattr(vqa, "quantization_config", lambda quantization, precision: own)


def test_a_stored_checkpoint_gives_the_scores_and_gradients_of_our_own_quantisation(
    model_folders, stored_double, four_bits_on_the_cpu, demo_rows
):
    ours = scores_and_gradients(config_of(model_folders["qwen3_vl"]), demo_rows.train)
    theirs = scores_and_gradients(config_of(stored_double), demo_rows.train)
    for our_tensor, their_tensor in zip(ours, theirs, strict=True):
        assert torch.equal(our_tensor, their_tensor)


@pytest.mark.slow
def test_scales_that_are_not_quantised_give_the_same_numbers_as_our_own_without(
    model_folders, four_bits_on_the_cpu, demo_rows, tmp_path, monkeypatch
):
    source = model_folders["qwen2_5_vl"]
    stored = store_in_4_bit(source, tmp_path / "single", bnb_4bit_use_double_quant=False)
    theirs = scores_and_gradients(config_of(stored), demo_rows.train)
    quantise_singly(monkeypatch, "fp32")
    ours = scores_and_gradients(config_of(source), demo_rows.train)
    for our_tensor, their_tensor in zip(ours, theirs, strict=True):
        assert torch.equal(our_tensor, their_tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_on_a_gpu_a_stored_checkpoint_is_like_our_own_quantisation_within_rounding(
    family, double, model_folders, demo_rows, tmp_path, monkeypatch
):
    precision = vqa.detect_runtime().precision
    source = model_folders[family]
    stored = store_in_4_bit(
        source,
        tmp_path / "stored",
        dtype=vqa.DTYPES[precision],
        device=0,
        bnb_4bit_use_double_quant=double,
    )
    theirs = scores_and_gradients(config_of(stored), demo_rows.train)
    if not double:
        quantise_singly(monkeypatch, precision)
    ours = scores_and_gradients(config_of(source), demo_rows.train)
    for our_tensor, their_tensor in zip(ours, theirs, strict=True):
        difference = our_tensor.float() - their_tensor.float()
        assert difference.norm() <= 0.01 * our_tensor.float().norm()


def test_numbers_follow_this_machine_and_not_the_one_that_stored_them(
    model_folders, four_bits_on_the_cpu, tmp_path
):
    stored = store_in_4_bit(model_folders["qwen3_vl"], tmp_path / "bf16", dtype="bfloat16")
    runtime = vqa.Runtime("local", (), "fp16", "sdpa", ())  # a T4's
    model = vqa.load_model(config_of(stored), runtime)
    dtypes = {value.dtype for value in model.parameters()}
    assert dtypes == {torch.float16, torch.uint8}
    query = model.model.language_model.layers[0].self_attn.q_proj
    assert query.compute_dtype == query.weight.quant_state.dtype == torch.float16


# --- Mixed layers ---------------------------------------------------------------------------------


@pytest.fixture
def dynamic_folder(model_folders, tmp_path):
    """A checkpoint as the "dynamic" ones are, whose list of exceptions has names of long ago.

    One attention layer and the tower's first block are in 16 bits, the rest of the tower and
    the language model in 4.
    """
    skipped = ["lm_head", "model.visual.blocks.0", "model.language_model.layers.0.self_attn"]
    source = model_folders["qwen2_5_vl"]
    stored = store_in_4_bit(source, tmp_path / "dynamic", llm_int8_skip_modules=skipped)
    old_names = ["lm_head", "visual.blocks.0", "model.layers.0.self_attn"]
    edit_config(stored, llm_int8_skip_modules=old_names)
    return stored


def test_layers_in_4_and_in_16_bits_stand_side_by_side_each_computed_by_its_own_kind(
    dynamic_folder, four_bits_on_the_cpu, demo_rows, caplog
):
    caplog.set_level(logging.INFO, "vqa")
    config = config_of(dynamic_folder)
    session = vqa.open_session(config, demo_rows.train.iloc[0])
    said = "is stored in bitsandbytes 4-bit NF4 with double quantisation already: it is not quanti"
    assert said in caplog.text
    assert "layers such as model.visual.blocks.0.attn.qkv are used unquantised" in caplog.text
    tower = session.vision_cache.vision_tower
    assert {value.dtype for value in tower.parameters()} == {torch.float32}
    batch = plain_batch(session, demo_rows.train, range(2))
    adapted = perturb_adapter(vqa.attach_lora(session.model, config, seed=0)).eval()
    by_peft = vqa.answer_hidden_states(session, batch)
    vqa.use_fast_layers(session, adapted, questions=2)
    first, second = session.decoder_layers
    assert type(first.self_attn.q_proj).__name__ == "FastLinear"
    assert type(first.mlp.up_proj).__name__ == "FastLinear4bit"
    assert type(second.self_attn.q_proj).__name__ == "FastLinear4bit"
    assert torch.allclose(vqa.answer_hidden_states(session, batch), by_peft, atol=1e-4)


@pytest.mark.slow
def test_mixed_layers_are_compiled_once_for_each_pattern_and_give_the_plain_gradients(
    dynamic_folder, four_bits_on_the_cpu, demo_rows, monkeypatch
):
    def gradients(**settings):
        config = config_of(dynamic_folder, lora_dropout=0.0, **settings)
        session = vqa.open_session(config, demo_rows.train.iloc[0])
        adapted = perturb_adapter(vqa.attach_lora(session.model, config, seed=0)).train()
        if settings:
            vqa.use_fast_layers(session, adapted, questions=1)
        for rows in (range(2), range(3)):
            batch_loss(session, plain_batch(session, demo_rows.train, rows)).backward()
        return flat_gradients(adapted)

    compiled = []

    def counting(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    plain = gradients()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counting))
    fast = gradients(compile_layers="on")
    assert (fast - plain).norm() <= 1e-5 * plain.norm()
    assert len(compiled) == 2


def with_a_head_of_its_own(source, folder):
    """A copy of a checkpoint whose head is not its embeddings."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["tie_word_embeddings"] = content["text_config"]["tie_word_embeddings"] = False
    path.write_text(json.dumps(content))
    tensors = load_file(folder / "model.safetensors")
    embeddings = next(value for name, value in tensors.items() if "embed_tokens" in name)
    tensors["lm_head.weight"] = embeddings.flip(1).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, tensors


@pytest.mark.parametrize("family", ["qwen3_vl", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_a_vision_tower_and_a_head_in_4_bits_are_unpacked(
    family, model_folders, four_bits_on_the_cpu, demo_rows, tmp_path
):
    source, whole = with_a_head_of_its_own(model_folders[family], tmp_path / "source")
    stored = store_in_4_bit(source, tmp_path / "all", llm_int8_skip_modules=[])
    packed_names = [name for name in load_file(stored / "model.safetensors") if "absmax" in name]
    assert "lm_head.weight.absmax" in packed_names
    assert any("visual" in name for name in packed_names)
    session = vqa.open_session(config_of(stored), demo_rows.train.iloc[0])
    unpacked = {
        "visual.blocks.0.attn.qkv.weight": session.model.model.visual.blocks[0].attn.qkv,
        "lm_head.weight": session.model.get_output_embeddings(),
    }
    for name, layer in unpacked.items():
        assert type(layer) is torch.nn.Linear
        original = next(value for key, value in whole.items() if key.endswith(name)).float()
        lost = (layer.weight - original).norm() / original.norm()
        assert 0.01 < lost < 0.2  # NF4 keeps about a tenth of it wrong
    rows = demo_rows.test.head(2)
    session.vision_cache.fill(rows, (1024, 65536), lambda *_: None)
    session.vision_cache.offload_tower()
    assert np.isfinite(vqa.predict_logits(session, rows, ONE_VIEW)).all()


def test_what_is_unpacked_keeps_the_hook_that_fetches_its_inputs(
    stored_double, four_bits_on_the_cpu
):
    model = transformers.AutoModelForImageTextToText.from_pretrained(stored_double)
    layer = model.model.language_model.layers[0].mlp.up_proj
    layer.compute_dtype = torch.float32
    hook = AlignDevicesHook(execution_device="cpu")
    plain = vqa._plain_linear(add_hook_to_module(layer, hook), torch.float32)
    assert plain._hf_hook is hook
    x = torch.randn(2, layer.in_features)
    assert torch.allclose(plain(x), layer(x), atol=1e-5)


# --- Refused --------------------------------------------------------------------------------------

WITHOUT_A_GPU = vqa.Runtime("local", (), "fp32", "sdpa", ())


@pytest.mark.parametrize(
    ("stored", "quantization", "message"),
    [
        (
            {},
            "none",
            r"4-bit NF4 with double quantisation already: set quantization='4bit' instead",
        ),
        (
            {},
            "8bit",
            r"set quantization='4bit' instead of '8bit', or set model_id to the 16-bit or",
        ),
        (
            {"load_in_4bit": False, "load_in_8bit": True},
            "8bit",
            "stored in bitsandbytes 8-bit already, which cannot be trained here: set model_id to "
            "the 16-bit original, or to a copy of it in bitsandbytes 4-bit NF4",
        ),
        ({"bnb_4bit_quant_type": "fp4"}, "4bit", "stored in bitsandbytes 4-bit FP4 already, which"),
        (
            {"load_in_4bit": False, "quant_method": "gptq", "bits": 4},
            "4bit",
            "stored in gptq already, which cannot be trained here",
        ),
    ],
)
def test_a_format_that_does_not_fit_the_settings_is_refused_with_what_to_take_instead(
    stored, quantization, message, stored_double, four_bits_on_the_cpu, tmp_path
):
    folder = copy_with(stored_double, tmp_path / "other", **stored)
    with pytest.raises(ValueError, match=message):
        vqa.load_model(config_of(folder, quantization=quantization), WITHOUT_A_GPU)


def test_a_mixture_of_experts_stored_in_4_bits_is_refused(
    model_folders, four_bits_on_the_cpu, tmp_path
):
    folder = store_in_4_bit(model_folders["qwen3_vl_moe"], tmp_path / "mixture")
    experts = {
        name: value.dtype
        for name, value in load_file(folder / "model.safetensors").items()
        if ".experts." in name
    }
    assert set(experts.values()) == {torch.float32}
    with pytest.raises(ValueError, match="but for its experts, which take 16 bits there: set mod"):
        vqa.load_model(config_of(folder), WITHOUT_A_GPU)


def test_a_checkpoint_whose_config_does_not_say_that_it_is_packed_is_refused(
    stored_double, four_bits_on_the_cpu, tmp_path
):
    folder = shutil.copytree(stored_double, tmp_path / "silent")
    path = folder / "config.json"
    content = json.loads(path.read_text())
    del content["quantization_config"]
    path.write_text(json.dumps(content))
    said = r"unexpected_keys \['model.language_model.layers.0.mlp.down_proj.weight.absmax'.*; down"
    with pytest.raises(RuntimeError, match=said):
        vqa.load_model(config_of(folder), WITHOUT_A_GPU)


def test_packed_weights_without_their_scales_are_refused(
    stored_double, four_bits_on_the_cpu, tmp_path
):
    folder = shutil.copytree(stored_double, tmp_path / "bare")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    tensors = {}
    for key, value in load_file(folder / "model.safetensors").items():
        if not key.startswith(f"{name}."):
            tensors[key] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="4-bit weight of .*layers.0.mlp.up_proj without its sc"):
        vqa.load_model(config_of(folder), WITHOUT_A_GPU)


# --- The unquantised model beside it --------------------------------------------------------------


def config_16_bit(stored, scored):
    """Trained in 4 bits, scored in 16 by another folder."""
    scored = None if scored is None else str(scored)
    return config_of(stored, score_precision="16bit", score_model_id=scored)


def test_a_model_that_is_stored_in_4_bits_needs_another_one_for_scoring_in_16(
    stored_double, four_bits_on_the_cpu, tmp_path
):
    said = (
        "score_precision '16bit' needs an unquantised model, and .*double.* is stored in "
        "bitsandbytes 4-bit NF4 with double quantisation: set score_model_id to the 16-bit orig"
    )
    copied = shutil.copytree(stored_double, tmp_path / "also_double")
    for scored in (None, copied):
        config = config_16_bit(stored_double, scored)
        with pytest.raises(ValueError, match=said):
            vqa.preflight(config)
        with pytest.raises(ValueError, match=said):
            vqa.load_model(config, WITHOUT_A_GPU)


def test_the_model_for_scoring_has_to_fit_the_adapter(model_folders, stored_double, tmp_path):
    vqa.check_score_model(config_16_bit(stored_double, model_folders["qwen3_vl"]))
    other_family = config_16_bit(stored_double, model_folders["qwen2_5_vl"])
    with pytest.raises(ValueError, match="is of the family 'qwen2_5_vl' instead of 'qwen3_vl'. Se"):
        vqa.check_score_model(other_family)
    wider = shutil.copytree(stored_double, tmp_path / "wider")
    path = wider / "config.json"
    content = json.loads(path.read_text())
    del content["quantization_config"]
    content["text_config"]["intermediate_size"] = 4096
    path.write_text(json.dumps(content))
    said = r"layers.0.mlp.gate_proj has the shape \(4096, 192\) instead of \(448, 192\). Set score_"
    with pytest.raises(ValueError, match=said):
        vqa.check_score_model(config_16_bit(stored_double, wider))
    fits, figures = vqa.fits_in_16_bits(config_16_bit(stored_double, wider), free=0.52)
    assert not fits
    assert "0.54 GiB for the unquantised model" in figures


def test_the_model_for_scoring_may_be_stored_in_fp8(stored_double, tmp_path, caplog):
    scored = copy_with(stored_double, tmp_path / "fp8", load_in_4bit=False, quant_method="fp8")
    with caplog.at_level("INFO", "vqa"):
        vqa.check_score_model(config_16_bit(stored_double, scored))
    assert f"Decision: scoring in 16 bits uses {scored}" in caplog.text


def test_a_model_for_scoring_with_other_prompts_is_refused_before_training(
    model_folders, stored_double, tmp_path
):
    other = shutil.copytree(model_folders["qwen3_vl"], tmp_path / "other")
    (other / "chat_template.jinja").write_text(THINKS_BY_DEFAULT, encoding="utf-8")
    said = "other has another chat template than .*score_precision='trained'\n--- training:\n<.*"
    with pytest.raises(ValueError, match=f"(?s){said}--- scoring:.*<think>\n\n</think>"):
        vqa.check_score_model(config_16_bit(stored_double, other))


def test_a_model_for_scoring_that_is_not_there_is_named_with_its_setting(
    stored_double, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = config_16_bit(stored_double, "nobody/no-such-model")
    with pytest.raises(OSError, match="^score_model_id: nobody/no-such-model could not be loaded"):
        vqa.check_score_model(config)


def test_an_adapter_trained_in_4_bits_opens_on_the_16_bit_model_as_peft_opens_it(
    model_folders, stored_double, four_bits_on_the_cpu, demo_rows, mini_run, tmp_path
):
    run = mini_run(
        model_id=str(stored_double),
        quantization="4bit",
        score_precision="16bit",
        score_model_id=str(model_folders["qwen3_vl"]),
    )
    trained = vqa.open_stage_session(run, "train", [0], quiet)
    perturb_adapter(vqa.attach_lora(trained.model, run.config, seed=0)).save_pretrained(tmp_path)
    session = vqa.open_stage_session(run, "rescore", [0], quiet)
    assert session.config.model_path == str(model_folders["qwen3_vl"])
    assert session.vision_cache.folder == trained.vision_cache.folder  # features serve both
    by_peft = vqa.open_session(session.config, run.train.iloc[0])
    peft.PeftModel.from_pretrained(by_peft.model, tmp_path).eval()
    expected = vqa.predict_logits(by_peft, demo_rows.test.head(3), ONE_VIEW)
    adapted = vqa.load_adapter(session.model, tmp_path)
    vqa.use_fast_layers(session, adapted, questions=3)
    layer = session.decoder_layers[0].mlp.up_proj
    assert type(layer.base_layer) is torch.nn.Linear
    scores = vqa.predict_logits(session, demo_rows.test.head(3), ONE_VIEW)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    without = vqa.open_session(session.config, run.train.iloc[0])
    plain = vqa.predict_logits(without, demo_rows.test.head(3), ONE_VIEW)
    assert np.abs(scores - plain).max() > 0.1


@pytest.mark.slow
def test_a_run_on_a_stored_checkpoint_gives_the_files_of_one_that_quantises_while_loading(
    model_folders, stored_double, four_bits_on_the_cpu, mini_run
):
    """Zero-shot scores, training, scoring and scoring in 16 bits, through all stages."""
    source = str(model_folders["qwen3_vl"])

    def scores_of_run(name, **settings):
        run = mini_run(
            run_name=name, quantization="4bit", score_precision="16bit", use_tta=False, **settings
        )
        run_all(run, ("train", "predict", "rescore"))
        return [read_logits(run, 1, kind) for kind in ("oof", "test", "oof_16bit", "test_16bit")]

    theirs = scores_of_run("stored", model_id=str(stored_double), score_model_id=source)
    ours = scores_of_run("own", model_id=source)
    for our_scores, their_scores in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(their_scores, our_scores, atol=1e-5)


@pytest.mark.slow
def test_preflight_says_what_is_stored_and_counts_the_model_for_scoring(
    model_folders, stored_double, four_bits_on_the_cpu, mini_data, tmp_path
):
    config = dataclasses.replace(
        config_16_bit(stored_double, model_folders["qwen3_vl"]),
        data_dir=str(mini_data),
        cache_dir=str(tmp_path),
    )
    facts = vqa.preflight(config, rows=4)
    assert facts["stored weights"] == "bitsandbytes 4-bit NF4 with double quantisation"
    assert facts["scoring in 16 bits"].startswith("0.5")
