"""Biases that attention does not need: those of the keys.

A bias of the keys adds the same to all scores of a query, which softmax does not see; but it costs the range of the
keys, and puts it off centre. (That of the values could go to the projection, as a row of softmax sums to one. In pre-trained
models it cancels what the tokens hold to which attention goes that has nothing to look for, so it is left there.)
"""

import torch
from torch import nn


@torch.no_grad()
def drop_key_biases(model: nn.Module) -> None:
    """Clear the biases of all keys of a timm ViT, DeiT or Swin in place: the same function."""
    for attention in [module for module in model.modules() if hasattr(module, "qkv")]:
        if attention.qkv.bias is not None:
            attention.qkv.bias.chunk(3)[1].zero_()
