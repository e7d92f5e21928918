"""Part 6, Errors: suspected labels, weak groups, and test rows that are worth a look."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from planted import draw_labels

import vqa_helpers as vqa

# --- Suspected labels -----------------------------------------------------------------------------


def probabilities_for(labels, random, sharpness=3.0):
    """Probabilities of a model that prefers the true choice."""
    scores = random.normal(size=(len(labels), 4))
    scores[np.arange(len(labels)), labels] += sharpness
    return vqa.softmax(scores)


def test_planted_label_errors_are_among_the_suspects_and_the_likely_label_is_the_true_one():
    random = np.random.default_rng(0)
    truth = random.integers(4, size=1000)
    labels = truth.copy()
    wrong = random.choice(1000, 80, replace=False)
    labels[wrong] = (truth[wrong] + random.integers(1, 4, size=80)) % 4
    suspects = vqa.label_suspects(probabilities_for(truth, random), labels)
    is_wrong = np.isin(suspects["row"], wrong)
    assert is_wrong.mean() >= 0.6
    assert is_wrong.sum() >= 0.5 * 80
    is_likely_true = suspects["likely"] == truth[suspects["row"]]
    assert is_likely_true[is_wrong].mean() > 0.85
    assert suspects["margin"].is_monotonic_decreasing


def test_a_row_is_no_suspect_where_the_other_choice_is_less_sure_than_usual():
    probabilities = np.array(
        [
            [0.9, 0.1, 0, 0],
            [0.1, 0.9, 0, 0],
            [0.4, 0.6, 0, 0],
            [0.05, 0.95, 0, 0],
        ]
    )
    suspects = vqa.label_suspects(probabilities, [0, 1, 0, 0])
    # 0.6 is less than what rows labelled b usually get, 0.95 is not.
    assert suspects["row"].tolist() == [3]


def test_a_row_is_no_suspect_where_no_choice_is_as_probable_as_usual():
    probabilities = np.array(
        [
            [0.9, 0.05, 0.05, 0],
            [0.05, 0.9, 0.05, 0],
            [0.05, 0.05, 0.9, 0],
            [0.35, 0.45, 0.2, 0],
        ]
    )
    assert vqa.label_suspects(probabilities, [0, 1, 2, 2]).empty


def test_a_choice_that_is_never_the_label_is_never_likely():
    probabilities = np.array([[0.2, 0.1, 0.7, 0], [0.3, 0.6, 0.1, 0]])
    assert vqa.label_suspects(probabilities, [0, 1]).empty


# --- Groups ---------------------------------------------------------------------------------------


@pytest.fixture
def rows():
    """Eight rows: two share an image, and the answer is the longest choice of the first four."""
    return pd.DataFrame(
        {
            "id": [f"r{number}" for number in range(8)],
            "type": ["ocr"] * 4 + ["color"] * 4,
            "question": ["가" * length for length in range(3, 11)],
            "a": ["12345"] * 4 + ["1"] * 4,
            "b": "1",
            "c": "12",
            "d": "123",
            "label": 0,
            "answer": "a",
            "width": 10,
            "height": 10,
            "pixel_hash": ["x", "x", *"abcdef"],
            "image_group": [0, 0, 1, 1, 2, 3, 4, 5],
            "tokens": range(8),
        }
    )


def test_accuracy_by_group_counts_every_row_once_in_each_grouping(rows):
    correct = np.array([True] * 4 + [False] * 4)
    table = vqa.accuracy_by_group(rows, correct)
    assert (table["rows"].groupby("by").sum() == 8).all()
    assert table.loc[("question type", "ocr"), "accuracy"] == 1
    assert table.loc[("answer's length", "longest"), "accuracy"] == 1
    assert table.loc[("answer's length", "shortest"), "accuracy"] == 0
    assert table.loc[("image", "in several questions"), "rows"] == 2
    assert table.loc[("image", "has a near copy"), "rows"] == 2
    assert table.loc[("prompt, tokens", "0 to 1"), "rows"] == 2
    assert table.loc[("question, characters", "3 to 4"), "rows"] == 2
    assert table.loc[("image, pixels", "100"), "rows"] == 8
    not_alone_the_longest = vqa.accuracy_by_group(rows.assign(c="12345"), correct)
    assert not_alone_the_longest.loc[("answer's length", "longest"), "rows"] == 4
    without_tokens = vqa.accuracy_by_group(rows.assign(tokens=None), correct)
    assert "prompt, tokens" not in without_tokens.index


def test_a_choice_that_is_not_there_is_not_the_shortest(rows):
    table = vqa.accuracy_by_group(rows.assign(a="1", b="12", c="123", d=""), np.ones(8, bool))
    assert table.loc["answer's length"].index.tolist() == ["shortest"]


def test_choices_of_one_length_are_a_group_of_their_own(rows):
    table = vqa.accuracy_by_group(rows.assign(a="1", c="1", d="1"), np.ones(8, bool))
    assert table.loc["answer's length"].index.tolist() == ["all equal"]


def test_the_type_whose_confidence_misleads_most_comes_first():
    """Only an overconfident type has more ECE than its few rows have by chance."""
    random = np.random.default_rng(0)
    probabilities = vqa.softmax(random.normal(scale=2, size=(600, 4)))
    labels = draw_labels(probabilities, random)
    types = np.repeat(["ocr", "color"], 300)
    labels[300:] = random.integers(0, 4, 300)
    table = vqa.reliability_by_type(types, probabilities, labels)
    assert table.index.tolist() == ["color", "ocr"]
    assert table["rows"].tolist() == [300, 300]
    assert table.loc["color", "ece_excess"] > 0.2
    assert abs(table.loc["ocr", "ece_excess"]) < 0.03
    assert table.loc["color", "confidence"] > table.loc["color", "accuracy"] + 0.2
    nll = vqa.negative_log_likelihood(probabilities[:300], labels[:300])
    assert table.loc["ocr", "nll"] == nll


# --- Rows to look at ------------------------------------------------------------------------------


def planted_test_rows(ids, method, folds, monkeypatch):
    """A run of these test rows, whose folds predict these probabilities."""
    text = {"type": "ocr", "question": "?", "a": "1", "b": "2", "c": "3", "d": "4"}
    monkeypatch.setattr(vqa, "predict_test", lambda run, evaluation: folds)
    config = SimpleNamespace(ensemble_method=method)
    return SimpleNamespace(test=pd.DataFrame({"id": ids, **text}), config=config)


def test_rows_on_which_folds_disagree_come_first(monkeypatch):
    sure = [0.97, 0.01, 0.01, 0.01]
    torn = [0.01, 0.97, 0.01, 0.01]
    close = [0.4, 0.39, 0.11, 0.1]
    folds = {
        0: np.array([sure, sure, close]),
        1: np.array([sure, torn, close]),
        2: np.array([sure, sure, close]),
    }
    run = planted_test_rows(["sure", "torn", "close"], "mean", folds, monkeypatch)
    table = vqa.uncertain_rows(run, None)
    assert table["id"].tolist() == ["torn", "close", "sure"]
    assert table["predicted"].tolist() == ["a", "a", "a"]
    assert table["folds_for_it"].tolist() == [0.667, 1, 1]
    assert table["margin"].iloc[1] == pytest.approx(0.01)


def test_the_rows_to_look_at_have_the_answers_of_the_submission_also_where_folds_vote(monkeypatch):
    """Two folds are for a by a hair, one is sure of b: the mean says b, the vote a."""
    folds = {
        0: np.array([[0.5, 0.4, 0.1, 0.0]]),
        1: np.array([[0.5, 0.4, 0.1, 0.0]]),
        2: np.array([[0.0, 1.0, 0.0, 0.0]]),
    }
    run = planted_test_rows(["torn"], "vote", folds, monkeypatch)
    row = vqa.uncertain_rows(run, None).iloc[0]
    assert row["predicted"] == "a"
    assert row["second"] == "b"
    assert row["folds_for_it"] == 0.667
    assert row["margin"] == pytest.approx(1 / 3 - 0.6, abs=1e-4)
    assert row["chance_wrong"] == pytest.approx(0.6667)


def test_the_active_list_ranks_both_kinds_of_rows_by_the_chance_that_their_answer_is_wrong():
    text = {"question": "?", "a": "1", "b": "2", "c": "3", "d": "4"}
    suspect = {
        "id": "train",
        **text,
        "answer": "b",
        "likely": "c",
        "margin": 0.4,
        "chance_wrong": 0.7,
    }
    rows = [("sure", 1.0, 0.02), ("torn", 0.67, 0.8), ("close", 1.0, 0.6)]
    uncertain = pd.DataFrame(rows, columns=["id", "folds_for_it", "chance_wrong"])
    uncertain = uncertain.assign(**text, predicted="a", second="d")
    table = vqa.active_list(pd.DataFrame([suspect]), uncertain)
    assert table["id"].tolist() == ["torn", "train", "close"]
    assert table["other"].tolist() == ["d", "c", "d"]
    assert table["reason"].tolist() == ["folds disagree", "label may be wrong", "small margin"]
    assert table["rows"].tolist() == ["test", "train", "test"]
    assert table["answer"].tolist() == ["a", "b", "a"]


def test_error_tables_are_written_as_csv_and_name_the_rows(finished):
    competition = vqa.load_competition(finished.config.data_dir)
    groups = vqa.leakage_report(competition.train, competition.test).image_group
    tables = vqa.write_error_tables(finished, vqa.evaluate_run(finished), groups)
    assert len(tables["uncertain_rows"]) == len(finished.test)
    assert set(tables["label_suspects"]["id"]) <= set(finished.train["id"])
    assert (tables["label_suspects"]["likely"] != tables["label_suspects"]["answer"]).all()
    assert {"confusion", "mistakes"} < set(tables)
    by_group = tables["accuracy_by_group"]
    assert (by_group.groupby("by")["rows"].sum() == len(finished.train)).all()
    assert "prompt, tokens" in by_group.index
    for name, table in tables.items():
        written = pd.read_csv(finished.directory / "tables" / f"{name}.csv")
        assert len(written) == len(table)
