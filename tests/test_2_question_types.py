"""Part 2, question types: how they agree with labels, whatever the choices' order or spelling.

Half of the labelled questions are in cases/question_types.csv, written before the rules and then
used to improve them; the other half, cases/question_types_unseen.csv, was written by somebody who
never saw the rules, and nothing was improved by it.
`python tests/benchmarks/question_types.py` prints which types are taken for which.
"""

import csv
import itertools
import runpy
import sys
import unicodedata
from collections import defaultdict
from pathlib import Path

import pytest
from small_competition import table, write

import vqa_helpers as vqa

CASES = Path(__file__).parent / "cases"
# File -> least share of agreement over all its questions; no type may fall below LEAST_BY_TYPE.
LABELLED = {
    "question_types.csv": 0.95,
    "question_types_unseen.csv": 0.92,
}
LEAST_BY_TYPE = 0.8


def labelled(name):
    """The rows of a file: language, question, a, b, c, d, type."""
    with (CASES / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def choices_of(row):
    return [row[letter] for letter in "abcd"]


ROWS = labelled("question_types.csv")
NFD_ROWS = [row for row in ROWS if row["language"] == "ko"]


# --- Agreement ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "least"), LABELLED.items(), ids=LABELLED)
def test_types_agree_with_labels(name, least):
    rows = labelled(name)
    is_right = defaultdict(list)
    for row in rows:
        found = vqa.question_type(row["question"], choices_of(row))
        is_right[row["type"]].append(found == row["type"])
    shares = {kind: sum(right) / len(right) for kind, right in is_right.items()}
    assert set(shares) == set(vqa.QUESTION_TYPES)
    assert {kind: share for kind, share in shares.items() if share < LEAST_BY_TYPE} == {}
    total = sum(map(sum, is_right.values()))
    assert total / len(rows) >= least


@pytest.mark.parametrize(("language", "least"), [("ko", 120), ("en", 35)])
def test_the_labelled_file_covers_every_type_in_both_languages(language, least):
    rows = [row for row in ROWS if row["language"] == language]
    assert len(rows) >= least
    assert {row["type"] for row in rows} == set(vqa.QUESTION_TYPES)


def test_the_script_prints_each_file_with_its_confusion(monkeypatch, capsys):
    script = CASES.parent / "benchmarks" / "question_types.py"
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    for name in LABELLED:
        assert f"{name}: {len(labelled(name))} questions" in printed
    header = next(line for line in printed.splitlines() if line.startswith("found"))
    assert set(header.split()[1:]) == set(vqa.QUESTION_TYPES)


# --- What must not matter -------------------------------------------------------------------------


def test_the_order_of_the_choices_does_not_matter():
    for row in ROWS:
        orders = itertools.permutations(choices_of(row))
        types = {vqa._question_type.__wrapped__(row["question"], order) for order in orders}
        assert types == {vqa.question_type(row["question"], choices_of(row))}, row["question"]


def decompose(text):
    return unicodedata.normalize("NFD", text)


SPELLINGS = {
    "decomposed": decompose,
    "with blanks around": lambda text: f" \t{text}\u00a0\n",
    "with characters that show nothing": lambda text: "\u200b" + text.replace(" ", " \u3164\u00ad"),
    "with wide blanks": lambda text: text.replace(" ", "\u3000"),
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_the_spelling_of_a_text_does_not_matter(spell):
    for row in ROWS:
        wanted = vqa.question_type(row["question"], choices_of(row))
        choices = [spell(choice) for choice in choices_of(row)]
        assert vqa.question_type(spell(row["question"]), choices) == wanted, row["question"]


# --- Words that mislead ---------------------------------------------------------------------------

MISLEADING = {
    "위치 in 샌드위치": ("샌드위치는 얼마입니까?", "ocr"),
    "위치 in 샌드위치, counted": ("샌드위치는 몇 개입니까?", "counting"),
    "색 in 특색": ("이 식당의 특색 메뉴 가격은?", "ocr"),
    "색 in 검색": ("검색창에 입력된 단어는?", "ocr"),
    "색 in 색종이": ("색종이로 무엇을 접고 있나요?", "general"),
    "수 in 수도": ("수도꼭지는 어디에 있습니까?", "location"),
    "수 in 할 수 있다": ("이 문으로 나갈 수 있나요?", "yesno"),
    "a colour of something else": ("빨간색 옷을 입은 사람은 몇 명인가요?", "counting"),
    "writing of something else": ("글자가 적힌 우산은 무슨 색입니까?", "color"),
    "a place of something else": ("왼쪽에 서 있는 사람은 누구인가요?", "general"),
    "a polite ending, price": ("이 메뉴는 얼마인가요?", "ocr"),
    "a polite ending, time": ("공연은 몇 시에 시작하나요?", "ocr"),
    "a polite ending, day": ("축제는 언제 열립니까?", "ocr"),
    "a polite ending, way": ("이 기계는 어떻게 켭니까?", "general"),
    "a polite ending, person": ("누가 공을 들고 있나요?", "general"),
    "a number that is read": ("제한 속도는 시속 몇 킬로미터인가요?", "ocr"),
    "a floor": ("식당은 몇 층에 있나요?", "ocr"),
    "a place in a row": ("안경 쓴 사람은 왼쪽에서 몇 번째입니까?", "location"),
    "what a board says of a place": ("벽보에 적힌 행사 장소는 어디인가요?", "ocr"),
    "the place of what is written": ("간판에 적힌 글자는 어디에 있나요?", "location"),
    "a number that is asked for by name": ("바늘이 가리키는 숫자는 몇입니까?", "ocr"),
    "what is forbidden": ("이곳에서 하면 안 되는 행동은?", "general"),
    "what somebody does": ("이 사람이 하고 있는 행동은?", "attribute"),
    "the name of an animal": ("이 동물의 이름은 무엇인가요?", "general"),
    "the name of a shop": ("이 빵집의 이름은 무엇인가요?", "ocr"),
    "words in quotation marks": ("사진에 '몇 개'라는 글자가 있나요?", "yesno"),
    "no blank before the counter": ("사람이 모두 몇명인가요?", "counting"),
    "something, not what": ("남자가 뭔가 들고 있나요?", "yesno"),
    "a longer text before the question": ("사진을 잘 보세요. 차는 어디에 있나요?", "location"),
    "is, with where behind it": ("Is the man who asks where to go old?", "yesno"),
    "an aside in front": ("In the photo, is there a bicycle?", "yesno"),
    "a request": ("Can you tell me what color the door is?", "color"),
    "number of": ("What is the number of chairs?", "counting"),
    "number on": ("What is the number on the door?", "ocr"),
    "place as a frame": ("What is in the upper left corner?", "general"),
    "how long is a length": ("How long is the rope?", "attribute"),
    "how long is a time": ("How long does the parking last?", "ocr"),
}


# Each goes through a rule that neither the labelled questions nor those above need.
RULES = {
    "무슨 수가 있겠습니까?": "general",
    "간판에 적혀 있는 것은?": "ocr",
    "벽보에 적힌 행사는?": "ocr",
    "축제는 며칠 동안 열리나요?": "ocr",
    "이 아이는 몇 살입니까?": "attribute",
    "손님이 모두 몇 분 계신가요?": "counting",
    "벽에 그림이 몇 점 걸려 있나요?": "counting",
    "이 건물은 몇 층으로 되어 있나요?": "counting",
    "승강기의 정원은 몇 명입니까?": "ocr",
    "버스로 얼마나 걸립니까?": "ocr",
    "역까지 얼마나 멉니까?": "ocr",
    "강아지는 얼마나 큽니까?": "attribute",
    "이 사진의 계절은 언제입니까?": "attribute",
    "어디로 전화해야 합니까?": "ocr",
    "도착지는 어디라고 적혀 있나요?": "ocr",
    "이 도구는 어디에 쓰입니까?": "general",
    "가게 이름은 어떻게 적혀 있나요?": "ocr",
    "하늘이 어떻게 보입니까?": "attribute",
    "간판에 뭐라고 써 있나요?": "ocr",
    "이 음식을 무엇이라고 부릅니까?": "general",
    "What time of day is it?": "attribute",
    "What is the name of the animal?": "general",
    "How is the name of the shop spelled?": "ocr",
    "Who wrote the book?": "ocr",
}


@pytest.mark.parametrize(("question", "kind"), RULES.items())
def test_each_rule_has_a_question_that_needs_it(question, kind):
    assert vqa.question_type(question) == kind


@pytest.mark.parametrize(("question", "kind"), MISLEADING.values(), ids=MISLEADING)
def test_a_keyword_in_another_role_does_not_decide(question, kind):
    assert vqa.question_type(question) == kind


COLORS = ["빨간색", "파란색", "노란색", "흰색"]
CHOICES_SPEAK = {
    "four colours": ("양말은 어떤가요?", COLORS, "color"),
    "four colours in English": ("The bus?", ["dark blue", "red", "green", "grey"], "color"),
    "four counts": ("탁자 위의 컵?", ["1개", "두 개", "3개", "넷"], "counting"),
    "four amounts": ("탁자 위의 컵?", ["1,000원", "2,000원", "500원", "900원"], "ocr"),
    "four sides": ("빨간 차?", ["왼쪽", "오른쪽", "가운데", "위"], "location"),
    "yes and no": ("컵, 탁자 위", ["예", "아니요", "모름", "둘 다"], "yesno"),
    "four people are not a yes": ("손님?", ["네 명", "한 명", "두 명", "없음"], "counting"),
    "no colour among them": (
        "무슨 색 옷의 아이가 이겼나요?",
        ["민수", "철수", "영희", "둘 다"],
        "general",
    ),
    "no yes or no": ("이 사람은 학생인가요?", ["학생", "교사", "의사", "군인"], "general"),
    "one of two colours": ("차는 빨간색인가요, 흰색인가요?", COLORS, "color"),
    "words that are clear": ("차는 몇 대입니까?", COLORS, "counting"),
    "blank choices": ("양말은 어떤가요?", ["빨간색", "흰색", "", "\u3164"], "color"),
    "parts of the day": ("언제 찍었나요?", ["아침", "한낮", "저녁", "한밤"], "attribute"),
}


@pytest.mark.parametrize(("question", "choices", "kind"), CHOICES_SPEAK.values(), ids=CHOICES_SPEAK)
def test_choices_speak_where_the_words_are_in_doubt(question, choices, kind):
    assert vqa.question_type(question, choices) == kind


# --- Callers --------------------------------------------------------------------------------------


def test_table_and_prompt_have_the_type_that_the_choices_give(tmp_path):
    """Without its choices, the question is about a state, and would get the hint for that."""
    question = "양말은 어떤가요?"
    assert vqa.question_type(question) == "attribute"
    row = f"r1,train/1.png,{question},빨간색,파란색,노란색,흰색,a"
    loaded = vqa.load_competition(write(tmp_path, table("train", row)))
    assert loaded.train["type"].tolist() == ["color"]
    _, user = vqa.build_messages(loaded.train.iloc[0], order=(3, 1, 0, 2))
    hint = vqa.PROMPT_TEMPLATES["color"].split("{question}")[0]
    assert user["content"][1]["text"].startswith(hint)
