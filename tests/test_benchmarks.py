"""The benchmarks that need a GPU, or minutes, run at a tiny size: the figures mean nothing."""

import argparse
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import bench_gpu
import pandas as pd
import pytest
import start_up
import two_gpus

# Options, and what is printed at the end.
SCRIPTS = {
    "bench_gpu.py": (
        ["--tiny", "--parts", "tower,plain,ours,orders"],
        "ratio: vision tower: images / vision tower of transformers: images = ",
    ),
    "bench_gpu.py --card": (
        ["--tiny", "--model", "8b"],
        "the planner's choice after 0 s: MemoryPlan(micro_batch=16",
    ),
    "rehearsal.py": (
        ["--tiny", "kaggle_t4x2"],
        "submission of 12 rows",
    ),
    "new_models.py": (
        ["--tiny", "--models", "qwen3.5-9b"],
        "| Qwen3.5-9B, 4bit, without fla |",
    ),
    "two_gpus.py": (
        ["--tiny", "--stages", "train"],
        "times as fast in training",
    ),
    "kill_and_resume.py": (
        ["--tiny"],
        "adapters equal byte by byte: True",
    ),
    "preflight_time.py": (
        ["--shapes", "demo", "--rows", "24"],
        "demo: estimate / stages = ",
    ),
    "plain_recipe.py": (
        ["--rows", "24", "--epochs", "1", "--repeats", "1"],
        "Ours / plain, seconds: training ",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_runs_at_a_tiny_size(script, tmp_path):
    options, last = SCRIPTS[script]
    name, *more = script.split()
    path = Path(__file__).parent / "benchmarks" / name
    done = subprocess.run(
        [sys.executable, path, *more, *options],
        env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    printed = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, printed
    assert last in done.stdout, printed
    assert "failed:" not in done.stdout


@pytest.mark.slow
def test_the_readme_has_what_a_t4_should_take():
    readme = Path(__file__).parent / "benchmarks" / "README.md"
    table = bench_gpu.computed_for_a_t4(bench_gpu.SIZES["8b"])
    assert bench_gpu.vqa.markdown_table(table) in readme.read_text(encoding="utf-8")
    best = table["questions/s"].idxmax()
    assert best in (4, 6)
    all_recomputed = table.iloc[-1]
    assert table.loc[best, "questions/s"].max() / all_recomputed["questions/s"] > 1.35


def test_packages_without_metadata_are_known_by_their_own_version(tmp_path, monkeypatch):
    """Where they were only unpacked, no start shall try to install them."""
    version = importlib.metadata.version
    in_pip = {"peft": "0.1", "bitsandbytes": None, "accelerate": version("accelerate")}

    def known(name):
        if in_pip.get(name, "0") is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return in_pip.get(name) or version(name)

    monkeypatch.setattr(importlib.metadata, "version", known)
    start_up.write_metadata(tmp_path)
    written = {
        found.name: found.version for found in importlib.metadata.distributions(path=[tmp_path])
    }
    assert written == {"peft": version("peft"), "bitsandbytes": version("bitsandbytes")}


def test_ratios_are_printed_of_runs_that_were_not_left_out(capsys):
    seconds = {f"{name}, s in all": 10.0 for name in ("train", "predict")}
    row = {**seconds, two_gpus.TRAINING_SPEED: 2.0}
    table = pd.DataFrame({two_gpus.TWO_ON_TWO: row, two_gpus.ONE_ON_BOTH: row})
    two_gpus.print_ratios(table)
    assert capsys.readouterr().out == ""
    two_gpus.print_ratios(table.assign(**{two_gpus.ONE_ON_ONE: pd.Series(row)}))
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "one fold on both: 1.00 times as fast in training"
    assert len(printed) == 3


@pytest.mark.parametrize(("named", "taken"), [("2,3", ["2", "3"]), ("", ["0", "1"])])
def test_runs_on_two_gpus_take_those_that_are_named(named, taken, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    jobs = two_gpus.make_jobs(argparse.Namespace(tiny=False, large=False))
    assert [job.devices for job in jobs[two_gpus.TWO_ON_TWO]] == [(device,) for device in taken]
    assert [job.devices for job in jobs[two_gpus.ONE_ON_BOTH]] == [tuple(taken)]
    jobs = two_gpus.make_jobs(argparse.Namespace(tiny=False, large=True))
    assert [job.devices for [job] in jobs.values()] == [(",".join(taken),)]
