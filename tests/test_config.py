"""One config: presets, overrides, environment, and the decisions that follow from the hardware."""

import json

import pytest

import vqa_helpers as vqa

T4 = {"index": 0, "name": "Tesla T4", "memory_gib": 15.0, "capability": 7.5}
A100 = {"index": 0, "name": "A100-SXM4-40GB", "memory_gib": 39.5, "capability": 8.0}
P100 = {"index": 0, "name": "Tesla P100", "memory_gib": 16.0, "capability": 6.0}


@pytest.mark.parametrize("name", sorted(vqa.PRESETS))
def test_every_preset_is_valid_and_keeps_the_effective_batch(name):
    config = vqa.Config.preset(name)
    assert config.preset_name == name
    assert config.batch_size * config.grad_accum_steps == (32 if name == "colab_a100" else 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"learning_rat": 1e-4},
            "Unknown config field 'learning_rat'; did you mean 'learning_rate'?",
        ),
        ({"n_folds": 1}, "'n_folds' is 1; it needs at least 2"),
        ({"n_folds": "3"}, "'n_folds' is '3'; it needs int"),
        ({"use_tta": 1}, "'use_tta' is 1; it needs bool"),
        ({"lora_dropout": 1.0}, "'lora_dropout' is 1.0; it needs 0 <= value < 1"),
        ({"learning_rate": 0.0}, "'learning_rate' is 0.0; it needs a positive number"),
        ({"quantization": "4-bit"}, "'quantization' is '4-bit'; it needs one of 4bit, 8bit, none"),
        ({"tta_rotations": 3}, "'tta_rotations' is 3; it needs 1, 2 or 4"),
        ({"tta_scales": (0.9,)}, "'tta_scales' is (0.9,)"),
        ({"train_folds": (3,)}, "'train_folds' is (3,); it needs folds below 3"),
        ({"train_folds": ()}, "'train_folds' is (); it needs at least one fold"),
        (
            {"train_folds": (0, 0)},
            "'train_folds' is (0, 0); it needs at least one fold, and none twice",
        ),
        ({"seed": -1}, "'seed' is -1; it needs at least 0"),
        (
            {"min_pixels": 9000, "max_pixels": 8000},
            "'min_pixels' is 9000; it needs at most max_pixels, 8000",
        ),
        ({"save_every_steps": 0}, "'save_every_steps' is 0; it needs at least 1"),
        ({"use_swa": True, "swa_start_epoch": 0}, "'swa_start_epoch' is 0; it needs at least 1"),
        (
            {"use_ema": False, "mix_weights": True},
            "'mix_weights' is True; it needs use_ema or use_swa",
        ),
        (
            {"adaptive_tta": 0.5, "mix_weights": True},
            "'mix_weights' is True; it needs use_ema or use_swa",
        ),
        (
            {"use_swa": True, "swa_start_epoch": 2},
            "'swa_start_epoch' is 2; it needs an epoch below num_epochs, 2",
        ),
        (
            {"prompt_templates": {"colour": "x"}},
            "'prompt_templates' is {'colour': 'x'}; it needs keys among",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(fields, message):
    with pytest.raises(ValueError) as error:
        vqa.Config.preset("kaggle_t4x2", **fields)
    assert message in str(error.value)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="'kagle_t4x2'; did you mean 'kaggle_t4x2'"):
        vqa.Config.preset("kagle_t4x2")


def test_environment_wins_over_the_notebooks_overrides(tmp_path):
    environ = {
        "VQA_PRESET": "demo",
        "VQA_OUTPUT_DIR": str(tmp_path),
        "VQA_RUN_NAME": "mine",
        "VQA_OVERRIDES": json.dumps({"num_epochs": 5, "train_folds": [0, 2]}),
    }
    config = vqa.load_config("kaggle_t4x2", {"num_epochs": 1, "seed": 7}, environ)
    assert (config.preset_name, config.num_epochs, config.seed) == ("demo", 5, 7)
    assert config.train_folds == (0, 2)
    assert config.run_dir == tmp_path / "mine"
    assert config.data_dir == str(vqa.DEMO)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[1]", "must be a JSON object")]
)
def test_overrides_that_are_no_json_object_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        vqa.load_config("demo", environ={"VQA_OVERRIDES": text})


def test_default_run_name_depends_on_results_not_on_places():
    base = vqa.Config.preset("demo")
    assert (
        base.run_dir.name
        == vqa.Config.preset("demo", output_dir="elsewhere", log_level="DEBUG").run_dir.name
    )
    assert base.run_dir.name != vqa.Config.preset("demo", learning_rate=5e-4).run_dir.name


def test_config_table_shows_what_differs_from_the_default():
    table = vqa.Config.preset("demo").table()
    assert table.loc["num_epochs"].tolist() == ["12", "2"]
    assert table.loc["seed"].tolist() == ["42", ""]
    differs = (table["default, where it differs"] != "").tolist()
    assert differs == sorted(differs, reverse=True)  # they come first
    assert sorted(table.index) == sorted(field.name for field in vqa.dataclasses.fields(vqa.Config))


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [((), "fp32"), ((T4, T4), "fp16"), ((A100,), "bf16"), ((A100, T4), "fp16")],
)
def test_precision_follows_the_oldest_card(gpus, expected):
    precision, reason = vqa.decide_precision("auto", gpus)
    assert precision == expected and expected in reason


def test_p100_is_refused_with_the_way_out():
    with pytest.raises(RuntimeError, match="Tesla P100 is too old .* choose 'GPU T4 x2'"):
        vqa.decide_precision("auto", (P100,))


@pytest.mark.parametrize(
    ("gpus", "steps_down"), [((T4, T4), False), ((T4,), True), ((A100,), False), ((), True)]
)
def test_the_large_preset_steps_down_to_the_8b_where_its_model_does_not_fit(
    monkeypatch, gpus, steps_down
):
    monkeypatch.setattr(
        vqa, "detect_runtime", lambda *_: vqa.Runtime("local", gpus, "fp16", "sdpa", ())
    )
    config = vqa.load_config("large", {"data_dir": str(vqa.DEMO)}, environ={})
    assert ("30B" in config.model_id) is config.spread_model is not steps_down
    assert (
        config.preset_reason.startswith("stepped down to the 8B: the 30B needs 18 GiB")
        is steps_down
    )
    own = vqa.load_config("large", {"data_dir": str(vqa.DEMO), "model_id": "mine"}, environ={})
    assert own.model_id == "mine" and own.spread_model  # what the user asks for stays


def test_attention_is_sdpa_unless_the_config_asks_for_another(monkeypatch):
    monkeypatch.setattr(
        vqa.importlib.util, "find_spec", lambda name: object()
    )  # FlashAttention-2 is installed
    for gpus in ((), (T4,), (A100,)):
        assert vqa.decide_attention("auto", gpus, "bf16")[0] == "sdpa"
    assert vqa.decide_attention("eager", (T4,), "fp16")[0] == "eager"
    assert vqa.decide_attention("flash_attention_2", (A100,), "bf16")[0] == "flash_attention_2"


@pytest.mark.parametrize(
    ("gpus", "precision", "package"),
    [
        ((A100,), "bf16", None),
        ((A100,), "fp32", True),
        ((A100, T4), "fp16", True),
        ((), "fp32", True),
    ],
)
def test_flash_attention_is_refused_where_it_cannot_run(monkeypatch, gpus, precision, package):
    monkeypatch.setattr(vqa.importlib.util, "find_spec", lambda name: package)
    with pytest.raises(
        ValueError,
        match="needs capability 8.0, half precision and the package flash_attn; 'auto' is",
    ):
        vqa.decide_attention("flash_attention_2", gpus, precision)


# Name, MiB and capability as nvidia-smi reports them; the preset that "auto" picks; a word of its reason.
CARDS = {
    "T4 x2": (
        [("Tesla T4", 15360, 7.5)] * 2,
        "kaggle_t4x2",
        "smallest of 2 GPUs: Qwen3-VL-8B fits in 4-bit",
    ),
    "T4": ([("Tesla T4", 15360, 7.5)], "colab_t4", "Tesla T4, 15.0 GiB: Qwen3-VL-8B fits in 4-bit"),
    "V100 16 GB": ([("Tesla V100-SXM2-16GB", 16160, 7.0)], "colab_t4", "fits in 4-bit"),
    "V100 32 GB": ([("Tesla V100-SXM2-32GB", 32510, 7.0)], "gpu_24gb", "1024 tokens"),
    "L4": ([("NVIDIA L4", 23034, 8.9)], "gpu_24gb", "1024 tokens"),
    "L4 x4": ([("NVIDIA L4", 23034, 8.9)] * 4, "gpu_24gb", "smallest of 4 GPUs"),
    "A10": ([("NVIDIA A10G", 23028, 8.6)], "gpu_24gb", "1024 tokens"),
    "A100 40 GB": ([("NVIDIA A100-SXM4-40GB", 40960, 8.0)], "colab_a100", "16 bits"),
    "A100 80 GB": ([("NVIDIA A100-SXM4-80GB", 81920, 8.0)], "colab_a100", "16 bits"),
    "A100 80 GB, PCIe": ([("NVIDIA A100 80GB PCIe", 81559, 8.0)], "colab_a100", "16 bits"),
    "H100": ([("NVIDIA H100 80GB HBM3", 81559, 9.0)], "colab_a100", "16 bits"),
    "H200": ([("NVIDIA H200", 143771, 9.0)], "colab_a100", "16 bits"),
    "RTX 12 GB": ([("NVIDIA GeForce RTX 3060", 12288, 8.6)], "colab_t4", "fits in 4-bit"),
    "RTX 8 GB": ([("NVIDIA GeForce RTX 3070", 8192, 8.6)], "single", "only Qwen3-VL-4B"),
    "unknown": ([("Some Future Card", 49140, 12.0)], "colab_a100", "Some Future Card, 48.0 GiB"),
    "mixed": (
        [("NVIDIA A100-SXM4-80GB", 81920, 8.0), ("Tesla T4", 15360, 7.5)],
        "kaggle_t4x2",
        "Tesla T4, 15.0 GiB",
    ),
}


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Let detect_runtime find these cards: plug_in([(name, MiB, capability), ...])."""

    def make(cards) -> None:
        tool = tmp_path / "nvidia-smi"
        lines = "".join(
            f"{index}, {', '.join(map(str, card))}\n" for index, card in enumerate(cards)
        )
        tool.write_text(f"#!/bin/sh\ncat <<END\n{lines}END\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


@pytest.mark.parametrize(("cards", "preset", "reason"), CARDS.values(), ids=CARDS)
def test_auto_follows_the_smallest_card_and_says_why(plug_in, mini_data, cards, preset, reason):
    plug_in(cards)
    config = vqa.load_config("auto", {"data_dir": str(mini_data)}, environ={})
    assert (
        config.preset_name == preset
        and reason in config.preset_reason
        and "\n" not in config.preset_reason
    )
    memory = min(memory for _, memory, _ in cards)
    assert config.batch_size * config.grad_accum_steps == (32 if memory >= 40960 else 8)
    precision = vqa.detect_runtime().precision
    assert precision == ("fp16" if min(capability for _, _, capability in cards) < 8 else "bf16")


def test_auto_refuses_a_p100_with_the_way_out_and_a_card_that_is_too_small(plug_in, mini_data):
    plug_in([("Tesla P100-PCIE-16GB", 16384, 6.0)])
    with pytest.raises(RuntimeError, match="P100-PCIE-16GB is too old .* choose 'GPU T4 x2'"):
        vqa.load_config("auto", {"data_dir": str(mini_data)}, environ={})
    plug_in([("NVIDIA GeForce GTX 1650", 4096, 7.5)])
    with pytest.raises(RuntimeError, match="GTX 1650, 4.0 GiB: too small .* take one of 6 GB"):
        vqa.load_config("auto", {"data_dir": str(mini_data)}, environ={})


def test_why_a_preset_was_picked_changes_no_result():
    by_name = vqa.Config.preset("demo")
    assert by_name.preset_reason == "chosen by name"
    picked = vqa.Config.preset("auto")
    assert (picked.preset_name, picked.preset_reason) == ("demo", "no competition files were found")
    assert picked.fingerprint == by_name.fingerprint


def test_competition_files_without_a_gpu_stop_the_run():
    with pytest.raises(RuntimeError, match="switch on the accelerator"):
        vqa.choose_preset(vqa.Runtime("kaggle", (), "fp32", "sdpa", ()), has_competition=True)


def test_gpus_are_read_from_nvidia_smi_and_filtered_by_visibility(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, Tesla T4, 15360, 7.5'\necho '1, Tesla T4, 15360, 7.5'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu["index"] for gpu in vqa.detect_runtime().gpus] == [0, 1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    runtime = vqa.detect_runtime()
    assert [gpu["index"] for gpu in runtime.gpus] == [1]
    assert runtime.precision == "fp16" and runtime.gpus[0]["memory_gib"] == 15.0


def test_a_failing_nvidia_smi_means_no_gpu(tmp_path, monkeypatch, caplog):
    """So it is on a machine whose accelerator is switched off: the tool is there, its driver is not."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho failed\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert vqa.detect_runtime().gpus == ()
    assert "nvidia-smi failed with 'failed'" in caplog.text


def test_find_competition_prefers_the_named_folder_then_the_mounts_then_the_demo(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(vqa, "MOUNTS", {str(tmp_path): 4})
    assert vqa.find_competition() == vqa.DEMO
    for place in ("competitions/vqa", "datasets/me/copy"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        for name in vqa.COMPETITION_FILES:
            (folder / name).touch()
        if place.startswith("competitions"):
            assert vqa.find_competition() == folder
    with pytest.raises(ValueError, match="Several folders hold a competition: .*set data_dir"):
        vqa.find_competition()
    (folder / "test.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no test\.csv"):
        vqa.find_competition(folder)
