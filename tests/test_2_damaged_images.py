"""Part 2, Damaged images: what can be saved is used and counted, the rest is refused by name.

A photo of 64 x 48 pixels is damaged, and is then the first training row's image.
"""

import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from competition_folder import picture
from PIL import ExifTags, Image
from small_competition import BASE, Loads, Refused, case, encoded, write

import vqa_helpers as vqa

IMAGE = "train/1.png"
SIZE = (64, 48)
UPRIGHT = (48, 64)  # of a photo whose camera was held sideways
PHOTO = picture(5, SIZE)
JPEG = encoded(PHOTO, "JPEG")
PNG = encoded(PHOTO)
LARGE = picture(6, (480, 360))
CUT_OFF = "image_cut_off_but_used"
LEFT_OUT = "image_without_its_damaged_blocks"
NOT_ROTATED = "image_rotation_not_readable"


def load(content, tmp_path, **options):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    return vqa.load_image(path, **options)


# --- Blocks beside the picture --------------------------------------------------------------------


def tiff(*entries, behind=b""):
    """An EXIF block: of each entry its tag, kind, count and value."""
    packed = [struct.pack("<HHII", *entry) for entry in entries]
    return b"II*\0" + struct.pack("<IH", 8, len(packed)) + b"".join(packed) + bytes(4) + behind


SIDEWAYS = tiff((ExifTags.Base.Orientation, 3, 1, 6))
PREVIEW = encoded(PHOTO.resize((16, 12)), "JPEG")


def segment(marker, payload, longer=0):
    """A segment of a JPEG, which claims to be longer than it is."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2 + longer) + payload


def jpeg_with(*segments):
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


def block(name, payload, checksum=None, longer=0):
    """A block of a PNG; one of its own checksum or length where it is damaged."""
    if checksum is None:
        checksum = zlib.crc32(name + payload)
    length = struct.pack(">I", len(payload) + longer)
    return length + name + payload + struct.pack(">I", checksum)


def png_with(*blocks):
    """The blocks stand behind the header."""
    return PNG[:33] + b"".join(blocks) + PNG[33:]


EXIF = segment(0xE1, b"Exif\0\0" + SIDEWAYS)
OVERLONG_EXIF = b"Exif\0\0" + SIDEWAYS + PREVIEW
PROFILE = b"ICC_PROFILE\0\1\1" + bytes(50)
BOMB = zlib.compress(bytes(2 * 2**20))
DAMAGED_TEXT = block(b"tEXt", b"k\0v", checksum=1)
WEBP = encoded(PHOTO, "WEBP", exif=b"Exif\0\0no TIFF file")


def repaired(title, content, *kinds, size=SIZE):
    return case(title, {IMAGE: content}, Loads(dict.fromkeys(kinds, 1), size=size))


BLOCKS = [
    repaired("EXIF", jpeg_with(EXIF), size=UPRIGHT),
    repaired(
        "EXIF longer than it is",
        jpeg_with(segment(0xE1, OVERLONG_EXIF, longer=20)),
        LEFT_OUT,
        NOT_ROTATED,
    ),
    repaired(
        "EXIF longer than the file",
        jpeg_with(segment(0xE1, OVERLONG_EXIF, longer=50000)),
        LEFT_OUT,
        NOT_ROTATED,
    ),
    repaired(
        "EXIF shorter than it is",
        jpeg_with(segment(0xE1, OVERLONG_EXIF, longer=-20)),
        LEFT_OUT,
        NOT_ROTATED,
    ),
    repaired(
        "profile longer than the file, EXIF sound",
        jpeg_with(EXIF, segment(0xE2, PROFILE, longer=50000)),
        LEFT_OUT,
        size=UPRIGHT,
    ),
    repaired(
        "bytes of padding before a comment longer than it is",
        jpeg_with(b"\xff\xff", segment(0xFE, b"hi", longer=22)),
        LEFT_OUT,
    ),
    repaired("comment longer than it is", jpeg_with(segment(0xFE, b"hi", longer=22)), LEFT_OUT),
    repaired("WebP whose EXIF is none", WEBP, NOT_ROTATED),
    repaired("large compressed text", png_with(block(b"zTXt", b"k\0\0" + BOMB)), LEFT_OUT),
    repaired("large international text", png_with(block(b"iTXt", b"k\0\1\0\0\0" + BOMB)), LEFT_OUT),
    repaired("large profile", png_with(block(b"iCCP", b"k\0\0" + BOMB)), LEFT_OUT),
    repaired("profile without a name", png_with(block(b"iCCP", b"kkk")), LEFT_OUT),
    repaired("profile packed in another way", png_with(block(b"iCCP", b"k\0\7" + BOMB)), LEFT_OUT),
    repaired("text with a wrong checksum", png_with(DAMAGED_TEXT), LEFT_OUT),
    repaired("text longer than the file", png_with(block(b"tEXt", b"k\0v", longer=9999)), LEFT_OUT),
    repaired("large text at the end", PNG[:-12] + block(b"zTXt", b"k\0\0" + BOMB), LEFT_OUT),
    repaired(
        "damaged text, EXIF sound",
        png_with(block(b"eXIf", SIDEWAYS), DAMAGED_TEXT),
        LEFT_OUT,
        size=UPRIGHT,
    ),
    repaired(
        "EXIF with a wrong checksum",
        png_with(block(b"eXIf", SIDEWAYS, checksum=1)),
        LEFT_OUT,
        NOT_ROTATED,
    ),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("changes", "outcome"), BLOCKS)
def test_a_damaged_block_beside_the_picture_does_not_cost_it(tmp_path, changes, outcome):
    outcome.check(write(tmp_path / "data", changes))


@pytest.mark.parametrize("longer", [20, 50000, -20])
def test_the_picture_and_not_its_preview_is_saved(tmp_path, longer):
    content = jpeg_with(segment(0xE1, OVERLONG_EXIF, longer=longer))
    assert load(content, tmp_path).tobytes() == load(JPEG, tmp_path).tobytes()


def test_a_png_without_its_blocks_has_the_same_pixels(tmp_path):
    palette = encoded(PHOTO.quantize(16), transparency=0)
    damaged = palette[:33] + DAMAGED_TEXT + palette[33:]
    assert load(damaged, tmp_path).tobytes() == load(palette, tmp_path).tobytes()


def test_damaged_pixels_of_a_png_are_no_picture(tmp_path):
    at = PNG.index(b"IDAT") + 20
    with pytest.raises(vqa.ImageError, match=r"photo\.jpg: not a readable image \(.*; replace"):
        load(PNG[:at] + b"????" + PNG[at + 4 :], tmp_path)


# --- Cut off --------------------------------------------------------------------------------------

KINDS = {
    "baseline": {},
    "every pixel its colour": {"subsampling": 0},
    "progressive": {"progressive": True},
    "with restart marks": {"restart_marker_rows": 1},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_jpeg_without_its_last_bytes_looks_nearly_the_same(tmp_path, mode, options):
    content = encoded(LARGE.convert(mode), "JPEG", **options)
    whole = np.asarray(load(content, tmp_path), dtype=int)
    for missing in (1, 2, 3, 40):
        cut = np.asarray(load(content[:-missing], tmp_path), dtype=int)
        assert cut.shape == whole.shape
        assert (np.abs(cut - whole).max(axis=2) > 16).mean() < 0.01


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("rows", [24, 320, 336, 352])
def test_the_share_that_decodes_is_measured(mode, rows):
    """The data of an image are cut where those of its first rows alone end."""
    image = LARGE.convert(mode)
    options = {"subsampling": 0, "qtables": "web_high"}
    header = encoded(image, "JPEG", **options)
    upper = encoded(image.crop((0, 0, 480, rows)), "JPEG", **options)
    data_of_upper = len(upper) - upper.rindex(b"\xff\xda")
    end = header.rindex(b"\xff\xda") + data_of_upper - 2
    _, share = vqa._decode_cut_jpeg(header[:end], 4096)
    assert share == pytest.approx(rows / 360, abs=0.01)


def test_above_nine_tenths_it_is_used_and_counted_below_it_is_refused_with_the_share(
    tmp_path, caplog
):
    content = encoded(LARGE, "JPEG")
    used = Loads({CUT_OFF: 1}, size=(480, 360))
    used.check(write(tmp_path / "used", {IMAGE: content[: -len(content) // 20]}))
    row = f"train.csv: {CUT_OFF} in 1 of 2 rows, for example line 2: {IMAGE!r} (9"
    assert row in caplog.text
    refused = Refused("train/1.png: cut off, only 87% of it can be decoded, 90% are needed")
    refused.check(write(tmp_path / "refused", {IMAGE: content[: -len(content) // 8]}))


# Scans of a progressive JPEG: all channels' mean, brightness 1-5, colour, colour, brightness 6-63,
# and then only refinements. The file ends so many bytes after the beginning of one.
SCANS = {
    "in the first": (0, 15, "0%"),
    "in the second": (1, 15, "2%"),
    "before the third": (2, -20, "4%"),
    "in the fifth": (4, 11, "70%"),
    "before the sixth": (5, -20, None),
    "in the sixth": (5, 15, None),
}


@pytest.mark.parametrize(("scan", "bytes_of_it", "share"), SCANS.values(), ids=SCANS)
def test_a_progressive_jpeg_needs_nearly_all_of_its_frequencies(tmp_path, scan, bytes_of_it, share):
    content = encoded(LARGE, "JPEG", progressive=True)
    starts = [at for at in range(len(content)) if content[at : at + 2] == b"\xff\xda"]
    assert len(starts) == 10
    cut = starts[scan] + bytes_of_it
    if share is None:
        assert load(content[:cut], tmp_path).size == (480, 360)
    else:
        with pytest.raises(vqa.ImageError, match=f"cut off, only {share} of it can be decoded"):
            load(content[:cut], tmp_path)


def test_what_is_missing_is_grey_and_a_grey_picture_is_not_missing(tmp_path):
    cut = load(encoded(LARGE, "JPEG")[:-400], tmp_path)
    assert cut.getpixel((479, 359)) == (128, 128, 128)
    grey = encoded(Image.new("RGB", (480, 360), (128, 128, 128)), "JPEG")
    assert load(grey[:-3], tmp_path).getcolors() == [(480 * 360, (128, 128, 128))]


def test_a_cut_photo_keeps_its_rotation_and_is_shrunk_while_it_is_decoded(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    content = encoded(LARGE, "JPEG", exif=exif)[:-40]
    assert load(content, tmp_path).size == (360, 480)
    assert load(content, tmp_path, max_side=60).size == (45, 60)


def test_many_threads_repair_at_once(tmp_path):
    """PIL's own switch for files that are cut off would hold for all threads."""
    for number in range(8):
        cut = 40 if number % 2 else 2000
        (tmp_path / f"{number}.jpg").write_bytes(encoded(LARGE, "JPEG")[:-cut])
    paths = [str(tmp_path / f"{number}.jpg") for number in range(8)] * 3
    with ThreadPoolExecutor(4) as pool:
        facts = list(pool.map(vqa._image_facts, paths))
    assert [fact["image_ok"] for fact in facts] == [False, True] * 12


# --- Formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000"])
def test_newer_formats_are_read_under_any_name(tmp_path, kind):
    vqa.Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    whole = np.asarray(PHOTO, dtype=int)
    shown = np.asarray(load(encoded(PHOTO, kind, quality=95), tmp_path), dtype=int)
    assert np.abs(shown - whole).mean() < 8


FORMATS = {
    "HEIC": (b"\0\0\0\x18ftypheic", "it is HEIC: pip install pillow-heif and start again"),
    "HEIC of another kind": (b"\0\0\0\x18ftypmif1", "it is HEIC: pip install pillow-heif"),
    "broken AVIF": (b"\0\0\0\x18ftypavif", 'it is AVIF: pip install "pillow>=11.3"'),
    "JPEG XL": (b"\xff\x0a", "it is JPEG XL: convert it with the package pillow-jxl-plugin"),
    "SVG": (b"<svg xmlns=''/>", "it is SVG: convert it with the package cairosvg"),
    "SVG with a header": (b"<?xml version='1.0'?>\n<svg/>", "it is SVG: convert"),
    "PDF": (b"%PDF-1.7", "it is PDF: convert it with the package pdf2image"),
    "Photoshop": (b"8BPS\0\1", "it is Photoshop's format: convert it with the package psd-tools"),
    "a raw file": (b"II*\0\x10\0\0\0CR\2", "it is a camera's raw file: convert it with the"),
    "a web page": (b"<!DOCTYPE html>\n<html>", "it is a web page: download the image again"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "something else": (b"????", "; replace the file"),
}


@pytest.mark.parametrize(("content", "remedy"), FORMATS.values(), ids=FORMATS)
def test_a_format_that_is_not_read_is_named_with_what_to_do(tmp_path, content, remedy):
    place = "train.csv, line 2, column 'path', value 'train/1.png': "
    refused = Refused(place, "not a readable image", remedy, "unusable_image in 1 of 2 rows")
    refused.check(write(tmp_path / "data", {IMAGE: content + bytes(30)}))


def test_an_empty_file_is_called_so(tmp_path):
    refused = Refused("not a readable image", "it is an empty file: download the image again")
    refused.check(write(tmp_path / "data", {IMAGE: b""}))


def test_a_link_that_leads_nowhere_is_called_so(tmp_path):
    root = write(tmp_path / "data", {IMAGE: None})
    (root / IMAGE).symlink_to("/nowhere/1.png")
    Refused("not a readable image", "a link leads nowhere; put the file there").check(root)


def test_formats_of_an_installed_package_are_registered(monkeypatch):
    """Of a stand-in for pillow-heif, which the tests do not need."""
    registered = []
    package = SimpleNamespace(
        register_heif_opener=lambda: registered.append("HEIF"),
        __spec__=SimpleNamespace(name="pillow_heif"),
    )
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN.get("PNG"))
    vqa._readable_formats.cache_clear()
    assert "HEIF" in vqa._readable_formats()
    assert registered == ["HEIF"]
    vqa._readable_formats.cache_clear()


# --- Greys ----------------------------------------------------------------------------------------

RANGES = {
    "floats a little above 1": ([0.0, 0.5, 1.02], [0, 128, 255], {}),
    "floats half above 1": ([0.0, 1.0, 1.5], [0, 255, 255], {}),
    "floats a little above 255": ([0.0, 128.0, 257.0], [0, 128, 255], {}),
    "floats of 8 bits": ([0.0, 128.0, 200.0], [0, 128, 200], {}),
    "floats beyond 16 bits": (
        [0.0, 50000.0, 100000.0],
        [0, 128, 255],
        {"image_greys_scaled_to_their_own_range": 1},
    ),
}


@pytest.mark.parametrize(("values", "shown", "counted"), RANGES.values(), ids=RANGES)
def test_the_range_of_floats_is_decided_from_the_data(tmp_path, values, shown, counted):
    content = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
    outcome = Loads(counted, pixels=[(grey, grey, grey) for grey in shown])
    outcome.check(write(tmp_path / "data", {IMAGE: content}))


def test_sound_images_are_read_as_before(tmp_path):
    """Their content's hash is the key of cached features."""
    assert vqa._image_facts(str(write(tmp_path, {}) / IMAGE))["repairs"] == {}
    exact = Image.open(tmp_path / IMAGE).convert("RGB").tobytes()
    assert vqa.load_image(tmp_path / IMAGE).tobytes() == exact
    assert BASE[IMAGE] == (tmp_path / IMAGE).read_bytes()
