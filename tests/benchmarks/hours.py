"""Memory, speed and hours of the models on their cards, for a competition of 4,000 rows.

    python tests/benchmarks/hours.py    # no weights, no GPU; some seconds

Prints the README's table. Memory is computed from shapes, as in memory_plan.py: the longest
prompts that the preset allows. Hours count matrix products of the whole job (zero-shot, training,
validation, held-out and test rows in all views; photos of 720 x 540 pixels, 110 tokens of text) at
a rate that is assumed of each card. A model that was measured slower than the 8B, for its products
on the same card, is slower here by as much.
"""

import sys
from dataclasses import dataclass

import pandas as pd
import torch
import transformers
from memory_plan import SHAPES, Row, memory_row
from rehearsal import A100, T4, RealCompetition, tower_flops, vqa

COMPETITION = RealCompetition(rows=4000)
TFLOPS = {"T4": T4.tflops, "A100 80 GB": A100.tflops}  # of matrix products, assumed
ROWS = [
    Row("kaggle_t4x2", "T4"),
    Row("kaggle_t4x2", "T4", model_id="Qwen/Qwen3.5-9B"),
    Row("kaggle_t4x2", "T4", model_id="OpenGVLab/InternVL3_5-8B-HF"),
    Row("large", "T4", gpus=2),
    Row("colab_a100", "A100 80 GB"),
    Row("gpu_80gb", "A100 80 GB", with_fla=True),
]
WORKERS = {"kaggle_t4x2": 2}  # cards that train folds side by side
# Matrix products per second beside Qwen3-VL-8B's on the same card, of new_models.py, 350 tokens:
# 4-bit told to be a T4 (416 TFLOP/s by InternVL3.5-8B, whose language model is as large): the 9B
# 12.8 questions/s, 16 a pass, the 35B-A3B 5.0 with the memory of two. The 27B in 16 bits below
# 78 GiB, without flash-linear-attention, 5.5 where the 8B makes 434 TFLOP/s.
RELATIVE_SPEEDS = {
    "Qwen/Qwen3-VL-8B-Instruct": 1.0,
    "OpenGVLab/InternVL3_5-8B-HF": 1.0,
    "Qwen/Qwen3.5-9B": 0.44,
    "Qwen/Qwen3.5-27B": 0.61,
    "Qwen/Qwen3.5-35B-A3B": 0.06,
}


@dataclass(frozen=True)
class Work:
    """FLOP of one question: the vision tower's and the language model's."""

    image: float
    forward: float  # in one choice order
    rotated: float  # in four, behind one prefix
    backward: float


def active_weights(shapes) -> float:
    """Parameters of the language model that a token meets: of a mixture the chosen experts."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(shapes)
    text = shapes.text_config
    count = 0
    for name, parameter in model.model.language_model.layers.named_parameters():
        if ".experts." in name:
            count += parameter.numel() * text.num_experts_per_tok / text.num_experts
        else:
            count += parameter.numel()
    return count


def attention_width(text) -> int:
    """Numbers of all heads of all layers that have attention."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return kinds.count("full_attention") * head_dim * text.num_attention_heads


def image_work(shapes) -> tuple[int, float]:
    """(tokens, FLOP) of a photo of the competition."""
    vision = shapes.vision_config
    if shapes.model_type != "internvl":
        side = 2 * vision.patch_size
        tokens = round(COMPETITION.height / side) * round(COMPETITION.width / side)
        return tokens, tower_flops(vision, COMPETITION)
    tiles = 3  # two and the thumbnail, within the default budget
    patches = (vision.image_size[0] // vision.patch_size[0]) ** 2
    weights = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    products = 2 * weights + 4 * patches * vision.hidden_size
    flops = tiles * vision.num_hidden_layers * patches * products
    return tiles * shapes.image_seq_length, flops


def question_work(shapes, stored_layers: int) -> Work:
    """FLOP of one question; layers beyond the last `stored_layers` are computed again."""
    weights = active_weights(shapes)
    width = attention_width(shapes.text_config)
    image_tokens, image = image_work(shapes)
    one = image_tokens + COMPETITION.text
    four = one + 3 * COMPETITION.suffix
    forward = one * (2 * weights + 2 * one * width)
    recomputed = forward * (1 - stored_layers / shapes.text_config.num_hidden_layers)
    return Work(
        image=image,
        forward=forward,
        rotated=four * (2 * weights + 2 * four * width),
        backward=one * (2 * weights + 4 * one * width) + recomputed,
    )


def job_flops(config: vqa.Config, work: Work) -> float:
    """FLOP of the whole job of a preset."""
    rows = COMPETITION.rows
    folds = config.n_folds if config.train_folds is None else len(config.train_folds)
    held_out = rows * folds / config.n_folds
    trained = rows * folds * (1 - 1 / config.n_folds) * config.num_epochs
    # Of the raw weights that are kept nothing is scored again: their epoch has.
    in_one_order = config.zeroshot_rows + held_out * (config.num_epochs + config.use_ema)
    in_all_views = rows * folds
    if not vqa.has_one_view(config):  # in which validation has scored the held-out rows
        in_all_views += held_out
    all_views = work.rotated if config.use_tta else work.forward
    return (
        trained * (work.image + work.forward + work.backward)
        + in_one_order * (work.image + work.forward)
        + in_all_views * (work.image + all_views)
    )


def hours_row(row: Row) -> dict:
    """One line of the table."""
    config = row.config
    shapes = SHAPES[config.model_id]({})
    memory = memory_row(row)
    work = question_work(shapes, memory["layers kept"])
    cards = WORKERS.get(row.preset, 1)
    training = work.image + work.forward + work.backward
    speed = cards * 1e12 * TFLOPS[row.card] * RELATIVE_SPEEDS[config.model_id]
    return {
        "model": memory["model"],
        "cards": f"{max(cards, row.gpus)} × {row.card}",
        "GiB, of": f"{memory['sum']:.0f}, {memory['free']:.0f}",
        "in a pass": memory["in a pass"],
        "questions/s": f"{speed / training:.1f}",
        "hours": f"{job_flops(config, work) / speed / 3600:.1f}",
    }


def hours_table() -> str:
    """All rows as Markdown, as the README has them."""
    rows = []
    for row in ROWS:
        if SHAPES[row.config.model_id]({}).model_type in vqa.FAMILIES:
            rows.append(hours_row(row))
    return vqa.markdown_table(pd.DataFrame(rows).set_index("model"))


if __name__ == "__main__":
    sys.stdout.write(hours_table() + "\n")
