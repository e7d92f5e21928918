"""Part 1, Presets and Settings: every preset is possible, the impossible is refused by name."""

import dataclasses
import json
import math

import pytest

import vqa_helpers as vqa


@pytest.mark.parametrize("name", sorted(vqa.PRESETS))
def test_every_preset_is_valid_and_keeps_the_effective_batch(name):
    config = vqa.Config.preset(name)
    assert config.preset_name == name
    effective_batch = 32 if name == "colab_a100" else 8
    assert config.batch_size * config.grad_accum_steps == effective_batch


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="'kagle_t4x2'; did you mean 'kaggle_t4x2'"):
        vqa.Config.preset("kagle_t4x2")


def test_why_a_preset_was_picked_changes_no_result():
    by_name = vqa.Config.preset("demo")
    assert by_name.preset_reason == "chosen by name"
    picked = vqa.Config.preset("auto")
    assert (picked.preset_name, picked.preset_reason) == ("demo", "no competition files were found")
    assert picked.fingerprint == by_name.fingerprint


def test_competition_files_without_a_gpu_stop_the_run():
    without_gpu = vqa.Runtime("kaggle", (), "fp32", "sdpa", ())
    with pytest.raises(RuntimeError, match="switch on the accelerator"):
        vqa.choose_preset(without_gpu, has_competition=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"learning_rat": 1e-4},
            "Unknown config field 'learning_rat'; did you mean 'learning_rate'?",
        ),
        ({"n_folds": 1}, "'n_folds' is 1; it needs at least 2"),
        ({"n_folds": "3"}, "'n_folds' is '3'; it needs a whole number"),
        ({"use_tta": 1}, "'use_tta' is 1; it needs True or False"),
        ({"lora_dropout": 1.0}, "'lora_dropout' is 1.0; it needs 0 <= value < 1"),
        ({"learning_rate": 0.0}, "'learning_rate' is 0.0; it needs a positive number"),
        ({"quantization": "4-bit"}, "'quantization' is '4-bit'; it needs one of 4bit, 8bit, none"),
        ({"tta_rotations": 3}, "'tta_rotations' is 3; it needs 1, 2 or 4"),
        ({"tta_scales": (0.9,)}, "'tta_scales' is (0.9,)"),
        ({"train_folds": (3,)}, "'train_folds' is (3,); it needs folds below 3"),
        ({"train_folds": ()}, "'train_folds' is (); it needs at least one fold"),
        (
            {"train_folds": (0, 0)},
            "'train_folds' is (0, 0); it needs at least one fold, and none twice",
        ),
        ({"seed": -1}, "'seed' is -1; it needs at least 0"),
        (
            {"min_pixels": 9000, "max_pixels": 8000},
            "'min_pixels' is 9000; it needs at most max_pixels, 8000",
        ),
        ({"save_every_steps": 0}, "'save_every_steps' is 0; it needs at least 1"),
        ({"use_swa": True, "swa_start_epoch": 0}, "'swa_start_epoch' is 0; it needs at least 1"),
        (
            {"use_ema": False, "mix_weights": True},
            "'mix_weights' is True; it needs use_ema or use_swa",
        ),
        (
            {"doubt_steps": (("base", 0.5),), "mix_weights": True},
            "'mix_weights' is True; it needs use_ema or use_swa",
        ),
        (
            {"use_swa": True, "swa_start_epoch": 2},
            "'swa_start_epoch' is 2; it needs an epoch below num_epochs, 2",
        ),
        (
            {"prompt_templates": {"colour": "x"}},
            "'prompt_templates' is {'colour': 'x'}; it needs keys among",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(fields, message):
    with pytest.raises(ValueError) as error:
        vqa.Config.preset("kaggle_t4x2", **fields)
    assert message in str(error.value)


ALL_STEPS = (("rotations", 0.5), ("orders", 0.2), ("pixels", 0.2), ("base", 1))


@pytest.mark.parametrize(
    ("steps", "others", "message"),
    [
        (("rotations",), {}, "pairs of a step (rotations, orders, pixels, base) and a time"),
        ((("turns", 0.5),), {}, "pairs of a step"),
        ((("rotations", 0),), {}, "pairs of a step (rotations, orders, pixels, base) and a time"),
        (
            (("rotations", True),),
            {},
            "pairs of a step (rotations, orders, pixels, base) and a time",
        ),
        (
            (("rotations", math.inf),),
            {},
            "pairs of a step (rotations, orders, pixels, base) and a time",
        ),
        (0.5, {}, "a list of pairs of a text and a number"),
        ((("base", 0.2), ("rotations", 0.2)), {}, "each step once, in this order: rotations, "),
        ((("base", 0.2), ("base", 0.2)), {}, "each step once, in this order: rotations, "),
        ((("base", 0.2),), {"use_tta": False}, "use_tta"),
        ((("rotations", 0.2),), {"tta_rotations": 1}, "tta_rotations 2 or 4 for the step 'rot"),
        ((("orders", 0.2),), {"tta_rotations": 2}, "tta_rotations 4 for the step 'orders'"),
        ((("pixels", 0.2),), {}, "both infer_max_pixels and the step 'pixels', or neither"),
        ((("base", 0.2),), {"infer_max_pixels": 9000}, "both infer_max_pixels and the step"),
        ((("base", 0.2),), {"tta_scales": (0.9, 1.0)}, "tta_scales (1.0,): larger images are"),
        (
            (("base", 0.2),),
            {"score_precision": "16bit", "quantization": "4bit"},
            "score_precision 'trained'",
        ),
        ((("base", 0.2),), {"final_retrain": True}, "no final_retrain: no held-out row shows"),
        ((("base", 0.2),), {"ensemble_method": "weighted"}, "another ensemble_method than 'wei"),
    ],
)
def test_steps_for_rows_in_doubt_are_refused_with_what_they_need(steps, others, message):
    with pytest.raises(ValueError) as error:
        vqa.Config(doubt_steps=steps, **others)
    assert f"'doubt_steps' is {steps!r}; it needs {message}" in str(error.value)


def test_steps_for_rows_in_doubt_are_the_same_out_of_json():
    config = vqa.Config(doubt_steps=ALL_STEPS, infer_max_pixels=9000)
    again = vqa.Config(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert again.doubt_steps == ALL_STEPS


def test_a_setting_of_an_earlier_version_is_told_its_successor():
    with pytest.raises(ValueError, match="adaptive_tta is now doubt_steps: a list of steps"):
        vqa.Config.preset("demo", adaptive_tta=0.5)


@pytest.mark.parametrize(
    "field", [{"use_dev_votes": True}, {"distill_from": "x"}, {"pseudo_label_from": "x"}]
)
def test_soft_targets_are_refused_for_a_loss_over_all_tokens(field):
    with pytest.raises(
        ValueError, match="'loss' is 'vocabulary'; it needs 'choices' where targets are soft"
    ):
        vqa.Config(loss="vocabulary", **field)


def test_weights_that_are_not_quantised_have_no_other_precision_to_score_in(demo_config, replace):
    with pytest.raises(
        ValueError, match="'score_precision' is '16bit'; it needs 'trained' where quantization is"
    ):
        replace(demo_config, score_precision="16bit")


def test_default_run_name_depends_on_results_not_on_places():
    base = vqa.Config.preset("demo")
    elsewhere = vqa.Config.preset("demo", output_dir="elsewhere", log_level="DEBUG")
    slower = vqa.Config.preset("demo", learning_rate=5e-4)
    assert base.run_dir.name == elsewhere.run_dir.name
    assert base.run_dir.name != slower.run_dir.name


def test_config_table_shows_what_differs_from_the_default():
    table = vqa.Config.preset("demo").table()
    assert table.loc["num_epochs"].tolist() == ["6", "2", "passes over the training rows"]
    assert table.loc["seed"].tolist() == ["42", "", "of every random draw"]
    differs = (table["default, where it differs"] != "").tolist()
    assert differs == sorted(differs, reverse=True)  # they come first
    fields = [field.name for field in dataclasses.fields(vqa.Config)]
    assert sorted(table.index) == sorted(fields)
    assert (table["what it is"] != "").all()


def test_the_table_of_changes_shows_only_what_differs():
    config = vqa.Config.preset("demo")
    table = config.changed_table()
    for name, value in table["value"].items():
        assert value == str(getattr(config, name))
        assert value != str(getattr(vqa.Config(), name))
    assert "seed" not in table.index
    assert (table["what it is"] != "").all()


def test_every_setting_and_preset_is_listed_for_the_terminal():
    text = vqa.settings_text()
    for field in dataclasses.fields(vqa.Config):
        assert f"  {field.name}: " in text
        assert field.name in vqa.Config.__doc__
    for preset in vqa.PRESETS:
        assert preset in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_model_for_scoring_needs_something_that_is_scored_with_it(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="'score_model_id' is 'Qwen/a'; it needs score_precision '16bit'"
    ):
        vqa.Config(score_model_id="Qwen/a")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    config = vqa.Config(score_precision="16bit", score_model_id="~/base")
    assert config.model_paths == ["Qwen/Qwen3-VL-8B-Instruct", str(folder.resolve())]
    assert config.model_files == "config.json 2"
    assert config.fingerprint != vqa.Config(score_precision="16bit").fingerprint
    assert config.rescoring.model_path == str(folder.resolve())


@pytest.mark.parametrize("name", [item.name for item in dataclasses.fields(vqa.Config)])
def test_a_value_of_another_kind_is_refused_in_words_not_annotations(name):
    with pytest.raises(ValueError, match=f"'{name}' is 1j; it needs ") as error:
        vqa.Config(**{name: 1j})
    assert "[" not in str(error.value)
    assert "|" not in str(error.value)
