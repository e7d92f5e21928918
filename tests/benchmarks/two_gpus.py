"""Two GPUs of one machine against one: two folds side by side, and one fold by both, on an 8B of random weights.

    python tests/benchmarks/two_gpus.py              # both told to be T4s: 13 GiB, fp16, no flash attention
    python tests/benchmarks/two_gpus.py --large      # a 30B mixture of experts, spread over both
    python tests/benchmarks/two_gpus.py --tiny       # the demo's model and two processes on this CPU: does it run?

Each line is a real run of the workers, from their start to their end, on the demo's questions with enlarged images.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/benchmarks")]

import bench_gpu  # noqa: E402
from rehearsal import T4, enlarge_demo, pretend  # noqa: E402

import vqa_helpers as vqa  # noqa: E402


def measure(name: str, config: vqa.Config, jobs: list, stages: list[str]) -> dict:
    """Do the stages for the folds of `jobs` with workers as run_folds starts them; seconds, speed and memory."""
    competition = vqa.load_competition(config.data_dir, config.max_fallback_share)
    run = vqa.start_run(
        config, competition, vqa.make_folds(competition.train, config.n_folds, config.seed)
    )
    row = {"run": name}
    for stage in stages:
        start = time.perf_counter()
        vqa.launch_workers(run, jobs, [stage])
        row[f"{stage}, s in all"] = time.perf_counter() - start
    logged = vqa.read_json_lines(run.directory / "stages.jsonl")
    for stage in stages:
        row[f"{stage}, s of the stage"] = max(
            line["seconds"] for line in logged if line["label"].startswith(stage)
        )
    folds = [fold for _, part in jobs for fold in part]
    histories = [pd.read_csv(run.fold_dir(fold) / "history.csv") for fold in folds]
    row["training, questions/s of a fold"] = min(
        history["samples_per_second"].iloc[-1] for history in histories
    )
    row["peak GiB"] = max(line.get("gpu_peak_gib", 0.0) for line in logged)
    events = [line["event"] for line in vqa.read_json_lines(run.directory / "events.jsonl")]
    sys.stdout.write(f"\n{json.dumps(row)}\nevents: {events}\n")
    for log in sorted(run.directory.glob("worker_*.log")):
        words = (
            "Decision",
            "MemoryPlan",
            "epoch",
            "do not fit",
        )  # with their times: where the seconds go
        decisions = [
            line for line in log.read_text().splitlines() if any(word in line for word in words)
        ]
        sys.stdout.write("\n".join([log.name, *decisions, ""]))
    sys.stdout.flush()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument(
        "--rows", type=int, default=512, help="training rows; a fold trains on half of them"
    )
    parser.add_argument("--stages", default="train,predict")
    parser.add_argument("--overrides", default="{}", help="JSON object of config fields")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    vqa.setup_logging(place, to_file=False)
    devices: list = [None, None] if options.tiny else [0, 1]
    size = bench_gpu.SIZES["30b" if options.large else "8b"]
    model = vqa.DEMO / "tiny_qwen3_vl" if options.tiny else bench_gpu.build(size, place)
    rows = 48 if options.tiny else options.rows
    data = enlarge_demo(place / "data", rows, 96 if options.tiny else 512, test_rows=rows // 4)
    settings = {
        "n_folds": 2,
        "num_epochs": 1,
        "max_fallback_share": 0.5,
        "output_dir": str(place / "outputs"),
    }
    settings |= {"model_id": str(model), "data_dir": str(data), "save_every_epoch": False}
    settings |= {"batch_size": 16, "grad_accum_steps": 2} | json.loads(options.overrides)
    preset = "demo" if options.tiny else "large" if options.large else "kaggle_t4x2"
    pretend(T4, place / "t4") if not options.tiny else None
    names = {
        "one fold on one": [((devices[0],), (0,))],
        "two folds on two": [((device,), (fold,)) for fold, device in enumerate(devices)],
        "one fold on both": [(tuple(devices), (0,))],
    }
    if options.large:
        names = {"one fold, the model on both": [((",".join(map(str, devices)),), (0,))]}
    measured = []
    for name, jobs in names.items():
        config = vqa.Config.preset(preset, **settings, run_name=name.replace(" ", "_"))
        measured.append(measure(name, config, jobs, options.stages.split(",")))
    table = pd.DataFrame(measured).set_index("run").T.rename_axis("")
    sys.stdout.write(f"{vqa.markdown_table(table)}\n")
    if options.large:
        return
    one, two, both = (table[name] for name in names)
    for what in table.index[table.index.str.endswith("in all")]:
        sys.stdout.write(f"{what}: two folds on two / one on one = {two[what] / one[what]:.3f}\n")
    speed = "training, questions/s of a fold"
    sys.stdout.write(
        f"one fold on both: {both[speed] / one[speed]:.2f} times as fast in training\n"
    )


if __name__ == "__main__":
    main()
