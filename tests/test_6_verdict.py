"""The verdict after training, and what is made for people's eyes: figures and short tables."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
from planted import rewrite_rows
from running import ONE_VIEW

import vqa_helpers as vqa

VIEWS = ONE_VIEW


def planted(run, signal, folds=(0, 1), zeroshot=0.5, times=10):
    """The run with made-up scores: `signal` times the answer, plus noise; each row `times` over."""
    random = np.random.default_rng(0)
    copies = [run.train.assign(id=run.train["id"] + f"_{number}") for number in range(times)]
    train = pd.concat(copies, ignore_index=True)
    run = dataclasses.replace(run, train=train.assign(pixel_hash=train["id"]))
    rewrite_rows(run, "folds", run.train)
    for fold in folds:
        for name, frame in (("oof", run.train[run.train["fold"] == fold]), ("test", run.test)):
            truth = np.eye(4)[frame["label"]] if name == "oof" else np.zeros((len(frame), 4))
            logits = signal * truth + random.normal(size=(len(frame), 4))
            path = run.fold_dir(fold) / f"{name}.npz"
            vqa.write_logits(path, frame, logits[:, None], VIEWS, run.fingerprint)
        vqa.atomic_write(run.fold_dir(fold) / "result.json", "{}")
        stages = vqa.MetricLogger(run.directory / "stages.jsonl")
        stages.log(label=f"train fold {fold}", seconds=600)
    logits = zeroshot * np.eye(4)[run.train["label"]] + random.normal(size=(len(run.train), 4))
    path = run.directory / "zeroshot.npz"
    vqa.write_logits(path, run.train, logits[:, None], VIEWS, run.fingerprint)
    vqa.atomic_write(run.directory / "selection.json", '{"weights": "raw"}')
    return run


def fold_results(best_epochs, epochs):
    """Results of folds that kept these epochs, of so many."""
    history = pd.DataFrame({"epoch": range(1, epochs + 1), "loss": 1.0, "accuracy": 0.5})
    return [vqa.FoldResult(fold, best, history, {}, {}) for fold, best in enumerate(best_epochs)]


@pytest.fixture
def good(mini_run):
    run = planted(mini_run(num_epochs=3), signal=3.0)
    return run, vqa.evaluate_run(run)


# ----------------------------------------------------------------------------------------- figures


@pytest.mark.slow
def test_ninety_of_a_hundred_leaderboards_are_in_the_interval():
    random = np.random.default_rng(0)
    hits = []
    for _ in range(100):
        correct = random.random(200) < 0.8
        interval = vqa.accuracy_interval(correct, np.arange(200))
        low, high = vqa.widen_for_leaderboard(correct.mean(), interval, 200, 100)
        hits.append(low <= (random.random(100) < 0.8).mean() <= high)
    assert 0.82 <= np.mean(hits) <= 0.97


def test_rows_of_one_image_make_the_interval_wider():
    correct = np.repeat(np.random.default_rng(0).random(50) < 0.7, 4)
    alone = vqa.accuracy_interval(correct, np.arange(200))
    together = vqa.accuracy_interval(correct, np.repeat(np.arange(50), 4))
    assert together[1] - together[0] > 1.5 * (alone[1] - alone[0])


def test_a_good_run_says_what_to_expect_and_raises_no_alarm(good):
    run, evaluation = good
    verdict = vqa.make_verdict(run, evaluation, fold_results([1, 2], epochs=3))
    assert verdict.accuracy == vqa.accuracy(evaluation.probabilities, evaluation.oof.labels)
    assert verdict.low < verdict.accuracy - 0.08 and verdict.high > verdict.accuracy  # 12 test rows
    assert verdict.guessing == pytest.approx(11 / 36)  # always c, in the 36 rows
    assert verdict.has_skill and verdict.gain_low > 0 and verdict.alarms == ()
    assert verdict.worker_seconds == 1200 and 590 < verdict.wall_seconds < 1200  # side by side
    assert verdict.next_step.startswith("Train a second model family")
    page = vqa.verdict_html(verdict)
    assert f"{verdict.accuracy:.3f}" in page and "No alarm." in page and "<script" not in page
    assert "Yes: +" in page and "10 minutes of scoring and training on the clock, 20" in page
    assert "90 of 100 such leaderboards, of 12 rows each" in page
    assert "The 2 models together usually score a little above this" in page


def test_a_run_that_learned_nothing_says_so_and_what_to_check(mini_run):
    run = planted(mini_run(), signal=0.0, zeroshot=0.0)
    verdict = vqa.make_verdict(run, vqa.evaluate_run(run), leakage_alarm="a <large> group")
    first, *others = verdict.alarms
    assert "is not above guessing, 0.306 (always c), beyond chance. Training is not " in first
    assert verdict.next_step.startswith("Check the answers' column and lower the learning rate")
    page = vqa.verdict_html(verdict)
    assert "a <large> group" in others and "<li>a &lt;large&gt; group</li>" in page
    assert "Not beyond chance: " in page
    assert "models together" not in page  # there is nothing to mix


def test_training_that_did_harm_is_called_that(mini_run):
    run = planted(mini_run(), signal=1.0, zeroshot=3.0)
    verdict = vqa.make_verdict(run, vqa.evaluate_run(run))
    assert "No, it did harm: -" in vqa.verdict_markdown(verdict)
    assert verdict.next_step.startswith("Lower the learning rate, now 0.001")


def test_a_run_cut_by_the_time_names_what_is_missing_and_says_run_again(mini_run):
    run = planted(mini_run(), signal=3.0, folds=[0])
    events = vqa.MetricLogger(run.directory / "events.jsonl")
    events.log(event="train fold 1 was left out: the time budget has no 9 minutes left for it")
    events.log(event="train fold 0 was left out: made up for since")
    verdict = vqa.make_verdict(run, vqa.evaluate_run(run))
    assert verdict.alarms == (
        "Missing: fold 1 of 2, because the time ended before the training did.",
        "Train fold 1 was left out: the time budget has no 9 minutes left for it.",
    )
    assert verdict.next_step.endswith("1 of 2 folds are trained.")
    assert "models together" not in vqa.verdict_html(verdict)


def test_a_zeroshot_sample_without_a_row_of_the_folds_is_no_comparison(good):
    run, evaluation = good
    verdict = dataclasses.replace(vqa.make_verdict(run, evaluation), gain=float("nan"))
    assert "Not known: no row was scored by both" in vqa.verdict_markdown(verdict)


def test_everything_that_went_wrong_is_an_alarm(good):
    run, evaluation = good
    config = dataclasses.replace(run.config, distill_from="teacher")
    run = dataclasses.replace(run, config=config, fallbacks={"train_blank_answer": 3, "other": 0})
    one_letter = np.tile([0.7, 0.1, 0.1, 0.1], (len(evaluation.oof.labels), 1))
    evaluation = dataclasses.replace(
        evaluation,
        probabilities=one_letter,
        bound_reasons={1: "its reason"},
    )
    alarms = " ".join(vqa.make_verdict(run, evaluation).alarms)
    letter = "One letter is preferred in the out-of-fold rows: the model answered a in 360 of 360"
    assert letter in alarms
    assert "The temperature is at its bound in fold 1: its reason." in alarms
    assert "Fallbacks were taken while reading the data: train blank answer: 3." in alarms
    assert "Do not trust these figures: it was distilled" in alarms


@pytest.mark.parametrize(
    ("settings", "best_epochs", "epochs", "share_cut", "advice"),
    [
        ({}, [1, 2], 3, 0.3, "Raise max_pixels: the pixel budget shrinks 30% of the images."),
        ({}, [3, 3], 3, 0.1, "Train longer, for example num_epochs=6: the best epoch was the last"),
        ({}, [1, 1], 2, 0.3, "Start a new run with fewer num_epochs or more time: 2 of 2 folds"),
        ({"use_early_stopping": True}, [1, 1], 2, 0.0, "Train a second model family"),
    ],
)
def test_the_next_step_follows_from_the_figures(
    mini_run, settings, best_epochs, epochs, share_cut, advice
):
    run = planted(mini_run(num_epochs=3, **settings), signal=3.0)
    results = fold_results(best_epochs, epochs)
    verdict = vqa.make_verdict(run, vqa.evaluate_run(run), results, share_cut=share_cut)
    assert verdict.next_step.startswith(advice)


def test_behind_the_demo_comes_a_competition_of_ones_own(good):
    run, evaluation = good
    config = dataclasses.replace(run.config, data_dir=str(vqa.DEMO))
    verdict = vqa.make_verdict(dataclasses.replace(run, config=config), evaluation)
    assert verdict.next_step.startswith("Run your own competition: ")


def test_one_fold_of_several_asks_for_the_others(mini_run):
    run = planted(mini_run(train_folds=(0,)), signal=3.0, folds=[0])
    verdict = vqa.make_verdict(run, vqa.evaluate_run(run))
    assert verdict.next_step.endswith("this run has 1 of 2.") and verdict.alarms == ()


def test_the_report_begins_with_the_verdict(good):
    run, evaluation = good
    verdict = vqa.make_verdict(run, evaluation, leakage_alarm="A group is implausibly large.")
    text = vqa.write_report(run, evaluation, verdict).read_text(encoding="utf-8")
    title, first = text.split("\n\n")[:2]
    assert title == f"# {run.directory.name}"
    assert first.startswith("**Accuracy to expect on the leaderboard: ")
    assert "- Alarm: A group is implausibly large.\n" in text
    assert "- Alarm: none.\n" in vqa.write_report(run, evaluation).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------- figures and tables


def test_a_figure_is_shown_with_its_contents_as_alternative_text(good):
    run, _ = good
    counts = pd.Series([3, 5], index=["ocr", "<b>"])
    image = vqa.save_figure(vqa.plot_counts(counts, "Types"), run, "types")
    assert image.description == "Types: ocr 3, <b> 5"
    assert '<img alt="Types: ocr 3, &lt;b&gt; 5" src="data:image/png;' in image._repr_html_()
    assert (run.directory / "figures" / "types.png").read_bytes() == image.png
    curves = vqa.plot_learning_curves(fold_results([1, 2], epochs=2))
    assert vqa.describe_figure(curves[0].figure) == (
        "Training loss, loss by epoch: fold 0, fold 1. "
        "Held-out accuracy, accuracy by epoch: fold 0, fold 1"
    )


def test_a_thumbnail_has_the_questions_id_as_alternative_text(demo_rows):
    page = vqa.question_cards(demo_rows.train.head(2), ["a note", "another"])
    assert re.findall('<img alt="(.*?)"', page) == demo_rows.train["id"].head(2).tolist()
    assert "<i>a note</i>" in page and page.count("<b>") == 2


def test_epochs_are_whole_numbers_and_the_accuracy_axis_is_the_whole_range():
    loss, accuracy = vqa.plot_learning_curves(fold_results([1], epochs=1))
    assert all(tick == round(tick) for tick in loss.get_xticks())
    assert accuracy.get_ylim() == (0, 1.02)


def test_a_step_without_an_accuracy_has_no_bar_and_says_so(good):
    ladder = good[1].ladder.copy()
    ladder.loc["fine-tuned, one view", ["accuracy", "gain"]] = np.nan
    ax = vqa.plot_ladder(ladder)
    assert "unknown" in [text.get_text() for text in ax.texts]
    assert "fine-tuned, one view unknown" in vqa.describe_figure(ax.figure)


def test_few_right_answers_do_not_print_white_numbers_on_white():
    table = vqa.confusion_table(np.arange(4).repeat(9), np.arange(36) % 4)  # nearly even
    colours = {text.get_color() for text in vqa.plot_confusion(table + 20).texts}
    assert colours == {"white"} and vqa.plot_confusion(table + 20).images[0].get_clim()[0] == 0


def test_image_tokens_before_shrinking_are_what_the_processor_gives_without_a_budget(demo_rows):
    config = vqa.Config.preset("demo", max_pixels=10**9, min_pixels=1, data_dir=str(vqa.DEMO))
    processor = vqa.load_processor(config)
    budget = vqa.pixel_budget(config, processor)
    area = vqa.merged_patch_area(processor)
    merged = processor.image_processor.merge_size**2
    for width, height in ((96, 128), (640, 480), (1000, 333)):
        grid = vqa.image_grid(width, height, processor, budget)
        assert np.prod(grid) // merged == vqa.natural_image_tokens(width, height, area)
    counts = vqa.natural_token_counts(demo_rows, area)
    assert [len(values) for values in counts.values()] == [
        len(demo_rows.train),
        len(demo_rows.test),
    ]


def test_the_token_figure_says_how_many_images_the_budget_cuts():
    tokens = {"train": [100, 900, 5000], "test": [100]}
    ax = vqa.plot_token_counts(tokens, 768)
    assert ax.get_title() == "The budget of 768 tokens shrinks 50% of the images"
    assert "last bar: 3072 or more" in ax.get_xlabel()
    ax = vqa.plot_token_counts({"train": [9, 12]}, 768)
    assert ax.get_title() == "The budget of 768 tokens shrinks no image" and not ax.lines


def test_the_ladder_for_people_has_six_columns_of_text(good):
    table = vqa.ladder_for_people(good[1].ladder)
    assert table.shape[1] == 6 and not table.isin(["nan", "+nan"]).any(axis=None)
    gain = table.loc["fine-tuned, one view", "gain in points (90 %)"]
    assert re.fullmatch(r"\+\d+\.\d \(\d+\.\d to \d+\.\d\)", gain)
    assert table.loc["zero-shot", "gain in points (90 %)"] == ""


def test_no_text_of_a_table_is_cut_and_a_fold_out_needs_no_script():
    page = vqa.fold_out("a <title>", vqa.table_html(pd.DataFrame({"text": ["x" * 200]})))
    assert "x" * 200 in page and page.startswith("<details><summary>a &lt;title&gt;</summary>")
    headers_and_cells = re.findall(r"<t[hd](?: .*?)?>", page)
    assert len(headers_and_cells) == 4
    assert all("text-align:left" in cell for cell in headers_and_cells)


def test_without_any_fallback_the_text_is_one_line():
    assert vqa.describe_fallbacks({}) == "no fallback: every row and image is used as it is"
    assert vqa.describe_fallbacks({"train_unusable_image": 1}) == (
        "fallback taken: train unusable image, 1 time"
    )


@pytest.mark.parametrize(
    ("accuracy", "advice"),
    [
        (0.46, "Train on more rows: with 360 of them an accuracy of 0.460 may be luck, where a"),
        (0.33, "Check the answers' column and lower the learning rate, now 0.001: the accuracy"),
        (0.20, "Check the answers' column and lower the learning rate, now 0.001: the accuracy"),
    ],
)
def test_what_few_rows_cannot_show_asks_for_rows_and_not_for_another_rate(
    mini_run, replace, accuracy, advice
):
    run = planted(mini_run(), signal=0.0, zeroshot=0.0)
    verdict = vqa.make_verdict(run, vqa.evaluate_run(run))
    verdict = replace(verdict, accuracy=accuracy, guessing=0.31, has_skill=False)
    assert vqa._next_step(run, verdict, (), 0.0).startswith(advice)
