"""Part 3, Scoring layers: a common beginning is read once, and the last layer's answers only."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from references import huggingface_scores, perturb_adapter
from running import ONE_VIEW, ROTATIONS, plain_prompts
from test_3_scores_and_loss import Waits

import vqa_helpers as vqa

OTHERS = [
    pytest.param(family, has_adapter, marks=pytest.mark.slow)
    for family in ["qwen2_5_vl", "qwen3_vl_moe", "internvl"]
    for has_adapter in [True, False]
]
COMMON = 22  # tokens before the image that all of the demo's prompts begin with


def attach_adapter(session):
    adapted = vqa.attach_lora(session.model, session.config, seed=0)
    perturb_adapter(vqa.use_fast_layers(session, adapted, questions=3)).eval()


@contextmanager
def noted_passes(monkeypatch):
    """A list with (batch, length) of what goes into each layer and comes out."""
    shapes = []
    score_layer = vqa.score_layer

    def noting(layer, states, *arguments):
        output = score_layer(layer, states, *arguments)
        shapes.append((tuple(states.shape[:2]), tuple(output.shape[:2])))
        return output

    with monkeypatch.context() as patch:
        patch.setattr(vqa, "score_layer", noting)
        yield shapes


@pytest.mark.parametrize(
    ("family", "has_adapter"),
    [("qwen3_vl", True), pytest.param("qwen3_vl", False, marks=pytest.mark.slow), *OTHERS],
)
def test_scores_behind_a_common_beginning_equal_huggingfaces_full_pass(
    family, has_adapter, open_tiny, demo_rows, replace, monkeypatch
):
    session = open_tiny(family)
    frame = demo_rows.test.head(2)
    if has_adapter:
        attach_adapter(session)
    scores = {}
    for size in (1, 2):  # without padding, and with it
        session.config = replace(session.config, infer_batch_size=size)
        for views in (ONE_VIEW, ROTATIONS):
            with noted_passes(monkeypatch) as shapes:
                scores[size, len(views)] = vqa.predict_logits(session, frame, views)
            layers = len(session.decoder_layers)
            assert len(shapes) == layers * (1 + 2 // size)  # the beginning is read once
            assert shapes[0] == ((1, COMMON), (1, COMMON))
            assert shapes[-1][1] == (size, len(views))  # the last layer's answers only
    expected = huggingface_scores(session, frame, ROTATIONS)
    assert np.abs(np.diff(expected, axis=1)).min() > 1e-5
    for (_, views), found in scores.items():
        assert np.allclose(found, expected[:, :views], rtol=1e-5, atol=1e-5)


def test_a_common_beginning_ends_before_the_image_and_is_as_long_as_it_is_worth(
    open_tiny, demo_rows, replace, monkeypatch
):
    session = open_tiny("qwen3_vl")
    same = plain_prompts(session, demo_rows.test, [0, 0])  # the image's tokens are the same, too
    assert vqa.beginning_length(session, same) == COMMON
    assert vqa.beginning_length(session, same[:1]) == 0
    other = replace(same[1], input_ids=np.where(np.arange(len(same[1].input_ids)) == 8, 5, 6))
    assert vqa.beginning_length(session, [same[0], other]) == 0
    short = replace(same[1], input_ids=same[1].input_ids.copy())
    short.input_ids[8] += 1
    assert vqa.beginning_length(session, [same[0], short]) == 8
    monkeypatch.setattr(vqa, "LEAST_BEGINNING", 9)
    assert vqa.beginning_length(session, [same[0], short]) == 0
    session.decoder_layers[-1].self_attn.sliding_window = 4
    assert vqa.beginning_length(session, same) == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_recurrent_layers_are_scored_as_in_training(family, open_tiny, demo_rows):
    session = open_tiny(family)
    prompts = plain_prompts(session, demo_rows.test, [0, 1])
    assert vqa.read_beginning(session, prompts) is None
    scores = vqa.predict_logits(session, demo_rows.test.head(2), ONE_VIEW)[:, 0]
    batch = vqa.collate(session, prompts)
    with torch.inference_mode():
        expected = vqa.answer_scores(session, vqa.answer_hidden_states(session, batch))
    assert np.array_equal(scores, expected.numpy())


def test_a_small_models_adapter_is_merged_for_a_pass_in_full_precision_only(
    open_tiny, demo_rows, monkeypatch
):
    session = open_tiny("qwen3_vl")
    attach_adapter(session)
    layer = session.decoder_layers[0].self_attn.q_proj
    rows = torch.randn(3, 192)
    expected = layer(rows).detach()
    score_layer = vqa.score_layer
    merged = []

    def noting(scored, *arguments):
        merged.append(scored.mlp.up_proj.forward.keywords["weight"])
        return score_layer(scored, *arguments)

    monkeypatch.setattr(vqa, "score_layer", noting)
    vqa.predict_logits(session, demo_rows.test.head(2), ONE_VIEW)
    assert len(merged) == 8  # the beginning and a batch, in four layers
    assert merged[0] is merged[4]
    with torch.inference_mode(), vqa.merged_adapter(session):
        assert torch.allclose(layer(rows), expected, atol=1e-5)
        assert not torch.allclose(layer.base_layer(rows), expected, atol=1e-2)
    assert torch.equal(layer(rows), expected)
    size = sum(weight.nbytes for weight in session.decoder_layers.parameters())
    for most, is_merged in ((size, True), (size - 1, False)):
        monkeypatch.setattr(vqa, "MOST_MERGED", most)
        with vqa.merged_adapter(session):
            assert ("forward" in vars(layer)) == is_merged
    monkeypatch.setattr(vqa, "MOST_MERGED", size)
    session.model.to(torch.bfloat16)
    with vqa.merged_adapter(session):
        assert layer.forward.__func__ is vqa.lora_forward


def test_layers_compute_on_their_own_again_where_memory_ends_while_adapters_are_merged(
    open_tiny, demo_rows, monkeypatch
):
    session = open_tiny("qwen3_vl")
    attach_adapter(session)
    layer = session.decoder_layers[0].self_attn.q_proj
    addmm = torch.addmm
    merged = []

    def merging(*arguments, **options):
        if len(merged) == 5:
            raise MemoryError
        merged.append(addmm(*arguments, **options))
        return merged[-1]

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch, "addmm", merging)
        vqa.predict_logits(session, demo_rows.test.head(1), ONE_VIEW)
    assert layer.forward.__func__ is vqa.lora_forward
    with pytest.raises(ZeroDivisionError), vqa.merged_adapter(session):
        assert "forward" in vars(layer)
        raise ZeroDivisionError
    assert layer.forward.__func__ is vqa.lora_forward


@torch.inference_mode()
def test_questions_with_one_and_with_four_orders_share_a_pass_that_waits_for_nothing(
    open_tiny, demo_rows
):
    session = open_tiny("qwen3_vl")
    orders = [view.order for view in ROTATIONS]
    prompts = [
        vqa.make_prompt(session, demo_rows.test, 0, orders[:1]),
        vqa.make_prompt(session, demo_rows.test, 1, orders),
    ]
    batch = vqa.collate(session, prompts)
    batch["features"] = session.vision_cache.compute_for_batch(batch)
    expected = vqa.answer_hidden_states(session, batch)
    beginning = vqa.read_beginning(session, prompts)
    behind = [vqa.behind_beginning(prompt, beginning.length) for prompt in prompts]
    cut = vqa.collate(session, behind)
    cut["features"] = batch["features"]
    with Waits() as waits:
        states = vqa.states_behind_beginning(session, cut, beginning)
    assert not waits.found
    assert states.shape == (5, session.model.config.text_config.hidden_size)
    assert torch.allclose(states, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_scoring_that_an_older_version_has_begun_goes_on(
    open_tiny, demo_rows, tmp_path, monkeypatch
):
    """It had scored whole prompts: the file and the batches are the same."""
    session = open_tiny("qwen3_vl", infer_batch_size=2, save_every_steps=1)
    frame = demo_rows.test.head(6)
    expected = vqa.predict_logits(session, frame, ONE_VIEW)
    partial = vqa.InferenceCheckpoint(tmp_path / "partial.npz", "fingerprint", session.config)

    def stop(label, done, total, **_):
        if done == 2:
            raise vqa.Interrupted

    session.progress = stop
    with monkeypatch.context() as patch, pytest.raises(vqa.Interrupted):
        patch.setattr(vqa, "read_beginning", lambda session, prompts: None)
        vqa.predict_logits(session, frame, ONE_VIEW, checkpoint=partial)
    session.progress = lambda *_, **__: None
    with noted_passes(monkeypatch) as shapes:
        continued = vqa.predict_logits(session, frame, ONE_VIEW, checkpoint=partial)
    assert len(shapes) == 2 * len(session.decoder_layers)  # the beginning, and the last batch
    assert np.allclose(continued, expected, atol=1e-5)
