"""Part 9, Worker and command line: what the processes do that a person or the notebook starts."""

import json
import os
import subprocess
import sys

import pytest
from running import events

import vqa_helpers as vqa


def test_the_command_line_prints_the_table_before_the_facts(monkeypatch, capsys):
    memory = {
        "computed GiB": {"weights": 4.5, "all of these": 6.0},
        "measured GiB": {"weights": "", "all of these": 5.9},
    }
    monkeypatch.setattr(vqa, "preflight", lambda config, **_: {"memory": memory})
    config = json.dumps({"model_id": "any"})
    monkeypatch.setattr(sys, "argv", ["vqa_helpers.py", "preflight", "--config", config])
    vqa.main()
    *table, facts = capsys.readouterr().out.splitlines()
    assert table[0] == "|  | computed GiB | measured GiB |"
    assert table[-1] == "| all of these | 6.000 | 5.900 |"
    assert json.loads(facts) == {"memory": memory}


@pytest.mark.slow
def test_command_line_of_the_worker_is_usable_by_hand(mini_run):
    run = mini_run(zeroshot_rows=4)
    subprocess.run(
        [
            sys.executable,
            str(vqa.HERE / "vqa_helpers.py"),
            "worker",
            "--run",
            str(run.directory),
            "--folds",
            "0",
            "--stages",
            "zeroshot",
        ],
        check=True,
        env=os.environ,
    )
    content = vqa.read_arrays(run.directory / "zeroshot.npz", run.fingerprint)
    assert len(content["ids"]) == 4


def test_what_a_further_process_notes_reaches_the_report(mini_run, monkeypatch):
    run = mini_run()
    monkeypatch.setenv("RANK", "1")
    vqa.MetricLogger(run.directory / "events.jsonl").log(event="earlier")
    with vqa.worker_directory(run.directory, [0]) as directory:
        assert directory != run.directory
        assert vqa.Run.open(directory).config.run_dir == directory
        vqa.MetricLogger(directory / "events.jsonl").log(event="out of memory")
    assert events(run) == ["earlier", "out of memory"]
    assert not directory.exists()


@pytest.mark.parametrize(
    ("model", "offline"),
    [
        ("data/tiny_qwen3_vl", "1"),
        ("Qwen/Qwen3-VL-8B-Instruct", None),
    ],
)
def test_only_a_local_model_switches_the_hub_off(monkeypatch, model, offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # so that it is put back
    monkeypatch.delenv("HF_HUB_OFFLINE")
    vqa.leave_out_what_is_not_needed(vqa.Config(model_id=model))
    assert os.environ.get("HF_HUB_OFFLINE") == offline


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "loaded"), [("none", "False"), ("4bit", "True")])
def test_bitsandbytes_is_imported_only_where_something_is_quantised(quantization, loaded):
    script = f"""
import sys
import vqa_helpers as vqa
vqa.leave_out_what_is_not_needed(vqa.Config(quantization={quantization!r}))
import peft
print(bool(sys.modules.get("bitsandbytes")))
"""
    command = [sys.executable, "-c", script]
    finished = subprocess.run(command, cwd=vqa.HERE, check=True, capture_output=True, text=True)
    assert finished.stdout.strip() == loaded


def test_a_local_model_leaves_the_hub_on_where_another_one_scores_in_16_bits(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # so that it is put back
    monkeypatch.delenv("HF_HUB_OFFLINE")
    config = vqa.Config(
        model_id="data/tiny_qwen3_vl",
        score_precision="16bit",
        score_model_id="Qwen/Qwen3-VL-8B-Instruct",
    )
    vqa.leave_out_what_is_not_needed(config)
    assert "HF_HUB_OFFLINE" not in os.environ
