"""Part 3, Captured passes: a replayed pass gives the gradients of one that is computed."""

import pytest
import torch
from references import flat_gradients, perturb_adapter
from running import plain_prompts, raising

import vqa_helpers as vqa


class Recording:
    """Takes the place of a CUDA graph on a CPU: what was recorded is computed by each replay."""

    made = 0

    def __init__(self, launch, pool=None):
        Recording.made += 1
        self.launch = launch
        self.given_pool = pool

    def pool(self):
        return "the pool"

    def replay(self):
        self.launch()


@pytest.fixture
def training(open_tiny, monkeypatch):
    """training(family) -> a session whose adapter trains in frugal layers, as on a GPU."""
    monkeypatch.setattr(vqa, "decide_frugal", lambda session: (True, ""))
    monkeypatch.setattr(vqa, "record_graph", Recording)
    monkeypatch.setattr(Recording, "made", 0)

    def make(family="qwen3_vl"):
        session = open_tiny(family, lora_dropout=0.3)
        model = perturb_adapter(vqa.attach_lora(session.model, session.config, seed=0)).train()
        vqa.use_fast_layers(session, model, 1)
        vqa.recompute_layers(session, 1)
        session.captured_passes = vqa.CapturedPasses(session)
        return session

    return make


def padded_behind(session, frame, rows):
    """A batch as a GPU has it."""
    prompts = plain_prompts(session, frame, rows)
    device = session.device
    session.device = torch.device("cuda")
    try:
        return vqa.collate(session, prompts)
    finally:
        session.device = device


def train(session, batches):
    """The gradients of some batches, added up, and their losses."""
    torch.manual_seed(3)
    session.model.zero_grad()
    losses = []
    for batch in batches:
        states = vqa.training_states(session, batch)
        loss = vqa.training_loss(session, states, batch)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses), flat_gradients(session.model).clone()


def replayed_like_computed(session, batches):
    """Train on the batches without graphs and with them, which gives the same; the passes."""
    computed = train(session, batches)
    session.captured_passes.is_wanted = True
    replayed = train(session, batches)
    for ours, theirs in zip(replayed, computed, strict=True):
        assert torch.equal(ours, theirs)
    return session.captured_passes


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "internvl"])
def test_replayed_passes_give_the_gradients_of_computed_ones(family, training, demo_rows):
    session = training(family)
    rows = [range(3), range(3, 5), range(5, 8)]
    batches = [padded_behind(session, demo_rows.train, part) for part in rows]
    replayed_like_computed(session, batches)  # captured
    session.captured_passes.is_wanted = False
    replayed_like_computed(session, batches)  # replayed
    shapes = {tuple(batch["input_ids"].shape) for batch in batches}
    assert Recording.made == 2 * len(shapes)


def test_passes_are_computed_until_no_other_one_compiles_because_that_cannot_be_captured(
    training, demo_rows
):
    session = training()
    session.captured_passes.is_wanted = True
    first, second, third = [
        padded_behind(session, demo_rows.train, range(size)) for size in (2, 3, 4)
    ]
    train(session, [first])
    assert Recording.made == 0
    train(session, [first])  # the same once more
    assert Recording.made == 2
    train(session, [second])  # may compile for all others
    assert Recording.made == 2
    train(session, [third])
    assert Recording.made == 4


def test_gradients_of_a_computed_pass_and_a_replayed_one_add_up(training, demo_rows):
    session = training()
    batch = padded_behind(session, demo_rows.train, range(2))
    _, twice = train(session, [batch, batch])
    passes = session.captured_passes
    passes.is_wanted = True
    passes.computed.clear()  # the first of both is computed
    _, mixed = train(session, [batch, batch])
    assert Recording.made == 2
    assert torch.equal(mixed, twice)


def test_larger_batches_get_larger_places_and_graphs_of_their_own(training, demo_rows):
    session = training()
    small, large = [padded_behind(session, demo_rows.train, range(size)) for size in (2, 4)]
    passes = replayed_like_computed(session, [small, large, small])
    assert Recording.made == 6  # the small one again, because its places were replaced
    assert {one.forward.given_pool for one in passes.passes.values()} == {None, "the pool"}
    assert len({places.data_ptr() for places in passes.places}) == len(passes.places)


def test_a_slightly_larger_batch_fits_into_the_places_of_the_first(training, demo_rows):
    session = training()
    first, second = [padded_behind(session, demo_rows.train, range(size)) for size in (4, 5)]
    replayed_like_computed(session, [first, second, first])
    assert Recording.made == 4  # the graphs of the first were kept


def test_all_lengths_are_aligned_where_each_is_captured_by_itself(training, demo_rows):
    session = training()
    passes = session.captured_passes
    prompts = plain_prompts(session, demo_rows.train, [0])
    passes.is_wanted = True
    aligned = padded_behind(session, demo_rows.train, [0])
    session.model.eval()  # scoring is not captured
    scored = padded_behind(session, demo_rows.train, [0])
    passes.is_wanted = False
    session.model.train()
    as_it_is = padded_behind(session, demo_rows.train, [0])
    length = len(prompts[0].input_ids)
    assert length % 16
    assert aligned["input_ids"].shape[1] == length + -length % 16
    assert scored["input_ids"].shape[1] == as_it_is["input_ids"].shape[1] == length
    session.model.eval()  # without dropout
    with torch.no_grad():
        states = vqa.answer_hidden_states(session, as_it_is)
        aligned_states = vqa.answer_hidden_states(session, aligned)
    assert torch.allclose(states, aligned_states, atol=1e-5)


def test_few_graphs_are_kept(training, demo_rows, monkeypatch):
    monkeypatch.setattr(vqa, "MOST_CAPTURED", 1)
    session = training()
    small, large = [padded_behind(session, demo_rows.train, range(size)) for size in (2, 4)]
    passes = replayed_like_computed(session, [large, small, large])
    assert len(passes.passes) == 1
    assert Recording.made == 6


def test_graphs_make_room_for_another_one_where_memory_runs_out(training, demo_rows, monkeypatch):
    session = training()
    small, large = [padded_behind(session, demo_rows.train, range(size)) for size in (2, 4)]

    def alone(launch, pool=None):
        if session.captured_passes.passes:
            raise torch.OutOfMemoryError("a test")
        return Recording(launch, pool)

    monkeypatch.setattr(vqa, "record_graph", alone)
    passes = replayed_like_computed(session, [large, small])
    assert len(passes.passes) == 1
    monkeypatch.setattr(passes, "capture", raising(torch.OutOfMemoryError("a test")))
    passes.drop()
    with pytest.raises(torch.OutOfMemoryError):
        train(session, [small])


def test_scoring_and_another_plan_free_the_graphs(training, demo_rows):
    session = training()
    passes = session.captured_passes
    batch = padded_behind(session, demo_rows.train, range(2))
    vqa.use_plan(session, vqa.MemoryPlan(2, 0, is_captured=True))
    train(session, [batch])
    train(session, [batch])
    assert len(passes.passes) == 1
    vqa.use_plan(session, vqa.MemoryPlan(1, 0))
    assert not passes.passes
    assert not passes.places
    assert not passes.gradients  # else a pass that is computed would have them twice
    assert not passes.is_wanted
    passes.is_wanted = True
    train(session, [batch])
    assert len(passes.passes) == 1
    vqa.predict_logits(session, demo_rows.train.head(1), [vqa.TTAView("rotation 0")], "a test")
    assert not passes.passes


@pytest.mark.gpu
def test_cuda_graphs_replay_what_was_computed(model_folders, demo_rows):
    config = vqa.Config.preset(
        "demo", model_id=str(model_folders["qwen3_vl"]), lora_dropout=0.3, compile_layers="on"
    )
    session = vqa.open_session(config, demo_rows.train.iloc[0])
    model = perturb_adapter(vqa.attach_lora(session.model, config, seed=0)).train()
    vqa.use_fast_layers(session, model, 1)
    vqa.recompute_layers(session, 1)
    rows = [range(3), range(3, 7), range(7, 10)]
    batches = [padded_behind(session, demo_rows.train, part) for part in rows]
    computed = train(session, batches)
    session.captured_passes.is_wanted = True
    for _ in range(3):
        replayed = train(session, batches)
        for ours, theirs in zip(replayed, computed, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert session.captured_passes.passes
    session.captured_passes.drop()
    torch.cuda.empty_cache()
    again = train(session, batches[:1])
    assert torch.allclose(again[0], computed[0][:1], rtol=1e-4)
