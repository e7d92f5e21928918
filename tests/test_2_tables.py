"""Part 2, Tables: CSV files of other programs load exactly, or are refused by file and line.

Most cases are data in cases/; what they mean is said in small_competition.py.
"""

import pandas as pd
import pytest
from small_competition import (
    R1,
    R2,
    T1,
    T2,
    TEST,
    TRAIN,
    Loads,
    Refused,
    case,
    lines,
    read_cases,
    table,
    write,
)

import vqa_helpers as vqa

ENCODINGS = [
    *read_cases("encodings"),
    case(
        "no line end at the end",
        {"test.csv": lines(TEST, T1, T2)[:-1]},
        Loads(test={"d": ["아래", "말"]}),
    ),
    case(
        "one damaged byte in utf-8",
        {"train.csv": lines(TRAIN, R1, R2).replace("넷".encode(), "넷".encode()[:2])},
        Refused("train.csv, line 3: not UTF-8", "save it as UTF-8"),
    ),
]
COLUMNS = [
    *read_cases("columns"),
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
]
ROWS = [
    *read_cases("rows"),
    case(
        "a quote that swallows a very long rest",
        table("train", R1.replace("빨강", '"빨강'), *[R2] * 4000),
        Refused(
            "train.csv, line 2: field larger than field limit", "check the quotes from here on"
        ),
    ),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("changes", "outcome"), ENCODINGS + COLUMNS + ROWS)
def test_a_table_loads_exactly_or_is_refused_by_file_and_line(tmp_path, changes, outcome):
    outcome.check(write(tmp_path / "data", changes))


def test_a_workbook_in_the_place_of_a_table_is_called_so(tmp_path):
    refused = Refused("train.csv: an Excel workbook or a .zip", "save it as CSV in UTF-8")
    refused.check(write(tmp_path, {"train.csv": b"PK\3\4\x14\0\6\0"}))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("changes", "outcome"), read_cases("samples"))
def test_sample_and_test_file_have_the_same_rows_or_are_refused(tmp_path, changes, outcome):
    outcome.check(write(tmp_path / "data", changes))


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "'quoted", "plain", "", "None"]
)
def test_tables_for_people_hold_no_formulas_and_are_read_back_verbatim(tmp_path, text):
    path = tmp_path / "table.csv"
    vqa.write_table(pd.DataFrame({"a": [text], "b": ["x"]}), path)
    cell = pd.read_csv(path, dtype=str, keep_default_na=False)["a"].iloc[0]
    assert not cell.startswith(("=", "+", "-", "@", "\t"))
    assert vqa.read_table(path)["a"].iloc[0] == text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("cells", "lines"),
    [
        (pd.Series([1, 2], dtype=object), "1\n2\n"),
        (pd.Series([1.5, None], dtype=object), '1.5\n""\n'),
        (pd.Series([True, None, "=1"], dtype=object), 'True\n""\n\'=1\n'),
        (pd.Series(["-1", "x"], dtype="category"), "'-1\nx\n"),
        (pd.Series([-1.5, 2.0]), "-1.5\n2.0\n"),
        (pd.Series([], dtype=object), ""),
    ],
    ids=["whole numbers", "numbers and nothing", "mixed", "categories", "floats", "no row"],
)
def test_cells_of_every_kind_are_written_without_a_warning(tmp_path, cells, lines):
    """pandas 2.2 warns where text is replaced in a column of objects that are numbers."""
    path = tmp_path / "table.csv"
    vqa.write_table(pd.DataFrame({"a": cells}), path)
    assert path.read_text(encoding="utf-8") == f"a\n{lines}"


@pytest.mark.parametrize("text", ["x\ry", "x\r\ny", "x\ny", " x\r", 'x"\ry', "x,\ry"])
def test_line_ends_inside_a_text_end_no_row_of_our_tables(text, tmp_path):
    """pandas writes a lone carriage return without quotes, and reads it as the row's end."""
    frame = pd.DataFrame({"id": ["1", "2"], "a": [text, "z"], "label": [3, 0]})
    vqa.write_table(frame, tmp_path / "table.csv")
    read = vqa.read_table(tmp_path / "table.csv")
    assert read.to_dict("list") == {"id": ["1", "2"], "a": [text, "z"], "label": [3, 0]}
