"""Every family's tiny twin goes through the whole pipeline and computes what Hugging Face's own forward pass does."""

import json
import re
import shutil
from types import SimpleNamespace

import accelerate
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import TWINS, perturb_adapter
from safetensors.torch import load_file, save_file
from test_alignment import gradients, huggingface_loss

import vqa_helpers as vqa

NOT_TRAINED = ("visual", "experts", "lm_head", "embed_tokens", "norm", "conv1d", "mlp.gate.")


@pytest.fixture(params=sorted(vqa.FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def family_session(family, model_folders, demo_rows):
    config = vqa.Config.preset("demo", model_id=str(model_folders[family]), label_smoothing=0.0)
    return vqa.open_session(config, demo_rows.train.iloc[0])


def files(run):
    """What a run leaves behind: adapters, logits and submission."""
    patterns = ("fold_0/adapter_*/adapter_model.safetensors", "fold_0/oof.npz", "fold_0/test.npz")
    return {
        path.name: path.read_bytes() for pattern in patterns for path in run.directory.glob(pattern)
    }


def test_there_is_a_twin_of_every_family():
    assert {"qwen3_vl", *TWINS} == set(vqa.FAMILIES)


def test_a_family_trains_caches_rotates_and_resumes_to_the_same_bytes(
    family, mini_run, model_folders, tmp_path
):
    settings = {
        "model_id": str(model_folders[family]),
        "train_folds": (0,),
        "tta_rotations": 2,
        "batch_size": 4,
    }
    settings |= {"num_epochs": 1, "lora_dropout": 0.1, "save_every_steps": 2, "infer_batch_size": 4}
    plain = mini_run(
        **settings, output_dir=str(tmp_path / "plain"), cache_dir=str(tmp_path / "cache")
    )
    vqa.run_stages(plain, [0], ["train", "predict"], lambda *_, **__: None)
    assert [*(tmp_path / "cache").glob("*/*.safetensors")]  # the features are kept

    def stop(stage, done, total, **_):
        if (stage, done) == ("fold 0 training", 3):
            raise vqa.Interrupted

    stopped = mini_run(
        **settings, output_dir=str(tmp_path / "stopped"), cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(vqa.Interrupted):
        vqa.run_stages(stopped, [0], ["train", "predict"], stop)
    assert stopped.fold_dir(0).joinpath("checkpoints").exists() and not files(stopped)
    vqa.run_stages(stopped, [0], ["train", "predict"], lambda *_, **__: None)
    assert files(stopped) == files(plain) and len(files(plain)) >= 3

    logits = vqa.read_arrays(plain.fold_dir(0) / "test.npz", plain.fingerprint)["logits"]
    assert logits.shape == (12, 2, 4) and np.isfinite(logits).any(axis=(1, 2)).all()
    weights = load_file(plain.fold_dir(0) / "adapter_raw" / "adapter_model.safetensors")
    assert not [name for name in weights if any(part in name for part in NOT_TRAINED)]
    every_layer = {name.split(".layers.")[1].split(".")[0] for name in weights}
    settings = json.loads((model_folders[family] / "config.json").read_text())["text_config"]
    assert len(every_layer) == settings["num_hidden_layers"]


def test_a_familys_loss_and_gradients_equal_huggingfaces_own(family_session, demo_rows, replace):
    session, frame = family_session, demo_rows.train.head(3)
    session.config = replace(session.config, loss="vocabulary", shuffle_choices=False)
    model = vqa.use_fast_layers(
        session, vqa.attach_lora(session.model, session.config, seed=0), questions=3
    )
    perturb_adapter(model).train()
    batch = vqa.collate(
        session, [vqa.make_prompt(session, frame, row, [(0, 1, 2, 3)]) for row in range(3)]
    )
    ours = vqa.training_loss(session, vqa.answer_hidden_states(session, batch), batch)
    our_gradients = gradients(model, ours)
    for layer in model.modules():  # back to PEFT's own layers
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.__class__ = type(layer).__bases__[0]
    theirs = huggingface_loss(session, model, frame)
    their_gradients = gradients(model, theirs)
    assert our_gradients.norm() > 1e-3
    assert abs(ours.item() - theirs.item()) <= 1e-5 * abs(theirs.item())
    assert (our_gradients - their_gradients).norm() <= 1e-4 * their_gradients.norm()


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5"])
def test_preflight_says_where_it_computes_no_memory(family, model_folders, mini_data, monkeypatch):
    config = vqa.Config.preset("demo", model_id=str(model_folders[family]), data_dir=str(mini_data))
    facts = vqa.preflight(config, rows=4)
    assert (
        facts["memory needed"] == "not computed for this family of models" and facts["memory"] == {}
    )
    assert "questions in a pass" in facts["memory plan"]

    def full(*_):
        raise torch.OutOfMemoryError("while loading")

    monkeypatch.setattr(vqa, "open_session", full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        vqa.preflight(config, rows=4)
    assert caught.value.__notes__ == ["Memory: not computed for this family of models"]


def test_a_familys_rotations_score_like_prompts_of_their_own(
    family_session, demo_rows, monkeypatch
):
    views = [vqa.TTAView(f"rotation {turn}", turn) for turn in range(4)]
    perturb_adapter(vqa.attach_lora(family_session.model, family_session.config, seed=0)).eval()
    together = vqa.predict_logits(family_session, demo_rows.test.head(5), views)
    alone = [vqa.predict_logits(family_session, demo_rows.test.head(5), [view]) for view in views]
    assert np.allclose(together, np.concatenate(alone, axis=1), atol=1e-5)
    assert np.abs(together[:, 0] - together[:, 1]).max() > 1e-3


@pytest.fixture
def expert_model(model_folders):
    """The mixture's twin with experts in 4-bit, as load_model loads it on a GPU."""
    options = {
        "quantization_config": vqa.quantization_config("4bit", "fp32"),
        "device_map": {"": "cpu"},
    }
    with vqa.quantising_experts(vqa.FAMILIES["qwen3_vl_moe"].experts):
        return transformers.AutoModelForImageTextToText.from_pretrained(
            model_folders["qwen3_vl_moe"], **options
        )


def test_the_experts_of_a_mixture_are_loaded_in_4_bit_and_trained_through(
    expert_model, model_folders, demo_rows
):
    config = vqa.Config.preset(
        "demo", model_id=str(model_folders["qwen3_vl_moe"]), label_smoothing=0.0
    )
    session = vqa.open_session(config, demo_rows.train.iloc[0])
    batch = vqa.collate(
        session,
        [vqa.make_prompt(session, demo_rows.train, row, [(0, 1, 2, 3)]) for row in range(3)],
    )
    plain = vqa.answer_hidden_states(session, batch).detach()
    whole = session.model.model.language_model.layers[0].mlp.experts.gate_up_proj
    vqa.remove_gpu_syncs(expert_model)
    session.model = expert_model
    packed = expert_model.model.language_model.layers[0].mlp.experts
    original = packed.parametrizations.gate_up_proj.original
    assert original.dtype == torch.uint8 and original.numel() == whole.numel() // 2
    assert (
        0.01 < (packed.gate_up_proj - whole).norm() / whole.norm() < 0.15
    )  # NF4 keeps about a tenth of it wrong
    model = vqa.use_fast_layers(
        session, vqa.attach_lora(expert_model, config, seed=0), questions=3
    ).train()
    states = vqa.answer_hidden_states(session, batch)
    assert (states - plain).norm() < 0.3 * plain.norm()
    vqa.training_loss(session, states, batch).backward()
    assert all(value.grad is not None for value in vqa.trainable_parameters(model).values())


def test_only_a_mixture_is_loaded_by_our_own_quantizer(expert_model):
    known = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    assert (
        known.__name__ == "Bnb4BitHfQuantizer"
        and expert_model.hf_quantizer.__class__.__name__ == "ExpertQuantizer"
    )


def test_a_model_spread_over_devices_keeps_our_layers_and_accelerates_hooks(
    family_session, demo_rows, replace
):
    session = family_session
    session.config = replace(session.config, spread_model=True)
    batch = vqa.collate(
        session,
        [vqa.make_prompt(session, demo_rows.train, row, [(0, 1, 2, 3)]) for row in range(3)],
    )
    plain = vqa.answer_hidden_states(session, batch).detach()
    places = dict.fromkeys(["model.visual", "model.language_model", "lm_head"], "cpu")
    layers = len(session.decoder_layers)
    places |= {f"model.language_model.layers.{number}": "cpu" for number in range(layers)}
    accelerate.dispatch_model(session.model, places, force_hooks=True)
    vqa.use_fast_layers(
        session, vqa.attach_lora(session.model, session.config, seed=0), questions=3
    ).train()
    vqa.recompute_layers(session, stored=0)
    calls, layer = [], session.decoder_layers[0]
    before = layer._hf_hook.pre_forward
    layer._hf_hook.pre_forward = lambda *given, **named: calls.append(1) or before(*given, **named)
    states = vqa.answer_hidden_states(session, batch)
    assert torch.allclose(states, plain, atol=1e-6) and len(calls) == 1
    vqa.training_loss(session, states, batch).backward()
    assert len(calls) == 1  # recomputed inside the hook, where the inputs lie where they are needed
    assert layer._old_forward.func is vqa.forward_with_checkpointing
    session.config = replace(
        session.config, spread_model=False
    )  # as a 4-bit model on one GPU, which has hooks, too
    vqa.use_fast_layers(session, session.model, questions=3)
    vqa.answer_hidden_states(session, batch)
    assert layer.forward.func is vqa.forward_with_checkpointing and len(calls) == 1


def test_a_checkpoint_quantised_while_loading_passes_the_check_of_what_was_loaded(
    family, model_folders, demo_config
):
    options = {
        "quantization_config": vqa.quantization_config("4bit", "fp32"),
        "device_map": {"": "cpu"},
    }
    load = transformers.AutoModelForImageTextToText.from_pretrained
    with vqa.quantising_experts(vqa.FAMILIES[family].experts or "no experts"):
        vqa._check_loading(
            demo_config, *load(model_folders[family], **options, output_loading_info=True)
        )


def test_one_worker_sees_all_gpus_of_a_spread_model(monkeypatch):
    gpus = tuple(
        {"index": number, "name": "T4", "memory_gib": 15.0, "capability": 7.5}
        for number in range(2)
    )
    monkeypatch.setattr(
        vqa, "detect_runtime", lambda *_: vqa.Runtime("kaggle", gpus, "fp16", "sdpa", ())
    )
    assert vqa.worker_devices(vqa.Config.preset("kaggle_t4x2")) == ["0", "1"]
    (together,) = vqa.worker_devices(vqa.Config.preset("kaggle_t4x2", spread_model=True))
    (environment,) = vqa.process_group_environments([together])
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1" and "RANK" not in environment


def test_a_model_that_does_not_fit_into_the_gpus_says_so(demo_config):
    model = SimpleNamespace(
        hf_device_map={"model.visual": 0, "model.layers.7": "cpu", "lm_head": "disk"}
    )
    report = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    with pytest.raises(
        RuntimeError, match="does not fit into the GPUs: model.layers.7 and 1 more parts do not"
    ):
        vqa._check_loading(demo_config, model, report)


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_a_checkpoint_that_lacks_weights_or_has_unknown_ones_is_refused(
    kind, model_folders, tmp_path, demo_rows
):
    folder = shutil.copytree(model_folders["qwen2_5_vl"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors |= {f"{name}_scale": torch.ones(1)} if kind == "unexpected" else {}
    tensors = {key: value for key, value in tensors.items() if kind == "unexpected" or key != name}
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
    vqa._check_loading(demo_config, SimpleNamespace(), report)
    assert "unexpected_keys ['mtp.layers.0.weight'] (1 in all)" in caplog.text


@pytest.fixture
def fp8_folder(model_folders, tmp_path):
    """The Qwen2.5-VL twin as the hub's FP8 checkpoints are: a scale beside each linear weight of the language model."""
    folder = shutil.copytree(model_folders["qwen2_5_vl"], tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    for name in [
        name
        for name in tensors
        if re.search(r"language_model.*_proj\.weight$|model\.layers.*_proj\.weight$", name)
    ]:
        scale = tensors[name].abs().max().reshape(1, 1) / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    skipped = ["visual", "model.visual", "lm_head"]
    settings["quantization_config"] = {"quant_method": "fp8", "modules_to_not_convert": skipped}
    settings["quantization_config"] |= {
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_an_fp8_checkpoint_is_dequantised_where_there_is_no_fp8(
    fp8_folder, model_folders, demo_rows
):
    scores = []
    for folder in (model_folders["qwen2_5_vl"], fp8_folder):
        config = vqa.Config.preset("demo", model_id=str(folder))
        session = vqa.open_session(config, demo_rows.train.iloc[0])
        weight = session.decoder_layers[0].self_attn.q_proj.weight
        assert weight.dtype.is_floating_point and weight.element_size() >= 2
        scores.append(
            vqa.predict_logits(session, demo_rows.test.head(4), [vqa.TTAView("rotation 0")])
        )
    difference = np.abs(scores[0] - scores[1])
    assert difference.max() > 0 and difference.mean() < 0.1 * np.abs(scores[0]).mean()


def test_an_fp8_checkpoint_is_not_quantised_twice(fp8_folder):
    gpu = {"index": 0, "name": "L4", "memory_gib": 22.5, "capability": 8.9}
    config = vqa.Config.preset("kaggle_t4x2", model_id=str(fp8_folder))
    with pytest.raises(
        ValueError, match="is stored in fp8 already: only fp8 is read, with quantization='none'"
    ):
        vqa.load_model(config, vqa.Runtime("local", (gpu,), "bf16", "sdpa", ()))


def test_a_checkpoint_in_another_format_is_refused(fp8_folder, demo_config, replace):
    path = fp8_folder / "config.json"
    path.write_text(path.read_text().replace('"fp8"', '"awq"'))
    with pytest.raises(ValueError, match="is stored in awq already: only fp8 is read"):
        vqa.load_model(replace(demo_config, model_id=str(fp8_folder)), vqa.detect_runtime())


def test_a_model_of_another_family_is_refused_before_its_weights_are_read(tmp_path, model_folders):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    config = vqa.Config.preset("demo", model_id=str(folder))
    with pytest.raises(
        ValueError, match="is of the family 'qwen2_vl'; known are qwen2_5_vl, qwen3_vl, .*qwen3_5"
    ):
        vqa.load_model(config, vqa.detect_runtime())
