"""Part 1, Logging, Files, Memory and Processes that work together.

Each line is logged once, a file is whole or absent, memory is that of the fullest GPU, and a
process sees its own GPU and notices that nobody waits for it.
"""

import json
import logging
import os

import numpy as np
import pandas as pd
import pytest
import torch
from running import raising

import vqa_helpers as vqa

# --- Logging and files ----------------------------------------------------------------------------


def test_logging_reaches_console_and_file_once_when_set_up_twice(tmp_path, capsys):
    logger = vqa.setup_logging(tmp_path)
    logger = vqa.setup_logging(tmp_path, level=logging.WARNING)
    logger.info("quiet")
    logger.warning("한국어 경고")
    text = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert text.count("한국어 경고") == 1
    assert "quiet" not in text
    assert capsys.readouterr().out.count("한국어 경고") == 1
    vqa.setup_logging(tmp_path / "none", to_file=False)
    assert not (tmp_path / "none").exists()


def test_metric_logger_appends_json_lines(tmp_path):
    for step in range(2):
        vqa.MetricLogger(tmp_path / "deep" / "metrics.jsonl").log(step=step)
    lines = (tmp_path / "deep" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]


def test_atomic_write_leaves_the_old_file_when_the_write_fails(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    vqa.atomic_write(path, "old")
    monkeypatch.setattr(vqa.os, "replace", raising(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        vqa.atomic_write(path, "new")
    assert path.read_text() == "old"


def test_a_damaged_logits_file_is_named(tmp_path):
    path = tmp_path / "oof.npz"
    vqa.write_arrays(path, "run", logits=np.zeros((4, 1, 4)))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(
        vqa.CheckpointError, match=r"oof.npz cannot be read .*delete it and run again"
    ):
        vqa.read_arrays(path, "run")


# --- Memory ---------------------------------------------------------------------------------------


def test_clear_memory_logs_and_returns_the_summary(caplog):
    logger = logging.getLogger("somebody.else")
    with caplog.at_level(logging.INFO):
        summary = vqa.clear_memory(logger)
    assert summary["rss_gib"] > 0.05
    assert "Memory after clearing" in caplog.text
    assert vqa.clear_memory().keys() == summary.keys()


def test_peak_memory_tracker_reports_time_and_memory():
    with vqa.track_peak_memory("block") as report:
        sum(range(1000))
    assert report["label"] == "block"
    assert report["seconds"] >= 0
    assert report["rss_gib"] > 0


def test_the_fullest_gpu_is_the_one_reported(monkeypatch):
    """A spread model fills its GPUs unevenly, and the first one less than the last."""
    reset = []
    monkeypatch.setattr(vqa, "_cuda_is_in_use", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: (1, 2)[gpu] * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: (3, 4)[gpu] * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: (5, 6)[gpu] * 2**30)
    with vqa.track_peak_memory("block") as report:
        pass
    assert reset == [0, 1]
    assert report["gpu_gib"] == 2
    assert report["gpu_reserved_gib"] == 4
    assert report["gpu_peak_gib"] == 6


# --- Processes that work together -----------------------------------------------------------------


def test_items_are_prepared_ahead_in_order():
    begun = []

    def prepare():
        for number in range(4):
            begun.append(number)
            yield number

    items = vqa.prefetch(prepare())
    assert next(items) == 0
    assert [*items] == [1, 2, 3]
    assert begun == [0, 1, 2, 3]


def test_a_launched_process_sees_its_own_gpu_only(monkeypatch):
    for visible, number, expected in ((None, 1, "1"), ("4,6", 1, "6"), ("3", 0, "3")):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        vqa.hide_other_gpus()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
        assert os.environ["LOCAL_RANK"] == "0"


def test_a_worker_whose_notebook_died_stops_at_the_next_safe_point(tmp_path):
    progress = vqa.ProgressFile(tmp_path / "progress.json", parent=os.getppid())
    progress.update("training", 1, 3)
    progress.parent = -1
    with pytest.raises(
        vqa.Interrupted,
        match="the end of the notebook's process in training; run again to continue",
    ):
        progress.update("training", 2, 3)


def test_kept_results_are_looked_up_batch_by_batch_and_not_walked(tmp_path, monkeypatch):
    """After a kill, with 100,000 results, every batch would walk them all."""

    class Kept(dict):
        def __iter__(self):
            raise AssertionError("all results were walked")

    kept = vqa.KeptResults(tmp_path / "texts.jsonl", "texts")
    monkeypatch.setattr(vqa.KeptResults, "read", lambda _: Kept(x="read before"))
    worked_on = []

    def work(rows):
        worked_on.extend(rows["name"])
        return [name.upper() for name in rows["name"]]

    batches = [pd.DataFrame({"name": [*"xy"]}), pd.DataFrame({"name": ["x"]})]
    kept.fill(batches, "name", work, lambda *_: None, "reading")
    assert worked_on == ["y"]
    [record] = vqa.read_json_lines(kept.path)
    assert record["texts"] == {"y": "Y"}
