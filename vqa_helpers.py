"""Multiple-choice visual question answering, from competition files to a submission: what the notebook calls.

The notebook's process reads tables, plans and plots; whatever touches a GPU happens in worker processes that this same
file starts (`python vqa_helpers.py worker ...`). Importing it has no effect: nothing is seeded, logged or moved to a
GPU, torch is imported at its first use, and transformers, peft and bitsandbytes inside the functions that use them.

Sections, in the order in which data flows: Config, Runtime, Logging, Memory, Checkpoint, Data, Leakage and folds,
Prompt, Model, Vision cache, Training, Fold training, Inference, Calibration and metrics, Ensemble, Submission,
Evaluation, Figures and report, Worker and preflight.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import dataclasses
import difflib
import gc
import hashlib
import html
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
from packaging.version import Version
from PIL import Image, ImageOps
from scipy import special
from scipy.optimize import minimize, minimize_scalar
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.stats import binomtest
from tqdm import tqdm

__version__ = "0.1.0"
CHOICES = ("a", "b", "c", "d")
HERE = Path(__file__).resolve().parent
LOGGER = logging.getLogger("vqa")


class _Lazy:
    """A module imported at its first use: the notebook's process plans and plots without ever loading torch."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self._name), attribute)


torch = _Lazy("torch")

# === Config ==========================================================================================================
PRESETS = {
    # Two free 16 GB cards, one process and whole folds on each: what the defaults are made for.
    "kaggle_t4x2": {},
    "colab_t4": {"batch_size": 2, "grad_accum_steps": 4, "use_tta": False, "n_folds": 2, "train_folds": (0,)},
    "colab_a100": {"quantization": "none", "batch_size": 16, "lora_r": 32, "lora_alpha": 64, "infer_batch_size": 32}
    | {"max_pixels": 1024 * 32 * 32},
    "max_score": {"n_folds": 5, "num_epochs": 3, "tta_scales": (0.9, 1.0, 1.1), "infer_max_pixels": 1280 * 32 * 32},
    "single": {"model_id": "Qwen/Qwen3-VL-4B-Instruct", "use_kfold": False, "num_epochs": 3},
    "quick_test": {"model_id": "Qwen/Qwen2.5-VL-3B-Instruct", "use_sample": True, "sample_size": 200, "num_epochs": 1}
    | {"n_folds": 2, "train_folds": (0,), "use_tta": False},
    # Three million parameters on a CPU: nothing to quantise, and far too small for the large models' learning rates.
    "demo": {"model_id": "data/tiny_qwen3_vl", "quantization": "none", "gradient_checkpointing": False}
    | {"num_epochs": 8, "batch_size": 8, "grad_accum_steps": 1, "learning_rate": 1e-3, "lora_dropout": 0.0}
    | {"infer_batch_size": 32, "num_workers": 0},
}


@dataclass(frozen=True)
class Config:
    """All settings of one run. Unknown fields and impossible values raise a ValueError that names the field."""

    preset_name: str = "custom"  # the preset this started from; part of the default run name
    # Model
    model_id: str = "Qwen/Qwen3-VL-8B-Instruct"  # hub id or local folder
    quantization: str = "4bit"  # "4bit" (NF4, double), "8bit" or "none"; language model only
    precision: str = "auto"  # "auto", "fp16", "bf16" or "fp32"; auto follows the card
    attn_implementation: str = "auto"  # "auto", "sdpa", "flash_attention_2" or "eager"
    gradient_checkpointing: bool = True  # recompute activations in the backward pass: slower, far less memory
    lora_r: int = 16  # rank
    lora_alpha: int = 32  # scale of the update is alpha / r
    lora_dropout: float = 0.05  # probability
    # Images: one pixel budget for training and inference
    image_size: int | None = None  # pixels; sets max_pixels to image_size squared; the aspect ratio is always kept
    min_pixels: int | None = None  # pixels; None: 4 merged patches of the model
    max_pixels: int | None = None  # pixels; None: 768 merged patches of the model
    infer_max_pixels: int | None = None  # pixels; adds views at this budget, used only where OOF gains
    # Data
    data_dir: str | None = None  # folder with train.csv, test.csv, sample_submission.csv; None: search, else the demo
    use_sample: bool = False  # train on a random subset of the rows
    sample_size: int = 200  # rows of that subset
    max_fallback_share: float = 0.01  # share of unreadable images above which the run stops
    prompt_templates: Mapping[str, str] = field(default_factory=dict)  # question type -> template, replaces the default
    # Folds
    n_folds: int = 3
    use_kfold: bool = True  # False: one holdout of 1 / n_folds of the rows
    train_folds: tuple[int, ...] | None = None  # None: all
    # Optimisation
    num_epochs: int = 2
    batch_size: int = 4  # questions per forward pass
    grad_accum_steps: int = 2  # forward passes per optimizer step
    learning_rate: float = 1e-4  # peak, reached after the warm-up, then cosine to zero
    warmup_ratio: float = 0.06  # share of all optimizer steps
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    loss: str = "choices"  # "choices": cross-entropy over the four letters; "vocabulary": over every token
    label_smoothing: float = 0.05  # spread over the choices that exist; loss "choices" only
    shuffle_choices: bool = True  # a new choice order for each question and epoch
    use_ema: bool = True  # also keep an exponential average of the adapter; used only where OOF says so
    ema_decay: float = 0.999  # upper bound; step t uses min(ema_decay, (1 + t) / (10 + t))
    use_swa: bool = False  # also keep the plain average from swa_start_epoch on; used only where OOF says so
    swa_start_epoch: int = 1  # epochs before averaging starts; the learning rate stays constant from there
    use_early_stopping: bool = False
    early_stopping_patience: int = 2  # epochs
    early_stopping_min_delta: float = 0.001  # accuracy
    # Inference
    use_tta: bool = True
    tta_rotations: int = 4  # choice orders: 1, 2 or 4
    tta_scales: tuple[float, ...] = (1.0,)  # factors on the pixel budget
    use_batch_inference: bool = True  # False: one question at a time
    infer_batch_size: int = 16  # questions per forward pass
    zeroshot_rows: int = 256  # training rows scored with the base model before training; 0: all of them
    use_temperature_scaling: bool = True
    ensemble_method: str = "mean"  # over folds: "mean", "vote" or "weighted" (views weighted on OOF, folds averaged)
    # Running
    seed: int = 42
    deterministic: bool = True  # deterministic cuDNN
    num_workers: int = 2  # image decoding processes per worker
    time_budget_hours: float | None = None  # hours; training stops at an epoch's end after 75 % of it; None: no limit
    save_every_epoch: bool = True
    save_every_minutes: float = 20.0  # minutes between checkpoints inside an epoch
    log_level: str = "INFO"
    log_to_file: bool = True
    output_dir: str = "outputs"
    run_name: str | None = None  # None: preset and fingerprint, the same in every session

    def __post_init__(self):
        for name in ("train_folds", "tta_scales"):  # JSON brings lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for check, name, needs in _config_rules(self):
            if not check:
                raise ValueError(f"Config field {name!r} is {getattr(self, name)!r}; it needs {needs}")

    @classmethod
    def preset(cls, name: str, **overrides) -> Config:
        """The named preset with some fields replaced; "auto" picks one for the detected hardware."""
        if name == "auto":
            name = choose_preset(detect_runtime(), has_competition=find_competition(overrides.get("data_dir")) != DEMO)
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}{_nearest(name, ['auto', *PRESETS])}")
        known = [item.name for item in dataclasses.fields(cls)]
        for override in overrides:
            if override not in known:
                raise ValueError(f"Unknown config field {override!r}{_nearest(override, known)}")
        return cls(**{"preset_name": name, **PRESETS[name], **overrides})

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every field that can change a result; where files lie and how loudly we log cannot."""
        relevant = {name: value for name, value in dataclasses.asdict(self).items() if name not in _BOOKKEEPING}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()

    @property
    def rows_to_use(self) -> int | None:
        """Training rows to sample, or None for all of them."""
        return self.sample_size if self.use_sample else None

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / (self.run_name or f"{self.preset_name}-{self.fingerprint[:8]}")

    @property
    def model_path(self) -> str:
        """A local folder as an absolute path (also relative to this file), anything else as a hub id."""
        folders = [folder for folder in (Path(self.model_id), HERE / self.model_id) if folder.is_dir()]
        return str(folders[0].resolve()) if folders else self.model_id

    @property
    def folds_to_train(self) -> tuple[int, ...]:
        """`train_folds`, or every fold; only the first one where a single holdout is asked for."""
        if not self.use_kfold:
            return (0,)
        return self.train_folds if self.train_folds is not None else tuple(range(self.n_folds))

    def table(self) -> pd.DataFrame:
        """Every field with its value and the default it differs from, for the notebook."""
        values, defaults = (pd.Series(dataclasses.asdict(config)).astype(str) for config in (self, Config()))
        return pd.DataFrame({"value": values, "default, where it differs": defaults.where(values != defaults, "")})


# Fields that cannot change a result.
_BOOKKEEPING = {
    *("data_dir", "output_dir", "run_name", "log_level", "log_to_file"),
    *("num_workers", "save_every_epoch", "save_every_minutes", "time_budget_hours"),
}
_KINDS = {"int": int, "float": (int, float), "str": str, "bool": bool, "tuple": tuple, "Mapping": Mapping}
_ALLOWED = {
    "quantization": ("4bit", "8bit", "none"),
    "precision": ("auto", "fp16", "bf16", "fp32"),
    "attn_implementation": ("auto", "sdpa", "flash_attention_2", "eager"),
    "loss": ("choices", "vocabulary"),
    "ensemble_method": ("mean", "vote", "weighted"),
    "log_level": ("DEBUG", "INFO", "WARNING", "ERROR"),
}
_RANGES = (  # what the fields need, its check, their names
    ("at least 2", lambda value: value >= 2, "n_folds sample_size"),
    ("at least 1", lambda value: value >= 1, "lora_r lora_alpha num_epochs batch_size grad_accum_steps"),
    ("at least 1", lambda value: value >= 1, "infer_batch_size early_stopping_patience swa_start_epoch"),
    ("at least 0", lambda value: value >= 0, "zeroshot_rows num_workers weight_decay early_stopping_min_delta seed"),
    ("0 <= value < 1", lambda value: 0 <= value < 1, "lora_dropout warmup_ratio label_smoothing ema_decay"),
    ("0 <= value < 1", lambda value: 0 <= value < 1, "max_fallback_share"),
    ("a positive number", lambda value: value > 0, "learning_rate max_grad_norm save_every_minutes time_budget_hours"),
    ("a positive number", lambda value: value > 0, "image_size min_pixels max_pixels infer_max_pixels"),
    ("1, 2 or 4", lambda value: value in (1, 2, 4), "tta_rotations"),
)


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error message: the known name that looks most like `name`, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _has_kind(value, annotation: str) -> bool:
    if value is None:
        return annotation.endswith("None")
    kind = _KINDS[re.match(r"\w+", annotation).group()]
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _config_rules(config: Config) -> Iterator[tuple[bool, str, str]]:
    """Triples of (holds, field, what the field needs). Kinds come first, so that later rules may compare values."""
    for item in dataclasses.fields(config):
        yield _has_kind(getattr(config, item.name), item.type), item.name, item.type
    for name, allowed in _ALLOWED.items():
        yield getattr(config, name) in allowed, name, f"one of {', '.join(allowed)}"
    for needs, holds, names in _RANGES:
        for value, name in ((getattr(config, name), name) for name in names.split()):
            yield value is None or holds(value), name, needs
    scales = config.tta_scales
    yield all(0.25 <= scale <= 4 for scale in scales) and 1.0 in scales, "tta_scales", "factors in [0.25, 4] with 1.0"
    folds = range(config.n_folds) if config.train_folds is None else config.train_folds
    yield set(folds) <= set(range(config.n_folds)), "train_folds", f"folds below {config.n_folds}"
    yield 0 < len(folds) == len(set(folds)), "train_folds", "at least one fold, and none twice"
    late = config.use_swa and config.swa_start_epoch >= config.num_epochs
    yield not late, "swa_start_epoch", f"an epoch below num_epochs, {config.num_epochs}"
    yield set(config.prompt_templates) <= set(QUESTION_TYPES), "prompt_templates", f"keys among {QUESTION_TYPES}"


def load_config(preset: str = "auto", overrides: Mapping | None = None, environ: Mapping = os.environ) -> Config:
    """Preset, then `overrides`, then the VQA_ variables; ValueError for what is unknown, impossible or not JSON."""
    variables = {"data_dir": "DATA_DIR", "model_id": "MODEL", "output_dir": "OUTPUT_DIR", "run_name": "RUN_NAME"}
    places = {name: environ.get(f"VQA_{variable}") for name, variable in variables.items()}
    fields = dict(overrides or {}) | {name: place for name, place in places.items() if place}
    text = environ.get("VQA_OVERRIDES") or "{}"
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"VQA_OVERRIDES is not valid JSON ({error}): {text!r}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f'VQA_OVERRIDES must be a JSON object such as {{"num_epochs": 1}}, not {text!r}')
    config = Config.preset(environ.get("VQA_PRESET") or preset, **(fields | parsed))
    return dataclasses.replace(config, data_dir=str(find_competition(config.data_dir)))


DEMO = HERE / "data"
COMPETITION_FILES = ("train.csv", "test.csv", "sample_submission.csv")


def find_competition(data_dir: str | Path | None = None, mounts: Sequence[str] = ("/kaggle/input",)) -> Path:
    """`data_dir` (FileNotFoundError without files), the folder in `mounts` (ValueError if several) or else the demo."""

    def missing(folder: Path) -> list[str]:
        return [name for name in COMPETITION_FILES if not (folder / name).is_file()]

    if data_dir is not None:
        if names := missing(Path(data_dir)):
            raise FileNotFoundError(f"{data_dir} has no {', '.join(names)}; set data_dir to the folder that has them")
        return Path(data_dir).resolve()
    patterns = ["*/" * depth + "train.csv" for depth in range(1, 5)]
    places = {path.parent for mount in mounts for pattern in patterns for path in Path(mount).glob(pattern)}
    # A mounted copy of this toolkit brings the demo along.
    folders = sorted(folder for folder in places if not missing(folder) and folder.resolve() != DEMO)
    if len(folders) > 1:
        raise ValueError(f"Several folders hold a competition: {[*map(str, folders)]}; set data_dir to one of them")
    return folders[0] if folders else DEMO


# === Runtime =========================================================================================================
@dataclass(frozen=True)
class Runtime:
    """The machine, read without initialising CUDA, and the one precision decision with its reason."""

    platform: str  # "kaggle", "colab" or "local"
    gpus: tuple[dict, ...]  # name, memory_gib, capability of each visible GPU
    precision: str  # "fp16", "bf16" or "fp32"
    attention: str  # implementation name for transformers
    reasons: tuple[str, ...]


def _visible_gpus() -> tuple[dict, ...]:
    """The GPUs this process may use, from nvidia-smi: asking torch for a capability would initialise CUDA."""
    command = ["nvidia-smi", "--query-gpu=index,name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    if shutil.which(command[0]) is None:
        return ()
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:  # the tool without a driver, as on a machine whose accelerator is switched off
        LOGGER.warning("No GPU is used: nvidia-smi failed with %r", answer.stdout.strip() or answer.stderr.strip())
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.strip().splitlines()]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = [row[0] for row in rows] if chosen is None else [part.strip() for part in chosen.split(",")]
    return tuple(
        {"index": int(index), "name": name, "memory_gib": float(memory) / 1024, "capability": float(capability)}
        for index, name, memory, capability in rows
        if index in wanted
    )


def decide_precision(precision: str, gpus: Sequence[Mapping]) -> tuple[str, str]:
    """Number format and reason; RuntimeError for a GPU below capability 7.0 (P100), on which torch no longer runs."""
    oldest = min(gpus, key=lambda gpu: gpu["capability"], default={"capability": math.inf})
    capability = oldest["capability"]
    if capability < 7.0:
        raise RuntimeError(f"{oldest['name']} is too old for torch (capability below 7.0); choose 'GPU T4 x2' instead")
    if precision != "auto":
        return precision, f"precision {precision}: set in the config"
    if not gpus:
        return "fp32", "precision fp32: no GPU"
    if capability < 8.0:
        return "fp16", f"precision fp16 with a GradScaler: capability {capability} has no bf16 arithmetic"
    return "bf16", f"precision bf16 without a scaler: capability {capability}"


def decide_attention(attention: str, gpus: Sequence[Mapping]) -> tuple[str, str]:
    """SDPA, or FlashAttention-2 where every GPU has capability 8.0 and the package is importable; with the reason."""
    if attention != "auto":
        return attention, f"attention {attention}: set in the config"
    if not gpus or min(gpu["capability"] for gpu in gpus) < 8.0:
        return "sdpa", "attention sdpa: FlashAttention-2 needs capability 8.0"
    if importlib.util.find_spec("flash_attn") is None:
        return "sdpa", "attention sdpa: flash_attn is not installed"
    return "flash_attention_2", "attention flash_attention_2: installed, capability 8.0 or higher"


def detect_runtime(precision: str = "auto", attn_implementation: str = "auto") -> Runtime:
    """What this machine is and the decisions that follow from it; CUDA stays uninitialised."""
    signs = {"KAGGLE_KERNEL_RUN_TYPE": "kaggle", "COLAB_RELEASE_TAG": "colab"}  # Kaggle's image sets both
    platform = next((name for variable, name in signs.items() if variable in os.environ), "local")
    gpus = _visible_gpus()
    dtype, why_dtype = decide_precision(precision, gpus)
    attention, why_attention = decide_attention(attn_implementation, gpus)
    return Runtime(platform, gpus, dtype, attention, (why_dtype, why_attention))


def choose_preset(runtime: Runtime, has_competition: bool) -> str:
    """The preset for the detected hardware. Raises RuntimeError for competition files without a GPU."""
    if not has_competition:
        return "demo"
    if not runtime.gpus:
        raise RuntimeError("Competition files but no GPU: switch on the accelerator (or choose the preset yourself)")
    if min(gpu["memory_gib"] for gpu in runtime.gpus) >= 38:
        return "colab_a100"
    return "kaggle_t4x2" if len(runtime.gpus) > 1 else "colab_t4"


# What a plain Kaggle or Colab machine lacks; requirements.txt asks for the same versions.
MINIMUM_VERSIONS = {
    "transformers": "5.18",  # takes mm_encoder_outputs
    "peft": "0.20",
    "bitsandbytes": "0.46.1",
    "accelerate": "1.6",
    "qwen-vl-utils": "0.0.14",
}


def missing_requirements(minimum: Mapping[str, str] = MINIMUM_VERSIONS) -> list[str]:
    """pip requirements for every package that is absent or too old; nothing is imported to find out."""
    missing = []
    for name, version in minimum.items():
        try:
            present = Version(importlib.metadata.version(name)) >= Version(version)
        except importlib.metadata.PackageNotFoundError:
            present = False
        if not present:
            missing.append(f"{name}>={version}")
    return missing


def seed_everything(seed: int, deterministic: bool = True) -> None:
    """Seed Python, NumPy and torch; `deterministic` also pins cuDNN's algorithms."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cuda.enable_cudnn_sdp(False)  # its masked backward gives NaN on Hopper: pytorch issue 196678


# === Logging =========================================================================================================
def setup_logging(log_dir: str | Path, level: int | str = logging.INFO, to_file: bool = True) -> logging.Logger:
    """Log to the console and to `log_dir`/run.log with timestamps. Safe to call again: handlers are replaced."""
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if to_file:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(Path(log_dir) / "run.log", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
        LOGGER.addHandler(handler)
    LOGGER.setLevel(level)
    LOGGER.propagate = False
    return LOGGER


@dataclass(frozen=True)
class MetricLogger:
    """Appends one JSON object a line, so that a killed run keeps every line it wrote."""

    path: str | Path

    def log(self, **values) -> None:
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **values}, ensure_ascii=False) + "\n")


@dataclass
class ProgressFile:
    """What a worker is doing now, in a small JSON file that the notebook polls; written at most twice a second."""

    path: Path
    written: float = 0.0

    def update(self, stage: str, done: int, total: int, **details) -> None:
        if done < total and time.monotonic() - self.written < 0.5:
            return
        self.written = time.monotonic()
        atomic_write(self.path, json.dumps({"stage": stage, "done": done, "total": total, **details}), durable=False)


# === Memory ==========================================================================================================
def _cuda_is_in_use() -> bool:
    return "torch" in sys.modules and torch.cuda.is_initialized()


def memory_summary() -> dict[str, float]:
    """Memory in GiB: this process's resident set and, where CUDA is in use, allocated, reserved and peak."""
    summary = {"rss_gib": psutil.Process().memory_info().rss / 2**30}
    if _cuda_is_in_use():
        summary["gpu_gib"] = torch.cuda.memory_allocated() / 2**30
        summary["gpu_reserved_gib"] = torch.cuda.memory_reserved() / 2**30
        summary["gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {name: round(value, 2) for name, value in summary.items()}


def clear_memory(logger: logging.Logger | None = None) -> dict[str, float]:
    """Collect garbage and give cached GPU blocks back; returns and logs the summary afterwards."""
    gc.collect()
    if _cuda_is_in_use():
        torch.cuda.empty_cache()
    summary = memory_summary()
    if logger is not None:
        logger.info("Memory after clearing: %s", summary)
    return summary


@contextlib.contextmanager
def track_peak_memory(label: str, logger: logging.Logger = LOGGER) -> Iterator[dict]:
    """Yield a dict that holds, after the block, its wall time in seconds and its peak memory in GiB."""
    if _cuda_is_in_use():
        torch.cuda.reset_peak_memory_stats()
    report: dict = {"label": label}
    start = time.perf_counter()
    yield report
    report |= {"seconds": round(time.perf_counter() - start, 1), **memory_summary()}
    logger.info("%s: %s", label, {name: value for name, value in report.items() if name != "label"})


# === Checkpoint ======================================================================================================
class CheckpointError(RuntimeError):
    """A checkpoint is damaged or belongs to another configuration."""


def require_same_run(path: Path, found: str, expected: str) -> None:
    """Raise CheckpointError unless the fingerprint stored in `path` is the run's."""
    if found != expected:
        raise CheckpointError(f"{path} belongs to another configuration or data set; choose a new run_name")


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder, and syncs only what is open for writing
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: str | Path, content: bytes | str, durable: bool = True) -> None:
    """Replace `path` by `content` so that a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        if durable:
            _fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        _fsync(path.parent)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckpointManager:
    """Folders of one tensor file, one state file and metadata, each committed whole and verified before use."""

    def __init__(self, directory: str | Path, keep: int = 2, logger: logging.Logger = LOGGER):
        self.directory = Path(directory)
        self.keep = keep
        self.logger = logger

    def save(self, step: int, tensors: Mapping, state: Mapping, metadata: Mapping) -> Path:
        """Commit a checkpoint: `tensors` as safetensors, `state` for torch.load(weights_only=True), `metadata` JSON."""
        from safetensors.torch import save_file

        # The folder gets its name last, so that a kill at any point leaves the checkpoints before it intact.
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=self.directory))
        on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(on_cpu, temporary / "tensors.safetensors")
        torch.save(dict(state), temporary / "state.pt")
        (temporary / "metadata.json").write_text(json.dumps({"step": step, **metadata}), encoding="utf-8")
        manifest = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        for path in temporary.iterdir():
            _fsync(path)
        final = self.directory / f"step_{step:08d}"
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _fsync(self.directory)
        self.prune()
        return final

    @staticmethod
    def problem(path: Path) -> str | None:
        """Why the checkpoint at `path` cannot be trusted, or None."""
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            damaged = [name for name, digest in manifest.items() if file_sha256(path / name) != digest]
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return f"SHA-256 differs: {', '.join(damaged)}" if damaged else None

    def latest_verified(self) -> Path | None:
        """The newest checkpoint whose manifest verifies; the ones passed over are logged with the reason."""
        for path in sorted(self.directory.glob("step_*"), reverse=True):
            problem = self.problem(path)
            if problem is None:
                return path
            self.logger.warning("Skipped checkpoint %s: %s", path, problem)
        return None

    def restore(self, path: Path) -> tuple[dict, dict, dict]:
        """(tensors, state, metadata), all on the CPU. Raises CheckpointError if the manifest does not verify."""
        from safetensors.torch import load_file

        problem = self.problem(path)
        if problem is not None:
            raise CheckpointError(f"{path} is damaged ({problem}); delete it to continue from an older one")
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        metadata = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        return load_file(path / "tensors.safetensors"), state, metadata

    def prune(self) -> None:
        """Delete what is older than the newest `keep` verified checkpoints, and leftovers of killed writes."""
        paths = sorted(self.directory.glob("step_*"))
        verified = [path for path in paths if self.problem(path) is None]
        outdated = [path for path in paths if verified and path < verified[-self.keep :][0]]
        for path in [*outdated, *self.directory.glob(".incomplete-*")]:
            shutil.rmtree(path)


def _checkpoint_weights(model) -> dict:
    """Trainable parameters and buffers of the state dict; under every name, where two share one tensor."""
    kept = {name for name, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad}
    kept |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name in kept}


def save_checkpoint(model, optimizer, scheduler, epoch, fold, metrics, path, logger=None) -> Path:
    """Save any module's trainable weights and buffers with optimizer and scheduler (either may be None) in one file."""
    content = {
        "model": _checkpoint_weights(model),
        "optimizer": optimizer.state_dict() if optimizer is not None else None,
        "scheduler": scheduler.state_dict() if scheduler is not None else None,
        "epoch": epoch,
        "fold": fold,
        # NumPy scalars would need unpickling.
        "metrics": {name: value.item() if isinstance(value, np.generic) else value for name, value in metrics.items()},
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, buffer.getvalue())
    if logger is not None:
        logger.info("Saved checkpoint %s (epoch %s, fold %s, %d bytes)", path, epoch, fold, buffer.tell())
    return Path(path)


def load_checkpoint(model, optimizer, scheduler, path, logger=None) -> tuple:
    """Load what `save_checkpoint` wrote; (epoch, fold, metrics), or CheckpointError, changing nothing, if unfit."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    differing = sorted(set(_checkpoint_weights(model)) ^ set(content["model"]))
    if differing:
        raise CheckpointError(f"{path} does not fit the model; differing keys: {differing}")
    wanted = {name: part for name, part in {"optimizer": optimizer, "scheduler": scheduler}.items() if part is not None}
    absent = [name for name in wanted if content[name] is None]
    if absent:
        raise CheckpointError(f"{path} was saved without {' and '.join(absent)}")
    model.load_state_dict(content["model"], strict=False)
    for name, part in wanted.items():
        part.load_state_dict(content[name])
    if logger is not None:
        logger.info("Loaded checkpoint %s (epoch %s, fold %s)", path, content["epoch"], content["fold"])
    return content["epoch"], content["fold"], content["metrics"]


# === Data ============================================================================================================
COLUMNS = ("id", "path", "question", *CHOICES, "answer")
TABLE_COLUMNS = {"train.csv": COLUMNS, "test.csv": COLUMNS[:-1], "sample_submission.csv": ("id", "answer")}
GREY_IMAGE = "<grey image>"  # image_path of a test row without a usable image; `load_image` knows it
MAX_IMAGE_SIDE = 4096  # pixels; more than any pixel budget asks for, and it bounds the memory of one image
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # not EPS, for example: it starts Ghostscript
# What PIL's decoders are known to raise on damaged files.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, RuntimeError)
_DECODE_ERRORS += (struct.error, zlib.error, Image.DecompressionBombError)


class DataError(ValueError):
    """The competition's files cannot be used as they are; the message names file, line, column, value and remedy."""


class ImageError(DataError):
    """An image that cannot be decoded; the message names its path."""


@dataclass(frozen=True)
class Competition:
    """Validated tables of one competition; rows in the order of the files, index 0..n-1.

    train and test: id, image_path, question, a, b, c, d, type, line (in the CSV), image_ok, width, height (as loaded),
    pixel_hash, dhash; train also answer (letter) and label (0-3). sample: id and answer under the file's own names.
    """

    train: pd.DataFrame
    test: pd.DataFrame
    sample: pd.DataFrame
    fallbacks: Counter  # how often each fallback was taken; 0 for one that was not
    fingerprint: str  # changes with any byte of the tables and any name or size of an image
    data_dir: Path


def _refuse_first(file: str, frame: pd.DataFrame, wrong: pd.Series, column: str, problem: str) -> None:
    """DataError about the first row of `frame` where `wrong` is true, if there is one."""
    for line, value in frame.loc[wrong, ["line", column]].head(1).to_numpy():
        raise DataError(f"{file}, line {line}, column {column!r}, value {value[:80]!r}: {problem}")


def _read_text(path: Path, fallbacks: Counter) -> str:
    """The file as UTF-8 (with or without a mark), else cp949. Never latin-1, which turns Korean into nonsense."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; set data_dir to the folder with {', '.join(TABLE_COLUMNS)}")
    for encoding in ("utf-8-sig", "cp949"):
        with contextlib.suppress(UnicodeDecodeError):
            fallbacks["csv_read_as_cp949"] += encoding == "cp949"
            return path.read_bytes().decode(encoding)
    raise DataError(f"{path.name}: neither UTF-8 nor cp949; save it as UTF-8")


def _read_records(path: Path, fallbacks: Counter) -> list[tuple[int, list[str]]]:
    """Line (1-based) and fields of the header and of every record; blank lines are skipped."""
    text, records, line = _read_text(path, fallbacks), [], 1
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for fields in reader:
            if any("\0" in field for field in fields):
                raise csv.Error("holds a NUL byte")
            if fields:
                records.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path.name}, line {line}: {error}; check the quotes, or download the file again") from error
    return records or [(1, [])]


def _read_table(path: Path, fallbacks: Counter) -> tuple[pd.DataFrame, list[str]]:
    """The columns used, verbatim, plus `line`, and the header. (pandas would shift short rows and lose "None".)"""
    (_, header), *records = _read_records(path, fallbacks)
    columns = ["path" if name.strip().casefold() == "image" else name.strip().casefold() for name in header]
    wrong = [column for column in TABLE_COLUMNS[path.name] if columns.count(column) != 1]
    if wrong:
        raise DataError(f"{path.name}, line 1: columns {wrong} must occur once ('image' means 'path'); found {header}")
    if not records:
        raise DataError(f"{path.name}: has a header but no rows; download it again")
    for line, fields in records:
        if len(fields) != len(columns):
            problem = f"{len(fields)} fields but {len(columns)} columns; quote a field that holds a comma"
            raise DataError(f"{path.name}, line {line}, row {fields[0]!r}: {problem}")
    frame = pd.DataFrame([fields for _, fields in records], columns=columns, dtype=object)
    frame = frame[[column for column in COLUMNS if columns.count(column) == 1]]
    frame = frame.assign(line=[line for line, _ in records])
    wrong = frame["id"].duplicated() | (frame["id"].str.strip() == "")
    _refuse_first(path.name, frame, wrong, "id", "is blank or repeats an earlier row's; give each row its own")
    return frame, [column.strip() for column in header]


def _read_sample(path: Path, test_ids: Iterable[str], fallbacks: Counter) -> pd.DataFrame:
    """The sample submission under its own column names; its ids must be those of the test file, in any order."""
    frame, header = _read_table(path, fallbacks)
    if [column.casefold() for column in header] != ["id", "answer"]:
        raise DataError(f"{path.name}, line 1: the columns must be id, answer; found {header}")
    different = sorted(set(test_ids) ^ set(frame["id"]))
    if different:
        raise DataError(f"{path.name}: ids {different[:3]} are only in it or only in test.csv; use a pair that fits")
    return frame[["id", "answer"]].set_axis(header, axis=1)


def _check_questions(split: str, frame: pd.DataFrame, fallbacks: Counter) -> None:
    """Every row needs two choices; a blank choice is masked later, repeated choices and blank questions are counted."""
    choices = frame[[*CHOICES]].map(str.strip)
    filled = (choices != "").sum(axis=1)
    _refuse_first(f"{split}.csv", frame, filled < 2, "id", "fewer than two choices are filled; complete the row")
    text = frame["question"].str.cat(frame[[*CHOICES]], sep="\n")
    taken = {
        "repeated_choices": choices.where(choices != "").nunique(axis=1) < filled,
        "blank_question": frame["question"].str.strip() == "",
        "special_tokens_neutralised": text.map(neutralise_special_tokens) != text,
    }
    fallbacks.update({f"{split}_{name}": int(rows.sum()) for name, rows in taken.items()})


def answer_labels(frame: pd.DataFrame, name: str = "train.csv") -> np.ndarray:
    """Labels 0-3, shape (n,), of the `answer` column; DataError names the first row that is not certain.

    A column of letters (a, A, (a), a. or full width) or of 1-4 is read as such, any other also as texts of a choice.
    """
    choices, answer = frame[[*CHOICES]].map(str.strip), frame["answer"].str.strip()
    plain = answer.map(lambda text: unicodedata.normalize("NFKC", text)).str.casefold()
    mark = plain.str.extract(r"^\(?([a-d1-4])[.)]?$", expand=False)
    marks = "1234" if mark.isin([*"1234"]).all() else "abcd"
    meant = pd.DataFrame({choice: mark == each for choice, each in zip(CHOICES, marks, strict=True)})
    if not mark.isin([*"abcd"]).all():
        meant |= choices.eq(answer, axis=0)
    unclear = (meant.sum(axis=1) != 1) | (meant & (choices == "")).any(axis=1)
    _refuse_first(name, frame, unclear, "answer", "does not mean exactly one filled choice; write its letter a-d")
    return meant.to_numpy().argmax(axis=1)


def _find_images(frame: pd.DataFrame, root: Path, split: str, fallbacks: Counter) -> list[str]:
    """Path of every row's image, existing or not; DataError for a URL or a path, link included, that leaves `root`."""
    text = frame["path"].str.strip().str.replace("\\", "/")
    places = [[str(root / folder / path) for folder in ("", "images", split)] for path in text]
    found = [next(filter(os.path.isfile, paths), None) for paths in places]
    files = defaultdict(set)  # listed only where it is needed
    for path in map(str, root.rglob("*") if None in found else ()):
        files[unicodedata.normalize("NFC", path).casefold()].add(path)
    for row in (row for row, path in enumerate(found) if path is None):  # another case or Unicode form of the name?
        similar = set().union(*(files[unicodedata.normalize("NFC", path).casefold()] for path in places[row]))
        found[row] = similar.pop() if len(similar) == 1 else places[row][0]  # no guess between several
        fallbacks["image_found_under_other_spelling"] += os.path.isfile(found[row])
    outside = np.array([not Path(os.path.realpath(path)).is_relative_to(root) for path in found])
    outside |= text.str.match(r"[A-Za-z][\w+.-]*:").to_numpy()
    _refuse_first(
        f"{split}.csv", frame, outside, "path", "is a URL or leads out of the data folder; copy the file there"
    )
    return found


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB as a viewer shows it: grey of 16 or 32 bits or floats scaled to 8 bits, transparency laid on white."""
    if image.mode[0] in "IF":  # PIL's own conversion would clip it to white or black
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        low, high = values.min(), values.max()
        if low >= 0:  # the smallest usual range that holds all values
            ranges = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535, high)
            low, high = 0, next(top for top in ranges if high <= top)
        image = Image.fromarray(np.rint((values - low) / ((high - low) or 1) * 255).astype(np.uint8))
    if image.has_transparency_data:  # plain conversion would paint transparent pixels in their hidden colour
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def grey_image(side: int = 224) -> Image.Image:
    """The neutral image that stands in where a test row has none."""
    return Image.new("RGB", (side, side), (128, 128, 128))


def load_image(path: str | Path, max_side: int = MAX_IMAGE_SIDE) -> Image.Image:
    """Upright RGB, longer side at most `max_side`, transparency on white; ImageError for what cannot be decoded."""
    if str(path) == GREY_IMAGE:
        return grey_image()
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:  # reads the header; PIL refuses a decompression bomb
            scale = max_side / max(image.size)
            image.draft("RGB", [math.ceil(side * scale) for side in image.size])  # decodes a big JPEG at 1/2 to 1/8
            rgb = _to_rgb(ImageOps.exif_transpose(image))
    except _DECODE_ERRORS as error:
        raise ImageError(f"{path}: not a readable image ({type(error).__name__}: {error}); replace the file") from error
    rgb.thumbnail((max_side, max_side))
    return rgb


def _image_facts(path: str) -> dict:
    """Size, content hash and perceptual hash of one image from one full decode; no hashes where it fails."""
    image, pixel_hash, dhash = grey_image(), "", ""
    try:
        image = load_image(path)
        pixel_hash = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
        dhash = np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes().hex()  # 64 bits: does it get lighter to the right?
    except ImageError as error:
        LOGGER.warning("%s", error)
    facts = {"image_path": path, "image_ok": pixel_hash != "", "width": image.width, "height": image.height}
    return facts | {"pixel_hash": pixel_hash, "dhash": dhash}


def _attach_images(frame: pd.DataFrame, root: Path, split: str, limit: float, fallbacks: Counter) -> pd.DataFrame:
    """Add image_path and the facts of every image, each file decoded once, on all cores; unusable ones are counted."""
    frame = frame.assign(image_path=_find_images(frame, root, split, fallbacks))
    quiet = warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)  # errors are enough
    with quiet, ThreadPoolExecutor(os.cpu_count()) as pool:
        facts = pd.DataFrame(pool.map(_image_facts, frame["image_path"].unique()))
    frame = frame.merge(facts, how="left", on="image_path")
    _count_lost(frame, ~frame["image_ok"], split, "unusable_image", limit, fallbacks)
    return frame.drop(columns="path").assign(type=frame["question"].map(question_type))


def _count_lost(frame: pd.DataFrame, lost: pd.Series, split: str, what: str, limit: float, fallbacks: Counter) -> None:
    """Log and count the rows of `frame` where `lost` is true; DataError above the share `limit`."""
    lines = frame.loc[lost, "line"].tolist()
    fallbacks[f"{split}_{what}"] += len(lines)
    if lines:
        LOGGER.warning("%s.csv: %s in %d rows, the first on lines %s", split, what, len(lines), lines[:20])
    if len(lines) > limit * len(frame):
        remedy = f"repair the data or raise max_fallback_share={limit}"
        raise DataError(f"{split}.csv: {what} in {len(lines)} of {len(frame)} rows, first on line {lines[0]}; {remedy}")


def _load_train(root: Path, limit: float, sample_size: int | None, seed: int, fallbacks: Counter) -> pd.DataFrame:
    """Training rows with labels; rows without an answer or a usable image are dropped and counted."""
    frame, _ = _read_table(root / "train.csv", fallbacks)
    blank = frame["answer"].str.strip() == ""
    _count_lost(frame, blank, "train", "blank_answer", limit, fallbacks)
    frame = frame[~blank]
    _check_questions("train", frame, fallbacks)
    frame = frame.assign(label=answer_labels(frame))
    frame["answer"] = frame["label"].map(dict(enumerate(CHOICES)))
    if sample_size is not None:
        frame = frame.sample(min(sample_size, len(frame)), random_state=seed).sort_index()
    frame = _attach_images(frame, root, "train", limit, fallbacks)
    return frame[frame["image_ok"]].reset_index(drop=True)


def _load_test(root: Path, limit: float, fallbacks: Counter) -> pd.DataFrame:
    """Test rows, all of them; one without a usable image gets GREY_IMAGE and is counted."""
    frame, _ = _read_table(root / "test.csv", fallbacks)
    fallbacks["test_answer_ignored"] += sum(bool(text.strip()) for text in frame.get("answer", ()))
    _check_questions("test", frame, fallbacks)
    frame = _attach_images(frame, root, "test", limit, fallbacks)
    frame["image_path"] = frame["image_path"].where(frame["image_ok"], GREY_IMAGE)
    return frame.drop(columns="answer", errors="ignore")


def _fingerprint(root: Path, *frames: pd.DataFrame) -> str:
    paths = sorted({path for frame in frames for path in frame["image_path"][frame["image_ok"]]})
    sizes = "\n".join(f"{os.path.relpath(path, root)}:{os.path.getsize(path)}" for path in paths)
    tables = b"".join((root / name).read_bytes() for name in TABLE_COLUMNS)
    return hashlib.sha256(tables + sizes.encode()).hexdigest()


def load_competition(data_dir, max_fallback_share=0.01, sample_size: int | None = None, seed=42) -> Competition:
    """Validated tables and counts; DataError for what would need a guess or for losses above `max_fallback_share`."""
    root, fallbacks = Path(data_dir).resolve(), Counter()
    train = _load_train(root, max_fallback_share, sample_size, seed, fallbacks)
    test = _load_test(root, max_fallback_share, fallbacks)
    sample = _read_sample(root / "sample_submission.csv", test["id"], fallbacks)
    LOGGER.info("Loaded %d training and %d test rows; fallbacks: %s", len(train), len(test), dict(+fallbacks))
    return Competition(train, test, sample, fallbacks, _fingerprint(root, train, test), root)


# === Leakage and folds ===============================================================================================
@dataclass(frozen=True)
class LeakageReport:
    """Copies of images within train and between train and test."""

    copies: pd.DataFrame  # a pair per row: kind (exact, near), split/id/image_path _a and _b, difference (of 255)
    image_group: pd.Series  # one group number per training row
    groups_in_train: int  # groups with at least two training rows
    test_rows_in_train: int  # test rows whose image has a copy in train
    alarm: str  # why near copies were not used for grouping; "" where they were


def _near_pairs(images: pd.DataFrame, max_bits: int, max_difference: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions (p, 2) in `images` whose hashes and thumbnails agree, and the thumbnails' mean difference (p,)."""
    from sklearn.neighbors import radius_neighbors_graph

    codes = np.frombuffer(bytes.fromhex("".join(images["dhash"])), dtype=np.uint8)
    bits = np.unpackbits(codes.reshape(-1, 8), axis=1).astype(np.float32)
    graph = radius_neighbors_graph(bits, radius=(max_bits + 0.5) ** 0.5)  # squared distance = bits that differ
    pairs = np.column_stack(graph.nonzero())
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    involved = np.unique(pairs)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        small = pool.map(lambda path: load_image(path).resize((32, 32)), images["image_path"].iloc[involved])
        thumbnails = {number: np.asarray(image, dtype=np.int16) for number, image in zip(involved, small, strict=True)}
    gaps = np.array([np.abs(thumbnails[a] - thumbnails[b]).mean() for a, b in pairs])
    return pairs[gaps <= max_difference], gaps[gaps <= max_difference]


def leakage_report(train: pd.DataFrame, test: pd.DataFrame, max_bits=4, max_difference=3.0) -> LeakageReport:
    """Copies of images: exact by pixels, near by `max_bits` of 64 hash bits and `max_difference` of 255 grey levels."""
    rows = pd.concat([train.assign(split="train"), test.assign(split="test")])
    rows = rows[rows["image_ok"]].reset_index(drop=True)
    image, hashes = pd.factorize(rows["pixel_hash"])  # number of the image in each row
    first = np.unique(image, return_index=True)[1]  # the first row with each image
    near, gaps = _near_pairs(rows.iloc[first], max_bits, max_difference)
    links = coo_matrix((np.ones(len(near)), near.T), shape=(len(hashes), len(hashes)))
    group_of_image, alarm = connected_components(links, directed=False)[1], ""
    largest = np.bincount(group_of_image).max()
    if largest > max(10, 0.01 * len(hashes)):  # implausible
        alarm = f"near copies would link {largest} different images into one group: only exact copies are grouped"
        LOGGER.warning("Leakage: %s", alarm)
        group_of_image = np.arange(len(hashes))
    group = group_of_image[image]
    exact = np.column_stack([first[image], rows.index])[first[image] != rows.index]
    pairs = np.concatenate([exact, first[near]])
    ends = [rows.loc[end, ["split", "id", "image_path"]].reset_index(drop=True) for end in pairs.T]
    copies = ends[0].add_suffix("_a").join(ends[1].add_suffix("_b"))
    copies["kind"] = ["exact"] * len(exact) + ["near"] * len(near)
    copies["difference"] = np.concatenate([np.zeros(len(exact)), gaps])
    in_train = (rows["split"] == "train").to_numpy()
    image_group = pd.Series(group[in_train], index=train.index, name="image_group")
    groups_in_train = int((image_group.value_counts() > 1).sum())
    test_rows_in_train = int(np.isin(group[~in_train], image_group).sum())
    return LeakageReport(copies, image_group, groups_in_train, test_rows_in_train, alarm)


def make_folds(train: pd.DataFrame, n_folds: int = 3, seed: int = 42, groups=None) -> np.ndarray:
    """Fold number 0..n_folds-1 per training row, shape (n,), stratified on answer and question type.

    Rows of a group stay together; default: exact copies. ValueError for fewer than two folds or groups than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # importing sklearn draws from the global generator

    groups = pd.factorize(np.asarray(train["pixel_hash"] if groups is None else groups))[0]
    if groups.max() + 1 < n_folds:
        raise ValueError(f"{groups.max() + 1} groups of images cannot fill n_folds={n_folds}; use fewer folds")
    strata = train["answer"] + " " + train["type"]
    for wider in (train["answer"], strata.mode()[0]):  # for strata with fewer rows than folds
        strata = strata.where(strata.map(strata.value_counts()) >= n_folds, wider)
    folds = np.full(len(train), -1)
    splitter = StratifiedGroupKFold(n_splits=n_folds, shuffle=True, random_state=seed)
    for fold, (_, held_out) in enumerate(splitter.split(train, strata, groups)):
        folds[held_out] = fold
    return folds


# === Prompt ==========================================================================================================
QUESTION_TYPES = ("counting", "color", "ocr", "yesno", "location", "attribute", "general")

# First match wins, so the narrow patterns stand before the wide ones: "what colour is the text" asks for a colour.
_KOREAN_UNITS = "개|명|마리|대|권|장|병|송이|그루|채|척|잔|켤레|가지|번|층|줄|칸|쌍|자루|벌"
_QUESTION_PATTERNS = {
    "counting": rf"몇\s*({_KOREAN_UNITS})|개수|how many|number of",
    "color": r"색|빛깔|colou?r",
    "ocr": r"글자|글씨|숫자|문자|적힌|적혀|쓰인|쓰여|써\s*있|읽|표지판|간판|텍스트|번호"
    r"|\btext\b|written|\bread\b|\bsays?\b|digit",
    "location": r"어디|위치|어느\s*(쪽|방향|곳)|왼쪽|오른쪽|\bwhere\b|which side|located",
    "yesno": r"^(?!.*(어떤|무슨|무엇|누구|어느|뭐))"
    r".*((있|맞|보이|하|같|되)(나요|습니까|는가|을까요?)|인가요|입니까)\W*$"
    r"|^(is|are|does|do|can)\b",
    "attribute": r"모양|재질|종류|상태|형태|크기|날씨|어떤|무슨|shape|material|kind of|type of|\bsize\b",
}
_QUESTION_REGEX = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _QUESTION_PATTERNS.items()}


def question_type(text: str) -> str:
    """Return one of QUESTION_TYPES for a Korean or English question, by its wording alone."""
    matches = (name for name, pattern in _QUESTION_REGEX.items() if pattern.search(text.strip()))
    return next(matches, "general")


SYSTEM_PROMPT = "당신은 이미지를 보고 객관식 질문에 답하는 전문가입니다. 정답의 글자 하나만 답합니다."

_HINTS = {
    "counting": "대상을 하나씩 빠짐없이 세어 보세요.",
    "color": "대상의 색을 주의 깊게 보세요.",
    "ocr": "이미지 속 글자와 숫자를 정확히 읽으세요.",
    "yesno": "질문의 내용이 이미지와 맞는지 확인하세요.",
    "location": "대상의 위치와 방향을 확인하세요.",
    "attribute": "대상의 모양, 크기와 상태를 살펴보세요.",
    "general": "이미지를 자세히 살펴보세요.",
}
# Choices come last: all orders of one question then share one long prefix.
_TASK = " 알맞은 보기의 글자(a, b, c, d) 하나만 답하세요.\n질문: {question}\n보기:\n{choices}"
PROMPT_TEMPLATES = {name: hint + _TASK for name, hint in _HINTS.items()}

_SPECIAL_TOKEN = re.compile(r"<(\|[^<>|\s]{1,40}\||/?(?:think|tool_call|tool_response))>")


def neutralise_special_tokens(text: str) -> str:
    """Break text that a tokenizer would read as a control token: `<|im_end|>` becomes `< |im_end| >`."""
    return _SPECIAL_TOKEN.sub(r"< \1 >", text)


def permute_choices(values, order):
    """Values in prompt order: position p shows values[order[p]]."""
    return [values[original] for original in order]


def build_messages(row, order=(0, 1, 2, 3), templates=PROMPT_TEMPLATES) -> list[dict]:
    """Chat messages of one question: system, image, hint, instruction, question, choices in `order` without blanks."""
    texts = [neutralise_special_tokens(str(row[choice])) for choice in CHOICES]
    shown = zip(CHOICES, permute_choices(texts, order), strict=True)
    choices = "\n".join(f"{letter}. {text}" for letter, text in shown if text.strip())
    question = neutralise_special_tokens(str(row["question"]))
    text = templates[question_type(question)].format(question=question, choices=choices)
    content = [{"type": "image", "image": row["image_path"]}, {"type": "text", "text": text}]
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": content}]


# === Model ===========================================================================================================
# Projections of the language model's decoder layers and nothing else: the vision tower stays as it was pretrained.
LORA_TARGETS = r"(?:.*\.)?language_model\.layers\.\d+\.(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"
VISION_PREFIX = "visual"


class TemplateError(ValueError):
    """The model's chat template breaks the alignment of training prompt and inference prompt."""


def load_processor(config: Config):
    """The model's processor, padding on the left so that the last position is the answer's for every row."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(config.model_path, trust_remote_code=False)
    processor.tokenizer.padding_side = "left"
    return processor


def _torch_dtype(precision: str):
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def quantization_config(quantization: str, precision: str):
    """bitsandbytes settings for the language model, or None; vision tower and head stay in 16 bits."""
    from transformers import BitsAndBytesConfig

    if quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=quantization == "4bit",
        load_in_8bit=quantization == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_torch_dtype(precision),
        llm_int8_skip_modules=[VISION_PREFIX, f"model.{VISION_PREFIX}", "lm_head"],
    )


def load_model(config: Config, runtime: Runtime, attempts: int = 3):
    """The frozen base model on this process's first GPU or the CPU; after `attempts` an OSError says what to check."""
    from transformers import AutoModelForImageTextToText

    if config.quantization != "none" and not runtime.gpus:
        raise ValueError(f"quantization {config.quantization!r} needs a GPU; on a CPU set quantization='none'")
    options = {
        "dtype": _torch_dtype(runtime.precision),
        "attn_implementation": runtime.attention,
        "trust_remote_code": False,
        "device_map": {"": 0} if runtime.gpus else None,
        "quantization_config": quantization_config(config.quantization, runtime.precision),
    }
    for attempt in range(attempts):  # downloads from the hub break off
        time.sleep(2 * attempt)
        try:
            model = AutoModelForImageTextToText.from_pretrained(config.model_path, **options)
            return model.requires_grad_(False).eval()
        except OSError as error:
            LOGGER.warning("Loading %s failed (attempt %d of %d): %s", config.model_path, attempt + 1, attempts, error)
            cause = error
    raise OSError(
        f"{config.model_path} could not be loaded. Check the spelling of model_id, the internet switch of the session "
        f"(or attach the model and give its folder), and the free disk space. Cause: {cause}"
    ) from cause


def attach_lora(model, config: Config, seed: int):
    """A fresh LoRA adapter around `model`, a function of `seed`; asserted to be fp32 and outside the vision tower."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    strength = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    adapted = get_peft_model(model, LoraConfig(target_modules=LORA_TARGETS, task_type="CAUSAL_LM", **strength))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainable = trainable_parameters(adapted)
    in_vision = [name for name in trainable if f".{VISION_PREFIX}." in name]
    assert trainable and not in_vision, f"LoRA reached the vision tower: {in_vision[:3]}"
    not_fp32 = [name for name, parameter in trainable.items() if parameter.dtype != torch.float32]
    assert not not_fp32, f"Trainable weights must be fp32 for the optimizer: {not_fp32[:3]}"
    return adapted


def trainable_parameters(model) -> dict:
    """Name -> parameter of everything the optimizer may change."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def choice_token_ids(processor, prompt: str) -> tuple[tuple[int, ...], ...]:
    """Each letter's single-token ids (`a`, `A`, ` a`) after `prompt`, the plain one first; TemplateError if unclear."""
    prefix = processor.tokenizer(prompt)["input_ids"]
    letters = []
    for choice in CHOICES:
        variants = (choice, choice.upper(), f" {choice}")
        continued = [processor.tokenizer(prompt + variant)["input_ids"] for variant in variants]
        single = [ids[-1] for ids in continued if len(ids) == len(prefix) + 1 and ids[:-1] == prefix]
        if not single or continued[0][-1] != single[0]:
            raise TemplateError(f"The letter {choice!r} is not one token after the prompt; token ids: {continued[0]}")
        letters.append(tuple(dict.fromkeys(single)))
    every = [token for variants in letters for token in variants]
    if len(set(every)) != len(every):
        raise TemplateError(f"Two letters share a token: {dict(zip(CHOICES, letters, strict=True))}")
    return tuple(letters)


def render_prompt(processor, messages: list[dict]) -> str:
    """The chat prompt that ends where the answer's letter belongs; the one text for training and inference."""
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def check_template(processor, messages: list[dict]) -> tuple[tuple[int, ...], ...]:
    """The letters' token ids; TemplateError, with both texts, unless "prompt + letter" begins the training text."""
    prompt = render_prompt(processor, messages)
    letters = choice_token_ids(processor, prompt)
    for choice in CHOICES:
        answered = [*messages, {"role": "assistant", "content": choice}]
        full = processor.apply_chat_template(answered, tokenize=False, add_generation_prompt=False)
        if not full.startswith(prompt + choice):
            raise TemplateError(
                "The chat template puts something between the prompt and the answer, so that a model trained on one "
                f"would be read at the other.\n--- inference prompt:\n{prompt}\n--- training text:\n{full}"
            )
    return letters


def choice_logits(logits, letters: Sequence[Sequence[int]]):
    """Scores (batch, 4) from vocabulary logits (batch, vocabulary): log-sum-exp over each letter's variants."""
    return torch.stack([logits[:, list(variants)].logsumexp(dim=-1) for variants in letters], dim=-1)


@dataclass
class Session:
    """What a worker loads once: configuration, base model, processor, letter tokens and the vision cache."""

    config: Config
    runtime: Runtime
    processor: object
    model: object
    letters: tuple[tuple[int, ...], ...]
    cache: VisionCache
    progress: Callable = lambda stage, done, total, **details: None

    @property
    def device(self):
        return self.model.device

    @property
    def templates(self) -> Mapping[str, str]:
        return {**PROMPT_TEMPLATES, **self.config.prompt_templates}


def open_session(config: Config, example: Mapping) -> Session:
    """Load processor and model, check the template on `example` (a row) and log every decision with its reason."""
    runtime = detect_runtime(config.precision, config.attn_implementation)
    for reason in runtime.reasons:
        LOGGER.info("Decision: %s", reason)
    seed_everything(config.seed, config.deterministic)
    processor = load_processor(config)
    letters = check_template(processor, build_messages(example))
    with track_peak_memory("model loaded"):
        model = load_model(config, runtime)
    return Session(config, runtime, processor, model, letters, VisionCache(model, processor))


def autocast(session: Session):
    """Mixed precision on a GPU, nothing on a CPU."""
    if session.device.type != "cuda" or session.runtime.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype=_torch_dtype(session.runtime.precision))


MODEL_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "position_ids")


def causal_mask(attention_mask):
    """(batch, 1, length, length) causal mask from (batch, length), in which a padded position may look at everything.

    A row with nothing to look at may be NaN in an SDPA kernel, for some in the backward pass only. No real position
    looks at padding, so the scores do not change.
    """
    length = attention_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    visible = attention_mask.bool()
    return (causal & visible[:, None, None, :]) | ~visible[:, None, :, None]


def last_logits(session: Session, model, batch: Mapping):
    """Vocabulary logits (batch, vocabulary) in fp32 at the last prompt position, where the answer's letter belongs."""
    inputs = {name: batch[name].to(session.device) for name in MODEL_INPUTS}
    turing = any(gpu["capability"] < 8.0 for gpu in session.runtime.gpus)  # its fast kernel refuses GQA without a mask
    if session.runtime.attention == "sdpa" and (turing or not batch["attention_mask"].all()):
        inputs["attention_mask"] = causal_mask(inputs["attention_mask"])
    features = session.cache.encoder_outputs(batch)
    with autocast(session):
        output = model(**inputs, mm_encoder_outputs={"image": features}, logits_to_keep=1, use_cache=False)
    return output.logits[:, -1].float()


@dataclass(frozen=True)
class Prompt:
    """One question in one choice order at one pixel budget, tokenised."""

    row: int  # position in the frame it was made from
    order: tuple[int, ...]  # order[position] = original choice
    path: str
    image_key: tuple  # content hash and pixel budget, the key in the vision cache
    grid: tuple[int, int, int]
    input_ids: np.ndarray  # (length,)


def make_prompt(session: Session, frame: pd.DataFrame, row: int, order: Sequence[int], scale: float = 1.0) -> Prompt:
    """Tokenise row number `row` of `frame`. Raises DataError naming the row's id and image."""
    record = frame.iloc[row]
    try:
        budget = pixel_budget(session.config, session.processor, scale)
        grid = image_grid(record["width"], record["height"], session.processor, budget)
        ids = encode_prompt(session.processor, build_messages(record, order, session.templates), grid)
    except Exception as error:
        raise DataError(f"Row {record['id']} (image {record['image_path']}) cannot be prepared: {error}") from error
    return Prompt(row, tuple(order), record["image_path"], (record["pixel_hash"], *budget), grid, ids)


def collate(session: Session, prompts: Sequence[Prompt]) -> dict:
    """Left-padded model inputs on the CPU, with 3-D position ids, and the images as cache keys or as pixels."""
    length = max(len(prompt.input_ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), session.processor.tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for line, prompt in enumerate(prompts):
        input_ids[line, length - len(prompt.input_ids) :] = torch.from_numpy(prompt.input_ids)
        attention_mask[line, length - len(prompt.input_ids) :] = 1
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (input_ids == session.processor.image_token_id).int(),
        "image_grid_thw": torch.tensor([prompt.grid for prompt in prompts]),
    }
    positions, _ = session.model.model.get_rope_index(**inputs)
    inputs |= {"position_ids": positions, "prompts": list(prompts)}
    if not session.cache.covers(prompts):
        inputs["pixel_values"] = [_checked_pixels(session, prompt) for prompt in prompts]
    return inputs


def _checked_pixels(session: Session, prompt: Prompt):
    pixels, grid = prepare_image(load_image(prompt.path), session.processor, prompt.image_key[1:])
    if grid != prompt.grid:
        raise DataError(f"Image {prompt.path} gives the patch grid {grid}, not the planned {prompt.grid}")
    return pixels


def iterate_batches(session: Session, prompts: Sequence[Prompt], batches: Sequence[Sequence[int]]) -> Iterator[dict]:
    """Collated batches in order; decoding runs in worker processes when any image is missing from the cache."""
    from torch.utils.data import DataLoader

    # Only a forked process shares the session; another kind would have to pickle the model.
    use_workers = hasattr(os, "fork") and not session.cache.covers(prompts)
    workers = session.config.num_workers if use_workers else 0
    options = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    chosen = [[prompts[item] for item in batch] for batch in batches]
    return iter(DataLoader(chosen, None, collate_fn=lambda batch: collate(session, batch), **options))


# === Vision cache ====================================================================================================
def merged_patch_area(processor) -> int:
    """Pixels that become one image token: (patch size x merge size) squared, 28 x 28 or 32 x 32."""
    images = processor.image_processor
    return (images.patch_size * images.merge_size) ** 2


def pixel_budget(config: Config, processor, scale: float = 1.0) -> tuple[int, int]:
    """(min_pixels, max_pixels) of one view; the only place where the budget is decided."""
    area = merged_patch_area(processor)
    upper = config.image_size**2 if config.image_size else config.max_pixels or 768 * area
    lower = config.min_pixels or 4 * area
    upper = max(int(upper * scale), area)
    return min(lower, upper), upper


def image_grid(width: int, height: int, processor, budget: tuple[int, int]) -> tuple[int, int, int]:
    """(1, rows, columns) of patches for an image of that size within `budget`; aspect ratio kept."""
    from qwen_vl_utils.vision_process import smart_resize

    images = processor.image_processor
    factor = images.patch_size * images.merge_size
    rows, columns = smart_resize(height, width, factor=factor, min_pixels=budget[0], max_pixels=budget[1])
    return 1, rows // images.patch_size, columns // images.patch_size


def prepare_image(image, processor, budget: tuple[int, int]):
    """(pixel_values (patches, values), grid) of a PIL image, resized once; the processor does not resize again."""
    from qwen_vl_utils import process_vision_info

    patch = processor.image_processor.patch_size
    content = [{"type": "image", "image": image, "min_pixels": budget[0], "max_pixels": budget[1]}]
    resized, _ = process_vision_info([{"role": "user", "content": content}], image_patch_size=patch)
    inputs = processor.image_processor(images=resized, do_resize=False, return_tensors="pt")
    return inputs["pixel_values"], tuple(inputs["image_grid_thw"][0].tolist())


def encode_prompt(processor, messages: list[dict], grid: tuple[int, int, int]) -> np.ndarray:
    """Token ids (length,) of a prompt whose image takes `grid`: what the processor returns, without the pixels."""
    tokens = math.prod(grid) // processor.image_processor.merge_size**2
    text = render_prompt(processor, messages).replace(processor.image_token, processor.image_token * tokens, 1)
    return np.array(processor.tokenizer(text)["input_ids"])


class VisionCache:
    """Features of the frozen vision tower, kept in RAM, one computation for each image content and pixel budget."""

    def __init__(self, model, processor):
        self.model = model
        self.processor = processor
        self.store: dict[tuple, tuple] = {}
        self.recomputed_in_fp32 = 0

    def covers(self, prompts: Sequence[Prompt]) -> bool:
        """Whether the features of every prompt's image are stored."""
        return all(prompt.image_key in self.store for prompt in prompts)

    def fill(self, frame: pd.DataFrame, budget: tuple[int, int], progress: Callable, batch_size: int = 16) -> bool:
        """Compute what is missing for the images of `frame`; False, with the reason logged, if RAM is too small."""
        images = zip(frame["pixel_hash"], frame["image_path"], strict=True)
        distinct = {(digest, *budget): path for digest, path in images}
        missing = [(key, path) for key, path in distinct.items() if key not in self.store]
        free = psutil.virtual_memory().available
        for start in range(0, len(missing), batch_size):
            keys, paths = zip(*missing[start : start + batch_size], strict=True)
            prepared = [prepare_image(load_image(path), self.processor, budget) for path in paths]
            features = self.compute(*zip(*prepared, strict=True))
            if start == 0:
                size = sum(tensor.nbytes for image in features for tensor in image) / len(keys) * len(missing)
                LOGGER.info("Vision cache: %d images, about %.2f GiB", len(missing), size / 2**30)
                if size > free / 2:
                    LOGGER.warning("Vision cache skipped: only %.2f GiB of memory are free", free / 2**30)
                    return False
            self.store |= zip(keys, features, strict=True)
            progress("vision features", start + len(keys), len(missing))
        return True

    def compute(self, pixel_values: Sequence, grids: Sequence) -> list[tuple]:
        """One tuple per image on the CPU: features (tokens, hidden), then DeepStack; fp32, clamped, after overflow."""
        visual = self.model.get_submodule(f"model.{VISION_PREFIX}")
        dtype, device = visual.dtype, self.model.device
        inputs = torch.cat(list(pixel_values)).to(device), torch.tensor(grids, device=device)
        with torch.no_grad():
            features = self._tower(*inputs)
            if not all(tensor.isfinite().all() for image in features for tensor in image):
                self.recomputed_in_fp32 += len(grids)
                LOGGER.warning("Non-finite vision features: %d images recomputed in fp32", len(grids))
                try:
                    visual.float()
                    with torch.autocast(device.type, enabled=False):
                        features = self._tower(*inputs)
                finally:
                    visual.to(dtype)
        limit = torch.finfo(dtype).max
        return [tuple(tensor.clamp(-limit, limit).to("cpu", dtype) for tensor in image) for image in features]

    def _tower(self, pixels, grid) -> list[tuple]:
        output = self.model.get_image_features(pixels, grid, return_dict=True)
        layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
        return list(zip(*layers, strict=True))

    def encoder_outputs(self, batch: Mapping) -> SimpleNamespace:
        """What `mm_encoder_outputs["image"]` takes for `batch`: cached features, or fresh ones from its pixels."""
        if "pixel_values" in batch:
            images = self.compute(batch["pixel_values"], batch["image_grid_thw"].tolist())
        else:
            images = [self.store[prompt.image_key] for prompt in batch["prompts"]]
        layers = zip(*images, strict=True)
        pooled, *deepstack = ([tensor.to(self.model.device) for tensor in layer] for layer in layers)
        return SimpleNamespace(pooler_output=pooled, deepstack_features=deepstack)


# === Training ========================================================================================================
class EarlyStopping:
    """Stop when the value has not improved by more than `min_delta` for `patience` calls: `if stopping(acc): break`."""

    def __init__(self, patience: int, mode: str = "max", min_delta: float = 0.0, logger: logging.Logger | None = None):
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', not {mode!r}")
        self.patience, self.min_delta, self.logger = patience, min_delta, logger
        self.sign = 1 if mode == "max" else -1
        self.best = -self.sign * math.inf
        self.waited = 0

    def __call__(self, value: float) -> bool:
        if self.sign * (value - self.best) > self.min_delta:  # never true for NaN
            self.best, self.waited = float(value), 0
        else:
            self.waited += 1
        if self.should_stop and self.logger is not None:
            self.logger.info("Early stopping: no gain over %.4f for %d epochs", self.best, self.waited)
        return self.should_stop

    @property
    def should_stop(self) -> bool:
        return self.waited >= self.patience

    def state_dict(self) -> dict:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping) -> None:
        self.best, self.waited = state["best"], state["waited"]


class WeightAverager:
    """Average of parameters over optimizer steps, by torch.optim.swa_utils: "ema" or "swa" (the plain mean)."""

    def __init__(self, kind: str, parameters: Mapping, decay: float = 0.999):
        if kind not in ("ema", "swa"):
            raise ValueError(f"kind must be 'ema' or 'swa', not {kind!r}")
        self.kind, self.parameters, self.decay = kind, dict(parameters), decay
        self.updates = 0
        self.average: dict = {}

    def update(self) -> None:
        from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

        with torch.no_grad():
            if self.updates == 0:
                self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
            else:
                # Less than `decay` at first, so that a short run does not keep its initial weights.
                decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
                combine = get_ema_multi_avg_fn(decay) if self.kind == "ema" else get_swa_multi_avg_fn()
                combine(list(self.average.values()), list(self.parameters.values()), self.updates)
        self.updates += 1

    def state_dict(self) -> dict:
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: Mapping) -> None:
        # In the order of the parameters: the averages are combined list by list.
        names = self.parameters if state["updates"] else ()
        self.average = {name: state["average"][name].to(self.parameters[name].device) for name in names}
        self.updates = state["updates"]


def set_weights(parameters: Mapping, values: Mapping) -> None:
    """Copy `values` into the parameters of the same names."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


@contextlib.contextmanager
def swapped_weights(parameters: Mapping, values: Mapping) -> Iterator[None]:
    """Run the block with `values` in place of the parameters, then put the parameters back."""
    backup = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        set_weights(parameters, values)
        yield
    finally:
        set_weights(parameters, backup)


def choice_loss(scores, targets, present, label_smoothing: float = 0.0):
    """Mean cross-entropy, smoothed too, over the `present` ones of (batch, 4) scores in prompt positions."""
    log_probabilities = scores.masked_fill(~present, -math.inf).log_softmax(dim=-1)
    hit = log_probabilities.gather(1, targets[:, None]).squeeze(1)
    mean = log_probabilities.masked_fill(~present, 0.0).sum(-1) / present.sum(-1)
    return -((1 - label_smoothing) * hit + label_smoothing * mean).mean()


def training_loss(session: Session, logits, batch: Mapping, frame: pd.DataFrame):
    """The configured loss of a batch, from its vocabulary logits (batch, vocabulary)."""
    from torch.nn.functional import cross_entropy

    shown = [(prompt.order, frame.iloc[prompt.row]) for prompt in batch["prompts"]]
    targets = torch.tensor([order.index(record["label"]) for order, record in shown], device=logits.device)
    if session.config.loss == "vocabulary":
        plain = torch.tensor([variants[0] for variants in session.letters], device=logits.device)
        return cross_entropy(logits, plain[targets])
    shown_choices = [permute_choices(present_choices(record), order) for order, record in shown]
    present = torch.tensor(shown_choices, device=logits.device)
    return choice_loss(choice_logits(logits, session.letters), targets, present, session.config.label_smoothing)


def _generator(*keys) -> np.random.Generator:
    """A generator that depends on nothing but `keys`: seed, epoch, sample id, ..."""
    return np.random.default_rng([key if isinstance(key, int) else zlib.crc32(str(key).encode()) for key in keys])


def training_order(config: Config, epoch: int, sample_id: str) -> tuple[int, ...]:
    """The choice order in which one question is shown in one epoch, a function of (seed, epoch, sample id)."""
    if not config.shuffle_choices:
        return (0, 1, 2, 3)
    return tuple(int(choice) for choice in _generator(config.seed, epoch, sample_id).permutation(4))


def plan_epoch(rows: int, batch_size: int, accumulation: int, seed_keys: Sequence) -> list[list[np.ndarray]]:
    """Optimizer steps of micro-batches of row numbers: a seeded shuffle, every row once, the short tail kept."""
    shuffled = _generator(*seed_keys).permutation(rows)
    effective = batch_size * accumulation
    steps = [shuffled[start : start + effective] for start in range(0, rows, effective)]
    return [[step[start : start + batch_size] for start in range(0, len(step), batch_size)] for step in steps]


# === Fold training ===================================================================================================
@dataclass(frozen=True)
class FoldResult:
    """What a trained fold leaves behind: best epoch, learning curve and the weight kinds it offers."""

    fold: int
    best_epoch: int
    history: pd.DataFrame  # one row per epoch
    kinds: dict[str, dict]  # "raw", "ema", "swa" -> validation accuracy and nll


class FoldTrainer:
    """One fold's training: a fresh adapter, its optimizer and everything a checkpoint holds."""

    def __init__(self, session: Session, run: Run, fold: int):
        from transformers import get_cosine_schedule_with_warmup

        config = self.config = session.config
        self.session, self.run, self.fold = session, run, fold
        self.train = run.train[run.train["fold"] != fold].reset_index(drop=True)
        self.validation = run.train[run.train["fold"] == fold].reset_index(drop=True)
        self.model = attach_lora(session.model, config, config.seed + fold)
        self.parameters = trainable_parameters(self.model)
        weights = self.parameters.values()
        self.optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.steps_per_epoch = math.ceil(len(self.train) / (config.batch_size * config.grad_accum_steps))
        self.total_steps = self.steps_per_epoch * config.num_epochs
        warmup = round(self.total_steps * config.warmup_ratio)
        self.scheduler = get_cosine_schedule_with_warmup(self.optimizer, warmup, self.total_steps)
        self.scaler = torch.amp.GradScaler(session.device.type, enabled=session.runtime.precision == "fp16")
        kinds = [kind for kind, use in {"ema": config.use_ema, "swa": config.use_swa}.items() if use]
        self.averagers = {kind: WeightAverager(kind, self.parameters, config.ema_decay) for kind in kinds}
        patience, min_delta = config.early_stopping_patience, config.early_stopping_min_delta
        self.early_stopping = EarlyStopping(patience, min_delta=min_delta, logger=LOGGER)
        self.checkpoints = CheckpointManager(run.fold_dir(fold) / "checkpoints")
        self.metrics = MetricLogger(run.fold_dir(fold) / "metrics.jsonl")
        self.history: list[dict] = []
        self.losses: list[float] = []  # of the steps of the current epoch
        self.best: dict = {"score": None, "epoch": -1, "tensors": {}}
        self.last_save = time.monotonic()

    @property
    def parts(self) -> dict:
        """Name -> object with state_dict and load_state_dict, beside the weights themselves."""
        names = ("optimizer", "scheduler", "scaler", "early_stopping")
        return {name: getattr(self, name) for name in names} | self.averagers

    def save(self, epoch: int, step: int) -> None:
        """Commit the state before optimizer step `step` of `epoch`."""
        # No random state is stored, because every draw is a function of (seed, epoch, sample id or step).
        state = {name: part.state_dict() for name, part in self.parts.items()} | {"best": self.best}
        metadata = {"epoch": epoch, "step_in_epoch": step, "fingerprint": self.run.fingerprint}
        metadata |= {"history": self.history, "losses": self.losses}
        self.checkpoints.save(epoch * self.steps_per_epoch + step, self.parameters, state, metadata)
        self.last_save = time.monotonic()

    def resume(self) -> tuple[int, int]:
        """The (epoch, step) to do next, by the newest verified checkpoint; CheckpointError for one of another run."""
        path = self.checkpoints.latest_verified()
        if path is None:
            return 0, 0
        tensors, state, metadata = self.checkpoints.restore(path)
        require_same_run(path, metadata["fingerprint"], self.run.fingerprint)
        set_weights(self.parameters, tensors)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.best, self.history, self.losses = state["best"], metadata["history"], metadata["losses"]
        epoch, step = metadata["epoch"], metadata["step_in_epoch"]
        LOGGER.info("Fold %d continues at epoch %d, step %d", self.fold, epoch + 1, step)
        return epoch, step

    def fit(self) -> FoldResult:
        """Train from the newest checkpoint to the end and write adapters, validation logits and result.json."""
        epoch, step = self.resume()
        while epoch < self.config.num_epochs and not self.early_stopping.should_stop:
            speed = self.train_epoch(epoch, step)
            self.end_epoch(epoch, speed)
            epoch, step = epoch + 1, 0
            if self.config.save_every_epoch or epoch == self.config.num_epochs:
                self.save(epoch, step)
            if self.run.training_time_is_up() and epoch < self.config.num_epochs:
                LOGGER.warning("Fold %d stops after epoch %d: 75 %% of time_budget_hours is used", self.fold, epoch)
                break
        return self.finish()

    def train_epoch(self, epoch: int, first_step: int) -> float:
        """Optimizer steps `first_step`.. of one epoch (none, where only its validation is left); samples per second."""
        config = self.config
        self.model.train()
        orders = [training_order(config, epoch, sample_id) for sample_id in self.train["id"]]
        prompts = [make_prompt(self.session, self.train, row, order) for row, order in enumerate(orders)]
        seed_keys = (config.seed, self.fold, epoch)
        plan = plan_epoch(len(prompts), config.batch_size, config.grad_accum_steps, seed_keys)
        batches = iterate_batches(self.session, prompts, [micro for step in plan[first_step:] for micro in step])
        start, seen, speed = time.perf_counter(), 0, 0.0
        for step in range(first_step, len(plan)):
            self.losses.append(self.optimizer_step(epoch, step, [next(batches) for _ in plan[step]]))
            seen += sum(map(len, plan[step]))
            speed = seen / (time.perf_counter() - start)
            self.report(epoch, step, speed)
            if time.monotonic() - self.last_save > config.save_every_minutes * 60:
                self.save(epoch, step + 1)
        return speed

    def optimizer_step(self, epoch: int, step: int, batches: Sequence[Mapping]) -> float:
        """Update by the mean gradient over the questions of `batches`; their mean loss, or FloatingPointError."""
        # Dropout is a function of the step, so that a resumed run draws the same masks.
        torch.manual_seed(int(_generator(self.config.seed, self.fold, epoch, step, "dropout").integers(2**31)))
        rows = sum(len(batch["prompts"]) for batch in batches)
        where = f"at epoch {epoch + 1}, step {step}"
        total = 0.0
        for batch in batches:
            logits = last_logits(self.session, self.model, batch)
            loss = training_loss(self.session, logits, batch, self.train) * (len(batch["prompts"]) / rows)
            if not loss.isfinite():
                ids = [self.train["id"].iloc[prompt.row] for prompt in batch["prompts"]]
                raise FloatingPointError(f"Loss is {loss.item()} {where}, rows {ids}")
            self.scaler.scale(loss).backward()
            total += loss.item()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        if not (norm.isfinite() or self.scaler.is_enabled()):  # a scaler skips the step and lowers its scale
            raise FloatingPointError(f"Gradient norm is {norm.item()} {where}")
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.get_scale() >= scale:  # a skipped step moves neither schedule nor averages
            self.after_step(epoch)
        elif scale < 1e-3:
            raise FloatingPointError(f"Gradient norm is {norm.item()} {where}, at every loss scale")
        return total

    def after_step(self, epoch: int) -> None:
        """Advance the schedule and the averages; SWA averages over a tail of constant learning rate."""
        in_tail = "swa" in self.averagers and epoch >= self.config.swa_start_epoch
        if not in_tail:
            self.scheduler.step()
        for kind, averager in self.averagers.items():
            if kind == "ema" or in_tail:
                averager.update()

    def report(self, epoch: int, step: int, speed: float) -> None:
        memory = memory_summary()
        details = {
            "loss": round(self.losses[-1], 4),
            "lr": f"{self.optimizer.param_groups[0]['lr']:.1e}",
            "samples/s": round(speed, 1),
            "GiB": memory.get("gpu_peak_gib", memory["rss_gib"]),
        }
        done = epoch * self.steps_per_epoch + step + 1
        self.session.progress(f"fold {self.fold} training", done, self.total_steps, **details)
        self.metrics.log(epoch=epoch, step=step, **details)

    def validate(self) -> tuple[np.ndarray, dict]:
        """Logits (n, 1, 4) of the held-out rows through the inference path, with accuracy and NLL."""
        logits = predict_logits(self.session, self.validation, [View("rotation 0")], self.model)
        probabilities = softmax(logits[:, 0])
        labels = self.validation["label"].to_numpy()
        diversity = prediction_diversity(probabilities, labels)
        if diversity["collapsed"]:
            letter = diversity["top_letter"]
            LOGGER.warning("Fold %d: the model answers %r to almost everything: %s", self.fold, letter, diversity)
        scores = {"accuracy": accuracy(probabilities, labels), "nll": negative_log_likelihood(probabilities, labels)}
        return logits, scores

    def end_epoch(self, epoch: int, speed: float) -> None:
        """Validate, keep the best weights, and write the learning curve."""
        _, metrics = self.validate()
        score = [metrics["accuracy"], -metrics["nll"]]
        if self.best["score"] is None or score > self.best["score"]:
            tensors = {name: value.detach().cpu().clone() for name, value in self.parameters.items()}
            self.best = {"score": score, "epoch": epoch, "tensors": tensors}
        loss = float(np.mean(self.losses))
        self.history.append({"epoch": epoch + 1, "loss": loss, "samples_per_second": round(speed, 1), **metrics})
        self.losses = []
        write_table(pd.DataFrame(self.history), self.run.fold_dir(self.fold) / "history.csv")
        rounded = {name: round(value, 4) for name, value in self.history[-1].items()}
        LOGGER.info("Fold %d epoch %d: %s", self.fold, epoch + 1, rounded)
        if self.config.use_early_stopping:
            self.early_stopping(metrics["accuracy"])

    def finish(self) -> FoldResult:
        """Score each kind of weights once on the held-out rows and save its adapter in PEFT's format."""
        averages = {kind: averager.average for kind, averager in self.averagers.items() if averager.updates}
        folder, kinds = self.run.fold_dir(self.fold), {}
        for kind, tensors in {"raw": self.best["tensors"], **averages}.items():
            with swapped_weights(self.parameters, tensors):
                logits, kinds[kind] = self.validate()
                self.model.save_pretrained(folder / f"adapter_{kind}")
            path = folder / f"validation_{kind}.npz"
            write_logits(path, self.validation, logits, ["rotation 0"], self.run.fingerprint)
        result = {"fold": self.fold, "best_epoch": self.best["epoch"] + 1, "kinds": kinds, "history": self.history}
        atomic_write(folder / "result.json", json.dumps(result))
        LOGGER.info("Fold %d: best epoch %d, held-out %s", self.fold, result["best_epoch"], kinds)
        return read_fold_result(self.run, self.fold)


def read_fold_result(run: Run, fold: int) -> FoldResult:
    """The result.json of a finished fold."""
    content = json.loads((run.fold_dir(fold) / "result.json").read_text(encoding="utf-8"))
    return FoldResult(**content | {"history": pd.DataFrame(content["history"])})


def train_fold(config: Config, fold: int, session: Session | None = None) -> FoldResult:
    """Train one fold of the run at `config.run_dir`, continuing where it stopped; folds share `session` at most."""
    run = Run.open(config.run_dir)
    if (run.fold_dir(fold) / "result.json").exists():
        return read_fold_result(run, fold)
    session = session or open_session(run.config, run.train.iloc[0])
    session.cache.fill(run.train, pixel_budget(run.config, session.processor), session.progress)
    trainer = FoldTrainer(session, run, fold)
    try:
        return trainer.fit()
    finally:
        trainer.model.unload()  # the base model is shared: the next fold starts from it, untouched
        clear_memory()


# === Inference =======================================================================================================
def unpermute_scores(scores, order: Sequence[int]) -> np.ndarray:
    """Scores (..., 4) by prompt position, moved to the original choices: result[..., order[p]] = scores[..., p]."""
    scores = np.asarray(scores)
    result = np.empty_like(scores)
    result[..., list(order)] = scores
    return result


@dataclass(frozen=True)
class View:
    """One way to show a question: a cyclic rotation of its choices and a factor on the pixel budget."""

    name: str
    rotation: int = 0
    scale: float = 1.0

    @property
    def order(self) -> tuple[int, ...]:
        return tuple((position + self.rotation) % 4 for position in range(4))


def all_views(config: Config, processor) -> list[View]:
    """Every view the configuration asks for, the plain one first; `infer_max_pixels` adds one more scale."""
    if not config.use_tta:
        return [View("rotation 0")]
    scales = {1.0, *config.tta_scales}
    if config.infer_max_pixels:
        scales.add(round(config.infer_max_pixels / pixel_budget(config, processor)[1], 3))
    rotations = [rotation * 4 // config.tta_rotations for rotation in range(config.tta_rotations)]
    views = [View(f"rotation {rotation}", rotation) for rotation in rotations]
    return views + [View(f"scale {scale:g}", 0, scale) for scale in sorted(scales - {1.0})]


def tta_views(row: Mapping, views: Sequence[View]) -> list[View]:
    """The views that make sense for one question: no scale below 1 where text is read, and no flip or turn at all."""
    return [view for view in views if not (row["type"] == "ocr" and view.scale < 1)]


def plan_views(session: Session, frame: pd.DataFrame, views: Sequence[View]) -> list[tuple[int, Prompt]]:
    """(view number, prompt) for every row and view; a scale that gives the grid of another view is left out."""
    planned = []
    for row in range(len(frame)):
        known: set[tuple] = set()
        for view in tta_views(frame.iloc[row], views):
            prompt = make_prompt(session, frame, row, view.order, view.scale)
            if (prompt.grid, view.order) not in known:
                planned.append((views.index(view), prompt))
            known.add((prompt.grid, view.order))
    return planned


def present_choices(row: Mapping) -> list[bool]:
    """Whether each of a, b, c, d holds any text; a blank choice cannot be the answer."""
    return [bool(str(row[choice]).strip()) for choice in CHOICES]


def predict_logits(session: Session, frame: pd.DataFrame, views: Sequence[View], model=None, label="") -> np.ndarray:
    """Scores (n, views, 4) of original a-d; -inf: blank choice, NaN: no such view; FloatingPointError names the row."""
    model = model if model is not None else session.model
    planned = plan_views(session, frame, views)
    size = session.config.infer_batch_size if session.config.use_batch_inference else 1
    by_length = np.argsort([-len(prompt.input_ids) for _, prompt in planned], kind="stable")
    batches = [by_length[start : start + size] for start in range(0, len(planned), size)]
    present = np.array([present_choices(row) for _, row in frame.iterrows()])
    result = np.full((len(frame), len(views), 4), np.nan, dtype=np.float32)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        loader = iterate_batches(session, [prompt for _, prompt in planned], batches)
        for done, (chosen, batch) in enumerate(zip(batches, loader, strict=True), 1):
            scores = choice_logits(last_logits(session, model, batch), session.letters).cpu().numpy()
            for (view, prompt), score in zip((planned[item] for item in chosen), scores, strict=True):
                original = unpermute_scores(score, prompt.order)
                if not np.isfinite(original[present[prompt.row]]).all():
                    raise FloatingPointError(f"Non-finite scores for row {frame['id'].iloc[prompt.row]}: {original}")
                result[prompt.row, view] = np.where(present[prompt.row], original, -np.inf)
            if label:
                session.progress(label, done, len(batches))
    model.train(was_training)
    return result


def generate_baseline(session: Session, frame: pd.DataFrame, model=None, max_new_tokens: int = 4) -> list[str | None]:
    """Greedy generation with a strict parser, the usual baseline: a letter, or None when the text is anything else."""
    model = model if model is not None else session.model
    answers: list[str | None] = []
    for row in range(len(frame)):
        batch = collate(session, [make_prompt(session, frame, row, (0, 1, 2, 3))])
        inputs = {name: batch[name].to(session.device) for name in MODEL_INPUTS if name != "position_ids"}
        pixels = torch.cat([_checked_pixels(session, prompt) for prompt in batch["prompts"]]).to(session.device)
        with torch.inference_mode(), autocast(session):
            output = model.generate(**inputs, pixel_values=pixels, max_new_tokens=max_new_tokens, do_sample=False)
        text = session.processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        match = re.fullmatch(r"\s*\(?([a-d])\)?\.?\s*", text, re.IGNORECASE)
        answers.append(match.group(1).lower() if match else None)
    return answers


def write_logits(path: Path, frame: pd.DataFrame, logits: np.ndarray, view_names: Sequence, fingerprint: str) -> None:
    """Save logits in the run's schema: ids, logits (n, views, 4), view_names, labels (or -1) and the fingerprint."""
    labels = frame["label"].to_numpy(np.int64) if "label" in frame else np.full(len(frame), -1)
    content = {"ids": frame["id"].to_numpy(dtype=str), "logits": logits.astype(np.float32), "labels": labels}
    buffer = io.BytesIO()
    np.savez(buffer, **content, view_names=np.array(view_names, dtype=str), fingerprint=np.array(fingerprint))
    atomic_write(path, buffer.getvalue())


def read_logits(path: Path, fingerprint: str) -> dict[str, np.ndarray]:
    """Load what `write_logits` wrote. Raises CheckpointError if it belongs to another configuration or data set."""
    with np.load(path, allow_pickle=False) as file:
        content = {name: file[name] for name in file.files}
    require_same_run(path, str(content["fingerprint"]), fingerprint)
    return content


# === Calibration and metrics =========================================================================================
# Columns are always the original choices a, b, c, d. In logits -inf marks a choice that is absent from the row, and a
# view of NaN only marks a view the row does not have. Labels are 0-3. Lists, arrays and torch tensors are all welcome.
TEMPERATURE_BOUNDS = (0.05, 20.0)
PROBABILITY_FLOOR = 1e-12  # keeps a logarithm finite where a probability has underflowed


def _as_array(values) -> np.ndarray:
    if hasattr(values, "detach"):  # a torch tensor: numpy knows neither gradients nor bfloat16
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _as_probabilities(probabilities, ndim=2) -> np.ndarray:
    """Checked float64 probabilities, (n, choices) or with ndim=3 (members, n, choices)."""
    probabilities = _as_array(probabilities)
    # Written so that NaN fails too.
    valid = probabilities.ndim == ndim and (probabilities >= 0).all()
    if not valid or not np.allclose(probabilities.sum(axis=-1), 1, atol=1e-3):
        raise ValueError(f"need probabilities with {ndim} axes and a sum of 1 in each row; are these logits?")
    return probabilities


def _as_labels(labels, shape) -> np.ndarray:
    """Checked int labels for an array whose last two axes are (n, choices)."""
    n_rows, n_choices = shape[-2:]
    labels = _as_array(labels)
    if labels.shape != (n_rows,) or not n_rows:
        raise ValueError(f"{n_rows} rows but labels of shape {labels.shape}")
    bad = ~np.isin(labels, np.arange(n_choices))
    if bad.any():
        row = bad.argmax()
        raise ValueError(f"{bad.sum()} unlabelled rows, the first is row {row} with label {labels[row]:g}: drop them")
    return labels.astype(np.int64)


def softmax(logits) -> np.ndarray:
    """Probabilities over the last axis; a masked choice (-inf) gets exactly 0."""
    return special.softmax(_as_array(logits), axis=-1)


def combine_views(logits) -> np.ndarray:
    """(n, views, choices) logits, or (n, choices), -> (n, choices) mean log-probabilities over a row's views.

    Over all four rotations this cancels any additive letter preference: each choice has then met each letter once.
    """
    logits = _as_array(logits)
    logits = logits[:, None] if logits.ndim == 2 else logits
    exists = ~np.isnan(logits).all(axis=2)
    scores = np.where(exists[..., None], special.log_softmax(logits, axis=2), 0)
    combined = scores.sum(axis=1) / exists.sum(axis=1, keepdims=True)
    # One -inf would mask the choice in the mean although other views have scored it.
    uneven = np.isneginf(combined) & np.isfinite(logits).any(axis=1)
    bad = (np.isnan(combined) | uneven).any(axis=1)
    if bad.any():
        raise ValueError(f"row {bad.argmax()}: no view, a view with NaN, or a choice masked in some views only")
    return combined


class TemperatureScaler:
    """Temperature scaling, softmax(logits / T), which changes no answer. Guo et al. 2017, arXiv:1706.04599."""

    temperature: float | None = None  # set by fit
    at_bound: bool = False  # whether the data asked for a temperature outside TEMPERATURE_BOUNDS

    def fit(self, logits, labels, logger=None):
        """Choose T by negative log-likelihood on (n, choices) or (n, views, choices) logits and (n,) labels."""
        logits = combine_views(logits)
        labels = _as_labels(labels, logits.shape)
        rows = np.arange(len(labels))
        masked = np.isneginf(logits[rows, labels])
        if masked.any():
            raise ValueError(f"row {masked.argmax()} is labelled with a masked choice: drop the row or unmask it")

        def loss(log_temperature):  # convex in 1/T: it has one valley
            return -special.log_softmax(logits / math.exp(log_temperature), axis=1)[rows, labels].mean()

        low, high = np.log(TEMPERATURE_BOUNDS)
        best = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6}).x
        self.temperature = math.exp(best)
        if logger is not None:
            logger.info("temperature %.3f fitted on %d rows", self.temperature, len(labels))
        self.at_bound = min(best - low, high - best) < 1e-3  # the search never quite touches its ends
        if self.at_bound:
            advice = "temperature %.2g is at its bound: too few rows, or all right or wrong"
            (logger or LOGGER).warning(advice, self.temperature)
        return self

    def transform(self, logits) -> np.ndarray:
        """(n, choices) calibrated probabilities of (n, choices) or (n, views, choices) logits."""
        if self.temperature is None:
            raise ValueError("this TemperatureScaler is not fitted: call fit(logits, labels) first")
        return softmax(combine_views(logits) / self.temperature)


def shrink_temperatures(fold_temperatures, fold_sizes, pooled, strength=50) -> np.ndarray:
    """(folds,) temperatures with log T pulled towards the pooled one, each fold keeping weight n / (n + strength)."""
    # One fold's T is noisy: standard deviation 0.36 at 50 rows, 0.20 at 200 in our simulation of a true T of 2.
    sizes = _as_array(fold_sizes)
    weight = sizes / (sizes + strength)
    return np.exp(weight * np.log(_as_array(fold_temperatures)) + (1 - weight) * math.log(pooled))


def negative_log_likelihood(probabilities, labels) -> float:
    """Mean -log p(label): the score that calibration is judged by. A zero counts as PROBABILITY_FLOOR."""
    probabilities = _as_probabilities(probabilities)
    labels = _as_labels(labels, probabilities.shape)
    chosen = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(chosen, PROBABILITY_FLOOR)).mean())


def accuracy(probabilities, labels) -> float:
    """Share of rows whose most probable choice is the label."""
    probabilities = _as_probabilities(probabilities)
    return float((probabilities.argmax(axis=1) == _as_labels(labels, probabilities.shape)).mean())


def reliability_curve(probabilities, labels, n_bins=15) -> pd.DataFrame:
    """Mean confidence, accuracy and count per confidence bin; an empty bin has count 0 and NaN elsewhere."""
    probabilities = _as_probabilities(probabilities)
    labels = _as_labels(labels, probabilities.shape)
    confidence = probabilities.max(axis=1)
    bins = np.ceil(np.round(confidence * n_bins, 9)).clip(1, n_bins).astype(int) - 1  # 0.6 * 15 is a hair above 9
    rows = pd.DataFrame({"confidence": confidence, "accuracy": probabilities.argmax(axis=1) == labels}).astype(float)
    curve = rows.groupby(bins).mean().reindex(range(n_bins))
    return curve.assign(count=np.bincount(bins, minlength=n_bins)).rename_axis("bin")


def expected_calibration_error(probabilities, labels, n_bins=15) -> float:
    """Mean gap of confidence and accuracy over equal bins (Guo et al. 2017); read beside `calibration_error_null`."""
    curve = reliability_curve(probabilities, labels, n_bins)
    gap = (curve["confidence"] - curve["accuracy"]).abs() * curve["count"]
    return float(gap.sum() / curve["count"].sum())


def calibration_error_null(probabilities, n_bins=15, n_simulations=200, seed=0) -> float:
    """Mean expected calibration error under labels drawn from these very probabilities."""
    probabilities = _as_probabilities(probabilities)
    draws = np.random.default_rng(seed).random((n_simulations, len(probabilities), 1))
    labels = (draws > probabilities.cumsum(axis=1)[:, :-1]).sum(axis=2)
    return float(np.mean([expected_calibration_error(probabilities, drawn, n_bins) for drawn in labels]))


def _letter_indices(values) -> np.ndarray:
    """(n,) indices 0-3 of (n, 4) probabilities, letters or indices."""
    if np.ndim(values) == 2:
        return _as_array(values).argmax(axis=1)
    if isinstance(next(iter(values), None), str):
        values = pd.Index(CHOICES).get_indexer(list(values))  # -1 for any other text
    return _as_labels(values, (len(values), len(CHOICES)))


def prediction_diversity(predictions, validation_labels) -> dict:
    """Mode-collapse alarm on (n, 4) probabilities or (n,) letters, beside labels as letters or indices.

    `entropy` is 1 for evenly spread letters, 0 for a single one; the shares are those of the most predicted letter.
    `collapsed` needs an excess that chance does not explain (exact binomial test) and that is also large.
    """
    predicted, labels = _letter_indices(predictions), _letter_indices(validation_labels)
    shares, label_shares = (np.bincount(indices, minlength=4) / len(indices) for indices in (predicted, labels))
    entropy, label_entropy = (special.entr(share).sum() / math.log(4) for share in (shares, label_shares))
    top = int(shares.argmax())
    test = binomtest(int((predicted == top).sum()), len(predicted), label_shares[top], alternative="greater")
    large = shares[top] - label_shares[top] > 0.3 or entropy < 0.6 * label_entropy
    return {
        "entropy": float(entropy),
        "top_letter": CHOICES[top],
        "top_share": float(shares[top]),
        "label_share": float(label_shares[top]),
        "collapsed": bool(test.pvalue < 0.001 and large),
    }


# === Ensemble ========================================================================================================
# Members are (members, n, choices) probabilities. What is fitted here is fitted on out-of-fold rows, and any number
# about it must come from cross_fit: on 200 rows a stack of ten models looks good on its own rows and loses elsewhere.
STACK_FLOOR = 1e-3  # log(1e-12) for a masked choice would drown every other feature


def majority_vote(probabilities) -> np.ndarray:
    """(members, n, choices) probabilities -> (n,) labels; ties go to the higher mean probability, then the earlier."""
    probabilities = _as_probabilities(probabilities, ndim=3)
    votes = np.eye(probabilities.shape[2])[probabilities.argmax(axis=2)].sum(axis=0)
    mean = probabilities.mean(axis=0).round(12)  # rounded, or the order of summation would decide equal means
    return np.where(votes == votes.max(axis=1, keepdims=True), mean, -1).argmax(axis=1)


def average_probabilities(probabilities, weights=None) -> np.ndarray:
    """(members, n, choices) probabilities -> (n, choices) arithmetic mean, by (members,) weights if given."""
    return np.average(_as_probabilities(probabilities, ndim=3), axis=0, weights=weights)


def optimize_ensemble_weights(probabilities, labels, logger=None) -> np.ndarray:
    """(members,) simplex weights with the least NLL of the weighted mean (SLSQP); uniform, with a warning, if stuck."""
    probabilities = _as_probabilities(probabilities, ndim=3)
    labels = _as_labels(labels, probabilities.shape)
    likelihood = np.maximum(probabilities[:, np.arange(len(labels)), labels], PROBABILITY_FLOOR)
    uniform = np.full(len(likelihood), 1 / len(likelihood))

    def loss_and_gradient(weights):
        mixed = np.maximum(weights @ likelihood, PROBABILITY_FLOOR)
        return -np.log(mixed).mean(), -(likelihood / mixed).mean(axis=1)

    simplex = {"type": "eq", "fun": lambda weights: weights.sum() - 1}
    limits = {"bounds": [(0, 1)] * len(uniform), "constraints": simplex}
    result = minimize(loss_and_gradient, uniform, jac=True, method="SLSQP", options={"ftol": 1e-9}, **limits)
    if not result.success:
        (logger or LOGGER).warning("ensemble weights are uniform: SLSQP did not converge: %s", result.message)
        return uniform
    weights = np.clip(result.x, 0, None)
    return weights / weights.sum()


@dataclass(frozen=True)
class _Stacker:
    """A logistic regression over the members' log-probabilities; a choice masked in every member stays at 0."""

    model: object

    @staticmethod
    def features(probabilities) -> np.ndarray:
        """(members, n, choices) -> (n, members * choices)."""
        return np.concatenate(list(np.log(np.maximum(probabilities, STACK_FLOOR))), axis=1)

    def predict_proba(self, probabilities) -> np.ndarray:
        probabilities = _as_probabilities(probabilities, ndim=3)
        stacked = self.model.predict_proba(self.features(probabilities)) * (probabilities > 0).any(axis=0)
        return stacked / stacked.sum(axis=1, keepdims=True)


def stack(probabilities, labels, strength=0.03) -> _Stacker:
    """Stack (Wolpert 1992) on (members, n, choices) probabilities: `.predict_proba`; ValueError for unseen choices."""
    # sklearn's C is small on purpose: 0.03 was best in our simulations.
    from sklearn.linear_model import LogisticRegression  # importing sklearn draws from the global generator

    probabilities = _as_probabilities(probabilities, ndim=3)
    labels = _as_labels(labels, probabilities.shape)
    unseen = set(range(probabilities.shape[2])) - set(labels.tolist())
    if unseen:
        raise ValueError(f"choices {sorted(unseen)} never occur in the labels: too few rows to stack, use the mean")
    model = LogisticRegression(C=strength, max_iter=2000)
    return _Stacker(model.fit(_Stacker.features(probabilities), labels))


def cross_fit(fit_and_predict, probabilities, labels, folds) -> np.ndarray:
    """(n, choices) predictions by fit_and_predict(fit_inputs, fit_labels, predict_inputs), fitted on the other folds.

    Inputs have their rows on the last axis but one: (members, n, choices), or (n, choices) logits.
    """
    inputs, folds = _as_array(probabilities), np.asarray(folds)
    labels = _as_labels(labels, inputs.shape)
    if folds.shape != labels.shape or len(np.unique(folds)) < 2:
        raise ValueError(f"need one fold number per row ({len(labels)}) and at least two folds, got {folds.shape}")
    predictions = np.full(inputs.shape[-2:], np.nan)
    for fold in np.unique(folds):
        held_out = folds == fold
        predictions[held_out] = fit_and_predict(inputs[..., ~held_out, :], labels[~held_out], inputs[..., held_out, :])
    return predictions


def compare_paired(correct_a, correct_b) -> dict:
    """Is b better than a? Exact test (McNemar 1947) on two (n,) arrays of right or wrong; `wins`: only b is right."""
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"need the same rows twice, got shapes {a.shape} and {b.shape}")
    wins, losses = int((b & ~a).sum()), int((a & ~b).sum())
    p_value = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    return {"gain": (wins - losses) / len(a), "wins": wins, "losses": losses, "p_value": float(p_value)}


# === Submission ======================================================================================================
class SubmissionError(ValueError):
    """A submission that the competition would reject or score wrongly."""


def make_submission(sample, letters, path) -> dict:
    """Write `path` like the sample (id column first, answer second), read it back, return what was checked.

    `letters` goes from id to letter. A SubmissionError comes before an earlier good file would be overwritten.
    """
    ids = [str(name) for name in sample.iloc[:, 0]]
    letters = pd.Series(letters, dtype=object)
    names = [str(name) for name in letters.index]
    missing, unknown = sorted(set(ids) - set(names)), sorted(set(names) - set(ids))
    if missing or unknown or len(names) != len(ids):
        raise SubmissionError(
            f"{path}: {len(names)} answers for {len(ids)} ids, without an answer {missing[:3]}, not in the sample "
            f"{unknown[:3]}; answer each id of the sample once"
        )
    answers = letters.set_axis(names)[ids].tolist()
    frame = pd.DataFrame(dict(zip(sample.columns, (ids, answers), strict=True)), dtype=object)
    _check_rows(frame, ids, path)
    atomic_write(path, frame.to_csv(index=False, lineterminator="\n"))
    return validate_submission(path, sample)


def validate_submission(path, sample) -> dict:
    """Check the file at `path` against the sample; returns `rows` and `letters` (count of each) or SubmissionError."""
    ids = [str(name) for name in sample.iloc[:, 0]]
    try:  # as it is: no id parsed as a number, no "NA" as missing, no blank line or repeated column hidden
        raw = pd.read_csv(path, dtype=str, keep_default_na=False, header=None, skip_blank_lines=False)
    except ValueError as error:  # pandas' parser errors and wrong encodings
        raise SubmissionError(f"{path}: not a readable CSV ({error}); write it with make_submission") from error
    found, columns = raw.iloc[0].tolist(), list(sample.columns)
    if found != columns:
        raise SubmissionError(f"{path}: columns are {found}; name them {columns}, as the sample does")
    frame = raw.iloc[1:].reset_index(drop=True)
    _check_rows(frame, ids, path)
    answers = frame.iloc[:, 1].tolist()
    return {"rows": len(answers), "letters": {letter: answers.count(letter) for letter in CHOICES}}


def _check_rows(frame, ids, path):
    """The ids are those of the sample, each once, in its order, and every answer is one of the four letters."""
    names, answers = frame.iloc[:, 0], frame.iloc[:, 1]
    _refuse(~names.isin(ids), "this id is not in the sample; remove the row", frame, path)
    _refuse(names.duplicated(), "this id occurs twice; keep one row per id", frame, path)
    if len(names) != len(ids):
        missing = sorted(set(ids) - set(names))
        raise SubmissionError(f"{path}: {len(names)} rows but the sample has {len(ids)}; add ids {missing[:3]}")
    _refuse(names != ids, "the sample has another id in this row; keep the sample's order", frame, path)
    _refuse(~answers.isin(CHOICES), "write one lower-case letter of a, b, c, d", frame, path)


def _refuse(bad, problem, frame, path):
    """SubmissionError at the first of the bad rows, counted from 1 below the header."""
    if bad.any():
        row = int(bad.argmax())
        name, answer = frame.iloc[row]
        raise SubmissionError(f"{path}, row {row + 1} (id {name!r}, answer {answer!r}): {problem}")


# === Evaluation ======================================================================================================
@dataclass(frozen=True)
class OofLogits:
    """Out-of-fold logits of every trained fold, in the row order of the training frame."""

    frame: pd.DataFrame
    logits: np.ndarray  # (n, views, 4)
    labels: np.ndarray  # (n,)
    folds: np.ndarray  # (n,)
    view_names: tuple[str, ...]


def read_oof(run: Run) -> OofLogits:
    """The trained folds' oof.npz put together. Raises FileNotFoundError for a fold that has not been predicted."""
    parts = [read_logits(run.fold_dir(fold) / "oof.npz", run.fingerprint) for fold in run.config.folds_to_train]
    ids, logits = (np.concatenate([part[name] for part in parts]) for name in ("ids", "logits"))
    frame = run.train[run.train["id"].isin(ids)].reset_index(drop=True)
    logits = logits[pd.Index(ids).get_indexer(frame["id"])]
    names = tuple(parts[0]["view_names"].tolist())
    return OofLogits(frame, logits, frame["label"].to_numpy(), frame["fold"].to_numpy(), names)


@dataclass(frozen=True)
class Calibration:
    """One temperature per fold for the test rows, and cross-fitted probabilities for the OOF rows."""

    temperatures: dict[int, float]
    probabilities: np.ndarray  # (n, 4), each row scaled by a temperature that was fitted without it


def fold_temperatures(scores: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> dict[int, float]:
    """Temperature of each fold, shrunk toward the pooled one because a few hundred rows fix it only roughly."""
    pooled = TemperatureScaler().fit(scores, labels).temperature
    names = np.unique(folds).tolist()
    members = [folds == fold for fold in names]
    own = [TemperatureScaler().fit(scores[rows], labels[rows]).temperature for rows in members]
    shrunk = shrink_temperatures(own, [rows.sum() for rows in members], pooled)
    return dict(zip(names, shrunk.tolist(), strict=True))


def calibrate(scores: np.ndarray, labels: np.ndarray, folds: np.ndarray, enabled: bool = True) -> Calibration:
    """Temperature scaling of combined scores (n, 4); `enabled=False` keeps every temperature at 1."""
    if not enabled:
        return Calibration(dict.fromkeys(np.unique(folds).tolist(), 1.0), softmax(scores))
    probabilities = np.empty(scores.shape)
    part = np.arange(len(labels)) % 5
    for inside in (part == number for number in np.unique(part)):
        fitted = fold_temperatures(scores[~inside], labels[~inside], folds[~inside])
        scale = np.array([fitted[fold] for fold in folds[inside]])
        probabilities[inside] = softmax(scores[inside] / scale[:, None])
    return Calibration(fold_temperatures(scores, labels, folds), probabilities)


def score_row(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, NLL and ECE of probabilities (n, 4)."""
    return {
        "accuracy": accuracy(probabilities, labels),
        "nll": negative_log_likelihood(probabilities, labels),
        "ece": expected_calibration_error(probabilities, labels),
    }


def view_sets(view_names: Sequence[str]) -> dict[str, list[int]]:
    """The candidate sets of views, each wider than the one before: one view, all rotations, rotations and scales."""
    rotations = [index for index, name in enumerate(view_names) if name.startswith("rotation")]
    sets = {"single view": [0]}
    for name, wider in {"rotations": rotations, "rotations and scales": list(range(len(view_names)))}.items():
        if wider not in sets.values():
            sets[name] = wider
    return sets


def admit_views(oof: OofLogits, use_temperature_scaling: bool = True) -> tuple[list[int], pd.DataFrame]:
    """The widest set of views that does not lose on OOF against the set admitted before it, and the comparison."""
    admitted, best, rows = [], math.inf, {}
    for name, views in view_sets(oof.view_names).items():
        if np.isnan(oof.logits[:, views]).all(axis=(0, 2)).any():
            continue  # a view that no row has
        scores = combine_views(oof.logits[:, views])
        # Averaging views also softens probabilities, which is not a gain: hence after temperature scaling.
        probabilities = calibrate(scores, oof.labels, oof.folds, use_temperature_scaling).probabilities
        rows[name] = {"forward passes": len(views), **score_row(probabilities, oof.labels)}
        rows[name]["used"] = rows[name]["nll"] <= best
        if rows[name]["used"]:
            admitted, best = views, rows[name]["nll"]
    return admitted, pd.DataFrame.from_dict(rows, orient="index").rename_axis("views")


@dataclass(frozen=True)
class Evaluation:
    """Every decision taken on OOF, and the OOF probabilities behind it."""

    oof: OofLogits
    views: list[int]  # admitted views
    view_table: pd.DataFrame
    calibration: Calibration
    view_weights: np.ndarray  # (len(views),) fitted on all OOF rows, for ensemble_method "weighted"
    ladder: pd.DataFrame
    fold_table: pd.DataFrame


def _view_members(logits: np.ndarray, views: Sequence[int]) -> np.ndarray:
    """Probabilities (views, n, 4) of the admitted views; a view that a row lacks stands in as the row's mean."""
    mean = combine_views(logits[:, list(views)])
    single = [np.where(np.isnan(logits[:, view]), mean, logits[:, view]) for view in views]
    return np.stack([softmax(scores) for scores in single])


def evaluate_run(run: Run) -> Evaluation:
    """Admit views, fit temperatures and view weights, and build the ladder, all from saved OOF logits."""
    oof = read_oof(run)
    scaling = run.config.use_temperature_scaling
    views, view_table = admit_views(oof, scaling)
    scores = combine_views(oof.logits[:, views])
    calibration = calibrate(scores, oof.labels, oof.folds, scaling)
    members = _view_members(oof.logits, views)
    weights = optimize_ensemble_weights(members, oof.labels)
    ladder = build_ladder(run, oof, views, calibration, members)
    rows = {}
    for fold, temperature in calibration.temperatures.items():
        inside = oof.folds == fold
        scored = score_row(softmax(scores[inside]), oof.labels[inside])
        rows[fold] = {"rows": int(inside.sum()), **scored, "temperature": temperature}
    fold_scores = pd.DataFrame.from_dict(rows, orient="index").rename_axis("fold")
    return Evaluation(oof, views, view_table, calibration, weights, ladder, fold_scores)


def build_ladder(run: Run, oof: OofLogits, views: list, calibration: Calibration, members: np.ndarray) -> pd.DataFrame:
    """What each step is worth on OOF: accuracy, NLL, ECE, and the paired change against the step named in `against`."""
    labels, average = oof.labels, f"mean of {len(views)} views"
    steps = {  # probabilities, and the step to compare with
        "fine-tuned, one view": (softmax(combine_views(oof.logits[:, :1])), "zero-shot"),
        average: (softmax(combine_views(oof.logits[:, views])), "fine-tuned, one view"),
        "temperature": (calibration.probabilities, average),
    }
    if len(views) > 1:
        steps |= {name: (mixed, average) for name, mixed in _mix_views(members, labels).items()}
    base = read_logits(run.directory / "zeroshot.npz", run.fingerprint)
    base_probabilities = softmax(base["logits"][:, 0])
    base_correct = pd.Series(base_probabilities.argmax(1) == base["labels"], index=base["ids"])
    correct = {name: probabilities.argmax(1) == labels for name, (probabilities, _) in steps.items()}
    correct["zero-shot"] = base_correct.reindex(oof.frame["id"]).to_numpy()  # missing where it scored no row
    rows = {"zero-shot": score_row(base_probabilities, base["labels"]) | {"against": ""}}
    for name, (probabilities, against) in steps.items():
        shared = pd.notna(correct[against])
        paired = compare_paired(correct[against][shared], correct[name][shared])
        rows[name] = score_row(probabilities, labels) | {"against": against}
        rows[name] |= {column: paired[column] for column in ("gain", "p_value")}
    ladder = pd.DataFrame.from_dict(rows, orient="index").rename_axis("step")
    ladder.loc[ladder.index == "vote of views", ["nll", "ece"]] = math.nan  # a vote has no probabilities
    return ladder


def _mix_views(members: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Cross-fitted probabilities (n, 4) of the other ways to combine views (views, n, 4)."""

    def weighted(fitted, known, new):
        return average_probabilities(new, optimize_ensemble_weights(fitted, known))

    def stacked(fitted, known, new):
        return stack(fitted, known).predict_proba(new)

    parts = np.arange(len(labels)) % 5
    return {
        "vote of views": np.eye(4)[majority_vote(members)],
        "weighted views": cross_fit(weighted, members, labels, parts),
        "stacked views": cross_fit(stacked, members, labels, parts),
    }


def fold_table(results: Sequence[FoldResult]) -> pd.DataFrame:
    """Held-out accuracy and NLL of each fold and kind of weights, with mean and standard deviation."""
    scores = pd.json_normalize([result.kinds for result in results], sep=" ")
    scores.index = [str(result.fold) for result in results]
    table = pd.concat([scores, scores.agg(["mean", "std"]).rename({"std": "sd"})])
    table.insert(0, "best epoch", [*(str(result.best_epoch) for result in results), "", ""])
    return table.fillna("").rename_axis("fold")


def select_weights(run: Run) -> str:
    """Raw, EMA or SWA weights: one decision for all folds, by pooled held-out NLL, written to selection.json."""
    results = [read_fold_result(run, fold) for fold in run.config.folds_to_train]
    kinds = [kind for kind in results[0].kinds if all(kind in result.kinds for result in results)]
    rows = [(run.train["fold"] == result.fold).sum() for result in results]
    losses = {kind: [result.kinds[kind]["nll"] for result in results] for kind in kinds}
    pooled = {kind: float(np.average(values, weights=rows)) for kind, values in losses.items()}
    chosen = min(pooled, key=pooled.get)
    LOGGER.info("Decision: %s weights for all folds, held-out NLL %s", chosen, pooled)
    atomic_write(run.directory / "selection.json", json.dumps({"weights": chosen, "nll": pooled}))
    return chosen


def predict_test(run: Run, evaluation: Evaluation) -> dict[int, np.ndarray]:
    """Fold -> test probabilities (n, 4) with the admitted views and the fold's temperature."""
    result = {}
    for fold in run.config.folds_to_train:
        logits = read_logits(run.fold_dir(fold) / "test.npz", run.fingerprint)["logits"]
        if run.config.ensemble_method == "weighted":
            result[fold] = average_probabilities(_view_members(logits, evaluation.views), evaluation.view_weights)
        else:
            scores = combine_views(logits[:, evaluation.views])
            result[fold] = softmax(scores / evaluation.calibration.temperatures[fold])
    return result


def best_fold(evaluation: Evaluation) -> int:
    """The fold with the highest OOF accuracy, then the lowest NLL; the test rows play no part."""
    return int(evaluation.fold_table.sort_values(["accuracy", "nll"], ascending=[False, True]).index[0])


def write_submissions(run: Run, evaluation: Evaluation) -> dict[str, pd.DataFrame]:
    """Write and check submission_single.csv (best fold by OOF) and submission_ensemble.csv; returns name -> frame."""
    folds = predict_test(run, evaluation)
    members = np.stack(list(folds.values()))
    vote = run.config.ensemble_method == "vote"
    ensemble = majority_vote(members) if vote else average_probabilities(members).argmax(1)
    answers = {"single": folds[best_fold(evaluation)].argmax(1), "ensemble": ensemble}
    for name, labels in answers.items():
        letters = dict(zip(run.test["id"], np.array(CHOICES)[labels], strict=True))
        make_submission(run.sample, letters, run.directory / f"submission_{name}.csv")
    if detect_runtime(run.config.precision).platform == "kaggle":
        atomic_write("submission.csv", (run.directory / "submission_ensemble.csv").read_bytes())
    return {name: pd.read_csv(run.directory / f"submission_{name}.csv", dtype=str) for name in answers}


# === Figures and report ==============================================================================================
BLUE, ORANGE, GREY = "#3b6ea5", "#d9822b", "#8a8f98"


def _axes(ax, title: str, xlabel: str, ylabel: str, figsize=(6, 3.2)):
    """Given axes, or new ones, with title and labels set: figures carry type names only, Korean text is HTML."""
    if ax is None:
        from matplotlib.figure import Figure

        ax = Figure(figsize=figsize, layout="constrained").subplots()
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _accuracy_bars(ax, title: str, names: Sequence[str], values: Sequence[float], figsize=(6, 3.2)):
    ax = _axes(ax, title, "accuracy", "", figsize)
    ax.bar_label(ax.barh(names, values, color=BLUE), fmt="%.3f", padding=3, fontsize=9)
    ax.set_xlim(0, 1.08)
    return ax


def plot_counts(counts: pd.Series, title: str, ax=None):
    """Bars of counts, each with its number."""
    ax = _axes(ax, title, "", "rows")
    bars = ax.bar([str(name) for name in counts.index], counts.to_numpy(), color=BLUE)
    ax.bar_label(bars, padding=2, fontsize=9)
    ax.margins(y=0.15)
    return ax


def plot_token_counts(tokens: Mapping[str, Sequence[int]], limit: int, ax=None):
    """Histogram of image tokens per split; the dashed line is the configured pixel budget."""
    ax = _axes(ax, "Image tokens within the pixel budget", "merged patches per image", "images")
    top = max(max(values) for values in tokens.values())
    bins = np.linspace(0, top + 1, min(40, top + 2))
    for (name, values), colour in zip(tokens.items(), (BLUE, ORANGE), strict=False):
        ax.hist(values, bins=bins, alpha=0.6, label=name, color=colour)
    if limit <= 2 * top:
        ax.axvline(limit, linestyle="--", color=GREY)
    ax.legend(title=f"budget: {limit} patches", frameon=False)
    return ax


def plot_learning_curves(results: Sequence[FoldResult], axes=None):
    """Training loss and held-out accuracy by epoch, one line per fold; a ring marks the epoch that was kept."""
    if axes is None:
        from matplotlib.figure import Figure

        axes = Figure(figsize=(9, 3.2), layout="constrained").subplots(1, 2)
    for ax, title, column in zip(axes, ("Training loss", "Held-out accuracy"), ("loss", "accuracy"), strict=True):
        _axes(ax, title, "epoch", column)
        for result in results:
            curve = result.history.set_index("epoch")[column]
            (line,) = ax.plot(curve, marker=".", label=f"fold {result.fold}")
            kept = curve.loc[[result.best_epoch]]
            ax.plot(kept, "o", markersize=11, fillstyle="none", color=line.get_color())
    ax.legend(frameon=False)
    return axes


def plot_reliability(curves: Mapping[str, pd.DataFrame], ax=None):
    """Accuracy against confidence per bin; on the diagonal the probabilities mean what they say."""
    ax = _axes(ax, "Reliability on OOF rows", "confidence", "accuracy", figsize=(4.2, 3.8))
    ax.plot([0, 1], [0, 1], linestyle="--", color=GREY)
    for (name, curve), colour in zip(curves.items(), (ORANGE, BLUE), strict=False):
        ax.plot(curve["confidence"], curve["accuracy"], marker="o", label=name, color=colour)
    ax.set(xlim=(0.2, 1.02), ylim=(0, 1.05))
    ax.legend(frameon=False)
    return ax


def plot_ladder(ladder: pd.DataFrame, ax=None):
    """Bars of the OOF accuracy of every step, the first on top."""
    upwards = ladder["accuracy"].iloc[::-1]
    return _accuracy_bars(ax, "OOF accuracy, step by step", upwards.index, upwards, figsize=(7, 3.2))


def confusion_table(labels: np.ndarray, predicted: np.ndarray) -> pd.DataFrame:
    """Counts (4, 4): rows the true letter, columns the predicted one."""
    counts = np.bincount(4 * labels + predicted, minlength=16).reshape(4, 4)
    return pd.DataFrame(counts, index=pd.Index(CHOICES, name="true"), columns=pd.Index(CHOICES, name="predicted"))


def plot_confusion(table: pd.DataFrame, ax=None):
    """The confusion matrix as a shaded table."""
    ax = _axes(ax, "Confusion on OOF rows", "predicted", "true", figsize=(3.8, 3.4))
    counts = table.to_numpy()
    ax.imshow(counts, cmap="Blues")
    ax.set(xticks=range(4), xticklabels=table.columns, yticks=range(4), yticklabels=table.index)
    for (row, column), count in np.ndenumerate(counts):
        ax.text(column, row, count, ha="center", va="center", color="white" if count > counts.max() / 2 else "black")
    return ax


def accuracy_by_type(types: Sequence[str], correct: np.ndarray) -> pd.DataFrame:
    """Rows and accuracy of each question type, the weakest first."""
    frame = pd.DataFrame({"type": list(types), "correct": correct})
    grouped = frame.groupby("type")["correct"].agg(rows="size", accuracy="mean")
    return grouped.sort_values("accuracy")


def plot_accuracy_by_type(table: pd.DataFrame, ax=None):
    """Bars of accuracy per question type with the number of rows; the dashed line is chance."""
    names = [f"{name} ({rows})" for name, rows in table["rows"].items()]
    ax = _accuracy_bars(ax, "OOF accuracy by question type", names, table["accuracy"])
    ax.axvline(0.25, linestyle="--", color=GREY)
    return ax


def thumbnail_html(path: str, side: int = 120) -> str:
    """An <img> tag with the image inside it, at most `side` pixels, so that the notebook needs no files beside it."""
    image = load_image(path)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def question_cards(frame: pd.DataFrame, notes: Sequence[str] | None = None) -> str:
    """An HTML table of questions with thumbnail, choices and answer in bold; all text from the data is escaped."""
    cards = []
    for line, (_, row) in enumerate(frame.iterrows()):
        choices = {choice: f"{choice}. {html.escape(row[choice])}" for choice in CHOICES}
        if "answer" in row:
            choices[row["answer"]] = f"<b>{choices[row['answer']]}</b>"
        note = f"<br><i>{html.escape(notes[line])}</i>" if notes is not None else ""
        cards.append(
            f'<tr><td>{thumbnail_html(row["image_path"])}</td><td style="text-align:left">'
            f"<code>{html.escape(row['id'])}</code> {row['type']}<br>{html.escape(row['question'])}<br>"
            f"{' &nbsp; '.join(choices.values())}{note}</td></tr>"
        )
    return f"<table>{''.join(cards)}</table>"


def confident_mistakes(evaluation: Evaluation, top: int = 6) -> tuple[pd.DataFrame, list[str]]:
    """The OOF rows that are wrong with the highest probability, and a note for each."""
    probabilities = evaluation.calibration.probabilities
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != evaluation.oof.labels)
    lines = wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")][:top]
    notes = [f"predicted {CHOICES[predicted[line]]} with probability {probabilities[line].max():.2f}" for line in lines]
    return evaluation.oof.frame.iloc[lines], notes


def wrap_up_table(run: Run) -> pd.DataFrame:
    """Wall time in seconds and peak memory in GiB of each worker stage, as the workers logged them."""
    frame = pd.read_json(run.directory / "stages.jsonl", lines=True)
    return frame.filter(["label", "seconds", "rss_gib", "gpu_peak_gib"]).set_index("label")


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV, whole or not at all."""
    atomic_write(path, frame.to_csv(index=False))


def markdown_table(frame: pd.DataFrame) -> str:
    """A GitHub table with the index as first column and three decimals."""

    def cell(value) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|")

    columns = [frame.index.name or "", *frame.columns]
    lines = ["| " + " | ".join(map(str, columns)) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in frame.itertuples()]
    return "\n".join(lines)


def save_figure(ax, run: Run, name: str):
    """Save the figure of `ax` as figures/`name`.png in the run directory; returns it for display."""
    figure = np.ravel(ax)[0].figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    atomic_write(run.directory / "figures" / f"{name}.png", buffer.getvalue())
    return figure


def write_report(run: Run, evaluation: Evaluation) -> Path:
    """Write report.md from the run's files and append the run to experiments.csv; returns the report's path."""
    config, oof = run.config, evaluation.oof
    correct = evaluation.calibration.probabilities.argmax(1) == oof.labels
    weights = json.loads((run.directory / "selection.json").read_text(encoding="utf-8"))["weights"]
    parts = [
        f"# {run.directory.name}",
        f"Model `{config.model_id}`, {len(run.train)} training rows, {len(run.test)} test rows, "
        f"folds {list(config.folds_to_train)} of {config.n_folds}, {weights} weights.",
        "Temperature, weights and stacking are scored on rows they were not fitted on. The gain of averaging folds "
        "cannot be seen on OOF rows, because each row has one model that did not train on it.",
    ]
    tables = {
        "Steps on out-of-fold rows": evaluation.ladder,
        "Folds": evaluation.fold_table,
        "Views": evaluation.view_table,
        "Question types": accuracy_by_type(oof.frame["type"], correct),
        "Fallbacks taken while reading the data": pd.DataFrame({"rows": run.fallbacks}).rename_axis("fallback"),
        "Time and memory": wrap_up_table(run),
    }
    parts += [f"## {title}\n\n{markdown_table(table)}" for title, table in tables.items()]
    parts += [f"![{path.stem}](figures/{path.name})" for path in sorted((run.directory / "figures").glob("*.png"))]
    atomic_write(run.directory / "report.md", "\n\n".join(parts) + "\n")
    _log_experiment(run, evaluation)
    return run.directory / "report.md"


def _log_experiment(run: Run, evaluation: Evaluation) -> None:
    """One row per finished run in experiments.csv beside the run directories; a repeated run replaces its row."""
    path = run.directory.parent / "experiments.csv"
    row = {
        "run": run.directory.name,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "model": run.config.model_id,
        "folds": len(run.config.folds_to_train),
        "rows": len(run.train),
        **score_row(evaluation.calibration.probabilities, evaluation.oof.labels),
    }
    before = pd.read_csv(path, dtype=str) if path.exists() else pd.DataFrame(columns=["run"])
    write_table(pd.concat([before[before["run"] != row["run"]], pd.DataFrame([row])], ignore_index=True), path)


# === Worker and preflight ============================================================================================


@dataclass(frozen=True)
class Run:
    """One run directory: the configuration, the rows with their folds, and where everything else is written."""

    config: Config
    directory: Path
    train: pd.DataFrame  # with fold
    test: pd.DataFrame
    sample: pd.DataFrame
    fallbacks: dict[str, int]
    fingerprint: str  # of configuration, data and folds together

    def fold_dir(self, fold: int) -> Path:
        return self.directory / f"fold_{fold}"

    @classmethod
    def open(cls, directory: str | Path) -> Run:
        """Read what `start_run` wrote."""
        directory = Path(directory)
        content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        tables = [_read_rows(directory / name) for name in ("folds.csv", "test_rows.csv", "sample_rows.csv")]
        return cls(Config(**content["config"]), directory, *tables, content["fallbacks"], content["fingerprint"])

    def training_time_is_up(self) -> bool:
        """Whether 75 % of time_budget_hours has passed since `run_folds` began; the rest is for inference."""
        if self.config.time_budget_hours is None:
            return False
        started = json.loads((self.directory / "session.json").read_text(encoding="utf-8"))["started"]
        return time.time() - started > 0.75 * 3600 * self.config.time_budget_hours


def _read_rows(path: Path) -> pd.DataFrame:
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    return frame.astype({column: int for column in ("label", "fold", "width", "height") if column in frame})


def start_run(config: Config, competition: Competition, folds: np.ndarray) -> Run:
    """Create the run directory; CheckpointError names what differs if one is there with other config, data or folds."""
    directory = config.run_dir.resolve()
    config = dataclasses.replace(config, output_dir=str(directory.parent), run_name=directory.name)
    rows = competition.train.assign(fold=folds)
    assignment = hashlib.sha256(rows[["id", "fold"]].to_csv().encode()).hexdigest()
    content = {
        "version": __version__,
        "config": dataclasses.asdict(config),
        "parts": {"config": config.fingerprint, "data": competition.fingerprint, "folds": assignment},
        "fallbacks": competition.fallbacks,
    }
    content["fingerprint"] = hashlib.sha256(json.dumps(content["parts"], sort_keys=True).encode()).hexdigest()
    if (directory / "config.json").exists():
        _require_same_run(directory, content)
    for name, frame in (("folds", rows), ("test_rows", competition.test), ("sample_rows", competition.sample)):
        write_table(frame, directory / f"{name}.csv")
    atomic_write(directory / "config.json", json.dumps(content, indent=1, ensure_ascii=False))
    return Run.open(directory)


def _require_same_run(directory: Path, content: Mapping) -> None:
    before = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    changed = [name for name, value in content["parts"].items() if before["parts"][name] != value]
    if not changed:
        return
    new, old = (json.loads(json.dumps(part["config"])) for part in (content, before))
    fields = [f"{name}: {old.get(name)!r} -> {value!r}" for name, value in new.items() if old.get(name) != value]
    raise CheckpointError(
        f"{directory} was made with other {' and '.join(changed)} ({'; '.join(fields) or 'same settings'}); "
        "choose a new run_name, or delete that folder"
    )


def stage_zeroshot(session: Session, run: Run, fold: int) -> None:
    """Score `zeroshot_rows` training rows with the untouched base model."""
    rows = min(run.config.zeroshot_rows or len(run.train), len(run.train))
    frame = run.train.sample(rows, random_state=run.config.seed).sort_index().reset_index(drop=True)
    session.cache.fill(frame, pixel_budget(run.config, session.processor), session.progress)
    logits = predict_logits(session, frame, [View("rotation 0")], label="zero-shot")
    write_logits(run.directory / "zeroshot.npz", frame, logits, ["rotation 0"], run.fingerprint)


def load_adapter(model, folder: Path):
    """The base model with a saved adapter. Raises CheckpointError unless every stored weight arrived unchanged."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    adapted = PeftModel.from_pretrained(model, str(folder))
    stored = load_file(folder / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(adapted)
    differing = [name for name in stored if name not in loaded or not torch.equal(stored[name], loaded[name].cpu())]
    if differing or set(loaded) != set(stored):
        raise CheckpointError(f"{folder} was not loaded completely: {differing[:3] or set(loaded) ^ set(stored)}")
    return adapted


def stage_predict(session: Session, run: Run, fold: int) -> None:
    """Score the fold's held-out rows and all test rows in every view with the selected weights."""
    kind = json.loads((run.directory / "selection.json").read_text(encoding="utf-8"))["weights"]
    views = all_views(run.config, session.processor)
    held_out = run.train[run.train["fold"] == fold].reset_index(drop=True)
    adapted = load_adapter(session.model, run.fold_dir(fold) / f"adapter_{kind}")
    try:
        for name, frame in (("oof", held_out), ("test", run.test)):
            session.cache.fill(frame, pixel_budget(run.config, session.processor), session.progress)
            logits = predict_logits(session, frame, views, adapted, label=f"fold {fold} {name}")
            path = run.fold_dir(fold) / f"{name}.npz"
            write_logits(path, frame, logits, [view.name for view in views], run.fingerprint)
    finally:
        adapted.unload()


STAGES = {  # what does it for one fold, and the file that it writes last: where that is, the stage is skipped
    "zeroshot": (stage_zeroshot, "zeroshot.npz"),
    "train": (lambda session, run, fold: train_fold(run.config, fold, session), "fold_{fold}/result.json"),
    "predict": (stage_predict, "fold_{fold}/test.npz"),
}


def stage_is_done(run: Run, stage: str, fold: int) -> bool:
    """Whether the file that the stage writes last is there."""
    return (run.directory / STAGES[stage][1].format(fold=fold)).exists()


def run_stages(run: Run, folds: Sequence[int], stages: Sequence[str], progress: Callable) -> None:
    """Do what is missing of `stages` for `folds`, loading the model at most once."""
    session = None
    for stage in stages:
        if stage == "predict" and not (run.directory / "selection.json").exists():
            select_weights(run)
        for fold in folds:
            if stage_is_done(run, stage, fold):
                continue
            session = session or open_session(run.config, run.train.iloc[0])
            session.progress = progress
            label = stage if stage == "zeroshot" else f"{stage} fold {fold}"
            with track_peak_memory(label) as report:
                STAGES[stage][0](session, run, fold)
            MetricLogger(run.directory / "stages.jsonl").log(**report)


def launch_workers(run: Run, jobs: Sequence[tuple[int | None, Sequence[int]]], stages: Sequence[str]) -> None:
    """Start one worker per (GPU index or None, folds), show progress, wait; RuntimeError shows failed logs' ends."""
    workers = {}  # log -> process
    for number, (gpu, folds) in enumerate(jobs):
        environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
        arguments = ["--run", str(run.directory), "--folds", ",".join(map(str, folds)), "--stages", ",".join(stages)]
        command = [sys.executable, str(Path(__file__).resolve()), "worker", *arguments, "--name", str(number)]
        (run.directory / f"progress_{number}.json").unlink(missing_ok=True)
        log = run.directory / f"worker_{number}.log"
        with log.open("ab") as file:
            workers[log] = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        _watch(run, list(workers.values()))
    finally:
        for process in workers.values():
            process.terminate()
    failed = [log for log, process in workers.items() if process.wait() != 0]
    if failed:
        ends = [f"End of {log}:\n" + _tail(log.read_text(encoding="utf-8", errors="replace")) for log in failed]
        raise RuntimeError("A worker stopped. Run the cell again to continue where it was.\n" + "\n".join(ends))


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-25:])


def _watch(run: Run, processes: Sequence[subprocess.Popen]) -> None:
    """Show what every worker is doing, in place, until all have ended."""
    show, started, running = _live_text(), time.monotonic(), True
    while running:
        running = any(process.poll() is None for process in processes)
        show("\n".join(_progress_line(run, number, time.monotonic() - started) for number in range(len(processes))))
        if running:
            time.sleep(1)


def _live_text() -> Callable[[str], object]:
    """A function that shows a text instead of the one before: one output of a notebook cell, or the terminal's line."""
    ipython = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None:
        return lambda text: sys.stdout.write("\r" + text)
    handle = ipython.display.display({"text/plain": ""}, raw=True, display_id=True)
    return lambda text: handle.update({"text/plain": text}, raw=True)


def _progress_line(run: Run, number: int, elapsed: float) -> str:
    path = run.directory / f"progress_{number}.json"
    if not path.exists():
        return f"worker {number} starting"
    state = json.loads(path.read_text(encoding="utf-8"))
    done, total, prefix = state.pop("done"), state.pop("total"), f"worker {number} {state.pop('stage')}"
    postfix = ", ".join(f"{name}={value}" for name, value in state.items())
    meter = "{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} in {elapsed}{postfix}"
    return tqdm.format_meter(done, total, elapsed, prefix=prefix, postfix=postfix, bar_format=meter)


def _devices(config: Config) -> list[int | None]:
    gpus = detect_runtime(config.precision, config.attn_implementation).gpus
    return [gpu["index"] for gpu in gpus] or [None]


def run_zeroshot(run: Run) -> pd.DataFrame:
    """Score the base model in a worker; returns rows and accuracy by question type and over all."""
    if not stage_is_done(run, "zeroshot", 0):
        launch_workers(run, [(_devices(run.config)[0], [0])], ["zeroshot"])
    content = read_logits(run.directory / "zeroshot.npz", run.fingerprint)
    correct = softmax(content["logits"][:, 0]).argmax(1) == content["labels"]
    table = accuracy_by_type(run.train.set_index("id").loc[content["ids"], "type"], correct)
    table.loc["all"] = [len(correct), correct.mean()]
    return table.astype({"rows": int})


def run_folds(config: Config) -> list[FoldResult]:
    """Train and predict all folds of the run at `config.run_dir`, one worker per GPU with whole folds; resumable."""
    run = Run.open(config.run_dir)
    atomic_write(run.directory / "session.json", json.dumps({"started": time.time()}))
    devices, folds = _devices(config), config.folds_to_train
    jobs = [(device, folds[number :: len(devices)]) for number, device in enumerate(devices[: len(folds)])]
    # The weights are selected once all folds are trained: with several devices, by a second round of workers.
    for stages in [["train", "predict"]] if len(jobs) == 1 else [["train"], ["predict"]]:
        if not all(stage_is_done(run, stage, fold) for stage in stages for fold in folds):
            launch_workers(run, jobs, stages)
    return [read_fold_result(run, fold) for fold in folds]


def preflight(config: Config, rows: int = 64) -> dict:
    """Try everything once on `rows` training rows before hours are spent: the facts learned, for a table."""
    competition = load_competition(config.data_dir, config.max_fallback_share, config.rows_to_use, config.seed)
    count = len(competition.train)
    frame = competition.train.sample(min(rows, count), random_state=config.seed, ignore_index=True)
    session = open_session(config, frame.iloc[0])
    prompts = [make_prompt(session, frame, row, (0, 1, 2, 3)) for row in range(len(frame))]
    session.cache.fill(frame, pixel_budget(config, session.processor), session.progress)
    start = time.perf_counter()
    probabilities = softmax(predict_logits(session, frame, [View("rotation 0")])[:, 0])
    score_seconds = (time.perf_counter() - start) / len(frame)
    trainable, step_seconds = _time_training(session, frame, prompts)
    folds, views = len(config.folds_to_train), len(all_views(config, session.processor))
    trained = count * (1 - 1 / config.n_folds) * config.num_epochs * folds
    scored = (len(competition.test) * folds + count * folds / config.n_folds) * views
    return {
        "letter tokens": " ".join(f"{c}={list(ids)}" for c, ids in zip(CHOICES, session.letters, strict=True)),
        "prompt": render_prompt(session.processor, build_messages(frame.iloc[0], templates=session.templates)),
        "tokens per prompt": f"at most {max(len(prompt.input_ids) for prompt in prompts)}",
        "token_budget": pixel_budget(config, session.processor)[1] // merged_patch_area(session.processor),
        "token_counts": {name: image_token_counts(session, getattr(competition, name)) for name in ("train", "test")},
        "trainable parameters": f"{trainable:,}",
        "seconds per training question": round(step_seconds, 3),
        "seconds per scored question": round(score_seconds, 4),
        "zero-shot accuracy": f"{accuracy(probabilities, frame['label'].to_numpy()):.2f} on {len(frame)} rows",
        "peak memory": str(memory_summary()),
        "estimated minutes on one device": round((trained * step_seconds + scored * score_seconds) / 60, 1),
    }


def image_token_counts(session: Session, frame: pd.DataFrame) -> list[int]:
    """Tokens that each row's image takes within the pixel budget."""
    budget, merged = pixel_budget(session.config, session.processor), session.processor.image_processor.merge_size**2
    sizes = zip(frame["width"], frame["height"], strict=True)
    return [math.prod(image_grid(*size, session.processor, budget)) // merged for size in sizes]


def _time_training(session: Session, frame: pd.DataFrame, prompts: Sequence[Prompt]) -> tuple[int, float]:
    """(trainable parameters, seconds per question) of forward and backward over one micro-batch, the second of two."""
    model = attach_lora(session.model, session.config, session.config.seed)
    model.train()
    longest = sorted(prompts, key=lambda prompt: -len(prompt.input_ids))[: session.config.batch_size]
    for _ in range(2):
        start = time.perf_counter()
        batch = collate(session, longest)
        training_loss(session, last_logits(session, model, batch), batch, frame).backward()
        if session.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / len(longest)
    parameters = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    model.unload()
    return parameters, seconds


def run_preflight(config: Config) -> dict:
    """`preflight` in a process of its own, so that the notebook's never touches the GPU; raises with its last lines."""
    command = [sys.executable, str(Path(__file__).resolve()), "preflight", "--config"]
    command += [json.dumps(dataclasses.asdict(config))]
    done = subprocess.run(command, check=False, capture_output=True, text=True, encoding="utf-8")
    if done.returncode != 0:
        raise RuntimeError("Preflight failed:\n" + _tail(done.stdout + done.stderr))
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: `worker` (what run_folds starts) and `preflight` (settings from --config or the VQA_ variables)."""
    parser = argparse.ArgumentParser(prog="vqa_helpers.py")
    commands = parser.add_subparsers(dest="command", required=True)
    worker = commands.add_parser("worker", help="run stages of a prepared run directory")
    worker.add_argument("--run", required=True, help="run directory")
    worker.add_argument("--folds", required=True, help="comma-separated fold numbers")
    worker.add_argument("--stages", default="train,predict", help=f"comma-separated, from {', '.join(STAGES)}")
    worker.add_argument("--name", default="0", help="number of the worker, for its progress file")
    check = commands.add_parser("preflight", help="try everything once on a few rows")
    check.add_argument("--config", help="JSON object of config fields; default: preset auto and the VQA_ variables")
    options = parser.parse_args(arguments)
    if options.command == "worker":
        run = Run.open(options.run)
        setup_logging(run.directory, run.config.log_level, run.config.log_to_file)
        progress = ProgressFile(run.directory / f"progress_{options.name}.json")
        folds = [int(fold) for fold in options.folds.split(",")]
        run_stages(run, folds, options.stages.split(","), progress.update)
    else:
        facts = preflight(Config(**json.loads(options.config)) if options.config else load_config())
        sys.stdout.write(json.dumps(facts, ensure_ascii=False) + "\n")


__all__ = [key for key, item in globals().items() if callable(item) and item.__module__ == __name__ and key[0] != "_"]
if __name__ == "__main__":
    main()
