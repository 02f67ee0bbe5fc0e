"""Ranges by squared error: clip what is rare, where that rounds the rest more finely.

The ends of a range are drawn in by whole percents: both, then one after the other. What a candidate costs is
read from a histogram; the error is that of the tensor itself, not of the output of the layer that reads it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quant.modules import QuantAct, named_activations
from quant.quantizers import FLOAT_BITS, fake_quantize_

BINS = 2048  # eight for each step of 8 bits
FACTORS = torch.arange(100, 9, -1) / 100  # of an end of a range
ROUNDS = 2  # of the ends one after the other


@torch.no_grad()
def search_ranges(model: nn.Module, run: Callable[[], object]) -> None:
    """Narrow the range of every activation quantizer of a model to that of the least squared error.

    Args:
        model: its ranges are observed, but not frozen.
        run: passes the calibration images through the model.
    """
    acts = [act for _, act in named_activations(model) if act.bits != FLOAT_BITS and act.low < act.high]
    counts = [torch.zeros(BINS, device=act.low.device) for act in acts]
    hooks = [act.register_forward_pre_hook(_counter(count)) for act, count in zip(acts, counts, strict=True)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for act, count in zip(acts, counts, strict=True):
        act.low, act.high = search_range(act, count)


def _counter(count: Tensor) -> Callable[[QuantAct, tuple[Tensor]], None]:
    def hook(act: QuantAct, inputs: tuple[Tensor]) -> None:
        count.add_(torch.histc(inputs[0].float(), BINS, act.low.item(), act.high.item()))

    return hook


def search_range(act: QuantAct, count: Tensor) -> tuple[Tensor, Tensor]:
    """The range of the least squared error, within the one that `act` has observed.

    Args:
        count: how many values lie in each part of that range, (BINS,).

    Returns:
        low and high, 0-d.
    """
    low, high = act.low, act.high
    width = (high - low) / BINS
    values = low + width * (torch.arange(BINS, device=low.device) + 0.5)  # the middle of each part
    factors = FACTORS.to(low.device)
    for ends in ("both", *("high", "low") * ROUNDS):  # both at first, as the larger alone is what a symmetric one has
        lows = low.expand(len(factors)) if ends == "high" else act.low * factors
        highs = high.expand(len(factors)) if ends == "low" else act.high * factors
        best = range_errors(act, lows, highs, values, count).argmin()
        low, high = lows[best], highs[best]
    return low, high


def range_errors(act: QuantAct, low: Tensor, high: Tensor, values: Tensor, count: Tensor) -> Tensor:
    """Sum of squared errors of `values` (n,), each so often as `count` (n,) says, for ranges (K,): (K,)."""
    scale, zero_point = act.fit(low, high)
    rounded = fake_quantize_(values.repeat(len(low), 1), scale[:, None], zero_point[..., None], act.grid)  # (K, n)
    return (rounded - values).square() @ count
