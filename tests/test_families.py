"""Every family passes the same guards, with every recipe."""

import copy

import pytest
import torch
from families import FAMILIES, build
from torch import nn

from quant import calibrate, check_supported, quantize_model, quantizer_bits
from quant.integers import integer_state, load_integer_state
from quant.modules import QuantizedWeight
from quant.recipes import INPUTS, PAPER

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
RECIPES = {recipe.name: recipe for recipe in (PAPER, INPUTS)}


@pytest.fixture(params=FAMILIES)
def model(request):
    return build(request.param)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@torch.no_grad()
def test_float_until_calibrated_then_further_off_with_fewer_bits(model, recipe):
    expected, names, errors = model(IMAGES), list(model.state_dict()), []
    for bits in (8, 4):
        quantized = quantize_model(copy.deepcopy(model), bits, bits, recipe=recipe)
        torch.testing.assert_close(quantized(IMAGES), expected, rtol=1e-4, atol=1e-4)
        calibrate(quantized, IMAGES)
        assert list(quantized.state_dict()) == names
        errors.append((quantized(IMAGES) - expected).square().mean().sqrt() / expected.std())
    assert 0 < errors[0] < errors[1] / 2


@torch.no_grad()
def test_neither_images_nor_parameters_are_overwritten(model):
    calibrate(quantize_model(model), IMAGES)
    before = [tensor.clone() for tensor in (IMAGES, *model.state_dict().values())]
    logits = model(IMAGES)
    assert all(map(torch.equal, before, (IMAGES, *model.state_dict().values())))
    assert torch.equal(model(IMAGES), logits)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@torch.no_grad()
def test_the_same_model_comes_back_from_its_integers(model, recipe):
    other = quantize_model(copy.deepcopy(model), 4, 6, recipe=recipe)
    calibrate(quantize_model(model, 4, 6, recipe=recipe), IMAGES)
    load_integer_state(other, integer_state(model))
    assert torch.equal(other(IMAGES), model(IMAGES))


@torch.no_grad()
def test_every_layer_is_quantized_and_every_quantizer_is_met(model):
    weightless = [name for name, _ in model.named_modules() if "cpb_mlp" in name]
    calibrate(quantize_model(model, recipe=PAPER), IMAGES)  # which refuses none, but leaves a range out
    assert all(act.low is not None for act in model.modules() if hasattr(act, "observing"))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert all(isinstance(layer, QuantizedWeight) for name, layer in layers.items() if name not in weightless)
    assert len(quantizer_bits(model)) > 2 * len(layers) - len(weightless) - 10


def test_the_original_is_supported_and_the_swapped_one_not_again(model):
    check_supported(model)
    quantize_model(model)
    with pytest.raises(TypeError):
        quantize_model(model)
