"""A loaded competition: its frames, its sample and fingerprint, copies of images, folds.

What a competition's files may look like, and what is refused, is in test_conformance.py.
"""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import vqa_helpers as vqa


def picture(seed, size=(48, 36)):
    """A picture unlike any other seed's: eight by six random colours, smoothly enlarged."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


class Folder:
    """A little competition on disk: `n` rows a split, one picture each, answers a, b, c, d in turn."""

    def __init__(self, root, n=4):
        self.root = root
        for split, offset in (("train", 0), ("test", 1000)):
            (root / split).mkdir()
            for number in range(n):
                picture(offset + number).save(root / split / f"{number}.png")
        row = "{0}_{1},{0}/{1}.png,무슨 색입니까?,빨강,파랑,노랑,초록"
        answered = [row.format("train", number) + "," + "abcd"[number % 4] for number in range(n)]
        self.write("train", "id,path,question,a,b,c,d,answer", answered)
        self.write(
            "test", "id,path,question,a,b,c,d", [row.format("test", number) for number in range(n)]
        )
        self.write("sample_submission", "id,answer", [f"test_{number}," for number in range(n)])

    def write(self, name, header, rows):
        (self.root / f"{name}.csv").write_text("\n".join([header, *rows]), encoding="utf-8")

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
    assert loaded.sample.to_dict("list") == {
        "id": [f"test_{n}" for n in range(4)],
        "answer": [""] * 4,
    }


# ------------------------------------------------------------------------------------------------------------- images


def test_unusable_images_are_logged_by_line_and_stand_in_grey_in_the_test_rows(folder, caplog):
    for split in ("train", "test"):
        (folder.root / split / "1.png").write_text("<html>404</html>")
    loaded = folder.load(share=0.25)
    assert loaded.train["id"].tolist() == ["train_0", "train_2", "train_3"]
    assert loaded.train.index.tolist() == [0, 1, 2]
    assert loaded.test["image_path"][1] == vqa.GREY_IMAGE
    assert vqa.load_image(vqa.GREY_IMAGE).getcolors() == [(224 * 224, (128, 128, 128))]
    assert taken(loaded) == {"train_unusable_image": 1, "test_unusable_image": 1}
    assert "test.csv, lines [3]: " in caplog.text and "unusable_image in 1 of 4 rows" in caplog.text
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
    monkeypatch.setattr(
        Image.Image,
        "convert",
        lambda image, mode: decoded.append(image.size) or convert(image, mode),
    )
    assert vqa.load_image(tmp_path / "x.jpg", max_side=200).size == (200, 100)
    assert decoded == [(200, 100)]


# ------------------------------------------------------------------------------------------------ sample, fingerprint


def test_a_sample_of_the_training_rows_is_reproducible_and_keeps_their_order(tmp_path):
    folder = Folder(tmp_path, n=12)
    first, again = folder.load(sample_size=5), folder.load(sample_size=5)
    assert len(first.train) == 5 and len(first.test) == 12
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
    loaded = with_images(
        tmp_path, [*numbered([1, 2, 1]), (picture(3), "BMP")], numbered([3, 1, 7, 8])
    )
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
    darker = (
        Image.eval(picture(2), lambda value: value // 2),
        "PNG",
    )  # nearly the same hash, another picture
    loaded = with_images(tmp_path, [original, *numbered([2]), darker], [smaller, *numbered([5, 6])])
    assert hash_distance(*loaded.train["dhash"][1:3]) <= 4
    report = vqa.leakage_report(loaded.train, loaded.test)
    assert report.copies[["id_a", "id_b", "kind"]].to_numpy().tolist() == [
        ["train_0", "test_0", "near"]
    ]
    assert 0 < report.copies["difference"][0] <= 3
    assert report.test_rows_in_train == 1
    assert report.image_group.nunique() == 3


def test_a_near_copy_may_differ_in_a_few_hash_bits(tmp_path):
    original = picture(1, (240, 180))
    retouched = original.copy()
    retouched.paste(original.resize((1, 1)).getpixel((0, 0)), (80, 68, 107, 90))
    loaded = with_images(
        tmp_path, [(original, "PNG"), *numbered([2])], [(retouched, "PNG"), *numbered([5])]
    )
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
    return pd.DataFrame(
        {"answer": answers, "type": kinds, "pixel_hash": [f"{k:x}" for k in rng.integers(0, 90, n)]}
    )


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
