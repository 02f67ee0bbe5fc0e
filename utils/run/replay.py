"""What a GPU does at every step, recorded once and replayed, so that it does not wait for each kernel's launch."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from utils.run.memory import is_out_of_memory
from utils.run.progress import note


@contextmanager
def replayed(function: Callable[..., Tensor]) -> Iterator[Callable[..., Tensor]]:
    """Within the context: `function`, and its backward pass, as a CUDA graph, recorded anew where shapes change.

    It computes the same bits. Where none can be recorded a line says so, and the function runs as it is.

    Args:
        function: of tensors on a GPU, which launches the same kernels whatever they hold and reads none of them on the
            host. What it returns, and the gradients, hold until the next call.
    """
    recorded: dict[tuple[torch.Size, ...], Callable[..., Tensor]] = {}

    def forget() -> None:
        recorded.clear()
        gc.collect()  # torch's graphs are parts of cycles, and hold the memory of all activations

    def call(*arguments: Tensor) -> Tensor:
        shapes = tuple(argument.shape for argument in arguments)
        with torch.cuda.device_of(arguments[0]):  # of another than the current device nothing would be recorded
            if shapes not in recorded:
                forget()
                recorded[shapes] = _record(function, arguments)
            return recorded[shapes](*arguments)

    try:
        yield call
    finally:
        forget()


def _record(function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """The function as a graph for arguments of these shapes; itself, if that cannot be had."""
    samples = tuple(argument.detach().clone().requires_grad_(argument.requires_grad) for argument in arguments)
    try:
        with warnings.catch_warnings():  # torch's own trial runs have another stream than what it records
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
            return torch.cuda.make_graphed_callables(function, samples)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        note(f"no CUDA graph could be recorded; going on without it ({str(error).splitlines()[0]})")
    return function
