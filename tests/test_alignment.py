"""The model is trained exactly where it is read: same prompt, same position, same letters, on both families."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import perturb_adapter, use_huggingfaces_forward
from qwen_vl_utils import process_vision_info

import vqa_helpers as vqa


def own_inputs(session, text, path):
    """The processor's own inputs for an image that qwen_vl_utils resized, as its documentation has it."""
    patch = session.processor.image_processor.patch_size
    vision = [{"role": "user", "content": [{"type": "image", "image": path}]}]
    images, _ = process_vision_info(vision, image_patch_size=patch)
    return session.processor(text=[text], images=images, do_resize=False, return_tensors="pt")


def huggingface_loss(session, model, frame):
    """The usual recipe: prompt and answer in one chat, every label -100 but the answer's letter, HF's own loss."""
    use_huggingfaces_forward(session)
    losses = []
    for _, row in frame.iterrows():
        messages = vqa.build_messages(row)
        answered = [*messages, {"role": "assistant", "content": row["answer"]}]
        texts = [
            session.processor.apply_chat_template(answered, tokenize=False),
            session.processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            ),
        ]
        full, prompt = (own_inputs(session, text, row["image_path"]) for text in texts)
        labels = torch.full_like(full["input_ids"], -100)
        position = prompt["input_ids"].shape[1]
        labels[0, position] = full["input_ids"][0, position]
        losses.append(model(**full, labels=labels).loss)
    return torch.stack(losses).mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat(
        [parameter.grad.flatten() for parameter in vqa.trainable_parameters(model).values()]
    )


def test_loss_and_gradients_equal_huggingfaces_own(session, demo_rows, replace):
    session.config = replace(session.config, loss="vocabulary", shuffle_choices=False)
    frame = demo_rows.train.head(4)
    model = perturb_adapter(vqa.attach_lora(session.model, session.config, seed=0)).train()
    batch = vqa.collate(
        session, [vqa.make_prompt(session, frame, row, [(0, 1, 2, 3)]) for row in range(4)]
    )
    ours = vqa.training_loss(session, vqa.answer_hidden_states(session, batch), batch)
    our_gradients = gradients(model, ours)
    theirs = huggingface_loss(session, model, frame)
    their_gradients = gradients(model, theirs)
    assert our_gradients.norm() > 1e-3
    assert abs(ours.item() - theirs.item()) <= 1e-5 * abs(theirs.item())
    assert (our_gradients - their_gradients).norm() <= 1e-5 * their_gradients.norm()


def test_prompt_equals_the_processors_own_and_holds_no_answer(session, demo_rows):
    for row in range(3):
        record = demo_rows.train.iloc[row]
        prompt = vqa.make_prompt(session, demo_rows.train, row, [(0, 1, 2, 3)])
        text = vqa.render_prompt(session.processor, vqa.build_messages(record))
        own = own_inputs(session, text, record["image_path"])
        batch = vqa.collate(session, [prompt])
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw"):
            assert torch.equal(batch[name], own[name].to(batch[name].dtype)), name
        assert set(own) - {"pixel_values"} <= set(vqa.MODEL_INPUTS)
        assert torch.equal(torch.cat(batch["pixel_values"]), own["pixel_values"])
        assert text.endswith("<|im_start|>assistant\n")
        other = {**record, "answer": "d" if record["answer"] == "a" else "a", "label": 3}
        assert vqa.build_messages(other) == vqa.build_messages(record)


def test_position_ids_are_the_ones_the_model_computes_itself(session, demo_rows):
    prompts = [vqa.make_prompt(session, demo_rows.train, row, [(0, 1, 2, 3)]) for row in range(3)]
    batch = vqa.collate(session, prompts)
    inputs = {name: batch[name] for name in vqa.MODEL_INPUTS}
    pixels = torch.cat(batch["pixel_values"])
    with torch.no_grad():
        given = session.model(**inputs, pixel_values=pixels).logits
        del inputs["position_ids"]
        computed = session.model(**inputs, pixel_values=pixels).logits
    assert torch.equal(given[:, -1], computed[:, -1])


def test_batches_of_eight_agree_with_single_questions(session, demo_rows, replace):
    frame = demo_rows.train.head(24)
    views = [vqa.TTAView("rotation 0")]
    perturb_adapter(vqa.attach_lora(session.model, session.config, seed=0))
    session.config = replace(session.config, infer_batch_size=8)
    batched = vqa.predict_logits(session, frame, views)
    session.config = replace(session.config, use_batch_inference=False)
    single = vqa.predict_logits(session, frame, views)
    lengths = {
        len(vqa.make_prompt(session, frame, row, [(0, 1, 2, 3)]).input_ids) for row in range(24)
    }
    assert len(lengths) > 3  # padding took part
    assert np.abs(batched - single).max() <= 1e-4


def test_best_letter_is_the_first_token_of_generate_restricted_to_letters(session, demo_rows):
    frame = demo_rows.test
    # One variant a letter, so that the best token and the best log-sum-exp are the same letter.
    session.letter_token_ids = tuple((variants[0],) for variants in session.letter_token_ids)
    session.letter_head_weights = session.model.lm_head.weight[
        [token for (token,) in session.letter_token_ids]
    ]
    allowed = [variants[0] for variants in session.letter_token_ids]
    session.vision_cache.fill(
        frame, vqa.pixel_budget(session.config, session.processor), session.progress
    )
    logits = vqa.predict_logits(session, frame, [vqa.TTAView("rotation 0")])[:, 0]
    generated = []
    for start in range(0, len(frame), 40):
        rows = range(start, min(start + 40, len(frame)))
        batch = vqa.collate(
            session, [vqa.make_prompt(session, frame, row, [(0, 1, 2, 3)]) for row in rows]
        )
        inputs = {name: batch[name] for name in vqa.MODEL_INPUTS if name != "position_ids"}
        images = [vqa._load_pixels(session, prompt) for prompt in batch["prompts"]]
        output = session.model.generate(
            **inputs,
            pixel_values=torch.cat(images),
            max_new_tokens=1,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda *_: allowed,
        )
        generated += [allowed.index(token) for token in output[:, -1].tolist()]
    assert logits.argmax(1).tolist() == generated


@pytest.fixture
def processor(demo_config):
    return vqa.load_processor(demo_config)


MESSAGES = vqa.build_messages(
    {"question": "몇 개인가요?", "a": "1", "b": "2", "c": "3", "d": "4", "image_path": "x.jpg"}
)


def test_every_letter_is_one_token_with_its_variants(processor):
    letters = vqa.check_template(processor, MESSAGES)
    decoded = [[processor.tokenizer.decode([token]) for token in variants] for variants in letters]
    assert decoded == [[choice, choice.upper(), f" {choice}"] for choice in "abcd"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # a thinking block before the answer, in finished chats only
        ("{{- '<|im_start|>' + message.role + '\\n' }}", None),
        # a default system prompt, in prompts only
        (
            "{%- for message in messages %}",
            "{%- if add_generation_prompt %}You are helpful.{%- endif %}{%- for message in messages %}",
        ),
    ],
)
def test_a_template_that_renders_prompt_and_training_text_differently_is_refused(
    processor, old, new
):
    thinking = old + "{%- if message.role == 'assistant' %}<think>\n\n</think>\n\n{%- endif %}"
    assert old in processor.chat_template
    processor.chat_template = processor.chat_template.replace(old, new or thinking, 1)
    with pytest.raises(vqa.TemplateError, match="(?s)inference prompt:.*training text:"):
        vqa.check_template(processor, MESSAGES)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\nb", "\na", "Two letters share a token"),
        ("\nb", "\nbb bb", "The letter 'b' is not one token"),
    ],
)
def test_letters_that_share_a_token_or_take_several_are_refused(processor, old, new, message):
    prompt = vqa.render_prompt(processor, MESSAGES)

    def tokenizer(text):
        return processor.tokenizer(text.removeprefix(prompt[:-1]).replace(old, new))

    with pytest.raises(vqa.TemplateError, match=message):
        vqa.choice_token_ids(SimpleNamespace(tokenizer=tokenizer), prompt)


def test_no_row_of_the_attention_mask_is_empty_and_real_rows_see_no_padding():
    """A row that may attend to nothing is NaN in some SDPA kernels (seen as NaN gradients on an H200)."""
    full = vqa.shared_prefix_mask(torch.tensor([[-1, -1, 0, 0], [0, 0, 0, 0]]))
    assert full.shape == (2, 1, 4, 4) and full.any(-1).all()
    assert full[0, 0, 2:].tolist() == [[False, False, True, False], [False, False, True, True]]
    assert torch.equal(full[1, 0], torch.ones(4, 4, dtype=torch.bool).tril())


def test_orders_behind_one_prefix_see_the_prefix_and_themselves_only():
    mask = vqa.shared_prefix_mask(torch.tensor([[-1, 0, 0, 1, 2, 2]]))[0, 0]
    assert mask[3].tolist() == [False, True, True, True, False, False]
    assert mask[5].tolist() == [False, True, True, False, True, True]


def test_lengths_are_aligned_on_a_gpu_where_something_is_padded_anyway(session, demo_rows):
    prompts = [vqa.make_prompt(session, demo_rows.train, row, [(0, 1, 2, 3)]) for row in range(4)]
    plain = vqa.collate(session, prompts)
    session.device = torch.device("cuda")
    aligned, single = vqa.collate(session, prompts), vqa.collate(session, prompts[:1])
    session.device = torch.device("cpu")
    assert aligned["input_ids"].shape[1] % 16 == 0 and single["input_ids"].shape[1] == len(
        prompts[0].input_ids
    )
    with torch.no_grad():
        states = [vqa.answer_hidden_states(session, batch) for batch in (plain, aligned)]
    assert torch.allclose(*states, atol=1e-5)
