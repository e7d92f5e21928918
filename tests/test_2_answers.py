"""Part 2, Answers: what the answers of a whole file mean, and how a competition writes them.

Most cases are data in cases/answer_kinds.toml and cases/notations.toml; what they mean is said
in small_competition.py.
"""

import logging
from collections import Counter

import pandas as pd
import pytest
from small_competition import answered, read_cases, table, write

import vqa_helpers as vqa


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("changes", "outcome"), read_cases("answer_kinds"))
def test_one_kind_of_answer_is_found_for_the_whole_file_or_it_is_refused(
    tmp_path, changes, outcome
):
    outcome.check(write(tmp_path / "data", changes))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("changes", "outcome"), read_cases("notations"))
def test_the_submission_writes_answers_as_train_does_or_as_a_clear_sample_does(
    tmp_path, changes, outcome
):
    outcome.check(write(tmp_path / "data", changes))


def test_kinds_and_decisions_are_logged_with_their_counts(tmp_path, caplog):
    changes = answered("w,x,y,z", "A", "B", "b") | table("sample_submission", "t1,a", "t2,a")
    with caplog.at_level(logging.INFO, logger="vqa"):
        vqa.load_competition(write(tmp_path / "data", changes))
    letters = "letters, written A, B, C, D, 1 in another way"
    assert f"train.csv: 3 answers are read as {letters}" in caplog.messages
    decision = "Submissions write answers as letters (a, b, c, d): as in the sample, such as 'a'"
    assert f"{decision}; train.csv has letters (A, B, C, D)" in caplog.messages


def test_a_doubt_about_the_sample_is_a_warning(tmp_path, caplog):
    changes = table("sample_submission", "t1,0", "t2,0")
    vqa.load_competition(write(tmp_path / "data", changes))
    [record] = [record for record in caplog.records if "Submissions write" in record.message]
    assert record.levelname == "WARNING"
    assert "may be mere placeholders" in record.message


def test_an_answer_in_rare_characters_is_written_in_plain_ones():
    bold = "\U0001d401"  # a mathematical B
    assert vqa._answer_mark(bold) == "b"
    assert vqa._written_marks(bold, "letters", 1) == ("a", "b", "c", "d")


NEEDS = {
    "small": (vqa.AnswerNotation(), "write one lower-case letter of a, b, c, d"),
    "capital": (
        vqa.AnswerNotation("letters", ("A", "B", "C", "D")),
        "write one upper-case letter of A, B, C, D",
    ),
    "numbers": (
        vqa.AnswerNotation("numbers from 0", ("0", "1", "2", "3")),
        "write one number of 0, 1, 2, 3",
    ),
    "Korean": (
        vqa.AnswerNotation("Korean letters", ("가", "나", "다", "라")),
        "write one Korean letter of 가, 나, 다, 라",
    ),
    "texts": (
        vqa.AnswerNotation("texts of the choices", ()),
        "write the text of one of the row's choices, as test.csv has it",
    ),
}


@pytest.mark.parametrize(("notation", "words"), NEEDS.values(), ids=NEEDS)
def test_a_notation_says_what_to_write_and_reads_what_it_writes(notation, words):
    choices = pd.DataFrame([["red", " 1 ", "1", "red"]] * 4, columns=[*"abcd"])
    assert notation.needs == words
    written = notation.write([0, 1, 2, 3], choices)
    # Equal texts cannot be told apart: both mean the first.
    last = 0 if notation.kind == "texts of the choices" else 3
    assert notation.read(written, choices).tolist() == [0, 1, 2, last]
    assert notation.read(["", "E", None, "5"], choices).tolist() == [-1] * 4


def test_the_votes_of_all_columns_are_of_one_kind():
    """A column in which nobody voted for the first choice does not count from 1 by itself."""
    rows = pd.DataFrame(
        {
            "line": [2, 3, 2, 3],
            **dict.fromkeys("abcd", "x"),
            "answer": ["0", "3", "1", "2"],
            "column": ["answer1", "answer1", "answer2", "answer2"],
        }
    )
    labels, notation = vqa._read_answers(rows, "dev.csv", Counter())
    assert labels.tolist() == [0, 3, 1, 2]
    assert notation.kind == "numbers from 0"
    rows.loc[2, "answer"] = "4"
    message = r"dev.csv, line 2, column 'answer1', value '0': does not mean exactly one"
    with pytest.raises(vqa.DataError, match=message):
        vqa._read_answers(rows, "dev.csv", Counter())
