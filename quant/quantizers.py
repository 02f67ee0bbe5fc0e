"""The arithmetic of quantization: integer grids, scales, and the one rounding function that everything uses.

Three separate things: the grid (which integers a bit width has), the range (what calibration saw), the rounding.
Source throughout: the published implementation, on which the paper's numbers rest; the paper gives the idea only.
"""

import torch
from torch import Tensor

FLOAT_BITS = 16  # "leave in float": accepted wherever a bit width is, and then nothing is quantized
BIT_WIDTHS = (2, 3, 4, 5, 6, 7, 8, FLOAT_BITS)
_SCALE_FLOOR = torch.finfo(torch.float32).eps  # of a channel or tensor that is zero everywhere


def signed_grid(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of symmetric weights: (-128, 127) at 8 bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def unsigned_grid(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of asymmetric activations: (0, 255) at 8 bits."""
    return 0, 2**bits - 1


def symmetric_scale(weight: Tensor, bits: int) -> Tensor:
    """One scale per output channel: max|w| / ((2^b - 1) / 2).

    The divisor is 127.5 at 8 bits, not 127: the grid's own asymmetry is left to the clamp.

    Args:
        weight: (out_channels, ...).
        bits: 2 to 8.

    Returns:
        (out_channels, 1, ...), to broadcast against `weight`.
    """
    largest = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
    return _divide(largest, (2**bits - 1) / 2).clamp(min=_SCALE_FLOOR)


def asymmetric_scale(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a tensor whose values span [low, high].

    A range that lies to one side of zero keeps its width and loses its position to the clamp of the zero point.

    Returns:
        scale = (high - low) / (2^b - 1) and zero_point = clamp(-round(low / scale), 0, 2^b - 1), both 0-d float.
    """
    bottom, top = unsigned_grid(bits)
    scale = _divide(high - low, top - bottom).clamp(min=_SCALE_FLOOR)
    return scale, (-torch.round(low / scale)).clamp(bottom, top)


def symmetric_activation_scale(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale, and a zero point of zero, of a tensor whose values span [low, high], on the signed grid.

    Both ends are on the grid: max(-low, high) / (2^(b-1) - 1). Not in the paper; some runtimes have no zero points.
    """
    _, top = signed_grid(bits)
    scale = _divide(torch.maximum(-low, high), top).clamp(min=_SCALE_FLOOR)
    return scale, torch.zeros_like(scale)


def _divide(x: Tensor, number: float) -> Tensor:
    """x / number to the last bit on a GPU, too, which takes a number of the host for its inverse, and multiplies."""
    return x / x.new_full((), number)


def fake_quantize_(x: Tensor, scale: Tensor, zero_point: Tensor | float, grid: tuple[int, int]) -> Tensor:
    """Round `x` to the grid and back, in place: the value that an integer kernel would stand for.

    The order matters where a value lies half-way: round(x / s + z), a true division in float32. torch.fake_quantize_*
    multiplies by 1 / s and adds z after rounding, which moves whole steps on each channel's largest weight.
    """
    q = x.div_(scale).add_(zero_point).round_().clamp_(*grid)
    return q.sub_(zero_point).mul_(scale)


def quantize_weight(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric, per channel. Returns the dequantized weight, integer * scale, and the scale."""
    scale = symmetric_scale(weight, bits)
    return fake_quantize_(weight.clone(), scale, 0.0, signed_grid(bits)), scale
