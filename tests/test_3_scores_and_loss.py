"""Part 3, Scores and loss: trained exactly where it is read, at the same position and letters."""

import numpy as np
import pytest
import torch
from references import gradients, huggingface_loss, perturb_adapter, use_huggingfaces_forward
from running import ONE_VIEW, ROTATIONS, batch_loss, plain_batch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import vqa_helpers as vqa

# --- The four letters' scores ---------------------------------------------------------------------


def test_choice_score_is_the_log_sum_exp_of_the_letters_variants():
    logits = torch.randn(2, 10)
    scores = vqa.choice_logits(logits, ((0, 1), (2,), (3,), (4, 5, 6)))
    assert torch.allclose(scores[:, 0].exp(), logits[:, :2].exp().sum(1))
    assert torch.allclose(scores[:, 1], logits[:, 2])
    assert torch.allclose(scores[:, 3].exp(), logits[:, 4:7].exp().sum(1))


@pytest.mark.slow
def test_best_letter_is_the_first_token_of_generate_restricted_to_letters(session, demo_rows):
    frame = demo_rows.test.head(120)
    # One variant a letter, so that the best token and the best log-sum-exp are the same letter.
    allowed = [variants[0] for variants in session.letter_token_ids]
    session.letter_token_ids = tuple((token,) for token in allowed)
    session.letter_head_weights = session.model.lm_head.weight[allowed]
    budget = vqa.pixel_budget(session.config, session.processor)
    session.vision_cache.fill(frame, budget, session.progress)
    logits = vqa.predict_logits(session, frame, ONE_VIEW)[:, 0]
    generated = []
    for start in range(0, len(frame), 40):
        rows = range(start, min(start + 40, len(frame)))
        batch = plain_batch(session, frame, rows)
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


def test_no_row_of_the_attention_mask_is_empty_and_real_rows_see_no_padding():
    """A row that may attend to nothing is NaN in some SDPA kernels (seen on an H200)."""
    full = vqa.shared_prefix_mask(torch.tensor([[-1, -1, 0, 0], [0, 0, 0, 0]]))
    assert full.shape == (2, 1, 4, 4)
    assert full.any(-1).all()
    assert full[0, 0, 2:].tolist() == [[False, False, True, False], [False, False, True, True]]
    assert torch.equal(full[1, 0], torch.ones(4, 4, dtype=torch.bool).tril())


def test_orders_behind_one_prefix_see_the_prefix_and_themselves_only():
    mask = vqa.shared_prefix_mask(torch.tensor([[-1, 0, 0, 1, 2, 2]]))[0, 0]
    assert mask[3].tolist() == [False, True, True, True, False, False]
    assert mask[5].tolist() == [False, True, True, False, True, True]


READS_A_RESULT = (
    torch.ops.aten.nonzero.default,
    torch.ops.aten._local_scalar_dense.default,
)


def is_index_by_mask(operation, arguments):
    """How many rows a mask selects is known only when it is computed."""
    if "index" not in str(operation):
        return False
    indices = [index for index in arguments[1] or () if index is not None]
    return any(index.dtype == torch.bool for index in indices)


class Waits(TorchDispatchMode):
    """Notes every operation whose result the CPU must know before it can go on."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if operation in READS_A_RESULT or is_index_by_mask(operation, arguments):
            self.found.append(str(operation))
        return operation(*arguments, **(options or {}))


@pytest.mark.parametrize("rows", [(0, 0), (0, 1, 2)])  # without padding, and with it
def test_the_forward_pass_never_waits_for_the_gpu_and_computes_what_huggingfaces_does(
    session, demo_rows, rows
):
    batch = plain_batch(session, demo_rows.train, rows)
    batch["features"] = session.vision_cache.compute_for_batch(batch)
    inputs = {name: batch[name] for name in vqa.MODEL_INPUTS}
    encoded = session.vision_cache.encoder_outputs(batch)
    with torch.no_grad(), Waits() as ours:
        states = vqa.answer_hidden_states(session, batch)
    use_huggingfaces_forward(session)
    with torch.no_grad(), Waits() as theirs:
        output = session.model.model(**inputs, mm_encoder_outputs={"image": encoded})
    plain = output.last_hidden_state[:, -1]
    assert theirs.found
    assert not ours.found
    assert torch.allclose(states, plain, rtol=1e-5, atol=1e-5)


def test_an_image_with_too_few_features_is_an_error_that_names_it(session, demo_rows):
    batch = plain_batch(session, demo_rows.train, [0])
    features = session.vision_cache.compute_for_batch(batch)
    batch["features"] = [tuple(layer[1:] for layer in image) for image in features]
    with pytest.raises(vqa.DataError, match=r"\d+ image tokens but \d+ image features.*train_"):
        vqa.answer_hidden_states(session, batch)


# --- Loss -----------------------------------------------------------------------------------------


def test_choice_loss_equals_cross_entropy_where_all_choices_exist():
    scores = torch.randn(5, 4)
    labels = torch.tensor([0, 1, 2, 3, 3])
    present = torch.ones(5, 4, dtype=torch.bool)
    for smoothing in (0.0, 0.1):
        ours = vqa.choice_loss(scores, torch.eye(4)[labels], present, smoothing)
        expected = cross_entropy(scores, labels, label_smoothing=smoothing)
        assert torch.allclose(ours, expected)


def test_choice_loss_ignores_a_blank_choice_and_smooths_over_the_others():
    scores = torch.tensor([[1.0, 2.0, 3.0, 99.0]], requires_grad=True)
    present = torch.tensor([[True, True, True, False]])
    loss = vqa.choice_loss(scores, torch.eye(4)[[1]], present, 0.3)
    log_probabilities = torch.tensor([1.0, 2.0, 3.0]).log_softmax(0)
    expected = -(0.7 * log_probabilities[1] + 0.3 * log_probabilities.mean())
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert scores.grad[0, 3] == 0
    assert scores.grad.isfinite().all()


def test_loss_and_gradients_equal_huggingfaces_own(session, demo_rows, replace):
    session.config = replace(session.config, loss="vocabulary", shuffle_choices=False)
    frame = demo_rows.train.head(4)
    model = perturb_adapter(vqa.attach_lora(session.model, session.config, seed=0)).train()
    batch = plain_batch(session, frame, range(4))
    ours = batch_loss(session, batch)
    our_gradients = gradients(model, ours)
    theirs = huggingface_loss(session, model, frame)
    their_gradients = gradients(model, theirs)
    assert our_gradients.norm() > 1e-3
    assert abs(ours.item() - theirs.item()) <= 1e-5 * abs(theirs.item())
    assert (our_gradients - their_gradients).norm() <= 1e-5 * their_gradients.norm()


def reference_loss(session, states, batch, wanted, smoothing):
    """Cross-entropy with soft targets over the choices that exist, row by row, choice by choice."""
    losses = []
    all_scores = vqa.answer_scores(session, states)
    for scores, prompt, target in zip(all_scores, batch["prompts"], wanted, strict=True):
        score_of = {choice: scores[position] for position, choice in enumerate(prompt.orders[0])}
        exist = [choice for choice in range(4) if prompt.present_choices[choice]]
        log_probabilities = torch.stack([score_of[choice] for choice in exist]).log_softmax(0)
        smoothed = [(1 - smoothing) * target[choice] + smoothing / len(exist) for choice in exist]
        losses.append(-(torch.tensor(smoothed) * log_probabilities).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradients_of_soft_targets_equal_a_plain_reference(
    session, demo_rows, replace, smoothing
):
    session.config = replace(session.config, label_smoothing=smoothing)
    frame = demo_rows.train.head(3).copy()
    frame.loc[1, "c"] = ""
    wanted = np.array([[0.7, 0.1, 0.2, 0.0], [0.5, 0.25, 0.0, 0.25], [0.0, 1.0, 0.0, 0.0]])
    frame[list(vqa.TARGET_COLUMNS)] = wanted
    model = perturb_adapter(vqa.attach_lora(session.model, session.config, seed=0)).train()
    orders = [(2, 0, 3, 1), (3, 2, 1, 0), (0, 1, 2, 3)]
    prompts = [vqa.make_prompt(session, frame, row, [order]) for row, order in enumerate(orders)]
    batch = vqa.collate(session, prompts)
    ours = batch_loss(session, batch)
    our_gradients = gradients(model, ours)
    states = vqa.answer_hidden_states(session, batch)
    theirs = reference_loss(session, states, batch, wanted, smoothing)
    their_gradients = gradients(model, theirs)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert their_gradients.norm() > 1e-3
    assert (our_gradients - their_gradients).norm() <= 1e-5 * their_gradients.norm()


def test_gradients_of_orders_behind_a_shared_prefix_are_those_of_separate_prompts(
    session, demo_rows
):
    model = perturb_adapter(vqa.attach_lora(session.model, session.config, seed=0)).train()
    orders = [view.order for view in ROTATIONS]

    def gradients_of(groups):
        """Gradients of three questions, each with a prompt for every group of orders."""
        prompts = [
            vqa.make_prompt(session, demo_rows.train, row, group)
            for row in range(3)
            for group in groups
        ]
        return gradients(model, batch_loss(session, vqa.collate(session, prompts)))

    shared = gradients_of([orders])
    separate = gradients_of([[order] for order in orders])
    assert (shared - separate).norm() <= 1e-5 * separate.norm()
    assert separate.norm() > 1e-3


@pytest.mark.parametrize("turns", [1, 4])
def test_recurrent_layers_never_wait_for_the_gpu(model_folders, demo_rows, turns):
    config = vqa.Config.preset("demo", model_id=str(model_folders["qwen3_5"]))
    session = vqa.open_session(config, demo_rows.train.iloc[0])
    orders = [view.order for view in ROTATIONS[:turns]]
    prompts = [vqa.make_prompt(session, demo_rows.train, row, orders) for row in range(3)]
    batch = vqa.collate(session, prompts)
    batch["features"] = session.vision_cache.compute_for_batch(batch)
    assert batch["masked"]
    with torch.no_grad(), Waits() as ours:
        vqa.answer_hidden_states(session, batch)
    assert not ours.found
