"""Tiny models of two towers (SigLIP, SigLIP 2, CLIP) with a tokenizer of the demo's own words."""

import json
from pathlib import Path

import vqa_helpers as vqa

VOCABULARY = 1024
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 16,
}


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


def make_twin(family, side=64):
    """A random model of that family and its processor: siglip, siglip2 (any sides) or clip."""
    import torch
    import transformers

    make_tokenizer = gemma_tokenizer if family == "siglip2" else plain_tokenizer
    tokenizer = make_tokenizer(demo_statements())
    text = {
        **TEXT,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    if family == "siglip":
        config = transformers.SiglipConfig(
            text_config=text, vision_config={**VISION, "image_size": side}
        )
        images = transformers.SiglipImageProcessor(size={"height": side, "width": side})
        processor = transformers.SiglipProcessor(images, tokenizer)
    elif family == "siglip2":
        patches = (side // 16) ** 2
        config = transformers.Siglip2Config(
            text_config=text, vision_config={**VISION, "num_patches": patches}
        )
        images = transformers.Siglip2ImageProcessor(patch_size=16, max_num_patches=patches)
        processor = transformers.Siglip2Processor(images, tokenizer)
    else:
        config = transformers.CLIPConfig(
            text_config=text, vision_config={**VISION, "image_size": side}, projection_dim=32
        )
        images = transformers.CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
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
