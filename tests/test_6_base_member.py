"""Part 6, Base member: the untouched base model is mixed in where OOF rows prefer it."""

import json

import numpy as np
import pytest
from planted import hidden_labels, longer, one_hot, planted_run, rows_of_fold, write_kinds

import vqa_helpers as vqa

VIEWS = ["rotation 0", "rotation 1"]


def write_base(run, strength, seed=9, write=vqa.write_logits):
    """Made-up scores of the base model: `strength` times the answer, plus noise of its own."""
    random = np.random.default_rng(seed)
    for fold in run.config.folds_to_train:
        frames = {"base_oof": rows_of_fold(run, fold), "base_test": run.base_test_rows(fold)}
        for name, frame in frames.items():
            labels = frame.get("label", hidden_labels(frame["id"])).to_numpy()
            noise = random.normal(size=(len(frame), 2, 4))
            logits = strength * one_hot(labels)[:, None] + noise
            write(run.fold_dir(fold) / f"{name}.npz", frame, logits, VIEWS, run.fingerprint)


@pytest.fixture
def with_base(mini_run, replace):
    """Make a run of 360 rows whose base model has that strength: with_base(2.0) -> Run."""

    def make(strength, **overrides):
        settings = {"use_base_member": "on", "ensemble_method": "mean", **overrides}
        run = planted_run(longer(mini_run(**settings), replace))
        write_base(run, strength)
        return run

    return make


STEPS = [mixture.step for mixture in vqa.BASE_MIXTURES.values()]


@pytest.mark.slow
def test_a_base_model_that_errs_elsewhere_is_mixed_in_as_the_ladder_says(with_base):
    run = with_base(2.0)
    evaluation = vqa.evaluate_run(run)
    ladder = evaluation.ladder
    assert ladder.index.tolist()[-5:] == [*STEPS, vqa.STEP_BASE_CHOICE]
    assert set(ladder.loc[STEPS, "against"]) == {"temperature"}
    assert ladder.loc[vqa.STEP_BASE_CHOICE, "gain_low"] > 0
    chosen = vqa.BASE_MIXTURES[evaluation.base.method].step
    assert ladder.index[ladder["used"]].tolist()[-2:] == [chosen, vqa.STEP_BASE_CHOICE]
    # The base model is scored once for both models.
    one_model = ladder.loc["temperature", "cost"]
    assert ladder.loc[chosen, "cost"] == 1.5 * one_model
    right = evaluation.probabilities.argmax(axis=1) == evaluation.oof.labels
    assert ladder.loc[vqa.STEP_BASE_CHOICE, "accuracy"] == right.mean()

    sentence = vqa.describe_base_member(run, evaluation)
    assert sentence.startswith(f"The base model is a member of the submission ({chosen}). ")
    verdict = vqa.make_verdict(run, evaluation)
    assert verdict.base_member == sentence
    assert f"- {sentence}" in vqa.verdict_markdown(verdict)
    assert sentence in vqa.verdict_html(verdict)
    assert sentence in vqa.write_report(run, evaluation).read_text(encoding="utf-8")


def test_test_rows_are_mixed_by_the_rule_of_the_out_of_fold_rows(with_base, replace):
    run = with_base(2.0)
    evaluation = vqa.evaluate_run(run)
    alone = vqa.predict_test(run, replace(evaluation, base=None))
    base = evaluation.base
    by_test_rows = vqa.predict_base_test(run, evaluation.oof, evaluation.views, base)
    # In the order of the test rows, although the folds' shares alternate.
    logits = np.empty((len(run.test), 2, 4))
    for fold in (0, 1):
        path = run.fold_dir(fold) / "base_test.npz"
        logits[fold::2] = vqa.read_arrays(path, run.fingerprint)["logits"]
    expected = vqa.softmax(vqa.combine_views(logits[:, evaluation.views]) / base.temperature)
    np.testing.assert_array_equal(by_test_rows, expected)
    for method in vqa.BASE_MIXTURES:
        mixed = replace(evaluation, base=replace(base, method=method))
        for fold, probabilities in vqa.predict_test(run, mixed).items():
            members = np.stack([alone[fold], by_test_rows])
            answers = base.mix(method, base.members, base.labels, members)
            np.testing.assert_array_equal(probabilities, answers)
            np.testing.assert_allclose(probabilities.sum(axis=1), 1)


def test_only_rows_in_doubt_are_changed_by_the_mixtures_for_them():
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 400)
    scores = 2 * one_hot(labels) + random.normal(size=(2, 400, 4))
    members = vqa.softmax(scores)
    member = vqa.BaseMember(members, labels, scaling=True)
    leads = vqa.answer_leads(members[0])
    in_doubt = leads <= np.sort(leads)[100]
    assert (leads <= member.doubt_lead).sum() == 100
    candidates = member.candidates(np.arange(400))
    for name in ("half in doubt", "weighted in doubt"):
        changed = (candidates[name].probabilities != members[0]).any(axis=1)
        assert not changed[~in_doubt].any()
        assert changed.sum() == 100
    half = vqa.fit_and_blend("geometric mean", members[:, :300], labels[:300], members[:, 300:])
    mixed = member.mix("half", members[:, :300], labels[:300], members[:, 300:])
    np.testing.assert_array_equal(mixed, half)
    few = vqa.BaseMember(members[:, :100], labels[:100], scaling=True)
    assert list(few.candidates(np.arange(100))) == ["without", "half", "weighted"]


@pytest.mark.slow
def test_a_base_model_that_knows_nothing_stays_out(with_base, replace):
    run = with_base(0.0)
    evaluation = vqa.evaluate_run(run)
    assert not evaluation.base.is_used
    alone = vqa.predict_test(run, replace(evaluation, base=None))
    for fold, probabilities in vqa.predict_test(run, evaluation).items():
        np.testing.assert_array_equal(probabilities, alone[fold])
    sentence = vqa.describe_base_member(run, evaluation)
    assert sentence.startswith("The base model is no member of the submission: no mixture with it")


@pytest.mark.slow
def test_scores_that_are_there_are_not_used_where_it_is_switched_off(with_base):
    run = with_base(2.0, use_base_member="off")
    evaluation = vqa.evaluate_run(run)
    assert evaluation.base is None
    assert not set(STEPS) & set(evaluation.ladder.index)
    assert "base model is no member" not in vqa.write_report(run, evaluation).read_text("utf-8")


# --- Whether it is scored at all ------------------------------------------------------------------


def known_run(run, tuned, base, fold_count=2):
    """What training and zero-shot scoring leave of a run with these accuracies."""
    for fold in run.config.folds_to_train[:fold_count]:
        write_kinds(run, fold, {"raw": {"accuracy": tuned, "nll": 0.5}})
    labels = run.train["label"].to_numpy()
    right = np.arange(len(labels)) < round(base * len(labels))
    answers = np.where(right, labels, (labels + 1) % 4)
    logits = one_hot(answers)[:, None]
    path = run.directory / "zeroshot.npz"
    vqa.write_logits(path, run.train, logits, VIEWS[:1], run.fingerprint)
    return run


NEAR = "in one view it has 0.860 right, trained models 0.900: 1.4 times the errors"
FAR = "in one view it has 0.600 right, trained models 0.900: 4.0 times the errors"


@pytest.mark.parametrize(
    ("setting", "times", "tuned", "base", "wanted", "reason"),
    [
        ("auto", 20, 0.9, 0.86, True, f"{NEAR}, at most 1.5"),
        ("auto", 20, 0.9, 0.6, False, f"{FAR}, over 1.5"),
        ("on", 1, 0.9, 0.6, True, "use_base_member is on"),
        ("off", 20, 0.9, 0.86, False, "use_base_member is off"),
        ("auto", 1, 0.9, 0.86, False, "36 rows out of fold are too few to judge it; 400 will do"),
    ],
)
def test_auto_asks_whether_it_errs_far_more_than_the_trained_models(
    mini_run, replace, setting, times, tuned, base, wanted, reason
):
    run = longer(mini_run(use_base_member=setting), replace, times)
    run = known_run(run, tuned, base)
    assert vqa.wants_base_member(run) == (wanted, reason)
    assert vqa.waiting_folds(run, "base", [0, 1]) == ([0, 1] if wanted else [])


def test_it_waits_for_all_folds_which_share_its_test_rows(mini_run):
    run = known_run(mini_run(use_base_member="on"), 0.9, 0.86, fold_count=1)
    reason = "the folds share its test rows, and of these folds [1] are not trained"
    assert vqa.wants_base_member(run) == (False, reason)


def test_it_scores_a_fold_that_only_a_further_seed_has_trained(mini_run, replace):
    run = longer(mini_run(use_base_member="auto", seeds=(42, 7)), replace, 20)
    run = known_run(run, 0.9, 0.86, fold_count=1)
    write_kinds(run, 4, {"raw": {"accuracy": 0.9, "nll": 0.5}})  # of fold 1, seed 7
    assert run.finished_members == [0, 4]
    assert vqa.wants_base_member(run) == (True, f"{NEAR}, at most 1.5")
    assert vqa.waiting_folds(run, "base", [0, 1, 3, 4]) == [0, 1]


def test_a_worker_is_started_for_it_only_where_it_is_wanted(mini_run, replace, monkeypatch):
    launched = []
    monkeypatch.setattr(vqa, "worker_devices", lambda config: ["0", "1"])
    monkeypatch.setattr(vqa, "launch_workers", lambda run, jobs, stages: launched.append(stages))
    run = known_run(mini_run(), 0.9, 0.86)
    for fold in (0, 1):
        for name in ("oof", "test"):
            (run.fold_dir(fold) / f"{name}.npz").touch()
    monkeypatch.setattr(vqa, "delete_damaged_files", lambda run: 0)
    vqa.run_folds(run.config)
    assert launched == []
    vqa.run_folds(replace(run.config, use_base_member="on"))  # the run's own setting counts
    assert launched == []
    path = run.directory / "config.json"
    content = json.loads(path.read_text())
    content["config"]["use_base_member"] = "on"
    path.write_text(json.dumps(content))
    vqa.run_folds(replace(run.config, use_base_member="on"))
    assert launched == [["train", "predict", "base"]]  # all but the last are done


def test_it_can_be_added_to_a_finished_run():
    fingerprint = vqa.Config().fingerprint
    for choice in ("on", "off"):
        assert vqa.Config(use_base_member=choice).fingerprint == fingerprint


# --- Ensembles of runs ----------------------------------------------------------------------------


@pytest.mark.slow
def test_base_models_are_members_of_an_ensemble_of_runs(mini_run, replace, tmp_path, monkeypatch):
    first = mini_run(run_name="first", ensemble_method="mean")
    second = mini_run(run_name="second", seed=7, ensemble_method="mean")
    runs = [
        planted_run(longer(run, replace), (0.7, 0.7), seed)
        for seed, run in enumerate((first, second))
    ]
    folders = [run.directory for run in runs]
    before, _ = vqa.ensemble_runs(folders, tmp_path / "before")
    write_base(runs[0], 2.0)
    chosen = "weighted with base models"

    def choose(candidates, *_):
        return chosen if chosen in candidates else next(iter(candidates))

    monkeypatch.setattr(vqa, "choose_blend", choose)  # so that the first run goes without it
    table, answers = vqa.ensemble_runs(folders, tmp_path / "after")
    added = [f"{name} with base models" for name in vqa.BLENDS_WITH_BASE]
    assert [name for name in table.index if name not in before.index] == added
    assert table.loc[chosen, "accuracy"] > before["accuracy"].max() + 0.05
    predicted = answers.set_index("id")["answer"].loc[runs[0].test["id"]]
    right = predicted.to_numpy() == np.array([*"abcd"])[hidden_labels(runs[0].test["id"])]
    without, _ = vqa.ensemble_runs(folders[1:], tmp_path / "without")
    assert right.mean() >= 0.75
    assert not set(added) & set(without.index)


def test_the_model_on_all_rows_comes_last_and_costs_the_base_model_too():
    probabilities = np.full((8, 4), 0.25)
    member = vqa.BaseMember(
        np.stack([probabilities, probabilities]), np.zeros(8, int), scaling=False, cost=0.7
    )
    steps = {
        vqa.STEP_ONE_VIEW: vqa.LadderStep(probabilities, used=True),
        vqa.STEP_FINAL_MODEL: vqa.LadderStep(np.full((8, 4), np.nan), used=True),
    }
    found = vqa.with_base_steps(steps, vqa.BaseChoice(member, {}, probabilities))
    assert list(found) == [vqa.STEP_ONE_VIEW, vqa.STEP_BASE_CHOICE, vqa.STEP_FINAL_MODEL]
    assert [step.extra_cost for step in found.values()] == [0.0, 0.7, 0.7]


# --- Time and damage ------------------------------------------------------------------------------


def test_preflight_counts_it_where_it_may_be_scored(replace):
    nothing = dict.fromkeys(vqa.StepSeconds.__dataclass_fields__, 0.0)
    seconds = vqa.StepSeconds(**{**nothing, "first_views": 1.0})
    size = vqa.JobSize(120, 0, 0, 50, 1000, 300, is_rescored=False, scores_base=True)
    config = vqa.Config.preset("demo", n_folds=3, final_retrain=True)
    estimate = vqa.TimeEstimate(config, seconds, size, devices=("cpu core",))
    parts = estimate.parts()
    assert parts["base: held-out rows"] == pytest.approx(120)  # each row once
    assert parts["base: test rows"] == pytest.approx(50)
    without = replace(estimate, size=replace(size, scores_base=False))
    assert "base: test rows" not in without.parts()
    difference = estimate.wall_seconds() - without.wall_seconds()
    assert difference == pytest.approx(170)


@pytest.mark.parametrize("devices", [("0",), ("0", "1")])
def test_preflight_counts_it_once_for_all_seeds_and_in_the_views_of_all_rows(devices):
    nothing = dict.fromkeys(vqa.StepSeconds.__dataclass_fields__, 0.0)
    size = vqa.JobSize(120, 0, 0, 50, 1000, 300, is_rescored=False, scores_base=True)

    def parts(step, **settings):
        config = vqa.Config.preset("demo", n_folds=3, use_base_member="on", **settings)
        seconds = vqa.StepSeconds(**{**nothing, step: 1.0})
        return vqa.TimeEstimate(config, seconds, size, devices).parts()

    of_seeds = parts("first_views", seeds=(42, 7))
    assert of_seeds["base: held-out rows"] == pytest.approx(120)
    assert of_seeds["base: test rows"] == pytest.approx(50)
    in_doubt = parts("all_views", doubt_steps=(("rotations", 0.5),))
    assert in_doubt["base: test rows"] == 0  # it takes no step
    asked_already = vqa.Config(doubt_steps=(("base", 0.5),))
    assert not vqa.may_score_base(asked_already, rows=4000, zeroshot_accuracy=0.9)


@pytest.mark.parametrize(
    ("name", "deleted"),
    [("base_oof", {"base_oof", "base_test"}), ("base_test", {"base_test"})],
)
def test_damaged_scores_of_the_base_model_are_made_anew(mini_run, caplog, name, deleted):
    run = known_run(mini_run(use_base_member="on"), 0.9, 0.86)
    write_base(run, 1.0)
    for item in ("oof", "test"):
        (run.fold_dir(0) / f"{item}.npz").unlink(missing_ok=True)
    before = {path.stem for path in run.fold_dir(0).glob("base_*.npz")}
    path = run.fold_dir(0) / f"{name}.npz"
    content = vqa.read_arrays(path, run.fingerprint)
    content["ids"] = np.array([f"other_{item}" for item in content["ids"]])
    np.savez(path, **content)
    damages = list(vqa._score_damages(run, 0))
    assert len(damages) == 1
    assert damages[0].problem.startswith(f"{path} cannot be read (its rows are not those")
    vqa.delete_outputs(run, damages[0].files)
    assert before - {path.stem for path in run.fold_dir(0).glob("base_*.npz")} == deleted
    assert not run.is_done("base", 0)
    assert run.is_done("base", 1)
