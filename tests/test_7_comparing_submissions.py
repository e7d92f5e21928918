"""Part 7, Comparing submissions: rows that differ, noise, question types, errors that overlap."""

import json

import numpy as np
import pandas as pd
import pytest
from planted import evaluate_once, runs_side_by_side

import vqa_helpers as vqa

IDS = ["t1", "t2", "NA", "004"]
TEST = pd.DataFrame(
    {
        "id": IDS,
        "type": ["ocr", "color", "ocr", "color"],
        "question": "<b>무엇</b>입니까?",
        "a": ["빨강", "하나", "x", "p"],
        "b": ["파랑", "둘", "y", "q"],
        "c": ["노랑", "셋", "z", "r"],
        "d": ["초록", "넷", "w", "s"],
        "image_path": vqa.GREY_IMAGE,
    }
)
COMPETITION = vqa.Competition(
    train=TEST.head(0),
    test=TEST,
    sample=TEST[["id"]].assign(answer=""),
    fallbacks={},
    fingerprint="",
    data_dir=None,
)
LABELS = np.array([0, 1, 2, 3])


@pytest.fixture
def write(tmp_path):
    """Write answers by id as a submission; returns its path."""

    def write_file(name, answers, ids=IDS, header="id,answer"):
        rows = [f"{row_id},{answer}" for row_id, answer in zip(ids, answers, strict=True)]
        path = tmp_path / name
        path.write_text("\n".join([header, *rows, ""]), encoding="utf-8")
        return path

    return write_file


# --- Reading --------------------------------------------------------------------------------------

NOTATIONS = {
    "letters": "abcd",
    "capitals": "ABCD",
    "numbers": "1234",
    "numbers from 0": "0123",
    "Korean": ["1번", "2번", "3번", "4번"],
    "texts": ["빨강", "둘", "z", "s"],
}


@pytest.mark.parametrize("answers", NOTATIONS.values(), ids=NOTATIONS)
def test_a_file_is_read_in_its_own_notation_and_matched_by_id(write, answers):
    path = write("x.csv", [*answers][::-1], ids=IDS[::-1])
    for notation in (None, vqa.AnswerNotation(), vqa.AnswerNotation("texts of the choices", ())):
        letters = vqa.read_submission(path, TEST, notation)
        assert letters.loc[IDS].tolist() == [*"abcd"]


def test_without_test_rows_letters_and_numbers_are_read_and_texts_refused(write):
    assert vqa.read_submission(write("x.csv", "4321")).tolist() == [*"dcba"]
    texts = vqa.AnswerNotation("texts of the choices", ())
    with pytest.raises(vqa.DataError, match=r"y.csv, line 2, column 'answer', value '빨강'"):
        vqa.read_submission(write("y.csv", NOTATIONS["texts"]), notation=texts)


REFUSED_FILES = {
    "a missing row": ({"answers": "abc", "ids": IDS[:3]}, r"1 test row without an answer \['004'"),
    "another id": (
        {"answers": "abcd", "ids": [*IDS[:3], "005"]},
        r"1 test row without an answer \['004'\], 1 id of no test row \['005'\]",
    ),
    "an id twice": (
        {"answers": "abcd", "ids": ["t1", "t2", "t2", "004"]},
        r"row 3 \(id 't2', answer 'c'\): this id occurs twice; keep one row per id",
    ),
    "three columns": (
        {"answers": ["a,1", "b,1", "c,1", "d,1"], "header": "id,answer,p"},
        r"columns are \['id', 'answer', 'p'\]; give a file of id and answer",
    ),
    "no row": ({"answers": "", "ids": []}, "no row below the header; give a filled submission"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED_FILES.values(), ids=REFUSED_FILES)
def test_a_file_that_is_no_whole_submission_is_refused_by_name(write, content, message):
    path = write("spoiled.csv", **content)
    with pytest.raises(vqa.SubmissionError, match=message) as error:
        vqa.read_submission(path, TEST)
    assert str(path) in str(error.value)


def test_an_answer_of_no_kind_is_refused_with_its_line(write):
    path = write("x.csv", "abcE")
    with pytest.raises(vqa.DataError, match=r"x.csv, line 5, column 'answer', value 'E'"):
        vqa.read_submission(path, TEST)


# --- Two files ------------------------------------------------------------------------------------


def test_two_files_in_other_notations_differ_where_their_answers_do(write):
    a = write("a.csv", "ABCD")
    b = write("b.csv", ["빨강", "셋", "w", "s"][::-1], ids=IDS[::-1])
    comparison = vqa.compare_submissions(a, b, COMPETITION)
    assert comparison.rows == 4
    differing = comparison.differing[["id", "answer_a", "answer_b"]].to_numpy().tolist()
    assert differing == [["t2", "b", "c"], ["NA", "c", "d"]]
    assert comparison.noise == 1.0
    assert comparison.by_type.to_dict("index") == {
        "color": {"rows": 2, "differ": 1, "share": 0.5},
        "ocr": {"rows": 2, "differ": 1, "share": 0.5},
    }
    first, second, third = vqa.describe_comparison(comparison)
    assert first == f"{a} and {b} differ in 2 of 4 rows (50.0%)."
    assert "± 1.0 rows (± 25.0 points;" in second
    assert third == (
        f"Overlap of errors: not known ({a} and {b}: no finished run, so its errors are not known)."
    )
    page = vqa.comparison_html(comparison)
    assert page.count("<img ") == 2
    assert "the first answers b, the second answers c" in page
    assert "&lt;b&gt;무엇&lt;/b&gt;" in page
    assert vqa.comparison_html(comparison, cards=1).count("<img ") == 1


def test_without_the_images_a_line_says_so(write, replace):
    competition = replace(COMPETITION, test=TEST.assign(image_path="/gone/1.png"))
    comparison = vqa.compare_submissions(
        write("a.csv", "abcd"), write("b.csv", "abca"), competition
    )
    page = vqa.comparison_html(comparison)
    assert "<p>No cards: /gone/1.png" in page
    assert "differ in 1 of 4 rows" in page


def test_without_data_only_rows_and_noise_are_compared(write):
    comparison = vqa.compare_submissions(write("a.csv", "ABCD"), write("b.csv", "1231"))
    assert comparison.differing["id"].tolist() == ["004"]
    assert comparison.by_type.empty
    assert "<img" not in vqa.comparison_html(comparison)


def test_equal_files_are_said_to_be_equal(write):
    a = write("a.csv", "abcd")
    b = write("b.csv", "1234")
    comparison = vqa.compare_submissions(a, b, COMPETITION)
    assert comparison.differing.empty
    assert vqa.describe_comparison(comparison)[0] == f"{a} and {b} answer all 4 rows alike."
    assert "<img" not in vqa.comparison_html(comparison)


def test_files_with_other_ids_are_refused_by_name(write):
    a = write("a.csv", "abcd")
    b = write("b.csv", "abc", ids=["t1", "t2", "x"])
    message = r"b.csv answer other rows: 2 ids are only in the first \['004', 'NA'\], 1 only in"
    with pytest.raises(vqa.SubmissionError, match=message):
        vqa.compare_submissions(a, b)


def test_a_folder_without_a_submission_is_refused(tmp_path, write):
    message = r"no submission_ensemble.csv in this folder; write it with write_submissions"
    with pytest.raises(FileNotFoundError, match=message):
        vqa.compare_submissions(tmp_path, write("a.csv", "abcd"))


# --- Errors of runs -------------------------------------------------------------------------------


def right_but_for(rows, wrong):
    """(rows,) right or wrong: all right but for these."""
    correct = np.ones(rows, bool)
    correct[wrong] = False
    return correct


def test_the_pair_with_the_least_overlap_near_the_best_run_is_worth_mixing():
    correct = {
        "best": right_but_for(1000, range(100)),
        "like it": right_but_for(1000, range(10, 110)),
        "other": right_but_for(1000, range(55, 165)),  # 1 point behind
        "poor": right_but_for(1000, range(500, 900)),  # overlaps with none
    }
    table = vqa.error_overlaps(correct)
    assert table["jaccard"].is_monotonic_increasing
    by_pair = table.set_index(["a", "b"])
    assert by_pair.loc[("best", "other"), "jaccard"] == pytest.approx(45 / 165)
    assert by_pair.loc[("best", "like it"), "wrong_both"] == 90
    assert by_pair.loc[("best", "poor"), "jaccard"] == 0
    assert by_pair.index[by_pair["worth_mixing"]].tolist() == [("best", "other")]
    assert vqa.describe_overlap(table) == (
        "Worth mixing: best with other (accuracy 0.900 and 0.890). Their errors overlap by 0.27, "
        "the least of the pairs within 1 point of the best run."
    )


def test_equal_errors_and_distant_runs_are_not_worth_mixing():
    best = right_but_for(100, range(10))
    for other in (best, right_but_for(100, range(20, 40))):
        table = vqa.error_overlaps({"x": best, "y": other})
        assert not table["worth_mixing"].any()
        assert vqa.describe_overlap(table).startswith("No pair is worth mixing: ")
    assert vqa.error_overlap(np.zeros(3, bool), np.zeros(3, bool)) == 1.0


@pytest.fixture
def two_runs(mini_data, tmp_path, replace, monkeypatch):
    """Two finished runs, equally good, with errors of their own."""
    evaluate_once(monkeypatch)
    return runs_side_by_side(mini_data, tmp_path / "outputs", replace, {"run1": 1.2, "run2": 1.2})


def test_two_runs_are_compared_with_their_confidence_and_the_overlap_of_their_errors(two_runs):
    evaluations = [vqa.evaluate_run(run) for run in two_runs]
    answers = []
    for run, evaluation in zip(two_runs, evaluations, strict=True):
        labels = np.mean([*vqa.predict_test(run, evaluation).values()], axis=0)
        vqa._write_answers(labels.argmax(axis=1), run, run.directory / "submission_ensemble.csv")
        answers.append(pd.DataFrame(labels, index=run.test["id"]))
    comparison = vqa.compare_submissions(two_runs[0].directory, two_runs[1])
    differing = comparison.differing
    assert 0 < len(differing) < comparison.rows == 12
    surety = differing[["confidence_a", "confidence_b"]].min(axis=1)
    assert surety.is_monotonic_decreasing
    for side, probabilities in zip("ab", answers, strict=True):
        likeliest = probabilities.loc[differing["id"]].max(axis=1).to_numpy()
        np.testing.assert_allclose(differing[f"confidence_{side}"], likeliest)
    assert comparison.by_type["differ"].sum() == len(differing)

    wrong = []
    for evaluation in evaluations:
        is_wrong = evaluation.probabilities.argmax(axis=1) != evaluation.oof.labels
        wrong.append(set(evaluation.oof.frame["id"][is_wrong]))
    row = comparison.overlap.iloc[0]
    assert row["jaccard"] == len(wrong[0] & wrong[1]) / len(wrong[0] | wrong[1])
    assert (row["wrong_a"], row["wrong_b"]) == (len(wrong[0]), len(wrong[1]))
    assert comparison.overlap_problem == ""
    page = vqa.comparison_html(comparison)
    assert f"their errors overlap by {row['jaccard']:.2f} (Jaccard)" in page
    assert f"(probability {differing['confidence_a'].iloc[0]:.2f})" in page


@pytest.mark.slow
def test_of_several_runs_each_pair_is_compared_and_a_distilled_one_is_refused(two_runs):
    folders = [run.directory for run in two_runs]
    table = vqa.overlap_of_runs(folders)
    assert table[["a", "b"]].to_numpy().tolist() == [[str(folder) for folder in folders]]
    with pytest.raises(ValueError, match="run1: name two or more different finished runs"):
        vqa.overlap_of_runs([folders[0], folders[0]])
    path = folders[1] / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["config"]["distill_from"] = "teacher"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"run2 cannot be judged beside other runs: it was dist"):
        vqa.overlap_of_runs(folders)


@pytest.mark.slow
def test_a_run_judges_two_foreign_files(two_runs, write):
    run = two_runs[0]
    ids = run.test["id"].tolist()
    a = write("a.csv", "a" * 12, ids=ids)
    b = write("b.csv", "b" * 12, ids=ids)
    comparison = vqa.compare_submissions(a, b, str(run.directory))
    probabilities = vqa.predict_test(run, vqa.evaluate_run(run))
    mean = pd.DataFrame(np.mean([*probabilities.values()], axis=0), index=ids)
    expected = mean.loc[comparison.differing["id"]]
    np.testing.assert_allclose(comparison.differing["confidence_a"], expected[0])
    np.testing.assert_allclose(comparison.differing["confidence_b"], expected[1])
    assert expected[[0, 1]].max(axis=1).is_monotonic_decreasing
