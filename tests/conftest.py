"""Fixtures on tiny real objects, the two markers, and their default: `gpu` and `slow` run only when asked for by -m."""

import atexit
import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import vqa_helpers as vqa  # noqa: E402

# Temporary files, the cached vision features among them, also those of the workers that tests start.
tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="vqa-tests-")
atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)
TINY = vqa.DEMO / "tiny_qwen3_vl"
MARKERS = {"gpu": "needs a CUDA device", "slow": "takes more than a minute"}


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(config, items):
    if config.getoption("-m"):
        return
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in MARKERS)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


# What the tiny twin of each family has beside the common shape: its config's class, then text and vision settings.
MROPE = {"rope_type": "default", "rope_theta": 10000.0}
TWINS = {
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {"rope_parameters": MROPE | {"mrope_section": [2, 3, 3]}},
        {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeConfig",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        | {"rope_parameters": MROPE | {"mrope_section": [2, 3, 3]}},
        {"patch_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
    ),
    "qwen3_5": (
        "Qwen3_5Config",
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
        }
        | {"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
        | {"rope_parameters": MROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}},
        {"patch_size": 16, "num_position_embeddings": 64},
    ),
}


def build_twin(family: str, folder: Path) -> Path:
    """A random model of that family, smaller than the demo's, with the demo's tokenizer and chat template."""
    import torch
    import transformers
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    demo = transformers.AutoProcessor.from_pretrained(TINY)
    token = demo.tokenizer.convert_tokens_to_ids
    kind, more_text, more_vision = TWINS[family]
    text = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text |= {
        "vocab_size": len(demo.tokenizer),
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    text |= {"pad_token_id": demo.tokenizer.pad_token_id, "bos_token_id": None}
    text |= {"eos_token_id": demo.tokenizer.eos_token_id}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
    }
    config = getattr(transformers, kind)(
        text_config=text | more_text,
        vision_config=vision | more_vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    processor = demo
    if family == "qwen2_5_vl":
        images = Qwen2VLImageProcessor(patch_size=14)
        tools = images, demo.tokenizer, demo.video_processor
        processor = transformers.Qwen2_5_VLProcessor(*tools, chat_template=demo.chat_template)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def perturb_adapter(model):
    """LoRA starts as the identity; random weights make its gradients, and a swapped adapter, visible."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in vqa.trainable_parameters(model).values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def use_huggingfaces_forward(session):
    """Take back what `remove_gpu_syncs` and `use_fast_layers` replaced in the model."""
    inner = session.model.model
    for module in (inner, inner.language_model, *session.decoder_layers):
        for name in ("get_placeholder_mask", "_deepstack_process", "forward"):
            vars(module).pop(name, None)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, Path]:
    """Family name -> folder of its tiny model."""
    return {"qwen3_vl": TINY} | {
        family: build_twin(family, tmp_path_factory.mktemp(family)) for family in TWINS
    }


@pytest.fixture(scope="session")
def demo_rows() -> vqa.Competition:
    """The built-in demo competition, loaded once."""
    return vqa.load_competition(vqa.DEMO)


@pytest.fixture
def demo_config(tmp_path) -> vqa.Config:
    return vqa.Config.preset("demo", output_dir=str(tmp_path / "outputs"), data_dir=str(vqa.DEMO))


@pytest.fixture(params=["qwen3_vl", "qwen2_5_vl"])
def session(request, model_folders, demo_rows) -> vqa.Session:
    """An open session of each family on the CPU; dropout 0, so that only the path matters."""
    config = vqa.Config.preset(
        "demo", model_id=str(model_folders[request.param]), label_smoothing=0.0
    )
    return vqa.open_session(config, demo_rows.train.iloc[0])


@pytest.fixture(scope="session")
def mini_data(tmp_path_factory) -> Path:
    """A competition folder of 36 training and 12 test rows of the demo."""
    folder = tmp_path_factory.mktemp("mini")
    for name, rows in (("train", 36), ("test", 12), ("sample_submission", 12)):
        frame = pd.read_csv(vqa.DEMO / f"{name}.csv", dtype=str, keep_default_na=False).head(rows)
        frame.to_csv(folder / f"{name}.csv", index=False)
        for path in frame.get("path", ()):
            (folder / path).parent.mkdir(exist_ok=True)
            shutil.copy(vqa.DEMO / "images" / path, folder / path)
    return folder


@pytest.fixture
def mini_run(mini_data, tmp_path):
    """Make a run on the mini competition: mini_run(num_epochs=1, ...) -> Run."""

    def make(**overrides) -> vqa.Run:
        settings = {
            "data_dir": str(mini_data),
            "output_dir": str(tmp_path / "outputs"),
            "num_epochs": 1,
            "n_folds": 2,
            "max_fallback_share": 0.5,
        }
        config = vqa.Config.preset("demo", **(settings | overrides))
        competition = vqa.load_competition(config.data_dir)
        folds = vqa.make_folds(competition.train, config.n_folds, config.seed)
        return vqa.start_run(config, competition, folds)

    return make


@pytest.fixture
def replace():
    return dataclasses.replace


@pytest.fixture(autouse=True)
def quiet_logger():
    """Take back what setup_logging did, so that tests do not write into each other's files or captured streams."""
    yield
    for handler in list(vqa.LOGGER.handlers):
        vqa.LOGGER.removeHandler(handler)
        handler.close()
    vqa.LOGGER.propagate = True
