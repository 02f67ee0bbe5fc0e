"""The loss of image generation: what a model says of images, and their total variation."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.entropy import patch_similarity_entropy
from utils.run.precision import model_products

TERMS = ("L_PSE", "L_OH", "L_TV")  # of section 3.2 of the paper, each of them below
LossTerms = Callable[[Tensor, Tensor, Tensor], Tensor]  # see loss_terms


def loss_terms(model: nn.Module, outputs: list[Tensor], precision: str) -> LossTerms:
    """The function from images (B, 3, H, W), labels (B,) and TV target (0-d) to [L_PSE, L_OH, L_TV]: (3,) in float32.

    Without a classifier L_OH is 0.

    Args:
        outputs: the list to which `attention_outputs` appends.
    """

    def terms(images: Tensor, labels: Tensor, tv_target: Tensor) -> Tensor:
        outputs.clear()
        variation = total_variation(images)  # first: its backward pass is then the last, when activations are gone
        with model_products(precision, images.device):
            logits = model(images)  # (B, classes)
        entropies = [patch_similarity_entropy(features, len(images)) for features in outputs]
        outputs.clear()
        cross_entropy = F.cross_entropy(logits.float(), labels) if model.num_classes else images.new_zeros(())
        return torch.stack([-sum(entropies), cross_entropy, (variation - tv_target).abs()])

    return terms


def try_out(terms: LossTerms, images: Tensor, labels: Tensor, tv_target: Tensor) -> Tensor:
    """The gradient for the images, which changes nothing: to see whether it can be had."""
    images = images.detach().requires_grad_()
    return torch.autograd.grad(terms(images, labels, tv_target).sum(), images)[0]


def total_variation(images: Tensor) -> Tensor:
    """Sum of the L2 norms, each over the whole batch, of the differences between neighbouring pixels.

    Neighbours are taken along rows, columns and both diagonals. Grows with sqrt(B * H * W).

    Args:
        images: (B, C, H, W).
    """
    if torch.compiler.is_compiling():  # which fuses what autograd would do one by one
        return sum(torch.linalg.vector_norm(a - b) for a, b in _neighbours(images))
    return TotalVariation.apply(images)


class TotalVariation(torch.autograd.Function):
    """The gradient is computed with the value, in one tensor, where autograd would pad and add eight."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        gradient, norms = torch.zeros_like(images), []
        for (a, b), (to_a, to_b) in zip(_neighbours(images), _neighbours(gradient), strict=True):
            difference = a - b
            norm = torch.linalg.vector_norm(difference)
            slope = (1 / norm).masked_fill(norm == 0, 0.0)  # where all pixels are equal it is taken as 0
            to_a.addcmul_(difference, slope)
            to_b.addcmul_(difference, slope, value=-1)
            norms.append(norm)
        ctx.save_for_backward(gradient)
        return sum(norms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gradient,) = ctx.saved_tensors
        return grad * gradient


def _neighbours(images: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """Views of all pixels that have a neighbour, and of these neighbours, in the four directions."""
    return (
        (images[..., :, 1:], images[..., :, :-1]),
        (images[..., 1:, :], images[..., :-1, :]),
        (images[..., 1:, 1:], images[..., :-1, :-1]),
        (images[..., 1:, :-1], images[..., :-1, 1:]),
    )
