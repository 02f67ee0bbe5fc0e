"""Recipes on a model with outliers that it did not have before, although it is the same function."""

import copy
from dataclasses import replace

import pytest
import torch
from rescaling import rescale, shift_tokens
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from models.zoo import build_model
from quant import calibrate, quantize_model
from quant.balance import balance
from quant.contrast import stretch
from quant.recipes import BEST, INPUTS, PAPER

SMOOTH = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)).cumsum(2).cumsum(3)
IMAGES = stretch(SMOOTH, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)  # within the range of pixels


def error(model, logits, recipe):
    quantized = calibrate(quantize_model(copy.deepcopy(model), 6, 6, recipe=recipe), IMAGES)
    return ((quantized(IMAGES) - logits).square().mean() / logits.var()).sqrt().item()


@torch.no_grad()
@pytest.mark.parametrize("name", ["demo_vit", "demo_swin"])
def test_outliers_break_the_paper_and_not_the_best_recipe(name):
    model = build_model(name)
    logits, plain = model(IMAGES), error(model, model(IMAGES), BEST)
    rescale(model)
    torch.testing.assert_close(model(IMAGES), logits, rtol=1e-3, atol=1e-3)
    paper, inputs, best = (error(model, logits, recipe) for recipe in (PAPER, INPUTS, BEST))
    assert paper > 4 * best and inputs > 2 * best and best < 1.5 * plain


@torch.no_grad()
def test_tokens_that_stand_out_break_the_paper_and_not_the_placement_on_inputs():
    model = build_model("demo_vit")
    logits = model(IMAGES)
    unrotated = replace(BEST, rotate=False)  # a rotation is tried, and may be taken of one and not of the other
    plain = {recipe: error(model, logits, recipe) for recipe in (PAPER, INPUTS, unrotated)}
    shift_tokens(model, IMAGES)
    torch.testing.assert_close(model(IMAGES), logits, rtol=1e-3, atol=1e-3)
    assert error(model, logits, PAPER) > 2 * plain[PAPER]
    for recipe in (INPUTS, unrotated):
        assert error(model, logits, recipe) < 1.1 * plain[recipe]


@torch.no_grad()
@pytest.mark.parametrize("name", ["demo_vit", "demo_swin"])
def test_balance_is_the_same_function_and_undoes_every_rescaling(name):
    model = build_model(name)
    logits, scaled = model(IMAGES), rescale(copy.deepcopy(model))
    balance(model), balance(scaled)
    torch.testing.assert_close(model(IMAGES), logits, rtol=1e-3, atol=1e-4)
    for (key, before), after in zip(model.state_dict().items(), scaled.state_dict().values(), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-5, msg=key)


@torch.no_grad()
def test_channels_of_nothing_are_left(vit):
    vit.blocks[0].norm1.weight[3] = 0
    vit.blocks[0].attn.proj.weight[:, 5] = 0
    logits = vit(IMAGES[:, :, :32, :32])
    balance(vit)
    torch.testing.assert_close(vit(IMAGES[:, :, :32, :32]), logits)
