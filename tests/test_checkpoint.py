"""Checkpoints: committed whole, verified before use, the damaged ones passed over aloud."""

import logging

import pytest
import torch

import vqa_helpers as vqa


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
    assert state == {"optimizer": {"step": 3}} and metadata == {"step": 3, "epoch": 3}


def test_only_the_newest_are_kept_and_leftovers_of_killed_writes_removed(manager):
    manager.directory.mkdir(parents=True)
    (manager.directory / ".incomplete-killed").mkdir()
    for step in (1, 2, 10):
        save(manager, step)
    assert sorted(path.name for path in manager.directory.iterdir()) == [
        "step_00000002",
        "step_00000010",
    ]


@pytest.mark.parametrize(
    "name", ["tensors.safetensors", "state.pt", "metadata.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_skipped_with_its_reason(manager, caplog, name, damage):
    good, bad = save(manager, 1), save(manager, 2)
    file = bad / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content) if damage == "flip" else file.write_bytes(content[:-3])
    if damage == "delete":
        file.unlink()
    with caplog.at_level(logging.WARNING):
        logger_handler = caplog.handler
        vqa.LOGGER.addHandler(logger_handler)
        assert manager.latest_verified() == good
        vqa.LOGGER.removeHandler(logger_handler)
    assert f"Skipped checkpoint {bad}" in caplog.text
    with pytest.raises(vqa.CheckpointError, match="is damaged"):
        manager.restore(bad)


def test_pruning_never_counts_a_damaged_checkpoint_as_kept(manager):
    save(manager, 1)
    damaged = save(manager, 2)
    (damaged / "state.pt").unlink()
    save(manager, 3)
    names = sorted(path.name for path in manager.directory.iterdir())
    assert names == [
        "step_00000001",
        "step_00000002",
        "step_00000003",
    ]  # 3 and 1 verify, so nothing older than 1 goes


def test_no_checkpoint_is_none(manager):
    assert manager.latest_verified() is None
