"""The computed memory of each preset on its card, from the models' shapes.

    python tests/benchmarks/memory_plan.py    # no weights, no GPU; some seconds

Prints one table in GiB. Prompts are as long as the preset allows: an image of max_pixels and 110
tokens of text; layers are not compiled. Of a card's memory, as nvidia-smi reports it, 0.5 GiB is
taken for CUDA itself and 8 % is left for fragmentation.
"""

import sys

import pandas as pd
from bench_gpu import TEXT, qwen3_4b, qwen3_8b, qwen25_3b, vqa

CONTEXT_GIB = 0.5  # taken for CUDA itself
MARGIN = 0.92  # share of the rest that training may take
SHAPES = {
    "Qwen/Qwen3-VL-8B-Instruct": qwen3_8b,
    "Qwen/Qwen3-VL-4B-Instruct": qwen3_4b,
    "Qwen/Qwen2.5-VL-3B-Instruct": qwen25_3b,
}
CARDS = {  # MiB
    "RTX 8 GB": 8192,
    "RTX 12 GB": 12288,
    "T4": 15360,
    "L4": 23034,
    "V100 32 GB": 32510,
    "A100 40 GB": 40960,
    "A100 80 GB": 81920,
    "H200": 143771,
}
ROWS = [  # preset, card
    ("quick_test", "T4"),
    ("single", "RTX 8 GB"),
    ("single", "T4"),
    ("colab_t4", "RTX 12 GB"),
    ("colab_t4", "T4"),
    ("kaggle_t4x2", "T4"),
    ("max_score", "T4"),
    ("gpu_24gb", "L4"),
    ("gpu_24gb", "V100 32 GB"),
    ("colab_a100", "A100 40 GB"),
    ("colab_a100", "A100 80 GB"),
    ("colab_a100", "H200"),
]


def image_tokens(config: vqa.Config, shapes) -> int:
    """Tokens of the largest image that the preset allows; `shapes` is the model's config."""
    vision = shapes.vision_config
    pixels_per_token = (vision.patch_size * vision.spatial_merge_size) ** 2
    return (config.max_pixels or 768 * pixels_per_token) // pixels_per_token


def free_memory(mebibytes: float) -> float:
    """GiB of a card that training may take."""
    return MARGIN * (mebibytes / 1024 - CONTEXT_GIB)


def first_plan(
    config: vqa.Config, costs: vqa.MemoryCosts, free: float, layers: int
) -> vqa.MemoryPlan:
    """The largest pass that fits into `free` GiB, which a worker would try first."""
    pass_costs = vqa.PassCosts(
        fixed=sum(costs.rows.values()) + costs.largest_weight,
        question=costs.question,
        stored_layer=costs.layer,
    )
    step = config.batch_size * config.grad_accum_steps
    plans = vqa.candidate_plans(pass_costs, free, layers, step, recompute=True)
    micro_batch, stored_layers = plans[0] if plans else (1, 0)
    return vqa.MemoryPlan(micro_batch, stored_layers)


def memory_row(preset: str, mebibytes: float) -> dict:
    """The computed GiB of a preset on a card of that memory, with the first plan."""
    config = vqa.Config.preset(preset)
    shapes = SHAPES[config.model_id]({})
    image = image_tokens(config, shapes)
    tokens = image + TEXT
    precision = "bf16"  # as many bytes as fp16
    costs = vqa.memory_costs(config, shapes, tokens, precision, compiled=False)
    free = free_memory(mebibytes)
    plan = first_plan(config, costs, free, shapes.text_config.num_hidden_layers)
    peak = costs.peak(plan)
    return {
        "model": config.model_id.removeprefix("Qwen/").removesuffix("-Instruct"),
        "tokens": tokens,
        "in a pass": plan.micro_batch,
        "layers kept": plan.stored_layers,
        **peak,
        "sum": sum(peak.values()),
        "loading": costs.loaded,
        "free": free,
        "features of 1,000 images": 1000 * image * costs.image_token,
    }


def memory_table() -> str:
    """The rows of all presets as Markdown, as the README has it."""
    rows = {}
    for preset, card in ROWS:
        rows[f"`{preset}`, {card}"] = memory_row(preset, CARDS[card])
    table = pd.DataFrame(list(rows.values()), index=pd.Index(rows, name="GiB"))
    numbers = table.select_dtypes("float").columns
    table[numbers] = table[numbers].map("{:.1f}".format)
    return vqa.markdown_table(table)


if __name__ == "__main__":
    sys.stdout.write(memory_table() + "\n")
