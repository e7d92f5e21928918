"""The whole job as on Kaggle or Colab, with random weights, on larger GPUs told to be theirs.

    python tests/benchmarks/rehearsal.py kaggle_t4x2    # two GPUs as two T4s
    python tests/benchmarks/rehearsal.py colab_t4       # one GPU as a T4
    python tests/benchmarks/rehearsal.py colab_a100     # one GPU as an A100 of 80 GB
    python tests/benchmarks/rehearsal.py kaggle_t4x2 --tiny             # on a CPU: does it run?
    python tests/benchmarks/rehearsal.py kaggle_t4x2 --only-estimate    # computed; no GPU

A GPU told to be a T4 has 13 GiB, fp16 and no flash attention; one told to be an A100 has bf16
weights. The model is an 8B of random weights, or the one in --folder. The job is two folds of one
epoch on the demo's first 512 questions with images of 512 pixels, four rotations. Prints what every
stage took and its peak memory, training speeds, and what went wrong; then the hours that the real
competition would take, counted in matrix products.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/benchmarks")]

import bench_gpu  # noqa: E402

import vqa_helpers as vqa  # noqa: E402


# === Pretended machines ===========================================================================
@dataclasses.dataclass(frozen=True)
class Machine:
    """GPUs to pretend, and the rate that is assumed of each."""

    name: str  # of the GPU
    count: int  # of GPUs
    memory_mib: int  # of each, as nvidia-smi reports it
    capability: float  # CUDA compute capability
    cap_gib: float  # that a process may allocate
    flash: bool  # whether it has flash attention
    tflops: float  # of matrix products in a real job
    stored_layers: int  # of the plan that the estimate assumes: memory_plan.py computes it


T4 = Machine(
    name="Tesla T4",
    count=2,
    memory_mib=15360,
    capability=7.5,
    cap_gib=bench_gpu.CAP_GIB,
    flash=False,
    tflops=20,
    stored_layers=36,
)
A100 = Machine(
    name="NVIDIA A100-SXM4-80GB",
    count=1,
    memory_mib=81920,
    capability=8.0,
    cap_gib=78.0,
    flash=True,
    tflops=150,
    stored_layers=36,
)
MACHINES = {"kaggle_t4x2": T4, "colab_t4": dataclasses.replace(T4, count=1), "colab_a100": A100}

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


def pretend(machine: Machine, folder: Path) -> None:
    """Let this process and those that it starts find that machine."""
    folder.mkdir()
    limits = LIMITS.format(gib=machine.cap_gib, flash=machine.flash)
    (folder / "sitecustomize.py").write_text(limits)
    card = f"{machine.name}, {machine.memory_mib}, {machine.capability}"
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")  # where other programs use the first ones
    indexes = chosen.split(",") if chosen else range(machine.count)
    lines = "\\n".join(f"{index}, {card}" for index in indexes)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{lines}\\n'\n")
    (folder / "nvidia-smi").chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = f"{folder}:{os.environ.get('PYTHONPATH', '')}"


# === The job ======================================================================================
RUN_ALL = """
import vqa_helpers as vqa
config = vqa.load_config()
competition = vqa.load_competition(config.data_dir, config.max_fallback_share)
folds = vqa.make_folds(competition.train, config.n_folds, config.seed)
run = vqa.start_run(config, competition, folds)
vqa.run_zeroshot(run)
vqa.run_folds(run.config)
vqa.write_submissions(run, vqa.evaluate_run(run))
"""


def enlarge_demo(folder: Path, rows: int, pixels: int, test_rows: int) -> Path:
    """The demo's first rows with images of `pixels` pixels square."""
    folder.mkdir(exist_ok=True)
    counts = {"train": rows, "test": test_rows, "sample_submission": test_rows}
    for name, count in counts.items():
        frame = pd.read_csv(vqa.DEMO / f"{name}.csv", dtype=str, keep_default_na=False)
        frame = frame.head(count)
        frame.to_csv(folder / f"{name}.csv", index=False)
        for path in frame.get("path", ()):  # the sample has none
            (folder / path).parent.mkdir(exist_ok=True)
            image = Image.open(vqa.DEMO / "images" / path).convert("RGB")
            image.resize((pixels, pixels)).save(folder / path)
    return folder


def rehearse(preset: str, machine: Machine, tiny: bool, folder: str) -> None:
    """Do the job with the model in `folder`, or a random one of real size, and print its report."""
    place = Path(tempfile.mkdtemp())
    vqa.setup_logging(place, to_file=False)
    if tiny:
        model = vqa.DEMO / "tiny_qwen3_vl"
        data = enlarge_demo(place / "data", rows=24, pixels=96, test_rows=12)
    else:
        model = folder or bench_gpu.build(bench_gpu.SIZES["8b"], place)
        data = enlarge_demo(place / "data", rows=512, pixels=512, test_rows=256)
        pretend(machine, place / "machine")
    overrides = {"n_folds": 2, "num_epochs": 1, "max_fallback_share": 0.5, "zeroshot_rows": 64}
    start = time.perf_counter()
    environment = {
        **os.environ,
        "VQA_MODEL": str(model),
        "VQA_DATA_DIR": str(data),
        "VQA_OUTPUT_DIR": str(place),
        "VQA_PRESET": "demo" if tiny else preset,
        "VQA_RUN_NAME": "run",
        "VQA_OVERRIDES": json.dumps(overrides),
    }
    command = [sys.executable, "-c", RUN_ALL]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    print_report(place / "run", time.perf_counter() - start)


# === What it took =================================================================================
def stage_table(run: Path) -> pd.DataFrame:
    """What every stage of every worker took, its peak memory, and the training speeds."""
    stages = pd.DataFrame(vqa.read_json_lines(run / "stages.jsonl")).set_index("label")
    stages["questions/s"] = pd.Series("", stages.index, object)
    for fold in run.glob("fold_*"):
        number = fold.name.removeprefix("fold_")
        history = pd.read_csv(fold / "history.csv")
        stages.loc[f"train fold {number}", "questions/s"] = history["samples_per_second"].iloc[-1]
    return stages.filter(["seconds", "questions/s", "gpu_peak_gib", "rss_gib"])


def print_report(run: Path, seconds: float) -> None:
    """Print stages, steps, events and answers of the run, and what its workers decided."""
    sys.stdout.write(f"{vqa.markdown_table(stage_table(run))}\n")
    steps = []
    for fold in run.glob("fold_*"):
        steps += vqa.read_json_lines(fold / "metrics.jsonl")
    not_finite = sum(not math.isfinite(step["loss"]) for step in steps)
    sys.stdout.write(
        f"{len(steps)} optimizer steps, {not_finite} not finite; {seconds:.0f} s in all\n"
    )
    for line in vqa.read_json_lines(run / "events.jsonl"):
        sys.stdout.write(f"event: {line['event']}\n")
    answers = pd.read_csv(run / "submission_ensemble.csv", keep_default_na=False)["answer"]
    letters = answers.value_counts().to_dict()
    sys.stdout.write(f"submission of {len(answers)} rows: {letters}\n")
    for log in sorted(run.glob("worker_*.log")):
        sys.stdout.write(f"{log.name}\n")
        for line in log.read_text().splitlines():
            if "Decision" in line or "Vision cache" in line:
                sys.stdout.write(f"{line}\n")


# === The real job, computed =======================================================================
@dataclasses.dataclass(frozen=True)
class RealCompetition:
    """The size of the real competition, whose features are not cached."""

    rows: int = 3887  # training rows, and as many test rows
    text: int = 110  # text tokens of a question
    suffix: int = 45  # those of them that differ between choice orders
    height: int = 540  # of the usual image, in pixels
    width: int = 720


def tower_flops(vision, competition: RealCompetition) -> float:
    """FLOP of one image in the vision tower, whose config `vision` is."""
    patches = round(competition.height / 16) * round(competition.width / 16)
    width = vision.hidden_size
    inner = vision.intermediate_size
    weights = 4 * width**2 + 2 * width * inner
    attention = 4 * patches * width
    return vision.depth * patches * (2 * weights + attention)


def stage_work(machine: Machine, config: vqa.Config, competition: RealCompetition) -> dict:
    """Stage -> (questions, FLOP of each), of the 8B."""
    shapes = bench_gpu.qwen3_8b({})
    text_config = shapes.text_config
    image = round(competition.height / 32) * round(competition.width / 32)
    one_order = competition.text + image
    four_orders = one_order + 3 * competition.suffix
    tower = tower_flops(shapes.vision_config, competition)
    forward = bench_gpu.question_flops(text_config, one_order, training=False)
    rotated = bench_gpu.question_flops(text_config, four_orders, training=False)
    recomputed = forward * (1 - machine.stored_layers / text_config.num_hidden_layers)
    training = bench_gpu.question_flops(text_config, one_order, training=True) + recomputed
    rows = competition.rows
    trained_rows = rows * (config.n_folds - 1)
    return {
        "zero-shot": (config.zeroshot_rows, forward + tower),
        "training": (trained_rows * config.num_epochs, training + tower),
        # Of the raw weights that are kept nothing is scored again: their epoch has.
        "validation": (rows * (config.num_epochs + config.use_ema), forward + tower),
        "OOF, four rotations": (rows, rotated + tower),
        "test, four rotations, every fold": (rows * config.n_folds, rotated + tower),
    }


def busy_gpus(machine: Machine, n_folds: int) -> float:
    """How many GPUs are busy on average.

    The last fold of three goes to both GPUs, which are then estimated to be 0.9 times two.
    """
    whole = n_folds // machine.count * machine.count
    shared = n_folds - whole
    return n_folds / (whole / machine.count + shared / (0.9 * machine.count))


def estimate(preset: str) -> pd.DataFrame:
    """Hours of the real competition by stage: questions, TFLOP of each, GPUs at work."""
    machine = MACHINES[preset]
    config = vqa.Config.preset(preset)
    work = stage_work(machine, config, RealCompetition())
    table = pd.DataFrame(work, index=["questions", "TFLOP each"]).T
    table["TFLOP each"] /= 1e12
    table["GPUs"] = busy_gpus(machine, config.n_folds)
    table.loc["zero-shot", "GPUs"] = 1
    tflop = table["questions"] * table["TFLOP each"]
    table["hours"] = tflop / machine.tflops / table["GPUs"] / 3600
    table.loc["all of these", "hours"] = table["hours"].sum()
    return table.astype(object).where(table.notna(), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=MACHINES)
    parser.add_argument(
        "--tiny", action="store_true", help="the demo's model and a few rows on this CPU"
    )
    parser.add_argument("--folder", default="", help="a stored model, else random weights are made")
    parser.add_argument("--only-estimate", action="store_true", help="no run, only the hours")
    options = parser.parse_args()
    machine = MACHINES[options.preset]
    if not options.only_estimate:
        rehearse(options.preset, machine, options.tiny, options.folder)
    sys.stdout.write(
        f"the real job on {machine.count} x {machine.name} at {machine.tflops} TFLOP/s each, "
        "loading left out (Kaggle allows 12):\n"
    )
    sys.stdout.write(f"{vqa.markdown_table(estimate(options.preset))}\n")


if __name__ == "__main__":
    main()
