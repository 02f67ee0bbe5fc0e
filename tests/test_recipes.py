"""Which quantizers a recipe places, and that all else follows from it."""

import copy
from dataclasses import replace

import pytest
import torch
from families import build
from rescaling import rescale
from timm.data import resolve_model_data_config

from models.saved import load_quantized, save_quantized
from models.zoo import build_model
from quant import activation_ranges, calibrate, convert, quantize_model, quantizer_bits
from quant.integers import integer_state, load_integer_state
from quant.modules import named_activations, quantized_weights
from quant.parts import add_parts
from quant.recipes import BEST, INPUTS, PAPER, Recipe

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
BLOCK = (
    "norm1.act_output attn.act_query attn.act_key attn.act_probs attn.act_value attn.act_context norm2.act_output "
    "mlp.act_hidden"
)


def test_inputs_of_products_are_all_that_is_placed_in_a_vit(vit):
    expected = {f"blocks.{i}.{name}" for i in range(2) for name in BLOCK.split()} | {"act_input", "act_pooled"}
    assert set(activation_ranges(calibrate(quantize_model(vit, recipe=INPUTS), IMAGES))) == expected


def test_inputs_of_products_are_all_that_is_placed_in_a_swin(swin):
    blocks = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]
    expected = {f"{prefix}.{name}" for prefix in blocks for name in BLOCK.split()}
    expected |= {"act_input", "layers.1.downsample.norm.act_output", "act_pooled"}
    assert set(activation_ranges(calibrate(quantize_model(swin, recipe=INPUTS), IMAGES))) == expected


@pytest.mark.parametrize("family", ["post-norm", "swin v2", "eva, post-norm"])
def test_norms_that_only_add_to_the_stream_are_left_in_float(family):
    bits = quantizer_bits(quantize_model(build(family), recipe=INPUTS))
    assert not [name for name in bits if name.endswith(("norm1.act_output", "norm2.act_output"))]
    assert any(name.endswith("act_attn_input") for name in bits)
    paper = quantizer_bits(quantize_model(build(family), recipe=PAPER))
    assert [name for name in paper if name.endswith(("norm1.act_output", "norm2.act_output"))]


@torch.no_grad()
def test_ranges_are_those_of_stretched_images(vit):
    grey, recipe = IMAGES.clamp(-0.1, 0.1), replace(INPUTS, stretch=True)
    model = calibrate(quantize_model(vit, recipe=recipe), grey)
    config = resolve_model_data_config(vit)
    low, high = activation_ranges(model)["act_input"]
    whole = [(bound - m) / s for bound in (0, 1) for m, s in zip(config["mean"], config["std"], strict=True)]
    assert min(whole) - 1e-4 <= low < -0.9 and 0.9 < high <= max(whole) + 1e-4


@torch.no_grad()
def test_shaded_images_calibrate_beside_what_they_were(vit):
    ranges = {}
    for recipe in (INPUTS, replace(INPUTS, shade=True)):
        model = calibrate(quantize_model(copy.deepcopy(vit), recipe=recipe), IMAGES.clamp(-0.1, 0.1))
        ranges[recipe.shade] = activation_ranges(model)["act_input"]
    assert ranges[True][0] < -1 < ranges[False][0] and ranges[True][1] > 1 > ranges[False][1]


@torch.no_grad()
def test_parts_are_seen_by_compensation_and_by_no_range(model, monkeypatch):
    seen, forward = [], convert.forward
    monkeypatch.setattr(
        convert, "forward", lambda model, images, size: seen.append(images) or forward(model, images, size)
    )
    recipe, models = replace(INPUTS, compensate=True), {}
    for enlarge in (False, True):
        models[enlarge] = quantize_model(copy.deepcopy(model), 4, 4, recipe=replace(recipe, enlarge=enlarge))
        calibrate(models[enlarge], IMAGES)
    whole, enlarged = models[False], models[True]
    for images, expected in zip(seen, (IMAGES, IMAGES, IMAGES, add_parts(IMAGES)), strict=True):
        assert torch.equal(images, expected)
    assert activation_ranges(enlarged) == activation_ranges(whole)
    weights = zip(quantized_weights(enlarged), quantized_weights(whole), strict=True)
    assert any(not torch.equal(layer.weight, other.weight) for (_, layer), (_, other) in weights)


@pytest.mark.parametrize("helps", [True, False])
@torch.no_grad()
def test_a_model_is_rotated_where_that_brings_the_logits_nearer(monkeypatch, helps):
    plain, outliers = build_model("demo_vit"), rescale(build_model("demo_vit"))
    model, rotated = (outliers, plain) if helps else (plain, outliers)
    gain, weights = plain.blocks[0].norm1.weight.clone(), copy.deepcopy(rotated.state_dict())
    monkeypatch.setattr("quant.convert.rotate", lambda model: model.load_state_dict(weights))
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    calibrate(quantize_model(model, 4, 6, recipe=replace(INPUTS, rotate=True)), images)
    assert torch.equal(model.blocks[0].norm1.weight, gain)
    assert model.notes[-1].startswith("rotated" if helps else "not rotated")


def test_the_paper_is_the_default(model):
    logits = [calibrate(quantize_model(copy.deepcopy(model), 4, 4, **recipe), IMAGES)(IMAGES)
              for recipe in ({}, {"recipe": PAPER})]  # fmt: skip
    assert torch.equal(*logits)


def test_ends_have_eight_bits_at_least(model):
    bits = quantizer_bits(quantize_model(model, 4, 3, recipe=INPUTS))
    head = "head.weight" if "head.weight" in bits else "head.fc.weight"
    ends = {"act_input", "patch_embed.proj.weight", "act_pooled", head}
    assert {name for name, value in bits.items() if value == 8} == ends
    assert {value for name, value in bits.items() if name not in ends} == {3, 4}


def test_ends_stay_float_where_all_else_does(vit):
    assert set(quantizer_bits(quantize_model(vit, 16, 16, recipe=INPUTS)).values()) == {16}


@torch.no_grad()
@pytest.mark.parametrize("recipe", [INPUTS, Recipe("probs", ("*.act_probs",))], ids=lambda recipe: recipe.name)
def test_any_placement_is_the_float_model_until_calibrated(model, recipe):
    expected = model(IMAGES)
    quantize_model(model, 16, 4, recipe=recipe)
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-4)
    calibrate(model, IMAGES)
    assert not torch.allclose(model(IMAGES), expected, rtol=1e-3, atol=1e-3)


def test_a_quantized_softmax_still_has_a_gradient(model):
    """Its backward pass reads its output, which must not have been overwritten."""
    calibrate(quantize_model(model, recipe=INPUTS), IMAGES)
    model(IMAGES).sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("recipe", [INPUTS, BEST, PAPER.without_zero_points()], ids=lambda recipe: recipe.name)
def test_integers_are_loaded_bit_for_bit(model, recipe):
    saved = calibrate(quantize_model(copy.deepcopy(model), 4, 6, recipe=recipe), IMAGES)
    loaded = load_integer_state(quantize_model(model, 4, 6, recipe=recipe), integer_state(saved))
    assert torch.equal(loaded(IMAGES), saved(IMAGES))


@torch.no_grad()
def test_symmetric_activations_have_no_zero_point(model):
    calibrate(quantize_model(model, 8, 4, recipe=BEST.without_zero_points()), IMAGES)
    for name, act in named_activations(model):
        assert act.zero_point == 0 and act.grid == (-(2 ** (act.bits - 1)), 2 ** (act.bits - 1) - 1), name


@torch.no_grad()
def test_what_meets_another_activation_has_no_zero_point(model):
    calibrate(quantize_model(model, 8, 8, recipe=BEST), IMAGES)
    acts = dict(named_activations(model))
    products = [name for name in acts if name.endswith(("act_query", "act_key", "act_probs", "act_value"))]
    assert products and all(acts[name].zero_point == 0 for name in products)
    assert any(act.zero_point != 0 for act in acts.values())


@torch.no_grad()
@pytest.mark.parametrize("name", ["demo_vit", "demo_swin"])
def test_a_file_knows_what_was_placed(tmp_path, name):
    images = torch.randn(4, 3, 64, 64)
    recipe = INPUTS.without_zero_points()
    saved = calibrate(quantize_model(build_model(name), 4, 6, ["*.act_probs"], recipe), images)
    save_quantized(tmp_path / "m.safetensors", saved, name)
    loaded, header = load_quantized(tmp_path / "m.safetensors")
    assert header["bits"] == quantizer_bits(saved) == quantizer_bits(loaded) and loaded.recipe == recipe
    assert torch.equal(loaded(images), saved(images))
