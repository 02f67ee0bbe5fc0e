"""What models give for images, as many at a time as there is memory for."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from quant import check_calibrated
from utils.products import linears_by_onednn
from utils.run.errors import InputError
from utils.run.memory import attempt, freed_memory_kept

T = TypeVar("T")
CPU_BATCH = 16  # images a forward pass on a CPU: more are slower, as what lies between two layers leaves its caches


@contextmanager
def inference(*models: nn.Module) -> Iterator[None]:
    """Within the context models are in evaluation mode, keep no graph, and compute as fast as the device can.

    Raises:
        RuntimeError: a swapped model is not calibrated.
    """
    with ExitStack() as contexts:
        for model in dict.fromkeys(models):  # one may be compared with itself
            check_calibrated(model)
            contexts.enter_context(linears_by_onednn(model.eval()))
        contexts.enter_context(freed_memory_kept())
        contexts.enter_context(torch.inference_mode())
        yield


def outputs_of(float_model: nn.Module, quantized: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of both models for `images` (B, 3, H, W), which are as many at a time as there is memory for."""
    models, device = (float_model, quantized), next(float_model.parameters()).device
    with inference(*models):
        parts, _ = in_parts(lambda batch: [model(batch.to(device)) for model in models], CPU_BATCH, images)
        reference, outputs = map(torch.cat, zip(*parts, strict=True))
    return reference, outputs


def in_parts(function: Callable[..., T], size: int, *tensors: Tensor) -> tuple[list[T], int]:
    """What `function` returns for `size` rows of the tensors at a time, or for fewer where the memory does not suffice.

    Returns:
        The results, in order, and the size that sufficed.
    """
    results, done = [], 0
    while done < len(tensors[0]):
        result = attempt(partial(function, *(tensor[done : done + size] for tensor in tensors)))
        if result is None:
            size = halved(min(size, len(tensors[0]) - done))
            continue
        results.append(result)
        done += size
    return results, size


def halved(size: int) -> int:
    """Half as many images a batch; there is no half of one."""
    if size == 1:
        raise InputError("out of memory with one image a batch; expected more memory, or a smaller model")
    return size // 2
