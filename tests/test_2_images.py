"""Part 2, Images: found where a path leads, decoded as a person sees them, or refused by name.

Some cases are data in cases/; what they mean is said in small_competition.py.
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from competition_folder import counted_fallbacks
from PIL import Image
from small_competition import (
    BASE,
    MEANT_IMAGE,
    NFC,
    NFD,
    Loads,
    Refused,
    case,
    encoded,
    random_image,
    read_cases,
    with_path,
    write,
)

import vqa_helpers as vqa

# --- Found ----------------------------------------------------------------------------------------

SECRET = {"../secret.png": MEANT_IMAGE}  # beside the data folder
OTHER_SPELLING = Loads({"image_found_under_other_spelling": 1}, size=(7, 5))
LEADS_OUT = {
    "upwards": "../secret.png",
    "down and upwards": "train/../../secret.png",
    "upwards with backslashes": "..\\secret.png",
    "absolute and upwards": "/../secret.png",
    "a drive without its top": "C:x.png",
    "a web address": "http://host/x.png",
    "a file address after a space": " file:///x.png",
    "data": "data:image/png;base64;AAAA",
}
# Absolute paths are another machine's: their ends are looked for here, and nothing is opened there.
ELSEWHERE = {
    "absolute": "/etc/passwd",
    "a drive": "C:\\x.png",
    "a network share": "//host/share/x.png",
}
LINKED = Loads({"image_found_through_a_link": 1}, size=(7, 5))


def nowhere(path):
    place = f"train.csv, line 2, column 'path', value {path!r}"
    return Refused(f"{place}: No such file: looked for it in ", "unusable_image in 1 of 1 rows")


def outside(path):
    place = f"train.csv, line 2, column 'path', value {path!r}"
    return Refused(f"{place}: is a URL or leads out of the data folder; copy it there")


PATHS = [
    *read_cases("paths"),
    case(
        "composed name, decomposed file",
        with_path(f"{NFC}.png") | {f"{NFD}.png": MEANT_IMAGE},
        OTHER_SPELLING,
    ),
    case(
        "decomposed name, composed file",
        with_path(f"{NFD}.png") | {f"train/{NFC}.png": MEANT_IMAGE},
        OTHER_SPELLING,
    ),
    case(
        "too long a name",
        with_path("x" * 300),
        Refused("train.csv, line 2, column 'path', value 'xxx", "unusable_image in 1 of 1"),
    ),
    *(case(title, with_path(path), nowhere(path)) for title, path in ELSEWHERE.items()),
    *(case(title, with_path(path) | SECRET, outside(path)) for title, path in LEADS_OUT.items()),
    case(
        "a link that leads out is the user's",
        with_path("link.png") | SECRET | {"link.png": Path("../secret.png")},
        LINKED,
    ),
    case(
        "a folder that leads out is the user's",
        with_path("folder/secret.png") | SECRET | {"folder": Path("..")},
        LINKED,
    ),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("changes", "outcome"), PATHS)
def test_an_image_is_found_where_its_path_leads_or_refused(tmp_path, changes, outcome):
    outcome.check(write(tmp_path / "data", changes))


# --- Unusable -------------------------------------------------------------------------------------


def bitmap_that_claims(width, height):
    """The bytes of a small bitmap whose header names another size."""
    content = bytearray(encoded(Image.new("1", (8, 8)), "BMP"))
    content[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    return bytes(content)


def strip(width):
    return encoded(Image.new("L", (width, 10)))


IMAGE = "train/1.png"
WEB_PAGE = b"<html>404</html>"
PLACE = "train.csv, line 2, column 'path', value 'train/1.png': "
NOT_READABLE = "not a readable image (UnidentifiedImageError"
DROPPED = Loads({"train_unusable_image": 1}, train={"id": ["r2"], "image_ok": [True]})
UNUSABLE = [
    case("a missing file is dropped and counted", {IMAGE: None}, DROPPED),
    case("an empty file is dropped and counted", {IMAGE: b""}, DROPPED),
    case("a web page is dropped and counted", {IMAGE: WEB_PAGE}, DROPPED),
    case("a truncated file is dropped and counted", {IMAGE: BASE[IMAGE][:-200]}, DROPPED),
    case("a folder is dropped and counted", {IMAGE: None, f"{IMAGE}/x": b""}, DROPPED),
    case("a link to itself is dropped and counted", {IMAGE: Path("1.png")}, DROPPED),
    case(
        "a test row without an image becomes grey",
        {"test/1.png": b"GIF89a"},
        Loads(
            {"test_unusable_image": 1},
            test={
                "id": ["t1", "t2"],
                "image_ok": [False, True],
                "width": [224, 16],
                "height": [224, 12],
            },
        ),
    ),
    case(
        "a missing file above the share",
        {IMAGE: None},
        Refused(
            PLACE,
            "No such file",
            "unusable_image in 1 of 2 rows",
            "raise max_fallback_share=0",
        ),
    ),
    case(
        "a web page above the share",
        {IMAGE: WEB_PAGE},
        Refused(PLACE, NOT_READABLE, "it is a web page: download the image again, or replace it"),
    ),
    case(
        "a format that starts an outside program",
        {IMAGE: encoded(random_image(1), "EPS")},
        Refused(PLACE, NOT_READABLE),
    ),
    case(
        "a decompression bomb is refused by its header",
        {IMAGE: bitmap_that_claims(20000, 20000)},
        Refused(PLACE, "DecompressionBombError", "400000000 pixels"),
    ),
    case(
        "a strip that no model takes",
        {IMAGE: strip(2010)},
        Refused(PLACE, "its sides (2010, 10) differ more than 200 to 1; crop it"),
    ),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("changes", "outcome"), UNUSABLE)
def test_an_unusable_image_is_dropped_and_counted_or_refused(tmp_path, changes, outcome):
    outcome.check(write(tmp_path / "data", changes))


def test_unusable_images_are_logged_by_line_and_stand_in_grey_in_the_test_rows(folder, caplog):
    for split in ("train", "test"):
        (folder.root / split / "1.png").write_text("<html>404</html>")
    loaded = folder.load(share=0.25)
    assert loaded.train["id"].tolist() == ["train_0", "train_2", "train_3"]
    assert loaded.train.index.tolist() == [0, 1, 2]
    assert loaded.test["image_path"][1] == vqa.GREY_IMAGE
    assert vqa.load_image(vqa.GREY_IMAGE).getcolors() == [(224 * 224, (128, 128, 128))]
    assert counted_fallbacks(loaded) == {"train_unusable_image": 1, "test_unusable_image": 1}
    assert "test.csv, lines [3]: " in caplog.text
    assert "unusable_image in 1 of 4 rows" in caplog.text
    with pytest.raises(
        vqa.DataError,
        match="train.csv, line 3, .*unusable_image in 1 of 4 rows; .*max_fallback_share",
    ):
        folder.load(share=0.24)


def test_the_error_of_the_loader_names_the_image(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(
        vqa.ImageError, match=r"page\.jpg: not a readable image \(UnidentifiedImageError.*replace"
    ):
        vqa.load_image(tmp_path / "page.jpg")
    assert issubclass(vqa.ImageError, vqa.DataError)


# --- Decoded --------------------------------------------------------------------------------------

BLACK = (0, 0, 0)
GREY = (128, 128, 128)
WHITE = (255, 255, 255)
RED = (255, 0, 0)
RAMP = np.array([[0, 128, 255]])
DARK = np.array([[0, 25700]], np.uint16)
WITH_NAN = np.array([[np.nan, 1]], np.float32)
ALIKE_BELOW_0 = np.full((1, 1), -5, np.float32)


def shown(title, content, *pixels):
    """The first training row's image of these bytes is seen as these pixels, row by row."""
    return case(title, {IMAGE: content}, Loads(pixels=list(pixels)))


def own_greys(title, content, *pixels):
    """The same, of greys whose range is none of the usual ones, which is counted."""
    counted = {"image_greys_scaled_to_their_own_range": 1}
    return case(title, {IMAGE: content}, Loads(counted, pixels=list(pixels)))


def pixel(mode, colour=0, **options):
    """A PNG of one pixel."""
    return encoded(Image.new(mode, (1, 1), colour), **options)


def array(values, kind="TIFF"):
    """A file of these brightnesses."""
    return encoded(Image.fromarray(values), kind)


def animation():
    first = Image.new("RGB", (1, 1), RED)
    second = Image.new("RGB", (1, 1), BLACK)
    return encoded(first, "GIF", save_all=True, append_images=[second])


def rotated():
    """A white image with one black corner, and the note of a camera that was held sideways."""
    image = Image.new("RGB", (2, 1), "white")
    image.putpixel((0, 0), BLACK)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    return encoded(image, exif=exif)


DECODED = [
    case("a long strip", {IMAGE: strip(2000)}, Loads(size=(2000, 10))),
    case(
        "a JPEG of 123 megapixels is bounded",
        {IMAGE: encoded(Image.new("L", (12300, 10000)), "JPEG")},
        Loads(train={"width": [4096, 16], "height": [3330, 12]}),
    ),
    case(
        "camera rotation is applied",
        {IMAGE: rotated()},
        Loads(size=(1, 2), pixels=[BLACK, WHITE]),
    ),
    shown("one pixel", pixel("RGB", RED), RED),
    shown("CMYK", encoded(Image.new("CMYK", (1, 1), (0, 0, 0, 255)), "TIFF"), BLACK),
    shown("CMYK JPEG", encoded(Image.new("CMYK", (1, 1)), "JPEG"), WHITE),
    shown("one bit", pixel("1", 1), WHITE),
    shown("clear pixels lie on white", pixel("RGBA", (255, 0, 0, 0)), WHITE),
    shown("half clear black lies on white", pixel("LA", (0, 128)), (127, 127, 127)),
    shown("palette", encoded(Image.new("RGB", (1, 1), RED).quantize(2)), RED),
    shown("palette with a clear colour", pixel("P", transparency=0), WHITE),
    shown("a clear colour", pixel("RGB", (9, 8, 7), transparency=(9, 8, 7)), WHITE),
    shown("16-bit grey", array((RAMP * 257).astype(np.uint16), "PNG"), BLACK, GREY, WHITE),
    shown("dark 16-bit grey stays dark", array(DARK, "PNG"), BLACK, (100, 100, 100)),
    shown("8 bits in 32", array(RAMP.astype(np.int32)), BLACK, GREY, WHITE),
    shown("16 bits in 32", array((RAMP * 257).astype(np.int32)), BLACK, GREY, WHITE),
    shown("floats up to 1", array((RAMP / 255).astype(np.float32)), BLACK, GREY, WHITE),
    own_greys("floats below 0", array((RAMP - 300).astype(np.float32)), BLACK, GREY, WHITE),
    shown("floats with NaN", array(WITH_NAN), BLACK, WHITE),
    own_greys("equal floats below 0", array(ALIKE_BELOW_0), BLACK),
    shown("the first frame of an animation", animation(), RED),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("changes", "outcome"), DECODED)
def test_an_image_is_decoded_as_a_person_sees_it(tmp_path, changes, outcome):
    outcome.check(write(tmp_path / "data", changes))


@pytest.mark.parametrize(
    ("size", "suffix", "expected"),
    [
        ((300, 60), "jpg", (100, 20)),
        ((300, 60), "png", (100, 20)),
        ((3000, 1), "jpg", (100, 1)),
        ((5, 5), "png", (5, 5)),
    ],
)
def test_a_large_image_is_bounded_and_a_small_one_left_alone(tmp_path, size, suffix, expected):
    Image.new("RGB", size).save(tmp_path / f"x.{suffix}")
    assert vqa.load_image(tmp_path / f"x.{suffix}", max_side=100).size == expected


def test_a_huge_jpeg_is_shrunk_while_it_is_decoded(tmp_path, monkeypatch):
    Image.new("RGB", (800, 400)).save(tmp_path / "x.jpg")
    decoded = []
    convert = Image.Image.convert

    def noting(image, mode):
        decoded.append(image.size)
        return convert(image, mode)

    monkeypatch.setattr(Image.Image, "convert", noting)
    assert vqa.load_image(tmp_path / "x.jpg", max_side=200).size == (200, 100)
    assert decoded == [(200, 100)]


# --- Known images ---------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """Names of the image files that are decoded."""
    names = []
    decode = vqa._decode_image

    def note(path, max_side):
        names.append(Path(path).name)
        return decode(path, max_side)

    monkeypatch.setattr(vqa, "_decode_image", note)
    return names


@pytest.fixture
def known_folder(tmp_path, monkeypatch):
    """(paths of two images, the file of their facts); what was written just now counts."""
    monkeypatch.setattr(vqa, "SETTLED_SECONDS", 0)
    for number in (0, 1):
        Image.new("RGB", (8, 8 + number), (9, 9, 200)).save(tmp_path / f"{number}.png")
    return [str(tmp_path / f"{number}.png") for number in (0, 1)], tmp_path / "facts.json"


def facts_of(paths, file):
    return vqa.facts_of_images(dict.fromkeys(paths, ""), file)


def test_an_image_is_decoded_once_while_its_file_stays_as_it_is(known_folder, decoded):
    paths, file = known_folder
    first = facts_of(paths, file)
    assert sorted(decoded) == ["0.png", "1.png"]
    assert facts_of(paths, file) == first == [vqa._image_facts(path) for path in paths]
    decoded.clear()
    Image.new("RGB", (8, 8), (200, 9, 9)).save(paths[0])  # of the same size in bytes, or nearly
    changed, same = facts_of(paths, file)
    assert decoded == ["0.png"]
    assert (changed["pixel_hash"] != first[0]["pixel_hash"], same) == (True, first[1])


def test_what_cannot_be_used_or_was_written_just_now_is_not_kept(
    known_folder, decoded, monkeypatch
):
    paths, file = known_folder
    Path(paths[0]).write_bytes(b"no image")
    for _ in range(2):
        broken, usable = facts_of(paths, file)
        assert (broken["image_ok"], usable["image_ok"]) == (False, True)
    assert sorted(decoded) == ["0.png", "0.png", "1.png"]  # side by side: in any order
    monkeypatch.setattr(vqa, "SETTLED_SECONDS", 60)
    facts_of(paths[1:], file)
    assert decoded[3:] == ["1.png"]
    # A path that is known to lead nowhere is not looked for.
    (missing,) = vqa.facts_of_images({paths[1]: "it is named in no table"}, file)
    assert (missing["problem"], len(decoded)) == ("it is named in no table", 4)


@pytest.mark.parametrize("content", ["{", "[]", '{"decoder": "", "images": 1}', None])
def test_damaged_facts_and_those_of_another_version_are_not_used(
    known_folder, decoded, content, monkeypatch, caplog
):
    paths, file = known_folder
    first = facts_of(paths, file)
    if content is None:
        monkeypatch.setattr(vqa, "_readable_formats", lambda: ["PNG"])
    else:
        file.write_text(content)
    assert facts_of(paths, file) == first
    assert len(decoded) == 4
    assert ("All images are decoded" in caplog.text) == (content is not None)


def test_facts_of_another_pillow_than_the_loaded_one_are_not_used(
    known_folder, decoded, monkeypatch
):
    facts_of(*known_folder)
    monkeypatch.setattr(Image, "__version__", "10.3.0")
    facts_of(*known_folder)
    assert len(decoded) == 4


@pytest.mark.parametrize("fault", ["it is a folder", "nobody may even ask for it"])
def test_facts_that_cannot_be_kept_are_no_error(known_folder, caplog, fault):
    paths, file = known_folder
    if fault == "it is a folder":
        file.mkdir()
    else:
        file = file.with_name("x" * 300)  # longer than the system allows
    assert [facts["image_ok"] for facts in facts_of(paths, file)] == [True, True]
    assert "The facts of images are not kept" in caplog.text


def test_a_folder_whose_name_is_not_utf8_has_facts_of_its_own():
    korean = Path(os.fsdecode("자료".encode("cp949")))  # as older archives are unpacked
    assert vqa._known_images_file(korean, "train") != vqa._known_images_file(korean, "test")


def test_tables_are_the_same_with_images_that_are_known(demo_rows, decoded):
    again = vqa.load_competition(demo_rows.data_dir, 0.05)
    assert decoded == []  # `demo_rows` has decoded them in this session
    assert again.fingerprint == demo_rows.fingerprint
    pd.testing.assert_frame_equal(again.train, demo_rows.train)
    pd.testing.assert_frame_equal(again.test, demo_rows.test)
