"""Multiple-choice visual question answering, from competition files to a submission.

The notebook calls what is in here. Its own process reads tables, plans and plots; whatever
touches a GPU happens in worker processes, which this same file starts
(`python vqa_helpers.py worker ...`). Importing it has no effect: nothing is seeded, logged or
moved to a GPU, and torch and other large libraries are imported at their first use.

The map: nine parts, their sections, and what each is about. A section uses only what stands
above it.

1. Foundations
   Exceptions                          what is raised, before anything raises it
   Finding data and models             what is attached to this machine, and which of it is a competition
   Packages                            what has to be installed, and installing it
   Runtime                             platform, GPUs, number format, attention, seeds
   Presets                             what "auto" picks, and in what each preset differs from the defaults
   Settings                            Config: every setting, declared once
   Logging                             the log, and records of one JSON object a line
   Files                               writing whole files or none, hashes, arrays
   Checkpoints                         folders that are committed whole and verified before use
   Memory                              how much memory is used, and how much is free
   Processes that work together        ranks, sums over processes, progress files, a thread that prepares ahead
2. Data
   Archives                            unpacking a competition whole or not at all
   Settings of a session               preset, overrides and environment become one Config
   Questions                           their types, choices and targets
   Tables                              CSV files, read verbatim and checked row by row
   Images                              finding, decoding, hashing
   Competition                         all tables of one competition, validated
   Leakage and folds                   copies of images, and folds that keep them together
   Augmentation                        mildly changed copies of training images
3. Model
   Families                            what differs between families of models
   Prompt                              texts, chat messages, and the tokens of the letters
   Loading                             processor and base model, quantised or not
   Adapters                            LoRA on the language model, fresh or from a file
   Image tokens                        pixel budget, patch grid, pixel inputs
   Vision cache                        features of the frozen vision tower, computed once
   Session                             what a worker loads once
   Batches                             tokenised questions, padded together
   Scores and loss                     from a batch to the four letters' scores, and the loss on them
   Fast layers                         LoRA without fp32 copies, compiled decoder layers
   Memory plan                         how a training step is spread over passes
   Filling the vision cache            when it pays, and for which images
4. Run
   Run directory                       the files of one run, and what is done in it
   Backup                              a copy on a slow, lasting disk
5. Training and inference
   Metrics                             accuracy, NLL, calibration error, collapse
   Views                               choice orders and image scales, and what they cost
   Prediction                          scores of every row in every view
   Rows in doubt                       more views for the rows whose answer leads by little
   Early stopping and weight averages  for any training loop
   Epochs                              which rows share a step, and how each is shown
   Fold training                       one fold from a fresh adapter to its result
6. Evidence
   Calibration                         temperatures, cross-fitted
   Intervals and paired tests          how sure a gain is
   Ensembles                           votes, means, weights, stacks
   Automatic choice                    another way than the mean, only where it clearly wins
   Out-of-fold rows                    their scores, and the views they admit
   Selected weights                    raw, EMA or SWA: one decision for all folds
   Out-of-fold rows in doubt           adaptive views, as the test rows get them
   Ladder                              what each step is worth
   Evaluation                          every decision that is taken on out-of-fold rows
   Test answers                        the models' probabilities, and the ensemble's answers
   Errors                              where the model is wrong, and which rows are worth a look
   Figures                             plots of what was computed above
   Tables for people                   HTML and Markdown
   Experiments                         one row for each finished run
   Report                              report.md
7. Submission and several runs
   Submission                          written, read back, checked
   Ensembles of runs                   several finished runs as one submission
   Soft targets                        votes and other runs' probabilities as targets
   Starting a run                      a new run directory, or the one to continue
8. Running
   Final model                         one more model on all rows, and whichever is wanted
   Stages                              zero-shot, training, prediction, scoring in 16 bits
   Workers                             processes on devices, and whole folds for each
   Search                              settings tried on one fold
9. Command line
   Memory by computation               from a model's shapes, before it is loaded
   Preflight                           five minutes before hours
   Worker and command line             what the processes run
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import dataclasses
import datetime
import difflib
import errno
import functools
import gc
import hashlib
import html
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Literal, get_args, get_origin, get_type_hints

import filelock
import numpy as np
import pandas as pd
import psutil
from packaging.version import Version
from PIL import Image, ImageOps
from safetensors import safe_open
from scipy import special
from scipy.optimize import minimize, minimize_scalar
from scipy.sparse import coo_matrix, triu
from scipy.sparse.csgraph import connected_components
from scipy.stats import binomtest
from tqdm import tqdm

__version__ = "0.3.0"
CHOICES = ("a", "b", "c", "d")
HERE = Path(__file__).resolve().parent
DEMO = (HERE / "data").resolve()
LOGGER = logging.getLogger("vqa")
QUESTION_TYPES = ("counting", "color", "ocr", "yesno", "location", "attribute", "general")


class _LazyModule(ModuleType):
    """A module imported at its first use: the notebook's process plans and plots without ever loading torch."""

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self.__name__), attribute)


torch = _LazyModule("torch")
transformers = _LazyModule("transformers")
peft = _LazyModule("peft")
bnb_functional = _LazyModule("bitsandbytes.functional")
bnb_parametrize = _LazyModule("bitsandbytes.nn.parametrize")
bnb_loading = _LazyModule("transformers.integrations.bitsandbytes")
quantizers = _LazyModule("transformers.quantizers.auto")
safetensors_torch = _LazyModule("safetensors.torch")
optuna = _LazyModule("optuna")
vision_process = _LazyModule("qwen_vl_utils.vision_process")


# ======= 1. Foundations ===========================================================================


# === Exceptions ===================================================================================
class CheckpointError(RuntimeError):
    """A checkpoint is damaged or belongs to another configuration."""


class DataError(ValueError):
    """The competition's files cannot be used as they are; the message names file, line, column, value and remedy."""


class ImageError(DataError):
    """An image that cannot be used; the message names its path."""


class TemplateError(ValueError):
    """The model's chat template breaks the alignment of training prompt and inference prompt."""


class SubmissionError(ValueError):
    """A submission that the competition would reject or score wrongly."""


class Interrupted(RuntimeError):
    """A worker was asked to stop and did so at a safe point: what it had done is saved."""


class OutOfTime(Interrupted):
    """The time budget ends in the training of the model on all rows; a later session continues it."""


# === Finding data and models ======================================================================
MOUNTS = {
    "/kaggle/input": 6,
    "/content": 1,
    "/content/drive/MyDrive": 1,
}  # what is attached: how deep to look there
COMPETITION_FILES = ("train.csv", "test.csv", "sample_submission.csv")
ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")


def walk_mounts(
    mounts: Mapping[str, int] | None = None,
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Folder, subfolders and files as os.walk has them, as deep as MOUNTS allows; copies of our demo are left out."""
    for mount, depth in (MOUNTS if mounts is None else mounts).items():
        for folder, folders, files in os.walk(mount, followlinks=True):
            ours = "make_demo.py" in files and folder != mount
            if ours or len(Path(folder).relative_to(mount).parts) >= depth:
                folders.clear()
            folders.sort()
            if not ours:
                yield Path(folder), folders, files


def holds_competition(archive: Path) -> bool:
    """Whether the competition's files, and not those of our demo, are in it; DataError where it cannot be read."""
    try:
        is_zip = zipfile.is_zipfile(archive)
        with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as opened:
            LOGGER.info("Looking for the competition in %s", archive)
            names = {
                Path(name).name for name in (opened.namelist() if is_zip else opened.getnames())
            }
    except Exception as error:  # each format and each decoder raises its own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(
            f"{archive}: not readable ({reason}); download it again, or remove it"
        ) from error
    return {*COMPETITION_FILES} <= names and "make_demo.py" not in names


def list_competitions(mounts: Mapping[str, int] | None) -> list[Path]:
    """The folders with the competition's three files; only where there is none, the archives with them."""
    found, archives = [], []
    for folder, folders, files in walk_mounts(mounts):
        if {*COMPETITION_FILES} <= {*files}:
            found.append(folder.resolve())
            folders.clear()  # not into its images
        archives += [folder / name for name in files if name.lower().endswith(ARCHIVE_ENDINGS)]
    return sorted(found) or sorted(filter(holds_competition, archives))


def locate_competition(data_dir: str | Path | None = None) -> Path:
    """The competition's folder, or the archive that holds it: in or at `data_dir`, else in MOUNTS, else the demo.

    ValueError where there are several, FileNotFoundError where there is none, not even the demo."""
    if data_dir is not None and Path(data_dir).is_file():
        return Path(data_dir)
    found = list_competitions(None if data_dir is None else {str(data_dir): 4})
    choose = "set data_dir in OVERRIDES (or VQA_DATA_DIR) to"
    if len(found) > 1:
        kind = "folders" if found[0].is_dir() else "archives"
        raise ValueError(
            f"Several {kind} hold a competition: {[*map(str, found)]}; {choose} one of them"
        )
    if found:
        return found[0]
    if data_dir is not None:
        names = [name for name in COMPETITION_FILES if not (Path(data_dir) / name).is_file()]
        raise FileNotFoundError(
            f"{data_dir} has no {', '.join(names)}; {choose} the folder or archive that has them"
        )
    nothing = f"No folder or archive in {', '.join(MOUNTS)} has {', '.join(COMPETITION_FILES)}"
    if not DEMO.is_dir():
        raise FileNotFoundError(
            f"{nothing}: attach the competition (Kaggle: Add Input), or {choose} where it is"
        )
    LOGGER.info("%s: the built-in demo runs", nothing)
    return DEMO


# === Packages =====================================================================================
# What a plain Kaggle or Colab machine lacks, as in requirements.txt; transformers 5.18 takes mm_encoder_outputs.
MINIMUM_VERSIONS = {
    "transformers": "5.18",
    "peft": "0.20",
    "bitsandbytes": "0.46.1",
    "accelerate": "1.6",
    "qwen-vl-utils": "0.0.14",
}
OPTIONAL_MINIMUM_VERSIONS = {
    "torchao": "0.16"
}  # not needed, but beside an older one, as on Colab, peft refuses to work


def installed_version(name: str) -> Version:
    """Of a package, which is not imported to find out; 0 where it is not installed."""
    try:
        return Version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Version("0")


def missing_requirements(minimum: Mapping[str, str] = MINIMUM_VERSIONS) -> list[str]:
    """pip requirements for every package that is absent or too old, and for what is too old of IF_INSTALLED."""
    optional = {
        name: version
        for name, version in OPTIONAL_MINIMUM_VERSIONS.items()
        if installed_version(name) > Version("0")
    }
    wanted = {**minimum, **optional}.items()
    return [
        f"{name}>={version}"
        for name, version in wanted
        if installed_version(name) < Version(version)
    ]


def install_requirements() -> list[str]:
    """pip install what is missing; RuntimeError with the way out where pip fails or an older version is loaded here."""
    if missing := missing_requirements():
        pip_install(missing)
    for name, version in MINIMUM_VERSIONS.items():
        loaded = getattr(sys.modules.get(name.replace("-", "_")), "__version__", version)
        if Version(loaded) < Version(version):
            restart = "restart the session (Kaggle: Run > Restart, Colab: Runtime > Restart session) and press Run all"
            raise RuntimeError(
                f"{name} {loaded} was loaded before {version} was there: {restart}; what was installed stays"
            )
    return missing


def pip_install(requirements: Sequence[str]) -> None:
    """From VQA_WHEELS or an attached folder `wheels`, else the internet; RuntimeError with the ways to go on."""
    attached = (
        str(place)
        for place, _, files in walk_mounts()
        if place.name == "wheels" and ".whl" in str(files)
    )
    wheels = os.environ.get("VQA_WHEELS") or next(attached, None)
    source = ["--no-index", "--find-links", wheels] if wheels else []
    command = [sys.executable, "-m", "pip", "install", "--quiet", *source, *requirements]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode == 0:
        return
    platforms = " ".join(
        f"--platform {name}_x86_64"
        for name in ("manylinux2014", "manylinux_2_24", "manylinux_2_28")
    )
    download = f"pip download -d wheels --only-binary=:all: --python-version 3.12 {platforms}"
    raise RuntimeError(
        f"pip could not take {', '.join(requirements)} from {wheels or 'the internet'}. Switch Internet on, or run "
        "this where there is internet and attach the folder `wheels` that it makes (or name it in VQA_WHEELS):\n"
        f"{download} {' '.join(map(json.dumps, requirements))}\n"
        + "\n".join(done.stderr.splitlines()[-5:])
    )


# === Runtime ======================================================================================
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}  # precision -> name in torch


@dataclass(frozen=True)
class Runtime:
    """The machine, read without initialising CUDA, and the one precision decision with its reason."""

    platform: str  # "kaggle", "colab" or "local"
    gpus: tuple[dict, ...]  # name, memory_gib, capability of each visible GPU
    precision: str  # "fp16", "bf16" or "fp32"
    attention: str  # implementation name for transformers
    reasons: tuple[str, ...]


def decide_precision(precision: str, gpus: Sequence[Mapping]) -> tuple[str, str]:
    """Number format and reason; RuntimeError for a GPU below capability 7.0 (P100), on which torch no longer runs."""
    capability, name = min(
        ((gpu["capability"], gpu["name"]) for gpu in gpus), default=(math.inf, "")
    )
    if capability < 7.0:
        raise RuntimeError(
            f"{name} is too old for torch (capability below 7.0); choose 'GPU T4 x2' instead"
        )
    if precision != "auto":
        return precision, f"precision {precision}: set in the config"
    if not gpus:
        return "fp32", "precision fp32: no GPU"
    if capability < 8.0:
        return (
            "fp16",
            f"precision fp16 with a GradScaler: capability {capability} has no bf16 arithmetic",
        )
    return "bf16", f"precision bf16 without a scaler: capability {capability}"


def decide_attention(attention: str, gpus: Sequence[Mapping], precision: str) -> tuple[str, str]:
    """SDPA, or what the config asks for, with the reason; ValueError for FlashAttention-2 where it cannot run."""
    if attention == "auto":
        return (
            "sdpa",
            "attention sdpa: it takes the mask that lets all choice orders share a prefix",
        )
    recent = bool(gpus) and min(gpu["capability"] for gpu in gpus) >= 8.0 and precision != "fp32"
    if attention == "flash_attention_2" and not (recent and importlib.util.find_spec("flash_attn")):
        needs = "capability 8.0, half precision and the package flash_attn"
        raise ValueError(
            f"Config field 'attn_implementation' is {attention!r}, which needs {needs}; 'auto' is SDPA"
        )
    return attention, f"attention {attention}: set in the config"


def detect_runtime(precision: str = "auto", attn_implementation: str = "auto") -> Runtime:
    """What this machine is and the decisions that follow from it; CUDA stays uninitialised."""
    signs = {
        "KAGGLE_KERNEL_RUN_TYPE": "kaggle",
        "COLAB_RELEASE_TAG": "colab",
    }  # Kaggle's image sets both
    platform = next((name for variable, name in signs.items() if variable in os.environ), "local")
    query = [
        "nvidia-smi",
        "--query-gpu=index,name,memory.total,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    rows = []
    if shutil.which(query[0]) is not None:  # asking torch for a capability would initialise CUDA
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            rows = [
                [cell.strip() for cell in line.split(",")]
                for line in answer.stdout.strip().splitlines()
            ]
        else:  # the tool without a driver, as on a machine whose accelerator is switched off
            LOGGER.warning(
                "No GPU is used: nvidia-smi failed with %r",
                answer.stdout.strip() or answer.stderr.strip(),
            )
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = tuple(
        {
            "index": int(index),
            "name": name,
            "memory_gib": float(memory) / 1024,
            "capability": float(capability),
        }
        for index, name, memory, capability in rows
        if chosen is None or index in chosen.replace(" ", "").split(",")
    )
    dtype, why_dtype = decide_precision(precision, gpus)
    attention, why_attention = decide_attention(attn_implementation, gpus, dtype)
    slow = "warning: torch 2.9 may be 10 to 20 times slower in the first vision layer (pytorch issue 174051): use 2.10"
    warned = (slow,) if gpus and installed_version("torch").release[:2] == (2, 9) else ()
    return Runtime(platform, gpus, dtype, attention, (why_dtype, why_attention, *warned))


def seed_everything(seed: int, deterministic: bool = True, strict: bool = False) -> None:
    """Seed Python, NumPy and torch; `deterministic` pins cuDNN's algorithms, `strict` all of torch's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cuda.enable_cudnn_sdp(
        False
    )  # its masked backward gives NaN on Hopper: pytorch issue 196678
    if strict:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cuda.enable_mem_efficient_sdp(
            False
        )  # it and flash add up their gradients in any order
        torch.backends.cuda.enable_flash_sdp(False)


def seeded_generator(*keys) -> np.random.Generator:
    """A generator that depends on nothing but `keys`: seed, epoch, sample id, ..."""
    return np.random.default_rng(
        [key if isinstance(key, int) else zlib.crc32(str(key).encode()) for key in keys]
    )


# === Presets ======================================================================================
# What "auto" picks: GiB that the smallest GPU has at least, preset, why. The other presets are picked by name only.
PRESET_BY_MEMORY = (
    (38.0, "colab_a100", "room for Qwen3-VL-8B in 16 bits and 32 questions a step"),
    (20.0, "gpu_24gb", "room for Qwen3-VL-8B in 4-bit with images of 1024 tokens"),
    (11.0, "colab_t4", "Qwen3-VL-8B fits in 4-bit"),
    (5.5, "single", "only Qwen3-VL-4B in 4-bit leaves room for a training step"),
)
PRESETS = {
    "kaggle_t4x2": {},  # two free 16 GB cards, one process and whole folds on each: what the defaults are made for
    "colab_t4": {
        "batch_size": 2,
        "grad_accum_steps": 4,
        "use_tta": False,
        "n_folds": 2,
        "train_folds": (0,),
    },
    "colab_a100": {
        "quantization": "none",
        "batch_size": 16,
        "lora_r": 32,
        "lora_alpha": 64,
        "infer_batch_size": 32,
    }
    | {"max_pixels": 1024 * 32 * 32},
    "gpu_24gb": {"max_pixels": 1024 * 32 * 32, "infer_batch_size": 32},
    "max_score": {
        "n_folds": 5,
        "num_epochs": 3,
        "tta_scales": (0.9, 1.0, 1.1),
        "infer_max_pixels": 1280 * 32 * 32,
    },
    # All GPUs together hold one model: half the speed of two workers, and a mixture of experts that none could hold.
    "large": {
        "model_id": "Qwen/Qwen3-VL-30B-A3B-Instruct",
        "spread_model": True,
        "lora_r": 8,
        "lora_alpha": 16,
    }
    | {"n_folds": 2, "train_folds": (0,)},
    "single": {"model_id": "Qwen/Qwen3-VL-4B-Instruct", "use_kfold": False, "num_epochs": 3},
    "quick_test": {
        "model_id": "Qwen/Qwen2.5-VL-3B-Instruct",
        "use_sample": True,
        "sample_size": 200,
        "num_epochs": 1,
    }
    | {"n_folds": 2, "train_folds": (0,), "use_tta": False},
    # Three million parameters on a CPU: nothing to quantise, and far too small for the large models' learning rates.
    "demo": {
        "model_id": "data/tiny_qwen3_vl",
        "quantization": "none",
        "gradient_checkpointing": False,
    }
    | {
        "num_epochs": 12,
        "batch_size": 8,
        "grad_accum_steps": 1,
        "learning_rate": 1e-3,
        "lora_dropout": 0.0,
    }
    | {"infer_batch_size": 32, "num_workers": 0},
}
SPREAD_MEMORY_SHARE = 0.7  # of each GPU for the weights of a spread model
LARGE_MODEL_GIB = 18  # the 30B in 4-bit, with its head and vision tower in 16 bits


def choose_preset(runtime: Runtime, has_competition: bool) -> tuple[str, str]:
    """The preset for the smallest of the detected GPUs, and why; RuntimeError for competition files without a GPU."""
    if not has_competition:
        return "demo", "no competition files were found"
    if not runtime.gpus:
        raise RuntimeError(
            "Competition files but no GPU: switch on the accelerator (or choose the preset yourself)"
        )
    memory, name = min((gpu["memory_gib"], gpu["name"]) for gpu in runtime.gpus)
    count = len(runtime.gpus)
    card = (
        f"{name}, {memory:.1f} GiB"
        if count == 1
        else f"{name}, {memory:.1f} GiB, the smallest of {count} GPUs"
    )
    for least, preset, why in PRESET_BY_MEMORY:
        if memory >= least:
            return "kaggle_t4x2" if preset == "colab_t4" and count > 1 else preset, f"{card}: {why}"
    raise RuntimeError(
        f"{card}: too small for every preset; take one of 6 GB or more (or choose the preset yourself)"
    )


# === Settings =====================================================================================
@dataclass(frozen=True)
class Config:
    """All settings of one run. Unknown fields and impossible values raise a ValueError that names the field."""

    preset_name: str = "custom"  # the preset this started from; part of the default run name
    preset_reason: str = "chosen by name"  # why that one, where "auto" picked it
    # Model
    model_id: str = "Qwen/Qwen3-VL-8B-Instruct"  # hub id or local folder
    quantization: Literal["4bit", "8bit", "none"] = "4bit"  # 4bit: NF4, double; language model only
    # 16bit: score OOF and test rows by the unquantised base model, too; used only where OOF does not lose
    score_precision: Literal["trained", "16bit"] = "trained"
    precision: Literal["auto", "fp16", "bf16", "fp32"] = (
        "auto"  # number format; auto follows the card
    )
    attn_implementation: Literal["auto", "sdpa", "flash_attention_2", "eager"] = (
        "auto"  # auto: sdpa
    )
    gradient_checkpointing: bool = (
        True  # compute activations again in the backward pass; see memory_plan
    )
    spread_model: bool = (
        False  # over all GPUs: for a model that fits on none of them; adds memory, not speed
    )
    compile_layers: Literal["auto", "on", "off"] = (
        "auto"  # torch.compile of the decoder layers; auto: for long jobs
    )
    lora_r: int = 16  # rank
    lora_alpha: int = 32  # scale of the update is alpha / r
    lora_dropout: float = 0.05  # probability
    # Images: one pixel budget for training and inference
    image_size: int | None = (
        None  # pixels; sets max_pixels to image_size squared; the aspect ratio is always kept
    )
    min_pixels: int | None = None  # pixels; None: 4 merged patches of the model
    max_pixels: int | None = None  # pixels; None: 768 merged patches of the model
    infer_max_pixels: int | None = (
        None  # pixels; adds views at this budget, used only where OOF gains
    )
    augment_images: int = (
        0  # mildly changed copies of each training image, features cached like its own
    )
    # Data
    data_dir: str | None = (
        None  # folder with train.csv, test.csv, sample_submission.csv; None: search, else the demo
    )
    use_sample: bool = False  # train on a random subset of the rows
    sample_size: int = 200  # rows of that subset
    max_fallback_share: float = 0.01  # share of unreadable images above which the run stops
    prompt_templates: Mapping[str, str] = field(
        default_factory=dict
    )  # question type -> template, replaces the default
    paraphrases: int = (
        1  # wordings of the default instruction that training draws from; inference takes the first
    )
    # Folds
    n_folds: int = 3
    use_kfold: bool = True  # False: one holdout of 1 / n_folds of the rows
    train_folds: tuple[int, ...] | None = None  # None: all
    # Optimisation
    num_epochs: int = 2
    batch_size: int = 4  # times grad_accum_steps: questions per optimizer step
    grad_accum_steps: int = 2
    # auto: on a GPU, questions per pass and layers to recompute by what is measured; config: batch_size and all layers
    memory_plan: Literal["auto", "config"] = "auto"
    learning_rate: float = 1e-4  # peak, reached after the warm-up, then cosine to zero
    warmup_ratio: float = 0.06  # share of all optimizer steps
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    loss: Literal["choices", "vocabulary"] = (
        "choices"  # "choices": cross-entropy over the four letters; "vocabulary": over every token
    )
    label_smoothing: float = 0.05  # spread over the choices that exist; loss "choices" only
    shuffle_choices: bool = True  # a new choice order for each question and epoch
    # Soft targets over the four choices; loss "choices" only
    use_dev_votes: bool = False  # also train on dev.csv, with the shares of its votes as targets
    distill_from: str | None = (
        None  # folder of a finished run; mixes in its OOF probabilities, spoils OOF figures
    )
    distill_weight: float = 0.5  # share of those probabilities in the target
    pseudo_label_from: str | None = (
        None  # folder of a finished run with the same folds; also train on its test answers
    )
    pseudo_label_confidence: float = 0.9  # probability that such an answer has at least
    use_ema: bool = (
        True  # also keep an exponential average of the adapter; used only where OOF says so
    )
    ema_decay: float = 0.999  # upper bound; step t uses min(ema_decay, (1 + t) / (10 + t))
    use_swa: bool = (
        False  # also keep the plain average from swa_start_epoch on; used only where OOF says so
    )
    swa_start_epoch: int = (
        1  # epochs before averaging starts; the learning rate stays constant from there
    )
    use_early_stopping: bool = False
    early_stopping_patience: int = 2  # epochs
    early_stopping_min_delta: float = 0.001  # accuracy
    mix_weights: bool = (
        False  # score with all kinds of weights, where OOF prefers their mean to each of them
    )
    final_retrain: bool = (
        False  # one more model, on all rows; it joins the submission, and no OOF row can judge it
    )
    # Inference
    use_tta: bool = True
    tta_rotations: int = 4  # choice orders: 1, 2 or 4
    tta_scales: tuple[float, ...] = (1.0,)  # factors on the pixel budget
    adaptive_tta: float | None = (
        None  # share of the last step of views' cost, spent on rows in doubt; None: all rows
    )
    use_batch_inference: bool = True  # False: one question at a time
    infer_batch_size: int = 16  # questions per forward pass, each with all its choice orders
    zeroshot_rows: int = (
        256  # training rows scored with the base model before training; 0: all of them
    )
    use_temperature_scaling: bool = True
    # over folds; weighted: of views; auto: the mean, or weighted or stacked views where OOF clearly prefers them
    ensemble_method: Literal["auto", "mean", "vote", "weighted"] = "auto"
    # Running
    seed: int = 42
    deterministic: bool = True  # deterministic cuDNN
    strict_determinism: bool = (
        False  # the same bits on a GPU too: deterministic attention and sums, slower
    )
    num_workers: int = 2  # image decoding processes per worker
    time_budget_hours: float | None = (
        None  # hours from training's start, on Kaggle the notebook's; None: 11 on Kaggle
    )
    save_every_epoch: bool = True
    save_every_minutes: float = 20.0  # minutes between checkpoints inside an epoch
    save_every_steps: int = (
        500  # optimizer steps, or batches of inference, between checkpoints: whichever is first
    )
    max_skipped_steps: int = (
        10  # optimizer steps with a non-finite loss or gradient, above which the fold stops
    )
    trust_remote_code: bool = False  # run Python code that comes with a model
    cache_dir: str | None = (
        None  # vision features on disk; None: the system's folder for temporary files
    )
    resume_from: tuple[str, ...] = (
        "/kaggle/input",
        "/content/drive/MyDrive/vqa",
    )  # where earlier runs may lie
    backup_dir: str | None = (
        None  # a slow, lasting disk such as Drive: gets verified checkpoints and whatever is done
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_to_file: bool = True
    output_dir: str = "outputs"
    run_name: str | None = None  # None: preset and fingerprint, the same in every session

    def __post_init__(self):
        for name in ("train_folds", "tta_scales", "resume_from"):  # JSON brings lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for check, name, needs in _config_rules(self):
            if not check:
                raise ValueError(
                    f"Config field {name!r} is {getattr(self, name)!r}; it needs {needs}"
                )

    @classmethod
    def preset(cls, name: str, **overrides) -> Config:
        """The named preset with some fields replaced; "auto" picks one for the detected hardware."""
        picked = {}
        if name == "auto":
            has_competition = locate_competition(overrides.get("data_dir")) != DEMO
            name, picked["preset_reason"] = choose_preset(detect_runtime(), has_competition)
        fields = [item.name for item in dataclasses.fields(cls)]
        given = [
            ("preset", name, [*PRESETS, "auto"]),
            *(("config field", override, fields) for override in overrides),
        ]
        for kind, word, known in given:
            if word not in known:
                close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
                raise ValueError(f"Unknown {kind} {word!r}; {hint}")
        return cls(**{"preset_name": name, **picked, **PRESETS[name], **overrides})

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every field that can change a result; where files lie and how loudly we log cannot."""
        relevant = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in BOOKKEEPING_FIELDS
        }
        teachers = {
            name: relevant[name] for name in ("distill_from", "pseudo_label_from") if relevant[name]
        }
        relevant |= {
            name: Path(folder).name for name, folder in teachers.items()
        }  # wherever they lie
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()

    @property
    def rows_to_use(self) -> int | None:
        return self.sample_size if self.use_sample else None

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / (
            self.run_name or f"{self.preset_name}-{self.fingerprint[:8]}"
        )

    @property
    def model_path(self) -> str:
        """A local folder as an absolute path (also relative to this file), anything else as a hub id."""
        folders = [
            folder for folder in (Path(self.model_id), HERE / self.model_id) if folder.is_dir()
        ]
        return str(folders[0].resolve()) if folders else self.model_id

    @property
    def model_files(self) -> str:
        """Names and sizes of a local model's files, so that a run is not continued on another one; "" for a hub id."""
        files = sorted(
            path
            for path in Path(self.model_path).glob("*")
            if path.suffix in (".safetensors", ".json")
        )
        return ", ".join(f"{path.name} {path.stat().st_size}" for path in files)

    @property
    def folds_to_train(self) -> tuple[int, ...]:
        """`train_folds`, or every fold; only the first one where a single holdout is asked for."""
        return (self.train_folds or tuple(range(self.n_folds))) if self.use_kfold else (0,)

    def table(self) -> pd.DataFrame:
        """Every field with its value and the default it differs from, those that differ first, for the notebook."""
        both = (dataclasses.asdict(config).items() for config in (self, Config()))
        values, defaults = (
            pd.Series({name: str(value) for name, value in items}) for items in both
        )
        table = pd.DataFrame(
            {"value": values, "default, where it differs": defaults.where(values != defaults, "")}
        )
        return table.loc[(values == defaults).sort_values(kind="stable").index]


BOOKKEEPING_FIELDS = {  # fields that cannot change a result
    *("data_dir", "output_dir", "run_name", "log_level", "log_to_file"),
    *(
        "num_workers",
        "save_every_epoch",
        "save_every_minutes",
        "save_every_steps",
        "time_budget_hours",
    ),
    *(
        "cache_dir",
        "resume_from",
        "backup_dir",
        "max_skipped_steps",
        "trust_remote_code",
        "preset_reason",
    ),
}
_KINDS = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "tuple": tuple,
    "Mapping": Mapping,
}  # others: str
_RANGES = (  # what the fields need, its check, their names
    ("at least 2", lambda x: x >= 2, "n_folds sample_size"),
    (
        "at least 1",
        lambda x: x >= 1,
        "lora_r lora_alpha num_epochs batch_size grad_accum_steps infer_batch_size",
    ),
    ("at least 1", lambda x: x >= 1, "early_stopping_patience swa_start_epoch save_every_steps"),
    (
        "at least 0",
        lambda x: x >= 0,
        "zeroshot_rows num_workers weight_decay early_stopping_min_delta seed",
    ),
    ("at least 0", lambda x: x >= 0, "max_skipped_steps augment_images"),
    (
        "0 <= value < 1",
        lambda x: 0 <= x < 1,
        "lora_dropout warmup_ratio label_smoothing ema_decay max_fallback_share",
    ),
    ("0 < value < 1", lambda x: 0 < x < 1, "adaptive_tta"),
    (
        "a positive number",
        lambda x: x > 0,
        "learning_rate max_grad_norm save_every_minutes time_budget_hours",
    ),
    ("a positive number", lambda x: x > 0, "image_size min_pixels max_pixels infer_max_pixels"),
    ("1, 2 or 4", lambda x: x in (1, 2, 4), "tta_rotations"),
    ("0 < value <= 1", lambda x: 0 < x <= 1, "distill_weight pseudo_label_confidence"),
    ("1 to 4", lambda x: 1 <= x <= 4, "paraphrases"),
)


def _config_rules(config: Config) -> Iterator[tuple[bool, str, str]]:
    """Triples of (holds, field, what the field needs). Kinds come first, so that later rules may compare values."""
    for name, hint in get_type_hints(Config).items():
        value, written = getattr(config, name), Config.__annotations__[name]
        kind = _KINDS.get(re.match(r"\w+", written).group(), str)
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        yield fits or (value is None and written.endswith("None")), name, written
        if get_origin(hint) is Literal:
            yield value in get_args(hint), name, f"one of {', '.join(get_args(hint))}"
    for needs, holds, names in _RANGES:
        for value, name in ((getattr(config, name), name) for name in names.split()):
            yield value is None or holds(value), name, needs
    if config.min_pixels and config.max_pixels:
        yield (
            config.min_pixels <= config.max_pixels,
            "min_pixels",
            f"at most max_pixels, {config.max_pixels}",
        )
    same = config.score_precision == "16bit" and config.quantization == "none"
    yield (
        not same,
        "score_precision",
        "'trained' where quantization is 'none': there is nothing else to score with",
    )
    scales = config.tta_scales
    yield (
        all(0.25 <= scale <= 4 for scale in scales) and 1.0 in scales,
        "tta_scales",
        "factors in [0.25, 4] with 1.0",
    )
    further = config.use_tta and (
        config.tta_rotations > 1 or len(set(scales)) > 1 or config.infer_max_pixels
    )
    yield (
        config.adaptive_tta is None or bool(further),
        "adaptive_tta",
        "use_tta with rotations or scales to save on",
    )
    blind = config.adaptive_tta and (config.score_precision == "16bit" or config.final_retrain)
    yield (
        not blind,
        "adaptive_tta",
        "score_precision 'trained' and no final_retrain: it reads OOF rows in every view",
    )
    several = (config.use_ema or config.use_swa) and config.adaptive_tta is None
    yield (
        several or not config.mix_weights,
        "mix_weights",
        "use_ema or use_swa, to mix with, and no adaptive_tta",
    )
    folds = range(config.n_folds) if config.train_folds is None else config.train_folds
    yield set(folds) <= set(range(config.n_folds)), "train_folds", f"folds below {config.n_folds}"
    yield 0 < len(folds) == len(set(folds)), "train_folds", "at least one fold, and none twice"
    soft = config.use_dev_votes or config.distill_from or config.pseudo_label_from
    yield (
        config.loss == "choices" or not soft,
        "loss",
        "'choices' where targets are soft (votes or another run's)",
    )
    late = config.use_swa and config.swa_start_epoch >= config.num_epochs
    yield not late, "swa_start_epoch", f"an epoch below num_epochs, {config.num_epochs}"
    yield (
        set(config.prompt_templates) <= set(QUESTION_TYPES),
        "prompt_templates",
        f"keys among {QUESTION_TYPES}",
    )


# === Logging ======================================================================================
def setup_logging(
    log_dir: str | Path, level: int | str = logging.INFO, to_file: bool = True
) -> logging.Logger:
    """Log to the console and to `log_dir`/run.log with timestamps. Safe to call again: handlers are replaced."""
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()
    LOGGER.addHandler(logging.StreamHandler(sys.stdout))
    if to_file:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        LOGGER.addHandler(logging.FileHandler(Path(log_dir) / "run.log", encoding="utf-8"))
    for handler in LOGGER.handlers:
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
        )
    LOGGER.setLevel(level)
    LOGGER.propagate = False
    return LOGGER


@dataclass(frozen=True)
class MetricLogger:
    """Appends one JSON object a line, so that a killed run keeps every line it wrote."""

    path: str | Path

    def log(self, **values) -> None:
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(
                json.dumps({"time": round(time.time(), 3), **values}, ensure_ascii=False) + "\n"
            )


def read_json_lines(path: Path) -> list[dict]:
    """The records that MetricLogger wrote; a line that a kill or a full disk has cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


# === Files ========================================================================================
def _fsync_folder(path: Path) -> None:
    if os.name != "nt":  # Windows cannot open a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_file(path: Path, content: bytes, durable: bool = True) -> None:
    """Write and sync a new file; a full disk becomes a CheckpointError with the bytes needed and free."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        path.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        problem = f"the disk is full: {len(content):,} bytes are needed, {free:,} are free"
        raise CheckpointError(
            f"{path}: {problem}; free some space and run again to continue"
        ) from error


def atomic_write(path: str | Path, content: bytes | str, durable: bool = True) -> None:
    """Replace `path` by `content` so that a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _write_file(
        temporary, content.encode("utf-8") if isinstance(content, str) else content, durable
    )
    os.replace(temporary, path)
    if durable:
        _fsync_folder(path.parent)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_same_run(path: Path, found: str, expected: str) -> None:
    """Raise CheckpointError unless the fingerprint stored in `path` is the run's."""
    if found != expected:
        raise CheckpointError(
            f"{path} belongs to another configuration or data set; choose a new run_name"
        )


def write_arrays(path: Path, fingerprint: str, **arrays: np.ndarray) -> None:
    """Save named arrays with the fingerprint of their run, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, fingerprint=np.array(fingerprint))
    atomic_write(path, buffer.getvalue())


def read_arrays(path: Path, fingerprint: str) -> dict[str, np.ndarray]:
    """Load what `write_arrays` wrote. Raises CheckpointError for a damaged file, or one of another run."""
    try:
        with np.load(path, allow_pickle=False) as file:  # checks each array's CRC
            content = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); delete it and run again to make it anew"
        ) from error
    require_same_run(path, str(content.get("fingerprint")), fingerprint)
    return content


# === Checkpoints ==================================================================================
class CheckpointManager:
    """Folders of one tensor file, one state file and metadata, each committed whole and verified before use."""

    def __init__(self, directory: str | Path, keep: int = 2):
        self.directory, self.keep = Path(directory), keep

    def save(self, step: int, tensors: Mapping, state: Mapping, metadata: Mapping) -> Path:
        """Commit a checkpoint: `tensors` as safetensors, `state` for torch.load(weights_only=True), `metadata` JSON."""
        weights = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        files = {
            "tensors.safetensors": safetensors_torch.save(weights),
            "state.pt": buffer.getvalue(),
        }
        files["metadata.json"] = json.dumps({"step": step, **metadata}).encode()
        manifest = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        files["manifest.json"] = json.dumps(manifest).encode()
        # The folder gets its name last, so that a kill at any point leaves the checkpoints before it intact.
        self.directory.mkdir(parents=True, exist_ok=True)
        final = self.directory / f"step_{step:08d}"
        while final.exists():  # saved twice at one step, or damaged: "+" sorts behind it
            final = final.with_name(final.name + "+")
        with tempfile.TemporaryDirectory(
            prefix=".incomplete-", dir=self.directory, ignore_cleanup_errors=True
        ) as new:
            for name, content in files.items():
                _write_file(Path(new) / name, content)
            os.replace(new, final)
        _fsync_folder(self.directory)
        self.prune()
        return final

    @staticmethod
    def problem(path: Path) -> str | None:
        """Why the checkpoint at `path` cannot be trusted, or None."""
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            damaged = [
                name for name, digest in manifest.items() if file_sha256(path / name) != digest
            ]
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return f"SHA-256 differs: {', '.join(damaged)}" if damaged else None

    def latest_verified(self) -> Path | None:
        """The newest checkpoint whose manifest verifies; the ones passed over are logged with the reason."""
        for path in sorted(self.directory.glob("step_*"), reverse=True):
            if not (problem := self.problem(path)):
                return path
            LOGGER.warning("Skipped checkpoint %s: %s", path, problem)
        return None

    def restore(self, path: Path) -> tuple[dict, dict, dict]:
        """(tensors, state, metadata), all on the CPU. Raises CheckpointError if the manifest does not verify."""
        if problem := self.problem(path):
            raise CheckpointError(
                f"{path} is damaged ({problem}); delete it to continue from an older one"
            )
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        metadata = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        return safetensors_torch.load_file(path / "tensors.safetensors"), state, metadata

    def prune(self) -> None:
        """Delete what is older than the newest `keep` verified checkpoints, and leftovers of killed writes."""
        paths = sorted(self.directory.glob("step_*"))
        verified = [path for path in paths if self.problem(path) is None]
        outdated = [path for path in paths if verified and path < verified[-self.keep :][0]]
        for path in [*outdated, *self.directory.glob(".incomplete-*")]:
            shutil.rmtree(path)


def _checkpoint_weights(model) -> dict:
    """Trainable parameters and buffers of the state dict; under every name, where two share one tensor."""
    kept = {
        name
        for name, weight in model.named_parameters(remove_duplicate=False)
        if weight.requires_grad
    }
    kept |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name in kept}


def save_checkpoint(model, optimizer, scheduler, epoch, fold, metrics, path, logger=None) -> Path:
    """Save any module's trainable weights and buffers with optimizer and scheduler (either may be None) in one file."""
    # NumPy scalars would need unpickling.
    metrics = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in metrics.items()
    }
    content = {
        "model": _checkpoint_weights(model),
        "epoch": epoch,
        "fold": fold,
        "metrics": metrics,
    }
    for name, part in (("optimizer", optimizer), ("scheduler", scheduler)):
        content[name] = part.state_dict() if part is not None else None
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, buffer.getvalue())
    if logger is not None:
        logger.info(
            "Saved checkpoint %s (epoch %s, fold %s, %d bytes)", path, epoch, fold, buffer.tell()
        )
    return Path(path)


def load_checkpoint(model, optimizer, scheduler, path, logger=None) -> tuple:
    """Load what `save_checkpoint` wrote; (epoch, fold, metrics), or CheckpointError, changing nothing, if unfit."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    if differing := sorted(set(_checkpoint_weights(model)) ^ set(content["model"])):
        raise CheckpointError(f"{path} does not fit the model; differing keys: {differing}")
    wanted = {
        name: part
        for name, part in {"optimizer": optimizer, "scheduler": scheduler}.items()
        if part is not None
    }
    if absent := [name for name in wanted if content[name] is None]:
        raise CheckpointError(f"{path} was saved without {' and '.join(absent)}")
    model.load_state_dict(content["model"], strict=False)
    for name, part in wanted.items():
        part.load_state_dict(content[name])
    if logger is not None:
        logger.info(
            "Loaded checkpoint %s (epoch %s, fold %s)", path, content["epoch"], content["fold"]
        )
    return content["epoch"], content["fold"], content["metrics"]


# === Memory =======================================================================================
def _cuda_is_in_use() -> bool:
    return "torch" in sys.modules and torch.cuda.is_initialized()


def memory_summary() -> dict[str, float]:
    """Memory in GiB: this process's resident set and, with CUDA, allocated, reserved and peak of the fullest GPU."""
    summary = {"rss_gib": psutil.Process().memory_info().rss / 2**30}
    if _cuda_is_in_use():
        gpus = range(torch.cuda.device_count())
        summary["gpu_gib"] = max(map(torch.cuda.memory_allocated, gpus)) / 2**30
        summary["gpu_reserved_gib"] = max(map(torch.cuda.memory_reserved, gpus)) / 2**30
        summary["gpu_peak_gib"] = max(map(torch.cuda.max_memory_allocated, gpus)) / 2**30
    return {name: round(value, 2) for name, value in summary.items()}


def reset_peak_memory() -> None:
    """Start to measure the peak of every GPU anew."""
    for gpu in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(gpu)


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
        reset_peak_memory()
    start, report = time.perf_counter(), {"label": label}
    yield report
    report |= {"seconds": round(time.perf_counter() - start, 1), **memory_summary()}
    logger.info("%s: %s", label, {name: value for name, value in report.items() if name != "label"})


def memory_budget() -> float:
    """Bytes that this process may allocate on each of its GPUs, less 8 % for fragmentation."""
    budgets = []
    for gpu in range(torch.cuda.device_count()):
        (free, total), reserved = torch.cuda.mem_get_info(gpu), torch.cuda.memory_reserved(gpu)
        share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(
            gpu
        )  # torch 2.8 can tell
        budgets.append(0.92 * (reserved + min(free, total * share - reserved)))
    return min(budgets)


def free_gib() -> float:
    """GiB that this process may take of its fullest GPU, or of RAM without one."""
    return (
        memory_budget() if torch.cuda.is_available() else psutil.virtual_memory().available
    ) / 2**30


# === Processes that work together =================================================================
def rank_and_world_size() -> tuple[int, int]:
    """(rank, size) of the processes that share the work of a fold; (0, 1) for one that works alone."""
    joined = "torch" in sys.modules and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if joined else (0, 1)


def init_process_group() -> None:
    """Meet the other processes, where RANK and WORLD_SIZE say so: run_folds sets them, and `accelerate launch`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
        # One may score for long before the others meet it; launch_workers sees to it that nobody waits for the dead.
        torch.distributed.init_process_group(
            "nccl" if nccl else "gloo", timeout=datetime.timedelta(days=1)
        )


def hide_other_gpus() -> None:
    """Hide the GPUs of the other processes that `accelerate launch` has started here."""
    if "LOCAL_RANK" in os.environ:
        number, visible = int(os.environ["LOCAL_RANK"]), os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
        os.environ["LOCAL_RANK"] = "0"


def all_reduce_sum(tensor):
    """The sum over the team, in place."""
    if rank_and_world_size()[1] > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def any_process(wish: bool) -> bool:
    """Whether any process of the team wishes it; all must take the same turn, or they would wait for each other."""
    if rank_and_world_size()[1] == 1:
        return wish
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return bool(all_reduce_sum(torch.tensor(float(wish), device=device)) > 0)


def all_reduce_gradients(parameters: Iterable) -> None:
    """Replace every gradient by its sum over the team, in one message."""
    if rank_and_world_size()[1] > 1:
        gradients = []
        for value in parameters:
            value.grad = (
                torch.zeros_like(value) if value.grad is None else value.grad
            )  # a short step has no row for all
            gradients.append(value.grad)
        parts = all_reduce_sum(torch.cat([value.flatten() for value in gradients])).split(
            [*map(torch.numel, gradients)]
        )
        for value, part in zip(gradients, parts, strict=True):
            value.copy_(part.view_as(value))


@dataclass
class ProgressFile:
    """What a worker is doing now, in a small JSON file that the notebook polls; written at most twice a second."""

    path: Path
    parent: int = 0  # id of the process that started this one; 0: do not mind its end
    stop_reason: str = ""
    written: float = 0.0

    def request_stop(self, number: int, frame) -> None:
        """A signal handler: the work stops at its next call of `update` that may do so, made at safe points only."""
        self.stop_reason = signal.Signals(number).name

    def update(self, stage: str, done: int, total: int, together: bool = False, **details) -> None:
        """Write the state. Interrupted after a signal or the parent's death; in a team only where it is `together`."""
        if self.parent and os.getppid() != self.parent:
            self.stop_reason = "the end of the notebook's process"
        if done == total or self.stop_reason or time.monotonic() - self.written > 0.5:
            self.written = time.monotonic()
            state = {"stage": stage, "done": done, "total": total, **details}
            atomic_write(self.path, json.dumps(state), durable=False)
        if (together or rank_and_world_size()[1] == 1) and any_process(bool(self.stop_reason)):
            raise Interrupted(
                f"stopped by {self.stop_reason or 'another process'} in {stage}; run again to continue"
            )


def prefetch(batches: Iterator) -> Iterator:
    """The same items; while one is used, a thread prepares the next two."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, batches, None) for _ in range(2))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, batches, None))
            yield batch


# ======= 2. Data ==================================================================================

# === Archives =====================================================================================
MAX_MEMBERS = 2_000_000  # of an archive
MAX_UNPACKED_BYTES = 64 * 2**30
MAX_RATIO = 200  # of unpacked to packed bytes, from 100 MiB on


def _check_members(opened, packed: int, free: int) -> None:
    """ValueError about the first member that must not be unpacked from an archive of `packed` bytes."""
    if isinstance(opened, tarfile.TarFile):
        members = ((part.name, part.size, part.isfile() or part.isdir()) for part in opened)
    else:  # the kind on Unix, where it is given: 4 for a folder, 8 for a file
        members = (
            (p.filename, p.file_size, p.external_attr >> 28 in (0, 4, 8)) for p in opened.infolist()
        )
    limits = {
        free: "disk",
        max(MAX_RATIO * packed, 100 * 2**20): "decompression bomb",
        MAX_UNPACKED_BYTES: "archive",
    }
    most, total = min(limits), 0
    for number, (name, size, plain) in enumerate(members, start=1):
        total += size
        if not plain or re.search(r"^/|^[A-Za-z]:|\\|(^|/)\.\.(/|$)", name):
            raise ValueError(
                f"member {name!r} is a link or a device, or its name leads out of the folder"
            )
        if number > MAX_MEMBERS or total > most:
            found = f"member {name!r} is number {number:,} and makes {total:,} bytes in all"
            raise ValueError(f"{found}; the limit is {MAX_MEMBERS:,} and {most:,} ({limits[most]})")
    if isinstance(opened, tarfile.TarFile):
        opened.fileobj.seek(opened.offset)  # tarfile takes a damaged member for the end
        if not opened.fileobj.read(2**20).startswith(
            bytes(512)
        ):  # reading on, a .gz is compared with its checksum
            raise EOFError("the end of the archive is missing, or a member is damaged")


def unpack_archive(archive: str | Path, folder: str | Path) -> Path:
    """Unpack a .zip or .tar(.gz) into the new `folder`, whole or not at all; DataError names archive and member."""
    archive, folder = Path(archive), Path(folder)
    if folder.exists():
        raise DataError(
            f"{folder}: exists already; delete it or unpack {archive.name} into a new folder"
        )
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # what a killed process left
    unfinished.mkdir(parents=True)
    try:
        is_zip = zipfile.is_zipfile(archive)
        with (
            zipfile.ZipFile(archive, metadata_encoding="utf-8")
            if is_zip
            else tarfile.open(archive) as opened
        ):
            _check_members(opened, archive.stat().st_size, shutil.disk_usage(unfinished).free)
            opened.extractall(unfinished, **({} if is_zip else {"filter": "data"}))
        return unfinished.rename(folder)
    except Exception as error:  # each format and each decoder raises its own
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{archive}: not unpacked ({reason}); download it again, or unpack it by hand"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def unpack_competition(archive: Path) -> Path:
    """The competition's folder, unpacked once into the system's folder for temporary files and then found again."""
    facts = archive.stat()
    key = hashlib.sha256(
        f"{archive.name} {facts.st_size} {facts.st_mtime_ns}".encode()
    ).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()).resolve() / f"vqa-data-{key}"
    LOGGER.info(
        "Competition data: %s, %s %s",
        folder,
        "from" if folder.is_dir() else "being unpacked from",
        archive,
    )
    return find_competition(folder if folder.is_dir() else unpack_archive(archive, folder))


def find_competition(data_dir: str | Path | None = None) -> Path:
    """The competition's folder, as `locate_competition` finds it; unpacked first where it is an archive."""
    found = locate_competition(data_dir)
    return unpack_competition(found) if found.is_file() else found


# === Settings of a session ========================================================================
def load_config(
    preset: str = "auto", overrides: Mapping | None = None, environ: Mapping = os.environ
) -> Config:
    """Preset, then `overrides`, then the VQA_ variables; ValueError for what is unknown, impossible or not JSON."""
    variables = {
        "data_dir": "DATA_DIR",
        "model_id": "MODEL",
        "output_dir": "OUTPUT_DIR",
        "run_name": "RUN_NAME",
    }
    places = {name: environ.get(f"VQA_{variable}") for name, variable in variables.items()}
    text = environ.get("VQA_OVERRIDES") or "{}"
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"VQA_OVERRIDES is not valid JSON ({error}): {text!r}") from error
    if not isinstance(parsed, dict):
        raise ValueError(
            f'VQA_OVERRIDES must be a JSON object such as {{"num_epochs": 1}}, not {text!r}'
        )
    fields = {
        **(overrides or {}),
        **{name: place for name, place in places.items() if place},
        **parsed,
    }
    fields["data_dir"] = str(find_competition(fields.get("data_dir")))
    return fall_back_to_smaller_model(Config.preset(environ.get("VQA_PRESET") or preset, **fields))


def fall_back_to_smaller_model(config: Config) -> Config:
    """The 8B in place of preset "large"'s 30B, with the reason, where the GPUs together cannot hold that one."""
    if config.model_id != PRESETS["large"]["model_id"] or not config.spread_model:
        return config
    room = SPREAD_MEMORY_SHARE * sum(gpu["memory_gib"] for gpu in detect_runtime().gpus)
    if room >= LARGE_MODEL_GIB:
        return config
    reason = f"stepped down to the 8B: the 30B needs {LARGE_MODEL_GIB} GiB for its weights, these GPUs have {room:.0f}"
    return dataclasses.replace(
        config, model_id=Config.model_id, spread_model=False, preset_reason=reason
    )


# === Questions ====================================================================================
# First match wins, so the narrow patterns stand before the wide ones: "what colour is the text" asks for a colour.
_QUESTION_PATTERNS = {
    "counting": r"몇\s*([개명대권장병채척잔번층줄칸쌍벌]|마리|송이|그루|켤레|가지|자루)|개수|how many|number of",
    "color": r"색|빛깔|colou?r",
    "ocr": r"글자|글씨|숫자|문자|적힌|적혀|쓰인|쓰여|써\s*있|읽|표지판|간판|텍스트|번호"
    r"|\btext\b|written|\bread\b|\bsays?\b|digit",
    "location": r"어디|위치|어느\s*(쪽|방향|곳)|왼쪽|오른쪽|\bwhere\b|which side|located",
    "yesno": r"^(?!.*(어떤|무슨|무엇|누구|어느|뭐))"
    r".*((있|맞|보이|하|같|되)(나요|습니까|는가|을까요?)|인가요|입니까)\W*$"
    r"|^(is|are|does|do|can)\b",
    "attribute": r"모양|재질|종류|상태|형태|크기|날씨|어떤|무슨|shape|material|kind of|type of|\bsize\b",
}


def question_type(text: str) -> str:
    """Return one of QUESTION_TYPES for a Korean or English question, by its wording alone."""
    matches = (
        name
        for name, pattern in _QUESTION_PATTERNS.items()
        if re.search(pattern, text.strip(), re.IGNORECASE)
    )
    return next(matches, "general")


def neutralise_special_tokens(text: str) -> str:
    """Break text that a tokenizer would read as a control token: `<|im_end|>` becomes `< |im_end| >`."""
    return re.sub(r"<(\|[^<>|\s]{1,40}\||/?(?:think|tool_call|tool_response))>", r"< \1 >", text)


def present_choices(row: Mapping) -> list[bool]:
    """Whether each of a, b, c, d holds any text; a blank choice cannot be the answer."""
    return [bool(str(row[choice]).strip()) for choice in CHOICES]


TARGET_COLUMNS = tuple(f"target_{choice}" for choice in CHOICES)


def target_probabilities(row: Mapping) -> tuple[float, ...]:
    """Target over a, b, c, d: the row's soft one, else its label; zeros for a row that has neither."""
    hard = (float(choice == row.get("label", -1)) for choice in range(4))
    return tuple(
        float(row.get(name, value)) for name, value in zip(TARGET_COLUMNS, hard, strict=True)
    )


# === Tables =======================================================================================
COLUMNS = ("id", "path", "question", *CHOICES, "answer")
VOTE_COLUMNS = ("answer1", "answer2", "answer3", "answer4", "answer5")
TABLE_COLUMNS = {
    "train.csv": COLUMNS,
    "test.csv": COLUMNS[:-1],
    "sample_submission.csv": ("id", "answer"),
    "dev.csv": (*COLUMNS[:-1], *VOTE_COLUMNS),  # some competitions have it
}


def _raise_for_first_row(
    file: str, frame: pd.DataFrame, wrong: pd.Series, column: str, problem: str
) -> None:
    """DataError about the first row of `frame` where `wrong` is true, if there is one."""
    for line, value in frame.loc[wrong, ["line", column]].head(1).to_numpy():
        raise DataError(f"{file}, line {line}, column {column!r}, value {value[:80]!r}: {problem}")


def _read_csv_records(path: Path, fallbacks: Counter) -> list[tuple[int, list[str]]]:
    """Line (1-based) and fields of the header and of every record that is not blank; UTF-8, else Korean cp949."""
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; set data_dir to the folder with {', '.join(COMPETITION_FILES)}"
        )
    content, records, line = path.read_bytes(), [], 1
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:  # never as latin-1, which would read anything
        text = content.decode("cp949", errors="replace")
        if "\ufffd" in text or not re.search(
            "[가-힣]", text
        ):  # other encodings often decode, but not to Korean
            line += content.count(b"\n", 0, error.start)
            raise DataError(
                f"{path.name}, line {line}: not UTF-8 ({error}) nor cp949; save it as UTF-8"
            ) from error
        fallbacks["csv_read_as_cp949"] += 1
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for fields in reader:
            if any("\0" in field for field in fields):
                raise csv.Error("a NUL byte, as in a file that is not UTF-8")
            if fields:
                records.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path.name}, line {line}: {error}; check the quotes from here on and the encoding"
        ) from error
    return records or [(1, [])]


def _read_competition_table(path: Path, fallbacks: Counter) -> tuple[pd.DataFrame, list[str]]:
    """The columns used, verbatim, plus `line`, and the header. (pandas would shift short rows and lose "None".)"""
    (first, header), *records = _read_csv_records(path, fallbacks)
    columns = [
        "path" if name.strip().casefold() == "image" else name.strip().casefold() for name in header
    ]
    needed = TABLE_COLUMNS[path.name]
    used = [name for name in dict.fromkeys((*COLUMNS, *needed)) if name in {*needed, *columns}]
    wrong = [name for name in used if columns.count(name) != 1]
    if wrong:
        problem = f"columns {wrong} are missing or double ('image' means 'path'); correct the header {str(header)[:99]}"
        raise DataError(f"{path.name}, line {first}: {problem}")
    if not records:
        raise DataError(f"{path.name}, line {first}: a header but no rows; download the file again")
    for line, fields in records:
        if len(fields) != len(columns):
            problem = f"{len(fields)} fields but {len(columns)} columns; correct it, with quotes around commas"
            raise DataError(f"{path.name}, line {line}, row {fields[0][:80]!r}: {problem}")
    frame = pd.DataFrame([fields for _, fields in records], columns=columns, dtype=object)
    frame = frame[used].assign(line=[line for line, _ in records])
    wrong = frame["id"].duplicated() | (frame["id"].str.strip() == "")
    _raise_for_first_row(
        path.name, frame, wrong, "id", "is blank or repeats an earlier row's; give each row its own"
    )
    return frame, [name.strip() for name in header]


def _check_questions(split: str, frame: pd.DataFrame, fallbacks: Counter) -> None:
    """Every row needs two choices; a blank choice is masked later, repeated choices and blank questions are counted."""
    choices = frame[[*CHOICES]].map(str.strip)
    filled = (choices != "").sum(axis=1)
    _raise_for_first_row(
        f"{split}.csv",
        frame,
        filled < 2,
        "id",
        "fewer than two choices are filled; complete the row",
    )
    text = frame["question"].str.cat(frame[[*CHOICES]], sep="\n")
    taken = {
        "repeated_choices": choices.where(choices != "").nunique(axis=1) < filled,
        "blank_question": frame["question"].str.strip() == "",
        "special_tokens_neutralised": text.map(neutralise_special_tokens) != text,
    }
    fallbacks.update({f"{split}_{name}": int(rows.sum()) for name, rows in taken.items()})


def answer_labels(
    frame: pd.DataFrame, name: str = "train.csv", column: str = "answer"
) -> np.ndarray:
    """Labels 0-3 from `column`: a-d or 1-4 as a, A, (a), a. or full width, else texts too; DataError where in doubt."""
    texts = frame[[*CHOICES, column]].map(lambda text: unicodedata.normalize("NFC", text.strip()))
    choices, answer = texts[[*CHOICES]], texts[column]
    plain = answer.map(lambda text: unicodedata.normalize("NFKC", text)).str.casefold()
    mark = plain.str.extract(r"^\(?([a-d1-4])[.)]?$", expand=False)
    marks = "1234" if mark.isin([*"1234"]).all() else "abcd"
    meant = pd.DataFrame(
        {choice: mark == each for choice, each in zip(CHOICES, marks, strict=True)}
    )
    if not mark.isin([*"abcd"]).all():
        meant |= choices.eq(answer, axis=0)
    unclear = (meant.sum(axis=1) != 1) | (meant & (choices == "")).any(axis=1)
    for wrong in (
        unclear & mark.isna(),
        unclear,
    ):  # a 5 among numbers is to blame, not the numbers before it
        _raise_for_first_row(
            name,
            frame,
            wrong,
            column,
            "does not mean exactly one filled choice; write its letter a-d",
        )
    return meant.to_numpy().argmax(axis=1)


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a CSV, whole or not at all; text that a spreadsheet would run as a formula gets a quotation mark first."""
    atomic_write(path, frame.replace(r"^([=+@\t\r'-])", r"'\1", regex=True).to_csv(index=False))


def read_table(path: Path) -> pd.DataFrame:
    """What `write_table` wrote, as text but for the columns that hold numbers."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False).map(
        lambda text: text.removeprefix("'")
    )
    kinds = dict.fromkeys(
        ("label", "fold", "width", "height", "teacher_fold"), int
    ) | dict.fromkeys(TARGET_COLUMNS, float)
    return frame.astype({column: kind for column, kind in kinds.items() if column in frame})


# === Images =======================================================================================
GREY_IMAGE = (
    "<grey image>"  # image_path of a test row without a usable image; `load_image` knows it
)
MAX_IMAGE_SIDE = (
    4096  # pixels; more than any pixel budget asks for, and it bounds the memory of one image
)
IMAGE_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
)  # not EPS, for example: it starts Ghostscript
VARIANT_MARK = (
    "<variant>"  # in an image_path, between the file and how it is changed; `load_image` knows it
)


def _find_images(frame: pd.DataFrame, root: Path, split: str, fallbacks: Counter) -> list[str]:
    """Every row's image, first found in `root`, its images or its split; DataError for a URL or a way out of `root`."""
    text = frame["path"].str.strip().str.replace("\\", "/")
    places = [[str(root / folder / path) for folder in ("", "images", split)] for path in text]
    found = [next(filter(os.path.isfile, paths), None) for paths in places]
    files = defaultdict(set)  # listed only where it is needed
    for file in filter(Path.is_file, root.rglob("*") if None in found else ()):
        files[unicodedata.normalize("NFC", str(file)).casefold()].add(str(file))
    for row in (row for row, path in enumerate(found) if path is None):
        similar = set().union(
            *(files[unicodedata.normalize("NFC", path).casefold()] for path in places[row])
        )
        fallbacks["image_found_under_other_spelling"] += len(similar) == 1
        found[row] = (
            similar.pop() if len(similar) == 1 else places[row][0]
        )  # no guess between several
    outside = np.array([not Path(os.path.realpath(path)).is_relative_to(root) for path in found])
    outside |= text.str.match(r"[A-Za-z][\w+.-]*:").to_numpy()
    _raise_for_first_row(
        f"{split}.csv",
        frame,
        outside,
        "path",
        "is a URL or leads out of the data folder; copy it there",
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
        image = Image.fromarray(
            np.rint((values - low) / ((high - low) or 1) * 255).astype(np.uint8)
        )
    if (
        image.has_transparency_data
    ):  # plain conversion would paint transparent pixels in their hidden colour
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def grey_image(side: int = 224) -> Image.Image:
    """The neutral image that stands in where a test row has none."""
    return Image.new("RGB", (side, side), (128, 128, 128))


def apply_image_change(image: Image.Image, change: Mapping) -> Image.Image:
    """The changed image: cropped, then mixed with black or white, its mean grey and its own greys, then as a JPEG."""
    image = image.crop(change["box"])
    shade = Image.new("RGB", image.size, "white" if change["light"] > 0 else "black")
    image = Image.blend(
        image, shade, abs(change["light"])
    )  # mixing with grey keeps every hue, unlike clipping
    mean = round(np.asarray(image.convert("L")).mean())
    image = Image.blend(image, Image.new("RGB", image.size, (mean, mean, mean)), change["contrast"])
    image = Image.blend(image, image.convert("L").convert("RGB"), change["colour"])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=change["quality"], subsampling=0)
    return Image.open(buffer).convert("RGB")


def load_image(path: str | Path, max_side: int = MAX_IMAGE_SIDE) -> Image.Image:
    """Upright RGB, longer side at most `max_side`, transparency on white; ImageError for what cannot be used."""
    if str(path) == GREY_IMAGE:
        return grey_image()
    if VARIANT_MARK in str(path):
        original, recipe = str(path).split(VARIANT_MARK)
        return apply_image_change(load_image(original, max_side), json.loads(recipe))
    try:
        with Image.open(
            path, formats=IMAGE_FORMATS
        ) as image:  # reads the header; PIL refuses a decompression bomb
            image.draft(
                "RGB", [math.ceil(n * max_side / max(image.size)) for n in image.size]
            )  # JPEG at 1/2 to 1/8
            rgb = _to_rgb(ImageOps.exif_transpose(image))
    except (
        Exception
    ) as error:  # each decoder raises its own on damaged files, and PIL passes them on
        raise ImageError(
            f"{path}: not a readable image ({type(error).__name__}: {error}); replace the file"
        ) from error
    rgb.thumbnail((max_side, max_side))
    if max(rgb.size) > 200 * min(rgb.size):  # the models' processors take no more
        raise ImageError(f"{path}: its sides {rgb.size} differ more than 200 to 1; crop it")
    return rgb


def _image_facts(path: str) -> dict:
    """Size, content hash and perceptual hash of one image from one full decode; the problem where it is unusable."""
    image, pixel_hash, dhash, problem = grey_image(), "", "", ""
    try:
        image = load_image(path)
        pixel_hash = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
        dhash = (
            np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes().hex()
        )  # 64 bits: does it get lighter to the right?
    except ImageError as error:
        problem = str(error)
    facts = {
        "image_path": path,
        "image_ok": problem == "",
        "width": image.width,
        "height": image.height,
    }
    return facts | {"pixel_hash": pixel_hash, "dhash": dhash, "problem": problem}


# === Competition ==================================================================================
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
    fingerprint: str  # changes with any byte of the tables and any pixel
    data_dir: Path


def _count_dropped_rows(
    frame: pd.DataFrame, split: str, what: str, column: str, limit: float, fallbacks: Counter
) -> None:
    """Log and count the rows whose `problem` is not blank; DataError about the first above the share `limit`."""
    lost = frame["problem"] != ""
    fallbacks[f"{split}_{what}"] += int(lost.sum())
    if lost.any():
        text = (
            f"{frame['problem'][lost].iloc[0][:400]}; {what} in {lost.sum()} of {len(frame)} rows"
        )
        LOGGER.warning("%s.csv, lines %s: %s", split, frame["line"][lost].tolist()[:20], text)
        if lost.sum() > limit * len(frame):
            _raise_for_first_row(
                f"{split}.csv",
                frame,
                lost,
                column,
                f"{text}; repair it or raise max_fallback_share={limit}",
            )


def _attach_images(
    frame: pd.DataFrame, root: Path, split: str, limit: float, fallbacks: Counter
) -> pd.DataFrame:
    """Add image_path and the facts of every image, each file decoded once, on all cores; unusable ones are counted."""
    frame = frame.assign(image_path=_find_images(frame, root, split, fallbacks))
    with (
        warnings.catch_warnings(action="ignore"),
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):  # PIL's errors suffice
        facts = pd.DataFrame(pool.map(_image_facts, frame["image_path"].unique()))
    frame = frame.merge(facts, how="left", on="image_path")
    _count_dropped_rows(frame, split, "unusable_image", "path", limit, fallbacks)
    return frame.drop(columns=["path", "problem"]).assign(type=frame["question"].map(question_type))


def _load_train(
    root: Path, limit: float, sample_size: int | None, seed: int, fallbacks: Counter
) -> pd.DataFrame:
    """Training rows with labels; rows without an answer or a usable image are dropped and counted."""
    frame, _ = _read_competition_table(root / "train.csv", fallbacks)
    frame = frame.assign(
        problem=frame["answer"].str.strip().map(lambda answer: "" if answer else "no answer")
    )
    _count_dropped_rows(frame, "train", "blank_answer", "answer", limit, fallbacks)
    frame = frame[frame["problem"] == ""].drop(columns="problem")
    _check_questions("train", frame, fallbacks)
    frame = frame.assign(label=answer_labels(frame))
    frame["answer"] = frame["label"].map(dict(enumerate(CHOICES)))
    if sample_size is not None:
        frame = frame.sample(min(sample_size, len(frame)), random_state=seed).sort_index()
    frame = _attach_images(frame, root, "train", limit, fallbacks)
    return frame[frame["image_ok"]].reset_index(drop=True)


def _load_test(root: Path, limit: float, fallbacks: Counter) -> pd.DataFrame:
    """Test rows, all of them; one without a usable image gets GREY_IMAGE and is counted."""
    frame, _ = _read_competition_table(root / "test.csv", fallbacks)
    fallbacks["test_answer_ignored"] += sum(bool(text.strip()) for text in frame.get("answer", ()))
    _check_questions("test", frame, fallbacks)
    frame = _attach_images(frame, root, "test", limit, fallbacks)
    frame["image_path"] = frame["image_path"].where(frame["image_ok"], GREY_IMAGE)
    return frame.drop(columns="answer", errors="ignore")


def load_competition(
    data_dir, max_fallback_share=0.01, sample_size: int | None = None, seed=42
) -> Competition:
    """Validated tables and counts; DataError for what would need a guess or for losses above `max_fallback_share`."""
    root, fallbacks = Path(data_dir).resolve(), Counter(csv_read_as_cp949=0)
    train = _load_train(root, max_fallback_share, sample_size, seed, fallbacks)
    test = _load_test(root, max_fallback_share, fallbacks)
    sample, header = _read_competition_table(root / "sample_submission.csv", fallbacks)
    if [name.casefold() for name in header] != ["id", "answer"]:
        raise DataError(
            f"sample_submission.csv, line 1: the columns must be id, answer; correct {str(header)[:200]}"
        )
    for file, frame, other in (("sample_submission.csv", sample, test), ("test.csv", test, sample)):
        problem = "is only in this file; take test.csv and sample_submission.csv from one download"
        _raise_for_first_row(file, frame, ~frame["id"].isin(other["id"]), "id", problem)
    LOGGER.info(
        "Loaded %d training and %d test rows; fallbacks: %s",
        len(train),
        len(test),
        dict(+fallbacks),
    )
    pixels = "".join(digest for frame in (train, test) for digest in frame["pixel_hash"])
    tables = b"".join((root / name).read_bytes() for name in COMPETITION_FILES)
    fingerprint = hashlib.sha256(tables + pixels.encode()).hexdigest()
    return Competition(
        train, test, sample[["id", "answer"]].set_axis(header, axis=1), fallbacks, fingerprint, root
    )


# === Leakage and folds ============================================================================
@dataclass(frozen=True)
class LeakageReport:
    """Copies of images within train and between train and test."""

    copies: (
        pd.DataFrame
    )  # a pair per row: kind (exact, near), split/id/image_path _a and _b, difference (of 255)
    image_group: pd.Series  # one group number per training row
    test_group: pd.Series  # of each test row with a usable image, numbered alike
    groups_in_train: int  # groups with at least two training rows
    test_rows_in_train: int  # test rows whose image has a copy in train
    alarm: str  # why near copies were not used for grouping; "" where they were


def _near_pairs(
    images: pd.DataFrame, max_bits: int, max_difference: float
) -> tuple[np.ndarray, np.ndarray]:
    """Positions (p, 2) in `images` whose hashes and thumbnails agree, and the thumbnails' mean difference (p,)."""
    from sklearn.neighbors import radius_neighbors_graph

    codes = np.frombuffer(bytes.fromhex("".join(images["dhash"])), dtype=np.uint8)
    bits = np.unpackbits(codes.reshape(-1, 8), axis=1).astype(np.float32)
    graph = radius_neighbors_graph(
        bits, radius=(max_bits + 0.5) ** 0.5
    )  # squared distance = bits that differ
    pairs = np.column_stack(triu(graph).nonzero())
    involved = np.unique(pairs)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        small = pool.map(
            lambda path: load_image(path).resize((32, 32)), images["image_path"].iloc[involved]
        )
        thumbnails = {
            number: np.asarray(image, dtype=np.int16)
            for number, image in zip(involved, small, strict=True)
        }
    gaps = np.array([np.abs(thumbnails[a] - thumbnails[b]).mean() for a, b in pairs])
    return pairs[gaps <= max_difference], gaps[gaps <= max_difference]


def leakage_report(
    train: pd.DataFrame, test: pd.DataFrame, max_bits=4, max_difference=3.0
) -> LeakageReport:
    """Copies of images: exact by pixels, near by `max_bits` of 64 hash bits and `max_difference` of 255 grey levels."""
    rows = (
        pd.concat([train.assign(split="train"), test.assign(split="test")])
        .query("image_ok")
        .reset_index(drop=True)
    )
    image, hashes = pd.factorize(rows["pixel_hash"])  # number of the image in each row
    first = np.unique(image, return_index=True)[1]  # the first row with each image
    near, gaps = _near_pairs(rows.iloc[first], max_bits, max_difference)
    links = coo_matrix((np.ones(len(near)), near.T), shape=(len(hashes), len(hashes)))
    group, alarm = connected_components(links, directed=False)[1][image], ""
    largest = rows.groupby(group)["pixel_hash"].nunique().max()
    if largest > max(10, 0.01 * len(hashes)):  # implausible
        alarm = f"near copies would link {largest} different images into one group: only exact copies are grouped"
        LOGGER.warning("Leakage: %s", alarm)
        group = image
    exact = np.column_stack([first[image], rows.index])[first[image] != rows.index]
    pairs = np.concatenate([exact, first[near]])
    ends = [rows.loc[end, ["split", "id", "image_path"]].reset_index(drop=True) for end in pairs.T]
    copies = ends[0].add_suffix("_a").join(ends[1].add_suffix("_b"))
    copies["kind"] = ["exact"] * len(exact) + ["near"] * len(near)
    copies["difference"] = np.concatenate([np.zeros(len(exact)), gaps])
    in_train = (rows["split"] == "train").to_numpy()
    image_group = pd.Series(group[in_train], index=train.index, name="image_group")
    test_group = pd.Series(group[~in_train], index=test.index[test["image_ok"]], name="image_group")
    groups_in_train = int((image_group.value_counts() > 1).sum())
    test_rows_in_train = int(test_group.isin(image_group).sum())
    return LeakageReport(
        copies, image_group, test_group, groups_in_train, test_rows_in_train, alarm
    )


def make_folds(train: pd.DataFrame, n_folds: int = 3, seed: int = 42, groups=None) -> np.ndarray:
    """Fold (n,) of each row, even in answer and type, groups (default: exact copies) whole; ValueError for too few."""
    from sklearn.model_selection import (
        StratifiedGroupKFold,
    )  # importing sklearn draws from the global generator

    groups = pd.factorize(np.asarray(train["pixel_hash"] if groups is None else groups))[0]
    if groups.max() + 1 < n_folds:
        raise ValueError(
            f"{groups.max() + 1} groups of images cannot fill n_folds={n_folds}; use fewer folds"
        )
    strata = train["answer"] + " " + train["type"]
    for wider in (train["answer"], strata.mode()[0]):  # for strata with fewer rows than folds
        strata = strata.where(strata.map(strata.value_counts()) >= n_folds, wider)
    folds = np.full(len(train), -1)
    splitter = StratifiedGroupKFold(n_splits=n_folds, shuffle=True, random_state=seed)
    for fold, (_, held_out) in enumerate(splitter.split(train, strata, groups)):
        folds[held_out] = fold
    return folds


# === Augmentation =================================================================================
def image_variants(frame: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """`frame`, then `count` copies of it that show mildly changed images; `variant` is 0, then the copy's number.

    A change is a function of (seed, number, image). It never turns or flips an image or changes a hue, and it crops
    none that any of the questions reads text from."""
    is_read = (frame["type"] == "ocr").groupby(frame["pixel_hash"]).transform("any")
    images = [
        *zip(
            frame["pixel_hash"],
            frame["image_path"],
            frame["width"],
            frame["height"],
            ~is_read,
            strict=True,
        )
    ]
    parts = [frame.assign(variant=0)]
    for number in range(1, count + 1):
        changes = [
            draw_image_change(seeded_generator(seed, number, image[0]), *image[2:])
            for image in images
        ]
        recipes = [json.dumps(change) for change in changes]
        boxes = np.array([change["box"] for change in changes])
        columns = {
            "width": boxes[:, 2] - boxes[:, 0],
            "height": boxes[:, 3] - boxes[:, 1],
            "variant": number,
        }
        columns["image_path"] = [
            f"{image[1]}{VARIANT_MARK}{recipe}"
            for image, recipe in zip(images, recipes, strict=True)
        ]
        columns["pixel_hash"] = [
            f"{image[0]} {recipe}" for image, recipe in zip(images, recipes, strict=True)
        ]
        parts.append(frame.assign(**columns))
    return pd.concat(parts, ignore_index=True)


def draw_image_change(
    generator: np.random.Generator, width: int, height: int, may_crop: bool
) -> dict:
    """How one image is changed: box in pixels, at least 95 % of each side; shares of mixing; JPEG quality."""
    left, top, right, bottom = (
        (generator.uniform(0, 0.025, 4) * [width, height, width, height]).astype(int).tolist()
    )
    light, contrast, colour = (
        round(generator.uniform(*ends), 3) for ends in ((-0.1, 0.1), (0, 0.15), (0, 0.2))
    )
    box = (
        [left, top, int(width) - right, int(height) - bottom]
        if may_crop
        else [0, 0, int(width), int(height)]
    )
    quality = int(generator.integers(70, 96))
    return {"box": box, "light": light, "contrast": contrast, "colour": colour, "quality": quality}


# ======= 3. Model =================================================================================


# === Families =====================================================================================
@dataclass(frozen=True)
class Family:
    """What differs between families of models and cannot be read from the model itself."""

    is_attention_only: bool = (
        True  # a mask can keep choice orders apart; a recurrent layer would carry them over
    )
    is_compiled: bool = True  # torch.compile is used for its decoder layers
    experts: str | None = (
        None  # pattern of the parameters that hold all experts of a layer in one tensor
    )


FAMILIES = {  # transformers' model_type -> what to know about it; all others are refused
    "qwen2_5_vl": Family(),
    "qwen3_vl": Family(),
    # Which experts a token needs is known on the GPU only, so that nothing is gained by compiling.
    "qwen3_vl_moe": Family(is_compiled=False, experts=r"\.mlp\.experts\.(gate_up|down)_proj$"),
    "qwen3_5": Family(is_attention_only=False, is_compiled=False),
}
# Projections of the language model's decoder layers and nothing else: the vision tower stays as it was pretrained,
# and so do the experts of a mixture, which are no linear layers.
LORA_TARGETS = (
    r"(?:.*\.)?language_model\.layers\.\d+\.(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj|"
    r"linear_attn\.(?:in_proj_qkv|in_proj_z|out_proj))"
)
VISION_PREFIX = "visual"
MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "image_grid_thw",
    "position_ids",
)


# === Prompt =======================================================================================
SYSTEM_PROMPT = (
    "당신은 이미지를 보고 객관식 질문에 답하는 전문가입니다. 정답의 글자 하나만 답합니다."
)
_QUESTION_HINTS = {
    "counting": "대상을 하나씩 빠짐없이 세어 보세요.",
    "color": "대상의 색을 주의 깊게 보세요.",
    "ocr": "이미지 속 글자와 숫자를 정확히 읽으세요.",
    "yesno": "질문의 내용이 이미지와 맞는지 확인하세요.",
    "location": "대상의 위치와 방향을 확인하세요.",
    "attribute": "대상의 모양, 크기와 상태를 살펴보세요.",
    "general": "이미지를 자세히 살펴보세요.",
}
# Choices come last: all orders of one question then share one long prefix. The first wording is that of inference;
# the others, for training, are about as long.
_INSTRUCTIONS = (
    " 알맞은 보기의 글자(a, b, c, d) 하나만 답하세요.\n질문: {question}\n보기:\n{choices}",
    " 맞는 보기를 글자(a, b, c, d) 하나로만 쓰세요.\n질문: {question}\n보기:\n{choices}",
    " 정답인 보기의 글자(a, b, c, d)만 쓰세요.\n문제: {question}\n선택:\n{choices}",
    " a, b, c, d 중 알맞은 글자를 고르세요.\n{question}\n{choices}",
)
PROMPT_TEMPLATES = {name: hint + _INSTRUCTIONS[0] for name, hint in _QUESTION_HINTS.items()}


def prompt_templates(config: Config, wording: int = 0) -> dict[str, str]:
    """Question type -> template; the config's own ones have a single wording."""
    return {name: hint + _INSTRUCTIONS[wording] for name, hint in _QUESTION_HINTS.items()} | dict(
        config.prompt_templates
    )


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


def render_prompt(processor, messages: list[dict]) -> str:
    """The chat prompt that ends where the answer's letter belongs; the one text for training and inference."""
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def choice_token_ids(processor, prompt: str) -> tuple[tuple[int, ...], ...]:
    """Each letter's single-token ids (`a`, `A`, ` a`) after `prompt`, the plain one first; TemplateError if unclear."""
    prefix = processor.tokenizer(prompt)["input_ids"]
    letters = []
    for choice in CHOICES:
        variants = (choice, choice.upper(), f" {choice}")
        continued = [processor.tokenizer(prompt + variant)["input_ids"] for variant in variants]
        single = [
            ids[-1] for ids in continued if len(ids) == len(prefix) + 1 and ids[:-1] == prefix
        ]
        if not single or continued[0][-1] != single[0]:
            raise TemplateError(
                f"The letter {choice!r} is not one token after the prompt; token ids: {continued[0]}"
            )
        letters.append(tuple(dict.fromkeys(single)))
    if len({token for variants in letters for token in variants}) != sum(map(len, letters)):
        raise TemplateError(
            f"Two letters share a token: {dict(zip(CHOICES, letters, strict=True))}"
        )
    return tuple(letters)


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


# === Loading ======================================================================================
def explain_missing_model(config: Config, cause: Exception) -> OSError:
    """The error about a model that was not loaded: what to check, and which model folders are attached."""
    wanted = {"config.json", ".safetensors"}  # a file's name, a file's ending
    folders = [
        str(place)
        for place, _, files in walk_mounts()
        if wanted <= {*files, *(Path(f).suffix for f in files)}
    ]
    attached = (
        f"set model_id (or VQA_MODEL) to one of {folders}"
        if folders
        else "attach the model and give its folder"
    )
    return OSError(
        f"{config.model_path} could not be loaded. Check the spelling of model_id, the internet switch of the session "
        f"(or {attached}), and the free disk space. Cause: {cause}"
    )


def load_processor(config: Config):
    """The model's processor, padding on the left so that the last position is the answer's for every row."""
    trusted = config.trust_remote_code
    if not trusted:
        for path in Path(config.model_path).glob(
            "*.json"
        ):  # none for a hub id, whose code transformers refuses itself
            if '"auto_map"' in path.read_text(encoding="utf-8"):
                raise ValueError(
                    f"{path} asks to run Python code from that folder (auto_map): trust_remote_code=True?"
                )
    try:
        processor = transformers.AutoProcessor.from_pretrained(
            config.model_path, trust_remote_code=trusted
        )
    except OSError as error:
        raise explain_missing_model(config, error) from error
    processor.tokenizer.padding_side = "left"
    return processor


def quantization_config(quantization: str, precision: str):
    """bitsandbytes settings for the language model, or None; vision tower and head stay in 16 bits."""
    if quantization == "none":
        return None
    settings = {"load_in_4bit": quantization == "4bit", "load_in_8bit": quantization == "8bit"}
    settings |= {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }  # quantises the scales too
    settings |= {"bnb_4bit_compute_dtype": getattr(torch, DTYPES[precision])}
    settings |= {"llm_int8_skip_modules": [VISION_PREFIX, f"model.{VISION_PREFIX}", "lm_head"]}
    return transformers.BitsAndBytesConfig(**settings)


@contextlib.contextmanager
def quantising_experts(pattern: str) -> Iterator[None]:
    """Let transformers load parameters that match `pattern` in 4-bit, too: by itself it takes linear layers only."""
    known, name = quantizers.AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit"
    plain = known[name]

    class QuantiseExperts(bnb_loading.Bnb4bitQuantize):
        def convert(self, input_dict, **options):
            ((parameter, value),) = input_dict.items()
            if not re.search(pattern, parameter):
                return super().convert(input_dict, **options)
            value = value[0] if isinstance(value, list) else value
            packed, state = bnb_functional.quantize_4bit(
                value, compress_statistics=True, quant_type="nf4"
            )
            self.hf_quantizer.states[parameter] = state
            return {parameter: torch.nn.Parameter(packed, requires_grad=False)}

    class ExpertQuantizer(plain):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.states = {}

        def param_needs_quantization(self, model, param_name, **options) -> bool:
            return bool(re.search(pattern, param_name)) or super().param_needs_quantization(
                model, param_name
            )

        def get_quantize_ops(self):
            return QuantiseExperts(self)

        def _process_model_after_weight_loading(self, model, **options):
            for parameter, state in self.states.items():
                module, _, own_name = parameter.rpartition(".")
                arguments = own_name, state.as_dict(), state.absmax.device
                bnb_parametrize.replace_parameter_4bit_prequantized(
                    model.get_submodule(module), *arguments
                )
            return super()._process_model_after_weight_loading(model, **options)

    known[name] = ExpertQuantizer
    try:
        yield
    finally:
        known[name] = plain


def load_model(config: Config, runtime: Runtime, attempts: int = 3):
    """The frozen base model on this process's GPU, its GPUs or the CPU; after `attempts` an OSError says what to do."""
    if config.quantization != "none" and not runtime.gpus:
        raise ValueError(
            f"quantization {config.quantization!r} needs a GPU; on a CPU set quantization='none'"
        )
    options = {
        "dtype": getattr(torch, DTYPES[runtime.precision]),
        "attn_implementation": runtime.attention,
    }
    if quantised := quantization_config(
        config.quantization, runtime.precision
    ):  # None would undo the checkpoint's own
        options |= {"quantization_config": quantised}
    options |= {
        "device_map": {"": 0} if runtime.gpus else None,
        "trust_remote_code": config.trust_remote_code,
    }
    options |= {"use_safetensors": True}  # never a pickle
    if (
        config.spread_model
    ):  # the rest of each card is for activations, and for the experts of one layer in 16 bits
        room = {
            number: f"{SPREAD_MEMORY_SHARE * gpu['memory_gib']:.2f}GiB"
            for number, gpu in enumerate(runtime.gpus)
        }
        options |= {"device_map": "auto", "max_memory": room}
    for attempt in range(attempts):  # downloads from the hub break off
        time.sleep(2 * attempt)
        try:
            settings = transformers.AutoConfig.from_pretrained(
                config.model_path, trust_remote_code=config.trust_remote_code
            )
            if settings.model_type not in FAMILIES:
                known = ", ".join(FAMILIES)
                raise ValueError(
                    f"{config.model_path} is of the family {settings.model_type!r}; known are {known}"
                )
            if stored := getattr(settings, "quantization_config", None):
                if config.quantization != "none" or stored["quant_method"] != "fp8":
                    kind = f"{config.model_path} is stored in {stored['quant_method']} already"
                    raise ValueError(f"{kind}: only fp8 is read, with quantization='none'")
                # Also on cards with FP8: its kernels come from the hub, and LoRA would train through none of them.
                options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
            experts = (
                FAMILIES[settings.model_type].experts if config.quantization == "4bit" else None
            )
            with quantising_experts(experts) if experts else contextlib.nullcontext():
                load = transformers.AutoModelForImageTextToText.from_pretrained
                model, report = load(config.model_path, **options, output_loading_info=True)
            _check_loading(config, model, report)
            return model.requires_grad_(False).eval()
        except OSError as error:
            LOGGER.warning(
                "Loading %s failed (attempt %d of %d): %s",
                config.model_path,
                attempt + 1,
                attempts,
                error,
            )
            cause = error
    raise explain_missing_model(config, cause) from cause


def remove_gpu_syncs(model) -> None:
    """Replace the two places of the forward pass at which the CPU would wait for the GPU; the sums stay the same."""
    inner, tokens = model.model, (model.config.image_token_id, model.config.video_token_id)

    def get_placeholder_mask(
        input_ids, *_, **__
    ):  # `answer_hidden_states` counts the image tokens, on the CPU
        return tuple((input_ids == token)[..., None] for token in tokens)

    def add_deepstack(hidden_states, visual_pos_masks, visual_embeds):
        embeds, mask = (
            visual_embeds.to(hidden_states),
            visual_pos_masks.to(hidden_states.device)[..., None],
        )
        return hidden_states + torch.zeros_like(hidden_states).masked_scatter(mask, embeds)

    inner.get_placeholder_mask = get_placeholder_mask
    if hasattr(inner.language_model, "_deepstack_process"):
        inner.language_model._deepstack_process = add_deepstack


def _check_loading(config: Config, model, report: Mapping) -> None:
    """RuntimeError for weights that are missing or not understood, or that do not fit into the GPUs."""
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, report[kind])):
            problem = f"{config.model_path} and its config.json differ: {kind} {names[:3]} ({len(names)} in all)"
            if kind != "unexpected_keys" or any(
                "scale" in name for name in names
            ):  # numbers without their scale
                raise RuntimeError(f"{problem}; download it again, or update transformers")
            LOGGER.warning("%s", problem)
    if aside := [
        name
        for name, place in getattr(model, "hf_device_map", {}).items()
        if place in ("cpu", "disk")
    ]:
        problem = f"{config.model_id} does not fit into the GPUs: {aside[0]} and {len(aside) - 1} more parts do not"
        raise RuntimeError(
            f"{problem}; choose a smaller model_id, quantization='4bit' or larger GPUs"
        )


# === Adapters =====================================================================================
def attach_lora(model, config: Config, seed: int):
    """A fresh LoRA adapter around `model`, a function of `seed`; asserted to be fp32 and outside the vision tower."""
    torch.manual_seed(seed)
    lora = {
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
    }
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=LORA_TARGETS, task_type="CAUSAL_LM", **lora)
    )
    trainable = trainable_parameters(adapted)
    wrong = [
        name
        for name, value in trainable.items()
        if f".{VISION_PREFIX}." in name or value.dtype != torch.float32
    ]
    assert trainable and not wrong, (
        f"LoRA weights must be fp32 and outside the vision tower, unlike {wrong[:3]}"
    )
    return adapted


def trainable_parameters(model) -> dict:
    """Name -> parameter of everything the optimizer may change."""
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def load_adapter(model, folder: Path):
    """The base model with a saved adapter. Raises CheckpointError unless every stored weight arrived unchanged."""
    adapted = peft.PeftModel.from_pretrained(model, str(folder))
    stored = safetensors_torch.load_file(folder / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(adapted)
    differing = [
        name
        for name in stored
        if name not in loaded or not torch.equal(stored[name], loaded[name].cpu())
    ]
    if differing or set(loaded) != set(stored):
        raise CheckpointError(
            f"{folder} was not loaded completely: {differing[:3] or set(loaded) ^ set(stored)}"
        )
    return adapted


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


# === Image tokens =================================================================================
def merged_patch_area(processor) -> int:
    """Pixels that become one image token: (patch size x merge size) squared, 28 x 28 or 32 x 32."""
    images = processor.image_processor
    return (images.patch_size * images.merge_size) ** 2


def pixel_budget(config: Config, processor, scale: float = 1.0) -> tuple[int, int]:
    """(min_pixels, max_pixels) of one view; the only place where the budget is decided."""
    area = merged_patch_area(processor)
    upper = config.image_size**2 if config.image_size else config.max_pixels or 768 * area
    upper = max(int(upper * scale), area)
    return min(config.min_pixels or 4 * area, upper), upper


def image_grid(width: int, height: int, processor, budget: tuple[int, int]) -> tuple[int, int, int]:
    """(1, rows, columns) of patches for an image of that size within `budget`; aspect ratio kept."""
    images = processor.image_processor
    rows, columns = vision_process.smart_resize(
        height, width, images.patch_size * images.merge_size, *budget
    )
    return 1, rows // images.patch_size, columns // images.patch_size


def prepare_image(image, processor, budget: tuple[int, int]):
    """(pixel_values (patches, values), grid) of a PIL image, resized once; the processor does not resize again."""
    patch = processor.image_processor.patch_size
    content = [{"type": "image", "image": image, "min_pixels": budget[0], "max_pixels": budget[1]}]
    resized, _ = vision_process.process_vision_info(
        [{"role": "user", "content": content}], image_patch_size=patch
    )
    inputs = processor.image_processor(images=resized, do_resize=False, return_tensors="pt")
    return inputs["pixel_values"], tuple(inputs["image_grid_thw"][0].tolist())


def encode_prompt(processor, messages: list[dict], grid: tuple[int, int, int]) -> np.ndarray:
    """Token ids (length,) of a prompt whose image takes `grid`: what the processor returns, without the pixels."""
    tokens = math.prod(grid) // processor.image_processor.merge_size**2
    text = render_prompt(processor, messages).replace(
        processor.image_token, processor.image_token * tokens, 1
    )
    return np.array(processor.tokenizer(text)["input_ids"])


# === Vision cache =================================================================================
class VisionCache:
    """Features of the frozen vision tower, once per image and pixel budget: on disk, for later processes, or in RAM."""

    def __init__(self, model, processor, cache_dir: str | None = None):
        self.model, self.processor, self.device = model, processor, model.device
        scratch = Path(tempfile.gettempdir()) / f"vqa_features_{getattr(os, 'getuid', int)()}"
        self.folder = (Path(cache_dir) if cache_dir else scratch) / self.identity()
        self.shards: dict[tuple, tuple[Path, int]] = {}  # key -> file and the image's number in it
        self.store: dict[tuple, tuple] = {}  # key -> features, where the disk is too small
        self.recomputed_in_fp32 = 0

    def identity(self) -> str:
        """A hash of what features depend on besides image and budget: the tower's weights, the processor, torch."""
        settings = f"{self.processor.image_processor.to_json_string()} {torch.__version__} {self.device.type}"
        digest = hashlib.sha256(settings.encode())
        for value in self.model.get_submodule(f"model.{VISION_PREFIX}").state_dict().values():
            digest.update(value.cpu().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def has_all(self, keys: Iterable[tuple]) -> bool:
        return all(key in self.shards or key in self.store for key in keys)

    def fill(
        self, frame: pd.DataFrame, budget: tuple[int, int], progress: Callable, batch_size: int = 16
    ) -> bool:
        """Store the features of all images of `frame`; False, with the reason logged, where nothing can hold them."""
        rows = frame.drop_duplicates("pixel_hash").sort_values(
            ["height", "width", "pixel_hash"]
        )  # like beside like
        batches = []  # fixed, so that no feature depends on where an earlier process stopped, nor on other variants
        for _, part in rows.groupby(rows.get("variant", pd.Series(0, rows.index)), sort=True):
            distinct = [((row.pixel_hash, *budget), row.image_path) for row in part.itertuples()]
            batches += [
                distinct[start : start + batch_size]
                for start in range(0, len(distinct), batch_size)
            ]
        self.folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(
            self.folder / "lock"
        ):  # one worker computes, the others wait and read
            for path in set(self.folder.glob("*.safetensors")) - {
                path for path, _ in self.shards.values()
            }:
                if file_sha256(path) == path.stem:
                    with safe_open(path, "pt") as file:
                        self.index(
                            path, [tuple(key) for key in json.loads(file.metadata()["keys"])]
                        )
                else:
                    LOGGER.warning("Vision features recomputed: %s was damaged", path)
                    path.unlink()
            missing = [batch for batch in batches if not self.has_all(key for key, _ in batch)]
            pixels = prefetch(
                self.prepare([path for _, path in batch], budget) for batch in missing
            )
            for done, (batch, prepared) in enumerate(zip(missing, pixels, strict=True), 1):
                keys = [key for key, _ in batch]
                features = [
                    tuple(tensor.cpu() for tensor in image) for image in self.compute(*prepared)
                ]
                size = sum(tensor.nbytes for image in features for tensor in image) * (
                    len(missing) - done + 1
                )
                if not self.keep(keys, features, size):
                    return False
                progress("vision features", done, len(missing))
        return True

    def prepare(self, paths: Sequence[str], budget: tuple[int, int]) -> tuple[tuple, tuple]:
        """Pixel values and grids of images, decoded side by side."""
        with ThreadPoolExecutor() as pool:
            images = pool.map(
                lambda path: prepare_image(load_image(path), self.processor, budget), paths
            )
            return tuple(zip(*images, strict=True))

    def offload_tower(self) -> None:
        """Move the tower to the CPU until it is needed: its memory is the activations'."""
        self.model.get_submodule(f"model.{VISION_PREFIX}").to("cpu")

    def keep(self, keys: Sequence[tuple], features: Sequence[tuple], size: float) -> bool:
        """Write a shard, or use RAM; False, with a warning, where the expected bytes of all, `size`, fit in neither."""
        disk, memory = shutil.disk_usage(self.folder).free, psutil.virtual_memory().available
        if size <= disk / 2:
            tensors = {
                f"{n}.{k:02}": tensor
                for n, image in enumerate(features)
                for k, tensor in enumerate(image)
            }
            content = safetensors_torch.save(
                tensors, {"keys": json.dumps(keys)}
            )  # two entries would swap at random
            path = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
            atomic_write(path, content, durable=False)
            self.index(path, keys)
        elif size <= memory / 4:  # a quarter, because there may be two workers
            self.store |= zip(keys, features, strict=True)
        else:
            free = f"{disk / 2**30:.2f} GiB of disk and {memory / 2**30:.2f} GiB of memory are free"
            LOGGER.warning("Vision cache skipped: it needs %.2f GiB, only %s", size / 2**30, free)
            return False
        return True

    def index(self, path: Path, keys: Sequence[tuple]) -> None:
        """Note where images lie; of two places the first by name, so that every process reads the same one."""
        for number, key in enumerate(keys):
            self.shards[key] = min((path, number), self.shards.get(key, (path, number)))

    def read(self, key: tuple) -> tuple:
        """The features of one image: (tokens, hidden), then DeepStack's layers."""
        if key in self.store:
            return self.store[key]
        path, number = self.shards[key]
        with safe_open(path, "pt") as file:  # memory-mapped
            return tuple(
                file.get_tensor(name)
                for name in sorted(file.keys())
                if name.startswith(f"{number}.")
            )

    def compute(self, pixel_values: Sequence, grids: Sequence) -> list[tuple]:
        """One tuple per image: features (tokens, hidden), then DeepStack; by fp32, and clamped, after an overflow."""
        visual, device = (
            self.model.get_submodule(f"model.{VISION_PREFIX}").to(self.device),
            self.device,
        )
        dtype = visual.dtype
        inputs = torch.cat(list(pixel_values)).to(device), torch.tensor(grids, device=device)
        with torch.no_grad():
            features = self._tower(*inputs)
            if not torch.stack(
                [tensor.isfinite().all() for image in features for tensor in image]
            ).all():
                self.recomputed_in_fp32 += len(grids)
                LOGGER.warning(
                    "Non-finite vision features: %d images recomputed in fp32", len(grids)
                )
                try:
                    visual.float()
                    with torch.autocast(device.type, enabled=False):
                        features = self._tower(*inputs)
                finally:
                    visual.to(dtype)
        limit = torch.finfo(dtype).max
        return [
            tuple(tensor.clamp(-limit, limit).to(dtype) for tensor in image) for image in features
        ]

    def tower(self, batch: Mapping) -> list[tuple]:
        """Fresh features of a batch's pixels."""
        return self.compute(batch["pixel_values"], batch["image_grid_thw"].tolist())

    def _tower(self, pixels, grid) -> list[tuple]:
        output = self.model.get_image_features(pixels, grid, return_dict=True)
        return list(
            zip(
                output.pooler_output,
                *(getattr(output, "deepstack_features", None) or []),
                strict=True,
            )
        )

    def encoder_outputs(self, batch: Mapping) -> SimpleNamespace:
        """What `mm_encoder_outputs["image"]` takes for `batch`: cached features, or fresh ones from its pixels."""
        images = batch.get("features") or self.tower(batch)
        layers = zip(*images, strict=True)
        pooled, *deepstack = (
            [tensor.to(self.device, non_blocking=True) for tensor in layer] for layer in layers
        )
        return SimpleNamespace(pooler_output=pooled, deepstack_features=deepstack)


# === Session ======================================================================================
@dataclass
class Session:
    """What a worker loads once: configuration, base model, processor, letter tokens and the vision cache."""

    config: Config
    runtime: Runtime
    processor: object
    model: object
    letter_token_ids: tuple[tuple[int, ...], ...]
    vision_cache: VisionCache
    letter_head_weights: object  # the head's rows (variants of all letters, hidden), fp32
    device: object  # where the model computes; parts that rest may lie elsewhere
    progress: Callable = lambda stage, done, total, **details: None
    notes: list[str] = field(default_factory=list)  # departures from the plan, for the report
    inference_batch_limit: int | None = (
        None  # questions per forward pass that memory has allowed since it ran out
    )
    seconds_per_question: float = (
        0.0  # of the last inference, in this process or an earlier one; 0: unknown
    )
    assigned_folds: Sequence[int] = ()  # those that this worker trains and scores
    memory_plan: MemoryPlan | None = None  # measured once

    @property
    def decoder_layers(self):
        return self.model.model.language_model.layers

    @property
    def family(self) -> Family:
        return FAMILIES[self.model.config.model_type]

    @property
    def shares_prefixes(self) -> bool:
        """Whether several choice orders go behind one prefix: it takes a mask that other kinds of attention refuse."""
        return self.runtime.attention == "sdpa" and self.family.is_attention_only

    def add_note(self, text: str) -> None:
        LOGGER.warning("%s", text)
        self.notes.append(text)


def open_session(config: Config, example: Mapping) -> Session:
    """Load processor and model, check the template on `example` (a row) and log every decision with its reason."""
    runtime = detect_runtime(config.precision, config.attn_implementation)
    for reason in runtime.reasons:
        LOGGER.info("Decision: %s", reason)
    seed_everything(config.seed, config.deterministic, config.strict_determinism)
    processor = load_processor(config)
    wordings = [prompt_templates(config, number) for number in range(config.paraphrases)]
    letters = [
        check_template(processor, build_messages(example, templates=wording))
        for wording in wordings
    ][0]
    with track_peak_memory("model loaded"):
        model = load_model(config, runtime)
    remove_gpu_syncs(model)
    device, head, cache = (
        model.device,
        model.get_output_embeddings(),
        VisionCache(model, processor, config.cache_dir),
    )
    rows = head.weight[[token for variants in letters for token in variants]].float().to(device)
    if config.loss == "choices" and head.weight is not model.get_input_embeddings().weight:
        head.to(
            "cpu"
        )  # only these rows are ever multiplied: on an 8B that leaves 1.2 GiB for activations
    return Session(config, runtime, processor, model, letters, cache, rows, device)


# === Batches ======================================================================================
@dataclass(frozen=True)
class Prompt:
    """One question at one pixel budget, tokenised: what its choice orders have in common, then the rest of each."""

    row: int  # position in the frame it was made from
    orders: tuple[tuple[int, ...], ...]  # order[position] = original choice, of each answer
    image_path: str
    image_key: tuple  # content hash and pixel budget, the key in the vision cache
    grid: tuple[int, int, int]
    input_ids: np.ndarray  # (length,)
    segments: np.ndarray  # (length,): 0 in the common prefix, then the number of the order, from 1
    position_ids: np.ndarray  # (3, length): time, height and width
    answer_positions: np.ndarray  # (orders,): where the letter of each order is predicted
    present_choices: tuple[bool, ...]  # original choices that hold text
    target: tuple[
        float, ...
    ]  # probability of each original choice to be trained on, see `target_probabilities`


def make_prompt(
    session: Session,
    frame: pd.DataFrame,
    row: int,
    orders: Sequence[tuple[int, ...]],
    scale: float = 1.0,
) -> Prompt:
    """Tokenise row number `row` of `frame` in several orders. Raises DataError naming the row's id and image."""
    record = frame.iloc[row]
    try:
        budget = pixel_budget(session.config, session.processor, scale)
        grid = image_grid(record["width"], record["height"], session.processor, budget)
        templates = prompt_templates(session.config, record.get("wording", 0))
        messages = [build_messages(record, order, templates) for order in orders]
        texts = [encode_prompt(session.processor, message, grid) for message in messages]
    except Exception as error:
        raise DataError(
            f"Row {record['id']} (image {record['image_path']}) cannot be prepared: {error}"
        ) from error
    common = len(os.path.commonprefix([ids.tolist() for ids in texts]))
    shared = min(
        [common, *(len(ids) - 1 for ids in texts)]
    )  # every order keeps at least its last token
    lengths = [len(ids) - shared for ids in texts]
    segments = np.repeat(np.arange(len(texts) + 1), [shared, *lengths])
    prefix = rope_positions(session, texts[0][:shared], grid)
    # Behind the image, text counts up by one in every dimension.
    rest = [prefix.max() + 1 + np.tile(np.arange(length), (3, 1)) for length in lengths]
    return Prompt(
        row,
        tuple(orders),
        record["image_path"],
        (record["pixel_hash"], *budget),
        grid,
        np.concatenate([texts[0][:shared], *(ids[shared:] for ids in texts)]),
        segments,
        np.concatenate([prefix, *rest], axis=1),
        shared + np.cumsum(lengths) - 1,
        tuple(present_choices(record)),
        target_probabilities(record),
    )


def rope_positions(
    session: Session, input_ids: np.ndarray, grid: tuple[int, int, int]
) -> np.ndarray:
    """The model's own 3-D positions (3, length) of one sequence with one image."""
    inputs = {
        "input_ids": torch.from_numpy(input_ids)[None],
        "image_grid_thw": torch.tensor([grid]),
    }
    inputs |= {"mm_token_type_ids": (inputs["input_ids"] == session.processor.image_token_id).int()}
    return session.model.model.get_rope_index(**inputs)[0][:, 0].numpy()


def collate(session: Session, prompts: Sequence[Prompt]) -> dict:
    """Left-padded model inputs on the CPU, with the images as cache keys or as pixels, and one target per answer."""
    lengths = {len(prompt.input_ids) for prompt in prompts}
    length = max(lengths)
    if len(lengths) > 1 and session.device.type == "cuda":
        length += -length % 16  # attention kernels want the rows of a mask aligned

    def pad(arrays: Sequence[np.ndarray], value: int):
        padded = np.full((len(arrays), length, *arrays[0].shape[1:]), value)
        for row, array in zip(padded, arrays, strict=True):
            row[length - len(array) :] = array
        return torch.from_numpy(padded)

    input_ids = pad(
        [prompt.input_ids for prompt in prompts], session.processor.tokenizer.pad_token_id
    )
    segments = pad([prompt.segments for prompt in prompts], -1)
    inputs = {
        "input_ids": input_ids,
        "segments": segments,
        "attention_mask": (segments >= 0).long(),
    }
    inputs |= {"mm_token_type_ids": (input_ids == session.processor.image_token_id).int()}
    inputs |= {"image_grid_thw": torch.tensor([prompt.grid for prompt in prompts])}
    inputs |= {
        "position_ids": pad([prompt.position_ids.T for prompt in prompts], 1).permute(2, 0, 1)
    }
    answers = [(prompt, order) for prompt in prompts for order in prompt.orders]
    ends = [
        length - len(prompt.input_ids) + end
        for prompt in prompts
        for end in prompt.answer_positions
    ]
    rows = np.repeat(np.arange(len(prompts)), [len(prompt.orders) for prompt in prompts])
    inputs |= {
        "answers": torch.from_numpy(np.stack([rows, ends]))
    }  # (2, answers): row and position
    targets = [permute_choices(prompt.target, order) for prompt, order in answers]
    inputs |= {"targets": torch.tensor(targets)}  # (answers, 4), in prompt positions
    inputs |= {
        "present": torch.tensor(
            [permute_choices(prompt.present_choices, order) for prompt, order in answers]
        )
    }
    inputs |= {"prompts": list(prompts), "padded": len(lengths) > 1}
    if session.vision_cache.has_all(prompt.image_key for prompt in prompts):
        inputs["features"] = [session.vision_cache.read(prompt.image_key) for prompt in prompts]
    else:
        inputs["pixel_values"] = [_load_pixels(session, prompt) for prompt in prompts]
    return inputs


def _load_pixels(session: Session, prompt: Prompt):
    pixels, grid = prepare_image(
        load_image(prompt.image_path), session.processor, prompt.image_key[1:]
    )
    if grid != prompt.grid:
        raise DataError(
            f"Image {prompt.image_path} gives the patch grid {grid}, not the planned {prompt.grid}"
        )
    return pixels


def split_batches(session: Session, batches: Iterable[Mapping], size: int) -> Iterator[Mapping]:
    """The same questions in batches of at most `size`."""
    for batch in batches:
        prompts = batch["prompts"]
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        yield from [batch] if len(parts) == 1 else (collate(session, part) for part in parts)


def iterate_batches(
    session: Session, prompts: Sequence[Prompt], batches: Sequence[Sequence[int]]
) -> Iterator[dict]:
    """Collated batches in order, two ahead of the GPU; images that are not in the cache are decoded by processes."""
    is_cached = session.vision_cache.has_all(prompt.image_key for prompt in prompts)
    # Only a forked process shares the session; another kind would have to pickle the model.
    workers = session.config.num_workers if hasattr(os, "fork") and not is_cached else 0
    options = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    chosen, on_gpu = (
        [[prompts[item] for item in batch] for batch in batches],
        session.device.type == "cuda",
    )
    collate_fn = functools.partial(collate, session)
    loader = torch.utils.data.DataLoader(
        chosen, None, collate_fn=collate_fn, pin_memory=on_gpu, **options
    )
    return prefetch(iter(loader)) if on_gpu and not workers else iter(loader)


# === Scores and loss ==============================================================================
def shared_prefix_mask(segments):
    """Attention mask (batch, 1, length, length): causal, and no order of a question looks at another one."""
    # A padded position looks at everything: a row with nothing to look at may be NaN in an SDPA kernel. No real
    # position looks at padding, so that no score changes.
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    return ((causal & ((key == 0) | (key == query))) | (query < 0))[:, None]


def answer_hidden_states(session: Session, batch: Mapping):
    """Last hidden states (answers, hidden) where the letters are predicted; with the adapter, if one is attached."""
    inputs = {name: batch[name].to(session.device, non_blocking=True) for name in MODEL_INPUTS}
    turing = any(
        gpu["capability"] < 8.0 for gpu in session.runtime.gpus
    )  # its fast kernel refuses GQA without a mask
    several = len(batch["present"]) > len(batch["prompts"])
    if session.shares_prefixes and (turing or several or batch["padded"]):
        inputs["attention_mask"] = shared_prefix_mask(
            batch["segments"].to(session.device, non_blocking=True)
        )
    elif not batch["padded"]:
        del inputs["attention_mask"]  # it says nothing, and asking it would wait for the GPU
    encoded = session.vision_cache.encoder_outputs(batch)
    tokens = sum(
        np.count_nonzero(prompt.input_ids == session.processor.image_token_id)
        for prompt in batch["prompts"]
    )
    features = sum(map(len, encoded.pooler_output))
    if tokens != features:
        paths = sorted({prompt.image_path for prompt in batch["prompts"]})
        raise DataError(
            f"{tokens} image tokens but {features} image features, for the images {paths}"
        )
    inputs["mm_encoder_outputs"] = {"image": encoded}
    states = session.model.model(**inputs, use_cache=False).last_hidden_state
    answers = tuple(batch["answers"].to(states.device, non_blocking=True))
    return states[answers].to(
        session.device
    )  # a model on several GPUs ends on another one than it began


def choice_logits(logits, letters: Sequence[Sequence[int]]):
    """Scores (batch, 4) from vocabulary logits (batch, vocabulary): log-sum-exp over each letter's variants."""
    # One column at a time: a list of columns would go to the GPU first, and the CPU wait for that.
    columns = [
        torch.stack([logits[:, token] for token in variants], dim=-1) for variants in letters
    ]
    return torch.stack([values.logsumexp(dim=-1) for values in columns], dim=-1)


def answer_scores(session: Session, states):
    """Scores (answers, 4) in prompt positions from `answer_hidden_states`: only the letters' rows of the head, in fp32."""
    columns = itertools.count()
    letters = [[next(columns) for _ in variants] for variants in session.letter_token_ids]
    return choice_logits(states.float() @ session.letter_head_weights.T, letters)


def choice_loss(scores, targets, present, label_smoothing: float = 0.0):
    """Mean cross-entropy with (batch, 4) target probabilities, smoothed over the `present` ones of (batch, 4) scores.

    A hard label is a target of ones and zeros; everything is in prompt positions.
    """
    log_probabilities = (
        scores.masked_fill(~present, -math.inf).log_softmax(dim=-1).masked_fill(~present, 0.0)
    )
    hit = (targets * log_probabilities).sum(-1)
    mean = log_probabilities.sum(-1) / present.sum(-1)
    return -((1 - label_smoothing) * hit + label_smoothing * mean).mean()


def training_loss(session: Session, states, batch: Mapping):
    """The configured loss of a batch, from the hidden states (answers, hidden) of its answers."""
    targets, present = (
        batch[name].to(session.device, non_blocking=True) for name in ("targets", "present")
    )
    if session.config.loss == "vocabulary":
        plain = torch.tensor(
            [variants[0] for variants in session.letter_token_ids], device=session.device
        )
        logits = session.model.get_output_embeddings()(states).float()
        return torch.nn.functional.cross_entropy(logits, plain[targets.argmax(-1)])
    return choice_loss(
        answer_scores(session, states), targets, present, session.config.label_smoothing
    )


def out_of_memory_error(cause: Exception) -> RuntimeError:
    """What to do when not even one question fits into the GPU's memory."""
    remedy = "set max_pixels=400 * 32 * 32, gradient_checkpointing=True or a smaller model_id"
    return RuntimeError(
        f"Out of GPU memory with one question per forward pass: {remedy}. Cause: {cause}"
    )


# === Fast layers ==================================================================================
# Bytes that the scales of all 4-bit blocks may take on a GPU in fp32. Those of a 3B take 0.16 GiB: its products are so
# short that the GPU would wait for the launches that unpack the scales every time. An 8B has other use for 0.4 GiB.
MAX_UNPACKED_SCALE_BYTES = 2**28


def dequantize_weight(weight, scales: Sequence, shape: Sequence[int], dtype):
    """The frozen weight in `dtype`, out of NF4 where it has `scales`: `shape` then ends with the two block sizes."""
    if not scales:
        return weight.to(dtype)
    scale = scales[0] if len(scales) == 1 else dequantize_scales(scales, shape)
    return torch.ops.bitsandbytes.dequantize_4bit(weight, scale, shape[2], "nf4", shape[:2], dtype)


def dequantize_scales(scales: Sequence, shape: Sequence[int]):
    """The scale of each block of 4-bit numbers in fp32, out of its own 8 bits (Dettmers et al. 2023, double)."""
    absmax, code, group_scale, offset = scales
    return (
        torch.ops.bitsandbytes.dequantize_blockwise(
            absmax, group_scale, code, shape[3], torch.float32
        )
        + offset
    )


def lora_linear(x, dropped, lora_a, lora_b, scaling, weight, bias, scales, shape) -> tuple:
    """(W x + scaling * B A dropped, A dropped) in the number format of x (..., in); `dropped`: None without dropout."""
    rows = x.flatten(0, -2)
    inner = (rows if dropped is None else dropped.flatten(0, -2)) @ lora_a.to(x.dtype).T
    result = torch.nn.functional.linear(
        rows, dequantize_weight(weight, scales, shape, x.dtype), bias
    )
    result.addmm_(inner, lora_b.to(x.dtype).T, alpha=scaling)
    return result.view(*x.shape[:-1], -1), inner


def lora_backward(
    gradient, used, inner, lora_a, lora_b, scaling, weight, scales, shape, dropout
) -> tuple:
    """Gradients of x, of its dropped copy (empty without dropout), and in fp32 of A and B; `used` went through A."""
    rows = gradient.flatten(0, -2)
    scaled = functools.partial(
        torch.addmm, rows.new_empty(1), beta=0, alpha=scaling
    )  # one kernel, not two
    inner_gradient = scaled(rows, lora_b.to(rows.dtype))
    to_x, to_dropped = (
        rows @ dequantize_weight(weight, scales, shape, rows.dtype),
        rows.new_empty(0),
    )
    if dropout:
        to_dropped = (inner_gradient @ lora_a.to(rows.dtype)).view_as(used)
    else:
        to_x.addmm_(inner_gradient, lora_a.to(rows.dtype))
    to_a, to_b = inner_gradient.T @ used.flatten(0, -2), scaled(rows.T, inner)
    return to_x.view_as(used), to_dropped, to_a.float(), to_b.float()


def _save_for_lora_backward(ctx, inputs, output) -> None:
    x, dropped, lora_a, lora_b, ctx.scaling, weight, _, scales, ctx.shape = inputs
    ctx.dropout = dropped is not None
    ctx.save_for_backward(dropped if ctx.dropout else x, output[1], lora_a, lora_b, weight, *scales)


def _run_lora_backward(ctx, gradient, _):
    used, inner, lora_a, lora_b, weight, *scales = ctx.saved_tensors
    arguments = (
        gradient.contiguous(),
        used,
        inner,
        lora_a,
        lora_b,
        ctx.scaling,
        weight,
        scales,
        ctx.shape,
    )
    to_x, to_dropped, to_a, to_b = torch.ops.vqa.lora_backward(*arguments, ctx.dropout)
    return (
        to_x,
        to_dropped if ctx.dropout else None,
        to_a,
        to_b,
        None,
        None,
        None,
        [None] * len(scales),
        None,
    )


LORA_SCHEMA = (
    "(Tensor x, Tensor? dropped, Tensor lora_a, Tensor lora_b, float scaling, Tensor weight, Tensor? bias, "
    "Tensor[] scales, int[] shape) -> (Tensor, Tensor)"
)
LORA_BACKWARD_SCHEMA = (
    "(Tensor gradient, Tensor used, Tensor inner, Tensor lora_a, Tensor lora_b, float scaling, Tensor weight, "
    "Tensor[] scales, int[] shape, bool dropout) -> (Tensor, Tensor, Tensor, Tensor)"
)


@functools.cache
def register_lora_operators() -> None:
    """Make both functions operators that torch.compile calls as they are, so that it keeps no dequantised weight."""

    def shapes(x, dropped, lora_a, lora_b, *_):
        return x.new_empty(*x.shape[:-1], len(lora_b)), x.new_empty(
            math.prod(x.shape[:-1]), len(lora_a)
        )

    def backward_shapes(gradient, used, inner, lora_a, lora_b, *others):
        to_dropped = torch.empty_like(used) if others[-1] else used.new_empty(0)
        return (
            torch.empty_like(used),
            to_dropped,
            torch.empty_like(lora_a),
            torch.empty_like(lora_b),
        )

    make = functools.partial(torch.library.custom_op, mutates_args=())
    forward = make("vqa::lora_linear", lora_linear, schema=LORA_SCHEMA)
    forward.register_fake(shapes)
    forward.register_autograd(_run_lora_backward, setup_context=_save_for_lora_backward)
    make("vqa::lora_backward", lora_backward, schema=LORA_BACKWARD_SCHEMA).register_fake(
        backward_shapes
    )


def lora_forward(layer, x):
    """W x + scaling * B A dropout(x), as PEFT's layer computes it (Hu et al. 2021), without its fp32 copies of x."""
    dropout, base = layer.lora_dropout["default"], layer.base_layer
    dropped = dropout(x) if layer.training and isinstance(dropout, torch.nn.Dropout) else None
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight, scales = base.weight, []
    if layer.packed_shape:
        weight, scales = layer.packed, [getattr(layer, name) for name in layer.scale_names]
    shape = layer.packed_shape or [*weight.shape]
    return torch.ops.vqa.lora_linear(
        x, dropped, lora_a, lora_b, layer.scaling["default"], weight, base.bias, scales, shape
    )[0]


@functools.cache
def fast_lora_class(kind: type) -> type:
    """The subclass of a PEFT layer that computes `lora_forward`; a class, because torch.compile traces it once."""
    return type(f"Fast{kind.__name__}", (kind,), {"forward": lora_forward})


def use_fast_lora(adapted) -> None:
    """Let all LoRA layers of a PEFT model compute `lora_forward`; their weights and files stay PEFT's."""
    register_lora_operators()
    layers = [layer for layer in adapted.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    states = [getattr(layer.base_layer.weight, "quant_state", None) for layer in layers]
    unpack = (
        4 * sum(state.absmax.numel() for state in states if state is not None)
        <= MAX_UNPACKED_SCALE_BYTES
    )
    for layer, state in zip(layers, states, strict=True):
        weight, kind = layer.base_layer.weight, type(layer.base_layer)
        if state is not None and state.quant_type == "nf4" and state.nested:
            layer.packed_shape = [*state.shape, state.blocksize, state.state2.blocksize]
            scales = {"absmax": state.absmax, "code": state.state2.code}
            scales |= {"group_scale": state.state2.absmax, "offset": state.offset}
            scales = (
                {"scale": dequantize_scales([*scales.values()], layer.packed_shape)}
                if unpack
                else scales
            )
            layer.scale_names = tuple(scales)
            for name, tensor in {
                "packed": weight.detach().as_subclass(torch.Tensor),
                **scales,
            }.items():
                layer.register_buffer(name, tensor, persistent=False)
        elif kind is torch.nn.Linear and weight.dtype in (
            torch.float32,
            torch.float16,
            torch.bfloat16,
        ):
            layer.packed_shape = []
        else:  # 8-bit, FP8, other kinds of 4-bit: what their numbers mean is known to their own layer only
            LOGGER.info("Decision: %s layers of PEFT stay as they are", kind.__name__)
            return
        layer.__class__ = fast_lora_class(type(layer))


def forward_with_checkpointing(layer, compute: Callable, hidden_states, **options):
    """A decoder layer's pass by `compute`; where `recompute` is set, its activations are made again in the backward."""
    if layer.training and not hidden_states.requires_grad:
        hidden_states = (
            hidden_states.detach().requires_grad_()
        )  # the first layer like the others: one trace for all
    if layer.training and layer.recompute:
        again = torch.utils.checkpoint.checkpoint
        return again(compute, layer, hidden_states, use_reentrant=False, **options)
    return compute(layer, hidden_states, **options)


def decide_compile(wish: str, device: str, questions: int) -> tuple[bool, str]:
    """Whether torch.compile pays for itself on `questions` questions to come; with the reason."""
    if wish != "auto":
        return wish == "on", f"torch.compile {wish}: set in the config, or by the model's family"
    if (
        device != "cuda"
        or importlib.util.find_spec("triton") is None
        or shutil.which("gcc") is None
    ):
        return False, "torch.compile off: it needs a GPU, triton and a C compiler"
    if questions < 2000:
        return False, f"torch.compile off: {questions} questions take less time than compiling"
    return True, f"torch.compile on: {questions} questions to come"


def use_fast_layers(session: Session, adapted, questions: int):
    """Give the adapter's layers `lora_forward` and, where it pays for that many questions, compile the decoder."""
    use_fast_lora(adapted)
    wish = session.config.compile_layers if session.family.is_compiled else "off"
    use, reason = decide_compile(wish, session.device.type, questions)
    LOGGER.info("Decision: %s", reason)
    compute = type(session.decoder_layers[0]).forward
    if use:
        torch._dynamo.config.specialize_float = (
            True  # of the constants in a layer; lengths are what changes
        )
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        torch.set_num_threads(
            torch.get_num_threads()
        )  # in autograd's thread, too: else it would compile once more
        compute = torch.compile(compute, dynamic=True)
    for layer in session.decoder_layers:
        # On several GPUs accelerate's forward fetches the inputs, then calls the one it found. On one GPU a 4-bit model
        # has it too, and there is nothing to fetch.
        fetches = session.config.spread_model and hasattr(layer, "_hf_hook")
        setattr(
            layer,
            "_old_forward" if fetches else "forward",
            functools.partial(forward_with_checkpointing, layer, compute),
        )
        layer.recompute = False
    return adapted


# === Memory plan ==================================================================================
@dataclass(frozen=True)
class MemoryPlan:
    """How a training step is spread over passes, and the peak that it is expected to reach."""

    micro_batch: int  # questions per forward and backward pass
    stored_layers: int  # decoder layers, the last ones, that keep their activations; the others compute them again
    peak_gib: float = 0.0  # allocated; 0 on a CPU, where nothing is measured


def recompute_layers(session: Session, stored: int) -> None:
    """Let all decoder layers but the last `stored` compute their activations again in the backward pass."""
    # The last ones keep theirs, because the backward pass frees them before it needs room to compute others again.
    for number, layer in enumerate(session.decoder_layers):
        layer.recompute = number < len(session.decoder_layers) - stored


def candidate_plans(
    costs: tuple[float, float, float], budget: float, layers: int, step: int, recompute: bool
) -> list[tuple[int, int]]:
    """(micro_batch, stored_layers) that fit into `budget` bytes: a step in 1, 2, 4, ... passes, each with what it can
    store. `costs` in bytes (fixed, question, layer): a pass takes fixed + micro_batch * (question + stored * layer)."""
    fixed, question, layer = costs
    plans = {}
    sizes = {math.ceil(step / 2**halvings) for halvings in range(step.bit_length())}
    for micro_batch in sorted(sizes - {1}, reverse=True) or [
        1
    ]:  # a pass over one question is the last resort
        room = (budget - fixed - micro_batch * question) / (micro_batch * layer)
        stored = min(layers, math.floor(room))
        if stored >= (1 if recompute else layers):
            plans[micro_batch] = (
                stored if stored > 1 else 0
            )  # one layer at a time is computed again anyway
    return list(plans.items())


def measure_pass(session: Session, prompts: Sequence[Prompt], stored: int) -> tuple[float, float]:
    """Seconds, and peak bytes on the fullest GPU, of one forward and backward pass; infinite where memory runs out."""
    recompute_layers(session, stored)
    reset_peak_memory()
    batch = collate(session, prompts)
    batch["padded"] = True  # attention then takes a mask, as it does in training
    try:
        start = time.perf_counter()
        training_loss(session, answer_hidden_states(session, batch), batch).backward()
        torch.cuda.synchronize()
        gpus = range(torch.cuda.device_count())
        return time.perf_counter() - start, max(map(torch.cuda.max_memory_allocated, gpus))
    except torch.OutOfMemoryError as error:
        LOGGER.info(
            "%d questions with %d stored layers do not fit: %s", len(prompts), stored, error
        )
        return math.inf, math.inf
    finally:
        session.model.zero_grad(set_to_none=True)


def plan_memory(session: Session, prompts: Sequence[Prompt], state_bytes: int) -> MemoryPlan:
    """The fastest of the plans that fit, by trying each on the longest prompt; the optimizer will add `state_bytes`."""
    config, layers = session.config, len(session.decoder_layers)
    if session.device.type != "cuda" or config.memory_plan == "config" or config.strict_determinism:
        return MemoryPlan(config.batch_size, 0 if config.gradient_checkpointing else layers)
    longest = max(prompts, key=lambda prompt: len(prompt.input_ids))
    step, some = (
        math.ceil(config.batch_size * config.grad_accum_steps / rank_and_world_size()[1]),
        max(2, layers // 4),
    )
    measure_pass(session, [longest] * 2, 0)  # compiles, and fills the workspaces of the libraries
    two, four, more = (
        measure_pass(session, [longest] * n, stored)[1] for n, stored in ((2, 0), (4, 0), (2, some))
    )
    candidates, tried = [], {MemoryPlan(1, 0 if config.gradient_checkpointing else layers): 0.0}
    question, layer, most = (four - two) / 2, max(1.0, (more - two) / 2 / (some - 1)), layers
    if math.isinf(more) and config.gradient_checkpointing:
        layer, most = (
            question,
            1,
        )  # no layer can keep what it computes, as with experts that are out of their 4 bits
    if math.isfinite(two + four + layer):
        costs = (2 * two - four + state_bytes, question - layer, layer)
        candidates = candidate_plans(
            costs, memory_budget(), most, step, config.gradient_checkpointing
        )
    for micro_batch, stored in candidates:
        measure_pass(session, [longest] * micro_batch, stored)  # the allocator grows
        seconds, peak = measure_pass(session, [longest] * micro_batch, stored)
        clear_memory()
        plan = MemoryPlan(micro_batch, stored, (peak + state_bytes) / 2**30)
        LOGGER.info("%s: %.1f questions/s", plan, micro_batch / seconds)
        if peak + state_bytes < memory_budget():
            tried[plan] = micro_batch / seconds
    plan = max(tried, key=tried.get)
    LOGGER.info("Decision: of %d questions in a step and %d layers, %s", step, layers, plan)
    return plan


# === Filling the vision cache =====================================================================
def vision_cache_gain(session: Session, frame: pd.DataFrame, uses: int, passes: int) -> float:
    """Share of the time that cached features save, measured on at most eight rows that have none: each is used `uses`
    times, and the language model then does the work of `passes` forward passes."""
    prompts = (make_prompt(session, frame, row, [(0, 1, 2, 3)]) for row in range(len(frame)))
    missing = (prompt for prompt in prompts if not session.vision_cache.has_all([prompt.image_key]))
    if not (chosen := [*itertools.islice(missing, 8)]):
        return 1.0  # another process of the team asks
    batch = collate(session, chosen)
    with torch.inference_mode():
        for _ in range(2):  # the second one counts
            start = time.perf_counter()
            batch["features"] = [
                [*map(torch.Tensor.cpu, image)] for image in session.vision_cache.tower(batch)
            ]
            middle = time.perf_counter()
            answer_hidden_states(session, batch).cpu()
            end = time.perf_counter()
    return (1 - 1 / uses) * (middle - start) / (middle - start + passes * (end - middle))


def fill_vision_cache(session: Session, frame: pd.DataFrame, uses: int, passes: int) -> None:
    """Store the features of a frame's images where that saves at least 15 % of the time; say so where it does not."""
    budget = pixel_budget(session.config, session.processor)
    is_cached = session.vision_cache.has_all((digest, *budget) for digest in frame["pixel_hash"])
    if session.device.type == "cuda" and any_process(not is_cached):
        gain = vision_cache_gain(session, frame, uses, passes)
        LOGGER.info(
            "Decision: vision cache %s: it would save %.0f %% of the time",
            "on" if gain >= 0.15 else "off",
            100 * gain,
        )
        if not any_process(gain >= 0.15):
            return
    if session.vision_cache.fill(frame, budget, session.progress):
        session.vision_cache.offload_tower()


# ======= 4. Run ===================================================================================

# === Run directory ================================================================================
LOCK_SECONDS = 10  # how long a second process waits for the first one to end
STAGE_FILES = {  # the file that a stage writes last: where it is, the stage is skipped
    "zeroshot": "zeroshot.npz",
    "train": "fold_{fold}/result.json",
    "predict": "fold_{fold}/test.npz",
    "rescore": "fold_{fold}/test_16bit.npz",
}


@dataclass(frozen=True)
class Run:
    """One run directory: the configuration, the rows with their folds, and where everything else is written."""

    config: Config
    directory: Path
    train: pd.DataFrame  # with fold
    test: pd.DataFrame
    sample: pd.DataFrame
    fallbacks: dict[str, int]
    fingerprint: str  # of configuration, data, folds and targets together
    extra_rows: (
        pd.DataFrame
    )  # further training rows: source (dev, test), and fold, the one that trains on them

    def fold_dir(self, fold: int) -> Path:
        return self.directory / f"fold_{fold}"

    @classmethod
    def open(cls, directory: str | Path) -> Run:
        directory = Path(directory)
        content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        tables = [
            read_table(directory / name)
            for name in ("folds.csv", "test_rows.csv", "sample_rows.csv")
        ]
        path = directory / "extra_rows.csv"
        extra = read_table(path) if path.exists() else _no_rows(tables[0])
        return cls(
            Config(**content["config"]),
            directory,
            *tables,
            content["fallbacks"],
            content["fingerprint"],
            extra,
        )

    def is_done(self, stage: str, fold: int) -> bool:
        return (self.directory / STAGE_FILES[stage].format(fold=fold)).exists()

    @property
    def finished_folds(self) -> list[int]:
        """The folds that are trained; fewer than the configuration asks for when the time was up."""
        return [fold for fold in self.config.folds_to_train if self.is_done("train", fold)]

    def unfinished_folds(self, stage: str, folds: Sequence[int]) -> list[int]:
        """The folds that wait for `stage`: not done, and trained where it scores."""
        trained = [
            fold for fold in folds if stage in ("zeroshot", "train") or self.is_done("train", fold)
        ]
        return [fold for fold in trained if not self.is_done(stage, fold)]

    @property
    def selected_weights(self) -> list[str]:
        """The kinds of weights that score, of raw, ema and swa; none before they are selected."""
        path = self.directory / "selection.json"
        return (
            json.loads(path.read_text(encoding="utf-8"))["weights"].split("+")
            if path.exists()
            else []
        )

    @property
    def is_rescored(self) -> bool:
        """Whether all members have 16-bit scores, too."""
        return bool(self.submission_models) and all(
            self.is_done("rescore", fold) for fold in self.submission_models
        )

    @property
    def final_fold(self) -> int:
        """The number of the model on all rows, the first that is no fold's."""
        return self.config.n_folds

    @property
    def models_to_train(self) -> list[int]:
        """The folds that the configuration asks for, and the final model where it does."""
        return [*self.config.folds_to_train, *[self.final_fold] * self.config.final_retrain]

    @property
    def submission_models(self) -> list[int]:
        """The models behind the submission: the finished folds and, once it has scored as they have, the final one."""
        folds = self.finished_folds
        rescored = bool(folds) and all(self.is_done("rescore", fold) for fold in folds)
        return folds + [self.final_fold] * self.is_done(
            "rescore" if rescored else "predict", self.final_fold
        )

    @property
    def uses_per_image(self) -> int:
        """How often a training image is needed, about: in each fold's epochs, validations and final scores."""
        epochs = self.config.num_epochs // (
            1 + self.config.augment_images
        )  # the others show a variant of it
        return len(self.config.folds_to_train) * (epochs + 2)

    def seconds_left(self) -> float:
        """Seconds of the time budget that remain; infinite without one."""
        hours = self.config.time_budget_hours or (
            11 if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else math.inf
        )
        path = self.directory / "session.json"
        started = (
            json.loads(path.read_text(encoding="utf-8"))["started"]
            if path.exists()
            else time.time()
        )
        return started + 3600 * hours - time.time()

    def seconds_per_question(self) -> float:
        """Of the last inference that a worker has logged; 0 before the first one."""
        logged = (
            record.get("seconds_per_question")
            for record in read_json_lines(self.directory / "stages.jsonl")
        )
        return next(filter(None, reversed(list(logged))), 0.0)

    def scoring_seconds(self, cost: float) -> float:
        """What the test rows cost all models, one after the other, at the speed of the last inference; NaN before it.

        `cost` of a row in questions with one view."""
        return round(
            cost
            * (self.seconds_per_question() or math.nan)
            * len(self.test)
            * len(self.submission_models),
            1,
        )

    @contextlib.contextmanager
    def lock_folds(self, folds: Sequence[int]) -> Iterator[None]:
        """Keep other processes off these folds; CheckpointError if one is at work. A dead owner's lock is free."""
        with contextlib.ExitStack() as locks:
            for fold in folds:
                try:
                    locks.enter_context(
                        filelock.FileLock(self.directory / f".fold_{fold}.lock", LOCK_SECONDS)
                    )
                except filelock.Timeout as error:
                    problem = f"another process is working on fold {fold} of {self.directory}"
                    raise CheckpointError(
                        f"{problem}; wait for it, stop it, or choose a new run_name"
                    ) from error
            yield


def _no_rows(train: pd.DataFrame) -> pd.DataFrame:
    """`extra` of a run that trains on nothing but its training rows."""
    return train.head(0).assign(source="")


def _differing_ids(rows: pd.DataFrame, others: pd.DataFrame) -> list[str]:
    """Ids of the rows that only one of two tables has."""
    both = pd.concat([rows.astype(str), others.astype(str)])
    return sorted(set(both.drop_duplicates(keep=False)["id"]))


def all_rows(run: Run) -> pd.DataFrame:
    """What any fold trains on; `fold` is the one that a training row validates, or that an extra row is for."""
    return pd.concat([run.train.assign(source="train"), run.extra_rows], ignore_index=True)


def training_rows(run: Run, fold: int, rows: pd.DataFrame | None = None) -> pd.DataFrame:
    """What a fold trains on, of all rows or of `rows`: the training rows of other folds, and the extra rows for it."""
    rows = all_rows(run) if rows is None else rows
    return rows[(rows["source"] == "train") != (rows["fold"] == fold)].reset_index(drop=True)


def source_table(run: Run) -> pd.DataFrame:
    """How many rows of each file (train, dev, test) every fold trains on."""
    counts = {
        fold: training_rows(run, fold)["source"].value_counts() for fold in run.models_to_train
    }
    return pd.DataFrame(counts).T.fillna(0).astype(int).rename_axis("fold")


# === Backup =======================================================================================
def back_up(run: Run, fold: int | None = None) -> None:
    """Copy what is new of the run, or of one fold, to `backup_dir`; what fails there is reported and costs no run.

    Every file and every checkpoint appears there whole, in the order in which they were finished here."""
    if run.config.backup_dir is None or rank_and_world_size()[0] > 0:
        return
    place, folder = (
        Path(run.config.backup_dir) / run.directory.name,
        run.fold_dir(fold) if fold is not None else None,
    )
    files = (folder or run.directory).rglob("*")
    try:
        if not place.parent.parent.is_dir():  # making it anew would fill this session's own disk
            raise OSError(f"{place.parent.parent} is gone")
        if folder:
            _back_up_checkpoint(folder / "checkpoints", place / folder.name / "checkpoints")
        chosen = [
            path
            for path in files
            if path.is_file() and _belongs_in_backup(path.relative_to(run.directory), fold)
        ]
        for path in sorted(chosen, key=lambda path: path.stat().st_mtime_ns):
            target = place / path.relative_to(run.directory)
            size, changed = path.stat().st_size, path.stat().st_mtime
            if not (
                target.exists()
                and target.stat().st_size == size
                and target.stat().st_mtime >= changed
            ):
                target.parent.mkdir(parents=True, exist_ok=True)
                new = target.with_name(f".{target.name}.{os.getpid()}.tmp")
                shutil.copyfile(path, new)
                os.replace(new, target)
    except OSError as error:  # the disk is full, or Drive was taken away
        LOGGER.warning("Not backed up: %s", error)
        MetricLogger(run.directory / "events.jsonl").log(event=f"not backed up to {place}: {error}")


def delete_outputs(run: Run, paths: Sequence[Path]) -> None:
    """Delete files of the run, here and in its backup: a later session must not take them for finished ones."""
    for path in paths:
        (run.directory / path).unlink(missing_ok=True)
        if run.config.backup_dir:
            (Path(run.config.backup_dir) / run.directory.name / path).unlink(missing_ok=True)


def _belongs_in_backup(path: Path, fold: int | None) -> bool:
    """Whether a file of the run directory belongs into the backup of `fold`, or of everything but the folds."""
    foreign = (path.parts[0].startswith("fold_") and fold is None) or "checkpoints" in path.parts
    return not (
        foreign
        or path.suffix in (".lock", ".tmp")
        or path.name.startswith(("progress_", "session."))
    )


def _back_up_checkpoint(source: Path, place: Path) -> None:
    """Copy the newest verified checkpoint under a name that counts only when it is whole; OSError if it is damaged."""
    newest = CheckpointManager(source).latest_verified()
    if newest is None or (place / newest.name).exists():
        return
    new = place / f".incomplete-{newest.name}"
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(newest, new)
    if problem := CheckpointManager.problem(new):
        raise OSError(f"the copy of {newest} is damaged: {problem}")
    os.replace(new, place / newest.name)
    CheckpointManager(place).prune()


# ======= 5. Training and inference ================================================================

# === Metrics ======================================================================================
ECE_BINS = 15  # as in Guo et al. 2017
PROBABILITY_FLOOR = 1e-12  # keeps a logarithm finite where a probability has underflowed


def _as_array(values) -> np.ndarray:
    if hasattr(values, "detach"):  # a torch tensor: numpy knows neither gradients nor bfloat16
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _as_probabilities(values, ndim=2) -> np.ndarray:
    """Checked float64 probabilities, (n, choices) or with ndim=3 (members, n, choices)."""
    values = _as_array(values)
    if not (
        values.ndim == ndim
        and (values >= 0).all()
        and np.allclose(values.sum(axis=-1), 1, atol=1e-3)
    ):
        raise ValueError(
            f"need probabilities with {ndim} axes and a sum of 1 in each row; are these logits?"
        )
    return values


def _as_labels(labels, shape) -> np.ndarray:
    """Checked int labels for an array whose last two axes are (n, choices)."""
    labels, (n_rows, n_choices) = _as_array(labels), shape[-2:]
    if labels.shape != (n_rows,) or not n_rows:
        raise ValueError(f"{n_rows} rows but labels of shape {labels.shape}")
    bad = ~np.isin(labels, np.arange(n_choices))
    if bad.any():
        row = bad.argmax()
        raise ValueError(
            f"{bad.sum()} unlabelled rows, the first is row {row} with label {labels[row]:g}: drop them"
        )
    return labels.astype(np.int64)


def softmax(logits) -> np.ndarray:
    """Probabilities over the last axis; a masked choice (-inf) gets exactly 0."""
    return special.softmax(_as_array(logits), axis=-1)


def combine_views(logits) -> np.ndarray:
    """(n, views, choices) logits, or (n, choices), -> (n, choices) mean log-probabilities over a row's views."""
    # Over all four rotations this cancels any additive letter preference: each choice has then met each letter once.
    logits = _as_array(logits)
    logits = logits[:, None] if logits.ndim == 2 else logits
    exists = ~np.isnan(logits).all(axis=2, keepdims=True)
    combined = special.log_softmax(logits, axis=2).mean(axis=1, where=exists)
    # One -inf would mask the choice in the mean although other views have scored it.
    uneven = np.isneginf(combined) & np.isfinite(logits).any(axis=1)
    bad = (np.isnan(combined) | uneven).any(axis=1)
    if bad.any():
        raise ValueError(
            f"row {bad.argmax()}: no view, a view with NaN, or a choice masked in some views only"
        )
    return combined


def negative_log_likelihood(probabilities, labels) -> float:
    """Mean -log p(label): the score that calibration is judged by. A zero counts as PROBABILITY_FLOOR."""
    probabilities = _as_probabilities(probabilities)
    chosen = probabilities[np.arange(len(probabilities)), _as_labels(labels, probabilities.shape)]
    return float(-np.log(np.maximum(chosen, PROBABILITY_FLOOR)).mean())


def brier_score(probabilities, labels) -> float:
    """Mean squared distance of probabilities and truth, summed over choices (Brier 1950): 0 is best, 2 is worst."""
    probabilities = _as_probabilities(probabilities)
    truth = np.eye(probabilities.shape[1])[_as_labels(labels, probabilities.shape)]
    return float(((probabilities - truth) ** 2).sum(axis=1).mean())


def accuracy(probabilities, labels) -> float:
    """Share of rows whose most probable choice is the label."""
    probabilities = _as_probabilities(probabilities)
    return float((probabilities.argmax(axis=1) == _as_labels(labels, probabilities.shape)).mean())


def _confidence_bins(confidence: np.ndarray, n_bins: int) -> np.ndarray:
    """(n,) the number of the bin; a value on an edge belongs to the bin that it ends."""
    return (
        np.ceil(np.round(confidence * n_bins, 9)).clip(1, n_bins).astype(int) - 1
    )  # 0.6 * 15 is a hair above 9


def reliability_curve(probabilities, labels, n_bins=15) -> pd.DataFrame:
    """Mean confidence, accuracy and count per confidence bin; an empty bin has count 0 and NaN elsewhere."""
    probabilities = _as_probabilities(probabilities)
    labels = _as_labels(labels, probabilities.shape)
    confidence = probabilities.max(axis=1)
    bins = _confidence_bins(confidence, n_bins)
    rows = pd.DataFrame(
        {"confidence": confidence, "accuracy": probabilities.argmax(axis=1) == labels}
    ).astype(float)
    curve = rows.groupby(bins).mean().reindex(range(n_bins))
    return curve.assign(count=np.bincount(bins, minlength=n_bins)).rename_axis("bin")


def expected_calibration_error(probabilities, labels, n_bins=ECE_BINS) -> float:
    """Mean gap of confidence and accuracy over equal bins (Guo et al. 2017); read beside `calibration_error_null`."""
    curve = reliability_curve(probabilities, labels, n_bins).dropna()
    return float(
        np.average((curve["confidence"] - curve["accuracy"]).abs(), weights=curve["count"])
    )


def calibration_error_null(probabilities) -> np.ndarray:
    """(3,) expected calibration error under labels drawn from these very probabilities: mean, 5 % and 95 % quantile."""
    probabilities = _as_probabilities(probabilities)
    confidence, draws = (
        probabilities.max(axis=1),
        np.random.default_rng(0).random((200, len(probabilities))),
    )
    gaps = confidence - (draws < confidence)  # the answer is right as often as it is probable
    in_bin = np.eye(ECE_BINS)[_confidence_bins(confidence, ECE_BINS)]
    errors = np.abs(gaps @ in_bin).sum(axis=1) / len(probabilities)
    return np.array([np.mean(errors), *np.quantile(errors, [0.05, 0.95])])


def score_row(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, NLL, Brier score and ECE of probabilities (n, 4)."""
    metrics = {"accuracy": accuracy, "nll": negative_log_likelihood, "brier": brier_score}
    metrics["ece"] = expected_calibration_error
    return {name: metric(probabilities, labels) for name, metric in metrics.items()}


def calibration_row(probabilities, labels) -> dict[str, float]:
    """`score_row`, and the ECE in excess of what chance alone gives honest probabilities, with its 90 % interval.

    An interval above zero says that the probabilities are not honest; one that holds it, that these rows cannot tell.
    """
    scores, null = score_row(probabilities, labels), calibration_error_null(probabilities)
    excess = dict(
        zip(("ece_excess", "excess_high", "excess_low"), scores["ece"] - null, strict=True)
    )
    return scores | {
        name: float(excess[name]) for name in ("ece_excess", "excess_low", "excess_high")
    }


def _letter_indices(values) -> np.ndarray:
    """(n,) indices 0-3 of (n, 4) probabilities, letters or indices."""
    if np.ndim(values) == 2:
        return _as_array(values).argmax(axis=1)
    if isinstance(next(iter(values), None), str):
        values = pd.Index(CHOICES).get_indexer(list(values))  # -1 for any other text
    return _as_labels(values, (len(values), len(CHOICES)))


def prediction_diversity(predictions, validation_labels) -> dict:
    """Mode-collapse alarm on (n, 4) probabilities or (n,) letters; `entropy` is 1 for even letters, 0 for a single."""
    predicted, labels = _letter_indices(predictions), _letter_indices(validation_labels)
    shares, label_shares = (
        np.bincount(indices, minlength=4) / len(indices) for indices in (predicted, labels)
    )
    entropy, label_entropy = (
        float(special.entr(share).sum() / math.log(4)) for share in (shares, label_shares)
    )
    top = int(shares.argmax())
    top_share, label_share = float(shares[top]), float(label_shares[top])
    # Collapsed is an excess of the top letter that chance does not explain and that is also large.
    test = binomtest(
        int((predicted == top).sum()), len(predicted), label_share, alternative="greater"
    )
    large = top_share - label_share > 0.3 or entropy < 0.6 * label_entropy
    alarm = {
        "entropy": entropy,
        "top_letter": CHOICES[top],
        "top_share": top_share,
        "label_share": label_share,
    }
    return alarm | {"collapsed": bool(test.pvalue < 0.001 and large)}


# === Views ========================================================================================
SUFFIX_16_BIT = " in 16 bits"  # end of the name of a view, or a set of them, that an unquantised base model scored


@dataclass(frozen=True)
class TTAView:
    """One way to show a question: a cyclic rotation of its choices and a factor on the pixel budget."""

    name: str
    rotation: int = 0
    scale: float = 1.0

    @property
    def order(self) -> tuple[int, ...]:
        return tuple((position + self.rotation) % 4 for position in range(4))


def all_views(config: Config, processor) -> list[TTAView]:
    """Every view the configuration asks for, the plain one first; `infer_max_pixels` adds one more scale."""
    if not config.use_tta:
        return [TTAView("rotation 0")]
    scales = {1.0, *config.tta_scales}
    if config.infer_max_pixels:
        scales.add(round(config.infer_max_pixels / pixel_budget(config, processor)[1], 3))
    rotations = [
        TTAView(f"rotation {turn}", turn) for turn in range(0, 4, 4 // config.tta_rotations)
    ]
    return rotations + [TTAView(f"scale {scale:g}", 0, scale) for scale in sorted(scales - {1.0})]


def tta_views(row: Mapping, views: Sequence[TTAView]) -> list[TTAView]:
    """The views that make sense for one question: no scale below 1 where text is read, and no flip or turn at all."""
    return [view for view in views if not (row["type"] == "ocr" and view.scale < 1)]


def view_sets(view_names: Sequence[str]) -> dict[str, list[int]]:
    """The candidate sets, each wider than the one before: one view, all rotations, and scales; then in 16 bits."""
    sets = {}
    for ending in ("", SUFFIX_16_BIT):
        own = [
            index
            for index, name in enumerate(view_names)
            if name.endswith(SUFFIX_16_BIT) == bool(ending)
        ]
        rotations = [index for index in own if view_names[index].startswith("rotation")]
        for name, wider in {
            "single view": own[:1],
            "rotations": rotations,
            "rotations and scales": own,
        }.items():
            if wider and wider not in sets.values():
                sets[name + ending] = wider
    return sets


# The last step of `view_sets` changes few answers. With `adaptive_tta` only the test rows whose answer is in doubt are
# scored in its views, in a second pass, whose prompts repeat the prefix: the costs below count that.
def split_views(view_names: Sequence[str]) -> tuple[list[int], list[int]]:
    """The views that every row is scored in, and what the last step of `view_sets` adds; none where it has one step."""
    *before, widest = view_sets(view_names).values()
    first = before[-1] if before else widest
    return first, [view for view in widest if view not in first]


def scoring_cost(prompts: int, answers: int) -> float:
    """Time in prompts with one answer: a further choice order is a short text behind the common prefix."""
    return prompts + (answers - prompts) / 7


def views_cost(session: Session, views: Sequence[TTAView]) -> float:
    """Time to score a question in all `views` and each kind of weights, in questions with one view and kind."""
    config = session.config
    kinds = (
        1 + config.use_ema + config.use_swa if config.mix_weights else 1
    )  # at most: OOF may prefer a single one
    return kinds * scoring_cost(
        len({view.scale if session.shares_prefixes else view for view in views}), len(views)
    )


def adaptive_cost(session: Session, views: Sequence[TTAView]) -> float:
    """As views_cost, for a test row: `adaptive_tta` spends a part of what the last step of views would cost."""
    first, _ = split_views([view.name for view in views])
    once, every = views_cost(session, [views[view] for view in first]), views_cost(session, views)
    return (
        every
        if session.config.adaptive_tta is None
        else once + session.config.adaptive_tta * (every - once)
    )


def inference_seconds(
    run: Run, seconds_per_question: float, session: Session, training: int
) -> float:
    """Estimated time to validate `training` folds and to score the worker's folds that wait for it, with margin."""
    waiting = [
        fold
        for fold in session.assigned_folds
        if fold in run.finished_folds and not run.is_done("predict", fold)
    ]
    held_out, views = len(run.train) / run.config.n_folds, all_views(run.config, session.processor)
    scored = held_out * views_cost(session, views) + len(run.test) * adaptive_cost(session, views)
    questions = (len(waiting) + training) * scored + 3 * training * held_out
    return 1.25 * seconds_per_question * questions / rank_and_world_size()[1]


# === Prediction ===================================================================================
def unpermute_scores(scores, order: Sequence[int]) -> np.ndarray:
    """Scores (..., 4) by prompt position, moved to the original choices: result[..., order[p]] = scores[..., p]."""
    return np.asarray(scores)[..., np.argsort(order)]


@dataclass
class InferenceCheckpoint:
    """Where inference keeps what it has done, to be continued by a later process of the same run."""

    path: Path
    fingerprint: str
    config: Config
    written: float = field(default_factory=time.monotonic)

    def read(self) -> tuple[int, np.ndarray | None]:
        """(batches done, their logits); nothing, said aloud, where the file is damaged."""
        if self.path.exists():
            try:
                content = read_arrays(self.path, self.fingerprint)
                LOGGER.info("Inference continues after %d batches: %s", content["done"], self.path)
                return int(content["done"]), content["logits"]
            except CheckpointError as error:
                LOGGER.warning("Inference starts again: %s", error)
        return 0, None

    def save(self, done: int, logits: np.ndarray, now: bool = False) -> None:
        """Write what `done` batches gave, where the config's steps or minutes say so, or `now`."""
        late = time.monotonic() - self.written > 60 * self.config.save_every_minutes
        if now or late or done % self.config.save_every_steps == 0:
            write_arrays(self.path, self.fingerprint, done=np.array(done), logits=logits)
            self.written = time.monotonic()


def score_batch(session: Session, batch: Mapping):
    """Scores (answers, 4) on the device; in smaller parts, from here on, when memory runs out."""
    while True:
        size = session.inference_batch_limit or len(batch["prompts"])
        try:
            parts = split_batches(session, [batch], size)
            scores = [answer_scores(session, answer_hidden_states(session, part)) for part in parts]
            return torch.cat(scores)
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise out_of_memory_error(error) from error
        scores = None
        clear_memory(LOGGER)
        session.inference_batch_limit = math.ceil(size / 2)
        session.add_note(
            f"out of memory: inference goes on with {session.inference_batch_limit} questions per forward pass"
        )


def score_batches(session: Session, batches: Iterable[Mapping]) -> Iterator[np.ndarray]:
    """Scores (answers, 4) of each batch in prompt positions, handed over while the GPU is at the next batch."""
    waiting = deque()

    def receive() -> np.ndarray:
        scores, copied = waiting.popleft()
        if copied is not None:
            copied.synchronize()
        return scores.numpy()

    for batch in batches:
        scores = score_batch(session, batch).to("cpu", non_blocking=True)
        waiting.append(
            (
                scores,
                torch.cuda.current_stream().record_event()
                if session.device.type == "cuda"
                else None,
            )
        )
        if len(waiting) > 1:
            yield receive()
    while waiting:
        yield receive()


def group_views_by_prompt(
    session: Session, row: Mapping, views: Sequence[TTAView]
) -> list[list[TTAView]]:
    """The distinct views of a question, in one list those that one prompt shows."""
    groups = defaultdict(dict)
    for view in tta_views(
        row, views
    ):  # of views with the same grid and order the first; one prefix a grid
        budget = pixel_budget(session.config, session.processor, view.scale)
        grid = image_grid(row["width"], row["height"], session.processor, budget)
        groups[grid, None if session.shares_prefixes else view.order].setdefault(view.order, view)
    return [list(group.values()) for group in groups.values()]


def plan_prompts(
    session: Session, frame: pd.DataFrame, views: Sequence[TTAView], known: Sequence[TTAView] = ()
) -> list:
    """Pairs of a prompt and the numbers of its views: every row in all its distinct views but those `known`."""
    planned = []
    for row in range(len(frame)):
        for group in group_views_by_prompt(session, frame.iloc[row], views):
            if shown := [view for view in group if view not in known]:
                prompt = make_prompt(
                    session, frame, row, [view.order for view in shown], shown[0].scale
                )
                planned.append((prompt, [*map(views.index, shown)]))
    return planned


def predict_logits(
    session: Session,
    frame: pd.DataFrame,
    views: Sequence,
    label="inference",
    partial=None,
    known=(),
):
    """Scores (n, views, 4) of original a-d; -inf: blank choice, NaN: no such view; FloatingPointError names the row.

    Views that are `known` already stay NaN."""
    planned = plan_prompts(session, frame, views, known)
    size = session.config.infer_batch_size if session.config.use_batch_inference else 1
    by_length = np.argsort([-len(prompt.input_ids) for prompt, _ in planned], kind="stable")
    rank, processes = rank_and_world_size()
    batches = [by_length[start : start + size] for start in range(0, len(planned), size)]
    everyone, batches = (
        len(batches) // processes,
        batches[rank::processes],
    )  # so many each process has at least
    present = np.array([present_choices(row) for _, row in frame.iterrows()])
    first, result = (
        partial.read() if partial else (0, None)
    )  # a Partial: where an earlier process stopped
    result = (
        np.full((len(frame), len(views), 4), np.nan, dtype=np.float32) if result is None else result
    )
    was_training, start, scored = session.model.training, time.perf_counter(), 0.0
    session.model.eval()
    with torch.inference_mode():
        loader = iterate_batches(session, [prompt for prompt, _ in planned], batches[first:])
        for done, scores in enumerate(score_batches(session, loader), first + 1):
            shown = [planned[item] for item in batches[done - 1]]
            answers = [
                (prompt, order, view)
                for prompt, views_of in shown
                for order, view in zip(prompt.orders, views_of, strict=True)
            ]
            for (prompt, order, view), score in zip(answers, scores, strict=True):
                original = unpermute_scores(score, order)
                if not np.isfinite(original[present[prompt.row]]).all():
                    raise FloatingPointError(
                        f"Non-finite scores for row {frame['id'].iloc[prompt.row]}: {original}"
                    )
                result[prompt.row, view] = np.where(present[prompt.row], original, -np.inf)
            scored += scoring_cost(len(shown), len(answers))
            session.seconds_per_question = (time.perf_counter() - start) / scored
            if partial:
                partial.save(done, result)
            try:
                session.progress(label, done, len(batches), together=done <= everyone)
            except Interrupted:
                if partial:
                    partial.save(done, result, now=True)
                raise
    if partial:  # another pass may follow, and this one need not be done again
        partial.save(len(batches), result, now=True)
    session.model.train(was_training)
    return gather_scores(session, result) if processes > 1 else result


def gather_scores(session: Session, own: np.ndarray) -> np.ndarray:
    """The scores of all processes of a team: where one has a number, the others have NaN."""
    known = ~np.isnan(own)
    scores, count = (
        torch.from_numpy(values).to(session.device)
        for values in (np.where(known, own, 0.0), known * 1.0)
    )
    return np.where(all_reduce_sum(count).cpu() > 0, all_reduce_sum(scores).cpu(), np.nan).astype(
        np.float32
    )


def generate_baseline(
    session: Session, frame: pd.DataFrame, max_new_tokens: int = 4
) -> list[str | None]:
    """Greedy generation with a strict parser, the usual baseline: a letter, or None when the text is anything else."""
    session.model.get_output_embeddings().to(session.device)
    session.model.get_submodule(f"model.{VISION_PREFIX}").to(session.device)
    answers: list[str | None] = []
    for row in range(len(frame)):
        batch = collate(session, [make_prompt(session, frame, row, [(0, 1, 2, 3)])])
        inputs = {
            name: batch[name].to(session.device) for name in MODEL_INPUTS if name != "position_ids"
        }
        pixels = torch.cat([_load_pixels(session, prompt) for prompt in batch["prompts"]]).to(
            session.device
        )
        with torch.inference_mode():
            output = session.model.generate(
                **inputs, pixel_values=pixels, max_new_tokens=max_new_tokens, do_sample=False
            )
        text = session.processor.tokenizer.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        match = re.fullmatch(r"\s*\(?([a-d])\)?\.?\s*", text, re.IGNORECASE)
        answers.append(match.group(1).lower() if match else None)
    return answers


def prompt_tokens(session: Session, frame: pd.DataFrame) -> np.ndarray:
    """(n,) tokens of each row's prompt with the choices in their order, those of the image included."""
    order = tuple(range(len(CHOICES)))
    return np.array(
        [len(make_prompt(session, frame, row, [order]).input_ids) for row in range(len(frame))]
    )


def write_logits(
    path: Path, frame: pd.DataFrame, logits, view_names: Sequence, fingerprint: str, **more
) -> None:
    """Save logits in the run's schema: ids, logits (n, views, 4), view_names, labels (or -1) and the fingerprint.

    `more`: further arrays of what is known of each row."""
    labels = frame["label"].to_numpy(np.int64) if "label" in frame else np.full(len(frame), -1)
    content = {
        "ids": frame["id"].to_numpy(dtype=str),
        "logits": logits.astype(np.float32),
        "labels": labels,
    }
    write_arrays(path, fingerprint, **content, **more, view_names=np.array(view_names, dtype=str))


# === Rows in doubt ================================================================================
def letter_preference(first: np.ndarray, every: np.ndarray) -> np.ndarray:
    """(4,) how much more (n, 4) scores of the first views like each choice, on average, than those of all views."""
    known = np.isfinite(first)
    return np.subtract(first, every, out=np.zeros(first.shape), where=known).sum(
        axis=0
    ) / np.maximum(1, known.sum(0))


def answer_margins(scores: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """(n,) lead of each row's answer over its best rival, less the letters' preference; negative: the rival's."""
    answers, corrected = (np.arange(len(scores)), scores.argmax(axis=1)), scores - preference
    own = corrected[answers]
    corrected[answers] = -np.inf
    return own - corrected.max(axis=1)


def rows_in_doubt(margins: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """Sorted numbers of the rows of smallest margin that together cost at most `budget`, without those that cost 0."""
    order = np.argsort(margins, kind="stable")
    order = order[costs[order] > 0]
    return np.sort(order[np.cumsum(costs[order]) <= budget + 1e-9])


def pass_costs(
    session: Session, frame: pd.DataFrame, views: Sequence[TTAView], first: Sequence[TTAView]
) -> np.ndarray:
    """(n, 3) time of each row in the first views, in its others in a second pass, and in all of them in one pass."""
    costs = np.zeros((len(frame), 3))
    for row, groups in enumerate(
        group_views_by_prompt(session, record, views) for _, record in frame.iterrows()
    ):
        for size, known in ((len(group), sum(view in first for view in group)) for group in groups):
            costs[row] += [scoring_cost(count > 0, count) for count in (known, size - known, size)]
    return costs


def predict_in_doubt(
    session: Session, frame: pd.DataFrame, views: Sequence[TTAView], oof, label: str, partial
):
    """As predict_logits, but NaN in the last step's views except for the rows in doubt that `adaptive_tta` pays for.

    `oof`: (n, views, 4) logits of the fold's held-out rows, which show the letters' preference."""
    first, _ = split_views([view.name for view in views])
    shown, result = (
        [views[view] for view in first],
        np.full((len(frame), len(views), 4), np.nan, dtype=np.float32),
    )
    result[:, first] = predict_logits(session, frame, shown, label, partial)
    preference = letter_preference(combine_views(oof[:, first]), combine_views(oof))
    margins = answer_margins(combine_views(result[:, first]), preference)
    once, again, together = pass_costs(session, frame, views, shown).T
    rows = rows_in_doubt(margins, again, session.config.adaptive_tta * (together - once).sum())
    LOGGER.info("%s: %d of %d rows are in doubt and get more views", label, len(rows), len(frame))
    doubt = frame.iloc[rows].reset_index(drop=True)
    if len(doubt):
        if partial:  # a file of its own, which is good for these very rows only
            path = partial.path.with_name(partial.path.name.replace(".partial", ".doubt.partial"))
            fingerprint = f"{partial.fingerprint} {hashlib.sha256(rows.tobytes()).hexdigest()}"
            partial = dataclasses.replace(partial, path=path, fingerprint=fingerprint)
        more = predict_logits(session, doubt, views, f"{label}, in doubt", partial, known=shown)
        result[rows] = np.where(np.isnan(more), result[rows], more)
    return result


# === Early stopping and weight averages ===========================================================
class EarlyStopping:
    """Stop when the value has not improved by more than `min_delta` for `patience` calls: `if stopping(acc): break`."""

    def __init__(
        self,
        patience: int,
        mode: str = "max",
        min_delta: float = 0.0,
        logger: logging.Logger | None = None,
    ):
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', not {mode!r}")
        self.patience, self.min_delta, self.logger = patience, min_delta, logger
        self.sign = 1 if mode == "max" else -1
        self.best, self.waited = -self.sign * math.inf, 0

    def __call__(self, value: float) -> bool:
        if self.sign * (value - self.best) > self.min_delta:  # never true for NaN
            self.best, self.waited = float(value), 0
        else:
            self.waited += 1
        stop = self.waited >= self.patience
        if stop and self.logger is not None:
            self.logger.info(
                "Early stopping: no gain over %.4f for %d epochs", self.best, self.waited
            )
        return stop

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
        self.updates, self.average = 0, {}

    def update(self) -> None:
        if self.updates == 0:
            self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        else:
            tools = torch.optim.swa_utils
            # Less than `decay` at first, so that a short run does not keep its initial weights.
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            combine = (
                tools.get_ema_multi_avg_fn(decay)
                if self.kind == "ema"
                else tools.get_swa_multi_avg_fn()
            )
            combine(list(self.average.values()), list(self.parameters.values()), self.updates)
        self.updates += 1

    def state_dict(self) -> dict:
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: Mapping) -> None:
        self.updates, average = state["updates"], state["average"]
        # In the order of the parameters: the averages are combined list by list.
        self.average = {
            name: average[name].to(own.device)
            for name, own in self.parameters.items()
            if self.updates
        }


# === Epochs =======================================================================================
def padding_share(lengths: Sequence[int], batches: Iterable[Sequence[int]]) -> float:
    """Share of padded positions among all that batches of rows of these lengths hold."""
    batches = [[lengths[row] for row in batch] for batch in batches]
    held = sum(len(batch) * max(batch) for batch in batches)
    return (
        1 - sum(map(sum, batches)) / held if held else 0.0
    )  # a process of a team may have no row at all


def training_order(config: Config, epoch: int, sample_id: str) -> tuple[int, ...]:
    """The choice order in which one question is shown in one epoch, a function of (seed, epoch, sample id)."""
    shuffled = seeded_generator(config.seed, epoch, sample_id).permutation(4).tolist()
    return tuple(shuffled) if config.shuffle_choices else (0, 1, 2, 3)


def training_variant(config: Config, epoch: int, sample_id: str) -> tuple[int, int]:
    """Variant of the image and wording of the instruction of a question in one epoch: of (seed, epoch, sample id)."""
    generator = seeded_generator(config.seed, epoch, sample_id, "look")
    return int(generator.integers(config.augment_images + 1)), int(
        generator.integers(config.paraphrases)
    )


def plan_epoch(
    lengths: Sequence[int], step_size: int, seed_keys: Sequence, window: int = 8
) -> list[np.ndarray]:
    """Optimizer steps of row numbers: a seeded shuffle, every row once, the short tail kept.

    Within a window of some steps, rows of similar length share a step and stand in order, so that little is padded.
    """
    generator, steps = seeded_generator(*seed_keys), []
    shuffled = generator.permutation(len(lengths))
    for start in range(0, len(shuffled), step_size * window):
        rows = shuffled[start : start + step_size * window]
        rows = rows[np.argsort(np.asarray(lengths)[rows], kind="stable")]
        together = [rows[first : first + step_size] for first in range(0, len(rows), step_size)]
        steps += [together[number] for number in generator.permutation(len(together))]
    return steps


# === Fold training ================================================================================
@dataclass(frozen=True)
class FoldResult:
    """What a trained fold leaves behind: best epoch, learning curve and the weight kinds it offers."""

    fold: int
    best_epoch: int
    history: pd.DataFrame  # one row per epoch
    kinds: dict[str, dict]  # "raw", "ema", "swa" -> validation accuracy and nll
    adapters: dict[str, str]  # "raw", "ema", "swa" -> SHA-256 of its weights


def read_fold_result(run: Run, fold: int) -> FoldResult:
    """The result.json of a finished fold."""
    content = json.loads((run.fold_dir(fold) / "result.json").read_text(encoding="utf-8"))
    return FoldResult(**content | {"history": pd.DataFrame(content["history"])})


_NO_TIME = "because the rest of the time budget is needed for inference"


class FoldTrainer:
    """One fold's training: a fresh adapter, its optimizer and everything a checkpoint holds."""

    def __init__(self, session: Session, run: Run, fold: int):
        config = self.config = session.config
        self.session, self.run, self.fold = session, run, fold
        variants = image_variants(all_rows(run), config.augment_images, config.seed)
        self.variants = training_rows(run, fold, variants)  # all of one variant, then the next
        self.train = self.variants.query("variant == 0")
        self.validation = run.train[run.train["fold"] == fold].reset_index(drop=True)
        self.model = attach_lora(session.model, config, config.seed + fold)
        use_fast_layers(session, self.model, len(self.train) * config.num_epochs)
        self.parameters = trainable_parameters(self.model)
        weights = self.parameters.values()
        options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        self.optimizer = torch.optim.AdamW(weights, **options, fused=session.device.type == "cuda")
        self.step_size = config.batch_size * config.grad_accum_steps
        self.steps_per_epoch, self.epochs = (
            math.ceil(len(self.train) / self.step_size),
            config.num_epochs,
        )
        self.total_steps = self.steps_per_epoch * config.num_epochs
        warmup = round(self.total_steps * config.warmup_ratio)
        self.scheduler = transformers.get_cosine_schedule_with_warmup(
            self.optimizer, warmup, self.total_steps
        )
        self.scaler = torch.amp.GradScaler(
            session.device.type, enabled=session.runtime.precision == "fp16"
        )
        kinds = [
            kind for kind, use in {"ema": config.use_ema, "swa": config.use_swa}.items() if use
        ]
        self.averagers = {
            kind: WeightAverager(kind, self.parameters, config.ema_decay) for kind in kinds
        }
        patience, min_delta = config.early_stopping_patience, config.early_stopping_min_delta
        self.early_stopping = EarlyStopping(patience, min_delta=min_delta, logger=LOGGER)
        stateful = (
            "optimizer",
            "scheduler",
            "scaler",
            "early_stopping",
        )  # in a checkpoint, beside the weights
        self.parts = {name: getattr(self, name) for name in stateful} | self.averagers
        self.checkpoints = CheckpointManager(run.fold_dir(fold) / "checkpoints")
        self.metrics = MetricLogger(run.fold_dir(fold) / "metrics.jsonl")
        self.history, self.losses = [], []  # of the epochs, and of the steps of the current one
        self.best: dict = {"score": None, "epoch": -1, "tensors": {}}
        self.gradient_norm = math.nan  # of the last step, before clipping
        self.padding = 0.0  # share of padded positions in the current epoch
        self.skipped, self.next_step = (
            0,
            0,
        )  # steps without an update; the next one of the current epoch
        self.last_save = time.monotonic()

    def save(self, epoch: int, step: int) -> None:
        """Commit the state before optimizer step `step` of `epoch`."""
        # No random state is stored, because every draw is a function of (seed, epoch, sample id or step).
        state = {name: part.state_dict() for name, part in self.parts.items()} | {"best": self.best}
        metadata = {
            "epoch": epoch,
            "step_in_epoch": step,
            "fingerprint": self.run.fingerprint,
            "history": self.history,
        }
        metadata |= {"losses": self.losses, "skipped": self.skipped}
        metadata["plan"] = dataclasses.asdict(self.plan)
        self.checkpoints.save(epoch * self.steps_per_epoch + step, self.parameters, state, metadata)
        back_up(self.run, self.fold)
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
        self.best, self.history, self.losses = (
            state["best"],
            metadata["history"],
            metadata["losses"],
        )
        self.plan, self.skipped = MemoryPlan(**metadata["plan"]), metadata["skipped"]
        epoch, step = metadata["epoch"], metadata["step_in_epoch"]
        LOGGER.info("Fold %d continues at epoch %d, step %d", self.fold, epoch + 1, step)
        return epoch, step

    def fit(self) -> FoldResult:
        """Train from the newest checkpoint to the end and write adapters, validation logits and result.json."""
        epoch, step = self.resume()
        recompute_layers(self.session, self.plan.stored_layers)
        while epoch < self.epochs and self.early_stopping.waited < self.early_stopping.patience:
            try:
                speed = self.train_epoch(epoch, step)
                self.end_epoch(epoch, speed)
            except Interrupted:
                self.save(epoch, self.next_step)
                raise
            epoch, step = epoch + 1, 0
            if self.config.save_every_epoch or epoch == self.epochs:
                self.save(epoch, step)
            if epoch < self.epochs and any_process(self.time_is_up(speed)):
                self.session.add_note(
                    f"fold {self.fold}: training stopped after epoch {epoch}, {_NO_TIME}"
                )
                break
        return self.finish()

    @functools.cached_property
    def plan(self) -> MemoryPlan:
        """The checkpoint's, else the session's, measured by its first fold; halved when memory runs out."""
        if self.session.memory_plan is None:
            copies = 2 + len(self.averagers)  # AdamW's two moments
            state_bytes = copies * sum(value.nbytes for value in self.parameters.values())
            self.model.train()
            differ = (
                self.config.augment_images or self.config.paraphrases > 1
            )  # between epochs, in length
            epochs = range(self.config.num_epochs if differ else 1)
            prompts = [*itertools.chain.from_iterable(map(self.prompts, epochs))]
            self.session.memory_plan = plan_memory(self.session, prompts, state_bytes)
        return self.session.memory_plan

    def prompts(self, epoch: int) -> list[Prompt]:
        """Every training row as that epoch shows it: image, wording and choice order."""
        ids = self.train["id"]
        variant, wording = np.array(
            [training_variant(self.config, epoch, sample_id) for sample_id in ids]
        ).T
        frame = self.variants.iloc[variant * len(ids) + np.arange(len(ids))].assign(wording=wording)
        orders = [training_order(self.config, epoch, sample_id) for sample_id in ids]
        return [make_prompt(self.session, frame, row, [order]) for row, order in enumerate(orders)]

    def time_is_up(self, speed: float) -> bool:
        """Whether the time left is needed for inference; training `speed` in questions per second."""
        seconds = self.session.seconds_per_question or 1 / max(
            3 * speed, 1e-9
        )  # scoring is three times as fast
        return self.run.seconds_left() < inference_seconds(
            self.run, seconds, self.session, training=1
        )

    def train_epoch(self, epoch: int, first_step: int) -> float:
        """Optimizer steps `first_step`.. of one epoch (none, where only its validation is left); samples per second."""
        config = self.config
        self.model.train()
        prompts, size = self.prompts(epoch), self.plan.micro_batch
        lengths = [len(prompt.input_ids) for prompt in prompts]
        steps = plan_epoch(lengths, self.step_size, (config.seed, self.fold, epoch))
        rank, processes = (
            rank_and_world_size()
        )  # each takes every n-th row of a step, so that all have about the same lengths
        own_rows = [step[rank::processes] for step in steps]
        plan = [
            [rows[start : start + size] for start in range(0, len(rows), size)] for rows in own_rows
        ]
        self.padding = padding_share(lengths, itertools.chain.from_iterable(plan))
        batches = iterate_batches(
            self.session, prompts, [*itertools.chain.from_iterable(plan[first_step:])]
        )
        start, seen, speed, self.next_step = time.perf_counter(), 0, 0.0, first_step
        for step in range(first_step, len(plan)):
            own = itertools.islice(batches, len(plan[step]))
            self.losses.append(self.optimizer_step(epoch, step, own, steps[step]))
            self.next_step = step + 1
            seen += len(steps[step])
            speed = seen / (time.perf_counter() - start)
            due = time.monotonic() - self.last_save > config.save_every_minutes * 60
            if due or (epoch * len(plan) + step + 1) % config.save_every_steps == 0:
                self.save(epoch, step + 1)
            self.report(epoch, step, speed)
            settled = (
                self.session.seconds_per_question or step - first_step >= 20
            )  # the first steps are slow
            if step + 1 < len(plan) and any_process(bool(settled) and self.time_is_up(speed)):
                text = f"fold {self.fold}: training stopped in epoch {epoch + 1} after step {step + 1} of {len(plan)}"
                self.session.add_note(f"{text}, {_NO_TIME}")
                break
        return speed

    def optimizer_step(
        self, epoch: int, step: int, batches: Iterable[Mapping], rows: Sequence[int]
    ) -> float:
        """Update by the mean gradient; the mean loss, NaN for a skipped step, FloatingPointError for one too many."""
        total = all_reduce_sum(self.accumulate(epoch, step, batches, len(rows)))
        all_reduce_gradients(self.parameters.values())
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        total, norm = torch.stack([total, norm]).tolist()  # waits for the GPU
        self.gradient_norm = norm
        if math.isfinite(total) and math.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.after_step(epoch)
        elif not (
            math.isfinite(total) and self.scaler.is_enabled() and self.scaler.get_scale() > 1e-3
        ):
            ids = self.train["id"].iloc[rows].tolist()
            problem = (
                f"loss {total}, gradient norm {norm} at epoch {epoch + 1}, step {step}, rows {ids}"
            )
            self.session.add_note(f"fold {self.fold}: skipped a step: {problem}")
            self.skipped += 1
            if self.skipped > self.config.max_skipped_steps:
                remedy = "lower learning_rate, or set precision='fp32' where memory allows"
                raise FloatingPointError(
                    f"{self.skipped} steps were not finite, the last: {problem}; {remedy}"
                )
        self.scaler.update()  # lowers its scale after gradients that overflowed
        self.optimizer.zero_grad(set_to_none=True)
        return total if math.isfinite(norm) else math.nan

    def accumulate(self, epoch: int, step: int, batches: Iterable[Mapping], rows: int):
        """Add up the gradients of the mean loss over `rows` questions; returns it. Without memory, in smaller parts."""
        waiting, taken = iter(batches), []

        def all_batches():  # one by one, so that the next is prepared meanwhile; again from the first after a failure
            yield from tuple(taken)
            for batch in waiting:
                taken.append(batch)
                yield batch

        while True:
            # Dropout is a function of the step, so that a resumed run draws the same masks.
            torch.manual_seed(
                int(
                    seeded_generator(
                        self.config.seed,
                        self.fold,
                        epoch,
                        step,
                        f"dropout {rank_and_world_size()[0]}",
                    ).integers(2**31)
                )
            )
            total = torch.zeros((), device=self.session.device)
            self.scaler.scale(
                total
            )  # makes its scale, also in a process of a team that has no row of this step
            try:
                for batch in split_batches(self.session, all_batches(), self.plan.micro_batch):
                    states = answer_hidden_states(self.session, batch)
                    loss = training_loss(self.session, states, batch) * (
                        len(batch["prompts"]) / rows
                    )
                    self.scaler.scale(loss).backward()
                    total += loss.detach()
                return total
            except torch.OutOfMemoryError as error:
                recompute = self.config.gradient_checkpointing and self.plan.stored_layers > 0
                if self.plan.micro_batch == 1 and not recompute:
                    raise out_of_memory_error(error) from error
            states = loss = None  # they hold the activations
            self.optimizer.zero_grad(set_to_none=True)
            clear_memory(LOGGER)
            stored = 0 if recompute else self.plan.stored_layers
            self.session.memory_plan = self.plan = MemoryPlan(
                math.ceil(self.plan.micro_batch / 2), stored
            )
            recompute_layers(self.session, stored)
            text = f"fold {self.fold}: out of memory, {self.plan.micro_batch} questions per forward pass from here on"
            self.session.add_note(f"{text}; an optimizer step still takes {rows}")

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
        }
        details |= {
            "samples/s": round(speed, 1),
            "GiB": memory.get("gpu_peak_gib", memory["rss_gib"]),
        }
        self.metrics.log(
            epoch=epoch,
            step=step,
            gradient_norm=self.gradient_norm,
            **details | {"loss": self.losses[-1]},
        )
        done = epoch * self.steps_per_epoch + step + 1
        self.session.progress(
            f"fold {self.fold} training", done, self.total_steps, together=True, **details
        )

    def validate(self) -> tuple[np.ndarray, dict]:
        """Logits (n, 1, 4) of the held-out rows through the inference path, with accuracy and NLL."""
        label = f"fold {self.fold} validation"
        logits = predict_logits(self.session, self.validation, [TTAView("rotation 0")], label)
        probabilities = softmax(logits[:, 0])
        labels = self.validation["label"].to_numpy()
        diversity = prediction_diversity(probabilities, labels)
        if diversity["collapsed"]:
            letter = diversity["top_letter"]
            LOGGER.warning(
                "Fold %d: the model answers %r to almost everything: %s",
                self.fold,
                letter,
                diversity,
            )
        scores = {
            "accuracy": accuracy(probabilities, labels),
            "nll": negative_log_likelihood(probabilities, labels),
        }
        return logits, scores

    def end_epoch(self, epoch: int, speed: float) -> None:
        _, metrics = self.validate()
        score = (
            [metrics["accuracy"], -metrics["nll"]] if metrics else None
        )  # without held-out rows the last is best
        if self.best["score"] is None or score > self.best["score"]:
            tensors = {
                name: value.detach().cpu().clone() for name, value in self.parameters.items()
            }
            self.best = {"score": score, "epoch": epoch, "tensors": tensors}
        loss, self.losses = float(np.nanmean(self.losses)), []
        self.history.append(
            {"epoch": epoch + 1, "loss": loss, "samples_per_second": round(speed, 1), **metrics}
        )
        self.history[-1]["padding_share"] = round(self.padding, 3)
        write_table(pd.DataFrame(self.history), self.run.fold_dir(self.fold) / "history.csv")
        rounded = {name: round(value, 4) for name, value in self.history[-1].items()}
        LOGGER.info("Fold %d epoch %d: %s", self.fold, epoch + 1, rounded)
        if self.config.use_early_stopping and metrics:
            self.early_stopping(metrics["accuracy"])

    def finish(self) -> FoldResult:
        """Score each kind of weights once on the held-out rows and save its adapter in PEFT's format."""
        averages = {
            kind: averager.average for kind, averager in self.averagers.items() if averager.updates
        }
        folder, kinds, adapters = self.run.fold_dir(self.fold), {}, {}
        for kind, tensors in {"raw": self.best["tensors"], **averages}.items():
            with swapped_weights(self.parameters, tensors):
                logits, kinds[kind] = self.validate()
                self.model.save_pretrained(folder / f"adapter_{kind}")
            adapters[kind] = file_sha256(folder / f"adapter_{kind}" / "adapter_model.safetensors")
            path = folder / f"validation_{kind}.npz"
            write_logits(path, self.validation, logits, ["rotation 0"], self.run.fingerprint)
        result = {
            "fold": self.fold,
            "best_epoch": self.best["epoch"] + 1,
            "kinds": kinds,
            "history": self.history,
        }
        atomic_write(folder / "result.json", json.dumps(result | {"adapters": adapters}))
        LOGGER.info("Fold %d: best epoch %d, held-out %s", self.fold, result["best_epoch"], kinds)
        return read_fold_result(self.run, self.fold)


# ======= 6. Evidence ==============================================================================

# === Calibration ==================================================================================
# Columns are always the original choices a, b, c, d. In logits -inf marks a choice that is absent from the row, and a
# view of NaN only marks a view the row does not have. Labels are 0-3. Lists, arrays and torch tensors are all welcome.
TEMPERATURE_BOUNDS = (0.05, 20.0)


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
            raise ValueError(
                f"row {masked.argmax()} is labelled with a masked choice: drop the row or unmask it"
            )

        def loss(log_temperature):  # convex in 1/T: it has one valley
            return -special.log_softmax(logits / math.exp(log_temperature), axis=1)[
                rows, labels
            ].mean()

        low, high = np.log(TEMPERATURE_BOUNDS)
        best = minimize_scalar(
            loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6}
        ).x
        self.temperature = math.exp(best)
        if logger is not None:
            logger.info("temperature %.3f fitted on %d rows", self.temperature, len(labels))
        self.at_bound = (
            min(best - low, high - best) < 1e-3
        )  # the search never quite touches its ends
        if self.at_bound:
            advice = "temperature %.2g is at its bound: too few rows, or all right or wrong"
            (logger or LOGGER).warning(advice, self.temperature)
        return self

    def transform(self, logits) -> np.ndarray:
        """(n, choices) calibrated probabilities of (n, choices) or (n, views, choices) logits."""
        if self.temperature is None:
            raise ValueError("this TemperatureScaler is not fitted: call fit(logits, labels) first")
        return softmax(combine_views(logits) / self.temperature)


def shrink_temperatures(fold_temperatures, fold_sizes, pooled) -> np.ndarray:
    """(folds,) temperatures with log T pulled towards the pooled one, each fold keeping weight n / (n + 50)."""
    # One fold's T is noisy: standard deviation 0.36 at 50 rows, 0.20 at 200 in our simulation of a true T of 2.
    sizes = _as_array(fold_sizes)
    weight = sizes / (sizes + 50)
    return np.exp(weight * np.log(_as_array(fold_temperatures)) + (1 - weight) * math.log(pooled))


@dataclass(frozen=True)
class Calibration:
    """One temperature per fold for the test rows, and cross-fitted probabilities for the OOF rows."""

    temperatures: dict[int, float]
    probabilities: np.ndarray  # (n, 4), each row scaled by a temperature that was fitted without it


def fold_temperatures(
    scores: np.ndarray, labels: np.ndarray, folds: np.ndarray
) -> dict[int, float]:
    """Temperature of each fold, shrunk toward the pooled one (rows are few), which any other fold number gives."""
    pooled = TemperatureScaler().fit(scores, labels).temperature
    names, sizes = np.unique(folds, return_counts=True)
    own = [
        TemperatureScaler().fit(scores[folds == name], labels[folds == name]).temperature
        for name in names
    ]
    shrunk = shrink_temperatures(own, sizes, pooled).tolist()
    return defaultdict(lambda: pooled, zip(names.tolist(), shrunk, strict=True))


def calibrate(
    scores: np.ndarray, labels: np.ndarray, folds: np.ndarray, enabled: bool = True
) -> Calibration:
    """Temperature scaling of combined scores (n, 4); `enabled=False` keeps every temperature at 1."""
    if not enabled:
        ones = dict.fromkeys(np.unique(folds).tolist(), 1.0)
        return Calibration(defaultdict(lambda: 1.0, ones), softmax(scores))
    part, scale = np.arange(len(labels)) % 5, np.ones(len(labels))
    for inside in (part == number for number in np.unique(part)):
        fitted = fold_temperatures(scores[~inside], labels[~inside], folds[~inside])
        scale[inside] = [fitted[fold] for fold in folds[inside]]
    return Calibration(fold_temperatures(scores, labels, folds), softmax(scores / scale[:, None]))


# === Intervals and paired tests ===================================================================
RESAMPLES = 2000  # of the images, for an interval


def row_scores(probabilities, labels) -> np.ndarray:
    """(n, 2): whether the most probable choice is the label, and -log p(label); NaN where nothing was predicted."""
    chosen = probabilities[np.arange(len(labels)), labels]
    loss = -np.log(np.maximum(chosen, PROBABILITY_FLOOR))
    return np.column_stack(
        [np.where(np.isnan(loss), np.nan, probabilities.argmax(axis=1) == labels), loss]
    )


def image_groups(frame: pd.DataFrame) -> np.ndarray:
    """(n,) the number of each row's image: rows of one image are not independent. With one image, each row's own."""
    groups = pd.factorize(frame["pixel_hash"])[0]
    return (
        groups if groups.any() else np.arange(len(groups))
    )  # all grey, as a control, leaves nothing else to draw


def _group_draws(n_groups: int) -> np.ndarray:
    """(RESAMPLES, n_groups) how often each group is in each resample, drawn with replacement; always the same."""
    return np.random.default_rng(0).multinomial(
        n_groups, np.full(n_groups, 1 / n_groups), size=RESAMPLES
    )


def bootstrap_interval(changes, groups, fitted=1.0) -> np.ndarray:
    """(2, columns) 90 % percentile interval (Efron 1979) of the means of (n, columns) changes; NaN: not compared.

    Whole groups are drawn, because the rows of one image are not independent (Field and Welsh 2007). The interval is
    for what a step gains on average when it is fitted on so many rows (Bates, Hastie and Tibshirani 2023). `fitted`,
    of all columns or of each: how many numbers it fits to the labels.
    """
    # Two imaginary questions, one gains and one loses sqrt(1 / 2): Agresti and Min's (2005) half a row in each cell of
    # the paired table, without which the interval is a single point where few answers differ. A cross-fitted NLL with p
    # fitted numbers varies more than its rows show, because each row helps to fit for the others. The p / n^2 of
    # variance that sqrt(p / 2) adds is measured, not derived: without it the intervals of weights and stacks held the
    # true change in 3 to 5 points fewer of 192 simulated data sets each of 200 and 2,000 rows.
    imaginary = np.broadcast_to(np.sqrt(np.asarray(fitted) / 2), changes.shape[1:])
    changes = np.vstack([changes, imaginary, -imaginary])
    groups, known = np.concatenate([groups, groups.max() + [1, 2]]), np.isfinite(changes)
    sums, sizes = (
        pd.DataFrame(part).groupby(groups).sum().to_numpy()
        for part in (np.where(known, changes, 0), known)
    )
    draws = _group_draws(len(sums))
    means = draws @ sums / np.maximum(1, draws @ sizes)
    return np.quantile(means, [0.05, 0.95], axis=0)


def compare_paired(correct_a, correct_b) -> dict:
    """Is b better than a? Exact test (McNemar 1947) on two (n,) arrays of right or wrong; `wins`: only b is right."""
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"need the same rows twice, got shapes {a.shape} and {b.shape}")
    wins, losses = int((b & ~a).sum()), int((a & ~b).sum())
    p_value = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    return {
        "gain": (wins - losses) / max(1, len(a)),
        "wins": wins,
        "losses": losses,
        "p_value": float(p_value),
    }


# === Ensembles ====================================================================================
# Judge what is fitted here by cross_fit: on its own 200 rows a stack of ten models looks good, elsewhere it loses.
# In our simulation a stack that is fitted on 4/5 of the rows looks 0.35 standard errors worse than one fitted on all.
CROSS_FIT_PARTS = 20
STACK_FLOOR = 1e-3  # log(1e-12) for a masked choice would drown every other feature
GREEDY_ROUNDS = 20


def majority_vote(probabilities) -> np.ndarray:
    """(members, n, choices) probabilities -> (n,) labels; ties go to the higher mean probability, then the earlier."""
    probabilities = _as_probabilities(probabilities, ndim=3)
    votes = np.eye(probabilities.shape[2])[probabilities.argmax(axis=2)].sum(axis=0)
    mean = probabilities.mean(axis=0).round(
        12
    )  # rounded, or the order of summation would decide equal means
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
    result = minimize(
        loss_and_gradient, uniform, jac=True, method="SLSQP", options={"ftol": 1e-9}, **limits
    )
    if not result.success:
        (logger or LOGGER).warning(
            "ensemble weights are uniform: SLSQP did not converge: %s", result.message
        )
    weights = result.x.clip(min=0) if result.success else uniform
    return weights / weights.sum()


def greedy_weights(probabilities, labels) -> np.ndarray:
    """(members,) weights by forward selection with replacement on the NLL of the mean (Caruana et al. 2004, ICML)."""
    probabilities = _as_probabilities(probabilities, ndim=3)
    labels = _as_labels(labels, probabilities.shape)
    likelihood = probabilities[:, np.arange(len(labels)), labels]
    counts, total = np.zeros(len(likelihood)), np.zeros(len(labels))
    for size in range(1, GREEDY_ROUNDS + 1):
        losses = -np.log(np.maximum((total + likelihood) / size, PROBABILITY_FLOOR)).mean(axis=1)
        best = losses.argmin()
        counts[best] += 1
        total += likelihood[best]
    return counts / GREEDY_ROUNDS


def stack(probabilities, labels, strength=0.03) -> SimpleNamespace:
    """Stack (Wolpert 1992) on (members, n, choices) probabilities: `.predict_proba`; ValueError for unseen choices.

    `.fitted()`: its effective number of parameters, tr(S S) of a penalised fit (Hastie and Tibshirani 1990, 3.5)."""
    from sklearn.linear_model import (
        LogisticRegression,
    )  # importing sklearn draws from the global generator

    def features(members):  # log-probabilities side by side, (n, members * choices)
        return np.hstack(np.log(np.maximum(members, STACK_FLOOR)))

    def predict_proba(members):
        members = _as_probabilities(members, ndim=3)
        stacked = model.predict_proba(features(members)) * (members > 0).any(
            axis=0
        )  # masked in every member: stays 0
        return stacked / stacked.sum(axis=1, keepdims=True)

    def fitted():
        inputs = features(probabilities)
        predicted, inputs = (
            model.predict_proba(inputs),
            np.column_stack([inputs, np.ones(len(inputs))]),
        )
        spread = predicted[:, :, None] * (
            np.eye(predicted.shape[1]) - predicted[:, None]
        )  # (n, choices, choices)
        hessian = np.block(
            [[(inputs * pair[:, None]).T @ inputs for pair in pairs] for pairs in spread.T]
        )
        penalty = [
            np.full(inputs.shape[1] - 1, 1 / strength),
            [1e-6],
        ]  # none on the intercept, but nothing is singular
        shrunk = np.linalg.solve(
            hessian + np.diag(np.tile(np.concatenate(penalty), predicted.shape[1])), hessian
        )
        return float(np.trace(shrunk @ shrunk))

    probabilities = _as_probabilities(probabilities, ndim=3)
    labels = _as_labels(labels, probabilities.shape)
    unseen = set(range(probabilities.shape[2])) - set(labels.tolist())
    if unseen:
        raise ValueError(
            f"choices {sorted(unseen)} never occur in the labels: too few rows to stack, use the mean"
        )
    # sklearn's C is small on purpose: 0.03 was best in our simulations.
    model = LogisticRegression(C=strength, max_iter=2000).fit(features(probabilities), labels)
    return SimpleNamespace(predict_proba=predict_proba, fitted=fitted)


def cross_fit(fit_and_predict, probabilities, labels, folds) -> np.ndarray:
    """(n, choices) predictions of each fold by fit_and_predict(fit_inputs, fit_labels, predict_inputs) on the rest."""
    # Rows are on the last axis but one: (members, n, choices), or (n, choices) logits.
    inputs, folds = _as_array(probabilities), np.asarray(folds)
    labels = _as_labels(labels, inputs.shape)
    if folds.shape != labels.shape or len(np.unique(folds)) < 2:
        raise ValueError(
            f"need one fold number per row ({len(labels)}) and at least two folds, got {folds.shape}"
        )
    predictions = np.full(inputs.shape[-2:], np.nan)
    for held_out in (folds == fold for fold in np.unique(folds)):
        predictions[held_out] = fit_and_predict(
            inputs[..., ~held_out, :], labels[~held_out], inputs[..., held_out, :]
        )
    return predictions


BLENDS = {  # (members and labels to fit on, members) -> (n, choices)
    "mean": lambda old, known, new: average_probabilities(new),
    "geometric mean": lambda old, known, new: softmax(
        np.log(np.maximum(new, PROBABILITY_FLOOR)).mean(axis=0)
    ),
    "vote": lambda old, known, new: np.eye(new.shape[2])[majority_vote(new)],
    "weighted": lambda old, known, new: average_probabilities(
        new, optimize_ensemble_weights(old, known)
    ),
    "greedy": lambda old, known, new: average_probabilities(new, greedy_weights(old, known)),
    "stacked": lambda old, known, new: stack(old, known).predict_proba(new),
}


def fit_and_blend(name: str, old, known, new, scaling: bool = True) -> np.ndarray:
    """(n, choices) predictions for `new` members by a blend and its temperature, both fitted on `old` ones."""
    mixed = BLENDS[name](old, known, np.concatenate([old, new], axis=1))
    if name == "vote" or not scaling:  # a vote has no probabilities to scale
        return mixed[len(known) :]
    # A mean of honest probabilities is too timid: unscaled, a blend could win by its confidence, not its answers.
    scores = np.log(np.maximum(mixed, PROBABILITY_FLOOR))
    scaled = TemperatureScaler().fit(scores[: len(known)], known).transform(scores[len(known) :])
    scaled *= (new > 0).any(axis=0)  # a masked choice: the floor would give it a share
    return scaled / scaled.sum(axis=1, keepdims=True)


def count_fitted_parameters(name: str, members, labels) -> float:
    """How many numbers, beside its temperature, a blend fits: effective parameters, or weights above zero but one."""
    if name == "stacked":
        return stack(members, labels).fitted()
    fit = {"weighted": optimize_ensemble_weights, "greedy": greedy_weights}.get(name)
    return float((fit(members, labels) > 1e-6).sum() - 1) if fit else 0.0


def cross_fitted_blends(
    members, labels, groups, names: Iterable[str] = BLENDS, scaling=True
) -> dict[str, np.ndarray]:
    """Name -> (n, choices) predictions by that blend of (members, n, choices), fitted on the groups of other parts."""
    part = groups % CROSS_FIT_PARTS
    complete = all(
        len(np.unique(labels[part != number])) == members.shape[2] for number in np.unique(part)
    )
    names = [
        name for name in names if complete or name != "stacked"
    ]  # a stack has to see every letter
    fits = {name: functools.partial(fit_and_blend, name, scaling=scaling) for name in names}
    return {name: cross_fit(fit, members, labels, part) for name, fit in fits.items()}


# === Automatic choice =============================================================================
def _evidence_by_group(candidates: Mapping[str, np.ndarray], labels, groups) -> np.ndarray:
    """(groups, 6, candidates) sums from which `_choice` decides, of changes against the first candidate in each group:

    of accuracy, of NLL, of NLL squared, of NLL times the group's rows, its rows, and these squared."""
    scores = np.stack(
        [row_scores(probabilities, labels) for probabilities in candidates.values()], axis=2
    )
    changes = pd.DataFrame((scores - scores[:, :, :1]).reshape(len(labels), -1)).groupby(
        np.asarray(groups)
    )
    correct, nll = changes.sum().to_numpy().reshape(-1, *scores.shape[1:]).swapaxes(0, 1)
    sizes = np.broadcast_to(changes.size().to_numpy()[:, None], nll.shape)
    return np.stack([correct, nll, nll**2, nll * sizes, sizes, sizes**2], axis=1)


def _choice(evidence: np.ndarray) -> np.ndarray:
    """(...) the number of the candidate to use, from (..., 6, candidates) sums of `_evidence_by_group`."""
    correct, nll, squares, products, rows, squared_rows = np.moveaxis(evidence, -2, 0)
    rows = np.maximum(1, rows)  # a resample of few images may hold none of the others
    mean = nll / rows
    error = np.sqrt(np.maximum(0, squares - 2 * mean * products + mean**2 * squared_rows)) / rows
    return np.where((mean < -error) & (correct >= 0), mean, 0).argmin(axis=-1)


def choose_blend(candidates: Mapping[str, np.ndarray], labels, groups) -> str:
    """The first of the cross-fitted candidates, or the best that beats its NLL by more than one standard error.

    It must not lose accuracy either. The rule is Breiman's (1984) for trees. One wrong row spoils the NLL of a vote.
    """
    return list(candidates)[_choice(_evidence_by_group(candidates, labels, groups).sum(axis=0))]


def choose_cross_fitted(candidates: Mapping[str, np.ndarray], labels, groups) -> np.ndarray:
    """(n, choices) predictions of the automatic choice, which for each part of the groups is made by the other parts.

    What is chosen from stays as it is: cross-fitted once, with all parts but the row's own."""
    result = np.full_like(next(iter(candidates.values())), np.nan)
    part, evidence = groups % CROSS_FIT_PARTS, _evidence_by_group(candidates, labels, groups)
    part_of_evidence = np.unique(groups) % CROSS_FIT_PARTS
    for number in np.unique(part):
        chosen = _choice(evidence[part_of_evidence != number].sum(axis=0))
        result[part == number] = list(candidates.values())[chosen][part == number]
    return result


def choice_interval(
    candidates: Mapping[str, np.ndarray], labels, groups, fitted: Mapping[str, float]
) -> np.ndarray:
    """(2, 2) ends of the 90 % intervals of what `choose_cross_fitted` gains in accuracy and NLL on the first candidate.

    As `bootstrap_interval`, but each resample chooses anew: which candidate it would be is part of the uncertainty.
    Where none chooses another than the first, the gain is zero and known. `fitted`: by each candidate.
    """
    evidence, part = (
        _evidence_by_group(candidates, labels, groups),
        np.unique(groups) % CROSS_FIT_PARTS,
    )
    imaginary = np.sqrt(
        [[0.5, fitted[name] / 2] for name in candidates]
    )  # as in `bootstrap_interval`
    imaginary[0] = 0
    draws = _group_draws(len(evidence) + 2)
    drawn, signs = (
        draws[:, :-2],
        draws[:, -2:] @ [1, -1],
    )  # the last two are the imaginary questions
    sums = [
        np.tensordot(drawn[:, part == number], evidence[part == number], axes=1)
        for number in np.unique(part)
    ]
    gains, total = np.zeros((RESAMPLES, 2)), sum(sums)
    for inside in sums:
        chosen = _choice(total - inside)
        gains += inside[np.arange(RESAMPLES), :2, chosen] + imaginary[chosen] * signs[
            :, None
        ] / len(sums)
    return np.quantile(
        gains / (total[:, 4, :1] + draws[:, -2:].sum(axis=1, keepdims=True)), [0.05, 0.95], axis=0
    )


# === Out-of-fold rows =============================================================================
@dataclass(frozen=True)
class OofLogits:
    """Out-of-fold logits of every trained fold, in the row order of the training frame."""

    frame: pd.DataFrame
    logits: np.ndarray  # (n, views, 4)
    labels: np.ndarray  # (n,)
    folds: np.ndarray  # (n,)
    view_names: tuple[str, ...]
    tokens: np.ndarray | None = None  # (n,) of the prompts; None where an earlier version scored
    doubt_only_views: tuple[
        int, ...
    ] = ()  # views that were scored in a pass of their own, and only where the answer was in doubt

    @property
    def groups(self) -> np.ndarray:
        return image_groups(self.frame)

    def cost(self, views: Sequence[int]) -> float:
        """Mean time of scoring a row in those of the views that it has, in questions with one view."""
        exists, answers, prompts = ~np.isnan(self.logits).all(axis=2), 0.0, 0.0
        for late in (False, True):
            inside = [view for view in views if (view in self.doubt_only_views) == late]
            scales = [view for view in inside if self.view_names[view].startswith("scale")]
            rotations = [view for view in inside if view not in scales]  # they share a row's prefix
            prompts += (
                exists[:, rotations].any(axis=1).mean() + exists[:, scales].sum(axis=1).mean()
            )
            answers += exists[:, inside].sum(axis=1).mean()
        return float(scoring_cost(prompts, answers))


def align_rows(ids: pd.Series, parts: Sequence[Mapping[str, np.ndarray]], name: str) -> np.ndarray:
    """The array of that name in the order of these rows, from what was written for each fold."""
    known, values = (np.concatenate([part[each] for part in parts]) for each in ("ids", name))
    return values[pd.Index(known).get_indexer(ids)]


def read_scores(run: Run, fold: int, name: str) -> dict[str, np.ndarray]:
    """What `write_logits` wrote as `name` (oof or test); 16-bit views stand behind the others, where all have them."""
    content = read_arrays(run.fold_dir(fold) / f"{name}.npz", run.fingerprint)
    if run.is_rescored:
        more = read_arrays(run.fold_dir(fold) / f"{name}_16bit.npz", run.fingerprint)
        content["logits"] = np.concatenate([content["logits"], more["logits"]], axis=1)
        content["view_names"] = np.concatenate([content["view_names"], more["view_names"]])
    return content


def read_oof(run: Run) -> OofLogits:
    """The trained folds' oof.npz put together. Raises FileNotFoundError where no fold is trained, or one not scored."""
    waiting = [
        f"fold {fold} is trained, but not scored"
        for fold in run.unfinished_folds("predict", run.finished_folds)
    ]
    if waiting or not run.finished_folds:
        problem = ", ".join(waiting) or "no fold is trained"
        raise FileNotFoundError(
            f"{run.directory}: {problem}; run its notebook (or run_folds) again, which continues it"
        )
    parts = [read_scores(run, fold, "oof") for fold in run.finished_folds]
    ids = np.concatenate([part["ids"] for part in parts])
    frame = run.train[run.train["id"].isin(ids)].reset_index(drop=True)
    names = tuple(parts[0]["view_names"].tolist())
    tokens = (
        align_rows(frame["id"], parts, "tokens")
        if all("tokens" in part for part in parts)
        else None
    )
    labels, folds = frame["label"].to_numpy(), frame["fold"].to_numpy()
    return OofLogits(frame, align_rows(frame["id"], parts, "logits"), labels, folds, names, tokens)


def views_by_set(oof: OofLogits) -> dict[str, list[int]]:
    """`view_sets` of the views that any row has: questions that read text, for one, have no smaller scale."""
    known = np.flatnonzero(~np.isnan(oof.logits).all(axis=(0, 2))).tolist()
    sets = view_sets([oof.view_names[view] for view in known])
    return {name: [known[place] for place in places] for name, places in sets.items()}


def admit_views(
    oof: OofLogits, use_temperature_scaling: bool = True
) -> tuple[list[int], pd.DataFrame]:
    """The widest set of views that does not lose on OOF against the set admitted before it, and the comparison.

    It loses by a higher NLL, or by an accuracy that is lower beyond chance: the 90 % interval ends below zero."""
    admitted, best, rows = [], None, {}
    for name, views in views_by_set(oof).items():
        scores = combine_views(oof.logits[:, views])
        # Averaging views also softens probabilities, which is not a gain: hence after temperature scaling.
        probabilities = calibrate(
            scores, oof.labels, oof.folds, use_temperature_scaling
        ).probabilities
        own = row_scores(probabilities, oof.labels)
        wins = best is None
        if not wins:
            change = own - best
            wins = change[:, 1].mean() <= 0 and bootstrap_interval(change, oof.groups)[1, 0] >= 0
        rows[name] = {
            "cost": oof.cost(views),
            **score_row(probabilities, oof.labels),
            "admitted": bool(wins),
        }
        if wins:
            admitted, best = views, own
    return admitted, pd.DataFrame.from_dict(rows, orient="index").rename_axis("views")


# === Selected weights =============================================================================
def fold_table(results: Sequence[FoldResult]) -> pd.DataFrame:
    """Held-out accuracy and NLL of each fold and kind of weights, with mean and standard deviation."""
    scores = pd.json_normalize([result.kinds for result in results], sep=" ")
    scores.index = [str(result.fold) for result in results]
    table = pd.concat([scores, scores.agg(["mean", "std"]).rename({"std": "sd"})])
    table.insert(0, "best epoch", [*(str(result.best_epoch) for result in results), "", ""])
    return table.fillna("").rename_axis("fold")


def validation_scores(run: Run, ids: pd.Series, kinds: Sequence[str]) -> np.ndarray:
    """(n, 4) mean over kinds of weights of what each scored held-out rows in one view, when training ended."""
    files = [
        [run.fold_dir(fold) / f"validation_{kind}.npz" for fold in run.finished_folds]
        for kind in kinds
    ]
    parts = [[read_arrays(path, run.fingerprint) for path in paths] for paths in files]
    return np.mean([align_rows(ids, part, "logits")[:, 0] for part in parts], axis=0)


def is_mixing_better(run: Run, kinds: Sequence[str]) -> bool:
    """Whether the mean over all kinds of weights has a lower held-out NLL than each alone; scaled, as is submitted."""
    rows, losses = run.train[run.train["fold"].isin(run.finished_folds)], {}
    labels, folds = rows["label"].to_numpy(), rows["fold"].to_numpy()
    for way in ([*kinds], *([kind] for kind in kinds)):
        scores = validation_scores(run, rows["id"], way)
        calibration = calibrate(scores, labels, folds, run.config.use_temperature_scaling)
        losses["+".join(way)] = negative_log_likelihood(calibration.probabilities, labels)
    mixed, *alone = losses.values()
    LOGGER.info("Held-out NLL of the weights, mixed and alone: %s", losses)
    return mixed < min(alone)


def select_weights(run: Run) -> str:
    """Raw, EMA or SWA weights, or a mix: one decision for all folds, by pooled held-out NLL, kept in selection.json."""
    results = [read_fold_result(run, fold) for fold in run.finished_folds]
    rows = [(run.train["fold"] == result.fold).sum() for result in results]
    losses = pd.DataFrame(
        [{kind: scores["nll"] for kind, scores in result.kinds.items()} for result in results]
    )
    pooled = (
        losses.dropna(axis="columns").apply(np.average, weights=rows).to_dict()
    )  # the kinds that each fold has
    chosen = min(pooled, key=pooled.get)
    if run.config.mix_weights and len(pooled) > 1 and is_mixing_better(run, [*pooled]):
        chosen = "+".join(pooled)
    LOGGER.info("Decision: %s weights for all folds, held-out NLL %s", chosen, pooled)
    if run.selected_weights and "+".join(run.selected_weights) != chosen:  # a fold came later
        scores = itertools.product(
            [*run.finished_folds, run.final_fold], ("oof", "test", "oof_16bit", "test_16bit")
        )
        delete_outputs(run, [Path(f"fold_{fold}") / f"{name}.npz" for fold, name in scores])
    atomic_write(run.directory / "selection.json", json.dumps({"weights": chosen, "nll": pooled}))
    return chosen


# === Out-of-fold rows in doubt ====================================================================
def _share_with_any_view(logits: np.ndarray) -> float:
    """Share of the rows that have any of the views in (n, views, 4)."""
    return float((~np.isnan(logits).all(axis=(1, 2))).mean())


def simulate_views_in_doubt(oof: OofLogits, shares: Mapping[int, float]) -> OofLogits:
    """The OOF rows with the views they would have as test rows, if that share of each fold's rows were in doubt.

    Nothing is fitted to labels, and the letters' preference is measured on other rows than it is used for."""
    first, later = split_views(oof.view_names)
    logits, scores, every = (
        oof.logits.copy(),
        combine_views(oof.logits[:, first]),
        combine_views(oof.logits),
    )
    for fold, share in shares.items():
        inside = np.flatnonzero(oof.folds == fold)
        part, margins = np.arange(len(inside)) % 5, np.zeros(len(inside))
        for number in range(5):
            known, own = inside[part != number], part == number
            preference = letter_preference(scores[known], every[known])
            margins[own] = answer_margins(scores[inside[own]], preference)
        exists = ~np.isnan(logits[np.ix_(inside, later)]).all(axis=(1, 2))
        rows = rows_in_doubt(margins, exists.astype(float), share * len(inside))
        logits[np.ix_(np.delete(inside, rows), later)] = np.nan
    return dataclasses.replace(oof, logits=logits, doubt_only_views=tuple(later))


def with_test_time_views(run: Run, oof: OofLogits) -> OofLogits:
    """The OOF rows as `adaptive_tta` treats test rows, for all that is fitted on them; unchanged without it."""
    if run.config.adaptive_tta is None:
        return oof
    shares, (_, later) = {}, split_views(oof.view_names)
    for fold in run.finished_folds:
        logits = read_arrays(run.fold_dir(fold) / "test.npz", run.fingerprint)["logits"]
        shares[fold] = _share_with_any_view(logits[:, later])
    return simulate_views_in_doubt(oof, shares)


def adaptive_curve(run: Run) -> pd.DataFrame:
    """Accuracy and NLL on OOF rows by `adaptive_tta`: the share of the last step's cost that rows in doubt get.

    `rows`: share of the rows it pays for; `cost`: as in the ladder. Last line: all rows, in one pass. Temperatures are
    cross-fitted at each point."""
    oof, scaling, table = read_oof(run), run.config.use_temperature_scaling, {}
    names = [name for name in oof.view_names if not name.endswith(SUFFIX_16_BIT)]
    oof = dataclasses.replace(oof, logits=oof.logits[:, : len(names)], view_names=tuple(names))
    first, later = split_views(oof.view_names)
    every, folds = [*first, *later], np.unique(oof.folds).tolist()
    once, apart = (
        dataclasses.replace(oof, doubt_only_views=tuple(later)).cost(views)
        for views in (first, every)
    )
    for budget in np.arange(11) / 10 if apart > once else ():
        share = (
            budget
            * (oof.cost(every) - once)
            / (apart - once)
            * _share_with_any_view(oof.logits[:, later])
        )
        table[f"{budget:.1f}"] = simulate_views_in_doubt(oof, dict.fromkeys(folds, share))
    rows = {}
    for name, part in (table | {"all rows": oof}).items():
        rows[name] = {"rows": _share_with_any_view(part.logits[:, later]), "cost": part.cost(every)}
        calibration = calibrate(combine_views(part.logits), part.labels, part.folds, scaling)
        rows[name] |= score_row(calibration.probabilities, part.labels)
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("adaptive_tta")
    table.insert(2, "seconds", table["cost"].map(run.scoring_seconds))
    return table


# === Ladder =======================================================================================
STEP_FINAL_MODEL = "and a model on all rows, which no OOF row can judge"
VIEW_BLEND_STEPS = {
    "vote": "vote of views",
    "weighted": "weighted views",
    "stacked": "stacked views",
}  # blend -> step
STEP_ONE_VIEW = "fine-tuned, one view"  # a step of the ladder
STEP_AUTOMATIC = "automatic choice"  # likewise


@dataclass(frozen=True)
class LadderStep:
    """A row of the ladder."""

    probabilities: np.ndarray  # (n, 4), NaN where a row was not predicted
    against: str = ""  # the step to compare with
    views: Sequence[int] = (0,)  # that it takes
    used: bool = False  # whether the submission is made of it
    fitted: float = 0.0  # numbers, as in `bootstrap_interval`
    kinds: int = 1  # of weights that score for it, where they are not the selected ones


def ladder_table(steps: Mapping[str, LadderStep], labels, groups) -> pd.DataFrame:
    """Scores of each step, and the paired changes against another with 90 % intervals.

    A row of NaN was not predicted and is not compared. The intervals respect `groups`; McNemar's p_value does not.
    """
    scores = {name: row_scores(step.probabilities, labels) for name, step in steps.items()}
    changes = {
        name: scores[name] - scores[step.against] for name, step in steps.items() if step.against
    }
    fitted = np.ravel(
        [(1, steps[name].fitted) for name in changes]
    )  # of accuracy, which no fit aims at, and NLL
    ends = bootstrap_interval(np.hstack(list(changes.values())), groups, fitted).reshape(2, -1, 2)
    rows = {name: {"against": step.against, "used": step.used} for name, step in steps.items()}
    for name, step in steps.items():
        rows[name] |= (
            {} if np.isnan(step.probabilities).any() else score_row(step.probabilities, labels)
        )
    for (name, change), low, high in zip(changes.items(), *ends, strict=True):
        shared = np.isfinite(change[:, 0])
        if not shared.any():
            continue  # a zero-shot sample without a row of the trained folds
        rows[name] |= compare_paired(
            *(scores[each][shared, 0] for each in (steps[name].against, name))
        )
        rows[name] |= {
            "gain_low": low[0],
            "gain_high": high[0],
            "nll_low": low[1],
            "nll_high": high[1],
        }
        rows[name]["nll_change"] = change[shared, 1].mean()
    columns = [
        "accuracy",
        "nll",
        "brier",
        "ece",
        "against",
        "gain",
        "gain_low",
        "gain_high",
        "p_value",
        "nll_change",
    ]
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("step")
    table = table.reindex(columns=[*columns, "nll_low", "nll_high", "used"])
    votes = table.index.isin(["vote", VIEW_BLEND_STEPS["vote"]])  # a vote has no probabilities
    table.loc[votes, ["nll", "brier", "ece", "nll_change", "nll_low", "nll_high"]] = math.nan
    return table


def set_choice_interval(
    table: pd.DataFrame, candidates: Mapping[str, np.ndarray], labels, groups, fitted
) -> None:
    """Put the interval that knows of the choosing into the ladder's row of the automatic choice."""
    ends = choice_interval(candidates, labels, groups, fitted)
    table.loc[STEP_AUTOMATIC, ["gain_low", "gain_high", "nll_low", "nll_high"]] = ends.T.ravel()


def weight_ladder_steps(run: Run, oof: OofLogits) -> dict[str, LadderStep]:
    """The kinds of weights (raw, EMA, SWA), or all of them, that were not selected, in one view, against what was."""
    files = (
        {path.stem for path in run.fold_dir(fold).glob("validation_*.npz")}
        for fold in run.finished_folds
    )
    kinds = sorted(name.removeprefix("validation_") for name in set.intersection(*files))
    ways = {f"with {kind if kind == 'raw' else kind.upper()} weights": [kind] for kind in kinds}
    ways |= (
        {"with all kinds of weights": kinds} if run.config.mix_weights and len(kinds) > 1 else {}
    )
    others = {label: way for label, way in ways.items() if {*way} != {*run.selected_weights}}
    steps = {}
    for label, way in others.items():
        scores = validation_scores(run, oof.frame["id"], way)
        steps[label] = LadderStep(softmax(scores), STEP_ONE_VIEW, kinds=len(way))
    return steps


def build_ladder(run: Run, oof: OofLogits, steps: Mapping[str, LadderStep]) -> pd.DataFrame:
    """What each step is worth on OOF rows against the step named in `against`.

    `cost`: of scoring a row, in questions with one view and one kind of weights; `seconds`: of a device with the test
    rows and all models, at the speed of the last scoring."""
    base = read_arrays(run.directory / "zeroshot.npz", run.fingerprint)
    zeroshot = pd.DataFrame(softmax(base["logits"][:, 0]), index=base["ids"])
    first = {
        "zero-shot": LadderStep(zeroshot.reindex(oof.frame["id"]).to_numpy())
    }  # NaN where it scored no row
    others = first | weight_ladder_steps(run, oof)
    steps = first | {STEP_ONE_VIEW: steps[STEP_ONE_VIEW]} | others | steps
    ladder = ladder_table(steps, oof.labels, oof.groups)
    scores = score_row(zeroshot.to_numpy(), base["labels"])
    ladder.loc["zero-shot", list(scores)] = scores
    selected = max(1, len(run.selected_weights))
    kinds = [step.kinds if name in others else selected for name, step in steps.items()]
    ladder.insert(
        4,
        "cost",
        [oof.cost(step.views) * count for step, count in zip(steps.values(), kinds, strict=True)],
    )
    ladder.insert(5, "seconds", ladder["cost"].map(run.scoring_seconds))
    ladder.loc["zero-shot", "seconds"] /= len(run.submission_models)  # it is one model
    return ladder


def _view_members(logits: np.ndarray, views: Sequence[int]) -> np.ndarray:
    """Probabilities (views, n, 4) of the admitted views; a view that a row lacks stands in as the row's mean."""
    scores = logits[:, list(views)]
    return softmax(np.where(np.isnan(scores), combine_views(scores)[:, None], scores)).swapaxes(
        0, 1
    )


def view_ladder_steps(
    oof: OofLogits, admitted: pd.Series, views: list[int], averaged: bool
) -> dict[str, LadderStep]:
    """A step for every set of views, the losers too; `averaged`: the submission has the mean over `views`."""
    steps, against = {}, "zero-shot"
    for name, own in views_by_set(oof).items():
        count = f"up to {len(own)}" if {*own} & {*oof.doubt_only_views} else len(own)
        step = (
            "one view" if len(own) == 1 else f"mean of {count} views"
        ) + SUFFIX_16_BIT * name.endswith(SUFFIX_16_BIT)
        step = step if steps else STEP_ONE_VIEW
        used = admitted[name] and {*own} <= {*views} and (averaged or len(own) == 1)
        steps[step] = LadderStep(
            softmax(combine_views(oof.logits[:, own])), against, own, bool(used)
        )
        against = step if admitted[name] else against
    return steps


# === Evaluation ===================================================================================
@dataclass(frozen=True)
class Evaluation:
    """Every decision taken on OOF, and the OOF probabilities behind it."""

    oof: OofLogits
    views: list[int]  # admitted views
    view_table: pd.DataFrame
    calibration: Calibration
    method: str  # how the submission combines views, a key of VIEW_BLENDS or "mean"
    probabilities: (
        np.ndarray
    )  # (n, 4) cross-fitted, of that method; with "auto" the choice is made without the row
    ladder: pd.DataFrame
    fold_table: pd.DataFrame


def temperature_table(
    oof: OofLogits, scores: np.ndarray, temperatures: Mapping[int, float]
) -> pd.DataFrame:
    """Each fold's scores before its temperature; `at_bound`: its rows alone asked for one beyond TEMPERATURE_BOUNDS."""
    rows = {}
    for fold, temperature in temperatures.items():
        inside = oof.folds == fold
        rows[fold] = {
            "rows": int(inside.sum()),
            **score_row(softmax(scores[inside]), oof.labels[inside]),
        }
        at_bound = TemperatureScaler().fit(scores[inside], oof.labels[inside]).at_bound
        rows[fold] |= {"temperature": temperature, "at_bound": at_bound}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("fold")


def evaluate_run(run: Run) -> Evaluation:
    """Admit views, temperature and the way to combine views, and build the ladder, all from saved OOF logits."""
    oof, scaling, method = (
        with_test_time_views(run, read_oof(run)),
        run.config.use_temperature_scaling,
        run.config.ensemble_method,
    )
    labels, groups = oof.labels, oof.groups
    views, view_table = admit_views(oof, scaling)
    scores = combine_views(oof.logits[:, views])
    scaled, plain = (calibrate(scores, labels, oof.folds, enabled) for enabled in (scaling, False))
    calibration = min(
        plain, scaled, key=lambda each: negative_log_likelihood(each.probabilities, labels)
    )
    ways, members = {"mean": calibration.probabilities}, _view_members(oof.logits, views)
    if len(views) > 1:
        ways |= cross_fitted_blends(members, labels, groups, VIEW_BLEND_STEPS, scaling)
    auto = method == "auto"
    choices = {name: own for name, own in ways.items() if name != "vote"}  # folds vote, not views
    method = choose_blend(choices, labels, groups) if auto else method
    method = method if method in choices else "mean"
    expected = choose_cross_fitted(choices, labels, groups) if auto else ways[method]
    steps = view_ladder_steps(oof, view_table["admitted"], views, averaged=method == "mean")
    end = next(name for name, step in steps.items() if step.views == views)
    if scaling:
        is_used = method == "mean" and calibration is scaled
        steps["temperature"] = LadderStep(scaled.probabilities, end, views, is_used, fitted=1)
        end = "temperature" if calibration is scaled else end
    fitted = {name: count_fitted_parameters(name, members, labels) for name in ways}
    for name in list(ways)[1:]:  # all but the mean
        steps[VIEW_BLEND_STEPS[name]] = LadderStep(
            ways[name], end, views, name == method, fitted[name]
        )
    if auto and len(ways) > 1:
        steps[STEP_AUTOMATIC] = LadderStep(expected, end, views, used=True)
    if run.final_fold in run.submission_models:
        steps[STEP_FINAL_MODEL] = LadderStep(
            np.full((len(labels), 4), math.nan), views=views, used=True
        )
    ladder = build_ladder(run, oof, steps)
    if STEP_AUTOMATIC in steps:
        set_choice_interval(ladder, choices, labels, groups, fitted)
    folds = temperature_table(oof, scores, calibration.temperatures)
    return Evaluation(oof, views, view_table, calibration, method, expected, ladder, folds)


# === Test answers =================================================================================
def predict_test(run: Run, evaluation: Evaluation) -> dict[int, np.ndarray]:
    """Model -> test probabilities (n, 4) with the admitted views and the fold's temperature (final model: pooled)."""
    result = {}
    for fold in run.submission_models:
        logits = read_scores(run, fold, "test")["logits"]
        if evaluation.method in VIEW_BLEND_STEPS:
            old, new = (
                _view_members(each, evaluation.views) for each in (evaluation.oof.logits, logits)
            )
            scaling = run.config.use_temperature_scaling
            result[fold] = fit_and_blend(
                evaluation.method, old, evaluation.oof.labels, new, scaling
            )
        else:
            scores = combine_views(logits[:, evaluation.views])
            result[fold] = softmax(scores / evaluation.calibration.temperatures[fold])
    return result


def best_fold(evaluation: Evaluation) -> int:
    """The fold with the highest OOF accuracy, then the lowest NLL; the test rows play no part."""
    return int(
        evaluation.fold_table.sort_values(["accuracy", "nll"], ascending=[False, True]).index[0]
    )


def combine_models(run: Run, members: np.ndarray) -> np.ndarray:
    """(n,) answers of the ensemble from the models' (members, n, 4) test probabilities."""
    return (
        majority_vote(members)
        if run.config.ensemble_method == "vote"
        else members.mean(axis=0).argmax(axis=1)
    )


# === Errors =======================================================================================
def label_suspects(probabilities, labels) -> pd.DataFrame:
    """Rows (of out-of-fold probabilities (n, 4)) whose label is probably wrong, the likeliest first.

    Confident learning (Northcutt et al. 2021): another choice is as probable as it usually is where it is the label."""
    probabilities = _as_probabilities(probabilities)
    labels, rows = _as_labels(labels, probabilities.shape), np.arange(len(probabilities))
    own = probabilities[rows, labels]
    usual = (
        pd.Series(own)
        .groupby(labels)
        .mean()
        .reindex(range(probabilities.shape[1]), fill_value=1.0)
        .to_numpy()
    )
    sure = probabilities >= usual
    likely = np.where(sure.any(axis=1), np.where(sure, probabilities, -1.0).argmax(axis=1), labels)
    table = pd.DataFrame(
        {
            "row": rows,
            "label": labels,
            "likely": likely,
            "margin": probabilities[rows, likely] - own,
        }
    )
    return table[(likely != labels) & (table["margin"] > 0)].sort_values(
        "margin", ascending=False, kind="stable"
    )


def accuracy_by_type(types: Sequence[str], correct: np.ndarray) -> pd.DataFrame:
    """Rows and accuracy of each question type, the weakest first."""
    grouped = pd.DataFrame({"type": list(types), "correct": correct}).groupby("type")["correct"]
    return grouped.agg(rows="size", accuracy="mean").sort_values("accuracy")


def accuracy_by_group(frame: pd.DataFrame, correct: np.ndarray) -> pd.DataFrame:
    """Rows and accuracy by what a row looks like: type, answer's letter, lengths, image size, copies of its image.

    `frame`: training rows with the columns `image_group` (near copies share a number) and `tokens` (None: unknown)."""
    choices = frame[list(CHOICES)].map(len)
    choices = choices.where(choices > 0)  # a choice that is not there is not the shortest
    least, most = choices.min(axis=1), choices.max(axis=1)
    lengths = {
        "question, characters": frame["question"].map(len),
        "longest choice, characters": most.astype(int),
    }
    lengths |= {
        "image, pixels": frame["width"] * frame["height"],
        "prompt, tokens": frame["tokens"],
    }
    lengths = {name: values for name, values in lengths.items() if values.notna().all()}
    groups = {"question type": frame["type"], "answer": frame["answer"]}
    for name, values in lengths.items():
        edges = np.unique(values.quantile([0.25, 0.5, 0.75], interpolation="lower"))
        quarters = values.groupby(np.searchsorted(edges, values))
        ends = zip(quarters.transform("min"), quarters.transform("max"), strict=True)
        groups[name] = [f"{low} to {high}" if low < high else f"{low}" for low, high in ends]
    own = choices.to_numpy()[np.arange(len(frame)), frame["label"]]
    cases = [least == most, own == most, own == least]
    groups["answer's length"] = np.select(cases, ["all equal", "longest", "shortest"], "between")
    copies = frame.groupby("pixel_hash")["id"].transform("size")
    near = frame.groupby("image_group")["pixel_hash"].transform("nunique")
    cases = [near > 1, copies > 1]
    groups["image"] = np.select(
        cases, ["has a near copy", "in several questions"], "in one question"
    )
    tables = {name: accuracy_by_type(list(values), correct) for name, values in groups.items()}
    return pd.concat(tables, names=["by", "group"])


def uncertain_rows(run: Run, evaluation: Evaluation) -> pd.DataFrame:
    """Test rows by what a human look is worth: folds that do not share the ensemble's answer, then small margins.

    `margin`: of the answer's mean probability over its likeliest rival's, which a majority vote may have put second."""
    members = np.stack(list(predict_test(run, evaluation).values()))
    answers, rows, rivals = (
        combine_models(run, members),
        np.arange(len(run.test)),
        members.mean(axis=0),
    )
    own = rivals[rows, answers]
    rivals[rows, answers] = -1
    table = run.test[["id", "type", "question", *CHOICES]].assign(
        predicted=np.array(CHOICES)[answers]
    )
    table["folds_for_it"] = (members.argmax(axis=2) == answers).mean(axis=0).round(3)
    table["second"] = np.array(CHOICES)[rivals.argmax(axis=1)]
    table["margin"] = (own - rivals.max(axis=1)).round(4)
    table["chance_wrong"] = (1 - own).round(4)
    return table.sort_values(["folds_for_it", "margin"], kind="stable", ignore_index=True)


def active_list(suspects: pd.DataFrame, uncertain: pd.DataFrame) -> pd.DataFrame:
    """Training and test rows worth a human look, by the model's probability that the answer they have is wrong.

    Of the test rows those above the average; `other` is the likeliest other choice."""
    train = suspects.assign(rows="train", reason="label probably wrong").rename(
        columns={"likely": "other"}
    )
    test = uncertain[uncertain["chance_wrong"] > uncertain["chance_wrong"].mean()]
    test = test.assign(
        rows="test", reason=np.where(test["folds_for_it"] < 1, "folds disagree", "small margin")
    )
    test = test.rename(columns={"predicted": "answer", "second": "other"})
    columns = ["rows", "id", "reason", "chance_wrong", "answer", "other", "question", *CHOICES]
    table = pd.concat([train[columns], test[columns]])
    return table.sort_values("chance_wrong", ascending=False, kind="stable", ignore_index=True)


def reliability_by_type(
    types: Sequence[str], probabilities: np.ndarray, labels: np.ndarray
) -> pd.DataFrame:
    """Mean confidence and `calibration_row` of each question type; confidence furthest from accuracy comes first."""
    types, rows = np.asarray(types), {}
    for name in np.unique(types):
        inside = types == name
        own, answers = probabilities[inside], labels[inside]
        rows[name] = {
            "rows": int(inside.sum()),
            "confidence": own.max(axis=1).mean(),
            **calibration_row(own, answers),
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("type")
    gap = (table["confidence"] - table["accuracy"]).abs()
    return table.loc[gap.sort_values(ascending=False, kind="stable").index]


def confusion_table(labels: np.ndarray, predicted: np.ndarray) -> pd.DataFrame:
    """Counts (4, 4): rows the true letter, columns the predicted one."""
    counts = np.bincount(4 * labels + predicted, minlength=16).reshape(4, 4)
    return pd.DataFrame(
        counts, index=pd.Index(CHOICES, name="true"), columns=pd.Index(CHOICES, name="predicted")
    )


def wrong_answers(evaluation: Evaluation) -> pd.DataFrame:
    """The OOF rows that are answered wrongly, the surest first; `confidence`: probability of `predicted`."""
    predicted, confidence = (
        evaluation.probabilities.argmax(axis=1),
        evaluation.probabilities.max(axis=1).round(4),
    )
    frame = evaluation.oof.frame.assign(
        predicted=np.array(CHOICES)[predicted], confidence=confidence
    )
    wrong = frame[predicted != evaluation.oof.labels]
    return wrong.sort_values("confidence", ascending=False, kind="stable", ignore_index=True)


def most_confident_mistakes(evaluation: Evaluation) -> tuple[pd.DataFrame, list[str]]:
    """The six of the mistakes that the model was surest of, and a note for each."""
    frame = wrong_answers(evaluation).head(6)
    pairs = zip(frame["predicted"], frame["confidence"], strict=True)
    return frame, [
        f"predicted {letter} with probability {confidence:.2f}" for letter, confidence in pairs
    ]


def write_error_tables(
    run: Run, evaluation: Evaluation, image_group: Sequence[int]
) -> dict[str, pd.DataFrame]:
    """Every table of the error analysis by name; each is also tables/<name>.csv in the run directory.

    `image_group`: of each training row, as `leakage_report` numbers them."""
    oof, probabilities = evaluation.oof, evaluation.probabilities
    groups = pd.Series(np.asarray(image_group), index=run.train["id"])
    frame = oof.frame.assign(tokens=oof.tokens, image_group=oof.frame["id"].map(groups))
    suspects = label_suspects(probabilities, oof.labels)
    shown = oof.frame.iloc[suspects["row"]][["id", "question", *CHOICES, "answer"]].reset_index(
        drop=True
    )
    shown["likely"] = np.array(CHOICES)[suspects["likely"]]
    shown["margin"] = suspects["margin"].round(4).to_numpy()
    shown["chance_wrong"] = (1 - probabilities[suspects["row"], suspects["label"]]).round(4)
    uncertain = uncertain_rows(run, evaluation)
    tables = {
        "accuracy_by_group": accuracy_by_group(frame, probabilities.argmax(axis=1) == oof.labels),
        "reliability_by_type": reliability_by_type(oof.frame["type"], probabilities, oof.labels),
        "label_suspects": shown,
        "uncertain_rows": uncertain,
        "active_list": active_list(shown, uncertain),
        "confusion": confusion_table(oof.labels, probabilities.argmax(axis=1)),
        "mistakes": wrong_answers(evaluation)[
            ["id", "type", "question", *CHOICES, "answer", "predicted", "confidence"]
        ],
    }
    for name, table in tables.items():
        shown = table.reset_index() if any(table.index.names) else table
        write_table(shown, run.directory / "tables" / f"{name}.csv")
    return tables


# === Figures ======================================================================================
BLUE = "#3b6ea5"
ORANGE = "#d9822b"
GREY = "#8a8f98"
matplotlib_figure = _LazyModule("matplotlib.figure")


def _axes(ax, title: str, xlabel: str, ylabel: str, figsize=(6, 3.2), **settings):
    """Given axes, or new ones, with title and labels set: figures carry type names only, Korean text is HTML."""
    ax = ax or matplotlib_figure.Figure(figsize=figsize, layout="constrained").subplots()
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel, **settings)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _accuracy_bars(ax, title: str, accuracies: pd.Series, figsize=(6, 3.2), **label):
    ax = _axes(ax, title, "accuracy", "", figsize, xlim=(0, 1.08))
    ax.bar_label(
        ax.barh(accuracies.index, accuracies, color=BLUE),
        fmt="%.3f",
        fontsize=9,
        **{"padding": 3} | label,
    )
    return ax


def plot_counts(counts: pd.Series, title: str, ax=None):
    """Bars of counts, each with its number."""
    ax = _axes(ax, title, "", "rows", ymargin=0.15)
    ax.bar_label(
        ax.bar([str(name) for name in counts.index], counts, color=BLUE), padding=2, fontsize=9
    )
    return ax


def plot_token_counts(tokens: Mapping[str, Sequence[int]], limit: int, ax=None):
    """Histogram of image tokens per split; the dashed line is the configured pixel budget."""
    ax = _axes(ax, "Image tokens within the pixel budget", "merged patches per image", "images")
    top = max(map(max, tokens.values()))
    for (name, values), colour in zip(tokens.items(), (BLUE, ORANGE), strict=False):
        ax.hist(
            values, bins=min(39, top + 1), range=(0, top + 1), alpha=0.6, label=name, color=colour
        )
    if limit <= 2 * top:
        ax.axvline(limit, linestyle="--", color=GREY)
    ax.legend(title=f"budget: {limit} patches", frameon=False)
    return ax


def plot_learning_curves(results: Sequence[FoldResult], axes=None):
    """Training loss and held-out accuracy by epoch, one line per fold; a ring marks the epoch that was kept."""
    if axes is None:
        axes = matplotlib_figure.Figure(figsize=(9, 3.2), layout="constrained").subplots(1, 2)
    for ax, title, column in zip(
        axes, ("Training loss", "Held-out accuracy"), ("loss", "accuracy"), strict=True
    ):
        _axes(ax, title, "epoch", column)
        for result in results:
            curve = result.history.set_index("epoch")[column]
            (line,) = ax.plot(curve, marker=".", label=f"fold {result.fold}")
            ax.plot(
                curve.loc[[result.best_epoch]],
                "o",
                markersize=11,
                fillstyle="none",
                color=line.get_color(),
            )
    ax.legend(frameon=False)
    return axes


def plot_reliability(curves: Mapping[str, pd.DataFrame], ax=None):
    """Accuracy against confidence per bin; on the diagonal the probabilities mean what they say."""
    ax = _axes(
        ax,
        "Reliability on OOF rows",
        "confidence",
        "accuracy",
        (4.2, 3.8),
        xlim=(0.2, 1.02),
        ylim=(0, 1.05),
    )
    ax.plot([0, 1], [0, 1], linestyle="--", color=GREY)
    for (name, curve), colour in zip(curves.items(), (ORANGE, BLUE), strict=False):
        ax.plot(curve["confidence"], curve["accuracy"], marker="o", label=name, color=colour)
    ax.legend(frameon=False)
    return ax


def plot_ladder(ladder: pd.DataFrame, ax=None):
    """Bars of the OOF accuracy of every step, the first on top; lines: 90 % interval of its change against another."""
    rows = ladder.iloc[::-1]
    inside = {
        "label_type": "center",
        "color": "white",
    }  # the line would strike a number at the end of the bar through
    size = (7, 1.2 + 0.24 * len(rows))
    ax = _accuracy_bars(ax, "OOF accuracy, step by step", rows["accuracy"], size, **inside)
    known = rows.dropna(subset=["accuracy", "gain"])
    ends = (known["gain"] - known["gain_low"], known["gain_high"] - known["gain"])
    ax.errorbar(
        known["accuracy"],
        known.index,
        xerr=np.maximum(0, ends),
        fmt="none",
        ecolor=ORANGE,
        capsize=2,
    )
    return ax


def plot_adaptive_curve(curve: pd.DataFrame, axes=None):
    """Accuracy and NLL of `adaptive_curve` by cost; rows drawn at random, and all of them, are scored in one pass."""
    if axes is None:
        axes = matplotlib_figure.Figure(figsize=(9, 3.2), layout="constrained").subplots(1, 2)
    for ax, column in zip(axes, ("accuracy", "nll"), strict=True):
        _axes(ax, f"OOF {column} by cost", "cost, in questions with one view", column)
        ends = curve.iloc[[0, -1]]
        ax.plot(
            ends["cost"], ends[column], linestyle="--", color=GREY, label="rows drawn at random"
        )
        ax.plot(
            curve["cost"].iloc[:-1],
            curve[column].iloc[:-1],
            marker=".",
            color=BLUE,
            label="rows in doubt first",
        )
        ax.plot(ends["cost"].iloc[1:], ends[column].iloc[1:], "s", color=ORANGE, label="all rows")
    ax.legend(frameon=False)
    return axes


def plot_confusion(table: pd.DataFrame, ax=None):
    """The confusion matrix as a shaded table."""
    ax = _axes(ax, "Confusion on OOF rows", "predicted", "true", figsize=(3.8, 3.4))
    counts = table.to_numpy()
    ax.imshow(counts, cmap="Blues")
    ax.set(xticks=range(4), xticklabels=table.columns, yticks=range(4), yticklabels=table.index)
    for (row, column), count in np.ndenumerate(counts):
        ax.text(
            column,
            row,
            count,
            ha="center",
            va="center",
            color="white" if count > counts.max() / 2 else "black",
        )
    return ax


def plot_accuracy_by_type(table: pd.DataFrame, ax=None):
    """Bars of accuracy per question type with the number of rows; the dashed line is chance."""
    names = [f"{name} ({rows})" for name, rows in table["rows"].items()]
    ax = _accuracy_bars(ax, "OOF accuracy by question type", table["accuracy"].set_axis(names))
    ax.axvline(0.25, linestyle="--", color=GREY)
    return ax


def save_figure(ax, run: Run, name: str):
    """Save the figure of `ax` as figures/`name`.png in the run directory; returns it for display."""
    figure, buffer = np.ravel(ax)[0].figure, io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    atomic_write(run.directory / "figures" / f"{name}.png", buffer.getvalue())
    return figure


# === Tables for people ============================================================================
def thumbnail_html(path: str, side: int = 120) -> str:
    """An <img> tag with the image inside it, at most `side` pixels, so that the notebook needs no files beside it."""
    image, buffer = load_image(path), io.BytesIO()
    image.thumbnail((side, side))
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
        text = f"<code>{html.escape(row['id'])}</code> {row['type']}<br>{html.escape(row['question'])}<br>"
        text += " &nbsp; ".join(choices.values()) + note
        cards.append(
            f'<tr><td>{thumbnail_html(row["image_path"])}</td><td style="text-align:left">{text}</td></tr>'
        )
    return f"<table>{''.join(cards)}</table>"


def markdown_table(frame: pd.DataFrame) -> str:
    """A GitHub table with the index as first column and three decimals."""
    columns = [frame.index.name or "", *frame.columns]
    lines = ["| " + " | ".join(map(str, columns)) + " |", "|" + "---|" * len(columns)]
    for row in frame.itertuples():
        cells = [
            f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|")
            for value in row
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# === Experiments ==================================================================================
def wrap_up_table(run: Run) -> pd.DataFrame:
    """Wall time in seconds and peak memory in GiB of each worker stage, as the workers logged them."""
    frame = pd.DataFrame(read_json_lines(run.directory / "stages.jsonl")).set_index("label")
    return frame.filter(["seconds", "rss_gib", "gpu_peak_gib"])


def log_experiment(run: Run, evaluation: Evaluation) -> None:
    """Put the run's row into experiments.csv beside it, in place of an earlier one.

    A copy in the run directory travels with it, so that a new session knows the runs of the old ones."""
    config, defaults = dataclasses.asdict(run.config), dataclasses.asdict(Config())
    row = {
        "run": run.directory.name,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "model": run.config.model_id,
    }
    row |= {"folds": len(run.finished_folds), "rows": len(run.train)}
    row |= score_row(evaluation.probabilities, evaluation.oof.labels)
    stages = read_json_lines(run.directory / "stages.jsonl")
    row["seconds"] = round(sum(stage["seconds"] for stage in stages), 1)
    own = {
        key: value
        for key, value in config.items()
        if value != defaults[key] and key not in BOOKKEEPING_FIELDS
    }
    row["settings"] = json.dumps(own, ensure_ascii=False)
    places = [
        run.directory.parent / "experiments.csv",
        run.directory / "tables" / "experiments.csv",
    ]
    rows = pd.concat([*(read_table(path) for path in places if path.exists()), pd.DataFrame([row])])
    rows = rows.sort_values("finished", kind="stable").drop_duplicates("run", keep="last")
    for path in places:
        write_table(rows, path)


def experiment_table(output_dir: str | Path) -> pd.DataFrame:
    """Every finished run of experiments.csv, the oldest first: scores, workers' seconds, and the settings in which it
    differs from the run before it; `note` says which scores are not to be compared."""
    table, before = read_table(Path(output_dir) / "experiments.csv").set_index("run"), {}
    numbers = ["accuracy", "nll", "brier", "ece", "seconds"]
    table = table.reindex(
        columns=["finished", "model", "folds", "rows", *numbers, "settings"], fill_value=""
    )
    for name, settings in table.pop("settings").items():
        now = (
            dataclasses.asdict(Config()) | json.loads(settings) if settings else before
        )  # "": by an older version
        changed = [
            f"{key}={value}" for key, value in now.items() if value != before.get(key, value)
        ]
        table.loc[name, "changed"] = ", ".join(changed)
        table.loc[name, "note"] = (
            "distilled: scores are too good" if now.get("distill_from") else ""
        )
        before = now
    table[numbers] = table[numbers].apply(pd.to_numeric, errors="coerce")
    return table


def plot_experiments(table: pd.DataFrame):
    """Bars of OOF accuracy and of minutes for the runs in `experiment_table`; grey: not to be compared."""
    size = (9, 1.2 + 0.6 * len(table))
    axes = matplotlib_figure.Figure(figsize=size, layout="constrained").subplots(
        1, 2, width_ratios=[2, 1]
    )
    names = [
        f"{name}\n{(note or changed)[:50]}"
        for name, changed, note in table[["changed", "note"]].itertuples()
    ]
    _accuracy_bars(axes[0], "OOF accuracy of finished runs", table["accuracy"].set_axis(names))
    for bar, note in zip(axes[0].patches, table["note"], strict=True):
        bar.set_color(GREY if note else BLUE)
    _axes(axes[1], "Time of the workers", "minutes", "", yticks=[], xmargin=0.2)
    axes[1].bar_label(
        axes[1].barh(names, table["seconds"] / 60, color=BLUE), fmt="%.1f", padding=3, fontsize=9
    )
    return axes


# === Report =======================================================================================
# A row's target over a, b, c, d is its label, or what people (dev.csv) or another run, the teacher, make of it: columns
# target_a .. target_d. No target comes from a model that was trained on its row, and no fold trains on a row or image
# that validates it. Distillation still tells a fold about its validation rows: the teacher's model for a row of fold 1
# was trained on fold 0, and a student of fold 0 that learns to answer like it also learns what it knew by heart. On the
# demo OOF accuracy rose by 3.6 points, that of the hidden answers did not: hence SECOND_HAND. To be rid of it takes a
# teacher model for each pair of folds. Test answers for fold 0 come from a model that never saw fold 0: they know it
# only through decisions on OOF rows (epoch, weights, views, temperature).
DISTILLED_WARNING = "it was distilled, and its teacher was trained on the rows that validate it: its OOF figures are too good"


def write_report(run: Run, evaluation: Evaluation) -> Path:
    """Write report.md from the run's files and append the run to experiments.csv; returns the report's path."""
    config, oof = run.config, evaluation.oof
    curve = adaptive_curve(run)
    files = {
        "ladder": evaluation.ladder,
        "folds": evaluation.fold_table,
        "views": evaluation.view_table,
    }
    for name, table in (files | {"adaptive_curve": curve}).items():
        write_table(table.reset_index(), run.directory / "tables" / f"{name}.csv")
    weights = ", ".join(run.selected_weights)
    parts = [
        f"# {run.directory.name}",
        f"Model `{config.model_id}`, {len(run.train)} training rows, {len(run.test)} test rows, "
        f"folds {run.finished_folds} of {config.n_folds}, {weights} weights.",
        "Temperature, weights and stacking are scored on rows they were not fitted on. The gain of averaging folds "
        "cannot be seen on OOF rows, because each row has one model that did not train on it.",
        f"Views are combined by: {evaluation.method}. `used` marks the steps behind the submission, and what loses is "
        "left out. `_low` and `_high` are the ends of 90 % intervals of the change against the step in `against`.",
    ]
    if run.final_fold in run.submission_models:
        text = "One more model was trained on all rows and is a member of the mean, with the folds' pooled temperature."
        parts.append(f"{text} No row is out of fold for it: whether it helps cannot be seen here.")
    parts += (
        [f"**Do not compare runs by these figures**: {DISTILLED_WARNING}."]
        if config.distill_from
        else []
    )
    tables = {
        "Steps on out-of-fold rows": evaluation.ladder,
        "Folds": evaluation.fold_table,
        "Views": evaluation.view_table,
        "Views for rows in doubt only, by their share of the last step's cost": curve,
        "Question types": reliability_by_type(
            oof.frame["type"], evaluation.probabilities, oof.labels
        ),
        "Rows trained on, by fold and file": source_table(run),
        "Fallbacks taken while reading the data": pd.DataFrame({"rows": run.fallbacks}).rename_axis(
            "fallback"
        ),
        "Time and memory": wrap_up_table(run),
    }
    done = itertools.product(
        ("train", "rescore"), run.submission_models
    )  # made up for by a later session
    later = tuple(
        f"{stage} fold {fold} was left out" for stage, fold in done if run.is_done(stage, fold)
    )
    later += ("scoring in 16 bits was left out",) * run.is_rescored
    logged = read_json_lines(run.directory / "events.jsonl")
    if events := [record for record in logged if not record["event"].startswith(later)]:
        tables["What did not go to plan"] = (
            pd.DataFrame(events).drop_duplicates("event").set_index("event")
        )
    parts += [f"## {title}\n\n{markdown_table(table)}" for title, table in tables.items()]
    parts += [
        f"![{path.stem}](figures/{path.name})"
        for path in sorted((run.directory / "figures").glob("*.png"))
    ]
    atomic_write(run.directory / "report.md", "\n\n".join(parts) + "\n")
    log_experiment(run, evaluation)
    back_up(run)
    return run.directory / "report.md"


# ======= 7. Submission and several runs ===========================================================


# === Submission ===================================================================================
def _check_rows(frame, sample, path):
    def refuse(bad, problem):
        for row, name, answer in frame[bad].head(1).itertuples():
            raise SubmissionError(
                f"{path}, row {row + 1} (id {name!r}, answer {answer!r}): {problem}"
            )

    ids, names, answers = sample.iloc[:, 0].map(str), frame.iloc[:, 0], frame.iloc[:, 1]
    refuse(~names.isin(ids), "this id is not in the sample; remove the row")
    refuse(names.duplicated(), "this id occurs twice; keep one row per id")
    if len(names) != len(ids):
        missing = sorted(set(ids) - set(names))
        raise SubmissionError(
            f"{path}: {len(names)} rows but the sample has {len(ids)}; add ids {missing[:3]}"
        )
    refuse(names != ids.tolist(), "the sample has another id in this row; keep the sample's order")
    refuse(~answers.isin(CHOICES), "write one lower-case letter of a, b, c, d")


def validate_submission(path, sample) -> dict:
    """Check the file at `path` against the sample; returns `rows` and `letters` (count of each) or SubmissionError."""
    try:  # as it is: no id parsed as a number, no "NA" as missing, no blank line or repeated column hidden
        raw = pd.read_csv(
            path, dtype=str, keep_default_na=False, header=None, skip_blank_lines=False
        )
    except ValueError as error:  # pandas' parser errors and wrong encodings
        raise SubmissionError(
            f"{path}: not a readable CSV ({error}); write it with make_submission"
        ) from error
    found, columns = raw.iloc[0].tolist(), list(sample.columns)
    if found != columns:
        raise SubmissionError(
            f"{path}: columns are {found}; name them {columns}, as the sample does"
        )
    frame = raw.iloc[1:].reset_index(drop=True)
    _check_rows(frame, sample, path)
    return {
        "rows": len(frame),
        "letters": {letter: int((frame[1] == letter).sum()) for letter in CHOICES},
    }


def make_submission(sample, letters, path) -> dict:
    """Write `letters` (id -> letter) like the sample and read it back; a SubmissionError spares an earlier file."""
    ids, letters = sample.iloc[:, 0].map(str), pd.Series(letters, dtype=object).rename(str)
    missing, unknown = sorted(set(ids) - set(letters.index)), sorted(set(letters.index) - set(ids))
    if missing or unknown or len(letters) != len(ids):
        problem = f"without an answer {missing[:3]}, not in the sample {unknown[:3]}; answer each id of the sample once"
        raise SubmissionError(f"{path}: {len(letters)} answers for {len(ids)} ids, {problem}")
    frame = pd.DataFrame(zip(ids, letters[ids], strict=True), columns=sample.columns, dtype=object)
    _check_rows(frame, sample, path)
    atomic_write(path, frame.to_csv(index=False, lineterminator="\n"))
    return validate_submission(path, sample)


def copy_to_kaggle_working(path: Path, config: Config) -> None:
    """On Kaggle, copy a finished submission into the working folder, from where it can be submitted."""
    if detect_runtime(config.precision).platform == "kaggle":
        atomic_write("submission.csv", path.read_bytes())


def write_submissions(run: Run, evaluation: Evaluation) -> dict[str, pd.DataFrame]:
    """Write and check submission_single.csv (best fold by OOF) and submission_ensemble.csv; returns name -> frame."""
    folds = predict_test(run, evaluation)
    ensemble = combine_models(run, np.stack(list(folds.values())))
    answers = {"single": folds[best_fold(evaluation)].argmax(1), "ensemble": ensemble}
    frames = {}
    for name, labels in answers.items():
        letters, path = np.array(CHOICES)[labels], run.directory / f"submission_{name}.csv"
        make_submission(run.sample, dict(zip(run.test["id"], letters, strict=True)), path)
        frames[name] = pd.read_csv(path, dtype=str, keep_default_na=False)
    copy_to_kaggle_working(run.directory / "submission_ensemble.csv", run.config)
    return frames


# === Ensembles of runs ============================================================================
def _require_same_rows(first: Run, other: Run) -> None:
    """ValueError that names the run and the rows that differ."""
    for name, columns in {
        "test": ["id", "question", *CHOICES],
        "train": ["id", "question", *CHOICES, "label"],
    }.items():
        if ids := _differing_ids(*(getattr(run, name)[columns] for run in (first, other))):
            problem = (
                f"{len(ids)} {name} rows differ from those of {first.directory}, such as {ids[:3]}"
            )
            raise ValueError(
                f"{other.directory}: {problem}; combine runs on the same data and the same sample of it"
            )


def ensemble_runs(
    directories: Iterable[str | Path], folder: str | Path
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare ways to combine finished runs on the rows that all have scored out of fold; use the best on the test.

    Writes submission.csv and ladder.csv into `folder` and returns the table and the answers. `seconds` is the workers'
    time of the runs behind a row. "automatic choice" is what to expect: each twentieth of the images is answered by
    what would be chosen without it.
    """
    named = [(str(directory), Run.open(directory)) for directory in directories]
    runs, first, oof, test, seconds = dict(named), named[0][1], [], [], {}
    for run in runs.values():
        _require_same_rows(first, run)
    for name, run in runs.items():
        twins = [other for other, each in named if each.fingerprint == run.fingerprint]
        if len(twins) > 1:
            raise ValueError(
                f"{' and '.join(twins)} are the same run, which would count twice: name it once"
            )
        if run.config.distill_from:
            raise ValueError(
                f"{run.directory} cannot be judged beside other runs: {DISTILLED_WARNING}; leave it out"
            )
        evaluation = evaluate_run(run)
        oof.append(pd.DataFrame(evaluation.probabilities, index=evaluation.oof.frame["id"]))
        folds = np.mean(list(predict_test(run, evaluation).values()), axis=0)
        test.append(pd.DataFrame(folds, index=run.test["id"]).loc[first.test["id"]])
        seconds[name] = sum(
            record["seconds"] for record in read_json_lines(run.directory / "stages.jsonl")
        )
    rows = first.train[first.train["id"].isin(set.intersection(*(set(part.index) for part in oof)))]
    if rows.empty:
        raise ValueError(
            f"{', '.join(runs)}: no training row is out of fold in all of them; train the same folds"
        )
    members, labels = np.stack([part.loc[rows["id"]] for part in oof]), rows["label"].to_numpy()
    LOGGER.info(
        "Compared on the %d of %d training rows that all runs have scored",
        len(rows),
        len(first.train),
    )
    groups, alone = image_groups(rows), dict(zip(runs, members, strict=True))
    candidates = cross_fitted_blends(members, labels, groups) | alone
    chosen = choose_blend(candidates, labels, groups)
    best = min(alone, key=lambda name: negative_log_likelihood(alone[name], labels))
    against = dict.fromkeys(candidates, "mean") | {"mean": best}
    fitted = {name: count_fitted_parameters(name, members, labels) for name in candidates}
    steps = {}
    for name in [*alone, *candidates]:
        steps[name] = LadderStep(
            candidates[name], against[name], used=name == chosen, fitted=fitted[name]
        )
    steps[STEP_AUTOMATIC] = LadderStep(
        choose_cross_fitted(candidates, labels, groups), "mean", used=True
    )
    table = ladder_table(steps, labels, groups)
    set_choice_interval(table, candidates, labels, groups, fitted)
    table.insert(4, "seconds", [seconds.get(name, sum(seconds.values())) for name in table.index])
    alone = dict(zip(runs, np.stack(test), strict=True))
    answers = (
        alone[chosen] if chosen in alone else fit_and_blend(chosen, members, labels, np.stack(test))
    )
    letters, folder = np.array(CHOICES)[answers.argmax(axis=1)], Path(folder)
    make_submission(
        first.sample, dict(zip(first.test["id"], letters, strict=True)), folder / "submission.csv"
    )
    write_table(table.reset_index(), folder / "ladder.csv")
    copy_to_kaggle_working(folder / "submission.csv", first.config)
    return table, pd.read_csv(folder / "submission.csv", dtype=str, keep_default_na=False)


# === Soft targets =================================================================================
TARGET_DECIMALS = (
    4  # of a teacher's probabilities: processors differ in the last digits, a run continues on any
)


def _with_targets(frame: pd.DataFrame, probabilities: np.ndarray) -> pd.DataFrame:
    """`frame` with probabilities (n, 4) as targets; a blank choice gets none."""
    present = (frame[[*CHOICES]].map(str.strip) != "").to_numpy()
    shares = np.where(present, probabilities, 0)
    return frame.assign(
        **dict(zip(TARGET_COLUMNS, (shares / shares.sum(axis=1, keepdims=True)).T, strict=True))
    )


def _load_dev(root: Path, limit: float, fallbacks: Counter) -> pd.DataFrame:
    """Rows of dev.csv with the shares of their votes as targets; without a vote or usable image dropped and counted."""
    if not (root / "dev.csv").is_file():
        raise DataError(f"{root / 'dev.csv'}: no such file; add it, or set use_dev_votes=False")
    frame, _ = _read_competition_table(root / "dev.csv", fallbacks)
    blank = frame[[*VOTE_COLUMNS]].map(str.strip) == ""
    fallbacks["dev_blank_votes"] += int(blank.to_numpy().sum())
    frame = frame.assign(problem=blank.all(axis=1).map({True: "no vote", False: ""}))
    _count_dropped_rows(frame, "dev", "no_vote", "answer1", limit, fallbacks)
    frame = (
        frame[~blank.all(axis=1)]
        .drop(columns=["problem", "answer"], errors="ignore")
        .reset_index(drop=True)
    )
    _check_questions("dev", frame, fallbacks)
    votes = np.zeros((len(frame), 4))
    for vote in VOTE_COLUMNS:
        given = frame[frame[vote].str.strip() != ""]
        votes[given.index] += np.eye(4)[answer_labels(given, "dev.csv", vote)]
    frame = _with_targets(frame, votes).drop(columns=[*VOTE_COLUMNS])
    frame = _attach_images(frame, root, "dev", limit, fallbacks)
    return frame[frame["image_ok"]]


def _open_teacher(run: Run, name: str) -> Run:
    """The finished run that config field `name` points to; ValueError unless its rows, labels and images are these."""
    directory = Path(getattr(run.config, name))
    where = f"Config field {name!r} is {str(directory)!r}"
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"{where}: no run lies in {directory.resolve()}; give the folder of a finished run, attached"
        )
    teacher, content = (
        Run.open(directory),
        json.loads((directory / "config.json").read_text(encoding="utf-8")),
    )
    if ids := _differing_ids(run.train[["id", "label"]], teacher.train[["id", "label"]]):
        raise ValueError(
            f"{where}: {len(ids)} of its training rows or labels are others, such as {ids[:3]}"
        )
    if content["parts"]["data"] != run.fingerprint:
        raise ValueError(
            f"{where}: it was made from other texts, test rows or pixels; train it on these files"
        )
    unfinished = [
        fold for fold in teacher.config.folds_to_train if not teacher.is_done("predict", fold)
    ]
    if unfinished:
        raise ValueError(
            f"{where}: its folds {unfinished} are not finished; run it to its end first"
        )
    return teacher


def _add_distilled_targets(run: Run, teacher: Run) -> pd.DataFrame:
    """The training rows with the teacher's calibrated OOF probabilities in their targets; ValueError without one."""
    evaluation, ids, weight = evaluate_run(teacher), run.train["id"], run.config.distill_weight
    taught = (
        pd.DataFrame(evaluation.probabilities, evaluation.oof.frame["id"]).reindex(ids).to_numpy()
    )
    trained_on = np.any([run.train["fold"] != fold for fold in run.models_to_train], axis=0)
    lacking = ids[trained_on & np.isnan(taught[:, 0])].tolist()
    if lacking:
        problem = f"{teacher.directory} has no out-of-fold probabilities for {len(lacking)} rows, such as {lacking[:3]}"
        raise ValueError(f"Config field 'distill_from': {problem}; train all its folds")
    hard = np.eye(4)[run.train["label"]]
    soft = _with_targets(run.train, np.where(np.isnan(taught), hard, taught.round(TARGET_DECIMALS)))
    soft[[*TARGET_COLUMNS]] = (1 - weight) * hard + weight * soft[[*TARGET_COLUMNS]]
    folds = teacher.train.set_index("id")["fold"]
    return soft.assign(teacher_fold=folds[ids].to_numpy())


def _pseudo_labelled_rows(run: Run, teacher: Run) -> Iterator[pd.DataFrame]:
    """For each fold the test rows that the teacher's same fold is sure of, with its calibrated probabilities."""
    where = f"Config field 'pseudo_label_from': {teacher.directory}"
    if ids := _differing_ids(run.train[["id", "fold"]], teacher.train[["id", "fold"]]):
        raise ValueError(
            f"{where} has {len(ids)} rows in other folds, such as {ids[:3]}; take its n_folds and seed"
        )
    if absent := sorted(set(run.config.folds_to_train) - set(teacher.finished_folds)):
        raise ValueError(
            f"{where} has not trained the folds {absent}; train them there, or leave them out here"
        )
    if teacher.config.distill_from:
        raise ValueError(f"{where}: {DISTILLED_WARNING}; take a run that was not distilled")
    probabilities = predict_test(teacher, evaluate_run(teacher))
    for fold in run.config.folds_to_train:
        rows = _with_targets(run.test, probabilities[fold].round(TARGET_DECIMALS))
        sure = rows["image_ok"] & (
            rows[[*TARGET_COLUMNS]].max(axis=1) >= run.config.pseudo_label_confidence
        )
        yield rows[sure].assign(source="test", fold=fold, teacher_fold=fold)


def _without_copies(run: Run, extra: pd.DataFrame, fallbacks: Counter) -> pd.DataFrame:
    """`extra` without the rows whose image is a copy of one that validates their fold, exact or near; counted."""
    leakage = leakage_report(run.train, extra)
    held_out = set(zip(run.train["fold"], leakage.image_group, strict=True))
    copies = np.array(
        [key in held_out for key in zip(extra["fold"], leakage.test_group, strict=True)], dtype=bool
    )
    for (source, fold), rows in extra[copies].groupby(["source", "fold"]):
        fallbacks[f"{source}_copies_left_out_of_fold_{fold}"] += len(rows)
    return extra[~copies]


def _row_keys(frame: pd.DataFrame) -> set[tuple[str, str]]:
    return set(zip(frame["source"], frame["id"], strict=True))


def check_no_leak(run: Run, teachers: Mapping[str, Run]) -> None:
    """DataError where a fold trains on what it is validated on, or on a target from a model that saw the target's row.

    `teachers`: source of rows (train, test) -> the run whose fold `teacher_fold` gave a row of that source its target.
    """
    for fold in run.models_to_train:
        rows = training_rows(run, fold)
        held_out = run.train[run.train["fold"] == fold].assign(source="train")
        added = rows[rows["source"] != "train"]
        copies = added[added["pixel_hash"].isin(held_out["pixel_hash"])]
        leaks = [(_row_keys(rows) & _row_keys(held_out), "a training row also validates it")]
        leaks += [(_row_keys(copies), "a training row shows an image that validates it")]
        for source, teacher in teachers.items():
            for number, taught in rows[rows["source"] == source].groupby("teacher_fold"):
                seen = _row_keys(training_rows(teacher, number)) & _row_keys(taught)
                leaks += [
                    (
                        seen,
                        f"a target comes from fold {number} of {teacher.directory}, trained on its row",
                    )
                ]
        for keys, problem in leaks:
            if keys:
                raise DataError(
                    f"Fold {fold}: {problem}: {len(keys)} rows, such as {sorted(keys)[:3]}"
                )


def add_soft_targets(run: Run, data_dir: Path) -> Run:
    """The run with the targets and extra rows that its config asks for; DataError or ValueError for unusable ones."""
    config, fallbacks, teachers, parts, train = (
        run.config,
        Counter(run.fallbacks),
        {},
        [],
        run.train,
    )
    if config.use_dev_votes:
        dev = _load_dev(data_dir, config.max_fallback_share, fallbacks)
        parts += [
            dev.assign(source="dev", fold=fold, teacher_fold=-1) for fold in run.models_to_train
        ]
    if config.pseudo_label_from:
        teachers["test"] = _open_teacher(run, "pseudo_label_from")
        parts += _pseudo_labelled_rows(run, teachers["test"])
    if config.distill_from:
        teachers["train"] = _open_teacher(run, "distill_from")
        train = _add_distilled_targets(run, teachers["train"])
    elif parts:
        train = _with_targets(train, np.eye(4)[train["label"]]).assign(teacher_fold=-1)
    extra = (
        _without_copies(run, pd.concat(parts, ignore_index=True), fallbacks)
        if parts
        else run.extra_rows
    )
    run = dataclasses.replace(
        run, train=train, extra_rows=extra.assign(label=-1), fallbacks=dict(fallbacks)
    )
    check_no_leak(run, teachers)
    if config.distill_from:
        LOGGER.warning(
            "Do not compare %s with other runs by OOF rows: %s",
            run.directory.name,
            DISTILLED_WARNING,
        )
    if parts:
        left_out = {name: count for name, count in fallbacks.items() if "copies_left_out" in name}
        LOGGER.info(
            "Training rows by fold and file: %s; %s", source_table(run).to_dict("index"), left_out
        )
    return run


def targets_sha256(run: Run) -> str:
    """A hash of all soft targets and of the rows that are not in train.csv, wherever their images lie."""
    extra = run.extra_rows.drop(columns=["image_path", "line"])
    return hashlib.sha256(
        (run.train.filter(like="target_").to_csv() + extra.to_csv()).encode()
    ).hexdigest()


# === Starting a run ===============================================================================
WATCHED_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def start_run(config: Config, competition: Competition, folds: np.ndarray) -> Run:
    """Create the run directory or continue the one there, or in `resume_from`; CheckpointError if it differs."""
    directory = config.run_dir.resolve()
    config = dataclasses.replace(config, output_dir=str(directory.parent), run_name=directory.name)
    if config.backup_dir and not Path(config.backup_dir).parent.is_dir():
        raise FileNotFoundError(
            f"backup_dir {config.backup_dir}: no such disk; for Drive set MOUNT_DRIVE = True above"
        )
    rows, test, sample = competition.train.assign(fold=folds), competition.test, competition.sample
    run = Run(
        config,
        directory,
        rows,
        test,
        sample,
        competition.fallbacks,
        competition.fingerprint,
        _no_rows(rows),
    )
    run = add_soft_targets(run, competition.data_dir)
    assignment = hashlib.sha256(rows[["id", "fold"]].to_csv().encode()).hexdigest()
    parts = {"config": config.fingerprint, "data": competition.fingerprint, "folds": assignment}
    parts |= {"model": config.model_files, "targets": targets_sha256(run)}
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    libraries = {name: importlib.metadata.version(name) for name in WATCHED_LIBRARIES}
    content = {
        "version": __version__,
        "libraries": libraries,
        "config": dataclasses.asdict(config),
        "parts": parts,
    }
    content |= {"fallbacks": run.fallbacks, "fingerprint": fingerprint}
    tables = {"folds": run.train, "test_rows": test, "sample_rows": sample}
    tables |= {} if run.extra_rows.empty else {"extra_rows": run.extra_rows}
    path = directory / "config.json"
    if not path.exists():
        _adopt_earlier_run(directory, config, fingerprint)
    if path.exists():
        _check_same_run(json.loads(path.read_text(encoding="utf-8")), content, directory, tables)
    for name, frame in tables.items():
        write_table(frame, directory / f"{name}.csv")
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False))
    run = Run.open(directory)
    back_up(run)
    return run


def _adopt_earlier_run(directory: Path, config: Config, fingerprint: str) -> None:
    """Copy the run of this fingerprint from where an earlier session left it, a read-only input or Drive, if it is."""
    found = {}  # folder -> how far its run has come
    for place in (*config.resume_from, *filter(None, [config.backup_dir])):
        for folder, folders, files in os.walk(place):
            path = Path(folder)
            if len(path.relative_to(place).parts) >= 5:
                folders.clear()
            if (
                path.name != directory.name
                or "config.json" not in files
                or path.resolve() == directory
            ):
                continue
            earlier = json.loads((path / "config.json").read_text(encoding="utf-8"))
            if earlier.get("fingerprint") == fingerprint:
                found[path] = (
                    len([*path.glob("fold_*/*.npz")]),
                    len([*path.glob("fold_*/checkpoints/step_*")]),
                )
            else:
                LOGGER.warning(
                    "%s has this run's name, but other settings, data or folds: not continued", path
                )
    if not found:
        return
    source = max(found, key=found.get)
    # config.json comes last: only with it is the copy a run.
    for path in sorted(source.rglob("*"), key=lambda path: path == source / "config.json"):
        left_out = (
            path.name == "session.json"
            or path.suffix in (".lock", ".tmp")
            or ".incomplete-" in str(path)
        )
        if path.is_file() and not left_out:
            target = directory / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(
                path, target
            )  # not copytree: it would copy the mount's write protection
    LOGGER.info("Continuing the run of an earlier session, copied from %s", source)


def _check_same_run(
    before: Mapping, now: Mapping, directory: Path, tables: Mapping[str, pd.DataFrame]
) -> None:
    """CheckpointError with what differs between two config.json; a warning for another version of a library."""
    for name, version in now["libraries"].items():
        if before["libraries"][name] != version:
            LOGGER.warning(
                "This run was started with %s %s; now %s", name, before["libraries"][name], version
            )
    changed = [
        name for name, value in now["parts"].items() if before["parts"].get(name, "") != value
    ]
    if not changed:
        return
    new, old = json.loads(json.dumps(now["config"])), before["config"]
    differences = [
        f"{name}: {old.get(name)!r} -> {value!r}"
        for name, value in new.items()
        if old.get(name) != value
    ]
    for name in (
        name
        for name in ("folds", "test_rows", "extra_rows")
        if (directory / f"{name}.csv").exists()
    ):
        earlier = read_table(directory / f"{name}.csv")
        table = tables.get(name, earlier.head(0))
        columns = [
            column for column in earlier if column in table and column not in ("image_path", "line")
        ]
        ids = _differing_ids(table[columns], earlier[columns])
        images = table.drop_duplicates("id").set_index("id")["image_path"]
        shown = [f"{key} ({Path(images.get(key, '')).name})" for key in ids[:3]]
        differences += (
            [f"rows {shown} and {max(0, len(ids) - 3)} more of {name}.csv"] if ids else []
        )
    differences += [f"files in {now['config']['model_id']}"] if "model" in changed else []
    what, remedy = (
        "; ".join(differences) or "same settings",
        "choose a new run_name, or delete that folder",
    )
    raise CheckpointError(
        f"{directory} was made with other {' and '.join(changed)} ({what}); {remedy}"
    )


# ======= 8. Running ===============================================================================


# === Final model ==================================================================================
def final_epochs(run: Run) -> int:
    """How long the model on all rows is trained: the median over folds of what gave the weights that are used."""
    kind, results = (
        select_weights(run),
        [read_fold_result(run, fold) for fold in run.finished_folds],
    )
    return int(
        np.median(
            [result.best_epoch if kind == "raw" else len(result.history) for result in results]
        )
    )


class FinalTrainer(FoldTrainer):
    """One more model, on all rows: nothing is held out, so that nothing about it is measured or chosen."""

    def __init__(self, session: Session, run: Run):
        super().__init__(session, run, run.final_fold)
        self.epochs = final_epochs(run)  # of the folds' schedule: no more than they had

    def train_epoch(self, epoch: int, first_step: int) -> float:
        speed = super().train_epoch(epoch, first_step)
        if self.next_step < self.steps_per_epoch:
            raise OutOfTime
        return speed

    def validate(self) -> tuple[np.ndarray, dict]:
        return np.empty((0, 1, 4)), {}

    def finish(self) -> FoldResult:
        if len(self.history) < self.epochs:
            self.save(len(self.history), 0)
            raise OutOfTime  # half a schedule, and no row to see what that costs
        return super().finish()


def train_fold(config: Config, fold: int, session: Session | None = None) -> FoldResult:
    """Train one fold of the run at `config.run_dir`, continuing where it stopped; folds share `session` at most."""
    run = Run.open(config.run_dir)
    if run.is_done("train", fold):
        return read_fold_result(run, fold)
    session = session or open_session(run.config, run.train.iloc[0])
    # Test images in the batches in which they are scored later.
    frames = [
        run.train,
        *(
            run.test if source == "test" else rows
            for source, rows in run.extra_rows.groupby("source")
        ),
    ]
    if run.config.augment_images:
        frames.append(image_variants(all_rows(run), run.config.augment_images, run.config.seed))
    for frame in frames:
        fill_vision_cache(session, frame, uses=run.uses_per_image, passes=3)
    trainer = (
        FinalTrainer(session, run) if fold == run.final_fold else FoldTrainer(session, run, fold)
    )
    try:
        return trainer.fit()
    finally:
        trainer.model.unload()  # the base model is shared: the next fold starts from it, untouched
        clear_memory()


# === Stages =======================================================================================
def stage_zeroshot(session: Session, run: Run, fold: int) -> None:
    """Score `zeroshot_rows` training rows with the untouched base model."""
    rows = min(run.config.zeroshot_rows or len(run.train), len(run.train))
    frame = run.train.sample(rows, random_state=run.config.seed).sort_index().reset_index(drop=True)
    fill_vision_cache(session, run.train, uses=run.uses_per_image, passes=3)
    partial = open_inference_checkpoint(session, run, run.directory / "zeroshot.partial.npz")
    logits = predict_logits(session, frame, [TTAView("rotation 0")], "zero-shot", partial)
    write_logits(run.directory / "zeroshot.npz", frame, logits, ["rotation 0"], run.fingerprint)
    (run.directory / "zeroshot.partial.npz").unlink(missing_ok=True)


def open_inference_checkpoint(session: Session, run: Run, path: Path) -> InferenceCheckpoint | None:
    """Where half-done scores are kept; not in a team: the others would start anew, and the first wait for them."""
    # The number of batches that are done means nothing under another kind of attention, which has other prompts.
    plan = f"{run.fingerprint} {session.runtime.attention}"
    return InferenceCheckpoint(path, plan, run.config) if rank_and_world_size()[1] == 1 else None


def score_rows(
    session: Session, run: Run, fold: int, name: str, frame: pd.DataFrame, views, kind: str
) -> np.ndarray:
    """Scores (n, views, 4) with the loaded adapter of that kind, from where an earlier process stopped."""
    directory, label = run.fold_dir(fold), f"fold {fold} {name}"
    partial = open_inference_checkpoint(session, run, directory / f"{name}.{kind}.partial.npz")
    if name == "test" and run.config.adaptive_tta is not None:
        oof = read_arrays(directory / "oof.npz", run.fingerprint)["logits"]
        return predict_in_doubt(session, frame, views, oof, label, partial)
    return predict_logits(session, frame, views, label, partial)


def ensure_adapter(session: Session, run: Run, fold: int, kind: str, anew: bool) -> None:
    """Train the fold again from its last checkpoint where that adapter is damaged; CheckpointError unless `anew`."""
    directory = run.fold_dir(fold)
    weights = directory / f"adapter_{kind}" / "adapter_model.safetensors"
    if not weights.exists() or file_sha256(weights) != read_fold_result(run, fold).adapters[kind]:
        (directory / "result.json").unlink()
        if not anew:  # the session's base model is another than the adapter was trained on
            raise CheckpointError(
                f"{weights} is damaged; run again to make it anew from the last checkpoint"
            )
        LOGGER.warning("%s is damaged: made anew from the last checkpoint", weights)
        train_fold(run.config, fold, session)


def stage_predict(session: Session, run: Run, fold: int, ending: str = "") -> None:
    """Score the fold's held-out rows and all test rows in every view with the selected weights, or each kind of them.

    `ending` is of the files' names and, where it is not empty, says that the session's base model is unquantised."""
    views, directory = all_views(run.config, session.processor), run.fold_dir(fold)
    names = [view.name + SUFFIX_16_BIT * bool(ending) for view in views]
    held_out = run.train[run.train["fold"] == fold].reset_index(drop=True)
    scores, kinds = defaultdict(list), run.selected_weights
    for kind in kinds:
        ensure_adapter(session, run, fold, kind, anew=not ending)
    for kind in kinds:
        adapted = load_adapter(session.model, directory / f"adapter_{kind}")
        use_fast_layers(session, adapted, len(held_out) + len(run.test))
        try:
            for name, frame, images in (
                (f"oof{ending}", held_out, run.train),
                (f"test{ending}", run.test, run.test),
            ):
                fill_vision_cache(session, images, uses=len(run.config.folds_to_train), passes=1)
                scores[name].append(score_rows(session, run, fold, name, frame, views, kind))
                if kind == kinds[-1]:
                    more = (
                        {"tokens": prompt_tokens(session, frame)} if name == "oof" else {}
                    )  # for the error analysis
                    logits = np.mean(scores[name], axis=0)
                    write_logits(
                        directory / f"{name}.npz", frame, logits, names, run.fingerprint, **more
                    )
        finally:
            adapted.unload()
    for name in (
        scores
    ):  # not before all is done: a process that starts again begins with the first of them
        for path in directory.glob(f"{name}.*partial.npz"):
            path.unlink()


STAGES = {  # what does a stage for one fold
    "zeroshot": stage_zeroshot,
    "train": lambda session, run, fold: train_fold(run.config, fold, session),
    "predict": stage_predict,
    "rescore": functools.partial(stage_predict, ending="_16bit"),
}
SCORING_GIB = (
    0.5  # beside the weights: the activations of a question in all choice orders, and the adapter
)


def fits_in_16_bits(config: Config, free: float) -> tuple[bool, str]:
    """Whether the unquantised base model fits into `free` GiB to score rows (of any family), and the figures."""
    runtime = detect_runtime(config.precision, config.attn_implementation)
    shapes = transformers.AutoConfig.from_pretrained(
        config.model_path, trust_remote_code=config.trust_remote_code
    )
    with torch.device("meta"):
        parameters = transformers.AutoModelForImageTextToText.from_config(shapes).num_parameters()
    needed = parameters * getattr(torch, DTYPES[runtime.precision]).itemsize / 2**30 + SCORING_GIB
    if config.spread_model:
        free = SPREAD_MEMORY_SHARE * sum(gpu["memory_gib"] for gpu in runtime.gpus)
    figures = f"{needed:.2f} GiB for the unquantised model, {free:.2f} GiB free"
    return needed <= free, figures if needed <= free else f"does not fit by computation: {figures}"


def open_stage_session(run: Run, stage: str, folds: Sequence[int], progress: Callable) -> Session:
    """The worker's session: the run's model, for "rescore" without quantisation."""
    unquantised = (
        {"quantization": "none", "score_precision": "trained"} if stage == "rescore" else {}
    )
    session = open_session(dataclasses.replace(run.config, **unquantised), run.train.iloc[0])
    session.progress = progress
    # A team comes last: it leaves time for what the single devices have still to score.
    session.assigned_folds = folds if rank_and_world_size()[1] == 1 else run.config.folds_to_train
    session.seconds_per_question = run.seconds_per_question()
    return session


def seconds_needed(
    run: Run, session: Session, stage: str, fold: int, longest: Mapping[str, float]
) -> float:
    """Time that must be left for a stage that can be left out; minus infinity for what a submission needs."""
    if stage == "rescore":
        return 1.25 * longest["predict"]
    if stage != "train" or not run.finished_folds:
        return -math.inf
    more_rows = run.config.n_folds / (run.config.n_folds - 1) if fold == run.final_fold else 1
    scoring = inference_seconds(run, session.seconds_per_question, session, training=1)
    return scoring + longest["train"] * more_rows


def write_notes(run: Run, session: Session) -> None:
    """Move what did not go to plan from the session to events.jsonl."""
    if count := session.vision_cache.recomputed_in_fp32:
        session.add_note(
            f"vision features of {count} images were not finite and recomputed in fp32"
        )
        session.vision_cache.recomputed_in_fp32 = 0
    with contextlib.suppress(OSError):  # the disk may be full: the error to see is another one
        for text in session.notes:
            MetricLogger(run.directory / "events.jsonl").log(event=text)
    session.notes.clear()


def run_stages(run: Run, folds: Sequence[int], stages: Sequence[str], progress: Callable) -> None:
    """Do what is missing of `stages` for `folds`, loading the model at most once, for "rescore" once more."""
    session, longest = None, defaultdict(float)  # seconds of a stage for one fold
    for record in read_json_lines(run.directory / "stages.jsonl"):
        longest[record["label"].split()[0]] = max(
            longest[record["label"].split()[0]], record["seconds"]
        )
    for stage in stages:
        if stage == "predict":
            select_weights(run)
        if not (waiting := run.unfinished_folds(stage, folds)):
            continue
        if stage == "rescore":
            session = None  # one model at a time
            clear_memory(LOGGER)
            fits, verdict = fits_in_16_bits(run.config, free_gib())
            LOGGER.info("Decision: scoring in 16 bits: %s", verdict)
            if any_process(not fits):
                MetricLogger(run.directory / "events.jsonl").log(
                    event=f"scoring in 16 bits was left out: {verdict}"
                )
                continue
        for fold in waiting:
            if session is None:
                session = open_stage_session(run, stage, folds, progress)
            label = stage if stage == "zeroshot" else f"{stage} fold {fold}"
            try:
                needed = seconds_needed(run, session, stage, fold, longest)
                if any_process(run.seconds_left() < needed):
                    minutes = f"{needed / 60:.0f} minutes"
                    session.add_note(
                        f"{label} was left out: the time budget has no {minutes} left for it"
                    )
                    continue
                with track_peak_memory(label) as report:
                    STAGES[stage](session, run, fold)
            except OutOfTime:
                session.add_note(
                    f"{label} was left out: the time budget ended before its training, on all rows, did"
                )
                continue
            finally:
                write_notes(run, session)
            report["seconds_per_question"] = session.seconds_per_question
            longest[stage] = max(longest[stage], report["seconds"])
            MetricLogger(run.directory / "stages.jsonl").log(**report)
            back_up(run, fold)
            back_up(run)


# === Workers ======================================================================================
GROUP_GRACE_SECONDS = 5  # between the end of one process of a team and that of the others
INTERRUPTED = (
    75  # exit status of a worker that was asked to stop and has saved its work (EX_TEMPFAIL)
)


def schedule_folds(
    folds: Sequence[int], devices: Sequence
) -> list[list[tuple[tuple, tuple[int, ...]]]]:
    """Rounds of (devices, folds): whole folds on single devices; what would leave some of them idle is done by all."""
    together = len(folds) % len(devices)
    if together / (0.9 * len(devices)) >= 1:  # a team of n is estimated to be 0.9 n times as fast
        together = 0
    alone = folds[: len(folds) - together]
    jobs = [
        ((device,), tuple(alone[number :: len(devices)])) for number, device in enumerate(devices)
    ]
    rounds = [
        [job for job in jobs if job[1]],
        [(tuple(devices), tuple(folds[len(alone) :]))] if together else [],
    ]
    return [jobs for jobs in rounds if jobs]


def process_group_environments(devices: Sequence[str | None]) -> list[dict[str, str]]:
    """Environment variables of one process per device: its GPU and, for several, how they find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "LOCAL_RANK": "0",
        }
    environments = []
    for rank, gpu in enumerate(devices):
        environment = {
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"
        } | os.environ  # batches differ in size
        environment |= (
            meeting | {"RANK": str(rank), "WORLD_SIZE": str(len(devices))}
            if len(devices) > 1
            else {}
        )
        chosen = {
            "CUDA_VISIBLE_DEVICES": str(gpu),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        }  # nvidia-smi's numbers
        environments.append(environment | ({} if gpu is None else chosen))
    return environments


def _progress_line(run: Run, number: int, elapsed: float) -> str:
    """A progress bar of one worker, from the file that it writes."""
    path = run.directory / f"progress_{number}.json"
    if not path.exists():
        return f"worker {number} starting"
    state = json.loads(path.read_text(encoding="utf-8"))
    name, done, total = (
        f"worker {number} {state.pop('stage')}",
        state.pop("done"),
        state.pop("total"),
    )
    details = ", ".join(f"{key}={value}" for key, value in state.items())
    meter = "{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} in {elapsed}{postfix}"
    return tqdm.format_meter(done, total, elapsed, prefix=name, postfix=details, bar_format=meter)


def _show_progress(run: Run, teams: Sequence[Sequence[subprocess.Popen]], stop: Callable) -> None:
    """Show what every worker is doing until all have ended: in one output of a notebook cell, or in the terminal."""
    ipython = sys.modules.get("IPython")
    in_notebook = ipython is not None and ipython.get_ipython() is not None
    handle = (
        ipython.display.display({"text/plain": ""}, raw=True, display_id=True)
        if in_notebook
        else None
    )
    started, running = time.monotonic(), True
    while running and not stop():
        states = [[process.poll() for process in members] for members in teams]
        running = any(None in known for known in states)
        for members, known in zip(teams, states, strict=True):
            failed = set(known) - {None, 0, INTERRUPTED}
            if failed and None in known:  # the others would wait for the dead one for ever
                time.sleep(GROUP_GRACE_SECONDS)
                for process in members:
                    process.kill()
        lines = [
            _progress_line(run, number, time.monotonic() - started)
            for number in range(sum(map(len, teams)))
        ]
        if in_notebook:
            handle.update({"text/plain": "\n".join(lines)}, raw=True)
        else:
            sys.stdout.write("\r" + "\n".join(lines))
        time.sleep(1 if running else 0)


def launch_workers(
    run: Run, jobs: Sequence[tuple], stages: Sequence[str], stop: Callable = lambda: False
) -> None:
    """Start a worker for each device of the (devices, folds), show progress, wait; RuntimeError with failed logs' ends.

    Several devices of one job share its folds (data parallel). A device is one or several GPUs ("0", "0,1") or None.
    Where `stop()` becomes true the workers save and end, and Interrupted is raised."""
    workers, teams = {}, []  # log -> process; the processes of each job
    for devices, folds in jobs:
        teams.append([])
        for environment in process_group_environments(devices):
            number = len(workers)
            command = [
                sys.executable,
                __file__,
                "worker",
                "--run",
                str(run.directory),
                "--name",
                str(number),
            ]
            command += ["--folds", ",".join(map(str, folds)), "--stages", ",".join(stages)]
            command += ["--parent", str(os.getpid())]
            (run.directory / f"progress_{number}.json").unlink(missing_ok=True)
            log = run.directory / f"worker_{number}.log"
            with log.open("ab") as file:
                workers[log] = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment
                )
            teams[-1].append(workers[log])
    try:
        _show_progress(run, teams, stop)
    finally:  # reached by a KeyboardInterrupt too: the workers save and end
        for process in workers.values():
            process.terminate()
        ended = {log: process.wait() for log, process in workers.items()}
    if failed := [log for log, status in ended.items() if status not in (0, INTERRUPTED)]:
        tails = {log: log.read_text("utf-8", "replace").splitlines()[-25:] for log in failed}
        ends = [
            "\n".join([f"End of {log}, exit status {ended[log]}:", *tails[log]]) for log in failed
        ]
        raise RuntimeError(
            "A worker stopped. Run the cell again to continue where it was.\n" + "\n".join(ends)
        )
    if INTERRUPTED in ended.values():
        raise Interrupted(
            "A worker was asked to stop. Its work is saved: run the cell again to continue."
        )


def worker_devices(config: Config) -> list[str | None]:
    """What each worker sees: one GPU, by its number, or all of them; None on a CPU."""
    gpus = [
        str(gpu["index"])
        for gpu in detect_runtime(config.precision, config.attn_implementation).gpus
    ]
    return ([",".join(gpus)] if config.spread_model else gpus) or [None]


def run_zeroshot(run: Run) -> pd.DataFrame:
    """Score the base model in a worker; returns rows and accuracy by question type and over all."""
    if not run.is_done("zeroshot", 0):
        launch_workers(run, [(worker_devices(run.config)[:1], [0])], ["zeroshot"])
    content = read_arrays(run.directory / "zeroshot.npz", run.fingerprint)
    correct = softmax(content["logits"][:, 0]).argmax(1) == content["labels"]
    table = accuracy_by_type(run.train.set_index("id").loc[content["ids"], "type"], correct)
    table.loc["all"] = [len(correct), correct.mean()]
    return table.astype({"rows": int})


def launch_missing(run: Run, rounds: Sequence, stages: Sequence[str]) -> None:
    """Start the workers of each round in which a stage is missing."""
    for jobs in rounds:
        if any(
            run.unfinished_folds(stage, [fold for _, part in jobs for fold in part])
            for stage in stages
        ):
            launch_workers(run, jobs, stages)


def run_folds(config: Config) -> list[FoldResult]:
    """Train and predict all folds of the run at `config.run_dir`, a worker per GPU, as `schedule_folds` says; resumable."""
    run = Run.open(config.run_dir)
    # Kaggle ends a session by the age of the notebook's process, however often this is called.
    started = (
        psutil.Process().create_time() if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else time.time()
    )
    atomic_write(run.directory / "session.json", json.dumps({"started": started}))
    devices, folds = worker_devices(config), config.folds_to_train
    # The weights are selected once all folds are trained: with several devices, by further rounds of workers.
    rounds = schedule_folds(folds, devices)
    scoring = ["predict"] + ["rescore"] * (config.score_precision == "16bit")
    order = [
        "train",
        *scoring,
    ]  # what a submission needs comes before scoring in 16 bits, for all folds
    for stages in [order] if len(rounds) == len(rounds[0]) == 1 else [[stage] for stage in order]:
        launch_missing(run, rounds, stages)
    if config.final_retrain:
        launch_missing(run, schedule_folds([run.final_fold], devices), ["train", *scoring])
    return [read_fold_result(run, fold) for fold in run.finished_folds]


# === Search =======================================================================================
SEARCH_STARTUP = 4  # trials that are drawn at random and not pruned, before the later ones are compared with them
NOT_SEARCHED = (
    BOOKKEEPING_FIELDS
    | {  # what decides the rows and folds, and what comes after training
        *(
            "n_folds",
            "use_kfold",
            "train_folds",
            "use_sample",
            "sample_size",
            "seed",
            "preset_name",
            "max_fallback_share",
        ),
        *(
            "use_tta",
            "tta_rotations",
            "tta_scales",
            "infer_max_pixels",
            "adaptive_tta",
            "use_batch_inference",
        ),
        *(
            "infer_batch_size",
            "zeroshot_rows",
            "use_temperature_scaling",
            "ensemble_method",
            "score_precision",
        ),
        *("mix_weights", "final_retrain", "distill_from", "distill_weight"),
    }
)


def search_distributions(config: Config, space: Mapping[str, list | tuple]) -> dict:
    """Optuna's distributions for [choices], (low, high) or (low, high, "log") of fields; ValueError names the field."""
    kinds = optuna.distributions
    fields = {
        item.name: item.type for item in dataclasses.fields(Config) if item.name not in NOT_SEARCHED
    }
    found = {}
    for name, values in space.items():
        if name not in fields:
            raise ValueError(
                f"Search space: {name!r} cannot be searched; fields that can: {', '.join(sorted(fields))}"
            )
        log = isinstance(values, tuple) and values[2:] == ("log",)
        if isinstance(values, list) and values:
            found[name] = kinds.CategoricalDistribution(values)
        elif (
            isinstance(values, tuple)
            and len(values) == 2 + log
            and all(type(end) in (int, float) for end in values[:2])
            and (0 if log else -math.inf) < values[0] < values[1]
        ):
            kind = (
                kinds.FloatDistribution if "float" in str(fields[name]) else kinds.IntDistribution
            )
            found[name] = kind(*values[:2], log=log)
        else:
            needed = '[choices], (low, high), or (low, high, "log") above 0'
            raise ValueError(f"Search space: {name!r} is {values!r}; it needs {needed}")
        # A value that the field refuses is found now, not hours later.
        for value in values[:2] if isinstance(values, tuple) else values:
            dataclasses.replace(config, **{name: value})
    return found


@dataclass
class TrialWatch:
    """Follows the epochs of a trial's fold 0, and says when its workers should stop."""

    trial: object  # optuna.Trial
    run: Run
    deadline: float  # of time.monotonic()
    losses: dict = field(default_factory=dict)  # epoch -> held-out NLL, as far as they count
    pruned: bool = False

    def look(self) -> bool:
        """Whether an epoch before the last is worse than the median of earlier trials; later epochs do not count."""
        path = self.run.fold_dir(0) / "history.csv"
        history = read_table(path) if path.exists() else pd.DataFrame(columns=["epoch", "nll"])
        for epoch, loss in zip(history["epoch"].map(int), history["nll"].map(float), strict=True):
            if not self.pruned and epoch not in self.losses:
                self.losses[epoch] = loss
                self.trial.report(loss, epoch)
                self.pruned = epoch < self.run.config.num_epochs and self.trial.should_prune()
        return self.pruned

    def stop(self) -> bool:
        return self.look() or time.monotonic() > self.deadline


def draw_trial(config: Config, distributions: Mapping, earlier: Sequence, path: Path):
    """The next trial, of an Optuna study in memory: a function of (seed, its number, earlier trials), or of `path`.

    `path`: config.json of a trial that was begun. Tree-structured Parzen estimator (Bergstra et al. 2011), pruning by
    the median."""
    seed = int(seeded_generator(config.seed, "trial", len(earlier)).integers(2**31))
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=SEARCH_STARTUP)
    study = optuna.create_study(sampler=sampler, pruner=optuna.pruners.MedianPruner(SEARCH_STARTUP))
    study.add_trials(earlier)
    if path.exists():
        settings = json.loads(path.read_text(encoding="utf-8"))["config"]
        study.enqueue_trial({name: settings[name] for name in distributions})
    return study.ask(distributions)


def run_trial(
    config: Config,
    competition: Competition,
    folds: np.ndarray,
    trial,
    folder: Path,
    deadline: float,
):
    """Train fold 0 with the trial's settings, as a run in `folder`; Optuna's record of it, None if the time was up."""
    place, states = (
        {"output_dir": str(folder), "run_name": f"trial_{trial.number:03d}"},
        optuna.trial.TrialState,
    )
    record = functools.partial(
        optuna.trial.create_trial,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=place,
    )
    try:
        settings = dataclasses.replace(
            config, **trial.params, train_folds=(0,), backup_dir=None, **place
        )
    except ValueError as error:  # each value is legal, these together are not
        LOGGER.warning("%s is left out: %s", place["run_name"], error)
        return record(state=states.FAIL)
    run = start_run(settings, competition, folds)
    watch = TrialWatch(trial, run, deadline)
    try:
        if not watch.look() and not run.is_done("train", 0):
            for jobs in schedule_folds([0], worker_devices(settings)):
                launch_workers(run, jobs, ["train"], watch.stop)
    except Interrupted:
        if not watch.look() and time.monotonic() <= deadline:
            raise  # somebody else has stopped it
    except RuntimeError as error:
        if not re.search("FloatingPointError|Out of GPU memory", str(error)):
            raise
        LOGGER.warning("%s diverged or has no room: %s", place["run_name"], trial.params)
        return record(state=states.FAIL)
    if watch.look():
        loss = watch.losses[max(watch.losses)]
        return record(state=states.PRUNED, value=loss, intermediate_values=watch.losses)
    if not run.is_done("train", 0):
        return None
    loss = min(scores["nll"] for scores in read_fold_result(run, 0).kinds.values())
    return record(state=states.COMPLETE, value=loss, intermediate_values=watch.losses)


def write_search(trials: Sequence, folder: Path) -> pd.DataFrame:
    """Write trials.csv and best_overrides.json; the table, where a pruned trial has the NLL of its last epoch."""
    rows = [
        {"trial": trial.number, "state": trial.state.name.lower(), "nll": trial.value}
        | {"epochs": len(trial.intermediate_values), **trial.params}
        for trial in trials
    ]
    table = pd.DataFrame(rows, columns=None if rows else ["trial", "state", "nll", "epochs"])
    table = table.sort_values(
        ["state", "nll"], kind="stable", ignore_index=True
    )  # complete, fail, pruned
    write_table(table, folder / "trials.csv")
    if complete := [trial for trial in trials if trial.state.name == "COMPLETE"]:
        best = min(complete, key=lambda trial: trial.value)
        atomic_write(folder / "best_overrides.json", json.dumps(best.params))
        LOGGER.info(
            "Best of %d trials: NLL %.4f, OVERRIDES = %s", len(trials), best.value, best.params
        )
    return table


def search_hyperparameters(
    config, competition, folds, space: Mapping, trials: int, minutes: float
) -> pd.DataFrame:
    """Search for the settings with the least NLL on fold 0's held-out rows; the table of all trials, the best first.

    `space`: config field -> [choices], (low, high) or (low, high, "log"). Ends with that many trials, or after so many
    minutes; called again, also after a kill, it goes on with the trial it was at. Everything lies in run_dir/search-*:
    each trial, a run of its own; trials.db, Optuna's storage; trials.csv; best_overrides.json. Needs Optuna."""
    if importlib.util.find_spec("optuna") is None:
        raise ImportError(
            "search_hyperparameters needs Optuna, which is not installed: pip install optuna"
        )
    if config.distill_from:
        raise ValueError(
            f"Config field 'distill_from': nothing to search by, {DISTILLED_WARNING}; search without it"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions, deadline = search_distributions(config, space), time.monotonic() + 60 * minutes
    key = hashlib.sha256(f"{config.fingerprint} {sorted(space.items())}".encode()).hexdigest()[:8]
    folder = config.run_dir.resolve() / f"search-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "search.lock", LOCK_SECONDS):
        study = optuna.create_study(
            storage=f"sqlite:///{folder / 'trials.db'}", study_name=key, load_if_exists=True
        )
        while True:
            for name in (
                trial.user_attrs["run_name"] for trial in study.trials
            ):  # gigabytes that nobody needs now
                for part in [
                    *(folder / name).glob("fold_0/checkpoints"),
                    *(folder / name).glob("fold_0/adapter_*"),
                ]:
                    shutil.rmtree(part)
            if len(study.trials) >= trials or time.monotonic() > deadline:
                return write_search(study.trials, folder)
            path = folder / f"trial_{len(study.trials):03d}" / "config.json"
            trial = draw_trial(config, distributions, study.trials, path)
            LOGGER.info("Search: trial %d of %d: %s", trial.number + 1, trials, trial.params)
            if done := run_trial(config, competition, folds, trial, folder, deadline):
                study.add_trial(done)  # written at once, whole or not at all
                LOGGER.info(
                    "Search: trial %d: %s, NLL %s",
                    trial.number + 1,
                    done.state.name.lower(),
                    done.value,
                )


# ======= 9. Command line ==========================================================================

# === Memory by computation ========================================================================
NOT_COMPUTED = "not computed for this family of models"


@dataclass(frozen=True)
class MemoryCosts:
    """GiB that training takes, computed from a model's shapes."""

    rows: dict[
        str, float
    ]  # weights without what rests on the CPU, LoRA and gradients, optimizer, averages
    tower: float  # on top of the weights while features are not cached
    loaded: float  # weights just after loading
    dequantize_weight: float  # the largest one while it is out of its 4 bits
    question: float  # for each question of a pass
    layer: float  # for each question and decoder layer that keeps its activations
    image_token: float  # of cached vision features, on disk or in RAM

    def peak(self, plan: MemoryPlan) -> dict[str, float]:
        """What is on the GPU in one pass of `plan`; one layer at a time is computed again anyway."""
        activations = self.dense_weight + plan.micro_batch * (
            self.question + max(1, plan.stored_layers) * self.layer
        )
        return self.rows | {"activations": activations}

    def table(self, plan: MemoryPlan, is_cached: bool, token_count: int) -> dict[str, dict]:
        """The computed GiB by row beside the measured sum, empty where nothing was measured."""
        computed = self.peak(plan)
        computed["weights"] += 0 if is_cached else self.tower
        computed["all of these"] = sum(computed.values())
        computed["vision features, on disk or in RAM"] = token_count * self.image_token
        measured = dict.fromkeys(computed, "") | {"all of these": round(plan.peak_gib, 2) or ""}
        return {"computed GiB": computed, "measured GiB": measured}

    def verdict(self, free: float) -> str:
        """Whether loading, and a pass over one question with all layers recomputed, fit into `free` GiB."""
        least = max(self.loaded, sum(self.peak(MemoryPlan(1, 0)).values()))
        text = f"{least:.1f} GiB for one question at a time, {free:.1f} GiB free"
        remedy = "choose a smaller model_id, quantization='4bit' or lower max_pixels"
        return text if least <= free else f"does not fit by computation: {text}; {remedy}"


def activation_bytes(config: Config, layer, number: int, compiled: bool) -> tuple[int, int, int]:
    """Bytes a token of a decoder layer's input, of all it keeps, and of its MLP's gradients; `number`: of one number"""
    attention, inner = layer.self_attn, layer.mlp.gate_proj.out_features
    hidden, queries = attention.q_proj.in_features, attention.q_proj.out_features
    normed = queries + attention.k_proj.out_features if hasattr(attention, "q_norm") else 0
    # The inputs of seven projections; after dropout each has its own, and a mask of one byte a number.
    inputs = (5 if config.lora_dropout else 2) * hidden + queries + inner
    # Besides: both residuals, the inputs of q_norm and k_norm, attention's q, k, v (under a mask as many heads as q)
    # and output, gate and up, LoRA's inner products; not compiled also silu(gate), and what is normed in fp32.
    kept = inputs + 2 * hidden + normed + 4 * queries + 2 * inner + 7 * config.lora_r
    kept += 0 if compiled else inner + 2 * hidden + normed
    return (
        number * hidden,
        number * kept + inputs * bool(config.lora_dropout),
        number * 2 * (hidden + inner),
    )


def memory_costs(
    config: Config, shapes, tokens: int, precision: str, compiled: bool
) -> MemoryCosts:
    """The memory of training on prompts of `tokens`, from the model's own configuration `shapes` and no weights."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(shapes)
    number, layers = getattr(torch, DTYPES[precision]).itemsize, model.model.language_model.layers
    linears = [module for name, module in model.named_modules() if re.fullmatch(LORA_TARGETS, name)]
    language = sum(linear.weight.numel() for linear in linears)
    head, tower = (
        model.get_output_embeddings().weight,
        model.get_submodule(f"model.{VISION_PREFIX}").num_parameters(),
    )
    head_rests = config.loss == "choices" and head is not model.get_input_embeddings().weight
    # NF4: half a byte, 8 bits of scale for 64 weights, 32 bits for 256 scales.
    packed = {"4bit": 1 / 2 + 1 / 64 + 4 / 64 / 256, "8bit": 1, "none": number}[config.quantization]
    loaded = language * packed + (model.num_parameters() - language) * number
    lora = 4 * config.lora_r * sum(linear.in_features + linear.out_features for linear in linears)
    scales = 4 * language / 64 if config.quantization == "4bit" else 0
    weights = (
        loaded
        - number * (tower + head.numel() * head_rests)
        + scales * (scales <= MAX_UNPACKED_SCALE_BYTES)
    )
    rows = {"weights": weights, "LoRA and gradients": 2 * lora}
    rows |= {"optimizer": 2 * lora, "averages": (config.use_ema + config.use_swa) * lora}
    entry, kept, gradients = activation_bytes(config, layers[0], number, compiled)
    vision = shapes.vision_config
    feature = (
        number * vision.out_hidden_size * (1 + len(getattr(vision, "deepstack_visual_indexes", ())))
    )
    question, dense = (
        tokens * (len(layers) * entry + gradients),
        number * max(part.weight.numel() for part in linears),
    )
    costs = (number * tower, loaded, dense, question, tokens * (kept - entry), feature)
    return MemoryCosts(
        {name: value / 2**30 for name, value in rows.items()}, *(value / 2**30 for value in costs)
    )


def expected_memory(config: Config, frame: pd.DataFrame) -> MemoryCosts | None:
    """The memory of training on the longest of these rows, before a weight is loaded; None for an unusual family."""
    processor, runtime = (
        load_processor(config),
        detect_runtime(config.precision, config.attn_implementation),
    )
    shapes = transformers.AutoConfig.from_pretrained(
        config.model_path, trust_remote_code=config.trust_remote_code
    )
    if FAMILIES.get(shapes.model_type) != Family():
        return None  # what recurrent layers and experts keep has not been measured
    budget, templates = pixel_budget(config, processor), prompt_templates(config)
    tokens = max(
        len(
            encode_prompt(
                processor,
                build_messages(row, templates=templates),
                image_grid(*size, processor, budget),
            )
        )
        for row, size in zip(
            frame.to_dict("records"), frame[["width", "height"]].to_numpy(), strict=True
        )
    )
    compiled, _ = decide_compile(
        config.compile_layers, "cuda" if runtime.gpus else "cpu", len(frame)
    )
    return memory_costs(config, shapes, tokens, runtime.precision, compiled)


# === Preflight ====================================================================================
def count_image_tokens(
    config: Config, competition: Competition, processor
) -> tuple[dict[str, list[int]], int]:
    """Of each row's image by split; and of all features to keep: each image once, a training image's variants, too."""
    budget, merged, tokens = (
        pixel_budget(config, processor),
        processor.image_processor.merge_size**2,
        {},
    )
    for name, table in {"train": competition.train, "test": competition.test}.items():
        sizes = zip(table["width"], table["height"], strict=True)
        tokens[name] = [math.prod(image_grid(*size, processor, budget)) // merged for size in sizes]
    trained = dict(zip(competition.train["pixel_hash"], tokens["train"], strict=True))
    images = trained | dict(zip(competition.test["pixel_hash"], tokens["test"], strict=True))
    return tokens, sum(images.values()) + config.augment_images * sum(trained.values())


def preflight(config: Config, rows: int = 64) -> dict:
    """Try everything once on `rows` training rows before hours are spent: the facts learned, for a table."""
    competition = load_competition(
        config.data_dir, config.max_fallback_share, config.rows_to_use, config.seed
    )
    count = len(competition.train)
    frame = competition.train.sample(min(rows, count), random_state=config.seed, ignore_index=True)
    costs = expected_memory(config, frame)
    free, more = free_gib(), {}
    if config.score_precision == "16bit":
        more["scoring in 16 bits"] = fits_in_16_bits(config, free)[1]
        LOGGER.info("Scoring in 16 bits: %s", more["scoring in 16 bits"])
    try:
        session = open_session(config, frame.iloc[0])
    except torch.OutOfMemoryError as error:
        error.add_note(f"Memory: {costs.verdict(free) if costs else NOT_COMPUTED}")
        raise
    prompts = [make_prompt(session, frame, row, [(0, 1, 2, 3)]) for row in range(len(frame))]
    fill_vision_cache(
        session, frame, len(config.folds_to_train) * (config.num_epochs + 2), passes=3
    )
    start = time.perf_counter()
    probabilities = softmax(predict_logits(session, frame, [TTAView("rotation 0")])[:, 0])
    score_seconds = (time.perf_counter() - start) / len(frame)
    model = use_fast_layers(
        session, attach_lora(session.model, config, config.seed), questions=len(frame)
    ).train()
    parameters = trainable_parameters(model).values()
    copies = 2 + config.use_ema + config.use_swa
    plan = plan_memory(session, prompts, copies * sum(value.nbytes for value in parameters))
    recompute_layers(session, plan.stored_layers)
    longest = sorted(prompts, key=lambda prompt: -len(prompt.input_ids))[: plan.micro_batch]
    for _ in range(2):  # the second one is timed
        start = time.perf_counter()
        batch = collate(session, longest)
        training_loss(session, answer_hidden_states(session, batch), batch).backward()
        if not all(
            value.grad.isfinite().all() for value in parameters
        ):  # this waits for the GPU, too
            raise FloatingPointError(
                "A training step on these rows gives gradients that are not finite"
            )
        step_seconds = (time.perf_counter() - start) / len(longest)
    model.unload()
    folds, views = len(config.folds_to_train), all_views(config, session.processor)
    trained = count * ((1 - 1 / config.n_folds) * folds + config.final_retrain) * config.num_epochs
    scored = (folds + config.final_retrain) * len(competition.test) * adaptive_cost(session, views)
    scored += folds * count / config.n_folds * views_cost(session, views)
    scored *= 2 if more and not more["scoring in 16 bits"].startswith("does not fit") else 1
    tokens, features = count_image_tokens(config, competition, session.processor)
    is_cached = session.vision_cache.has_all(prompt.image_key for prompt in prompts)
    return {
        "letter tokens": " ".join(
            f"{c}={list(ids)}" for c, ids in zip(CHOICES, session.letter_token_ids, strict=True)
        ),
        "prompt": render_prompt(
            session.processor, build_messages(frame.iloc[0], templates=prompt_templates(config))
        ),
        "tokens per prompt": f"at most {max(len(prompt.input_ids) for prompt in prompts)}",
        "token_budget": pixel_budget(config, session.processor)[1]
        // merged_patch_area(session.processor),
        "token_counts": tokens,
        "trainable parameters": f"{sum(value.numel() for value in parameters):,}",
        "seconds per training question": round(step_seconds, 3),
        "seconds per scored question": round(score_seconds, 4),
        "zero-shot accuracy": f"{accuracy(probabilities, frame['label'].to_numpy()):.2f} on {len(frame)} rows",
        "memory plan": f"{plan.micro_batch} of {config.batch_size * config.grad_accum_steps} questions in a pass, "
        f"{plan.stored_layers} of {len(session.decoder_layers)} layers keep activations, {plan.peak_gib:.1f} GiB",
        "memory needed": costs.verdict(free) if costs else NOT_COMPUTED,
        "memory": costs.table(plan, is_cached, features) if costs else {},
        "peak memory": str(memory_summary()),
        "estimated minutes on one device": round(
            (trained * step_seconds + scored * score_seconds) / 60, 1
        ),
        **more,
    }


def run_preflight(config: Config) -> dict:
    """`preflight` in a process of its own, so that the notebook's never touches the GPU; raises with its last lines."""
    command = [
        sys.executable,
        __file__,
        "preflight",
        "--config",
        json.dumps(dataclasses.asdict(config)),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, encoding="utf-8")
    if done.returncode != 0:
        raise RuntimeError(
            "Preflight failed:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        )
    return json.loads(done.stdout.splitlines()[-1])


# === Worker and command line ======================================================================
def stay_offline(config: Config) -> None:
    """Before transformers is imported: where the model is a local folder, this process asks the hub for nothing."""
    if Path(config.model_path).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"


@contextlib.contextmanager
def worker_directory(directory: Path, folds: Sequence[int]) -> Iterator[Path]:
    """The run directory; for a team's further processes a copy to be thrown away, so that only the first one writes."""
    if os.environ.get("RANK", "0") == "0":
        yield directory
        return

    def of_other_folds(folder: str, names: Sequence[str]) -> list[str]:
        foreign = Path(folder).name.startswith("fold_") and Path(folder).name not in {
            f"fold_{fold}" for fold in folds
        }
        return [
            name
            for name in names
            if name.endswith((".lock", ".tmp")) or (foreign and name != "result.json")
        ]

    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / directory.name
        shutil.copytree(directory, copy, ignore=of_other_folds)
        content = json.loads((copy / "config.json").read_text(encoding="utf-8"))
        content["config"]["output_dir"] = place
        atomic_write(copy / "config.json", json.dumps(content))
        before = len(read_json_lines(copy / "events.jsonl"))
        try:
            yield copy
        finally:  # what did not go to plan here belongs into the report, too
            for record in read_json_lines(copy / "events.jsonl")[before:]:
                MetricLogger(directory / "events.jsonl").log(event=record["event"])


def run_worker(
    run: Run, folds: Sequence[int], stages: Sequence[str], progress: ProgressFile
) -> None:
    """What a worker process does; ends it with status 75 after a request to stop."""
    setup_logging(run.directory, run.config.log_level, run.config.log_to_file)
    stay_offline(run.config)
    try:
        with run.lock_folds(folds):
            run_stages(run, folds, stages, progress.update)
    except Interrupted as error:
        LOGGER.warning("%s", error)
        sys.exit(INTERRUPTED)
    finally:
        if rank_and_world_size()[1] > 1:
            torch.distributed.destroy_process_group()


def main() -> None:
    """Command line: `worker` (what run_folds starts) and `preflight` (settings from --config or the VQA_ variables)."""
    parser = argparse.ArgumentParser(prog="vqa_helpers.py")
    commands = parser.add_subparsers(dest="command", required=True)
    worker = commands.add_parser("worker", help="run stages of a prepared run directory")
    worker.add_argument("--run", required=True, help="run directory")
    worker.add_argument("--folds", required=True, help="comma-separated fold numbers")
    worker.add_argument(
        "--stages", default="train,predict", help=f"comma-separated, from {', '.join(STAGES)}"
    )
    worker.add_argument("--name", default="0", help="number of the worker, for its progress file")
    worker.add_argument(
        "--parent", type=int, default=0, help="stop, saving all, when this process ends; 0: do not"
    )
    check = commands.add_parser("preflight", help="try everything once on a few rows")
    check.add_argument(
        "--config", help="JSON object of config fields; default: preset auto and the VQA_ variables"
    )
    options = parser.parse_args()
    if options.command == "preflight":
        config = Config(**json.loads(options.config)) if options.config else load_config()
        stay_offline(config)
        with tempfile.TemporaryDirectory() as folder:  # no features of few rows in the run's cache
            facts = preflight(dataclasses.replace(config, cache_dir=folder))
        sys.stdout.write(markdown_table(pd.DataFrame(facts["memory"])) + "\n")
        sys.stdout.write(json.dumps(facts, ensure_ascii=False) + "\n")
        return
    folds, stages = [int(fold) for fold in options.folds.split(",")], options.stages.split(",")
    progress = ProgressFile(Path(options.run) / f"progress_{options.name}.json", options.parent)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, progress.request_stop)
    hide_other_gpus()
    with worker_directory(Path(options.run), folds) as directory:
        init_process_group()
        run_worker(Run.open(directory), folds, stages, progress)


__all__ = [
    key
    for key, item in globals().items()
    if callable(item) and item.__module__ == __name__ and key[0] != "_"
]
if __name__ == "__main__":
    main()
