"""Part 5, Views: which orders and scales a question is shown in, and what they cost."""

import math

import numpy as np
import pytest

import vqa_helpers as vqa


def test_rotations_put_every_choice_on_every_letter_once():
    orders = np.array([vqa.TTAView("", rotation).order for rotation in range(4)])
    assert all(sorted(column) == [0, 1, 2, 3] for column in orders.T)


def test_views_of_a_config(demo_config, replace):
    processor = vqa.load_processor(demo_config)

    def names(**fields):
        return [view.name for view in vqa.all_views(replace(demo_config, **fields), processor)]

    assert names() == ["rotation 0", "rotation 1", "rotation 2", "rotation 3"]
    assert names(tta_rotations=2) == ["rotation 0", "rotation 2"]
    assert names(use_tta=False, tta_scales=(0.9, 1.0)) == ["rotation 0"]
    scales = names(
        tta_rotations=1,
        tta_scales=(0.9, 1.0),
        max_pixels=1000 * 1024,
        infer_max_pixels=1280 * 1024,
    )
    assert scales == ["rotation 0", "scale 0.9", "scale 1.28"]


def test_text_is_never_shown_smaller():
    views = [
        vqa.TTAView("rotation 0"),
        vqa.TTAView("scale 0.9", 0, 0.9),
        vqa.TTAView("scale 1.1", 0, 1.1),
    ]
    for_text = vqa.tta_views({"type": "ocr"}, views)
    assert [view.name for view in for_text] == ["rotation 0", "scale 1.1"]
    assert vqa.tta_views({"type": "color"}, views) == views


# --- Time -----------------------------------------------------------------------------------------


def test_the_time_needed_for_inference_counts_folds_views_and_validations(
    mini_run, session, replace
):
    def needed(training):
        """Seconds at half a second a question, with so many folds still to be trained."""
        return vqa.inference_seconds(run, 0.5, session, training=training)

    run = mini_run(tta_rotations=2)  # 36 training rows in two folds, 12 test rows
    scored_by_a_fold = 18 + 12
    validations = 3 * 18
    two_orders = 1 + 1 / 7
    expected = 1.25 * 0.5 * (scored_by_a_fold * two_orders + validations)
    assert needed(training=1) == pytest.approx(expected)

    vqa.atomic_write(run.fold_dir(1) / "result.json", "{}")
    assert needed(training=0) == 0  # another worker's fold
    session.assigned_folds = (1,)
    assert needed(training=0) == pytest.approx(1.25 * 0.5 * scored_by_a_fold * two_orders)
    # Without shared prefixes every order is a prompt of its own.
    session.runtime = replace(session.runtime, attention="eager")
    assert needed(training=0) == 1.25 * 0.5 * scored_by_a_fold * 2
    assert run.seconds_left() == math.inf


def test_a_group_leaves_time_for_what_the_single_devices_have_to_score(
    mini_run, session, monkeypatch
):
    # 24 training rows a fold, 12 of them held out; 12 test rows
    run = mini_run(n_folds=3, tta_rotations=1)
    for fold in (0, 1):
        vqa.atomic_write(run.fold_dir(fold) / "result.json", "{}")
    session.assigned_folds = run.config.folds_to_train
    alone = vqa.inference_seconds(run, 1.0, session, training=1)
    assert alone == pytest.approx(1.25 * (3 * (12 + 12) + 3 * 12))
    monkeypatch.setattr(vqa, "process_count", lambda: 2)
    assert vqa.inference_seconds(run, 1.0, session, training=1) == pytest.approx(alone / 2)


def test_a_budget_makes_the_time_estimate_smaller(mini_run, session, replace):
    run = mini_run(adaptive_tta=0.5)
    without_budget = replace(run, config=replace(run.config, adaptive_tta=None))
    session.config = run.config
    seconds = vqa.inference_seconds(run, 1.0, session, training=1)
    session.config = without_budget.config
    seconds_for_all_views = vqa.inference_seconds(without_budget, 1.0, session, training=1)
    half_of_three_orders = 0.5 * 3 / 7
    saved = 1.25 * 12 * half_of_three_orders
    assert seconds_for_all_views - seconds == pytest.approx(saved)
