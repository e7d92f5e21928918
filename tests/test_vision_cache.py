"""Cached vision features give the very numbers of the uncached path, and are computed once per content."""

import types

import numpy as np
import psutil
import pytest
import torch

import vqa_helpers as vqa


def fill(session, frame):
    return session.cache.fill(frame, vqa.pixel_budget(session.config, session.processor), session.progress)


def test_cached_scores_are_bitwise_the_uncached_ones(session, demo_rows):
    frame = demo_rows.train.head(6)
    views = [vqa.View("rotation 0")]
    uncached = vqa.predict_logits(session, frame, views)
    assert not session.cache.store
    assert fill(session, frame)
    assert np.array_equal(vqa.predict_logits(session, frame, views), uncached)


def test_features_equal_the_models_own_path(session, demo_rows):
    """The plain call with pixel_values is the reference for what goes in through mm_encoder_outputs."""
    batch = vqa.collate(session, [vqa.make_prompt(session, demo_rows.train, row, (0, 1, 2, 3)) for row in range(2)])
    inputs = {name: batch[name] for name in vqa.MODEL_INPUTS}
    with torch.no_grad():
        ours = vqa.last_logits(session, session.model, batch)
        plain = session.model(**inputs, pixel_values=torch.cat(batch["pixel_values"])).logits[:, -1]
    assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_copies_of_an_image_are_computed_once(session, demo_rows):
    frame = demo_rows.train
    copies = frame[frame["pixel_hash"].duplicated(keep=False)]
    assert len(copies) >= 2
    fill(session, copies)
    assert len(session.cache.store) == copies["pixel_hash"].nunique()
    session.cache.compute = None  # a second fill must have nothing to do
    assert fill(session, copies)


def test_cache_is_skipped_where_memory_is_short(session, demo_rows, monkeypatch, caplog):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1000))
    assert not fill(session, demo_rows.train.head(4))
    assert not session.cache.store
    assert "Vision cache skipped" in caplog.text


def test_overflowing_half_precision_features_are_recomputed_in_fp32_and_counted(session, demo_rows):
    visual = session.model.model.visual.to(torch.float16)
    with torch.no_grad():
        visual.merger.get_submodule("linear_fc2" if hasattr(visual.merger, "linear_fc2") else "mlp.2").weight.mul_(
            1e6
        ).clamp_(-6e4, 6e4)
    frame = demo_rows.train.head(2)
    try:
        fill(session, frame)
    except RuntimeError as error:  # a CPU without half-precision kernels
        pytest.skip(str(error))
    tensors = [tensor for image in session.cache.store.values() for tensor in image]
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float16 for tensor in tensors)
    assert session.cache.recomputed_in_fp32 == 2
    assert visual.dtype == torch.float16


def test_image_tokens_stay_within_the_budget_and_small_images_are_not_blown_up(session, demo_rows, replace):
    area = vqa.merged_patch_area(session.processor)
    tight = replace(session.config, max_pixels=5 * area)
    for row in demo_rows.train.head(20).itertuples():
        for config in (session.config, tight):
            budget = vqa.pixel_budget(config, session.processor)
            pixels, grid = vqa.prepare_image(vqa.load_image(row.image_path), session.processor, budget)
            assert grid == vqa.image_grid(row.width, row.height, session.processor, budget)
            tokens = len(pixels) // 4
            assert tokens <= budget[1] // area
            assert tokens <= 1.5 * row.width * row.height / area + 1
    square = replace(session.config, image_size=64)
    assert vqa.pixel_budget(square, session.processor)[1] == 64 * 64
