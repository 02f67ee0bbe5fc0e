"""Bias correction: quantization moves the mean of a layer's output, and the bias can move it back.

Layers are corrected in the order in which they run, each for what those before it still do to its input. Nagel et al.,
ICCV 2019, section 4.2, where the means come from batch norm; here they come from the calibration images.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def output_means(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Tensor]:
    """The mean output of each layer that has a bias: by name, (out,). `run` is one forward pass."""
    means: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, output: Tensor) -> None:
        means[name] = channel_means(layer, output)

    _run_with(layers, keep, run)
    return means


@torch.no_grad()
def correct_biases(layers: Mapping[str, nn.Module], means: Mapping[str, Tensor], run: Callable[[], object]) -> None:
    """Move each layer's bias until its output has the mean of that name, in one forward pass, which `run` is."""

    def correct(name: str, layer: nn.Module, output: Tensor) -> Tensor:
        change = means[name] - channel_means(layer, output)
        layer.bias.data += change
        return output + (change[:, None, None] if isinstance(layer, nn.Conv2d) else change)

    _run_with(layers, correct, run)


def channel_means(layer: nn.Module, output: Tensor) -> Tensor:
    """(out,), of a linear layer's (..., out) or a convolution's (B, out, H, W)."""
    return output.mean(dim=(0, 2, 3)) if isinstance(layer, nn.Conv2d) else output.flatten(0, -2).mean(dim=0)


def _run_with(layers: Mapping[str, nn.Module], action: Callable, run: Callable[[], object]) -> None:
    """Call `run` while `action` sees, and may replace, the output of each layer with a bias."""
    hooks = [
        layer.register_forward_hook(lambda layer, _, output, name=name: action(name, layer, output))
        for name, layer in layers.items()
        if layer.bias is not None
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
