"""Multiple-choice visual question answering, from competition files to a submission.

The notebook calls what is in here. The notebook's own process reads tables, makes plans and
draws plots; whatever touches a GPU happens in worker processes, which this same file starts
(`python vqa_helpers.py worker ...`). Importing it has no effect: nothing is seeded, logged or
moved to a GPU, and torch and other large libraries are imported at their first use.

The map: nine parts, their sections, and what each is about. A section uses only what stands
above it.

1. Foundations
   Exceptions                          this file's own kinds of error, and any error in words
   Finding data and models             what is attached here, and which of it is a competition
   Packages                            what has to be installed, and installing it
   Runtime                             platform, GPUs, number format, attention, seeds
   Presets                             what "auto" picks, and how presets differ from the defaults
   Declarations                        what is declared of a setting: bounds, and what it changes
   Settings                            every setting, declared once, by group: data to training
   Settings of scoring and places      the other groups
   Rules of settings                   what each needs, and which of them do not go together
   Config                              all settings of one run, checked, as tables and as text
   Logging                             the log, and records of one JSON object a line
   Files                               writing whole files or none, hashes, arrays
   Checkpoints                         folders that are committed whole and verified before use
   Memory                              how much memory is used, and how much is free
   Processes that work together        ranks, sums, progress files, ends of processes, prefetching
   Results by batch                    kept as soon as they are there, and not made again
2. Data
   Archives                            unpacking a competition whole or not at all
   Settings of a session               preset, overrides and environment variables become one Config
   Texts                               as they are compared, and as they stand in the prompt
   Looks of choices                    colours, small numbers, sides, yes and no
   Words of Korean questions           the noun that is asked for
   Korean questions                    their interrogatives, and what each asks for
   English questions                   the same in English
   Questions                           their types, choices and targets
   Columns                             which column of a file is which
   Tables                              CSV files, read verbatim and checked row by row
   Answers                             what answers mean, and how a competition writes them
   Paths and folders                   what a table's paths mean, and what is in folders
   Image places                        where a row's image lies, and where else it may
   Damaged images                      what can be saved of PNG and JPEG files, and formats by name
   Images                              decoding, hashing
   Competition                         all tables of one competition, validated
   Context                             words beside the image: a column, or a file by id
   Writing a competition               a table of one's own as a folder like a competition's
   Leakage and folds                   copies of images, and folds that keep them together
   Known answers                       test rows that equal a training row
   Augmentation                        mildly changed copies of training images
3. Model
   Patch grids                         Qwen's images: tokens, pixel inputs, positions, features
   Tiles                               InternVL's images: the same
   Families                            what differs between families of models
   Prompt                              texts, chat messages, and the tokens of the letters
   Stored formats                      checkpoints that are quantised already
   Models over several GPUs            which part of a model lies on which GPU
   Loading                             processor and base model, quantised or not
   Downloads                           how much of a model has arrived, and what if no more comes
   Adapters                            LoRA on the language model, fresh or from a file
   Image tokens                        pixel budget; an image's grid, tokens, pixel inputs
   Vision cache                        features of the frozen vision tower, computed once
   Gated delta rule                    what Qwen3.5's recurrent layers compute, in chunks
   Recurrent layers                    choice orders go on from the state of their common prefix
   Recurrent kernels                   where flash-linear-attention is used, and whether it works
   Session                             what a worker loads once
   Batches                             tokenised questions, padded together
   Scores and loss                     a batch's scores of the four letters, and the loss on them
   LoRA layers                         LoRA without fp32 copies
   Remade activations                  what a decoder layer keeps, and what it makes again
   Frugal layers                       their pass in three steps, for autograd
   Fast layers                         compiled decoder layers
   Memory plan                         how a training step is spread over passes
   Filling the vision cache            when it pays, and for which images
   Alignment                           how well statements fit an image, by SigLIP or CLIP
4. Run
   Members                             the models of a run: one for each fold and each seed
   Run directory                       the files of one run, and what is done in it
   Rows of a run                       what a fold trains on, by file
   Backup                              a copy on a slow, lasting disk
5. Training and inference
   Metrics                             accuracy, NLL, calibration error, collapse
   Choice orders                       the four rotations, and balanced sets of more orders
   Views                               orders, image scales and models, and what they cost
   Prediction                          scores of every row in every view
   Rows in doubt                       more views, step by step, where an answer leads by little
   Early stopping and weight averages  for any training loop
   Epochs                              the rows and steps of each, and how a row is shown
   Optimizer steps                     what a step needs, and going on when memory runs out
   Fold state                          a fold's rows, adapter and progress; what a checkpoint holds
   Fold training                       one fold from a fresh adapter to its result
6. Evidence
   Calibration                         temperatures, cross-fitted
   Intervals and paired tests          how sure a gain is
   Ensembles                           votes, means, weights, stacks
   Automatic choice                    another candidate than the mean, only where it clearly wins
   Out-of-fold rows                    their scores and costs, and the sets of views that they admit
   Skill                               whether a model knows more than a guess
   Selected weights                    raw, EMA or SWA: one decision for all folds
   Curve of doubt                      what more views for the rows in doubt buy, by cost
   Ladder                              what each step from zero-shot to submission is worth
   Base member                         the untouched base model, mixed in where OOF prefers it
   Alignment as a member               its scores added, with a weight, where OOF prefers it
   Evaluation                          every decision that is taken on out-of-fold rows
   Test answers                        the models' probabilities, and the ensemble's answers
   Errors                              where the model is wrong, and which rows are worth a look
   Verdict                             the score to expect, alarms, and what to try next
   Figures                             plots of what was computed above
   Tables for people                   HTML and Markdown
   Experiments                         one row for each finished run
   Report                              report.md
7. Submission and several runs
   Submission                          written, read back, checked
   Submissions of a run                its two files, and which two to choose at the end
   Ensembles of runs                   several finished runs as one submission
   Comparing submissions               where two differ, and how far the errors of runs overlap
   Related competitions                training rows of other folders
   Soft targets                        votes and other runs' probabilities as targets
   Damaged files                       what cannot be read any more is made anew
   Starting a run                      a new run directory, or the one to continue
8. Running
   Final model                         one more model, on all rows; `train_fold`, for any fold or it
   Stages                              zero-shot, prediction, scoring by the base model
   Running stages                      what is missing of folds, in the time that is left
   Devices and jobs                    which device takes which folds, round by round
   Workers                             processes on devices; `run_zeroshot` and `run_folds`
   Processes beside a run              one that works on a prepared folder, and how it ends
   Transcripts                         what the base model reads in the images, as context
   Alignment scores                    of every row, in a process; the images that fit worst
   Search                              settings tried on one fold
9. Command line
   Memory by computation               from a model's shapes, before it is loaded
   Prompt lengths                      of every row, beside what the model and the memory take
   Time estimate                       of a whole run, from the seconds of its steps
   Trying a model                      each step of a run, on a few rows and the longest, timed
   Preflight                           five minutes before hours
   Worker and command line             what the processes run

Where to change what:

   a setting                           Settings (`searched=False`: not for a search); rules
                                       between settings: Rules of settings
   a score                             Metrics `SCORES`, `score_row`; if a vote has none of it:
                                       Ladder `ladder_table`
   a family of models                  Families `FAMILIES`; other images: a class like those of
                                       Patch grids and Tiles; other layers: Recurrent layers,
                                       Memory by computation; its twin: tests/twins.py
   a kind of view                      Settings; Views (also `DOUBT_STEPS`); Prediction
                                       `group_views_by_prompt`; Out-of-fold rows `cost`
   an item of a checkpoint             Fold state
   a prompt                            Prompt; number of wordings: Settings; a chat template's
                                       switch for not thinking: `_RENDERINGS`
   a question type                     `QUESTION_TYPES`; Korean questions, English questions;
                                       its hint: Prompt
   a preset                            Presets; notebook and README list the names
   a kind of archive                   Finding data and models; Archives
   another name of a column            Columns `COLUMN_ALIASES`
   a way to write answers              Answers `ANSWER_KINDS`
"""

from __future__ import annotations

import argparse
import base64
import bisect
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
import textwrap
import threading
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
from typing import NamedTuple

import filelock
import numpy as np
import pandas as pd
import psutil
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from PIL import ExifTags, Image, ImageChops
from scipy import special
from scipy.optimize import minimize, minimize_scalar
from scipy.sparse import coo_matrix, triu
from scipy.sparse.csgraph import connected_components
from scipy.stats import binomtest
from tqdm import tqdm

__version__ = "0.3.0"  # the notebook asks for exactly this one

CHOICES = ("a", "b", "c", "d")  # columns of the tables, and the letters that answer
COLUMNS = ("id", "path", "question", *CHOICES, "answer")  # of the competition's tables
CONTEXT_COLUMN = "context"  # of tables that have it: words beside the image
VOTE_COLUMNS = ("answer1", "answer2", "answer3", "answer4", "answer5")  # of dev.csv
QUESTION_TYPES = (
    "counting",
    "color",
    "ocr",
    "yesno",
    "location",
    "attribute",
    "general",
)
HERE = Path(__file__).resolve().parent
DEMO = (HERE / "data").resolve()  # the built-in demo's competition files and model
LOGGER = logging.getLogger("vqa")


class _LazyModule(ModuleType):
    """A module that is imported at its first use.

    So the notebook's own process plans and plots without ever loading torch.
    """

    def __getattr__(self, attribute: str):
        module = importlib.import_module(self.__name__)
        return getattr(module, attribute)


torch = _LazyModule("torch")
transformers = _LazyModule("transformers")
fla_rules = _LazyModule("fla.ops.gated_delta_rule")
peft = _LazyModule("peft")
accelerate_hooks = _LazyModule("accelerate.hooks")
bnb_functional = _LazyModule("bitsandbytes.functional")
bnb_nn = _LazyModule("bitsandbytes.nn")
bnb_parametrize = _LazyModule("bitsandbytes.nn.parametrize")
bnb_loading = _LazyModule("transformers.integrations.bitsandbytes")
quantizers = _LazyModule("transformers.quantizers.auto")
safetensors = _LazyModule("safetensors")  # section 1 may replace the one that is on disk
safetensors_torch = _LazyModule("safetensors.torch")
optuna = _LazyModule("optuna")
vision_process = _LazyModule("qwen_vl_utils.vision_process")


# ======= 1. Foundations ===========================================================================


# === Exceptions ===================================================================================
class CheckpointError(RuntimeError):
    """A checkpoint is damaged or belongs to another configuration."""


class DamagedFileError(CheckpointError):
    """A file of a run cannot be read as this module wrote it; the message names it."""

    def __init__(self, path: Path, problem: object):
        lines = str(problem).splitlines() or [type(problem).__name__]
        self.problem = f"{path} cannot be read ({lines[0][:200]})"
        super().__init__(f"{self.problem}; delete it and run again to make it anew")


class DataError(ValueError):
    """The competition's files cannot be used as they are.

    The message names file, line, column, value and remedy.
    """


class ImageError(DataError):
    """An image cannot be used; the message names its path."""


class TemplateError(ValueError):
    """The chat template breaks the alignment of training prompt and inference prompt."""


class SubmissionError(ValueError):
    """The competition would reject this submission or score it wrongly."""


class Interrupted(RuntimeError):
    """A worker was asked to stop and did so at a safe point: what it had done is saved."""


class OutOfTime(Interrupted):
    """The time budget ends in the training of the model on all rows.

    A later session continues it.
    """


def error_in_words(error: Exception) -> str:
    """The kind of an error and the first line of its message, for a message of our own.

    >>> error_in_words(OSError("no such device\\nmore about it"))
    'OSError: no such device'
    """
    return f"{type(error).__name__}: {error}".splitlines()[0]


# === Finding data and models ======================================================================
# Where platforms attach data, and how many levels of folders are searched there.
MOUNTS = {
    "/kaggle/input": 6,
    "/content": 1,
    "/content/drive/MyDrive": 1,
}
COMPETITION_FILES = ("train.csv", "test.csv", "sample_submission.csv")
ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")  # what `_open_archive` opens
DEMO_MARK = "make_demo.py"  # a folder or archive with this file is a copy of our demo


def walk_mounts(
    mounts: Mapping[str, int] | None = None,
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield each folder with the names of its subfolders and files, as os.walk does.

    `mounts` says which folders are searched, and how many levels deep; None takes MOUNTS. Copies
    of our demo are left out. Who clears the list of subfolders keeps the walk out of them.
    """
    if mounts is None:
        mounts = MOUNTS
    for mount, depth in mounts.items():
        for folder, subfolders, files in os.walk(mount, followlinks=True):
            is_demo = DEMO_MARK in files and folder != mount
            level = len(Path(folder).relative_to(mount).parts)
            if is_demo or level >= depth:
                subfolders.clear()
            subfolders.sort()
            if not is_demo:
                yield Path(folder), subfolders, files


@dataclass(frozen=True)
class _ArchiveMember:
    """What a .zip or .tar archive says about one of its members."""

    name: str
    size: int  # bytes, unpacked
    is_plain: bool  # a file or a folder, as far as is known; neither a link nor a device


def _open_archive(
    archive: Path, zip_encoding: str | None = None
) -> zipfile.ZipFile | tarfile.TarFile:
    """The archive, open for reading.

    `zip_encoding` is that of names in a .zip which are not marked as UTF-8; None: cp437, in
    which any byte is a character.
    """
    if zipfile.is_zipfile(archive):
        return zipfile.ZipFile(archive, metadata_encoding=zip_encoding)
    return tarfile.open(archive)


def _archive_members(opened: zipfile.ZipFile | tarfile.TarFile) -> Iterator[_ArchiveMember]:
    """The members in their order, each read when it is asked for."""
    if isinstance(opened, tarfile.TarFile):
        for member in opened:
            is_plain = member.isfile() or member.isdir()
            yield _ArchiveMember(member.name, member.size, is_plain)
        return
    for member in opened.infolist():
        unix_kind = member.external_attr >> 28  # 4: folder, 8: file, 0: not given
        yield _ArchiveMember(member.filename, member.file_size, unix_kind in (0, 4, 8))


def holds_competition(archive: Path) -> bool:
    """Whether the competition's files, and not those of our demo, are in this archive.

    Raises DataError where it cannot be read.
    """
    try:
        with _open_archive(archive) as opened:
            LOGGER.info("Looking for the competition in %s", archive)
            files = {Path(member.name).name for member in _archive_members(opened)}
    except Exception as error:  # each format and each decoder raises its own
        raise DataError(
            f"{archive}: not readable ({error_in_words(error)}); download it again, or remove it"
        ) from error
    return files.issuperset(COMPETITION_FILES) and DEMO_MARK not in files


def list_competitions(mounts: Mapping[str, int] | None) -> list[Path]:
    """Folders that hold the competition's three files, sorted.

    Only where there is no such folder: the archives that hold them. `mounts` is as in walk_mounts.
    """
    competitions = []
    archives = []
    for folder, subfolders, files in walk_mounts(mounts):
        if set(files).issuperset(COMPETITION_FILES):
            competitions.append(folder.resolve())
            subfolders.clear()  # thousands of images, and no competition among them
        for name in files:
            if name.lower().endswith(ARCHIVE_ENDINGS):
                archives.append(folder / name)
    if competitions:
        return sorted(competitions)
    return sorted(filter(holds_competition, archives))


def named_folder(data_dir: str | Path) -> Path:
    """The folder or archive that a user names: `~` is the home folder, a table means its folder.

    >>> str(named_folder("/data/vqa/train.csv"))
    '/data/vqa'
    """
    path = Path(os.path.expanduser(data_dir))
    is_table = path.suffix.lower() in (".csv", ".tsv") and not path.is_dir()
    return path.parent if is_table else path


def locate_competition(data_dir: str | Path | None = None) -> Path:
    """The competition's folder, or the archive that holds it.

    With `data_dir` it is that archive, or is searched in that folder, or in that of a table;
    else it is searched in MOUNTS, and the built-in demo takes its place where nothing is
    attached. Raises ValueError where there are several, FileNotFoundError where there is none,
    not even the demo.
    """
    if data_dir is not None:
        data_dir = named_folder(data_dir)
        if data_dir.is_file():
            return data_dir
    mounts = None if data_dir is None else {str(data_dir): 4}
    found = list_competitions(mounts)
    remedy = "set data_dir in OVERRIDES (or VQA_DATA_DIR) to"
    if len(found) > 1:
        kind = "folders" if found[0].is_dir() else "archives"
        paths = [str(path) for path in found]
        raise ValueError(f"Several {kind} hold a competition: {paths}; {remedy} one of them")
    if found:
        return found[0]
    if data_dir is not None:
        absent = [name for name in COMPETITION_FILES if not (data_dir / name).is_file()]
        raise FileNotFoundError(
            f"{data_dir} has no {', '.join(absent)}; {remedy} the folder or archive that has them"
        )
    nothing = f"No folder or archive in {', '.join(MOUNTS)} has {', '.join(COMPETITION_FILES)}"
    if not DEMO.is_dir():
        raise FileNotFoundError(
            f"{nothing}: attach the competition (Kaggle: Add Input), or {remedy} where it is"
        )
    LOGGER.info("%s: the built-in demo runs", nothing)
    return DEMO


# === Packages =====================================================================================
# What a plain Kaggle or Colab machine lacks, as in requirements.txt.
MINIMUM_VERSIONS = {
    "transformers": "5.18",  # takes mm_encoder_outputs, which the vision cache needs
    "peft": "0.20",
    "bitsandbytes": "0.50",  # 0.46 to 0.49 fail on experts in 4 bits
    "accelerate": "1.6",
    "qwen-vl-utils": "0.0.14",
}
# Nothing here uses torchao. But where one is installed, as on Kaggle and Colab, peft imports it,
# and refuses to work with one below 0.16; 0.17 and 0.18 import what older versions of torch lack,
# without saying so in their requirements. Loading a model with LoRA was tried: 0.16 works with
# torch 2.6 to 2.14, 0.17 from 2.7 on, 0.18 from 2.10 on. So 0.16 is what is asked for.
TORCHAO = "torchao>=0.16,<0.17"
TORCHAO_BY_TORCH = (  # from this torch on, these versions work; the first row that fits
    (Version("2.10"), SpecifierSet(">=0.16")),
    (Version("2.7"), SpecifierSet(">=0.16,<0.18")),
    (Version("0"), SpecifierSet(">=0.16,<0.17")),
)
# Libraries whose modules say the version that was loaded: module -> package.
LIBRARIES = {
    "PIL": "pillow",
    "accelerate": "accelerate",
    "bitsandbytes": "bitsandbytes",
    "huggingface_hub": "huggingface-hub",
    "numpy": "numpy",
    "pandas": "pandas",
    "peft": "peft",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "tokenizers": "tokenizers",
    "transformers": "transformers",
}
RESTART = (
    "restart the session (Kaggle: Run > Restart, Colab: Runtime > Restart session) "
    "and press Run all; what was installed stays"
)


@dataclass(frozen=True)
class ReplacedPackage:
    """A package of which this process has loaded another version than the one on disk."""

    name: str
    loaded: str  # version
    installed: str  # version


def _version_on_disk(name: str) -> str:
    """The version of a package as its metadata have it; "0" where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "0"


def installed_version(name: str) -> Version:
    """The version of a package, found without importing it; 0 where it is not installed."""
    return Version(_version_on_disk(name))


def torchao_fits(torchao: Version, torch_version: Version) -> bool:
    """Whether peft takes this torchao, and this torch has what it imports.

    >>> torchao_fits(Version("0.18.0"), Version("2.10.0"))
    True
    >>> torchao_fits(Version("0.18.0"), Version("2.8.0+cu126"))
    False
    """
    works = next(works for lowest, works in TORCHAO_BY_TORCH if torch_version >= lowest)
    return works.contains(torchao, prereleases=True)


def missing_requirements(minimum: Mapping[str, str] = MINIMUM_VERSIONS) -> list[str]:
    """pip requirements for every package that is absent or too old.

    torchao counts only where one is installed that does not fit.

    >>> missing_requirements({"numpy": "1.0", "no-such-package": "1.2"})
    ['no-such-package>=1.2']
    """
    missing = [
        f"{name}>={version}"
        for name, version in minimum.items()
        if installed_version(name) < Version(version)
    ]
    torchao = installed_version("torchao")
    is_there = torchao > Version("0")
    if is_there and not torchao_fits(torchao, installed_version("torch")):
        missing.append(TORCHAO)
    return missing


def _versions_of_loaded_packages() -> dict[str, str]:
    """Package -> version on disk, of every package of which a module is loaded."""
    packages = set()
    for module, names in importlib.metadata.packages_distributions().items():
        if module in sys.modules:
            packages.update(canonicalize_name(name) for name in names if name)
    return {name: _version_on_disk(name) for name in sorted(packages)}


def _replaced_on_disk(before: Mapping[str, str]) -> list[ReplacedPackage]:
    """The packages whose version on disk is no longer the one of `before`."""
    now = {name: _version_on_disk(name) for name in before}
    return [
        ReplacedPackage(name, version, now[name])
        for name, version in before.items()
        if now[name] != version
    ]


def _replaced_libraries() -> list[ReplacedPackage]:
    """The loaded libraries that say another version than the one on disk."""
    replaced = []
    for module, name in LIBRARIES.items():
        loaded = getattr(sys.modules.get(module), "__version__", None)
        installed = installed_version(name)
        if loaded is None or installed == Version("0"):
            continue
        if Version(loaded).public != installed.public:
            replaced.append(ReplacedPackage(name, loaded, str(installed)))
    return replaced


def _refuse_old_modules() -> None:
    """Raises RuntimeError where a loaded library is older than what this module needs."""
    for name, version in MINIMUM_VERSIONS.items():
        module = sys.modules.get(name.replace("-", "_"))
        loaded = getattr(module, "__version__", version)  # what is not loaded cannot be too old
        if Version(loaded) < Version(version):
            raise RuntimeError(f"{name} {loaded} was loaded before {version} was there: {RESTART}")


def _warn_of_replaced_packages(before: Mapping[str, str]) -> None:
    """Say which loaded packages were replaced on disk; `before`: their versions before pip."""
    found = [*_replaced_on_disk(before), *_replaced_libraries()]
    replaced = {package.name: package for package in found}  # most are found in both ways
    if not replaced:
        return
    versions = [
        f"{package.name} ({package.loaded} is loaded, {package.installed} is installed)"
        for package in replaced.values()
    ]
    LOGGER.warning(
        "Replaced while loaded in this session: %s. Run all works, because models are trained "
        "in processes of their own. What you import yourself in this notebook from now on may "
        "fail, as `import peft` or loading a model. The cure: %s.",
        ", ".join(versions),
        RESTART,
    )


def install_requirements() -> list[str]:
    """pip install what is missing, and return its requirements.

    A warning names the packages that are loaded in this process in another version than the one
    that is installed now. Raises RuntimeError with the way out where pip fails, or where a loaded
    one is too old.
    """
    missing = missing_requirements()
    before = _versions_of_loaded_packages() if missing else {}
    if missing:
        pip_install(missing)
    _refuse_old_modules()
    _warn_of_replaced_packages(before)
    return missing


def _find_wheels() -> str | None:
    """The folder that VQA_WHEELS names, else the first attached one that is called `wheels`.

    None where there is neither; an attached one without wheels in it does not count.
    """
    named = os.environ.get("VQA_WHEELS")
    if named:
        return os.path.expanduser(named)
    for folder, _, files in walk_mounts():
        if folder.name == "wheels" and any(".whl" in name for name in files):
            return str(folder)
    return None


def _download_command(requirements: Sequence[str]) -> str:
    """The command that makes, where there is internet, a folder of wheels for Kaggle."""
    quoted = " ".join(json.dumps(requirement) for requirement in requirements)
    return (
        "pip download -d wheels --only-binary=:all: --python-version 3.12 "
        "--platform manylinux2014_x86_64 "
        "--platform manylinux_2_24_x86_64 "
        "--platform manylinux_2_28_x86_64 "
        f"{quoted}"
    )


def pip_install(requirements: Sequence[str]) -> None:
    """Install from VQA_WHEELS or an attached folder `wheels`, else from the internet.

    What pip says of other packages is logged: those that wanted another version of what was
    installed. Raises RuntimeError with the ways to go on, and the last lines of what pip said.
    """
    wheels = _find_wheels()
    if wheels and not Path(wheels).is_dir():
        raise RuntimeError(
            f"VQA_WHEELS is {wheels!r}, and there is no such folder, for "
            f"{', '.join(requirements)}: correct it, or unset it to install from the internet"
        )
    source = ["--no-index", "--find-links", wheels] if wheels else []
    command = [sys.executable, "-m", "pip", "install", "--quiet", *source, *requirements]
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    if finished.returncode == 0:
        conflicts = re.findall(r"^.+ requires .+, but you have .+$", finished.stderr, re.M)
        if conflicts:
            LOGGER.warning(
                "These packages want other versions than this notebook, and may fail if you use "
                "them in this session: %s",
                "; ".join(line.rstrip(".") for line in conflicts),
            )
        return
    said = "\n".join(finished.stderr.splitlines()[-5:])
    raise RuntimeError(
        f"pip could not take {', '.join(requirements)} from {wheels or 'the internet'}. "
        "Switch Internet on, or run this where there is internet and attach "
        "the folder `wheels` that it makes (or name it in VQA_WHEELS):\n"
        f"{_download_command(requirements)}\n"
        f"{said}"
    )


# === Runtime ======================================================================================
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}  # precision -> name in torch


@dataclass(frozen=True)
class Runtime:
    """The machine, and what follows from it, as detect_runtime finds them."""

    platform: str  # "kaggle", "colab" or "local"
    # Each visible GPU: index, name, memory_gib, capability. Of a part of a GPU (MIG) the index
    # is its name, MIG-...
    gpus: tuple[dict, ...]
    precision: str  # number format of the base model's arithmetic: "fp16", "bf16" or "fp32"
    attention: str  # name of the implementation in transformers
    reasons: tuple[str, ...]  # a sentence for each decision, and warnings


def decide_precision(precision: str, gpus: Sequence[Mapping]) -> tuple[str, str]:
    """The number format that `precision` ("auto" or a format) means on these GPUs, and why.

    The oldest GPU decides, because all of them work on the same run. Raises RuntimeError for one
    below capability 7.0 (P100), on which torch no longer runs.

    >>> decide_precision("auto", [])
    ('fp32', 'precision fp32: no GPU')
    >>> decide_precision("auto", [{"name": "A100", "capability": 8.0}])[0]
    'bf16'
    """
    oldest = min(
        ((gpu["capability"], gpu["name"]) for gpu in gpus),
        default=(math.inf, ""),
    )
    capability, name = oldest
    if capability < 7.0:
        raise RuntimeError(
            f"{name} is too old for torch (capability below 7.0); choose 'GPU T4 x2' instead"
        )
    if precision != "auto":
        return precision, f"precision {precision}: set in the config"
    if not gpus:
        return "fp32", "precision fp32: no GPU"
    if capability < 8.0:
        why = f"capability {capability} has no bf16 arithmetic"
        return "fp16", f"precision fp16 with a GradScaler: {why}"
    return "bf16", f"precision bf16 without a scaler: capability {capability}"


def decide_attention(attention: str, gpus: Sequence[Mapping], precision: str) -> tuple[str, str]:
    """The attention implementation that `attention` ("auto" or a name) means here, and why.

    Raises ValueError for FlashAttention-2 where it cannot run.

    >>> decide_attention("eager", [], "fp32")
    ('eager', 'attention eager: set in the config')
    """
    if attention == "auto":
        why = "it takes the mask that lets all choice orders share a prefix"
        return "sdpa", f"attention sdpa: {why}"
    if attention == "flash_attention_2":
        is_recent = bool(gpus) and min(gpu["capability"] for gpu in gpus) >= 8.0
        is_half = precision != "fp32"
        if not (is_recent and is_half and importlib.util.find_spec("flash_attn")):
            raise ValueError(
                f"Config field 'attn_implementation' is {attention!r}, which needs "
                "capability 8.0, half precision and the package flash_attn; 'auto' is SDPA"
            )
    return attention, f"attention {attention}: set in the config"


KAGGLE_SESSION_HOURS = 12  # after which Kaggle ends a session, at the latest


def session_start() -> float:
    """When this session began, in seconds since 1970.

    On Kaggle the start of the first process of the container: a restarted kernel is younger than
    its session, and Kaggle ends it by the session's age. (Not the boot of the machine, which may
    have waited for a session.) Where that process is older than any session there can be, the
    container is not Kaggle's own, and the start of this process counts. Elsewhere no session has
    an end that is known, and the budget of hours is counted from now.
    """
    if _detect_platform() != "kaggle":
        return time.time()
    started = psutil.Process().create_time()
    try:
        first = psutil.Process(1).create_time()
    except psutil.Error as error:
        LOGGER.warning("The session's start is taken to be this notebook's: %s", error)
        return started
    if time.time() - first > 3600 * KAGGLE_SESSION_HOURS:
        LOGGER.warning(
            "The session's start is taken to be this notebook's: "
            "the container is older than the %d hours of a session",
            KAGGLE_SESSION_HOURS,
        )
        return started
    return min(first, started)


def _detect_platform() -> str:
    """The platform, by the variables that it sets: "kaggle", "colab" or "local"."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:  # asked first: Kaggle's image sets both
        return "kaggle"
    if "COLAB_RELEASE_TAG" in os.environ:
        return "colab"
    return "local"


def _ask_nvidia_smi(arguments: Sequence[str], without: str) -> list[str]:
    """The lines that nvidia-smi prints; none where it is not there.

    None also where it fails, with a warning that says what is done `without` an answer. Torch is
    not asked, because that would initialise CUDA in this process.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:  # the tool without a driver: the accelerator is switched off
        problem = answer.stdout.strip() or answer.stderr.strip()
        LOGGER.warning("%s: nvidia-smi failed with %r", without, problem)
        return []
    lines = answer.stdout.strip().splitlines()
    if lines == ["No devices were found"]:  # some versions say so and do not fail
        LOGGER.warning("No GPU is used: nvidia-smi says %r", lines[0])
        return []
    return lines


def _query_gpus() -> dict[str, list[str]]:
    """Number of each GPU -> its number, name, memory in MiB and capability, as texts."""
    query = ["--query-gpu=index,name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    rows = {}
    for line in _ask_nvidia_smi(query, without="No GPU is used"):
        cells = [cell.strip() for cell in line.split(",")]
        rows[cells[0]] = cells
    return rows


@dataclass(frozen=True)
class _Device:
    """A GPU, or a part of one (MIG), by the names that CUDA_VISIBLE_DEVICES takes."""

    number: str  # of the GPU
    uuid: str = ""  # GPU-..., or MIG-... of a part; "" where only the number is known
    profile: str = ""  # of a part, such as 1g.5gb


def _list_devices() -> list[_Device]:
    """Every GPU, and behind it its parts, as `nvidia-smi -L` names them."""
    devices = []
    number = ""
    for line in _ask_nvidia_smi(["-L"], without="GPUs are known by number, and no parts of them"):
        gpu = re.match(r"GPU (\d+): .*\(UUID: ([^)]+)\)", line)
        part = re.match(r"\s+MIG (\S+) .*\(UUID: ([^)]+)\)", line)
        if gpu:
            number = gpu[1]
            devices.append(_Device(number, gpu[2]))
        elif part:
            devices.append(_Device(number, part[2], part[1]))
    return devices


def _parts_of(number: str, devices: Sequence[_Device]) -> list[_Device]:
    """The parts into which the GPU of this number is divided; none where it is whole."""
    return [device for device in devices if device.number == number and device.profile]


def is_part_of_gpu(device: object) -> bool:
    """Whether a device is a part of a GPU (MIG), by its index in `Runtime.gpus` or as text.

    >>> is_part_of_gpu("MIG-c6d4f1ef-42e4"), is_part_of_gpu(0), is_part_of_gpu(None)
    (True, False, False)
    """
    return str(device).startswith("MIG-")


def _named_devices(name: str, devices: Sequence[_Device], numbers: Iterable[str]) -> list[_Device]:
    """What one name in CUDA_VISIBLE_DEVICES stands for: one device, or none.

    A number, the beginning of one UUID, or the UUID of a part. A GPU that is divided into parts
    stands for its first one, as for CUDA.
    """
    if name in numbers:
        number = name
    else:
        found = [device for device in devices if device.uuid.startswith(name)]
        if len(found) != 1:
            return []
        if found[0].profile:
            return found
        number = found[0].number
    return _parts_of(number, devices)[:1] or [_Device(number)]


def _chosen_devices(
    chosen: str, devices: Sequence[_Device], numbers: Iterable[str]
) -> list[_Device]:
    """The devices that CUDA_VISIBLE_DEVICES names, in its order.

    Raises ValueError for a name that is unknown, unclear or there twice: CUDA would then see
    fewer GPUs, or none, without a word.
    """
    found = []
    for name in chosen.replace(" ", "").split(","):
        if name in ("", "-1", "NoDevFiles"):  # the usual ways to hide the rest
            break
        named = _named_devices(name, devices, numbers)
        if not named or named[0] in found:
            known = [*numbers, *(device.uuid for device in devices)]
            raise ValueError(
                f"CUDA_VISIBLE_DEVICES is {chosen!r}, and {name!r} is not exactly one GPU more; "
                f"unset it, or name some of {', '.join(known)}"
            )
        found += named
    return found


def _as_number(text: str, gpu: str, what: str) -> float:
    """What nvidia-smi prints about a GPU as a number; RuntimeError where it is none."""
    try:
        return float(text)
    except ValueError as error:
        raise RuntimeError(
            f"nvidia-smi says {text!r} for the {what} of {gpu}; "
            "update the driver, or hide this GPU with CUDA_VISIBLE_DEVICES"
        ) from error


def _memory_gib(memory_mib: str, gpu: str, profile: str) -> float:
    """Memory of a GPU, or of a part of it by the part's profile; in GiB."""
    if profile:
        size = re.search(r"(\d+)gb", profile)
        # A part of "5gb" has 4.75 GiB.
        return 0.95 * _as_number(size[1] if size else profile, gpu, "memory")
    if memory_mib in ("[N/A]", "[Not Supported]"):
        memory = psutil.virtual_memory().total / 2**30
        LOGGER.warning(
            "nvidia-smi gives no memory of its own for %s: taken to share the computer's, %.0f GiB",
            gpu,
            memory,
        )
        return memory
    return _as_number(memory_mib, gpu, "memory") / 1024


def _describe_gpu(device: _Device, row: Sequence[str]) -> dict:
    """A GPU or a part of one as `Runtime.gpus` has it; RuntimeError for a row without facts."""
    if len(row) != 4:
        raise RuntimeError(
            f"nvidia-smi says {', '.join(row)!r}, not number, name, memory, capability; "
            "update the driver, or hide this GPU with CUDA_VISIBLE_DEVICES"
        )
    _, name, memory_mib, capability = row
    if device.profile:
        name = f"{name} MIG {device.profile}"
    return {
        "index": device.uuid if device.profile else int(device.number),
        "name": name,
        "memory_gib": _memory_gib(memory_mib, name, device.profile),
        "capability": _as_number(capability, name, "capability"),
    }


def _visible_gpus() -> tuple[dict, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to this process; all where it is not set.

    Of a GPU that is divided into parts (MIG) the parts.
    """
    rows = _query_gpus()
    if not rows:
        return ()
    devices = _list_devices()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        visible = []
        for number in rows:
            visible += _parts_of(number, devices) or [_Device(number)]
    else:
        visible = _chosen_devices(chosen, devices, rows)
    return tuple(_describe_gpu(device, rows[device.number]) for device in visible)


def how_to_get_a_gpu() -> str:
    """What to do where no GPU is seen, as a request."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and _query_gpus():
        return f"unset CUDA_VISIBLE_DEVICES, which is {chosen!r} and hides every GPU"
    return "switch on the accelerator"


def detect_runtime(precision: str = "auto", attn_implementation: str = "auto") -> Runtime:
    """What this machine is, and the decisions that follow from it; CUDA stays uninitialised.

    Raises RuntimeError or ValueError for what cannot run here, as decide_precision and
    decide_attention do; ValueError for a name in CUDA_VISIBLE_DEVICES that no GPU has, and
    RuntimeError for a GPU of which nvidia-smi does not say what is needed.
    """
    gpus = _visible_gpus()
    dtype, why_dtype = decide_precision(precision, gpus)
    attention, why_attention = decide_attention(attn_implementation, gpus, dtype)
    reasons = [why_dtype, why_attention]
    if gpus and installed_version("torch").release[:2] == (2, 9):
        reasons.append(
            "warning: torch 2.9 may be 10 to 20 times slower in the first vision layer "
            "(pytorch issue 174051): use 2.10"
        )
    return Runtime(_detect_platform(), gpus, dtype, attention, tuple(reasons))


def seed_everything(seed: int, deterministic: bool = True, strict: bool = False) -> None:
    """Seed Python, NumPy and torch.

    `deterministic` pins cuDNN's algorithms; `strict` makes all of torch deterministic, which is
    slower.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    # The masked backward of cuDNN's attention gives NaN on Hopper: pytorch issue 196678.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if strict:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # These two kinds of attention add up their gradients in any order.
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_flash_sdp(False)


def seeded_generator(*keys) -> np.random.Generator:
    """A random generator that depends on nothing but `keys`: seed, epoch, sample id, ...

    >>> first = seeded_generator(42, "row 7").integers(100, size=3)
    >>> again = seeded_generator(42, "row 7").integers(100, size=3)
    >>> first.tolist() == again.tolist()
    True
    """
    numbers = []
    for key in keys:
        # crc32, because Python's own hash of a text differs between processes.
        number = key if isinstance(key, int) else zlib.crc32(str(key).encode())
        numbers.append(number)
    return np.random.default_rng(numbers)


# === Presets ======================================================================================
# What "auto" picks: GiB that the smallest GPU has at least, preset, why. The first row that fits
# is taken; the other presets are picked by name only. "gpu_80gb" is, too: a Colab A100 would first
# download 55 GB, and end with one fold where "colab_a100" gives three.
PRESET_BY_MEMORY = (
    (38.0, "colab_a100", "room for Qwen3-VL-8B in 16 bits and 32 questions a step"),
    (20.0, "gpu_24gb", "room for Qwen3-VL-8B in 4-bit with images of 1024 tokens"),
    (11.0, "colab_t4", "Qwen3-VL-8B fits in 4-bit"),
    (5.5, "single", "only Qwen3-VL-4B in 4-bit leaves room for a training step"),
)

# How each preset differs from the defaults of Config. The notebook and the README list the names,
# too. A merged patch of Qwen3-VL is 32 by 32 pixels and becomes one token, so 1024 * 32 * 32
# pixels are 1024 tokens of image.
PRESETS = {
    # Two free 16 GB cards, one process and whole folds on each: what the defaults are made for.
    "kaggle_t4x2": {},
    # One such card does half the work: it trains one fold of two, and scores rows in one view.
    "colab_t4": {
        "batch_size": 2,
        "grad_accum_steps": 4,  # still 8 questions a step
        "use_tta": False,
        "n_folds": 2,
        "train_folds": (0,),
    },
    "colab_a100": {
        "quantization": "none",  # 16 bits fit
        "batch_size": 16,  # 32 questions a step
        "lora_r": 32,
        "lora_alpha": 64,  # alpha / r stays 2
        "infer_batch_size": 32,
        "max_pixels": 1024 * 32 * 32,
    },
    "gpu_24gb": {
        "max_pixels": 1024 * 32 * 32,
        "infer_batch_size": 32,
    },
    # A model that won a round by itself, trained as there: one A100 or H100 of 80 GB holds it in
    # 16 bits, and all questions of a step. Every fifth row is held out to measure it by.
    "gpu_80gb": {
        "model_id": "Qwen/Qwen3.5-27B",
        "quantization": "none",
        "num_epochs": 1,
        "batch_size": 8,
        "grad_accum_steps": 1,  # still 8 questions a step
        "n_folds": 5,
        "train_folds": (0,),
        "infer_batch_size": 32,
        "max_pixels": 1024 * 32 * 32,
    },
    # Takes the time that it takes: for two T4 and patience, or better.
    "max_score": {
        "n_folds": 5,
        "num_epochs": 3,
        "tta_scales": (0.9, 1.0, 1.1),
        "infer_max_pixels": 1280 * 32 * 32,
    },
    # All GPUs together hold one model: half the speed of two workers, and a mixture of experts
    # that none of them could hold.
    "large": {
        "model_id": "Qwen/Qwen3.5-35B-A3B",
        "spread_model": True,
        "lora_r": 8,
        "lora_alpha": 16,  # alpha / r stays 2
        "n_folds": 2,
        "train_folds": (0,),
    },
    # The 8B takes 6.7 GiB while it loads and 9.5 for a step: too much for the cards this is for.
    "single": {
        "model_id": "Qwen/Qwen3-VL-4B-Instruct",
        "use_kfold": False,
        "num_epochs": 3,
    },
    # A first look: a small model, few rows, one epoch of one fold.
    "quick_test": {
        "model_id": "Qwen/Qwen2.5-VL-3B-Instruct",
        "use_sample": True,
        "sample_size": 200,
        "num_epochs": 1,
        "n_folds": 2,
        "train_folds": (0,),
        "use_tta": False,
    },
    # Three million parameters on a CPU: nothing to quantise, and activations that fit.
    "demo": {
        "model_id": "data/tiny_qwen3_vl",
        "quantization": "none",
        "gradient_checkpointing": False,
        "num_epochs": 6,  # twice as many serve the hidden answers no better
        "batch_size": 8,
        "grad_accum_steps": 1,
        "learning_rate": 1e-3,  # the large models' rates are far too small for this one
        "lora_dropout": 0.0,  # on a CPU it costs 1.6 times the time
        "infer_batch_size": 32,
        "num_workers": 0,
    },
}
_CPU_PRESETS = (
    "on a CPU 'demo' runs in minutes, to try the way with a toy model, and 'quick_test' "
    "with quantization='none' runs in hours, with 16 GiB of memory"
)
# Of each GPU for the weights of a spread model; the rest is for activations, and for one layer's
# experts in 16 bits.
SPREAD_MEMORY_SHARE = 0.7
LARGE_MODEL_GIB = 19.5  # the 35B in 4-bit, with its head and vision tower in 16 bits


def choose_preset(runtime: Runtime, has_competition: bool) -> tuple[str, str]:
    """The preset for the smallest of the detected GPUs, and why.

    Raises RuntimeError for competition files without a GPU, or with one that is too small.

    >>> gpu = {"name": "Tesla T4", "memory_gib": 15.0}
    >>> choose_preset(Runtime("kaggle", (gpu, gpu), "fp16", "sdpa", ()), has_competition=True)
    ('kaggle_t4x2', 'Tesla T4, 15.0 GiB, the smallest of 2 GPUs: Qwen3-VL-8B fits in 4-bit')
    """
    if not has_competition:
        return "demo", "no competition files were found"
    if not runtime.gpus:
        raise RuntimeError(
            f"Competition files but no GPU: {how_to_get_a_gpu()} (or choose the preset "
            f"yourself, in section 2 or by the variable VQA_PRESET: {_CPU_PRESETS})"
        )
    memory, name = min((gpu["memory_gib"], gpu["name"]) for gpu in runtime.gpus)
    count = len(runtime.gpus)
    card = f"{name}, {memory:.1f} GiB"
    if count > 1:
        card = f"{card}, the smallest of {count} GPUs"
    for least_memory, preset, why in PRESET_BY_MEMORY:
        if memory >= least_memory:
            is_several_t4 = preset == "colab_t4" and count > 1
            return "kaggle_t4x2" if is_several_t4 else preset, f"{card}: {why}"
    raise RuntimeError(
        f"{card}: too small for every preset; "
        "take one of 6 GB or more (or choose the preset yourself)"
    )


# === Declarations =================================================================================
@dataclass(frozen=True)
class Declaration:
    """What is declared of one setting beside its kind and its default.

    >>> declared = Declaration("probability", at_least=0, below=1)
    >>> declared.needs
    '0 <= value < 1'
    >>> [declared.allows(value) for value in (0, 0.5, 1)]
    [True, True, False]
    """

    description: str  # what the setting is, with its unit
    at_least: float | None = None  # bounds of the value; None: there is no such bound
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    one_of: tuple = ()  # the values that are allowed; (): all of its kind within the bounds
    changes_result: bool = True  # False: where files lie, how loudly we log, ...
    # False: a search must not try values of it, because it decides which rows and folds there
    # are, acts after training only, or spoils the figure by which a trial is judged.
    searched: bool = True

    def allows(self, value) -> bool:
        """Whether a value of the right kind is allowed and within the bounds."""
        return (
            (not self.one_of or value in self.one_of)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    @property
    def needs(self) -> str:
        """What `allows` asks for, in words; "" where it asks for nothing."""
        if self.one_of and isinstance(self.one_of[0], str):
            return f"one of {', '.join(self.one_of)}"
        if self.one_of:
            *first, last = map(str, self.one_of)
            return f"{', '.join(first)} or {last}"
        if self.at_most is not None or self.below is not None:
            lower = f"{self.at_least} <=" if self.above is None else f"{self.above} <"
            upper = f"< {self.below}" if self.at_most is None else f"<= {self.at_most}"
            return f"{lower} value {upper}"
        if self.above is not None:
            return "a positive number"
        return "" if self.at_least is None else f"at least {self.at_least}"


def setting(default, description: str, **rules):
    """A field of a group of settings: default, what it is, and the rules of Declaration.

    A class as default, such as dict, is called for every new Config.
    """
    metadata = {"declaration": Declaration(description, **rules)}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


# === Settings =====================================================================================
@dataclass(frozen=True)
class PresetSettings:
    """Preset"""

    preset_name: str = setting(
        "custom", "the preset this started from; part of the default run name", searched=False
    )
    preset_reason: str = setting(
        "chosen by name",
        "why that one, where 'auto' picked it",
        changes_result=False,
    )


@dataclass(frozen=True)
class ModelSettings:
    """Model"""

    model_id: str = setting("Qwen/Qwen3-VL-8B-Instruct", "hub id or local folder")
    quantization: str = setting(
        "4bit",
        "of the language model only; 4bit: NF4, with its scales quantised too",
        one_of=("4bit", "8bit", "none"),
    )
    score_precision: str = setting(
        "trained",
        "16bit: score OOF and test rows by the unquantised base model, too; "
        "used only where OOF does not lose",
        one_of=("trained", "16bit"),
        searched=False,
    )
    score_model_id: str | None = setting(
        None,
        "hub id or local folder of the unquantised model for score_precision 16bit; None: "
        "model_id, unless that is stored in 4 bits",
        searched=False,
    )
    alignment_model: str | None = setting(
        None,
        "hub id or local folder of a SigLIP or CLIP model, such as "
        "google/siglip2-so400m-patch14-384; it scores how well each choice fits the image, which "
        "is used only where OOF gains; None: no such model",
        searched=False,
    )
    precision: str = setting(
        "auto",
        "number format; auto follows the card",
        one_of=("auto", "fp16", "bf16", "fp32"),
    )
    attn_implementation: str = setting(
        "auto",
        "implementation of attention; auto: sdpa",
        one_of=("auto", "sdpa", "flash_attention_2", "eager"),
    )
    gradient_checkpointing: bool = setting(
        True, "compute activations again in the backward pass; see memory_plan"
    )
    spread_model: bool = setting(
        False,
        "one model over all GPUs, where it fits on none of them; adds memory, not speed",
    )
    compile_layers: str = setting(
        "auto",
        "torch.compile of the decoder layers; auto: for long jobs",
        one_of=("auto", "on", "off"),
    )
    lora_r: int = setting(16, "rank of the adapter", at_least=1)
    lora_alpha: int = setting(
        32,
        "the adapter's update is scaled by alpha / r; with use_rslora by alpha / sqrt(r)",
        at_least=1,
    )
    use_rslora: bool = setting(
        False, "rank-stabilised LoRA: scaled by alpha / sqrt(r), for ranks of 32 and more"
    )
    lora_dropout: float = setting(
        0.05, "probability of dropout in the adapter", at_least=0, below=1
    )


@dataclass(frozen=True)
class ImageSettings:
    """Images: one pixel budget for training and inference"""

    image_size: int | None = setting(
        None,
        "pixels; sets max_pixels to image_size squared; the aspect ratio is always kept",
        above=0,
    )
    min_pixels: int | None = setting(
        None, "pixels of an image at least; None: 4 merged patches of the model", above=0
    )
    max_pixels: int | None = setting(
        None, "pixels of an image at most; None: 768 merged patches of the model", above=0
    )
    infer_max_pixels: int | None = setting(
        None,
        "pixels; adds views at this budget, used only where OOF gains",
        above=0,
        searched=False,
    )
    augment_images: int = setting(
        0,
        "mildly changed copies of each training image, features cached like its own",
        at_least=0,
    )


@dataclass(frozen=True)
class DataSettings:
    """Data"""

    data_dir: str | None = setting(
        None,
        "folder with train.csv, test.csv, sample_submission.csv; None: search, else the demo",
        changes_result=False,
    )
    columns: Mapping[str, str] = setting(
        dict,
        "our name -> the files' name of a column, such as {'question': 'Frage'}, where the files "
        "have other names than id, path, question, a, b, c, d, answer",
        changes_result=False,  # it is part of the data's fingerprint
        searched=False,
    )
    extra_train_dirs: tuple[str, ...] = setting(
        (),
        "folders like data_dir, such as earlier rounds: their training rows join every fold's",
        searched=False,
    )
    pretrain_epochs: int = setting(
        0,
        "first train so many epochs on the rows of extra_train_dirs alone, then num_epochs on all "
        "others; 0: they join the others",
        at_least=0,
    )
    use_sample: bool = setting(False, "train on a random subset of the rows", searched=False)
    sample_size: int = setting(200, "rows of that subset", at_least=2, searched=False)
    max_fallback_share: float = setting(
        0.01,
        "share of unreadable images above which the run stops",
        at_least=0,
        below=1,
        searched=False,
    )
    context_tokens: int = setting(
        0,
        "tokens that the prompt shows of a row's context, words beside the image, such as 128; "
        "0: context is not used",
        at_least=0,
    )
    context_file: str | None = setting(
        None,
        "CSV with id and context for rows of train.csv and test.csv; None: context.csv in "
        "data_dir, else the tables' column context",
        changes_result=False,  # it is part of the data's fingerprint
        searched=False,
    )
    prompt_templates: Mapping[str, str] = setting(
        dict, "question type -> template, replaces the default"
    )
    paraphrases: int = setting(
        1,
        "wordings of the default instruction that training draws from; inference takes the first",
        at_least=1,
        at_most=4,  # as many as _INSTRUCTIONS
    )


@dataclass(frozen=True)
class FoldSettings:
    """Folds"""

    n_folds: int = setting(3, "parts of the rows, each held out once", at_least=2, searched=False)
    use_kfold: bool = setting(True, "False: one holdout of 1 / n_folds of the rows", searched=False)
    train_folds: tuple[int, ...] | None = setting(
        None, "the folds to train; None: all", searched=False
    )


@dataclass(frozen=True)
class OptimisationSettings:
    """Optimisation"""

    num_epochs: int = setting(2, "passes over the training rows", at_least=1)
    batch_size: int = setting(4, "times grad_accum_steps: questions per optimizer step", at_least=1)
    grad_accum_steps: int = setting(2, "batches per optimizer step", at_least=1)
    memory_plan: str = setting(
        "auto",
        "auto: on a GPU, questions per pass and layers to recompute by what is measured; "
        "config: batch_size and all layers",
        one_of=("auto", "config"),
    )
    learning_rate: float = setting(
        1e-4, "peak, reached after the warm-up, then cosine to zero", above=0
    )
    warmup_ratio: float = setting(0.06, "share of all optimizer steps", at_least=0, below=1)
    weight_decay: float = setting(0.01, "AdamW's weight decay", at_least=0)
    max_grad_norm: float = setting(1.0, "longer gradients are scaled to this norm", above=0)
    loss: str = setting(
        "choices",
        "choices: cross-entropy over the four letters; vocabulary: over every token",
        one_of=("choices", "vocabulary"),
    )
    label_smoothing: float = setting(
        0.05,
        "probability spread over the choices that exist; loss 'choices' only",
        at_least=0,
        below=1,
    )
    shuffle_choices: bool = setting(True, "a new choice order for each question and epoch")


@dataclass(frozen=True)
class SoftTargetSettings:
    """Soft targets over the four choices; loss 'choices' only"""

    use_dev_votes: bool = setting(
        False, "also train on dev.csv, with the shares of its votes as targets"
    )
    distill_from: str | None = setting(
        None,
        "folder of a finished run; mixes in its OOF probabilities, spoils OOF figures",
        searched=False,
    )
    distill_weight: float = setting(
        0.5, "share of those probabilities in the target", above=0, at_most=1, searched=False
    )
    pseudo_label_from: str | None = setting(
        None,
        "folder of a finished run with the same folds; also train on its test answers",
    )
    pseudo_label_confidence: float = setting(
        0.9, "probability that such an answer has at least", above=0, at_most=1
    )


@dataclass(frozen=True)
class AverageSettings:
    """Weight averages, stopping, and one more model"""

    use_ema: bool = setting(
        True,
        "also keep an exponential average of the adapter; used only where OOF says so",
    )
    ema_decay: float = setting(
        0.999, "upper bound; step t uses min(ema_decay, (1 + t) / (10 + t))", at_least=0, below=1
    )
    use_swa: bool = setting(
        False,
        "also keep the plain average from swa_start_epoch on; used only where OOF says so",
    )
    swa_start_epoch: int = setting(
        1,
        "epochs before averaging starts; the learning rate stays constant from there",
        at_least=1,
    )
    use_early_stopping: bool = setting(
        False, "end a fold's training when its held-out accuracy no longer rises"
    )
    early_stopping_patience: int = setting(2, "epochs without a rise", at_least=1)
    early_stopping_min_delta: float = setting(0.001, "accuracy; less is no rise", at_least=0)
    mix_weights: bool = setting(
        False,
        "score with all kinds of weights, where OOF prefers their mean to each of them",
        searched=False,
    )
    final_retrain: bool = setting(
        False,
        "one more model, on all rows; it joins the submission, and no OOF row can judge it",
        searched=False,
    )


# === Settings of scoring and places ===============================================================
@dataclass(frozen=True)
class InferenceSettings:
    """Inference"""

    use_tta: bool = setting(
        True,
        "score rows in several views (choice orders, image scales); "
        "used only where OOF does not lose",
        searched=False,
    )
    tta_rotations: int = setting(4, "choice orders", one_of=(1, 2, 4), searched=False)
    tta_scales: tuple[float, ...] = setting((1.0,), "factors on the pixel budget", searched=False)
    doubt_steps: tuple[tuple[str, float], ...] = setting(
        (),
        "more views where the answer is in doubt: pairs of a step (rotations, orders, pixels, "
        "base) and the time that it may take, 1.0 being that of all rows in one view; "
        "(): all rows in all views",
        searched=False,
    )
    doubt_orders: int = setting(
        24, "choice orders that the step 'orders' fills up to", one_of=(8, 12, 24), searched=False
    )
    use_batch_inference: bool = setting(True, "False: one question at a time", searched=False)
    infer_batch_size: int = setting(
        16,
        "questions per forward pass, each with all its choice orders",
        at_least=1,
        searched=False,
    )
    zeroshot_rows: int = setting(
        256,
        "training rows scored with the base model before training; 0: all of them",
        at_least=0,
        searched=False,
    )
    use_base_member: str = setting(
        "auto",
        "also score OOF and test rows by the untouched base model, and mix it in only where OOF "
        "prefers that; auto: score where it is not far worse than the trained ones, and time is "
        "left",
        one_of=("auto", "on", "off"),
        searched=False,
    )
    use_temperature_scaling: bool = setting(
        True, "fit a temperature for each fold's probabilities", searched=False
    )
    ensemble_method: str = setting(
        "auto",
        "over folds; weighted: of views; auto: the mean, or weighted or stacked views "
        "where OOF clearly prefers them",
        one_of=("auto", "mean", "vote", "weighted"),
        searched=False,
    )
    use_known_answers: bool = setting(
        False,
        "answer test rows that equal a training row (image, question, choices) like that row",
        searched=False,
    )


@dataclass(frozen=True)
class RandomnessSettings:
    """Randomness"""

    seed: int = setting(42, "of every random draw", at_least=0, searched=False)
    seeds: tuple[int, ...] = setting(
        (),
        "train each fold once with each of these, `seed` among them; a fold's scores are the mean "
        "over its models, where OOF does not lose by it; (): only `seed`",
        searched=False,
    )
    deterministic: bool = setting(True, "deterministic cuDNN")
    strict_determinism: bool = setting(
        False, "the same bits on a GPU too: deterministic attention and sums, slower"
    )


@dataclass(frozen=True)
class RunningSettings:
    """Running"""

    num_workers: int = setting(
        2, "image decoding processes per worker", at_least=0, changes_result=False
    )
    time_budget_hours: float | None = setting(
        None,
        "hours from training's start, on Kaggle the session's; None: 11 on Kaggle",
        above=0,
        changes_result=False,
    )
    save_every_epoch: bool = setting(
        True, "a checkpoint at the end of every epoch", changes_result=False
    )
    save_every_minutes: float = setting(
        20.0, "minutes between checkpoints inside an epoch", above=0, changes_result=False
    )
    save_every_steps: int = setting(
        500,
        "optimizer steps, or batches of inference, between checkpoints: whichever is first",
        at_least=1,
        changes_result=False,
    )
    max_skipped_steps: int = setting(
        10,
        "optimizer steps with a non-finite loss or gradient, above which the fold stops",
        at_least=0,
        changes_result=False,
    )
    trust_remote_code: bool = setting(
        False, "run Python code that comes with a model", changes_result=False
    )


@dataclass(frozen=True)
class PlaceSettings:
    """Places and logging"""

    cache_dir: str | None = setting(
        None,
        "vision features on disk; None: the system's folder for temporary files",
        changes_result=False,
    )
    resume_from: tuple[str, ...] = setting(
        ("/kaggle/input", "/content/drive/MyDrive/vqa"),
        "where earlier runs may lie",
        changes_result=False,
    )
    backup_dir: str | None = setting(
        None,
        "a slow, lasting disk such as Drive: gets verified checkpoints and whatever is done",
        changes_result=False,
    )
    log_level: str = setting(
        "INFO",
        "the least that is logged",
        one_of=("DEBUG", "INFO", "WARNING", "ERROR"),
        changes_result=False,
    )
    log_to_file: bool = setting(
        True, "write run.log in the run directory, too", changes_result=False
    )
    output_dir: str = setting("outputs", "folder of the run directories", changes_result=False)
    run_name: str | None = setting(
        None,
        "None: preset and fingerprint, the same in every session",
        changes_result=False,
    )


# === Rules of settings ============================================================================
# Kinds by the first word of an annotation. A float may be written as a whole number.
KINDS = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "str": str,
    "tuple": tuple,
    "Mapping": Mapping,
}


def _is_of_kind(value, annotation: str) -> bool:
    """Whether a value fits an annotation such as "float | None"; elements are not looked at."""
    if value is None:
        return annotation.endswith("None")
    if isinstance(value, bool):  # which Python takes for a whole number, too
        return annotation == "bool"
    first_word = re.match(r"\w+", annotation).group()
    return isinstance(value, KINDS[first_word])


# Annotations of fields in words, without "| None".
ANNOTATIONS_IN_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "str": "a text",
    "tuple[int, ...]": "a list of whole numbers",
    "tuple[float, ...]": "a list of numbers",
    "tuple[str, ...]": "a list of texts",
    "tuple[tuple[str, float], ...]": "a list of pairs of a text and a number",
    "Mapping[str, str]": "names with a text each, in braces",
}


def _annotation_in_words(annotation: str) -> str:
    """What a field's annotation asks for.

    >>> _annotation_in_words("tuple[int, ...] | None")
    'a list of whole numbers, or None'
    """
    kind = annotation.removesuffix(" | None")
    words = ANNOTATIONS_IN_WORDS[kind]
    return words if kind == annotation else f"{words}, or None"


# Fields that may name a folder below the home folder, as "~/vqa".
PATH_FIELDS = (
    "model_id",
    "score_model_id",
    "alignment_model",
    "data_dir",
    "output_dir",
    "cache_dir",
    "backup_dir",
    "resume_from",
    "distill_from",
    "pseudo_label_from",
    "extra_train_dirs",
)


def _expand_home(value):
    """A path or a tuple of paths with the home folder for `~`; other values as they are.

    >>> _expand_home(("/data", 3, None))
    ('/data', 3, None)
    """
    if isinstance(value, tuple):
        return tuple(map(_expand_home, value))
    return os.path.expanduser(value) if isinstance(value, str) else value


def _refuse(config: Config, name: str, needs: str) -> None:
    """Raise the ValueError about a field's value."""
    value = getattr(config, name)
    raise ValueError(f"Config field {name!r} is {value!r}; it needs {needs}")


def _check_values(config: Config) -> None:
    """Every field by itself: its kind and what is declared of it."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        declaration = item.metadata["declaration"]
        if not _is_of_kind(value, item.type):
            kind = _annotation_in_words(item.type)
            needs = declaration.needs if declaration.one_of else kind
            _refuse(config, item.name, needs)
        if value is not None and not declaration.allows(value):
            _refuse(config, item.name, declaration.needs)


def _check_training(config: Config) -> None:
    """The rules for model, images, data, folds and training that a single bound cannot say."""
    if config.min_pixels and config.max_pixels and config.min_pixels > config.max_pixels:
        _refuse(config, "min_pixels", f"at most max_pixels, {config.max_pixels}")

    if not set(config.prompt_templates) <= set(QUESTION_TYPES):
        _refuse(config, "prompt_templates", f"keys among {QUESTION_TYPES}")

    names = config.columns.values()
    are_texts = all(isinstance(name, str) and name.strip() for name in names)
    are_known = set(config.columns) <= {*COLUMNS, *VOTE_COLUMNS, CONTEXT_COLUMN}
    if not are_texts or not are_known or len(set(names)) < len(names):
        needs = f"names among {', '.join(COLUMNS)}, each with the name that it has in the files"
        _refuse(config, "columns", needs)

    names = config.extra_train_dirs
    are_texts = all(isinstance(name, str) and name.strip() for name in names)
    if not are_texts or len(set(names)) < len(names):
        _refuse(config, "extra_train_dirs", "paths of folders, none twice")

    if config.pretrain_epochs and not config.extra_train_dirs:
        _refuse(config, "pretrain_epochs", "extra_train_dirs, whose rows it trains on; or 0")

    if config.train_folds is not None:
        folds = set(config.train_folds)
        if not folds <= set(range(config.n_folds)):
            _refuse(config, "train_folds", f"folds below {config.n_folds}")
        if not folds or len(folds) < len(config.train_folds):
            _refuse(config, "train_folds", "at least one fold, and none twice")

    has_soft_targets = config.use_dev_votes or config.distill_from or config.pseudo_label_from
    if has_soft_targets and config.loss != "choices":
        needs = "'choices' where targets are soft (votes or another run's)"
        _refuse(config, "loss", needs)

    if config.use_swa and config.swa_start_epoch >= config.num_epochs:
        needs = f"an epoch below num_epochs, {config.num_epochs}"
        _refuse(config, "swa_start_epoch", needs)


def _check_seeds(config: Config) -> None:
    """The rules for `seeds`: folds and the first models are made with `seed`."""
    seeds = config.seeds
    if not all(_is_of_kind(seed, "int") and seed >= 0 for seed in seeds):
        _refuse(config, "seeds", "whole numbers of at least 0")
    if len(set(seeds)) < len(seeds):
        _refuse(config, "seeds", "each seed once: the same one twice trains the same model twice")
    if seeds and config.seed not in seeds:
        needs = f"{config.seed} among them, which is `seed`: that makes the folds and first models"
        _refuse(config, "seeds", needs)
    if len(seeds) > 1 and config.doubt_steps:
        needs = "one seed, or no doubt_steps: each seed's model would have other rows in doubt"
        _refuse(config, "seeds", needs)


def _check_inference(config: Config) -> None:
    """The rules for scoring that a single bound cannot say."""
    if config.score_precision == "16bit" and config.quantization == "none":
        needs = "'trained' where quantization is 'none': there is nothing else to score with"
        _refuse(config, "score_precision", needs)
    if config.score_model_id and config.score_precision != "16bit":
        needs = "score_precision '16bit': nothing else is scored with it"
        _refuse(config, "score_model_id", needs)

    scales = config.tta_scales
    if 1.0 not in scales or not all(0.25 <= scale <= 4 for scale in scales):
        _refuse(config, "tta_scales", "factors in [0.25, 4] with 1.0")

    has_averages = config.use_ema or config.use_swa
    if config.mix_weights and (not has_averages or config.doubt_steps):
        needs = "use_ema or use_swa, to mix with, and no doubt_steps"
        _refuse(config, "mix_weights", needs)


DOUBT_STEPS = ("rotations", "orders", "pixels", "base")  # in the order in which they are taken


def _check_list_of_steps(config: Config) -> None:
    """Whether `doubt_steps` is a list of pairs of a known step and a time, in their order."""
    example = '(("rotations", 0.5), ("orders", 0.2))'
    names = []
    for step in config.doubt_steps:
        is_pair = isinstance(step, tuple) and len(step) == 2 and step[0] in DOUBT_STEPS
        has_time = is_pair and _is_of_kind(step[1], "float") and 0 < step[1] < math.inf
        if not has_time:
            needs = f"pairs of a step ({', '.join(DOUBT_STEPS)}) and a time above 0: {example}"
            _refuse(config, "doubt_steps", needs)
        names.append(step[0])
    if names != [name for name in DOUBT_STEPS if name in names]:
        _refuse(config, "doubt_steps", f"each step once, in this order: {', '.join(DOUBT_STEPS)}")


def _check_doubt_steps(config: Config) -> None:
    """The rules between `doubt_steps` and other settings."""
    _check_list_of_steps(config)
    if not config.doubt_steps:
        return
    steps = dict(config.doubt_steps)
    rules = {
        "use_tta": config.use_tta,
        "tta_rotations 2 or 4 for the step 'rotations'": (
            "rotations" not in steps or config.tta_rotations > 1
        ),
        "tta_rotations 4 for the step 'orders', which goes on from them": (
            "orders" not in steps or config.tta_rotations == 4
        ),
        "both infer_max_pixels and the step 'pixels', or neither": (
            ("pixels" in steps) == bool(config.infer_max_pixels)
        ),
        "tta_scales (1.0,): larger images are the step 'pixels'": set(config.tta_scales) == {1.0},
        "score_precision 'trained': only one model's answers can be in doubt": (
            config.score_precision == "trained"
        ),
        "no final_retrain: no held-out row shows which letters that model prefers": (
            not config.final_retrain
        ),
        "another ensemble_method than 'weighted': not every row has every view": (
            config.ensemble_method != "weighted"
        ),
        "use_base_member 'auto' or 'off' beside the step 'base', which asks the same model": (
            "base" not in steps or config.use_base_member != "on"
        ),
    }
    for needs, is_kept in rules.items():
        if not is_kept:
            _refuse(config, "doubt_steps", needs)


# === Config =======================================================================================
# What to write in place of settings of earlier versions.
REPLACED_FIELDS = {
    "adaptive_tta": (
        "doubt_steps: a list of steps, each with the time that it may take, such as "
        'doubt_steps=(("rotations", 0.5),) for half the time of all rows in one view'
    ),
}


def _model_place(model_id: str) -> str:
    """A local folder as an absolute path (also relative to this file), else the hub id."""
    for folder in (Path(model_id), HERE / model_id):
        if folder.is_dir():
            return str(folder.resolve())
    return model_id


def _require_known(kind: str, word: str, known: Sequence[str]) -> None:
    """ValueError with the nearest known word, or else all of them, unless `word` is known."""
    if word in known:
        return
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    raise ValueError(f"Unknown {kind} {word!r}; {hint}")


@dataclass(frozen=True)
class Config(
    # Fields come in reading order, because dataclasses collect them from the last base on.
    PlaceSettings,
    RunningSettings,
    RandomnessSettings,
    InferenceSettings,
    AverageSettings,
    SoftTargetSettings,
    OptimisationSettings,
    FoldSettings,
    DataSettings,
    ImageSettings,
    ModelSettings,
    PresetSettings,
):
    """All settings of one run; a ValueError names the field that is unknown or impossible."""

    def __post_init__(self):
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.type.startswith("tuple") and isinstance(value, list):  # JSON has no tuples
                object.__setattr__(self, item.name, tuple(value))
        if isinstance(self.doubt_steps, tuple):
            steps = [tuple(step) if isinstance(step, list) else step for step in self.doubt_steps]
            object.__setattr__(self, "doubt_steps", tuple(steps))
        for name in PATH_FIELDS:
            object.__setattr__(self, name, _expand_home(getattr(self, name)))
        _check_values(self)  # first, so that the other rules may compare values
        _check_training(self)
        _check_seeds(self)
        _check_inference(self)
        _check_doubt_steps(self)

    @classmethod
    def preset(cls, name: str, **overrides) -> Config:
        """The named preset with some fields replaced; "auto" picks one for the detected hardware.

        Raises ValueError for an unknown preset, and for a field that is unknown or impossible.

        >>> Config.preset("demo", num_epochs=3).num_epochs
        3
        """
        fields = {"preset_name": name}
        if name == "auto":
            has_competition = locate_competition(overrides.get("data_dir")) != DEMO
            name, reason = choose_preset(detect_runtime(), has_competition)
            fields = {"preset_name": name, "preset_reason": reason}
        _require_known("preset", name, [*PRESETS, "auto"])
        known = [item.name for item in dataclasses.fields(cls)]
        for override in overrides:
            if override in REPLACED_FIELDS:
                raise ValueError(f"{override} is now {REPLACED_FIELDS[override]}")
            _require_known("config field", override, known)
        fields.update(PRESETS[name])
        fields.update(overrides)
        return cls(**fields)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every field that can change a score of the run's models, in hexadecimal."""
        relevant = dataclasses.asdict(self)
        for name in BOOKKEEPING_FIELDS:
            del relevant[name]
        # A finished run can get such scores, or others: nothing that was trained changes.
        del relevant["alignment_model"]
        for name in ("distill_from", "pseudo_label_from"):
            if relevant[name]:  # the same run, wherever its folder lies
                relevant[name] = Path(relevant[name]).name
        # Of these, too: their rows are part of the run's fingerprint.
        relevant["extra_train_dirs"] = [Path(name).name for name in self.extra_train_dirs]
        del relevant["seeds"]
        if self.has_further_seeds:  # whatever their order
            relevant["seeds"] = self.all_seeds
        # It adds a stage to a run, also to a finished one, and changes no other score.
        del relevant["use_base_member"]
        text = json.dumps(relevant, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def all_epochs(self) -> int:
        """Epochs of a fold: `pretrain_epochs`, then `num_epochs`; they are counted through."""
        return self.pretrain_epochs + self.num_epochs

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """`seed`, then the further ones of `seeds` from the smallest on."""
        return (self.seed, *sorted({*self.seeds} - {self.seed}))

    @property
    def has_further_seeds(self) -> bool:
        """Whether each fold is trained with other seeds than `seed`, too."""
        return len(self.all_seeds) > 1

    @property
    def rows_to_use(self) -> int | None:
        """How many training rows are drawn; None: all."""
        return self.sample_size if self.use_sample else None

    @property
    def run_dir(self) -> Path:
        """The run's folder in `output_dir`: `run_name`, or preset and fingerprint."""
        name = self.run_name or f"{self.preset_name}-{self.fingerprint[:8]}"
        return Path(self.output_dir) / name

    @property
    def model_path(self) -> str:
        """A local folder as an absolute path (also relative to this file), else the hub id."""
        return _model_place(self.model_id)

    @property
    def model_paths(self) -> list[str]:
        """`model_path`, and those of `score_model_id` and `alignment_model` where there are any."""
        names = (self.model_id, self.score_model_id, self.alignment_model)
        return [_model_place(name) for name in names if name]

    @property
    def model_files(self) -> str:
        """Names and sizes of local models' files; "" for hub ids.

        By them a run is not continued on another model in the same folder.
        """
        files = []
        names = [name for name in (self.model_id, self.score_model_id) if name]
        for name in names:
            for path in sorted(Path(_model_place(name)).glob("*")):
                if path.suffix in (".safetensors", ".json"):
                    files.append(f"{path.name} {path.stat().st_size}")
        return ", ".join(files)

    @property
    def rescoring(self) -> Config:
        """The settings of the stage "rescore": the unquantised model in place of the trained one.

        >>> config = Config(model_id="in/4bit", score_precision="16bit", score_model_id="in/16bit")
        >>> config.rescoring.model_id, config.rescoring.quantization
        ('in/16bit', 'none')
        """
        return dataclasses.replace(
            self,
            model_id=self.score_model_id or self.model_id,
            score_model_id=None,
            quantization="none",
            score_precision="trained",
        )

    @property
    def folds_to_train(self) -> tuple[int, ...]:
        """`train_folds`, or every fold; only the first one where a single holdout is asked for."""
        if not self.use_kfold:
            return (0,)
        return self.train_folds or tuple(range(self.n_folds))

    def _described(self) -> pd.DataFrame:
        """Value, default and description of every field, as texts, in the order of declaration."""
        defaults = Config()
        rows = {
            item.name: {
                "value": str(getattr(self, item.name)),
                "default": str(getattr(defaults, item.name)),
                "what it is": item.metadata["declaration"].description,
            }
            for item in dataclasses.fields(self)
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    def table(self) -> pd.DataFrame:
        """Every field with its value, the default where it differs, and what it is.

        Those that differ from their default come first.
        """
        settings = self._described()
        is_default = settings["value"] == settings["default"]
        settings["default"] = settings["default"].mask(is_default, "")
        order = is_default.sort_values(kind="stable").index
        return settings.loc[order].rename(columns={"default": "default, where it differs"})

    def changed_table(self) -> pd.DataFrame:
        """The fields that differ from their default: value, default, and what they are.

        >>> Config.preset("gpu_24gb").changed_table().index.tolist()
        ['preset_name', 'max_pixels', 'infer_batch_size']
        """
        settings = self._described()
        return settings[settings["value"] != settings["default"]]


# Fields that cannot change a result.
BOOKKEEPING_FIELDS = {
    item.name
    for item in dataclasses.fields(Config)
    if not item.metadata["declaration"].changes_result
}
SETTINGS_TEXT_WIDTH = 96  # characters of a line


def _indented(text: str) -> str:
    indent = " " * 6
    return textwrap.fill(
        text,
        SETTINGS_TEXT_WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


def _setting_text(item: dataclasses.Field, default) -> str:
    """Name, kind, default and needs of a field; below them, indented, what it is."""
    declaration = item.metadata["declaration"]
    declared = f"  {item.name}: {item.type} = {default!r}"
    if declaration.needs:
        declared = f"{declared}; needs {declaration.needs}"
    explanation = declaration.description
    if not declaration.changes_result:
        explanation = f"{explanation} (changes no result)"
    return f"{declared}\n{_indented(explanation)}"


def _groups_text() -> str:
    """All settings, group by group."""
    defaults = Config()
    groups = []
    for group in reversed(Config.__bases__):
        lines = [group.__doc__]
        for item in dataclasses.fields(group):
            lines.append(_setting_text(item, getattr(defaults, item.name)))
        groups.append("\n".join(lines))
    return "\n\n".join(groups)


def _presets_text() -> str:
    """In what each preset differs from the defaults."""
    lines = ["Presets, and in what they differ from the defaults"]
    for preset, changes in PRESETS.items():
        differences = [f"{name}={value!r}" for name, value in changes.items()]
        lines.append(f"  {preset}")
        lines.append(_indented(", ".join(differences) or "in nothing"))
    return "\n".join(lines)


def settings_text() -> str:
    """All settings by group, with default, meaning and what they need; then the presets.

    >>> text = settings_text()
    >>> "  lora_r: int = 16; needs at least 1\\n      rank of the adapter" in text
    True
    """
    return f"{_groups_text()}\n\n{_presets_text()}"


Config.__doc__ = f"{Config.__doc__}\n\n{_groups_text()}"  # for `vqa.Config?`


# === Logging ======================================================================================
def setup_logging(
    log_dir: str | Path, level: int | str = logging.INFO, to_file: bool = True
) -> logging.Logger:
    """Log to the console, and to run.log in `log_dir`, with the time of day; return the logger.

    Safe to call again: handlers are replaced, not added.
    """
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()
    LOGGER.addHandler(logging.StreamHandler(sys.stdout))
    if to_file:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        path = Path(log_dir) / "run.log"
        LOGGER.addHandler(logging.FileHandler(path, encoding="utf-8"))
    formatter = logging.Formatter(
        "%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    for handler in LOGGER.handlers:
        handler.setFormatter(formatter)
    LOGGER.setLevel(level)
    LOGGER.propagate = False  # a notebook's root logger would print every line again
    return LOGGER


@contextlib.contextmanager
def each_warning_once() -> Iterator[None]:
    """Log a warning that repeats within it once, at its end, with its count.

    It also decorates a function: `@each_warning_once()`.
    """
    counts = Counter()

    def count(record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        counts[record.getMessage()] += 1
        return False

    LOGGER.addFilter(count)
    try:
        yield
    finally:
        LOGGER.removeFilter(count)
        for message, times in counts.items():
            LOGGER.warning("%s%s", message, f" ({times} times)" if times > 1 else "")


def _has_kinds(record: Mapping, kinds: Mapping) -> bool:
    """Whether each key of `kinds` has a value of that kind; a text may not be blank.

    >>> _has_kinds({"label": "train fold 0"}, {"label": str})
    True
    >>> _has_kinds({"label": " "}, {"label": str}), _has_kinds({}, {"label": str})
    (False, False)
    """
    for key, kind in kinds.items():
        value = record.get(key)
        is_blank = isinstance(value, str) and not value.strip()
        if is_blank or not isinstance(value, kind):
            return False
    return True


@dataclass(frozen=True)
class MetricLogger:
    """Appends one JSON object a line, so that a killed run keeps every line it wrote."""

    path: str | Path  # the file; it and its folder are made when they are needed

    def log(self, **values) -> None:
        """Append one record: the time in seconds since 1970, then `values`."""
        record = {"time": round(time.time(), 3), **values}
        line = json.dumps(record, ensure_ascii=False) + "\n"
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line)


# What each record of these files has beside its time, and of which kind it is.
STAGE_RECORD = {"label": str, "seconds": (int, float)}  # stages.jsonl
EVENT_RECORD = {"event": str}  # events.jsonl


def read_json_lines(path: Path, needed: Mapping | None = None) -> list[dict]:
    """The records that MetricLogger wrote; [] where there is no such file.

    `needed`: key -> kind of its value, such as STAGE_RECORD. A line that a kill or a full disk
    has cut short, that is no such record, or that has something else there, is left out.
    """
    kinds = {"time": (int, float), **(needed or {})}
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and _has_kinds(record, kinds):
                records.append(record)
    return records


# === Files ========================================================================================
def _fsync_folder(path: Path) -> None:
    """Make sure that a rename in this folder survives a loss of power."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_file(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a new file, and sync it where it is `durable`.

    Raises CheckpointError for a full disk, with the bytes needed and free.
    """
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
        raise CheckpointError(
            f"{path}: the disk is full: {len(content):,} bytes are needed, {free:,} are free; "
            "free some space and run again to continue"
        ) from error


def atomic_write(path: str | Path, content: bytes | str, durable: bool = True) -> None:
    """Replace a file whole: a reader sees the old one or the new one, never half of it.

    A `durable` file also survives a loss of power. A text is written in UTF-8. Raises
    CheckpointError for a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode("utf-8") if isinstance(content, str) else content
    _write_file(temporary, data, durable)
    os.replace(temporary, path)
    if durable:
        _fsync_folder(path.parent)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, needed: Sequence[str] = ()) -> dict:
    """The JSON object in a file of a run.

    Raises DamagedFileError where it cannot be read, is no object, or lacks one of the `needed`
    keys, and FileNotFoundError where there is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise DamagedFileError(path, error) from error
    if not isinstance(content, dict):
        raise DamagedFileError(path, f"a JSON {type(content).__name__}, not an object")
    missing = [key for key in needed if key not in content]
    if missing:
        raise DamagedFileError(path, f"without {', '.join(missing)}")
    return content


def require_kind(path: Path, content: Mapping, kind: type, keys: Sequence[str]) -> None:
    """Raise DamagedFileError unless each of these keys of a JSON file has a value of that kind.

    >>> require_kind(Path("config.json"), {"parts": {}}, dict, ["parts"])
    """
    for key in keys:
        if not isinstance(content[key], kind):
            found = type(content[key]).__name__
            raise DamagedFileError(path, f"{key!r} is of the type {found}, not {kind.__name__}")


def require_same_run(path: Path, found: str, expected: str) -> None:
    """Raise CheckpointError unless the fingerprint found in `path` is that of the run.

    >>> require_same_run(Path("oof.npz"), found="538bc84b", expected="538bc84b")
    """
    if found != expected:
        raise CheckpointError(
            f"{path} belongs to another configuration or data set; choose a new run_name"
        )


def write_arrays(path: Path, fingerprint: str, **arrays: np.ndarray) -> None:
    """Save named arrays with the fingerprint of their run, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, fingerprint=np.array(fingerprint))
    atomic_write(path, buffer.getvalue())


def read_arrays(path: Path, fingerprint: str, needed: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Load what `write_arrays` wrote, by name; the fingerprint is among it.

    Raises DamagedFileError for a file that is not there, cannot be read or lacks one of the
    `needed` arrays, CheckpointError for one of another run.
    """
    try:
        if path.exists() and not zipfile.is_zipfile(path):
            raise ValueError("it is no .npz file")
        with np.load(path, allow_pickle=False) as file:  # checks each array's CRC
            content = {name: file[name] for name in file.files}
    except Exception as error:  # a damaged header makes NumPy and zipfile raise anything
        raise DamagedFileError(path, error) from error
    missing = [name for name in ("fingerprint", *needed) if name not in content]
    if missing:
        raise DamagedFileError(path, f"without {', '.join(missing)}")
    require_same_run(path, str(content["fingerprint"]), fingerprint)
    return content


# === Checkpoints ==================================================================================
WATCHED_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def library_versions() -> dict[str, str]:
    """The installed version of every library on which a checkpoint may depend."""
    return {name: importlib.metadata.version(name) for name in WATCHED_LIBRARIES}


def _other_versions(saved: Mapping[str, str], remedy: str) -> str:
    """The libraries that had another version when something was saved, and what to do.

    Where none had, or `saved` is empty, only the `remedy` is left.
    """
    if not saved:
        return (
            f"an earlier version of this module saved it, without its libraries' versions; {remedy}"
        )
    here = library_versions()
    differing = []
    for name, version in saved.items():
        if version != here.get(name):
            differing.append(f"{name} {version} (here {here.get(name)})")
    if not differing:
        return f"it was saved with the same versions of all libraries; {remedy}"
    return f"it was saved with {', '.join(differing)}: install that version, or {remedy}"


def require_fitting_weights(
    path: Path,
    stored: Mapping,
    wanted: Mapping,
    libraries: Mapping[str, str],
) -> None:
    """Raise CheckpointError unless stored weights have the names and shapes of the wanted ones.

    `libraries`: name -> version with which they were saved, for the message: a library may have
    renamed its weights since.
    """
    unknown = sorted(set(stored) - set(wanted))
    missing = sorted(set(wanted) - set(stored))
    problems = []
    if unknown:
        problems.append(f"{len(unknown)} weights in it are none of the model's: {unknown[0]!r}")
    if missing:
        problems.append(f"{len(missing)} of the model's are not in it: {missing[0]!r}")
    for name in sorted(set(stored) & set(wanted)):
        shapes = [tuple(weights[name].shape) for weights in (stored, wanted)]
        if shapes[0] != shapes[1]:
            problems.append(f"{name!r} has the shape {shapes[0]}, not {shapes[1]}")
            break
    if problems:
        raise CheckpointError(
            f"{path} does not fit the model: {'; '.join(problems)}; "
            f"{_other_versions(libraries, 'choose a new run_name')}"
        )


def _checkpoint_files(
    step: int, tensors: Mapping, state: Mapping, metadata: Mapping
) -> dict[str, bytes]:
    """Name and content of a checkpoint's files; the manifest has the others' SHA-256."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    files = {
        "tensors.safetensors": safetensors_torch.save(weights),
        "state.pt": buffer.getvalue(),
        "metadata.json": json.dumps({"step": step, **metadata}).encode(),
    }
    manifest = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files["manifest.json"] = json.dumps(manifest).encode()
    return files


CHECKPOINT_FILES = ("tensors.safetensors", "state.pt", "metadata.json")  # beside the manifest


class CheckpointManager:
    """Checkpoints in one folder, each committed whole and verified before use.

    A checkpoint is a subfolder such as `step_00000012` that holds
    `tensors.safetensors`, `state.pt`, `metadata.json`, and `manifest.json` with the
    SHA-256 of these three.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        self.directory = Path(directory)  # holds the checkpoints; the first `save` creates it
        self.keep = keep  # number of verified checkpoints that `prune` leaves

    def save(self, step: int, tensors: Mapping, state: Mapping, metadata: Mapping) -> Path:
        """Commit a checkpoint, delete the outdated ones, and return the new one's folder.

        `tensors` become a safetensors file, `state` a file for
        torch.load(weights_only=True) and `metadata` JSON. Raises CheckpointError
        where the disk is full.
        """
        files = _checkpoint_files(step, tensors, state, metadata)
        self.directory.mkdir(parents=True, exist_ok=True)
        final = self.directory / f"step_{step:08d}"
        while final.exists():  # saved twice at one step, or damaged: "+" sorts behind it
            final = final.with_name(final.name + "+")
        # The folder gets its name last: a kill at any point leaves the earlier checkpoints intact.
        with tempfile.TemporaryDirectory(
            prefix=".incomplete-",
            dir=self.directory,
            ignore_cleanup_errors=True,  # after the renaming there is nothing to clean up
        ) as unfinished:
            for name, content in files.items():
                _write_file(Path(unfinished) / name, content)
            os.replace(unfinished, final)
        _fsync_folder(self.directory)
        self.prune()
        return final

    @staticmethod
    def problem(path: Path) -> str | None:
        """Why the checkpoint at `path` cannot be trusted; None where every hash is right."""
        try:
            manifest = read_json(path / "manifest.json", CHECKPOINT_FILES)
            damaged = []
            for name in CHECKPOINT_FILES:
                if file_sha256(path / name) != manifest[name]:
                    damaged.append(name)
        except OSError as error:
            return error_in_words(error)
        except DamagedFileError as error:
            return error.problem
        if damaged:
            return f"SHA-256 differs: {', '.join(damaged)}"
        return None

    def latest_verified(self) -> Path | None:
        """The newest checkpoint whose manifest verifies, or None.

        The ones passed over are logged with the reason.
        """
        for path in sorted(self.directory.glob("step_*"), reverse=True):
            problem = self.problem(path)
            if problem is None:
                return path
            LOGGER.warning("Skipped checkpoint %s: %s", path, problem)
        return None

    def restore(self, path: Path) -> tuple[dict, dict, dict]:
        """What `save` was given as (tensors, state, metadata), the tensors on the CPU.

        `metadata` also holds the step. Raises CheckpointError if the manifest does
        not verify.
        """
        problem = self.problem(path)
        if problem is not None:
            raise CheckpointError(
                f"{path} is damaged ({problem}); delete it to continue from an older one"
            )
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        metadata = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        tensors = safetensors_torch.load_file(path / "tensors.safetensors")
        return tensors, state, metadata

    def prune(self) -> None:
        """Delete what is older than the newest `keep` verified checkpoints.

        Leftovers of killed writes go too. A damaged checkpoint does not count as
        kept.
        """
        paths = sorted(self.directory.glob("step_*"))
        verified = [path for path in paths if self.problem(path) is None]
        outdated = []
        if verified:
            oldest_kept = verified[-self.keep :][0]
            outdated = [path for path in paths if path < oldest_kept]
        leftovers = list(self.directory.glob(".incomplete-*"))
        for path in outdated + leftovers:
            shutil.rmtree(path)


def _checkpoint_weights(model) -> dict:
    """Trainable parameters and buffers of the state dict, by name.

    Where two names share one tensor, it is there under both.
    """
    names = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.add(name)
    for name, _ in model.named_buffers(remove_duplicate=False):
        names.add(name)
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def _state_dict_or_none(stateful) -> dict | None:
    """State of an optimizer or a scheduler; None where there is none."""
    return None if stateful is None else stateful.state_dict()


def save_checkpoint(model, optimizer, scheduler, epoch, fold, metrics, path, logger=None) -> Path:
    """Save the state of a training in one file and return its path, for any torch module.

    The file holds trainable weights and buffers, optimizer and scheduler (either
    may be None), `epoch`, `fold` and `metrics` (name -> number). `load_checkpoint`
    reads it. It is for your own training loops: no run uses it, because
    `FoldState.save` writes what a fold continues from.
    """
    plain_metrics = {}
    for name, value in metrics.items():
        # A NumPy scalar would need unpickling, which could run code.
        plain_metrics[name] = value.item() if isinstance(value, np.generic) else value
    content = {
        "model": _checkpoint_weights(model),
        "epoch": epoch,
        "fold": fold,
        "metrics": plain_metrics,
        "optimizer": _state_dict_or_none(optimizer),
        "scheduler": _state_dict_or_none(scheduler),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, buffer.getvalue())
    if logger is not None:
        logger.info(
            "Saved checkpoint %s (epoch %s, fold %s, %d bytes)",
            path,
            epoch,
            fold,
            buffer.tell(),
        )
    return Path(path)


def load_checkpoint(model, optimizer, scheduler, path, logger=None) -> tuple:
    """Load what `save_checkpoint` wrote, on the CPU, and return (epoch, fold, metrics).

    Optimizer and scheduler may be None: theirs is then left unread. Raises
    CheckpointError, and changes nothing, where the weights are not the model's or a
    wanted state is missing.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    differing = sorted(set(_checkpoint_weights(model)) ^ set(content["model"]))
    if differing:
        raise CheckpointError(f"{path} does not fit the model; differing keys: {differing}")
    wanted = {}
    if optimizer is not None:
        wanted["optimizer"] = optimizer
    if scheduler is not None:
        wanted["scheduler"] = scheduler
    missing = [name for name in wanted if content[name] is None]
    if missing:
        raise CheckpointError(f"{path} was saved without {' and '.join(missing)}")
    model.load_state_dict(content["model"], strict=False)  # the frozen weights are not in it
    for name, stateful in wanted.items():
        stateful.load_state_dict(content[name])
    epoch, fold, metrics = content["epoch"], content["fold"], content["metrics"]
    if logger is not None:
        logger.info("Loaded checkpoint %s (epoch %s, fold %s)", path, epoch, fold)
    return epoch, fold, metrics


# === Memory =======================================================================================
def _cuda_is_in_use() -> bool:
    """Whether this process has initialised CUDA; asking does not initialise it."""
    return "torch" in sys.modules and torch.cuda.is_initialized()


def memory_summary() -> dict[str, float]:
    """Memory in use, in GiB rounded to two digits.

    rss_gib: this process's resident set. With CUDA in use also gpu_gib (allocated),
    gpu_reserved_gib and gpu_peak_gib, each of the GPU where it is largest.
    """
    summary = {"rss_gib": psutil.Process().memory_info().rss / 2**30}
    if _cuda_is_in_use():
        gpus = range(torch.cuda.device_count())
        summary["gpu_gib"] = max(map(torch.cuda.memory_allocated, gpus)) / 2**30
        summary["gpu_reserved_gib"] = max(map(torch.cuda.memory_reserved, gpus)) / 2**30
        summary["gpu_peak_gib"] = max(map(torch.cuda.max_memory_allocated, gpus)) / 2**30
    return {name: round(gib, 2) for name, gib in summary.items()}


def reset_peak_memory() -> None:
    """Start to measure the peak of every GPU anew."""
    for gpu in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(gpu)


def clear_memory(logger: logging.Logger | None = None) -> dict[str, float]:
    """Collect garbage, give cached GPU blocks back, and return the summary afterwards.

    With a `logger` the summary is logged too.
    """
    gc.collect()
    if _cuda_is_in_use():
        torch.cuda.empty_cache()
    summary = memory_summary()
    if logger is not None:
        logger.info("Memory after clearing: %s", summary)
    return summary


@contextlib.contextmanager
def track_peak_memory(label: str, logger: logging.Logger = LOGGER) -> Iterator[dict]:
    """Yield a dict that the end of the block fills with what the block took, and log it.

    label: the given one; seconds: wall time; and what `memory_summary` has, whose
    gpu_peak_gib is then the block's.
    """
    if _cuda_is_in_use():
        reset_peak_memory()
    report = {"label": label}
    start = time.perf_counter()
    yield report
    report["seconds"] = round(time.perf_counter() - start, 1)
    report.update(memory_summary())
    measured = {name: value for name, value in report.items() if name != "label"}
    logger.info("%s: %s", label, measured)


def _allowed_memory_share(gpu: int) -> float:
    """Share of a GPU's memory that this process may take; 1.0 where torch cannot tell."""
    # torch 2.8 and later can.
    if not hasattr(torch.cuda, "get_per_process_memory_fraction"):
        return 1.0
    return torch.cuda.get_per_process_memory_fraction(gpu)


def memory_budget() -> float:
    """Bytes that this process may allocate on each of its GPUs, less 8 % for fragmentation.

    What it already holds counts as available. The GPU with the least decides.
    """
    budgets = []
    for gpu in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(gpu)
        reserved = torch.cuda.memory_reserved(gpu)
        obtainable = min(free, total * _allowed_memory_share(gpu) - reserved)
        budgets.append(0.92 * (reserved + obtainable))
    return min(budgets)


def free_gib() -> float:
    """GiB that this process may take of its fullest GPU, or of RAM without one."""
    if torch.cuda.is_available():
        return memory_budget() / 2**30
    return psutil.virtual_memory().available / 2**30


# === Processes that work together =================================================================
# The processes that share the work of one fold are a process group. Each holds the whole model
# and takes its share of the rows; they meet where gradients and scores are added up.
def _is_in_process_group() -> bool:
    """Whether this process has met the others of a process group; asking does not import torch."""
    return "torch" in sys.modules and torch.distributed.is_initialized()


def process_rank() -> int:
    """Number of this process in its process group, from 0; 0 for one that works alone."""
    return torch.distributed.get_rank() if _is_in_process_group() else 0


def process_count() -> int:
    """How many processes share the work of a fold; 1 for one that works alone."""
    return torch.distributed.get_world_size() if _is_in_process_group() else 1


def init_process_group() -> None:
    """Meet the other processes of the process group, where WORLD_SIZE says that there are any.

    run_folds sets it and RANK, and so does `accelerate launch`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return
    has_nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    # One process may score for long before the others meet it, so the limit is wide.
    # Nobody waits that long for a dead one: launch_workers sees to it.
    torch.distributed.init_process_group(
        backend="nccl" if has_nccl else "gloo",
        timeout=datetime.timedelta(days=1),
    )


def hide_other_gpus() -> None:
    """Hide the GPUs of the other processes that `accelerate launch` has started here."""
    if "LOCAL_RANK" not in os.environ:
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    gpu = str(local_rank)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        gpu = visible.split(",")[local_rank]
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    os.environ["LOCAL_RANK"] = "0"  # its only GPU is its first one now


def all_reduce_sum(tensor):
    """The tensor, replaced in place by its sum over the process group."""
    if process_count() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def any_process(condition: bool) -> bool:
    """Whether the condition holds in any process of the process group.

    Every process must call it at the same point, or they would wait for each other;
    all get the same answer, so that all take the same turn.
    """
    if process_count() == 1:
        return condition
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = all_reduce_sum(torch.tensor(float(condition), device=device))
    return bool(count > 0)


def all_reduce_gradients(parameters: Iterable) -> None:
    """Replace every parameter's gradient by its sum over the process group, in one message."""
    if process_count() == 1:
        return
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:  # a short step has no row for every process
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    message = torch.cat([gradient.flatten() for gradient in gradients])
    sizes = [gradient.numel() for gradient in gradients]
    sums = all_reduce_sum(message).split(sizes)
    for gradient, gradient_sum in zip(gradients, sums, strict=True):
        gradient.copy_(gradient_sum.view_as(gradient))


@dataclass
class ProgressFile:
    """What a worker is doing now, in a small JSON file that the notebook polls.

    It is written at most twice a second, apart from the end of a stage.
    """

    path: Path
    parent: int = 0  # id of the process that started this one; 0: its end does not matter
    stop_reason: str = ""  # why to stop, set by `request_stop` or `update`; "": go on
    last_write: float = 0.0  # time.monotonic() of it in seconds, set by `update`

    def request_stop(self, number: int, frame) -> None:
        """A signal handler: the work ends at the next call of `update` that may end it.

        `update` is called at safe points only.
        """
        self.stop_reason = signal.Signals(number).name

    def update(self, stage: str, done: int, total: int, together: bool = False, **details) -> None:
        """Write that `done` of `total` steps of `stage` are done, with any `details` for JSON.

        Raises Interrupted after a signal or the parent's death. A process that
        works alone stops at any call. A group must stop at the same step, because
        one that stopped earlier would leave the others waiting for it: so its
        processes ask each other, and only in calls with `together`, which says that
        every process of the process group makes this very call.
        """
        if self.parent and os.getppid() != self.parent:
            self.stop_reason = "the end of the notebook's process"
        if done == total or self.stop_reason or time.monotonic() - self.last_write > 0.5:
            self.last_write = time.monotonic()
            state = {"stage": stage, "done": done, "total": total, **details}
            atomic_write(self.path, json.dumps(state), durable=False)
        may_stop = together or process_count() == 1
        if may_stop and any_process(bool(self.stop_reason)):
            reason = self.stop_reason or "another process"
            raise Interrupted(f"stopped by {reason} in {stage}; run again to continue")


def exit_in_words(status: int) -> str:
    """How a process ended, from its exit status; negative is the number of a signal.

    >>> exit_in_words(1)
    'ended with exit status 1'
    >>> exit_in_words(-9)
    'was killed by signal 9 (SIGKILL), probably out of memory: lower the batch sizes'
    """
    if status >= 0:
        return f"ended with exit status {status}"
    number = -status
    name = "unknown"
    with contextlib.suppress(ValueError):
        name = signal.Signals(number).name
    text = f"was killed by signal {number} ({name})"
    if name != "SIGKILL":
        return text
    # Nobody asked for it: so the system does where memory runs out.
    return f"{text}, probably out of memory: lower the batch sizes"


def prefetch(batches: Iterator) -> Iterator:
    """The same items; while one is used, a thread prepares the next two. None ends them.

    >>> list(prefetch(iter("abc")))
    ['a', 'b', 'c']
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = deque()
        for _ in range(2):
            waiting.append(pool.submit(next, batches, None))
        while True:
            batch = waiting.popleft().result()
            if batch is None:
                return
            waiting.append(pool.submit(next, batches, None))
            yield batch


# === Results by batch =============================================================================
def _end_last_line(path: Path) -> None:
    """End a line that a kill has cut short: the next one would be lost with it."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")


@dataclass(frozen=True)
class KeptResults:
    """Results by key in a file of JSON lines, a line a batch: a kill loses one batch at most."""

    path: Path
    name: str  # of a line's object, key -> result

    def read(self) -> dict:
        """Key -> result of everything that was done."""
        results = {}
        for record in read_json_lines(self.path, {self.name: dict}):
            results.update(record[self.name])
        return results

    def fill(
        self,
        batches: Sequence[pd.DataFrame],
        key: str,
        work: Callable,
        progress: Callable,
        label: str,
    ) -> None:
        """Do what is left of the batches; `work(rows)` gives a result for each of the rows.

        `key`: the column with the rows' keys. Batches are planned over all rows, whichever are
        done already: after a kill the others are in the same batches, and their results the
        same.
        """
        known = self.read()
        _end_last_line(self.path)
        total = sum(map(len, batches))
        done = 0
        for batch in batches:
            progress(label, done, total)
            done += len(batch)
            left = batch[~batch[key].isin(known)]
            if len(left):
                results = dict(zip(left[key], work(left), strict=True))
                MetricLogger(self.path).log(**{self.name: results})
        progress(label, total, total)


# ======= 2. Data ==================================================================================

# === Archives =====================================================================================
MAX_MEMBERS = 2_000_000  # of an archive
MAX_UNPACKED_BYTES = 64 * 2**30
MAX_RATIO = 200  # of unpacked to packed bytes, from 100 MiB on
_UNSAFE_MEMBER_NAME = re.compile(
    r"""
    ^/                # an absolute path
    | ^[A-Za-z]:      # a drive of Windows
    | \\              # a backslash, which Windows takes for a slash
    | (^|/)\.\.(/|$)  # a step upwards
    """,
    re.VERBOSE,
)
_ZIP_NAME_IS_UTF8 = 0x800  # a flag of a .zip's members
_LARGEST_TABLE = 64 * 2**20  # bytes that are read of a table in an archive
# What a name is made of, in each encoding that is tried.
_LETTERS_OF_NAMES = {
    "utf-8": r"(?s).*",
    "cp949": r"[ -~가-힣ㄱ-ㅣ一-\u9fff\u3000-\u303f\uff01-\uff5e]+",  # Korean, hanja, full width
    "cp437": r"[ -~ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜáíóúñÑß]+",  # western Europe
}


def _check_end_of_tar(opened: tarfile.TarFile) -> None:
    """Raise EOFError unless the zeros that end a .tar follow the last member that was read.

    tarfile takes a damaged member for the end. Reading on also compares a .gz with
    its checksum.
    """
    opened.fileobj.seek(opened.offset)
    if not opened.fileobj.read(2**20).startswith(bytes(512)):
        raise EOFError("the end of the archive is missing, or a member is damaged")


def _check_members(
    opened: zipfile.ZipFile | tarfile.TarFile, packed_bytes: int, free_bytes: int
) -> None:
    """Refuse an archive with a member that must not be unpacked.

    Raises ValueError about the first such member.
    """
    limits = {
        free_bytes: "disk",
        max(MAX_RATIO * packed_bytes, 100 * 2**20): "decompression bomb",
        MAX_UNPACKED_BYTES: "archive",
    }
    limit = min(limits)
    total = 0
    for number, member in enumerate(_archive_members(opened), start=1):
        total += member.size
        if not member.is_plain or _UNSAFE_MEMBER_NAME.search(member.name):
            problem = "is a link or a device, or its name leads out of the folder"
            raise ValueError(f"member {member.name!r} {problem}")
        if number > MAX_MEMBERS or total > limit:
            raise ValueError(
                f"member {member.name!r} is number {number:,} and makes {total:,} bytes in all; "
                f"the limit is {MAX_MEMBERS:,} and {limit:,} ({limits[limit]})"
            )


def _unmarked_names(archive: Path) -> list[bytes]:
    """The names in a .zip beyond ASCII without a note of their encoding, as their bytes."""
    names = []
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            is_marked = member.flag_bits & _ZIP_NAME_IS_UTF8
            if not is_marked and not member.orig_filename.isascii():
                names.append(member.orig_filename.encode("cp437"))  # as zipfile decoded it
    return names


def _decode_names(names: Sequence[bytes], encoding: str) -> list[str]:
    """The names in this encoding; empty where one is not in it, or is not made of its letters."""
    try:
        decoded = [name.decode(encoding) for name in names]
    except UnicodeDecodeError:
        return []
    letters = re.compile(_LETTERS_OF_NAMES[encoding])
    return decoded if all(map(letters.fullmatch, decoded)) else []


def _count_in_tables(names: Sequence[str], archive: Path) -> int:
    """How many of the names occur in the tables that lie in the .zip or beside it."""
    text = b""
    with zipfile.ZipFile(archive) as opened:
        for member in opened.namelist():
            if Path(member).name in COMPETITION_FILES:
                text += opened.open(member).read(_LARGEST_TABLE)
    for name in COMPETITION_FILES:
        path = archive.with_name(name)
        if path.is_file():
            text += path.read_bytes()
    found = 0
    for name in names:
        last_part = name.rstrip("/").rpartition("/")[2]
        found += last_part.encode() in text or last_part.encode("cp949", "replace") in text
    return found


def zip_name_encoding(archive: Path) -> str:
    """The encoding of the names in a .zip that are not marked as UTF-8.

    They are UTF-8 where all can be (a Mac writes it). Else cp949 (Korean Windows) or
    cp437 (the format's own), whichever gives names of plain letters; where both do, the one
    whose names the tables have. Raises ValueError where that leaves none or two.
    """
    names = _unmarked_names(archive)
    if not names or _decode_names(names, "utf-8"):
        return "utf-8"
    readings = {}
    for encoding in ("cp949", "cp437"):
        decoded = _decode_names(names, encoding)
        if decoded:
            readings[encoding] = decoded
    if len(readings) > 1:
        in_tables = {name: _count_in_tables(texts, archive) for name, texts in readings.items()}
        most = max(in_tables.values())
        readings = {name: readings[name] for name, count in in_tables.items() if count == most}
    if len(readings) != 1:
        tried = ", ".join(f"{name} {texts[0]!r}" for name, texts in readings.items())
        raise ValueError(
            f"{len(names)} names have no note of their encoding, for example {names[0]!r}; "
            f"tried UTF-8, cp949 and cp437, what makes sense: {tried or 'none'}"
        )
    encoding, decoded = readings.popitem()
    LOGGER.warning(
        "%s: %d names have no note of their encoding and are read as %s, for example %r",
        archive,
        len(names),
        encoding,
        decoded[0],
    )
    return encoding


def _open_with_names(archive: Path) -> zipfile.ZipFile | tarfile.TarFile:
    """The archive, open for reading, with names in the encoding in which they were written.

    Raises what `zip_name_encoding` raises.
    """
    encoding = zip_name_encoding(archive) if zipfile.is_zipfile(archive) else None
    return _open_archive(archive, encoding)


def _extract(archive: Path, folder: Path) -> None:
    """Unpack an archive into a folder once all its members are known to be harmless.

    Raises what `zip_name_encoding`, `_check_members` and `_check_end_of_tar` raise.
    """
    with _open_with_names(archive) as opened:
        packed_bytes = archive.stat().st_size
        free_bytes = shutil.disk_usage(folder).free
        _check_members(opened, packed_bytes, free_bytes)
        if isinstance(opened, tarfile.TarFile):
            _check_end_of_tar(opened)
            opened.extractall(folder, filter="data")
        else:
            opened.extractall(folder)


def unpack_archive(archive: str | Path, folder: str | Path) -> Path:
    """Unpack a .zip or .tar(.gz) into the new `folder`, whole or not at all, and return it.

    Raises DataError with archive and member for one that is damaged or unsafe
    (links, names that lead out of the folder, too many bytes or members), or if
    `folder` exists.
    """
    archive = Path(archive)
    folder = Path(folder)
    if folder.exists():
        raise DataError(
            f"{folder}: exists already; delete it or unpack {archive.name} into a new folder"
        )
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # what a killed process left
    unfinished.mkdir(parents=True)
    try:
        _extract(archive, unfinished)
        return unfinished.rename(folder)
    except Exception as error:  # each format and each decoder raises its own
        raise DataError(
            f"{archive}: not unpacked ({error_in_words(error)}); "
            "download it again, or unpack it by hand"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def unpack_once(archive: Path) -> Path:
    """The folder of an archive that is unpacked into the system's one for temporary files.

    The next call finds it again by the archive's name, size and time. Raises DataError as
    `unpack_archive` does.
    """
    status = archive.stat()
    identity = f"{archive.name} {status.st_size} {status.st_mtime_ns}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()).resolve() / f"vqa-data-{key}"
    if folder.is_dir():
        LOGGER.info("Competition data: %s, from %s", folder, archive)
    else:
        LOGGER.info("Competition data: %s, being unpacked from %s", folder, archive)
        unpack_archive(archive, folder)
    return folder


def unpack_competition(archive: Path) -> Path:
    """The competition's folder, unpacked from an archive that holds it."""
    return find_competition(unpack_once(archive))


def find_competition(data_dir: str | Path | None = None) -> Path:
    """The competition's folder, unpacked first where an archive holds it.

    `locate_competition` says where it is looked for, and what is raised.
    """
    found = locate_competition(data_dir)
    if found.is_file():
        return unpack_competition(found)
    return found


# === Settings of a session ========================================================================
# Settings that have an environment variable of their own.
_FIELD_VARIABLES = {
    "data_dir": "VQA_DATA_DIR",
    "model_id": "VQA_MODEL",
    "output_dir": "VQA_OUTPUT_DIR",
    "run_name": "VQA_RUN_NAME",
}


def _environment_overrides(environ: Mapping) -> dict:
    """The JSON object in VQA_OVERRIDES, empty without one; ValueError for anything else."""
    text = environ.get("VQA_OVERRIDES") or "{}"
    try:
        overrides = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"VQA_OVERRIDES is not valid JSON ({error}): {text!r}") from error
    if not isinstance(overrides, dict):
        raise ValueError(
            f'VQA_OVERRIDES must be a JSON object such as {{"num_epochs": 1}}, not {text!r}'
        )
    return overrides


def load_config(
    preset: str = "auto", overrides: Mapping | None = None, environ: Mapping = os.environ
) -> Config:
    """The settings of a session, with the competition found.

    Each of these wins over those before it: the preset (VQA_PRESET over `preset`),
    `overrides`, the variables of single settings such as VQA_MODEL, and
    VQA_OVERRIDES. Raises ValueError for what is unknown, impossible or not JSON, and what
    `require_machine` raises for what cannot run here.
    """
    fields = dict(overrides or {})
    for name, variable in _FIELD_VARIABLES.items():
        if environ.get(variable):
            fields[name] = environ[variable]
    fields.update(_environment_overrides(environ))
    fields["data_dir"] = str(find_competition(fields.get("data_dir")))
    config = Config.preset(environ.get("VQA_PRESET") or preset, **fields)
    config = fall_back_to_smaller_model(config)
    require_machine(config)
    return config


def fall_back_to_smaller_model(config: Config) -> Config:
    """The config, with the 8B in it where the GPUs together cannot hold the 35B, and the reason.

    Only preset "large"'s own model, spread over the GPUs, is replaced.
    """
    if config.model_id != PRESETS["large"]["model_id"] or not config.spread_model:
        return config
    total_gib = sum(gpu["memory_gib"] for gpu in detect_runtime().gpus)
    available_gib = SPREAD_MEMORY_SHARE * total_gib
    if available_gib >= LARGE_MODEL_GIB:
        return config
    reason = (
        f"stepped down to the 8B: the 35B needs {LARGE_MODEL_GIB} GiB for its weights, "
        f"these GPUs have {available_gib:.0f}"
    )
    return dataclasses.replace(
        config,
        model_id=Config.model_id,
        spread_model=False,
        preset_reason=reason,
    )


# Bytes that a billion parameters take at least, in GiB, by how they are loaded.
_GIB_A_BILLION = {"4bit": 0.5, "8bit": 0.93, "fp16": 1.86, "bf16": 1.86, "fp32": 3.73}
# Beside the weights, at least: CUDA itself, the adapter, the activations of one question.
_LEAST_ROOM_GIB = 1.0


def billion_parameters(model_id: str) -> float | None:
    """The number that a model's name gives for its size, in billions; None without one.

    >>> billion_parameters("Qwen/Qwen3-VL-30B-A3B-Instruct"), billion_parameters("my/model")
    (30.0, None)
    """
    sizes = re.findall(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)[Bb](?![A-Za-z0-9])", model_id)
    return max(map(float, sizes), default=None)


def _least_weights_gib(config: Config, precision: str) -> float:
    """GiB that the base model's weights take at least; 0 where its name does not give its size."""
    if Path(config.model_path).is_dir():
        return 0.0  # preflight computes it from the shapes
    kind = precision if config.quantization == "none" else config.quantization
    return (billion_parameters(config.model_id) or 0.0) * _GIB_A_BILLION[kind]


def require_machine(config: Config) -> None:
    """Raise ValueError where these settings cannot run on this machine, and say what to do.

    Nothing is downloaded or loaded: a model's size is what its name gives, so that preflight,
    which computes it, may still find that it does not fit. Raises what `detect_runtime` raises,
    too.
    """
    runtime = detect_runtime(config.precision, config.attn_implementation)
    where = f"Preset {config.preset_name!r} cannot run here"
    if not runtime.gpus and config.quantization != "none":
        raise ValueError(
            f"{where}: quantization {config.quantization!r} needs a GPU, and none is seen: "
            f"{how_to_get_a_gpu()}, or choose another preset: {_CPU_PRESETS}"
        )
    parts = [gpu["name"] for gpu in runtime.gpus if is_part_of_gpu(gpu["index"])]
    if parts and config.spread_model:
        raise ValueError(
            f"{where}: spread_model needs whole GPUs, and {parts[0]} is a part of one. "
            "Set spread_model=False and a model_id that fits into it"
        )
    if runtime.gpus:
        sizes = [gpu["memory_gib"] for gpu in runtime.gpus]
        memory = SPREAD_MEMORY_SHARE * sum(sizes) if config.spread_model else min(sizes)
        place = " and ".join(dict.fromkeys(gpu["name"] for gpu in runtime.gpus))
        remedy = "set PRESET = 'auto', a smaller model_id, or quantization='4bit'"
    else:
        memory = psutil.virtual_memory().total / 2**30
        place = "this computer"
        remedy = f"{how_to_get_a_gpu()}, or choose another preset: {_CPU_PRESETS}"
    weights = _least_weights_gib(config, runtime.precision)
    if weights and weights + _LEAST_ROOM_GIB > memory:
        raise ValueError(
            f"{where}: {config.model_id} takes {weights:.0f} GiB at least, and {place} has "
            f"{memory:.0f} for it and {_LEAST_ROOM_GIB:.0f} GiB of work beside it: {remedy}"
        )


# === Texts ========================================================================================
# What shows nothing: control and format characters (zero width, soft hyphen, byte order mark,
# marks of direction), Hangul fillers, the blank Braille cell.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufeff\uffa0"
    "\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a]"
)
# These join signs into another one, as in a family of emoji; alone they show nothing either.
_JOINERS = re.compile("[\u200c\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef]")


def _on_one_line(text: str) -> str:
    """The text with composed Hangul and one space for every stretch of blanks, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _is_decomposed(text: str) -> bool:
    """Whether Hangul or accents stand in it as parts, as in names of files from a Mac."""
    return not unicodedata.is_normalized("NFC", text)


def _has_line_break(text: str) -> bool:
    """Whether it has more than one line, blank ones at its ends aside."""
    return len(text.strip().splitlines()) > 1


def _has_invisible(text: str) -> bool:
    """Whether it has characters that show nothing and that `prompt_text` leaves out."""
    return bool(_INVISIBLE.search(text))


def comparable_text(text: str) -> str:
    """The text as a reader sees it, so that two texts that look alike are equal.

    Hangul is composed (NFC), characters that show nothing are left out, and every stretch
    of blanks or line breaks is one space, with none at the ends. Capitals stay.

    >>> comparable_text("red\\u200b\\u00a0 apple\\n")
    'red apple'
    >>> comparable_text("\\u3164\\u00ad")
    ''
    """
    shown = _INVISIBLE.sub("", text)
    return _on_one_line(_JOINERS.sub("", shown))


def shows_nothing(text: str) -> bool:
    """Whether a reader sees a blank: every test for a blank cell or choice is this one.

    >>> shows_nothing(" \\u200b"), shows_nothing("0")
    (True, False)
    """
    return comparable_text(text) == ""


def prompt_text(text: str) -> str:
    """The text as it stands in the prompt: one line without blanks at its ends.

    It is `comparable_text` with the joiners of emoji kept. A line break would look like a
    further choice, and a chat template may trim the end of the last choice.

    >>> prompt_text(" red \\nb. blue ")
    'red b. blue'
    """
    if shows_nothing(text):
        return ""
    return _on_one_line(_INVISIBLE.sub("", text))


# === Looks of choices =============================================================================
def _alternatives(words: str) -> str:
    """A regular expression's alternatives from words with spaces between them.

    >>> _alternatives("red green")
    'red|green'
    """
    return "|".join(words.split())


_COLOR_NAMES = _alternatives(
    r"""
    빨강 빨간 붉은 파랑 파란 푸른 노랑 노란 초록 연두 주황 분홍 핑크 보라 자주 검정 검은 까만
    흰 하양 하얀 베이지 아이보리 청록 민트 카키 와인 네이비 살구 오렌지
    블랙 화이트 레드 블루 그린 옐로\S? 그레이 브라운
    red orange yellow green blue purple violet pink brown black white gr[ae]y beige gold golden
    silver navy turquoise teal crimson maroon olive cyan magenta ivory tan
    """
)
# 하늘색, 은빛: any word that ends so, but not words like 특색 and 검색.
_ANY_COLOR = r"\S{1,3}(?<![특검염탐수])[색빛]"
_SHADES = _alternatives("연한 진한 짙은 밝은 어두운 옅은 light dark bright pale")
_COLOR_ENDINGS = _alternatives("색 빛 불 색깔 색상 계열 light colou?r")
_COLOR = re.compile(
    rf"(?:(?:{_SHADES})\s?)?"
    rf"(?:{_COLOR_NAMES}|{_ANY_COLOR})"
    rf"(?:\s?(?:{_COLOR_ENDINGS}))*"
    r"(?:이다|입니다|이에요|예요)?"
)
_BETWEEN_COLORS = re.compile(r"(?:와|과|및|\band\b)\s+|[,/·&]")

_COUNTERS = _alternatives(
    """
    개 명 마리 대 권 병 그루 송이 잔 장 채 척 줄 칸 쌍 벌 켤레 가지 자루 조각 사람 인 자리
    그릇 접시 봉지 상자 묶음 다발 알 판 통 캔 컵 군데 곳
    """
)
_NATIVE_NUMBERS = _alternatives("하나 둘 셋 넷 한 두 세 네 다섯 여섯 일곱 여덟 아홉")
_NUMBER_WORDS = _alternatives(
    """
    열 스물 스무 서른
    none zero one two three four five six seven eight nine ten eleven twelve
    """
)
_COUNT = re.compile(
    r"(?:약\s?)?"
    r"(?:\d{1,3}|[영공일이삼사오육칠팔구십백]{1,3}"
    rf"|(?:열|스물|서른)?\s?(?:{_NATIVE_NUMBERS})|{_NUMBER_WORDS})"
    rf"\s?(?:{_COUNTERS})?(?:이다|입니다)?"
)
_NUMBER = re.compile(r"\D{0,8}\d[\d,.:/~-]*.{0,12}")

_KOREAN_SIDES = _alternatives(
    r"""
    정?중앙 한?가운데 (?:왼|오른|위|아래|앞|뒤|안|바깥|옆|동|서|남|북)[쪽편측] [좌우]측
    [좌우]?[상하]단 좌 우 위 아래 앞 뒤 옆 안 밖 밑
    """
)
_ENGLISH_SIDES = _alternatives(
    "left right center centre middle top bottom above below front back behind"
)
_SIDE = re.compile(
    rf"(?:\S+의 )?(?:{_KOREAN_SIDES})(?: (?:위|아래|끝|모서리|구석))?(?:에 있다|에)?"
    r"|(?:(?:on|in|at|to) )?(?:the )?(?:(?:upper|lower|top|bottom|far)[ -])?"
    rf"(?:{_ENGLISH_SIDES})(?: side)?"
)

_YES_WORDS = _alternatives(
    "예 네 응 그렇다 그렇습니다 맞다 맞음 맞습니다 있다 있음 있습니다 있어요 yes true 참 o"
)
_NO_WORDS = _alternatives(
    """
    아니 아니다 아니오 아니요 아닙니다 아님 없다 없음 없습니다 없어요 틀리다 틀림
    no false 거짓 x
    """
)
_YES = re.compile(rf"(?:{_YES_WORDS})(?:[,.].*)?")  # not "네 명", four people
_NO = re.compile(rf"(?:{_NO_WORDS})(?:[,.].*)?")
# What an answer to a yes/no question ends in: a predicate, or a word that is unsure.
_PREDICATE = re.compile(
    r".*(?:다|요|음|함|됨|임|림|힘|김|짐|없|불가|불명|가능|모름)"
    r"|.*\b(?:yes|no|true|false|unknown|unclear|cannot|can't|not|partly|maybe)\b.*"
)


def _names_colors(text: str) -> bool:
    """Whether the text is one colour or a few."""
    parts = _BETWEEN_COLORS.split(text)
    return all(_COLOR.fullmatch(part.strip()) for part in parts)


# The look of choices -> what tells whether a choice has it. The first that fits is taken.
_LOOKS = {
    "color": _names_colors,
    "counting": _COUNT.fullmatch,
    "location": _SIDE.fullmatch,
    "number": _NUMBER.fullmatch,
}


def _filled_texts(choices: Sequence[str]) -> list[str]:
    """The choices that show anything, comparable and in lower case."""
    texts = [comparable_text(choice).casefold().rstrip(".!") for choice in choices]
    return [text for text in texts if text]


def look_of_choices(choices: Sequence[str]) -> str:
    """What the choices have in common, in whatever order: "" where they have nothing.

    "yesno" where one says yes and one says no; else "color", "counting" (small numbers, with
    or without a counter such as 개), "location" (sides) or "number" (others, with units)
    where all are, or all but one of three or more.

    >>> look_of_choices(["yes", "no", "both", "unknown"])
    'yesno'
    >>> look_of_choices(["빨간색", "파란색", "흰색", "없음"])
    'color'
    >>> look_of_choices(["3,000원", "3,500원", "4,000원", "4,500원"])
    'number'
    """
    texts = _filled_texts(choices)
    if any(map(_YES.fullmatch, texts)) and any(map(_NO.fullmatch, texts)):
        return "yesno"
    needed = max(2, len(texts) - 1)
    for look, has_it in _LOOKS.items():
        count = sum(bool(has_it(text)) for text in texts)
        if count >= needed:
            return look
    return ""


def _can_answer_yes_or_no(choices: Sequence[str]) -> bool:
    """Whether some choice is a predicate or unsure, as answers to a yes/no question are."""
    texts = _filled_texts(choices)
    return not texts or any(map(_PREDICATE.fullmatch, texts))


# === Words of Korean questions ====================================================================
# What a noun asks for where a question is about it. These also end compounds: 전화번호.
_KOREAN_NOUNS = {
    "color": _alternatives("색깔 색상 빛깔 색채 색조 컬러"),
    "counting": _alternatives(
        "개수 갯수 마릿수 인원 인원수 명수 대수 권수 가짓수 횟수 수량 글자수 사람수"
    ),
    "ocr": _alternatives(
        """
        글자 글씨 글귀 문자 문구 문장부호 단어 숫자 번호 알파벳 한자 텍스트 메시지 구호 슬로건 표어
        가격 금액 요금 비용 할인가 정가 총액 합계 잔액 할인율 비율 점수 스코어
        이름 명칭 상호 상호명 제목 브랜드 브랜드명 상표 회사 회사명 제조사 업체 은행 기관 출판사
        제품명 상품명 품명 모델명 가게명 간판명 도로명 건물명 영화명 역명 지명 메뉴 저자 지은이
        주소 전화 이메일 홈페이지 웹사이트 시각 시간 날짜 일시 기간 기한 요일 연도 년도
        휴무일 개봉일 제조일 마감일 생년월일 온도 기온 농도 속도 속력 용량 중량 함량 칼로리
        열량 도수 호선 노선 호수 층수 원산지 행선지 목적지 도착지 출발지 종점 정류장 안내문
        """
    ),
    "location": _alternatives("위치 방향 장소 방위 지점 방면 (?<!별)자리"),
    "attribute": _alternatives(
        """
        재질 재료 소재 질감 촉감 느낌 모양 형태 모습 생김새 외관 외형 외양 도형 구조 체형 무늬 문양
        패턴 크기 사이즈 길이 높이 너비 넓이 두께 굵기 밝기 상태 날씨 기상 계절 시간대 때 정도
        종류 유형 품종 차종 종목 장르 양식 형식 방식 스타일 디자인 글씨체 글꼴 서체 배열 조리법
        표정 감정 기분 분위기 자세 포즈 동작 손동작 몸짓 행동 행위 활동
        옷차림 복장 차림 성별 나이 연령 연령대 특징 특성 특색
        """
    ),
    "general": _alternatives(
        """
        설명 이유 까닭 원인 목적 용도 의미 뜻 직업 관계 역할 기능 방법
        물건 물체 사물 동물 음식
        """
    ),
}
# These are too short for that: they count alone, or behind one of the words below.
_KOREAN_SHORT_NOUNS = {
    "color": _alternatives("색 빛"),
    "counting": _alternatives("수"),
    "ocr": _alternatives("값 글"),
    "location": _alternatives("곳 쪽 편 데"),
    "attribute": _alternatives("맛 종 향 결 멋"),
}
_BEFORE_SHORT_NOUN = _alternatives(
    """
    글자 글씨 배경 바탕 옷 털 머리 머리카락 하늘 벽 눈 눈동자 피부 꽃 잎 지붕 신발 모자 가방
    차 차량 자동차 입술 주 주요 대표 메인 페인트 조명 테두리 사람 인원 학생 창문 바퀴 층 총
    음식 밥 물건 커피
    """
)
# Forms of "to be" that end a question, and particles. Not 도 behind a short noun: 수도.
_KOREAN_COPULA = _alternatives(
    r"인가\S* 인지\S* 입니\S* 일까\S* 이에요 예요 이니 이냐 이야 이죠 이며 이고"
)
_SHORT_PARTICLES = _alternatives("은 는 이 가 을 를 의 으로 로 으로는 에 에서")
_PARTICLES = _alternatives("도 만 과 와 에는 로는 처럼 라고 이라고")


def _korean_noun_pattern(name: str) -> re.Pattern:
    """What matches a word that is a noun of this type, with or without a particle."""
    long_ending = rf"(?:{_SHORT_PARTICLES}|{_PARTICLES}|{_KOREAN_COPULA})?$"
    short_ending = rf"(?:{_SHORT_PARTICLES}|{_KOREAN_COPULA})?$"
    pattern = rf"(?:{_KOREAN_NOUNS[name]}){long_ending}"
    if name in _KOREAN_SHORT_NOUNS:
        short = rf"^(?:{_BEFORE_SHORT_NOUN})?(?:{_KOREAN_SHORT_NOUNS[name]}){short_ending}"
        pattern = f"{pattern}|{short}"
    return re.compile(pattern)


_KOREAN_NOUN_PATTERNS = {name: _korean_noun_pattern(name) for name in _KOREAN_NOUNS}
# What has a name that is not written on it: the name of an animal is the animal.
_NAMED_BY_LOOK = re.compile(
    "(?:"
    + _alternatives(
        """
        동물 식물 꽃 나무 새 곤충 음식 요리 과일 채소 야채 간식 빵 물건 물체 사물 도구 기구 악기
        운동 스포츠 종목 탈것 교통수단 가구 캐릭터 인물 도형 기계 장비 놀이 옷
        """
    )
    + ")의?$"
)
_WRITTEN = re.compile(
    _alternatives(
        """
        적혀 적힌 적혔 적은 적어 쓰여 쓰인 씌어 씌여 써져 써진 써있 표기 표시 인쇄 새겨 새긴
        기재 읽히 찍혀 출력
        """
    )
    + "|써 있|나와 있|읽을 수|찍힌 (?:글|숫|번)"
)
# "written on it", but not "the place where something is written"
_WRITTEN_ON = re.compile(
    "에 (?:"
    + _alternatives("적힌 쓰인 쓰여진 표시된 표기된 인쇄된 기재된 새겨진")
    + ") (?!위치|곳|부분|자리)"
)
# A thing without a name of its own, whose description says what is asked for.
_KOREAN_THING = re.compile(r"것|건$|걸$|게$|(?:내용|말|표현|문장|정보|언어|일)(?:은|는|이|을|를)?$")
_FITTING = re.compile(
    r"(\S+?)으?로(?: 가장| 바르게)* (?:알맞|옳|적절|적당|맞는|맞은|올바|바른|해당)\S*$"
)
_BEING_DONE = re.compile(r"[이가] (?:\S+에서 )?(?:지금 |현재 )?하고 있는$|[이가] 하는$")
_DIGITS = re.compile(r"(?:번호|숫자).*자리|[한두세네] 자리")
_DUTY = re.compile(r"(?:안 되는|안되는|해야|할|금지\S*|허용\S*|가능한|삼가\S*|주의)(?: \S+)?$")


def _type_of_korean_name(before: Sequence[str], word: str) -> str | None:
    """Of a question for a name: written, unless it is the name of a thing that is seen."""
    if _WRITTEN.search(" ".join(before)):
        return "ocr"
    compound = re.sub(r"(?:이름|명칭).*", "", word)
    owner = compound or "".join(before[-1:])
    return None if _NAMED_BY_LOOK.search(owner) else "ocr"


def _type_of_korean_noun(
    word: str, before: Sequence[str] = (), after: Sequence[str] = ()
) -> str | None:
    """The type of a question about the noun `word`, or None where it tells nothing.

    `before` and `after` are the words around it.
    """
    following = "".join(after[:1])
    if re.match(r"수[가는를]?$", word) and re.match(r"있|없", following):
        return None  # "can" and "cannot"
    if "자리" in word and _DIGITS.search(" ".join([*before, word])):
        return "ocr"  # the last four digits of a number
    if re.search(r"(?:이름|명칭)\S{0,3}$", word):
        return _type_of_korean_name(before, word)
    for name, pattern in _KOREAN_NOUN_PATTERNS.items():
        if pattern.search(word):
            return name
    return None


def _type_of_korean_thing(before: Sequence[str]) -> str | None:
    """Of a question for "what ...": 색으로 알맞은 것, 적혀 있는 것, 하고 있는 것."""
    text = " ".join(before)
    fitting = _FITTING.search(text)
    if fitting:
        return _type_of_korean_noun(fitting[1], text[: fitting.start()].split())
    if _WRITTEN.search(" ".join(before[-3:])):
        return "ocr"
    return "attribute" if _BEING_DONE.search(text) else None


def _type_of_korean_topic(words: Sequence[str]) -> str | None:
    """Of the last noun that is a topic, subject or object, or stands without a particle."""
    for place in reversed(range(len(words))):
        word = words[place]
        before = words[:place]
        if _KOREAN_THING.match(word):
            return _type_of_korean_thing(before)
        if re.match(r"행동|행위|활동", word) and _DUTY.search(" ".join(before)):
            return "general"  # what is allowed is not what somebody is doing
        if re.search(r"(?:에서|에|의|과|와|중|로|고|서|[하되]여)$", word):
            continue
        found = _type_of_korean_noun(word, before, words[place + 1 :])
        if found in (None, "attribute") and _WRITTEN_ON.search(" ".join([*before[-2:], word])):
            return "ocr"
        if found or re.search(r"[은는이가을를]$", word):
            return found
    return None


# === Korean questions =============================================================================
_INTERROGATIVE = re.compile(
    _alternatives(
        r"""
        몇(?!몇) 며칠 얼마 언제(?!나|든) 언젠가요 언젠지 어디(?!든|선가) 어딘가요 어딘지
        어느 어떤 어떠 어떻 어때 어떨 무슨 무엇 무얼 뭐 뭘 뭔(?!가$) 누구(?!나|든) 누가 누굴
        누군가요 누군지 왜$ 왜[인일] 어째
        """
    )
)
# Behind 몇: what is read from a clock, a board or a label rather than counted.
_READ_UNIT = re.compile(
    _alternatives(
        r"""
        시 분 초 월 일 년 연도 개월 주 교시 층 호 번 동 킬로 키로 미터 센티 km cm mm m
        원 만 천 달러 유로 퍼센트 프로 % 도(?!막) 그램 g kg 리터 ml l 칼로리 kcal 볼트 와트
        세 점 등(?!분) 위 쪽 페이지 학년 반 인분 인용 사이즈 배 급 박 회 단계
        """
    )
    + "|대 몇"
)
_PEOPLE = re.compile("사람|손님|어르신|분들|계신|계시|앉|서 있")
_HEIGHT_OF_BUILDING = re.compile(r"층\s?(?:짜리|건물|으로 (?:되|이루|지어))")
_LIMIT = re.compile("정원|최대|최소|까지")
_PARTS_OF_TIME = re.compile(
    r"\D*(?:아침|점심|낮|저녁|밤|새벽|오전|오후|봄|여름|가을|겨울|해 ?질)\D*"
)
# Names behind "where" and "who" that stand on goods, on a timetable or on a book.
_WRITTEN_PLACE = re.compile(
    "(?:"
    + _alternatives(
        """
        제조사 제조국 제조원 원산지 행선지 목적지 종점 정류장 정차역 도착역 출발역 도착지 출발지
        회사 브랜드 업체 출판사 은행 발행처 주최 후원
        """
    )
    + "|(?:다음|이번) 역)[은는이가]?$"
)
_WRITTEN_PERSON = re.compile(
    "(?:저자|지은이|글쓴이|작가|옮긴이|감독|가수|발신인|수신인)[은는이가]?$"
)
_IS_WHAT = re.compile(r"[인입일예야죠임]|이[에지며고었니냐]|였|뭔")
_PART_OF_THING = re.compile("쪽|편|부분|측|면|구역|모서리|지역|거리|손|발|다리|팔|귀")
_COMMAND = re.compile(
    _alternatives(
        "고르 고른 골라 찾 선택 맞히 맞추 세어 세시 답하 말하 말해 쓰시 적으 구하 보세요 보시"
    )
)
_ASKING_END = re.compile(
    r"(?:까|까요|나요|가요|지요|죠|나|니|냐|지|[어아여해워려예에]요|[는은인한된던른]가)$"
)
_QUOTATION = re.compile(r"\"[^\"]*\"|'[^']*'|“[^”]*”|‘[^’]*’|「[^」]*」|『[^』]*』|《[^》]*》")
_REMARK = re.compile(r"\([^)]*\)|\[[^]]*\]")
# Interrogatives that may be written without a space before or behind them: 모두 몇개.
_GLUED = re.compile(r"(?<!몇)몇(?!몇)|무슨|어느|뭔(?!가|지)|어떤(?!가요|가\b|지)")


@dataclass(frozen=True)
class _KoreanQuestion:
    """The words of a Korean question around its interrogative."""

    before: list[str]
    word: str  # the interrogative with its ending; "" where there is none
    after: list[str]
    choices: Sequence[str]

    @property
    def rest(self) -> str:
        """What follows the interrogative."""
        return " ".join(self.after)

    @property
    def topic(self) -> str:
        """The two words before the interrogative."""
        return " ".join(self.before[-2:])


def _asking_sentence(text: str, interrogative: re.Pattern) -> str:
    """The last sentence with an interrogative, else with a question mark, else the last one."""
    sentences = [part for part in re.split(r"(?<=[.?!])\s+", text) if part.strip(" .?!")]
    asking = [part for part in sentences if interrogative.search(part)]
    marked = [part for part in sentences if part.endswith("?")]
    candidates = asking or marked or sentences or [""]
    return candidates[-1]


def _split_korean(text: str, choices: Sequence[str]) -> _KoreanQuestion:
    """The question's words. Quotations and remarks in brackets are not its own words."""
    text = _QUOTATION.sub("○", text)
    text = _REMARK.sub(" ", text)
    text = _GLUED.sub(r" \g<0> ", text)
    at_start_of_word = re.compile(rf"(?:^|\s)(?:{_INTERROGATIVE.pattern})")
    sentence = _asking_sentence(text, at_start_of_word)
    words = re.findall(r"[^\s,.?!:;…~]+", sentence)
    places = [place for place, word in enumerate(words) if _INTERROGATIVE.match(word)]
    if not places:
        return _KoreanQuestion(words, "", [], choices)
    place = places[-1]
    return _KoreanQuestion(words[:place], words[place], words[place + 1 :], choices)


def _type_of_how_many(asked: _KoreanQuestion) -> str:
    """몇: a number that is counted, read (몇 시, 몇 번, 몇 층) or a place in a row (몇 번째)."""
    if asked.word.startswith("며칠"):
        return "ocr"
    rest = asked.rest
    before = " ".join(asked.before)
    if re.match(r"번\s?째|번재|째", rest):
        return "location"
    if rest.startswith("살"):
        return "attribute"
    if rest.startswith("분") and _PEOPLE.search(f"{before} {rest}"):
        return "counting"
    if rest.startswith("점") and re.search(r"작품|그림|액자|사진이", before):
        return "counting"
    if _HEIGHT_OF_BUILDING.match(rest) or re.match(r"차[로선]", rest):
        return "counting"
    unit = "".join(asked.after[:1])
    if re.match(_KOREAN_COPULA, unit) and _type_of_korean_topic(asked.before) == "ocr":
        return "ocr"  # "what is the number?"
    if _LIMIT.search(f"{asked.topic} {unit}"):
        return "ocr"  # what a sign allows, such as the persons in a lift
    return "ocr" if _READ_UNIT.match(rest) else "counting"


def _type_of_how_much(asked: _KoreanQuestion) -> str:
    """얼마: a price, unless it is the number of something; 얼마나: how many, long, big, ..."""
    if _type_of_korean_topic(asked.before) == "counting":
        return "counting"
    if not asked.word.startswith("얼마나") and not asked.rest.startswith("만큼"):
        return "ocr"
    if re.match(r"많|여러|있", asked.rest):
        return "counting"
    # With the syllables into which the polite ending contracts them: 걸립니까, 멉니까.
    costs_or_lasts = r"[되돼됩]|걸[리립려릴]|남|자주|오래|빨리|[멀멉]|떨어|할인|비?[싸쌉쌀]|소요"
    is_read = re.match(costs_or_lasts, asked.rest)
    return "ocr" if is_read else "attribute"


def _type_of_when(asked: _KoreanQuestion) -> str:
    """언제: read from a board or label, unless it is a season or a part of the day."""
    if _type_of_korean_topic(asked.before) == "attribute":
        return "attribute"
    texts = _filled_texts(asked.choices)
    is_seen = texts and all(map(_PARTS_OF_TIME.fullmatch, texts))
    return "attribute" if is_seen else "ocr"


def _type_of_where(asked: _KoreanQuestion) -> str:
    """어디: a place, unless a name is asked for that stands on goods or on a timetable."""
    if re.match(r"쓰[는이입일나]|[쓸씁]|사용|이용|활용", asked.rest):
        return "general"
    if re.match(r"전화|연락|문의", asked.rest):
        return "ocr"
    if "라고" in asked.word and _WRITTEN.search(asked.rest):
        return "ocr"
    is_name = re.match(r"어디[인입일예야]|어딘", asked.word)
    if is_name and _WRITTEN_ON.search(" ".join(asked.before)):
        return "ocr"
    return "ocr" if _WRITTEN_PLACE.search(asked.topic) else "location"


def _type_of_who(asked: _KoreanQuestion) -> str:
    """누구: a person that is seen, unless it is written."""
    is_read = _WRITTEN.search(asked.rest) or _WRITTEN_PERSON.search(asked.topic)
    return "ocr" if is_read else "general"


def _type_of_why(asked: _KoreanQuestion) -> str:
    """왜: a reason."""
    return "general"


def _type_of_which(asked: _KoreanQuestion) -> str | None:
    """무슨, 어떤, 어느: by the noun behind it; 어느 것 by the topic before it."""
    if not asked.after:
        return None
    noun, *rest = asked.after
    if re.match(r"것|건$|걸$|게$|편[인입이]", noun):
        return _type_of_korean_topic(asked.before)
    if re.match(r"일[을이]?$", noun):
        return "attribute" if "".join(rest).startswith("하") else None
    if asked.word == "어느" and _PART_OF_THING.match(noun):
        return "location"
    found = _type_of_korean_noun(noun, after=rest)
    if found is None and rest:  # a compound of two words: 무슨 글자 색
        found = _type_of_korean_noun(rest[0], [noun], rest[1:])
    if found in (None, "general") and _WRITTEN.search(" ".join(rest)):
        return "ocr"
    return found


def _type_of_quality(asked: _KoreanQuestion) -> str | None:
    """어떤가요, 어떻습니까: by the topic, else how something is."""
    found = _type_of_korean_topic(asked.before)
    if found not in (None, "general"):
        return found
    return None if look_of_choices(asked.choices) else "attribute"


def _type_of_manner(asked: _KoreanQuestion) -> str | None:
    """어떻게: how something looks, reads or is done."""
    if re.match(r"되|돼|됩", asked.rest):
        return _type_of_korean_topic(asked.before)
    if _WRITTEN.search(asked.rest):
        return "ocr"
    looks = r"생[기겼긴]|보[이여입일]|느[껴끼낍]|입고|앉|서 있|서서|누워|들고"
    is_arranged = r"놓|배치|배열|정렬|나열|쌓|묶|조리|요리|꾸며|장식|포장|\S+ 있"
    return "attribute" if re.match(f"{looks}|{is_arranged}", asked.rest) else "general"


def _type_of_what(asked: _KoreanQuestion) -> str | None:
    """무엇, 뭐: by what is done with it; where it only asks "what is", by the topic."""
    word = asked.word
    rest = asked.rest
    is_opinion = re.match(r"보[이여입인일]|생각|판단|추정|여겨", rest)
    if "라고" in word and not is_opinion:
        is_name = re.match(r"부[르릅를]|불[리립릴]|하는|하나|합니", rest)
        return None if is_name else "ocr"
    if is_opinion or not rest or re.match(r"닮|비슷", rest) or _IS_WHAT.search(word):
        return _type_of_korean_topic(asked.before)
    if _WRITTEN.search(rest):
        return "ocr"
    if word.endswith("로"):
        return _type_of_made_of(rest)
    if re.fullmatch(r"무엇|무엇의|뭐", word) and re.match(r"위|아래|밑|옆|앞|뒤|안|속|사이", rest):
        return "location"
    if re.fullmatch(r"(?:무엇|뭐|뭘|무얼)[을를]?", word) and rest.startswith("하"):
        is_purpose = re.match(r"하는 (?!중|모습|것|상황|동작|사람들)|하기|하려|하러|할 때", rest)
        return None if is_purpose else "attribute"
    return None


def _type_of_made_of(rest: str) -> str | None:
    """무엇으로: the colour of paint, the material of a thing, or neither."""
    if re.match(r"칠|염색|물들", rest):
        return "color"
    is_made = re.match(r"만들|만든|지어|지은|제작|이루|이뤄|구성|되어|돼|됐|된|덮|포장", rest)
    return "attribute" if is_made else None


_KOREAN_RULES = {
    "몇|며칠": _type_of_how_many,
    "얼마": _type_of_how_much,
    "언제|언젠": _type_of_when,
    "어디|어딘": _type_of_where,
    "누": _type_of_who,
    "왜|어째": _type_of_why,
    "어떻게": _type_of_manner,
    "어떤(?=가|지)|어떠|어떻|어때|어떨": _type_of_quality,
    "무슨|어떤|어느|뭔$": _type_of_which,
    "무|뭐|뭘|뭔": _type_of_what,
}


def _korean_type(text: str, choices: Sequence[str]) -> str | None:
    """The type of a Korean question; None where its words leave it open."""
    asked = _split_korean(text, choices)
    for pattern, rule in _KOREAN_RULES.items():
        if re.match(pattern, asked.word):
            return rule(asked)
    words = list(asked.before)
    asks_whether = re.search(r"(?:여부|[는은인]지)\S{0,2}(?: \S+)?$", " ".join(words))
    if asks_whether or _ASKING_END.search("".join(words[-1:])):
        return "yesno"
    while words and _COMMAND.match(words[-1]):
        words.pop()
    return _type_of_korean_topic(words)


# === English questions ============================================================================
_ENGLISH_NOUNS = {
    "color": _alternatives("colou?r shade hue tint"),
    "counting": _alternatives("count quantity"),
    "ocr": _alternatives(
        """
        word letter text name brand company number digit title logo slogan message phrase caption
        headline sentence label sign inscription author publisher url address website code plate
        price cost fare fee total score percentage discount limit speed temperature
        time date day year month hour deadline
        route destination floor gate platform store shop restaurant
        """
    ),
    "location": _alternatives(
        """
        side direction position location place corner way part area spot end setting room hand
        """
    ),
    "attribute": _alternatives(
        """
        material texture fabric shape form pattern print design style size length height weather
        season kind type sort breed species variety condition state expression emotion mood
        atmosphere posture pose action activity gender age hairstyle flavou?r
        """
    ),
}
_ENGLISH_INTERROGATIVES = _alternatives("how what which where when who whose whom why")
_ENGLISH_AUXILIARY = re.compile(
    _alternatives(
        """
        is are was were isn't aren't do does did doesn't don't didn't can could can't
        has have had will would should may might must
        """
    )
)
# A noun phrase ends before these.
_ENGLISH_END_OF_PHRASE = re.compile(
    _alternatives(
        """
        of in on at to from for with by near under above below behind beside between next inside
        outside across around along against into that which who shown seen visible like displayed
        printed written being used worn best describes shows appears
        """
    )
)
_ENGLISH_DETERMINERS = frozenset({"the", "a", "an", "this", "that", "following", "one"})
_ENGLISH_UNIT = re.compile(
    _alternatives(
        """
        percent kilomet km mile met(?:er|re) dollar won euro cent hour minute second day week
        month calorie gram kg ml lit(?:er|re) degree pound point
        """
    )
)
_ENGLISH_LOOKS = re.compile(
    r"\b(?:"
    + _alternatives(
        "looks? feels? feeling appear dressed posed cooked prepared weather arranged shaped"
    )
    + r")\b"
)
_SAYS = re.compile(
    r"\b(?:" + _alternatives("says? reads? written spell spelled printed engraved costs?") + r")\b"
)
_HAS_SIGN = re.compile(r"\b(?:shop|store|restaurant|hotel|cafe|street|road|company|station)\b")
_MADE_OR_DOING = re.compile(r"\bmade (?:of|from|out of)\b|\bdoing\b|\blooks? like\b")
_NAMED_THING = re.compile(
    r"\bname of (?:the|this) (?:\w+ )?(?:animal|flower|fruit|sport|food|dish|plant|tool)"
)
# "The number of the bus" is read; "the number of chairs" is counted.
_NUMBER_OF = re.compile(
    r"\bnumber of (?!(?:the|this) (?:"
    + _alternatives("bus route room gate platform house player train flight page track exit car")
    + r")\b)"
)


def _type_of_english_noun(words: Sequence[str]) -> str | None:
    """The type of a question about a noun phrase: by its last noun before a preposition."""
    phrase = []
    for word in words:
        if _ENGLISH_END_OF_PHRASE.fullmatch(word):
            break
        if phrase and _ENGLISH_AUXILIARY.fullmatch(word):
            break
        if word not in _ENGLISH_DETERMINERS:
            phrase.append(word)
    head = "".join(phrase[-1:])
    text = " ".join(words)
    if head == "number" and _NUMBER_OF.search(text):
        return "counting"
    if re.search(r"\btime of (?:the )?(?:day|year)", text):
        return "attribute"
    if _NAMED_THING.search(text):
        return None
    for name, nouns in _ENGLISH_NOUNS.items():
        if re.fullmatch(rf"(?:{nouns})s?", head):
            return name
    return None


def _type_of_english_how(rest: Sequence[str]) -> str:
    """Of a question that begins "how ..."."""
    first = "".join(rest[:1])
    second = "".join(rest[1:2])
    text = " ".join(rest)
    if first == "many":
        return "ocr" if _ENGLISH_UNIT.match(second) else "counting"
    if first in ("much", "far", "fast", "late", "early", "often", "soon", "expensive"):
        return "ocr"
    if first == "long" and second in ("does", "do", "will", "can", "must"):
        return "ocr"
    if not _ENGLISH_AUXILIARY.fullmatch(first):
        return "attribute"  # how big, how tall, how old
    if re.search(r"\b(?:written|spelled|spelt)\b", text):
        return "ocr"
    return "attribute" if _ENGLISH_LOOKS.search(text) else "general"


def _type_of_english_what(rest: Sequence[str]) -> str | None:
    """Of a question that asks "what ..." or "which ..."."""
    text = " ".join(rest)
    # "which of these is the colour", "which of these colours"
    text = re.sub(r"^of (?:the following|these|them)\b ?", "", text)
    rest = text.split()
    first = "".join(rest[:1])
    if not _ENGLISH_AUXILIARY.fullmatch(first):
        # "what text appears ...": no preposition ends the phrase, so its first words count, too.
        for phrase in (rest, rest[:1], rest[1:2]):
            found = _type_of_english_noun(phrase)
            if found:
                return found
    if _SAYS.search(text):
        asks_color = _type_of_english_noun(rest[1:]) == "color"
        return "color" if asks_color else "ocr"
    if re.search(r"\b(?:named|called)\b", text) and _HAS_SIGN.search(text):
        return "ocr"
    if _MADE_OR_DOING.search(text):
        return "attribute"
    is_purpose = re.search(r"\bused\b", text)
    if first in ("is", "are", "was", "were", "best", "describes") and not is_purpose:
        return _type_of_english_noun(rest[1:])
    return None


def _type_of_english_phrase(words: Sequence[str]) -> str | None:
    """Of a question without an interrogative: "count the ...", "choose the colour of ..."."""
    first = "".join(words[:1])
    if first == "count":
        return "counting"
    is_command = first in ("choose", "select", "identify", "name", "find", "pick", "read", "give")
    return _type_of_english_noun(words[1:] if is_command else words)


def _english_type(text: str) -> str | None:
    """The type of an English question; None where its words leave it open."""
    text = text.casefold().replace("’", "'")
    text = re.sub(r"\"[^\"]*\"|“[^”]*”|\([^)]*\)", " ", text)
    text = re.sub(r"\b(what|where|who|how|when|why)'s\b", r"\1 is", text)
    text = re.sub(r"\b(?:can|could) you (?:please )?(?:tell|say|name|read)(?: me)?\b", "", text)
    interrogative = re.compile(rf"\b(?:{_ENGLISH_INTERROGATIVES})\b")
    sentence = _asking_sentence(text, interrogative)
    for clause in sentence.split(","):
        first = "".join(clause.split()[:1])
        if _ENGLISH_AUXILIARY.fullmatch(first):
            return "yesno"
    words = re.findall(r"[a-z0-9%'-]+", sentence)
    places = [place for place, word in enumerate(words) if interrogative.fullmatch(word)]
    if not places:
        return _type_of_english_phrase(words)
    word = words[places[0]]
    rest = words[places[0] + 1 :]
    if word == "how":
        return _type_of_english_how(rest)
    if word in ("what", "which", "whose"):
        return _type_of_english_what(rest)
    if word == "who" and rest[:1] == ["wrote"]:
        return "ocr"
    types = {"where": "location", "when": "ocr"}
    return types.get(word, "general")  # who, why


# === Questions ====================================================================================
@functools.lru_cache(maxsize=65536)  # a prompt is built in every order, epoch and wording
def _question_type(text: str, choices: tuple[str, ...]) -> str:
    """What `question_type` returns."""
    look = look_of_choices(choices)
    if look == "yesno":
        return "yesno"
    text = comparable_text(text)
    is_korean = re.search("[가-힣]", text)
    found = _korean_type(text, choices) if is_korean else _english_type(text)
    texts = _filled_texts(choices)
    if found == "color" and texts and not any(map(_names_colors, texts)):
        found = None  # the choices rule it out
    if found == "yesno" and (look or not _can_answer_yes_or_no(choices)):
        found = None
    by_look = {"": "general", "number": "ocr"}.get(look, look)
    return found or by_look


def question_type(text: str, choices: Sequence[str] = ()) -> str:
    """One of QUESTION_TYPES for a Korean or English question.

    Its interrogative decides, then the noun that is asked for, and where both leave it open
    the choices, in whatever order: colours, numbers, sides, yes and no. What the choices rule
    out, such as a colour where none of them names one, is not chosen.

    >>> question_type("How many dogs are there?")
    'counting'
    >>> question_type("간판에 적힌 글자는 무엇인가요?")
    'ocr'
    >>> question_type("The bus?", ["red", "blue", "green", "white"])
    'color'
    >>> question_type("Why?")
    'general'
    """
    return _question_type(text, tuple(map(str, choices)))


# Qwen's and InternVL's, whichever model reads the text: data is loaded without one.
CONTROL_TOKEN = (
    r"<(\|[^<>|\s]{1,40}\|"
    r"|/?(?:think|tool_call|tool_response|img|quad|ref|box)"
    r"|IMG_CONTEXT|video)>"
)


def neutralise_special_tokens(text: str) -> str:
    """The text, with spaces in whatever a tokenizer would read as a control token.

    >>> neutralise_special_tokens("red<|im_end|>")
    'red< |im_end| >'
    >>> neutralise_special_tokens("1 < 2 </think>")
    '1 < 2 < /think >'
    """
    return re.sub(CONTROL_TOKEN, r"< \1 >", text)


def present_choices(row: Mapping) -> list[bool]:
    """Whether each of a, b, c, d shows any text; a blank choice cannot be the answer.

    >>> present_choices({"a": "red", "b": " ", "c": "blue", "d": ""})
    [True, False, True, False]
    """
    return [not shows_nothing(str(row[choice])) for choice in CHOICES]


TARGET_COLUMNS = tuple(f"target_{choice}" for choice in CHOICES)


def target_probabilities(row: Mapping) -> tuple[float, ...]:
    """What to train on, as probabilities of a, b, c, d.

    The row's soft target (TARGET_COLUMNS) if it has one, else its label (0-3) with
    probability 1; zeros for a row that has neither.

    >>> target_probabilities({"label": 2})
    (0.0, 0.0, 1.0, 0.0)
    >>> target_probabilities({"target_a": 0.5, "target_b": 0.5, "target_c": 0, "target_d": 0})
    (0.5, 0.5, 0.0, 0.0)
    >>> target_probabilities({})
    (0.0, 0.0, 0.0, 0.0)
    """
    label = row.get("label", -1)
    probabilities = []
    for choice, column in enumerate(TARGET_COLUMNS):
        of_label = float(choice == label)
        probabilities.append(float(row.get(column, of_label)))
    return tuple(probabilities)


# === Columns ======================================================================================
TABLE_COLUMNS = {
    "train.csv": COLUMNS,
    "test.csv": COLUMNS[:-1],
    "sample_submission.csv": ("id", "answer"),
    "dev.csv": (*COLUMNS[:-1], *VOTE_COLUMNS),  # some competitions have it
}
# What other competitions call our columns, as `_plain_name` writes it.
COLUMN_ALIASES = {
    "id": "questionid qid sampleid rowid 아이디 번호 문제번호 문항번호",
    "path": "image imagepath imagefile imagefilename imagename "
    "img imgpath imgfile imgname filename filepath photo picture "
    "이미지 이미지경로 이미지파일 이미지파일명 사진 그림 파일 파일명 경로",
    "question": "questiontext query 질문 문제 질의 문항 질문내용",
    "answer": "label target correct correctanswer correctchoice correctoption answerkey "
    "groundtruth 정답 답 답안 라벨",
}
OUR_NAME_OF_ALIAS = {
    alias: name for name, aliases in COLUMN_ALIASES.items() for alias in [name, *aliases.split()]
}
# A choice's column: a, choice_a, option 1, 보기1, 선택지 가, ... The fifth mark is no choice of
# ours, but has to be noticed.
_CHOICE_COLUMN = re.compile(r"(choices?|options?|opt|보기|선택지|선택|선지|)([a-e0-5가나다라마])")


def _plain_name(name: str) -> str:
    """A column's name without case, spaces and punctuation, and with plain digits.

    >>> _plain_name(" Img_Path"), _plain_name("보기 ①")
    ('imgpath', '보기1')
    """
    plain = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"[\W_]+", "", plain)


def _own_name(name: str) -> str:
    """A column's name without case and without spaces around it."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def _choice_number(name: str, names: Sequence[str]) -> int | None:
    """Which choice the column of this plain name holds, from 0 on; None for another column.

    `names` are those of all columns: where there is a choice_0, choice_1 is the second.
    """
    match = _CHOICE_COLUMN.fullmatch(name)
    if match is None:
        return None
    prefix, mark = match.groups()
    if mark.isdigit():
        first = 0 if f"{prefix}0" in names else 1
        return int(mark) - first
    marks = "abcde" if mark.isascii() else "가나다라마"
    return marks.index(mark)


def _alias_places(fields: Sequence[str]) -> dict[str, list[int]]:
    """Our name -> the places of the columns that are another name for it."""
    names = [_plain_name(field_name) for field_name in fields]
    places = defaultdict(list)
    for place, name in enumerate(names):
        number = _choice_number(name, names)
        if number is not None and number < len(CHOICES):
            places[CHOICES[number]].append(place)
        elif name in OUR_NAME_OF_ALIAS:
            places[OUR_NAME_OF_ALIAS[name]].append(place)
    return dict(places)


@dataclass(frozen=True)
class _ColumnReading:
    """Where the columns of ours stand in a header, by their place from 0 on.

    A name may have several places, which is then an error.
    """

    by_setting: dict[str, list[int]]  # as the setting `columns` says
    by_name: dict[str, list[int]]  # under our own name
    by_alias: dict[str, list[int]]  # under another name that is understood

    @property
    def places(self) -> dict[str, list[int]]:
        """All of them together; the three do not share a name."""
        return {**self.by_setting, **self.by_name, **self.by_alias}


def _read_sample_by_place(reading: _ColumnReading, own_names: Sequence[str]) -> _ColumnReading:
    """The reading of a sample of two columns: the id first, then the answer, however called.

    A column that has no name, or that is read as something already, is not taken.
    """
    is_read = {*itertools.chain.from_iterable(reading.places.values())}
    by_alias = dict(reading.by_alias)
    for place, name in enumerate(TABLE_COLUMNS["sample_submission.csv"]):
        if own_names[place] and place not in is_read and name not in reading.places:
            by_alias[name] = [place]
    return dataclasses.replace(reading, by_alias=by_alias)


def _read_column_names(
    file: str, fields: Sequence[str], columns: Mapping[str, str]
) -> _ColumnReading:
    """What each column of the header is: by the setting `columns`, its own name, or an alias.

    The setting wins over our own names, and those win over aliases; in a sample of two columns
    what is left is read by its place.
    """
    needed = TABLE_COLUMNS[file]
    known = {*COLUMNS, *needed, CONTEXT_COLUMN}
    if file == "sample_submission.csv":
        known = needed
    own_names = [_own_name(field_name) for field_name in fields]
    by_setting = {}
    for name, file_name in columns.items():
        places = [n for n, own_name in enumerate(own_names) if own_name == _own_name(file_name)]
        if places and name in known:
            by_setting[name] = places
    taken = {*itertools.chain.from_iterable(by_setting.values())}
    by_name = defaultdict(list)
    for place, name in enumerate(own_names):
        if name in known and name not in by_setting and place not in taken:
            by_name[name].append(place)
    by_alias = {}
    for name, places in _alias_places(fields).items():
        free = [place for place in places if place not in taken]
        if free and name in known and name not in by_setting and name not in by_name:
            by_alias[name] = free
    reading = _ColumnReading(by_setting, dict(by_name), by_alias)
    if file == "sample_submission.csv" and len(fields) == 2:
        return _read_sample_by_place(reading, own_names)
    return reading


def _fifth_choice(fields: Sequence[str], reading: _ColumnReading) -> str:
    """The first column that would be a fifth choice, unless the setting says what it is; or ""."""
    names = [_plain_name(field_name) for field_name in fields]
    by_setting = {*itertools.chain.from_iterable(reading.by_setting.values())}
    for place, name in enumerate(names):
        number = _choice_number(name, names)
        is_choice = number is not None and place not in by_setting
        if is_choice and number >= len(CHOICES):
            return fields[place]
    return ""


def _separator_hint(fields: Sequence[str], needed: Sequence[str]) -> str:
    """What seems to separate the names in a header of a single field; "" where nothing does."""
    if fields[:1] and fields[0].casefold().startswith("sep="):
        return "; or remove this line, which is a note for Excel"
    if len(fields) != 1:
        return ""
    marks = Counter(re.findall(r"[^\w\"']", fields[0]))
    for mark, count in marks.most_common(1):
        if count >= len(needed) - 1:
            return f"; or {mark!r} separates its columns: save the file with commas"
    return ""


def _header_problem(file: str, fields: Sequence[str], reading: _ColumnReading) -> str:
    """What is wrong with the header, and what to do; "" where nothing is."""
    needed = TABLE_COLUMNS[file]
    quoted = [name for name in fields if name.strip().startswith('"')]
    if quoted:
        return (
            f"column {quoted[0][:40]!r} keeps its quotes, because a blank stands before them; "
            "remove the blanks between separators and quotes from the whole file"
        )
    fifth_choice = _fifth_choice(fields, reading)
    if fifth_choice and file != "sample_submission.csv":
        return (
            f"column {fifth_choice[:40]!r} is a fifth choice, but a question here has the four "
            "choices a, b, c, d; rename or remove it where it is none; "
            f"the header is {str(fields)[:200]}"
        )
    for name, places in reading.by_alias.items():
        if name in needed and len(places) > 1:
            names = [fields[place] for place in places]
            return (
                f"columns {names} may all be {name!r}; say which one is meant in the setting "
                f"columns, such as columns={{{name!r}: {names[0]!r}}}"
            )
    found = reading.places
    wrong = [name for name in needed if len(found.get(name, ())) != 1]
    for name, places in reading.by_name.items():
        if name not in needed and len(places) > 1:  # an answer in the test file
            wrong.append(name)
    if wrong:
        hint = _separator_hint(fields, needed)
        return (
            f"columns {wrong} are missing or double; correct the header {str(fields)[:200]}, "
            "or say what the file calls them in the setting columns, "
            f"such as columns={{{wrong[0]!r}: 'its name in the file'}}{hint}"
        )
    in_order = [found[name] for name in needed] == [[place] for place in range(len(fields))]
    if file == "sample_submission.csv" and not in_order:
        return f"the columns must be id, answer; correct {str(fields)[:200]}"
    return ""


def _log_column_names(
    file: str,
    fields: Sequence[str],
    columns: Mapping[str, str],
    reading: _ColumnReading,
    used: Mapping[str, int],
) -> None:
    """Say which column is read as what, where its name is not our own, and which is not used."""
    for name, place in used.items():
        if name not in reading.by_name:
            LOGGER.info("%s: column %r is read as %s", file, fields[place], name)
    for name in TABLE_COLUMNS[file]:
        if name in columns and name not in reading.by_setting:
            text = "%s: no column %r, as the setting columns has it; %r is read as %s"
            LOGGER.warning(text, file, columns[name], fields[used[name]], name)
    places = set(used.values())
    unused = [name for place, name in enumerate(fields) if place not in places and name.strip()]
    if unused:
        LOGGER.info("%s: columns that are not used: %s", file, str(unused)[:200])


def _locate_columns(
    file: str, header: _CsvRecord, columns: Mapping[str, str], fallbacks: Counter
) -> dict[str, int]:
    """Our name -> place of each column that is used, in the order of COLUMNS, then of the votes.

    What is read under another name than ours is logged and counted. Raises DataError for a
    fifth choice, and where a column that is needed is missing or cannot be told.
    """
    fields = header.fields
    reading = _read_column_names(file, fields, columns)
    problem = _header_problem(file, fields, reading)
    if problem:
        raise DataError(f"{file}, line {header.line}: {problem}")
    found = reading.places
    known = dict.fromkeys((*COLUMNS, *TABLE_COLUMNS[file], CONTEXT_COLUMN))
    used = {name: found[name][0] for name in known if len(found.get(name, ())) == 1}
    other_names = [name for name in used if name in reading.by_alias]
    if other_names:
        fallbacks["columns_under_other_names"] += len(other_names)
    _log_column_names(file, fields, columns, reading, used)
    return used


# === Tables =======================================================================================
def _cell_error(file: str, line: int, column: str, value: str, problem: str) -> DataError:
    """The error about one cell of a table."""
    return DataError(f"{file}, line {line}, column {column!r}, value {value[:80]!r}: {problem}")


def _raise_for_first_row(
    file: str, frame: pd.DataFrame, wrong: pd.Series, column: str, problem: str
) -> None:
    """Raise DataError about the first row of `frame` where `wrong` is true, if there is one.

    The message has the file, the row's line, and its text in `column`.
    """
    wrong_rows = frame.loc[wrong, ["line", column]]
    if wrong_rows.empty:
        return
    line, value = wrong_rows.to_numpy()[0]
    raise _cell_error(file, line, column, value, problem)


def _decode_csv(path: Path, fallbacks: Counter) -> str:
    """A CSV file's text: UTF-8, else Korean cp949, which is counted; DataError for neither.

    Never latin-1, which would read anything.
    """
    content = path.read_bytes()
    if content.startswith(b"PK\3\4"):
        raise DataError(
            f"{path.name}: an Excel workbook or a .zip and no table of text; "
            "open it and save it as CSV in UTF-8"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = content.decode("cp949", errors="replace")
        # Text in other encodings often decodes as cp949, but not to Korean.
        is_korean = "\ufffd" not in text and re.search("[가-힣]", text)
        if not is_korean:
            line = 1 + content.count(b"\n", 0, error.start)
            raise DataError(
                f"{path.name}, line {line}: not UTF-8 ({error}) nor cp949; save it as UTF-8"
            ) from error
    fallbacks["csv_read_as_cp949"] += 1
    return text


SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}


@dataclass(frozen=True)
class _CsvRecord:
    """One record of a CSV file; it may span several lines."""

    line: int  # where it begins, 1-based
    fields: list[str]


@dataclass(frozen=True)
class _CsvTable:
    """The records of a CSV file that are not blank; a blank file has a header without fields."""

    header: _CsvRecord
    records: list[_CsvRecord]
    separator: str  # one of SEPARATORS


def _csv_records(file: str, text: str, separator: str) -> Iterator[_CsvRecord]:
    """Each record that is not blank. Raises DataError for wrong quotes and NUL bytes."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line = 1
    try:
        for fields in reader:
            if any("\0" in field for field in fields):
                raise csv.Error("a NUL byte, as in a file that is not UTF-8")
            if fields:
                yield _CsvRecord(line, fields)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{file}, line {line}: {error}; check the quotes from here on and the encoding"
        ) from error


def _find_separator(file: str, text: str, columns: Mapping[str, str]) -> str:
    """What separates the columns in the header: the comma, unless another finds more of ours."""
    best_separator = ","
    best_score = (0, 1)  # columns that we know, and all columns
    for separator in SEPARATORS:
        try:
            header = next(_csv_records(file, text, separator), None)
        except DataError:  # of the header's quotes: reading the file will say it
            continue
        if header is None:
            return ","
        known = _read_column_names(file, header.fields, columns).places
        score = (len(known), len(header.fields))
        if score > best_score:
            best_separator = separator
            best_score = score
    return best_separator


def _read_csv_table(path: Path, columns: Mapping[str, str], fallbacks: Counter) -> _CsvTable:
    """The header and every record; another separator than a comma is logged and counted.

    Raises DataError for a missing file, an unknown encoding or wrong quotes.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; set data_dir to the folder with {', '.join(COMPETITION_FILES)}"
        )
    text = _decode_csv(path, fallbacks)
    separator = _find_separator(path.name, text, columns)
    if separator != ",":
        LOGGER.info("%s: its columns are separated by a %s", path.name, SEPARATORS[separator])
        fallbacks["csv_not_separated_by_commas"] += 1
        if path.name == "sample_submission.csv":
            LOGGER.warning("Submissions are separated by commas, unlike %s", path.name)
    records = [*_csv_records(path.name, text, separator)]
    header, *rows = records or [_CsvRecord(line=1, fields=[])]
    return _CsvTable(header, rows, separator)


def _check_record_lengths(file: str, table: _CsvTable) -> None:
    """Raise DataError about the first record without exactly one field for each column."""
    width = len(table.header.fields)
    separator = SEPARATORS[table.separator]
    for record in table.records:
        if len(record.fields) != width:
            raise DataError(
                f"{file}, line {record.line}, row {record.fields[0][:80]!r}: "
                f"{len(record.fields)} fields but {width} columns; "
                f"correct it, with quotes around {separator}s"
            )


def _without_blank_rows(
    file: str, records: Sequence[_CsvRecord], fallbacks: Counter
) -> list[_CsvRecord]:
    """The records with any text; spreadsheets leave rows of separators alone behind the last.

    The others are counted and logged.
    """
    filled = []
    blank_lines = []
    for record in records:
        if "".join(record.fields).strip():
            filled.append(record)
        else:
            blank_lines.append(record.line)
    if blank_lines:
        fallbacks["blank_rows_left_out"] += len(blank_lines)
        LOGGER.warning("%s, lines %s: blank rows, left out", file, blank_lines[:20])
    return filled


def _read_competition_table(
    path: Path, columns: Mapping[str, str], fallbacks: Counter
) -> tuple[pd.DataFrame, list[str]]:
    """(frame, header) of one of the competition's tables, whose ids are checked.

    The frame has the columns that are used under our names, verbatim as text, and
    `line`; the header has the file's own names. `columns` maps our names to these.
    (pandas would shift short rows and lose the text "None".)
    """
    file = path.name
    table = _read_csv_table(path, columns, fallbacks)
    header = table.header
    places = _locate_columns(file, header, columns, fallbacks)
    _check_record_lengths(file, table)
    records = _without_blank_rows(file, table.records, fallbacks)
    if not records:
        raise DataError(
            f"{file}, line {header.line}: a header but no rows; download the file again"
        )
    texts = {name: [record.fields[place] for record in records] for name, place in places.items()}
    frame = pd.DataFrame(texts, dtype=object)
    frame = frame.assign(line=[record.line for record in records])
    is_blank = frame["id"].map(shows_nothing)
    wrong = frame["id"].duplicated() | is_blank
    problem = "is blank or repeats an earlier row's; give each row its own"
    _raise_for_first_row(file, frame, wrong, "id", problem)
    return frame, [name.strip() for name in header.fields]


def _check_questions(split: str, frame: pd.DataFrame, fallbacks: Counter) -> None:
    """Raise DataError for a row with fewer than two choices; count what is odd but usable.

    That is repeated choices, blank questions, and what `prompt_text` changes. A blank
    choice is masked later.
    """
    choices = frame[[*CHOICES]].map(comparable_text)
    is_filled = choices != ""
    filled_count = is_filled.sum(axis=1)
    problem = "fewer than two choices are filled; complete the row"
    _raise_for_first_row(f"{split}.csv", frame, filled_count < 2, "id", problem)
    texts = frame[["question", *CHOICES]]
    in_prompt = texts.map(prompt_text)
    without_tokens = in_prompt.map(neutralise_special_tokens)
    odd_rows = {
        "repeated_choices": choices.where(is_filled).nunique(axis=1) < filled_count,
        "blank_question": frame["question"].map(shows_nothing),
        "special_tokens_neutralised": (without_tokens != in_prompt).any(axis=1),
        "decomposed_text_composed": texts.map(_is_decomposed).any(axis=1),
        "line_break_replaced": texts.map(_has_line_break).any(axis=1),
        "invisible_characters_removed": texts.map(_has_invisible).any(axis=1),
    }
    for name, rows in odd_rows.items():
        fallbacks[f"{split}_{name}"] += int(rows.sum())


def _escape_formula(cell):
    """Text that a spreadsheet would run as a formula, behind a quotation mark; else the cell."""
    if not isinstance(cell, str):
        return cell
    return re.sub(r"^([=+@\t\r'-])", r"'\1", cell)


def csv_text(frame: pd.DataFrame) -> str:
    r"""A frame without its index as CSV, which is read back as it was.

    Where there is a carriage return, all fields are quoted: pandas leaves one bare that stands
    alone, and it would end the row.

    >>> csv_text(pd.DataFrame({"a": ["x\ry"], "b": ["z"]}))
    '"a","b"\n"x\ry","z"\n'
    """
    text = frame.to_csv(index=False, lineterminator="\n")
    if "\r" in text:
        return frame.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_ALL)
    return text


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a frame without its index as CSV, whole or not at all.

    Text that a spreadsheet would run as a formula gets a quotation mark first;
    `read_table` takes it off.
    """
    safe = frame.copy()
    for position in range(frame.shape[1]):
        column = frame.iloc[:, position]
        if any(isinstance(cell, str) for cell in column):
            cells = [_escape_formula(cell) for cell in column]
            safe.isetitem(position, pd.Series(cells, index=frame.index, dtype=object))
    atomic_write(path, csv_text(safe))


# Of the tables that we write ourselves.
NUMBER_COLUMNS = {
    "label": int,
    "fold": int,
    "width": int,
    "height": int,
    "teacher_fold": int,
    **dict.fromkeys(TARGET_COLUMNS, float),
}


def read_table(
    path: Path,
    needed: Sequence[str] = (),
    number_columns: Mapping[str, type] = NUMBER_COLUMNS,
) -> pd.DataFrame:
    """What `write_table` wrote, as text but for the columns of numbers.

    Raises DamagedFileError where it is anything else, or lacks one of the `needed` columns.
    """
    try:
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            raise ValueError("its last row is cut off")
        frame = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
        missing = [column for column in needed if column not in frame]
        if missing:
            raise ValueError(f"without {', '.join(missing)}")
        frame = frame.map(lambda text: text.removeprefix("'"))
        kinds = {column: kind for column, kind in number_columns.items() if column in frame}
        return frame.astype(kinds)
    except ValueError as error:  # also pandas' and of the encoding
        raise DamagedFileError(path, error) from error


# === Answers ======================================================================================
# How marks for a, b, c, d are written, by the kind of answer. The order of the kinds is that in
# which they are preferred where several fit a whole file and mean the same in every row.
ANSWER_KINDS = {
    "letters": ("abcd", "ABCD", "ａｂｃｄ", "ＡＢＣＤ", "ⓐⓑⓒⓓ", "ⒶⒷⒸⒹ", "⒜⒝⒞⒟"),
    "numbers from 1": ("1234", "１２３４", "①②③④", "⑴⑵⑶⑷", "⒈⒉⒊⒋"),
    "numbers from 0": ("0123", "０１２３", "⓪①②③"),
    "Korean letters": ("가나다라", "ㄱㄴㄷㄹ", "㉮㉯㉰㉱", "㉠㉡㉢㉣", "㈎㈏㈐㈑", "㈀㈁㈂㈃"),
    "texts of the choices": (),
}
# A mark may stand in brackets or before a full stop, and a number may read 1.0 or 1번.
_MARKED_ANSWER = re.compile(r"[(\[]?(?:([a-d가나다라])|([0-4])(?:\.0+)?\s*번?)[.)\]]?")
# Under NFKC ㄱ, ㉠ and ㈀ become the first consonants that syllables are composed of.
_SYLLABLE_OF_CONSONANT = str.maketrans("\u1100\u1102\u1103\u1105", "가나다라")


def _answer_mark(text: str) -> str:
    """The plain letter, number or Korean letter that an answer is; "" for another text.

    >>> [_answer_mark(text) for text in ("(Ａ)", "3번", "1.0", "㉢", "red", "a b")]
    ['a', '3', '1', '다', '', '']
    """
    plain = unicodedata.normalize("NFKC", text).strip().casefold()
    match = _MARKED_ANSWER.fullmatch(plain.translate(_SYLLABLE_OF_CONSONANT))
    return match[1] or match[2] if match else ""


@dataclass(frozen=True)
class AnswerNotation:
    """How this competition writes an answer.

    >>> capitals = AnswerNotation("letters", ("A", "B", "C", "D"))
    >>> print(capitals)
    letters (A, B, C, D)
    >>> choices = pd.DataFrame([["red", "blue", "tea", "x"]], columns=CHOICES)
    >>> capitals.write([1], choices)
    ['B']
    >>> capitals.read(["B"], choices).tolist(), capitals.read(["b"], choices).tolist()
    ([1], [-1])
    >>> AnswerNotation("texts of the choices", ()).write([1], choices)
    ['blue']
    """

    kind: str = "letters"  # one of ANSWER_KINDS
    marks: tuple[str, ...] = CHOICES  # what is written for a, b, c, d; () for texts
    reason: str = field(default="nothing says otherwise", compare=False)

    def __str__(self) -> str:
        return f"{self.kind} ({', '.join(self.marks)})" if self.marks else self.kind

    @property
    def needs(self) -> str:
        """What to write as an answer, in words."""
        if not self.marks:
            return "write the text of one of the row's choices, as test.csv has it"
        *first, last = self.marks
        if self.kind == "letters":
            noun = "upper-case letter" if last.isupper() else "lower-case letter"
        else:
            noun = "Korean letter" if self.kind == "Korean letters" else "number"
        return f"write one {noun} of {', '.join(first)}, {last}"

    def write(self, labels: Sequence[int], choices: pd.DataFrame) -> list[str]:
        """The answers for (n,) labels 0-3; `choices` are the rows' texts a, b, c, d."""
        if self.marks:
            return [self.marks[label] for label in labels]
        return [*choices[[*CHOICES]].to_numpy()[np.arange(len(choices)), labels]]

    def read(self, answers: Sequence, choices: pd.DataFrame | None) -> np.ndarray:
        """The labels (n,) of answers; -1 for one that is not written so.

        A text that several choices have means the first. `choices` is needed for texts only.
        """
        if self.marks:
            label_of_mark = {mark: label for label, mark in enumerate(self.marks)}
            return np.array([label_of_mark.get(answer, -1) for answer in answers], dtype=int)
        texts = choices[[*CHOICES]].to_numpy()
        is_meant = texts == np.array([*answers], dtype=object)[:, None]
        is_meant &= ~choices[[*CHOICES]].map(shows_nothing).to_numpy()
        return np.where(is_meant.any(axis=1), is_meant.argmax(axis=1), -1)


SEVERAL_CHOICES = -2  # instead of a label: the text that several choices have


@dataclass(frozen=True)
class _AnswerReading:
    """What the answers of a whole file mean if they are of one kind."""

    kind: str  # one of ANSWER_KINDS
    labels: np.ndarray  # (n,) 0-3; negative where an answer is not of this kind

    @property
    def fails(self) -> np.ndarray:
        return self.labels < 0


def _read_texts(choices: pd.DataFrame, answers: pd.Series) -> _AnswerReading:
    """The answers as texts of the choices."""
    is_meant = choices.eq(answers, axis=0) & (choices != "")
    count = is_meant.sum(axis=1).to_numpy()
    labels = np.where(count == 1, is_meant.to_numpy().argmax(axis=1), -1)
    labels[count > 1] = SEVERAL_CHOICES
    return _AnswerReading("texts of the choices", labels)


def _answer_readings(frame: pd.DataFrame, of_sample: bool = False) -> list[_AnswerReading]:
    """What the rows' `answer` means by each of ANSWER_KINDS.

    Numbers count from 0 only where there is a 0, and no mark means a blank choice. A sample's
    answers are examples, to which neither applies.
    """
    texts = frame[[*CHOICES, "answer"]].map(comparable_text)
    choices = texts[[*CHOICES]]
    is_blank = (choices == "").to_numpy()
    marks = texts["answer"].map(_answer_mark)
    readings = []
    for kind, forms in ANSWER_KINDS.items():
        if not forms:
            readings.append(_read_texts(choices, texts["answer"]))
            continue
        label_of_mark = {mark: label for label, mark in enumerate(forms[0])}
        labels = marks.map(label_of_mark).fillna(-1).to_numpy(dtype=int, copy=True)
        if not of_sample:
            labels[is_blank[np.arange(len(labels)), labels]] = -1
            if kind == "numbers from 0" and 0 not in labels:
                labels[:] = -1
        readings.append(_AnswerReading(kind, labels))
    return readings


def _written_marks(text: str, kind: str, label: int) -> tuple[str, ...]:
    """How all four marks are written where this text is that of `label`.

    1.0 counts as 1: programs write whole numbers so where another row has none.

    >>> _written_marks("(B)", "letters", 1), _written_marks("1번", "numbers from 1", 0)
    (('(A)', '(B)', '(C)', '(D)'), ('1번', '2번', '3번', '4번'))
    """
    text = re.sub(r"(?<=\d)[.．][0０]+", "", comparable_text(text))
    for marks in ANSWER_KINDS[kind]:
        if marks[label] in text:
            return tuple(text.replace(marks[label], mark, 1) for mark in marks)
    return tuple(ANSWER_KINDS[kind][0])  # a rare kind of character


def _notation_of(reading: _AnswerReading, frame: pd.DataFrame) -> tuple[AnswerNotation, int]:
    """How most rows that the reading understands are written, and how many are not."""
    if not ANSWER_KINDS[reading.kind]:
        return AnswerNotation(reading.kind, ()), 0
    writings = Counter()
    for text, label in zip(frame["answer"], reading.labels, strict=True):
        if label >= 0:
            writings[_written_marks(text, reading.kind, label)] += 1
    (marks, count), *_ = writings.most_common(1)
    return AnswerNotation(reading.kind, marks), writings.total() - count


def _raise_for_answer(file: str, frame: pd.DataFrame, wrong: np.ndarray, problem: str) -> None:
    """Raise DataError about the first row where `wrong` is true."""
    row = frame[wrong].iloc[0]
    raise _cell_error(file, row["line"], row["column"], row["answer"], problem)


def _is_letter_or_text(readings: Sequence[_AnswerReading]) -> np.ndarray:
    """Which answers (n,) are clearly a letter or clearly a choice's text, also in a mixed file."""
    by_kind = {reading.kind: reading for reading in readings}
    letters = by_kind["letters"]
    texts = by_kind["texts of the choices"]
    is_letter = ~letters.fails & ((texts.labels == -1) | (texts.labels == letters.labels))
    is_text = letters.fails & ~texts.fails
    return is_letter | is_text


def _raise_for_no_reading(
    file: str, frame: pd.DataFrame, readings: Sequence[_AnswerReading]
) -> None:
    """Raise DataError: no kind of answer fits the whole file. It says how far each does."""
    tried = []
    never = []
    for reading in readings:
        count = int(reading.fails.sum())
        if count == len(frame):
            never.append(reading.kind)
            continue
        row = frame[reading.fails].iloc[0]
        example = f"line {row['line']}, {row['answer'][:20]!r}"
        tried.append(f"{reading.kind}: not {count} of {len(frame)} rows, such as {example}")
    if never:
        tried.append(f"{', '.join(never)}: no row")
    failures = [~_is_letter_or_text(readings), *(reading.fails for reading in readings)]
    fewest = min(failures, key=np.sum)
    problem = "does not mean exactly one filled choice; write its letter a-d"
    _raise_for_answer(file, frame, fewest, f"{problem}. Tried: {'; '.join(tried)}")


def _require_agreement(file: str, frame: pd.DataFrame, readings: Sequence[_AnswerReading]) -> None:
    """Raise DataError about the first row that the readings, which all fit, read differently."""
    first, *others = readings
    for other in others:
        differs = first.labels != other.labels
        if differs.any():
            row = differs.argmax()
            meanings = [
                f"{CHOICES[reading.labels[row]]} ({reading.kind})" for reading in (first, other)
            ]
            problem = f"may mean {' or '.join(meanings)}, which both fit the whole file"
            _raise_for_answer(file, frame, differs, f"{problem}; write letters a-d")


def _read_answers(
    frame: pd.DataFrame, file: str, fallbacks: Counter
) -> tuple[np.ndarray, AnswerNotation]:
    """Labels 0-3 (n,) of the texts in `answer`, and how they are written.

    Which kind of answer is meant is decided for all rows together. `frame` has a, b, c, d, `line`
    and `column`, the answer's own in the file, too. Raises DataError where no kind fits, or where
    several fit and disagree.

    >>> choices = {"a": "red", "b": "2", "c": "tea", "d": ""}
    >>> for answers in (["B", "(c)"], ["3번", "1번"], ["red", "tea"]):
    ...     frame = pd.DataFrame({"line": [2, 3], "column": "answer", "answer": answers, **choices})
    ...     labels, notation = _read_answers(frame, "train.csv", Counter())
    ...     print(labels.tolist(), notation)
    [1, 2] letters (A, B, C, D)
    [2, 0] numbers from 1 (1번, 2번, 3번, 4번)
    [0, 2] texts of the choices
    """
    readings = _answer_readings(frame)
    fitting = [reading for reading in readings if not reading.fails.any()]
    if fitting:
        _require_agreement(file, frame, fitting)
        labels = fitting[0].labels
        if len(fitting) > 1:
            fallbacks["answers_of_two_kinds_that_agree"] += len(frame)
    else:
        if not _is_letter_or_text(readings).all():
            _raise_for_no_reading(file, frame, readings)
        fitting = [readings[0], readings[-1]]  # letters and texts, the first and last kind
        fitting.sort(key=lambda reading: reading.fails.sum())
        most, fewer = fitting
        labels = np.where(most.fails, fewer.labels, most.labels)
        fallbacks["answers_of_mixed_kinds"] += int(most.fails.sum())
    notation, others = _notation_of(fitting[0], frame)
    if others:
        fallbacks["answers_in_another_writing"] += others
    kinds = " and ".join(reading.kind for reading in fitting)
    written = f", {others} in another way" if others else ""
    if notation.marks:
        written = f", written {', '.join(notation.marks)}{written}"
    LOGGER.info("%s: %d answers are read as %s%s", file, len(frame), kinds, written)
    return labels, notation


def _notations_of_sample(rows: pd.DataFrame) -> list[AnswerNotation]:
    """The notations that the sample's filled answers may have; `rows` have a, b, c, d too."""
    readings = _answer_readings(rows, of_sample=True)
    fitting = [reading for reading in readings if not reading.fails.any()]
    return [_notation_of(reading, rows)[0] for reading in fitting]


def _choices_by_id(test: pd.DataFrame) -> pd.DataFrame:
    """The texts a, b, c, d of the test rows; the index is the id, as text."""
    rows = test.assign(id=test["id"].map(str)).drop_duplicates("id")
    return rows.set_index("id")[[*CHOICES]]


def _sample_rows(sample: pd.DataFrame, test: pd.DataFrame) -> pd.DataFrame:
    """The sample's rows that have an answer, with the choices of the test row."""
    answers = ["" if pd.isna(answer) else str(answer) for answer in sample.iloc[:, 1]]
    choices = _choices_by_id(test).reindex(sample.iloc[:, 0].map(str), fill_value="")
    rows = choices.assign(answer=answers)
    return rows[~rows["answer"].map(shows_nothing)]


def decide_notation(
    of_train: AnswerNotation, sample: pd.DataFrame, test: pd.DataFrame, fallbacks: Counter
) -> AnswerNotation:
    """How the submission writes its answers, and for which reason.

    As the training answers are written, but where the sample's are filled and say clearly
    something else, as those are. What differs is counted in `fallbacks`.

    >>> sample = pd.DataFrame({"ID": ["t1"], "label": ["A"]})
    >>> test = pd.DataFrame([["t1", "red", "blue", "", ""]], columns=["id", *CHOICES])
    >>> notation = decide_notation(AnswerNotation(), sample, test, Counter())
    >>> print(f"{notation}: {notation.reason}")
    letters (A, B, C, D): as in the sample, such as 'A'; train.csv has letters (a, b, c, d)
    """
    rows = _sample_rows(sample, test)
    if rows.empty:
        reason = "as in train.csv; the sample's answers are blank"
        return dataclasses.replace(of_train, reason=reason)
    notations = _notations_of_sample(rows)
    shown = repr(rows["answer"].iloc[0][:40])
    same_kind = [notation for notation in notations if notation.kind == of_train.kind]
    # Nothing but 0 says little: it fills the samples of any competition.
    only_zeros = set(rows["answer"].map(_answer_mark)) == {"0"}
    if of_train in notations:
        return dataclasses.replace(of_train, reason="as in train.csv and in the sample")
    is_clear = same_kind or (len(notations) == 1 and not only_zeros)
    if is_clear:
        [notation] = same_kind or notations
        fallbacks["sample_answers_unlike_those_of_train"] += 1
        reason = f"as in the sample, such as {shown}; train.csv has {of_train}"
        return dataclasses.replace(notation, reason=reason)
    if not notations:
        fallbacks["sample_answers_not_understood"] += len(rows)
        problem = "are none that we know"
    else:
        fallbacks["sample_answers_in_doubt"] += len(rows)
        kinds = " or ".join(notation.kind for notation in notations)
        problem = f"may be {kinds}" if len(notations) > 1 else "may be mere placeholders"
    reason = f"as in train.csv; the sample's answers, such as {shown}, {problem}"
    return dataclasses.replace(of_train, reason=reason)


# === Paths and folders ============================================================================
_MOST_FOLDERS = 100_000  # that are searched for an image in another spelling
_OTHER_ARCHIVES = (".7z", ".rar", ".egg", ".alz", ".z01", ".tar.xz", ".tar.bz2", ".tar.zst")
_SPLIT_FOLDERS = ("train", "test", "dev", "val", "valid", "validation")
_IMAGE_ENDING = re.compile(
    r"\.(jpe?g|jpe|jfif|png|webp|gif|bmp|tiff?|ppm|pgm|avif|jp2|hei[cf])$", re.IGNORECASE
)


def _spelling(path: str) -> str:
    """What two spellings of one path have in common: normalised Unicode, no capitals, one .jpg.

    >>> _spelling("Train/1.JPEG")
    'train/1.jpg'
    """
    small = unicodedata.normalize("NFC", path).casefold()
    return re.sub(r"\.(jpeg|jpe|jfif)$", ".jpg", small)


def _words(name: str) -> set[str]:
    """The words of a file's name, in small letters.

    >>> sorted(_words("Train_images.zip"))
    ['images', 'train', 'zip']
    """
    return set(re.split(r"[\W_]+", name.casefold()))


@dataclass(frozen=True)
class _Listing:
    """What is in a folder: names, and of the files whether each is a link."""

    files: dict[str, bool] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)


class _FolderReader:
    """The folders below `tops`, each listed once: on a slow disk every look takes long."""

    def __init__(self, *tops: str):
        self.tops = set(tops)
        self.listings = {}
        self.real_folders = {}

    def listing(self, folder: str) -> _Listing:
        """What is in a folder; nothing where there is none."""
        if folder not in self.listings:
            parent, name = os.path.split(folder)
            is_there = folder in self.tops or name in self.listing(parent).folders
            self.listings[folder] = self._list(folder) if is_there else _Listing()
        return self.listings[folder]

    def _list(self, folder: str) -> _Listing:
        listing = _Listing()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            LOGGER.warning("%s: no image is looked for in it (%s)", folder, error)
            entries = []
        for entry in entries:
            is_link = entry.is_symlink()
            is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()
            if is_folder:
                listing.folders.add(entry.name)
            else:
                listing.files[entry.name] = is_link
        return listing

    def has_file(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return name in self.listing(folder).files

    def has_folder(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return name in self.listing(folder).folders

    def is_outside(self, path: str) -> bool:
        """Whether links lead from this file to a place outside of all `tops`."""
        folder, name = os.path.split(path)
        is_link = self.listing(folder).files.get(name, False)
        real = os.path.realpath(path) if is_link else self.real_folder(folder)
        return not any(Path(real).is_relative_to(top) for top in self.tops)

    def real_folder(self, folder: str) -> str:
        """Where a folder is when all links are followed."""
        if folder not in self.real_folders:
            self.real_folders[folder] = os.path.realpath(folder)
        return self.real_folders[folder]

    def all_files(self) -> Iterator[str]:
        """Every file below the tops; a folder to which several links lead is read once."""
        seen = set()
        folders = deque(sorted(self.tops))
        while folders:
            folder = folders.popleft()
            real = self.real_folder(folder)
            if real in seen:
                continue
            seen.add(real)
            if len(seen) > _MOST_FOLDERS:  # as where a link leads to a whole disk
                LOGGER.warning("%s: no image is looked for here, nor further down", folder)
                return
            listing = self.listing(folder)
            for name in listing.files:
                yield os.path.join(folder, name)
            for name in sorted(listing.folders):
                folders.append(os.path.join(folder, name))


@dataclass(frozen=True)
class _ImagePath:
    """A path of a table, without what it says about another machine's folders."""

    text: str  # relative, without "." and ".."
    is_absolute: bool


def _parse_image_path(text: str, root: str) -> _ImagePath | None:
    """What a table's path says; None for a URL and for one that leads out of `root`.

    >>> _parse_image_path("./train/../1.png ", "/data")
    _ImagePath(text='1.png', is_absolute=False)
    >>> _parse_image_path("C:\\\\me\\\\1.png", "/data")
    _ImagePath(text='me/1.png', is_absolute=True)
    >>> _parse_image_path("/data/1.png", "/data")
    _ImagePath(text='1.png', is_absolute=False)
    """
    path = text.strip().replace("\\", "/")
    has_drive = re.match(r"[A-Za-z]:/", path)
    if re.match(r"[A-Za-z][\w+.-]*:", path) and not has_drive:
        return None
    if path.startswith(root + "/"):
        path = path.removeprefix(root).lstrip("/")
    without_top = re.sub(r"^([A-Za-z]:)?/+", "", path)
    relative = os.path.normpath(without_top)
    if relative == ".." or relative.startswith("../"):
        return None
    return _ImagePath(relative, is_absolute=without_top != path)


# === Image places =================================================================================
# How an image was found elsewhere than its path says: the names of the fallbacks.
DEEPER = "image_found_in_a_deeper_folder"
IN_ARCHIVE = "image_found_in_an_archive"
OTHER_SPELLING = "image_found_under_other_spelling"
WITHOUT_ENDING = "image_found_without_its_ending"
BY_TAIL = "image_found_by_the_end_of_its_path"
THROUGH_LINK = "image_found_through_a_link"
IMAGE_RESCUES = (DEEPER, IN_ARCHIVE, OTHER_SPELLING, WITHOUT_ENDING, BY_TAIL, THROUGH_LINK)


@dataclass(frozen=True)
class _Base:
    """A folder to which a table's paths may be relative."""

    folder: str
    names_split: bool = False  # all in it belongs to the table's split
    kind: str = ""  # the fallback that is counted for a file here
    prefix: str = ""  # the beginning of paths that this folder stands for, such as "train/"

    def join(self, path: str) -> str:
        return os.path.join(self.folder, path.removeprefix(self.prefix))


def _bases(top: str, split: str) -> list[_Base]:
    """The folders below the data folder in which images are looked for, in this order."""
    return [
        _Base(top),
        _Base(os.path.join(top, "images")),
        _Base(os.path.join(top, split), names_split=True),
        _Base(os.path.join(top, split, "images"), names_split=True, kind=DEEPER),
        _Base(os.path.join(top, "images", split), names_split=True, kind=DEEPER),
    ]


def _bases_in_archive(archive: Path, split: str) -> list[_Base]:
    """The folders of an archive, which is unpacked, in which images are looked for, in this order.

    They are those of `_bases`, also below the one folder that all in it may be in.
    """
    top = str(unpack_once(archive))
    stem = re.sub(r"\.(zip|tar|tgz|tar\.gz)$", "", archive.name, flags=re.IGNORECASE)
    bases = [_Base(top, prefix=f"{stem}/"), *_bases(top, split)]
    inner = [entry for entry in os.scandir(top) if entry.name != "__MACOSX"]
    if len(inner) == 1 and inner[0].is_dir():
        bases += _bases(inner[0].path, split)
    names_split = split in _words(stem)
    return [
        dataclasses.replace(base, kind=IN_ARCHIVE, names_split=names_split or base.names_split)
        for base in bases
    ]


@dataclass(frozen=True)
class _FoundImage:
    """Where a row's image is: its file, and by kind of IMAGE_RESCUES where it was found.

    Without a file, `problem` says why.
    """

    path: str
    rescues: dict[str, str] = field(default_factory=dict)
    problem: str = ""


class _ImageFinder:
    """Looks for images of one table in some bases, which lie below `tops`."""

    def __init__(self, tops: Sequence[str], bases: Sequence[_Base], split: str):
        self.split = split
        self.bases = bases
        self.reader = _FolderReader(*tops)

    def find_exactly(self, path: _ImagePath) -> _FoundImage | None:
        """The file to which a path leads in the first of the bases that has it."""
        if path.is_absolute:
            return None
        for base in self.bases:
            file = base.join(path.text)
            if self.reader.has_file(file):
                return self.found(file, base.kind)
        return None

    def found(self, file: str, *kinds: str) -> _FoundImage:
        """The record of a file, with what is counted."""
        rescues = {kind: file for kind in kinds if kind}
        if self.reader.is_outside(file):
            rescues[THROUGH_LINK] = os.path.realpath(file)
        return _FoundImage(file, rescues)

    @functools.cached_property
    def files(self) -> dict[str, set[str]]:
        """Every file by its spelling, and image files also by that without their ending."""
        files = defaultdict(set)
        for path in self.reader.all_files():
            spelling = _spelling(path)
            files[spelling].add(path)
            if _IMAGE_ENDING.search(spelling):
                files[_IMAGE_ENDING.sub(".*", spelling)].add(path)
        return files

    def similar_files(self, path: str, ending: str, bases: Sequence[_Base]) -> dict[str, str]:
        """The files that a path may mean in these bases, each with the base's kind."""
        similar = {}
        for base in bases:
            for file in self.files.get(_spelling(base.join(path)) + ending, ()):
                similar.setdefault(file, base.kind)
        return similar

    def find_similar(self, path: _ImagePath) -> _FoundImage | None:
        """The one file that a path means in another spelling or without its ending.

        None where there is none; several are a problem.
        """
        if path.is_absolute:
            return None
        for ending, kind in (("", OTHER_SPELLING), (".*", WITHOUT_ENDING)):
            similar = self.similar_files(path.text, ending, self.bases)
            if len(similar) > 1:
                names = sorted(similar)[:3]
                problem = f"several files are meant, such as {names}; write one of them"
                return _FoundImage(self.bases[0].join(path.text), problem=problem)
            for file, base_kind in similar.items():
                return self.found(file, base_kind, kind)
        return None

    def has_first_folder(self, path: _ImagePath) -> bool:
        """Whether a relative path begins with a folder that is here."""
        first, *others = path.text.split("/")
        folders = [os.path.join(base.folder, first) for base in self.bases]
        return not others or any(map(self.reader.has_folder, folders))

    def find_by_tail(self, path: _ImagePath) -> dict[str, str]:
        """The files that the longest possible end of a path means, with their bases' kinds.

        A folder that names a split is left out only where the base stands for that split.
        """
        parts = path.text.split("/")
        for number in range(len(parts)):
            left_out = {part.casefold() for part in parts[:number]}.intersection(_SPLIT_FOLDERS)
            bases = self.bases
            if left_out:
                bases = [base for base in bases if base.names_split and left_out == {self.split}]
            for ending in ("", ".*"):
                similar = self.similar_files("/".join(parts[number:]), ending, bases)
                if similar:
                    return similar
        return {}


def _count_kinds(
    frame: pd.DataFrame,
    notes: Sequence[Mapping[str, str]],
    kinds: Sequence[str],
    split: str,
    fallbacks: Counter,
) -> None:
    """Count the rows by the kinds of their `notes`, and log each kind that occurs.

    Each row has a mapping from kinds to what there is to say; the log has the first row's.
    """
    for kind in kinds:
        rows = [row for row, note in enumerate(notes) if kind in note]
        if rows:
            fallbacks[kind] += len(rows)
            LOGGER.warning(
                "%s.csv: %s in %d of %d rows, for example line %d: %r (%s)",
                split,
                kind,
                len(rows),
                len(frame),
                frame["line"].iloc[rows[0]],
                frame["path"].iloc[rows[0]],
                notes[rows[0]][kind][:200],
            )


def _have_one_folder(first: str, second: str) -> bool:
    """Whether two paths agree in the folder of their file too, and not in its name alone.

    >>> _have_one_folder("/data/train/1.png", "me/Train/1.png")
    True
    >>> _have_one_folder("/data/1.png", "1.png")
    False
    """
    folders = [_spelling(path).split("/")[-2:-1] for path in (first, second)]
    return folders[0] == folders[1] != []


def _find_by_tails(
    finder: _ImageFinder, frame: pd.DataFrame, paths: Mapping[int, _ImagePath]
) -> dict[int, _FoundImage]:
    """The images of these rows, by number, to which only the ends of their paths lead.

    Raises DataError for an end that several files have, or a bare name by which two
    different paths would mean one file.
    """
    found = {}
    text_of_file = {}
    row_numbers = pd.Series(range(len(frame)), index=frame.index)
    for row, path in paths.items():
        similar = finder.find_by_tail(path)
        problem = ""
        if len(similar) > 1:
            problem = f"its end leads to several files, such as {sorted(similar)[:3]}"
        for file, kind in similar.items():
            found[row] = finder.found(file, kind, BY_TAIL)
            other = text_of_file.setdefault(file, path.text)
            if other != path.text and not _have_one_folder(file, path.text):
                problem = f"its name leads to {file}, and so does {other!r}"
        if problem:
            problem = f"{problem}; write the paths as they are in the data folder"
            file = f"{finder.split}.csv"
            _raise_for_first_row(file, frame, row_numbers == row, "path", problem)
    return found


def _search(
    finder: _ImageFinder,
    frame: pd.DataFrame,
    paths: Mapping[int, _ImagePath],
    others: Sequence[_ImageFinder] = (),
) -> dict[int, _FoundImage]:
    """The images of these rows, by number, that the finder finds.

    Nothing is left out of a relative path whose first folder is known to it, or to the `others`:
    its image is missing there. Raises what `_find_by_tails` raises.
    """
    found = {row: finder.find_exactly(path) for row, path in paths.items()}
    for row, path in paths.items():
        found[row] = found[row] or finder.find_similar(path)
    may_be_shortened = {}
    for row, path in paths.items():
        is_here = any(known.has_first_folder(path) for known in (finder, *others))
        if found[row] is None and (path.is_absolute or not is_here):
            may_be_shortened[row] = path
    found.update(_find_by_tails(finder, frame, may_be_shortened))
    return {row: image for row, image in found.items() if image}


@dataclass(frozen=True)
class _Archives:
    """The archives beside the tables."""

    with_images: list[Path] = field(default_factory=list)  # with files of the names in question
    unread: dict[str, str] = field(default_factory=dict)  # name of another -> why it is not read


def _archives_with(paths: Iterable[_ImagePath], root: Path, split: str) -> _Archives:
    """The archives in `root` that hold files with some of these paths' names, in any spelling.

    One that is named after the split comes first; one that is named after another split is left
    out. Those that cannot be read are named.
    """

    def order(path: Path) -> tuple[bool, str]:
        return split not in _words(path.name), path.name

    wanted = {_spelling(os.path.basename(path.text)) for path in paths}
    archives = _Archives()
    for archive in sorted(root.iterdir(), key=order):
        splits = _words(archive.name).intersection(_SPLIT_FOLDERS)
        is_for_others = splits and split not in splits
        is_archive = archive.name.lower().endswith(ARCHIVE_ENDINGS + _OTHER_ARCHIVES)
        if is_for_others or not is_archive or not archive.is_file():
            continue
        if archive.name.lower().endswith(_OTHER_ARCHIVES):
            archives.unread[archive.name] = "it is not unpacked here: unpack it by hand"
            continue
        LOGGER.info("Looking for images of %s.csv in %s", split, archive)
        try:
            with _open_with_names(archive) as opened:
                members = [member.name for member in _archive_members(opened)]
        except Exception as error:  # each format and each decoder raises its own
            LOGGER.warning(
                "%s: no image is looked for in it, it cannot be read (%s)", archive, error
            )
            archives.unread[archive.name] = "it cannot be read: download it again"
            continue
        # Some programs of Windows write backslashes; unpacking it then says so.
        names = {_spelling(re.split(r"[/\\]", member)[-1]) for member in members}
        names.update([_IMAGE_ENDING.sub("", name) for name in names])
        if not wanted.isdisjoint(names):
            archives.with_images.append(archive)
    return archives


def _find_in_archives(
    archives: Sequence[Path],
    at_hand: _ImageFinder,
    frame: pd.DataFrame,
    paths: Mapping[int, _ImagePath],
) -> dict[int, _FoundImage]:
    """The images of these rows, by number, that are in the first archive that has them."""
    found = {}
    for archive in archives:
        missing = {row: path for row, path in paths.items() if row not in found}
        if not missing:
            break
        bases = _bases_in_archive(archive, at_hand.split)
        packed = _ImageFinder([bases[0].folder], bases, at_hand.split)
        found.update(_search(packed, frame, missing, others=[at_hand]))
    return found


def _find_images(
    frame: pd.DataFrame, root: Path, split: str, fallbacks: Counter
) -> list[_FoundImage]:
    """Every row's image, looked for in `root`, its `images` and the split's folder.

    Then in the split's folder of `images` and the `images` of the split's folder, in another
    spelling, without its ending, by the end of a path of another machine, and in archives
    beside the tables; what is found so is counted and logged. Links are followed: they are the
    user's. Raises DataError for a URL, a path that leads out of `root`, and an end that may
    mean several files.
    """
    parsed = [_parse_image_path(text, str(root)) for text in frame["path"]]
    leads_out = pd.Series([path is None for path in parsed], index=frame.index)
    problem = "is a URL or leads out of the data folder; copy it there"
    _raise_for_first_row(f"{split}.csv", frame, leads_out, "path", problem)
    is_blank = frame["path"].map(shows_nothing).tolist()
    paths = {row: path for row, path in enumerate(parsed) if not is_blank[row]}
    at_hand = _ImageFinder([str(root)], _bases(str(root), split), split)
    found = _search(at_hand, frame, paths)
    missing = {row: path for row, path in paths.items() if row not in found}
    archives = _archives_with(missing.values(), root, split) if missing else _Archives()
    found.update(_find_in_archives(archives.with_images, at_hand, frame, missing))

    places = f"{root}, there in images, {split}, {split}/images, images/{split}"
    if archives.with_images:
        places = f"{places} and in {', '.join(archive.name for archive in archives.with_images)}"
    for name, reason in archives.unread.items():
        places = f"{places}, not in {name} ({reason})"
    nowhere = (
        f"No such file: looked for it in {places}, in other spelling, "
        "without its ending and by the end of its path; put it there"
    )
    images = []
    for row, path in enumerate(parsed):
        problem = "the path is blank; write the image's file name" if is_blank[row] else nowhere
        without_file = _FoundImage(os.path.join(root, path.text), problem=problem)
        images.append(found.get(row, without_file))
    rescues = [image.rescues for image in images]
    _count_kinds(frame, rescues, IMAGE_RESCUES, split, fallbacks)
    return images


# === Damaged images ===============================================================================
MIN_DECODED_SHARE = 0.9  # of a JPEG that is cut off, so that it is used
_LARGEST_IMAGE_FILE = 2**28  # bytes that are read of a file in order to repair it
# Formats by how their files begin, and what to do about one that is not read.
_UNREAD_FORMATS = {
    rb"....ftyp(hei[cmsx]|hev[cx]|mif1|msf1)": "HEIC: pip install pillow-heif and start again",
    rb"....ftyp(avif|avis)": 'AVIF: pip install "pillow>=11.3" and start again',
    rb"\xff\x4f\xff\x51|....jP  \r\n": "JPEG 2000: install a Pillow that has OpenJPEG",
    rb"\xff\x0a|....JXL \r\n": "JPEG XL: convert it with the package pillow-jxl-plugin",
    rb"\s*(<\?xml.{0,400})?<svg": "SVG: convert it with the package cairosvg",
    rb"%PDF": "PDF: convert it with the package pdf2image",
    rb"version https://git-lfs": "a pointer of Git LFS: git lfs pull",
    rb"\s*(?i:<!doctype html|<html)": "a web page: download the image again",
    rb"\Z": "an empty file: download the image again",
    rb"8BPS": "Photoshop's format: convert it with the package psd-tools",
    rb"II.{6}CR": "a camera's raw file: convert it with the package rawpy",
}


def _unread_format(content: bytes) -> str:
    """What a file is that no decoder here reads, and what to do; "" where it is not known.

    >>> _unread_format(b"%PDF-1.4 ...")
    'PDF: convert it with the package pdf2image'
    """
    for beginning, remedy in _UNREAD_FORMATS.items():
        if re.match(beginning, content, re.DOTALL):
            return remedy
    return ""


def _png_without_blocks(content: bytes) -> bytes:
    """A PNG of those blocks that make the picture and its rotation, if they are undamaged.

    Texts, colour profiles and further frames are left out, and whatever is between blocks.
    """
    kept = [content[:8]]
    for match in re.finditer(b"IHDR|PLTE|tRNS|IDAT|eXIf|IEND", content):
        start = match.start() - 4  # a block: its length, name, data and checksum
        end = match.end() + int.from_bytes(content[start : start + 4], "big")
        checksum = zlib.crc32(content[match.start() : end])
        if content[end : end + 4] == checksum.to_bytes(4, "big"):
            kept.append(content[start : end + 4])
    return b"".join(kept)


@dataclass(frozen=True)
class _JpegSegment:
    """One segment of a JPEG; that of a scan includes the pixels' data."""

    marker: int
    start: int
    end: int


_SOS = 0xDA  # the marker of a scan
_FRAMES = (0xC0, 0xC1, 0xC2)  # the markers of usual pictures: the size, and how it is coded
_NOT_FOR_THE_PICTURE = {*range(0xE2, 0xEE), 0xEF, 0xFE}  # profiles, previews, comments


def _jpeg_segments(content: bytes, start: int = 2) -> list[_JpegSegment]:
    """The segments from `start` on, up to the end or to the first that leads astray."""
    segments = []
    while start + 4 <= len(content) and content[start] == 0xFF:
        marker = content[start + 1]
        if marker == 0xFF:  # a byte of padding
            start += 1
            continue
        end = start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")
        if marker == 0xD9 or end > len(content):
            break
        if marker == _SOS:  # its data end at the next marker that is no restart
            following = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]").search(content, end)
            end = following.start() if following else len(content)
        if content[end : end + 1] not in (b"\xff", b""):  # its length is wrong
            break
        segments.append(_JpegSegment(marker, start, end))
        start = end
    return segments


def _jpeg_area(content: bytes, segments: Sequence[_JpegSegment]) -> int:
    """Pixels of the picture that these segments hold; 0 where they hold none."""
    area = 0
    has_scan = any(segment.marker == _SOS for segment in segments)
    for segment in segments:
        if segment.marker in _FRAMES and has_scan:
            height = int.from_bytes(content[segment.start + 5 : segment.start + 7], "big")
            width = int.from_bytes(content[segment.start + 7 : segment.start + 9], "big")
            area = height * width
    return area


def _jpeg_without_blocks(content: bytes) -> bytes:
    """A JPEG of those segments that make the picture and its rotation.

    Where a segment leads astray, the largest picture behind it is taken: others are previews.
    """
    segments = _jpeg_segments(content)
    if not _jpeg_area(content, segments):
        picture = []
        for table in re.finditer(b"\xff\xdb", content):  # with which a picture begins
            behind = _jpeg_segments(content, table.start())
            if _jpeg_area(content, behind) > _jpeg_area(content, picture):
                picture = behind
        segments += picture
    kept = [content[:2]]
    for segment in segments:
        if segment.marker not in _NOT_FOR_THE_PICTURE:
            kept.append(content[segment.start : segment.end])
    end = segments[-1].end if segments else len(content)
    kept.append(content[end : end + 2])  # the mark of its end, unless it is cut off
    return b"".join(kept)


def _jpeg_detail(content: bytes) -> float:
    """The mean share of the colour channels' 64 frequencies that the file has, from 0 to 1.

    A progressive JPEG sends them in several scans; of one that is cut off, only what it refines
    is taken for known.
    """
    known = defaultdict(set)
    segments = _jpeg_segments(content)
    channels = 0
    for segment in segments:
        if segment.marker in _FRAMES:
            channels = content[segment.start + 9]
    for scan in segments:
        if scan.marker != _SOS:
            continue
        count = content[scan.start + 4]
        after_channels = scan.start + 5 + 2 * count
        first, last = content[after_channels : after_channels + 2]
        is_whole_picture = count == channels and (first, last) == (0, 63)
        if scan.end < len(content) or is_whole_picture:
            for channel in content[scan.start + 5 : after_channels : 2]:
                known[channel].update(range(first, last + 1))
    return sum(map(len, known.values())) / (64 * max(channels, 1))


def _decoded_share(image: Image.Image, undisturbed: Image.Image, detail: float) -> float:
    """Share of the pixels that a JPEG's data gave, times the share of their `detail`.

    `image`: decoded as if the data ended where the file is cut off. `undisturbed`: its negative,
    on which the decoder has put the rows that it had the data for. Below these rows, the
    decoder fills what is missing with one colour: that of the last pixel.
    """
    pixels = np.atleast_3d(np.asarray(image))
    is_row_given = (pixels == np.atleast_3d(np.asarray(undisturbed))).all(axis=(1, 2))
    is_filled = (pixels == pixels[-1, -1]).all(axis=2) & ~is_row_given[:, None]
    return float(1 - is_filled.mean()) * detail


def _shrunken_size(size: Sequence[int], max_side: int) -> list[int]:
    """The size at which the longer side is `max_side`, or a little more.

    >>> _shrunken_size((300, 200), max_side=30)
    [30, 20]
    """
    return [math.ceil(side * max_side / max(size)) for side in size]


def _decode_cut_jpeg(content: bytes, max_side: int) -> tuple[Image.Image, float]:
    """(image, share of it that was decoded) of a JPEG that may be cut off.

    It is decoded at 1/2 to 1/8 of its size where that is far more than `max_side`. Raises what
    PIL raises where not even the picture's size is there.
    """
    detail = _jpeg_detail(content)
    segments = _jpeg_segments(content)
    end = segments[-1].end if segments else len(content)
    if content[end : end + 2] != b"\xff\xd9":
        content = content[:end]  # without a last segment that is not whole
    image = Image.open(io.BytesIO(content + b"\xff\xd9"), formats=["JPEG"])
    image.draft("RGB", _shrunken_size(image.size, max_side))
    image.load()
    cut = Image.open(io.BytesIO(content), formats=["JPEG"])
    cut.draft("RGB", _shrunken_size(cut.size, max_side))
    cut.im = ImageChops.invert(image).im  # PIL decodes into it
    with contextlib.suppress(OSError):  # it raises where the data end, and leaves what it has
        cut.load()
    cut.tile = []  # nothing more to decode
    return image, _decoded_share(image, cut.copy(), detail)


# === Images =======================================================================================
# The `image_path` of a test row without a usable image; `load_image` knows it.
GREY_IMAGE = "<grey image>"
# Between the file and how it is changed, in an `image_path`; `load_image` knows it.
VARIANT_MARK = "<variant>"
# Pixels; more than any pixel budget asks for, and it bounds the memory of one image.
MAX_IMAGE_SIDE = 4096
# Not EPS, for example: it starts Ghostscript.
IMAGE_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "AVIF",
    "JPEG2000",
    "HEIF",  # where pillow-heif is installed
)


def _grey_range(mode: str, lowest: float, highest: float) -> tuple[float, float]:
    """The grey values of an image of more than 8 bits that become black and white.

    From 0 to the smallest usual maximum that holds all values; the values' own
    range where some are negative. Floats may exceed 1 and 255 by half, as resizing makes them do.

    >>> _grey_range("F", 0.0, 1.02), _grey_range("F", 0.0, 257.0), _grey_range("I", 0, 257)
    ((0, 1), (0, 255), (0, 65535))
    """
    if lowest < 0:
        return lowest, highest
    if mode.startswith("I;16"):
        return 0, 65535
    for usual_maximum in (1, 255, 65535):
        may_exceed = mode == "F" and usual_maximum <= 255
        if highest <= usual_maximum * (1.5 if may_exceed else 1):
            return 0, usual_maximum
    return 0, highest


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits or floats, scaled to 8 bits."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    black, white = _grey_range(image.mode, values.min(), values.max())
    width = (white - black) or 1  # all values are alike
    scaled = (values - black) / width * 255
    return Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB as a viewer shows it: deep greys scaled to 8 bits, transparency laid on white."""
    if image.mode[0] in "IF":  # PIL's own conversion would clip it to white or black
        image = _grey_to_8_bits(image)
    if image.has_transparency_data:
        # Plain conversion would paint transparent pixels in their hidden colour.
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def grey_image(side: int = 224) -> Image.Image:
    """The neutral image, `side` pixels square, that stands in where a test row has none.

    >>> grey_image(2).getcolors()
    [(4, (128, 128, 128))]
    """
    return Image.new("RGB", (side, side), (128, 128, 128))


def apply_image_change(image: Image.Image, change: Mapping) -> Image.Image:
    """The RGB image, mildly changed as `draw_image_change` says.

    It is cropped to "box" (left, top, right, bottom in pixels), then mixed with
    white (with black where "light" is negative), with its mean grey ("contrast")
    and with its own greys ("colour"), each a share from 0 to 1, then stored as a
    JPEG of "quality". Mixing with grey keeps every hue, unlike clipping.

    >>> change = {"box": [1, 0, 4, 2], "light": 0.1, "contrast": 0, "colour": 0, "quality": 90}
    >>> apply_image_change(grey_image(4), change).size
    (3, 2)
    """
    image = image.crop(change["box"])
    shade = Image.new("RGB", image.size, "white" if change["light"] > 0 else "black")
    image = Image.blend(image, shade, abs(change["light"]))
    mean = round(np.asarray(image.convert("L")).mean())
    mean_grey = Image.new("RGB", image.size, (mean, mean, mean))
    image = Image.blend(image, mean_grey, change["contrast"])
    own_greys = image.convert("L").convert("RGB")
    image = Image.blend(image, own_greys, change["colour"])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=change["quality"], subsampling=0)
    return Image.open(buffer).convert("RGB")


@functools.cache
def _readable_formats() -> list[str]:
    """Those of IMAGE_FORMATS that this PIL knows."""
    Image.init()
    if importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


# Kinds of what an image was used in spite of: the names of their fallbacks.
CUT_OFF = "image_cut_off_but_used"
BLOCKS_LEFT_OUT = "image_without_its_damaged_blocks"
ROTATION_IGNORED = "image_rotation_not_readable"
OWN_GREYS = "image_greys_scaled_to_their_own_range"
IMAGE_REPAIRS = (CUT_OFF, BLOCKS_LEFT_OUT, ROTATION_IGNORED, OWN_GREYS)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class _Decoded:
    """An image, and how it was repaired: kinds among IMAGE_REPAIRS and what there is to say."""

    image: Image.Image
    repairs: dict[str, str] = field(default_factory=dict)


def _turn_upright(image: Image.Image, repairs: dict[str, str]) -> Image.Image:
    """The image as its camera was held; as it is, and noted, where that cannot be read.

    Unlike PIL's own function it does not write the EXIF block anew, which fails for one that is
    too long or has a value of the wrong kind.
    """
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # a damaged block, in which PIL's parser may stumble anywhere
        repairs[ROTATION_IGNORED] = error_in_words(error)
        return image
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _finish_image(image: Image.Image, repairs: dict[str, str]) -> _Decoded:
    """The image of an opened file, upright and in RGB."""
    image = _turn_upright(image, repairs)
    if image.mode == "F" or image.mode == "I":
        lowest, highest = image.getextrema()
        if lowest < 0 or highest > 65535:
            repairs[OWN_GREYS] = f"from {lowest:g} to {highest:g}"
    return _Decoded(_to_rgb(image), repairs)


def _blocks_left_out(content: bytes, kept: bytes, reason: str) -> dict[str, str]:
    """The repairs of an image of which only the bytes in `kept` were used."""
    repairs = {BLOCKS_LEFT_OUT: reason}
    for name in (b"Exif\0\0", b"eXIf"):  # of JPEG, of PNG
        if name in content and name not in kept:
            repairs[ROTATION_IGNORED] = "its EXIF block is damaged"
    return repairs


def _repair_jpeg(path: str | Path, content: bytes, max_side: int, reason: str) -> _Decoded:
    """A JPEG that PIL refuses for a `reason`: cut off, or without blocks that are not needed.

    Raises ImageError where less than MIN_DECODED_SHARE decodes, else what PIL raises.
    """
    kept = _jpeg_without_blocks(content)
    repairs = {}
    try:
        image, share = _decode_cut_jpeg(content, max_side)
    except Exception as error:  # of a block before the picture, or of no picture at all
        LOGGER.debug("%s: tried without its blocks, after %s", path, error)
        share = 0.0
    if share < MIN_DECODED_SHARE and kept != content:
        image, share = _decode_cut_jpeg(kept, max_side)
        repairs = _blocks_left_out(content, kept, reason)
    if share < MIN_DECODED_SHARE:
        raise ImageError(
            f"{path}: cut off, only {share:.0%} of it can be decoded, "
            f"{MIN_DECODED_SHARE:.0%} are needed; replace the file"
        )
    if share < 1 or not repairs:
        repairs[CUT_OFF] = f"{share:.1%} decoded"
    return _finish_image(image, repairs)


def _repair_png(content: bytes, reason: str) -> _Decoded:
    """A PNG that PIL refuses for a `reason`, without blocks that are not needed.

    Raises what PIL raises.
    """
    kept = _png_without_blocks(content)
    image = Image.open(io.BytesIO(kept), formats=["PNG"])
    return _finish_image(image, _blocks_left_out(content, kept, reason))


def _repair_image(path: str | Path, max_side: int, error: Exception) -> _Decoded:
    """What can be saved of an image that PIL refuses with `error`.

    Raises ImageError for what cannot.
    """
    content = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:  # PIL has met the error, too
        content = file.read(_LARGEST_IMAGE_FILE)
    reason = error_in_words(error)[:200]
    if not os.path.isfile(path):
        remedy = "no file is here, or a link leads nowhere; put the file there"
        raise ImageError(f"{path}: not a readable image ({reason}); {remedy}") from error
    try:
        if content.startswith(b"\xff\xd8\xff"):
            return _repair_jpeg(path, content, max_side, reason)
        if content.startswith(b"\x89PNG"):
            return _repair_png(content, reason)
    except ImageError:
        raise
    except Exception as second_error:
        LOGGER.debug("%s: not repaired either (%s)", path, second_error)
    remedy = _unread_format(content)
    remedy = f"it is {remedy}, or replace it" if remedy else "replace the file"
    raise ImageError(f"{path}: not a readable image ({reason}); {remedy}") from error


def _decode_image(path: str | Path, max_side: int) -> _Decoded:
    """The file's image, upright and in RGB, repaired where it must be.

    A JPEG far larger than `max_side` is decoded at 1/2 to 1/8 of its size. Raises
    ImageError for what cannot be read; PIL refuses a decompression bomb.
    """
    try:
        with Image.open(path, formats=_readable_formats()) as image:  # reads the header only
            image.draft("RGB", _shrunken_size(image.size, max_side))
            return _finish_image(image, {})
    except Exception as error:  # each decoder raises its own, and PIL passes them on
        return _repair_image(path, max_side, error)


def _load_image(path: str | Path, max_side: int) -> _Decoded:
    """`load_image`, with what was repaired."""
    if str(path) == GREY_IMAGE:
        return _Decoded(grey_image())
    if VARIANT_MARK in str(path):
        original, recipe = str(path).split(VARIANT_MARK)
        decoded = _load_image(original, max_side)
        changed = apply_image_change(decoded.image, json.loads(recipe))
        return _Decoded(changed, decoded.repairs)
    decoded = _decode_image(path, max_side)
    image = decoded.image
    image.thumbnail((max_side, max_side))
    if max(image.size) > 200 * min(image.size):  # the models' processors take no more
        raise ImageError(f"{path}: its sides {image.size} differ more than 200 to 1; crop it")
    return decoded


def load_image(path: str | Path, max_side: int = MAX_IMAGE_SIDE) -> Image.Image:
    """The upright RGB image, longer side at most `max_side` pixels, transparency on white.

    `path` may also be GREY_IMAGE, or a file, VARIANT_MARK and the JSON of a change. Of a JPEG
    that is cut off, what is missing is grey. Raises ImageError for an image that cannot be used.

    >>> load_image(GREY_IMAGE).size
    (224, 224)
    """
    return _load_image(path, max_side).image


def _difference_hash(image: Image.Image) -> str:
    """Perceptual hash, 64 bits in hexadecimal: where does the image get lighter to the right?

    Images that look alike have hashes that differ in few bits.
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
    gets_lighter = grey[:, 1:] > grey[:, :-1]  # (8, 8)
    return np.packbits(gets_lighter).tobytes().hex()


def _image_facts(path: str, problem: str = "") -> dict:
    """Size, content hash and perceptual hash of one image, from one full decode.

    Where it is unusable, for the `problem` that is given or another one, `problem` says why,
    the hashes are "" and the size is the grey image's. `repairs` are those of `_Decoded`.
    """
    image = grey_image()
    pixel_hash = ""
    dhash = ""
    repairs = {}
    try:
        if problem:
            raise ImageError(problem)
        decoded = _load_image(path, MAX_IMAGE_SIDE)
        repairs = decoded.repairs
        image = decoded.image
        pixel_hash = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        dhash = _difference_hash(image)
    except ImageError as error:
        problem = str(error)
    return {
        "image_path": path,
        "image_ok": problem == "",
        "width": image.width,
        "height": image.height,
        "pixel_hash": pixel_hash,
        "dhash": dhash,
        "problem": problem,
        "repairs": repairs,
    }


# === Competition ==================================================================================
@dataclass(frozen=True)
class Competition:
    """Validated tables of one competition, filled by `load_competition`.

    Rows are in the order of the files, with index 0..n-1. The columns of train and
    test:

    id, question, a, b, c, d    texts, verbatim
    image_path                  the image's file, or GREY_IMAGE
    type                        one of QUESTION_TYPES
    line                        where the row begins in its CSV, 1-based
    image_ok                    whether the image is usable; every training row's is
    width, height               of the image as loaded, in pixels
    pixel_hash, dhash           of its content and of its look; "" without a usable image

    and of train also answer (a-d) and label (0-3). Tables with a column context have it, too,
    verbatim; `add_context` decides whether it is used.
    """

    train: pd.DataFrame
    test: pd.DataFrame
    sample: pd.DataFrame  # sample_submission.csv: id and answer, under the file's own names
    fallbacks: Counter  # how often each fallback was taken; 0 for one that was not
    fingerprint: str  # SHA-256 that changes with any byte of the tables, any pixel, `columns`
    data_dir: Path  # the folder that everything was read from
    notation: AnswerNotation = AnswerNotation()  # how a submission writes its answers


def _count_dropped_rows(
    frame: pd.DataFrame, split: str, fallback: str, column: str, limit: float, fallbacks: Counter
) -> None:
    """Count and log the rows whose `problem` is not blank, as `fallback` of the split.

    Raises DataError about the first, with its text in `column`, where they are more
    than the share `limit` of all rows.
    """
    is_lost = frame["problem"] != ""
    lost = int(is_lost.sum())
    fallbacks[f"{split}_{fallback}"] += lost
    if lost == 0:
        return
    first_problem = frame["problem"][is_lost].iloc[0][:400]
    text = f"{first_problem}; {fallback} in {lost} of {len(frame)} rows"
    lines = frame["line"][is_lost].tolist()
    LOGGER.warning("%s.csv, lines %s: %s", split, lines[:20], text)
    if lost > limit * len(frame):
        problem = f"{text}; repair it or raise max_fallback_share={limit}"
        _raise_for_first_row(f"{split}.csv", frame, is_lost, column, problem)


def _attach_images(
    frame: pd.DataFrame, root: Path, split: str, limit: float, fallbacks: Counter
) -> pd.DataFrame:
    """The frame with image_path, the facts of every image, and the questions' types.

    Each file is decoded once, on all cores. Unusable images are counted; raises
    DataError where they are more than the share `limit`.
    """
    found = _find_images(frame, root, split, fallbacks)
    frame = frame.assign(image_path=[image.path for image in found])
    problems = {image.path: image.problem for image in found}
    with (
        warnings.catch_warnings(action="ignore"),  # of PIL, whose errors suffice
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        facts = pd.DataFrame(pool.map(_image_facts, problems, problems.values()))
    frame = frame.merge(facts, how="left", on="image_path")
    _count_dropped_rows(frame, split, "unusable_image", "path", limit, fallbacks)
    _count_kinds(frame, frame["repairs"], IMAGE_REPAIRS, split, fallbacks)
    frame = frame.drop(columns=["path", "problem", "repairs"])
    rows = frame[["question", *CHOICES]].itertuples(index=False)
    return frame.assign(type=[question_type(question, choices) for question, *choices in rows])


def _load_train(
    root: Path,
    limit: float,
    sample_size: int | None,
    seed: int,
    columns: Mapping[str, str],
    fallbacks: Counter,
) -> tuple[pd.DataFrame, AnswerNotation]:
    """Training rows with labels, and how the file writes its answers.

    Rows without an answer or a usable image are dropped and counted; raises
    DataError where either are more than the share `limit`. With `sample_size` so
    many rows are drawn by `seed`.
    """
    frame, _ = _read_competition_table(root / "train.csv", columns, fallbacks)
    is_blank = frame["answer"].map(shows_nothing)
    frame = frame.assign(problem=is_blank.map({True: "no answer", False: ""}))
    _count_dropped_rows(frame, "train", "blank_answer", "answer", limit, fallbacks)
    frame = frame[~is_blank].drop(columns="problem")
    _check_questions("train", frame, fallbacks)
    labels, notation = _read_answers(frame.assign(column="answer"), "train.csv", fallbacks)
    frame = frame.assign(label=labels)
    frame["answer"] = frame["label"].map(dict(enumerate(CHOICES)))
    if sample_size is not None:
        rows = min(sample_size, len(frame))
        frame = frame.sample(rows, random_state=seed).sort_index()
    frame = _attach_images(frame, root, "train", limit, fallbacks)
    return frame[frame["image_ok"]].reset_index(drop=True), notation


def _load_test(
    root: Path, limit: float, columns: Mapping[str, str], fallbacks: Counter
) -> pd.DataFrame:
    """Test rows, all of them; one without a usable image gets GREY_IMAGE and is counted."""
    frame, _ = _read_competition_table(root / "test.csv", columns, fallbacks)
    answers = frame.get("answer", ())  # a test table may have the column, which is not used
    fallbacks["test_answer_ignored"] += sum(not shows_nothing(text) for text in answers)
    _check_questions("test", frame, fallbacks)
    frame = _attach_images(frame, root, "test", limit, fallbacks)
    frame["image_path"] = frame["image_path"].where(frame["image_ok"], GREY_IMAGE)
    return frame.drop(columns="answer", errors="ignore")


def _load_sample(
    root: Path, test: pd.DataFrame, columns: Mapping[str, str], fallbacks: Counter
) -> pd.DataFrame:
    """The sample submission, under its own column names.

    Raises DataError unless its columns are id and answer, and its ids the test's.
    """
    path = root / "sample_submission.csv"
    sample, header = _read_competition_table(path, columns, fallbacks)
    unknown = ~sample["id"].isin(test["id"])
    looks_known = sample["id"].map(comparable_text).isin(test["id"].map(comparable_text))
    problem = (
        "looks like an id of test.csv, but is written in other characters (blanks, decomposed "
        "Hangul, or characters that show nothing); write both alike"
    )
    _raise_for_first_row("sample_submission.csv", sample, unknown & looks_known, "id", problem)
    problem = "is only in this file; take test.csv and sample_submission.csv from one download"
    _raise_for_first_row("sample_submission.csv", sample, unknown, "id", problem)
    absent = ~test["id"].isin(sample["id"])
    _raise_for_first_row("test.csv", test, absent, "id", problem)
    return sample[["id", "answer"]].set_axis(header, axis=1)


def load_competition(
    data_dir,
    max_fallback_share=0.01,
    sample_size: int | None = None,
    seed=42,
    columns: Mapping[str, str] | None = None,
) -> Competition:
    """The validated tables of the competition in `data_dir`, with counts of all fallbacks.

    With `sample_size` only so many training rows, drawn with `seed`, are kept.
    `columns` maps our names of columns to the files' own, where they are not understood.
    Raises DataError for what would need a guess, and for more losses than the share
    `max_fallback_share`.
    """
    root = named_folder(data_dir).resolve()
    fallbacks = Counter(csv_read_as_cp949=0)
    columns = columns or {}
    train, notation_of_train = _load_train(
        root, max_fallback_share, sample_size, seed, columns, fallbacks
    )
    test = _load_test(root, max_fallback_share, columns, fallbacks)
    sample = _load_sample(root, test, columns, fallbacks)
    notation = decide_notation(notation_of_train, sample, test, fallbacks)
    in_doubt = fallbacks["sample_answers_in_doubt"] + fallbacks["sample_answers_not_understood"]
    level = logging.WARNING if in_doubt else logging.INFO
    LOGGER.log(level, "Submissions write answers as %s: %s", notation, notation.reason)
    LOGGER.info(
        "Loaded %d training and %d test rows; fallbacks: %s",
        len(train),
        len(test),
        dict(+fallbacks),  # without those of count 0
    )
    tables = b"".join((root / name).read_bytes() for name in COMPETITION_FILES)
    pixels = "".join(train["pixel_hash"]) + "".join(test["pixel_hash"])
    mapping = json.dumps(columns, sort_keys=True) if columns else ""
    content = tables + pixels.encode() + mapping.encode()
    fingerprint = hashlib.sha256(content).hexdigest()
    return Competition(
        train=train,
        test=test,
        sample=sample,
        fallbacks=fallbacks,
        fingerprint=fingerprint,
        data_dir=root,
        notation=notation,
    )


# === Context ======================================================================================
# Words beside a row's image: what is written in it, a caption, facts that were looked up. They
# stand in front of the question, so that all choice orders keep their long common prefix.
CONTEXT_FILE = "context.csv"  # in the competition's folder, where the setting names no other
_CONTEXT_NAMES = ("context", "text")  # what the column of texts may be called in it


@dataclass(frozen=True)
class _ContextText:
    """One row of a context file."""

    line: int  # where it begins, 1-based
    text: str  # verbatim


def _context_path(config: Config, root: Path) -> Path | None:
    """The context file of these settings; None where there is none. DataError if it is gone."""
    if not config.context_file:
        path = root / CONTEXT_FILE
        return path if path.is_file() else None
    path = Path(config.context_file)
    if not path.is_file():
        raise DataError(f"context_file {path}: no such file; correct the setting, or leave it out")
    return path


def _context_places(file: str, header: _CsvRecord) -> tuple[int, int]:
    """Places of the ids and of the texts. Raises DataError unless there is one column of each."""
    names = [_own_name(name) for name in header.fields]
    texts = [place for place, name in enumerate(names) if name in _CONTEXT_NAMES]
    if names.count("id") != 1 or len(texts) != 1:
        raise DataError(
            f"{file}, line {header.line}: it needs a column id and a column context (or text), "
            f"one of each, with a comma between them; correct the header "
            f"{str(header.fields)[:200]}"
        )
    return names.index("id"), texts[0]


def _read_context_file(path: Path, fallbacks: Counter) -> dict[str, _ContextText]:
    """Id -> text. Raises DataError for a wrong header or row, and for an id that comes twice."""
    file = path.name
    records = [*_csv_records(file, _decode_csv(path, fallbacks), ",")]
    header, *rows = records or [_CsvRecord(line=1, fields=[])]
    id_place, text_place = _context_places(file, header)
    _check_record_lengths(file, _CsvTable(header, rows, ","))
    texts = {}
    for record in _without_blank_rows(file, rows, fallbacks):
        row_id = record.fields[id_place]
        if row_id in texts:
            problem = f"line {texts[row_id].line} has it, too; leave one row for each id"
            raise _cell_error(file, record.line, "id", row_id, problem)
        texts[row_id] = _ContextText(record.line, record.fields[text_place])
    return texts


def _ids_of_table(path: Path, columns: Mapping[str, str]) -> set[str]:
    """The ids of all rows of a table that was read before, those that were left out among them."""
    table = _read_csv_table(path, columns, Counter())
    reading = _read_column_names(path.name, table.header.fields, columns)
    place = reading.places["id"][0]
    return {record.fields[place] for record in table.records}


def _check_context_ids(
    file: str,
    texts: Mapping[str, _ContextText],
    root: Path,
    columns: Mapping[str, str],
) -> None:
    """Raise DataError about the first id that is in neither table, or in both."""
    train_ids = _ids_of_table(root / "train.csv", columns)
    test_ids = _ids_of_table(root / "test.csv", columns)
    for row_id, content in texts.items():
        in_train = row_id in train_ids
        in_test = row_id in test_ids
        problem = ""
        if not in_train and not in_test:
            problem = "neither train.csv nor test.csv has it; correct or remove the row"
        elif in_train and in_test:
            problem = (
                "train.csv and test.csv both have it, so that it cannot be told whose text this "
                "is; put the texts into a column context of both tables"
            )
        if problem:
            raise _cell_error(file, content.line, "id", row_id, problem)


def _use_context_column(
    config: Config, frame: pd.DataFrame, split: str, fallbacks: Counter
) -> pd.DataFrame:
    """The frame with its column context, blank where it has none; without it, if that is off.

    Counts the rows without any text, and those with tokens that are neutralised.
    """
    if not config.context_tokens:
        if CONTEXT_COLUMN in frame:
            text = "Decision: the column context of %s.csv is not used: context_tokens is 0"
            LOGGER.info(text, split)
        return frame.drop(columns=CONTEXT_COLUMN, errors="ignore")
    if CONTEXT_COLUMN not in frame:
        frame = frame.assign(context="")
    in_prompt = frame[CONTEXT_COLUMN].map(prompt_text)
    without_tokens = in_prompt.map(neutralise_special_tokens)
    fallbacks[f"{split}_rows_without_context"] += int((in_prompt == "").sum())
    fallbacks[f"{split}_context_special_tokens"] += int((without_tokens != in_prompt).sum())
    return frame


def _require_context(config: Config, competition: Competition) -> None:
    """Raise DataError where the settings ask for context and a table has no column of it."""
    without = []
    for split in ("train", "test"):
        if CONTEXT_COLUMN not in getattr(competition, split):
            without.append(f"{split}.csv")
    if without:
        raise DataError(
            f"context_tokens is {config.context_tokens}, but {' and '.join(without)} in "
            f"{competition.data_dir} have no column context, and there is no {CONTEXT_FILE}; "
            "add one of them, name a file in context_file, or set context_tokens=0"
        )


def add_context(config: Config, competition: Competition) -> Competition:
    """The competition with the context that the settings ask for in its rows' column context.

    `start_run` and `preflight` call it. With context_tokens 0 the column is dropped. A file comes
    before the tables' own column, and its bytes become part of the fingerprint. Rows without
    context are counted. Raises DataError for ids that are unknown, doubled or in both tables, and
    where there is no context at all.
    """
    fallbacks = Counter(competition.fallbacks)
    frames = {"train": competition.train, "test": competition.test}
    fingerprint = competition.fingerprint
    path = _context_path(config, competition.data_dir) if config.context_tokens else None
    if path is not None:
        texts = _read_context_file(path, fallbacks)
        _check_context_ids(path.name, texts, competition.data_dir, config.columns)
        LOGGER.info("Decision: context of %d rows comes from %s", len(texts), path)
        nothing = _ContextText(line=0, text="")
        for split, frame in frames.items():
            found = [texts.get(row_id, nothing).text for row_id in frame["id"]]
            frames[split] = frame.assign(context=found)
        content = fingerprint.encode() + path.read_bytes()
        fingerprint = hashlib.sha256(content).hexdigest()
    elif config.context_tokens:
        _require_context(config, competition)
    for split, frame in frames.items():
        frames[split] = _use_context_column(config, frame, split, fallbacks)
    return dataclasses.replace(competition, **frames, fallbacks=fallbacks, fingerprint=fingerprint)


# === Writing a competition ========================================================================
def _cell_as_text(cell, line: int, column: str) -> str:
    """The cell of a table of one's own as it will stand in the CSV; "" for a missing one.

    Raises DataError for what has no single way to be written.
    """
    is_missing_number = isinstance(cell, float) and math.isnan(cell)
    if cell is None or cell is pd.NA or is_missing_number:
        return ""
    if isinstance(cell, (int, np.integer)) and not isinstance(cell, bool):
        return str(cell)
    if not isinstance(cell, str):
        problem = (
            f"is a {type(cell).__name__} and no text; write it as text, "
            "as pd.read_csv(file, dtype=str, keep_default_na=False) reads it"
        )
        raise _cell_error("table", line, column, str(cell), problem)
    if re.search("[\0\ud800-\udfff]", cell):
        problem = "has a NUL byte or half of a character, which no CSV can hold; remove it"
        raise _cell_error("table", line, column, ascii(cell)[1:-1], problem)
    return cell


def _require_columns(frame: pd.DataFrame) -> None:
    """Raise DataError unless the table has rows and each of COLUMNS once."""
    counts = Counter(frame.columns)
    wrong = [name for name in COLUMNS if counts[name] != 1]
    if wrong:
        raise DataError(
            f"The table's columns {wrong} are missing or double; it needs {', '.join(COLUMNS)}, "
            f"and has {[*map(str, frame.columns)]}: rename them"
        )
    if frame.empty:
        raise DataError("The table has no rows; give it one for each question")


def _checked_texts(frame: pd.DataFrame) -> pd.DataFrame:
    """The table's texts, with answers as letters, "" for a row without one, and `line` from 1 on.

    Raises DataError about the first row that `load_competition` would refuse.
    """
    texts = pd.DataFrame({"line": range(1, len(frame) + 1)})
    for column in COLUMNS:
        if column != "path":
            cells = zip(frame[column], texts["line"], strict=True)
            texts[column] = [_cell_as_text(cell, line, column) for cell, line in cells]
    is_wrong = texts["id"].duplicated() | texts["id"].map(shows_nothing)
    problem = "is blank or repeats an earlier row's; give each row its own"
    _raise_for_first_row("table", texts, is_wrong, "id", problem)
    filled = ~texts[[*CHOICES]].map(shows_nothing)
    problem = "fewer than two choices are filled; complete the row"
    _raise_for_first_row("table", texts, filled.sum(axis=1) < 2, "id", problem)

    is_answered = ~texts["answer"].map(shows_nothing)
    if not is_answered.any():
        raise DataError(
            "The table has no row with an answer: nothing could be trained on; write a, b, c or d "
            "into the column answer"
        )
    answered = texts[is_answered].assign(column="answer")
    labels, _ = _read_answers(answered, "table", Counter())
    answered["answer"] = [CHOICES[label] for label in labels]
    _read_answers(answered, "table", Counter())  # as letters, which choices like "a" may contradict
    texts["answer"] = answered["answer"].reindex(texts.index, fill_value="")
    return texts


def _image_files(cells: Sequence, folder: Path) -> list[Path]:
    """The file of each row's image; pictures in memory are written to `folder` as PNG.

    Raises DataError about the first row whose image cannot be used.
    """
    files = []
    written = {}  # by identity: one picture may belong to many questions
    for line, cell in enumerate(cells, start=1):
        if isinstance(cell, Image.Image):
            file = written.get(id(cell))
            if file is None:
                file = folder / f"{line:06d}.png"
                try:
                    _finish_image(cell, {}).image.save(file)
                except Exception as error:  # each decoder raises its own
                    problem = f"cannot be read ({error_in_words(error)}); give its file's path"
                    raise _cell_error("table", line, "path", repr(cell), problem) from error
                written[id(cell)] = file
        elif isinstance(cell, (str, Path)) and str(cell).strip():
            file = Path(os.path.expanduser(cell)).resolve()
        else:
            problem = "is neither the path of an image nor a PIL image; give one of them"
            raise _cell_error("table", line, "path", str(cell), problem)
        files.append(file)
    paths = [*dict.fromkeys(map(str, files))]
    with (
        warnings.catch_warnings(action="ignore"),  # of PIL, whose errors suffice
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        facts = dict(zip(paths, pool.map(_image_facts, paths), strict=True))
    for line, file in enumerate(files, start=1):
        if problem := facts[str(file)]["problem"]:
            raise _cell_error("table", line, "path", file.name, problem)
    return files


def _collect_images(cells: Sequence, root: Path) -> list[str]:
    """Bring all rows' images into `root`/images; the path (n,) of each, relative to `root`."""
    folder = root / "images"
    folder.mkdir(parents=True)
    path_of_file = {}
    files = _image_files(cells, folder)
    for line, file in enumerate(files, start=1):
        if file in path_of_file:
            continue
        if file.parent == folder:
            name = file.name
        else:
            ending = file.suffix if re.fullmatch(r"\.[A-Za-z0-9]+", file.suffix) else ""
            name = f"{line:06d}{ending}"
            shutil.copyfile(file, folder / name)
        path_of_file[file] = f"images/{name}"
    return [path_of_file[file] for file in files]


def write_competition(frame: pd.DataFrame, folder: str | Path) -> Path:
    """Write a table of one's own as a competition's folder, whole or not at all; its path.

    `frame` has the columns id, path, question, a, b, c, d, answer, a row for each question.
    `path` holds the path of an image file, which is copied, or a PIL image, which is written as
    PNG, upright and in RGB. Rows with an answer, in any notation that `load_competition`
    understands, make train.csv, with letters a to d; rows without one make test.csv. Other columns
    are left out. `load_competition` reads all texts back verbatim; without a row for test.csv the
    folder serves for the setting extra_train_dirs alone. Raises DataError about the first row that
    cannot be used (line 1 is the table's first row), and where `folder` exists already.
    """
    folder = named_folder(folder).resolve()
    if folder.exists():
        raise DataError(f"{folder}: exists already; delete it, or name a new folder")
    _require_columns(frame)
    texts = _checked_texts(frame)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # what a killed process left
    try:
        texts["path"] = _collect_images([*frame["path"]], unfinished)
        is_answered = texts["answer"] != ""
        train = texts.loc[is_answered, [*COLUMNS]]
        test = texts.loc[~is_answered, [*COLUMNS]]
        tables = {
            "train.csv": train,
            "test.csv": test.drop(columns="answer"),
            "sample_submission.csv": test[["id", "answer"]],
        }
        for name, table in tables.items():
            atomic_write(unfinished / name, csv_text(table))
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    LOGGER.info("Wrote %d training and %d test rows to %s", len(train), len(test), folder)
    left_out = [str(name) for name in frame.columns if name not in COLUMNS]
    if left_out:
        LOGGER.info("Columns of the table that were left out: %s", str(left_out)[:200])
    return folder


# === Leakage and folds ============================================================================
COPY_PLACES = ("across train and test", "inside train", "inside test")


@dataclass(frozen=True)
class LeakageReport:
    """Copies of images within train, within test and between them."""

    # Every row that shares its group with another one, those of groups across train and test
    # first: what `count_copies` counts. Columns: where (one of COPY_PLACES), kind ("exact": the
    # group's pixels are all equal; else "near"), group (as in `image_group`), split, id, image
    # (rows with the same number have the same pixels), image_path.
    groups: pd.DataFrame
    # Each row is a pair of rows that show copies. Columns: split_a, id_a, image_path_a of the
    # first one, split_b, id_b, image_path_b of the second one, kind ("exact" or "near"),
    # difference (mean over the thumbnails, in grey levels of 255; 0 for exact copies).
    copies: pd.DataFrame
    # Group number of each training row, with the index of train; rows in one group show copies.
    image_group: pd.Series
    # The same of each test row that has a usable image; the numbers are those of `image_group`.
    test_group: pd.Series
    alarm: str  # why near copies were not used for grouping; "" where they were


@dataclass(frozen=True)
class _NearCopies:
    """Pairs of different images that look alike."""

    pairs: np.ndarray  # (pairs, 2): row numbers of both images in a table
    # (pairs,): mean difference of both thumbnails, in grey levels of 255.
    differences: np.ndarray


def _near_pairs_by_hash(dhashes: pd.Series, max_bits: int) -> np.ndarray:
    """Positions (pairs, 2) of the hashes that differ in at most `max_bits` of their 64 bits."""
    # Here, not at the top of the file: importing sklearn draws from the global generator.
    from sklearn.neighbors import radius_neighbors_graph

    codes = np.frombuffer(bytes.fromhex("".join(dhashes)), dtype=np.uint8)
    bits = np.unpackbits(codes.reshape(-1, 8), axis=1).astype(np.float32)
    # The squared distance of two rows of bits is the number of bits that differ.
    graph = radius_neighbors_graph(bits, radius=(max_bits + 0.5) ** 0.5)
    return np.column_stack(triu(graph).nonzero())


def _thumbnail(path: str) -> np.ndarray:
    """The image in 32 x 32 pixels, (32, 32, 3), in integers that can hold a difference."""
    return np.asarray(load_image(path).resize((32, 32)), dtype=np.int16)


def _find_near_copies(images: pd.DataFrame, max_bits: int, max_difference: float) -> _NearCopies:
    """Pairs of rows of `images` whose hashes agree, and the pixels of their thumbnails too."""
    pairs = _near_pairs_by_hash(images["dhash"], max_bits)
    involved = np.unique(pairs)
    paths = images["image_path"].iloc[involved]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        thumbnails = dict(zip(involved, pool.map(_thumbnail, paths), strict=True))
    differences = np.array(
        [np.abs(thumbnails[first] - thumbnails[second]).mean() for first, second in pairs]
    )
    is_near = differences <= max_difference
    return _NearCopies(pairs[is_near], differences[is_near])


def _linked_groups(pairs: np.ndarray, count: int) -> np.ndarray:
    """Group number (count,) of each image, where the images of a pair belong together."""
    links = coo_matrix((np.ones(len(pairs)), pairs.T), shape=(count, count))
    _, group_of_image = connected_components(links, directed=False)
    return group_of_image


def _alarm_about_groups(pixel_hash: pd.Series, group: np.ndarray) -> str:
    """Why these groups of rows are implausible; "" where they are not."""
    largest = pixel_hash.groupby(group).nunique().max()
    if largest > max(10, 0.01 * pixel_hash.nunique()):
        return (
            f"near copies would link {largest} different images into one group: "
            "only exact copies are grouped"
        )
    return ""


def _table_of_copies(rows: pd.DataFrame, exact: np.ndarray, near: _NearCopies) -> pd.DataFrame:
    """The report's table of copies; both kinds of pairs (pairs, 2) are positions in `rows`."""
    pairs = np.concatenate([exact, near.pairs])
    columns = ["split", "id", "image_path"]
    first = rows.loc[pairs[:, 0], columns].reset_index(drop=True)
    second = rows.loc[pairs[:, 1], columns].reset_index(drop=True)
    copies = first.add_suffix("_a").join(second.add_suffix("_b"))
    copies["kind"] = ["exact"] * len(exact) + ["near"] * len(near.pairs)
    copies["difference"] = np.concatenate([np.zeros(len(exact)), near.differences])
    return copies


def _rows_of_groups(rows: pd.DataFrame, group: np.ndarray) -> pd.DataFrame:
    """`LeakageReport.groups`, from rows of both tables and the group (n,) of each."""
    images, _ = pd.factorize(rows["pixel_hash"])
    table = rows[["split", "id", "image_path"]].assign(group=group, image=images)
    by_group = table.groupby("group")
    is_across = by_group["split"].transform("nunique") > 1
    is_inside_train = ~is_across & (table["split"] == "train")
    has_two_images = by_group["image"].transform("nunique") > 1
    table["where"] = np.select([is_across, is_inside_train], COPY_PLACES[:2], COPY_PLACES[2])
    table["kind"] = np.where(has_two_images, "near", "exact")
    table["place"] = table["where"].map(COPY_PLACES.index)

    copies = table[by_group["id"].transform("size") > 1]
    copies = copies.sort_values(["place", "kind", "group"], kind="stable", ignore_index=True)
    return copies[["where", "kind", "group", "split", "id", "image", "image_path"]]


def count_copies(groups: pd.DataFrame) -> pd.DataFrame:
    """How many groups of copies there are, and how many rows they have, in each of COPY_PLACES.

    `groups`: that of a `LeakageReport`. The index is the place; columns: exact groups, exact
    rows, near groups, near rows.

    >>> rows = {"where": "inside train", "kind": "exact", "group": [0, 0, 0]}
    >>> count_copies(pd.DataFrame(rows)).loc["inside train"].tolist()
    [1, 3, 0, 0]
    """
    counts = pd.DataFrame(index=pd.Index(COPY_PLACES, name="copies"))
    for kind in ("exact", "near"):
        by_place = groups[groups["kind"] == kind].groupby("where")["group"]
        counts[f"{kind} groups"] = by_place.nunique()
        counts[f"{kind} rows"] = by_place.size()
    return counts.fillna(0).astype(int)


def describe_copies(counts: pd.DataFrame) -> str:
    """What `count_copies` has counted, as a sentence.

    >>> rows = {"where": "inside train", "kind": "near", "group": [0, 0, 4, 4, 4]}
    >>> counts = count_copies(pd.DataFrame(rows))
    >>> describe_copies(counts.loc[["inside train", "inside test"]])
    'Copies of images: 2 near groups (5 rows) inside train; none inside test.'
    """
    parts = []
    for place, row in counts.iterrows():
        found = []
        for kind in ("exact", "near"):
            groups = row[f"{kind} groups"]
            if groups:
                noun = "group" if groups == 1 else "groups"
                found.append(f"{groups} {kind} {noun} ({row[f'{kind} rows']} rows)")
        parts.append(f"{' and '.join(found) or 'none'} {place}")
    return f"Copies of images: {'; '.join(parts)}."


def leakage_report(
    train: pd.DataFrame,
    test: pd.DataFrame,
    max_bits: int = 4,
    max_difference: float = 3.0,
) -> LeakageReport:
    """Copies of images in both tables of `load_competition`, and the groups that they form.

    Exact copies have the same pixels. Near copies have perceptual hashes that
    differ in at most `max_bits` of 64 bits, and thumbnails whose mean difference
    is at most `max_difference` grey levels of 255. Where near copies would link
    implausibly many images, a warning says so: they are still listed, but only
    exact copies form groups.
    """
    splits = [train.assign(split="train"), test.assign(split="test")]
    rows = pd.concat(splits).query("image_ok").reset_index(drop=True)
    image_of_row, hashes = pd.factorize(rows["pixel_hash"])
    _, first_row_of_image = np.unique(image_of_row, return_index=True)

    near_images = _find_near_copies(rows.iloc[first_row_of_image], max_bits, max_difference)
    group = _linked_groups(near_images.pairs, len(hashes))[image_of_row]
    alarm = _alarm_about_groups(rows["pixel_hash"], group)
    if alarm:
        LOGGER.warning("Leakage: %s", alarm)
        group = image_of_row

    first_row_of_copy = first_row_of_image[image_of_row]
    is_copy = first_row_of_copy != rows.index
    exact = np.column_stack([first_row_of_copy, rows.index])[is_copy]
    near = _NearCopies(first_row_of_image[near_images.pairs], near_images.differences)

    in_train = (rows["split"] == "train").to_numpy()
    test_index = test.index[test["image_ok"]]
    return LeakageReport(
        groups=_rows_of_groups(rows, group),
        copies=_table_of_copies(rows, exact, near),
        image_group=pd.Series(group[in_train], index=train.index, name="image_group"),
        test_group=pd.Series(group[~in_train], index=test_index, name="image_group"),
        alarm=alarm,
    )


def _replace_rare_strata(strata: pd.Series, at_least: int, substitute) -> pd.Series:
    """`strata`, with `substitute` in each row whose stratum has fewer than `at_least` rows."""
    rows_in_stratum = strata.map(strata.value_counts())
    return strata.where(rows_in_stratum >= at_least, substitute)


def _fold_strata(train: pd.DataFrame, n_folds: int) -> pd.Series:
    """What folds shall be even in: answer and question type of each row.

    A stratum with fewer rows than folds cannot be spread over them. Its rows count
    by their answer alone, and where that is still too few, as the most common stratum.
    """
    strata = train["answer"] + " " + train["type"]
    most_common = strata.mode()[0]
    strata = _replace_rare_strata(strata, n_folds, train["answer"])
    return _replace_rare_strata(strata, n_folds, most_common)


def make_folds(train: pd.DataFrame, n_folds: int = 3, seed: int = 42, groups=None) -> np.ndarray:
    """Fold number (n,) of each row, even in answer and question type; no group is split.

    `groups` (n,): a label for each row; by default rows with the same pixels are a group.
    Raises ValueError where there are fewer groups than folds.

    >>> train = pd.DataFrame({"answer": [*"aabbaabb"], "pixel_hash": [*"11223456"]})
    >>> folds = make_folds(train.assign(type="color"), n_folds=2).tolist()
    >>> folds[0] == folds[1], folds[2] == folds[3]
    (True, True)
    >>> sorted(folds)
    [0, 0, 0, 0, 1, 1, 1, 1]
    """
    # Here, not at the top of the file: importing sklearn draws from the global generator.
    from sklearn.model_selection import StratifiedGroupKFold

    labels = train["pixel_hash"] if groups is None else groups
    group_numbers, _ = pd.factorize(np.asarray(labels))
    group_count = group_numbers.max() + 1
    if group_count < n_folds:
        raise ValueError(
            f"{group_count} groups of images cannot fill n_folds={n_folds}; use fewer folds"
        )
    strata = _fold_strata(train, n_folds)
    # The groups are shuffled here: below scikit-learn 1.8 `shuffle=True` mixes up the counts of
    # the groups instead (its pull request 32540), and folds come out as uneven as dealt at random.
    shuffled = np.random.RandomState(seed).permutation(group_count)
    place_of_group = np.argsort(shuffled)
    splitter = StratifiedGroupKFold(n_splits=n_folds)
    folds = np.full(len(train), -1)
    splits = splitter.split(train, strata, place_of_group[group_numbers])
    for fold, (_, held_out) in enumerate(splits):
        folds[held_out] = fold
    return folds


def _deviation_by_chance(groups: pd.Series, n_folds: int) -> float:
    """Standard deviation of a fold's rows where whole groups are dealt out at random."""
    rows_in_group = groups.value_counts()
    variance = (rows_in_group**2).sum() * (n_folds - 1) / n_folds**2
    return float(variance**0.5)


def fold_balance(train: pd.DataFrame, groups=None) -> pd.DataFrame:
    """How even the folds of `train` are: a row for all rows, each answer and each question type.

    `train` has the column `fold`; `groups` as in `make_folds`. Columns: `part`; `rows`; `even`,
    the rows that each fold would have; `furthest`, the fold that is furthest from it; `off`,
    by how many rows; `is_even`. A part is uneven where a fold is off by more than three rows, and
    by more than the standard deviation of folds to which the groups are dealt at random.

    >>> train = pd.DataFrame({"answer": [*"aaaaaaabbbbbbb"], "fold": [0] * 7 + [1] * 7})
    >>> balance = fold_balance(train.assign(type="color"), groups=range(14))
    >>> balance[["part", "even", "off", "is_even"]].to_numpy().tolist()[:2]
    [['all rows', 7.0, 0.0, True], ['answer a', 3.5, 3.5, False]]
    """
    labels = train["pixel_hash"] if groups is None else groups
    group_of_row = pd.Series(np.asarray(labels), index=train.index)
    numbers = np.unique(train["fold"])
    parts = {"all rows": np.full(len(train), True)}
    for column in ("answer", "type"):
        for value in sorted(train[column].unique()):
            parts[f"{column} {value}"] = (train[column] == value).to_numpy()
    balance = []
    for part, is_in_part in parts.items():
        folds = train["fold"][is_in_part]
        even = len(folds) / len(numbers)
        deviations = folds.value_counts().reindex(numbers, fill_value=0) - even
        furthest = deviations.abs().idxmax()
        off = abs(deviations[furthest])
        by_chance = _deviation_by_chance(group_of_row[is_in_part], len(numbers))
        balance.append(
            {
                "part": part,
                "rows": len(folds),
                "even": even,
                "furthest": furthest,
                "off": off,
                "is_even": off <= max(3, by_chance),
            }
        )
    return pd.DataFrame(balance)


def describe_balance(balance: pd.DataFrame) -> str:
    """What `fold_balance` found, in sentences: the largest deviation, or the uneven parts.

    >>> parts = {"part": ["answer a"], "even": [46.7], "furthest": [1], "off": [2.3]}
    >>> describe_balance(pd.DataFrame(parts).assign(is_even=True))
    'Folds are even: they differ most in answer a, where fold 1 is off by 2.3 of 46.7 rows.'
    """
    ranked = balance.sort_values("off", ascending=False, kind="stable")
    uneven = ranked[~ranked["is_even"]]
    if uneven.empty:
        worst = ranked.iloc[0]
        return (
            f"Folds are even: they differ most in {worst['part']}, where fold "
            f"{worst['furthest']} is off by {worst['off']:.1f} of {worst['even']:.1f} rows."
        )
    furthest = [
        f"fold {row.furthest} is off by {row.off:.1f} of {row.even:.1f} rows in {row.part}"
        for row in uneven.head(3).itertuples()
    ]
    return (
        f"Warning: folds are uneven in {len(uneven)} of {len(balance)} parts "
        f"(all rows, each answer, each question type): {'; '.join(furthest)}. "
        "Scores of single folds then differ by their rows too. Large groups of copies do this: "
        "look at the table of copies, or take fewer folds (n_folds)."
    )


# === Known answers ================================================================================
KNOWN_COLUMNS = ["id", "train_id", "answer", "problem"]  # of `known_answers`
COPIES_DISAGREE = "its copies in train disagree"
ANSWER_IS_REPEATED = "several of its choices read like the answer"


class _AnsweredCopy(NamedTuple):
    """A training row that asks what a test row asks."""

    train_id: str
    answer: str  # the text of its right choice, as in `comparable_text`


def _question_keys(frame: pd.DataFrame) -> list[tuple]:
    """What rows that ask the same have in common: image, question, choices in any order."""
    questions = frame["question"].map(comparable_text)
    choices = frame[[*CHOICES]].map(comparable_text).to_numpy()
    keys = []
    for pixel_hash, question, texts in zip(frame["pixel_hash"], questions, choices, strict=True):
        keys.append((pixel_hash, question, *sorted(texts)))
    return keys


def _answered_copies(train: pd.DataFrame) -> dict[tuple, list[_AnsweredCopy]]:
    """The training rows of each of `_question_keys`."""
    choices = train[[*CHOICES]].map(comparable_text).to_numpy()
    answers = choices[np.arange(len(train)), train["label"]]
    copies = defaultdict(list)
    for key, train_id, answer in zip(_question_keys(train), train["id"], answers, strict=True):
        copies[key].append(_AnsweredCopy(train_id, answer))
    return copies


def _letter_of_answer(copies: Sequence[_AnsweredCopy], choices: list[str]) -> tuple[str, str]:
    """The letter under which the copies' answer stands in `choices`, or else why there is none."""
    answers = {copy.answer for copy in copies}
    if len(answers) > 1:
        return "", COPIES_DISAGREE
    [answer] = answers
    if choices.count(answer) > 1:
        return "", ANSWER_IS_REPEATED
    return CHOICES[choices.index(answer)], ""


def known_answers(train: pd.DataFrame, test: pd.DataFrame) -> pd.DataFrame:
    """The test rows that equal a training row in image, question and choices, with its answer.

    Images are equal by all their pixels, texts as a reader sees them (`comparable_text`), and
    choices in any order. Columns: id; train_id, of the first such training row; answer, the
    letter under which its right choice stands in the test row; problem, why `answer` is "".

    >>> row = {"pixel_hash": "cat", "question": "How many?", "a": "1", "b": "2", "c": "3"}
    >>> train = pd.DataFrame([{"id": "q1", **row, "d": "4", "label": 1}])
    >>> test = pd.DataFrame([{"id": "t1", **row, "a": "2", "b": "1", "d": "4"}])
    >>> known_answers(train, test).to_dict("records")
    [{'id': 't1', 'train_id': 'q1', 'answer': 'a', 'problem': ''}]
    """
    copies = _answered_copies(train)
    choices_of_row = test[[*CHOICES]].map(comparable_text).to_numpy().tolist()
    rows = []
    for test_id, key, choices in zip(test["id"], _question_keys(test), choices_of_row, strict=True):
        pixel_hash = key[0]
        if pixel_hash and key in copies:  # "": its image is not usable
            letter, problem = _letter_of_answer(copies[key], choices)
            rows.append((test_id, copies[key][0].train_id, letter, problem))
    return pd.DataFrame(rows, columns=KNOWN_COLUMNS, dtype=object)


def with_known_answers(answers: np.ndarray, ids: pd.Series, known: pd.DataFrame) -> np.ndarray:
    """(n,) answers 0-3 of the rows `ids`, with those that `known_answers` has in their place.

    >>> known = pd.DataFrame({"id": ["t2", "t3"], "answer": ["d", ""]})
    >>> with_known_answers(np.array([0, 0, 0]), pd.Series(["t1", "t2", "t3"]), known).tolist()
    [0, 3, 0]
    """
    usable = known[known["answer"] != ""]
    letters = ids.map(dict(zip(usable["id"], usable["answer"], strict=True)))
    labels = letters.map({letter: label for label, letter in enumerate(CHOICES)})
    return labels.fillna(pd.Series(answers, index=ids.index)).to_numpy(dtype=int)


def describe_known_answers(known: pd.DataFrame, test_rows: int, in_use: bool) -> str:
    """What `known_answers` has found and what becomes of it, as a sentence or two.

    `in_use`: the setting use_known_answers.

    >>> known = pd.DataFrame({"problem": ["", "", COPIES_DISAGREE]})
    >>> print(textwrap.fill(describe_known_answers(known, 300, in_use=False), 90))
    Known answers: 3 of 300 test rows equal a training row in image, question and choices. The
    submission does not take 2 of their answers (use_known_answers is off). Not usable: 1 (its
    copies in train disagree).
    """
    text = (
        f"Known answers: {len(known)} of {test_rows} test rows equal a training row in image, "
        "question and choices."
    )
    problems = known["problem"][known["problem"] != ""]
    usable = len(known) - len(problems)
    if usable:
        verb = "takes" if in_use else "does not take"
        state = "on" if in_use else "off"
        text += f" The submission {verb} {usable} of their answers (use_known_answers is {state})."
    counts = [f"{count} ({problem})" for problem, count in problems.value_counts().items()]
    if counts:
        text += f" Not usable: {', '.join(counts)}."
    return text


# === Augmentation =================================================================================
def draw_image_change(
    generator: np.random.Generator, width: int, height: int, may_crop: bool
) -> dict:
    """How one image of `width` x `height` pixels is changed: what `apply_image_change` takes.

    box: left, top, right, bottom in pixels, at least 95 % of each side; the whole
    image where it must not be cropped.
    light, contrast, colour: shares in which the image is mixed with something else:
    light (-0.1 to 0.1) with black below 0 and with white above, contrast (0 to 0.15)
    with its mean grey, colour (0 to 0.2) with its own greys.
    quality: of the JPEG, 70 to 95.

    >>> change = draw_image_change(np.random.default_rng(0), 100, 80, may_crop=False)
    >>> change["box"]
    [0, 0, 100, 80]
    >>> abs(change["light"]) <= 0.1, 70 <= change["quality"] <= 95
    (True, True)
    """
    # Everything is drawn in any case and in this order: one draw less would change the next.
    margins = generator.uniform(0, 0.025, 4) * [width, height, width, height]
    light = generator.uniform(-0.1, 0.1)
    contrast = generator.uniform(0, 0.15)
    colour = generator.uniform(0, 0.2)
    quality = generator.integers(70, 96)

    box = [0, 0, int(width), int(height)]
    if may_crop:
        left, top, right, bottom = margins.astype(int).tolist()
        box = [left, top, int(width) - right, int(height) - bottom]
    return {
        "box": box,
        "light": round(light, 3),
        "contrast": round(contrast, 3),
        "colour": round(colour, 3),
        "quality": int(quality),
    }


def _change_images(
    frame: pd.DataFrame, number: int, seed: int, may_crop: Iterable[bool]
) -> pd.DataFrame:
    """A copy of `frame` in which every row shows its image in variant `number`.

    `may_crop` (n,): whether the image of each row may be cropped. The change is a function
    of (seed, number, image): it is the same in all rows that show the image.
    """
    widths = []
    heights = []
    image_paths = []
    pixel_hashes = []
    for row, row_may_crop in zip(frame.itertuples(), may_crop, strict=True):
        generator = seeded_generator(seed, number, row.pixel_hash)
        change = draw_image_change(generator, row.width, row.height, row_may_crop)
        left, top, right, bottom = change["box"]
        recipe = json.dumps(change)
        widths.append(right - left)
        heights.append(bottom - top)
        image_paths.append(f"{row.image_path}{VARIANT_MARK}{recipe}")
        pixel_hashes.append(f"{row.pixel_hash} {recipe}")
    return frame.assign(
        width=widths,
        height=heights,
        variant=number,
        image_path=image_paths,
        pixel_hash=pixel_hashes,
    )


def image_variants(frame: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """`frame`, then `count` copies of it that show mildly changed images.

    The new column `variant` is 0 in the rows of `frame`, then the number of the copy.
    image_path and pixel_hash end in the change as JSON: `load_image` makes the changed
    image from it. width and height (pixels) are those of the changed image.

    A change is a function of (seed, number, image). It never turns or flips an image or
    changes a hue, and it never crops an image that any of its questions reads text from.
    """
    asks_for_text = frame["type"] == "ocr"
    is_read = asks_for_text.groupby(frame["pixel_hash"]).transform("any")
    variants = [frame.assign(variant=0)]
    for number in range(1, count + 1):
        variants.append(_change_images(frame, number, seed, may_crop=~is_read))
    return pd.concat(variants, ignore_index=True)


# ======= 3. Model =================================================================================


# === Patch grids ==================================================================================
def resized_size(width: int, height: int, processor, budget: tuple[int, int]) -> tuple[int, int]:
    """(width, height) to which an image of that size in pixels is resized for the model.

    `budget` is (min_pixels, max_pixels). The aspect ratio is kept, but for the rounding
    to whole image tokens. Each side has at least one, also where that costs the ratio:
    smart_resize gives long strips at small budgets a side of zero, and takes no longer ones.

    >>> qwen = SimpleNamespace(image_processor=SimpleNamespace(patch_size=16, merge_size=2))
    >>> resized_size(640, 320, qwen, budget=(4096, 786432))
    (640, 320)
    >>> resized_size(3000, 2, qwen, budget=(1024, 4096))
    (128, 32)
    """
    images = processor.image_processor
    token_side = images.patch_size * images.merge_size
    min_pixels, max_pixels = budget
    least_side = math.ceil(max(width, height) / vision_process.MAX_RATIO)
    new_height, new_width = vision_process.smart_resize(
        max(height, least_side),
        max(width, least_side),
        factor=token_side,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )
    if 0 in (new_height, new_width):
        longest = max(max_pixels // token_side**2, 1) * token_side
        new_height = min(max(new_height, token_side), longest)
        new_width = min(max(new_width, token_side), longest)
    return new_width, new_height


def _resize_by_vision_process(image, processor, budget: tuple[int, int]) -> list:
    """The image in a list, resized as the family's own package does it."""
    min_pixels, max_pixels = budget
    content = {
        "type": "image",
        "image": image,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
    }
    resized, _ = vision_process.process_vision_info(
        [{"role": "user", "content": [content]}],
        image_patch_size=processor.image_processor.patch_size,
    )
    return resized


class PatchGrids:
    """Qwen's images: a grid of patches of any shape, and positions in three dimensions.

    A grid is (1, rows, columns), in patches; merge_size times merge_size of them are one token.
    """

    # Classes of processors that prepare images so.
    processors = ("Qwen2_5_VLProcessor", "Qwen3VLProcessor")
    without_mask = {}  # without a mask the language model asks nothing on the GPU

    def pixels_per_token(self, processor) -> int:
        """Pixels that become one image token: (patch size x merge size) squared."""
        images = processor.image_processor
        return (images.patch_size * images.merge_size) ** 2

    def grid(
        self, width: int, height: int, processor, budget: tuple[int, int]
    ) -> tuple[int, int, int]:
        """The grid of an image of that size in pixels.

        The aspect ratio is kept, but for the rounding to whole image tokens.
        """
        patch_size = processor.image_processor.patch_size
        resized_width, resized_height = resized_size(width, height, processor, budget)
        return 1, resized_height // patch_size, resized_width // patch_size

    def token_count(self, grid: tuple[int, int, int], processor) -> int:
        """Image tokens of a grid."""
        return math.prod(grid) // processor.image_processor.merge_size**2

    def budget_in_words(self, processor, budget: tuple[int, int]) -> str:
        """How many tokens an image takes at most."""
        area = self.pixels_per_token(processor)
        side = math.isqrt(area)
        return f"an image takes at most {budget[1] // area} tokens of {side} x {side} pixels"

    def text(self, processor, count: int) -> str:
        """What stands in the prompt for an image of `count` tokens."""
        return processor.image_token * count

    def prepare(self, image, processor, budget: tuple[int, int]):
        """(pixel_values (patches, values), grid) of a PIL image.

        The image is resized once; the processor does not resize it again.
        """
        size = resized_size(image.width, image.height, processor, budget)
        if min(size) ** 2 == self.pixels_per_token(processor):
            # A strip, of which process_vision_info may leave nothing.
            resized = [image.resize(size)]
        else:
            resized = _resize_by_vision_process(image, processor, budget)
        inputs = processor.image_processor(images=resized, do_resize=False, return_tensors="pt")
        grid = tuple(inputs["image_grid_thw"][0].tolist())
        return inputs["pixel_values"], grid

    def positions(self, model, input_ids, grid: tuple[int, int, int]) -> np.ndarray:
        """The model's positions (3, length) in time, height and width; `input_ids` (1, length)."""
        inputs = self.model_inputs(model.config.image_token_id, input_ids, [grid])
        outputs = model.model.get_rope_index(input_ids=input_ids, **inputs)
        positions = outputs[0]  # (3, 1, length)
        return positions[:, 0].numpy()

    def model_inputs(self, image_token_id: int, input_ids, grids: Sequence) -> dict:
        """What the model takes beside tokens, mask and positions; `input_ids` (batch, length)."""
        return {
            "mm_token_type_ids": (input_ids == image_token_id).int(),  # (batch, length)
            "image_grid_thw": torch.tensor(grids),  # (images, 3)
        }

    def features(self, model, pixels, grids: Sequence) -> list[tuple]:
        """Features of each image: (tokens, hidden), and one more of each DeepStack layer.

        pixels: (patches of all images, values), on the device.
        """
        grid_tensor = torch.tensor(grids, device=pixels.device)
        output = model.get_image_features(pixels, grid_tensor, return_dict=True)
        deepstack_layers = getattr(output, "deepstack_features", None) or []
        return list(zip(output.pooler_output, *deepstack_layers, strict=True))

    def encoder_outputs(self, layers: Sequence[list]) -> SimpleNamespace:
        """What `mm_encoder_outputs["image"]` takes, from features by [layer][image]."""
        return SimpleNamespace(pooler_output=layers[0], deepstack_features=layers[1:])

    def remove_gpu_syncs(self, model) -> None:
        """Replace the two places of the forward pass at which the CPU would wait for the GPU."""
        token_ids = (model.config.image_token_id, model.config.video_token_id)
        language_model = model.model.language_model

        # It need not count the image tokens: `answer_hidden_states` does, on the CPU.
        def get_placeholder_mask(input_ids, *_, **__):
            return tuple((input_ids == token_id)[..., None] for token_id in token_ids)

        def add_deepstack(hidden_states, visual_pos_masks, visual_embeds):
            embeds = visual_embeds.to(hidden_states)
            mask = visual_pos_masks.to(hidden_states.device)[..., None]
            return hidden_states + torch.zeros_like(hidden_states).masked_scatter(mask, embeds)

        model.model.get_placeholder_mask = get_placeholder_mask
        if hasattr(language_model, "_deepstack_process"):
            language_model._deepstack_process = add_deepstack


PATCH_GRIDS = PatchGrids()


# === Tiles ========================================================================================
def tiles_within(pixels: int, tile_pixels: int) -> int:
    """How many tiles of an image fit into `pixels` beside its thumbnail; at least one.

    A single tile shows the whole image, and has no thumbnail.

    >>> [tiles_within(count * 448**2, 448**2) for count in (1, 2, 3, 4)]
    [1, 1, 2, 3]
    """
    return max(1, pixels // tile_pixels - 1)


class Tiles:
    """InternVL's images: tiles of one size, a thumbnail beside several, and plain positions.

    A grid is (tiles,), the thumbnail among them; each takes as many tokens.
    """

    # Classes of processors that prepare images so.
    processors = ("InternVLProcessor",)
    # A mask that says nothing. Without any, the language model would ask on the GPU whether the
    # positions are those of several texts behind each other.
    without_mask = {"attention_mask": {"full_attention": None}}

    def tile_pixels(self, processor) -> int:
        """Pixels of a tile."""
        size = processor.image_processor.size
        return size["height"] * size["width"]

    def pixels_per_token(self, processor) -> int:
        """Pixels that become one image token."""
        return self.tile_pixels(processor) // processor.image_seq_length

    def tiling(self, processor, budget: tuple[int, int]) -> dict:
        """How the processor is to cut images: within the budget and its own bounds.

        `budget` is (min_pixels, max_pixels) of all tiles, the thumbnail counted.
        """
        images = processor.image_processor
        tile_pixels = self.tile_pixels(processor)
        min_pixels, max_pixels = budget
        most = min(tiles_within(max_pixels, tile_pixels), images.max_patches)
        least = max(tiles_within(min_pixels, tile_pixels), images.min_patches)
        return {
            "crop_to_patches": True,
            "min_patches": min(least, most),
            "max_patches": most,
        }

    def grid(self, width: int, height: int, processor, budget: tuple[int, int]) -> tuple[int]:
        """The grid of an image of that size in pixels.

        The tiles are laid out as its aspect ratio wants it, however small the image is.
        """
        images = processor.image_processor
        tiling = self.tiling(processor, budget)
        return (images.get_number_of_image_patches(height, width, tiling),)

    def token_count(self, grid: tuple[int], processor) -> int:
        """Image tokens of a grid."""
        return grid[0] * processor.image_seq_length

    def budget_in_words(self, processor, budget: tuple[int, int]) -> str:
        """How many tiles and tokens an image takes at most."""
        tiles = self.tiling(processor, budget)["max_patches"]
        count = "1 tile"
        if tiles > 1:
            tiles += 1
            count = f"{tiles} tiles with the thumbnail"
        tokens = tiles * processor.image_seq_length
        text = f"an image takes at most {tokens} tokens, {count}"
        pixels = self.tile_pixels(processor)
        if pixels > budget[1]:
            text += f"; max_pixels={budget[1]} is less than a tile, {pixels}"
        return text

    def text(self, processor, count: int) -> str:
        """What stands in the prompt for an image of `count` tokens."""
        tokens = processor.image_token * count
        return f"{processor.start_image_token}{tokens}{processor.end_image_token}"

    def prepare(self, image, processor, budget: tuple[int, int]):
        """(pixel_values (tiles, 3, height, width), grid) of a PIL image."""
        tiling = self.tiling(processor, budget)
        inputs = processor.image_processor(images=[image], **tiling, return_tensors="pt")
        return inputs["pixel_values"], (len(inputs["pixel_values"]),)

    def positions(self, model, input_ids, grid: tuple[int]) -> np.ndarray:
        """The model's positions (1, length): it counts image tokens like others."""
        return np.arange(input_ids.shape[1])[None]

    def model_inputs(self, image_token_id: int, input_ids, grids: Sequence) -> dict:
        """What the model takes beside tokens, mask and positions: nothing."""
        return {}

    def features(self, model, pixels, grids: Sequence) -> list[tuple]:
        """Features of each image: (tiles, tokens of a tile, hidden).

        pixels: (tiles of all images, 3, height, width), on the device.
        """
        output = model.get_image_features(pixels, return_dict=True)
        tile_counts = [tiles for (tiles,) in grids]
        return [(image,) for image in output.pooler_output.split(tile_counts)]

    def encoder_outputs(self, layers: Sequence[list]) -> SimpleNamespace:
        """What `mm_encoder_outputs["image"]` takes, from features by [0][image]."""
        return SimpleNamespace(pooler_output=torch.cat(layers[0]))

    def remove_gpu_syncs(self, model) -> None:
        """Replace the place of the forward pass at which the CPU would wait for the GPU."""
        image_token_id = model.config.image_token_id

        # It need not count the image tokens: `answer_hidden_states` does, on the CPU.
        def get_placeholder_mask(input_ids, *_, **__):
            return (input_ids == image_token_id)[..., None]

        model.model.get_placeholder_mask = get_placeholder_mask


TILES = Tiles()


# === Families =====================================================================================
@dataclass(frozen=True)
class Family:
    """What differs between families of models and cannot be read from the model itself."""

    # How images come in: tokens, pixel inputs, positions, features.
    images: PatchGrids | Tiles = PATCH_GRIDS
    # Names inside the model of what turns pixels into image features: it stays as it was
    # pretrained, in 16 bits, and rests on the CPU while the features are cached.
    vision_parts: tuple[str, ...] = ("visual",)
    # transformers' model_types of language models that it may have; None: it has one of its own.
    text_models: tuple[str, ...] | None = None
    # Name of the part of a decoder layer that reads one token after the other, where some
    # layers have one instead of attention: see the section Recurrent layers.
    recurrent_mixer: str | None = None
    is_compiled: bool = True  # torch.compile is used for its decoder layers
    # Regular expression for the parameters that hold all experts of a layer in one tensor.
    experts: str | None = None


# transformers' model_type -> what to know about it; all others are refused. One more takes
# - an entry here, with the names of its vision parts;
# - a class like PatchGrids or Tiles where its images come in neither way, named in `images`;
# - its names in LORA_TARGETS and `Session.decoder_layers` where the language model has others;
# - a twin in tests/twins.py, for which all of tests/test_3_families.py then runs;
# - `memory_costs` and `activation_bytes`, once its layers are measured;
# - its decoder layer in FRUGAL_LAYERS, where that computes what `frugal_forward` does.
FAMILIES = {
    "qwen2_5_vl": Family(),
    "qwen3_vl": Family(),
    # Which experts a token needs is known on the GPU only: nothing is gained by compiling.
    "qwen3_vl_moe": Family(
        is_compiled=False,
        experts=r"\.mlp\.experts\.(gate_up|down)_proj$",
    ),
    "qwen3_5": Family(recurrent_mixer="linear_attn"),
    "qwen3_5_moe": Family(
        recurrent_mixer="linear_attn",
        is_compiled=False,
        experts=r"\.mlp\.experts\.(gate_up|down)_proj$",
    ),
    "internvl": Family(
        images=TILES,
        vision_parts=("vision_tower", "multi_modal_projector"),
        text_models=("qwen2", "qwen3"),
    ),
}
# Other families that are often tried, and why they are refused.
REFUSED_FAMILIES = {
    "gemma3": (
        "image tokens see each other in both directions, and most layers only the last tokens of "
        "the sequence; the mask of choice orders behind one prefix has room for neither"
    ),
    "gemma4": (
        "most layers see only the last tokens of the sequence, and in its larger models image "
        "tokens see each other in both directions; the mask of choice orders behind one prefix "
        "has room for neither"
    ),
    "internvl_chat": (
        "it brings Python code of its own; take the repository of the same name that ends in -HF"
    ),
    "mllama": "it sees images by cross-attention: there are no image tokens to put features into",
    "paligemma": (
        "all tokens of a prompt see each other in both directions, so that choice orders cannot "
        "share a prefix"
    ),
}
# Projections of the language model's decoder layers and nothing else: the vision tower stays
# as it was pretrained, and so do the experts of a mixture, which are no linear layers. The
# expert that all tokens share is.
LORA_TARGETS = (
    r"(?:.*\.)?language_model\.layers\.\d+\."
    r"(?:self_attn\.(?:q|k|v|o)_proj|"
    r"mlp\.(?:shared_expert\.)?(?:gate|up|down)_proj|"
    r"linear_attn\.(?:in_proj_qkv|in_proj_z|out_proj))"
)
# Linear layers with one number a head or token: how fast a recurrent layer forgets, how strongly
# it writes, and how much the shared expert counts. An error of 4 bits there acts on a whole head
# or token, and all of a 27B take 34 MiB more in 16 bits. They are not trained either.
GATE_LAYERS = ("in_proj_a", "in_proj_b", "shared_expert_gate")
# Entries of a batch that the model's forward pass takes as they are; some families have fewer.
MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "image_grid_thw",
    "position_ids",
)


def image_inputs(processor) -> PatchGrids | Tiles:
    """How images come in, by the class of the model's processor; of an unknown one as Qwen's."""
    name = type(processor).__name__
    for family in FAMILIES.values():
        if name in family.images.processors:
            return family.images
    return PATCH_GRIDS


def vision_tower(model):
    """The modules of the model that turn pixels into image features, as one list of modules."""
    names = FAMILIES[model.config.model_type].vision_parts
    return torch.nn.ModuleList(model.get_submodule(f"model.{name}") for name in names)


def remove_gpu_syncs(model) -> None:
    """Replace those places of the forward pass at which the CPU would wait for the GPU.

    The sums stay the same.
    """
    FAMILIES[model.config.model_type].images.remove_gpu_syncs(model)


def _unquantised_modules() -> list[str]:
    """Names of the modules of all families that stay in 16 bits: vision parts, gates, the head."""
    names = []
    for family in FAMILIES.values():
        for part in family.vision_parts:
            names += [part, f"model.{part}"]
    return [*dict.fromkeys(names), *GATE_LAYERS, "lm_head"]


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
# Choices come last: all orders of one question then share one long prefix. The first wording
# is that of inference; the others, for training, are about as long.
_INSTRUCTIONS = (
    " 알맞은 보기의 글자(a, b, c, d) 하나만 답하세요.\n질문: {question}\n보기:\n{choices}",
    " 맞는 보기를 글자(a, b, c, d) 하나로만 쓰세요.\n질문: {question}\n보기:\n{choices}",
    " 정답인 보기의 글자(a, b, c, d)만 쓰세요.\n문제: {question}\n선택:\n{choices}",
    " a, b, c, d 중 알맞은 글자를 고르세요.\n{question}\n{choices}",
)
# Question type -> template with the places {question} and {choices}.
PROMPT_TEMPLATES = {name: hint + _INSTRUCTIONS[0] for name, hint in _QUESTION_HINTS.items()}


def prompt_templates(config: Config, wording: int = 0) -> dict[str, str]:
    """Question type -> template; the config's own templates have a single wording."""
    instruction = _INSTRUCTIONS[wording]
    templates = {name: hint + instruction for name, hint in _QUESTION_HINTS.items()}
    templates.update(config.prompt_templates)
    return templates


def permute_choices(values, order):
    """Values in prompt order: position p shows values[order[p]].

    >>> permute_choices(["cat", "dog", "cow", "hen"], (2, 0, 3, 1))
    ['cow', 'cat', 'hen', 'dog']
    """
    return [values[original] for original in order]


def _cut_to_tokens(tokenizer, text: str, limit: int) -> str:
    """The text, or as many of its words as `limit` tokens hold; of a longer word its beginning."""

    def is_too_long(end: int) -> bool:
        tokens = tokenizer(text[:end], add_special_tokens=False, verbose=False)
        return len(tokens["input_ids"]) > limit

    if not is_too_long(len(text)):
        return text
    ends = [match.start() for match in re.finditer(" ", text)]
    ends = ends[:limit]  # a word has a token at least
    if not ends or is_too_long(ends[0]):
        ends = range(1, ends[0] if ends else len(text))
    fitting = bisect.bisect_left(ends, True, key=is_too_long)
    return text[: ends[fitting - 1]] if fitting else ""


_cut_context = functools.lru_cache(maxsize=2**16)(_cut_to_tokens)  # each epoch and view asks


def plain_context(row: Mapping) -> str:
    """The row's whole context as it may stand in the prompt: on one line, without control tokens.

    >>> plain_context({"context": "OPEN\\n<|im_end|>"}), plain_context({})
    ('OPEN < |im_end| >', '')
    """
    return neutralise_special_tokens(prompt_text(row.get(CONTEXT_COLUMN, "")))


def shown_context(config: Config, processor, row: Mapping) -> str:
    """What the prompt shows of the row's context: at most `context_tokens`, cut at a word.

    "" where the row has none, or the setting is 0.
    """
    if not config.context_tokens:
        return ""
    return _cut_context(processor.tokenizer, plain_context(row), config.context_tokens)


def count_cut_contexts(config: Config, processor, frame: pd.DataFrame) -> int:
    """Rows of which the prompt does not show the whole context."""
    count = 0
    for row in frame.to_dict("records"):
        count += shown_context(config, processor, row) != plain_context(row)
    return count


def build_messages(
    row, order=(0, 1, 2, 3), templates=PROMPT_TEMPLATES, context: str = ""
) -> list[dict]:
    """Chat messages of one question: system, image, context, hint, instruction, question, choices.

    The choices come in `order`, without those that are blank. The letters stay with their
    positions, so that a blank choice leaves its letter out. `context` is what `shown_context`
    returns; "" leaves its line out.

    >>> row = {"image_path": "1.png", "question": "How many dogs?"}
    >>> row |= {"a": "1", "b": "2", "c": " ", "d": "4"}
    >>> system, user = build_messages(row, order=(3, 0, 1, 2))
    >>> user["content"][0]
    {'type': 'image', 'image': '1.png'}
    >>> user["content"][1]["text"].splitlines()[1:]
    ['질문: How many dogs?', '보기:', 'a. 4', 'b. 1', 'c. 2']
    """
    original_choices = [str(row[choice]) for choice in CHOICES]
    texts = [neutralise_special_tokens(prompt_text(text)) for text in original_choices]
    lines = []
    for letter, text in zip(CHOICES, permute_choices(texts, order), strict=True):
        if text:
            lines.append(f"{letter}. {text}")
    original_question = str(row["question"])
    question = neutralise_special_tokens(prompt_text(original_question))
    template = templates[question_type(original_question, original_choices)]
    text = template.format(question=question, choices="\n".join(lines))
    if context:
        text = f"참고 자료: {context}\n{text}"
    content = [
        {"type": "image", "image": row["image_path"]},
        {"type": "text", "text": text.strip()},  # chat templates may trim it, too
    ]
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": content},
    ]


# Ways to render a chat template, in the order in which they are tried: options for
# `apply_chat_template`. Each family of templates has its own switch for not thinking:
# `enable_thinking` Qwen3 to 3.8 and Nemotron 3, `thinking` Kimi K2, `reasoning_effort` Kimi K3.
_RENDERINGS = (
    {},
    {"enable_thinking": False},
    {"thinking": False},
    {"reasoning_effort": "none"},
)


def renderings_to_try(template: str) -> list[dict]:
    """The ways to render this chat template: as it is, then with each switch that it names.

    >>> renderings_to_try("{% if enable_thinking %}<think>{% endif %}")
    [{}, {'enable_thinking': False}]
    """
    ways = []
    for options in _RENDERINGS:
        if all(re.search(rf"\b{name}\b", template) for name in options):
            ways.append(options)
    return ways


def options_as_text(options: Mapping) -> str:
    """In words, how a chat template is rendered.

    >>> options_as_text({"enable_thinking": False}), options_as_text({})
    ('with enable_thinking=False', 'as it is')
    """
    if not options:
        return "as it is"
    values = [f"{name}={value!r}" for name, value in options.items()]
    return f"with {', '.join(values)}"


def _render_answered(processor, messages: list[dict], letter: str, options: Mapping) -> str:
    """The conversation in which the assistant has answered with that letter."""
    answered = [*messages, {"role": "assistant", "content": letter}]
    return processor.apply_chat_template(
        answered, tokenize=False, add_generation_prompt=False, **options
    )


def _rendering_problem(processor, messages: list[dict], options: Mapping) -> str:
    """How prompt and answered conversation differ when they are rendered so; "" if they agree.

    They agree where "prompt + letter" begins the answered conversation, for every letter.
    """
    try:
        prompt = processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **options
        )
        answered = [_render_answered(processor, messages, letter, options) for letter in CHOICES]
    except Exception as error:  # a template's own raise_exception, or a type that it cannot join
        return f"The template refuses to be rendered so: {error}"
    for letter, training_text in zip(CHOICES, answered, strict=True):
        if not training_text.startswith(prompt + letter):
            return f"--- inference prompt:\n{prompt}\n--- training text:\n{training_text}"
    return ""


def _example_messages() -> list[dict]:
    """Any question, to see how a chat template is rendered."""
    choices = {"a": "1", "b": "2", "c": "3", "d": "4"}
    return build_messages({"image_path": "1.png", "question": "몇 개인가요?", **choices})


@functools.lru_cache(maxsize=4)  # every prompt asks; a changed template is another key
def _find_options(processor, template: str) -> dict:
    """The first way to render `template`, the processor's, in which an example agrees, or {}."""
    messages = _example_messages()
    for options in renderings_to_try(template):
        if not _rendering_problem(processor, messages, options):
            return options
    return {}


def template_options(processor) -> dict:
    """Options for `apply_chat_template` with which prompt and training text agree.

    They are found by rendering, never by the model's name: the first way for which
    "prompt + letter" begins the answered conversation. A template that thinks by default is
    thus told not to, by whatever switch it has. {}: the template as it is, also where no way
    agrees; `check_template` then says so.
    """
    return dict(_find_options(processor, str(processor.chat_template)))


def render_prompt(processor, messages: list[dict]) -> str:
    """The chat prompt that ends where the answer's letter belongs.

    It is the one text for training and inference, rendered with `template_options`.
    """
    options = template_options(processor)
    return processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **options
    )


def _single_token_ids(processor, prompt: str, letter: str) -> tuple[int, ...]:
    """Ids of the letter's variants that are one token after `prompt`, the plain one first."""
    prompt_ids = processor.tokenizer(prompt)["input_ids"]
    variants = (letter, letter.upper(), f" {letter}")
    continued = [processor.tokenizer(prompt + variant)["input_ids"] for variant in variants]
    single = []
    for ids in continued:
        if ids[:-1] == prompt_ids:
            single.append(ids[-1])
    plain = continued[0]
    if not single or plain[-1] != single[0]:
        raise TemplateError(
            f"The letter {letter!r} is not one token after the prompt; token ids: {plain}"
        )
    return tuple(dict.fromkeys(single))


def choice_token_ids(processor, prompt: str) -> tuple[tuple[int, ...], ...]:
    """Ids of each letter's single-token variants (`a`, `A`, ` a`) after `prompt`.

    The plain letter's id comes first. Raises TemplateError where a plain letter is not one
    token, or where two letters share one.

    >>> characters = SimpleNamespace(
    ...     tokenizer=lambda text: {"input_ids": [ord(character) for character in text]}
    ... )
    >>> choice_token_ids(characters, "Answer: ")
    ((97, 65), (98, 66), (99, 67), (100, 68))
    """
    letter_token_ids = tuple(_single_token_ids(processor, prompt, letter) for letter in CHOICES)
    all_ids = list(itertools.chain.from_iterable(letter_token_ids))
    if len(set(all_ids)) != len(all_ids):
        shared = dict(zip(CHOICES, letter_token_ids, strict=True))
        raise TemplateError(f"Two letters share a token: {shared}")
    return letter_token_ids


def _explain_renderings(processor, messages: list[dict]) -> TemplateError:
    """The error that shows every way to render the template that was tried."""
    lines = [
        "The chat template puts something between the prompt and the answer, so that "
        "a model trained on one would be read at the other. Take a model whose template "
        "can leave thinking out: an Instruct model, or one with a switch for it.",
    ]
    for options in renderings_to_try(str(processor.chat_template)):
        problem = _rendering_problem(processor, messages, options)
        if problem:
            lines.append(f"Tried {options_as_text(options)}.\n{problem}")
    return TemplateError("\n".join(lines))


def check_template(processor, messages: list[dict]) -> tuple[tuple[int, ...], ...]:
    """The letters' token ids, of a template that training and inference can share.

    Raises TemplateError, with both texts of every way to render it, unless "prompt + letter"
    begins the text of the conversation in which the assistant has answered with that letter,
    and where the template leaves out the question.
    """
    options = template_options(processor)
    if _rendering_problem(processor, messages, options):
        raise _explain_renderings(processor, messages)
    prompt = render_prompt(processor, messages)
    question = messages[-1]["content"][-1]["text"]
    if question not in prompt:
        raise TemplateError(
            "The chat template leaves out the user's text or changes it, as templates for text "
            "alone do. Take a model for images with its own template.\n"
            f"--- text:\n{question}\n--- inference prompt:\n{prompt}"
        )
    return choice_token_ids(processor, prompt)


# === Stored formats ===============================================================================
def stored_quantization(model_config) -> dict:
    """What a model's config.json says about weights that are quantised already.

    Empty where they are not. `model_config`: as AutoConfig reads it, or that of a loaded model,
    whose own way of quantising counts.
    """
    for part in (model_config, model_config.get_text_config()):
        stored = getattr(part, "quantization_config", None)
        if isinstance(stored, Mapping):
            return dict(stored)
        if stored is not None:
            return stored.to_dict()
    return {}


def is_stored_in_nf4(stored: Mapping) -> bool:
    """Whether a quantization_config means bitsandbytes' 4-bit NF4.

    >>> is_stored_in_nf4({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    True
    >>> is_stored_in_nf4({"load_in_4bit": True})  # bitsandbytes' default is FP4
    False
    """
    return bool(stored.get("load_in_4bit")) and stored.get("bnb_4bit_quant_type") == "nf4"


def is_left_unquantised(name: str, stored: Mapping) -> bool:
    """Whether a quantization_config lists this layer, or a module around it, as an exception.

    The lists have names of several versions; what they agree in is what follows `layers`.

    >>> stored = {"llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp"]}
    >>> is_left_unquantised("model.language_model.layers.0.mlp.up_proj", stored)
    True
    >>> is_left_unquantised("model.language_model.layers.10.mlp.up_proj", stored)
    False
    """
    for exception in stored.get("llm_int8_skip_modules") or ():
        ending = re.sub(r"^(?:model\.|language_model\.)+", "", exception)
        if f".{ending}." in f".{name}.":
            return True
    return False


def stored_format_in_words(stored: Mapping) -> str:
    """What a quantization_config means, in words.

    >>> stored_format_in_words({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    'bitsandbytes 4-bit NF4'
    >>> stored_format_in_words({"quant_method": "awq", "bits": 4})
    'awq'
    >>> stored_format_in_words({"bits": 4})
    'an unnamed format'
    >>> stored_format_in_words({})
    'not quantised'
    """
    if not stored:
        return "not quantised"
    if is_stored_in_nf4(stored):
        double = " with double quantisation" if stored.get("bnb_4bit_use_double_quant") else ""
        return f"bitsandbytes 4-bit NF4{double}"
    if stored.get("load_in_4bit"):
        return "bitsandbytes 4-bit FP4"
    if stored.get("load_in_8bit"):
        return "bitsandbytes 8-bit"
    return stored.get("quant_method", "an unnamed format")


def check_stored_format(config: Config, model_config) -> None:
    """ValueError, with what to set or take instead, unless these settings can use the checkpoint.

    Quantised checkpoints are used in two formats: bitsandbytes' NF4 with quantization "4bit",
    and fp8, unpacked to 16 bits, with "none".
    """
    stored = stored_quantization(model_config)
    if not stored:
        return
    words = stored_format_in_words(stored)
    is_nf4 = is_stored_in_nf4(stored)
    problem = f"{config.model_path} is stored in {words} already"
    if not is_nf4 and words != "fp8":
        raise ValueError(
            f"{problem}, which cannot be trained here: set model_id to the 16-bit original, or to "
            "a copy of it in bitsandbytes 4-bit NF4"
        )
    needed = "4bit" if is_nf4 else "none"
    if config.quantization != needed:
        raise ValueError(
            f"{problem}: set quantization={needed!r} instead of {config.quantization!r}, or set "
            "model_id to the 16-bit original"
        )
    if is_nf4 and FAMILIES[model_config.model_type].experts:
        raise ValueError(
            f"{problem}, but for its experts, which take 16 bits there: set model_id to the "
            "16-bit original, whose experts are quantised, too, while they are loaded"
        )
    LOGGER.info("Decision: %s: it is not quantised again", problem)


def _plain_linear(layer, dtype):
    """An unquantised layer with the weight and bias of bitsandbytes' 4-bit `layer`."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        weight = bnb_functional.dequantize_4bit(weight.data, state)
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    plain.bias = layer.bias
    if hasattr(layer, "_hf_hook"):  # on several GPUs it fetches the inputs
        accelerate_hooks.add_hook_to_module(plain, layer._hf_hook)
    return plain


def unpack_all_but_the_language_model(model, dtype) -> None:
    """Make a model that was stored in 4 bits like one that was quantised while loading.

    Its vision tower and its head become unquantised; so do layers that the checkpoint holds in
    16 bits, although its list of exceptions does not say so under their present names. What is
    not packed gets `dtype`, and so does what is unpacked for a product.
    """
    head = model.get_output_embeddings()
    family = FAMILIES[model.config.model_type]
    tower_names = tuple(f"model.{part}." for part in family.vision_parts)
    unpacked = []
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, bnb_nn.Linear4bit):
            continue
        state = getattr(layer.weight, "quant_state", None)
        if state is not None:
            state.dtype = dtype
        elif not layer.weight.is_floating_point():
            raise RuntimeError(
                f"The checkpoint holds the 4-bit weight of {name} without its scales: "
                "download it again, or set model_id to the 16-bit original"
            )
        in_tower = name.startswith(tower_names)
        if state is None or in_tower or layer is head:
            model.set_submodule(name, _plain_linear(layer, dtype))
            unpacked.append(name)
    for parameter in model.parameters():
        # Loading leaves it in the checkpoint's format.
        if parameter.is_floating_point() and not isinstance(parameter, bnb_nn.Params4bit):
            parameter.data = parameter.data.to(dtype)
    if unpacked:
        LOGGER.info(
            "Decision: %d layers such as %s are used unquantised: they belong to the vision "
            "tower or the head, or are stored so",
            len(unpacked),
            unpacked[0],
        )


# === Models over several GPUs =====================================================================
def _bytes_by_place(model, config: Config, number_bytes: int) -> dict[str, float]:
    """Name of a module -> bytes of its weights when loaded, in the order in which they are used.

    Decoder layers are not taken apart; `model` may have shapes only.
    """
    of_matrices = {"4bit": 0.52, "8bit": 1, "none": number_bytes}[config.quantization]
    language = model.model.language_model
    before = {}
    for name, module in model.model.named_children():
        if module is not language:
            before[f"model.{name}"] = module
    layers = {}
    behind = {}
    for name, module in language.named_children():
        if name == "layers":
            for number, layer in enumerate(module):
                layers[f"model.language_model.layers.{number}"] = layer
        elif name == "norm":
            behind[f"model.language_model.{name}"] = module
        else:
            before[f"model.language_model.{name}"] = module
    head = model.get_output_embeddings()
    is_tied = head.weight is model.get_input_embeddings().weight
    (before if is_tied else behind)["lm_head"] = head
    sizes = {}
    for name, module in {**before, **layers, **behind}.items():
        sizes[name] = 0.0
        for parameter in module.parameters():
            is_quantised = name in layers and parameter.dim() > 1
            sizes[name] += parameter.numel() * (of_matrices if is_quantised else number_bytes)
    return sizes


def spread_over_gpus(model, config: Config, number_bytes: int, gpus: Sequence[Mapping]) -> dict:
    """Name of a module -> number of its GPU, each with about the same bytes of weights.

    `model` may have shapes only; `number_bytes`: of an unquantised number; `gpus`: as in
    `Runtime`. transformers' own map counts less of each GPU as free, and would put layers of the
    35B on the CPU beside two T4s. Raises RuntimeError where a GPU has too little memory.
    """
    sizes = _bytes_by_place(model, config, number_bytes)
    share = sum(sizes.values()) / len(gpus)
    places = {}
    used = [0.0] * len(gpus)
    done = 0.0
    for name, size in sizes.items():
        middle = done + size / 2
        number = min(len(gpus) - 1, int(middle / share))
        places[name] = number
        used[number] += size
        done += size
    for number, gpu in enumerate(gpus):
        needed = used[number] / 2**30
        room = SPREAD_MEMORY_SHARE * gpu["memory_gib"]
        if needed > room:
            raise RuntimeError(
                f"{config.model_id} does not fit into the GPUs: {needed:.1f} GiB of weights "
                f"for GPU {number}, which has {room:.1f} GiB for them; "
                "choose a smaller model_id, quantization='4bit' or larger GPUs"
            )
    return places


# === Loading ======================================================================================
def _attached_model_folders() -> list[str]:
    """Folders among the attached data that hold a model's config.json and safetensors."""
    folders = []
    for folder, _, files in walk_mounts():
        endings = {Path(name).suffix for name in files}
        if "config.json" in files and ".safetensors" in endings:
            folders.append(str(folder))
    return folders


def explain_missing_model(config: Config, cause: Exception) -> OSError:
    """The error about a model that was not loaded, with what to check.

    It names the model folders that are attached.
    """
    advice = "attach the model and give its folder"
    folders = _attached_model_folders()
    if folders:
        advice = f"set model_id (or VQA_MODEL) to one of {folders}"
    return OSError(
        f"{config.model_path} could not be loaded. Check the spelling of model_id, "
        f"the internet switch of the session (or {advice}), and the free disk space. "
        f"Cause: {cause}"
    )


def _refuse_python_code(model_path: str) -> None:
    """ValueError where a model's folder asks to run its own Python code."""
    # A hub id is no folder and has no such files: transformers refuses its code itself.
    for path in Path(model_path).glob("*.json"):
        if '"auto_map"' in path.read_text(encoding="utf-8"):
            raise ValueError(
                f"{path} asks to run Python code from that folder (auto_map): "
                "trust_remote_code=True?"
            )


def _check_family(config: Config) -> None:
    """ValueError where the model's family is not known here, with the reason if there is one."""
    settings, _ = transformers.PreTrainedConfig.get_config_dict(config.model_path)
    family = settings.get("model_type")
    if family in FAMILIES:
        return
    problem = f"{config.model_path} is of the family {family!r}"
    known = f"known are {', '.join(FAMILIES)}"
    if family in REFUSED_FAMILIES:
        raise ValueError(f"{problem}, which is refused: {REFUSED_FAMILIES[family]} ({known})")
    raise ValueError(f"{problem}; {known}")


def load_processor(config: Config):
    """The model's processor, padding on the left: the last position is every row's answer.

    Raises ValueError for an unknown family and for a folder with Python code of its own that
    the config does not trust, and OSError, with what to check, where there is no processor.
    """
    try:
        _check_family(config)
        if not config.trust_remote_code:
            _refuse_python_code(config.model_path)
        processor = transformers.AutoProcessor.from_pretrained(
            config.model_path,
            trust_remote_code=config.trust_remote_code,
        )
    except OSError as error:
        raise explain_missing_model(config, error) from error
    processor.tokenizer.padding_side = "left"
    return processor


def quantization_config(quantization: str, precision: str):
    """bitsandbytes settings for the language model, or None for "none".

    The vision tower, the head and `GATE_LAYERS` stay in 16 bits. 4-bit is NF4 with double
    quantisation (Dettmers et al. 2023, QLoRA); `precision` is that of the arithmetic.
    """
    if quantization == "none":
        return None
    return transformers.BitsAndBytesConfig(
        load_in_4bit=quantization == "4bit",
        load_in_8bit=quantization == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,  # quantises the scales too
        bnb_4bit_compute_dtype=getattr(torch, DTYPES[precision]),
        llm_int8_skip_modules=_unquantised_modules(),
    )


def _expert_quantizer_class(pattern: str, plain_quantizer: type) -> type:
    """A 4-bit quantizer of transformers that also takes parameters that match `pattern`."""

    class QuantiseExperts(bnb_loading.Bnb4bitQuantize):
        """Packs one parameter while it is loaded."""

        def convert(self, input_dict, **options):
            ((name, value),) = input_dict.items()
            if not re.search(pattern, name):
                return super().convert(input_dict, **options)
            if isinstance(value, list):
                value = value[0]
            packed, state = bnb_functional.quantize_4bit(
                value, compress_statistics=True, quant_type="nf4"
            )
            self.hf_quantizer.states[name] = state
            return {name: torch.nn.Parameter(packed, requires_grad=False)}

    class ExpertQuantizer(plain_quantizer):
        """Collects what is needed to unpack the experts, and gives it to their modules."""

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.states = {}  # parameter's name -> bitsandbytes' quantisation state

        def param_needs_quantization(self, model, param_name, **options) -> bool:
            is_expert = bool(re.search(pattern, param_name))
            return is_expert or super().param_needs_quantization(model, param_name)

        def get_quantize_ops(self):
            return QuantiseExperts(self)

        def _process_model_after_weight_loading(self, model, **options):
            for name, state in self.states.items():
                module_name, _, parameter_name = name.rpartition(".")
                bnb_parametrize.replace_parameter_4bit_prequantized(
                    model.get_submodule(module_name),
                    parameter_name,
                    state.as_dict(),
                    state.absmax.device,
                )
            return super()._process_model_after_weight_loading(model, **options)

    return ExpertQuantizer


@contextlib.contextmanager
def quantising_experts(pattern: str) -> Iterator[None]:
    """Let transformers load parameters that match `pattern` in 4-bit, too.

    By itself it takes linear layers only, and the experts of a mixture are none.
    """
    quantizers_by_name = quantizers.AUTO_QUANTIZER_MAPPING
    plain_quantizer = quantizers_by_name["bitsandbytes_4bit"]
    quantizers_by_name["bitsandbytes_4bit"] = _expert_quantizer_class(pattern, plain_quantizer)
    try:
        yield
    finally:
        quantizers_by_name["bitsandbytes_4bit"] = plain_quantizer


def _check_text_model(config: Config, model_config) -> None:
    """ValueError for a language model that the family's masks would not suit."""
    text = model_config.get_text_config()
    known = FAMILIES[model_config.model_type].text_models
    if known and text.model_type not in known:
        raise ValueError(
            f"{config.model_path} has a language model of the kind {text.model_type!r}; of the "
            f"family {model_config.model_type!r} known are those with {', '.join(known)}"
        )
    if "sliding_attention" in (getattr(text, "layer_types", None) or []):
        raise ValueError(
            f"{config.model_path} has layers that see only the last {text.sliding_window} tokens "
            "(sliding_attention in its config.json), and choice orders behind one prefix lie "
            "further apart: choose another model_id"
        )


def _read_model_config(config: Config):
    """The model's own config.json. Raises ValueError where its family is not known here."""
    _check_family(config)
    model_config = transformers.AutoConfig.from_pretrained(
        config.model_path,
        trust_remote_code=config.trust_remote_code,
    )
    _check_text_model(config, model_config)
    return model_config


def _loading_options(config: Config, runtime: Runtime) -> dict:
    """Options of from_pretrained: number format, attention, and one GPU, if there is any."""
    return {
        "dtype": getattr(torch, DTYPES[runtime.precision]),
        "attn_implementation": runtime.attention,
        "device_map": {"": 0} if runtime.gpus else None,
        "trust_remote_code": config.trust_remote_code,
        "use_safetensors": True,  # never a pickle
    }


def _quantization_options(config: Config, model_config, precision: str) -> dict:
    """Options of from_pretrained about quantisation: the checkpoint's own, ours, or none.

    Raises ValueError for a stored format that cannot be used with these settings.
    """
    stored = stored_quantization(model_config)
    check_stored_format(config, model_config)
    if is_stored_in_nf4(stored):
        # The arithmetic follows this card, not the one that the checkpoint was made on.
        stored["bnb_4bit_compute_dtype"] = DTYPES[precision]
        model_config.quantization_config = stored
        return {"config": model_config}
    if stored:
        # Also on cards with FP8: its kernels come from the hub, and LoRA would train through none.
        return {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}
    if config.quantization == "none":
        return {}
    return {"quantization_config": quantization_config(config.quantization, precision)}


def _check_weight_names(config: Config, report: Mapping) -> None:
    """RuntimeError for weights that are missing or not understood; a warning for extra ones.

    `report` is what from_pretrained returns with output_loading_info=True.
    """
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(map(str, report[kind]))
        if not names:
            continue
        problem = (
            f"{config.model_path} and its config.json differ: "
            f"{kind} {names[:3]} ({len(names)} in all)"
        )
        # A scale that nobody asked for: its weight was read as numbers without their scale.
        has_unused_scale = any("scale" in name or ".absmax" in name for name in names)
        if kind != "unexpected_keys" or has_unused_scale:
            raise RuntimeError(f"{problem}; download it again, or update transformers")
        LOGGER.warning("%s", problem)


def _load_model_once(config: Config, runtime: Runtime):
    """The model, loaded and checked; one attempt."""
    model_config = _read_model_config(config)
    options = _loading_options(config, runtime)
    if config.spread_model:
        with torch.device("meta"):
            shapes = transformers.AutoModelForImageTextToText.from_config(model_config)
        number_bytes = options["dtype"].itemsize
        options["device_map"] = spread_over_gpus(shapes, config, number_bytes, runtime.gpus)
    options.update(_quantization_options(config, model_config, runtime.precision))
    is_stored_in_4_bit = is_stored_in_nf4(stored_quantization(model_config))
    experts = FAMILIES[model_config.model_type].experts
    loading = contextlib.nullcontext()
    if experts and config.quantization == "4bit":
        loading = quantising_experts(experts)
    with loading:
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            config.model_path,
            **options,
            output_loading_info=True,
        )
    _check_weight_names(config, report)
    if is_stored_in_4_bit:
        unpack_all_but_the_language_model(model, options["dtype"])
    return model


def _adapted_shapes(model_config) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of a model's layers that get an adapter; no weight is loaded."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(model_config)
    shapes = {}
    for name, layer in model.named_modules():
        if re.fullmatch(LORA_TARGETS, name):
            shapes[name] = tuple(layer.weight.shape)
    return shapes


def _why_adapters_do_not_fit(trained, scoring) -> str:
    """What keeps an adapter that was trained on one model from another; "" where it fits.

    Both as AutoConfig reads their config.json.
    """
    if scoring.model_type != trained.model_type:
        return f"it is of the family {scoring.model_type!r} instead of {trained.model_type!r}"
    their_shapes = _adapted_shapes(scoring)
    for name, shape in _adapted_shapes(trained).items():
        if their_shapes.get(name) != shape:
            return f"its {name} has the shape {their_shapes.get(name)} instead of {shape}"
    return ""


def _check_score_prompts(config: Config) -> None:
    """ValueError where score_model_id would read other prompts than model_id is trained on."""
    base = config.rescoring
    trained = render_prompt(load_processor(config), _example_messages())
    scored = render_prompt(load_processor(base), _example_messages())
    if scored != trained:
        raise ValueError(
            f"score_model_id {base.model_path} has another chat template than {config.model_path}, "
            "and would score other prompts than those of training: give one of the two, in a "
            "folder, the chat template of the other, or set score_precision='trained'\n"
            f"--- training:\n{trained}\n--- scoring:\n{scored}"
        )


def check_score_model(config: Config) -> None:
    """Find out whether score_precision "16bit" has a model to score with, before hours of training.

    Raises ValueError where that model is quantised, where adapters do not fit it, or where its
    chat template gives other prompts, and OSError where a config.json cannot be read.
    """
    if config.score_precision != "16bit":
        return
    base = config.rescoring
    model_configs = {}
    for name, settings in {"model_id": config, "score_model_id": base}.items():
        try:
            model_configs[name] = _read_model_config(settings)
        except OSError as error:
            raise OSError(f"{name}: {explain_missing_model(settings, error)}") from error
    trained, scoring = model_configs.values()
    stored = stored_quantization(scoring)
    if stored and stored.get("quant_method") != "fp8":
        raise ValueError(
            f"score_precision '16bit' needs an unquantised model, and {base.model_path} is stored "
            f"in {stored_format_in_words(stored)}: set score_model_id to the 16-bit original of "
            f"{config.model_path}, or score_precision='trained'"
        )
    problem = _why_adapters_do_not_fit(trained, scoring)
    if problem:
        raise ValueError(
            f"score_model_id {base.model_path} does not fit adapters of {config.model_path}: "
            f"{problem}. Set score_model_id to the 16-bit original of {config.model_path}"
        )
    if config.score_model_id:
        _check_score_prompts(config)
    LOGGER.info("Decision: scoring in 16 bits uses %s", base.model_path)


def _refuse_quantisation_without_gpu(config: Config, runtime: Runtime) -> None:
    if config.quantization != "none" and not runtime.gpus:
        raise ValueError(
            f"quantization {config.quantization!r} needs a GPU; on a CPU set quantization='none'"
        )


def load_patiently(config: Config, load: Callable, attempts: int = 3):
    """What `load()` returns, tried again where a download breaks off.

    Raises after `attempts` an OSError that says what to do.
    """
    for attempt in range(attempts):
        time.sleep(2 * attempt)
        try:
            return load()
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


def load_model(config: Config, runtime: Runtime, attempts: int = 3):
    """The frozen base model on this process's GPU, its GPUs or the CPU.

    Raises ValueError for a family, quantisation or stored format that cannot be used
    here, RuntimeError for a checkpoint that is not whole or does not fit into the GPUs,
    and after `attempts` an OSError that says what to do.
    """
    _refuse_quantisation_without_gpu(config, runtime)
    check_score_model(config)
    model = load_patiently(config, lambda: _load_model_once(config, runtime), attempts)
    return model.requires_grad_(False).eval()


# === Downloads ====================================================================================
STALLED_SECONDS = 60  # without a byte, after which a download is said to be stalled


def hub_cache_folder(model_id: str) -> Path:
    """Where the hub's library keeps a model, by the variables that it reads itself."""
    cache = Path.home() / ".cache"
    if os.environ.get("XDG_CACHE_HOME"):
        cache = Path(os.environ["XDG_CACHE_HOME"])
    home = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    return hub.expanduser() / f"models--{model_id.replace('/', '--')}"


def _stored_bytes(path: Path) -> int:
    """Bytes of a file that are on the disk; 0 for one that has just been renamed.

    Some downloads set a file's size first and fill it later.
    """
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        blocks = getattr(status, "st_blocks", None)  # Windows does not tell
        return status.st_size if blocks is None else min(status.st_size, 512 * blocks)
    return 0


class DownloadWatch:
    """What arrives of a model in the hub's cache, while another process downloads it."""

    def __init__(self, model_path: str):
        self.model_path = model_path  # a hub id, or a local folder, of which nothing arrives
        self.folder = hub_cache_folder(model_path)
        self.began = time.time()
        self.arrived = 0  # bytes; by `line`, as everything below
        self.first_look: tuple[float, int] | None = None  # its time, and the bytes of then
        self.last_growth = time.monotonic()  # seconds of that clock, when `arrived` last grew
        self.has_warned = False  # that nothing arrives

    def total_bytes(self) -> int | None:
        """Bytes of all weights by their index, which arrives before them; None without one."""
        for path in self.folder.glob("snapshots/*/model.safetensors.index.json"):
            # Of an index that cannot be read the process that loads the model will speak.
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                return int(json.loads(path.read_text(encoding="utf-8"))["metadata"]["total_size"])
        return None

    def is_downloading(self) -> bool:
        """Whether a file of the model is being filled.

        One that has not grown since long before the watch began was left by an earlier session.
        """
        if Path(self.model_path).is_dir():
            return False
        oldest = self.began - STALLED_SECONDS
        for path in self.folder.glob("blobs/*.incomplete"):
            with contextlib.suppress(FileNotFoundError):  # it has just been renamed
                if path.stat().st_mtime >= oldest:
                    return True
        return False

    def line(self) -> str:
        """How much has arrived, and how fast; "" while nothing is being downloaded.

        A warning is logged, once, when no byte has come for STALLED_SECONDS.
        """
        now = time.monotonic()
        if not self.is_downloading():
            self.last_growth = now
            return ""
        arrived = sum(map(_stored_bytes, self.folder.glob("blobs/*")))
        if self.first_look is None:
            self.first_look = (now, arrived)
        if arrived != self.arrived:
            self.arrived = arrived
            self.last_growth = now
        silent_seconds = now - self.last_growth
        if silent_seconds >= STALLED_SECONDS:
            self._warn(silent_seconds)
            return f"{self._amount()}, no byte for {silent_seconds:.0f} s"
        first_time, first_bytes = self.first_look
        megabytes = (arrived - first_bytes) / 1e6
        speed = megabytes / max(now - first_time, 1)
        return f"{self._amount()}, {speed:.1f} MB/s"

    def _amount(self) -> str:
        total = self.total_bytes()
        of_total = f" of {total / 1e9:.2f}" if total else ""
        return f"downloading {self.model_path}: {self.arrived / 1e9:.2f}{of_total} GB"

    def _warn(self, silent_seconds: float) -> None:
        if self.has_warned:
            return
        self.has_warned = True
        LOGGER.warning(
            "No byte of %s has arrived for %.0f s. If this goes on, interrupt the cell, put "
            "os.environ['HF_HUB_DISABLE_XET'] = '1' into a cell above it and run it again: what "
            "has arrived is kept. Or do without the hub: see 'Without internet' in the README.",
            self.model_path,
            silent_seconds,
        )


# === Adapters =====================================================================================
def trainable_parameters(model) -> dict:
    """Name -> parameter of everything the optimizer may change."""
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def attach_lora(model, config: Config, seed: int):
    """`model` with a fresh LoRA adapter (Hu et al. 2021), a function of `seed`.

    With `use_rslora` its update is scaled as by Kalajdzievski (2023, rank-stabilised LoRA).
    Asserts that its weights are fp32 and outside the vision tower.
    """
    torch.manual_seed(seed)
    lora_config = peft.LoraConfig(
        target_modules=LORA_TARGETS,
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        lora_dropout=config.lora_dropout,
    )
    adapted = peft.get_peft_model(model, lora_config)
    trainable = trainable_parameters(adapted)
    parts = FAMILIES[model.config.model_type].vision_parts
    wrong = []
    for name, parameter in trainable.items():
        is_vision = any(f".{part}." in name for part in parts)
        if is_vision or parameter.dtype != torch.float32:
            wrong.append(name)
    assert trainable and not wrong, (
        f"LoRA weights must be fp32 and outside the vision tower, unlike {wrong[:3]}"
    )
    return adapted


def load_adapter(model, folder: Path):
    """The base model with a saved adapter.

    Raises CheckpointError unless every stored weight arrived unchanged.
    """
    adapted = peft.PeftModel.from_pretrained(model, str(folder))
    stored = safetensors_torch.load_file(folder / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(adapted)
    differing = []
    for name, weight in stored.items():
        if name not in loaded or not torch.equal(weight, loaded[name].cpu()):
            differing.append(name)
    in_one_only = set(loaded) ^ set(stored)
    if differing or in_one_only:
        shown = differing[:3] or sorted(in_one_only)[:3]
        settings = read_json(folder / "adapter_config.json")
        saved = {"peft": settings["peft_version"]} if "peft_version" in settings else {}
        remedy = "delete that folder and run again to make it anew"
        raise CheckpointError(
            f"{folder} was not loaded completely: {shown}; {_other_versions(saved, remedy)}"
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
    """Pixels that become one image token.

    >>> merged_patch_area(
    ...     SimpleNamespace(image_processor=SimpleNamespace(patch_size=14, merge_size=2))
    ... )
    784
    """
    return image_inputs(processor).pixels_per_token(processor)


def pixel_budget(config: Config, processor, scale: float = 1.0) -> tuple[int, int]:
    """(min_pixels, max_pixels) of one view; the only place where the budget is decided.

    `scale` multiplies max_pixels, which is never less than one image token takes.

    >>> qwen = SimpleNamespace(image_processor=SimpleNamespace(patch_size=16, merge_size=2))
    >>> pixel_budget(Config(image_size=448), qwen)
    (4096, 200704)
    """
    area = merged_patch_area(processor)
    max_pixels = config.max_pixels or 768 * area
    if config.image_size:
        max_pixels = config.image_size**2
    max_pixels = max(int(max_pixels * scale), area)
    min_pixels = min(config.min_pixels or 4 * area, max_pixels)
    return min_pixels, max_pixels


def image_grid(width: int, height: int, processor, budget: tuple[int, int]) -> tuple[int, ...]:
    """The grid, in the family's own way, of an image of that size in pixels.

    `budget` is (min_pixels, max_pixels). Images of equal grids look alike to the model.

    >>> qwen = SimpleNamespace(image_processor=SimpleNamespace(patch_size=16, merge_size=2))
    >>> image_grid(640, 320, qwen, budget=(4096, 786432))
    (1, 20, 40)
    """
    return image_inputs(processor).grid(width, height, processor, budget)


def grid_tokens(grid: tuple[int, ...], processor) -> int:
    """How many image tokens an image of that grid takes.

    >>> qwen = SimpleNamespace(image_processor=SimpleNamespace(patch_size=16, merge_size=2))
    >>> grid_tokens((1, 20, 40), qwen)
    200
    """
    return image_inputs(processor).token_count(grid, processor)


def prepare_image(image, processor, budget: tuple[int, int]):
    """(pixel values, grid) of a PIL image, as the model's own processor makes them."""
    return image_inputs(processor).prepare(image, processor, budget)


def place_image_tokens(processor, prompt: str, count: int) -> str:
    """The prompt whose placeholder of the image has become `count` image tokens."""
    tokens = image_inputs(processor).text(processor, count)
    return prompt.replace(processor.image_token, tokens, 1)


def encode_prompt(processor, messages: list[dict], grid: tuple[int, ...]) -> np.ndarray:
    """Token ids (length,) of a prompt whose image takes `grid`.

    They are what the processor returns, without the work on the pixels.
    """
    prompt = render_prompt(processor, messages)
    text = place_image_tokens(processor, prompt, grid_tokens(grid, processor))
    return np.array(processor.tokenizer(text)["input_ids"])


# === Vision cache =================================================================================
# What the features of an image are stored under: its pixel_hash, min_pixels, max_pixels.
ImageKey = tuple[str, int, int]


@dataclass(frozen=True, order=True)
class ShardEntry:
    """Where on disk the features of one image lie."""

    path: Path  # the shard: a safetensors file, named by the hash of its content
    # Of the image in the shard, from 0. Image 3 has the tensors "3.00", "3.01", ...
    number: int


@dataclass(frozen=True)
class _ImageBatch:
    """Images that go through the vision tower together."""

    keys: list[ImageKey]  # of each image
    paths: list[str]  # image_path of each image


def _image_batches(
    frame: pd.DataFrame,
    budget: tuple[int, int],
    batch_size: int,
) -> list[_ImageBatch]:
    """All images of `frame`, each once, in batches of at most `batch_size`.

    The last bits of a feature may depend on its batch. So the batches are fixed:
    they depend neither on where an earlier process stopped nor on other variants.
    """
    rows = frame.drop_duplicates("pixel_hash")
    # Images of one size lie beside each other.
    rows = rows.sort_values(["height", "width", "pixel_hash"])
    variant_of_row = rows.get("variant", pd.Series(0, rows.index))
    batches = []
    for _, variant in rows.groupby(variant_of_row, sort=True):
        keys = [(pixel_hash, *budget) for pixel_hash in variant["pixel_hash"]]
        paths = variant["image_path"].tolist()
        for start in range(0, len(keys), batch_size):
            end = start + batch_size
            batches.append(_ImageBatch(keys[start:end], paths[start:end]))
    return batches


def _map_features(function: Callable, features: Iterable[tuple]) -> list[tuple]:
    """The features with `function` applied to every tensor of every image."""
    return [tuple(map(function, image)) for image in features]


def vision_cache_place(cache_dir: str | None) -> Path:
    """The folder in which each vision tower has its cache; it need not exist.

    `cache_dir` is the setting; without it a folder for temporary files.
    """
    if cache_dir:
        return Path(cache_dir)
    user = os.getuid() if hasattr(os, "getuid") else 0  # Windows has no such number
    return Path(tempfile.gettempdir()) / f"vqa_features_{user}"


def _is_cache_file(path: Path) -> bool:
    """Whether a file in `vision_cache_place` is one that this module wrote."""
    name = path.name.removeprefix(".")  # an unfinished one begins with a dot
    is_shard = re.match(r"[0-9a-f]{64}\.safetensors", name) is not None
    is_in_a_cache = re.fullmatch(r"[0-9a-f]{16}", path.parent.name) is not None
    return is_in_a_cache and (is_shard or name == "lock")


def vision_cache_files(cache_dir: str | None) -> list[Path]:
    """The files of all vision caches in that place, of this run and of others."""
    files = sorted(vision_cache_place(cache_dir).glob("*/*"))
    return [path for path in files if path.is_file() and _is_cache_file(path)]


def _size_as_text(files: Sequence[Path]) -> str:
    size = sum(path.stat().st_size for path in files) / 2**30
    return f"{size:.2f} GiB in {len(files)} files"


def describe_vision_cache(config: Config) -> str:
    """Where the cached vision features lie and how large they are, in words."""
    size = _size_as_text(vision_cache_files(config.cache_dir))
    return f"vision cache: {vision_cache_place(config.cache_dir)}, {size}"


def delete_vision_cache(config: Config) -> str:
    """Delete the cached vision features of this run and of others in its place; what went.

    They are computed again where they are needed. Files that this module has not written stay.
    Raises CheckpointError, and deletes nothing of that cache, while a worker fills it.
    """
    files = vision_cache_files(config.cache_dir)
    text = f"deleted {_size_as_text(files)} in {vision_cache_place(config.cache_dir)}"
    for folder in sorted({path.parent for path in files}):
        try:
            lock = filelock.FileLock(folder / "lock", timeout=0)
            with lock:
                for path in files:
                    if path.parent == folder and path.name != "lock":
                        path.unlink()
        except filelock.Timeout as error:
            raise CheckpointError(
                f"{folder}: a worker fills this vision cache; wait for it, or stop it"
            ) from error
        (folder / "lock").unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
    LOGGER.info("Vision cache: %s", text)
    return text


class VisionCache:
    """Features of the frozen vision tower, once per image and pixel budget.

    They lie on disk, where later processes find them, or in RAM. The features of one
    image are a tuple of tensors: (tokens, hidden), or (tiles, tokens, hidden), and for a
    model with DeepStack one of the same shape for each of its layers.
    """

    def __init__(self, model, processor, cache_dir: str | None = None):
        self.model = model  # the base model, with its vision tower
        self.processor = processor  # the model's
        self.images = FAMILIES[model.config.model_type].images  # how they come into the model
        self.device = model.device  # where features are computed and used
        # Of the shards; `fill` makes it.
        self.folder = vision_cache_place(cache_dir) / self.folder_hash()
        # Where the features of each image on disk lie; filled by `register_shard`.
        self.shards: dict[ImageKey, ShardEntry] = {}
        # Features, on the CPU, where the disk is too small; filled by `add`.
        self.features_in_memory: dict[ImageKey, tuple] = {}
        # Images whose features overflowed; counted by `compute_features`, set back to 0 by
        # `write_notes`.
        self.recomputed_in_fp32 = 0

    def folder_hash(self) -> str:
        """The hash that names the cache folder: 16 hexadecimal digits.

        It covers what features depend on besides image and budget: the tower's
        weights, the processor's settings, torch's version and the kind of device.
        """
        settings = self.processor.image_processor.to_json_string()
        environment = f"{settings} {torch.__version__} {self.device.type}"
        digest = hashlib.sha256(environment.encode())
        for weight in self.vision_tower.state_dict().values():
            digest.update(weight.cpu().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    @property
    def vision_tower(self):
        """The model's vision tower: on the device, or on the CPU after `offload_tower`."""
        return vision_tower(self.model)

    def offload_tower(self) -> None:
        """Move the tower to the CPU until it is needed: activations get its memory."""
        self.vision_tower.to("cpu")

    def has_all(self, keys: Iterable[ImageKey]) -> bool:
        """Whether the features of all these images are known to this process."""
        return all(key in self.shards or key in self.features_in_memory for key in keys)

    def fill(
        self,
        frame: pd.DataFrame,
        budget: tuple[int, int],
        progress: Callable,
        batch_size: int = 16,
    ) -> bool:
        """Store the features of all images of `frame` within `budget` (min, max pixels).

        Calls progress(stage, done, total) after each batch that had to be computed.
        Returns False, with the reason logged, where nothing can hold the features.
        """
        batches = _image_batches(frame, budget, batch_size)
        self.folder.mkdir(parents=True, exist_ok=True)
        # One worker computes, the others wait and read.
        with filelock.FileLock(self.folder / "lock"):
            self._register_new_shards()
            missing = [batch for batch in batches if not self.has_all(batch.keys)]
            is_filled = self._fill_missing(missing, budget, progress)
        if missing:
            files = list(self.folder.glob("*.safetensors"))
            in_memory = len(self.features_in_memory)
            LOGGER.info(
                "Vision cache: %s, %s; %d images in memory instead",
                self.folder,
                _size_as_text(files),
                in_memory,
            )
        return is_filled

    def _register_new_shards(self) -> None:
        """Note what other processes have written; a damaged shard is deleted, with a warning."""
        known = {entry.path for entry in self.shards.values()}
        for path in set(self.folder.glob("*.safetensors")) - known:
            if file_sha256(path) != path.stem:
                LOGGER.warning("Vision features recomputed: %s was damaged", path)
                path.unlink()
                continue
            with safetensors.safe_open(path, "pt") as file:
                keys = json.loads(file.metadata()["keys"])
            self.register_shard(path, [tuple(key) for key in keys])

    def _fill_missing(
        self,
        missing: Sequence[_ImageBatch],
        budget: tuple[int, int],
        progress: Callable,
    ) -> bool:
        """Compute and store the features of these batches; False where they find no room."""
        prepared = prefetch(self.prepare(batch.paths, budget) for batch in missing)
        for done, (batch, inputs) in enumerate(zip(missing, prepared, strict=True)):
            pixel_values, grids = inputs
            features = self.compute_features(pixel_values, grids)
            features = _map_features(lambda tensor: tensor.cpu(), features)
            batch_bytes = sum(tensor.nbytes for image in features for tensor in image)
            # As if each batch that is still to come took as much as this one.
            expected_bytes = batch_bytes * (len(missing) - done)
            if not self.add(batch.keys, features, expected_bytes):
                return False
            progress("vision features", done + 1, len(missing))
        return True

    def prepare(self, paths: Sequence[str], budget: tuple[int, int]) -> tuple[tuple, tuple]:
        """(pixel values, grids), an entry per image; images are decoded side by side."""

        def prepare_one(path: str):
            return prepare_image(load_image(path), self.processor, budget)

        with ThreadPoolExecutor() as pool:
            prepared = list(pool.map(prepare_one, paths))
        pixel_values, grids = zip(*prepared, strict=True)
        return pixel_values, grids

    def add(
        self, keys: Sequence[ImageKey], features: Sequence[tuple], expected_bytes: float
    ) -> bool:
        """Store the features of images on disk, else in RAM.

        `expected_bytes` is what these and all that will follow take. Returns False,
        with a warning, where that is more than half of the free disk and more than a
        quarter of the free RAM.
        """
        free_disk = shutil.disk_usage(self.folder).free
        free_memory = psutil.virtual_memory().available
        if expected_bytes <= free_disk / 2:
            self._write_shard(keys, features)
            return True
        if expected_bytes <= free_memory / 4:  # a quarter, because there may be two workers
            self.features_in_memory.update(zip(keys, features, strict=True))
            return True
        LOGGER.warning(
            "Vision cache skipped: it needs %.2f GiB, "
            "only %.2f GiB of disk and %.2f GiB of memory are free",
            expected_bytes / 2**30,
            free_disk / 2**30,
            free_memory / 2**30,
        )
        return False

    def _write_shard(self, keys: Sequence[ImageKey], features: Sequence[tuple]) -> None:
        """Write the features of images into a shard, and note where they lie."""
        tensors = {}
        for number, image in enumerate(features):
            for layer, tensor in enumerate(image):
                tensors[f"{number}.{layer:02}"] = tensor
        # One entry only: safetensors writes several in random order, and so with other hashes.
        metadata = {"keys": json.dumps(keys)}
        content = safetensors_torch.save(tensors, metadata)
        path = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        atomic_write(path, content, durable=False)
        self.register_shard(path, keys)

    def register_shard(self, path: Path, keys: Sequence[ImageKey]) -> None:
        """Note that the shard holds the images of these keys, in this order.

        Where two shards hold an image, the first by name counts: every process then
        reads the same one.
        """
        for number, key in enumerate(keys):
            entry = ShardEntry(path, number)
            self.shards[key] = min(entry, self.shards.get(key, entry))

    def load(self, key: ImageKey) -> tuple:
        """The stored features of one image, on the CPU."""
        if key in self.features_in_memory:
            return self.features_in_memory[key]
        entry = self.shards[key]
        with safetensors.safe_open(entry.path, "pt") as file:  # mapped: only this image is read
            all_names = sorted(file.keys())
            names = [name for name in all_names if name.startswith(f"{entry.number}.")]
            return tuple(file.get_tensor(name) for name in names)

    def compute_features(self, pixel_values: Sequence, grids: Sequence) -> list[tuple]:
        """Features of each image, finite, on the device, in the tower's number format.

        pixel_values, grids: of each image, as `prepare_image` returns them.
        After an overflow all are computed again in fp32, and clamped to what the format
        can hold.
        """
        tower = self.vision_tower.to(self.device)
        dtype = next(tower.parameters()).dtype
        largest = torch.finfo(dtype).max
        pixels = torch.cat(list(pixel_values)).to(self.device)
        with torch.no_grad():
            features = self.images.features(self.model, pixels, grids)
            is_finite = [tensor.isfinite().all() for image in features for tensor in image]
            if not torch.stack(is_finite).all():  # one question to the GPU, not one a tensor
                self.recomputed_in_fp32 += len(grids)
                LOGGER.warning(
                    "Non-finite vision features: %d images recomputed in fp32", len(grids)
                )
                try:
                    tower.float()
                    with torch.autocast(self.device.type, enabled=False):
                        features = self.images.features(self.model, pixels, grids)
                finally:
                    tower.to(dtype)
        return _map_features(
            lambda tensor: tensor.clamp(-largest, largest).to(dtype),
            features,
        )

    def compute_for_batch(self, batch: Mapping) -> list[tuple]:
        """Fresh features of the images of a batch that `collate` gave pixels."""
        grids = [prompt.grid for prompt in batch["prompts"]]
        return self.compute_features(batch["pixel_values"], grids)

    def encoder_outputs(self, batch: Mapping) -> SimpleNamespace:
        """What `mm_encoder_outputs["image"]` takes for `batch`, on the device.

        They are the batch's cached features, or fresh ones from its pixels.
        """
        features = batch.get("features") or self.compute_for_batch(batch)
        layers = []
        for layer in zip(*features, strict=True):
            layers.append([tensor.to(self.device, non_blocking=True) for tensor in layer])
        return self.images.encoder_outputs(layers)


# === Gated delta rule =============================================================================
CHUNK_TOKENS = 64  # tokens that the rule takes at once
_SMALLEST_BLOCK = 8  # of a triangular matrix that is inverted by its powers


def _diagonal_blocks(matrix, size: int):
    """The blocks (..., count, size, size) on the diagonal of square matrices (..., n, n)."""
    count = matrix.shape[-1] // size
    blocks = matrix.unflatten(-1, (count, size)).unflatten(-3, (count, size))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def inverse_of_unit_triangular(lower):
    """The inverse (..., n, n) of I + `lower`, strictly lower triangular, n a power of two.

    By blocks on the diagonal, each the inverse of two half as large ones. A GPU does that
    in a few batched products; its triangular solver takes a row after the other.

    >>> lower = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    >>> inverse_of_unit_triangular(lower).tolist()
    [[1.0, 0.0], [-3.0, 1.0]]
    """
    n = lower.shape[-1]
    size = min(_SMALLEST_BLOCK, n)
    with torch.no_grad():
        identity = torch.eye(n, dtype=lower.dtype, device=lower.device)
        one = identity[:size, :size]
        # (I + L)(I - L)(I + L^2)(I + L^4) = I - L^8, and L^8 = 0.
        block = _diagonal_blocks(lower, size)
        square = block @ block
        inverse = (one - block) @ (one + square) @ (one + square @ square)
        while size < n:
            below = _diagonal_blocks(lower, 2 * size)[..., size:, :size]
            first = inverse[..., 0::2, :, :]
            second = inverse[..., 1::2, :, :]
            left = torch.cat([first, -second @ below @ first], dim=-2)
            right = torch.cat([torch.zeros_like(second), second], dim=-2)
            inverse = torch.cat([left, right], dim=-1)
            size *= 2
        inverse = inverse[..., 0, :, :]
    # A step of Newton's iteration: the same value, with a gradient that keeps the inverse only.
    return 2 * inverse - inverse @ (identity + lower) @ inverse


def _in_chunks(tensor, key_heads: int):
    """(batch, length, heads, ...) as (batch, key heads, group, chunks, CHUNK_TOKENS, ...).

    Of zeros behind the last token. A group is the value heads that share a key head.
    """
    length = tensor.shape[1]
    missing = -length % CHUNK_TOKENS
    padding = (0, 0) * (tensor.dim() - 2) + (0, missing)
    padded = torch.nn.functional.pad(tensor, padding)
    chunked = padded.unflatten(2, (key_heads, -1)).unflatten(1, (-1, CHUNK_TOKENS))
    return chunked.movedim((3, 4), (1, 2)).contiguous()


def _unit_vectors(tensor):
    """The vectors (..., size) in fp32, of length 1."""
    vectors = tensor.float()
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + 1e-6)


def gated_delta_rule(query, key, value, g, beta, initial_state=None) -> tuple:
    """Outputs (batch, length, value heads, value size), and the last state, in fp32.

    The gated delta rule (Yang et al. 2024, arXiv 2412.06464): at each token a head's state
    S (key size, value size) becomes exp(g) S + beta k (v - exp(g) S^T k)^T, and its output is
    S^T q / sqrt(key size). Vectors q and k are taken with length 1. Tokens of a chunk are
    computed together, as in Yang et al. 2024 (arXiv 2406.06484), section 3.

    query, key: (batch, length, key heads, key size); value: (batch, length, value heads,
    value size), some value heads for each key head; g, logarithms of at most 0, and beta:
    (batch, length, value heads); initial_state: (batch, value heads, key size, value size),
    zeros without one.
    """
    length, key_heads, key_size = key.shape[1:]
    query = _in_chunks(_unit_vectors(query), key_heads) * key_size**-0.5
    key = _in_chunks(_unit_vectors(key), key_heads)
    values = _in_chunks(value.float(), key_heads)
    beta = _in_chunks(beta.float(), key_heads).unsqueeze(-1)
    decay = _in_chunks(g, key_heads).cumsum(-1)  # its logarithm, since the chunk began
    # Between two tokens of a chunk; no token looks at a later one.
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).tril().exp().tril()
    decay = decay.exp().unsqueeze(-1)
    # What a chunk's tokens write depends on what those before wrote: a triangular system.
    system = (key @ key.mT * between * beta).tril(-1)
    solved = inverse_of_unit_triangular(system)
    new_values = solved @ (values * beta)
    keys_of_state = solved @ (key * (beta * decay))
    within = query @ key.mT * between
    query = query * decay
    last_decay = decay[..., -1:, :]
    key = key * between[..., -1:, :].mT  # what is left of it at the chunk's end
    if initial_state is None:
        state = values.new_zeros(len(values), *values.shape[1:3], key_size, values.shape[-1])
    else:
        state = initial_state.unflatten(1, (key_heads, -1))
    outputs = []
    for number in range(values.shape[3]):
        chunk = (slice(None), slice(None), slice(None), number)
        written = new_values[chunk] - keys_of_state[chunk] @ state
        outputs.append(query[chunk] @ state + within[chunk] @ written)
        state = state * last_decay[chunk] + key[chunk].mT @ written
    output = torch.stack(outputs, dim=3).movedim((1, 2), (3, 4)).flatten(3, 4).flatten(1, 2)
    return output[:, :length].to(value.dtype), state.flatten(1, 2)


def recompute_gated_delta_rule(*tensors) -> tuple:
    """`gated_delta_rule` of the same tensors; the backward pass computes it once more.

    What it would keep, in fp32, is thirty times what goes in.
    """
    if not torch.is_grad_enabled():
        return gated_delta_rule(*tensors)
    return torch.utils.checkpoint.checkpoint(
        gated_delta_rule, *tensors, use_reentrant=False, preserve_rng_state=False
    )


# === Recurrent layers =============================================================================
class SharedPrefixes(NamedTuple):
    """Where the prefixes and ends of a batch lie that holds several choice orders a question.

    Attention keeps the orders apart by a mask. A recurrent layer would carry what it has read of
    one order over to the next: it reads a prefix once, and each order's end from a copy of the
    state behind the prefix. All tensors are made once a batch, by `split_at_prefixes`; tokens
    are counted through the batch's (questions, length), row by row.
    """

    # (questions, longest prefix): number of each token; in front of a shorter one that of its
    # first token, over and over.
    prefix_tokens: torch.Tensor
    prefix_mask: torch.Tensor  # of that shape: False in front of a shorter one
    # (answers, longest end): number of each token; behind a shorter one that of its last token.
    end_tokens: torch.Tensor
    questions: torch.Tensor  # (answers,): the question of each end
    # (questions, length): where each token's output lies, in the outputs of all prefixes, then
    # of all ends, then one row of zeros, for padding.
    places: torch.Tensor


def split_at_prefixes(segments) -> SharedPrefixes:
    """The prefixes and ends of a batch, from its `segments` (questions, length), on the CPU.

    A segment is -1 in padding, 0 in the prefix, then the number of the order.

    >>> parts = split_at_prefixes(torch.tensor([[-1, 0, 0, 1, 2, 2]]))
    >>> parts.prefix_tokens.tolist(), parts.end_tokens.tolist()
    ([[1, 2]], [[3, 3], [4, 5]])
    >>> parts.places.tolist()  # prefix 0 and 1, ends 2 to 5, of which 3 is padding; 6: zeros
    [[6, 0, 1, 2, 4, 5]]
    """
    numbers = np.arange(segments.numel()).reshape(segments.shape)
    prefixes = []
    ends = []
    questions = []
    for question, row in enumerate(segments.numpy()):
        prefixes.append(numbers[question, row == 0])
        for order in range(1, row.max() + 1):
            ends.append(numbers[question, row == order])
            questions.append(question)
    longest_prefix = max(len(tokens) for tokens in prefixes)
    longest_end = max(len(tokens) for tokens in ends)
    first_end = len(prefixes) * longest_prefix
    zeros = first_end + len(ends) * longest_end
    places = np.full(segments.numel(), zeros)
    for question, tokens in enumerate(prefixes):
        behind = (question + 1) * longest_prefix
        places[tokens] = np.arange(behind - len(tokens), behind)
    for answer, tokens in enumerate(ends):
        start = first_end + answer * longest_end
        places[tokens] = np.arange(start, start + len(tokens))
    # Padding repeats a real token, so that it is as finite as that one.
    missing = [longest_prefix - len(tokens) for tokens in prefixes]
    prefix_tokens = [
        np.pad(tokens, (count, 0), mode="edge")
        for tokens, count in zip(prefixes, missing, strict=True)
    ]
    end_tokens = [np.pad(tokens, (0, longest_end - len(tokens)), mode="edge") for tokens in ends]
    prefix_mask = np.arange(longest_prefix) >= np.array(missing)[:, None]
    return SharedPrefixes(
        prefix_tokens=torch.from_numpy(np.array(prefix_tokens)),
        prefix_mask=torch.from_numpy(prefix_mask),
        end_tokens=torch.from_numpy(np.array(end_tokens)),
        questions=torch.tensor(questions),
        places=torch.from_numpy(places.reshape(segments.shape)),
    )


def _causal_convolution(tokens, weight):
    """silu of the convolution of (batch, length, channels) with each channel's own taps.

    As large as the tokens, and in their number format; `weight`: (channels, taps). A token
    sees itself and those before it, the first ones zeros.
    """
    length = tokens.shape[1]
    taps = weight.shape[1]
    padded = torch.nn.functional.pad(tokens, (0, 0, taps - 1, 0)).float()
    weight = weight.float()
    total = padded[:, :length] * weight[:, 0]
    for tap in range(1, taps):
        total = total + padded[:, tap : tap + length] * weight[:, tap]
    return torch.nn.functional.silu(total.to(tokens.dtype))


def _run_rule(mixer, rule: Callable, convolved, decay, beta, state=None) -> tuple:
    """Outputs (batch, length, heads, size) and last state, by the rule of a recurrent `mixer`."""
    sizes = [mixer.key_dim, mixer.key_dim, mixer.value_dim]
    query, key, value = convolved.split(sizes, dim=-1)
    return rule(
        query.unflatten(-1, (-1, mixer.head_k_dim)),
        key.unflatten(-1, (-1, mixer.head_k_dim)),
        value.unflatten(-1, (-1, mixer.head_v_dim)),
        decay,
        beta,
        state,
    )


def _run_behind_prefixes(
    mixer, rule: Callable, parts: SharedPrefixes, mixed, decay, beta
) -> torch.Tensor:
    """Outputs (batch, length, heads, size) of questions in several orders.

    Each prefix is read once, and the ends of all orders go on from copies of its state.
    """
    weight = mixer.conv1d.weight[:, 0]
    mixed = mixed.flatten(0, 1)
    decay = decay.flatten(0, 1)
    beta = beta.flatten(0, 1)
    prefixes = mixed[parts.prefix_tokens] * parts.prefix_mask.unsqueeze(-1)
    prefix_outputs, states = _run_rule(
        mixer,
        rule,
        _causal_convolution(prefixes, weight),
        decay[parts.prefix_tokens],
        beta[parts.prefix_tokens],
    )
    # The convolution of an end begins with the last tokens of its prefix.
    before = prefixes[:, 1 - weight.shape[1] :][parts.questions]
    ends = torch.cat([before, mixed[parts.end_tokens]], dim=1)
    end_outputs, _ = _run_rule(
        mixer,
        rule,
        _causal_convolution(ends, weight)[:, before.shape[1] :],
        decay[parts.end_tokens],
        beta[parts.end_tokens],
        states[parts.questions],
    )
    padding = prefix_outputs.new_zeros(1, *prefix_outputs.shape[2:])
    outputs = [prefix_outputs.flatten(0, 1), end_outputs.flatten(0, 1), padding]
    return torch.cat(outputs)[parts.places]


def recurrent_forward(
    mixer, own_forward: Callable, rule: Callable, hidden_states, attention_mask=None, **options
):
    """The pass of a recurrent `mixer` over (batch, length, hidden), as transformers computes it.

    `rule` is `gated_delta_rule` or another implementation of it. `attention_mask`: 0 in padding,
    (batch, length), or `SharedPrefixes`, or None. Where a cache is kept, to generate text, it
    is left to the mixer's `own_forward`.
    """
    # Its name in transformers 5.24, and in 5.18.
    cache = options.get("cache", options.get("cache_params"))
    if cache is not None:
        return own_forward(hidden_states, cache, attention_mask)
    mixed = mixer.in_proj_qkv(hidden_states)
    gate = mixer.in_proj_z(hidden_states).unflatten(-1, (-1, mixer.head_v_dim))
    beta = mixer.in_proj_b(hidden_states).sigmoid()
    step = torch.nn.functional.softplus(mixer.in_proj_a(hidden_states).float() + mixer.dt_bias)
    decay = -mixer.A_log.float().exp() * step
    if isinstance(attention_mask, SharedPrefixes):
        outputs = _run_behind_prefixes(mixer, rule, attention_mask, mixed, decay, beta)
    else:
        if attention_mask is not None:
            mixed = mixed * attention_mask.unsqueeze(-1)  # padding writes nothing
        convolved = _causal_convolution(mixed, mixer.conv1d.weight[:, 0])
        outputs, _ = _run_rule(mixer, rule, convolved, decay, beta)
    # The norm takes one vector a row.
    normed = mixer.norm(outputs.flatten(0, -2), gate.flatten(0, -2))
    return mixer.out_proj(normed.view(*hidden_states.shape[:2], -1))


# === Recurrent kernels ============================================================================
# transformers takes these kernels by itself wherever `import fla` works.
RECURRENT_KERNELS = "flash-linear-attention"
# Before 0.5 their rule takes one value head for each key head, and would mix up several without a
# word (its pull request 812); before 0.5.2 they refuse Hopper GPUs with every Triton from 3.4 on.
FIRST_RECURRENT_KERNELS = Version("0.5.2")
# With these versions of Triton their gradients are wrong on Hopper GPUs (H100, H200), so that they
# refuse a backward pass there: flash-linear-attention issue 640.
TRITON_WRONG_ON_HOPPER = SpecifierSet(">=3.4,<3.7.1")


def _obstacle_to_recurrent_kernels(gpus: Sequence[Mapping], strict: bool) -> str:
    """Why this machine cannot use `RECURRENT_KERNELS`, or the `strict` settings must not; or ""."""
    if not gpus:
        return "needs a GPU"
    oldest = min(gpus, key=lambda gpu: gpu["capability"])
    if oldest["capability"] < 8.0:
        return f"needs capability 8.0, as Triton does; {oldest['name']} has {oldest['capability']}"
    torch_version = installed_version("torch")
    if torch_version < Version("2.7"):
        return f"needs torch 2.7; {torch_version} is installed"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which comes with torch on Linux only"
    triton = installed_version("triton")
    hoppers = [gpu["name"] for gpu in gpus if 9.0 <= gpu["capability"] < 10.0]
    if hoppers and triton in TRITON_WRONG_ON_HOPPER:
        return f"needs Triton 3.7.1 to train on {hoppers[0]}; torch brought {triton}, update torch"
    if strict:
        return "chooses its kernels by their speed, unlike strict_determinism wants it"
    return ""


def decide_recurrent_kernels(gpus: Sequence[Mapping], strict: bool = False) -> tuple[bool, str]:
    """Whether recurrent layers use the kernels of flash-linear-attention here, and why.

    Without them they compute the same in plain PyTorch, slower. `gpus` as in `Runtime`;
    `strict`: with the setting strict_determinism. Nothing is imported.

    >>> decide_recurrent_kernels([])[1]
    'recurrent layers (Qwen3.5 and later) in plain PyTorch: flash-linear-attention needs a GPU'
    """
    layers = "recurrent layers (Qwen3.5 and later)"
    obstacle = _obstacle_to_recurrent_kernels(gpus, strict)
    if obstacle:
        return False, f"{layers} in plain PyTorch: {RECURRENT_KERNELS} {obstacle}"
    if importlib.util.find_spec("fla") is None:
        advice = f"`pip install {RECURRENT_KERNELS}` before training can make them faster"
        return False, f"{layers} in plain PyTorch: {RECURRENT_KERNELS} is not installed; {advice}"
    version = installed_version(RECURRENT_KERNELS)
    if version < FIRST_RECURRENT_KERNELS:
        return False, (
            f"{layers} in plain PyTorch: {RECURRENT_KERNELS} {version} is too old; "
            f"`pip install -U {RECURRENT_KERNELS}` before training can make them faster"
        )
    first_use = "its kernels are compiled at their first use, which can take minutes"
    return True, f"{layers} by {RECURRENT_KERNELS} {version}: {first_use}"


def hide_recurrent_kernels() -> None:
    """Let `import fla` fail in this process, so that transformers goes without these kernels.

    It would choose them by the package alone, also for a CPU, where they fail.
    """
    sys.modules["fla"] = None


def _rule_by_kernels(query, key, value, g, beta, initial_state=None) -> tuple:
    """`gated_delta_rule` by flash-linear-attention."""
    return fla_rules.chunk_gated_delta_rule(
        query,
        key,
        value,
        g=g,
        beta=beta,
        initial_state=initial_state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )


def _difference_of_kernels(mixer) -> float:
    """Largest relative difference between the kernels and `gated_delta_rule`, NaN included.

    Of outputs, states and gradients of random numbers in the shapes of a recurrent `mixer`, on
    its device and in its number format.
    """
    generator = torch.Generator().manual_seed(0)
    length = 2 * CHUNK_TOKENS + 1
    weight = mixer.conv1d.weight

    def draw(heads: int, *size: int):
        numbers = torch.randn(2, length, heads, *size, generator=generator)
        return numbers.to(weight.device, weight.dtype)

    inputs = [
        draw(mixer.num_k_heads, mixer.head_k_dim),
        draw(mixer.num_k_heads, mixer.head_k_dim),
        draw(mixer.num_v_heads, mixer.head_v_dim),
        -draw(mixer.num_v_heads).float().abs(),
        draw(mixer.num_v_heads).sigmoid(),
    ]
    found = []
    for rule in (_rule_by_kernels, gated_delta_rule):
        tensors = [tensor.detach().requires_grad_() for tensor in inputs]
        outputs, state = rule(*tensors)
        loss = outputs.float().square().sum() + state.float().square().sum()
        found.append([outputs, state, *torch.autograd.grad(loss, tensors)])
    differences = []
    for by_kernels, expected in zip(*found, strict=True):
        distance = (by_kernels.float() - expected.float()).norm()
        differences.append(distance / expected.float().norm())
    return torch.stack(differences).max().item()  # NaN where one is


def _fault_of_kernels(mixer) -> str:
    """Why the installed kernels cannot be used for a recurrent `mixer`; "" where they can."""
    try:
        with torch.enable_grad():
            difference = _difference_of_kernels(mixer)
    except Exception as error:  # whatever they raise where torch, Triton or the card do not suit
        return str(error)
    if difference <= 0.05:  # half precision takes a tenth of that
        return ""
    return f"their outputs or gradients are wrong here (off by {difference:.2g})"


def check_recurrent_kernels(mixer, are_chosen: bool, why: str) -> bool:
    """Whether the kernels that `are_chosen` compute what they should for a recurrent `mixer`.

    Tried on a few random numbers, because versions of Triton have broken them on one kind of
    card or another. Logs how the layers compute, and `why`.
    """
    fault = _fault_of_kernels(mixer) if are_chosen else ""
    if not fault:
        LOGGER.info("Decision: %s", why)
        return are_chosen
    LOGGER.warning(
        "Recurrent layers compute in plain PyTorch, slower: %s is installed, but does not work "
        "here: %s",
        RECURRENT_KERNELS,
        fault,
    )
    return False


def use_recurrent_layers(model, are_chosen: bool, why: str) -> None:
    """Let the model's recurrent layers compute `recurrent_forward`; log by which rule.

    `are_chosen`, `why`: what `decide_recurrent_kernels` says of flash-linear-attention.
    """
    name = FAMILIES[model.config.model_type].recurrent_mixer
    layers = model.model.language_model.layers
    mixers = [getattr(layer, name) for layer in layers if hasattr(layer, name)]
    has_kernels = check_recurrent_kernels(mixers[0], are_chosen, why)
    rule = _rule_by_kernels if has_kernels else recompute_gated_delta_rule
    # Where decoder layers are compiled, they are so around the rule: its loop over chunks would
    # be compiled anew for each number of chunks.
    rule = torch.compiler.disable(rule)
    for mixer in mixers:
        has_hook = hasattr(mixer, "_hf_hook")  # on several GPUs it fetches the inputs
        place = "_old_forward" if has_hook else "forward"
        own_forward = getattr(mixer, place)
        setattr(mixer, place, functools.partial(recurrent_forward, mixer, own_forward, rule))


# === Session ======================================================================================
@dataclass
class Session:
    """What a worker process loads once and shares between its stages and folds.

    `open_session` fills everything up to `device`; the rest is state with a default, and
    each entry says who changes it.
    """

    config: Config  # the run's settings; without quantisation in stage "rescore"
    runtime: Runtime  # this machine, and the decisions on number format and attention
    processor: object  # the model's: template, tokenizer (padding on the left), images
    model: object  # the frozen base model; an adapter is attached to it fold by fold
    # Token ids of each letter's variants (`a`, `A`, ` a`), in the order of CHOICES.
    letter_token_ids: tuple[tuple[int, ...], ...]
    vision_cache: VisionCache  # the vision tower's features; filled by `fill_vision_cache`
    # The head's rows for the variants of all letters in turn: (variants, hidden), fp32,
    # on `device`.
    letter_head_weights: object
    # torch.device where the model computes; parts that rest may lie elsewhere.
    device: object
    # Called as progress(stage, done, total, **details); set by `open_stage_session`, for the
    # notebook's progress bars. It may raise Interrupted.
    progress: Callable = lambda stage, done, total, **details: None
    # Departures from the plan, in words, for the report; added by `add_note`, moved into
    # events.jsonl by `write_notes`.
    notes: list[str] = field(default_factory=list)
    # Questions per forward pass that memory has allowed since it ran out in `score_batch`;
    # None until then.
    inference_batch_limit: int | None = None
    # Of the last inference, in this process or an earlier one; 0: unknown. Set by
    # `open_stage_session`, then by `predict_logits`.
    seconds_per_question: float = 0.0
    # Folds that this worker trains and scores; set by `open_stage_session`.
    assigned_folds: Sequence[int] = ()
    # How a training step is spread over passes; measured by the first fold that trains, replaced
    # where memory runs out. None until then.
    memory_plan: MemoryPlan | None = None

    @property
    def decoder_layers(self):
        """The language model's decoder layers, from the first to the last."""
        return self.model.model.language_model.layers

    @property
    def family(self) -> Family:
        """What is known about models of this kind."""
        return FAMILIES[self.model.config.model_type]

    @property
    def shares_prefixes(self) -> bool:
        """Whether several choice orders of a question go behind one prefix.

        That takes a mask which other kinds of attention refuse.
        """
        return self.runtime.attention == "sdpa"

    def add_note(self, text: str) -> None:
        """Log a departure from the plan as a warning, and keep it for the report."""
        LOGGER.warning("%s", text)
        self.notes.append(text)


def _check_wordings(processor, config: Config, example: Mapping) -> tuple[tuple[int, ...], ...]:
    """The letters' token ids behind the first wording; TemplateError if any wording fails."""
    letter_token_ids = []
    for wording in range(config.paraphrases):
        templates = prompt_templates(config, wording)
        context = shown_context(config, processor, example)
        messages = build_messages(example, templates=templates, context=context)
        letter_token_ids.append(check_template(processor, messages))
    return letter_token_ids[0]


def _check_processor(config: Config, processor, model) -> None:
    """ValueError where the processor prepares images for another kind of models."""
    family = model.config.model_type
    if image_inputs(processor) is not FAMILIES[family].images:
        raise ValueError(
            f"{config.model_path} has a model of the family {family!r} and a "
            f"{type(processor).__name__}, which prepares images for another one: "
            "download both from one repository"
        )


def open_session(config: Config, example: Mapping) -> Session:
    """A session with processor and model loaded and every decision logged with its reason.

    `example` is a row of train or test. Raises TemplateError where the processor's chat
    template does not suit it, and what `load_processor` and `load_model` raise.
    """
    runtime = detect_runtime(config.precision, config.attn_implementation)
    for reason in runtime.reasons:
        LOGGER.info("Decision: %s", reason)
    seed_everything(config.seed, config.deterministic, config.strict_determinism)
    processor = load_processor(config)
    budget = pixel_budget(config, processor)
    LOGGER.info("Decision: %s", image_inputs(processor).budget_in_words(processor, budget))
    letter_token_ids = _check_wordings(processor, config, example)
    LOGGER.info(
        'Decision: chat template %s: "prompt + letter" then begins the answered conversation',
        options_as_text(template_options(processor)),
    )
    has_kernels, why_kernels = decide_recurrent_kernels(runtime.gpus, config.strict_determinism)
    if not has_kernels:
        hide_recurrent_kernels()
    with track_peak_memory("model loaded"):
        model = load_model(config, runtime)
    _check_processor(config, processor, model)
    remove_gpu_syncs(model)
    if FAMILIES[model.config.model_type].recurrent_mixer:
        use_recurrent_layers(model, has_kernels, why_kernels)
    device = model.device
    vision_cache = VisionCache(model, processor, config.cache_dir)

    head = model.get_output_embeddings()
    all_letter_tokens = list(itertools.chain.from_iterable(letter_token_ids))
    letter_head_weights = head.weight[all_letter_tokens].float().to(device)
    shares_embeddings = head.weight is model.get_input_embeddings().weight
    if config.loss == "choices" and not shares_embeddings:
        # Only the letters' rows are ever multiplied: an 8B then has 1.2 GiB more for activations.
        head.to("cpu")
    return Session(
        config=config,
        runtime=runtime,
        processor=processor,
        model=model,
        letter_token_ids=letter_token_ids,
        vision_cache=vision_cache,
        letter_head_weights=letter_head_weights,
        device=device,
    )


# === Batches ======================================================================================
@dataclass(frozen=True)
class Prompt:
    """One question at one pixel budget, tokenised in one or several choice orders.

    What the orders have in common, the prefix, stands once in front; behind it follows
    what is left of each order. `length` counts the tokens of all that. `make_prompt`
    fills every field.
    """

    # Number of the question's row in the table that it was made from.
    row: int
    # One tuple an order: order[position] = the original choice (0 to 3) shown there.
    orders: tuple[tuple[int, ...], ...]
    # The image's file.
    image_path: str
    # Content hash, least and most pixels of the image: its key in the vision cache.
    image_key: tuple
    # Grid of the image, in its family's way: see `image_grid`.
    grid: tuple[int, ...]
    # Token ids (length,).
    input_ids: np.ndarray
    # (length,): 0 in the common prefix, then the number of the order, counted from 1.
    segments: np.ndarray
    # (dimensions, length): the model's positions, in tokens. Of Qwen's models in time,
    # height and width, of others in one dimension.
    position_ids: np.ndarray
    # (orders,): index of each order's last token, where its letter is predicted.
    answer_positions: np.ndarray
    # Whether each of the 4 original choices holds text.
    present_choices: tuple[bool, ...]
    # Target probability of each of the 4 original choices: `target_probabilities`.
    target: tuple[float, ...]


def make_prompt(
    session: Session,
    frame: pd.DataFrame,
    row: int,
    orders: Sequence[tuple[int, ...]],
    scale: float = 1.0,
) -> Prompt:
    """Row number `row` of `frame` as one `Prompt` in these choice orders.

    `scale` multiplies the pixel budget. Raises DataError naming the row's id and image
    where it cannot be prepared.
    """
    record = frame.iloc[row]
    try:
        budget = pixel_budget(session.config, session.processor, scale)
        grid = image_grid(record["width"], record["height"], session.processor, budget)
        templates = prompt_templates(session.config, record.get("wording", 0))
        context = shown_context(session.config, session.processor, record)
        messages = [build_messages(record, order, templates, context) for order in orders]
        encoded = [encode_prompt(session.processor, message, grid) for message in messages]
    except Exception as error:
        raise DataError(
            f"Row {record['id']} (image {record['image_path']}) cannot be prepared: {error}"
        ) from error
    shared = shared_prefix_length(encoded)
    prefix = encoded[0][:shared]
    suffixes = [ids[shared:] for ids in encoded]
    suffix_lengths = [len(suffix) for suffix in suffixes]
    prefix_positions = rope_positions(session, prefix, grid)
    # Behind the image, text counts up by one in every dimension.
    first = prefix_positions.max() + 1
    dimensions = len(prefix_positions)
    suffix_positions = []
    for length in suffix_lengths:
        suffix_positions.append(first + np.tile(np.arange(length), (dimensions, 1)))
    return Prompt(
        row=row,
        orders=tuple(orders),
        image_path=record["image_path"],
        image_key=(record["pixel_hash"], *budget),
        grid=grid,
        input_ids=np.concatenate([prefix, *suffixes]),
        segments=np.repeat(np.arange(len(encoded) + 1), [shared, *suffix_lengths]),
        position_ids=np.concatenate([prefix_positions, *suffix_positions], axis=1),
        answer_positions=shared + np.cumsum(suffix_lengths) - 1,
        present_choices=tuple(present_choices(record)),
        target=target_probabilities(record),
    )


def shared_prefix_length(sequences: Sequence[np.ndarray]) -> int:
    """How many tokens all sequences (length,) begin with, at most all but the last one.

    The last token of each stays out of the prefix: its letter is predicted there.

    >>> shared_prefix_length([np.array([7, 8, 1, 2]), np.array([7, 8, 2, 1])])
    2
    >>> shared_prefix_length([np.array([7, 8, 9])])
    2
    """
    common = os.path.commonprefix([ids.tolist() for ids in sequences])
    shortest = min(len(ids) for ids in sequences)
    return min(len(common), shortest - 1)


def rope_positions(session: Session, input_ids: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """The model's own positions (dimensions, length) of one sequence.

    `input_ids` (length,) hold one image of that grid.
    """
    token_ids = torch.from_numpy(input_ids)[None]  # (1, length)
    return session.family.images.positions(session.model, token_ids, grid)


def pad_left(arrays: Sequence[np.ndarray], length: int, value: int):
    """One tensor (arrays, length, ...) of shorter arrays, filled up with `value` in front.

    >>> pad_left([np.array([1, 2]), np.array([3])], length=3, value=0).tolist()
    [[0, 1, 2], [0, 0, 3]]
    """
    padded = np.full((len(arrays), length, *arrays[0].shape[1:]), value)
    for row, array in zip(padded, arrays, strict=True):
        row[length - len(array) :] = array
    return torch.from_numpy(padded)


def collate(session: Session, prompts: Sequence[Prompt]) -> dict:
    """One batch of left-padded model inputs on the CPU, with one target for each answer.

    The images come as "features" (those in the vision cache) or as "pixel_values". A
    question in several orders has as many answers.
    """
    lengths = {len(prompt.input_ids) for prompt in prompts}
    length = max(lengths)
    if len(lengths) > 1 and session.device.type == "cuda":
        length += -length % 16  # attention kernels want the rows of a mask aligned
    padding_id = session.processor.tokenizer.pad_token_id
    input_ids = pad_left([prompt.input_ids for prompt in prompts], length, padding_id)
    segments = pad_left([prompt.segments for prompt in prompts], length, -1)
    positions = pad_left([prompt.position_ids.T for prompt in prompts], length, 1)
    answer_rows = []
    answer_columns = []
    targets = []
    present = []
    for number, prompt in enumerate(prompts):
        padding = length - len(prompt.input_ids)
        for order, position in zip(prompt.orders, prompt.answer_positions, strict=True):
            answer_rows.append(number)
            answer_columns.append(padding + position)
            targets.append(permute_choices(prompt.target, order))
            present.append(permute_choices(prompt.present_choices, order))
    image_token_id = session.processor.image_token_id
    grids = [prompt.grid for prompt in prompts]
    batch = {
        "input_ids": input_ids,  # (questions, length)
        "segments": segments,  # (questions, length): as in `Prompt`, -1 in padding
        "attention_mask": (segments >= 0).long(),  # (questions, length): 0 in padding
        **session.family.images.model_inputs(image_token_id, input_ids, grids),
        # (3, questions, length), or (questions, length) where a position is one number.
        "position_ids": positions.permute(2, 0, 1).squeeze(0),
        "answers": torch.from_numpy(np.array([answer_rows, answer_columns])),  # (2, answers)
        "targets": torch.tensor(targets),  # (answers, 4), in prompt positions
        "present": torch.tensor(present),  # (answers, 4), in prompt positions
        "prompts": list(prompts),
        "padded": len(lengths) > 1,  # whether any question has padding
    }
    if session.family.recurrent_mixer and len(answer_rows) > len(prompts):
        batch["shared_prefixes"] = split_at_prefixes(segments)
    if session.vision_cache.has_all(prompt.image_key for prompt in prompts):
        batch["features"] = [session.vision_cache.load(prompt.image_key) for prompt in prompts]
    else:
        batch["pixel_values"] = [_load_pixels(session, prompt) for prompt in prompts]
    return batch


def _load_pixels(session: Session, prompt: Prompt):
    """Pixel values of a prompt's image, as `prepare_image` returns them.

    Raises DataError where they form another grid than the prompt has room for.
    """
    image = load_image(prompt.image_path)
    budget = prompt.image_key[1:]
    pixels, grid = prepare_image(image, session.processor, budget)
    if grid != prompt.grid:
        raise DataError(
            f"Image {prompt.image_path} gives the grid {grid}, not the planned {prompt.grid}"
        )
    return pixels


def split_batches(session: Session, batches: Iterable[Mapping], size: int) -> Iterator[Mapping]:
    """The same questions in batches of at most `size`, collated anew where one was larger."""
    for batch in batches:
        prompts = batch["prompts"]
        if len(prompts) <= size:
            yield batch
            continue
        for start in range(0, len(prompts), size):
            yield collate(session, prompts[start : start + size])


def iterate_batches(
    session: Session, prompts: Sequence[Prompt], batches: Sequence[Sequence[int]]
) -> Iterator[dict]:
    """Collated batches in order, prepared ahead of the GPU.

    `batches` holds the numbers of the prompts of each. Images that are not in the
    vision cache are decoded by `num_workers` processes.
    """
    is_cached = session.vision_cache.has_all(prompt.image_key for prompt in prompts)
    # Only a forked process shares the session; another kind would pickle the model.
    can_fork = hasattr(os, "fork")
    workers = session.config.num_workers if can_fork and not is_cached else 0
    is_on_gpu = session.device.type == "cuda"
    chosen = [[prompts[number] for number in batch] for batch in batches]
    loader = torch.utils.data.DataLoader(
        chosen,
        batch_size=None,  # each item is a batch already
        collate_fn=functools.partial(collate, session),
        pin_memory=is_on_gpu,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    collated = iter(loader)
    return prefetch(collated) if is_on_gpu and not workers else collated


# === Scores and loss ==============================================================================
def shared_prefix_mask(segments):
    """Attention mask (batch, 1, length, length): no order of a question sees another one.

    True where the position of a row may look at the position of a column: at no later
    one, and only at the common prefix and at its own order. `segments` (batch, length)
    is -1 in padding, 0 in the prefix, then the number of the order.

    >>> shared_prefix_mask(torch.tensor([[0, 1, 2]])).int().tolist()
    [[[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]]
    """
    length = segments.shape[1]
    ones = torch.ones(length, length, dtype=torch.bool, device=segments.device)
    is_causal = ones.tril()
    query = segments[:, :, None]
    key = segments[:, None, :]
    is_visible = (key == 0) | (key == query)
    # A padded position looks at everything: a row with nothing to look at may be NaN in
    # an SDPA kernel. No real position looks at padding, so that no score changes.
    is_padding = query < 0
    return ((is_causal & is_visible) | is_padding)[:, None]


def _recurrent_mask(session: Session, batch: Mapping):
    """The mask of recurrent layers: a batch's parts, its padding, or None where it has neither."""
    if "shared_prefixes" in batch:
        parts = batch["shared_prefixes"]
        return SharedPrefixes(*(part.to(session.device, non_blocking=True) for part in parts))
    if batch["padded"]:
        return batch["attention_mask"].to(session.device, non_blocking=True)
    return None


def _model_inputs(session: Session, batch: Mapping) -> dict:
    """The model's inputs but the image, on its device, with the mask that attention needs."""
    inputs = {}
    for name in MODEL_INPUTS:
        if name in batch:
            inputs[name] = batch[name].to(session.device, non_blocking=True)
    # Before capability 8.0 the fast kernel refuses grouped queries without a mask.
    is_turing = any(gpu["capability"] < 8.0 for gpu in session.runtime.gpus)
    has_several_orders = len(batch["present"]) > len(batch["prompts"])
    needs_mask = is_turing or has_several_orders or batch["padded"]
    if session.shares_prefixes and needs_mask:
        segments = batch["segments"].to(session.device, non_blocking=True)
        inputs["attention_mask"] = shared_prefix_mask(segments)
        if session.family.recurrent_mixer:
            inputs["attention_mask"] = {
                "full_attention": inputs["attention_mask"],
                "linear_attention": _recurrent_mask(session, batch),
            }
    elif not batch["padded"]:
        del inputs["attention_mask"]  # it says nothing, and asking it would wait for the GPU
        if session.runtime.attention == "sdpa":
            inputs.update(session.family.images.without_mask)
    return inputs


def _check_image_tokens(session: Session, batch: Mapping, features: Sequence) -> None:
    """Raise DataError, naming the images, unless there is a feature for each image token.

    `features`: one tensor (tokens, hidden) an image or a tile.
    """
    image_token = session.processor.image_token_id
    token_count = sum(
        np.count_nonzero(prompt.input_ids == image_token) for prompt in batch["prompts"]
    )
    feature_count = sum(len(image) for image in features)
    if token_count != feature_count:
        paths = sorted({prompt.image_path for prompt in batch["prompts"]})
        raise DataError(
            f"{token_count} image tokens but {feature_count} image features, for the images {paths}"
        )


def answer_hidden_states(session: Session, batch: Mapping):
    """Last hidden states (answers, hidden) where the letters are predicted.

    With the adapter, if one is attached. `batch` comes from `collate`. Raises DataError
    where image tokens and features differ in number.
    """
    inputs = _model_inputs(session, batch)
    encoded = session.vision_cache.encoder_outputs(batch)
    _check_image_tokens(session, batch, encoded.pooler_output)
    inputs["mm_encoder_outputs"] = {"image": encoded}
    states = session.model.model(**inputs, use_cache=False).last_hidden_state
    rows_and_columns = tuple(batch["answers"].to(states.device, non_blocking=True))
    # A model on several GPUs ends on another one than it began.
    return states[rows_and_columns].to(session.device)


def choice_logits(logits, letters: Sequence[Sequence[int]]):
    """Scores (batch, 4) of the letters, from vocabulary logits (batch, vocabulary).

    A letter's score is the log-sum-exp over its variants' columns, `letters[choice]`.

    >>> logits = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    >>> choice_logits(logits, [[4], [3], [2], [1]]).tolist()
    [[5.0, 4.0, 3.0, 2.0]]
    """
    scores = []
    for variants in letters:
        # One column at a time: a list of columns would go to the GPU first, and the CPU
        # wait for that.
        columns = [logits[:, token] for token in variants]
        scores.append(torch.stack(columns, dim=-1).logsumexp(dim=-1))
    return torch.stack(scores, dim=-1)


def answer_scores(session: Session, states):
    """Scores (answers, 4) in prompt positions, from hidden states (answers, hidden).

    Only the letters' rows of the model's head are multiplied, in fp32.
    """
    # The weights hold a row for each variant of a, then of b, and so on.
    letters = []
    first = 0
    for variants in session.letter_token_ids:
        letters.append(range(first, first + len(variants)))
        first += len(variants)
    logits = states.float() @ session.letter_head_weights.T  # (answers, all variants)
    return choice_logits(logits, letters)


def choice_loss(scores, targets, present, label_smoothing: float = 0.0):
    """Mean cross-entropy of the scores (batch, 4) with target probabilities (batch, 4).

    Smoothed over the choices that are `present` (batch, 4); the others take no part. A
    hard label is a target of ones and zeros. Everything is in prompt positions.

    >>> scores = torch.zeros(1, 4)
    >>> targets = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    >>> present = torch.tensor([[True, True, False, False]])
    >>> round(choice_loss(scores, targets, present).item(), 4)  # ln 2: two choices, one score
    0.6931
    """
    log_probabilities = scores.masked_fill(~present, -math.inf).log_softmax(dim=-1)
    # Zero instead of minus infinity: zero times infinity would be NaN.
    log_probabilities = log_probabilities.masked_fill(~present, 0.0)
    on_target = (targets * log_probabilities).sum(-1)
    on_average = log_probabilities.sum(-1) / present.sum(-1)
    return -((1 - label_smoothing) * on_target + label_smoothing * on_average).mean()


def training_loss(session: Session, states, batch: Mapping):
    """The configured loss of a batch, from its answers' hidden states (answers, hidden).

    "choices": cross-entropy over the letters' scores, see `choice_loss`. "vocabulary":
    over all tokens, with the plain letter of the most probable choice as the label.
    """
    targets = batch["targets"].to(session.device, non_blocking=True)
    present = batch["present"].to(session.device, non_blocking=True)
    if session.config.loss == "vocabulary":
        plain_letters = [variants[0] for variants in session.letter_token_ids]
        tokens = torch.tensor(plain_letters, device=session.device)
        logits = session.model.get_output_embeddings()(states).float()
        return torch.nn.functional.cross_entropy(logits, tokens[targets.argmax(-1)])
    scores = answer_scores(session, states)
    return choice_loss(scores, targets, present, session.config.label_smoothing)


def out_of_memory_error(cause: Exception) -> RuntimeError:
    """The error that says what to do when not even one question fits into the GPU's memory."""
    remedy = "set max_pixels=400 * 32 * 32, gradient_checkpointing=True or a smaller model_id"
    return RuntimeError(
        f"Out of GPU memory with one question per forward pass: {remedy}. Cause: {cause}"
    )


def in_halves(work: Callable, rows: pd.DataFrame) -> list:
    """`work(rows)`, a list with a result for each row; in halves where memory runs out.

    RuntimeError where one row is too much.
    """
    try:
        return work(rows)
    except torch.OutOfMemoryError as error:
        if len(rows) == 1:
            raise out_of_memory_error(error) from error
    clear_memory(LOGGER)
    half = len(rows) // 2
    return in_halves(work, rows[:half]) + in_halves(work, rows[half:])


# === LoRA layers ==================================================================================
# Bytes that the scales of all 4-bit blocks may take on a GPU in fp32. Those of a 3B
# take 0.16 GiB: its products are so short that the GPU would wait for the launches that
# unpack the scales every time. An 8B has other use for 0.4 GiB.
MAX_UNPACKED_SCALE_BYTES = 2**28


def dequantize_weight(weight, scales: Sequence, shape: Sequence[int], dtype):
    """The frozen weight (out, in) in `dtype`.

    Without `scales`, `weight` is plain. With them it is packed in NF4, and `shape` is
    (out, in, weights in a block) and, where scales are quantised, too, (..., blocks that
    share a scale of the scales). One tensor in `scales`: each block's scale in fp32. Four:
    the scales in 8 bits, as `dequantize_scales` takes them.
    """
    if not scales:
        return weight.to(dtype)
    scale = scales[0] if len(scales) == 1 else dequantize_scales(scales, shape)
    block_size = shape[2]
    return torch.ops.bitsandbytes.dequantize_4bit(
        weight, scale, block_size, "nf4", shape[:2], dtype
    )


def dequantize_scales(scales: Sequence, shape: Sequence[int]):
    """The scale of each block of 4-bit numbers in fp32, (blocks,), out of its own 8 bits.

    `scales`: 8-bit scales (blocks,), their code book, the scale of each group of them,
    and the offset that was taken from all of them. Double quantisation of Dettmers et
    al. (2023), QLoRA.
    """
    absmax, code, group_scale, offset = scales
    group_size = shape[3]
    centred = torch.ops.bitsandbytes.dequantize_blockwise(
        absmax, group_scale, code, group_size, torch.float32
    )
    return centred + offset


def lora_linear(
    x,  # (..., in)
    dropped,  # x after dropout, (..., in); None without dropout
    lora_a,  # A, (rank, in), fp32
    lora_b,  # B, (out, rank), fp32
    scaling,  # alpha / rank, or alpha / sqrt(rank)
    weight,  # W with `scales` and `shape`, as `dequantize_weight` takes them
    bias,  # (out,), or None
    scales,
    shape,
) -> tuple:
    """W x + bias + scaling * B A dropped, (..., out), and A dropped, (rows, rank).

    Both are in the number format of x; `rows` counts x's vectors.
    """
    rows = x.flatten(0, -2)
    adapter_rows = rows if dropped is None else dropped.flatten(0, -2)
    inner = adapter_rows @ lora_a.to(x.dtype).T
    # The dequantised weight gets no name: its memory is free again after this product.
    result = torch.nn.functional.linear(
        rows, dequantize_weight(weight, scales, shape, x.dtype), bias
    )
    result.addmm_(inner, lora_b.to(x.dtype).T, alpha=scaling)
    # No view, which would remember what it views: torch.compile would compile once more for it.
    return torch.ops.aten._unsafe_view(result, [*x.shape[:-1], result.shape[-1]]), inner


def lora_backward(
    gradient,  # of the output, (..., out)
    used,  # what went through A: x, or its dropped copy, (..., in)
    inner,  # A used, (rows, rank)
    lora_a,  # (rank, in), fp32
    lora_b,  # (out, rank), fp32
    scaling,
    weight,  # W with `scales` and `shape`, as `dequantize_weight` takes them
    scales,
    shape,
    dropout,  # whether `used` is a dropped copy
) -> tuple:
    """Gradients of x and of its dropped copy, (..., in), and in fp32 of A and B.

    Without dropout the second is empty, and x's holds what comes through A, too.
    """
    rows = gradient.flatten(0, -2)
    # With beta=0 addmm ignores this operand: it scales the product in the same kernel.
    ignored = rows.new_empty(1)
    inner_gradient = torch.addmm(ignored, rows, lora_b.to(rows.dtype), beta=0, alpha=scaling)
    to_x = rows @ dequantize_weight(weight, scales, shape, rows.dtype)
    if dropout:
        to_dropped = (inner_gradient @ lora_a.to(rows.dtype)).view_as(used)
    else:
        to_dropped = rows.new_empty(0)
        to_x.addmm_(inner_gradient, lora_a.to(rows.dtype))
    to_a = inner_gradient.T @ used.flatten(0, -2)
    to_b = torch.addmm(ignored, rows.T, inner, beta=0, alpha=scaling)
    return to_x.view_as(used), to_dropped, to_a.float(), to_b.float()


def _save_for_lora_backward(ctx, inputs, output) -> None:
    """Keep what `_run_lora_backward` needs of `lora_linear`'s inputs and output."""
    x, dropped, lora_a, lora_b, scaling, weight, _, scales, shape = inputs
    _, inner = output
    ctx.scaling = scaling
    ctx.shape = shape
    ctx.dropout = dropped is not None
    used = dropped if ctx.dropout else x
    ctx.save_for_backward(used, inner, lora_a, lora_b, weight, *scales)


def _run_lora_backward(ctx, gradient, _):
    """One gradient for each input of `lora_linear`; None for those that are not trained."""
    used, inner, lora_a, lora_b, weight, *scales = ctx.saved_tensors
    to_x, to_dropped, to_a, to_b = torch.ops.vqa.lora_backward(
        gradient.contiguous(),
        used,
        inner,
        lora_a,
        lora_b,
        ctx.scaling,
        weight,
        scales,
        ctx.shape,
        ctx.dropout,
    )
    return (
        to_x,
        to_dropped if ctx.dropout else None,
        to_a,
        to_b,
        None,  # scaling
        None,  # weight
        None,  # bias
        [None] * len(scales),
        None,  # shape
    )


LORA_SCHEMA = (
    "(Tensor x, Tensor? dropped, Tensor lora_a, Tensor lora_b, float scaling, "
    "Tensor weight, Tensor? bias, Tensor[] scales, int[] shape) -> (Tensor, Tensor)"
)
LORA_BACKWARD_SCHEMA = (
    "(Tensor gradient, Tensor used, Tensor inner, Tensor lora_a, Tensor lora_b, float scaling, "
    "Tensor weight, Tensor[] scales, int[] shape, bool dropout) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _empty_lora_outputs(x, dropped, lora_a, lora_b, scaling, weight, bias, scales, shape):
    """Outputs of `lora_linear` by shape only, for torch.compile to plan with."""
    row_count = math.prod(x.shape[:-1])
    result = x.new_empty(*x.shape[:-1], len(lora_b))
    inner = x.new_empty(row_count, len(lora_a))
    return result, inner


def _empty_lora_gradients(
    gradient, used, inner, lora_a, lora_b, scaling, weight, scales, shape, dropout
):
    """Outputs of `lora_backward` by shape only, for torch.compile to plan with."""
    to_dropped = torch.empty_like(used) if dropout else used.new_empty(0)
    to_a = torch.empty_like(lora_a, dtype=torch.float32)
    to_b = torch.empty_like(lora_b, dtype=torch.float32)
    return torch.empty_like(used), to_dropped, to_a, to_b


@functools.cache
def register_lora_operators() -> None:
    """Make `lora_linear` and `lora_backward` operators of torch, named vqa::...

    torch.compile calls an operator as it is, so that it keeps no dequantised weight.
    """
    forward = torch.library.custom_op(
        "vqa::lora_linear", lora_linear, mutates_args=(), schema=LORA_SCHEMA
    )
    forward.register_fake(_empty_lora_outputs)
    forward.register_autograd(_run_lora_backward, setup_context=_save_for_lora_backward)
    backward = torch.library.custom_op(
        "vqa::lora_backward", lora_backward, mutates_args=(), schema=LORA_BACKWARD_SCHEMA
    )
    backward.register_fake(_empty_lora_gradients)


def lora_operands(layer) -> tuple:
    """What `lora_linear` takes behind its inputs, of a PEFT layer that `use_fast_lora` changed."""
    base = layer.base_layer
    if layer.packed_shape:
        weight = layer.packed
        scales = [getattr(layer, name) for name in layer.scale_names]
        shape = layer.packed_shape
    else:
        weight = base.weight
        scales = []
        shape = [*weight.shape]
    return (
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.scaling["default"],
        weight,
        base.bias,
        scales,
        shape,
    )


def dropout_rate(layer) -> float:
    """The share that a PEFT layer drops of its input now: 0 in scoring."""
    dropout = layer.lora_dropout["default"]
    drops = layer.training and isinstance(dropout, torch.nn.Dropout)
    return dropout.p if drops else 0.0


def lora_forward(layer, x):
    """W x + bias + scaling * B A dropout(x), (..., out), of a PEFT layer and x (..., in).

    As PEFT's own layer (Hu et al. 2021, LoRA), but without its fp32 copies of x.
    """
    dropped = layer.lora_dropout["default"](x) if dropout_rate(layer) else None
    result, _ = torch.ops.vqa.lora_linear(x, dropped, *lora_operands(layer))
    return result


@functools.cache
def fast_lora_class(kind: type) -> type:
    """The subclass of a PEFT layer's class that computes `lora_forward`.

    One class for all layers of a kind, because torch.compile then traces it once.
    """
    return type(f"Fast{kind.__name__}", (kind,), {"forward": lora_forward})


def _is_nf4(state) -> bool:
    """Whether bitsandbytes' `quant_state` of a weight, or None, is NF4."""
    return state is not None and state.quant_type == "nf4"


def _add_packed_weight(layer, state, unpack_scales: bool) -> None:
    """Give a layer its NF4 weight and scales as plain buffers, for `lora_forward`.

    `unpack_scales`: keep 8-bit scales in fp32, instead of what they are computed from.
    """
    layer.packed_shape = [*state.shape, state.blocksize]
    scales = {"scale": state.absmax}
    if state.nested:
        layer.packed_shape.append(state.state2.blocksize)
        scales = {
            "absmax": state.absmax,
            "code": state.state2.code,
            "group_scale": state.state2.absmax,
            "offset": state.offset,
        }
        if unpack_scales:
            scales = {"scale": dequantize_scales([*scales.values()], layer.packed_shape)}
    layer.scale_names = tuple(scales)
    packed = layer.base_layer.weight.detach().as_subclass(torch.Tensor)
    for name, tensor in {"packed": packed, "nf4_values": state.code, **scales}.items():
        layer.register_buffer(name, tensor, persistent=False)


def use_fast_lora(adapted) -> None:
    """Let all LoRA layers of a PEFT model compute `lora_forward`, each by its own kind.

    Their weights and files stay PEFT's. Layers of another kind than NF4 and unquantised
    stay as they are, and the log says so.
    """
    register_lora_operators()
    kind = peft.tuners.lora.LoraLayer
    layers = [layer for layer in adapted.modules() if isinstance(layer, kind)]
    states = [getattr(layer.base_layer.weight, "quant_state", None) for layer in layers]
    nested = [state for state in states if _is_nf4(state) and state.nested]
    blocks = sum(state.absmax.numel() for state in nested)
    unpack_scales = 4 * blocks <= MAX_UNPACKED_SCALE_BYTES  # 4 bytes a scale in fp32
    plain_dtypes = (torch.float32, torch.float16, torch.bfloat16)
    others = Counter()
    for layer, state in zip(layers, states, strict=True):
        base_kind = type(layer.base_layer)
        if _is_nf4(state):
            _add_packed_weight(layer, state, unpack_scales)
        elif base_kind is torch.nn.Linear and layer.base_layer.weight.dtype in plain_dtypes:
            layer.packed_shape = []
        else:
            # 8-bit, FP8, FP4: only their own layer knows what they mean.
            others[base_kind.__name__] += 1
            continue
        layer.__class__ = fast_lora_class(type(layer))
    for name, count in others.items():
        LOGGER.info("Decision: %d %s layers of PEFT stay as they are", count, name)


# === Remade activations ===========================================================================
# A decoder layer's backward pass needs many tensors that norms, rotary positions, activation
# functions and dropout make of a few others in next to no time. Here it keeps those few: the
# layer's input, q, k, v, what attention returns, the input of the second norm, gate and up. All
# others are made again when they are needed. Autograd sees three steps: before attention,
# attention, after attention. The first and the last have a backward pass of their own, that adds
# gradients up in autograd's order: then they are those of the plain layer to the last bit.
def draw_seed(device):
    """A seed for `drop`, a tensor () of int32, out of torch's own generator of that device."""
    return torch.randint(2**31 - 1, (), dtype=torch.int32, device=device)


def scatter_bits(numbers):
    """Whole numbers (int32), one for one, as if they were random.

    Chris Wellons' "lowbias32": a changed bit of a number changes each bit of the result in half
    of all cases. It is a product of shifts and factors, which torch.compile puts into the kernel
    of what comes before and behind it.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        # int32 shifts its sign in from the left: those bits are masked out.
        numbers = (numbers ^ ((numbers >> shift) & (2 ** (32 - shift) - 1))) * factor
    return numbers ^ ((numbers >> 16) & 0xFFFF)


def survives_dropout(x, rate: float, seed):
    """Which numbers of x dropout keeps, as booleans: the same ones whenever the seed is the same.

    Each is dropped with a probability of `rate`. A seed on the CPU while x is on a GPU says that
    nothing is compiled: then a generator of torch is faster than a kernel for each product.
    """
    if seed.device != x.device:
        generator = torch.Generator(x.device).manual_seed(int(seed))
        kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        return kept.bernoulli_(1 - rate, generator=generator)
    places = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    numbers = scatter_bits(scatter_bits(places) + seed)
    return (numbers & (2**31 - 1)) >= int(rate * 2**31)


def drop(x, rate: float, seed):
    """x after dropout (Srivastava et al. 2014), or its gradient out of that of what is left."""
    return torch.where(survives_dropout(x, rate, seed), x / (1 - rate), 0.0)


def unpack_nf4(packed, values, scales: Sequence, shape: Sequence[int], dtype):
    """As `dequantize_weight`, in steps that torch.compile makes one kernel of; NF4's 16 `values`.

    bitsandbytes' own operator has more to do on the CPU than this has on a fast GPU.
    """
    device = packed.device
    shifts = 4 - 4 * torch.arange(2, dtype=torch.int32, device=device)
    codes = (packed.view(-1, 1).int() >> shifts) & 15  # the upper half first
    if len(scales) == 1:
        block_scale = scales[0]
    else:
        absmax, code, group_scale, offset = scales
        group = torch.arange(absmax.numel(), device=device) // shape[3]
        block_scale = code[absmax.int()] * group_scale[group] + offset
    blocks = values[codes].view(-1, shape[2])
    return (blocks * block_scale[:, None]).to(dtype).view(shape[0], shape[1])


LORA_LIBRARY = "vqa_frugal"


@functools.cache
def register_frugal_operators() -> object:
    """`lora_linear` and `lora_backward` as operators of torch without autograd.

    Those that know autograd take twice as long to call.
    """
    library = torch.library.Library(LORA_LIBRARY, "DEF")
    operators = (
        ("lora_linear", LORA_SCHEMA, lora_linear, _empty_lora_outputs),
        ("lora_backward", LORA_BACKWARD_SCHEMA, lora_backward, _empty_lora_gradients),
    )
    for name, schema, compute, empty in operators:
        library.define(name + schema)
        library.impl(name, compute, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{LORA_LIBRARY}::{name}", empty)
    return library  # what is registered ends with it


def adapters_of(linears: Sequence, dtype) -> list:
    """(A, B) of each of the LoRA layers in `dtype`; compiled it is one kernel for all of them."""
    parameters = []
    for linear in linears:
        parameters += lora_operands(linear)[:2]
    flat = torch.cat([parameter.flatten() for parameter in parameters]).to(dtype)
    parts = flat.split([parameter.numel() for parameter in parameters])
    shaped = [part.view_as(own) for part, own in zip(parts, parameters, strict=True)]
    return [*zip(shaped[::2], shaped[1::2], strict=True)]


def _frozen_operands(linear, dtype) -> tuple:
    """What follows A and B in `lora_operands`, with the weight in `dtype`, out of its 4 bits."""
    _, _, scaling, weight, bias, scales, shape = lora_operands(linear)
    if scales and torch.compiler.is_compiling():
        weight = unpack_nf4(weight, linear.nf4_values, scales, shape, dtype)
    else:
        weight = dequantize_weight(weight, scales, shape, dtype)
    return scaling, weight, bias, [], shape[:2]


def _lora_outputs(linears: Sequence, adapters: Sequence, x, seed) -> tuple[list, list]:
    """Of each of the LoRA layers, which `use_fast_lora` has changed: output, and A dropped x.

    `adapters` of `adapters_of`. Dropout's seed is `seed` for the first one, and one more for each
    further one.
    """
    outputs = []
    inners = []
    for number, (linear, adapter) in enumerate(zip(linears, adapters, strict=True)):
        rate = dropout_rate(linear)
        dropped = drop(x, rate, seed + number) if rate else None
        operands = (*adapter, *_frozen_operands(linear, x.dtype))
        output, inner = torch.ops.vqa_frugal.lora_linear(x, dropped, *operands)
        outputs.append(output)
        inners.append(inner)
    return outputs, inners


def _lora_gradients(
    linears: Sequence, adapters: Sequence, gradients: Sequence, x, seed, inners: Sequence
) -> tuple:
    """Gradient of the input x that the LoRA layers share, and a list of those of A, B, A, B, ...

    `gradients` of their outputs, in the layers' order; the others as in `_lora_outputs`.
    """
    to_x = None
    to_parameters = []
    # From the last layer to the first, as autograd goes.
    for number in reversed(range(len(linears))):
        linear = linears[number]
        scaling, weight, _, scales, shape = _frozen_operands(linear, x.dtype)
        rate = dropout_rate(linear)
        used = drop(x, rate, seed + number) if rate else x
        to_input, to_dropped, to_a, to_b = torch.ops.vqa_frugal.lora_backward(
            gradients[number],
            used,
            inners[number],
            *adapters[number],
            scaling,
            weight,
            scales,
            shape,
            rate > 0,
        )
        to_x = to_input if to_x is None else to_x + to_input
        if rate:
            to_x = to_x + drop(to_dropped, rate, seed + number)
        to_parameters = [to_a, to_b, *to_parameters]
    return to_x, to_parameters


def rms_norm_backward(norm, gradient, x, residual_gradient=None):
    """Gradient of x through `norm`, a Qwen model's RMSNorm, plus what x has from elsewhere."""
    wide = x.float()
    root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    to_normed = (gradient * norm.weight).float()
    to_root = (to_normed * wide).sum(-1, keepdim=True)
    to_mean = -0.5 * to_root * root.pow(3) / x.shape[-1]
    as_factor = to_normed * root
    through_root = to_mean * (2 * wide)
    if residual_gradient is None:
        return (as_factor + through_root).to(x.dtype)
    if x.dtype == torch.float32:  # no copy in fp32: autograd adds all three to the same sum
        return residual_gradient + as_factor + through_root
    return residual_gradient + (as_factor + through_root).to(x.dtype)


def _split_heads(attention, projected):
    """(batch, length, heads * size) as (batch, length, heads, size)."""
    return projected.view(*projected.shape[:-1], -1, attention.head_dim)


def rotated_heads(attention, norm, projected, cos, sin):
    """Queries or keys as attention takes them, (batch, heads, length, size).

    `projected` (batch, length, heads * size), normed by `norm` if there is one; `cos` and `sin`
    (batch, length, size) of rotary positions (Su et al. 2021, RoFormer).
    """
    heads = _split_heads(attention, projected)
    if norm is not None:
        heads = norm(heads)
    heads = heads.transpose(1, 2)
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return heads * cos[:, None] + turned * sin[:, None]


def rotated_heads_backward(attention, norm, gradient, projected, cos, sin):
    """Gradient of `projected` in `rotated_heads`."""
    first, second = (gradient * sin[:, None]).chunk(2, dim=-1)
    to_heads = gradient * cos[:, None] + torch.cat([second, -first], dim=-1)
    to_heads = to_heads.transpose(1, 2)
    if norm is not None:
        to_heads = rms_norm_backward(norm, to_heads, _split_heads(attention, projected))
    return to_heads.flatten(2)


def rotate(attention, projected_q, projected_k, cos, sin) -> tuple:
    """Queries and keys as attention takes them; see `rotated_heads`."""
    q = rotated_heads(attention, getattr(attention, "q_norm", None), projected_q, cos, sin)
    k = rotated_heads(attention, getattr(attention, "k_norm", None), projected_k, cos, sin)
    return q, k


def _inputs_of_attention(layer) -> list:
    """Its LoRA layers before attention: q, k and v."""
    attention = layer.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def before_attention(layer, x, cos, sin, seed) -> tuple:
    """From the layer's input: q and k as attention takes them; q, k and v as projected; inners."""
    normed = layer.input_layernorm(x)
    linears = _inputs_of_attention(layer)
    adapters = adapters_of(linears, x.dtype)
    projected, inners = _lora_outputs(linears, adapters, normed, seed)
    q, k = rotate(layer.self_attn, *projected[:2], cos, sin)
    return q, k, projected, inners


def before_attention_backward(
    layer,
    to_residual,  # gradient that the layer's input has from behind attention
    to_q,  # of q, k and v as attention takes them
    to_k,
    to_v,
    x,  # the layer's input
    projected_q,
    projected_k,
    cos,
    sin,
    seed,
    inners,
) -> tuple:
    """Gradient of the layer's input x, and a list of those of A and B of q, k and v."""
    attention = layer.self_attn
    q_norm = getattr(attention, "q_norm", None)
    k_norm = getattr(attention, "k_norm", None)
    gradients = [
        rotated_heads_backward(attention, q_norm, to_q, projected_q, cos, sin),
        rotated_heads_backward(attention, k_norm, to_k, projected_k, cos, sin),
        to_v.transpose(1, 2).flatten(2),
    ]
    norm = layer.input_layernorm
    linears = _inputs_of_attention(layer)
    adapters = adapters_of(linears, x.dtype)
    to_normed, to_parameters = _lora_gradients(linears, adapters, gradients, norm(x), seed, inners)
    return rms_norm_backward(norm, to_normed, x, to_residual), to_parameters


def is_mixture(layer) -> bool:
    """Whether the layer's MLP is a mixture of experts, which is left to autograd."""
    return not hasattr(layer.mlp, "gate_proj")


def _linears_behind_attention(layer) -> list:
    """Its LoRA layers behind attention, but for those of a mixture of experts."""
    o_proj = layer.self_attn.o_proj
    if is_mixture(layer):
        return [o_proj]
    return [o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]


# Dropout's seeds: o has the step's own, gate and up the next two, down the one behind.
SEED_OF_GATE = 1
SEED_OF_DOWN = 3


def after_attention(layer, residual, attended, seed) -> tuple:
    """The layer's output; the input of its second norm, gate and up; inners of o, gate, up, down.

    Of a mixture of experts: the input of the second norm, three times None, and o's inner.
    """
    adapters = adapters_of(_linears_behind_attention(layer), attended.dtype)
    (o,), of_o = _lora_outputs([layer.self_attn.o_proj], adapters[:1], attended, seed)
    middle = residual + o
    if is_mixture(layer):
        return middle, None, None, None, of_o
    mlp = layer.mlp
    normed = layer.post_attention_layernorm(middle)
    linears = [mlp.gate_proj, mlp.up_proj]
    (gate, up), of_inputs = _lora_outputs(linears, adapters[1:3], normed, seed + SEED_OF_GATE)
    product = mlp.act_fn(gate) * up
    (down,), of_down = _lora_outputs([mlp.down_proj], adapters[3:], product, seed + SEED_OF_DOWN)
    return middle + down, middle, gate, up, [*of_o, *of_inputs, *of_down]


def mlp_backward(layer, adapters, gradient, middle, gate, up, seed, inners) -> tuple:
    """Gradient of `middle` in `after_attention`, and a list of those of the MLP's A and B."""
    mlp = layer.mlp
    active = mlp.act_fn(gate)
    to_product, of_down = _lora_gradients(
        [mlp.down_proj], adapters[2:], [gradient], active * up, seed + SEED_OF_DOWN, inners[2:]
    )
    to_gate = torch.ops.aten.silu_backward(to_product * up, gate)
    to_up = to_product * active
    norm = layer.post_attention_layernorm
    linears = [mlp.gate_proj, mlp.up_proj]
    to_normed, of_inputs = _lora_gradients(
        linears, adapters[:2], [to_gate, to_up], norm(middle), seed + SEED_OF_GATE, inners[:2]
    )
    return rms_norm_backward(norm, to_normed, middle, gradient), [*of_inputs, *of_down]


def after_attention_backward(layer, gradient, attended, middle, gate, up, seed, inners) -> tuple:
    """Gradients of `residual` and `attended`, and a list of those of A and B, in order."""
    adapters = adapters_of(_linears_behind_attention(layer), attended.dtype)
    of_mlp = []
    if not is_mixture(layer):
        gradient, of_mlp = mlp_backward(
            layer, adapters[1:], gradient, middle, gate, up, seed, inners[1:]
        )
    o_proj = layer.self_attn.o_proj
    to_attended, of_o = _lora_gradients(
        [o_proj], adapters[:1], [gradient], attended, seed, inners[:1]
    )
    return gradient, to_attended, [*of_o, *of_mlp]


# === Frugal layers ================================================================================
# The decoder layers whose passes these are. What others compute is not looked into.
FRUGAL_LAYERS = (
    "Qwen2_5_VLDecoderLayer",
    "Qwen3VLTextDecoderLayer",
    "Qwen3VLMoeTextDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
)


@dataclass(frozen=True)
class LayerSteps:
    """The functions above that a layer calls, as they are or compiled."""

    before: Callable
    before_backward: Callable
    after: Callable
    after_backward: Callable
    rotate: Callable
    is_compiled: bool

    @classmethod
    def prepared(cls, prepare: Callable, is_compiled: bool) -> LayerSteps:
        """Each step as `prepare` returns it, which compiles it or not."""
        return cls(
            is_compiled=is_compiled,
            before=prepare(before_attention),
            before_backward=prepare(before_attention_backward),
            after=prepare(after_attention),
            after_backward=prepare(after_attention_backward),
            rotate=prepare(rotate),
        )

    def draw_seed(self, device):
        """A seed for dropout, where the steps read it: see `survives_dropout`."""
        return draw_seed(device if self.is_compiled else "cpu")


def _save(ctx, tensors: Sequence, inners: Sequence) -> None:
    """Keep a step's tensors and the inners of its LoRA layers."""
    ctx.tensors = len(tensors)
    ctx.save_for_backward(*tensors, *inners)


def _saved(ctx) -> list:
    """What `_save` has kept: each tensor, then the list of inners."""
    saved = ctx.saved_tensors
    return [*saved[: ctx.tensors], [*saved[ctx.tensors :]]]


def _run_before(ctx, layer, steps, x, cos, sin, *_):
    """x for the sum behind attention; q, k and v for attention; q and k as projected."""
    seed = steps.draw_seed(x.device)
    q, k, projected, inners = steps.before(layer, x, cos, sin, seed)
    projected_q, projected_k, projected_v = projected
    ctx.layer = layer
    ctx.steps = steps
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(projected_q, projected_k)
    _save(ctx, [x, projected_q, projected_k, cos, sin, seed], inners)
    v = _split_heads(layer.self_attn, projected_v).transpose(1, 2)
    return x.view_as(x), q, k, v, projected_q, projected_k


def _run_before_backward(ctx, to_residual, to_q, to_k, to_v, *_):
    """One gradient for each input of `_run_before`; None for those that are not trained."""
    to_x, to_parameters = ctx.steps.before_backward(
        ctx.layer, to_residual, to_q, to_k, to_v, *_saved(ctx)
    )
    return None, None, to_x, None, None, *to_parameters


def _run_after(ctx, layer, steps, residual, attended, *_):
    """The layer's output, or of a mixture of experts the input of its second norm."""
    seed = steps.draw_seed(attended.device)
    output, middle, gate, up, inners = steps.after(layer, residual, attended, seed)
    ctx.layer = layer
    ctx.steps = steps
    # Detached it is no view, as it is none in a layer that recomputes: one compilation for both.
    _save(ctx, [attended.detach(), middle, gate, up, seed], inners)
    return output


def _run_after_backward(ctx, gradient):
    """One gradient for each input of `_run_after`; None for those that are not trained."""
    to_residual, to_attended, to_parameters = ctx.steps.after_backward(
        ctx.layer, gradient, *_saved(ctx)
    )
    return None, None, to_residual, to_attended, *to_parameters


@functools.cache
def _autograd_step(name: str) -> type:
    """The step "before" or "after" attention as a function of autograd's."""
    forward, backward = {
        "before": (_run_before, _run_before_backward),
        "after": (_run_after, _run_after_backward),
    }[name]
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def _lora_parameters(linears: Sequence) -> list:
    """A, B of each layer."""
    parameters = []
    for linear in linears:
        parameters += lora_operands(linear)[:2]
    return parameters


def _repeat_heads(heads, times: int):
    """Each of the heads (batch, heads, length, size) so many times, for as many queries."""
    if times == 1:
        return heads
    return heads[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


def _attend(attention, q, k, v, mask):
    """Attention's output (batch, length, heads * size), as transformers computes it by SDPA."""
    output = torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=attention.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output.transpose(1, 2).flatten(2)


@contextlib.contextmanager
def remaking(tensors: Sequence, remake: Callable) -> Iterator[None]:
    """Within, autograd keeps none of `tensors`: `remake()` returns them all when it needs one."""
    numbers = {}
    for number, tensor in enumerate(tensors):
        numbers[tensor.data_ptr(), tensor.shape, tensor.stride()] = number
    remade = {}

    def pack(tensor):
        return numbers.get((tensor.data_ptr(), tensor.shape, tensor.stride()), tensor)

    def unpack(kept):
        if not isinstance(kept, int):
            return kept
        if kept not in remade:
            remade.update(enumerate(remake()))
        return remade.pop(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def frugal_forward(
    steps: LayerSteps, layer, hidden_states, position_embeddings, attention_mask=None, **_
):
    """The pass of a decoder layer that keeps little for its backward pass.

    Where the layer's `recompute` is set, it runs in torch's checkpointing, which must see all that
    attention keeps, and drops it.
    """
    attention = layer.self_attn
    cos, sin = position_embeddings
    residual, q, k, v, projected_q, projected_k = _autograd_step("before").apply(
        layer,
        steps,
        hidden_states,
        cos,
        sin,
        *_lora_parameters(_inputs_of_attention(layer)),
    )
    # Under a mask the fast kernels take as many keys as queries.
    times = 1 if attention_mask is None else q.shape[1] // k.shape[1]
    keys = _repeat_heads(k, times)
    values = _repeat_heads(v, times)

    def remake() -> list:
        """Queries, keys and values as attention had them."""
        with torch.no_grad():
            again_q, again_k = steps.rotate(attention, projected_q, projected_k, cos, sin)
            return [again_q, _repeat_heads(again_k, times), _repeat_heads(plain_v, times)]

    plain_v = v.detach()
    remakes = not layer.recompute
    with remaking([q, keys, values], remake) if remakes else contextlib.nullcontext():
        attended = _attend(attention, q, keys, values, attention_mask)
    parameters = _lora_parameters(_linears_behind_attention(layer))
    states = _autograd_step("after").apply(layer, steps, residual, attended, *parameters)
    if is_mixture(layer):
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    return states


def has_known_pass(layer) -> bool:
    """Whether `frugal_forward` can compute what this decoder layer does, once it has our LoRA."""
    if type(layer).__name__ not in FRUGAL_LAYERS:
        return False
    config = layer.self_attn.config
    uses_sdpa = config._attn_implementation in ("sdpa", None)  # None: before it is loaded
    return uses_sdpa and config.hidden_act == "silu" and not config.attention_dropout


def is_frugal(layer) -> bool:
    """Whether `frugal_forward` computes what this decoder layer does: it has a LoRA of ours."""
    if not has_known_pass(layer):
        return False
    linears = [*_inputs_of_attention(layer), *_linears_behind_attention(layer)]
    return all(hasattr(linear, "packed_shape") for linear in linears)


def decide_frugal(session: Session) -> tuple[bool, str]:
    """Whether the layers keep little for the backward pass; with the reason.

    On a CPU they do not: there memory is not short, and what is made again takes time.
    """
    if session.device.type != "cuda":
        return False, "layers keep all activations: not on a GPU"
    if not all(is_frugal(layer) for layer in session.decoder_layers):
        return False, "layers keep all activations: they are not all of a kind that needs few"
    return True, "layers keep few activations and make the others again"


# === Fast layers ==================================================================================
def forward_with_checkpointing(layer, compute: Callable, train: Callable, hidden_states, **options):
    """The pass of a decoder layer: in scoring by `compute`, in training by `train`.

    Each is its own forward, that compiled, or `frugal_forward`.
    Where the layer's `recompute` is set, its activations are not kept: they are
    computed again in the backward pass (Chen et al. 2016, gradient checkpointing).
    """
    if not layer.training:
        return compute(layer, hidden_states, **options)
    if not hidden_states.requires_grad:
        # The first layer like the others: one trace for all.
        hidden_states = hidden_states.detach().requires_grad_()
    if not layer.recompute:
        return train(layer, hidden_states, **options)
    return torch.utils.checkpoint.checkpoint(
        train, layer, hidden_states, use_reentrant=False, **options
    )


def decide_compile(wish: str, device: str, questions: int) -> tuple[bool, str]:
    """Whether torch.compile pays on `questions` questions to come; with the reason.

    `wish` is the setting: "on", "off" or "auto".

    >>> decide_compile("auto", "cpu", 10_000)
    (False, 'torch.compile off: it needs a GPU, triton and a C compiler')
    """
    if wish != "auto":
        return wish == "on", f"torch.compile {wish}: set in the config, or by the model's family"
    can_compile = (
        device == "cuda"
        and importlib.util.find_spec("triton") is not None
        and shutil.which("gcc") is not None
    )
    if not can_compile:
        return False, "torch.compile off: it needs a GPU, triton and a C compiler"
    if questions < 2000:
        return False, f"torch.compile off: {questions} questions take less time than compiling"
    return True, f"torch.compile on: {questions} questions to come"


def _set_up_compiler() -> None:
    """Set torch.compile's options for this thread; newer versions of torch keep them by thread."""
    # The floats are constants of a layer; what changes are lengths.
    torch._dynamo.config.specialize_float = True
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
    # Kinds of layers, of their weights and of masks, in training and in scoring: the usual 8
    # would leave the last ones as they are.
    torch._dynamo.config.cache_size_limit = 64


def _compile_forward(forward: Callable) -> Callable:
    """A decoder layer's forward, compiled once for all layers and lengths."""
    _set_up_compiler()
    # Sets the number in autograd's thread, too: else it would compile once more.
    torch.set_num_threads(torch.get_num_threads())
    return torch.compile(forward, dynamic=True)


_COMPILER_OF_THREAD = threading.local()


def _compile_step(step: Callable) -> Callable:
    """The same of one of `LayerSteps`, which a GPU's backward pass calls in a thread of its own."""
    compiled = _compile_forward(step)

    def call(*arguments):
        if not hasattr(_COMPILER_OF_THREAD, "is_set_up"):
            _set_up_compiler()
            _COMPILER_OF_THREAD.is_set_up = True
        return compiled(*arguments)

    return call


def use_fast_layers(session: Session, adapted, questions: int):
    """`adapted`, the PEFT model, computing `lora_forward` in compiled decoder layers.

    They are compiled only where `decide_compile` says that it pays for `questions` questions to
    come. All layers keep their activations until `recompute_layers` says otherwise.
    """
    use_fast_lora(adapted)
    wish = session.config.compile_layers if session.family.is_compiled else "off"
    is_compiled, reason = decide_compile(wish, session.device.type, questions)
    LOGGER.info("Decision: %s", reason)
    compute = type(session.decoder_layers[0]).forward
    if is_compiled:
        compute = _compile_forward(compute)
    train = compute
    is_frugal_model, reason = decide_frugal(session)
    LOGGER.info("Decision: %s", reason)
    if is_frugal_model:
        prepare = _compile_step if is_compiled else lambda step: step
        register_frugal_operators()
        steps = LayerSteps.prepared(prepare, is_compiled)
        train = functools.partial(frugal_forward, steps)
    for layer in session.decoder_layers:
        forward = functools.partial(forward_with_checkpointing, layer, compute, train)
        # On several GPUs accelerate's forward fetches the inputs, then calls the one it
        # found. On one GPU a 4-bit model has it too, and there is nothing to fetch.
        if session.config.spread_model and hasattr(layer, "_hf_hook"):
            layer._old_forward = forward
        else:
            layer.forward = forward
        layer.recompute = False
    return adapted


# === Memory plan ==================================================================================
@dataclass(frozen=True)
class MemoryPlan:
    """How a training step is spread over passes; chosen by `plan_memory`."""

    micro_batch: int  # questions per forward and backward pass
    # So many decoder layers, the last ones, keep their activations; those before recompute them.
    stored_layers: int
    # GiB allocated at the expected peak; 0 on a CPU, where nothing is measured.
    peak_gib: float = 0.0


@dataclass(frozen=True)
class PassCosts:
    """What one forward and backward pass takes, in bytes; measured by `measured_candidates`.

    A pass takes fixed + questions * (question + max(1, stored_layers) * stored_layer). The
    1 is the layer that is being recomputed: one at a time holds its activations again.
    """

    fixed: float  # bytes for any number of questions
    question: float  # bytes for each question, beside its stored layers
    stored_layer: float  # bytes for each question and each layer that keeps its activations


def recompute_layers(session: Session, stored: int) -> None:
    """Let all decoder layers but the last `stored` recompute their activations."""
    # The last ones keep theirs, because the backward pass frees them before it needs
    # room to compute others again.
    recomputed = len(session.decoder_layers) - stored
    for number, layer in enumerate(session.decoder_layers):
        layer.recompute = number < recomputed


def candidate_plans(
    costs: PassCosts, budget: float, layers: int, step: int, recompute: bool
) -> list[tuple[int, int]]:
    """(micro_batch, stored_layers) of the plans that fit into `budget` bytes.

    The `step` questions of an optimizer step are taken in 1, 2, 4, ... passes, each
    with as many of the `layers` stored as there is room for. Without `recompute` all
    have to be.

    >>> costs = PassCosts(fixed=10.0, question=1.0, stored_layer=0.5)
    >>> candidate_plans(costs, budget=60, layers=36, step=8, recompute=True)
    [(8, 10), (4, 23), (2, 36)]
    """
    halvings = range(step.bit_length())  # until one or two questions are left
    micro_batches = {math.ceil(step / 2**halving) for halving in halvings}
    # One question a pass is `plan_memory`'s last resort; here only a step of one has it.
    micro_batches.discard(1)
    plans = []
    for micro_batch in sorted(micro_batches, reverse=True) or [1]:
        room = budget - costs.fixed - micro_batch * costs.question
        room_in_layers = room / (micro_batch * costs.stored_layer)
        stored = min(layers, math.floor(room_in_layers))
        needed = 1 if recompute else layers  # one layer at a time is computed again anyway
        if stored >= needed:
            # With room for one layer none is stored: the one that is being recomputed takes it.
            # (A model of a single layer gets 0, too, even without `recompute`.)
            plans.append((micro_batch, stored if stored > 1 else 0))
    return plans


def measure_pass(session: Session, prompts: Sequence[Prompt], stored: int) -> tuple[float, float]:
    """Seconds, and peak bytes on the fullest GPU, of one forward and backward pass.

    All decoder layers but the last `stored` recompute. Where memory runs out, seconds
    and bytes are infinite. No gradient stays behind.
    """
    recompute_layers(session, stored)
    reset_peak_memory()
    batch = collate(session, prompts)
    batch["padded"] = True  # attention then takes a mask, as it does in training
    try:
        start = time.perf_counter()
        # The hidden states get no name, which would keep them during the backward pass.
        training_loss(session, answer_hidden_states(session, batch), batch).backward()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        gpus = range(torch.cuda.device_count())
        peak = max(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
        return seconds, peak
    except torch.OutOfMemoryError as error:
        LOGGER.info(
            "%d questions with %d stored layers do not fit: %s", len(prompts), stored, error
        )
        return math.inf, math.inf
    finally:
        session.model.zero_grad(set_to_none=True)


def measured_candidates(
    session: Session, longest: Prompt, step: int, state_bytes: int
) -> list[tuple[int, int]]:
    """(micro_batch, stored_layers) of the plans that should fit.

    From the peaks of three passes over two or four copies of the prompt `longest`. Empty
    where one of them runs out of memory (with gradient_checkpointing: one of the first
    two). `step` is as in `candidate_plans`, `state_bytes` as in `plan_memory`.
    """
    config = session.config
    layers = len(session.decoder_layers)
    stored = max(2, layers // 4)
    # The first pass compiles, and fills the workspaces of the libraries.
    measure_pass(session, [longest] * 2, 0)
    _, peak_of_two = measure_pass(session, [longest] * 2, 0)
    _, peak_of_four = measure_pass(session, [longest] * 4, 0)
    _, peak_of_stored = measure_pass(session, [longest] * 2, stored)
    # Two more questions, while one layer at a time holds what it has computed again.
    question = (peak_of_four - peak_of_two) / 2
    # Per question and per stored layer beyond the one that is held anyway. At least one
    # byte, because `candidate_plans` divides by it.
    stored_layer = max(1.0, (peak_of_stored - peak_of_two) / 2 / (stored - 1))
    most_stored = layers
    if math.isinf(peak_of_stored) and config.gradient_checkpointing:
        # Storing layers takes too much memory, as where experts are unpacked from 4 bits:
        # all layers recompute. All of a question's bytes are then counted as those of the
        # one layer that is being recomputed.
        stored_layer = question
        most_stored = 1
    if not math.isfinite(peak_of_two + peak_of_four + stored_layer):
        return []
    costs = PassCosts(
        # The peak of two questions, less what these two add.
        fixed=2 * peak_of_two - peak_of_four + state_bytes,
        # `candidate_plans` counts the layer that is computed again as a stored one.
        question=question - stored_layer,
        stored_layer=stored_layer,
    )
    recompute = config.gradient_checkpointing
    return candidate_plans(costs, memory_budget(), most_stored, step, recompute)


def plan_memory(session: Session, prompts: Sequence[Prompt], state_bytes: int) -> MemoryPlan:
    """The fastest of the plans that fit, by trying each on the longest prompt.

    The optimizer will add `state_bytes` to every peak. Nothing is measured, and the
    config's plan is taken, on a CPU, or with memory_plan="config", or with
    strict_determinism.
    """
    config = session.config
    layers = len(session.decoder_layers)
    stored_by_config = 0 if config.gradient_checkpointing else layers
    is_fixed = config.memory_plan == "config" or config.strict_determinism
    if session.device.type != "cuda" or is_fixed:
        return MemoryPlan(config.batch_size, stored_by_config)
    longest = max(prompts, key=lambda prompt: len(prompt.input_ids))
    step = math.ceil(config.batch_size * config.grad_accum_steps / process_count())
    # Questions a second; the last resort counts only where nothing else fits.
    speeds = {MemoryPlan(1, stored_by_config): 0.0}
    for micro_batch, stored in measured_candidates(session, longest, step, state_bytes):
        measure_pass(session, [longest] * micro_batch, stored)  # the allocator grows
        seconds, pass_peak = measure_pass(session, [longest] * micro_batch, stored)
        clear_memory()
        peak = pass_peak + state_bytes
        plan = MemoryPlan(micro_batch, stored, peak / 2**30)
        speed = micro_batch / seconds
        LOGGER.info("%s: %.1f questions/s", plan, speed)
        if peak < memory_budget():
            speeds[plan] = speed
    fastest = max(speeds, key=speeds.get)
    LOGGER.info("Decision: of %d questions in a step and %d layers, %s", step, layers, fastest)
    return fastest


# === Filling the vision cache =====================================================================
def vision_cache_gain(session: Session, frame: pd.DataFrame, uses: int, passes: int) -> float:
    """Share of the time, 0 to 1, that cached features save.

    Measured on at most eight rows. Only rows of `frame` that have no features yet are
    taken; 1 where all have them. Each is used `uses` times, and the language model then
    does the work of `passes` forward passes.
    """
    uncached = []
    for row in range(len(frame)):
        prompt = make_prompt(session, frame, row, [(0, 1, 2, 3)])
        if not session.vision_cache.has_all([prompt.image_key]):
            uncached.append(prompt)
        if len(uncached) == 8:
            break
    if not uncached:
        return 1.0  # another process of the process group asks
    batch = collate(session, uncached)
    with torch.inference_mode():
        for _ in range(2):  # the second one counts
            start = time.perf_counter()
            # On the CPU, as the cache holds them; copying them waits for the GPU.
            batch["features"] = [
                [tensor.cpu() for tensor in image]
                for image in session.vision_cache.compute_for_batch(batch)
            ]
            middle = time.perf_counter()
            answer_hidden_states(session, batch).cpu()
            end = time.perf_counter()
    tower_seconds = middle - start
    language_seconds = end - middle
    total_seconds = tower_seconds + passes * language_seconds
    return (1 - 1 / uses) * tower_seconds / total_seconds


def fill_vision_cache(session: Session, frame: pd.DataFrame, uses: int, passes: int) -> None:
    """Store the features of a frame's images where that saves at least 15 % of the time.

    On a GPU the gain is measured first, see `vision_cache_gain`, and the log says what
    it is. On a CPU they are always stored. What all processes of a process group do is decided
    together.
    """
    budget = pixel_budget(session.config, session.processor)
    is_cached = session.vision_cache.has_all((digest, *budget) for digest in frame["pixel_hash"])
    if session.device.type == "cuda" and any_process(not is_cached):
        gain = vision_cache_gain(session, frame, uses, passes)
        pays = gain >= 0.15
        LOGGER.info(
            "Decision: vision cache %s: it would save %.0f %% of the time",
            "on" if pays else "off",
            100 * gain,
        )
        if not any_process(pays):
            return
    if session.vision_cache.fill(frame, budget, session.progress):
        session.vision_cache.offload_tower()


# === Alignment ====================================================================================
# A model of two towers says how well a text fits an image: SigLIP (Zhai et al. 2023), SigLIP 2,
# CLIP (Radford et al. 2021). Each question with each of its choices is such a text.
ALIGNMENT_MODEL = "google/siglip2-so400m-patch14-384"
ALIGNMENT_TEXTS = 256  # in a forward pass
# Question type -> template for a Korean question, and for another. The choice comes first: the
# texts are short (64 tokens for SigLIP), and of a long one the end is cut off.
ALIGNMENT_TEMPLATES = {
    "counting": ("개수는 {choice}. {question}", "the number is {choice}. {question}"),
    "color": ("색은 {choice}. {question}", "the color is {choice}. {question}"),
    "ocr": ("{choice}라고 적혀 있다. {question}", "it reads {choice}. {question}"),
    "yesno": ("{choice}. {question}", "{choice}. {question}"),
    "location": ("위치는 {choice}. {question}", "the place is {choice}. {question}"),
    "attribute": ("모습은 {choice}. {question}", "it looks {choice}. {question}"),
    "general": ("{choice}. {question}", "{choice}. {question}"),
}
ALIGNMENT_COLUMNS = ("key", "id", "type", "question", *CHOICES, "image_path", "pixel_hash")


def alignment_statements(row: Mapping) -> list[str]:
    """The text of each choice of a question, in lower case; "" for a blank choice.

    SigLIP 2 was trained on texts in lower case.

    >>> row = {"type": "color", "question": "Which color?", "a": "Red", "b": "", "c": "", "d": ""}
    >>> alignment_statements(row)
    ['the color is red. which color?', '', '', '']
    """
    korean, other = ALIGNMENT_TEMPLATES[row["type"]]
    question = prompt_text(row["question"])
    template = korean if re.search("[가-힣]", question) else other
    statements = []
    for choice, is_present in zip(CHOICES, present_choices(row), strict=True):
        text = template.format(choice=prompt_text(row[choice]), question=question)
        statements.append(text.lower() if is_present else "")
    return statements


@dataclass(frozen=True)
class AlignmentModel:
    """A model of two towers with its processor, on this process's device."""

    model: object  # transformers' own
    processor: object  # transformers' own
    text_tokens: int  # of a text at most
    padding: str  # of texts, as the processor calls it

    def image_features(self, paths: Sequence[str]):
        """(n, width) features of image files, of length 1, in fp32."""
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(load_image, paths))
        inputs = self.processor(images=images, return_tensors="pt")
        return self._unit_features(self.model.get_image_features, inputs)

    def text_features(self, texts: Sequence[str]):
        """(n, width) features of texts, of length 1, in fp32."""
        parts = []
        for start in range(0, len(texts), ALIGNMENT_TEXTS):
            inputs = self.processor(
                text=list(texts[start : start + ALIGNMENT_TEXTS]),
                padding=self.padding,
                truncation=True,
                max_length=self.text_tokens,
                return_tensors="pt",
            )
            parts.append(self._unit_features(self.model.get_text_features, inputs))
        return torch.cat(parts)

    def _unit_features(self, tower: Callable, inputs: Mapping):
        """What a tower gives for these inputs, of length 1."""
        on_device = {}
        for name, tensor in inputs.items():
            dtype = self.model.dtype if tensor.is_floating_point() else tensor.dtype
            on_device[name] = tensor.to(self.model.device, dtype)
        features = tower(**on_device).pooler_output.float()
        return features / features.norm(dim=-1, keepdim=True)

    def logits(self, image_features, text_features):
        """(n,) logits of n images, each with its own text, as in the model's logits_per_image."""
        products = (image_features * text_features).sum(-1)
        bias = getattr(self.model, "logit_bias", None)  # SigLIP has one, CLIP has none
        logits = products * self.model.logit_scale.float().exp()
        return logits if bias is None else logits + bias.float()


def _check_two_towers(config: Config, model_config) -> None:
    """ValueError for a model that does not compare images with texts."""
    kind = transformers.MODEL_MAPPING.get(type(model_config), None)
    needed = ("get_image_features", "get_text_features")
    if not all(hasattr(kind, name) for name in needed) or not hasattr(model_config, "text_config"):
        raise ValueError(
            f"alignment_model {config.model_path} is of the family "
            f"{model_config.model_type!r}, which has no tower for images and one for texts; name a "
            f"SigLIP or CLIP model, such as {ALIGNMENT_MODEL}"
        )


def _load_alignment_model_once(config: Config, runtime: Runtime) -> AlignmentModel:
    """The model, loaded and checked; one attempt."""
    trust = config.trust_remote_code
    if not trust:
        _refuse_python_code(config.model_path)
    model_config = transformers.AutoConfig.from_pretrained(
        config.model_path, trust_remote_code=trust
    )
    _check_two_towers(config, model_config)
    model, report = transformers.AutoModel.from_pretrained(
        config.model_path,
        **_loading_options(config, runtime),
        output_loading_info=True,
    )
    _check_weight_names(config, report)
    processor = transformers.AutoProcessor.from_pretrained(
        config.model_path, trust_remote_code=trust
    )
    # SigLIP reads a text's features at the last place, behind all padding.
    is_siglip = model_config.model_type.startswith("siglip")
    return AlignmentModel(
        model=model.requires_grad_(False).eval(),
        processor=processor,
        text_tokens=model_config.text_config.max_position_embeddings,
        padding="max_length" if is_siglip else "longest",
    )


def open_alignment_model(config: Config) -> AlignmentModel:
    """The model that `config.model_id` names, to score texts beside images.

    Raises ValueError for a model without both towers, and what `load_patiently` raises.
    """
    runtime = detect_runtime(config.precision, config.attn_implementation)
    for reason in runtime.reasons:
        LOGGER.info("Decision: %s", reason)
    seed_everything(config.seed, config.deterministic, config.strict_determinism)
    with track_peak_memory("alignment model loaded"):
        return load_patiently(config, lambda: _load_alignment_model_once(config, runtime))


def align_rows_with_images(aligner: AlignmentModel, rows: pd.DataFrame) -> list[list]:
    """For each row the scores of its choices beside its image; None for a blank choice.

    Each distinct image is encoded once, in halves where memory runs out. Raises
    FloatingPointError naming a row whose score is not finite.
    """
    return in_halves(functools.partial(_align_batch, aligner), rows)


def _align_batch(aligner: AlignmentModel, rows: pd.DataFrame) -> list[list]:
    """`align_rows_with_images` in a single pass."""
    images = rows.drop_duplicates("pixel_hash")
    image_numbers = pd.Index(images["pixel_hash"]).get_indexer(rows["pixel_hash"])
    statements = [alignment_statements(row) for row in rows.to_dict("records")]
    is_present = np.array(statements) != ""  # (n, 4)
    texts = [text for of_row in statements for text in of_row if text]
    image_of_text = np.repeat(image_numbers, is_present.sum(axis=1))
    with torch.inference_mode():
        image_features = aligner.image_features(images["image_path"].tolist())
        text_features = aligner.text_features(texts)
        of_texts = image_features[torch.from_numpy(image_of_text).to(image_features.device)]
        logits = aligner.logits(of_texts, text_features).cpu().numpy()
    scores = np.full(is_present.shape, np.nan)
    scores[is_present] = logits
    is_wrong = is_present & ~np.isfinite(scores)
    if is_wrong.any():
        row = rows["id"].iloc[is_wrong.any(axis=1).argmax()]
        raise FloatingPointError(
            f"The alignment scores of row {row} are not finite; precision='fp32' may help"
        )
    return [[None if np.isnan(score) else score for score in row] for row in scores.tolist()]


def _kept_alignment(folder: Path) -> KeptResults:
    """key -> scores of every row that was aligned in this folder."""
    return KeptResults(folder / "scores.jsonl", "scores")


def fill_alignment(folder: Path, progress: Callable) -> None:
    """Score the rows that a folder asks for; its config.json names the model as model_id."""
    config = Config(**read_json(folder / "config.json"))
    rows = read_table(folder / "rows.csv", needed=ALIGNMENT_COLUMNS)
    aligner = open_alignment_model(config)
    size = config.infer_batch_size if config.use_batch_inference else 1
    # All questions on an image are in one batch, so that it is encoded once.
    number_of_image = pd.factorize(rows["pixel_hash"])[0]
    batches = [batch for _, batch in rows.groupby(number_of_image // size)]

    def align(batch: pd.DataFrame) -> list[list]:
        return align_rows_with_images(aligner, batch)

    _kept_alignment(folder).fill(batches, "key", align, progress, "alignment scores")


def _alignment_config(config: Config) -> Config:
    """The settings of the process that aligns rows: `alignment_model`, as its model_id."""
    names = (
        "precision",
        "attn_implementation",
        "use_batch_inference",
        "infer_batch_size",
        "deterministic",
        "strict_determinism",
        "log_level",
        "trust_remote_code",
    )
    settings = {name: getattr(config, name) for name in names}
    return Config(model_id=config.alignment_model, quantization="none", **settings)


def alignment_folder(config: Config) -> Path:
    """Where scores by the same model and templates are kept, below output_dir."""
    settings = _alignment_config(config)
    parts = [settings.model_id, settings.precision, settings.attn_implementation]
    parts += [settings.model_files, ALIGNMENT_TEMPLATES]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return Path(config.output_dir).resolve() / f"alignment_{digest[:12]}"


def _alignment_key(row: Mapping) -> str:
    """What a row's scores depend on: its image and its statements."""
    text = json.dumps([row["pixel_hash"], *alignment_statements(row)])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def prepare_alignment(rows: pd.DataFrame, config: Config) -> bool:
    """Write what `fill_alignment` needs; whether any row is still to be scored.

    Rows whose image cannot be used are passed over, and equal ones are scored once.
    """
    folder = alignment_folder(config)
    # A table from a run's folder has text where that of a competition has True.
    usable = rows[rows["pixel_hash"] != ""]
    keyed = usable.assign(key=[_alignment_key(row) for row in usable.to_dict("records")])
    keyed = keyed.drop_duplicates("key")[[*ALIGNMENT_COLUMNS]]
    missing = set(keyed["key"]) - set(_kept_alignment(folder).read())
    LOGGER.info("Alignment: %d of %d rows are still to be scored", len(missing), len(keyed))
    if missing:
        write_table(keyed, folder / "rows.csv")
        settings = json.dumps(dataclasses.asdict(_alignment_config(config)))
        atomic_write(folder / "config.json", settings)
    return bool(missing)


def kept_alignment_scores(rows: pd.DataFrame, config: Config) -> np.ndarray:
    """(n, 4) scores of rows that are all done: -inf for a blank choice.

    A row whose image cannot be used has the same score, 0, for each of its choices.
    """
    kept = _kept_alignment(alignment_folder(config)).read()
    scores = np.full((len(rows), len(CHOICES)), -np.inf)
    for place, row in enumerate(rows.to_dict("records")):
        of_row = [0.0] * len(CHOICES)
        if row["pixel_hash"] != "":
            of_row = kept[_alignment_key(row)]
        is_present = present_choices(row)
        scores[place, is_present] = np.array(of_row, dtype=float)[is_present]
    return scores


# ======= 4. Run ===================================================================================

# === Members ======================================================================================
# A member is one model of a run: of a fold, or of all rows, and of a seed. The folds are the same
# for all seeds. Members have numbers: those of the first seed are the numbers of their folds, and
# the model on all rows comes behind the last fold. Each further seed counts on from there.


def fold_of(config: Config, member: int) -> int:
    """The fold whose rows the member does not train on; n_folds for a model on all rows.

    >>> config = Config(n_folds=3, seeds=(42, 7))
    >>> [fold_of(config, member) for member in (0, 1, 2, 3, 4)]
    [0, 1, 2, 3, 0]
    """
    return member % (config.n_folds + 1)


def seed_of(config: Config, member: int) -> int:
    """The seed of the member's training.

    >>> config = Config(n_folds=3, seeds=(42, 7))
    >>> [seed_of(config, member) for member in (0, 2, 4, 6)]
    [42, 42, 7, 7]
    """
    return config.all_seeds[member // (config.n_folds + 1)]


def members_of(config: Config, folds: Sequence[int]) -> list[int]:
    """The members of these folds, in the order of training: first all with the first seed.

    >>> members_of(Config(n_folds=3, seeds=(42, 7)), [0, 2])
    [0, 2, 4, 6]
    """
    count = len(config.all_seeds)
    return [seed * (config.n_folds + 1) + fold for seed in range(count) for fold in folds]


def member_name(config: Config, member: int) -> str:
    """The member in words, behind "fold": its fold, and its seed where that is not the first.

    >>> config = Config(n_folds=3, seeds=(42, 7))
    >>> [member_name(config, member) for member in (1, 5)]
    ['1', '1 seed 7']
    """
    fold = fold_of(config, member)
    return str(fold) if member == fold else f"{fold} seed {seed_of(config, member)}"


def fold_folder(config: Config, member: int) -> str:
    """The name of the folder of a member's files.

    >>> fold_folder(Config(n_folds=3, seeds=(42, 7)), 4)
    'fold_0_seed_7'
    """
    return f"fold_{member_name(config, member)}".replace(" ", "_")


def members_in_words(config: Config) -> str:
    """How many models the folds have, and why.

    >>> members_in_words(Config(n_folds=3, seeds=(42, 7)))
    '6 models: 3 folds x 2 seeds (42, 7)'
    """
    folds = len(config.folds_to_train)
    seeds = len(config.all_seeds)
    names = ", ".join(map(str, config.all_seeds))
    return f"{folds * seeds} models: {folds} folds x {seeds} seeds ({names})"


# === Run directory ================================================================================
LOCK_SECONDS = 10  # how long a second process waits for the first one to end
STAGE_FILES = {  # the file that a stage writes last: where it is, the stage is skipped
    "zeroshot": "zeroshot.npz",
    "train": "{folder}/result.json",
    "predict": "{folder}/test.npz",
    "base": "{folder}/base_test.npz",
    "rescore": "{folder}/test_16bit.npz",
    "alignment": "alignment_test.npz",  # of all folds: it has no model of ours
}


CONFIG_OBJECTS = ("config", "fallbacks", "libraries", "parts")  # of config.json
CONFIG_KEYS = (*CONFIG_OBJECTS, "fingerprint")
WEIGHTS = ("raw", "ema", "swa")  # kinds of a fold's weights


def read_config_file(path: Path) -> dict:
    """The content of a run's config.json; DamagedFileError where it is not as it was written."""
    content = read_json(path, CONFIG_KEYS)
    require_kind(path, content, dict, CONFIG_OBJECTS)
    require_kind(path, content, str, ["fingerprint"])
    return content


@dataclass(frozen=True)
class Run:
    """One run directory: the configuration, the rows with their folds, and all other files.

    `start_run` makes it and `Run.open` reads it; a `Run` itself never changes. The
    final model, on all rows, has a folder like a fold, under the first number that is
    no fold's. fold_N is of the first seed; further ones have folders like fold_N_seed_7,
    and where a model is meant a `fold` is a member's number (see Members), which for the
    first seed is the fold's. KIND is raw, ema or swa. What writes each file, `start_run`
    or a stage, and what is in it:

    | file                           | written by    | content
    | ------------------------------ | ------------- | -----------------------------------------
    | config.json                    | start_run     | settings, libraries, fingerprints, notation
    | folds.csv                      | start_run     | `train`
    | test_rows.csv, sample_rows.csv | start_run     | `test`, `sample`
    | extra_rows.csv                 | start_run     | `extra_rows`, where there are any
    | session.json                   | run_folds     | when the time budget began to run
    | prompt.json                    | all stages    | a rendered prompt: another is refused
    | worker_W.log, run.log          | all workers   | what they print; the log, with times
    | progress_W.json                | all workers   | what worker W is doing now
    | stages.jsonl                   | all stages    | seconds and peak memory of each fold
    | events.jsonl                   | all stages    | what did not go to plan
    | zeroshot.npz                   | zeroshot      | scores of the untouched base model
    | alignment_train.npz            | alignment     | how well choices fit training rows' images
    | alignment_test.npz             | alignment     | the same of the test rows
    | fold_N/checkpoints/            | train         | where to go on with the training
    | fold_N/metrics.jsonl           | train         | the steps of the optimizer
    | fold_N/history.csv             | train         | a row an epoch
    | fold_N/adapter_KIND/           | train         | LoRA weights in PEFT's format
    | fold_N/validation_KIND.npz     | train         | scores of the held-out rows, one view
    | fold_N/result.json             | train         | best epoch, metrics, adapters' hashes
    | selection.json                 | predict       | which kinds of weights score, how many seeds
    | fold_N/oof.npz, test.npz       | predict       | scores of held-out and test rows, all views;
    |                                |               | with doubt_steps margins and pilot, too
    | fold_N/base_oof.npz            | base          | held-out rows by the untouched base model
    | fold_N/base_test.npz           | base          | the fold's share of test rows by it
    | fold_N/oof_16bit.npz           | rescore       | the same by the unquantised base model
    | fold_N/test_16bit.npz          | rescore       | the same by the unquantised base model
    | tables/, figures/, report.md   | notebook      | the evaluation
    | submission_NAME.csv            | notebook      | the answers
    """

    # The settings, as config.json has them.
    config: Config
    # Where all of these files lie.
    directory: Path
    # Training rows: the columns of `Competition.train`, and `fold`, the one that
    # validates the row. With soft targets also target_a to target_d and teacher_fold.
    train: pd.DataFrame
    # Test rows: the columns of `Competition.test`.
    test: pd.DataFrame
    # The sample submission's rows: id and answer.
    sample: pd.DataFrame
    # How often each fallback was taken while the tables were read.
    fallbacks: dict[str, int]
    # A hash of configuration, data, folds, model and targets together.
    fingerprint: str
    # Further training rows, filled by `add_soft_targets`: the columns of `train`,
    # `source` (dev, test, or extra_1, extra_2 for the folders of extra_train_dirs),
    # and `fold`, here the one that trains on the row.
    extra_rows: pd.DataFrame
    # How a submission writes its answers; None where an earlier version, which did not
    # record it, has made the run.
    notation: AnswerNotation | None = None

    def fold_dir(self, member: int) -> Path:
        """The folder of a member's files, whether it exists or not."""
        return self.directory / fold_folder(self.config, member)

    @classmethod
    def open(cls, directory: str | Path) -> Run:
        """The run that `start_run` has written to this directory.

        Raises DamagedFileError for a file that is not as it was written, and CheckpointError for
        settings of another version of this module.
        """
        directory = Path(directory)
        path = directory / "config.json"
        content = read_config_file(path)
        try:
            config = Config(**content["config"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: its settings are not those of version {__version__} ({error}); version "
                f"{content.get('version')} wrote it: use that one, or choose a new run_name"
            ) from error
        for name, digest in content.get("tables", {}).items():
            if not (directory / name).is_file():
                raise DamagedFileError(directory / name, "it is gone")
            if file_sha256(directory / name) != digest:
                raise DamagedFileError(directory / name, "its SHA-256 is not that in config.json")
        train = read_table(directory / "folds.csv", needed=("id",))
        notation = content.get("notation")
        if notation is not None:
            notation = AnswerNotation(**{**notation, "marks": tuple(notation["marks"])})
        extra_rows = _no_rows(train)
        if (directory / "extra_rows.csv").exists():
            extra_rows = read_table(directory / "extra_rows.csv", needed=("id",))
        return cls(
            config=config,
            directory=directory,
            train=train,
            test=read_table(directory / "test_rows.csv", needed=("id",)),
            # Its columns have names of their own: a "label" in it is no number of ours.
            sample=read_table(directory / "sample_rows.csv", number_columns={}),
            fallbacks=content["fallbacks"],
            fingerprint=content["fingerprint"],
            extra_rows=extra_rows,
            notation=notation,
        )

    def is_done(self, stage: str, member: int) -> bool:
        """Whether the file is there that the stage writes last."""
        folder = fold_folder(self.config, member)
        return (self.directory / STAGE_FILES[stage].format(folder=folder)).exists()

    @property
    def finished_members(self) -> list[int]:
        """The trained models of folds, the first seed's first."""
        members = members_of(self.config, self.config.folds_to_train)
        return [member for member in members if self.is_done("train", member)]

    @property
    def finished_folds(self) -> list[int]:
        """The trained folds; fewer than the configured ones when the time was up."""
        trained = {fold_of(self.config, member) for member in self.finished_members}
        return [fold for fold in self.config.folds_to_train if fold in trained]

    def unfinished_folds(self, stage: str, folds: Sequence[int]) -> list[int]:
        """Those members of `folds` that wait for `stage`.

        It is not done for them, and they are trained where the stage scores.
        """
        needs_training = stage not in ("zeroshot", "train")
        unfinished = []
        for fold in folds:
            is_ready = not needs_training or self.is_done("train", fold)
            if is_ready and not self.is_done(stage, fold):
                unfinished.append(fold)
        return unfinished

    def _selection(self) -> dict:
        """What `select_weights` has decided; empty before."""
        path = self.directory / "selection.json"
        if not path.exists():
            return {}
        content = read_json(path, ["weights"])
        require_kind(path, content, str, ["weights"])
        return content

    @property
    def selected_weights(self) -> list[str]:
        """The kinds of weights that score: raw, ema, swa; empty before they are selected."""
        selection = self._selection()
        if not selection:
            return []
        kinds = selection["weights"].split("+")
        if not set(kinds) <= set(WEIGHTS):
            path = self.directory / "selection.json"
            raise DamagedFileError(path, f"{selection['weights']!r} are no kinds of weights")
        return kinds

    @property
    def selected_seeds(self) -> int:
        """How many seeds score, the first ones; all of them before that is decided."""
        if not self.config.has_further_seeds:
            return 1
        count = self._selection().get("seeds", len(self.config.all_seeds))
        is_count = isinstance(count, int) and 0 < count <= len(self.config.all_seeds)
        if not is_count:
            path = self.directory / "selection.json"
            raise DamagedFileError(path, f"{count!r} is no number of seeds")
        return count

    def members_behind(self, fold: int, seeds: int | None = None) -> list[int]:
        """The models that score for a fold, or for all rows where it is `final_fold`.

        One for each seed that it is trained with, at most `seeds`; None: as many as are selected.
        A model on all rows counts once it has scored as the folds have: in 16 bits if all did.
        """
        scoring = "train"
        if fold == self.final_fold:
            scored = []
            for finished in self.finished_folds:
                scored += self.members_behind(finished)
            are_rescored = bool(scored) and all(self.is_done("rescore", one) for one in scored)
            scoring = "rescore" if are_rescored else "predict"
        members = members_of(self.config, [fold])
        done = [member for member in members if self.is_done(scoring, member)]
        return done[: self.selected_seeds if seeds is None else seeds]

    def members_per_fold(self, seeds: int | None = None) -> float:
        """How many models score for a fold, the mean over the finished ones; `seeds`: as above."""
        counts = [len(self.members_behind(fold, seeds)) for fold in self.finished_folds]
        return float(np.mean(counts))

    @property
    def submission_members(self) -> list[int]:
        """All models behind the submission, of every fold and seed."""
        models = self.submission_models
        return [member for fold in models for member in self.members_behind(fold)]

    @property
    def is_rescored(self) -> bool:
        """Whether all models behind the submission have 16-bit scores, too."""
        members = self.submission_members
        return bool(members) and all(self.is_done("rescore", member) for member in members)

    def base_test_rows(self, fold: int) -> pd.DataFrame:
        """The test rows that the stage "base" scores for this fold.

        The base model is the same for all folds: they share the test rows.
        """
        folds = self.config.folds_to_train
        return self.test.iloc[folds.index(fold) :: len(folds)].reset_index(drop=True)

    @property
    def is_base_scored(self) -> bool:
        """Whether the base model has scored all rows and may be a member."""
        folds = self.config.folds_to_train
        is_asked_for = self.config.use_base_member != "off"
        return is_asked_for and all(self.is_done("base", fold) for fold in folds)

    @property
    def final_fold(self) -> int:
        """The number of the model on all rows, the first that is no fold's."""
        return self.config.n_folds

    @property
    def models_to_train(self) -> list[int]:
        """The folds that the configuration asks for, and the final model where it does."""
        if self.config.final_retrain:
            return [*self.config.folds_to_train, self.final_fold]
        return [*self.config.folds_to_train]

    @property
    def members_to_train(self) -> list[int]:
        """All models that the configuration asks for."""
        return members_of(self.config, self.models_to_train)

    @property
    def submission_models(self) -> list[int]:
        """What the submission is the mean of: the finished folds, and the model on all rows.

        Each is the mean over its seeds (`members_behind`).
        """
        folds = self.finished_folds
        if self.members_behind(self.final_fold):
            return [*folds, self.final_fold]
        return folds

    @property
    def uses_per_image(self) -> int:
        """How often a training image is needed, about.

        In each fold's epochs, in its validations and in its final scores.
        """
        versions = 1 + self.config.augment_images
        epochs = self.config.num_epochs // versions  # the others show a variant of it
        return len(members_of(self.config, self.config.folds_to_train)) * (epochs + 2)

    def seconds_left(self) -> float:
        """Seconds of the time budget that remain; infinite without one.

        Without a setting it is 11 hours on Kaggle, and unlimited elsewhere.
        """
        hours = self.config.time_budget_hours
        if not hours:
            hours = 11 if _detect_platform() == "kaggle" else math.inf
        return self._budget_start() + 3600 * hours - time.time()

    def _budget_start(self) -> float:
        """When the time budget began, in seconds since 1970: by session.json, which has it.

        Training asks before every step: `session_start`, which may warn, is for no file only.
        """
        path = self.directory / "session.json"
        if not path.exists():
            return session_start()
        try:
            return float(read_json(path, ["started"])["started"])
        except DamagedFileError as error:
            problem = error.problem
        except (TypeError, ValueError) as error:
            problem = f"{path}: {error}"
        LOGGER.warning("The time budget counts anew: %s", problem)
        return session_start()

    def seconds_per_question(self) -> float:
        """Seconds a question of the last inference that is logged; 0 before the first one."""
        for record in reversed(read_json_lines(self.directory / "stages.jsonl", STAGE_RECORD)):
            if record.get("seconds_per_question"):
                return record["seconds_per_question"]
        return 0.0

    def scoring_seconds(self, cost: float) -> float:
        """What the test rows cost all models, one after the other; in seconds.

        `cost` is that of a row, in questions with one view. At the speed of the last
        inference; NaN before there was one.
        """
        seconds_per_question = self.seconds_per_question() or math.nan
        rows = len(self.test)
        models = len(self.submission_models)
        return round(cost * seconds_per_question * rows * models, 1)

    @contextlib.contextmanager
    def lock_folds(self, folds: Sequence[int]) -> Iterator[None]:
        """Keep other processes off these folds while the block runs.

        Raises CheckpointError if one works on them. The lock of a dead process is free.
        """
        with contextlib.ExitStack() as locks:
            for fold in folds:
                lock = filelock.FileLock(self.directory / f".fold_{fold}.lock", LOCK_SECONDS)
                try:
                    locks.enter_context(lock)
                except filelock.Timeout as error:
                    raise CheckpointError(
                        f"another process is working on fold {member_name(self.config, fold)} of "
                        f"{self.directory}; "
                        "wait for it, stop it, or choose a new run_name"
                    ) from error
            yield


def _no_rows(train: pd.DataFrame) -> pd.DataFrame:
    """The `extra_rows` of a run that trains on nothing but its training rows `train`."""
    return train.head(0).assign(source="")


def _differing_ids(rows: pd.DataFrame, others: pd.DataFrame) -> list[str]:
    """Sorted ids of the rows that only one of two tables has, in just that form.

    >>> rows = pd.DataFrame({"id": ["q1", "q2"], "label": [0, 1]})
    >>> _differing_ids(rows, rows.assign(label=[0, 3]))
    ['q2']
    """
    both = pd.concat([rows.astype(str), others.astype(str)])
    return sorted(set(both.drop_duplicates(keep=False)["id"]))


RELATED_SOURCE = "extra_"  # with the folder's number in extra_train_dirs, from 1 on


# === Rows of a run ================================================================================
def all_rows(run: Run) -> pd.DataFrame:
    """The rows that any fold trains on: the run's training rows, then its extra rows.

    `source` is train, dev, test, or extra_N for a folder of extra_train_dirs. `fold` is the
    fold that validates a training row, or that an extra row is for.
    """
    return pd.concat([run.train.assign(source="train"), run.extra_rows], ignore_index=True)


def training_rows(run: Run, fold: int, rows: pd.DataFrame | None = None) -> pd.DataFrame:
    """The rows that a fold trains on.

    Of `all_rows`, or of `rows`, which has the same columns. They are the training rows
    of other folds, and the extra rows for this one.
    """
    rows = all_rows(run) if rows is None else rows
    is_training_row = rows["source"] == "train"
    is_of_this_fold = rows["fold"] == fold
    return rows[is_training_row != is_of_this_fold].reset_index(drop=True)


def is_related(rows: pd.DataFrame) -> np.ndarray:
    """(n,) bools: which of `all_rows` are those of extra_train_dirs."""
    return rows["source"].str.startswith(RELATED_SOURCE).to_numpy(dtype=bool)


def source_table(run: Run) -> pd.DataFrame:
    """How many rows of each source (see `all_rows`) every model trains on; a row a fold."""
    counts = {}
    for fold in run.models_to_train:
        counts[fold] = training_rows(run, fold)["source"].value_counts()
    return pd.DataFrame(counts).T.fillna(0).astype(int).rename_axis("fold")


# === Backup =======================================================================================
def back_up(run: Run, fold: int | None = None) -> None:
    """Copy what is new of the run, without its folds, or of one fold, to `backup_dir`.

    Every file and every checkpoint appears there whole, in the order in which they were
    finished here. What fails is reported in the log and in events.jsonl, and costs no
    run. Of several processes that share a fold only the first one copies.
    """
    rank = process_rank()
    if run.config.backup_dir is None or rank > 0:
        return
    backup = Path(run.config.backup_dir)
    place = backup / run.directory.name
    try:
        if not backup.parent.is_dir():  # making it anew would fill this session's own disk
            raise OSError(f"{backup.parent} is gone")
        if fold is None:
            folder = run.directory
        else:
            folder = run.fold_dir(fold)
            checkpoints = folder / "checkpoints"
            _back_up_checkpoint(checkpoints, place / folder.name / "checkpoints")
        finished = []
        for path in folder.rglob("*"):
            name = path.relative_to(run.directory)
            if path.is_file() and _belongs_in_backup(name, fold):
                finished.append(path)
        for path in sorted(finished, key=lambda path: path.stat().st_mtime_ns):
            _back_up_file(path, place / path.relative_to(run.directory))
    except OSError as error:  # the disk is full, or Drive was taken away
        LOGGER.warning("Not backed up: %s", error)
        events = MetricLogger(run.directory / "events.jsonl")
        events.log(event=f"not backed up to {place}: {error}")


def _back_up_file(path: Path, target: Path) -> None:
    """Copy a file unless `target` has its size and is no older; it appears there whole."""
    source = path.stat()
    if target.exists():
        copy = target.stat()
        if copy.st_size == source.st_size and copy.st_mtime >= source.st_mtime:
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.copyfile(path, unfinished)
    os.replace(unfinished, target)


def delete_outputs(run: Run, paths: Sequence[Path]) -> None:
    """Delete files of the run, here and in its backup.

    `paths` are relative to the run directory; missing files are passed over. A later
    session must not take those of the backup for finished ones.
    """
    for path in paths:
        (run.directory / path).unlink(missing_ok=True)
        if run.config.backup_dir:
            backup = Path(run.config.backup_dir) / run.directory.name
            (backup / path).unlink(missing_ok=True)


def _belongs_in_backup(path: Path, fold: int | None) -> bool:
    """Whether a file belongs into the backup of `fold`; None: of all but the folds.

    `path` is relative to the run directory, and for a fold inside its folder. Locks,
    unfinished files and what is only true of this session do not belong there;
    `_back_up_checkpoint` copies the checkpoints.

    >>> _belongs_in_backup(Path("fold_0/oof.npz"), fold=0)
    True
    >>> _belongs_in_backup(Path("fold_0/oof.npz"), fold=None)
    False
    >>> _belongs_in_backup(Path("progress_0.json"), fold=None)
    False
    """
    is_in_a_fold = path.parts[0].startswith("fold_")
    if "checkpoints" in path.parts or (is_in_a_fold and fold is None):
        return False
    is_unfinished = path.suffix in (".lock", ".tmp")
    is_of_this_session = path.name.startswith(("progress_", "session."))
    return not (is_unfinished or is_of_this_session)


def _back_up_checkpoint(source: Path, place: Path) -> None:
    """Copy the newest verified checkpoint of the folder `source` into `place`.

    It gets a name that counts once the copy is whole. Raises OSError if it is damaged.
    """
    newest = CheckpointManager(source).latest_verified()
    if newest is None or (place / newest.name).exists():
        return
    unfinished = place / f".incomplete-{newest.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(newest, unfinished)
    problem = CheckpointManager.problem(unfinished)
    if problem:
        raise OSError(f"the copy of {newest} is damaged: {problem}")
    os.replace(unfinished, place / newest.name)
    CheckpointManager(place).prune()


# ======= 5. Training and inference ================================================================

# === Metrics ======================================================================================
ECE_BINS = 15  # as in Guo et al. 2017
PROBABILITY_FLOOR = 1e-12  # keeps a logarithm finite where a probability has underflowed


def _as_array(values) -> np.ndarray:
    """Numbers of any kind (lists, arrays, torch tensors) as float64."""
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
    labels = _as_array(labels)
    n_rows, n_choices = shape[-2:]
    if labels.shape != (n_rows,) or not n_rows:
        raise ValueError(f"{n_rows} rows but labels of shape {labels.shape}")
    unlabelled = ~np.isin(labels, np.arange(n_choices))
    if unlabelled.any():
        row = unlabelled.argmax()
        raise ValueError(
            f"{unlabelled.sum()} unlabelled rows, "
            f"the first is row {row} with label {labels[row]:g}: drop them"
        )
    return labels.astype(np.int64)


def softmax(logits) -> np.ndarray:
    """Probabilities over the last axis; a masked choice (-inf) gets exactly 0.

    >>> softmax([[0.0, 0.0, -np.inf]]).tolist()
    [[0.5, 0.5, 0.0]]
    """
    return special.softmax(_as_array(logits), axis=-1)


def combine_views(logits) -> np.ndarray:
    """(n, choices) mean log-probabilities over the views of each row.

    `logits`: (n, views, choices), or (n, choices) for one view. A view of NaN does not count;
    -inf masks a choice. Raises ValueError, naming the row, where a row has no view, where a view
    is partly NaN, and where a choice is masked in some views only.

    Over all four rotations this cancels any additive letter preference: each choice has then
    met each letter once.

    >>> view_1 = np.log([0.6, 0.2, 0.1, 0.1])
    >>> view_2 = np.log([0.2, 0.6, 0.1, 0.1])
    >>> softmax(combine_views([[view_1, view_2]])).round(2).tolist()
    [[0.39, 0.39, 0.11, 0.11]]
    """
    logits = _as_array(logits)
    if logits.ndim == 2:
        logits = logits[:, None]
    view_exists = ~np.isnan(logits).all(axis=2, keepdims=True)
    combined = special.log_softmax(logits, axis=2).mean(axis=1, where=view_exists)
    # One -inf would mask the choice in the mean although other views have scored it.
    partly_masked = np.isneginf(combined) & np.isfinite(logits).any(axis=1)
    is_bad_row = (np.isnan(combined) | partly_masked).any(axis=1)
    if is_bad_row.any():
        raise ValueError(
            f"row {is_bad_row.argmax()}: no view, a view with NaN, "
            "or a choice masked in some views only"
        )
    return combined


def negative_log_likelihood(probabilities, labels) -> float:
    """Mean -log p(label): the score that calibration is judged by; 0 is best.

    A probability of zero counts as PROBABILITY_FLOOR.

    >>> round(negative_log_likelihood([[0.5, 0.5, 0, 0], [1, 0, 0, 0]], [0, 0]), 4)
    0.3466
    """
    probabilities = _as_probabilities(probabilities)
    labels = _as_labels(labels, probabilities.shape)
    of_label = probabilities[np.arange(len(probabilities)), labels]
    return float(-np.log(np.maximum(of_label, PROBABILITY_FLOOR)).mean())


def brier_score(probabilities, labels) -> float:
    """Mean squared distance of probabilities and truth, summed over choices (Brier 1950).

    0 is best, 2 is worst.

    >>> brier_score([[1, 0, 0, 0], [0.5, 0.5, 0, 0]], [0, 0])
    0.25
    """
    probabilities = _as_probabilities(probabilities)
    labels = _as_labels(labels, probabilities.shape)
    truth = np.eye(probabilities.shape[1])[labels]
    return float(((probabilities - truth) ** 2).sum(axis=1).mean())


def accuracy(probabilities, labels) -> float:
    """Share of rows whose most probable choice is the label.

    >>> accuracy([[0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]], [0, 1])
    0.5
    """
    probabilities = _as_probabilities(probabilities)
    labels = _as_labels(labels, probabilities.shape)
    return float((probabilities.argmax(axis=1) == labels).mean())


def _confidence_bins(confidence: np.ndarray, n_bins: int) -> np.ndarray:
    """(n,) each row's bin, from 0; a value on an edge belongs to the bin that it ends."""
    # Rounded first, because 0.6 * 15 is a hair above 9.
    bins_from_1 = np.ceil(np.round(confidence * n_bins, 9)).clip(1, n_bins)
    return bins_from_1.astype(int) - 1


def reliability_curve(probabilities, labels, n_bins=15) -> pd.DataFrame:
    """Mean confidence, accuracy and count of rows in `n_bins` equal bins of confidence.

    One row per bin. Confidence is the probability of the answer. An empty bin has count 0 and
    NaN elsewhere.

    >>> probabilities = [[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]]
    >>> curve = reliability_curve(probabilities, labels=[0, 1, 0], n_bins=5)
    >>> curve["count"].tolist()
    [0, 0, 1, 0, 2]
    >>> curve["accuracy"].tolist()
    [nan, nan, 1.0, nan, 0.5]
    """
    probabilities = _as_probabilities(probabilities)
    labels = _as_labels(labels, probabilities.shape)
    confidence = probabilities.max(axis=1)
    is_right = probabilities.argmax(axis=1) == labels
    bins = _confidence_bins(confidence, n_bins)
    rows = pd.DataFrame({"confidence": confidence, "accuracy": is_right}).astype(float)
    curve = rows.groupby(bins).mean().reindex(range(n_bins))
    curve["count"] = np.bincount(bins, minlength=n_bins)
    return curve.rename_axis("bin")


def expected_calibration_error(probabilities, labels, n_bins=ECE_BINS) -> float:
    """Mean gap of confidence and accuracy over equal bins (Guo et al. 2017); 0 is best.

    Each bin counts by its rows. Chance alone makes it larger than 0: read it beside
    `calibration_error_null`.

    >>> four_rows = [[0.75, 0.25, 0, 0]] * 4
    >>> expected_calibration_error(four_rows, [0, 0, 0, 1])
    0.0
    >>> expected_calibration_error(four_rows, [0, 0, 0, 0])
    0.25
    """
    curve = reliability_curve(probabilities, labels, n_bins).dropna()
    gaps = (curve["confidence"] - curve["accuracy"]).abs()
    return float(np.average(gaps, weights=curve["count"]))


def calibration_error_null(probabilities) -> np.ndarray:
    """(3,) calibration error that chance alone gives to honest probabilities.

    The expected calibration error under 200 draws of labels from these very probabilities: its
    mean, its 5 % and its 95 % quantile.

    >>> mean, low, high = calibration_error_null(np.full((100, 4), 0.25))
    >>> bool(0 <= low < mean < high < 0.2)
    True
    """
    probabilities = _as_probabilities(probabilities)
    confidence = probabilities.max(axis=1)
    draws = np.random.default_rng(0).random((200, len(probabilities)))
    gaps = confidence - (draws < confidence)  # the answer is right as often as it is probable
    in_bin = np.eye(ECE_BINS)[_confidence_bins(confidence, ECE_BINS)]
    errors = np.abs(gaps @ in_bin).sum(axis=1) / len(probabilities)
    return np.array([np.mean(errors), *np.quantile(errors, [0.05, 0.95])])


# The scores that tables have, in the order of their columns; `score_row` computes them.
SCORES = ("accuracy", "nll", "brier", "ece")


def score_row(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, NLL, Brier score and expected calibration error of probabilities (n, 4).

    >>> scores = score_row([[0.5, 0.5, 0, 0], [1, 0, 0, 0]], [1, 0])
    >>> scores["accuracy"]
    0.5
    >>> tuple(scores) == SCORES
    True
    """
    return {
        "accuracy": accuracy(probabilities, labels),
        "nll": negative_log_likelihood(probabilities, labels),
        "brier": brier_score(probabilities, labels),
        "ece": expected_calibration_error(probabilities, labels),
    }


def calibration_row(probabilities, labels) -> dict[str, float]:
    """`score_row`, and by how much its ECE exceeds `calibration_error_null`.

    The excess over what chance alone gives to honest probabilities comes with its 90 % interval.
    An interval above zero says that the probabilities are not honest; one that holds zero, that
    these rows cannot tell.
    """
    scores = score_row(probabilities, labels)
    null_mean, null_low, null_high = calibration_error_null(probabilities)
    return {
        **scores,
        "ece_excess": float(scores["ece"] - null_mean),
        "excess_low": float(scores["ece"] - null_high),
        "excess_high": float(scores["ece"] - null_low),
    }


# From here on the letter that a model answers most is called a collapse: the excess over that
# letter's share of the labels is so large, and by chance so unlikely.
COLLAPSE_ROWS = 30  # fewer rows prove nothing
COLLAPSE_RATIO = 1.5  # times the letter's share of the labels
COLLAPSE_EXCESS = 0.2  # above the letter's share of the labels
COLLAPSE_P_VALUE = 0.001  # one-sided, of so many such answers if they fell like the labels


def _letter_indices(values) -> np.ndarray:
    """(n,) indices 0-3 of (n, 4) probabilities, letters or indices."""
    if np.ndim(values) == 2:
        return _as_array(values).argmax(axis=1)
    if isinstance(next(iter(values), None), str):
        values = pd.Index(CHOICES).get_indexer(list(values))  # -1 for any other text
    return _as_labels(values, (len(values), len(CHOICES)))


def _letter_shares(indices: np.ndarray) -> np.ndarray:
    """(4,) share of each letter."""
    return np.bincount(indices, minlength=4) / len(indices)


def _normalised_entropy(shares: np.ndarray) -> float:
    """Entropy of the letters' shares: 1 where they are even, 0 for a single letter."""
    return float(special.entr(shares).sum() / math.log(4))


def prediction_diversity(predictions, validation_labels) -> dict:
    """Whether a model prefers one letter far beyond the labels: the mode-collapse alarm.

    Both arguments may be (n, 4) probabilities, (n,) letters or (n,) indices. `entropy` is that
    of the predicted letters, 1 where they are even and 0 for a single one; `label_share` is the
    top letter's share of the labels, `top_rows` of `rows` predictions have it.

    `collapsed` needs both an effect and evidence: at least 30 predictions, a top letter with at
    least 1.5 times and 20 points more than its share of the labels, and p < 0.001 in a one-sided
    binomial test of that share. A model that always answers a letter which most labels have
    is none: such a model is not above guessing, which `measure_skill` says.

    >>> alarm = prediction_diversity(["b"] * 50, ["a", "b", "c", "d"] * 10)
    >>> alarm["top_letter"], alarm["top_share"], alarm["label_share"], alarm["collapsed"]
    ('b', 1.0, 0.25, True)
    """
    predicted = _letter_indices(predictions)
    labels = _letter_indices(validation_labels)
    shares = _letter_shares(predicted)
    top = int(shares.argmax())
    top_rows = int((predicted == top).sum())
    top_share = float(shares[top])
    label_share = float(_letter_shares(labels)[top])
    # Rounded, or 0.25 + 0.2 would lie a hair above 0.45.
    needed = round(max(COLLAPSE_RATIO * label_share, label_share + COLLAPSE_EXCESS), 9)
    is_large = len(predicted) >= COLLAPSE_ROWS and round(top_share, 9) >= needed
    test = binomtest(top_rows, len(predicted), label_share, alternative="greater")
    return {
        "entropy": _normalised_entropy(shares),
        "top_letter": CHOICES[top],
        "top_rows": top_rows,
        "rows": len(predicted),
        "top_share": top_share,
        "label_share": label_share,
        "collapsed": bool(is_large and test.pvalue < COLLAPSE_P_VALUE),
    }


def describe_preference(diversity: Mapping) -> str:
    """What `prediction_diversity` has measured of the top letter, as a clause.

    >>> describe_preference(prediction_diversity(["b"] * 61 + ["a"] * 19, ["a", "b"] * 40))
    'the model answered b in 61 of 80 rows (76%); b is right in 50%'
    """
    letter = diversity["top_letter"]
    return (
        f"the model answered {letter} in {diversity['top_rows']:,} of {diversity['rows']:,} rows "
        f"({diversity['top_share']:.0%}); {letter} is right in {diversity['label_share']:.0%}"
    )


# === Choice orders ================================================================================
# Each stands for four orders: itself, and all choices one, two and three further in a, b, c, d.
# The first four orders are the rotations. Sets of 8 and of 12 take the squares for which choices
# have met each other as neighbours most evenly.
_LATIN_SQUARES = (
    (0, 1, 2, 3),
    (0, 2, 1, 3),
    (0, 3, 2, 1),
    (0, 1, 3, 2),
    (0, 2, 3, 1),
    (0, 3, 1, 2),
)


def balanced_orders(count: int) -> list[tuple[int, ...]]:
    """`count` (4, 8, 12 or 24) choice orders in which each choice meets each letter equally often.

    order[position] = original choice. They are Latin squares of four orders; each set begins with
    the smaller ones, the rotations first. In 24 orders each choice also stands right before each
    other one equally often. In 8 and in 12 these counts differ by at most 2, the least that is
    possible beside the rotations. Raises ValueError for another count.

    >>> balanced_orders(4)
    [(0, 1, 2, 3), (1, 2, 3, 0), (2, 3, 0, 1), (3, 0, 1, 2)]
    >>> len(set(balanced_orders(24)))
    24
    """
    if count not in (4, 8, 12, 24):
        raise ValueError(
            f"no balanced set of {count} choice orders; there are those of 4, 8, 12, 24"
        )
    orders = []
    for square in _LATIN_SQUARES[: count // 4]:
        for shift in range(4):
            orders.append(tuple((choice + shift) % 4 for choice in square))
    return orders


# === Views ========================================================================================
# End of the name of a view, or of a set of views, that an unquantised base model scored.
SUFFIX_16_BIT = " in 16 bits"


@dataclass(frozen=True)
class TTAView:
    """One way to score a question: an order of its choices, a size of its image, and a model."""

    name: str
    rotation: int = 0  # places, 0 to 3, by which the choices are turned
    scale: float = 1.0  # factor on the pixel budget
    other_order: tuple[int, ...] | None = None  # where it is no rotation; as `order`
    by_base_model: bool = False  # scored without the adapter

    @property
    def order(self) -> tuple[int, ...]:
        """order[position] = original choice.

        >>> TTAView("rotation 1", rotation=1).order
        (1, 2, 3, 0)
        >>> TTAView("order acbd", other_order=(0, 2, 1, 3)).order
        (0, 2, 1, 3)
        """
        if self.other_order is not None:
            return self.other_order
        return tuple((position + self.rotation) % 4 for position in range(4))


def view_kind(name: str) -> str:
    """What a view changes, by the first word of its name.

    That is rotation or order (of the choices), scale or pixels (of the image), or base (model).

    >>> view_kind("rotation 0"), view_kind("scale 0.9 in 16 bits")
    ('rotation', 'scale')
    """
    return name.split()[0]


ORDER_KINDS = ("rotation", "order")  # of views that differ in the order of the choices


def pixel_factor(name: str) -> float:
    """How many times as many pixels a view of the step "pixels" has; 1 for every other view.

    >>> pixel_factor("pixels 1.28 rotation 0"), pixel_factor("rotation 2")
    (1.28, 1.0)
    """
    return float(name.split()[1]) if view_kind(name) == "pixels" else 1.0


STEP_KINDS = {"rotations": "rotation", "orders": "order", "pixels": "pixels", "base": "base"}


def step_views(view_names: Sequence[str], step: str) -> list[int]:
    """Positions of the views that a step of `doubt_steps` adds; never the first view.

    >>> step_views(["rotation 0", "rotation 2", "base rotation 0"], "rotations")
    [1]
    """
    positions = []
    for position, name in enumerate(view_names):
        if position > 0 and view_kind(name) == STEP_KINDS[step]:
            positions.append(position)
    return positions


def first_views(view_names: Sequence[str], steps: Iterable[str]) -> list[int]:
    """Positions of the views that every row is scored in, before any of the `steps`.

    >>> first_views(["rotation 0", "rotation 2", "base rotation 0"], ["base"])
    [0, 1]
    """
    later = set()
    for step in steps:
        later.update(step_views(view_names, step))
    return [position for position in range(len(view_names)) if position not in later]


def rotated_views(config: Config) -> list[TTAView]:
    """The rotations that the configuration asks for, the plain order first."""
    turns = range(0, 4, 4 // config.tta_rotations)
    return [TTAView(f"rotation {turn}", turn) for turn in turns]


def all_views(config: Config, processor) -> list[TTAView]:
    """Every view the configuration asks for, the plain one first.

    `infer_max_pixels` adds one more scale. `doubt_steps` adds more orders, and rotations at that
    scale and of the base model. Raises ValueError where its step 'pixels' would enlarge no image.
    """
    if not config.use_tta:
        return [TTAView("rotation 0")]
    scales = {1.0, *config.tta_scales}
    steps = dict(config.doubt_steps)
    if config.infer_max_pixels:
        _, max_pixels = pixel_budget(config, processor)
        larger = round(config.infer_max_pixels / max_pixels, 3)
        if "pixels" not in steps:
            scales.add(larger)
        elif larger <= 1:
            raise ValueError(
                f"infer_max_pixels is {config.infer_max_pixels}; the step 'pixels' of doubt_steps "
                f"needs more than max_pixels, {max_pixels}"
            )
    rotations = rotated_views(config)
    views = list(rotations)
    for scale in sorted(scales - {1.0}):
        views.append(TTAView(f"scale {scale:g}", 0, scale))
    if "orders" in steps:
        for order in balanced_orders(config.doubt_orders)[4:]:
            letters = "".join(CHOICES[choice] for choice in order)
            views.append(TTAView(f"order {letters}", other_order=order))
    if "pixels" in steps:
        for view in rotations:
            views.append(TTAView(f"pixels {larger:g} {view.name}", view.rotation, larger))
    if "base" in steps:
        for view in rotations:
            views.append(TTAView(f"base {view.name}", view.rotation, by_base_model=True))
    return views


def views_of_all_rows(config: Config, processor) -> list[TTAView]:
    """Those of `all_views` in which every row is scored; `doubt_steps` has the others."""
    views = all_views(config, processor)
    first = first_views([view.name for view in views], dict(config.doubt_steps))
    return [views[position] for position in first]


def tta_views(row: Mapping, views: Sequence[TTAView]) -> list[TTAView]:
    """The views that make sense for one question: no scale below 1 where text is read.

    No view ever flips or turns an image.

    >>> views = [TTAView("rotation 0"), TTAView("scale 0.5", scale=0.5)]
    >>> [view.name for view in tta_views({"type": "ocr"}, views)]
    ['rotation 0']
    """
    reads_text = row["type"] == "ocr"
    return [view for view in views if not (reads_text and view.scale < 1)]


# Sets of views by name, and the kind of view that each adds to the set before it.
ADDED_KINDS = {
    "rotations": "rotation",
    "rotations and scales": "scale",
    "more orders": "order",
    "more pixels": "pixels",
    "base model": "base",
}


def view_sets(view_names: Sequence[str]) -> dict[str, list[int]]:
    """The candidate sets of views by name, as positions in `view_names`.

    Each is wider than the one before: one view, all rotations, scales, and what `doubt_steps`
    adds; then the same in 16 bits. A set that is empty, or equal to an earlier one, is left out.

    >>> view_sets(["rotation 0", "rotation 2", "scale 1.5"])
    {'single view': [0], 'rotations': [0, 1], 'rotations and scales': [0, 1, 2]}
    """
    sets: dict[str, list[int]] = {}
    for ending in ("", SUFFIX_16_BIT):
        positions = []
        for position, name in enumerate(view_names):
            if name.endswith(SUFFIX_16_BIT) == bool(ending):
                positions.append(position)
        candidates = {"single view": positions[:1]}
        kinds = set()
        for set_name, kind in ADDED_KINDS.items():
            kinds.add(kind)
            candidates[set_name] = [
                position for position in positions if view_kind(view_names[position]) in kinds
            ]
        for set_name, candidate in candidates.items():
            if candidate and candidate not in sets.values():
                sets[set_name + ending] = candidate
    return sets


def split_views(view_names: Sequence[str]) -> tuple[list[int], list[int]]:
    """(the views before the last step of `view_sets`, the views that this step adds).

    Both are positions in `view_names`; the second list is empty where there is one step only.

    >>> split_views(["rotation 0", "rotation 2", "scale 1.5"])
    ([0, 1], [2])
    """
    *narrower, widest = view_sets(view_names).values()
    first = narrower[-1] if narrower else widest
    added = [view for view in widest if view not in first]
    return first, added


def combine_steps(logits: np.ndarray, view_names: Sequence[str]) -> np.ndarray:
    """(n, 4) scores of rows over the views that each has, from (n, views, 4).

    `combine_views` over orders and scales; half and half with that over larger images, where a
    row has any; and all this half and half with the base model's. So a step weighs the same
    behind 4 orders and behind 24. All means are of log-probabilities: as over rotations, what a
    model adds for a letter cancels, and one view's certainty outweighs another's doubt.

    >>> names = ["rotation 0", "rotation 2", "base rotation 0"]
    >>> scores = combine_steps(np.log([[[0.8, 0.2], [0.8, 0.2], [0.2, 0.8]]]), names)
    >>> softmax(scores).round(2).tolist()
    [[0.5, 0.5]]
    """
    larger = [view for view, name in enumerate(view_names) if view_kind(name) == "pixels"]
    base = [view for view, name in enumerate(view_names) if view_kind(name) == "base"]
    if not larger and not base:
        return combine_views(logits)
    plain = [view for view in range(len(view_names)) if view not in {*larger, *base}]
    scores = combine_views(logits[:, plain])
    for added in (larger, base):
        has_added = ~np.isnan(logits[:, added]).all(axis=(1, 2))
        if has_added.any():
            of_added = combine_views(logits[has_added][:, added])
            both = np.stack([scores[has_added], of_added], axis=1)
            scores[has_added] = combine_views(both)
    return scores


def scoring_cost(prompts: int, answers: int) -> float:
    """Time to score so many prompts with so many answers, in prompts with one answer.

    A further choice order is a short text behind the common prefix: a seventh of a prompt.

    >>> scoring_cost(prompts=1, answers=8)
    2.0
    """
    return prompts + (answers - prompts) / 7


def views_cost(session: Session, views: Sequence[TTAView]) -> float:
    """Time to score a question in all `views` and each kind of weights.

    The unit is a question with one view and one kind.
    """
    config = session.config
    kinds = 1
    if config.mix_weights:  # at most: OOF may prefer a single one
        kinds = 1 + config.use_ema + config.use_swa
    # Orders of one scale and model share a prompt, where they can share a prefix.
    prompts = set()
    for view in views:
        prompts.add((view.scale, view.by_base_model) if session.shares_prefixes else view)
    return kinds * scoring_cost(len(prompts), len(views))


PILOT_ROWS = 64  # held-out rows of a fold that are scored in every choice order


def pilot_cost(config: Config, held_out: float) -> float:
    """Time to score a fold's pilot rows in further orders, in questions with one view.

    0 where no step of `doubt_steps` adds orders.
    """
    steps = dict(config.doubt_steps)
    orders = 0
    if "rotations" in steps:
        orders += config.tta_rotations - 1
    if "orders" in steps:
        orders += config.doubt_orders - 4
    rows = min(PILOT_ROWS, held_out)
    return rows * scoring_cost(1, orders) if orders else 0.0


def cost_in_steps(session: Session, views: Sequence[TTAView]) -> float:
    """As views_cost, but each step of `doubt_steps` costs at most what it may take."""
    names = [view.name for view in views]
    steps = session.config.doubt_steps
    first = first_views(names, dict(steps))
    cost = views_cost(session, [views[number] for number in first])
    for step, share in steps:
        added = [views[number] for number in step_views(names, step)]
        # As in `step_costs`: a larger image takes so many times as long.
        larger = max(1.0, *(view.scale for view in added))
        cost += min(share, larger * views_cost(session, added))
    return cost


def base_questions(run: Run, session: Session) -> float:
    """What the stage "base" scores for a fold, in questions with one view.

    The fold's held-out rows and its share of the test rows.
    """
    held_out = len(run.train) / run.config.n_folds
    test_rows = len(run.test) / len(run.config.folds_to_train)
    views = views_of_all_rows(run.config, session.processor)
    return (held_out + test_rows) * views_cost(session, views)


def folds_for_base(run: Run, session: Session, training: int) -> int:
    """For how many of this worker's folds the stage "base" is to come, once for all seeds.

    They are trained already, or among the `training` that are being trained.
    """
    of_first_seed = [fold for fold in session.assigned_folds if fold in run.config.folds_to_train]
    untrained = [fold for fold in of_first_seed if not run.is_done("train", fold)]
    return len(run.unfinished_folds("base", of_first_seed)) + min(training, len(untrained))


def inference_seconds(
    run: Run, seconds_per_question: float, session: Session, training: int
) -> float:
    """Estimated seconds of the inference that is still to be done by this worker, with margin.

    It is to validate `training` folds that are being trained, and to score these and the
    worker's folds that wait for it, on their held-out rows and the test rows.
    `seconds_per_question` is for a question with one view.
    """
    waiting = 0
    trained = run.finished_members
    for fold in session.assigned_folds:
        if fold in trained and not run.is_done("predict", fold):
            waiting += 1
    held_out = len(run.train) / run.config.n_folds
    views = all_views(run.config, session.processor)
    rows = held_out + len(run.test)
    # For a fold.
    scored = rows * cost_in_steps(session, views) + pilot_cost(run.config, held_out)
    validated = 3 * training * held_out
    questions = (waiting + training) * scored + validated
    if run.config.use_base_member == "on":  # "auto" takes only what time is left
        questions += folds_for_base(run, session, training) * base_questions(run, session)
    world_size = process_count()
    return 1.25 * seconds_per_question * questions / world_size


# === Prediction ===================================================================================
def unpermute_scores(scores, order: Sequence[int]) -> np.ndarray:
    """Scores (..., 4) by prompt position, moved to the original choices.

    result[..., order[position]] = scores[..., position]

    >>> unpermute_scores([9, 0, 0, 0], order=(2, 0, 3, 1)).tolist()
    [0, 0, 9, 0]
    """
    return np.asarray(scores)[..., np.argsort(order)]


@dataclass
class InferenceCheckpoint:
    """The file in which inference keeps what it has done, for a later process of the run."""

    path: Path
    fingerprint: str  # of what is scored; a file with another one is not continued
    config: Config  # says how often to save
    last_save: float = field(default_factory=time.monotonic)  # seconds of that clock

    def read(self) -> tuple[int, np.ndarray | None]:
        """(batches done, their logits); nothing, said aloud, where the file is damaged."""
        if not self.path.exists():
            return 0, None
        try:
            content = read_arrays(self.path, self.fingerprint, ["done", "logits"])
        except CheckpointError as error:
            LOGGER.warning("Inference starts again: %s", error)
            return 0, None
        LOGGER.info("Inference continues after %d batches: %s", content["done"], self.path)
        return int(content["done"]), content["logits"]

    def save(self, done: int, logits: np.ndarray, now: bool = False) -> None:
        """Write what `done` batches gave, when the config's steps or minutes say so, or `now`.

        `logits`: (n, views, 4), NaN where nothing is scored yet.
        """
        seconds = time.monotonic() - self.last_save
        by_time = seconds > 60 * self.config.save_every_minutes
        by_steps = done % self.config.save_every_steps == 0
        if now or by_time or by_steps:
            write_arrays(self.path, self.fingerprint, done=np.array(done), logits=logits)
            self.last_save = time.monotonic()


def score_batch(session: Session, batch: Mapping):
    """Scores (answers, 4) on the device, by prompt position.

    In smaller parts, from here on, when memory runs out. Raises RuntimeError, as
    `out_of_memory_error` words it, where one question is too much.
    """
    while True:
        size = session.inference_batch_limit or len(batch["prompts"])
        try:
            scores = []
            for small_batch in split_batches(session, [batch], size):
                scores.append(answer_scores(session, answer_hidden_states(session, small_batch)))
            return torch.cat(scores)
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise out_of_memory_error(error) from error
        scores = None  # they hold memory
        clear_memory(LOGGER)
        session.inference_batch_limit = math.ceil(size / 2)
        session.add_note(
            f"out of memory: inference goes on with {session.inference_batch_limit} "
            "questions per forward pass"
        )


def score_batches(session: Session, batches: Iterable[Mapping]) -> Iterator[np.ndarray]:
    """Scores (answers, 4) of each batch, by prompt position.

    They are handed over while the GPU is at the next batch.
    """
    on_gpu = session.device.type == "cuda"
    under_way = deque()  # (scores on the CPU, event that says when they have arrived)

    def receive() -> np.ndarray:
        scores, copied = under_way.popleft()
        if copied is not None:
            copied.synchronize()
        return scores.numpy()

    for batch in batches:
        scores = score_batch(session, batch).to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if on_gpu else None
        under_way.append((scores, copied))
        if len(under_way) > 1:
            yield receive()
    while under_way:
        yield receive()


def group_views_by_prompt(
    session: Session, row: Mapping, views: Sequence[TTAView]
) -> list[list[TTAView]]:
    """The distinct views of a question, in one list those that one prompt shows."""
    groups = defaultdict(dict)
    grids = {}
    for view in tta_views(row, views):
        if view.scale not in grids:
            budget = pixel_budget(session.config, session.processor, view.scale)
            grid = image_grid(row["width"], row["height"], session.processor, budget)
            grids[view.scale] = grid
        # Orders of one grid share a prompt, where they can share a prefix. A new field of
        # TTAView would belong into this key, or into the one below.
        order = None if session.shares_prefixes else view.order
        prompt_key = (grids[view.scale], view.by_base_model, order)
        # Of views with the same grid, model and order the first stands for all.
        groups[prompt_key].setdefault(view.order, view)
    return [list(group.values()) for group in groups.values()]


@dataclass(frozen=True)
class PlannedPrompt:
    """A prompt that is to be scored, and the views that its answers belong to."""

    prompt: Prompt  # a question at one scale, in one or several choice orders
    view_numbers: list[int]  # (orders,): the number of the view of each order


def plan_prompts(
    session: Session,
    frame: pd.DataFrame,
    views: Sequence[TTAView],
    scored_views: Sequence[TTAView] = (),
) -> list[PlannedPrompt]:
    """Prompts of every row of `frame` in all its distinct views but the `scored_views`."""
    planned = []
    for row in range(len(frame)):
        for group in group_views_by_prompt(session, frame.iloc[row], views):
            shown = [view for view in group if view not in scored_views]
            if shown:
                orders = [view.order for view in shown]
                prompt = make_prompt(session, frame, row, orders, shown[0].scale)
                view_numbers = [views.index(view) for view in shown]
                planned.append(PlannedPrompt(prompt, view_numbers))
    return planned


def plan_inference_batches(session: Session, planned: Sequence[PlannedPrompt]) -> list[np.ndarray]:
    """Positions in `planned` of the prompts that share a forward pass, longest first."""
    config = session.config
    size = config.infer_batch_size if config.use_batch_inference else 1
    lengths = [len(item.prompt.input_ids) for item in planned]
    by_length = np.argsort([-length for length in lengths], kind="stable")
    return [by_length[start : start + size] for start in range(0, len(planned), size)]


def store_scores(
    result: np.ndarray,
    scores: np.ndarray,
    planned: Sequence[PlannedPrompt],
    frame: pd.DataFrame,
    present: np.ndarray,
) -> None:
    """Write the scores (answers, 4) of `planned` prompts into `result` (n, views, 4).

    Columns of `result` are the original choices; one that is not `present` (n, 4) gets -inf.
    Raises FloatingPointError naming the row of a score that is not finite.
    """
    answers = [
        (item.prompt.row, order, view)
        for item in planned
        for order, view in zip(item.prompt.orders, item.view_numbers, strict=True)
    ]
    for (row, order, view), by_position in zip(answers, scores, strict=True):
        by_choice = unpermute_scores(by_position, order)
        if not np.isfinite(by_choice[present[row]]).all():
            raise FloatingPointError(
                f"Non-finite scores for row {frame['id'].iloc[row]}: {by_choice}"
            )
        result[row, view] = np.where(present[row], by_choice, -np.inf)


def score_planned(
    session: Session,
    frame: pd.DataFrame,
    planned: Sequence[PlannedPrompt],
    result: np.ndarray,
    done: int,
    label: str,
    checkpoint: InferenceCheckpoint | None,
) -> None:
    """Score this process's batches of `planned` prompts, but the first `done`, into `result`.

    What is done is reported as `label`, and kept in the `checkpoint`; Interrupted leaves there
    what was done till then.
    """
    batches = plan_inference_batches(session, planned)
    rank = process_rank()
    world_size = process_count()
    common = len(batches) // world_size  # so many batches each process has at least
    batches = batches[rank::world_size]
    present = np.array([present_choices(row) for _, row in frame.iterrows()])
    prompts = [item.prompt for item in planned]
    start = time.perf_counter()
    cost = 0.0  # of what has been scored since, in prompts with one answer
    loader = iterate_batches(session, prompts, batches[done:])
    for scores in score_batches(session, loader):
        shown = [planned[number] for number in batches[done]]
        store_scores(result, scores, shown, frame, present)
        done += 1
        cost += scoring_cost(len(shown), len(scores))
        session.seconds_per_question = (time.perf_counter() - start) / cost
        if checkpoint:
            checkpoint.save(done, result)
        try:
            session.progress(label, done, len(batches), together=done <= common)
        except Interrupted:
            if checkpoint:
                checkpoint.save(done, result, now=True)
            raise
    if checkpoint:  # another pass may follow, and this one need not be done again
        checkpoint.save(len(batches), result, now=True)


def predict_logits(
    session: Session,
    frame: pd.DataFrame,
    views: Sequence[TTAView],
    label: str = "inference",
    checkpoint: InferenceCheckpoint | None = None,
    scored_views: Sequence[TTAView] = (),
) -> np.ndarray:
    """Scores (n, views, 4) of the rows of `frame` in `views`; columns are the original a-d.

    float32. A blank choice gets -inf. NaN stands where a row has no such view (see
    `tta_views`), where a view shows the same as an earlier one, and in `scored_views`, those
    that are scored already. With a `checkpoint` the scores continue where an earlier process
    stopped. Raises FloatingPointError naming the row of a score that is not finite.
    """
    planned = plan_prompts(session, frame, views, scored_views)
    done, result = checkpoint.read() if checkpoint else (0, None)
    if result is None:
        result = np.full((len(frame), len(views), 4), np.nan, dtype=np.float32)
    was_training = session.model.training
    session.model.eval()
    with torch.inference_mode():
        score_planned(session, frame, planned, result, done, label, checkpoint)
    session.model.train(was_training)
    world_size = process_count()
    return gather_scores(session, result) if world_size > 1 else result


def gather_scores(session: Session, scores: np.ndarray) -> np.ndarray:
    """The scores of all processes of a group, from each one's own.

    Where one process has a number, the others have NaN.
    """
    is_scored = ~np.isnan(scores)
    total = torch.from_numpy(np.where(is_scored, scores, 0.0)).to(session.device)
    count = torch.from_numpy(is_scored * 1.0).to(session.device)
    count = all_reduce_sum(count).cpu()
    total = all_reduce_sum(total).cpu()
    return np.where(count > 0, total, np.nan).astype(np.float32)


def parse_letter(text: str) -> str | None:
    """The letter that a generated text consists of, or None when it is anything else.

    >>> parse_letter(" (B)."), parse_letter("d"), parse_letter("a or b")
    ('b', 'd', None)
    """
    match = re.fullmatch(r"\s*\(?([a-d])\)?\.?\s*", text, re.IGNORECASE)
    return match.group(1).lower() if match else None


def generate_baseline(
    session: Session, frame: pd.DataFrame, max_new_tokens: int = 4
) -> list[str | None]:
    """The usual baseline: greedy generation with a strict parser.

    For each row the letter, or None where the text is anything else, see `parse_letter`.
    """
    session.model.get_output_embeddings().to(session.device)
    vision_tower(session.model).to(session.device)
    answers: list[str | None] = []
    for row in range(len(frame)):
        prompt = make_prompt(session, frame, row, [(0, 1, 2, 3)])
        batch = collate(session, [prompt])
        inputs = {}
        for name in MODEL_INPUTS:
            if name in batch and name != "position_ids":  # `generate` computes them itself
                inputs[name] = batch[name].to(session.device)
        pixels = _load_pixels(session, prompt).to(session.device)
        with torch.inference_mode():
            output = session.model.generate(
                **inputs,
                pixel_values=pixels,
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        prompt_length = inputs["input_ids"].shape[1]
        text = session.processor.tokenizer.decode(
            output[0, prompt_length:], skip_special_tokens=True
        )
        answers.append(parse_letter(text))
    return answers


def prompt_tokens(session: Session, frame: pd.DataFrame) -> np.ndarray:
    """(n,) tokens of each row's prompt, its image's included, with the choices in their order."""
    order = tuple(range(len(CHOICES)))
    lengths = []
    for row in range(len(frame)):
        prompt = make_prompt(session, frame, row, [order])
        lengths.append(len(prompt.input_ids))
    return np.array(lengths)


SCORE_ARRAYS = ("ids", "logits", "labels", "view_names")  # of every file of scores


def write_logits(
    path: Path,
    frame: pd.DataFrame,
    logits,
    view_names: Sequence,
    fingerprint: str,
    **row_arrays,
) -> None:
    """Save logits in the run's schema.

    That is ids (n,), logits (n, views, 4), labels (n,) or -1, view_names (views,) and the
    fingerprint. `row_arrays`: further arrays of what is known of each row.
    """
    labels = np.full(len(frame), -1)
    if "label" in frame:
        labels = frame["label"].to_numpy(np.int64)
    write_arrays(
        path,
        fingerprint,
        ids=frame["id"].to_numpy(dtype=str),
        logits=logits.astype(np.float32),
        labels=labels,
        **row_arrays,
        view_names=np.array(view_names, dtype=str),
    )


# === Rows in doubt ================================================================================
def letter_preference(first_scores: np.ndarray, all_scores: np.ndarray) -> np.ndarray:
    """(4,) how much more the first views like each choice, on average, than all views do.

    Both arguments: (n, 4) scores as `combine_views` gives them. A masked choice (-inf) does not
    count.

    >>> first_scores = np.array([[3.0, 0.0, 0.0, 0.0], [5.0, 0.0, 0.0, -np.inf]])
    >>> all_scores = np.array([[2.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, -np.inf]])
    >>> letter_preference(first_scores, all_scores).tolist()
    [2.0, 0.0, 0.0, 0.0]
    """
    is_known = np.isfinite(first_scores)
    zeros = np.zeros(first_scores.shape)
    differences = np.subtract(first_scores, all_scores, out=zeros, where=is_known)
    return differences.sum(axis=0) / np.maximum(1, is_known.sum(axis=0))


def answer_margins(scores: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """(n,) lead of each row's answer over its best rival, less the letters' preference.

    `scores`: (n, 4); `preference`: (4,) or (n, 4), see `letter_preference`. A margin below zero
    says that the rival would lead without that preference.

    >>> scores = np.array([[2.0, 1.0, 0.0, 0.0]])
    >>> answer_margins(scores, np.zeros(4)).tolist()
    [1.0]
    >>> answer_margins(scores, np.array([3.0, 0.0, 0.0, 0.0])).tolist()
    [-2.0]
    """
    answers = (np.arange(len(scores)), scores.argmax(axis=1))
    corrected = scores - preference
    of_answer = corrected[answers]
    corrected[answers] = -np.inf
    of_rival = corrected.max(axis=1)
    return of_answer - of_rival


def rows_in_doubt(margins: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """Sorted numbers of the rows of smallest margin that together cost at most `budget`.

    `margins` and `costs`: (n,), the latter and `budget` in one unit. Rows that cost 0 are left
    out.

    >>> margins = np.array([0.3, 0.1, 0.0])
    >>> rows_in_doubt(margins, costs=np.array([1.0, 2.0, 0.0]), budget=2.5).tolist()
    [1]
    """
    order = np.argsort(margins, kind="stable")
    order = order[costs[order] > 0]
    fits = np.cumsum(costs[order]) <= budget + 1e-9
    return np.sort(order[fits])


def step_costs(
    session: Session,
    frame: pd.DataFrame,
    views: Sequence[TTAView],
    added: Sequence[TTAView],
) -> np.ndarray:
    """(n,) time of each row in the `added` views, which are among `views`.

    The unit is a prompt with one answer; an image that is so many times as large counts so many
    times. A row that has such views pays for its prefix again; one that has none costs 0.
    """
    costs = np.zeros(len(frame))
    for row, (_, record) in enumerate(frame.iterrows()):
        for group in group_views_by_prompt(session, record, views):
            answers = sum(view in added for view in group)
            if answers:
                costs[row] += max(1.0, group[0].scale) * scoring_cost(1, answers)
    return costs


@dataclass(frozen=True)
class Pilot:
    """Held-out rows that are scored in every choice order, whether they are in doubt or not.

    They show which letters the model prefers in fewer orders.
    """

    rows: np.ndarray  # (pilot rows,) their numbers among the fold's held-out rows
    logits: np.ndarray  # (pilot rows, views, 4), NaN in what is no choice order


PREFERENCE_PARTS = 5  # of a fold's pilot; the letters' preference is measured on the other parts


def letter_preferences(
    pilot: Pilot,
    logits: np.ndarray,
    view_names: Sequence[str],
    is_held_out: bool,
) -> np.ndarray:
    """(n, 4) by how much the orders that a row has favour each choice, against all orders.

    `logits`: (n, views, 4) of the rows so far. With `is_held_out` the pilot's rows are among them;
    the preference for a row of the pilot is then measured on other rows.
    """
    orders = [number for number, name in enumerate(view_names) if view_kind(name) in ORDER_KINDS]
    larger = step_views(view_names, "pixels")
    has_order = ~np.isnan(logits[:, orders]).all(axis=2)
    pilot_scores = combine_views(pilot.logits[:, orders])
    part = np.arange(len(pilot.rows)) % PREFERENCE_PARTS
    preferences = np.zeros((len(logits), 4))
    for pattern in np.unique(has_order, axis=0):
        seen = [order for order, has_it in zip(orders, pattern, strict=True) if has_it]
        seen_scores = combine_views(pilot.logits[:, seen])
        alike = (has_order == pattern).all(axis=1)
        preferences[alike] = letter_preference(seen_scores, pilot_scores)
        if not is_held_out:
            continue
        for number in range(PREFERENCE_PARTS):
            inside = part == number
            preference = letter_preference(seen_scores[~inside], pilot_scores[~inside])
            rows = pilot.rows[inside]
            preferences[rows[alike[rows]]] = preference
    # Larger images are half of the score, in rotations, which cancel what a letter is given.
    has_larger = ~np.isnan(logits[:, larger]).all(axis=(1, 2))
    preferences[has_larger] /= 2
    return preferences


def step_margins(
    pilot: Pilot,
    logits: np.ndarray,
    view_names: Sequence[str],
    is_held_out: bool,
) -> np.ndarray:
    """(n,) `answer_margins` of the rows by the views that they have so far.

    The arguments are those of `letter_preferences`.
    """
    preferences = letter_preferences(pilot, logits, view_names, is_held_out)
    return answer_margins(combine_steps(logits, view_names), preferences)


def may_take_step(logits: np.ndarray, view_names: Sequence[str], step: str) -> np.ndarray:
    """(n,) whether each row may take a step: more orders only go on from all rotations."""
    if step != "orders":
        return np.ones(len(logits), dtype=bool)
    rotations = step_views(view_names, "rotations")
    return ~np.isnan(logits[:, rotations]).any(axis=(1, 2))


@dataclass(frozen=True)
class ScoresInDoubt:
    """What the steps of `doubt_steps` gave to some rows."""

    logits: np.ndarray  # (n, views, 4), NaN in the views that a row was not given
    margins: np.ndarray  # (n, steps) by which the rows of each step were chosen
    pilot: Pilot

    def row_arrays(self) -> dict[str, np.ndarray]:
        """What is stored beside the logits."""
        return {
            "margins": self.margins.astype(np.float32),
            "pilot_rows": self.pilot.rows,
            "pilot_logits": self.pilot.logits,
        }


def score_in_steps(
    steps: Sequence[tuple[str, float]],
    view_names: Sequence[str],
    logits: np.ndarray,
    costs: Mapping[str, np.ndarray],
    pilot: Pilot,
    is_held_out: bool,
    score_step: Callable[[str, np.ndarray], np.ndarray],
) -> ScoresInDoubt:
    """Take the `steps`, each for the rows that are in doubt after those before it.

    `logits`: (n, views, 4) in the first views; `costs`: step -> (n,) time of each row in it, in
    rows with one view, the unit of the steps' times; `score_step(step, rows)`: (rows, views, 4) of
    the rows of these numbers, NaN but in the step's views. No label is looked at.
    """
    logits = logits.copy()
    margins = np.zeros((len(logits), len(steps)))
    for number, (step, share) in enumerate(steps):
        margins[:, number] = step_margins(pilot, logits, view_names, is_held_out)
        is_allowed = may_take_step(logits, view_names, step)
        step_cost = np.where(is_allowed, costs[step], 0.0)
        rows = rows_in_doubt(margins[:, number], step_cost, share * len(logits))
        if len(rows):
            added = score_step(step, rows)
            logits[rows] = np.where(np.isnan(added), logits[rows], added)
    return ScoresInDoubt(logits, margins, pilot)


@contextlib.contextmanager
def adapter_switched_off(model) -> Iterator[None]:
    """Let the block compute with the base model alone, while an adapter is in it.

    The adapter's B, of which its update is a product, is zero meanwhile: that is exact, in
    PEFT's layers and in fast and compiled ones, which are not compiled again.
    """
    outputs = {}
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            outputs[name] = weight
    zeros = {name: torch.zeros_like(weight) for name, weight in outputs.items()}
    with swapped_weights(outputs, zeros):
        yield


@dataclass(frozen=True)
class StepScorer:
    """Scores rows of one table in the views of a step, each kept in a file of its own."""

    session: Session
    frame: pd.DataFrame
    views: Sequence[TTAView]
    label: str  # of the progress
    checkpoint: InferenceCheckpoint | None

    def score(self, step: str, rows: np.ndarray) -> np.ndarray:
        """(rows, views, 4) of the rows of these numbers in a step's views, NaN in the others."""
        text = "%s: %d of %d rows are in doubt and get the step %r"
        LOGGER.info(text, self.label, len(rows), len(self.frame), step)
        added = step_views([view.name for view in self.views], step)
        return self.score_views(step, rows, added)

    def score_views(self, name: str, rows: np.ndarray, added: Sequence[int]) -> np.ndarray:
        """As `score`, in the views of these numbers."""
        others = [view for number, view in enumerate(self.views) if number not in added]
        doubtful = self.frame.iloc[rows].reset_index(drop=True)
        checkpoint = self.checkpoint and _checkpoint_of_rows(self.checkpoint, name, rows)
        model_in_use = contextlib.nullcontext()
        if name == "base":
            model_in_use = adapter_switched_off(self.session.model)
        with model_in_use:
            return predict_logits(
                self.session,
                doubtful,
                self.views,
                f"{self.label}, {name}",
                checkpoint,
                scored_views=others,
            )


def _checkpoint_of_rows(
    checkpoint: InferenceCheckpoint, name: str, rows: np.ndarray
) -> InferenceCheckpoint:
    """A file of its own beside `checkpoint`, which is good for a step of these very rows only."""
    file = checkpoint.path.name.replace(".partial", f".{name}.partial")
    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    return dataclasses.replace(
        checkpoint,
        path=checkpoint.path.with_name(file),
        fingerprint=f"{checkpoint.fingerprint} {name} {digest}",
    )


def score_pilot(scorer: StepScorer, first_logits: np.ndarray, steps: Iterable[str]) -> Pilot:
    """The pilot among the scorer's rows, the held-out ones of a fold, in every choice order.

    `first_logits`: (n, views, 4) in the first views.
    """
    names = [view.name for view in scorer.views]
    count = min(PILOT_ROWS, len(first_logits))
    rows = np.linspace(0, len(first_logits) - 1, count).astype(np.int64)
    logits = first_logits[rows]
    added = []
    for step in steps:
        if step in ("rotations", "orders"):
            added += step_views(names, step)
    if added:
        further = scorer.score_views("pilot", rows, added)
        logits = np.where(np.isnan(further), logits, further)
    return Pilot(rows, logits)


def predict_in_steps(
    session: Session,
    frame: pd.DataFrame,
    views: Sequence[TTAView],
    label: str,
    checkpoint: InferenceCheckpoint | None,
    pilot: Pilot | None = None,
) -> ScoresInDoubt:
    """As predict_logits, but with the views of `doubt_steps` for the rows in doubt only.

    Without a `pilot` the rows are a fold's held-out ones, among which it is chosen and scored; they
    then take the very steps that test rows take, and no row is chosen by its own pilot scores.
    """
    steps = session.config.doubt_steps
    names = [view.name for view in views]
    first = [views[number] for number in first_views(names, dict(steps))]
    later = [view for view in views if view not in first]
    scorer = StepScorer(session, frame, views, label, checkpoint)
    logits = predict_logits(session, frame, views, label, checkpoint, scored_views=later)
    is_held_out = pilot is None
    if is_held_out:
        pilot = score_pilot(scorer, logits, dict(steps))
    costs = {}
    for step, _ in steps:
        added = [views[number] for number in step_views(names, step)]
        costs[step] = step_costs(session, frame, views, added)
    return score_in_steps(steps, names, logits, costs, pilot, is_held_out, scorer.score)


# === Early stopping and weight averages ===========================================================
class EarlyStopping:
    """Says when a value has not improved for `patience` calls: `if early_stopping(acc): break`.

    Improved is better by more than `min_delta`; better is larger with mode="max", smaller with
    mode="min". Raises ValueError for any other mode.

    >>> early_stopping = EarlyStopping(patience=2, min_delta=0.01)
    >>> [early_stopping(value) for value in (0.5, 0.6, 0.605, 0.6)]
    [False, False, False, True]
    """

    patience: int  # calls without improvement after which to stop
    min_delta: float  # in units of the value
    logger: logging.Logger | None  # is told about a stop
    sign: int  # 1 where larger is better, else -1
    best: float  # the best value so far; infinitely bad before the first call
    waited: int  # calls since the best value

    def __init__(
        self,
        patience: int,
        mode: str = "max",
        min_delta: float = 0.0,
        logger: logging.Logger | None = None,
    ):
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', not {mode!r}")
        self.patience = patience
        self.min_delta = min_delta
        self.logger = logger
        self.sign = 1 if mode == "max" else -1
        self.best = -self.sign * math.inf
        self.waited = 0

    def __call__(self, value: float) -> bool:
        """Whether to stop, now that the value is this one."""
        if self.sign * (value - self.best) > self.min_delta:  # never true for NaN
            self.best = float(value)
            self.waited = 0
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
        self.best = state["best"]
        self.waited = state["waited"]


class WeightAverager:
    """Average of parameters over optimizer steps, by torch.optim.swa_utils.

    kind="ema": the exponential moving average with `decay`. kind="swa": the plain mean
    (stochastic weight averaging). Raises ValueError for any other kind.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> averager = WeightAverager("swa", {"weight": weight})
    >>> averager.update()
    >>> weight.data.fill_(3.0).tolist()
    [3.0]
    >>> averager.update()
    >>> averager.average["weight"].tolist()
    [2.0]
    """

    kind: str  # "ema" or "swa"
    parameters: dict  # name -> the parameter that is trained; only read
    decay: float  # of "ema": the weight of the average before an update, at most
    updates: int  # calls of `update`
    average: dict  # name -> average, on the parameter's device; empty before the first update

    def __init__(self, kind: str, parameters: Mapping, decay: float = 0.999):
        if kind not in ("ema", "swa"):
            raise ValueError(f"kind must be 'ema' or 'swa', not {kind!r}")
        self.kind = kind
        self.parameters = dict(parameters)
        self.decay = decay
        self.updates = 0
        self.average = {}

    def update(self) -> None:
        """Take the present parameters into the average."""
        if self.updates == 0:
            for name, value in self.parameters.items():
                self.average[name] = value.detach().clone()
        else:
            averages = list(self.average.values())
            parameters = list(self.parameters.values())
            combine = self._averaging_function()
            combine(averages, parameters, self.updates)
        self.updates += 1

    def _averaging_function(self) -> Callable:
        """From (averages, parameters, number of updates) to the averages, in place."""
        if self.kind == "swa":
            return torch.optim.swa_utils.get_swa_multi_avg_fn()
        # Less than `decay` at first, so that a short run does not keep its initial weights.
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        return torch.optim.swa_utils.get_ema_multi_avg_fn(decay)

    def state_dict(self) -> dict:
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: Mapping) -> None:
        self.updates = state["updates"]
        self.average = {}
        if self.updates:
            # In the order of the parameters: the averages are combined list by list.
            for name, parameter in self.parameters.items():
                self.average[name] = state["average"][name].to(parameter.device)


# === Epochs =======================================================================================
WINDOW_STEPS = 8  # optimizer steps whose rows are sorted by length together


def padding_share(lengths: Sequence[int], batches: Iterable[Sequence[int]]) -> float:
    """Share of padded positions among all that the batches hold, 0 to 1.

    `lengths`: tokens of each row; `batches`: numbers of the rows that are padded together.

    >>> padding_share([2, 4], [[0, 1]])
    0.25
    """
    tokens = 0
    positions = 0
    for batch in batches:
        batch_lengths = [lengths[row] for row in batch]
        tokens += sum(batch_lengths)
        positions += len(batch_lengths) * max(batch_lengths)
    if not positions:  # a process of a group may have no row at all
        return 0.0
    return 1 - tokens / positions


def training_order(config: Config, epoch: int, sample_id: str) -> tuple[int, ...]:
    """The choice order in which one question is shown in one epoch.

    order[position] = original choice; a function of (seed, epoch, sample id).

    >>> training_order(Config.preset("demo", shuffle_choices=False), 0, "train_0001")
    (0, 1, 2, 3)
    >>> sorted(training_order(Config.preset("demo"), 0, "train_0001"))
    [0, 1, 2, 3]
    """
    if not config.shuffle_choices:
        return (0, 1, 2, 3)
    generator = seeded_generator(config.seed, epoch, sample_id)
    return tuple(generator.permutation(4).tolist())


def training_variant(config: Config, epoch: int, sample_id: str) -> tuple[int, int]:
    """(variant of the image, wording of the instruction) of one question in one epoch.

    A function of (seed, epoch, sample id).

    >>> config = Config.preset("demo", augment_images=0, paraphrases=1)
    >>> training_variant(config, 0, "train_0001")
    (0, 0)
    """
    generator = seeded_generator(config.seed, epoch, sample_id, "look")
    variant = int(generator.integers(config.augment_images + 1))
    wording = int(generator.integers(config.paraphrases))
    return variant, wording


def plan_epoch(lengths: Sequence[int], step_size: int, seed_keys: Sequence) -> list[np.ndarray]:
    """The row numbers of each optimizer step of an epoch.

    A shuffle seeded by `seed_keys`: every row once, `step_size` rows a step, and the short tail
    kept. `lengths`: tokens of each row. Within a window of WINDOW_STEPS steps, rows of similar
    length share a step and stand in order, so that little is padded.

    >>> steps = plan_epoch([9, 5, 8, 4], step_size=2, seed_keys=(42, 0, 1))
    >>> sorted(step.tolist() for step in steps)
    [[2, 0], [3, 1]]
    """
    generator = seeded_generator(*seed_keys)
    steps = []
    shuffled = generator.permutation(len(lengths))
    window_size = step_size * WINDOW_STEPS
    for window_start in range(0, len(shuffled), window_size):
        rows = shuffled[window_start : window_start + window_size]
        rows = rows[np.argsort(np.asarray(lengths)[rows], kind="stable")]
        starts = range(0, len(rows), step_size)
        window_steps = [rows[first : first + step_size] for first in starts]
        for number in generator.permutation(len(window_steps)):
            steps.append(window_steps[number])
    return steps


def split_steps(
    steps: Sequence[np.ndarray], micro_batch: int, rank: int, world_size: int
) -> list[list[np.ndarray]]:
    """For each optimizer step the rows of this process, at most `micro_batch` to a forward pass.

    Each process takes every n-th row of a step, so that all have about the same lengths.

    >>> [first_step] = split_steps([np.arange(6)], micro_batch=2, rank=1, world_size=2)
    >>> [rows.tolist() for rows in first_step]
    [[1, 3], [5]]
    """
    split = []
    for step in steps:
        own_rows = step[rank::world_size]
        starts = range(0, len(own_rows), micro_batch)
        split.append([own_rows[start : start + micro_batch] for start in starts])
    return split


@dataclass(frozen=True)
class TrainingPhase:
    """Epochs that train on the same rows, and their place in a fold's training.

    Epochs and steps count from 0, through all phases.
    """

    variants: pd.DataFrame  # its rows, all with one variant of the images, then the next
    rows: pd.DataFrame  # its rows with the original images
    is_pretraining: bool  # on the rows of extra_train_dirs alone
    epochs: int
    steps: int  # optimizer steps of each epoch
    first_epoch: int
    first_step: int

    @property
    def all_steps(self) -> int:
        """Of all its epochs."""
        return self.epochs * self.steps

    def steps_before(self, epoch: int) -> int:
        """Optimizer steps of the whole training before one of its epochs."""
        return self.first_step + (epoch - self.first_epoch) * self.steps


@dataclass(frozen=True)
class TrainingSchedule:
    """The rows and steps of every epoch of a fold: pretraining, if any, then the fold's own."""

    phases: tuple[TrainingPhase, ...]

    def __str__(self) -> str:
        """In words, such as "9 rows (epochs: 1, steps: 3), then ..."."""
        parts = []
        for phase in self.phases:
            length = f"epochs: {phase.epochs}, steps: {phase.all_steps}"
            parts.append(f"{len(phase.rows)} rows ({length})")
        return ", then ".join(parts)

    def phase(self, epoch: int) -> TrainingPhase:
        """The phase that the epoch belongs to."""
        *earlier, last = self.phases
        for phase in earlier:
            if epoch < phase.first_epoch + phase.epochs:
                return phase
        return last

    @property
    def all_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return sum(phase.all_steps for phase in self.phases)

    @property
    def all_rows(self) -> int:
        """Questions of the whole training, each as often as it comes."""
        return sum(phase.epochs * len(phase.rows) for phase in self.phases)


def plan_training(config: Config, variants: pd.DataFrame) -> TrainingSchedule:
    """What each epoch of a fold trains on.

    `variants`: all rows that the fold trains on (columns of `all_rows`, and `variant`), all with
    one variant of their images, then the next. With `pretrain_epochs` the rows of
    extra_train_dirs come in the first epochs, and in these alone.
    """
    parts = [(False, config.num_epochs, variants)]
    if config.pretrain_epochs:
        related = is_related(variants)
        own_variants = variants[~related].reset_index(drop=True)
        related_variants = variants[related].reset_index(drop=True)
        parts = [
            (True, config.pretrain_epochs, related_variants),
            (False, config.num_epochs, own_variants),
        ]
    phases = []
    first_epoch = 0
    first_step = 0
    for is_pretraining, epochs, part_variants in parts:
        rows = part_variants.query("variant == 0")
        phase = TrainingPhase(
            variants=part_variants,
            rows=rows,
            is_pretraining=is_pretraining,
            epochs=epochs,
            steps=math.ceil(len(rows) / (config.batch_size * config.grad_accum_steps)),
            first_epoch=first_epoch,
            first_step=first_step,
        )
        phases.append(phase)
        first_epoch += epochs
        first_step += phase.all_steps
    return TrainingSchedule(tuple(phases))


def training_prompts(
    session: Session, config: Config, variants: pd.DataFrame, n_rows: int, epoch: int
) -> list[Prompt]:
    """Every training row as the epoch shows it: image, wording and choice order.

    `config`: the session's, with the seed to draw with. `variants`: the `n_rows` training rows,
    once for each variant of their images: all rows of the originals first, then all of the next
    variant.
    """
    ids = variants["id"].iloc[:n_rows]
    drawn = [training_variant(config, epoch, sample_id) for sample_id in ids]
    variant, wording = np.array(drawn).T
    frame = variants.iloc[variant * n_rows + np.arange(n_rows)].assign(wording=wording)
    prompts = []
    for row, sample_id in enumerate(ids):
        order = training_order(config, epoch, sample_id)
        prompts.append(make_prompt(session, frame, row, [order]))
    return prompts


# === Optimizer steps ==============================================================================
def make_optimizer(session: Session, parameters: Mapping):
    """AdamW over the trainable `parameters` (by name)."""
    return torch.optim.AdamW(
        parameters.values(),
        lr=session.config.learning_rate,
        weight_decay=session.config.weight_decay,
        fused=session.device.type == "cuda",
    )


def make_averagers(config: Config, parameters: Mapping) -> dict[str, WeightAverager]:
    """By kind ("ema", "swa"), the averages that the configuration asks for."""
    kinds = []
    if config.use_ema:
        kinds.append("ema")
    if config.use_swa:
        kinds.append("swa")
    return {kind: WeightAverager(kind, parameters, config.ema_decay) for kind in kinds}


def seed_dropout(config: Config, fold: int, epoch: int, step: int) -> None:
    """Make dropout a function of the step, so that a resumed run draws the same masks."""
    rank = process_rank()
    generator = seeded_generator(config.seed, fold, epoch, step, f"dropout {rank}")
    torch.manual_seed(int(generator.integers(2**31)))


class ReplayableBatches:
    """Batches that can be gone through again, from the first, after a failure on the way.

    They are taken one by one, so that the next is prepared meanwhile.

    >>> batches = ReplayableBatches(["first", "second"])
    >>> next(iter(batches)), list(batches)
    ('first', ['first', 'second'])
    """

    waiting: Iterator  # batches that nobody has asked for yet
    taken: list  # batches that `__iter__` has handed out

    def __init__(self, batches: Iterable):
        self.waiting = iter(batches)
        self.taken = []

    def __iter__(self) -> Iterator:
        yield from tuple(self.taken)
        for batch in self.waiting:
            self.taken.append(batch)
            yield batch


def smaller_memory_plan(plan: MemoryPlan, may_recompute: bool) -> MemoryPlan | None:
    """The plan to go on with when memory has run out: half the questions in a forward pass.

    With `may_recompute` (gradient checkpointing) no layer keeps its activations any more. None
    where nothing is left to give up.

    >>> smaller_memory_plan(MemoryPlan(micro_batch=8, stored_layers=2), may_recompute=True)
    MemoryPlan(micro_batch=4, stored_layers=0, peak_gib=0.0)
    >>> smaller_memory_plan(MemoryPlan(micro_batch=1, stored_layers=0), may_recompute=True)
    """
    gives_up_layers = may_recompute and plan.stored_layers > 0
    if plan.micro_batch == 1 and not gives_up_layers:
        return None
    stored_layers = 0 if gives_up_layers else plan.stored_layers
    return MemoryPlan(math.ceil(plan.micro_batch / 2), stored_layers)


# === Fold state ===================================================================================
class FoldState:
    """What one fold's training has in memory, and its checkpoints.

    A fresh adapter, its optimizer, and how far the training is. Epochs and steps count from 0.
    """

    # Given to the constructor.
    session: Session  # base model, processor, letter tokens
    run: Run  # directory, tables, fingerprint
    member: int  # its number, see Members
    fold: int  # the member's
    name: str  # of the member in words
    config: Config  # the session's, with the member's seed

    # Filled by `_choose_rows`.
    schedule: TrainingSchedule  # the rows and steps of every epoch
    validation: pd.DataFrame  # the held-out rows

    # Filled by `_attach_adapter`.
    model: object  # the base model with the adapter attached
    parameters: dict  # name -> weight of the adapter, fp32, on the device

    # Filled by `_prepare_steps`.
    step_size: int  # rows of an optimizer step, over all processes
    epochs: int  # to be trained at most, those of pretraining among them
    optimizer: object
    scheduler: object  # of the learning rate: warm-up, then cosine, through all phases
    scaler: object  # of the loss, against underflow in fp16; disabled in other precisions
    averagers: dict[str, WeightAverager]  # "ema", "swa" -> average of `parameters`
    early_stopping: EarlyStopping  # on the validation accuracy
    stateful_parts: dict[str, object]  # by name in a checkpoint: all with a state_dict

    # Filled by `_open_files`.
    checkpoints: CheckpointManager
    metrics: MetricLogger  # one line per optimizer step

    # Begun by `_reset_progress`. A checkpoint also holds history, losses, best and skipped:
    # `save` and `resume` name them.
    history: list[dict]  # one record per finished epoch; by `end_epoch`
    losses: list[float]  # of the current epoch's steps, NaN: skipped; by `train_epoch`
    # "score" [accuracy, -nll] or None, "epoch", "tensors", "logits" of the held-out rows; by
    # `end_epoch`
    best: dict
    skipped: int  # steps without an update, in the whole fold; by `skip_step`
    next_step: int  # the next one of the current epoch; by `train_epoch`
    padding: float  # share of padded positions in the current epoch; by `train_epoch`
    gradient_norm: float  # of the last step, before clipping; by `optimizer_step`
    last_save: float  # seconds on the monotonic clock; by `save`

    def __init__(self, session: Session, run: Run, member: int):
        self.session = session
        self.run = run
        self.member = member
        self.fold = fold_of(session.config, member)
        self.name = member_name(session.config, member)
        seed = seed_of(session.config, member)
        self.config = dataclasses.replace(session.config, seed=seed)
        self._choose_rows()
        self._attach_adapter()
        self._prepare_steps()
        self._open_files()
        self._reset_progress()

    def _choose_rows(self) -> None:
        config = self.config
        # Changed images are the same for all seeds, which share their cached features.
        seed = self.session.config.seed
        variants = image_variants(all_rows(self.run), config.augment_images, seed)
        self.schedule = plan_training(config, training_rows(self.run, self.fold, variants))
        if config.pretrain_epochs:
            text = "Decision: fold %s trains on the rows of extra_train_dirs first: %s"
            LOGGER.info(text, self.name, self.schedule)
        is_held_out = self.run.train["fold"] == self.fold
        self.validation = self.run.train[is_held_out].reset_index(drop=True)

    def _attach_adapter(self) -> None:
        config = self.config
        self.model = attach_lora(self.session.model, config, config.seed + self.fold)
        use_fast_layers(self.session, self.model, self.schedule.all_rows)
        self.parameters = trainable_parameters(self.model)

    def _prepare_steps(self) -> None:
        config = self.config
        self.step_size = config.batch_size * config.grad_accum_steps
        self.epochs = config.all_epochs
        self.optimizer = make_optimizer(self.session, self.parameters)
        # One for all phases. On the demo a warm-up anew for the fold's own rows, which are few,
        # forgets more than it learns.
        all_steps = self.schedule.all_steps
        warmup_steps = round(all_steps * config.warmup_ratio)
        self.scheduler = transformers.get_cosine_schedule_with_warmup(
            self.optimizer, warmup_steps, all_steps
        )
        is_fp16 = self.session.runtime.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.session.device.type, enabled=is_fp16)
        self.averagers = make_averagers(config, self.parameters)
        self.early_stopping = EarlyStopping(
            config.early_stopping_patience,
            min_delta=config.early_stopping_min_delta,
            logger=LOGGER,
        )
        self.stateful_parts = {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "early_stopping": self.early_stopping,
            **self.averagers,
        }

    def _open_files(self) -> None:
        folder = self.run.fold_dir(self.member)
        self.checkpoints = CheckpointManager(folder / "checkpoints")
        self.metrics = MetricLogger(folder / "metrics.jsonl")

    def _reset_progress(self) -> None:
        self.history = []
        self.losses = []
        self.best = {"score": None, "epoch": -1, "tensors": {}, "logits": None}
        self.skipped = 0
        self.next_step = 0
        self.padding = 0.0
        self.gradient_norm = math.nan
        self.last_save = time.monotonic()

    def save(self, epoch: int, step: int) -> None:
        """Commit the state before optimizer step `step` of `epoch`."""
        # No random state: every draw is a function of (seed, epoch, sample id or step).
        state = {name: part.state_dict() for name, part in self.stateful_parts.items()}
        state["best"] = self.best
        metadata = {
            "epoch": epoch,
            "step_in_epoch": step,
            "fingerprint": self.run.fingerprint,
            "libraries": library_versions(),
            "precision": self.session.runtime.precision,
            "history": self.history,
            "losses": self.losses,
            "skipped": self.skipped,
            "plan": dataclasses.asdict(self.plan),
        }
        steps_done = self.schedule.phase(epoch).steps_before(epoch) + step
        self.checkpoints.save(steps_done, self.parameters, state, metadata)
        back_up(self.run, self.member)
        self.last_save = time.monotonic()

    def resume(self) -> tuple[int, int]:
        """The (epoch, step) to do next, by the newest verified checkpoint.

        Raises CheckpointError for a checkpoint of another run, and for one whose weights are
        not the model's.
        """
        path = self.checkpoints.latest_verified()
        if path is None:
            return 0, 0
        tensors, state, metadata = self.checkpoints.restore(path)
        require_same_run(path, metadata["fingerprint"], self.run.fingerprint)
        libraries = metadata.get("libraries", {})
        require_fitting_weights(path, tensors, self.parameters, libraries)
        set_weights(self.parameters, tensors)
        for name, part in self.stateful_parts.items():
            if name != "scaler":
                part.load_state_dict(state[name])
        self._resume_scaler(state["scaler"], metadata.get("precision"))
        self.best = {"logits": None, **state["best"]}  # earlier versions kept no logits
        self.history = metadata["history"]
        self.losses = metadata["losses"]
        self.skipped = metadata["skipped"]
        self.plan = MemoryPlan(**metadata["plan"])
        epoch = metadata["epoch"]
        step = metadata["step_in_epoch"]
        LOGGER.info("Fold %s continues at epoch %d, step %d", self.name, epoch + 1, step)
        return epoch, step

    def _resume_scaler(self, state: Mapping, before: str | None) -> None:
        """Go on with the scale of the loss; with a fresh one where another format was used.

        `before` is the number format of the training until here; None where an earlier version
        did not note it. Formats differ between cards where precision is "auto".
        """
        now = self.session.runtime.precision
        if before is None:  # only a scaler that was in use has a state
            was_fp16 = bool(state)
            is_same = was_fp16 == self.scaler.is_enabled()
            before = "fp16" if was_fp16 else "another precision"
        else:
            is_same = before == now
        if is_same:
            self.scaler.load_state_dict(state)
            return
        scale = "with a fresh GradScaler" if self.scaler.is_enabled() else "without a GradScaler"
        self.session.add_note(
            f"fold {self.name}: this card computes in {now}, the one before in {before}: "
            f"training continues in {now} {scale}, and its results are not bitwise those of one "
            "card; set precision to have the same on both"
        )

    @functools.cached_property
    def plan(self) -> MemoryPlan:
        """The checkpoint's, else the session's, measured by its first fold.

        `use_smaller_plan` replaces it when memory runs out.
        """
        if self.session.memory_plan is None:
            copies = 2 + len(self.averagers)  # AdamW's two moments
            state_bytes = copies * sum(value.nbytes for value in self.parameters.values())
            self.model.train()
            # Lengths differ between epochs where images or wordings do.
            differ = self.config.augment_images or self.config.paraphrases > 1
            prompts = []
            for phase in self.schedule.phases:
                for number in range(phase.epochs if differ else 1):
                    prompts += self.epoch_prompts(phase.first_epoch + number)
            self.session.memory_plan = plan_memory(self.session, prompts, state_bytes)
        return self.session.memory_plan

    def use_smaller_plan(self, plan: MemoryPlan, n_rows: int) -> None:
        """Go on with `plan`, here and in later folds; steps keep their `n_rows` questions."""
        self.plan = plan
        self.session.memory_plan = plan
        recompute_layers(self.session, plan.stored_layers)
        self.session.add_note(
            f"fold {self.name}: out of memory, {plan.micro_batch} questions per forward pass "
            f"from here on; an optimizer step still takes {n_rows}"
        )

    def epoch_prompts(self, epoch: int) -> list[Prompt]:
        """Every row of that epoch as it shows it, see `training_prompts`."""
        phase = self.schedule.phase(epoch)
        n_rows = len(phase.rows)
        return training_prompts(self.session, self.config, phase.variants, n_rows, epoch)


# === Fold training ================================================================================
@dataclass(frozen=True)
class FoldResult:
    """What a trained fold leaves behind: best epoch, learning curve, the kinds of weights."""

    fold: int
    best_epoch: int  # from 1
    history: pd.DataFrame  # one row per epoch
    kinds: dict[str, dict]  # "raw", "ema", "swa" -> validation accuracy and nll
    adapters: dict[str, str]  # "raw", "ema", "swa" -> SHA-256 of its weights
    seed: int | None = None  # of the training; None: the run's first one

    @property
    def name(self) -> str:
        """The fold, and the seed where it is a further one."""
        return str(self.fold) if self.seed is None else f"{self.fold} seed {self.seed}"


def read_fold_result(run: Run, member: int) -> FoldResult:
    """The result.json of a finished fold, or of one of its models with further seeds.

    Raises DamagedFileError where it is not as it was written, CheckpointError where it is
    another run's.
    """
    path = run.fold_dir(member) / "result.json"
    names = [item.name for item in dataclasses.fields(FoldResult) if item.name != "seed"]
    content = read_json(path, names)
    # Earlier versions of this module wrote none.
    require_same_run(path, content.get("fingerprint", run.fingerprint), run.fingerprint)
    require_kind(path, content, int, ["fold", "best_epoch"])
    require_kind(path, content, dict, ["kinds", "adapters"])
    require_kind(path, content, list, ["history"])
    is_final = fold_of(run.config, member) == run.final_fold
    if not is_final:  # of which no row is held out, and nothing measured
        require_kind(path, content["kinds"], dict, [*content["kinds"]])
        losses = [scores.get("nll") for scores in content["kinds"].values()]
        if not losses or None in losses:
            raise DamagedFileError(path, "'kinds' is without an nll")
    content["history"] = pd.DataFrame(content["history"])
    results = {name: content[name] for name in names}
    return FoldResult(**results, seed=content.get("seed"))


_NO_TIME = "because the rest of the time budget is needed for inference"


class FoldTrainer(FoldState):
    """One fold's training, from its state to its result: `fit` does it all.

    Accuracy and NLL choose the best epoch; EMA and SWA weights are scored once, at the end.
    """

    def fit(self) -> FoldResult:
        """Train from the newest checkpoint to the end and write what a finished fold has.

        That is adapters, validation logits and result.json.
        """
        epoch, step = self.resume()
        recompute_layers(self.session, self.plan.stored_layers)
        while epoch < self.epochs and not self.has_stopped_early():
            try:
                speed = self.train_epoch(epoch, step)
                self.end_epoch(epoch, speed)
            except Interrupted:
                self.save(epoch, self.next_step)
                raise
            # Else it was noted already.
            is_whole_epoch = self.next_step == self.schedule.phase(epoch).steps
            epoch += 1
            step = 0
            if self.config.save_every_epoch or epoch == self.epochs:
                self.save(epoch, step)
            if epoch < self.epochs and any_process(self.time_is_up(speed)):
                if is_whole_epoch:
                    self.session.add_note(
                        f"fold {self.name}: training stopped after epoch {epoch}, {_NO_TIME}"
                    )
                break
        return self.finish()

    def has_stopped_early(self) -> bool:
        """Whether early stopping has said so, here or before the checkpoint."""
        return self.early_stopping.waited >= self.early_stopping.patience

    def time_is_up(self, speed: float) -> bool:
        """Whether the time left is needed for inference.

        `speed` of the training in questions per second.
        """
        seconds = self.session.seconds_per_question
        if not seconds:  # unknown: scoring is three times as fast as training
            seconds = 1 / max(3 * speed, 1e-9)
        needed = inference_seconds(self.run, seconds, self.session, training=1)
        return self.run.seconds_left() < needed

    def train_epoch(self, epoch: int, first_step: int) -> float:
        """Do the optimizer steps from `first_step` on of one epoch; questions per second.

        There is none to do where only the epoch's validation is left.
        """
        self.model.train()
        phase = self.schedule.phase(epoch)
        prompts = self.epoch_prompts(epoch)
        micro_batch = self.plan.micro_batch
        lengths = [len(prompt.input_ids) for prompt in prompts]
        steps = plan_epoch(lengths, self.step_size, (self.config.seed, self.fold, epoch))
        passes = split_steps(steps, micro_batch, process_rank(), process_count())
        self.padding = padding_share(lengths, itertools.chain.from_iterable(passes))
        passes_to_do = list(itertools.chain.from_iterable(passes[first_step:]))
        batches = iterate_batches(self.session, prompts, passes_to_do)
        start = time.perf_counter()
        questions = 0
        speed = 0.0
        self.next_step = first_step
        for step in range(first_step, len(steps)):
            step_batches = itertools.islice(batches, len(passes[step]))
            loss = self.optimizer_step(epoch, step, step_batches, steps[step])
            self.losses.append(loss)
            self.next_step = step + 1
            questions += len(steps[step])
            speed = questions / (time.perf_counter() - start)
            if self.is_save_due(phase.steps_before(epoch) + step + 1):
                self.save(epoch, step + 1)
            self.log_step(epoch, step, speed)
            if step + 1 == len(steps):
                break
            # The first steps are slow: their speed says nothing about scoring.
            is_settled = bool(self.session.seconds_per_question or step - first_step >= 20)
            if any_process(is_settled and self.time_is_up(speed)):
                self.session.add_note(
                    f"fold {self.name}: training stopped in epoch {epoch + 1} "
                    f"after step {step + 1} of {len(steps)}, {_NO_TIME}"
                )
                break
        return speed

    def is_save_due(self, steps_done: int) -> bool:
        """Whether the config's minutes or steps ask for a checkpoint."""
        seconds = time.monotonic() - self.last_save
        by_time = seconds > self.config.save_every_minutes * 60
        return by_time or steps_done % self.config.save_every_steps == 0

    def optimizer_step(
        self, epoch: int, step: int, batches: Iterable[Mapping], rows: Sequence[int]
    ) -> float:
        """Update by the mean gradient over `rows`; their mean loss, NaN for a skipped step.

        Raises FloatingPointError for one skipped step too many.
        """
        loss = self.accumulate_gradients(epoch, step, batches, len(rows))
        loss = all_reduce_sum(loss)
        all_reduce_gradients(self.parameters.values())
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        loss, norm = torch.stack([loss, norm]).tolist()  # waits for the GPU
        self.gradient_norm = norm
        if math.isfinite(loss) and math.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.update_schedule_and_averages(epoch)
        elif not (math.isfinite(loss) and self.can_lower_scale()):
            ids = self.schedule.phase(epoch).rows["id"].iloc[rows].tolist()
            self.skip_step(
                f"loss {loss}, gradient norm {norm} at epoch {epoch + 1}, step {step}, rows {ids}"
            )
        self.scaler.update()  # lowers its scale after gradients that overflowed
        self.optimizer.zero_grad(set_to_none=True)
        return loss if math.isfinite(norm) else math.nan

    def can_lower_scale(self) -> bool:
        """Whether gradients that overflowed in fp16 may fit with a smaller scale of the loss."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1e-3

    def skip_step(self, problem: str) -> None:
        """Count and note a step without an update; FloatingPointError for one too many."""
        self.session.add_note(f"fold {self.name}: skipped a step: {problem}")
        self.skipped += 1
        if self.skipped > self.config.max_skipped_steps:
            raise FloatingPointError(
                f"{self.skipped} steps were not finite, the last: {problem}; "
                "lower learning_rate, or set precision='fp32' where memory allows"
            )

    def accumulate_gradients(self, epoch: int, step: int, batches: Iterable[Mapping], n_rows: int):
        """Add up the gradients of the mean loss over `n_rows` questions; that loss, a tensor.

        In smaller parts, from here on, when memory runs out.
        """
        batches = ReplayableBatches(batches)
        while True:
            seed_dropout(self.config, self.fold, epoch, step)
            loss = torch.zeros((), device=self.session.device)
            # Makes its scale, also in a process of a group that has no row of this step.
            self.scaler.scale(loss)
            try:
                for batch in split_batches(self.session, batches, self.plan.micro_batch):
                    loss += self.backward_batch(batch, n_rows)
                return loss
            except torch.OutOfMemoryError as error:
                plan = smaller_memory_plan(self.plan, self.config.gradient_checkpointing)
                if plan is None:
                    raise out_of_memory_error(error) from error
            # The activations went with the error, whose traceback held them.
            self.optimizer.zero_grad(set_to_none=True)
            clear_memory(LOGGER)
            self.use_smaller_plan(plan, n_rows)

    def backward_batch(self, batch: Mapping, n_rows: int):
        """Add the gradients of a batch's part of the mean loss over `n_rows`; that part."""
        states = answer_hidden_states(self.session, batch)
        share = len(batch["prompts"]) / n_rows
        loss = training_loss(self.session, states, batch) * share
        self.scaler.scale(loss).backward()
        return loss.detach()

    def update_schedule_and_averages(self, epoch: int) -> None:
        """Advance both by a step; SWA averages over a tail of constant learning rate.

        No average takes in weights of the pretraining.
        """
        own_epoch = epoch - self.config.pretrain_epochs
        in_tail = "swa" in self.averagers and own_epoch >= self.config.swa_start_epoch
        if not in_tail:
            self.scheduler.step()
        for kind, averager in self.averagers.items():
            if in_tail or (kind == "ema" and own_epoch >= 0):
                averager.update()

    def log_step(self, epoch: int, step: int, speed: float) -> None:
        """Report a step in metrics.jsonl and as progress; Interrupted where that says so."""
        memory = memory_summary()
        loss = self.losses[-1]
        details = {
            "loss": round(loss, 4),
            "lr": f"{self.optimizer.param_groups[0]['lr']:.1e}",
            "samples/s": round(speed, 1),
            "GiB": memory.get("gpu_peak_gib", memory["rss_gib"]),
        }
        in_full = {**details, "loss": loss}
        self.metrics.log(epoch=epoch, step=step, gradient_norm=self.gradient_norm, **in_full)
        label = f"fold {self.name} training"
        steps_done = self.schedule.phase(epoch).steps_before(epoch) + step + 1
        all_steps = self.schedule.all_steps
        self.session.progress(label, steps_done, all_steps, together=True, **details)

    def held_out_logits(self) -> np.ndarray:
        """Logits (n, 1, 4) of the held-out rows, through the inference path."""
        label = f"fold {self.name} validation"
        views = [TTAView("rotation 0")]
        return predict_logits(self.session, self.validation, views, label)

    def held_out_scores(self, logits: np.ndarray) -> dict[str, float]:
        """Accuracy and NLL of the held-out rows' logits (n, 1, 4); {} where no row is held out."""
        if not len(logits):
            return {}
        probabilities = softmax(logits[:, 0])
        labels = self.validation["label"].to_numpy()
        return {
            "accuracy": accuracy(probabilities, labels),
            "nll": negative_log_likelihood(probabilities, labels),
        }

    def preferred_letter(self, logits: np.ndarray) -> str:
        """Which letter the logits (n, 1, 4) of the held-out rows prefer by far; "" for none."""
        if not len(logits):
            return ""
        diversity = prediction_diversity(softmax(logits[:, 0]), self.validation["label"])
        return describe_preference(diversity) if diversity["collapsed"] else ""

    def is_best(self, score: Sequence[float] | None) -> bool:
        """Whether an epoch with this score, at its end, is the one to keep so far.

        Pretraining is kept only until an epoch on the fold's own rows is done.
        """
        if self.best["score"] is None or self.best["epoch"] < self.config.pretrain_epochs:
            return True
        return score > self.best["score"]

    def end_epoch(self, epoch: int, speed: float) -> None:
        """Validate, keep the best weights, and record the epoch in history.csv and the log.

        What the held-out rows say of pretraining is recorded, and decides nothing.
        """
        phase = self.schedule.phase(epoch)
        logits = self.held_out_logits()
        scores = self.held_out_scores(logits)
        preference = self.preferred_letter(logits)
        if preference:  # later epochs may cure it: `save_weights` warns
            LOGGER.info("Fold %s epoch %d: %s", self.name, epoch + 1, preference)
        # Without held-out rows there are no scores, and the last epoch is the best.
        score = [scores["accuracy"], -scores["nll"]] if scores else None
        if self.is_best(score):
            tensors = {}
            for name, value in self.parameters.items():
                tensors[name] = value.detach().cpu().clone()
            self.best = {
                "score": score,
                "epoch": epoch,
                "tensors": tensors,
                "logits": torch.from_numpy(logits),
            }
        record = {
            "epoch": epoch + 1,
            "loss": float(np.nanmean(self.losses)),
            "samples_per_second": round(speed, 1),
            **scores,
            "padding_share": round(self.padding, 3),
        }
        if self.config.pretrain_epochs:
            record["rows"] = "pretraining" if phase.is_pretraining else "own"
        self.losses = []
        self.history.append(record)
        path = self.run.fold_dir(self.member) / "history.csv"
        write_table(pd.DataFrame(self.history), path)
        rounded = {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in record.items()
        }
        LOGGER.info("Fold %s epoch %d: %s", self.name, epoch + 1, rounded)
        if self.config.use_early_stopping and scores and not phase.is_pretraining:
            self.early_stopping(scores["accuracy"])

    def finish(self) -> FoldResult:
        """Score each kind of weights on the held-out rows, save its adapter, write result.json."""
        weights = {"raw": self.best["tensors"]}
        for kind, averager in self.averagers.items():
            if averager.updates:
                weights[kind] = averager.average
        kinds = {}
        adapters = {}
        known_logits = {}
        if self.best["logits"] is not None:  # of its epoch's end
            known_logits["raw"] = self.best["logits"].numpy()
        for kind, tensors in weights.items():
            kinds[kind], adapters[kind] = self.save_weights(kind, tensors, known_logits.get(kind))
        folder = self.run.fold_dir(self.member)
        best_epoch = self.best["epoch"] + 1
        result = {
            "fold": self.fold,
            "best_epoch": best_epoch,
            "kinds": kinds,
            "history": self.history,
            "adapters": adapters,
            "fingerprint": self.run.fingerprint,
        }
        if self.member != self.fold:
            result["seed"] = self.config.seed
        atomic_write(folder / "result.json", json.dumps(result))
        LOGGER.info("Fold %s: best epoch %d, held-out %s", self.name, best_epoch, kinds)
        return read_fold_result(self.run, self.member)

    def save_weights(
        self,
        kind: str,
        tensors: Mapping,
        known_logits: np.ndarray | None,
    ) -> tuple[dict, str]:
        """Write an adapter, in PEFT's format, and its validation logits.

        These are computed where they are not known yet. Returns its scores on the held-out rows
        and the SHA-256 of its weights.
        """
        folder = self.run.fold_dir(self.member)
        adapter = folder / f"adapter_{kind}"
        if adapter.exists():  # a damaged one: PEFT would read its model card
            shutil.rmtree(adapter)
        with swapped_weights(self.parameters, tensors):
            self.model.save_pretrained(adapter)
            logits = known_logits
            if logits is None:
                logits = self.held_out_logits()
        preference = self.preferred_letter(logits)
        if preference:
            self.session.add_note(f"fold {self.name}, {kind} weights: {preference}")
        path = folder / f"validation_{kind}.npz"
        write_logits(path, self.validation, logits, ["rotation 0"], self.run.fingerprint)
        sha256 = file_sha256(adapter / "adapter_model.safetensors")
        return self.held_out_scores(logits), sha256


# ======= 6. Evidence ==============================================================================

# === Calibration ==================================================================================
# Columns are always the original choices a, b, c, d. In logits, -inf marks a choice that is absent
# from the row, and a view of NaN only marks a view that the row does not have. Labels are 0-3.
# Lists, arrays and torch tensors are all welcome.
TEMPERATURE_BOUNDS = (0.05, 20.0)
CALIBRATION_PARTS = 5  # of the rows; each part is scaled by temperatures fitted on the others
SHRINKAGE_ROWS = 50  # a fold of so many rows keeps half of its own log-temperature


def why_at_bound(all_right: bool, is_upper: bool) -> str:
    """Why the best temperature of some rows lies at an end of TEMPERATURE_BOUNDS.

    `all_right`: whether all rows are answered rightly; `is_upper`: which end it is.

    >>> why_at_bound(all_right=True, is_upper=False)
    'all answers are right, so nothing shows how sure to be'
    """
    if all_right:
        return "all answers are right, so nothing shows how sure to be"
    if is_upper:
        return "the right choices score no higher than the others: no information about the answers"
    return "nearly all answers are right, and the others only just wrong"


class TemperatureScaler:
    """Temperature scaling, softmax(logits / T), which changes no answer.

    Guo et al. 2017, arXiv:1706.04599. Below, half of the answers are right:

    >>> logits = [[2.0, 0.0, 0.0, 0.0]] * 4
    >>> scaler = TemperatureScaler().fit(logits, labels=[0, 0, 1, 2])
    >>> scaler.transform(logits)[0].round(2).tolist()
    [0.5, 0.17, 0.17, 0.17]
    """

    temperature: float | None = None  # T, set by `fit`
    at_bound: bool = False  # set by `fit`: the data asked for a T outside TEMPERATURE_BOUNDS
    bound_reason: str = ""  # set by `fit`: why they did

    def fit(self, logits, labels, logger=None) -> TemperatureScaler:
        """Choose the T of the least negative log-likelihood, and return the scaler itself.

        `logits`: (n, choices) or (n, views, choices); `labels`: (n,). Raises ValueError
        for a row that is labelled with a masked choice.
        """
        logits = combine_views(logits)
        labels = _as_labels(labels, logits.shape)
        self._refuse_masked_labels(logits, labels)
        rows = np.arange(len(labels))

        def loss(log_temperature: float) -> float:  # convex in 1 / T: it has one valley
            scaled = logits / math.exp(log_temperature)
            return -special.log_softmax(scaled, axis=1)[rows, labels].mean()

        low, high = np.log(TEMPERATURE_BOUNDS)
        best = minimize_scalar(
            loss,
            bounds=(low, high),
            method="bounded",
            options={"xatol": 1e-6},
        ).x
        self.temperature = math.exp(best)
        if logger is not None:
            logger.info("temperature %.3f fitted on %d rows", self.temperature, len(labels))
        # The search never quite touches its ends.
        self.at_bound = min(best - low, high - best) < 1e-3
        if self.at_bound:
            all_right = bool((logits.argmax(axis=1) == labels).all())
            self.bound_reason = why_at_bound(all_right, is_upper=self.temperature > 1)
            advice = "temperature %.2g is at its bound: %s"
            (logger or LOGGER).warning(advice, self.temperature, self.bound_reason)
        return self

    @staticmethod
    def _refuse_masked_labels(logits: np.ndarray, labels: np.ndarray) -> None:
        """Raise ValueError where the label's logit is -inf: no temperature makes it likely."""
        masked = np.isneginf(logits[np.arange(len(labels)), labels])
        if masked.any():
            raise ValueError(
                f"row {masked.argmax()} is labelled with a masked choice: drop the row or unmask it"
            )

    def transform(self, logits) -> np.ndarray:
        """(n, choices) calibrated probabilities of (n, choices) or (n, views, choices) logits.

        Raises ValueError before `fit`.
        """
        if self.temperature is None:
            raise ValueError("this TemperatureScaler is not fitted: call fit(logits, labels) first")
        return softmax(combine_views(logits) / self.temperature)


def shrink_temperatures(temperatures, fold_sizes, pooled) -> np.ndarray:
    """(folds,) temperatures with log T pulled towards the log of the pooled temperature.

    A fold of n rows keeps the weight n / (n + 50), because the T of one fold is noisy:
    in our simulation of a true T of 2 its standard deviation was 0.36 at 50 rows and
    0.20 at 200.

    >>> shrink_temperatures([4.0, 1.0], fold_sizes=[50, 50], pooled=1.0).round(6).tolist()
    [2.0, 1.0]
    """
    sizes = _as_array(fold_sizes)
    weight = sizes / (sizes + SHRINKAGE_ROWS)
    own_part = weight * np.log(_as_array(temperatures))
    return np.exp(own_part + (1 - weight) * math.log(pooled))


@dataclass(frozen=True)
class Calibration:
    """Temperatures for the test rows, and cross-fitted probabilities for the OOF rows."""

    temperatures: dict[int, float]  # fold -> T; any other (the final model) -> pooled T
    probabilities: np.ndarray  # (n, 4), each row scaled by a T that was fitted without it


def fold_temperatures(
    scores: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
) -> dict[int, float]:
    """Fold -> temperature of its rows; any other fold number gives the pooled temperature.

    Each is shrunk toward the pooled one, because the rows of a fold are few. `scores`:
    (n, 4); `labels` and `folds`: (n,).
    """
    pooled = TemperatureScaler().fit(scores, labels).temperature
    fold_numbers, sizes = np.unique(folds, return_counts=True)
    separate = []
    for fold in fold_numbers:
        inside = folds == fold
        scaler = TemperatureScaler().fit(scores[inside], labels[inside])
        separate.append(scaler.temperature)
    shrunk = shrink_temperatures(separate, sizes, pooled).tolist()
    return defaultdict(lambda: pooled, zip(fold_numbers.tolist(), shrunk, strict=True))


def calibrate(
    scores: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    enabled: bool = True,
) -> Calibration:
    """Temperature scaling of combined scores (n, 4); `enabled=False` keeps every T at 1."""
    if not enabled:
        ones = dict.fromkeys(np.unique(folds).tolist(), 1.0)
        return Calibration(defaultdict(lambda: 1.0, ones), softmax(scores))
    part = np.arange(len(labels)) % CALIBRATION_PARTS
    row_temperatures = np.ones(len(labels))
    for number in np.unique(part):
        inside = part == number
        fitted = fold_temperatures(scores[~inside], labels[~inside], folds[~inside])
        row_temperatures[inside] = [fitted[fold] for fold in folds[inside]]
    return Calibration(
        temperatures=fold_temperatures(scores, labels, folds),
        probabilities=softmax(scores / row_temperatures[:, None]),
    )


# === Intervals and paired tests ===================================================================
RESAMPLES = 2000  # of the images, for an interval


def row_scores(probabilities, labels) -> np.ndarray:
    """(n, 2): whether the most probable choice is the label (1 or 0), and -log p(label).

    Both are NaN for a row of NaN, which was not predicted.

    >>> probabilities = np.array([[0.5, 0.3, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1]])
    >>> row_scores(probabilities, np.array([0, 1])).round(2).tolist()
    [[1.0, 0.69], [0.0, 1.2]]
    """
    label_probability = probabilities[np.arange(len(labels)), labels]
    loss = -np.log(np.maximum(label_probability, PROBABILITY_FLOOR))
    is_correct = probabilities.argmax(axis=1) == labels
    return np.column_stack([np.where(np.isnan(loss), np.nan, is_correct), loss])


def image_groups(frame: pd.DataFrame) -> np.ndarray:
    """(n,) the number of each row's image: rows of one image are not independent.

    Where all rows show one image, each row gets a number of its own.

    >>> image_groups(pd.DataFrame({"pixel_hash": ["cat", "dog", "cat"]})).tolist()
    [0, 1, 0]
    """
    groups = pd.factorize(frame["pixel_hash"])[0]
    if groups.any():
        return groups
    return np.arange(len(groups))  # all grey, as a control, leaves nothing else to draw


def _group_draws(n_groups: int) -> np.ndarray:
    """(RESAMPLES, n_groups) how often each group is in each resample; always the same numbers.

    Groups are drawn with replacement.
    """
    even = np.full(n_groups, 1 / n_groups)
    return np.random.default_rng(0).multinomial(n_groups, even, size=RESAMPLES)


def _sums_by_group(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(groups, columns) sums of (n, columns) values over the rows of each group."""
    return pd.DataFrame(values).groupby(groups).sum().to_numpy()


def bootstrap_interval(changes, groups, fitted_parameters=1.0) -> np.ndarray:
    """(2, columns) ends of the 90 % percentile intervals (Efron 1979) of the columns' means.

    `changes`: (n, columns), NaN where a row was not compared; `groups`: (n,) whole
    groups are drawn, because the rows of one image are not independent (Field and Welsh
    2007); `fitted_parameters`: how many numbers a step fits to the labels, of all
    columns or of each.

    The interval is for what a step gains on average when it is fitted on so many rows
    (Bates, Hastie and Tibshirani 2023). Where nothing changes it is short, but not a
    single point:

    >>> bootstrap_interval(np.zeros((98, 1)), np.arange(98)).round(3).tolist()
    [[-0.014], [0.014]]
    """
    # Two imaginary questions, of which one gains and one loses sqrt(1 / 2). This is Agresti and
    # Min's (2005) half a row in each cell of the paired table, without which the interval is a
    # single point where few answers differ.
    #
    # A cross-fitted NLL with p fitted numbers varies more than its rows show, because each row
    # helps to fit for the others. The p / n^2 of variance that sqrt(p / 2) adds is measured, not
    # derived: without it the intervals of weights and stacks held the true change in 3 to 5
    # points fewer of 192 simulated data sets each of 200 and 2,000 rows.
    imaginary_change = np.sqrt(np.asarray(fitted_parameters) / 2)
    imaginary = np.broadcast_to(imaginary_change, changes.shape[1:])
    changes = np.vstack([changes, imaginary, -imaginary])
    groups = np.concatenate([groups, groups.max() + np.array([1, 2])])

    is_known = np.isfinite(changes)
    sums = _sums_by_group(np.where(is_known, changes, 0), groups)
    sizes = _sums_by_group(is_known, groups)
    draws = _group_draws(len(sums))
    means = draws @ sums / np.maximum(1, draws @ sizes)
    return np.quantile(means, [0.05, 0.95], axis=0)


def accuracy_interval(correct, groups) -> tuple[float, float]:
    """Ends of the 90 % interval of the accuracy, from (n,) right or wrong.

    `groups` (n,): rows of one image share a number and are drawn together.

    >>> low, high = accuracy_interval([True] * 80 + [False] * 20, np.arange(100))
    >>> round(low, 2), round(high, 2)
    (0.73, 0.86)
    """
    correct = np.asarray(correct, dtype=float)
    mean = correct.mean()
    deviations = (correct - mean)[:, None]  # about zero: the imaginary rows must not shift it
    low, high = mean + bootstrap_interval(deviations, groups)[:, 0]
    return max(0.0, float(low)), min(1.0, float(high))


def compare_paired(correct_a, correct_b) -> dict:
    """Is b better than a? `gain` in accuracy, `wins`, `losses` and `p_value`.

    Takes two (n,) arrays of right or wrong on the same rows, else raises ValueError.
    `wins` counts the rows where only b is right. The test is exact (McNemar 1947).

    >>> compare_paired([1, 0, 0, 0], [1, 1, 1, 0])
    {'gain': 0.5, 'wins': 2, 'losses': 0, 'p_value': 0.5}
    """
    a = np.asarray(correct_a, dtype=bool)
    b = np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"need the same rows twice, got shapes {a.shape} and {b.shape}")
    wins = int((b & ~a).sum())
    losses = int((a & ~b).sum())
    differing = wins + losses
    p_value = binomtest(wins, differing).pvalue if differing else 1.0
    return {
        "gain": (wins - losses) / max(1, len(a)),
        "wins": wins,
        "losses": losses,
        "p_value": float(p_value),
    }


def points_with_interval(change: float, low: float, high: float) -> str:
    """A change of a share in points, with the ends of its interval.

    >>> points_with_interval(0.254, 0.201, 0.305)
    '+25.4 (20.1 to 30.5)'
    >>> points_with_interval(-0.0001, -0.012, 0.011)
    '+0.0 (-1.2 to 1.1)'
    """
    points = [round(100 * value, 1) + 0.0 for value in (change, low, high)]  # no "-0.0"
    return "{:+.1f} ({:.1f} to {:.1f})".format(*points)


# === Ensembles ====================================================================================
# Judge what is fitted here by cross_fit: on its own 200 rows a stack of ten models looks good,
# elsewhere it loses. In our simulation a stack that is fitted on 4/5 of the rows looks 0.35
# standard errors worse than one fitted on all: hence the many parts.
CROSS_FIT_PARTS = 20
STACK_FLOOR = 1e-3  # log(1e-12) for a masked choice would drown every other feature
GREEDY_ROUNDS = 20


def majority_vote(probabilities) -> np.ndarray:
    """(n,) labels with the most votes of (members, n, choices) probabilities.

    Ties go to the higher mean probability, then to the earlier choice.

    >>> first, second, third = [[0.9, 0.1]], [[0.4, 0.6]], [[0.4, 0.6]]
    >>> majority_vote([first, second, third]).tolist()
    [1]
    >>> majority_vote([first, second]).tolist()
    [0]
    """
    probabilities = _as_probabilities(probabilities, ndim=3)
    ballots = np.eye(probabilities.shape[2])[probabilities.argmax(axis=2)]
    votes = ballots.sum(axis=0)
    # Rounded, or the order of summation would decide between equal means.
    mean = probabilities.mean(axis=0).round(12)
    has_most_votes = votes == votes.max(axis=1, keepdims=True)
    return np.where(has_most_votes, mean, -1).argmax(axis=1)


def average_probabilities(probabilities, weights=None) -> np.ndarray:
    """(n, choices) arithmetic mean of (members, n, choices) probabilities.

    `weights`: (members,), if they are not to count alike.

    >>> average_probabilities([[[0.75, 0.25]], [[0.25, 0.75]]]).tolist()
    [[0.5, 0.5]]
    >>> average_probabilities([[[1.0, 0.0]], [[0.0, 1.0]]], weights=[3, 1]).tolist()
    [[0.75, 0.25]]
    """
    return np.average(_as_probabilities(probabilities, ndim=3), axis=0, weights=weights)


def optimize_ensemble_weights(probabilities, labels, logger=None) -> np.ndarray:
    """(members,) weights of the weighted mean with the least NLL; none negative, their sum is 1.

    `probabilities`: (members, n, choices); `labels`: (n,). Found by SLSQP; where that
    does not converge, the weights are uniform, with a warning.

    >>> good, ignorant = [[0.9, 0.1], [0.1, 0.9]], [[0.5, 0.5], [0.5, 0.5]]
    >>> optimize_ensemble_weights([good, ignorant], labels=[0, 1]).round(3).tolist()
    [1.0, 0.0]
    """
    probabilities = _as_probabilities(probabilities, ndim=3)
    labels = _as_labels(labels, probabilities.shape)
    label_probability = probabilities[:, np.arange(len(labels)), labels]
    likelihood = np.maximum(label_probability, PROBABILITY_FLOOR)  # (members, n)
    uniform = np.full(len(likelihood), 1 / len(likelihood))

    def loss_and_gradient(weights):
        mixed = np.maximum(weights @ likelihood, PROBABILITY_FLOOR)
        return -np.log(mixed).mean(), -(likelihood / mixed).mean(axis=1)

    result = minimize(
        loss_and_gradient,
        uniform,
        jac=True,
        method="SLSQP",
        options={"ftol": 1e-9},
        bounds=[(0, 1)] * len(uniform),
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
    )
    if result.success:
        weights = result.x.clip(min=0)
    else:
        problem = "ensemble weights are uniform: SLSQP did not converge: %s"
        (logger or LOGGER).warning(problem, result.message)
        weights = uniform
    return weights / weights.sum()


def greedy_weights(probabilities, labels) -> np.ndarray:
    """(members,) weights by forward selection with replacement, on the NLL of the mean.

    `probabilities`: (members, n, choices); `labels`: (n,). Caruana et al. 2004, ICML.

    >>> good, ignorant = [[0.9, 0.1], [0.1, 0.9]], [[0.5, 0.5], [0.5, 0.5]]
    >>> greedy_weights([good, ignorant], labels=[0, 1]).tolist()
    [1.0, 0.0]
    """
    probabilities = _as_probabilities(probabilities, ndim=3)
    labels = _as_labels(labels, probabilities.shape)
    likelihood = probabilities[:, np.arange(len(labels)), labels]  # (members, n)
    counts = np.zeros(len(likelihood))  # how often each member was selected
    total = np.zeros(len(labels))  # likelihood of each row, summed over the selection
    for size in range(1, GREEDY_ROUNDS + 1):
        with_each_member = (total + likelihood) / size
        losses = -np.log(np.maximum(with_each_member, PROBABILITY_FLOOR)).mean(axis=1)
        best = losses.argmin()
        counts[best] += 1
        total += likelihood[best]
    return counts / GREEDY_ROUNDS


def _stack_features(members: np.ndarray) -> np.ndarray:
    """(n, members * choices) log-probabilities of (members, n, choices), side by side."""
    return np.hstack(np.log(np.maximum(members, STACK_FLOOR)))


@dataclass(frozen=True)
class Stack:
    """A logistic regression on the members' log-probabilities, as `stack` fits it."""

    model: object  # sklearn's LogisticRegression, fitted
    members: np.ndarray  # (members, n, choices) probabilities that it was fitted on
    strength: float  # sklearn's C: the penalty on a squared coefficient is 1 / (2 C)

    def predict_proba(self, probabilities) -> np.ndarray:
        """(n, choices) probabilities for the (members, n, choices) of other rows."""
        members = _as_probabilities(probabilities, ndim=3)
        is_open = (members > 0).any(axis=0)  # a choice that every member masks stays at 0
        stacked = self.model.predict_proba(_stack_features(members)) * is_open
        return stacked / stacked.sum(axis=1, keepdims=True)

    def fitted_parameters(self) -> float:
        """Effective number of parameters of the penalised fit, tr(S S).

        S = (H + penalty)^-1 H, where H is the Hessian of the unpenalised loss. Hastie
        and Tibshirani 1990, 3.5.
        """
        features = _stack_features(self.members)
        predicted = self.model.predict_proba(features)
        n_choices = predicted.shape[1]
        inputs = np.column_stack([features, np.ones(len(features))])
        hessian = _softmax_hessian(inputs, predicted)
        penalty_of_choice = np.full(inputs.shape[1], 1 / self.strength)
        penalty_of_choice[-1] = 1e-6  # none on the intercept, but nothing is singular
        penalty = np.diag(np.tile(penalty_of_choice, n_choices))
        shrunk = np.linalg.solve(hessian + penalty, hessian)
        return float(np.trace(shrunk @ shrunk))


def _softmax_hessian(inputs: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Hessian of a softmax regression's loss, in blocks of (inputs, inputs) per pair of choices.

    `inputs`: (n, inputs), the column of ones included; `predicted`: (n, choices).
    """
    identity = np.eye(predicted.shape[1])
    spread = predicted[:, :, None] * (identity - predicted[:, None])  # (n, choices, choices)
    blocks = []
    for row_of_pairs in spread.T:
        blocks.append([(inputs * pair[:, None]).T @ inputs for pair in row_of_pairs])
    return np.block(blocks)


def stack(probabilities, labels, strength=0.03) -> Stack:
    """A fitted stack (Wolpert 1992) of (members, n, choices) probabilities on (n,) labels.

    `strength` is sklearn's C. It is small on purpose: 0.03 was best in our simulations.
    Raises ValueError where a choice never occurs in the labels.
    """
    # Imported here because importing sklearn draws from the global random generator.
    from sklearn.linear_model import LogisticRegression

    members = _as_probabilities(probabilities, ndim=3)
    labels = _as_labels(labels, members.shape)
    unseen = set(range(members.shape[2])) - set(labels.tolist())
    if unseen:
        raise ValueError(
            f"choices {sorted(unseen)} never occur in the labels: "
            "too few rows to stack, use the mean"
        )
    model = LogisticRegression(C=strength, max_iter=2000)
    model.fit(_stack_features(members), labels)
    return Stack(model, members, strength)


def cross_fit(fit_and_predict, probabilities, labels, folds) -> np.ndarray:
    """(n, choices) predictions of each fold, by what is fitted on the other folds.

    Calls `fit_and_predict(fit_inputs, fit_labels, predict_inputs)` once for each fold.
    Rows are on the last axis but one: (members, n, choices) probabilities, or (n,
    choices) logits. Raises ValueError unless there is one fold number per row and there
    are at least two folds.

    >>> def always_the_first_label(fit_inputs, fit_labels, predict_inputs):
    ...     return np.eye(2)[np.full(len(predict_inputs), fit_labels[0])]
    >>> logits, labels, folds = np.zeros((3, 2)), [0, 0, 1], [0, 0, 1]
    >>> cross_fit(always_the_first_label, logits, labels, folds).tolist()
    [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]
    """
    inputs = _as_array(probabilities)
    labels = _as_labels(labels, inputs.shape)
    folds = np.asarray(folds)
    if folds.shape != labels.shape or len(np.unique(folds)) < 2:
        raise ValueError(
            f"need one fold number per row ({len(labels)}) and at least two folds, "
            f"got {folds.shape}"
        )
    predictions = np.full(inputs.shape[-2:], np.nan)
    for fold in np.unique(folds):
        held_out = folds == fold
        predictions[held_out] = fit_and_predict(
            inputs[..., ~held_out, :],
            labels[~held_out],
            inputs[..., held_out, :],
        )
    return predictions


# A blend is a way to combine members: (members and labels to fit on, members) -> (n, choices).


def _blend_by_mean(fit_members, fit_labels, members) -> np.ndarray:
    return average_probabilities(members)


def _blend_by_geometric_mean(fit_members, fit_labels, members) -> np.ndarray:
    return softmax(np.log(np.maximum(members, PROBABILITY_FLOOR)).mean(axis=0))


def _blend_by_vote(fit_members, fit_labels, members) -> np.ndarray:
    return np.eye(members.shape[2])[majority_vote(members)]  # all on the answer


def _blend_by_optimized_weights(fit_members, fit_labels, members) -> np.ndarray:
    weights = optimize_ensemble_weights(fit_members, fit_labels)
    return average_probabilities(members, weights)


def _blend_by_greedy_weights(fit_members, fit_labels, members) -> np.ndarray:
    return average_probabilities(members, greedy_weights(fit_members, fit_labels))


def _blend_by_stack(fit_members, fit_labels, members) -> np.ndarray:
    return stack(fit_members, fit_labels).predict_proba(members)


BLENDS = {
    "mean": _blend_by_mean,
    "geometric mean": _blend_by_geometric_mean,
    "vote": _blend_by_vote,
    "weighted": _blend_by_optimized_weights,
    "greedy": _blend_by_greedy_weights,
    "stacked": _blend_by_stack,
}


def fit_and_blend(
    name: str,
    fit_members: np.ndarray,
    fit_labels: np.ndarray,
    members: np.ndarray,
    scaling: bool = True,
) -> np.ndarray:
    """(n, choices) predictions for (members, n, choices) by a blend and its temperature.

    Both are fitted on `fit_members` and their labels. `name`: a key of BLENDS.
    """
    n_fit = len(fit_labels)
    all_members = np.concatenate([fit_members, members], axis=1)
    mixed = BLENDS[name](fit_members, fit_labels, all_members)
    if name == "vote" or not scaling:  # a vote has no probabilities to scale
        return mixed[n_fit:]
    # A mean of honest probabilities is too timid: unscaled, a blend could win by its confidence,
    # not by its answers.
    scores = np.log(np.maximum(mixed, PROBABILITY_FLOOR))
    scaler = TemperatureScaler().fit(scores[:n_fit], fit_labels)
    scaled = scaler.transform(scores[n_fit:])
    scaled *= (members > 0).any(axis=0)  # a masked choice: the floor would give it a share
    return scaled / scaled.sum(axis=1, keepdims=True)


def count_fitted_parameters(name: str, members: np.ndarray, labels: np.ndarray) -> float:
    """How many numbers, beside its temperature, a blend fits to (members, n, choices).

    Of a stack its effective parameters; of weights those above zero, but one, because
    their sum is 1; else 0.
    """
    if name == "stacked":
        return stack(members, labels).fitted_parameters()
    if name == "weighted":
        weights = optimize_ensemble_weights(members, labels)
    elif name == "greedy":
        weights = greedy_weights(members, labels)
    else:
        return 0.0
    return float((weights > 1e-6).sum() - 1)


@dataclass(frozen=True)
class Candidate:
    """One of several ways to answer the same rows, from which evidence chooses."""

    probabilities: np.ndarray  # (n, choices) cross-fitted: each row's without its label
    fitted_parameters: float = 0.0  # numbers fitted to the labels, as in `bootstrap_interval`


def _shows_every_choice(labels: np.ndarray, part: np.ndarray, n_choices: int) -> bool:
    """Whether the labels of the rows outside each part still hold all choices."""
    choices_outside = [len(np.unique(labels[part != number])) for number in np.unique(part)]
    return all(count == n_choices for count in choices_outside)


def cross_fitted_blends(
    members: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    names: Iterable[str] = BLENDS,
    scaling: bool = True,
) -> dict[str, Candidate]:
    """Name -> that blend of (members, n, choices), each part fitted on the groups of others.

    A stack is left out where it would not see every choice.
    """
    part = groups % CROSS_FIT_PARTS
    if not _shows_every_choice(labels, part, members.shape[2]):
        names = [name for name in names if name != "stacked"]
    candidates = {}
    for name in names:
        fit_and_predict = functools.partial(fit_and_blend, name, scaling=scaling)
        candidates[name] = Candidate(
            probabilities=cross_fit(fit_and_predict, members, labels, part),
            fitted_parameters=count_fitted_parameters(name, members, labels),
        )
    return candidates


# === Automatic choice =============================================================================
# The evidence: six numbers for each group (the rows of one image) and candidate, numbered here.
# They compare the candidate's scores with the first one's, summed over the rows of the group;
# squares and products are of these sums. Added up over groups, they give the standard error in
# `_choose`.
ACCURACY_CHANGE = 0
NLL_CHANGE = 1
NLL_CHANGE_SQUARED = 2
NLL_CHANGE_TIMES_ROWS = 3
ROWS = 4
ROWS_SQUARED = 5


def _evidence_by_group(candidates: Mapping[str, Candidate], labels, groups) -> np.ndarray:
    """(groups, 6, candidates) sums from which `_choose` decides, numbered as above."""
    scores = np.stack(
        [row_scores(candidate.probabilities, labels) for candidate in candidates.values()],
        axis=2,
    )  # (n, 2, candidates): accuracy and NLL
    changes = scores - scores[:, :, :1]
    grouped = pd.DataFrame(changes.reshape(len(labels), -1)).groupby(np.asarray(groups))
    sums = grouped.sum().to_numpy().reshape(-1, *changes.shape[1:])
    accuracy_change = sums[:, 0]
    nll_change = sums[:, 1]
    rows = grouped.size().to_numpy()[:, None]
    evidence = np.empty((len(sums), 6, len(candidates)))
    evidence[:, ACCURACY_CHANGE] = accuracy_change
    evidence[:, NLL_CHANGE] = nll_change
    evidence[:, NLL_CHANGE_SQUARED] = nll_change**2
    evidence[:, NLL_CHANGE_TIMES_ROWS] = nll_change * rows
    evidence[:, ROWS] = rows
    evidence[:, ROWS_SQUARED] = rows**2
    return evidence


def _choose(evidence: np.ndarray) -> np.ndarray:
    """The number of the candidate to use, from sums over groups.

    `evidence` has shape (..., 6, candidates); the result keeps any axes before these two. It
    is the candidate of least mean NLL among those that beat the first by more than one
    standard error and lose no accuracy against it; without such a one it is the first.

    Let s be the NLL change of a group, n its rows and N all rows. The mean change is
    m = sum(s) / N, and a group departs from it by s - m n. Groups are independent, hence
    the standard error of m is sqrt(sum((s - m n)^2)) / N. The square is multiplied out
    below, because m is known only when the sums are complete.
    """
    # A resample of few images may hold no row outside a part: no division by zero.
    rows = np.maximum(1, evidence[..., ROWS, :])
    mean = evidence[..., NLL_CHANGE, :] / rows
    squared_departures = (
        evidence[..., NLL_CHANGE_SQUARED, :]
        - 2 * mean * evidence[..., NLL_CHANGE_TIMES_ROWS, :]
        + mean**2 * evidence[..., ROWS_SQUARED, :]
    )
    standard_error = np.sqrt(np.maximum(0, squared_departures)) / rows
    is_better = (mean < -standard_error) & (evidence[..., ACCURACY_CHANGE, :] >= 0)
    # All others count as 0, the first one's own change: where none is better, argmin takes
    # the first.
    return np.where(is_better, mean, 0).argmin(axis=-1)


def choose_blend(candidates: Mapping[str, Candidate], labels, groups) -> str:
    """Name of the best candidate that beats the first one's NLL by over one standard error.

    It must not lose accuracy either; without such a candidate it is the first. Breiman
    and others (1984) chose the size of trees by a similar rule. A vote has probabilities
    0 and 1, so that one wrong row makes its NLL huge: it is hardly ever chosen. `labels`
    and `groups`: (n,).

    >>> labels, images = np.array([0, 1, 0, 1]), np.arange(4)
    >>> unsure = Candidate(np.full((4, 2), 0.5))
    >>> right = Candidate(np.eye(2)[labels] * 0.8 + 0.1)
    >>> wrong = Candidate(np.eye(2)[1 - labels] * 0.8 + 0.1)
    >>> choose_blend({"mean": unsure, "weighted": right, "stacked": wrong}, labels, images)
    'weighted'
    """
    evidence = _evidence_by_group(candidates, labels, groups)
    return list(candidates)[_choose(evidence.sum(axis=0))]


def choose_cross_fitted(candidates: Mapping[str, Candidate], labels, groups) -> np.ndarray:
    """(n, choices) probabilities of the automatic choice, made for each part by the others.

    The groups are dealt into CROSS_FIT_PARTS parts; for each, the candidate is chosen on
    the other parts. The candidates are not fitted again: they were cross-fitted once,
    with all parts but the row's own.
    """
    probabilities = [candidate.probabilities for candidate in candidates.values()]
    evidence = _evidence_by_group(candidates, labels, groups)
    part_of_group = np.unique(groups) % CROSS_FIT_PARTS
    part_of_row = groups % CROSS_FIT_PARTS
    result = np.full_like(probabilities[0], np.nan)
    for number in np.unique(part_of_row):
        inside = part_of_row == number
        chosen = _choose(evidence[part_of_group != number].sum(axis=0))
        result[inside] = probabilities[chosen][inside]
    return result


def _imaginary_changes(candidates: Mapping[str, Candidate]) -> np.ndarray:
    """(candidates, 2) changes in accuracy and NLL of the imaginary question that gains.

    As in `bootstrap_interval`: sqrt(p / 2), with p = 1 for accuracy and the candidate's
    fitted_parameters for NLL. The first candidate is compared with itself: no change.
    """
    squares = []
    for candidate in candidates.values():
        squares.append([0.5, candidate.fitted_parameters / 2])
    imaginary = np.sqrt(squares)
    imaginary[0] = 0
    return imaginary


def choice_interval(candidates: Mapping[str, Candidate], labels, groups) -> np.ndarray:
    """(2, 2) ends of the 90 % intervals of what `choose_cross_fitted` gains on the first one.

    Rows are the lower and upper ends; columns are the changes of accuracy and of NLL, of
    which a negative one is better. As `bootstrap_interval`, but each resample chooses
    anew, so that the uncertainty of the choice counts. If all choose the first, both ends
    are 0.
    """
    evidence = _evidence_by_group(candidates, labels, groups)
    part_of_group = np.unique(groups) % CROSS_FIT_PARTS
    imaginary = _imaginary_changes(candidates)
    draws = _group_draws(len(evidence) + 2)
    group_draws = draws[:, :-2]
    imaginary_draws = draws[:, -2:]  # of the two imaginary questions: one gains, one loses
    signs = imaginary_draws @ [1, -1]

    sums_by_part = []  # of each (RESAMPLES, 6, candidates)
    for number in np.unique(part_of_group):
        inside = part_of_group == number
        part_sums = np.tensordot(group_draws[:, inside], evidence[inside], axes=1)
        sums_by_part.append(part_sums)
    total = sum(sums_by_part)

    resamples = np.arange(RESAMPLES)
    changes = np.zeros((RESAMPLES, 2))  # of accuracy and NLL, summed over the rows
    for part_sums in sums_by_part:
        chosen = _choose(total - part_sums)  # (RESAMPLES,)
        chosen_sums = part_sums[resamples, :, chosen]  # (RESAMPLES, 6)
        # Parts may choose differently: each adds its share of the imaginary questions' changes.
        imaginary_changes = imaginary[chosen] * signs[:, None] / len(sums_by_part)
        changes += chosen_sums[:, [ACCURACY_CHANGE, NLL_CHANGE]] + imaginary_changes
    rows = total[:, ROWS, :1] + imaginary_draws.sum(axis=1, keepdims=True)
    return np.quantile(changes / rows, [0.05, 0.95], axis=0)


# === Out-of-fold rows =============================================================================
@dataclass(frozen=True)
class OofLogits:
    """Out-of-fold logits of every trained fold, in the row order of the training frame."""

    frame: pd.DataFrame  # (n,) rows of the training frame, with fold
    logits: np.ndarray  # (n, views, 4); NaN where a row does not have the view
    labels: np.ndarray  # (n,)
    folds: np.ndarray  # (n,) the fold that held the row out
    view_names: tuple[str, ...]
    tokens: np.ndarray | None = None  # (n,) of the prompts; None where an earlier version scored
    # Steps whose views were scored in a pass of their own, and only where an answer was in doubt.
    steps: tuple[str, ...] = ()
    margins: np.ndarray | None = None  # (n, steps) by which the rows of each step were chosen

    @property
    def groups(self) -> np.ndarray:
        """(n,) the number of each row's image."""
        return image_groups(self.frame)

    def cost(self, views: Sequence[int]) -> float:
        """Mean time of scoring a row in those of the views that it has.

        The unit is a question with one view.
        """
        exists = ~np.isnan(self.logits).all(axis=2)  # (n, views)
        groups = defaultdict(list)  # of views that share a prompt in a pass
        for view in views:
            groups[self._prompt_of_view(view)].append(view)
        total = 0.0
        for group in groups.values():
            prompts = exists[:, group].any(axis=1).mean()
            answers = exists[:, group].sum(axis=1).mean()
            name = self.view_names[group[0]]
            total += pixel_factor(name) * scoring_cost(prompts, answers)
        return float(total)

    def _prompt_of_view(self, view: int) -> str:
        """What the views that share a prompt with this one have in common."""
        for step in self.steps:
            if view in step_views(self.view_names, step):
                return step
        name = self.view_names[view]
        return name if view_kind(name) == "scale" else "rotations of all rows"

    def scores(self, views: Sequence[int]) -> np.ndarray:
        """(n, 4) scores over those of the views that a row has, see `combine_steps`."""
        return combine_steps(self.logits[:, views], [self.view_names[view] for view in views])


def align_rows(ids: pd.Series, parts: Sequence[Mapping[str, np.ndarray]], name: str) -> np.ndarray:
    """The array called `name` in the order of `ids`, from what was written for each fold.

    >>> folds = [{"ids": ["b"], "tokens": [20]}, {"ids": ["a", "c"], "tokens": [10, 30]}]
    >>> align_rows(pd.Series(["a", "b", "c"]), folds, "tokens").tolist()
    [10, 20, 30]
    """
    known_ids = np.concatenate([part["ids"] for part in parts])
    values = np.concatenate([part[name] for part in parts])
    return values[pd.Index(known_ids).get_indexer(ids)]


def mean_over_members(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What a fold's models have scored, with the mean of their log-probabilities as logits.

    `parts`: what `write_logits` wrote of the same rows. The scores of a single model stay as they
    are.

    >>> parts = [{"logits": np.log([[[0.8, 0.2]]])}, {"logits": np.log([[[0.2, 0.8]]])}]
    >>> softmax(mean_over_members(parts)["logits"]).tolist()
    [[[0.5, 0.5]]]
    """
    content = dict(parts[0])
    if len(parts) > 1:
        scores = [special.log_softmax(part["logits"], axis=-1) for part in parts]
        content["logits"] = np.mean(scores, axis=0)
    return content


def read_scores(run: Run, fold: int, name: str) -> dict[str, np.ndarray]:
    """The scores `name` (oof or test) of a fold or of the model on all rows: the mean over seeds.

    The one place where the seeds of a run become one model.
    """
    parts = [_read_member_scores(run, member, name) for member in run.members_behind(fold)]
    return mean_over_members(parts)


def _read_member_scores(run: Run, member: int, name: str) -> dict[str, np.ndarray]:
    """What `write_logits` wrote as `name` (oof or test) for this member.

    Views in 16 bits stand behind the others, where all members have them.
    """
    folder = run.fold_dir(member)
    content = read_arrays(folder / f"{name}.npz", run.fingerprint, SCORE_ARRAYS)
    if run.is_rescored:
        rescored = read_arrays(folder / f"{name}_16bit.npz", run.fingerprint, SCORE_ARRAYS)
        logits = [content["logits"], rescored["logits"]]
        view_names = [content["view_names"], rescored["view_names"]]
        content["logits"] = np.concatenate(logits, axis=1)
        content["view_names"] = np.concatenate(view_names)
    return content


def _require_scored_folds(run: Run) -> None:
    """Raise FileNotFoundError where no fold is trained, or a trained one is not scored."""
    unscored = run.unfinished_folds("predict", run.finished_members)
    names = [member_name(run.config, member) for member in unscored]
    problems = [f"fold {name} is trained, but not scored" for name in names]
    if not run.finished_folds:
        problems = ["no fold is trained"]
    if problems:
        raise FileNotFoundError(
            f"{run.directory}: {', '.join(problems)}; "
            "run its notebook (or run_folds) again, which continues it"
        )


def read_oof(run: Run) -> OofLogits:
    """The trained folds' oof.npz put together.

    Raises FileNotFoundError where no fold is trained, or a trained one is not scored.
    """
    _require_scored_folds(run)
    parts = [read_scores(run, fold, "oof") for fold in run.finished_folds]
    ids = np.concatenate([part["ids"] for part in parts])
    frame = run.train[run.train["id"].isin(ids)].reset_index(drop=True)
    tokens = None
    if all("tokens" in part for part in parts):
        tokens = align_rows(frame["id"], parts, "tokens")
    margins = None
    if run.config.doubt_steps:
        margins = align_rows(frame["id"], parts, "margins")
    return OofLogits(
        frame=frame,
        logits=align_rows(frame["id"], parts, "logits"),
        labels=frame["label"].to_numpy(),
        folds=frame["fold"].to_numpy(),
        view_names=tuple(parts[0]["view_names"].tolist()),
        tokens=tokens,
        steps=tuple(dict(run.config.doubt_steps)),
        margins=margins,
    )


def views_by_set(oof: OofLogits) -> dict[str, list[int]]:
    """`view_sets` of the views that any row has: name of the set -> numbers of its views.

    Questions that read text, for one, have no smaller scale.
    """
    is_scored = ~np.isnan(oof.logits).all(axis=(0, 2))
    scored_views = np.flatnonzero(is_scored).tolist()
    sets = view_sets([oof.view_names[view] for view in scored_views])
    scored_sets = {}
    for name, places in sets.items():
        scored_sets[name] = [scored_views[place] for place in places]
    return scored_sets


def views_to_try(oof: OofLogits, decided: Mapping[str, bool]) -> dict[str, list[int]]:
    """`views_by_set`, without the views of the steps of `doubt_steps` that lost.

    `decided`: set -> whether it was admitted, for the sets before. More orders are tried with all
    rotations.
    """
    lost = []
    for set_name, is_admitted in decided.items():
        if not is_admitted:
            lost.append(ADDED_KINDS.get(set_name, ""))
    has_orders = decided.get("more orders", False)
    sets = {}
    for set_name, views in views_by_set(oof).items():
        kind = ADDED_KINDS.get(set_name, "")
        kept = []
        for view in views:
            view_of_kind = view_kind(oof.view_names[view])
            is_needed = view == 0 or view_of_kind == kind or kind not in STEP_KINDS.values()
            goes_on = view_of_kind == "rotation" and (kind == "order" or has_orders)
            if is_needed or goes_on or view_of_kind not in lost:
                kept.append(view)
        sets[set_name] = kept
    return sets


def _does_not_lose(changes: np.ndarray, groups: np.ndarray) -> bool:
    """Whether (n, 2) changes of `row_scores` show no loss.

    A loss is a higher NLL, or an accuracy that is lower beyond chance: the 90 %
    interval ends below zero.
    """
    if changes[:, 1].mean() > 0:
        return False
    _, upper = bootstrap_interval(changes, groups)
    return bool(upper[0] >= 0)


def admit_views(
    oof: OofLogits,
    use_temperature_scaling: bool = True,
) -> tuple[list[int], pd.DataFrame]:
    """The widest set of views that does not lose on OOF, and the table that compares the sets.

    Each set is compared with the set that was admitted before it.
    """
    admitted_views = []
    admitted_scores = None
    rows = {}
    decided = {}
    for name in views_by_set(oof):
        views = views_to_try(oof, decided)[name]
        # Averaging views also softens probabilities, which is not a gain: hence the comparison
        # after temperature scaling.
        probabilities = calibrate(
            oof.scores(views),
            oof.labels,
            oof.folds,
            use_temperature_scaling,
        ).probabilities
        scores = row_scores(probabilities, oof.labels)
        is_first = admitted_scores is None
        is_admitted = is_first or _does_not_lose(scores - admitted_scores, oof.groups)
        decided[name] = is_admitted
        rows[name] = {
            "cost": oof.cost(views),
            **score_row(probabilities, oof.labels),
            "admitted": is_admitted,
        }
        if is_admitted:
            admitted_views = views
            admitted_scores = scores
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("views")
    return admitted_views, table


# === Skill ========================================================================================
@dataclass(frozen=True)
class Skill:
    """How a model compares with the better of two guesses that look at neither image nor text."""

    right: int  # out-of-fold rows that are answered rightly by the mean over all views
    rows: int
    guess: str  # the guess, in words
    guess_accuracy: float
    low: float  # lower end of the 90 % interval of the model's accuracy

    @property
    def has_skill(self) -> bool:
        """Whether the model is better than the guess beyond chance.

        Without skill, nothing is fitted to its scores: no temperature and no blend, and no
        label is suspected.
        """
        return self.low > self.guess_accuracy

    @property
    def accuracy(self) -> float:
        """Share of rows that are answered rightly."""
        return self.right / self.rows


def guess_hits(frame: pd.DataFrame) -> np.ndarray:
    """(n,) the chance that one of a row's choices, drawn at random, is right; a blank is none.

    >>> guess_hits(pd.DataFrame([{"a": "1", "b": "2", "c": "", "d": ""}])).tolist()
    [0.5]
    """
    counts = [sum(present_choices(row)) for row in frame[[*CHOICES]].to_dict("records")]
    return 1 / np.array(counts)


def measure_skill(oof: OofLogits, train_answers: pd.Series) -> Skill:
    """Compare the accuracy of the mean over all views with that of a guess.

    The guesses are a choice drawn at random, and always the letter that is most frequent in
    `train_answers`; the better one counts. The model has to be better by more than the lower
    half of the 90 % interval of its accuracy, which respects images (`accuracy_interval`).
    """
    is_right = oof.scores(range(len(oof.view_names))).argmax(axis=1) == oof.labels
    low, _ = accuracy_interval(is_right, oof.groups)
    letter = train_answers.mode()[0]
    accuracies = {
        "one of the choices at random": guess_hits(oof.frame).mean(),
        f"always {letter}": (oof.labels == CHOICES.index(letter)).mean(),
    }
    guess = max(accuracies, key=accuracies.get)
    return Skill(
        right=int(is_right.sum()),
        rows=len(is_right),
        guess=guess,
        guess_accuracy=float(accuracies[guess]),
        low=low,
    )


def lack_of_skill(skill: Skill) -> str:
    """A sentence on a model without skill; "" for one with skill.

    >>> skill = Skill(968, 3887, "always b", 0.2531, low=0.238)
    >>> print(textwrap.fill(lack_of_skill(skill), 90))
    The model has learned nothing that shows: its out-of-fold accuracy, 0.249 (968 of 3,887
    rows), is not above guessing, 0.253 (always b), beyond chance.
    """
    if skill.has_skill:
        return ""
    return (
        "The model has learned nothing that shows: its out-of-fold accuracy, "
        f"{skill.accuracy:.3f} ({skill.right:,} of {skill.rows:,} rows), is not above guessing, "
        f"{skill.guess_accuracy:.3f} ({skill.guess}), beyond chance."
    )


# === Selected weights =============================================================================
def fold_table(results: Sequence[FoldResult]) -> pd.DataFrame:
    """Held-out accuracy and NLL of each fold, seed and kind of weights.

    The last two rows are the mean and the standard deviation of those above.
    """
    scores = pd.json_normalize([result.kinds for result in results], sep=" ")
    scores.index = [result.name for result in results]
    summary = scores.agg(["mean", "std"]).rename({"std": "sd"})
    table = pd.concat([scores, summary])
    best_epochs = [str(result.best_epoch) for result in results]
    table.insert(0, "best epoch", [*best_epochs, "", ""])
    return table.fillna("").rename_axis("fold")


def _read_validation(run: Run, fold: int, kind: str, seeds: int | None) -> dict[str, np.ndarray]:
    """A fold's held-out rows as its models scored them when training ended: the mean over seeds."""
    parts = []
    for member in run.members_behind(fold, seeds):
        path = run.fold_dir(member) / f"validation_{kind}.npz"
        parts.append(read_arrays(path, run.fingerprint))
    return mean_over_members(parts)


def validation_scores(
    run: Run,
    ids: pd.Series,
    kinds: Sequence[str],
    seeds: int | None = None,
) -> np.ndarray:
    """(n, 4) mean over `kinds` of weights of what each scored held-out rows, in one view.

    They were scored when training ended; the rows are those of `ids`, in that order. `seeds`: how
    many seeds of each fold count; None: those that are selected.
    """
    scores = []
    for kind in kinds:
        parts = [_read_validation(run, fold, kind, seeds) for fold in run.finished_folds]
        logits = align_rows(ids, parts, "logits")
        scores.append(logits[:, 0])
    return np.mean(scores, axis=0)


def is_mixing_better(run: Run, kinds: Sequence[str]) -> bool:
    """Whether the mean over all kinds of weights has a lower held-out NLL than each alone.

    All are temperature-scaled, as is what is submitted, and the mean over all seeds.
    """
    rows = run.train[run.train["fold"].isin(run.finished_folds)]
    labels = rows["label"].to_numpy()
    folds = rows["fold"].to_numpy()
    mixtures = [list(kinds)]  # all of them first, then each alone
    mixtures += [[kind] for kind in kinds]
    losses = {}
    for mixture in mixtures:
        scores = validation_scores(run, rows["id"], mixture, len(run.config.all_seeds))
        calibration = calibrate(scores, labels, folds, run.config.use_temperature_scaling)
        loss = negative_log_likelihood(calibration.probabilities, labels)
        losses["+".join(mixture)] = loss
    mixed, *alone = losses.values()
    LOGGER.info("Held-out NLL of the weights, mixed and alone: %s", losses)
    return mixed < min(alone)


def _pooled_losses(run: Run) -> dict[str, float]:
    """Kind of weights -> NLL over the held-out rows of all finished folds and seeds.

    Only the kinds that each of them has.
    """
    results = [read_fold_result(run, member) for member in run.finished_members]
    rows = [(run.train["fold"] == result.fold).sum() for result in results]
    fold_losses = []
    for result in results:
        fold_losses.append({kind: scores["nll"] for kind, scores in result.kinds.items()})
    shared_kinds = pd.DataFrame(fold_losses).dropna(axis="columns")
    return shared_kinds.apply(np.average, weights=rows).to_dict()


def score_files(run: Run) -> list[Path]:
    """What the selected weights score in each fold and the final model, whether it exists or not.

    Relative to the run directory.
    """
    paths = []
    final_members = members_of(run.config, [run.final_fold])
    for member in [*run.finished_members, *final_members]:
        for name in ("oof", "test", "oof_16bit", "test_16bit"):
            paths.append(Path(fold_folder(run.config, member)) / f"{name}.npz")
    return paths


def select_seeds(run: Run, kinds: Sequence[str]) -> int:
    """How many seeds score: all, where their mean does not lose against the first one; else 1.

    Compared as sets of views are, on the held-out rows in one view, with these kinds of weights.
    """
    count = len(run.config.all_seeds)
    rows = run.train[run.train["fold"].isin(run.finished_folds)]
    labels = rows["label"].to_numpy()
    scores = []
    for seeds in (1, count):
        logits = validation_scores(run, rows["id"], kinds, seeds)
        scaling = run.config.use_temperature_scaling
        calibration = calibrate(logits, labels, rows["fold"].to_numpy(), scaling)
        scores.append(row_scores(calibration.probabilities, labels))
    changes = scores[1] - scores[0]
    gain, loss = changes.mean(axis=0)
    chosen = count if _does_not_lose(changes, image_groups(rows)) else 1
    text = "Decision: %d of %d seeds score: the mean over all adds %+.4f accuracy, %+.4f NLL"
    LOGGER.info(text, chosen, count, gain, loss)
    return chosen


@each_warning_once()
def select_weights(run: Run) -> str:
    """Raw, EMA or SWA weights, or a mix such as "raw+ema": one decision for all folds and seeds.

    Decided by pooled held-out NLL and kept in selection.json, with how many seeds score.
    """
    pooled = _pooled_losses(run)
    chosen = min(pooled, key=pooled.get)
    may_mix = run.config.mix_weights and len(pooled) > 1
    if may_mix and is_mixing_better(run, list(pooled)):
        chosen = "+".join(pooled)
    LOGGER.info("Decision: %s weights for all folds, held-out NLL %s", chosen, pooled)
    earlier = "+".join(run.selected_weights)
    if earlier and earlier != chosen:  # a fold came later
        delete_outputs(run, score_files(run))
    content = {"weights": chosen, "nll": pooled}
    if run.config.has_further_seeds:
        content["seeds"] = select_seeds(run, chosen.split("+"))
    atomic_write(run.directory / "selection.json", json.dumps(content))
    return chosen


# === Curve of doubt ===============================================================================
def _share_with_any_view(logits: np.ndarray) -> float:
    """Share of the rows that have any of the views in (n, views, 4)."""
    has_view = ~np.isnan(logits).all(axis=(1, 2))
    return float(has_view.mean())


def _cross_fitted_margins(first_scores: np.ndarray, all_scores: np.ndarray) -> np.ndarray:
    """(n,) `answer_margins` of the first views' scores, for the held-out rows of one fold.

    Both scores are (n, 4): of the views that every row has, and of all views. The
    letters' preference is measured on other rows than it is used for.
    """
    part = np.arange(len(first_scores)) % PREFERENCE_PARTS
    margins = np.zeros(len(first_scores))
    for number in range(PREFERENCE_PARTS):
        inside = part == number
        preference = letter_preference(first_scores[~inside], all_scores[~inside])
        margins[inside] = answer_margins(first_scores[inside], preference)
    return margins


def simulate_last_step(oof: OofLogits, share: float) -> OofLogits:
    """Rows that have all views, as if only that share of each fold's got the last step's.

    The step is that of `split_views`. Nothing is fitted to labels, and the letters' preference
    is measured on other rows than it is used for.
    """
    first, later = split_views(oof.view_names)
    first_scores = combine_views(oof.logits[:, first])
    all_scores = combine_views(oof.logits)
    logits = oof.logits.copy()
    for fold in np.unique(oof.folds).tolist():
        inside = np.flatnonzero(oof.folds == fold)
        margins = _cross_fitted_margins(first_scores[inside], all_scores[inside])
        has_later_views = ~np.isnan(logits[np.ix_(inside, later)]).all(axis=(1, 2))
        costs = has_later_views.astype(float)
        in_doubt = rows_in_doubt(margins, costs, share * len(inside))
        not_in_doubt = np.delete(inside, in_doubt)
        logits[np.ix_(not_in_doubt, later)] = np.nan
    return dataclasses.replace(oof, logits=logits, steps=("rotations",))


def _without_16_bit_views(oof: OofLogits) -> OofLogits:
    """The rows with the quantised model's views only; those in 16 bits stand behind them."""
    names = [name for name in oof.view_names if not name.endswith(SUFFIX_16_BIT)]
    logits = oof.logits[:, : len(names)]
    return dataclasses.replace(oof, logits=logits, view_names=tuple(names))


@dataclass(frozen=True)
class CurvePoint:
    """Rows with the views that they have at a point of the curve."""

    oof: OofLogits
    added: Sequence[int]  # the views of the step on the way to it


def _simulated_points(oof: OofLogits) -> dict[str, CurvePoint]:
    """Points for rows that have all views: their last step, for more and more of the rows.

    Only "all rows" where a second pass costs nothing, because there are no further views.
    """
    first, later = split_views(oof.view_names)
    *_, set_name = view_sets(oof.view_names)
    views = [*first, *later]
    in_two_passes = dataclasses.replace(oof, steps=("rotations",))
    first_cost = in_two_passes.cost(first)
    both_passes_cost = in_two_passes.cost(views)
    one_pass_cost = oof.cost(views)
    points = {}
    for tenths in range(11):
        if both_passes_cost <= first_cost:
            break
        paid_cost = tenths / 10 * (one_pass_cost - first_cost)
        paid_share = paid_cost / (both_passes_cost - first_cost)
        share = paid_share * _share_with_any_view(oof.logits[:, later])
        points[f"{set_name}, {tenths / 10:.0%}"] = CurvePoint(simulate_last_step(oof, share), later)
    points["all rows"] = CurvePoint(oof, later)
    return points


def _points_of_steps(oof: OofLogits) -> dict[str, CurvePoint]:
    """Points for rows that took the steps of `doubt_steps`: each for more and more of its rows."""
    names = oof.view_names
    first = first_views(names, oof.steps)
    logits = np.full_like(oof.logits, np.nan)
    logits[:, first] = oof.logits[:, first]
    before = dataclasses.replace(oof, logits=logits)
    points = {"first views": CurvePoint(before, first)}
    for number, step in enumerate(oof.steps):
        added = step_views(names, step)
        has_step = ~np.isnan(oof.logits[:, added]).all(axis=(1, 2))
        given = np.flatnonzero(has_step)
        order = given[np.argsort(oof.margins[given, number], kind="stable")]
        for quarters in range(1, 5):
            rows = order[: math.ceil(len(order) * quarters / 4)]
            logits = before.logits.copy()
            logits[np.ix_(rows, added)] = oof.logits[np.ix_(rows, added)]
            point = dataclasses.replace(oof, logits=logits)
            points[f"{step}, {quarters / 4:.0%}"] = CurvePoint(point, added)
        before = point
    return points


@each_warning_once()
def doubt_curve(run: Run) -> pd.DataFrame:
    """Accuracy and NLL on OOF rows by the time that is spent on rows in doubt.

    With `doubt_steps`: a line after each step, and after a quarter, half and three quarters of its
    rows, the most doubtful first. Without, where all rows have all views: what their last step
    would buy for a part of its cost, most doubtful rows first, and for all rows in one pass.
    `rows`: share of the rows that have that step; `cost`: as in the ladder; `seconds`: what
    scoring the test rows so takes on one device. Temperatures are cross-fitted at each point; a
    model without skill gets none.
    """
    oof = _without_16_bit_views(read_oof(run))
    has_skill = measure_skill(oof, run.train["answer"]).has_skill
    views = list(range(len(oof.view_names)))
    points = _points_of_steps(oof) if oof.steps else _simulated_points(oof)
    scorings = max(1, len(run.selected_weights)) * run.members_per_fold()
    rows = {}
    for name, point in points.items():
        calibration = calibrate(
            point.oof.scores(views),
            oof.labels,
            oof.folds,
            run.config.use_temperature_scaling and has_skill,
        )
        rows[name] = {
            "rows": _share_with_any_view(point.oof.logits[:, point.added]),
            "cost": point.oof.cost(views) * scorings,
            **score_row(calibration.probabilities, oof.labels),
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("step, and how much of it")
    table.insert(2, "seconds", table["cost"].map(run.scoring_seconds))
    return table


# === Ladder =======================================================================================
STEP_ZERO_SHOT = "zero-shot"
STEP_ONE_VIEW = "fine-tuned, one view"
STEP_ONE_SEED = "fine-tuned, one seed"
STEP_TEMPERATURE = "temperature"
STEP_AUTOMATIC = "automatic choice"
STEP_FINAL_MODEL = "and a model on all rows, which no OOF row can judge"
VIEW_BLEND_STEPS = {  # blend of views -> its step
    "vote": "vote of views",
    "weighted": "weighted views",
    "stacked": "stacked views",
}
INTERVAL_COLUMNS = ["gain_low", "gain_high", "nll_low", "nll_high"]
LADDER_COLUMNS = [
    *SCORES,
    "against",
    "gain",
    "gain_low",
    "gain_high",
    "p_value",
    "nll_change",
    "nll_low",
    "nll_high",
    "used",
]


@dataclass(frozen=True)
class LadderStep:
    """A row of the ladder."""

    probabilities: np.ndarray  # (n, 4), NaN where a row was not predicted
    against: str = ""  # the step to compare with; none where it is empty
    views: Sequence[int] = (0,)  # the views that it takes
    used: bool = False  # whether the submission is made of it
    fitted_parameters: float = 0.0  # numbers fitted to the labels, as in `bootstrap_interval`
    weight_kinds: int | None = None  # kinds of weights that score for it; None: the selected
    models: float | None = None  # of a fold that score for it; None: of the selected seeds
    extra_cost: float = 0.0  # of a row for each model, in the unit of `OofLogits.cost`


def _step_intervals(
    steps: Mapping[str, LadderStep],
    changes: Mapping[str, np.ndarray],
    groups,
) -> dict[str, np.ndarray]:
    """Step -> (4,) ends of its 90 % intervals, in the order of INTERVAL_COLUMNS.

    `changes`: step -> (n, 2) changes of its `row_scores`.
    """
    fitted_parameters = []
    for name in changes:
        # No fit aims at accuracy, which stands in the first column.
        fitted_parameters += [1, steps[name].fitted_parameters]
    columns = np.hstack(list(changes.values()))
    ends = bootstrap_interval(columns, groups, np.array(fitted_parameters))
    ends_by_step = ends.reshape(2, -1, 2).swapaxes(0, 1)  # (steps, 2 ends, 2 scores)
    intervals = {}
    for name, ends_of_step in zip(changes, ends_by_step, strict=True):
        intervals[name] = ends_of_step.T.ravel()
    return intervals


def _describe_change(before: np.ndarray, after: np.ndarray, interval: np.ndarray) -> dict:
    """A step's columns of the ladder that compare it with another one.

    `before` and `after`: (n, 2) `row_scores`, NaN where a row was not predicted;
    `interval`: (4,) as in INTERVAL_COLUMNS. Empty where no row was predicted by both: a
    zero-shot sample may hold no row of the trained folds.
    """
    shared = np.isfinite(after[:, 0] - before[:, 0])
    if not shared.any():
        return {}
    return {
        **compare_paired(before[shared, 0], after[shared, 0]),
        **dict(zip(INTERVAL_COLUMNS, interval, strict=True)),
        "nll_change": (after - before)[shared, 1].mean(),
    }


def ladder_table(steps: Mapping[str, LadderStep], labels, groups) -> pd.DataFrame:
    """Scores of each step, and the paired changes against another with 90 % intervals.

    A row of NaN was not predicted and is not compared. The intervals respect `groups`;
    McNemar's p_value does not. `labels` and `groups`: (n,).
    """
    scores = {}
    changes = {}
    for name, step in steps.items():
        scores[name] = row_scores(step.probabilities, labels)
    for name, step in steps.items():
        if step.against:
            changes[name] = scores[name] - scores[step.against]
    intervals = _step_intervals(steps, changes, groups)

    rows = {}
    for name, step in steps.items():
        row = {"against": step.against, "used": step.used}
        if not np.isnan(step.probabilities).any():
            row.update(score_row(step.probabilities, labels))
        if step.against:
            before = scores[step.against]
            row.update(_describe_change(before, scores[name], intervals[name]))
        rows[name] = row
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("step")
    table = table.reindex(columns=LADDER_COLUMNS)
    # A vote has no probabilities, but ones and zeros, of which these columns say nothing.
    votes = table.index.isin(["vote", VIEW_BLEND_STEPS["vote"]])
    probability_columns = ["nll", "brier", "ece", "nll_change", "nll_low", "nll_high"]
    table.loc[votes, probability_columns] = math.nan
    return table


def set_choice_interval(
    table: pd.DataFrame,
    candidates: Mapping[str, Candidate],
    labels,
    groups,
    step: str = STEP_AUTOMATIC,
) -> None:
    """Put the interval that knows of the choosing into the ladder.

    It goes into the row of the automatic choice, `step`.
    """
    ends = choice_interval(candidates, labels, groups)
    table.loc[step, INTERVAL_COLUMNS] = ends.T.ravel()


def _validated_kinds(run: Run) -> list[str]:
    """The kinds of weights (ema, raw, swa) with which every trained model scored held-out rows."""
    kinds_by_fold = []
    for member in run.finished_members:
        paths = run.fold_dir(member).glob("validation_*.npz")
        kinds_by_fold.append({path.stem.removeprefix("validation_") for path in paths})
    return sorted(set.intersection(*kinds_by_fold))


def weight_ladder_steps(run: Run, oof: OofLogits) -> dict[str, LadderStep]:
    """Steps of the kinds of weights that were not selected, in one view, against what was.

    Each of raw, EMA and SWA, and all of them together where they may be mixed.
    """
    kinds = _validated_kinds(run)
    mixtures = {}
    for kind in kinds:
        label = kind if kind == "raw" else kind.upper()
        mixtures[f"with {label} weights"] = [kind]
    if run.config.mix_weights and len(kinds) > 1:
        mixtures["with all kinds of weights"] = kinds
    steps = {}
    for step, mixture in mixtures.items():
        if set(mixture) == set(run.selected_weights):
            continue
        scores = validation_scores(run, oof.frame["id"], mixture)
        steps[step] = LadderStep(
            probabilities=softmax(scores),
            against=STEP_ONE_VIEW,
            weight_kinds=len(mixture),
        )
    return steps


def seed_ladder_step(run: Run, oof: OofLogits) -> dict[str, LadderStep]:
    """The step of what is not selected, the first seed alone or the mean over all, in one view.

    Against what is selected; none where no fold is trained with several seeds.
    """
    if len(run.finished_members) == len(run.finished_folds):
        return {}
    name = STEP_ONE_SEED
    seeds = 1
    if run.selected_seeds == 1:
        seeds = len(run.config.all_seeds)
        name = f"mean of {seeds} seeds"
    scores = validation_scores(run, oof.frame["id"], run.selected_weights, seeds)
    step = LadderStep(
        probabilities=softmax(scores),
        against=STEP_ONE_VIEW,
        models=run.members_per_fold(seeds),
    )
    return {name: step}


def _step_costs(run: Run, oof: OofLogits, steps: Iterable[LadderStep]) -> list[float]:
    """Cost of scoring a row for each step.

    The unit is a question with one view, one kind of weights and one seed.
    """
    n_selected = max(1, len(run.selected_weights))
    costs = []
    for step in steps:
        weight_kinds = n_selected if step.weight_kinds is None else step.weight_kinds
        models = run.members_per_fold() if step.models is None else step.models
        costs.append(oof.cost(step.views) * weight_kinds * models + step.extra_cost)
    return costs


def build_ladder(run: Run, oof: OofLogits, steps: Mapping[str, LadderStep]) -> pd.DataFrame:
    """What each step is worth on OOF rows against the step named in `against`.

    `cost`: of scoring a row, in questions with one view, one kind of weights and one seed;
    `seconds`: of a device with the test rows and all models, at the speed of the last
    scoring.
    """
    base = read_arrays(run.directory / "zeroshot.npz", run.fingerprint)
    base_probabilities = pd.DataFrame(softmax(base["logits"][:, 0]), index=base["ids"])
    aligned = base_probabilities.reindex(oof.frame["id"])  # NaN where it scored no row
    ordered_steps = {
        STEP_ZERO_SHOT: LadderStep(aligned.to_numpy(), weight_kinds=1, models=1),
        STEP_ONE_VIEW: steps[STEP_ONE_VIEW],
        **seed_ladder_step(run, oof),
        **weight_ladder_steps(run, oof),
        **steps,
    }
    ladder = ladder_table(ordered_steps, oof.labels, oof.groups)
    base_scores = score_row(base_probabilities.to_numpy(), base["labels"])
    ladder.loc[STEP_ZERO_SHOT, list(base_scores)] = base_scores
    behind_scores = len(SCORES)
    ladder.insert(behind_scores, "cost", _step_costs(run, oof, ordered_steps.values()))
    ladder.insert(behind_scores + 1, "seconds", ladder["cost"].map(run.scoring_seconds))
    ladder.loc[STEP_ZERO_SHOT, "seconds"] /= len(run.submission_models)  # it is one model
    return ladder


def _view_members(logits: np.ndarray, views: Sequence[int]) -> np.ndarray:
    """(views, n, 4) probabilities of these views, from (n, all views, 4) logits.

    In place of a view that a row lacks stands the row's mean.
    """
    scores = logits[:, list(views)]
    mean = combine_views(scores)[:, None]
    probabilities = softmax(np.where(np.isnan(scores), mean, scores))
    return probabilities.swapaxes(0, 1)


def _view_step_name(oof: OofLogits, set_name: str, views: Sequence[int]) -> str:
    """What the ladder calls the mean over a set of views."""
    is_step = len(views) > len(first_views(oof.view_names, oof.steps))
    if len(views) == 1:
        name = "one view"
    elif is_step:
        return f"{set_name}, for rows in doubt"
    else:
        name = f"mean of {len(views)} views"
    return name + SUFFIX_16_BIT if set_name.endswith(SUFFIX_16_BIT) else name


def view_ladder_steps(
    oof: OofLogits,
    admitted: pd.Series,
    admitted_views: list[int],
    averaged: bool,
) -> dict[str, LadderStep]:
    """A step for every set of views, the losers too, each against the last admitted one.

    `admitted`: by the name of the set; `admitted_views`: those of the widest admitted
    set; `averaged`: whether the submission has the mean over them.
    """
    steps = {}
    against = STEP_ZERO_SHOT
    for set_name, views in views_to_try(oof, admitted).items():
        step = _view_step_name(oof, set_name, views) if steps else STEP_ONE_VIEW
        in_submission = admitted[set_name] and set(views) <= set(admitted_views)
        steps[step] = LadderStep(
            probabilities=softmax(oof.scores(views)),
            against=against,
            views=views,
            used=bool(in_submission and (averaged or len(views) == 1)),
        )
        if admitted[set_name]:
            against = step
    return steps


# === Base member ==================================================================================
# The untouched base model errs on other rows than the models that are trained from it, and it is
# loaded anyway. Its scores lie in base_oof.npz and base_test.npz.
DOUBT_SHARE = 0.25  # of the rows: those whose fine-tuned answer leads by least
DOUBT_ROWS_AT_LEAST = 2 * CROSS_FIT_PARTS  # with fewer in doubt, a part may leave none to fit on
# How many times as many errors as the fine-tuned models the base model may make in one view for
# "auto". At a third more nothing is left to gain, at accuracies of 0.7, 0.85 and 0.95 alike
# (tests/benchmarks/base_member.py); the rest is for the noise of a few hundred zero-shot rows.
BASE_ERRORS_AT_MOST = 1.5
# Rows out of fold that "auto" asks for: with fewer, a gain of a point is within its standard error.
BASE_MEMBER_ROWS = 400
# Zero-shot accuracy from which preflight expects that "auto" decides for it: of more errors
# training usually leaves less than two thirds.
LIKELY_BASE_ACCURACY = 0.75
WITHOUT_BASE = "without"


def _rows_out_of_fold(run: Run) -> int:
    return int(run.train["fold"].isin(run.config.folds_to_train).sum())


def _validated_accuracy(run: Run) -> float:
    """Accuracy of the selected weights on held-out rows, in one view; NaN where it is not known."""
    accuracies = []
    rows = []
    for member in run.finished_members:  # a fold may have another seed's model only
        kinds = read_fold_result(run, member).kinds
        of_kinds = [kinds[kind].get("accuracy", math.nan) for kind in run.selected_weights or kinds]
        accuracies.append(np.mean(of_kinds))
        rows.append((run.train["fold"] == fold_of(run.config, member)).sum())
    return float(np.average(accuracies, weights=rows))


def _zeroshot_accuracy(run: Run) -> float:
    content = read_arrays(run.directory / "zeroshot.npz", run.fingerprint, SCORE_ARRAYS)
    return accuracy(softmax(content["logits"][:, 0]), content["labels"])


def is_base_near(base_accuracy: float, tuned_accuracy: float) -> tuple[bool, str]:
    """Whether the base model makes few enough errors to be a member, and the figures in words.

    >>> is_base_near(0.86, 0.9)
    (True, 'in one view it has 0.860 right, trained models 0.900: 1.4 times the errors')
    """
    ratio = (1 - base_accuracy) / max(1 - tuned_accuracy, 1e-9)
    figures = (
        f"in one view it has {base_accuracy:.3f} right, trained models {tuned_accuracy:.3f}: "
        f"{ratio:.1f} times the errors"
    )
    return ratio <= BASE_ERRORS_AT_MOST, figures


def wants_base_member(run: Run) -> tuple[bool, str]:
    """Whether the base model is to score the run's rows, and why.

    By the setting `use_base_member`. "auto" compares zero-shot accuracy with that of the trained
    folds; what any process of the run knows of them is enough. A worker then asks for the time.
    """
    setting_name = f"use_base_member is {run.config.use_base_member}"
    if run.config.use_base_member == "off":
        return False, setting_name
    if "base" in dict(run.config.doubt_steps):
        return False, "the step 'base' of doubt_steps asks it already"
    missing = sorted(set(run.config.folds_to_train) - set(run.finished_folds))
    if missing:
        return False, f"the folds share its test rows, and of these folds {missing} are not trained"
    if run.config.use_base_member == "on":
        return True, setting_name
    rows = _rows_out_of_fold(run)
    if rows < BASE_MEMBER_ROWS:
        return False, f"{rows} rows out of fold are too few to judge it; {BASE_MEMBER_ROWS} will do"
    if not run.is_done("zeroshot", 0):
        return False, "its zero-shot accuracy is not known"
    is_near, figures = is_base_near(_zeroshot_accuracy(run), _validated_accuracy(run))
    limit = "at most" if is_near else "over"
    return is_near, f"{figures}, {limit} {BASE_ERRORS_AT_MOST}"


def may_score_base(config: Config, rows: int, zeroshot_accuracy: float) -> bool:
    """Whether to expect the stage "base" in a run of so many rows, before any fold is trained.

    >>> may_score_base(Config(use_base_member="auto"), rows=4000, zeroshot_accuracy=0.9)
    True
    >>> may_score_base(Config(use_base_member="auto"), rows=4000, zeroshot_accuracy=0.5)
    False
    """
    if "base" in dict(config.doubt_steps):  # which asks it for rows in doubt
        return False
    if config.use_base_member != "auto":
        return config.use_base_member == "on"
    return rows >= BASE_MEMBER_ROWS and zeroshot_accuracy >= LIKELY_BASE_ACCURACY


@dataclass(frozen=True)
class BaseMixture:
    """A way to mix the base model's probabilities with the fine-tuned ones."""

    step: str  # its name in the ladder
    blend: str  # a key of BLENDS
    in_doubt_only: bool  # whether the other rows keep the fine-tuned answer


# Half and half is of log-probabilities: as accurate in the simulation as the mean of
# probabilities, at a lower NLL.
BASE_MIXTURES = {
    "half": BaseMixture("half base model", "geometric mean", in_doubt_only=False),
    "weighted": BaseMixture("weighted base model", "weighted", in_doubt_only=False),
    "half in doubt": BaseMixture(
        "half base model, rows in doubt", "geometric mean", in_doubt_only=True
    ),
    "weighted in doubt": BaseMixture(
        "weighted base model, rows in doubt", "weighted", in_doubt_only=True
    ),
}
STEP_BASE_CHOICE = "automatic choice with base model"


def answer_leads(probabilities: np.ndarray) -> np.ndarray:
    """(n,) lead of the most probable choice over the next one, from (n, 4) probabilities.

    >>> answer_leads(np.array([[0.5, 0.25, 0.25, 0.0]])).tolist()
    [0.25]
    """
    return answer_margins(probabilities, np.zeros(probabilities.shape[1]))


@dataclass(frozen=True)
class BaseMember:
    """The base model beside the fine-tuned models on OOF rows: what mixtures are fitted on."""

    members: np.ndarray  # (2, n, 4) cross-fitted probabilities: fine-tuned, then base
    labels: np.ndarray  # (n,)
    scaling: bool  # whether temperatures are fitted
    method: str = WITHOUT_BASE  # what the submission is made of: a key of BASE_MIXTURES, or this
    temperature: float = 1.0  # of the base model's scores, for test rows
    cost: float = 0.0  # of a row for each model, in questions with one view

    @property
    def is_used(self) -> bool:
        """Whether the submission has it."""
        return self.method != WITHOUT_BASE

    @property
    def doubt_lead(self) -> float:
        """The lead of the fine-tuned answer up to which a row is in doubt; no label is asked."""
        return float(np.quantile(answer_leads(self.members[0]), DOUBT_SHARE))

    def mix(self, name: str, fit_members, fit_labels, members) -> np.ndarray:
        """(n, 4) of `members` (2, n, 4), by a mixture fitted on `fit_members` and `fit_labels`."""
        mixture = BASE_MIXTURES[name]
        if not mixture.in_doubt_only:
            return fit_and_blend(mixture.blend, fit_members, fit_labels, members, self.scaling)
        fit_doubt = answer_leads(fit_members[0]) <= self.doubt_lead
        in_doubt = answer_leads(members[0]) <= self.doubt_lead
        mixed = members[0].copy()
        mixed[in_doubt] = fit_and_blend(
            mixture.blend,
            fit_members[:, fit_doubt],
            fit_labels[fit_doubt],
            members[:, in_doubt],
            self.scaling,
        )
        return mixed

    def apply(self, fine_tuned: np.ndarray, base: np.ndarray) -> np.ndarray:
        """(n, 4) for other rows by `method`, from both models' (n, 4) probabilities."""
        members = np.stack([fine_tuned, base])
        return self.mix(self.method, self.members, self.labels, members)

    def candidates(self, groups: np.ndarray) -> dict[str, Candidate]:
        """The fine-tuned answers first, then each mixture, cross-fitted.

        Mixtures for rows in doubt are left out where too few rows are. `groups`: (n,) of images.
        """
        found = {WITHOUT_BASE: Candidate(self.members[0])}
        part = groups % CROSS_FIT_PARTS
        in_doubt = answer_leads(self.members[0]) <= self.doubt_lead
        for name, mixture in BASE_MIXTURES.items():
            rows = in_doubt if mixture.in_doubt_only else np.full(len(self.labels), True)
            if mixture.in_doubt_only and rows.sum() < DOUBT_ROWS_AT_LEAST:
                continue
            weights = count_fitted_parameters(
                mixture.blend, self.members[:, rows], self.labels[rows]
            )
            mix = functools.partial(self.mix, name)
            found[name] = Candidate(
                probabilities=cross_fit(mix, self.members, self.labels, part),
                # A temperature, too, behind that of the answers it is compared with.
                fitted_parameters=weights + self.scaling,
            )
        return found


def _base_scores(run: Run, name: str, ids: pd.Series) -> tuple[np.ndarray, tuple[str, ...]]:
    """(n, views, 4) logits of the rows with these ids, and the views' names.

    `name`: base_oof or base_test, of which every fold has a part.
    """
    parts = []
    for fold in run.config.folds_to_train:
        path = run.fold_dir(fold) / f"{name}.npz"
        parts.append(read_arrays(path, run.fingerprint, SCORE_ARRAYS))
    return align_rows(ids, parts, "logits"), tuple(parts[0]["view_names"].tolist())


def _same_views(oof: OofLogits, views: Sequence[int], base_names: Sequence[str]) -> list[int]:
    """Positions in `base_names` of the fine-tuned models' views, scored in 16 bits or not.

    Without views of `doubt_steps`, which the base model has not scored.
    """
    names = [oof.view_names[view].removesuffix(SUFFIX_16_BIT) for view in views]
    return [base_names.index(name) for name in dict.fromkeys(names) if name in base_names]


@dataclass(frozen=True)
class BaseChoice:
    """What was decided about the base model, and the evidence."""

    member: BaseMember
    candidates: dict[str, Candidate]  # without it first, then each mixture
    probabilities: np.ndarray  # (n, 4) each row by the choice that is made without it


def choose_base_mixture(
    run: Run,
    oof: OofLogits,
    views: Sequence[int],
    fine_tuned: np.ndarray,
) -> BaseChoice:
    """Choose a way to mix in the base model, or none, by the rule of the automatic choice.

    In the admitted views; `fine_tuned` (n, 4): the probabilities of what the submission would be
    without it. The base model has one temperature, because it is one model for all folds.
    """
    logits, names = _base_scores(run, "base_oof", oof.frame["id"])
    base_views = _same_views(oof, views, names)
    base_oof = dataclasses.replace(oof, logits=logits, view_names=names, steps=(), margins=None)
    one_fold = np.zeros(len(oof.labels), dtype=int)
    calibration = calibrate(
        combine_views(logits[:, base_views]),
        oof.labels,
        one_fold,
        run.config.use_temperature_scaling,
    )
    member = BaseMember(
        members=np.stack([fine_tuned, calibration.probabilities]),
        labels=oof.labels,
        scaling=run.config.use_temperature_scaling,
        temperature=calibration.temperatures[0],
        cost=base_oof.cost(base_views) / len(run.submission_models),
    )
    candidates = member.candidates(oof.groups)
    method = choose_blend(candidates, oof.labels, oof.groups)
    way = BASE_MIXTURES[method].step if method in BASE_MIXTURES else "it stays out"
    LOGGER.info("Decision: base model as a member, by out-of-fold rows: %s", way)
    return BaseChoice(
        member=dataclasses.replace(member, method=method),
        candidates=candidates,
        probabilities=choose_cross_fitted(candidates, oof.labels, oof.groups),
    )


def with_base_steps(steps: Mapping[str, LadderStep], choice: BaseChoice) -> dict[str, LadderStep]:
    """The ladder's steps with those of the base model: each mixture, and the choice among them.

    They are compared with the last step that is used; the final model's stays the last.
    """
    ordered = {name: step for name, step in steps.items() if name != STEP_FINAL_MODEL}
    against = [name for name, step in ordered.items() if step.used][-1]
    views = steps[against].views
    cost = choice.member.cost
    for name, mixture in BASE_MIXTURES.items():
        if name in choice.candidates:
            candidate = choice.candidates[name]
            ordered[mixture.step] = LadderStep(
                probabilities=candidate.probabilities,
                against=against,
                views=views,
                used=name == choice.member.method,
                fitted_parameters=candidate.fitted_parameters,
                extra_cost=cost,
            )
    ordered[STEP_BASE_CHOICE] = LadderStep(
        choice.probabilities, against=against, views=views, used=True, extra_cost=cost
    )
    if STEP_FINAL_MODEL in steps:
        final_step = steps[STEP_FINAL_MODEL]
        ordered[STEP_FINAL_MODEL] = dataclasses.replace(final_step, extra_cost=cost)
    return ordered


def predict_base_test(
    run: Run, oof: OofLogits, views: Sequence[int], member: BaseMember
) -> np.ndarray:
    """(n, 4) probabilities of the test rows by the base model, in the admitted `views` of `oof`."""
    logits, names = _base_scores(run, "base_test", run.test["id"])
    scores = combine_views(logits[:, _same_views(oof, views, names)])
    return softmax(scores / member.temperature)


def _why_base_is_missing(run: Run) -> str:
    """Why the base model has not scored all rows, in words."""
    try:
        is_wanted, reason = wants_base_member(run)
    except (CheckpointError, FileNotFoundError) as error:  # no reason to go without a report
        return error_in_words(error)
    return "it has not scored all rows" if is_wanted else reason


def describe_base_member(run: Run, evaluation: Evaluation) -> str:
    """A sentence on whether the base model is a member, and what it gave or why it is none."""
    none = "The base model is no member of the submission"
    if not run.is_base_scored:
        return f"{none}: {_why_base_is_missing(run)}."
    if evaluation.base is None:
        return f"{none}: nothing is fitted to models without skill."
    step = evaluation.ladder.loc[STEP_BASE_CHOICE]
    gain = points_with_interval(step["gain"], step["gain_low"], step["gain_high"])
    worth = f"On rows that did not decide it, this choice changes the accuracy by {gain} points."
    if not evaluation.base.is_used:
        return f"{none}: no mixture with it is better by more than a standard error. {worth}"
    way = BASE_MIXTURES[evaluation.base.method].step
    return f"The base model is a member of the submission ({way}). {worth}"


# === Alignment as a member ========================================================================
# What `alignment_model` says of each choice, added to the fine-tuned models' log-probabilities.
STEP_ALIGNMENT = "with alignment scores"
ALIGNMENT_FILES = {"train": "alignment_train.npz", "test": "alignment_test.npz"}


def read_alignment(run: Run, name: str) -> pd.DataFrame | None:
    """(rows, 4) scores by id of the train or test rows; None without `alignment_model`.

    None, too, where they are not there yet.
    """
    if not run.config.alignment_model or not run.is_done("alignment", 0):
        return None
    path = run.directory / ALIGNMENT_FILES[name]
    content = read_arrays(path, run.fingerprint, SCORE_ARRAYS)
    return pd.DataFrame(content["logits"][:, 0], index=content["ids"], columns=CHOICES)


@dataclass(frozen=True)
class AlignmentWeights:
    """How alignment scores and a model's probabilities are mixed.

    The logits of the mixture are `power` times the model's log-probability, plus `weight` times
    the score.
    """

    power: float  # one over the mixture's temperature
    weight: float  # of the scores, which are logits

    def mix(self, probabilities: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """(n, 4) probabilities of the mixture; a choice whose score is -inf keeps 0.

        >>> probabilities = np.array([[0.5, 0.5, 0.0, 0.0]])
        >>> scores = np.array([[1.0, 1 + np.log(3), -np.inf, -np.inf]])
        >>> AlignmentWeights(power=1.0, weight=1.0).mix(probabilities, scores).round(2).tolist()
        [[0.25, 0.75, 0.0, 0.0]]
        """
        logs, centred = _alignment_features(probabilities, scores)
        is_present = np.isfinite(scores)
        return softmax(np.where(is_present, self.power * logs + self.weight * centred, -np.inf))


def _alignment_features(
    probabilities: np.ndarray,
    scores: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(n, 4) log-probabilities, and scores less their mean in the row; 0 for a blank choice."""
    is_present = np.isfinite(scores)
    logs = np.log(np.maximum(probabilities, PROBABILITY_FLOOR))
    usual = np.mean(scores, axis=1, where=is_present, keepdims=True)
    return np.where(is_present, logs, 0), np.where(is_present, scores - usual, 0)


def fit_alignment(
    probabilities: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    scaling: bool = True,
) -> AlignmentWeights:
    """The mixture of least NLL; its weight is not negative. Convex, found by L-BFGS-B.

    `probabilities` and `scores`: (n, 4); `labels`: (n,). Without `scaling` the model's
    log-probabilities keep their size.

    >>> unsure = np.full((4, 4), 0.25)
    >>> labels = np.array([0, 1, 2, 3])
    >>> fit_alignment(unsure, np.zeros((4, 4)), labels).weight
    0.0
    >>> fit_alignment(unsure, np.eye(4) + 0.5 * np.eye(4)[::-1], labels).weight > 1
    True
    """
    rows = np.arange(len(labels))
    logs, centred = _alignment_features(probabilities, scores)
    spread = centred.std()
    if spread == 0:
        return AlignmentWeights(power=1.0, weight=0.0)
    features = np.stack([logs, centred / spread])  # (2, n, 4)
    blank = np.where(np.isfinite(scores), 0, -np.inf)
    of_label = features[:, rows, labels]

    def loss_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = np.tensordot(weights, features, axes=1) + blank
        loss = -special.log_softmax(logits, axis=1)[rows, labels].mean()
        expected = (special.softmax(logits, axis=1) * features).sum(axis=2)
        return loss, (expected - of_label).mean(axis=1)

    low, high = TEMPERATURE_BOUNDS
    powers = (1 / high, 1 / low) if scaling else (1.0, 1.0)
    best = minimize(
        loss_and_gradient,
        [1.0, 0.0],
        jac=True,
        method="L-BFGS-B",
        bounds=[powers, (0.0, 100.0)],
    ).x
    return AlignmentWeights(power=float(best[0]), weight=float(best[1] / spread))


@dataclass(frozen=True)
class AlignmentMember:
    """What OOF rows say of the alignment scores of a run."""

    weights: AlignmentWeights  # fitted on all OOF rows, for the test rows
    step: Candidate  # of the ladder: the mixture, cross-fitted
    used: bool  # whether OOF prefers the mixture
    # (n, 4) of what is used, mixture or not, chosen for each part of the rows by the others.
    probabilities: np.ndarray


def judge_alignment(run: Run, oof: OofLogits, probabilities: np.ndarray) -> AlignmentMember | None:
    """Whether alignment scores make `probabilities` (n, 4), cross-fitted, better on OOF rows.

    By the rule of the automatic choice: a lower NLL by more than one standard error, and no loss
    of accuracy. None where the run has no such scores.
    """
    table = read_alignment(run, "train")
    if table is None:
        return None
    scores = table.loc[oof.frame["id"]].to_numpy()
    scaling = run.config.use_temperature_scaling

    def fit_and_mix(fit_inputs, fit_labels, inputs) -> np.ndarray:
        return fit_alignment(*fit_inputs, fit_labels, scaling).mix(*inputs)

    both = np.stack([probabilities, scores])
    mixed = cross_fit(fit_and_mix, both, oof.labels, oof.groups % CROSS_FIT_PARTS)
    step = Candidate(mixed, fitted_parameters=1 + scaling)
    candidates = {"without": Candidate(probabilities), "with": step}
    chosen = choose_blend(candidates, oof.labels, oof.groups)
    weights = fit_alignment(probabilities, scores, oof.labels, scaling)
    LOGGER.info(
        "Decision: alignment scores of %s are %s: weight %.3f, OOF accuracy %.4f without and "
        "%.4f with them",
        run.config.alignment_model,
        "used" if chosen == "with" else "not used",
        weights.weight,
        (probabilities.argmax(axis=1) == oof.labels).mean(),
        (mixed.argmax(axis=1) == oof.labels).mean(),
    )
    return AlignmentMember(
        weights=weights,
        step=step,
        used=chosen == "with",
        probabilities=choose_cross_fitted(candidates, oof.labels, oof.groups),
    )


def add_alignment_step(
    steps: dict[str, LadderStep],
    member: AlignmentMember,
    views: Sequence[int],
) -> None:
    """Put the mixture behind the steps of the submission, against the last of them."""
    final_model = steps.pop(STEP_FINAL_MODEL, None)
    against = [name for name, step in steps.items() if step.used][-1]
    steps[STEP_ALIGNMENT] = LadderStep(
        probabilities=member.step.probabilities,
        against=against,
        views=views,
        used=member.used,
        fitted_parameters=member.step.fitted_parameters,
        extra_cost=steps[against].extra_cost,  # of the base model
    )
    if final_model is not None:
        steps[STEP_FINAL_MODEL] = final_model


def describe_alignment(run: Run, evaluation: Evaluation) -> str:
    """A sentence on whether alignment scores are part of the submission, and what they gave."""
    scores = f"Alignment scores of `{run.config.alignment_model}`"
    none = f"{scores} are no part of the submission"
    if not run.is_done("alignment", 0):
        return f"{none}: not all rows have them yet; run all again to add them."
    if STEP_ALIGNMENT not in evaluation.ladder.index:
        return f"{none}: nothing is fitted to models without skill."
    step = evaluation.ladder.loc[STEP_ALIGNMENT]
    gain = points_with_interval(step["gain"], step["gain_low"], step["gain_high"])
    change = f"on out-of-fold rows they change the accuracy by {gain} points"
    if evaluation.alignment is None:
        return f"{none}: they are not better by more than a standard error; {change}."
    weight = evaluation.alignment.weight
    return f"{scores} are part of the submission, with weight {weight:.3f}: {change}."


def aligned_letters(run: Run) -> dict[tuple[str, str], str]:
    """(train or test, id) -> the letter whose choice fits the image best; {} without scores."""
    letters = {}
    for name in ALIGNMENT_FILES:
        table = read_alignment(run, name)
        if table is None:
            return {}
        for row_id, letter in table.idxmax(axis=1).items():
            letters[name, row_id] = letter
    return letters


# === Evaluation ===================================================================================
@dataclass(frozen=True)
class Evaluation:
    """Every decision taken on OOF, and the OOF probabilities behind it."""

    oof: OofLogits
    skill: Skill  # decides whether anything is fitted
    views: list[int]  # admitted views
    view_table: pd.DataFrame  # of `admit_views`
    calibration: Calibration  # of the mean over the admitted views
    method: str  # how the submission combines views, a key of VIEW_BLEND_STEPS or "mean"
    # (n, 4) cross-fitted, of that method; with "auto" the choice is made without the row.
    probabilities: np.ndarray
    ladder: pd.DataFrame  # of `build_ladder`
    fold_table: pd.DataFrame  # of `temperature_table`
    bound_reasons: Mapping[int, str]  # of `reasons_at_bounds`; a model without skill is not asked
    alignment: AlignmentWeights | None = None  # of the submission; None: it has no such scores
    base: BaseMember | None = None  # None where the base model has scored no rows, or without skill


@dataclass(frozen=True)
class ViewDecisions:
    """What is decided about the views of one run, each decision after those above it."""

    views: list[int]  # admitted views
    # With fitted temperatures, where the configuration asks for them; None without skill.
    scaled: Calibration | None
    calibration: Calibration  # the one in use: `scaled`, or every temperature at 1
    candidates: dict[str, Candidate]  # ways to combine the views; the mean comes first
    method: str  # the candidate of the submission
    probabilities: np.ndarray  # (n, 4) as in `Evaluation`


def reasons_at_bounds(oof: OofLogits, scores: np.ndarray) -> dict[int, str]:
    """Fold -> why its rows alone ask for a temperature beyond TEMPERATURE_BOUNDS, where they do.

    `scores`: (n, 4) combined over views.
    """
    reasons = {}
    for fold in np.unique(oof.folds).tolist():
        inside = oof.folds == fold
        scaler = TemperatureScaler().fit(scores[inside], oof.labels[inside])
        if scaler.at_bound:
            reasons[fold] = scaler.bound_reason
    return reasons


def temperature_table(
    oof: OofLogits,
    scores: np.ndarray,
    temperatures: Mapping[int, float],
    folds_at_bound: Iterable[int],
) -> pd.DataFrame:
    """Each fold's temperature, and its scores before it.

    `scores`: (n, 4) combined over views; `folds_at_bound`: those of `reasons_at_bounds`.
    """
    rows = {}
    for fold, temperature in temperatures.items():
        inside = oof.folds == fold
        labels = oof.labels[inside]
        rows[fold] = {
            "rows": int(inside.sum()),
            **score_row(softmax(scores[inside]), labels),
            "temperature": temperature,
            "at_bound": fold in folds_at_bound,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("fold")


def _choose_calibration(scaled: Calibration, scores: np.ndarray, oof: OofLogits) -> Calibration:
    """`scaled`, where it lowers the cross-fitted NLL; else every temperature at 1."""
    plain = calibrate(scores, oof.labels, oof.folds, enabled=False)
    plain_loss = negative_log_likelihood(plain.probabilities, oof.labels)
    scaled_loss = negative_log_likelihood(scaled.probabilities, oof.labels)
    return scaled if scaled_loss < plain_loss else plain


def _view_candidates(
    run: Run,
    oof: OofLogits,
    views: Sequence[int],
    calibration: Calibration,
) -> dict[str, Candidate]:
    """The ways to combine the views: their calibrated mean, then the blends of several.

    The mean alone where rows in doubt have more views than others.
    """
    candidates = {"mean": Candidate(calibration.probabilities)}
    if len(views) > 1 and not oof.steps:
        blends = cross_fitted_blends(
            _view_members(oof.logits, views),
            oof.labels,
            oof.groups,
            VIEW_BLEND_STEPS,
            run.config.use_temperature_scaling,
        )
        candidates.update(blends)
    return candidates


def _without_vote(candidates: Mapping[str, Candidate]) -> dict[str, Candidate]:
    """The candidates that may be chosen: folds vote, not views."""
    return {name: candidate for name, candidate in candidates.items() if name != "vote"}


def _choose_method(
    run: Run,
    oof: OofLogits,
    candidates: Mapping[str, Candidate],
) -> tuple[str, np.ndarray]:
    """The way to combine views, and its (n, 4) cross-fitted probabilities.

    It is the setting `ensemble_method`, or with "auto" the evidence's choice. The mean
    stands in for a vote, and for weights where there is one view only.
    """
    eligible = _without_vote(candidates)
    if run.config.ensemble_method == "auto":
        method = choose_blend(eligible, oof.labels, oof.groups)
        return method, choose_cross_fitted(eligible, oof.labels, oof.groups)
    method = run.config.ensemble_method
    if method not in eligible:
        method = "mean"
    return method, candidates[method].probabilities


def _unfitted_views(oof: OofLogits, views: list[int]) -> ViewDecisions:
    """The plain mean over the views, with every temperature at 1: nothing is fitted to labels."""
    scores = oof.scores(views)
    plain = calibrate(scores, oof.labels, oof.folds, enabled=False)
    return ViewDecisions(
        views=views,
        scaled=None,
        calibration=plain,
        candidates={"mean": Candidate(plain.probabilities)},
        method="mean",
        probabilities=plain.probabilities,
    )


def decide_views(run: Run, oof: OofLogits, views: list[int]) -> ViewDecisions:
    """With the admitted views, decide on the temperature and on the way to combine them."""
    scores = oof.scores(views)
    scaled = calibrate(scores, oof.labels, oof.folds, run.config.use_temperature_scaling)
    calibration = _choose_calibration(scaled, scores, oof)
    candidates = _view_candidates(run, oof, views, calibration)
    method, probabilities = _choose_method(run, oof, candidates)
    return ViewDecisions(
        views=views,
        scaled=scaled,
        calibration=calibration,
        candidates=candidates,
        method=method,
        probabilities=probabilities,
    )


def _temperature_step(decisions: ViewDecisions, against: str) -> LadderStep:
    """The step of temperature scaling the mean over the admitted views."""
    is_in_use = decisions.calibration is decisions.scaled
    return LadderStep(
        probabilities=decisions.scaled.probabilities,
        against=against,
        views=decisions.views,
        used=decisions.method == "mean" and is_in_use,
        fitted_parameters=1,
    )


def _blend_steps(run: Run, decisions: ViewDecisions, against: str) -> dict[str, LadderStep]:
    """Steps of the other ways to combine views than the mean, and of the choice among them."""
    steps = {}
    for name, candidate in decisions.candidates.items():
        if name == "mean":
            continue  # it is the step that the others are compared with
        steps[VIEW_BLEND_STEPS[name]] = LadderStep(
            probabilities=candidate.probabilities,
            against=against,
            views=decisions.views,
            used=name == decisions.method,
            fitted_parameters=candidate.fitted_parameters,
        )
    if steps and run.config.ensemble_method == "auto":
        steps[STEP_AUTOMATIC] = LadderStep(
            probabilities=decisions.probabilities,
            against=against,
            views=decisions.views,
            used=True,
        )
    return steps


def decision_ladder_steps(
    run: Run,
    oof: OofLogits,
    view_table: pd.DataFrame,
    decisions: ViewDecisions,
) -> dict[str, LadderStep]:
    """The ladder's steps from one view to the submission."""
    steps = view_ladder_steps(
        oof,
        view_table["admitted"],
        decisions.views,
        averaged=decisions.method == "mean",
    )
    # The mean over the admitted views is what the further steps are compared with.
    (mean_step,) = [name for name, step in steps.items() if step.views == decisions.views]
    if run.config.use_temperature_scaling and decisions.scaled is not None:
        steps[STEP_TEMPERATURE] = _temperature_step(decisions, mean_step)
        if decisions.calibration is decisions.scaled:
            mean_step = STEP_TEMPERATURE
    steps.update(_blend_steps(run, decisions, mean_step))
    if run.final_fold in run.submission_models:
        steps[STEP_FINAL_MODEL] = LadderStep(
            probabilities=np.full((len(oof.labels), 4), math.nan),
            views=decisions.views,
            used=True,
        )
    return steps


WORSE_THAN_ZEROSHOT = "worse than zero-shot"
NOT_ABOVE_ZEROSHOT = "not above zero-shot"


def training_shortfall(ladder: pd.DataFrame) -> str:
    """Where training is not better than the base model beyond chance: one of the texts above.

    "" where it is better, and where no row was scored by both.
    """
    tuned = ladder.loc[STEP_ONE_VIEW]
    if tuned["gain_high"] < 0:
        return WORSE_THAN_ZEROSHOT
    return NOT_ABOVE_ZEROSHOT if tuned["gain_low"] <= 0 else ""


def _mark_used_steps(ladder: pd.DataFrame, skill: Skill) -> None:
    """Say beside the steps of the submission that they have not earned their place.

    The column `alarm` is there only where training has not helped.
    """
    mark = training_shortfall(ladder) if skill.has_skill else "not above guessing"
    if mark:
        ladder["alarm"] = np.where(ladder["used"].astype(bool), mark, "")


@each_warning_once()
def evaluate_run(run: Run) -> Evaluation:
    """Take every decision on OOF rows, and say what each step is worth, all from saved logits.

    The decisions: whether the model has skill, which views are admitted, whether temperatures
    are used, and how views are combined. Without skill there are no temperatures, and views
    are combined by their mean.
    """
    oof = read_oof(run)
    skill = measure_skill(oof, run.train["answer"])
    views, view_table = admit_views(oof, run.config.use_temperature_scaling and skill.has_skill)
    if skill.has_skill:
        decisions = decide_views(run, oof, views)
    else:
        LOGGER.warning("%s: %s", run.directory.name, lack_of_skill(skill))
        decisions = _unfitted_views(oof, views)
    steps = decision_ladder_steps(run, oof, view_table, decisions)
    probabilities = decisions.probabilities
    base_choice = None
    if skill.has_skill and run.is_base_scored:
        base_choice = choose_base_mixture(run, oof, views, probabilities)
        steps = with_base_steps(steps, base_choice)
        probabilities = base_choice.probabilities
    alignment = judge_alignment(run, oof, probabilities) if skill.has_skill else None
    if alignment is not None:
        add_alignment_step(steps, alignment, decisions.views)
        probabilities = alignment.probabilities
    ladder = build_ladder(run, oof, steps)
    if STEP_AUTOMATIC in steps:
        eligible = _without_vote(decisions.candidates)
        set_choice_interval(ladder, eligible, oof.labels, oof.groups)
    if base_choice:
        candidates = base_choice.candidates
        set_choice_interval(ladder, candidates, oof.labels, oof.groups, STEP_BASE_CHOICE)
    _mark_used_steps(ladder, skill)
    scores = oof.scores(views)
    temperatures = decisions.calibration.temperatures
    bound_reasons = reasons_at_bounds(oof, scores) if skill.has_skill else {}
    return Evaluation(
        oof=oof,
        skill=skill,
        views=views,
        view_table=view_table,
        calibration=decisions.calibration,
        method=decisions.method,
        probabilities=probabilities,
        ladder=ladder,
        fold_table=temperature_table(oof, scores, temperatures, bound_reasons),
        bound_reasons=bound_reasons,
        base=base_choice.member if base_choice else None,
        alignment=alignment.weights if alignment is not None and alignment.used else None,
    )


# === Test answers =================================================================================
def _predict_fold(run: Run, evaluation: Evaluation, fold: int) -> np.ndarray:
    """(n, 4) test probabilities of one model, by the method that OOF rows chose."""
    logits = read_scores(run, fold, "test")["logits"]
    if evaluation.method in VIEW_BLEND_STEPS:
        return fit_and_blend(
            evaluation.method,
            _view_members(evaluation.oof.logits, evaluation.views),
            evaluation.oof.labels,
            _view_members(logits, evaluation.views),
            run.config.use_temperature_scaling,
        )
    names = [evaluation.oof.view_names[view] for view in evaluation.views]
    scores = combine_steps(logits[:, evaluation.views], names)
    return softmax(scores / evaluation.calibration.temperatures[fold])


def predict_test(run: Run, evaluation: Evaluation) -> dict[int, np.ndarray]:
    """Model -> (n, 4) test probabilities with the admitted views and the fold's temperature.

    The final model, if there is one, gets the pooled temperature. Where OOF prefers it, the base
    model is mixed into each, by the rule for OOF rows.
    """
    base = evaluation.base
    if base is not None and base.is_used:
        base_probabilities = predict_base_test(run, evaluation.oof, evaluation.views, base)
    probabilities = {}
    for fold in run.submission_models:
        probabilities[fold] = _predict_fold(run, evaluation, fold)
        if base is not None and base.is_used:
            probabilities[fold] = base.apply(probabilities[fold], base_probabilities)
    if evaluation.alignment is None:
        return probabilities
    scores = read_alignment(run, "test").loc[run.test["id"]].to_numpy()
    mix = evaluation.alignment.mix
    return {fold: mix(of_fold, scores) for fold, of_fold in probabilities.items()}


def best_fold(evaluation: Evaluation) -> int:
    """The fold with the highest OOF accuracy, then the lowest NLL.

    The test rows play no part.
    """
    ranking = evaluation.fold_table.sort_values(
        ["accuracy", "nll"],
        ascending=[False, True],
    )
    return int(ranking.index[0])


def combine_models(run: Run, members: np.ndarray) -> np.ndarray:
    """(n,) answers, 0-3, of the ensemble of (models, n, 4) test probabilities."""
    if run.config.ensemble_method == "vote":
        return majority_vote(members)
    return members.mean(axis=0).argmax(axis=1)


# === Errors =======================================================================================
def label_suspects(probabilities, labels) -> pd.DataFrame:
    """Rows whose label is probably wrong, the likeliest first.

    A row is suspect where another choice is as probable as that choice usually is in the rows
    that it labels, and more probable than the row's own label. This is confident learning
    (Northcutt et al. 2021, arXiv:1911.00068).

    `probabilities` (n, 4) are out of fold, `labels` (n,) are 0 to 3. Columns: `row` (position),
    `label`, `likely` (the other choice) and `margin` (by how much it is more probable).

    >>> probabilities = [[0.9, 0.1, 0, 0], [0.1, 0.9, 0, 0], [0.05, 0.95, 0, 0]]
    >>> label_suspects(probabilities, [0, 1, 0])[["row", "label", "likely"]].values.tolist()
    [[2, 0, 1]]
    """
    probabilities = _as_probabilities(probabilities)
    labels = _as_labels(labels, probabilities.shape)
    rows = np.arange(len(probabilities))
    of_label = probabilities[rows, labels]
    usual = (
        pd.Series(of_label)
        .groupby(labels)
        .mean()
        .reindex(range(probabilities.shape[1]), fill_value=1.0)  # never a label: never likely
        .to_numpy()
    )
    as_usual = probabilities >= usual
    likeliest = np.where(as_usual, probabilities, -1.0).argmax(axis=1)
    likely = np.where(as_usual.any(axis=1), likeliest, labels)
    table = pd.DataFrame(
        {
            "row": rows,
            "label": labels,
            "likely": likely,
            "margin": probabilities[rows, likely] - of_label,
        }
    )
    suspects = table[(likely != labels) & (table["margin"] > 0)]
    return suspects.sort_values("margin", ascending=False, kind="stable")


def accuracy_by_type(types: Sequence[str], correct: np.ndarray) -> pd.DataFrame:
    """Rows and accuracy of each question type, the weakest first.

    >>> accuracy_by_type(["ocr", "color", "ocr"], [True, True, False]).to_dict("index")
    {'ocr': {'rows': 2, 'accuracy': 0.5}, 'color': {'rows': 1, 'accuracy': 1.0}}
    """
    rows = pd.DataFrame({"type": list(types), "correct": correct})
    table = rows.groupby("type")["correct"].agg(rows="size", accuracy="mean")
    return table.sort_values("accuracy")


def _quarter_names(values: pd.Series) -> list[str]:
    """The quarter of each of the values, named by its ends: "3 to 5", or "3" for a single value."""
    edges = np.unique(values.quantile([0.25, 0.5, 0.75], interpolation="lower"))
    quarters = values.groupby(np.searchsorted(edges, values))
    lows = quarters.transform("min")
    highs = quarters.transform("max")
    names = []
    for low, high in zip(lows, highs, strict=True):
        names.append(f"{low} to {high}" if low < high else f"{low}")
    return names


def _choice_lengths(frame: pd.DataFrame) -> pd.DataFrame:
    """Characters of the choices a, b, c, d; NaN for one that is not there, and not the shortest."""
    lengths = frame[list(CHOICES)].map(len)
    return lengths.where(lengths > 0)


def _answer_length_names(frame: pd.DataFrame) -> np.ndarray:
    """How long each row's answer is, beside its other choices."""
    lengths = _choice_lengths(frame)
    shortest = lengths.min(axis=1)
    longest = lengths.max(axis=1)
    of_answer = lengths.to_numpy()[np.arange(len(frame)), frame["label"]]
    cases = [shortest == longest, of_answer == longest, of_answer == shortest]
    return np.select(cases, ["all equal", "longest", "shortest"], "between")


def _image_use_names(frame: pd.DataFrame) -> np.ndarray:
    """Whether each row's image has a near copy, or else belongs to several questions."""
    questions = frame.groupby("pixel_hash")["id"].transform("size")
    different_images = frame.groupby("image_group")["pixel_hash"].transform("nunique")
    cases = [different_images > 1, questions > 1]
    return np.select(cases, ["has a near copy", "in several questions"], "in one question")


def accuracy_by_group(frame: pd.DataFrame, correct: np.ndarray) -> pd.DataFrame:
    """Rows and accuracy of groups of rows that look alike, in several groupings.

    These are: question type, answer's letter, lengths of question, choices and prompt, size of
    the image, and its copies. Every row is once in each grouping.

    `frame`: training rows with the columns `image_group` (near copies share a number) and
    `tokens` (of the prompt; None where unknown). `correct`: (n,) right or wrong.
    """
    longest_choice = _choice_lengths(frame).max(axis=1)
    lengths = {
        "question, characters": frame["question"].map(len),
        "longest choice, characters": longest_choice.astype(int),
        "image, pixels": frame["width"] * frame["height"],
        "prompt, tokens": frame["tokens"],
    }
    groups = {"question type": frame["type"], "answer": frame["answer"]}
    for name, values in lengths.items():
        if values.notna().all():
            groups[name] = _quarter_names(values)
    groups["answer's length"] = _answer_length_names(frame)
    groups["image"] = _image_use_names(frame)
    tables = {name: accuracy_by_type(list(values), correct) for name, values in groups.items()}
    return pd.concat(tables, names=["by", "group"])


def uncertain_rows(run: Run, evaluation: Evaluation) -> pd.DataFrame:
    """Test rows by what a human look is worth, the most uncertain first.

    These are rows whose folds do not all share the ensemble's answer, then small margins.
    `margin`: of the answer's mean probability over its likeliest rival's, which a majority vote
    may have put second. `chance_wrong`: one less the answer's mean probability.
    """
    members = np.stack(list(predict_test(run, evaluation).values()))
    answers = combine_models(run, members)
    rows = np.arange(len(run.test))
    means = members.mean(axis=0)
    of_answer = means[rows, answers]
    rivals = means.copy()
    rivals[rows, answers] = -1
    letters = np.array(CHOICES)

    table = run.test[["id", "type", "question", *CHOICES]].assign(
        predicted=letters[answers],
        folds_for_it=(members.argmax(axis=2) == answers).mean(axis=0).round(3),
        second=letters[rivals.argmax(axis=1)],
        margin=(of_answer - rivals.max(axis=1)).round(4),
        chance_wrong=(1 - of_answer).round(4),
    )
    return table.sort_values(["folds_for_it", "margin"], kind="stable", ignore_index=True)


def active_list(suspects: pd.DataFrame, uncertain: pd.DataFrame) -> pd.DataFrame:
    """Training and test rows worth a human look, by the chance that their answer is wrong.

    That is the model's own probability. Of the test rows, those above the average are listed;
    `other` is the likeliest other choice. `suspects` and `uncertain` are two of the tables of
    `write_error_tables`.
    """
    train = suspects.rename(columns={"likely": "other"})
    train = train.assign(rows="train", reason="label probably wrong")

    test = uncertain[uncertain["chance_wrong"] > uncertain["chance_wrong"].mean()]
    test = test.rename(columns={"predicted": "answer", "second": "other"})
    reason = np.where(test["folds_for_it"] < 1, "folds disagree", "small margin")
    test = test.assign(rows="test", reason=reason)

    columns = ["rows", "id", "reason", "chance_wrong", "answer", "other", "question", *CHOICES]
    table = pd.concat([train[columns], test[columns]])
    return table.sort_values("chance_wrong", ascending=False, kind="stable", ignore_index=True)


def with_aligned_letters(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """`active_list` with the letter that `alignment_model` prefers, where the run has scores."""
    letters = aligned_letters(run)
    if not letters:
        return table
    values = [letters[key] for key in zip(table["rows"], table["id"], strict=True)]
    place = table.columns.get_loc("other") + 1
    table.insert(place, "aligned", values)
    return table


def reliability_by_type(
    types: Sequence[str], probabilities: np.ndarray, labels: np.ndarray
) -> pd.DataFrame:
    """Mean confidence and `calibration_row` of each question type.

    The type whose confidence is furthest from its accuracy comes first.
    """
    types = np.asarray(types)
    rows = {}
    for name in np.unique(types):
        inside = types == name
        rows[name] = {
            "rows": int(inside.sum()),
            "confidence": probabilities[inside].max(axis=1).mean(),
            **calibration_row(probabilities[inside], labels[inside]),
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("type")
    gap = (table["confidence"] - table["accuracy"]).abs()
    return table.loc[gap.sort_values(ascending=False, kind="stable").index]


def confusion_table(labels: np.ndarray, predicted: np.ndarray) -> pd.DataFrame:
    """Counts (4, 4) of letters: rows the true one, columns the predicted one.

    >>> confusion_table(np.array([0, 0, 3]), np.array([0, 1, 3])).loc["a"].to_dict()
    {'a': 1, 'b': 1, 'c': 0, 'd': 0}
    """
    counts = np.bincount(4 * labels + predicted, minlength=16).reshape(4, 4)
    return pd.DataFrame(
        counts,
        index=pd.Index(CHOICES, name="true"),
        columns=pd.Index(CHOICES, name="predicted"),
    )


def wrong_answers(evaluation: Evaluation) -> pd.DataFrame:
    """The OOF rows that are answered wrongly, the surest first.

    Beside the columns of the row: `predicted`, and `confidence`, its probability.
    """
    predicted = evaluation.probabilities.argmax(axis=1)
    frame = evaluation.oof.frame.assign(
        predicted=np.array(CHOICES)[predicted],
        confidence=evaluation.probabilities.max(axis=1).round(4),
    )
    wrong = frame[predicted != evaluation.oof.labels]
    return wrong.sort_values("confidence", ascending=False, kind="stable", ignore_index=True)


def most_confident_mistakes(evaluation: Evaluation) -> tuple[pd.DataFrame, list[str]]:
    """The six wrong answers that the model was surest of, and a note for each."""
    frame = wrong_answers(evaluation).head(6)
    notes = []
    for letter, confidence in zip(frame["predicted"], frame["confidence"], strict=True):
        notes.append(f"predicted {letter} with probability {confidence:.2f}")
    return frame, notes


def save_table(table: pd.DataFrame, run: Run, name: str) -> pd.DataFrame:
    """Write the table as tables/`name`.csv in the run directory; returns it as it was.

    The index becomes the first column, or columns, where it has a name.
    """
    content = table.reset_index() if any(table.index.names) else table
    write_table(content, run.directory / "tables" / f"{name}.csv")
    return table


def _suspect_rows(evaluation: Evaluation) -> pd.DataFrame:
    """`label_suspects` of the evaluation, with ids, texts and letters for a reader.

    Empty for a model without skill, whose doubts say nothing about a label.
    """
    probabilities = evaluation.probabilities
    suspects = label_suspects(probabilities, evaluation.oof.labels)
    if not evaluation.skill.has_skill:
        LOGGER.warning("No label is suspected: the model is not above guessing")
        suspects = suspects.head(0)
    frame = evaluation.oof.frame.iloc[suspects["row"]].reset_index(drop=True)
    of_label = probabilities[suspects["row"], suspects["label"]]
    return frame[["id", "question", *CHOICES, "answer"]].assign(
        likely=np.array(CHOICES)[suspects["likely"]],
        margin=suspects["margin"].round(4).to_numpy(),
        chance_wrong=(1 - of_label).round(4),
    )


def write_error_tables(
    run: Run, evaluation: Evaluation, image_group: Sequence[int]
) -> dict[str, pd.DataFrame]:
    """Every table of the error analysis by name; each is also tables/<name>.csv.

    `image_group`: of each training row, as `leakage_report` numbers them.
    """
    oof = evaluation.oof
    probabilities = evaluation.probabilities
    predicted = probabilities.argmax(axis=1)
    groups = pd.Series(np.asarray(image_group), index=run.train["id"])
    frame = oof.frame.assign(tokens=oof.tokens, image_group=oof.frame["id"].map(groups))
    suspects = _suspect_rows(evaluation)
    uncertain = uncertain_rows(run, evaluation)
    texts = ["id", "type", "question", *CHOICES]
    tables = {
        "accuracy_by_group": accuracy_by_group(frame, predicted == oof.labels),
        "reliability_by_type": reliability_by_type(oof.frame["type"], probabilities, oof.labels),
        "label_suspects": suspects,
        "uncertain_rows": uncertain,
        "active_list": with_aligned_letters(run, active_list(suspects, uncertain)),
        "confusion": confusion_table(oof.labels, predicted),
        "mistakes": wrong_answers(evaluation)[[*texts, "answer", "predicted", "confidence"]],
    }
    for name, table in tables.items():
        save_table(table, run, name)
    return tables


# === Verdict ======================================================================================
# Why is told in the section "Soft targets".
DISTILLED_WARNING = (
    "it was distilled, and its teacher was trained on the rows that validate it: "
    "its OOF figures are too good"
)
ALARM_COLOUR = "#d9822b"
GOOD_COLOUR = "#2e8b57"
GAIN_TO_SHOW = 0.05  # above guessing: a model with that much is at work, though few rows show it
SHARE_CUT_TO_ACT_ON = 0.2  # of the images: from here on more pixels are the thing to try next


@dataclass(frozen=True)
class Verdict:
    """What a run is worth, in figures and plain sentences; `make_verdict` fills it.

    Accuracies and gains are shares from 0 to 1, ends of intervals are of 90 %.
    """

    accuracy: float  # to expect on a leaderboard: that of the OOF rows
    low: float  # lower end of its interval, for a leaderboard of `test_rows` rows
    high: float  # upper end
    guessing: float  # accuracy of the guess that is harder to beat, as in `Skill`
    has_skill: bool  # whether the model is above guessing beyond chance
    zeroshot_accuracy: float  # of the base model, on the rows that it scored
    gain: float  # accuracy that training adds in one view, on rows that both scored; else NaN
    gain_low: float
    gain_high: float
    test_rows: int
    models: int  # behind the submission
    alarms: tuple[str, ...]  # sentences
    wall_seconds: float  # on the clock, while any worker was at work
    worker_seconds: float  # of all workers together
    next_step: str  # the one thing to try, a sentence
    base_member: str = ""  # what the base model as a member gave, a sentence; "": it scored nothing


def widen_for_leaderboard(
    accuracy: float, interval: tuple[float, float], rows: int, test_rows: int
) -> tuple[float, float]:
    """Ends of the 90 % interval of a leaderboard's score, from those of the accuracy itself.

    A leaderboard of `test_rows` rows is as noisy as our own estimate from `rows` rows would be
    with so many; the two are independent, so that their squares add.

    >>> low, high = widen_for_leaderboard(0.8, (0.77, 0.83), rows=500, test_rows=500)
    >>> round(low, 3), round(high, 3)
    (0.758, 0.842)
    """
    factor = math.sqrt(1 + rows / test_rows)
    low = accuracy - factor * (accuracy - interval[0])
    high = accuracy + factor * (interval[1] - accuracy)
    return max(0.0, low), min(1.0, high)


def covered_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the (start, end) spans lasted, in seconds.

    >>> covered_seconds([(0, 10), (5, 15), (20, 21)])
    16.0
    """
    total = 0.0
    covered_until = -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, covered_until))
        covered_until = max(covered_until, end)
    return total


def duration_in_words(seconds: float) -> str:
    """A time as one says it.

    >>> [duration_in_words(value) for value in (1, 48.2, 728, 3600, 11110)]
    ['1 second', '48 seconds', '12 minutes', '1 hour', '3 hours 5 minutes']
    """
    minutes = round(seconds / 60)
    if seconds < 60:
        return _count(round(seconds), "second")
    if minutes < 60:
        return _count(minutes, "minute")
    hours = _count(minutes // 60, "hour")
    return f"{hours} {_count(minutes % 60, 'minute')}" if minutes % 60 else hours


def _count(number: int, noun: str) -> str:
    """The number with its noun, in the plural unless it is 1."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def unplanned_events(run: Run) -> list[dict]:
    """The records of events.jsonl, but for what a later session has made up for."""
    made_up_for = []
    members = {*run.finished_members, *run.submission_members}
    for stage, member in itertools.product(("train", "base", "rescore"), members):
        if run.is_done(stage, member):
            name = member_name(run.config, member)
            made_up_for.append(f"{stage} fold {name} was left out")
    if run.is_rescored:
        made_up_for.append("scoring in 16 bits was left out")
    if run.is_done("alignment", 0):
        made_up_for.append("alignment was left out")
    records = read_json_lines(run.directory / "events.jsonl", EVENT_RECORD)
    return [record for record in records if not record["event"].startswith(tuple(made_up_for))]


def _gain_alarm(evaluation: Evaluation) -> str:
    """A sentence where training is not better than the base model beyond chance, else ""."""
    shortfall = training_shortfall(evaluation.ladder)
    if not shortfall:
        return ""
    result = "Training is not better than the base model beyond chance"
    if shortfall == WORSE_THAN_ZEROSHOT:
        result = "Training did harm"
    tuned = evaluation.ladder.loc[STEP_ONE_VIEW]
    base = evaluation.ladder.loc[STEP_ZERO_SHOT, "accuracy"]
    gain = points_with_interval(tuned["gain"], tuned["gain_low"], tuned["gain_high"])
    return f"{result}: {gain} points in one view, against the base model's {base:.3f}."


def learning_alarm(evaluation: Evaluation) -> str:
    """What to know before anything else of a run that learned nothing; "" for a good one.

    Two cases, which may both hold: the out-of-fold accuracy is not above guessing (`Skill`), or
    not above the base model's, beyond chance. What follows for the submission comes last.
    """
    lack = lack_of_skill(evaluation.skill)
    gain = _gain_alarm(evaluation)
    if lack:
        consequence = (
            "So no temperature and no blend is fitted and no label is suspected. The submission "
            "is made of the fine-tuned models all the same, and cannot be told from a guess."
        )
    elif gain:
        consequence = "The submission is made of the fine-tuned models all the same."
    else:
        consequence = ""
    return " ".join(sentence for sentence in (lack, gain, consequence) if sentence)


def learning_html(evaluation: Evaluation) -> str:
    """The learning alarm in large type, or a line that says that there is none."""
    skill = evaluation.skill
    alarm = learning_alarm(evaluation)
    base = evaluation.ladder.loc[STEP_ZERO_SHOT, "accuracy"]
    text = alarm or (
        f"The model has learned: {skill.accuracy:.3f} of the out-of-fold rows are right; "
        f"guessing has {skill.guess_accuracy:.3f} ({skill.guess}), the base model {base:.3f}."
    )
    colour = ALARM_COLOUR if alarm else GOOD_COLOUR
    size = 20 if alarm else 15
    title = "<b>Alarm · 경고</b><br>" if alarm else ""
    return (
        f'<div style="border-left:10px solid {colour}; padding:8px 24px; max-width:860px; '
        f'font-size:{size}px; line-height:1.5">{title}{html.escape(text)}</div>'
    )


def _prediction_alarms(run: Run, evaluation: Evaluation) -> list[str]:
    """Sentences about a letter that is preferred, and about temperatures at a bound."""
    alarms = []
    letters = prediction_diversity(evaluation.probabilities, evaluation.oof.labels)
    if letters["collapsed"]:
        preference = describe_preference(letters)
        alarms.append(f"One letter is preferred in the out-of-fold rows: {preference}.")
    if run.config.use_temperature_scaling:
        for fold, reason in evaluation.bound_reasons.items():
            alarms.append(f"The temperature is at its bound in fold {fold}: {reason}.")
    return alarms


def _missing_folds(run: Run) -> list[str]:
    """The folds, and further seeds of folds, that are asked for and not trained; in words."""
    asked_for = set(members_of(run.config, run.config.folds_to_train))
    missing = sorted(asked_for - set(run.finished_members))
    return [member_name(run.config, member) for member in missing]


def _is_of_other_weights(run: Run, event: str) -> bool:
    """Whether this is `FoldTrainer.save_weights`' note on weights that are not in use."""
    kind = re.match(r"fold \d+(?: seed \d+)?, (\w+) weights: ", event)
    return bool(kind and run.selected_weights and kind[1] not in run.selected_weights)


def _run_alarms(run: Run) -> list[str]:
    """Sentences about what the run has lost or taken a fallback for."""
    alarms = []
    missing = ", ".join(f"fold {name}" for name in _missing_folds(run))
    if missing:
        alarms.append(
            f"Missing: {missing} of {run.config.n_folds}, "
            "because the time ended before the training did."
        )
    taken = [f"{name.replace('_', ' ')}: {count}" for name, count in run.fallbacks.items() if count]
    if taken:
        alarms.append(f"Fallbacks were taken while reading the data: {', '.join(taken)}.")
    if run.config.distill_from:
        alarms.append(f"Do not trust these figures: {DISTILLED_WARNING}.")
    for event in dict.fromkeys(record["event"] for record in unplanned_events(run)):
        if not _is_of_other_weights(run, event):
            alarms.append(f"{event[:1].upper()}{event[1:]}.")
    return alarms


def _stage_seconds(run: Run) -> tuple[float, float]:
    """Seconds on the clock while any worker was at work, and of all workers together."""
    records = read_json_lines(run.directory / "stages.jsonl", STAGE_RECORD)
    spans = [(record["time"] - record["seconds"], record["time"]) for record in records]
    return covered_seconds(spans), sum(record["seconds"] for record in records)


def _next_step(run: Run, verdict: Verdict, results: Sequence[FoldResult], share_cut: float) -> str:
    """The one thing to try next, with the figure that speaks for it: the first rule that holds."""
    config = run.config
    asked_for = len(members_of(config, config.folds_to_train))
    what = "models" if config.has_further_seeds else "folds"
    cut_short = sum(len(result.history) < config.all_epochs for result in results)
    best_is_last = sum(result.best_epoch == config.all_epochs for result in results)
    if _missing_folds(run):
        return (
            f"Run all again, which adds what is missing: {len(run.finished_members)} "
            f"of {asked_for} {what} are trained."
        )
    if cut_short and not config.use_early_stopping:
        return (
            f"Start a new run with fewer num_epochs or more time: {cut_short} of {asked_for} "
            f"{what} ended before epoch {config.all_epochs}."
        )
    if verdict.accuracy - verdict.guessing >= GAIN_TO_SHOW and not verdict.has_skill:
        return (
            f"Train on more rows: with {len(run.train)} of them an accuracy of "
            f"{verdict.accuracy:.3f} may be luck, where a guess has {verdict.guessing:.3f}."
        )
    if not verdict.has_skill:
        return (
            "Check the answers' column and lower the learning rate, now "
            f"{config.learning_rate:g}: the accuracy is {verdict.accuracy:.3f}, "
            f"a guess has {verdict.guessing:.3f}."
        )
    if share_cut >= SHARE_CUT_TO_ACT_ON:
        return f"Raise max_pixels: the pixel budget shrinks {share_cut:.0%} of the images."
    if 2 * best_is_last > asked_for:
        return (
            f"Train longer, for example num_epochs={2 * config.num_epochs}: the best epoch was "
            f"the last one in {best_is_last} of {asked_for} {what}."
        )
    if verdict.gain <= 0:
        return (
            f"Lower the learning rate, now {config.learning_rate:g}: training has changed the "
            f"accuracy by {100 * verdict.gain:+.1f} points."
        )
    if len(config.folds_to_train) < config.n_folds:
        return (
            "Train all folds (use_kfold=True, train_folds=None) and mix them: "
            f"this run has {len(config.folds_to_train)} of {config.n_folds}."
        )
    return (
        "Train a second model family in a run of its own and mix both with ensemble_runs: "
        f"{config.model_id} alone has {verdict.accuracy:.3f}."
    )


def make_verdict(
    run: Run,
    evaluation: Evaluation,
    results: Sequence[FoldResult] = (),
    leakage_alarm: str = "",
    share_cut: float = 0.0,
) -> Verdict:
    """What the run is worth, from its own files and its evaluation.

    `results`: what `run_folds` returned, for a word about the epochs; `leakage_alarm`: that of
    `leakage_report`; `share_cut`: of the images that the pixel budget shrinks, 0 to 1.
    """
    oof = evaluation.oof
    correct = evaluation.probabilities.argmax(axis=1) == oof.labels
    accuracy = float(correct.mean())
    interval = accuracy_interval(correct, oof.groups)
    low, high = widen_for_leaderboard(accuracy, interval, len(correct), len(run.test))
    tuned = evaluation.ladder.loc[STEP_ONE_VIEW]
    wall_seconds, worker_seconds = _stage_seconds(run)
    verdict = Verdict(
        accuracy=accuracy,
        low=low,
        high=high,
        guessing=evaluation.skill.guess_accuracy,
        has_skill=evaluation.skill.has_skill,
        zeroshot_accuracy=float(evaluation.ladder.loc["zero-shot", "accuracy"]),
        gain=float(tuned["gain"]),
        gain_low=float(tuned["gain_low"]),
        gain_high=float(tuned["gain_high"]),
        test_rows=len(run.test),
        models=len(run.submission_members),
        alarms=(),
        wall_seconds=wall_seconds,
        worker_seconds=worker_seconds,
        next_step="",
        base_member=describe_base_member(run, evaluation) if evaluation.base else "",
    )
    learning = learning_alarm(evaluation)
    alarms = [learning] if learning else []
    alarms += _prediction_alarms(run, evaluation)
    alarms += [leakage_alarm] if leakage_alarm else []
    alarms += _run_alarms(run)
    next_step = _next_step(run, verdict, results, share_cut)
    return dataclasses.replace(verdict, alarms=tuple(alarms), next_step=next_step)


def _interval_sentence(verdict: Verdict) -> str:
    """What the interval of the accuracy means."""
    text = (
        f"90 of 100 such leaderboards, of {_count(verdict.test_rows, 'row')} each, are expected "
        f"to lie between {verdict.low:.3f} and {verdict.high:.3f}."
    )
    if verdict.models > 1 and verdict.low > verdict.guessing:  # models that guess gain nothing
        text += f" The {verdict.models} models together usually score a little above this."
    return text


def _training_sentence(verdict: Verdict) -> str:
    """Whether training helped, and by how much."""
    base = f"the base model, which has {verdict.zeroshot_accuracy:.3f}"
    if math.isnan(verdict.gain):
        return f"Not known: no row was scored by both the folds and {base}."
    gain = points_with_interval(verdict.gain, verdict.gain_low, verdict.gain_high)
    if verdict.gain_low > 0:
        return f"Yes: {gain} points in one view, against {base}."
    if verdict.gain_high < 0:
        return f"No, it did harm: {gain} points in one view, against {base}."
    return f"Not beyond chance: {gain} points in one view, against {base}."


def _time_sentence(verdict: Verdict) -> str:
    """The time that the workers took."""
    wall = duration_in_words(verdict.wall_seconds)
    workers = duration_in_words(verdict.worker_seconds)
    if wall == workers:
        return f"{wall} of scoring and training."
    return f"{wall} of scoring and training on the clock, {workers} of all workers together."


def verdict_html(verdict: Verdict) -> str:
    """The verdict in large type, readable on a white and on a dark page."""
    colour = ALARM_COLOUR if verdict.alarms else GOOD_COLOUR
    rows = [
        ("Did training help? · 학습 효과", html.escape(_training_sentence(verdict))),
        ("Alarms · 경고", _alarms_html(verdict)),
        ("Time · 걸린 시간", html.escape(_time_sentence(verdict))),
        ("Try next · 다음에 할 일", f"<b>{html.escape(verdict.next_step)}</b>"),
    ]
    if verdict.base_member:
        rows.insert(1, ("Base model · 기반 모델", html.escape(verdict.base_member)))
    lines = [
        f'<div style="border-left:10px solid {colour}; padding:8px 24px; max-width:860px; '
        'font-size:17px; line-height:1.5">',
        "<div>Accuracy to expect on the leaderboard · 예상 정확도</div>",
        f'<div style="font-size:52px; font-weight:bold; line-height:1.2">{verdict.accuracy:.3f}'
        '<span style="font-size:26px; font-weight:normal"> &nbsp; '
        f"{verdict.low:.3f} – {verdict.high:.3f}</span></div>",
        f"<div>{html.escape(_interval_sentence(verdict))}</div>",
    ]
    for label, content in rows:
        lines.append(f'<div style="margin-top:12px"><i>{label}</i><br>{content}</div>')
    return "\n".join([*lines, "</div>"])


def _alarms_html(verdict: Verdict) -> str:
    """A list of the alarms, or that there is none."""
    if not verdict.alarms:
        return "No alarm."
    items = [f"<li>{html.escape(alarm)}</li>" for alarm in verdict.alarms]
    return f'<ul style="margin:0; padding-left:24px">{"".join(items)}</ul>'


def verdict_markdown(verdict: Verdict) -> str:
    """The verdict as Markdown, for the report."""
    alarms = verdict.alarms or ("none.",)
    lines = [
        f"**Accuracy to expect on the leaderboard: {verdict.accuracy:.3f}** "
        f"({verdict.low:.3f} to {verdict.high:.3f}). {_interval_sentence(verdict)}",
        "",
        f"- Did training help? {_training_sentence(verdict)}",
        *([f"- {verdict.base_member}"] if verdict.base_member else []),
        *(f"- Alarm: {alarm}" for alarm in alarms),
        f"- Time: {_time_sentence(verdict)}",
        f"- Try next: {verdict.next_step}",
    ]
    return "\n".join(lines)


# === Figures ======================================================================================
BLUE = "#1f6fb2"
PALE_BLUE = "#a9c7e2"
ORANGE = "#d9822b"
GREY = "#6f757e"
LINE_COLOURS = (
    BLUE,
    ORANGE,
    "#009e73",
    "#b1478f",
    "#56b4e9",
    "#5b4b2a",
)  # distinct if colour-blind
matplotlib_figure = _LazyModule("matplotlib.figure")
matplotlib_ticker = _LazyModule("matplotlib.ticker")


def _axes(ax, title: str, xlabel: str, ylabel: str, figsize=(6, 3.2), **settings):
    """The given axes, or new ones, with title and labels set.

    Figures carry type names only: Korean text is HTML, because matplotlib may lack the font.
    """
    ax = ax or matplotlib_figure.Figure(figsize=figsize, layout="constrained").subplots()
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel, **settings)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _two_axes(axes):
    """The given pair of axes, or a new one side by side."""
    if axes is not None:
        return axes
    return matplotlib_figure.Figure(figsize=(10, 3.4), layout="constrained").subplots(1, 2)


def _whole_numbers(axis) -> None:
    """Let an axis have ticks at whole numbers only: there is no epoch 1.5."""
    axis.set_major_locator(matplotlib_ticker.MaxNLocator(integer=True, min_n_ticks=1))


def _show_at_least(ax, span: float) -> None:
    """Widen the vertical axis to `span`: one row more or less must not look like a cliff."""
    low, high = ax.get_ylim()
    missing = max(0.0, span - (high - low)) / 2
    ax.set_ylim(low - missing, high + missing)


def spread_apart(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Ascending heights moved until neighbours are `gap` apart; their mean stays.

    Where the highest would then be above `top`, it and its neighbours give way downwards.

    >>> spread_apart([4.0, 4.0, 4.0], gap=2.0, top=9.0)
    [2.0, 4.0, 6.0]
    >>> spread_apart([9.0, 9.0], gap=2.0, top=9.0)
    [7.0, 9.0]
    """
    moved = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    rise = (sum(moved) - sum(heights)) / len(heights)
    ceiling = top
    for place in reversed(range(len(moved))):
        moved[place] = min(moved[place] - rise, ceiling)
        ceiling = moved[place] - gap
    return moved


def _label_lines(ax, lines: Sequence) -> None:
    """Write each line's label beside its right end, in its colour and clear of the others."""
    low, high = ax.get_ylim()
    ordered = sorted(lines, key=lambda line: line.get_ydata()[-1])
    ends = [float(line.get_ydata()[-1]) for line in ordered]
    heights = spread_apart(ends, gap=(high - low) / 14, top=high)
    right = max(float(line.get_xdata()[-1]) for line in ordered)
    for line, height in zip(ordered, heights, strict=True):
        ax.annotate(
            line.get_label(),
            xy=(right, height),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
            annotation_clip=False,
        )


def _accuracy_bars(ax, title: str, accuracies: pd.Series, figsize=(6, 3.2), colours=BLUE):
    """Horizontal bars, the first at the bottom; the numbers stand in a column beside them.

    There no line crosses a number, and none is white on white.
    """
    ax = _axes(ax, title, "accuracy", "", figsize, xlim=(0, 1.02))
    places = np.arange(len(accuracies))
    ax.barh(places, accuracies, color=colours)
    ax.set_yticks(places, accuracies.index)
    ax.set_ylim(-0.6, len(accuracies) - 0.4)
    for place, accuracy in zip(places, accuracies, strict=True):
        text = "unknown" if math.isnan(accuracy) else f"{accuracy:.3f}"
        ax.text(1.02, place, text, transform=ax.get_yaxis_transform(), va="center")
    return ax


def plot_counts(counts: pd.Series, title: str, ax=None):
    """Bars of counts, each with its number."""
    ax = _axes(ax, title, "", "rows", ymargin=0.15)
    bars = ax.bar([str(name) for name in counts.index], counts, color=BLUE)
    ax.bar_label(bars, padding=2)
    _whole_numbers(ax.yaxis)
    return ax


def natural_image_tokens(width: int, height: int, pixels_per_token: int) -> int:
    """Tokens of an image that is not shrunk: its sides, in whole merged patches, multiplied.

    >>> natural_image_tokens(640, 480, pixels_per_token=32 * 32)
    300
    """
    side = math.isqrt(pixels_per_token)
    return max(1, round(width / side)) * max(1, round(height / side))


def natural_token_counts(competition: Competition, pixels_per_token: int) -> dict[str, list[int]]:
    """`natural_image_tokens` of every row's image, of the training and of the test rows."""
    counts = {}
    for name, table in {"train": competition.train, "test": competition.test}.items():
        sizes = zip(table["width"], table["height"], strict=True)
        counts[name] = [
            natural_image_tokens(width, height, pixels_per_token) for width, height in sizes
        ]
    return counts


def share_above(tokens: Mapping[str, Sequence[int]], limit: int) -> float:
    """Share of all images that take more than `limit` tokens, and are shrunk.

    >>> share_above({"train": [100, 900], "test": [100, 100]}, limit=768)
    0.25
    """
    counts = np.concatenate([*tokens.values()])
    return float((counts > limit).mean())


def plot_token_counts(tokens: Mapping[str, Sequence[int]], limit: int, ax=None):
    """Histogram of image tokens before shrinking, with the pixel budget of `limit` tokens.

    The title says how many images the budget shrinks. Images of more than four times the budget
    are in the last bar.
    """
    share = share_above(tokens, limit)
    title = f"The budget of {limit} tokens shrinks {share:.0%} of the images"
    if share == 0:
        title = f"The budget of {limit} tokens shrinks no image"
    ax = _axes(ax, title, "tokens per image before shrinking", "images")
    largest = max(map(max, tokens.values()))
    top = min(largest, 4 * limit)
    ax.hist(
        [np.minimum(counts, top) for counts in tokens.values()],
        bins=min(24, top + 1),
        range=(0, top + 1),
        label=[*tokens],
        color=LINE_COLOURS[: len(tokens)],
    )
    if limit <= 2 * top:
        ax.axvline(limit, linestyle="--", color="black", label="budget")
    if largest > top:
        ax.set_xlabel(f"tokens per image before shrinking (last bar: {top} or more)")
    ax.legend(frameon=False)
    _whole_numbers(ax.xaxis)
    _whole_numbers(ax.yaxis)
    return ax


def _plot_fold(ax, result: FoldResult, column: str, colour: str):
    """One fold's learning curve with a ring around the epoch that was kept; returns the line."""
    curve = result.history.set_index("epoch")[column]
    (line,) = ax.plot(curve, marker=".", color=colour, label=f"fold {result.name}")
    if "rows" in result.history:
        pretraining = (result.history["rows"] == "pretraining").sum()
        ax.axvline(pretraining + 0.5, linestyle=":", color=GREY, label="_pretraining")
    kept = curve.loc[[result.best_epoch]]
    ax.plot(kept, "o", markersize=11, fillstyle="none", color=colour, label="_kept")
    return line


def plot_learning_curves(results: Sequence[FoldResult], axes=None):
    """Training loss and held-out accuracy by epoch, one line per fold and seed.

    A ring marks the epoch that was kept, the dashed line is guessing. Epochs left of the dotted
    line, if there is one, were trained on rows of extra_train_dirs.
    """
    axes = _two_axes(axes)
    titles = {"loss": "Training loss", "accuracy": "Held-out accuracy"}
    for ax, (column, title) in zip(axes, titles.items(), strict=True):
        last_epoch = max(len(result.history) for result in results)
        _axes(ax, title, "epoch", column, xlim=(0.5, last_epoch + 0.5), ymargin=0.15)
        colours = itertools.cycle(LINE_COLOURS)
        lines = [_plot_fold(ax, result, column, next(colours)) for result in results]
        _whole_numbers(ax.xaxis)
        if column == "accuracy":
            ax.axhline(0.25, linestyle="--", color=GREY, label="_guessing")
            ax.set_ylim(0, 1.02)
        else:
            ax.set_ylim(bottom=0)
        _label_lines(ax, lines)
    return axes


def plot_reliability(curves: Mapping[str, pd.DataFrame], ax=None):
    """Accuracy against confidence per bin, from curves of `reliability_curve` by name.

    On the diagonal the probabilities mean what they say. The area of a point is the share of
    rows in its bin: a small point far from the diagonal may be chance.
    """
    title = "Reliability on OOF rows (area: rows in the bin)"
    limits = {"xlim": (0.2, 1.05), "ylim": (0, 1.05)}
    ax = _axes(ax, title, "confidence", "accuracy", (6, 4), **limits)
    (diagonal,) = ax.plot([0, 1], [0, 1], linestyle="--", color=GREY, label="honest")
    lines = [diagonal]
    for (name, curve), colour in zip(curves.items(), (ORANGE, BLUE), strict=False):
        filled = curve.dropna()
        points = filled["confidence"], filled["accuracy"]
        (line,) = ax.plot(*points, label=name, color=colour, linewidth=1, alpha=0.7)
        areas = 600 * filled["count"] / filled["count"].sum()
        ax.scatter(*points, s=areas, color=colour, alpha=0.6)
        lines.append(line)
    _label_lines(ax, lines)
    return ax


def plot_ladder(ladder: pd.DataFrame, ax=None):
    """Bars of the OOF accuracy of every step, the first on top; dark: behind the submission.

    The line at a bar's end is the 90 % interval of its change against the step in `against`.
    """
    rows = ladder.iloc[::-1]
    colours = np.where(rows["used"].astype(bool), BLUE, PALE_BLUE)
    size = (8, 1.2 + 0.28 * len(rows))
    title = "OOF accuracy, step by step (dark: in the submission)"
    ax = _accuracy_bars(ax, title, rows["accuracy"], size, colours)
    below = np.maximum(0, rows["gain"] - rows["gain_low"])  # NaN: not compared, no line
    above = np.maximum(0, rows["gain_high"] - rows["gain"])
    ax.errorbar(
        rows["accuracy"],
        np.arange(len(rows)),
        xerr=(below, above),
        fmt="none",
        ecolor=ORANGE,
        capsize=3,
    )
    return ax


def plot_doubt_curve(curve: pd.DataFrame, axes=None):
    """Accuracy and NLL of `doubt_curve` by cost; with the end of each step named.

    Rows drawn at random, and all of them, are scored in one pass.
    """
    axes = _two_axes(axes)
    in_doubt = curve.drop(index="all rows", errors="ignore")
    all_rows = curve.loc[curve.index == "all rows"]
    ends_of_steps = in_doubt[in_doubt.index.str.endswith("100%")]
    titles = {"accuracy": "OOF accuracy", "nll": "OOF NLL (lower is better)"}
    for ax, (column, title) in zip(axes, titles.items(), strict=True):
        _axes(ax, title, "cost, in questions with one view", "")
        if len(all_rows):
            ends = curve.iloc[[0, -1]]
            ax.plot(ends["cost"], ends[column], "--", color=GREY, label="rows drawn at random")
        ax.plot(
            in_doubt["cost"],
            in_doubt[column],
            marker=".",
            color=BLUE,
            label="rows in doubt first",
        )
        if len(all_rows):
            ax.plot(all_rows["cost"], all_rows[column], "s", color=ORANGE, label="all rows")
        # Beside the line: above one that rises, below one that falls and has nothing there.
        height = -14 if column == "nll" and all_rows.empty else 6
        for name, cost, value in ends_of_steps[["cost", column]].itertuples():
            text = name.removesuffix(", 100%")
            ax.annotate(text, (cost, value), (0, height), textcoords="offset points", ha="center")
        _show_at_least(ax, 0.2)
    ax.legend(frameon=False)
    return axes


def plot_confusion(table: pd.DataFrame, ax=None):
    """The confusion matrix as a shaded table."""
    ax = _axes(ax, "Confusion on OOF rows", "predicted", "true", figsize=(3.8, 3.4))
    counts = table.to_numpy()
    darkest = max(1, counts.max())
    ax.imshow(counts, cmap="Blues", vmin=0, vmax=darkest)
    ax.set(xticks=range(4), xticklabels=table.columns, yticks=range(4), yticklabels=table.index)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if count > 0.6 * darkest else "black"
        ax.text(column, row, count, ha="center", va="center", color=colour)
    return ax


def plot_accuracy_by_type(table: pd.DataFrame, ax=None):
    """Bars of accuracy per question type with the number of rows; the dashed line is guessing."""
    names = [f"{name} ({rows})" for name, rows in table["rows"].items()]
    title = "OOF accuracy by question type (rows)"
    ax = _accuracy_bars(ax, title, table["accuracy"].set_axis(names))
    ax.set_xlabel("accuracy (dashed: guessing)")
    ax.axvline(0.25, linestyle="--", color="black", label="_guessing")
    return ax


def _describe_bars(bars, axis) -> str:
    """The names at the axis with the numbers of their bars; "" for a histogram."""
    names = [label.get_text().replace("\n", " ") for label in axis.get_ticklabels()]
    if not hasattr(bars, "datavalues") or len(names) != len(bars.datavalues):
        return ""
    parts = []
    for name, value in zip(names, bars.datavalues, strict=True):
        parts.append(f"{name} unknown" if math.isnan(value) else f"{name} {value:.3g}")
    return ", ".join(parts)


def _describe_axes(ax) -> str:
    """Title, axes and contents in words: the bars with their numbers, or the lines' names."""
    text = ax.get_title()
    for bars in ax.containers[:1]:
        is_horizontal = getattr(bars, "orientation", "") == "horizontal"
        contents = _describe_bars(bars, ax.yaxis if is_horizontal else ax.xaxis)
        if contents:
            return f"{text}: {contents}"
    if ax.get_xlabel() and ax.get_ylabel():
        text += f", {ax.get_ylabel()} by {ax.get_xlabel()}"
    labels = ax.get_legend_handles_labels()[1]
    return f"{text}: {', '.join(labels)}" if labels else text


def describe_figure(figure) -> str:
    """Alternative text for a figure: what each of its axes shows."""
    return ". ".join(_describe_axes(ax) for ax in figure.axes)


@dataclass(frozen=True)
class FigureImage:
    """A figure as a notebook shows it where it is the last value of a cell."""

    png: bytes
    description: str  # the alternative text

    def _repr_html_(self) -> str:
        return _image_tag(self.png, "png", self.description)


def _image_tag(content: bytes, kind: str, description: str) -> str:
    """An <img> tag with the image inside it, so that the notebook needs no files beside it."""
    alt = html.escape(description, quote=True)
    data = base64.b64encode(content).decode()
    return f'<img alt="{alt}" src="data:image/{kind};base64,{data}">'


def figure_image(ax) -> FigureImage:
    """The figure of `ax` (or of an array of axes) as an image with alternative text."""
    figure = np.ravel(ax)[0].figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return FigureImage(buffer.getvalue(), describe_figure(figure))


def save_figure(ax, run: Run, name: str) -> FigureImage:
    """Save the figure of `ax` as figures/`name`.png in the run directory; returns its image."""
    image = figure_image(ax)
    atomic_write(run.directory / "figures" / f"{name}.png", image.png)
    return image


# === Tables for people ============================================================================
def thumbnail_html(path: str, description: str, side: int = 120) -> str:
    """An <img> tag with the image inside it, at most `side` pixels wide and high."""
    image = load_image(path)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return _image_tag(buffer.getvalue(), "jpeg", description)


def _question_text(row: Mapping, note: str) -> str:
    """Id, type, question and choices of a row as HTML, the answer in bold; all text is escaped."""
    choices = {choice: f"{choice}. {html.escape(row[choice])}" for choice in CHOICES}
    if row.get("answer") in choices:
        choices[row["answer"]] = f"<b>{choices[row['answer']]}</b>"
    lines = [
        f"<code>{html.escape(row['id'])}</code> {row['type']}",
        html.escape(row["question"]),
        " &nbsp; ".join(choices.values()),
    ]
    if note:
        lines.append(f"<i>{html.escape(note)}</i>")
    return "<br>".join(lines)


def question_cards(frame: pd.DataFrame, notes: Sequence[str] | None = None) -> str:
    """An HTML table of questions with thumbnail, choices and answer in bold.

    `notes`: one for each row. All text from the data is escaped.
    """
    cards = []
    for place, (_, row) in enumerate(frame.iterrows()):
        image = thumbnail_html(row["image_path"], row["id"])
        text = _question_text(row, notes[place] if notes is not None else "")
        cards.append(f'<tr><td>{image}</td><td style="text-align:left">{text}</td></tr>')
    return f"<table>{''.join(cards)}</table>"


def table_html(frame: pd.DataFrame) -> str:
    """The whole table as HTML: no row is left out, and no text cut; three decimals.

    Its cells begin at the left, as texts are read; notebooks push those of a table to the right.
    """
    with pd.option_context("display.max_colwidth", None):
        table = frame.to_html(float_format="{:.3f}".format, na_rep="", justify="left")
    return table.replace("<td>", '<td style="text-align:left">')


def fold_out(title: str, content: str) -> str:
    """HTML that shows its title, and its content after a click.

    >>> fold_out("Settings", "<table></table>")
    '<details><summary>Settings</summary><table></table></details>'
    """
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def describe_fallbacks(fallbacks: Mapping[str, int]) -> str:
    """The fallbacks that were taken, a line each.

    >>> describe_fallbacks({"train_blank_answer": 2, "test_unusable_image": 0})
    'fallback taken: train blank answer, 2 times'
    >>> describe_fallbacks({"test_unusable_image": 0})
    'no fallback: every row and image is used as it is'
    """
    lines = []
    for name, count in fallbacks.items():
        if count:
            lines.append(f"fallback taken: {name.replace('_', ' ')}, {_count(count, 'time')}")
    return "\n".join(lines) or "no fallback: every row and image is used as it is"


def ladder_for_people(ladder: pd.DataFrame) -> pd.DataFrame:
    """The six columns of a ladder that one reads, as text; the others are in its CSV file.

    The gain in accuracy is in points, with its 90 % interval. Beside the "yes" of what the
    submission is made of stands its alarm, where training has not helped.
    """
    used = pd.Series(np.where(ladder["used"].astype(bool), "yes", ""), index=ladder.index)
    if "alarm" in ladder:
        is_marked = ladder["alarm"] != ""
        used = used.where(~is_marked, "yes, but " + ladder["alarm"])
    gains = []
    for change, low, high in zip(
        ladder["gain"], ladder["gain_low"], ladder["gain_high"], strict=True
    ):
        gains.append("" if math.isnan(change) else points_with_interval(change, low, high))
    return pd.DataFrame(
        {
            "accuracy": ladder["accuracy"].map("{:.3f}".format),
            "gain in points (90 %)": gains,
            "NLL change": ladder["nll_change"].map("{:+.3f}".format),
            "seconds": ladder["seconds"].map("{:,.1f}".format),
            "against": ladder["against"],
            "used": used.to_numpy(),
        },
        index=[*ladder.index],
    ).replace({"nan": "", "+nan": ""})


def markdown_table(frame: pd.DataFrame) -> str:
    """A GitHub table with the index as first column and three decimals.

    >>> print(markdown_table(pd.DataFrame({"accuracy": [0.5]}, index=["one view"])))
    |  | accuracy |
    |---|---|
    | one view | 0.500 |
    """
    columns = [frame.index.name or "", *frame.columns]
    lines = ["| " + " | ".join(map(str, columns)) + " |", "|" + "---|" * len(columns)]
    for row in frame.itertuples():
        cells = []
        for value in row:
            is_decimal = isinstance(value, float)
            cells.append(f"{value:.3f}" if is_decimal else str(value).replace("|", "\\|"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# === Experiments ==================================================================================
SCORE_COLUMNS = [*SCORES, "seconds"]  # the numbers of experiments.csv


def wrap_up_table(run: Run) -> pd.DataFrame:
    """Wall time in seconds and peak memory in GiB of each worker stage, as the workers log them."""
    records = read_json_lines(run.directory / "stages.jsonl", STAGE_RECORD)
    frame = pd.DataFrame(records, columns=None if records else ["label"]).set_index("label")
    return frame.filter(["seconds", "rss_gib", "gpu_peak_gib"])


def _changed_settings(config: Config) -> dict:
    """The settings that differ from their default and can change a result."""
    defaults = dataclasses.asdict(Config())
    changed = {}
    for name, value in dataclasses.asdict(config).items():
        if value != defaults[name] and name not in BOOKKEEPING_FIELDS:
            changed[name] = value
    return changed


def _earlier_experiments(path: Path) -> pd.DataFrame:
    """The rows of an experiments.csv; none where there is no such file, or a damaged one.

    A damaged one is kept beside it: nobody else knows the runs that were only there.
    """
    if not path.exists():
        return pd.DataFrame()
    try:
        return read_table(path, needed=("run", "finished"))
    except DamagedFileError as error:
        aside = path.with_suffix(".damaged.csv")
        os.replace(path, aside)
        LOGGER.warning("Begun anew, and the old file kept as %s: %s", aside.name, error.problem)
        return pd.DataFrame()


def log_experiment(run: Run, evaluation: Evaluation) -> None:
    """Put the run's row into experiments.csv beside it, in place of an earlier one.

    A copy in the run directory travels with it, so that a new session knows the runs of the old
    ones.
    """
    stages = read_json_lines(run.directory / "stages.jsonl", STAGE_RECORD)
    row = {
        "run": run.directory.name,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "model": run.config.model_id,
        "folds": len(run.finished_folds),
        "rows": len(run.train),
        **score_row(evaluation.probabilities, evaluation.oof.labels),
        "seconds": round(sum(stage["seconds"] for stage in stages), 1),
        "settings": json.dumps(_changed_settings(run.config), ensure_ascii=False),
    }
    places = [
        run.directory.parent / "experiments.csv",
        run.directory / "tables" / "experiments.csv",
    ]
    known = [_earlier_experiments(path) for path in places]
    rows = pd.concat([*known, pd.DataFrame([row])])
    rows = rows.sort_values("finished", kind="stable").drop_duplicates("run", keep="last")
    for path in places:
        write_table(rows, path)


def _logged_settings(text: str, name: str, path: Path) -> dict | None:
    """The settings in a cell of experiments.csv for the run `name`; None where it has none.

    A cell that cannot be read counts as none, with a warning: the run's scores are still there.
    """
    if not text:
        return None
    with contextlib.suppress(json.JSONDecodeError):
        settings = json.loads(text)
        if isinstance(settings, dict):
            return settings
    LOGGER.warning("%s: the settings of %s cannot be read: %r", path, name, text[:80])
    return None


def experiment_table(output_dir: str | Path) -> pd.DataFrame:
    """Every finished run of experiments.csv, the oldest first.

    Scores, the workers' seconds, and in `changed` the settings in which a run differs from the
    one before it; `note` says which scores are not to be compared.
    """
    path = Path(output_dir) / "experiments.csv"
    table = read_table(path, needed=("run", "finished")).set_index("run")
    columns = ["finished", "model", "folds", "rows", *SCORE_COLUMNS, "settings"]
    table = table.reindex(columns=columns, fill_value="")
    before = {}
    for name, text in table.pop("settings").items():
        settings = before  # of an older version, which logged none
        logged = _logged_settings(text, name, path)
        if logged is not None:
            settings = dataclasses.asdict(Config()) | logged
        changed = []
        for key, value in settings.items():
            if value != before.get(key, value):
                changed.append(f"{key}={value}")
        is_distilled = bool(settings.get("distill_from"))
        table.loc[name, "changed"] = ", ".join(changed)
        table.loc[name, "note"] = "distilled: scores are too good" if is_distilled else ""
        before = settings
    table[SCORE_COLUMNS] = table[SCORE_COLUMNS].apply(pd.to_numeric, errors="coerce")
    return table


def plot_experiments(table: pd.DataFrame):
    """Bars of OOF accuracy and of minutes for the runs in `experiment_table`.

    Grey: not to be compared.
    """
    size = (10, 1.2 + 0.6 * len(table))
    figure = matplotlib_figure.Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=[2, 1])
    names = []
    for name, changed, note in table[["changed", "note"]].itertuples():
        names.append(f"{name}\n{(note or changed)[:50]}".strip())
    colours = [GREY if note else BLUE for note in table["note"]]
    accuracies = table["accuracy"].set_axis(names)
    _accuracy_bars(axes[0], "OOF accuracy of finished runs", accuracies, colours=colours)
    _axes(axes[1], "Time of the workers", "minutes", "", yticks=[], xmargin=0.2)
    bars = axes[1].barh(names, table["seconds"] / 60, color=colours)
    axes[1].bar_label(bars, fmt="%.1f", padding=3)
    return axes


# === Report =======================================================================================
def _report_notation(run: Run) -> list[str]:
    """A paragraph on how submissions write answers; none where that is the usual a-d."""
    notation = run.notation or AnswerNotation()
    columns = [*run.sample.columns]
    doubts = [name for name, count in run.fallbacks.items() if "sample_answers" in name and count]
    if notation == AnswerNotation() and columns == ["id", "answer"] and not doubts:
        return []
    return [
        f"Submissions write answers as {notation}: {notation.reason}. "
        f"Their columns are {', '.join(columns)}, as in the sample."
    ]


def _report_context(run: Run) -> list[str]:
    """A paragraph on the words beside the images; none for a run that does not use them."""
    limit = run.config.context_tokens
    if not limit:
        return []
    try:
        content = read_json(run.directory / "prompt.json", ["cut_contexts"])
        cut = f"that of {content['cut_contexts']} rows is longer and was cut"
    except (DamagedFileError, FileNotFoundError) as error:  # no reason to go without a report
        cut = f"how many are longer is not known: {error_in_words(error)}"
    rows = pd.concat([run.train, run.test])
    filled = int((~rows[CONTEXT_COLUMN].map(shows_nothing)).sum())
    return [
        f"{filled} of {len(rows)} rows have context in front of their question, at most {limit} "
        f"tokens of it; {cut}."
    ]


def _report_seeds(run: Run) -> list[str]:
    """A paragraph on the models of further seeds; none where there are none."""
    config = run.config
    if not config.has_further_seeds:
        return []
    counts = []
    for fold in run.finished_folds:
        members = run.members_behind(fold, len(config.all_seeds))
        counts.append(f"fold {fold} has {len(members)}")
    if run.selected_seeds > 1:
        use = "A fold's scores are the mean over those that it has"
    else:
        use = "Only the first seed scores, because the mean over all loses on held-out rows"
    return [
        f"Each fold is trained with the seeds {', '.join(map(str, config.all_seeds))}. Of these "
        f"{len(config.all_seeds)} models {', '.join(counts)}. {use}."
    ]


def _report_introduction(run: Run, evaluation: Evaluation) -> list[str]:
    """The paragraphs that say what the run is and how to read its figures."""
    config = run.config
    weights = ", ".join(run.selected_weights)
    paragraphs = [
        f"Model `{config.model_id}`, {len(run.train)} training rows, {len(run.test)} test rows, "
        f"folds {run.finished_folds} of {config.n_folds}, {weights} weights.",
        *_report_seeds(run),
        "Temperature, weights and stacking are scored on rows they were not fitted on. "
        "The gain of averaging folds cannot be seen on OOF rows, because each row is scored by "
        "its own fold only, which did not train on it.",
        f"Views are combined by: {evaluation.method}. `used` marks the steps behind the "
        "submission, and what loses is left out. `_low` and `_high` are the ends of 90 % "
        "intervals of the change against the step in `against`.",
    ]
    if run.final_fold in run.submission_models:
        paragraphs.append(
            "One more model was trained on all rows and is a member of the mean, with the folds' "
            "pooled temperature. No row is out of fold for it: whether it helps cannot be seen "
            "here."
        )
    if config.use_base_member != "off" and evaluation.base is None:  # else the verdict says it
        paragraphs.append(describe_base_member(run, evaluation))
    if config.alignment_model:
        paragraphs.append(describe_alignment(run, evaluation))
    paragraphs += _report_notation(run)
    known = known_answers(run.train, run.test)
    in_use = config.use_known_answers
    paragraphs.append(describe_known_answers(known, len(run.test), in_use))
    if config.extra_train_dirs:
        folders = ", ".join(
            f"`extra_{number}` is `{name}`"
            for number, name in enumerate(config.extra_train_dirs, start=1)
        )
        use = "Rows of related competitions were trained on, too"
        if config.pretrain_epochs:
            use = (
                "Each model was trained on rows of related competitions first "
                f"(epochs: {config.pretrain_epochs}), and then on its own rows alone"
            )
        paragraphs.append(
            f"{use}: {folders}. They validate nothing, "
            "and rows that show a copy of a test image or of a fold's validation image were left "
            "out, as counted below."
        )
    paragraphs += _report_context(run)
    if config.distill_from:
        paragraphs.append(f"**Do not compare runs by these figures**: {DISTILLED_WARNING}.")
    return paragraphs


def final_pick_table(run: Run) -> pd.DataFrame:
    """The two files to choose at the end, and the others, each with its reason; as texts.

    That is what `write_submissions` has written; without a row before that.
    """
    path = run.directory / "tables" / "final_pick.csv"
    if not path.exists():
        return pd.DataFrame(columns=["pick", "file"])
    return read_table(path, needed=("pick", "file", "reason"), number_columns={})


def _report_tables(run: Run, evaluation: Evaluation) -> dict[str, pd.DataFrame]:
    """The tables of the report by title; those of ladder, folds and views are written as CSV."""
    oof = evaluation.oof
    curve = doubt_curve(run)
    save_table(evaluation.ladder, run, "ladder")
    save_table(evaluation.fold_table, run, "folds")
    save_table(evaluation.view_table, run, "views")
    save_table(curve, run, "doubt_curve")
    by_type = reliability_by_type(oof.frame["type"], evaluation.probabilities, oof.labels)
    fallbacks = pd.DataFrame({"rows": run.fallbacks}).rename_axis("fallback")
    tables = {
        "Steps on out-of-fold rows": evaluation.ladder,
        "Folds": evaluation.fold_table,
        "Views": evaluation.view_table,
        "Views for rows in doubt only: what each step buys, by its cost": curve,
        "Question types": by_type,
        "Rows trained on, by fold and file": source_table(run),
        "Fallbacks taken while reading the data": fallbacks,
        "Time and memory": wrap_up_table(run),
    }
    final_pick = final_pick_table(run)
    if not final_pick.empty:
        tables["Final pick: two files to choose at the end"] = final_pick.set_index("file")
    if events := unplanned_events(run):
        unplanned = pd.DataFrame(events).drop_duplicates("event").set_index("event")
        tables["What did not go to plan"] = unplanned
    return tables


def write_report(run: Run, evaluation: Evaluation, verdict: Verdict | None = None) -> Path:
    """Write report.md from the run's files and append the run to experiments.csv.

    `verdict`: what stands on top, where it knows more than the run's files. Returns the
    report's path.
    """
    verdict = verdict or make_verdict(run, evaluation)
    parts = [f"# {run.directory.name}", verdict_markdown(verdict)]
    parts += _report_introduction(run, evaluation)
    for title, table in _report_tables(run, evaluation).items():
        parts.append(f"## {title}\n\n{markdown_table(table)}")
    for path in sorted((run.directory / "figures").glob("*.png")):
        parts.append(f"![{path.stem}](figures/{path.name})")
    report = run.directory / "report.md"
    atomic_write(report, "\n\n".join(parts) + "\n")
    log_experiment(run, evaluation)
    back_up(run)
    return report


# ======= 7. Submission and several runs ===========================================================


# === Submission ===================================================================================
def _refuse_rows(frame: pd.DataFrame, is_bad: pd.Series, path: Path, problem: str) -> None:
    """Raise SubmissionError that names the first of the bad rows, if there is one."""
    if not is_bad.any():
        return
    row, name, answer = next(frame[is_bad].itertuples())
    raise SubmissionError(f"{path}, row {row + 1} (id {name!r}, answer {answer!r}): {problem}")


def _check_ids(frame: pd.DataFrame, sample: pd.DataFrame, path: Path) -> None:
    """Raise SubmissionError unless the rows are the sample's, in its order.

    Both frames hold ids in their first column and answers in their second.
    """
    ids = sample.iloc[:, 0].map(str)
    names = frame.iloc[:, 0]
    unknown = "this id is not in the sample; remove the row"
    _refuse_rows(frame, ~names.isin(ids), path, unknown)
    repeated = "this id occurs twice; keep one row per id"
    _refuse_rows(frame, names.duplicated(), path, repeated)
    if len(names) != len(ids):
        missing = sorted(set(ids) - set(names))
        raise SubmissionError(
            f"{path}: {len(names)} rows but the sample has {len(ids)}; add ids {missing[:3]}"
        )
    moved = "the sample has another id in this row; keep the sample's order"
    _refuse_rows(frame, names != ids.tolist(), path, moved)


def _choices_of_sample(
    sample: pd.DataFrame, test: pd.DataFrame | None, notation: AnswerNotation
) -> pd.DataFrame | None:
    """The texts a, b, c, d of the sample's rows, in its order; None where nobody needs them."""
    if notation.marks:
        return None
    if test is None:
        raise SubmissionError(
            "this competition's answers are the texts of the choices: give test, its test rows, too"
        )
    ids = sample.iloc[:, 0].map(str)
    by_id = _choices_by_id(test)
    missing = sorted(set(ids) - set(by_id.index))
    if missing:
        raise SubmissionError(
            f"the test rows lack {missing[:3]} of the sample: take both from one download"
        )
    return by_id.loc[ids].reset_index(drop=True)


def _notation_to_use(
    notation: AnswerNotation | None, sample: pd.DataFrame, test: pd.DataFrame | None
) -> AnswerNotation:
    """The notation; without one that of the sample where it is filled, else letters a-d."""
    if notation is not None:
        return notation
    if test is None:
        test = pd.DataFrame({"id": sample.iloc[:, 0].map(str), **dict.fromkeys(CHOICES, "")})
    doubts = Counter()
    decided = decide_notation(AnswerNotation(), sample, test, doubts)
    if doubts:
        text = "Answers are written as %s, because no notation is given and the sample says: %s"
        LOGGER.warning(text, decided, decided.reason)
    return decided


def _read_verbatim(path) -> pd.DataFrame:
    """The file's cells as text, the header as row 0. Raises SubmissionError for no CSV.

    No id is parsed as a number and no "NA" as missing; no blank line or repeated column
    is hidden.
    """
    try:
        return pd.read_csv(
            path,
            dtype=str,
            keep_default_na=False,
            header=None,
            skip_blank_lines=False,
        )
    except ValueError as error:  # pandas' parser errors and wrong encodings
        raise SubmissionError(
            f"{path}: not a readable CSV ({error}); write it with make_submission"
        ) from error


def validate_submission(
    path,
    sample,
    notation: AnswerNotation | None = None,
    test: pd.DataFrame | None = None,
) -> dict:
    """Check the file at `path` against the sample and the competition's notation.

    `notation` is that of `load_competition`; without one the sample's where it is filled, else
    letters a-d. `test`: the test rows, needed where answers are the choices' texts. Returns
    `rows`, `letters` with the count of each choice, and `notation` in words. Raises
    SubmissionError, which names the first row that is wrong.
    """
    is_given = notation is not None
    notation = _notation_to_use(notation, sample, test)
    raw = _read_verbatim(path)
    found = raw.iloc[0].tolist()
    columns = list(sample.columns)
    if found != columns:
        raise SubmissionError(
            f"{path}: columns are {found}; name them {columns}, as the sample does"
        )
    frame = raw.iloc[1:].reset_index(drop=True)
    _check_ids(frame, sample, path)
    labels = notation.read(frame[1], _choices_of_sample(sample, test, notation))
    problem = notation.needs if is_given else f"{notation.needs}, or give the right notation"
    _refuse_rows(frame, pd.Series(labels < 0), path, problem)
    return {
        "rows": len(frame),
        "letters": {letter: int((labels == label).sum()) for label, letter in enumerate(CHOICES)},
        "notation": str(notation),
    }


def make_submission(
    sample,
    letters,
    path,
    notation: AnswerNotation | None = None,
    test: pd.DataFrame | None = None,
) -> dict:
    """Write `letters` (id -> a, b, c or d) like the sample, and read the file back.

    In the file they stand in the competition's `notation`, see `validate_submission`, whose
    counts are returned. Raises SubmissionError for letters that do not fit; an earlier file at
    `path` then survives.
    """
    notation = _notation_to_use(notation, sample, test)
    ids = sample.iloc[:, 0].map(str)
    letters = pd.Series(letters, dtype=object).rename(str)  # its ids as text
    missing = sorted(set(ids) - set(letters.index))
    unknown = sorted(set(letters.index) - set(ids))
    if missing or unknown or len(letters) != len(ids):
        raise SubmissionError(
            f"{path}: {len(letters)} answers for {len(ids)} ids, "
            f"without an answer {missing[:3]}, not in the sample {unknown[:3]}; "
            "answer each id of the sample once"
        )
    rows = zip(ids, letters[ids], strict=True)
    frame = pd.DataFrame(rows, columns=sample.columns, dtype=object)
    _check_ids(frame, sample, path)
    plain = AnswerNotation()
    labels = plain.read(frame.iloc[:, 1], None)
    _refuse_rows(frame, pd.Series(labels < 0), path, plain.needs)
    choices = _choices_of_sample(sample, test, notation)
    answers = notation.write(labels, choices)
    is_blank = pd.Series([shows_nothing(answer) for answer in answers])
    _refuse_rows(frame, is_blank, path, "this choice is blank; answer one that is filled")
    frame.isetitem(1, answers)
    atomic_write(path, csv_text(frame))
    return validate_submission(path, sample, notation, test)


def _choices_of_ids(ids: pd.Series, test: pd.DataFrame | None, path: Path) -> pd.DataFrame:
    """The texts a, b, c, d of these test rows; stand-ins that nobody writes without `test`.

    Raises SubmissionError for ids that are not the test rows'.
    """
    if test is None:
        stand_ins = {choice: f"the text of choice {choice}" for choice in CHOICES}
        return pd.DataFrame(stand_ins, index=range(len(ids)))
    by_id = _choices_by_id(test)
    strange = sorted(set(ids) - set(by_id.index))
    missing = sorted(set(by_id.index) - set(ids))
    if strange or missing:
        raise SubmissionError(
            f"{path}: {_count(len(missing), 'test row')} without an answer {missing[:3]}, "
            f"{_count(len(strange), 'id')} of no test row {strange[:3]}; "
            "give a whole submission of this competition"
        )
    return by_id.loc[ids].reset_index(drop=True)


def read_submission(
    path: str | Path,
    test: pd.DataFrame | None = None,
    notation: AnswerNotation | None = None,
) -> pd.Series:
    """The answers of a submission file as letters a-d by id, however the file writes them.

    `notation`: how it is expected to; where a row is written otherwise, and without a notation,
    the kind of answer is decided for the whole file (A-D, 1-4, the choices' texts, ...).
    `test`: the test rows, in any order, needed for texts. Raises SubmissionError for other ids
    than theirs and for ids that occur twice, DataError where answers are of no kind or of
    several.
    """
    path = Path(path)
    raw = _read_verbatim(path)
    if raw.shape[1] != 2:
        columns = raw.iloc[0].tolist()
        raise SubmissionError(f"{path}: columns are {columns}; give a file of id and answer")
    frame = raw.iloc[1:].reset_index(drop=True)
    if frame.empty:
        raise SubmissionError(f"{path}: no row below the header; give a filled submission")
    ids = frame[0]
    _refuse_rows(frame, ids.duplicated(), path, "this id occurs twice; keep one row per id")
    choices = _choices_of_ids(ids, test, path)
    labels = np.full(len(frame), -1)
    if notation is not None and (notation.marks or test is not None):
        labels = notation.read(frame[1], choices)
    if (labels < 0).any():
        lines = frame.index + 2  # behind the header, counted from 1
        rows = choices.assign(answer=frame[1], line=lines, column=raw.iloc[0, 1])
        labels, _ = _read_answers(rows, str(path), Counter())
    return pd.Series(np.array(CHOICES)[labels], index=pd.Index(ids, name="id"), name="answer")


# === Submissions of a run =========================================================================
def copy_to_kaggle_working(path: Path, config: Config) -> None:
    """On Kaggle, copy a finished submission into the working folder.

    From there it can be submitted.
    """
    if detect_runtime(config.precision).platform == "kaggle":
        atomic_write("submission.csv", path.read_bytes())


def _write_answers(answers: np.ndarray, run: Run, path: Path) -> pd.DataFrame:
    """Write (n,) answers, 0-3, as a checked submission, and return it as read.

    With `use_known_answers` those of equal training rows come first. The frame's `attrs` are
    what `validate_submission` returns, `why` that notation, and `known_answers` in words.
    """
    notation = _notation_to_use(run.notation, run.sample, run.test)
    known = known_answers(run.train, run.test)
    in_use = run.config.use_known_answers
    if in_use:
        own_answers = answers
        answers = with_known_answers(own_answers, run.test["id"], known)
        changed = int((answers != own_answers).sum())
        rows = _count(changed, "row")
        LOGGER.info("Decision: %s: known answers change %s", path.name, rows)
    letters = np.array(CHOICES)[answers]
    by_id = dict(zip(run.test["id"], letters, strict=True))
    checked = make_submission(run.sample, by_id, path, notation, run.test)
    LOGGER.info("%s: answers are %s, %s", path.name, notation, notation.reason)
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    about_known = describe_known_answers(known, len(run.test), in_use)
    LOGGER.info("%s: %s", path.name, about_known)
    frame.attrs = {**checked, "why": notation.reason, "known_answers": about_known}
    return frame


@dataclass(frozen=True)
class SubmissionCandidate:
    """A submission file that may be chosen at the end of a competition."""

    file: str  # folder and name
    answers: np.ndarray  # (n,) letters of the test rows
    rows: int  # out-of-fold rows behind the accuracy
    accuracy: float  # on these rows, of the run that wrote it
    low: float  # ends of the 90 % interval of the accuracy
    high: float


def _reason_for_pick(
    candidate: SubmissionCandidate, first: SubmissionCandidate, differs: int
) -> str:
    """Why a candidate that is neither of the two picks is none."""
    if differs == 0:
        return "has the first one's answers"
    if candidate.accuracy < first.low:
        return f"its OOF accuracy is below the first one's interval, from {first.low:.3f} on"
    return "differs less from the first than the second does"


def pick_two(candidates: Sequence[SubmissionCandidate]) -> pd.DataFrame:
    """The two files to choose at the end of a competition, then the others, each with its reason.

    `first`: the best by out-of-fold (OOF) accuracy, of equal ones that which comes first.
    `second`: of those whose accuracy lies within the first one's interval, so that they may
    well be as good, the one that differs in the most test rows: it is right where the first is
    not more often than a near copy of it would be. Columns: pick, file, rows (OOF), accuracy,
    low, high, differs (test rows, from the first), reason.

    >>> x = SubmissionCandidate("x.csv", np.array([*"abcd"]), 90, 0.80, 0.75, 0.85)
    >>> y = dataclasses.replace(x, file="y.csv", answers=np.array([*"abca"]), accuracy=0.79)
    >>> z = dataclasses.replace(x, file="z.csv", answers=np.array([*"bbaa"]), accuracy=0.70)
    >>> pick_two([x, y, z])[["pick", "file", "differs"]].to_numpy().tolist()
    [['first', 'x.csv', 0], ['second', 'y.csv', 1], ['', 'z.csv', 3]]
    """
    first = max(candidates, key=lambda candidate: candidate.accuracy)
    differs = {}
    eligible = []
    for candidate in candidates:
        differs[candidate.file] = int((candidate.answers != first.answers).sum())
        if differs[candidate.file] and candidate.accuracy >= first.low:
            eligible.append(candidate)
    second = max(eligible, key=lambda candidate: differs[candidate.file], default=None)

    rows = []
    for candidate in candidates:
        differing = differs[candidate.file]
        if candidate is first:
            pick = "first"
            reason = f"the best OOF accuracy, {first.accuracy:.3f}"
        elif candidate is second:
            pick = "second"
            reason = (
                f"differs from the first in {differing} of {len(first.answers)} rows, the most of "
                f"those with an OOF accuracy within its interval, {first.low:.3f} to "
                f"{first.high:.3f}"
            )
        else:
            pick = ""
            reason = _reason_for_pick(candidate, first, differing)
        facts = dataclasses.asdict(candidate)
        del facts["answers"]
        rows.append({"pick": pick, **facts, "differs": differing, "reason": reason})
    table = pd.DataFrame(rows).round({"accuracy": 4, "low": 4, "high": 4})
    order = table["pick"].map(["first", "second", ""].index)
    return table.iloc[order.argsort(kind="stable")].reset_index(drop=True)


def describe_pick(table: pd.DataFrame) -> list[str]:
    """The two picks of `pick_two` as sentences, and what to do where there is only one."""
    lines = []
    for _, row in table[table["pick"] != ""].iterrows():
        lines.append(f"Final pick, {row['pick']}: {row['file']} ({row['reason']}).")
    if len(lines) == 1:
        lines.append("Final pick, second: none; no other file differs and may be as good.")
    return lines


def _candidate_of_another_run(run: Run, folder: Path) -> SubmissionCandidate | str:
    """The ensemble of the finished run in `folder`, or else why it cannot be chosen.

    Its accuracy is what its own final_pick.csv says.
    """
    other = Run.open(folder)
    for name in ("train", "test"):
        columns = ["id", "question", *CHOICES]
        if _differing_ids(getattr(run, name)[columns], getattr(other, name)[columns]):
            return f"its {name} rows are others"
    if other.config.distill_from:
        return DISTILLED_WARNING
    table = final_pick_table(other)
    file = f"{folder.name}/submission_ensemble.csv"
    rows = table[table["file"] == file]
    if rows.empty:
        return "its folder has another name than when it wrote its submission"
    facts = rows.iloc[0]
    answers = read_submission(folder / "submission_ensemble.csv", run.test, other.notation)
    return SubmissionCandidate(
        file=file,
        answers=answers.loc[run.test["id"]].to_numpy(),
        rows=int(facts["rows"]),
        accuracy=float(facts["accuracy"]),
        low=float(facts["low"]),
        high=float(facts["high"]),
    )


def _candidates_of_other_runs(run: Run) -> list[SubmissionCandidate]:
    """The ensembles of the finished runs beside this one; one that cannot be chosen is logged."""
    if run.config.distill_from:
        LOGGER.warning("Final pick: compared with no other run, because %s", DISTILLED_WARNING)
        return []
    candidates = []
    for table in sorted(run.directory.parent.glob("*/tables/final_pick.csv")):
        folder = table.parents[1]
        if folder == run.directory:
            continue
        try:
            candidate = _candidate_of_another_run(run, folder)
        except (CheckpointError, SubmissionError, DataError, OSError) as error:
            candidate = error_in_words(error)
        if isinstance(candidate, str):
            LOGGER.warning("Final pick: %s is left out: %s", folder, candidate)
        else:
            candidates.append(candidate)
    return candidates


def propose_final_pick(run: Run, evaluation: Evaluation) -> pd.DataFrame:
    """`pick_two` of the run's two written files and the ensembles of the runs beside it.

    Each OOF row is answered by one model, so that the ensemble's accuracy and that of the single
    fold are estimated by the same figure, that of all OOF rows: the best fold's own would be the
    luckiest of several. The ensemble comes first. The table is also tables/final_pick.csv.
    """
    correct = evaluation.probabilities.argmax(axis=1) == evaluation.oof.labels
    low, high = accuracy_interval(correct, evaluation.oof.groups)
    candidates = []
    for name in ("ensemble", "single"):
        file = f"submission_{name}.csv"
        answers = read_submission(run.directory / file, run.test, run.notation)
        candidate = SubmissionCandidate(
            file=f"{run.directory.name}/{file}",
            answers=answers.loc[run.test["id"]].to_numpy(),
            rows=len(correct),
            accuracy=float(correct.mean()),
            low=low,
            high=high,
        )
        candidates.append(candidate)
    table = pick_two([*candidates, *_candidates_of_other_runs(run)])
    for line in describe_pick(table):
        LOGGER.info("Decision: %s", line)
    return save_table(table, run, "final_pick")


def write_submissions(run: Run, evaluation: Evaluation) -> dict[str, pd.DataFrame]:
    """Write and check the run's two submissions, and return them by name.

    They are written in the competition's notation; each frame's `attrs` have it as `notation`,
    with `why`, `rows`, the count of each choice as `letters`, and a word on `known_answers`.

    `single`, the best fold by OOF, is submission_single.csv; `ensemble`, of all models,
    is submission_ensemble.csv, which on Kaggle is also copied to the working folder. Which two
    files to choose at a competition's end, of these and of the runs beside this one, is logged
    and kept as tables/final_pick.csv: see `propose_final_pick`.
    """
    probabilities = predict_test(run, evaluation)
    members = np.stack(list(probabilities.values()))
    answers = {
        "single": probabilities[best_fold(evaluation)].argmax(1),
        "ensemble": combine_models(run, members),
    }
    frames = {}
    for name, predicted in answers.items():
        path = run.directory / f"submission_{name}.csv"
        frames[name] = _write_answers(predicted, run, path)
    copy_to_kaggle_working(run.directory / "submission_ensemble.csv", run.config)
    propose_final_pick(run, evaluation)
    return frames


# === Ensembles of runs ============================================================================
@dataclass(frozen=True)
class RunPredictions:
    """What one finished run brings into an ensemble of runs."""

    oof: pd.DataFrame  # (n, 4) probabilities of the rows that it scored out of fold, by id
    test: pd.DataFrame  # (n, 4) probabilities of the test rows, in the first run's order, by id
    seconds: float  # time of its workers in all stages
    has_skill: bool  # whether it is above guessing, as in `Skill`
    base_oof: pd.DataFrame | None  # as `oof`, by its base model; None where that scored no rows
    base_test: pd.DataFrame | None  # as `test`


def _require_same_rows(first: Run, other: Run) -> None:
    """Raise ValueError that names the run and the rows that differ."""
    columns_by_table = {
        "test": ["id", "question", *CHOICES],
        "train": ["id", "question", *CHOICES, "label"],
    }
    for name, columns in columns_by_table.items():
        rows = getattr(first, name)[columns]
        other_rows = getattr(other, name)[columns]
        ids = _differing_ids(rows, other_rows)
        if ids:
            raise ValueError(
                f"{other.directory}: {len(ids)} {name} rows differ from those of "
                f"{first.directory}, such as {ids[:3]}; "
                "combine runs on the same data and the same sample of it"
            )


def _require_independent(run: Run, named_runs: Sequence[tuple[str, Run]]) -> None:
    """Raise ValueError for a run that is named twice, or that learned from another one."""
    twins = [name for name, other in named_runs if other.fingerprint == run.fingerprint]
    if len(twins) > 1:
        raise ValueError(
            f"{' and '.join(twins)} are the same run, which would count twice: name it once"
        )
    if run.config.distill_from:
        raise ValueError(
            f"{run.directory} cannot be judged beside other runs: {DISTILLED_WARNING}; leave it out"
        )


def _shared_notation(runs: Mapping[str, Run]) -> AnswerNotation | None:
    """How the runs write answers, as far as they know. Raises ValueError where they differ."""
    known = {name: run.notation for name, run in runs.items() if run.notation is not None}
    if len(set(known.values())) > 1:
        notations = ", ".join(f"{name}: {notation}" for name, notation in known.items())
        raise ValueError(
            f"these runs write answers differently ({notations}); combine runs on the same files"
        )
    return next(iter(known.values()), None)


def _config_for_answers(first: Run, runs: Mapping[str, Run]) -> Config:
    """The first run's settings; it takes known answers where any of the runs does."""
    takers = [name for name, run in runs.items() if run.config.use_known_answers]
    if takers:
        LOGGER.info("Decision: known answers are used, as in %s", ", ".join(takers))
    return dataclasses.replace(first.config, use_known_answers=bool(takers))


def _predict_run(run: Run, test_ids: pd.Series) -> RunPredictions:
    """Evaluate a finished run, and average the test probabilities of its models."""
    evaluation = evaluate_run(run)
    oof_ids = evaluation.oof.frame["id"]
    test = np.mean(list(predict_test(run, evaluation).values()), axis=0)
    stages = read_json_lines(run.directory / "stages.jsonl", STAGE_RECORD)
    base = evaluation.base
    base_oof = None
    base_test = None
    if base is not None:
        base_oof = pd.DataFrame(base.members[1], index=oof_ids)
        predicted = predict_base_test(run, evaluation.oof, evaluation.views, base)
        base_test = pd.DataFrame(predicted, index=run.test["id"]).loc[test_ids]
    return RunPredictions(
        oof=pd.DataFrame(evaluation.probabilities, index=oof_ids),
        test=pd.DataFrame(test, index=run.test["id"]).loc[test_ids],
        seconds=sum(record["seconds"] for record in stages),
        has_skill=evaluation.skill.has_skill,
        base_oof=base_oof,
        base_test=base_test,
    )


WITH_BASE_MODELS = " with base models"  # end of the name of a blend that has them as members
BLENDS_WITH_BASE = ("mean", "geometric mean", "weighted")


@dataclass(frozen=True)
class _Members:
    """Members of an ensemble of runs."""

    oof: np.ndarray  # (members, n, 4) probabilities of the shared rows
    test: np.ndarray  # (members, test rows, 4)

    def add_base_models(
        self, predictions: Mapping[str, RunPredictions], ids: pd.Series
    ) -> _Members | None:
        """The members with the runs' base models; None where no run has scored by it."""
        scored = [item for item in predictions.values() if item.base_oof is not None]
        if not scored:
            return None
        LOGGER.info("Base models are members, too: %d of %d runs", len(scored), len(predictions))
        base_oof = [item.base_oof.loc[ids] for item in scored]
        base_test = [item.base_test for item in scored]
        return _Members(
            oof=np.concatenate([self.oof, np.stack(base_oof)]),
            test=np.concatenate([self.test, np.stack(base_test)]),
        )


def _blends_of_runs(
    members: _Members, with_base: _Members | None, labels, groups, has_skill: bool
) -> dict[str, Candidate]:
    """Every blend of the runs, the mean first; then some that have base models as members."""
    names = BLENDS if has_skill else ["mean"]  # else nothing is fitted to the labels
    blends = cross_fitted_blends(members.oof, labels, groups, names, scaling=has_skill)
    if with_base is not None:
        added = cross_fitted_blends(with_base.oof, labels, groups, BLENDS_WITH_BASE)
        for name, candidate in added.items():
            blends[name + WITH_BASE_MODELS] = candidate
    return blends


def _shared_rows(train: pd.DataFrame, predictions: Mapping[str, RunPredictions]) -> pd.DataFrame:
    """The training rows that all runs have scored out of fold. Raises ValueError for none."""
    scored_ids = [set(prediction.oof.index) for prediction in predictions.values()]
    rows = train[train["id"].isin(set.intersection(*scored_ids))]
    if rows.empty:
        raise ValueError(
            f"{', '.join(predictions)}: no training row is out of fold in all of them; "
            "train the same folds"
        )
    LOGGER.info(
        "Compared on the %d of %d training rows that all runs have scored",
        len(rows),
        len(train),
    )
    return rows


def _run_ladder(
    single_runs: Mapping[str, Candidate],
    blends: Mapping[str, Candidate],
    labels: np.ndarray,
    groups: np.ndarray,
) -> tuple[pd.DataFrame, str]:
    """The ladder of single runs, blends and the automatic choice, and the name that is chosen.

    Everything is compared with the mean of the runs, and the mean with the best single
    run.
    """
    candidates = {**blends, **single_runs}  # the first, which has to be beaten, is the mean
    chosen = choose_blend(candidates, labels, groups)
    losses = {}
    for name, candidate in single_runs.items():
        losses[name] = negative_log_likelihood(candidate.probabilities, labels)
    best_run = min(losses, key=losses.get)
    steps = {}
    for name in [*single_runs, *candidates]:
        steps[name] = LadderStep(
            probabilities=candidates[name].probabilities,
            against=best_run if name == "mean" else "mean",
            used=name == chosen,
            fitted_parameters=candidates[name].fitted_parameters,
        )
    expected = choose_cross_fitted(candidates, labels, groups)
    steps[STEP_AUTOMATIC] = LadderStep(expected, against="mean", used=True)
    table = ladder_table(steps, labels, groups)
    set_choice_interval(table, candidates, labels, groups)
    return table, chosen


@each_warning_once()
def ensemble_runs(
    directories: Iterable[str | Path],
    folder: str | Path,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare ways to combine finished runs, and use the best on the test rows.

    They are compared on the rows that all have scored out of fold. Writes
    submission.csv and ladder.csv into `folder` and returns the table and the answers.
    `seconds` is the workers' time of the runs behind a row. "automatic choice" is what
    to expect: each twentieth of the images is answered by what would be chosen without
    it. Runs of which none has skill are compared with their plain mean only. Where a run has
    scored its rows by the base model, too, blends with that as a further member are compared.

    Raises ValueError for runs on other rows or with other notations, for one run named twice,
    for one that learned from another, and for runs that share no row.
    """
    named_runs = [(str(directory), Run.open(directory)) for directory in directories]
    first = named_runs[0][1]
    runs = dict(named_runs)
    for run in runs.values():
        _require_same_rows(first, run)
    first = dataclasses.replace(
        first, notation=_shared_notation(runs), config=_config_for_answers(first, runs)
    )
    predictions = {}
    for name, run in runs.items():
        _require_independent(run, named_runs)
        predictions[name] = _predict_run(run, first.test["id"])

    rows = _shared_rows(first.train, predictions)
    labels = rows["label"].to_numpy()
    groups = image_groups(rows)
    oof_of_runs = []
    test_of_runs = []
    seconds = {}
    for name, prediction in predictions.items():
        oof_of_runs.append(prediction.oof.loc[rows["id"]])
        test_of_runs.append(prediction.test)
        seconds[name] = prediction.seconds
    members = _Members(oof=np.stack(oof_of_runs), test=np.stack(test_of_runs))
    with_base = members.add_base_models(predictions, rows["id"])

    has_skill = any(prediction.has_skill for prediction in predictions.values())
    blends = _blends_of_runs(members, with_base, labels, groups, has_skill)
    single_runs = {}
    for name, probabilities in zip(predictions, members.oof, strict=True):
        single_runs[name] = Candidate(probabilities)
    table, chosen = _run_ladder(single_runs, blends, labels, groups)
    all_seconds = sum(seconds.values())
    table.insert(4, "seconds", [seconds.get(name, all_seconds) for name in table.index])

    if chosen in predictions:
        probabilities = predictions[chosen].test.to_numpy()
    else:
        if chosen.endswith(WITH_BASE_MODELS):
            members = with_base
        blend = chosen.removesuffix(WITH_BASE_MODELS)
        probabilities = fit_and_blend(blend, members.oof, labels, members.test, has_skill)
    path = Path(folder) / "submission.csv"
    answers = _write_answers(probabilities.argmax(axis=1), first, path)
    write_table(table.reset_index(), path.with_name("ladder.csv"))
    copy_to_kaggle_working(path, first.config)
    return table, answers


# === Comparing submissions ========================================================================
MOST_POINTS_BEHIND = 0.01  # accuracy that a run worth mixing may lack of the best one
_SIDE_WORDS = {"a": "first", "b": "second"}
_OVERLAP_COLUMNS = [
    "a",
    "b",
    "rows",
    "accuracy_a",
    "accuracy_b",
    "wrong_a",
    "wrong_b",
    "wrong_both",
    "jaccard",
]


def leaderboard_noise(differing: int) -> float:
    """By how many rows the scores of two equally good submissions differ that differ in so many.

    One standard deviation, where one of both is right in half of the rows in which they differ,
    and each as often as the other.

    >>> leaderboard_noise(50)
    5.0
    """
    return math.sqrt(differing / 2)


def error_overlap(wrong_a: np.ndarray, wrong_b: np.ndarray) -> float:
    """Jaccard index of the errors: the share of the rows that either has wrong that both have.

    1 where neither makes an error: there is nothing that one knows and the other does not.

    >>> error_overlap(np.array([True, True, False]), np.array([False, True, True]))
    0.3333333333333333
    """
    either = int((wrong_a | wrong_b).sum())
    return int((wrong_a & wrong_b).sum()) / either if either else 1.0


def error_overlaps(correct: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """How far the errors of each pair of models overlap, the least first.

    `correct`: name -> (n,) right or wrong on the same rows. Columns: a, b (the names), rows,
    accuracy_a, accuracy_b, wrong_a, wrong_b, wrong_both (rows), jaccard (`error_overlap`), and
    worth_mixing: the pair with the least overlap of those in which both lie within
    MOST_POINTS_BEHIND of the best model. A poor model overlaps little with any.
    """
    wrong = {name: ~np.asarray(values, dtype=bool) for name, values in correct.items()}
    rows = []
    for a, b in itertools.combinations(wrong, 2):
        wrong_a = wrong[a]
        wrong_b = wrong[b]
        row = {
            "a": a,
            "b": b,
            "rows": len(wrong_a),
            "accuracy_a": float(1 - wrong_a.mean()),
            "accuracy_b": float(1 - wrong_b.mean()),
            "wrong_a": int(wrong_a.sum()),
            "wrong_b": int(wrong_b.sum()),
            "wrong_both": int((wrong_a & wrong_b).sum()),
            "jaccard": error_overlap(wrong_a, wrong_b),
        }
        rows.append(row)
    table = pd.DataFrame(rows, columns=_OVERLAP_COLUMNS)
    table = table.sort_values("jaccard", kind="stable", ignore_index=True)
    best = table[["accuracy_a", "accuracy_b"]].to_numpy().max(initial=0)
    weaker = table[["accuracy_a", "accuracy_b"]].min(axis=1)
    rounding = 1e-9
    is_near = (weaker >= best - MOST_POINTS_BEHIND - rounding) & (table["jaccard"] < 1)
    table["worth_mixing"] = False
    table.loc[table.index[is_near][:1], "worth_mixing"] = True
    return table


def _overlap_of(runs: Mapping[str, Run], predictions: Mapping[str, RunPredictions]) -> pd.DataFrame:
    """`error_overlaps` of the runs on the rows that all have scored; none is worth without skill.

    Raises ValueError for runs on other rows, for one named twice, and for distilled ones.
    """
    first = next(iter(runs.values()))
    for run in runs.values():
        _require_same_rows(first, run)
        _require_independent(run, [*runs.items()])
    rows = _shared_rows(first.train, predictions)
    labels = rows["label"].to_numpy()
    correct = {}
    for name, prediction in predictions.items():
        answers = prediction.oof.loc[rows["id"]].to_numpy().argmax(axis=1)
        correct[name] = answers == labels
    table = error_overlaps(correct)
    has_skill = {name: prediction.has_skill for name, prediction in predictions.items()}
    table["worth_mixing"] &= table["a"].map(has_skill) & table["b"].map(has_skill)
    return table


@each_warning_once()
def overlap_of_runs(directories: Iterable[str | Path]) -> pd.DataFrame:
    """`error_overlaps` of two or more finished runs, on the rows that all have scored out of fold.

    Raises ValueError as `ensemble_runs` does.
    """
    runs = {str(directory): Run.open(directory) for directory in directories}
    if len(runs) < 2:
        raise ValueError(f"{', '.join(runs) or 'no run'}: name two or more different finished runs")
    test_ids = next(iter(runs.values())).test["id"]
    for run in runs.values():
        _require_same_rows(next(iter(runs.values())), run)
    predictions = {name: _predict_run(run, test_ids) for name, run in runs.items()}
    return _overlap_of(runs, predictions)


def describe_overlap(table: pd.DataFrame) -> str:
    """Which pair of `error_overlaps` is worth mixing, as a sentence."""
    worth = table[table["worth_mixing"]]
    points = round(100 * MOST_POINTS_BEHIND)
    if worth.empty:
        return (
            f"No pair is worth mixing: no two runs lie within {points} point of the best one and "
            "make different errors."
        )
    row = worth.iloc[0]
    return (
        f"Worth mixing: {row['a']} with {row['b']} (accuracy {row['accuracy_a']:.3f} and "
        f"{row['accuracy_b']:.3f}). Their errors overlap by {row['jaccard']:.2f}, the least of "
        f"the pairs within {points} point of the best run."
    )


@dataclass(frozen=True)
class SubmissionComparison:
    """Two submissions side by side, filled by `compare_submissions`."""

    names: tuple[str, str]  # of a and b, as they were given
    rows: int  # of each
    # The rows with different answers, the surest disagreement first. Columns: id, answer_a,
    # answer_b, confidence_a, confidence_b (probability of that answer; NaN where no model is
    # known), and where the test rows are known theirs, too.
    differing: pd.DataFrame
    by_type: pd.DataFrame  # index type; rows, differ, share; empty without the test rows
    overlap: pd.DataFrame  # `error_overlaps` of two finished runs; else without a row
    overlap_problem: str  # why there is none; "" where there is one

    @property
    def noise(self) -> float:
        """`leaderboard_noise` of the rows that differ."""
        return leaderboard_noise(len(self.differing))


@dataclass(frozen=True)
class _Side:
    """One of two submissions that are compared."""

    name: str
    path: Path  # of the file
    run: Run | None  # that wrote it, where its folder was given


def _open_side(source: str | Path | Run) -> _Side:
    """The file that is meant by a file, a run, or a folder of a run or of an ensemble of runs."""
    place = source.directory if isinstance(source, Run) else Path(source)
    if not place.is_dir():
        return _Side(str(place), place, None)
    for name in ("submission_ensemble.csv", "submission.csv"):
        if (place / name).is_file():
            is_run = (place / "config.json").is_file()
            return _Side(str(place), place / name, Run.open(place) if is_run else None)
    raise FileNotFoundError(
        f"{place}: no submission_ensemble.csv in this folder; write it with write_submissions, or "
        "give the file itself"
    )


def _confidences(
    letters: tuple[pd.Series, pd.Series], predictions: Sequence[pd.DataFrame | None]
) -> pd.DataFrame:
    """Columns confidence_a, confidence_b by id: the probability that each answer has."""
    table = pd.DataFrame(index=letters[0].index)
    for side, answers, probabilities in zip("ab", letters, predictions, strict=True):
        values = np.full(len(table), math.nan)
        if probabilities is not None:
            labels = answers.loc[table.index].map(CHOICES.index)
            of_rows = probabilities.loc[table.index].to_numpy()
            values = of_rows[np.arange(len(table)), labels]
        table[f"confidence_{side}"] = values
    return table


def _differing_rows_of(
    letters: tuple[pd.Series, pd.Series],
    confidences: pd.DataFrame,
    by_one_model: bool,
    test: pd.DataFrame | None,
) -> pd.DataFrame:
    """`SubmissionComparison.differing`.

    Two models disagree the more surely, the surer the less sure one is; one model judges two
    foreign answers by the likelier of both.
    """
    a, b = letters
    table = pd.DataFrame({"answer_a": a, "answer_b": b.loc[a.index]}).join(confidences)
    table = table[table["answer_a"] != table["answer_b"]]
    both = table[["confidence_a", "confidence_b"]]
    surety = both.max(axis=1) if by_one_model else both.min(axis=1)
    table = table.loc[surety.sort_values(ascending=False, kind="stable").index]
    table = table.reset_index(names="id")
    if test is None:
        return table
    columns = ["id", "type", "question", *CHOICES, "image_path"]
    return table.merge(test[columns], on="id", how="left")


def _differences_by_type(letters: tuple[pd.Series, pd.Series], test: pd.DataFrame | None):
    """`SubmissionComparison.by_type`, the type with the largest share first."""
    if test is None:
        return pd.DataFrame(columns=["rows", "differ", "share"]).rename_axis("type")
    ids = test["id"]
    differs = letters[0].loc[ids].to_numpy() != letters[1].loc[ids].to_numpy()
    rows = pd.DataFrame({"type": test["type"].to_numpy(), "differs": differs})
    table = rows.groupby("type")["differs"].agg(rows="size", differ="sum", share="mean")
    return table.sort_values("share", ascending=False, kind="stable")


def _require_same_ids(a: _Side, b: _Side, letters: tuple[pd.Series, pd.Series]) -> None:
    """Raise SubmissionError with ids that only one of two files has."""
    ids_of_a, ids_of_b = (set(answers.index) for answers in letters)
    only_a = sorted(ids_of_a - ids_of_b)
    only_b = sorted(ids_of_b - ids_of_a)
    if only_a or only_b:
        raise SubmissionError(
            f"{a.path} and {b.path} answer other rows: {len(only_a)} ids are only in the first "
            f"{only_a[:3]}, {len(only_b)} only in the second {only_b[:3]}; "
            "give two submissions of one competition"
        )


def _overlap_or_problem(
    sides: tuple[_Side, _Side], predictions: Sequence[RunPredictions | None]
) -> tuple[pd.DataFrame, str]:
    """The overlap of the errors of two runs, or without a row and with the reason."""
    nothing = error_overlaps({})
    files = [side.name for side in sides if side.run is None]
    if files:
        return nothing, f"{' and '.join(files)}: no finished run, so its errors are not known"
    runs = {side.name: side.run for side in sides}
    if len(runs) < 2:
        return nothing, "one run beside itself"
    try:
        return _overlap_of(runs, dict(zip(runs, predictions, strict=True))), ""
    except ValueError as error:  # other training rows, a copy of the run, a distilled one
        return nothing, str(error)


@each_warning_once()
def compare_submissions(
    a: str | Path | Run,
    b: str | Path | Run,
    run: str | Path | Run | Competition | None = None,
) -> SubmissionComparison:
    """Where two submissions differ, and whether so many rows can be told apart on a leaderboard.

    `a` and `b`: submission files, or folders of finished runs, whose ensembles are meant; files
    are read in their own notations, their rows are matched by id. `run`: a run or its data, for
    question types, images, texts of choices, and a model's confidence where neither is a run;
    without it those of a run among `a` and `b`. For two finished runs the overlap of their errors
    on out-of-fold rows is measured, too.

    Raises SubmissionError for files with other ids, DataError for answers of no known kind or of
    several.
    """
    sides = (_open_side(a), _open_side(b))
    if isinstance(run, (str, Path)):
        run = Run.open(run)
    own_runs = [side.run for side in sides if side.run is not None]
    rows_from = run if run is not None else next(iter(own_runs), None)
    test = None if rows_from is None else rows_from.test

    letters = []
    for side in sides:
        writer = side.run or rows_from
        notation = None if writer is None else writer.notation
        letters.append(read_submission(side.path, test, notation))
    letters = tuple(letters)
    _require_same_ids(*sides, letters)

    predictions = []
    for side in sides:
        is_known = side.run is not None
        predictions.append(_predict_run(side.run, side.run.test["id"]) if is_known else None)
    probabilities = [None if known is None else known.test for known in predictions]
    by_one_model = len(own_runs) < 2
    if not own_runs and isinstance(run, Run) and run.finished_folds:
        of_run = _predict_run(run, run.test["id"]).test
        probabilities = [of_run, of_run]
    overlap, overlap_problem = _overlap_or_problem(sides, predictions)
    return SubmissionComparison(
        names=(sides[0].name, sides[1].name),
        rows=len(letters[0]),
        differing=_differing_rows_of(
            letters, _confidences(letters, probabilities), by_one_model, test
        ),
        by_type=_differences_by_type(letters, test),
        overlap=overlap,
        overlap_problem=overlap_problem,
    )


def describe_comparison(comparison: SubmissionComparison) -> list[str]:
    """What `compare_submissions` has found, as sentences."""
    differing = len(comparison.differing)
    a, b = comparison.names
    if not differing:
        lines = [f"{a} and {b} answer all {comparison.rows} rows alike."]
    else:
        share = differing / comparison.rows
        points = 100 * comparison.noise / comparison.rows
        lines = [
            f"{a} and {b} differ in {differing} of {comparison.rows} rows ({share:.1%}).",
            "If both are equally good, their scores on all these rows still differ by about "
            f"± {comparison.noise:.1f} rows (± {points:.1f} points; on a part of the rows more "
            "points). Less than twice that proves nothing.",
        ]
    if comparison.overlap_problem:
        return [*lines, f"Overlap of errors: not known ({comparison.overlap_problem})."]
    row = comparison.overlap.iloc[0]
    lines.append(
        f"Out of fold, {row['wrong_both']} of {row['rows']} rows are wrong in both, "
        f"{row['wrong_a']} and {row['wrong_b']} in each: their errors overlap by "
        f"{row['jaccard']:.2f} (Jaccard)."
    )
    return [*lines, describe_overlap(comparison.overlap)]


def _disagreement_notes(differing: pd.DataFrame) -> list[str]:
    """What both files answer in each row, with the probabilities where they are known."""
    notes = []
    for _, row in differing.iterrows():
        parts = []
        for side in "ab":
            confidence = row[f"confidence_{side}"]
            answer = row[f"answer_{side}"]
            sure = "" if math.isnan(confidence) else f" (probability {confidence:.2f})"
            parts.append(f"the {_SIDE_WORDS[side]} answers {answer}{sure}")
        notes.append(", ".join(parts))
    return notes


def comparison_html(comparison: SubmissionComparison, cards: int = 6) -> str:
    """The comparison as HTML: sentences, question types, and cards of the first rows that differ.

    All text from the data is escaped. Cards need the test rows, whose images they show; of a run
    of another session whose images are not attached here, a line says which one is missing.
    """
    sentences = "<br>".join(html.escape(line) for line in describe_comparison(comparison))
    parts = [f"<p>{sentences}</p>"]
    if not comparison.by_type.empty:
        parts.append(table_html(comparison.by_type))
    shown = comparison.differing.head(cards)
    if "image_path" in shown and len(shown):
        try:
            parts.append(question_cards(shown, _disagreement_notes(shown)))
        except ImageError as error:
            parts.append(f"<p>No cards: {html.escape(str(error))}</p>")
    return "".join(parts)


# === Related competitions =========================================================================
# Their training rows join every fold's training, or come before it (Epochs, `plan_training`).
# They are no OOF rows, and a row that shows a validation image of a fold is left out there (Soft
# targets, `_without_copies`).


def find_related_competitions(config: Config, data_dir: Path) -> dict[str, Path]:
    """Source of rows (extra_1, ...) -> folder with their train.csv, as extra_train_dirs names it.

    Archives are unpacked. Raises ValueError for a place that holds no competition or several,
    and for this one's own folder `data_dir`.
    """
    folders = {}
    for number, name in enumerate(config.extra_train_dirs, start=1):
        where = f"Config field 'extra_train_dirs': {name}"
        place = named_folder(name)
        found = [place] if place.is_file() else list_competitions({str(place): 4})
        if len(found) != 1:
            held = [str(path) for path in found] or "none"
            raise ValueError(
                f"{where} must hold one competition, with {', '.join(COMPETITION_FILES)}; "
                f"it holds {held}: name the folder or archive of one"
            )
        folder = unpack_competition(found[0]) if found[0].is_file() else found[0]
        folder = folder.resolve()
        if folder == data_dir.resolve() or folder in folders.values():
            raise ValueError(f"{where} is data_dir or named twice; leave it out")
        folders[f"{RELATED_SOURCE}{number}"] = folder
    return folders


def _without_test_images(
    rows: pd.DataFrame, test: pd.DataFrame, source: str, fallbacks: Counter
) -> pd.DataFrame:
    """`rows` without those whose image is a copy of a test image, exact or near; counted."""
    leakage = leakage_report(test[test["image_ok"]], rows)
    is_copy = leakage.test_group.isin(leakage.image_group)
    fallbacks[f"{source}_copies_of_test_images_left_out"] += int(is_copy.sum())
    return rows[~is_copy].reset_index(drop=True)


def _with_related_context(
    config: Config, rows: pd.DataFrame, folder: Path, source: str, fallbacks: Counter
) -> pd.DataFrame:
    """`rows` with their column context: of context.csv in their own folder, else of their table.

    Without the column where context_tokens is 0; blank where they have none, which is counted.
    """
    path = folder / CONTEXT_FILE
    if config.context_tokens and path.is_file():
        texts = _read_context_file(path, fallbacks)
        _check_context_ids(path.name, texts, folder, config.columns)
        nothing = _ContextText(line=0, text="")
        rows = rows.assign(context=[texts.get(row_id, nothing).text for row_id in rows["id"]])
    return _use_context_column(config, rows, source, fallbacks)


def load_related_rows(run: Run, data_dir: Path, fallbacks: Counter) -> list[pd.DataFrame]:
    """The labelled rows of each folder in extra_train_dirs, with their `source`.

    Tables and images are read as the competition's own. Ids get the source in front. Rows that
    show a copy of a test image are left out; all losses are counted in `fallbacks`. Raises
    DataError that names folder, file and row.
    """
    config = run.config
    frames = []
    for source, folder in find_related_competitions(config, data_dir).items():
        LOGGER.info("Training rows %s: those of %s", source, folder)
        counts = Counter()
        try:
            rows, _ = _load_train(
                folder, config.max_fallback_share, None, config.seed, config.columns, counts
            )
        except DataError as error:
            raise DataError(f"Folder {folder} of extra_train_dirs: {error}") from error
        for name, count in (+counts).items():
            fallbacks[f"{source}_{name.removeprefix('train_')}"] += count
        rows = _with_related_context(config, rows, folder, source, fallbacks)
        rows = _without_test_images(rows, run.test, source, fallbacks)
        frames.append(rows.assign(id=f"{source}/" + rows["id"], source=source))
    return frames


# === Soft targets =================================================================================
# A row's target over a, b, c, d is its label, or what people (dev.csv) or another run, the
# teacher, make of it: the columns target_a .. target_d. No target comes from a model that was
# trained on its row, and no fold trains on a row or image that validates it.
#
# Distillation still tells a fold about its validation rows: the teacher's model for a row of
# fold 1 was trained on fold 0, and a student of fold 0 that learns to answer like it also learns
# what it knew by heart. On the demo OOF accuracy rose by 2.7 points, that of the hidden answers
# did not: hence DISTILLED_WARNING. To be rid of it takes a teacher model for each pair of folds.
# Test answers for fold 0 come from a model that never saw fold 0: they know it only through
# decisions on OOF rows (epoch, weights, views, temperature).

# Of a teacher's probabilities: processors differ in the last digits, a run continues on any.
TARGET_DECIMALS = 4


def _with_targets(frame: pd.DataFrame, probabilities: np.ndarray) -> pd.DataFrame:
    """`frame` with probabilities (n, 4) as targets; a blank choice gets none."""
    present = ~frame[[*CHOICES]].map(shows_nothing).to_numpy()
    shares = np.where(present, probabilities, 0)
    shares = shares / shares.sum(axis=1, keepdims=True)
    columns = dict(zip(TARGET_COLUMNS, shares.T, strict=True))
    return frame.assign(**columns)


def _with_hard_targets(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with its labels as targets, which no teacher gave: where others are soft."""
    return _with_targets(frame, np.eye(4)[frame["label"]]).assign(teacher_fold=-1)


def _load_dev(
    root: Path, limit: float, columns: Mapping[str, str], fallbacks: Counter
) -> pd.DataFrame:
    """Rows of dev.csv with the shares of their votes as targets.

    Rows without a vote or a usable image are dropped and counted, up to the share `limit`.
    """
    if not (root / "dev.csv").is_file():
        raise DataError(f"{root / 'dev.csv'}: no such file; add it, or set use_dev_votes=False")
    frame, _ = _read_competition_table(root / "dev.csv", columns, fallbacks)
    is_blank = frame[[*VOTE_COLUMNS]].map(shows_nothing)
    has_no_vote = is_blank.all(axis=1)
    fallbacks["dev_blank_votes"] += int(is_blank.to_numpy().sum())
    frame = frame.assign(problem=has_no_vote.map({True: "no vote", False: ""}))
    _count_dropped_rows(frame, "dev", "no_vote", "answer1", limit, fallbacks)
    frame = frame[~has_no_vote].drop(columns=["problem", "answer"], errors="ignore")
    frame = frame.reset_index(drop=True)
    _check_questions("dev", frame, fallbacks)
    given_votes = []
    for column in VOTE_COLUMNS:
        given = frame[~frame[column].map(shows_nothing)]
        given_votes.append(given.assign(answer=given[column], column=column))
    rows = pd.concat(given_votes)
    labels, _ = _read_answers(rows, "dev.csv", fallbacks)  # all votes are of one kind
    votes = np.zeros((len(frame), 4))
    np.add.at(votes, (rows.index, labels), 1)
    frame = _with_targets(frame, votes).drop(columns=[*VOTE_COLUMNS])
    frame = _attach_images(frame, root, "dev", limit, fallbacks)
    return frame[frame["image_ok"]]


def _open_teacher(run: Run, name: str) -> Run:
    """The finished run that config field `name` points to.

    Raises ValueError unless its rows, labels and images are this run's.
    """
    directory = Path(getattr(run.config, name))
    where = f"Config field {name!r} is {str(directory)!r}"
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"{where}: no run lies in {directory.resolve()}; "
            "give the folder of a finished run, attached"
        )
    teacher = Run.open(directory)
    content = read_json(directory / "config.json")
    ids = _differing_ids(run.train[["id", "label"]], teacher.train[["id", "label"]])
    if ids:
        raise ValueError(
            f"{where}: {len(ids)} of its training rows or labels are others, such as {ids[:3]}"
        )
    if content["parts"]["data"] != run.fingerprint:
        raise ValueError(
            f"{where}: it was made from other texts, test rows or pixels; train it on these files"
        )
    unfinished = []
    for fold in teacher.config.folds_to_train:
        if not teacher.is_done("predict", fold):
            unfinished.append(fold)
    if unfinished:
        raise ValueError(
            f"{where}: its folds {unfinished} are not finished; run it to its end first"
        )
    return teacher


def _add_distilled_targets(run: Run, teacher: Run) -> pd.DataFrame:
    """The training rows with the teacher's calibrated OOF probabilities in their targets.

    Raises ValueError where a row that is trained on has none.
    """
    ids = run.train["id"]
    evaluation = evaluate_run(teacher)
    probabilities = pd.DataFrame(evaluation.probabilities, index=evaluation.oof.frame["id"])
    probabilities = probabilities.reindex(ids).to_numpy()
    is_unknown = np.isnan(probabilities)
    is_trained_on = np.any([run.train["fold"] != fold for fold in run.models_to_train], axis=0)
    lacking = ids[is_trained_on & is_unknown[:, 0]].tolist()
    if lacking:
        raise ValueError(
            f"Config field 'distill_from': {teacher.directory} has no out-of-fold probabilities "
            f"for {len(lacking)} rows, such as {lacking[:3]}; train all its folds"
        )
    hard = np.eye(4)[run.train["label"]]
    rounded = probabilities.round(TARGET_DECIMALS)
    train = _with_targets(run.train, np.where(is_unknown, hard, rounded))
    weight = run.config.distill_weight
    columns = [*TARGET_COLUMNS]
    train[columns] = (1 - weight) * hard + weight * train[columns]
    teacher_folds = teacher.train.set_index("id")["fold"]
    return train.assign(teacher_fold=teacher_folds[ids].to_numpy())


def _pseudo_labelled_rows(run: Run, teacher: Run) -> Iterator[pd.DataFrame]:
    """For each fold the test rows that the teacher's same fold is sure of.

    With its calibrated probabilities as targets. Raises ValueError where the teacher has other
    folds, lacks one, or was itself distilled.
    """
    where = f"Config field 'pseudo_label_from': {teacher.directory}"
    ids = _differing_ids(run.train[["id", "fold"]], teacher.train[["id", "fold"]])
    if ids:
        raise ValueError(
            f"{where} has {len(ids)} rows in other folds, such as {ids[:3]}; "
            "take its n_folds and seed"
        )
    absent = sorted(set(run.config.folds_to_train) - set(teacher.finished_folds))
    if absent:
        raise ValueError(
            f"{where} has not trained the folds {absent}; train them there, or leave them out here"
        )
    if teacher.config.distill_from:
        raise ValueError(f"{where}: {DISTILLED_WARNING}; take a run that was not distilled")
    probabilities = predict_test(teacher, evaluate_run(teacher))
    for fold in run.config.folds_to_train:
        rows = _with_targets(run.test, probabilities[fold].round(TARGET_DECIMALS))
        confidence = rows[[*TARGET_COLUMNS]].max(axis=1)
        is_sure = rows["image_ok"] & (confidence >= run.config.pseudo_label_confidence)
        taught = {"source": "test", "fold": fold, "teacher_fold": fold, "label": -1}
        yield rows[is_sure].assign(**taught)


def _without_copies(run: Run, rows: pd.DataFrame, fallbacks: Counter) -> pd.DataFrame:
    """`rows` without those whose image is a copy of one that validates their fold; counted.

    Exact copies and near ones.
    """
    leakage = leakage_report(run.train, rows)
    held_out = set(zip(run.train["fold"], leakage.image_group, strict=True))
    images = zip(rows["fold"], leakage.test_group, strict=True)
    is_copy = np.array([image in held_out for image in images], dtype=bool)
    for (source, fold), copies in rows[is_copy].groupby(["source", "fold"]):
        fallbacks[f"{source}_copies_left_out_of_fold_{fold}"] += len(copies)
    return rows[~is_copy]


def _row_keys(frame: pd.DataFrame) -> set[tuple[str, str]]:
    """(source, id) of each row: the files number their rows independently."""
    return set(zip(frame["source"], frame["id"], strict=True))


def _require_no_rows(fold: int, keys: set[tuple[str, str]], problem: str) -> None:
    """Raise DataError about rows of a fold that have a problem."""
    if keys:
        raise DataError(f"Fold {fold}: {problem}: {len(keys)} rows, such as {sorted(keys)[:3]}")


def _require_rows_to_pretrain(run: Run) -> None:
    """Raise DataError where a fold has no row for the epochs of pretraining."""
    for fold in run.models_to_train:
        if not is_related(training_rows(run, fold)).any():
            raise DataError(
                f"Fold {fold} has no row to pretrain on: all rows of extra_train_dirs were left "
                "out as copies of validation or test images; name other folders, or set "
                "pretrain_epochs=0"
            )


def check_no_leak(run: Run, teachers: Mapping[str, Run]) -> None:
    """Check, row by row, that no fold knows more than it should.

    `teachers`: source of rows (train, test) -> the run whose fold `teacher_fold` gave a row of
    that source its target. Raises DataError where a fold trains on what it is validated on, or
    on a target from a model that saw the target's row.
    """
    for fold in run.models_to_train:
        rows = training_rows(run, fold)
        held_out = run.train[run.train["fold"] == fold].assign(source="train")
        both = _row_keys(rows) & _row_keys(held_out)
        _require_no_rows(fold, both, "a training row also validates it")
        added = rows[rows["source"] != "train"]
        copies = added[added["pixel_hash"].isin(held_out["pixel_hash"])]
        problem = "a training row shows an image that validates it"
        _require_no_rows(fold, _row_keys(copies), problem)
        related = added[is_related(added)]
        copies = related[related["pixel_hash"].isin(run.test["pixel_hash"])]
        problem = "a row of extra_train_dirs shows a test image"
        _require_no_rows(fold, _row_keys(copies), problem)
        for source, teacher in teachers.items():
            own_rows = rows[rows["source"] == source]
            for number, taught in own_rows.groupby("teacher_fold"):
                seen = _row_keys(training_rows(teacher, number)) & _row_keys(taught)
                problem = (
                    f"a target comes from fold {number} of {teacher.directory}, trained on its row"
                )
                _require_no_rows(fold, seen, problem)


def add_soft_targets(run: Run, data_dir: Path) -> Run:
    """The run with the targets and extra rows that its config asks for.

    Raises DataError or ValueError for files and teachers that cannot be used.
    """
    config = run.config
    fallbacks = Counter(run.fallbacks)
    teachers = {}
    extra_parts = []
    if config.use_dev_votes:
        dev = _load_dev(data_dir, config.max_fallback_share, config.columns, fallbacks)
        dev = _use_context_column(config, dev, "dev", fallbacks)
        for fold in run.models_to_train:
            extra_parts.append(dev.assign(source="dev", fold=fold, teacher_fold=-1, label=-1))
    if config.pseudo_label_from:
        teachers["test"] = _open_teacher(run, "pseudo_label_from")
        extra_parts += _pseudo_labelled_rows(run, teachers["test"])
    has_soft_targets = bool(extra_parts or config.distill_from)
    for rows in load_related_rows(run, data_dir, fallbacks):
        related = _with_hard_targets(rows) if has_soft_targets else rows
        for fold in run.models_to_train:
            extra_parts.append(related.assign(fold=fold))
    train = run.train
    if config.distill_from:
        teachers["train"] = _open_teacher(run, "distill_from")
        train = _add_distilled_targets(run, teachers["train"])
    elif has_soft_targets:
        train = _with_hard_targets(train)
    extra_rows = run.extra_rows
    if extra_parts:
        added = pd.concat(extra_parts, ignore_index=True)
        extra_rows = _without_copies(run, added, fallbacks)
    run = dataclasses.replace(
        run,
        train=train,
        extra_rows=extra_rows,
        fallbacks=dict(fallbacks),
    )
    check_no_leak(run, teachers)
    if config.pretrain_epochs:
        _require_rows_to_pretrain(run)
    if config.distill_from:
        text = "Do not compare %s with other runs by OOF rows: %s"
        LOGGER.warning(text, run.directory.name, DISTILLED_WARNING)
    if extra_parts:
        left_out = {name: count for name, count in fallbacks.items() if "copies_" in name}
        counts = source_table(run).to_dict("index")
        LOGGER.info("Training rows by fold and file: %s; %s", counts, left_out)
    return run


def targets_sha256(run: Run) -> str:
    """A hash of all soft targets and of the rows that are not in train.csv.

    Wherever their images lie.
    """
    targets = run.train.filter(like="target_").to_csv()
    extra_rows = run.extra_rows.drop(columns=["image_path", "line"]).to_csv()
    return hashlib.sha256((targets + extra_rows).encode()).hexdigest()


# === Damaged files ================================================================================
def _problem_of(read: Callable, *arguments) -> str:
    """What `read(*arguments)` finds damaged; "" where it reads the file."""
    try:
        read(*arguments)
    except DamagedFileError as error:
        return error.problem
    return ""


def _require_whole_scores(run: Run, path: Path, ids: Sequence[str], some: bool = False) -> None:
    """Raise DamagedFileError unless a file has scores of every one of these rows.

    `some`: it may have them of some of these rows only.
    """
    content = read_arrays(path, run.fingerprint, SCORE_ARRAYS)
    logits = content["logits"]
    found = content["ids"].tolist()
    shape = (len(found), len(content["view_names"]), len(CHOICES))
    is_whole = sorted(found) == sorted(ids)
    if some:
        is_whole = bool(found) and set(found) <= set(ids)
    if not is_whole:
        raise DamagedFileError(path, "its rows are not those that were scored")
    if logits.shape != shape or len(content["labels"]) != len(found):
        raise DamagedFileError(path, f"logits of shape {logits.shape}, not {shape}")
    if np.isnan(logits).all(axis=(1, 2)).any():
        raise DamagedFileError(path, "a row has no score")
    try:
        combine_views(logits)
    except ValueError as error:
        raise DamagedFileError(path, error) from error


def _scores_problem(run: Run, path: Path, ids: Sequence[str], some: bool = False) -> str:
    """Why a file of scores of these rows is damaged; "" where it is not, or is not there.

    `some` is as in `_require_whole_scores`.
    """
    if not path.exists():
        return ""
    return _problem_of(_require_whole_scores, run, path, ids, some)


def _held_out_ids(run: Run, member: int) -> list[str]:
    """The ids of the rows that a member's fold holds out; none for the final model."""
    fold = fold_of(run.config, member)
    return run.train.loc[run.train["fold"] == fold, "id"].tolist()


def adapter_problem(run: Run, fold: int, kind: str) -> str:
    """Why a fold's adapter cannot be used; "" where it is as it was written."""
    folder = run.fold_dir(fold) / f"adapter_{kind}"
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        return f"{weights} is gone"
    if file_sha256(weights) != read_fold_result(run, fold).adapters[kind]:
        return f"{weights} is damaged"
    try:
        read_json(folder / "adapter_config.json", ["peft_type", "target_modules"])
    except FileNotFoundError as error:
        return str(error)
    except DamagedFileError as error:
        return error.problem
    return ""


@dataclass(frozen=True)
class _Damage:
    """A damaged file, and what has to go with it so that it is made anew."""

    problem: str  # that names the file
    files: tuple[Path, ...]  # relative to the run directory


def _score_damages(run: Run, fold: int) -> Iterator[_Damage]:
    """Damaged files of the stages that score: both files are made anew, the last one decides."""
    folder = run.fold_dir(fold)
    held_out = _held_out_ids(run, fold)
    test = run.test["id"].tolist()
    rows_by_stage = [
        {"oof.npz": held_out, "test.npz": test},
        {"oof_16bit.npz": held_out, "test_16bit.npz": test},
    ]
    if fold in run.config.folds_to_train:  # and the first seed's
        share = run.base_test_rows(fold)["id"].tolist()
        rows_by_stage.append({"base_oof.npz": held_out, "base_test.npz": share})
    for rows in rows_by_stage:
        last = folder / list(rows)[-1]
        for name, ids in rows.items():
            path = folder / name
            problem = _scores_problem(run, path, ids)
            if not path.exists() and last.exists():
                problem = f"{path} is gone"
            if problem:
                names = [item.relative_to(run.directory) for item in (path, last)]
                yield _Damage(problem, tuple(names))


def _training_damages(run: Run, fold: int) -> Iterator[_Damage]:
    """Damaged files that the end of a fold's training writes, from its last checkpoint."""
    folder = run.fold_dir(fold)
    result = folder / "result.json"
    if not result.exists():
        return  # training will write them all
    name = result.relative_to(run.directory)
    problem = _problem_of(read_fold_result, run, fold)
    if problem:
        yield _Damage(problem, (name,))
        return
    content = read_fold_result(run, fold)
    for kind in content.adapters:
        problem = adapter_problem(run, fold, kind)
        if problem:
            yield _Damage(problem, (name,))
    for kind in content.kinds:
        path = folder / f"validation_{kind}.npz"
        problem = _scores_problem(run, path, _held_out_ids(run, fold))
        if not path.exists():
            problem = f"{path} is gone"
        if problem:
            yield _Damage(problem, (path.relative_to(run.directory), name))


def _selection_damages(run: Run) -> Iterator[_Damage]:
    """A damaged selection.json, with the scores where it may have been about fewer folds.

    Where all finished folds are scored, the decision was about them, and it will be the same.
    """
    problem = _problem_of(lambda: (run.selected_weights, run.selected_seeds))
    if not problem:
        return
    files = [Path("selection.json")]
    if run.unfinished_folds("predict", run.finished_members):
        files += score_files(run)
    yield _Damage(problem, tuple(files))


def _restore_history(run: Run, fold: int) -> None:
    """Write a finished fold's history.csv anew where it is damaged or gone: the result has it."""
    path = run.fold_dir(fold) / "history.csv"
    if path.exists():
        problem = _problem_of(read_table, path, ("epoch", "loss"))
    else:
        problem = f"{path} is gone"
    if problem:
        LOGGER.warning("Written anew from result.json: %s", problem)
        write_table(read_fold_result(run, fold).history, path)


def _alignment_damages(run: Run) -> Iterator[_Damage]:
    """Damaged files of the stage "alignment", or of another model: both are made anew."""
    rows = {"train": run.train["id"].tolist(), "test": run.test["id"].tolist()}
    for name, ids in rows.items():
        path = run.directory / ALIGNMENT_FILES[name]
        problem = _scores_problem(run, path, ids)
        if not path.exists() and run.is_done("alignment", 0):
            problem = f"{path} is gone"
        elif path.exists() and not problem:
            (model,) = read_arrays(path, run.fingerprint)["view_names"].tolist()
            if run.config.alignment_model not in (None, model):
                problem = f"{path} has the scores of {model}"
        if problem:
            yield _Damage(problem, tuple(map(Path, ALIGNMENT_FILES.values())))


def delete_damaged_files(run: Run) -> int:
    """Delete what is damaged of the run, so that the stages make it anew; how many files were.

    Each is logged, and noted for the report. Files of another run stay. It looks at the zero-shot
    scores, at each fold's result, adapters and scores, and at the selected weights; checkpoints
    are verified where they are read.
    """
    damages = []
    ids = run.train["id"].tolist()
    problem = _scores_problem(run, run.directory / "zeroshot.npz", ids, some=True)
    if problem:
        damages.append(_Damage(problem, (Path("zeroshot.npz"),)))
    for member in run.members_to_train:
        damages += _training_damages(run, member)
        damages += _score_damages(run, member)
    damages += _selection_damages(run)
    damages += _alignment_damages(run)
    for damage in damages:
        LOGGER.warning("Made anew: %s", damage.problem)
        event = f"made anew: {damage.problem}"
        MetricLogger(run.directory / "events.jsonl").log(event=event)
        delete_outputs(run, damage.files)
    for member in run.members_to_train:
        if run.is_done("train", member):
            _restore_history(run, member)
    return len(damages)


def require_results_of(directory: Path, fingerprint: str, problem: str) -> None:
    """Raise CheckpointError unless each result in a run directory says that it is this run's.

    For a directory whose config.json has that `problem`: it does not say whose files these are.
    """
    for path in sorted(directory.glob("fold_*/result.json")):
        try:
            found = read_json(path).get("fingerprint")
        except DamagedFileError:
            continue  # it is made anew
        if found != fingerprint:
            raise CheckpointError(
                f"{problem}, and {path} does not say that it is this run's; "
                "choose a new run_name, or delete that folder"
            )


# === Starting a run ===============================================================================
def run_fingerprints(run: Run, competition: Competition) -> dict[str, str]:
    """What a run is continued by, as a hash or text each: config, data, folds, model, targets."""
    assignment = run.train[["id", "fold"]].to_csv()
    return {
        "config": run.config.fingerprint,
        "data": competition.fingerprint,
        "folds": hashlib.sha256(assignment.encode()).hexdigest(),
        "model": run.config.model_files,
        "targets": targets_sha256(run),
    }


def start_run(config: Config, competition: Competition, folds: np.ndarray) -> Run:
    """Create the run directory, or continue the run there or in `resume_from`.

    `folds` (n,): of each training row. Raises CheckpointError where the directory's run has
    other settings, data or folds, FileNotFoundError where the disk of `backup_dir` is absent.
    """
    directory = config.run_dir.resolve()
    config = dataclasses.replace(config, output_dir=str(directory.parent), run_name=directory.name)
    if config.backup_dir and not Path(config.backup_dir).parent.is_dir():
        raise FileNotFoundError(
            f"backup_dir {config.backup_dir}: no such disk; for Drive set MOUNT_DRIVE = True above"
        )
    competition = add_context(config, competition)
    train = competition.train.assign(fold=folds)
    run = Run(
        config,
        directory,
        train,
        competition.test,
        competition.sample,
        competition.fallbacks,
        competition.fingerprint,
        _no_rows(train),
    )
    run = add_soft_targets(run, competition.data_dir)
    parts = run_fingerprints(run, competition)
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    content = {
        "version": __version__,
        "libraries": library_versions(),
        "config": dataclasses.asdict(config),
        "parts": parts,
        "fallbacks": run.fallbacks,
        "fingerprint": fingerprint,
        "notation": dataclasses.asdict(competition.notation),
    }
    tables = {
        "folds": run.train,
        "test_rows": run.test,
        "sample_rows": run.sample,
    }
    if not run.extra_rows.empty:
        tables["extra_rows"] = run.extra_rows
    path = directory / "config.json"
    if not path.exists():
        _adopt_earlier_run(directory, config, fingerprint)
    if path.exists():
        _check_config(path, content, tables)
    content["tables"] = {}
    for name, frame in tables.items():
        table = directory / f"{name}.csv"
        write_table(frame, table)
        content["tables"][table.name] = file_sha256(table)
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False))
    run = Run.open(directory)
    delete_damaged_files(run)
    back_up(run)
    return run


def _check_config(path: Path, content: Mapping, tables: Mapping[str, pd.DataFrame]) -> None:
    """Raise CheckpointError where the run of config.json `path` is another than `content` says.

    A damaged one is written anew where the results in its directory are this run's.
    """
    try:
        before = read_config_file(path)
    except DamagedFileError as error:
        require_results_of(path.parent, content["fingerprint"], error.problem)
        LOGGER.warning("Written anew: %s", error.problem)
        return
    _check_same_run(before, content, path.parent, tables)


def _find_earlier_runs(directory: Path, config: Config, fingerprint: str) -> dict[Path, tuple]:
    """Folders of this very run under `resume_from` and `backup_dir`, and how far each has come.

    (files of scores, checkpoints); a run of the same name with another fingerprint is logged.
    """
    places = list(config.resume_from)
    if config.backup_dir:
        places.append(config.backup_dir)
    found = {}
    for place in places:
        for folder, folders, files in os.walk(place):
            path = Path(folder)
            if len(path.relative_to(place).parts) >= 5:
                folders.clear()
            if path.name != directory.name or "config.json" not in files:
                continue
            if path.resolve() == directory:
                continue
            try:
                earlier = read_json(path / "config.json")
            except DamagedFileError as error:
                LOGGER.warning("An earlier run is not continued: %s", error.problem)
                continue
            if earlier.get("fingerprint") == fingerprint:
                scores = list(path.glob("fold_*/*.npz"))
                checkpoints = list(path.glob("fold_*/checkpoints/step_*"))
                found[path] = (len(scores), len(checkpoints))
            else:
                text = "%s has this run's name, but other settings, data or folds: not continued"
                LOGGER.warning(text, path)
    return found


def _adopt_earlier_run(directory: Path, config: Config, fingerprint: str) -> None:
    """Copy this run from where an earlier session left it, a read-only input or Drive, if it is."""
    found = _find_earlier_runs(directory, config, fingerprint)
    if not found:
        return
    source = max(found, key=found.get)
    # config.json comes last: only with it is the copy a run.
    paths = sorted(source.rglob("*"), key=lambda path: path == source / "config.json")
    for path in paths:
        is_of_its_session = path.name == "session.json" or path.suffix == ".lock"
        is_unfinished = path.suffix == ".tmp" or ".incomplete-" in str(path)
        if path.is_file() and not is_of_its_session and not is_unfinished:
            target = directory / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)  # copytree would copy the mount's write protection
    LOGGER.info("Continuing the run of an earlier session, copied from %s", source)


def _differing_settings(before: Mapping, now: Mapping) -> list[str]:
    """Each field of two configurations that differs, with both values."""
    differences = []
    for name, value in json.loads(json.dumps(now)).items():
        if before.get(name) != value:
            differences.append(f"{name}: {before.get(name)!r} -> {value!r}")
    return differences


def _differing_rows(directory: Path, tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Each table of the run directory whose rows are not those of `tables`, with some of them."""
    differences = []
    for name in ("folds", "test_rows", "extra_rows"):
        path = directory / f"{name}.csv"
        if not path.exists():
            continue
        try:
            earlier = read_table(path)
        except DamagedFileError as error:
            differences.append(error.problem)
            continue
        table = tables.get(name, earlier.head(0))
        columns = [column for column in earlier if column in table]
        columns = [column for column in columns if column not in ("image_path", "line")]
        ids = _differing_ids(table[columns], earlier[columns])
        if ids:
            images = table.drop_duplicates("id").set_index("id")["image_path"]
            shown = [f"{key} ({Path(images.get(key, '')).name})" for key in ids[:3]]
            more = max(0, len(ids) - 3)
            differences.append(f"rows {shown} and {more} more of {name}.csv")
    return differences


def _check_same_run(
    before: Mapping,
    now: Mapping,
    directory: Path,
    tables: Mapping[str, pd.DataFrame],
) -> None:
    """Raise CheckpointError with what differs between two contents of config.json.

    Another version of a library is only a warning.
    """
    for name, version in now["libraries"].items():
        earlier = before["libraries"].get(name, "of an unknown version")
        if earlier != version:
            LOGGER.warning("This run was started with %s %s; now %s", name, earlier, version)
    changed = []
    for name, value in now["parts"].items():
        if before["parts"].get(name, "") != value:
            changed.append(name)
    if not changed:
        return
    differences = _differing_settings(before["config"], now["config"])
    differences += _differing_rows(directory, tables)
    if "model" in changed:
        names = [now["config"]["model_id"], now["config"]["score_model_id"]]
        differences.append(f"files in {' or '.join(filter(None, names))}")
    what = "; ".join(differences) or "same settings"
    raise CheckpointError(
        f"{directory} was made with other {' and '.join(changed)} ({what}); "
        "choose a new run_name, or delete that folder"
    )


# ======= 8. Running ===============================================================================


# === Final model ==================================================================================
def final_epochs(run: Run) -> int:
    """How many epochs the model on all rows is trained: the median over the folds and seeds.

    Each counts with its best epoch where raw weights are used, and with all the epochs that
    it was trained where averaged ones are.
    """
    kind = select_weights(run)
    epochs = []
    for member in run.finished_members:
        result = read_fold_result(run, member)
        epochs.append(result.best_epoch if kind == "raw" else len(result.history))
    return int(np.median(epochs))


class FinalTrainer(FoldTrainer):
    """One more model, on all rows.

    Nothing is held out, so that nothing about it is measured or chosen.
    """

    def __init__(self, session: Session, run: Run, member: int):
        super().__init__(session, run, member)
        self.epochs = final_epochs(run)  # of the folds' schedule: no more than they had

    def train_epoch(self, epoch: int, first_step: int) -> float:
        """As a fold's. Raises OutOfTime where the time budget ends within the epoch."""
        speed = super().train_epoch(epoch, first_step)
        if self.next_step < self.schedule.phase(epoch).steps:
            raise OutOfTime
        return speed

    def held_out_logits(self) -> np.ndarray:
        """None of them: no row is held out."""
        return np.empty((0, 1, 4))

    def finish(self) -> FoldResult:
        """As a fold's. Raises OutOfTime where epochs are missing; what is done is saved."""
        if len(self.history) < self.epochs:
            self.save(len(self.history), 0)
            raise OutOfTime  # half a schedule, and no row to see what that costs
        return super().finish()


def training_images(run: Run) -> list[pd.DataFrame]:
    """The frames whose images are cached before training: train, extra rows, changed images."""
    frames = [run.train]
    for source, rows in run.extra_rows.groupby("source"):
        # Of the test images all, although only some are trained on: they are scored later.
        frames.append(run.test if source == "test" else rows)
    if run.config.augment_images:
        variants = image_variants(all_rows(run), run.config.augment_images, run.config.seed)
        frames.append(variants)
    return frames


def train_fold(config: Config, fold: int, session: Session | None = None) -> FoldResult:
    """Train one fold of the run at `config.run_dir`, or its final model; continue where it stopped.

    Folds share `session` at most; without one the model is loaded. A fold that is trained
    already is only read. With further seeds `fold` is the number of a member.
    """
    run = Run.open(config.run_dir)
    if run.is_done("train", fold):
        return read_fold_result(run, fold)
    if session is None:
        session = open_session(run.config, run.train.iloc[0])
    for frame in training_images(run):
        fill_vision_cache(session, frame, uses=run.uses_per_image, passes=3)
    if fold_of(run.config, fold) == run.final_fold:
        trainer = FinalTrainer(session, run, fold)
    else:
        trainer = FoldTrainer(session, run, fold)
    try:
        return trainer.fit()
    finally:
        trainer.model.unload()  # the base model is shared: the next fold starts from it, untouched
        clear_memory()


# === Stages =======================================================================================
def stage_zeroshot(session: Session, run: Run, fold: int) -> None:
    """Score `zeroshot_rows` training rows with the untouched base model."""
    count = min(run.config.zeroshot_rows or len(run.train), len(run.train))
    sample = run.train.sample(count, random_state=run.config.seed)
    frame = sample.sort_index().reset_index(drop=True)
    fill_vision_cache(session, run.train, uses=run.uses_per_image, passes=3)
    unfinished = run.directory / "zeroshot.partial.npz"
    checkpoint = open_inference_checkpoint(session, run, unfinished)
    view = TTAView("rotation 0")
    logits = predict_logits(session, frame, [view], "zero-shot", checkpoint)
    write_logits(run.directory / "zeroshot.npz", frame, logits, [view.name], run.fingerprint)
    unfinished.unlink(missing_ok=True)


def open_inference_checkpoint(session: Session, run: Run, path: Path) -> InferenceCheckpoint | None:
    """Where half-done scores are kept, to be continued by a later process.

    None where several processes score together: the others would start anew, and the first
    one would wait for them.
    """
    if process_count() > 1:
        return None
    # The number of batches that are done means nothing under another kind of attention, which
    # has other prompts.
    fingerprint = f"{run.fingerprint} {session.runtime.attention}"
    return InferenceCheckpoint(path, fingerprint, run.config)


def read_pilot(run: Run, fold: int) -> Pilot:
    """The fold's pilot, which was scored with its held-out rows."""
    path = run.fold_dir(fold) / "oof.npz"
    content = read_arrays(path, run.fingerprint, ["pilot_rows", "pilot_logits"])
    return Pilot(content["pilot_rows"], content["pilot_logits"])


def score_rows(
    session: Session,
    run: Run,
    fold: int,
    name: str,
    frame: pd.DataFrame,
    views: Sequence[TTAView],
    kind: str,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(scores (n, views, 4) with the adapter that is loaded, arrays to store beside them).

    From where an earlier process stopped. `name` is of the scores' file (oof, test), `kind` of
    the weights (raw, ema, swa).
    """
    directory = run.fold_dir(fold)
    label = f"fold {member_name(run.config, fold)} {name}"
    path = directory / f"{name}.{kind}.partial.npz"
    checkpoint = open_inference_checkpoint(session, run, path)
    if not run.config.doubt_steps:
        return predict_logits(session, frame, views, label, checkpoint), {}
    pilot = read_pilot(run, fold) if name == "test" else None
    found = predict_in_steps(session, frame, views, label, checkpoint, pilot)
    return found.logits, found.row_arrays() if name == "oof" else {}


def ensure_adapter(session: Session, run: Run, fold: int, kind: str, retrain: bool) -> None:
    """Train the fold again from its last checkpoint where that adapter is damaged.

    Raises CheckpointError instead where `retrain` is false: the session's base model is then
    another than the adapter was trained on.
    """
    problem = adapter_problem(run, fold, kind)
    if not problem:
        return
    (run.fold_dir(fold) / "result.json").unlink()
    if not retrain:
        raise CheckpointError(f"{problem}; run again to make it anew from the last checkpoint")
    LOGGER.warning("%s: made anew from the last checkpoint", problem)
    train_fold(run.config, fold, session)


@dataclass(frozen=True)
class ScoringTask:
    """Rows to be scored, and the file that gets their scores."""

    name: str  # of the file: oof or test, and "_16bit" where the base model is unquantised
    frame: pd.DataFrame  # the rows
    images: pd.DataFrame  # rows whose images are cached before, these among them
    has_tokens: bool  # whether the prompts' lengths are stored, for the error analysis


def scoring_tasks(run: Run, fold: int, ending: str) -> list[ScoringTask]:
    """The fold's held-out rows and all test rows."""
    is_held_out = run.train["fold"] == fold_of(run.config, fold)
    held_out = run.train[is_held_out].reset_index(drop=True)
    oof_name = f"oof{ending}"
    return [
        ScoringTask(oof_name, held_out, run.train, has_tokens=oof_name == "oof"),
        ScoringTask(f"test{ending}", run.test, run.test, has_tokens=False),
    ]


def stage_predict(session: Session, run: Run, fold: int, ending: str = "") -> None:
    """Score the fold's held-out rows and all test rows in every view.

    With the selected kind of weights, or with the mean of several kinds. `ending` is that of
    the files' names; where it is not empty, the session's base model is unquantised.
    """
    directory = run.fold_dir(fold)
    views = all_views(run.config, session.processor)
    tasks = scoring_tasks(run, fold, ending)
    kinds = run.selected_weights
    for kind in kinds:
        ensure_adapter(session, run, fold, kind, retrain=not ending)
    scores = defaultdict(list)  # task's name -> scores of each kind of weights so far
    for kind in kinds:
        adapted = load_adapter(session.model, directory / f"adapter_{kind}")
        use_fast_layers(session, adapted, sum(len(task.frame) for task in tasks))
        try:
            for task in tasks:
                uses = len(members_of(run.config, run.config.folds_to_train))
                fill_vision_cache(session, task.images, uses=uses, passes=1)
                kind_scores, facts = score_rows(
                    session, run, fold, task.name, task.frame, views, kind
                )
                scores[task.name].append(kind_scores)
                if kind == kinds[-1]:
                    mean = np.mean(scores[task.name], axis=0)
                    write_task_scores(session, run, fold, task, mean, views, facts)
        finally:
            adapted.unload()
    # Not before all is done: a process that starts again begins with the first of them.
    for task in tasks:
        for path in directory.glob(f"{task.name}.*partial.npz"):
            path.unlink()


def write_task_scores(
    session: Session,
    run: Run,
    fold: int,
    task: ScoringTask,
    logits: np.ndarray,
    views: Sequence[TTAView],
    facts: Mapping[str, np.ndarray],
) -> None:
    """Write a task's logits (n, views, 4) and `facts` as <name>.npz into the fold's folder."""
    is_16_bit = task.name.endswith("_16bit")
    view_names = []
    for view in views:
        view_names.append(view.name + SUFFIX_16_BIT if is_16_bit else view.name)
    row_facts = dict(facts)
    if task.has_tokens:
        row_facts["tokens"] = prompt_tokens(session, task.frame)
    path = run.fold_dir(fold) / f"{task.name}.npz"
    write_logits(path, task.frame, logits, view_names, run.fingerprint, **row_facts)


def stage_base(session: Session, run: Run, fold: int) -> None:
    """Score the fold's held-out rows and its share of the test rows by the untouched base model.

    In every view that all rows have: which of them are admitted is not known to a process that
    has only this fold's scores.
    """
    views = views_of_all_rows(run.config, session.processor)
    held_out = run.train[run.train["fold"] == fold].reset_index(drop=True)
    test_rows = run.base_test_rows(fold)
    tasks = [
        ScoringTask("base_oof", held_out, held_out, has_tokens=False),
        ScoringTask("base_test", test_rows, test_rows, has_tokens=False),
    ]
    use_fast_layers(session, session.model, sum(len(task.frame) for task in tasks))
    for task in tasks:
        fill_vision_cache(session, task.images, uses=1, passes=1)
        path = run.fold_dir(fold) / f"{task.name}.base.partial.npz"
        checkpoint = open_inference_checkpoint(session, run, path)
        label = f"fold {fold} {task.name}"
        logits = predict_logits(session, task.frame, views, label, checkpoint)
        write_task_scores(session, run, fold, task, logits, views, {})
    for task in tasks:
        (run.fold_dir(fold) / f"{task.name}.base.partial.npz").unlink(missing_ok=True)


# === Running stages ===============================================================================
def stage_train(session: Session, run: Run, fold: int) -> None:
    """Train the fold, or the final model."""
    train_fold(run.config, fold, session)


def stage_rescore(session: Session, run: Run, fold: int) -> None:
    """Score the fold's rows once more, by the unquantised base model."""
    stage_predict(session, run, fold, ending="_16bit")


# What does a stage for a member; STAGE_FILES has the file that it writes last.
STAGES = {
    "zeroshot": stage_zeroshot,
    "train": stage_train,
    "predict": stage_predict,
    "base": stage_base,
    "rescore": stage_rescore,
}
# Beside the weights: the activations of a question in all choice orders, and the adapter.
SCORING_GIB = 0.5


def fits_in_16_bits(config: Config, free: float) -> tuple[bool, str]:
    """Whether the unquantised base model fits into `free` GiB to score rows, and the figures.

    Computed from the model's shapes, for any family of models; no weight is loaded.
    """
    runtime = detect_runtime(config.precision, config.attn_implementation)
    shapes = transformers.AutoConfig.from_pretrained(
        config.rescoring.model_path,
        trust_remote_code=config.trust_remote_code,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(shapes)
    bytes_each = getattr(torch, DTYPES[runtime.precision]).itemsize
    needed = model.num_parameters() * bytes_each / 2**30 + SCORING_GIB
    if config.spread_model:
        free = SPREAD_MEMORY_SHARE * sum(gpu["memory_gib"] for gpu in runtime.gpus)
    figures = f"{needed:.2f} GiB for the unquantised model, {free:.2f} GiB free"
    if needed > free:
        return False, f"does not fit by computation: {figures}"
    return True, figures


def example_prompt(session: Session, row: Mapping) -> str:
    """The rendered prompt of one question."""
    config = session.config
    context = shown_context(config, session.processor, row)
    messages = build_messages(row, templates=prompt_templates(config), context=context)
    return render_prompt(session.processor, messages)


def _count_cut_contexts_of(run: Run, session: Session) -> int:
    """Rows of the run whose context is cut, logged."""
    rows = pd.concat([run.train, run.test])
    count = count_cut_contexts(run.config, session.processor, rows)
    text = "Decision: context is cut to context_tokens=%d in %d of %d rows"
    LOGGER.info(text, run.config.context_tokens, count, len(rows))
    return count


def check_run_prompt(run: Run, session: Session) -> None:
    """Keep the first training row's prompt in prompt.json, or compare it with the one there.

    It changes with the model's chat template, the way that it is rendered, and the wordings of
    this module. Raises CheckpointError where it is another: nothing is trained or scored with
    two kinds of prompts.
    """
    path = run.directory / "prompt.json"
    prompt = example_prompt(session, run.train.iloc[0])
    if path.exists():
        try:
            before = read_json(path, ["prompt"])["prompt"]
        except DamagedFileError as error:
            LOGGER.warning("Written anew: %s", error.problem)
        else:
            if before == prompt:
                return
            raise CheckpointError(
                f"{path}: this run's prompts were rendered otherwise, by another chat template of "
                f"{session.config.model_id} or another version of this file; choose a new "
                f"run_name, or delete that folder\n--- before:\n{before}\n--- now:\n{prompt}"
            )
    options = template_options(session.processor)
    content = {"prompt": prompt, "chat_template": options_as_text(options)}
    if run.config.context_tokens:
        content["cut_contexts"] = _count_cut_contexts_of(run, session)
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False))


def open_stage_session(run: Run, stage: str, folds: Sequence[int], progress: Callable) -> Session:
    """The worker's session: the run's model, for the stage "rescore" without quantisation."""
    config = run.config
    if stage == "rescore":
        config = config.rescoring
    session = open_session(config, run.train.iloc[0])
    check_run_prompt(run, session)
    session.progress = progress
    session.assigned_folds = folds
    if process_count() > 1:
        # Processes that share a fold come last: they leave time for what the single devices
        # have still to score.
        session.assigned_folds = members_of(run.config, run.config.folds_to_train)
    session.seconds_per_question = run.seconds_per_question()
    return session


def seconds_needed(
    run: Run,
    session: Session,
    stage: str,
    fold: int,
    longest: Mapping[str, float],
) -> float:
    """Seconds that must be left for a stage that can be left out.

    Minus infinity for what a submission needs. `longest`: stage -> the most seconds that it
    has taken for a fold.
    """
    if stage == "rescore":
        return 1.25 * longest["predict"]
    if stage == "base":
        questions = base_questions(run, session) / process_count()
        return 1.25 * session.seconds_per_question * questions
    if stage != "train" or not run.finished_folds:
        return -math.inf
    more_rows = 1.0  # the final model is trained on the rows that a fold holds out, too
    if fold_of(run.config, fold) == run.final_fold:
        more_rows = run.config.n_folds / (run.config.n_folds - 1)
    scoring = inference_seconds(run, session.seconds_per_question, session, training=1)
    return scoring + longest["train"] * more_rows


def write_notes(run: Run, session: Session) -> None:
    """Move what did not go to plan from the session to events.jsonl."""
    count = session.vision_cache.recomputed_in_fp32
    if count:
        session.add_note(
            f"vision features of {count} images were not finite and recomputed in fp32"
        )
        session.vision_cache.recomputed_in_fp32 = 0
    with contextlib.suppress(OSError):  # the disk may be full: the error to see is another one
        for text in session.notes:
            MetricLogger(run.directory / "events.jsonl").log(event=text)
    session.notes.clear()


def stage_seconds(run: Run) -> defaultdict[str, float]:
    """Stage -> the most seconds that it has taken for a fold; 0 for one that was never done."""
    longest = defaultdict(float)
    for record in read_json_lines(run.directory / "stages.jsonl", STAGE_RECORD):
        stage = record["label"].split()[0]
        longest[stage] = max(longest[stage], record["seconds"])
    return longest


def can_rescore(run: Run) -> bool:
    """Whether every process has room for the unquantised model; the reason is logged."""
    fits, figures = fits_in_16_bits(run.config, free_gib())
    LOGGER.info("Decision: scoring in 16 bits: %s", figures)
    if not any_process(not fits):
        return True
    event = f"scoring in 16 bits was left out: {figures}"
    MetricLogger(run.directory / "events.jsonl").log(event=event)
    return False


def run_stage(
    run: Run,
    session: Session,
    stage: str,
    fold: int,
    longest: defaultdict[str, float],
) -> None:
    """Do a stage for one fold and log its time and memory; left out, with a note, without time."""
    label = f"{stage} fold {member_name(run.config, fold)}"
    if stage == "zeroshot":
        label = stage
    try:
        needed = seconds_needed(run, session, stage, fold, longest)
        if any_process(run.seconds_left() < needed):
            time_needed = duration_in_words(max(1, needed))
            session.add_note(
                f"{label} was left out: the time budget has no {time_needed} left for it"
            )
            return
        with track_peak_memory(label) as report:
            STAGES[stage](session, run, fold)
    except OutOfTime:
        session.add_note(
            f"{label} was left out: the time budget ended before its training, on all rows, did"
        )
        return
    finally:
        write_notes(run, session)
    report["seconds_per_question"] = session.seconds_per_question
    longest[stage] = max(longest[stage], report["seconds"])
    MetricLogger(run.directory / "stages.jsonl").log(**report)
    back_up(run, fold)
    back_up(run)


def align_rows_of(run: Run, progress: Callable) -> None:
    """The stage "alignment": scores of all rows by `alignment_model`, and the two files of them.

    What was scored before by this model, for the notebook's section 3 for one, is only copied.
    """
    config = run.config
    rows = pd.concat([run.train, run.test], ignore_index=True)
    with track_peak_memory("alignment") as report:
        if prepare_alignment(rows, config):
            fill_alignment(alignment_folder(config), progress)
        for name, frame in (("train", run.train), ("test", run.test)):
            logits = kept_alignment_scores(frame, config)[:, None]
            path = run.directory / ALIGNMENT_FILES[name]
            write_logits(path, frame, logits, [config.alignment_model], run.fingerprint)
    MetricLogger(run.directory / "stages.jsonl").log(**report)
    back_up(run)


def waiting_folds(run: Run, stage: str, folds: Sequence[int]) -> list[int]:
    """Those of `folds` that wait for `stage`; none for "base" where it is decided against."""
    if stage != "base":
        return run.unfinished_folds(stage, folds)
    # The base model is the same for all seeds, and no model on all rows has rows of its own.
    of_first_seed = [fold for fold in folds if fold in run.finished_folds]
    unfinished = [fold for fold in of_first_seed if not run.is_done("base", fold)]
    if not unfinished:
        return []
    is_wanted, reason = wants_base_member(run)
    LOGGER.info("Decision: base model as a member: %s, %s", "yes" if is_wanted else "no", reason)
    return unfinished if is_wanted else []


def run_stages(run: Run, folds: Sequence[int], stages: Sequence[str], progress: Callable) -> None:
    """Do what is missing of `stages` for `folds`, which are numbers of members.

    The model is loaded at most once, and for the stage "rescore" once more.
    """
    session = None
    longest = stage_seconds(run)
    for stage in stages:
        if stage == "alignment":
            align_rows_of(run, progress)
            continue
        if stage == "predict":
            select_weights(run)
        waiting = waiting_folds(run, stage, folds)
        if not waiting:
            continue
        if stage == "rescore":
            session = None  # one model at a time
            clear_memory(LOGGER)
            if not can_rescore(run):
                continue
        for fold in waiting:
            if session is None:
                session = open_stage_session(run, stage, folds, progress)
            run_stage(run, session, stage, fold, longest)


# === Devices and jobs =============================================================================
CPU_CORE = "cpu core"  # a device: one core of a machine without a GPU
GROUP_SPEED = 0.9  # of n devices that share a fold, against n times the speed of one
SMALL_MODEL_GIB = 0.5  # weights of a model of which every worker on a CPU may hold a copy
SMALL_WORKER_GIB = 2  # memory of such a worker, with its libraries; the demo's takes 1 GiB


class WorkerJob(NamedTuple):
    """Folds, or members, that one device takes, or that several devices share."""

    # GPU numbers such as "0" or, for one model over several, "0,1"; the name of a part of a GPU,
    # MIG-...; CPU_CORE; or None, for all CPU cores.
    devices: tuple[str | None, ...]
    folds: tuple[int, ...]


def is_small_model(config: Config) -> bool:
    """Whether several workers on a CPU may hold a copy each; False where its size is unknown."""
    weights = list(Path(config.model_path).glob("*.safetensors"))
    size = sum(path.stat().st_size for path in weights)
    return 0 < size <= SMALL_MODEL_GIB * 2**30


def worker_devices(config: Config) -> list[str | None]:
    """What each worker sees: one GPU, by its number, or a part of one, or all GPUs.

    Without a GPU: a worker of one thread for each fold, where the model is small, else one
    worker with all cores (None).
    """
    gpus = detect_runtime(config.precision, config.attn_implementation).gpus
    numbers = [str(gpu["index"]) for gpu in gpus]
    if not numbers:
        if is_small_model(config):
            return [CPU_CORE] * cpu_worker_count(len(config.folds_to_train))
        return [None]
    if config.spread_model:
        return [",".join(numbers)]
    return numbers


def cpu_worker_count(n_folds: int) -> int:
    """How many workers of one thread train `n_folds` folds side by side.

    One for each fold, even where the cores are fewer: they share the cores evenly, and none
    is idle while the last fold trains. Where memory is short, one for each core.
    """
    fit_in_memory = int(psutil.virtual_memory().available / 2**30 / SMALL_WORKER_GIB)
    return min(n_folds, max(usable_cores(), fit_in_memory))


def usable_cores() -> int:
    """CPU cores that this process may run on; a container's CPU quota is not known here."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def schedule_folds(folds: Sequence[int], devices: Sequence[str | None]) -> list[list[WorkerJob]]:
    """Rounds of jobs, one after the other; the jobs of a round run side by side.

    Each device takes whole folds. The folds that would leave some of the devices idle are
    trained by all of them together, unless that takes longer. CPU cores never share a fold,
    because the sums of its gradients would then depend on their number; nor do parts of GPUs,
    between which NCCL has no way.

    >>> for jobs in schedule_folds([0, 1, 2], ["0", "1"]):
    ...     print([(job.devices, job.folds) for job in jobs])
    [(('0',), (0,)), (('1',), (1,))]
    [(('0', '1'), (2,))]
    >>> for jobs in schedule_folds([0, 1, 2], [CPU_CORE, CPU_CORE]):
    ...     print([job.folds for job in jobs])
    [(0, 2), (1,)]
    """
    n_shared = len(folds) % len(devices)
    # A group of n devices trains the shared folds in n_shared / (0.9 n) of the time of one fold;
    # from 1 on, sharing gains nothing.
    has_parts = any(map(is_part_of_gpu, devices))
    if CPU_CORE in devices or has_parts or n_shared >= GROUP_SPEED * len(devices):
        n_shared = 0
    whole_folds = folds[: len(folds) - n_shared]
    single_jobs = []
    for number, device in enumerate(devices):
        folds_of_device = tuple(whole_folds[number :: len(devices)])
        if folds_of_device:
            single_jobs.append(WorkerJob((device,), folds_of_device))
    shared_jobs = []
    if n_shared:
        shared_folds = tuple(folds[len(whole_folds) :])
        shared_jobs.append(WorkerJob(tuple(devices), shared_folds))
    return [jobs for jobs in (single_jobs, shared_jobs) if jobs]


class Launch(NamedTuple):
    """Jobs that run side by side, and the stages that each of them does for its folds."""

    jobs: list[WorkerJob]
    stages: list[str]


def jobs_of_first_seed(config: Config, jobs: Sequence[WorkerJob]) -> list[WorkerJob]:
    """The jobs without members of further seeds: for the base model, which all seeds share.

    >>> config = Config(n_folds=2, seeds=(42, 7))
    >>> jobs_of_first_seed(config, [WorkerJob(("0",), (0, 3)), WorkerJob(("1",), (4,))])
    [WorkerJob(devices=('0',), folds=(0,))]
    """
    kept = []
    for job in jobs:
        folds = tuple(fold for fold in job.folds if fold in config.folds_to_train)
        if folds:
            kept.append(WorkerJob(job.devices, folds))
    return kept


def planned_launches(config: Config, devices: Sequence[str | None]) -> list[Launch]:
    """What `run_folds` starts, one launch after the other.

    >>> config = Config.preset("demo", n_folds=3)
    >>> for jobs, stages in planned_launches(config, [CPU_CORE, CPU_CORE]):
    ...     print([job.folds for job in jobs], stages)
    [(0, 2), (1,)] ['train']
    [(0, 2), (1,)] ['predict']
    [(0, 2), (1,)] ['base']
    """
    rounds = schedule_folds(members_of(config, config.folds_to_train), devices)
    scoring = ["predict"]
    # Last, for all folds, come what a submission can do without.
    if config.use_base_member != "off":
        scoring.append("base")  # while its model is still loaded; may be decided against
    if config.score_precision == "16bit":
        scoring.append("rescore")
    launches = []
    if len(rounds) == 1 and len(rounds[0]) == 1:
        launches.append(Launch(rounds[0], ["train", *scoring]))
    else:
        # Weights are selected on all folds together, so that scoring starts new workers. A
        # single job, above, has all folds: its workers go on with the model that they have loaded.
        for stage in ["train", *scoring]:
            for jobs in rounds:
                waiting = jobs_of_first_seed(config, jobs) if stage == "base" else jobs
                if waiting:
                    launches.append(Launch(waiting, [stage]))
    if config.final_retrain:
        for jobs in schedule_folds(members_of(config, [config.n_folds]), devices):
            stages = [stage for stage in ["train", *scoring] if stage != "base"]
            launches.append(Launch(jobs, stages))
    return launches


# === Workers ======================================================================================
GROUP_GRACE_SECONDS = 5  # between the end of one process of a group and that of the others
# Exit status of a worker that was asked to stop and has saved its work (EX_TEMPFAIL).
INTERRUPTED = 75


# What libraries write into the log of any worker, also of one that does well.
HARMLESS_OUTPUT = (
    r"^.*\d+%\|.*\n",  # a progress bar
    r"^.*(?:Future|Deprecation)Warning: .*\n(?:  .*\n)?",  # with the line of code below it
    r"^Failed to load CPU \w+ from kernels-community.*\n",
    r"^.*`torch_dtype` is deprecated.*\n",
    r"^.*unauthenticated requests to the HF Hub.*\n",
    r"^The fast path is not available because.*\n",
    r"^huggingface/tokenizers: The current process just got forked.*\n(?:.*TOKENIZERS_\w+.*\n|"
    r"To disable this warning.*\n|\t- Avoid using `tokenizers`.*\n)*",
    r"^.*destroy_process_group\(\) was not called.*\n",
)


def log_tail(text: str, lines: int = 25) -> str:
    """The last `lines` lines of a log, without progress bars and known harmless warnings.

    >>> log_tail("Loading weights: 100%|####| 97/97\\nValueError: no such row")
    'ValueError: no such row'
    """
    text = text.replace("\r", "\n") + "\n"
    for pattern in HARMLESS_OUTPUT:
        text = re.sub(pattern, "", text, flags=re.MULTILINE)
    kept = [line for line in text.splitlines() if line.strip()]
    return "\n".join(kept[-lines:])


def device_environment(device: str | None) -> dict[str, str]:
    """Environment variables of a process on a device: GPUs ("0", "0,1"), a core, or None."""
    environment = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # batches differ in size
        **os.environ,
    }
    if device == CPU_CORE:
        # A second thread gains nothing on a small model, and waits for its core by spinning.
        environment["OMP_NUM_THREADS"] = "1"
    elif device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(device)
        environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # nvidia-smi's numbers
    return environment


def process_group_environments(devices: Sequence[str | None]) -> list[dict[str, str]]:
    """Environment variables of one process per device.

    Its device and, where there are several, how the processes find each other.
    """
    environments = [device_environment(device) for device in devices]
    if len(devices) == 1:
        return environments
    with socket.socket() as probe:  # finds a free port
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank, environment in enumerate(environments):
        environment["MASTER_ADDR"] = "127.0.0.1"
        environment["MASTER_PORT"] = str(port)
        environment["LOCAL_RANK"] = "0"  # each process sees one GPU only
        environment["RANK"] = str(rank)
        environment["WORLD_SIZE"] = str(len(devices))
    return environments


class LiveText:
    """Lines that replace each other: in one output of a notebook cell, or one of a terminal."""

    def __init__(self):
        ipython = sys.modules.get("IPython")
        in_notebook = ipython is not None and ipython.get_ipython() is not None
        self.output = None  # of the cell; None in a terminal
        if in_notebook:
            self.output = ipython.display.display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, lines: Sequence[str]) -> None:
        """Show these lines instead of those before."""
        if self.output is not None:
            self.output.update({"text/plain": "\n".join(lines)}, raw=True)
        else:
            sys.stdout.write("\r" + " | ".join(lines))  # over the line that was written before


def _progress_line(path: Path, name: str, elapsed: float) -> str:
    """A progress bar of the process `name`, from the file that it writes."""
    if not path.exists():
        return f"{name} starting, {elapsed:.0f} s"
    state = json.loads(path.read_text(encoding="utf-8"))
    stage = state.pop("stage")
    done = state.pop("done")
    total = state.pop("total")
    details = ", ".join(f"{key}={value}" for key, value in state.items())
    return tqdm.format_meter(
        done,
        total,
        elapsed,
        prefix=f"{name} {stage}",
        postfix=details,
        bar_format="{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} in {elapsed}{postfix}",
    )


def _end_broken_groups(
    groups: Sequence[Sequence[subprocess.Popen]],
    killed: list[subprocess.Popen],
) -> bool:
    """Kill the processes of a group that would wait for ever for one that failed.

    Returns whether any process was still running. `killed` gets those that are killed here.
    """
    is_running = False
    for processes in groups:
        states = {process.poll() for process in processes}
        if None not in states:
            continue
        is_running = True
        if states - {None, 0, INTERRUPTED}:
            time.sleep(GROUP_GRACE_SECONDS)
            waiting = [process for process in processes if process.poll() is None]
            for process in waiting:
                process.kill()
            killed += waiting
    return is_running


def _show_progress(
    run: Run,
    groups: Sequence[Sequence[subprocess.Popen]],
    stop: Callable,
    killed: list[subprocess.Popen],
) -> None:
    """Show what every worker is doing until all have ended, or until `stop()`.

    `killed` is as in `_end_broken_groups`.
    """
    live_text = LiveText()
    downloads = [DownloadWatch(path) for path in run.config.model_paths]
    count = sum(len(processes) for processes in groups)
    paths = {f"worker {number}": _progress_path(run, number) for number in range(count)}
    started = time.monotonic()
    is_running = True
    while is_running and not stop():
        is_running = _end_broken_groups(groups, killed)
        live_text.show(progress_lines(paths, downloads, time.monotonic() - started))
        if is_running:
            time.sleep(1)


def progress_lines(
    paths: Mapping[str, Path],
    downloads: Sequence[DownloadWatch],
    elapsed: float,
) -> list[str]:
    """A line for each process, from its progress file, and one for each model that arrives.

    `paths`: name -> progress file.
    """
    lines = [_progress_line(path, name, elapsed) for name, path in paths.items()]
    lines += [download.line() for download in downloads]
    return [line for line in lines if line]


PROCESS_POLL_SECONDS = 1  # between two looks at a process


def watch_process(process: subprocess.Popen, name: str, progress: Path, config: Config) -> int:
    """Show how far a process of that name is until it ends; its exit status.

    `progress` is its progress file, `config` says which model it may download. It is asked to
    end where this process is interrupted.
    """
    live_text = LiveText()
    downloads = [DownloadWatch(config.model_path)]
    started = time.monotonic()
    try:
        while process.poll() is None:
            elapsed = time.monotonic() - started
            live_text.show(progress_lines({name: progress}, downloads, elapsed))
            time.sleep(PROCESS_POLL_SECONDS)
    finally:  # reached by a KeyboardInterrupt, too
        process.terminate()
        status = process.wait()
    return status


def _start_worker(
    run: Run,
    number: int,
    folds: Sequence[int],
    stages: Sequence[str],
    environment: Mapping[str, str],
) -> subprocess.Popen:
    """Start worker number `number` of the run; its output goes to worker_<number>.log."""
    command = [sys.executable, __file__, "worker"]
    command += ["--run", str(run.directory)]
    command += ["--name", str(number)]
    command += ["--folds", ",".join(map(str, folds))]
    command += ["--stages", ",".join(stages)]
    command += ["--parent", str(os.getpid())]
    _progress_path(run, number).unlink(missing_ok=True)
    with _worker_log(run, number).open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def _worker_log(run: Run, number: int) -> Path:
    return run.directory / f"worker_{number}.log"


def _progress_path(run: Run, number: int) -> Path:
    return run.directory / f"progress_{number}.json"


def launch_workers(
    run: Run,
    jobs: Sequence[WorkerJob | tuple],
    stages: Sequence[str],
    stop: Callable = lambda: False,
) -> None:
    """Start a worker for each device of each job, show their progress and wait for them.

    Several devices of one job share its folds (data parallel). Where `stop()` becomes true the
    workers save and end. Raises RuntimeError with the last lines of the logs of workers that
    failed; Interrupted where any was asked to stop, be it by `stop()`.
    """
    groups = []  # the processes of each job
    processes = []  # all of them, by number
    for devices, folds in jobs:
        group = []
        for environment in process_group_environments(devices):
            process = _start_worker(run, len(processes), folds, stages, environment)
            group.append(process)
            processes.append(process)
        groups.append(group)
    killed = []  # by us, because another process of their group had ended
    try:
        _show_progress(run, groups, stop, killed)
    finally:  # reached by a KeyboardInterrupt too: the workers save and end
        for process in processes:
            process.terminate()
        statuses = [process.wait() for process in processes]
    ends = []
    for number, (process, status) in enumerate(zip(processes, statuses, strict=True)):
        if status not in (0, INTERRUPTED):
            end = exit_in_words(status)
            if process in killed:
                end = "was ended, because another one of its group had stopped"
            log = _worker_log(run, number)
            ends.append(f"Worker {number} {end}. End of {log}:")
            ends.append(log_tail(log.read_text("utf-8", "replace")))
    if ends:
        raise RuntimeError(
            "A worker stopped. Run the cell again to continue where it was.\n" + "\n".join(ends)
        )
    if INTERRUPTED in statuses:
        raise Interrupted(
            "A worker was asked to stop. Its work is saved: run the cell again to continue."
        )


def run_zeroshot(run: Run) -> pd.DataFrame:
    """Score the base model in a worker; rows and accuracy by question type, and over all."""
    if not run.is_done("zeroshot", 0):
        device = worker_devices(run.config)[0]
        launch_workers(run, [WorkerJob((device,), (0,))], ["zeroshot"])
    content = read_arrays(run.directory / "zeroshot.npz", run.fingerprint)
    scores = content["logits"][:, 0]  # of the one view
    correct = softmax(scores).argmax(1) == content["labels"]
    types = run.train.set_index("id").loc[content["ids"], "type"]
    table = accuracy_by_type(types, correct)
    table.loc["all"] = [len(correct), correct.mean()]
    return table.astype({"rows": int})


def note_start(run: Run) -> None:
    """Write session.json, from which the time budget counts, and log what is left of it."""
    content = json.dumps({"started": session_start()})
    atomic_write(run.directory / "session.json", content)
    left = run.seconds_left()
    if left <= 0:
        LOGGER.warning(
            "The time budget ended %s ago: folds that are not trained yet get as little training "
            "as possible. Better interrupt this cell, and begin a new session or raise "
            "time_budget_hours; then run all again",
            duration_in_words(-left),
        )
    elif left < math.inf:
        LOGGER.info("Time budget: %s left", duration_in_words(left))


def launch_alignment(run: Run) -> None:
    """Do the stage "alignment" in a worker; left out, with a note, where the time ends before it.

    It comes last, as what a submission can do without. Where all rows were aligned before, their
    scores are only copied, for which there is always time.
    """
    is_work_left = prepare_alignment(pd.concat([run.train, run.test]), run.config)

    def is_time_up() -> bool:
        return is_work_left and run.seconds_left() <= 0

    try:
        if not is_time_up():
            job = WorkerJob((worker_devices(run.config)[0],), (0,))
            launch_workers(run, [job], ["alignment"], is_time_up)
            return
    except Interrupted:
        if not is_time_up():
            raise  # somebody else has stopped it
    event = "alignment was left out: the time budget ended before all rows had their scores"
    MetricLogger(run.directory / "events.jsonl").log(event=event)


def run_folds(config: Config) -> list[FoldResult]:
    """Train and predict all folds of the run at `config.run_dir`, as `schedule_folds` says.

    Each of them once for each seed, those of the first seed first. What is done already is
    skipped, and what was interrupted is continued.
    """
    run = Run.open(config.run_dir)
    delete_damaged_files(run)
    note_start(run)
    for jobs, stages in planned_launches(config, worker_devices(config)):
        folds = list(itertools.chain.from_iterable(job.folds for job in jobs))
        if any(waiting_folds(run, stage, folds) for stage in stages):
            launch_workers(run, jobs, stages)
    if run.finished_members and not run.selected_weights:  # all is scored, but the file was damaged
        select_weights(run)
    if run.config.alignment_model and not run.is_done("alignment", 0):
        launch_alignment(run)
    return [read_fold_result(run, member) for member in run.finished_members]


# === Processes beside a run =======================================================================
# Not a worker: it has no run, but a folder with its config.json and the table that it works on.
# What it has done is there, too, and a second process goes on from it.
def run_side_process(
    command: str,
    doing: str,
    config: Config,
    folder: Path,
    device: str | None,
) -> None:
    """Run the process `command` of this file on a folder, and show how far it is.

    `doing` says in the errors what it does; `device` is one of `worker_devices`. Raises
    RuntimeError with the end of its log where it fails, and Interrupted where it was asked to
    stop.
    """
    progress = folder / "progress.json"
    log = folder / "worker.log"
    arguments = [sys.executable, __file__, command]
    arguments += ["--folder", str(folder)]
    arguments += ["--parent", str(os.getpid())]
    progress.unlink(missing_ok=True)
    with log.open("ab") as file:
        environment = device_environment(device)
        process = subprocess.Popen(arguments, stdout=file, stderr=file, env=environment)
    status = watch_process(process, doing.lower(), progress, config)
    if status == INTERRUPTED:
        raise Interrupted(f"{doing} was stopped. Run the cell again to go on with the rest.")
    if status != 0:
        raise RuntimeError(
            f"{doing} stopped. Run the cell again to go on with the rest.\n"
            f"Its process {exit_in_words(status)}. End of {log}:\n"
            f"{log_tail(log.read_text('utf-8', 'replace'))}"
        )


# === Transcripts ==================================================================================
# The base model reads out what is written in the images, once for each image. That is a context
# file: every question about the image then has these words in front of it.
TRANSCRIPT_TOKENS = 96  # of an image's text at most
TRANSCRIPT_REQUEST = (
    "이미지에 보이는 글자와 숫자를 모두 그대로 옮겨 적으세요. "
    "설명하지 말고, 글자가 없으면 아무것도 쓰지 마세요."
)
# Settings that decide what is read, and those that decide how.
_READING_SETTINGS = (
    "model_id",
    "quantization",
    "precision",
    "attn_implementation",
    "spread_model",
    "image_size",
    "min_pixels",
    "max_pixels",
)
_READER_SETTINGS = (
    "use_batch_inference",
    "infer_batch_size",
    "deterministic",
    "strict_determinism",
    "cache_dir",
    "log_level",
    "trust_remote_code",
)
_TRANSCRIPT_COLUMNS = ("id", "question", *CHOICES, "image_path", "width", "height", "pixel_hash")


def _transcripts_in(folder: Path) -> KeptResults:
    """pixel_hash -> text of every image that was read in this folder."""
    return KeptResults(folder / "texts.jsonl", "texts")


def transcript_messages(image_path: str) -> list[dict]:
    """Chat messages that ask for an image's text."""
    content = [
        {"type": "image", "image": image_path},
        {"type": "text", "text": TRANSCRIPT_REQUEST},
    ]
    return [{"role": "user", "content": content}]


def read_images(session: Session, images: pd.DataFrame) -> list[str]:
    """What the model reads in each image, on one line: greedily, all of them in one batch.

    In halves where memory runs out; RuntimeError where one image is too much.
    """
    return in_halves(functools.partial(_read_batch, session), images)


def _read_batch(session: Session, images: pd.DataFrame) -> list[str]:
    """`read_images` in a single pass."""
    processor = session.processor
    budget = pixel_budget(session.config, processor)
    pixels = []
    grids = []
    prompts = []
    for path in images["image_path"]:
        values, grid = prepare_image(load_image(path), processor, budget)
        pixels.append(values)
        grids.append(grid)
        prompts.append(encode_prompt(processor, transcript_messages(path), grid))
    length = max(map(len, prompts))
    padding_id = processor.tokenizer.pad_token_id
    input_ids = pad_left(prompts, length, padding_id)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": pad_left([np.ones_like(ids) for ids in prompts], length, 0),
        "pixel_values": torch.cat(pixels),
        **session.family.images.model_inputs(processor.image_token_id, input_ids, grids),
    }
    inputs = {name: tensor.to(session.device) for name, tensor in inputs.items()}
    with torch.inference_mode():
        sequences = session.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=TRANSCRIPT_TOKENS,
            pad_token_id=padding_id,
        )
    texts = processor.tokenizer.batch_decode(sequences[:, length:], skip_special_tokens=True)
    return [prompt_text(text) for text in texts]


def fill_transcripts(folder: Path, progress: Callable) -> None:
    """What the process of `transcribe_images` does: read the images that its folder asks for."""
    config = Config(**read_json(folder / "config.json"))
    images = read_table(folder / "images.csv", needed=_TRANSCRIPT_COLUMNS)
    session = open_session(config, images.iloc[0])
    budget = pixel_budget(config, session.processor)
    tokens = []
    for width, height in zip(images["width"], images["height"], strict=True):
        grid = image_grid(width, height, session.processor, budget)
        tokens.append(grid_tokens(grid, session.processor))
    images = images.iloc[np.argsort(tokens, kind="stable")[::-1]]  # like sizes need no padding
    size = config.infer_batch_size if config.use_batch_inference else 1
    batches = [images[start : start + size] for start in range(0, len(images), size)]

    def read(batch: pd.DataFrame) -> list[str]:
        return read_images(session, batch)

    kept = _transcripts_in(folder)
    kept.fill(batches, "pixel_hash", read, progress, "reading images")


def _transcript_config(config: Config) -> Config:
    """The settings of the process that reads images: those that it needs, and all others' default.

    With loss "vocabulary" the whole head stays where the model is: any token may be written.
    """
    names = (*_READING_SETTINGS, *_READER_SETTINGS)
    return Config(**{name: getattr(config, name) for name in names}, loss="vocabulary")


def _transcript_folder(config: Config) -> Path:
    """Where texts of the same model, pixels and request are kept, below output_dir."""
    parts = [getattr(config, name) for name in _READING_SETTINGS]
    parts += [_transcript_config(config).model_files, TRANSCRIPT_REQUEST, TRANSCRIPT_TOKENS]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return Path(config.output_dir).resolve() / f"transcripts_{digest[:12]}"


def _rows_to_transcribe(source: Run | Config, types: Sequence[str]) -> pd.DataFrame:
    """Training and test rows of these types that have an image.

    Raises ValueError for an unknown type, DataError where the files share an id.
    """
    for name in types:
        _require_known("question type", name, QUESTION_TYPES)
    tables = source
    if isinstance(source, Config):
        tables = load_competition(
            source.data_dir,
            source.max_fallback_share,
            source.rows_to_use,
            source.seed,
            source.columns,
        )
    shared_ids = set(tables.train["id"]) & set(tables.test["id"])
    if shared_ids:
        raise DataError(
            f"train.csv and test.csv share {len(shared_ids)} ids, such as {min(shared_ids)!r}, so "
            "that a context file cannot tell whose text is meant; give them different ids"
        )
    rows = pd.concat([tables.train, tables.test], ignore_index=True)
    # A table from a run's folder has text where that of a competition has True.
    is_usable = rows["pixel_hash"] != ""
    rows = rows[rows["type"].isin(types) & is_usable]
    if rows.empty:
        raise DataError(f"no row has a question of the types {', '.join(types)}; name others")
    return rows


def transcribe_images(source: Run | Config, types: Sequence[str] = ("ocr",)) -> Path:
    """Write context.csv with what the base model reads in the images of questions of some types.

    `source`: a run, or the config of one. The file, for the setting context_file, has id and
    context of each such row in train.csv and test.csv. It lies in the folder of texts that were
    read by this model at these pixels: an image is read once, and after an interruption only
    those that are left. A worker reads, so that this process never touches the GPU. Raises
    ValueError for an unknown type, DataError where no row is of these types or the two tables
    share an id, RuntimeError with the end of the worker's log where that fails, and Interrupted
    where it was asked to stop.
    """
    config = source.config if isinstance(source, Run) else source
    require_machine(config)
    rows = _rows_to_transcribe(source, types)
    folder = _transcript_folder(config)
    missing = set(rows["pixel_hash"]) - set(_transcripts_in(folder).read())
    images = rows.drop_duplicates("pixel_hash")[[*_TRANSCRIPT_COLUMNS]]
    LOGGER.info("%d of %d images are still to be read", len(missing), len(images))
    if missing:
        write_table(images, folder / "images.csv")
        settings = _transcript_config(config)
        atomic_write(folder / "config.json", json.dumps(dataclasses.asdict(settings)))
        device = worker_devices(config)[0]
        run_side_process("transcribe", "Reading images", settings, folder, device)
    texts = _transcripts_in(folder).read()
    table = rows[["id"]].assign(context=[texts[digest] for digest in rows["pixel_hash"]])
    path = folder / CONTEXT_FILE
    atomic_write(path, csv_text(table))  # verbatim: it is read as the competition's files are
    blank = int((table["context"] == "").sum())
    LOGGER.info("%s: context of %d rows, blank in %d of them", path, len(table), blank)
    return path


# === Alignment scores =============================================================================
def alignment_scores(
    rows: pd.DataFrame,
    config: Config,
    model_id: str = ALIGNMENT_MODEL,
) -> np.ndarray:
    """(n, 4) how well each choice, as a statement with its question, fits the row's image.

    Logits of a SigLIP or CLIP model; -inf for a blank choice, and 0 throughout where the image
    cannot be used. `rows`: of a competition or a run, or any table with their columns. Scores are
    kept below the config's output_dir: what this model has scored is not scored again, and after
    an interruption only what is left. A process of its own scores, so that this one never touches
    the GPU. Raises RuntimeError with the end of its log where it fails, as for a model without a
    tower for texts, and Interrupted where it was asked to stop.
    """
    require_machine(config)
    settings = dataclasses.replace(config, alignment_model=model_id)
    if prepare_alignment(rows, settings):
        device = worker_devices(config)[0]
        folder = alignment_folder(settings)
        run_side_process("align", "Aligning rows", _alignment_config(settings), folder, device)
    return kept_alignment_scores(rows, settings)


def worst_aligned(rows: pd.DataFrame, scores: np.ndarray) -> pd.DataFrame:
    """The rows with an image, those first whose image fits none of their choices.

    Such a row may have the wrong image, or the image the wrong row. `scores` (n, 4) are of
    `alignment_scores`. Beside the columns of the row: `best`, the highest of its scores, and
    `below_type`, how far that is below the median of its question type, because statements of
    some types fit any image better.

    >>> rows = pd.DataFrame({"id": ["q1", "q2", "q3"], "type": "ocr", "pixel_hash": "1"})
    >>> scores = np.array([[1.0, 2, 0, 0], [-3, -4, -5, -6], [0, 3, 1, 1]])
    >>> worst_aligned(rows, scores)[["id", "best", "below_type"]].values.tolist()
    [['q2', -3.0, 5.0], ['q1', 2.0, 0.0], ['q3', 3.0, -1.0]]
    """
    best = np.max(scores, axis=1)
    table = rows.assign(best=best)[(rows["pixel_hash"] != "").to_numpy()]
    usual = table.groupby("type")["best"].transform("median")
    table = table.assign(below_type=usual - table["best"])
    return table.sort_values("below_type", ascending=False, kind="stable", ignore_index=True)


def worst_aligned_html(rows: pd.DataFrame, scores: np.ndarray, count: int = 6) -> str:
    """The first rows of `worst_aligned` as cards with thumbnails."""
    table = worst_aligned(rows, scores).head(count)
    notes = [f"alignment {below:.1f} below its type's median" for below in table["below_type"]]
    return question_cards(table, notes)


# === Search =======================================================================================
# Trials that are drawn at random and not pruned, before the later ones are compared with them.
SEARCH_STARTUP = 4
NOT_SEARCHED = {
    item.name
    for item in dataclasses.fields(Config)
    if item.name in BOOKKEEPING_FIELDS or not item.metadata["declaration"].searched
}


def _search_range(kind: str, values: tuple | list):
    """Optuna's distribution for a field of that kind; None for values that are none.

    [choices], (low, high), or (low, high, "log") above 0.
    """
    if isinstance(values, list):
        return optuna.distributions.CategoricalDistribution(values) if values else None
    if not isinstance(values, tuple):
        return None
    is_log = values[2:] == ("log",)
    if len(values) != (3 if is_log else 2):
        return None
    low, high = values[:2]
    if type(low) not in (int, float) or type(high) not in (int, float):
        return None
    least = 0 if is_log else -math.inf
    if not least < low < high:
        return None
    if "float" in kind:
        return optuna.distributions.FloatDistribution(low, high, log=is_log)
    return optuna.distributions.IntDistribution(low, high, log=is_log)


def search_distributions(config: Config, space: Mapping[str, list | tuple]) -> dict:
    """Optuna's distributions for the fields in `space`.

    Values are [choices], (low, high) or (low, high, "log"). Raises ValueError that names the
    field which cannot be searched, or whose values are none of these, or which refuses them.
    """
    kinds = {}
    for item in dataclasses.fields(Config):
        if item.name not in NOT_SEARCHED:
            kinds[item.name] = str(item.type)
    distributions = {}
    for name, values in space.items():
        if name not in kinds:
            known = ", ".join(sorted(kinds))
            raise ValueError(f"Search space: {name!r} cannot be searched; fields that can: {known}")
        distribution = _search_range(kinds[name], values)
        if distribution is None:
            needed = '[choices], (low, high), or (low, high, "log") above 0'
            raise ValueError(f"Search space: {name!r} is {values!r}; it needs {needed}")
        distributions[name] = distribution
        # A value that the field refuses is found now, not hours later.
        tried = values[:2] if isinstance(values, tuple) else values
        for value in tried:
            dataclasses.replace(config, **{name: value})
    return distributions


@dataclass
class TrialWatch:
    """Follows the epochs of a trial's fold 0, and says when its workers should stop."""

    trial: object  # optuna.Trial
    run: Run  # the trial's own
    deadline: float  # of time.monotonic()
    # Epoch, without those of pretraining -> held-out NLL, as far as they count.
    losses: dict = field(default_factory=dict)
    pruned: bool = False  # whether an epoch was worse than the median; later ones do not count

    def is_pruned(self) -> bool:
        """Read new epochs; whether one before the last is worse than the median of trials."""
        path = self.run.fold_dir(0) / "history.csv"
        if not path.exists():
            return self.pruned
        history = read_table(path, needed=("epoch", "nll"))
        epochs = history["epoch"].map(int)
        losses = history["nll"].map(float)
        config = self.run.config
        for epoch, loss in zip(epochs, losses, strict=True):
            own_epoch = epoch - config.pretrain_epochs
            if not self.pruned and own_epoch > 0 and own_epoch not in self.losses:
                self.losses[own_epoch] = loss
                self.trial.report(loss, own_epoch)
                is_last = own_epoch >= config.num_epochs
                self.pruned = not is_last and self.trial.should_prune()
        return self.pruned

    def should_stop(self) -> bool:
        """Whether the workers should stop: the trial is pruned, or the time is up."""
        return self.is_pruned() or time.monotonic() > self.deadline


def draw_trial(config: Config, distributions: Mapping, earlier: Sequence, path: Path):
    """The next trial, of an Optuna study in memory.

    A function of (seed, its number, earlier trials), or, where a trial was begun, of `path`, its
    config.json. By the tree-structured Parzen estimator (Bergstra et al. 2011), with pruning by
    the median.
    """
    seed = int(seeded_generator(config.seed, "trial", len(earlier)).integers(2**31))
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=SEARCH_STARTUP)
    pruner = optuna.pruners.MedianPruner(SEARCH_STARTUP)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.add_trials(earlier)
    if path.exists():
        settings = read_json(path, ["config"])["config"]
        study.enqueue_trial({name: settings[name] for name in distributions})
    return study.ask(distributions)


def _train_trial(watch: TrialWatch) -> str:
    """Train fold 0 of a trial's run; "" or why it failed. Raises what somebody else has caused."""
    run = watch.run
    if watch.is_pruned() or run.is_done("train", 0):
        return ""
    try:
        for jobs in schedule_folds([0], worker_devices(run.config)):
            launch_workers(run, jobs, ["train"], watch.should_stop)
    except Interrupted:
        if not watch.is_pruned() and time.monotonic() <= watch.deadline:
            raise  # somebody else has stopped it
    except RuntimeError as error:
        if not re.search("FloatingPointError|Out of GPU memory", str(error)):
            raise
        return "diverged or has no room"
    return ""


def run_trial(
    config: Config,
    competition: Competition,
    folds: np.ndarray,
    trial,
    folder: Path,
    deadline: float,
):
    """Train fold 0 with the trial's settings, as a run in `folder`.

    Returns Optuna's record of it, or None where the time was up.
    """
    name = f"trial_{trial.number:03d}"
    place = {"output_dir": str(folder), "run_name": name}
    record = functools.partial(
        optuna.trial.create_trial,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=place,
    )
    states = optuna.trial.TrialState
    try:
        settings = dataclasses.replace(
            config,
            **trial.params,
            **place,
            train_folds=(0,),
            seeds=(),
            backup_dir=None,
        )
    except ValueError as error:  # each value is legal, these together are not
        LOGGER.warning("%s is left out: %s", name, error)
        return record(state=states.FAIL)
    run = start_run(settings, competition, folds)
    watch = TrialWatch(trial, run, deadline)
    problem = _train_trial(watch)
    if problem:
        LOGGER.warning("%s %s: %s", name, problem, trial.params)
        return record(state=states.FAIL)
    if watch.is_pruned():
        loss = watch.losses[max(watch.losses)]
        return record(state=states.PRUNED, value=loss, intermediate_values=watch.losses)
    if not run.is_done("train", 0):
        return None
    loss = min(scores["nll"] for scores in read_fold_result(run, 0).kinds.values())
    return record(state=states.COMPLETE, value=loss, intermediate_values=watch.losses)


def write_search(trials: Sequence, folder: Path) -> pd.DataFrame:
    """Write trials.csv and best_overrides.json into `folder`; returns the table.

    The best trial comes first; a pruned one has the NLL of its last epoch.
    """
    rows = []
    for trial in trials:
        row = {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "nll": trial.value,
            "epochs": len(trial.intermediate_values),
            **trial.params,
        }
        rows.append(row)
    columns = None if rows else ["trial", "state", "nll", "epochs"]
    table = pd.DataFrame(rows, columns=columns)
    # The states in the order of the alphabet: complete, fail, pruned.
    table = table.sort_values(["state", "nll"], kind="stable", ignore_index=True)
    write_table(table, folder / "trials.csv")
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if complete:
        best = min(complete, key=lambda trial: trial.value)
        atomic_write(folder / "best_overrides.json", json.dumps(best.params))
        text = "Best of %d trials: NLL %.4f, OVERRIDES = %s"
        LOGGER.info(text, len(trials), best.value, best.params)
    return table


def _delete_weights(folder: Path, trials: Sequence) -> None:
    """Delete checkpoints and adapters of finished trials: gigabytes that nobody needs now."""
    for trial in trials:
        fold = folder / trial.user_attrs["run_name"] / "fold_0"
        for path in (*fold.glob("checkpoints"), *fold.glob("adapter_*")):
            shutil.rmtree(path)


def search_hyperparameters(
    config: Config,
    competition: Competition,
    folds: np.ndarray,
    space: Mapping,
    trials: int,
    minutes: float,
) -> pd.DataFrame:
    """Search for the settings with the least NLL on fold 0's held-out rows.

    `space`: config field -> [choices], (low, high) or (low, high, "log"). Ends with that many
    trials, or after so many minutes; called again, also after a kill, it goes on with the trial
    it was at. Returns the table of all trials, the best first.

    Everything lies in run_dir/search-*: each trial, a run of its own; trials.db, Optuna's
    storage; trials.csv; best_overrides.json. Needs Optuna: raises ImportError without it.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ImportError(
            "search_hyperparameters needs Optuna, which is not installed: pip install optuna"
        )
    if config.distill_from:
        raise ValueError(
            "Config field 'distill_from': nothing to search by, "
            f"{DISTILLED_WARNING}; search without it"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = search_distributions(config, space)
    deadline = time.monotonic() + 60 * minutes
    searched = f"{config.fingerprint} {sorted(space.items())}"
    key = hashlib.sha256(searched.encode()).hexdigest()[:8]
    folder = config.run_dir.resolve() / f"search-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "search.lock", LOCK_SECONDS):
        study = optuna.create_study(
            storage=f"sqlite:///{folder / 'trials.db'}",
            study_name=key,
            load_if_exists=True,
        )
        while True:
            _delete_weights(folder, study.trials)
            if len(study.trials) >= trials or time.monotonic() > deadline:
                return write_search(study.trials, folder)
            path = folder / f"trial_{len(study.trials):03d}" / "config.json"
            trial = draw_trial(config, distributions, study.trials, path)
            number = trial.number + 1
            LOGGER.info("Search: trial %d of %d: %s", number, trials, trial.params)
            record = run_trial(config, competition, folds, trial, folder, deadline)
            if record is not None:
                study.add_trial(record)  # written at once, whole or not at all
                state = record.state.name.lower()
                LOGGER.info("Search: trial %d: %s, NLL %s", number, state, record.value)


# ======= 9. Command line ==========================================================================

# === Memory by computation ========================================================================
MASK_BYTES = 3  # of True and False, for each pair of positions, while the mask is made


@dataclass(frozen=True)
class MemoryCosts:
    """GiB that training takes, computed from a model's shapes."""

    # What is there all the time: weights without those that rest on the CPU; LoRA and its
    # gradients; the optimizer's moments; averages of the adapter.
    rows: dict[str, float]
    tower: float  # on top of the weights while features are not cached
    loaded: float  # weights just after loading
    largest_weight: float  # while it is out of its 4 bits
    layer_experts: float  # experts of a layer out of their 4 bits, as long as it keeps activations
    question: float  # for each question of a pass
    layer: float  # for each question and decoder layer that keeps its activations; the mean
    largest_layer: float  # the same of the layer that takes most while it is computed again
    image_token: float  # of cached vision features, on disk or in RAM
    tokens: int  # of each question
    number_bytes: int  # of one number
    decoder_layers: int  # of the language model

    def training_pass(self, tokens, questions: int, layers: int):
        """GiB that a pass over `questions` prompts of `tokens` tokens adds, with `layers` kept.

        Of several questions the shorter ones are padded: then attention takes a mask, whose
        copies grow with the square of the tokens. `tokens`: a number or an array.
        """
        share = tokens / self.tokens
        kept = max(self.largest_layer, layers * self.layer)
        activations = share * (self.question + kept)
        mask = tokens**2 * (layers * self.number_bytes + MASK_BYTES) / 2**30
        return questions * (activations + (questions > 1) * mask)

    def scoring_pass(self, tokens, questions: int):
        """As `training_pass`, without a backward pass: one layer at a time, and always a mask."""
        share = tokens / self.tokens
        # Of what a layer keeps for the backward pass a third is there at any moment.
        activations = share * self.largest_layer / 3
        mask = tokens**2 * (self.number_bytes + MASK_BYTES) / 2**30
        return questions * (activations + mask)

    def peak(self, plan: MemoryPlan) -> dict[str, float]:
        """What is on the GPU in one pass of `plan`, GiB by row."""
        # One layer at a time is computed again anyway.
        kept = max(self.largest_layer, plan.stored_layers * self.layer)
        questions = plan.micro_batch * (self.question + kept)
        unpacked = max(self.largest_weight, plan.stored_layers * self.layer_experts)
        return {**self.rows, "activations": unpacked + questions}

    def table(self, plan: MemoryPlan, is_cached: bool, token_count: int) -> dict[str, dict]:
        """The computed GiB by row beside the measured sum, empty where nothing was measured.

        `token_count`: image tokens of all features that are kept.
        """
        computed = self.peak(plan)
        if not is_cached:
            computed["weights"] += self.tower
        computed["all of these"] = sum(computed.values())
        computed["vision features, on disk or in RAM"] = token_count * self.image_token
        measured = dict.fromkeys(computed, "")
        measured["all of these"] = round(plan.peak_gib, 2) or ""
        return {"computed GiB": computed, "measured GiB": measured}

    def verdict(self, free: float) -> str:
        """Whether training fits into `free` GiB: loading, and one question at a time."""
        one_question = self.peak(MemoryPlan(1, 0))
        least = max(self.loaded, sum(one_question.values()))
        text = f"{least:.1f} GiB for one question at a time, {free:.1f} GiB free"
        if least <= free:
            return text
        remedy = "choose a smaller model_id, quantization='4bit' or lower max_pixels"
        return f"does not fit by computation: {text}; {remedy}"


@dataclass(frozen=True)
class KeptNumbers:
    """Numbers a token that a part of a decoder layer keeps for the backward pass."""

    inputs: float  # of LoRA layers: with dropout each is a copy, and has a mask of one byte
    others: float  # in the model's number format
    fp32: float = 0.0  # in fp32, whatever the model's format
    recomputed: float = 0.0  # in fp32, only while the part's backward pass is there

    def bytes_kept(self, bytes_each: int, config: Config) -> float:
        """Bytes a token of all but `recomputed`; `bytes_each`: of the model's numbers."""
        dropout_masks = self.inputs if config.lora_dropout else 0
        return bytes_each * (self.inputs + self.others) + 4 * self.fp32 + dropout_masks


def attention_numbers(attention, config: Config, compiled: bool, frugal: bool) -> KeptNumbers:
    """What attention keeps, from the shapes of its projections."""
    hidden = attention.q_proj.in_features
    queries = attention.o_proj.in_features
    if frugal:
        projected = queries + 2 * attention.k_proj.out_features  # q, k and v
        heads = queries // attention.head_dim  # a sum of exponentials of each
        return KeptNumbers(0, projected + queries + 4 * config.lora_r, fp32=heads)
    # After dropout q, k and v have an input of their own; without it they share one.
    hidden_inputs = 3 if config.lora_dropout else 1
    attention_states = 4 * queries  # q, k, v (under a mask as many heads as q) and the output
    lora_products = 4 * config.lora_r
    others = attention_states + lora_products
    if hasattr(attention, "q_norm"):
        normed = queries + attention.k_proj.out_features  # the inputs of q_norm and k_norm
        others += normed if compiled else 2 * normed  # not compiled it keeps them in fp32
    if attention.q_proj.out_features > queries:
        others += 2 * queries  # a gate behind the attention: both factors
    return KeptNumbers(hidden_inputs * hidden + queries, others)


def rule_numbers(mixer, tokens: int) -> float:
    """Numbers a token that `gated_delta_rule` takes while it is computed once more, in fp32.

    From the shapes of its heads, for prompts of so many `tokens`.
    """
    keys = mixer.key_dim
    values = mixer.value_dim
    keys_of_values = mixer.num_v_heads * mixer.head_k_dim  # each value head meets its key head's
    matrix = CHUNK_TOKENS * mixer.num_v_heads  # tokens by tokens, in each chunk
    matrix_of_keys = CHUNK_TOKENS * mixer.num_k_heads
    states = keys_of_values * mixer.head_v_dim / CHUNK_TOKENS  # one a chunk
    # As autograd keeps them, counted.
    kept = 3 * values + 2 * keys + 4 * keys_of_values + 6 * matrix + 2 * matrix_of_keys + states
    # Of what the loop over chunks takes; each chunk adds its own to those of the others.
    gradients = 2 * (values + 3 * keys_of_values + matrix)
    whole_chunks = CHUNK_TOKENS * math.ceil(tokens / CHUNK_TOKENS) / tokens
    return whole_chunks * (kept + gradients)


def recurrent_numbers(
    mixer, config: Config, tokens: int, compiled: bool, with_fla: bool
) -> KeptNumbers:
    """What a recurrent layer keeps, from the shapes of its projections.

    `tokens` of a prompt; `with_fla`: the rule is computed by flash-linear-attention, which keeps
    more than what goes in, and not by `gated_delta_rule`, which is computed once more.
    """
    hidden = mixer.in_proj_qkv.in_features
    channels = mixer.in_proj_qkv.out_features  # q, k and v
    values = mixer.in_proj_z.out_features  # v: of more heads than q and k, and of the same size
    hidden_inputs = 2 if config.lora_dropout else 1
    # The convolution before and behind silu; the rule's output, as its norm's gate meets it.
    others = 2 * channels + values + 3 * config.lora_r
    # Not compiled: the norm's input, its gate before and behind the activation.
    fp32 = 0 if compiled else 3 * values
    if with_fla:
        # Copies of q, k and v, in place of what it read, and a matrix of tokens by tokens a head.
        others += CHUNK_TOKENS * mixer.num_v_heads
    recomputed = 0.0 if with_fla else rule_numbers(mixer, tokens)
    return KeptNumbers(hidden_inputs * hidden + values, others, fp32, recomputed)


def mlp_numbers(mlp, config: Config, compiled: bool, frugal: bool = False) -> KeptNumbers:
    """What a gated MLP keeps, from the shapes of its projections."""
    hidden = mlp.gate_proj.in_features
    inner = mlp.gate_proj.out_features
    hidden_inputs = 2 if config.lora_dropout else 1
    others = 2 * inner + 3 * config.lora_r  # gate and up
    if frugal:
        return KeptNumbers(0, others)
    if not compiled:
        others += inner  # silu(gate)
    return KeptNumbers(hidden_inputs * hidden + inner, others)


def mixture_numbers(block, config: Config) -> KeptNumbers:
    """What a mixture of experts keeps: of each expert that a token goes to, and the shared one's.

    The experts themselves have no LoRA.
    """
    experts = block.experts
    hidden, inner = experts.down_proj.shape[1:]
    # gate, up and silu(gate) of each, and its output, which is weighted.
    others = block.gate.top_k * (3 * inner + hidden)
    inputs = 0.0
    shared = getattr(block, "shared_expert", None)
    if shared is not None:
        numbers = mlp_numbers(shared, config, compiled=False)
        inputs = numbers.inputs
        others += numbers.others + hidden  # its output, which a gate meets
    return KeptNumbers(inputs, others, fp32=block.gate.weight.shape[0])  # the router's


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes a token that one decoder layer keeps in a training pass."""

    entry: float  # its input
    kept: float  # all that the backward pass needs
    gradients: float  # of its MLP, and what it makes again, while the backward pass is there
    # Beyond that, while the layer is computed again: what a recurrent layer's rule takes behind
    # the MLP, or what a frugal layer does not keep of attention's inputs otherwise.
    recomputed: float


def activation_bytes(
    config: Config,
    layer,
    tokens: int,
    bytes_each: int,
    compiled: bool,
    with_fla: bool,
    frugal: bool = False,
) -> ActivationBytes:
    """The activations of a decoder layer, from its shapes; `bytes_each`: of one number.

    With `frugal` the layer is computed by `frugal_forward`.
    """
    copies = 0  # of attention's inputs
    if hasattr(layer, "linear_attn"):
        mixer = recurrent_numbers(layer.linear_attn, config, tokens, compiled, with_fla)
        hidden = layer.linear_attn.in_proj_qkv.in_features
    else:
        mixer = attention_numbers(layer.self_attn, config, compiled, frugal)
        hidden = layer.self_attn.q_proj.in_features
        if frugal:
            copies = 3 * layer.self_attn.o_proj.in_features  # q, and k and v of as many heads
    if hasattr(layer.mlp, "experts"):
        mlp = mixture_numbers(layer.mlp, config)
        # Of each expert's output: its gradient, and that of its product with the router's weight.
        gradients = (2 + 3 * layer.mlp.gate.top_k) * hidden
    else:
        mlp = mlp_numbers(layer.mlp, config, compiled, frugal)
        inner = layer.mlp.gate_proj.out_features
        # Frugal: the down projection's input, its dropped copy, activated gate.
        gradients = 2 * (hidden + inner) + 3 * frugal * inner
    # Not compiled a norm keeps its input in fp32. Frugal: only the one before a mixture.
    own_norms = is_mixture(layer) if frugal else 2
    residuals = 2 * hidden if compiled else (2 + own_norms) * hidden
    kept_by_mlp = mlp.bytes_kept(bytes_each, config)
    kept = mixer.bytes_kept(bytes_each, config) + kept_by_mlp + bytes_each * residuals
    # When the backward pass comes to the rule, what the MLP has kept is gone.
    recomputed = 4 * mixer.recomputed - kept_by_mlp - bytes_each * gradients
    recomputed = max(recomputed, bytes_each * copies)
    return ActivationBytes(
        entry=bytes_each * hidden,
        kept=kept,
        gradients=bytes_each * gradients,
        recomputed=max(0.0, recomputed),
    )


def _count_experts(model, pattern: str | None) -> tuple[int, int]:
    """(parameters of all experts whose names match `pattern`, those of the largest layer)."""
    by_layer = Counter()
    for name, parameter in model.named_parameters():
        if pattern and re.search(pattern, name):
            by_layer[name.partition(".mlp.")[0]] += parameter.numel()
    return by_layer.total(), max(by_layer.values(), default=0)


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's weights."""

    loaded: float  # of all, just after loading
    tower: float  # of what rests on the CPU while the features are cached
    at_work: float  # of the others, without a head of which only the letters' rows are used
    largest: float  # of the largest linear layer, or one layer's experts, out of their 4 bits
    experts_of_a_layer: float  # of the largest layer, out of their 4 bits


def count_weight_bytes(
    config: Config, shapes, model, linears: Mapping, bytes_each: int
) -> WeightBytes:
    """The weights of `model`, which may have shapes only; `linears`: name -> layer with LoRA."""
    stored = stored_quantization(shapes)
    quantised = 0  # parameters of linear layers
    for name, module in linears.items():
        if not is_left_unquantised(name, stored):
            quantised += module.weight.numel()
    pattern = FAMILIES[shapes.model_type].experts if config.quantization == "4bit" else None
    experts, experts_of_a_layer = _count_experts(model, pattern)
    language = quantised + experts  # parameters
    # 8 bits of scale for 64 weights, 32 bits for 256 scales (NF4, double); 32 bits for 64 weights
    is_double = stored.get("bnb_4bit_use_double_quant", True)
    scale_bytes = 1 / 64 + 4 / 64 / 256 if is_double else 4 / 64
    packed = {
        "4bit": 1 / 2 + scale_bytes,
        "8bit": 1,
        "none": bytes_each,
    }[config.quantization]
    loaded = language * packed + (model.num_parameters() - language) * bytes_each
    tower = bytes_each * sum(value.numel() for value in vision_tower(model).parameters())
    at_work = loaded - tower
    head = model.get_output_embeddings().weight
    if config.loss == "choices" and head is not model.get_input_embeddings().weight:
        at_work -= bytes_each * head.numel()
    scales = 4 * quantised / 64 if config.quantization == "4bit" and is_double else 0
    if scales <= MAX_UNPACKED_SCALE_BYTES:
        at_work += scales
    largest_linear = max(linear.weight.numel() for linear in linears.values())
    return WeightBytes(
        loaded=loaded,
        tower=tower,
        at_work=at_work,
        largest=bytes_each * max(largest_linear, experts_of_a_layer),
        experts_of_a_layer=bytes_each * experts_of_a_layer,
    )


def memory_costs(
    config: Config,
    shapes,
    tokens: int,
    precision: str,
    compiled: bool,
    with_fla: bool = False,
    frugal: bool = False,
) -> MemoryCosts:
    """The memory of training on prompts of `tokens` tokens.

    From the model's own configuration `shapes`; no weight is loaded. `with_fla`: recurrent layers
    are computed by flash-linear-attention. `frugal`: by `frugal_forward`, if it can do these.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(shapes)
    bytes_each = getattr(torch, DTYPES[precision]).itemsize
    layers = model.model.language_model.layers
    linears = {}
    lora = 0  # parameters
    for name, module in model.named_modules():
        if re.fullmatch(LORA_TARGETS, name):
            linears[name] = module
            lora += config.lora_r * (module.in_features + module.out_features)
    weights = count_weight_bytes(config, shapes, model, linears, bytes_each)
    gib = 2**30
    rows = {
        "weights": weights.at_work / gib,
        "LoRA and gradients": 2 * 4 * lora / gib,
        "optimizer": 2 * 4 * lora / gib,
        "averages": (config.use_ema + config.use_swa) * 4 * lora / gib,
    }
    frugal = frugal and all(has_known_pass(layer) for layer in layers)
    by_layer = []
    for layer in layers:
        by_layer.append(
            activation_bytes(config, layer, tokens, bytes_each, compiled, with_fla, frugal)
        )
    largest = max(by_layer, key=lambda activations: activations.kept)
    entries = sum(activations.entry for activations in by_layer)
    beyond_entry = [activations.kept - activations.entry for activations in by_layer]
    computed_again = [
        kept + activations.recomputed
        for kept, activations in zip(beyond_entry, by_layer, strict=True)
    ]
    feature_layers = 1 + len(getattr(shapes.vision_config, "deepstack_visual_indexes", ()))
    return MemoryCosts(
        rows=rows,
        tower=weights.tower / gib,
        loaded=weights.loaded / gib,
        largest_weight=weights.largest / gib,
        layer_experts=weights.experts_of_a_layer / gib,
        question=tokens * (entries + largest.gradients) / gib,
        layer=tokens * sum(beyond_entry) / len(layers) / gib,
        largest_layer=tokens * max(computed_again) / gib,
        image_token=bytes_each * shapes.text_config.hidden_size * feature_layers / gib,
        tokens=tokens,
        number_bytes=bytes_each,
        decoder_layers=len(layers),
    )


def expected_memory(config: Config, frame: pd.DataFrame) -> MemoryCosts:
    """The memory of training on the longest of these rows, before a weight is loaded.

    Raises ValueError where the model's family is not known here.
    """
    processor = load_processor(config)
    runtime = detect_runtime(config.precision, config.attn_implementation)
    shapes = _read_model_config(config)
    budget = pixel_budget(config, processor)
    templates = prompt_templates(config)
    longest = 0
    for row in frame.to_dict("records"):
        grid = image_grid(row["width"], row["height"], processor, budget)
        context = shown_context(config, processor, row)
        messages = build_messages(row, templates=templates, context=context)
        ids = encode_prompt(processor, messages, grid)
        longest = max(longest, len(ids))
    device = "cuda" if runtime.gpus else "cpu"
    wish = config.compile_layers if FAMILIES[shapes.model_type].is_compiled else "off"
    compiled, _ = decide_compile(wish, device, len(frame))
    with_fla, _ = decide_recurrent_kernels(runtime.gpus, config.strict_determinism)
    return memory_costs(
        config,
        shapes,
        longest,
        runtime.precision,
        compiled,
        with_fla,
        frugal=device == "cuda" and runtime.attention == "sdpa",
    )


# === Prompt lengths ===============================================================================
TOKENISED_TOGETHER = 1000  # prompts
LISTED_LONG_ROWS = 5  # in an error; more are counted


def token_limit(config: Config, processor) -> int:
    """The most tokens that a prompt may have, for the model's positions and its tokenizer."""
    shapes = transformers.AutoConfig.from_pretrained(
        config.model_path,
        trust_remote_code=config.trust_remote_code,
    )
    positions = shapes.get_text_config().max_position_embeddings
    return min(positions, processor.tokenizer.model_max_length)


def count_tokens(processor, texts: Sequence[str]) -> np.ndarray:
    """(texts,) tokens of each text."""
    counts = []
    for start in range(0, len(texts), TOKENISED_TOGETHER):
        some_texts = list(texts[start : start + TOKENISED_TOGETHER])
        # Without warnings: what is too long gets an error of its own.
        encoded = processor.tokenizer(some_texts, verbose=False)
        counts += [len(ids) for ids in encoded["input_ids"]]
    return np.array(counts, dtype=int)


def image_token_counts(processor, frame: pd.DataFrame, budget: tuple[int, int]) -> np.ndarray:
    """(n,) tokens of each row's image within `budget` (min, max pixels), from its size."""
    counts = []
    for width, height in zip(frame["width"], frame["height"], strict=True):
        grid = image_grid(width, height, processor, budget)
        counts.append(grid_tokens(grid, processor))
    return np.array(counts, dtype=int)


def prompt_lengths(config: Config, processor, competition: Competition) -> pd.DataFrame:
    """Tokens of every row's prompt, train before test; no weight is loaded, no pixel read.

    Columns: split (train or test), row (its number in that table), id, line (of the file),
    image and text (tokens of either in training), tokens (both), longest (both, the image at the
    largest scale of all views), scored (as longest, in all choice orders behind one prefix).
    """
    views = all_views(config, processor)
    orders = sum(view.scale == 1 and not view.by_base_model for view in views)
    scale = max(view.scale for view in views)
    templates = prompt_templates(config)
    parts = []
    for split, frame in {"train": competition.train, "test": competition.test}.items():
        records = frame.to_dict("records")
        prompts = []
        choices = []
        for record in records:
            context = shown_context(config, processor, record)
            messages = build_messages(record, templates=templates, context=context)
            prompt = render_prompt(processor, messages)
            prompts.append(place_image_tokens(processor, prompt, count=0))
            choices.append("\n".join(str(record[choice]) for choice in CHOICES))
        image = image_token_counts(processor, frame, pixel_budget(config, processor))
        largest_budget = pixel_budget(config, processor, scale)
        largest_image = image_token_counts(processor, frame, largest_budget)
        text = count_tokens(processor, prompts)
        further_orders = (orders - 1) * count_tokens(processor, choices)
        part = {
            "split": split,
            "row": np.arange(len(frame)),
            "id": frame["id"].to_numpy(),
            "line": frame["line"].to_numpy(),
            "image": image,
            "text": text,
            "tokens": image + text,
            "longest": largest_image + text,
            "scored": largest_image + text + further_orders,
        }
        parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def row_in_words(row: Mapping, competition: Competition) -> str:
    """File, line, id and tokens of a row of `prompt_lengths`, and its longest text."""
    record = getattr(competition, row["split"]).iloc[row["row"]]
    columns = [column for column in ("question", *CHOICES, CONTEXT_COLUMN) if column in record]
    lengths = {column: len(record[column]) for column in columns}
    column = max(lengths, key=lengths.get)
    return (
        f"{row['split']}.csv, line {row['line']}, id {row['id']}: {row['longest']:,} tokens, "
        f"{row['longest'] - row['text']:,} of them for the image; "
        f"column {column!r} has {lengths[column]:,} characters"
    )


def long_rows_error(rows: pd.DataFrame, competition: Competition, problem: str) -> DataError:
    """The error that names the `rows` (of `prompt_lengths`) that are too long, and says what to do.

    `problem` says for what they are too long.
    """
    by_length = rows.sort_values("longest", ascending=False)
    lines = [f"{len(rows)} rows are too long: {problem}."]
    if len(rows) == 1:
        lines = [f"A row is too long: {problem}."]
    for row in by_length.head(LISTED_LONG_ROWS).to_dict("records"):
        lines.append(row_in_words(row, competition))
    if len(rows) > LISTED_LONG_ROWS:
        lines.append(f"... and {len(rows) - LISTED_LONG_ROWS} more")
    remedies = ["Shorten the text"]
    if (rows["longest"] > 2 * rows["text"]).any():
        remedies.append("lower max_pixels")
    if (rows["split"] == "train").any():
        remedies.append("leave the row out of train.csv")
    if (rows["split"] == "test").any():
        lines.append("A row of test.csv cannot be left out: it needs an answer.")
    lines.append(f"{', or '.join(remedies)}.")
    return DataError("\n".join(lines))


def check_token_limit(lengths: pd.DataFrame, competition: Competition, limit: int) -> None:
    """DataError where rows of `prompt_lengths` have more than `limit` tokens."""
    too_long = lengths[lengths["longest"] > limit]
    if len(too_long):
        raise long_rows_error(too_long, competition, f"the model takes {limit:,} tokens")


def check_row_memory(
    config: Config,
    lengths: pd.DataFrame,
    competition: Competition,
    costs: MemoryCosts,
    free: float,
) -> None:
    """DataError where `free` GiB hold most rows of `prompt_lengths`, but not all of them.

    Where a usual row does not fit, the model is too large: `MemoryCosts.verdict` says so.
    On a GPU a pass takes one question at least; a CPU has no error of its own for memory that
    runs out, so that the whole batch that the longest row falls into has to fit.
    """
    on_gpu = bool(detect_runtime(config.precision, config.attn_implementation).gpus)
    trained_together = 1 if on_gpu else config.batch_size
    scored_together = 1
    if not on_gpu and config.use_batch_inference:
        scored_together = config.infer_batch_size
    stored_layers = 1
    if not on_gpu and not config.gradient_checkpointing:
        stored_layers = costs.decoder_layers
    training = costs.training_pass(lengths["tokens"], trained_together, stored_layers)
    needed = costs.scoring_pass(lengths["scored"], scored_together)
    is_trained = lengths["split"] == "train"
    needed = needed.where(~is_trained, np.maximum(needed, training))
    if not on_gpu:
        free /= len(worker_devices(config))  # they share the memory
    room = free - sum(costs.rows.values()) - costs.largest_weight
    is_too_long = needed > room
    if not is_too_long.any() or needed.median() > room:
        return
    problem = f"a pass with the longest takes {needed.max():.1f} GiB, {max(room, 0):.1f} are free"
    if not on_gpu:
        problem += (
            f" (batch_size {trained_together} and infer_batch_size {scored_together} rows are "
            "padded to it: fewer take less)"
        )
    raise long_rows_error(lengths[is_too_long], competition, problem)


# === Time estimate ================================================================================
@dataclass(frozen=True)
class StepSeconds:
    """What the steps of a run take on this machine, in seconds; measured by `preflight`."""

    start: float  # a worker process, until its model is loaded
    first_adapter: float  # the first adapter of a process: peft is imported
    adapter: float  # a further one
    first_optimizer: float  # the first optimizer of a process: torch imports more
    prompt: float  # to tokenise a question
    image_token: float  # to cache features, decoding included; 0 where they are not cached
    zeroshot: float  # to score a question in one view, without an adapter
    training: float  # a question, with its share of the optimizer's step
    validation: float  # to score a question in one view, with an adapter
    all_views: float  # ... in all views; with doubt_steps in those that it has on average
    first_views: float  # ... in the views that all rows have
    checkpoint: float  # to save one


@dataclass(frozen=True)
class JobSize:
    """How much a run has to do; from the competition's tables and the config."""

    train_rows: int
    added_rows: int  # that every fold trains on, too, without those of extra_train_dirs
    related_rows: int  # of extra_train_dirs
    test_rows: int
    train_image_tokens: int  # of all different training images
    test_image_tokens: int  # of the test images that are not among them
    is_rescored: bool  # scored in 16 bits, too
    scores_base: bool = False  # whether the base model may score all rows, too

    @property
    def related_image_tokens(self) -> int:
        """Of the images of extra_train_dirs, if a row has as many as one of train.csv has.

        These images are not read before the run starts.
        """
        return round(self.related_rows * self.train_image_tokens / self.train_rows)


def added_row_count(config: Config, competition: Competition) -> int:
    """Votes and test answers that every fold trains on beside train.csv's rows, at most."""
    count = 0
    if config.use_dev_votes:
        path = competition.data_dir / "dev.csv"
        dev, _ = _read_competition_table(path, config.columns, Counter())
        count += len(dev)
    if config.pseudo_label_from:
        count += len(competition.test)
    return count


def related_row_count(config: Config, competition: Competition) -> int:
    """Rows of extra_train_dirs that every fold trains on, at most."""
    count = 0
    for folder in find_related_competitions(config, competition.data_dir).values():
        rows, _ = _read_competition_table(folder / "train.csv", config.columns, Counter())
        count += len(rows)
    return count


def job_size(
    config: Config,
    competition: Competition,
    lengths: pd.DataFrame,
    is_rescored: bool,
    scores_base: bool = False,
) -> JobSize:
    """The size of the config's run; `lengths` are the competition's `prompt_lengths`."""
    tokens = {}
    for split in ("train", "test"):
        images = lengths.loc[lengths["split"] == split, "image"]
        digests = getattr(competition, split)["pixel_hash"]
        tokens[split] = dict(zip(digests, images.tolist(), strict=True))
    only_in_test = tokens["test"].keys() - tokens["train"].keys()
    return JobSize(
        train_rows=len(competition.train),
        added_rows=added_row_count(config, competition),
        related_rows=related_row_count(config, competition),
        test_rows=len(competition.test),
        train_image_tokens=sum(tokens["train"].values()),
        test_image_tokens=sum(tokens["test"][digest] for digest in only_in_test),
        is_rescored=is_rescored,
        scores_base=scores_base,
    )


def zeroshot_parts(config: Config, seconds: StepSeconds, size: JobSize) -> dict[str, float]:
    """Seconds of the stage "zeroshot" by part: features of all training images, scores."""
    rows = min(config.zeroshot_rows or size.train_rows, size.train_rows)
    return {
        "features": size.train_image_tokens * seconds.image_token,
        "scoring": rows * seconds.zeroshot,
    }


def training_parts(
    config: Config,
    seconds: StepSeconds,
    size: JobSize,
    is_final: bool,
) -> dict[str, float]:
    """Seconds of the stage "train" of a fold, or of the final model, by part.

    Without imports and the features of changed images, which are not of every fold.
    Nothing is known of early stopping: all epochs count.
    """
    held_out = 0 if is_final else size.train_rows / config.n_folds
    own_rows = size.train_rows - held_out + size.added_rows
    all_rows = own_rows + size.related_rows
    shown = config.num_epochs * all_rows
    if config.pretrain_epochs:
        shown = config.pretrain_epochs * size.related_rows + config.num_epochs * own_rows
    epochs = config.all_epochs
    kinds = 1 + config.use_ema + config.use_swa
    training = shown * seconds.training
    steps = shown / (config.batch_size * config.grad_accum_steps)
    by_minutes = training / 60 / config.save_every_minutes
    by_steps = steps / config.save_every_steps
    checkpoints = epochs * config.save_every_epoch + int(max(by_minutes, by_steps))
    return {
        "adapter": seconds.adapter,
        "prompts": (shown + all_rows) * seconds.prompt,  # once more for the memory plan
        "training": training,
        # Of the raw weights nothing is scored again: they are those of the best epoch.
        "validation": (epochs + kinds - 1) * held_out * seconds.validation,
        "checkpoints": checkpoints * seconds.checkpoint,
    }


def scoring_parts(
    config: Config,
    seconds: StepSeconds,
    size: JobSize,
    is_final: bool,
) -> dict[str, float]:
    """Seconds of the stage "predict", or "rescore", of a fold or of the final model, by part.

    Without imports and the features of the test images, which are not of every fold.
    """
    held_out = 0 if is_final else size.train_rows / config.n_folds
    kinds = 1
    if config.mix_weights:  # at most: OOF may prefer a single one
        kinds = 1 + config.use_ema + config.use_swa
    pilot = pilot_cost(config, held_out) * seconds.validation
    return {
        "adapter": kinds * seconds.adapter,
        "held-out rows": kinds * held_out * seconds.all_views + pilot,
        "test rows": kinds * size.test_rows * seconds.all_views,
        "prompt lengths": held_out * seconds.prompt,  # for the error analysis
    }


def base_parts(config: Config, seconds: StepSeconds, size: JobSize) -> dict[str, float]:
    """Seconds of the stage "base" of a fold, by part: the folds share the test rows."""
    return {
        "held-out rows": size.train_rows / config.n_folds * seconds.first_views,
        "test rows": size.test_rows / len(config.folds_to_train) * seconds.first_views,
    }


@dataclass(frozen=True)
class TimeEstimate:
    """What a run takes, from the seconds of its steps and from its size."""

    config: Config
    seconds: StepSeconds
    size: JobSize
    devices: Sequence[str | None]

    def fold_parts(self, stage: str, fold: int) -> dict[str, float]:
        """Seconds of a stage of one fold, by part."""
        is_final = fold_of(self.config, fold) == self.config.n_folds
        if stage == "train":
            return training_parts(self.config, self.seconds, self.size, is_final)
        if stage == "rescore" and not self.size.is_rescored:
            return {}
        if stage == "base":
            is_of_first_seed = fold in self.config.folds_to_train
            return base_parts(self.config, self.seconds, self.size) if is_of_first_seed else {}
        return scoring_parts(self.config, self.seconds, self.size, is_final)

    def features_once(self) -> dict[str, float]:
        """Stage -> seconds of the features that its first worker computes for all others."""
        related = self.size.related_image_tokens
        variants = self.config.augment_images * (self.size.train_image_tokens + related)
        return {
            "train": (related + variants) * self.seconds.image_token,
            "predict": self.size.test_image_tokens * self.seconds.image_token,
        }

    def process_parts(self, stages: Sequence[str]) -> dict[str, float]:
        """Seconds of one worker process beside its folds' stages, by part."""
        loads = 1
        if "rescore" in stages and len(stages) > 1 and self.size.is_rescored:
            loads = 2  # the unquantised model takes the place of the first
        imports = self.seconds.first_adapter - self.seconds.adapter
        if "train" in stages:
            imports += self.seconds.first_optimizer
        return {"start": loads * self.seconds.start, "imports": imports}

    def launches(self) -> list[Launch]:
        """Those of `run_folds`, in their order."""
        config = self.config
        if not self.size.scores_base:
            config = dataclasses.replace(config, use_base_member="off")
        return planned_launches(config, self.devices)

    def parts(self) -> dict[str, float]:
        """Seconds of the whole run by "stage: part", all folds and processes added up."""
        totals = defaultdict(float)
        totals["processes: start"] += self.seconds.start  # of zero-shot
        for part, seconds in zeroshot_parts(self.config, self.seconds, self.size).items():
            totals[f"zeroshot: {part}"] += seconds
        for stage, seconds in self.features_once().items():
            totals[f"{stage}: features"] += seconds
        for launch in self.launches():
            for job in launch.jobs:
                for _ in job.devices:
                    for part, seconds in self.process_parts(launch.stages).items():
                        totals[f"processes: {part}"] += seconds
                for stage, fold in itertools.product(launch.stages, job.folds):
                    for part, seconds in self.fold_parts(stage, fold).items():
                        totals[f"{stage}: {part}"] += seconds
        return dict(totals)

    def wall_seconds(self) -> float:
        """Seconds on the clock, where the devices work side by side as `run_folds` lets them."""
        total = self.seconds.start
        total += sum(zeroshot_parts(self.config, self.seconds, self.size).values())
        total += sum(self.features_once().values())
        for launch in self.launches():
            jobs = [self.job_seconds(job, launch.stages) for job in launch.jobs]
            slowest = max(jobs)  # the others wait for it
            if CPU_CORE in self.devices:
                # Workers may be more than cores, which they then share.
                slowest = max(slowest, sum(jobs) / usable_cores())
            total += slowest
        return total

    def job_seconds(self, job: WorkerJob, stages: Sequence[str]) -> float:
        """Seconds on the clock of one job of a launch."""
        work = 0.0
        for stage, fold in itertools.product(stages, job.folds):
            work += sum(self.fold_parts(stage, fold).values())
        count = len(job.devices)
        speed = 1.0 if count == 1 else GROUP_SPEED * count
        return sum(self.process_parts(stages).values()) + work / speed


def parts_as_text(parts: Mapping[str, float]) -> str:
    """Seconds by part in one line, without parts that take none.

    >>> parts_as_text({"train: training": 12.345, "train: features": 0.0, "zeroshot: scoring": 1.0})
    'train: training 12.3, zeroshot: scoring 1.0'
    """
    rounded = {part: round(seconds, 1) for part, seconds in parts.items()}
    return ", ".join(f"{part} {seconds}" for part, seconds in rounded.items() if seconds)


# === Trying a model ===============================================================================
TIMED_TRAINING_SECONDS = 20  # no further optimizer step is timed after them


def measure_features(session: Session, frame: pd.DataFrame, uses: int) -> float:
    """Seconds an image token to cache the features of `frame`; 0 where caching does not pay.

    The features are there afterwards.
    """
    budget = pixel_budget(session.config, session.processor)
    different = frame.drop_duplicates("pixel_hash")
    first = different.head(8)  # for these the decision is taken, and the tower warms up
    start = time.perf_counter()
    fill_vision_cache(session, first, uses, passes=3)
    seconds = time.perf_counter() - start
    if not session.vision_cache.has_all((digest, *budget) for digest in first["pixel_hash"]):
        return 0.0
    timed = different.iloc[len(first) :]
    if timed.empty:
        timed = first
    else:
        start = time.perf_counter()
        session.vision_cache.fill(timed, budget, session.progress)
        seconds = time.perf_counter() - start
        session.vision_cache.offload_tower()
    return seconds / image_token_counts(session.processor, timed, budget).sum()


def measure_scoring(session: Session, frame: pd.DataFrame, views: Sequence[TTAView]) -> float:
    """Seconds to score a row of `frame` in `views`, prompts included."""
    start = time.perf_counter()
    predict_logits(session, frame, views, f"scoring in {len(views)} views")
    return (time.perf_counter() - start) / len(frame)


@dataclass(frozen=True)
class TrialTraining:
    """An optimizer and averages that some steps are timed with."""

    session: Session
    parameters: Mapping  # name -> weight of the adapter
    optimizer: object
    scaler: object  # of the loss, in fp16
    averagers: Mapping[str, WeightAverager]

    def step(self, batches: Iterable[Mapping], n_rows: int) -> None:
        """One optimizer step over batches of `n_rows` questions, as in training."""
        for batch in batches:
            states = answer_hidden_states(self.session, batch)
            share = len(batch["prompts"]) / n_rows
            loss = training_loss(self.session, states, batch) * share
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        weights = self.parameters.values()
        torch.nn.utils.clip_grad_norm_(weights, self.session.config.max_grad_norm).item()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for averager in self.averagers.values():
            averager.update()

    def measure(self, prompts: Sequence[Prompt], plan: MemoryPlan) -> float:
        """Seconds a question of training steps over `prompts`; the first step is not counted."""
        config = self.session.config
        step_size = config.batch_size * config.grad_accum_steps
        lengths = [len(prompt.input_ids) for prompt in prompts]
        steps = plan_epoch(lengths, step_size, (config.seed, 0, 0))
        steps = [steps[0], *steps]
        passes = split_steps(steps, plan.micro_batch, rank=0, world_size=1)
        chained = list(itertools.chain.from_iterable(passes))
        batches = iterate_batches(self.session, prompts, chained)
        questions = 0
        start = time.perf_counter()
        for number, rows in enumerate(steps):
            self.step(itertools.islice(batches, len(passes[number])), len(rows))
            seconds = time.perf_counter() - start
            if number == 0:
                start = time.perf_counter()
                continue
            questions += len(rows)
            if seconds > TIMED_TRAINING_SECONDS:
                break
        return seconds / questions

    def measure_checkpoint(self) -> float:
        """Seconds to save a checkpoint as large as those of training."""
        copies = {name: value.detach().cpu().clone() for name, value in self.parameters.items()}
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": {"tensors": copies},
        }
        for kind, averager in self.averagers.items():
            state[kind] = averager.state_dict()
        with tempfile.TemporaryDirectory() as place:
            start = time.perf_counter()
            CheckpointManager(Path(place)).save(0, self.parameters, state, {})
            return time.perf_counter() - start


def start_trial_training(session: Session, parameters: Mapping) -> TrialTraining:
    """What a fold's training has beside the model, for `parameters` by name."""
    is_fp16 = session.runtime.precision == "fp16"
    return TrialTraining(
        session=session,
        parameters=parameters,
        optimizer=make_optimizer(session, parameters),
        scaler=torch.amp.GradScaler(session.device.type, enabled=is_fp16),
        averagers=make_averagers(session.config, parameters),
    )


def try_training_pass(session: Session, prompts: Sequence[Prompt]) -> None:
    """A forward and backward pass; FloatingPointError for gradients that are not finite."""
    batch = collate(session, prompts)
    training_loss(session, answer_hidden_states(session, batch), batch).backward()
    parameters = trainable_parameters(session.model).values()
    # This waits for the GPU, too.
    if not all(value.grad.isfinite().all() for value in parameters):
        raise FloatingPointError(
            "A training step on these rows gives gradients that are not finite"
        )
    session.model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def naming_row(text: str) -> Iterator[None]:
    """Log what row is tried, and add it to an error: a process that is killed leaves the log."""
    LOGGER.info("Trying the longest row: %s", text)
    try:
        yield
    except Exception as error:
        error.add_note(f"While the longest row was tried: {text}")
        raise


def padded_tokens(lengths: Sequence[int], batch_size: int) -> float:
    """Mean tokens of a row, padding included, where rows of similar length share a batch.

    >>> padded_tokens([5, 1, 4, 2], batch_size=2)
    3.5
    """
    longest_first = sorted(lengths, reverse=True)
    total = 0
    for start in range(0, len(longest_first), batch_size):
        batch = longest_first[start : start + batch_size]
        total += len(batch) * batch[0]
    return total / len(longest_first)


@dataclass(frozen=True)
class TrialRows:
    """What preflight tries: rows drawn at random for all figures, and the longest row of all."""

    competition: Competition
    lengths: pd.DataFrame  # of all rows, as `prompt_lengths` gives them
    sample: pd.DataFrame  # training rows

    def longest(self, column: str, splits: Sequence[str]) -> tuple[pd.DataFrame, str]:
        """The row with the most tokens by a column of `lengths`, as a frame and in words."""
        candidates = self.lengths[self.lengths["split"].isin(splits)]
        row = self.lengths.loc[candidates[column].idxmax()]
        frame = getattr(self.competition, row["split"])
        position = int(row["row"])
        alone = frame.iloc[position : position + 1].reset_index(drop=True)
        return alone, row_in_words(row, self.competition)

    def cost_of_split(self, split: str, column: str, config: Config) -> float:
        """Tokens of a row of `split` when all are scored, over those of a row of the sample.

        In the larger table rows of more similar length share a batch, and less is padded.
        `column`: of `lengths`.
        """
        batch_size = config.infer_batch_size if config.use_batch_inference else 1
        by_split = self.lengths.groupby("split")
        all_tokens = by_split.get_group(split)[column]
        train_tokens = by_split.get_group("train").set_index("id")[column]
        sample_tokens = train_tokens.loc[self.sample["id"]]
        in_run = padded_tokens(all_tokens.tolist(), batch_size)
        return in_run / padded_tokens(sample_tokens.tolist(), batch_size)


def draw_trial_rows(config: Config, processor, rows: int) -> TrialRows:
    """Load the competition, count all tokens and draw `rows` training rows.

    Raises DataError for rows that are longer than the model takes.
    """
    competition = load_competition(
        config.data_dir,
        config.max_fallback_share,
        config.rows_to_use,
        config.seed,
        config.columns,
    )
    competition = add_context(config, competition)
    lengths = prompt_lengths(config, processor, competition)
    check_token_limit(lengths, competition, token_limit(config, processor))
    count = min(rows, len(competition.train))
    sample = competition.train.sample(count, random_state=config.seed, ignore_index=True)
    return TrialRows(competition, lengths, sample)


@dataclass(frozen=True)
class MemoryForecast:
    """What is known of the memory before a weight is loaded."""

    costs: MemoryCosts
    needed: str  # in words
    rescoring: str  # whether the unquantised model fits, in words; "": it is not asked for
    is_rescored: bool


def forecast_memory(config: Config, trial: TrialRows) -> MemoryForecast:
    """Computed from the model's shapes; DataError for rows that are too long for the memory."""
    longest, _ = trial.longest("tokens", ["train"])
    costs = expected_memory(config, longest)
    free = free_gib()
    check_row_memory(config, trial.lengths, trial.competition, costs, free)
    needed = costs.verdict(free)
    LOGGER.info("Memory: %s", needed)
    fits = False
    rescoring = ""
    if config.score_precision == "16bit":
        fits, rescoring = fits_in_16_bits(config, free)
        LOGGER.info("Scoring in 16 bits: %s", rescoring)
    return MemoryForecast(costs, needed, rescoring, fits)


@dataclass(frozen=True)
class TrialResult:
    """What trying a model on a few rows has shown."""

    seconds: StepSeconds
    scores: np.ndarray  # (rows, 4) of the sample, by the base model
    plan: MemoryPlan
    trainable: int  # parameters


def cache_longest_rows(session: Session, trial: TrialRows) -> None:
    """Store the features of the longest rows' images, as a run does for all."""
    budget = pixel_budget(session.config, session.processor)
    trained, _ = trial.longest("tokens", ["train"])
    scored, _ = trial.longest("scored", ["train", "test"])
    session.vision_cache.fill(pd.concat([trained, scored]), budget, session.progress)
    session.vision_cache.offload_tower()


def try_longest_rows(session: Session, trial: TrialRows, plan: MemoryPlan) -> None:
    """Train on the longest training row, and score the longest row of all in all views.

    Each among others, as in a run: they are padded to it. An error names the row.
    """
    config = session.config
    order = [(0, 1, 2, 3)]
    longest, text = trial.longest("tokens", ["train"])
    with naming_row(text):
        prompts = [make_prompt(session, longest, 0, order)]
        for row in range(min(plan.micro_batch - 1, len(trial.sample))):
            prompts.append(make_prompt(session, trial.sample, row, order))
        try_training_pass(session, prompts)
    longest, text = trial.longest("scored", ["train", "test"])
    others = config.infer_batch_size - 1 if config.use_batch_inference else 0
    with naming_row(text):
        frame = pd.concat([longest, trial.sample.head(others)], ignore_index=True)
        views = all_views(config, session.processor)
        predict_logits(session, frame, views, "the longest row")


def attach_trial_adapter(session: Session, rows: int) -> tuple[object, float, float]:
    """(the model with a fresh adapter, seconds of the first one, seconds of a further one)."""
    seconds = []
    for is_last in (False, True):
        start = time.perf_counter()
        model = attach_lora(session.model, session.config, session.config.seed)
        use_fast_layers(session, model, rows)
        seconds.append(time.perf_counter() - start)
        if not is_last:
            model.unload()
    return model, *seconds


def plan_trial(session: Session, trial: TrialRows, parameters: Mapping) -> MemoryPlan:
    """The memory plan for the longest training row; the layers follow it."""
    longest, text = trial.longest("tokens", ["train"])
    prompt = make_prompt(session, longest, 0, [(0, 1, 2, 3)])
    copies = 2 + session.config.use_ema + session.config.use_swa  # AdamW's two moments
    state_bytes = copies * sum(value.nbytes for value in parameters.values())
    with naming_row(text):
        plan = plan_memory(session, [prompt], state_bytes)
    recompute_layers(session, plan.stored_layers)
    return plan


def measure_views(session: Session, trial: TrialRows) -> dict[str, float]:
    """Seconds to score a row with the adapter: validation, first_views and all_views.

    The steps of `doubt_steps` are not timed: they may take so many times one view of all rows.
    """
    config = session.config
    views = all_views(config, session.processor)
    names = [view.name for view in views]
    steps = dict(config.doubt_steps)
    first = [views[number] for number in first_views(names, steps)]
    of_train = trial.cost_of_split("train", "tokens", config)
    of_test = trial.cost_of_split("test", "scored", config)
    if steps:
        of_test = trial.cost_of_split("test", "tokens", config)
    one_view = measure_scoring(session, trial.sample, views[:1])
    further = sum(steps.values()) * one_view
    first_seconds = measure_scoring(session, trial.sample, first)
    return {
        "validation": of_train * one_view,
        "first_views": of_test * first_seconds,
        "all_views": of_test * (first_seconds + further),
    }


def try_model(session: Session, trial: TrialRows, start_seconds: float) -> TrialResult:
    """Score and train on the rows of `trial`, and time each step of a run.

    `start_seconds`: from the start of the process to its loaded model.
    """
    config = session.config
    sample = trial.sample
    plain = [TTAView("rotation 0")]
    uses = len(members_of(config, config.folds_to_train)) * (config.num_epochs + 2)
    image_token = measure_features(session, sample, uses)
    if image_token:
        cache_longest_rows(session, trial)
    start = time.perf_counter()
    prompts = [make_prompt(session, sample, row, [(0, 1, 2, 3)]) for row in range(len(sample))]
    prompt = (time.perf_counter() - start) / len(sample)
    predict_logits(session, sample.head(8), plain, "warming up")
    start = time.perf_counter()
    scores = predict_logits(session, sample, plain, "zero-shot")[:, 0]
    zeroshot = (time.perf_counter() - start) / len(sample)
    model, first_adapter, adapter = attach_trial_adapter(session, len(sample))
    model.train()
    parameters = trainable_parameters(model)
    plan = plan_trial(session, trial, parameters)
    session.progress("the longest rows", 0, 1)
    try_longest_rows(session, trial, plan)
    session.progress("training steps", 0, 1)
    start = time.perf_counter()
    training = start_trial_training(session, parameters)
    first_optimizer = time.perf_counter() - start
    seconds = StepSeconds(
        start=start_seconds,
        first_adapter=first_adapter,
        adapter=adapter,
        first_optimizer=first_optimizer,
        prompt=prompt,
        image_token=image_token,
        zeroshot=zeroshot,
        training=training.measure(prompts, plan),
        checkpoint=training.measure_checkpoint(),
        **measure_views(session, trial),
    )
    model.unload()
    trainable = sum(value.numel() for value in parameters.values())
    return TrialResult(seconds, scores, plan, trainable)


# === Preflight ====================================================================================
def open_trial_session(config: Config, example: Mapping, memory: MemoryForecast) -> Session:
    """As `open_session`; where memory runs out the error says what was computed before."""
    try:
        return open_session(config, example)
    except torch.OutOfMemoryError as error:
        error.add_note(f"Memory: {memory.needed}")
        raise


def preflight(
    config: Config,
    rows: int = 64,
    started: float | None = None,
    progress: Callable = lambda *_, **__: None,
) -> dict:
    """Try everything once on `rows` training rows, and on the longest of all, before hours.

    Returns the facts learned, for a table. `started`: time.time() at the start of this process,
    from which a worker's start is estimated; None: now. `progress` is as in `Session`. Raises
    DataError for rows that are too long, FloatingPointError for gradients that are not finite,
    and whatever loading the data and the model raises.
    """
    started = started or time.time()
    check_score_model(config)
    processor = load_processor(config)
    looked = time.time()
    trial = draw_trial_rows(config, processor, rows)
    looking_seconds = time.time() - looked  # a worker reads tables that are checked already
    memory = forecast_memory(config, trial)
    session = open_trial_session(config, trial.sample.iloc[0], memory)
    session.progress = progress
    progress("features", 0, 1)
    result = try_model(session, trial, time.time() - started - looking_seconds)
    zeroshot = accuracy(softmax(result.scores), trial.sample["label"].to_numpy())
    scores_base = may_score_base(config, len(trial.competition.train), zeroshot)
    estimate = TimeEstimate(
        config=config,
        seconds=result.seconds,
        size=job_size(config, trial.competition, trial.lengths, memory.is_rescored, scores_base),
        devices=worker_devices(config),
    )
    return {
        **trial_facts(session, trial, result, memory),
        **time_facts(estimate),
    }


def trial_facts(
    session: Session,
    trial: TrialRows,
    result: TrialResult,
    memory: MemoryForecast,
) -> dict:
    """What preflight learned of prompts, memory and the base model."""
    config = session.config
    pixels_per_token = merged_patch_area(session.processor)
    labels = trial.sample["label"].to_numpy()
    zeroshot = accuracy(softmax(result.scores), labels)
    budget = pixel_budget(config, session.processor)
    digests = trial.sample["pixel_hash"]
    is_cached = session.vision_cache.has_all((digest, *budget) for digest in digests)
    facts = {
        "letter tokens": letters_as_text(session),
        "chat template": options_as_text(template_options(session.processor)),
        "prompt": example_prompt(session, trial.sample.iloc[0]),
        "tokens per prompt": f"at most {trial.lengths['longest'].max()}",
        "token_budget": budget[1] // pixels_per_token,
        "token_counts": image_tokens_by_split(trial.lengths),
        "pixels_per_token": pixels_per_token,
        "trainable parameters": f"{result.trainable:,}",
        "seconds per training question": round(result.seconds.training, 3),
        "seconds per scored question": round(result.seconds.zeroshot, 4),
        "zero-shot accuracy": f"{zeroshot:.2f} on {len(labels)} rows",
        "memory plan": plan_as_text(session, result.plan),
        "stored weights": stored_format_in_words(stored_quantization(_read_model_config(config))),
        "memory needed": memory.needed,
        "memory": memory.costs.table(result.plan, is_cached, feature_tokens(config, trial)),
        "peak memory": ", ".join(f"{name} {gib}" for name, gib in memory_summary().items()),
    }
    if memory.rescoring:
        facts["scoring in 16 bits"] = memory.rescoring
    if config.context_tokens:
        rows = pd.concat([trial.competition.train, trial.competition.test])
        cut = count_cut_contexts(config, session.processor, rows)
        facts["context"] = f"cut to {config.context_tokens} tokens in {cut} of {len(rows)} rows"
    return facts


def image_tokens_by_split(lengths: pd.DataFrame) -> dict[str, list[int]]:
    """Split -> tokens of each row's image, from `prompt_lengths`."""
    return {split: part["image"].tolist() for split, part in lengths.groupby("split")}


def feature_tokens(config: Config, trial: TrialRows) -> int:
    """Image tokens of all features that a run keeps: of each image and training variant once."""
    size = job_size(config, trial.competition, trial.lengths, is_rescored=False)
    train_versions = 1 + config.augment_images
    train_tokens = size.train_image_tokens + size.related_image_tokens
    return train_versions * train_tokens + size.test_image_tokens


def time_facts(estimate: TimeEstimate) -> dict:
    """How long the run takes: on one device, here, and where the time goes."""
    one_device = dataclasses.replace(estimate, devices=estimate.devices[:1])
    parts = one_device.parts()
    return {
        **seed_facts(one_device),
        **alignment_facts(estimate.config),
        "estimated minutes on one device": round(sum(parts.values()) / 60, 1),
        "estimated minutes here": round(estimate.wall_seconds() / 60, 1),
        "estimated seconds by part": parts_as_text(parts),
    }


def alignment_facts(config: Config) -> dict:
    """That the stage "alignment" is not timed; nothing where there is none."""
    if not config.alignment_model:
        return {}
    text = f"not in the estimate: {config.alignment_model} scores last, in the time that is left"
    return {"alignment": text}


def seed_facts(one_device: TimeEstimate) -> dict:
    """What further seeds add; nothing where there are none."""
    config = one_device.config
    if not config.has_further_seeds:
        return {}
    without = dataclasses.replace(one_device, config=dataclasses.replace(config, seeds=()))
    minutes = (sum(one_device.parts().values()) - sum(without.parts().values())) / 60
    text = f"{members_in_words(config)}; all but the first seed add {minutes:.1f} minutes"
    return {"seeds": f"{text} on one device"}


def letters_as_text(session: Session) -> str:
    """Each letter with its token ids, the plain letter's first."""
    pairs = zip(CHOICES, session.letter_token_ids, strict=True)
    return " ".join(f"{letter}={list(ids)}" for letter, ids in pairs)


def plan_as_text(session: Session, plan: MemoryPlan) -> str:
    """The memory plan in words."""
    step = session.config.batch_size * session.config.grad_accum_steps
    return (
        f"{plan.micro_batch} of {step} questions in a pass, "
        f"{plan.stored_layers} of {len(session.decoder_layers)} layers keep activations, "
        f"{plan.peak_gib:.1f} GiB"
    )


def run_preflight(config: Config) -> dict:
    """`preflight` in a process of its own, so that the notebook's never touches the GPU.

    Raises RuntimeError with the last lines of that process where it fails, and before it starts
    what `require_machine` raises.
    """
    require_machine(config)
    settings = json.dumps(dataclasses.asdict(config))
    environment = None  # this process's own
    if worker_devices(config)[0] == CPU_CORE:
        environment = device_environment(CPU_CORE)  # timed on what a worker has
    with tempfile.TemporaryDirectory() as place:
        status, facts, said = _watch_preflight(config, settings, environment, Path(place))
    if status != 0:
        end = exit_in_words(status)
        raise RuntimeError(f"Preflight failed: its process {end}.\n{log_tail(facts + said)}")
    return json.loads(facts.splitlines()[-1])


def _watch_preflight(
    config: Config,
    settings: str,
    environment: Mapping[str, str] | None,
    place: Path,
) -> tuple[int, str, str]:
    """Run the process of `run_preflight` in `place` and show how far it is.

    Returns its exit status, and what it wrote to its output and to its error output.
    """
    progress = place / "progress.json"
    command = [sys.executable, __file__, "preflight"]
    command += ["--config", settings]
    command += ["--progress", str(progress)]
    output = place / "output"
    errors = place / "errors"
    with output.open("wb") as out, errors.open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
    status = watch_process(process, "preflight", progress, config)
    return status, output.read_text("utf-8", "replace"), errors.read_text("utf-8", "replace")


# === Worker and command line ======================================================================
def leave_out_what_is_not_needed(config: Config) -> None:
    """Let this process import and ask for no more than the configuration needs.

    Where all models are local folders, the hub is not asked. Where nothing is quantised,
    bitsandbytes is not imported: PEFT would, which takes a second, and fails where it is broken.
    To be called before transformers is imported.
    """
    if all(Path(path).is_dir() for path in config.model_paths):
        os.environ["HF_HUB_OFFLINE"] = "1"
    if config.quantization == "none":
        sys.modules["bitsandbytes"] = None  # Python's way to say that there is none


def _copy_for_fold(directory: Path, place: Path, folds: Sequence[int]) -> Path:
    """A copy of the run directory in `place`; of other folds than `folds` only their results.

    These are what all weights and seeds are selected by.
    """
    content = read_json(directory / "config.json", CONFIG_KEYS)
    config = Config(**content["config"])
    wanted = {fold_folder(config, fold) for fold in folds}

    def ignored(folder: str, names: Sequence[str]) -> list[str]:
        folder_name = Path(folder).name
        is_other_fold = folder_name.startswith("fold_") and folder_name not in wanted
        left_out = []
        for name in names:
            is_temporary = name.endswith((".lock", ".tmp"))
            is_result = name == "result.json" or name.startswith("validation_")
            if is_temporary or (is_other_fold and not is_result):
                left_out.append(name)
        return left_out

    copy = place / directory.name
    shutil.copytree(directory, copy, ignore=ignored)
    content["config"]["output_dir"] = str(place)
    atomic_write(copy / "config.json", json.dumps(content))
    return copy


@contextlib.contextmanager
def worker_directory(directory: Path, folds: Sequence[int]) -> Iterator[Path]:
    """The directory that this worker writes to.

    The run's own; of several processes that share a fold only for the first one. The others get
    a copy that is thrown away; what did not go to plan there is kept, for the report.
    """
    if os.environ.get("RANK", "0") == "0":
        yield directory
        return
    with tempfile.TemporaryDirectory() as place:
        copy = _copy_for_fold(directory, Path(place), folds)
        before = len(read_json_lines(copy / "events.jsonl", EVENT_RECORD))
        try:
            yield copy
        finally:
            for record in read_json_lines(copy / "events.jsonl", EVENT_RECORD)[before:]:
                MetricLogger(directory / "events.jsonl").log(event=record["event"])


def run_worker(
    run: Run,
    folds: Sequence[int],
    stages: Sequence[str],
    progress: ProgressFile,
) -> None:
    """What a worker process does; ends it with status 75 after a request to stop."""
    setup_logging(run.directory, run.config.log_level, run.config.log_to_file)
    leave_out_what_is_not_needed(run.config)
    try:
        with run.lock_folds(folds):
            run_stages(run, folds, stages, progress.update)
    except Interrupted as error:
        LOGGER.warning("%s", error)
        sys.exit(INTERRUPTED)
    finally:
        if process_count() > 1:
            torch.distributed.destroy_process_group()


def command_parser() -> argparse.ArgumentParser:
    """The command line: worker, transcribe, align, preflight and settings."""
    parser = argparse.ArgumentParser(prog="vqa_helpers.py")
    commands = parser.add_subparsers(dest="command", required=True)
    worker = commands.add_parser("worker", help="run stages of a prepared run directory")
    worker.add_argument("--run", required=True, help="run directory")
    worker.add_argument(
        "--folds",
        required=True,
        help="comma-separated fold numbers; fold N of the second of `seeds` is N + n_folds + 1",
    )
    worker.add_argument(
        "--stages",
        default="train,predict",
        help=f"comma-separated, from {', '.join(STAGES)}",
    )
    worker.add_argument("--name", default="0", help="number of the worker, for its progress file")
    worker.add_argument(
        "--parent",
        type=int,
        default=0,
        help="stop, saving all, when this process ends; 0: do not",
    )
    transcribe = commands.add_parser("transcribe", help="read the images of a prepared folder")
    transcribe.add_argument("--folder", required=True, help="made by transcribe_images")
    transcribe.add_argument("--parent", type=int, default=0, help="as for worker")
    align = commands.add_parser("align", help="align the rows of a prepared folder")
    align.add_argument("--folder", required=True, help="made by alignment_scores")
    align.add_argument("--parent", type=int, default=0, help="as for worker")
    check = commands.add_parser("preflight", help="try everything once on a few rows")
    check.add_argument(
        "--config",
        help="JSON object of config fields; default: preset auto and the VQA_ variables",
    )
    check.add_argument("--progress", help="JSON file that gets what is being tried")
    commands.add_parser("settings", help="list every setting and preset")
    return parser


def preflight_command(options: argparse.Namespace) -> None:
    """Run `preflight` in this process; write the memory table, then all facts as JSON."""
    config = Config(**json.loads(options.config)) if options.config else load_config()
    setup_logging(".", config.log_level, to_file=False)
    leave_out_what_is_not_needed(config)
    tried = {"started": psutil.Process().create_time()}
    if options.progress:
        tried["progress"] = ProgressFile(Path(options.progress)).update
    with tempfile.TemporaryDirectory() as folder:  # no features of few rows in the run's cache
        facts = preflight(dataclasses.replace(config, cache_dir=folder), **tried)
    sys.stdout.write(markdown_table(pd.DataFrame(facts["memory"])) + "\n")
    sys.stdout.write(json.dumps(facts, ensure_ascii=False) + "\n")


def worker_command(options: argparse.Namespace) -> None:
    """Be a worker: what `run_folds` starts, also under `accelerate launch`."""
    directory = Path(options.run)
    folds = [int(fold) for fold in options.folds.split(",")]
    stages = options.stages.split(",")
    progress = ProgressFile(directory / f"progress_{options.name}.json", options.parent)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, progress.request_stop)
    hide_other_gpus()
    with worker_directory(directory, folds) as writable:
        init_process_group()
        run_worker(Run.open(writable), folds, stages, progress)


def side_command(options: argparse.Namespace, fill: Callable) -> None:
    """Be the process that works on a prepared folder; status 75 after a request to stop."""
    folder = Path(options.folder)
    config = Config(**read_json(folder / "config.json"))
    setup_logging(folder, config.log_level, to_file=False)
    leave_out_what_is_not_needed(config)
    progress = ProgressFile(folder / "progress.json", options.parent)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, progress.request_stop)
    try:
        fill(folder, progress.update)
    except Interrupted as error:
        LOGGER.warning("%s", error)
        sys.exit(INTERRUPTED)


def main() -> None:
    """Command line: `worker`, `transcribe`, `align`, `preflight` and `settings`."""
    options = command_parser().parse_args()
    if options.command == "worker":
        worker_command(options)
    elif options.command == "transcribe":
        side_command(options, fill_transcripts)
    elif options.command == "align":
        side_command(options, fill_alignment)
    elif options.command == "preflight":
        preflight_command(options)
    else:
        sys.stdout.write(settings_text())


__all__ = [
    key
    for key, item in globals().items()
    if callable(item) and item.__module__ == __name__ and key[0] != "_"
]
if __name__ == "__main__":
    main()
