"""The computed memory of each preset on its card, from the models' shapes.

    python tests/benchmarks/memory_plan.py    # no weights, no GPU; some seconds

Prints one table in GiB. Prompts are as long as the preset allows: an image of max_pixels and 110
tokens of text; layers are not compiled. Of a card's memory, as nvidia-smi reports it, 0.5 GiB is
taken for CUDA itself and 8 % is left for fragmentation.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from bench_gpu import TEXT, qwen3_4b, qwen3_8b, qwen25_3b, vqa
from new_models import internvl35_8b, qwen35_9b, qwen35_27b, qwen35_35b_a3b

CONTEXT_GIB = 0.5  # taken for CUDA itself
MARGIN = 0.92  # share of the rest that training may take
BUSY_TOKENS = 1500  # in a pass, with which a card's products take most of the time
SHAPES = {
    "Qwen/Qwen3-VL-8B-Instruct": qwen3_8b,
    "Qwen/Qwen3-VL-4B-Instruct": qwen3_4b,
    "Qwen/Qwen2.5-VL-3B-Instruct": qwen25_3b,
    "Qwen/Qwen3.5-9B": qwen35_9b,
    "Qwen/Qwen3.5-27B": qwen35_27b,
    "Qwen/Qwen3.5-35B-A3B": qwen35_35b_a3b,
    "OpenGVLab/InternVL3_5-8B-HF": internvl35_8b,
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


@dataclass(frozen=True)
class Row:
    """A preset on a card."""

    preset: str
    card: str
    gpus: int = 1  # over which the model is spread
    model_id: str = ""  # in place of the preset's own
    quantization: str = ""  # in place of the preset's own
    with_fla: bool = False  # flash-linear-attention is installed

    @property
    def config(self) -> vqa.Config:
        """The settings of the row."""
        own = {"model_id": self.model_id, "quantization": self.quantization}
        overrides = {name: value for name, value in own.items() if value}
        return vqa.Config.preset(self.preset, **overrides)

    @property
    def title(self) -> str:
        """The row in words."""
        cards = f"{self.gpus} x {self.card}" if self.gpus > 1 else self.card
        kernels = ", with fla" if self.with_fla else ""
        return f"`{self.preset}`, {cards}{kernels}"


ROWS = [
    Row("quick_test", "T4"),
    Row("single", "RTX 8 GB"),
    Row("single", "T4"),
    Row("colab_t4", "RTX 12 GB"),
    Row("colab_t4", "T4"),
    Row("kaggle_t4x2", "T4"),
    Row("max_score", "T4"),
    Row("gpu_24gb", "L4"),
    Row("gpu_24gb", "V100 32 GB"),
    Row("colab_a100", "A100 40 GB"),
    Row("colab_a100", "A100 80 GB"),
    Row("colab_a100", "H200"),
    Row("kaggle_t4x2", "T4", model_id="Qwen/Qwen3.5-9B"),
    Row("kaggle_t4x2", "T4", model_id="OpenGVLab/InternVL3_5-8B-HF"),
    Row("large", "T4", gpus=2),
    Row("gpu_24gb", "L4", model_id="Qwen/Qwen3.5-9B", with_fla=True),
    Row("gpu_80gb", "A100 80 GB"),
    Row("gpu_80gb", "A100 80 GB", with_fla=True),
    Row("gpu_80gb", "A100 80 GB", quantization="4bit", with_fla=True),
]


def image_tokens(config: vqa.Config, shapes) -> int:
    """Tokens of the largest image that the preset allows; `shapes` is the model's config."""
    vision = shapes.vision_config
    if shapes.model_type == "internvl":
        tile_pixels = vision.image_size[0] * vision.image_size[1]
        pixels_per_token = tile_pixels // shapes.image_seq_length
    else:
        pixels_per_token = (vision.patch_size * vision.spatial_merge_size) ** 2
    return (config.max_pixels or 768 * pixels_per_token) // pixels_per_token


def free_memory(mebibytes: float) -> float:
    """GiB of a card that training may take."""
    return MARGIN * (mebibytes / 1024 - CONTEXT_GIB)


def fitting_plans(
    config: vqa.Config, costs: vqa.MemoryCosts, free: float, layers: int
) -> list[vqa.MemoryPlan]:
    """The plans that fit into `free` GiB, the largest passes first."""
    pass_costs = vqa.PassCosts(
        fixed=sum(costs.rows.values()) + costs.largest_weight,
        question=costs.question,
        stored_layer=costs.layer,
    )
    step = config.batch_size * config.grad_accum_steps
    fitting = []
    for micro_batch, stored_layers in vqa.candidate_plans(pass_costs, free, layers, step, True):
        plan = vqa.MemoryPlan(micro_batch, stored_layers)
        if sum(costs.peak(plan).values()) > free:
            # What counts is the largest layer, or the experts that its own would keep unpacked.
            plan = vqa.MemoryPlan(micro_batch, 0)
        if sum(costs.peak(plan).values()) <= free:
            fitting.append(plan)
    return fitting or [vqa.MemoryPlan(1, 0)]


def likely_plan(plans: Sequence[vqa.MemoryPlan], tokens: int) -> vqa.MemoryPlan:
    """The one that should be the fastest, for questions of so many tokens.

    It computes the fewest layers again, in passes that are large enough to keep a card busy; of
    equal ones the largest pass. A worker times them, and may find another one.
    """
    busy = [plan for plan in plans if plan.micro_batch * tokens >= BUSY_TOKENS]
    return max(busy or plans, key=lambda plan: (plan.stored_layers, plan.micro_batch))


@dataclass(frozen=True)
class RowCosts:
    """What a row's plans are chosen by."""

    costs: vqa.MemoryCosts
    free: float  # GiB
    image_tokens: int
    plans: list[vqa.MemoryPlan]  # that fit


def costs_of(row: Row, mebibytes: float | None = None) -> RowCosts:
    """The costs of a row on its card, or on one of that memory."""
    config = row.config
    shapes = SHAPES[config.model_id]({})
    image = image_tokens(config, shapes)
    precision = "bf16"  # as many bytes as fp16
    tokens = image + TEXT
    costs = vqa.memory_costs(config, shapes, tokens, precision, False, row.with_fla, frugal=True)
    free = row.gpus * free_memory(mebibytes or CARDS[row.card])
    plans = fitting_plans(config, costs, free, shapes.text_config.num_hidden_layers)
    return RowCosts(costs, free, image, plans)


def largest_pass(row: Row, mebibytes: float | None = None) -> int:
    """Questions of the largest pass that fits."""
    return costs_of(row, mebibytes).plans[0].micro_batch


def memory_row(row: Row, mebibytes: float | None = None) -> dict:
    """The computed GiB of a row, with the likely plan; on its card, or on one of that memory."""
    found = costs_of(row, mebibytes)
    costs = found.costs
    plan = likely_plan(found.plans, costs.tokens)
    peak = costs.peak(plan)
    name = row.config.model_id.rpartition("/")[2].removesuffix("-Instruct").removesuffix("-HF")
    return {
        "model": name if row.config.quantization != "none" else f"{name}, 16 bits",
        "tokens": costs.tokens,
        "in a pass": plan.micro_batch,
        "layers kept": plan.stored_layers,
        **peak,
        "sum": sum(peak.values()),
        "loading": costs.loaded,
        "free": found.free,
        "features of 1,000 images": 1000 * found.image_tokens * costs.image_token,
    }


def known_rows() -> list[Row]:
    """The rows whose models' families are known here."""
    return [row for row in ROWS if SHAPES[row.config.model_id]({}).model_type in vqa.FAMILIES]


def memory_table() -> str:
    """The rows of all presets as Markdown, as the README has it."""
    rows = known_rows()
    titles = pd.Index([row.title for row in rows], name="GiB")
    table = pd.DataFrame([memory_row(row) for row in rows], index=titles)
    numbers = table.select_dtypes("float").columns
    table[numbers] = table[numbers].map("{:.1f}".format)
    return vqa.markdown_table(table)


if __name__ == "__main__":
    sys.stdout.write(memory_table() + "\n")
