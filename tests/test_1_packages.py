"""Part 1, Packages: what is missing is installed, from where it can be, and nothing else."""

import socket
import sys
from types import ModuleType

import pytest
from machine import FIND, IMPORT, INSTALL, T4_CARD
from running import raising
from twins import TINY

import vqa_helpers as vqa


def test_with_everything_there_nothing_is_installed_and_no_socket_opened(machine, capsys):
    """Setup, config and data of an offline session whose model is a local folder."""
    refuse = raising(OSError("there is no network"))
    machine.monkeypatch.setattr(socket.socket, "connect", refuse)
    machine.monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    machine.monkeypatch.setattr(socket, "getaddrinfo", refuse)
    machine.helper()
    machine.gpus(T4_CARD, T4_CARD)
    machine.competition()
    machine.environment(VQA_MODEL=str(TINY))
    assert machine.run().config.model_path == str(TINY)
    assert machine.pip_calls == []
    assert "installed: nothing, all there" in capsys.readouterr().out


def test_only_what_is_missing_or_old_is_installed(machine, capsys):
    machine.versions["bitsandbytes"] = None
    machine.versions["transformers"] = "5.0.0"
    machine.helper()
    machine.run(FIND, IMPORT, INSTALL)
    wanted = ["transformers>=5.18", "bitsandbytes>=0.46.1"]
    assert machine.pip_calls == [["install", "--quiet", *wanted]]
    assert f"installed: {', '.join(wanted)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "installed"),
    [
        (None, []),
        ("0.10.0", [["torchao>=0.16"]]),
        ("0.17.0", []),
    ],
)
def test_torchao_is_replaced_where_peft_would_refuse_it(machine, version, installed):
    machine.versions["torchao"] = version
    machine.helper()
    machine.run(FIND, IMPORT, INSTALL)
    assert [call[2:] for call in machine.pip_calls] == installed


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
    assert command.endswith(' "bitsandbytes>=0.46.1"')
    assert last == machine.pip_answer[1]


def test_the_readme_has_the_same_command_for_all_packages(machine):
    machine.versions |= dict.fromkeys(vqa.MINIMUM_VERSIONS)
    machine.versions["torchao"] = "0.10.0"
    machine.pip_answer = (1, "")
    machine.helper()
    with pytest.raises(RuntimeError) as caught:
        machine.run(FIND, IMPORT, INSTALL)
    command = str(caught.value).splitlines()[1]
    assert command in (vqa.HERE / "README.md").read_text(encoding="utf-8")


WHEEL_FOLDERS = {
    "attached": "kaggle/input/datasets/me/offline/wheels",
    "VQA_WHEELS": "my files",
}


@pytest.mark.parametrize("given", WHEEL_FOLDERS)
def test_wheels_are_taken_instead_of_the_internet(machine, given):
    folder = machine.root / WHEEL_FOLDERS[given]
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
    ("installed", "pip_calls"),
    [("5.0.0", 1), ("5.20.0", 0)],
    ids=["just installed", "installed, run again"],
)
def test_an_old_package_that_is_loaded_asks_for_a_restart(machine, installed, pip_calls):
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
    assert len(machine.pip_calls) == pip_calls


def test_missing_and_old_packages_are_named():
    minimum = {"pandas": "1.0", "transformers": "999.0", "no-such-package": "1.2"}
    assert vqa.missing_requirements(minimum) == ["transformers>=999.0", "no-such-package>=1.2"]
