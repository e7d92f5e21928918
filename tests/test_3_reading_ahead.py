"""Part 3, Reading ahead: a model's files come into memory while a process does something else."""

from types import SimpleNamespace

import pytest

import vqa_helpers as vqa


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two files of 5,000 bytes, read 100 bytes at a time from a disk that is slower than memory."""
    monkeypatch.setattr(vqa, "READ_AHEAD_BYTES", 100)
    monkeypatch.setattr(vqa, "IN_MEMORY_RATE", 10**15)
    paths = [tmp_path / f"model-{number}.safetensors" for number in range(2)]
    for path in paths:
        path.write_bytes(b"x" * 5000)
    return paths


def test_all_files_are_read(files):
    assert vqa.read_ahead(files) == 10000


def test_files_that_were_in_memory_are_left_soon(files, monkeypatch):
    monkeypatch.setattr(vqa, "IN_MEMORY_RATE", 0)
    assert vqa.read_ahead(files) == 1600


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
