"""Histograms of values that are counted as the logits move with them."""

import math

import pytest
import torch

from quant import quantize_model
from quant.convert import forward, observing
from quant.modules import QuantAct
from quant.quantizers import fake_quantize_
from quant.recipes import INPUTS
from quant.slopes import BINS, SAMPLES, slope_histogram, slope_histograms

IMAGES = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_a_histogram_tells_what_errors_cost_whatever_the_rounding_is():
    x, g = torch.randn(4, 20000), torch.rand(4, 20000)
    act = QuantAct(4)
    act.observe(x)
    slopes = slope_histogram(act, x, g)
    torch.testing.assert_close(slopes.sum(1), g.sum(1))
    middles = act.low + (act.high - act.low) / BINS * (torch.arange(BINS) + 0.5)
    rounding = act.fit(act.low / 2, act.high / 3)
    of_values, of_middles = (fake_quantize_(some.clone(), *rounding, act.grid) - some for some in (x, middles))
    for told, cost in zip(slopes @ of_middles, (g * of_values).sum(1), strict=True):
        assert told.item() == pytest.approx(cost.item(), rel=0.02)


def test_samples_are_as_many_for_any_number_of_images(vit):
    quantize_model(vit, 16, 4, recipe=INPUTS)
    with observing(vit), torch.no_grad():
        forward(vit, IMAGES, 32)
    counts = {len(slopes) for slopes in slope_histograms(vit, IMAGES, 2).values()}
    assert counts == {7 * math.ceil(SAMPLES / 7)}
