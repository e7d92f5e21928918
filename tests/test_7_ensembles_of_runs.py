"""Part 7, Ensembles of runs: several runs combined row by row, or refused by name."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reensemble
from planted import hidden_labels, longer, planted_run, rewrite_rows

import vqa_helpers as vqa


@pytest.fixture
def two_runs(mini_run, replace):
    """A good run and a poor one on the same rows, with folds of their own."""
    poor = longer(mini_run(run_name="poor"), replace)
    good = longer(mini_run(run_name="good", seed=7), replace)
    planted_run(poor, signals=(0.3, 0.3), seed=1)
    planted_run(good, signals=(1.5, 1.5), seed=2)
    return poor, good


@pytest.mark.slow
def test_runs_are_compared_side_by_side_and_the_better_answers_are_submitted(
    two_runs, tmp_path, monkeypatch
):
    poor, good = two_runs
    folders = [poor.directory, good.directory]
    table, answers = vqa.ensemble_runs(folders, tmp_path / "both")
    alone = [str(folder) for folder in folders]
    assert table.index.tolist() == [*alone, *vqa.BLENDS, "automatic choice"]
    assert table.loc["mean", "against"] == str(good.directory)
    assert set(table["against"].drop("mean")) == {"mean"}
    assert table["seconds"].tolist() == [61, 62] + [123] * 7
    chosen, automatic = table.index[table["used"]]
    assert automatic == "automatic choice"
    assert chosen != "mean"
    assert (table["gain_low"] <= table["gain"]).all()
    assert (table["gain"] <= table["gain_high"]).all()
    assert table.loc["automatic choice", "accuracy"] > table.loc["mean", "accuracy"]
    assert answers["id"].tolist() == good.sample["id"].tolist()
    assert answers["answer"].isin([*vqa.CHOICES]).all()
    checked = vqa.validate_submission(tmp_path / "both" / "submission.csv", good.sample)
    assert checked["rows"] == 12

    def count(name, *_):
        return 1e6 if name == "stacked" else 0.0

    monkeypatch.setattr(vqa, "count_fitted_parameters", count)
    table, _ = vqa.ensemble_runs(folders, tmp_path / "both")
    assert table.loc["stacked", "nll_high"] > 1
    assert table.loc["weighted", "nll_high"] < 1


@pytest.mark.slow
def test_rows_are_matched_by_id_although_the_runs_have_other_folds(two_runs, tmp_path):
    """A run's row of the table is its own score, in whatever order its folds were scored."""
    poor, good = two_runs
    assert not np.array_equal(poor.train["fold"], good.train["fold"])
    table, _ = vqa.ensemble_runs([poor.directory, good.directory], tmp_path)
    for run in two_runs:
        evaluation = vqa.evaluate_run(run)
        own = vqa.accuracy(evaluation.probabilities, evaluation.oof.labels)
        assert table.loc[str(run.directory), "accuracy"] == pytest.approx(own)


@pytest.mark.slow
def test_test_rows_are_matched_by_id_too(two_runs, replace, tmp_path):
    poor, good = two_runs
    backwards = replace(good, test=good.test[::-1].reset_index(drop=True))
    rewrite_rows(good, "test_rows", backwards.test)
    planted_run(backwards, signals=(9.0, 9.0))
    _, answers = vqa.ensemble_runs([poor.directory, good.directory], tmp_path)
    labels = answers["answer"].map(vqa.CHOICES.index)
    assert labels.tolist() == hidden_labels(answers["id"]).tolist()


@pytest.mark.slow
def test_combining_three_runs_again_writes_the_same_bytes(two_runs, mini_run, replace, tmp_path):
    third = longer(mini_run(run_name="third", seed=8), replace)
    planted_run(third, seed=3)
    folders = [run.directory for run in (*two_runs, third)]
    table = reensemble.repeated(folders, tmp_path)
    assert len(table) == 2
    assert (table[["submission.csv", "ladder.csv"]].nunique() == 1).all()
    ladder = pd.read_csv(tmp_path / "repetition_1" / "ladder.csv")
    assert ladder["step"].str.startswith(str(third.directory)).sum() == 1
    assert len(ladder) == 3 + len(vqa.BLENDS) + 1


def test_on_kaggle_the_combined_answers_are_offered_for_submission(two_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    vqa.ensemble_runs([run.directory for run in two_runs], tmp_path / "both")
    combined = (tmp_path / "both" / "submission.csv").read_bytes()
    assert (tmp_path / "submission.csv").read_bytes() == combined


@pytest.mark.slow
def test_a_run_in_a_folder_called_vote_keeps_its_scores(two_runs, tmp_path, monkeypatch):
    poor, _ = two_runs
    monkeypatch.chdir(poor.directory.parent)
    Path("good").rename("voter")
    table, _ = vqa.ensemble_runs(["poor", "voter"], tmp_path / "both")
    assert np.isfinite(table.loc["voter", ["nll", "brier"]].astype(float)).all()
    assert np.isnan(table.loc["vote", "nll"])


@pytest.mark.slow
def test_combining_runs_loads_no_torch(two_runs, tmp_path):
    code = """
import sys
import vqa_helpers as vqa

target, *folders = sys.argv[1:]
vqa.ensemble_runs(folders, target)
assert "torch" not in sys.modules
"""
    folders = [str(run.directory) for run in two_runs]
    command = [sys.executable, "-c", code, str(tmp_path / "ensemble"), *folders]
    subprocess.run(command, check=True, cwd=vqa.HERE)


# --- Refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "column", "message"),
    [
        ("test_rows", "id", r"other: 2 test rows differ from those of .*good, such as \['test_"),
        ("test_rows", "question", r"other: 1 test rows differ"),
        ("folds", "a", r"other: 1 train rows differ"),
        ("folds", "id", r"other: 2 train rows differ"),
    ],
)
def test_runs_on_other_rows_are_refused_by_name(mini_run, tmp_path, table, column, message):
    good = planted_run(mini_run(run_name="good"))
    other = planted_run(mini_run(run_name="other"))
    path = other.directory / f"{table}.csv"
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    frame.loc[0, column] += "_changed"
    rewrite_rows(other, table, frame)
    with pytest.raises(ValueError, match=message):
        vqa.ensemble_runs([good.directory, other.directory], tmp_path / "ensemble")
    assert not (tmp_path / "ensemble").exists()


def test_one_run_given_twice_is_refused(mini_run, tmp_path):
    run = planted_run(mini_run())
    shutil.copytree(run.directory, tmp_path / "copy")
    with pytest.raises(ValueError, match="copy are the same run, which would count twice"):
        vqa.ensemble_runs([run.directory, tmp_path / "copy"], tmp_path / "ensemble")
    with pytest.raises(ValueError, match=f"{run.directory.name} are the same run"):
        vqa.ensemble_runs([run.directory, str(run.directory)], tmp_path / "ensemble")


def test_runs_of_which_each_trained_another_fold_share_no_row(mini_run, tmp_path):
    first = planted_run(mini_run(run_name="x", train_folds=(0,)))
    second = planted_run(mini_run(run_name="y", train_folds=(1,)))
    with pytest.raises(ValueError, match="no training row is out of fold in all of them"):
        vqa.ensemble_runs([first.directory, second.directory], tmp_path)


def with_notation(run, notation):
    """Record another notation, or none, in the run's config.json."""
    path = run.directory / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content.pop("notation", None)
    if notation is not None:
        content["notation"] = dataclasses.asdict(notation)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_combined_answers_are_in_the_notation_that_the_runs_know(two_runs, tmp_path):
    folders = [run.directory for run in two_runs]
    with_notation(two_runs[0], None)  # of an earlier version
    with_notation(two_runs[1], vqa.AnswerNotation("letters", ("A", "B", "C", "D")))
    _, answers = vqa.ensemble_runs(folders, tmp_path)
    assert answers["answer"].isin([*"ABCD"]).all()
    assert answers.attrs["notation"] == "letters (A, B, C, D)"
    with_notation(two_runs[0], vqa.AnswerNotation())
    with pytest.raises(ValueError, match=r"write answers differently .*letters \(a, b, c, d\)"):
        vqa.ensemble_runs(folders, tmp_path)
