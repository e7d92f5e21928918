"""Give the demo's rows of type `ocr` their digit as context, the true one or another row's.

    python tests/benchmarks/context_demo.py              # three ways, one fold each
    python tests/benchmarks/context_demo.py --kinds true

The demo's 60 `ocr` rows a fold are too few for its tiny model to learn that context can be copied:
the picture, which it reads well, explains them already. So it first trains on 800 further rows of
that type, drawn by data/make_demo.py with another seed, whose pictures show no digit: only their
context tells (`pretrain_epochs`). Then it trains on the demo's own rows, with context of the same
kind. Context is the digit in both notations of the choices: "7 칠". Prints the accuracy on the
hidden answers of type `ocr` in one view and in four rotations: without context (by the demo's own
rows and epochs alone), with the true context, and with the true ones of all rows shuffled, in
training and in scoring alike. It runs on any machine.
"""

import argparse
import dataclasses
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
from leaderboard import copy_demo, hidden_labels

import make_demo
import vqa_helpers as vqa

SEED = 3000  # none that the demo or its model was made with
KINDS = ("none", "true", "shuffled")
VIEWS = [vqa.TTAView(f"rotation {turn}", turn) for turn in range(4)]


def written_text(choice: str) -> str:
    """A digit's choice text in both notations, such as "7 칠"."""
    [texts] = [texts for texts in make_demo.DIGITS.values() if choice in texts]
    return " ".join(texts)


def add_context(path: Path, answers: pd.Series, kind: str) -> None:
    """Give the table of this file a column of context; `answers` are its letters by id."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    contexts = []
    for row in table.to_dict("records"):
        choices = [row[choice] for choice in vqa.CHOICES]
        is_ocr = vqa.question_type(row["question"], choices) == "ocr"
        contexts.append(written_text(row[answers[row["id"]]]) if is_ocr else "")
    contexts = np.array(contexts, dtype=object)
    if kind == "shuffled":
        has_context = contexts != ""
        contexts[has_context] = np.random.default_rng(0).permutation(contexts[has_context])
    table.assign(context=contexts).to_csv(path, index=False)


def add_contexts(folder: Path, kind: str) -> None:
    """Give both tables of a competition their context."""
    if kind == "none":
        return
    for name, answers_name in (("train", "train"), ("test", "test_answers")):
        answers = pd.read_csv(folder / f"{answers_name}.csv", dtype=str).set_index("id")["answer"]
        add_context(folder / f"{name}.csv", answers, kind)


def ocr_round(folder: Path, rows: int) -> Path:
    """A competition with so many training rows of type `ocr`, whose pictures show no digit."""
    make_demo.TYPES = ("ocr",)
    train = make_demo.draw_split("train", rows, SEED)
    domain = make_demo.demo_domain("train")
    rng = random.Random(SEED)
    for row in train:
        scene = dataclasses.replace(row["task"].scene, digit=None)
        picture = make_demo.render(scene, domain)
        row["jpeg"] = make_demo.jpeg_bytes(picture, rng.randint(*domain.quality))
    make_demo.write_competition(folder, train, test=train[:4])
    return folder


def hidden_ocr_accuracy(
    kind: str, options: argparse.Namespace, folder: Path
) -> tuple[float, float]:
    """(in one view, in four rotations) of fold 0, trained and scored with that kind of context."""
    data = copy_demo(folder / "demo")
    add_contexts(data, kind)
    settings = {
        "data_dir": str(data),
        "output_dir": str(folder / "outputs"),
        "train_folds": (0,),
    }
    if kind != "none":
        related = ocr_round(folder / "ocr", options.rows)
        add_contexts(related, kind)
        settings["context_tokens"] = 16
        settings["extra_train_dirs"] = (str(related),)
        settings["pretrain_epochs"] = options.pretrain_epochs
        settings["num_epochs"] = options.epochs
    config = vqa.load_config("demo", settings, environ={})
    competition = vqa.load_competition(config.data_dir)
    leakage = vqa.leakage_report(competition.train, competition.test)
    folds = vqa.make_folds(competition.train, config.n_folds, config.seed, leakage.image_group)
    run = vqa.start_run(config, competition, folds)
    session = vqa.open_session(config, run.train.iloc[0])
    vqa.train_fold(config, 0, session)
    vqa.load_adapter(session.model, run.fold_dir(0) / "adapter_raw")
    is_ocr = (run.test["type"] == "ocr").to_numpy()
    rows = run.test[is_ocr].reset_index(drop=True)
    logits = vqa.predict_logits(session, rows, VIEWS)
    labels = hidden_labels(run)[is_ocr]
    scored = (logits[:, 0], logits.mean(axis=1))
    return tuple(vqa.accuracy(vqa.softmax(scores), labels) for scores in scored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rows", type=int, default=800, help="rows to pretrain on")
    parser.add_argument("--pretrain-epochs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2, help="epochs on the demo's own rows")
    options = parser.parse_args()
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            one, four = hidden_ocr_accuracy(kind, options, Path(folder))
        print(f"context {kind}: {one:.3f} in one view, {four:.3f} in four rotations", flush=True)


if __name__ == "__main__":
    main()
