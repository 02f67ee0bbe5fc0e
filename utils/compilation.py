"""torch.compile where it works, and a line that says so where it does not."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from utils.memory import is_out_of_memory
from utils.progress import note


def compiled(function: Callable, trial: Callable[[Callable], object], **options: Any) -> Callable:
    """`function` compiled, if `trial` goes well; else `function` itself, which then runs as it is.

    Args:
        trial: calls the function that it is given as it will be called, backward pass and all.
        options: of torch.compile.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of there being no CUDA
    fast = torch.compile(function, fullgraph=True, **options)
    try:
        trial(fast)
    except Exception as error:  # no compiler, no Triton, a part that cannot be traced: of many types
        if not is_out_of_memory(error):  # which `function` will meet, too, and tell
            note(f"torch.compile failed; going on without it ({str(error).strip().splitlines()[0]})")
        return function
    return fast
