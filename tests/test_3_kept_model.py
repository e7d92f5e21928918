"""Part 3, Kept model: a model that is used again scores as one that was just loaded."""

import functools
import gc
import json
import shutil
import weakref

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from running import ONE_VIEW

import vqa_helpers as vqa


@pytest.fixture
def keeping(monkeypatch):
    """This process as one that will do another command."""
    kept = vqa.KeptModel(is_wanted=True)
    monkeypatch.setattr(vqa, "KEPT_MODEL", kept)
    return kept


def change_the_model(session):
    """What training does to a base model, and leaves."""
    adapted = vqa.attach_lora(session.model, session.config, seed=1)
    vqa.use_fast_layers(session, adapted, 4)
    adapted.train()
    adapted.unload()
    session.vision_cache.offload_tower()


def test_a_kept_model_is_as_after_loading_until_it_is_not_wanted(keeping, demo_rows):
    config = vqa.Config.preset("demo", run_name="first")
    rows = demo_rows.train.head(4)
    example = demo_rows.train.iloc[0]
    first = vqa.open_session(config, example)
    fresh = vqa.predict_logits(first, rows, ONE_VIEW, "fresh")
    layers = first.decoder_layers
    assert "forward" not in vars(layers[0])
    change_the_model(first)
    assert "forward" in vars(layers[0])

    second = vqa.open_session(vqa.Config.preset("demo", run_name="second"), example)
    assert second.model is first.model
    assert second.processor is first.processor
    assert "forward" not in vars(layers[0])
    assert not second.model.training
    assert not vqa.trainable_parameters(second.model)
    again = vqa.predict_logits(second, rows, ONE_VIEW, "again")
    assert np.array_equal(fresh, again)

    keeping.is_wanted = False  # the last command: a stage may load another model after this one
    third = vqa.open_session(config, example)
    assert third.model is first.model
    assert keeping.model is keeping.processor is None


def test_a_layer_gets_the_forward_back_that_loading_gave_it(keeping, demo_rows):
    """accelerate replaces it where weights are quantised or lie on several GPUs."""
    config = vqa.Config.preset("demo")
    session = vqa.open_session(config, demo_rows.train.iloc[0])
    layer = session.decoder_layers[0]
    of_loading = functools.partial(layer.forward)
    layer.forward = of_loading
    keeping.keep(session.model)
    change_the_model(session)
    assert layer.forward is not of_loading
    keeping.take(config)
    assert layer.forward is of_loading


def test_the_tower_returns_to_where_the_model_computes(keeping, demo_rows):
    config = vqa.Config.preset("demo")
    session = vqa.open_session(config, demo_rows.train.iloc[0])
    keeping.device = torch.device("meta")  # in place of a GPU: another device than the CPU
    keeping.take(config)
    tower = vqa.vision_tower(session.model)
    assert {weight.device.type for weight in tower.parameters()} == {"meta"}


@pytest.mark.parametrize("next_settings", [{}, {"lora_r": 4}])
def test_a_model_that_is_not_wanted_again_leaves_the_memory(next_settings, keeping, demo_rows):
    """Also where loading has given its layers forwards of their own, which hold them."""
    config = vqa.Config.preset("demo")
    session = vqa.open_session(config, demo_rows.train.iloc[0])
    layer = session.decoder_layers[0]
    layer.forward = functools.partial(layer.forward)
    keeping.keep(session.model)
    is_there = weakref.ref(layer)
    keeping.is_wanted = False
    taken = keeping.take(vqa.Config.preset("demo", **next_settings))
    assert (taken is None) == bool(next_settings)
    del session, layer, taken
    gc.collect()
    assert is_there() is None


def test_a_model_of_other_settings_is_loaded_and_the_kept_one_goes(keeping, demo_rows):
    example = demo_rows.train.iloc[0]
    first = vqa.open_session(vqa.Config.preset("demo"), example)
    second = vqa.open_session(vqa.Config.preset("demo", lora_r=4), example)
    assert second.model is not first.model
    assert keeping.model is second.model


def test_a_model_whose_files_were_replaced_is_loaded_anew(keeping, demo_rows, tmp_path):
    folder = shutil.copytree(vqa.Config.preset("demo").model_path, tmp_path / "model")
    config = vqa.Config.preset("demo", model_id=str(folder))
    session = vqa.open_session(config, demo_rows.train.iloc[0])
    assert keeping.take(config) is session.model
    weights = folder / "model.safetensors"
    shutil.copyfile(weights, tmp_path / "new")  # as many bytes
    (tmp_path / "new").replace(weights)
    assert keeping.load_processor(config) is not session.processor
    assert keeping.take(config) is None


def test_a_hub_model_of_another_revision_is_loaded_anew(keeping, demo_rows, tmp_path, monkeypatch):
    """As where another process has downloaded one."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--some--model"
    (cache / "refs").mkdir(parents=True)
    tiny = vqa.Config.preset("demo").model_path
    config = vqa.Config.preset("demo", model_id="some/model")
    models = []
    for revision in ("1" * 40, "2" * 40):
        snapshot = shutil.copytree(tiny, cache / "snapshots" / revision)
        settings = json.loads((snapshot / "config.json").read_text())
        (snapshot / "config.json").write_text(json.dumps({**settings, "revision": revision}))
        (cache / "refs" / "main").write_text(revision)
        for _ in range(2):
            models.append(vqa.open_session(config, demo_rows.train.iloc[0]).model)
        assert models[-1].config.revision == revision
    assert models[0] is models[1] is not models[2]
    assert models[2] is models[3]
