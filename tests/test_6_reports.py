"""Part 6, Figures, Experiments and Report: what a person reads about one run and all runs."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import vqa_helpers as vqa


def finish(run, evaluation, monkeypatch, day):
    """Log the run as finished on that day, in two stages."""
    for label, seconds in (("train fold 0", 10.5), ("predict fold 0", 2)):
        vqa.MetricLogger(run.directory / "stages.jsonl").log(label=label, seconds=seconds)
    monkeypatch.setattr(vqa.time, "strftime", lambda _: f"2026-01-0{day} 00:00:00")
    vqa.log_experiment(run, evaluation)


@pytest.fixture
def evaluation():
    """Of four rows, whose answers are all a."""
    probabilities = np.full((4, 4), 0.25)
    return SimpleNamespace(probabilities=probabilities, oof=SimpleNamespace(labels=np.arange(4)))


def test_finished_runs_are_compared_with_the_run_before(mini_run, evaluation, monkeypatch, replace):
    early = mini_run(run_name="early")
    late = mini_run(run_name="late", learning_rate=2e-4, num_epochs=3, log_level="DEBUG")
    teacher = str(early.directory)
    student = replace(
        early,
        directory=early.directory.with_name("student"),
        config=replace(late.config, run_name="student", distill_from=teacher),
    )
    for day, run in ((2, late), (1, early), (4, early), (3, student)):
        finish(run, evaluation, monkeypatch, day)
    table = vqa.experiment_table(early.directory.parent)
    assert table.index.tolist() == ["late", "student", "early"]  # which was finished again, later
    assert table["seconds"].tolist() == [12.5, 12.5, 25]
    assert table["accuracy"].tolist() == [0.25] * 3
    changes = table["changed"].tolist()
    assert changes[0] == ""
    assert changes[1] == f"distill_from={teacher}"
    assert {"num_epochs=1", "distill_from=None"} < set(changes[2].split(", "))
    assert table["note"].tolist() == ["", "distilled: scores are too good", ""]
    accuracies, minutes = vqa.plot_experiments(table)
    assert [bar.get_width() for bar in accuracies.patches] == [0.25] * 3
    assert len({bar.get_facecolor() for bar in accuracies.patches}) == 2
    assert minutes.patches[0].get_width() == pytest.approx(12.5 / 60)


def test_a_run_that_a_new_session_continues_brings_the_runs_before_it_along(
    mini_run, evaluation, monkeypatch
):
    old = mini_run(run_name="old")
    run = mini_run(run_name="new")
    finish(old, evaluation, monkeypatch, 1)
    finish(run, evaluation, monkeypatch, 2)
    (run.directory.parent / "experiments.csv").unlink()  # the new session has the run's folder only
    finish(run, evaluation, monkeypatch, 3)
    table = vqa.experiment_table(run.directory.parent)
    assert table.index.tolist() == ["old", "new"]
    days = table["finished"].str[9]
    assert days.tolist() == ["1", "3"]


def test_runs_that_an_older_version_logged_are_kept_without_what_it_did_not_log(
    mini_run, evaluation, monkeypatch
):
    run = mini_run(run_name="new")
    old = {
        "run": "old",
        "finished": "2026-01-01 00:00:00",
        "model": "m",
        "folds": 3,
        "rows": 9,
        "accuracy": 0.5,
        "nll": 1.0,
        "ece": 0.0,
    }
    vqa.write_table(pd.DataFrame([old]), run.directory.parent / "experiments.csv")
    assert vqa.experiment_table(run.directory.parent)["accuracy"].tolist() == [0.5]
    finish(run, evaluation, monkeypatch, 2)
    table = vqa.experiment_table(run.directory.parent)
    assert table["accuracy"].tolist() == [0.5, 0.25]
    assert table["changed"].tolist() == ["", ""]
    assert np.isnan(table.loc["old", ["brier", "seconds"]].astype(float)).all()


def test_evaluation_submissions_and_report(finished):
    evaluation = vqa.evaluate_run(finished)
    assert {"zero-shot", "fine-tuned, one view", "temperature"} <= set(evaluation.ladder.index)
    assert evaluation.view_table["admitted"].iloc[0]
    frames = vqa.write_submissions(finished, evaluation)
    for name in ("single", "ensemble"):
        assert frames[name]["id"].tolist() == finished.sample["id"].tolist()
        assert set(frames[name]["answer"]) <= set(vqa.CHOICES)
    best_fold = vqa.best_fold(evaluation)
    single = vqa.predict_test(finished, evaluation)[best_fold].argmax(1)
    assert frames["single"]["answer"].tolist() == [vqa.CHOICES[label] for label in single]

    table = vqa.confusion_table(evaluation.oof.labels, single[:1].repeat(36))
    vqa.save_figure(vqa.plot_confusion(table), finished, "confusion")
    text = vqa.write_report(finished, evaluation).read_text(encoding="utf-8")
    assert "![confusion](figures/confusion.png)" in text
    assert "| zero-shot |" in text

    vqa.write_report(finished, evaluation)  # a second time, which is no second run
    log = pd.read_csv(finished.directory.parent / "experiments.csv")
    assert log["run"].tolist() == [finished.directory.name]
    files = {
        "ladder": evaluation.ladder,
        "folds": evaluation.fold_table,
        "views": evaluation.view_table,
    }
    for name, table in files.items():
        written = pd.read_csv(finished.directory / "tables" / f"{name}.csv")
        assert len(written) == len(table)
