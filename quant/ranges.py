"""Ranges by the error of the logits: clip what is rare, where that rounds the rest more finely and the logits gain.

What rounding a tensor costs depends on where it goes: many small outputs of softmax, all rounded to zero, move the next
layer together, and errors of random sign cancel. To first order the errors e move the logits by J e, with J from the
tensor to the logits. For r ~ N(0, I) the mean of (r J e)^2 is |J e|^2, and g = r J is one backward pass of the float
model. An error is a function of the value, so a histogram of an image's values that counts each of them as its g tells
g e for every range. The lengths of g are made alike, lest a few images decide for all. The ends of a range are drawn in
by whole percents: both, then one after the other.

Fisher-weighted ranges (as in PTQ4ViT, Yuan et al., ECCV 2022) sum (g e)^2 value by value, as if no two errors
had to do with each other; the squared error of the tensor (OMSE) has all g alike. This one is ours.

Where all activations have the use of 8 bits, what was observed is kept: clipping gains next to nothing there, and
photographs reach further than the images that are generated.
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.modules import QuantAct, named_activations
from quant.quantizers import FLOAT_BITS, fake_quantize_
from quant.windows import ALIKE

BINS = 2048  # eight for each step of 8 bits
SAMPLES = 256  # of r and an image: the mean of so many squares is known to 9 %
FACTORS = torch.arange(100, 9, -1) / 100  # of an end of a range
ROUNDS = 2  # of the ends one after the other
MOST_BITS = 7  # in use, of the activation that has the fewest, for any to be clipped
Contexts = Mapping[QuantAct, nn.Module]  # quantizers, and the attention of each
NONE: Contexts = MappingProxyType({})


def search_ranges(model: nn.Module, images: Tensor, batch_size: int, contexts: Contexts = NONE) -> None:
    """Narrow the range of every activation quantizer of a model to that of the least error of the logits.

    If all of them have the use of more than MOST_BITS they stay as they are.

    Args:
        model: its ranges are observed, but not frozen.
        images: those that they were observed on, (B, 3, H, W).
        batch_size: images a pass.
        contexts: those that are searched as quant/windows.py says.
    """
    if min(bits_in_use(act) for _, act in named_activations(model)) > MOST_BITS:
        return
    for act, slopes in slope_histograms(model, images, batch_size, contexts).items():
        act.low, act.high = search_range(act, F.normalize(slopes))  # an image counts as any other, however steep it is


def bits_in_use(act: QuantAct) -> int:
    """Of an activation of one sign a symmetric grid has one bit less."""
    return act.bits - int(act.symmetric and bool(act.low >= 0 or act.high <= 0))


@torch.enable_grad()
def slope_histograms(
    model: nn.Module, images: Tensor, batch_size: int, contexts: Contexts = NONE
) -> dict[QuantAct, Tensor]:
    """Of every quantizer, the sums of g over the values in each part of its range: a row a sample, (n, BINS)."""
    acts = [act for _, act in named_activations(model) if act.bits != FLOAT_BITS and act.low < act.high]
    rows: dict[QuantAct, list[Tensor]] = {act: [] for act in acts}
    latest: dict[QuantAct, Tensor] = {}

    def watch(act: QuantAct, inputs: tuple[Tensor]) -> None:
        latest[act] = inputs[0].detach()  # a hook that held the tensor itself would keep the whole graph, as a cycle
        if act in rows and inputs[0].requires_grad:
            inputs[0].register_hook(partial(count, act, latest[act], contexts.get(act)))

    def count(act: QuantAct, x: Tensor, attention: nn.Module | None, g: Tensor) -> None:
        x, g = (tensor.reshape(len(batch), -1) for tensor in (x, g))
        rows[act].append(slope_histogram(act, x, g))
        if attention is not None:
            some = slice(-start % ALIKE, None, ALIKE)
            values = attention.merge_heads(latest[attention.act_value]).reshape(x.shape)
            rows[act].append(slope_histogram(act, values[some], g[some]))

    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)
    with ExitStack() as hooks:
        for _, act in named_activations(model):
            hooks.enter_context(act.register_forward_pre_hook(watch))
        for _ in range(math.ceil(SAMPLES / len(images))):
            for start in range(0, len(images), batch_size):
                batch = images[start : start + batch_size].to(device)
                logits = model(batch.requires_grad_())
                r = torch.randn(logits.shape, generator=generator).to(device)
                torch.autograd.grad(logits, batch, r)
    return {act: torch.cat(some) for act, some in rows.items() if some}


def slope_histogram(act: QuantAct, x: Tensor, g: Tensor) -> Tensor:
    """The sums of g over the values x, both (samples, n), in each part of the range: (samples, BINS)."""
    parts = ((x - act.low) * (BINS / (act.high - act.low))).long().clamp_(0, BINS - 1)
    return torch.zeros(len(x), BINS, device=x.device).scatter_add_(1, parts, g.float())


@torch.no_grad()
def search_range(act: QuantAct, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """The range of the least error of the logits, within the one that `act` has observed.

    Args:
        slopes: (n, BINS).

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
        best = range_errors(act, lows, highs, values, slopes).argmin()
        low, high = lows[best], highs[best]
    return low, high


def range_errors(act: QuantAct, low: Tensor, high: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
    """Sum over the samples of (g e)^2 for ranges (K,), where `values` are the middles of their parts: (K,)."""
    scale, zero_point = act.fit(low, high)
    errors = fake_quantize_(values.repeat(len(low), 1), scale[:, None], zero_point[..., None], act.grid) - values
    return (slopes @ errors.T).square().sum(0)
