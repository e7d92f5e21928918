"""Combine finished runs twice: are submission and ladder the same bytes, and how long does it take?

    python tests/benchmarks/reensemble.py outputs/RUN outputs/OTHER outputs/THIRD

Prints seconds and the SHA-256 of both files of each repetition, and whether torch was loaded. It
needs the CPU only, and finished runs; nothing is trained.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import vqa_helpers as vqa


def repeated(directories: Sequence[str | Path], folder: str | Path, times: int = 2) -> pd.DataFrame:
    """Seconds and SHA-256 of both files of each repetition, which has a new folder in `folder`."""
    rows = {}
    for number in range(times):
        place = Path(folder) / f"repetition_{number}"
        start = time.perf_counter()
        vqa.ensemble_runs(directories, place)
        seconds = time.perf_counter() - start
        rows[number] = {
            "seconds": f"{seconds:.1f}",
            "submission.csv": hashlib.sha256((place / "submission.csv").read_bytes()).hexdigest(),
            "ladder.csv": hashlib.sha256((place / "ladder.csv").read_bytes()).hexdigest(),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("repetition")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders of finished runs on the same rows")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = repeated(options.runs, folder)
    print(vqa.markdown_table(table))
    is_same = (table.drop(columns="seconds").nunique() == 1).all()
    sentence = "the same bytes" if is_same else "NOT the same bytes"
    print(sentence, "| torch was loaded:", "torch" in sys.modules)
    sys.exit(not is_same)


if __name__ == "__main__":
    main()
