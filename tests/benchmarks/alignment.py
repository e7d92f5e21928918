"""Alignment scores: planted mismatches, and the speed of a SigLIP of real size.

    python tests/benchmarks/alignment.py            # a minute of training; any machine
    python tests/benchmarks/alignment.py --speed    # a GPU: so400m at 384 pixels, random weights
    python tests/benchmarks/alignment.py --speed --tiny    # a CPU: does everything run?

Without --speed a tiny SigLIP learns the captions (the right choice's statement) of two rounds
that data/make_demo.py draws with another seed. Then the images of ten of the demo's questions
about digits and of ten others are exchanged, and the places of these twenty rows in
`worst_aligned` are printed, of 560.

With --speed rows of the demo with images of 512 pixels are scored in a process of its own, as by
`alignment_scores`; prints images/s of the whole and of each tower alone. --tiny takes the tests'
twin; its figures mean nothing.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/benchmarks")]

import alignment_twins  # noqa: E402
from rehearsal import enlarge_demo  # noqa: E402

import vqa_helpers as vqa  # noqa: E402

SEEDS = (3000, 4000)  # of the rounds to learn from; make_demo.py takes the next two numbers, too
PLANTED = 10  # questions about digits that change their images with as many others
BATCH = 64
TEXT_TOKENS = 16  # of the twin that learns: the demo's statements are short
LARGE_TOWER = {  # so400m's
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}


# === Planted mismatches ===========================================================================
def made_rows(seed: int, folder: Path) -> pd.DataFrame:
    """All rows of a round of that seed, with their answers."""
    script = vqa.DEMO / "make_demo.py"
    subprocess.run([sys.executable, script, "--seed", str(seed), "--out", folder], check=True)
    competition = vqa.load_competition(folder)
    answers = pd.read_csv(folder / "test_answers.csv", dtype=str).set_index("id")["answer"]
    test = competition.test.assign(answer=competition.test["id"].map(answers))
    return pd.concat([competition.train, test], ignore_index=True)


def right_statement(row: dict) -> str:
    """The statement of the row's answer."""
    return vqa.alignment_statements(row)[vqa.CHOICES.index(row["answer"])]


def trained_twin(rows: pd.DataFrame, seconds: float) -> vqa.AlignmentModel:
    """A tiny SigLIP that has learned for so long which caption belongs to which image."""
    torch.manual_seed(0)
    model, processor = alignment_twins.make_twin("siglip", width=48, text_tokens=TEXT_TOKENS)
    images = [vqa.load_image(path) for path in rows["image_path"]]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    captions = [right_statement(row) for row in rows.to_dict("records")]
    tokens = processor(
        text=captions,
        padding="max_length",
        truncation=True,
        max_length=TEXT_TOKENS,
        return_tensors="pt",
    )["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    pairs = torch.arange(BATCH)
    start = time.perf_counter()
    steps = 0
    while time.perf_counter() - start < seconds:
        chosen = torch.randperm(len(rows))[:BATCH]
        logits = model(input_ids=tokens[chosen], pixel_values=pixels[chosen]).logits_per_image
        by_image = torch.nn.functional.cross_entropy(logits, pairs)
        by_text = torch.nn.functional.cross_entropy(logits.T, pairs)
        loss = (by_image + by_text) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    sys.stdout.write(f"{steps} steps of {BATCH} in {seconds:.0f} s, last loss {loss.item():.2f}\n")
    return vqa.AlignmentModel(model.eval(), processor, TEXT_TOKENS, "max_length")


def exchange_images(rows: pd.DataFrame) -> tuple[pd.DataFrame, set[str]]:
    """The rows with some images exchanged, and the ids of those rows."""
    random = np.random.default_rng(0)
    reads_digits = rows["type"] == "ocr"
    digits = random.choice(np.flatnonzero(reads_digits), PLANTED, replace=False)
    others = random.choice(np.flatnonzero(~reads_digits), PLANTED, replace=False)
    planted = rows.copy()
    for column in ("image_path", "pixel_hash"):
        planted.loc[digits, column] = rows.loc[others, column].to_numpy()
        planted.loc[others, column] = rows.loc[digits, column].to_numpy()
    return planted, set(rows["id"].iloc[[*digits, *others]])


def show_mismatches(seconds: float) -> None:
    """Train, plant, and print where the planted rows are in the table."""
    place = Path(tempfile.mkdtemp())
    rounds = [made_rows(seed, place / str(seed)) for seed in SEEDS]
    aligner = trained_twin(pd.concat(rounds, ignore_index=True), seconds)
    rows = vqa.load_competition(vqa.DEMO).train
    scores = np.array(vqa.align_rows_with_images(aligner, rows), dtype=float)
    accuracy = (scores.argmax(axis=1) == rows["label"]).mean()
    planted, ids = exchange_images(rows)
    scores = np.array(vqa.align_rows_with_images(aligner, planted), dtype=float)
    table = vqa.worst_aligned(planted, scores)
    places = (np.flatnonzero(table["id"].isin(ids)) + 1).tolist()
    first = sum(number <= len(ids) for number in places)
    sys.stdout.write(
        f"answers by alignment alone: {accuracy:.3f}\n"
        f"places of the {len(ids)} planted rows among {len(rows)}: {places}\n"
        f"planted among the first {len(ids)}: {first}\n"
    )


# === Speed ========================================================================================
def build_large(folder: Path) -> Path:
    """so400m's shapes at 384 pixels with random weights, in a folder that loads."""
    tokenizer = alignment_twins.plain_tokenizer(alignment_twins.demo_statements())
    config = transformers.SiglipConfig(
        text_config={**LARGE_TOWER, "vocab_size": 256_000},
        vision_config={**LARGE_TOWER, "image_size": 384, "patch_size": 14},
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModel.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    images = transformers.SiglipImageProcessor(size={"height": 384, "width": 384})
    transformers.SiglipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def kept_times(folder: Path) -> list[float]:
    """When each batch of a folder was kept, in seconds."""
    return [record["time"] for record in vqa.read_json_lines(folder / "scores.jsonl")]


def time_tower(work, items: list) -> float:
    """Items a second of a tower, batch by batch, after one batch."""
    work(items[:BATCH])
    start = time.perf_counter()
    for begin in range(0, len(items), BATCH):
        features = work(items[begin : begin + BATCH])
    features.cpu()  # waits for all that is under way
    return len(items) / (time.perf_counter() - start)


def show_speed(tiny: bool, rows: int) -> None:
    """Score rows in a process and print the speed; then that of each tower."""
    place = Path(tempfile.mkdtemp())
    if tiny:
        rows = 150
        model = alignment_twins.store_twin("siglip", place / "model")
    else:
        model = build_large(place / "model")
    data = enlarge_demo(place / "data", rows, 96 if tiny else 512, test_rows=4)
    config = vqa.Config.preset(
        "demo",
        alignment_model=str(model),
        data_dir=str(data),
        output_dir=str(place / "outputs"),
        max_fallback_share=0.5,
        infer_batch_size=BATCH,
    )
    frame = vqa.load_competition(data, 0.5).train
    images = frame["pixel_hash"].nunique()
    start = time.perf_counter()
    vqa.alignment_scores(frame, config, str(model))
    seconds = time.perf_counter() - start
    times = kept_times(vqa.alignment_folder(config))
    # Not of the first batch, which warms up; batches hold as many images each.
    speed = (images - BATCH) / (times[-1] - times[0])
    sys.stdout.write(
        f"\n{images} images, {4 * len(frame)} texts: {seconds:.1f} s with loading; "
        f"{speed:.1f} images/s with 4 texts each\n"
    )
    settings = vqa.Config.preset("demo", model_id=str(model), quantization="none")
    aligner = vqa.open_alignment_model(settings)
    paths = frame.drop_duplicates("pixel_hash")["image_path"].tolist()
    statements = []
    for row in frame.to_dict("records"):
        statements += vqa.alignment_statements(row)
    with torch.inference_mode():
        decoded = time_tower(lambda batch: torch.zeros(len([*map(vqa.load_image, batch)])), paths)
        towers = {
            "decoding alone, one thread": decoded,
            "images with decoding": time_tower(aligner.image_features, paths),
            "texts": time_tower(aligner.text_features, statements),
        }
    for name, speed in towers.items():
        sys.stdout.write(f"{name}: {speed:.1f} a second\n")
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
        sys.stdout.write(f"{torch.cuda.get_device_name(0)}: peak {peak:.2f} GiB\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of training the twin")
    parser.add_argument("--speed", action="store_true", help="time a model of real size")
    parser.add_argument("--rows", type=int, default=512, help="to score with --speed")
    parser.add_argument("--tiny", action="store_true", help="with --speed: the tests' twin")
    options = parser.parse_args()
    if options.speed:
        show_speed(options.tiny, options.rows)
    else:
        show_mismatches(options.seconds)


if __name__ == "__main__":
    main()
