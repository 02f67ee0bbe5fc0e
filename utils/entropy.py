"""Patch-similarity entropy, the loss that the method is named for. Pure tensor maths.

B images, W windows an image (1 in a ViT), h heads, N tokens and token 0, d head width, M pairs an image, K points of
the density.
"""

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.run.errors import InputError
from utils.run.precision import float32_products

BANDWIDTH = 0.01  # h of the Gaussian kernel (published implementation; the paper names the kernel only)
POINTS = 10  # K, where the density is evaluated (published implementation)
DENSITY_FLOOR = 1e-4  # keeps the logarithm finite where there is no similarity (published implementation)
NARROW = 1e-3  # a span of similarities in which float32's roundings show
CACHE = 2**21  # float32 values, 8 MB: what a server's CPU has cache for; large kernels take up to a sixth less time
LEAST_EXPONENT = -100.0  # of two: 1e-30, which the floor swallows. Numbers below 2^-126 take a CPU three times as long


def patch_similarity_entropy(features: Tensor, num_images: int) -> Tensor:
    """Differential entropy H_l of the patch similarities of one attention layer, averaged over images.

    Section 3.2 of the paper, equations 4 to 6: real images have patches that attention tells apart, so their
    similarities spread out and the entropy is large; the patches of noise are all alike.

    Args:
        features: softmax(QK^T) V, of shape (B*W, h, N+1, d), windows of one image next to one another.
        num_images: B.

    Returns:
        0-d tensor in nats, differentiable in `features`.

    Raises:
        InputError: there is no token beside token 0.
    """
    if features.shape[2] < 2:
        raise InputError("patches are compared within a window: expected 2 in each, as larger images have; got 1")
    return PatchEntropy.apply(features, num_images)


def patch_tokens(features: Tensor) -> tuple[Tensor, Tensor]:
    """What is compared: features averaged over heads, without token 0.

    Token 0 is the class token of a ViT. The published implementation drops it in Swin's windows too, where it is a
    patch, and so do we.

    Args:
        features: (B*W, h, N+1, d).

    Returns:
        Of unit length (B*W, N, d), and what they were divided by, (B*W, N, 1), in float32: lower precision would blur
        the density's kernel, which is 0.01 wide.
    """
    tokens = features.float().mean(dim=1)[:, 1:]
    length = torch.linalg.vector_norm(tokens, dim=2, keepdim=True).clamp(min=1e-8)
    return tokens / length, length


class PatchEntropy(torch.autograd.Function):
    """The entropy of features (B*W, h, N+1, d), windows of one image next to one another.

    The gradient is computed with the value, as one kernel serves both; what is kept for the backward pass is as small
    as the tokens.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, num_images: int) -> Tensor:
        tokens, length = patch_tokens(features)
        similarity, log_weight = patch_similarity(tokens, num_images)  # (B, M), (M,)
        low, high = similarity.aminmax()  # of the whole batch; the points, which hang on them, pass no gradient
        step = (high - low) / (POINTS - 1)
        similarity -= low
        points = step * torch.arange(POINTS, device=tokens.device)  # (K,), from low on
        parts = [density_entropy(part, log_weight, points) for part in similarity.split(_images_at_once(similarity))]
        entropy, slope = (torch.cat(values) for values in zip(*parts, strict=True))
        gradient = _gradient(tokens, slope)
        ctx.save_for_backward(F.pad(gradient / (length * num_images), (0, 0, 1, 0)))  # token 0 has none
        ctx.features = features.shape, features.dtype
        return entropy.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,), (shape, dtype) = ctx.saved_tensors, ctx.features
        return (grad / shape[1] * gradient).to(dtype)[:, None].expand(shape), None  # the same for each head


def density_entropy(similarity: Tensor, log_weight: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of each image's density of similarities, and its gradient for them; equations 5 and 6.

    Args:
        similarity: (B, M).
        log_weight: (M,), log2 of the part of the density that each one makes up.
        points: where the density is evaluated, in equal steps: (K,).

    Returns:
        (B,) and (B, M).
    """
    kernel = gaussian_kernel(similarity, log_weight, points)  # (B, K, M)
    q = kernel.sum(dim=2) + DENSITY_FLOOR  # (B, K)
    step, trapezoid = points[1], torch.full_like(points, 1.0)
    trapezoid[:: POINTS - 1].fill_(0.5)  # not by assignment, which would copy the number from the host, and wait
    entropy = -(q * q.log() * trapezoid).sum(dim=1) * step
    slope = -trapezoid * step * (q.log() + 1) / BANDWIDTH**2
    # d kernel / d similarity = kernel * (point - similarity) / h^2
    moments = _float32_product(torch.stack([slope * points, slope], dim=1), kernel)  # (B, 2, M)
    return entropy, torch.addcmul(moments[:, 0], similarity, moments[:, 1], value=-1)


def _images_at_once(similarity: Tensor) -> int:
    """Of how many of the (B, M) the kernel is to be in memory: on a CPU, of what its cache holds."""
    images, pairs = similarity.shape
    return max(1, CACHE // (POINTS * pairs)) if similarity.device.type == "cpu" else images


def _gradient(tokens: Tensor, of_pairs: Tensor) -> Tensor:
    """Gradient for the tokens (B*W, N, d), across them, as their length does not matter, of that for pairs, (B, M)."""
    W, N, _ = tokens.shape
    # A pair counts in both its rows; one of a token with itself twice, but that part is along it, and is taken away.
    place = _pairs_of(tokens)[2].expand(W, -1)
    gradient = _float32_product(of_pairs.view(W, -1).gather(1, place).view(W, N, N), tokens)
    along = (tokens * gradient).sum(dim=2, keepdim=True)
    return torch.addcmul(gradient, tokens, along, value=-1)


def patch_similarity(tokens: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
    """Cosine of every pair of tokens of a window, the windows of an image pooled.

    The method takes ordered pairs, self-pairs included. The cosine is symmetric, so each pair is given once, with
    what it counts for among them. Where all patches are nearly alike, how the products of a pair are summed decides
    the entropy's gradient: on a CPU they are summed there as in cosine_similarity, not as in a matrix product. A GPU
    has no such order to keep.

    Args:
        tokens: (B*W, N, d), from `patch_tokens`.

    Returns:
        Similarities (B, M), M = W * N (N + 1) / 2, and log2 of their weights (M,): of an image's W * N^2 ordered pairs
        each stands for 2 or, of a token with itself, 1.
    """
    pairs, log_count, _ = _pairs_of(tokens)
    products = _float32_product(tokens, tokens.transpose(1, 2))  # (B*W, N, N)
    similarity = products.flatten(1).gather(1, pairs.expand(len(tokens), -1))
    on_cpu = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and torch.sub(*similarity.aminmax()).abs() < NARROW:
        rows = [(token[:, None] * tokens[:, at:]).sum(dim=2) for at, token in enumerate(tokens.unbind(1))]
        similarity = torch.cat(rows, dim=1)
    W, N = len(tokens) // num_images, tokens.shape[1]
    return similarity.view(num_images, -1), log_count.repeat(W) - math.log2(W * N * N)


def _pairs(N: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where, in a flat (N, N) matrix, each unordered pair is, and log2 of how many ordered ones it stands for: (M,).

    Third, which pair is at each place of that matrix: (N * N,).
    """
    row, column = torch.triu_indices(N, N, device=device)
    token = torch.arange(N, device=device)
    first, second = torch.minimum(token[:, None], token), torch.maximum(token[:, None], token)
    return row * N + column, (row != column).float(), (first * (2 * N - 1 - first) // 2 + second).flatten()


_kept_pairs = cache(_pairs)


def _pairs_of(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_pairs` of tokens (B*W, N, d); kept, as making them takes as long as a product, where they are not compiled."""
    return (_pairs if torch.compiler.is_compiling() else _kept_pairs)(tokens.shape[1], tokens.device)


def gaussian_kernel(samples: Tensor, log_weight: Tensor, points: Tensor) -> Tensor:
    """What each sample adds to the Gaussian kernel density at each point: summed over samples it is the density.

    The density is p(t) = sum_j w_j exp(-(t - s_j)^2 / 2h^2) / sqrt(2 pi) h, with weights w_j that sum to 1.

    Args:
        samples: (B, M).
        log_weight: log2 of the weights, (M,).
        points: (K,).

    Returns:
        (B, K, M).
    """
    # As a power of two, to which the weight is added: torch.exp is ten times slower on a CPU where it underflows.
    log_height = log_weight - math.log2(math.sqrt(2 * math.pi) * BANDWIDTH)
    offset = samples[:, None] - points[:, None]
    torch.addcmul(log_height, offset, offset, value=-math.log2(math.e) / (2 * BANDWIDTH**2), out=offset)
    return offset.clamp_(min=LEAST_EXPONENT).exp2_()  # in place throughout: it is the largest tensor of a step


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for batches of matrices, in float32 also where the model's own products are TF32's."""
    if torch.compiler.is_compiling():
        return _opaque_product(a, b)
    with float32_products():
        return a @ b


@torch.library.custom_op("psaq::float32_product", mutates_args=())
def _opaque_product(a: Tensor, b: Tensor) -> Tensor:
    """The same as one operator, as a compiler cannot look after the precision of single products."""
    return _float32_product(a, b)


_opaque_product.register_fake(lambda a, b: a.new_empty(*a.shape[:-1], b.shape[-1]))
