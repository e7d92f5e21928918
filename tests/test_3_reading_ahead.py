"""Part 3, Reading ahead: a model's files come into memory while a process does something else."""

import os
from types import SimpleNamespace

import pytest

import vqa_helpers as vqa


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two files of 5,000 bytes, read 100 bytes at a time."""
    monkeypatch.setattr(vqa, "READ_AHEAD_BYTES", 100)
    paths = [tmp_path / f"model-{number}.safetensors" for number in range(2)]
    for path in paths:
        path.write_bytes(b"x" * 5000)
    return paths


def test_the_system_is_told_of_each_part_of_all_files(files, monkeypatch):
    told = []

    def tell(number, start, count, advice):
        told.append((os.readlink(f"/proc/self/fd/{number}"), start, count, advice))

    monkeypatch.setattr(os, "posix_fadvise", tell)
    assert vqa.read_ahead(files) == 10000
    starts = [(str(path), start) for path in files for start in range(0, 5000, 100)]
    assert told == [(*start, 100, os.POSIX_FADV_WILLNEED) for start in starts]
    monkeypatch.delattr(os, "posix_fadvise")
    assert vqa.read_ahead(files) == 0


@pytest.mark.parametrize(("available", "bytes_read"), [(10**6, 10000), (14000, 7000)])
def test_no_more_is_read_than_half_of_the_free_memory(files, available, bytes_read, monkeypatch):
    memory = SimpleNamespace(available=available)
    monkeypatch.setattr(vqa.psutil, "virtual_memory", lambda: memory)
    assert vqa.read_ahead(files) == bytes_read


def test_what_cannot_be_read_is_left_to_loading(files):
    files[0].unlink()
    assert vqa.read_ahead(files) == 0


def test_a_models_folder_is_read_beside_other_work(files, tmp_path):
    config = vqa.Config.preset("demo", model_id=str(tmp_path))
    thread = vqa.read_model_ahead(config)
    thread.join(10)
    assert not thread.is_alive()
    assert thread.daemon  # the process need not wait for it
