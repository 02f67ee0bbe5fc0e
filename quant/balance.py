"""Balance: what one layer gives and the next reads, channel by channel made equally large; the same function.

Where nothing but a sum stands between two layers, a channel can be multiplied in the first and divided in the second.
A large one costs the range of the whole activation, a large column of weights that of its rows; the geometric mean of
both is the same whatever factors the training left, so that quantization no longer depends on them. Cross-layer
equalization (Nagel et al., ICCV 2019, section 4.1) with lengths in place of ranges; it needs no data.
"""

import torch
from torch import Tensor, nn

_SMALLEST = 1e-6  # length of a channel, of which there is nothing to balance


@torch.no_grad()
def balance(model: nn.Module) -> None:
    """Balance norms with the layers that read them, and values with the projection, of a timm model in place."""
    for block in [module for module in model.modules() if hasattr(module, "norm1")]:
        balance_norm(block.norm1, block.attn.qkv, 2 * block.attn.proj.in_features)
        balance_norm(block.norm2, block.mlp.fc1)
        balance_values(block.attn)


@torch.no_grad()
def balance_norm(norm: nn.LayerNorm, reader: nn.Linear, rows: int | None = None) -> None:
    """Between a layer norm's gain and the columns of the layer after it, of which the first `rows` rows are measured.

    Those of queries and keys: how large the values are depends on the projection, with which they are balanced next.
    """
    factor = _factor(norm.weight.double().abs(), reader.weight[:rows].double().norm(dim=0))
    for parameter in (norm.weight, norm.bias):
        parameter.div_(factor)
    reader.weight.mul_(factor)


@torch.no_grad()
def balance_values(attention: nn.Module) -> None:
    """Between the rows of the values and the columns of the projection; attention sums values with one weight each."""
    qkv, projection = attention.qkv, attention.proj
    values = slice(2 * projection.in_features, None)
    factor = _factor(qkv.weight[values].double().norm(dim=1), projection.weight.double().norm(dim=0))
    qkv.weight[values] = qkv.weight[values] / factor[:, None]
    if qkv.bias is not None:
        qkv.bias[values] = qkv.bias[values] / factor
    projection.weight.mul_(factor)


def _factor(given: Tensor, read: Tensor) -> Tensor:
    """What to divide the first layer's channels by, and multiply the second's with: (channels,)."""
    factor = (given / read).sqrt()
    return torch.where((given > _SMALLEST) & (read > _SMALLEST), factor, 1.0)
