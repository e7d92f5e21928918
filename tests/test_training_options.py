"""What a run may do beside the plain recipe: 16-bit scores, a model on all rows, changed images, paraphrases."""

import dataclasses
import json

import numpy as np
import pytest
import transformers

import vqa_helpers as vqa


def quiet(*_, **__):
    pass


def run_all(run, stages=("train", "predict"), progress=quiet):
    """The zero-shot scores and these stages of all folds, in this process."""
    vqa.run_stages(run, [0], ["zeroshot"], quiet)
    vqa.run_stages(run, list(run.config.folds_to_train), stages, progress)
    return run


# --------------------------------------------------------------------------------------------------- scoring in 16 bits
STAGES = ("train", "predict", "rescore")


@pytest.fixture
def four_bits_on_the_cpu(monkeypatch):
    """A quantised base model also without a GPU, which `load_model` refuses."""
    plain = vqa.load_model

    def load(config, runtime):
        if config.quantization == "none":
            return plain(config, runtime)
        options = {"quantization_config": vqa.quantization_config("4bit", "fp32"), "device_map": {"": "cpu"}}
        load = transformers.AutoModelForImageTextToText.from_pretrained
        return load(config.model_path, **options).requires_grad_(False).eval()

    monkeypatch.setattr(vqa, "load_model", load)


@pytest.fixture
def four_bit_run(four_bits_on_the_cpu, mini_run):
    def make(**overrides):
        settings = {"quantization": "4bit", "score_precision": "16bit", "tta_rotations": 2, "infer_batch_size": 4}
        return mini_run(**(settings | overrides))

    return make


def replace_scores(run, name, logits_of):
    """Overwrite the folds' out-of-fold scores `name` by `logits_of(labels, logits)`."""
    for fold in run.finished_folds:
        path = run.fold_dir(fold) / name
        content = vqa.read_arrays(path, content_fingerprint := run.fingerprint)
        content.pop("fingerprint")
        content["logits"] = logits_of(content["labels"], content["logits"]).astype(np.float32)
        vqa.write_arrays(path, content_fingerprint, **content)


def certain(labels, logits):
    return np.where(np.arange(4) == labels[:, None, None], 5.0, np.where(np.isinf(logits), logits, 0.0))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_what_was_trained_in_4_bit_is_also_scored_by_the_unquantised_model(family, four_bit_run, model_folders):
    run = run_all(four_bit_run(model_id=str(model_folders[family])), STAGES)
    for fold in (0, 1):
        trained, whole = (
            vqa.read_arrays(run.fold_dir(fold) / f"oof{end}.npz", run.fingerprint) for end in ("", "_16bit")
        )
        assert whole["view_names"].tolist() == ["rotation 0 in 16 bits", "rotation 2 in 16 bits"]
        assert whole["ids"].tolist() == trained["ids"].tolist()
        assert (
            np.nanmax(np.abs(np.where(np.isinf(whole["logits"]), np.nan, whole["logits"] - trained["logits"]))) > 1e-4
        )
    config = dataclasses.replace(run.config, quantization="none", score_precision="trained")
    session, held_out = vqa.open_session(config, run.train.iloc[0]), run.train.query("fold == 1").reset_index(drop=True)
    kind = json.loads((run.directory / "selection.json").read_text())["weights"]
    vqa.load_adapter(session.model, run.fold_dir(1) / f"adapter_{kind}")
    expected = vqa.predict_logits(session, held_out, [vqa.View("rotation 0"), vqa.View("rotation 2", 2)])
    np.testing.assert_allclose(whole["logits"], expected, atol=1e-4)

    evaluation = vqa.evaluate_run(run)
    assert list(evaluation.view_table.index) == [
        *("single view", "rotations", "single view in 16 bits", "rotations in 16 bits")
    ]
    assert evaluation.ladder.loc["mean of 2 views in 16 bits", "against"] == "mean of 2 views"
    replace_scores(run, "oof_16bit.npz", certain)
    better = vqa.evaluate_run(run)
    assert better.views == [2, 3] and better.ladder["used"]["mean of 2 views in 16 bits"]
    assert better.ladder.loc["temperature", "against"] == "mean of 2 views in 16 bits"
    test = vqa.read_arrays(run.fold_dir(0) / "test_16bit.npz", run.fingerprint)["logits"]
    expected = vqa.softmax(vqa.combine_views(test) / better.calibration.temperatures[0])
    np.testing.assert_allclose(vqa.predict_test(run, better)[0], expected)
    replace_scores(run, "oof_16bit.npz", lambda labels, logits: -certain(labels, logits))
    worse = vqa.evaluate_run(run)
    assert max(worse.views) < 2 and not worse.ladder["used"]["mean of 2 views in 16 bits"]


def test_scoring_in_16_bits_resumes_to_the_same_bytes_with_one_model_at_a_time(four_bit_run, tmp_path, monkeypatch):
    plain = run_all(four_bit_run(output_dir=str(tmp_path / "plain")), STAGES)

    def stop(stage, done, total, **_):
        if (stage, done) == ("fold 0 test_16bit", 2):
            raise vqa.Interrupted

    stopped = four_bit_run(output_dir=str(tmp_path / "stopped"))
    with pytest.raises(vqa.Interrupted):
        run_all(stopped, STAGES, stop)
    assert [*stopped.fold_dir(0).glob("test_16bit.*.partial.npz")] and not stopped.is_rescored
    assert vqa.evaluate_run(stopped).oof.view_names == ("rotation 0", "rotation 2")  # until all members have them
    opened, open_session = [], vqa.open_session
    monkeypatch.setattr(
        vqa, "open_session", lambda *given: opened.append(given[0].quantization) or open_session(*given)
    )
    run_all(stopped, STAGES)
    assert opened == ["none"]
    for fold in (0, 1):
        for name in ("oof_16bit.npz", "test_16bit.npz"):
            assert (stopped.fold_dir(fold) / name).read_bytes() == (plain.fold_dir(fold) / name).read_bytes()


def test_an_unquantised_model_that_does_not_fit_is_left_out_with_the_figures(four_bit_run, monkeypatch):
    monkeypatch.setattr(vqa, "free_gib", lambda: 0.01)
    run = run_all(four_bit_run(), STAGES)
    assert not run.is_rescored and not [*run.directory.rglob("*16bit*")]
    evaluation = vqa.evaluate_run(run)
    assert evaluation.oof.view_names == ("rotation 0", "rotation 2")
    report = vqa.write_report(run, evaluation).read_text()
    assert "scoring in 16 bits was left out: does not fit by computation: 0.5" in report and "0.01 GiB free" in report
    monkeypatch.undo()


def test_preflight_says_whether_the_unquantised_model_fits(four_bits_on_the_cpu, mini_data, tmp_path, monkeypatch):
    config = vqa.Config.preset("demo", data_dir=str(mini_data), cache_dir=str(tmp_path), quantization="4bit")
    config = dataclasses.replace(config, score_precision="16bit")
    fits = vqa.preflight(config, rows=4)["scoring in 16 bits"]
    assert fits.startswith("0.5") and "GiB for the unquantised model" in fits
    monkeypatch.setattr(vqa, "free_gib", lambda: 0.1)
    assert vqa.preflight(config, rows=4)["scoring in 16 bits"].startswith("does not fit by computation: 0.5")


def test_scoring_in_16_bits_is_left_out_where_the_time_budget_ends(four_bit_run, monkeypatch):
    run = run_all(four_bit_run())
    monkeypatch.setattr(vqa.Run, "seconds_left", lambda self: 0.0)
    vqa.run_stages(run, [0, 1], ["rescore"], quiet)
    events = [record["event"] for record in vqa.read_json_lines(run.directory / "events.jsonl")]
    assert not run.is_rescored and any(event.startswith("rescore fold 1 was left out") for event in events)


def test_weights_that_are_not_quantised_have_no_other_precision_to_score_in(demo_config, replace):
    with pytest.raises(ValueError, match="'score_precision' is '16bit'; it needs 'trained' where quantization is"):
        replace(demo_config, score_precision="16bit")
