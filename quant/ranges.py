"""Ranges by the error of the logits: clip what is rare, where that rounds the rest more finely and the logits gain.

What rounding a tensor costs depends on where it goes: many small outputs of softmax, all rounded to zero, move the next
layer together, and errors of random sign cancel. To first order the errors e move the logits by J e, with J from the
tensor to the logits, and g e tells its length, for random g = r J (quant/slopes.py). The lengths of g are made alike,
lest a few images decide for all. The ends of a range are drawn in by whole percents: both, then one after the other.

Fisher-weighted ranges (as in PTQ4ViT, Yuan et al., ECCV 2022) sum (g e)^2 value by value, as if no two errors
had to do with each other; the squared error of the tensor (OMSE) has all g alike. This one is ours.

Where all activations have the use of 8 bits, what was observed is kept: clipping gains next to nothing there, and
photographs reach further than the images that are generated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.modules import QuantAct, named_activations
from quant.quantizers import fake_quantize_
from quant.slopes import BINS, slope_histograms
from quant.windows import Contexts

FACTORS = torch.arange(100, 9, -1) / 100  # of an end of a range
ROUNDS = 2  # of the ends one after the other
MOST_BITS = 7  # in use, of the activation that has the fewest, for any to be clipped


def search_ranges(model: nn.Module, images: Tensor, batch_size: int, contexts: Contexts | None = None) -> None:
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
