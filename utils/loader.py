"""The processes that decode images: batches in order, and what of them falls to one process of a torchrun."""

import ctypes
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset

from utils.data import Images
from utils.run.distributed import rank, world_size

SHARED_MEMORY = Path("/dev/shm")  # through which worker processes pass their tensors, on Linux
_PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent ends


def image_loader(images: Dataset, batch_size: int, workers: int, pin_memory: bool = False) -> DataLoader:
    """Batches of `images` in order, decoded by `workers` processes, of which none outlives this one.

    Where the shared memory is too small for the batches, as in many containers, they come through pipes as arrays.

    Args:
        images: tuples whose first item is a tensor or an array.
    """
    options = {}
    if workers and len(images):
        options["worker_init_fn"] = _end_with_parent
        first = np.asarray(images[0][0])
        if not _shared_memory_holds(first.nbytes * min(batch_size, len(images)) * (2 * workers + 1)):  # 2 wait a worker
            options["collate_fn"] = _as_arrays
    return DataLoader(images, batch_size, num_workers=workers, pin_memory=pin_memory, **options)


def _shared_memory_holds(size: int) -> bool:
    return not SHARED_MEMORY.is_dir() or shutil.disk_usage(SHARED_MEMORY).free > size


def _as_arrays(items: Sequence[tuple]) -> list[np.ndarray]:
    """A batch as arrays, which are sent as bytes, where tensors would be put into shared memory."""
    return [np.stack(column) for column in zip(*items, strict=True)]


def _end_with_parent(worker: int) -> None:
    """In a worker process: leave Ctrl-C to the main process, and end when that does, also by kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Shard(Subset):
    """Of `images` those that fall to this process: every world_size-th, from its rank on. Their indices stay."""

    def __init__(self, images: Images) -> None:
        super().__init__(images, range(rank(), len(images), world_size()))
        self.files = images.files
