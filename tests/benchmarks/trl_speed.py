"""Training speed of TRL's SFTTrainer on a loaded Qwen-VL model, with LoRA on the language model only."""

import copy
import gc
import os
import statistics
import sys
import tempfile
import time
import traceback

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data loader's workers are forked

import datasets
import huggingface_hub
import numpy as np
import peft
import torch
import transformers
import trl
from PIL import Image

import vqa_helpers as vqa

huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL reports each trainer otherwise


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class StepClock(transformers.TrainerCallback):
    """Times at which each training step began, its batch at hand, and ended."""

    def __init__(self):
        self.begins, self.ends = [], []

    def on_step_begin(self, *_, **__):
        self.begins.append(now())

    def on_step_end(self, *_, **__):
        self.ends.append(now())


def text_of_length(processor, text_tokens: int) -> str:
    """A user text whose chat prompt, with one image but without its image tokens, has `text_tokens` tokens, +-3."""

    def length(text: str) -> int:
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        ]
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return (
            len(processor.tokenizer(prompt)["input_ids"]) - 1
        )  # without the one image placeholder

    text = "Answer:"
    while length(text + " a") <= text_tokens:
        text += " a"
    if abs(length(text) - text_tokens) > 3:
        raise ValueError(
            f"a chat prompt of {text_tokens} text tokens is not possible; the closest has {length(text)}"
        )
    return text


def make_rows(processor, image_size: int, text_tokens: int, number: int) -> datasets.Dataset:
    noise, text = np.random.default_rng(0), text_of_length(processor, text_tokens)
    pixels = (
        noise.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8) for _ in range(number)
    )
    columns = {"images": [[Image.fromarray(image)] for image in pixels]}
    columns["prompt"] = [[{"role": "user", "content": text}]] * number
    columns["completion"] = [
        [{"role": "assistant", "content": "abcd"[row % 4]}] for row in range(number)
    ]
    return datasets.Dataset.from_dict(columns)  # which keeps the images as PNG


def trl_samples_per_second(
    model,
    processor,
    image_size: int,
    text_tokens: int,
    batch: int,
    checkpointing: bool,
    steps: int = 6,
) -> float:
    """Samples per second over the last `steps` - 2 steps, data loading included; `model` is left as it was."""
    cuda, processor, clock = model.device.type == "cuda", copy.deepcopy(processor), StepClock()
    pixels = {
        "shortest_edge": 1,
        "longest_edge": 4 * image_size**2 + 4096,
    }  # the image keeps its size
    processor.image_processor.size = type(processor.image_processor.size)(**pixels)
    rows = make_rows(processor, image_size, text_tokens, batch * steps)
    hooks = [(module._forward_hooks, dict(module._forward_hooks)) for module in model.modules()]
    parts = [
        *model.modules(),
        model.config,
        model.config.get_text_config(),
        model.generation_config,
    ]
    before, adapted, trainer = (
        hooks + [(vars(part), dict(vars(part))) for part in parts],
        None,
        None,
    )
    model.gradient_checkpointing_disable()  # TRL's setting decides
    try:
        lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": vqa.LORA_TARGETS}
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
        options = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": 1,
            "max_steps": steps,
        }
        options |= {
            "gradient_checkpointing": checkpointing,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }
        options |= {"bf16": cuda, "use_cpu": not cuda, "dataloader_num_workers": 4 if cuda else 0}
        options |= {
            "dataloader_pin_memory": cuda,
            "learning_rate": 1e-4,
            "max_length": None,
            "disable_tqdm": True,
        }
        options |= {"save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
        with tempfile.TemporaryDirectory() as folder:
            config = trl.SFTConfig(output_dir=folder, **options)
            trainer = trl.SFTTrainer(
                adapted, config, train_dataset=rows, processing_class=processor, callbacks=[clock]
            )
            trainer.remove_callback(transformers.PrinterCallback)
            began = now()
            ids = trainer.data_collator([rows[row] for row in range(batch)])["input_ids"]
            collation, images = now() - began, int((ids[0] == model.config.image_token_id).sum())
            trainer.train()
        step = statistics.median(
            clock.ends[i] - clock.ends[i - 1] for i in range(2, steps)
        )  # of steps 3, 4, ...
        busy = statistics.median(clock.ends[i] - clock.begins[i] for i in range(2, steps))
        sys.stdout.write(
            f"TRL: {images} image + {ids.shape[1] - images} other tokens, batch {batch}, recomputing {checkpointing}, "
            f"{step:.3f} s a step, {busy:.3f} s without the wait for data; one process collates in {collation:.3f} s\n"
        )
        return batch / step
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold the activations
        raise
    finally:
        if adapted is not None:
            adapted.unload()
        for (
            now_there,
            earlier,
        ) in before:  # hooks, TRL's forward, checkpointing flags, training mode, settings
            now_there.clear()
            now_there.update(earlier)
        adapted = trainer = None
        gc.collect()
        torch.cuda.empty_cache()
