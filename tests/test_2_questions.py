"""Part 2, Questions: their types, choices that are kept as they are, and what an answer means.

Most cases are data in cases/; what they mean is said in small_competition.py.
"""

import pytest
from small_competition import (
    NFC,
    NFD,
    R2,
    Loads,
    answered,
    case,
    doubtful,
    labels,
    read_cases,
    table,
    write,
)

import vqa_helpers as vqa

# What spreadsheets, pandas and JSON would each read as something else.
KEPT_TEXTS = [
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
]
DECOMPOSED = "e\u0301"
CHOICES = [
    *(
        case(
            f"the text {text!r} is kept",
            table("train", R2.replace("셋", text)),
            Loads(train={"c": [text], "a": ["하나"]}),
        )
        for text in KEPT_TEXTS
    ),
    case(
        "a decomposed text is kept and counted",
        table("train", R2.replace("셋", DECOMPOSED)),
        Loads(train={"c": [DECOMPOSED]}, counted={"train_decomposed_text_composed": 1}),
    ),
]
ANSWERS = [
    *read_cases("answers"),
    case(
        "a text in another Unicode form",
        answered(f"{NFC},파랑,노랑,초록", NFD, "파랑"),
        labels(0, 1),
    ),
    case(
        "a long text is cut in the message",
        answered("w,x,y,z", "가" * 999),
        doubtful(2, "가" * 80),
    ),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("changes", "outcome"), CHOICES + read_cases("choices"))
def test_choices_are_kept_verbatim_or_refused_by_row(tmp_path, changes, outcome):
    outcome.check(write(tmp_path / "data", changes))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("changes", "outcome"), ANSWERS)
def test_an_answer_means_exactly_one_choice_or_is_refused(tmp_path, changes, outcome):
    outcome.check(write(tmp_path / "data", changes))


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("사진 속 사람은 모두 몇 명인가요?", "counting"),
        ("접시 위에 놓인 컵의 개수는?", "counting"),
        ("How many dogs are there?", "counting"),
        ("자동차는 무슨 색인가요?", "color"),
        ("What color is the text?", "color"),
        ("간판에 적힌 글자는 무엇인가요?", "ocr"),
        ("버스 번호는 무엇입니까?", "ocr"),
        ("What does the sign say?", "ocr"),
        ("고양이가 있나요?", "yesno"),
        ("이 사진은 실내에서 찍은 것이 맞습니까?", "yesno"),
        ("Is the door open?", "yesno"),
        ("고양이는 어디에 있나요?", "location"),
        ("의자 왼쪽에 무엇이 있습니까?", "general"),
        ("Where is the cat?", "location"),
        ("탁자는 어떤 모양인가요?", "attribute"),
        ("What kind of animal is this?", "attribute"),
        ("이 장면을 설명하는 것은?", "general"),
    ],
)
def test_question_types(question, expected):
    assert vqa.question_type(question) == expected
