"""Biases that attention does not need: those of the keys.

A bias of the keys adds the same to all scores of a query, which softmax does not see; but it costs the range of the
keys, and puts it off centre. (That of the values could go to the projection, as a row of softmax sums to one. But in
pre-trained models it cancels what those tokens hold that attention goes to when there is nothing to look for.)
"""

import torch
from torch import nn


@torch.no_grad()
def drop_key_biases(model: nn.Module) -> None:
    """Clear the biases of all keys of a timm ViT, DeiT or Swin in place: the same function."""
    for attention in [module for module in model.modules() if hasattr(module, "qkv")]:
        if attention.qkv.bias is not None:
            attention.qkv.bias.chunk(3)[1].zero_()
