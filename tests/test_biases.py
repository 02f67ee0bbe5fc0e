"""Biases of keys: gone, and the function is the same."""

import torch
from conftest import randomize

from quant import calibrate, quantize_model
from quant.biases import drop_key_biases
from quant.recipes import BEST

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def biases(model):
    """Those of queries, keys and values of every attention, copied."""
    return [attention.qkv.bias.clone().chunk(3) for attention in model.modules() if hasattr(attention, "qkv")]


@torch.no_grad()
def test_keys_without_biases_are_the_same_function(model):
    randomize(model)
    expected, before = model(IMAGES), biases(model)
    assert all(key.any() for _, key, _ in before)
    drop_key_biases(model)
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-5)
    for (query, _, value), (same_query, key, same_value) in zip(before, biases(model), strict=True):
        assert torch.equal(query, same_query) and torch.equal(value, same_value) and not key.any()


@torch.no_grad()
def test_none_is_left_after_calibration_whether_rotated_or_not(model):
    calibrate(quantize_model(randomize(model), 4, 4, recipe=BEST), IMAGES)
    assert all(query.any() and value.any() and not key.any() for query, key, value in biases(model))


@torch.no_grad()
def test_what_has_no_biases_stays(vit):
    for block in vit.blocks:
        block.attn.qkv.bias = None
    expected = vit(IMAGES)
    drop_key_biases(vit)
    assert torch.equal(vit(IMAGES), expected)
