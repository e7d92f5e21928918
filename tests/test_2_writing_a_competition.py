"""Part 2, Writing a competition: a table comes back as it was, and a bad one is refused."""

import numpy as np
import pandas as pd
import pytest
from competition_folder import picture

import vqa_helpers as vqa

TEXTS = ["id", "question", *vqa.CHOICES]


def table(**changes):
    """Two rows with an answer and one without."""
    columns = {
        "id": ["q1", "q2", "q3"],
        "path": [picture(1), picture(2), picture(3)],
        "question": ["무슨 색입니까?", "몇 개입니까?", "어디에 있습니까?"],
        "a": ["빨강", "하나", "왼쪽"],
        "b": ["파랑", "둘", "오른쪽"],
        "c": ["노랑", "셋", "위"],
        "d": ["초록", "넷", "아래"],
        "answer": ["b", "d", ""],
    }
    return pd.DataFrame(columns | changes)


def test_a_table_that_is_written_and_loaded_comes_back(tmp_path):
    frame = table(
        question=['"무슨",\r색\n입니까?', " =몇 개? ", "어디\r에?"],
        c=["None", None, "NA"],
        d=["<|im_end|>", np.nan, pd.NA],
        b=[7, 8, 9],
        answer=["B", "a", None],
    )
    folder = vqa.write_competition(frame, tmp_path / "own")
    loaded = vqa.load_competition(folder, max_fallback_share=0)
    expected = frame[TEXTS].astype(object).where(frame[TEXTS].notna(), "").map(str)
    back = pd.concat([loaded.train, loaded.test], ignore_index=True)
    pd.testing.assert_frame_equal(back[TEXTS].astype(object), expected.astype(object))
    assert loaded.train["label"].tolist() == [1, 0]
    assert loaded.train["answer"].tolist() == ["b", "a"]
    assert loaded.test["id"].tolist() == ["q3"]
    assert loaded.sample.to_numpy().tolist() == [["q3", ""]]
    for path, image in zip(back["image_path"], frame["path"], strict=True):
        assert np.array_equal(np.asarray(vqa.load_image(path)), np.asarray(image))


def test_files_are_copied_byte_by_byte_and_a_shared_one_once(tmp_path):
    source = tmp_path / "my photo.JPG"
    picture(1).save(source)
    shared = picture(2)
    frame = table(path=[str(source), source, shared])
    folder = vqa.write_competition(pd.concat([frame, frame.assign(id=list("456"))]), tmp_path / "x")
    images = sorted(path.name for path in (folder / "images").iterdir())
    assert images == ["000001.JPG", "000003.png"]
    assert (folder / "images" / "000001.JPG").read_bytes() == source.read_bytes()
    loaded = vqa.load_competition(folder, max_fallback_share=0)
    assert loaded.train["pixel_hash"].nunique() == 1
    assert loaded.test["id"].tolist() == ["q3", "6"]
    assert not list(tmp_path.glob(".*"))


def test_a_picture_in_memory_is_stored_as_its_file_would_be_read(tmp_path):
    turned = tmp_path / "turned.jpg"
    exif = vqa.Image.Exif()
    exif[0x0112] = 6
    picture(1, (64, 32)).save(turned, exif=exif, quality=95)
    clear = picture(2).convert("RGBA")
    clear.putalpha(0)
    frame = table(path=[vqa.Image.open(turned), picture(3).convert("CMYK"), clear])
    loaded = vqa.load_competition(vqa.write_competition(frame, tmp_path / "own"))
    first = vqa.load_image(loaded.train["image_path"][0])
    assert np.array_equal(np.asarray(first), np.asarray(vqa.load_image(turned)))
    assert vqa.load_image(loaded.test["image_path"][0]).getcolors() == [(48 * 36, (255,) * 3)]


BAD_TABLES = {
    "no rows": (table().head(0), "The table has no rows; give it one for each question"),
    "a column less": (table().drop(columns="d"), "columns ['d'] are missing or double; it needs"),
    "a repeated id": (
        table(id=["q1", "q2", "q1"]),
        "table, line 3, column 'id', value 'q1': is blank or repeats an earlier row's",
    ),
    "a blank id": (table(id=["q1", None, "q3"]), "table, line 2, column 'id', value '': is blank"),
    "a number with a point": (
        table(a=[1.0, 2.5, 3.0]),
        "table, line 1, column 'a', value '1.0': is a float and no text; write it as text",
    ),
    "a truth": (table(b=[True, False, True]), "column 'b', value 'True': is a bool and no text"),
    "half a character": (
        table(question=["x", "\ud83d", "y"]),
        r"table, line 2, column 'question', value '\\ud83d': has a NUL byte or half of a character",
    ),
    "one choice": (
        table(b=["x", "", "y"], c="", d=""),
        "table, line 2, column 'id', value 'q2': fewer than two choices are filled",
    ),
    "an answer that is none": (
        table(answer=["e", "a", ""]),
        "table, line 1, column 'answer', value 'e': does not mean exactly one filled choice",
    ),
    "no answers": (table(answer=None), "has no row with an answer: nothing could be trained on"),
    "no image": (
        table(path=[picture(1), None, picture(3)]),
        "table, line 2, column 'path', value 'None': is neither the path of an image nor a PIL",
    ),
    "an absent file": (
        table(path=[picture(1), "/nowhere/2.png", picture(3)]),
        "table, line 2, column 'path', value '2.png': /nowhere/2.png: not a readable image",
    ),
}


@pytest.mark.parametrize(("frame", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_bad_table_is_refused_and_leaves_nothing(frame, message, tmp_path):
    with pytest.raises(vqa.DataError) as caught:
        vqa.write_competition(frame, tmp_path / "own")
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_letters_that_the_choices_contradict_are_refused(tmp_path):
    frame = table(a=["d", "d", "x"], b=["c", "c", "x"], c=["b", "b", "x"], d=["a", "a", "x"])
    with pytest.raises(vqa.DataError, match="table, line 1, .*may mean b .* or c .*write letters"):
        vqa.write_competition(frame, tmp_path / "own")
    with pytest.raises(vqa.DataError, match="may mean"):  # clear as numbers, not as letters
        vqa.write_competition(frame.assign(answer=["1", "2", ""]), tmp_path / "own")


def test_a_folder_that_is_there_is_never_written_to(tmp_path):
    with pytest.raises(vqa.DataError, match="exists already; delete it, or name a new folder"):
        vqa.write_competition(table(), tmp_path)


def test_a_table_of_answered_rows_alone_is_no_competition_of_its_own(tmp_path):
    folder = vqa.write_competition(table(answer=list("abc")), tmp_path / "own")
    with pytest.raises(vqa.DataError, match="test.csv, line 1: a header but no rows"):
        vqa.load_competition(folder)
