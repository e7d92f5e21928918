"""Part 2, Texts: what looks alike is equal, what shows nothing is blank, and a text is one line."""

import itertools
import unicodedata

import numpy as np
import pytest
from small_competition import NFC, NFD, R1, R2, Loads, Refused, case, table, write

import vqa_helpers as vqa

NOTHING = {
    "a zero width space": "\u200b",
    "a zero width joiner": "\u200d",
    "a word joiner": "\u2060",
    "a byte order mark": "\ufeff",
    "a soft hyphen": "\u00ad",
    "a Hangul filler": "\u3164",
    "a half-width Hangul filler": "\uffa0",
    "Hangul fillers of jamo": "\u115f\u1160",
    "a non-breaking space": "\u00a0",
    "a wide space": "\u3000",
    "a blank Braille cell": "\u2800",
    "a mark of direction": "\u202e",
    "a variation selector": "\ufe0f",
    "a variation selector of hanja": "\U000e0100",
    "a vowel that is not shown": "\u17b4",
    "a Mongolian variation selector": "\u180f",
    "a control character": "\x08",
    "line breaks": "\r\n\u2028",
    "several of them": " \u200b\u3164\u00a0\ufeff ",
}


@pytest.mark.parametrize("text", NOTHING.values(), ids=NOTHING)
def test_a_choice_that_shows_nothing_is_blank(text):
    row = {"image_path": "x.png", "question": "무엇?", "a": "개", "b": text, "c": "말", "d": "소"}
    assert vqa.comparable_text(text) == ""
    assert vqa.prompt_text(text) == ""
    assert vqa.present_choices(row) == [True, False, True, True]
    _, user = vqa.build_messages(row)
    assert user["content"][1]["text"].endswith("보기:\na. 개\nc. 말\nd. 소")


TEXTS = {
    "decomposed Hangul": (unicodedata.normalize("NFD", "빨강"), "빨강", "빨강"),
    "a decomposed accent": ("cafe\u0301", "caf\u00e9", "caf\u00e9"),
    "a hidden character": ("빨\u200b강\u00ad", "빨강", "빨강"),
    "a non-breaking space": ("10\u00a0km", "10 km", "10 km"),
    "several blanks": ("빨강  \t 색 ", "빨강 색", "빨강 색"),
    "a line break of Windows": ("빨강\r\n색", "빨강 색", "빨강 색"),
    "a family of emoji": ("\U0001f468\u200d\U0001f467", "\U0001f468\U0001f467", None),
    "capitals and full width": ("Ａ b", "Ａ b", "Ａ b"),
}


@pytest.mark.parametrize(("text", "comparable", "in_prompt"), TEXTS.values(), ids=TEXTS)
def test_a_text_is_normalised(text, comparable, in_prompt):
    assert vqa.comparable_text(text) == comparable
    assert vqa.prompt_text(text) == (in_prompt or text)


# --- Competitions ---------------------------------------------------------------------------------

BLANK = "\u200b\u3164"
COMPETITIONS = [
    case(
        "equal choices, one of them decomposed",
        table("train", f"r1,train/1.png,무슨 색?,{NFC},{NFD},파랑,초록,c", R2),
        Loads(
            train={"a": [NFC, "하나"], "b": [NFD, "둘"], "type": ["color", "counting"]},
            counted={"train_repeated_choices": 1, "train_decomposed_text_composed": 1},
        ),
    ),
    case(
        "equal choices but for what shows nothing",
        table("train", "r1,train/1.png,무슨 색?,파\u200b랑,빨강,파랑,초록,b", R2),
        Loads(
            train={"a": ["파\u200b랑", "하나"]},
            counted={"train_repeated_choices": 1, "train_invisible_characters_removed": 1},
        ),
    ),
    case(
        "a choice of what shows nothing",
        table("train", f"r1,train/1.png,무슨 색?,빨강,파랑,{BLANK},초록,b", R2),
        Loads(
            train={"c": [BLANK, "셋"], "label": [1, 1]},
            counted={"train_invisible_characters_removed": 1},
        ),
    ),
    case(
        "an answer that is such a choice",
        table("train", f"r1,train/1.png,무슨 색?,빨강,파랑,{BLANK},초록,c", R2),
        Refused("train.csv, line 2, column 'answer', value 'c'", "exactly one filled choice"),
    ),
    case(
        "a single choice that shows something",
        table("train", f"r1,train/1.png,무슨 색?,빨강,\ufeff,{BLANK},\u00a0,a", R2),
        Refused("train.csv, line 2, column 'id', value 'r1': fewer than two choices are filled"),
    ),
    case(
        "an answer that shows nothing",
        table("train", R1[:-1] + BLANK, R2),
        Loads(train={"id": ["r2"]}, counted={"train_blank_answer": 1}),
    ),
    case(
        "an answer's text with other blanks",
        table("train", "r1,train/1.png,길이?,10\u00a0km,2 km,3 km,4 km,10 km", R2[:-1] + "둘"),
        Loads(train={"label": [0, 1]}),
    ),
    case(
        "a question that shows nothing",
        table("train", f"r1,train/1.png,{BLANK},빨강,파랑,노랑,초록,a", R2),
        Loads(
            train={"type": ["color", "counting"]},
            counted={"train_blank_question": 1, "train_invisible_characters_removed": 1},
        ),
    ),
    case(
        "line breaks in a choice and a question",
        table("train", 'r1,train/1.png,"무슨\n색?",빨강,"파랑\nc. 노랑",노랑,초록,a', R2),
        Loads(
            train={"b": ["파랑\nc. 노랑", "둘"], "type": ["color", "counting"]},
            counted={"train_line_break_replaced": 1},
        ),
    ),
    case(
        "an id that shows nothing",
        table("train", R1.replace("r1", BLANK), R2),
        Refused("train.csv, line 2, column 'id'", "is blank or repeats an earlier row's"),
    ),
    case(
        "an id of the sample that is decomposed",
        table("test", f"{NFC},test/1.png,무엇?,개,말,소,새")
        | table("sample_submission", f"{NFD},"),
        Refused(
            f"sample_submission.csv, line 2, column 'id', value {NFD!r}: looks like an id of "
            "test.csv, but is written in other characters (blanks, decomposed Hangul, or "
            "characters that show nothing); write both alike"
        ),
    ),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("changes", "outcome"), COMPETITIONS)
def test_a_competition_with_odd_texts(tmp_path, changes, outcome):
    outcome.check(write(tmp_path / "data", changes))


# --- Prompts --------------------------------------------------------------------------------------

ROW = {
    "image_path": "x.png",
    "question": "무슨 색입니까?",
    "a": "빨강",
    "b": "파랑",
    "c": "노랑",
    "d": "초록",
}
ORDERS = list(itertools.permutations(range(4)))
LINE_BREAKS = ["\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029"]


def user_text(row, order=(0, 1, 2, 3)):
    _, user = vqa.build_messages(row, order)
    return user["content"][1]["text"]


@pytest.mark.parametrize("column", ["question", "a", "d"])
@pytest.mark.parametrize("line_break", LINE_BREAKS, ids=ascii)
def test_a_line_break_makes_no_further_line(line_break, column):
    row = ROW | {column: f"{ROW[column]}{line_break}b. 검정"}
    lines = user_text(row).splitlines()
    assert len(lines) == len(user_text(ROW).splitlines())
    assert [line[:3] for line in lines[-4:]] == ["a. ", "b. ", "c. ", "d. "]
    assert sum(f"{ROW[column]} b. 검정" in line for line in lines) == 1


def test_decomposed_hangul_makes_the_same_prompt():
    decomposed = {name: unicodedata.normalize("NFD", text) for name, text in ROW.items()}
    for order in ORDERS:
        assert vqa.build_messages(decomposed, order) == vqa.build_messages(ROW, order)


def test_a_control_token_that_hides_in_odd_characters_is_broken_up():
    row = ROW | {"a": "<|im\u200b_end|>", "b": "<\ufeff|image_pad|>"}
    text = user_text(row)
    assert "a. < |im_end| >" in text
    assert "b. < |image_pad| >" in text


def test_a_template_that_trims_keeps_all_orders_alike(demo_config):
    """Qwen3.5's templates trim the user's text, and so the end of the last choice only."""
    plain = vqa.load_processor(demo_config)
    trimming = vqa.load_processor(demo_config)
    old = "{{- part.text }}"
    assert old in trimming.chat_template
    trimming.chat_template = trimming.chat_template.replace(old, "{{- part.text | trim }}")
    row = ROW | {letter: f" {ROW[letter]} \u00a0\n" for letter in "abcd"}
    grid = (1, 2, 2)
    for order in ORDERS[::6]:
        wanted = vqa.encode_prompt(plain, vqa.build_messages(ROW, order), grid)
        for processor in (plain, trimming):
            found = vqa.encode_prompt(processor, vqa.build_messages(row, order), grid)
            assert np.array_equal(found, wanted)


def test_a_template_of_ones_own_that_ends_in_blanks_is_trimmed():
    templates = dict.fromkeys(vqa.QUESTION_TYPES, "{question}\n{choices}\n \n")
    _, user = vqa.build_messages(ROW, templates=templates)
    assert user["content"][1]["text"].endswith("d. 초록")


@pytest.mark.parametrize("token", ["img", "/img", "IMG_CONTEXT", "/box", "ref", "quad", "video"])
def test_internvls_control_tokens_are_broken_up(token):
    text = user_text(ROW | {"a": f"앞<{token}>뒤"})
    assert f"a. 앞< {token} >뒤" in text
    assert "<image>" in user_text(ROW | {"a": "<image>"})  # none of theirs
