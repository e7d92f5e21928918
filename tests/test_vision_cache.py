"""Cached vision features give the very numbers of the uncached path, and are computed once per content."""

import types

import numpy as np
import psutil
import pytest
import torch

import vqa_helpers as vqa


@pytest.fixture
def session(session, tmp_path):
    """A session of each family with a cache folder of its own."""
    session.vision_cache.folder = tmp_path / "features"
    return session


def fill(session, frame):
    return session.vision_cache.fill(
        frame, vqa.pixel_budget(session.config, session.processor), session.progress
    )


def test_cached_scores_are_bitwise_the_uncached_ones(session, demo_rows):
    frame = demo_rows.train.head(6)
    views = [vqa.TTAView("rotation 0")]
    uncached = vqa.predict_logits(session, frame, views)
    assert not session.vision_cache.shards
    assert fill(session, frame)
    assert np.array_equal(vqa.predict_logits(session, frame, views), uncached)


def test_features_equal_the_models_own_path(session, demo_rows):
    """The plain call with pixel_values is the reference for what goes in through mm_encoder_outputs."""
    batch = vqa.collate(
        session,
        [vqa.make_prompt(session, demo_rows.train, row, [(0, 1, 2, 3)]) for row in range(2)],
    )
    inputs = {name: batch[name] for name in vqa.MODEL_INPUTS}
    with torch.no_grad():
        ours = vqa.answer_scores(session, vqa.answer_hidden_states(session, batch))
        logits = session.model(**inputs, pixel_values=torch.cat(batch["pixel_values"])).logits[
            :, -1
        ]
    plain = vqa.choice_logits(logits, session.letter_token_ids)
    assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_copies_of_an_image_are_computed_once(session, demo_rows):
    frame = demo_rows.train
    copies = frame[frame["pixel_hash"].duplicated(keep=False)]
    assert len(copies) >= 2
    fill(session, copies)
    assert len(session.vision_cache.shards) == copies["pixel_hash"].nunique()
    session.vision_cache.compute = None  # a second fill must have nothing to do
    assert fill(session, copies)


def forget(session):
    """The cache as a later process finds it: nothing known, the shards on disk."""
    session.vision_cache.shards.clear()


def test_a_later_process_reads_the_shards_and_finishes_what_is_missing(session, demo_rows):
    frame = demo_rows.train.head(10)
    budget = vqa.pixel_budget(session.config, session.processor)
    assert session.vision_cache.fill(frame, budget, session.progress, batch_size=4)
    keys = [(digest, *budget) for digest in frame["pixel_hash"]]
    whole = [session.vision_cache.read(key) for key in keys]
    lost = session.vision_cache.shards[keys[5]][0]
    lost.unlink()
    forget(session)
    computed, compute = [], session.vision_cache.compute
    session.vision_cache.compute = lambda pixels, grids: (
        computed.append(len(pixels)) or compute(pixels, grids)
    )
    assert session.vision_cache.fill(frame, budget, session.progress, batch_size=4)
    assert computed == [
        4
    ]  # the batch of the lost shard, whole, so that its features are the same bits
    again = [session.vision_cache.read(key) for key in keys]
    assert all(
        torch.equal(a, b)
        for one, two in zip(whole, again, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def test_a_damaged_shard_is_deleted_and_computed_again(session, demo_rows, caplog):
    frame = demo_rows.train.head(4)
    fill(session, frame)
    (path,) = session.vision_cache.folder.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    forget(session)
    fill(session, frame)
    assert "Vision features recomputed" in caplog.text
    assert vqa.file_sha256(path) == path.stem


def test_features_are_kept_in_memory_where_the_disk_is_small(session, demo_rows, monkeypatch):
    monkeypatch.setattr(vqa.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    frame = demo_rows.train.head(4)
    assert fill(session, frame)
    assert len(session.vision_cache.store) == 4 and not list(
        session.vision_cache.folder.glob("*.safetensors")
    )
    assert np.isfinite(vqa.predict_logits(session, frame, [vqa.TTAView("rotation 0")])).all()


def test_other_weights_or_settings_have_a_cache_of_their_own(session):
    before = session.vision_cache.identity()
    session.processor.image_processor.image_mean = [0.4] * 3
    settings = session.vision_cache.identity()
    with torch.no_grad():
        next(session.model.model.visual.parameters()).add_(1)
    assert len({before, settings, session.vision_cache.identity()}) == 3


def test_cache_is_skipped_where_disk_and_memory_are_short(session, demo_rows, monkeypatch, caplog):
    monkeypatch.setattr(vqa.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1000))
    assert not fill(session, demo_rows.train.head(4))
    assert not session.vision_cache.store and not session.vision_cache.shards
    assert "Vision cache skipped" in caplog.text


def test_overflowing_half_precision_features_are_recomputed_in_fp32_and_counted(session, demo_rows):
    visual = session.model.model.visual.to(torch.float16)
    with torch.no_grad():
        visual.merger.get_submodule(
            "linear_fc2" if hasattr(visual.merger, "linear_fc2") else "mlp.2"
        ).weight.mul_(1e6).clamp_(-6e4, 6e4)
    frame = demo_rows.train.head(2)
    try:
        fill(session, frame)
    except RuntimeError as error:  # a CPU without half-precision kernels
        pytest.skip(str(error))
    tensors = [
        tensor for key in session.vision_cache.shards for tensor in session.vision_cache.read(key)
    ]
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float16 for tensor in tensors)
    assert session.vision_cache.recomputed_in_fp32 == 2
    assert visual.dtype == torch.float16


def test_image_tokens_stay_within_the_budget_and_small_images_are_not_blown_up(
    session, demo_rows, replace
):
    area = vqa.merged_patch_area(session.processor)
    tight = replace(session.config, max_pixels=5 * area)
    for row in demo_rows.train.head(20).itertuples():
        for config in (session.config, tight):
            budget = vqa.pixel_budget(config, session.processor)
            pixels, grid = vqa.prepare_image(
                vqa.load_image(row.image_path), session.processor, budget
            )
            assert grid == vqa.image_grid(row.width, row.height, session.processor, budget)
            tokens = len(pixels) // 4
            assert tokens <= budget[1] // area
            assert tokens <= 1.5 * row.width * row.height / area + 1
    square = replace(session.config, image_size=64)
    assert vqa.pixel_budget(square, session.processor)[1] == 64 * 64


def test_the_cache_is_left_out_where_it_saves_little_time(session, demo_rows, monkeypatch, caplog):
    session.device = torch.device("cuda")  # the question arises on a GPU only
    caplog.set_level("INFO")
    for gain, decision, images in ((0.1, "off", 0), (0.5, "on", 4)):
        monkeypatch.setattr(vqa, "vision_cache_gain", lambda *_, gain=gain: gain)
        vqa.fill_vision_cache(session, demo_rows.train.head(4), uses=9, passes=3)
        assert (
            f"vision cache {decision}" in caplog.text and len(session.vision_cache.shards) == images
        )


def test_the_gain_of_the_cache_is_nothing_for_images_that_are_used_once(session, demo_rows):
    fill(session, demo_rows.train.head(9))  # the rows to be timed are others
    gains = [vqa.vision_cache_gain(session, demo_rows.train, uses, passes=1) for uses in (1, 10**6)]
    assert gains[0] == 0 < gains[1] < 1
