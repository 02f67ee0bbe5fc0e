"""Rounding with compensation: what rounding one weight costs, the weights that are not yet rounded make good.

GPTQ (Frantar et al., ICLR 2023, section 3): for inputs X of second moment H = E[x x^T], the error of a layer's output
is quadratic in that of its weights. Columns are rounded one after the other, those of the largest inputs first, and
the Cholesky factor of H^-1 says how each error spreads over the columns that are left.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from quant.quantizers import fake_quantize_, signed_grid, symmetric_scale

DAMPING = 0.01  # of H's mean diagonal, added to it: few images do not span all directions. GPTQ, section 3.3
FACTORS = torch.arange(100, 48, -2) / 100  # of a channel's scale, among which the search is
BLOCK = 128  # columns whose errors are spread at once over those behind them


@torch.no_grad()
def round_weight(weight: Tensor, scale: Tensor, moment: Tensor, bits: int) -> Tensor:
    """A layer's weight on its grid, so that its output stays near for inputs of this second moment.

    Args:
        weight: (out, in).
        scale: (out, 1).
        moment: (in, in).

    Returns:
        (out, in), multiples of the scale.
    """
    order = moment.diagonal().argsort(descending=True)
    factor = inverse_factor(moment[order][:, order])
    rest, columns = weight[:, order].double(), []
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        errors = rest.new_empty(len(weight), stop - start)
        for column in range(start, stop):
            rounded = fake_quantize_(rest[:, column, None].float(), scale, 0.0, signed_grid(bits))
            columns.append(rounded)
            error = (rest[:, column] - rounded[:, 0]) / factor[column, column]
            rest[:, column + 1 : stop] -= torch.outer(error, factor[column, column + 1 : stop])
            errors[:, column - start] = error
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    return torch.cat(columns, dim=1)[:, order.argsort()]


def inverse_factor(moment: Tensor) -> Tensor:
    """The upper triangular U with U^T U = (H + damping)^-1, in float64."""
    moment = moment.double()
    damping = DAMPING * moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damped = moment + damping * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


@torch.no_grad()
def search_weight_scale(weight: Tensor, bits: int, importance: Tensor) -> Tensor:
    """The scale of the least squared error for each output channel.

    Args:
        weight: (out, in).
        importance: weight of every input's error, its mean square: (in,).

    Returns:
        (out, 1).
    """
    largest = symmetric_scale(weight, bits)
    scales = largest * FACTORS.to(weight.device)  # (out, K)
    errors = [
        (fake_quantize_(weight.clone(), scale[:, None], 0.0, signed_grid(bits)) - weight).square() @ importance
        for scale in scales.unbind(1)
    ]
    return scales.gather(1, torch.stack(errors, dim=1).argmin(dim=1, keepdim=True))


@torch.no_grad()
def input_moments(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Tensor]:
    """The second moment of what each layer reads while the images `run`, up to a factor: by name, (in, in)."""
    moments: dict[str, Tensor] = {}

    def add(layer: nn.Module, inputs: tuple[Tensor], name: str) -> None:
        rows = as_rows(layer, inputs[0])
        moments[name] = moments.get(name, 0) + rows.T @ rows

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(add, name=name)))
        run()
    return moments


def as_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer, or a convolution of patches, multiplies with its weight: (rows, in)."""
    if isinstance(layer, nn.Conv2d):
        x = nn.functional.unfold(x, layer.kernel_size, stride=layer.stride, padding=layer.padding).transpose(1, 2)
    return x.reshape(-1, x.shape[-1])
