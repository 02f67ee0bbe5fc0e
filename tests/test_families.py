"""Every family passes the same guards: here with all of them at once, as building and running take their time."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import randomize
from families import FAMILIES, ROW, build
from timm.layers import SwiGLU
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from generate_data import GenerationSettings, generate_data
from quant import calibrate, quantize_model
from quant.integers import integer_state, load_integer_state
from quant.modules import QuantizedWeight, named_activations
from quant.recipes import BEST, PAPER
from quant.streams import obstacle, rotate
from utils.attention import attention_outputs

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
UNSHADED = replace(BEST, shade=False)  # the images are noise, and what is compared are their own logits
ROTATED = ("vit", "distilled", "vit without positions", "vit of any size", "dinov2", "swin", "relative positions")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_float_until_calibrated_and_then_the_same_from_its_integers(family):
    model = build(family)
    expected, names = model(IMAGES), list(model.state_dict())
    errors = {}
    for recipe, bits in ((PAPER, 8), (PAPER, 4), (UNSHADED, 4)):
        quantized = quantize_model(copy.deepcopy(model), bits, bits, recipe=recipe)
        torch.testing.assert_close(quantized(IMAGES), expected, rtol=1e-4, atol=1e-4)
        other = copy.deepcopy(quantized)
        calibrate(quantized, IMAGES)
        assert list(quantized.state_dict()) == names
        before = [tensor.clone() for tensor in (IMAGES, *quantized.state_dict().values())]
        logits = quantized(IMAGES)
        assert all(map(torch.equal, before, (IMAGES, *quantized.state_dict().values())))  # nothing is overwritten
        assert torch.equal(load_integer_state(other, integer_state(quantized))(IMAGES), logits)
        errors[recipe.name, bits] = (logits - expected).square().mean().sqrt() / expected.std()
    assert 0 < errors["paper", 8] < errors["paper", 4] / 2 and 0 < errors["best", 4] < errors["paper", 4]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_quantized_or_depends_on_no_image(family):
    model = quantize_model(build(family))
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            assert isinstance(layer, QuantizedWeight) != ("cpb_mlp" in name or "rel_pos" in name), name
    assert sum(1 for _ in named_activations(model)) > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_only_streams_that_can_be_are_rotated(family):
    model = build(family)
    assert (obstacle(model) is None) == (family in ROTATED)
    quantize_model(model, recipe=BEST)
    assert bool(getattr(model, "notes", [])) == (family not in ROTATED)


@pytest.mark.parametrize("family", ["siglip", "swin v2", "beit", "eva-02", "dinov3", "shared keys", "parallel"])
def test_images_are_generated(family):
    model = build(family)
    with torch.no_grad(), attention_outputs(model) as outputs:
        model(IMAGES)
    assert len(outputs) == {"swin v2": 4, "parallel": 4}.get(family, 2) and all(x.ndim == 4 for x in outputs)
    losses = []
    images = generate_data(model, 2, settings=GenerationSettings(steps=3), progress=False, losses=losses)
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all() and len(losses) == 6
    assert (losses[0][1] == 0) == (model.num_classes == 0)  # L_OH


@pytest.mark.parametrize(
    "options",
    [
        {"mlp_layer": SwiGLU},
        {"norm_layer": partial(nn.LayerNorm, bias=False)},
        {"final_norm": False},
        {"embed_norm_layer": nn.LayerNorm},
        {"global_pool": "max"},
        {"global_pool": "avgmax"},
    ],
    ids=lambda options: next(iter(options)),
)
@torch.no_grad()
def test_best_changes_no_float_logit_of_unusual_vits(options):
    torch.manual_seed(0)
    model = randomize(VisionTransformer(**ROW | options))
    images = torch.randn(4, 3, 32, 32)
    expected = model(images)
    quantize_model(model, 4, 8, recipe=BEST)
    if not obstacle(model):
        rotate(model)
    torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)
    calibrate(model, images)


@torch.no_grad()
def test_best_takes_a_swin_of_one_stage():
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 24}
    model = randomize(SwinTransformer(**size, depths=(2,), num_heads=(2,)))
    images = torch.randn(4, 3, 32, 32)
    expected = model(images)
    quantize_model(model, 16, 16, recipe=BEST)
    torch.testing.assert_close(calibrate(model, images)(images), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_no_position_bias_of_swin_v2_is_clipped():
    model, images = build("swin v2"), torch.randn(8, 3, 32, 32)
    calibrate(quantize_model(model, 16, 8), images)
    for name, act in named_activations(model):
        if name.endswith("act_computed_bias"):
            low, high = ((end - act.zero_point) * act.scale for end in act.grid)
            assert low - act.scale <= act.low and act.high <= high + act.scale


@torch.no_grad()
def test_a_bias_of_all_scores_that_is_far_from_zero_costs_nothing():
    errors = []
    for shift in (0, 20):
        model = build("relative positions, post-norm")
        for block in model.blocks:
            block.attn.rel_pos.relative_position_bias_table += shift
        expected = model(IMAGES)
        errors.append((calibrate(quantize_model(model), IMAGES)(IMAGES) - expected).square().mean().sqrt())
    assert errors[1] < 1.5 * errors[0]
