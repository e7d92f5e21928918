"""Part 2, Leakage and folds: copies of images are found, and no fold boundary runs between them."""

import numpy as np
import pandas as pd
import pytest
from competition_folder import Folder, picture
from PIL import Image

import vqa_helpers as vqa


def groups_in_train(report):
    """How many groups have at least two training rows."""
    groups = report.groups.loc[report.groups["split"] == "train", "group"]
    return (groups.value_counts() > 1).sum()


def copied_test_rows(report):
    is_across = report.groups["where"] == "across train and test"
    return (is_across & (report.groups["split"] == "test")).sum()


# --- Copies of images -----------------------------------------------------------------------------


def with_images(root, train, test):
    """A loaded competition with these images, each given with the format of its file."""
    folder = Folder(root, n=max(len(train), len(test)))
    for split, images in (("train", train), ("test", test)):
        for number, (image, file_format) in enumerate(images):
            image.save(root / split / f"{number}.png", format=file_format)
    return folder.load()


def numbered(seeds):
    """A PNG for each seed."""
    return [(picture(seed), "PNG") for seed in seeds]


def copies(report, *columns):
    return report.copies[[*columns]].to_numpy().tolist()


def hash_distance(first, second):
    return (int(first, 16) ^ int(second, 16)).bit_count()


def test_exact_copies_are_found_by_pixels_whatever_the_file(tmp_path):
    train = [*numbered([1, 2, 1]), (picture(3), "BMP")]
    loaded = with_images(tmp_path, train, numbered([3, 1, 7, 8]))
    report = vqa.leakage_report(loaded.train, loaded.test)
    assert copies(report, "split_a", "id_a", "split_b", "id_b", "kind") == [
        ["train", "train_0", "train", "train_2", "exact"],
        ["train", "train_3", "test", "test_0", "exact"],
        ["train", "train_0", "test", "test_1", "exact"],
    ]
    assert groups_in_train(report) == 1
    assert copied_test_rows(report) == 2
    assert report.alarm == ""
    assert report.image_group[0] == report.image_group[2]
    assert report.image_group.nunique() == 3


def test_near_copies_are_confirmed_on_pixels(tmp_path):
    original = picture(1, (240, 180))
    smaller = original.resize((200, 150), Image.Resampling.LANCZOS)
    darker = Image.eval(picture(2), lambda value: value // 2)
    train = [(original, "PNG"), *numbered([2]), (darker, "PNG")]
    loaded = with_images(tmp_path, train, [(smaller, "JPEG"), *numbered([5, 6])])
    # The darker one has nearly the same hash, but is another image.
    assert hash_distance(*loaded.train["dhash"][1:3]) <= 4
    report = vqa.leakage_report(loaded.train, loaded.test)
    assert copies(report, "id_a", "id_b", "kind") == [["train_0", "test_0", "near"]]
    assert 0 < report.copies["difference"][0] <= 3
    assert copied_test_rows(report) == 1
    assert report.image_group.nunique() == 3


def test_a_near_copy_may_differ_in_a_few_hash_bits(tmp_path):
    original = picture(1, (240, 180))
    mean_colour = original.resize((1, 1)).getpixel((0, 0))
    retouched = original.copy()
    retouched.paste(mean_colour, (80, 68, 107, 90))
    train = [(original, "PNG"), *numbered([2])]
    loaded = with_images(tmp_path, train, [(retouched, "PNG"), *numbered([5])])
    assert 1 <= hash_distance(loaded.train["dhash"][0], loaded.test["dhash"][0]) <= 4
    assert vqa.leakage_report(loaded.train, loaded.test).copies["kind"].tolist() == ["near"]
    assert vqa.leakage_report(loaded.train, loaded.test, max_bits=0).copies.empty


def test_the_same_bytes_in_another_shape_are_not_the_same_pixels(tmp_path):
    wide = Image.new("RGB", (8, 4), "teal")
    tall = Image.new("RGB", (4, 8), "teal")
    loaded = with_images(tmp_path, [(wide, "PNG"), *numbered([2])], [(tall, "PNG"), *numbered([5])])
    assert vqa.leakage_report(loaded.train, loaded.test).copies["kind"].tolist() == ["near"]


def test_a_picture_without_copies_gives_an_empty_report(folder):
    loaded = folder.load()
    report = vqa.leakage_report(loaded.train, loaded.test)
    assert report.copies.empty
    assert groups_in_train(report) == 0
    assert copied_test_rows(report) == 0


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


def mixed_copies(root):
    """Copies of each kind and in each place, and some images that are alone."""
    original = picture(1, (240, 180))
    smaller = original.resize((200, 150), Image.Resampling.LANCZOS)
    train = [(original, "PNG"), *numbered([2, 2, 2]), *numbered([3]), *numbered([4, 9, 9])]
    test = [(smaller, "JPEG"), *numbered([3, 5, 5, 6]), *numbered([3, 7, 8])]
    return with_images(root, train, test)


def test_the_sentence_the_table_and_the_file_count_the_same_copies(tmp_path, mini_run):
    loaded = mixed_copies(tmp_path)
    report = vqa.leakage_report(loaded.train, loaded.test)
    counts = vqa.count_copies(report.groups)
    assert counts.to_dict("index") == {
        "across train and test": numbers(exact=(1, 3), near=(1, 2)),
        "inside train": numbers(exact=(2, 5), near=(0, 0)),
        "inside test": numbers(exact=(1, 2), near=(0, 0)),
    }
    assert vqa.describe_copies(counts) == (
        "Copies of images: 1 exact group (3 rows) and 1 near group (2 rows) across train and "
        "test; 2 exact groups (5 rows) inside train; 1 exact group (2 rows) inside test."
    )
    run = mini_run()
    vqa.save_table(report.groups, run, "copies")
    written = pd.read_csv(run.directory / "tables" / "copies.csv")
    assert vqa.count_copies(written).equals(counts)
    assert written["id"].tolist() == [
        *["train_4", "test_1", "test_5"],
        *["train_0", "test_0"],
        *["train_1", "train_2", "train_3", "train_6", "train_7"],
        *["test_2", "test_3"],
    ]


def numbers(exact, near):
    """A line of `count_copies`, from groups and rows of each kind."""
    columns = ["exact groups", "exact rows", "near groups", "near rows"]
    return dict(zip(columns, [*exact, *near], strict=True))


def test_each_row_is_in_one_group_also_where_copies_are_exact_and_near(tmp_path):
    original = picture(1, (240, 180))
    smaller = original.resize((200, 150), Image.Resampling.LANCZOS)
    train = [(original, "PNG"), (original, "PNG"), *numbered([2])]
    loaded = with_images(tmp_path, train, [(smaller, "PNG"), *numbered([3, 4])])
    report = vqa.leakage_report(loaded.train, loaded.test)
    table = report.groups[["where", "kind", "id", "image"]].to_numpy().tolist()
    assert table == [
        ["across train and test", "near", "train_0", 0],
        ["across train and test", "near", "train_1", 0],
        ["across train and test", "near", "test_0", 2],
    ]
    assert (groups_in_train(report), copied_test_rows(report)) == (1, 1)


def test_without_copies_the_sentence_says_none_everywhere(folder):
    loaded = folder.load()
    counts = vqa.count_copies(vqa.leakage_report(loaded.train, loaded.test).groups)
    assert counts.to_numpy().sum() == 0
    assert vqa.describe_copies(counts) == (
        "Copies of images: none across train and test; none inside train; none inside test."
    )


def test_near_copies_that_form_no_group_are_not_counted_as_one(tmp_path):
    greys = [(Image.new("RGB", (8, 8), (100 + n, 100 + n, 100 + n)), "PNG") for n in range(12)]
    loaded = with_images(tmp_path, [*greys, greys[0]], numbered(range(50, 63)))
    report = vqa.leakage_report(loaded.train, loaded.test)
    sentence = vqa.describe_copies(vqa.count_copies(report.groups))
    assert "; 1 exact group (2 rows) inside train; " in sentence
    assert "near" not in sentence
    assert (report.copies["kind"] == "near").sum() > 10  # they are listed as pairs


# --- Folds ----------------------------------------------------------------------------------------


def many_rows(n=120):
    """Training rows of two question types; some show the same image."""
    random = np.random.default_rng(0)
    answers = random.choice(list("abcd"), n)
    types = random.choice(["color", "counting"], n)
    hashes = [f"{image:x}" for image in random.integers(0, 90, n)]
    return pd.DataFrame({"answer": answers, "type": types, "pixel_hash": hashes})


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


# The folds of `many_rows(80)` by scikit-learn 1.8 and 1.9 with their own `shuffle=True`.
FOLDS_OF_1_8 = {
    2: "11001100011010001100100111110001011111000000110011110010001011000011111110010100",
    3: "22011021211010002121100121111000221100102212012012202220201121020021022100211202",
    5: "24022240021232003123300331134411443301414034132032301140244332120211344310012240",
}


@pytest.mark.parametrize("n_folds", FOLDS_OF_1_8)
def test_folds_are_those_of_scikit_learn_1_8_on_every_version(n_folds):
    folds = vqa.make_folds(many_rows(80), n_folds)
    assert "".join(str(fold) for fold in folds) == FOLDS_OF_1_8[n_folds]


def test_the_demo_has_its_folds_on_every_version_of_scikit_learn(demo_rows):
    train = demo_rows.train
    folds = vqa.make_folds(train, 3)
    rows_of_answer = pd.crosstab(train["answer"], folds).to_numpy().tolist()
    assert rows_of_answer == [[46, 47, 47], [48, 45, 47], [47, 46, 47], [46, 49, 45]]


def dealt_at_random(rows, groups):
    """Rows whose groups were dealt to three folds at random, as scikit-learn 1.6 in effect did."""
    random = np.random.default_rng(3)
    train = pd.DataFrame({"answer": random.choice(list("abcd"), rows), "type": "color"})
    group_of_row = random.integers(0, groups, rows)
    return train.assign(fold=random.integers(0, 3, groups)[group_of_row]), group_of_row


@pytest.mark.parametrize(("rows", "groups"), [(560, 560), (560, 300), (3887, 3300)])
def test_folds_that_are_dealt_at_random_are_called_uneven(rows, groups):
    train, group_of_row = dealt_at_random(rows, groups)
    said = vqa.describe_balance(vqa.fold_balance(train, group_of_row))
    assert said.startswith("Warning: folds are uneven in ")
    assert said.endswith("look at the table of copies, or take fewer folds (n_folds).")
    folds = vqa.make_folds(train, 3, groups=group_of_row)
    balance = vqa.fold_balance(train.assign(fold=folds), group_of_row)
    assert balance["is_even"].all()
    assert vqa.describe_balance(balance).startswith("Folds are even: they differ most in ")


def test_the_sentence_about_balance_names_fold_answer_and_rows():
    train = pd.DataFrame({"answer": ["a"] * 30 + ["b"] * 30, "type": "color"})
    folds = [0] * 20 + [1] * 10 + [0] * 10 + [1] * 20
    balance = vqa.fold_balance(train.assign(fold=folds), range(60))
    assert balance["part"].tolist() == ["all rows", "answer a", "answer b", "type color"]
    assert balance["is_even"].tolist() == [True, False, False, True]
    assert vqa.describe_balance(balance) == (
        "Warning: folds are uneven in 2 of 4 parts (all rows, each answer, each question type): "
        "fold 0 is off by 5.0 of 15.0 rows in answer a; fold 0 is off by 5.0 of 15.0 rows in "
        "answer b. Scores of single folds then differ by their rows too. Large groups of copies "
        "do this: look at the table of copies, or take fewer folds (n_folds)."
    )


def test_what_large_groups_force_is_not_called_uneven():
    train = pd.DataFrame({"answer": ["a", "b"] * 20, "type": "color"})
    groups = np.repeat([0, 1, 2, 3], [16, 8, 8, 8])
    balance = vqa.fold_balance(train.assign(fold=np.repeat([0, 1], [24, 16])), groups)
    assert balance["off"].tolist() == [4.0, 2.0, 2.0, 4.0]
    assert balance["is_even"].all()


# --- Many images ----------------------------------------------------------------------------------


def random_hashes(count, near, seed=0):
    """Random hashes, as bits (count, 64) and text; the last `near` are like others but for 0-6."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 2, (count, 64), dtype=np.uint8)
    for row in range(count - near, count):
        bits[row] = bits[row - near]
        bits[row, random.choice(64, random.integers(0, 7), replace=False)] ^= 1
    return bits, pd.Series([code.tobytes().hex() for code in np.packbits(bits, axis=1)])


@pytest.mark.parametrize("max_bits", [0, 4, 64])
def test_near_hashes_are_those_that_a_comparison_of_all_finds(max_bits, monkeypatch):
    monkeypatch.setattr(vqa, "HASHES_COMPARED_TOGETHER", 7)
    bits, hashes = random_hashes(count=120, near=40)
    differing = (bits[:, None] != bits[None]).sum(axis=2)
    expected = np.argwhere(np.triu(differing <= max_bits, k=1))
    assert len(expected) >= 3
    assert np.array_equal(vqa._near_pairs_by_hash(hashes, max_bits), expected)


def test_comparing_hashes_does_not_grow_with_the_square_of_the_images(monkeypatch):
    compared = []
    among = vqa._near_pairs_among

    def counted(bits, members, max_bits):
        compared.append(len(members) ** 2)
        return among(bits, members, max_bits)

    monkeypatch.setattr(vqa, "_near_pairs_among", counted)
    _, hashes = random_hashes(count=4000, near=10)
    assert len(vqa._near_pairs_by_hash(hashes, 4)) >= 3
    assert sum(compared) < 0.01 * len(hashes) ** 2


def white_pages(contents, seed=0):
    """Images of one perceptual hash, and their thumbnails by path: white, with dark spots."""
    random = np.random.default_rng(seed)
    pages = {}
    for number, size in enumerate(contents):
        page = random.integers(253, 256, (32, 32, 3), dtype=np.int16)
        row, column = random.integers(0, 32 - size, 2)
        page[row : row + size, column : column + size] = random.integers(0, 100)
        pages[str(number)] = page
    return pd.DataFrame({"dhash": "00" * 8, "image_path": [*pages]}), pages


def near_by_comparing_all(images, pages):
    return [
        (first, second, np.abs(pages[str(first)] - pages[str(second)]).mean())
        for first in range(len(images))
        for second in range(first + 1, len(images))
        if np.abs(pages[str(first)] - pages[str(second)]).mean() <= 3
    ]


@pytest.mark.parametrize("in_pairs", [0, 4, 64])
def test_white_pages_are_grouped_as_by_comparing_all(in_pairs, monkeypatch):
    monkeypatch.setattr(vqa, "IMAGES_COMPARED_IN_PAIRS", in_pairs)
    images, pages = white_pages([0] * 9 + [2] * 6 + [5] * 25)
    monkeypatch.setattr(vqa, "_thumbnail", pages.get)
    expected = near_by_comparing_all(images, pages)
    groups = vqa._linked_groups(np.array([pair[:2] for pair in expected]), len(images))
    assert np.bincount(groups).max() == 15  # pages with larger spots stay apart
    near = vqa._find_near_copies(images, 4, 3.0)
    assert np.array_equal(vqa._linked_groups(near.pairs, len(images)), groups)
    found = [(*pair, value) for pair, value in zip(near.pairs, near.differences, strict=True)]
    assert found == expected if in_pairs == 64 else set(found) <= set(expected)


def count_comparisons(monkeypatch):
    """A list that gets the number of thumbnails that are compared with one, each time."""
    compared = []
    differences = vqa._Looks.differences

    def counted(looks, image, others):
        compared.append(len(others))
        return differences(looks, image, others)

    monkeypatch.setattr(vqa._Looks, "differences", counted)
    return compared


def test_hundreds_of_white_pages_take_few_comparisons_each(monkeypatch):
    images, pages = white_pages([0] * 350 + [6] * 250)
    monkeypatch.setattr(vqa, "_thumbnail", pages.get)
    compared = count_comparisons(monkeypatch)
    near = vqa._find_near_copies(images, 4, 3.0)
    groups = vqa._linked_groups(near.pairs, len(images))
    assert np.bincount(groups).max() == 350
    assert sum(compared) < 20 * len(images)
    assert len(near.pairs) < 20 * len(images)


def pages_of_equal_squares(count, marks=2, seed=0):
    """As `white_pages`: each square of 8 x 8 pixels has so many marks, every page elsewhere."""
    random = np.random.default_rng(seed)
    pages = {}
    for number in range(count):
        page = np.full((4, 4, 64, 3), 255, dtype=np.int16)
        for row, column in np.ndindex(4, 4):
            page[row, column, random.permutation(64)[:marks]] = 40
        page = page.reshape(4, 4, 8, 8, 3).swapaxes(1, 2).reshape(32, 32, 3)
        pages[str(number)] = page
    return pd.DataFrame({"dhash": "00" * 8, "image_path": [*pages]}), pages


def test_pages_of_equal_squares_are_told_apart_by_few_comparisons(monkeypatch):
    images, pages = pages_of_equal_squares(120)
    for number in (30, 60, 90):
        pages[str(number)] = pages[str(number - 1)] - 2  # a near copy
    monkeypatch.setattr(vqa, "_thumbnail", pages.get)
    compared = count_comparisons(monkeypatch)
    near = vqa._find_near_copies(images, 4, 3.0)
    found = [(*pair, value) for pair, value in zip(near.pairs, near.differences, strict=True)]
    assert found == near_by_comparing_all(images, pages)
    assert near.pairs.tolist() == [[29, 30], [59, 60], [89, 90]]
    assert sum(compared) < len(images)
