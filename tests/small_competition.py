"""A competition of two training and two test rows, and cases of what may be done to it.

A case is data: a table in one of the files in cases/, or a call of `case` where it needs code.
It has a name, changes to the small competition, and an outcome: the competition then loads with
exactly these values (`Loads`), or it is refused with these parts of a message (`Refused`).

A table in cases/ may have these keys:

    train, test, sample_submission   rows of that file; R1, R2, T1, T2, S1, S2 are the usual ones
    header.<table>                   its first line, where it is not the usual one
    encoding.<table>                 where it is not UTF-8
    line_end.<table>                 where it is not "\\n"
    missing                          files that are not there
    choices, answers                 the choices of every training row, and each row's answer
    path                             that of the only training row's image
    images, other_images, empty      files with the image that is meant, with another, with nothing
    links                            links and what they lead to

    loads.train, loads.test, loads.sample   values of their columns
    loads.counted                           fallbacks by name, all others are zero
    loads.size                              of the first training row's image
    loads.notation                          how a submission writes its answers, in words
    loads.why                               part of the reason for it
    labels                                  of all training rows; then also
    counted, notation                       as those of loads
    refused                                 parts of the message
    doubtful                                line and value of an answer that is refused
"""

import io
import tomllib
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vqa_helpers as vqa

CASES = Path(__file__).parent / "cases"
TRAIN = "id,path,question,a,b,c,d,answer"
TEST = "id,path,question,a,b,c,d"
HEADERS = {"train": TRAIN, "test": TEST, "sample_submission": "id,answer"}
R1 = "r1,train/1.png,무슨 색입니까?,빨강,파랑,노랑,초록,a"
R2 = "r2,train/2.png,몇 개입니까?,하나,둘,셋,넷,b"
T1 = "t1,test/1.png,어디에 있습니까?,왼쪽,오른쪽,위,아래"
T2 = "t2,test/2.png,무엇입니까?,개,고양이,새,말"
USUAL_ROWS = {"R1": R1, "R2": R2, "T1": T1, "T2": T2, "S1": "t1,", "S2": "t2,"}
NFC = unicodedata.normalize("NFC", "빨강")
NFD = unicodedata.normalize("NFD", "빨강")


# --- Files ----------------------------------------------------------------------------------------


def random_image(seed, size=(16, 12)):
    """An image that no other seed has."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, kind="PNG", **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def lines(*rows, end="\n", encoding="utf-8"):
    """The bytes of a text file."""
    return "".join(row + end for row in rows).encode(encoding)


def table(name, *rows, header=None, **options):
    """The change that gives the table `name` these rows."""
    return {f"{name}.csv": lines(header or HEADERS[name], *rows, **options)}


BASE = {
    **table("train", R1, R2),
    **table("test", T1, T2),
    **table("sample_submission", "t1,", "t2,"),
    "train/1.png": encoded(random_image(1)),
    "train/2.png": encoded(random_image(2)),
    "test/1.png": encoded(random_image(11)),
    "test/2.png": encoded(random_image(12)),
}
MEANT_IMAGE = encoded(Image.new("RGB", (7, 5), (255, 0, 0)))


def write(root, changes):
    """Write the small competition with these changes.

    Bytes are a file, a Path is a link to it, None removes the file.
    """
    for name, content in (BASE | changes).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            path.symlink_to(content)
        elif content is not None:
            path.write_bytes(content)
    return root


# --- Outcomes -------------------------------------------------------------------------------------

TEST_COLUMNS = {
    "id",
    "image_path",
    "question",
    *"abcd",
    "type",
    "line",
    "image_ok",
    "width",
    "height",
    "pixel_hash",
    "dhash",
}


def assert_columns(frame, wanted):
    """These columns of the frame hold exactly these values."""
    assert {column: frame[column].tolist() for column in wanted} == wanted


@dataclass
class Loads:
    """The competition loads with exactly these values, and only these fallbacks are counted."""

    counted: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    test: dict = field(default_factory=dict)
    sample: dict = field(default_factory=dict)
    size: tuple | None = None  # of the first training row's image
    pixels: list | None = None  # of the first training row's image, row by row
    notation: str | None = None  # how a submission writes its answers
    why: str = ""  # part of the reason for it

    def check(self, root):
        loaded = vqa.load_competition(root, max_fallback_share=0.5)
        assert set(loaded.test.columns) == TEST_COLUMNS
        assert set(loaded.train.columns) == TEST_COLUMNS | {"answer", "label"}
        assert_columns(loaded.train, self.train)
        assert_columns(loaded.test, self.test)
        assert_columns(loaded.sample, self.sample)
        assert {name: count for name, count in loaded.fallbacks.items() if count} == self.counted
        if self.notation is not None:
            assert str(loaded.notation) == self.notation
        assert self.why in loaded.notation.reason
        if self.size or self.pixels:
            self.check_image(vqa.load_image(loaded.train["image_path"][0]))

    def check_image(self, image):
        assert image.mode == "RGB"
        if self.size is not None:
            assert image.size == tuple(self.size)
        if self.pixels is not None:
            pixels = np.asarray(image).reshape(-1, 3).tolist()
            assert [tuple(pixel) for pixel in pixels] == self.pixels


class Refused:
    """The competition is refused by a DataError whose message holds all of these parts."""

    def __init__(self, *parts):
        self.parts = parts

    def check(self, root):
        with pytest.raises(vqa.DataError) as caught:
            vqa.load_competition(root, max_fallback_share=0)
        message = str(caught.value)
        assert [part for part in self.parts if part not in message] == [], message
        assert len(message) < 700, "too long to read"
        assert "\n" not in message


def labels(*numbers, **others):
    """All training rows load, with these labels; `others` are further fields of Loads."""
    answers = ["abcd"[number] for number in numbers]
    return Loads(train={"label": list(numbers), "answer": answers}, **others)


def doubtful(line, value):
    """The answer in this line is refused, since it may mean several choices or none."""
    place = f"train.csv, line {line}, column 'answer', value {value!r}"
    reason = "does not mean exactly one filled choice; write its letter a-d"
    return Refused(f"{place}: {reason}")


# --- Cases ----------------------------------------------------------------------------------------


def case(name, changes, outcome):
    return pytest.param(changes, outcome, id=name)


def answered(choices, *answers):
    """A training file in which every row has these choices, and each row one of the answers."""
    rows = [f"r{number},train/1.png,q,{choices},{text}" for number, text in enumerate(answers)]
    return table("train", *rows)


def with_path(path):
    """A training file of one row with this path."""
    return table("train", R1.replace("train/1.png", path))


def table_changes(description):
    """The changed tables of a case."""
    changes = {}
    for name in HEADERS:
        if name in description:
            rows = [USUAL_ROWS.get(row, row) for row in description[name]]
            changes |= table(
                name,
                *rows,
                header=description.get("header", {}).get(name),
                encoding=description.get("encoding", {}).get(name, "utf-8"),
                end=description.get("line_end", {}).get(name, "\n"),
            )
    if "answers" in description:
        changes |= answered(description["choices"], *description["answers"])
    if "path" in description:
        changes |= with_path(description["path"])
    return changes


def file_changes(description):
    """The other changed files of a case."""
    changes = dict.fromkeys(description.get("missing", ()))
    changes |= dict.fromkeys(description.get("images", ()), MEANT_IMAGE)
    changes |= dict.fromkeys(description.get("other_images", ()), BASE["train/1.png"])
    changes |= dict.fromkeys(description.get("empty", ()), b"")
    for name, target in description.get("links", {}).items():
        changes[name] = Path(target)
    return changes


def described_outcome(description):
    if "refused" in description:
        return Refused(*description["refused"])
    if "doubtful" in description:
        return doubtful(**description["doubtful"])
    if "labels" in description:
        others = {key: description[key] for key in ("counted", "notation") if key in description}
        return labels(*description["labels"], **others)
    return Loads(**description["loads"])


def read_cases(name):
    """The cases of one file in cases/, as pytest takes them."""
    content = tomllib.loads((CASES / f"{name}.toml").read_text(encoding="utf-8"))
    return [
        case(
            title,
            table_changes(description) | file_changes(description),
            described_outcome(description),
        )
        for title, description in content.items()
    ]
