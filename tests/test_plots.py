import copy

import pytest
import torch
from families import build

from quant import activation_ranges, calibrate, quantize_model
from utils.plots import plot_generation, plot_ranges, plot_sensitivity, signal_to_noise


def test_signal_to_noise_falls_with_the_bits(model):
    images, ratios = torch.randn(4, 3, 32, 32), []
    for bits in (8, 4):
        quantized = calibrate(quantize_model(copy.deepcopy(model), bits, bits), images)
        ratios.append(signal_to_noise(model, quantized, images))
    layers = [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    assert list(ratios[0]) == layers
    assert all(ratios[0][name] > ratios[1][name] for name in layers)
    assert not any(module._forward_hooks for module in model.modules())


def test_signal_to_noise_of_the_same_model_has_no_noise(vit):
    assert min(signal_to_noise(vit, copy.deepcopy(vit), torch.randn(2, 3, 32, 32)).values()) > 100


def test_pictures_are_written(tmp_path, model):
    pytest.importorskip("matplotlib")
    plot_generation(tmp_path / "a.png", torch.rand(9, 3), [-1.0, -2.0], [0.5, 0.2])
    ranges = activation_ranges(calibrate(quantize_model(model), torch.randn(2, 3, 32, 32)))
    plot_ranges(tmp_path / "b.png", {"generated": ranges, "noise": ranges})
    plot_sensitivity(tmp_path / "c.png", "title", {"a": 1.0, "b": 0.5})
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png", "c.png"}


def test_layers_whose_weights_are_read_but_not_called_are_left_out():
    model, images = build("beit, both biases"), torch.randn(4, 3, 32, 32)
    quantized = calibrate(quantize_model(copy.deepcopy(model)), images)
    ratios = signal_to_noise(model, quantized, images)
    assert "blocks.0.mlp.fc1" in ratios and "blocks.0.attn.qkv" not in ratios
