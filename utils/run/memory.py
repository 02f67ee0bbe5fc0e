"""Telling that there is no memory left from other errors."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

Result = TypeVar("Result")

# How torch's devices and allocators, and a loader whose worker the kernel ended, say it
_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DataLoader worker (pid",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` says that memory ran out, on a device or on the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)


def attempt(function: Callable[[], Result]) -> Result | None:
    """What `function` returns; None where the memory does not suffice, and then nothing of the attempt is held."""
    try:
        return function()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


@torch.compiler.set_stance("force_eager")  # compiling for each size would take minutes
def what_fits(function: Callable[[int], object], size: int, advice: Sequence[str] = ()) -> str:
    """What to say when there is not the memory for `size` images: `advice`, and how many there would be for.

    Args:
        function: computes with as many images as it is told, and changes nothing.
    """
    torch.compiler.reset()  # CUDA graphs hold memory
    fits = size // 2
    while fits and attempt(partial(function, fits)) is None:
        fits //= 2
    advice = [*advice, *([f"{fits} images at a time would fit"] if fits else [])]
    return f"with {size} images: {', and '.join(advice) or 'not even one would fit'}"
