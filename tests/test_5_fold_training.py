"""Part 5, Epochs and Fold training: what an epoch shows, what a step does, and when a fold ends."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from planted import rewrite_rows
from running import note_scoring, open_run_session, plain_prompts, quiet

import vqa_helpers as vqa

# --- Epochs ---------------------------------------------------------------------------------------


def test_an_epoch_visits_every_row_once_and_keeps_the_tail():
    lengths = np.arange(21) % 7
    steps = vqa.plan_epoch(lengths, step_size=6, seed_keys=(42, 0, 1))
    assert sorted(map(len, steps)) == [3, 6, 6, 6]
    assert sorted(np.concatenate(steps)) == list(range(21))
    again = vqa.plan_epoch(lengths, 6, (42, 0, 1))
    other = vqa.plan_epoch(lengths, 6, (42, 0, 2))
    assert np.array_equal(again[0], steps[0])
    assert not np.array_equal(other[0], steps[0])


def test_rows_of_similar_length_share_a_step_and_little_is_padded():
    lengths = np.random.default_rng(0).integers(50, 800, 640)
    steps = vqa.plan_epoch(lengths, 16, (42, 0, 1))
    micro_batches = [step[start : start + 4] for step in steps for start in range(0, 16, 4)]
    in_file_order = np.arange(640).reshape(-1, 4)
    assert vqa.padding_share(lengths, micro_batches) < 0.05
    assert vqa.padding_share(lengths, in_file_order) > 0.3
    means = [lengths[step].mean() for step in steps]
    correlation = np.corrcoef(range(len(steps)), means)[0, 1]
    assert abs(correlation) < 0.4  # long and short steps alternate
    assert vqa.padding_share([2, 4], [[0, 1]]) == 0.25
    assert vqa.padding_share([2, 4], []) == 0


def test_choice_order_is_a_function_of_seed_epoch_and_row():
    config = vqa.Config.preset("demo")
    orders = {vqa.training_order(config, epoch, "train_0001") for epoch in range(60)}
    assert len(orders) > 12
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert vqa.training_order(config, 3, "x") == vqa.training_order(config, 3, "x")
    unshuffled = vqa.Config.preset("demo", shuffle_choices=False)
    assert vqa.training_order(unshuffled, 3, "x") == (0, 1, 2, 3)


def test_training_draws_images_and_wordings_and_everything_else_sees_the_original(
    with_final, monkeypatch
):
    def image_paths(prompts):
        return [prompt.image_path for prompt in prompts]

    def text_of(prompt):
        return session.processor.tokenizer.decode(prompt.input_ids)

    session = open_run_session(with_final)
    trainer = vqa.FoldTrainer(session, with_final, 0)
    epochs = [trainer.epoch_prompts(epoch) for epoch in range(3)]
    assert image_paths(epochs[1]) == image_paths(trainer.epoch_prompts(1))
    prompts = [prompt for epoch in epochs for prompt in epoch]
    paths = image_paths(prompts)
    assert {path.split("<variant>")[0] for path in paths} == set(
        trainer.schedule.phase(0).rows["image_path"]
    )
    changed = np.mean(["<variant>" in path for path in paths])
    assert 0.4 < changed < 0.9
    assert "<variant>" not in "".join(trainer.validation["image_path"])

    texts = [text_of(prompt) for prompt in prompts]
    starts = [task.split("{question}")[0].strip() for task in vqa._INSTRUCTIONS]
    drawn = [sum(start in text for text in texts) for start in starts]
    assert min(drawn) >= 3
    assert sum(drawn) == len(texts)
    (plain,) = plain_prompts(session, trainer.validation, [0])
    assert starts[0] in text_of(plain)

    # The run kept the features of all variants.
    variants = vqa.image_variants(with_final.train, 2, with_final.config.seed)
    budget = vqa.pixel_budget(with_final.config, session.processor)
    monkeypatch.setattr(session.vision_cache, "compute_features", None)
    assert session.vision_cache.fill(variants, budget, quiet)
    assert "features" in vqa.collate(session, epochs[0][:8])
    assert vqa.expected_memory(with_final.config, with_final.train).image_token > 0


# --- A fold ---------------------------------------------------------------------------------------


def test_training_leaves_the_base_model_untouched(mini_run):
    run = mini_run()
    session = open_run_session(run)
    before = {name: value.clone() for name, value in session.model.state_dict().items()}
    result = vqa.train_fold(run.config, 0, session)
    after = session.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert result.history["loss"].notna().all()
    assert set(result.kinds) == {"raw", "ema"}


def test_a_finished_fold_is_read_not_trained_again(mini_run, monkeypatch):
    run = mini_run()
    first = vqa.train_fold(run.config, 0)
    monkeypatch.setattr(vqa, "open_session", None)
    assert vqa.train_fold(run.config, 0).kinds == first.kinds


@pytest.mark.slow
def test_early_stopping_ends_a_fold(mini_run):
    run = mini_run(
        num_epochs=6,
        use_early_stopping=True,
        early_stopping_patience=1,
        learning_rate=1e-9,
    )
    assert len(vqa.train_fold(run.config, 0).history) == 2  # no gain over the first epoch


def test_training_stops_when_the_time_budget_is_used(mini_run):
    run = mini_run(num_epochs=3, time_budget_hours=1e-9)
    vqa.atomic_write(run.directory / "session.json", '{"started": 0}')
    assert len(vqa.train_fold(run.config, 0).history) == 1


@pytest.mark.slow
def test_swa_averages_a_tail_of_constant_learning_rate(mini_run):
    run = mini_run(num_epochs=3, use_swa=True, swa_start_epoch=1)
    trainer = vqa.FoldTrainer(open_run_session(run), run, 0)
    rates = []
    update = trainer.update_schedule_and_averages

    def noting(epoch):
        update(epoch)
        rates.append(trainer.optimizer.param_groups[0]["lr"])

    trainer.update_schedule_and_averages = noting
    trainer.fit()
    assert len(set(rates[:3])) == 3
    assert len(set(rates[3:])) == 1
    assert trainer.averagers["swa"].updates == 6


def test_half_precision_training_uses_the_scaler(mini_run, replace):
    """On a CPU the scaler is only told to be there: state and steps go through it."""
    run = mini_run()
    session = open_run_session(run)
    session.runtime = replace(session.runtime, precision="fp16")
    trainer = vqa.FoldTrainer(session, run, 0)
    assert trainer.scaler.is_enabled()
    trainer.fit()
    assert trainer.scaler.state_dict()["scale"] > 0


@pytest.mark.slow
def test_a_label_written_as_a_soft_target_trains_the_same_bytes(mini_run):
    hard = mini_run(run_name="hard", lora_dropout=0.1)
    soft = mini_run(run_name="soft", lora_dropout=0.1)
    table = soft.train.copy()
    table[list(vqa.TARGET_COLUMNS)] = np.eye(4)[soft.train["label"]]
    rewrite_rows(soft, "folds", table)
    assert vqa.train_fold(hard.config, 0).adapters == vqa.train_fold(soft.config, 0).adapters


def test_kept_weights_that_prefer_a_letter_are_noted_for_the_report(mini_run, monkeypatch):
    def prefer_b(session, frame, *_, **__):
        return np.tile([0.0, 1.0, 0.0, 0.0], (len(frame), 1, 1))

    monkeypatch.setattr(vqa, "predict_logits", prefer_b)
    run = mini_run()
    session = open_run_session(run)
    trainer = vqa.FoldTrainer(session, run, 0)
    few = trainer.validation
    trainer.validation = pd.concat([few, few], ignore_index=True)  # 18 rows would prove nothing
    trainer.save_weights("ema", trainer.parameters, None)
    share = (trainer.validation["answer"] == "b").mean()
    assert session.notes == [
        f"fold 0, ema weights: the model answered b in 36 of 36 rows (100%); "
        f"b is right in {share:.0%}"
    ]
    trainer.validation = few
    trainer.save_weights("raw", trainer.parameters, None)
    assert len(session.notes) == 1


@pytest.mark.slow
def test_the_best_epochs_scores_are_those_of_the_raw_weights_and_computed_once(
    mini_run, monkeypatch
):
    passes = note_scoring(monkeypatch)
    run = mini_run(num_epochs=2)
    session = open_run_session(run)
    trainer = vqa.FoldTrainer(session, run, 0)
    result = trainer.fit()
    assert passes == ["fold 0 validation"] * 3  # two epochs, and the EMA weights
    again, _ = trainer.save_weights("raw", trainer.best["tensors"], None)
    assert again == result.kinds["raw"]
    # A checkpoint of an earlier version has no logits: they are computed.
    del trainer.best["logits"]
    trainer.save(epoch=2, step=0)
    trainer.resume()
    assert trainer.best["logits"] is None


@pytest.mark.slow
def test_no_prompt_of_a_fold_is_made_twice_in_a_run_of_one_variant(mini_run, monkeypatch):
    """Neither for the memory plan and the first epoch, nor for each validation."""
    made = []
    make = vqa.make_prompt

    def note(session, frame, row, orders, scale=1.0):
        made.append((frame["id"].iloc[row], *orders))
        return make(session, frame, row, orders, scale)

    run = mini_run(num_epochs=3, shuffle_choices=False)
    session = open_run_session(run)
    trainer = vqa.FoldTrainer(session, run, 0)
    monkeypatch.setattr(vqa, "make_prompt", note)
    result = trainer.fit()
    counts = Counter(made)
    trained_on = run.train.loc[run.train["fold"] != 0, "id"]
    order = (0, 1, 2, 3)
    expected = dict.fromkeys([(sample_id, order) for sample_id in trained_on], 3)
    expected |= dict.fromkeys([(sample_id, order) for sample_id in trainer.validation["id"]], 1)
    assert counts == expected
    # What is scored is what a fresh call gives.
    again, _ = trainer.save_weights("raw", trainer.best["tensors"], None)
    del trainer.validation_prompts
    anew, _ = trainer.save_weights("raw", trainer.best["tensors"], None)
    assert again == anew == result.kinds["raw"]
