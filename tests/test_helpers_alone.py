"""The helpers as people use them in their own notebooks: no Config, any module, optional logger."""

import json
import logging
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import vqa_helpers as vqa


def test_import_is_inert():
    code = (
        "import random, sys; random.seed(1); before = random.getstate(); import vqa_helpers, logging; "
        "assert random.getstate() == before; assert not logging.getLogger('vqa').handlers; "
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=vqa.HERE)


def test_early_stopping_stops_a_loop():
    early_stopping = vqa.EarlyStopping(patience=2, mode="max", min_delta=0.01)
    seen = []
    for val_acc in (0.5, 0.6, 0.605, 0.60, 0.9):  # 0.605 is no gain of more than 0.01
        seen.append(val_acc)
        if early_stopping(val_acc):
            break
    assert seen[-1] == 0.60 and early_stopping.best == 0.6


def test_early_stopping_takes_nan_for_no_gain_and_the_next_value_for_the_best():
    early_stopping = vqa.EarlyStopping(patience=2)
    assert not early_stopping(math.nan)
    assert not early_stopping(0.5) and early_stopping.best == 0.5


def test_early_stopping_can_minimise_and_continues_from_its_state():
    first = vqa.EarlyStopping(patience=2, mode="min")
    assert not first(1.0) and not first(1.1)
    second = vqa.EarlyStopping(patience=2, mode="min")
    second.load_state_dict(first.state_dict())
    assert second(1.2)
    with pytest.raises(ValueError, match="mode must be"):
        vqa.EarlyStopping(patience=1, mode="largest")


def test_logging_reaches_console_and_file_once_when_set_up_twice(tmp_path, capsys):
    logger = vqa.setup_logging(tmp_path)
    logger = vqa.setup_logging(tmp_path, level=logging.WARNING)
    logger.info("quiet")
    logger.warning("한국어 경고")
    text = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert text.count("한국어 경고") == 1 and "quiet" not in text
    assert capsys.readouterr().out.count("한국어 경고") == 1
    vqa.setup_logging(tmp_path / "none", to_file=False)
    assert not (tmp_path / "none").exists()


def test_clear_memory_logs_and_returns_the_summary(caplog):
    logger = logging.getLogger("somebody.else")
    with caplog.at_level(logging.INFO):
        summary = vqa.clear_memory(logger)
    assert summary["rss_gib"] > 0.05 and "Memory after clearing" in caplog.text
    assert vqa.clear_memory().keys() == summary.keys()


def test_peak_memory_tracker_reports_time_and_memory():
    with vqa.track_peak_memory("block") as report:
        sum(range(1000))
    assert report["label"] == "block" and report["seconds"] >= 0 and report["rss_gib"] > 0


def test_metric_logger_appends_json_lines(tmp_path):
    for step in range(2):
        vqa.MetricLogger(tmp_path / "deep" / "metrics.jsonl").log(step=step)
    lines = (tmp_path / "deep" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]


def test_checkpoint_of_a_plain_linear_layer_round_trips(tmp_path):
    def build():
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)

    model, optimizer, scheduler = build()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    path = vqa.save_checkpoint(
        model, optimizer, scheduler, 4, 1, {"acc": np.float64(0.5)}, tmp_path / "a" / "ckpt.pt"
    )
    other, other_optimizer, other_scheduler = build()
    assert vqa.load_checkpoint(other, other_optimizer, other_scheduler, path) == (
        4,
        1,
        {"acc": 0.5},
    )
    assert torch.equal(other.weight, model.weight)
    assert other_optimizer.state_dict()["state"][0]["step"] == 1
    assert other_scheduler.last_epoch == 1


def test_checkpoint_keeps_only_trainable_weights_and_refuses_another_model(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Linear(100, 1))
    model[0].requires_grad_(False)
    path = vqa.save_checkpoint(model, None, None, 0, 0, {}, tmp_path / "ckpt.pt")
    assert path.stat().st_size < 10_000
    assert vqa.load_checkpoint(model, None, None, path) == (0, 0, {})
    with pytest.raises(vqa.CheckpointError, match="does not fit the model"):
        vqa.load_checkpoint(torch.nn.Linear(3, 2), None, None, path)


def test_checkpoint_leaves_out_a_frozen_tensor_with_two_names(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Linear(100, 100))
    model[1].weight = model[0].weight
    model.requires_grad_(False)
    model[1].bias.requires_grad_(True)
    path = vqa.save_checkpoint(model, None, None, 0, 0, {}, tmp_path / "ckpt.pt")
    assert path.stat().st_size < 10_000
    assert vqa.load_checkpoint(model, None, None, path) == (0, 0, {})


def test_checkpoint_saved_without_an_optimizer_cannot_restore_one(tmp_path):
    model = torch.nn.Linear(3, 2)
    path = vqa.save_checkpoint(model, None, None, 0, 0, {}, tmp_path / "ckpt.pt")
    with pytest.raises(vqa.CheckpointError, match="was saved without optimizer"):
        vqa.load_checkpoint(model, torch.optim.SGD(model.parameters(), 0.1), None, path)


def test_atomic_write_leaves_the_old_file_when_the_write_fails(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    vqa.atomic_write(path, "old")
    monkeypatch.setattr(vqa.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        vqa.atomic_write(path, "new")
    assert path.read_text() == "old"


def test_strict_seeding_makes_torch_deterministic(monkeypatch):
    import torch

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # taken back with the test
    before = (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
    )
    try:
        vqa.seed_everything(7, strict=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert (
            not torch.backends.cuda.flash_sdp_enabled()
            and not torch.backends.cuda.mem_efficient_sdp_enabled()
        )
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_flash_sdp(before[0])
        torch.backends.cuda.enable_mem_efficient_sdp(before[1])
