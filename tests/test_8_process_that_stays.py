"""Part 8, Process that stays: it does several commands, and never outlives its notebook."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from cards import T4
from running import quiet, raising

import vqa_helpers as vqa

# --- Who gets a command ---------------------------------------------------------------------------

# Speaks as `next_command` does, without importing anything of size; its output is what it is asked.
PROGRAM = """
import json, os, socket, sys
arguments = sys.argv[1:]
channel = socket.socket(fileno=0) if "--stay" in arguments else None
while True:
    print(os.getpid(), *arguments, flush=True)
    if "--fail" in arguments:
        sys.exit(3)
    if "--stay" not in arguments:
        sys.exit(0)
    channel.sendall(b"done\\n")
    message = channel.recv(65536)
    if not message:  # no further command will come
        sys.exit(7)
    command = json.loads(message)
    os.dup2(os.open(command["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT), 1)
    channel.sendall(b"begun\\n")
    arguments = command["arguments"]
"""


@pytest.fixture
def start(tmp_path, monkeypatch, caplog):
    """start("zero", stays=True, ...) -> (the process, once its command is done, what it said)."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(vqa, "__file__", str(program))
    monkeypatch.setattr(vqa.LOGGER, "propagate", True)
    caplog.set_level("INFO", "vqa")
    config = vqa.Config.preset("demo")

    def start_one(argument, stays=False, config=config, environment=None):
        output = tmp_path / f"{argument}.log"
        process = vqa.start_process(
            [argument], output, output, config, environment or {**os.environ}, stays
        )
        process.wait(10)
        return process, output.read_text()

    yield start_one
    vqa.end_staying_process()


def test_a_process_does_several_commands_and_ends_with_the_last(start, caplog):
    first, said = start("zero", stays=True)
    assert first.poll() == 0
    pid = first.process.pid
    assert said == f"{pid} zero --stay\n"
    assert "PATH" not in repr(first)  # no variable is shown: some are secrets
    again, said = start("one", stays=True)
    assert again is first
    assert said == f"{pid} one --stay\n"  # in a file of its own
    first.terminate()  # nothing is to be ended: it waits
    last, said = start("two")
    assert said == f"{pid} two\n"
    assert isinstance(last, subprocess.Popen)
    assert last.returncode == 0
    assert not vqa.STAYING
    assert first.channel.fileno() == -1  # closed, not left to the garbage collector
    assert caplog.text.count("goes on with it") == 2


@pytest.mark.parametrize(
    ("config", "environment", "reason"),
    [
        ({"learning_rate": 1e-5}, {}, "it has loaded its model for other settings"),
        ({}, {"CUDA_VISIBLE_DEVICES": "6,7"}, "variable CUDA_VISIBLE_DEVICES is another"),
    ],
)
def test_a_new_process_does_what_the_waiting_one_is_not_made_for(
    config, environment, reason, start, caplog
):
    first, _ = start("zero", stays=True)
    second, said = start(
        "one", True, vqa.Config.preset("demo", **config), {**os.environ, **environment}
    )
    assert said == f"{second.process.pid} one --stay\n"
    assert second.process.pid != first.process.pid
    assert first.process.returncode == 7  # before the new one started
    assert reason in caplog.text


def test_places_and_what_sklearn_sets_make_no_new_process(start):
    first, _ = start("zero", stays=True)
    elsewhere = vqa.Config.preset("demo", run_name="another", output_dir="elsewhere")
    second, _ = start("one", True, elsewhere, {**os.environ, "KMP_INIT_AT_FORK": "FALSE"})
    assert second is first


def test_a_process_that_failed_or_was_killed_gets_no_command(start, caplog):
    failed, _ = start("--fail", stays=True)
    assert failed.poll() == 3
    killed, said = start("one", stays=True)
    assert said.startswith(f"{killed.process.pid} one")
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.wait(10)
    fresh, said = start("two")
    assert said == f"{fresh.pid} two\n"
    assert caplog.text.count("it has ended") == 2


def test_a_process_in_another_folder_gets_no_command(start, tmp_path, monkeypatch, caplog):
    """Paths of settings may be relative, to the folder in which the notebook is by now."""
    first, _ = start("zero", stays=True)
    monkeypatch.chdir(tmp_path)
    second, said = start("one", stays=True)
    assert said == f"{second.process.pid} one --stay\n"
    assert first.process.returncode == 7
    assert f"it works in another folder, {first.folder}" in caplog.text


def test_a_process_whose_command_was_interrupted_at_its_start_gets_no_other(start, monkeypatch):
    first, _ = start("zero", stays=True)
    answering = SimpleNamespace(
        settimeout=quiet,
        setblocking=quiet,
        sendall=first.channel.sendall,
        recv=raising(KeyboardInterrupt()),
        close=first.channel.close,
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(first, "channel", answering)
        start("one", stays=True)
    second, said = start("two", stays=True)
    assert said == f"{second.process.pid} two --stay\n"
    assert second is not first


def test_a_process_that_waits_ends_when_nobody_can_ask_it_any_more(start):
    first, _ = start("zero", stays=True)
    vqa.STAYING.clear()
    first.channel.close()  # as the system does for a process that is killed
    assert first.process.wait(10) == 7


def test_a_process_that_does_not_end_by_itself_is_killed(start, monkeypatch):
    monkeypatch.setattr(vqa, "ANSWER_SECONDS", 0.05)
    first, _ = start("zero", stays=True)
    os.kill(first.process.pid, signal.SIGSTOP)  # as if it hung
    vqa.end_staying_process()
    assert first.process.returncode == -signal.SIGKILL


def test_a_run_that_has_nothing_left_to_do_frees_the_memory(start, mini_run, monkeypatch):
    monkeypatch.setattr(vqa, "launch_workers", quiet)
    first, _ = start("zero", stays=True)
    vqa.run_folds(mini_run().config)
    assert first.process.returncode == 7


# Prints, as preflight's facts, how it was started.
SAYS_HOW = """
import json, os, sys
gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
print(json.dumps({"arguments": sys.argv[1:], "gpus": gpus}))
"""


def test_preflight_sees_the_first_workers_gpu_and_is_told_all_of_them(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text(SAYS_HOW)
    monkeypatch.setattr(vqa, "__file__", str(program))
    two_gpus = vqa.Runtime("kaggle", (T4, T4 | {"index": 1}), "fp16", "sdpa", ())
    monkeypatch.setattr(vqa, "detect_runtime", lambda *_: two_gpus)
    facts = vqa.run_preflight(vqa.Config.preset("kaggle_t4x2", model_id=str(tmp_path)))
    vqa.end_staying_process()
    assert facts["gpus"] == "0"
    arguments = facts["arguments"]
    assert arguments[arguments.index("--devices") + 1] == '["0", "1"]'
    assert "--stay" in arguments


# --- The real commands ----------------------------------------------------------------------------


@pytest.mark.slow
def test_preflight_zero_shot_and_training_load_the_model_once_and_change_no_byte(
    mini_run, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = {"train_folds": (0,), "tta_rotations": 1, "zeroshot_rows": 8}
    run = mini_run(run_name="kept", **settings)
    alone = mini_run(run_name="alone", **settings)
    facts = vqa.run_preflight(run.config)
    process = vqa.STAYING[0].process
    assert "on 36 rows" in facts["zero-shot accuracy"]
    vqa.run_zeroshot(run)
    assert vqa.STAYING[0].process is process
    vqa.run_folds(run.config)
    assert process.returncode == 0  # it has done the training, and ended
    assert not vqa.STAYING
    log = (run.directory / "worker_0.log").read_text()
    assert log.count("loaded before is used again") == 2
    assert "Loading weights" not in log

    def do_all():
        vqa.run_stages(alone, [0], ["zeroshot"], quiet)
        vqa.run_stages(alone, [0], ["train", "predict"], quiet)

    torch = vqa.torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        do_all()
    finally:
        torch.set_num_threads(threads)
    for name in ("zeroshot.npz", "fold_0/oof.npz", "fold_0/test.npz"):
        kept = np.load(run.directory / name)["logits"]
        assert kept.tobytes() == np.load(alone.directory / name)["logits"].tobytes(), name


# A process that waits for a command at once.
WAITING = """
import sys
sys.path.insert(0, {root!r})
import vqa_helpers
vqa_helpers.STAY_SECONDS = {seconds}
vqa_helpers.next_command()
"""
# A notebook's process that has started it, says its number, and does nothing more.
NOTEBOOK = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import vqa_helpers as vqa
vqa.__file__ = {program!r}
log = Path({program!r} + ".log")
config = vqa.Config.preset("demo")
process = vqa.start_process([], log, log, config, {{**os.environ}}, stays=True)
assert process.wait(60) == 0
print(process.process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_waiting_process_ends_with_the_notebook_that_is_killed(tmp_path):
    root = str(Path(vqa.__file__).parent)
    program = tmp_path / "waiting.py"
    program.write_text(WAITING.format(root=root, seconds=60))
    code = NOTEBOOK.format(root=root, program=str(program))
    notebook = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    waiting = psutil.Process(int(notebook.stdout.readline()))
    time.sleep(1.5)  # it looks for its parent once a second
    assert waiting.is_running()
    notebook.kill()
    notebook.wait()
    waiting.wait(10)
    notebook.stdout.close()


@pytest.mark.slow
def test_a_process_that_nobody_asks_any_more_frees_the_memory(tmp_path, monkeypatch):
    program = tmp_path / "waiting.py"
    program.write_text(WAITING.format(root=str(Path(vqa.__file__).parent), seconds=0))
    monkeypatch.setattr(vqa, "__file__", str(program))
    log = tmp_path / "log"
    process = vqa.start_process([], log, log, vqa.Config.preset("demo"), {**os.environ}, True)
    assert process.wait(60) == 0
    assert process.process.wait(10) == 0
    assert process.why_not(vqa.Config.preset("demo"), os.environ) == "it has ended"
    vqa.end_staying_process()
