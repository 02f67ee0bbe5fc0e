"""A model's own operators while images are generated: as matrix products, where these are faster."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from quant.families import ATTENTION
from utils.run.precision import model_weights


@contextmanager
def fast_products(model: nn.Module, precision: str) -> Iterator[None]:
    """Within the context the model computes the same, faster: for steps that change the images and not the weights."""
    # In bfloat16 a CPU's fused attention has a backward pass that is slow
    slow = precision == "bf16" and next(model.parameters()).device.type == "cpu"
    attention = attention_by_products(model) if slow else nullcontext()
    with patches_by_products(model), attention, model_weights(model, precision):
        yield


@contextmanager
def attention_by_products(model: nn.Module) -> Iterator[None]:
    """Within the context attention is computed as two matrix products and a softmax, not as one fused operator."""
    layers = [module for module in model.modules() if isinstance(module, ATTENTION)]
    fused = [layer for layer in layers if getattr(layer, "fused_attn", False)]  # Swin V2 has no other way
    try:
        for layer in fused:
            layer.fused_attn = False
        yield
    finally:
        for layer in fused:
            layer.fused_attn = True


@contextmanager
def patches_by_products(model: nn.Module) -> Iterator[None]:
    """Within the context patches are embedded by one matrix product, not by a convolution.

    The gradient for the image takes a CPU's convolution three times as long, and is the same but for the order of sums.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and splits(layer)]
    try:
        for layer in layers:
            layer.forward = partial(embed_patches, layer)
        yield
    finally:
        for layer in layers:
            del layer.forward


def splits(layer: nn.Conv2d) -> bool:
    """Whether a convolution reads every pixel once."""
    plain = (layer.padding, layer.dilation, layer.groups) == ((0, 0), (1, 1), 1)
    return plain and layer.kernel_size == layer.stride


def embed_patches(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """What the convolution gives for images (B, C, H, W): (B, D, rows, columns) of patches, those that are whole."""
    height, width = layer.kernel_size
    rows, columns = images.shape[2] // height, images.shape[3] // width
    whole = images[..., : rows * height, : columns * width]
    patches = whole.unflatten(3, (columns, width)).unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5)
    tokens = F.linear(patches.flatten(3).flatten(1, 2), layer.weight.flatten(1), layer.bias)  # (B, N, D)
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))
