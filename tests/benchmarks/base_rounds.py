"""The base model as a member: on the demo, and on a competition nearer to what it was trained on.

    python tests/benchmarks/base_rounds.py                  # both, six minutes on two free cores
    python tests/benchmarks/base_rounds.py --only demo

The second competition is made by data/make_demo.py with another seed and a quarter of the demo's
shift. Prints for each the zero-shot accuracy, the ladder with every mixture, what the setting
"auto" decides with its reason, and what the hidden answers say of each mixture: accuracy and NLL
of the ensemble beside those without the base model, with 90 % intervals that respect images. It
runs on any machine. The demo's run is that of the preset, in outputs/, or is made; the base
model's scores are added to it by use_base_member="on". The second one has two folds.
"""

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import pandas as pd
from leaderboard import finished_run

import vqa_helpers as vqa

SECOND_SEED = 5000  # make_demo.py draws with this one and the next two: none of the demo's
SHIFT = 0.25
COLUMNS = ["accuracy", "nll", "against", "gain", "gain_low", "gain_high", "nll_change"]
COLUMNS += ["nll_low", "nll_high", "used"]


def second_competition(folder: Path) -> Path:
    """The folder of the second competition, made where it is not there yet."""
    made = folder / f"shift_{SHIFT}"
    if not made.exists():
        script = vqa.DEMO / "make_demo.py"
        options = ["--seed", str(SECOND_SEED), "--shift", str(SHIFT), "--out", made]
        subprocess.run([sys.executable, script, *options], check=True)
    return made


def hidden_labels(run: vqa.Run) -> np.ndarray:
    """(n,) numbers of the right choices of the test rows."""
    table = pd.read_csv(Path(run.config.data_dir) / "test_answers.csv", dtype=str)
    answers = table.set_index("id")["answer"]
    return answers[run.test["id"]].map(vqa.CHOICES.index).to_numpy()


def hidden_table(run: vqa.Run, evaluation: vqa.Evaluation) -> pd.DataFrame:
    """The ensemble's scores on the hidden answers, without the base model and in each mixture."""
    steps = {}
    for method in (vqa.WITHOUT_BASE, *vqa.BASE_MIXTURES):
        base = dataclasses.replace(evaluation.base, method=method)
        predicted = vqa.predict_test(run, dataclasses.replace(evaluation, base=base))
        steps[method] = vqa.LadderStep(
            probabilities=np.mean(list(predicted.values()), axis=0),
            against="" if method == vqa.WITHOUT_BASE else vqa.WITHOUT_BASE,
            used=method == evaluation.base.method,
        )
    return vqa.ladder_table(steps, hidden_labels(run), vqa.image_groups(run.test))


def print_competition(name: str, run: vqa.Run) -> None:
    """Print what the base model is worth in one run."""
    evaluation = vqa.evaluate_run(run)
    print(f"\n== {name}: {vqa.describe_base_member(run, evaluation)}")
    automatic = dataclasses.replace(run.config, use_base_member="auto")
    wanted, reason = vqa.wants_base_member(dataclasses.replace(run, config=automatic))
    print(f"auto: {'score it' if wanted else 'do not score it'}: {reason}\n")
    print(vqa.markdown_table(evaluation.ladder[COLUMNS]), end="\n\n")
    table = hidden_table(run, evaluation)[COLUMNS].rename_axis("hidden answers")
    print(vqa.markdown_table(table), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    parser.add_argument("--epochs", type=int, default=3, help="of the second competition's run")
    parser.add_argument("--only", default="", help="demo or second")
    options = parser.parse_args()
    folder = options.output_dir.resolve()
    common = {"output_dir": str(options.output_dir), "use_base_member": "on"}
    if "demo".startswith(options.only):
        print_competition("demo", finished_run(**common))
    if "second".startswith(options.only):
        run = finished_run(
            **common,
            data_dir=str(second_competition(folder)),
            run_name="second_competition",
            num_epochs=options.epochs,
            n_folds=2,
            zeroshot_rows=0,
        )
        print_competition("second competition", run)


if __name__ == "__main__":
    main()
