"""Training and scoring speed beside the plain recipes, on random weights of real size.

    python tests/benchmarks/bench_gpu.py --model 8b     # on a GPU; also --model 3b
    python tests/benchmarks/bench_gpu.py --tiny         # on a CPU: does everything run?
    python tests/benchmarks/bench_gpu.py --card         # training passes: computed and measured

Prints a table as it is measured: questions per second, peak GiB and seconds of each recipe; then
the ratios between them, the share of the GPU's peak rate that is used, and how long it idles.
--tiny takes the demo's model and a few rows; its figures mean nothing.

--card times training passes of some sizes, each with as many layers kept as fit, beside what
card_arithmetic.py computes for a T4 and for the card at hand. On a larger card it takes a T4's
path and memory; --card own takes the card as it is; without a GPU the computed part for a T4 is
printed. --folder takes a stored model in place of
random weights, which a T4 needs: it cannot hold an 8B before it is in 4 bits.

A question has 110 text tokens, of which the last 45 hold the choices and the closing, and one
image of 384 (3B) or 512 (8B) pixels square. Every recipe runs under the same cap of allocated
memory, as on a T4, except where "no cap" is said.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

# As the workers have it; set before torch is imported.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
import numpy as np
import pandas as pd
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from card_arithmetic import T4, Card, LayerShapes, pass_seconds, shapes_of  # noqa: E402
from references import use_huggingfaces_forward  # noqa: E402
from twins import build_twin  # noqa: E402

import vqa_helpers as vqa  # noqa: E402

CAP_GIB = 13.0  # that a process may allocate, as on a T4
TEXT = 110  # text tokens of a question
SUFFIX = 45  # those of them that differ between choice orders
# Batch, checkpointing; what runs out of memory comes last, because it leaves some of its memory
# behind.
TRL_SETTINGS = {
    "8b": [(16, True), (32, True)],
    "3b": [(4, False), (16, True), (8, False)],
}
ORDERS = vqa.balanced_orders(24)  # the four rotations first


# === Models of real size ==========================================================================
@dataclasses.dataclass
class Size:
    """One model to measure."""

    name: str
    pixels: int  # side of the image
    generate_batches: tuple[int, ...]  # batch sizes in which `generate` is tried
    make_config: Callable[[Mapping], transformers.PretrainedConfig]  # from the special tokens' ids


def qwen3(token: Mapping, config_class: type, tied: bool, text: Mapping, vision: Mapping):
    """The config of a Qwen3-VL model: what they all share, with the sizes that differ."""
    text_config = {
        "num_attention_heads": 32,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
        },
        **text,
    }
    vision_config = {
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": text["hidden_size"],
        **vision,
    }
    return config_class(
        text_config=text_config,
        vision_config=vision_config,
        tie_word_embeddings=tied,
        **token,
    )


LARGE_TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}


def qwen3_8b(token: Mapping):
    """The config of Qwen3-VL-8B."""
    text = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    }
    return qwen3(token, transformers.Qwen3VLConfig, False, text, LARGE_TOWER)


def qwen3_4b(token: Mapping):
    """The config of Qwen3-VL-4B."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    }
    tower = {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "deepstack_visual_indexes": [5, 11, 17],
    }
    return qwen3(token, transformers.Qwen3VLConfig, True, text, tower)


def qwen25_3b(token: Mapping):
    """The config of Qwen2.5-VL-3B."""
    text = {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **token
    )


def qwen3_30b(token: Mapping):
    """The config of Qwen3-VL-30B-A3B, a mixture of experts."""
    text = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }
    return qwen3(token, transformers.Qwen3VLMoeConfig, False, text, LARGE_TOWER)


SIZES = {
    "8b": Size("Qwen3-VL-8B", 512, (16, 32), qwen3_8b),
    "3b": Size("Qwen2.5-VL-3B", 384, (16, 64), qwen25_3b),
    "30b": Size("Qwen3-VL-30B-A3B", 512, (), qwen3_30b),  # for two_gpus.py
}


def build(size: Size, folder: Path) -> Path:
    """A folder that from_pretrained loads: random weights of real size, the demo's processor."""
    if size.make_config is qwen25_3b:
        tiny = build_twin("qwen2_5_vl", folder / "tiny")
    else:
        tiny = vqa.DEMO / "tiny_qwen3_vl"
    processor = transformers.AutoProcessor.from_pretrained(tiny)
    token_id = processor.tokenizer.convert_tokens_to_ids
    token = {
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
    }
    config = size.make_config(token)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return folder / "model"


# === Questions of the wanted size =================================================================
def make_prompts(session: vqa.Session, count: int, pixels: int, orders: int) -> list[vqa.Prompt]:
    """Random text around one image: a common prefix, then SUFFIX tokens for each order."""
    processor = session.processor
    config = session.model.config
    random = np.random.default_rng(0)
    budget = (1, 10**9)
    grid = vqa.image_grid(pixels, pixels, processor, budget)
    image_tokens = np.prod(grid) // processor.image_processor.merge_size**2
    image = [
        config.vision_start_token_id,
        *[processor.image_token_id] * image_tokens,
        config.vision_end_token_id,
    ]
    vocabulary = config.text_config.vocab_size

    def text(length: int) -> np.ndarray:
        return random.integers(vocabulary // 3, vocabulary // 2, length)  # no special token

    prompts = []
    for row in range(count):
        # 15 tokens before the image, 2 around it, and the rest behind it.
        prefix = np.concatenate([text(15), image, text(TEXT - SUFFIX - 17)])
        before = vqa.rope_positions(session, prefix, grid)
        after = before.max() + 1 + np.tile(np.arange(SUFFIX), (3, orders))
        prompt = vqa.Prompt(
            row=row,
            orders=tuple(ORDERS[:orders]),
            image_path="",
            image_key=(f"image {row % 64}", *budget),
            grid=grid,
            input_ids=np.concatenate([prefix, text(SUFFIX * orders)]),
            segments=np.repeat(np.arange(orders + 1), [len(prefix), *[SUFFIX] * orders]),
            position_ids=np.concatenate([before, after], axis=1),
            answer_positions=len(prefix) + SUFFIX * np.arange(1, orders + 1) - 1,
            present_choices=(True,) * 4,
            target=tuple(float(choice == row % 4) for choice in range(4)),
        )
        prompts.append(prompt)
    return prompts


def make_pixels(session: vqa.Session, prompts: Sequence[vqa.Prompt]) -> list[torch.Tensor]:
    """Random pixel values of each prompt's image, as the processor would give them."""
    images = session.processor.image_processor
    values = 3 * images.temporal_patch_size * images.patch_size**2
    return [torch.randn(int(np.prod(prompt.grid)), values) for prompt in prompts]


def fill_cache(session: vqa.Session, prompts: Sequence[vqa.Prompt]) -> float:
    """Put the features of the 64 images into RAM; images per second, the median over batches.

    The batches are as large as the module's own.
    """
    cache = session.vision_cache
    prompts_by_image = {prompt.image_key: prompt for prompt in prompts}
    images = list(prompts_by_image.values())
    speeds = []
    for start in range(0, len(images), 16):
        batch = images[start : start + 16]
        pixels = make_pixels(session, batch)
        grids = [prompt.grid for prompt in batch]
        begin = time.perf_counter()
        on_device = cache.compute_features(pixels, grids)
        features = [tuple(tensor.cpu() for tensor in image) for image in on_device]
        speeds.append(len(batch) / (time.perf_counter() - begin))
        for prompt, image_features in zip(batch, features, strict=True):
            cache.features_in_memory[prompt.image_key] = image_features
    cache.offload_tower()
    return statistics.median(speeds)


def make_run_of(session: vqa.Session, frame: pd.DataFrame) -> vqa.Run:
    """A run that trains on all rows of `frame`; its files are temporary."""
    return vqa.Run(
        config=session.config,
        directory=Path(tempfile.mkdtemp()),
        train=frame,
        test=frame,
        sample=frame,
        fallbacks={},
        fingerprint="benchmark",
        extra_rows=frame.head(0).assign(source=""),
    )


def make_run(session: vqa.Session, rows: int) -> vqa.Run:
    """A run of one fold over `rows` rows; its files go to a temporary folder."""
    frame = pd.DataFrame(
        {
            "id": [f"row {row}" for row in range(rows)],
            "fold": 1,
            "label": np.arange(rows) % 4,
            "type": "general",
            "a": "1",
            "b": "2",
            "c": "3",
            "d": "4",
            "pixel_hash": "",
            "image_path": "",
            "width": 1,
            "height": 1,
        }
    )
    return make_run_of(session, frame)


# === Ours: the module's own loops over these questions ============================================
JOB = 48_000  # questions that the planner is told to plan for: 5 folds of 3,200 rows, 3 epochs


def train_ours(
    session: vqa.Session, prompts: Sequence[vqa.Prompt], rows: int
) -> tuple[float, vqa.FoldTrainer]:
    """Training questions per second by FoldTrainer.train_epoch, after a warm-up epoch."""
    trainer = vqa.FoldTrainer(session, make_run(session, rows), 0)
    session.assigned_folds = range(JOB // trainer.schedule.all_rows)
    warm_up = prompts[:64]
    timed = prompts[:rows]
    trainer.epoch_prompts = lambda epoch: warm_up if epoch == 0 else timed
    vqa.use_plan(session, trainer.plan)
    trainer.train_epoch(0, 0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return trainer.train_epoch(1, 0), trainer


def score_ours(session: vqa.Session, prompts: Sequence[vqa.Prompt], batch: int) -> float:
    """Questions per second by predict_logits; every prompt's orders count as one question."""
    session.config = dataclasses.replace(session.config, infer_batch_size=batch)
    frame = make_run(session, len(prompts)).train
    views = [vqa.TTAView("", other_order=order) for order in prompts[0].orders]
    view_numbers = list(range(len(views)))
    planned = [vqa.PlannedPrompt(prompt, view_numbers) for prompt in prompts]
    plan_prompts = vqa.plan_prompts
    try:
        for count in (batch, len(prompts)):  # the first one warms up
            to_score = planned[:count]
            vqa.plan_prompts = lambda *_, to_score=to_score: to_score
            begin = time.perf_counter()
            vqa.predict_logits(session, frame.head(len(to_score)), views)
            seconds = time.perf_counter() - begin
    finally:
        vqa.plan_prompts = plan_prompts
    return len(prompts) / seconds


# === The usual recipes ============================================================================
def plain_inputs(session: vqa.Session, prompts: Sequence[vqa.Prompt]) -> dict[str, torch.Tensor]:
    """What Hugging Face's forward takes for these prompts: tokens, and pixels of the images."""
    batch = vqa.collate(session, prompts)
    inputs = {}
    for name in vqa.MODEL_INPUTS:
        if name != "position_ids":  # the model computes them itself
            inputs[name] = batch[name].to(session.device)
    pixels = torch.cat(make_pixels(session, prompts))
    inputs["pixel_values"] = pixels.to(session.device)
    return inputs


@contextlib.contextmanager
def plain_adapter(session: vqa.Session) -> Iterator:
    """The model with PEFT's own layers under autocast, as in most notebooks."""
    head = session.model.get_output_embeddings()
    if head.weight.device != session.device:
        head.to(session.device)
    session.model.model.visual.to(session.device)
    model = vqa.attach_lora(session.model, session.config, 0)
    use_huggingfaces_forward(session)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    precision = torch.float16 if session.runtime.precision == "fp16" else torch.bfloat16
    try:
        with torch.autocast(session.device.type, dtype=precision):
            yield model
    finally:
        model.gradient_checkpointing_disable()
        model.unload()
        vqa.remove_gpu_syncs(session.model)
        session.vision_cache.offload_tower()
        vqa.clear_memory()


def train_plain(
    session: vqa.Session, prompts: Sequence[vqa.Prompt], batch: int, passes: int
) -> float:
    """Training questions per second of the plain recipe, the median of the second half.

    Full-sequence loss, vision tower in every step, every layer checkpointed; an optimizer step
    every 8 questions.
    """
    seconds = []
    with plain_adapter(session) as model:
        model.train()
        parameters = vqa.trainable_parameters(model).values()
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        for number in range(passes):
            begin = time.perf_counter()
            inputs = plain_inputs(session, prompts[number * batch : (number + 1) * batch])
            labels = torch.full_like(inputs["input_ids"], -100)
            labels[:, -1] = inputs["input_ids"][:, -1]
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            if (number + 1) * batch % 8 == 0:
                optimizer.step()
                optimizer.zero_grad()
            loss.item()  # waits for the GPU
            seconds.append(time.perf_counter() - begin)
    return batch / statistics.median(seconds[passes // 2 :])


def generate_plain(
    session: vqa.Session, prompts: Sequence[vqa.Prompt], batch: int, repeats: int
) -> float:
    """Questions per second that `generate` answers with 10 tokens each; the best of the repeats."""
    seconds = []
    with plain_adapter(session) as model, torch.inference_mode():
        model.eval()
        for _ in range(repeats):
            begin = time.perf_counter()
            inputs = plain_inputs(session, prompts[:batch])
            tokens = model.generate(
                **inputs,
                max_new_tokens=10,
                min_new_tokens=10,
                do_sample=False,
            )
            tokens.cpu()  # waits for the GPU
            seconds.append(time.perf_counter() - begin)
    return batch / min(seconds)


# === Peak rate, idle share ========================================================================
def matmul_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """The chip's 16-bit matrix products per second on random data, in FLOP/s."""
    left = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    right = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        left @ right
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - begin)


def question_flops(text, length: int, training: bool) -> float:
    """Model FLOPs of one question of `length` tokens; `text` is the language model's config.

    Frozen weights take a forward pass and one product for the input's gradient.
    """
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = head_dim * text.num_attention_heads
    key_value_width = head_dim * text.num_key_value_heads
    weights = text.hidden_size * (2 * width + 2 * key_value_width + 3 * text.intermediate_size)
    attention = 2 * length * width  # causal: half of 4 * length * width for each token
    forward = text.num_hidden_layers * length * (2 * weights + attention)
    backward = text.num_hidden_layers * length * (2 * weights + 2 * attention)
    return forward + backward if training else forward


@dataclasses.dataclass
class Idleness:
    """How a GPU spent its time between the first and the last kernel of some work."""

    share: float  # of that time in which it did nothing
    kernels: pd.Series  # milliseconds by kernel, the most first
    gaps: pd.Series  # idle milliseconds by the kernels before and behind, the most first


def measure_idleness(work: Callable, *arguments) -> Idleness:
    """Profile work(*arguments)."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work(*arguments)
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    events = [event for event in profile.events() if event.device_type == cuda]
    events.sort(key=lambda event: event.time_range.start)
    first_start = events[0].time_range.start
    latest_end = events[0].time_range.end  # of all kernels so far
    latest_name = events[0].name
    gaps = Counter()
    kernels = Counter()
    for event in events:
        start = event.time_range.start  # microseconds
        end = event.time_range.end
        name = event.name[:50]
        gaps[f"{latest_name} -> {name}"] += max(0.0, start - latest_end) / 1000
        kernels[name] += (end - start) / 1000
        if end > latest_end:
            latest_end = end
            latest_name = name
    share = sum(gaps.values()) / (latest_end - first_start) * 1000
    return Idleness(share, largest_counts(kernels), largest_counts(gaps))


def largest_counts(counter: Counter) -> pd.Series:
    """The 14 largest counts."""
    return pd.Series(dict(counter.most_common(14)), dtype=float).round(1)


def print_idleness(name: str, work: Callable, *arguments) -> None:
    """Print how the GPU spends its time in work(*arguments)."""
    found = measure_idleness(work, *arguments)
    sys.stdout.write(f"GPU idle between the kernels of {name}: {100 * found.share:.1f} %\n")
    sys.stdout.write(f"{found.kernels.to_string()}\n")
    sys.stdout.write(f"{found.gaps.to_string()}\n")


class TimedGraph:
    """A CUDA graph whose replays are timed on the GPU."""

    def __init__(self, graph, spans: list):
        self.graph = graph
        self.spans = spans

    def pool(self):
        return self.graph.pool()

    def replay(self) -> None:
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        self.graph.replay()
        end.record()
        self.spans.append((begin, end))


def share_outside_graphs(session: vqa.Session, work: Callable, *arguments) -> float:
    """Share of the GPU's time in work(*arguments) that is not a replayed graph's.

    A profiler slows graphs down. The kernels between them count as idle here, too.
    """
    spans = []
    record_graph = vqa.record_graph
    vqa.record_graph = lambda *recorded: TimedGraph(record_graph(*recorded), spans)
    session.captured_passes.drop()
    try:
        work(*arguments)
        spans.clear()
        work(*arguments)
        torch.cuda.synchronize()
    finally:
        vqa.record_graph = record_graph
    replayed = sum(begin.elapsed_time(end) for begin, end in spans)
    return 1 - replayed / spans[0][0].elapsed_time(spans[-1][1])


# === The table ====================================================================================
class Table:
    """Rows of (what, per second, peak GiB), printed as they come."""

    def __init__(self):
        self.speeds: dict[str, float] = {}  # name of the measurement -> per second

    def measure(self, name: str, work: Callable, *arguments):
        """What work(*arguments) returns, a speed or a tuple that begins with it; it is a new row.

        Work that fails is a row too, and returns None.
        """
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        try:
            result = work(*arguments)
        except Exception as error:  # one recipe that fails must not cost the others' figures
            sys.stdout.write(f"| {name} | failed: {type(error).__name__}: {str(error)[:300]} |\n")
            return None
        seconds = time.perf_counter() - begin
        speed = result[0] if isinstance(result, tuple) else result
        peak = 0.0
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**30
        self.speeds[name] = speed
        sys.stdout.write(f"| {name} | {speed:.2f} | {peak:.2f} | took {seconds:.0f} s |\n")
        sys.stdout.flush()
        return result

    def names(self, beginning: str) -> list[str]:
        """The measurements whose names begin so."""
        return [name for name in self.speeds if name.startswith(beginning)]

    def print_ratios(self, ours: str, others: Sequence[str]) -> None:
        """Print how many times as fast as each of the others `ours` is."""
        for other in others:
            if ours in self.speeds and other in self.speeds:
                ratio = self.speeds[ours] / self.speeds[other]
                sys.stdout.write(f"ratio: {ours} / {other} = {ratio:.2f}\n")


def cap_memory(gib: float | None) -> None:
    """Let this process allocate so much of the GPU's memory; None: all of it."""
    if not torch.cuda.is_available():
        return
    total = torch.cuda.get_device_properties(0).total_memory
    share = 1.0 if gib is None else gib * 2**30 / total
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share)


# === The measurements =============================================================================
@dataclasses.dataclass
class Bench:
    """What all measurements of one model need."""

    size: Size
    tiny: bool  # a dry run on a CPU
    rows: int  # questions in a timed epoch
    pixels: int  # side of an image
    session: vqa.Session
    one: list[vqa.Prompt]  # questions in one choice order; twice as many as `rows`
    four: list[vqa.Prompt]  # `rows` questions in four orders
    table: Table

    @property
    def cap_gib(self) -> float | None:
        """The memory that a capped recipe may allocate."""
        return None if self.tiny else CAP_GIB


def open_bench(size: Size, folder: str, options: argparse.Namespace) -> Bench:
    """Load the model of `folder` under the cap, and make the questions."""
    tiny = options.tiny
    cap_memory(None if tiny else CAP_GIB)
    config = vqa.Config.preset(
        "demo",
        model_id=folder,
        batch_size=16,
        grad_accum_steps=2,
        gradient_checkpointing=True,
        lora_dropout=0.05,
        save_every_steps=10**9,
        save_every_minutes=1e9,
        compile_layers="off" if tiny else "on",
        quantization="none" if tiny else "4bit",
        num_workers=0,
    )
    session = vqa.open_session(config, vqa.load_competition(vqa.DEMO).train.iloc[0])
    session.assigned_folds = (0, 1, 2)  # how long the plan's passes may take, as in a whole job
    rows = 24 if tiny else options.rows
    pixels = 96 if tiny else size.pixels
    one = make_prompts(session, 2 * rows, pixels, orders=1)
    four = make_prompts(session, rows, pixels, orders=4)
    return Bench(size, tiny, rows, pixels, session, one, four, Table())


def measure_transformers_tower(bench: Bench) -> None:
    """Image features by transformers' own forward."""
    use_huggingfaces_forward(bench.session)
    name = "vision tower of transformers: images"
    bench.table.measure(name, fill_cache, bench.session, bench.one)
    cache = bench.session.vision_cache
    cache.vision_tower.to(bench.session.device)  # where `use_fast_tower` has to find it
    vqa.remove_gpu_syncs(bench.session.model)
    cache.offload_tower()


def measure_plain(bench: Bench) -> None:
    """The plain recipe: training in two batch sizes, and answers by `generate`."""
    table = bench.table
    passes = 4 if bench.tiny else 8
    batch = 4 if bench.tiny else 8
    session = bench.session
    table.measure("train: plain recipe, batch 1", train_plain, session, bench.one, 1, passes)
    table.measure("train: plain recipe, batch 8", train_plain, session, bench.one, batch, 6)
    for batch in (4,) if bench.tiny else bench.size.generate_batches:
        name = f"score: generate 10 tokens, batch {batch}"
        table.measure(name, generate_plain, session, bench.one, batch, 2)


def measure_trl(bench: Bench, settings: Sequence[tuple[int, bool]]) -> None:
    """Training by TRL's SFTTrainer, for each (batch, checkpointing)."""
    from trl_speed import trl_samples_per_second

    session = bench.session
    session.model.to(session.device)  # the parts that rest
    use_huggingfaces_forward(session)
    for batch, checkpointing in settings:
        bench.table.measure(
            f"train: TRL SFTTrainer, batch {batch}, checkpointing {checkpointing}",
            trl_samples_per_second,
            session.model,
            session.processor,
            bench.pixels,
            TEXT,
            batch,
            checkpointing,
        )
    vqa.remove_gpu_syncs(session.model)
    session.vision_cache.offload_tower()


def measure_ours(bench: Bench, images_per_second: float) -> None:
    """Training and scoring by the module, under the cap."""
    session = bench.session
    table = bench.table
    measured = table.measure("train: ours", train_ours, session, bench.one, bench.rows)
    if not measured:
        return
    speed, trainer = measured
    compiled = session.config.compile_layers
    sys.stdout.write(f"plan: {trainer.plan}; fused optimizer, compiled layers: {compiled}\n")
    # Two of three folds train on an image: in one epoch it is used twice, and computed once.
    with_cache = 1 / (1 / speed + 1 / images_per_second / 2)
    sys.stdout.write(
        f"train: ours with the cache filled for one epoch of 3 folds: {with_cache:.2f} per second\n"
    )
    batch = 4 if bench.tiny else 64
    name = f"score: ours, one order, batch {batch}"
    table.measure(name, score_ours, session, bench.one, batch)
    batch = 4 if bench.tiny else 32
    name = f"score: ours, four orders, batch {batch}"
    table.measure(name, score_ours, session, bench.four, batch)
    if not bench.tiny:
        trainer.epoch_prompts = lambda epoch: bench.one[:128]
        if trainer.plan.is_captured:
            share = share_outside_graphs(session, trainer.train_epoch, 2, 0)
            sys.stdout.write(f"training under the cap: {100 * share:.1f} % outside graphs\n")
        else:
            print_idleness("training under the cap", trainer.train_epoch, 2, 0)
    trainer.model.unload()
    vqa.clear_memory()


def measure_orders(bench: Bench) -> None:
    """Scoring in 1, 4, 8, 12 and 24 orders behind one prefix, with an adapter, under the cap.

    Layers are as `compile_layers` "off" leaves them, which spares a minute. A pass has about as
    many tokens each time.
    """
    session = bench.session
    config = session.config
    cap_memory(bench.cap_gib)
    session.config = dataclasses.replace(config, compile_layers="off")
    adapted = vqa.attach_lora(session.model, session.config, 0)
    vqa.use_fast_layers(session, adapted, bench.rows)
    adapted.eval()
    speeds = {}
    for orders in (1, 24) if bench.tiny else (1, 4, 8, 12, 24):
        prompts = make_prompts(session, bench.rows, bench.pixels, orders)
        batch = 4 if bench.tiny else max(1, 20_000 // len(prompts[0].input_ids))
        name = f"score: {orders} orders behind one prefix, batch {batch}"
        speeds[orders] = bench.table.measure(name, score_ours, session, prompts, batch)
    for orders, speed in speeds.items():
        if speed and speeds[1]:
            times = speeds[1] / speed
            sys.stdout.write(f"{orders} orders take {times:.2f} times as long as one\n")
    adapted.unload()
    vqa.clear_memory()
    session.config = config


def measure_uncapped(bench: Bench) -> None:
    """The same with all of the GPU's memory, beside the GPU's peak rate."""
    session = bench.session
    table = bench.table
    cap_memory(None)
    rate = matmul_rate()
    sys.stdout.write(f"bf16 matrix products: {rate / 1e12:.0f} TFLOP/s\n")
    session.memory_plan = None
    measured = table.measure("train: ours, no cap", train_ours, session, bench.one, bench.rows)
    name = "score: ours, one order, batch 64, no cap"
    scoring_speed = table.measure(name, score_ours, session, bench.one, 64)
    if measured:
        print_share_of_rate(bench, "training", measured[0], rate)
    if scoring_speed:
        print_share_of_rate(bench, "scoring", scoring_speed, rate)
    if measured:
        trainer = measured[1]
        trainer.epoch_prompts = lambda epoch: bench.one[:256]
        print_idleness("training", trainer.train_epoch, 2, 0)
        print_idleness("scoring", score_ours, session, bench.one, 64)
        sys.stdout.write(f"plan without the cap: {trainer.plan}\n")
        trainer.model.unload()


def print_share_of_rate(bench: Bench, name: str, speed: float, rate: float) -> None:
    """Print the share of `rate`, in FLOP/s, that training or scoring reaches at that speed."""
    text_config = bench.session.model.config.text_config
    length = len(bench.one[0].input_ids)
    flops = question_flops(text_config, length, training=name == "training")
    sys.stdout.write(f"share of that rate in {name}: {100 * speed * flops / rate:.1f} %\n")


def measure_without(bench: Bench, name: str) -> None:
    """Training under the cap without the compiler ("eager"), or also without our LoRA layers.

    It tells what each of them brings.
    """
    session = bench.session
    config = session.config
    use_fast_lora = vqa.use_fast_lora
    cap_memory(bench.cap_gib)
    session.config = dataclasses.replace(config, compile_layers="off")
    session.memory_plan = None
    if name == "peft":
        vqa.use_fast_lora = lambda adapted: None
    title = f"train: ours, {name} layers"
    measured = bench.table.measure(title, train_ours, session, bench.one, bench.rows)
    if measured:
        trainer = measured[1]
        sys.stdout.write(f"plan: {trainer.plan}\n")
        trainer.model.unload()
    vqa.use_fast_lora = use_fast_lora
    session.config = config
    session.memory_plan = None


def print_all_ratios(table: Table) -> None:
    """Print ours beside every plain recipe, and one order beside four."""
    plain_training = [name for name in table.names("train: ") if "ours" not in name]
    table.print_ratios("train: ours", plain_training)
    for name in table.names("score: ours"):
        table.print_ratios(name, table.names("score: generate"))
    one = "score: ours, one order, batch 64"
    table.print_ratios(one, ["score: ours, four orders, batch 32"])
    table.print_ratios("vision tower: images", table.names("vision tower of"))


def run_bench(size: Size, folder: str, options: argparse.Namespace) -> None:
    """Measure and print all parts that the options name."""
    parts = options.parts
    bench = open_bench(size, folder, options)
    length = len(bench.one[0].input_ids)
    length_of_four = len(bench.four[0].input_ids)
    sys.stdout.write(f"{size.name}: {length} tokens a question, {length_of_four} in four orders\n")
    sys.stdout.write("| recipe | questions per second | peak GiB | |\n|---|---|---|---|\n")
    images_per_second = bench.table.measure(
        "vision tower: images", fill_cache, bench.session, bench.one
    )
    if "tower" in parts:
        measure_transformers_tower(bench)
    if "plain" in parts:
        measure_plain(bench)
    if "trl" in parts and importlib.util.find_spec("trl"):
        measure_trl(bench, options.trl)
    if "ours" in parts:
        measure_ours(bench, images_per_second)
    if "orders" in parts:
        measure_orders(bench)
    if "uncapped" in parts and not bench.tiny:
        measure_uncapped(bench)
    for name in ("eager", "peft"):
        if name in parts:
            measure_without(bench, name)
    print_all_ratios(bench.table)


@contextlib.contextmanager
def told_to_be_a_t4() -> Iterator[None]:
    """The T4's path: fp16, told to be capability 7.5, without the flash and cuDNN kernels."""
    name = "told to be a T4"
    gpu = {"index": 0, "name": name, "memory_gib": CAP_GIB, "capability": 7.5}
    runtime = vqa.Runtime("local", (gpu,), "fp16", "sdpa", (name,))
    detect_runtime = vqa.detect_runtime
    vqa.detect_runtime = lambda *_: runtime
    torch.backends.cuda.enable_flash_sdp(False)
    sys.stdout.write("T4 path: fp16 with a scaler, no flash attention\n")
    try:
        yield
    finally:
        vqa.detect_runtime = detect_runtime
        torch.backends.cuda.enable_flash_sdp(True)


# === A card: training passes, computed and measured ===============================================
CARD_PASSES = (4, 2, 8, 16, 32, 6, 3, 1)  # questions; one last, because it compiles once more
CARD_REPEATS = 3  # timed passes of each, after one that is not


def memory_rate() -> float:
    """Bytes per second that a copy within the GPU's memory reads and writes."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize()
    return 10 * 2 * source.nbytes / (time.perf_counter() - begin)


def host_copy_rate() -> float:
    """Bytes per second that are copied from the host's pageable memory."""
    source = torch.zeros(2**26)
    source.to("cuda")
    begin = time.perf_counter()
    for _ in range(4):
        source.to("cuda")
    torch.cuda.synchronize()
    return 4 * source.nbytes / (time.perf_counter() - begin)


def launch_seconds() -> float:
    """Seconds that the host takes for a kernel, such as those of a training pass.

    Through autograd, whose work Python has to begin, with its backward pass.
    """
    value = torch.ones(1, device="cuda", requires_grad=True)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        result = value
        for _ in range(500):
            result = result * 1.0
        result.backward()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begin) / 1000)
    return statistics.median(seconds)


def measure_card(has_flash: bool) -> Card:
    """The rates of the card at hand, in fp16."""
    return Card(
        name=torch.cuda.get_device_name(),
        products=matmul_rate(torch.float16),
        memory=memory_rate(),
        host_copy=host_copy_rate(),
        launch=launch_seconds(),
        has_flash=has_flash,
    )


def print_card(card: Card) -> None:
    """Print a card's rates."""
    sys.stdout.write(
        f"{card.name}: {card.products / 1e12:.1f} TFLOP/s, memory {card.memory / 1e9:.0f} GB/s, "
        f"host to card {card.host_copy / 1e9:.1f} GB/s, "
        f"a kernel {1e6 * card.launch:.1f} microseconds of the host\n"
    )
    sys.stdout.flush()


def session_costs(session: vqa.Session, tokens: int) -> vqa.MemoryCosts:
    """What `memory_costs` says of this session on a GPU."""
    return vqa.memory_costs(
        session.config,
        session.model.config,
        tokens,
        session.runtime.precision,
        compiled=session.family.is_compiled and session.config.compile_layers == "on",
        frugal=session.runtime.attention == "sdpa",
    )


def most_kept(costs: vqa.MemoryCosts, questions: int, budget: float, layers: int) -> int | None:
    """The most layers that `questions` in a pass may keep within `budget` GiB; None: not one."""
    for kept in range(layers, -1, -1):
        if sum(costs.peak(vqa.MemoryPlan(questions, kept)).values()) <= budget:
            return kept
    return None


def card_candidates(costs: vqa.MemoryCosts, budget: float, layers: int) -> list[tuple[int, int]]:
    """(questions in a pass, layers kept) of the passes to time, the likely best of a T4 first.

    Each with as many layers kept as fit into `budget` GiB; a small one with none kept, too.
    """
    candidates = []
    for questions in CARD_PASSES:
        kept = most_kept(costs, questions, budget, layers)
        if kept is not None:
            candidates.append((questions, kept))
        if kept and questions == 4:
            candidates.append((questions, 0))
    return candidates


@dataclasses.dataclass
class CardBench:
    """What the lines of the table need."""

    shapes: LayerShapes
    tokens: int  # of a question
    image_tokens: int  # among them
    card: Card | None  # the one at hand; None on a CPU

    def computed(self, card: Card | None, questions: int, kept: int) -> str:
        """Questions per second by computation."""
        if card is None:
            return ""
        seconds = pass_seconds(
            card, self.shapes, self.tokens, self.image_tokens, questions, kept
        ).total
        return f"{questions / seconds:.2f}"

    def line(self, questions: int, kept: int, measured: str) -> str:
        """A candidate's row; `measured`: the cells behind the computed ones."""
        by_t4 = self.computed(T4, questions, kept)
        by_card = self.computed(self.card, questions, kept)
        return f"| {questions} | {kept} | {by_t4} | {by_card} | {measured} |\n"


CARD_COLUMNS = (
    "in a pass",
    "layers kept",
    "T4, computed",
    "this card, computed",
    "measured, questions/s",
    "from, to",
    "peak GiB",
    "warm-up, s",
)


def time_pass(session: vqa.Session, prompt: vqa.Prompt, questions: int, kept: int) -> str:
    """The measured cells of a candidate: speed, its range, peak, seconds of the first pass."""
    prompts = [prompt] * questions
    begin = time.perf_counter()
    warm_up, _ = vqa.measure_pass(session, prompts, kept)
    first = time.perf_counter() - begin
    if not np.isfinite(warm_up):
        return "does not fit | | | "
    passes = [vqa.measure_pass(session, prompts, kept) for _ in range(CARD_REPEATS)]
    speeds = sorted(questions / seconds for seconds, _ in passes)
    peak = max(peak for _, peak in passes) / 2**30
    middle = statistics.median(speeds)
    return f"{middle:.2f} | {speeds[0]:.2f}, {speeds[-1]:.2f} | {peak:.2f} | {first:.1f}"


def time_tiny_pass(session: vqa.Session, prompt: vqa.Prompt, questions: int, kept: int) -> str:
    """The same on a CPU, where `measure_pass` cannot be."""
    vqa.recompute_layers(session, kept)
    prompts = [prompt] * questions
    begin = time.perf_counter()
    batch = vqa.collate(session, prompts)
    vqa.training_loss(session, vqa.answer_hidden_states(session, batch), batch).backward()
    return f"{len(prompts) / (time.perf_counter() - begin):.2f} | | | "


def print_card_table(bench: Bench, card: Card | None) -> None:
    """Time every candidate and print its row at once; then the planner's own choice."""
    session = bench.session
    trainer = vqa.FoldTrainer(session, make_run(session, bench.rows), 0)
    trainer.epoch_prompts = lambda epoch: bench.one[: bench.rows]
    trainer.model.train()
    prompt = bench.one[0]
    tokens = len(prompt.input_ids)
    image_tokens = int(np.prod(prompt.grid))
    image_tokens //= session.processor.image_processor.merge_size**2
    config = session.config
    shapes = shapes_of(session.model.config, config.lora_r, config.quantization == "4bit")
    of_card = CardBench(shapes, tokens, image_tokens, card)
    budget = vqa.memory_budget() / 2**30 if card else 1.0
    costs = session_costs(session, tokens)
    sys.stdout.write(f"{tokens} tokens a question, {budget:.1f} GiB to use\n")
    sys.stdout.write("| " + " | ".join(CARD_COLUMNS) + " |\n" + "|---" * len(CARD_COLUMNS) + "|\n")
    candidates = card_candidates(costs, budget, shapes.layers)
    if card is None:
        candidates = candidates[:4]  # enough to see that it runs
    begin = time.perf_counter()
    for questions, kept in candidates:
        try:
            cells = (time_pass if card else time_tiny_pass)(session, prompt, questions, kept)
        except Exception as error:  # one that fails must not cost the others' figures
            cells = f"failed: {type(error).__name__}: {str(error)[:200]} | | | "
        vqa.clear_memory()
        sys.stdout.write(of_card.line(questions, kept, cells))
        sys.stdout.flush()
    sys.stdout.write(f"these passes took {time.perf_counter() - begin:.0f} s\n")
    begin = time.perf_counter()
    plan = trainer.plan
    seconds = time.perf_counter() - begin
    sys.stdout.write(f"the planner's choice after {seconds:.0f} s: {plan}\n")


def run_card(size: Size, folder: str, options: argparse.Namespace) -> None:
    """Training passes under a card's memory, computed and measured."""
    print_card(T4)
    card = None
    if not options.tiny:
        is_turing = options.card == "t4" or torch.cuda.get_device_capability() < (8, 0)
        card = measure_card(has_flash=not is_turing)
        print_card(card)
    bench = open_bench(size, folder, options)
    if options.card == "own":
        cap_memory(None)
    fill_cache(bench.session, bench.one[:16])
    print_card_table(bench, card)


def computed_for_a_t4(size: Size) -> pd.DataFrame:
    """Seconds of a pass by what they go to, and questions per second, for each plan to time.

    Layers are compiled and keep few activations; the memory is what a T4 is told to have.
    """
    shapes = size.make_config({})
    config = vqa.Config(lora_dropout=0.05)
    side = shapes.vision_config.patch_size * shapes.vision_config.spatial_merge_size
    image_tokens = (size.pixels // side) ** 2
    tokens = image_tokens + TEXT
    costs = vqa.memory_costs(config, shapes, tokens, "fp16", compiled=True, frugal=True)
    layers = shapes_of(shapes, config.lora_r, is_packed=True)
    rows = []
    for questions, kept in sorted(card_candidates(costs, 0.92 * CAP_GIB, layers.layers)):
        seconds = pass_seconds(T4, layers, tokens, image_tokens, questions, kept)
        row = {
            "in a pass": questions,
            "layers kept": kept,
            **dataclasses.asdict(seconds),
            "questions/s": questions / seconds.total,
        }
        rows.append(row)
    return pd.DataFrame(rows).set_index("in a pass")


def run_card_as_told(size: Size, folder: str, options: argparse.Namespace) -> None:
    """`run_card` on the card as it is (own, or a CPU), or told to be a T4."""
    as_it_is = options.tiny or options.card == "own"
    with contextlib.nullcontext() if as_it_is else told_to_be_a_t4():
        run_card(size, folder, options)


def parse_arguments() -> argparse.Namespace:
    """The command line's options; `parts` as a list, and `trl`, the settings to try there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("8b", "3b"), default="8b")
    parser.add_argument(
        "--parts",
        default="tower,plain,trl,ours,uncapped,eager,turing",
        help="what to measure; there are also peft, and orders: 1 to 24 choice orders",
    )
    parser.add_argument("--rows", type=int, default=288, help="questions in a timed epoch")
    parser.add_argument(
        "--tiny", action="store_true", help="the demo's model on this CPU: does everything run?"
    )
    parser.add_argument(
        "--card",
        choices=("t4", "own"),
        nargs="?",
        const="t4",
        help="time training passes beside computed ones, told to be a T4 or on the card as it is",
    )
    parser.add_argument("--folder", help="of a stored model, in place of random weights")
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    options.trl = [(2, True)] if options.tiny else TRL_SETTINGS[options.model]
    return options


def model_to_measure(size: Size, folder: Path, tiny: bool) -> Path:
    """The folder of the demo's model, or of random weights of real size."""
    return vqa.DEMO / "tiny_qwen3_vl" if tiny else build(size, folder)


def main() -> None:
    options = parse_arguments()
    size = SIZES[options.model]
    folder = Path(tempfile.mkdtemp())
    vqa.setup_logging(folder, to_file=False)
    try:
        if options.card and not options.tiny and not torch.cuda.is_available():
            print_card(T4)
            sys.stdout.write(f"{vqa.markdown_table(computed_for_a_t4(size))}\n")
            return
        begin = time.perf_counter()
        model_folder = options.folder or model_to_measure(size, folder, options.tiny)
        sys.stdout.write(f"built in {time.perf_counter() - begin:.0f} s\n")
        sys.stdout.flush()
        if options.card:
            run_card_as_told(size, str(model_folder), options)
            return
        run_bench(size, str(model_folder), options)
        if "turing" in options.parts and not options.tiny:
            gc.collect()
            options.parts = ["ours"]
            with told_to_be_a_t4():
                run_bench(size, str(model_folder), options)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
