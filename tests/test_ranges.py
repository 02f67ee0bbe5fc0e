"""Ranges by the error of the logits, against that error as it is measured, and as it is defined."""

import copy

import pytest
import torch

from quant import activation_ranges, quantize_model
from quant.convert import forward, observing
from quant.modules import QuantAct, named_activations
from quant.quantizers import fake_quantize_
from quant.ranges import FACTORS, bits_in_use, range_errors, search_range, search_ranges
from quant.recipes import INPUTS
from quant.slopes import BINS, SAMPLES, slope_histogram, slope_histograms

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def observed(x, bits, symmetric=False):
    act = QuantAct(bits, symmetric)
    act.observe(x)
    return act


def error(act, x, g):
    """Sum over the samples of (g e)^2."""
    rounded = fake_quantize_(x.clone(), *act.fit(act.low, act.high), act.grid)
    return (g * (rounded - x)).flatten(1).sum(1).square().sum().item()


def middles(act):
    return act.low + (act.high - act.low) / BINS * (torch.arange(BINS) + 0.5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("shape", ["normal", "outlier", "gelu", "softmax"])
def test_a_searched_range_costs_little_more_than_the_best_of_all(shape, bits, symmetric):
    torch.manual_seed(0)
    x = torch.randn(64, 500)
    x[0, 0] = 30.0 if shape == "outlier" else 3.0
    x = {"gelu": torch.nn.functional.gelu(2 * x), "softmax": (3 * x).view(64, 10, 50).softmax(-1)}.get(shape, x)
    g = torch.randn(64, *[1] * (x.ndim - 1)) + torch.randn_like(x)  # a part that errors share, and one of each value
    act = observed(x, bits, symmetric)
    seen, errors = (act.low, act.high), []
    for low in FACTORS[::3]:
        for high in FACTORS[::3]:
            act.low, act.high = seen[0] * low, seen[1] * high
            errors.append(error(act, x, g))
    act.low, act.high = seen
    act.low, act.high = search_range(act, slope_histogram(act, x.flatten(1), g.flatten(1)))
    assert act.low.abs() <= seen[0].abs() and act.low < act.high <= seen[1]
    # The least of a thousand sums of noise is low by chance; and a histogram is not exact
    assert error(act, x, g) < min(2 * min(errors), 1.05 * errors[0])


def test_errors_that_add_up_cost_more_than_those_that_cancel():
    """Of the same values, the best range is another one."""
    x = torch.rand(100, 1000) ** 4
    act = observed(x, 3)
    adding, cancelling = torch.ones_like(x), torch.randn_like(x)
    high = [search_range(act, slope_histogram(act, x, g))[1].item() for g in (adding, cancelling)]
    for end, g in zip(high, (adding, cancelling), strict=True):
        act.high = torch.tensor(end)
        mine = error(act, x, g)
        act.high = torch.tensor(high[0] + high[1] - end)
        assert mine < error(act, x, g)


def test_errors_of_a_range_are_summed_over_samples_as_squares():
    x, g = torch.randn(4, 20000), torch.rand(4, 20000)
    act = observed(x, 4)
    found = range_errors(act, act.low[None] / 2, act.high[None] / 3, middles(act), slope_histogram(act, x, g))
    act.low, act.high = act.low / 2, act.high / 3
    assert found.item() == pytest.approx(error(act, x, g), rel=0.02)


def test_what_a_range_costs_is_what_the_logits_are_off(model):
    """One quantizer alone, 6 bits: the prediction to first order against the model itself."""
    quantize_model(model, 16, 6, recipe=INPUTS)
    with observing(model), torch.no_grad():
        expected = forward(model, IMAGES, 32)
    for act, slopes in slope_histograms(model, IMAGES, 3).items():
        assert slopes.shape == (SAMPLES, BINS)
        told = range_errors(act, act.low[None] * 0.9, act.high[None] * 0.9, middles(act), slopes)
        trial = copy.deepcopy(act)
        act.low, act.high = act.low * 0.9, act.high * 0.9
        act.freeze()
        with torch.no_grad():
            measured = (forward(model, IMAGES, 32) - expected).square().sum()
        act.low, act.high, act.scale, act.zero_point = trial.low, trial.high, None, None
        assert told.item() * len(IMAGES) / SAMPLES == pytest.approx(measured.item(), rel=0.6)


def test_a_search_lowers_the_error_of_the_logits_and_leaves_no_hooks(model):
    quantize_model(model, 16, 4, recipe=INPUTS)
    with observing(model), torch.no_grad():
        expected = forward(model, IMAGES, 32)
    acts, errors = [act for _, act in named_activations(model)], []
    for searched in (False, True):
        if searched:
            search_ranges(model, IMAGES, 32)
        for act in acts:
            act.freeze()
        with torch.no_grad():
            errors.append((forward(model, IMAGES, 32) - expected).square().mean().item())
        for act in acts:
            act.scale = act.zero_point = None
    assert errors[1] < 0.7 * errors[0]
    assert not any(act._forward_pre_hooks for act in acts)
    assert all(parameter.grad is None for parameter in model.parameters()) and not IMAGES.requires_grad


def test_where_all_have_8_bits_or_are_in_float_ranges_stay_as_they_were_seen(model, monkeypatch):
    """Without a pass of the model, if there is nothing else."""
    quantize_model(model, 4, 8, skip=["*.act_key"], recipe=INPUTS)
    with observing(model), torch.no_grad():
        forward(model, IMAGES, 32)
    before = activation_ranges(model)
    monkeypatch.setattr(model, "forward", lambda images: pytest.fail("a pass"))
    search_ranges(model, IMAGES, 32)
    assert activation_ranges(model) == before


def test_a_symmetric_grid_of_8_bits_is_searched_as_it_has_7_for_what_has_one_sign(model, monkeypatch):
    """Softmax's output."""
    monkeypatch.setattr("quant.slopes.SAMPLES", 8)
    quantize_model(model, 4, 8, recipe=INPUTS.without_zero_points())
    with observing(model), torch.no_grad():
        forward(model, IMAGES, 32)
    acts = dict(named_activations(model))
    assert {bits_in_use(act) for name, act in acts.items() if name.endswith(("act_probs", "act_key"))} == {7, 8}
    before = activation_ranges(model)
    search_ranges(model, IMAGES, 32)
    assert activation_ranges(model) != before


def test_every_quantizer_of_a_model_is_searched_but_those_in_float():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = QuantAct(4), QuantAct(16), QuantAct(4)
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.third(self.scale * self.second(self.first(x)))  # a constant has no range to narrow

    model, x = Model(), torch.cat([torch.randn(999), torch.tensor([50.0])]).view(20, 50)
    for act, seen in ((model.first, x), (model.second, x), (model.third, torch.zeros(1))):
        act.observe(seen)
    search_ranges(model, x, 7)
    assert model.first.high < 50 and model.second.high == 50 and model.third.high == 0


def test_an_image_at_which_the_logits_are_steep_counts_as_any_other(monkeypatch):
    x = torch.randn(64, 500) ** 3
    g, factors, found = torch.randn_like(x) + torch.randn(64, 1), torch.ones(64, 1), []
    for factors[:3] in (1, 1000):
        act = observed(x, 4)
        slopes = slope_histogram(act, x, g * factors)
        monkeypatch.setattr("quant.ranges.slope_histograms", lambda *_, act=act, slopes=slopes: {act: slopes})
        search_ranges(act, x, 64)
        found.append((act.low.item(), act.high.item()))
    assert found[0] == found[1]
    assert search_range(observed(x, 4), slopes)[1].item() != found[0][1]  # as those three would have it
