"""Part 3, Timing of passes: the fastest plan despite noise, within a small share of the job."""

import dataclasses
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from card_arithmetic import T4, Card, LayerShapes, pass_seconds
from running import plain_prompts, quiet

import vqa_helpers as vqa

QWEN3_8B = LayerShapes(36, 4096, 4096, 1024, 12288, 32, 16, 4, is_packed=True)
GIB = 2**30
# Flash attention is off, as under the cap of the benchmark; Python is slow to begin kernels.
H200_ON_A_SLOW_HOST = Card("H200", 600e12, 3.5e12, 20e9, launch=150e-6, has_flash=False)
MEASURING_PASSES = 5  # of which the first one is not charged


class MadeUpCard:
    """Takes the place of `measure_pass` on an 8B: computed seconds, with noise, and bytes."""

    def __init__(self, card, noise=0.0, hiccups=0.0, seed=0):
        self.card = card
        self.noise = noise  # share by which a pass may be faster or slower
        self.hiccups = hiccups  # share of passes that take three times as long
        self.random = np.random.default_rng(seed)
        self.room = 13 * GIB
        # Seconds of the first pass, and of the first one of one question in layers of that kind.
        self.compiling = 0.0
        self.is_frugal = False
        self.capturing = 0.0  # seconds of the first pass of a shape that is captured
        self.graphs = set()  # (questions, layers kept) of the shapes that are captured
        self.clearing = 0.0  # seconds of clearing the memory
        self.clock = 0.0  # seconds of all that was done
        self.too_large = ()  # numbers of questions that run out of memory all the same
        self.heavier = 0.0  # GiB that four questions take beyond what is computed
        self.can_capture = None  # whether passes can be captured; None: nobody thinks of it
        self.uncapturable = ()  # (questions, layers kept) of those that cannot be
        self.calls = []  # (questions, layers kept, seconds) of each pass

    def true_seconds(self, questions, kept, is_captured=False):
        card = dataclasses.replace(self.card, launch=0.0) if is_captured else self.card
        return pass_seconds(card, QWEN3_8B, 366, 256, questions, kept).total

    def peak(self, questions, kept):
        more = self.heavier if (questions, kept) == (4, 36) else 0.0
        return GIB * (5.6 + more + questions * (0.1 + 0.03 * max(1, kept)))

    def measure_pass(self, session, prompts, kept, is_captured):
        questions = len(prompts)
        assert [len(prompt.input_ids) for prompt in prompts] == [3] * questions  # the longest
        if is_captured and self.can_capture == "no room":
            return np.inf, np.inf
        cannot = not self.can_capture or (questions, kept) in self.uncapturable
        if is_captured and cannot:
            raise RuntimeError("operation not permitted when stream is capturing")
        seconds = self.true_seconds(questions, kept, is_captured)
        seconds *= 1 + self.noise * self.random.uniform(-1, 1)
        if self.random.random() < self.hiccups:
            seconds *= 3
        is_alone = questions == 1 and 1 not in [call[0] for call in self.calls]
        if not self.calls or (is_alone and not self.is_frugal):
            seconds += self.compiling
        if is_captured and (questions, kept) not in self.graphs:
            self.graphs.add((questions, kept))
            seconds += self.capturing
        self.clock += seconds
        self.calls.append((questions, kept, seconds))
        peak = self.peak(questions, kept)
        if peak > self.room or questions in self.too_large:
            return np.inf, np.inf
        return seconds, peak

    def clear_memory(self):
        self.clock += self.clearing

    def per_question(self, row):
        """True seconds a question of a plan, a row of the table or a MemoryPlan."""
        questions, kept = row
        return self.true_seconds(questions, kept) * np.ceil(32 / questions) / 32

    @property
    def charged(self):
        """Seconds of all passes but the first."""
        return sum(seconds for _, _, seconds in self.calls[1:])


@pytest.fixture
def plan_on(monkeypatch):
    """plan_on(card, job, step=32) -> (the plan, the table of what was tried)."""

    def plan(card, job, step=32):
        config = vqa.Config.preset(
            "demo", batch_size=step, grad_accum_steps=1, gradient_checkpointing=True
        )
        passes = SimpleNamespace(drop=card.graphs.clear)
        on_a_gpu = SimpleNamespace(
            device=torch.device("cuda"),
            decoder_layers=[None] * QWEN3_8B.layers,
            captured_passes=None if card.can_capture is None else passes,
            passes_tried=[],
            is_frugal=card.is_frugal,
            config=config,
        )
        monkeypatch.setattr(vqa, "measure_pass", card.measure_pass)
        monkeypatch.setattr(vqa, "memory_budget", lambda: 0.92 * card.room)
        monkeypatch.setattr(vqa, "clear_memory", card.clear_memory)
        monkeypatch.setattr(vqa.time, "perf_counter", lambda: card.clock)
        prompts = [SimpleNamespace(input_ids=[0] * length) for length in (2, 3)]
        return vqa.plan_memory(on_a_gpu, prompts, 0, job), on_a_gpu.passes_tried

    return plan


@pytest.mark.parametrize(
    ("can_capture", "room", "expected"),
    [
        (True, 13, (4, True)),
        (False, 13, (32, False)),
        ("no room", 13, (32, False)),
        (None, 13, (32, False)),
        (True, 90, (32, False)),  # a pass that takes longer than Python
    ],
)
def test_passes_are_captured_where_the_gpu_waits_and_the_best_plan_gains_by_it(
    can_capture, room, expected, plan_on, caplog
):
    made_up = MadeUpCard(H200_ON_A_SLOW_HOST)
    made_up.can_capture = can_capture
    made_up.room = room * GIB
    with caplog.at_level(logging.INFO):
        plan, _ = plan_on(made_up, job=100_000)
    assert (plan.micro_batch, plan.is_captured) == expected
    decisions = [text for text in caplog.messages if "captured" in text.partition("(")[0]]
    if can_capture is None:
        assert not decisions
    elif can_capture:
        assert (
            decisions[0]
            .split(" s ")[0]
            .startswith(f"Decision: passes are {'' if plan.is_captured else 'not '}captured: ")
        )
    else:
        assert decisions[0].startswith("Decision: passes are not captured: operation not")


def test_a_card_that_is_busy_is_not_asked_to_capture(plan_on):
    made_up = MadeUpCard(T4)
    made_up.can_capture = False  # it would raise
    plan, _ = plan_on(made_up, job=5_000)
    assert (plan.micro_batch, plan.is_captured) == (4, False)


def test_a_size_that_cannot_be_captured_leaves_the_others(plan_on):
    made_up = MadeUpCard(H200_ON_A_SLOW_HOST)
    made_up.can_capture = True
    made_up.uncapturable = ((4, 36),)  # the best of all, else
    plan, table = plan_on(made_up, job=100_000)
    assert (plan.micro_batch, plan.is_captured) == (3, True)
    (row,) = [row for row in table if row["in a pass"] == 4]
    assert row["note"] == "cannot be captured: operation not permitted when stream is capturing"


def test_a_fault_of_a_pass_without_a_graph_ends_the_planning(plan_on):
    made_up = MadeUpCard(T4)
    own = made_up.measure_pass

    def failing(session, prompts, *arguments):
        if len(prompts) == 8:
            raise RuntimeError("a fault")
        return own(session, prompts, *arguments)

    made_up.measure_pass = failing
    with pytest.raises(RuntimeError, match="a fault"):
        plan_on(made_up, job=50_000)


def plan_of(row):
    return row["in a pass"], row["layers kept"]


def test_on_a_t4_a_small_pass_that_recomputes_nothing_wins(plan_on):
    card = MadeUpCard(T4)
    plan, table = plan_on(card, job=5_000)
    assert (plan.micro_batch, plan.stored_layers) == (4, 36)
    assert plan.peak_gib == pytest.approx(5.6 + 4 * (0.1 + 0.03 * 36))
    all_recomputed = card.per_question((32, 0))
    assert all_recomputed / card.per_question((4, 36)) > 1.3
    sizes = {row["in a pass"]: row["layers kept"] for row in table}
    assert [sizes[size] for size in (1, 2, 4)] == [36] * 3
    assert 0 < sizes[8] < 36
    notes = {row["in a pass"]: row["note"] for row in table}
    assert notes[16].startswith("not measured: computed "), notes[16]


def test_on_a_large_card_with_a_slow_host_many_questions_share_a_pass(plan_on):
    plan, _ = plan_on(MadeUpCard(H200_ON_A_SLOW_HOST), job=10_000, step=16)
    assert plan.micro_batch == 16
    assert 0 < plan.stored_layers < 36


@pytest.mark.parametrize("card", [T4, H200_ON_A_SLOW_HOST], ids=lambda card: card.name)
def test_noise_costs_no_more_than_the_noise(card, plan_on):
    noise = 0.08
    for seed in range(12):
        made_up = MadeUpCard(card, noise, hiccups=0.04, seed=seed)
        plan, table = plan_on(made_up, job=20_000)
        chosen = made_up.per_question((plan.micro_batch, plan.stored_layers))
        fastest = min(made_up.per_question(plan_of(row)) for row in table)
        assert chosen <= fastest * (1 + noise) / (1 - noise), (seed, plan)


def test_passes_go_on_until_the_fastest_is_clear_or_each_had_its_turns(plan_on):
    clear = MadeUpCard(T4)
    _, table = plan_on(clear, job=50_000)
    close = MadeUpCard(T4, noise=0.1)
    _, noisy_table = plan_on(close, job=50_000)
    most = vqa.MOST_TURNS * vqa.TIMED_PASSES
    assert max(row["passes"] for row in table) < most
    assert max(row["passes"] for row in noisy_table) == most
    turns = close.calls[MEASURING_PASSES:]
    assert len(turns) % 3 == 0  # one pass to warm up, two that count
    for start in range(0, len(turns), 3):
        plans = {(questions, kept) for questions, kept, _ in turns[start : start + 3]}
        assert len(plans) == 1


def test_one_question_a_pass_is_tried_where_it_pays_to_compile_it(plan_on):
    """As where a second question does not fit beside every layer."""
    for compiling, passes in ((100.0, 0), (5.0, vqa.TIMED_PASSES)):
        card = MadeUpCard(T4)
        card.room = 7.5 * GIB
        card.compiling = compiling
        plan, table = plan_on(card, job=3_000)
        *_, row = table
        assert row["in a pass"] == 1
        assert row["passes"] >= passes
        assert (plan.micro_batch == 1) == bool(passes), table
    # Layers that see a batch as its tokens are compiled already.
    card = MadeUpCard(T4)
    card.room = 7.5 * GIB
    card.compiling = 100.0
    card.is_frugal = True
    plan, _ = plan_on(card, job=3_000)
    assert plan.micro_batch == 1
    # There is time, but more questions keep every layer, too, and share the costs of a pass.
    card = MadeUpCard(dataclasses.replace(T4, memory=1e12))
    card.compiling = 100.0
    _, table = plan_on(card, job=100_000)
    assert table[-1]["note"] == "not measured: computed to save less time than compiling it takes"


@pytest.mark.parametrize("card", [T4, H200_ON_A_SLOW_HOST], ids=lambda card: card.name)
@pytest.mark.parametrize("job", [0, 300, 2_000, 10_000, 100_000])
def test_the_passes_take_their_share_of_the_job_or_those_that_are_free(card, job, plan_on):
    made_up = MadeUpCard(card, noise=0.1, seed=job)
    plan, table = plan_on(made_up, job)
    measured = [1 / row["questions/s"] for row in table if row["passes"]]
    share = vqa.PLANNING_SHARE * job * min(measured)
    first = MEASURING_PASSES + vqa.FREE_PASSES
    free = sum(seconds for _, _, seconds in made_up.calls[1:first])
    assert made_up.charged <= max(share, free)
    if not job:
        turns = {T4: 2, H200_ON_A_SLOW_HOST: 1}[card]  # there the others are far behind
        assert sum(row["passes"] for row in table) == turns * vqa.TIMED_PASSES
        assert len(made_up.calls) <= first
    # A trial, as preflight's, has no job, and hence no seconds to speak of.
    reasons = {0: "only a few plans are tried for a trial", 300: "it may take more than "}
    if card is T4 and job in reasons:
        assert f"not measured: {reasons[job]}" in str(table)
    assert plan.peak_gib


def test_what_a_turn_takes_beside_its_passes_counts_as_well(plan_on):
    """As on a card whose memory takes seconds to be cleared."""
    job = 10_000
    turns = []
    for clearing in (0.0, 40.0):
        card = MadeUpCard(T4, noise=0.1)
        card.clearing = clearing
        _, table = plan_on(card, job)
        turns.append(sum(row["passes"] for row in table) // vqa.TIMED_PASSES)
        share = vqa.PLANNING_SHARE * job / max(row["questions/s"] or 0 for row in table)
        assert card.charged + clearing * turns[-1] <= share
    assert turns[1] < turns[0]


@pytest.mark.parametrize("capturing", [0.0, 2.0, 5.0, 8.0])
def test_captures_count_and_are_foreseen(capturing, plan_on, caplog):
    job = 100_000
    card = MadeUpCard(H200_ON_A_SLOW_HOST, noise=0.1)
    card.can_capture = True
    card.capturing = capturing
    with caplog.at_level(logging.INFO):
        plan, table = plan_on(card, job)
    assert plan.is_captured
    share = vqa.PLANNING_SHARE * job / max(row["questions/s"] or 0 for row in table)
    without_graphs = sum(seconds for _, _, seconds in card.calls[-2:])  # behind the others
    assert card.clock - without_graphs <= share
    (block,) = [text for text in caplog.messages if text.startswith("Passes tried in ")]
    assert float(block.split()[3]) == pytest.approx(card.clock, abs=0.3)


def test_captures_that_are_given_up_are_not_foreseen(plan_on):
    card = MadeUpCard(dataclasses.replace(H200_ON_A_SLOW_HOST, launch=50e-6), noise=0.2)
    card.can_capture = True
    card.capturing = 60.0  # twice before it fails, of 160 s that there are
    card.uncapturable = ((2, 9),)  # the last of those that show what passes take
    plan, table = plan_on(card, job=300_000)
    assert not plan.is_captured
    assert max(row["passes"] for row in table) == vqa.MOST_TURNS * vqa.TIMED_PASSES


def test_a_plan_that_runs_out_of_memory_leaves_the_others(plan_on):
    card = MadeUpCard(T4)
    card.too_large = (3, 5, 6)
    plan, _ = plan_on(card, job=50_000)
    assert plan.micro_batch == 4
    card = MadeUpCard(H200_ON_A_SLOW_HOST)
    card.too_large = (32, 16)
    plan, table = plan_on(card, job=10_000)
    assert plan.micro_batch == 11
    notes = {row["in a pass"]: row["note"] for row in table}
    assert notes[32] == notes[16] == "does not fit: out of memory"


def test_a_plan_whose_measured_peak_is_too_high_is_not_taken(plan_on):
    card = MadeUpCard(T4)
    card.heavier = 1.8  # of 12.0 GiB to use and 13.0 in all
    plan, table = plan_on(card, job=50_000)
    assert plan.micro_batch in (3, 5)
    (row,) = [row for row in table if row["in a pass"] == 4]
    assert row["note"] == "its peak is above 11.96 GiB"
    assert row["peak GiB"] == 12.12
    assert row["questions/s"] == max(row["questions/s"] or 0 for row in table)


def test_all_candidates_are_logged_in_one_block(plan_on, caplog):
    with caplog.at_level(logging.INFO):
        plan, table = plan_on(MadeUpCard(T4), job=5_000)
    (block,) = [text for text in caplog.messages if text.startswith("Passes tried in ")]
    header, columns, *rows = block.splitlines()
    seconds = 0.02 * 5_000 * MadeUpCard(T4).per_question((4, 36))
    assert header.endswith(f"; 2% of the job are {seconds:.1f} s:")
    assert columns.split("  ")[-1].strip() == "note"
    assert len(rows) == len(table) == 11
    (row,) = [row for row in table if row["in a pass"] == plan.micro_batch]
    assert row["slowest"] == row["questions/s"] == row["fastest"] == pytest.approx(1.74, abs=0.01)
    assert row["peak GiB"] == pytest.approx(plan.peak_gib, abs=0.01)


def test_a_trial_has_no_seconds_of_a_job_in_its_log(plan_on, caplog):
    with caplog.at_level(logging.INFO):
        plan_on(MadeUpCard(T4), job=0)
    (block,) = [text for text in caplog.messages if text.startswith("Passes tried in ")]
    assert block.splitlines()[0].endswith(" s; a few, because this is a trial:")


def test_a_table_of_passes_goes_into_stages_jsonl_once(mini_run, monkeypatch):
    run = mini_run()
    rows = [{"in a pass": 4, "layers kept": 36, "note": ""}]

    def training(session, run, fold):
        if fold == 0:
            session.passes_tried = rows

    session = SimpleNamespace(
        vision_cache=SimpleNamespace(recomputed_in_fp32=0),
        notes=[],
        passes_tried=[],
        seconds_per_question=0.0,
        decoder_layers=[],
    )
    monkeypatch.setitem(vqa.STAGES, "train", training)
    for fold in (0, 1):
        vqa.run_stage(run, session, "train", fold, vqa.stage_seconds(run))
    first, second = vqa.read_json_lines(run.directory / "stages.jsonl", vqa.STAGE_RECORD)
    assert first["passes_tried"] == rows
    assert "passes_tried" not in second


@pytest.mark.slow
def test_real_passes_of_a_model_are_planned_and_leave_nothing_behind(
    session, demo_rows, replace, monkeypatch
):
    session.config = replace(session.config, gradient_checkpointing=True)
    model = vqa.attach_lora(session.model, session.config, seed=0).train()
    vqa.use_fast_layers(session, model, 1)
    layers = len(session.decoder_layers)
    batches = []
    collate = vqa.collate

    def noting(session, prompts):
        batches.append(len(prompts))
        return collate(session, prompts)

    def peak(gpu):
        stored = sum(not layer.recompute for layer in session.decoder_layers)
        return GIB * (1 + batches[-1] * (0.1 + 0.1 * max(1, stored)))

    monkeypatch.setattr(vqa, "collate", noting)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", quiet)
    monkeypatch.setattr(torch.cuda, "synchronize", quiet)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    monkeypatch.setattr(vqa, "memory_budget", lambda: 2.05 * GIB)
    (prompt,) = plain_prompts(session, demo_rows.train, [0])
    planner = vqa.PassPlanner(session, prompt, step=4, state_bytes=0, job=10**6)
    plan = planner.plan()
    expected = {1: layers, 2: layers, 4: 1.05 / 4 / 0.1 - 1}
    for row in session.passes_tried:
        kept = int(min(layers, expected[row["in a pass"]]))
        assert row["layers kept"] == (kept if kept > 1 else 0), row
    wanted = (plan.micro_batch, plan.stored_layers)
    (chosen,) = [row for row in session.passes_tried if plan_of(row) == wanted]
    assert chosen["questions/s"] == max(row["questions/s"] or 0 for row in session.passes_tried)
    assert plan.peak_gib == pytest.approx(chosen["peak GiB"], abs=0.01)
    assert len(batches) == MEASURING_PASSES + 3 * sum(trial.turns for trial in planner.trials)
    assert all(value.grad is None for value in vqa.trainable_parameters(model).values())
