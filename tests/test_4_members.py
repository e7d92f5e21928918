"""Part 4, Members: each fold trained with several seeds, in one run, one ladder, one report."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from competition_folder import copy_demo_rows
from planted import hidden_labels, one_hot, scored_frames, write_zeroshot
from running import Stop, adapter_file, events, quiet, read_logits
from scipy.special import log_softmax

import vqa_helpers as vqa

TWO_SEEDS = (42, 7)
ONE_VIEW = ["rotation 0"]


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": (42, 42)}, "'seeds' is (42, 42); it needs each seed once"),
        ({"seeds": (7, 8)}, "'seeds' is (7, 8); it needs 42 among them, which is `seed`"),
        ({"seeds": (42, 7.0)}, "'seeds' is (42, 7.0); it needs whole numbers of at least 0"),
        ({"seeds": (42, True)}, "'seeds' is (42, True); it needs whole numbers of at least 0"),
        ({"seeds": (42, -1)}, "'seeds' is (42, -1); it needs whole numbers of at least 0"),
        ({"seeds": (42, "7")}, "'seeds' is (42, '7'); it needs whole numbers of at least 0"),
        (
            {"seeds": TWO_SEEDS, "doubt_steps": (("base", 0.3),)},
            "needs one seed, or no doubt_steps",
        ),
    ],
)
def test_seeds_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match="Config field 'seeds'") as error:
        vqa.Config(**settings)
    assert message in str(error.value)


def test_a_run_of_one_seed_is_the_same_run_however_that_is_written():
    plain = vqa.Config()
    assert vqa.Config(seeds=[42]).fingerprint == plain.fingerprint
    two = vqa.Config(seeds=[7, 42])
    assert two.all_seeds == TWO_SEEDS
    assert two.fingerprint == vqa.Config(seeds=TWO_SEEDS).fingerprint
    assert two.fingerprint != plain.fingerprint


def of(launch):
    """What each device of a launch does."""
    return [job.folds for job in launch.jobs]


def test_devices_get_the_models_of_the_first_seed_first():
    config = vqa.Config(n_folds=3, seeds=TWO_SEEDS, final_retrain=True)
    folds, final = vqa.planned_launches(config, ["0", "1"])
    assert of(folds) == [(0, 2, 5), (1, 4, 6)]
    assert folds.stages == ["train", "predict", "base"]
    # The base model is the same for all seeds: the odd fold's shared worker scores none of seed 7.
    odd = vqa.Config(n_folds=3, train_folds=(0,), seeds=(42, 7, 8))
    *_, last = vqa.planned_launches(odd, ["0", "1"])
    assert (of(last), last.stages) == ([(0,), (4,)], ["predict", "base"])
    assert of(final) == [(3,), (7,)]
    assert [vqa.member_name(config, member) for member in (2, 5, 7)] == [
        "2",
        "1 seed 7",
        "3 seed 7",
    ]


# --- Evidence of made-up scores -------------------------------------------------------------------


def plant_member(run, member, strength):
    """What a trained and scored member leaves behind: it knows the answers but for its noise."""
    random = np.random.default_rng(member)
    fold = vqa.fold_of(run.config, member)
    folder = run.fold_dir(member)
    for name, frame in scored_frames(run, fold).items():
        labels = frame.get("label", hidden_labels(frame["id"])).to_numpy()
        logits = strength * one_hot(labels)[:, None] + random.normal(size=(len(frame), 1, 4))
        vqa.write_logits(folder / f"{name}.npz", frame, logits, ONE_VIEW, run.fingerprint)
        if name == "oof":
            shutil.copy(folder / "oof.npz", folder / "validation_raw.npz")
    content = {
        "fold": fold,
        "best_epoch": 1,
        "kinds": {"raw": {"accuracy": 0.5, "nll": 1.0}},
        "history": [{"epoch": 1, "loss": 1.0}],
        "adapters": {},
    }
    if member != fold:
        content["seed"] = vqa.seed_of(run.config, member)
    vqa.atomic_write(folder / "result.json", json.dumps(content))


def planted_seeds(run, strengths, selected=2):
    """The run with made-up scores of these members, by number."""
    for member, strength in strengths.items():
        plant_member(run, member, strength)
    write_zeroshot(run, run.train, ONE_VIEW[0], np.random.default_rng(0))
    selection = {"weights": "raw", "seeds": selected}
    vqa.atomic_write(run.directory / "selection.json", json.dumps(selection))
    return run


@pytest.fixture
def two_seeds(mini_run):
    """Two folds, each with two seeds whose models are as good."""
    run = mini_run(seeds=TWO_SEEDS, use_temperature_scaling=False)
    return planted_seeds(run, dict.fromkeys((0, 1, 3, 4), 2.0))


def right_answers(run, members):
    """How many held-out rows of these folds their models answer rightly, by one view alone."""
    right = 0
    for member in members:
        labels = run.train.loc[run.train["fold"] == vqa.fold_of(run.config, member), "label"]
        right += (read_logits(run, member, "oof")[:, 0].argmax(axis=1) == labels).sum()
    return right


def test_a_run_of_two_seeds_has_one_ladder_and_one_report(two_seeds):
    run = two_seeds
    assert run.fold_dir(4).name == "fold_1_seed_7"
    assert (run.finished_members, run.finished_folds) == ([0, 1, 3, 4], [0, 1])
    parts = [read_logits(run, member, "test") for member in (1, 4)]
    mean = np.mean(log_softmax(parts, axis=-1), axis=0)
    evaluation = vqa.evaluate_run(run)
    tests = vqa.predict_test(run, evaluation)
    assert list(tests) == [0, 1]
    np.testing.assert_allclose(tests[1], vqa.softmax(mean[:, 0]))

    ladder = evaluation.ladder
    assert ladder.index.tolist() == ["zero-shot", vqa.STEP_ONE_VIEW, vqa.STEP_ONE_SEED]
    assert ladder["cost"].tolist() == [1, 2, 1]
    alone = ladder.loc[vqa.STEP_ONE_SEED]
    assert alone["accuracy"] == pytest.approx(right_answers(run, (0, 1)) / len(run.train))
    assert alone["against"] == vqa.STEP_ONE_VIEW
    assert alone["gain_low"] <= alone["gain"] <= alone["gain_high"]
    assert not alone["used"]
    assert vqa.doubt_curve(run).loc["all rows", "cost"] == 2
    report = vqa.write_report(run, evaluation).read_text(encoding="utf-8")
    assert "with the seeds 42, 7. Of these 2 models fold 0 has 2, fold 1 has 2. A fold" in report
    results = [vqa.read_fold_result(run, member) for member in run.finished_members]
    assert vqa.fold_table(results).index[:4].tolist() == ["0", "1", "0 seed 7", "1 seed 7"]


@pytest.mark.parametrize(
    ("strength", "selected"),
    [pytest.param(3.0, 2, marks=pytest.mark.slow), (-3.0, 1)],
)
def test_all_seeds_score_only_where_their_mean_does_not_lose(mini_run, strength, selected):
    run = mini_run(seeds=TWO_SEEDS, use_temperature_scaling=False)
    planted_seeds(run, {0: 1.0, 1: 1.0, 3: strength, 4: strength})
    assert vqa.select_weights(run) == "raw"
    assert run.selected_seeds == selected
    assert run.members_behind(0) == [0, 3][:selected]


def test_each_missing_model_is_named_with_its_fold(mini_run):
    run = planted_seeds(mini_run(seeds=TWO_SEEDS), {0: 1.0})
    (alarm,) = vqa._run_alarms(run)
    assert alarm.startswith("Missing: fold 1, fold 0 seed 7, fold 1 seed 7 of 2, because")


def test_a_lost_selection_of_a_run_that_is_scored_is_decided_again(mini_run, monkeypatch):
    """Else all seeds would score, although one was selected."""
    run = planted_seeds(mini_run(seeds=TWO_SEEDS, use_base_member="off"), {0: 1.0, 3: -3.0})
    monkeypatch.setattr(vqa, "launch_workers", lambda *_: None)
    monkeypatch.setattr(vqa, "delete_damaged_files", lambda run: 0)
    before = vqa.select_weights(run), run.selected_seeds
    (run.directory / "selection.json").unlink()
    vqa.run_folds(run.config)
    assert ("+".join(run.selected_weights), run.selected_seeds) == before == ("raw", 1)


@pytest.mark.slow
def test_seeds_that_lose_are_shown_and_not_used(mini_run):
    run = mini_run(seeds=TWO_SEEDS)
    planted_seeds(run, {0: 3.0, 1: 3.0, 3: -3.0, 4: -3.0}, selected=1)
    scores = vqa.read_scores(run, 0, "oof")["logits"]
    np.testing.assert_array_equal(scores, read_logits(run, 0, "oof"))
    evaluation = vqa.evaluate_run(run)
    ladder = evaluation.ladder
    assert ladder["cost"].iloc[:3].tolist() == [1, 1, 2]
    assert ladder.index[2] == "mean of 2 seeds"
    assert ladder.loc["mean of 2 seeds", "gain"] < 0
    assert not ladder.loc["mean of 2 seeds", "used"]
    report = vqa.write_report(run, evaluation).read_text(encoding="utf-8")
    assert "Only the first seed scores, because the mean over all loses on held-out rows" in report


@pytest.mark.slow
def test_a_fold_counts_with_the_seeds_that_it_has(mini_run):
    run = planted_seeds(mini_run(seeds=TWO_SEEDS), {0: 2.0, 1: 2.0, 3: 2.0})
    assert [run.members_behind(fold) for fold in (0, 1)] == [[0, 3], [1]]
    same = vqa.read_scores(run, 1, "test")["logits"]
    np.testing.assert_array_equal(same, read_logits(run, 1, "test"))
    evaluation = vqa.evaluate_run(run)
    assert evaluation.ladder["cost"].iloc[:3].tolist() == [1, 1.5, 1]
    verdict = vqa.make_verdict(run, evaluation)
    assert verdict.models == 3
    assert "Missing: fold 1 seed 7 of 2, because the time ended" in " ".join(verdict.alarms)
    assert verdict.next_step.endswith("what is missing: 3 of 4 models are trained.")
    report = vqa.write_report(run, evaluation).read_text(encoding="utf-8")
    assert "fold 0 has 2, fold 1 has 1" in report


# --- Files ----------------------------------------------------------------------------------------


def test_files_of_further_seeds_are_named_and_made_anew(two_seeds):
    run = two_seeds
    (run.fold_dir(4) / "test.npz").unlink()
    with pytest.raises(FileNotFoundError, match="fold 1 seed 7 is trained, but not scored"):
        vqa.read_oof(run)
    run.fold_dir(3).joinpath("test.npz").write_bytes(b"half")
    vqa.atomic_write(run.directory / "selection.json", '{"weights": "raw", "seeds": 3}')
    assert vqa.delete_damaged_files(run) == 2
    assert not (run.fold_dir(3) / "test.npz").exists()
    assert not (run.directory / "selection.json").exists()
    assert any("3 is no number of seeds" in event for event in events(run))


def test_a_process_of_a_group_gets_what_seeds_are_selected_by(two_seeds, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with vqa.worker_directory(two_seeds.directory, [4]) as directory:
        copy = vqa.Run.open(directory)
        assert vqa.select_weights(copy) == "raw"
        assert copy.selected_seeds == 2
        assert (copy.fold_dir(4) / "oof.npz").exists()
        assert not (copy.fold_dir(3) / "oof.npz").exists()


# --- Other features -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_scored_in_16_bits_once_all_its_seeds_are(two_seeds):
    run = two_seeds
    for member in (0, 1, 3, 4):
        assert not run.is_rescored
        for name in ("oof", "test"):
            content = dict(np.load(run.fold_dir(member) / f"{name}.npz"))
            content["view_names"] = np.array(["rotation 0" + vqa.SUFFIX_16_BIT])
            np.savez(run.fold_dir(member) / f"{name}_16bit.npz", **content)
    assert run.is_rescored
    assert vqa.read_oof(run).logits.shape == (len(run.train), 2, 4)


@pytest.mark.slow
def test_models_on_all_rows_are_averaged_over_the_seeds_too(mini_run):
    run = mini_run(seeds=TWO_SEEDS, final_retrain=True)
    planted_seeds(run, dict.fromkeys((0, 1, 2, 3, 4, 5), 2.0))
    assert run.members_to_train == [0, 1, 2, 3, 4, 5]
    evaluation = vqa.evaluate_run(run)
    tests = vqa.predict_test(run, evaluation)
    assert list(tests) == run.submission_models == [0, 1, 2]
    parts = [read_logits(run, member, "test") for member in (2, 5)]
    scores = np.mean(log_softmax(parts, axis=-1), axis=0)[:, 0]
    temperature = evaluation.calibration.temperatures[2]
    np.testing.assert_allclose(tests[2], vqa.softmax(scores / temperature), rtol=1e-4)
    (run.fold_dir(5) / "test.npz").unlink()  # the time was up
    scores = vqa.read_scores(run, 2, "test")["logits"]
    np.testing.assert_array_equal(scores, read_logits(run, 2, "test"))


@pytest.mark.slow
def test_a_run_of_seeds_learns_from_the_mean_over_a_teachers_seeds(two_seeds, mini_run):
    settings = {"pseudo_label_from": str(two_seeds.directory), "pseudo_label_confidence": 0.1}
    student = mini_run(seeds=(42, 8), **settings)
    rows = vqa.training_rows(student, 1).query("source == 'test'")
    tests = vqa.predict_test(two_seeds, vqa.evaluate_run(two_seeds))
    taught = rows[[*vqa.TARGET_COLUMNS]].to_numpy(dtype=float)
    np.testing.assert_allclose(taught, tests[1], atol=1e-4)


@pytest.mark.slow
def test_a_search_trains_its_trials_with_one_seed(mini_run, monkeypatch):
    pytest.importorskip("optuna")
    run = mini_run(seeds=TWO_SEEDS)
    started = []

    def start(settings, *_):
        started.append(settings)
        raise Stop

    monkeypatch.setattr(vqa, "start_run", start)
    space = {"learning_rate": (1e-4, 1e-3)}
    with pytest.raises(Stop):
        vqa.search_hyperparameters(run.config, None, None, space, trials=1, minutes=1)
    assert started[0].seeds == ()


# --- Trained models -------------------------------------------------------------------------------

MEMBERS = [0, 1, 3, 4]


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory):
    return copy_demo_rows(tmp_path_factory.mktemp("few"), train=24, test=8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_rows):
    """A run of two folds and two seeds."""
    folder = tmp_path_factory.mktemp("seeds")
    return run_members(start(few_rows, folder, seeds=TWO_SEEDS))


def start(data, folder, **settings):
    config = vqa.Config.preset(
        "demo",
        data_dir=str(data),
        output_dir=str(folder / "outputs"),
        cache_dir=str(folder / "cache"),
        run_name="run",
        num_epochs=1,
        n_folds=2,
        lora_dropout=0.1,
        tta_rotations=1,
        use_ema=False,
        zeroshot_rows=8,
        max_fallback_share=0.5,
        **settings,
    )
    competition = vqa.load_competition(config.data_dir, config.max_fallback_share)
    folds = vqa.make_folds(competition.train, config.n_folds, config.seed)
    return vqa.start_run(config, competition, folds)


def run_members(run):
    """What run_folds does, in this process, and the submission."""
    vqa.run_stages(run, [0], ["zeroshot"], quiet)
    vqa.run_stages(run, run.members_to_train, ["train", "predict"], quiet)
    vqa.write_submissions(run, vqa.evaluate_run(run))
    return run


def contents(run):
    """The bytes that must not depend on what happened on the way."""
    patterns = ("fold_*/oof.npz", "fold_*/test.npz", "fold_*/*/*.safetensors", "submission_*.csv")
    paths = [path for pattern in patterns for path in run.directory.glob(pattern)]
    paths = [path for path in paths if "checkpoints" not in path.parts]
    return {str(path.relative_to(run.directory)): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_the_models_of_the_first_seed_are_those_of_a_run_without_seeds(trained, few_rows, tmp_path):
    alone = run_members(start(few_rows, tmp_path))
    assert trained.selected_weights == alone.selected_weights
    for member in (0, 1):
        expected = adapter_file(alone, member, "raw").read_bytes()
        assert adapter_file(trained, member, "raw").read_bytes() == expected
        assert adapter_file(trained, member + 3, "raw").read_bytes() != expected
        for name in ("oof", "test"):
            same = read_logits(alone, member, name)
            np.testing.assert_array_equal(read_logits(trained, member, name), same)


def kill_in(run, member, steps):
    """SIGKILL a worker that trains all folds after so many optimizer steps of a member."""
    command = [sys.executable, vqa.__file__, "worker", "--run", str(run.directory)]
    command += ["--folds", ",".join(map(str, MEMBERS)), "--stages", "train,predict"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    metrics = run.fold_dir(member) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= steps):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_killed_run_of_seeds_is_continued_by_another_session_to_the_same_bytes(
    trained, few_rows, tmp_path
):
    backup = tmp_path / "drive" / "vqa"
    backup.parent.mkdir()
    settings = {"seeds": TWO_SEEDS, "backup_dir": str(backup)}
    first = start(few_rows, tmp_path / "first", save_every_steps=1, **settings)
    vqa.run_stages(first, [0], ["zeroshot"], quiet)
    kill_in(first, member=3, steps=1)
    assert first.finished_members == [0, 1]
    shutil.rmtree(first.directory)
    second = start(few_rows, tmp_path / "second", **settings)
    assert second.finished_members == [0, 1]
    assert list(second.fold_dir(3).glob("checkpoints/step_*"))
    assert contents(run_members(second)) == contents(trained)


@pytest.mark.slow
def test_a_seed_that_does_not_fit_into_the_time_is_left_out_and_counted(
    trained, tmp_path, monkeypatch
):
    place = shutil.copytree(trained.directory, tmp_path / "run")
    config = dataclasses.replace(trained.config, output_dir=str(tmp_path))
    late = dataclasses.replace(trained, directory=place, config=config)
    before = contents(late)
    shutil.rmtree(late.fold_dir(4))
    monkeypatch.setattr(vqa.Run, "seconds_left", lambda self: 0.0)
    vqa.run_stages(late, MEMBERS, ["train", "predict"], quiet)
    assert late.finished_members == [0, 1, 3]
    report = vqa.write_report(late, vqa.evaluate_run(late)).read_text(encoding="utf-8")
    assert "train fold 1 seed 7 was left out: the time budget has no" in report
    assert "fold 0 has 2, fold 1 has 1" in report
    monkeypatch.undo()
    vqa.run_stages(late, MEMBERS, ["train", "predict"], quiet)
    assert contents(late) == before
    report = vqa.write_report(late, vqa.evaluate_run(late)).read_text(encoding="utf-8")
    assert "was left out" not in report
