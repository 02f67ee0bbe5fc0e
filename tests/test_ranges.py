"""Ranges by squared error against a search that tries everything on the values themselves."""

import pytest
import torch

from quant.modules import QuantAct
from quant.quantizers import fake_quantize_
from quant.ranges import BINS, range_errors, search_range, search_ranges


def observed(x, bits, symmetric=False):
    act = QuantAct(bits, symmetric)
    act.observe(x)
    return act


def squared_error(act, x):
    return (fake_quantize_(x.clone(), *act.fit(act.low, act.high), act.grid) - x).square().sum().item()


def count(act, x):
    return torch.histc(x, BINS, act.low.item(), act.high.item())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("shape", ["normal", "outlier", "gelu", "softmax"])
def test_a_searched_range_costs_hardly_more_than_the_best(shape, bits, symmetric):
    torch.manual_seed(0)
    x = torch.randn(20000)
    x = {
        "normal": x,
        "outlier": torch.cat([x, torch.tensor([30.0])]),
        "gelu": torch.nn.functional.gelu(2 * x),
        "softmax": (3 * x).view(-1, 50).softmax(-1).flatten(),
    }[shape]
    act = observed(x, bits, symmetric)
    seen, errors = (act.low, act.high), []
    for low in torch.arange(10, 101, 3) / 100:
        for high in torch.arange(10, 101, 3) / 100:
            act.low, act.high = seen[0] * low, seen[1] * high
            errors.append(squared_error(act, x))
    act.low, act.high = seen
    act.low, act.high = search_range(act, count(act, x))
    assert act.low.abs() <= seen[0].abs() and act.low < act.high <= seen[1]
    assert squared_error(act, x) < 1.1 * min(errors)


def test_errors_from_a_histogram_are_those_of_the_values():
    x = torch.randn(50000)
    act = observed(x, 4)
    width = (act.high - act.low) / BINS
    values = act.low + width * (torch.arange(BINS) + 0.5)
    error = range_errors(act, act.low[None] / 2, act.high[None] / 2, values, count(act, x))
    act.low, act.high = act.low / 2, act.high / 2
    assert error.item() == pytest.approx(squared_error(act, x), rel=0.01)


def test_every_quantizer_of_a_model_is_searched_but_those_in_float():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = QuantAct(4), QuantAct(16), QuantAct(4)

        def forward(self, x):
            return self.third(0 * self.second(self.first(x)))  # a constant has no range to narrow

    model, batches = Model(), torch.cat([torch.randn(999), torch.tensor([50.0])]).split(250)
    for act in (model.first, model.second):
        [act.observe(batch) for batch in batches]
    model.third.observe(torch.zeros(1))
    search_ranges(model, lambda: [model(batch) for batch in batches])
    assert model.first.high < 50 and model.second.high == 50 and model.third.high == 0
    assert not model.first._forward_pre_hooks
