"""Memory: freed and used again, and errors told from others that say that none is left."""

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

# Options of glibc's malloc.h. The thresholds after a context are the largest that malloc comes to by itself
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
_RETURN = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25}
_open = 0  # contexts of freed_memory_kept, one within the other


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the context what is freed on the host stays with the process, to be used again; then it is given back.

    By itself glibc gives back every tensor above 32 MB, and the kernel clears the pages of the next one, which can take
    as long as computing it. Other C libraries are left as they are.
    """
    global _open
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "mallopt"):  # musl
        yield
        return
    try:
        _open += 1
        for option, value in _KEEP.items():
            library.mallopt(option, value)
        yield
    finally:
        _open -= 1
        if not _open:
            for option, value in _RETURN.items():
                library.mallopt(option, value)
            library.malloc_trim(0)


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
