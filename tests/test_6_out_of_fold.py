"""Part 6, Out-of-fold rows and Selected weights: rows scored by models that did not see them."""

import numpy as np
import pandas as pd
import pytest
from planted import one_hot, planted_run, rows_of_fold, write_kinds
from running import ROTATIONS, open_run_session, read_logits, run_all, selected_weights

import vqa_helpers as vqa

# --- Out-of-fold rows -----------------------------------------------------------------------------


def test_every_training_row_is_predicted_once_by_a_model_that_did_not_see_it(finished):
    oof = vqa.read_oof(finished)
    assert oof.frame["id"].tolist() == finished.train["id"].tolist()
    assert np.array_equal(oof.folds, finished.train["fold"])
    for fold in (0, 1):
        content = vqa.read_arrays(finished.fold_dir(fold) / "oof.npz", finished.fingerprint)
        assert set(content["ids"]) == set(rows_of_fold(finished, fold)["id"])
    by_id = finished.train.set_index("id")["label"]
    assert oof.tokens.min() > 20
    assert len(set(oof.tokens)) > 1
    assert np.array_equal(oof.labels, by_id.loc[oof.frame["id"]])


def test_oof_of_the_plain_view_is_the_validation_of_the_selected_weights(finished):
    """Reloading the saved adapter gives the numbers it had in training."""
    kind = selected_weights(finished)
    for fold in (0, 1):
        folder = finished.fold_dir(fold)
        oof = vqa.read_arrays(folder / "oof.npz", finished.fingerprint)
        validation = vqa.read_arrays(folder / f"validation_{kind}.npz", finished.fingerprint)
        assert oof["ids"].tolist() == validation["ids"].tolist()
        assert np.allclose(oof["logits"][:, 0], validation["logits"][:, 0], atol=1e-4)


def test_an_unfinished_run_says_what_is_missing_and_what_to_do(mini_run):
    with pytest.raises(FileNotFoundError, match="no fold is trained; run its notebook"):
        vqa.read_oof(mini_run())
    run = planted_run(mini_run())
    (run.fold_dir(1) / "test.npz").unlink()
    with pytest.raises(
        FileNotFoundError, match=f"{run.directory.name}: fold 1 is trained, but not scored"
    ):
        vqa.read_oof(run)


# --- Views ----------------------------------------------------------------------------------------


def of_one_fold(labels, logits, view_names):
    """Out-of-fold rows of one fold, each with an image of its own."""
    frame = pd.DataFrame({"pixel_hash": np.arange(len(labels)).astype(str)})
    return vqa.OofLogits(frame, logits, labels, labels * 0, view_names)


def test_wider_views_that_lose_accuracy_are_not_admitted_although_they_lower_the_nll():
    """A first view that is right but far too sure.

    The mean with the second one is timid, and more often wrong.
    """
    random = np.random.default_rng(0)
    labels = np.arange(400) % 4
    answers = np.where(random.random(400) < 0.8, labels, (labels + 1) % 4)
    other_answers = np.where(random.random(400) < 0.65, labels, (labels + 2) % 4)
    logits = np.stack([12 * one_hot(answers), 14 * one_hot(other_answers)], axis=1)
    oof = of_one_fold(labels, logits, ("rotation 0", "rotation 1"))
    views, table = vqa.admit_views(oof, use_temperature_scaling=False)
    assert table["nll"].is_monotonic_decreasing
    assert table["accuracy"].iloc[1] < table["accuracy"].iloc[0] - 0.05
    assert views == [0]
    assert table["admitted"].tolist() == [True, False]


def test_a_scale_that_no_row_has_does_not_cost_the_others():
    random = np.random.default_rng(0)
    labels = np.arange(200) % 4
    views = [one_hot(labels) + random.normal(size=(200, 4)) for _ in range(3)]
    logits = np.stack(views, axis=1)
    logits[:, 1] = np.nan
    oof = of_one_fold(labels, logits, ("rotation 0", "scale 0.9", "scale 1.1"))
    assert vqa.views_by_set(oof) == {"single view": [0], "rotations and scales": [0, 2]}
    views, table = vqa.admit_views(oof)
    assert views == [0, 2]
    assert table["admitted"].all()


# --- Selected weights -----------------------------------------------------------------------------


def test_weights_are_chosen_by_pooled_held_out_nll(mini_run):
    run = mini_run()
    for fold, (raw, ema) in enumerate([(0.5, 0.6), (0.9, 0.7)]):
        kinds = {
            "raw": {"accuracy": 1, "nll": raw},
            "ema": {"accuracy": 0, "nll": ema},
        }
        write_kinds(run, fold, kinds)
    assert vqa.select_weights(run) == "ema"
    table = vqa.fold_table([vqa.read_fold_result(run, fold) for fold in (0, 1)])
    assert table.loc["mean", "raw nll"] == pytest.approx(0.7)
    assert table.index.tolist() == ["0", "1", "mean", "sd"]


def test_a_fold_that_comes_later_may_change_the_weights_of_all(mini_run):
    run = mini_run()
    for fold, raw, selected in ((0, 0.5, "raw"), (1, 0.9, "ema")):
        kinds = {
            "raw": {"accuracy": 1, "nll": raw},
            "ema": {"accuracy": 0, "nll": 0.6},
        }
        write_kinds(run, fold, kinds)
        assert vqa.select_weights(run) == selected
        vqa.atomic_write(run.fold_dir(fold) / "oof.npz", b"scored with these weights")
    assert not (run.fold_dir(0) / "oof.npz").exists()
    assert (run.fold_dir(1) / "oof.npz").exists()


def planted_weights(run, kinds):
    """Let the folds look trained: each kind of weights makes logits (n, 4) of labels and fold."""
    for fold in (0, 1):
        rows = rows_of_fold(run, fold)
        metrics = {}
        for number, (kind, logits_of) in enumerate(kinds.items()):
            logits = logits_of(rows["label"].to_numpy(), fold)[:, None]
            path = run.fold_dir(fold) / f"validation_{kind}.npz"
            vqa.write_logits(path, rows, logits, ["rotation 0"], run.fingerprint)
            metrics[kind] = {"accuracy": 0.5, "nll": float(number)}
        write_kinds(run, fold, metrics)


def noisy(seed):
    """Weights that know the answers but for their own noise."""

    def logits_of(labels, fold):
        noise = np.random.default_rng([seed, fold]).normal(size=(len(labels), 4))
        return 2 * one_hot(labels) + 1.5 * noise

    return logits_of


def sure(strength, misses):
    """Weights so sure of an answer, which misses the label by `misses(row number)`."""

    def logits_of(labels, fold):
        row_numbers = np.arange(len(labels))
        return strength * one_hot((labels + misses(row_numbers)) % 4)

    return logits_of


@pytest.mark.parametrize(("seeds", "selected"), [((1, 2), "raw+ema"), ((1, 1), "raw")])
def test_all_kinds_of_weights_score_where_their_mean_is_better_than_the_best(
    mini_run, seeds, selected
):
    """Independent errors average out; of two kinds that are the same, one is enough."""
    run = mini_run(mix_weights=True)
    seed_of_raw, seed_of_ema = seeds
    kinds = {"raw": noisy(seed_of_raw), "ema": noisy(seed_of_ema)}
    planted_weights(run, kinds)
    assert vqa.select_weights(run) == selected
    assert run.selected_weights == selected.split("+")
    alone = mini_run(mix_weights=False)
    planted_weights(alone, kinds)
    assert vqa.select_weights(alone) == "raw"


# Whether temperatures are scaled; raw weights, EMA weights.
NO_MIXTURE = {
    "EMA alone is best, once scaled": (
        True,
        sure(8, lambda row: row % 4),
        sure(12, lambda row: row % 9 == 0),
    ),
    "the mean would be best, were it scaled": (
        False,
        sure(2, lambda row: row % 6 == 0),
        sure(16, lambda row: row % 9 == 4),
    ),
}


@pytest.mark.parametrize(("scaling", "raw", "ema"), NO_MIXTURE.values(), ids=NO_MIXTURE)
def test_a_mean_of_weights_has_to_beat_each_kind_as_it_would_be_submitted(
    mini_run, scaling, raw, ema
):
    run = mini_run(mix_weights=True, use_temperature_scaling=scaling)
    planted_weights(run, {"raw": raw, "ema": ema})
    assert vqa.select_weights(run) == "raw"


@pytest.mark.slow
def test_mixed_weights_score_with_the_mean_of_all_kinds_and_continue_where_they_stopped(
    mini_run, monkeypatch
):
    monkeypatch.setattr(vqa, "is_mixing_better", lambda *_: True)
    run = mini_run(mix_weights=True, tta_rotations=2, train_folds=(0,), infer_batch_size=4)
    batches = []

    def note(stage, done, *_, **__):
        batches.append(stage)

    def stop(stage, done, *_, **__):
        """At the second batch of three, by the second kind of weights."""
        batches.append(stage)
        if batches.count("fold 0 test") == 5:
            raise vqa.Interrupted

    with pytest.raises(vqa.Interrupted):
        run_all(run, progress=stop)
    assert (run.fold_dir(0) / "oof.npz").exists()
    assert not (run.fold_dir(0) / "test.npz").exists()
    batches.clear()
    run_all(run, progress=note)
    assert batches == ["fold 0 test"]
    assert not [*run.directory.rglob("*partial.npz")]
    paths = [run.fold_dir(0) / f"{name}.npz" for name in ("oof", "test")]
    resumed = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    run_all(run)
    assert [path.read_bytes() for path in paths] == resumed

    def scores(kind):
        adapted = vqa.load_adapter(session.model, run.fold_dir(0) / f"adapter_{kind}")
        logits = vqa.predict_logits(session, run.test, views)
        adapted.unload()
        return logits

    views = [ROTATIONS[0], ROTATIONS[2]]
    session = open_run_session(run)
    raw = scores("raw")
    ema = scores("ema")
    present = np.isfinite(raw)
    assert np.abs(raw[present] - ema[present]).max() > 1e-3
    mean = np.mean([raw, ema], axis=0)
    np.testing.assert_allclose(read_logits(run, 0, "test"), mean, atol=1e-5)

    ladder = vqa.evaluate_run(run).ladder
    assert {"with raw weights", "with EMA weights"} < set(ladder.index)
    assert ladder.loc[vqa.STEP_ONE_VIEW, "cost"] == 2
    assert ladder.loc["with EMA weights", "cost"] == 1
    assert vqa.views_cost(session, views) == pytest.approx(2 * (1 + 1 / 7))
    assert "raw, ema weights" in vqa.write_report(run, vqa.evaluate_run(run)).read_text()
