"""Rotations that are folded into the weights: the same function, with no channel larger than the others.

A few channels of a trained transformer are far larger than the rest and take the range of a whole tensor. In another
basis their size is shared by all. Two places have a basis that can be chosen freely:

- the residual stream, between the layers that write to it and those that read it. Layer norm stands before the
  readers: with its affine part folded into them, it commutes with every orthogonal Q that keeps the mean, Q 1 = 1;
- queries and keys of one head, of which only products are used; values of one head, of which the projection is linear.

Here is what is done to a layer; quant/streams.py knows which layers those are. The idea of rotating before quantizing
is QuaRot's (Ashkboos et al., NeurIPS 2024, section 4), for language models; to keep the ones vector, so that layer norm
needs no change, is ours. All products are computed in float64.
"""

from collections.abc import Sequence

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

_SMALLEST_GAIN = 1e-6  # of a norm's channel that is divided by


def mean_keeping_rotation(width: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix Q, (width, width) float64, with Q 1 = 1."""
    axis = torch.ones(width, dtype=torch.float64) / width**0.5
    axis[0] += 1  # the reflection between the ones vector and the first axis, as 1 - 2 v v^T
    axis /= axis.norm()
    reflection = torch.eye(width, dtype=torch.float64) - 2 * torch.outer(axis, axis)
    inner = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), random_rotation(width - 1, seed))
    return reflection @ inner @ reflection


def random_rotation(width: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix, (width, width) float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))[0]


@torch.no_grad()
def rotate_heads(attention: nn.Module) -> None:
    """Rotate queries and keys by one matrix, values and the projection's input by another, the same for all heads."""
    heads, width = attention.num_heads, attention.qkv.out_features // (3 * attention.num_heads)
    score, value = (torch.block_diag(*[random_rotation(width, seed)] * heads) for seed in (1, 2))
    rotate_output(attention.qkv, torch.block_diag(score, score, value))
    rotate_input(attention.proj, value)


@torch.no_grad()
def rotate_output(layer: nn.Linear | nn.Conv2d, rotation: Tensor) -> None:
    """Let a layer give rotation @ y for y."""
    rotation = rotation.to(layer.weight.device)
    layer.weight.copy_((rotation @ layer.weight.double().flatten(1)).view(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(rotation @ layer.bias.double())


@torch.no_grad()
def rotate_input(layer: nn.Linear, rotation: Tensor) -> None:
    """Let a layer read rotation @ x for x."""
    layer.weight.copy_(layer.weight.double() @ rotation.T.to(layer.weight.device))


def keeps_shift(readers: Sequence[nn.Linear], padded: bool) -> bool:
    """Whether a norm's shift cannot become a bias: a reader has none, or gets zeros, too, `padded` to the output."""
    return padded or any(layer.bias is None for layer in readers)


@torch.no_grad()
def fold_norm(norm: nn.LayerNorm, readers: Sequence[nn.Linear], padded: bool = False) -> None:
    """Move a layer norm's affine part into the layers that read it; see `keeps_shift` for what stays."""
    gain, shift = norm.weight.double(), norm.bias.double()
    if keeps_shift(readers, padded):
        gain = torch.where(gain.abs() < _SMALLEST_GAIN, _SMALLEST_GAIN, gain)
        norm.bias.copy_(shift / gain)
    else:
        for layer in readers:
            layer.bias.add_(layer.weight.double() @ shift)
        norm.bias.zero_()
    for layer in readers:
        layer.weight.copy_(layer.weight.double() * gain)
    norm.weight.fill_(1)


@torch.no_grad()
def fold_layer_scale(layer: nn.Linear, scale: nn.Module) -> None:
    """Move a layer scale, if there is one, into the layer before it."""
    if isinstance(scale, LayerScale):
        layer.weight.mul_(scale.gamma[:, None])
        if layer.bias is not None:
            layer.bias.mul_(scale.gamma)
        scale.gamma.fill_(1)


@torch.no_grad()
def rotate_reading(norm: nn.LayerNorm, readers: Sequence[nn.Linear], rotation: Tensor, padded: bool = False) -> None:
    """Let the layers that read a layer norm read the same of an input that is rotated by a Q that keeps the mean."""
    fold_norm(norm, readers, padded)
    norm.bias.copy_(rotation @ norm.bias.double())
    for layer in readers:
        rotate_input(layer, rotation)
