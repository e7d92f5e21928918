"""Tables that people act on: suspected labels, weak groups, test rows to look at, and what changed between runs."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import vqa_helpers as vqa


def probabilities_for(labels, generator, sharpness=3.0):
    """Calibrated probabilities of a model that prefers the true choice: labels are drawn from them by the caller."""
    scores = generator.normal(size=(len(labels), 4))
    scores[np.arange(len(labels)), labels] += sharpness
    return vqa.softmax(scores)


def test_planted_label_errors_are_among_the_suspects_and_the_likely_label_is_the_true_one():
    generator = np.random.default_rng(0)
    truth = generator.integers(4, size=1000)
    labels, wrong = truth.copy(), generator.choice(1000, 80, replace=False)
    labels[wrong] = (truth[wrong] + generator.integers(1, 4, size=80)) % 4
    suspects = vqa.label_suspects(probabilities_for(truth, generator), labels)
    found = np.isin(suspects["row"], wrong)
    assert found.mean() >= 0.6 and found.sum() >= 0.5 * 80
    assert (suspects["likely"] == truth[suspects["row"]])[found].mean() > 0.85
    assert suspects["margin"].is_monotonic_decreasing


def test_a_row_is_no_suspect_where_the_other_choice_is_less_sure_than_usual():
    probabilities = np.array(
        [[0.9, 0.1, 0, 0], [0.1, 0.9, 0, 0], [0.4, 0.6, 0, 0], [0.05, 0.95, 0, 0]]
    )
    suspects = vqa.label_suspects(probabilities, [0, 1, 0, 0])
    assert suspects["row"].tolist() == [
        3
    ]  # 0.6 is less than what rows labelled b usually get, 0.95 is not


def test_a_row_is_no_suspect_where_no_choice_is_as_probable_as_usual():
    probabilities = np.array(
        [[0.9, 0.05, 0.05, 0], [0.05, 0.9, 0.05, 0], [0.05, 0.05, 0.9, 0], [0.35, 0.45, 0.2, 0]]
    )
    assert vqa.label_suspects(probabilities, [0, 1, 2, 2]).empty


def test_a_choice_that_is_never_the_label_is_never_likely():
    suspects = vqa.label_suspects(np.array([[0.2, 0.1, 0.7, 0], [0.3, 0.6, 0.1, 0]]), [0, 1])
    assert suspects.empty


@pytest.fixture
def rows():
    """Eight rows: two share an image, and the answer is the longest choice of the first four."""
    frame = pd.DataFrame({"id": [f"r{n}" for n in range(8)], "type": ["ocr"] * 4 + ["color"] * 4})
    frame["question"] = ["가" * n for n in (3, 4, 5, 6, 7, 8, 9, 10)]
    frame = frame.assign(
        a=["12345"] * 4 + ["1"] * 4,
        b="1",
        c="12",
        d="123",
        label=0,
        answer="a",
        width=10,
        height=10,
    )
    return frame.assign(
        pixel_hash=["x", "x", *"abcdef"], image_group=[0, 0, 1, 1, 2, 3, 4, 5], tokens=range(8)
    )


def test_accuracy_by_group_counts_every_row_once_in_each_grouping(rows):
    correct = np.array([True] * 4 + [False] * 4)
    table = vqa.accuracy_by_group(rows, correct)
    assert (table["rows"].groupby("by").sum() == 8).all()
    assert table.loc[("question type", "ocr"), "accuracy"] == 1
    assert table.loc[("answer's length", "longest"), "accuracy"] == 1
    assert table.loc[("answer's length", "shortest"), "accuracy"] == 0
    tied = vqa.accuracy_by_group(
        rows.assign(c="12345"), correct
    )  # the longest choice, but not alone
    assert tied.loc[("answer's length", "longest"), "rows"] == 4
    assert table.loc[("image", "in several questions"), "rows"] == 2
    assert table.loc[("image", "has a near copy"), "rows"] == 2
    assert table.loc[("prompt, tokens", "0 to 1"), "rows"] == 2
    assert "prompt, tokens" not in vqa.accuracy_by_group(rows.assign(tokens=None), correct).index
    assert table.loc[("question, characters", "3 to 4"), "rows"] == 2
    assert table.loc[("image, pixels", "100"), "rows"] == 8


def test_a_choice_that_is_not_there_is_not_the_shortest(rows):
    table = vqa.accuracy_by_group(rows.assign(a="1", b="12", c="123", d=""), np.ones(8, bool))
    assert table.loc["answer's length"].index.tolist() == ["shortest"]


def test_choices_of_one_length_are_a_group_of_their_own(rows):
    table = vqa.accuracy_by_group(rows.assign(a="1", c="1", d="1"), np.ones(8, bool))
    assert table.loc["answer's length"].index.tolist() == ["all equal"]


def test_rows_on_which_folds_disagree_come_first(monkeypatch):
    sure, torn, close = [0.97, 0.01, 0.01, 0.01], [0.01, 0.97, 0.01, 0.01], [0.4, 0.39, 0.11, 0.1]
    folds = {
        0: np.array([sure, sure, close]),
        1: np.array([sure, torn, close]),
        2: np.array([sure, sure, close]),
    }
    monkeypatch.setattr(vqa, "predict_test", lambda run, evaluation: folds)
    test = pd.DataFrame({"id": ["sure", "torn", "close"], "type": "ocr", "question": "?"})
    config = SimpleNamespace(ensemble_method="mean")
    run = SimpleNamespace(test=test.assign(a="1", b="2", c="3", d="4"), config=config)
    table = vqa.uncertain_rows(run, None)
    assert table["id"].tolist() == ["torn", "close", "sure"] and table["predicted"].tolist() == [
        "a",
        "a",
        "a",
    ]
    assert table["folds_for_it"].tolist() == [0.667, 1, 1] and table["margin"].iloc[
        1
    ] == pytest.approx(0.01)


def test_the_rows_to_look_at_have_the_answers_of_the_submission_also_where_folds_vote(monkeypatch):
    """Two folds are for a by a hair, one is sure of b: the mean says b, the vote a."""
    torn = np.array([[[0.5, 0.4, 0.1, 0.0]], [[0.5, 0.4, 0.1, 0.0]], [[0.0, 1.0, 0.0, 0.0]]])
    monkeypatch.setattr(vqa, "predict_test", lambda run, evaluation: dict(enumerate(torn)))
    test = pd.DataFrame(
        {"id": ["torn"], "type": "ocr", "question": "?", "a": "1", "b": "2", "c": "3", "d": "4"}
    )
    row = vqa.uncertain_rows(
        SimpleNamespace(test=test, config=SimpleNamespace(ensemble_method="vote")), None
    ).iloc[0]
    assert (row["predicted"], row["second"], row["folds_for_it"]) == ("a", "b", 0.667)
    assert row["margin"] == pytest.approx(1 / 3 - 0.6, abs=1e-4) and row[
        "chance_wrong"
    ] == pytest.approx(0.6667)


def finish(run, evaluation, monkeypatch, day):
    """Log the run as finished on that day, in two stages."""
    for label, seconds in (("train fold 0", 10.5), ("predict fold 0", 2)):
        vqa.MetricLogger(run.directory / "stages.jsonl").log(label=label, seconds=seconds)
    monkeypatch.setattr(vqa.time, "strftime", lambda _: f"2026-01-0{day} 00:00:00")
    vqa.log_experiment(run, evaluation)


@pytest.fixture
def evaluation():
    return SimpleNamespace(
        probabilities=np.full((4, 4), 0.25), oof=SimpleNamespace(labels=np.arange(4))
    )


def test_finished_runs_are_compared_with_the_run_before(mini_run, evaluation, monkeypatch, replace):
    early = mini_run(run_name="early")
    late = mini_run(run_name="late", learning_rate=2e-4, num_epochs=3, log_level="DEBUG")
    teacher = str(early.directory)
    student = replace(
        early, config=dataclasses.replace(late.config, run_name="student", distill_from=teacher)
    )
    student = replace(student, directory=early.directory.with_name("student"))
    for day, run in ((2, late), (1, early), (4, early), (3, student)):
        finish(run, evaluation, monkeypatch, day)
    table = vqa.experiment_table(early.directory.parent)
    assert table.index.tolist() == ["late", "student", "early"]  # which was finished again, later
    assert (
        table["seconds"].tolist() == [12.5, 12.5, 25] and table["accuracy"].tolist() == [0.25] * 3
    )
    assert (
        table["changed"].tolist()[0] == "" and table["changed"].iloc[1] == f"distill_from={teacher}"
    )
    assert {"num_epochs=1", "distill_from=None"} < set(table["changed"].iloc[2].split(", "))
    assert table["note"].tolist() == ["", "distilled: scores are too good", ""]
    accuracies, minutes = vqa.plot_experiments(table)
    assert [bar.get_width() for bar in accuracies.patches] == [0.25] * 3
    assert len({bar.get_facecolor() for bar in accuracies.patches}) == 2
    assert minutes.patches[0].get_width() == pytest.approx(12.5 / 60)


def test_a_run_that_a_new_session_continues_brings_the_runs_before_it_along(
    mini_run, evaluation, monkeypatch
):
    old, run = mini_run(run_name="old"), mini_run(run_name="new")
    finish(old, evaluation, monkeypatch, 1)
    finish(run, evaluation, monkeypatch, 2)
    (run.directory.parent / "experiments.csv").unlink()  # the new session has the run's folder only
    finish(run, evaluation, monkeypatch, 3)
    table = vqa.experiment_table(run.directory.parent)
    assert table.index.tolist() == ["old", "new"] and table["finished"].str[9].tolist() == [
        "1",
        "3",
    ]


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
    }
    vqa.write_table(
        pd.DataFrame([old | {"nll": 1.0, "ece": 0.0}]), run.directory.parent / "experiments.csv"
    )
    assert vqa.experiment_table(run.directory.parent)["accuracy"].tolist() == [0.5]
    finish(run, evaluation, monkeypatch, 2)
    table = vqa.experiment_table(run.directory.parent)
    assert table["accuracy"].tolist() == [0.5, 0.25] and table["changed"].tolist() == ["", ""]
    assert np.isnan(table.loc["old", ["brier", "seconds"]].astype(float)).all()


def test_the_active_list_ranks_both_kinds_of_rows_by_the_chance_that_their_answer_is_wrong():
    text = {"question": "?", "a": "1", "b": "2", "c": "3", "d": "4"}
    suspects = pd.DataFrame(
        [{"id": "train", **text, "answer": "b", "likely": "c", "margin": 0.4, "chance_wrong": 0.7}]
    )
    rows = [("sure", 1.0, 0.02), ("torn", 0.67, 0.8), ("close", 1.0, 0.6)]
    uncertain = pd.DataFrame(rows, columns=["id", "folds_for_it", "chance_wrong"])
    uncertain = uncertain.assign(**text, predicted="a", second="d")
    table = vqa.active_list(suspects, uncertain)
    assert table["id"].tolist() == ["torn", "train", "close"] and table["other"].tolist() == [
        "d",
        "c",
        "d",
    ]
    assert table["reason"].tolist() == ["folds disagree", "label probably wrong", "small margin"]
    assert table["rows"].tolist() == ["test", "train", "test"] and table["answer"].tolist() == [
        "a",
        "b",
        "a",
    ]


def test_the_type_whose_confidence_misleads_most_comes_first():
    """A calibrated type has no excess over the ECE that its few rows have by chance; an overconfident one has."""
    random = np.random.default_rng(0)
    probabilities = vqa.softmax(random.normal(scale=2, size=(600, 4)))
    honest = (random.random((600, 1)) > probabilities.cumsum(axis=1)[:, :-1]).sum(axis=1)
    labels, types = honest.copy(), np.repeat(["ocr", "color"], 300)
    labels[300:] = random.integers(0, 4, 300)
    table = vqa.reliability_by_type(types, probabilities, labels)
    assert table.index.tolist() == ["color", "ocr"] and table["rows"].tolist() == [300, 300]
    assert table.loc["color", "ece_excess"] > 0.2 and abs(table.loc["ocr", "ece_excess"]) < 0.03
    assert table.loc["color", "confidence"] > table.loc["color", "accuracy"] + 0.2
    assert table.loc["ocr", "nll"] == vqa.negative_log_likelihood(probabilities[:300], labels[:300])
