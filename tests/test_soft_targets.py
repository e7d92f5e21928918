"""Soft targets: what the loss makes of them, where votes and another run's answers may go, and that nothing leaks."""

import functools
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import perturb_adapter
from test_evaluation import planted_run

import vqa_helpers as vqa

TARGETS = [*vqa.TARGET_COLUMNS]
VOTED = "{id},train/{image},{question},빨강,파랑,노랑,,{votes}"


def targets_of(frame):
    return frame[TARGETS].to_numpy()


# The loss --------------------------------------------------------------------------------------------------------


def reference_loss(session, states, batch, wanted, smoothing):
    """Cross-entropy with soft targets, row by row in the order of the original choices, over those that exist."""
    losses = []
    for scores, prompt, target in zip(
        vqa.answer_scores(session, states), batch["prompts"], wanted, strict=True
    ):
        original = {choice: scores[position] for position, choice in enumerate(prompt.orders[0])}
        exist = [choice for choice in range(4) if prompt.present_choices[choice]]
        log_probabilities = torch.log_softmax(
            torch.stack([original[choice] for choice in exist]), dim=0
        )
        smoothed = [(1 - smoothing) * target[choice] + smoothing / len(exist) for choice in exist]
        losses.append(-(torch.tensor(smoothed) * log_probabilities).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradients_of_soft_targets_equal_a_plain_reference(
    session, demo_rows, replace, smoothing
):
    session.config = replace(session.config, label_smoothing=smoothing)
    frame = demo_rows.train.head(3).copy()
    frame.loc[1, "c"] = ""
    wanted = np.array([[0.7, 0.1, 0.2, 0.0], [0.5, 0.25, 0.0, 0.25], [0.0, 1.0, 0.0, 0.0]])
    frame[TARGETS] = wanted
    model = perturb_adapter(vqa.attach_lora(session.model, session.config, seed=0)).train()
    orders = [(2, 0, 3, 1), (3, 2, 1, 0), (0, 1, 2, 3)]
    batch = vqa.collate(
        session, [vqa.make_prompt(session, frame, row, [order]) for row, order in enumerate(orders)]
    )
    results = []
    for loss in (vqa.training_loss, lambda *given: reference_loss(*given, wanted, smoothing)):
        model.zero_grad()
        value = loss(session, vqa.answer_hidden_states(session, batch), batch)
        value.backward()
        gradients = [
            parameter.grad.flatten() for parameter in vqa.trainable_parameters(model).values()
        ]
        results.append((value.item(), torch.cat(gradients)))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert ours == pytest.approx(theirs, rel=1e-6) and their_gradients.norm() > 1e-3
    assert (our_gradients - their_gradients).norm() <= 1e-5 * their_gradients.norm()


def test_a_label_written_as_a_soft_target_trains_the_same_bytes(mini_run):
    hard, soft = (mini_run(run_name=name, lora_dropout=0.1) for name in ("hard", "soft"))
    table = soft.train.assign(**dict(zip(TARGETS, np.eye(4)[soft.train["label"]].T, strict=True)))
    vqa.write_table(table, soft.directory / "folds.csv")
    assert vqa.train_fold(hard.config, 0).adapters == vqa.train_fold(soft.config, 0).adapters


@pytest.mark.parametrize(
    "field", [{"use_dev_votes": True}, {"distill_from": "x"}, {"pseudo_label_from": "x"}]
)
def test_soft_targets_are_refused_for_a_loss_over_all_tokens(field):
    with pytest.raises(
        ValueError, match="'loss' is 'vocabulary'; it needs 'choices' where targets are soft"
    ):
        vqa.Config(loss="vocabulary", **field)


# Votes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dev_data(mini_data, tmp_path):
    """Write the mini competition with these lines of dev.csv: dev_data("id,path,...") -> folder."""

    def make(*lines, header="id,path,question,a,b,c,d,answer1,answer2,answer3,answer4,answer5"):
        folder = shutil.copytree(mini_data, tmp_path / "with_dev")
        for number in (50, 51):
            shutil.copy(vqa.DEMO / "images" / "train" / f"train_00{number}.jpg", folder / "train")
        (folder / "dev.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
        return str(folder)

    return make


def voted(name, votes, image="train_0050.jpg", question="무슨 색입니까?"):
    return VOTED.format(id=name, image=image, question=question, votes=votes)


def test_votes_become_shares_and_rows_without_one_are_counted(mini_run, dev_data):
    rows = (
        voted("d1", "a,a,a,b,c"),
        voted("d2", "b,,(B),,빨강"),
        voted("d3", ",, ,,"),
        voted("d4", "c,c,c,c,c", "no.jpg"),
    )
    run = mini_run(data_dir=dev_data(*rows), use_dev_votes=True)
    for fold in (0, 1):
        dev = run.extra_rows[run.extra_rows["fold"] == fold]
        assert dev["id"].tolist() == ["d1", "d2"]
        np.testing.assert_allclose(targets_of(dev), [[0.6, 0.2, 0.2, 0], [1 / 3, 2 / 3, 0, 0]])
        trained = vqa.training_rows(run, fold)
        assert trained["source"].value_counts().to_dict() == {"train": 18, "dev": 2}
    expected = {"dev_blank_votes": 7, "dev_no_vote": 1, "dev_unusable_image": 1}
    assert expected.items() <= run.fallbacks.items()
    assert vqa.source_table(run).to_numpy().tolist() == [[18, 2], [18, 2]]
    plain = mini_run(run_name="plain")
    assert run.train["id"].tolist() == plain.train["id"].tolist()  # never validated on
    assert np.array_equal(targets_of(run.train), np.eye(4)[run.train["label"]])


def test_a_model_on_all_rows_trains_on_all_votes_and_every_variant_stays_beside_its_row(
    mini_run, dev_data
):
    data = dev_data(voted("d1", "a,a,a,a,a", "train_0001.jpg"), voted("d2", "b,b,b,b,b"))
    run = mini_run(data_dir=data, use_dev_votes=True, final_retrain=True, augment_images=2)
    assert vqa.source_table(run).loc[run.final_fold].to_dict() == {
        "train": len(run.train),
        "dev": 2,
    }
    variants = vqa.image_variants(vqa.all_rows(run), 2, seed=1)
    for fold in run.models_to_train:
        rows, shown = vqa.training_rows(run, fold), vqa.training_rows(run, fold, variants)
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


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            voted("d2", "a,a,e,a,a"),
            "dev.csv, line 3, column 'answer3', value 'e': does not mean exactly one filled",
        ),
        (
            voted("d2", "a,a,a,a,d"),
            "dev.csv, line 3, column 'answer5', value 'd': does not mean exactly one filled",
        ),
        (voted("d1", "a,a,a,a,a"), "dev.csv, line 3, column 'id', value 'd1': is blank or repeats"),
        (voted("d2", "a,a,a,a"), "dev.csv, line 3, row 'd2': 11 fields but 12 columns"),
        (
            voted("d2", ",,,,"),
            "dev.csv, line 3, column 'answer1', value '': no vote; no_vote in 1 of 2 rows",
        ),
    ],
)
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
        header="id,path,question,a,b,c,d," + "answer1," * 3 + "x",
    )
    with pytest.raises(vqa.DataError, match=r"dev.csv, line 1: columns \['answer1', 'answer2'"):
        mini_run(data_dir=data, use_dev_votes=True)


# Another run's probabilities -------------------------------------------------------------------------------------


@pytest.fixture
def teacher(mini_run):
    return planted_run(mini_run(run_name="teacher"), signals=(1.0, 1.0))


def test_distilled_targets_mix_labels_with_the_teachers_oof_probabilities(mini_run, teacher):
    run = mini_run(distill_from=str(teacher.directory), distill_weight=0.3)
    evaluation = vqa.evaluate_run(teacher)
    assert evaluation.oof.frame["id"].tolist() == run.train["id"].tolist()
    expected = 0.7 * np.eye(4)[run.train["label"]] + 0.3 * evaluation.probabilities
    np.testing.assert_allclose(
        targets_of(run.train), expected, rtol=0, atol=1e-4
    )  # rounded, see TARGET_DECIMALS
    np.testing.assert_allclose(targets_of(run.train).sum(axis=1), 1)
    again = vqa.Run.open(run.directory)  # what every worker reads
    for fold in (0, 1):
        pd.testing.assert_frame_equal(vqa.training_rows(run, fold), vqa.training_rows(again, fold))
        assert np.array_equal(targets_of(again.train), targets_of(run.train))


def test_rows_are_taught_by_id_although_the_teacher_has_other_folds(mini_run, teacher):
    run = mini_run(distill_from=str(teacher.directory), seed=7)
    assert not np.array_equal(run.train["fold"], teacher.train["fold"])
    assert np.array_equal(run.train["teacher_fold"], teacher.train["fold"])


def test_a_blank_choice_is_never_a_target():
    frame = pd.DataFrame({"a": ["x"], "b": [" "], "c": ["y"], "d": ["z"]})
    assert targets_of(vqa._with_targets(frame, np.array([[0.4, 0.2, 0.4, 0.0]]))).tolist() == [
        [0.5, 0, 0.5, 0]
    ]


def test_pseudo_labels_of_a_fold_come_from_the_teachers_same_fold(mini_run, teacher):
    run = mini_run(pseudo_label_from=str(teacher.directory), pseudo_label_confidence=0.6)
    probabilities = vqa.predict_test(teacher, vqa.evaluate_run(teacher))
    sure = {}
    for fold in (0, 1):
        joined = run.extra_rows[run.extra_rows["fold"] == fold]
        sure[fold] = run.test["id"][probabilities[fold].max(axis=1) >= 0.6].tolist()
        assert joined["id"].tolist() == sure[fold] and 0 < len(joined) < len(run.test)
        expected = pd.DataFrame(probabilities[fold], run.test["id"]).loc[joined["id"]]
        np.testing.assert_allclose(targets_of(joined), expected, rtol=0, atol=1e-4)
    assert sure[0] != sure[1]


def test_where_the_teacher_is_sure_of_nothing_only_the_training_rows_are_trained_on(
    mini_run, teacher
):
    run = mini_run(pseudo_label_from=str(teacher.directory), pseudo_label_confidence=1.0)
    again = mini_run(pseudo_label_from=str(teacher.directory), pseudo_label_confidence=1.0)
    assert again.extra_rows.empty and vqa.source_table(run).to_dict("index") == {
        0: {"train": 18},
        1: {"train": 18},
    }
    assert (
        vqa.training_rows(run, 0)["id"].tolist() == run.train["id"][run.train["fold"] != 0].tolist()
    )


def test_a_test_row_without_an_image_or_with_a_copy_of_a_validation_image_is_left_out(
    mini_run, mini_data, tmp_path, monkeypatch
):
    data = shutil.copytree(mini_data, tmp_path / "copies")
    shutil.copy(data / "train" / "train_0001.jpg", data / "test" / "test_0001.jpg")
    (data / "test" / "test_0002.jpg").unlink()
    monkeypatch.setattr(
        vqa, "load_competition", functools.partial(vqa.load_competition, max_fallback_share=0.5)
    )
    teacher = planted_run(mini_run(data_dir=str(data), run_name="teacher"))
    settings = {"pseudo_label_from": str(teacher.directory), "pseudo_label_confidence": 0.25}
    run = mini_run(data_dir=str(data), **settings)
    fold = run.train.set_index("id").loc["train_0001", "fold"]
    joined = {
        number: set(run.extra_rows["id"][run.extra_rows["fold"] == number]) for number in (0, 1)
    }
    assert joined[fold] == set(run.test["id"]) - {"test_0001", "test_0002"}
    assert joined[1 - fold] == joined[fold] | {"test_0001"}
    assert run.fallbacks[f"test_copies_left_out_of_fold_{fold}"] == 1


@pytest.mark.parametrize(
    ("field", "spoil", "message"),
    [
        (
            "distill_from",
            {"directory": "nowhere"},
            "no run lies in .*nowhere; give the folder of a finished run",
        ),
        (
            "distill_from",
            {"train_folds": (0,)},
            "no out-of-fold probabilities for 18 rows, such as .* train all its",
        ),
        (
            "distill_from",
            {"unfinished": True},
            r"its folds \[1\] are not finished; run it to its end first",
        ),
        (
            "distill_from",
            {"label": True},
            r"1 of its training rows or labels are others, such as \['train_0001'\]",
        ),
        ("pseudo_label_from", {"data": True}, "it was made from other texts, test rows or pixels"),
        (
            "pseudo_label_from",
            {"train_folds": (1,)},
            r"has not trained the folds \[0\]; train them there",
        ),
        (
            "pseudo_label_from",
            {"seed": 7},
            "rows in other folds, such as .*; take its n_folds and seed",
        ),
    ],
)
def test_an_unsuitable_teacher_is_refused(mini_run, mini_data, tmp_path, field, spoil, message):
    settings = {name: spoil[name] for name in ("train_folds", "seed") if name in spoil}
    if "data" in spoil:
        settings["data_dir"] = str(shutil.copytree(mini_data, tmp_path / "other"))
        table = tmp_path / "other" / "test.csv"
        table.write_text(table.read_text("utf-8") + "\n", encoding="utf-8")
    teacher = planted_run(mini_run(run_name="teacher", **settings))
    if "unfinished" in spoil:
        (teacher.fold_dir(1) / "test.npz").unlink()
    if "label" in spoil:
        labels = teacher.train["label"].where(
            teacher.train["id"] != "train_0001", lambda label: (label + 1) % 4
        )
        vqa.write_table(teacher.train.assign(label=labels), teacher.directory / "folds.csv")
    with pytest.raises(ValueError, match=message):
        mini_run(**{field: spoil.get("directory", str(teacher.directory))})


# Leaks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def student(mini_run, teacher, dev_data):
    """A run with votes, distillation and pseudo-labels at once."""
    data = dev_data(
        voted("d1", "a,a,a,b,c"),
        voted("d2", "b,b,a,,", "train_0051.jpg"),
        voted("d3", "a,a,a,a,a", "train_0001.jpg"),
    )
    source = str(teacher.directory)
    settings = {
        "use_dev_votes": True,
        "distill_from": source,
        "pseudo_label_from": source,
        "data_dir": data,
    }
    return lambda name="student", **more: mini_run(
        run_name=name, pseudo_label_confidence=0.5, **settings | more
    )


def test_no_row_validates_its_own_fold_and_no_target_comes_from_a_model_that_saw_its_row(
    student, teacher
):
    run = student()
    assert set(run.extra_rows["source"]) == {"dev", "test"}
    for fold in (0, 1):
        rows, held_out = vqa.training_rows(run, fold), run.train[run.train["fold"] == fold]
        assert not set(rows["id"]) & set(held_out["id"])
        assert not set(rows["pixel_hash"]) & set(held_out["pixel_hash"])
        taught = rows[rows["source"] == "train"]
        teacher_fold = teacher.train.set_index("id")["fold"][taught["id"]].to_numpy()
        assert np.array_equal(
            taught["teacher_fold"], teacher_fold
        )  # the teacher's fold that did not train on the row
        assert (rows["teacher_fold"][rows["source"] == "test"] == fold).all()
        assert (rows["teacher_fold"][rows["source"] == "dev"] == -1).all()


def test_a_planted_leak_is_found(student, teacher, replace):
    run, teachers = student(), {"train": teacher, "test": teacher}
    vqa.check_no_leak(run, teachers)
    first = run.train[run.train["fold"] == 0].head(1)
    again = first.assign(
        source="train", fold=1
    )  # the same row once more, as if another fold held it out
    with pytest.raises(
        vqa.DataError,
        match=r"Fold 0: a training row also validates it: 1 rows, such as \[\('train'",
    ):
        vqa.check_no_leak(replace(run, extra_rows=pd.concat([run.extra_rows, again])), teachers)
    with pytest.raises(
        vqa.DataError, match="Fold 0: a training row shows an image that validates it: 1 rows"
    ):
        vqa.check_no_leak(
            replace(
                run, extra_rows=pd.concat([run.extra_rows, again.assign(source="dev", fold=0)])
            ),
            teachers,
        )
    swapped = run.train.assign(teacher_fold=1 - run.train["teacher_fold"])
    with pytest.raises(
        vqa.DataError, match="Fold 0: a target comes from fold 0 of .*, trained on its row: 18 rows"
    ):
        vqa.check_no_leak(replace(run, train=swapped), teachers)


def test_pseudo_labels_of_a_teacher_that_trained_on_pseudo_labels_are_refused(mini_run, teacher):
    settings = {"pseudo_label_from": str(teacher.directory), "pseudo_label_confidence": 0.3}
    second = planted_run(mini_run(run_name="second", **settings))
    with pytest.raises(
        vqa.DataError, match=r"Fold 0: a target comes from fold 0 of .*second, trained on its row"
    ):
        mini_run(run_name="third", **settings | {"pseudo_label_from": str(second.directory)})


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


# Continuing ------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Stands for the end of a session."""


@pytest.mark.slow
def test_a_resumed_student_ends_bitwise_like_an_uninterrupted_one(student, monkeypatch, tmp_path):
    whole, broken = (
        student(name, save_every_minutes=1e-9, cache_dir=str(tmp_path / name))
        for name in ("one", "two")
    )
    session = vqa.open_session(whole.config, whole.train.iloc[0])
    expected, step = vqa.train_fold(whole.config, 0, session), vqa.FoldTrainer.optimizer_step
    budget = vqa.pixel_budget(whole.config, session.processor)
    assert session.vision_cache.has_all(
        (digest, *budget) for digest in whole.extra_rows["pixel_hash"]
    )

    def stopping(self, epoch, number, *rest):
        if number == 2:
            raise Stop
        return step(self, epoch, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(vqa.FoldTrainer, "optimizer_step", stopping)
        vqa.train_fold(broken.config, 0)
    shutil.rmtree(tmp_path / "two")  # the next session's disk is empty
    assert student("two", cache_dir=str(tmp_path / "two")).fingerprint == broken.fingerprint
    assert vqa.train_fold(broken.config, 0).adapters == expected.adapters


def test_a_changed_teacher_refuses_to_continue_and_a_moved_one_does_not(
    mini_run, teacher, tmp_path
):
    run = mini_run(run_name="student", distill_from=str(teacher.directory))
    moved = shutil.copytree(teacher.directory, tmp_path / "elsewhere" / "teacher")
    again = mini_run(run_name="student", distill_from=str(moved))
    assert (
        again.fingerprint == run.fingerprint and again.config.fingerprint == run.config.fingerprint
    )
    planted_run(teacher, signals=(1.0, 1.1))
    with pytest.raises(vqa.CheckpointError, match=r"made with other targets \(.*rows \['train_00"):
        mini_run(run_name="student", distill_from=str(teacher.directory))


def test_changed_votes_refuse_to_continue(mini_run, dev_data):
    data = dev_data(voted("d1", "a,a,a,b,c"))
    mini_run(run_name="student", data_dir=data, use_dev_votes=True)
    table = Path(data) / "dev.csv"
    table.write_text(table.read_text("utf-8").replace("a,a,a,b,c", "a,a,b,b,c"), encoding="utf-8")
    with pytest.raises(
        vqa.CheckpointError, match=r"made with other targets \(rows \['d1 \(train_0050.jpg\)'\]"
    ):
        mini_run(run_name="student", data_dir=data, use_dev_votes=True)
