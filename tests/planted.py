"""Logits and runs whose scores are made up: nothing is computed, and everything is known."""

import json

import numpy as np
import pandas as pd

import vqa_helpers as vqa

VIEWS = ["rotation 0", "rotation 1"]


# --- Logits ---------------------------------------------------------------------------------------


def one_hot(labels):
    """(n, 4): 1 for the label, 0 for the other choices."""
    return np.eye(4)[labels]


def draw_labels(probabilities, random):
    """Labels of which each is drawn from its row of probabilities."""
    uniform = random.random((len(probabilities), 1))
    return (uniform > probabilities.cumsum(axis=1)[:, :-1]).sum(axis=1)


def sample_labels(logits, seed=0):
    """Labels drawn from softmax(logits), so that these logits are calibrated by construction."""
    return draw_labels(vqa.softmax(logits), np.random.default_rng(seed))


def calibrated(n, seed=0):
    """Logits (n, 4), and labels that are drawn from them."""
    logits = np.random.default_rng(seed).normal(scale=2, size=(n, 4))
    return logits, sample_labels(logits, seed + 1)


def rotated_views(content, bias):
    """(n, 4, 4) logits of four rotations; what stands at position p gets bias[p] more."""
    views = []
    for shift in range(4):
        order = np.roll(np.arange(4), shift)  # order[position] = original index
        prompt = content[:, order] + bias
        original = np.empty_like(prompt)
        original[:, order] = prompt
        views.append(original)
    return np.stack(views, axis=1).astype(np.float32)


# --- Runs -----------------------------------------------------------------------------------------


def hidden_labels(ids):
    """What the planted runs take for the answers of the test rows."""
    return ids.str.extract(r"(\d+)", expand=False).astype(int) % 4


def rows_of_fold(run, fold):
    """The training rows that a fold holds out."""
    return run.train[run.train["fold"] == fold]


def scored_frames(run, fold):
    """The rows that a fold scores, by the name of their file: held-out rows and test rows."""
    return {"oof": rows_of_fold(run, fold), "test": run.test}


def write_zeroshot(run, rows, view, random):
    """Zero-shot scores of these rows, which know nothing."""
    path = run.directory / "zeroshot.npz"
    logits = random.normal(size=(len(rows), 1, 4))
    vqa.write_logits(path, rows, logits, [view], run.fingerprint)


def planted_run(run, signals=(2.0, 2.0), seed=0):
    """The run with made-up scores of two views: `signals` times the answer, plus noise."""
    random = np.random.default_rng(seed)
    strengths = np.array(signals)[:, None]
    for fold in run.config.folds_to_train:
        for name, frame in scored_frames(run, fold).items():
            labels = frame.get("label", hidden_labels(frame["id"])).to_numpy()
            signal = one_hot(labels)[:, None] * strengths
            logits = signal + random.normal(size=(len(frame), 2, 4))
            path = run.fold_dir(fold) / f"{name}.npz"
            vqa.write_logits(path, frame, logits, VIEWS, run.fingerprint)
        vqa.atomic_write(run.fold_dir(fold) / "result.json", "{}")
    vqa.MetricLogger(run.directory / "stages.jsonl").log(label="train fold 0", seconds=60 + seed)
    write_zeroshot(run, run.train, VIEWS[0], random)
    return run


def planted_two_views(run, zeroshot_rows):
    """The run with made-up scores of two views, of which only the second knows the answers."""
    random = np.random.default_rng(0)
    views = ["rotation 0", "rotation 2"]
    for fold in run.config.folds_to_train:
        for name, frame in scored_frames(run, fold).items():
            logits = random.normal(size=(len(frame), 2, 4))
            if "label" in frame:
                logits[:, 1] += 4 * one_hot(frame["label"])
            path = run.fold_dir(fold) / f"{name}.npz"
            vqa.write_logits(path, frame, logits, views, run.fingerprint)
        vqa.atomic_write(run.fold_dir(fold) / "result.json", "{}")
    write_zeroshot(run, zeroshot_rows, views[0], random)
    return run


def rewrite_rows(run, name, frame):
    """Give the run other rows: those of folds, test_rows or sample_rows."""
    table = run.directory / f"{name}.csv"
    vqa.write_table(frame, table)
    path = run.directory / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["tables"][table.name] = vqa.file_sha256(table)
    path.write_text(json.dumps(content), encoding="utf-8")


def longer(run, replace, times=10):
    """The run with each training row that often, under other ids: a difference can show."""
    frames = [run.train.assign(id=run.train["id"] + f"_{number}") for number in range(times)]
    train = pd.concat(frames, ignore_index=True).assign(pixel_hash=lambda frame: frame["id"])
    rewrite_rows(run, "folds", train)
    return replace(run, train=train)


def runs_side_by_side(data, outputs, replace, signals):
    """Finished runs on the rows of one competition, a name and the strength of its signal each."""
    competition = vqa.load_competition(data)
    runs = []
    for seed, (name, signal) in enumerate(signals.items()):
        config = vqa.Config.preset(
            "demo",
            data_dir=str(data),
            output_dir=str(outputs),
            run_name=name,
            n_folds=2,
            seed=seed,
            ensemble_method="mean",  # quick
            use_temperature_scaling=False,
        )
        folds = vqa.make_folds(competition.train, 2, seed)
        run = longer(vqa.start_run(config, competition, folds), replace, times=4)
        runs.append(planted_run(run, signals=(signal, signal), seed=seed))
    return runs


def evaluate_once(monkeypatch):
    """Let `evaluate_run` remember what it has found for a run's folder."""
    evaluate = vqa.evaluate_run
    found = {}

    def remember(run):
        if run.directory not in found:
            found[run.directory] = evaluate(run)
        return found[run.directory]

    monkeypatch.setattr(vqa, "evaluate_run", remember)


def write_result(run, fold, raw, ema):
    """What a fold's training leaves behind, with these NLLs of raw and of EMA weights."""
    kinds = {
        "raw": {"accuracy": 0.5, "nll": raw},
        "ema": {"accuracy": 0.5, "nll": ema},
    }
    write_kinds(run, fold, kinds)


def write_kinds(run, fold, kinds):
    """What a fold's training leaves behind, with these metrics of each kind of weights."""
    content = {
        "fold": fold,
        "best_epoch": 1,
        "kinds": kinds,
        "history": [{"epoch": 1}],
        "adapters": {},
    }
    vqa.atomic_write(run.fold_dir(fold) / "result.json", json.dumps(content))
    rows = rows_of_fold(run, fold)
    for kind in kinds:
        path = run.fold_dir(fold) / f"validation_{kind}.npz"
        if not path.exists():
            logits = np.zeros((len(rows), 1, 4))
            vqa.write_logits(path, rows, logits, VIEWS[:1], run.fingerprint)


def write_scores(run, fold, value):
    """Random scores around `value`."""
    _write_scores(run, fold, value, VIEWS, "")


def write_16_bit_scores(run, fold, value):
    """Random scores around `value`, as the unquantised model's."""
    views = [view + vqa.SUFFIX_16_BIT for view in VIEWS]
    _write_scores(run, fold, value, views, "_16bit")


def _write_scores(run, fold, value, views, ending):
    for name, frame in scored_frames(run, fold).items():
        random = np.random.default_rng(fold)
        logits = random.normal(value, size=(len(frame), len(views), 4))
        path = run.fold_dir(fold) / f"{name}{ending}.npz"
        vqa.write_logits(path, frame, logits, views, run.fingerprint)
