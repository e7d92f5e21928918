"""Every family's tiny twin goes through the whole pipeline and computes what Hugging Face's own forward pass does."""

import json

import numpy as np
import peft
import pytest
from conftest import TWINS, perturb_adapter
from safetensors.torch import load_file
from test_alignment import gradients, huggingface_loss

import vqa_helpers as vqa

NOT_TRAINED = ("visual", "experts", "lm_head", "embed_tokens", "norm", "conv1d", "mlp.gate.")


@pytest.fixture(params=sorted(vqa.FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def family_session(family, model_folders, demo_rows):
    config = vqa.Config.preset("demo", model_id=str(model_folders[family]), label_smoothing=0.0)
    return vqa.open_session(config, demo_rows.train.iloc[0])


def files(run):
    """What a run leaves behind: adapters, logits and submission."""
    patterns = ("fold_0/adapter_*/adapter_model.safetensors", "fold_0/oof.npz", "fold_0/test.npz")
    return {path.name: path.read_bytes() for pattern in patterns for path in run.directory.glob(pattern)}


def test_there_is_a_twin_of_every_family():
    assert {"qwen3_vl", *TWINS} == set(vqa.FAMILIES)


def test_a_family_trains_caches_rotates_and_resumes_to_the_same_bytes(family, mini_run, model_folders, tmp_path):
    settings = {"model_id": str(model_folders[family]), "train_folds": (0,), "tta_rotations": 2, "batch_size": 4}
    settings |= {"num_epochs": 1, "lora_dropout": 0.1, "save_every_steps": 2, "infer_batch_size": 4}
    plain = mini_run(**settings, output_dir=str(tmp_path / "plain"), cache_dir=str(tmp_path / "cache"))
    vqa.run_stages(plain, [0], ["train", "predict"], lambda *_, **__: None)
    assert [*(tmp_path / "cache").glob("*/*.safetensors")]  # the features are kept

    def stop(stage, done, total, **_):
        if (stage, done) == ("fold 0 training", 3):
            raise vqa.Interrupted

    stopped = mini_run(**settings, output_dir=str(tmp_path / "stopped"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(vqa.Interrupted):
        vqa.run_stages(stopped, [0], ["train", "predict"], stop)
    assert stopped.fold_dir(0).joinpath("checkpoints").exists() and not files(stopped)
    vqa.run_stages(stopped, [0], ["train", "predict"], lambda *_, **__: None)
    assert files(stopped) == files(plain) and len(files(plain)) >= 3

    logits = vqa.read_arrays(plain.fold_dir(0) / "test.npz", plain.fingerprint)["logits"]
    assert logits.shape == (12, 2, 4) and np.isfinite(logits).any(axis=(1, 2)).all()
    weights = load_file(plain.fold_dir(0) / "adapter_raw" / "adapter_model.safetensors")
    assert not [name for name in weights if any(part in name for part in NOT_TRAINED)]
    every_layer = {name.split(".layers.")[1].split(".")[0] for name in weights}
    settings = json.loads((model_folders[family] / "config.json").read_text())["text_config"]
    assert len(every_layer) == settings["num_hidden_layers"]


def test_a_familys_loss_and_gradients_equal_huggingfaces_own(family_session, demo_rows, replace):
    session, frame = family_session, demo_rows.train.head(3)
    session.config = replace(session.config, loss="vocabulary", shuffle_choices=False)
    model = vqa.quicken(session, vqa.attach_lora(session.model, session.config, seed=0), questions=3)
    perturb_adapter(model).train()
    batch = vqa.collate(session, [vqa.make_prompt(session, frame, row, [(0, 1, 2, 3)]) for row in range(3)])
    ours = vqa.training_loss(session, vqa.answer_states(session, batch), batch)
    our_gradients = gradients(model, ours)
    for layer in model.modules():  # back to PEFT's own layers
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.__class__ = type(layer).__bases__[0]
    theirs = huggingface_loss(session, model, frame)
    their_gradients = gradients(model, theirs)
    assert our_gradients.norm() > 1e-3
    assert abs(ours.item() - theirs.item()) <= 1e-5 * abs(theirs.item())
    assert (our_gradients - their_gradients).norm() <= 1e-4 * their_gradients.norm()


def test_a_familys_rotations_score_like_prompts_of_their_own(family_session, demo_rows, monkeypatch):
    views = [vqa.View(f"rotation {turn}", turn) for turn in range(4)]
    perturb_adapter(vqa.attach_lora(family_session.model, family_session.config, seed=0)).eval()
    together = vqa.predict_logits(family_session, demo_rows.test.head(5), views)
    alone = [vqa.predict_logits(family_session, demo_rows.test.head(5), [view]) for view in views]
    assert np.allclose(together, np.concatenate(alone, axis=1), atol=1e-5)
    assert np.abs(together[:, 0] - together[:, 1]).max() > 1e-3


def test_a_model_of_another_family_is_refused_before_its_weights_are_read(tmp_path, model_folders):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    config = vqa.Config.preset("demo", model_id=str(folder))
    with pytest.raises(ValueError, match="is of the family 'qwen2_vl'; known are qwen2_5_vl, qwen3_vl, .*qwen3_5"):
        vqa.load_model(config, vqa.detect_runtime())
