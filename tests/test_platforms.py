"""Setup and config cells, as they are in the notebook, on Kaggle, Colab and a laptop rebuilt in a temporary folder."""

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import vqa_helpers as vqa

CELLS = json.loads((vqa.HERE / "Kaggle_AllInOne.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
DRIVE, FIND, IMPORT, INSTALL, HARDWARE, PARAMETERS, CONFIG = CODE[:7]
MODULE = Path(vqa.__file__).read_text(encoding="utf-8")
TINY = vqa.DEMO / "tiny_qwen3_vl"
COMPETITION = "kaggle/input/competitions/vqa"
KAGGLE, COLAB = (
    {"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "COLAB_RELEASE_TAG": "release"},
    {"COLAB_RELEASE_TAG": "r"},
)
T4, L4, A100 = "Tesla T4, 15360, 7.5", "NVIDIA L4, 23034, 8.9", "NVIDIA A100-SXM4-40GB, 40960, 8.0"
H100, P100 = "NVIDIA H100 80GB HBM3, 81559, 9.0", "Tesla P100-PCIE-16GB, 16384, 6.0"
UNKNOWN = "Graphics Device, 24576, 11.0"


class Machine:
    """One platform below `root`: its files, its GPUs, its installed packages, and what pip was asked for."""

    def __init__(self, root: Path, monkeypatch):
        self.root, self.monkeypatch, self.pip_calls, self.pip_answer = (
            root,
            monkeypatch,
            [],
            (0, ""),
        )
        self.versions = vqa.MINIMUM_VERSIONS | {
            "torch": "2.10.0",
            "torchao": None,
        }  # None: not installed
        self.names = {}
        for folder in ("kaggle/working", "content", "bin", "scratch"):
            (root / folder).mkdir(parents=True)
        monkeypatch.chdir(root / "kaggle/working")
        for name in [
            name
            for name in os.environ
            if name.startswith(("VQA_", "KAGGLE_", "COLAB_", "CUDA_VISIBLE"))
        ]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PATH", f"{root}/bin:/usr/bin:/bin")
        monkeypatch.setattr(tempfile, "tempdir", str(root / "scratch"))
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "dont_write_bytecode", True)  # inputs are read-only
        monkeypatch.setitem(sys.modules, "vqa_helpers", vqa)  # the cells replace it
        self.read_version, self.start_process = importlib.metadata.version, subprocess.run
        monkeypatch.setattr(importlib.metadata, "version", self.version)
        monkeypatch.setattr(subprocess, "run", self.run_process)
        self.gpus()

    def version(self, name):
        version = self.versions[name] if name in self.versions else self.read_version(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    def run_process(self, command, **options):
        if command[1:3] != ["-m", "pip"]:
            return self.start_process(command, **options)
        self.pip_calls.append(command[3:])
        return subprocess.CompletedProcess(command, self.pip_answer[0], "", self.pip_answer[1])

    def environment(self, **values):
        for name, value in values.items():
            self.monkeypatch.setenv(name, value)

    def gpus(self, *cards):
        """As nvidia-smi lists them; without one it fails, as where the accelerator is switched off."""
        rows = "".join(f"echo '{number}, {card}'\n" for number, card in enumerate(cards))
        tool = self.root / "bin/nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{rows or 'exit 9'}\n")
        tool.chmod(0o755)

    def here(self, text):
        """`text` with the platforms' absolute paths led into the temporary root."""
        return text.replace('"/kaggle/', f'"{self.root}/kaggle/').replace(
            '"/content', f'"{self.root}/content'
        )

    def helper(self, folder="kaggle/working", version=vqa.__version__):
        path = self.root / folder / "vqa_helpers.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            self.here(MODULE).replace(f'"{vqa.__version__}"', f'"{version}"', 1), encoding="utf-8"
        )
        return path

    def demo(self, folder="kaggle/working"):
        """The project's data folder, by links; its model and tables are all that the cells look at."""
        data = self.root / folder / "data"
        data.mkdir(parents=True)
        for path in vqa.DEMO.iterdir():
            (data / path.name).symlink_to(path)
        return data

    def competition(self, folder=COMPETITION):
        place = self.root / folder
        place.mkdir(parents=True, exist_ok=True)
        for name in vqa.COMPETITION_FILES:
            (place / name).write_text("id\n")
        return place

    def archive(self, name, inner=""):
        """An archive of the competition's files, in a folder `inner` of it."""
        source, path = self.competition(f"elsewhere/{inner}"), self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".zip"):
            with zipfile.ZipFile(path, "w") as opened:
                for file in source.iterdir():
                    opened.write(file, f"{inner}/{file.name}" if inner else file.name)
        else:
            with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as opened:
                opened.add(self.root / "elsewhere", ".")
        return path

    def run(self, *cells):
        """Execute these cells, or all up to the config, one after the other; returns their names."""
        for cell in cells or CODE[:7]:
            code = compile(
                self.here(cell.replace("%matplotlib inline\n", "")),
                "a cell of the notebook",
                "exec",
            )
            exec(code, self.names)
        return SimpleNamespace(**self.names)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path.resolve(), monkeypatch)


# --- the helper module -----------------------------------------------------------------------------------------------
HELPER_FOLDERS = {
    "beside the notebook": "kaggle/working",
    "dataset": "kaggle/input/vqa-helpers",
    "dataset with its owner": "kaggle/input/datasets/me/vqa-helpers",
    "zipped project as a dataset": "kaggle/input/vqa-project/project",
    "zipped project, two folders deeper": "kaggle/input/datasets/me/vqa-project/project-main/project",
    "utility script": "kaggle/usr/lib/notebooks/me/vqa-helpers",
    "uploaded to Colab": "content",
    "Colab clone": "content/vqa-project",
    "Drive": "content/drive/MyDrive",
    "folder on Drive": "content/drive/MyDrive/vqa-project",
}


@pytest.mark.parametrize("folder", HELPER_FOLDERS.values(), ids=HELPER_FOLDERS)
def test_the_helper_is_found_and_named(machine, capsys, folder):
    path = machine.helper(folder)
    assert machine.run(FIND, IMPORT).vqa.__file__ == str(path)
    assert capsys.readouterr().out == f"vqa_helpers {vqa.__version__}: {path}\n"


def test_without_a_helper_the_error_says_where_it_looked_and_what_to_do(machine):
    with pytest.raises(FileNotFoundError) as caught:
        machine.run(FIND)
    for part in (
        str(Path.cwd()),
        "/kaggle/input/*/'",
        "/kaggle/usr/lib/notebooks/*/*/'",
        "/content/drive/MyDrive/*/'",
    ):
        assert part in str(caught.value)
    assert str(caught.value).endswith("upload it, or Add Input on Kaggle")


def test_stale_helpers_are_all_named_with_their_versions(machine):
    first, second = (
        machine.helper(version="0.0.7"),
        machine.helper("kaggle/input/old", version="0.0.8"),
    )
    with pytest.raises(ImportError) as caught:
        machine.run(FIND)
    for part in ("0.3.0 is needed", f"{first} is 0.0.7, {second} is 0.0.8", "update it there"):
        assert part in str(caught.value)


def test_the_right_version_wins_over_a_stale_copy_before_it(machine):
    machine.helper(version="0.0.7")
    path = machine.helper("kaggle/input/datasets/me/vqa-helpers")
    machine.helper("kaggle/usr/lib/notebooks/me/vqa-helpers")
    assert machine.run(FIND, IMPORT).vqa.__file__ == str(path)


def test_a_copy_loaded_earlier_in_the_session_is_replaced(machine):
    machine.monkeypatch.setitem(sys.modules, "vqa_helpers", ModuleType("vqa_helpers"))
    path = machine.helper("content")
    assert machine.run(FIND, IMPORT).vqa.__file__ == str(path)


@pytest.mark.parametrize(
    ("asked", "mounted"), [({}, []), ({"VQA_MOUNT_DRIVE": "1"}, ["/content/drive"])]
)
def test_drive_is_mounted_only_when_asked(machine, asked, mounted):
    calls = []
    colab = ModuleType("google.colab")
    colab.drive = SimpleNamespace(mount=calls.append)
    machine.monkeypatch.setitem(sys.modules, "google.colab", colab)
    machine.monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    machine.environment(**COLAB, **asked)
    machine.run(DRIVE)
    assert calls == [f"{machine.root}{place}" for place in mounted]


# --- the competition's files -----------------------------------------------------------------------------------------
DATA_FOLDERS = {
    "competition": COMPETITION,
    "competition of old": "kaggle/input/vqa",
    "dataset": "kaggle/input/datasets/me/vqa",
    "folder in a dataset": "kaggle/input/datasets/me/vqa/open/data",
    "uploaded to Colab": "content",
    "folder on Colab": "content/vqa",
    "folder on Drive": "content/drive/MyDrive/vqa",
}


@pytest.mark.parametrize("folder", DATA_FOLDERS.values(), ids=DATA_FOLDERS)
def test_the_competition_is_found(machine, folder):
    machine.helper()
    machine.gpus(T4)
    place = machine.competition(folder)
    assert machine.run().config.data_dir == str(place)


ARCHIVES = {
    "zip": (f"{COMPETITION}/open.zip", ""),
    "zip with a folder inside": ("kaggle/input/open/open.zip", "open/data"),
    "tar": (f"{COMPETITION}/open.tar", ""),
    "tar.gz with a folder inside": ("content/open.tar.gz", "open"),
    "zip on Drive": ("content/drive/MyDrive/vqa/open.zip", ""),
}


@pytest.mark.parametrize(("name", "inner"), ARCHIVES.values(), ids=ARCHIVES)
def test_an_archive_is_unpacked_once_outside_the_input(machine, capsys, name, inner):
    machine.helper()
    machine.gpus(T4)
    archive = machine.archive(name, inner)
    before = sorted((path, path.stat().st_mtime_ns) for path in archive.parent.rglob("*"))
    data = Path(machine.run().config.data_dir)
    assert data.is_relative_to(machine.root / "scratch") and data.match(
        f"vqa-data-*/{inner}".rstrip("/")
    )
    assert f"Competition data: {machine.root / 'scratch'}/vqa-data-" in (
        said := capsys.readouterr().out
    )
    assert said.count(f" being unpacked from {archive}\n") == 1
    (data / "kept").touch()
    assert Path(machine.run().config.data_dir) == data and (data / "kept").exists()
    assert (
        f" from {archive}\n" in (said := capsys.readouterr().out) and "being unpacked" not in said
    )
    assert sorted((path, path.stat().st_mtime_ns) for path in archive.parent.rglob("*")) == before


def test_a_changed_archive_is_unpacked_anew(machine):
    machine.helper()
    machine.gpus(T4)
    archive = machine.archive("content/open.zip")
    data = machine.run().config.data_dir
    os.utime(archive, ns=(0, archive.stat().st_mtime_ns + 1))
    assert machine.run(CONFIG).config.data_dir != data


def test_a_folder_wins_over_archives_and_unrelated_archives_are_left_alone(machine):
    machine.helper()
    machine.gpus(T4)
    machine.archive(f"{COMPETITION}/open.zip")
    (machine.root / COMPETITION / "broken.zip").write_bytes(b"PK")
    place = machine.competition("kaggle/input/datasets/me/vqa")
    assert machine.run().config.data_dir == str(place)


@pytest.mark.parametrize("kind", ["folders", "archives"])
def test_of_several_competitions_none_is_taken_until_one_is_chosen(machine, kind):
    machine.helper()
    machine.gpus(T4)
    make = (
        machine.competition
        if kind == "folders"
        else lambda folder: machine.archive(f"{folder}/open.zip")
    )
    first, second = make(COMPETITION), make("kaggle/input/other")
    with pytest.raises(ValueError) as caught:
        machine.run()
    chosen = "set data_dir in OVERRIDES (or VQA_DATA_DIR) to one of them"
    assert (
        str(caught.value)
        == f"Several {kind} hold a competition: {[str(first), str(second)]}; {chosen}"
    )
    machine.environment(VQA_DATA_DIR=str(second))
    data = machine.run().config.data_dir
    assert (
        data == str(second)
        if kind == "folders"
        else data.startswith(f"{machine.root}/scratch/vqa-data-")
    )
    machine.monkeypatch.delenv("VQA_DATA_DIR")
    machine.names["OVERRIDES"] = {"data_dir": str(first)}
    assert machine.run(CONFIG).config.data_dir != data


def test_a_named_folder_without_the_files_is_an_error(machine):
    machine.helper()
    machine.demo()
    (machine.competition() / "test.csv").unlink()
    machine.environment(VQA_DATA_DIR=f"{machine.root}/{COMPETITION}")
    with pytest.raises(
        FileNotFoundError,
        match=r"vqa has no test\.csv; set data_dir in OVERRIDES \(or VQA_DATA_DIR\)",
    ):
        machine.run()


@pytest.mark.parametrize("content", [b"", b"PK\3\4 broken off"], ids=["empty", "broken off"])
def test_a_broken_zip_is_named(machine, content):
    machine.helper()
    machine.demo()
    archive = machine.archive(f"{COMPETITION}/open.zip")
    archive.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=rf"{archive}: not readable \(ReadError: .*\); download it again, or remove it",
    ):
        machine.run()


def test_five_gigabytes_of_disk_are_too_few_for_six(machine):
    machine.helper()
    machine.gpus(T4)
    archive = machine.archive(f"{COMPETITION}/open.tar")
    with tarfile.open(archive, "a") as opened:
        member = tarfile.TarInfo("images.bin")
        opened.addfile(member)
        start = opened.offset
    member.size = 6 * 2**30
    with archive.open("r+b") as file:  # six gigabytes that take no space: a hole
        file.seek(start - tarfile.BLOCKSIZE)
        file.write(member.tobuf())
        file.truncate(start + member.size + 2 * tarfile.BLOCKSIZE)
    machine.monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 2**30))
    with pytest.raises(
        ValueError, match=r"'images.bin' .* makes 6,442,450,9\d\d bytes.* 5,368,709,120 \(disk\)"
    ):
        machine.run()
    assert not any((machine.root / "scratch").iterdir())


def test_nothing_attached_runs_the_demo_and_says_so(machine, capsys):
    machine.helper()
    data = machine.demo()
    config = machine.run().config
    assert (config.preset_name, config.data_dir) == ("demo", str(data))
    assert (
        "train.csv, test.csv, sample_submission.csv: the built-in demo runs"
        in capsys.readouterr().out
    )


def test_the_demo_may_be_a_link(machine):
    machine.helper()
    (machine.root / "kaggle/working/data").symlink_to(vqa.DEMO)
    assert machine.run().config.preset_name == "demo"


def test_nothing_attached_and_no_demo_is_an_error(machine):
    machine.helper()
    machine.gpus(T4, T4)
    with pytest.raises(FileNotFoundError) as caught:
        machine.run()
    for part in (
        f"No folder or archive in {machine.root}/kaggle/input",
        "attach the competition (Kaggle: Add Input)",
    ):
        assert part in str(caught.value)


def test_the_project_as_a_dataset_is_no_competition(machine):
    """Neither its data folder, nor a second copy of the project, nor the project's own zip."""
    machine.helper("kaggle/input/vqa-project")
    data = machine.demo("kaggle/input/vqa-project")
    machine.demo("kaggle/input/datasets/me/copy")
    archive = machine.archive("kaggle/input/other/project.zip")
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("data/make_demo.py", "")
    assert machine.run().config.data_dir == str(data)


def test_a_link_to_a_mounted_folder_is_followed(machine):
    machine.helper()
    machine.gpus(T4)
    place = machine.competition("cache/vqa")
    (machine.root / "kaggle/input").mkdir()
    (machine.root / "kaggle/input/vqa").symlink_to(place)
    assert machine.run().config.data_dir == str(place)


# --- hardware --------------------------------------------------------------------------------------------------------
CARDS = {
    "T4 x2": (KAGGLE, (T4, T4), "kaggle", "fp16", {"kaggle_t4x2"}),
    "one T4": (COLAB, (T4,), "colab", "fp16", {"colab_t4"}),
    "A100": (COLAB, (A100,), "colab", "bf16", {"colab_a100"}),
    "L4": (COLAB, (L4,), "colab", "bf16", set(vqa.PRESETS)),
    "H100": (COLAB, (H100,), "colab", "bf16", set(vqa.PRESETS)),
    "unknown GPU": ({}, (UNKNOWN,), "local", "bf16", set(vqa.PRESETS)),
}


@pytest.mark.parametrize(
    ("signs", "cards", "platform", "precision", "presets"), CARDS.values(), ids=CARDS
)
def test_cards_choose_preset_and_precision(
    machine, capsys, signs, cards, platform, precision, presets
):
    machine.environment(**signs)
    machine.helper()
    machine.gpus(*cards)
    machine.competition()
    names = machine.run()
    assert (names.runtime.platform, names.runtime.precision) == (platform, precision)
    assert names.config.preset_name in presets - {"demo"}
    printed = capsys.readouterr().out
    assert f"precision {precision}" in printed and f"{cards[0].split(',')[0]} (" in printed


def test_p100_is_refused_with_the_reason(machine):
    machine.environment(**KAGGLE)
    machine.helper()
    machine.gpus(P100)
    with pytest.raises(
        RuntimeError, match=r"P100.* too old for torch \(capability below 7.0\); choose 'GPU T4 x2'"
    ):
        machine.run(FIND, IMPORT, INSTALL, HARDWARE)


def test_competition_files_without_a_gpu_stop(machine):
    machine.environment(**KAGGLE)
    machine.helper()
    machine.competition()
    with pytest.raises(
        RuntimeError, match="^Competition files but no GPU: switch on the accelerator"
    ):
        machine.run()


@pytest.mark.parametrize(("version", "warned"), [("2.9.1+cu128", True), ("2.10.0", False)])
def test_a_slow_torch_is_named(machine, capsys, version, warned):
    machine.versions["torch"] = version
    machine.helper()
    machine.gpus(T4)
    machine.run(FIND, IMPORT, INSTALL, HARDWARE)
    assert ("warning: torch 2.9 may be 10 to 20 times slower" in capsys.readouterr().out) == warned


# --- packages --------------------------------------------------------------------------------------------------------
def refuse(*_, **__):
    raise OSError("there is no network")


def test_with_everything_there_nothing_is_installed_and_no_socket_opened(machine, capsys):
    """Setup, config and data of an offline session whose model is a local folder."""
    for name in ("connect", "connect_ex"):
        machine.monkeypatch.setattr(socket.socket, name, refuse)
    machine.monkeypatch.setattr(socket, "getaddrinfo", refuse)
    machine.helper()
    machine.gpus(T4, T4)
    machine.competition()
    machine.environment(VQA_MODEL=str(TINY))
    assert machine.run().config.model_path == str(TINY)
    assert machine.pip_calls == [] and "installed: nothing, all there" in capsys.readouterr().out


def test_only_what_is_missing_or_old_is_installed(machine, capsys):
    machine.versions |= {"bitsandbytes": None, "transformers": "5.0.0"}
    machine.helper()
    machine.run(FIND, IMPORT, INSTALL)
    wanted = ["transformers>=5.18", "bitsandbytes>=0.46.1"]
    assert machine.pip_calls == [["install", "--quiet", *wanted]]
    assert f"installed: {', '.join(wanted)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "wanted"), [(None, []), ("0.10.0", ["torchao>=0.16"]), ("0.17.0", [])]
)
def test_torchao_is_replaced_where_peft_would_refuse_it(machine, version, wanted):
    machine.versions["torchao"] = version
    machine.helper()
    machine.run(FIND, IMPORT, INSTALL)
    assert [call[2:] for call in machine.pip_calls] == [wanted] * bool(wanted)


def test_without_internet_and_wheels_the_error_has_the_command_that_makes_them(machine):
    machine.versions["bitsandbytes"] = None
    machine.pip_answer = (1, "ERROR: No matching distribution found for bitsandbytes>=0.46.1")
    machine.helper()
    with pytest.raises(RuntimeError) as caught:
        machine.run(FIND, IMPORT, INSTALL)
    first, command, last = str(caught.value).splitlines()
    assert first.startswith(
        "pip could not take bitsandbytes>=0.46.1 from the internet. Switch Internet on, or "
    )
    assert command.startswith(
        "pip download -d wheels --only-binary=:all: --python-version 3.12 --platform manylinux"
    )
    assert command.endswith(' "bitsandbytes>=0.46.1"') and last == machine.pip_answer[1]


def test_the_readme_has_the_same_command_for_all_packages(machine):
    machine.versions |= dict.fromkeys(vqa.MINIMUM_VERSIONS) | {"torchao": "0.10.0"}
    machine.pip_answer = (1, "")
    machine.helper()
    with pytest.raises(RuntimeError) as caught:
        machine.run(FIND, IMPORT, INSTALL)
    assert str(caught.value).splitlines()[1] in (vqa.HERE / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("given", ["attached", "VQA_WHEELS"])
def test_wheels_are_taken_instead_of_the_internet(machine, given):
    folder = machine.root / (
        "kaggle/input/datasets/me/offline/wheels" if given == "attached" else "my files"
    )
    folder.mkdir(parents=True)
    (folder / "bitsandbytes-0.50.2-py3-none-any.whl").touch()
    if given == "VQA_WHEELS":
        machine.environment(VQA_WHEELS=str(folder))
    machine.versions["bitsandbytes"] = None
    machine.helper()
    machine.run(FIND, IMPORT, INSTALL)
    found = ["--no-index", "--find-links", str(folder)]
    assert machine.pip_calls == [["install", "--quiet", *found, "bitsandbytes>=0.46.1"]]


@pytest.mark.parametrize(
    "installed", ["5.0.0", "5.20.0"], ids=["just installed", "installed, run again"]
)
def test_an_old_package_that_is_loaded_asks_for_a_restart(machine, installed):
    loaded = ModuleType("transformers")
    loaded.__version__ = "5.0.0"
    machine.monkeypatch.setitem(sys.modules, "transformers", loaded)
    machine.versions["transformers"] = installed
    machine.helper()
    with pytest.raises(
        RuntimeError,
        match=r"^transformers 5.0.0 was loaded before 5.18 was there: restart the session",
    ):
        machine.run(FIND, IMPORT, INSTALL)
    assert len(machine.pip_calls) == (installed == "5.0.0")


# --- model and earlier sessions --------------------------------------------------------------------------------------
def start_run(names):
    competition = names.vqa.load_competition(names.config.data_dir, 0.5)
    return names.vqa.start_run(
        names.config, competition, names.vqa.make_folds(competition.train, 2, 42)
    )


@pytest.mark.slow
def test_a_local_model_is_loaded_without_asking_the_hub(machine, mini_data):
    """Preflight, in a process that writes down what it did; and a worker, without stages to save time."""
    site, calls, offline = (machine.root / name for name in ("site", "calls", "offline"))
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import atexit, socket, sys\n"
        "def refuse(*arguments, **options):\n"
        f"    open({str(calls)!r}, 'a').write(f'{{arguments}}')\n"
        "    raise OSError('there is no network')\n"
        "def note():\n"
        "    if hub := sys.modules.get('huggingface_hub.constants'):\n"
        f"        open({str(offline)!r}, 'a').write(str(hub.HF_HUB_OFFLINE))\n"
        "socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse\n"
        "atexit.register(note)\n"
    )
    settings = {"n_folds": 2, "max_fallback_share": 0.5, "model_id": str(TINY)}
    machine.environment(PYTHONPATH=str(site), VQA_PRESET="demo", VQA_OVERRIDES=json.dumps(settings))
    machine.environment(HF_HUB_OFFLINE="0")  # so that it is put back
    machine.monkeypatch.delenv("HF_HUB_OFFLINE")
    machine.helper()
    shutil.copytree(mini_data, machine.root / COMPETITION)
    names = machine.run()
    assert names.vqa.run_preflight(names.config)["zero-shot accuracy"].endswith("on 36 rows")
    assert offline.read_text() == "True" and not calls.exists()
    assert (
        "HF_HUB_OFFLINE" not in os.environ
    )  # the notebook's own process may turn to the hub for another model
    run = start_run(names)
    names.vqa.run_worker(run, [0], [], names.vqa.ProgressFile(run.directory / "progress_0.json"))
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("model", "offline"), [("data/tiny_qwen3_vl", "1"), ("Qwen/Qwen3-VL-8B-Instruct", None)]
)
def test_only_a_local_model_switches_the_hub_off(monkeypatch, model, offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    vqa.stay_offline(vqa.Config(model_id=model))
    assert os.environ.get("HF_HUB_OFFLINE") == offline


def test_a_model_out_of_reach_names_the_attached_ones(machine, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(
        huggingface_hub.constants, "HF_HUB_OFFLINE", True
    )  # at once what takes minutes of retries
    monkeypatch.setattr(time, "sleep", lambda _: None)
    folders = [
        f"kaggle/input/{name}/1"
        for name in ("models/qwen/vl/transformers/8b", "qwen/transformers/4b")
    ]
    for folder in folders:
        (machine.root / folder).mkdir(parents=True)
        for name in ("config.json", "model-00001-of-00002.safetensors"):
            (machine.root / folder / name).touch()
    for name in (
        "adapter/adapter_model.safetensors",
        "my-notebook/config.json",
    ):  # no models: of an earlier session
        (machine.root / "kaggle/input" / name).parent.mkdir()
        (machine.root / "kaggle/input" / name).touch()
    machine.helper()
    names = machine.run(FIND, IMPORT)
    config = names.vqa.Config(model_id="nobody/no-such-model", quantization="none")
    runtime = names.vqa.detect_runtime()
    for load in (
        lambda: names.vqa.load_processor(config),
        lambda: names.vqa.load_model(config, runtime),
    ):
        with pytest.raises(
            OSError, match="^nobody/no-such-model could not be loaded. Check the spelling"
        ) as caught:
            load()
        listed = [str(machine.root / folder) for folder in folders]
        assert f"set model_id (or VQA_MODEL) to one of {listed}" in str(caught.value)


def test_an_attached_earlier_session_is_continued(machine, mini_data, capsys):
    machine.environment(**KAGGLE, VQA_PRESET="demo")
    machine.helper()
    (machine.root / "kaggle/input").mkdir()
    place = shutil.copytree(mini_data, machine.root / COMPETITION)
    machine.names["OVERRIDES"] = {}
    for _ in range(2):
        names = machine.run(
            FIND, IMPORT, INSTALL, HARDWARE, 'PRESET, OVERRIDES = "auto", {"n_folds": 2}', CONFIG
        )
        assert names.config.data_dir == str(place)
        run = start_run(names)
        said = capsys.readouterr().out
        earlier = machine.root / "kaggle/input/my-notebook/outputs" / run.directory.name
        if not earlier.exists():
            assert "Continuing" not in said
            shutil.move(run.directory, earlier)
    assert f"Continuing the run of an earlier session, copied from {earlier}" in said
    assert (run.directory / "config.json").is_file() and run.directory.is_relative_to(
        machine.root / "kaggle/working"
    )
