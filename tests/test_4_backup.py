"""Part 4, Backup: a lost machine costs minutes, a failing or damaged copy costs no training."""

import errno
import shutil

import pytest
from planted import write_result, write_scores
from running import events, quiet, raising

import vqa_helpers as vqa


@pytest.fixture
def backed_up(mini_run, tmp_path):
    """backed_up(...) -> a run that is copied to drive/vqa."""
    (tmp_path / "drive").mkdir()
    backup_dir = str(tmp_path / "drive" / "vqa")

    def make(**settings):
        return mini_run(run_name="one", backup_dir=backup_dir, **settings)

    return make


def newest_checkpoint(fold_folder):
    return vqa.CheckpointManager(fold_folder / "checkpoints").latest_verified().name


def checkpoint_names(fold_folder):
    return {path.name for path in (fold_folder / "checkpoints").iterdir()}


@pytest.mark.slow
def test_a_run_whose_machine_is_gone_continues_from_its_backup_to_the_same_bytes(
    mini_run, backed_up, tmp_path, monkeypatch
):
    settings = {
        "num_epochs": 2,
        "train_folds": (0,),
        "save_every_steps": 1,
        "tta_rotations": 1,
    }
    whole = mini_run(run_name="whole", **settings)
    vqa.run_stages(whole, [0], ["train", "predict"], quiet)
    lost = backed_up(**settings)
    copy = tmp_path / "drive" / "vqa" / "one"

    def stop(stage, done, *_, **__):
        if "training" in stage and done == 3:
            raise vqa.Interrupted

    with pytest.raises(vqa.Interrupted):
        vqa.run_stages(lost, [0], ["train"], stop)
    assert newest_checkpoint(copy / "fold_0") == newest_checkpoint(lost.fold_dir(0))
    shutil.rmtree(lost.directory)

    again = backed_up(**settings)
    resumed_at = []
    resume = vqa.FoldTrainer.resume

    def noting(trainer):
        position = resume(trainer)
        resumed_at.append(position)
        return position

    monkeypatch.setattr(vqa.FoldTrainer, "resume", noting)
    vqa.run_stages(again, [0], ["train", "predict"], quiet)
    assert resumed_at[0] > (0, 0)
    for name in ("oof.npz", "test.npz", "adapter_raw/adapter_model.safetensors"):
        folders = (whole.fold_dir(0), again.fold_dir(0), copy / "fold_0")
        assert len({(folder / name).read_bytes() for folder in folders}) == 1
    assert checkpoint_names(copy / "fold_0") == checkpoint_names(again.fold_dir(0))
    assert not [path for path in copy.rglob("*") if path.suffix in (".lock", ".tmp")]


def test_a_backup_that_fails_costs_no_training_and_is_reported(backed_up, tmp_path, monkeypatch):
    run = backed_up(train_folds=(0,))
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(vqa.shutil, "copytree", raising(full))
    vqa.train_fold(run.config, 0)
    assert run.is_done("train", 0)
    first, *_ = events(run)
    assert "not backed up to" in first
    assert "No space left" in first


def test_a_damaged_copy_of_a_checkpoint_does_not_count(backed_up, tmp_path, monkeypatch):
    run = backed_up(train_folds=(0,))
    copytree = shutil.copytree

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


def test_scores_by_weights_that_are_no_longer_used_do_not_come_back_from_the_backup(
    mini_run, tmp_path
):
    (tmp_path / "drive").mkdir()
    settings = {
        "run_name": "one",
        "n_folds": 3,
        "backup_dir": str(tmp_path / "drive" / "vqa"),
    }
    run = mini_run(**settings)
    for fold in (0, 1):
        write_result(run, fold, raw=1.0, ema=1.05)
        write_scores(run, fold, 111.0)
        vqa.back_up(run, fold)
    assert vqa.select_weights(run) == "raw"
    write_result(run, 2, raw=2.0, ema=1.0)  # a later session trains the last fold
    assert vqa.select_weights(run) == "ema"
    write_scores(run, 0, 222.0)
    for fold in (2, 0, None):
        vqa.back_up(run, fold)
    shutil.rmtree(run.directory)
    again = mini_run(**settings)
    assert vqa.select_weights(again) == "ema"
    assert again.unfinished_folds("predict", [0, 1, 2]) == [1, 2]


def test_a_disk_that_was_taken_away_is_not_made_anew(mini_run, tmp_path):
    drive = tmp_path / "drive" / "MyDrive"
    drive.mkdir(parents=True)
    run = mini_run(backup_dir=str(drive / "vqa"))
    shutil.rmtree(tmp_path / "drive")
    vqa.back_up(run)
    assert not drive.exists()
    assert "is gone" in (run.directory / "events.jsonl").read_text()
