"""Search settings on a part of the demo, kill the search in its middle, continue it, and repeat its best trial.

    pip install optuna && python tests/benchmarks/search_demo.py    # two searches of 8 trials on 240 rows, some minutes

The search and its worker get SIGKILL in the fourth trial. The trials should be those of an undisturbed search, byte for
byte, and a new run with best_overrides.json should give the best trial's very weights.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import vqa_helpers as vqa

SPACE = {
    "learning_rate": (1e-4, 1e-2, "log"),
    "lora_r": [4, 8, 16, 32],
    "label_smoothing": (0.0, 0.2),
}
FIELDS = {
    "use_sample": True,
    "sample_size": 240,
    "num_epochs": 4,
    "save_every_steps": 10,
    "run_name": "searched",
}


def prepared(output_dir: str, **overrides) -> tuple:
    """Config, competition and folds of the shrunk demo."""
    config = vqa.load_config("demo", FIELDS | {"output_dir": output_dir} | overrides, environ={})
    competition = vqa.load_competition(
        config.data_dir, config.max_fallback_share, config.rows_to_use, config.seed
    )
    leakage = vqa.leakage_report(competition.train, competition.test)
    return (
        config,
        competition,
        vqa.make_folds(competition.train, config.n_folds, config.seed, leakage.image_group),
    )


def start(output_dir: Path, trials: int) -> subprocess.Popen:
    """The search in a process of its own, with its workers in one group."""
    command = [sys.executable, __file__, "--output-dir", str(output_dir), "--trials", str(trials)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)


def wait_for(pattern: str, folder: Path) -> None:
    while not list(folder.glob(pattern)):
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument(
        "--output-dir", help="only search there, as the benchmark's own processes do"
    )
    options = parser.parse_args()
    if options.output_dir:
        vqa.search_hyperparameters(*prepared(options.output_dir), SPACE, options.trials, minutes=60)
        return
    tables = {}
    with tempfile.TemporaryDirectory() as place:
        for name in ("killed", "undisturbed"):
            folder, began = Path(place) / name, time.monotonic()
            if name == "killed":
                process = start(folder, options.trials)
                wait_for(
                    f"searched/search-*/trial_{options.trials // 2 - 1:03d}/fold_0/history.csv",
                    folder,
                )
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                (history,) = folder.glob(
                    f"searched/search-*/trial_{options.trials // 2 - 1:03d}/fold_0/history.csv"
                )
                print(
                    f"killed in trial {options.trials // 2} after {len(pd.read_csv(history))} epochs",
                    flush=True,
                )
            if start(folder, options.trials).wait():
                raise SystemExit("the search has failed")
            (search,) = folder.glob("searched/search-*")
            tables[name] = [
                (search / file).read_bytes() for file in ("trials.csv", "best_overrides.json")
            ]
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        print(f"\n{vqa.markdown_table(pd.read_csv(search / 'trials.csv').set_index('trial'))}\n")
        print(
            "the killed search has the same trials and overrides, byte for byte:",
            tables["killed"] == tables["undisturbed"],
        )
        overrides = json.loads((search / "best_overrides.json").read_text(encoding="utf-8"))
        run = vqa.start_run(*prepared(place, run_name="again", train_folds=(0,), **overrides))
        result = vqa.run_folds(run.config)[0]
        best = pd.read_csv(search / "trials.csv").iloc[0]
        trial = vqa.read_fold_result(vqa.Run.open(search / f"trial_{int(best['trial']):03d}"), 0)
        figures = [min(scores["nll"] for scores in each.kinds.values()) for each in (trial, result)]
        print(f"\nNLL of the best trial {figures[0]!r}, of a run with its overrides {figures[1]!r}")
        print("the same weights (SHA-256 of each adapter):", trial.adapters == result.adapters)


if __name__ == "__main__":
    main()
