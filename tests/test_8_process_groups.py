"""Part 8, Workers: several processes on one fold do what one would, and wait for no dead one."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from running import adapter_file, quiet, read_logits
from safetensors.torch import load_file

import vqa_helpers as vqa


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Two processes with two threads each would stand in each other's way."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def logged_steps(run):
    return vqa.read_json_lines(run.fold_dir(0) / "metrics.jsonl")


def adapter_weights(run):
    weights = load_file(adapter_file(run, 0, "raw"))
    return np.concatenate([weights[name].flatten() for name in sorted(weights)])


def assert_close(ours, theirs):
    assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs)


def assert_alike(run, alone):
    """Gradient and loss of every step, each logged once, adapter and scores are the same."""
    for ours, theirs in zip(logged_steps(run), logged_steps(alone), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)
    assert_close(adapter_weights(run), adapter_weights(alone))
    assert_close(read_logits(run, 0, "oof"), read_logits(alone, 0, "oof"))
    assert_close(read_logits(run, 0, "test"), read_logits(alone, 0, "test"))


@pytest.fixture
def train_alone(mini_run, tmp_path):
    """What one process makes of these settings: train_alone(num_epochs=1, ...) -> Run."""

    def make(**settings):
        run = mini_run(**settings, output_dir=str(tmp_path / "alone"))
        vqa.run_stages(run, [0], ["train", "predict"], quiet)
        return run

    return make


TEAM = ((None, None), [0])  # two processes on fold 0
SETTINGS = {
    "train_folds": (0,),
    "num_epochs": 1,
    "tta_rotations": 2,
    "infer_batch_size": 4,
    "learning_rate": 1e-4,
}


@pytest.mark.slow
def test_two_processes_do_what_one_does(mini_run, train_alone):
    run = mini_run(**SETTINGS)
    vqa.launch_workers(run, [TEAM], ["train", "predict"])
    assert_alike(run, train_alone(**SETTINGS))


@pytest.mark.slow
def test_accelerate_launch_starts_a_group(mini_run, train_alone):
    """What is to be typed for several machines, here for two processes of one."""
    run = mini_run(**SETTINGS)
    launch = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    worker = "--folds 0 --stages train,predict"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *launch.split(),
        vqa.__file__,
        "worker",
        "--run",
        str(run.directory),
        *worker.split(),
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert_alike(run, train_alone(**SETTINGS))


def start_group(run):
    """Two worker processes of one process group, started as launch_workers starts them."""
    command = [sys.executable, vqa.__file__, "worker", "--run", str(run.directory), "--folds", "0"]
    processes = []
    for number, environment in enumerate(vqa.process_group_environments([None, None])):
        log = (run.directory / f"group_{number}.log").open("wb")
        named = [*command, "--name", str(number)]
        processes.append(subprocess.Popen(named, env=environment, stdout=log, stderr=log))
    return processes


def wait_for_step(run):
    deadline = time.monotonic() + 120
    while not logged_steps(run):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_group_stops_at_the_same_step_and_continues(mini_run, train_alone):
    settings = SETTINGS | {"num_epochs": 6}
    run = mini_run(**settings)
    first, second = start_group(run)
    wait_for_step(run)
    second.send_signal(signal.SIGTERM)  # one of them is enough
    assert first.wait(timeout=60) == vqa.INTERRUPTED
    assert second.wait(timeout=60) == vqa.INTERRUPTED
    assert not run.is_done("train", 0)
    assert list(run.fold_dir(0).glob("checkpoints/step_*"))
    vqa.launch_workers(run, [TEAM], ["train", "predict"])
    assert_alike(run, train_alone(**settings))


@pytest.mark.slow
def test_a_dead_process_takes_its_group_along_and_is_shown(mini_run, monkeypatch):
    run = mini_run(**SETTINGS | {"num_epochs": 50})
    started = []
    popen = subprocess.Popen
    sleep = time.sleep

    def start(*arguments, **options):
        process = popen(*arguments, **options)
        started.append(process)
        return process

    def kill_the_second_after_a_step(seconds):
        if logged_steps(run) and started[1].poll() is None:
            os.kill(started[1].pid, signal.SIGKILL)
        sleep(min(seconds, 0.2))

    monkeypatch.setattr(vqa, "GROUP_GRACE_SECONDS", 1)
    monkeypatch.setattr(vqa.subprocess, "Popen", start)
    monkeypatch.setattr(vqa.time, "sleep", kill_the_second_after_a_step)
    with pytest.raises(RuntimeError, match=r"Worker 1 was killed by signal 9 \(SIGKILL\)"):
        vqa.launch_workers(run, [TEAM], ["train"])
    assert all(process.poll() is not None for process in started)


@pytest.mark.slow
def test_a_group_keeps_no_half_done_scores(mini_run, monkeypatch):
    """A process that works alone would take every second batch for the first ones."""
    run = mini_run(**SETTINGS, save_every_steps=1)
    vqa.run_stages(run, [0], ["train"], quiet)

    def half_done():
        return list(run.fold_dir(0).glob("*.partial.npz"))

    def stop(label, done, total, together):
        if done == 2:
            raise vqa.Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(vqa, "process_count", lambda: 2)
        patch.setattr(vqa, "all_reduce_sum", lambda tensor: tensor)
        with pytest.raises(vqa.Interrupted):
            vqa.run_stages(run, [0], ["predict"], stop)
    assert not half_done()
    with pytest.raises(vqa.Interrupted):
        vqa.run_stages(run, [0], ["predict"], stop)
    assert len(half_done()) == 1
    vqa.run_stages(run, [0], ["predict"], quiet)
    for name in ("oof", "test"):
        assert np.isfinite(read_logits(run, 0, name)).all()
    assert not half_done()
