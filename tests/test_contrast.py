"""Contrast: images span the whole range of pixels, and change slowly where they are shaded."""

import torch

from quant.contrast import add_shaded, shade, stretch

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def test_each_image_spans_the_range_of_pixels_and_keeps_the_order_of_its_values():
    pixels = 0.4 + 0.1 * torch.rand(3, 3, 8, 8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    stretched = stretch((pixels - mean) / std, MEAN, STD) * std + mean
    torch.testing.assert_close(stretched.amin(dim=(1, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(stretched.amax(dim=(1, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)
    for before, after in zip(pixels, stretched, strict=True):
        expected = (before - before.min()) / (before.max() - before.min())  # one factor an image, for all channels
        torch.testing.assert_close(after, expected, atol=1e-5, rtol=0)


def test_an_image_of_one_value_stays():
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    greys = torch.arange(256)[:, None, None, None].expand(-1, 3, 4, 4) / 255
    flat = (greys - mean) / std
    torch.testing.assert_close(stretch(flat, MEAN, STD), flat)


def test_what_is_laid_over_an_image_is_as_strong_as_it_and_falls_with_frequency():
    board = torch.tensor([1.0, -1.0]).repeat(12)[:, None] * torch.tensor([1.0, -1.0]).repeat(16)
    shaded = shade(board.expand(64, 3, 24, 32), MEAN, STD)
    power = torch.fft.fft2(shaded).abs().square().mean((0, 1))
    image, power[0, 0], power[12, 16] = power[12, 16].item(), 0, 0
    assert 0.7 < image / power.sum() < 1.3  # 0.02 to each of the other waves, were they alike
    frequency = torch.hypot(torch.fft.fftfreq(24)[:, None], torch.fft.fftfreq(32))
    x, y = frequency[power > 0].log(), power[power > 0].log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert -2.1 < slope < -1.9  # of power


def test_shades_span_the_range_of_pixels_and_differ_in_light_and_colour():
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    grey = (0.5 + 0.01 * torch.rand(16, 1, 8, 8).expand(16, 3, 8, 8) - mean) / std
    pixels = shade(grey, MEAN, STD) * std + mean
    torch.testing.assert_close(pixels.amin(dim=(1, 2, 3)), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.amax(dim=(1, 2, 3)), torch.ones(16), atol=1e-5, rtol=0)
    assert pixels.mean((1, 2, 3)).std() > 0.02 and (pixels - pixels.mean(1, keepdim=True)).std() > 0.05
    assert torch.equal(shade(grey, MEAN, STD), shade(grey, MEAN, STD))


def test_one_image_in_four_is_added_shaded():
    images = torch.rand(6, 3, 8, 8)
    more = add_shaded(images, MEAN, STD)
    assert torch.equal(more[:6], images) and torch.equal(more[6:], shade(images[::4], MEAN, STD))
