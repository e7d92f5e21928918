"""Print the demo's ladder with its intervals, and score it against its hidden answers beside two controls.

    python tests/benchmarks/leaderboard.py              # a finished run in outputs/ is reused, else made first
    python tests/benchmarks/leaderboard.py --controls   # grey images, shuffled answers: two more runs
    python tests/benchmarks/leaderboard.py --seeds 7    # a second run with that seed, and both combined

The answers in data/test_answers.csv are read here only; no line of the pipeline opens them.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import vqa_helpers as vqa


def finished_run(**fields) -> vqa.Run:
    """The demo's run with these settings, trained and predicted if it is not there yet."""
    config = vqa.load_config("demo", fields, environ={})
    competition = vqa.load_competition(config.data_dir, config.max_fallback_share)
    leakage = vqa.leakage_report(competition.train, competition.test)
    folds = vqa.make_folds(competition.train, config.n_folds, config.seed, leakage.image_group)
    run = vqa.start_run(config, competition, folds)
    vqa.run_zeroshot(run)
    vqa.run_folds(run.config)
    return run


def hidden_labels(run: vqa.Run) -> np.ndarray:
    answers = pd.read_csv(vqa.DEMO / "test_answers.csv", dtype=str).set_index("id")["answer"]
    return answers[run.test["id"]].map(vqa.CHOICES.index).to_numpy()


def base_probabilities(run: vqa.Run) -> np.ndarray:
    """The untouched base model on the test rows, in-process."""
    session = vqa.open_session(run.config, run.train.iloc[0])
    return vqa.softmax(vqa.predict_logits(session, run.test, [vqa.TTAView("rotation 0")])[:, 0])


def score_table(run: vqa.Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(accuracy and NLL of base, each fold, ensemble and OOF; ensemble accuracy by question type)."""
    evaluation, labels = vqa.evaluate_run(run), hidden_labels(run)
    folds = vqa.predict_test(run, evaluation)
    ensemble = vqa.average_probabilities(np.stack(list(folds.values())))
    members = {
        "base model": base_probabilities(run),
        **{f"fold {fold}": p for fold, p in folds.items()},
    }
    rows = {
        name: vqa.score_row(p, labels) for name, p in (members | {"ensemble": ensemble}).items()
    }
    rows["OOF"] = vqa.score_row(evaluation.probabilities, evaluation.oof.labels)
    by_type = vqa.accuracy_by_type(run.test["type"], ensemble.argmax(1) == labels)
    return pd.DataFrame(rows).T.rename_axis("hidden answers"), by_type


def combined(runs: list[vqa.Run]) -> None:
    """Print the table of all ways to combine the runs, and what each run and the chosen way score on hidden answers."""
    labels = hidden_labels(runs[0])
    with tempfile.TemporaryDirectory() as folder:
        table, answers = vqa.ensemble_runs([run.directory for run in runs], folder)
    print(vqa.markdown_table(table), end="\n\n")
    for run in runs:
        single = vqa.write_submissions(run, vqa.evaluate_run(run))["ensemble"]
        print(
            f"{run.directory.name}: {np.mean(letters(single, run) == labels):.3f} of the hidden answers"
        )
    print(f"combined: {np.mean(letters(answers, runs[0]) == labels):.3f}")


def letters(answers: pd.DataFrame, run: vqa.Run) -> np.ndarray:
    return answers.set_index("id")["answer"][run.test["id"]].map(vqa.CHOICES.index).to_numpy()


def grey_copy(folder: Path) -> Path:
    """The demo with every image replaced by one shade of grey of the same size."""
    shutil.copytree(
        vqa.DEMO, folder, ignore=shutil.ignore_patterns("tiny_qwen3_vl", "*.py", "__pycache__")
    )
    for path in folder.rglob("*.jpg"):
        Image.new("RGB", Image.open(path).size, (128, 128, 128)).save(path)
    return folder


def shuffled_copy(folder: Path) -> Path:
    """The demo with its training answers in random order."""
    shutil.copytree(
        vqa.DEMO, folder, ignore=shutil.ignore_patterns("tiny_qwen3_vl", "*.py", "__pycache__")
    )
    train = pd.read_csv(folder / "train.csv", dtype=str, keep_default_na=False)
    train["answer"] = np.random.default_rng(0).permutation(train["answer"])
    train.to_csv(folder / "train.csv", index=False)
    return folder


def control_score(data_dir: Path, output_dir: str) -> float:
    """Test accuracy of one fold trained on a spoiled copy of the demo.

    Grey images are all copies of one another, so the folds are made on image names there.
    """
    config = vqa.load_config(
        "demo", {"data_dir": str(data_dir), "output_dir": output_dir, "train_folds": (0,)}, {}
    )
    competition = vqa.load_competition(config.data_dir)
    folds = vqa.make_folds(
        competition.train, config.n_folds, config.seed, np.arange(len(competition.train))
    )
    run = vqa.start_run(config, competition, folds)
    vqa.run_zeroshot(run)
    vqa.run_folds(run.config)
    probabilities = vqa.predict_test(run, vqa.evaluate_run(run))[0]
    return vqa.accuracy(probabilities, hidden_labels(run))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--controls", action="store_true", help="also train on grey images and on shuffled answers"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[], help="seeds of further runs to combine with it"
    )
    parser.add_argument("--output-dir", default="outputs")
    options = parser.parse_args()
    run = finished_run(output_dir=options.output_dir)
    tables = vqa.evaluate_run(run).ladder, *score_table(run)
    print(*map(vqa.markdown_table, tables), sep="\n\n", end="\n\n")
    if options.seeds:
        combined(
            [
                run,
                *(finished_run(output_dir=options.output_dir, seed=seed) for seed in options.seeds),
            ]
        )
    if options.controls:
        with tempfile.TemporaryDirectory() as folder:
            for name, spoil in (("grey images", grey_copy), ("shuffled answers", shuffled_copy)):
                data_dir = spoil(Path(folder) / name.replace(" ", "_"))
                print(
                    f"control, {name}: {control_score(data_dir, f'{data_dir}_outputs'):.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
