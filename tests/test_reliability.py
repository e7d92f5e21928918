"""Signals, clocks, locks, full disks, other sessions: what must be saved, refused or said."""

import errno
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

import vqa_helpers as vqa

FORK = multiprocessing.get_context("fork")


def worker(run, *arguments):
    command = [
        sys.executable,
        vqa.__file__,
        "worker",
        "--run",
        str(run.directory),
        "--folds",
        "0",
        *arguments,
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


# --------------------------------------------------------------------------------------------------- signals and locks


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_worker_saves_and_ends_with_its_own_status_and_the_next_one_continues(
    mini_run, number
):
    whole, stopped = (
        mini_run(run_name=name, num_epochs=8, n_folds=3, train_folds=(0,)) for name in ("a", "b")
    )
    vqa.train_fold(whole.config, 0)
    process = worker(stopped, "--stages", "train")
    metrics = stopped.fold_dir(0) / "metrics.jsonl"
    wait_for(metrics.exists, process)
    process.send_signal(number)
    assert process.wait(60) == vqa.INTERRUPTED
    checkpoints = vqa.CheckpointManager(stopped.fold_dir(0) / "checkpoints")
    saved = checkpoints.restore(checkpoints.latest_verified())[2]
    steps = len(metrics.read_text().splitlines())
    assert saved["epoch"] * 3 + saved["step_in_epoch"] == steps  # not one step was lost
    assert not (stopped.fold_dir(0) / "result.json").exists()
    vqa.train_fold(stopped.config, 0)
    first, second = (
        run.fold_dir(0) / "adapter_ema" / "adapter_model.safetensors" for run in (whole, stopped)
    )
    assert first.read_bytes() == second.read_bytes()


def test_the_notebook_says_that_an_interrupted_run_can_be_continued(mini_run, monkeypatch):
    run = mini_run()
    monkeypatch.setattr(vqa, "_show_progress", lambda *_: None)  # straight on to terminate()
    with pytest.raises(vqa.Interrupted, match="Its work is saved: run the cell again"):
        monkeypatch.setattr(vqa.subprocess, "Popen", lambda *_, **__: Ended(vqa.INTERRUPTED))
        vqa.launch_workers(run, [((None,), [0])], ["train"])


class Ended:
    """A process that has ended."""

    def __init__(self, status):
        self.status = status

    def wait(self):
        return self.status

    terminate = wait


def test_a_worker_whose_notebook_died_stops_at_the_next_safe_point(tmp_path):
    progress = vqa.ProgressFile(tmp_path / "progress.json", parent=os.getppid())
    progress.update("training", 1, 3)
    progress.parent = -1
    with pytest.raises(
        vqa.Interrupted,
        match="the end of the notebook's process in training; run again to continue",
    ):
        progress.update("training", 2, 3)


def hold(run, ready, seconds):
    with run.lock_folds([0]):
        ready.set()
        time.sleep(seconds)


def test_a_second_process_on_a_fold_stops_and_the_lock_of_a_dead_one_is_free(mini_run, monkeypatch):
    run, ready = mini_run(), FORK.Event()
    monkeypatch.setattr(vqa, "LOCK_SECONDS", 0.2)
    owner = FORK.Process(target=hold, args=(run, ready, 60))
    owner.start()
    assert ready.wait(30)
    busy = pytest.raises(
        vqa.CheckpointError, match="another process is working on fold 0 of .*choose a new run_name"
    )
    with busy, run.lock_folds([0]):
        pass
    with run.lock_folds([1]):  # another fold is another worker's
        pass
    owner.kill()
    owner.join()
    with run.lock_folds([0]):
        pass


# ------------------------------------------------------------------------------------------------------------- clocks


@pytest.mark.slow
def test_training_stops_in_time_for_inference_and_says_so(mini_run):
    run = mini_run(num_epochs=3, time_budget_hours=1e-9)
    vqa.atomic_write(run.directory / "session.json", json.dumps({"started": 0}))
    vqa.run_stages(run, [0, 1], ["zeroshot"], lambda *_, **__: None)
    vqa.run_stages(run, [0, 1], ["train", "predict"], lambda *_, **__: None)
    assert run.finished_folds == [0]  # the second one was not even begun
    assert len(vqa.read_fold_result(run, 0).history) == 1
    evaluation = vqa.evaluate_run(run)
    submissions = vqa.write_submissions(run, evaluation)
    assert submissions["ensemble"]["answer"].isin([*"abcd"]).all() and len(
        submissions["ensemble"]
    ) == len(run.test)
    report = vqa.write_report(run, evaluation).read_text(encoding="utf-8")
    assert "fold 0: training stopped in epoch 1 after step 1 of 3" in report
    assert "train fold 1 was left out: the time budget has no" in report
    assert "folds [0] of 2" in report


def test_a_fold_that_comes_later_may_change_the_weights_of_all(mini_run):
    run = mini_run()
    for fold, raw in enumerate((0.5, 0.9)):
        kinds = {"raw": {"accuracy": 1, "nll": raw}, "ema": {"accuracy": 0, "nll": 0.6}}
        result = {
            "fold": fold,
            "best_epoch": 1,
            "kinds": kinds,
            "history": [{"epoch": 1}],
            "adapters": {},
        }
        vqa.atomic_write(run.fold_dir(fold) / "result.json", json.dumps(result))
        assert vqa.select_weights(run) == ("raw", "ema")[fold]
        vqa.atomic_write(run.fold_dir(fold) / "oof.npz", b"scored with these weights")
    assert not (run.fold_dir(0) / "oof.npz").exists() and (run.fold_dir(1) / "oof.npz").exists()


def test_the_time_needed_for_inference_counts_folds_views_and_validations(
    mini_run, session, replace
):
    run = mini_run(tta_rotations=2)  # 36 training rows in two folds, 12 test rows
    assert vqa.inference_seconds(run, 0.5, session, training=1) == pytest.approx(
        1.25 * 0.5 * ((18 + 12) * (1 + 1 / 7) + 3 * 18)
    )
    vqa.atomic_write(run.fold_dir(1) / "result.json", "{}")
    assert vqa.inference_seconds(run, 0.5, session, training=0) == 0  # another worker's fold
    session.assigned_folds = (1,)
    assert vqa.inference_seconds(run, 0.5, session, training=0) == pytest.approx(
        1.25 * 0.5 * (18 + 12) * (1 + 1 / 7)
    )
    session.runtime = replace(
        session.runtime, attention="eager"
    )  # every order is a prompt of its own
    assert vqa.inference_seconds(run, 0.5, session, training=0) == 1.25 * 0.5 * (18 + 12) * 2
    assert run.seconds_left() == math.inf


def test_the_speed_of_scoring_is_known_to_the_next_worker(mini_run):
    run = mini_run(zeroshot_rows=8)
    assert run.seconds_per_question() == 0
    vqa.run_stages(run, [0], ["zeroshot"], lambda *_, **__: None)
    assert 0 < run.seconds_per_question() < 60
    with (run.directory / "stages.jsonl").open("a") as file:
        file.write('{"label": "cut sho')  # by a full disk
    assert run.seconds_per_question() > 0 and vqa.wrap_up_table(run).index.tolist() == ["zeroshot"]


def test_on_kaggle_the_budget_runs_from_the_start_of_the_notebook(mini_run, monkeypatch):
    run = mini_run()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(vqa, "launch_workers", lambda *_: None)
    vqa.run_folds(run.config)
    started = json.loads((run.directory / "session.json").read_text())["started"]
    assert started == vqa.psutil.Process().create_time()


def test_kaggle_has_a_time_budget_of_its_own(mini_run, monkeypatch):
    run = mini_run()
    vqa.atomic_write(run.directory / "session.json", json.dumps({"started": time.time() - 3600}))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert abs(run.seconds_left() - 10 * 3600) < 5


# ---------------------------------------------------------------------------------------------------------- full disk


def test_a_full_disk_leaves_the_old_checkpoint_and_names_the_bytes(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    manager = vqa.CheckpointManager(tmp_path)
    good = manager.save(1, {"weight": torch.ones(8)}, {}, {})

    class Full:
        def __init__(self, path, mode):
            self.file = open(path, mode)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(vqa.Path, "open", lambda path, mode="r", **_: Full(path, mode))
    with pytest.raises(
        vqa.CheckpointError, match=r"the disk is full: [\d,]+ bytes are needed, [\d,]+ are free"
    ):
        manager.save(2, {"weight": torch.ones(8)}, {}, {})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [
        good.name
    ] and manager.latest_verified() == good


# ----------------------------------------------------------------------------------------------- the same run or not


def start(config):
    competition = vqa.load_competition(config.data_dir, 0.5)
    return vqa.start_run(
        config, competition, vqa.make_folds(competition.train, config.n_folds, config.seed)
    )


def test_a_changed_learning_rate_is_refused_by_name(mini_run):
    mini_run(run_name="one")
    with pytest.raises(
        vqa.CheckpointError,
        match=r"other config \(learning_rate: 0.001 -> 0.002\); choose a new run_",
    ):
        mini_run(run_name="one", learning_rate=2e-3)


def test_a_touched_image_is_refused_by_name(mini_run, mini_data, tmp_path):
    import shutil

    folder = shutil.copytree(mini_data, tmp_path / "data")
    run = mini_run(run_name="one", data_dir=str(folder))
    path = run.test["image_path"].iloc[3]
    image = vqa.load_image(path)
    image.paste((9, 9, 9), (0, 0, 20, 20))
    image.save(path)
    with pytest.raises(
        vqa.CheckpointError,
        match=r"other data \(rows \['test_0004 \(test_0004.jpg\)'\] and 0 more of",
    ):
        start(run.config)


def test_another_version_of_a_library_is_said(mini_run, caplog):
    run = mini_run(run_name="one")
    path = run.directory / "config.json"
    content = json.loads(path.read_text())
    content["libraries"]["peft"] = "0.0.1"
    path.write_text(json.dumps(content))
    mini_run(run_name="one")
    assert "This run was started with peft 0.0.1; now" in caplog.text


def test_a_run_of_an_earlier_session_is_copied_and_continued(mini_run, tmp_path, caplog):
    old = mini_run(run_name="one", output_dir=str(tmp_path / "input" / "notebook" / "outputs"))
    vqa.atomic_write(old.fold_dir(0) / "oof.npz", b"from the earlier session")
    (tmp_path / "input" / "model").mkdir()
    (tmp_path / "input" / "model" / "config.json").write_text("[]")  # somebody else's
    vqa.LOGGER.setLevel("INFO")
    new = mini_run(run_name="one", resume_from=(str(tmp_path / "input"),))
    assert (new.fold_dir(0) / "oof.npz").read_bytes() == b"from the earlier session"
    assert f"Continuing the run of an earlier session, copied from {old.directory}" in caplog.text
    assert not (new.directory / "session.json").exists()
    other = mini_run(run_name="two", resume_from=(str(tmp_path / "input"),))
    assert not (other.fold_dir(0) / "oof.npz").exists()


def test_an_earlier_run_of_the_same_name_but_other_settings_is_left_alone_and_said(
    mini_run, tmp_path, caplog
):
    old = mini_run(run_name="one", output_dir=str(tmp_path / "input"))
    new = mini_run(run_name="one", resume_from=(str(tmp_path / "input"),), learning_rate=0.5)
    assert f"{old.directory} has this run's name, but other settings, data or folds" in caplog.text
    assert new.config.learning_rate == 0.5


def test_a_run_is_not_continued_on_another_model_in_the_same_folder(
    mini_run, model_folders, tmp_path
):
    folder = shutil.copytree(model_folders["qwen2_5_vl"], tmp_path / "model")
    mini_run(run_name="one", model_id=str(folder))
    mini_run(run_name="one", model_id=str(folder))
    shutil.copy(model_folders["qwen3_vl"] / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(
        vqa.CheckpointError, match=rf"made with other model \(files in {re.escape(str(folder))}\)"
    ):
        mini_run(run_name="one", model_id=str(folder))


def test_of_several_earlier_sessions_the_one_that_came_furthest_is_continued(mini_run, tmp_path):
    for session, files in (("first", 2), ("second", 5), ("third", 1)):
        old = mini_run(run_name="one", output_dir=str(tmp_path / "input" / session))
        for number in range(files):
            vqa.atomic_write(old.fold_dir(0) / f"{number}.npz", session)
    (tmp_path / "outputs" / "one").mkdir(parents=True)
    (tmp_path / "outputs" / "one" / "mine.txt").write_text("not a run, but somebody's")
    new = mini_run(run_name="one", resume_from=(str(tmp_path / "input"),))
    assert (new.fold_dir(0) / "4.npz").read_bytes() == b"second"
    assert (new.directory / "mine.txt").exists()


# ------------------------------------------------------------------------------------------------------------- backup


@pytest.fixture
def backed_up(mini_run, tmp_path):
    """backed_up(...) -> a run that is copied to drive/vqa."""
    (tmp_path / "drive").mkdir()
    return lambda **settings: mini_run(
        run_name="one", backup_dir=str(tmp_path / "drive" / "vqa"), **settings
    )


@pytest.mark.slow
def test_a_run_whose_machine_is_gone_continues_from_its_backup_to_the_same_bytes(
    mini_run, backed_up, tmp_path, monkeypatch
):
    settings = {"num_epochs": 2, "train_folds": (0,), "save_every_steps": 1, "tta_rotations": 1}
    whole = mini_run(run_name="whole", **settings)
    vqa.run_stages(whole, [0], ["train", "predict"], lambda *_, **__: None)
    lost, copy = backed_up(**settings), tmp_path / "drive" / "vqa" / "one"

    def stop(stage, done, *_, **__):
        if "training" in stage and done == 3:
            raise vqa.Interrupted

    with pytest.raises(vqa.Interrupted):
        vqa.run_stages(lost, [0], ["train"], stop)
    newest = vqa.CheckpointManager(copy / "fold_0" / "checkpoints").latest_verified()
    assert (
        newest.name
        == vqa.CheckpointManager(lost.fold_dir(0) / "checkpoints").latest_verified().name
    )
    shutil.rmtree(lost.directory)
    again = backed_up(**settings)
    resumed = []
    monkeypatch.setattr(
        vqa.FoldTrainer,
        "resume",
        lambda self, f=vqa.FoldTrainer.resume: resumed.append(f(self)) or resumed[0],
    )
    vqa.run_stages(again, [0], ["train", "predict"], lambda *_, **__: None)
    assert resumed[0] > (0, 0)
    for name in ("oof.npz", "test.npz", "adapter_raw/adapter_model.safetensors"):
        folders = (whole.fold_dir(0), again.fold_dir(0), copy / "fold_0")
        assert len({(folder / name).read_bytes() for folder in folders}) == 1
    kept = {path.name for path in (copy / "fold_0" / "checkpoints").iterdir()}
    assert kept == {path.name for path in (again.fold_dir(0) / "checkpoints").iterdir()}
    assert not [path for path in copy.rglob("*") if path.suffix in (".lock", ".tmp")]


def test_a_backup_that_fails_costs_no_training_and_is_reported(backed_up, tmp_path, monkeypatch):
    run = backed_up(train_folds=(0,))
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(vqa.shutil, "copytree", lambda *_, **__: (_ for _ in ()).throw(full))
    vqa.train_fold(run.config, 0)
    assert run.is_done("train", 0)
    events = [line["event"] for line in vqa.read_json_lines(run.directory / "events.jsonl")]
    assert events and "not backed up to" in events[0] and "No space left" in events[0]


def test_a_damaged_copy_of_a_checkpoint_does_not_count(backed_up, tmp_path, monkeypatch):
    run, copytree = backed_up(train_folds=(0,)), shutil.copytree

    def damaging(source, target):
        copytree(source, target)
        (target / "state.pt").write_bytes(b"lost on the way")

    monkeypatch.setattr(vqa.shutil, "copytree", damaging)
    vqa.train_fold(run.config, 0)
    assert not [*(tmp_path / "drive" / "vqa" / "one").glob("fold_0/checkpoints/step_*")]
    assert "SHA-256 differs: state.pt" in (run.directory / "events.jsonl").read_text()


def test_a_backup_to_a_disk_that_is_not_mounted_is_refused(mini_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such disk; for Drive set MOUNT_DRIVE = True"):
        mini_run(backup_dir=str(tmp_path / "drive" / "MyDrive" / "vqa"))


# ---------------------------------------------------------------------------------------------------------- inference


def test_inference_continues_where_it_stopped_in_the_same_batches(
    session, demo_rows, tmp_path, replace, monkeypatch
):
    session.config = replace(session.config, infer_batch_size=4, save_every_steps=1)
    frame, views = demo_rows.test.head(10), [vqa.TTAView("rotation 0")]
    expected = vqa.predict_logits(session, frame, views)
    partial = vqa.InferenceCheckpoint(tmp_path / "partial.npz", "run", session.config)
    calls, score_batch = [], vqa.score_batch

    def counted(*arguments):
        calls.append(1)
        return score_batch(*arguments)

    def stop(label, done, total, together):
        if done == 2:
            raise vqa.Interrupted

    monkeypatch.setattr(vqa, "score_batch", counted)
    session.progress = stop
    with pytest.raises(vqa.Interrupted):
        vqa.predict_logits(session, frame, views, partial=partial)
    session.progress = lambda *_, **__: None
    assert np.array_equal(vqa.predict_logits(session, frame, views, partial=partial), expected)
    assert (
        len(calls) == 4
    )  # of three batches; only the one that was under way at the stop is done again
    partial.path.write_bytes(partial.path.read_bytes()[:-40])
    assert np.array_equal(vqa.predict_logits(session, frame, views, partial=partial), expected)


def test_a_damaged_logits_file_is_named(tmp_path):
    path = tmp_path / "oof.npz"
    vqa.write_arrays(path, "run", logits=np.zeros((4, 1, 4)))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(
        vqa.CheckpointError, match=r"oof.npz cannot be read .*delete it and run again"
    ):
        vqa.read_arrays(path, "run")


# -------------------------------------------------------------------------------------------------- no code from data


def test_code_in_a_model_folder_is_refused_unless_asked_for(demo_config, replace, tmp_path):
    import shutil

    from conftest import TINY

    folder = shutil.copytree(TINY, tmp_path / "model")
    path = folder / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModel": "evil.Model"}})
    )
    config = replace(demo_config, model_id=str(folder))
    with pytest.raises(
        ValueError,
        match=r"config.json asks to run Python code from that folder .*trust_remote_code",
    ):
        vqa.load_processor(config)


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "'quoted", "plain", "", "None"]
)
def test_tables_for_people_hold_no_formulas_and_are_read_back_verbatim(tmp_path, text):
    path = tmp_path / "table.csv"
    vqa.write_table(pd.DataFrame({"a": [text], "b": ["x"]}), path)
    cell = pd.read_csv(path, dtype=str, keep_default_na=False)["a"].iloc[0]
    assert not cell.startswith(("=", "+", "-", "@", "\t"))
    assert vqa.read_table(path)["a"].iloc[0] == text


# --------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.slow
def test_the_same_run_twice_gives_the_same_bytes(mini_run):
    files = []
    for name in ("first", "second"):
        run = mini_run(run_name=name, lora_dropout=0.1, cache_dir=None)
        vqa.run_stages(run, [0, 1], ["zeroshot"], lambda *_, **__: None)
        vqa.run_stages(run, [0, 1], ["train", "predict"], lambda *_, **__: None)
        vqa.write_submissions(run, vqa.evaluate_run(run))
        patterns = ("submission_*.csv", "fold_*/oof.npz", "fold_*/test.npz")
        paths = [path for pattern in patterns for path in sorted(run.directory.glob(pattern))]
        files.append([path.read_bytes() for path in paths])
    assert len(files[0]) == 6 and files[0] == files[1]
