"""Speed and memory of models with recurrent layers, mixtures and tiles, on random weights.

    python tests/benchmarks/new_models.py               # on a GPU; some minutes a model
    python tests/benchmarks/new_models.py --models qwen3.5-35b-a3b --spread    # over two GPUs
    python tests/benchmarks/new_models.py --tiny        # on a CPU: does everything run?

For each model: weights of real size are drawn and written to disk, then every variant (4-bit or
16 bits, with flash-linear-attention and without) loads them in a process of its own by the
module's loading, trains by the plan that the module chooses, measures a few passes beside
`memory_costs`, and scores one and four choice orders. The questions are the demo's, with images
of 512 pixels square: about 360 tokens. Prints a table, and under it the passes.
--tiny takes small shapes and a few rows; its figures mean nothing.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

# What this names is hidden before transformers looks for it.
HIDE_KERNELS = "HIDE_FLASH_LINEAR_ATTENTION"
if os.environ.get(HIDE_KERNELS):
    sys.modules["fla"] = None
# As the workers have it; set before torch is imported.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/benchmarks")]

import twins  # noqa: E402
from bench_gpu import make_run_of, print_idleness, score_ours  # noqa: E402
from rehearsal import enlarge_demo  # noqa: E402

import vqa_helpers as vqa  # noqa: E402

T4_GIB = 15.0  # as nvidia-smi reports it
T4_CAP_GIB = 13.0  # that a process may allocate of it
SECONDS = 400  # that one variant may take
ROTATIONS = [vqa.TTAView("", turn) for turn in range(4)]


# === Shapes =======================================================================================
LARGE_TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
}
RECURRENT_TEXT = {  # what Qwen3.5's models share
    "vocab_size": 248320,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "bos_token_id": None,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
    },
}
DENSE_9B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
DENSE_27B = {
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 64,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "linear_num_value_heads": 48,
}
MIXTURE_35B = {
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "bos_token_id": None,
}
# What makes the shapes above small, for --tiny; a model takes those that it has.
SMALL_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 4096,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 48,
}
SMALL_SECTIONS = [2, 1, 1]  # of the rotary frequencies: time, height, width
SMALL_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}


SMALL_TILES = {"hidden_size": 32, "intermediate_size": 64}  # of InternVL's tower


def smaller(shapes: Mapping, small: Mapping) -> dict:
    """The shapes with the values of `small` in place of their own."""
    result = dict(shapes)
    for name in shapes.keys() & small.keys():
        result[name] = small[name]
    if "rope_parameters" in shapes:
        rope = {**shapes["rope_parameters"], "mrope_section": SMALL_SECTIONS}
        result["rope_parameters"] = rope
    return result


def recurrent_config(kind: str, text: Mapping, token: Mapping, tiny: bool):
    """The config of a Qwen3.5 model; `kind` is the class, `token` the special tokens' ids."""
    text = {**RECURRENT_TEXT, **text}
    vision = LARGE_TOWER
    if tiny:
        text = smaller(text, SMALL_TEXT)
        vision = smaller(vision, SMALL_TOWER)
    return getattr(transformers, kind)(
        text_config=text,
        vision_config={**vision, "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=False,
        **token,
    )


def qwen35_9b(token: Mapping, tiny: bool = False):
    """The config of Qwen3.5-9B."""
    return recurrent_config("Qwen3_5Config", DENSE_9B, token, tiny)


def qwen35_27b(token: Mapping, tiny: bool = False):
    """The config of Qwen3.5-27B."""
    return recurrent_config("Qwen3_5Config", DENSE_27B, token, tiny)


def qwen35_35b_a3b(token: Mapping, tiny: bool = False):
    """The config of Qwen3.5-35B-A3B."""
    return recurrent_config("Qwen3_5MoeConfig", MIXTURE_35B, token, tiny)


def internvl35_8b(token: Mapping, tiny: bool = False):
    """The config of InternVL3.5-8B: Qwen3-8B behind InternViT-300M, whose shapes are the default.

    In --tiny its tiles are those of the twin, whose processor cuts them.
    """
    text = QWEN3_8B
    tower_and_tiles = {}
    if tiny:
        text = smaller(QWEN3_8B, SMALL_TEXT)
        _, _, of_the_twin = twins.TWINS["internvl"]
        tower_and_tiles = {"vision_config": {**SMALL_TILES, **of_the_twin}, "image_seq_length": 4}
    return transformers.InternVLConfig(
        text_config={"model_type": "qwen3", **text},
        tie_word_embeddings=False,
        **tower_and_tiles,
        **token,
    )


@dataclasses.dataclass(frozen=True)
class Model:
    """One model to measure, and on which card."""

    name: str
    family: str  # transformers' model_type
    make_config: Callable  # from the special tokens' ids, and whether it is tiny
    quantizations: tuple[str, ...]  # each is measured
    cap_gib: float  # that a process may allocate of the GPU
    is_turing: bool  # whether the GPU is told to be a T4
    is_recurrent: bool  # whether flash-linear-attention changes anything


MODELS = {
    "qwen3.5-9b": Model(
        "Qwen3.5-9B", "qwen3_5", qwen35_9b, ("4bit",), T4_CAP_GIB, is_turing=True, is_recurrent=True
    ),
    "internvl3.5-8b": Model(
        "InternVL3.5-8B",
        "internvl",
        internvl35_8b,
        ("4bit",),
        T4_CAP_GIB,
        is_turing=True,
        is_recurrent=False,
    ),
    "qwen3.5-27b": Model(
        "Qwen3.5-27B",
        "qwen3_5",
        qwen35_27b,
        ("none", "4bit"),
        78.0,
        is_turing=False,
        is_recurrent=True,
    ),
    # One GPU with the memory of two T4s; --spread takes two GPUs.
    "qwen3.5-35b-a3b": Model(
        "Qwen3.5-35B-A3B",
        "qwen3_5_moe",
        qwen35_35b_a3b,
        ("4bit",),
        2 * T4_CAP_GIB,
        is_turing=True,
        is_recurrent=True,
    ),
}


# === Random weights ===============================================================================
def special_tokens(processor) -> dict[str, int]:
    """The ids that the model's config names."""
    token_id = processor.tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": processor.image_token_id,
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
    }


def make_processor(model: Model, folder: Path, tiny: bool):
    """The demo's processor, or InternVL's own with the demo's tokenizer."""
    if model.family != "internvl":
        return transformers.AutoProcessor.from_pretrained(twins.TINY)
    twin = twins.build_twin("internvl", folder / "twin")
    processor = transformers.AutoProcessor.from_pretrained(twin)
    if not tiny:
        processor.image_processor.size = {"height": 448, "width": 448}
        processor.image_processor.max_patches = 12
        processor.image_seq_length = 256  # tokens of a tile
    return processor


def module_groups(model) -> dict[str, torch.nn.Module]:
    """Name -> module, which together hold all weights: each layer, and what stands around them."""
    groups = {}

    def walk(name: str, module: torch.nn.Module) -> None:
        parts = dict(module.named_children())
        is_list = isinstance(module, torch.nn.ModuleList)
        is_large = isinstance(module, transformers.PreTrainedModel)
        own = list(module.named_parameters(recurse=False))
        if parts and not own and (is_list or is_large):
            for part, child in parts.items():
                walk(f"{name}.{part}" if name else part, child)
        elif own or any(True for _ in module.parameters()):
            groups[name] = module

    walk("", model)
    return groups


def draw_weights(model, name: str, device: str) -> dict[str, torch.Tensor]:
    """Random weights of the module of that name, as its own class initialises them."""
    owner = model  # the innermost pretrained model around it knows how
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        around = model.get_submodule(".".join(parts[:end]))
        if isinstance(around, transformers.PreTrainedModel):
            owner = around
    module = model.get_submodule(name)
    module.to_empty(device=device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
        for part in module.modules():
            owner._init_weights(part)
    weights = {f"{name}.{key}": value.cpu() for key, value in module.state_dict().items()}
    module.to("meta")
    return weights


def build(model: Model, folder: Path, tiny: bool) -> Path:
    """A folder that from_pretrained loads; one file for each layer, drawn on the GPU.

    Raises OSError where the disk has too little room.
    """
    processor = make_processor(model, folder, tiny)
    config = model.make_config(special_tokens(processor), tiny)
    target = folder / "model"
    target.mkdir()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.float32 if tiny else torch.bfloat16)
    with torch.device("meta"):
        empty = transformers.AutoModelForImageTextToText.from_config(config)
    torch.set_default_dtype(torch.float32)
    needed = empty.num_parameters() * empty.dtype.itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder} has {free / 2**30:.0f} GiB, {needed / 2**30:.0f} are needed")
    config.save_pretrained(target)
    processor.save_pretrained(target)
    torch.manual_seed(0)
    files = {}
    for number, name in enumerate(module_groups(empty)):
        weights = draw_weights(empty, name, device)
        file = f"model-{number:05}.safetensors"
        save_file(weights, target / file, {"format": "pt"})
        files.update(dict.fromkeys(weights, file))
    index = {"metadata": {}, "weight_map": files}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def roomiest_folder() -> Path:
    """A temporary folder on the disk, or in the shared memory, whichever has more room."""
    places = [Path(tempfile.gettempdir()), Path("/dev/shm")]
    existing = [place for place in places if place.is_dir()]
    place = max(existing, key=lambda place: shutil.disk_usage(place).free)
    return Path(tempfile.mkdtemp(dir=place))


# === One variant, in a process of its own =========================================================
@dataclasses.dataclass(frozen=True)
class Variant:
    """What one process measures."""

    model: str  # its name in MODELS
    folder: str  # with the weights
    data: str  # with the questions
    quantization: str
    hides_kernels: bool  # whether flash-linear-attention is hidden
    gpus: int
    rows: int  # questions in the timed epoch
    parts: tuple[str, ...]
    tiny: bool

    @property
    def label(self) -> str:
        """The variant in words, without the model."""
        numbers = "16 bits" if self.quantization == "none" else self.quantization
        if not MODELS[self.model].is_recurrent:
            return numbers
        return f"{numbers}, {'without' if self.hides_kernels else 'with'} fla"

    @property
    def is_turing(self) -> bool:
        """Whether the GPU is told to be a T4; the kernels need a later card of its memory."""
        model = MODELS[self.model]
        return model.is_turing and not self.tiny and (self.hides_kernels or not model.is_recurrent)


def use_kernels_anyway() -> None:
    """Take flash-linear-attention also where it refuses a Hopper card with its version of Triton.

    Its gradients are wrong there; it takes the time and the memory that it takes where it is used.
    """
    if hasattr(vqa, "decide_recurrent_kernels"):
        vqa.decide_recurrent_kernels = lambda *_, **__: (True, "flash-linear-attention: forced")
    from fla.ops.common import chunk_o

    chunk_o.IS_NVIDIA_HOPPER = False


def limit_gpus(variant: Variant) -> None:
    """Take no more of each GPU than the variant's card has."""
    cap = MODELS[variant.model].cap_gib / variant.gpus
    for gpu in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(gpu).total_memory
        share = min(1.0, cap * 2**30 / total)
        torch.cuda.set_per_process_memory_fraction(share, gpu)


@contextlib.contextmanager
def told_to_be_turing(gpus: int) -> Iterator[None]:
    """T4s are found instead of the GPUs that are there: fp16, no flash attention."""
    found = []
    for index in range(gpus):
        found.append(
            {
                "index": index,
                "name": "told to be a T4",
                "memory_gib": T4_GIB,
                "capability": 7.5,
            }
        )
    runtime = vqa.Runtime("local", tuple(found), "fp16", "sdpa", ("told to be T4s",))
    detect_runtime = vqa.detect_runtime
    vqa.detect_runtime = lambda *_: runtime
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        yield
    finally:
        vqa.detect_runtime = detect_runtime
        torch.backends.cuda.enable_flash_sdp(True)


def make_config(variant: Variant) -> vqa.Config:
    """The settings of a variant: 32 questions a step, as many in a pass as the plan finds."""
    tiny = variant.tiny
    return vqa.Config.preset(
        "demo",
        model_id=variant.folder,
        data_dir=variant.data,
        cache_dir=str(Path(variant.data).parent / "features"),
        batch_size=8 if tiny else 16,
        grad_accum_steps=1 if tiny else 2,
        gradient_checkpointing=True,
        lora_dropout=0.05,
        save_every_steps=10**9,
        save_every_minutes=1e9,
        compile_layers="off" if tiny else "on",  # where the family is compiled
        quantization="none" if tiny else variant.quantization,
        spread_model=variant.gpus > 1,
        infer_batch_size=4 if tiny else 32,
        num_workers=0,
    )


def peak_gib() -> float:
    """Most GiB allocated on the fullest GPU since the last reset."""
    gpus = range(torch.cuda.device_count())
    return max((torch.cuda.max_memory_allocated(gpu) / 2**30 for gpu in gpus), default=0.0)


def allocated_gib() -> float:
    """GiB allocated now on the fullest GPU."""
    vqa.clear_memory()
    gpus = range(torch.cuda.device_count())
    return max((torch.cuda.memory_allocated(gpu) / 2**30 for gpu in gpus), default=0.0)


def computed_costs(session: vqa.Session, tokens: int, with_fla: bool) -> vqa.MemoryCosts:
    """What `memory_costs` says of this session."""
    config = session.config
    compiled = session.family.is_compiled and config.compile_layers == "on"
    shapes = session.model.config
    precision = session.runtime.precision
    frugal = session.device.type == "cuda" and session.runtime.attention == "sdpa"
    return vqa.memory_costs(config, shapes, tokens, precision, compiled, with_fla, frugal)


def measure_passes(trainer: vqa.FoldTrainer, prompt: vqa.Prompt, costs) -> list[dict]:
    """What single passes over copies of `prompt` add to what rests, beside the computed GiB."""
    session = trainer.session
    layers = len(session.decoder_layers)
    at_rest = allocated_gib()
    rows = []
    for questions in (2, 8):
        for stored in (0, max(2, layers // 4), layers):
            seconds, peak = vqa.measure_pass(session, [prompt] * questions, stored)
            if math.isinf(seconds):
                break
            row = {"questions": questions, "stored": stored, "GiB": peak / 2**30 - at_rest}
            plan = vqa.MemoryPlan(questions, stored)
            gradients = costs.rows["LoRA and gradients"] / 2
            row["computed"] = costs.peak(plan)["activations"] + gradients
            rows.append(row)
    vqa.clear_memory()
    return rows


def time_training(trainer: vqa.FoldTrainer, prompts: list, rows: int) -> dict:
    """Questions per second of an epoch after a short one, the plan, and the peak."""
    trainer.epoch_prompts = lambda epoch: prompts[:32] if epoch == 0 else prompts[:rows]
    vqa.use_plan(trainer.session, trainer.plan)
    trainer.train_epoch(0, 0)
    vqa.reset_peak_memory()
    speed = trainer.train_epoch(1, 0)
    plan = trainer.plan
    return {
        "in a pass": plan.micro_batch,
        "layers kept": plan.stored_layers,
        "training, questions/s": speed,
        "training, GiB": peak_gib(),
    }


def time_scoring(session: vqa.Session, frame) -> dict:
    """Questions per second in one order and in four, the latter's peak and the ratio of costs."""
    speeds = {}
    for orders in (1, 4):
        planned = vqa.plan_prompts(session, frame, ROTATIONS[:orders])
        prompts = [item.prompt for item in planned]
        vqa.reset_peak_memory()
        speeds[orders] = score_ours(session, prompts, session.config.infer_batch_size)
    return {
        "one order, questions/s": speeds[1],
        "four orders, questions/s": speeds[4],
        "cost of four / one": speeds[1] / speeds[4],
        "scoring, GiB": peak_gib(),
    }


def measure(variant: Variant) -> dict:
    """All figures of a variant by name; "passes" is a list of those of `measure_passes`."""
    if not variant.tiny:
        limit_gpus(variant)
    if MODELS[variant.model].is_recurrent and not variant.hides_kernels:
        use_kernels_anyway()
    config = make_config(variant)
    frame = vqa.load_competition(variant.data).train.assign(fold=1)
    begin = time.perf_counter()
    session = vqa.open_session(config, frame.iloc[0])
    result = {
        "loading, s": time.perf_counter() - begin,
        "loading, GiB": peak_gib(),
    }
    order = [(0, 1, 2, 3)]
    prompts = [vqa.make_prompt(session, frame, row, order) for row in range(len(frame))]
    longest = max(prompts, key=lambda prompt: len(prompt.input_ids))
    result["tokens"] = len(longest.input_ids)
    costs = computed_costs(session, result["tokens"], not variant.hides_kernels)
    begin = time.perf_counter()
    budget = vqa.pixel_budget(config, session.processor)
    session.vision_cache.fill(frame, budget, lambda *_: None)
    session.vision_cache.offload_tower()
    result["images/s"] = len(frame) / (time.perf_counter() - begin)
    trainer = vqa.FoldTrainer(session, make_run_of(session, frame), 0)
    if "train" in variant.parts:
        result.update(time_training(trainer, prompts, variant.rows))
    result["at rest, GiB"] = allocated_gib()
    gradients = costs.rows["LoRA and gradients"] / 2  # there are none between two steps
    result["at rest, computed"] = sum(costs.rows.values()) - gradients
    result["loading, computed"] = costs.loaded
    result["training, computed"] = sum(costs.peak(trainer.plan).values())
    if "passes" in variant.parts and torch.cuda.is_available():
        result["passes"] = measure_passes(trainer, longest, costs)
    if "profile" in variant.parts and torch.cuda.is_available():
        trainer.epoch_prompts = lambda epoch: prompts[:32]
        vqa.use_plan(session, trainer.plan)
        print_idleness("training", trainer.train_epoch, 2, 0)
    if "score" in variant.parts:
        result.update(time_scoring(session, frame.head(variant.rows // 2)))
    return result


def run_variant(variant: Variant) -> dict:
    """`measure` in a process of its own; "failed" holds the last line of one that failed."""
    place = Path(tempfile.mkdtemp())
    (place / "variant.json").write_text(json.dumps(dataclasses.asdict(variant)))
    environment = dict(os.environ)
    if variant.hides_kernels:
        environment[HIDE_KERNELS] = "1"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[: variant.gpus])
    command = [sys.executable, __file__, "--measure", str(place)]
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return {"failed": f"longer than {SECONDS} s", "log": str(error.stdout)[-3000:]}
    result = {"log": done.stdout}
    if done.returncode == 0:
        result.update(json.loads((place / "result.json").read_text()))
    else:
        result["failed"] = done.stdout.strip().splitlines()[-1]
    return result


def measure_in_this_process(place: Path) -> None:
    """What the process that `run_variant` starts does."""
    vqa.setup_logging(place, to_file=False)
    fields = json.loads((place / "variant.json").read_text())
    variant = Variant(**{**fields, "parts": tuple(fields["parts"])})
    with told_to_be_turing(variant.gpus) if variant.is_turing else contextlib.nullcontext():
        result = measure(variant)
    (place / "result.json").write_text(json.dumps(result))


# === All variants =================================================================================
COLUMNS = (  # of the printed table
    "tokens",
    "loading, s",
    "loading, GiB",
    "loading, computed",
    "in a pass",
    "layers kept",
    "training, questions/s",
    "training, GiB",
    "training, computed",
    "at rest, GiB",
    "at rest, computed",
    "one order, questions/s",
    "four orders, questions/s",
    "cost of four / one",
    "scoring, GiB",
)
TOLD_WORDS = ("Decision", "MemoryPlan", "do not fit", "falling back")


def in_table(value) -> str:
    """A figure as the table shows it."""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def print_row(name: str, result: Mapping) -> None:
    """Print a row of the table, then what the process decided, and its passes."""
    if "failed" in result:
        cells = [f"failed: {result['failed'][:300]}"]
    else:
        cells = [in_table(result.get(column, "")) for column in COLUMNS]
    sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
    told = [line for line in result["log"].splitlines() if any(word in line for word in TOLD_WORDS)]
    if "failed" in result:
        told = result["log"].splitlines()[-40:]
    elif "GPU idle" in result["log"]:
        told += result["log"].partition("GPU idle")[2].splitlines()
    for line in told:
        sys.stdout.write(f"    {line[:300]}\n")
    for one_pass in result.get("passes", ()):
        sys.stdout.write(f"    pass: {json.dumps(one_pass)}\n")
    sys.stdout.flush()


def variants_of(name: str, folder: Path, data: Path, options) -> Iterator[Variant]:
    """Every variant of a model that is to be measured."""
    model = MODELS[name]
    # Whether flash-linear-attention is hidden.
    kernels = (False,)
    if model.is_recurrent:
        kernels = (False, True) if importlib.util.find_spec("fla") else (True,)
    for hides_kernels in kernels:
        for quantization in model.quantizations:
            variant = Variant(
                model=name,
                folder=str(folder),
                data=str(data),
                quantization=quantization,
                hides_kernels=hides_kernels,
                gpus=2 if options.spread else 1,
                rows=24 if options.tiny else options.rows,
                parts=tuple(options.parts.split(",")),
                tiny=options.tiny,
            )
            if re.search(options.only, variant.label):
                yield variant


def measure_model(name: str, options) -> None:
    """Build a model, print a row for each of its variants, and delete it."""
    model = MODELS[name]
    if model.family not in vqa.FAMILIES:
        sys.stdout.write(f"| {model.name} | skipped: family {model.family} is not known here |\n")
        return
    place = roomiest_folder()
    try:
        begin = time.perf_counter()
        rows = 24 if options.tiny else options.rows
        pixels = 96 if options.tiny else 512
        data = enlarge_demo(place / "data", rows, pixels, test_rows=4)
        try:
            folder = build(model, place, options.tiny)
        except OSError as error:
            sys.stdout.write(f"| {model.name} | skipped: {error} |\n")
            return
        seconds = time.perf_counter() - begin
        sys.stdout.write(f"    {model.name} built in {place}, {seconds:.0f} s\n")
        for variant in variants_of(name, folder, data, options):
            begin = time.perf_counter()
            result = run_variant(variant)
            print_row(f"{model.name}, {variant.label}", result)
            sys.stdout.write(f"    the process took {time.perf_counter() - begin:.0f} s\n")
    finally:
        shutil.rmtree(place)


def parse_arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument(
        "--parts",
        default="train,passes,score",
        help="what to measure; there is also profile: the GPU's kernels in training",
    )
    parser.add_argument("--only", default="", help="variants whose labels match, as a pattern")
    parser.add_argument("--rows", type=int, default=128, help="questions in a timed epoch")
    parser.add_argument("--spread", action="store_true", help="over two GPUs told to be T4s")
    parser.add_argument("--tiny", action="store_true", help="small shapes on this CPU")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # see run_variant
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.measure is not None:
        measure_in_this_process(options.measure)
        return
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(0)
        sys.stdout.write(f"{torch.cuda.device_count()} x {gpu}, torch {torch.__version__}\n")
    sys.stdout.write(f"| model | {' | '.join(COLUMNS)} |\n")
    sys.stdout.write(f"|{'---|' * (1 + len(COLUMNS))}\n")
    for name in options.models.split(","):
        measure_model(name, options)


if __name__ == "__main__":
    main()
