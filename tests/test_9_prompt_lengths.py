"""Part 9, Prompt lengths: every row's tokens, and what is said of a row that is too long."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cards import T4
from running import ROTATIONS, raising

import vqa_helpers as vqa


@pytest.fixture(scope="module")
def processor():
    return vqa.load_processor(vqa.Config.preset("demo"))


@pytest.fixture(scope="module")
def few_rows(demo_rows):
    """The first rows of the demo."""
    train = demo_rows.train.head(24)
    test = demo_rows.test.head(24)
    return dataclasses.replace(demo_rows, train=train, test=test)


@pytest.fixture
def with_long_text(few_rows):
    """The demo with a long text: with_long_text("train", row=4, column="a", repeats=500)."""

    def make(split, row, column, repeats):
        frame = getattr(few_rows, split).copy()
        frame.loc[row, column] = "무엇 " * repeats
        return dataclasses.replace(few_rows, **{split: frame})

    return make


def demo_config(**settings):
    return vqa.Config.preset("demo", **settings)


def test_the_tokens_of_every_row_are_those_of_its_prompt(session, few_rows):
    """In both families; they differ in patches and so in the image's tokens."""
    lengths = vqa.prompt_lengths(session.config, session.processor, few_rows)
    assert len(lengths) == len(few_rows.train) + len(few_rows.test)
    for split in ("train", "test"):
        frame = getattr(few_rows, split)
        counted = lengths[lengths["split"] == split].reset_index(drop=True)
        for row in range(0, len(frame), 6):
            prompt = vqa.make_prompt(session, frame, row, [(0, 1, 2, 3)])
            assert counted["tokens"][row] == len(prompt.input_ids)
            assert counted["image"][row] == np.prod(prompt.grid) // 4
            orders = [view.order for view in ROTATIONS]
            in_all_orders = vqa.make_prompt(session, frame, row, orders)
            excess = counted["scored"][row] - len(in_all_orders.input_ids)
            assert abs(excess) <= 0.3 * len(in_all_orders.input_ids)


def test_the_largest_scale_counts_for_the_longest_prompt(processor, few_rows):
    config = demo_config(max_pixels=4 * 32 * 32, tta_scales=(0.5, 1.0, 2.0))
    lengths = vqa.prompt_lengths(config, processor, few_rows)
    added = lengths["longest"] - lengths["tokens"]
    assert lengths["image"].max() <= 4
    assert 1 <= added.max() <= 4


def test_the_limit_is_the_smaller_one_of_model_and_tokenizer(processor, monkeypatch):
    config = demo_config()
    assert vqa.token_limit(config, processor) == 4096  # both
    monkeypatch.setattr(processor.tokenizer, "model_max_length", 10**30)  # unknown
    assert vqa.token_limit(config, processor) == 4096
    monkeypatch.setattr(processor.tokenizer, "model_max_length", 1000)
    assert vqa.token_limit(config, processor) == 1000


@pytest.mark.parametrize(
    ("split", "column", "remedies"),
    [
        (
            "train",
            "question",
            ["Shorten the text, or leave the row out of train.csv."],
        ),
        (
            "train",
            "c",
            ["Shorten the text, or leave the row out of train.csv."],
        ),
        (
            "test",
            "question",
            [
                "A row of test.csv cannot be left out: it needs an answer.",
                "Shorten the text.",
            ],
        ),
    ],
)
def test_a_row_beyond_the_limit_is_named_with_its_tokens_and_what_to_do(
    split, column, remedies, processor, with_long_text
):
    competition = with_long_text(split, 4, column, repeats=1500)
    lengths = vqa.prompt_lengths(demo_config(), processor, competition)
    row = lengths.loc[lengths["tokens"].idxmax()]
    with pytest.raises(vqa.DataError) as caught:
        vqa.check_token_limit(lengths, competition, 4096)
    first, second, *others = str(caught.value).splitlines()
    assert first == "A row is too long: the model takes 4,096 tokens."
    line = getattr(competition, split)["line"][4]
    assert row["tokens"] > 4096
    assert second == (
        f"{split}.csv, line {line}, id {split}_0005: {row['longest']:,} tokens, "
        f"{row['image']} of them for the image; column {column!r} has 4,500 characters"
    )
    assert others == remedies


def test_of_many_long_rows_the_five_longest_are_listed(processor, few_rows):
    lengths = vqa.prompt_lengths(demo_config(), processor, few_rows)
    too_long = (lengths["longest"] > 80).sum()
    with pytest.raises(vqa.DataError) as caught:
        vqa.check_token_limit(lengths, few_rows, 80)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{too_long} rows are too long: the model takes 80 tokens."
    assert f"{lengths['longest'].max()} tokens" in lines[1]
    assert len([line for line in lines if "csv, line" in line]) == 5
    assert lines[6] == f"... and {too_long - 5} more"


def test_where_the_image_is_most_of_a_long_prompt_fewer_pixels_help(processor, few_rows):
    config = demo_config(min_pixels=600 * 32 * 32)
    lengths = vqa.prompt_lengths(config, processor, few_rows)
    with pytest.raises(vqa.DataError, match="Shorten the text, or lower max_pixels, or leave"):
        vqa.check_token_limit(lengths, few_rows, 600)


# --- Memory ---------------------------------------------------------------------------------------

# GiB that a pass of the demo's model added to a process on the CPU, for prompts of so many tokens
# of which so many go together.
TRAINED = {(2086, 8): 1.897, (4086, 8): 4.597, (7886, 1): 0.619}
SCORED = {(2086, 8): 0.298, (4086, 8): 0.884}


@pytest.fixture(scope="module")
def costs(processor):
    import transformers

    config = demo_config()
    shapes = transformers.AutoConfig.from_pretrained(config.model_path)
    return vqa.memory_costs(config, shapes, 100, "fp32", compiled=False)


@pytest.mark.parametrize(("tokens", "questions"), TRAINED)
def test_the_computed_memory_of_training_on_long_prompts_is_the_measured_one(
    tokens, questions, costs
):
    computed = costs.training_pass(tokens, questions, layers=4)
    assert computed == pytest.approx(TRAINED[tokens, questions], rel=0.1)


@pytest.mark.parametrize(("tokens", "questions"), SCORED)
def test_the_computed_memory_of_scoring_long_prompts_is_the_measured_one_or_a_little_more(
    tokens, questions, costs
):
    measured = SCORED[tokens, questions]
    assert measured <= costs.scoring_pass(tokens, questions) <= 1.35 * measured


@pytest.fixture
def check_memory(processor, with_long_text, costs, monkeypatch):
    """Check a competition with a row of about 3,000 tokens: check_memory(free=2.0, ...)."""
    monkeypatch.setattr(vqa, "worker_devices", lambda config: [None])
    competition = with_long_text("train", 4, "question", repeats=800)

    def check(free, gpus=(), **settings):
        runtime = vqa.Runtime("local", gpus, "fp32", "sdpa", ())
        monkeypatch.setattr(vqa, "detect_runtime", lambda *_: runtime)
        config = demo_config(**settings)
        lengths = vqa.prompt_lengths(config, processor, competition)
        vqa.check_row_memory(config, lengths, competition, costs, free)

    return check


def test_a_row_that_memory_does_not_hold_is_named_before_it_is_tried(check_memory):
    with pytest.raises(vqa.DataError) as caught:
        check_memory(free=2.0)
    first, second, last = str(caught.value).splitlines()
    assert first.startswith("A row is too long: a pass with the longest takes 3.")
    assert "GiB, 2.0 are free (batch_size 8 and infer_batch_size 32 rows are padded to it" in first
    assert second.startswith("train.csv, line 6, id train_0005: 3,")
    assert second.endswith("column 'question' has 2,400 characters")
    assert last == "Shorten the text, or leave the row out of train.csv."


@pytest.mark.parametrize(
    ("free", "settings"),
    [
        (8.0, {}),
        (2.0, {"batch_size": 1, "infer_batch_size": 4}),
        (2.0, {"batch_size": 2, "gradient_checkpointing": True, "use_batch_inference": False}),
        (2.0, {"gpus": (T4,)}),  # a question at a time
        (0.02, {}),  # then no row fits: the model is too large, not this row
    ],
    ids=["more memory", "fewer in a pass", "recomputed layers", "GPU", "nothing fits"],
)
def test_the_same_row_passes_where(free, settings, check_memory):
    check_memory(free, **settings)


def test_workers_share_the_memory_of_a_machine_without_a_gpu(check_memory, monkeypatch):
    check_memory(free=8.0)
    monkeypatch.setattr(vqa, "worker_devices", lambda config: [vqa.CPU_CORE] * 4)
    with pytest.raises(vqa.DataError, match=r"2\.0 are free"):
        check_memory(free=8.0)


# --- In preflight ---------------------------------------------------------------------------------


@pytest.fixture
def preflight_of(monkeypatch):
    """Run preflight on a competition in memory; by default no weight may be loaded."""

    def run(competition, free_bytes=2**40, rows=4):
        memory = SimpleNamespace(available=free_bytes)
        monkeypatch.setattr(vqa, "load_competition", lambda *_: competition)
        monkeypatch.setattr(vqa.psutil, "virtual_memory", lambda: memory)
        return vqa.preflight(demo_config(), rows)

    return run


@pytest.mark.parametrize(
    ("repeats", "free_bytes", "problem"),
    [
        (6667, 2**40, "the model takes 4,096 tokens"),
        (800, 2 * 2**30, "a pass with the longest takes"),
    ],
    ids=["model's limit", "memory"],
)
def test_preflight_refuses_a_long_row_before_a_weight_is_loaded(
    repeats, free_bytes, problem, with_long_text, preflight_of, monkeypatch
):
    monkeypatch.setattr(vqa, "open_session", raising(AssertionError("a weight is loaded")))
    competition = with_long_text("train", 4, "question", repeats)
    with pytest.raises(vqa.DataError, match=f"(?s)A row is too long: {problem}.*train_0005"):
        preflight_of(competition, free_bytes)


@pytest.mark.parametrize("split", ["train", "test"])
def test_preflight_tries_the_longest_row_and_names_it_where_that_fails(
    split, with_long_text, preflight_of, monkeypatch
):
    competition = with_long_text(split, 4, "question", repeats=30)
    tried = "try_training_pass" if split == "train" else "predict_logits"
    plain = getattr(vqa, tried)

    def fail_on_the_longest(session, rows, *arguments):
        is_longest = tried == "try_training_pass" or arguments[-1] == "the longest row"
        if is_longest:
            raise torch.OutOfMemoryError("not enough")
        return plain(session, rows, *arguments)

    monkeypatch.setattr(vqa, tried, fail_on_the_longest)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        preflight_of(competition)
    (note,) = caught.value.__notes__
    assert note.startswith("While the longest row was tried: ")
    assert f"{split}.csv, line 6, id {split}_0005: " in note


def test_texts_of_many_rows_are_counted_a_few_at_a_time(processor, few_rows, monkeypatch):
    expected = vqa.prompt_lengths(demo_config(), processor, few_rows)
    monkeypatch.setattr(vqa, "TOKENISED_TOGETHER", 10)
    together = []
    count_tokens = vqa.count_tokens

    def counted(processor, texts):
        together.append(len(texts))
        return count_tokens(processor, texts)

    monkeypatch.setattr(vqa, "count_tokens", counted)
    lengths = vqa.prompt_lengths(demo_config(), processor, few_rows)
    assert lengths.equals(expected)
    assert together == [10, 10, 10, 10, 4, 4] * 2  # prompts, then choices, of both tables
