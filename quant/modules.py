"""Quantized layers: a float layer of torch, plus a weight on a grid, plus a quantizer for its output.

A layer becomes quantized by changing its class, so parameters, their names and timm's model stay what they are.
What is not the output of a layer (sums, attention scores, ...) has a quantizer in quant/vit.py and quant/swin.py.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.layers import RmsNorm
from torch import Tensor, nn

from quant.quantizers import (
    FLOAT_BITS,
    asymmetric_scale,
    fake_quantize_,
    quantize_weight,
    signed_grid,
    symmetric_activation_scale,
    unsigned_grid,
)
from quant.rounding import round_weight, search_weight_scale


class QuantAct(nn.Module):
    """Per-tensor quantizer of one activation, asymmetric unless `symmetric` says otherwise.

    Passes values through until it is calibrated: `observe` widens the range by what it sees, `freeze` fixes scale and
    zero point. Uncalibrated means that `scale` is None. With 16 bits it stays float, and only records its range.

    It overwrites what it is given, as nearly all of that is a layer's fresh output: a new tensor of this size would
    cost more than the rounding. What is somebody else's, such as a parameter, is to be cloned first.
    """

    kernel = staticmethod(fake_quantize_)  # or, while a model learns, the one of quant.learning

    def __init__(self, bits: int, symmetric: bool = False) -> None:
        super().__init__()
        self.bits = bits
        self.symmetric = symmetric
        self.observing = False
        for name in ("low", "high", "scale", "zero_point"):  # not persistent: a state dict keeps its float names
            self.register_buffer(name, None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            self.observe(x)
        if self.scale is None:
            return x
        x = x.contiguous()  # what is a view, as queries are of qkv, is faster copied than passed over with strides
        if x.requires_grad and torch.is_grad_enabled():
            x = x.clone()  # autograd may keep what the layer gave, as it does of softmax
        return self.kernel(x, self.scale, self.zero_point, self.grid)

    @property
    def grid(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        return signed_grid(self.bits) if self.symmetric else unsigned_grid(self.bits)

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for a range."""
        return (symmetric_activation_scale if self.symmetric else asymmetric_scale)(low, high, self.bits)

    def observe(self, x: Tensor) -> None:
        low, high = x.detach().float().aminmax()
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def freeze(self) -> None:
        if self.bits != FLOAT_BITS:
            self.scale, self.zero_point = self.fit(self.low, self.high)

    def extra_repr(self) -> str:
        return f"bits={self.bits}" + ("" if self.scale is None else f", scale={self.scale:.4g}")


class NoAct(nn.Identity):
    """In the place of a quantizer that a recipe leaves out."""


class QuantizedOutput(nn.Module):
    """Mixin: the layer's own forward, then `act_output`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act_output(super().forward(x))


class QuantizedWeight(QuantizedOutput):
    """Mixin: on `freeze`, the weight is replaced by values on the grid, once. Biases stay float."""

    def freeze(self, moment: Tensor | None = None) -> None:
        """Round to the nearest; or with compensation, for inputs of this second moment, (in, in)."""
        if self.w_bit == FLOAT_BITS:
            return
        weight = self.weight.data
        if moment is None:
            self.weight.data, self.weight_scale = quantize_weight(weight, self.w_bit)
        else:
            scale = search_weight_scale(weight.flatten(1), self.w_bit, moment.diagonal())
            self.weight.data = round_weight(weight.flatten(1), scale, moment, self.w_bit).view(weight.shape)
            self.weight_scale = scale.view(-1, *[1] * (weight.ndim - 1))


class QuantLinear(QuantizedWeight, nn.Linear):
    """Linear layer with symmetric per-channel weights. Its bias may be kept by the module that it is in."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is None:
            return super().forward(x)
        return self.act_output(F.linear(x, self.weight, bias))


class QuantConv2d(QuantizedWeight, nn.Conv2d):
    """Convolution (the patch embedding) with symmetric per-channel weights."""


class QuantLayerNorm(QuantizedOutput, nn.LayerNorm):
    """Layer norm computed in float; only its output is quantized."""


class QuantRmsNorm(QuantizedOutput, RmsNorm):
    """Root mean square norm computed in float; only its output is quantized."""


def named_activations(model: nn.Module) -> Iterator[tuple[str, QuantAct]]:
    """Every activation quantizer with its name, in the order of the modules."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantAct))


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, QuantizedWeight]]:
    """The layers whose weights are not left in float, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight) and module.w_bit != FLOAT_BITS:
            yield name, module
