"""A model of real size: one whole run by the workers, then one that is killed and continued.

    python tests/benchmarks/kill_and_resume.py           # a GPU: a random Qwen3-VL-8B in 4-bit
    python tests/benchmarks/kill_and_resume.py --tiny    # the demo's model: does everything run?

Prints seconds and steps of each run, the first run's learning curve and peak memory, and whether
the killed run ends like one that was left alone: the largest deviation of a step's loss, and
whether the adapters are equal byte by byte. The data are 64 rows of the demo, enlarged to 512
pixels.

The second run is made in strict mode, once undisturbed and once with SIGKILL for all its processes
after five steps.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/benchmarks")]

import bench_gpu  # noqa: E402
from rehearsal import RUN_ALL, enlarge_demo  # noqa: E402

import vqa_helpers as vqa  # noqa: E402

SETTINGS = {"max_fallback_share": 0.5, "train_folds": [0], "n_folds": 2, "num_epochs": 2}
STRICT = {**SETTINGS, "strict_determinism": True, "save_every_steps": 3}


def logged_steps(run: Path) -> list[dict]:
    """The records of the optimizer steps of fold 0."""
    return vqa.read_json_lines(run / "fold_0" / "metrics.jsonl")


def run_all(
    run: Path, environment: Mapping, overrides: Mapping, kill_after: int | None = None
) -> None:
    """What Run all does, in a process of its own; with its worker it is killed after that step."""
    variables = {
        **environment,
        "VQA_OUTPUT_DIR": str(run.parent),
        "VQA_RUN_NAME": run.name,
        "VQA_OVERRIDES": json.dumps(overrides),
    }
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_ALL],
        env=variables,
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    while process.poll() is None:
        time.sleep(0.05)
        if kill_after and len(logged_steps(run)) >= kill_after:
            os.killpg(process.pid, signal.SIGKILL)  # the worker is of the same group
            process.wait()
    seconds = time.perf_counter() - start
    steps = len(logged_steps(run))
    sys.stdout.write(
        f"{run.name}: exit {process.returncode} after {seconds:.0f} s, {steps} steps\n"
    )
    sys.stdout.flush()


def losses_by_step(run: Path) -> dict[tuple[int, int], float]:
    """(epoch, step) -> loss; of a step that was done twice, the later one's."""
    losses = {}
    for record in logged_steps(run):
        losses[record["epoch"], record["step"]] = record["loss"]
    return losses


def print_comparison(left_alone: Path, killed: Path) -> None:
    """Print how far the killed and continued run is from the one that was left alone."""
    expected = losses_by_step(left_alone)
    found = losses_by_step(killed)
    deviation = max(abs(found[step] - loss) for step, loss in expected.items())
    sys.stdout.write(f"losses of {len(expected)} steps, largest deviation: {deviation}\n")
    adapter = Path("fold_0") / "adapter_raw" / "adapter_model.safetensors"
    is_same = (left_alone / adapter).read_bytes() == (killed / adapter).read_bytes()
    sys.stdout.write(f"adapters equal byte by byte: {is_same}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the demo's model on this CPU")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    if options.tiny:
        preset = "demo"
        pixels = 96
        model = vqa.DEMO / "tiny_qwen3_vl"
    else:
        preset = "colab_t4"
        pixels = 512
        model = bench_gpu.build(bench_gpu.SIZES["8b"], place)
    data = enlarge_demo(place / "data", rows=64, pixels=pixels, test_rows=64)
    environment = {
        **os.environ,
        "VQA_MODEL": str(model),
        "VQA_DATA_DIR": str(data),
        "VQA_PRESET": preset,
    }
    whole = place / "whole"
    run_all(whole, environment, SETTINGS)
    history = (whole / "fold_0" / "history.csv").read_text()
    peak = max(step["GiB"] for step in logged_steps(whole))
    sys.stdout.write(f"{history}peak GiB: {peak}\n")
    left_alone = place / "left_alone"
    killed = place / "killed"
    run_all(left_alone, environment, STRICT)
    run_all(killed, environment, STRICT, kill_after=5)
    run_all(killed, environment, STRICT)
    print_comparison(left_alone, killed)


if __name__ == "__main__":
    main()
