"""Rounding with compensation against a naive transcription, and what it is for: a smaller error of the output."""

import pytest
import torch

from quant.quantizers import fake_quantize_, signed_grid, symmetric_scale
from quant.rounding import DAMPING, as_rows, input_moments, inverse_factor, round_weight, search_weight_scale


def layer(inputs=40, outputs=6, rows=200):
    torch.manual_seed(0)
    x = torch.randn(rows, inputs) @ torch.randn(inputs, inputs)  # inputs that depend on one another
    return torch.randn(outputs, inputs), x, x.T @ x


def output_error(x, weight, rounded):
    return (x @ (rounded - weight).T).square().sum().item()


def naive(weight, scale, moment, bits):
    """One column at a time, with the inverse of what is left computed anew for each."""
    weight, moment = weight.double().clone(), moment.double()
    moment = moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    left = moment.diagonal().argsort(descending=True).tolist()
    while left:
        inverse = torch.linalg.inv(moment[left][:, left])
        column = left[0]
        rounded = fake_quantize_(weight[:, column, None].float(), scale, 0.0, signed_grid(bits))[:, 0]
        error = (weight[:, column] - rounded) / inverse[0, 0]
        weight[:, left] -= torch.outer(error, inverse[0])
        weight[:, column] = rounded.double()
        left = left[1:]
    return weight.float()


@pytest.mark.parametrize("inputs", [40, 150], ids=["one block", "two blocks"])
def test_equals_the_naive_transcription(inputs):
    weight, _, moment = layer(inputs)
    scale = symmetric_scale(weight, 4)
    torch.testing.assert_close(round_weight(weight, scale, moment, 4), naive(weight, scale, moment, 4))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_output_is_nearer_than_with_the_nearest_weights(bits):
    weight, x, moment = layer()
    scale = symmetric_scale(weight, bits)
    nearest = fake_quantize_(weight.clone(), scale, 0.0, signed_grid(bits))
    rounded = round_weight(weight, scale, moment, bits)
    assert output_error(x, weight, rounded) < 0.7 * output_error(x, weight, nearest)
    codes = rounded / scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.min() >= signed_grid(bits)[0] - 1e-4 and codes.max() <= signed_grid(bits)[1] + 1e-4


def test_independent_inputs_are_rounded_to_the_nearest():
    weight = torch.randn(6, 40)
    scale = symmetric_scale(weight, 4)
    nearest = fake_quantize_(weight.clone(), scale, 0.0, signed_grid(4))
    assert torch.equal(round_weight(weight, scale, torch.eye(40), 4), nearest)


@pytest.mark.parametrize("moment", [torch.zeros(5, 5), torch.ones(5, 5)], ids=["zero", "one direction"])
def test_moments_of_any_rank_have_a_factor(moment):
    assert inverse_factor(moment).isfinite().all()


def test_a_searched_scale_is_the_best_of_its_channel():
    weight, x, moment = layer()
    weight[0, 0] = 20  # an outlier, of which clipping is cheaper than the coarse grid of the others
    importance = moment.diagonal() / len(x)
    importance[0] = 0.01
    scale = search_weight_scale(weight, 4, importance)
    largest = symmetric_scale(weight, 4)
    cost = [(fake_quantize_(weight.clone(), largest * f / 100, 0.0, signed_grid(4)) - weight).square()
            @ importance for f in range(100, 48, -2)]  # fmt: skip
    found = (fake_quantize_(weight.clone(), scale, 0.0, signed_grid(4)) - weight).square() @ importance
    torch.testing.assert_close(found, torch.stack(cost).amin(0), rtol=1e-3, atol=1e-5)
    assert scale[0] < 0.6 * symmetric_scale(weight, 4)[0]


def test_rows_of_a_convolution_are_what_its_weight_multiplies():
    conv, x = torch.nn.Conv2d(3, 5, 4, 4), torch.randn(2, 3, 8, 8)
    rows = as_rows(conv, x)
    expected = conv(x).flatten(2).transpose(1, 2).reshape(-1, 5)
    torch.testing.assert_close(rows @ conv.weight.flatten(1).T + conv.bias, expected, rtol=1e-4, atol=1e-5)


def test_moments_sum_over_batches():
    linear, x = torch.nn.Linear(4, 3), torch.randn(6, 5, 4)
    moments = input_moments({"a": linear}, lambda: [linear(batch) for batch in x.split(4)])
    torch.testing.assert_close(moments["a"], x.flatten(0, 1).T @ x.flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert not linear._forward_pre_hooks
