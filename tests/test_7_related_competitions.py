"""Part 7, Related competitions: rows of other folders train, and never validate or leak."""

import math
import shutil
import signal
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from competition_folder import Folder, picture
from fault_run import FORK, Watch
from PIL import Image
from planted import one_hot, planted_run, rows_of_fold
from running import adapter_file, run_all, train_until_step_2

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
    assert vqa.related_row_count(run.config, competition) == 4
    assert vqa.added_row_count(run.config, competition) == 0


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


# --- Pretraining: other rounds' rows first, and then no more --------------------------------------

PRETRAINING = {"pretrain_epochs": 2, "num_epochs": 2, "batch_size": 4, "grad_accum_steps": 1}


@pytest.fixture
def pretrained_run(mini_run, earlier_round):
    """Make a run of fold 0 that pretrains on four rows: two epochs of a step, then of five."""

    def make(**overrides):
        folders = {"extra_train_dirs": (str(earlier_round.root),), "train_folds": (0,)}
        return mini_run(**PRETRAINING | folders | overrides)

    return make


def test_each_phase_has_its_rows_and_its_steps():
    sources = ["train"] * 5 + ["extra_1", "dev", "extra_2"]
    frame = pd.DataFrame({"id": range(8), "source": sources})
    variants = pd.concat([frame.assign(variant=number) for number in (0, 1)], ignore_index=True)
    config = vqa.Config(extra_train_dirs=("one", "two"), **PRETRAINING)
    first, second = vqa.plan_training(config, variants).phases
    assert first.rows["id"].tolist() == [5, 7]
    assert first.variants["id"].tolist() == [5, 7, 5, 7]
    assert second.rows["id"].tolist() == [0, 1, 2, 3, 4, 6]
    schedule = vqa.plan_training(config, variants)
    assert [schedule.phase(epoch).steps for epoch in range(5)] == [1, 1, 2, 2, 2]
    before = [schedule.phase(epoch).steps_before(epoch) for epoch in range(5)]
    assert before == [0, 1, 2, 4, 6]
    assert (schedule.all_steps, schedule.all_rows) == (6, 2 * 2 + 2 * 6)
    joined = vqa.plan_training(vqa.Config(extra_train_dirs=("one", "two")), variants)
    assert [len(phase.rows) for phase in joined.phases] == [8]


@pytest.mark.slow
def test_pretraining_trains_on_the_other_rows_first_and_then_no_more(pretrained_run, monkeypatch):
    stopping = {"use_early_stopping": True, "early_stopping_patience": 1, "learning_rate": 1e-9}
    run = pretrained_run(pretrain_epochs=1, use_swa=True, **stopping)
    shown = defaultdict(set)
    updates = Counter()
    prompts = vqa.training_prompts
    update = vqa.WeightAverager.update

    def noted(session, config, variants, n_rows, epoch):
        shown[epoch] |= set(variants["source"])
        return prompts(session, config, variants, n_rows, epoch)

    def counted(averager):
        updates[averager.kind] += 1
        update(averager)

    monkeypatch.setattr(vqa, "training_prompts", noted)
    monkeypatch.setattr(vqa.WeightAverager, "update", counted)
    result = vqa.train_fold(run.config, 0)
    assert shown == {0: {"extra_1"}, 1: {"train"}, 2: {"train"}}
    # Without any gain early stopping, of one epoch's patience, lets two own epochs pass.
    assert result.history["rows"].tolist() == ["pretraining", "own", "own"]
    assert result.history["epoch"].tolist() == [1, 2, 3]
    assert result.history["nll"].notna().all()
    assert result.best_epoch > 1
    assert updates == {"ema": 10, "swa": 5}
    steps = vqa.read_json_lines(run.fold_dir(0) / "metrics.jsonl")
    assert [record["epoch"] for record in steps] == [0] + [1] * 5 + [2] * 5
    rates = [float(record["lr"]) for record in steps]
    assert rates[0] == max(rates)  # one schedule: no second warm-up
    newest = vqa.CheckpointManager(run.fold_dir(0) / "checkpoints").latest_verified()
    assert newest.name == "step_00000011"
    axes = vqa.plot_learning_curves([result])
    [border] = [line for line in axes[0].lines if line.get_label() == "_pretraining"]
    assert list(border.get_xdata()) == [1.5, 1.5]


@pytest.mark.slow
def test_where_time_ends_in_pretraining_its_weights_are_kept(pretrained_run):
    run = pretrained_run(time_budget_hours=1e-9)
    vqa.atomic_write(run.directory / "session.json", '{"started": 0}')
    result = vqa.train_fold(run.config, 0)
    assert (result.best_epoch, list(result.kinds)) == (1, ["raw"])
    assert adapter_file(run, 0, "raw").exists()


def test_pretraining_needs_rows_to_pretrain_on(mini_run, mini_data, earlier_round):
    with pytest.raises(ValueError, match="'pretrain_epochs' is 1; it needs extra_train_dirs, whos"):
        vqa.Config(pretrain_epochs=1)
    own = mini_data / "images" if (mini_data / "images").is_dir() else mini_data
    for number in range(4):
        image = earlier_round.root / "train" / f"{number}.png"
        shutil.copy(own / "test" / "test_0001.jpg", image)
    with pytest.raises(vqa.DataError, match="Fold 0 has no row to pretrain on: all rows of extra"):
        mini_run(extra_train_dirs=(str(earlier_round.root),), pretrain_epochs=1)


def test_images_are_used_in_the_epochs_that_show_them(pretrained_run):
    """By this the vision cache is filled, or not."""
    run = pretrained_run(pretrain_epochs=8, augment_images=1)
    frames = vqa.training_images(run)
    uses = {"train": set(), "extra_1": set()}
    for frame, count in frames:
        for source in set(frame.get("source", ["train"])):
            uses[source].add(count)
    assert uses == {"train": {3}, "extra_1": {4}}
    images = pd.concat([frame for frame, _ in frames])["pixel_hash"]
    rows = vqa.image_variants(vqa.all_rows(run), run.config.augment_images, run.config.seed)
    assert set(images) == set(rows["pixel_hash"])


def test_a_search_does_not_judge_by_epochs_of_pretraining(pretrained_run):
    run = pretrained_run()
    history = pd.DataFrame({"epoch": [1, 2, 3, 4], "nll": [9.0, 8.0, 0.9, 0.8]})
    vqa.write_table(history, run.fold_dir(0) / "history.csv")
    reported = []
    trial = SimpleNamespace(
        report=lambda loss, epoch: reported.append((epoch, loss)),
        should_prune=lambda: reported[-1] == (2, 0.8),  # of the last epoch, where it is too late
    )
    assert not vqa.TrialWatch(trial, run, deadline=math.inf).is_pruned()
    assert reported == [(1, 0.9), (2, 0.8)]


@pytest.mark.slow
def test_the_report_says_which_rows_came_first(pretrained_run):
    run = planted_run(pretrained_run())
    vqa.atomic_write(run.directory / "selection.json", '{"weights": "raw"}')
    report = vqa.write_report(run, vqa.evaluate_run(run)).read_text("utf-8")
    assert "on rows of related competitions first (epochs: 2), and then on its own rows" in report


def test_context_of_another_folder_comes_with_its_rows(
    mini_run, mini_data, earlier_round, tmp_path
):
    data = shutil.copytree(mini_data, tmp_path / "with_context")
    for name in ("train.csv", "test.csv"):
        table = pd.read_csv(data / name, dtype=str, keep_default_na=False)
        table.assign(context="own").to_csv(data / name, index=False)
    settings = {"data_dir": str(data), "extra_train_dirs": (str(earlier_round.root),)}
    run = mini_run(**settings, context_tokens=8)
    assert related_rows(run, 0)["context"].tolist() == [""] * 4
    assert run.fallbacks["extra_1_rows_without_context"] == 4
    rows = "id,text\ntrain_0001,a sign\n"
    (earlier_round.root / "context.csv").write_text(rows, encoding="utf-8")
    run = mini_run(**settings, context_tokens=8, run_name="file")
    assert related_rows(run, 0)["context"].tolist() == ["", "a sign", "", ""]
    assert "context" not in mini_run(**settings, run_name="none").extra_rows


# --- Pretraining, killed and resumed --------------------------------------------------------------


def train_until_killed(config, place, number):
    """Train fold 0 until SIGKILL: after so many steps, or where so many epochs end."""
    kind = {"epoch": "at the end of an epoch", "step": "after an optimizer step"}[place]
    folder = Path(config.output_dir) / f"killed at {place} {number}"
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    Watch(folder, kind, number).install()
    vqa.train_fold(config, 0)


@pytest.mark.slow
def test_pretraining_that_was_killed_ends_with_the_same_bytes(pretrained_run):
    """Killed within pretraining, at its end, and after the first step that follows."""

    def start(name):
        settings = {"num_epochs": 1, "lora_dropout": 0.1, "save_every_steps": 1}
        return pretrained_run(run_name=name, **settings)

    expected = vqa.train_fold(start("whole").config, 0)
    for place, number in (("step", 1), ("epoch", 2), ("step", 3)):
        run = start(f"{place} {number}")
        process = FORK.Process(target=train_until_killed, args=(run.config, place, number))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert vqa.train_fold(run.config, 0).adapters == expected.adapters


@pytest.mark.slow
def test_the_model_on_all_rows_pretrains_as_the_folds_did(pretrained_run):
    run = run_all(pretrained_run(final_retrain=True, num_epochs=1))
    vqa.select_weights(run)
    assert vqa.final_epochs(run) == 3
    result = vqa.train_fold(run.config, run.final_fold)
    assert result.history["rows"].tolist() == ["pretraining"] * 2 + ["own"]
