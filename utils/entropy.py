"""The losses of image generation: patch-similarity entropy and total variation. Pure tensor maths.

B images, W windows an image (1 in a ViT), h heads, N tokens, d head width, M similarities an image, K density points.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BANDWIDTH = 0.01  # h of the Gaussian kernel (published implementation; the paper names the kernel only)
POINTS = 10  # K, where the density is evaluated (published implementation)
DENSITY_FLOOR = 1e-4  # keeps the logarithm finite where there is no similarity (published implementation)


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
    similarity = patch_similarity(features, num_images)  # (B, M)
    low, high = similarity.detach().aminmax()  # of the whole batch, and no gradient through them
    step = (high - low) / (POINTS - 1)
    points = low + step * torch.arange(POINTS, device=similarity.device)  # (K,)
    density = GaussianDensity.apply(similarity, points) + DENSITY_FLOOR  # (B, K)
    return torch.trapezoid(-density * density.log(), dim=1).mul(step).mean()


def patch_similarity(features: Tensor, num_images: int) -> Tensor:
    """Cosine of every ordered pair of tokens of a window, self-pairs included, the windows of an image pooled.

    Heads are averaged first and token 0 is dropped: the class token of a ViT. The published implementation drops it
    in Swin's windows too, where it is a patch, and so do we.

    Args:
        features: (B*W, h, N, d).

    Returns:
        (B, M) in float32, M = W * (N - 1)^2. Lower precision would blur the kernel, which is 0.01 wide.
    """
    tokens = features.float().mean(dim=1)[:, 1:]  # (B*W, N-1, d)
    tokens = F.normalize(tokens, dim=2, eps=1e-8)
    return PairwiseDot.apply(tokens).reshape(num_images, -1)


class PairwiseDot(torch.autograd.Function):
    """Inner products of all pairs of tokens: (W, N, d) -> (W, N, N), each summed as torch sums a vector.

    A matrix product would add in another order. Where all patches are nearly alike the similarities span no more than
    some hundred roundings, and that order decides the entropy's gradient. So the products are summed as in
    cosine_similarity, but in blocks of rows and once for each unordered pair: (W, N, N, d) never exists.
    """

    BLOCK = 8  # rows

    @staticmethod
    def forward(ctx: Any, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        W, N, _ = tokens.shape
        products = tokens.new_empty(W, N, N)
        for start in range(0, N, PairwiseDot.BLOCK):
            rows = slice(start, start + PairwiseDot.BLOCK)
            block = (tokens[:, rows, None] * tokens[:, None, start:]).sum(dim=3)
            products[:, rows, start:] = block
            products[:, start:, rows] = block.transpose(1, 2)
        return products

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (tokens,) = ctx.saved_tensors
        return (grad + grad.transpose(1, 2)) @ tokens


class GaussianDensity(torch.autograd.Function):
    """Gaussian kernel density at points (K,) of samples (B, M): p(t) = mean_j exp(-(t - s_j)^2 / 2h^2) / sqrt(2 pi) h.

    One point at a time, forward and backward, so that nothing of size K * M exists; the backward pass computes the
    kernel again instead of keeping it. No gradient for the points.
    """

    @staticmethod
    def forward(ctx: Any, samples: Tensor, points: Tensor) -> Tensor:
        ctx.save_for_backward(samples, points)
        sums = [_kernel(samples - point).sum(dim=1) for point in points.unbind()]
        return torch.stack(sums, dim=1) / (samples.shape[1] * math.sqrt(2 * math.pi) * BANDWIDTH)  # (B, K)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        samples, points = ctx.saved_tensors
        slope = grad / (samples.shape[1] * math.sqrt(2 * math.pi) * BANDWIDTH**3)  # (B, K)
        total = torch.zeros_like(samples)
        for point, weight in zip(points.unbind(), slope.unbind(dim=1), strict=True):
            offset = samples - point
            total.addcmul_(_kernel(offset), offset.mul_(-weight[:, None]))  # d kernel / d s = kernel * (t - s) / h^2
        return total, None


def _kernel(offset: Tensor) -> Tensor:
    """exp(-offset^2 / 2h^2) as a power of two; where that underflows, torch.exp is ten times slower on a CPU."""
    return offset.square().mul_(-math.log2(math.e) / (2 * BANDWIDTH**2)).exp2_()


def total_variation(images: Tensor) -> Tensor:
    """Sum of the L2 norms, each over the whole batch, of the differences between neighbouring pixels.

    Neighbours are taken along rows, columns and both diagonals. Grows with sqrt(B * H * W).

    Args:
        images: (B, C, H, W).
    """
    differences = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )
    return sum(torch.linalg.vector_norm(difference) for difference in differences)
