"""Train a part of the demo with and without the rows of a second round like it.

    python tests/benchmarks/related_rounds.py               # 120 rows of the demo and 560 more
    python tests/benchmarks/related_rounds.py --rows 560    # all rows of the demo

The second round is made by data/make_demo.py with another seed, brought into a folder by
`write_competition`, and joins as `extra_train_dirs`. Prints what rows each model trained on, then
a table on out-of-fold rows and one on the hidden answers, with 90 % intervals that respect images.
Both runs have the same epochs, so that the one with more rows takes more steps. It runs on any
machine; a run that is not there yet is trained.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from leaderboard import finished_run
from soft_targets import print_tables

import vqa_helpers as vqa

SECOND_SEED = 3000  # make_demo.py draws with this one and the next two: none of the demo's


def second_round(folder: Path, rows: int) -> Path:
    """The folder of a second round with so many training rows."""
    made = folder / "made"
    written = folder / f"second_round_{rows}"
    if not written.exists():
        script = vqa.DEMO / "make_demo.py"
        command = [sys.executable, script, "--seed", str(SECOND_SEED), "--out", made]
        subprocess.run(command, check=True)
        table = vqa.load_competition(made).train.head(rows)
        vqa.write_competition(table.rename(columns={"image_path": "path"}), written)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    parser.add_argument("--rows", type=int, default=120, help="training rows of the demo")
    parser.add_argument("--related-rows", type=int, default=560, help="rows of the second round")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    settings = {
        "output_dir": str(options.output_dir),
        "use_sample": True,
        "sample_size": options.rows,
        "num_epochs": options.epochs,
        "n_folds": 2,
    }
    folder = second_round(options.output_dir.resolve(), options.related_rows)
    runs = {
        "plain": finished_run(**settings),
        "with the second round": finished_run(**settings, extra_train_dirs=(str(folder),)),
    }
    print_tables(runs)
    left_out = runs["with the second round"].fallbacks
    print({name: count for name, count in left_out.items() if "copies" in name})


if __name__ == "__main__":
    main()
