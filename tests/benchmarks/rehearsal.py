"""The whole job as on Kaggle or Colab, on larger GPUs told to be theirs: random weights of real size.

    python tests/benchmarks/rehearsal.py kaggle_t4x2    # two GPUs as two T4s: 13 GiB, fp16, no flash attention
    python tests/benchmarks/rehearsal.py colab_a100     # one GPU as an A100 of 80 GB: bf16 weights
    python tests/benchmarks/rehearsal.py kaggle_t4x2 --tiny    # the demo's model on this CPU: does everything run?
    python tests/benchmarks/rehearsal.py kaggle_t4x2 --only-estimate    # the real job's hours, computed; no GPU

Two folds of one epoch on the demo's first 512 questions with images of 512 pixels, four rotations; then the hours that
the real competition would take, counted in matrix products.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/benchmarks")]

import bench_gpu  # noqa: E402

import vqa_helpers as vqa  # noqa: E402


@dataclass(frozen=True)
class Machine:
    """GPUs to pretend, and the rate that is assumed of each."""

    name: str
    count: int
    memory_mib: int
    capability: float
    cap_gib: float  # that a process may allocate
    flash: bool
    tflops: float  # of matrix products in a real job
    stored_layers: int  # of the plan that the estimate assumes, as computed by memory_plan.py


T4 = Machine("Tesla T4", 2, 15360, 7.5, bench_gpu.CAP_GIB, False, 20, 3)
A100 = Machine("NVIDIA A100-SXM4-80GB", 1, 81920, 8.0, 78.0, True, 150, 5)
MACHINES = {"kaggle_t4x2": T4, "colab_a100": A100}

# What the workers import before anything else: the memory and the kernels of that machine.
LIMITS = """
import torch
def limit():
    for gpu in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(gpu).total_memory
        torch.cuda.set_per_process_memory_fraction({gib} * 2**30 / total, gpu)
torch.cuda._lazy_call(limit)
torch.backends.cuda.enable_flash_sdp({flash})
"""

RUN_ALL = """
import vqa_helpers as vqa
config = vqa.load_config()
competition = vqa.load_competition(config.data_dir, config.max_fallback_share)
run = vqa.start_run(config, competition, vqa.make_folds(competition.train, config.n_folds, config.seed))
vqa.run_zeroshot(run)
vqa.run_folds(run.config)
vqa.write_submissions(run, vqa.evaluate_run(run))
"""


def pretend(machine: Machine, folder: Path) -> None:
    """Let this process and those that it starts find that machine."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        LIMITS.format(gib=machine.cap_gib, flash=machine.flash)
    )
    card = f"{machine.name}, {machine.memory_mib}, {machine.capability}"
    lines = "\\n".join(f"{index}, {card}" for index in range(machine.count))
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{lines}\\n'\n")
    (folder / "nvidia-smi").chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = f"{folder}:{os.environ.get('PYTHONPATH', '')}"


def enlarge_demo(folder: Path, rows: int, pixels: int, test_rows: int) -> Path:
    """The demo's first rows with images of `pixels` pixels square."""
    for name, count in (("train", rows), ("test", test_rows), ("sample_submission", test_rows)):
        frame = pd.read_csv(vqa.DEMO / f"{name}.csv", dtype=str, keep_default_na=False).head(count)
        folder.mkdir(exist_ok=True)
        frame.to_csv(folder / f"{name}.csv", index=False)
        for path in frame.get("path", ()):
            (folder / path).parent.mkdir(exist_ok=True)
            Image.open(vqa.DEMO / "images" / path).convert("RGB").resize((pixels, pixels)).save(
                folder / path
            )
    return folder


def report(run: Path, seconds: float) -> None:
    """What every stage of every worker took, its peak, the training speeds, and what went wrong."""
    stages = pd.DataFrame(vqa.read_json_lines(run / "stages.jsonl")).set_index("label")
    stages["questions/s"] = pd.Series("", stages.index, object)
    for fold in run.glob("fold_*"):
        speed = pd.read_csv(fold / "history.csv")["samples_per_second"].iloc[-1]
        stages.loc[f"train fold {fold.name[5:]}", "questions/s"] = speed
    stages = stages.filter(["seconds", "questions/s", "gpu_peak_gib", "rss_gib"])
    sys.stdout.write(f"{vqa.markdown_table(stages)}\n")
    steps = [
        step for fold in run.glob("fold_*") for step in vqa.read_json_lines(fold / "metrics.jsonl")
    ]
    bad = sum(not math.isfinite(step["loss"]) for step in steps)
    sys.stdout.write(f"{len(steps)} optimizer steps, {bad} not finite; {seconds:.0f} s in all\n")
    sys.stdout.writelines(
        f"event: {line['event']}\n" for line in vqa.read_json_lines(run / "events.jsonl")
    )
    rows = pd.read_csv(run / "submission_ensemble.csv", keep_default_na=False)
    sys.stdout.write(f"submission of {len(rows)} rows: {rows['answer'].value_counts().to_dict()}\n")
    for log in sorted(run.glob("worker_*.log")):
        told = [
            line
            for line in log.read_text().splitlines()
            if "Decision" in line or "Vision cache" in line
        ]
        sys.stdout.write("\n".join([log.name, *told, ""]))


def estimate(
    preset: str, rows: int = 3887, text: int = 110, suffix: int = 45, pixels=(540, 720)
) -> pd.DataFrame:
    """Hours of the real competition: `rows` training and as many test rows, the usual image, features not cached."""
    machine, config = MACHINES[preset], vqa.Config.preset(preset)
    shapes = bench_gpu.qwen3_8b({})
    image, patches = (math.prod(round(side / size) for side in pixels) for size in (32, 16))
    one, four = (text + image + extra * suffix for extra in (0, 3))
    forward, training = (
        bench_gpu.question_flops(shapes.text_config, one, kind) for kind in (False, True)
    )
    layers, vision = shapes.text_config.num_hidden_layers, shapes.vision_config
    training += forward * (1 - machine.stored_layers / layers)
    width, inner = vision.hidden_size, vision.intermediate_size
    tower = vision.depth * patches * (2 * (4 * width**2 + 2 * width * inner) + 4 * patches * width)
    rotated = bench_gpu.question_flops(shapes.text_config, four, False)
    fitted, kinds = rows * (config.n_folds - 1), 1 + config.use_ema
    work = {  # questions and FLOP of each
        "zero-shot": (config.zeroshot_rows, forward + tower),
        "training": (fitted * config.num_epochs, training + tower),
        "validation": (rows * (config.num_epochs + kinds), forward + tower),
        "OOF, four rotations": (rows, rotated + tower),
        "test, four rotations, every fold": (rows * config.n_folds, rotated + tower),
    }
    table = pd.DataFrame(work, index=["questions", "TFLOP each"]).T
    table["TFLOP each"] /= 1e12
    # The last fold of three goes to both GPUs, which are then estimated to be 0.9 times two.
    whole = config.n_folds // machine.count * machine.count
    devices = config.n_folds / (
        whole / machine.count + (config.n_folds - whole) / (0.9 * machine.count)
    )
    table["GPUs"] = devices
    table.loc["zero-shot", "GPUs"] = 1
    table["hours"] = (
        table["questions"] * table["TFLOP each"] / machine.tflops / table["GPUs"] / 3600
    )
    table.loc["all of these", "hours"] = table["hours"].sum()
    return table.astype(object).where(table.notna(), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=MACHINES)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only-estimate", action="store_true")
    options = parser.parse_args()
    machine, place = MACHINES[options.preset], Path(tempfile.mkdtemp())
    if not options.only_estimate:
        vqa.setup_logging(place, to_file=False)
        model = (
            vqa.DEMO / "tiny_qwen3_vl"
            if options.tiny
            else bench_gpu.build(bench_gpu.SIZES["8b"], place)
        )
        rows, test_rows, pixels = (24, 12, 96) if options.tiny else (512, 256, 512)
        data = enlarge_demo(place / "data", rows, pixels, test_rows)
        pretend(machine, place / "machine") if not options.tiny else None
        overrides = {"n_folds": 2, "num_epochs": 1, "max_fallback_share": 0.5, "zeroshot_rows": 64}
        variables = {
            "VQA_MODEL": str(model),
            "VQA_DATA_DIR": str(data),
            "VQA_OUTPUT_DIR": str(place),
        }
        variables |= {
            "VQA_PRESET": "demo" if options.tiny else options.preset,
            "VQA_RUN_NAME": "run",
        }
        start = time.perf_counter()
        environment = os.environ | variables | {"VQA_OVERRIDES": json.dumps(overrides)}
        command = [sys.executable, "-c", RUN_ALL]
        subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        report(place / "run", time.perf_counter() - start)
    count, budget = f"{machine.count} x {machine.name}", "Kaggle allows 12"
    sys.stdout.write(
        f"the real job on {count} at {machine.tflops} TFLOP/s each, loading left out ({budget}):\n"
    )
    sys.stdout.write(f"{vqa.markdown_table(estimate(options.preset))}\n")


if __name__ == "__main__":
    main()
