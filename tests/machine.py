"""Kaggle, Colab or a laptop in a temporary folder, where the notebook's cells run as they are."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import vqa_helpers as vqa

CELLS = json.loads((vqa.HERE / "Kaggle_AllInOne.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
DRIVE, FIND, IMPORT, INSTALL, HARDWARE, PARAMETERS, CONFIG = CODE[:7]
MODULE = Path(vqa.__file__).read_text(encoding="utf-8")
COMPETITION = "kaggle/input/competitions/vqa"
KAGGLE = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "COLAB_RELEASE_TAG": "release"}
COLAB = {"COLAB_RELEASE_TAG": "r"}
# Name, MiB and capability, as nvidia-smi lists them.
T4_CARD = "Tesla T4, 15360, 7.5"
L4_CARD = "NVIDIA L4, 23034, 8.9"
A100_CARD = "NVIDIA A100-SXM4-40GB, 40960, 8.0"
H100_CARD = "NVIDIA H100 80GB HBM3, 81559, 9.0"
P100_CARD = "Tesla P100-PCIE-16GB, 16384, 6.0"
UNKNOWN_CARD = "Graphics Device, 24576, 11.0"


class Machine:
    """One platform below `root`: its files, its GPUs, its packages, and what pip was asked for."""

    def __init__(self, root: Path, monkeypatch):
        self.root = root
        self.monkeypatch = monkeypatch
        self.pip_calls = []  # arguments of pip, a list a call
        self.pip_answer = (0, "")  # exit status and error output of the next calls
        self.versions = {**vqa.MINIMUM_VERSIONS, "torch": "2.10.0"}  # of packages
        self.names = {}  # what the cells have defined
        for folder in ("kaggle/working", "content", "bin", "scratch"):
            (root / folder).mkdir(parents=True)
        monkeypatch.chdir(root / "kaggle/working")
        for name in list(os.environ):
            if name.startswith(("VQA_", "KAGGLE_", "COLAB_", "CUDA_VISIBLE")):
                monkeypatch.delenv(name)
        monkeypatch.setenv("PATH", f"{root}/bin:/usr/bin:/bin")
        monkeypatch.setattr(tempfile, "tempdir", str(root / "scratch"))
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "dont_write_bytecode", True)  # inputs are read-only
        monkeypatch.setitem(sys.modules, "vqa_helpers", vqa)  # the cells replace it
        self.read_version = importlib.metadata.version
        self.start_process = subprocess.run
        monkeypatch.setattr(importlib.metadata, "version", self.version)
        monkeypatch.setattr(subprocess, "run", self.run_process)
        self.gpus()

    def version(self, name):
        if name not in self.versions:
            return self.read_version(name)
        if self.versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return self.versions[name]

    def run_process(self, command, **options):
        if command[1:3] != ["-m", "pip"]:
            return self.start_process(command, **options)
        self.pip_calls.append(command[3:])
        status, errors = self.pip_answer
        return subprocess.CompletedProcess(command, status, "", errors)

    def environment(self, **values):
        for name, value in values.items():
            self.monkeypatch.setenv(name, value)

    def gpus(self, *cards):
        """Plug these in; nvidia-smi fails without one, as where the accelerator is off."""
        rows = [f"echo '{number}, {card}'" for number, card in enumerate(cards)]
        tool = self.root / "bin/nvidia-smi"
        tool.write_text("\n".join(["#!/bin/sh", *(rows or ["exit 9"]), ""]))
        tool.chmod(0o755)

    def here(self, text):
        """`text` with the platforms' absolute paths led into the temporary root."""
        text = text.replace('"/kaggle/', f'"{self.root}/kaggle/')
        return text.replace('"/content', f'"{self.root}/content')

    def helper(self, folder="kaggle/working", version=vqa.__version__):
        """The helper module, which says it is of this version."""
        path = self.root / folder / "vqa_helpers.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = self.here(MODULE).replace(f'"{vqa.__version__}"', f'"{version}"', 1)
        path.write_text(text, encoding="utf-8")
        return path

    def demo(self, folder="kaggle/working"):
        """The project's data folder, by links to all that the cells look at."""
        data = self.root / folder / "data"
        data.mkdir(parents=True)
        for path in vqa.DEMO.iterdir():
            (data / path.name).symlink_to(path)
        return data

    def competition(self, folder=COMPETITION):
        """A folder with the names of a competition's files."""
        place = self.root / folder
        place.mkdir(parents=True, exist_ok=True)
        for name in vqa.COMPETITION_FILES:
            (place / name).write_text("id\n")
        return place

    def archive(self, name, inner=""):
        """An archive of the competition's files, in a folder `inner` of it."""
        source = self.competition(f"elsewhere/{inner}")
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".zip"):
            with zipfile.ZipFile(path, "w") as opened:
                for file in source.iterdir():
                    opened.write(file, f"{inner}/{file.name}" if inner else file.name)
            return path
        mode = "w:gz" if name.endswith("gz") else "w"
        with tarfile.open(path, mode) as opened:
            opened.add(self.root / "elsewhere", ".")
        return path

    def run(self, *cells):
        """What these cells, or all up to the config, have defined after one another."""
        for cell in cells or CODE[:7]:
            text = self.here(cell.replace("%matplotlib inline\n", ""))
            exec(compile(text, "a cell of the notebook", "exec"), self.names)
        return SimpleNamespace(**self.names)


def start_run(names):
    """The run of a machine whose cells have defined these names."""
    competition = names.vqa.load_competition(names.config.data_dir, 0.5)
    folds = names.vqa.make_folds(competition.train, 2, 42)
    return names.vqa.start_run(names.config, competition, folds)
