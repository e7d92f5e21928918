"""Part 1, Runtime: cards, number format and attention follow the machine; seeds repeat torch."""

import pytest
import torch
from cards import A100, P100, T4
from machine import (
    A100_CARD,
    COLAB,
    FIND,
    H100_CARD,
    HARDWARE,
    IMPORT,
    INSTALL,
    KAGGLE,
    L4_CARD,
    P100_CARD,
    T4_CARD,
    UNKNOWN_CARD,
)

import vqa_helpers as vqa

# --- Cards ----------------------------------------------------------------------------------------


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Replace the tool by one that does this: nvidia_smi("echo failed", "exit 9")."""

    def make(*commands):
        tool = tmp_path / "nvidia-smi"
        tool.write_text("\n".join(["#!/bin/sh", *commands, ""]))
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


def test_gpus_are_read_from_nvidia_smi_and_filtered_by_visibility(nvidia_smi, monkeypatch):
    nvidia_smi("echo '0, Tesla T4, 15360, 7.5'", "echo '1, Tesla T4, 15360, 7.5'")
    assert [gpu["index"] for gpu in vqa.detect_runtime().gpus] == [0, 1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    runtime = vqa.detect_runtime()
    assert [gpu["index"] for gpu in runtime.gpus] == [1]
    assert runtime.precision == "fp16"
    assert runtime.gpus[0]["memory_gib"] == 15.0


def test_a_failing_nvidia_smi_means_no_gpu(nvidia_smi, caplog):
    """So it is where the accelerator is switched off: the tool is there, its driver is not."""
    nvidia_smi("echo failed", "exit 9")
    assert vqa.detect_runtime().gpus == ()
    assert "nvidia-smi failed with 'failed'" in caplog.text


ANY_PRESET = set(vqa.PRESETS)
# Signs of the platform, cards; then platform, number format and preset that follow.
PLATFORMS = {
    "T4 x2": (KAGGLE, (T4_CARD, T4_CARD), "kaggle", "fp16", {"kaggle_t4x2"}),
    "one T4": (COLAB, (T4_CARD,), "colab", "fp16", {"colab_t4"}),
    "A100": (COLAB, (A100_CARD,), "colab", "bf16", {"colab_a100"}),
    "L4": (COLAB, (L4_CARD,), "colab", "bf16", ANY_PRESET),
    "H100": (COLAB, (H100_CARD,), "colab", "bf16", ANY_PRESET),
    "unknown GPU": ({}, (UNKNOWN_CARD,), "local", "bf16", ANY_PRESET),
}


@pytest.mark.parametrize(
    ("signs", "cards", "platform", "precision", "presets"), PLATFORMS.values(), ids=PLATFORMS
)
def test_cards_choose_preset_and_precision(
    machine, capsys, signs, cards, platform, precision, presets
):
    machine.environment(**signs)
    machine.helper()
    machine.gpus(*cards)
    machine.competition()
    names = machine.run()
    assert (names.runtime.platform, names.runtime.precision) == (platform, precision)
    assert names.config.preset_name in presets - {"demo"}
    printed = capsys.readouterr().out
    assert f"precision {precision}" in printed
    assert f"{cards[0].split(',')[0]} (" in printed


def test_p100_is_refused_with_the_reason(machine):
    machine.environment(**KAGGLE)
    machine.helper()
    machine.gpus(P100_CARD)
    with pytest.raises(
        RuntimeError, match=r"P100.* too old for torch \(capability below 7.0\); choose 'GPU T4 x2'"
    ):
        machine.run(FIND, IMPORT, INSTALL, HARDWARE)


@pytest.mark.parametrize(("version", "warned"), [("2.9.1+cu128", True), ("2.10.0", False)])
def test_a_slow_torch_is_named(machine, capsys, version, warned):
    machine.versions["torch"] = version
    machine.helper()
    machine.gpus(T4_CARD)
    machine.run(FIND, IMPORT, INSTALL, HARDWARE)
    printed = capsys.readouterr().out
    assert ("warning: torch 2.9 may be 10 to 20 times slower" in printed) == warned


# --- Number format and attention ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ((), "fp32"),
        ((T4, T4), "fp16"),
        ((A100,), "bf16"),
        ((A100, T4), "fp16"),
    ],
)
def test_precision_follows_the_oldest_card(gpus, expected):
    precision, reason = vqa.decide_precision("auto", gpus)
    assert precision == expected
    assert expected in reason


def test_p100_is_refused_with_the_way_out():
    with pytest.raises(RuntimeError, match="Tesla P100 is too old .* choose 'GPU T4 x2'"):
        vqa.decide_precision("auto", (P100,))


def test_attention_is_sdpa_unless_the_config_asks_for_another(monkeypatch):
    is_installed = object()  # FlashAttention-2, as find_spec would find it
    monkeypatch.setattr(vqa.importlib.util, "find_spec", lambda name: is_installed)
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


# --- Seeds ----------------------------------------------------------------------------------------


def test_strict_seeding_makes_torch_deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # taken back with the test
    attention = torch.backends.cuda
    had_flash = attention.flash_sdp_enabled()
    had_memory_efficient = attention.mem_efficient_sdp_enabled()
    try:
        vqa.seed_everything(7, strict=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not attention.flash_sdp_enabled()
        assert not attention.mem_efficient_sdp_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        attention.enable_flash_sdp(had_flash)
        attention.enable_mem_efficient_sdp(had_memory_efficient)
