"""Contrast: a photograph spans the whole range of pixels, and a generated image often does not.

Total variation pulls generated images towards grey, and ranges that are recorded on them then clip photographs from the
first layer on. How wide a pixel's range is needs no data: each image is stretched to it before it calibrates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def stretch(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale and shift each image so that its darkest value is black and its brightest one white.

    Args:
        images: (B, 3, H, W), normalised.
        mean, std: of the three channels of pixels, by which the images are normalised.

    Returns:
        The same shape, normalised again. An image of one value stays as it is.
    """
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    pixels = images * std + mean
    low, high = pixels.amin(dim=(1, 2, 3), keepdim=True), pixels.amax(dim=(1, 2, 3), keepdim=True)
    return torch.where(low < high, ((pixels - low) / (high - low) - mean) / std, images)
