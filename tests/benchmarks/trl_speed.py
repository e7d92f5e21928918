"""Training speed of TRL's SFTTrainer on a loaded Qwen-VL model, LoRA on the language model only.

`bench_gpu.py` calls this; it is not a script of its own.
"""

import contextlib
import copy
import gc
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator

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
    """Seconds, once the GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class StepClock(transformers.TrainerCallback):
    """Times at which each training step began, its batch at hand, and ended."""

    def __init__(self):
        self.begins: list[float] = []
        self.ends: list[float] = []

    def on_step_begin(self, *_, **__):
        self.begins.append(now())

    def on_step_end(self, *_, **__):
        self.ends.append(now())

    def step_seconds(self) -> float:
        """Median from the end of a step to the end of the next, the first two steps left out."""
        steps = range(2, len(self.ends))
        return statistics.median(self.ends[step] - self.ends[step - 1] for step in steps)

    def busy_seconds(self) -> float:
        """The same without the wait for data."""
        steps = range(2, len(self.ends))
        return statistics.median(self.ends[step] - self.begins[step] for step in steps)


# === Questions ====================================================================================
def text_of_length(processor, text_tokens: int) -> str:
    """A user text whose chat prompt has `text_tokens` tokens, or up to 3 more or less.

    The prompt has one image, whose tokens do not count. Raises ValueError where there is no such
    text.
    """

    def length(text: str) -> int:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens = processor.tokenizer(prompt)["input_ids"]
        return len(tokens) - 1  # without the one image placeholder

    text = "Answer:"
    while length(text + " a") <= text_tokens:
        text += " a"
    closest = length(text)
    if abs(closest - text_tokens) > 3:
        raise ValueError(
            f"a chat prompt of {text_tokens} text tokens is not possible; the closest has {closest}"
        )
    return text


def make_rows(processor, image_size: int, text_tokens: int, number: int) -> datasets.Dataset:
    """Rows of one random image of `image_size` pixels square, a text, and a letter as answer."""
    random = np.random.default_rng(0)
    text = text_of_length(processor, text_tokens)
    images = []
    completions = []
    for row in range(number):
        pixels = random.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
        images.append([Image.fromarray(pixels)])
        completions.append([{"role": "assistant", "content": "abcd"[row % 4]}])
    columns = {
        "images": images,
        "prompt": [[{"role": "user", "content": text}]] * number,
        "completion": completions,
    }
    return datasets.Dataset.from_dict(columns)  # which keeps the images as PNG


# === Training =====================================================================================
@contextlib.contextmanager
def left_as_it_was(model) -> Iterator[None]:
    """Put back what training changes in the model's modules and configs.

    That is hooks, TRL's forward, checkpointing flags, training mode and settings.
    """
    states = [module._forward_hooks for module in model.modules()]
    states += [vars(module) for module in model.modules()]
    states.append(vars(model.config))
    states.append(vars(model.config.get_text_config()))
    states.append(vars(model.generation_config))
    earlier_states = [dict(state) for state in states]
    try:
        yield
    finally:
        for state, earlier in zip(states, earlier_states, strict=True):
            state.clear()
            state.update(earlier)
        gc.collect()
        torch.cuda.empty_cache()


def training_arguments(
    folder: str, batch: int, checkpointing: bool, steps: int, cuda: bool
) -> trl.SFTConfig:
    """SFTTrainer's settings: no files, no logs, no reports; data loading by 4 processes."""
    return trl.SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        max_steps=steps,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=cuda,
        use_cpu=not cuda,
        dataloader_num_workers=4 if cuda else 0,
        dataloader_pin_memory=cuda,
        learning_rate=1e-4,
        max_length=None,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
    )


def train(adapted, processor, rows, arguments: trl.SFTConfig) -> StepClock:
    """Train the adapted model by SFTTrainer on the rows; prints what a step consists of."""
    clock = StepClock()
    trainer = trl.SFTTrainer(
        adapted, arguments, train_dataset=rows, processing_class=processor, callbacks=[clock]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    batch = arguments.per_device_train_batch_size
    began = now()
    ids = trainer.data_collator([rows[row] for row in range(batch)])["input_ids"]
    collating = now() - began
    image_tokens = int((ids[0] == adapted.config.image_token_id).sum())
    other_tokens = ids.shape[1] - image_tokens
    trainer.train()
    sys.stdout.write(
        f"TRL: {image_tokens} image + {other_tokens} other tokens, batch {batch}, "
        f"recomputing {arguments.gradient_checkpointing}, "
        f"{clock.step_seconds():.3f} s a step, "
        f"{clock.busy_seconds():.3f} s without the wait for data; "
        f"one process collates in {collating:.3f} s\n"
    )
    return clock


def trl_samples_per_second(
    model,
    processor,
    image_size: int,
    text_tokens: int,
    batch: int,
    checkpointing: bool,
    steps: int = 6,
) -> float:
    """Samples per second over the last `steps` - 2 steps, data loading included.

    `model` is left as it was.
    """
    processor = copy.deepcopy(processor)
    pixels = {"shortest_edge": 1, "longest_edge": 4 * image_size**2 + 4096}  # it keeps its size
    size_class = type(processor.image_processor.size)
    processor.image_processor.size = size_class(**pixels)
    rows = make_rows(processor, image_size, text_tokens, batch * steps)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=vqa.LORA_TARGETS,
    )
    is_on_gpu = model.device.type == "cuda"
    with left_as_it_was(model), tempfile.TemporaryDirectory() as folder:
        model.gradient_checkpointing_disable()  # TRL's setting decides
        adapted = peft.get_peft_model(model, lora)
        try:
            arguments = training_arguments(folder, batch, checkpointing, steps, is_on_gpu)
            clock = train(adapted, processor, rows, arguments)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold the activations
            raise
        finally:
            adapted.unload()
            del adapted
    return batch / clock.step_seconds()
