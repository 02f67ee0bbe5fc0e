"""What the layers of a timm model put out, its attention above all, read without altering the model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quant.families import ATTENTION
from utils.entropy import patch_similarity_entropy
from utils.run.precision import model_products


@contextmanager
def attention_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the context each forward pass appends softmax(QK^T) V of every attention layer, (B*W, h, N, d), in order.

    It is read where heads are merged, as the input of the projection, so that fused attention stays usable; where a
    family has a norm or a gate before that, behind them. What activation checkpointing computes again in the backward
    pass is not appended.
    """
    layers = [module for module in model.modules() if isinstance(module, ATTENTION)]
    if not layers:
        raise TypeError(f"expected attention of timm's vision transformers; {type(model).__name__} has none")
    outputs: list[Tensor] = []

    def hook(layer: nn.Module) -> RemovableHandle:
        def keep(projection: nn.Module, inputs: tuple[Tensor]) -> None:
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                return  # in the backward pass
            outputs.append(inputs[0].unflatten(2, (layer.num_heads, -1)).transpose(1, 2))  # (B*W, h, N, d)

        return layer.proj.register_forward_pre_hook(keep)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(hook(layer))
        yield outputs


@torch.no_grad()
def layer_entropies(model: nn.Module, images: Tensor) -> list[float]:
    """H_l of every attention layer on normalised images (B, 3, H, W), in order."""
    with attention_outputs(model) as outputs:
        model(images.to(next(model.parameters()).device))
    return [patch_similarity_entropy(features, len(images)).item() for features in outputs]


@torch.no_grad()
def where_not_finite(model: nn.Module, images: Tensor, precision: str) -> str:
    """Say which is the first layer whose output for `images` is not finite, with products of the precision."""
    names: list[str] = []

    def hook(name: str) -> Callable:
        return lambda layer, inputs, output: None if output.isfinite().all() else names.append(name)

    with ExitStack() as hooks:
        for name, layer in model.named_modules():
            if not any(layer.children()):
                hooks.enter_context(layer.register_forward_hook(hook(name)))
        with model_products(precision, images.device):
            model(images)
    return f"{names[0]} is the first layer that is not" if names else "all layers were finite before"


@contextmanager
def frozen(model: nn.Module, checkpoint_activations: bool = False) -> Iterator[None]:
    """Within the context the model is in evaluation mode and no parameter asks for a gradient."""
    training = [module for module in model.modules() if module.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval().requires_grad_(False)
        model.set_grad_checkpointing(checkpoint_activations)
        yield
    finally:
        model.set_grad_checkpointing(False)
        for module in training:  # each by itself: some may have been in another mode
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)
