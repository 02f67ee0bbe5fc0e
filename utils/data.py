"""Image folders in ImageNet's layout, root/{train,val}/<class>/<image>, and the classes that they stand for."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from utils.run.errors import InputError
from utils.run.progress import note
from utils.run.seeds import stream

CLASS_MAP = "class-map.txt"  # in the root of a data set whose folders are some of the classes of a classifier
UNREADABLE = -1  # the label of an image that cannot be decoded


class Images(Dataset):
    """Images of one split with their labels; one that cannot be decoded has the label UNREADABLE, and is not hidden.

    Attributes:
        files: paths in the order of the data set: by class, then by name.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        transform: Callable[[Image.Image], Tensor],
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        folder = root / split
        if not any(entry.is_dir() for entry in folder.iterdir()):
            raise InputError(f"{folder}: expected one folder a class; found none")
        folders = ImageFolder(str(folder), is_valid_file=is_image_file, allow_empty=True)
        if not folders.samples:
            raise InputError(f"{folder}: expected images in its {len(folders.classes)} class folders; found none")
        self.folder, self.classes, self.transform = folder, folders.classes, transform
        chosen = spread(folders.targets, limit, seed) if limit else range(len(folders))
        self.files, self.labels = map(list, zip(*(folders.samples[index] for index in chosen), strict=True))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image, label = self.decode(index)
        return self.transform(image), label, index

    def decode(self, index: int) -> tuple[Image.Image, int]:
        """One image in RGB with its label; a grey one with the label UNREADABLE in the place of a damaged one."""
        file, label = self.files[index], self.labels[index]
        try:
            return read_image(file), label
        except Exception:  # on damaged files Pillow raises nearly everything
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
                raise InputError(
                    f"{problem}: {_some('missing', missing)}{_some('unknown', extra)}a subset needs --class-map"
                )
        if hidden := [name for name in self.classes if name.startswith(".")]:
            raise InputError(f"{problem}: {_some('hidden', hidden)}remove them")
        if len(self.classes) != num_classes:
            raise InputError(f"{problem} ({', '.join(self.classes[:3])}, ...); other folders need --class-map")
        if all(name.isdecimal() for name in self.classes) and self.classes != sorted(self.classes, key=int):
            raise InputError(
                f"{self.folder}: expected names whose order is the classifier's; found numbers, which sort as "
                f"{', '.join(self.classes[:3])}, ...; give their classes with --class-map"
            )

    def match_classes(self, names: Sequence[str]) -> None:
        """Take the labels from what a classifier calls its outputs, which are the folders' names in another order."""
        outputs = {name: index for index, name in enumerate(names)}
        self.labels = [outputs[self.classes[label]] for label in self.labels]
        note(f"{self.folder}: class folders are matched by name, as the model has their names in another order")

    def map_classes(self, path: Path, num_classes: int) -> None:
        """Take the labels from a class map instead of the order of the folders; refuse one that does not fit."""
        lines = read_class_map(path, num_classes)
        for name, (number, _) in lines.items():
            if name not in self.classes:
                raise InputError(f"--class-map {path}, line {number}: no folder '{name}' in {self.folder}")
        if without := [name for name in self.classes if name not in lines]:
            raise InputError(f"--class-map {path}: expected a line for every folder; {_some('without', without)[:-2]}")
        self.labels = [lines[self.classes[label]][1] for label in self.labels]


def validation_images(
    root: Path,
    transform: Callable[[Image.Image], Tensor],
    num_classes: int,
    class_map: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> Images:
    """The validation split of a data set, with the labels of a classifier's outputs.

    Args:
        class_map: a file with the class of each folder; None for class-map.txt in `root`, if it is there and there are
            fewer folders than classes, and else for the order of the names.
        limit: take so many, drawn with the seed and spread over the classes; None for all.
        names: what the classifier calls its outputs, if it does. Where they are the folders' names, they say which is
            which; else it is the order of the folders.
    """
    images = Images(root, "val", transform, limit, seed)
    if not class_map and len(images.classes) < num_classes and (root / CLASS_MAP).is_file():
        class_map = root / CLASS_MAP
    if class_map:
        images.map_classes(class_map, num_classes)
    elif names and sorted(names) == images.classes != list(names):
        images.match_classes(names)
    else:
        images.check_classes(num_classes)
    return images


def open_data(
    root: Path,
    transform: Callable[[Image.Image], Tensor],
    num_classes: int,
    train: bool = False,
    class_map: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> dict[str, Images]:
    """The splits of a data set that a run needs, by name: val, and train where it is asked for.

    Of a model without classifier, num_classes 0, the labels are the folders'; train is then where it has neighbours.
    The other arguments are those of `validation_images`.
    """
    if num_classes:
        data = {"val": validation_images(root, transform, num_classes, class_map, limit, seed, names)}
    elif class_map:
        raise InputError("--class-map: orders the outputs of a classifier; the model has none")
    else:
        data = {"val": Images(root, "val", transform, limit, seed)}
    if train or not num_classes:
        check_dataset(root, ["train"])
        data["train"] = Images(root, "train", transform)
    if not num_classes:
        check_same_classes(data["train"], data["val"])
    return data


def spread(labels: Sequence[int], count: int, seed: int) -> list[int]:
    """Draw `count` positions of `labels`, as many of each label as of any other or one more; in ascending order."""
    drawn, ranks = Counter(), []
    for order, position in enumerate(torch.randperm(len(labels), generator=stream(seed, "limit")).tolist()):
        ranks.append((drawn[labels[position]], order, position))  # the n-th that is drawn of its label
        drawn[labels[position]] += 1
    return sorted(position for _, _, position in sorted(ranks)[:count])


def is_image_file(path: str) -> bool:
    """Whether the suffix is one that Pillow reads. What is named so and cannot be decoded is reported, not left out."""
    return Image.registered_extensions().get(Path(path).suffix.lower()) in Image.OPEN


def read_image(path: str | Path) -> Image.Image:
    """An image in RGB as ImageNet's evaluation has it: whatever the suffix says, and not turned as EXIF asks for.

    Raises:
        Exception: what Pillow raises on a damaged file; ValueError where it is not defined which value is white.
    """
    with Image.open(path) as image:
        if image.mode.startswith("I;16"):  # convert would clip all but the darkest 1/256 to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError("expected 8 or 16 bits a pixel; got 32")
        return image.convert("RGB")


def read_class_map(path: Path, num_classes: int) -> dict[str, tuple[int, int]]:
    """Read a text file with one line a folder: its name, white space, and the index of its class.

    Returns:
        Number of the line and index of the class, by folder.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--class-map {path}: not a readable text file ({error})") from error
    lines: dict[str, tuple[int, int]] = {}
    line_of: dict[int, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name, *index = line.rsplit(maxsplit=1)
        problem = f"--class-map {path}, line {number}"
        if not (index and re.fullmatch("[0-9]{1,9}", index[0])):
            raise InputError(f"{problem}: expected the name of a folder and the index of a class; got {line[:80]!r}")
        name, label = name.strip(), int(index[0])
        if label >= num_classes:
            raise InputError(f"{problem}: expected a class from 0 to {num_classes - 1}; got {label}")
        if name in lines:
            raise InputError(f"{problem}: folder '{name}' again, after line {lines[name][0]}")
        if label in line_of:
            raise InputError(f"{problem}: class {label} again, after line {line_of[label]}")
        lines[name], line_of[label] = (number, label), number
    return lines


def check_dataset(root: Path, splits: Sequence[str]) -> None:
    """Refuse a data set root that lacks one of the folders `splits`, before the images in it are looked for."""
    if not root.is_dir():
        raise InputError(f"--dataset {root}: no such folder")
    for split in splits:
        if not (root / split).is_dir():
            raise InputError(f"--dataset {root}: expected a folder {split}/ in it, with one folder a class")


def check_same_classes(train: Images, val: Images) -> None:
    """Refuse two splits whose labels do not mean the same."""
    if train.classes != val.classes:
        only = sorted(set(train.classes) ^ set(val.classes))
        raise InputError(
            f"{val.folder}: expected the class folders of {train.folder}; {_some('not in both', only)[:-2]}"
        )


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
