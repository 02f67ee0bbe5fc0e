"""Contrast: what photographs are known to have, and generated images lack.

Total variation pulls generated images towards grey, and their mean hardly differs from one to the next; ranges that are
recorded on them clip photographs from the first layer on. Two facts need no data. A photograph spans the whole range of
pixels. And its amplitudes fall as 1/f (Field, 1987, J. Opt. Soc. Am. A 4, 2379): what is strongest in it are slow
changes of light.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SHADED = 4  # one image in so many is also shaded: with 8 bits that is enough, and with 3 all of them cost accuracy
_FLAT = 1e-4  # of pixels: what an image of one value spans once it is normalised and back; a step of 8 bits is 4e-3
Values = Sequence[float] | Tensor  # of the three channels


def stretch(images: Tensor, mean: Values, std: Values) -> Tensor:
    """Scale and shift each image so that its darkest value is black and its brightest one white.

    Args:
        images: (B, 3, H, W), normalised.
        mean, std: of the three channels of pixels, by which the images are normalised.

    Returns:
        The same shape, normalised again. An image of one value stays as it is.
    """
    mean, std = (torch.as_tensor(values).to(images).view(3, 1, 1) for values in (mean, std))
    pixels = images * std + mean
    low, high = pixels.amin(dim=(1, 2, 3), keepdim=True), pixels.amax(dim=(1, 2, 3), keepdim=True)
    return torch.where(high - low > _FLAT, ((pixels - low) / (high - low) - mean) / std, images)


def shade(images: Tensor, mean: Values, std: Values, seed: int = 0) -> Tensor:
    """Lay slow changes of light and colour, as strong as the images are, over each of them, and stretch it again.

    Args:
        images, mean, std: as of `stretch`.

    Returns:
        The same shape: the images with pink noise, whose amplitudes fall as 1/f, other noise for each channel.
    """
    height, width = images.shape[-2:]
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width))
    frequency[0, 0] = 1 / max(height, width)  # the mean differs as much as the slowest wave
    white = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    pink = torch.fft.ifft2(torch.fft.fft2(white) / frequency).real.to(images)
    return stretch(images + pink * (images.std() / pink.std()), mean, std)


def add_shaded(images: Tensor, mean: Values, std: Values) -> Tensor:
    """The images, and one in SHADED once more, shaded: (B + ceil(B / SHADED), 3, H, W)."""
    return torch.cat([images, shade(images[::SHADED], mean, std)])
