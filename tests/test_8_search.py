"""Part 8, Search: trials survive kills, budgets and divergence; figures can be reproduced."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
from running import quiet, raising

import vqa_helpers as vqa

pytest.importorskip("optuna")
SPACE = {
    "learning_rate": (1e-4, 1e-2, "log"),
    "lora_r": [4, 8],
    "label_smoothing": (0.0, 0.2),
    "batch_size": (4, 8),
}


@pytest.fixture
def search(mini_data, tmp_path):
    """search(name, trials, minutes=10, num_epochs=3, ...) -> the table and the search's folder."""
    competition = vqa.load_competition(mini_data, 0.5)
    folds = vqa.make_folds(competition.train, 2, 42)

    def make(name, trials, minutes=10, space=SPACE, **overrides):
        settings = {
            "data_dir": str(mini_data),
            "output_dir": str(tmp_path / name),
            "run_name": "run",
            "num_epochs": 3,
            "n_folds": 2,
            "max_fallback_share": 0.5,
        }
        config = vqa.Config.preset("demo", **(settings | overrides))
        table = vqa.search_hyperparameters(config, competition, folds, space, trials, minutes)
        (folder,) = (tmp_path / name / "run").glob("search-*")
        return table, folder

    return make


def in_process(interrupt_at=None):
    """launch_workers without processes; launch number `interrupt_at` dies after two steps."""
    launched = []

    def launch(run, jobs, stages, stop):
        launched.append(run.directory.name)
        killed = len(launched) == interrupt_at

        def progress(label, done, *_, **__):
            if killed and label == "fold 0 training" and done == 2:
                raise KeyboardInterrupt

        vqa.run_stages(run, [0], stages, progress)

    return launch, launched


def pretended(losses, interrupt_after=None):
    """launch_workers that trains nothing: `losses(learning_rate)` is the NLL of the epochs.

    All are there before it is watched. An error stands for a worker that ends with it.
    """
    launched = []

    def launch(run, jobs, stages, stop):
        launched.append(run.config.learning_rate)
        curve = losses(run.config.learning_rate)
        if isinstance(curve, str):
            raise RuntimeError(f"A worker stopped.\n{curve}")
        history = [{"epoch": epoch, "nll": loss} for epoch, loss in enumerate(curve, 1)]
        vqa.write_table(pd.DataFrame(history), run.fold_dir(0) / "history.csv")
        if len(launched) == interrupt_after or stop():
            raise vqa.Interrupted
        last = curve[-1]
        result = {
            "fold": 0,
            "best_epoch": 1,
            "kinds": {
                "raw": {"accuracy": 0.5, "nll": last},
                "ema": {"accuracy": 0.5, "nll": last + 0.1},
            },
            "history": history,
            "adapters": {},
        }
        vqa.atomic_write(run.fold_dir(0) / "result.json", json.dumps(result))

    return launch, launched


def fold_result(run_folder):
    """The result of a run's fold, without the run's fingerprint and the speed of the machine."""
    text = (run_folder / "fold_0" / "result.json").read_text(encoding="utf-8")
    result = json.loads(text)
    result.pop("fingerprint")
    for epoch in result["history"]:
        epoch.pop("samples_per_second")
    return result


def test_a_killed_search_ends_like_an_undisturbed_one_and_its_best_figure_can_be_reproduced(
    search, mini_run, monkeypatch
):
    def search_two_trials(name):
        return search(name, 2, save_every_steps=1, num_epochs=1)

    launch, launched = in_process()
    monkeypatch.setattr(vqa, "launch_workers", launch)
    table, undisturbed = search_two_trials("undisturbed")
    assert launched == ["trial_000", "trial_001"]
    assert sorted(table["trial"]) == [0, 1]
    assert table["learning_rate"].is_unique
    search_two_trials("undisturbed")
    assert len(launched) == 2  # nothing is left to do

    launch, launched = in_process(interrupt_at=2)
    monkeypatch.setattr(vqa, "launch_workers", launch)
    with pytest.raises(KeyboardInterrupt):
        search_two_trials("killed")
    assert launched == ["trial_000", "trial_001"]
    table, killed = search_two_trials("killed")
    assert launched == ["trial_000", "trial_001", "trial_001"]
    search_two_trials("killed")
    assert len(launched) == 3
    for name in ("trials.csv", "best_overrides.json"):
        assert (killed / name).read_bytes() == (undisturbed / name).read_bytes()
    assert not [*killed.glob("*/fold_0/checkpoints"), *killed.glob("*/fold_0/adapter_*")]

    best = json.loads((killed / "best_overrides.json").read_text(encoding="utf-8"))
    run = mini_run(run_name="again", **best)
    vqa.run_stages(run, [0], ["train"], quiet)
    best_trial, best_nll = table.iloc[0][["trial", "nll"]]
    result = fold_result(killed / f"trial_{best_trial:03d}")
    assert result == fold_result(run.directory)
    assert min(metrics["nll"] for metrics in result["kinds"].values()) == best_nll


def test_a_trial_that_is_clearly_worse_is_pruned_and_what_came_after_does_not_count(
    search, monkeypatch
):
    """Whether its workers were stopped in time or had gone on makes no difference."""

    def search_six_trials(name, interrupt_after):
        curves = iter([[1.0, 0.9, 0.8]] * 4 + [[2.0, 0.7, 0.6]] * 2)
        launch, _ = pretended(lambda rate: next(curves), interrupt_after)
        monkeypatch.setattr(vqa, "launch_workers", launch)
        table, _ = search(name, 6)
        return table

    table = search_six_trials("late", interrupt_after=99)
    assert table.equals(search_six_trials("stopped", interrupt_after=None))
    assert table["state"].tolist() == ["complete"] * 4 + ["pruned"] * 2
    assert table["nll"].tolist() == [0.8] * 4 + [2.0] * 2
    assert table["epochs"].tolist() == [3] * 4 + [1] * 2


def test_a_bad_last_epoch_is_no_reason_to_prune(search, monkeypatch):
    curves = iter([[1.0, 1.0, 0.1]] * 4 + [[0.9, 0.9, 0.9]] * 2)
    launch, _ = pretended(lambda rate: next(curves))
    monkeypatch.setattr(vqa, "launch_workers", launch)
    table, _ = search("last", 6)
    assert table["state"].tolist() == ["complete"] * 6


def test_a_distilled_run_is_nothing_to_search_by(search):
    refused = "cannot be searched|nothing to search by"
    with pytest.raises(ValueError, match=refused):
        search("distilled", 1, space={"distill_weight": (0.1, 0.9)})
    with pytest.raises(ValueError, match=refused):
        search("distilled", 1, space={"mix_weights": [False, True]})
    with pytest.raises(ValueError, match=refused):
        search("distilled", 1, distill_from="outputs/teacher")


def test_a_range_and_a_list_of_the_same_ends_are_two_searches(search, monkeypatch):
    monkeypatch.setattr(vqa, "run_trial", lambda *_: None)
    _, of_range = search("a", 1, minutes=0, space={"lora_r": (4, 8)})
    _, of_list = search("b", 1, minutes=0, space={"lora_r": [4, 8]})
    assert of_range.name != of_list.name


def test_the_sampler_learns_from_earlier_trials_and_ranges_are_kept(search, monkeypatch):
    launch, launched = pretended(lambda rate: [0.1 + 100 * abs(rate - 0.005)] * 3)
    monkeypatch.setattr(vqa, "launch_workers", launch)
    table, folder = search("learns", 24)
    assert len(set(launched)) == 24
    assert all(1e-4 <= rate <= 1e-2 for rate in launched)
    assert table["nll"].iloc[0] < min(table.query("trial < 4")["nll"])
    assert set(table["lora_r"]) == {4, 8}
    assert table["batch_size"].between(4, 8).all()
    best = json.loads((folder / "best_overrides.json").read_text(encoding="utf-8"))
    first_row = json.loads(table.iloc[0][list(SPACE)].to_json(double_precision=15))
    assert best == first_row | best
    assert best["learning_rate"] in launched
    assert set(best) == set(SPACE)


def test_a_trial_that_diverges_is_a_failure_and_another_error_is_not_hidden(search, monkeypatch):
    outcomes = iter(
        [
            [0.5] * 3,
            "FloatingPointError: 11 steps were not finite",
            "RuntimeError: Out of GPU memory with one question per forward pass",
            [0.5] * 3,
        ]
    )
    launch, launched = pretended(lambda rate: next(outcomes))
    monkeypatch.setattr(vqa, "launch_workers", launch)
    table, _ = search("diverges", 4)
    assert table["state"].tolist() == ["complete", "complete", "fail", "fail"]
    assert len(launched) == 4

    broken = RuntimeError("A worker stopped.\nOSError: no such model")
    monkeypatch.setattr(vqa, "launch_workers", raising(broken))
    with pytest.raises(RuntimeError, match="no such model"):
        search("diverges", 5)


def test_settings_that_are_legal_one_by_one_but_not_together_are_a_failed_trial(
    search, monkeypatch
):
    launch, launched = pretended(lambda rate: [0.5] * 3)
    monkeypatch.setattr(vqa, "launch_workers", launch)
    table, _ = search("together", 8, space={"use_swa": [True, False], "num_epochs": (1, 2)})
    # Averaging starts after the first epoch.
    impossible = table["use_swa"] & (table["num_epochs"] == 1)
    assert impossible.any()
    assert (table["state"] == "fail").equals(impossible)
    assert len(launched) == 8 - impossible.sum()


def test_a_range_of_whole_numbers_is_continuous_where_the_field_is(search, monkeypatch):
    launch, launched = pretended(lambda rate: [0.5] * 3)
    monkeypatch.setattr(vqa, "launch_workers", launch)
    table, _ = search("whole", 3, space={"weight_decay": (0, 1), "batch_size": (2, 6)})
    assert (table["weight_decay"] % 1 > 0).all()
    assert (table["batch_size"] % 1 == 0).all()


def test_when_the_minutes_are_over_the_trial_waits_for_the_next_call(search, monkeypatch):
    launch, launched = pretended(lambda rate: [0.5] * 3)
    clock = SimpleNamespace(seconds=0.0)

    def slow(*arguments):
        clock.seconds += 40
        launch(*arguments)

    monkeypatch.setattr(vqa, "launch_workers", slow)
    monkeypatch.setattr(vqa.time, "monotonic", lambda: clock.seconds)
    table, _ = search("minutes", 5, minutes=1)
    assert len(table) == 1
    assert len(launched) == 2
    table, _ = search("minutes", 5, minutes=10)
    assert len(table) == 5
    assert len(launched) == 6
    assert launched[1] == launched[2]


def test_a_worker_that_is_told_to_stop_saves_first(mini_run):
    run = mini_run(num_epochs=500)
    has_trained_an_epoch = (run.fold_dir(0) / "history.csv").exists
    with pytest.raises(vqa.Interrupted, match="Its work is saved"):
        vqa.launch_workers(run, [((None,), [0])], ["train"], has_trained_an_epoch)
    assert vqa.CheckpointManager(run.fold_dir(0) / "checkpoints").latest_verified()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"learning_rat": [1]},
            "'learning_rat' cannot be searched; fields that can: .*learning_rate",
        ),
        ({"n_folds": (2, 5)}, "'n_folds' cannot be searched"),
        ({"tta_rotations": [1, 4]}, "'tta_rotations' cannot be searched"),
        ({"learning_rate": (1e-2, 1e-4)}, "'learning_rate' is"),
        ({"learning_rate": (1e-4, 1e-2, "linear")}, "'learning_rate' is"),
        ({"lora_r": []}, "'lora_r' is"),
        ({"lora_r": 8}, "'lora_r' is 8"),
        ({"loss": ("choices", "letters")}, "'loss' is"),
        ({"use_ema": (False, True)}, "'use_ema' is"),
        ({"lora_r": (4.5, 8.5)}, "'lora_r'"),
        ({"learning_rate": (0, 1e-3, "log")}, "'learning_rate' is .* above 0"),
        ({"label_smoothing": (0.0, 1.5)}, "'label_smoothing' is 1.5; it needs 0 <= value < 1"),
        ({"loss": ["choices", "letters"]}, "'loss' is 'letters'"),
    ],
)
def test_an_impossible_search_space_is_refused_by_name(search, space, message):
    with pytest.raises(ValueError, match=message):
        search("space", 1, space=space)


def test_without_optuna_the_error_says_how_to_install_it(search, monkeypatch):
    monkeypatch.setattr(vqa.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install optuna"):
        search("absent", 1)
