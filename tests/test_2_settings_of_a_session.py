"""Part 2, Settings of a session: preset, overrides and environment become one Config."""

import json

import pytest
from cards import A100, CARDS, T4
from machine import KAGGLE

import vqa_helpers as vqa


def test_environment_wins_over_the_notebooks_overrides(tmp_path):
    environ = {
        "VQA_PRESET": "demo",
        "VQA_OUTPUT_DIR": str(tmp_path),
        "VQA_RUN_NAME": "mine",
        "VQA_OVERRIDES": json.dumps({"num_epochs": 5, "train_folds": [0, 2]}),
    }
    config = vqa.load_config("kaggle_t4x2", {"num_epochs": 1, "seed": 7}, environ)
    assert config.preset_name == "demo"
    assert config.num_epochs == 5
    assert config.seed == 7
    assert config.train_folds == (0, 2)
    assert config.run_dir == tmp_path / "mine"
    assert config.data_dir == str(vqa.DEMO)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[1]", "must be a JSON object")]
)
def test_overrides_that_are_no_json_object_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        vqa.load_config("demo", environ={"VQA_OVERRIDES": text})


def test_competition_files_without_a_gpu_stop(machine):
    machine.environment(**KAGGLE)
    machine.helper()
    machine.competition()
    with pytest.raises(
        RuntimeError, match="^Competition files but no GPU: switch on the accelerator"
    ):
        machine.run()


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Let detect_runtime find these cards: plug_in([(name, MiB, capability), ...])."""

    def make(cards) -> None:
        tool = tmp_path / "nvidia-smi"
        lines = [
            f"{index}, {name}, {memory}, {capability}"
            for index, (name, memory, capability) in enumerate(cards)
        ]
        tool.write_text("\n".join(["#!/bin/sh", "cat <<END", *lines, "END", ""]))
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


@pytest.mark.parametrize(("cards", "preset", "reason"), CARDS.values(), ids=CARDS)
def test_auto_follows_the_smallest_card_and_says_why(plug_in, mini_data, cards, preset, reason):
    plug_in(cards)
    config = vqa.load_config("auto", {"data_dir": str(mini_data)}, environ={})
    assert config.preset_name == preset
    assert reason in config.preset_reason
    assert "\n" not in config.preset_reason
    smallest_memory = min(memory for _, memory, _ in cards)
    effective_batch = 32 if smallest_memory >= 40960 else 8
    assert config.batch_size * config.grad_accum_steps == effective_batch
    oldest_capability = min(capability for _, _, capability in cards)
    precision = "fp16" if oldest_capability < 8 else "bf16"
    assert vqa.detect_runtime().precision == precision


def test_auto_refuses_a_p100_with_the_way_out_and_a_card_that_is_too_small(plug_in, mini_data):
    plug_in([("Tesla P100-PCIE-16GB", 16384, 6.0)])
    with pytest.raises(RuntimeError, match="P100-PCIE-16GB is too old .* choose 'GPU T4 x2'"):
        vqa.load_config("auto", {"data_dir": str(mini_data)}, environ={})
    plug_in([("NVIDIA GeForce GTX 1650", 4096, 7.5)])
    with pytest.raises(RuntimeError, match="GTX 1650, 4.0 GiB: too small .* take one of 6 GB"):
        vqa.load_config("auto", {"data_dir": str(mini_data)}, environ={})


@pytest.mark.parametrize(
    ("gpus", "steps_down"),
    [
        ((T4, T4), False),
        ((T4,), True),
        ((A100,), False),
    ],
)
def test_the_large_preset_steps_down_to_the_8b_where_its_model_does_not_fit(
    monkeypatch, gpus, steps_down
):
    runtime = vqa.Runtime("local", gpus, "fp16", "sdpa", ())
    monkeypatch.setattr(vqa, "detect_runtime", lambda *_: runtime)
    config = vqa.load_config("large", {"data_dir": str(vqa.DEMO)}, environ={})
    assert config.spread_model is not steps_down
    assert ("35B" in config.model_id) is not steps_down
    reason = "stepped down to the 8B: the 35B needs 19.5 GiB"
    assert config.preset_reason.startswith(reason) is steps_down
    # What the user asks for stays.
    own = vqa.load_config("large", {"data_dir": str(vqa.DEMO), "model_id": "mine"}, environ={})
    assert own.model_id == "mine"
    assert own.spread_model


def test_without_a_gpu_auto_names_the_variable_and_what_runs_on_a_cpu():
    runtime = vqa.Runtime("kaggle", (), "fp32", "sdpa", ())
    with pytest.raises(RuntimeError) as caught:
        vqa.choose_preset(runtime, has_competition=True)
    message = str(caught.value)
    for part in ("VQA_PRESET", "on a CPU 'demo' runs", "'quick_test' with quantization='none'"):
        assert part in message


# Cards; preset and overrides; what the refusal says, None: it runs.
ONE_T4 = [("Tesla T4", 15360, 7.5)]
IMPOSSIBLE = {
    "a quantised model on a CPU": (
        [],
        "kaggle_t4x2",
        {},
        "Preset 'kaggle_t4x2' cannot run here: quantization '4bit' needs a GPU.*'demo' runs",
    ),
    "8 billion in 16 bits on a T4": (
        ONE_T4,
        "colab_a100",
        {},
        "takes 15 GiB at least, and Tesla T4 has 15 for it and 1 GiB of work beside it: .*'4bit'",
    ),
    "32 billion in 4 bits on a T4": (
        ONE_T4 * 2,
        "colab_t4",
        {"model_id": "Qwen/Qwen3-VL-32B-Instruct"},
        "takes 16 GiB at least, and Tesla T4 has 15",
    ),
    "72 billion spread over two T4": (
        ONE_T4 * 2,
        "large",
        {"model_id": "Qwen/Qwen2.5-VL-72B-Instruct"},
        "takes 36 GiB at least, and Tesla T4 has 21",
    ),
    "27 billion in 16 bits on 40 GB": (
        [("NVIDIA A100-SXM4-40GB", 40960, 8.0)],
        "gpu_80gb",
        {},
        "Qwen/Qwen3.5-27B takes 50 GiB at least, and NVIDIA A100-SXM4-40GB has 40",
    ),
    "27 billion in 16 bits on 80 GB": ([("NVIDIA H100", 81559, 9.0)], "gpu_80gb", {}, None),
    "9 billion in 4 bits on two T4": (
        ONE_T4 * 2,
        "kaggle_t4x2",
        {"model_id": "Qwen/Qwen3.5-9B"},
        None,
    ),
    "more than the computer's memory": (
        [],
        "quick_test",
        {"quantization": "none", "model_id": "some/Model-100000B"},
        "takes 373000 GiB at least, and this computer has .* beside it: switch on the accelerator",
    ),
    "8 billion in 4 bits on a T4": (ONE_T4, "colab_t4", {}, None),
    "8 billion in 4 bits on two T4": (ONE_T4 * 2, "max_score", {}, None),
    "a size that the name does not give": (ONE_T4, "colab_a100", {"model_id": "my/vqa"}, None),
    "a local folder, which preflight computes": (
        ONE_T4,
        "colab_a100",
        {"model_id": "data/tiny_qwen3_vl"},
        None,
    ),
    "a small model unquantised on a CPU": (
        [],
        "quick_test",
        {"quantization": "none", "model_id": "some/Model-0.5B"},
        None,
    ),
}


@pytest.mark.parametrize(
    ("cards", "preset", "overrides", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE
)
def test_a_preset_that_cannot_run_on_this_machine_is_refused_at_once(
    plug_in, mini_data, cards, preset, overrides, message
):
    plug_in(cards)
    fields = {"data_dir": str(mini_data), **overrides}
    if message is None:
        assert vqa.load_config(preset, fields, environ={}).preset_name == preset
        return
    with pytest.raises(ValueError, match=message):
        vqa.load_config(preset, fields, environ={})


def test_a_model_is_not_spread_over_parts_of_a_gpu(monkeypatch, replace):
    part = {"index": "MIG-1", "name": "A100 MIG 7g.40gb", "memory_gib": 38.0, "capability": 8.0}
    runtime = vqa.Runtime("local", (part,), "bf16", "sdpa", ())
    monkeypatch.setattr(vqa, "detect_runtime", lambda *_: runtime)
    config = vqa.Config.preset("large")
    with pytest.raises(ValueError, match="spread_model needs whole GPUs, and A100 MIG 7g.40gb"):
        vqa.require_machine(config)
    vqa.require_machine(replace(config, spread_model=False))
