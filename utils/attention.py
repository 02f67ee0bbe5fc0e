"""What attention layers of a timm model put out, read without altering the model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from utils.entropy import patch_similarity_entropy


@contextmanager
def attention_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the context each forward pass appends softmax(QK^T) V of every attention layer, (B*W, h, N, d), in order.

    It is read where heads are merged, as the input of the projection, so that fused attention stays usable.
    """
    layers = [module for module in model.modules() if isinstance(module, (Attention, WindowAttention))]
    if not layers:
        raise TypeError(f"expected attention of timm's ViT or Swin; {type(model).__name__} has none")
    outputs: list[Tensor] = []

    def hook(layer: nn.Module) -> RemovableHandle:
        def keep(projection: nn.Module, inputs: tuple[Tensor]) -> None:
            outputs.append(inputs[0].unflatten(2, (layer.num_heads, -1)).transpose(1, 2))  # (B*W, h, N, d)

        return layer.proj.register_forward_pre_hook(keep)

    handles = [hook(layer) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def layer_entropies(model: nn.Module, images: Tensor) -> list[float]:
    """H_l of every attention layer on normalised images (B, 3, H, W), in order."""
    with attention_outputs(model) as outputs:
        model(images.to(next(model.parameters()).device))
    return [patch_similarity_entropy(features, len(images)).item() for features in outputs]
