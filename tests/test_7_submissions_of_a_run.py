"""Part 7, Submissions of a run: which two files to choose at a competition's end."""

import numpy as np
import pytest
from planted import evaluate_once, rewrite_rows, runs_side_by_side

import vqa_helpers as vqa

CANDIDATE = vqa.SubmissionCandidate("x", np.array([*"abcd"]), 400, 0.80, 0.77, 0.83)


def candidate(file, answers, accuracy, replace):
    return replace(CANDIDATE, file=file, answers=np.array([*answers]), accuracy=accuracy)


def test_the_second_pick_differs_most_within_the_interval_of_the_best(replace):
    table = vqa.pick_two(
        [
            candidate("equal", "abcd", 0.80, replace),
            candidate("near", "abca", 0.80, replace),
            candidate("best", "abcd", 0.81, replace),
            candidate("different", "abaa", 0.77, replace),
            candidate("poor", "dcba", 0.769, replace),
        ]
    ).set_index("file")
    assert table.index[:2].tolist() == ["best", "different"]
    assert table["pick"].tolist() == ["first", "second", "", "", ""]
    assert table["differs"].to_dict() == {
        "best": 0,
        "different": 2,
        "equal": 0,
        "near": 1,
        "poor": 4,
    }
    assert table["reason"].to_dict() == {
        "best": "the best OOF accuracy, 0.810",
        "different": "differs from the first in 2 of 4 rows, the most of those with an OOF "
        "accuracy within its interval, 0.770 to 0.830",
        "equal": "has the first one's answers",
        "near": "differs less from the first than the second does",
        "poor": "its OOF accuracy is below the first one's interval, from 0.770 on",
    }
    lines = vqa.describe_pick(table.reset_index())
    assert lines[0] == "Final pick, first: best (the best OOF accuracy, 0.810)."
    assert lines[1].startswith("Final pick, second: different (differs from the first in 2 of 4 ")


def test_of_equally_good_files_the_first_one_named_comes_first(replace):
    files = [candidate(name, "abcd", 0.80, replace) for name in ("ensemble", "single")]
    table = vqa.pick_two(files)
    assert table[["pick", "file"]].to_numpy().tolist() == [["first", "ensemble"], ["", "single"]]
    assert vqa.describe_pick(table)[1] == (
        "Final pick, second: none; no other file differs and may be as good."
    )


@pytest.fixture
def runs(mini_data, tmp_path, replace, monkeypatch):
    """A good run and a poor one beside it."""
    evaluate_once(monkeypatch)
    return runs_side_by_side(mini_data, tmp_path / "outputs", replace, {"good": 2.2, "poor": 0.1})


def test_a_run_proposes_two_files_of_itself_and_of_the_runs_beside_it(runs, caplog):
    caplog.set_level("INFO")
    good, poor = runs
    assert vqa.final_pick_table(good).empty
    vqa.write_submissions(poor, vqa.evaluate_run(poor))
    caplog.clear()
    evaluation = vqa.evaluate_run(good)
    vqa.write_submissions(good, evaluation)
    table = vqa.final_pick_table(good).set_index("file")
    assert set(table.index) == {
        "good/submission_ensemble.csv",
        "good/submission_single.csv",
        "poor/submission_ensemble.csv",
    }
    correct = evaluation.probabilities.argmax(axis=1) == evaluation.oof.labels
    own = table.loc["good/submission_ensemble.csv"]
    assert own["pick"] == "first"
    assert float(own["accuracy"]) == pytest.approx(correct.mean(), abs=1e-4)
    low, high = vqa.accuracy_interval(correct, evaluation.oof.groups)
    assert [float(own["low"]), float(own["high"])] == pytest.approx([low, high], abs=1e-4)
    answers = [vqa.read_submission(good.directory.parent / file) for file in table.index]
    differs = [int((answers[0] != other).sum()) for other in answers]
    assert table["differs"].astype(int).tolist() == differs
    assert table.loc["poor/submission_ensemble.csv", "pick"] == ""
    assert "is below the first one's interval" in table["reason"].iloc[-1]
    decisions = [text for text in caplog.messages if text.startswith("Decision: Final pick, ")]
    assert len(decisions) == 2
    tables = vqa._report_tables(good, evaluation)
    assert "Final pick: two files to choose at the end" in tables

    # What cannot be chosen is named with its reason.
    reasons = []
    for spoil in (rename_folder, delete_submission):
        folder = spoil(poor.directory)
        caplog.clear()
        table = vqa.propose_final_pick(good, evaluation)
        assert table["file"].str.startswith("good/").all()
        [warning] = [text for text in caplog.messages if " is left out: " in text]
        reasons.append(warning.removeprefix(f"Final pick: {folder} is left out: "))
    assert reasons[0] == "its folder has another name than when it wrote its submission"
    assert reasons[1].startswith("FileNotFoundError: ")


def rename_folder(folder):
    return folder.rename(folder.with_name("renamed"))


def delete_submission(folder):
    renamed = folder.with_name("renamed").rename(folder)
    (renamed / "submission_ensemble.csv").unlink()
    return renamed


@pytest.mark.slow
def test_runs_on_other_rows_and_distilled_ones_are_not_chosen(runs, replace, caplog):
    good, poor = runs
    evaluation = vqa.evaluate_run(good)
    for run in runs:
        vqa.write_submissions(run, vqa.evaluate_run(run))
    caplog.clear()
    distilled = replace(good, config=replace(good.config, distill_from="teacher"))
    assert len(vqa.propose_final_pick(distilled, evaluation)) == 2
    assert caplog.messages[0].startswith("Final pick: compared with no other run, because it was")
    rewrite_rows(poor, "folds", poor.train.assign(question="?"))
    caplog.clear()
    assert len(vqa.propose_final_pick(good, evaluation)) == 2
    assert caplog.messages == [
        f"Final pick: {poor.directory} is left out: its train rows are others"
    ]
