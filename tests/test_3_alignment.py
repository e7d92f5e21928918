"""Part 3, Alignment: how well statements fit an image, by models of two towers."""

import numpy as np
import pytest
import torch
from alignment_twins import make_twin, store_twin

import vqa_helpers as vqa

KOREAN = {
    "type": "color",
    "question": "차는  무슨 색인가요?",
    "a": "Red",
    "b": "파랑",
    "c": " ",
    "d": "흰색",
}


@pytest.fixture(scope="module")
def aligner(tmp_path_factory):
    """A tiny SigLIP, loaded as any other."""
    folder = store_twin("siglip", tmp_path_factory.mktemp("siglip"))
    return vqa.open_alignment_model(vqa.Config(model_id=str(folder), quantization="none"))


def by_the_model_itself(aligner, row):
    """logits_per_image of a row's image and all of its statements."""
    inputs = aligner.processor(
        text=vqa.alignment_statements(row),
        images=vqa.load_image(row["image_path"]),
        padding="max_length",
        truncation=True,
        max_length=64,
        return_tensors="pt",
    )
    with torch.inference_mode():
        return aligner.model(**inputs).logits_per_image[0].numpy()


def check_scores(aligner, rows):
    scores = np.array(vqa.align_rows_with_images(aligner, rows))
    expected = [by_the_model_itself(aligner, row) for row in rows.to_dict("records")]
    assert np.abs(scores - expected).max() < 1e-5
    assert scores.std(axis=1).min() > 1e-3  # the texts are told apart


def test_a_statement_has_the_choice_in_front_in_the_questions_language():
    assert vqa.alignment_statements(KOREAN) == [
        "색은 red. 차는 무슨 색인가요?",
        "색은 파랑. 차는 무슨 색인가요?",
        "",
        "색은 흰색. 차는 무슨 색인가요?",
    ]
    assert set(vqa.ALIGNMENT_TEMPLATES) == set(vqa.QUESTION_TYPES)
    english = {**KOREAN, "type": "yesno", "question": "Is it {red}?", "a": "Yes"}
    assert vqa.alignment_statements(english)[0] == "yes. is it {red}?"


def test_scores_are_the_models_own_logits_per_image(aligner, demo_rows):
    check_scores(aligner, demo_rows.train.head(4))


def test_an_image_is_encoded_once_and_a_blank_choice_not_at_all(aligner, demo_rows, monkeypatch):
    rows = demo_rows.train.iloc[[0, 0, 1]].assign(id=["x", "y", "z"], d=["", "둘", ""])
    encoded = []
    encode = vqa.AlignmentModel.image_features

    def noting(self, paths):
        encoded.extend(paths)
        return encode(self, paths)

    monkeypatch.setattr(vqa.AlignmentModel, "image_features", noting)
    scores = vqa.align_rows_with_images(aligner, rows)
    assert encoded == rows["image_path"].iloc[[0, 2]].tolist()
    assert [of_row[3] is None for of_row in scores] == [True, False, True]
    assert scores[0][:3] == pytest.approx(scores[1][:3], abs=1e-6)


def test_a_long_question_does_not_push_its_choice_out(aligner, demo_rows):
    rows = demo_rows.train.head(1).assign(question="이 사진에서 " * 100 + "무엇이 보이나요?")
    check_scores(aligner, rows)


@pytest.mark.slow
def test_a_score_that_is_not_finite_is_refused(demo_rows):
    model, processor = make_twin("siglip")
    broken = vqa.AlignmentModel(model, processor, 64, "max_length")
    with torch.no_grad():
        model.logit_bias.fill_(torch.nan)
    rows = demo_rows.train.head(2)
    named = f"alignment scores of row {rows['id'].iloc[0]} are not finite"
    with pytest.raises(FloatingPointError, match=named):
        vqa.align_rows_with_images(broken, rows)


def test_a_model_without_both_towers_is_refused(model_folders):
    config = vqa.Config(model_id=str(model_folders["qwen3_vl"]), quantization="none")
    with pytest.raises(ValueError, match=r"is of the family 'qwen3_vl', which has no tower"):
        vqa.open_alignment_model(config)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["siglip2", "clip"])
def test_scores_of_other_families_are_the_models_own(family, tmp_path, demo_rows):
    folder = store_twin(family, tmp_path)
    aligner = vqa.open_alignment_model(vqa.Config(model_id=str(folder), quantization="none"))
    check_scores(aligner, demo_rows.train.head(4))
