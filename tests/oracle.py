"""The method's formulas transcribed naively: loops and broadcasts, as one would write them down first.

Nothing here is shared with the implementation; it is what the implementation is compared with.
"""

import math

import torch


def entropy(features, num_images):
    """H_l of one layer: features (B*W, h, N, d)."""
    tokens = features.mean(dim=1)[:, 1:]
    windows = tokens.shape[0] // num_images
    similarity = torch.nn.functional.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)
    similarity = similarity.reshape(num_images, windows * similarity.shape[1] ** 2)
    like = {"dtype": similarity.dtype, "device": similarity.device}
    points = torch.linspace(similarity.min().item(), similarity.max().item(), 10, **like)
    h = 0.01
    entropies = []
    for image in similarity:
        offsets = points[:, None] - image[None]  # (K, M), kept by autograd: the published cost
        p = (torch.exp(-(offsets**2) / (2 * h**2)) / math.sqrt(2 * math.pi * h**2)).mean(dim=1)
        q = p + 1e-4
        integrand = -q * torch.log(q)
        area = 0
        for k in range(9):
            area = area + (points[k + 1] - points[k]) * (integrand[k] + integrand[k + 1]) / 2
        entropies.append(area)
    return torch.stack(entropies).mean()


def total_variation(images):
    """Four norms over explicit neighbours."""
    _, _, H, W = images.shape
    total = 0
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        squares = 0
        for y in range(H):
            for x in range(W):
                if 0 <= y + down < H and 0 <= x + right < W:
                    squares = squares + ((images[:, :, y, x] - images[:, :, y + down, x + right]) ** 2).sum()
        total = total + torch.sqrt(squares)
    return total


def quantize_weight(weight, bits):
    """Symmetric, one scale an output channel, value by value."""
    eps = torch.finfo(torch.float32).eps
    result = torch.empty_like(weight)
    for channel in range(len(weight)):
        scale = (weight[channel].abs().max() / ((2**bits - 1) / 2)).clamp(min=eps)
        integers = torch.round(weight[channel] / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        result[channel] = integers * scale
    return result


def quantize_activation(x, low, high, bits):
    """Asymmetric, one scale for all."""
    top = 2**bits - 1
    scale = ((high - low) / top).clamp(min=torch.finfo(torch.float32).eps)
    zero = torch.clamp(-torch.round(low / scale), 0, top)
    return (torch.clamp(torch.round(x / scale + zero), 0, top) - zero) * scale
