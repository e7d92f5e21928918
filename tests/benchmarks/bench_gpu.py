"""Training and scoring speed beside the plain recipes, on random weights of real size: a table of one run.

python tests/benchmarks/bench_gpu.py [--model 8b|3b] [--tiny]      (a GPU; --tiny: a dry run on a CPU)

A question has 110 text tokens, of which the last 45 hold the choices and the closing, and one image of 384 (3B) or 512
(8B) pixels square. Every recipe runs under the same cap of allocated memory, as on a T4, except where "no cap" is said.
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
from pathlib import Path

os.environ.setdefault(
    "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
)  # as the workers have it
import numpy as np
import pandas as pd
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import build_twin, use_huggingfaces_forward  # noqa: E402

import vqa_helpers as vqa  # noqa: E402

CAP_GIB = 13.0
TEXT, SUFFIX = 110, 45
# Batch, checkpointing; what runs out of memory comes last, because it leaves some of its memory behind.
TRL_SETTINGS = {"8b": [(16, True), (32, True)], "3b": [(4, False), (16, True), (8, False)]}
ORDERS = [vqa.TTAView("", turn).order for turn in range(4)]


@dataclasses.dataclass
class Size:
    """One model to measure; pixels is the image's side."""

    name: str
    pixels: int
    generate_batches: tuple[int, ...]
    make_config: object


def qwen3(token, kind, tied: bool, text: dict, vision: dict):
    """What the Qwen3-VL models share, with the sizes that differ."""
    text = {
        "num_attention_heads": 32,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
    } | text
    text |= {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
        }
    }
    vision = {
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": text["hidden_size"],
    } | vision
    return kind(text_config=text, vision_config=vision, tie_word_embeddings=tied, **token)


LARGE_TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}


def qwen3_8b(token):
    text = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    }
    return qwen3(token, transformers.Qwen3VLConfig, False, text, LARGE_TOWER)


def qwen3_4b(token):
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


def qwen25_3b(token):
    text = {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
    }
    text |= {
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "bos_token_id": None,
    }
    text |= {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        }
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
    }
    vision |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **token
    )


def qwen3_30b(token):
    text = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
    }
    text |= {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    return qwen3(token, transformers.Qwen3VLMoeConfig, False, text, LARGE_TOWER)


SIZES = {
    "8b": Size("Qwen3-VL-8B", 512, (16, 32), qwen3_8b),
    "3b": Size("Qwen2.5-VL-3B", 384, (16, 64), qwen25_3b),
    "30b": Size("Qwen3-VL-30B-A3B", 512, (), qwen3_30b),  # for two_gpus.py
}


def build(size: Size, folder: Path) -> Path:
    """Random weights at real size beside the demo's processor, in a folder that from_pretrained loads."""
    tiny = (
        build_twin("qwen2_5_vl", folder / "tiny")
        if size.make_config is qwen25_3b
        else vqa.DEMO / "tiny_qwen3_vl"
    )
    processor = transformers.AutoProcessor.from_pretrained(tiny)
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    token = {key: processor.tokenizer.convert_tokens_to_ids(name) for key, name in names.items()}
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


# ---------------------------------------------------------------------------------------------------------------------
# Questions of the wanted size
# ---------------------------------------------------------------------------------------------------------------------
def make_prompts(session, count: int, pixels: int, orders: int) -> list[vqa.Prompt]:
    """Random text around one image: a common prefix, then SUFFIX tokens for each order."""
    processor, random = session.processor, np.random.default_rng(0)
    budget = (1, 10**9)
    grid = vqa.image_grid(pixels, pixels, processor, budget)
    image = [session.model.config.vision_start_token_id]
    image += [processor.image_token_id] * (np.prod(grid) // processor.image_processor.merge_size**2)
    image += [session.model.config.vision_end_token_id]
    vocabulary = session.model.config.text_config.vocab_size

    def text(length: int) -> np.ndarray:
        return random.integers(vocabulary // 3, vocabulary // 2, length)  # no special token

    prompts = []
    for row in range(count):
        prefix = np.concatenate([text(15), image, text(TEXT - SUFFIX - 17)])
        before = vqa.rope_positions(session, prefix, grid)
        after = before.max() + 1 + np.tile(np.arange(SUFFIX), (3, orders))
        ids = np.concatenate([prefix, text(SUFFIX * orders)])
        segments = np.repeat(np.arange(orders + 1), [len(prefix), *[SUFFIX] * orders])
        ends = len(prefix) + SUFFIX * np.arange(1, orders + 1) - 1
        key = (f"image {row % 64}", *budget)
        chosen = tuple(ORDERS[:orders])
        positions = np.concatenate([before, after], axis=1)
        target = tuple(float(choice == row % 4) for choice in range(4))
        prompts.append(
            vqa.Prompt(
                row, chosen, "", key, grid, ids, segments, positions, ends, (True,) * 4, target
            )
        )
    return prompts


def make_pixels(session, prompts):
    """Random pixel values of each prompt's image, as the processor would give them."""
    images = session.processor.image_processor
    values = 3 * images.temporal_patch_size * images.patch_size**2
    return [torch.randn(int(np.prod(prompt.grid)), values) for prompt in prompts]


def fill_cache(session, prompts) -> float:
    """Features of the 64 images into RAM, in the module's own batches; images per second of the second half."""
    by_key = {prompt.image_key: prompt for prompt in prompts}
    speeds = []
    for start in range(0, len(by_key), 16):
        part = [*by_key.values()][start : start + 16]
        pixels, begin = make_pixels(session, part), time.perf_counter()
        features = session.vision_cache.compute(pixels, [prompt.grid for prompt in part])
        features = [tuple(tensor.cpu() for tensor in image) for image in features]
        speeds.append(len(part) / (time.perf_counter() - begin))
        session.vision_cache.store |= zip(
            (prompt.image_key for prompt in part), features, strict=True
        )
    session.vision_cache.offload_tower()
    return statistics.median(speeds)


def make_run(session, rows: int) -> vqa.Run:
    """A run of one fold over `rows` rows; its files go to a temporary folder."""
    frame = pd.DataFrame(
        {"id": [f"row {row}" for row in range(rows)], "fold": 1, "label": np.arange(rows) % 4}
    )
    frame = frame.assign(
        type="general", a="1", b="2", c="3", d="4", pixel_hash="", image_path="", width=1, height=1
    )
    nothing = frame.head(0).assign(source="")
    return vqa.Run(
        session.config, Path(tempfile.mkdtemp()), frame, frame, frame, {}, "benchmark", nothing
    )


# ---------------------------------------------------------------------------------------------------------------------
# Ours: the module's own loops over these questions
# ---------------------------------------------------------------------------------------------------------------------
def train_ours(session, prompts, rows: int) -> tuple[float, vqa.FoldTrainer]:
    """Training questions per second by FoldTrainer.train_epoch, after a warm-up epoch."""
    trainer = vqa.FoldTrainer(session, make_run(session, rows), 0)
    trainer.prompts = lambda epoch: prompts[:64] if epoch == 0 else prompts[:rows]
    vqa.recompute_layers(session, trainer.plan.stored_layers)
    trainer.train_epoch(0, 0)
    torch.cuda.reset_peak_memory_stats() if torch.cuda.is_available() else None
    return trainer.train_epoch(1, 0), trainer


def score_ours(session, prompts, batch: int) -> float:
    """Questions per second by predict_logits; every prompt's orders count as one question."""
    session.config = dataclasses.replace(session.config, infer_batch_size=batch)
    frame, views = (
        make_run(session, len(prompts)).train,
        [vqa.TTAView("", turn) for turn in range(4)],
    )
    plan, numbers = vqa.plan_prompts, list(range(len(prompts[0].orders)))
    try:
        for part in (prompts[:batch], prompts):  # the first one warms up
            vqa.plan_prompts = lambda *_, part=part: [(prompt, numbers) for prompt in part]
            begin = time.perf_counter()
            vqa.predict_logits(session, frame.head(len(part)), views)
            seconds = time.perf_counter() - begin
    finally:
        vqa.plan_prompts = plan
    return len(prompts) / seconds


# ---------------------------------------------------------------------------------------------------------------------
# The usual recipes
# ---------------------------------------------------------------------------------------------------------------------
def plain_inputs(session, prompts) -> dict:
    batch = vqa.collate(session, prompts)
    inputs = {
        name: batch[name].to(session.device) for name in vqa.MODEL_INPUTS if name != "position_ids"
    }
    return inputs | {"pixel_values": torch.cat(make_pixels(session, prompts)).to(session.device)}


@contextlib.contextmanager
def plain_adapter(session):
    """PEFT's own layers under autocast, as in most notebooks."""
    if (head := session.model.get_output_embeddings()).weight.device != session.device:
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


def train_plain(session, prompts, batch: int, passes: int) -> float:
    """Full-sequence loss, vision tower in every step, every layer checkpointed."""
    with plain_adapter(session) as model:
        model.train()
        optimizer, seconds = (
            torch.optim.AdamW(vqa.trainable_parameters(model).values(), lr=1e-4),
            [],
        )
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
            loss.item()
            seconds.append(time.perf_counter() - begin)
    return batch / statistics.median(seconds[passes // 2 :])


def generate_plain(session, prompts, batch: int, repeats: int) -> float:
    with plain_adapter(session) as model, torch.inference_mode():
        model.eval()
        seconds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            inputs = plain_inputs(session, prompts[:batch])
            model.generate(**inputs, max_new_tokens=10, min_new_tokens=10, do_sample=False).cpu()
            seconds.append(time.perf_counter() - begin)
    return batch / min(seconds)


# ---------------------------------------------------------------------------------------------------------------------
# Peak rate, idle share
# ---------------------------------------------------------------------------------------------------------------------
def matmul_rate() -> float:
    """The chip's bf16 matrix products per second on random data, in FLOP/s."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - begin)


def question_flops(text, length: int, training: bool) -> float:
    """Model FLOPs of one question: frozen weights take a forward pass and one product for the input's gradient."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = head_dim * text.num_attention_heads
    weights = text.hidden_size * (
        2 * width + 2 * head_dim * text.num_key_value_heads + 3 * text.intermediate_size
    )
    attention = 2 * length * width  # causal: half of 4 * length * width for each token
    forward = text.num_hidden_layers * length * (2 * weights + attention)
    backward = text.num_hidden_layers * length * (2 * weights + 2 * attention)
    return forward + backward if training else forward


def idle_share(work) -> tuple[float, pd.Series, pd.Series]:
    """Share of the time between the first and the last kernel in which the GPU did nothing; then milliseconds by
    kernel, and of the idle gaps by the kernels around them."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    events = [
        event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    events = sorted(events, key=lambda event: event.time_range.start)
    first, reached, before = events[0].time_range.start, events[0].time_range.end, events[0].name
    gaps, times = Counter(), Counter()
    for event in events:
        start, end, name = event.time_range.start, event.time_range.end, event.name[:50]
        gaps[f"{before} -> {name}"] += max(0.0, start - reached) / 1000
        times[name] += (end - start) / 1000
        if end > reached:
            reached, before = end, name
    idle = sum(gaps.values()) / (reached - first) * 1000
    return idle, *(
        pd.Series(dict(counter.most_common(14)), dtype=float).round(1) for counter in (times, gaps)
    )


def print_idle(name: str, work) -> None:
    share, *where = idle_share(work)
    sys.stdout.write(f"GPU idle between the kernels of {name}: {100 * share:.1f} %\n")
    sys.stdout.writelines(f"{part.to_string()}\n" for part in where)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------
class Table:
    """Rows of (what, per second, peak GiB), printed as they come."""

    def __init__(self):
        self.rows = {}

    def measure(self, name: str, work):
        """Run one measurement; one that fails is a row too."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begin, result = time.perf_counter(), None
        try:
            result = work()
        except Exception as error:  # one recipe that fails must not cost the others' figures
            sys.stdout.write(f"| {name} | failed: {type(error).__name__}: {str(error)[:300]} |\n")
            return None
        speed = result[0] if isinstance(result, tuple) else result
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        self.rows[name] = speed
        took = time.perf_counter() - begin
        sys.stdout.write(f"| {name} | {speed:.2f} | {peak:.2f} | took {took:.0f} s |\n")
        sys.stdout.flush()
        return result

    def ratios(self, ours: str, others: list[str]) -> None:
        for other in others:
            if ours in self.rows and other in self.rows:
                sys.stdout.write(
                    f"ratio: {ours} / {other} = {self.rows[ours] / self.rows[other]:.2f}\n"
                )


def cap(gib: float | None) -> None:
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else gib * 2**30 / total)


def bench(size: Size, folder: str, options) -> None:
    tiny, table = options.tiny, Table()
    rows, pixels = (24, 96) if tiny else (options.rows, size.pixels)
    settings = {
        "model_id": folder,
        "batch_size": 16,
        "grad_accum_steps": 2,
        "gradient_checkpointing": True,
    }
    settings |= {
        "lora_dropout": 0.05,
        "save_every_steps": 10**9,
        "compile_layers": "off" if tiny else "on",
    }
    settings |= {
        "save_every_minutes": 1e9,
        "quantization": "none" if tiny else "4bit",
        "num_workers": 0,
    }
    config = vqa.Config.preset("demo", **settings)
    cap(None if tiny else CAP_GIB)
    session = vqa.open_session(config, vqa.load_competition(vqa.DEMO).train.iloc[0])
    one = make_prompts(session, 2 * rows, pixels, orders=1)
    four = make_prompts(session, rows, pixels, orders=4)
    length = len(one[0].input_ids)
    sys.stdout.write(
        f"{size.name}: {length} tokens a question, {len(four[0].input_ids)} in four orders\n"
    )
    sys.stdout.write("| recipe | questions per second | peak GiB | |\n|---|---|---|---|\n")
    fill = table.measure("vision tower: images", lambda: fill_cache(session, one))
    small = 4 if tiny else 8
    if "plain" in options.parts:
        table.measure("train: plain recipe, batch 1", lambda: train_plain(session, one, 1, small))
        table.measure(
            "train: plain recipe, batch 8", lambda: train_plain(session, one, min(small, 8), 6)
        )
        for batch in (4,) if tiny else size.generate_batches:
            name = f"score: generate 10 tokens, batch {batch}"
            table.measure(name, lambda batch=batch: generate_plain(session, one, batch, 2))
    if "trl" in options.parts and importlib.util.find_spec("trl"):
        from trl_speed import trl_samples_per_second

        session.model.to(session.device)  # the parts that rest
        use_huggingfaces_forward(session)
        for batch, checkpointing in options.trl:
            name = f"train: TRL SFTTrainer, batch {batch}, checkpointing {checkpointing}"
            table.measure(
                name,
                lambda batch=batch, checkpointing=checkpointing: trl_samples_per_second(
                    session.model, session.processor, pixels, TEXT, batch, checkpointing
                ),
            )
        vqa.remove_gpu_syncs(session.model)
        session.vision_cache.offload_tower()
    if "ours" in options.parts:
        ours = table.measure("train: ours", lambda: train_ours(session, one, rows))
        if ours:
            speed, trainer = ours
            sys.stdout.write(
                f"plan: {trainer.plan}; fused optimizer, compiled layers: {config.compile_layers}\n"
            )
            charged = 1 / (1 / speed + 1 / fill / 2)
            sys.stdout.write(
                f"train: ours with the cache filled for one epoch of 3 folds: {charged:.2f} per second\n"
            )
            for batch in (4,) if tiny else (64,):
                name = f"score: ours, one order, batch {batch}"
                table.measure(name, lambda batch=batch: score_ours(session, one, batch))
            for batch in (4,) if tiny else (32,):
                name = f"score: ours, four orders, batch {batch}"
                table.measure(name, lambda batch=batch: score_ours(session, four, batch))
            if not tiny:
                trainer.prompts = lambda epoch: one[:128]
                print_idle("training under the cap", lambda: trainer.train_epoch(2, 0))
            trainer.model.unload()
            vqa.clear_memory()
    if "uncapped" in options.parts and not tiny:
        cap(None)
        rate = matmul_rate()
        sys.stdout.write(f"bf16 matrix products: {rate / 1e12:.0f} TFLOP/s\n")
        session.memory_plan = None
        ours = table.measure("train: ours, no cap", lambda: train_ours(session, one, rows))
        scoring = table.measure(
            "score: ours, one order, batch 64, no cap", lambda: score_ours(session, one, 64)
        )
        for name, speed, training in (
            ("training", ours and ours[0], True),
            ("scoring", scoring, False),
        ):
            if speed:
                share = (
                    speed
                    * question_flops(session.model.config.text_config, length, training)
                    / rate
                )
                sys.stdout.write(f"share of that rate in {name}: {100 * share:.1f} %\n")
        if ours:
            ours[1].prompts = lambda epoch: one[:256]
            print_idle("training", lambda: ours[1].train_epoch(2, 0))
            print_idle("scoring", lambda: score_ours(session, one, 64))
            sys.stdout.write(f"plan without the cap: {ours[1].plan}\n")
            ours[1].model.unload()
    for what in ("eager", "peft"):
        if what in options.parts:
            measure_less(session, what, table, one, rows, tiny)
    best = [name for name in table.rows if name.startswith("train: ") and "ours" not in name]
    table.ratios("train: ours", best)
    for name in [name for name in table.rows if name.startswith("score: ours")]:
        table.ratios(name, [other for other in table.rows if other.startswith("score: generate")])
    table.ratios("score: ours, one order, batch 64", ["score: ours, four orders, batch 32"])


def measure_less(session, what: str, table: Table, prompts, rows: int, tiny: bool) -> None:
    """Ours without the compiler, or also without our LoRA layers, under the cap: what each of them brings."""
    cap(None if tiny else CAP_GIB)
    config, use = session.config, vqa.use_fast_lora
    session.config, session.memory_plan = dataclasses.replace(config, compile_layers="off"), None
    if what == "peft":
        vqa.use_fast_lora = lambda adapted: None
    ours = table.measure(f"train: ours, {what} layers", lambda: train_ours(session, prompts, rows))
    if ours:
        sys.stdout.write(f"plan: {ours[1].plan}\n")
        ours[1].model.unload()
    session.config, vqa.use_fast_lora, session.memory_plan = config, use, None


def bench_turing(size: Size, folder: str, options) -> None:
    """The T4's path: fp16, told to be capability 7.5, without the flash and cuDNN kernels."""
    detect = vqa.detect_runtime
    gpu = {"index": 0, "name": "told to be a T4", "memory_gib": CAP_GIB, "capability": 7.5}
    reasons = ("told to be a T4",)
    vqa.detect_runtime = lambda *_: vqa.Runtime("local", (gpu,), "fp16", "sdpa", reasons)
    torch.backends.cuda.enable_flash_sdp(False)
    sys.stdout.write("T4 path: fp16 with a scaler, no flash attention\n")
    try:
        bench(size, folder, options)
    finally:
        vqa.detect_runtime = detect
        torch.backends.cuda.enable_flash_sdp(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("8b", "3b"), default="8b")
    parser.add_argument("--parts", default="plain,trl,ours,uncapped,eager,turing")
    parser.add_argument("--rows", type=int, default=288, help="questions in a timed epoch")
    parser.add_argument(
        "--tiny", action="store_true", help="the demo's model on this CPU: does everything run?"
    )
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    options.trl = [(2, True)] if options.tiny else TRL_SETTINGS[options.model]
    size, folder = SIZES[options.model], Path(tempfile.mkdtemp())
    vqa.setup_logging(folder, to_file=False)
    try:
        begin = time.perf_counter()
        path = str(vqa.DEMO / "tiny_qwen3_vl") if options.tiny else str(build(size, folder))
        sys.stdout.write(f"built in {time.perf_counter() - begin:.0f} s\n")
        bench(size, path, options)
        if "turing" in options.parts and not options.tiny:
            gc.collect()
            options.parts = ["ours"]
            bench_turing(size, path, options)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
