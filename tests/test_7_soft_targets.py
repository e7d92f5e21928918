"""Part 7, Soft targets: where votes and other runs' answers may go, and that nothing leaks."""

import functools
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import one_hot, planted_run, rewrite_rows, rows_of_fold
from running import open_run_session, train_until_step_2

import vqa_helpers as vqa


def targets_of(frame):
    return frame[list(vqa.TARGET_COLUMNS)].to_numpy()


# --- Votes ----------------------------------------------------------------------------------------


DEV_HEADER = "id,path,question,a,b,c,d,answer1,answer2,answer3,answer4,answer5"


@pytest.fixture
def dev_data(mini_data, tmp_path):
    """dev_data("d1,...", ...) -> the folder of a mini competition with these lines of dev.csv."""

    def make(*lines, header=DEV_HEADER):
        folder = shutil.copytree(mini_data, tmp_path / "with_dev")
        for number in (50, 51):
            shutil.copy(vqa.DEMO / "images" / "train" / f"train_00{number}.jpg", folder / "train")
        (folder / "dev.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
        return str(folder)

    return make


def voted(name, votes, image="train_0050.jpg"):
    """A line of dev.csv whose choice d is blank."""
    return f"{name},train/{image},무슨 색입니까?,빨강,파랑,노랑,,{votes}"


def extra_rows_of_fold(run, fold):
    """Rows beside the training file's that a fold trains on."""
    return run.extra_rows[run.extra_rows["fold"] == fold]


def test_votes_become_shares_and_rows_without_one_are_counted(mini_run, dev_data):
    rows = (
        voted("d1", "a,a,a,b,c"),
        voted("d2", "b,,(B),,빨강"),
        voted("d3", ",, ,,"),
        voted("d4", "c,c,c,c,c", "no.jpg"),
    )
    run = mini_run(data_dir=dev_data(*rows), use_dev_votes=True)
    for fold in (0, 1):
        dev = extra_rows_of_fold(run, fold)
        assert dev["id"].tolist() == ["d1", "d2"]
        np.testing.assert_allclose(targets_of(dev), [[0.6, 0.2, 0.2, 0], [1 / 3, 2 / 3, 0, 0]])
        trained = vqa.training_rows(run, fold)
        assert trained["source"].value_counts().to_dict() == {"train": 18, "dev": 2}
    expected = {"dev_blank_votes": 7, "dev_no_vote": 1, "dev_unusable_image": 1}
    assert expected.items() <= run.fallbacks.items()
    assert vqa.source_table(run).to_numpy().tolist() == [[18, 2], [18, 2]]
    plain = mini_run(run_name="plain")
    assert run.train["id"].tolist() == plain.train["id"].tolist()  # never validated on
    assert np.array_equal(targets_of(run.train), one_hot(run.train["label"]))


def test_a_model_on_all_rows_trains_on_all_votes_and_every_variant_stays_beside_its_row(
    mini_run, dev_data
):
    data = dev_data(voted("d1", "a,a,a,a,a", "train_0001.jpg"), voted("d2", "b,b,b,b,b"))
    run = mini_run(data_dir=data, use_dev_votes=True, final_retrain=True, augment_images=2)
    sources = vqa.source_table(run).loc[run.final_fold].to_dict()
    assert sources == {"train": len(run.train), "dev": 2}
    variants = vqa.image_variants(vqa.all_rows(run), 2, seed=1)
    for fold in run.models_to_train:
        rows = vqa.training_rows(run, fold)
        shown = vqa.training_rows(run, fold, variants)
        assert shown["id"].tolist() == 3 * rows["id"].tolist()
        assert shown["variant"].tolist() == np.repeat([0, 1, 2], len(rows)).tolist()
        assert np.array_equal(targets_of(shown), np.tile(targets_of(rows), (3, 1)))


def test_a_dev_row_with_a_copy_of_a_validation_image_is_left_out_of_that_fold(mini_run, dev_data):
    data = dev_data(voted("d1", "a,a,a,a,a", "train_0001.jpg"), voted("d2", "b,b,b,b,b"))
    run = mini_run(data_dir=data, use_dev_votes=True)
    fold = run.train.set_index("id").loc["train_0001", "fold"]
    assert vqa.training_rows(run, fold)["id"].isin(["d1", "d2"]).sum() == 1
    assert vqa.training_rows(run, 1 - fold)["id"].isin(["d1", "d2"]).sum() == 2
    assert run.fallbacks[f"dev_copies_left_out_of_fold_{fold}"] == 1


BAD_ROWS = {
    "no choice": (
        voted("d2", "a,a,e,a,a"),
        "dev.csv, line 3, column 'answer3', value 'e': does not mean exactly one filled",
    ),
    "a blank choice": (
        voted("d2", "a,a,a,a,d"),
        "dev.csv, line 3, column 'answer5', value 'd': does not mean exactly one filled",
    ),
    "a repeated id": (
        voted("d1", "a,a,a,a,a"),
        "dev.csv, line 3, column 'id', value 'd1': is blank or repeats",
    ),
    "a vote too few": (
        voted("d2", "a,a,a,a"),
        "dev.csv, line 3, row 'd2': 11 fields but 12 columns",
    ),
    "no vote": (
        voted("d2", ",,,,"),
        "dev.csv, line 3, column 'answer1', value '': no vote; no_vote in 1 of 2 rows",
    ),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_dev_row_is_named(mini_run, dev_data, row, message):
    data = dev_data(voted("d1", "a,a,a,a,a"), row)
    with pytest.raises(vqa.DataError) as caught:
        mini_run(data_dir=data, use_dev_votes=True, max_fallback_share=0.4)
    assert message in str(caught.value)


def test_dev_votes_without_their_file_or_a_column_are_refused(mini_run, dev_data):
    with pytest.raises(
        vqa.DataError, match=r"dev.csv: no such file; add it, or set use_dev_votes=False"
    ):
        mini_run(use_dev_votes=True)
    data = dev_data(
        "d1,train/train_0050.jpg,q,1,2,3,4,a,a,a,a",
        header="id,path,question,a,b,c,d,answer1,answer1,answer1,x",
    )
    with pytest.raises(vqa.DataError, match=r"dev.csv, line 1: columns \['answer1', 'answer2'"):
        mini_run(data_dir=data, use_dev_votes=True)


def test_changed_votes_refuse_to_continue(mini_run, dev_data):
    data = dev_data(voted("d1", "a,a,a,b,c"))
    mini_run(run_name="student", data_dir=data, use_dev_votes=True)
    table = Path(data) / "dev.csv"
    table.write_text(table.read_text("utf-8").replace("a,a,a,b,c", "a,a,b,b,c"), encoding="utf-8")
    with pytest.raises(
        vqa.CheckpointError, match=r"made with other targets \(rows \['d1 \(train_0050.jpg\)'\]"
    ):
        mini_run(run_name="student", data_dir=data, use_dev_votes=True)


# --- Another run's probabilities ------------------------------------------------------------------


@pytest.fixture
def teacher(mini_run):
    return planted_run(mini_run(run_name="teacher"), signals=(1.0, 1.0))


def test_distilled_targets_mix_labels_with_the_teachers_oof_probabilities(mini_run, teacher):
    run = mini_run(distill_from=str(teacher.directory), distill_weight=0.3)
    evaluation = vqa.evaluate_run(teacher)
    assert evaluation.oof.frame["id"].tolist() == run.train["id"].tolist()
    targets = targets_of(run.train)
    expected = 0.7 * one_hot(run.train["label"]) + 0.3 * evaluation.probabilities
    np.testing.assert_allclose(targets, expected, rtol=0, atol=1e-4)  # see TARGET_DECIMALS
    np.testing.assert_allclose(targets.sum(axis=1), 1)
    again = vqa.Run.open(run.directory)  # what every worker reads
    for fold in (0, 1):
        pd.testing.assert_frame_equal(vqa.training_rows(run, fold), vqa.training_rows(again, fold))
        assert np.array_equal(targets_of(again.train), targets)


def test_rows_are_taught_by_id_although_the_teacher_has_other_folds(mini_run, teacher):
    run = mini_run(distill_from=str(teacher.directory), seed=7)
    assert not np.array_equal(run.train["fold"], teacher.train["fold"])
    assert np.array_equal(run.train["teacher_fold"], teacher.train["fold"])


def test_a_blank_choice_is_never_a_target():
    frame = pd.DataFrame({"a": ["x"], "b": [" "], "c": ["y"], "d": ["z"]})
    taught = vqa._with_targets(frame, np.array([[0.4, 0.2, 0.4, 0.0]]))
    assert targets_of(taught).tolist() == [[0.5, 0, 0.5, 0]]


def test_pseudo_labels_of_a_fold_come_from_the_teachers_same_fold(mini_run, teacher):
    run = mini_run(pseudo_label_from=str(teacher.directory), pseudo_label_confidence=0.6)
    probabilities = vqa.predict_test(teacher, vqa.evaluate_run(teacher))
    sure = {}
    for fold in (0, 1):
        joined = extra_rows_of_fold(run, fold)
        sure[fold] = run.test["id"][probabilities[fold].max(axis=1) >= 0.6].tolist()
        assert joined["id"].tolist() == sure[fold]
        assert 0 < len(joined) < len(run.test)
        expected = pd.DataFrame(probabilities[fold], run.test["id"]).loc[joined["id"]]
        np.testing.assert_allclose(targets_of(joined), expected, rtol=0, atol=1e-4)
    assert sure[0] != sure[1]


def test_where_the_teacher_is_sure_of_nothing_only_the_training_rows_are_trained_on(
    mini_run, teacher
):
    settings = {"pseudo_label_from": str(teacher.directory), "pseudo_label_confidence": 1.0}
    run = mini_run(**settings)
    again = mini_run(**settings)
    assert again.extra_rows.empty
    assert vqa.source_table(run).to_dict("index") == {0: {"train": 18}, 1: {"train": 18}}
    trained_on = vqa.training_rows(run, 0)
    assert trained_on["id"].tolist() == rows_of_fold(run, 1)["id"].tolist()


def test_a_test_row_without_an_image_or_with_a_copy_of_a_validation_image_is_left_out(
    mini_run, mini_data, tmp_path, monkeypatch
):
    data = shutil.copytree(mini_data, tmp_path / "copies")
    shutil.copy(data / "train" / "train_0001.jpg", data / "test" / "test_0001.jpg")
    (data / "test" / "test_0002.jpg").unlink()
    tolerant = functools.partial(vqa.load_competition, max_fallback_share=0.5)
    monkeypatch.setattr(vqa, "load_competition", tolerant)
    teacher = planted_run(mini_run(data_dir=str(data), run_name="teacher"))
    settings = {"pseudo_label_from": str(teacher.directory), "pseudo_label_confidence": 0.25}
    run = mini_run(data_dir=str(data), **settings)
    fold = run.train.set_index("id").loc["train_0001", "fold"]
    joined = set(extra_rows_of_fold(run, fold)["id"])
    joined_elsewhere = set(extra_rows_of_fold(run, 1 - fold)["id"])
    assert joined == set(run.test["id"]) - {"test_0001", "test_0002"}
    assert joined_elsewhere == joined | {"test_0001"}
    assert run.fallbacks[f"test_copies_left_out_of_fold_{fold}"] == 1


def no_run(mini_run, mini_data, tmp_path):
    return "nowhere"


def of_one_fold(mini_run, mini_data, tmp_path, fold=0):
    run = planted_run(mini_run(run_name="teacher", train_folds=(fold,)))
    return str(run.directory)


def of_the_other_fold(mini_run, mini_data, tmp_path):
    return of_one_fold(mini_run, mini_data, tmp_path, fold=1)


def with_other_folds(mini_run, mini_data, tmp_path):
    run = planted_run(mini_run(run_name="teacher", seed=7))
    return str(run.directory)


def unfinished(mini_run, mini_data, tmp_path):
    run = planted_run(mini_run(run_name="teacher"))
    (run.fold_dir(1) / "test.npz").unlink()
    return str(run.directory)


def with_another_label(mini_run, mini_data, tmp_path):
    run = planted_run(mini_run(run_name="teacher"))
    table = run.train.copy()
    changed = table["id"] == "train_0001"
    table.loc[changed, "label"] = (table.loc[changed, "label"] + 1) % 4
    rewrite_rows(run, "folds", table)
    return str(run.directory)


def on_other_data(mini_run, mini_data, tmp_path):
    data = shutil.copytree(mini_data, tmp_path / "other")
    table = data / "test.csv"
    table.write_text(table.read_text("utf-8") + "\n", encoding="utf-8")
    run = planted_run(mini_run(run_name="teacher", data_dir=str(data)))
    return str(run.directory)


@pytest.mark.parametrize(
    ("field", "spoil", "message"),
    [
        (
            "distill_from",
            no_run,
            "no run lies in .*nowhere; give the folder of a finished run",
        ),
        (
            "distill_from",
            of_one_fold,
            "no out-of-fold probabilities for 18 rows, such as .* train all its",
        ),
        (
            "distill_from",
            unfinished,
            r"its folds \[1\] are not finished; run it to its end first",
        ),
        (
            "distill_from",
            with_another_label,
            r"1 of its training rows or labels are others, such as \['train_0001'\]",
        ),
        (
            "pseudo_label_from",
            on_other_data,
            "it was made from other texts, test rows or pixels",
        ),
        (
            "pseudo_label_from",
            of_the_other_fold,
            r"has not trained the folds \[0\]; train them there",
        ),
        (
            "pseudo_label_from",
            with_other_folds,
            "rows in other folds, such as .*; take its n_folds and seed",
        ),
    ],
)
def test_an_unsuitable_teacher_is_refused(mini_run, mini_data, tmp_path, field, spoil, message):
    teacher = spoil(mini_run, mini_data, tmp_path)
    with pytest.raises(ValueError, match=message):
        mini_run(**{field: teacher})


def test_a_model_on_all_rows_needs_a_teacher_of_all_rows(mini_run):
    teacher = planted_run(mini_run(run_name="teacher", train_folds=(1,)))
    settings = {
        "run_name": "student",
        "train_folds": (0,),
        "distill_from": str(teacher.directory),
    }
    assert vqa.source_table(mini_run(**settings)).loc[0, "train"] == 18
    with pytest.raises(ValueError, match="has no out-of-fold probabilities for 18 rows"):
        mini_run(**settings, final_retrain=True)


@pytest.mark.slow
def test_targets_do_not_depend_on_the_last_digits_of_a_teachers_probabilities(
    mini_run, replace, monkeypatch
):
    teacher = planted_run(mini_run(run_name="teacher"))
    evaluate = vqa.evaluate_run
    settings = {
        "run_name": "student",
        "distill_from": str(teacher.directory),
        "pseudo_label_from": str(teacher.directory),
        "pseudo_label_confidence": 0.4,
    }
    first = mini_run(**settings)

    def on_another_processor(run):
        evaluation = evaluate(run)
        return replace(evaluation, probabilities=evaluation.probabilities * (1 + 1e-13))

    monkeypatch.setattr(vqa, "evaluate_run", on_another_processor)
    assert mini_run(**settings).fingerprint == first.fingerprint


def test_a_changed_teacher_refuses_to_continue_and_a_moved_one_does_not(
    mini_run, teacher, tmp_path
):
    run = mini_run(run_name="student", distill_from=str(teacher.directory))
    moved = shutil.copytree(teacher.directory, tmp_path / "elsewhere" / "teacher")
    again = mini_run(run_name="student", distill_from=str(moved))
    assert again.fingerprint == run.fingerprint
    assert again.config.fingerprint == run.config.fingerprint
    planted_run(teacher, signals=(1.0, 1.1))
    with pytest.raises(vqa.CheckpointError, match=r"made with other targets \(.*rows \['train_00"):
        mini_run(run_name="student", distill_from=str(teacher.directory))


# --- Leaks ----------------------------------------------------------------------------------------


@pytest.fixture
def student(mini_run, teacher, dev_data):
    """A run with votes, distillation and pseudo-labels at once."""
    data = dev_data(
        voted("d1", "a,a,a,b,c"),
        voted("d2", "b,b,a,,", "train_0051.jpg"),
        voted("d3", "a,a,a,a,a", "train_0001.jpg"),
    )
    settings = {
        "use_dev_votes": True,
        "distill_from": str(teacher.directory),
        "pseudo_label_from": str(teacher.directory),
        "pseudo_label_confidence": 0.5,
        "data_dir": data,
    }

    def make(name="student", **overrides):
        return mini_run(run_name=name, **settings, **overrides)

    return make


def test_no_row_validates_its_own_fold_and_no_target_comes_from_a_model_that_saw_its_row(
    student, teacher
):
    run = student()
    assert set(run.extra_rows["source"]) == {"dev", "test"}
    for fold in (0, 1):
        rows = vqa.training_rows(run, fold)
        held_out = rows_of_fold(run, fold)
        assert not set(rows["id"]) & set(held_out["id"])
        assert not set(rows["pixel_hash"]) & set(held_out["pixel_hash"])
        taught = rows[rows["source"] == "train"]
        # Each row is taught by the teacher's fold that did not train on it.
        held_out_by = teacher.train.set_index("id")["fold"][taught["id"]]
        assert np.array_equal(taught["teacher_fold"], held_out_by)
        assert (rows["teacher_fold"][rows["source"] == "test"] == fold).all()
        assert (rows["teacher_fold"][rows["source"] == "dev"] == -1).all()


def test_a_planted_leak_is_found(student, teacher, replace):
    run = student()
    teachers = {"train": teacher, "test": teacher}
    vqa.check_no_leak(run, teachers)

    def with_extra(rows):
        return replace(run, extra_rows=pd.concat([run.extra_rows, rows]))

    validation_row = rows_of_fold(run, 0).head(1)
    as_if_fold_1_held_it_out = validation_row.assign(source="train", fold=1)
    with pytest.raises(
        vqa.DataError,
        match=r"Fold 0: a training row also validates it: 1 rows, such as \[\('train'",
    ):
        vqa.check_no_leak(with_extra(as_if_fold_1_held_it_out), teachers)
    as_a_dev_row = validation_row.assign(source="dev", fold=0)
    with pytest.raises(
        vqa.DataError, match="Fold 0: a training row shows an image that validates it: 1 rows"
    ):
        vqa.check_no_leak(with_extra(as_a_dev_row), teachers)
    swapped = run.train.assign(teacher_fold=1 - run.train["teacher_fold"])
    with pytest.raises(
        vqa.DataError, match="Fold 0: a target comes from fold 0 of .*, trained on its row: 18 rows"
    ):
        vqa.check_no_leak(replace(run, train=swapped), teachers)


def test_pseudo_labels_of_a_teacher_that_trained_on_pseudo_labels_are_refused(mini_run, teacher):
    def taught_by(teacher, name):
        directory = str(teacher.directory)
        return mini_run(run_name=name, pseudo_label_from=directory, pseudo_label_confidence=0.3)

    second = planted_run(taught_by(teacher, "second"))
    with pytest.raises(
        vqa.DataError, match=r"Fold 0: a target comes from fold 0 of .*second, trained on its row"
    ):
        taught_by(second, "third")


@pytest.mark.slow
def test_a_distilled_run_is_not_judged_by_oof_rows_that_its_teacher_was_trained_on(
    mini_run, teacher, caplog
):
    run = planted_run(mini_run(run_name="student", distill_from=str(teacher.directory)))
    assert "Do not compare student with other runs by OOF rows: it was distilled" in caplog.text
    with pytest.raises(
        ValueError, match="student cannot be judged beside other runs: it was distilled"
    ):
        vqa.ensemble_runs([teacher.directory, run.directory], run.directory.parent / "ensemble")
    with pytest.raises(
        ValueError, match="student: it was distilled, .*; take a run that was not distilled"
    ):
        mini_run(run_name="other", pseudo_label_from=str(run.directory))
    vqa.atomic_write(run.directory / "selection.json", '{"weights": "raw"}')
    report = vqa.write_report(run, vqa.evaluate_run(run)).read_text("utf-8")
    assert "Do not compare runs by these figures**: it was distilled" in report


# --- Stopped and resumed --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_student_ends_bitwise_like_an_uninterrupted_one(student, monkeypatch, tmp_path):
    whole = student("one", save_every_minutes=1e-09, cache_dir=str(tmp_path / "one"))
    broken = student("two", save_every_minutes=1e-09, cache_dir=str(tmp_path / "two"))
    session = open_run_session(whole)
    expected = vqa.train_fold(whole.config, 0, session)
    budget = vqa.pixel_budget(whole.config, session.processor)
    keys = [(digest, *budget) for digest in whole.extra_rows["pixel_hash"]]
    assert session.vision_cache.has_all(keys)
    train_until_step_2(broken.config, monkeypatch)
    shutil.rmtree(tmp_path / "two")  # the next session's disk is empty
    assert student("two", cache_dir=str(tmp_path / "two")).fingerprint == broken.fingerprint
    assert vqa.train_fold(broken.config, 0).adapters == expected.adapters


def test_the_setting_columns_and_one_kind_of_answer_hold_for_the_votes_too(mini_run, dev_data):
    header = DEV_HEADER.replace("question", "Frage")
    data = dev_data(voted("d1", "0,0,1,,2"), voted("d2", "1,1,1,1,1"), header=header)
    with pytest.raises(vqa.DataError, match=r"dev.csv, line 1: columns \['question'\] are missing"):
        mini_run(data_dir=data, use_dev_votes=True)
    run = mini_run(data_dir=data, use_dev_votes=True, columns={"question": "Frage"})
    dev = extra_rows_of_fold(run, 0)
    np.testing.assert_allclose(targets_of(dev), [[0.5, 0.25, 0.25, 0], [0, 1, 0, 0]])


@pytest.mark.parametrize("blank", ["", " ", "\u200b\u3164"], ids=ascii)
def test_a_choice_that_shows_nothing_gets_no_target(blank):
    frame = pd.DataFrame([{"a": "빨강", "b": blank, "c": "파랑", "d": "노랑"}])
    targets = targets_of(vqa._with_targets(frame, np.array([[0.2, 0.6, 0.1, 0.1]])))
    np.testing.assert_allclose(targets, [[0.5, 0, 0.25, 0.25]])


# --- Context --------------------------------------------------------------------------------------


def test_rows_of_dev_csv_show_the_context_of_their_own_column(mini_run, dev_data):
    lines = [voted("d1", "a,a,a,b,c,") + "붉은 것", voted("d2", "b,b,b,b,b,")]
    data = dev_data(*lines, header=f"{DEV_HEADER},context")
    ids = vqa.load_competition(data, 0.5).test["id"]
    file = Path(data) / "context.csv"
    file.write_text(f"id,context\n{ids[0]},푸른 것\n", encoding="utf-8")
    run = mini_run(data_dir=data, use_dev_votes=True, context_tokens=8)
    rows = vqa.Run.open(run.directory).extra_rows
    assert extra_rows_of_fold(run, 0)["context"].tolist() == ["붉은 것", ""]
    assert rows["context"].tolist() == ["붉은 것", ""] * 2
    assert run.fallbacks["dev_rows_without_context"] == 1
    without = mini_run(data_dir=data, use_dev_votes=True, run_name="without")
    assert "context" not in without.extra_rows
