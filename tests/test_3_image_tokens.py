"""Part 3, Image tokens: every image keeps at least one token a side, within the budget."""

import numpy as np
import pytest
from competition_folder import picture

import vqa_helpers as vqa

TOKEN = 32 * 32  # pixels of one image token of the demo's model


@pytest.fixture(scope="module")
def processor():
    return vqa.load_processor(vqa.Config.preset("demo"))


STRIPS = {
    "3000 x 2": ((3000, 2), 1),
    "1 x 4000": ((1, 4000), 1),
    "2000 x 10": ((2000, 10), 1),
    "10 x 2000": ((10, 2000), 1),
    "1 x 1": ((1, 1), 1),
    "399 x 399": ((399, 399), 1),
    "3000 x 2 at four tokens": ((3000, 2), 4),
    "1 x 4000 at four tokens": ((1, 4000), 4),
    "900 x 9 at seven tokens": ((900, 9), 7),
}


@pytest.mark.parametrize(("size", "tokens"), STRIPS.values(), ids=STRIPS)
def test_a_strip_at_a_small_budget_keeps_a_token_a_side(processor, size, tokens):
    config = vqa.Config.preset("demo", max_pixels=tokens * TOKEN)
    budget = vqa.pixel_budget(config, processor)
    planned = vqa.image_grid(*size, processor, budget)
    values, grid = vqa.prepare_image(picture(1, size), processor, budget)
    _, rows, columns = grid
    assert grid == planned
    assert min(rows, columns) >= 2  # two patches are a token's side
    assert rows * columns <= 4 * tokens
    assert values.shape == (rows * columns, 2 * 3 * 16 * 16)
    assert np.isfinite(values.numpy()).all()


@pytest.mark.parametrize("size", [(640, 480), (48, 36), (33, 640), (1000, 31), (40, 40)])
def test_other_images_are_resized_as_the_package_does_it(processor, size):
    image = picture(2, size)
    budget = (4 * TOKEN, 64 * TOKEN)
    by_package = vqa._resize_by_vision_process(image, processor, budget)
    wanted = processor.image_processor(images=by_package, do_resize=False, return_tensors="pt")
    values, grid = vqa.prepare_image(image, processor, budget)
    assert grid == tuple(wanted["image_grid_thw"][0].tolist())
    assert np.array_equal(values.numpy(), wanted["pixel_values"].numpy())
