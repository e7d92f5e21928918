"""Part 8, Alignment scores: in a process or as a stage, kept, and the rows that fit worst."""

import dataclasses
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from alignment_twins import store_twin
from running import quiet, work_in_this_process

import vqa_helpers as vqa

MODEL = "google/siglip2-so400m-patch14-384"


@pytest.fixture
def config(mini_data, tmp_path):
    settings = {"data_dir": str(mini_data), "output_dir": str(tmp_path / "outputs")}
    return vqa.Config.preset("demo", max_fallback_share=0.5, infer_batch_size=4, **settings)


@pytest.fixture
def rows(mini_data):
    competition = vqa.load_competition(mini_data, 0.5)
    return pd.concat([competition.train, competition.test], ignore_index=True)


@pytest.fixture
def in_this_process(monkeypatch):
    """Score without a process of its own; a list of how many times that was begun."""
    return work_in_this_process(monkeypatch, "align", vqa.fill_alignment)


@pytest.fixture
def fake_scores(monkeypatch):
    """Let a choice's score be the length of its statement; the batches of ids."""
    batches = []

    def align(aligner, rows):
        batches.append(rows["id"].tolist())
        statements = map(vqa.alignment_statements, rows.to_dict("records"))
        return [[len(text) / 7 if text else None for text in of_row] for of_row in statements]

    monkeypatch.setattr(vqa, "align_rows_with_images", align)
    monkeypatch.setattr(vqa, "open_alignment_model", quiet)
    return batches


def test_what_was_scored_once_is_not_scored_again(config, rows, in_this_process, fake_scores):
    rows.loc[0, "d"] = ""
    rows.loc[1, "pixel_hash"] = ""
    scores = vqa.alignment_scores(rows, config)
    length = len(vqa.alignment_statements(rows.iloc[0])[0])
    assert scores[0].tolist()[0] == length / 7
    assert scores[0, 3] == -np.inf
    assert scores[1].tolist() == [0, 0, 0, 0]
    assert sorted(sum(fake_scores, [])) == sorted(set(rows["id"]) - {rows["id"][1]})
    images = rows.set_index("id")["pixel_hash"]
    assert max(images[batch].nunique() for batch in fake_scores) == 4
    image_in_batches = [set(images[batch]) for batch in fake_scores]
    assert sum(map(len, image_in_batches)) == len(set().union(*image_in_batches))

    fake_scores.clear()
    again = vqa.alignment_scores(rows.iloc[::-1], config)
    assert np.array_equal(again, scores[::-1])
    assert len(in_this_process) == 1
    rows.loc[5, "a"] = "다른 것"
    vqa.alignment_scores(rows, config)
    assert fake_scores == [[rows["id"][5]]]
    other = vqa.alignment_scores(rows.head(3), config, "openai/clip-vit-base-patch32")
    assert np.array_equal(other, scores[:3])
    assert len({folder.name for folder in in_this_process}) == 2


@pytest.mark.slow
def test_after_a_kill_the_files_of_the_stage_are_the_same(mini_run, fake_scores):
    run = mini_run(alignment_model=MODEL, infer_batch_size=4)
    vqa.run_stages(run, [0], ["alignment"], quiet)
    paths = [run.directory / name for name in vqa.ALIGNMENT_FILES.values()]
    before = [path.read_bytes() for path in paths]
    batches = list(fake_scores)
    content = vqa.read_arrays(paths[1], run.fingerprint, vqa.SCORE_ARRAYS)
    assert content["logits"].shape == (len(run.test), 1, 4)
    assert content["view_names"].tolist() == [MODEL]
    assert content["labels"].tolist() == [-1] * len(run.test)

    kept = vqa.alignment_folder(run.config) / "scores.jsonl"
    content = kept.read_bytes()
    kept.write_bytes(content[: len(content) // 2])
    assert not kept.read_bytes().endswith(b"\n")
    for path in paths:
        path.unlink()
    fake_scores.clear()
    vqa.run_stages(run, [0], ["alignment"], quiet)
    assert [path.read_bytes() for path in paths] == before
    assert 0 < len(fake_scores) < len(batches)
    assert fake_scores == batches[-len(fake_scores) :]


@pytest.mark.slow
def test_a_finished_run_gets_scores_and_those_of_another_model(mini_run, fake_scores, caplog):
    run = mini_run()
    aligned = mini_run(alignment_model=MODEL, run_name=run.directory.name)
    assert aligned.fingerprint == run.fingerprint
    vqa.run_stages(aligned, [0], ["alignment"], quiet)
    assert vqa.delete_damaged_files(aligned) == 0
    assert vqa.read_alignment(run, "test") is None
    other = mini_run(alignment_model="openai/clip-vit-base-patch32", run_name=run.directory.name)
    assert f"alignment_test.npz has the scores of {MODEL}" in caplog.text
    assert not other.is_done("alignment", 0)
    vqa.run_stages(other, [0], ["alignment"], quiet)
    (other.directory / "alignment_train.npz").unlink()
    assert vqa.delete_damaged_files(other) == 1
    assert not other.is_done("alignment", 0)
    vqa.run_stages(other, [0], ["alignment"], quiet)
    path = other.directory / "alignment_test.npz"
    path.write_bytes(path.read_bytes()[:-100])
    assert vqa.delete_damaged_files(other) == 1
    assert not other.is_done("alignment", 0)


@pytest.fixture
def launched(monkeypatch):
    """The stages of the workers that would be started; none is."""
    stages_of_launches = []

    def launch(run, jobs, stages, stop=lambda: False):
        stages_of_launches.append(stages)
        if stop():
            raise vqa.Interrupted

    monkeypatch.setattr(vqa, "launch_workers", launch)
    return stages_of_launches


@pytest.mark.slow
def test_alignment_comes_behind_the_folds_and_once(mini_run, launched, fake_scores):
    run = mini_run(alignment_model=MODEL)
    vqa.run_folds(run.config)
    assert launched[0][0] == "train"
    assert launched[-1] == ["alignment"]
    vqa.run_stages(run, [0], ["alignment"], quiet)
    launched.clear()
    vqa.run_folds(run.config)
    assert ["alignment"] not in launched


@pytest.mark.parametrize("seconds", [[-1.0], [60.0, -1.0]])
def test_alignment_is_left_out_where_the_time_ends(mini_run, monkeypatch, launched, seconds):
    """Before it begins, and while its worker is at work."""
    run = mini_run(alignment_model=MODEL)
    left = iter([*seconds, -1.0, -1.0])
    monkeypatch.setattr(vqa.Run, "seconds_left", lambda run: next(left))
    vqa.launch_alignment(run)
    assert launched == [["alignment"]] * (len(seconds) - 1)
    (record,) = vqa.unplanned_events(run)
    assert record["event"] == (
        "alignment was left out: the time budget ended before all rows had their scores"
    )
    for name in vqa.ALIGNMENT_FILES.values():  # a later session has made them
        (run.directory / name).touch()
    assert vqa.unplanned_events(run) == []


def test_known_alignment_scores_are_copied_also_without_time(mini_run, monkeypatch, launched):
    run = mini_run(alignment_model=MODEL)
    monkeypatch.setattr(vqa, "prepare_alignment", lambda rows, config: False)
    monkeypatch.setattr(vqa.Run, "seconds_left", lambda run: -1.0)
    vqa.launch_alignment(run)
    assert launched == [["alignment"]]


def test_the_rows_that_fit_worst_are_shown_with_their_images(rows):
    scores = np.zeros((len(rows), 4))
    test_row = len(rows) - 1
    scores[test_row] = -5
    scores[3] = -4
    page = vqa.worst_aligned_html(rows, scores, count=2)
    assert page.index(rows["id"][test_row]) < page.index(rows["id"][3])
    assert page.count("<img") == 2
    assert "alignment 5.0 below its type&#x27;s median" in page
    assert f"<b>{rows['answer'][3]}. " in page
    assert page.count("<b>") == 1  # a test row has no answer
    unusable = rows.assign(pixel_hash=["" if row == 3 else "1" for row in range(len(rows))])
    assert rows["id"][3] not in vqa.worst_aligned(unusable, scores)["id"].tolist()


# --- In a process of its own ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_stage_that_is_killed_goes_on_to_the_same_files(mini_run, tmp_path):
    twin = str(store_twin("siglip", tmp_path / "twin"))
    run = mini_run(alignment_model=twin, infer_batch_size=2)
    vqa.run_stages(run, [0], ["alignment"], quiet)
    paths = [run.directory / name for name in vqa.ALIGNMENT_FILES.values()]
    before = [path.read_bytes() for path in paths]
    kept = vqa.alignment_folder(run.config) / "scores.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines()
    for path in [*paths, kept]:
        path.unlink()
    command = [sys.executable, vqa.__file__, "worker", "--run", str(run.directory)]
    command += ["--folds", "0", "--stages", "alignment"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not kept.exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert len(kept.read_text(encoding="utf-8").splitlines()) < len(lines)
    assert not any(path.exists() for path in paths)
    vqa.run_stages(run, [0], ["alignment"], quiet)
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.slow
def test_a_process_scores_as_the_model_does_here(config, rows, tmp_path):
    twin = store_twin("siglip", tmp_path / "twin")
    scores = vqa.alignment_scores(rows.head(6), config, str(twin))
    settings = dataclasses.replace(config, model_id=str(twin), quantization="none")
    here = vqa.align_rows_with_images(vqa.open_alignment_model(settings), rows.head(6))
    assert np.allclose(scores, np.array(here), atol=1e-5)
