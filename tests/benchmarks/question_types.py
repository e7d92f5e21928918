"""Print, for each labelled file of questions, how the types that are found agree with the labels.

    python tests/benchmarks/question_types.py [--wrong]

Rows of the matrix are labelled types, columns are found ones; `--wrong` lists the questions too.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import vqa_helpers as vqa

CASES = Path(__file__).resolve().parents[1] / "cases"
CHOICES = list(vqa.CHOICES)


def read_labelled(path: Path) -> pd.DataFrame:
    """The file's rows (language, question, a, b, c, d, type), with the type `found` for each."""
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    found = [
        vqa.question_type(row["question"], [row[choice] for choice in CHOICES])
        for row in rows.to_dict("records")
    ]
    return rows.assign(found=found)


def agreement(rows: pd.DataFrame) -> pd.Series:
    """Share of the rows of each labelled type whose type is found, and of "all"."""
    is_right = rows["found"] == rows["type"]
    by_type = is_right.groupby(rows["type"]).mean()
    return pd.concat([by_type, pd.Series({"all": is_right.mean()})])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wrong", action="store_true", help="list the rows that disagree")
    arguments = parser.parse_args()
    for path in sorted(CASES.glob("question_types*.csv")):
        rows = read_labelled(path)
        languages = rows["language"].value_counts().to_dict()
        print(f"\n{path.name}: {len(rows)} questions {languages}")
        print(pd.crosstab(rows["type"], rows["found"]).to_string())
        print(agreement(rows).round(3).to_string())
        if arguments.wrong:
            wrong = rows[rows["found"] != rows["type"]]
            print(wrong.to_csv(index=False))


if __name__ == "__main__":
    main()
