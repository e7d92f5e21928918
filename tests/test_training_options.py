"""What a run may do beside the plain recipe: 16-bit scores, a model on all rows, changed images, paraphrases."""

import colorsys
import dataclasses
import json
import shutil
import weakref

import numpy as np
import pytest
import transformers
from PIL import Image

import vqa_helpers as vqa


def quiet(*_, **__):
    pass


def run_all(run, stages=("train", "predict"), progress=quiet):
    """The zero-shot scores and these stages of all folds, in this process."""
    vqa.run_stages(run, [0], ["zeroshot"], quiet)
    vqa.run_stages(run, list(run.config.folds_to_train), stages, progress)
    return run


# ---------------------------------------------------------------------------------------- all kinds of weights at once
def planted_weights(run, kinds):
    """What the selection of weights reads of trained folds: logits (n, 4) by each kind from labels and fold."""
    for fold in (0, 1):
        rows, scores = run.train[run.train["fold"] == fold], {}
        for number, (kind, logits_of) in enumerate(kinds.items()):
            logits = logits_of(rows["label"].to_numpy(), fold)[:, None]
            path = run.fold_dir(fold) / f"validation_{kind}.npz"
            vqa.write_logits(path, rows, logits, ["rotation 0"], run.fingerprint)
            scores[kind] = {"accuracy": 0.5, "nll": float(number)}
        result = {"fold": fold, "best_epoch": 1, "kinds": scores, "history": {}, "adapters": {}}
        vqa.atomic_write(run.fold_dir(fold) / "result.json", json.dumps(result))


def noisy(seed):
    """Each kind knows the answers but for its own noise."""
    return lambda labels, fold: (
        2 * np.eye(4)[labels]
        + 1.5 * np.random.default_rng([seed, fold]).normal(size=(len(labels), 4))
    )


def sure(of, misses):
    """So sure of an answer, which misses the label by `misses(row number)`."""
    return lambda labels, fold: of * np.eye(4)[(labels + misses(np.arange(len(labels)))) % 4]


@pytest.mark.parametrize(("seeds", "selected"), [((1, 2), "raw+ema"), ((1, 1), "raw")])
def test_all_kinds_of_weights_score_where_their_mean_is_better_than_the_best(
    mini_run, seeds, selected
):
    """Independent errors average out; of two kinds that are the same, one is enough."""
    run = mini_run(mix_weights=True)
    kinds = {kind: noisy(seed) for kind, seed in zip(("raw", "ema"), seeds, strict=True)}
    planted_weights(run, kinds)
    assert vqa.select_weights(run) == selected and run.selected_weights == selected.split("+")
    alone = mini_run(mix_weights=False)
    planted_weights(alone, kinds)
    assert vqa.select_weights(alone) == "raw"


@pytest.mark.parametrize(
    ("scaling", "raw", "ema"),
    [
        (
            True,
            sure(8, lambda row: row % 4),
            sure(12, lambda row: row % 9 == 0),
        ),  # EMA alone is best, once scaled
        (
            False,
            sure(2, lambda row: row % 6 == 0),
            sure(16, lambda row: row % 9 == 4),
        ),  # the mean is, were it scaled
    ],
)
def test_a_mean_of_weights_has_to_beat_each_kind_as_it_would_be_submitted(
    mini_run, scaling, raw, ema
):
    run = mini_run(mix_weights=True, use_temperature_scaling=scaling)
    planted_weights(run, {"raw": raw, "ema": ema})
    assert vqa.select_weights(run) == "raw"


@pytest.mark.slow
def test_mixed_weights_score_with_the_mean_of_all_kinds_and_continue_where_they_stopped(
    mini_run, monkeypatch
):
    monkeypatch.setattr(vqa, "is_mixing_better", lambda *_: True)
    run = mini_run(mix_weights=True, tta_rotations=2, train_folds=(0,), infer_batch_size=4)
    batches, stopped = [], []

    def stop(stage, done, *_, **__):
        batches.append(stage)
        if (
            batches.count("fold 0 test") == 5 and not stopped
        ):  # the second batch of three, by the second kind
            stopped.append(stage)
            raise vqa.Interrupted

    with pytest.raises(vqa.Interrupted):
        run_all(run, progress=stop)
    assert (run.fold_dir(0) / "oof.npz").exists() and not (run.fold_dir(0) / "test.npz").exists()
    batches.clear()
    run_all(run, progress=stop)
    assert batches == ["fold 0 test"] and not [*run.directory.rglob("*partial.npz")]
    paths = [run.fold_dir(0) / f"{name}.npz" for name in ("oof", "test")]
    resumed = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    run_all(run)
    assert [path.read_bytes() for path in paths] == resumed
    views = [vqa.TTAView("rotation 0"), vqa.TTAView("rotation 2", 2)]
    session, scores = vqa.open_session(run.config, run.train.iloc[0]), []
    for kind in ("raw", "ema"):
        adapted = vqa.load_adapter(session.model, run.fold_dir(0) / f"adapter_{kind}")
        scores.append(vqa.predict_logits(session, run.test, views))
        adapted.unload()
    present = np.isfinite(scores[0])
    assert np.abs(scores[0][present] - scores[1][present]).max() > 1e-3
    test = vqa.read_arrays(run.fold_dir(0) / "test.npz", run.fingerprint)["logits"]
    np.testing.assert_allclose(test, np.mean(scores, axis=0), atol=1e-5)
    ladder = vqa.evaluate_run(run).ladder
    assert {"with raw weights", "with EMA weights"} < set(ladder.index)
    assert (
        ladder.loc[vqa.STEP_ONE_VIEW, "cost"] == 2 and ladder.loc["with EMA weights", "cost"] == 1
    )
    assert vqa.views_cost(session, views) == pytest.approx(2 * (1 + 1 / 7))
    assert "raw, ema weights" in vqa.write_report(run, vqa.evaluate_run(run)).read_text()


# -------------------------------------------------------------------------------------------------- scoring in 16 bits
STAGES = ("train", "predict", "rescore")


@pytest.fixture
def four_bits_on_the_cpu(monkeypatch):
    """A quantised base model also without a GPU, which `load_model` refuses."""
    plain = vqa.load_model

    def load(config, runtime):
        if config.quantization == "none":
            return plain(config, runtime)
        options = {
            "quantization_config": vqa.quantization_config("4bit", "fp32"),
            "device_map": {"": "cpu"},
        }
        load = transformers.AutoModelForImageTextToText.from_pretrained
        return load(config.model_path, **options).requires_grad_(False).eval()

    monkeypatch.setattr(vqa, "load_model", load)


@pytest.fixture
def four_bit_run(four_bits_on_the_cpu, mini_run):
    def make(**overrides):
        settings = {
            "quantization": "4bit",
            "score_precision": "16bit",
            "tta_rotations": 2,
            "infer_batch_size": 4,
        }
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
    return np.where(
        np.arange(4) == labels[:, None, None], 5.0, np.where(np.isinf(logits), logits, 0.0)
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_what_was_trained_in_4_bit_is_also_scored_by_the_unquantised_model(
    family, four_bit_run, model_folders
):
    run = run_all(four_bit_run(model_id=str(model_folders[family])), STAGES)
    for fold in (0, 1):
        trained, whole = (
            vqa.read_arrays(run.fold_dir(fold) / f"oof{end}.npz", run.fingerprint)
            for end in ("", "_16bit")
        )
        assert whole["view_names"].tolist() == ["rotation 0 in 16 bits", "rotation 2 in 16 bits"]
        assert whole["ids"].tolist() == trained["ids"].tolist()
        assert (
            np.nanmax(
                np.abs(
                    np.where(np.isinf(whole["logits"]), np.nan, whole["logits"] - trained["logits"])
                )
            )
            > 1e-4
        )
    config = dataclasses.replace(run.config, quantization="none", score_precision="trained")
    session, held_out = (
        vqa.open_session(config, run.train.iloc[0]),
        run.train.query("fold == 1").reset_index(drop=True),
    )
    kind = json.loads((run.directory / "selection.json").read_text())["weights"]
    vqa.load_adapter(session.model, run.fold_dir(1) / f"adapter_{kind}")
    expected = vqa.predict_logits(
        session, held_out, [vqa.TTAView("rotation 0"), vqa.TTAView("rotation 2", 2)]
    )
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


@pytest.mark.slow
def test_scoring_in_16_bits_resumes_to_the_same_bytes_with_one_model_at_a_time(
    four_bit_run, tmp_path, monkeypatch
):
    opened, models, open_session = [], [], vqa.open_session

    def opening(config, example):
        opened.append(config.quantization)
        assert (
            config.quantization == "4bit" or models[-1]() is None
        )  # the worker's other model is freed
        session = open_session(config, example)
        models.append(weakref.ref(session.model))
        return session

    monkeypatch.setattr(vqa, "open_session", opening)
    plain = run_all(four_bit_run(output_dir=str(tmp_path / "plain")), STAGES)
    assert opened == ["4bit", "4bit", "none"]

    def stop(stage, done, total, **_):
        if (stage, done) == ("fold 0 test_16bit", 2):
            raise vqa.Interrupted

    stopped = four_bit_run(output_dir=str(tmp_path / "stopped"))
    with pytest.raises(vqa.Interrupted):
        run_all(stopped, STAGES, stop)
    assert [*stopped.fold_dir(0).glob("test_16bit.*.partial.npz")] and not stopped.is_rescored
    assert vqa.evaluate_run(stopped).oof.view_names == (
        "rotation 0",
        "rotation 2",
    )  # until all members have them
    opened.clear()
    run_all(stopped, STAGES)
    assert opened == ["none"]
    for fold in (0, 1):
        for name in ("oof_16bit.npz", "test_16bit.npz"):
            assert (stopped.fold_dir(fold) / name).read_bytes() == (
                plain.fold_dir(fold) / name
            ).read_bytes()


@pytest.mark.slow
def test_a_damaged_adapter_is_never_trained_anew_on_the_unquantised_model(four_bit_run):
    run = run_all(four_bit_run())
    kind = json.loads((run.directory / "selection.json").read_text())["weights"]
    weights = run.fold_dir(1) / f"adapter_{kind}" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\0\0\0\1")
    with pytest.raises(
        vqa.CheckpointError, match="is damaged; run again to make it anew from the last checkpoint"
    ):
        vqa.run_stages(run, [0, 1], ["rescore"], quiet)
    assert run.finished_folds == [0]
    run_all(run, STAGES)
    assert weights.read_bytes() == content and run.is_rescored


@pytest.mark.slow
def test_an_unquantised_model_that_does_not_fit_is_left_out_with_the_figures(
    four_bit_run, monkeypatch
):
    monkeypatch.setattr(vqa, "free_gib", lambda: 0.01)
    run = run_all(four_bit_run(), STAGES)
    assert not run.is_rescored and not [*run.directory.rglob("*16bit*")]
    evaluation = vqa.evaluate_run(run)
    assert evaluation.oof.view_names == ("rotation 0", "rotation 2")
    report = vqa.write_report(run, evaluation).read_text()
    assert (
        "scoring in 16 bits was left out: does not fit by computation: 0.5" in report
        and "0.01 GiB free" in report
    )


def test_preflight_says_whether_the_unquantised_model_fits(
    four_bits_on_the_cpu, mini_data, tmp_path, monkeypatch
):
    config = vqa.Config.preset(
        "demo", data_dir=str(mini_data), cache_dir=str(tmp_path), quantization="4bit"
    )
    config = dataclasses.replace(config, score_precision="16bit")
    fits = vqa.preflight(config, rows=4)["scoring in 16 bits"]
    assert fits.startswith("0.5") and "GiB for the unquantised model" in fits
    monkeypatch.setattr(vqa, "free_gib", lambda: 0.1)
    assert vqa.preflight(config, rows=4)["scoring in 16 bits"].startswith(
        "does not fit by computation: 0.5"
    )


@pytest.mark.slow
def test_scoring_in_16_bits_is_left_out_where_the_time_budget_ends(four_bit_run, monkeypatch):
    run = run_all(four_bit_run())
    monkeypatch.setattr(vqa.Run, "seconds_left", lambda self: 0.0)
    vqa.run_stages(run, [0, 1], ["rescore"], quiet)
    events = [record["event"] for record in vqa.read_json_lines(run.directory / "events.jsonl")]
    assert not run.is_rescored and any(
        event.startswith("rescore fold 1 was left out") for event in events
    )


def test_weights_that_are_not_quantised_have_no_other_precision_to_score_in(demo_config, replace):
    with pytest.raises(
        ValueError, match="'score_precision' is '16bit'; it needs 'trained' where quantization is"
    ):
        replace(demo_config, score_precision="16bit")


# ------------------------------------------------------------------------------------------------- a model on all rows


@pytest.fixture(scope="module")
def with_final(tmp_path_factory, mini_data):
    """A run of two folds and the model on all rows, whose images and wordings change."""
    folder = tmp_path_factory.mktemp("final")
    fields = {
        "num_epochs": 2,
        "n_folds": 2,
        "max_fallback_share": 0.5,
        "tta_rotations": 2,
        "cache_dir": str(folder / "c"),
    }
    fields |= {"final_retrain": True, "augment_images": 2, "paraphrases": 4, "save_every_steps": 1}
    fields |= {"data_dir": str(mini_data), "output_dir": str(folder / "outputs")}
    config = vqa.Config.preset("demo", **fields)
    competition = vqa.load_competition(config.data_dir)
    run = vqa.start_run(
        config, competition, vqa.make_folds(competition.train, config.n_folds, config.seed)
    )
    run_all(run)
    vqa.run_stages(run, [run.final_fold], ["train", "predict"], quiet)
    return run


def test_the_model_on_all_rows_is_one_more_member_of_the_mean_and_nothing_is_claimed_of_it(
    with_final,
):
    run = with_final
    assert run.finished_folds == [0, 1] and run.submission_models == [0, 1, 2]
    evaluation = vqa.evaluate_run(run)
    assert set(evaluation.oof.folds) == {0, 1} and set(evaluation.fold_table.index) == {0, 1}
    folds = vqa.predict_test(run, evaluation)
    logits = vqa.read_arrays(run.fold_dir(2) / "test.npz", run.fingerprint)["logits"]
    pooled = evaluation.calibration.temperatures[run.final_fold]
    assert evaluation.method == "mean"
    np.testing.assert_allclose(
        folds[2], vqa.softmax(vqa.combine_views(logits[:, evaluation.views]) / pooled)
    )
    written = vqa.write_submissions(run, evaluation)["ensemble"].set_index("id")["answer"][
        run.test["id"]
    ]
    expected = np.mean(list(folds.values()), axis=0).argmax(axis=1)
    assert written.tolist() == np.array(vqa.CHOICES)[expected].tolist() and len(folds) == 3
    last = evaluation.ladder.iloc[-1]
    assert (
        last.name == vqa.STEP_FINAL_MODEL
        and last["used"]
        and np.isnan([last["accuracy"], last["nll"], last["gain"]]).all()
    )
    assert "whether it helps cannot be seen here" in vqa.write_report(run, evaluation).read_text()


def test_the_model_on_all_rows_takes_the_epochs_that_the_folds_chose(
    with_final, mini_run, monkeypatch
):
    results = [vqa.read_fold_result(with_final, fold) for fold in (0, 1)]
    final = vqa.read_fold_result(with_final, 2)
    assert len(final.history) == vqa.final_epochs(with_final) and final.kinds == {
        "raw": {},
        "ema": {},
    }
    assert "accuracy" not in final.history
    monkeypatch.setattr(vqa, "select_weights", lambda run: "raw")
    monkeypatch.setattr(
        vqa,
        "read_fold_result",
        lambda run, fold: dataclasses.replace(results[fold], best_epoch=[5, 1][fold]),
    )
    assert vqa.final_epochs(with_final) == 3
    monkeypatch.setattr(
        vqa, "select_weights", lambda run: "ema"
    )  # an average ends with the last epoch, not the best
    assert vqa.final_epochs(with_final) == len(results[0].history)
    every_row = sum(
        len(step) for step in vqa.plan_epoch([1] * len(with_final.train), 8, (42, 2, 0))
    )
    last = vqa.read_json_lines(with_final.fold_dir(2) / "metrics.jsonl")[-1]
    assert last["step"] + 1 == -(-every_row // 8)  # all rows, in steps of eight


def copy_of(run, folder, without):
    """The run elsewhere, without what a pattern names."""
    target = folder / run.directory.name
    shutil.copytree(run.directory, target, ignore=shutil.ignore_patterns("*.lock", "session.json"))
    for path in sorted(target.glob(without), reverse=True):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    config = dataclasses.replace(run.config, output_dir=str(folder))
    return dataclasses.replace(run, directory=target, config=config)


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [3, 5])
def test_the_model_on_all_rows_resumes_to_the_same_bytes(with_final, tmp_path, stop_at):
    stopped = copy_of(with_final, tmp_path, "fold_2")

    def stop(stage, done, total, **_):
        if (stage, done) == ("fold 2 training", stop_at):
            raise vqa.Interrupted

    with pytest.raises(vqa.Interrupted):
        vqa.run_stages(stopped, [2], ["train", "predict"], stop)
    assert stopped.members == [0, 1]
    vqa.run_stages(stopped, [2], ["train", "predict"], quiet)
    for name in (
        "test.npz",
        "adapter_ema/adapter_model.safetensors",
        "adapter_raw/adapter_model.safetensors",
    ):
        assert (stopped.fold_dir(2) / name).read_bytes() == (
            with_final.fold_dir(2) / name
        ).read_bytes()


@pytest.mark.slow
def test_half_a_model_on_all_rows_is_left_out_and_continued_when_there_is_time(
    with_final, tmp_path, monkeypatch
):
    late = copy_of(with_final, tmp_path, "fold_2")
    monkeypatch.setattr(vqa.Run, "seconds_left", lambda self: 10.0)
    monkeypatch.setattr(vqa, "seconds_needed", lambda *_: 5.0)  # looked as if it fitted
    monkeypatch.setattr(vqa.FinalTrainer, "time_is_up", lambda self, speed: True)
    vqa.run_stages(late, [2], ["train", "predict"], quiet)
    assert late.members == [0, 1] and list(vqa.predict_test(late, vqa.evaluate_run(late))) == [0, 1]
    report = vqa.write_report(late, vqa.evaluate_run(late)).read_text()
    assert (
        "train fold 2 was left out: the time budget ended before its training, on all rows, did"
        in report
    )
    monkeypatch.undo()
    vqa.run_stages(late, [2], ["train", "predict"], quiet)
    assert (late.fold_dir(2) / "test.npz").read_bytes() == (
        with_final.fold_dir(2) / "test.npz"
    ).read_bytes()
    assert "was left out" not in vqa.write_report(late, vqa.evaluate_run(late)).read_text()


def test_no_model_on_all_rows_is_begun_where_the_time_does_not_hold_it(
    with_final, tmp_path, monkeypatch
):
    late = copy_of(with_final, tmp_path, "fold_2")
    longest = max(
        r["seconds"]
        for r in vqa.read_json_lines(late.directory / "stages.jsonl")
        if "train" in r["label"]
    )
    monkeypatch.setattr(vqa.Run, "inference_seconds", lambda *_, **__: 0.0)
    monkeypatch.setattr(
        vqa.Run, "seconds_left", lambda self: 1.5 * longest
    )  # enough for a fold, half of the rows
    vqa.run_stages(late, [2], ["train", "predict"], quiet)
    assert late.members == [0, 1] and not late.fold_dir(2).joinpath("checkpoints").exists()


# ------------------------------------------------------------------------------------------------------ changed images


def test_a_changed_image_is_a_function_of_seed_number_and_image(demo_rows):
    frame = demo_rows.train.head(30)
    once, again, other = (vqa.image_variants(frame, 2, seed) for seed in (42, 42, 43))
    assert (
        once.equals(again)
        and len(once) == 90
        and once["variant"].tolist() == [0] * 30 + [1] * 30 + [2] * 30
    )
    assert once.head(30).drop(columns="variant").equals(frame)
    assert (once["pixel_hash"][30:] != other["pixel_hash"][30:]).all()
    recipes = once["image_path"][30:].str.split("<variant>").str[1]
    assert recipes.nunique() == 2 * frame["pixel_hash"].nunique()
    fewer = vqa.image_variants(frame.iloc[5:9], 1, 42)  # whatever other rows there are
    assert fewer["image_path"][4:].tolist() == once["image_path"][35:39].tolist()
    for _, row in once.iloc[[0, 40, 70]].iterrows():
        image = vqa.load_image(row["image_path"])
        assert (
            image.size == (row["width"], row["height"])
            and image.tobytes() == vqa.load_image(row["image_path"]).tobytes()
        )


def test_images_with_text_to_read_are_not_cropped_and_others_little(demo_rows):
    changed = vqa.image_variants(demo_rows.train, 1, 42)
    before, after = (
        changed.query("variant == 0"),
        changed.query("variant == 1").reset_index(drop=True),
    )
    shares = np.minimum(after["width"] / before["width"], after["height"] / before["height"])
    read = set(before.query("type == 'ocr'")["pixel_hash"])
    is_read = before["pixel_hash"].isin(read).to_numpy()
    assert 10 < is_read.sum() < len(before) and (shares[is_read] == 1).all()
    assert (shares >= 0.94).all() and (
        shares[~is_read] < 1
    ).mean() > 0.3  # 95 %, and a pixel of rounding


def test_a_change_keeps_every_hue_and_the_picture_upright():
    colours = [
        (230, 30, 30),
        (240, 140, 20),
        (30, 160, 60),
        (40, 80, 220),
        (150, 60, 180),
        (250, 230, 40),
    ]
    image = Image.new("RGB", (60, 20))
    for number, colour in enumerate(colours):
        image.paste(colour, (10 * number, 0, 10 * number + 10, 20))
    for number in range(20):
        change = vqa.draw_image_change(np.random.default_rng(number), 60, 20, may_crop=False)
        changed = vqa.apply_image_change(image, change)
        assert changed.size == image.size and changed.tobytes() != image.tobytes()
        for place, colour in enumerate(colours):
            centre = (
                np.array(changed.crop((10 * place + 2, 2, 10 * place + 8, 18)))
                .reshape(-1, 3)
                .mean(axis=0)
            )
            hues = [colorsys.rgb_to_hsv(*(np.array(each) / 255))[0] for each in (colour, centre)]
            assert abs((hues[1] - hues[0] + 0.5) % 1 - 0.5) < 0.015, (colour, centre)  # 5 degrees
            assert np.abs(centre - colour).max() < 60


def test_training_draws_images_and_wordings_and_everything_else_sees_the_original(
    with_final, monkeypatch
):
    session = vqa.open_session(with_final.config, with_final.train.iloc[0])
    trainer = vqa.FoldTrainer(session, with_final, 0)
    epochs = [trainer.prompts(epoch) for epoch in range(3)]
    assert [prompt.image_path for prompt in epochs[1]] == [
        prompt.image_path for prompt in trainer.prompts(1)
    ]
    paths = [prompt.image_path for prompts in epochs for prompt in prompts]
    assert {path.split("<variant>")[0] for path in paths} == set(trainer.train["image_path"])
    changed = np.mean(["<variant>" in path for path in paths])
    assert 0.4 < changed < 0.9 and "<variant>" not in "".join(trainer.validation["image_path"])
    texts = [
        session.processor.tokenizer.decode(prompt.input_ids)
        for prompts in epochs
        for prompt in prompts
    ]
    starts = [task.split("{question}")[0].strip() for task in vqa._INSTRUCTIONS]
    drawn = [sum(start in text for text in texts) for start in starts]
    assert min(drawn) >= 3 and sum(drawn) == len(texts)
    plain = vqa.make_prompt(session, trainer.validation, 0, [(0, 1, 2, 3)])
    assert starts[0] in session.processor.tokenizer.decode(plain.input_ids)
    everything = vqa.image_variants(with_final.train, 2, with_final.config.seed)
    monkeypatch.setattr(
        session.vision_cache, "compute", None
    )  # the workers kept the features of all variants
    assert session.vision_cache.fill(
        everything, vqa.pixel_budget(with_final.config, session.processor), quiet
    )
    assert {"features"} <= set(vqa.collate(session, epochs[0][:8]))
    assert vqa.expected_memory(with_final.config, with_final.train).image_token > 0


def test_variants_leave_the_features_of_the_original_as_they_are(
    session, demo_rows, tmp_path, monkeypatch
):
    frame, budget, batches = (
        demo_rows.train.head(20),
        vqa.pixel_budget(session.config, session.processor),
        [],
    )
    prepare = vqa.VisionCache.prepare
    monkeypatch.setattr(
        vqa.VisionCache,
        "prepare",
        lambda self, *given: batches.append(given[0]) or prepare(self, *given),
    )
    caches = [
        vqa.VisionCache(session.model, session.processor, str(tmp_path / name))
        for name in ("plain", "more")
    ]
    for cache, rows in zip(caches, (frame, vqa.image_variants(frame, 1, 42)), strict=True):
        assert cache.fill(rows, budget, quiet)
    alone = len([batch for batch in batches if "<variant>" not in "".join(batch)]) // 2
    assert (
        batches[:alone] == batches[alone : 2 * alone]
    )  # in the same company: its last bits may depend on that
    for digest in frame["pixel_hash"]:
        pairs = zip(*(cache.read((digest, *budget)) for cache in caches), strict=True)
        assert all(first.equal(second) for first, second in pairs)
    assert len(caches[1].shards) == 2 * len(caches[0].shards)


def test_preflight_counts_the_features_of_the_variants(mini_data, tmp_path):
    config = vqa.Config.preset("demo", data_dir=str(mini_data), cache_dir=str(tmp_path))
    plain, more = (
        vqa.preflight(dataclasses.replace(config, augment_images=count), rows=4) for count in (0, 3)
    )
    name = "vision features, on disk or in RAM"
    gib = [facts["memory"]["computed GiB"][name] for facts in (plain, more)]
    assert 2 < gib[1] / gib[0] <= 4  # the test rows have no variants


# ------------------------------------------------------------------------------------------------------------ wordings


def test_paraphrases_ask_the_same_and_are_no_longer_than_the_first():
    first, *others = vqa._INSTRUCTIONS
    assert len(others) == 3 and len(set(vqa._INSTRUCTIONS)) == 4
    for task in others:
        assert len(task) <= len(first) and task.index("{question}") < task.index("{choices}")
        assert all(
            f"{letter}" in task.split("{question}")[0] for letter in "abcd"
        ) and task.endswith("{choices}")


def test_a_template_of_the_config_has_one_wording(demo_config, replace):
    config = replace(demo_config, paraphrases=4, prompt_templates={"ocr": "{question}\n{choices}"})
    wordings = [vqa.prompt_templates(config, number) for number in range(4)]
    assert {wording["ocr"] for wording in wordings} == {"{question}\n{choices}"}
    assert len({wording["color"] for wording in wordings}) == 4 and wordings[
        0
    ] == vqa.prompt_templates(config)


def test_every_wording_goes_through_the_check_of_the_template(
    demo_config, demo_rows, replace, monkeypatch
):
    checked, check = [], vqa.check_template
    monkeypatch.setattr(
        vqa, "check_template", lambda *given: checked.append(str(given[1])) or check(*given)
    )
    vqa.open_session(replace(demo_config, paraphrases=3), demo_rows.train.iloc[0])
    assert len(set(checked)) == 3
