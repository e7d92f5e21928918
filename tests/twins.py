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


# Three of four layers of the large models are recurrent.
RECURRENT = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": rope([1, 1, 0], partial_rotary_factor=0.25),
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
        RECURRENT,
        {"patch_size": 16, "num_position_embeddings": 64},
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeConfig",
        RECURRENT
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 32,
        },
        {"patch_size": 16, "num_position_embeddings": 64},
    ),
    "internvl": (
        "InternVLConfig",
        {"model_type": "qwen3", "head_dim": 16},
        # Tiles of 64 x 64 pixels in 4 tokens.
        {
            "patch_size": 16,
            "image_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    ),
}
# What stands around and for an image in InternVL's prompts.
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
# As in the repositories that end in -HF: no thinking, and no system text of its own.
INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


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


def internvl_processor():
    """InternVL's processor, with the demo's tokenizer and small tiles."""
    import transformers
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    images = GotOcr2ImageProcessor(size={"height": 64, "width": 64}, max_patches=4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        TINY, extra_special_tokens=INTERNVL_TOKENS
    )
    return transformers.InternVLProcessor(
        images,
        tokenizer,
        InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=INTERNVL_TEMPLATE,
    )


def twin_processor(family: str, demo):
    """The demo's processor, or one of the family's own kind."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    if family == "internvl":
        return internvl_processor()
    if family != "qwen2_5_vl":
        return demo
    return transformers.Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(patch_size=14),
        demo.tokenizer,
        demo.video_processor,
        chat_template=demo.chat_template,
    )


def image_token_ids(family: str, processor) -> dict:
    """The model's names for the tokens of an image."""
    if family == "internvl":
        return {"image_token_id": processor.image_token_id, "image_seq_length": 4}
    token = processor.tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
    }


def build_twin(family: str, folder: Path) -> Path:
    """A random model of that family, smaller than the demo's, in this folder."""
    import torch
    import transformers

    processor = twin_processor(family, transformers.AutoProcessor.from_pretrained(TINY))
    kind, own_text_settings, own_vision_settings = TWINS[family]
    config = getattr(transformers, kind)(
        text_config=text_settings(processor.tokenizer) | own_text_settings,
        vision_config=VISION_SETTINGS | own_vision_settings,
        tie_word_embeddings=True,
        **image_token_ids(family, processor),
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():  # padding starts as zeros, which it is not in real models
        model.get_input_embeddings().weight[processor.tokenizer.pad_token_id].normal_(std=0.02)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
