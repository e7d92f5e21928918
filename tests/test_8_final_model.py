"""Part 8, Final model: one more model on all rows, of which nothing is claimed."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
from running import quiet, read_logits

import vqa_helpers as vqa


def test_the_model_on_all_rows_is_one_more_member_of_the_mean_and_nothing_is_claimed_of_it(
    with_final,
):
    run = with_final
    assert run.finished_folds == [0, 1]
    assert run.submission_models == [0, 1, 2]
    evaluation = vqa.evaluate_run(run)
    assert set(evaluation.oof.folds) == {0, 1}
    assert set(evaluation.fold_table.index) == {0, 1}
    assert evaluation.method == "mean"

    members = vqa.predict_test(run, evaluation)
    assert list(members) == [0, 1, 2]
    logits = read_logits(run, 2, "test")
    pooled_temperature = evaluation.calibration.temperatures[run.final_fold]
    scores = vqa.combine_views(logits[:, evaluation.views])
    np.testing.assert_allclose(members[2], vqa.softmax(scores / pooled_temperature))
    ensemble = vqa.write_submissions(run, evaluation)["ensemble"]
    answers = ensemble.set_index("id")["answer"][run.test["id"]]
    expected = np.mean(list(members.values()), axis=0).argmax(axis=1)
    assert answers.tolist() == [vqa.CHOICES[label] for label in expected]

    last = evaluation.ladder.iloc[-1]
    assert last.name == vqa.STEP_FINAL_MODEL
    assert last["used"]
    assert np.isnan([last["accuracy"], last["nll"], last["gain"]]).all()
    report = vqa.write_report(run, evaluation).read_text()
    assert "whether it helps cannot be seen here" in report


def test_the_model_on_all_rows_takes_the_epochs_that_the_folds_chose(
    with_final, replace, monkeypatch
):
    results = [vqa.read_fold_result(with_final, fold) for fold in (0, 1)]
    final = vqa.read_fold_result(with_final, 2)
    assert len(final.history) == vqa.final_epochs(with_final)
    assert final.kinds == {"raw": {}, "ema": {}}
    assert "accuracy" not in final.history

    best_epochs = {0: 5, 1: 1}

    def read_result(run, fold):
        return replace(results[fold], best_epoch=best_epochs[fold])

    monkeypatch.setattr(vqa, "read_fold_result", read_result)
    monkeypatch.setattr(vqa, "select_weights", lambda run: "raw")
    assert vqa.final_epochs(with_final) == 3
    # An average ends with the last epoch, not the best.
    monkeypatch.setattr(vqa, "select_weights", lambda run: "ema")
    assert vqa.final_epochs(with_final) == len(results[0].history)


def test_the_model_on_all_rows_trains_on_all_of_them_in_every_epoch(with_final):
    steps = vqa.plan_epoch([1] * len(with_final.train), 8, (42, 2, 0))
    shown = sum(len(step) for step in steps)
    last = vqa.read_json_lines(with_final.fold_dir(2) / "metrics.jsonl")[-1]
    assert last["step"] + 1 == math.ceil(shown / 8)


def test_nothing_of_a_whole_run_with_a_model_on_all_rows_counts_as_damaged(with_final):
    """That model holds no row out: its files of scores are there, though one is empty."""
    before = {path: path.stat().st_mtime_ns for path in with_final.directory.rglob("*.*")}
    assert vqa.delete_damaged_files(with_final) == 0
    assert {path: path.stat().st_mtime_ns for path in with_final.directory.rglob("*.*")} == before


def copy_of(run, folder, without):
    """The run elsewhere, without one of its folders; it saves a checkpoint at every step."""
    target = folder / run.directory.name
    ignored = shutil.ignore_patterns("*.lock", "session.json", without)
    shutil.copytree(run.directory, target, ignore=ignored)
    config = dataclasses.replace(run.config, output_dir=str(folder), save_every_steps=1)
    return dataclasses.replace(run, directory=target, config=config)


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [3, 5])
def test_the_model_on_all_rows_resumes_to_the_same_bytes(with_final, tmp_path, stop_at):
    stopped = copy_of(with_final, tmp_path, "fold_2")

    def stop(stage, done, total, **_):
        if (stage, done) == ("fold 2 training", stop_at):
            raise vqa.Interrupted

    with pytest.raises(vqa.Interrupted):
        vqa.run_stages(stopped, [2], ["train", "predict"], stop)
    assert stopped.submission_models == [0, 1]
    vqa.run_stages(stopped, [2], ["train", "predict"], quiet)
    for name in (
        "test.npz",
        "adapter_ema/adapter_model.safetensors",
        "adapter_raw/adapter_model.safetensors",
    ):
        expected = (with_final.fold_dir(2) / name).read_bytes()
        assert (stopped.fold_dir(2) / name).read_bytes() == expected


@pytest.mark.slow
def test_half_a_model_on_all_rows_is_left_out_and_continued_when_there_is_time(
    with_final, tmp_path, monkeypatch
):
    late = copy_of(with_final, tmp_path, "fold_2")
    monkeypatch.setattr(vqa.Run, "seconds_left", lambda self: 10.0)
    monkeypatch.setattr(vqa, "seconds_needed", lambda *_: 5.0)  # looked as if it fitted
    monkeypatch.setattr(vqa.FinalTrainer, "time_is_up", lambda self, speed: True)
    vqa.run_stages(late, [2], ["train", "predict"], quiet)
    assert late.submission_models == [0, 1]
    assert list(vqa.predict_test(late, vqa.evaluate_run(late))) == [0, 1]
    report = vqa.write_report(late, vqa.evaluate_run(late)).read_text()
    reason = "the time budget ended before its training, on all rows, did"
    assert f"train fold 2 was left out: {reason}" in report

    monkeypatch.undo()
    vqa.run_stages(late, [2], ["train", "predict"], quiet)
    expected = (with_final.fold_dir(2) / "test.npz").read_bytes()
    assert (late.fold_dir(2) / "test.npz").read_bytes() == expected
    report = vqa.write_report(late, vqa.evaluate_run(late)).read_text()
    assert "was left out" not in report


def test_no_model_on_all_rows_is_begun_where_the_time_does_not_hold_it(
    with_final, tmp_path, monkeypatch
):
    late = copy_of(with_final, tmp_path, "fold_2")
    stages = vqa.read_json_lines(late.directory / "stages.jsonl")
    longest = max(stage["seconds"] for stage in stages if "train" in stage["label"])
    monkeypatch.setattr(vqa, "inference_seconds", lambda *_, **__: 0.0)
    # Enough for a fold, which trains on half of the rows.
    monkeypatch.setattr(vqa.Run, "seconds_left", lambda self: 1.5 * longest)
    vqa.run_stages(late, [2], ["train", "predict"], quiet)
    assert late.submission_models == [0, 1]
    assert not late.fold_dir(2).joinpath("checkpoints").exists()
