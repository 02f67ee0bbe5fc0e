"""Several processes, started by torchrun, that share the work of one run; in a single process nothing here acts.

    torchrun --nproc_per_node 4 test_quant.py --model deit_base --dataset /path/to/imagenet

Only results travel between processes, so gloo serves GPUs as well. A process that dies is torchrun's business: it ends
the others.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from functools import wraps
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # while others wait, one process may optimise images for long


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started. Within the context only the first one prints to stdout."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        if is_first():
            yield
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process reports, and writes files."""
    return rank() == 0


def by_first(function: Callable[..., T]) -> Callable[..., T | None]:
    """`function`, called by the first process only: for what prints and writes. The others get None."""

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> T | None:
        return function(*arguments, **options) if is_first() else None

    return call


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block before the others: it downloads, checks and fills caches for all."""
    if not is_first():
        with _all_there():
            dist.barrier()
    ended = None
    try:
        yield
    except SystemExit as end:
        if end.code:
            raise
        ended = end  # by --help, which ends the others as well
    if is_first() and world_size() > 1:
        with _all_there():
            dist.barrier()
    if ended:
        raise ended


def gather(value: Any) -> list[Any]:
    """Every process's `value`, in the order of their ranks, in every process."""
    values = [value] * world_size()
    if world_size() > 1:
        with _all_there():
            dist.all_gather_object(values, value)
    return values


@contextmanager
def _all_there() -> Iterator[None]:
    """End without a word where another process has ended: that one, or torchrun's report, tells why."""
    try:
        yield
    except RuntimeError as error:
        if "connection" not in str(error).lower():
            raise
        sys.exit(1)
