"""Part 3, Models over several GPUs: each gets about the same bytes of weights."""

import new_models
import pytest
import torch
import transformers

import vqa_helpers as vqa

T4 = {"memory_gib": 15.0}
DENSE_LAYERS = 8


@pytest.fixture
def shapes(model_folders):
    """A model of Qwen3.5's class with many layers, of shapes only."""
    config = transformers.AutoConfig.from_pretrained(model_folders["qwen3_5"])
    config.text_config.num_hidden_layers = DENSE_LAYERS
    config.text_config.layer_types = ["full_attention"] * DENSE_LAYERS
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(config)


def layer_places(places):
    """The GPU of each decoder layer, in order."""
    return [places[f"model.language_model.layers.{number}"] for number in range(DENSE_LAYERS)]


@pytest.mark.parametrize("quantization", ["4bit", "none"])
def test_every_weight_has_one_gpu_and_layers_keep_their_order(
    shapes, demo_config, replace, quantization
):
    config = replace(demo_config, quantization=quantization)
    places = vqa.spread_over_gpus(shapes, config, 2, [T4, T4])
    for name, _ in shapes.named_parameters():
        owners = [place for place in places if name.startswith(f"{place}.")]
        assert len(owners) == 1, name
    assert layer_places(places) == sorted(layer_places(places))
    assert places["model.visual"] == 0
    assert places["model.language_model.embed_tokens"] == 0
    assert places["model.language_model.norm"] == 1


def test_each_gpu_gets_the_same_bytes_but_for_one_module(shapes, demo_config, replace):
    config = replace(demo_config, quantization="none")
    places = vqa.spread_over_gpus(shapes, config, 4, [T4] * 3)
    used = [0, 0, 0]
    largest = 0
    for place, gpu in places.items():
        parameters = shapes.get_submodule(place).parameters()
        size = 4 * sum(parameter.numel() for parameter in parameters)
        used[gpu] += size
        largest = max(largest, size)
    assert max(used) - min(used) <= 2 * largest


def test_a_head_that_is_the_embeddings_lies_where_they_lie(shapes, demo_config):
    shapes.lm_head.weight = shapes.get_input_embeddings().weight
    places = vqa.spread_over_gpus(shapes, demo_config, 2, [T4, T4])
    assert places["lm_head"] == places["model.language_model.embed_tokens"] == 0


def test_a_model_that_does_not_fit_into_the_gpus_says_so(shapes, demo_config):
    small = {"memory_gib": 1e-4}
    with pytest.raises(
        RuntimeError, match=r"does not fit into the GPUs: 0\.0 GiB of weights for GPU 0"
    ):
        vqa.spread_over_gpus(shapes, demo_config, 2, [small, T4])


def test_the_35b_in_4_bits_fits_onto_two_t4s(demo_config, replace):
    """transformers' own map put layers of it on the CPU."""
    token = {"image_token_id": 1, "vision_start_token_id": 2, "vision_end_token_id": 3}
    with torch.device("meta"):
        config = new_models.qwen35_35b_a3b(token)
        shapes = transformers.AutoModelForImageTextToText.from_config(config)
    places = vqa.spread_over_gpus(shapes, replace(demo_config, quantization="4bit"), 2, [T4, T4])
    layers = [place for place in places if ".layers." in place]
    on_the_first = [places[layer] for layer in layers].count(0)
    assert on_the_first == pytest.approx(len(layers) / 2, abs=2)
