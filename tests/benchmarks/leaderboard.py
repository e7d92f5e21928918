"""Print the demo's ladder with its intervals, and score it against its hidden answers.

    python tests/benchmarks/leaderboard.py              # the demo's run in outputs/
    python tests/benchmarks/leaderboard.py --controls   # grey images, shuffled answers: two more
    python tests/benchmarks/leaderboard.py --seeds 7    # a run with that seed, and both combined

Prints the ladder; accuracy and NLL of the base model, each fold, their ensemble and the OOF rows;
accuracy by question type. It runs on any machine. Every run that is not there yet is trained, each
as long as the demo; a control trains one fold only.

The answers in data/test_answers.csv are read here only; no line of the pipeline opens them.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import vqa_helpers as vqa


# === Runs of the demo (other benchmarks use these, too) ===========================================
def finished_run(**fields) -> vqa.Run:
    """The demo's run with these settings, trained and predicted if it is not there yet."""
    config = vqa.load_config("demo", fields, environ={})
    competition = vqa.load_competition(
        config.data_dir, config.max_fallback_share, config.rows_to_use, config.seed
    )
    leakage = vqa.leakage_report(competition.train, competition.test)
    folds = vqa.make_folds(competition.train, config.n_folds, config.seed, leakage.image_group)
    run = vqa.start_run(config, competition, folds)
    vqa.run_zeroshot(run)
    vqa.run_folds(run.config)
    return run


def hidden_labels(run: vqa.Run) -> np.ndarray:
    """(n,) numbers of the right choices of the test rows."""
    table = pd.read_csv(vqa.DEMO / "test_answers.csv", dtype=str)
    answers = table.set_index("id")["answer"]
    return answers[run.test["id"]].map(vqa.CHOICES.index).to_numpy()


def copy_demo(folder: Path) -> Path:
    """A copy of the demo's competition files, without its model and scripts."""
    unwanted = shutil.ignore_patterns("tiny_qwen3_vl", "*.py", "__pycache__")
    shutil.copytree(vqa.DEMO, folder, ignore=unwanted)
    return folder


# === Scores on the hidden answers =================================================================
def base_probabilities(run: vqa.Run) -> np.ndarray:
    """(n, 4) of the untouched base model on the test rows, computed in this process."""
    session = vqa.open_session(run.config, run.train.iloc[0])
    logits = vqa.predict_logits(session, run.test, [vqa.TTAView("rotation 0")])
    return vqa.softmax(logits[:, 0])


def score_table(run: vqa.Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(scores of base, each fold, ensemble and OOF; ensemble accuracy by question type)."""
    evaluation = vqa.evaluate_run(run)
    labels = hidden_labels(run)
    fold_probabilities = vqa.predict_test(run, evaluation)
    ensemble = vqa.average_probabilities(np.stack(list(fold_probabilities.values())))
    rows = {"base model": vqa.score_row(base_probabilities(run), labels)}
    for fold, probabilities in fold_probabilities.items():
        rows[f"fold {fold}"] = vqa.score_row(probabilities, labels)
    rows["ensemble"] = vqa.score_row(ensemble, labels)
    rows["OOF"] = vqa.score_row(evaluation.probabilities, evaluation.oof.labels)
    scores = pd.DataFrame(rows).T.rename_axis("hidden answers")
    is_right = ensemble.argmax(1) == labels
    return scores, vqa.accuracy_by_type(run.test["type"], is_right)


def hidden_accuracy(answers: pd.DataFrame, run: vqa.Run) -> float:
    """Share of a submission's letters that are right."""
    letters = answers.set_index("id")["answer"][run.test["id"]]
    return np.mean(letters.map(vqa.CHOICES.index).to_numpy() == hidden_labels(run))


def print_combined(runs: Sequence[vqa.Run]) -> None:
    """Print the table of all ways to combine the runs.

    Then what each run and the chosen way score on the hidden answers.
    """
    directories = [run.directory for run in runs]
    with tempfile.TemporaryDirectory() as folder:
        table, answers = vqa.ensemble_runs(directories, folder)
    print(vqa.markdown_table(table), end="\n\n")
    for run in runs:
        submissions = vqa.write_submissions(run, vqa.evaluate_run(run))
        accuracy = hidden_accuracy(submissions["ensemble"], run)
        print(f"{run.directory.name}: {accuracy:.3f} of the hidden answers")
    print(f"combined: {hidden_accuracy(answers, runs[0]):.3f}")


# === Controls =====================================================================================
def grey_copy(folder: Path) -> Path:
    """The demo with every image replaced by one shade of grey of the same size."""
    copy_demo(folder)
    for path in folder.rglob("*.jpg"):
        size = Image.open(path).size
        Image.new("RGB", size, (128, 128, 128)).save(path)
    return folder


def shuffled_copy(folder: Path) -> Path:
    """The demo with its training answers in random order."""
    copy_demo(folder)
    train = pd.read_csv(folder / "train.csv", dtype=str, keep_default_na=False)
    train["answer"] = np.random.default_rng(0).permutation(train["answer"])
    train.to_csv(folder / "train.csv", index=False)
    return folder


def control_score(data_dir: Path, output_dir: str) -> float:
    """Test accuracy of one fold trained on a spoiled copy of the demo.

    Grey images are all copies of one another, so every row is an image of its own there.
    """
    fields = {"data_dir": str(data_dir), "output_dir": output_dir, "train_folds": (0,)}
    config = vqa.load_config("demo", fields, environ={})
    competition = vqa.load_competition(config.data_dir)
    groups = np.arange(len(competition.train))
    folds = vqa.make_folds(competition.train, config.n_folds, config.seed, groups)
    run = vqa.start_run(config, competition, folds)
    vqa.run_zeroshot(run)
    vqa.run_folds(run.config)
    probabilities = vqa.predict_test(run, vqa.evaluate_run(run))[0]
    return vqa.accuracy(probabilities, hidden_labels(run))


def print_controls() -> None:
    """Print what is left of the accuracy when the images, or the answers, say nothing."""
    controls = {"grey images": grey_copy, "shuffled answers": shuffled_copy}
    with tempfile.TemporaryDirectory() as folder:
        for name, make_copy in controls.items():
            data_dir = make_copy(Path(folder) / name.replace(" ", "_"))
            score = control_score(data_dir, f"{data_dir}_outputs")
            print(f"control, {name}: {score:.3f}", flush=True)


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
    ladder = vqa.evaluate_run(run).ladder
    scores, by_type = score_table(run)
    for table in (ladder, scores, by_type):
        print(vqa.markdown_table(table), end="\n\n")
    if options.seeds:
        runs = [run]
        for seed in options.seeds:
            runs.append(finished_run(output_dir=options.output_dir, seed=seed))
        print_combined(runs)
    if options.controls:
        print_controls()


if __name__ == "__main__":
    main()
