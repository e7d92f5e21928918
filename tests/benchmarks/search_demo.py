"""Search settings on a part of the demo, kill the search in its middle, and continue it.

    pip install optuna && python tests/benchmarks/search_demo.py    # on any machine

Does two searches of 8 trials on 240 rows. In the first, the search and its worker get SIGKILL in
the fourth trial. Prints the seconds of both; the trials; whether those of the killed search are
those of the undisturbed one, byte for byte; and whether a new run with best_overrides.json gives
the best trial's very weights.
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

import numpy as np
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


def prepare(output_dir: str, **overrides) -> tuple[vqa.Config, vqa.Competition, np.ndarray]:
    """Config, competition and folds of the shrunk demo."""
    fields = {**FIELDS, "output_dir": output_dir, **overrides}
    config = vqa.load_config("demo", fields, environ={})
    competition = vqa.load_competition(
        config.data_dir, config.max_fallback_share, config.rows_to_use, config.seed
    )
    leakage = vqa.leakage_report(competition.train, competition.test)
    folds = vqa.make_folds(competition.train, config.n_folds, config.seed, leakage.image_group)
    return config, competition, folds


def start_search(output_dir: Path, trials: int) -> subprocess.Popen:
    """The search in a process of its own, with its workers in one group."""
    command = [sys.executable, __file__, "--output-dir", str(output_dir), "--trials", str(trials)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)


def kill_search(folder: Path, trials: int) -> None:
    """Start a search and kill it in its middle trial, once that has finished an epoch."""
    number = trials // 2
    pattern = f"searched/search-*/trial_{number - 1:03d}/fold_0/history.csv"
    process = start_search(folder, trials)
    while not list(folder.glob(pattern)):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (history,) = folder.glob(pattern)
    epochs = len(pd.read_csv(history))
    print(f"killed in trial {number} after {epochs} epochs", flush=True)


def finish_search(folder: Path, trials: int) -> Path:
    """Search to the end, from where an earlier search in `folder` stopped; its own folder."""
    if start_search(folder, trials).wait():
        raise SystemExit("the search has failed")
    (search,) = folder.glob("searched/search-*")
    return search


def written_bytes(search: Path) -> list[bytes]:
    """What a search leaves: its table of trials, and the best overrides."""
    return [(search / name).read_bytes() for name in ("trials.csv", "best_overrides.json")]


def repeat_best_trial(search: Path, place: str) -> None:
    """Train fold 0 with the best overrides in a new run, and print whether it is the best trial."""
    overrides = json.loads((search / "best_overrides.json").read_text(encoding="utf-8"))
    run = vqa.start_run(*prepare(place, run_name="again", train_folds=(0,), **overrides))
    result = vqa.run_folds(run.config)[0]
    number = int(pd.read_csv(search / "trials.csv")["trial"].iloc[0])  # the best one comes first
    trial = vqa.read_fold_result(vqa.Run.open(search / f"trial_{number:03d}"), 0)
    trial_nll = min(scores["nll"] for scores in trial.kinds.values())
    run_nll = min(scores["nll"] for scores in result.kinds.values())
    print(f"\nNLL of the best trial {trial_nll!r}, of a run with its overrides {run_nll!r}")
    print("the same weights (SHA-256 of each adapter):", trial.adapters == result.adapters)


def compare_searches(trials: int) -> None:
    """Do both searches, and print what came of them."""
    written = {}
    with tempfile.TemporaryDirectory() as place:
        for name in ("killed", "undisturbed"):
            folder = Path(place) / name
            began = time.monotonic()
            if name == "killed":
                kill_search(folder, trials)
            search = finish_search(folder, trials)
            written[name] = written_bytes(search)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        table = pd.read_csv(search / "trials.csv").set_index("trial")
        print(f"\n{vqa.markdown_table(table)}\n")
        is_same = written["killed"] == written["undisturbed"]
        print("the killed search has the same trials and overrides, byte for byte:", is_same)
        repeat_best_trial(search, place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument(
        "--output-dir", help="only search there, as the benchmark's own processes do"
    )
    options = parser.parse_args()
    if options.output_dir:
        prepared = prepare(options.output_dir)
        vqa.search_hyperparameters(*prepared, SPACE, options.trials, minutes=60)
    else:
        compare_searches(options.trials)


if __name__ == "__main__":
    main()
