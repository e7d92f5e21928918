"""The computed memory of training: against what a GPU took, on every card that a preset is for, and in preflight."""

import json
import sys
from pathlib import Path

import pytest
import torch

import vqa_helpers as vqa

sys.path.append(str(Path(__file__).parent / "benchmarks"))
import memory_plan
from test_config import CARDS

CAPPED = {(32, 0): 11.70, (16, 3): 10.86, (8, 9): 11.53, (4, 21): 11.89, (2, 36): 10.77}
UNCAPPED = {(32, 36): 93.54, (16, 36): 49.70, (8, 36): 27.81, (4, 36): 16.88}
NOT_COMPILED = {(8, 36): 30.88, (4, 36): 18.09, (2, 36): 11.70}
SMALL = {(32, 6): 11.63, (16, 14): 11.96, (8, 30): 12.13, (4, 36): 8.22, (2, 36): 5.35}
# Shapes, tokens a question, compiled; GiB on one H200 under bench_gpu.py's settings by (questions in a pass, layers
# that keep activations), with the optimizer's state.
MEASURED = {
    "8B": (memory_plan.qwen3_8b, 366, True, CAPPED | UNCAPPED),
    "8B, not compiled": (memory_plan.qwen3_8b, 366, False, NOT_COMPILED),
    "3B": (memory_plan.qwen25_3b, 306, True, SMALL),
}


@pytest.mark.parametrize(
    ("make_shapes", "tokens", "compiled", "peaks"), MEASURED.values(), ids=MEASURED
)
def test_the_computed_peak_is_within_5_percent_of_every_measured_one(
    make_shapes, tokens, compiled, peaks
):
    costs = vqa.memory_costs(vqa.Config(), make_shapes({}), tokens, "bf16", compiled)
    for plan, measured in peaks.items():
        assert sum(costs.peak(vqa.MemoryPlan(*plan)).values()) == pytest.approx(
            measured, rel=0.05
        ), plan


def test_computed_weights_are_those_measured_after_loading_and_at_rest():
    big, small = (
        vqa.memory_costs(vqa.Config(), make({}), 1, "bf16", True)
        for make in (memory_plan.qwen3_8b, memory_plan.qwen25_3b)
    )
    assert big.loaded == pytest.approx(6.73, abs=0.01) and small.loaded == pytest.approx(
        3.16, abs=0.01
    )
    assert big.rows["weights"] == pytest.approx(4.5, abs=0.01)
    scales = 0.16  # of its 4-bit blocks, unpacked; its head is tied and stays
    assert small.rows["weights"] == pytest.approx(small.loaded - small.tower + scales, abs=0.01)
    cached, not_cached = (
        big.table(vqa.MemoryPlan(1, 0), is_cached, 0)["computed GiB"] for is_cached in (True, False)
    )
    for row in ("weights", "all of these"):
        assert not_cached[row] == pytest.approx(cached[row] + big.tower)


def test_settings_change_the_rows_that_they_should():
    def costs(**settings):
        return vqa.memory_costs(vqa.Config(**settings), memory_plan.qwen3_8b({}), 366, "bf16", True)

    plain = costs()
    assert costs(quantization="none").rows["weights"] == pytest.approx(14.1, abs=0.05)
    assert costs(loss="vocabulary").rows["weights"] == pytest.approx(
        plain.rows["weights"] + 1.16, abs=0.01
    )
    assert costs(lora_r=32).rows["optimizer"] == 2 * plain.rows["optimizer"]
    assert (
        costs(use_ema=False).rows["averages"] == 0
        and costs(use_swa=True).rows["averages"] == plain.rows["optimizer"]
    )
    assert costs(lora_dropout=0.0).layer < 0.8 * plain.layer


@pytest.mark.parametrize(("cards", "preset", "_"), CARDS.values(), ids=CARDS)
def test_what_auto_picks_fits_on_the_card_by_computation(cards, preset, _):
    row = memory_plan.memory_row(preset, min(memory for _, memory, _ in cards))
    assert row["in a pass"] >= 8 and row["sum"] <= row["free"] and row["loading"] <= row["free"]


def test_a_card_below_the_smallest_preset_is_too_small_by_computation_for_the_larger_model():
    shapes = memory_plan.qwen3_8b({})
    verdict = vqa.memory_costs(vqa.Config(), shapes, 878, "fp16", False).verdict(
        memory_plan.free_memory(6144)
    )
    assert verdict.startswith(
        "does not fit by computation: 6.7 GiB for one question at a time, 5.1 GiB free"
    )
    assert "smaller model_id" in verdict and "max_pixels" in verdict


def test_the_readme_shows_what_the_script_prints():
    readme = (vqa.HERE / "README.md").read_text(encoding="utf-8")
    assert memory_plan.memory_table() in readme


def preflight_config(mini_data, tmp_path):
    return vqa.Config.preset("demo", data_dir=str(mini_data), cache_dir=str(tmp_path))


def test_preflight_shows_computed_beside_measured_memory_and_goes_on_where_it_would_not_fit(
    mini_data, tmp_path, monkeypatch
):
    small = vqa.SimpleNamespace(available=2**20)
    monkeypatch.setattr(vqa.psutil, "virtual_memory", lambda: small)
    plan = vqa.MemoryPlan(8, 2, peak_gib=1.25)
    monkeypatch.setattr(vqa, "plan_memory", lambda *_: plan)
    config = preflight_config(mini_data, tmp_path)
    facts = vqa.preflight(config, rows=8)
    computed, measured = facts["memory"]["computed GiB"], facts["memory"]["measured GiB"]
    rows = ["weights", "LoRA and gradients", "optimizer", "averages", "activations"]
    assert list(computed) == [*rows, "all of these", "vision features, on disk or in RAM"]
    assert computed["all of these"] == pytest.approx(sum(computed[name] for name in rows))
    assert measured == dict.fromkeys(computed, "") | {"all of these": 1.25}
    assert facts["memory needed"].startswith("does not fit by computation: 0.")
    json.dumps(facts)
    tables, tokens = vqa.load_competition(config.data_dir), facts["token_counts"]
    images = dict(zip(tables.train["pixel_hash"], tokens["train"], strict=True))
    images |= zip(tables.test["pixel_hash"], tokens["test"], strict=True)  # each image once
    image_token = vqa.expected_memory(config, tables.train).image_token
    assert computed["vision features, on disk or in RAM"] == pytest.approx(
        sum(images.values()) * image_token
    )


def test_the_command_line_prints_the_table_before_the_facts(monkeypatch, capsys):
    memory = {
        "computed GiB": {"weights": 4.5, "all of these": 6.0},
        "measured GiB": {"weights": "", "all of these": 5.9},
    }
    monkeypatch.setattr(vqa, "preflight", lambda config: {"memory": memory})
    config = json.dumps({"model_id": "any"})
    monkeypatch.setattr(sys, "argv", ["vqa_helpers.py", "preflight", "--config", config])
    vqa.main()
    *table, facts = capsys.readouterr().out.splitlines()
    assert (
        table[0] == "|  | computed GiB | measured GiB |"
        and table[-1] == "| all of these | 6.000 | 5.900 |"
    )
    assert json.loads(facts) == {"memory": memory}


def test_weights_that_do_not_fit_end_preflight_with_what_to_change(
    mini_data, tmp_path, monkeypatch
):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vqa, "memory_budget", lambda: 2**20)
    monkeypatch.setattr(vqa, "open_session", run_out)
    with pytest.raises(torch.OutOfMemoryError) as error:
        vqa.preflight(preflight_config(mini_data, tmp_path), rows=8)
    assert error.value.__notes__[0].startswith("Memory: does not fit by computation: ")
    assert "0.0 GiB free; choose a smaller model_id" in error.value.__notes__[0]


def test_computed_vision_features_are_the_bytes_of_the_cache(session, demo_rows):
    """In both families, with and without DeepStack."""
    row = demo_rows.train.iloc[:1]
    prompt = vqa.make_prompt(session, row, 0, [(0, 1, 2, 3)])
    (features,) = session.vision_cache.tower(vqa.collate(session, [prompt]))
    costs = vqa.memory_costs(session.config, session.model.config, 1, "fp32", compiled=False)
    tokens = len(features[0])
    assert sum(tensor.nbytes for tensor in features) == pytest.approx(
        tokens * costs.image_token * 2**30
    )


def test_before_loading_memory_is_that_of_the_longest_prompt_with_the_runs_own_templates(
    session, demo_rows, replace
):
    longer = {
        kind: "Look closely. " * 9 + template for kind, template in vqa.PROMPT_TEMPLATES.items()
    }
    session.config = replace(session.config, prompt_templates=longer)
    frame = demo_rows.train.head(12)
    longest = max(
        len(vqa.make_prompt(session, frame, row, [(0, 1, 2, 3)]).input_ids) for row in range(12)
    )
    known = vqa.memory_costs(session.config, session.model.config, longest, "fp32", compiled=False)
    assert vqa.expected_memory(session.config, frame) == known


def test_the_fullest_gpu_is_the_one_reported(monkeypatch):
    """A spread model fills its GPUs unevenly, and the first one less than the last."""
    reset = []
    monkeypatch.setattr(vqa, "_cuda_is_in_use", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    for name, gib in {
        "memory_allocated": (1, 2),
        "memory_reserved": (3, 4),
        "max_memory_allocated": (5, 6),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda gpu, gib=gib: gib[gpu] * 2**30)
    with vqa.track_peak_memory("block") as report:
        pass
    assert reset == [0, 1]
    assert [report[name] for name in ("gpu_gib", "gpu_reserved_gib", "gpu_peak_gib")] == [2, 4, 6]
