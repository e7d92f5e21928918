"""A model of real size: one whole run by the workers, then one that is killed in training and continued.

    python tests/benchmarks/kill_and_resume.py           # a GPU: a random Qwen3-VL-8B in 4-bit, 64 rows of 512 px
    python tests/benchmarks/kill_and_resume.py --tiny    # the demo's model on this CPU: does everything run?

The second run is made in strict mode, once undisturbed and once with SIGKILL for all its processes after five steps.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/benchmarks")]

import bench_gpu  # noqa: E402
from rehearsal import RUN_ALL, enlarge_demo  # noqa: E402

import vqa_helpers as vqa  # noqa: E402


def steps_of(run: Path) -> list[dict]:
    return vqa.read_json_lines(run / "fold_0" / "metrics.jsonl")


def run_all(run: Path, environment: dict, overrides: dict, kill_after: int | None = None) -> None:
    """What Run all does, in a process of its own; with its worker it is killed after so many steps."""
    variables = {
        "VQA_OUTPUT_DIR": str(run.parent),
        "VQA_RUN_NAME": run.name,
        "VQA_OVERRIDES": json.dumps(overrides),
    }
    start, command = time.perf_counter(), [sys.executable, "-c", RUN_ALL]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(
        command, env=environment | variables, cwd=ROOT, start_new_session=True, **quiet
    )
    while process.poll() is None:
        time.sleep(0.05)
        if kill_after and len(steps_of(run)) >= kill_after:
            os.killpg(process.pid, signal.SIGKILL)  # the worker is of the same group
            process.wait()
    text = f"{run.name}: exit {process.returncode} after {time.perf_counter() - start:.0f} s, {len(steps_of(run))} steps"
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    model = (
        vqa.DEMO / "tiny_qwen3_vl"
        if options.tiny
        else bench_gpu.build(bench_gpu.SIZES["8b"], place)
    )
    data = enlarge_demo(place / "data", 64, 96 if options.tiny else 512, test_rows=64)
    environment = os.environ | {"VQA_MODEL": str(model), "VQA_DATA_DIR": str(data)}
    environment |= {"VQA_PRESET": "demo" if options.tiny else "colab_t4"}
    common = {"max_fallback_share": 0.5, "train_folds": [0], "n_folds": 2, "num_epochs": 2}
    whole, left_alone, killed = (place / name for name in ("whole", "left_alone", "killed"))
    run_all(whole, environment, common)
    history = (whole / "fold_0" / "history.csv").read_text()
    sys.stdout.write(f"{history}peak GiB: {max(step['GiB'] for step in steps_of(whole))}\n")
    strict = common | {"strict_determinism": True, "save_every_steps": 3}
    run_all(left_alone, environment, strict)
    run_all(killed, environment, strict, kill_after=5)
    run_all(killed, environment, strict)
    expected, found = (
        {(s["epoch"], s["step"]): s["loss"] for s in steps_of(run)} for run in (left_alone, killed)
    )
    deviation = max(abs(found[step] - loss) for step, loss in expected.items())
    sys.stdout.write(f"losses of {len(expected)} steps, largest deviation: {deviation}\n")
    adapter = Path("fold_0") / "adapter_raw" / "adapter_model.safetensors"
    same = (left_alone / adapter).read_bytes() == (killed / adapter).read_bytes()
    sys.stdout.write(f"adapters equal byte by byte: {same}\n")


if __name__ == "__main__":
    main()
