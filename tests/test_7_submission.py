"""Part 7, Submission: exactly the sample's rows, in its order, with letters, as read back."""

import json
import shutil
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
    assert checked == {
        "rows": 4,
        "letters": {"a": 2, "b": 1, "c": 0, "d": 1},
        "notation": "letters (a, b, c, d)",
    }
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


# --- The competition's notation -------------------------------------------------------------------

CAPITALS = vqa.AnswerNotation("letters", ("A", "B", "C", "D"))
NUMBERS = vqa.AnswerNotation("numbers from 1", ("1", "2", "3", "4"))
FROM_0 = vqa.AnswerNotation("numbers from 0", ("0", "1", "2", "3"))
WITH_SUFFIX = vqa.AnswerNotation("numbers from 1", ("1번", "2번", "3번", "4번"))
KOREAN = vqa.AnswerNotation("Korean letters", ("가", "나", "다", "라"))
TEXTS = vqa.AnswerNotation("texts of the choices", ())
ODD_TEXTS = [" 두 칸 ", "1,000", 'say "x"', "two\rlines"]
TEST = pd.DataFrame(
    {"id": IDS, "a": ODD_TEXTS[0], "b": ODD_TEXTS[1], "c": "", "d": ODD_TEXTS[2:] * 2}
)
WRITTEN = {
    "capitals": (CAPITALS, ["A", "B", "A", "D"]),
    "numbers": (NUMBERS, ["1", "2", "1", "4"]),
    "numbers from 0": (FROM_0, ["0", "1", "0", "3"]),
    "numbers with 번": (WITH_SUFFIX, ["1번", "2번", "1번", "4번"]),
    "Korean letters": (KOREAN, ["가", "나", "가", "라"]),
    "texts": (TEXTS, [" 두 칸 ", "1,000", " 두 칸 ", "two\rlines"]),
}


@pytest.mark.parametrize(("notation", "answers"), WRITTEN.values(), ids=WRITTEN)
def test_a_submission_is_written_and_checked_in_the_notation(notation, answers, tmp_path):
    path = tmp_path / "submission.csv"
    sample = SAMPLE.set_axis(["ID", "label"], axis=1)
    checked = vqa.make_submission(sample, LETTERS, path, notation, TEST)
    written = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert written.to_dict("list") == {"ID": IDS, "label": answers}
    assert checked == {
        "rows": 4,
        "letters": {"a": 2, "b": 1, "c": 0, "d": 1},
        "notation": str(notation),
    }
    for other, _ in WRITTEN.values():
        if other != notation:
            with pytest.raises(vqa.SubmissionError, match=r"row \d \(id .*\): write "):
                vqa.validate_submission(path, sample, other, TEST)


@pytest.mark.parametrize("blank", ["", " ", "\u200b\u3164"], ids=ascii)
def test_the_text_of_a_blank_choice_is_refused_and_the_earlier_file_survives(tmp_path, blank):
    test = TEST.assign(c=blank)
    path = tmp_path / "submission.csv"
    path.write_text(GOOD)
    message = r"row 2 \(id 'NA', answer 'c'\): this choice is blank; answer one that is filled"
    with pytest.raises(vqa.SubmissionError, match=message):
        vqa.make_submission(SAMPLE, LETTERS | {"NA": "c"}, path, TEXTS, test)
    assert path.read_text() == GOOD
    assert TEXTS.read([blank], test.head(1)).tolist() == [-1]


def test_texts_cannot_be_written_without_the_test_rows(tmp_path):
    path = tmp_path / "submission.csv"
    with pytest.raises(vqa.SubmissionError, match="texts of the choices: give test, its test rows"):
        vqa.make_submission(SAMPLE, LETTERS, path, TEXTS)
    with pytest.raises(vqa.SubmissionError, match=r"the test rows lack \['test_0002.jpg'\]"):
        vqa.make_submission(SAMPLE, LETTERS, path, TEXTS, TEST[1:])
    assert not path.exists()


# The sample's answers, and the notation that follows where none is given.
FILLED_SAMPLES = {
    "capitals": (["A"] * 4, CAPITALS),
    "numbers": ([4, 1, 1, 1], NUMBERS),
    "numbers that pandas read with a gap": ([4.0, np.nan, 1.0, 1.0], NUMBERS),
    "texts": ([" 두 칸 ", "1,000", 'say "x"', "1,000"], TEXTS),
}


@pytest.mark.parametrize(("answers", "notation"), FILLED_SAMPLES.values(), ids=FILLED_SAMPLES)
def test_without_a_notation_that_of_a_filled_sample_is_written(answers, notation, tmp_path):
    sample = SAMPLE.assign(answer=answers)
    checked = vqa.make_submission(sample, LETTERS, tmp_path / "submission.csv", test=TEST)
    assert checked["notation"] == str(notation)


def test_without_a_notation_a_message_says_that_one_may_be_given(tmp_path):
    path = tmp_path / "submission.csv"
    vqa.make_submission(SAMPLE, LETTERS, path, CAPITALS)
    message = r"write one lower-case letter of a, b, c, d, or give the right notation"
    with pytest.raises(vqa.SubmissionError, match=message):
        vqa.validate_submission(path, SAMPLE)
    assert vqa.validate_submission(path, SAMPLE, CAPITALS)["letters"]["a"] == 2


def test_a_sample_in_doubt_is_a_warning(tmp_path, caplog):
    sample = SAMPLE.assign(answer=1)
    vqa.make_submission(sample, LETTERS, tmp_path / "submission.csv")
    assert (tmp_path / "submission.csv").read_text() == GOOD
    [message] = caplog.messages
    assert "Answers are written as letters (a, b, c, d), because no notation is given" in message
    assert "may be numbers from 1 or numbers from 0" in message


@pytest.fixture
def foreign_data(mini_data, tmp_path):
    """The mini competition with answers 1번 to 4번, and with ID, label as the sample's columns."""
    data = shutil.copytree(mini_data, tmp_path / "foreign")
    train = pd.read_csv(data / "train.csv", dtype=str, keep_default_na=False)
    positions = train["answer"].map(vqa.CHOICES.index) + 1
    train.assign(answer=positions.map("{}번".format)).to_csv(data / "train.csv", index=False)
    sample = pd.read_csv(data / "sample_submission.csv", dtype=str, keep_default_na=False)
    sample.columns = ["ID", "label"]
    sample.to_csv(data / "sample_submission.csv", index=False)
    return data


def test_a_run_keeps_the_notation_and_writes_submissions_in_it(mini_run, foreign_data, tmp_path):
    run = mini_run(data_dir=str(foreign_data), run_name="foreign")
    planted_two_views(run, run.train)
    assert run.train["answer"].isin([*vqa.CHOICES]).all()
    assert vqa.Run.open(run.directory).notation == WITH_SUFFIX
    evaluation = vqa.evaluate_run(run)
    frames = vqa.write_submissions(run, evaluation)
    labels = vqa.combine_models(run, np.stack(list(vqa.predict_test(run, evaluation).values())))
    frame = frames["ensemble"]
    assert frame.columns.tolist() == ["ID", "label"]
    assert frame["label"].tolist() == [f"{label + 1}번" for label in labels]
    assert frame.attrs["notation"] == "numbers from 1 (1번, 2번, 3번, 4번)"
    assert frame.attrs["why"] == "as in train.csv; the sample's answers are blank"
    assert sum(frame.attrs["letters"].values()) == frame.attrs["rows"] == 12
    paragraph = (
        f"Submissions write answers as {WITH_SUFFIX}: {frame.attrs['why']}. "
        "Their columns are ID, label, as in the sample."
    )
    assert paragraph in vqa._report_introduction(run, evaluation)
    again = mini_run(data_dir=str(foreign_data), run_name="foreign")  # continued, not refused
    assert again.fingerprint == run.fingerprint


def test_the_usual_notation_is_no_paragraph_of_the_report(finished):
    assert vqa._report_notation(finished) == []


def test_a_run_of_an_earlier_version_writes_what_its_sample_says(mini_run, foreign_data):
    run = mini_run(data_dir=str(foreign_data))
    planted_two_views(run, run.train)
    path = run.directory / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["notation"]
    del content["tables"]  # an earlier version kept no hashes of them
    path.write_text(json.dumps(content), encoding="utf-8")
    vqa.write_table(run.sample.assign(label="D"), run.directory / "sample_rows.csv")
    earlier = vqa.Run.open(run.directory)
    assert earlier.notation is None
    frame = vqa.write_submissions(earlier, vqa.evaluate_run(earlier))["single"]
    assert frame["label"].isin([*"ABCD"]).all()
