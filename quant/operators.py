"""Quantized modules that compute with ONNX's two operators, QuantizeLinear and DequantizeLinear, instead of rounding.

Weights are integers. A runtime computes in integers what has DequantizeLinear before it: every product whose two
factors the recipe quantizes. Shapes are those of quant/vit.py and quant/swin.py.

What differs from the simulation: QuantizeLinear rounds before it adds the zero point, which moves a value that lies
half-way between two integers to the other one where the zero point is odd; and products are summed in another order.
"""

import copy

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from quant.integers import activation_codes, quantized_parameters, weight_codes
from quant.modules import NoAct, QuantAct, QuantConv2d, QuantizedWeight, QuantLinear
from quant.swin import QuantSwinTransformerBlock, QuantWindowAttention
from quant.vit import QuantAttention

NEXT_TO_NOTHING = 1e-30  # added to a float32 that is not zero it changes no bit


@torch.library.custom_op("psaq::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """ONNX's QuantizeLinear: round(x / scale) + zero_point, saturated, in the zero point's type; both are 0-d."""
    limits = torch.iinfo(zero_point.dtype)
    return ((x / scale).round() + zero_point).clamp(limits.min, limits.max).to(zero_point.dtype)


@torch.library.custom_op("psaq::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """ONNX's DequantizeLinear; scale and zero point are 0-d, or have one value for each slice of dimension `axis`."""
    shape = [-1 if scale.ndim and dim == axis else 1 for dim in range(codes.ndim)]
    return (codes.float() - zero_point.view(shape)) * scale.view(shape)


quantize.register_fake(lambda x, scale, zero_point: torch.empty_like(x, dtype=zero_point.dtype))
dequantize.register_fake(lambda codes, scale, zero_point, axis: torch.empty_like(codes, dtype=torch.float32))


class OnnxAct(QuantAct):
    """Modifications: the two operators, apart, so that what lies between them moves integers.

    With less than 8 bits a clip keeps to the grid: QuantizeLinear saturates where its type ends. Symmetric activations
    are int8 with a zero point of zero, others uint8.
    """

    factor = gain = 1.0  # what input and output are yet to be multiplied by; it costs nothing in the scales
    integer_output = False  # whether the reader moves the output before it dequantizes it

    def prepare(self) -> None:
        if self.scale is not None:
            self.input_scale, self.scale = self.scale / self.factor, self.scale * self.gain
            self.ends = [((end - self.zero_point) * self.input_scale).item() for end in self.grid]
            self.zero_point = self.zero_point.to(torch.int8 if self.symmetric else torch.uint8)

    def quantize(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return x * (self.factor * self.gain)
        if self.bits < 8:
            bottom, top = self.ends
            x = x.clamp(min=bottom if self.symmetric else None, max=top)  # uint8 ends at 0 by itself
        return quantize(x, self.input_scale, self.zero_point)

    def dequantize(self, codes: Tensor) -> Tensor:
        return codes if codes.is_floating_point() else dequantize(codes, self.scale, self.zero_point, 0)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.quantize(x) if x.is_floating_point() else x  # a parameter holds integers already
        # On x86 ONNX Runtime makes uint8 of int8 only where both operators are next to each other
        return codes if self.integer_output and not self.symmetric else self.dequantize(codes)


class OnnxNoAct(NoAct):
    """Modifications: what the readers of a quantizer's output call, which here does nothing."""

    def prepare(self) -> None:
        pass

    def dequantize(self, x: Tensor) -> Tensor:
        return x


class OnnxWeight(QuantizedWeight):
    """Mixin: the weight is a parameter of integers, (in, out): ONNX Runtime takes it for an integer product only so."""

    def prepare(self) -> None:
        weight = self.weight.detach()
        if self.weight_scale is not None:
            weight, self.weight_scale = weight_codes(self), self.weight_scale.flatten()
            self.weight_zero_point = torch.zeros(len(weight), dtype=torch.int8)
        self.weight = nn.Parameter(weight.flatten(1).T.contiguous(), requires_grad=False)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) to (..., out)."""
        if x.ndim == 2 and isinstance(self.act_output, NoAct):  # ORT makes a Gemm of matrices, in float without a scale
            return self.product(x[:, None], bias)[:, 0]
        weight = self.weight
        if self.weight_scale is not None:
            weight = dequantize(weight, self.weight_scale, self.weight_zero_point, 1)
        bias = self.bias if bias is None else bias
        y = x @ weight
        if bias is not None:
            # In batches of fixed size ONNX Runtime makes a Gemm, in float, of a product and a bias of one dimension
            y = y + (bias if x.ndim == 2 else bias[None, None])
        return self.act_output(y)


class OnnxLinear(OnnxWeight, QuantLinear):
    """Modifications: the weight."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.product(x, bias)

    def split(self, parts: int) -> nn.ModuleList:
        """As many layers, prepared, that give a part of the output each.

        They all have a bias: a product whose output is rounded to int8 at once ONNX Runtime computes in float. None is
        zero, as those of keys are: onnxsim and onnxslim would take it out.
        """
        biases = torch.zeros(self.out_features) if self.bias is None else self.bias
        biases = torch.where(biases == 0, NEXT_TO_NOTHING, biases).chunk(parts)
        scales = [None] * parts if self.weight_scale is None else self.weight_scale.chunk(parts)
        layers = nn.ModuleList()
        for weight, bias, scale in zip(self.weight.chunk(parts), biases, scales, strict=True):
            layer = copy.deepcopy(self)
            layer.weight, layer.bias = (nn.Parameter(value, requires_grad=False) for value in (weight, bias))
            layer.weight_scale = scale
            layer.prepare()
            layers.append(layer)
        return layers


class OnnxConv2d(OnnxWeight, QuantConv2d):
    """Modifications: a product of each patch, as kernel and stride are one: (B, rows * columns, D).

    A runtime would round a convolution's bias.
    """

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        height, width = self.kernel_size
        rows, columns = H // height, W // width
        x = x[:, :, : rows * height, : columns * width]  # as a convolution leaves out what fills no patch
        patches = x.reshape(B, C, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
        return self.product(patches.reshape(B, rows * columns, -1))


class OnnxPatchEmbed(PatchEmbed):
    """Modifications: the channels, which every reader wants last, are so from the start."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.proj(x))  # (B, N, D)
        return x if self.flatten else x.unflatten(1, self.grid_size)  # (B, H, W, D) for Swin


class OnnxHeads:
    """Mixin: heads are split in integers; 1 / sqrt(d) is in the scale of a quantizer.

    Wide queries, keys and values that are rounded apart have a product each, and nothing is split in float. Keys and
    values are moved between the two operators, which keeps them int8: ONNX Runtime multiplies uint8 by int8 in two
    thirds of the time of uint8 by uint8. The values are moved with a first dimension of one, as OpenVINO would take a
    move without it into its attention, and multiply in bfloat16. Where no activation has a zero point, it is one
    product: what three read, ONNX Runtime does not make uint8.
    """

    wide: int  # the width from which on that pays
    apart = False

    def prepare(self) -> None:
        if isinstance(self.act_query, QuantAct):
            self.act_query.gain, self.scale = self.scale, 1.0
        elif isinstance(self.act_scores, QuantAct):
            self.act_scores.factor, self.scale = self.scale, 1.0
        between = self.qkv.act_output, getattr(self, "q_norm", None), getattr(self, "k_norm", None)
        acts = self.act_query, self.act_key, self.act_value
        if (
            all(isinstance(act, QuantAct) for act in acts)
            and all(isinstance(module, nn.Identity | None) for module in between)
            and not getattr(self.act_context, "symmetric", False)
            and self.qkv.in_features >= self.wide
        ):
            self.apart = True
            self.qkv = self.qkv.split(3)
        else:
            self.qkv.act_output.integer_output = True

    def split_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.apart:
            return super().split_heads(x)
        q, k, v = (layer(x) for layer in self.qkv)  # (B, N, D) each
        q = self.act_query(q).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k = self.act_key.quantize(k).transpose(1, 2).unflatten(1, (self.num_heads, -1))  # (B, h, d, N)
        v = self.act_value.quantize(v).unflatten(2, (1, self.num_heads, -1)).permute(2, 0, 3, 1, 4)[0]
        return q, self.act_key.dequantize(k).transpose(2, 3), self.act_value.dequantize(v)  # (B, h, N, d) each

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(self.qkv.act_output.dequantize, super().heads(x)))  # (B, h, N, d) each


class OnnxAttention(OnnxHeads, QuantAttention):
    """Modifications: heads are merged in integers, too."""

    # deit_tiny's: in ONNX Runtime a tenth faster, in OpenVINO no slower than one product and its split. demo_vit (96)
    # and cifar_vit (128) would be 4 percent faster in ONNX Runtime, and up to 8 slower in OpenVINO
    wide = 192

    def merge_heads(self, context: Tensor) -> Tensor:
        act, norm, gate = self.act_context, getattr(self, "norm", None), getattr(self, "gate", None)
        if isinstance(act, QuantAct) and not act.symmetric and isinstance(norm, nn.Identity | None) and gate is None:
            context = act.quantize(context)  # it is the same to round before the move, which is then of bytes
        return super().merge_heads(context)


class OnnxWindowAttention(OnnxHeads, QuantWindowAttention):
    """Modifications: the heads; and the bias table holds integers, one for each pair of tokens: (h, N, N)."""

    wide = 96  # swin_tiny's first stage: at batch 8 2 to 5 percent faster in both runtimes; small Swins do not tell

    def prepare(self) -> None:
        super().prepare()
        act, self.act_bias = self.act_bias, nn.Identity()
        bias = QuantWindowAttention._get_rel_pos_bias(self)
        self.relative_position_bias_table, self.act_bias = nn.Parameter(bias.contiguous(), requires_grad=False), act

    def split_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().split_heads(self.read(x))

    def _get_rel_pos_bias(self) -> Tensor:
        return self.act_bias(self.relative_position_bias_table)


class OnnxSwinTransformerBlock(QuantSwinTransformerBlock):
    """Modifications: windows are cut before the norm's output is rounded, which is the same, and joined in integers.

    The rows of a window are short: to move them as bytes takes as long as in float, and longer in OpenVINO. Elsewhere
    there is one row of tokens, (B, H * W, D): OpenVINO fuses what follows a product, and what a norm consists of, only
    in tensors of three dimensions.
    """

    def prepare(self) -> None:
        padded = any(side % window for side, window in zip(self.input_resolution, self.window_size, strict=True))
        self.attn.proj.act_output.integer_output = not padded  # with zeros, not with codes
        self.norm1.act_output, self.attn.read = nn.Identity(), self.norm1.act_output

    def forward(self, x: Tensor) -> Tensor:
        places, x = x.shape[1:3], x.flatten(1, 2)
        attended = self.attn.proj.act_output.dequantize(self._attn(self.norm1(x).unflatten(1, places)))
        x = self.act_residual1(x + attended.flatten(1, 2))
        return self.act_residual2(x + self.mlp(self.norm2(x))).unflatten(1, places)


SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    QuantAct: OnnxAct,
    NoAct: OnnxNoAct,
    QuantConv2d: OnnxConv2d,
    QuantLinear: OnnxLinear,
    QuantAttention: OnnxAttention,
    QuantWindowAttention: OnnxWindowAttention,
    QuantSwinTransformerBlock: OnnxSwinTransformerBlock,
}


def prepare(model: nn.Module) -> nn.Module:
    """A copy of a calibrated model, on the CPU, that computes with the two operators; a plain copy of a float model."""
    model = copy.deepcopy(model).cpu().eval()
    for name, parameter, act in quantized_parameters(model):
        owner, _, place = name.rpartition(".")
        codes = activation_codes(act, parameter.detach())
        setattr(model.get_submodule(owner), place, nn.Parameter(codes, requires_grad=False))
    swapped = [module for module in model.modules() if type(module) in SWAPS]
    for module in swapped:
        module.__class__ = SWAPS[type(module)]
    if swapped:
        model.patch_embed.__class__ = OnnxPatchEmbed
    for module in swapped:  # an attention comes before its quantizers, whose factor it sets
        module.prepare()
    return model
