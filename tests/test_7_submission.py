"""Part 7, Submission: exactly the sample's rows, in its order, with letters, as read back."""

from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
from planted import planted_two_views

import vqa_helpers as vqa

IDS = ["test_0002.jpg", "NA", "007", "test_0001.jpg"]
SAMPLE = pd.DataFrame({"id": IDS, "answer": [None] * 4})
LETTERS = {"test_0001.jpg": "d", "007": "a", "NA": "b", "test_0002.jpg": "a"}
GOOD = "id,answer\ntest_0002.jpg,a\nNA,b\n007,a\ntest_0001.jpg,d\n"
KINDS_OF_PREDICTIONS = {
    "dict": LETTERS,
    "mapping": MappingProxyType(LETTERS),
    "series": pd.Series(LETTERS),
}


@pytest.mark.parametrize("predictions", KINDS_OF_PREDICTIONS.values(), ids=KINDS_OF_PREDICTIONS)
def test_a_submission_has_the_ids_order_and_columns_of_the_sample(predictions, tmp_path):
    checked = vqa.make_submission(SAMPLE, predictions, tmp_path / "submission.csv")
    assert (tmp_path / "submission.csv").read_bytes() == GOOD.encode()
    assert checked == {"rows": 4, "letters": {"a": 2, "b": 1, "c": 0, "d": 1}}
    # No temporary file is left.
    assert [path.name for path in tmp_path.iterdir()] == ["submission.csv"]


def test_other_column_names_and_numeric_ids_are_kept(tmp_path):
    sample = pd.DataFrame({"ID": [11, 10], "label": [np.nan, np.nan]})
    vqa.make_submission(sample, {10: "a", 11: "c"}, tmp_path / "submission.csv")
    assert (tmp_path / "submission.csv").read_text() == "ID,label\n11,c\n10,a\n"


BAD_PREDICTIONS = {
    "missing": (
        {"test_0001.jpg": "d", "NA": "b", "test_0002.jpg": "a"},
        r"3 answers for 4 ids, without an answer \['007'\]",
    ),
    "unknown": (
        LETTERS | {"test_0009.jpg": "a"},
        r"not in the sample \['test_0009.jpg'\]",
    ),
    "blank": (
        LETTERS | {"007": None},
        r"row 3 \(id '007', answer None\): write one lower-case letter",
    ),
    "number": (
        LETTERS | {"007": 2},
        r"row 3 \(id '007', answer 2\): write one lower-case letter",
    ),
    "twice": (
        pd.Series("a", index=[*LETTERS, "NA"]),
        "5 answers for 4 ids, .* answer each id of the sample once",
    ),
    "twice for another": (
        pd.Series("a", index=["NA", "NA", "007", "test_0001.jpg"]),
        r"without an answer \['test_0002.jpg'\]",
    ),
}


@pytest.mark.parametrize(("predictions", "message"), BAD_PREDICTIONS.values(), ids=BAD_PREDICTIONS)
def test_a_bad_prediction_is_refused_and_the_earlier_file_survives(predictions, message, tmp_path):
    path = tmp_path / "submission.csv"
    path.write_text(GOOD)
    with pytest.raises(vqa.SubmissionError, match=message):
        vqa.make_submission(SAMPLE, predictions, path)
    assert path.read_text() == GOOD


# The file's text, and what the message says.
SPOILED_FILES = {
    "empty file": ("", "not a readable CSV"),
    "column name": (
        GOOD.replace("id,answer", "id,label"),
        r"columns are \['id', 'label'\]; name them \['id', 'answer'\]",
    ),
    "column order": (
        GOOD.replace("id,answer", "answer,id"),
        r"columns are \['answer', 'id'\]",
    ),
    "repeated column": (
        GOOD.replace("id,answer", "id,answer,id"),
        r"columns are \['id', 'answer', 'id'\]",
    ),
    "trailing comma": (
        GOOD.replace("007,a", "007,a,"),
        "not a readable CSV .*line 4",
    ),
    "missing row": (
        GOOD.replace("007,a\n", ""),
        r"3 rows but the sample has 4; add ids \['007'\]",
    ),
    "extra row": (
        GOOD + "test_0009.jpg,a\n",
        r"row 5 \(id 'test_0009.jpg', answer 'a'\): this id is not in the sample",
    ),
    "id lost its zeros": (
        GOOD.replace("007,a", "7,a"),
        r"row 3 \(id '7', answer 'a'\): this id is not in the sample",
    ),
    "repeated row": (
        GOOD + "NA,b\n",
        r"row 5 \(id 'NA', answer 'b'\): this id occurs twice",
    ),
    "id replaced": (
        GOOD.replace("007,a", "NA,a"),
        r"row 3 \(id 'NA', answer 'a'\): this id occurs twice",
    ),
    "order": (
        "id,answer\nNA,b\ntest_0002.jpg,a\n007,a\ntest_0001.jpg,d\n",
        r"row 1 \(id 'NA', answer 'b'\): the sample has another id in this row; "
        "keep the sample's order",
    ),
    "blank line": (
        GOOD.replace("NA,b\n", "NA,b\n\n"),
        r"row 3 \(id '', .*\): this id is not in the sample",
    ),
    "blank answer": (
        GOOD.replace("007,a", "007,"),
        r"row 3 \(id '007', answer ''\): write one lower-case letter",
    ),
    "short line": (
        GOOD.replace("007,a", "007"),
        r"row 3 \(id '007', answer (''|nan)\): write one lower-case letter",
    ),
    "wrong letter": (
        GOOD.replace("007,a", "007,e"),
        r"row 3 \(id '007', answer 'e'\): write one lower-case letter",
    ),
    "upper case": (GOOD.replace("007,a", "007,A"), "answer 'A'"),
    "space": (GOOD.replace("007,a", "007, a"), "answer ' a'"),
    "nan": (GOOD.replace("007,a", "007,nan"), "answer 'nan'"),
}


@pytest.mark.parametrize(("text", "message"), SPOILED_FILES.values(), ids=SPOILED_FILES)
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


# --- Of a run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vote", "weighted"])
def test_other_ensemble_methods_write_valid_submissions(finished, replace, method):
    run = replace(finished, config=replace(finished.config, ensemble_method=method))
    frames = vqa.write_submissions(run, vqa.evaluate_run(run))
    assert len(frames["ensemble"]) == 12


def test_an_id_that_pandas_takes_for_a_missing_value_survives(mini_run, replace):
    run = mini_run()
    planted_two_views(run, run.train)
    ids = ["NA", "null", *run.test["id"][2:]]
    run = replace(run, test=run.test.assign(id=ids), sample=run.sample.assign(id=ids))
    for frame in vqa.write_submissions(run, vqa.evaluate_run(run)).values():
        assert frame["id"].tolist() == ids


def test_on_kaggle_the_ensemble_is_copied_to_the_working_folder(finished, monkeypatch, tmp_path):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")  # Kaggle's image sets it too
    monkeypatch.chdir(tmp_path)
    vqa.write_submissions(finished, vqa.evaluate_run(finished))
    ensemble = (finished.directory / "submission_ensemble.csv").read_bytes()
    assert (tmp_path / "submission.csv").read_bytes() == ensemble
