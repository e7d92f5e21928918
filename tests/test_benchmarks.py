"""The benchmarks that need a GPU run at a tiny size on this CPU: their figures mean nothing there, but they run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = {  # options, and what is printed at the end
    "bench_gpu.py": (
        ["--parts", "plain,ours"],
        "ratio: train: ours / train: plain recipe, batch 1",
    ),
    "rehearsal.py": (["kaggle_t4x2"], "submission of 12 rows"),
    "two_gpus.py": (["--stages", "train"], "times as fast in training"),
    "kill_and_resume.py": ([], "adapters equal byte by byte: True"),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gpu_benchmark_runs_at_a_tiny_size(script, tmp_path):
    options, last = SCRIPTS[script]
    command = [sys.executable, Path(__file__).parent / "benchmarks" / script, "--tiny", *options]
    environment = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0 and last in done.stdout, (
        f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    assert "failed:" not in done.stdout
