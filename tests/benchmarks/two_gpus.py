"""Two GPUs of one machine against one: two folds side by side, and one fold by both.

    python tests/benchmarks/two_gpus.py              # an 8B of random weights, on two GPUs
    python tests/benchmarks/two_gpus.py --large      # a 30B mixture of experts, spread over both
    python tests/benchmarks/two_gpus.py --tiny       # the demo's model on this CPU: does it run?

Both GPUs are told to be T4s: 13 GiB, fp16, no flash attention. Each line is a real run of the
workers, from their start to their end, on the demo's questions with enlarged images. A run before
the others compiles the layers and fills the vision cache for all. Prints what each run took and
decided, then a table of seconds, speeds and memory, and the ratios.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/benchmarks")]

import bench_gpu  # noqa: E402
from rehearsal import T4, enlarge_demo, pretend  # noqa: E402

import vqa_helpers as vqa  # noqa: E402

TRAINING_SPEED = "training, questions/s of a fold"
TOLD_LINES = ("Decision", "MemoryPlan", "epoch", "do not fit")  # with times: where they go
FIRST = "one fold with nothing cached"
ONE_ON_ONE = "one fold on one"
TWO_ON_TWO = "two folds on two"
ONE_ON_BOTH = "one fold on both"


# === One run ======================================================================================
def measure(
    name: str, config: vqa.Config, jobs: Sequence[vqa.WorkerJob], stages: Sequence[str]
) -> dict:
    """Do the stages for the folds of `jobs` with workers as run_folds starts them.

    Seconds of each stage, training speed of the slowest fold, and memory, by name.
    """
    competition = vqa.load_competition(config.data_dir, config.max_fallback_share)
    folds = vqa.make_folds(competition.train, config.n_folds, config.seed)
    run = vqa.start_run(config, competition, folds)
    row = {"run": name}
    for stage in stages:
        start = time.perf_counter()
        vqa.launch_workers(run, jobs, [stage])
        row[f"{stage}, s in all"] = time.perf_counter() - start
    logged = vqa.read_json_lines(run.directory / "stages.jsonl")
    for stage in stages:
        seconds = [line["seconds"] for line in logged if line["label"].startswith(stage)]
        row[f"{stage}, s of the stage"] = max(seconds)
    speeds = []
    for job in jobs:
        for fold in job.folds:
            history = pd.read_csv(run.fold_dir(fold) / "history.csv")
            speeds.append(history["samples_per_second"].iloc[-1])
    row[TRAINING_SPEED] = min(speeds)
    row["peak GiB"] = max(line.get("gpu_peak_gib", 0.0) for line in logged)
    print_run(run, row)
    return row


def print_run(run: vqa.Run, row: dict) -> None:
    """Print the measured row, what did not go to plan, and what the workers decided."""
    events = [line["event"] for line in vqa.read_json_lines(run.directory / "events.jsonl")]
    sys.stdout.write(f"\n{json.dumps(row)}\nevents: {events}\n")
    for log in sorted(run.directory.glob("worker_*.log")):
        sys.stdout.write(f"{log.name}\n")
        for line in log.read_text().splitlines():
            if any(word in line for word in TOLD_LINES):
                sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


# === All runs =====================================================================================
def make_jobs(options: argparse.Namespace) -> dict[str, list[vqa.WorkerJob]]:
    """Name of a run -> its workers' devices and folds."""
    both = os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1"  # the GPUs that `pretend` names
    if options.large:
        return {"one fold, the model on both": [vqa.WorkerJob((both,), (0,))]}
    first, second = (None, None) if options.tiny else both.split(",")
    return {
        FIRST: [vqa.WorkerJob((first,), (0,))],
        ONE_ON_ONE: [vqa.WorkerJob((first,), (0,))],
        TWO_ON_TWO: [vqa.WorkerJob((first,), (0,)), vqa.WorkerJob((second,), (1,))],
        ONE_ON_BOTH: [vqa.WorkerJob((first, second), (0,))],
    }


def jobs_to_run(options: argparse.Namespace) -> dict[str, list[vqa.WorkerJob]]:
    """`make_jobs` without those that --leave-out names; ends the program at an unknown name."""
    jobs = make_jobs(options)
    for name in filter(None, options.leave_out.split(",")):
        if name not in jobs:
            sys.exit(f"--leave-out names {name!r}; the runs are: {', '.join(jobs)}")
        del jobs[name]
    return jobs


def choose_preset(options: argparse.Namespace) -> str:
    """The preset of the runs."""
    if options.tiny:
        return "demo"
    return "large" if options.large else "kaggle_t4x2"


def make_settings(options: argparse.Namespace, place: Path) -> dict:
    """Config fields of all runs; makes the model and the data in `place`."""
    if options.tiny:
        model = vqa.DEMO / "tiny_qwen3_vl"
        rows = 48
        pixels = 96
    else:
        size = bench_gpu.SIZES["30b" if options.large else "8b"]
        model = options.folder or bench_gpu.build(size, place)
        rows = options.rows
        pixels = 512
    data = enlarge_demo(place / "data", rows, pixels, test_rows=rows // 4)
    return {
        "n_folds": 2,
        "num_epochs": 1,
        "max_fallback_share": 0.5,
        "output_dir": str(place / "outputs"),
        "model_id": str(model),
        "data_dir": str(data),
        "save_every_epoch": False,
        "batch_size": 16,
        "grad_accum_steps": 2,
        **json.loads(options.overrides),
    }


def print_ratios(table: pd.DataFrame) -> None:
    """Print what the second GPU gains; a column of the table is a run, some may be left out."""
    if ONE_ON_ONE not in table:
        return
    for what in table.index[table.index.str.endswith("in all")]:
        if TWO_ON_TWO in table:
            ratio = table.loc[what, TWO_ON_TWO] / table.loc[what, ONE_ON_ONE]
            sys.stdout.write(f"{what}: two folds on two / one on one = {ratio:.3f}\n")
    if ONE_ON_BOTH in table:
        ratio = table.loc[TRAINING_SPEED, ONE_ON_BOTH] / table.loc[TRAINING_SPEED, ONE_ON_ONE]
        sys.stdout.write(f"one fold on both: {ratio:.2f} times as fast in training\n")


def parse_arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="two processes on this CPU")
    parser.add_argument("--large", action="store_true", help="the 30B, on both GPUs")
    parser.add_argument(
        "--rows", type=int, default=512, help="training rows; a fold trains on half of them"
    )
    parser.add_argument("--folder", default="", help="a stored model, else random weights are made")
    parser.add_argument(
        "--leave-out", default="", help="names of runs that there is no time for, with commas"
    )
    parser.add_argument("--stages", default="train,predict")
    parser.add_argument("--overrides", default="{}", help="JSON object of config fields")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    place = Path(tempfile.mkdtemp())
    vqa.setup_logging(place, to_file=False)
    settings = make_settings(options, place)
    if not options.tiny:
        pretend(T4, place / "t4")
    preset = choose_preset(options)
    rows = []
    for name, jobs in jobs_to_run(options).items():
        config = vqa.Config.preset(preset, **settings, run_name=name.replace(" ", "_"))
        rows.append(measure(name, config, jobs, options.stages.split(",")))
    table = pd.DataFrame(rows).set_index("run").T.rename_axis("")
    sys.stdout.write(f"{vqa.markdown_table(table)}\n")
    if not options.large:
        print_ratios(table)


if __name__ == "__main__":
    main()
