"""Bias correction: afterwards every layer's mean output is what it was."""

import copy

import torch

from quant.correction import channel_means, correct_biases, output_means


@torch.no_grad()
def test_every_layer_has_its_mean_again_although_those_before_it_were_moved():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2, 2), torch.nn.Flatten(2), torch.nn.GELU(),
                                torch.nn.Linear(16, 6), torch.nn.Linear(6, 2, bias=False))  # fmt: skip
    x, layers = torch.randn(5, 3, 8, 8), {"conv": model[0], "linear": model[3], "without bias": model[4]}
    means = output_means(layers, lambda: model(x))
    assert set(means) == {"conv", "linear"}
    moved = copy.deepcopy(model)
    layers = {"conv": moved[0], "linear": moved[3], "without bias": moved[4]}
    for layer in layers.values():
        layer.weight.mul_(1.3)
    correct_biases(layers, means, lambda: moved(x))
    again = output_means(layers, lambda: moved(x))
    for name, mean in means.items():
        torch.testing.assert_close(again[name], mean, rtol=1e-4, atol=1e-5)
    assert not moved[0]._forward_hooks


def test_means_are_of_channels():
    linear, conv = torch.nn.Linear(4, 3), torch.nn.Conv2d(3, 5, 2, 2)
    y, z = torch.randn(2, 7, 3), torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(channel_means(linear, y), y.view(-1, 3).mean(0))
    torch.testing.assert_close(channel_means(conv, z), torch.stack([z[:, c].mean() for c in range(5)]))
