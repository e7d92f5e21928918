"""What a decoder layer keeps for its backward pass, and how fast: frugal layers beside plain ones.

    python tests/benchmarks/layer_memory.py           # on a GPU: Qwen3-VL-8B's language model
    python tests/benchmarks/layer_memory.py --curve   # on a GPU: four layers, and losses
    python tests/benchmarks/layer_memory.py --family qwen3.5          # on a GPU: its two kinds
    python tests/benchmarks/layer_memory.py --family qwen3.5 --curve  # on a GPU: their gradients
    python tests/benchmarks/layer_memory.py --tiny    # on a CPU: does everything run?

Random weights in 4 bits, LoRA with dropout, questions of 366 tokens. First one layer: KiB that it
keeps a token, milliseconds forward and backward, and how far its gradients are from those of the
plain layer. Then the losses of 60 optimizer steps (--curve; four layers, nothing else), or the
whole language model told to be a T4 (13 GiB, fp16, no flash attention) by the planner's own
measurements, then with all of the GPU's memory. Of Qwen3.5-9B (--family qwen3.5) a recurrent layer
and one with attention, in one call figures, in another one gradients: each takes four
compilations. A part that fails says so, and the others go on.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

# As the workers have it; set before torch is imported.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
import bitsandbytes
import peft
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/benchmarks")]

from bench_gpu import CAP_GIB, cap_memory, qwen3_8b  # noqa: E402
from new_models import qwen35_9b  # noqa: E402

import vqa_helpers as vqa  # noqa: E402

TOKENS = 366  # of a question
STEP = 32  # questions of an optimizer step
SECONDS = 100  # after which no new part begins


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def wait() -> None:
    """Until the GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocated() -> int:
    """Bytes on the GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


# === The model ====================================================================================
LINEARS = [  # in 4 bits, and with LoRA
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("in_proj_qkv", "in_proj_z", "out_proj"),
]


def make_recurrent_config(tiny: bool):
    """The config of four layers of Qwen3.5-9B, three of them recurrent, or of small ones."""
    config = qwen35_9b({"image_token_id": 5}, tiny).text_config
    config.num_hidden_layers = 4
    config.layer_types = config.layer_types[:4]
    config.vocab_size = 512
    config._attn_implementation = "sdpa"
    return config


def use_recurrent_rule(text) -> None:
    """Let the recurrent layers of a language model compute as the module's workers do."""
    model = SimpleNamespace(
        config=SimpleNamespace(model_type="qwen3_5"), model=SimpleNamespace(language_model=text)
    )
    gpus = vqa.detect_runtime().gpus
    vqa.use_recurrent_layers(model, *vqa.decide_recurrent_kernels(gpus))


def make_config(tiny: bool):
    """The config of the language model of Qwen3-VL-8B, or of a small one."""
    token = dict.fromkeys(
        ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"], 5
    )
    config = qwen3_8b(token).text_config
    if tiny:
        config.hidden_size = 64
        config.intermediate_size = 192
        config.num_hidden_layers = 2
        config.num_attention_heads = 4
        config.num_key_value_heads = 2
        config.head_dim = 16
        config.vocab_size = 512
        config.rope_parameters["mrope_section"] = [4, 2, 2]
    config._attn_implementation = "sdpa"
    return config


def in_4_bits(linear: torch.nn.Linear, dtype: torch.dtype) -> torch.nn.Module:
    """The layer with its weights in NF4, as transformers loads it."""
    packed = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    packed.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    return packed.to(linear.weight.device)


def build(tiny: bool, layers: int | None, device: str, dtype: torch.dtype, recurrent: bool):
    """(language model in 4 bits with LoRA, what `use_fast_layers` needs of a session)."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    kind = transformers.Qwen3_5TextModel if recurrent else transformers.Qwen3VLTextModel
    config = make_recurrent_config(tiny) if recurrent else make_config(tiny)
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device(device):
        text = kind(config)
    torch.set_default_dtype(torch.float32)
    text.requires_grad_(False)
    for layer in text.layers:
        for parent in list(layer.children()):
            for name, child in list(parent.named_children()):
                if name in LINEARS:
                    setattr(parent, name, in_4_bits(child, dtype))
    if recurrent:
        use_recurrent_rule(text)
    config = vqa.Config(
        batch_size=STEP // 2,
        grad_accum_steps=2,
        gradient_checkpointing=True,
        compile_layers="on",
    )
    lora = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=LINEARS,
    )
    adapted = peft.get_peft_model(text, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:  # an adapter starts as the identity, which hides its gradients
            torch.nn.init.normal_(parameter, std=0.02)
    vqa.use_fast_lora(adapted)
    vqa.use_fast_lora = lambda adapted: None  # once is enough
    session = SimpleNamespace(
        config=config,
        device=torch.device(device),
        family=SimpleNamespace(is_compiled=True),
        decoder_layers=text.layers,
        language_model=text,
        model=adapted,
    )
    gc.collect()
    vqa.clear_memory()
    return adapted.train(), session


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute the layers."""

    frugal: bool
    compiled: bool

    @property
    def name(self) -> str:
        """The variant in words."""
        kind = "frugal" if self.frugal else "plain"
        return f"{kind}, {'compiled' if self.compiled else 'not compiled'}"

    def use(self, adapted, session) -> None:
        """Let the model's layers be computed so."""
        compile_layers = "on" if self.compiled else "off"
        session.config = dataclasses.replace(session.config, compile_layers=compile_layers)
        vqa.decide_frugal = lambda session: (self.frugal, self.name)
        vqa.use_fast_layers(session, adapted, 10**6)


PLAIN = Variant(frugal=False, compiled=True)
FRUGAL = Variant(frugal=True, compiled=True)
NOT_COMPILED = [Variant(frugal=False, compiled=False), Variant(frugal=True, compiled=False)]


# === One layer ====================================================================================
def layer_inputs(adapted, questions: int, device: str, dtype: torch.dtype) -> tuple:
    """Hidden states of so many questions, and the layer's other inputs."""
    text = adapted.base_model.model
    hidden = text.config.hidden_size
    generator = torch.Generator(device).manual_seed(1)
    states = torch.randn(questions, TOKENS, hidden, generator=generator, device=device)
    positions = torch.arange(TOKENS, device=device).expand(3, questions, TOKENS)
    states = states.to(dtype)
    options = {"position_embeddings": text.rotary_emb(states, positions), "attention_mask": None}
    return states.requires_grad_(), options


def one_pass(layer, states, options) -> tuple:
    """Bytes kept with the input, seconds forward and backward, all gradients."""
    layer.zero_grad()
    states.grad = None
    torch.manual_seed(2)
    wait()
    before = allocated()
    start = time.perf_counter()
    output = layer(states, **options)
    wait()
    middle = time.perf_counter()
    kept = allocated() - before - output.nbytes + states.nbytes  # the input is kept, too
    # Small, as a mean loss's are: larger ones overflow in half precision.
    gradient = torch.linspace(-1e-3, 1e-3, output.numel(), device=output.device)
    gradient = gradient.view_as(output).to(output.dtype)
    wait()
    again = time.perf_counter()
    output.backward(gradient)
    wait()
    end = time.perf_counter()
    gradients = [states.grad, *(value.grad for value in layer.parameters() if value.requires_grad)]
    flat = torch.cat([value.float().flatten() for value in gradients])
    return kept, middle - start, end - again, flat


def measure_layer(adapted, session, layer, questions: int, dtype: torch.dtype) -> None:
    """One layer in all variants."""
    states, options = layer_inputs(adapted, questions, session.device.type, dtype)
    name = "a recurrent layer" if hasattr(layer, "linear_attn") else "one layer"
    say(f"| {name} | KiB a token kept | ms forward | ms backward | first, s |")
    say("|---|---|---|---|---|")
    found = {}
    for variant in [*NOT_COMPILED, PLAIN, FRUGAL]:
        with guarded(variant.name):
            variant.use(adapted, session)
            begin = time.perf_counter()
            one_pass(layer, states, options)
            first = time.perf_counter() - begin
            passes = [one_pass(layer, states, options) for _ in range(2 if first > 60 else 7)]
            kept = passes[-1][0]
            forward = statistics.median(one[1] for one in passes)
            backward = statistics.median(one[2] for one in passes)
            found[variant] = forward + backward
            of_token = kept / questions / TOKENS / 1024
            say(
                f"| {variant.name} | {of_token:.1f} | {1000 * forward:.2f} "
                f"| {1000 * backward:.2f} | {first:.1f} |"
            )
    if PLAIN in found and FRUGAL in found:
        ratio = found[PLAIN] / found[FRUGAL]
        say(f"{name}: frugal, compiled is {ratio:.2f} times as fast as plain, compiled")


def set_dropout(adapted, rate: float) -> None:
    """Let all LoRA layers drop that share of their inputs."""
    for layer in adapted.modules():
        if hasattr(layer, "lora_dropout"):
            layer.lora_dropout["default"].p = rate


def compare_gradients(adapted, session, layer, dtype: torch.dtype) -> None:
    """How far the gradients of one layer are from the plain one's, without dropout."""
    set_dropout(adapted, 0.0)
    states, options = layer_inputs(adapted, 4, session.device.type, dtype)
    plain = None
    for variant in [*NOT_COMPILED, PLAIN, FRUGAL]:
        with guarded(variant.name):
            variant.use(adapted, session)
            *_, gradients = one_pass(layer, states, options)
            plain = gradients if plain is None else plain
            distance = ((gradients - plain).norm() / plain.norm()).item()
            mixer = "recurrent, " if hasattr(layer, "linear_attn") else ""
            say(f"gradients, {mixer}{variant.name}, from plain, not compiled: {distance:.2e}")


def train_curve(adapted, session, variant: Variant, dtype: torch.dtype) -> list[float]:
    """The loss at each of 60 optimizer steps on 32 made-up questions, without dropout."""
    variant.use(adapted, session)
    text = adapted.base_model.model
    device = session.device
    generator = torch.Generator(device).manual_seed(5)
    shape = (32, 48, text.config.hidden_size)
    embedded = torch.randn(shape, generator=generator, device=device)
    letters = torch.randint(4, (32,), generator=generator, device=device)
    head = torch.randn(4, shape[-1], generator=generator, device=device) / shape[-1] ** 0.5
    parameters = [value for value in adapted.parameters() if value.requires_grad]
    start = [value.detach().clone() for value in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=5e-5)
    losses = []
    for step in range(60):
        rows = torch.arange(8 * step, 8 * step + 8, device=device) % 32
        states = text(inputs_embeds=embedded[rows].to(dtype), use_cache=False).last_hidden_state
        logits = states[:, -1].float() @ head.T
        loss = torch.nn.functional.cross_entropy(logits, letters[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        for value, before in zip(parameters, start, strict=True):
            value.copy_(before)
    return losses


def compare_curves(adapted, session, dtype: torch.dtype) -> None:
    """The losses of a training with plain layers and with frugal ones, side by side."""
    set_dropout(adapted, 0.0)
    curves = {}
    for variant in (NOT_COMPILED[0], PLAIN, FRUGAL):
        with guarded(f"curve, {variant.name}"):
            curves[variant.name] = train_curve(adapted, session, variant, dtype)
    say("| step | " + " | ".join(curves) + " |")
    say("|---" * (1 + len(curves)) + "|")
    for step in (0, 1, 3, 7, 15, 31, 59):
        losses = [f"{curve[step]:.4f}" for curve in curves.values()]
        say(f"| {step + 1} | " + " | ".join(losses) + " |")


# === The whole language model =====================================================================
def use_made_up_questions(adapted, session, dtype: torch.dtype) -> None:
    """Let the planner's passes run on random embeddings instead of prompts."""
    text = adapted.base_model.model
    device = session.device

    def collate(_, prompts) -> dict:
        return {"questions": len(prompts), "input_ids": torch.empty(len(prompts), TOKENS)}

    def hidden_states(_, batch):
        count = batch["questions"]
        embedded = torch.randn(count, TOKENS, text.config.hidden_size, device=device, dtype=dtype)
        positions = torch.arange(TOKENS, device=device).expand(3, count, TOKENS)
        return text(
            inputs_embeds=embedded, position_ids=positions, use_cache=False
        ).last_hidden_state[:, -1]

    vqa.collate = collate
    vqa.answer_hidden_states = hidden_states
    vqa.training_loss = lambda session, states, batch: states.float().square().mean()


def questions_per_second(session, micro_batch: int, stored: int) -> tuple[float, float]:
    """Speed of a pass, the median of some, and its peak in GiB."""
    prompts = [None] * micro_batch
    times = []
    for _ in range(4):
        seconds, peak = vqa.measure_pass(session, prompts, stored)
        times.append(seconds)
    return micro_batch / statistics.median(times[1:]), peak / 2**30


def measure_capped(adapted, session, variant: Variant) -> float:
    """Questions a second under the T4's memory, by the planner's best plan."""
    variant.use(adapted, session)
    begin = time.perf_counter()
    parameters = vqa.trainable_parameters(adapted).values()
    state_bytes = 3 * 4 * sum(value.numel() for value in parameters)  # moments, average
    prompt = SimpleNamespace(input_ids=[0] * TOKENS)
    plan = vqa.plan_memory(session, [prompt], state_bytes)
    took = time.perf_counter() - begin
    speed, peak = questions_per_second(session, plan.micro_batch, plan.stored_layers)
    say(
        f"| {variant.name}, {CAP_GIB} GiB | {plan.micro_batch} | {plan.stored_layers} "
        f"| {speed:.2f} | {peak:.2f} | planned in {took:.0f} s |"
    )
    return speed


def measure_uncapped(adapted, session, variant: Variant, micro_batch: int) -> float:
    """Questions a second with every layer kept."""
    variant.use(adapted, session)
    layers = len(session.decoder_layers)
    speed, peak = questions_per_second(session, micro_batch, layers)
    name = f"{variant.name}, no cap"
    say(f"| {name} | {micro_batch} | {layers} | {speed:.2f} | {peak:.2f} | |")
    return speed


@contextlib.contextmanager
def guarded(name: str) -> Iterator[None]:
    """Within, an error is printed, and what follows goes on."""
    try:
        yield
    except Exception as error:
        say(f"| {name} | failed: {type(error).__name__}: {str(error)[:300]} |")
        gc.collect()


def measure_model(adapted, session, dtype: torch.dtype, start: float) -> None:
    """The whole model: under the cap, then without it."""
    use_made_up_questions(adapted, session, dtype)
    say("| whole model | in a pass | layers kept | questions/s | peak GiB | |")
    say("|---|---|---|---|---|---|")
    capped = functools.partial(measure_capped, adapted, session)
    parts: list[tuple[str, float | None, Callable, Variant]] = []
    for variant in (FRUGAL, PLAIN):
        parts.append((f"{CAP_GIB} GiB", CAP_GIB, capped, variant))
    for micro_batch in (STEP, STEP // 4):
        for variant in (FRUGAL, PLAIN):
            work = functools.partial(measure_uncapped, adapted, session, micro_batch=micro_batch)
            parts.append((f"no cap, {micro_batch} a pass", None, work, variant))
    for variant in NOT_COMPILED[::-1]:
        parts.append((f"{CAP_GIB} GiB, not compiled", CAP_GIB, capped, variant))
    speeds = {}
    for title, cap, work, variant in parts:
        spent = time.perf_counter() - start
        if spent > SECONDS:
            say(f"| {variant.name}, {title} | left out after {spent:.0f} s |")
            continue
        with guarded(f"{variant.name}, {title}"):
            gc.collect()
            cap_memory(cap)
            speeds[title, variant.frugal] = work(variant=variant)
    for title in dict.fromkeys(part[0] for part in parts):
        if (title, True) in speeds and (title, False) in speeds:
            ratio = speeds[title, True] / speeds[title, False]
            verdict = "FASTER" if ratio > 1.02 else "NOT FASTER"
            say(f"{verdict}: {title}: frugal / plain = {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model, on a CPU")
    parser.add_argument("--curve", action="store_true", help="four layers, and the losses of both")
    parser.add_argument("--family", choices=["qwen3-vl", "qwen3.5"], default="qwen3-vl")
    options = parser.parse_args()
    tiny = options.tiny
    start = time.perf_counter()
    logging.basicConfig(level=logging.INFO, format="    %(asctime)s %(message)s")
    device = "cpu" if tiny else "cuda"
    dtype = torch.float32 if tiny else torch.float16
    if tiny:
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
        vqa.plan_memory = lambda session, *_: vqa.MemoryPlan(2, 1)
        vqa.measure_pass = measure_pass_on_cpu
    else:
        say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        torch.backends.cuda.enable_flash_sdp(False)
    recurrent = options.family == "qwen3.5"
    adapted, session = build(tiny, 4 if options.curve else None, device, dtype, recurrent)
    say(f"built in {time.perf_counter() - start:.0f} s: {allocated() / 2**30:.2f} GiB")
    layers = session.decoder_layers
    for layer in (layers[0], layers[-1]) if recurrent else (layers[-1],):
        if not recurrent or not options.curve:
            with guarded("one layer"):
                measure_layer(adapted, session, layer, 2 if tiny else 16, dtype)
        gc.collect()
        if options.curve:
            compare_gradients(adapted, session, layer, dtype)
    if options.curve and not recurrent:
        compare_curves(adapted, session, dtype)
    elif not recurrent:
        measure_model(adapted, session, dtype, start)
    say(f"took {time.perf_counter() - start:.0f} s")


def measure_pass_on_cpu(
    session, prompts, stored: int, is_captured: bool = False
) -> tuple[float, float]:
    """As the module's `measure_pass`, which needs a GPU."""
    vqa.recompute_layers(session, stored)
    start = time.perf_counter()
    batch = vqa.collate(session, prompts)
    vqa.training_loss(session, vqa.answer_hidden_states(session, batch), batch).backward()
    session.model.zero_grad(set_to_none=True)
    return time.perf_counter() - start, 0.0


if __name__ == "__main__":
    main()
