"""A whole run through worker processes: files, resume, errors, submissions and the report."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax

import vqa_helpers as vqa


@pytest.fixture(scope="module")
def finished(tmp_path_factory, mini_data):
    """One small run, done by real workers."""
    config = vqa.Config.preset(
        "demo",
        data_dir=str(mini_data),
        output_dir=str(tmp_path_factory.mktemp("outputs")),
        num_epochs=1,
        n_folds=2,
        tta_scales=(1.0, 1.5),
        max_pixels=6 * 32 * 32,
    )
    competition = vqa.load_competition(config.data_dir)
    run = vqa.start_run(
        config, competition, vqa.make_folds(competition.train, config.n_folds, config.seed)
    )
    vqa.run_zeroshot(run)
    vqa.run_folds(run.config)
    return run


def test_a_run_writes_the_promised_files(finished):
    names = {str(path.relative_to(finished.directory)) for path in finished.directory.rglob("*")}
    promised = {
        "config.json",
        "run.log",
        "worker_0.log",
        "folds.csv",
        "zeroshot.npz",
        "selection.json",
        "stages.jsonl",
    }
    for fold in (0, 1):
        promised |= {
            f"fold_{fold}/{name}"
            for name in ("oof.npz", "test.npz", "history.csv", "metrics.jsonl", "checkpoints")
        }
    assert promised <= names
    assert (finished.directory.name).startswith("demo-")


def test_the_parent_process_never_imports_torch(mini_data, tmp_path):
    """Loading, folds and starting a run need no torch, let alone CUDA."""
    code = (
        "import sys, vqa_helpers as vqa; "
        f"config = vqa.Config.preset('demo', data_dir={str(mini_data)!r}, output_dir={str(tmp_path)!r}); "
        "competition = vqa.load_competition(config.data_dir); vqa.leakage_report(competition.train, competition.test); "
        "vqa.start_run(config, competition, vqa.make_folds(competition.train, 2)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=vqa.HERE)


def test_error_tables_are_written_as_csv_and_name_the_rows(finished):
    competition = vqa.load_competition(finished.config.data_dir)
    groups = vqa.leakage_report(competition.train, competition.test).image_group
    tables = vqa.write_error_tables(finished, vqa.evaluate_run(finished), groups)
    assert len(tables["uncertain_rows"]) == len(finished.test)
    assert set(tables["label_suspects"]["id"]) <= set(finished.train["id"])
    assert (tables["label_suspects"]["likely"] != tables["label_suspects"]["answer"]).all()
    assert {"confusion", "mistakes"} < set(tables)
    assert (tables["accuracy_by_group"].groupby("by")["rows"].sum() == len(finished.train)).all()
    assert "prompt, tokens" in tables["accuracy_by_group"].index
    for name, table in tables.items():
        assert len(pd.read_csv(finished.directory / "tables" / f"{name}.csv")) == len(table)


def test_every_training_row_is_predicted_once_by_a_model_that_did_not_see_it(finished):
    oof = vqa.read_oof(finished)
    assert oof.frame["id"].tolist() == finished.train["id"].tolist()
    assert np.array_equal(oof.folds, finished.train["fold"])
    for fold in (0, 1):
        content = vqa.read_arrays(finished.fold_dir(fold) / "oof.npz", finished.fingerprint)
        assert set(content["ids"]) == set(finished.train["id"][finished.train["fold"] == fold])
    by_id = finished.train.set_index("id")["label"]
    assert oof.tokens.min() > 20 and len(set(oof.tokens)) > 1
    assert np.array_equal(oof.labels, by_id.loc[oof.frame["id"]])


def test_oof_of_the_plain_view_is_the_validation_of_the_selected_weights(finished):
    """Reloading the saved adapter gives the numbers it had in training."""
    kind = json.loads((finished.directory / "selection.json").read_text())["weights"]
    for fold in (0, 1):
        oof = vqa.read_arrays(finished.fold_dir(fold) / "oof.npz", finished.fingerprint)
        validation = vqa.read_arrays(
            finished.fold_dir(fold) / f"validation_{kind}.npz", finished.fingerprint
        )
        assert oof["ids"].tolist() == validation["ids"].tolist()
        assert np.allclose(oof["logits"][:, 0], validation["logits"][:, 0], atol=1e-4)


def test_running_again_does_nothing_and_says_the_same(finished, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in finished.directory.rglob("*.npz")}
    monkeypatch.setattr(vqa, "launch_workers", None)
    results = vqa.run_folds(finished.config)
    assert [result.fold for result in results] == [0, 1]
    assert vqa.run_zeroshot(finished).loc["all", "rows"] == 36
    assert {path: path.stat().st_mtime_ns for path in finished.directory.rglob("*.npz")} == before


def test_evaluation_submissions_and_report(finished):
    evaluation = vqa.evaluate_run(finished)
    assert {"zero-shot", "fine-tuned, one view", "temperature"} <= set(evaluation.ladder.index)
    assert evaluation.view_table["admitted"].iloc[0]
    frames = vqa.write_submissions(finished, evaluation)
    for name in ("single", "ensemble"):
        assert frames[name]["id"].tolist() == finished.sample["id"].tolist()
        assert set(frames[name]["answer"]) <= set(vqa.CHOICES)
    single = vqa.predict_test(finished, evaluation)[vqa.best_fold(evaluation)].argmax(1)
    assert frames["single"]["answer"].tolist() == [vqa.CHOICES[label] for label in single]
    table = vqa.confusion_table(evaluation.oof.labels, single[:1].repeat(36))
    vqa.save_figure(vqa.plot_confusion(table), finished, "confusion")
    text = vqa.write_report(finished, evaluation).read_text(encoding="utf-8")
    assert "![confusion](figures/confusion.png)" in text and "| zero-shot |" in text
    vqa.write_report(finished, evaluation)
    log = pd.read_csv(finished.directory.parent / "experiments.csv")
    assert log["run"].tolist() == [finished.directory.name]
    files = {
        "ladder": evaluation.ladder,
        "folds": evaluation.fold_table,
        "views": evaluation.view_table,
    }
    for name, table in files.items():
        assert len(pd.read_csv(finished.directory / "tables" / f"{name}.csv")) == len(table)


def test_the_ladder_compares_ways_to_combine_views(finished, monkeypatch):
    oof, views = vqa.read_oof(finished), [0, 1, 2, 3]
    table = vqa.admit_views(oof)[1].assign(admitted=True)
    monkeypatch.setattr(vqa, "admit_views", lambda *given: (views, table))
    ladder = vqa.evaluate_run(finished).ladder
    combined = [
        "temperature",
        "vote of views",
        "weighted views",
        "stacked views",
        vqa.STEP_AUTOMATIC,
    ]
    selected = json.loads((finished.directory / "selection.json").read_text())["weights"]
    (other,) = {"raw", "ema"} - {selected}
    other = f"with {'raw' if other == 'raw' else 'EMA'} weights"
    first = ["zero-shot", "fine-tuned, one view", other, "mean of 4 views", "mean of 5 views"]
    assert ladder.index.tolist() == [*first, *combined]
    four = vqa.scoring_cost(1, 4)
    assert ladder["cost"].tolist() == [1.0] * 3 + [four, oof.cost(range(5))] + [four] * 5
    assert (ladder["against"][["mean of 5 views", "temperature"]] == "mean of 4 views").all()
    assert not ladder["used"]["mean of 5 views"]
    one = finished.seconds_per_question() * len(finished.test) * 2  # folds
    seconds = [round(cost * one, 1) for cost in ladder["cost"]]
    assert (
        ladder["seconds"].tolist() == [seconds[0] / 2, *seconds[1:]] and one > 0
    )  # zero-shot is one model
    monkeypatch.undo()
    table = vqa.admit_views(oof)[1]
    assert table["cost"].iloc[0] == 1 and table["cost"].is_monotonic_increasing


def test_ensemble_is_the_mean_of_the_folds_after_view_mean_and_temperature(finished):
    """DESIGN: log-softmax per view, mean over views, divided by T, softmax, arithmetic mean over folds."""
    evaluation = vqa.evaluate_run(finished)
    expected = 0
    for fold in (0, 1):
        logits = vqa.read_arrays(finished.fold_dir(fold) / "test.npz", finished.fingerprint)[
            "logits"
        ]
        per_view = [log_softmax(logits[:, view].astype(float), axis=1) for view in evaluation.views]
        scores = np.nanmean(per_view, axis=0) / evaluation.calibration.temperatures[fold]
        expected = expected + np.exp(scores) / np.exp(scores).sum(1, keepdims=True) / 2
    answers = vqa.write_submissions(finished, evaluation)["ensemble"]["answer"]
    assert answers.tolist() == [vqa.CHOICES[label] for label in expected.argmax(1)]


@pytest.mark.parametrize("method", ["vote", "weighted"])
def test_other_ensemble_methods_write_valid_submissions(finished, replace, method):
    run = replace(finished, config=replace(finished.config, ensemble_method=method))
    assert len(vqa.write_submissions(run, vqa.evaluate_run(run))["ensemble"]) == 12


def test_without_temperature_scaling_every_temperature_is_one(finished, replace):
    run = replace(finished, config=replace(finished.config, use_temperature_scaling=False))
    assert set(vqa.evaluate_run(run).calibration.temperatures.values()) == {1.0}


def test_a_run_directory_of_another_config_is_refused_by_field(mini_run):
    mini_run(run_name="mine", learning_rate=1e-3)
    mini_run(
        run_name="mine", learning_rate=1e-3, log_level="DEBUG"
    )  # what cannot change a result may change
    with pytest.raises(
        vqa.CheckpointError,
        match="made with other config .*learning_rate: 0.001 -> 0.002.*new run_name",
    ):
        mini_run(run_name="mine", learning_rate=2e-3)


def test_run_directory_of_other_data_is_refused(mini_run, mini_data, tmp_path):
    import shutil

    mini_run(run_name="mine")
    copy = shutil.copytree(mini_data, tmp_path / "copy")
    text = (copy / "train.csv").read_text(encoding="utf-8").replace("train_0001,", "train_9999,")
    (copy / "train.csv").write_text(text, encoding="utf-8")
    with pytest.raises(vqa.CheckpointError, match="other data"):
        mini_run(run_name="mine", data_dir=str(copy))


@pytest.mark.slow
def test_a_worker_that_dies_is_shown_with_its_last_lines(mini_run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = mini_run(model_id="no/such-model")
    with pytest.raises(
        RuntimeError, match="(?s)A worker stopped. Run the cell again.*worker_0.log.*OSError"
    ):
        vqa.run_zeroshot(run)


@pytest.mark.slow
def test_several_devices_share_folds_and_the_odd_one_and_predict_in_further_rounds(
    mini_run, monkeypatch
):
    run = mini_run(n_folds=3, tta_rotations=1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(vqa, "worker_devices", lambda config: [None, None])
    rounds, launch = [], vqa.launch_workers
    monkeypatch.setattr(
        vqa, "launch_workers", lambda *args: (rounds.append(args[1:]), launch(*args))
    )
    results = vqa.run_folds(run.config)
    assert [result.fold for result in results] == [0, 1, 2]
    whole, shared = [((None,), (0,)), ((None,), (1,))], [((None, None), (2,))]
    assert rounds == [(jobs, [stage]) for stage in ("train", "predict") for jobs in (whole, shared)]
    for fold in range(3):
        for name in ("oof", "test"):
            logits = vqa.read_arrays(run.fold_dir(fold) / f"{name}.npz", run.fingerprint)["logits"]
            assert np.isfinite(logits).all()  # the parts of both processes


def test_each_worker_sees_its_own_gpu(mini_run, monkeypatch):
    run, seen = mini_run(), []

    class Process:
        def __init__(self, command, env, **_):
            seen.append((env["CUDA_VISIBLE_DEVICES"], command[command.index("--folds") + 1]))

        def poll(self):
            return 0

        wait = terminate = poll

    monkeypatch.setattr(vqa.subprocess, "Popen", Process)
    vqa.launch_workers(run, [((0,), [0, 2]), ((1,), [1])], ["train"])
    assert seen == [("0", "0,2"), ("1", "1")]


def test_an_adapter_that_does_not_arrive_whole_is_refused(finished, mini_run, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(finished.fold_dir(0) / "adapter_raw", tmp_path / "adapter")
    session = vqa.open_session(finished.config, finished.train.iloc[0])
    vqa.load_adapter(session.model, folder).unload()
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(vqa.CheckpointError, match="was not loaded completely"):
        vqa.load_adapter(session.model, folder)


def test_weights_are_chosen_by_pooled_held_out_nll(mini_run):
    run = mini_run()
    for fold, (raw, ema) in enumerate([(0.5, 0.6), (0.9, 0.7)]):
        kinds = {"raw": {"accuracy": 1, "nll": raw}, "ema": {"accuracy": 0, "nll": ema}}
        content = {
            "fold": fold,
            "best_epoch": 1,
            "kinds": kinds,
            "history": [{"epoch": 1}],
            "adapters": {},
        }
        vqa.atomic_write(run.fold_dir(fold) / "result.json", json.dumps(content))
    assert vqa.select_weights(run) == "ema"
    table = vqa.fold_table([vqa.read_fold_result(run, fold) for fold in (0, 1)])
    assert table.loc["mean", "raw nll"] == pytest.approx(0.7) and table.index.tolist() == [
        "0",
        "1",
        "mean",
        "sd",
    ]


@pytest.mark.slow
def test_preflight_reports_facts_from_a_process_of_its_own(mini_data, monkeypatch):
    facts = vqa.run_preflight(vqa.Config.preset("demo", data_dir=str(mini_data)))
    assert facts["letter tokens"].startswith("a=[") and facts["prompt"].endswith(
        "<|im_start|>assistant\n"
    )
    assert (
        len(facts["token_counts"]["train"]) == 36
        and max(facts["token_counts"]["test"]) <= facts["token_budget"]
    )
    assert (
        facts["estimated minutes on one device"] > 0 and "on 36 rows" in facts["zero-shot accuracy"]
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RuntimeError, match="(?s)Preflight failed:.*OSError"):
        vqa.run_preflight(
            vqa.Config.preset("demo", data_dir=str(mini_data), model_id="no/such-model")
        )


@pytest.mark.slow
def test_command_line_of_the_worker_is_usable_by_hand(mini_run):
    run = mini_run(zeroshot_rows=4)
    command = [
        sys.executable,
        str(vqa.HERE / "vqa_helpers.py"),
        "worker",
        "--run",
        str(run.directory),
    ]
    subprocess.run([*command, "--folds", "0", "--stages", "zeroshot"], check=True, env=os.environ)
    assert len(vqa.read_arrays(run.directory / "zeroshot.npz", run.fingerprint)["ids"]) == 4


def test_on_kaggle_the_ensemble_is_copied_to_the_working_folder(finished, monkeypatch, tmp_path):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")  # Kaggle's image sets it too
    monkeypatch.chdir(tmp_path)
    vqa.write_submissions(finished, vqa.evaluate_run(finished))
    assert (tmp_path / "submission.csv").read_bytes() == (
        finished.directory / "submission_ensemble.csv"
    ).read_bytes()


def scored(run, zeroshot_rows):
    """The run as if its folds had been trained and predicted in two views, with made-up scores."""
    random = np.random.default_rng(0)
    names = ["rotation 0", "rotation 2"]
    for fold in run.config.folds_to_train:
        held_out = run.train[run.train["fold"] == fold]
        for name, frame in (("oof", held_out), ("test", run.test)):
            logits = random.normal(size=(len(frame), 2, 4))
            logits[:, 1] += (
                4 * np.eye(4)[frame["label"]] if "label" in frame else 0
            )  # so that two views beat one
            vqa.write_logits(
                run.fold_dir(fold) / f"{name}.npz", frame, logits, names, run.fingerprint
            )
        vqa.atomic_write(run.fold_dir(fold) / "result.json", "{}")
    logits = random.normal(size=(len(zeroshot_rows), 1, 4))
    vqa.write_logits(
        run.directory / "zeroshot.npz", zeroshot_rows, logits, names[:1], run.fingerprint
    )
    return run


def test_a_zero_shot_sample_without_a_row_of_the_trained_folds_is_no_obstacle(mini_run):
    run = mini_run(train_folds=(0,))
    evaluation = vqa.evaluate_run(scored(run, run.train[run.train["fold"] == 1]))
    step = evaluation.ladder.loc["fine-tuned, one view"]
    assert (
        step["against"] == "zero-shot"
        and np.isnan([step["gain"], step["gain_low"], step["p_value"]]).all()
    )


def test_a_fold_with_one_row_is_scaled_by_the_pooled_temperature(mini_run, replace):
    run = mini_run()
    run = replace(run, train=run.train.assign(fold=[1] + [0] * 35))
    evaluation = vqa.evaluate_run(scored(run, run.train))
    assert np.isfinite(evaluation.calibration.probabilities).all()
    assert (
        set(evaluation.calibration.temperatures) == {0, 1}
        and len(vqa.predict_test(run, evaluation)) == 2
    )
    rest = (
        evaluation.oof.folds == 0
    )  # row 0 is in the first of five parts: its temperature comes from the others
    rest &= np.arange(36) % 5 != 0
    scores = vqa.combine_views(evaluation.oof.logits[:, evaluation.views])
    scaler = vqa.TemperatureScaler().fit(scores[rest], evaluation.oof.labels[rest])
    assert np.allclose(evaluation.calibration.probabilities[0], scaler.transform(scores[:1])[0])


def test_a_letter_that_a_fit_would_not_see_leaves_stacking_out(mini_run, replace):
    run = mini_run()
    labels = np.arange(36) % 3
    complete = replace(run, train=run.train.assign(label=np.arange(36) % 4))
    rare = replace(
        run,
        train=run.train.assign(label=np.where(np.arange(36) % vqa.CROSS_FIT_PARTS == 5, 3, labels)),
    )
    for case, stacked in ((complete, True), (rare, False)):
        ladder = vqa.evaluate_run(scored(case, case.train)).ladder
        assert "weighted views" in ladder.index and ("stacked views" in ladder.index) == stacked


def test_an_id_that_pandas_takes_for_a_missing_value_survives(mini_run, replace):
    run = scored(mini_run(), mini_run().train)
    ids = ["NA", "null", *run.test["id"][2:]]
    run = replace(run, test=run.test.assign(id=ids), sample=run.sample.assign(id=ids))
    for frame in vqa.write_submissions(run, vqa.evaluate_run(run)).values():
        assert frame["id"].tolist() == ids
