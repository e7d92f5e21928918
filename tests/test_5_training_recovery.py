"""Part 5, Fold training: neither a stop, nor a bad number, nor little memory spoils a fold."""

import math
import re
import weakref

import numpy as np
import pytest
import torch
from running import (
    ONE_VIEW,
    Stop,
    adapter_file,
    open_run_session,
    plain_batch,
    raising,
    read_logits,
)

import vqa_helpers as vqa

# --- Stopped and resumed --------------------------------------------------------------------------


@pytest.mark.slow  # test_3_families.py stops and resumes a run in the quick suite
@pytest.mark.parametrize("stop_at", [2, 3, 5])
def test_a_resumed_fold_ends_bitwise_like_an_uninterrupted_one(mini_run, monkeypatch, stop_at):
    """Stopped inside an epoch, at its end and in the second one: 18 rows make 3 steps an epoch."""
    settings = {
        "num_epochs": 2,
        "lora_dropout": 0.1,
        "use_swa": True,
        "save_every_minutes": 1e-9,
    }
    whole = mini_run(run_name="whole", **settings)
    broken = mini_run(run_name="broken", **settings)
    vqa.train_fold(whole.config, 0)
    step = vqa.FoldTrainer.optimizer_step
    done = []

    def stopping(self, *arguments):
        if len(done) == stop_at:
            raise Stop
        done.append(1)
        return step(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(vqa.FoldTrainer, "optimizer_step", stopping)
        vqa.train_fold(broken.config, 0)
    vqa.train_fold(broken.config, 0)
    for kind in ("raw", "ema", "swa"):
        expected_weights = adapter_file(whole, 0, kind).read_bytes()
        assert adapter_file(broken, 0, kind).read_bytes() == expected_weights, kind
        expected_logits = read_logits(whole, 0, f"validation_{kind}")
        assert np.array_equal(read_logits(broken, 0, f"validation_{kind}"), expected_logits)


@pytest.mark.slow
def test_a_fold_stopped_in_the_validation_that_ends_an_epoch_resumes_like_an_uninterrupted_one(
    mini_run, monkeypatch
):
    settings = {"num_epochs": 2, "save_every_minutes": 1e-9}
    whole = mini_run(run_name="whole", **settings)
    broken = mini_run(run_name="broken", **settings)
    expected = vqa.train_fold(whole.config, 0)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(vqa.FoldTrainer, "end_epoch", raising(Stop))
        vqa.train_fold(broken.config, 0)
    resumed = vqa.train_fold(broken.config, 0)
    assert resumed.history["loss"].tolist() == expected.history["loss"].tolist()
    assert resumed.kinds == expected.kinds


def test_a_checkpoint_of_another_configuration_is_refused(mini_run, replace):
    run = mini_run(run_name="one", num_epochs=1)
    vqa.FoldTrainer(open_run_session(run), run, 0).save(0, 1)
    other_run = replace(run, fingerprint="other")
    trainer = vqa.FoldTrainer(open_run_session(run), other_run, 0)
    with pytest.raises(vqa.CheckpointError, match="another configuration"):
        trainer.resume()


# --- Numbers that are not finite ------------------------------------------------------------------


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
    assert trainer.scheduler.last_epoch == 0
    assert trainer.averagers["ema"].updates == 0
    assert len(trainer.session.notes) == 2
    for note in trainer.session.notes:
        assert note.split(":")[1] == " skipped a step"


def test_gradients_that_overflow_at_every_scale_stop_the_fold_and_move_no_schedule(
    mini_run, replace
):
    run = mini_run(max_skipped_steps=0)
    session = open_run_session(run)
    session.runtime = replace(session.runtime, precision="fp16")
    trainer = vqa.FoldTrainer(session, run, 0)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=0.002)
    some_parameter = next(iter(trainer.parameters.values()))
    some_parameter.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(
        FloatingPointError, match=r"the last: loss \d.*, gradient norm nan at epoch 1, step 2"
    ):
        trainer.fit()
    assert trainer.scheduler.last_epoch == 0
    assert trainer.averagers["ema"].updates == 0


# --- Memory ---------------------------------------------------------------------------------------


def out_of_memory_above(size, monkeypatch):
    """Let the forward pass fail as a GPU's does for batches of more than `size` questions."""
    for name in ("answer_hidden_states", "states_behind_beginning"):
        forward = getattr(vqa, name)

        def limited(session, batch, *beginning, forward=forward):
            if len(batch["prompts"]) > size:
                raise torch.OutOfMemoryError("CUDA out of memory (a test)")
            return forward(session, batch, *beginning)

        monkeypatch.setattr(vqa, name, limited)


@pytest.mark.slow
def test_without_memory_the_micro_batch_is_halved_and_the_update_stays_the_same(
    mini_run, monkeypatch
):
    run = mini_run()

    def accumulate():
        """A trainer that has accumulated the gradients of eight questions, and these."""
        trainer = vqa.FoldTrainer(open_run_session(run), run, 0)
        batch = plain_batch(trainer.session, trainer.schedule.phase(0).rows, range(8))
        trainer.accumulate_gradients(0, 0, [batch], n_rows=8)
        gradients = [value.grad.flatten() for value in trainer.parameters.values()]
        return trainer, torch.cat(gradients)

    _, expected = accumulate()
    out_of_memory_above(2, monkeypatch)
    trainer, gradients = accumulate()
    assert (gradients - expected).norm() < 1e-5 * expected.norm()
    note = "4 questions per forward pass from here on; an optimizer step still takes 8"
    assert note in trainer.session.notes[0]
    trainer.optimizer.zero_grad()
    trainer.fit()
    assert trainer.session.memory_plan == trainer.plan  # the next fold starts with it
    assert trainer.plan.micro_batch == 2
    assert trainer.session.inference_batch_limit == 2
    resumed = vqa.FoldTrainer(open_run_session(run), run, 0)
    resumed.resume()
    assert resumed.plan.micro_batch == 2  # the plan is part of the checkpoint


@pytest.mark.parametrize(
    ("problem", "note"),
    [
        (torch.OutOfMemoryError("a test"), "out of memory"),
        (RuntimeError("why"), "not captured (why"),
    ],
)
def test_a_pass_that_cannot_be_captured_is_computed(problem, note, mini_run, monkeypatch):
    """As by the plan of a checkpoint in another process, or by the last plan that there is."""
    run = mini_run()
    trainer = vqa.FoldTrainer(open_run_session(run), run, 0)
    batch = plain_batch(trainer.session, trainer.schedule.phase(0).rows, range(2))
    trainer.plan = vqa.MemoryPlan(1, 0, 1.5, is_captured=True)
    states_of = vqa.training_states

    def failing(session, batch):
        if trainer.plan.is_captured:
            raise problem
        return states_of(session, batch)

    monkeypatch.setattr(vqa, "training_states", failing)
    trainer.accumulate_gradients(0, 0, [batch], n_rows=2)
    assert trainer.plan == trainer.session.memory_plan == vqa.MemoryPlan(1, 0)
    assert all(value.grad is not None for value in trainer.parameters.values())
    assert note in trainer.session.notes[0]
    monkeypatch.setattr(vqa, "training_states", raising(RuntimeError("another fault")))
    with pytest.raises(RuntimeError, match="another fault"):
        trainer.accumulate_gradients(0, 0, [batch], n_rows=2)
    trainer.plan = vqa.MemoryPlan(1, 0, is_captured=True)
    batches = map(raising(RuntimeError("a process that prepares batches ended")), [batch])
    with pytest.raises(RuntimeError, match="prepares batches"):  # which are not half a step
        trainer.accumulate_gradients(0, 0, batches, n_rows=2)


def test_memory_that_runs_out_in_the_backward_pass_is_freed_before_the_next_try(
    mini_run, monkeypatch
):
    run = mini_run()
    trainer = vqa.FoldTrainer(open_run_session(run), run, 0)
    training_loss = vqa.training_loss
    states_of_failed_passes = []
    alive_when_cleared = []

    def out_of_memory(gradient):
        raise torch.OutOfMemoryError("a test")

    def failing_backward(session, states, batch):
        loss = training_loss(session, states, batch)
        if len(batch["prompts"]) > 4:
            states_of_failed_passes.append(weakref.ref(states))
            loss.register_hook(out_of_memory)
        return loss

    def clear_memory(logger=None):
        alive_when_cleared.append(states_of_failed_passes[0]())

    monkeypatch.setattr(vqa, "training_loss", failing_backward)
    monkeypatch.setattr(vqa, "clear_memory", clear_memory)
    trainer.train_epoch(0, 0)
    assert trainer.plan.micro_batch == 4
    assert alive_when_cleared == [None]


def test_memory_that_does_not_hold_one_question_is_explained(mini_run, monkeypatch):
    run = mini_run()
    session = open_run_session(run)
    out_of_memory_above(0, monkeypatch)
    explained = "Out of GPU memory with one question per forward pass: set max_pixels"
    with pytest.raises(RuntimeError, match=explained):
        vqa.FoldTrainer(session, run, 0).fit()
    with pytest.raises(RuntimeError, match=explained):
        vqa.predict_logits(session, run.test, ONE_VIEW)


def test_the_memory_plan_is_made_for_the_longest_prompt_of_all_epochs(
    session, mini_run, monkeypatch
):
    planned = []

    def noting(session, prompts, state, job):
        planned.append((len(prompts), job))

    monkeypatch.setattr(vqa, "plan_memory", noting)
    for fields in ({}, {"paraphrases": 2}, {"augment_images": 1}):
        run = mini_run(num_epochs=3, **fields)
        session.config = run.config
        session.memory_plan = None
        trainer = vqa.FoldTrainer(session, run, 0)
        assert trainer.plan is None
        trainer.model.unload()
        session.assigned_folds = (0, 1)  # both will be trained by the plan
    assert planned == [(18, 54), (54, 108), (54, 108)]


# --- Another card, other libraries ----------------------------------------------------------------


@pytest.fixture
def trainer_on(mini_run, replace):
    """Make a trainer of one run on a card of this precision: trainer_on("fp16")."""
    run = mini_run(num_epochs=1)
    session = open_run_session(run)
    made = []

    def make(precision):
        for trainer in made:
            trainer.model.unload()
        runtime = replace(session.runtime, precision=precision)
        trainer = vqa.FoldTrainer(replace(session, runtime=runtime, notes=[]), run, 0)
        made[:] = [trainer]
        return trainer

    return make


def saved_on(trainer):
    """Save after a step whose scaler has a scale of its own, where it has any."""
    if trainer.scaler.is_enabled():
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        trainer.stateful_parts["scaler"] = trainer.scaler
        trainer.scaler.scale(torch.zeros(()))
    trainer.save(0, 1)


FIRST_SCALE = 65536.0  # of a fresh GradScaler
CARD_CHANGES = {
    "L4 to V100": ("bf16", "fp16", FIRST_SCALE, "in fp16, the one before in bf16: training con"),
    "T4 to RTX": ("fp16", "bf16", 1.0, "in bf16, the one before in fp16: .*without a GradScaler"),
    "T4 to T4": ("fp16", "fp16", 8.0, None),
    "L4 to A100": ("bf16", "bf16", 1.0, None),
    "CPU to T4": ("fp32", "fp16", FIRST_SCALE, "with a fresh GradScaler.*set precision to have"),
}


@pytest.mark.parametrize(
    ("before", "now", "scale", "note"), CARD_CHANGES.values(), ids=CARD_CHANGES
)
def test_a_fold_continues_on_another_card_with_the_right_scaler_and_a_note(
    trainer_on, before, now, scale, note
):
    saved_on(trainer_on(before))
    trainer = trainer_on(now)
    assert trainer.resume() == (0, 1)
    assert trainer.scaler.is_enabled() is (now == "fp16")
    assert trainer.scaler.get_scale() == scale
    if note is None:
        assert trainer.session.notes == []
    else:
        (found,) = trainer.session.notes
        assert re.search(note, found), found


@pytest.mark.parametrize(
    ("before", "now", "notes"), [("fp16", "fp16", 0), ("fp16", "bf16", 1), ("bf16", "fp16", 1)]
)
def test_a_checkpoint_that_names_no_precision_is_judged_by_its_scaler(
    trainer_on, monkeypatch, before, now, notes
):
    """As earlier versions of the module wrote it."""
    restore = vqa.CheckpointManager.restore

    def without_precision(manager, path):
        tensors, state, metadata = restore(manager, path)
        del metadata["precision"], metadata["libraries"]
        return tensors, state, metadata

    saved_on(trainer_on(before))
    monkeypatch.setattr(vqa.CheckpointManager, "restore", without_precision)
    trainer = trainer_on(now)
    assert trainer.resume() == (0, 1)
    assert len(trainer.session.notes) == notes


def test_weights_that_a_library_has_renamed_are_refused_with_both_versions(trainer_on, monkeypatch):
    trainer = trainer_on("fp32")
    renamed = {f"new.{name}": value for name, value in trainer.parameters.items()}
    versions = vqa.library_versions()
    with monkeypatch.context() as patch:
        patch.setattr(vqa, "library_versions", lambda: {**versions, "peft": "0.1.0"})
        trainer.parameters = renamed
        trainer.save(0, 1)
    here = re.escape(
        f"it was saved with peft 0.1.0 (here {versions['peft']}): install that version, or "
    )
    unknown = f"{len(renamed)} weights in it are none of the model's: 'new.base_model"
    missing = f"{len(renamed)} of the model's are not in it: 'base_model"
    with pytest.raises(vqa.CheckpointError, match=f"step_.*{unknown}.*{missing}.*{here}"):
        trainer_on("fp32").resume()


def test_weights_of_another_shape_are_refused(tmp_path):
    stored = {"a": torch.zeros(2, 3)}
    wanted = {"a": torch.zeros(2, 4)}
    with pytest.raises(
        vqa.CheckpointError,
        match=r"'a' has the shape \(2, 3\), not \(2, 4\); it was saved with the same .*; choose a",
    ):
        vqa.require_fitting_weights(tmp_path, stored, wanted, vqa.library_versions())
    with pytest.raises(vqa.CheckpointError, match="versions; choose a new run_name"):
        vqa.require_fitting_weights(tmp_path, stored, {}, {})
