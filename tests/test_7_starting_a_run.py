"""Part 7, Starting a run: the same run is continued, and any other is refused by name."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from machine import COMPETITION, CONFIG, FIND, HARDWARE, IMPORT, INSTALL, KAGGLE, start_run
from planted import write_scores

import vqa_helpers as vqa

# --- Refused --------------------------------------------------------------------------------------


def test_a_run_directory_of_another_config_is_refused_by_field(mini_run):
    mini_run(run_name="mine", learning_rate=1e-3)
    # What cannot change a result may change.
    mini_run(run_name="mine", learning_rate=1e-3, log_level="DEBUG")
    with pytest.raises(
        vqa.CheckpointError,
        match="made with other config .*learning_rate: 0.001 -> 0.002.*new run_name",
    ):
        mini_run(run_name="mine", learning_rate=2e-3)


def test_a_changed_learning_rate_is_refused_by_name(mini_run):
    mini_run(run_name="one")
    with pytest.raises(
        vqa.CheckpointError,
        match=r"other config \(learning_rate: 0.001 -> 0.002\); choose a new run_",
    ):
        mini_run(run_name="one", learning_rate=2e-3)


def test_run_directory_of_other_data_is_refused(mini_run, mini_data, tmp_path):
    mini_run(run_name="mine")
    copy = shutil.copytree(mini_data, tmp_path / "copy")
    table = copy / "train.csv"
    text = table.read_text(encoding="utf-8").replace("train_0001,", "train_9999,")
    table.write_text(text, encoding="utf-8")
    with pytest.raises(vqa.CheckpointError, match="other data"):
        mini_run(run_name="mine", data_dir=str(copy))


def test_a_touched_image_is_refused_by_name(mini_run, mini_data, tmp_path):
    folder = shutil.copytree(mini_data, tmp_path / "data")
    run = mini_run(run_name="one", data_dir=str(folder))
    path = run.test["image_path"].iloc[3]
    image = vqa.load_image(path)
    image.paste((9, 9, 9), (0, 0, 20, 20))
    image.save(path)
    with pytest.raises(
        vqa.CheckpointError,
        match=r"other data \(rows \['test_0004 \(test_0004.jpg\)'\] and 0 more of",
    ):
        mini_run(run_name="one", data_dir=str(folder))


def test_a_run_is_not_continued_on_another_model_in_the_same_folder(
    mini_run, model_folders, tmp_path
):
    folder = shutil.copytree(model_folders["qwen2_5_vl"], tmp_path / "model")
    mini_run(run_name="one", model_id=str(folder))
    mini_run(run_name="one", model_id=str(folder))
    shutil.copy(model_folders["qwen3_vl"] / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(
        vqa.CheckpointError, match=rf"made with other model \(files in {re.escape(str(folder))}\)"
    ):
        mini_run(run_name="one", model_id=str(folder))


def test_another_version_of_a_library_is_said(mini_run, caplog):
    run = mini_run(run_name="one")
    path = run.directory / "config.json"
    content = json.loads(path.read_text())
    content["libraries"]["peft"] = "0.0.1"
    path.write_text(json.dumps(content))
    mini_run(run_name="one")
    assert "This run was started with peft 0.0.1; now" in caplog.text


# --- Earlier sessions -----------------------------------------------------------------------------


def test_a_run_of_an_earlier_session_is_copied_and_continued(mini_run, tmp_path, caplog):
    old = mini_run(run_name="one", output_dir=str(tmp_path / "input" / "notebook" / "outputs"))
    write_scores(old, 0, 1.0)
    scores = (old.fold_dir(0) / "oof.npz").read_bytes()
    (tmp_path / "input" / "model").mkdir()
    (tmp_path / "input" / "model" / "config.json").write_text("[]")  # somebody else's
    vqa.LOGGER.setLevel("INFO")
    new = mini_run(run_name="one", resume_from=(str(tmp_path / "input"),))
    assert (new.fold_dir(0) / "oof.npz").read_bytes() == scores
    assert f"Continuing the run of an earlier session, copied from {old.directory}" in caplog.text
    assert not (new.directory / "session.json").exists()
    other = mini_run(run_name="two", resume_from=(str(tmp_path / "input"),))
    assert not (other.fold_dir(0) / "oof.npz").exists()


def test_an_earlier_run_of_the_same_name_but_other_settings_is_left_alone_and_said(
    mini_run, tmp_path, caplog
):
    old = mini_run(run_name="one", output_dir=str(tmp_path / "input"))
    new = mini_run(run_name="one", resume_from=(str(tmp_path / "input"),), learning_rate=0.5)
    assert f"{old.directory} has this run's name, but other settings, data or folds" in caplog.text
    assert new.config.learning_rate == 0.5


def test_of_several_earlier_sessions_the_one_that_came_furthest_is_continued(mini_run, tmp_path):
    for session, files in (("first", 2), ("second", 5), ("third", 1)):
        old = mini_run(run_name="one", output_dir=str(tmp_path / "input" / session))
        for number in range(files):
            vqa.atomic_write(old.fold_dir(0) / f"{number}.npz", session)
    (tmp_path / "outputs" / "one").mkdir(parents=True)
    (tmp_path / "outputs" / "one" / "mine.txt").write_text("not a run, but somebody's")
    new = mini_run(run_name="one", resume_from=(str(tmp_path / "input"),))
    assert (new.fold_dir(0) / "4.npz").read_bytes() == b"second"
    assert (new.directory / "mine.txt").exists()


def test_an_attached_earlier_session_is_continued(machine, mini_data, capsys):
    machine.environment(**KAGGLE, VQA_PRESET="demo")
    machine.helper()
    (machine.root / "kaggle/input").mkdir()
    place = shutil.copytree(mini_data, machine.root / COMPETITION)
    machine.names["OVERRIDES"] = {}
    parameters = 'PRESET, OVERRIDES = "auto", {"n_folds": 2}'

    def start_session():
        """The run of a session, and what it printed."""
        names = machine.run(FIND, IMPORT, INSTALL, HARDWARE, parameters, CONFIG)
        assert names.config.data_dir == str(place)
        run = start_run(names)
        return run, capsys.readouterr().out

    run, printed = start_session()
    assert "Continuing" not in printed
    earlier = machine.root / "kaggle/input/my-notebook/outputs" / run.directory.name
    shutil.move(run.directory, earlier)
    run, printed = start_session()
    assert f"Continuing the run of an earlier session, copied from {earlier}" in printed
    assert (run.directory / "config.json").is_file()
    assert run.directory.is_relative_to(machine.root / "kaggle/working")


def test_the_parent_process_never_imports_torch(mini_data, tmp_path):
    """Loading, folds and starting a run need no torch, let alone CUDA."""
    code = """
import sys
import vqa_helpers as vqa

data_dir, output_dir = sys.argv[1:]
config = vqa.Config.preset("demo", data_dir=data_dir, output_dir=output_dir)
competition = vqa.load_competition(config.data_dir)
vqa.leakage_report(competition.train, competition.test)
vqa.start_run(config, competition, vqa.make_folds(competition.train, 2))
assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(mini_data), str(tmp_path)]
    subprocess.run(command, check=True, cwd=vqa.HERE)
