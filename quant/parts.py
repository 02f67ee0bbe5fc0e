"""Parts: what rounding and learning see beside each image, parts of it seen from near.

A photograph's amplitudes fall as 1/f (Field, 1987, J. Opt. Soc. Am. A 4, 2379), which looks alike from every distance:
a part of it, enlarged, could be a photograph. Generated images differ from one patch to the next, and little within;
the slow changes that a photograph has, they have only when seen from near. Compensation and learning make good
what rounding costs where layers read such values, so the more of them are like those of photographs, the better.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SIDES = 0.25, 0.75  # of a part, as shares of the image's
PARTS = 2  # of each image


def add_parts(images: Tensor) -> Tensor:
    """The images (B, 3, H, W), and PARTS parts of each: (B (1 + PARTS), 3, H, W)."""
    return torch.cat([images, enlarge(images.repeat(PARTS, 1, 1, 1), torch.Generator().manual_seed(0))])


def enlarge(images: Tensor, random: torch.Generator) -> Tensor:
    """A part of each of the images (B, 3, H, W), as large as they are: size and place are drawn."""
    parts, (height, width) = torch.empty_like(images), images.shape[-2:]
    for number, image in enumerate(images):
        share = SIDES[0] + (SIDES[1] - SIDES[0]) * torch.rand((), generator=random).item()
        rows, columns = max(round(share * height), 1), max(round(share * width), 1)
        top, left = (int(torch.randint(free + 1, (), generator=random)) for free in (height - rows, width - columns))
        part = image[None, :, top : top + rows, left : left + columns]
        larger = F.interpolate(part, size=(height, width), mode="bicubic")
        parts[number] = larger[0].clamp(*part.aminmax())  # bicubic goes beyond, where pixels end
    return parts
