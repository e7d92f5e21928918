"""Part 2, Augmentation: mildly changed images, each a function of seed, number and image."""

import colorsys

import numpy as np
from PIL import Image

import vqa_helpers as vqa


def test_a_changed_image_is_a_function_of_seed_number_and_image(demo_rows):
    frame = demo_rows.train.head(30)
    once = vqa.image_variants(frame, 2, 42)
    again = vqa.image_variants(frame, 2, 42)
    other = vqa.image_variants(frame, 2, 43)
    assert once.equals(again)
    assert len(once) == 90
    assert once["variant"].tolist() == [0] * 30 + [1] * 30 + [2] * 30
    assert once.head(30).drop(columns="variant").equals(frame)
    assert (once["pixel_hash"][30:] != other["pixel_hash"][30:]).all()
    recipes = once["image_path"][30:].str.split("<variant>").str[1]
    assert recipes.nunique() == 2 * frame["pixel_hash"].nunique()
    fewer = vqa.image_variants(frame.iloc[5:9], 1, 42)  # whatever other rows there are
    assert fewer["image_path"][4:].tolist() == once["image_path"][35:39].tolist()
    for _, row in once.iloc[[0, 40, 70]].iterrows():
        image = vqa.load_image(row["image_path"])
        assert image.size == (row["width"], row["height"])
        assert image.tobytes() == vqa.load_image(row["image_path"]).tobytes()


def test_images_with_text_to_read_are_not_cropped_and_others_little(demo_rows):
    changed = vqa.image_variants(demo_rows.train, 1, 42)
    before = changed.query("variant == 0")
    after = changed.query("variant == 1").reset_index(drop=True)
    shares = np.minimum(after["width"] / before["width"], after["height"] / before["height"])
    read = set(before.query("type == 'ocr'")["pixel_hash"])
    is_read = before["pixel_hash"].isin(read).to_numpy()
    assert 10 < is_read.sum() < len(before)
    assert (shares[is_read] == 1).all()
    assert (shares >= 0.94).all()  # 95 %, and a pixel of rounding
    assert (shares[~is_read] < 1).mean() > 0.3


COLOURS = [
    (230, 30, 30),
    (240, 140, 20),
    (30, 160, 60),
    (40, 80, 220),
    (150, 60, 180),
    (250, 230, 40),
]


def hue(colour):
    """Between 0 and 1."""
    red, green, blue = np.array(colour) / 255
    return colorsys.rgb_to_hsv(red, green, blue)[0]


def hue_distance(first, second):
    """Between 0 and 0.5, half of the colour circle."""
    return abs((hue(second) - hue(first) + 0.5) % 1 - 0.5)


def mean_colour(image):
    return np.array(image).reshape(-1, 3).mean(axis=0)


def test_a_change_keeps_every_hue_and_the_picture_upright():
    image = Image.new("RGB", (60, 20))
    for number, colour in enumerate(COLOURS):
        image.paste(colour, (10 * number, 0, 10 * number + 10, 20))
    for number in range(20):
        change = vqa.draw_image_change(np.random.default_rng(number), 60, 20, may_crop=False)
        changed = vqa.apply_image_change(image, change)
        assert changed.size == image.size
        assert changed.tobytes() != image.tobytes()
        for place, colour in enumerate(COLOURS):
            left = 10 * place
            centre = mean_colour(changed.crop((left + 2, 2, left + 8, 18)))
            assert hue_distance(colour, centre) < 0.015, (colour, centre)  # 5 degrees
            assert np.abs(centre - colour).max() < 60
