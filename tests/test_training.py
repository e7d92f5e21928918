"""The training loop: what each piece computes, and that a stopped run ends like one that was not."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import vqa_helpers as vqa


def test_an_epoch_visits_every_row_once_and_keeps_the_tail():
    lengths = np.arange(21) % 7
    steps = vqa.plan_epoch(lengths, step_size=6, seed_keys=(42, 0, 1))
    assert sorted(map(len, steps)) == [3, 6, 6, 6]
    assert sorted(np.concatenate(steps)) == list(range(21))
    again, other = (vqa.plan_epoch(lengths, 6, (42, 0, epoch)) for epoch in (1, 2))
    assert np.array_equal(again[0], steps[0]) and not np.array_equal(other[0], steps[0])


def test_rows_of_similar_length_share_a_step_and_little_is_padded():
    lengths = np.random.default_rng(0).integers(50, 800, 640)
    steps = vqa.plan_epoch(lengths, 16, (42, 0, 1))
    micro = [step[start : start + 4] for step in steps for start in range(0, 16, 4)]
    random = np.arange(640).reshape(-1, 4)
    assert vqa.padding_share(lengths, micro) < 0.05 < 0.3 < vqa.padding_share(lengths, random)
    means = [lengths[step].mean() for step in steps]
    assert abs(np.corrcoef(range(len(steps)), means)[0, 1]) < 0.4  # long and short steps alternate
    assert vqa.padding_share([2, 4], [[0, 1]]) == 0.25 and vqa.padding_share([2, 4], []) == 0


def test_choice_order_is_a_function_of_seed_epoch_and_row():
    config = vqa.Config.preset("demo")
    orders = {vqa.training_order(config, epoch, "train_0001") for epoch in range(60)}
    assert len(orders) > 12 and all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert vqa.training_order(config, 3, "x") == vqa.training_order(config, 3, "x")
    assert vqa.training_order(vqa.Config.preset("demo", shuffle_choices=False), 3, "x") == (
        0,
        1,
        2,
        3,
    )


def test_choice_loss_equals_cross_entropy_where_all_choices_exist():
    scores, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 3])
    present = torch.ones(5, 4, dtype=torch.bool)
    for smoothing in (0.0, 0.1):
        expected = cross_entropy(scores, labels, label_smoothing=smoothing)
        assert torch.allclose(
            vqa.choice_loss(scores, torch.eye(4)[labels], present, smoothing), expected
        )


def test_choice_loss_ignores_a_blank_choice_and_smooths_over_the_others():
    scores = torch.tensor([[1.0, 2.0, 3.0, 99.0]], requires_grad=True)
    present = torch.tensor([[True, True, True, False]])
    loss = vqa.choice_loss(scores, torch.eye(4)[[1]], present, 0.3)
    log_probabilities = torch.tensor([1.0, 2.0, 3.0]).log_softmax(0)
    assert loss.item() == pytest.approx(
        -(0.7 * log_probabilities[1] + 0.3 * log_probabilities.mean()).item()
    )
    loss.backward()
    assert scores.grad[0, 3] == 0 and scores.grad.isfinite().all()


def test_choice_score_is_the_log_sum_exp_of_the_letters_variants():
    logits = torch.randn(2, 10)
    scores = vqa.choice_logits(logits, ((0, 1), (2,), (3,), (4, 5, 6)))
    assert torch.allclose(scores[:, 0].exp(), logits[:, :2].exp().sum(1))
    assert torch.allclose(scores[:, 1], logits[:, 2])
    assert torch.allclose(scores[:, 3].exp(), logits[:, 4:7].exp().sum(1))


def run_average(kind, values, decay=0.999):
    parameter = torch.nn.Parameter(torch.tensor([float(values[0])]))
    averager = vqa.WeightAverager(kind, {"w": parameter}, decay)
    for value in values:
        with torch.no_grad():
            parameter.fill_(value)
        averager.update()
    return averager.average["w"].item()


def test_ema_equals_its_closed_form_and_forgets_the_start():
    values = [5.0, *np.linspace(0, 1, 99)]
    expected = values[0]
    for step in range(1, 100):
        decay = min(0.999, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * values[step]
    assert run_average("ema", values) == pytest.approx(expected, rel=1e-5)
    weights = np.prod([(1 + step) / (10 + step) for step in range(1, 100)])
    assert weights < 1e-6  # with a constant 0.999 the first value would still weigh 0.905


def test_ema_decay_is_bounded_by_the_configured_one():
    assert run_average("ema", [0.0, 0.0, 1.0], decay=0.1) == pytest.approx(0.9)


def test_swa_is_the_plain_mean():
    assert run_average("swa", [1.0, 2.0, 6.0]) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="kind must be"):
        vqa.WeightAverager("mean", {})


def test_swapped_weights_are_put_back_even_after_an_error():
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(KeyError), vqa.swapped_weights({"w": parameter}, {"w": torch.ones(2)}):
        assert parameter.tolist() == [1, 1]
        raise KeyError
    assert parameter.tolist() == [0, 0]


def open_run_session(run):
    return vqa.open_session(run.config, run.train.iloc[0])


def test_lora_reaches_the_language_model_only_and_depends_on_its_seed(session):
    first = vqa.attach_lora(session.model, session.config, seed=1)
    names = list(vqa.trainable_parameters(first))
    assert names and all(
        ".language_model.layers." in name and "visual" not in name for name in names
    )
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    weights = [value.clone() for value in vqa.trainable_parameters(first).values()]
    first.unload()
    again = list(
        vqa.trainable_parameters(vqa.attach_lora(session.model, session.config, seed=1)).values()
    )
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


def test_training_leaves_the_base_model_untouched(mini_run):
    run = mini_run()
    session = open_run_session(run)
    before = {name: value.clone() for name, value in session.model.state_dict().items()}
    result = vqa.train_fold(run.config, 0, session)
    after = session.model.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    assert result.history["loss"].notna().all() and set(result.kinds) == {"raw", "ema"}


class Stop(Exception):
    """Stands for the end of a session."""


@pytest.mark.parametrize(
    "stop_at", [2, *(pytest.param(stop_at, marks=pytest.mark.slow) for stop_at in (3, 5))]
)
def test_a_resumed_fold_ends_bitwise_like_an_uninterrupted_one(mini_run, monkeypatch, stop_at):
    """Stopped inside an epoch, at its end and in the second one (18 rows make 3 steps an epoch)."""
    settings = {"num_epochs": 2, "lora_dropout": 0.1, "use_swa": True, "save_every_minutes": 1e-9}
    whole, broken = (mini_run(run_name=name, **settings) for name in ("whole", "broken"))
    vqa.train_fold(whole.config, 0)
    step, done = vqa.FoldTrainer.optimizer_step, []

    def stopping(self, *arguments):
        if len(done) == stop_at:
            raise Stop
        done.append(1)
        return step(self, *arguments)

    monkeypatch.setattr(vqa.FoldTrainer, "optimizer_step", stopping)
    with pytest.raises(Stop):
        vqa.train_fold(broken.config, 0)
    monkeypatch.setattr(vqa.FoldTrainer, "optimizer_step", step)
    vqa.train_fold(broken.config, 0)
    for kind in ("raw", "ema", "swa"):
        first, second = (
            run.fold_dir(0) / f"adapter_{kind}" / "adapter_model.safetensors"
            for run in (whole, broken)
        )
        assert first.read_bytes() == second.read_bytes(), kind
        logits = [
            vqa.read_arrays(run.fold_dir(0) / f"validation_{kind}.npz", run.fingerprint)["logits"]
            for run in (whole, broken)
        ]
        assert np.array_equal(*logits)


@pytest.mark.slow
def test_a_fold_stopped_in_the_validation_that_ends_an_epoch_resumes_like_an_uninterrupted_one(
    mini_run, monkeypatch
):
    settings = {"num_epochs": 2, "save_every_minutes": 1e-9}
    whole, broken = (mini_run(run_name=name, **settings) for name in ("whole", "broken"))
    expected = vqa.train_fold(whole.config, 0)

    def stop(self, *arguments):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(vqa.FoldTrainer, "end_epoch", stop)
        vqa.train_fold(broken.config, 0)
    resumed = vqa.train_fold(broken.config, 0)
    assert resumed.history["loss"].tolist() == expected.history["loss"].tolist()
    assert resumed.kinds == expected.kinds


def test_a_checkpoint_of_another_configuration_is_refused(mini_run, replace):
    run = mini_run(run_name="one", num_epochs=1)
    session = open_run_session(run)
    trainer = vqa.FoldTrainer(session, run, 0)
    trainer.save(0, 1)
    with pytest.raises(vqa.CheckpointError, match="another configuration"):
        vqa.FoldTrainer(open_run_session(run), replace(run, fingerprint="other"), 0).resume()


def test_early_stopping_ends_a_fold(mini_run):
    run = mini_run(
        num_epochs=6, use_early_stopping=True, early_stopping_patience=1, learning_rate=1e-9
    )
    assert len(vqa.train_fold(run.config, 0).history) == 2  # no gain over the first epoch


def test_training_stops_when_the_time_budget_is_used(mini_run):
    run = mini_run(num_epochs=3, time_budget_hours=1e-9)
    vqa.atomic_write(run.directory / "session.json", '{"started": 0}')
    assert len(vqa.train_fold(run.config, 0).history) == 1


def test_a_finished_fold_is_read_not_trained_again(mini_run, monkeypatch):
    run = mini_run()
    first = vqa.train_fold(run.config, 0)
    monkeypatch.setattr(vqa, "open_session", None)
    assert vqa.train_fold(run.config, 0).kinds == first.kinds


def test_a_non_finite_loss_skips_the_step_and_above_a_limit_stops_with_the_rows(
    mini_run, monkeypatch
):
    run = mini_run(max_skipped_steps=1)
    trainer = vqa.FoldTrainer(open_run_session(run), run, 0)
    before = {name: value.detach().clone() for name, value in trainer.parameters.items()}
    monkeypatch.setattr(vqa, "choice_logits", lambda logits, letters: logits[:, :4] * math.nan)
    with pytest.raises(
        FloatingPointError,
        match=r"2 steps were not finite, the last: loss nan.*step 1, rows \['train_",
    ):
        trainer.fit()
    assert all(torch.equal(value, before[name]) for name, value in trainer.parameters.items())
    assert trainer.scheduler.last_epoch == 0 and trainer.averagers["ema"].updates == 0
    assert [note.split(":")[1] for note in trainer.session.notes] == [" skipped a step"] * 2


def out_of_memory_above(size, monkeypatch):
    """Let the model's forward pass fail as a GPU's does for batches of more than `size` questions."""
    forward = vqa.answer_hidden_states

    def limited(session, batch):
        if len(batch["prompts"]) > size:
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")
        return forward(session, batch)

    monkeypatch.setattr(vqa, "answer_hidden_states", limited)


def test_without_memory_the_micro_batch_is_halved_and_the_update_stays_the_same(
    mini_run, monkeypatch
):
    run, gradients = mini_run(), []
    for limit in (8, 2):
        out_of_memory_above(limit, monkeypatch)
        trainer = vqa.FoldTrainer(open_run_session(run), run, 0)
        prompts = [
            vqa.make_prompt(trainer.session, trainer.train, row, [(0, 1, 2, 3)]) for row in range(8)
        ]
        trainer.accumulate(0, 0, [vqa.collate(trainer.session, prompts)], rows=8)
        gradients.append(torch.cat([value.grad.flatten() for value in trainer.parameters.values()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()
    assert (
        "4 questions per forward pass from here on; an optimizer step still takes 8"
        in trainer.session.notes[0]
    )
    trainer.optimizer.zero_grad()
    trainer.fit()
    assert trainer.session.memory_plan == trainer.plan  # the next fold starts with it
    assert trainer.plan.micro_batch == 2 and trainer.session.inference_batch_limit == 2
    resumed = vqa.FoldTrainer(open_run_session(run), run, 0)
    resumed.resume()
    assert resumed.plan.micro_batch == 2  # the plan is part of the checkpoint


def test_memory_that_runs_out_in_the_backward_pass_is_freed_before_the_next_try(
    mini_run, monkeypatch
):
    import weakref

    run, alive, seen = mini_run(), [], []
    trainer = vqa.FoldTrainer(open_run_session(run), run, 0)
    loss = vqa.training_loss

    def failing_backward(session, states, batch):
        value = loss(session, states, batch)
        if len(batch["prompts"]) > 4:
            alive.append(weakref.ref(states))
            value.register_hook(
                lambda gradient: (_ for _ in ()).throw(torch.OutOfMemoryError("a test"))
            )
        return value

    monkeypatch.setattr(vqa, "training_loss", failing_backward)
    monkeypatch.setattr(vqa, "clear_memory", lambda logger=None: seen.append(alive[0]()))
    trainer.train_epoch(0, 0)
    assert trainer.plan.micro_batch == 4 and seen == [None]


def test_memory_that_does_not_hold_one_question_is_explained(mini_run, monkeypatch):
    run = mini_run()
    session = open_run_session(run)
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(
        RuntimeError, match="Out of GPU memory with one question per forward pass: set max_pixels"
    ):
        vqa.FoldTrainer(session, run, 0).fit()
    with pytest.raises(
        RuntimeError, match="Out of GPU memory with one question per forward pass: set max_pixels"
    ):
        vqa.predict_logits(session, run.test, [vqa.TTAView("rotation 0")])


def test_swa_averages_a_tail_of_constant_learning_rate(mini_run):
    run = mini_run(num_epochs=3, use_swa=True, swa_start_epoch=1)
    trainer = vqa.FoldTrainer(open_run_session(run), run, 0)
    rates = []
    trainer.after_step_, trainer.after_step = (
        trainer.after_step,
        lambda epoch: (
            trainer.after_step_(epoch),
            rates.append(trainer.optimizer.param_groups[0]["lr"]),
        ),
    )
    trainer.fit()
    assert len(set(rates[:3])) == 3 and len(set(rates[3:])) == 1
    assert trainer.averagers["swa"].updates == 6


def test_an_error_while_preparing_names_the_row(mini_run):
    run = mini_run()
    session = open_run_session(run)
    frame = run.train.head(2).assign(height=100_000)
    with pytest.raises(vqa.DataError, match="Row train_0001 .*aspect ratio"):
        vqa.make_prompt(session, frame, 0, [(0, 1, 2, 3)])
    planned = vqa.make_prompt(session, run.train.assign(height=32, width=64), 0, [(0, 1, 2, 3)])
    with pytest.raises(vqa.DataError, match="gives the patch grid"):
        vqa.collate(session, [planned])


def test_half_precision_training_uses_the_scaler(mini_run, replace):
    """On a CPU the scaler is only told to be there: state and steps go through it."""
    run = mini_run()
    session = open_run_session(run)
    session.runtime = replace(session.runtime, precision="fp16")
    trainer = vqa.FoldTrainer(session, run, 0)
    assert trainer.scaler.is_enabled()
    trainer.fit()
    assert trainer.scaler.state_dict()["scale"] > 0


def test_loading_is_retried_and_then_explained(demo_config, monkeypatch, replace):
    monkeypatch.setattr(vqa.time, "sleep", lambda _: None)
    missing = replace(demo_config, model_id="nobody/no-such-model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        OSError, match="(?s)nobody/no-such-model could not be loaded. Check the spelling"
    ):
        vqa.load_model(missing, vqa.detect_runtime())
    with pytest.raises(ValueError, match="quantization '4bit' needs a GPU"):
        vqa.load_model(replace(demo_config, quantization="4bit"), vqa.detect_runtime())


def test_quantisation_spares_vision_tower_and_head():
    four = vqa.quantization_config("4bit", "fp16")
    assert four.bnb_4bit_quant_type == "nf4" and four.bnb_4bit_use_double_quant
    assert four.bnb_4bit_compute_dtype == torch.float16
    assert {"visual", "lm_head"} <= set(four.llm_int8_skip_modules)
    assert vqa.quantization_config("8bit", "bf16").load_in_8bit
    assert vqa.quantization_config("none", "bf16") is None


def test_gradients_that_overflow_at_every_scale_stop_the_fold_and_move_no_schedule(
    mini_run, replace
):
    run = mini_run(max_skipped_steps=0)
    session = open_run_session(run)
    session.runtime = replace(session.runtime, precision="fp16")
    trainer = vqa.FoldTrainer(session, run, 0)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=0.002)
    next(iter(trainer.parameters.values())).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(
        FloatingPointError, match=r"the last: loss \d.*, gradient norm nan at epoch 1, step 2"
    ):
        trainer.fit()
    assert trainer.scheduler.last_epoch == 0 and trainer.averagers["ema"].updates == 0
