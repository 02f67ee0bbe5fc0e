"""Validation images decoded once: resized and cropped pixels in one file, for the many runs of a sweep.

ImageNet's 50,000 validation images at 224x224 take 7.5 GB. The pixels are those that decoding gives, bit for bit.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose

from utils.data import UNREADABLE, Images
from utils.loader import Shard, image_loader
from utils.run.distributed import first_process_first
from utils.run.errors import InputError
from utils.run.files import MEGABYTE, check_writable, replacing
from utils.run.options import available_cores
from utils.run.progress import progress_bar


def validation_loader(images: Images, batch_size: int, workers: int, cache: Path | None = None) -> DataLoader:
    """Batches of those images that fall to this process of a torchrun.

    Args:
        workers: processes that decode; no more than there are cores.
        cache: a folder to keep the decoded images in.
    """
    workers = min(workers, available_cores())
    with first_process_first():
        val = CachedImages(images, cache, workers) if cache else images
    return image_loader(Shard(val), batch_size, workers, pin_memory=torch.cuda.is_available())


class CachedImages(Dataset):
    """The same items as `images`, from a file in `folder` that is written if it is not there.

    The file's name is a hash of the transform and of the images' paths, sizes and times: what has changed is decoded
    anew.
    """

    def __init__(self, images: Images, folder: Path, workers: int) -> None:
        check_cache(images, folder)
        path, pixels = _path(images, folder), _Pixels(images)
        if not path.exists():
            _write(path, pixels, workers)
        self.images = images
        self.files, self.finish = images.files, Compose(images.transform.transforms[-2:])  # to tensor, normalise
        try:
            self.pixels, self.labels = np.load(path, mmap_mode="r"), np.load(path.with_suffix(".labels.npy"))
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"--cache {path}: damaged ({error}); remove it, and it is written anew") from error

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        if self.labels[index] == UNREADABLE:  # then: its permissions, or the network, may have changed
            return self.images[index]
        image = Image.fromarray(np.array(self.pixels[index]))
        return self.finish(image), int(self.labels[index]), index


class _Pixels(Dataset):
    """Decoded, resized and cropped images: uint8 (H, W, 3), label."""

    def __init__(self, images: Images) -> None:
        self.images, self.geometry = images, Compose(images.transform.transforms[:-2])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image, label = self.images.decode(index)
        return np.array(self.geometry(image)), label


def check_cache(images: Images, folder: Path) -> None:
    """Refuse a folder that cannot be written to, or has no space for `images` if they are not there yet."""
    there = _path(images, folder).exists()
    check_writable(folder, MEGABYTE if there else MEGABYTE + len(images) * _Pixels(images)[0][0].nbytes)


def _path(images: Images, folder: Path) -> Path:
    """The file of these images, as they are now, in `folder`."""
    stats = [(file, *_size_and_time(file)) for file in images.files]
    key = hashlib.sha256(repr((images.transform.transforms[:-2], images.labels, stats)).encode()).hexdigest()[:16]
    return folder / f"images-{key}.npy"


def _size_and_time(file: str) -> tuple[int, int]:
    """Bytes, and time of the last change; zeros for a file that is gone, which is unreadable later on."""
    try:
        found = Path(file).stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _write(path: Path, pixels: _Pixels, workers: int) -> None:
    """Write the labels, then the pixels: the pixels' file is there only when both are whole."""
    labels = []
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(pixels), *pixels[0][0].shape)}
    with replacing(path) as draft:
        # Not a memory map: where the disk is full, writing to one ends the process without a word.
        with draft.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for batch, batch_labels in progress_bar(image_loader(pixels, 64, workers), desc="decoding", unit="batch"):
                file.write(np.asarray(batch))
                labels.append(np.asarray(batch_labels))
        with replacing(path.with_suffix(".labels.npy")) as labels_draft:
            np.save(labels_draft, np.concatenate(labels))
