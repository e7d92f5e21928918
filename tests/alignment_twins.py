"""Tiny models of two towers (SigLIP, SigLIP 2, CLIP) with a tokenizer of the demo's own words."""

import json
from pathlib import Path

import vqa_helpers as vqa

VOCABULARY = 1024
SIDE = 64  # of an image, in pixels


def demo_statements():
    """Every statement of the demo's training rows."""
    rows = vqa.read_table(vqa.DEMO / "train.csv", needed=("id",))
    types = [vqa.question_type(question) for question in rows["question"]]
    statements = []
    for row in rows.assign(type=types).to_dict("records"):
        statements += vqa.alignment_statements(row)
    return statements


def trained_parts(texts, first, normalizer=None, byte_level=False):
    """A tokenizer of parts of these texts' words; `first` begin its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=first)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def plain_tokenizer(texts):
    """For SigLIP and CLIP: a text ends with "</s>", which also pads."""
    import transformers
    from tokenizers import processors

    tokenizer = trained_parts(texts, ["<unk>", "</s>"], byte_level=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="</s>",
        model_input_names=["input_ids"],
    )


def gemma_tokenizer(texts):
    """For SigLIP 2 of any sides, whose processor always takes a tokenizer of this class."""
    from tokenizers import normalizers
    from transformers.models.siglip2.tokenization_siglip2 import Siglip2Tokenizer

    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    parts = trained_parts(texts, first, normalizers.Replace(" ", "▁"))
    model = json.loads(parts.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return Siglip2Tokenizer(model["vocab"], merges, model_input_names=["input_ids"])


def tower(width):
    """The shapes of either tower."""
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }


def make_twin(family, width=32, text_tokens=64):
    """A random model of that family and its processor: siglip, siglip2 (any sides) or clip."""
    import torch
    import transformers

    make_tokenizer = gemma_tokenizer if family == "siglip2" else plain_tokenizer
    tokenizer = make_tokenizer(demo_statements())
    text = {
        **tower(width),
        "max_position_embeddings": text_tokens,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    vision = {**tower(width), "patch_size": 16}
    if family == "siglip":
        config = transformers.SiglipConfig(
            text_config=text, vision_config={**vision, "image_size": SIDE}
        )
        images = transformers.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
        processor = transformers.SiglipProcessor(images, tokenizer)
    elif family == "siglip2":
        patches = (SIDE // 16) ** 2
        config = transformers.Siglip2Config(
            text_config=text, vision_config={**vision, "num_patches": patches}
        )
        images = transformers.Siglip2ImageProcessor(patch_size=16, max_num_patches=patches)
        processor = transformers.Siglip2Processor(images, tokenizer)
    else:
        config = transformers.CLIPConfig(
            text_config=text, vision_config={**vision, "image_size": SIDE}, projection_dim=width
        )
        images = transformers.CLIPImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        )
        processor = transformers.CLIPProcessor(images, tokenizer)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():  # they start as zeros, or nearly so
        model.logit_scale.fill_(2.0)
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(-3.0)
    return model, processor


def store_twin(family, folder: Path) -> Path:
    """`make_twin` in a folder that from_pretrained loads."""
    model, processor = make_twin(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
