"""Tiny models of every family, with the demo's tokenizer and chat template."""

from pathlib import Path

import vqa_helpers as vqa

TINY = vqa.DEMO / "tiny_qwen3_vl"


def rope(sections, **more):
    """Rotary positions whose frequencies are shared out to time, height and width."""
    return {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": sections,
        **more,
    }


# What each twin has beside the common shape: its config's class, then text and vision settings.
TWINS = {
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {"rope_parameters": rope([2, 3, 3])},
        {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeConfig",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "rope_parameters": rope([2, 3, 3]),
        },
        {"patch_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
    ),
    "qwen3_5": (
        "Qwen3_5Config",
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "rope_parameters": rope([1, 1, 0], partial_rotary_factor=0.25),
        },
        {"patch_size": 16, "num_position_embeddings": 64},
    ),
}


def text_settings(tokenizer) -> dict:
    """The language model that all twins have."""
    return {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }


VISION_SETTINGS = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
}


def twin_processor(family: str, demo):
    """The demo's processor; for Qwen2.5-VL one of its own kind, with larger patches."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    if family != "qwen2_5_vl":
        return demo
    return transformers.Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(patch_size=14),
        demo.tokenizer,
        demo.video_processor,
        chat_template=demo.chat_template,
    )


def build_twin(family: str, folder: Path) -> Path:
    """A random model of that family, smaller than the demo's, in this folder."""
    import torch
    import transformers

    demo = transformers.AutoProcessor.from_pretrained(TINY)
    token = demo.tokenizer.convert_tokens_to_ids
    kind, own_text_settings, own_vision_settings = TWINS[family]
    config = getattr(transformers, kind)(
        text_config=text_settings(demo.tokenizer) | own_text_settings,
        vision_config=VISION_SETTINGS | own_vision_settings,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    twin_processor(family, demo).save_pretrained(folder)
    return folder
