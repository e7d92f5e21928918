"""What a competition may bring, case by case: what it loads as, which fallback counts it, or how it is refused."""

import csv
import io
import stat
import tarfile
import tempfile
import unicodedata
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

import vqa_helpers as vqa

# ------------------------------------------------------------------------------------------------- a small competition


def picture(seed, size=(16, 12)):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    )


def encoded(image, kind="PNG", **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def lines(*rows, end="\n", encoding="utf-8"):
    """The bytes of a text file."""
    return "".join(row + end for row in rows).encode(encoding)


TRAIN = "id,path,question,a,b,c,d,answer"
R1 = "r1,train/1.png,무슨 색입니까?,빨강,파랑,노랑,초록,a"
R2 = "r2,train/2.png,몇 개입니까?,하나,둘,셋,넷,b"
TEST = "id,path,question,a,b,c,d"
T1 = "t1,test/1.png,어디에 있습니까?,왼쪽,오른쪽,위,아래"
T2 = "t2,test/2.png,무엇입니까?,개,고양이,새,말"
HEADERS = {"train": TRAIN, "test": TEST, "sample_submission": "id,answer"}


def table(name, *rows, header=None, **options):
    """The change that gives the table `name` these rows."""
    return {f"{name}.csv": lines(header or HEADERS[name], *rows, **options)}


BASE = {
    **table("train", R1, R2),
    **table("test", T1, T2),
    **table("sample_submission", "t1,", "t2,"),
    **{
        f"{split}/{n}.png": encoded(picture(seed + n))
        for split, seed in (("train", 0), ("test", 10))
        for n in (1, 2)
    },
}
COLUMNS = {"id", "image_path", "question", *"abcd", "type", "line"}
COLUMNS |= {"image_ok", "width", "height", "pixel_hash", "dhash"}


def write(root, changes):
    """Write the small competition with `changes`: bytes are a file, a Path is a link there, None removes the file."""
    for name, content in (BASE | changes).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            path.symlink_to(content)
        elif content is not None:
            path.write_bytes(content)
    return root


@dataclass
class Loads:
    """The competition loads with exactly these values in these columns, and exactly these fallbacks are counted."""

    counted: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    test: dict = field(default_factory=dict)
    sample: dict = field(default_factory=dict)
    size: tuple = None  # of the first training row's image
    pixels: list = None  # of the first training row's image, row by row

    def check(self, root):
        loaded = vqa.load_competition(root, max_fallback_share=0.5)
        assert set(loaded.test.columns) == COLUMNS
        assert set(loaded.train.columns) == COLUMNS | {"answer", "label"}
        for frame, wanted in (
            (loaded.train, self.train),
            (loaded.test, self.test),
            (loaded.sample, self.sample),
        ):
            assert {column: frame[column].tolist() for column in wanted} == wanted
        assert {name: count for name, count in loaded.fallbacks.items() if count} == self.counted
        if self.size or self.pixels:
            image = vqa.load_image(loaded.train["image_path"][0])
            assert image.mode == "RGB"
            assert self.size in (None, image.size)
            assert self.pixels in (
                None,
                [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()],
            )


class Refused:
    """The competition is refused by a DataError whose message holds all of these parts."""

    def __init__(self, *parts):
        self.parts = parts

    def check(self, root):
        with pytest.raises(vqa.DataError) as caught:
            vqa.load_competition(root, max_fallback_share=0)
        assert [part for part in self.parts if part not in str(caught.value)] == [], caught.value
        assert len(str(caught.value)) < 700 and "\n" not in str(caught.value), "too long to read"


def case(name, changes, outcome):
    return pytest.param(changes, outcome, id=name)


# ------------------------------------------------------------------------------------------------------ text and tables

THAI_SOUP = T1.replace(
    "어디에", "똠양꿍은 어디에"
)  # the first syllable is in cp949, but not in the older euc-kr

ENCODINGS = [
    case(
        "utf-8",
        {},
        Loads(
            train={"question": ["무슨 색입니까?", "몇 개입니까?"], "line": [2, 3], "label": [0, 1]}
        ),
    ),
    case(
        "utf-8 with a mark",
        table("train", R1, R2, encoding="utf-8-sig"),
        Loads(train={"id": ["r1", "r2"]}),
    ),
    case(
        "windows line ends",
        table("train", R1, R2, end="\r\n"),
        Loads(train={"answer": ["a", "b"], "line": [2, 3]}),
    ),
    case(
        "old mac line ends",
        table("train", R1, R2, end="\r"),
        Loads(train={"answer": ["a", "b"], "line": [2, 3]}),
    ),
    case(
        "no line end at the end",
        {"test.csv": lines(TEST, T1, T2)[:-1]},
        Loads(test={"d": ["아래", "말"]}),
    ),
    case(
        "cp949 is counted",
        table("test", THAI_SOUP, T2, encoding="cp949"),
        Loads(
            {"csv_read_as_cp949": 1},
            test={"question": ["똠양꿍은 어디에 있습니까?", "무엇입니까?"]},
        ),
    ),
    case(
        "every table in cp949",
        table("train", R1, R2, encoding="cp949") | table("test", T1, T2, encoding="cp949"),
        Loads({"csv_read_as_cp949": 2}, train={"c": ["노랑", "셋"]}, test={"c": ["위", "새"]}),
    ),
    case(
        "utf-16",
        table("train", R1, encoding="utf-16"),
        Refused(
            "train.csv, line 1: not UTF-8", "byte 0xff in position 0", "nor cp949; save it as UTF-8"
        ),
    ),
    case(
        "utf-16 of ascii text without a mark",
        table("sample_submission", "t1,", "t2,", encoding="utf-16-le"),
        Refused(
            "sample_submission.csv, line 1: a NUL byte, as in a file that is not UTF-8",
            "the encoding",
        ),
    ),
    case(
        "latin-1",
        table("test", "t1,test/1.png,Où est le café ?,à gauche,b,c,d", encoding="latin-1"),
        Refused("test.csv, line 2: not UTF-8", "byte 0xf9", "save it as UTF-8"),
    ),
    case(
        "latin-1 that happens to decode as cp949, but not to Korean",
        table("test", "t1,test/1.png,Welche Größe?,a,b,c,d", encoding="latin-1"),
        Refused("test.csv, line 2: not UTF-8", "byte 0xf6", "save it as UTF-8"),
    ),
    case(
        "one damaged byte in utf-8",
        {"train.csv": lines(TRAIN, R1, R2).replace("넷".encode(), "넷".encode()[:2])},
        Refused("train.csv, line 3: not UTF-8", "save it as UTF-8"),
    ),
]

COLUMN_NAMES = [
    case(
        "other case and spaces",
        table("train", R1, header=" ID ,Path, QUESTION,A,b ,C,d,Answer"),
        Loads(train={"id": ["r1"], "a": ["빨강"], "label": [0]}),
    ),
    case(
        "image means path",
        table("train", R1, header=TRAIN.replace("path", "Image")),
        Loads(train={"id": ["r1"], "width": [16]}),
    ),
    case(
        "another order",
        table(
            "train",
            "a,넷,셋,둘,하나,몇 개?,train/1.png,r1",
            header="answer,d,c,b,a,question,path,id",
        ),
        Loads(train={"id": ["r1"], "a": ["하나"], "d": ["넷"], "label": [0]}),
    ),
    case(
        "extra columns are left out",
        table("train", "7," + R1 + ",x", header=f"Line,{TRAIN},width"),
        Loads(train={"id": ["r1"], "line": [2], "width": [16]}),
    ),
    case(
        "a comma at the end of every line",
        table("train", R1 + ",", R2 + ",", header=TRAIN + ","),
        Loads(train={"label": [0, 1]}),
    ),
    case(
        "blank lines before it", table("train", TRAIN, R1, header="\n"), Loads(train={"line": [4]})
    ),
    case(
        "a missing column",
        {"train.csv": lines(TEST, T1)},
        Refused(
            "train.csv, line 1: columns ['answer'] are missing or double",
            "correct the header ['id', 'path'",
        ),
    ),
    case(
        "a double column in other case",
        table("train", R1 + ",x", header=TRAIN + ",A"),
        Refused(
            "train.csv, line 1: columns ['a'] are missing or double", "correct the header ['id', "
        ),
    ),
    case(
        "path and image",
        table("train", R1 + ",x", header=TRAIN + ",image"),
        Refused("train.csv, line 1: columns ['path']", "('image' means 'path')"),
    ),
    case(
        "a double answer in the test file",
        table("test", T1 + ",a,b", header=TEST + ",answer,answer"),
        Refused("test.csv, line 1: columns ['answer'] are missing or double"),
    ),
    case(
        "semicolons",
        {"test.csv": lines(TEST, T1).replace(b",", b";")},
        Refused(
            "test.csv, line 1: columns ['id', 'path', 'question', 'a', 'b', 'c', 'd']",
            "['id;path;question",
        ),
    ),
    case(
        "no line ends at all",
        {"train.csv": b"x," * 99999},
        Refused("train.csv, line 1: columns ['id', 'path'"),
    ),
    case(
        "a long field in a short row",
        table("train", "x" * 9999 + ","),
        Refused("train.csv, line 2, row 'xxx", "2 fields but 8"),
    ),
    case(
        "an empty file",
        {"train.csv": b""},
        Refused("train.csv, line 1: columns ['id', ", "correct the header []"),
    ),
    case(
        "no rows",
        table("train"),
        Refused("train.csv, line 1: a header but no rows; download the file again"),
    ),
    case(
        "no file",
        {"test.csv": None},
        Refused("test.csv: no such file; set data_dir to the folder with train.csv,"),
    ),
]

ROWS = [
    case(
        "a short row",
        table("train", R1, R2.removesuffix(",b")),
        Refused(
            "train.csv, line 3, row 'r2': 7 fields but 8 columns; correct it, with quotes around commas"
        ),
    ),
    case(
        "an extra field",
        table("train", R1, R2 + ",b"),
        Refused("train.csv, line 3, row 'r2': 9 fields but 8 columns"),
    ),
    case(
        "a comma at the end",
        table("train", R1 + ","),
        Refused("train.csv, line 2, row 'r1': 9 fields but 8 columns"),
    ),
    case(
        "an unquoted comma",
        table("test", T1.replace("위", "위,옆")),
        Refused("test.csv, line 2, row 't1': 8 fields but 7"),
    ),
    case(
        "a shift to the right",
        table("train", "," + R1),
        Refused("train.csv, line 2, row '': 9 fields but 8 columns"),
    ),
    case(
        "a shift to the left within the width",
        table("train", R1.removeprefix("r1,") + ","),
        Refused("train.csv, line 2, column 'answer', value '': no answer"),
    ),
    case(
        "a line of spaces",
        table("train", R1, "   "),
        Refused("train.csv, line 3, row '   ': 1 fields but 8 columns"),
    ),
    case(
        "blank lines",
        table("train", "", R1, "", "", R2, ""),
        Loads(train={"id": ["r1", "r2"], "line": [3, 6]}),
    ),
    case(
        "commas, quotes and line ends within quotes",
        table("train", R1.replace("무슨 색입니까?", '"가, ""나""\r\n다"'), R2),
        Loads(train={"question": ['가, "나"\r\n다', "몇 개입니까?"], "line": [2, 4]}),
    ),
    case(
        "a quote within a field",
        table("train", R1.replace("빨강", '5" 화면')),
        Loads(train={"a": ['5" 화면']}),
    ),
    case(
        "a quote that is never closed",
        table("train", R1, R2.replace("하나", '"하나')),
        Refused("train.csv, line 3: unexpected end of data; check the quotes from here on"),
    ),
    case(
        "text after a closing quote",
        table("train", R1.replace("빨강", '"빨강"색'), R2),
        Refused("train.csv, line 2: ',' expected after '\"'; check the quotes from here on"),
    ),
    case(
        "a quote that swallows a very long rest",
        table("train", R1.replace("빨강", '"빨강'), *[R2] * 4000),
        Refused(
            "train.csv, line 2: field larger than field limit", "check the quotes from here on"
        ),
    ),
    case(
        "a NUL byte",
        table("train", R1, R2.replace("둘", "\0")),
        Refused("train.csv, line 3: a NUL byte", "check the quotes from here on and the encoding"),
    ),
]

IDS = [
    case(
        "ids are text",
        table("train", "007" + R1[2:], "1e5" + R2[2:]),
        Loads(train={"id": ["007", "1e5"]}),
    ),
    case(
        "a repeated id",
        table("train", R1, R2, "r1" + R2[2:]),
        Refused(
            "train.csv, line 4, column 'id', value 'r1': is blank or repeats an earlier row's; give each row its own"
        ),
    ),
    case(
        "a blank id",
        table("train", R1, " " + R2[2:]),
        Refused("train.csv, line 3, column 'id', value ' ': is blank"),
    ),
    case(
        "a repeated id after a field of two lines",
        table("train", R1.replace("무슨", '"무\n슨').replace("?", '?"'), R1),
        Refused("train.csv, line 4, column 'id', value 'r1'"),
    ),
    case(
        "a repeated test id",
        table("test", T1, T2, T2),
        Refused("test.csv, line 4, column 'id', value 't2'"),
    ),
]

VERBATIM = [
    "None",
    "NA",
    "nan",
    "NULL",
    "#N/A",
    "007",
    "1e5",
    "1.0",
    "TRUE",
    "-0",
    " 다섯 ",
    "=1+1",
    "é",
    "e\u0301",
]
CHOICES = [
    case(
        f"the text {text!r} is kept",
        table("train", R2.replace("셋", text)),
        Loads(train={"c": [text], "a": ["하나"]}),
    )
    for text in VERBATIM
] + [
    case(
        "a choice with a comma",
        table("train", R2.replace("셋", '"1,000"')),
        Loads(train={"c": ["1,000"]}),
    ),
    case(
        "a blank choice",
        table("train", R2.replace("셋", " ")),
        Loads(train={"c": [" "], "label": [1]}),
    ),
    case(
        "two choices",
        table("test", T1.replace("위,아래", ","), T2),
        Loads(test={"c": ["", "새"], "d": ["", "말"]}),
    ),
    case(
        "one choice",
        table("test", "t1,test/1.png,q, ,하나,,", T2),
        Refused(
            "test.csv, line 2, column 'id', value 't1': fewer than two choices are filled; complete the row"
        ),
    ),
    case(
        "equal choices are counted",
        table("train", R1.replace("초록", "파랑 "), R2)
        | table("test", T1.replace("위,아래", "왼쪽,"), T2),
        Loads({"train_repeated_choices": 1, "test_repeated_choices": 1}),
    ),
    case(
        "a blank question is counted",
        table("test", T1.replace("어디에 있습니까?", " "), T2),
        Loads({"test_blank_question": 1}, test={"question": [" ", "무엇입니까?"]}),
    ),
]


def answers(choices, *texts):
    """A training file with these choices and answers."""
    return table("train", *[f"r{n},train/1.png,q,{choices},{text}" for n, text in enumerate(texts)])


def labels(*numbers):
    return Loads(train={"label": list(numbers), "answer": ["abcd"[number] for number in numbers]})


def doubtful(line, answer):
    reason = "does not mean exactly one filled choice; write its letter a-d"
    return Refused(f"train.csv, line {line}, column 'answer', value {answer!r}: {reason}")


NFC, NFD = (unicodedata.normalize(form, "빨강") for form in ("NFC", "NFD"))
ANSWERS = [
    case("letters", answers("w,x,y,z", "a", "b", "c", "d"), labels(0, 1, 2, 3)),
    case("capital letters and spaces", answers("w,x,y,z", "A", " B ", "D"), labels(0, 1, 3)),
    case("letters in brackets", answers("w,x,y,z", "(a)", "b)", "(C)"), labels(0, 1, 2)),
    case("letters with a full stop", answers("w,x,y,z", "a.", "D."), labels(0, 3)),
    case("full-width and circled letters", answers("w,x,y,z", "ａ", "Ｂ", "ⓒ"), labels(0, 1, 2)),
    case("numbers", answers("w,x,y,z", "1", " 4", "(2)", "３", "④"), labels(0, 3, 1, 2, 3)),
    case("texts of choices", answers("빨강,파랑,노랑,초록", "파랑", " 초록 "), labels(1, 3)),
    case(
        "a text in another Unicode form",
        answers(f"{NFC},파랑,노랑,초록", NFD, "파랑"),
        labels(0, 1),
    ),
    case("letters, then texts", answers("w,x,y,z", "a", "y", "z"), labels(0, 2, 3)),
    case(
        "letters that are also texts: all are letters", answers("B,a,o,ab", "b", "a"), labels(1, 0)
    ),
    case("numbers that are texts: 7 is no position", answers("7,2,5,9", "2", "7"), labels(1, 0)),
    case("positions that agree with the texts", answers("1,2,3,4", "1", "2"), labels(0, 1)),
    case("a position that is another choice's text", answers("3,2,1,4", "3"), doubtful(2, "3")),
    case("outside the letters", answers("w,x,y,z", "a", "e"), doubtful(3, "e")),
    case("outside the positions", answers("w,x,y,z", "1", "5"), doubtful(3, "5")),
    case("counted from 0", answers("w,x,y,z", "0", "3"), doubtful(2, "0")),
    case("a decimal number", answers("w,x,y,z", "1.0"), doubtful(2, "1.0")),
    case("two letters", answers("w,x,y,z", "a", "a b"), doubtful(3, "a b")),
    case("a number among letters", answers("w,x,y,z", "a", "1"), doubtful(3, "1")),
    case("a text that two choices have", answers("같다,같다,y,z", "같다"), doubtful(2, "같다")),
    case("a letter that is another choice's text", answers("b,w,y,z", "z", "b"), doubtful(3, "b")),
    case("the letter of a blank choice", answers("w,x,y, ", "a", "d"), doubtful(3, "d")),
    case("the letter of a blank choice and a text", answers(",w,a,y", "w", "a"), doubtful(3, "a")),
    case(
        "a long text is cut in the message", answers("w,x,y,z", "가" * 999), doubtful(2, "가" * 80)
    ),
    case(
        "none is dropped and counted",
        answers("w,x,y,z", "a", " "),
        Loads({"train_blank_answer": 1}, {"id": ["r0"]}),
    ),
    case(
        "none above the share",
        answers("w,x,y,z", "a", "b", ""),
        Refused(
            "train.csv, line 4, column 'answer', value '': no answer; blank_answer in 1 of 3 rows",
            "repair it or raise max_fallback_share=0",
        ),
    ),
]

ONLY_HERE = "is only in this file; take test.csv and sample_submission.csv from one download"
SAMPLES = [
    case(
        "another order and other column names",
        table("sample_submission", "t2,c", "t1,", header="Id, Answer"),
        Loads(sample={"Id": ["t2", "t1"], "Answer": ["c", ""]}),
    ),
    case(
        "an extra id",
        table("sample_submission", "t1,", "t2,", "t9,"),
        Refused(f"sample_submission.csv, line 4, column 'id', value 't9': {ONLY_HERE}"),
    ),
    case(
        "a missing id",
        table("sample_submission", "t1,"),
        Refused(f"test.csv, line 3, column 'id', value 't2': {ONLY_HERE}"),
    ),
    case(
        "an id with a space",
        table("sample_submission", "t1,", "t2 ,"),
        Refused("sample_submission.csv, line 3, column 'id', value 't2 ': is only in this file"),
    ),
    case(
        "a repeated id",
        table("sample_submission", "t1,", "t2,", "t1,"),
        Refused("sample_submission.csv, line 4, column 'id', value 't1'"),
    ),
    case(
        "columns in another order",
        table("sample_submission", ",t1", ",t2", header="answer,id"),
        Refused(
            "sample_submission.csv, line 1: the columns must be id, answer; correct ['answer', 'id']"
        ),
    ),
    case(
        "an extra column",
        table("sample_submission", "t1,,x", "t2,,x", header="id,answer,note"),
        Refused(
            "sample_submission.csv, line 1: the columns must be id, answer; correct ['id', 'answer', 'note']"
        ),
    ),
    case(
        "answers in the test file are ignored and counted",
        table("test", T1 + ",a", T2 + ", ", header=TEST + ",answer"),
        Loads({"test_answer_ignored": 1}, test={"id": ["t1", "t2"]}),
    ),
    case(
        "an unreadable answer in the test file too",
        table("test", T1 + ",x", T2 + ",9", header=TEST + ",answer"),
        Loads({"test_answer_ignored": 2}),
    ),
]

# --------------------------------------------------------------------------------------------------------------- images

BLACK, GREY, WHITE, RED = (0, 0, 0), (128, 128, 128), (255, 255, 255), (255, 0, 0)
RAMP = np.array([[0, 128, 255]])
FRAMES = [Image.new("RGB", (1, 1), colour) for colour in (RED, BLACK)]


def first_image(content, *, name="train/1.png"):
    return {name: content}


def array_image(values, kind, **options):
    return first_image(encoded(Image.fromarray(values), kind, **options))


def rotated():
    """A white image with one black corner, and the note of a camera that was held sideways."""
    image = Image.new("RGB", (2, 1), "white")
    image.putpixel((0, 0), BLACK)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    return encoded(image, exif=exif)


def bitmap_that_claims(width, height):
    content = bytearray(encoded(Image.new("1", (8, 8)), "BMP"))
    content[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    return bytes(content)


DROPPED = Loads({"train_unusable_image": 1}, train={"id": ["r2"], "image_ok": [True]})
UNUSABLE = "train.csv, line 2, column 'path', value 'train/1.png': "
IMAGES = [
    case("a missing file is dropped and counted", first_image(None), DROPPED),
    case("an empty file is dropped and counted", first_image(b""), DROPPED),
    case("a web page is dropped and counted", first_image(b"<html>404</html>"), DROPPED),
    case(
        "a truncated file is dropped and counted", first_image(BASE["train/1.png"][:-200]), DROPPED
    ),
    case("a folder is dropped and counted", first_image(None) | {"train/1.png/x": b""}, DROPPED),
    case("a link to itself is dropped and counted", first_image(Path("1.png")), DROPPED),
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
        first_image(None),
        Refused(
            UNUSABLE, "No such file", "unusable_image in 1 of 2 rows", "raise max_fallback_share=0"
        ),
    ),
    case(
        "a web page above the share",
        first_image(b"<html>404</html>"),
        Refused(UNUSABLE, "not a readable image (UnidentifiedImageError", "replace the file"),
    ),
    case(
        "a format that starts an outside program",
        first_image(encoded(picture(1), "EPS")),
        Refused(UNUSABLE, "not a readable image (UnidentifiedImageError"),
    ),
    case(
        "a decompression bomb is refused by its header",
        first_image(bitmap_that_claims(20000, 20000)),
        Refused(UNUSABLE, "DecompressionBombError", "400000000 pixels"),
    ),
    case(
        "a strip that no model takes",
        first_image(encoded(Image.new("L", (2010, 10)))),
        Refused(UNUSABLE, "its sides (2010, 10) differ more than 200 to 1; crop it"),
    ),
    case("a long strip", first_image(encoded(Image.new("L", (2000, 10)))), Loads(size=(2000, 10))),
    case("one pixel", first_image(encoded(Image.new("RGB", (1, 1), RED))), Loads(pixels=[RED])),
    case(
        "a JPEG of 123 megapixels is bounded",
        first_image(encoded(Image.new("L", (12300, 10000)), "JPEG")),
        Loads(train={"width": [4096, 16], "height": [3330, 12]}),
    ),
    case(
        "CMYK",
        first_image(encoded(Image.new("CMYK", (1, 1), (0, 0, 0, 255)), "TIFF")),
        Loads(pixels=[BLACK]),
    ),
    case(
        "CMYK JPEG", first_image(encoded(Image.new("CMYK", (1, 1)), "JPEG")), Loads(pixels=[WHITE])
    ),
    case("one bit", first_image(encoded(Image.new("1", (1, 1), 1))), Loads(pixels=[WHITE])),
    case(
        "clear pixels lie on white",
        first_image(encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 0)))),
        Loads(pixels=[WHITE]),
    ),
    case(
        "half clear black lies on white",
        first_image(encoded(Image.new("LA", (1, 1), (0, 128)))),
        Loads(pixels=[(127,) * 3]),
    ),
    case(
        "palette",
        first_image(encoded(Image.new("RGB", (1, 1), RED).quantize(2))),
        Loads(pixels=[RED]),
    ),
    case(
        "palette with a clear colour",
        first_image(encoded(Image.new("P", (1, 1)), transparency=0)),
        Loads(pixels=[WHITE]),
    ),
    case(
        "a clear colour",
        first_image(encoded(Image.new("RGB", (1, 1), (9, 8, 7)), transparency=(9, 8, 7))),
        Loads(pixels=[WHITE]),
    ),
    case(
        "16-bit grey",
        array_image((RAMP * 257).astype(np.uint16), "PNG"),
        Loads(pixels=[BLACK, GREY, WHITE]),
    ),
    case(
        "dark 16-bit grey stays dark",
        array_image(np.array([[0, 25700]], np.uint16), "PNG"),
        Loads(pixels=[BLACK, (100,) * 3]),
    ),
    case(
        "8 bits in 32",
        array_image(RAMP.astype(np.int32), "TIFF"),
        Loads(pixels=[BLACK, GREY, WHITE]),
    ),
    case(
        "16 bits in 32",
        array_image((RAMP * 257).astype(np.int32), "TIFF"),
        Loads(pixels=[BLACK, GREY, WHITE]),
    ),
    case(
        "floats up to 1",
        array_image((RAMP / 255).astype(np.float32), "TIFF"),
        Loads(pixels=[BLACK, GREY, WHITE]),
    ),
    case(
        "floats below 0",
        array_image((RAMP - 300).astype(np.float32), "TIFF"),
        Loads(pixels=[BLACK, GREY, WHITE]),
    ),
    case(
        "floats with NaN",
        array_image(np.array([[np.nan, 1]], np.float32), "TIFF"),
        Loads(pixels=[BLACK, WHITE]),
    ),
    case(
        "equal floats below 0",
        array_image(np.full((1, 1), -5, np.float32), "TIFF"),
        Loads(pixels=[BLACK]),
    ),
    case(
        "the first frame of an animation",
        first_image(encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:])),
        Loads(pixels=[RED]),
    ),
    case(
        "camera rotation is applied",
        first_image(rotated()),
        Loads(size=(1, 2), pixels=[BLACK, WHITE]),
    ),
]

# ---------------------------------------------------------------------------------------------------------------- paths

ONE = encoded(Image.new("RGB", (7, 5), RED))
HERE = {"here.png": ONE}
SECRET = {"../secret.png": ONE}
MOVED = {"image_found_under_other_spelling": 1}
FOUND = Loads(size=(7, 5))
OUTSIDE = "is a URL or leads out of the data folder; copy it there"


def path(text):
    """A training file of one row with this path."""
    return table("train", R1.replace("train/1.png", text))


PATHS = (
    [
        case("in the data folder", path("here.png") | HERE, FOUND),
        case("in images", path("sub/here.png") | {"images/sub/here.png": ONE}, FOUND),
        case("in the split's folder", path("here.png") | {"train/here.png": ONE}, FOUND),
        case("with a backslash", path("train\\here.png") | {"train/here.png": ONE}, FOUND),
        case("with dots that stay inside", path("./train/../here.png ") | HERE, FOUND),
        case(
            "a link that stays inside",
            path("link.png") | HERE | {"link.png": Path("here.png")},
            FOUND,
        ),
        case(
            "the data folder before images",
            path("here.png") | HERE | {"images/here.png": BASE["train/1.png"]},
            FOUND,
        ),
        case(
            "other case",
            path("Train/HERE.png") | {"train/here.PNG": ONE},
            Loads(MOVED, size=(7, 5)),
        ),
        case(
            "composed name, decomposed file",
            path(f"{NFC}.png") | {f"{NFD}.png": ONE},
            Loads(MOVED, size=(7, 5)),
        ),
        case(
            "decomposed name, composed file",
            path(f"{NFD}.png") | {f"train/{NFC}.png": ONE},
            Loads(MOVED, size=(7, 5)),
        ),
        case(
            "two files in other case: no guess",
            path("x.PNG") | {"x.png": ONE, "X.png": ONE},
            Refused(
                "train.csv, line 2, column 'path', value 'x.PNG': ",
                "No such file",
                "unusable_image in 1 of 1 rows",
            ),
        ),
        case(
            "images before the split's folder",
            path("x.png") | {"images/x.png": ONE, "train/x.png": b""},
            FOUND,
        ),
        case(
            "blank",
            path(" "),
            Refused(
                "train.csv, line 2, column 'path', value ' ': ", "unusable_image in 1 of 1 rows"
            ),
        ),
        case(
            "too long a name",
            path("x" * 300),
            Refused("train.csv, line 2, column 'path', value 'xxx", "unusable_image in 1 of 1"),
        ),
    ]
    + [
        case(
            name,
            path(text) | SECRET,
            Refused(f"train.csv, line 2, column 'path', value {text!r}: {OUTSIDE}"),
        )
        for name, text in {
            "upwards": "../secret.png",
            "down and upwards": "train/../../secret.png",
            "upwards with backslashes": "..\\secret.png",
            "absolute": "/etc/passwd",
            "a drive": "C:\\x.png",
            "a network share": "//host/share/x.png",
            "a web address": "http://host/x.png",
            "a file address after a space": " file:///x.png",
            "data": "data:image/png;base64;AAAA",
        }.items()
    ]
    + [
        case(
            "a link that leads out",
            path("link.png") | SECRET | {"link.png": Path("../secret.png")},
            Refused(f"train.csv, line 2, column 'path', value 'link.png': {OUTSIDE}"),
        ),
        case(
            "a folder that leads out",
            path("folder/secret.png") | SECRET | {"folder": Path("..")},
            Refused(f"train.csv, line 2, column 'path', value 'folder/secret.png': {OUTSIDE}"),
        ),
    ]
)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("changes", "outcome"),
    ENCODINGS + COLUMN_NAMES + ROWS + IDS + CHOICES + ANSWERS + SAMPLES + IMAGES + PATHS,
)
def test_a_competition_loads_exactly_or_is_refused_by_name(tmp_path, changes, outcome):
    outcome.check(write(tmp_path / "data", changes))


# ----------------------------------------------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def processor():
    return vqa.load_processor(vqa.Config.preset("demo"))


def control_tokens(processor, row):
    """How often each control token of the tokenizer occurs in the prompt of a row whose image takes one token."""
    ids = vqa.encode_prompt(processor, vqa.build_messages(row), (1, 2, 2)).tolist()
    return {
        str(token): ids.count(number)
        for number, token in processor.tokenizer.added_tokens_decoder.items()
    }


@pytest.mark.parametrize("column", ["question", "c"])
@pytest.mark.parametrize(
    "token",
    [
        "<|im_end|>",
        "<|im_start|>",
        "<|endoftext|>",
        "<|image_pad|>",
        "<|vision_start|>",
        "<|video_pad|>",
    ]
    + [
        "<|object_ref_start|>",
        "<|fim_prefix|>",
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_response>",
    ],
)
def test_a_control_token_in_the_data_is_counted_and_stays_text(tmp_path, processor, token, column):
    plain = vqa.load_competition(write(tmp_path / "plain", {})).train.iloc[1]
    text = f"앞{token}뒤"
    noisy = table("train", R1, R2.replace(plain[column], text))
    loaded = vqa.load_competition(write(tmp_path / "noisy", noisy))
    row = loaded.train.iloc[1]
    assert row[column] == text
    assert +loaded.fallbacks == {"train_special_tokens_neutralised": 1}
    prompt = vqa.render_prompt(processor, vqa.build_messages(row))
    assert f"앞< {token[1:-1]} >뒤" in prompt
    assert prompt.count("<|image_pad|>") == 1
    assert control_tokens(processor, row) == control_tokens(processor, plain)
    assert control_tokens(processor, row)["<|image_pad|>"] == 1


def test_no_choice_is_cut_from_an_over_long_prompt(tmp_path, processor):
    long = {
        letter: f"{letter}의 시작 " + "아주 긴 보기 " * 400 + f"{letter}의 끝" for letter in "abcd"
    }
    row = ",".join(["r1", "train/1.png", "아주 긴 질문 " * 4000, *long.values(), "d"])
    loaded = vqa.load_competition(write(tmp_path, table("train", row)))
    ids = vqa.encode_prompt(processor, vqa.build_messages(loaded.train.iloc[0]), (1, 2, 2))
    text = processor.tokenizer.decode(ids)
    assert [letter for letter in "abcd" if f"\n{letter}. {long[letter]}" not in text] == []
    assert text.endswith("<|im_start|>assistant\n")


# ------------------------------------------------------------------------------------------------------------- archives


def make_zip(path, name="more.txt", content=b"more", kind=0, size=None):
    """A zip file of the small competition and one more member; `size`: what it claims to be unpacked."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in BASE.items():
            archive.writestr(member, data)
        last = zipfile.ZipInfo(name)
        last.external_attr, last.compress_type = kind << 16, zipfile.ZIP_DEFLATED
        archive.writestr(last, content)
        last.file_size = size or len(content)


def make_tar(
    path, name="more.txt", content=b"more", kind=tarfile.REGTYPE, target="", size=None, mode="w:gz"
):
    """The same as a tar file."""
    with tarfile.open(path, mode) as archive:
        for member, data in {**BASE, name: content}.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            if member == name:
                info.type, info.linkname, info.size = kind, target, size or len(data)
            archive.addfile(info, None if size and member == name else io.BytesIO(data))


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


OUT = "is a link or a device, or its name leads out of the folder"
ESCAPES = {
    "upwards": "../x",
    "down and upwards": "a/../../x",
    "absolute": "/tmp/x",
    "a drive": "C:/x",
}
ESCAPES |= {"upwards with backslashes": "..\\x", "with a backslash": "a\\x", "only dots": ".."}
UNSAFE = [
    pytest.param(make, {"name": name}, [f"member {name!r} {OUT}"], id=f"{make.__name__}: {label}")
    for make in (make_zip, make_tar)
    for label, name in ESCAPES.items()
] + [
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
    *(
        pytest.param(
            make,
            {"content": bytes(101 * 2**20)},
            [
                "member 'more.txt' is number 8 and makes 105,9",
                "the limit is 2,000,000 and 104,857,600 (decompression bomb)",
            ],
            id=f"{make.__name__}: a bomb",
        )
        for make in (make_zip, make_tar)
    ),
    pytest.param(
        make_zip,
        {"size": 65 * 2**30},
        ["member 'more.txt' is number 8 and makes 69,793,2", "the limit is 2,000,000 and "],
        id="make_zip: beyond 64 GiB",
    ),
    pytest.param(
        make_tar,
        {"size": 65 * 2**30},
        ["member 'more.txt' is number 8 and makes 69,793,2", "the limit is 2,000,000 and "],
        id="make_tar: beyond 64 GiB",
    ),
]


@pytest.mark.parametrize(("make", "options", "parts"), UNSAFE)
def test_an_unsafe_archive_is_refused_and_leaves_nothing(tmp_path, make, options, parts):
    make(tmp_path / "archive", **options)
    with pytest.raises(vqa.DataError) as caught:
        vqa.unpack_archive(tmp_path / "archive", tmp_path / "data")
    parts = [str(tmp_path / "archive"), *parts, "download it again, or unpack it by hand"]
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


def encrypt(content):
    """Mark the first member as encrypted where the directory at the end of a zip file describes it."""
    at = content.index(b"PK\1\2") + 8
    return content[:at] + b"\1" + content[at + 1 :]


def wrong_sum(content):
    return content[:-8] + bytes(4) + content[-4:]


def plain_tar(path):
    make_tar(path, mode="w", content=bytes(600))


def up_to_the_last(content):
    return content[: content.index(b"more.txt")]


def rename_a_member(content):
    """Without the new checksum that a renamed member would need."""
    return content.replace(b"more.txt", b"less.txt")


def name_in_cp949(content):
    """A name as old Windows programs wrote it, without a note of its encoding."""
    return content.replace(b"more.txt", "가나".encode("cp949") + b".txt")


@pytest.mark.parametrize(
    ("make", "damage", "reason"),
    [
        pytest.param(make_zip, lambda content: None, "FileNotFoundError", id="missing"),
        pytest.param(make_zip, lambda content: b"<html>", "ReadError", id="a web page"),
        pytest.param(make_zip, lambda content: content[:-30], "ReadError", id="a truncated zip"),
        pytest.param(make_tar, lambda content: content[:-30], "EOFError", id="a truncated tar.gz"),
        pytest.param(
            make_tar,
            wrong_sum,
            "BadGzipFile: CRC check failed",
            id="a tar.gz with a wrong checksum",
        ),
        pytest.param(
            plain_tar,
            up_to_the_last,
            "the end of the archive is missing",
            id="a tar without its last member",
        ),
        pytest.param(
            plain_tar, rename_a_member, "a member is damaged", id="a tar with a damaged member"
        ),
        pytest.param(
            make_zip, name_in_cp949, "UnicodeDecodeError", id="a name of unknown encoding"
        ),
        pytest.param(
            make_zip,
            lambda content: content[:60] + b"?" + content[61:],
            "",
            id="damaged bytes in a zip",
        ),
        pytest.param(make_zip, encrypt, "is encrypted, password required", id="a password"),
    ],
)
def test_a_damaged_archive_is_refused_and_leaves_nothing(tmp_path, make, damage, reason):
    archive = tmp_path / "archive"
    make(archive)
    content = damage(archive.read_bytes())
    archive.unlink()
    if content:
        archive.write_bytes(content)
    with pytest.raises(vqa.DataError) as caught:
        vqa.unpack_archive(archive, tmp_path / "data")
    assert f"{archive}: not unpacked (" in str(caught.value) and reason in str(caught.value)
    assert not (tmp_path / "data").exists() and not list(tmp_path.glob(".*"))


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
        patch.setattr(
            zipfile.ZipFile, "extractall", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            vqa.unpack_archive(tmp_path / "archive", tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]
    assert unpacked(vqa.unpack_archive(tmp_path / "archive", tmp_path / "data")).keys() == {
        *BASE,
        "more.txt",
    }


# ------------------------------------------------------------------------------------------------------- random damage

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
    rows[at : at + 1] = [[], [rows[pick(len(rows))]], [rows[at]] * 2][pick(3)]
    files[name] = b"\n".join(rows)


def rearrange_columns(files, pick):
    """Delete a column, repeat it, or replace it by another one."""
    name = TABLES[pick(len(TABLES))]
    order, at = list(range(8)), pick(8)
    order[at : at + 1] = [[], [at, at], [pick(8)]][pick(3)]
    rows = [row.split(b",") for row in files[name].split(b"\n")]
    files[name] = b"\n".join(
        b",".join(fields[n] for n in order if n < len(fields)) for fields in rows
    )


def change_field(files, pick):
    name = TABLES[pick(len(TABLES))]
    rows = [row.split(b",") for row in files[name].split(b"\n")]
    fields = rows[pick(len(rows))]
    fields[pick(len(fields))] = FIELDS[pick(len(FIELDS))].encode()
    files[name] = b"\n".join(b",".join(fields) for fields in rows)


def damage_picture(files, pick):
    name = PICTURES[pick(len(PICTURES))]
    content = files.pop(name, b"")
    files[name] = [splice(content, pick), content[: pick(len(content) + 1)], b"<html>404</html>"][
        pick(3)
    ]


def move_picture(files, pick):
    """Remove a picture, or give it another name."""
    name = PICTURES[pick(len(PICTURES))]
    content = files.pop(name, b"")
    files |= [{}, {name.upper(): content}, {f"images/{name}": content}, {name[-5:]: content}][
        pick(4)
    ]


DAMAGES = [
    *(damage_table, recode_table, rearrange_rows, rearrange_columns),
    *(change_field, damage_picture, move_picture),
]


def records(content):
    """The rows of a CSV file as Python's own reader has them, under plain column names."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp949")
    (_, *header), *rows = (
        [None, *fields] for fields in csv.reader(io.StringIO(text, newline="")) if fields
    )
    names = [name.strip().casefold().replace("image", "path") for name in header]
    return [dict(zip(names, fields[1:], strict=True)) for fields in rows]


def assert_loaded_truthfully(files, root, loaded):
    """Every value is the file's own, every row is there or was counted out, and every label and image makes sense."""
    test, every = (
        records(files["test.csv"]),
        {row["id"]: row for row in records(files["train.csv"])},
    )
    for frame, rows in (
        (loaded.test, test),
        (loaded.train, [every[name] for name in loaded.train["id"]]),
    ):
        assert frame.index.tolist() == list(range(len(rows)))
        assert frame["line"].is_monotonic_increasing
        for column in ("id", "question", *"abcd"):
            assert frame[column].tolist() == [row[column] for row in rows]
        assert ((frame[[*"abcd"]].map(str.strip) != "").sum(axis=1) >= 2).all()
        for row, path in zip(rows, frame["image_path"], strict=True):
            inside = Path(path).resolve().is_relative_to(root.resolve())
            assert path == vqa.GREY_IMAGE or (
                inside and Path(path).name.lower() == Path(row["path"].strip()).name.lower()
            )
        assert (frame["image_path"][~frame["image_ok"]] == vqa.GREY_IMAGE).all()
        assert (frame.loc[frame["image_ok"], "pixel_hash"] != "").all()
    lost = loaded.fallbacks["train_blank_answer"] + loaded.fallbacks["train_unusable_image"]
    assert (
        len(loaded.train) == len(every) - lost
        and loaded.train["id"].is_unique
        and loaded.train["image_ok"].all()
    )
    assert loaded.fallbacks["test_unusable_image"] == (~loaded.test["image_ok"]).sum()
    for _, row in loaded.train.iterrows():
        written, text = every[row["id"]]["answer"].strip(), row[row["answer"]].strip()
        assert row["answer"] == "abcd"[row["label"]] and text
        assert (
            written.lower().strip("().") in (row["answer"], str(row["label"] + 1))
            or written == text
        )
    assert sorted(loaded.sample.iloc[:, 0]) == sorted(loaded.test["id"])


FOUR = {  # four rows a split, so that some can be lost
    **table("train", R1, R2, "r3,train/1.png,q,1,2,3,4,c", 'r4,train/2.png,"q, q",가,나,,,a'),
    **table("test", T1, T2, "t3,test/1.png,q,1,2,3,4", "t4,test/2.png,q,가,나,,"),
    **table("sample_submission", "t1,", "t2,", "t3,", "t4,"),
}


def damage_and_load(data):
    """Damage the small competition at random: it loads truthfully or is refused by a DataError, nothing else."""

    def pick(n):
        return data.draw(st.integers(0, n - 1))

    files = BASE | FOUR
    for damage in data.draw(st.lists(st.sampled_from(DAMAGES), min_size=1, max_size=2)):
        damage(files, pick)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), dict.fromkeys(BASE) | files)
        try:
            loaded = vqa.load_competition(folder, max_fallback_share=[0.5, 0.9, 0][pick(3)])
        except vqa.DataError as error:
            event("refused")
            assert "\n" not in str(error) and len(str(error)) < 600, error
        else:
            event("loaded")
            assert_loaded_truthfully(files, Path(folder), loaded)


QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=200, derandomize=True, **QUIET)
@given(st.data())
def test_a_damaged_competition_loads_truthfully_or_is_refused(data):
    damage_and_load(data)


@pytest.mark.slow
@settings(max_examples=2000, print_blob=True, **QUIET)
@given(st.data())
def test_two_thousand_damaged_competitions_load_truthfully_or_are_refused(data):
    damage_and_load(data)
