"""Submission: exactly the sample's rows, in its order, with letters, as read back from the file."""

from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest

import vqa_helpers as vqa

SAMPLE = pd.DataFrame({"id": ["test_0002.jpg", "NA", "007", "test_0001.jpg"], "answer": [None] * 4})
LETTERS = {"test_0001.jpg": "d", "007": "a", "NA": "b", "test_0002.jpg": "a"}
GOOD = "id,answer\ntest_0002.jpg,a\nNA,b\n007,a\ntest_0001.jpg,d\n"


@pytest.mark.parametrize(
    "predictions",
    [LETTERS, MappingProxyType(LETTERS), pd.Series(LETTERS)],
    ids=["dict", "mapping", "series"],
)
def test_a_submission_has_the_ids_order_and_columns_of_the_sample(predictions, tmp_path):
    checked = vqa.make_submission(SAMPLE, predictions, tmp_path / "submission.csv")
    assert (tmp_path / "submission.csv").read_bytes() == GOOD.encode()
    assert checked == {"rows": 4, "letters": {"a": 2, "b": 1, "c": 0, "d": 1}}
    assert [path.name for path in tmp_path.iterdir()] == [
        "submission.csv"
    ]  # no temporary file is left


def test_other_column_names_and_numeric_ids_are_kept(tmp_path):
    sample = pd.DataFrame({"ID": [11, 10], "label": [np.nan, np.nan]})
    vqa.make_submission(sample, {10: "a", 11: "c"}, tmp_path / "submission.csv")
    assert (tmp_path / "submission.csv").read_text() == "ID,label\n11,c\n10,a\n"


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (
            {k: v for k, v in LETTERS.items() if k != "007"},
            r"3 answers for 4 ids, without an answer \['007'\]",
        ),
        (LETTERS | {"test_0009.jpg": "a"}, r"not in the sample \['test_0009.jpg'\]"),
        (LETTERS | {"007": None}, r"row 3 \(id '007', answer None\): write one lower-case letter"),
        (LETTERS | {"007": 2}, r"row 3 \(id '007', answer 2\): write one lower-case letter"),
        (
            pd.Series(["a"] * 5, index=[*LETTERS, "NA"]),
            "5 answers for 4 ids, .* answer each id of the sample once",
        ),
        (
            pd.Series("a", index=["NA", "NA", "007", "test_0001.jpg"]),
            r"without an answer \['test_0002.jpg'\]",
        ),
    ],
    ids=["missing", "unknown", "blank", "number", "twice", "twice for another"],
)
def test_a_bad_prediction_is_refused_and_the_earlier_file_survives(predictions, message, tmp_path):
    path = tmp_path / "submission.csv"
    path.write_text(GOOD)
    with pytest.raises(vqa.SubmissionError, match=message):
        vqa.make_submission(SAMPLE, predictions, path)
    assert path.read_text() == GOOD


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a readable CSV"),
        (
            GOOD.replace("id,answer", "id,label"),
            r"columns are \['id', 'label'\]; name them \['id', 'answer'\]",
        ),
        (GOOD.replace("id,answer", "answer,id"), r"columns are \['answer', 'id'\]"),
        (GOOD.replace("id,answer", "id,answer,id"), r"columns are \['id', 'answer', 'id'\]"),
        (GOOD.replace("007,a", "007,a,"), "not a readable CSV .*line 4"),
        (GOOD.replace("007,a\n", ""), r"3 rows but the sample has 4; add ids \['007'\]"),
        (
            GOOD + "test_0009.jpg,a\n",
            r"row 5 \(id 'test_0009.jpg', answer 'a'\): this id is not in the sample",
        ),
        (
            GOOD.replace("007,a", "7,a"),
            r"row 3 \(id '7', answer 'a'\): this id is not in the sample",
        ),
        (GOOD + "NA,b\n", r"row 5 \(id 'NA', answer 'b'\): this id occurs twice"),
        (GOOD.replace("007,a", "NA,a"), r"row 3 \(id 'NA', answer 'a'\): this id occurs twice"),
        (
            "id,answer\nNA,b\ntest_0002.jpg,a\n007,a\ntest_0001.jpg,d\n",
            r"row 1 \(id 'NA', answer 'b'\): the sample has another id in this row; keep the sample's order",
        ),
        (GOOD.replace("NA,b\n", "NA,b\n\n"), r"row 3 \(id '', .*\): this id is not in the sample"),
        (
            GOOD.replace("007,a", "007,"),
            r"row 3 \(id '007', answer ''\): write one lower-case letter",
        ),
        (
            GOOD.replace("007,a", "007"),
            r"row 3 \(id '007', answer (''|nan)\): write one lower-case letter",
        ),
        (
            GOOD.replace("007,a", "007,e"),
            r"row 3 \(id '007', answer 'e'\): write one lower-case letter",
        ),
        (GOOD.replace("007,a", "007,A"), "answer 'A'"),
        (GOOD.replace("007,a", "007, a"), "answer ' a'"),
        (GOOD.replace("007,a", "007,nan"), "answer 'nan'"),
    ],
    ids=[
        "empty file",
        "column name",
        "column order",
        "repeated column",
        "trailing comma",
        "missing row",
        "extra row",
        "id lost its zeros",
        "repeated row",
        "id replaced",
        "order",
        "blank line",
        "blank answer",
        "short line",
        "wrong letter",
        "upper case",
        "space",
        "nan",
    ],
)
def test_a_spoiled_file_is_refused_with_its_name_row_and_id(text, message, tmp_path):
    path = tmp_path / "submission.csv"
    path.write_text(text)
    with pytest.raises(vqa.SubmissionError, match=message) as error:
        vqa.validate_submission(path, SAMPLE)
    assert str(path) in str(error.value)


def test_windows_line_ends_are_accepted(tmp_path):
    path = tmp_path / "submission.csv"
    path.write_bytes(GOOD.replace("\n", "\r\n").encode())
    assert vqa.validate_submission(path, SAMPLE)["rows"] == 4


def test_a_sample_that_repeats_an_id_is_refused(tmp_path):
    sample = pd.DataFrame({"id": ["x", "x"], "answer": [None, None]})
    with pytest.raises(vqa.SubmissionError, match="1 answers for 2 ids"):
        vqa.make_submission(sample, {"x": "a"}, tmp_path / "submission.csv")
