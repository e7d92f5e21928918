"""Prompts, choice orders, views and the saved logits."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import perturb_adapter, use_huggingfaces_forward
from torch.utils._python_dispatch import TorchDispatchMode

import vqa_helpers as vqa

ROW = {
    "question": "사과는 몇 개인가요?",
    "a": "1개",
    "b": "2개",
    "c": "3개",
    "d": "4개",
    "image_path": "x.jpg",
    "type": "counting",
}


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_every_choice_order_has_its_inverse(order):
    values = np.array([10.0, 20.0, 30.0, 40.0])
    assert np.array_equal(vqa.unpermute_scores(vqa.permute_choices(values, order), order), values)
    text = vqa.build_messages(ROW, order)[1]["content"][1]["text"]
    assert text.endswith(
        "\n".join(f"{letter}. {ROW['abcd'[i]]}" for letter, i in zip("abcd", order, strict=True))
    )


def test_order_means_position_to_original_choice():
    """DESIGN: with order (2, 0, 3, 1) the prompt's choice a is the row's choice c."""
    assert vqa.permute_choices(["A", "B", "C", "D"], (2, 0, 3, 1)) == ["C", "A", "D", "B"]
    assert vqa.unpermute_scores([9, 0, 0, 0], (2, 0, 3, 1)).tolist() == [0, 0, 9, 0]


def test_prompt_order_is_system_image_hint_question_choices():
    system, user = vqa.build_messages(ROW)
    assert system["role"] == "system" and user["content"][0] == {"type": "image", "image": "x.jpg"}
    text = user["content"][1]["text"]
    assert text.index("세어") < text.index(ROW["question"]) < text.index("a. 1개")
    prompts = [
        vqa.build_messages(ROW, order)[1]["content"][1]["text"]
        for order in itertools.permutations(range(4))
    ]
    assert len({prompt[: prompt.index("a. ")] for prompt in prompts}) == 1  # one shared prefix


def test_a_blank_choice_is_left_out_and_letters_stay_with_positions():
    text = vqa.build_messages({**ROW, "c": " "}, (2, 0, 3, 1))[1]["content"][1]["text"]
    assert text.endswith("\nb. 1개\nc. 4개\nd. 2개")


def test_special_tokens_in_the_data_are_broken_up():
    row = {
        **ROW,
        "question": "<|im_end|> <|image_pad|> <think> a < b",
        "a": "{question} {0}",
        "b": "<|vision_start|>",
    }
    text = vqa.build_messages(row)[1]["content"][1]["text"]
    assert "<|" not in text and "<think>" not in text
    assert "< |im_end| > < |image_pad| > < think > a < b" in text and "a. {question} {0}" in text


def test_every_question_type_has_a_template_that_can_be_replaced():
    assert set(vqa.PROMPT_TEMPLATES) == set(vqa.QUESTION_TYPES)
    templates = {**vqa.PROMPT_TEMPLATES, "counting": "Q {question}\n{choices}"}
    assert vqa.build_messages(ROW, templates=templates)[1]["content"][1]["text"].startswith(
        "Q 사과는"
    )


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("사진 속 사람은 모두 몇 명인가요?", "counting"),
        ("접시 위에 놓인 컵의 개수는?", "counting"),
        ("How many dogs are there?", "counting"),
        ("자동차는 무슨 색인가요?", "color"),
        ("What color is the text?", "color"),
        ("간판에 적힌 글자는 무엇인가요?", "ocr"),
        ("버스 번호는 무엇입니까?", "ocr"),
        ("What does the sign say?", "ocr"),
        ("고양이가 있나요?", "yesno"),
        ("이 사진은 실내에서 찍은 것이 맞습니까?", "yesno"),
        ("Is the door open?", "yesno"),
        ("고양이는 어디에 있나요?", "location"),
        ("의자 왼쪽에 무엇이 있습니까?", "location"),
        ("Where is the cat?", "location"),
        ("탁자는 어떤 모양인가요?", "attribute"),
        ("What kind of animal is this?", "attribute"),
        ("이 장면을 설명하는 것은?", "general"),
    ],
)
def test_question_types(question, expected):
    assert vqa.question_type(question) == expected


def test_rotations_put_every_choice_on_every_letter_once():
    orders = np.array([vqa.TTAView("", rotation).order for rotation in range(4)])
    assert all(sorted(column) == [0, 1, 2, 3] for column in orders.T)


def test_views_of_a_config(demo_config, replace):
    processor = vqa.load_processor(demo_config)

    def names(**fields):
        return [view.name for view in vqa.all_views(replace(demo_config, **fields), processor)]

    assert names() == ["rotation 0", "rotation 1", "rotation 2", "rotation 3"]
    assert names(tta_rotations=2) == ["rotation 0", "rotation 2"]
    assert names(use_tta=False, tta_scales=(0.9, 1.0)) == ["rotation 0"]
    scales = names(
        tta_rotations=1, tta_scales=(0.9, 1.0), max_pixels=1000 * 1024, infer_max_pixels=1280 * 1024
    )
    assert scales == ["rotation 0", "scale 0.9", "scale 1.28"]


def test_text_is_never_shown_smaller():
    views = [
        vqa.TTAView("rotation 0"),
        vqa.TTAView("scale 0.9", 0, 0.9),
        vqa.TTAView("scale 1.1", 0, 1.1),
    ]
    assert [view.name for view in vqa.tta_views({"type": "ocr"}, views)] == [
        "rotation 0",
        "scale 1.1",
    ]
    assert vqa.tta_views({"type": "color"}, views) == views


def test_views_with_the_grid_of_another_view_are_left_out(session, demo_rows, replace):
    """A scale changes nothing for an image below the budget; where it does, the scores differ."""
    session.config = replace(
        session.config, max_pixels=6 * vqa.merged_patch_area(session.processor)
    )
    frame = demo_rows.train[demo_rows.train["type"] != "ocr"].head(3).reset_index(drop=True)
    views = [
        vqa.TTAView("rotation 0"),
        vqa.TTAView("scale 1.01", 0, 1.01),
        vqa.TTAView("scale 2", 0, 2.0),
    ]
    logits = vqa.predict_logits(session, frame, views)
    assert np.isnan(logits[:, 1]).all() and np.isfinite(logits[:, 2]).all()
    assert np.abs(logits[:, 0] - logits[:, 2]).max() > 1e-6


def test_scores_of_a_view_come_back_in_original_columns(session, demo_rows):
    """Rotating the choices of the row itself must give the scores of the rotated view, column for column."""
    frame = demo_rows.train.head(4)
    view = vqa.TTAView("rotation 1", 1)
    by_view = vqa.predict_logits(session, frame, [view])[:, 0]
    rotated = frame.copy()
    for position, original in enumerate(view.order):
        rotated["abcd"[position]] = frame["abcd"[original]]
    by_hand = vqa.predict_logits(session, rotated, [vqa.TTAView("plain")])[:, 0]
    assert np.allclose(by_view[:, list(view.order)], by_hand, atol=1e-5)


def test_a_blank_choice_is_masked(session, demo_rows):
    frame = demo_rows.train.head(2).assign(c=["", "x"])
    logits = vqa.predict_logits(
        session, frame, [vqa.TTAView("rotation 0"), vqa.TTAView("rotation 1", 1)]
    )
    assert np.isneginf(logits[0, :, 2]).all() and np.isfinite(logits[0][:, [0, 1, 3]]).all()
    assert np.isfinite(logits[1]).all()


def test_non_finite_scores_name_the_row(session, demo_rows, monkeypatch):
    monkeypatch.setattr(vqa, "choice_logits", lambda logits, letters: logits[:, :4] * np.nan)
    with pytest.raises(FloatingPointError, match="Non-finite scores for row train_0001"):
        vqa.predict_logits(session, demo_rows.train.head(1), [vqa.TTAView("rotation 0")])


def test_a_test_row_without_an_image_is_scored_on_grey(session, demo_rows):
    grey = vqa.grey_image()
    frame = demo_rows.test.head(1).assign(
        image_path=vqa.GREY_IMAGE, pixel_hash="", width=grey.width, height=grey.height
    )
    assert np.isfinite(vqa.predict_logits(session, frame, [vqa.TTAView("rotation 0")])).all()


def test_decoding_processes_give_the_same_scores(session, demo_rows, replace):
    frame, views = demo_rows.train.head(5), [vqa.TTAView("rotation 0")]
    expected = vqa.predict_logits(session, frame, views)
    session.config = replace(session.config, num_workers=2, infer_batch_size=2)
    assert np.allclose(vqa.predict_logits(session, frame, views), expected, atol=1e-5)


def test_generate_baseline_parses_letters_strictly(session, demo_rows, monkeypatch):
    answers = vqa.generate_baseline(session, demo_rows.train.head(2))
    assert all(answer is None or answer in vqa.CHOICES for answer in answers)
    texts = iter([" (B).", "a or b", "D"])
    monkeypatch.setattr(type(session.processor.tokenizer), "decode", lambda *_, **__: next(texts))
    assert vqa.generate_baseline(session, demo_rows.train.head(3), max_new_tokens=1) == [
        "b",
        None,
        "d",
    ]


def test_logits_file_has_the_schema_and_belongs_to_one_run(tmp_path):
    frame = pd.DataFrame({"id": ["x", "y"], "label": [0, 3]})
    logits = np.array([[[1, 2, 3, -np.inf]], [[0, 0, 0, 1]]])
    vqa.write_logits(tmp_path / "oof.npz", frame, logits, ["rotation 0"], "fingerprint")
    content = vqa.read_arrays(tmp_path / "oof.npz", "fingerprint")
    assert set(content) == {"ids", "logits", "view_names", "labels", "fingerprint"}
    assert content["logits"].dtype == np.float32 and np.isneginf(content["logits"][0, 0, 3])
    assert content["ids"].tolist() == ["x", "y"] and content["labels"].tolist() == [0, 3]
    vqa.write_logits(tmp_path / "test.npz", frame[["id"]], logits, ["rotation 0"], "fingerprint")
    assert vqa.read_arrays(tmp_path / "test.npz", "fingerprint")["labels"].tolist() == [-1, -1]
    with pytest.raises(vqa.CheckpointError, match="another configuration"):
        vqa.read_arrays(tmp_path / "oof.npz", "other")


def rotations(session, frame):
    """Scores of the four rotations, each as a prompt of its own: the reference for shared prefixes."""
    views = [vqa.TTAView("", turn) for turn in range(4)]
    return np.stack(
        [vqa.predict_logits(session, frame, [view])[:, 0] for view in views], axis=1
    ), views


def test_orders_behind_a_shared_prefix_score_like_separate_prompts(session, demo_rows):
    """With an adapter that matters, with padding in the batch, and with a question whose choices are all the same."""
    perturb_adapter(vqa.attach_lora(session.model, session.config, seed=0))
    frame = demo_rows.train.head(12).copy()
    frame.loc[3, list("abcd")] = "같음"
    separate, views = rotations(session, frame)
    prompts = [prompt for prompt, _ in vqa.plan_prompts(session, frame, views)]
    assert len(prompts) == 12 and len({len(prompt.input_ids) for prompt in prompts}) > 2
    assert (
        np.abs(vqa.predict_logits(session, frame, views) - separate).max()
        <= 1e-5 * np.abs(separate).max()
    )


def test_gradients_of_orders_behind_a_shared_prefix_are_those_of_separate_prompts(
    session, demo_rows
):
    model = perturb_adapter(vqa.attach_lora(session.model, session.config, seed=0)).train()
    orders = [vqa.TTAView("", turn).order for turn in range(4)]
    gradients = []
    for groups in ([orders], [[order] for order in orders]):
        prompts = [
            vqa.make_prompt(session, demo_rows.train, row, group)
            for row in range(3)
            for group in groups
        ]
        batch = vqa.collate(session, prompts)
        model.zero_grad()
        vqa.training_loss(session, vqa.answer_hidden_states(session, batch), batch).backward()
        gradients.append(
            torch.cat([value.grad.flatten() for value in vqa.trainable_parameters(model).values()])
        )
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm() and gradients[
        1
    ].norm() > 1e-3


def test_other_kinds_of_attention_get_separate_prompts(session, demo_rows, replace):
    session.runtime = replace(session.runtime, attention="eager")
    planned = vqa.plan_prompts(
        session, demo_rows.train.head(2), [vqa.TTAView("", turn) for turn in range(4)]
    )
    assert [len(prompt.orders) for prompt, _ in planned] == [1] * 8


class Waits(TorchDispatchMode):
    """Notes every operation whose result the CPU must know before it can go on."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        by_mask = "index" in str(operation) and any(
            index is not None and index.dtype == torch.bool for index in arguments[1] or ()
        )
        if by_mask or operation in (
            torch.ops.aten.nonzero.default,
            torch.ops.aten._local_scalar_dense.default,
        ):
            self.found.append(str(operation))
        return operation(*arguments, **(options or {}))


@pytest.mark.parametrize("rows", [(0, 0), (0, 1, 2)])  # without padding, and with it
def test_the_forward_pass_never_waits_for_the_gpu_and_computes_what_huggingfaces_does(
    session, demo_rows, rows
):
    orders = [(0, 1, 2, 3)]
    batch = vqa.collate(
        session, [vqa.make_prompt(session, demo_rows.train, row, orders) for row in rows]
    )
    batch["features"] = session.vision_cache.tower(batch)
    inputs = {name: batch[name] for name in vqa.MODEL_INPUTS}
    encoded = session.vision_cache.encoder_outputs(batch)
    with torch.no_grad(), Waits() as ours:
        states = vqa.answer_hidden_states(session, batch)
    use_huggingfaces_forward(session)
    with torch.no_grad(), Waits() as theirs:
        plain = session.model.model(
            **inputs, mm_encoder_outputs={"image": encoded}
        ).last_hidden_state[:, -1]
    assert theirs.found and not ours.found
    assert torch.allclose(states, plain, rtol=1e-5, atol=1e-5)


def test_an_image_with_too_few_features_is_an_error_that_names_it(session, demo_rows):
    batch = vqa.collate(session, [vqa.make_prompt(session, demo_rows.train, 0, [(0, 1, 2, 3)])])
    batch["features"] = [
        tuple(layer[1:] for layer in image) for image in session.vision_cache.tower(batch)
    ]
    with pytest.raises(vqa.DataError, match=r"\d+ image tokens but \d+ image features.*train_"):
        vqa.answer_hidden_states(session, batch)
