"""Build and pretrain the demo's base model: a Qwen3-VL of about three million parameters.

    python data/pretrain_tiny.py --device cuda

Prints the losses and the accuracy of each question type every 250 steps, and at the end the
accuracy on held-out rows. It is made for a GPU; all CPU cores draw the rows beforehand. The model
is saved in data/tiny_qwen3_vl; doing it again gives a model like it, not the same bytes.

The model learns from `make_demo.PRETRAIN`: another instruction, other wordings, shades and digit
rows than the demo's. Of the demo's own words it sees a few (`rare` rows), and in `told` rows all
of them beside unrelated pictures.
"""

import argparse
import dataclasses
import io
import json
import multiprocessing
import random
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

import make_demo

sys.path.insert(0, str(make_demo.DATA.parent))
from vqa_helpers import PROMPT_TEMPLATES, build_messages

# What the base learns instead of the pipeline's own instruction: the demo starts, as a
# competition does, with a model that has the skill but has not seen this prompt.
INSTRUCTION = "보기에서 정답을 골라 글자 하나만 답하세요."
TEMPLATES = {
    kind: f"{template.split('. ')[0]}. {INSTRUCTION}\n질문: {{question}}\n{{choices}}"
    for kind, template in PROMPT_TEMPLATES.items()
}
PATCH = 16  # side of a patch, in pixels
MERGE = 2  # patches a side that become one image token
FRAMES = 2  # frames that a patch spans; a picture is repeated
# Shares of the rows, by what is asked. `letter`: as in the demo. `rare`: the same with the demo's
# own words. `spoken`: for the choice's text. `told`: the question gives the answer away.
MODES = {"letter": 0.696, "rare": 0.004, "spoken": 0.15, "told": 0.15}
KINDS = (*make_demo.TYPES, "location")  # twice as many rows of the type that is learned last
SIZES = ((96, 96), (128, 96), (96, 128))  # width and height of the pictures
LENGTH = 128  # tokens; longer than any prompt of the pool
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
VISION_CONFIG = {
    "depth": 3,
    "hidden_size": 128,
    "initializer_range": 0.05,
    "intermediate_size": 384,
    "num_heads": 4,
    "out_hidden_size": 192,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [1],
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": FRAMES,
}
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' or 'video' in part %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

Group = dict[str, torch.Tensor]  # the arrays of rows whose pictures have one size
Pool = dict[tuple, Group]  # by size (width, height)


# === Tokenizer, processor, model ==================================================================
def corpus(seed: int, rows: int) -> list[str]:
    """Prompt texts of both distributions, plus the letters with and without a space."""
    rng = random.Random(seed)
    texts = []
    for domain in (make_demo.PRETRAIN, make_demo.demo_domain("train")):
        for number in range(rows):
            kind = make_demo.TYPES[number % len(make_demo.TYPES)]
            task = make_demo.make_task(rng, domain, kind)
            row = make_demo.make_row(rng, task, "a")
            row["image_path"] = ""
            system, user = build_messages(row, templates=TEMPLATES)
            texts.append(system["content"])
            texts.append(user["content"][1]["text"])
            texts.append("system\nuser\nassistant\n")
    return texts + [" a b c d A B C D"] * rows


def build_tokenizer(texts: Sequence[str], vocab_size: int = 1200) -> Qwen2Tokenizer:
    """Train a byte-level BPE with Qwen's special tokens."""
    blank = Qwen2Tokenizer()
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    trained = json.loads(bpe.to_str())["model"]
    vocab = dict(trained["vocab"])
    for number, token in enumerate(SPECIAL_TOKENS, start=len(vocab)):
        vocab[token] = number
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(merge) for merge in trained["merges"]],
        eos_token="<|im_end|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
        padding_side="left",
        model_max_length=4096,
    )


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen3VLProcessor:
    """Qwen3-VL's processor; pictures keep their size, rounded to multiples of 32."""
    pixels = {"shortest_edge": 4 * 32 * 32, "longest_edge": 768 * 32 * 32}
    settings = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels, **settings),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**settings),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Qwen2Tokenizer, layers: int = 4) -> Qwen3VLForConditionalGeneration:
    """A small model from the configuration, with random weights."""
    token_id = tokenizer.convert_tokens_to_ids
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        # The usual 0.02 is meant for wide layers, and drowns the token embeddings here.
        "initializer_range": 0.05,
        "intermediate_size": 448,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [8, 8, 8],
        },
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = Qwen3VLConfig(
        text_config=text_config,
        vision_config=VISION_CONFIG,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config)
    scale_init(model)
    return model


@torch.no_grad()
def scale_init(model: Qwen3VLForConditionalGeneration) -> None:
    """Let each token's embedding dominate its residual stream at first.

    Narrow layers drown it otherwise.
    """
    text = model.model.language_model
    model.model.visual.pos_embed.weight.mul_(4)
    text.embed_tokens.weight.mul_(4)
    text.norm.weight.fill_(0.3)  # keeps the logits of the tied head small
    for layer in text.layers:
        layer.self_attn.o_proj.weight.mul_(0.35)
        layer.mlp.down_proj.weight.mul_(0.35)


# === The pool: rows drawn once by all cores, then shuffled on the training device =================
# As PRETRAIN, with the demo's own words in half of the rows, or in all.
TOLD = dataclasses.replace(make_demo.PRETRAIN, new_words=dict.fromkeys(make_demo.TYPES, 0.5))
RARE = dataclasses.replace(make_demo.PRETRAIN, new_words=dict.fromkeys(make_demo.TYPES, 1.0))
CONTENTS = ["nothing", *make_demo.SHAPES, *make_demo.DIGITS]
PARTS = {  # what is named of each cell, and its classes
    "content": CONTENTS,
    "color": [None, *make_demo.COLORS],
    "fill": [None, *make_demo.FILLS],
    "corner": [None, *make_demo.ZONES],
}


def cell_labels(scene: make_demo.Scene) -> np.ndarray:
    """(rows, columns, parts) class numbers of what each cell shows, and which corner it is."""
    columns, rows = (side // make_demo.CELL for side in scene.size)
    labels = np.zeros((rows, columns, len(PARTS)), dtype=np.int64)
    for corner in make_demo.ZONES:
        right, bottom = corner
        labels[bottom * (rows - 1), right * (columns - 1), 3] = PARTS["corner"].index(corner)
    cells = make_demo.place_items(scene)
    for item, (column, row) in zip(scene.items, cells, strict=False):  # the digit's comes last
        labels[row, column, 0] = CONTENTS.index(item.shape)
        labels[row, column, 1] = PARTS["color"].index(item.color)
        labels[row, column, 2] = PARTS["fill"].index(item.fill)
    if scene.digit is not None:
        column, row = cells[-1]
        labels[row, column, 0] = CONTENTS.index(scene.digit)
    return labels


def prompt_text(processor, row: Mapping, mode: str, image_tokens: int) -> str:
    """The chat prompt of a row with its picture's placeholder repeated; `told` gives the answer."""
    question = row["question"]
    if mode == "told":
        question = f"{question} {row[row['answer']]}"
    asked = {**row, "image_path": "", "question": question}
    messages = build_messages(asked, templates=TEMPLATES)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if mode == "spoken":
        text = text.replace("글자 하나만 답하세요", "내용으로 답하세요")
    return text.replace("<|image_pad|>", "<|image_pad|>" * image_tokens)


def augmented(rng: random.Random, task: make_demo.Task, domain: make_demo.Domain) -> np.ndarray:
    """A picture of the task, as JPEG in half of the cases, with random brightness and contrast."""
    picture = make_demo.render(task.scene, domain)
    if rng.random() < 0.5:
        jpeg = make_demo.jpeg_bytes(picture, rng.randint(*domain.quality))
        picture = Image.open(io.BytesIO(jpeg))
    pixels = np.asarray(picture, dtype=np.float32)
    contrast = rng.uniform(0.85, 1.1)
    brightness = rng.uniform(-12, 12)
    changed = (pixels - 128) * contrast + 128 + brightness
    return changed.clip(0, 255).astype(np.uint8)


def draw_row(
    rng: random.Random, processor: Qwen3VLProcessor, kind: str, modes: Mapping[str, float]
) -> tuple[tuple[int, int], dict]:
    """(size of the picture, arrays by name) of one row of the pretraining distribution.

    input_ids and mask (LENGTH,), target (the token of the answer), cells (cells, parts) as in
    `cell_labels`, pixels (height, width, 3), kind (number of the question's type).
    """
    mode = rng.choices(list(modes), modes.values())[0]
    task = make_demo.make_task(rng, make_demo.PRETRAIN, kind)
    asked = task
    if mode == "told":
        # These rows have all words, beside an unrelated picture: the demo's words are known, but
        # not what they name.
        asked = make_demo.make_task(rng, TOLD, kind)
    if mode == "rare":
        task = make_demo.make_task(rng, RARE, kind)
        asked = task
    row = make_demo.make_row(rng, asked, rng.choice(make_demo.LETTERS))
    labels = cell_labels(task.scene)
    image_tokens = labels[..., 0].size
    tokenizer = processor.tokenizer
    ids = tokenizer(prompt_text(processor, row, mode, image_tokens))["input_ids"]
    padding = LENGTH - len(ids)
    padded = np.full(LENGTH, tokenizer.pad_token_id)
    padded[padding:] = ids
    answer = row[row["answer"]] if mode == "spoken" else row["answer"]
    return task.scene.size, {
        "input_ids": padded,
        "mask": np.arange(LENGTH) >= padding,
        "target": tokenizer(answer)["input_ids"][0],
        "cells": labels.reshape(-1, len(PARTS)),
        "pixels": augmented(rng, task, make_demo.PRETRAIN),
        "kind": make_demo.TYPES.index(kind),
    }


def draw_rows(
    processor: Qwen3VLProcessor, seed: str, count: int, modes: Mapping[str, float]
) -> dict[tuple, dict[str, np.ndarray]]:
    """Rows as `draw_row` makes them, stacked, by picture size; a function of the seed."""
    rng = random.Random(seed)
    groups = defaultdict(lambda: defaultdict(list))
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        size, row = draw_row(rng, processor, kind, modes)
        for name, value in row.items():
            groups[size][name].append(value)
    stacked = {}
    for size, group in groups.items():
        stacked[size] = {name: np.stack(values) for name, values in group.items()}
    return stacked


def draw_pool(
    processor: Qwen3VLProcessor,
    seed: int,
    count: int,
    modes: Mapping[str, float],
    chunk: int = 500,
) -> Pool:
    """`count` rows drawn by all cores, `chunk` at a time, as tensors grouped by picture size."""
    jobs = [(processor, f"{seed}-{number}", chunk, modes) for number in range(count // chunk)]
    with multiprocessing.get_context("fork").Pool() as workers:
        chunks = workers.starmap(draw_rows, jobs)
    pool = {}
    for size in SIZES:
        pool[size] = {}
        for name in chunks[0][size]:
            arrays = [groups[size][name] for groups in chunks]
            pool[size][name] = torch.from_numpy(np.concatenate(arrays))
    return pool


def take(group: Group, chosen: torch.Tensor, device: str) -> Group:
    """The chosen rows of a group, on the device."""
    return {name: values[chosen].to(device) for name, values in group.items()}


# === The model's forward pass =====================================================================
def to_patches(pixels: torch.Tensor) -> torch.Tensor:
    """(batch, height, width, 3) pixels to the processor's patch rows, block by merged block."""
    batch, height, width, _ = pixels.shape
    rows = height // PATCH // MERGE
    columns = width // PATCH // MERGE
    scaled = pixels.float() / 127.5 - 1
    cells = scaled.reshape(batch, rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    # To batch, row, column, merge y, merge x, channel, y, x.
    patches = cells.permute(0, 1, 4, 2, 5, 7, 3, 6)
    patches = patches.reshape(batch * rows * columns * MERGE * MERGE, 3, 1, PATCH, PATCH)
    return patches.expand(-1, -1, FRAMES, -1, -1).reshape(len(patches), -1)


def position_ids(mask: torch.Tensor, is_image: torch.Tensor, columns: int) -> torch.Tensor:
    """The model's (3, batch, length) multimodal positions for left-padded prompts of one picture.

    mask, is_image: (batch, length), whether a token is none of the padding, and one of the picture;
    columns: image tokens a row of the picture.
    """
    place = mask.long().cumsum(1) - 1  # index within the prompt; -1 in the padding
    image_tokens = int(is_image[0].sum())
    first = (place * is_image + (~is_image) * LENGTH).min(dim=1, keepdim=True).values
    # Text behind the picture goes on after the longer of its sides.
    after = place - image_tokens + max(columns, image_tokens // columns)
    text = torch.where(place < first, place, after)
    offset = place - first
    positions = []
    for step in (torch.zeros_like(offset), offset // columns, offset % columns):
        positions.append(torch.where(is_image, first + step, text))
    return torch.stack(positions).clamp(min=0)


def uniform_attention(
    self, hidden_states, cu_seqlens, position_embeddings=None, **_
) -> torch.Tensor:
    """Vision attention over equally long pictures as one batch.

    The original, whose place this method takes, runs one small kernel a picture.
    """
    pictures = len(cu_seqlens) - 1
    states = self.qkv(hidden_states).reshape(-1, 3, self.num_heads, self.head_dim)
    query, key, value = states.unbind(1)
    query, key = modeling_qwen3_vl.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    batched = torch.stack((query, key, value), dim=1)
    batched = batched.reshape(pictures, -1, 3, self.num_heads, self.head_dim)
    # To which of the three, picture, head, patch, value.
    batched = batched.permute(2, 0, 3, 1, 4).to(value.dtype)
    mixed = torch.nn.functional.scaled_dot_product_attention(*batched, scale=self.scaling)
    return self.proj(mixed.transpose(1, 2).reshape(len(hidden_states), -1))


def forward(
    model: Qwen3VLForConditionalGeneration, batch: Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """(vocabulary logits at the last prompt token, features of each cell) of rows of one size."""
    inner = model.model
    ids = batch["input_ids"]
    height, width = (side // PATCH for side in batch["pixels"].shape[1:3])
    # The pictures pass as the frames of one video: the tower treats frames and pictures alike.
    grid = torch.tensor([[len(ids), height, width]], device=ids.device)
    vision = inner.visual(to_patches(batch["pixels"]), grid_thw=grid)
    embeddings = inner.language_model.embed_tokens(ids)
    is_image = ids == model.config.image_token_id
    features = vision.pooler_output.to(embeddings.dtype)
    output = inner.language_model(
        inputs_embeds=embeddings.masked_scatter(is_image[..., None], features),
        attention_mask=batch["mask"].long(),
        position_ids=position_ids(batch["mask"], is_image, width // MERGE),
        visual_pos_masks=is_image,
        deepstack_visual_embeds=vision.deepstack_features,
        use_cache=False,
    )
    logits = model.lm_head(output.last_hidden_state[:, -1])
    return logits.float(), vision.pooler_output.float()


# === Training =====================================================================================
def make_cell_head(model: Qwen3VLForConditionalGeneration) -> torch.nn.Linear:
    """A layer from an image token's features to the classes of all PARTS, side by side."""
    classes = sum(len(names) for names in PARTS.values())
    return torch.nn.Linear(model.config.vision_config.out_hidden_size, classes)


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], arguments: argparse.Namespace
) -> torch.optim.AdamW:
    """AdamW that decays matrices, and neither biases nor norms."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    is_on_gpu = arguments.device == "cuda"
    return torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.98), fused=is_on_gpu)


def draw_batch(rng: np.random.Generator, pool: Pool, arguments: argparse.Namespace) -> Group:
    """Random rows of one picture size, which is drawn by its share of the pool."""
    rows = np.array([len(pool[size]["target"]) for size in SIZES], dtype=float)
    size = SIZES[rng.choice(len(SIZES), p=rows / rows.sum())]
    group = pool[size]
    chosen = rng.choice(len(group["target"]), arguments.batch, replace=False)
    chosen = torch.from_numpy(chosen).to(group["target"].device)
    return take(group, chosen, arguments.device)


def cell_loss(cell_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of what each cell shows, summed over the parts.

    cell_logits: (cells of all rows, classes of all parts); labels: (rows, cells, parts).
    """
    by_part = cell_logits.split([len(names) for names in PARTS.values()], dim=-1)
    losses = []
    for number, part_logits in enumerate(by_part):
        losses.append(cross_entropy(part_logits, labels[..., number].flatten()))
    return sum(losses)


def print_step(
    step: int,
    logits: torch.Tensor,
    batch: Group,
    answer_loss: torch.Tensor,
    named_loss: torch.Tensor,
    seconds: float,
) -> None:
    """Print the losses of a step and its accuracy by question type."""
    is_right = (logits.argmax(-1) == batch["target"]).float()
    accuracies = []
    for number, kind in enumerate(make_demo.TYPES):
        accuracy = is_right[batch["kind"] == number].mean()
        accuracies.append(f"{kind} {accuracy:.2f}")
    losses = f"answer {answer_loss:.3f} cells {named_loss:.3f}"
    print(f"step {step} {losses} {' '.join(accuracies)} {seconds:.0f} s", flush=True)


def train(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    pool: Pool,
    arguments: argparse.Namespace,
) -> None:
    """Cross-entropy over the whole vocabulary on the answer, with a one-cycle learning rate.

    With the letter as the only target training stays at chance: seeing, and matching a choice to
    its letter, give no gradient without each other. So a throw-away head also names the content of
    each cell from its image token, and `told` and `spoken` rows ask for the matching and for the
    seeing alone.
    """
    is_on_gpu = arguments.device == "cuda"
    cell_head = make_cell_head(model).to(arguments.device)
    parameters = [*model.parameters(), *cell_head.parameters()]
    optimizer = make_optimizer(parameters, arguments)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.lr, arguments.steps, pct_start=0.05
    )
    rng = np.random.default_rng(arguments.seed)
    start = time.time()
    model.train()
    for step in range(arguments.steps):
        batch = draw_batch(rng, pool, arguments)
        with torch.autocast(arguments.device, torch.bfloat16, enabled=is_on_gpu):
            logits, cells = forward(model, batch)
        answer_loss = cross_entropy(logits, batch["target"])
        named_loss = cell_loss(cell_head(cells), batch["cells"])
        optimizer.zero_grad(set_to_none=True)
        (answer_loss + arguments.cell_weight * named_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == arguments.steps - 1:
            print_step(step, logits, batch, answer_loss, named_loss, time.time() - start)
            save(model, processor, arguments.out)  # a run cut short leaves its last state


@torch.no_grad()
def evaluate(model: Qwen3VLForConditionalGeneration, pool: Pool, device: str) -> dict[str, float]:
    """Accuracy per question type on a pool of letter rows."""
    model.eval()
    hits = defaultdict(list)
    for group in pool.values():
        for chosen in torch.arange(len(group["target"])).split(256):
            batch = take(group, chosen, device)
            logits, _ = forward(model, batch)
            is_right = logits.argmax(-1) == batch["target"]
            for kind, hit in zip(batch["kind"].tolist(), is_right.tolist(), strict=True):
                hits[make_demo.TYPES[kind]].append(hit)
    return {kind: round(float(np.mean(values)), 4) for kind, values in sorted(hits.items())}


def save(model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, folder: Path) -> None:
    """Write the model as float16; the head is tied to the embeddings and not stored."""
    weights = {name: value.to("cpu", torch.float16) for name, value in model.state_dict().items()}
    del weights["lm_head.weight"]
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)


# === Command line =================================================================================
def parse_arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=280_000, help="rows of the pool")
    parser.add_argument("--steps", type=int, default=8500)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument(
        "--cell-weight", type=float, default=0.5, help="weight of the throw-away cell loss"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--pool", type=Path, help="keep the pool in this file and reuse it")
    parser.add_argument("--out", type=Path, default=make_demo.DATA / "tiny_qwen3_vl")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    processor = build_processor(build_tokenizer(corpus(arguments.seed, 3000)))
    if arguments.pool and arguments.pool.exists():
        pool = torch.load(arguments.pool, weights_only=True)
    else:
        pool = draw_pool(processor, arguments.seed, arguments.rows, MODES)
        if arguments.pool:
            torch.save(pool, arguments.pool)
            return  # the next call, perhaps on another machine, trains on it
    held_out = draw_pool(processor, arguments.seed + 1, 3500, {"letter": 1})
    for group in pool.values():
        for name, values in group.items():
            group[name] = values.to(arguments.device)
    torch.manual_seed(arguments.seed)
    model = build_model(processor.tokenizer, arguments.layers).to(arguments.device)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters, {len(processor.tokenizer)} tokens", flush=True)
    modeling_qwen3_vl.Qwen3VLVisionAttention.forward = uniform_attention
    train(model, processor, pool, arguments)
    print("accuracy", evaluate(model, held_out, arguments.device), flush=True)
    save(model, processor, arguments.out)


if __name__ == "__main__":
    main()
