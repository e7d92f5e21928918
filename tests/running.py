"""Stages of a run in the test's own process, and what interrupts them."""

import functools
import json

import pytest

import vqa_helpers as vqa


class Stop(Exception):
    """Stands for the end of a session."""


def quiet(*_, **__):
    """A progress callback that shows nothing."""


def raising(error):
    """A function that raises this error, whatever it is given."""

    def fail(*_, **__):
        raise error

    return fail


def run_all(run, stages=("train", "predict"), progress=quiet):
    """The zero-shot scores and these stages of all folds, in this process."""
    vqa.run_stages(run, [0], ["zeroshot"], quiet)
    vqa.run_stages(run, list(run.config.folds_to_train), stages, progress)
    return run


def train_until_step_2(config, monkeypatch):
    """Train fold 0 of a run, which stops at step number 2 like a dying session."""
    step = vqa.FoldTrainer.optimizer_step

    def stopping(self, epoch, number, *arguments):
        if number == 2:
            raise Stop
        return step(self, epoch, number, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(vqa.FoldTrainer, "optimizer_step", stopping)
        vqa.train_fold(config, 0)


def open_run_session(run):
    return vqa.open_session(run.config, run.train.iloc[0])


# --- Batches of questions -------------------------------------------------------------------------

ONE_VIEW = [vqa.TTAView("rotation 0")]
ROTATIONS = [vqa.TTAView(f"rotation {turn}", turn) for turn in range(4)]


def plain_prompts(session, frame, rows):
    """Prompts of these rows with the choices in their own order."""
    return [vqa.make_prompt(session, frame, row, [(0, 1, 2, 3)]) for row in rows]


def plain_batch(session, frame, rows):
    return vqa.collate(session, plain_prompts(session, frame, rows))


def batch_loss(session, batch):
    return vqa.training_loss(session, vqa.answer_hidden_states(session, batch), batch)


def count_compilations(monkeypatch):
    """A list that gets every graph that torch.compile makes from here on, without a C compiler."""
    import torch
    from torch._dynamo.backends.debugging import aot_eager

    compiled = []

    def counting(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compile_with = functools.partial(torch.compile, backend=counting)
    monkeypatch.setattr(torch, "compile", compile_with)
    return compiled


# --- What a run left behind -----------------------------------------------------------------------


def read_logits(run, fold, name):
    """The logits of a fold's file, `oof` or `test`."""
    return vqa.read_arrays(run.fold_dir(fold) / f"{name}.npz", run.fingerprint)["logits"]


def events(run):
    """What was noted for the report."""
    records = vqa.read_json_lines(run.directory / "events.jsonl")
    return [record["event"] for record in records]


def selected_weights(run):
    return json.loads((run.directory / "selection.json").read_text())["weights"]


def adapter_file(run, fold, kind):
    """The weights of a fold's adapter: `raw`, `ema` or `swa`."""
    return run.fold_dir(fold) / f"adapter_{kind}" / "adapter_model.safetensors"


def work_in_this_process(monkeypatch, command, work):
    """Let `work(folder, progress)` stand for the process `command`; a list of the folders begun."""
    begun = []

    def run(name, doing, config, folder, device):
        assert name == command
        begun.append(folder)
        work(folder, quiet)

    monkeypatch.setattr(vqa, "run_side_process", run)
    return begun


def note_scoring(monkeypatch):
    """A list of what `predict_logits` scores from here on, by its label."""
    labels = []
    predict = vqa.predict_logits

    def noting(session, frame, views, label, *arguments, **planned):
        labels.append(label)
        return predict(session, frame, views, label, *arguments, **planned)

    monkeypatch.setattr(vqa, "predict_logits", noting)
    return labels
