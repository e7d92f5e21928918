"""Part 2, Archives: unpacked whole, once and outside the input, or refused without a trace."""

import io
import os
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from machine import COMPETITION, CONFIG, T4_CARD
from running import raising
from small_competition import BASE, with_path, write

import vqa_helpers as vqa

# --- Competitions that are attached as an archive -------------------------------------------------


# The archive, and the folder in it that holds the competition.
ARCHIVES = {
    "zip": (f"{COMPETITION}/open.zip", ""),
    "zip with a folder inside": ("kaggle/input/open/open.zip", "open/data"),
    "tar": (f"{COMPETITION}/open.tar", ""),
    "tar.gz with a folder inside": ("content/open.tar.gz", "open"),
    "zip on Drive": ("content/drive/MyDrive/vqa/open.zip", ""),
}


def files_and_times(folder):
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize(("name", "inner"), ARCHIVES.values(), ids=ARCHIVES)
def test_an_archive_is_unpacked_once_outside_the_input(machine, capsys, name, inner):
    machine.helper()
    machine.gpus(T4_CARD)
    archive = machine.archive(name, inner)
    before = files_and_times(archive.parent)
    scratch = machine.root / "scratch"
    data = Path(machine.run().config.data_dir)
    assert data.is_relative_to(scratch)
    assert data.match(f"vqa-data-*/{inner}".rstrip("/"))
    printed = capsys.readouterr().out
    assert f"Competition data: {scratch}/vqa-data-" in printed
    assert printed.count(f" being unpacked from {archive}\n") == 1

    (data / "kept").touch()
    assert Path(machine.run().config.data_dir) == data
    assert (data / "kept").exists()
    printed = capsys.readouterr().out
    assert f" from {archive}\n" in printed
    assert "being unpacked" not in printed
    assert files_and_times(archive.parent) == before


def test_a_changed_archive_is_unpacked_anew(machine):
    machine.helper()
    machine.gpus(T4_CARD)
    archive = machine.archive("content/open.zip")
    data = machine.run().config.data_dir
    os.utime(archive, ns=(0, archive.stat().st_mtime_ns + 1))
    assert machine.run(CONFIG).config.data_dir != data


def test_five_gigabytes_of_disk_are_too_few_for_six(machine):
    machine.helper()
    machine.gpus(T4_CARD)
    archive = machine.archive(f"{COMPETITION}/open.tar")
    with tarfile.open(archive, "a") as opened:
        member = tarfile.TarInfo("images.bin")
        opened.addfile(member)
        start = opened.offset
    member.size = 6 * 2**30
    with archive.open("r+b") as file:  # six gigabytes that take no space: a hole
        file.seek(start - tarfile.BLOCKSIZE)
        file.write(member.tobuf())
        file.truncate(start + member.size + 2 * tarfile.BLOCKSIZE)
    machine.monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 2**30))
    with pytest.raises(
        ValueError, match=r"'images.bin' .* makes 6,442,450,9\d\d bytes.* 5,368,709,120 \(disk\)"
    ):
        machine.run()
    assert not any((machine.root / "scratch").iterdir())


# --- Unpacking ------------------------------------------------------------------------------------


def make_zip(path, name="more.txt", content=b"more", kind=0, size=None):
    """A zip file of the small competition and one more member, which claims to have this size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in BASE.items():
            archive.writestr(member, data)
        last = zipfile.ZipInfo(name)
        last.external_attr = kind << 16
        last.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(last, content)
        last.file_size = size or len(content)


def make_tar(
    path,
    name="more.txt",
    content=b"more",
    kind=tarfile.REGTYPE,
    target="",
    size=None,
    mode="w:gz",
):
    """The same as a tar file; `target`: what the member is a link to."""
    with tarfile.open(path, mode) as archive:
        for member, data in BASE.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        last = tarfile.TarInfo(name)
        last.type = kind
        last.linkname = target
        last.size = size or len(content)
        archive.addfile(last, None if size else io.BytesIO(content))


def unpacked(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(make_zip, {}, id="zip"),
        pytest.param(make_tar, {}, id="tar.gz"),
        pytest.param(make_tar, {"mode": "w"}, id="tar"),
        pytest.param(make_zip, {"name": "사진/가 나.txt"}, id="zip with a Korean name"),
        pytest.param(make_tar, {"name": "사진/가 나.txt"}, id="tar with a Korean name"),
        pytest.param(make_zip, {"name": "a..b/..c"}, id="dots within names"),
        pytest.param(make_zip, {"kind": stat.S_IFREG | 0o644}, id="zip made on Unix"),
        pytest.param(make_tar, {"mode": "w:bz2"}, id="tar.bz2"),
    ],
)
def test_an_archive_is_unpacked_whole(tmp_path, make, options):
    make(tmp_path / "archive", **options)
    folder = vqa.unpack_archive(tmp_path / "archive", tmp_path / "new" / "data")
    assert folder == tmp_path / "new" / "data"
    assert unpacked(folder) == BASE | {options.get("name", "more.txt"): b"more"}
    assert [path.name for path in folder.parent.iterdir()] == ["data"]
    assert len(vqa.load_competition(folder).train) == 2


def test_a_utf8_name_without_a_note_of_its_encoding_is_read_as_utf8(tmp_path):
    make_zip(tmp_path / "archive", name="123456.txt")  # a Mac writes such names
    content = (tmp_path / "archive").read_bytes().replace(b"123456", "가나".encode())
    (tmp_path / "archive").write_bytes(content)
    assert "가나.txt" in unpacked(vqa.unpack_archive(tmp_path / "archive", tmp_path / "data"))


def test_a_folder_that_exists_is_left_alone(tmp_path):
    make_zip(tmp_path / "archive")
    write(tmp_path / "data", {})
    with pytest.raises(
        vqa.DataError, match="data: exists already; delete it or unpack archive into a new folder"
    ):
        vqa.unpack_archive(tmp_path / "archive", tmp_path / "data")
    assert unpacked(tmp_path / "data") == BASE


def test_an_interrupted_unpacking_leaves_no_folder_and_the_next_one_succeeds(tmp_path, monkeypatch):
    make_zip(tmp_path / "archive")
    (tmp_path / ".data.unfinished").mkdir()  # what a killed process leaves
    (tmp_path / ".data.unfinished" / "stale").touch()
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            vqa.unpack_archive(tmp_path / "archive", tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]
    folder = vqa.unpack_archive(tmp_path / "archive", tmp_path / "data")
    assert unpacked(folder).keys() == {*BASE, "more.txt"}


# --- Refused archives -----------------------------------------------------------------------------


OUT = "is a link or a device, or its name leads out of the folder"
ESCAPES = {
    "upwards": "../x",
    "down and upwards": "a/../../x",
    "absolute": "/tmp/x",
    "a drive": "C:/x",
    "upwards with backslashes": "..\\x",
    "with a backslash": "a\\x",
    "only dots": "..",
}
BOMB = [
    "member 'more.txt' is number 8 and makes 105,9",
    "the limit is 2,000,000 and 104,857,600 (decompression bomb)",
]
TOO_LARGE = [
    "member 'more.txt' is number 8 and makes 69,793,2",
    "the limit is 2,000,000 and ",
]


def named(make, label, name):
    parts = [f"member {name!r} {OUT}"]
    return pytest.param(make, {"name": name}, parts, id=f"{make.__name__}: {label}")


# How the archive is made, and parts of the message with which it is refused.
UNSAFE = [
    *(named(make_zip, label, name) for label, name in ESCAPES.items()),
    *(named(make_tar, label, name) for label, name in ESCAPES.items()),
    pytest.param(
        make_zip,
        {"kind": stat.S_IFLNK | 0o777},
        [f"member 'more.txt' {OUT}"],
        id="make_zip: a link",
    ),
    pytest.param(
        make_zip,
        {"kind": stat.S_IFCHR | 0o666},
        [f"member 'more.txt' {OUT}"],
        id="make_zip: a device",
    ),
    pytest.param(
        make_tar,
        {"kind": tarfile.SYMTYPE, "target": "/etc"},
        [f"'more.txt' {OUT}"],
        id="make_tar: a link",
    ),
    pytest.param(
        make_tar,
        {"kind": tarfile.LNKTYPE, "target": "x"},
        [f"'more.txt' {OUT}"],
        id="make_tar: a hard link",
    ),
    pytest.param(
        make_tar, {"kind": tarfile.CHRTYPE}, [f"'more.txt' {OUT}"], id="make_tar: a device"
    ),
    pytest.param(
        make_tar, {"kind": tarfile.FIFOTYPE}, [f"'more.txt' {OUT}"], id="make_tar: a pipe"
    ),
    pytest.param(make_zip, {"content": bytes(101 * 2**20)}, BOMB, id="make_zip: a bomb"),
    pytest.param(make_tar, {"content": bytes(101 * 2**20)}, BOMB, id="make_tar: a bomb"),
    pytest.param(make_zip, {"size": 65 * 2**30}, TOO_LARGE, id="make_zip: beyond 64 GiB"),
    pytest.param(make_tar, {"size": 65 * 2**30}, TOO_LARGE, id="make_tar: beyond 64 GiB"),
]


@pytest.mark.parametrize(("make", "options", "parts"), UNSAFE)
def test_an_unsafe_archive_is_refused_and_leaves_nothing(tmp_path, make, options, parts):
    make(tmp_path / "archive", **options)
    with pytest.raises(vqa.DataError) as caught:
        vqa.unpack_archive(tmp_path / "archive", tmp_path / "data")
    message = str(caught.value)
    for part in (str(tmp_path / "archive"), *parts, "download it again, or unpack it by hand"):
        assert part in message
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


def encrypt(content):
    """Mark the first member as encrypted, in the directory at the end of a zip file."""
    at = content.index(b"PK\1\2") + 8
    return content[:at] + b"\1" + content[at + 1 :]


def remove(content):
    """No archive at all."""


def become_a_web_page(content):
    return b"<html>"


def truncate(content):
    return content[:-30]


def change_a_byte(content):
    return content[:60] + b"?" + content[61:]


def wrong_sum(content):
    return content[:-8] + bytes(4) + content[-4:]


def plain_tar(path):
    make_tar(path, mode="w", content=bytes(600))


def up_to_the_last(content):
    return content[: content.index(b"more.txt")]


def rename_a_member(content):
    """Without the new checksum that a renamed member would need."""
    return content.replace(b"more.txt", b"less.txt")


def name_in_no_encoding(content):
    """Bytes that are a name neither in UTF-8 nor in cp949, and lines of a box in cp437."""
    return content.replace(b"more.txt", b"\xff\xb3\xc4\xff.txt")


# The archive, what is done to its bytes, and the reason with which it is refused.
DAMAGED = {
    "missing": (make_zip, remove, "FileNotFoundError"),
    "a web page": (make_zip, become_a_web_page, "ReadError"),
    "a truncated zip": (make_zip, truncate, "ReadError"),
    "a truncated tar.gz": (make_tar, truncate, "EOFError"),
    "a tar.gz with a wrong checksum": (make_tar, wrong_sum, "BadGzipFile: CRC check failed"),
    "a tar without its last member": (
        plain_tar,
        up_to_the_last,
        "the end of the archive is missing",
    ),
    "a tar with a damaged member": (plain_tar, rename_a_member, "a member is damaged"),
    "a name of unknown encoding": (
        make_zip,
        name_in_no_encoding,
        "1 names have no note of their encoding, for example b'\\xff\\xb3\\xc4\\xff.txt'; "
        "tried UTF-8, cp949 and cp437, what makes sense: none",
    ),
    "damaged bytes in a zip": (make_zip, change_a_byte, ""),
    "a password": (make_zip, encrypt, "is encrypted, password required"),
}


@pytest.mark.parametrize(("make", "damage", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_archive_is_refused_and_leaves_nothing(tmp_path, make, damage, reason):
    archive = tmp_path / "archive"
    make(archive)
    content = damage(archive.read_bytes())
    archive.unlink()
    if content:
        archive.write_bytes(content)
    with pytest.raises(vqa.DataError) as caught:
        vqa.unpack_archive(archive, tmp_path / "data")
    assert f"{archive}: not unpacked (" in str(caught.value)
    assert reason in str(caught.value)
    assert not (tmp_path / "data").exists()
    assert not list(tmp_path.glob(".*"))


def test_too_many_members_and_too_little_disk_space_are_refused(tmp_path, monkeypatch):
    make_zip(tmp_path / "archive")
    monkeypatch.setattr(vqa, "MAX_MEMBERS", 7)
    with pytest.raises(
        vqa.DataError, match="member 'more.txt' is number 8 and .* the limit is 7 and "
    ):
        vqa.unpack_archive(tmp_path / "archive", tmp_path / "data")
    monkeypatch.setattr(vqa.shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
    with pytest.raises(vqa.DataError, match=r"member 'train.csv' is number 1 .* and 9 \(disk\)"):
        vqa.unpack_archive(tmp_path / "archive", tmp_path / "data")


# --- Names without a note of their encoding -------------------------------------------------------


def zip_with_raw_name(path, name, files=(), content=b"more"):
    """A zip file as old programs write it: a member has this name in bytes, unmarked."""
    placeholder = "Z" * len(name)
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in dict(files).items():
            archive.writestr(member, data)
        archive.writestr(placeholder, content)
    path.write_bytes(path.read_bytes().replace(placeholder.encode(), name))


# In cp437 a letter of western Europe and a plain one; in cp949 both are one rare syllable.
AMBIGUOUS = "für.png".encode("cp437")
AS_CP949 = AMBIGUOUS.decode("cp949")
RAW_NAMES = {
    "cp949": ("사진/빨간 차.png".encode("cp949"), "사진/빨간 차.png", "cp949"),
    "cp949 with hanja": ("大韓.png".encode("cp949"), "大韓.png", "cp949"),
    "cp949 with rare syllables": ("펲똠방.png".encode("cp949"), "펲똠방.png", "cp949"),
    "cp437": ("café.png".encode("cp437"), "café.png", "cp437"),
}


@pytest.mark.parametrize(("raw", "name", "encoding"), RAW_NAMES.values(), ids=RAW_NAMES)
def test_an_unmarked_name_is_read_in_the_encoding_in_which_it_is_a_word(
    tmp_path, caplog, raw, name, encoding
):
    zip_with_raw_name(tmp_path / "a.zip", raw)
    folder = vqa.unpack_archive(tmp_path / "a.zip", tmp_path / "data")
    assert unpacked(folder) == {name: b"more"}
    logged = "1 names have no note of their encoding and are read as"
    assert f"{logged} {encoding}, for example {name!r}" in caplog.text


@pytest.mark.parametrize("in_table", ["für.png", AS_CP949])
@pytest.mark.parametrize("place", ["in the archive", "beside it"])
def test_an_unmarked_name_of_two_meanings_is_read_as_the_tables_have_it(tmp_path, in_table, place):
    table = f"id,path\nr1,train/{in_table}\n".encode()
    files = {}
    if place == "in the archive":
        files["open/train.csv"] = table
    else:
        (tmp_path / "train.csv").write_bytes(table)
    zip_with_raw_name(tmp_path / "a.zip", AMBIGUOUS, files)
    folder = vqa.unpack_archive(tmp_path / "a.zip", tmp_path / "data")
    assert unpacked(folder) == files | {in_table: b"more"}


def test_an_unmarked_name_of_two_meanings_without_a_table_is_refused(tmp_path):
    zip_with_raw_name(tmp_path / "a.zip", AMBIGUOUS)
    with pytest.raises(vqa.DataError) as caught:
        vqa.unpack_archive(tmp_path / "a.zip", tmp_path / "data")
    readings = f"what makes sense: cp949 {AS_CP949!r}, cp437 'für.png'"
    assert f"tried UTF-8, cp949 and cp437, {readings}" in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_a_competition_whose_images_have_names_in_cp949_loads(tmp_path):
    files = BASE | with_path("train/빨강.png")
    content = files.pop("train/1.png")
    zip_with_raw_name(tmp_path / "a.zip", "train/빨강.png".encode("cp949"), files, content)
    folder = vqa.unpack_archive(tmp_path / "a.zip", tmp_path / "data")
    loaded = vqa.load_competition(folder)
    assert loaded.train["image_path"][0] == str(folder / "train/빨강.png")
    assert loaded.train["image_ok"].all()
