"""Part 5, Views: which orders and scales a question is shown in, and what they cost."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

import vqa_helpers as vqa


def test_rotations_put_every_choice_on_every_letter_once():
    orders = np.array([vqa.TTAView("", rotation).order for rotation in range(4)])
    assert all(sorted(column) == [0, 1, 2, 3] for column in orders.T)


@pytest.mark.parametrize(("count", "spread"), [(4, 3), (8, 2), (12, 2), (24, 0)])
def test_in_a_balanced_set_each_choice_meets_each_letter_equally_often(count, spread):
    """And each other choice as its neighbour, as far as so many orders allow."""
    orders = vqa.balanced_orders(count)
    assert len(set(orders)) == count
    for choice, position in itertools.product(range(4), range(4)):
        assert sum(order[position] == choice for order in orders) == count / 4
    pairs = dict.fromkeys(itertools.permutations(range(4), 2), 0)
    for order in orders:
        for pair in itertools.pairwise(order):
            pairs[pair] += 1
    assert max(pairs.values()) - min(pairs.values()) == spread
    assert orders[:4] == [vqa.TTAView("", turn).order for turn in range(4)]
    assert vqa.balanced_orders(24)[:count] == orders


def test_there_is_no_balanced_set_of_another_size():
    with pytest.raises(ValueError, match="no balanced set of 6 choice orders"):
        vqa.balanced_orders(6)


def test_scores_come_back_to_their_choices_from_every_order():
    scores = np.random.default_rng(0).normal(size=(3, 4))
    for order in vqa.balanced_orders(24):
        shown = scores[:, list(order)]
        assert np.array_equal(vqa.unpermute_scores(shown, order), scores)


def test_a_bias_by_letter_and_place_of_a_neighbour_is_left_by_4_orders_and_removed_by_24():
    random = np.random.default_rng(0)
    content = random.normal(size=(200, 4))
    strongest = content.argmax(axis=1)
    bias = random.normal(scale=2, size=(4, 4))  # by the letter, and that of the strongest choice
    np.fill_diagonal(bias, 0)
    bias -= bias.sum() / 12 * (1 - np.eye(4))

    def error(count):
        views = []
        for order in vqa.balanced_orders(count):
            letters = np.argsort(order)
            views.append(content + bias[letters, letters[strongest][:, None]])
        found = vqa.softmax(vqa.combine_views(np.stack(views, axis=1)))
        return np.abs(found - vqa.softmax(content)).max()

    assert error(4) > 0.2
    assert error(8) > 0.05
    assert error(24) < 1e-12


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


def test_views_of_the_steps_for_rows_in_doubt(demo_config, replace):
    steps = (("rotations", 0.5), ("orders", 0.2), ("pixels", 0.2), ("base", 0.2))
    config = replace(
        demo_config,
        doubt_steps=steps,
        doubt_orders=8,
        max_pixels=1000 * 1024,
        infer_max_pixels=1280 * 1024,
    )
    views = vqa.all_views(config, vqa.load_processor(config))
    names = [view.name for view in views]
    assert names[4:8] == ["order acbd", "order bdca", "order cadb", "order dbac"]
    assert [vqa.CHOICES[choice] for choice in views[5].order] == ["b", "d", "c", "a"]
    assert names[8:10] == ["pixels 1.28 rotation 0", "pixels 1.28 rotation 1"]
    assert names[12:14] == ["base rotation 0", "base rotation 1"]
    assert [view.by_base_model for view in views] == [False] * 12 + [True] * 4
    assert {view.scale for view in views[8:12]} == {1.28}
    assert vqa.first_views(names, dict(steps)) == [0]
    assert vqa.first_views(names, ["orders", "base"]) == [0, 1, 2, 3, 8, 9, 10, 11]
    added = [vqa.step_views(names, step) for step in dict(steps)]
    assert added == [[1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    sets = vqa.view_sets(names)
    assert {name: len(views) for name, views in sets.items()} == {
        "single view": 1,
        "rotations": 4,
        "more orders": 8,
        "more pixels": 12,
        "base model": 16,
    }


def test_more_pixels_that_are_not_more_are_refused(demo_config, replace):
    config = replace(
        demo_config, doubt_steps=(("pixels", 0.5),), max_pixels=9000, infer_max_pixels=9000
    )
    with pytest.raises(ValueError, match="infer_max_pixels is 9000; the step 'pixels' of doubt_st"):
        vqa.all_views(config, vqa.load_processor(config))


def test_each_step_weighs_the_same_behind_few_and_many_orders():
    names = ["rotation 0", "rotation 1", "order acbd", "pixels 2 rotation 0", "base rotation 0"]
    right = [0.7, 0.1, 0.1, 0.1]
    wrong = [0.1, 0.7, 0.1, 0.1]
    missing = [math.nan] * 4
    logits = np.log(
        [
            [right, right, right, wrong, missing],
            [right, missing, missing, wrong, missing],
            [right, right, right, right, wrong],
            [right, right, right, wrong, right],
            [right, right, wrong, missing, missing],
        ]
    )
    scores = vqa.combine_steps(logits, names)
    lead = np.log(7) * np.array([0, 0, 0, 0.5, 1 / 3])
    assert scores[:, 0] - scores[:, 1] == pytest.approx(lead)


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
    assert alone == pytest.approx(1.25 * (3 * 12 + 3 * 12))  # of one view no held-out row
    monkeypatch.setattr(vqa, "process_count", lambda: 2)
    assert vqa.inference_seconds(run, 1.0, session, training=1) == pytest.approx(alone / 2)


def test_steps_cost_no_more_than_they_may_take(mini_run, session, replace):
    steps = (("rotations", 0.3), ("base", 9.0))
    run = mini_run(doubt_steps=steps)
    without_steps = replace(run, config=replace(run.config, doubt_steps=()))
    session.config = run.config
    seconds = vqa.inference_seconds(run, 1.0, session, training=1)
    session.config = without_steps.config
    seconds_for_all_views = vqa.inference_seconds(without_steps, 1.0, session, training=1)
    four_orders = 10 / 7  # all that the base model can take
    rows = 18 + 12
    pilot = 18 * 9 / 7
    saved = rows * (four_orders - (1 + 0.3 + four_orders)) - pilot
    assert seconds_for_all_views - seconds == pytest.approx(1.25 * saved)


def test_time_is_kept_for_the_base_model_once_for_all_seeds(mini_run):
    run = mini_run(seeds=(42, 7), use_base_member="on", tta_rotations=1)
    session = SimpleNamespace(
        config=run.config, processor=None, shares_prefixes=True, assigned_folds=(0, 1, 3, 4)
    )
    for member in (0, 1, 3):  # the other seed's model of fold 1 is being trained
        vqa.atomic_write(run.fold_dir(member) / "result.json", "{}")
    scored = 4 * 12  # of one view no held-out row: validation has scored them
    by_base = 2 * (18 + 6)  # two folds, which share the test rows
    needed = vqa.inference_seconds(run, 1.0, session, training=1)
    assert needed == pytest.approx(1.25 * (scored + 3 * 18 + by_base))


def test_larger_images_take_as_many_times_the_time_as_they_have_pixels():
    steps = (("rotations", 0.1), ("pixels", 3.0))
    config = vqa.Config.preset("demo", doubt_steps=steps, infer_max_pixels=4)
    session = SimpleNamespace(config=config, shares_prefixes=True)
    larger = [vqa.TTAView(f"pixels 2 rotation {turn}", turn, 2.0) for turn in range(4)]
    views = [*vqa.rotated_views(config), *larger]
    assert vqa.cost_in_steps(session, views) == pytest.approx(1 + 0.1 + 2 * 10 / 7)
