"""Biases of keys and values: gone, and the function is the same."""

import pytest
import torch
from conftest import randomize

from quant import calibrate, quantize_model
from quant.biases import fold_biases
from quant.recipes import BEST

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def biases(model):
    """Those of queries, keys and values of every attention."""
    return [attention.qkv.bias.chunk(3) for attention in model.modules() if hasattr(attention, "qkv")]


@torch.no_grad()
def test_keys_and_values_without_biases_are_the_same_function(model):
    randomize(model)
    expected, queries = model(IMAGES), [query.clone() for query, _, _ in biases(model)]
    assert all(key.any() and value.any() for _, key, value in biases(model))
    fold_biases(model)
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-5)
    for before, (query, key, value) in zip(queries, biases(model), strict=True):
        assert torch.equal(query, before) and not key.any() and not value.any()


@pytest.mark.parametrize("part", ["qkv", "proj"])
@torch.no_grad()
def test_what_has_no_bias_stays(vit, part):
    randomize(vit)
    for block in vit.blocks:
        getattr(block.attn, part).bias = None
    expected = vit(IMAGES)
    fold_biases(vit)
    assert torch.equal(vit(IMAGES), expected)


@torch.no_grad()
def test_none_is_left_after_calibration_whether_rotated_or_not(model):
    calibrate(quantize_model(randomize(model), 4, 4, recipe=BEST), IMAGES)
    assert all(query.any() and not key.any() and not value.any() for query, key, value in biases(model))
