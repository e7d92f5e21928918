"""Part 3, Downloads: what arrives in the hub's cache, watched from another process."""

import json
import logging
import os
import runpy
import subprocess
import sys
import time

import pytest

import vqa_helpers as vqa

MODEL = "some/model"
HUB_VARIABLES = ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the model in an empty cache of the hub."""
    for name in HUB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "models--some--model"
    (folder / "blobs").mkdir(parents=True)
    return folder


def write_index(folder, total):
    snapshot = folder / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    index = {"metadata": {"total_size": total}, "weight_map": {}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))


def write_megabytes(path, count):
    path.write_bytes(b"x" * (count * 10**6))


@pytest.mark.parametrize("name", [None, *HUB_VARIABLES])
def test_the_cache_is_where_the_hubs_library_keeps_it(name, tmp_path, monkeypatch):
    for variable in HUB_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    if name:
        monkeypatch.setenv(name, str(tmp_path / "place"))
    constants = runpy.run_module("huggingface_hub.constants")
    expected = f"{constants['HF_HUB_CACHE']}/models--some--model"
    assert str(vqa.hub_cache_folder(MODEL)) == expected


def test_a_line_says_how_much_has_arrived_of_how_much(cache):
    watch = vqa.DownloadWatch(MODEL)
    assert watch.line() == ""  # nothing is being downloaded
    write_megabytes(cache / "blobs" / "a", 20)
    write_megabytes(cache / "blobs" / "b.incomplete", 10)
    assert watch.line() == "downloading some/model: 0.03 GB, 0.0 MB/s"
    write_index(cache, 60 * 10**6)
    write_megabytes(cache / "blobs" / "b.incomplete", 30)
    watch.first_look = (time.monotonic() - 10, 30 * 10**6)
    assert watch.line() == "downloading some/model: 0.05 of 0.06 GB, 2.0 MB/s"
    (cache / "blobs" / "b.incomplete").rename(cache / "blobs" / "b")
    assert watch.line() == ""


def test_a_size_that_is_set_before_the_bytes_arrive_does_not_count(cache):
    with (cache / "blobs" / "a.incomplete").open("wb") as file:
        file.truncate(10**9)
    assert vqa.DownloadWatch(MODEL).line() == "downloading some/model: 0.00 GB, 0.0 MB/s"


@pytest.mark.parametrize("text", ["", '{"metadata"', "[]", '{"metadata": {"total_size": "all"}}'])
def test_an_index_that_cannot_be_read_does_not_end_the_watch(cache, text):
    write_index(cache, 60 * 10**6)
    (cache / "snapshots/main/model.safetensors.index.json").write_text(text)
    write_megabytes(cache / "blobs" / "a.incomplete", 10)
    assert vqa.DownloadWatch(MODEL).line() == "downloading some/model: 0.01 GB, 0.0 MB/s"


def test_what_an_earlier_session_left_unfinished_is_no_download(cache, caplog):
    left = cache / "blobs" / "a.incomplete"
    write_megabytes(left, 10)
    an_hour_ago = time.time() - 3600
    os.utime(left, (an_hour_ago, an_hour_ago))
    watch = vqa.DownloadWatch(MODEL)
    watch.last_growth -= 2 * vqa.STALLED_SECONDS
    assert watch.line() == ""
    assert caplog.text == ""
    write_megabytes(left, 20)  # this session goes on with it
    assert watch.line() == "downloading some/model: 0.02 GB, 0.0 MB/s"


def test_a_stalled_download_is_explained_once(cache, monkeypatch, caplog):
    monkeypatch.setattr(vqa, "STALLED_SECONDS", 30)
    write_megabytes(cache / "blobs" / "a.incomplete", 10)
    watch = vqa.DownloadWatch(MODEL)
    with caplog.at_level(logging.WARNING, "vqa"):
        assert watch.line().endswith("MB/s")
        watch.last_growth -= 40
        assert watch.line() == "downloading some/model: 0.01 GB, no byte for 40 s"
        assert watch.line().endswith("no byte for 40 s")
        write_megabytes(cache / "blobs" / "a.incomplete", 20)
        assert watch.line().endswith("MB/s")  # it goes on
    (record,) = caplog.records
    assert record.getMessage().startswith("No byte of some/model has arrived for 40 s.")
    assert "os.environ['HF_HUB_DISABLE_XET'] = '1'" in record.getMessage()
    assert "'Without internet' in the README" in record.getMessage()


def test_nothing_arrives_of_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "some" / "model").mkdir(parents=True)
    blobs = tmp_path / "hub" / "models--some--model" / "blobs"
    blobs.mkdir(parents=True)
    write_megabytes(blobs / "a.incomplete", 1)
    assert vqa.DownloadWatch(MODEL).line() == ""


def test_a_growing_file_of_another_process_is_seen(cache):
    code = (
        "import sys, time\n"
        "for _ in range(100):\n"
        "    open(sys.argv[1], 'ab').write(bytes(10**6) + b'x' * 10**6)\n"
        "    time.sleep(0.01)\n"
    )
    path = cache / "blobs" / "a.incomplete"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    watch = vqa.DownloadWatch(MODEL)
    seen = set()
    try:
        deadline = time.monotonic() + 20
        while len(seen) < 3 and time.monotonic() < deadline:
            watch.line()
            seen.add(watch.arrived)
            time.sleep(0.02)
    finally:
        process.terminate()
        process.wait()
    assert len(seen) == 3
    assert max(seen) >= 10**6
