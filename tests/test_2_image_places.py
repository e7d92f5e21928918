"""Part 2, Image places: where images lie on people's disks, found and counted or refused.

In most cases the small competition's only training row has another path, and the image that is
meant lies somewhere: it is found there, or it is said where it was looked for.
"""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from small_competition import (
    BASE,
    MEANT_IMAGE,
    NFC,
    NFD,
    R1,
    R2,
    T1,
    T2,
    Loads,
    Refused,
    case,
    encoded,
    random_image,
    table,
    with_path,
    write,
)

import vqa_helpers as vqa

SIZE = (7, 5)  # of the image that is meant
OTHER_IMAGE = BASE["train/2.png"]
DEEPER = "image_found_in_a_deeper_folder"
IN_ARCHIVE = "image_found_in_an_archive"
OTHER_SPELLING = "image_found_under_other_spelling"
WITHOUT_ENDING = "image_found_without_its_ending"
BY_TAIL = "image_found_by_the_end_of_its_path"
THROUGH_LINK = "image_found_through_a_link"
PLACE = "train.csv, line 2, column 'path', value "


def found(title, path, place, *kinds, **others):
    """The image is written to `place`, and is found where the row says `path`."""
    changes = with_path(path) | {place: MEANT_IMAGE} | others
    return case(title, changes, Loads(dict.fromkeys(kinds, 1), size=SIZE))


def refused(title, path, places, *parts):
    changes = with_path(path) | dict.fromkeys(places, MEANT_IMAGE)
    return case(title, changes, Refused(f"{PLACE}{path!r}: ", *parts))


# --- Folders --------------------------------------------------------------------------------------

HOME = "/home/me/vqa"
TWO_PLACES = ["x.png", "images/x.png"]
PLACES = [
    found("train/images", "x.png", "train/images/x.png", DEEPER),
    found("images/train", "x.png", "images/train/x.png", DEEPER),
    found("deeper, other spelling", "X.PNG", "images/train/x.png", DEEPER, OTHER_SPELLING),
    found("decomposed folder", f"{NFC}/x.png", f"{NFD}/x.png", OTHER_SPELLING),
    found("no ending", "000123", "train/000123.jpg", WITHOUT_ENDING),
    found("no ending of a .jfif", "photo", "photo.jfif", WITHOUT_ENDING),
    found("another ending of a JPEG", "train/photo.jpg", "train/photo.JPEG", OTHER_SPELLING),
    found("another ending in the table", "photo.jpeg", "train/photo.jpg", OTHER_SPELLING),
    found("no ending, with a dot", "photo.v2", "photo.v2.jpeg", WITHOUT_ENDING),
    found("no ending, other case", "IMG_1", "train/img_1.JPG", WITHOUT_ENDING),
    found("absolute path", f"{HOME}/train/x.png", "train/x.png", BY_TAIL),
    found("absolute path, in images", f"{HOME}/train/x.png", "images/train/x.png", BY_TAIL),
    found("absolute path, other case", f"{HOME}/Train/X.png", "train/x.PNG", BY_TAIL),
    found("absolute path, no ending", f"{HOME}/train/x", "train/x.png", BY_TAIL),
    found("absolute path, its name", "/pictures/x.png", "images/x.png", BY_TAIL),
    found("absolute path of Windows", "D:\\vqa\\train\\x.png", "train/x.png", BY_TAIL),
    found("network share", "//host/share/train/x.png", "train/x.png", BY_TAIL),
    found("the longest end", "/a/b/c/x.png", "b/c/x.png", BY_TAIL, **{"c/x.png": OTHER_IMAGE}),
    found("folders above the data", "data/open/train/x.png", "train/x.png", BY_TAIL),
    found("the split's folder", f"{HOME}/train/x.png", "train/images/x.png", DEEPER, BY_TAIL),
    refused(
        "nowhere",
        "x.png",
        [],
        "No such file: looked for it in ",
        "there in images, train, train/images, images/train, in other spelling, "
        "without its ending and by the end of its path; put it there",
    ),
    refused(
        "two endings",
        "x",
        ["x.png", "x.jpg"],
        "several files are meant, such as ['",
        "; write one of them",
    ),
    refused(
        "two ends",
        "/a/x.png",
        TWO_PLACES,
        "its end leads to several files, such as ['",
        "write the",
    ),
    refused("another split's", f"{HOME}/test/x.png", ["train/x.png", "x.png"], "No such file"),
    refused("no split's", f"{HOME}/train/x.png", ["x.png", "images/x.png"], "No such file"),
    refused("its folder is here", "train/x.png", ["images/x.png"], "No such file"),
    refused("no ending, no image", "x", ["x.txt"], "No such file"),
    refused("a text file", "x.png", ["x.png.txt"], "No such file"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("changes", "outcome"), PLACES)
def test_an_image_is_found_and_counted_or_said_where_it_was_looked_for(tmp_path, changes, outcome):
    outcome.check(write(tmp_path / "data", changes))


def test_an_absolute_path_into_the_data_folder_is_none_of_another_machine(tmp_path):
    root = write(tmp_path / "data", {"here.png": MEANT_IMAGE})
    write(root, with_path(f"{root}/here.png"))
    Loads(size=SIZE).check(root)


def test_two_paths_that_would_mean_one_file_by_their_name_alone_are_refused(tmp_path):
    first = R1.replace("train/1.png", "/a/x.png")
    second = R2.replace("train/2.png", "/b/x.png")
    root = write(tmp_path, table("train", first, second) | {"images/x.png": MEANT_IMAGE})
    place = "train.csv, line 3, column 'path', value '/b/x.png': its name leads to "
    Refused(place, f"{root}/images/x.png, and so does 'a/x.png'; write").check(root)


def test_a_rescue_is_logged_with_its_count_and_an_example(tmp_path, caplog):
    rows = [row.replace("train/", f"{HOME}/train/") for row in (R1, R2)]
    Loads({BY_TAIL: 2}).check(write(tmp_path, table("train", *rows)))
    example = f"for example line 2: '{HOME}/train/1.png' ({tmp_path}/train/1.png)"
    assert f"train.csv: {BY_TAIL} in 2 of 2 rows, {example}" in caplog.text


# --- Links ----------------------------------------------------------------------------------------


def linked_competition(tmp_path):
    """A data folder whose image folders are links to another disk."""
    disk = write(tmp_path / "disk", {})
    root = tmp_path / "data"
    root.mkdir()
    for name in vqa.COMPETITION_FILES:
        (disk / name).rename(root / name)
    return disk, root


def test_folders_that_are_links_are_followed_and_counted(tmp_path, caplog):
    disk, root = linked_competition(tmp_path)
    for split in ("train", "test"):
        (root / split).symlink_to(disk / split)
    Loads({THROUGH_LINK: 4}).check(root)
    assert f"test.csv: {THROUGH_LINK} in 2 of 2 rows, for example line 2: " in caplog.text
    assert f"({disk}/test/1.png)" in caplog.text


def test_files_that_are_links_are_followed_and_counted(tmp_path):
    disk, root = linked_competition(tmp_path)
    for name in ("train/1.png", "train/2.png", "test/1.png", "test/2.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(disk / name)
    Loads({THROUGH_LINK: 4}).check(root)


def test_a_data_folder_that_is_a_link_is_just_a_folder(tmp_path):
    root = write(tmp_path / "data", {})
    (tmp_path / "link").symlink_to(root)
    Loads().check(tmp_path / "link")


def test_links_in_a_circle_are_walked_once(tmp_path):
    circle = {"circle": Path("."), "train/up": Path("..")}
    changes = with_path("X.png") | {"train/x.png": MEANT_IMAGE} | circle
    Loads({OTHER_SPELLING: 1}, size=SIZE).check(write(tmp_path, changes))


def test_after_very_many_folders_the_search_ends_and_says_where(tmp_path, monkeypatch, caplog):
    """As where a link leads to a whole disk."""
    monkeypatch.setattr(vqa, "_MOST_FOLDERS", 3)
    changes = with_path("X.png") | {f"deep/{number}/x.png": MEANT_IMAGE for number in range(3)}
    Refused(f"{PLACE}'X.png': No such file").check(write(tmp_path, changes))
    assert "no image is looked for here, nor further down" in caplog.text


def test_a_folder_that_cannot_be_listed_is_named_and_passed_over(tmp_path, monkeypatch, caplog):
    root = write(tmp_path, {})
    scandir = os.scandir

    def refuse_images(folder):
        if str(folder).endswith("/images"):
            raise PermissionError("not yours")
        return scandir(folder)

    (root / "images").mkdir()
    monkeypatch.setattr(os, "scandir", refuse_images)
    Loads().check(write(root, with_path("train/1.png")))
    Refused(f"{PLACE}'x.png': No such file").check(write(root, with_path("x.png")))
    assert f"{root}/images: no image is looked for in it (not yours)" in caplog.text


# --- Archives -------------------------------------------------------------------------------------


def zipped(*names, content=MEANT_IMAGE):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(name, link=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(MEANT_IMAGE)
        archive.addfile(member, io.BytesIO(MEANT_IMAGE))
        if link:
            member = tarfile.TarInfo("train/link.png")
            member.type = tarfile.SYMTYPE
            member.linkname = link
            archive.addfile(member)
    return buffer.getvalue()


def in_archive(title, path, archive, content, *kinds):
    counted = dict.fromkeys((IN_ARCHIVE, *kinds), 1)
    changes = with_path(path) | {archive: content}
    return case(title, changes, Loads(counted, size=SIZE))


ARCHIVES = [
    in_archive("images at the top", "x.png", "train.zip", zipped("x.png")),
    in_archive(
        "images at the top, path with the split", "train/x.png", "train.zip", zipped("x.png")
    ),
    in_archive("split's folder", "train/x.png", "train.zip", zipped("train/x.png")),
    in_archive("split's folder, bare path", "x.png", "images.zip", zipped("train/x.png")),
    in_archive("its own name", "images/x.png", "images.zip", zipped("x.png")),
    in_archive("one folder around", "train/x.png", "a.zip", zipped("open/train/x.png")),
    in_archive("tar.gz", "x.png", "train.tar.gz", tarred("x.png")),
    in_archive("other case", "train/X.png", "TRAIN.ZIP", zipped("train/x.PNG"), OTHER_SPELLING),
    in_archive("no ending", "train/x", "train.zip", zipped("train/x.png"), WITHOUT_ENDING),
    in_archive("absolute path", f"{HOME}/train/x.png", "train.zip", zipped("x.png"), BY_TAIL),
    case(
        "another split's archive",
        with_path("x.png") | {"test.zip": zipped("x.png")},
        Refused(f"{PLACE}'x.png': No such file: ", "images/train, in other spelling"),
    ),
    case(
        "an archive without it",
        with_path("x.png") | {"train.zip": zipped("y.png")},
        Refused(f"{PLACE}'x.png': No such file: ", "images/train, in other spelling"),
    ),
    case(
        "an archive with it elsewhere",
        with_path("a/x.png") | {"train.zip": zipped("b/c/x.png")},
        Refused(f"{PLACE}'a/x.png': No such file: ", "images/train and in train.zip, in other"),
    ),
    case(
        "a link in the archive that leads out",
        with_path("train/link.png") | {"train.tar.gz": tarred("x.png", link="/etc/passwd")},
        Refused("train.tar.gz: not unpacked (ValueError: member 'train/link.png' is a link"),
    ),
    case(
        "an archive that leads out",
        with_path("x.png") | {"train.zip": zipped("../x.png")},
        Refused("train.zip: not unpacked (ValueError: member '../x.png' is a link or a device"),
    ),
]


@pytest.mark.parametrize(("changes", "outcome"), ARCHIVES)
def test_images_in_an_archive_beside_the_tables_are_unpacked(tmp_path, changes, outcome):
    outcome.check(write(tmp_path / "data", changes))


def test_an_archive_is_unpacked_once_and_not_where_nothing_is_missing(tmp_path, caplog):
    archive = zipped("x.png")
    root = write(tmp_path, with_path("x.png") | {"train.zip": archive, "other.zip": archive})
    with caplog.at_level("INFO"):
        first = vqa.load_competition(root)
        again = vqa.load_competition(root)
    path = Path(first.train["image_path"][0])
    assert path.parent.name.startswith("vqa-data-")
    assert path.parent.parent == Path(vqa.tempfile.gettempdir()).resolve()
    assert again.train["image_path"][0] == str(path)
    assert caplog.text.count(f"being unpacked from {root}/train.zip") == 1
    assert caplog.text.count("being unpacked from") == 1  # other.zip has it, too
    caplog.clear()
    with caplog.at_level("INFO"):
        vqa.load_competition(write(tmp_path / "whole", {"train.zip": archive}))
    assert "being unpacked" not in caplog.text


def test_what_is_unpacked_already_is_taken_from_there(tmp_path, caplog):
    rows = [row.replace("train/", f"{HOME}/train/") for row in (R1, R2)]
    archive = zipped("train/1.png", "train/2.png")
    root = write(tmp_path, table("train", *rows) | {"train.zip": archive})
    with caplog.at_level("INFO"):
        Loads({BY_TAIL: 2}).check(root)
    assert "being unpacked" not in caplog.text


def test_a_damaged_archive_beside_the_tables_is_named(tmp_path, caplog):
    root = write(tmp_path, with_path("x.png") | {"train.zip": zipped("x.png")[:-30]})
    Refused(f"{PLACE}'x.png': No such file").check(root)
    assert f"{root}/train.zip: no image is looked for in it, it cannot be read (" in caplog.text


UNREAD = {
    "a .zip that is cut off": (
        "images.zip",
        zipped("x.png")[:-30],
        "it cannot be read: download it again",
    ),
    "a .7z": ("Images.7z", b"7z", "it is not unpacked here: unpack it by hand"),
    "a .tar.xz": ("train.tar.xz", b"\xfd7zXZ", "it is not unpacked here: unpack it by hand"),
}


@pytest.mark.parametrize(("name", "content", "reason"), UNREAD.values(), ids=UNREAD)
def test_an_archive_that_is_not_read_stands_in_the_error(tmp_path, name, content, reason):
    root = write(tmp_path, with_path("x.png") | {name: content, "test.rar": b"Rar!"})
    Refused(f"{PLACE}'x.png': No such file", f", not in {name} ({reason})").check(root)


def test_names_with_backslashes_in_an_archive_are_why_it_is_refused(tmp_path):
    content = zipped("train|x.png").replace(b"train|x.png", b"train\\x.png")
    root = write(tmp_path, with_path("train/x.png") | {"images.zip": content})
    Refused(f"{root}/images.zip: not unpacked", "member 'train\\\\x.png'", "by hand").check(root)


def test_korean_names_without_a_note_of_their_encoding_are_found_in_the_archive(tmp_path):
    content = zipped("ZZZZ.png").replace(b"ZZZZ", NFC.encode("cp949"))
    changes = with_path(f"{NFD}.png") | {"train.zip": content}
    Loads({IN_ARCHIVE: 1, OTHER_SPELLING: 1}, size=SIZE).check(write(tmp_path, changes))


# --- Speed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["train", "images/train"])
def test_each_folder_is_listed_once_and_no_file_is_looked_at(tmp_path, monkeypatch, folder):
    """A slow mount takes milliseconds for every look."""
    rows = [R1.replace("r1", f"r{n}").replace("train/1.png", f"{n}.png") for n in range(500)]
    root = write(tmp_path, table("train", *rows))
    (root / folder).mkdir(parents=True, exist_ok=True)
    for number in range(500):
        (root / folder / f"{number}.png").write_bytes(b"")
    frame, _ = vqa._read_competition_table(root / "train.csv", {}, vqa.Counter())
    looks = []

    def noting(look):
        def noted(path, *arguments, **options):
            looks.append(str(path))
            return look(path, *arguments, **options)

        return noted

    for name in ("scandir", "stat", "lstat"):
        monkeypatch.setattr(os, name, noting(getattr(os, name)))
    images = vqa._find_images(frame, root, "train", vqa.Counter())
    assert [Path(image.path).name for image in images] == [f"{n}.png" for n in range(500)]
    assert len(looks) < 80
    listed = [look for look in looks if Path(look).is_relative_to(root)]
    assert len(listed) < 40


# --- Rows of all kinds together -------------------------------------------------------------------


def test_all_kinds_of_places_in_one_table_are_counted_by_kind(tmp_path):
    places = {
        "train/1.png": "train/1.png",
        "/x/train/2.png": "train/2.png",
        "3": "train/3.png",
        "4.PNG": "images/4.png",
        "5.png": "images/train/5.png",
    }
    rows = []
    files = {}
    for number, (path, place) in enumerate(places.items()):
        rows.append(f"r{number},{path},q,1,2,3,4,a")
        files[place] = encoded(random_image(number, (20 + number, 10)))
    root = write(tmp_path, table("train", *rows) | table("test", T1, T2) | files)
    counted = {BY_TAIL: 1, WITHOUT_ENDING: 1, OTHER_SPELLING: 1, DEEPER: 1}
    Loads(counted, train={"width": [20, 21, 22, 23, 24]}).check(root)
