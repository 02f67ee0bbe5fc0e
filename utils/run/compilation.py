"""Functions that are called very often, made fast: torch.compile where it works, and a line that says where not."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from utils.run.progress import note
from utils.run.replay import replayed

# For what is called very often with the same shapes: on a GPU its kernels are then replayed as CUDA graphs
REPEATED = {"dynamic": False, "mode": "reduce-overhead"}


def repeated(
    function: Callable, device: torch.device, compile: bool, trial: Callable, begin: Callable[[], None] = lambda: None
) -> AbstractContextManager[Callable]:
    """The context of `function` for very many calls: compiled if asked for, else, on a GPU, recorded and replayed.

    Args:
        function: of tensors on the device, as `replayed` has it.
        trial, begin: as `compiled_when_called` has them.
    """
    if compile:
        return nullcontext(compiled_when_called(function, trial, begin))
    return replayed(function) if device.type == "cuda" else nullcontext(function)


def compiled(function: Callable, trial: Callable[[Callable], object]) -> Callable:
    """`function` compiled, if `trial` goes well; else `function` itself, which then runs as it is.

    Args:
        trial: calls the function that it is given as it will be called, backward pass and all.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of there being no CUDA
    fast = torch.compile(function, fullgraph=True, **REPEATED)
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


def compiled_when_called(function: Callable, trial: Callable, begin: Callable[[], None]) -> Callable:
    """`function`, compiled on its first call for many more with arguments of the same shapes.

    Args:
        trial: is given the compiled function and these arguments, and calls it as it will be called.
        begin: is called before.
    """
    fast: list[Callable] = []

    def call(*arguments: Any) -> Any:
        if not fast:
            begin()
            fast.append(compiled(function, lambda candidate: trial(candidate, *arguments)))
        return fast[0](*arguments)

    return call
