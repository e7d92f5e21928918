"""What the module's own computations are compared with: Hugging Face's processor and loss."""

import functools

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from qwen_vl_utils import process_vision_info

import vqa_helpers as vqa


def perturb_adapter(model):
    """Random LoRA weights: it starts as the identity, which hides its gradients or a swap."""
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
    if hasattr(inner, "visual"):
        for module in inner.visual.modules():
            if isinstance(vars(module).get("forward"), functools.partial):
                del module.forward


def own_inputs(session, text, path):
    """The processor's own inputs, for Qwen of an image that qwen_vl_utils resized as it says."""
    if session.model.config.model_type == "internvl":
        image = vqa.load_image(path)
        return session.processor(text=[text], images=[image], max_patches=4, return_tensors="pt")
    patch = session.processor.image_processor.patch_size
    vision = [{"role": "user", "content": [{"type": "image", "image": path}]}]
    images, _ = process_vision_info(vision, image_patch_size=patch)
    return session.processor(text=[text], images=images, do_resize=False, return_tensors="pt")


def huggingface_loss(session, model, frame):
    """The usual recipe: prompt and answer in one chat, every label -100 but the letter's."""
    use_huggingfaces_forward(session)
    options = vqa.template_options(session.processor)
    render = functools.partial(session.processor.apply_chat_template, **options)
    losses = []
    for _, row in frame.iterrows():
        messages = vqa.build_messages(row)
        answered = [*messages, {"role": "assistant", "content": row["answer"]}]
        full_text = render(answered, tokenize=False)
        prompt_text = render(messages, tokenize=False, add_generation_prompt=True)
        full = own_inputs(session, full_text, row["image_path"])
        prompt = own_inputs(session, prompt_text, row["image_path"])
        labels = torch.full_like(full["input_ids"], -100)
        position = prompt["input_ids"].shape[1]
        labels[0, position] = full["input_ids"][0, position]
        losses.append(model(**full, labels=labels).loss)
    return torch.stack(losses).mean()


def use_pefts_layers(model):
    """Take back `use_fast_lora` in the model's adapter."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and type(layer).__name__.startswith("Fast"):
            layer.__class__ = type(layer).__bases__[0]


@torch.no_grad()
def huggingface_scores(session, frame, views):
    """Scores (n, views, 4) by transformers' and PEFT's own layers, a prompt at a time."""
    use_huggingfaces_forward(session)
    use_pefts_layers(session.model)
    scores = []
    for _, row in frame.iterrows():
        for view in views:
            text = vqa.render_prompt(session.processor, vqa.build_messages(row, view.order))
            logits = session.model(**own_inputs(session, text, row["image_path"])).logits
            by_letter = vqa.choice_logits(logits[:, -1], session.letter_token_ids)[0]
            scores.append(vqa.unpermute_scores(by_letter, view.order))
    return np.reshape(scores, (len(frame), len(views), 4))


def flat_gradients(model):
    """The gradients of all trainable parameters, one behind another."""
    parameters = vqa.trainable_parameters(model).values()
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return flat_gradients(model)
