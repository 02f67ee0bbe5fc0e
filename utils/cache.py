"""Validation images decoded once: resized and cropped pixels in one file, for the many runs of a sweep.

ImageNet's 50,000 validation images at 224x224 take 7.5 GB. The pixels are those that decoding gives, bit for bit.
"""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose

from utils.data import UNREADABLE, Images
from utils.files import check_writable, replacing
from utils.progress import progress_bar


class CachedImages(Dataset):
    """The same items as `images`, from a file in `folder` that is written if it is not there.

    The file's name is a hash of the transform and of the images' paths, sizes and times: what has changed is decoded
    anew.
    """

    def __init__(self, images: Images, folder: Path, workers: int) -> None:
        check_writable(folder)
        *geometry, to_tensor, normalize = images.transform.transforms
        self.files, self.finish = images.files, Compose([to_tensor, normalize])
        stats = [(file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in images.files]
        key = hashlib.sha256(repr((geometry, images.labels, stats)).encode()).hexdigest()[:16]
        path = folder / f"images-{key}.npy"
        if not path.exists():
            _write(path, _Pixels(images, Compose(geometry)), workers)
        self.pixels, self.labels = np.load(path, mmap_mode="r"), np.load(path.with_suffix(".labels.npy"))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image = Image.fromarray(np.array(self.pixels[index]))
        return self.finish(image), int(self.labels[index]), index


class _Pixels(Dataset):
    """Decoded, resized and cropped images: uint8 (H, W, 3), label."""

    def __init__(self, images: Images, geometry: Compose) -> None:
        self.images, self.geometry = images, geometry

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image, label = self.images.decode(index)
        return np.array(self.geometry(image)), label


def _write(path: Path, pixels: _Pixels, workers: int) -> None:
    """Write the labels, then the pixels: the pixels' file is there only when both are whole."""
    labels = np.full(len(pixels), UNREADABLE)
    with replacing(path) as draft:
        shape = (len(pixels), *pixels[0][0].shape)
        file = np.lib.format.open_memmap(draft, mode="w+", dtype=np.uint8, shape=shape)
        done = 0
        for batch, batch_labels in progress_bar(
            DataLoader(pixels, 64, num_workers=workers), desc="decoding", unit="batch"
        ):
            file[done : done + len(batch)] = batch.numpy()
            labels[done : done + len(batch)] = batch_labels.numpy()
            done += len(batch)
        file.flush()
        with replacing(path.with_suffix(".labels.npy")) as labels_draft:
            np.save(labels_draft, labels)
