"""Telling that there is no memory left from other errors."""

from collections.abc import Callable
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
