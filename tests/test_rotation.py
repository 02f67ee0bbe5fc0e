"""Rotations that are folded: orthogonal, and exact in float."""

import pytest
import torch

from quant.rotation import fold_norm, mean_keeping_rotation, random_rotation


@pytest.mark.parametrize("width", [2, 48, 97])
def test_rotations_are_orthogonal_and_one_keeps_the_mean(width):
    for rotation in (random_rotation(width), mean_keeping_rotation(width)):
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(width, dtype=torch.float64))
    ones = torch.ones(width, dtype=torch.float64)
    torch.testing.assert_close(mean_keeping_rotation(width) @ ones, ones)


def test_a_rotation_that_keeps_the_mean_commutes_with_layer_norm():
    x, rotation = torch.randn(5, 48, dtype=torch.float64), mean_keeping_rotation(48)
    norm = torch.nn.LayerNorm(48, elementwise_affine=False)
    torch.testing.assert_close(norm(x @ rotation.T), norm(x) @ rotation.T)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_norm_is_the_same_function(bias):
    torch.manual_seed(0)
    norm, layer, x = torch.nn.LayerNorm(16), torch.nn.Linear(16, 5, bias=bias), torch.randn(7, 16)
    norm.weight.normal_(), norm.bias.normal_()
    norm.weight[3] = 0  # nothing of the input passes, but the shift does
    expected = layer(norm(x))
    fold_norm(norm, [layer])
    torch.testing.assert_close(layer(norm(x)), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(norm.weight, torch.ones(16))
