"""Part 1, Checkpoints: committed whole, verified before use, the damaged ones passed over aloud."""

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import vqa_helpers as vqa

# --- Folders that are committed whole -------------------------------------------------------------


@pytest.fixture
def manager(tmp_path):
    return vqa.CheckpointManager(tmp_path / "checkpoints", keep=2)


def save(manager, step):
    return manager.save(
        step,
        {"weight": torch.full((2, 2), float(step))},
        {"optimizer": {"step": step}},
        {"epoch": step},
    )


def test_restore_returns_what_was_saved(manager):
    tensors, state, metadata = manager.restore(save(manager, 3))
    assert tensors["weight"].tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert state == {"optimizer": {"step": 3}}
    assert metadata == {"step": 3, "epoch": 3}


def test_only_the_newest_are_kept_and_leftovers_of_killed_writes_removed(manager):
    manager.directory.mkdir(parents=True)
    (manager.directory / ".incomplete-killed").mkdir()
    for step in (1, 2, 10):
        save(manager, step)
    assert sorted(path.name for path in manager.directory.iterdir()) == [
        "step_00000002",
        "step_00000010",
    ]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


DAMAGES = {"flip": flip_a_bit, "truncate": truncate, "delete": Path.unlink}


@pytest.mark.parametrize(
    "name", ["tensors.safetensors", "state.pt", "metadata.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_its_reason(manager, caplog, name, damage):
    good = save(manager, 1)
    bad = save(manager, 2)
    DAMAGES[damage](bad / name)
    with caplog.at_level(logging.WARNING):
        vqa.LOGGER.addHandler(caplog.handler)
        assert manager.latest_verified() == good
        vqa.LOGGER.removeHandler(caplog.handler)
    assert f"Skipped checkpoint {bad}" in caplog.text
    with pytest.raises(vqa.CheckpointError, match="is damaged"):
        manager.restore(bad)


def test_pruning_never_counts_a_damaged_checkpoint_as_kept(manager):
    save(manager, 1)
    damaged = save(manager, 2)
    (damaged / "state.pt").unlink()
    save(manager, 3)
    names = sorted(path.name for path in manager.directory.iterdir())
    # 3 and 1 verify, so nothing older than 1 goes
    assert names == ["step_00000001", "step_00000002", "step_00000003"]


def test_pruning_leaves_files_alone_that_are_named_like_checkpoints(manager):
    save(manager, 1)
    (manager.directory / "step_00000001.zip").write_bytes(b"an archive of it")
    for step in (2, 3, 4):
        save(manager, step)
    names = sorted(path.name for path in manager.directory.iterdir())
    assert names == ["step_00000001.zip", "step_00000003", "step_00000004"]


def test_pruning_reads_each_checkpoint_once_unless_it_changes(manager, monkeypatch):
    read = []
    own = vqa.file_sha256

    def counted(path):
        read.append(path.parent.name)
        return own(path)

    monkeypatch.setattr(vqa, "file_sha256", counted)
    saved = [save(manager, step) for step in (1, 2, 3, 4)]
    files = len(vqa.CHECKPOINT_FILES)
    assert read == [path.name for path in saved for _ in range(files)]
    damaged = saved[3] / "state.pt"
    flip_a_bit(damaged)
    later = damaged.stat().st_mtime_ns + 10**9
    os.utime(damaged, ns=(later, later))  # a clock of files may go in steps of milliseconds
    save(manager, 5)
    names = sorted(path.name for path in manager.directory.iterdir())
    assert names == ["step_00000003", "step_00000004", "step_00000005"]
    assert manager.latest_verified().name == "step_00000005"


def test_no_checkpoint_is_none(manager):
    assert manager.latest_verified() is None


class FileOnAFullDisk:
    """Takes half of what is written to it."""

    def __init__(self, path, mode):
        self.file = open(path, mode)  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_checkpoint_and_names_the_bytes(tmp_path, monkeypatch):
    manager = vqa.CheckpointManager(tmp_path)
    good = manager.save(1, {"weight": torch.ones(8)}, {}, {})
    monkeypatch.setattr(vqa.Path, "open", lambda path, mode="r", **_: FileOnAFullDisk(path, mode))
    with pytest.raises(
        vqa.CheckpointError, match=r"the disk is full: [\d,]+ bytes are needed, [\d,]+ are free"
    ):
        manager.save(2, {"weight": torch.ones(8)}, {}, {})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    assert manager.latest_verified() == good


# --- One file, for any module ---------------------------------------------------------------------


def build_linear_layer():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return model, optimizer, scheduler


def test_checkpoint_of_a_plain_linear_layer_round_trips(tmp_path):
    model, optimizer, scheduler = build_linear_layer()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    metrics = {"acc": np.float64(0.5)}
    place = tmp_path / "a" / "ckpt.pt"
    path = vqa.save_checkpoint(model, optimizer, scheduler, 4, 1, metrics, place)
    other, other_optimizer, other_scheduler = build_linear_layer()
    loaded = vqa.load_checkpoint(other, other_optimizer, other_scheduler, path)
    assert loaded == (4, 1, {"acc": 0.5})
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
