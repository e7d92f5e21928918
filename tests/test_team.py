"""Several processes on one fold do what one would, start and end together, and nothing waits for a dead one."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.torch import load_file

import vqa_helpers as vqa


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Two processes with two threads each would stand in each other's way."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def train_alone(run):
    vqa.run_stages(run, [0], ["train", "predict"], lambda *_, **__: None)
    return run


def results(run):
    """Adapter weights, then logits, of fold 0."""
    weights = load_file(run.fold_dir(0) / "adapter_raw" / "adapter_model.safetensors")
    logits = [
        vqa.read_arrays(run.fold_dir(0) / f"{name}.npz", run.fingerprint)["logits"]
        for name in ("oof", "test")
    ]
    return np.concatenate([weights[name].flatten() for name in sorted(weights)]), *logits


def assert_alike(run, alone):
    """The same gradient and loss in every step, each written once, and with them the same adapter and scores."""
    logged = [vqa.read_json_lines(one.fold_dir(0) / "metrics.jsonl") for one in (run, alone)]
    for ours, theirs in zip(*logged, strict=True):
        assert ours["step"] == theirs["step"] and ours["loss"] == pytest.approx(
            theirs["loss"], rel=1e-4
        )
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)
    for ours, theirs in zip(results(run), results(alone), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs)


SETTINGS = {
    "train_folds": (0,),
    "num_epochs": 1,
    "tta_rotations": 2,
    "infer_batch_size": 4,
    "learning_rate": 1e-4,
}


@pytest.mark.slow
def test_two_processes_do_what_one_does(mini_run, tmp_path):
    run = mini_run(**SETTINGS)
    vqa.launch_workers(run, [((None, None), [0])], ["train", "predict"])
    assert_alike(run, train_alone(mini_run(**SETTINGS, output_dir=str(tmp_path / "alone"))))


@pytest.mark.slow
def test_accelerate_launch_starts_a_team(mini_run, tmp_path):
    """What is to be typed for several machines, here for two processes of one."""
    run = mini_run(**SETTINGS)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        vqa.__file__,
        "worker",
        "--run",
        str(run.directory),
    ]
    subprocess.run(
        [*launch, "--folds", "0", "--stages", "train,predict"], check=True, capture_output=True
    )
    assert_alike(run, train_alone(mini_run(**SETTINGS, output_dir=str(tmp_path / "alone"))))


def start_team(run):
    """Two worker processes of one team, started as launch_workers starts them, and their logs."""
    command = [sys.executable, vqa.__file__, "worker", "--run", str(run.directory), "--folds", "0"]
    logs = [(run.directory / f"team_{number}.log").open("wb") for number in range(2)]
    environments = vqa.process_group_environments([None, None])
    return [
        subprocess.Popen([*command, "--name", str(number)], env=environment, stdout=log, stderr=log)
        for number, (environment, log) in enumerate(zip(environments, logs, strict=True))
    ]


def wait_for_step(run):
    deadline = time.monotonic() + 120
    while not vqa.read_json_lines(run.fold_dir(0) / "metrics.jsonl"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_team_stops_at_the_same_step_and_continues(mini_run, tmp_path):
    settings = SETTINGS | {"num_epochs": 6}
    run = mini_run(**settings)
    processes = start_team(run)
    wait_for_step(run)
    processes[1].send_signal(signal.SIGTERM)  # one of them is enough
    assert [process.wait(timeout=60) for process in processes] == [vqa.INTERRUPTED] * 2
    assert not run.is_done("train", 0) and list(run.fold_dir(0).glob("checkpoints/step_*"))
    vqa.launch_workers(run, [((None, None), [0])], ["train", "predict"])
    assert_alike(run, train_alone(mini_run(**settings, output_dir=str(tmp_path / "alone"))))


@pytest.mark.slow
def test_a_dead_process_takes_its_team_along_and_is_shown(mini_run, monkeypatch):
    run, popen, started = mini_run(**SETTINGS | {"num_epochs": 50}), subprocess.Popen, []
    monkeypatch.setattr(
        vqa.subprocess,
        "Popen",
        lambda *args, **kw: started.append(popen(*args, **kw)) or started[-1],
    )
    monkeypatch.setattr(vqa, "GROUP_GRACE_SECONDS", 1)
    sleep = time.sleep

    def kill_one(seconds):
        if vqa.read_json_lines(run.fold_dir(0) / "metrics.jsonl") and started[1].poll() is None:
            os.kill(started[1].pid, signal.SIGKILL)
        sleep(min(seconds, 0.2))

    monkeypatch.setattr(vqa.time, "sleep", kill_one)
    with pytest.raises(RuntimeError, match=r"worker_1.log, exit status -9"):
        vqa.launch_workers(run, [((None, None), [0])], ["train"])
    assert all(process.poll() is not None for process in started)


@pytest.mark.parametrize(
    ("folds", "devices", "rounds"),
    [
        ((0, 1, 2), [0], [[((0,), (0, 1, 2))]]),
        ((0, 1), [0, 1], [[((0,), (0,)), ((1,), (1,))]]),
        ((0, 1, 2), [0, 1], [[((0,), (0,)), ((1,), (1,))], [((0, 1), (2,))]]),
        ((0,), [0, 1], [[((0, 1), (0,))]]),
        ((0, 1, 2, 3, 4), [0, 1], [[((0,), (0, 2)), ((1,), (1, 3))], [((0, 1), (4,))]]),
        ((0, 1, 2), [0, 1, 2, 3], [[((0, 1, 2, 3), (0, 1, 2))]]),
        ((0, 1, 2, 3, 4, 5, 6, 7, 8), list(range(10)), [[((n,), (n,)) for n in range(9)]]),
    ],
)
def test_no_device_is_idle_where_a_team_is_faster(folds, devices, rounds):
    assert vqa.schedule_folds(folds, devices) == rounds


@pytest.mark.slow
def test_a_team_keeps_no_half_done_scores(mini_run, monkeypatch):
    """They would be every second batch, and be taken for the first ones by a process that works alone."""
    run = mini_run(**SETTINGS, save_every_steps=1)
    vqa.run_stages(run, [0], ["train"], lambda *_, **__: None)

    def stop(label, done, total, together):
        if done == 2:
            raise vqa.Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(vqa, "rank_and_world_size", lambda: (0, 2))
        patch.setattr(vqa, "all_reduce_sum", lambda tensor: tensor)
        with pytest.raises(vqa.Interrupted):
            vqa.run_stages(run, [0], ["predict"], stop)
    assert not list(run.fold_dir(0).glob("*.partial.npz"))
    with pytest.raises(vqa.Interrupted):
        vqa.run_stages(run, [0], ["predict"], stop)
    assert len(list(run.fold_dir(0).glob("*.partial.npz"))) == 1
    vqa.run_stages(run, [0], ["predict"], lambda *_, **__: None)
    for name in ("oof", "test"):
        assert np.isfinite(
            vqa.read_arrays(run.fold_dir(0) / f"{name}.npz", run.fingerprint)["logits"]
        ).all()
    assert not list(run.fold_dir(0).glob("*.partial.npz"))


def test_a_launched_process_sees_its_own_gpu_only(monkeypatch):
    for visible, number, expected in ((None, 1, "1"), ("4,6", 1, "6"), ("3", 0, "3")):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        vqa.hide_other_gpus()
        assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["LOCAL_RANK"]) == (expected, "0")


def test_what_a_further_process_notes_reaches_the_report(mini_run, monkeypatch):
    run = mini_run()
    monkeypatch.setenv("RANK", "1")
    vqa.MetricLogger(run.directory / "events.jsonl").log(event="earlier")
    with vqa.worker_directory(run.directory, [0]) as directory:
        assert directory != run.directory and vqa.Run.open(directory).config.run_dir == directory
        vqa.MetricLogger(directory / "events.jsonl").log(event="out of memory")
    events = [record["event"] for record in vqa.read_json_lines(run.directory / "events.jsonl")]
    assert events == ["earlier", "out of memory"] and not directory.exists()


def test_a_team_leaves_time_for_what_the_single_devices_have_to_score(
    mini_run, session, monkeypatch
):
    run = mini_run(
        n_folds=3, tta_rotations=1
    )  # 24 training rows a fold, 12 of them held out; 12 test rows
    for fold in (0, 1):
        vqa.atomic_write(run.fold_dir(fold) / "result.json", "{}")
    session.assigned_folds = run.config.folds_to_train
    alone = vqa.inference_seconds(run, 1.0, session, training=1)
    assert alone == pytest.approx(1.25 * (3 * (12 + 12) + 3 * 12))
    monkeypatch.setattr(vqa, "rank_and_world_size", lambda: (0, 2))
    assert vqa.inference_seconds(run, 1.0, session, training=1) == pytest.approx(alone / 2)
