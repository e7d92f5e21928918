"""Part 3, Session and Batches: prompts and positions are the processor's and model's own."""

import numpy as np
import pytest
import torch
from references import own_inputs
from running import open_run_session, plain_prompts

import vqa_helpers as vqa


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
        other_answer = "d" if record["answer"] == "a" else "a"
        other = {**record, "answer": other_answer, "label": 3}
        assert vqa.build_messages(other) == vqa.build_messages(record)


def test_position_ids_are_the_ones_the_model_computes_itself(session, demo_rows):
    prompts = plain_prompts(session, demo_rows.train, range(3))
    batch = vqa.collate(session, prompts)
    inputs = {name: batch[name] for name in vqa.MODEL_INPUTS}
    pixels = torch.cat(batch["pixel_values"])
    with torch.no_grad():
        given = session.model(**inputs, pixel_values=pixels).logits
        del inputs["position_ids"]
        computed = session.model(**inputs, pixel_values=pixels).logits
    assert torch.equal(given[:, -1], computed[:, -1])


def test_lengths_are_aligned_on_a_gpu_where_something_is_padded_anyway(session, demo_rows):
    assert not session.replays_training
    prompts = plain_prompts(session, demo_rows.train, range(4))
    plain = vqa.collate(session, prompts)
    session.device = torch.device("cuda")
    aligned = vqa.collate(session, prompts)
    single = vqa.collate(session, prompts[:1])
    session.device = torch.device("cpu")
    assert aligned["input_ids"].shape[1] % 16 == 0
    assert single["input_ids"].shape[1] == len(prompts[0].input_ids)
    with torch.no_grad():
        states = vqa.answer_hidden_states(session, plain)
        aligned_states = vqa.answer_hidden_states(session, aligned)
    assert torch.allclose(states, aligned_states, atol=1e-5)


def test_an_error_while_preparing_names_the_row(mini_run):
    run = mini_run()
    session = open_run_session(run)
    without_height = run.train.head(2).assign(height=np.nan)
    with pytest.raises(vqa.DataError, match="Row train_0001 .* cannot be prepared: "):
        vqa.make_prompt(session, without_height, 0, [(0, 1, 2, 3)])
    of_another_size = run.train.assign(height=32, width=64)
    prompts = plain_prompts(session, of_another_size, [0])
    with pytest.raises(vqa.DataError, match="gives the grid"):
        vqa.collate(session, prompts)


def whole_positions(session, ids, grid):
    """What the model says of the whole sequence at once."""
    return session.family.images.positions(session.model, torch.from_numpy(ids)[None], grid)


def test_positions_behind_the_image_are_the_models_own(session, demo_rows):
    frame = demo_rows.train.assign(width=[96, 160, 64, 96] * (len(demo_rows.train) // 4))
    session.head_positions.clear()
    for row in range(4):
        order = [(0, 1, 2, 3), (3, 0, 2, 1)][: 1 + row % 2]
        prompt = vqa.make_prompt(session, frame, row, order)
        for number, end in enumerate(prompt.answer_positions, start=1):
            own = prompt.segments <= 0
            own |= prompt.segments == number
            ids = prompt.input_ids[: end + 1][own[: end + 1]]
            wanted = whole_positions(session, ids, prompt.grid)
            found = prompt.position_ids[:, : end + 1][:, own[: end + 1]]
            assert np.array_equal(found, wanted)
            assert found.dtype == wanted.dtype
    assert len(session.head_positions) == 3  # the first and the last row begin alike


def test_the_model_is_asked_for_positions_once_for_rows_that_begin_alike(
    session, demo_rows, monkeypatch
):
    asked = []
    own = session.model.model.get_rope_index

    def counted(*arguments, **options):
        asked.append(options)
        return own(*arguments, **options)

    monkeypatch.setattr(session.model.model, "get_rope_index", counted)
    session.head_positions.clear()
    prompts = plain_prompts(session, demo_rows.train, range(6))
    assert len(asked) == len({prompt.grid for prompt in prompts}) < 6
