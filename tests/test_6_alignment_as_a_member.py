"""Part 6, Alignment as a member: its scores are added where out-of-fold rows prefer them."""

import numpy as np
import pytest
from planted import draw_labels, hidden_labels, longer, one_hot, planted_run

import vqa_helpers as vqa

MODEL = "google/siglip2-so400m-patch14-384"


@pytest.fixture
def aligned_run(mini_run, replace):
    """Make a finished run whose alignment scores know the answers by `signal`."""

    def make(signal, times=10, **settings):
        run = longer(mini_run(alignment_model=MODEL, **settings), replace, times)
        run = planted_run(run, signals=(0.5, 0.5))
        random = np.random.default_rng(7)
        for name, frame in (("train", run.train), ("test", run.test)):
            labels = frame.get("label", hidden_labels(frame["id"])).to_numpy()
            scores = signal * one_hot(labels) + random.normal(size=(len(frame), 4)) - 9
            path = run.directory / vqa.ALIGNMENT_FILES[name]
            vqa.write_logits(path, frame, scores[:, None], [MODEL], run.fingerprint)
        return run

    return make


def test_the_weight_and_the_temperature_of_the_mixture_are_found():
    random = np.random.default_rng(0)
    logits = random.normal(size=(10_000, 4))
    scores = random.normal(scale=5, size=(10_000, 4)) - 20
    scores[:2500, 3] = -np.inf
    true = vqa.AlignmentWeights(power=0.5, weight=0.2)
    probabilities = vqa.softmax(np.where(np.isfinite(scores), logits, -np.inf))
    labels = draw_labels(true.mix(probabilities, scores), random)
    found = vqa.fit_alignment(probabilities, scores, labels)
    assert [found.power, found.weight] == pytest.approx([0.5, 0.2], abs=0.03)
    assert (found.mix(probabilities, scores)[:2500, 3] == 0).all()
    unscaled = vqa.fit_alignment(probabilities, scores, labels, scaling=False)
    assert unscaled.power == 1
    inverse = vqa.fit_alignment(probabilities[2500:], -scores[2500:], labels[2500:])
    assert inverse.weight == 0


def test_scores_that_know_the_answers_are_used_in_oof_and_test_rows(aligned_run):
    run = aligned_run(signal=3.0, times=4, ensemble_method="mean")
    evaluation = vqa.evaluate_run(run)
    step = evaluation.ladder.loc[vqa.STEP_ALIGNMENT]
    used = evaluation.ladder.index[evaluation.ladder["used"].astype(bool)].tolist()
    assert used[-1] == vqa.STEP_ALIGNMENT
    assert step["against"] == used[-2]
    assert step["gain_low"] > 0
    assert step["accuracy"] == pytest.approx(
        (evaluation.probabilities.argmax(1) == evaluation.oof.labels).mean()
    )
    without = vqa.predict_test(run, vqa.dataclasses.replace(evaluation, alignment=None))
    mixed = vqa.predict_test(run, evaluation)
    scores = vqa.read_alignment(run, "test").to_numpy()
    for fold, probabilities in mixed.items():
        expected = evaluation.alignment.mix(without[fold], scores)
        assert np.array_equal(probabilities, expected)
    weight = f"{evaluation.alignment.weight:.3f}"
    sentence = vqa.describe_alignment(run, evaluation)
    assert f"`{MODEL}` are part of the submission, with weight {weight}: on out" in sentence
    answers = np.mean(list(mixed.values()), axis=0).argmax(1)
    before = np.mean(list(without.values()), axis=0).argmax(1)
    truth = hidden_labels(run.test["id"])
    assert (answers == truth).mean() > (before == truth).mean()


@pytest.mark.slow
def test_scores_that_know_nothing_change_no_answer(aligned_run):
    run = aligned_run(signal=0.0)
    evaluation = vqa.evaluate_run(run)
    assert not evaluation.ladder.loc[vqa.STEP_ALIGNMENT, "used"]
    assert evaluation.alignment is None
    sentence = vqa.describe_alignment(run, evaluation)
    assert "are no part of the submission: they are not better by more than" in sentence
    assert sentence in vqa.write_report(run, evaluation).read_text(encoding="utf-8")
    (run.directory / vqa.ALIGNMENT_FILES["test"]).rename(run.directory / "kept")
    sentence = vqa.describe_alignment(run, evaluation)
    assert sentence.endswith("not all rows have them yet; run all again to add them.")
    (run.directory / "kept").rename(run.directory / vqa.ALIGNMENT_FILES["test"])
    ladder = evaluation.ladder.drop(vqa.STEP_ALIGNMENT)
    unskilled = vqa.dataclasses.replace(evaluation, ladder=ladder)
    assert "models without skill" in vqa.describe_alignment(run, unskilled)
    plain = dict(run.__dict__, config=vqa.dataclasses.replace(run.config, alignment_model=None))
    without = vqa.evaluate_run(vqa.Run(**plain))
    assert vqa.STEP_ALIGNMENT not in without.ladder.index
    assert np.array_equal(without.probabilities, evaluation.probabilities)


@pytest.mark.slow
def test_the_active_list_has_the_letter_that_fits_the_image_best(aligned_run):
    run = aligned_run(signal=9.0, times=1)
    letters = vqa.aligned_letters(run)
    rows = [("train", run.train["id"].iloc[0]), ("test", run.test["id"].iloc[0])]
    assert letters[rows[0]] == run.train["answer"].iloc[0]
    assert letters[rows[1]] == vqa.CHOICES[hidden_labels(run.test["id"]).iloc[0]]
    table = vqa.pd.DataFrame(
        {"rows": ["test"], "id": [rows[1][1]], "other": ["a"], "question": "q"}
    )
    table = vqa.with_aligned_letters(run, table)
    assert table.columns.tolist() == ["rows", "id", "other", "aligned", "question"]
    assert table["aligned"].tolist() == [letters[rows[1]]]


def test_its_step_costs_what_the_base_model_before_it_costs():
    chosen = vqa.LadderStep(np.full((8, 4), 0.25), used=True, extra_cost=0.7)
    steps = {vqa.STEP_BASE_CHOICE: chosen}
    member = vqa.AlignmentMember(
        weights=vqa.AlignmentWeights(power=1.0, weight=0.0),
        step=vqa.Candidate(chosen.probabilities),
        used=False,
        probabilities=chosen.probabilities,
    )
    vqa.add_alignment_step(steps, member, views=[0])
    assert steps[vqa.STEP_ALIGNMENT].extra_cost == 0.7
    assert steps[vqa.STEP_ALIGNMENT].against == vqa.STEP_BASE_CHOICE
