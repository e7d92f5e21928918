"""Train the demo by the usual recipe and print it beside ours: hidden answers, seconds of a fold.

    python tests/benchmarks/plain_recipe.py --quick     # 3 epochs, one seed: some 2 minutes
    python tests/benchmarks/plain_recipe.py             # 3, 6 and 12 epochs, two seeds: 20 minutes
    python tests/benchmarks/plain_recipe.py --traps     # and two well-known mistakes
    python tests/benchmarks/plain_recipe.py --rows 24 --epochs 1   # a trial; figures mean nothing

The usual recipe: Hugging Face Trainer and PEFT, LoRA r 16 on all projections of the language
model, the whole prompt with its image through the processor in every pass, left padding, the
model's own loss over its vocabulary at the answer's letter, choices shuffled anew in every epoch,
cosine with warm-up, the letters' logits of the held-out rows at the end of every epoch, no
checkpoints. At the end four choice orders are four passes over held-out rows and test rows.

Ours: the stages `train` and `predict` of a worker, in this process: features of all training
images, training with its checkpoints, validation, best epoch and average, and all rows in four
orders, with the files that they write. Nothing of it is there before; loading the model is left
out on both sides.

Both have the same fold, epochs, learning rate, batch size and prompt: that of `build_messages`,
with which the demo's base model was pretrained. They take turns, and with each repeat the seed of
training changes, but not the fold. Everything runs on one thread. Seconds are those of the
processor, so that other work on the machine counts little; "clock" is what has passed meanwhile.

NLL is that of the probabilities as they are, and (T) after one temperature, fitted on the held-out
rows; ours is shown as the model scores, without any choice of views. Ours differs in several things
at once: a loss over the four letters, label smoothing, the best of its epochs or their average. A
lower NLL cannot be credited to one of them.

The answers in data/test_answers.csv are read here only; no line of the pipeline opens them.
"""

import argparse
import contextlib
import dataclasses
import gc
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

# Before torch is imported: one thread, and no GPU where there is one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pandas as pd
import peft
import torch
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from leaderboard import copy_demo, hidden_labels

import vqa_helpers as vqa

FOLD = 0
VIEWS = [vqa.TTAView(f"rotation {rotation}", rotation) for rotation in range(4)]
USUAL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMOOTHING = 0.1
PARTS = ["training", "validation", "scoring"]
TARGET = 0.7  # ours / plain, of a whole fold


class Stopwatch:
    """Seconds of the parts of one fold: of the processor, and on the clock."""

    def __init__(self):
        self.seconds = Counter()  # part -> of the processor
        self.clock = Counter()  # part -> passed meanwhile

    @contextlib.contextmanager
    def part(self, name: str):
        """Add what the block takes to that part."""
        processor = time.process_time()
        clock = time.perf_counter()
        yield
        self.seconds[name] += time.process_time() - processor
        self.clock[name] += time.perf_counter() - clock


@dataclasses.dataclass(frozen=True)
class Result:
    """One fold by one recipe: its scores, by original choice, and its seconds."""

    oof: np.ndarray  # (held-out rows, 4 rotations, 4)
    oof_labels: np.ndarray  # (held-out rows,)
    test: np.ndarray  # (test rows, 4 rotations, 4)
    watch: Stopwatch  # with the parts PARTS and "fold"


@dataclasses.dataclass(frozen=True)
class Demo:
    """The competition and its folds, the same for all that is trained."""

    data_dir: str
    competition: vqa.Competition
    folds: np.ndarray


def read_demo(folder: Path, rows: int | None) -> Demo:
    """The demo, or a copy of it in `folder` with so many training rows and test rows."""
    data_dir = vqa.DEMO
    if rows:
        data_dir = copy_demo(folder / "demo")
        for name in vqa.COMPETITION_FILES:
            table = pd.read_csv(data_dir / name, dtype=str, keep_default_na=False)
            table.head(rows).to_csv(data_dir / name, index=False)
    config = vqa.load_config("demo", {"data_dir": str(data_dir)}, environ={})
    competition = vqa.load_competition(data_dir, config.max_fallback_share)
    groups = vqa.leakage_report(competition.train, competition.test).image_group
    folds = vqa.make_folds(competition.train, config.n_folds, config.seed, groups)
    return Demo(str(data_dir), competition, folds)


def start_run(demo: Demo, folder: str, epochs: int, seed: int) -> vqa.Run:
    """A run in `folder` of fold 0 alone; nothing of an earlier one is found there."""
    fields = {
        "data_dir": demo.data_dir,
        "output_dir": f"{folder}/outputs",
        "cache_dir": f"{folder}/cache",
        "num_epochs": epochs,
        "seed": seed,
        "train_folds": (FOLD,),
    }
    config = vqa.load_config("demo", fields, environ={})
    return vqa.start_run(config, demo.competition, demo.folds)


# --- The usual recipe -----------------------------------------------------------------------------
class Questions(torch.utils.data.Dataset):
    """Questions with their answers; with a seed each look at one shows another choice order."""

    def __init__(self, processor, frame: pd.DataFrame, seed: int | None = None):
        self.processor = processor
        self.records = frame.to_dict("records")
        self.generator = None if seed is None else np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> dict:
        record = self.records[number]
        order = [0, 1, 2, 3]
        if self.generator is not None:
            order = self.generator.permutation(4).tolist()
        letter = vqa.CHOICES[order.index(record["label"])]
        messages = vqa.build_messages(record, order)
        return {
            "text": vqa.render_prompt(self.processor, messages) + letter,
            "image": Image.open(record["image_path"]).convert("RGB"),
        }


def with_labels(processor, questions: list[dict]) -> dict:
    """A batch padded on the left; every label is -100 but that of the last token, the letter."""
    batch = processor(
        text=[question["text"] for question in questions],
        images=[question["image"] for question in questions],
        padding=True,
        return_tensors="pt",
    )
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["labels"][:, -1] = batch["input_ids"][:, -1]
    return batch


def letter_tokens(processor) -> list[int]:
    """Token ids of the plain letters a, b, c, d."""
    return [processor.tokenizer(letter)["input_ids"][0] for letter in vqa.CHOICES]


def letter_metrics(letters: list[int], evaluated: transformers.EvalPrediction) -> dict:
    """Accuracy and NLL of the letters' logits (n, 4)."""
    tokens = evaluated.label_ids.max(axis=1)  # all others of a row are -100
    labels = np.array([letters.index(token) for token in tokens])
    probabilities = vqa.softmax(evaluated.predictions)
    return {
        "accuracy": vqa.accuracy(probabilities, labels),
        "nll": vqa.negative_log_likelihood(probabilities, labels),
    }


class TimedPlainTrainer(transformers.Trainer):
    """Hugging Face's Trainer, with the seconds of its evaluations."""

    watch: Stopwatch

    def evaluate(self, *arguments, **options) -> dict:
        with self.watch.part("validation"):
            return super().evaluate(*arguments, **options)


def plain_settings(config: vqa.Config, learning_rate: float, folder: str, **more):
    """TrainingArguments with the preset's settings, and this learning rate."""
    return transformers.TrainingArguments(
        output_dir=folder,
        num_train_epochs=config.num_epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accum_steps,
        per_device_eval_batch_size=config.infer_batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        use_cpu=True,
        remove_unused_columns=False,
        label_names=["labels"],
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )


def train_plain(
    run: vqa.Run, base, processor, learning_rate: float, watch: Stopwatch, **more
) -> torch.nn.Module:
    """The trained model; `more` are further TrainingArguments."""
    config = run.config
    torch.manual_seed(config.seed + FOLD)
    adapter = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=USUAL_TARGETS,
        task_type="CAUSAL_LM",
    )
    is_held_out = run.train["fold"] == FOLD
    letters = letter_tokens(processor)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedPlainTrainer(
            model=peft.get_peft_model(base, adapter),
            args=plain_settings(config, learning_rate, folder, **more),
            train_dataset=Questions(processor, run.train[~is_held_out], config.seed + FOLD),
            eval_dataset=Questions(processor, run.train[is_held_out]),
            data_collator=lambda questions: with_labels(processor, questions),
            # Of all outputs the logits come first. The last position is the letter's own: the one
            # before predicts it.
            preprocess_logits_for_metrics=lambda outputs, _: outputs[0][:, -2, letters],
            compute_metrics=lambda evaluated: letter_metrics(letters, evaluated),
        )
        trainer.watch = watch
        trainer.remove_callback(transformers.PrinterCallback)
        with watch.part("training and validation"):
            trainer.train()
    for seconds in (watch.seconds, watch.clock):
        seconds["training"] = seconds["training and validation"] - seconds["validation"]
    return trainer.model.eval()


@torch.inference_mode()
def score_plain(model, processor, frame: pd.DataFrame, views, batch_size: int) -> np.ndarray:
    """Scores (n, views, 4) of the plain letters at the last position, one pass for each view."""
    letters = letter_tokens(processor)
    records = frame.to_dict("records")
    scores = np.full((len(records), len(views), 4), np.nan)
    for number, view in enumerate(views):
        for first in range(0, len(records), batch_size):
            rows = records[first : first + batch_size]
            messages = [vqa.build_messages(row, view.order) for row in rows]
            inputs = processor(
                text=[vqa.render_prompt(processor, message) for message in messages],
                images=[Image.open(row["image_path"]).convert("RGB") for row in rows],
                padding=True,
                return_tensors="pt",
            )
            by_letter = model(**inputs).logits[:, -1, letters].numpy()
            by_choice = vqa.unpermute_scores(by_letter, view.order)
            scores[first : first + batch_size, number] = by_choice
    return scores


def load_plain(run: vqa.Run) -> tuple:
    """The base model and its processor, as anybody loads them."""
    path = run.config.model_path
    base = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(path)
    processor.tokenizer.padding_side = "left"
    return base, processor


def plain_fold(run: vqa.Run, learning_rate: float) -> tuple[Result, object]:
    """The fold by the usual recipe, and its model."""
    base, processor = load_plain(run)
    watch = Stopwatch()
    held_out = run.train[run.train["fold"] == FOLD]
    batch_size = run.config.infer_batch_size
    with watch.part("fold"):
        model = train_plain(run, base, processor, learning_rate, watch)
        with watch.part("scoring"):
            oof = score_plain(model, processor, held_out, VIEWS, batch_size)
            test = score_plain(model, processor, run.test, VIEWS, batch_size)
    return Result(oof, held_out["label"].to_numpy(), test, watch), model


# --- Ours -----------------------------------------------------------------------------------------
def timed_trainer(watch: Stopwatch) -> type:
    """Our trainer of a fold, with the seconds of its optimizer steps and validations."""

    class TimedTrainer(vqa.FoldTrainer):
        def train_epoch(self, epoch: int, first_step: int) -> float:
            with watch.part("training"):
                return super().train_epoch(epoch, first_step)

        def held_out_logits(self) -> np.ndarray:
            with watch.part("validation"):
                return super().held_out_logits()

    return TimedTrainer


def our_fold(run: vqa.Run) -> Result:
    """The fold by the stages of a worker."""
    session = vqa.open_session(run.config, run.train.iloc[0])
    watch = Stopwatch()
    with watch.part("fold"):
        with mock.patch.object(vqa, "FoldTrainer", timed_trainer(watch)):
            vqa.train_fold(run.config, FOLD, session)
        vqa.select_weights(run)
        with watch.part("scoring"):
            vqa.stage_predict(session, run, FOLD)
    oof = vqa.read_scores(run, FOLD, "oof")
    test = vqa.read_scores(run, FOLD, "test")
    rows = pd.Index(test["ids"]).get_indexer(run.test["id"])
    return Result(oof["logits"], oof["labels"], test["logits"][rows], watch)


# --- Figures --------------------------------------------------------------------------------------
def figures(result: Result, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, NLL and temperature on the held-out rows and the hidden answers, and seconds."""
    scaler = vqa.TemperatureScaler().fit(result.oof, result.oof_labels)
    one_view = vqa.softmax(result.test[:, 0])
    raw = vqa.softmax(vqa.combine_views(result.test))
    scaled = scaler.transform(result.test)
    held_out = vqa.softmax(vqa.combine_views(result.oof))
    cells = {
        "held-out": vqa.accuracy(held_out, result.oof_labels),
        "hidden, one view": vqa.accuracy(one_view, labels),
        "hidden, four": vqa.accuracy(raw, labels),
        "NLL, one view": vqa.negative_log_likelihood(one_view, labels),
        "NLL, four": vqa.negative_log_likelihood(raw, labels),
        "T": scaler.temperature,
        "NLL (T), four": vqa.negative_log_likelihood(scaled, labels),
    }
    for part in PARTS:
        cells[f"{part}, s"] = result.watch.seconds[part]
    cells["fold, s"] = result.watch.seconds["fold"]
    cells["fold, clock"] = result.watch.clock["fold"]
    return cells


def mean_row(results: list[Result], labels: np.ndarray) -> dict[str, str]:
    """The mean of the repeats' figures, as text."""
    means = pd.DataFrame([figures(result, labels) for result in results]).mean()
    cells = {}
    for name, value in means.items():
        is_seconds = name.endswith((", s", ", clock"))
        cells[name] = f"{value:.1f}" if is_seconds else f"{value:.3f}"
    return cells


def print_changes(run: vqa.Run, plain: list[Result], ours: list[Result]) -> None:
    """Print what ours gains on the hidden answers, with 90 % intervals that draw whole images."""
    labels = hidden_labels(run)
    changes = []
    for before, now in zip(plain, ours, strict=True):
        scores = []
        for result in (before, now):
            probabilities = vqa.softmax(vqa.combine_views(result.test))
            scores.append(vqa.row_scores(probabilities, labels))
        changes.append(scores[1] - scores[0])
    of_rows = np.mean(changes, axis=0)  # over the repeats
    low, high = vqa.bootstrap_interval(of_rows, vqa.image_groups(run.test))
    accuracy, loss = of_rows.mean(axis=0)
    print(
        f"Ours less plain, four rotations: accuracy {100 * accuracy:+.1f} points "
        f"({100 * low[0]:+.1f} to {100 * high[0]:+.1f}), "
        f"NLL {loss:+.3f} ({low[1]:+.3f} to {high[1]:+.3f})."
    )


def print_ratios(plain: list[Result], ours: list[Result]) -> None:
    """Print our seconds by the plain recipe's: the mean of the repeats, and the whole fold's each.

    Each repeat of ours is divided by the plain one just before it.
    """
    pairs = list(zip(plain, ours, strict=True))
    texts = []
    for part in [*PARTS, "fold"]:
        ratios = [now.watch.seconds[part] / before.watch.seconds[part] for before, now in pairs]
        texts.append(f"{part} {np.mean(ratios):.2f}")
    each = [now.watch.clock["fold"] / before.watch.clock["fold"] for before, now in pairs]
    clock = ", ".join(f"{ratio:.2f}" for ratio in each)
    share = [now.watch.seconds["validation"] / now.watch.seconds["training"] for _, now in pairs]
    print(f"Ours / plain, seconds: {', '.join(texts)} (asked: {TARGET}); on the clock {clock}.")
    print(f"Our validation: {np.mean(share):.0%} of our training.\n", flush=True)


# --- Traps ----------------------------------------------------------------------------------------
def print_padding_trap(run: vqa.Run, model, left: np.ndarray) -> None:
    """Print what a model trained with left padding answers at the end of right padding.

    `left`: its scores (n, 4) of the test rows with left padding.
    """
    _, processor = load_plain(run)
    processor.tokenizer.padding_side = "right"
    right = score_plain(model, processor, run.test, VIEWS[:1], run.config.infer_batch_size)[:, 0]
    labels = hidden_labels(run)
    change = np.abs(right - left).max(axis=1)
    print(
        f"Trap, right padding read at the last position: {np.mean(change > 0.01):.0%} of the rows "
        f"have other logits, by up to {change.max():.1f}, "
        f"{np.mean(right.argmax(1) != left.argmax(1)):.0%} another answer; accuracy in one view "
        f"{vqa.accuracy(vqa.softmax(right), labels):.3f} "
        f"in place of {vqa.accuracy(vqa.softmax(left), labels):.3f}."
    )


def print_smoothing_trap(run: vqa.Run, learning_rate: float) -> None:
    """Print how a model answers that was trained with the Trainer's label smoothing."""
    base, processor = load_plain(run)
    model = train_plain(
        run, base, processor, learning_rate, Stopwatch(), label_smoothing_factor=SMOOTHING
    )
    scores = score_plain(model, processor, run.test, VIEWS[:1], run.config.infer_batch_size)
    accuracy = vqa.accuracy(vqa.softmax(scores[:, 0]), hidden_labels(run))
    print(
        f"Trap, label_smoothing_factor={SMOOTHING} in the Trainer "
        f"(transformers {transformers.__version__}): accuracy in one view {accuracy:.3f}."
    )


# --- Main -----------------------------------------------------------------------------------------
def compare(demo: Demo, epochs: int, options: argparse.Namespace) -> None:
    """Train by both recipes in turn, and print the table and what differs."""
    plain = []
    ours = []
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            run = start_run(demo, folder, epochs, vqa.Config.seed + repeat)
            rate = options.learning_rate or run.config.learning_rate
            result, model = plain_fold(run, rate)
            plain.append(result)
            ours.append(our_fold(run))
            if options.traps and repeat == 0:
                print_padding_trap(run, model, result.test[:, 0])
                print_smoothing_trap(run, rate)
        del model
        gc.collect()
    labels = hidden_labels(run)
    rows = {
        f"plain, {rate:g}": mean_row(plain, labels),
        f"ours, {run.config.learning_rate:g}": mean_row(ours, labels),
    }
    name = f"epochs: {epochs}, repeats: {options.repeats}; recipe, learning rate"
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis(name)
    print(vqa.markdown_table(table))
    print_changes(run, plain, ours)
    print_ratios(plain, ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, nargs="+", default=[3, 6, 12], help="of both recipes")
    parser.add_argument("--repeats", type=int, default=2, help="each with another seed")
    parser.add_argument("--quick", action="store_true", help="as --epochs 3 --repeats 1")
    parser.add_argument(
        "--learning-rate", type=float, help="of the usual recipe; by default ours, 1e-3"
    )
    parser.add_argument("--rows", type=int, help="training rows and test rows; by default all")
    parser.add_argument("--traps", action="store_true", help="also make two well-known mistakes")
    options = parser.parse_args()
    if options.quick:
        options.epochs = [3]
        options.repeats = 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        demo = read_demo(Path(folder), options.rows)
        for epochs in options.epochs:
            compare(demo, epochs, options)


if __name__ == "__main__":
    main()
