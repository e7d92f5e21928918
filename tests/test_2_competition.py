"""Part 2, Competition: all tables of one competition, validated, sampled and fingerprinted.

Under random damage of tables and images it loads truthfully or is refused, nothing else.
"""

import csv
import io
import re
import tempfile
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from competition_folder import Folder, counted_fallbacks
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from small_competition import BASE, R1, R2, T1, T2, table, write

import vqa_helpers as vqa


def test_a_clean_competition_loads_in_file_order_without_a_fallback(folder):
    loaded = folder.load()
    assert counted_fallbacks(loaded) == {}
    assert loaded.data_dir == folder.root.resolve()
    assert loaded.train["id"].tolist() == ["train_0", "train_1", "train_2", "train_3"]
    assert loaded.train["answer"].tolist() == list("abcd")
    assert loaded.train["label"].tolist() == [0, 1, 2, 3]
    assert loaded.train["line"].tolist() == [2, 3, 4, 5]
    assert loaded.test["image_path"][0] == str(folder.root.resolve() / "test" / "0.png")
    assert loaded.test[["width", "height"]].to_numpy().tolist() == [[48, 36]] * 4
    assert loaded.train["type"].unique().tolist() == ["color"]
    assert "answer" not in loaded.test
    assert loaded.sample.to_dict("list") == {
        "id": [f"test_{n}" for n in range(4)],
        "answer": [""] * 4,
    }


def test_a_sample_of_the_training_rows_is_reproducible_and_keeps_their_order(tmp_path):
    folder = Folder(tmp_path, n=12)
    first = folder.load(sample_size=5)
    again = folder.load(sample_size=5)
    assert len(first.train) == 5
    assert len(first.test) == 12
    assert first.train["line"].is_monotonic_increasing
    pd.testing.assert_frame_equal(first.train, again.train)
    assert folder.load(sample_size=5, seed=1).train["id"].tolist() != first.train["id"].tolist()
    assert len(folder.load(sample_size=99).train) == 12


def test_the_fingerprint_follows_tables_and_pixels(folder, tmp_path_factory):
    before = folder.load().fingerprint
    elsewhere = Folder(tmp_path_factory.mktemp("same"))
    assert elsewhere.load().fingerprint == before
    path = folder.root / "train" / "0.png"
    image = vqa.load_image(path)
    image.putpixel((0, 0), (1, 2, 3))
    image.save(path)
    touched = folder.load().fingerprint
    folder.write("sample_submission", "id,answer", [f"test_{n},a" for n in range(4)])
    assert len({before, touched, folder.load().fingerprint}) == 3


# --- Random damage --------------------------------------------------------------------------------

SNIPPETS = [
    b"",
    b"\0",
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\xff",
    b"\xef\xbb\xbf",
    b"7",
    b"\\",
    "가".encode(),
    "가".encode("cp949"),
]
FIELDS = [
    "",
    " ",
    "None",
    "7",
    "(A)",
    "<|im_end|>",
    '"',
    "가",
    "test/1.png",
    "TRAIN/1.png",
    "../x",
    "/etc",
    "http://x",
]
OTHER_NAMES = {
    "path": "img_path",
    "question": "질문",
    "a": "choice_a",
    "d": "보기4",
    "answer": "label",
}
SEPARATORS = ",;\t|"
TABLES = [name for name in BASE if name.endswith(".csv")]
PICTURES = [name for name in BASE if name.endswith(".png")]


def splice(content, pick):
    """Replace up to three bytes somewhere by a snippet."""
    at = pick(len(content) + 1)
    return content[:at] + SNIPPETS[pick(len(SNIPPETS))] + content[at + pick(4) :]


def damage_table(files, pick):
    name = TABLES[pick(len(TABLES))]
    files[name] = splice(files[name], pick)


def recode_table(files, pick):
    name = TABLES[pick(len(TABLES))]
    encoding = ["cp949", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"][pick(5)]
    files[name] = files[name].decode(errors="replace").encode(encoding, errors="replace")


def rearrange_rows(files, pick):
    """Replace a row by another one, delete it, or repeat it."""
    name = TABLES[pick(len(TABLES))]
    rows = files[name].split(b"\n")
    at = pick(len(rows))
    another = rows[pick(len(rows))]
    replacements = ([], [another], [rows[at], rows[at]])
    rows[at : at + 1] = replacements[pick(3)]
    files[name] = b"\n".join(rows)


def rearrange_columns(files, pick):
    """Delete a column, repeat it, or replace it by another one."""
    name = TABLES[pick(len(TABLES))]
    order = list(range(8))
    at = pick(8)
    replacements = ([], [at, at], [pick(8)])
    order[at : at + 1] = replacements[pick(3)]
    rows = []
    for row in files[name].split(b"\n"):
        fields = row.split(b",")
        rows.append(b",".join(fields[n] for n in order if n < len(fields)))
    files[name] = b"\n".join(rows)


def change_field(files, pick):
    name = TABLES[pick(len(TABLES))]
    rows = [row.split(b",") for row in files[name].split(b"\n")]
    fields = rows[pick(len(rows))]
    fields[pick(len(fields))] = FIELDS[pick(len(FIELDS))].encode()
    files[name] = b"\n".join(b",".join(fields) for fields in rows)


def rename_columns(files, pick):
    """Give up to two columns of a table other names that are understood, or take a fifth choice."""
    name = TABLES[pick(len(TABLES))]
    header, *rows = files[name].split(b"\n")
    columns = header.decode(errors="replace").split(",")
    for _ in range(2):
        at = pick(len(columns))
        columns[at] = OTHER_NAMES.get(columns[at], ("E", "image")[pick(2)])
    files[name] = b"\n".join([",".join(columns).encode(), *rows])


def change_separator(files, pick):
    name = TABLES[pick(len(TABLES))]
    files[name] = files[name].replace(b",", SEPARATORS[pick(4)].encode())


def damage_picture(files, pick):
    name = PICTURES[pick(len(PICTURES))]
    content = files.pop(name, b"")
    damaged = (
        splice(content, pick),
        content[: pick(len(content) + 1)],
        b"<html>404</html>",
    )
    files[name] = damaged[pick(3)]


def move_picture(files, pick):
    """Remove a picture, or give it another name."""
    name = PICTURES[pick(len(PICTURES))]
    content = files.pop(name, b"")
    new_name = (None, name.upper(), f"images/{name}", name[-5:])[pick(4)]
    if new_name:
        files[new_name] = content


DAMAGES = [
    damage_table,
    recode_table,
    rearrange_rows,
    rearrange_columns,
    change_field,
    rename_columns,
    change_separator,
    damage_picture,
    move_picture,
]


def records(content):
    """The rows of a CSV file as Python's own reader has them, under plain column names."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp949")
    separator = max(SEPARATORS, key=text.lstrip().splitlines()[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    header, *rows = [fields for fields in reader if "".join(fields).strip()]
    names = [name.strip().casefold() for name in header]
    without_marks = {name: re.sub(r"\W", "", name) for name in names}
    others = [(ours, name) for name, ours in without_marks.items()]
    others += [*OTHER_NAMES.items(), ("path", "image"), ("a", "가")]
    for ours, other in others:
        if ours not in names:
            names = [ours if name == other else name for name in names]
    return [dict(zip(names, fields, strict=True)) for fields in rows]


def assert_rows_are_the_files_own(frame, rows, root):
    """Every value is the file's own, and every image is inside the folder or grey."""
    assert frame.index.tolist() == list(range(len(rows)))
    assert frame["line"].is_monotonic_increasing
    for column in ("id", "question", *"abcd"):
        assert frame[column].tolist() == [row[column] for row in rows]
    filled = frame[[*"abcd"]].map(str.strip) != ""
    assert (filled.sum(axis=1) >= 2).all()
    for row, path in zip(rows, frame["image_path"], strict=True):
        if path != vqa.GREY_IMAGE:
            assert Path(path).resolve().is_relative_to(root.resolve())
            written = Path(row["path"].strip().replace("\\", "/")).name.lower()
            assert written in (Path(path).name.lower(), Path(path).stem.lower())
    assert (frame["image_path"][~frame["image_ok"]] == vqa.GREY_IMAGE).all()
    assert (frame.loc[frame["image_ok"], "pixel_hash"] != "").all()


def assert_label_is_the_written_answer(row, written):
    """The answer of the file is the letter, the position or the text of the labelled choice."""
    text = row[row["answer"]].strip()
    assert text
    assert row["answer"] == "abcd"[row["label"]]
    visible = "".join(sign for sign in written if unicodedata.category(sign) != "Cf")
    letter_or_position = visible.lower().strip(" ().")
    assert letter_or_position in (row["answer"], str(row["label"] + 1)) or written == text


def assert_loaded_truthfully(files, root, loaded):
    """Every value is the file's own, every row is there or was counted out, labels make sense."""
    train_records = {row["id"]: row for row in records(files["train.csv"])}
    loaded_records = [train_records[name] for name in loaded.train["id"]]
    assert_rows_are_the_files_own(loaded.test, records(files["test.csv"]), root)
    assert_rows_are_the_files_own(loaded.train, loaded_records, root)

    lost = loaded.fallbacks["train_blank_answer"] + loaded.fallbacks["train_unusable_image"]
    assert len(loaded.train) == len(train_records) - lost
    assert loaded.train["id"].is_unique
    assert loaded.train["image_ok"].all()
    assert loaded.fallbacks["test_unusable_image"] == (~loaded.test["image_ok"]).sum()
    for _, row in loaded.train.iterrows():
        assert_label_is_the_written_answer(row, train_records[row["id"]]["answer"].strip())
    assert sorted(loaded.sample.iloc[:, 0]) == sorted(loaded.test["id"])


# Four rows a split, so that some can be lost.
FOUR_ROWS = {
    **table("train", R1, R2, "r3,train/1.png,q,1,2,3,4,c", 'r4,train/2.png,"q, q",가,나,,,a'),
    **table("test", T1, T2, "t3,test/1.png,q,1,2,3,4", "t4,test/2.png,q,가,나,,"),
    **table("sample_submission", "t1,", "t2,", "t3,", "t4,"),
}


def damage_and_load(data):
    """Damage the small competition at random: it loads truthfully or is refused by a DataError."""

    def pick(n):
        return data.draw(st.integers(0, n - 1))

    files = BASE | FOUR_ROWS
    for damage in data.draw(st.lists(st.sampled_from(DAMAGES), min_size=1, max_size=2)):
        damage(files, pick)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), dict.fromkeys(BASE) | files)
        try:
            share = (0.5, 0.9, 0)[pick(3)]
            loaded = vqa.load_competition(folder, max_fallback_share=share)
        except vqa.DataError as error:
            event("refused")
            assert "\n" not in str(error), error
            assert len(str(error)) < 600, error
        else:
            event("loaded")
            assert_loaded_truthfully(files, Path(folder), loaded)


QUIET = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@pytest.mark.slow
@settings(max_examples=80, derandomize=True, **QUIET)
@given(st.data())
def test_a_damaged_competition_loads_truthfully_or_is_refused(data):
    damage_and_load(data)


@pytest.mark.slow
@settings(max_examples=2000, print_blob=True, **QUIET)
@given(st.data())
def test_two_thousand_damaged_competitions_load_truthfully_or_are_refused(data):
    damage_and_load(data)
