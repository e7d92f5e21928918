"""Part 5, Prediction: every row's scores in all views, in original columns, in any batches."""

import os
import signal

import numpy as np
import pandas as pd
import pytest
from fault_run import FORK
from references import perturb_adapter
from running import ONE_VIEW, ROTATIONS, plain_prompts, quiet

import vqa_helpers as vqa

# --- Columns and rows -----------------------------------------------------------------------------


def test_views_with_the_grid_of_another_view_are_left_out(session, demo_rows, replace):
    """A scale changes nothing for an image below the budget; where it does, the scores differ."""
    six_tokens = 6 * vqa.merged_patch_area(session.processor)
    session.config = replace(session.config, max_pixels=six_tokens)
    frame = demo_rows.train[demo_rows.train["type"] != "ocr"].head(3).reset_index(drop=True)
    views = [
        vqa.TTAView("rotation 0"),
        vqa.TTAView("scale 1.01", 0, 1.01),
        vqa.TTAView("scale 2", 0, 2.0),
    ]
    logits = vqa.predict_logits(session, frame, views)
    assert np.isnan(logits[:, 1]).all()
    assert np.isfinite(logits[:, 2]).all()
    assert np.abs(logits[:, 0] - logits[:, 2]).max() > 1e-6


def test_scores_of_a_view_come_back_in_original_columns(session, demo_rows):
    """Rotating the row's own choices gives the scores of the rotated view."""
    frame = demo_rows.train.head(4)
    view = vqa.TTAView("rotation 1", 1)
    by_view = vqa.predict_logits(session, frame, [view])[:, 0]
    rotated = frame.copy()
    for position, original in enumerate(view.order):
        rotated["abcd"[position]] = frame["abcd"[original]]
    by_hand = vqa.predict_logits(session, rotated, [vqa.TTAView("plain")])[:, 0]
    assert np.allclose(by_view[:, list(view.order)], by_hand, atol=1e-5)


def test_a_blank_choice_is_masked(session, demo_rows):
    frame = demo_rows.train.head(2).assign(c=["", "x"])
    blank, complete = vqa.predict_logits(session, frame, ROTATIONS[:2])
    assert np.isneginf(blank[:, 2]).all()
    assert np.isfinite(blank[:, [0, 1, 3]]).all()
    assert np.isfinite(complete).all()


def test_non_finite_scores_name_the_row(session, demo_rows, monkeypatch):
    monkeypatch.setattr(vqa, "choice_logits", lambda logits, letters: logits[:, :4] * np.nan)
    with pytest.raises(FloatingPointError, match="Non-finite scores for row train_0001"):
        vqa.predict_logits(session, demo_rows.train.head(1), ONE_VIEW)


def test_a_test_row_without_an_image_is_scored_on_grey(session, demo_rows):
    grey = vqa.grey_image()
    frame = demo_rows.test.head(1).assign(
        image_path=vqa.GREY_IMAGE,
        pixel_hash="",
        width=grey.width,
        height=grey.height,
    )
    assert np.isfinite(vqa.predict_logits(session, frame, ONE_VIEW)).all()


# --- Batches and processes ------------------------------------------------------------------------


def test_batches_of_eight_agree_with_single_questions(session, demo_rows, replace):
    frame = demo_rows.train.head(24)
    perturb_adapter(vqa.attach_lora(session.model, session.config, seed=0))
    session.config = replace(session.config, infer_batch_size=8)
    batched = vqa.predict_logits(session, frame, ONE_VIEW)
    session.config = replace(session.config, use_batch_inference=False)
    single = vqa.predict_logits(session, frame, ONE_VIEW)
    prompts = plain_prompts(session, frame, range(24))
    assert len({len(prompt.input_ids) for prompt in prompts}) > 3  # padding took part
    assert np.abs(batched - single).max() <= 1e-4


def test_decoding_processes_give_the_same_scores(session, demo_rows, replace):
    frame = demo_rows.train.head(5)
    expected = vqa.predict_logits(session, frame, ONE_VIEW)
    session.config = replace(session.config, num_workers=2, infer_batch_size=2)
    assert np.allclose(vqa.predict_logits(session, frame, ONE_VIEW), expected, atol=1e-5)


def test_orders_behind_a_shared_prefix_score_like_separate_prompts(session, demo_rows):
    """With an adapter that matters, padding, and a question whose choices are all the same."""
    perturb_adapter(vqa.attach_lora(session.model, session.config, seed=0))
    frame = demo_rows.train.head(12).copy()
    frame.loc[3, list("abcd")] = "같음"
    prompts = [planned.prompt for planned in vqa.plan_prompts(session, frame, ROTATIONS)]
    assert len(prompts) == 12
    assert len({len(prompt.input_ids) for prompt in prompts}) > 2
    shared = vqa.predict_logits(session, frame, ROTATIONS)
    separate = [vqa.predict_logits(session, frame, [view]) for view in ROTATIONS]
    separate = np.concatenate(separate, axis=1)
    assert np.abs(shared - separate).max() <= 1e-5 * np.abs(separate).max()


def test_other_kinds_of_attention_get_separate_prompts(session, demo_rows, replace):
    session.runtime = replace(session.runtime, attention="eager")
    planned = vqa.plan_prompts(session, demo_rows.train.head(2), ROTATIONS)
    assert [len(item.prompt.orders) for item in planned] == [1] * 8


def test_inference_continues_where_it_stopped_in_the_same_batches(
    session, demo_rows, tmp_path, replace, monkeypatch
):
    session.config = replace(session.config, infer_batch_size=4, save_every_steps=1)
    frame = demo_rows.test.head(10)
    expected = vqa.predict_logits(session, frame, ONE_VIEW)
    partial = vqa.InferenceCheckpoint(tmp_path / "partial.npz", "run", session.config)
    calls = []
    score_batch = vqa.score_batch

    def counted(*arguments):
        calls.append(1)
        return score_batch(*arguments)

    def stop(label, done, total, together):
        if done == 2:
            raise vqa.Interrupted

    monkeypatch.setattr(vqa, "score_batch", counted)
    session.progress = stop
    with pytest.raises(vqa.Interrupted):
        vqa.predict_logits(session, frame, ONE_VIEW, checkpoint=partial)
    session.progress = quiet
    continued = vqa.predict_logits(session, frame, ONE_VIEW, checkpoint=partial)
    assert np.array_equal(continued, expected)
    # Of three batches only the one that was under way at the stop is done again.
    assert len(calls) == 4
    partial.path.write_bytes(partial.path.read_bytes()[:-40])
    after_damage = vqa.predict_logits(session, frame, ONE_VIEW, checkpoint=partial)
    assert np.array_equal(after_damage, expected)


# --- Files and the baseline -----------------------------------------------------------------------


def test_logits_file_has_the_schema_and_belongs_to_one_run(tmp_path):
    frame = pd.DataFrame({"id": ["x", "y"], "label": [0, 3]})
    logits = np.array([[[1, 2, 3, -np.inf]], [[0, 0, 0, 1]]])
    vqa.write_logits(tmp_path / "oof.npz", frame, logits, ["rotation 0"], "fingerprint")
    content = vqa.read_arrays(tmp_path / "oof.npz", "fingerprint")
    assert set(content) == {"ids", "logits", "view_names", "labels", "fingerprint"}
    assert content["logits"].dtype == np.float32
    assert np.isneginf(content["logits"][0, 0, 3])
    assert content["ids"].tolist() == ["x", "y"]
    assert content["labels"].tolist() == [0, 3]
    vqa.write_logits(tmp_path / "test.npz", frame[["id"]], logits, ["rotation 0"], "fingerprint")
    assert vqa.read_arrays(tmp_path / "test.npz", "fingerprint")["labels"].tolist() == [-1, -1]
    with pytest.raises(vqa.CheckpointError, match="another configuration"):
        vqa.read_arrays(tmp_path / "oof.npz", "other")


def test_generate_baseline_neither_drops_nor_pads_while_the_model_trains(
    session, demo_rows, monkeypatch
):
    modes = []
    collate = vqa.collate

    def noted(session, prompts):
        modes.append(session.model.training)
        return collate(session, prompts)

    monkeypatch.setattr(vqa, "collate", noted)
    session.model.train()
    vqa.generate_baseline(session, demo_rows.train.head(1), max_new_tokens=1)
    assert modes == [False]
    assert session.model.training


def test_generate_baseline_parses_letters_strictly(session, demo_rows, monkeypatch):
    answers = vqa.generate_baseline(session, demo_rows.train.head(2))
    assert all(answer is None or answer in vqa.CHOICES for answer in answers)
    texts = iter([" (B).", "a or b", "D"])
    monkeypatch.setattr(type(session.processor.tokenizer), "decode", lambda *_, **__: next(texts))
    answers = vqa.generate_baseline(session, demo_rows.train.head(3), max_new_tokens=1)
    assert answers == ["b", None, "d"]


# --- Parts of a large table -----------------------------------------------------------------------


@pytest.fixture
def made_at_once(monkeypatch):
    """Parts of four rows; a list of how many prompts were made at once, one number a part."""
    monkeypatch.setattr(vqa, "ROWS_PLANNED_TOGETHER", 4)
    counts = []
    plan_prompts = vqa.plan_prompts

    def counted(*arguments):
        planned = plan_prompts(*arguments)
        counts.append(len(planned))
        return planned

    monkeypatch.setattr(vqa, "plan_prompts", counted)
    return counts


def test_a_large_table_is_scored_part_by_part(session, demo_rows, replace, made_at_once):
    """No more prompts at once than a part has, the scores of one pass, and progress to the end."""
    session.config = replace(session.config, infer_batch_size=3)
    frame = demo_rows.test.head(10)
    seen = []
    session.progress = lambda label, done, total, together: seen.append((done, total))
    in_parts = vqa.predict_logits(session, frame, ROTATIONS)
    assert made_at_once == [4, 4, 2]
    # Two batches for four rows are five for ten; the last part, of two rows, needs one.
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    alone = [vqa.predict_logits(session, frame.iloc[[row]], ROTATIONS) for row in range(10)]
    assert np.abs(in_parts - np.concatenate(alone)).max() <= 1e-4


def test_a_continued_table_prepares_only_what_is_left(
    session, demo_rows, tmp_path, replace, made_at_once
):
    session.config = replace(session.config, infer_batch_size=3)
    frame = demo_rows.test.head(10)
    session.progress = quiet
    expected = vqa.predict_logits(session, frame, ONE_VIEW)
    made_at_once.clear()
    partial = vqa.InferenceCheckpoint(tmp_path / "partial.npz", "run", session.config)

    def stop(label, done, total, together):
        if done == 3:  # the first batch of the second part
            raise vqa.Interrupted

    session.progress = stop
    with pytest.raises(vqa.Interrupted):
        vqa.predict_logits(session, frame, ONE_VIEW, checkpoint=partial)
    state = partial.read()
    assert (state.rows, state.batches, state.done) == (4, 2, 1)
    session.progress = quiet
    made_at_once.clear()
    continued = vqa.predict_logits(session, frame, ONE_VIEW, checkpoint=partial)
    assert np.array_equal(continued, expected)
    assert made_at_once == [4, 2]  # not the first part
    made_at_once.clear()
    again = vqa.predict_logits(session, frame, ONE_VIEW, checkpoint=partial)
    assert np.array_equal(again, expected)
    assert made_at_once == []


def test_a_checkpoint_without_parts_is_not_continued(session, demo_rows, tmp_path, caplog):
    """One that an earlier version wrote counts batches of another plan."""
    path = tmp_path / "partial.npz"
    vqa.write_arrays(path, "run", done=np.array(1), logits=np.zeros((2, 1, 4), np.float32))
    with caplog.at_level("WARNING", "vqa"):
        assert vqa.InferenceCheckpoint(path, "run", session.config).read() is None
    assert "without rows, batches" in caplog.text


def predict_until_killed(session, frame, partial, batches):
    """Score in a process of its own, which dies behind so many batches."""
    score_batch = vqa.score_batch
    left = iter(range(batches))

    def killing(*arguments):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return score_batch(*arguments)

    vqa.score_batch = killing
    vqa.predict_logits(session, frame, ONE_VIEW, checkpoint=partial)


@pytest.mark.slow
@pytest.mark.parametrize("batches", [2, 3, 5])
def test_a_process_killed_in_any_part_leaves_what_it_had_scored(
    session, demo_rows, tmp_path, replace, made_at_once, batches
):
    """Between two parts, in the second one, in the last one."""
    session.config = replace(session.config, infer_batch_size=3, save_every_steps=1)
    frame = demo_rows.test.head(12)
    expected = vqa.predict_logits(session, frame, ONE_VIEW)
    partial = vqa.InferenceCheckpoint(tmp_path / "partial.npz", "run", session.config)
    process = FORK.Process(target=predict_until_killed, args=(session, frame, partial, batches))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    state = partial.read()
    # A part has two batches; the first is fetched while the second one, which died, is under way.
    assert state.batches + state.done == batches - batches % 2
    continued = vqa.predict_logits(session, frame, ONE_VIEW, checkpoint=partial)
    assert np.array_equal(continued, expected)
