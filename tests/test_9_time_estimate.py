"""Part 9, Time estimate: every part of a run counts, as often as the run really does it."""

import dataclasses
from collections import Counter

import pandas as pd
import pytest
from running import quiet, run_all

import vqa_helpers as vqa

NOTHING = {item.name: 0.0 for item in dataclasses.fields(vqa.StepSeconds)}
SIZE = vqa.JobSize(
    train_rows=120,
    added_rows=0,
    related_rows=0,
    test_rows=50,
    train_image_tokens=1000,
    test_image_tokens=300,
    is_rescored=False,
)


def estimate(seconds, size=SIZE, devices=(None,), **settings):
    """An estimate where only these steps take any time: estimate({"training": 1.0}, n_folds=3)."""
    config = vqa.Config.preset("demo", **settings)
    return vqa.TimeEstimate(config, vqa.StepSeconds(**NOTHING | seconds), size, devices)


def seconds_of(part, step, **settings):
    """Seconds of one part where each `step` takes a second."""
    return estimate({step: 1.0}, **settings).parts()[part]


# In three folds each trains on 80 rows and holds 40 out.
@pytest.mark.parametrize(
    ("part", "step", "settings", "count"),
    [
        ("train: training", "training", {"num_epochs": 2}, 3 * 80 * 2),
        ("train: training", "training", {"num_epochs": 2, "train_folds": (1,)}, 80 * 2),
        ("train: training", "training", {"num_epochs": 2, "use_kfold": False}, 80 * 2),
        ("train: training", "training", {"num_epochs": 2, "final_retrain": True}, 3 * 160 + 240),
        ("train: training", "training", {"num_epochs": 2, "seeds": (42, 7)}, 2 * 3 * 80 * 2),
        ("train: prompts", "prompt", {"num_epochs": 2}, 3 * (80 * 2 + 40)),
        # Epochs, and each kind of weights once.
        ("train: validation", "validation", {"num_epochs": 2, "use_ema": False}, 3 * 40 * 2),
        ("train: validation", "validation", {"num_epochs": 2}, 3 * 40 * 3),
        ("train: validation", "validation", {"num_epochs": 2, "use_swa": True}, 3 * 40 * 4),
        (
            "train: validation",
            "validation",
            {"num_epochs": 2, "final_retrain": True},  # nothing is held out from that one
            3 * 40 * 3,
        ),
        ("train: checkpoints", "checkpoint", {"num_epochs": 2}, 3 * 2),
        (
            "train: checkpoints",
            "checkpoint",
            {"num_epochs": 2, "save_every_epoch": False, "save_every_steps": 5},
            3 * 4,  # of 20 steps
        ),
        ("train: features", "image_token", {}, 0),
        ("train: features", "image_token", {"augment_images": 2}, 2000),
        ("zeroshot: features", "image_token", {}, 1000),
        ("zeroshot: scoring", "zeroshot", {"zeroshot_rows": 16}, 16),
        ("zeroshot: scoring", "zeroshot", {"zeroshot_rows": 0}, 120),
        ("zeroshot: scoring", "zeroshot", {"zeroshot_rows": 500}, 120),
        ("predict: features", "image_token", {}, 300),
        ("predict: held-out rows", "all_views", {}, 120),
        ("predict: held-out rows", "all_views", {"use_tta": False}, 0),  # validated in that view
        ("predict: test rows", "all_views", {}, 3 * 50),
        ("predict: test rows", "all_views", {"mix_weights": True}, 2 * 3 * 50),
        ("predict: test rows", "all_views", {"final_retrain": True}, 4 * 50),
        ("predict: test rows", "all_views", {"doubt_steps": (("base", 0.2),)}, 3 * 50),
        # The pilot: all 40 held-out rows of each fold in three further orders.
        (
            "predict: held-out rows",
            "validation",
            {"doubt_steps": (("rotations", 0.2),)},
            3 * 40 * (1 + 2 / 7),
        ),
        (
            "predict: test rows",
            "all_views",
            {"final_retrain": True, "seeds": (42, 7)},
            2 * 4 * 50,
        ),
        ("predict: adapter", "adapter", {"mix_weights": True}, 6),
        # Zero-shot, and one worker for all folds.
        ("processes: start", "start", {}, 2),
        ("processes: start", "start", {"final_retrain": True}, 3),
        ("processes: start", "start", {"devices": ("0", "1")}, 1 + 2 * 3),
        ("processes: imports", "first_adapter", {}, 1),
        ("processes: imports", "first_optimizer", {"devices": ("0", "1")}, 1 + 1 + 2),
    ],
)
def test_a_part_counts_as_often_as_it_happens(part, step, settings, count):
    assert seconds_of(part, step, **settings) == pytest.approx(count)


def test_scoring_in_16_bits_counts_where_it_fits():
    settings = {"quantization": "4bit", "score_precision": "16bit"}
    steps = {"all_views": 1.0, "start": 1.0}
    left_out = estimate(steps, **settings).parts()
    assert "rescore: test rows" not in left_out
    assert left_out["processes: start"] == 2
    size = dataclasses.replace(SIZE, is_rescored=True)
    done = estimate(steps, size, **settings).parts()
    assert done["rescore: test rows"] == done["predict: test rows"] == 150
    assert done["rescore: held-out rows"] == 120
    assert done["processes: start"] == 3  # the unquantised model is loaded, too


@pytest.mark.parametrize(
    ("devices", "n_folds", "rounds"),
    [
        ((None,), 3, 3),
        ((vqa.CPU_CORE,) * 2, 3, 2),
        ((vqa.CPU_CORE,) * 2, 5, 3),
        ((vqa.CPU_CORE,) * 3, 3, 1.5),
        (("0", "1", "2"), 3, 1),
        (("0", "1"), 3, 1 + 1 / 1.8),  # the third by both together
    ],
    ids=[
        "one device",
        "two cores",
        "five folds",
        "three workers on two cores",
        "three GPUs",
        "a shared fold",
    ],
)
def test_on_the_clock_folds_go_in_rounds(devices, n_folds, rounds, monkeypatch):
    monkeypatch.setattr(vqa, "usable_cores", lambda: 2)
    size = dataclasses.replace(SIZE, train_rows=60 * n_folds)
    settings = {"n_folds": n_folds, "num_epochs": 1}
    on_clock = estimate({"training": 1.0}, size, devices, **settings).wall_seconds()
    assert on_clock == pytest.approx(rounds * 60 * (n_folds - 1))


def test_on_the_clock_a_feature_is_computed_once_and_a_model_is_loaded_once_a_device():
    seconds = {"start": 10.0, "first_adapter": 3.0, "adapter": 1.0, "image_token": 1.0}
    two_cores = (vqa.CPU_CORE,) * 2
    on_clock = estimate(seconds, SIZE, two_cores, n_folds=2).wall_seconds()
    features = 1000 + 300
    zeroshot = 10
    workers = 10 + (3 - 1) + 2 * 1  # start, import, the adapter of its fold trained and loaded
    assert on_clock == pytest.approx(features + zeroshot + workers)


def test_images_that_several_rows_share_count_once(demo_rows):
    config = vqa.Config.preset("demo")
    competition = dataclasses.replace(
        demo_rows,
        train=pd.concat([demo_rows.train.head(3), demo_rows.train.head(2)], ignore_index=True),
        test=pd.concat([demo_rows.test.head(2), demo_rows.train.head(1)], ignore_index=True),
    )
    lengths = vqa.prompt_lengths(config, vqa.load_processor(config), competition)
    size = vqa.job_size(config, competition, lengths, is_rescored=True)
    assert size.train_rows == 5
    assert size.test_rows == 3
    assert size.train_image_tokens == lengths["image"][:3].sum()
    assert size.test_image_tokens == lengths["image"][5:7].sum()


DEV_TABLE = """\
id,path,Frage,a,b,c,d,answer1,answer2,answer3,answer4,answer5
d1,1.png,무슨 색?,빨강,파랑,노랑,,a,a,b,,c
d2,2.png,무슨 색?,빨강,파랑,노랑,,b,b,b,b,b
"""


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"columns": {"question": "Frage"}, "use_dev_votes": True}, 2),
        ({"pseudo_label_from": "teacher"}, 560),
        ({}, 0),
    ],
    ids=["votes under another name of a column", "answers of a teacher", "none"],
)
def test_rows_beside_those_of_train_are_counted(demo_rows, tmp_path, settings, count):
    (tmp_path / "dev.csv").write_text(DEV_TABLE, encoding="utf-8")
    competition = dataclasses.replace(demo_rows, data_dir=tmp_path)
    config = vqa.Config.preset("demo", **settings)
    assert vqa.added_row_count(config, competition) == count


def test_test_rows_that_are_longer_than_the_sample_cost_more():
    lengths = pd.DataFrame(
        {
            "split": ["train"] * 4 + ["test"] * 4,
            "id": list("abcd") + list("abcd"),
            "scored": [10, 20, 30, 40, 80, 80, 60, 60],
        }
    )
    trial = vqa.TrialRows(None, lengths, pd.DataFrame({"id": ["b", "c"]}))
    pairs = vqa.Config.preset("demo", infer_batch_size=2)
    assert trial.cost_of_split("test", "scored", pairs) == 70 / 30
    assert trial.cost_of_split("train", "scored", pairs) == 30 / 30
    one_by_one = vqa.Config.preset("demo", use_batch_inference=False)
    assert trial.cost_of_split("train", "scored", one_by_one) == 25 / 25


# --- Beside a run ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_scores_and_trains_as_many_questions_as_the_estimate_counts(mini_run, monkeypatch):
    """With averages, scales and a final model."""
    settings = {
        "num_epochs": 2,
        "use_swa": True,
        "tta_rotations": 2,
        "tta_scales": (1.0, 1.5),
        "final_retrain": True,
        "zeroshot_rows": 8,
    }
    run = mini_run(**settings)
    done = Counter()
    predict = vqa.predict_logits
    step = vqa.FoldTrainer.optimizer_step

    def count_scored(session, frame, views, label, *arguments, **prompts):
        done[label.split()[-1]] += len(frame)
        return predict(session, frame, views, label, *arguments, **prompts)

    def count_trained(trainer, epoch, number, batches, rows):
        done["training"] += len(rows)
        return step(trainer, epoch, number, batches, rows)

    monkeypatch.setattr(vqa, "predict_logits", count_scored)
    monkeypatch.setattr(vqa.FoldTrainer, "optimizer_step", count_trained)
    run_all(run)
    # The estimate cannot know which epoch will be the best.
    monkeypatch.setattr(vqa, "final_epochs", lambda run: run.config.num_epochs)
    vqa.run_stages(run, [run.final_fold], ["train", "predict"], quiet)

    size = dataclasses.replace(SIZE, train_rows=len(run.train), test_rows=len(run.test))
    ones = vqa.StepSeconds(**dict.fromkeys(NOTHING, 1.0))
    parts = vqa.TimeEstimate(run.config, ones, size, [None]).parts()
    assert done["training"] == pytest.approx(parts["train: training"])
    assert done["validation"] == pytest.approx(parts["train: validation"])
    assert done["oof"] == pytest.approx(parts["predict: held-out rows"])
    assert done["test"] == pytest.approx(parts["predict: test rows"])
    assert done["zero-shot"] == pytest.approx(parts["zeroshot: scoring"])


@pytest.mark.slow
def test_preflight_tells_the_time_on_one_device_here_and_by_part(mini_data, monkeypatch):
    estimates = []
    time_facts = vqa.time_facts

    def keep(estimate):
        estimates.append(estimate)
        return time_facts(estimate)

    monkeypatch.setattr(vqa, "time_facts", keep)
    monkeypatch.setattr(vqa, "worker_devices", lambda config: [vqa.CPU_CORE] * 3)
    settings = {"data_dir": str(mini_data), "doubt_steps": (("rotations", 0.5),)}
    config = vqa.Config.preset("demo", **settings)
    facts = vqa.preflight(config, rows=12)
    parts = {}
    for item in facts["estimated seconds by part"].split(", "):
        part, seconds = item.rsplit(" ", 1)
        parts[part] = float(seconds)
    assert {"train: training", "train: validation", "predict: test rows"} <= set(parts)
    minutes = facts["estimated minutes on one device"]
    assert minutes == pytest.approx(sum(parts.values()) / 60, abs=0.07)  # both are rounded
    (estimate,) = estimates
    assert estimate.devices == [vqa.CPU_CORE] * 3
    assert facts["estimated minutes here"] == round(estimate.wall_seconds() / 60, 1)
    seconds = estimate.seconds
    assert seconds.all_views > 1.2 * seconds.validation  # a view, and half of its time
    # Every step of a run has been timed, whatever the machine is doing beside.
    assert all(seconds > 0 for seconds in dataclasses.asdict(estimate.seconds).values())


@pytest.mark.parametrize(
    ("part", "step", "pretrain_epochs", "count"),
    [
        ("train: training", "training", 3, 3 * (3 * 30 + 2 * 80)),
        ("train: training", "training", 0, 3 * 2 * (30 + 80)),
        ("train: prompts", "prompt", 3, 3 * (3 * 30 + 2 * 80 + 40)),
        ("train: validation", "validation", 3, 3 * 40 * (3 + 2 + 1)),
        ("train: checkpoints", "checkpoint", 3, 3 * (3 + 2)),
    ],
)
def test_rows_of_other_rounds_count_in_their_own_epochs(part, step, pretrain_epochs, count):
    size = dataclasses.replace(SIZE, related_rows=30)
    settings = {"num_epochs": 2, "extra_train_dirs": ("round1",)}
    timed = estimate({step: 1.0}, size=size, pretrain_epochs=pretrain_epochs, **settings)
    assert timed.parts()[part] == count


def test_preflight_says_what_further_seeds_cost():
    facts = vqa.time_facts(estimate({"training": 1.5}, num_epochs=2, seeds=(42, 7, 8)))
    assert facts["seeds"] == (
        "9 models: 3 folds x 3 seeds (42, 7, 8); all but the first seed add 24.0 minutes on one "
        "device"
    )
    assert facts["estimated minutes on one device"] == 36.0
    assert "seeds" not in vqa.time_facts(estimate({"training": 1.5}))


@pytest.mark.parametrize(("variants", "tokens"), [(0, 250), (2, 2 * 1000 + 3 * 250)])
def test_features_of_other_rounds_count_as_those_of_as_many_training_rows(variants, tokens):
    size = dataclasses.replace(SIZE, related_rows=30)  # a quarter of train.csv's
    settings = {"augment_images": variants, "extra_train_dirs": ("round1",)}
    timed = estimate({"image_token": 1.0}, size=size, **settings)
    assert timed.parts()["train: features"] == tokens


def test_preflight_says_that_alignment_is_not_in_its_estimate():
    facts = vqa.time_facts(estimate({"training": 1.5}, alignment_model="google/siglip"))
    assert facts["alignment"] == (
        "not in the estimate: google/siglip scores last, in the time that is left"
    )
    assert "alignment" not in vqa.time_facts(estimate({"training": 1.5}))
