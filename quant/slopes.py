"""Slopes: how much the logits move with the values of an activation, told value by value.

For r ~ N(0, I) and the Jacobian J from a tensor to the logits, the mean of (r J e)^2 is |J e|^2, which errors e of the
tensor cost to first order; and g = r J is one backward pass of the float model. As an error is a function of the value,
a histogram of an image's values that counts each of them as its g tells g e, whatever the rounding is.
"""

import math
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from quant.modules import QuantAct, named_activations
from quant.quantizers import FLOAT_BITS
from quant.windows import ALIKE, Contexts

BINS = 2048  # eight for each step of 8 bits
SAMPLES = 256  # of r and an image: the mean of so many squares is known to 9 %


@torch.enable_grad()
def slope_histograms(
    model: nn.Module, images: Tensor, batch_size: int, contexts: Contexts | None = None
) -> dict[QuantAct, Tensor]:
    """Of every quantizer, the sums of g over the values in each part of its range: a row a sample, (n, BINS).

    Args:
        model: its ranges are observed, but not frozen.
        images: (B, 3, H, W).
        batch_size: images a pass.
        contexts: of one image in ALIKE these have a row more, in which each value is its own context.
    """
    acts = [act for _, act in named_activations(model) if act.bits != FLOAT_BITS and act.low < act.high]
    rows: dict[QuantAct, list[Tensor]] = {act: [] for act in acts}
    contexts, values = contexts or {}, {}

    def keep(act: QuantAct, inputs: tuple[Tensor]) -> None:
        values[act] = inputs[0].detach()

    def watch(act: QuantAct, inputs: tuple[Tensor]) -> None:
        if inputs[0].requires_grad:
            x = inputs[0].detach()  # a hook that held the tensor itself would keep the whole graph, as a cycle
            inputs[0].register_hook(partial(count, act, x, contexts.get(act)))

    def count(act: QuantAct, x: Tensor, attention: nn.Module | None, g: Tensor) -> None:
        x, g = (tensor.reshape(len(batch), -1) for tensor in (x, g))
        rows[act].append(slope_histogram(act, x, g))
        if attention is not None:
            some = slice(-start % ALIKE, None, ALIKE)
            alike = attention.merge_heads(values[attention.act_value]).reshape(x.shape)
            rows[act].append(slope_histogram(act, alike[some], g[some]))

    images, generator = images.to(next(model.parameters()).device), torch.Generator().manual_seed(0)
    with ExitStack() as hooks:
        for attention in contexts.values():
            hooks.enter_context(attention.act_value.register_forward_pre_hook(keep))
        for act in acts:
            hooks.enter_context(act.register_forward_pre_hook(watch))
        for _ in range(math.ceil(SAMPLES / len(images))):
            for start in range(0, len(images), batch_size):
                batch = images[start : start + batch_size].requires_grad_()
                logits = model(batch)
                r = torch.randn(logits.shape, generator=generator).to(logits.device)
                torch.autograd.grad(logits, batch, r)
    return {act: torch.cat(some) for act, some in rows.items() if some}


def slope_histogram(act: QuantAct, x: Tensor, g: Tensor) -> Tensor:
    """The sums of g over the values x, both (samples, n), in each part of the range: (samples, BINS)."""
    parts = ((x - act.low) * (BINS / (act.high - act.low))).long().clamp_(0, BINS - 1)
    return torch.zeros(len(x), BINS, device=x.device).scatter_add_(1, parts, g.float())
