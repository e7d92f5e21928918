"""Part 1, Finding data and models: which attached folder or archive is the competition."""

import zipfile

import pytest
from machine import COMPETITION, CONFIG, T4_CARD
from small_competition import BASE, write

import vqa_helpers as vqa

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
    machine.gpus(T4_CARD)
    place = machine.competition(folder)
    assert machine.run().config.data_dir == str(place)


def test_a_folder_wins_over_archives_and_unrelated_archives_are_left_alone(machine):
    machine.helper()
    machine.gpus(T4_CARD)
    machine.archive(f"{COMPETITION}/open.zip")
    (machine.root / COMPETITION / "broken.zip").write_bytes(b"PK")
    place = machine.competition("kaggle/input/datasets/me/vqa")
    assert machine.run().config.data_dir == str(place)


@pytest.mark.parametrize("kind", ["folders", "archives"])
def test_of_several_competitions_none_is_taken_until_one_is_chosen(machine, kind):
    machine.helper()
    machine.gpus(T4_CARD)
    if kind == "folders":
        first = machine.competition(COMPETITION)
        second = machine.competition("kaggle/input/other")
    else:
        first = machine.archive(f"{COMPETITION}/open.zip")
        second = machine.archive("kaggle/input/other/open.zip")
    with pytest.raises(ValueError) as caught:
        machine.run()
    found = [str(first), str(second)]
    choose = "set data_dir in OVERRIDES (or VQA_DATA_DIR) to one of them"
    assert str(caught.value) == f"Several {kind} hold a competition: {found}; {choose}"
    machine.environment(VQA_DATA_DIR=str(second))
    data = machine.run().config.data_dir
    if kind == "folders":
        assert data == str(second)
    else:
        assert data.startswith(f"{machine.root}/scratch/vqa-data-")
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


def test_nothing_attached_runs_the_demo_and_says_so(machine, capsys):
    machine.helper()
    data = machine.demo()
    config = machine.run().config
    assert (config.preset_name, config.data_dir) == ("demo", str(data))
    printed = capsys.readouterr().out
    assert "train.csv, test.csv, sample_submission.csv: the built-in demo runs" in printed


def test_the_demo_may_be_a_link(machine):
    machine.helper()
    (machine.root / "kaggle/working/data").symlink_to(vqa.DEMO)
    assert machine.run().config.preset_name == "demo"


def test_nothing_attached_and_no_demo_is_an_error(machine):
    machine.helper()
    machine.gpus(T4_CARD, T4_CARD)
    with pytest.raises(FileNotFoundError) as caught:
        machine.run()
    message = str(caught.value)
    assert f"No folder or archive in {machine.root}/kaggle/input" in message
    assert "attach the competition (Kaggle: Add Input)" in message


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
    machine.gpus(T4_CARD)
    place = machine.competition("cache/vqa")
    (machine.root / "kaggle/input").mkdir()
    (machine.root / "kaggle/input/vqa").symlink_to(place)
    assert machine.run().config.data_dir == str(place)


def test_find_competition_prefers_the_named_folder_then_the_mounts_then_the_demo(
    tmp_path, monkeypatch
):
    def make_competition(place):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        for name in vqa.COMPETITION_FILES:
            (folder / name).touch()
        return folder

    monkeypatch.setattr(vqa, "MOUNTS", {str(tmp_path): 4})
    assert vqa.find_competition() == vqa.DEMO
    first = make_competition("competitions/vqa")
    assert vqa.find_competition() == first
    second = make_competition("datasets/me/copy")
    with pytest.raises(ValueError, match="Several folders hold a competition: .*set data_dir"):
        vqa.find_competition()
    (second / "test.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no test\.csv"):
        vqa.find_competition(second)


# --- What a user may name -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["~/vqa", "~/vqa/train.csv", "~/vqa/TEST.CSV", "~"])
def test_the_home_folder_and_a_table_s_folder_are_understood(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    root = tmp_path / "vqa"
    root.mkdir()
    write(root, {})
    assert vqa.find_competition(name) == root
    if name != "~":  # it is searched there, not loaded
        assert vqa.load_competition(name).data_dir == root


def test_a_table_of_an_incomplete_folder_is_an_error_about_the_folder(tmp_path):
    write(tmp_path, {"test.csv": None})
    with pytest.raises(FileNotFoundError) as caught:
        vqa.find_competition(tmp_path / "train.csv")
    assert str(caught.value).startswith(f"{tmp_path} has no test.csv; set data_dir in OVERRIDES")


def test_a_folder_that_is_called_like_a_table_is_a_folder(tmp_path):
    root = tmp_path / "vqa.csv"
    root.mkdir()
    assert vqa.find_competition(write(root, {})) == root


def test_an_archive_below_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "open.zip", "w") as archive:
        for name, content in BASE.items():
            archive.writestr(name, content)
    assert vqa.locate_competition("~/open.zip") == tmp_path / "open.zip"


@pytest.mark.parametrize("field", vqa.PATH_FIELDS)
def test_the_home_folder_is_expanded_in_every_setting_that_is_a_path(monkeypatch, field):
    monkeypatch.setenv("HOME", "/home/me")
    takes_several = field in ("resume_from", "extra_train_dirs")
    value = ("~/a", "/b") if takes_several else "~/a"
    expected = ("/home/me/a", "/b") if takes_several else "/home/me/a"
    needs = {}
    if field == "score_model_id":
        needs = {"score_precision": "16bit", "quantization": "4bit"}
    config = vqa.Config.preset("demo", **needs, **{field: value})
    assert getattr(config, field) == expected


def test_every_setting_that_names_a_folder_has_its_home_folder_expanded():
    named = {item.name for item in vqa.dataclasses.fields(vqa.Config) if item.name[-4:] == "_dir"}
    assert named <= set(vqa.PATH_FIELDS)


def test_wheels_may_lie_below_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("VQA_WHEELS", "~/wheels")
    assert vqa._find_wheels() == "/home/me/wheels"
