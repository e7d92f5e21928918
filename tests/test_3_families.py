"""Part 3, Families: each tiny twin goes through the whole pipeline and computes what HF does."""

import json

import accelerate
import numpy as np
import peft
import pytest
import torch
from references import gradients, huggingface_loss, perturb_adapter
from running import ROTATIONS, adapter_file, batch_loss, plain_batch, quiet, read_logits
from safetensors.torch import load_file
from twins import TWINS

import vqa_helpers as vqa

NOT_TRAINED = ("visual", "experts", "lm_head", "embed_tokens", "norm", "conv1d", "mlp.gate.")
NOT_TRAINED_OF_INTERNVL = ("vision_tower", "multi_modal_projector")
NOT_TRAINED += vqa.GATE_LAYERS
# A whole run takes seconds: the quick suite does one.
FAMILIES_OF_A_WHOLE_RUN = [
    "qwen3_vl",
    *[pytest.param(family, marks=pytest.mark.slow) for family in sorted(TWINS)],
]


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
    contents = {}
    for pattern in patterns:
        for path in run.directory.glob(pattern):
            contents[path.name] = path.read_bytes()
    return contents


def test_there_is_a_twin_of_every_family():
    assert {"qwen3_vl", *TWINS} == set(vqa.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES_OF_A_WHOLE_RUN)
def test_a_family_trains_caches_rotates_and_resumes_to_the_same_bytes(
    family, mini_run, model_folders, tmp_path
):
    settings = {
        "model_id": str(model_folders[family]),
        "train_folds": (0,),
        "tta_rotations": 2,
        "batch_size": 4,
        "num_epochs": 1,
        "lora_dropout": 0.1,
        "save_every_steps": 2,
        "infer_batch_size": 4,
        "cache_dir": str(tmp_path / "cache"),
    }
    plain = mini_run(**settings, output_dir=str(tmp_path / "plain"))
    vqa.run_stages(plain, [0], ["train", "predict"], quiet)
    assert [*(tmp_path / "cache").glob("*/*.safetensors")]  # the features are kept

    def stop(stage, done, total, **_):
        if (stage, done) == ("fold 0 training", 3):
            raise vqa.Interrupted

    stopped = mini_run(**settings, output_dir=str(tmp_path / "stopped"))
    with pytest.raises(vqa.Interrupted):
        vqa.run_stages(stopped, [0], ["train", "predict"], stop)
    assert stopped.fold_dir(0).joinpath("checkpoints").exists()
    assert not files(stopped)
    vqa.run_stages(stopped, [0], ["train", "predict"], quiet)
    assert files(stopped) == files(plain)
    assert len(files(plain)) >= 3

    logits = read_logits(plain, 0, "test")
    assert logits.shape == (12, 2, 4)
    assert np.isfinite(logits).any(axis=(1, 2)).all()
    weights = load_file(adapter_file(plain, 0, "raw"))
    others = (*NOT_TRAINED, *NOT_TRAINED_OF_INTERNVL)
    assert not [name for name in weights if any(part in name for part in others)]
    trained_layers = {name.split(".layers.")[1].split(".")[0] for name in weights}
    model_config = json.loads((model_folders[family] / "config.json").read_text())
    assert len(trained_layers) == model_config["text_config"]["num_hidden_layers"]


def test_a_familys_loss_and_gradients_equal_huggingfaces_own(family_session, demo_rows, replace):
    session = family_session
    frame = demo_rows.train.head(3)
    session.config = replace(session.config, loss="vocabulary", shuffle_choices=False)
    adapted = vqa.attach_lora(session.model, session.config, seed=0)
    model = vqa.use_fast_layers(session, adapted, questions=3)
    perturb_adapter(model).train()
    batch = plain_batch(session, frame, range(3))
    ours = batch_loss(session, batch)
    our_gradients = gradients(model, ours)
    for layer in model.modules():  # back to PEFT's and transformers' own layers
        vars(layer).pop("forward", None)
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.__class__ = type(layer).__bases__[0]
    theirs = huggingface_loss(session, model, frame)
    their_gradients = gradients(model, theirs)
    assert our_gradients.norm() > 1e-3
    assert abs(ours.item() - theirs.item()) <= 1e-5 * abs(theirs.item())
    assert (our_gradients - their_gradients).norm() <= 1e-4 * their_gradients.norm()


def test_a_familys_rotations_score_like_prompts_of_their_own(family_session, demo_rows):
    session = family_session
    frame = demo_rows.test.head(5)
    perturb_adapter(vqa.attach_lora(session.model, session.config, seed=0)).eval()
    assert len(vqa.plan_prompts(session, frame, ROTATIONS)) == len(frame)  # one holds all orders
    together = vqa.predict_logits(session, frame, ROTATIONS)
    alone = [vqa.predict_logits(session, frame, [view]) for view in ROTATIONS]
    assert np.allclose(together, np.concatenate(alone, axis=1), atol=1e-5)
    assert np.abs(together[:, 0] - together[:, 1]).max() > 1e-3


def test_a_model_of_another_family_is_refused_before_its_weights_are_read(tmp_path, model_folders):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    config = vqa.Config.preset("demo", model_id=str(folder))
    with pytest.raises(
        ValueError, match="is of the family 'qwen2_vl'; known are qwen2_5_vl, qwen3_vl, .*qwen3_5"
    ):
        vqa.load_model(config, vqa.detect_runtime())


def test_a_model_spread_over_devices_keeps_our_layers_and_accelerates_hooks(
    family_session, demo_rows, replace
):
    session = family_session
    session.config = replace(session.config, spread_model=True)
    batch = plain_batch(session, demo_rows.train, range(3))
    plain = vqa.answer_hidden_states(session, batch).detach()
    places = [f"model.{part}" for part in session.family.vision_parts]
    places += ["model.language_model", "lm_head"]
    for number in range(len(session.decoder_layers)):
        places.append(f"model.language_model.layers.{number}")
    accelerate.dispatch_model(session.model, dict.fromkeys(places, "cpu"), force_hooks=True)
    adapted = vqa.attach_lora(session.model, session.config, seed=0)
    vqa.use_fast_layers(session, adapted, questions=3).train()
    vqa.recompute_layers(session, stored=0)

    calls = []
    layer = session.decoder_layers[0]
    pre_forward = layer._hf_hook.pre_forward

    def counted(*arguments, **options):
        calls.append(1)
        return pre_forward(*arguments, **options)

    layer._hf_hook.pre_forward = counted
    states = vqa.answer_hidden_states(session, batch)
    assert torch.allclose(states, plain, atol=1e-6)
    assert len(calls) == 1
    vqa.training_loss(session, states, batch).backward()
    assert len(calls) == 1  # recomputed inside the hook, where the inputs lie where they are needed
    assert layer._old_forward.func is vqa.forward_with_checkpointing

    # A 4-bit model on one GPU has hooks, too.
    session.config = replace(session.config, spread_model=False)
    vqa.use_fast_layers(session, session.model, questions=3)
    vqa.answer_hidden_states(session, batch)
    assert layer.forward.func is vqa.forward_with_checkpointing
    assert len(calls) == 1


REFUSED = {
    "gemma3": "image tokens see each other in both directions, and most layers only the last",
    "gemma4": "most layers see only the last tokens of the sequence, and in its larger models",
    "internvl_chat": "take the repository of the same name that ends in -HF",
    "mllama": "there are no image tokens to put features into",
    "paligemma": "choice orders cannot share a prefix",
}


@pytest.mark.parametrize("family", vqa.REFUSED_FAMILIES)
@pytest.mark.parametrize("load", ["processor", "model"])
def test_a_family_that_does_not_suit_is_refused_with_its_reason(tmp_path, family, load):
    settings = {"model_type": family, "auto_map": {"AutoModel": "modeling.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = vqa.Config.preset("demo", model_id=str(tmp_path))
    message = f"is of the family '{family}', which is refused: .*{REFUSED[family]}.*known are qwen"
    with pytest.raises(ValueError, match=message):
        if load == "processor":
            vqa.load_processor(config)
        else:
            vqa.load_model(config, vqa.detect_runtime())


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("qwen2_5_vl", "768 tokens of 28 x 28 pixels"),
        ("internvl", "20 tokens, 5 tiles with the thumbnail"),
    ],
)
def test_the_log_says_how_many_tokens_an_image_takes(
    family, words, model_folders, demo_rows, caplog
):
    config = vqa.Config.preset("demo", model_id=str(model_folders[family]))
    with caplog.at_level("INFO"):
        vqa.open_session(config, demo_rows.train.iloc[0])
    assert f"Decision: an image takes at most {words}" in caplog.text


@pytest.mark.slow
def test_positions_of_every_family_are_its_models_own(family_session, demo_rows):
    session = family_session
    frame = demo_rows.train.assign(width=[64, 160, 96, 64] * (len(demo_rows.train) // 4))
    for row in range(4):
        prompt = vqa.make_prompt(session, frame, row, [(2, 0, 3, 1)])
        ids = torch.from_numpy(prompt.input_ids)[None]
        wanted = session.family.images.positions(session.model, ids, prompt.grid)
        assert np.array_equal(prompt.position_ids, wanted)
