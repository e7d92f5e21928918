"""Part 7, Damaged files: what a run cannot read any more is made anew, or named with the remedy."""

import json
import shutil
from pathlib import Path

import damaged_files
import numpy as np
import pandas as pd
import pytest
import torch
from planted import (
    VIEWS,
    planted_run,
    rows_of_fold,
    write_16_bit_scores,
    write_kinds,
    write_scores,
    write_zeroshot,
)

import vqa_helpers as vqa

DAMAGES = damaged_files.DAMAGES
KINDS = {
    "raw": {"accuracy": 0.5, "nll": 1.0},
    "ema": {"accuracy": 0.5, "nll": 1.1},
}


@pytest.fixture(scope="module")
def scored_once(mini_data, tmp_path_factory):
    """A run whose two folds are trained, selected and scored, also in 16 bits; made-up scores."""
    config = vqa.Config.preset(
        "demo",
        data_dir=str(mini_data),
        output_dir=str(tmp_path_factory.mktemp("outputs")),
        run_name="one",
        n_folds=2,
        num_epochs=1,
        quantization="4bit",
        score_precision="16bit",
    )
    competition = vqa.load_competition(config.data_dir)
    folds = vqa.make_folds(competition.train, config.n_folds, config.seed)
    run = vqa.start_run(config, competition, folds)
    for fold in (0, 1):
        write_kinds(run, fold, KINDS)
        write_scores(run, fold, 1.0)
        write_16_bit_scores(run, fold, 1.0)
        write_adapters(run, fold)
        history = pd.DataFrame({"epoch": [1], "loss": [0.5]})
        vqa.write_table(history, run.fold_dir(fold) / "history.csv")
    write_zeroshot(run, run.train, VIEWS[0], np.random.default_rng(0))
    assert vqa.select_weights(run) == "raw"
    return run


@pytest.fixture
def scored(scored_once, tmp_path, replace):
    """A copy of that run."""
    directory = shutil.copytree(scored_once.directory, tmp_path / "outputs" / "one")
    return replace(scored_once, directory=directory)


def write_adapters(run, fold):
    """Adapters of both kinds, with their hashes in the result."""
    path = run.fold_dir(fold) / "result.json"
    content = json.loads(path.read_text())
    content["history"] = [{"epoch": 1, "loss": 0.5}]
    content["fingerprint"] = run.fingerprint
    for kind in KINDS:
        folder = run.fold_dir(fold) / f"adapter_{kind}"
        vqa.atomic_write(folder / "adapter_model.safetensors", b"weights")
        settings = {"peft_type": "LORA", "target_modules": "q"}
        vqa.atomic_write(folder / "adapter_config.json", json.dumps(settings))
        content["adapters"][kind] = vqa.file_sha256(folder / "adapter_model.safetensors")
    vqa.atomic_write(path, json.dumps(content))


def damage(path, kind):
    path.write_bytes(DAMAGES[kind](path))


def existing(run):
    return {path.relative_to(run.directory).as_posix() for path in run.directory.rglob("*.*")}


# Damaged file: all files that are deleted, and the stage of fold 0 that is done again.
ANEW = {
    "zeroshot.npz": (["zeroshot.npz"], "zeroshot"),
    "fold_0/oof.npz": (["fold_0/oof.npz", "fold_0/test.npz"], "predict"),
    "fold_0/test.npz": (["fold_0/test.npz"], "predict"),
    "fold_0/oof_16bit.npz": (["fold_0/oof_16bit.npz", "fold_0/test_16bit.npz"], "rescore"),
    "fold_0/test_16bit.npz": (["fold_0/test_16bit.npz"], "rescore"),
    "fold_0/validation_ema.npz": (["fold_0/validation_ema.npz", "fold_0/result.json"], "train"),
    "fold_0/validation_raw.npz": (["fold_0/validation_raw.npz", "fold_0/result.json"], "train"),
    "fold_0/result.json": (["fold_0/result.json"], "train"),
    "fold_0/adapter_ema/adapter_model.safetensors": (["fold_0/result.json"], "train"),
    "fold_0/adapter_raw/adapter_config.json": (["fold_0/result.json"], "train"),
    "selection.json": (["selection.json"], None),
}


@pytest.mark.parametrize("name", ANEW)
def test_each_damage_of_a_file_makes_its_stage_and_no_other_run_again(scored, caplog, name):
    deleted, stage = ANEW[name]
    before = existing(scored)
    contents = {item: (scored.directory / item).read_bytes() for item in before}
    stages = ("zeroshot", "train", "predict", "rescore")
    for kind in DAMAGES:
        damage(scored.directory / name, kind)
        caplog.clear()
        assert vqa.delete_damaged_files(scored) == 1
        assert f"Made anew: {scored.directory / name}" in caplog.text
        assert before - existing(scored) == set(deleted), kind
        for other in stages:
            assert scored.is_done(other, 0) is (other != stage), (kind, other)
        for item in before:
            (scored.directory / item).write_bytes(contents[item])
    noted = vqa.read_json_lines(scored.directory / "events.jsonl")
    assert len(noted) == len(DAMAGES)
    assert vqa.delete_damaged_files(scored) == 0


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("oof", "test"),
        ("oof_16bit", "test_16bit"),
        ("validation_ema", "result"),
    ],
)
def test_a_file_that_was_deleted_as_its_message_says_is_made_anew(scored, name, last):
    path = scored.fold_dir(0) / f"{name}.npz"
    damage(path, "half")
    with pytest.raises(
        vqa.DamagedFileError, match=f"{name}.npz cannot be read .*delete it and run"
    ):
        vqa.read_arrays(path, scored.fingerprint)
    path.unlink()
    assert vqa.delete_damaged_files(scored) == 1
    assert not list(scored.fold_dir(0).glob(f"{last}.*"))


def test_a_damaged_selection_costs_the_scores_only_where_a_fold_came_later(scored):
    damage(scored.directory / "selection.json", "half")
    vqa.delete_damaged_files(scored)
    assert scored.unfinished_folds("predict", [0, 1]) == []
    vqa.select_weights(scored)
    vqa.delete_outputs(scored, [Path("fold_1/oof.npz"), Path("fold_1/test.npz")])
    damage(scored.directory / "selection.json", "half")
    vqa.delete_damaged_files(scored)
    assert scored.unfinished_folds("predict", [0, 1]) == [0, 1]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_history_is_written_anew_from_the_result(scored, kind):
    path = scored.fold_dir(0) / "history.csv"
    content = path.read_bytes()
    damage(path, kind)
    vqa.delete_damaged_files(scored)
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_lacks_a_file_is_trained_to_its_end_again(scored, caplog, name):
    path = scored.fold_dir(0) / "adapter_raw" / name
    path.unlink()
    assert vqa.delete_damaged_files(scored) == 1
    assert str(path) in caplog.text
    assert not scored.is_done("train", 0)


def test_a_history_that_is_gone_is_written_anew_from_the_result(scored, caplog):
    path = scored.fold_dir(0) / "history.csv"
    content = path.read_bytes()
    path.unlink()
    assert vqa.delete_damaged_files(scored) == 0
    assert path.read_bytes() == content
    assert f"Written anew from result.json: {path} is gone" in caplog.text


def test_files_of_another_run_are_not_deleted_but_named(scored):
    path = scored.fold_dir(0) / "oof.npz"
    vqa.write_logits(path, rows_of_fold(scored, 0), np.zeros((18, 1, 4)), VIEWS[:1], "another")
    with pytest.raises(vqa.CheckpointError, match="oof.npz belongs to another configuration"):
        vqa.delete_damaged_files(scored)
    assert path.exists()


# --- What says whose the files are ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["folds.csv", "test_rows.csv", "sample_rows.csv", "config.json"])
def test_a_run_with_a_damaged_table_is_not_opened_but_started_again(mini_run, name):
    run = mini_run(run_name="one")
    path = run.directory / name
    content = path.read_bytes()
    for kind in DAMAGES:
        path.write_bytes(content)
        damage(path, kind)
        with pytest.raises(vqa.DamagedFileError, match=f"{name} cannot be read .*; delete it and"):
            vqa.Run.open(run.directory)
    assert mini_run(run_name="one").fingerprint == run.fingerprint
    assert path.read_bytes() == content


def test_a_run_without_one_of_its_tables_is_not_opened(mini_run):
    run = mini_run()
    (run.directory / "test_rows.csv").unlink()
    with pytest.raises(vqa.DamagedFileError, match=r"test_rows.csv cannot be read \(it is gone\)"):
        vqa.Run.open(run.directory)


def test_a_damaged_config_is_not_written_anew_over_the_results_of_another_run(scored, mini_run):
    damage(scored.directory / "config.json", "half")
    with pytest.raises(
        vqa.CheckpointError,
        match=r"config.json cannot be read .*fold_0/result.json does not say that it is this run's",
    ):
        mini_run(run_name="one", learning_rate=0.5)


def test_a_result_of_another_run_is_refused(scored):
    path = scored.fold_dir(0) / "result.json"
    content = json.loads(path.read_text())
    vqa.atomic_write(path, json.dumps({**content, "fingerprint": "another"}))
    with pytest.raises(vqa.CheckpointError, match=r"result.json belongs to another configuration"):
        vqa.read_fold_result(scored, 0)


def test_settings_of_another_version_are_named_with_both_versions(mini_run):
    run = mini_run(run_name="one")
    path = run.directory / "config.json"
    content = json.loads(path.read_text())
    content["config"]["future_setting"] = 1
    content["version"] = "9.9.9"
    path.write_text(json.dumps(content))
    with pytest.raises(vqa.CheckpointError) as caught:
        vqa.Run.open(run.directory)
    message = str(caught.value)
    for part in ("config.json", vqa.__version__, "'future_setting'", "version 9.9.9 wrote it"):
        assert part in message


def test_an_earlier_run_whose_config_is_damaged_is_passed_over_aloud(mini_run, tmp_path, caplog):
    old = mini_run(run_name="one", output_dir=str(tmp_path / "input"))
    damage(old.directory / "config.json", "half")
    new = mini_run(run_name="one", resume_from=(str(tmp_path / "input"),))
    assert new.directory != old.directory
    assert f"An earlier run is not continued: {old.directory / 'config.json'}" in caplog.text


# --- Records --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_lines_of_records_are_left_out(tmp_path, kind):
    path = tmp_path / "stages.jsonl"
    vqa.MetricLogger(path).log(label="train fold 0", seconds=1.0)
    damage(path, kind)
    assert vqa.read_json_lines(path) == []
    with path.open("a") as file:
        file.write("\n")
    vqa.MetricLogger(path).log(label="train fold 1", seconds=2.0)
    assert [record["label"] for record in vqa.read_json_lines(path)] == ["train fold 1"]


def test_a_run_without_records_has_an_empty_table_of_stages(mini_run):
    assert vqa.wrap_up_table(mini_run()).empty


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_table_of_experiments_is_kept_beside_the_new_one(tmp_path, caplog, kind):
    path = tmp_path / "experiments.csv"
    vqa.write_table(pd.DataFrame({"run": ["a" * 50], "finished": ["2026"]}), path)
    damage(path, kind)
    content = path.read_bytes()
    with pytest.raises(vqa.DamagedFileError, match=r"experiments.csv cannot be read"):
        vqa.experiment_table(tmp_path)
    assert vqa._earlier_experiments(path).empty
    assert (tmp_path / "experiments.damaged.csv").read_bytes() == content
    assert "the old file kept as experiments.damaged.csv" in caplog.text


@pytest.mark.parametrize("manifest", ["{}", "[1, 2]", '"text"', "", '{"state.pt": "0"}'])
def test_a_checkpoint_whose_manifest_does_not_name_every_file_is_not_trusted(tmp_path, manifest):
    checkpoints = vqa.CheckpointManager(tmp_path)
    good = checkpoints.save(1, {"weight": torch.ones(2)}, {}, {})
    bad = checkpoints.save(2, {"weight": torch.ones(2)}, {}, {})
    (bad / "manifest.json").write_text(manifest)
    assert "manifest.json cannot be read" in vqa.CheckpointManager.problem(bad)
    assert checkpoints.latest_verified() == good


# --- What can be read, and is not what was written ------------------------------------------------


def change_json(path, **values):
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **values}), encoding="utf-8")


@pytest.mark.parametrize(
    "values",
    [
        {"config": []},
        {"libraries": []},
        {"parts": []},
        {"fallbacks": None},
        {"fingerprint": 5},
    ],
    ids=str,
)
def test_a_config_with_other_kinds_of_values_is_written_anew(mini_run, caplog, values):
    run = mini_run(run_name="one")
    path = run.directory / "config.json"
    content = path.read_bytes()
    change_json(path, **values)
    with pytest.raises(vqa.DamagedFileError, match=r"config.json cannot be read \('\w+' is of the"):
        vqa.Run.open(run.directory)
    mini_run(run_name="one")
    assert f"Written anew: {path} cannot be read" in caplog.text
    assert path.read_bytes() == content


def test_a_library_whose_version_was_not_noted_is_a_warning(mini_run, caplog):
    run = mini_run(run_name="one")
    change_json(run.directory / "config.json", libraries={})
    mini_run(run_name="one")
    assert "This run was started with torch of an unknown version; now " in caplog.text


@pytest.mark.parametrize("weights", [None, ["raw"], "", "best"], ids=str)
def test_a_selection_of_no_kind_of_weights_is_made_anew(scored, weights):
    change_json(scored.directory / "selection.json", weights=weights)
    assert vqa.delete_damaged_files(scored) == 1
    assert vqa.select_weights(scored) == "raw"


@pytest.mark.parametrize(
    "values",
    [
        {"kinds": []},
        {"kinds": {}},
        {"kinds": {"raw": {"accuracy": 0.5}}},
        {"kinds": {"raw": 0.5}},
        {"adapters": []},
        {"history": "text"},
        {"best_epoch": "two"},
    ],
    ids=str,
)
def test_a_result_with_other_kinds_of_values_is_made_anew(scored, values):
    change_json(scored.fold_dir(0) / "result.json", **values)
    assert vqa.delete_damaged_files(scored) == 1
    assert not scored.is_done("train", 0)


def test_a_result_of_a_later_version_is_read(scored):
    change_json(scored.fold_dir(0) / "result.json", more=1)
    assert vqa.read_fold_result(scored, 0).best_epoch == 1


def without_scores(arrays):
    arrays["logits"][0] = np.nan


def without_a_row(arrays):
    for name in ("ids", "logits", "labels"):
        arrays[name] = arrays[name][1:]


def of_other_rows(arrays):
    arrays["ids"] = np.array([f"other_{name}" for name in arrays["ids"]])


def without_views(arrays):
    arrays["logits"] = arrays["logits"][:, 0]


@pytest.mark.parametrize("change", [without_scores, without_a_row, of_other_rows, without_views])
@pytest.mark.parametrize("name", ["oof", "test", "oof_16bit", "validation_raw"])
def test_scores_that_are_not_of_every_row_are_made_anew(scored, caplog, name, change):
    path = scored.fold_dir(0) / f"{name}.npz"
    arrays = vqa.read_arrays(path, scored.fingerprint)
    change(arrays)
    np.savez(path, **arrays)
    assert vqa.delete_damaged_files(scored) == 1
    assert not path.exists()
    assert f"Made anew: {path} cannot be read (" in caplog.text


@pytest.mark.parametrize("change", [without_scores, of_other_rows, without_views])
def test_zero_shot_scores_that_are_none_are_made_anew(scored, change):
    path = scored.directory / "zeroshot.npz"
    arrays = vqa.read_arrays(path, scored.fingerprint)
    change(arrays)
    np.savez(path, **arrays)
    assert vqa.delete_damaged_files(scored) == 1
    assert not path.exists()


def test_zero_shot_scores_of_some_rows_are_whole(scored):
    path = scored.directory / "zeroshot.npz"
    arrays = vqa.read_arrays(path, scored.fingerprint)
    without_a_row(arrays)
    np.savez(path, **arrays)
    assert vqa.delete_damaged_files(scored) == 0


def test_records_that_lack_what_is_read_of_them_are_left_out(mini_run, replace):
    run = planted_run(mini_run())
    broken = [{}, {"label": "train fold 0"}, {"label": 5, "seconds": "x"}]
    broken += [{"label": "", "seconds": 1}, {"event": None}, {"event": ""}]
    for record in broken:
        vqa.MetricLogger(run.directory / "stages.jsonl").log(**record)
        vqa.MetricLogger(run.directory / "events.jsonl").log(**record)
    assert vqa.wrap_up_table(run).index.tolist() == ["train fold 0"]
    assert vqa.stage_seconds(run) == {"train": 60}
    assert vqa.unplanned_events(run) == []


@pytest.mark.parametrize("cell", ["{broken", "[]", "7"])
def test_settings_of_an_experiment_that_cannot_be_read_cost_only_themselves(tmp_path, caplog, cell):
    rows = {"run": ["old", "new"], "finished": ["2025", "2026"], "settings": [cell, "{}"]}
    rows["accuracy"] = [0.5, 0.6]
    path = tmp_path / "experiments.csv"
    vqa.write_table(pd.DataFrame(rows), path)
    table = vqa.experiment_table(tmp_path)
    assert table["accuracy"].tolist() == [0.5, 0.6]
    assert f"{path}: the settings of old cannot be read: {cell!r}" in caplog.text
