"""Contrast: stretched images span the whole range of pixels, and keep their shape."""

import torch

from quant.contrast import stretch

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def test_each_image_spans_the_range_of_pixels_and_keeps_the_order_of_its_values():
    pixels = 0.4 + 0.1 * torch.rand(3, 3, 8, 8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    stretched = stretch((pixels - mean) / std, MEAN, STD) * std + mean
    torch.testing.assert_close(stretched.amin(dim=(1, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(stretched.amax(dim=(1, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)
    for before, after in zip(pixels, stretched, strict=True):
        slope = (after - after.min()) / (before - before.min()).clamp(min=1e-9)
        assert slope[before > before.min()].std() < 1e-3  # one factor an image, for all channels


def test_an_image_of_one_value_stays():
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    flat = (torch.full((1, 3, 4, 4), 0.25) - mean) / std
    torch.testing.assert_close(stretch(flat, MEAN, STD), flat)
