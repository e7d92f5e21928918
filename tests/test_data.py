"""Loading a competition: tables, answers, images, copies of images, folds."""

import io
import re
import unicodedata

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import vqa_helpers as vqa

HEADER = "id,path,question,a,b,c,d"


def picture(seed, size=(48, 36)):
    """A picture unlike any other seed's: eight by six random colours, smoothly enlarged."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def write_lines(path, header, rows, encoding="utf-8"):
    path.write_bytes("".join(line + "\r\n" for line in (header, *rows)).encode(encoding))


def row(split, number, middle="무슨 색입니까?,빨강,파랑,노랑,초록"):
    return f"{split}_{number},{split}/{number}.png,{middle}"


class Folder:
    """A little competition on disk: `n` rows a split, one picture each, answers a, b, c, d in turn."""

    def __init__(self, root, n=4):
        self.root, self.n = root, n
        for split, offset in (("train", 0), ("test", 1000)):
            (root / split).mkdir()
            for number in range(n):
                picture(offset + number).save(root / split / f"{number}.png")
        self.train([row("train", number) + "," + "abcd"[number % 4] for number in range(n)])
        self.test([row("test", number) for number in range(n)])
        self.sample([f"test_{number}," for number in range(n)])

    def train(self, rows, header=HEADER + ",answer", **options):
        write_lines(self.root / "train.csv", header, rows, **options)

    def test(self, rows, header=HEADER, **options):
        write_lines(self.root / "test.csv", header, rows, **options)

    def sample(self, rows, header="id,answer", **options):
        write_lines(self.root / "sample_submission.csv", header, rows, **options)

    def train_rows(self, *middles_and_answers):
        """One training row for each `question,a,b,c,d,answer`."""
        self.train([row("train", number, text) for number, text in enumerate(middles_and_answers)])

    def load(self, share=0.0, **options):
        return vqa.load_competition(self.root, max_fallback_share=share, **options)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def taken(competition):
    return {name: count for name, count in competition.fallbacks.items() if count}


# ------------------------------------------------------------------------------------------------------------- tables


def test_a_clean_competition_loads_in_file_order_without_a_fallback(folder):
    loaded = folder.load()
    assert taken(loaded) == {}
    assert loaded.data_dir == folder.root.resolve()
    assert loaded.train["id"].tolist() == ["train_0", "train_1", "train_2", "train_3"]
    assert loaded.train["answer"].tolist() == list("abcd")
    assert loaded.train["label"].tolist() == [0, 1, 2, 3]
    assert loaded.train["line"].tolist() == [2, 3, 4, 5]
    assert loaded.test["image_path"][0] == str(folder.root.resolve() / "test" / "0.png")
    assert loaded.test[["width", "height"]].to_numpy().tolist() == [[48, 36]] * 4
    assert loaded.train["type"].unique().tolist() == ["color"]
    assert "answer" not in loaded.test
    assert loaded.sample.to_dict("list") == {"id": [f"test_{n}" for n in range(4)], "answer": [""] * 4}


@pytest.mark.parametrize(("encoding", "count"), [("utf-8-sig", 0), ("cp949", 1)])
def test_korean_text_is_read_from_marked_utf8_and_from_cp949(folder, encoding, count):
    # 똠 exists in cp949 and not in the older euc-kr.
    folder.test([row("test", n, "똠양꿍은 어디에 있습니까?,왼쪽,오른쪽,위,아래") for n in range(4)], encoding=encoding)
    loaded = folder.load()
    assert loaded.test["question"][0] == "똠양꿍은 어디에 있습니까?"
    assert loaded.test["id"][0] == "test_0"
    assert loaded.fallbacks["csv_read_as_cp949"] == count


def test_headers_differ_in_case_order_and_name_and_extra_columns_are_left_out(folder):
    rows = [f"7,{n}.jpg,d,c,b,a,q,train/{n}.png,A" for n in range(4)]
    folder.train(rows, header="Line, ID ,D,C,B,A,Question,Image,Answer")
    folder.sample(["test_3,", "test_0,", "test_2,", "test_1,"], header="Id, Answer")
    loaded = folder.load()
    assert loaded.train["id"].tolist() == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert loaded.train.loc[0, list("abcd")].tolist() == list("abcd")
    assert loaded.train["line"].tolist() == [2, 3, 4, 5]
    assert loaded.sample.columns.tolist() == ["Id", "Answer"]
    assert loaded.sample["Id"].tolist() == ["test_3", "test_0", "test_2", "test_1"]


def test_choices_that_look_like_missing_values_or_numbers_stay_verbatim(folder):
    folder.train_rows("q,None,NA,007,nan,c", 'q,"1,000",a"b,  x ,,a')
    loaded = folder.load()
    assert loaded.train.loc[0, list("abcd")].tolist() == ["None", "NA", "007", "nan"]
    assert loaded.train.loc[1, list("abcd")].tolist() == ["1,000", 'a"b', "  x ", ""]


def test_answers_in_the_test_file_are_ignored_and_counted(folder):
    answers = [row("test", n) + answer for n, answer in enumerate((",a", ",b", ",", ",z"))]
    folder.test(answers, header=HEADER + ",answer")
    loaded = folder.load()
    assert "answer" not in loaded.test
    assert taken(loaded) == {"test_answer_ignored": 3}


GOOD = row("train", 0) + ",a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"train.csv, line 1: columns \['id', 'path', .*\] must occur once .*; found \[\]"),
        (f"{HEADER},answer\n", "train.csv: has a header but no rows"),
        (f"{HEADER}\n{row('train', 0)}\n", r"line 1: columns \['answer'\] must occur once .*; found \['id', 'path'"),
        (f"{HEADER},answer,A\n{GOOD},x\n", r"line 1: columns \['a'\] must occur once"),
        (f"{HEADER},answer,image\n{GOOD},x\n", r"line 1: columns \['path'\] must occur once \('image' means 'path'\)"),
        (f"{HEADER},answer\n{GOOD},\n", "line 2, row 'train_0': 9 fields but 8 columns"),
        (f"{HEADER},answer\n\n{row('train', 0)}\n", "line 3, row 'train_0': 7 fields but 8 columns"),
        (f'{HEADER},answer\n{GOOD}\n1,x,"q\nq" q,a,b,c,d,a\n', "line 3: .*expected after.*check the quotes"),
        (f'{HEADER},answer\n{GOOD}\n1,x,"q,a,b,c,d,a\n', "line 3: unexpected end of data; check the quotes"),
        (f"{HEADER},answer\n1,x,q\0,a,b,c,d,a\n", "line 2: holds a NUL byte"),
        (
            f'{HEADER},answer\n{GOOD.replace("색", "색")}\n1,x,"q\nq",a,b,c,d,a\n{GOOD}\n',
            "line 5, column 'id', value 't",
        ),
        (f"{HEADER},answer\n ,x,q,a,b,c,d,a\n", "line 2, column 'id', value ' ': is blank or repeats"),
        (b"id,path\n1,\xff\xfe\n", "train.csv: neither UTF-8 nor cp949"),
    ],
)
def test_a_damaged_table_is_refused_by_file_and_line(folder, content, message):
    (folder.root / "train.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(vqa.DataError, match=message):
        folder.load()


def test_a_missing_table_is_named_with_the_remedy(folder):
    (folder.root / "test.csv").unlink()
    with pytest.raises(vqa.DataError, match=r"test\.csv: no such file; set data_dir to the folder with train\.csv"):
        folder.load()


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["test_0,", "test_1,", "test_2,", "other,"], "id,answer", r"ids \['other', 'test_3'\] are only in it or"),
        (["test_0,", "test_1,", "test_2,"], "id,answer", r"ids \['test_3'\] are only in it or"),
        ([",test_0"], "answer,id", r"must be id, answer; found \['answer', 'id'\]"),
    ],
)
def test_a_sample_submission_that_does_not_fit_the_test_file_is_refused(folder, rows, header, message):
    folder.sample(rows, header=header)
    with pytest.raises(vqa.DataError, match="sample_submission.csv.*" + message):
        folder.load()


def test_repeated_choices_and_blank_questions_are_kept_and_counted(folder):
    folder.train_rows("q,x,x ,y,z,a", "q,x,y,,,a", "  ,x,y,z,w,a")
    loaded = folder.load()
    assert len(loaded.train) == 3
    assert taken(loaded) == {"train_repeated_choices": 1, "train_blank_question": 1}


def test_a_row_with_one_choice_is_refused(folder):
    folder.test([row("test", 0, "q, ,only,,")])
    with pytest.raises(vqa.DataError, match="test.csv, line 2, column 'id', value 'test_0': fewer than two choices"):
        folder.load()


# ------------------------------------------------------------------------------------------------------------ answers


def frame_of(answers, choices="wxyz"):
    rows = [dict(zip("abcd", choices, strict=True), answer=answer, line=n + 2) for n, answer in enumerate(answers)]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("answers", "choices", "labels"),
    [
        (["a", " B ", "(c)", "D.", "b)", "ａ", "ⓒ"], "wxyz", [0, 1, 2, 3, 1, 0, 2]),
        (["1", " 4", "(2)", "３"], "wxyz", [0, 3, 1, 2]),
        (["a", "y", " z "], "wxyz", [0, 2, 3]),  # a letter, then texts of choices
        (["b", "a"], ["B", "a", "o", "ab"], [1, 0]),  # blood groups: a column of letters is letters
        (["2", "7"], ["7", "2", "5", "9"], [1, 0]),  # 7 is no position, so the column is texts
        (["1", "2"], ["1", "2", "3", "4"], [0, 1]),  # position and text agree
    ],
)
def test_answers_are_read_in_every_dialect_that_leaves_no_doubt(answers, choices, labels):
    assert vqa.answer_labels(frame_of(answers, choices)).tolist() == labels


@pytest.mark.parametrize(
    ("answers", "choices", "message"),
    [
        (["a", "e"], "wxyz", "line 3, column 'answer', value 'e'"),
        (["a", "a b"], "wxyz", "line 3.*value 'a b'"),
        (["5", "1"], "wxyz", "line 2.*value '5'"),
        (["a", "1"], "wxyz", "line 3.*value '1'"),  # positions only where the whole column is positions
        (["3"], ["3", "2", "1", "4"], "line 2.*value '3'"),
        (["same", "a"], ["same", "same", "y", "z"], "line 2.*value 'same'"),
        (["z", "b"], ["b", "w", "y", "z"], "line 3.*value 'b'"),
        (["a", "d"], ["w", "x", "y", " "], "line 3.*value 'd'"),  # d is blank
        (["w", "a"], ["", "w", "a", "y"], "line 3.*value 'a'"),  # the letter of a blank choice, or the text of another?
    ],
)
def test_a_doubtful_answer_is_refused_with_its_line(answers, choices, message):
    reason = "does not mean exactly one filled choice; write its letter a-d"
    with pytest.raises(vqa.DataError, match=f"train.csv, {message}: {reason}"):
        vqa.answer_labels(frame_of(answers, choices))


def test_a_row_without_an_answer_is_dropped_and_counted_up_to_the_share(folder):
    folder.train([row("train", n) + answer for n, answer in enumerate((",a", ", ", ",c", ",d"))])
    loaded = folder.load(share=0.25)
    assert loaded.train["id"].tolist() == ["train_0", "train_2", "train_3"]
    assert loaded.train.index.tolist() == [0, 1, 2]
    assert taken(loaded) == {"train_blank_answer": 1}
    with pytest.raises(vqa.DataError, match="train.csv: blank_answer in 1 of 4 rows, first on line 3"):
        folder.load(share=0.24)


# ------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("kind", ["missing", "empty", "html", "truncated", "link to itself"])
def test_unusable_images_drop_training_rows_and_turn_test_rows_grey(folder, caplog, kind):
    for split in ("train", "test"):
        path = folder.root / split / "1.png"
        content = {"empty": b"", "html": b"<html>404</html>", "truncated": path.read_bytes()[:-400]}
        path.unlink()
        if kind == "link to itself":
            path.symlink_to(path)
        elif kind != "missing":
            path.write_bytes(content[kind])
    loaded = folder.load(share=0.25)
    assert loaded.train["id"].tolist() == ["train_0", "train_2", "train_3"]
    assert loaded.test["id"].tolist() == [f"test_{n}" for n in range(4)]
    assert loaded.test["image_ok"].tolist() == [True, False, True, True]
    assert vqa.load_image(loaded.test["image_path"][1]).getcolors() == [(224 * 224, (128, 128, 128))]
    assert taken(loaded) == {"train_unusable_image": 1, "test_unusable_image": 1}
    assert "test.csv: unusable_image in 1 rows, the first on lines [3]" in caplog.text
    with pytest.raises(vqa.DataError, match="train.csv: unusable_image in 1 of 4 rows, first on line 3"):
        folder.load(share=0.2)


def test_the_error_of_the_loader_names_the_image(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(vqa.ImageError, match=r"page\.jpg: not a readable image \(UnidentifiedImageError.*replace"):
        vqa.load_image(tmp_path / "page.jpg")
    assert issubclass(vqa.ImageError, vqa.DataError)


@pytest.mark.parametrize("place", [".", "images", "train"])
def test_images_are_found_below_the_data_folder_its_images_and_its_split(folder, place):
    (folder.root / place).mkdir(exist_ok=True)
    picture(5).save(folder.root / place / "here.png")
    folder.train(["1,here.png,q,a,b,c,d,a", "2,.\\here.png,q,a,b,c,d,b"])
    assert folder.load().train["image_path"].tolist() == [str(folder.root.resolve() / place / "here.png")] * 2


def test_names_in_another_case_or_unicode_form_are_found_and_counted(folder):
    picture(5).save(folder.root / "train" / (unicodedata.normalize("NFD", "가나") + ".PNG"))
    folder.train([f"1,Train/{unicodedata.normalize('NFC', '가나')}.png,q,a,b,c,d,a"])
    loaded = folder.load()
    assert loaded.train["image_ok"].all()
    assert taken(loaded) == {"image_found_under_other_spelling": 1}


def test_a_name_that_fits_two_files_is_not_guessed(folder):
    picture(5).save(folder.root / "train" / "x.png")
    picture(6).save(folder.root / "train" / "X.png")
    folder.train(["1,train/x.PNG,q,a,b,c,d,a"])
    with pytest.raises(vqa.DataError, match="unusable_image in 1 of 1 rows"):
        folder.load()


@pytest.mark.parametrize(
    "path",
    ["../secret.png", "train/../../secret.png", "..\\secret.png", "/etc/passwd", "C:\\x.png", "//host/share/x.png"]
    + ["http://host/x.png", " file:///x.png", "data:image/png;base64;AAAA", "link.png"],
)
def test_a_path_out_of_the_data_folder_is_refused(tmp_path, path):
    picture(1).save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    folder = Folder(tmp_path / "data")
    (folder.root / "link.png").symlink_to(tmp_path / "secret.png")
    folder.train([f"1,{path},q,a,b,c,d,a"])
    reason = "is a URL or leads out of the data folder"
    with pytest.raises(vqa.DataError, match=re.escape(f"train.csv, line 2, column 'path', value {path!r}: {reason}")):
        folder.load()


def saved(tmp_path, image, suffix, **options):
    path = tmp_path / f"image.{suffix}"
    image.save(path, **options)
    return vqa.load_image(path)


RED_CLEAR = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
RAMP = np.array([[0, 128, 255]])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("image", "suffix", "options", "expected"),
    [
        (RED_CLEAR, "png", {}, [(255, 255, 255)] * 4),
        (Image.new("LA", (1, 1), (0, 128)), "png", {}, [(127, 127, 127)]),
        (Image.new("P", (1, 1), 0), "png", {"transparency": 0}, [(255, 255, 255)]),
        (Image.new("RGB", (1, 1), (9, 8, 7)), "png", {"transparency": (9, 8, 7)}, [(255, 255, 255)]),
        (Image.new("CMYK", (1, 1), (0, 0, 0, 255)), "tiff", {}, [(0, 0, 0)]),
        (Image.new("1", (1, 1), 1), "png", {}, [(255, 255, 255)]),
        (Image.fromarray((RAMP * 257).astype(np.uint16)), "png", {}, [(0,) * 3, (128,) * 3, (255,) * 3]),
        (Image.fromarray(np.array([[0, 25700]], np.uint16)), "png", {}, [(0,) * 3, (100,) * 3]),
        (Image.fromarray(RAMP.astype(np.int32)), "tiff", {}, [(0,) * 3, (128,) * 3, (255,) * 3]),
        (Image.fromarray((RAMP * 257).astype(np.int32)), "tiff", {}, [(0,) * 3, (128,) * 3, (255,) * 3]),
        (Image.fromarray((RAMP / 255).astype(np.float32)), "tiff", {}, [(0,) * 3, (128,) * 3, (255,) * 3]),
        (Image.fromarray((RAMP - 300).astype(np.float32)), "tiff", {}, [(0,) * 3, (128,) * 3, (255,) * 3]),
        (Image.fromarray(np.array([[np.nan, 1]], np.float32)), "tiff", {}, [(0,) * 3, (255,) * 3]),
        (Image.fromarray(np.full((1, 1), -5, np.float32)), "tiff", {}, [(0, 0, 0)]),
    ],
)
def test_every_colour_mode_becomes_the_rgb_a_viewer_shows(tmp_path, image, suffix, options, expected):
    loaded = saved(tmp_path, image, suffix, **options)
    assert loaded.mode == "RGB"
    assert np.asarray(loaded).reshape(-1, 3).tolist() == [list(colour) for colour in expected]


def test_the_first_frame_of_an_animation_is_used(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert saved(tmp_path, frames[0], "gif", save_all=True, append_images=frames[1:]).getpixel((0, 0)) == (255, 0, 0)


def test_camera_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    loaded = saved(tmp_path, image, "png", exif=exif)
    assert loaded.size == (4, 8)
    assert loaded.getpixel((3, 0)) == (0, 0, 0)


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
    decoded, convert = [], Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda image, mode: decoded.append(image.size) or convert(image, mode))
    assert vqa.load_image(tmp_path / "x.jpg", max_side=200).size == (200, 100)
    assert decoded == [(200, 100)]


def test_a_huge_jpeg_loads_without_a_warning_at_the_size_limit(folder, recwarn):
    Image.new("L", (12000, 7600)).save(folder.root / "train" / "0.png", format="JPEG")
    loaded = folder.load()
    assert loaded.train.loc[0, ["width", "height"]].tolist() == [4096, 2594]
    assert loaded.train["image_ok"].all()
    assert not [warning for warning in recwarn if "bomb" in str(warning.message)]


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, format="BMP")
    content = bytearray(buffer.getvalue())
    content[18:26] = (20000).to_bytes(4, "little") * 2
    (tmp_path / "bomb.bmp").write_bytes(content)
    with pytest.raises(vqa.ImageError, match=r"bomb\.bmp: not a readable image .*400000000 pixels"):
        vqa.load_image(tmp_path / "bomb.bmp")


def test_a_format_that_starts_an_outside_program_is_not_opened(tmp_path):
    with pytest.raises(vqa.ImageError, match="UnidentifiedImageError"):
        saved(tmp_path, picture(1), "eps")


# ------------------------------------------------------------------------------------------------ sample, fingerprint


def test_a_sample_of_the_training_rows_is_reproducible_and_keeps_their_order(tmp_path):
    folder = Folder(tmp_path, n=12)
    first, again = folder.load(sample_size=5), folder.load(sample_size=5)
    assert len(first.train) == 5 and len(first.test) == 12
    assert first.train["line"].is_monotonic_increasing
    pd.testing.assert_frame_equal(first.train, again.train)
    assert folder.load(sample_size=5, seed=1).train["id"].tolist() != first.train["id"].tolist()
    assert len(folder.load(sample_size=99).train) == 12


def test_the_fingerprint_follows_tables_names_and_sizes(folder, tmp_path_factory):
    before = folder.load().fingerprint
    elsewhere = Folder(tmp_path_factory.mktemp("same"))
    assert elsewhere.load().fingerprint == before
    (folder.root / "train" / "0.png").write_bytes((folder.root / "train" / "0.png").read_bytes() + b"\0")
    touched = folder.load().fingerprint
    folder.sample([f"test_{n},a" for n in range(4)])
    assert len({before, touched, folder.load().fingerprint}) == 3


# ---------------------------------------------------------------------------------------------------- copies of images


def with_images(root, train, test):
    """A loaded competition whose pictures are the given ones."""
    folder = Folder(root, n=max(len(train), len(test)))
    for split, pictures in (("train", train), ("test", test)):
        for number, (image, suffix) in enumerate(pictures):
            image.save(root / split / f"{number}.png", format=suffix)
    return folder.load()


def numbered(seeds):
    return [(picture(seed), "PNG") for seed in seeds]


def test_exact_copies_are_found_by_pixels_whatever_the_file(tmp_path):
    loaded = with_images(tmp_path, [*numbered([1, 2, 1]), (picture(3), "BMP")], numbered([3, 1, 7, 8]))
    report = vqa.leakage_report(loaded.train, loaded.test)
    pairs = report.copies[["split_a", "id_a", "split_b", "id_b", "kind"]].to_numpy().tolist()
    assert pairs == [
        ["train", "train_0", "train", "train_2", "exact"],
        ["train", "train_3", "test", "test_0", "exact"],
        ["train", "train_0", "test", "test_1", "exact"],
    ]
    assert report.groups_in_train == 1
    assert report.test_rows_in_train == 2
    assert report.alarm == ""
    assert report.image_group[0] == report.image_group[2]
    assert report.image_group.nunique() == 3


def test_near_copies_are_confirmed_on_pixels(tmp_path):
    original = (picture(1, (240, 180)), "PNG")
    smaller = (original[0].resize((200, 150), Image.Resampling.LANCZOS), "JPEG")
    darker = (Image.eval(picture(2), lambda value: value // 2), "PNG")  # nearly the same hash, another picture
    loaded = with_images(tmp_path, [original, *numbered([2]), darker], [smaller, *numbered([5, 6])])
    assert hash_distance(*loaded.train["dhash"][1:3]) <= 4
    report = vqa.leakage_report(loaded.train, loaded.test)
    assert report.copies[["id_a", "id_b", "kind"]].to_numpy().tolist() == [["train_0", "test_0", "near"]]
    assert 0 < report.copies["difference"][0] <= 3
    assert report.test_rows_in_train == 1
    assert report.image_group.nunique() == 3


def test_a_near_copy_may_differ_in_a_few_hash_bits(tmp_path):
    original = picture(1, (240, 180))
    retouched = original.copy()
    retouched.paste(original.resize((1, 1)).getpixel((0, 0)), (80, 68, 107, 90))
    loaded = with_images(tmp_path, [(original, "PNG"), *numbered([2])], [(retouched, "PNG"), *numbered([5])])
    assert 1 <= hash_distance(loaded.train["dhash"][0], loaded.test["dhash"][0]) <= 4
    assert vqa.leakage_report(loaded.train, loaded.test).copies["kind"].tolist() == ["near"]
    assert vqa.leakage_report(loaded.train, loaded.test, max_bits=0).copies.empty


def test_the_same_bytes_in_another_shape_are_not_the_same_pixels(tmp_path):
    wide, tall = (Image.new("RGB", size, "teal") for size in ((8, 4), (4, 8)))
    loaded = with_images(tmp_path, [(wide, "PNG"), *numbered([2])], [(tall, "PNG"), *numbered([5])])
    assert vqa.leakage_report(loaded.train, loaded.test).copies["kind"].tolist() == ["near"]


def hash_distance(first, second):
    return (int(first, 16) ^ int(second, 16)).bit_count()


def test_a_picture_without_copies_gives_an_empty_report(folder):
    loaded = folder.load()
    report = vqa.leakage_report(loaded.train, loaded.test)
    assert report.copies.empty
    assert (report.groups_in_train, report.test_rows_in_train) == (0, 0)


def test_rows_without_an_image_are_no_copies_of_each_other(folder):
    for number in (0, 1):
        (folder.root / "test" / f"{number}.png").unlink()
    loaded = folder.load(share=0.5)
    assert vqa.leakage_report(loaded.train, loaded.test).copies.empty


def test_an_implausible_group_raises_the_alarm_and_only_exact_copies_count(tmp_path, caplog):
    greys = [(Image.new("RGB", (8, 8), (100 + n, 100 + n, 100 + n)), "PNG") for n in range(12)]
    loaded = with_images(tmp_path, [*greys, greys[0]], numbered(range(50, 63)))
    report = vqa.leakage_report(loaded.train, loaded.test)
    assert report.alarm.startswith("near copies would link 12 different images into one group")
    assert report.alarm in caplog.text
    assert report.image_group.nunique() == 12
    assert report.image_group[0] == report.image_group[12]


# -------------------------------------------------------------------------------------------------------------- folds


def many_rows(n=120):
    rng = np.random.default_rng(0)
    answers = rng.choice(list("abcd"), n)
    kinds = rng.choice(["color", "counting"], n)
    return pd.DataFrame({"answer": answers, "type": kinds, "pixel_hash": [f"{k:x}" for k in rng.integers(0, 90, n)]})


def test_folds_balance_answer_and_type_and_never_split_a_group():
    train = many_rows()
    folds = vqa.make_folds(train, n_folds=3)
    assert folds.shape == (120,)
    assert set(folds) == {0, 1, 2}
    assert train.groupby("pixel_hash").size().max() > 1
    assert pd.Series(folds).groupby(train["pixel_hash"]).nunique().max() == 1
    counts = pd.crosstab(folds, train["answer"] + train["type"])
    assert (counts.max() - counts.min()).max() <= 3


def test_folds_follow_the_groups_they_are_given():
    train = many_rows()
    groups = np.repeat(np.arange(12), 10)
    folds = vqa.make_folds(train, n_folds=4, groups=groups)
    assert all(len(set(folds[groups == group])) == 1 for group in range(12))


def test_folds_depend_on_the_seed_alone():
    train = many_rows()
    assert np.array_equal(vqa.make_folds(train, seed=1), vqa.make_folds(train, seed=1))
    assert not np.array_equal(vqa.make_folds(train, seed=1), vqa.make_folds(train, seed=2))


def test_strata_rarer_than_the_folds_do_not_disturb_them(recwarn):
    train = many_rows(40).assign(pixel_hash=[f"{n:x}" for n in range(40)])
    train.loc[0, "type"] = "ocr"
    train.loc[:, "answer"] = ["a", "b"] * 19 + ["c", "d"]
    folds = vqa.make_folds(train, n_folds=5)
    assert set(np.bincount(folds)) <= {7, 8, 9}
    assert not recwarn.list


def test_rare_question_types_still_leave_the_answers_balanced():
    train = pd.DataFrame({"answer": ["a", "b"] * 20, "type": [f"{n:x}" for n in range(40)]})
    folds = vqa.make_folds(train.assign(pixel_hash=train["type"]), n_folds=5)
    assert (pd.crosstab(folds, train["answer"]) == 4).all(axis=None)


@pytest.mark.parametrize(
    ("rows", "n_folds", "message"),
    [(10, 1, "n_splits=1"), (3, 4, "3 groups of images cannot fill n_folds=4")],
)
def test_impossible_folds_are_refused(rows, n_folds, message):
    train = many_rows(rows).assign(pixel_hash=list("abcdefghij")[:rows])
    with pytest.raises(ValueError, match=message):
        vqa.make_folds(train, n_folds=n_folds)
