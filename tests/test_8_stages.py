"""Part 8, Stages: a whole run's files, the same bytes twice, and scoring in 16 bits."""

import dataclasses
import json
import weakref

import numpy as np
import pytest
from planted import planted_run, rows_of_fold
from running import (
    ROTATIONS,
    adapter_file,
    events,
    note_scoring,
    open_run_session,
    quiet,
    read_logits,
    run_all,
    selected_weights,
)

import vqa_helpers as vqa

# --- Whole runs -----------------------------------------------------------------------------------


def test_a_run_writes_the_promised_files(finished):
    assert finished.directory.name.startswith("demo-")
    for name in (
        "config.json",
        "run.log",
        "worker_0.log",
        "folds.csv",
        "zeroshot.npz",
        "selection.json",
        "stages.jsonl",
    ):
        assert (finished.directory / name).exists(), name
    for fold in (0, 1):
        for name in ("oof.npz", "test.npz", "history.csv", "metrics.jsonl", "checkpoints"):
            assert (finished.fold_dir(fold) / name).exists(), name


def test_running_again_does_nothing_and_says_the_same(finished, monkeypatch):
    def times():
        return {path: path.stat().st_mtime_ns for path in finished.directory.rglob("*.npz")}

    before = times()
    monkeypatch.setattr(vqa, "launch_workers", None)
    results = vqa.run_folds(finished.config)
    assert [result.fold for result in results] == [0, 1]
    assert vqa.run_zeroshot(finished).loc["all", "rows"] == 36
    assert times() == before


@pytest.mark.slow
def test_the_same_run_twice_gives_the_same_bytes(mini_run):
    def files(name):
        """What a run of this name writes: submissions and logits."""
        run = run_all(mini_run(run_name=name, lora_dropout=0.1, cache_dir=None))
        vqa.write_submissions(run, vqa.evaluate_run(run))
        patterns = ("submission_*.csv", "fold_*/oof.npz", "fold_*/test.npz")
        paths = [path for pattern in patterns for path in sorted(run.directory.glob(pattern))]
        return [path.read_bytes() for path in paths]

    first = files("first")
    assert len(first) == 6
    assert first == files("second")


@pytest.mark.slow
def test_training_stops_in_time_for_inference_and_says_so(mini_run):
    run = mini_run(num_epochs=3, time_budget_hours=1e-9)
    vqa.atomic_write(run.directory / "session.json", json.dumps({"started": 0}))
    run_all(run)
    assert run.finished_folds == [0]  # the second one was not even begun
    assert len(vqa.read_fold_result(run, 0).history) == 1
    evaluation = vqa.evaluate_run(run)
    ensemble = vqa.write_submissions(run, evaluation)["ensemble"]
    assert ensemble["answer"].isin([*"abcd"]).all()
    assert len(ensemble) == len(run.test)
    report = vqa.write_report(run, evaluation).read_text(encoding="utf-8")
    assert "fold 0: training stopped in epoch 1 after step 1 of 3" in report
    assert "training stopped after epoch" not in report  # the same, said once more
    assert "train fold 1 was left out: the time budget has no" in report
    assert "folds [0] of 2" in report


# --- Scoring in 16 bits ---------------------------------------------------------------------------


STAGES = ("train", "predict", "rescore")


@pytest.fixture
def four_bit_run(four_bits_on_the_cpu, mini_run):
    """Make a run that trains in 4 bits and also scores in 16: four_bit_run(...) -> Run."""

    def make(**overrides):
        return mini_run(
            quantization="4bit",
            score_precision="16bit",
            tta_rotations=2,
            infer_batch_size=4,
            **overrides,
        )

    return make


def replace_scores(run, name, logits_of):
    """Overwrite the folds' out-of-fold scores `name` by `logits_of(labels, logits)`."""
    for fold in run.finished_folds:
        path = run.fold_dir(fold) / name
        content = vqa.read_arrays(path, run.fingerprint)
        content.pop("fingerprint")
        content["logits"] = logits_of(content["labels"], content["logits"]).astype(np.float32)
        vqa.write_arrays(path, run.fingerprint, **content)


def certain(labels, logits):
    """5 for the label, 0 for the other choices, and masked choices as they are."""
    others = np.where(np.isinf(logits), logits, 0.0)
    is_label = np.arange(4) == labels[:, None, None]
    return np.where(is_label, 5.0, others)


def certainly_wrong(labels, logits):
    return -certain(labels, logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_what_was_trained_in_4_bit_is_also_scored_by_the_unquantised_model(
    family, four_bit_run, model_folders
):
    run = run_all(four_bit_run(model_id=str(model_folders[family])), STAGES)
    for fold in (0, 1):
        trained = vqa.read_arrays(run.fold_dir(fold) / "oof.npz", run.fingerprint)
        unquantised = vqa.read_arrays(run.fold_dir(fold) / "oof_16bit.npz", run.fingerprint)
        views = unquantised["view_names"].tolist()
        assert views == ["rotation 0 in 16 bits", "rotation 2 in 16 bits"]
        assert unquantised["ids"].tolist() == trained["ids"].tolist()
        present = np.isfinite(unquantised["logits"])
        difference = unquantised["logits"][present] - trained["logits"][present]
        assert np.abs(difference).max() > 1e-4

    config = dataclasses.replace(run.config, quantization="none", score_precision="trained")
    session = vqa.open_session(config, run.train.iloc[0])
    held_out = rows_of_fold(run, 1).reset_index(drop=True)
    kind = selected_weights(run)
    vqa.load_adapter(session.model, run.fold_dir(1) / f"adapter_{kind}")
    expected = vqa.predict_logits(session, held_out, [ROTATIONS[0], ROTATIONS[2]])
    np.testing.assert_allclose(unquantised["logits"], expected, atol=1e-4)

    evaluation = vqa.evaluate_run(run)
    step = "mean of 2 views in 16 bits"
    step_of_views = {
        "single view": "fine-tuned, one view",
        "rotations": "mean of 2 views",
        "single view in 16 bits": "one view in 16 bits",
        "rotations in 16 bits": step,
    }
    admitted = evaluation.view_table["admitted"]
    assert list(admitted.index) == list(step_of_views)
    narrower = admitted.iloc[:-1]
    last_admitted = narrower.index[narrower][-1]
    assert evaluation.ladder.loc[step, "against"] == step_of_views[last_admitted]

    replace_scores(run, "oof_16bit.npz", certain)
    better = vqa.evaluate_run(run)
    assert better.views == [2, 3]
    assert better.ladder["used"][step]
    assert better.ladder.loc["temperature", "against"] == step
    scores = vqa.combine_views(read_logits(run, 0, "test_16bit"))
    expected = vqa.softmax(scores / better.calibration.temperatures[0])
    np.testing.assert_allclose(vqa.predict_test(run, better)[0], expected)

    replace_scores(run, "oof_16bit.npz", certainly_wrong)
    worse = vqa.evaluate_run(run)
    assert max(worse.views) < 2
    assert not worse.ladder["used"][step]


@pytest.mark.slow
def test_scoring_in_16_bits_resumes_to_the_same_bytes_with_one_model_at_a_time(
    four_bit_run, tmp_path, monkeypatch
):
    opened = []
    models = []
    open_session = vqa.open_session

    def opening(config, example):
        opened.append(config.quantization)
        if config.quantization == "none":
            assert models[-1]() is None  # the worker's other model is freed
        session = open_session(config, example)
        models.append(weakref.ref(session.model))
        return session

    monkeypatch.setattr(vqa, "open_session", opening)
    plain = run_all(four_bit_run(output_dir=str(tmp_path / "plain")), STAGES)
    assert opened == ["4bit", "4bit", "none"]

    def stop(stage, done, total, **_):
        if (stage, done) == ("fold 0 test_16bit", 2):
            raise vqa.Interrupted

    stopped = four_bit_run(output_dir=str(tmp_path / "stopped"))
    with pytest.raises(vqa.Interrupted):
        run_all(stopped, STAGES, stop)
    assert [*stopped.fold_dir(0).glob("test_16bit.*.partial.npz")]
    assert not stopped.is_rescored
    # They do not count until all members have them.
    assert vqa.evaluate_run(stopped).oof.view_names == ("rotation 0", "rotation 2")
    opened.clear()
    run_all(stopped, STAGES)
    assert opened == ["none"]
    for fold in (0, 1):
        for name in ("oof_16bit.npz", "test_16bit.npz"):
            expected = (plain.fold_dir(fold) / name).read_bytes()
            assert (stopped.fold_dir(fold) / name).read_bytes() == expected


@pytest.mark.slow
def test_a_damaged_adapter_is_never_trained_anew_on_the_unquantised_model(four_bit_run):
    run = run_all(four_bit_run())
    weights = adapter_file(run, 1, selected_weights(run))
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\0\0\0\1")
    with pytest.raises(
        vqa.CheckpointError, match="is damaged; run again to make it anew from the last checkpoint"
    ):
        vqa.run_stages(run, [0, 1], ["rescore"], quiet)
    assert run.finished_folds == [0]
    run_all(run, STAGES)
    assert weights.read_bytes() == content
    assert run.is_rescored


@pytest.mark.slow
def test_an_unquantised_model_that_does_not_fit_is_left_out_with_the_figures(
    four_bit_run, monkeypatch
):
    monkeypatch.setattr(vqa, "free_gib", lambda: 0.01)
    run = run_all(four_bit_run(), STAGES)
    assert not run.is_rescored
    assert not [*run.directory.rglob("*16bit*")]
    evaluation = vqa.evaluate_run(run)
    assert evaluation.oof.view_names == ("rotation 0", "rotation 2")
    report = vqa.write_report(run, evaluation).read_text()
    assert "scoring in 16 bits was left out: does not fit by computation: 0.5" in report
    assert "0.01 GiB free" in report


@pytest.mark.slow
def test_scoring_in_16_bits_is_left_out_where_the_time_budget_ends(four_bit_run, monkeypatch):
    run = run_all(four_bit_run())
    monkeypatch.setattr(vqa.Run, "seconds_left", lambda self: 0.0)
    vqa.run_stages(run, [0, 1], ["rescore"], quiet)
    assert not run.is_rescored
    assert any(event.startswith("rescore fold 1 was left out") for event in events(run))


# --- The base model's scores ----------------------------------------------------------------------

BASE_STAGES = ("train", "predict", "base")


def base_files(run):
    """The bytes of all base_oof.npz and base_test.npz, by name."""
    paths = sorted(run.directory.glob("fold_*/base_*.npz"))
    return {str(path.relative_to(run.directory)): path.read_bytes() for path in paths}


def base_logits(run, name, ids):
    """The logits in all folds' files of that name, in the order of `ids`."""
    parts = []
    for fold in run.config.folds_to_train:
        path = run.fold_dir(fold) / f"{name}.npz"
        parts.append(vqa.read_arrays(path, run.fingerprint, vqa.SCORE_ARRAYS))
    found = np.concatenate([part["ids"] for part in parts])
    assert sorted(found) == sorted(ids)  # each row once
    return vqa.align_rows(ids, parts, "logits")


@pytest.mark.slow
def test_the_base_model_scores_as_if_no_adapter_had_ever_been_loaded(mini_run):
    run = mini_run(use_base_member="on", use_kfold=False, tta_rotations=2)
    vqa.run_stages(run, [0], BASE_STAGES, quiet)  # with one model
    assert run.is_base_scored
    session = open_run_session(run)
    frames = {"base_oof": rows_of_fold(run, 0).reset_index(drop=True), "base_test": run.test}
    for name, frame in frames.items():
        expected = vqa.predict_logits(session, frame, [ROTATIONS[0], ROTATIONS[2]])
        np.testing.assert_array_equal(base_logits(run, name, frame["id"]), expected)
    assert not [*run.directory.rglob("*partial*")]
    assert vqa.stage_seconds(run)["base"] > 0


@pytest.mark.slow
def test_the_base_model_s_scores_resume_to_the_same_bytes(mini_run, tmp_path):
    settings = {"use_base_member": "on", "infer_batch_size": 4, "tta_rotations": 2}
    plain = planted_run(mini_run(output_dir=str(tmp_path / "plain"), **settings))
    vqa.run_stages(plain, [0, 1], ["base"], quiet)
    base_logits(plain, "base_oof", plain.train["id"])
    base_logits(plain, "base_test", plain.test["id"])  # shared by the folds

    def stop(stage, done, total, **_):
        if (stage, done) == ("fold 1 base_oof", 2):
            raise vqa.Interrupted

    stopped = planted_run(mini_run(output_dir=str(tmp_path / "stopped"), **settings))
    with pytest.raises(vqa.Interrupted):
        vqa.run_stages(stopped, [0, 1], ["base"], stop)
    assert (stopped.fold_dir(1) / "base_oof.base.partial.npz").exists()
    assert not stopped.is_base_scored  # it does not count until all folds have it
    vqa.run_stages(stopped, [0, 1], ["base"], quiet)
    assert base_files(stopped) == base_files(plain)
    assert len(base_files(plain)) == 4


@pytest.mark.slow
def test_the_base_model_is_left_out_where_the_time_budget_ends(mini_run, monkeypatch):
    run = planted_run(mini_run(use_base_member="on"))
    vqa.MetricLogger(run.directory / "stages.jsonl").log(
        label="predict fold 0", seconds=1, seconds_per_question=0.5
    )
    monkeypatch.setattr(vqa.Run, "seconds_left", lambda self: 1.0)
    vqa.run_stages(run, [0, 1], ["base"], quiet)
    assert not run.is_base_scored
    # 18 held-out and 6 test rows, in four orders behind one prompt
    left_out = "base fold 0 was left out: the time budget has no 21 seconds left for it"
    assert left_out in events(run)
    sentence = vqa.describe_base_member(run, vqa.evaluate_run(run))
    assert sentence == "The base model is no member of the submission: it has not scored all rows."


# --- Held-out rows that validation has scored -----------------------------------------------------


@pytest.mark.slow
def test_with_one_view_held_out_rows_are_scored_by_validation_alone(mini_run, monkeypatch):
    """And the file is, byte by byte, the one that scoring them again gives."""
    scored = note_scoring(monkeypatch)
    run = run_all(mini_run(use_tta=False, train_folds=(0,)), ["train", "predict"])
    assert scored == ["zero-shot", *["fold 0 validation"] * 2, "fold 0 test"]
    kept = (run.fold_dir(0) / "oof.npz").read_bytes()
    for damage in ("damaged", "of other rows"):
        scored.clear()
        for name in ("oof.npz", "test.npz"):
            (run.fold_dir(0) / name).unlink()
        path = run.fold_dir(0) / f"validation_{selected_weights(run)}.npz"
        if damage == "damaged":
            path.write_bytes(kept[:-40])
        else:
            one = run.train.head(1)
            vqa.write_logits(path, one, np.zeros((1, 1, 4)), ["rotation 0"], run.fingerprint)
        vqa.run_stages(run, [0], ["predict"], quiet)
        assert scored == ["fold 0 oof", "fold 0 test"]
        assert (run.fold_dir(0) / "oof.npz").read_bytes() == kept
