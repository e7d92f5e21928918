"""Part 3, Tiles: InternVL's images reach the model as its own processor cuts them."""

import json
import shutil

import numpy as np
import pytest
import torch
from competition_folder import picture
from references import use_huggingfaces_forward
from running import ONE_VIEW, ROTATIONS, plain_batch, plain_prompts
from test_3_scores_and_loss import Waits
from twins import TWINS, build_twin

import vqa_helpers as vqa

TILE = 64 * 64  # pixels of one tile of the twin


@pytest.fixture
def config(model_folders):
    return vqa.Config.preset("demo", model_id=str(model_folders["internvl"]))


@pytest.fixture
def processor(config):
    return vqa.load_processor(config)


@pytest.fixture
def session(config, demo_rows, tmp_path):
    opened = vqa.open_session(config, demo_rows.train.iloc[0])
    opened.vision_cache.folder = tmp_path / "features"
    return opened


# --- Tokens and pixels ----------------------------------------------------------------------------

BUDGETS = [1, 3, 4, 9]  # tiles, the thumbnail counted
SIZES = [(64, 64), (128, 64), (40, 130), (280, 200), (200, 190), (3000, 2), (1, 1)]


@pytest.mark.parametrize("tiles", BUDGETS)
def test_tokens_and_pixels_are_those_of_internvls_own_processor(processor, tiles, replace, config):
    budget = vqa.pixel_budget(replace(config, max_pixels=tiles * TILE), processor)
    most = {1: 1, 3: 2, 4: 3, 9: 4}[tiles]  # without the thumbnail; the processor takes up to 4
    row = {"image_path": "", "question": "How many dogs?"} | dict.fromkeys("abcd", "1")
    messages = vqa.build_messages(row)
    text = vqa.render_prompt(processor, messages)
    grids = set()
    for size in SIZES:
        image = picture(1, size)
        own = processor(text=[text], images=[image], max_patches=most, return_tensors="pt")
        planned = vqa.image_grid(*size, processor, budget)
        pixels, grid = vqa.prepare_image(image, processor, budget)
        assert grid == planned
        assert torch.equal(pixels, own["pixel_values"])
        ids = vqa.encode_prompt(processor, messages, grid)
        assert ids.tolist() == own["input_ids"][0].tolist()
        assert vqa.grid_tokens(grid, processor) == (ids == processor.image_token_id).sum()
        assert vqa.grid_tokens(grid, processor) <= tiles * 4
        grids.add(grid)
    assert grids == {(count,) for count in (1, 3, 4, 5) if count <= min(tiles, 5)}


def test_the_least_pixels_ask_for_more_tiles_and_a_tile_is_never_cut(processor, replace, config):
    area = vqa.merged_patch_area(processor)
    assert area == TILE / 4
    assert vqa.pixel_budget(config, processor) == (4 * area, 768 * area)
    many = vqa.pixel_budget(replace(config, min_pixels=4 * TILE, max_pixels=9 * TILE), processor)
    few = vqa.pixel_budget(replace(config, max_pixels=100), processor)
    assert vqa.image_grid(64, 64, processor, many) == (5,)
    assert vqa.image_grid(200, 64, processor, few) == (1,)
    words = vqa.TILES.budget_in_words(processor, many)
    assert words == "an image takes at most 20 tokens, 5 tiles with the thumbnail"
    words = vqa.TILES.budget_in_words(processor, few)
    assert words == (
        "an image takes at most 4 tokens, 1 tile; max_pixels=1024 is less than a tile, 4096"
    )


def test_the_real_tiles_take_256_tokens_and_the_default_budget_three_of_them(processor, config):
    processor.image_processor.size = {"height": 448, "width": 448}
    processor.image_processor.max_patches = 12
    processor.image_seq_length = 256
    budget = vqa.pixel_budget(config, processor)
    assert budget == (4 * 784, 768 * 784)
    tokens = []
    for size in [(512, 512), (1000, 480), (300, 900)]:
        grid = vqa.image_grid(*size, processor, budget)
        tokens.append(vqa.grid_tokens(grid, processor))
    assert tokens == [256, 768, 768]
    large = vqa.pixel_budget(config, processor, scale=10)  # the processor takes 12 at most
    assert vqa.image_grid(2000, 1500, processor, large) == (13,)


def test_the_lengths_of_prompts_are_known_before_an_image_is_read(
    processor, config, demo_rows, replace
):
    few = replace(demo_rows, train=demo_rows.train.head(3), test=demo_rows.test.head(1))
    counted = vqa.prompt_lengths(config, processor, few)
    budget = vqa.pixel_budget(config, processor)
    for row in range(3):
        record = few.train.iloc[row]
        grid = vqa.image_grid(record["width"], record["height"], processor, budget)
        ids = vqa.encode_prompt(processor, vqa.build_messages(record), grid)
        assert counted["image"][row] == 20
        assert counted["tokens"][row] == len(ids)


def test_control_tokens_of_internvl_in_the_data_stay_text(processor):
    row = {"image_path": "", "question": "<IMG_CONTEXT><img>?"} | dict.fromkeys("abcd", "</img>")
    ids = vqa.encode_prompt(processor, vqa.build_messages(row), (1,)).tolist()
    tokens = (processor.start_image_token_id, *[processor.image_token_id] * 4)
    start = ids.index(tokens[0])
    assert tuple(ids[start : start + 5]) == tokens
    assert [ids.count(token) for token in processor.image_token_ids] == [4, 1, 1]


def test_scales_of_equal_tiles_are_one_view(session, demo_rows, replace):
    session.config = replace(session.config, max_pixels=3 * TILE)
    row = demo_rows.train.iloc[0]  # 96 x 96 pixels
    views = [vqa.TTAView("rotation 0")]
    views += [vqa.TTAView(f"scale {scale}", 0, scale) for scale in (1.3, 2.0)]
    groups = vqa.group_views_by_prompt(session, row, views)
    assert [[view.name for view in group] for group in groups] == [["rotation 0"], ["scale 2.0"]]


# --- The model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(0, 0), (0, 1, 2)])  # without padding, and with it
def test_the_forward_pass_is_huggingfaces_and_never_waits_for_the_gpu(session, demo_rows, rows):
    batch = plain_batch(session, demo_rows.train, rows)
    pixels = torch.cat(batch["pixel_values"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    batch["features"] = session.vision_cache.compute_for_batch(batch)
    with torch.no_grad(), Waits() as ours:
        states = vqa.answer_hidden_states(session, batch)
    use_huggingfaces_forward(session)
    with torch.no_grad(), Waits() as theirs:
        output = session.model.model(**inputs, pixel_values=pixels)
    assert theirs.found
    assert not ours.found
    assert torch.allclose(states, output.last_hidden_state[:, -1], rtol=1e-5, atol=1e-5)


def test_another_kind_of_attention_gets_no_mask_of_ours(session, demo_rows, replace):
    batch = plain_batch(session, demo_rows.train, (0, 0))
    states = vqa.answer_hidden_states(session, batch).detach()
    session.runtime = replace(session.runtime, attention="eager")
    session.model.set_attn_implementation("eager")
    eager = vqa.answer_hidden_states(session, batch)
    assert torch.allclose(states, eager, atol=1e-5)


def test_cached_scores_are_bitwise_the_uncached_ones_and_both_parts_rest(session, demo_rows):
    frame = demo_rows.train.head(6)
    uncached = vqa.predict_logits(session, frame, ONE_VIEW)
    cache = session.vision_cache
    assert not cache.shards
    vqa.fill_vision_cache(session, frame, uses=2, passes=1)
    key = (frame.iloc[0]["pixel_hash"], *vqa.pixel_budget(session.config, session.processor))
    (features,) = cache.load(key)
    assert features.shape == (5, 4, 64)  # tiles, tokens, hidden
    assert np.array_equal(vqa.predict_logits(session, frame, ONE_VIEW), uncached)

    moved = []
    for part in ("vision_tower", "multi_modal_projector"):
        module = session.model.get_submodule(f"model.{part}")
        module._apply = lambda change, part=part: moved.append(part)
    cache.offload_tower()
    assert moved == ["vision_tower", "multi_modal_projector"]


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector"])
def test_each_part_of_the_tower_names_the_cache_folder(session, part):
    before = session.vision_cache.folder_hash()
    with torch.no_grad():
        next(session.model.get_submodule(f"model.{part}").parameters()).add_(1)
    assert session.vision_cache.folder_hash() != before


def test_generation_takes_tiles(session, demo_rows):
    answers = vqa.generate_baseline(session, demo_rows.test.head(2))
    assert len(answers) == 2
    assert set(answers) <= {None, *"abcd"}


def test_an_image_of_another_size_than_planned_is_refused(session, demo_rows, replace):
    frame = demo_rows.train.assign(height=64, width=300)
    frame["image_path"] = demo_rows.train["image_path"].iloc[0]
    (prompt,) = plain_prompts(session, frame, [0])
    assert prompt.grid == (5,)
    session.config = replace(session.config, max_pixels=TILE)
    with pytest.raises(vqa.DataError, match=r"gives the grid \(5,\), not the planned \(1,\)"):
        vqa.collate(session, [replace(prompt, grid=(1,))])


def test_overflowing_features_are_recomputed_in_fp32(session, demo_rows):
    tower = vqa.vision_tower(session.model).to(torch.float16)
    with torch.no_grad():
        session.model.model.multi_modal_projector.linear_2.weight.mul_(1e6).clamp_(-6e4, 6e4)
    frame = demo_rows.train.head(2)
    budget = vqa.pixel_budget(session.config, session.processor)
    try:
        session.vision_cache.fill(frame, budget, session.progress)
    except RuntimeError as error:  # a CPU without half-precision kernels
        pytest.skip(str(error))
    assert session.vision_cache.recomputed_in_fp32 == 2
    for key in session.vision_cache.shards:
        (features,) = session.vision_cache.load(key)
        assert features.isfinite().all()
        assert features.dtype == torch.float16
    assert {weight.dtype for weight in tower.parameters()} == {torch.float16}


def test_a_processor_of_another_family_is_refused(model_folders, demo_rows, tmp_path):
    mixed = shutil.copytree(model_folders["qwen3_vl_moe"], tmp_path / "mixed")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_folders["internvl"] / name, mixed / name)
    config = vqa.Config.preset("demo", model_id=str(mixed))
    with pytest.raises(ValueError, match="of the family 'internvl' and a Qwen3VLProcessor, which"):
        vqa.open_session(config, demo_rows.train.iloc[0])


# --- Other models of the family -------------------------------------------------------------------


def test_internvl3_with_qwen2_scores_rotations_behind_one_prefix(
    demo_rows, replace, monkeypatch, tmp_path
):
    kind, _, vision = TWINS["internvl"]
    monkeypatch.setitem(TWINS, "internvl", (kind, {"model_type": "qwen2"}, vision))
    model_id = str(build_twin("internvl", tmp_path))
    session = vqa.open_session(vqa.Config.preset("demo", model_id=model_id), demo_rows.test.iloc[0])
    assert session.model.config.text_config.model_type == "qwen2"
    frame = demo_rows.test.head(3)
    together = vqa.predict_logits(session, frame, ROTATIONS)
    alone = [vqa.predict_logits(session, frame, [view]) for view in ROTATIONS]
    assert session.shares_prefixes
    assert np.allclose(together, np.concatenate(alone, axis=1), atol=1e-5)


REFUSED_TEXT_MODELS = {
    "llama": (
        {"model_type": "llama"},
        "has a language model of the kind 'llama'; of the family 'internvl' known are those with "
        "qwen2, qwen3",
    ),
    "sliding": (
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 128},
        "has layers that see only the last 128 tokens .* choose another model_id",
    ),
}


@pytest.mark.parametrize(
    ("change", "message"), REFUSED_TEXT_MODELS.values(), ids=REFUSED_TEXT_MODELS
)
def test_a_language_model_that_our_masks_do_not_suit_is_refused(
    change, message, model_folders, tmp_path
):
    settings = json.loads((model_folders["internvl"] / "config.json").read_text())
    settings["text_config"].update(change, use_sliding_window=True)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = vqa.Config.preset("demo", model_id=str(tmp_path))
    with pytest.raises(ValueError, match=f"^{tmp_path} {message}"):
        vqa.load_model(config, vqa.detect_runtime())


@pytest.mark.slow
def test_tower_and_projector_stay_in_16_bits(session, config, replace, four_bits_on_the_cpu):
    quantised = vqa.load_model(replace(config, quantization="4bit"), session.runtime)
    packed = set()
    for name, weight in quantised.named_parameters():
        if weight.dtype == torch.uint8:
            packed.add(name.split(".")[1])
    assert packed == {"language_model"}
    tower = [weight.dtype for weight in vqa.vision_tower(quantised).parameters()]
    assert set(tower) == {torch.float32}
