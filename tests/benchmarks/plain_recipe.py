"""Train the demo by the usual recipe and print it beside ours: hidden answers and speed.

    python tests/benchmarks/plain_recipe.py                      # three folds
    python tests/benchmarks/plain_recipe.py --folds 0            # one of them
    python tests/benchmarks/plain_recipe.py --folds 0 --traps    # and two well-known mistakes
    python tests/benchmarks/plain_recipe.py --rows 24 --epochs 1 # a trial; figures mean nothing

The usual recipe: Hugging Face Trainer and PEFT, LoRA r 16 on all projections of the language
model, the whole prompt with its image through the processor in every pass, left padding, the
model's own loss over its vocabulary at the answer's letter, choices shuffled anew in every epoch,
no weight average, no validation; four choice orders are four passes. Ours: the demo's run in
outputs/, made first where it is missing. Both have the same folds, epochs, batch size and prompt:
that of `build_messages`, with which the demo's base model was pretrained.

Prints one table, with a row for each fold and for the mean of the folds' probabilities, and a
sentence for each comparison. NLL is that of the probabilities as they are, and (T) after one
temperature for each fold, fitted on its out-of-fold rows; ours is shown here as the models score,
without any choice of views, so that both columns mean the same. Speeds are questions a second of
processor time, on one thread, so that other work on the machine counts little; ours are those of
one fold that is trained anew for that. Ours differs in several things at once: a loss over the four
letters, label smoothing, the best of its epochs, and a lower learning rate (--learning-rate 1e-3
gives the plain recipe the same). A lower NLL cannot be credited to one of them.

Takes 1.5 minutes of processor time a fold, a minute more for our fold and another for --traps; our
run, where it is missing, some 3 minutes on two quiet cores.

The answers in data/test_answers.csv are read here only; no line of the pipeline opens them.
"""

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

# Before torch is imported: one thread, and no GPU where there is one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pandas as pd
import peft
import torch
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from leaderboard import finished_run, hidden_labels

import vqa_helpers as vqa

VIEWS = [vqa.TTAView(f"rotation {rotation}", rotation) for rotation in range(4)]
COUNTS = {"one view": 1, "four": 4}  # how many of them each column takes
USUAL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMOOTHING = 0.1
SPEEDS = ["fold, s", "trained/s", "scored/s"]


@dataclasses.dataclass(frozen=True)
class FoldLogits:
    """The scores that one fold's model gives; columns are the original choices."""

    oof: np.ndarray  # (held-out rows, 4 rotations, 4)
    oof_labels: np.ndarray  # (held-out rows,)
    test: np.ndarray  # (test rows, 4 rotations, 4)


@dataclasses.dataclass(frozen=True)
class Speed:
    """Processor time of one fold on one thread."""

    fold_seconds: float  # from the loaded base model to the trained adapter
    trained: float  # questions a second while training
    scored: float  # questions a second, each in four rotations


def small_copy(folder: Path, rows: int) -> Path:
    """The demo with that many training rows and test rows."""
    left_out = shutil.ignore_patterns("tiny_qwen3_vl", "*.py", "__pycache__")
    shutil.copytree(vqa.DEMO, folder, ignore=left_out)
    for name in vqa.COMPETITION_FILES:
        table = pd.read_csv(folder / name, dtype=str, keep_default_na=False)
        table.head(rows).to_csv(folder / name, index=False)
    return folder


# --- The usual recipe -----------------------------------------------------------------------------
class ShuffledQuestions(torch.utils.data.Dataset):
    """Training questions with their answers; each look at one shows another choice order."""

    def __init__(self, processor, frame: pd.DataFrame, seed: int):
        self.processor = processor
        self.records = frame.to_dict("records")
        self.generator = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> dict:
        record = self.records[number]
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


def plain_settings(
    config: vqa.Config, learning_rate: float, folder: str, **more
) -> transformers.TrainingArguments:
    """Settings of the Trainer: those of the preset, but for the learning rate."""
    return transformers.TrainingArguments(
        output_dir=folder,
        num_train_epochs=config.num_epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accum_steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of all steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )


def train_plain(
    run: vqa.Run, processor, fold: int, learning_rate: float, **more
) -> tuple[object, float]:
    """The model of one fold, and the processor seconds that its training took."""
    config = run.config
    base = transformers.AutoModelForImageTextToText.from_pretrained(
        config.model_path, dtype=torch.float32
    )
    torch.manual_seed(config.seed + fold)
    adapter = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=USUAL_TARGETS,
        task_type="CAUSAL_LM",
    )
    rows = run.train[run.train["fold"] != fold]
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=peft.get_peft_model(base, adapter),
            args=plain_settings(config, learning_rate, folder, **more),
            train_dataset=ShuffledQuestions(processor, rows, config.seed + fold),
            data_collator=lambda questions: with_labels(processor, questions),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return trainer.model.eval(), time.process_time() - start


@torch.inference_mode()
def score_plain(model, processor, frame: pd.DataFrame, views, batch_size: int) -> np.ndarray:
    """Scores (n, views, 4) of the plain letters at the last position, one pass for each view."""
    letters = [processor.tokenizer(letter)["input_ids"][0] for letter in vqa.CHOICES]
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


def plain_fold(
    run: vqa.Run, processor, fold: int, learning_rate: float
) -> tuple[object, FoldLogits, Speed]:
    """One fold's trained model, its scores and its speed."""
    model, seconds = train_plain(run, processor, fold, learning_rate)
    held_out = run.train[run.train["fold"] == fold]
    batch_size = run.config.infer_batch_size
    oof = score_plain(model, processor, held_out, VIEWS, batch_size)
    start = time.process_time()
    test = score_plain(model, processor, run.test, VIEWS, batch_size)
    scoring_seconds = time.process_time() - start
    questions = run.config.num_epochs * (len(run.train) - len(held_out))
    logits = FoldLogits(oof, held_out["label"].to_numpy(), test)
    speed = Speed(seconds, questions / seconds, len(run.test) / scoring_seconds)
    return model, logits, speed


# --- Ours -----------------------------------------------------------------------------------------
class TimedTrainer(vqa.FoldTrainer):
    """Our training, with the processor seconds of its optimizer steps beside the rest."""

    seconds_in_steps = 0.0  # validation and saving left out; by `train_epoch`

    def train_epoch(self, epoch: int, first_step: int) -> float:
        start = time.process_time()
        speed = super().train_epoch(epoch, first_step)
        self.seconds_in_steps += time.process_time() - start
        return speed


def our_logits(run: vqa.Run, fold: int) -> FoldLogits:
    """What the finished run has saved for one fold."""
    oof = vqa.read_scores(run, fold, "oof")
    test = vqa.read_scores(run, fold, "test")
    rows = pd.Index(test["ids"]).get_indexer(run.test["id"])
    return FoldLogits(oof["logits"], oof["labels"], test["logits"][rows])


def our_speed(run: vqa.Run, fold: int) -> Speed:
    """One fold trained once more in this process; no features are there when it begins.

    The test rows are scored without stored features, too.
    """
    with tempfile.TemporaryDirectory() as folder:  # the finished run stays as it is
        config = dataclasses.replace(run.config, cache_dir=folder)
        session = vqa.open_session(config, run.train.iloc[0])
        copy = dataclasses.replace(run, config=config, directory=Path(folder))
        start = time.process_time()
        vqa.fill_vision_cache(session, run.train, uses=run.uses_per_image, passes=3)
        trainer = TimedTrainer(session, copy, fold)
        trainer.fit()
        fold_seconds = time.process_time() - start
        start = time.process_time()
        vqa.predict_logits(session, run.test, VIEWS)
        scoring_seconds = time.process_time() - start
    questions = trainer.schedule.all_rows
    return Speed(
        fold_seconds=fold_seconds,
        trained=questions / trainer.seconds_in_steps,
        scored=len(run.test) / scoring_seconds,
    )


# --- Figures --------------------------------------------------------------------------------------
def test_probabilities(logits: FoldLogits, count: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(n, 4) as they are and after the temperature, and T, from the first `count` rotations."""
    scaler = vqa.TemperatureScaler().fit(logits.oof[:, :count], logits.oof_labels)
    test = logits.test[:, :count]
    raw = vqa.softmax(vqa.combine_views(test))
    return raw, scaler.transform(test), scaler.temperature


def figures(folds: list[FoldLogits], labels: np.ndarray) -> dict[str, float]:
    """Accuracy, NLL and temperature of the mean of these folds' probabilities."""
    cells = {}
    for name, count in COUNTS.items():
        members = [test_probabilities(logits, count) for logits in folds]
        raw = np.mean([member[0] for member in members], axis=0)
        scaled = np.mean([member[1] for member in members], axis=0)
        cells[f"accuracy, {name}"] = vqa.accuracy(raw, labels)
        cells[f"NLL, {name}"] = vqa.negative_log_likelihood(raw, labels)
        cells[f"NLL (T), {name}"] = vqa.negative_log_likelihood(scaled, labels)
        temperatures = [member[2] for member in members]
        cells[f"T, {name}"] = " ".join(f"{temperature:.2f}" for temperature in temperatures)
    return cells


def speed_cells(speed: Speed | None) -> dict[str, str]:
    """A row's cells of the table; a dash where nothing was timed."""
    if speed is None:
        return dict.fromkeys(SPEEDS, "-")
    values = dataclasses.astuple(speed)
    return {name: f"{value:.1f}" for name, value in zip(SPEEDS, values, strict=True)}


def mean_speed(speeds: dict[int, Speed]) -> Speed:
    """Their mean, number by number."""
    values = [dataclasses.astuple(speed) for speed in speeds.values()]
    return Speed(*np.mean(values, axis=0))


def recipe_rows(
    name: str, folds: dict[int, FoldLogits], speeds: dict[int, Speed], labels: np.ndarray
) -> dict[str, dict]:
    """The table's rows of one recipe: each fold, then their mean."""
    rows = {}
    for fold, logits in folds.items():
        rows[f"{name}, fold {fold}"] = figures([logits], labels) | speed_cells(speeds.get(fold))
    if len(folds) > 1:
        every_fold = list(folds.values())
        rows[f"{name}, mean"] = figures(every_fold, labels) | speed_cells(mean_speed(speeds))
    return rows


def mean_probabilities(folds: dict[int, FoldLogits]) -> np.ndarray:
    """(n, 4) mean over the folds, four rotations, no temperature."""
    members = [test_probabilities(logits, 4)[0] for logits in folds.values()]
    return np.mean(members, axis=0)


def print_differences(
    run: vqa.Run, plain: dict[int, FoldLogits], ours: dict[int, FoldLogits]
) -> None:
    """Print what ours gains on the hidden answers, with 90 % intervals that draw whole images."""
    labels = hidden_labels(run)
    before = vqa.row_scores(mean_probabilities(plain), labels)
    now = vqa.row_scores(mean_probabilities(ours), labels)
    changes = now - before
    low, high = vqa.bootstrap_interval(changes, vqa.image_groups(run.test))
    accuracy, loss = changes.mean(axis=0)
    print(
        f"Accuracy in four rotations, ours less plain: {100 * accuracy:+.1f} points "
        f"({100 * low[0]:+.1f} to {100 * high[0]:+.1f})."
    )
    print(
        "NLL in four rotations without a temperature, ours less plain: "
        f"{loss:+.3f} ({low[1]:+.3f} to {high[1]:+.3f})."
    )


def print_ratios(plain: Speed, ours: Speed) -> None:
    """Print how much faster ours is."""
    print(
        f"Training steps: {ours.trained:.1f} questions a second against {plain.trained:.1f}, "
        f"{ours.trained / plain.trained:.2f} times as fast (image features computed before)."
    )
    print(
        f"A whole fold: {ours.fold_seconds:.0f} s against {plain.fold_seconds:.0f} s, "
        f"{ours.fold_seconds / plain.fold_seconds:.2f} times as long (ours computes all image "
        "features, which later folds share, and validates every epoch)."
    )
    print(
        f"Scoring in four rotations: {ours.scored:.1f} questions a second against "
        f"{plain.scored:.1f}, {ours.scored / plain.scored:.2f} times as fast."
    )


# --- Traps ----------------------------------------------------------------------------------------
def print_padding_trap(run: vqa.Run, processor, model, left: np.ndarray) -> None:
    """Print what a model trained with left padding answers at the end of right padding.

    `left`: its scores (n, 4) of the test rows with left padding.
    """
    processor.tokenizer.padding_side = "right"
    batch_size = run.config.infer_batch_size
    right = score_plain(model, processor, run.test, VIEWS[:1], batch_size)[:, 0]
    processor.tokenizer.padding_side = "left"
    labels = hidden_labels(run)
    change = np.abs(right - left).max(axis=1)
    print(
        f"Trap, right padding read at the last position: {np.mean(change > 0.01):.0%} of the rows "
        f"have other logits, by up to {change.max():.1f}, "
        f"{np.mean(right.argmax(1) != left.argmax(1)):.0%} another answer; accuracy in one view "
        f"{vqa.accuracy(vqa.softmax(right), labels):.3f} "
        f"in place of {vqa.accuracy(vqa.softmax(left), labels):.3f}."
    )


def print_smoothing_trap(run: vqa.Run, processor, fold: int, learning_rate: float) -> None:
    """Print how a model answers that was trained with the Trainer's label smoothing."""
    model, _ = train_plain(run, processor, fold, learning_rate, label_smoothing_factor=SMOOTHING)
    scores = score_plain(model, processor, run.test, VIEWS[:1], run.config.infer_batch_size)
    accuracy = vqa.accuracy(vqa.softmax(scores[:, 0]), hidden_labels(run))
    print(
        f"Trap, label_smoothing_factor={SMOOTHING} in the Trainer "
        f"(transformers {transformers.__version__}): accuracy in one view {accuracy:.3f}."
    )


# --- Main -----------------------------------------------------------------------------------------
def compare(run: vqa.Run, options: argparse.Namespace) -> None:
    """Train the usual recipe on the run's folds and print everything."""
    processor = transformers.AutoProcessor.from_pretrained(run.config.model_path)
    processor.tokenizer.padding_side = "left"
    folds = options.folds or run.finished_folds
    first = folds[0]
    plain = {}
    plain_speeds = {}
    for fold in folds:
        model, plain[fold], plain_speeds[fold] = plain_fold(
            run, processor, fold, options.learning_rate
        )
        if fold == first:
            first_model = model
    ours = {fold: our_logits(run, fold) for fold in folds}
    our_speeds = {first: our_speed(run, first)}
    labels = hidden_labels(run)
    rows = recipe_rows(f"plain, {options.learning_rate:g}", plain, plain_speeds, labels)
    rows |= recipe_rows(f"ours, {run.config.learning_rate:g}", ours, our_speeds, labels)
    table = pd.DataFrame.from_dict(rows, orient="index")
    name = f"{run.config.num_epochs} epochs; recipe, learning rate"
    print(vqa.markdown_table(table.rename_axis(name)), end="\n\n")
    print_differences(run, plain, ours)
    print_ratios(mean_speed(plain_speeds), mean_speed(our_speeds))
    if options.traps:
        print_padding_trap(run, processor, first_model, plain[first].test[:, 0])
        print_smoothing_trap(run, processor, first, options.learning_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6, help="of both recipes")
    parser.add_argument(
        "--learning-rate", type=float, default=2e-3, help="of the usual recipe; ours has 1e-3"
    )
    parser.add_argument("--folds", type=int, nargs="+", help="by default all")
    parser.add_argument("--rows", type=int, help="training rows and test rows; by default all")
    parser.add_argument("--traps", action="store_true", help="also make two well-known mistakes")
    parser.add_argument("--output-dir", default="outputs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fields = {"num_epochs": options.epochs, "output_dir": options.output_dir}
        if options.rows:  # nothing of a trial stays behind
            fields["data_dir"] = str(small_copy(Path(folder) / "demo", options.rows))
            fields["output_dir"] = f"{folder}/outputs"
        compare(finished_run(**fields), options)


if __name__ == "__main__":
    main()
