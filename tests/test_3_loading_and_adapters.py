"""Part 3, Loading and Adapters: model and LoRA arrive whole, or the error says what to do."""

import json
import re
import shutil
import time

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers
from machine import FIND, IMPORT
from references import perturb_adapter
from running import ONE_VIEW, plain_batch
from safetensors.torch import load_file, save_file
from twins import TINY

import vqa_helpers as vqa

# --- Not loaded -----------------------------------------------------------------------------------


def test_loading_is_retried_and_then_explained(demo_config, monkeypatch, replace):
    monkeypatch.setattr(vqa.time, "sleep", lambda _: None)
    missing = replace(demo_config, model_id="nobody/no-such-model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        OSError, match="(?s)nobody/no-such-model could not be loaded. Check the spelling"
    ):
        vqa.load_model(missing, vqa.detect_runtime())
    with pytest.raises(ValueError, match="quantization '4bit' needs a GPU"):
        vqa.load_model(replace(demo_config, quantization="4bit"), vqa.detect_runtime())


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_a_model_out_of_reach_names_the_attached_ones(machine, monkeypatch):
    # At once what takes minutes of retries.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    attached = machine.root / "kaggle/input"
    folders = [attached / "models/qwen/vl/transformers/8b/1", attached / "qwen/transformers/4b/1"]
    for folder in folders:
        touch(folder / "config.json")
        touch(folder / "model-00001-of-00002.safetensors")
    # No models, but what an earlier session left behind.
    touch(attached / "adapter/adapter_model.safetensors")
    touch(attached / "my-notebook/config.json")
    machine.helper()
    names = machine.run(FIND, IMPORT)
    config = names.vqa.Config(model_id="nobody/no-such-model", quantization="none")
    runtime = names.vqa.detect_runtime()
    listed = [str(folder) for folder in folders]
    explained = "^nobody/no-such-model could not be loaded. Check the spelling"
    with pytest.raises(OSError, match=explained) as caught:
        names.vqa.load_processor(config)
    assert f"set model_id (or VQA_MODEL) to one of {listed}" in str(caught.value)
    with pytest.raises(OSError, match=explained) as caught:
        names.vqa.load_model(config, runtime)
    assert f"set model_id (or VQA_MODEL) to one of {listed}" in str(caught.value)


def test_code_in_a_model_folder_is_refused_unless_asked_for(demo_config, replace, tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "model")
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["auto_map"] = {"AutoModel": "evil.Model"}
    path.write_text(json.dumps(content))
    config = replace(demo_config, model_id=str(folder))
    with pytest.raises(
        ValueError,
        match=r"config.json asks to run Python code from that folder .*trust_remote_code",
    ):
        vqa.load_processor(config)


# --- What was loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_a_checkpoint_that_lacks_weights_or_has_unknown_ones_is_refused(
    kind, model_folders, tmp_path, demo_rows
):
    folder = shutil.copytree(model_folders["qwen2_5_vl"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if kind == "missing":
        del tensors[name]
    else:
        tensors[f"{name}_scale"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = vqa.Config.preset("demo", model_id=str(folder))
    with pytest.raises(
        RuntimeError, match=rf"{kind}_keys \['.*layers.1.mlp.up_proj.weight.*\(1 in all\); down"
    ):
        vqa.open_session(config, demo_rows.train.iloc[0])


def test_weights_that_are_merely_left_over_are_a_warning(demo_config, caplog):
    report = {
        "missing_keys": set(),
        "unexpected_keys": {"mtp.layers.0.weight"},
        "mismatched_keys": set(),
    }
    vqa._check_weight_names(demo_config, report)
    assert "unexpected_keys ['mtp.layers.0.weight'] (1 in all)" in caplog.text


# --- Quantised ------------------------------------------------------------------------------------


def test_quantisation_spares_vision_tower_and_head():
    four = vqa.quantization_config("4bit", "fp16")
    assert four.bnb_4bit_quant_type == "nf4"
    assert four.bnb_4bit_use_double_quant
    assert four.bnb_4bit_compute_dtype == torch.float16
    assert {"visual", "lm_head"} <= set(four.llm_int8_skip_modules)
    assert vqa.quantization_config("8bit", "bf16").load_in_8bit
    assert vqa.quantization_config("none", "bf16") is None


def load_in_4_bit(folder, **options):
    """As load_model loads it on a GPU."""
    return transformers.AutoModelForImageTextToText.from_pretrained(
        folder,
        quantization_config=vqa.quantization_config("4bit", "fp32"),
        device_map={"": "cpu"},
        **options,
    )


@pytest.mark.parametrize("family", sorted(vqa.FAMILIES))
def test_a_checkpoint_quantised_while_loading_passes_the_check_of_what_was_loaded(
    family, model_folders, demo_config
):
    with vqa.quantising_experts(vqa.FAMILIES[family].experts or "no experts"):
        _, report = load_in_4_bit(model_folders[family], output_loading_info=True)
    vqa._check_weight_names(demo_config, report)


@pytest.fixture
def expert_model(model_folders):
    """The mixture's twin with experts in 4-bit."""
    with vqa.quantising_experts(vqa.FAMILIES["qwen3_vl_moe"].experts):
        return load_in_4_bit(model_folders["qwen3_vl_moe"])


def test_the_experts_of_a_mixture_are_loaded_in_4_bit_and_trained_through(
    expert_model, model_folders, demo_rows
):
    folder = str(model_folders["qwen3_vl_moe"])
    config = vqa.Config.preset("demo", model_id=folder, label_smoothing=0.0)
    session = vqa.open_session(config, demo_rows.train.iloc[0])
    batch = plain_batch(session, demo_rows.train, range(3))
    plain = vqa.answer_hidden_states(session, batch).detach()
    whole = session.model.model.language_model.layers[0].mlp.experts.gate_up_proj
    vqa.remove_gpu_syncs(expert_model)
    session.model = expert_model
    packed = expert_model.model.language_model.layers[0].mlp.experts
    original = packed.parametrizations.gate_up_proj.original
    assert original.dtype == torch.uint8
    assert original.numel() == whole.numel() // 2
    lost = (packed.gate_up_proj - whole).norm() / whole.norm()
    assert 0.01 < lost < 0.15  # NF4 keeps about a tenth of it wrong
    adapted = vqa.attach_lora(expert_model, config, seed=0)
    model = vqa.use_fast_layers(session, adapted, questions=3).train()
    states = vqa.answer_hidden_states(session, batch)
    assert (states - plain).norm() < 0.3 * plain.norm()
    vqa.training_loss(session, states, batch).backward()
    assert all(value.grad is not None for value in vqa.trainable_parameters(model).values())


def test_only_a_mixture_is_loaded_by_our_own_quantizer(expert_model):
    known = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    assert known.__name__ == "Bnb4BitHfQuantizer"
    assert expert_model.hf_quantizer.__class__.__name__ == "ExpertQuantizer"


# --- Stored in FP8 --------------------------------------------------------------------------------


@pytest.fixture
def fp8_folder(model_folders, tmp_path):
    """The Qwen2.5-VL twin as the hub's FP8 checkpoints are.

    There is a scale beside each linear weight of the language model.
    """
    folder = shutil.copytree(model_folders["qwen2_5_vl"], tmp_path / "fp8")
    linear = r"language_model.*_proj\.weight$|model\.layers.*_proj\.weight$"
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if re.search(linear, name):
            scale = weight.abs().max().reshape(1, 1) / 448  # the largest number of this format
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "fp8",
        "modules_to_not_convert": ["visual", "model.visual", "lm_head"],
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_an_fp8_checkpoint_is_dequantised_where_there_is_no_fp8(
    fp8_folder, model_folders, demo_rows
):
    def scores(folder):
        config = vqa.Config.preset("demo", model_id=str(folder))
        session = vqa.open_session(config, demo_rows.train.iloc[0])
        weight = session.decoder_layers[0].self_attn.q_proj.weight
        assert weight.dtype.is_floating_point
        assert weight.element_size() >= 2
        return vqa.predict_logits(session, demo_rows.test.head(4), ONE_VIEW)

    plain = scores(model_folders["qwen2_5_vl"])
    difference = np.abs(scores(fp8_folder) - plain)
    assert difference.max() > 0
    assert difference.mean() < 0.1 * np.abs(plain).mean()


def test_an_fp8_checkpoint_is_not_quantised_twice(fp8_folder):
    gpu = {"index": 0, "name": "L4", "memory_gib": 22.5, "capability": 8.9}
    config = vqa.Config.preset("kaggle_t4x2", model_id=str(fp8_folder))
    with pytest.raises(
        ValueError, match="is stored in fp8 already: set quantization='none' instead of '4bit', or"
    ):
        vqa.load_model(config, vqa.Runtime("local", (gpu,), "bf16", "sdpa", ()))


def test_a_checkpoint_in_another_format_is_refused(fp8_folder, demo_config, replace):
    path = fp8_folder / "config.json"
    path.write_text(path.read_text().replace('"fp8"', '"awq"'))
    with pytest.raises(ValueError, match="is stored in awq already, which cannot be trained"):
        vqa.load_model(replace(demo_config, model_id=str(fp8_folder)), vqa.detect_runtime())


# --- Adapters -------------------------------------------------------------------------------------


PROJECTIONS = {
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
}


def projection(name):
    """The layer that an adapter's parameter belongs to: q_proj of ...q_proj.lora_A.weight."""
    return name.split(".lora_")[0].rsplit(".", 1)[1]


def test_lora_reaches_the_language_model_only_and_depends_on_its_seed(session):
    first = vqa.attach_lora(session.model, session.config, seed=1)
    names = list(vqa.trainable_parameters(first))
    assert {projection(name) for name in names} == PROJECTIONS
    for name in names:
        assert ".language_model.layers." in name
        assert "visual" not in name
    weights = [value.clone() for value in vqa.trainable_parameters(first).values()]
    first.unload()
    second = vqa.attach_lora(session.model, session.config, seed=1)
    again = vqa.trainable_parameters(second).values()
    assert all(torch.equal(one, two) for one, two in zip(weights, again, strict=True))


def test_swapped_weights_are_put_back_even_after_an_error():
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(KeyError), vqa.swapped_weights({"w": parameter}, {"w": torch.ones(2)}):
        assert parameter.tolist() == [1, 1]
        raise KeyError
    assert parameter.tolist() == [0, 0]


def test_an_adapter_that_does_not_arrive_whole_is_refused(finished, tmp_path):
    folder = shutil.copytree(finished.fold_dir(0) / "adapter_raw", tmp_path / "adapter")
    session = vqa.open_session(finished.config, finished.train.iloc[0])
    vqa.load_adapter(session.model, folder).unload()
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    version = settings["peft_version"]
    saved_with = {
        version: "the same versions of all libraries; delete that folder and run again",
        "0.19.9": f"peft 0.19.9 (here {version}): install that version, or delete that folder",
    }
    for saved, advice in saved_with.items():
        path.write_text(json.dumps({**settings, "peft_version": saved}))
        with pytest.raises(vqa.CheckpointError) as caught:
            vqa.load_adapter(session.model, folder)
        message = str(caught.value)
        assert "was not loaded completely: ['base_model" in message
        assert f"; it was saved with {advice}" in message


def letter_scores(session, model, batch):
    """Scores of the letters, (questions, 4), by the session with this model."""
    session.model = model
    with torch.no_grad():
        states = vqa.answer_hidden_states(session, batch)
    return vqa.answer_scores(session, states)


def test_rank_stabilised_lora_is_scaled_by_the_root_of_its_rank_also_when_loaded_again(
    demo_rows, tmp_path
):
    config = vqa.Config.preset("demo", lora_r=4, lora_alpha=8, use_rslora=True)
    session = vqa.open_session(config, demo_rows.train.iloc[0])
    base = session.model
    batch = plain_batch(session, demo_rows.train, range(2))
    adapted = perturb_adapter(vqa.attach_lora(base, config, seed=0)).eval()
    query = session.decoder_layers[0].self_attn.q_proj
    assert query.scaling == {"default": 4.0}  # 8 / sqrt(4); without it 8 / 4
    by_peft = letter_scores(session, base, batch)
    vqa.use_fast_layers(session, adapted, questions=2)
    assert torch.allclose(letter_scores(session, base, batch), by_peft, atol=1e-5)
    adapted.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["use_rslora"] is True
    adapted.unload()
    loaded = vqa.load_adapter(base, tmp_path)
    assert session.decoder_layers[0].self_attn.q_proj.scaling == {"default": 4.0}
    vqa.use_fast_layers(session, loaded, questions=2)
    assert torch.allclose(letter_scores(session, base, batch), by_peft, atol=1e-5)


# --- Mixtures with recurrent layers ---------------------------------------------------------------

# Neither packed nor trained: they decide for a whole head or token.
GATES = {"mlp.gate", "mlp.shared_expert_gate", "linear_attn.in_proj_a", "linear_attn.in_proj_b"}
TRAINED_BESIDE_ATTENTION = {
    "linear_attn.in_proj_qkv",
    "linear_attn.in_proj_z",
    "linear_attn.out_proj",
    "mlp.shared_expert.gate_proj",
    "mlp.shared_expert.up_proj",
    "mlp.shared_expert.down_proj",
}


def part_of_layer(name):
    return name.split("layers.0.")[1]


def test_gates_of_a_recurrent_mixture_are_neither_packed_nor_trained(model_folders, demo_config):
    with vqa.quantising_experts(vqa.FAMILIES["qwen3_5_moe"].experts):
        model = load_in_4_bit(model_folders["qwen3_5_moe"])
    layer = model.model.language_model.layers[0]
    for name in GATES:
        assert layer.get_submodule(name).weight.dtype == torch.float32
    packed = {
        name for name, parameter in layer.named_parameters() if parameter.dtype == torch.uint8
    }
    experts = {
        f"mlp.experts.parametrizations.{name}.original" for name in ("gate_up_proj", "down_proj")
    }
    assert packed == {f"{name}.weight" for name in TRAINED_BESIDE_ATTENTION} | experts
    adapted = vqa.attach_lora(model, demo_config, seed=0)
    trained = [name for name in vqa.trainable_parameters(adapted) if ".layers.0." in name]
    assert {part_of_layer(name).split(".lora_")[0] for name in trained} == TRAINED_BESIDE_ATTENTION


def rewrite_weights(folder, change):
    """Replace the checkpoint's tensors by what change(tensors) gives."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def join_experts(tensors):
    """One tensor for all experts of a layer, as the hub's checkpoints have it."""
    joined = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(2):
        start = f"model.language_model.layers.{layer}.mlp.experts"
        experts = {}
        for part in ("gate", "up", "down"):
            names = [f"{start}.{number}.{part}_proj.weight" for number in range(4)]
            experts[part] = torch.stack([tensors[name] for name in names])
        joined[f"{start}.gate_up_proj"] = torch.cat([experts["gate"], experts["up"]], dim=1)
        joined[f"{start}.down_proj"] = experts["down"]
    return joined


def test_experts_stored_one_by_one_or_together_give_the_same_4_bits(model_folders, tmp_path):
    together = shutil.copytree(model_folders["qwen3_5_moe"], tmp_path / "together")
    rewrite_weights(together, join_experts)
    found = []
    for folder in (model_folders["qwen3_5_moe"], together):
        with vqa.quantising_experts(vqa.FAMILIES["qwen3_5_moe"].experts):
            model = load_in_4_bit(folder)
        found.append(model.model.language_model.layers[1].mlp.experts.down_proj)
    assert torch.equal(*found)
    assert found[0].std() > 0


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_weights_for_guessing_tokens_ahead_are_left_out_without_a_warning(
    family, model_folders, tmp_path, caplog
):
    """All checkpoints of Qwen3.5 and later carry such layers, `mtp`."""
    folder = shutil.copytree(model_folders[family], tmp_path / family)
    extra = {"mtp.fc.weight": torch.ones(4, 4), "mtp.layers.0.mlp.gate_proj.weight": torch.ones(4)}
    rewrite_weights(folder, lambda tensors: tensors | extra)
    config = vqa.Config.preset("demo", model_id=str(folder))
    vqa.load_model(config, vqa.detect_runtime())
    assert not caplog.records
