"""torch.compile where it works, and a line that says so where it does not."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quant.quantizers import fake_quantize_
from utils.progress import note

# For what is called very often with the same shapes: on a GPU its kernels are then replayed as CUDA graphs
REPEATED = {"dynamic": False, "mode": "reduce-overhead"}


def compiled(function: Callable, trial: Callable[[Callable], object], **options: Any) -> Callable:
    """`function` compiled, if `trial` goes well; else `function` itself, which then runs as it is.

    Args:
        trial: calls the function that it is given as it will be called, backward pass and all.
        options: of torch.compile.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of there being no CUDA
    fast = torch.compile(function, fullgraph=True, **options)
    try:
        for _ in range(3):  # the second call records CUDA graphs, the third is the first to replay them
            trial(fast)
        return fast
    except Exception as error:  # no compiler, no Triton, no memory, a part that cannot be traced: of many types
        cause = getattr(error, "inner_exception", error)
        reason = str(cause).strip() or type(cause).__name__
        note(f"torch.compile failed; going on without it ({reason.splitlines()[0]})")
    torch.compiler.reset()  # what is left of the attempt holds memory
    return function


@cache  # for all models of a process, as torch.compile keeps but a few variants of a function
def fused_rounding(device: torch.device) -> Callable[..., Tensor]:
    """quant.quantizers.fake_quantize_ in one pass instead of six, to the same bits; it has no gradient."""
    scale, zero_point = torch.ones((), device=device), torch.zeros((), device=device)
    exact = {"eager_numerics.division_rounding": True}  # on a GPU division would be off by a bit

    @torch.inference_mode()
    def trial(kernel: Callable[..., Tensor]) -> Tensor:
        return kernel(torch.ones(8, device=device), scale, zero_point, (0, 255))

    fast = compiled(fake_quantize_, trial, dynamic=True, options=exact)
    return lambda x, *grid: fast(x.data, *grid)  # data: what x may be a view of would make a variant of each shape
