"""Biases that attention does not need: those of keys go, those of values move to the projection; the same function.

A bias of the keys adds the same to all scores of a query, which softmax does not see. A row of softmax sums to one, so
a bias of the values is in every context, once. Either costs the range of its tensor and puts it off centre. And what is
added to all values counts as often as a row sums to after rounding, which with few bits is not once.
"""

import torch
from torch import nn


@torch.no_grad()
def fold_biases(model: nn.Module) -> None:
    """Clear the biases of all keys and values of a timm ViT, DeiT or Swin in place, where the projection has one."""
    for attention in [module for module in model.modules() if hasattr(module, "qkv")]:
        qkv, projection = attention.qkv, attention.proj
        if qkv.bias is not None and projection.bias is not None:
            _, key, value = qkv.bias.chunk(3)
            projection.bias.add_(projection.weight @ value)
            key.zero_(), value.zero_()
