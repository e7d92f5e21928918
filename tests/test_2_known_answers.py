"""Part 2, Known answers: test rows that equal a training row, and the answer that they take."""

import logging

import numpy as np
import pandas as pd
import pytest
from competition_folder import picture
from planted import planted_run

import vqa_helpers as vqa

QUESTION = {"pixel_hash": "cat", "question": "몇 마리입니까?"}
TRAIN_ROW = {"id": "q1", **QUESTION, "a": "하나", "b": "둘", "c": "셋", "d": "넷", "label": 1}
TEST_ROW = {"id": "t1", **QUESTION, "a": "하나", "b": "둘", "c": "셋", "d": "넷"}


def known(test_row, *more_train_rows):
    """What is known of one test row beside TRAIN_ROW and more rows."""
    train = pd.DataFrame([TRAIN_ROW, *more_train_rows])
    return vqa.known_answers(train, pd.DataFrame([test_row])).to_numpy().tolist()


EQUAL_ROWS = {
    "same order": ({}, "b"),
    "another order": ({"a": "넷", "b": "셋", "c": "둘", "d": "하나"}, "c"),
    "other blanks": ({"question": "몇  마리입니까? ", "b": "둘\u200b"}, "b"),
    "decomposed Hangul": ({"b": "\u1103\u116e\u11af"}, "b"),
}


@pytest.mark.parametrize(("changes", "letter"), EQUAL_ROWS.values(), ids=EQUAL_ROWS)
def test_an_equal_row_has_the_answer_under_the_letter_that_it_shows(changes, letter):
    assert known({**TEST_ROW, **changes}) == [["t1", "q1", letter, ""]]


OTHER_ROWS = {
    "image": {"pixel_hash": "dog"},
    "no usable image": {"pixel_hash": ""},
    "question": {"question": "몇 명입니까?"},
    "a choice": {"d": "다섯"},
    "a capital": {"a": "A"},
}


@pytest.mark.parametrize("changes", OTHER_ROWS.values(), ids=OTHER_ROWS)
def test_a_row_that_differs_is_not_known(changes):
    assert known({**TEST_ROW, **changes}) == []


def test_two_rows_without_a_usable_image_are_not_equal():
    train = pd.DataFrame([{**TRAIN_ROW, "pixel_hash": ""}])
    test = pd.DataFrame([{**TEST_ROW, "pixel_hash": ""}])
    assert vqa.known_answers(train, test).empty


def test_copies_that_agree_in_another_order_count_once():
    turned = {**TRAIN_ROW, "id": "q2", "a": "둘", "b": "하나", "label": 0}
    assert known(TEST_ROW, turned) == [["t1", "q1", "b", ""]]


def test_copies_that_disagree_are_counted_and_not_used():
    other = {**TRAIN_ROW, "id": "q2", "label": 3}
    assert known(TEST_ROW, other) == [["t1", "q1", "", vqa.COPIES_DISAGREE]]


def test_an_answer_that_two_choices_have_is_counted_and_not_used():
    twice = {"c": "둘"}
    train = pd.DataFrame([{**TRAIN_ROW, **twice}])
    test = pd.DataFrame([{**TEST_ROW, **twice}])
    [row] = vqa.known_answers(train, test).to_numpy().tolist()
    assert row == ["t1", "q1", "", vqa.ANSWER_IS_REPEATED]


def test_without_equal_rows_the_sentence_says_so():
    nothing = vqa.known_answers(pd.DataFrame([TRAIN_ROW]), pd.DataFrame([TEST_ROW]).head(0))
    assert vqa.describe_known_answers(nothing, 300, in_use=True) == (
        "Known answers: 0 of 300 test rows equal a training row in image, question and choices."
    )


def test_the_sentence_counts_each_reason_why_an_answer_is_not_used():
    problems = ["", vqa.COPIES_DISAGREE, vqa.COPIES_DISAGREE, vqa.ANSWER_IS_REPEATED]
    text = vqa.describe_known_answers(pd.DataFrame({"problem": problems}), 9, in_use=True)
    assert "The submission takes 1 of their answers (use_known_answers is on). " in text
    assert text.endswith(
        "Not usable: 2 (its copies in train disagree), "
        "1 (several of its choices read like the answer)."
    )


# --- In a run -------------------------------------------------------------------------------------


@pytest.fixture
def planted(folder, tmp_path):
    """Four rows a split; test 0 and 1 copy training rows 2 and 3, of which 3 has a rival."""
    for number, copied in ((0, 2), (1, 3)):
        picture(copied).save(folder.root / "test" / f"{number}.png")
    picture(3).save(folder.root / "train" / "0.png")  # its answer is a, that of row 3 is d
    test = [
        "test_0,test/0.png,무슨 색입니까?,노랑,빨강,파랑,초록",  # train_2: c, 노랑
        "test_1,test/1.png,무슨 색입니까?,빨강,파랑,노랑,초록",
        "test_2,test/2.png,무슨 색입니까?,빨강,파랑,노랑,초록",
        "test_3,test/3.png,무슨 색입니까?,빨강,파랑,노랑,초록",
    ]
    folder.write("test", "id,path,question,a,b,c,d", test)
    competition = folder.load()

    def start(**settings):
        outputs = str(tmp_path / "outputs")
        config = vqa.Config.preset("demo", n_folds=2, output_dir=outputs, **settings)
        run = vqa.start_run(config, competition, [0, 0, 1, 1])
        return planted_run(run, signals=(9.0, 9.0))  # answers a, b, c, d

    return start


def test_a_submission_takes_known_answers_only_where_the_setting_asks(planted, caplog):
    caplog.set_level(logging.INFO)
    off = planted(run_name="off")
    frames = vqa.write_submissions(off, vqa.evaluate_run(off))
    model_answers = frames["ensemble"]["answer"].tolist()
    assert model_answers == [*"abcd"]
    assert "does not take 1 of their answers" in frames["ensemble"].attrs["known_answers"]

    on = planted(run_name="on", use_known_answers=True, seed=7)
    wrong = np.zeros((4, 2, 4))
    wrong[:, :, 1] = 30.0  # the models say b in every row
    for fold in (0, 1):
        path = on.fold_dir(fold) / "test.npz"
        vqa.write_logits(path, on.test, wrong, ["rotation 0", "rotation 1"], on.fingerprint)
    caplog.clear()
    evaluation = vqa.evaluate_run(on)
    for name, frame in vqa.write_submissions(on, evaluation).items():
        assert frame["answer"].tolist() == [*"abbb"]
        assert frame.attrs["letters"] == {"a": 1, "b": 3, "c": 0, "d": 0}
        sentence = frame.attrs["known_answers"]
        assert sentence == (
            "Known answers: 2 of 4 test rows equal a training row in image, question and choices. "
            "The submission takes 1 of their answers (use_known_answers is on). "
            "Not usable: 1 (its copies in train disagree)."
        )
        file = f"submission_{name}.csv"
        assert f"Decision: {file}: known answers change 1 row" in caplog.messages
        assert f"{file}: {sentence}" in caplog.messages
    assert sentence in vqa._report_introduction(on, evaluation)


@pytest.mark.slow
def test_an_ensemble_of_runs_takes_known_answers_where_one_of_them_does(planted, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folders = []
    for settings in ({"run_name": "off"}, {"run_name": "on", "use_known_answers": True}):
        run = planted(**settings)
        folders.append(run.directory)
    _, answers = vqa.ensemble_runs(folders, tmp_path / "both")
    assert f"Decision: known answers are used, as in {folders[1]}" in caplog.messages
    assert "takes 1 of their answers" in answers.attrs["known_answers"]
    _, answers = vqa.ensemble_runs(folders[:1], tmp_path / "one")
    assert "does not take 1 of their answers" in answers.attrs["known_answers"]


def test_texts_of_rows_with_other_images_are_not_compared(monkeypatch):
    """Of a large table a few rows show an image that is in train, too."""
    compared = []
    comparable_text = vqa.comparable_text

    def counted(text):
        compared.append(text)
        return comparable_text(text)

    monkeypatch.setattr(vqa, "comparable_text", counted)
    others = [{**TEST_ROW, "id": f"other {number}", "pixel_hash": "dog"} for number in range(50)]
    test = pd.DataFrame([*others, TEST_ROW])
    found = vqa.known_answers(pd.DataFrame([TRAIN_ROW]), test)
    assert found.to_numpy().tolist() == [["t1", "q1", "b", ""]]
    assert len(compared) < 20  # of the two equal rows, a few times
