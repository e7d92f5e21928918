"""Combine finished runs twice on the CPU: seconds, and whether submission and ladder are the same bytes.

python tests/benchmarks/reensemble.py outputs/RUN outputs/OTHER outputs/THIRD
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
        start, place = time.perf_counter(), Path(folder) / f"repetition_{number}"
        vqa.ensemble_runs(directories, place)
        rows[number] = {"seconds": f"{time.perf_counter() - start:.1f}"}
        for name in ("submission.csv", "ladder.csv"):
            rows[number][name] = hashlib.sha256((place / name).read_bytes()).hexdigest()
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("repetition")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders of finished runs on the same rows")
    with tempfile.TemporaryDirectory() as folder:
        table = repeated(parser.parse_args().runs, folder)
    print(vqa.markdown_table(table))
    same = (table.drop(columns="seconds").nunique() == 1).all()
    print(
        "the same bytes" if same else "NOT the same bytes",
        "| torch was loaded:",
        "torch" in sys.modules,
    )
    sys.exit(not same)


if __name__ == "__main__":
    main()
