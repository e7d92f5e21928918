"""Part 3, Image tokens, Vision cache and Filling the vision cache.

Cached features give the numbers of the uncached path, and are computed once per content.
"""

import threading
import types
from collections import Counter

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from references import use_huggingfaces_forward
from running import ONE_VIEW, plain_batch, quiet

import vqa_helpers as vqa


@pytest.fixture
def session(session, tmp_path):
    """A session of each family with a cache folder of its own."""
    session.vision_cache.folder = tmp_path / "features"
    return session


def budget_of(session):
    return vqa.pixel_budget(session.config, session.processor)


def fill(session, frame, **options):
    return session.vision_cache.fill(frame, budget_of(session), session.progress, **options)


# --- Image tokens ---------------------------------------------------------------------------------


def test_image_tokens_stay_within_the_budget_and_small_images_are_not_blown_up(
    session, demo_rows, replace
):
    area = vqa.merged_patch_area(session.processor)
    tight = replace(session.config, max_pixels=5 * area)
    for row in demo_rows.train.head(20).itertuples():
        for config in (session.config, tight):
            budget = vqa.pixel_budget(config, session.processor)
            image = vqa.load_image(row.image_path)
            pixels, grid = vqa.prepare_image(image, session.processor, budget)
            assert grid == vqa.image_grid(row.width, row.height, session.processor, budget)
            tokens = len(pixels) // 4
            assert tokens <= budget[1] // area
            assert tokens <= 1.5 * row.width * row.height / area + 1
    square = replace(session.config, image_size=64)
    assert vqa.pixel_budget(square, session.processor)[1] == 64 * 64


# --- The same numbers -----------------------------------------------------------------------------


def test_cached_scores_are_bitwise_the_uncached_ones(session, demo_rows):
    frame = demo_rows.train.head(6)
    uncached = vqa.predict_logits(session, frame, ONE_VIEW)
    assert not session.vision_cache.shards
    assert fill(session, frame)
    assert np.array_equal(vqa.predict_logits(session, frame, ONE_VIEW), uncached)


def test_features_equal_the_models_own_path(session, demo_rows):
    """The reference for mm_encoder_outputs is the plain call with pixel_values."""
    batch = plain_batch(session, demo_rows.train, range(2))
    inputs = {name: batch[name] for name in vqa.MODEL_INPUTS}
    pixels = torch.cat(batch["pixel_values"])
    with torch.no_grad():
        ours = vqa.answer_scores(session, vqa.answer_hidden_states(session, batch))
        use_huggingfaces_forward(session)
        logits = session.model(**inputs, pixel_values=pixels).logits
    plain = vqa.choice_logits(logits[:, -1], session.letter_token_ids)
    assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()


def features_of(session, prepared):
    """Features of images that `prepare_image` has prepared, in one batch."""
    pixels, grids = zip(*prepared, strict=True)
    return session.vision_cache.compute_features(pixels, grids)


@pytest.fixture
def prepared(session, demo_rows):
    """Images of three shapes, with whole and cut windows, in mixed order."""
    images = []
    for row, size in enumerate([(160, 96), (96, 96), (160, 96), (64, 224), (96, 96)]):
        image = vqa.load_image(demo_rows.train["image_path"].iloc[row]).resize(size)
        images.append(vqa.prepare_image(image, session.processor, (1024, 2**20)))
    return images


def test_segments_of_one_length_are_attended_together_as_transformers_does_one_by_one(
    session, prepared
):
    ours = features_of(session, prepared)
    use_huggingfaces_forward(session)
    for image, plain in zip(ours, features_of(session, prepared), strict=True):
        for layer, plain_layer in zip(image, plain, strict=True):
            assert torch.equal(layer, plain_layer)


@pytest.fixture
def calls(monkeypatch):
    """(segments, length) of each call of attention; filled as they come."""
    noted = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(query, *parts, **options):
        noted.append(tuple(query.shape[:3:2]))
        return attend(query, *parts, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return noted


def test_a_layer_calls_attention_once_for_each_length(session, prepared, calls):
    features_of(session, prepared)
    patches = Counter(int(np.prod(grid)) for _, grid in prepared)
    whole_images = {(count, length) for length, count in patches.items()}
    assert whole_images <= set(calls)
    lengths = {length for _, length in calls}
    assert len(calls) <= len(lengths) * session.model.config.vision_config.depth


def test_segments_are_found_once_and_not_in_every_layer(session, prepared, monkeypatch):
    found = []
    own = vqa.segment_tokens

    def noted(boundaries):
        found.append(own(boundaries))
        return found[-1]

    monkeypatch.setattr(vqa, "segment_tokens", noted)
    features_of(session, prepared)
    vision = session.model.config.vision_config
    assert len(found) == vision.depth
    kinds = 2 if hasattr(vision, "window_size") else 1  # windows, and whole images
    assert len({id(tokens) for tokens in found}) == kinds


def test_another_kind_of_attention_stays_as_transformers_has_it(session, prepared, calls):
    use_huggingfaces_forward(session)
    session.model.set_attn_implementation("eager")
    vqa.remove_gpu_syncs(session.model)
    features_of(session, prepared)
    assert not calls


def test_deterministic_attention_takes_one_segment_at_a_time(session, prepared, calls):
    use_huggingfaces_forward(session)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        vqa.remove_gpu_syncs(session.model)
    finally:
        torch.use_deterministic_algorithms(False)
    features_of(session, prepared)
    assert {segments for segments, _ in calls} == {1}


def test_a_gpu_embeds_patches_by_a_product_which_is_the_convolution(session, prepared, monkeypatch):
    tower = session.model.model.visual
    by_convolution = features_of(session, prepared)
    monkeypatch.setattr(type(tower), "device", torch.device("cuda"))
    vqa.use_fast_tower(tower)
    monkeypatch.setattr(tower.patch_embed.proj, "_conv_forward", None)
    by_product = features_of(session, prepared)
    for image, expected_image in zip(by_product, by_convolution, strict=True):
        for layer, expected in zip(image, expected_image, strict=True):
            assert torch.allclose(layer, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_a_gpus_tower_gives_the_features_of_transformers_own(session, prepared):
    ours = features_of(session, prepared)
    use_huggingfaces_forward(session)
    for image, plain in zip(ours, features_of(session, prepared), strict=True):
        for layer, plain_layer in zip(image, plain, strict=True):
            assert (layer - plain_layer).norm() <= 0.02 * plain_layer.norm()


def test_overflowing_half_precision_features_are_recomputed_in_fp32_and_counted(session, demo_rows):
    visual = session.model.model.visual.to(torch.float16)
    name_of_last_layer = "linear_fc2" if hasattr(visual.merger, "linear_fc2") else "mlp.2"
    last_layer = visual.merger.get_submodule(name_of_last_layer)
    with torch.no_grad():
        last_layer.weight.mul_(1e6).clamp_(-6e4, 6e4)
    frame = demo_rows.train.head(2)
    try:
        fill(session, frame)
    except RuntimeError as error:  # a CPU without half-precision kernels
        pytest.skip(str(error))
    for key in session.vision_cache.shards:
        for tensor in session.vision_cache.load(key):
            assert tensor.isfinite().all()
            assert tensor.dtype == torch.float16
    assert session.vision_cache.recomputed_in_fp32 == 2
    assert visual.dtype == torch.float16


def test_other_weights_or_settings_have_a_cache_of_their_own(session):
    before = session.vision_cache.folder_hash()
    session.processor.image_processor.image_mean = [0.4] * 3
    settings = session.vision_cache.folder_hash()
    with torch.no_grad():
        next(session.model.model.visual.parameters()).add_(1)
    assert len({before, settings, session.vision_cache.folder_hash()}) == 3


# --- Computed once --------------------------------------------------------------------------------


def test_copies_of_an_image_are_computed_once(session, demo_rows):
    frame = demo_rows.train
    copies = frame[frame["pixel_hash"].duplicated(keep=False)]
    assert len(copies) >= 2
    fill(session, copies)
    assert len(session.vision_cache.shards) == copies["pixel_hash"].nunique()
    session.vision_cache.compute_features = None  # a second fill must have nothing to do
    assert fill(session, copies)


def forget(session):
    """The cache as a later process finds it: nothing known, the shards on disk."""
    session.vision_cache.shards.clear()


def test_a_later_process_reads_the_shards_and_finishes_what_is_missing(session, demo_rows):
    frame = demo_rows.train.head(10)
    cache = session.vision_cache
    assert fill(session, frame, batch_size=4)
    keys = [(digest, *budget_of(session)) for digest in frame["pixel_hash"]]
    whole = [cache.load(key) for key in keys]
    lost = cache.shards[keys[5]]
    lost.path.unlink()
    forget(session)
    computed = []
    compute = cache.compute_features

    def counted(pixels, grids):
        computed.append(len(pixels))
        return compute(pixels, grids)

    cache.compute_features = counted
    assert fill(session, frame, batch_size=4)
    assert computed == [4]  # the lost shard's batch, whole: its features are the same bits
    again = [cache.load(key) for key in keys]
    for features, same_features in zip(whole, again, strict=True):
        for tensor, same_tensor in zip(features, same_features, strict=True):
            assert torch.equal(tensor, same_tensor)


def test_features_are_stored_while_the_next_ones_are_computed(session, demo_rows, monkeypatch):
    cache = session.vision_cache
    is_at_the_next = threading.Event()
    store = cache.add
    compute = cache.compute_features
    batches = []
    waited = []

    def computed(pixels, grids):
        batches.append(len(grids))
        if len(batches) == 2:
            is_at_the_next.set()
        return compute(pixels, grids)

    def stored(*arguments):
        waited.append(is_at_the_next.wait(timeout=20))
        return store(*arguments)

    monkeypatch.setattr(cache, "compute_features", computed)
    monkeypatch.setattr(cache, "add", stored)
    assert fill(session, demo_rows.train.head(10), batch_size=4)
    assert waited == [True] * len(batches)
    assert len(cache.shards) == demo_rows.train.head(10)["pixel_hash"].nunique()


@pytest.mark.parametrize("failing", [1, 3])  # in between, and the last one
def test_features_that_cannot_be_stored_end_the_filling(session, demo_rows, monkeypatch, failing):
    cache = session.vision_cache
    store = cache.add
    calls = []

    def stored(*arguments):
        calls.append(arguments)
        if len(calls) == failing:
            raise vqa.CheckpointError("disk full")
        return store(*arguments)

    monkeypatch.setattr(cache, "add", stored)
    with pytest.raises(vqa.CheckpointError, match="disk full"):
        fill(session, demo_rows.train.head(12), batch_size=4)
    assert len(calls) == failing


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_no_features_are_stored_behind_some_that_found_no_room(
    session, demo_rows, monkeypatch, failing
):
    cache = session.vision_cache
    store = cache.add
    calls = []

    def stored(*arguments):
        calls.append(arguments)
        return len(calls) < failing and store(*arguments)

    monkeypatch.setattr(cache, "add", stored)
    assert not fill(session, demo_rows.train.head(12), batch_size=4)
    assert len(calls) == failing


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


# --- Where there is room, and where it pays -------------------------------------------------------


def test_features_are_kept_in_memory_where_the_disk_is_small(session, demo_rows, monkeypatch):
    monkeypatch.setattr(vqa.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    frame = demo_rows.train.head(4)
    assert fill(session, frame)
    assert len(session.vision_cache.features_in_memory) == 4
    assert not list(session.vision_cache.folder.glob("*.safetensors"))
    assert np.isfinite(vqa.predict_logits(session, frame, ONE_VIEW)).all()


def test_cache_is_skipped_where_disk_and_memory_are_short(session, demo_rows, monkeypatch, caplog):
    monkeypatch.setattr(vqa.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1000))
    assert not fill(session, demo_rows.train.head(4))
    assert not session.vision_cache.features_in_memory
    assert not session.vision_cache.shards
    assert "Vision cache skipped" in caplog.text


def test_the_cache_is_left_out_where_it_saves_little_time(session, demo_rows, monkeypatch, caplog):
    session.device = torch.device("cuda")  # the question arises on a GPU only
    caplog.set_level("INFO")
    for gain, decision, images in ((0.1, "off", 0), (0.5, "on", 4)):
        monkeypatch.setattr(vqa, "vision_cache_gain", lambda *_, gain=gain: gain)
        vqa.fill_vision_cache(session, demo_rows.train.head(4), uses=9, passes=3)
        assert f"vision cache {decision}" in caplog.text
        assert len(session.vision_cache.shards) == images


def test_the_gain_of_the_cache_is_nothing_for_images_that_are_used_once(session, demo_rows):
    fill(session, demo_rows.train.head(9))  # the rows to be timed are others
    assert vqa.vision_cache_gain(session, demo_rows.train, uses=1, passes=1) == 0
    assert 0 < vqa.vision_cache_gain(session, demo_rows.train, uses=10**6, passes=1) < 1


def test_variants_leave_the_features_of_the_original_as_they_are(
    session, demo_rows, tmp_path, monkeypatch
):
    frame = demo_rows.train.head(20)
    budget = budget_of(session)
    batches = []
    prepare = vqa.VisionCache.prepare

    def noting(self, paths, *arguments):
        batches.append(paths)
        return prepare(self, paths, *arguments)

    monkeypatch.setattr(vqa.VisionCache, "prepare", noting)
    plain = vqa.VisionCache(session.model, session.processor, str(tmp_path / "plain"))
    assert plain.fill(frame, budget, quiet)
    alone = len(batches)
    varied = vqa.VisionCache(session.model, session.processor, str(tmp_path / "varied"))
    assert varied.fill(vqa.image_variants(frame, 1, 42), budget, quiet)
    # In the same company: the last bits of its features may depend on that.
    originals = [batch for batch in batches[alone:] if "<variant>" not in "".join(batch)]
    assert originals == batches[:alone]
    assert batches[alone : 2 * alone] == originals
    for digest in frame["pixel_hash"]:
        features = plain.load((digest, *budget))
        same_features = varied.load((digest, *budget))
        for tensor, same_tensor in zip(features, same_features, strict=True):
            assert tensor.equal(same_tensor)
    assert len(varied.shards) == 2 * len(plain.shards)


# --- Where it lies, and how to delete it ----------------------------------------------------------


FOREIGN_FILES = [
    "0123456789abcdef/mine.safetensors",
    "notes.txt",
    f"photos/{'c' * 64}.safetensors",
]


@pytest.fixture
def two_caches(tmp_path, demo_config, replace):
    """A config with two towers' caches of a MiB each, and files of somebody else between them."""
    place = tmp_path / "features"
    for tower in ("0123456789abcdef", "fedcba9876543210"):
        folder = place / tower
        folder.mkdir(parents=True)
        (folder / f"{'a' * 64}.safetensors").write_bytes(bytes(2**20))
        (folder / "lock").touch()
    (place / "fedcba9876543210" / f".{'b' * 64}.safetensors.7.tmp").write_bytes(b"half")
    for name in FOREIGN_FILES:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("mine")
    return replace(demo_config, cache_dir=str(place))


def test_the_cache_says_where_it_lies_and_how_large_it_is(two_caches, replace, tmp_path):
    place = two_caches.cache_dir
    text = f"vision cache: {place}, 0.00 GiB in 5 files"
    assert vqa.describe_vision_cache(two_caches) == text
    empty = replace(two_caches, cache_dir=str(tmp_path / "nowhere"))
    assert vqa.describe_vision_cache(empty).endswith("nowhere, 0.00 GiB in 0 files")
    usual = vqa.describe_vision_cache(replace(two_caches, cache_dir=None))
    assert f"vision cache: {vqa.tempfile.gettempdir()}/vqa_features_" in usual


def test_deleting_the_cache_leaves_what_is_not_its_own(two_caches):
    place = vqa.Path(two_caches.cache_dir)
    assert vqa.delete_vision_cache(two_caches) == f"deleted 0.00 GiB in 5 files in {place}"
    left = sorted(path.relative_to(place).as_posix() for path in place.rglob("*.*"))
    assert left == FOREIGN_FILES
    assert not (place / "fedcba9876543210").exists()
    assert vqa.delete_vision_cache(two_caches).startswith("deleted 0.00 GiB in 0 files")


def test_a_cache_that_a_worker_fills_is_not_deleted(two_caches):
    folder = vqa.Path(two_caches.cache_dir) / "0123456789abcdef"
    with (
        vqa.filelock.FileLock(folder / "lock", is_singleton=False),
        pytest.raises(vqa.CheckpointError, match="0123456789abcdef: a worker fills this vision"),
    ):
        vqa.delete_vision_cache(two_caches)
    assert (folder / f"{'a' * 64}.safetensors").exists()


def test_a_filled_cache_is_logged_with_its_place_and_deleted_whole(
    session, demo_rows, tmp_path, caplog, replace
):
    cache = vqa.VisionCache(session.model, session.processor, str(tmp_path / "features"))
    budget = vqa.pixel_budget(session.config, session.processor)
    vqa.LOGGER.setLevel("INFO")
    assert cache.fill(demo_rows.test.head(2), budget, quiet)
    assert f"Vision cache: {cache.folder}, 0.00 GiB in 1 files; 0 images in memory" in caplog.text
    config = replace(session.config, cache_dir=str(tmp_path / "features"))
    vqa.delete_vision_cache(config)
    assert list((tmp_path / "features").iterdir()) == []


def test_only_prompts_of_images_without_features_are_made_for_the_gain(
    session, demo_rows, monkeypatch
):
    """Of a large table whose images are nearly all known."""
    frame = pd.concat([demo_rows.train.head(4)] * 50 + [demo_rows.train.tail(1)])
    fill(session, demo_rows.train.head(4))
    made = []
    make_prompt = vqa.make_prompt

    def counted(session, frame, row, orders):
        made.append(row)
        return make_prompt(session, frame, row, orders)

    monkeypatch.setattr(vqa, "make_prompt", counted)
    assert 0 < vqa.vision_cache_gain(session, frame, uses=10**6, passes=1) < 1
    assert made == [200]
