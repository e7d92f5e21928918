"""What was built apart works together: backups, the model on all rows, 16-bit scores, soft targets, several devices."""

import json
import shutil

import numpy as np
import pytest
from test_evaluation import VIEWS, planted_run

import vqa_helpers as vqa


def write_result(run, fold, raw, ema):
    kinds = {kind: {"accuracy": 0.5, "nll": nll} for kind, nll in (("raw", raw), ("ema", ema))}
    content = {"fold": fold, "best_epoch": 1, "kinds": kinds, "history": [], "adapters": {}}
    vqa.atomic_write(run.fold_dir(fold) / "result.json", json.dumps(content))


def write_scores(run, fold, value, ending=""):
    names = [view + vqa.SUFFIX_16_BIT * bool(ending) for view in VIEWS]
    for name, frame in (("oof", run.train[run.train["fold"] == fold]), ("test", run.test)):
        logits = np.random.default_rng(fold).normal(value, size=(len(frame), len(names), 4))
        vqa.write_logits(
            run.fold_dir(fold) / f"{name}{ending}.npz", frame, logits, names, run.fingerprint
        )


def test_scores_by_weights_that_are_no_longer_used_do_not_come_back_from_the_backup(
    mini_run, tmp_path
):
    (tmp_path / "drive").mkdir()
    settings = {"run_name": "one", "n_folds": 3, "backup_dir": str(tmp_path / "drive" / "vqa")}
    run = mini_run(**settings)
    for fold in (0, 1):
        write_result(run, fold, raw=1.0, ema=1.05)
        write_scores(run, fold, 111.0)
        vqa.back_up(run, fold)
    assert vqa.select_weights(run) == "raw"
    write_result(run, 2, raw=2.0, ema=1.0)  # a later session trains the last fold
    assert vqa.select_weights(run) == "ema"
    write_scores(run, 0, 222.0)
    for fold in (2, 0, None):
        vqa.back_up(run, fold)
    shutil.rmtree(run.directory)
    again = mini_run(**settings)
    assert vqa.select_weights(again) == "ema" and again.unfinished_folds("predict", [0, 1, 2]) == [
        1,
        2,
    ]


def test_a_disk_that_was_taken_away_is_not_made_anew(mini_run, tmp_path):
    drive = tmp_path / "drive" / "MyDrive"
    drive.mkdir(parents=True)
    run = mini_run(backup_dir=str(drive / "vqa"))
    shutil.rmtree(tmp_path / "drive")
    vqa.back_up(run)
    assert not drive.exists() and "is gone" in (run.directory / "events.jsonl").read_text()


def test_what_a_submission_needs_is_done_on_all_folds_before_anything_else(mini_run, monkeypatch):
    run, launched = (
        mini_run(n_folds=3, quantization="4bit", score_precision="16bit", final_retrain=True),
        [],
    )
    monkeypatch.setattr(vqa, "worker_devices", lambda config: ["0", "1"])
    monkeypatch.setattr(vqa.Run, "unfinished_folds", lambda self, stage, folds: folds)

    def launch(_, jobs, stages):
        launched.append(([fold for _, folds in jobs for fold in folds], stages))

    monkeypatch.setattr(vqa, "launch_workers", launch)
    vqa.run_folds(run.config)
    stages = [
        ([0, 1], [stage]) if alone else ([2], [stage])
        for stage in ("train", "predict", "rescore")
        for alone in (1, 0)
    ]
    assert launched == [*stages, ([3], ["train", "predict", "rescore"])]


def test_a_model_on_all_rows_without_16_bit_scores_does_not_cost_the_folds_theirs(mini_run):
    run = mini_run(final_retrain=True, quantization="4bit", score_precision="16bit")
    for fold in (0, 1, 2):
        write_result(run, fold, raw=1.0, ema=1.1)
        write_scores(run, fold, 1.0)
    assert run.submission_models == [0, 1, 2] and not run.is_rescored
    for fold in (0, 1):
        write_scores(run, fold, 1.0, "_16bit")
    assert run.submission_models == [0, 1] and run.is_rescored
    assert len(vqa.read_oof(run).view_names) == 2 * len(VIEWS)
    write_scores(run, 2, 1.0, "_16bit")
    assert run.submission_models == [0, 1, 2] and run.is_rescored


def test_the_curve_of_views_in_doubt_is_of_one_precision(mini_run):
    run = mini_run(quantization="4bit", score_precision="16bit")
    for fold in (0, 1):
        write_result(run, fold, raw=1.0, ema=1.1)
        write_scores(run, fold, 1.0)
    plain = vqa.adaptive_curve(run)
    for fold in (0, 1):
        write_scores(run, fold, 1.0, "_16bit")
    assert run.is_rescored and vqa.adaptive_curve(run).equals(plain)


def test_views_in_doubt_need_held_out_rows_in_every_view():
    with pytest.raises(
        ValueError,
        match="'adaptive_tta' is 0.5; it needs score_precision 'trained' and no final_retr",
    ):
        vqa.Config(adaptive_tta=0.5, final_retrain=True)


def test_a_model_on_all_rows_needs_a_teacher_of_all_rows(mini_run):
    teacher = planted_run(mini_run(run_name="teacher", train_folds=(1,)))
    settings = {"run_name": "student", "train_folds": (0,), "distill_from": str(teacher.directory)}
    assert vqa.source_table(mini_run(**settings)).loc[0, "train"] == 18
    with pytest.raises(ValueError, match="has no out-of-fold probabilities for 18 rows"):
        mini_run(**settings, final_retrain=True)


def test_targets_do_not_depend_on_the_last_digits_of_a_teachers_probabilities(
    mini_run, monkeypatch
):
    teacher, evaluate = planted_run(mini_run(run_name="teacher")), vqa.evaluate_run
    settings = {"distill_from": str(teacher.directory), "pseudo_label_from": str(teacher.directory)}
    first = mini_run(run_name="student", **settings, pseudo_label_confidence=0.4)

    def on_another_processor(run):
        evaluation = evaluate(run)
        return vqa.dataclasses.replace(
            evaluation, probabilities=evaluation.probabilities * (1 + 1e-13)
        )

    monkeypatch.setattr(vqa, "evaluate_run", on_another_processor)
    assert (
        mini_run(run_name="student", **settings, pseudo_label_confidence=0.4).fingerprint
        == first.fingerprint
    )


def test_the_memory_plan_is_made_for_the_longest_prompt_of_all_epochs(
    session, mini_run, replace, monkeypatch
):
    planned = []
    monkeypatch.setattr(
        vqa, "plan_memory", lambda session, prompts, state: planned.append(len(prompts))
    )
    for fields in ({}, {"paraphrases": 2}, {"augment_images": 1}):
        run = mini_run(num_epochs=3, **fields)
        session.config, session.memory_plan = run.config, None
        trainer = vqa.FoldTrainer(session, run, 0)
        assert trainer.plan is None
        trainer.model.unload()
    assert planned == [18, 54, 54]
