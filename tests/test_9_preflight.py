"""Part 9, Preflight: what five minutes show before hours are spent, also where it does not fit."""

import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from machine import COMPETITION, start_run
from running import raising
from twins import TINY

import vqa_helpers as vqa

FEATURES = "vision features, on disk or in RAM"


@pytest.fixture
def preflight_config(mini_data, tmp_path):
    """A config of the mini competition: preflight_config(augment_images=1, ...)."""

    def make(**overrides):
        settings = {"data_dir": str(mini_data), "cache_dir": str(tmp_path)}
        return vqa.Config.preset("demo", **settings, **overrides)

    return make


@pytest.mark.slow
def test_preflight_shows_computed_beside_measured_memory_and_goes_on_where_it_would_not_fit(
    preflight_config, monkeypatch
):
    little_memory = SimpleNamespace(available=2**20)
    monkeypatch.setattr(vqa.psutil, "virtual_memory", lambda: little_memory)
    plan = vqa.MemoryPlan(8, 2, peak_gib=1.25)
    monkeypatch.setattr(vqa, "plan_memory", lambda *_: plan)
    config = preflight_config()
    facts = vqa.preflight(config, rows=8)
    computed = facts["memory"]["computed GiB"]
    measured = facts["memory"]["measured GiB"]
    rows = ["weights", "LoRA and gradients", "optimizer", "averages", "activations"]
    assert list(computed) == [*rows, "all of these", FEATURES]
    assert computed["all of these"] == pytest.approx(sum(computed[name] for name in rows))
    assert measured == dict.fromkeys(computed, "") | {"all of these": 1.25}
    assert facts["memory needed"].startswith("does not fit by computation: 0.")
    json.dumps(facts)

    competition = vqa.load_competition(config.data_dir)
    counts = facts["token_counts"]
    tokens_of_images = dict(zip(competition.train["pixel_hash"], counts["train"], strict=True))
    tokens_of_images |= zip(competition.test["pixel_hash"], counts["test"], strict=True)
    each_image_once = sum(tokens_of_images.values())
    image_token = vqa.expected_memory(config, competition.train).image_token
    assert computed[FEATURES] == pytest.approx(each_image_once * image_token)


def test_weights_that_do_not_fit_end_preflight_with_what_to_change(preflight_config, monkeypatch):
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vqa, "memory_budget", lambda: 2**20)
    monkeypatch.setattr(vqa, "open_session", raising(out_of_memory))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        vqa.preflight(preflight_config(), rows=8)
    note, *_ = caught.value.__notes__
    assert note.startswith("Memory: does not fit by computation: ")
    assert "0.0 GiB free; choose a smaller model_id" in note


def test_gradients_that_are_not_finite_end_preflight_with_the_row(preflight_config, monkeypatch):
    loss = vqa.training_loss
    monkeypatch.setattr(vqa, "training_loss", lambda *arguments: loss(*arguments) * math.nan)
    with pytest.raises(FloatingPointError, match="gives gradients that are not finite") as caught:
        vqa.preflight(preflight_config(), rows=4)
    (note,) = caught.value.__notes__
    assert note.startswith("While the longest row was tried: train.csv, line ")


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5"])
def test_memory_is_computed_for_mixtures_and_recurrent_layers(family, model_folders, mini_data):
    config = vqa.Config.preset("demo", model_id=str(model_folders[family]), data_dir=str(mini_data))
    frame = vqa.load_competition(mini_data).train
    costs = vqa.expected_memory(config, frame)
    parameters = vqa.load_model(config, vqa.detect_runtime()).num_parameters()
    assert costs.loaded == pytest.approx(4 * parameters / 2**30)
    assert costs.largest_layer >= costs.layer > 0
    is_mixed = family == "qwen3_5"  # of two kinds of layers
    assert (costs.largest_layer > costs.layer) is is_mixed


def test_memory_is_that_of_the_kernels_where_recurrent_layers_use_them(
    model_folders, mini_data, monkeypatch
):
    folder = str(model_folders["qwen3_5"])
    config = vqa.Config.preset("demo", model_id=folder, data_dir=str(mini_data))
    frame = vqa.load_competition(mini_data).train
    without = vqa.expected_memory(config, frame)
    monkeypatch.setattr(vqa, "decide_recurrent_kernels", lambda *_: (True, "as on a GPU"))
    # Their rule is not computed once more, in fp32.
    assert vqa.expected_memory(config, frame).largest_layer < 0.5 * without.largest_layer


def test_memory_is_not_computed_for_an_unknown_family(preflight_config, monkeypatch):
    config = preflight_config()
    frame = vqa.load_competition(config.data_dir).train
    monkeypatch.delitem(vqa.FAMILIES, "qwen3_vl")
    with pytest.raises(ValueError, match="is of the family 'qwen3_vl'; known are qwen2_5_vl"):
        vqa.expected_memory(config, frame)


@pytest.mark.slow
def test_preflight_says_whether_the_unquantised_model_fits(
    four_bits_on_the_cpu, preflight_config, monkeypatch
):
    config = preflight_config(quantization="4bit", score_precision="16bit")
    verdict = vqa.preflight(config, rows=4)["scoring in 16 bits"]
    assert verdict.startswith("0.5")
    assert "GiB for the unquantised model" in verdict
    monkeypatch.setattr(vqa, "free_gib", lambda: 0.1)
    verdict = vqa.preflight(config, rows=4)["scoring in 16 bits"]
    assert verdict.startswith("does not fit by computation: 0.5")


@pytest.mark.slow
def test_preflight_counts_the_features_of_the_variants(preflight_config):
    def gib_of_features(variants):
        facts = vqa.preflight(preflight_config(augment_images=variants), rows=4)
        return facts["memory"]["computed GiB"][FEATURES]

    # The test rows have no variants.
    assert 2 < gib_of_features(3) / gib_of_features(0) <= 4


# --- In a process of its own ----------------------------------------------------------------------


@pytest.mark.slow
def test_preflight_reports_facts_from_a_process_of_its_own(mini_data, monkeypatch):
    facts = vqa.run_preflight(vqa.Config.preset("demo", data_dir=str(mini_data)))
    assert facts["letter tokens"].startswith("a=[")
    assert facts["prompt"].endswith("<|im_start|>assistant\n")
    assert facts["chat template"] == "as it is"
    assert len(facts["token_counts"]["train"]) == 36
    assert max(facts["token_counts"]["test"]) <= facts["token_budget"]
    assert facts["estimated minutes on one device"] > 0
    assert "on 36 rows" in facts["zero-shot accuracy"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    missing = vqa.Config.preset("demo", data_dir=str(mini_data), model_id="no/such-model")
    with pytest.raises(RuntimeError, match="(?s)Preflight failed:.*OSError"):
        vqa.run_preflight(missing)


# Run at the start of a process: notes its connections, all refused, and what the hub was told.
WATCH_THE_NETWORK = """
import atexit
import os
import socket
import sys


def append(name, text):
    with open(os.path.join(os.environ["NOTES"], name), "a") as file:
        file.write(text)


def refuse(*arguments, **options):
    append("calls", str(arguments))
    raise OSError("there is no network")


def note():
    hub = sys.modules.get("huggingface_hub.constants")
    if hub:
        append("offline", str(hub.HF_HUB_OFFLINE))


socket.getaddrinfo = refuse
socket.create_connection = refuse
socket.socket.connect = refuse
atexit.register(note)
"""


@pytest.mark.slow
def test_a_local_model_is_loaded_without_asking_the_hub(machine, mini_data):
    """By preflight in a process of its own; and by a worker, without stages to save time."""
    site = machine.root / "site"
    notes = machine.root / "notes"
    site.mkdir()
    notes.mkdir()
    (site / "sitecustomize.py").write_text(WATCH_THE_NETWORK)
    settings = {"n_folds": 2, "max_fallback_share": 0.5, "model_id": str(TINY)}
    machine.environment(
        PYTHONPATH=str(site),
        NOTES=str(notes),
        VQA_PRESET="demo",
        VQA_OVERRIDES=json.dumps(settings),
        HF_HUB_OFFLINE="0",  # so that it is put back
    )
    machine.monkeypatch.delenv("HF_HUB_OFFLINE")
    machine.helper()
    shutil.copytree(mini_data, machine.root / COMPETITION)
    names = machine.run()
    facts = names.vqa.run_preflight(names.config)
    assert facts["zero-shot accuracy"].endswith("on 36 rows")
    names.vqa.end_staying_process()
    assert (notes / "offline").read_text() == "True"
    assert not (notes / "calls").exists()
    # The notebook's own process may turn to the hub for another model.
    assert "HF_HUB_OFFLINE" not in os.environ

    run = start_run(names)
    progress = names.vqa.ProgressFile(run.directory / "progress_0.json")
    names.vqa.run_worker(run, [0], [], progress, wait_for_others=lambda: None)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


# --- What is shown of that process ----------------------------------------------------------------


@pytest.fixture
def preflight_program(tmp_path, monkeypatch):
    """Let `run_preflight` start this code instead of the module."""
    monkeypatch.setattr(vqa, "PROCESS_POLL_SECONDS", 0.02)

    def replace_module(code):
        path = tmp_path / "program.py"
        path.write_text(code)
        monkeypatch.setattr(vqa, "__file__", str(path))

    return replace_module


DOWNLOAD = """
import os, pathlib, sys, time
blobs = pathlib.Path(os.environ["HF_HOME"], "hub", "models--some--model", "blobs")
blobs.mkdir(parents=True)
for part in range(1, 4):
    with (blobs / "weights.incomplete").open("ab") as file:
        file.write(b"x" * 10 * 10**6)
    time.sleep(0.3)
(blobs / "weights.incomplete").rename(blobs / "weights")
progress = pathlib.Path(sys.argv[sys.argv.index("--progress") + 1])
progress.with_suffix(".tmp").write_text('{"stage": "zero-shot", "done": 1, "total": 2}')
progress.with_suffix(".tmp").replace(progress)
time.sleep(0.3)
print('a table')
print('{"some": "facts"}')
"""


def test_preflight_shows_how_much_of_the_model_has_arrived_and_then_what_it_tries(
    preflight_program, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    preflight_program(DOWNLOAD)
    config = vqa.Config.preset("demo", model_id="some/model")
    assert vqa.run_preflight(config) == {"some": "facts"}
    shown = capsys.readouterr().out
    for gigabytes in ("0.01", "0.02", "0.03"):
        assert f" s | downloading some/model: {gigabytes} GB" in shown
    assert "preflight starting, 0 s" in shown
    assert "preflight zero-shot:  50%" in shown
    assert shown.index("0.03 GB") < shown.index("zero-shot")


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("os.kill(os.getpid(), 9)", "was killed by signal 9 (SIGKILL), probably out of memory"),
        ("os.kill(os.getpid(), 11)", "was killed by signal 11 (SIGSEGV)"),
        ("sys.exit(4)", "ended with exit status 4"),
    ],
)
def test_preflight_says_how_its_process_ended_and_what_it_tried_last(end, said, preflight_program):
    preflight_program(
        "import os, sys\n"
        "print('Trying the longest row: train.csv, line 6', flush=True)\n"
        "print('Loading weights: 100%|###| 97/97', file=sys.stderr, flush=True)\n"
        f"{end}\n"
    )
    with pytest.raises(RuntimeError) as caught:
        vqa.run_preflight(vqa.Config.preset("demo"))
    first, last = str(caught.value).splitlines()
    assert first.startswith(f"Preflight failed: its process {said}")
    assert last == "Trying the longest row: train.csv, line 6"


@pytest.mark.slow
def test_preflight_counts_the_tokens_of_context_and_says_how_much_is_cut(
    preflight_config, mini_data, tmp_path
):
    ids = vqa.load_competition(mini_data, 0.5).train["id"]
    file = tmp_path / "context.csv"
    file.write_text(f"id,context\n{ids[0]},{'일 이 ' * 99}\n{ids[1]},삼\n", encoding="utf-8")
    plain = vqa.preflight(preflight_config(), rows=4)
    config = preflight_config(context_tokens=60, context_file=str(file))
    facts = vqa.preflight(config, rows=4)
    assert facts["context"] == "cut to 60 tokens in 1 of 48 rows"
    assert "context" not in plain
    added = int(facts["tokens per prompt"].split()[-1]) - int(
        plain["tokens per prompt"].split()[-1]
    )
    assert 50 <= added <= 80
