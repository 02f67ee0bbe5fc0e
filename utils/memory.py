"""Telling that there is no memory left from other errors."""

import torch

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
