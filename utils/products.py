"""A model's own operators, computed otherwise where that is faster; the results are the same but for the order of sums.

A CPU's product of float32 matrices is MKL's in torch. On an AMD processor MKL says nothing of AVX-512 (MKL_VERBOSE=1);
oneDNN, which torch has for bfloat16 and for convolutions, uses it there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.families import ATTENTION
from quant.modules import QuantLinear
from utils.run.precision import model_weights


@contextmanager
def fast_products(model: nn.Module, precision: str) -> Iterator[None]:
    """Within the context the model computes the same, faster: for steps that change the images and not the weights."""
    # In bfloat16 a CPU's fused attention has a backward pass that is slow, and products are oneDNN's as they are
    on_cpu, bf16 = next(model.parameters()).device.type == "cpu", precision == "bf16"
    attention = attention_by_products(model) if on_cpu and bf16 else nullcontext()
    linears = nullcontext() if bf16 else linears_by_onednn(model)
    with patches_by_products(model), linears, attention, model_weights(model, precision):
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
    with computed_by(embed_patches, [layer for layer in model.modules() if type(layer) is nn.Conv2d and splits(layer)]):
        yield


@contextmanager
def linears_by_onednn(model: nn.Module) -> Iterator[None]:
    """Within the context linear layers, quantized ones too, are oneDNN's where that is faster; weights get no gradient.

    On an AMD processor most products take 5 to 20 percent less time so, some of a Swin's half as long.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    layers = [layer for layer in model.modules() if type(layer) in (nn.Linear, QuantLinear)]
    with computed_by(apply_linear, layers if on_cpu and onednn_is_fast() else []):
        yield


@contextmanager
def computed_by(function: Callable, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context `function`, given the layer and its inputs, is what the layers do."""
    try:
        for layer in layers:
            layer.forward = partial(function, layer)
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


def onednn_is_fast() -> bool:
    """Whether oneDNN's float32 products are: on CPUs with AVX-512; with others it was not measured."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def apply_linear(layer: nn.Linear, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a linear layer, or a quantized one, gives for x (..., in): (..., out); `bias` in place of its own."""
    as_it_is = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    y = (F.linear if as_it_is else OneDnnLinear.apply)(x, layer.weight, layer.bias if bias is None else bias)
    return layer.act_output(y) if isinstance(layer, QuantLinear) else y


class OneDnnLinear(torch.autograd.Function):
    """x W^T + b, with a gradient for x (..., in) alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return onednn_product(grad, weight.t(), None), None, None


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b by the operator that torch.compile uses on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
