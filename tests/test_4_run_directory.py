"""Part 4, Run directory: whose a fold is, how much time is left, whose models are submitted."""

import json
import multiprocessing
import time

import psutil
import pytest
from planted import VIEWS, write_16_bit_scores, write_result, write_scores
from running import quiet

import vqa_helpers as vqa

# --- Locks ----------------------------------------------------------------------------------------


FORK = multiprocessing.get_context("fork")


def hold(run, ready, seconds):
    with run.lock_folds([0]):
        ready.set()
        time.sleep(seconds)


def test_a_second_process_on_a_fold_stops_and_the_lock_of_a_dead_one_is_free(mini_run, monkeypatch):
    run = mini_run()
    ready = FORK.Event()
    monkeypatch.setattr(vqa, "LOCK_SECONDS", 0.2)
    owner = FORK.Process(target=hold, args=(run, ready, 60))
    owner.start()
    assert ready.wait(30)
    busy = "another process is working on fold 0 of .*choose a new run_name"
    with pytest.raises(vqa.CheckpointError, match=busy), run.lock_folds([0]):
        pass
    with run.lock_folds([1]):  # another fold is another worker's
        pass
    owner.kill()
    owner.join()
    with run.lock_folds([0]):
        pass


# --- Time -----------------------------------------------------------------------------------------


def test_kaggle_has_a_time_budget_of_its_own(mini_run, monkeypatch):
    run = mini_run()
    an_hour_ago = time.time() - 3600
    vqa.atomic_write(run.directory / "session.json", json.dumps({"started": an_hour_ago}))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert abs(run.seconds_left() - 10 * 3600) < 5


def test_the_speed_of_scoring_is_known_to_the_next_worker(mini_run):
    run = mini_run(zeroshot_rows=8)
    assert run.seconds_per_question() == 0
    vqa.run_stages(run, [0], ["zeroshot"], quiet)
    assert 0 < run.seconds_per_question() < 60
    with (run.directory / "stages.jsonl").open("a") as file:
        file.write('{"label": "cut sho')  # by a full disk
    assert run.seconds_per_question() > 0
    assert vqa.wrap_up_table(run).index.tolist() == ["zeroshot"]


# --- Members --------------------------------------------------------------------------------------


def test_a_model_on_all_rows_without_16_bit_scores_does_not_cost_the_folds_theirs(mini_run):
    run = mini_run(final_retrain=True, quantization="4bit", score_precision="16bit")
    for fold in (0, 1, 2):
        write_result(run, fold, raw=1.0, ema=1.1)
        write_scores(run, fold, 1.0)
    assert run.submission_models == [0, 1, 2]
    assert not run.is_rescored
    for fold in (0, 1):
        write_16_bit_scores(run, fold, 1.0)
    assert run.submission_models == [0, 1]
    assert run.is_rescored
    assert len(vqa.read_oof(run).view_names) == 2 * len(VIEWS)
    write_16_bit_scores(run, 2, 1.0)
    assert run.submission_models == [0, 1, 2]
    assert run.is_rescored


# --- When the session began -----------------------------------------------------------------------

HOUR = 3600.0


class Processes:
    """Stands for psutil, on which processes began so many hours ago."""

    Error = psutil.Error

    def __init__(self, kernel, first):
        self.ages = {None: kernel, 1: first}

    def Process(self, number=None):
        age = self.ages[number]
        if age is None:
            raise psutil.AccessDenied(number)
        return vqa.SimpleNamespace(create_time=lambda: time.time() - age * HOUR)


# Hours since the kernel and the container's first process began (None: hidden); hours left of 11;
# what is logged.
SESSIONS = {
    "a first kernel": (2.0, 2.0, 9.0, ""),
    "a restarted kernel": (0.5, 7.0, 4.0, ""),
    "a hidden first process": (2.0, None, 9.0, "taken to be this notebook's"),
    "somebody's own container": (2.0, 100.0, 9.0, "older than the 12 hours of a session"),
}


@pytest.mark.parametrize(("kernel", "first", "left", "logged"), SESSIONS.values(), ids=SESSIONS)
def test_on_kaggle_the_budget_counts_from_the_sessions_start(
    mini_run, monkeypatch, caplog, kernel, first, left, logged
):
    run = mini_run()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr(vqa, "psutil", Processes(kernel, first))
    vqa.note_start(run)
    assert abs(run.seconds_left() / HOUR - left) < 0.01
    assert abs(run.seconds_left() / HOUR - left) < 0.01
    assert logged in caplog.text
    # Training asks for the time left before every step: what is known is not looked for again.
    assert caplog.text.count("session's start") == bool(logged)


def test_elsewhere_the_budget_counts_from_the_call(mini_run, monkeypatch):
    run = mini_run(time_budget_hours=2)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.setattr(vqa, "psutil", Processes(50.0, 50.0))
    vqa.note_start(run)
    assert abs(run.seconds_left() / HOUR - 2) < 0.01


@pytest.mark.parametrize("content", ["", '{"start', "[]", '{"started": "soon"}', "\x00\x01"])
def test_a_damaged_session_file_counts_as_none(mini_run, caplog, content):
    run = mini_run(time_budget_hours=2)
    (run.directory / "session.json").write_text(content)
    assert abs(run.seconds_left() / HOUR - 2) < 0.01
    assert "The time budget counts anew" in caplog.text
    assert "session.json" in caplog.text
