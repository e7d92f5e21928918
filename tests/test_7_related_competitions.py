"""Part 7, Related competitions: rows of other folders train, and never validate or leak."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from competition_folder import Folder, picture
from PIL import Image
from planted import one_hot, planted_run, rows_of_fold
from running import train_until_step_2

import vqa_helpers as vqa

HEADER = "id,path,question,a,b,c,d,answer"
ROW = "{},train/{},무슨 색입니까?,빨강,파랑,노랑,,{}"


@pytest.fixture
def earlier_round(mini_data, tmp_path):
    """A folder of four rows, whose ids are those of the competition's own rows."""
    folder = tmp_path / "round1"
    folder.mkdir()
    earlier = Folder(folder)
    rows = [
        ROW.format(f"train_{number:04d}", f"{number}.png", "abca"[number]) for number in range(4)
    ]
    earlier.write("train", HEADER, rows)
    ids = set(pd.read_csv(mini_data / "train.csv")["id"])
    assert {"train_0001", "train_0002"} <= ids
    return earlier


def related_rows(run, fold):
    rows = vqa.training_rows(run, fold)
    return rows[rows["source"] == "extra_1"]


# --- Rows that join -------------------------------------------------------------------------------


def test_rows_of_another_folder_join_every_training_and_no_validation(mini_run, earlier_round):
    plain = mini_run(run_name="plain")
    run = mini_run(extra_train_dirs=(str(earlier_round.root),), final_retrain=True)
    assert vqa.source_table(run).to_dict("index") == {
        0: {"train": 18, "extra_1": 4},
        1: {"train": 18, "extra_1": 4},
        2: {"train": 36, "extra_1": 4},
    }
    again = vqa.Run.open(run.directory)  # what every worker reads
    for fold in run.models_to_train:
        related = related_rows(again, fold)
        assert related["id"].tolist() == [f"extra_1/train_{number:04d}" for number in range(4)]
        assert [vqa.target_probabilities(row) for _, row in related.iterrows()] == [
            tuple(row) for row in one_hot([0, 1, 2, 0])
        ]
        assert vqa.load_image(related["image_path"].iloc[0]).size == (48, 36)
    pd.testing.assert_frame_equal(run.train, plain.train)  # nothing more validates
    assert run.fingerprint != plain.fingerprint


def test_a_run_without_other_folders_is_what_it_was(mini_run):
    run = mini_run()
    assert run.extra_rows.empty
    assert not (run.directory / "extra_rows.csv").exists()
    assert not any("extra" in name for name in run.fallbacks)


def test_beside_votes_the_labels_of_another_folder_become_targets(
    mini_run, mini_data, earlier_round, tmp_path
):
    data = shutil.copytree(mini_data, tmp_path / "with_dev")
    picture(5).save(data / "dev.png")
    header = "id,path,question,a,b,c,d,answer1,answer2,answer3,answer4,answer5"
    votes = "d1,dev.png,무슨 색입니까?,빨강,파랑,노랑,,a,a,a,a,b"
    (data / "dev.csv").write_text(f"{header}\n{votes}\n", encoding="utf-8")
    run = mini_run(
        data_dir=str(data), use_dev_votes=True, extra_train_dirs=(str(earlier_round.root),)
    )
    for fold in (0, 1):
        rows = vqa.training_rows(run, fold).set_index("source")
        targets = rows[[*vqa.TARGET_COLUMNS]]
        np.testing.assert_allclose(targets.loc[["dev"]], [[0.8, 0.2, 0, 0]])
        np.testing.assert_allclose(targets.loc["extra_1"], one_hot([0, 1, 2, 0]))
        assert rows.loc["extra_1", "teacher_fold"].tolist() == [-1] * 4


def test_the_report_and_the_estimate_know_the_rows_and_they_are_no_oof_rows(
    mini_run, earlier_round
):
    run = planted_run(mini_run(extra_train_dirs=(str(earlier_round.root),)))
    vqa.atomic_write(run.directory / "selection.json", '{"weights": "raw"}')
    evaluation = vqa.evaluate_run(run)
    assert set(evaluation.oof.frame["id"]) == set(run.train["id"])
    report = vqa.write_report(run, evaluation).read_text("utf-8")
    assert f"`extra_1` is `{earlier_round.root}`. They validate nothing" in report
    assert "extra_1_copies_of_test_images_left_out" in report
    competition = vqa.load_competition(run.config.data_dir, max_fallback_share=0.5)
    assert vqa.added_row_count(run.config, competition) == 4


# --- Copies ---------------------------------------------------------------------------------------


def brighter(path):
    """A near copy: a little lighter in each pixel, so that its content hash is another."""
    return Image.open(path).convert("RGB").point(lambda value: min(255, value + 1))


def test_planted_copies_of_validation_and_test_images_are_left_out(
    mini_run, mini_data, earlier_round
):
    own = mini_data / "images" if (mini_data / "images").is_dir() else mini_data
    images = earlier_round.root / "train"
    shutil.copy(own / "train" / "train_0001.jpg", images / "0.png")
    brighter(own / "train" / "train_0002.jpg").save(images / "1.png")
    shutil.copy(own / "test" / "test_0001.jpg", images / "2.png")
    brighter(own / "test" / "test_0002.jpg").save(images / "3.png")
    picture(77).save(images / "4.png")
    rows = [ROW.format(f"r{number}", f"{number}.png", "a") for number in range(5)]
    earlier_round.write("train", HEADER, rows)

    run = mini_run(extra_train_dirs=(str(earlier_round.root),), final_retrain=True)
    fold_of = run.train.set_index("id")["fold"]
    for fold in run.models_to_train:
        expected = {"extra_1/r4"}
        if fold_of["train_0001"] != fold:
            expected.add("extra_1/r0")
        if fold_of["train_0002"] != fold:
            expected.add("extra_1/r1")
        assert set(related_rows(run, fold)["id"]) == expected
    assert run.fallbacks["extra_1_copies_of_test_images_left_out"] == 2
    left_out = [run.fallbacks.get(f"extra_1_copies_left_out_of_fold_{fold}", 0) for fold in (0, 1)]
    assert sum(left_out) == 2


def test_a_planted_leak_of_a_test_image_is_found(mini_run, earlier_round, replace):
    run = mini_run(extra_train_dirs=(str(earlier_round.root),))
    vqa.check_no_leak(run, {})
    leak = run.extra_rows.head(1).assign(pixel_hash=run.test["pixel_hash"].iloc[0])
    leaking = replace(run, extra_rows=pd.concat([run.extra_rows, leak]))
    with pytest.raises(
        vqa.DataError, match="Fold 0: a row of extra_train_dirs shows a test image: 1 rows"
    ):
        vqa.check_no_leak(leaking, {})
    validating = rows_of_fold(run, 0)["pixel_hash"].iloc[0]
    leak = leak.assign(pixel_hash=validating, fold=0)
    leaking = replace(run, extra_rows=pd.concat([run.extra_rows, leak]))
    with pytest.raises(vqa.DataError, match="Fold 0: a training row shows an image that validates"):
        vqa.check_no_leak(leaking, {})


# --- Continued, and refused -----------------------------------------------------------------------


def test_other_rows_refuse_to_continue_and_a_moved_folder_does_not(
    mini_run, earlier_round, tmp_path
):
    run = mini_run(run_name="one", extra_train_dirs=(str(earlier_round.root),))
    moved = shutil.copytree(earlier_round.root, tmp_path / "elsewhere" / "round1")
    again = mini_run(run_name="one", extra_train_dirs=(str(moved),))
    assert again.fingerprint == run.fingerprint
    table = moved / "train.csv"
    table.write_text(table.read_text("utf-8").replace(",,b", ",,c"), encoding="utf-8")
    with pytest.raises(
        vqa.CheckpointError, match=r"made with other targets \(.*rows \['extra_1/train_0001 \(1.png"
    ):
        mini_run(run_name="one", extra_train_dirs=(str(moved),))


def test_a_bad_row_is_named_with_its_folder(mini_run, earlier_round):
    earlier_round.write("train", HEADER, [ROW.format("r1", "0.png", "e")])
    with pytest.raises(vqa.DataError) as caught:
        mini_run(extra_train_dirs=(str(earlier_round.root),))
    place = f"Folder {earlier_round.root} of extra_train_dirs: train.csv, line 2, column 'answer'"
    assert place in str(caught.value)


def test_places_that_are_no_other_competition_are_refused(mini_run, mini_data, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing must hold one competition, .*; it holds none: "):
        mini_run(extra_train_dirs=(str(tmp_path / "nothing"),))
    with pytest.raises(ValueError, match="is data_dir or named twice; leave it out"):
        mini_run(extra_train_dirs=(str(mini_data),))
    for names in (("x", "x"), ("",), (3,)):
        with pytest.raises(ValueError, match="'extra_train_dirs' .* needs paths of folders, none"):
            vqa.Config(extra_train_dirs=names)


def test_a_table_of_ones_own_can_be_trained_on(mini_run, tmp_path):
    table = pd.DataFrame(
        {
            "id": ["q1", "q2"],
            "path": [picture(1), picture(2)],
            "question": "무슨 색입니까?",
            **dict.fromkeys("abcd", ""),
            "answer": ["a", "b"],
        }
    ).assign(a="빨강", b="파랑")
    folder = vqa.write_competition(table, tmp_path / "own")
    run = mini_run(extra_train_dirs=(str(folder),))
    assert related_rows(run, 0)["answer"].tolist() == ["a", "b"]
    assert Path(related_rows(run, 0)["image_path"].iloc[0]) == folder / "images" / "000001.png"


# --- Stopped and resumed --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_training_on_related_rows_ends_bitwise_like_an_uninterrupted_one(
    mini_run, earlier_round, monkeypatch, tmp_path
):
    def start(name, folder):
        return mini_run(
            run_name=name,
            extra_train_dirs=(str(folder),),
            save_every_minutes=1e-09,
            cache_dir=str(tmp_path / name),
        )

    whole = start("one", earlier_round.root)
    broken = start("two", earlier_round.root)
    expected = vqa.train_fold(whole.config, 0)
    train_until_step_2(broken.config, monkeypatch)
    moved = tmp_path / "elsewhere" / "round1"
    shutil.copytree(earlier_round.root, moved)
    shutil.rmtree(earlier_round.root)
    shutil.rmtree(tmp_path / "two")  # the next session's disk is empty
    assert start("two", moved).fingerprint == broken.fingerprint
    assert vqa.train_fold(broken.config, 0).adapters == expected.adapters
    plain = mini_run(run_name="plain", cache_dir=str(tmp_path / "one"))
    assert vqa.train_fold(plain.config, 0).adapters != expected.adapters
