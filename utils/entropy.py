"""The losses of image generation: patch-similarity entropy and total variation. Pure tensor maths.

B images, W windows an image (1 in a ViT), h heads, N tokens, d head width, M pairs an image, K density points.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.precision import float32_products

BANDWIDTH = 0.01  # h of the Gaussian kernel (published implementation; the paper names the kernel only)
POINTS = 10  # K, where the density is evaluated (published implementation)
DENSITY_FLOOR = 1e-4  # keeps the logarithm finite where there is no similarity (published implementation)
NARROW = 1e-3  # a span of similarities in which float32's roundings show


def patch_similarity_entropy(features: Tensor, num_images: int) -> Tensor:
    """Differential entropy H_l of the patch similarities of one attention layer, averaged over images.

    Section 3.2 of the paper, equations 4 to 6: real images have patches that attention tells apart, so their
    similarities spread out and the entropy is large; the patches of noise are all alike.

    Args:
        features: softmax(QK^T) V, of shape (B*W, h, N, d), windows of one image next to one another.
        num_images: B.

    Returns:
        0-d tensor in nats, differentiable in `features`.
    """
    similarity, count = patch_similarity(features, num_images)  # (B, M), (M,)
    low, high = similarity.detach().aminmax()  # of the whole batch, and no gradient through them
    step = (high - low) / (POINTS - 1)
    points = low + step * torch.arange(POINTS, device=similarity.device)  # (K,)
    density = GaussianDensity.apply(similarity, count, points) + DENSITY_FLOOR  # (B, K)
    return torch.trapezoid(-density * density.log(), dim=1).mul(step).mean()


def patch_similarity(features: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
    """Cosine of every pair of tokens of a window, the windows of an image pooled.

    The method takes ordered pairs, self-pairs included. The cosine is symmetric, so each pair is given once, with
    the number of ordered pairs that it stands for.

    Args:
        features: (B*W, h, N, d).

    Returns:
        Similarities (B, M) in float32, for lower precision would blur the kernel, which is 0.01 wide; and counts (M,),
        2 or, for a token with itself, 1. M = W * N (N - 1) / 2, as `patch_tokens` leaves N - 1 tokens.
    """
    tokens = patch_tokens(features)
    row, column = torch.triu_indices(tokens.shape[1], tokens.shape[1], device=tokens.device)
    similarity = PairProducts.apply(tokens, row, column).reshape(num_images, -1)
    return similarity, (1.0 + (row != column)).repeat(len(tokens) // num_images)


def patch_tokens(features: Tensor) -> Tensor:
    """What is compared: features averaged over heads, of length one, without token 0.

    Token 0 is the class token of a ViT. The published implementation drops it in Swin's windows too, where it is a
    patch, and so do we.

    Args:
        features: (B*W, h, N, d).

    Returns:
        (B*W, N-1, d) in float32.
    """
    return F.normalize(features.float().mean(dim=1)[:, 1:], dim=2, eps=1e-8)


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, (W, N, N') and (W, N', d), in float32 also where the model's own products are TF32's."""
    if torch.compiler.is_compiling():  # becomes one loop
        return (a[..., None] * b[:, None]).sum(dim=2)
    with float32_products():
        return a @ b


class PairProducts(torch.autograd.Function):
    """Inner products of tokens (W, N, d) with index `row` and tokens with index `column`, (W, P): each pair once.

    Where all patches are nearly alike, how the products of a pair are summed decides the entropy's gradient: there
    they are summed as in cosine_similarity, not as in a matrix product. A GPU has no such order to keep.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, row: Tensor, column: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, row, column)
        if torch.compiler.is_compiling():  # becomes one loop; no product is stored
            return (tokens[:, row] * tokens[:, column]).sum(dim=2)
        products = _float32_product(tokens, tokens.transpose(1, 2))  # (W, N, N)
        if tokens.device.type == "cpu" and products.max() - products.min() < NARROW:
            products = torch.stack([(token[:, None] * tokens).sum(dim=2) for token in tokens.unbind(1)], dim=1)
        return products.flatten(1)[:, row * tokens.shape[1] + column]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        tokens, row, column = ctx.saved_tensors
        W, N, _ = tokens.shape
        matrix = grad.new_zeros(W, N * N)
        matrix[:, row * N + column] = grad
        matrix = matrix.view(W, N, N)
        return _float32_product(matrix + matrix.transpose(1, 2), tokens), None, None


class GaussianDensity(torch.autograd.Function):
    """Gaussian kernel density p(t) = mean_j exp(-(t - s_j)^2 / 2h^2) / sqrt(2 pi) h: at points (K,) of samples (B, M).

    Sample j stands for count_j equal ones, count of shape (M,). One point at a time, forward and backward, so that
    nothing of size K * M exists; the backward pass computes the kernel again instead of keeping it. Gradient for the
    samples alone.
    """

    @staticmethod
    def forward(ctx: Any, samples: Tensor, count: Tensor, points: Tensor) -> Tensor:
        log_count, norm = count.log2(), count.sum() * (math.sqrt(2 * math.pi) * BANDWIDTH)
        ctx.save_for_backward(samples, log_count, points, norm)
        sums = [_kernel(samples - point, log_count).sum(dim=1) for point in points.unbind()]
        return torch.stack(sums, dim=1) / norm  # (B, K)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        samples, log_count, points, norm = ctx.saved_tensors
        slope = grad / (norm * BANDWIDTH**2)  # (B, K)
        total = torch.zeros_like(samples)
        for point, weight in zip(points.unbind(), slope.unbind(dim=1), strict=True):
            offset = samples - point
            total.addcmul_(_kernel(offset, log_count), offset.mul_(-weight[:, None]))  # d/ds = kernel * (t - s) / h^2
        return total, None, None


def _kernel(offset: Tensor, log_count: Tensor) -> Tensor:
    """count * exp(-offset^2 / 2h^2), as a power of two: torch.exp is ten times slower on a CPU where it underflows."""
    return torch.addcmul(log_count, offset, offset, value=-math.log2(math.e) / (2 * BANDWIDTH**2)).exp2_()


def total_variation(images: Tensor) -> Tensor:
    """Sum of the L2 norms, each over the whole batch, of the differences between neighbouring pixels.

    Neighbours are taken along rows, columns and both diagonals. Grows with sqrt(B * H * W).

    Args:
        images: (B, C, H, W).
    """
    return TotalVariation.apply(images)


class TotalVariation(torch.autograd.Function):
    """The backward pass adds into one tensor, where autograd would pad and add eight."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        norms = torch.stack([torch.linalg.vector_norm(a - b) for a, b in _neighbours(images)])
        ctx.save_for_backward(images, norms)
        return norms.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        images, norms = ctx.saved_tensors
        slopes = torch.where(norms > 0, grad / norms, 0)  # where all pixels are equal the slope is taken as 0
        total = torch.zeros_like(images)
        for (a, b), (to_a, to_b), slope in zip(_neighbours(images), _neighbours(total), slopes, strict=True):
            difference = (a - b).mul_(slope)
            to_a.add_(difference)
            to_b.sub_(difference)
        return total


def _neighbours(images: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """Views of all pixels that have a neighbour, and of these neighbours, in the four directions."""
    return (
        (images[..., :, 1:], images[..., :, :-1]),
        (images[..., 1:, :], images[..., :-1, :]),
        (images[..., 1:, 1:], images[..., :-1, :-1]),
        (images[..., 1:, :-1], images[..., :-1, 1:]),
    )
