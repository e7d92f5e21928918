"""Part 6, Skill: a run that learned nothing says so, and fits nothing to its scores."""

import html
import logging

import numpy as np
import pandas as pd
import pytest
from planted import VIEWS, hidden_labels, longer, one_hot, planted_run, scored_frames

import vqa_helpers as vqa

COLLAPSE_BIAS = np.array([0.0, 3.0, 0.0, 0.0])  # of the letter b, in every view


# --- Guesses --------------------------------------------------------------------------------------


def oof_rows(labels, answers, blanks=0, images=None):
    """Out-of-fold rows that give these answers; the last `blanks` choices of each are blank."""
    count = len(labels)
    hashes = np.arange(count) if images is None else images
    frame = pd.DataFrame({choice: ["text"] * count for choice in "abcd"})
    frame[list("abcd")[4 - blanks :]] = ""
    frame["pixel_hash"] = hashes.astype(str)
    logits = one_hot(answers)[:, None]
    return vqa.OofLogits(frame, logits, labels, labels * 0, ("rotation 0",))


def measured(labels, answers, **options):
    letters = pd.Series(np.array([*"abcd"])[labels])
    return vqa.measure_skill(oof_rows(labels, answers, **options), letters)


ROW = np.arange(400)
EVEN = ROW % 4
UNEVEN = np.repeat([1, 0, 2, 3], [220, 60, 60, 60])  # b is right in 55%
TWO = ROW % 2


def right_in(labels, share):
    """Answers of which this share is right, the others one choice off; spread evenly."""
    is_wrong = (np.arange(len(labels)) * 0.6180339) % 1 >= share
    return (labels + is_wrong) % 4


FIRST_THIRD = (EVEN + (ROW >= 133)) % 4  # rows of the same images are right together


@pytest.mark.parametrize(
    ("labels", "answers", "options", "guess", "guess_accuracy", "has_skill"),
    [
        (EVEN, right_in(EVEN, 0.25), {}, "one of the choices at random", 0.25, False),
        (EVEN, right_in(EVEN, 0.33), {}, "one of the choices at random", 0.25, True),
        (EVEN, EVEN * 0 + 1, {}, "one of the choices at random", 0.25, False),
        (UNEVEN, UNEVEN * 0 + 1, {}, "always b", 0.55, False),
        (UNEVEN, right_in(UNEVEN, 0.45), {}, "always b", 0.55, False),
        (UNEVEN, right_in(UNEVEN, 0.75), {}, "always b", 0.55, True),
        (UNEVEN, right_in(UNEVEN, 0.57), {}, "always b", 0.55, False),
        (TWO, right_in(TWO, 0.5) % 2, {"blanks": 2}, "one of the choices at random", 0.5, False),
        (EVEN, FIRST_THIRD, {}, "one of the choices at random", 0.25, True),
        (EVEN, FIRST_THIRD, {"images": ROW // 40}, "one of the choices at random", 0.25, False),
    ],
    ids=[
        "a quarter right",
        "a third right",
        "always b where letters are even",
        "always the most frequent letter",
        "below the most frequent letter",
        "above the most frequent letter",
        "2 points above the most frequent letter",
        "half right of two choices",
        "a third right in images of their own",
        "a third right in ten images",
    ],
)
def test_a_model_is_compared_with_the_guess_that_is_harder_to_beat(
    labels, answers, options, guess, guess_accuracy, has_skill
):
    skill = measured(labels, answers, **options)
    assert skill.guess == guess
    assert skill.guess_accuracy == pytest.approx(guess_accuracy)
    assert skill.has_skill is has_skill
    assert skill.accuracy == (labels == answers).mean()
    assert (vqa.lack_of_skill(skill) == "") is has_skill


def test_a_model_at_chance_is_rarely_taken_for_skilled():
    random = np.random.default_rng(0)
    labels = EVEN[:100]
    found = [measured(labels, random.integers(0, 4, 100)).has_skill for _ in range(40)]
    assert sum(found) <= 4


# --- Runs -----------------------------------------------------------------------------------------


def scored_run(run, replace, signal=0.0, bias=0.0, zeroshot=0.0):
    """The run, ten times as long, with made-up scores of two views and of the base model."""
    run = planted_run(longer(run, replace))
    random = np.random.default_rng(1)
    for fold in run.config.folds_to_train:
        for name, frame in scored_frames(run, fold).items():
            labels = frame.get("label", hidden_labels(frame["id"])).to_numpy()
            logits = random.normal(size=(len(frame), 2, 4)) + bias
            logits += signal * one_hot(labels)[:, None]
            path = run.fold_dir(fold) / f"{name}.npz"
            vqa.write_logits(path, frame, logits, VIEWS, run.fingerprint)
    base = random.normal(size=(len(run.train), 1, 4))
    base += zeroshot * one_hot(run.train["label"].to_numpy())[:, None]
    path = run.directory / "zeroshot.npz"
    vqa.write_logits(path, run.train, base, VIEWS[:1], run.fingerprint)
    vqa.atomic_write(run.directory / "selection.json", '{"weights": "raw"}')
    return run


@pytest.fixture
def at_chance(mini_run, replace):
    return scored_run(mini_run(), replace)


CONSEQUENCE = (
    "So no temperature and no blend is fitted and no label is suspected. The submission "
    "is made of the fine-tuned models all the same, and cannot be told from a guess."
)


def test_a_run_at_chance_fits_nothing_and_says_so_first(at_chance, caplog):
    evaluation = vqa.evaluate_run(at_chance)
    assert set(evaluation.calibration.temperatures.values()) == {1.0}
    assert evaluation.method == "mean"
    assert not evaluation.fold_table["at_bound"].any()
    assert not {"temperature", "automatic choice", "weighted views"} & set(evaluation.ladder.index)
    assert caplog.text.count("WARNING") == 1
    assert vqa.lack_of_skill(evaluation.skill) in caplog.text

    alarm = vqa.make_verdict(at_chance, evaluation).alarms[0]
    right = evaluation.skill.right
    assert alarm.startswith(
        f"The model has learned nothing that shows: its out-of-fold accuracy, {right / 360:.3f} "
        f"({right} of 360 rows), is not above guessing, 0.306 (always c), beyond chance. "
    )
    assert "Training is not better than the base model beyond chance: " in alarm
    assert alarm.endswith(CONSEQUENCE)
    page = vqa.learning_html(evaluation)
    assert f"Alarm · 경고</b><br>{html.escape(alarm)}</div>" in page
    assert "font-size:20px" in page


def test_the_report_of_a_run_at_chance_begins_with_the_alarm(at_chance):
    evaluation = vqa.evaluate_run(at_chance)
    text = vqa.write_report(at_chance, evaluation).read_text(encoding="utf-8")
    assert f"\n- Alarm: {vqa.learning_alarm(evaluation)}\n" in text
    used = [line for line in text.splitlines() if " not above guessing |" in line]
    assert [line.split(" |")[0] for line in used] == ["| fine-tuned, one view", "| mean of 2 views"]
    written = pd.read_csv(at_chance.directory / "tables" / "ladder.csv", index_col=0)
    assert written.loc["fine-tuned, one view", "alarm"] == "not above guessing"


def test_the_steps_of_a_submission_without_skill_are_marked(at_chance):
    table = vqa.ladder_for_people(vqa.evaluate_run(at_chance).ladder)
    assert table["used"].to_dict() == {
        "zero-shot": "",
        "fine-tuned, one view": "yes, but not above guessing",
        "mean of 2 views": "yes, but not above guessing",
    }


def test_no_label_is_suspected_by_a_model_without_skill(at_chance, caplog):
    evaluation = vqa.evaluate_run(at_chance)
    labels = evaluation.oof.labels
    assert len(vqa.label_suspects(evaluation.probabilities, labels)) > 100  # if it were asked
    caplog.clear()
    tables = vqa.write_error_tables(at_chance, evaluation, np.arange(360))
    assert tables["label_suspects"].empty
    assert set(tables["active_list"]["rows"]) == {"test"}
    assert "No label is suspected: the model is not above guessing" in caplog.text
    written = pd.read_csv(at_chance.directory / "tables" / "label_suspects.csv")
    assert {"id", "answer", "likely", "margin"} <= set(written.columns)


@pytest.mark.parametrize("method", ["weighted", "vote", "auto"])
def test_a_blend_that_was_asked_for_is_not_fitted_without_skill(mini_run, replace, method):
    run = scored_run(mini_run(ensemble_method=method), replace)
    evaluation = vqa.evaluate_run(run)
    assert evaluation.method == "mean"
    for probabilities in vqa.predict_test(run, evaluation).values():
        assert np.allclose(probabilities.sum(axis=1), 1)


def test_the_curve_of_rows_in_doubt_fits_no_temperature_without_skill(at_chance, caplog):
    curve = vqa.doubt_curve(at_chance)
    oof = vqa.read_oof(at_chance)
    plain = vqa.score_row(vqa.softmax(vqa.combine_views(oof.logits)), oof.labels)
    assert curve.loc["all rows", "nll"] == pytest.approx(plain["nll"])
    assert "bound" not in caplog.text


def test_a_run_that_collapsed_says_both_how_and_that_it_learned_nothing(mini_run, replace):
    run = scored_run(mini_run(), replace, bias=COLLAPSE_BIAS)
    evaluation = vqa.evaluate_run(run)
    first, second = vqa.make_verdict(run, evaluation).alarms
    answered = (evaluation.probabilities.argmax(axis=1) == 1).sum()
    share = (evaluation.oof.labels == 1).mean()
    assert first.startswith("The model has learned nothing that shows: ")
    assert second == (
        "One letter is preferred in the out-of-fold rows: the model answered b in "
        f"{answered} of 360 rows ({answered / 360:.0%}); b is right in {share:.0%}."
    )
    assert answered > 300


def test_what_a_worker_noted_of_the_weights_in_use_is_an_alarm(at_chance):
    notes = vqa.MetricLogger(at_chance.directory / "events.jsonl")
    notes.log(event="fold 0, raw weights: the model answered b in 61 of 80 rows (76%)")
    notes.log(event="fold 0, ema weights: the model answered b in 60 of 80 rows (75%)")
    evaluation = vqa.evaluate_run(at_chance)
    _, *others = vqa.make_verdict(at_chance, evaluation).alarms
    assert others == ["Fold 0, raw weights: the model answered b in 61 of 80 rows (76%)."]
    report = vqa.write_report(at_chance, evaluation).read_text(encoding="utf-8")
    assert "| fold 0, ema weights: the model answered b in 60 of 80 rows (75%) |" in report


def test_skill_that_training_did_not_add_keeps_its_temperature(mini_run, replace):
    run = scored_run(mini_run(), replace, signal=2.0, zeroshot=2.3)
    evaluation = vqa.evaluate_run(run)
    alarm = vqa.make_verdict(run, evaluation).alarms[0]
    tuned = evaluation.ladder.loc["fine-tuned, one view"]
    gain = vqa.points_with_interval(tuned["gain"], tuned["gain_low"], tuned["gain_high"])
    base = evaluation.ladder.loc["zero-shot", "accuracy"]
    assert alarm == (
        "Training is not better than the base model beyond chance: "
        f"{gain} points in one view, against the base model's {base:.3f}. "
        "The submission is made of the fine-tuned models all the same."
    )
    assert evaluation.skill.has_skill
    assert "temperature" in evaluation.ladder.index
    used = vqa.ladder_for_people(evaluation.ladder)["used"]
    assert used["fine-tuned, one view"] == "yes, but not above zero-shot"


def test_a_base_model_that_was_better_is_named_in_alarm_and_ladder(mini_run, replace):
    run = scored_run(mini_run(), replace, signal=1.0, zeroshot=4.0)
    evaluation = vqa.evaluate_run(run)
    alarm = vqa.learning_alarm(evaluation)
    assert alarm.startswith("Training did harm: -")
    assert " points in one view, against the base model's 0." in alarm
    assert evaluation.ladder.loc["fine-tuned, one view", "alarm"] == "worse than zero-shot"


def test_a_run_that_learned_has_neither_alarm_nor_column(mini_run, replace):
    run = scored_run(mini_run(), replace, signal=1.5)
    evaluation = vqa.evaluate_run(run)
    assert vqa.learning_alarm(evaluation) == ""
    assert "alarm" not in evaluation.ladder
    page = vqa.learning_html(evaluation)
    assert f"The model has learned: {evaluation.skill.accuracy:.3f} of the out-of-fold" in page
    assert "guessing has 0.306 (always c), the base model 0.2" in page
    assert "font-size:15px" in page


def test_runs_without_skill_are_combined_by_their_mean_only(mini_run, replace, tmp_path):
    first = scored_run(mini_run(run_name="first"), replace)
    second = scored_run(mini_run(run_name="second", seed=7), replace)
    table, answers = vqa.ensemble_runs([first.directory, second.directory], tmp_path / "both")
    names = [str(first.directory), str(second.directory)]
    assert table.index.tolist() == [*names, "mean", "automatic choice"]
    assert len(answers) == 12


# --- Warnings that repeat -------------------------------------------------------------------------


def test_a_warning_that_repeats_is_logged_once_with_its_count(caplog):
    @vqa.each_warning_once()
    def work():
        for number in range(3):
            vqa.LOGGER.warning("temperature %d", 20)
            vqa.LOGGER.info("step %d", number)
        vqa.LOGGER.warning("once")
        raise ValueError("the end")

    caplog.set_level(logging.INFO)
    with pytest.raises(ValueError, match="the end"):
        work()
    assert caplog.messages == ["step 0", "step 1", "step 2", "temperature 20 (3 times)", "once"]
    vqa.LOGGER.warning("afterwards")
    assert caplog.messages[-1] == "afterwards"
    assert vqa.LOGGER.filters == []


def test_what_is_decorated_may_call_what_is_decorated(caplog):
    @vqa.each_warning_once()
    def inner():
        vqa.LOGGER.warning("both")

    with vqa.each_warning_once():
        inner()
        inner()
    assert caplog.messages == ["both (2 times)"]


@pytest.mark.parametrize(
    ("scores", "label", "reason"),
    [
        ([1.0, 0, 0, 0], 0, "0.05 is at its bound: all answers are right, so nothing shows how"),
        ([1.0, 0, 0, 0], 1, "20 is at its bound: the right choices score no higher than the"),
        ([0.0, 0, 0, 0], 1, "20 is at its bound: the right choices score no higher than the"),
    ],
    ids=["all right", "all wrong", "all equal"],
)
def test_a_temperature_at_its_bound_gives_the_true_reason(scores, label, reason, caplog):
    vqa.TemperatureScaler().fit(np.tile(scores, (30, 1)), np.full(30, label))
    assert f"temperature {reason}" in caplog.text


def test_the_reason_is_not_guessed_from_the_accuracy():
    """Most answers are right, but barely, and the others are far off: the scores say nothing."""
    labels = ROW[:100] % 2
    is_right = ROW[:100] < 60
    scores = np.where(is_right, 0.1, -5.0)[:, None] * one_hot(labels)
    oof = oof_rows(labels, labels)  # in one fold
    assert vqa.reasons_at_bounds(oof, scores) == {
        0: "the right choices score no higher than the others: no information about the answers"
    }


def test_a_fold_that_is_all_right_says_so_once(mini_run, replace, caplog):
    run = scored_run(mini_run(), replace, signal=4.0)
    evaluation = vqa.evaluate_run(run)
    (message,) = [text for text in caplog.messages if "bound" in text]
    assert message.startswith("temperature 0.05 is at its bound: all answers are right")
    assert message.endswith(" times)")
    alarms = vqa.make_verdict(run, evaluation).alarms
    assert alarms == tuple(
        f"The temperature is at its bound in fold {fold}: "
        "all answers are right, so nothing shows how sure to be."
        for fold in (0, 1)
    )
