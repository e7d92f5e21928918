"""Checkpoints of tiny models in 4 bits, as others publish them."""

import json
import shutil

import vqa_helpers as vqa

LANGUAGE_MODEL_ONLY = ["visual", "model.visual", "lm_head"]


def store_in_4_bit(source, folder, dtype="float32", device="cpu", **settings):
    """A checkpoint as others publish it: the twin in `source`, quantised by transformers alone."""
    import transformers

    quantised = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": LANGUAGE_MODEL_ONLY,
    }
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        source,
        dtype=dtype,
        quantization_config=transformers.BitsAndBytesConfig(**(quantised | settings)),
        device_map={"": device},
    )
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(source, folder, ignore=weights, dirs_exist_ok=True)
    model.save_pretrained(folder)
    return folder


def edit_config(folder, **settings):
    """Change a checkpoint's own statement about how it is stored."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"] |= settings
    path.write_text(json.dumps(content))


def copy_with(stored, folder, **settings):
    """A copy of a checkpoint, with these settings in its quantization_config."""
    edit_config(shutil.copytree(stored, folder), **settings)
    return folder


def config_of(folder, **settings):
    settings = {"quantization": "4bit", "label_smoothing": 0.0} | settings
    return vqa.Config.preset("demo", model_id=str(folder), **settings)
