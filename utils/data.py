"""Image folders in ImageNet's layout: root/{train,val}/<class>/<image>."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from utils.errors import InputError
from utils.seeds import stream

UNREADABLE = -1  # the label of an image that cannot be decoded


class Images(Dataset):
    """Images of one split with their labels; one that cannot be decoded has the label UNREADABLE, and is not hidden.

    Attributes:
        files: paths in the order of the data set: by class, then by name.
    """

    def __init__(
        self, root: Path, split: str, transform: Callable[[Image.Image], Tensor], limit: int | None = None
    ) -> None:
        folder = root / split
        if not any(entry.is_dir() for entry in folder.iterdir()):
            raise InputError(f"{folder}: expected one folder a class; found none")
        folders = ImageFolder(str(folder), allow_empty=True)
        if not folders.samples:
            raise InputError(f"{folder}: expected images in its {len(folders.classes)} class folders; found none")
        self.folder, self.classes, self.transform = folder, folders.classes, transform
        self.files, self.labels = map(list, zip(*folders.samples[:limit], strict=True))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image, label = self.decode(index)
        return self.transform(image), label, index

    def decode(self, index: int) -> tuple[Image.Image, int]:
        """One image in RGB with its label; a grey one with the label UNREADABLE in the place of a damaged one."""
        try:
            return Image.open(self.files[index]).convert("RGB"), self.labels[index]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises on damaged files
            return Image.new("RGB", (64, 64), "grey"), UNREADABLE

    def check_classes(self, num_classes: int) -> None:
        """Refuse class folders that are not the classifier's: a missing or extra one would shift every label."""
        expected = ImageNetInfo().label_names()
        looks_like_imagenet = sum(bool(re.fullmatch(r"n\d{8}", name)) for name in self.classes) > len(self.classes) / 2
        problem = (
            f"{self.folder}: expected {num_classes} class folders, as the classifier has; found {len(self.classes)}"
        )
        if num_classes == len(expected) and looks_like_imagenet:
            extra, missing = sorted(set(self.classes) - set(expected)), sorted(set(expected) - set(self.classes))
            if extra or missing:
                raise InputError(f"{problem}: {_some('missing', missing)}{_some('unknown', extra)}".rstrip("; "))
        if len(self.classes) != num_classes:
            raise InputError(f"{problem} ({', '.join(self.classes[:3])}, ...)")


def check_dataset(root: Path, splits: list[str]) -> None:
    """Refuse a data set root that lacks one of the folders `splits`, before the images in it are looked for."""
    if not root.is_dir():
        raise InputError(f"--dataset {root}: no such folder")
    for split in splits:
        if not (root / split).is_dir():
            raise InputError(f"--dataset {root}: expected a folder {split}/ in it, with one folder a class")


def draw_images(images: Images, count: int, seed: int) -> Tensor:
    """Draw `count` images at random, without labels: (count, 3, H, W)."""
    if len(images) < count:
        raise InputError(f"{images.folder}: expected at least {count} images to calibrate with; found {len(images)}")
    chosen = []
    for index in torch.randperm(len(images), generator=stream(seed, "real")).tolist():
        image, label, _ = images[index]
        if label == UNREADABLE:
            raise InputError(f"{images.files[index]}: not a readable image")
        chosen.append(image)
        if len(chosen) == count:
            break
    return torch.stack(chosen)


def _some(what: str, names: list[str]) -> str:
    return f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); " if names else ""
