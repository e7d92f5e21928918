"""The computed memory of each preset on its card, from the models' shapes: no weights, no GPU.

python tests/benchmarks/memory_plan.py

Prompts are as long as the preset allows: an image of max_pixels and 110 tokens of text; layers are not compiled. Of a
card's memory, as nvidia-smi reports it, 0.5 GiB is taken for CUDA itself and 8 % is left for fragmentation.
"""

import sys

import pandas as pd
from bench_gpu import TEXT, qwen3_4b, qwen3_8b, qwen25_3b, vqa

CONTEXT_GIB, MARGIN = 0.5, 0.92
SHAPES = {
    "Qwen/Qwen3-VL-8B-Instruct": qwen3_8b,
    "Qwen/Qwen3-VL-4B-Instruct": qwen3_4b,
    "Qwen/Qwen2.5-VL-3B-Instruct": qwen25_3b,
}
CARDS = {"RTX 8 GB": 8192, "RTX 12 GB": 12288, "T4": 15360, "L4": 23034, "V100 32 GB": 32510}
CARDS |= {"A100 40 GB": 40960, "A100 80 GB": 81920, "H200": 143771}  # MiB
ROWS = [
    ("quick_test", "T4"),
    ("single", "RTX 8 GB"),
    ("single", "T4"),
    ("colab_t4", "RTX 12 GB"),
    ("colab_t4", "T4"),
]
ROWS += [("kaggle_t4x2", "T4"), ("max_score", "T4"), ("gpu_24gb", "L4")]
ROWS += [
    ("gpu_24gb", "V100 32 GB"),
    ("colab_a100", "A100 40 GB"),
    ("colab_a100", "A100 80 GB"),
    ("colab_a100", "H200"),
]


def prompt_tokens(config: vqa.Config, shapes) -> tuple[int, int]:
    """Tokens of the longest prompt, and those of its image."""
    vision = shapes.vision_config
    area = (vision.patch_size * vision.spatial_merge_size) ** 2
    image = (config.max_pixels or 768 * area) // area
    return image + TEXT, image


def free_memory(mebibytes: float) -> float:
    """GiB of a card that training may take."""
    return MARGIN * (mebibytes / 1024 - CONTEXT_GIB)


def memory_row(preset: str, mebibytes: float) -> dict:
    """The computed GiB of the largest pass that fits, the first plan that a worker would try."""
    config = vqa.Config.preset(preset)
    shapes = SHAPES[config.model_id]({})
    layers, (tokens, image) = shapes.text_config.num_hidden_layers, prompt_tokens(config, shapes)
    precision = "bf16"  # as many bytes as fp16
    costs = vqa.memory_costs(config, shapes, tokens, precision, compiled=False)
    fixed, free = sum(costs.rows.values()) + costs.dense_weight, free_memory(mebibytes)
    step = config.batch_size * config.grad_accum_steps
    fitting = vqa.candidate_plans(
        (fixed, costs.question, costs.layer), free, layers, step, recompute=True
    )
    plan = vqa.MemoryPlan(*(fitting or [(1, 0)])[0])
    parts = costs.peak(plan)
    row = {
        "model": config.model_id.removeprefix("Qwen/").removesuffix("-Instruct"),
        "tokens": tokens,
    }
    row |= {"in a pass": plan.micro_batch, "layers kept": plan.stored_layers, **parts}
    row |= {"sum": sum(parts.values()), "loading": costs.loaded}
    return row | {"free": free, "features of 1,000 images": 1000 * image * costs.image_token}


def memory_table() -> str:
    table = pd.DataFrame([memory_row(preset, CARDS[card]) for preset, card in ROWS])
    table.index = pd.Index([f"`{preset}`, {card}" for preset, card in ROWS], name="GiB")
    numbers = table.select_dtypes("float").columns
    table[numbers] = table[numbers].map("{:.1f}".format)
    return vqa.markdown_table(table)


if __name__ == "__main__":
    sys.stdout.write(memory_table() + "\n")
