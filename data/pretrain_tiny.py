"""Build and pretrain the demo's base model: a Qwen3-VL of about three million parameters.

Run `python data/pretrain_tiny.py --device cuda`. The model learns from `make_demo.PRETRAIN`: another instruction, other
wordings, shades and digit rows than the demo's. Of the demo's own words it sees a few (`rare` rows), and in `told` rows
all of them beside unrelated pictures.
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

# The base learns another instruction than the pipeline's: the demo starts, as a competition does, with a model that
# has the skill but has not seen this prompt.
TEMPLATES = {
    kind: template.split(". ")[0]
    + ". 보기에서 정답을 골라 글자 하나만 답하세요.\n질문: {question}\n{choices}"
    for kind, template in PROMPT_TEMPLATES.items()
}
PATCH, MERGE, FRAMES = 16, 2, 2
MODES = {"letter": 0.696, "rare": 0.004, "spoken": 0.15, "told": 0.15}  # shares of the rows
KINDS = (*make_demo.TYPES, "location")  # twice as many rows of the type that is learned last
SIZES = ((96, 96), (128, 96), (96, 128))
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


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer, processor, model
# ---------------------------------------------------------------------------------------------------------------------
def corpus(seed: int, rows: int) -> list[str]:
    """Prompt texts of both distributions, plus the letters with and without a space."""
    rng = random.Random(seed)
    texts = []
    for domain in (make_demo.PRETRAIN, make_demo.demo_domain("train")):
        for index in range(rows):
            task = make_demo.make_task(rng, domain, make_demo.TYPES[index % len(make_demo.TYPES)])
            messages = build_messages(
                make_demo.make_row(rng, task, "a") | {"image_path": ""}, templates=TEMPLATES
            )
            texts += [
                messages[0]["content"],
                messages[1]["content"][1]["text"],
                "system\nuser\nassistant\n",
            ]
    return texts + [" a b c d A B C D"] * rows


def build_tokenizer(texts: list[str], vocab_size: int = 1200) -> Qwen2Tokenizer:
    """Train a byte-level BPE with Qwen's special tokens."""
    blank = Qwen2Tokenizer()
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet)
    )
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = model["vocab"] | {
        token: len(model["vocab"]) + i for i, token in enumerate(SPECIAL_TOKENS)
    }
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
        padding_side="left",
        model_max_length=4096,
    )


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen3VLProcessor:
    """Qwen3-VL's processor; pictures keep their size, rounded to multiples of 32."""
    pixels = {"shortest_edge": 4 * 32 * 32, "longest_edge": 768 * 32 * 32}
    shape = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": FRAMES}
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels, **shape, **normal),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**shape, **normal),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Qwen2Tokenizer, layers: int = 4) -> Qwen3VLForConditionalGeneration:
    """A small model from the configuration, with random weights."""
    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        "initializer_range": 0.05,  # the usual 0.02 is meant for wide layers and drowns the token embeddings here
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
        text_config=text,
        vision_config=VISION_CONFIG,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config)
    scale_init(model)
    return model


@torch.no_grad()
def scale_init(model: Qwen3VLForConditionalGeneration) -> None:
    """Let each token's embedding dominate its residual stream at first, else narrow layers drown it."""
    text = model.model.language_model
    model.model.visual.pos_embed.weight.mul_(4)
    text.embed_tokens.weight.mul_(4)
    text.norm.weight.fill_(0.3)  # keeps the logits of the tied head small
    for layer in text.layers:
        layer.self_attn.o_proj.weight.mul_(0.35)
        layer.mlp.down_proj.weight.mul_(0.35)


# ---------------------------------------------------------------------------------------------------------------------
# The pool: rows drawn once by all cores, then shuffled on the training device
# ---------------------------------------------------------------------------------------------------------------------
TOLD = dataclasses.replace(make_demo.PRETRAIN, new_words=dict.fromkeys(make_demo.TYPES, 0.5))
RARE = dataclasses.replace(make_demo.PRETRAIN, new_words=dict.fromkeys(make_demo.TYPES, 1.0))
CONTENTS = ["nothing", *make_demo.SHAPES, *make_demo.DIGITS]
PARTS = {
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
        labels[corner[1] * (rows - 1), corner[0] * (columns - 1), 3] = PARTS["corner"].index(corner)
    cells = make_demo.place_items(scene)
    for item, (x, y) in zip(scene.items, cells, strict=False):
        names = {"content": item.shape, "color": item.color, "fill": item.fill}
        labels[y, x, :3] = [PARTS[part].index(name) for part, name in names.items()]
    if scene.digit is not None:
        x, y = cells[-1]
        labels[y, x, 0] = CONTENTS.index(scene.digit)
    return labels


def prompt_text(processor, row: dict, mode: str, tokens: int) -> str:
    """The chat prompt of a row with its picture's placeholder repeated; `told` gives the answer away."""
    question = row["question"] + (f" {row[row['answer']]}" if mode == "told" else "")
    messages = build_messages(row | {"image_path": "", "question": question}, templates=TEMPLATES)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if mode == "spoken":
        text = text.replace("글자 하나만 답하세요", "내용으로 답하세요")
    return text.replace("<|image_pad|>", "<|image_pad|>" * tokens)


def augmented(rng: random.Random, task, domain) -> np.ndarray:
    """A picture of the task, as JPEG in half of the cases, with random brightness and contrast."""
    picture = make_demo.render(task.scene, domain)
    if rng.random() < 0.5:
        picture = Image.open(
            io.BytesIO(make_demo.jpeg_bytes(picture, rng.randint(*domain.quality)))
        )
    pixels = np.asarray(picture, dtype=np.float32)
    gain, shift = rng.uniform(0.85, 1.1), rng.uniform(-12, 12)
    return ((pixels - 128) * gain + 128 + shift).clip(0, 255).astype(np.uint8)


def draw_rows(processor, seed: str, count: int, modes: dict) -> dict[tuple, dict[str, np.ndarray]]:
    """Rows of the pretraining distribution as arrays, grouped by picture size; a function of the seed."""
    rng, groups = random.Random(seed), defaultdict(lambda: defaultdict(list))
    tokenizer = processor.tokenizer
    for number in range(count):
        kind, mode = KINDS[number % len(KINDS)], rng.choices(list(modes), modes.values())[0]
        task = make_demo.make_task(rng, make_demo.PRETRAIN, kind)
        # `told` rows have all words, beside an unrelated picture: the demo's words are known, but not what they name.
        asked = make_demo.make_task(rng, TOLD, kind) if mode == "told" else task
        if mode == "rare":
            asked = task = make_demo.make_task(rng, RARE, kind)
        row = make_demo.make_row(rng, asked, rng.choice(make_demo.LETTERS))
        labels = cell_labels(task.scene)
        ids = tokenizer(prompt_text(processor, row, mode, labels[..., 0].size))["input_ids"]
        padded = np.full(LENGTH, tokenizer.pad_token_id)
        padded[LENGTH - len(ids) :] = ids
        answer = row[row["answer"]] if mode == "spoken" else row["answer"]
        group = groups[task.scene.size]
        group["input_ids"].append(padded)
        group["mask"].append(np.arange(LENGTH) >= LENGTH - len(ids))
        group["target"].append(tokenizer(answer)["input_ids"][0])
        group["cells"].append(labels.reshape(-1, len(PARTS)))
        group["pixels"].append(augmented(rng, task, make_demo.PRETRAIN))
        group["kind"].append(make_demo.TYPES.index(kind))
    return {
        size: {name: np.stack(values) for name, values in group.items()}
        for size, group in groups.items()
    }


def draw_pool(
    processor, seed: int, count: int, modes: dict, chunk: int = 500
) -> dict[tuple, dict[str, torch.Tensor]]:
    """`count` rows drawn by all cores, as tensors grouped by picture size."""
    jobs = [(processor, f"{seed}-{number}", chunk, modes) for number in range(count // chunk)]
    with multiprocessing.get_context("fork").Pool() as workers:
        parts = workers.starmap(draw_rows, jobs)
    return {
        size: {
            name: torch.from_numpy(np.concatenate([part[size][name] for part in parts]))
            for name in parts[0][size]
        }
        for size in SIZES
    }


def take(group: dict, chosen: torch.Tensor, device: str) -> dict[str, torch.Tensor]:
    return {name: values[chosen].to(device) for name, values in group.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
def to_patches(pixels: torch.Tensor) -> torch.Tensor:
    """(batch, height, width, 3) pixels to the processor's patch rows, in the order of its merged blocks."""
    batch, height, width, _ = pixels.shape
    rows, columns = height // PATCH // MERGE, width // PATCH // MERGE
    cells = (pixels.float() / 127.5 - 1).reshape(
        batch, rows, MERGE, PATCH, columns, MERGE, PATCH, 3
    )
    patches = cells.permute(
        0, 1, 4, 2, 5, 7, 3, 6
    )  # batch, row, column, merge y, merge x, channel, y, x
    patches = patches.reshape(batch * rows * columns * MERGE * MERGE, 3, 1, PATCH, PATCH)
    return patches.expand(-1, -1, FRAMES, -1, -1).reshape(len(patches), -1)


def position_ids(mask: torch.Tensor, is_image: torch.Tensor, columns: int) -> torch.Tensor:
    """The model's (3, batch, length) multimodal positions for left-padded prompts with one picture each."""
    place = mask.long().cumsum(1) - 1  # index within the prompt; -1 in the padding
    count = int(is_image[0].sum())
    first = (place * is_image + (~is_image) * LENGTH).min(dim=1, keepdim=True).values
    text = torch.where(place < first, place, place - count + max(columns, count // columns))
    offset = place - first
    steps = (torch.zeros_like(offset), offset // columns, offset % columns)
    return torch.stack([torch.where(is_image, first + step, text) for step in steps]).clamp(min=0)


def uniform_attention(
    self, hidden_states, cu_seqlens, position_embeddings=None, **_
) -> torch.Tensor:
    """Vision attention over equally long pictures as one batch; the original runs one small kernel per picture."""
    shape = (len(cu_seqlens) - 1, -1, 3, self.num_heads, self.head_dim)
    states = self.qkv(hidden_states).reshape(-1, 3, self.num_heads, self.head_dim)
    query, key, value = states.unbind(1)
    query, key = modeling_qwen3_vl.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    batched = (
        torch.stack((query, key, value), dim=1)
        .reshape(shape)
        .permute(2, 0, 3, 1, 4)
        .to(value.dtype)
    )
    mixed = torch.nn.functional.scaled_dot_product_attention(*batched, scale=self.scaling)
    return self.proj(mixed.transpose(1, 2).reshape(len(hidden_states), -1))


def forward(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(vocabulary logits at the last prompt token, features of each cell) of rows whose pictures have one size."""
    inner, ids = model.model, batch["input_ids"]
    height, width = (side // PATCH for side in batch["pixels"].shape[1:3])
    # The pictures pass as the frames of one video: the tower treats frames and pictures alike.
    vision = inner.visual(
        to_patches(batch["pixels"]),
        grid_thw=torch.tensor([[len(ids), height, width]], device=ids.device),
    )
    embeds = inner.language_model.embed_tokens(ids)
    is_image = ids == model.config.image_token_id
    output = inner.language_model(
        inputs_embeds=embeds.masked_scatter(
            is_image[..., None], vision.pooler_output.to(embeds.dtype)
        ),
        attention_mask=batch["mask"].long(),
        position_ids=position_ids(batch["mask"], is_image, width // MERGE),
        visual_pos_masks=is_image,
        deepstack_visual_embeds=vision.deepstack_features,
        use_cache=False,
    )
    return model.lm_head(output.last_hidden_state[:, -1]).float(), vision.pooler_output.float()


def train(model, processor, pool: dict, arguments) -> None:
    """Cross-entropy over the whole vocabulary on the answer, with a one-cycle learning rate.

    With the letter as the only target training stays at chance: seeing, and matching a choice to its letter, give no
    gradient without each other. So a throw-away head also names the content of each cell from its image token, and
    `told` and `spoken` rows ask for the matching and for the seeing alone.
    """
    heads = torch.nn.Linear(
        model.config.vision_config.out_hidden_size, sum(map(len, PARTS.values()))
    ).to(arguments.device)
    parameters = [*model.parameters(), *heads.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=arguments.lr, betas=(0.9, 0.98), fused=arguments.device == "cuda"
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.lr, arguments.steps, pct_start=0.05
    )
    rng, start = np.random.default_rng(arguments.seed), time.time()
    shares = np.array([len(pool[size]["target"]) for size in SIZES], dtype=float)
    model.train()
    for step in range(arguments.steps):
        group = pool[SIZES[rng.choice(len(SIZES), p=shares / shares.sum())]]
        chosen = torch.from_numpy(rng.choice(len(group["target"]), arguments.batch, replace=False))
        batch = take(group, chosen.to(group["target"].device), arguments.device)
        with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.device == "cuda"):
            logits, cells = forward(model, batch)
        answer_loss = cross_entropy(logits, batch["target"])
        named = heads(cells).split([len(names) for names in PARTS.values()], dim=-1)
        cell_loss = sum(
            cross_entropy(part, batch["cells"][..., n].flatten()) for n, part in enumerate(named)
        )
        optimizer.zero_grad(set_to_none=True)
        (answer_loss + arguments.cell_weight * cell_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == arguments.steps - 1:
            right = (logits.argmax(-1) == batch["target"]).float()
            by_kind = [
                f"{kind} {right[batch['kind'] == n].mean():.2f}"
                for n, kind in enumerate(make_demo.TYPES)
            ]
            losses = f"answer {answer_loss:.3f} cells {cell_loss:.3f}"
            print(
                f"step {step} {losses} {' '.join(by_kind)} {time.time() - start:.0f} s", flush=True
            )
            save(model, processor, arguments.out)  # a run cut short leaves its last state


@torch.no_grad()
def evaluate(model, pool: dict, device: str) -> dict[str, float]:
    """Accuracy per question type on a pool of letter rows."""
    model.eval()
    hits = defaultdict(list)
    for group in pool.values():
        for chosen in torch.arange(len(group["target"])).split(256):
            batch = take(group, chosen, device)
            right = forward(model, batch)[0].argmax(-1) == batch["target"]
            for kind, hit in zip(batch["kind"].tolist(), right.tolist(), strict=True):
                hits[make_demo.TYPES[kind]].append(hit)
    return {kind: round(float(np.mean(values)), 4) for kind, values in sorted(hits.items())}


def save(model, processor, folder: Path) -> None:
    """Write the model as float16; the head is tied to the embeddings and not stored."""
    weights = {name: value.to("cpu", torch.float16) for name, value in model.state_dict().items()}
    del weights["lm_head.weight"]
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)


def main() -> None:
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
    arguments = parser.parse_args()
    processor = build_processor(build_tokenizer(corpus(arguments.seed, 3000)))
    if arguments.pool and arguments.pool.exists():
        pool = torch.load(arguments.pool, weights_only=True)
    else:
        pool = draw_pool(processor, arguments.seed, arguments.rows, MODES)
        if arguments.pool:
            torch.save(pool, arguments.pool)
            return
    held_out = draw_pool(processor, arguments.seed + 1, 3500, {"letter": 1})
    pool = {
        size: {name: values.to(arguments.device) for name, values in group.items()}
        for size, group in pool.items()
    }
    torch.manual_seed(arguments.seed)
    model = build_model(processor.tokenizer, arguments.layers).to(arguments.device)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} tokens",
        flush=True,
    )
    modeling_qwen3_vl.Qwen3VLVisionAttention.forward = uniform_attention
    train(model, processor, pool, arguments)
    print("accuracy", evaluate(model, held_out, arguments.device), flush=True)
    save(model, processor, arguments.out)


if __name__ == "__main__":
    main()
