"""Train a part of the demo without the rows of a second round like it, and with them in two ways.

    python tests/benchmarks/related_rounds.py               # 120 rows of the demo and 560 more
    python tests/benchmarks/related_rounds.py --rows 560    # all rows of the demo

The second round is made by data/make_demo.py with another seed, brought into a folder by
`write_competition`, and named in `extra_train_dirs`: its rows join the demo's, or train the adapter
first and are then left (`pretrain_epochs`). More rows at equal epochs mean more steps, so that the
demo's rows alone are trained twice: for as many epochs, and for as many steps. Prints what rows
each model trained on, then the scores against either, out of fold and on the hidden answers, with
90 % intervals that respect images. It runs on any machine; a run that is not there yet is trained.
"""

import argparse
import math
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from leaderboard import finished_run
from soft_targets import print_tables

import vqa_helpers as vqa

FOLDS = 2
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


def epochs_of_equal_steps(rows: int, related_rows: int, epochs: int) -> int:
    """Epochs over a fold's own rows with as many steps as epochs over these and the others."""
    config = vqa.Config.preset("demo")
    step_size = config.batch_size * config.grad_accum_steps
    own_rows = rows * (FOLDS - 1) // FOLDS
    steps = epochs * math.ceil((own_rows + related_rows) / step_size)
    return round(steps / math.ceil(own_rows / step_size))


def optimizer_steps(run: vqa.Run) -> int:
    """Those that fold 0 has taken."""
    return len(vqa.read_json_lines(run.fold_dir(0) / "metrics.jsonl"))


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
        "n_folds": FOLDS,
    }
    epochs = options.epochs
    folder = second_round(options.output_dir.resolve(), options.related_rows)
    related = {"extra_train_dirs": (str(folder),)}
    longer = epochs_of_equal_steps(options.rows, options.related_rows, epochs)
    runs = {
        "plain": finished_run(**settings, num_epochs=epochs),
        "plain, equal steps": finished_run(**settings, num_epochs=longer),
        "second round joins": finished_run(**settings, num_epochs=epochs, **related),
        "second round first": finished_run(
            **settings, num_epochs=epochs, pretrain_epochs=epochs, **related
        ),
    }
    for name, run in runs.items():
        print(f"{name}: {optimizer_steps(run)} optimizer steps of fold 0")
    print("\nAgainst the demo's rows alone, for as many epochs:")
    print_tables(runs)
    print("\nAgainst the demo's rows alone, for as many steps (here called plain):")
    with_related = {name: run for name, run in runs.items() if not name.startswith("plain")}
    print_tables({"plain": runs["plain, equal steps"], **with_related})
    left_out = runs["second round joins"].fallbacks
    print({name: count for name, count in left_out.items() if "copies" in name})


if __name__ == "__main__":
    main()
