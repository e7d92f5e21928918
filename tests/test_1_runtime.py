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
    assert caplog.messages == ["No GPU is used: nvidia-smi failed with 'failed'"]


def test_without_a_list_of_names_gpus_are_known_by_their_numbers(nvidia_smi, caplog):
    nvidia_smi("[ $1 = -L ] && exit 9", "echo '0, Tesla T4, 15360, 7.5'")
    assert [gpu["index"] for gpu in vqa.detect_runtime().gpus] == [0]
    message = "GPUs are known by number, and no parts of them: nvidia-smi failed with ''"
    assert caplog.messages == [message]


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


# --- GPUs by their names, and parts of GPUs -------------------------------------------------------

LISTED = """\
GPU 0: Tesla T4 (UUID: GPU-8932f937-d72c)
GPU 1: Tesla T4 (UUID: GPU-89ab01cd-77aa)
GPU 2: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d)
  MIG 1g.5gb      Device  0: (UUID: MIG-c6d4f1ef-42e4)
  MIG 3g.20gb     Device  1: (UUID: MIG-cba663e8-9bed)"""
ROWS = """\
0, Tesla T4, 15360, 7.5
1, Tesla T4, 15360, 7.5
2, NVIDIA A100-SXM4-40GB, [N/A], 8.0"""


@pytest.fixture
def named_gpus(nvidia_smi, monkeypatch):
    """Two T4 and an A100 in two parts: named_gpus(CUDA_VISIBLE_DEVICES)."""

    def make(chosen, rows=ROWS, listed=LISTED):
        nvidia_smi(
            f"if [ $1 = -L ]; then cat <<END\n{listed}\nEND",
            f"else cat <<END\n{rows}\nEND",
            "fi",
        )
        if chosen is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)

    return make


VISIBLE = {
    "unset": (None, [0, 1, "MIG-c6d4f1ef-42e4", "MIG-cba663e8-9bed"]),
    "numbers": ("0,1", [0, 1]),
    "numbers in another order": ("1, 0", [1, 0]),
    "a UUID": ("GPU-89ab01cd-77aa", [1]),
    "the beginning of a UUID": ("GPU-893", [0]),
    "UUID and number": ("GPU-89ab,0", [1, 0]),
    "a part by its name": ("MIG-cba663e8-9bed", ["MIG-cba663e8-9bed"]),
    "the number of a GPU in parts": ("2", ["MIG-c6d4f1ef-42e4"]),
    "the UUID of a GPU in parts": ("GPU-5d5ba0d6-d33d", ["MIG-c6d4f1ef-42e4"]),
    "hidden by -1": ("-1", []),
    "hidden by nothing": ("", []),
    "hidden from -1 on": ("0,-1,1", [0]),
}


@pytest.mark.parametrize(("chosen", "found"), VISIBLE.values(), ids=VISIBLE)
def test_what_cuda_visible_devices_names_is_found(named_gpus, chosen, found):
    named_gpus(chosen)
    assert [gpu["index"] for gpu in vqa.detect_runtime().gpus] == found


UNKNOWN_NAMES = {
    "another number": ("7", "'7' is not exactly one GPU more"),
    "another UUID": ("GPU-dead", "'GPU-dead' is not exactly one GPU more"),
    "an unclear beginning": ("GPU-89", "'GPU-89' is not exactly one GPU more"),
    "twice": ("0,GPU-8932", "'GPU-8932' is not exactly one GPU more"),
    "a card's name": ("Tesla", "'Tesla' is not .*name some of 0, 1, 2, GPU-8932f937-d72c"),
    "another part": ("MIG-0000", "'MIG-0000' is not .*MIG-cba663e8-9bed"),
    "all": ("all", "CUDA_VISIBLE_DEVICES is 'all', .*unset it"),
}


@pytest.mark.parametrize(("chosen", "message"), UNKNOWN_NAMES.values(), ids=UNKNOWN_NAMES)
def test_a_name_that_no_gpu_has_is_an_error_that_lists_the_names(named_gpus, chosen, message):
    named_gpus(chosen)
    with pytest.raises(ValueError, match=message):
        vqa.detect_runtime()


def test_a_part_of_a_gpu_has_its_own_memory_and_is_given_to_its_worker(named_gpus, demo_config):
    named_gpus("MIG-cba663e8-9bed")
    (part,) = vqa.detect_runtime().gpus
    assert part["name"] == "NVIDIA A100-SXM4-40GB MIG 3g.20gb"
    assert part["memory_gib"] == 19.0
    assert part["capability"] == 8.0
    (device,) = vqa.worker_devices(demo_config)
    assert vqa.device_environment(device)["CUDA_VISIBLE_DEVICES"] == "MIG-cba663e8-9bed"
    rounds = vqa.schedule_folds([0, 1, 2], ["MIG-1", "MIG-2"])  # none is shared
    assert [[job.folds for job in jobs] for jobs in rounds] == [[(0, 2), (1,)]]


def test_a_gpu_that_shares_the_computers_memory_is_said_to(named_gpus, caplog):
    named_gpus(None, "0, NVIDIA GB10, [N/A], 12.1", "GPU 0: NVIDIA GB10 (UUID: GPU-1)")
    (gpu,) = vqa.detect_runtime().gpus
    assert gpu["memory_gib"] == vqa.psutil.virtual_memory().total / 2**30
    assert "no memory of its own for NVIDIA GB10: taken to share the computer's" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0, Odd Card, [Unknown Error], 8.0", r"'\[Unknown Error\]' for the memory of Odd Card"),
        ("0, Odd Card, 15360, [N/A]", r"'\[N/A\]' for the capability of Odd Card; update the"),
        ("0, Odd Card, 15360", "'0, Odd Card, 15360', not number, name, memory, capability"),
    ],
)
def test_a_gpu_without_facts_is_an_error_unless_it_is_hidden(named_gpus, monkeypatch, row, message):
    named_gpus(None, f"{row}\n1, Tesla T4, 15360, 7.5", "")
    with pytest.raises(RuntimeError, match=message):
        vqa.detect_runtime()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu["name"] for gpu in vqa.detect_runtime().gpus] == ["Tesla T4"]


def test_gpus_that_a_variable_hides_are_not_said_to_be_switched_off(named_gpus, mini_data):
    named_gpus("-1")
    hidden = "unset CUDA_VISIBLE_DEVICES, which is '-1' and hides every GPU"
    settings = {"data_dir": str(mini_data)}
    with pytest.raises(RuntimeError, match=f"^Competition files but no GPU: {hidden}"):
        vqa.load_config("auto", settings, environ={})
    with pytest.raises(ValueError, match=f"needs a GPU, and none is seen: {hidden}, or choose"):
        vqa.load_config("kaggle_t4x2", settings, environ={})


def test_a_variable_hides_nothing_where_there_is_no_gpu(named_gpus, monkeypatch):
    named_gpus("")
    monkeypatch.setattr(vqa, "_query_gpus", dict)
    assert vqa.how_to_get_a_gpu() == "switch on the accelerator"


def test_a_tool_that_finds_no_device_without_failing_is_no_broken_gpu(named_gpus, caplog):
    named_gpus(None, "No devices were found", "No devices were found")
    assert vqa.detect_runtime().gpus == ()
    assert "No GPU is used: nvidia-smi says 'No devices were found'" in caplog.text
