"""Preflight's estimate of the time beside what the stages take, part by part.

    python tests/benchmarks/preflight_time.py                 # both shapes of the demo, on this CPU
    python tests/benchmarks/preflight_time.py --shapes five   # one of them
    python tests/benchmarks/preflight_time.py --rows 60       # quickly: the figures mean little

The shape "demo" is the preset. "five" has five folds, scales, EMA and SWA, on a part of the rows
and for two epochs. All stages run one after the other in this process, with timers around what
the estimate has as a part; the start of a process is timed by a worker that scores zero-shot. Let
nothing else run beside it: preflight and the stages would see different machines.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the worker of a core has

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import vqa_helpers as vqa

FIVE = {
    "n_folds": 5,
    "num_epochs": 2,
    "use_swa": True,
    "tta_scales": (0.75, 1.0, 1.5),
    "use_sample": True,
    "sample_size": 200,
}
SHAPES = {"demo": {}, "five": FIVE}
# Beginning of the label of a call of `predict_logits` -> part of its stage.
PARTS_OF_LABELS = {"validation": "validation", "oof": "held-out rows", "test": "test rows"}


class PartTimer:
    """Seconds by "stage: part", added up by functions of the module that are replaced."""

    def __init__(self):
        self.seconds = defaultdict(float)
        self.stage = "zeroshot"
        self.depth = 0  # of timed calls: only the outer one counts

    def wrap(self, owner, name: str, part):
        """Replace owner.name by itself with a timer; `part`: a name, or made from its arguments."""
        plain = getattr(owner, name)

        def timed(*arguments, **options):
            if self.depth:
                return plain(*arguments, **options)
            label = part(*arguments) if callable(part) else part
            self.depth += 1
            start = time.perf_counter()
            try:
                return plain(*arguments, **options)
            finally:
                self.depth -= 1
                self.seconds[f"{self.stage}: {label}"] += time.perf_counter() - start

        setattr(owner, name, timed)

    def wrap_all(self) -> None:
        """Put a timer around every part that the estimate has."""

        def part_of_scores(session, frame, views, label, *_):
            return PARTS_OF_LABELS.get(label.split()[-1], "scoring")

        self.wrap(vqa, "fill_vision_cache", "features")
        self.wrap(vqa, "predict_logits", part_of_scores)
        self.wrap(vqa, "attach_lora", "adapter")
        self.wrap(vqa, "load_adapter", "adapter")
        self.wrap(vqa, "use_fast_layers", "adapter")
        self.wrap(vqa, "prompt_tokens", "prompt lengths")
        self.wrap(vqa.FoldTrainer, "epoch_prompts", "prompts")
        self.wrap(vqa, "plan_prompts", "prompts")  # of the held-out rows: others are in a part
        self.wrap(vqa.FoldTrainer, "optimizer_step", "training")
        self.wrap(vqa.FoldTrainer, "save", "checkpoints")


def start_run(config: vqa.Config) -> vqa.Run:
    """A new run of the config, with folds."""
    competition = vqa.load_competition(
        config.data_dir, config.max_fallback_share, config.rows_to_use, config.seed
    )
    folds = vqa.make_folds(competition.train, config.n_folds, config.seed)
    return vqa.start_run(config, competition, folds)


def stage_totals(run: vqa.Run) -> dict[str, float]:
    """Stage -> seconds that the workers logged, all folds added up."""
    totals = defaultdict(float)
    for record in vqa.read_json_lines(run.directory / "stages.jsonl"):
        totals[record["label"].split()[0]] += record["seconds"]
    return dict(totals)


def measured_parts(config: vqa.Config, timer: PartTimer) -> tuple[dict[str, float], float]:
    """(seconds by part of a whole run, seconds of its stages as workers log them)."""
    run = start_run(config)
    vqa.end_staying_process()  # preflight's; the start of one is timed
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # the progress bar
        vqa.run_zeroshot(run)
    zeroshot_wall = time.perf_counter() - started
    zeroshot = stage_totals(run)["zeroshot"]
    folds = list(config.folds_to_train)
    timer.seconds.clear()
    for stage in ("train", "predict"):
        timer.stage = stage
        vqa.run_stages(run, folds, [stage], lambda *_, **__: None)
    totals = stage_totals(run)
    parts = {
        "processes: start": zeroshot_wall - zeroshot,
        "zeroshot: in all": zeroshot,
        **timer.seconds,
    }
    for stage in ("train", "predict"):
        named = sum(value for part, value in parts.items() if part.startswith(f"{stage}: "))
        parts[f"{stage}: all else"] = totals[stage] - named
    return parts, sum(totals.values())


def estimated_parts(config: vqa.Config) -> dict[str, float]:
    """Seconds by part, from the text that preflight shows."""
    with contextlib.redirect_stdout(sys.stderr):
        facts = vqa.run_preflight(config)
    parts = {}
    for item in facts["estimated seconds by part"].split(", "):
        part, seconds = item.rsplit(" ", 1)
        parts[part] = float(seconds)
    zeroshot = [part for part in parts if part.startswith("zeroshot: ")]
    parts["zeroshot: in all"] = sum(parts.pop(part) for part in zeroshot)
    return parts


def compare(shape: str, rows: int | None, timer: PartTimer) -> str:
    """The table of one shape as Markdown, and the ratio of the sums below it."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {**SHAPES[shape], "output_dir": folder, "cache_dir": folder}
        settings["data_dir"] = str(vqa.DEMO)
        if rows:
            settings.update(use_sample=True, sample_size=rows, zeroshot_rows=rows)
        config = vqa.Config.preset("demo", **settings)
        estimated = estimated_parts(config)
        measured, stages = measured_parts(config, timer)
    table = pd.DataFrame({"estimated s": estimated, "measured s": measured})
    table = table.rename_axis(f"{shape}: part").sort_index().fillna(0.0)
    is_stage = table.index != "processes: start"
    estimated_stages = table.loc[is_stage, "estimated s"].sum()
    table.loc["sum of the stages"] = [estimated_stages, stages]
    ratio = estimated_stages / stages
    table = table.round(1)
    return f"{vqa.markdown_table(table)}\n\n{shape}: estimate / stages = {ratio:.2f}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated")
    parser.add_argument("--rows", type=int, help="training rows, for a quick look")
    options = parser.parse_args()
    vqa.setup_logging(".", "WARNING", to_file=False)
    settings = json.dumps(vars(options))
    sys.stdout.write(f"{settings}, {vqa.usable_cores()} cores\n\n")
    timer = PartTimer()
    timer.wrap_all()
    for shape in options.shapes.split(","):
        sys.stdout.write(compare(shape, options.rows, timer) + "\n")


if __name__ == "__main__":
    main()
