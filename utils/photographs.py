"""Photographs by name: cifar10 and imagenette, written below data/ in the ImageFolder layout.

    data/cifar10/{train,val}/airplane/00000.png ...    from torchvision's download, or a local archive or folder

CIFAR-10 (Krizhevsky, 2009) has 50,000 and 10,000 photographs of 32x32 pixels in ten classes. Imagenette (Howard, 2019)
is ten classes of ImageNet in 320 pixels; its class map makes of its folders outputs of a classifier of ImageNet.
"""

import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from timm.data import ImageNetInfo
from torchvision.datasets import CIFAR10, Imagenette
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.data import CLASS_MAP, check_dataset
from utils.fractals import write_demo_data
from utils.run.errors import InputError
from utils.run.files import new_folder

DATA = Path(__file__).resolve().parents[1] / "data"
DEMO = "demo"  # the name of the fractals
SPLITS = {"train": ("train",), "val": ("val", "test")}  # the project's name, and those in archives
_ZSTD = b"\x28\xb5\x2f\xfd"  # how a zstd file begins (RFC 8878, section 3.1.1)
_TIMEOUT = 10  # seconds for the host of a download to answer


@dataclass(frozen=True)
class Photographs:
    """A data set that is known by name."""

    classes: tuple[str, ...]  # the names of its folders
    url: str  # of torchvision's download, asked before it begins, which has no time limit of its own
    archive: str  # what --dataset-archive may name
    download: Callable[[Path], object]  # into a folder


_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PHOTOGRAPHS = {
    "cifar10": Photographs(
        _CIFAR10_CLASSES, CIFAR10.url, CIFAR10.filename, lambda folder: CIFAR10(folder, download=True)
    ),
    "imagenette": Photographs(
        tuple(Imagenette._WNID_TO_CLASS),
        Imagenette._ARCHIVES["320px"][0],
        "imagenette2-320.tgz",
        lambda folder: Imagenette(folder, size="320px", download=True),
    ),
}


def find_dataset(given: Path | str, archive: Path | None = None, splits: Sequence[str] = ("val",)) -> Path:
    """The root that --dataset names: a folder where there is one, else a data set by name, which goes into data/.

    Args:
        given: a path; or as text a name for certain, whatever folders there are: demo, cifar10, imagenette.
        archive: see `prepare_dataset`.
        splits: folders that are to be there.

    Raises:
        InputError: as `prepare_dataset` and `check_dataset`; or an archive for what needs none.
    """
    by_name = isinstance(given, str) or not given.is_dir()
    if by_name and str(given) in PHOTOGRAPHS:
        root = prepare_dataset(str(given), DATA, archive)
    elif archive:
        raise InputError(
            f"--dataset-archive: goes with --dataset {' or '.join(PHOTOGRAPHS)}; got --dataset {given}"
            + ("" if by_name else ", a folder here")
        )
    else:
        root = write_demo_data(DATA / DEMO) if by_name and str(given) == DEMO else Path(given)
    check_dataset(root, splits)
    return root


def prepare_dataset(name: str, root: Path, archive: Path | None = None) -> Path:
    """Write root/<name>/{train,val}/<class>/ unless it is there; whole or not at all.

    Image files of an archive are kept as they are; torchvision's batches of CIFAR-10 become PNG files.

    Args:
        name: cifar10 or imagenette.
        root: the folder of data sets.
        archive: a .tar, .tar.gz or .tar.zst file, or a folder, with torchvision's batches of CIFAR-10 or with
            {train,val or test}/<class>/ in it. None: torchvision's download.

    Returns:
        root/<name>, an ImageFolder-style data set root.

    Raises:
        InputError: no network and no archive; an archive that cannot be read, or that holds other classes.
    """
    target, dataset = root / name, PHOTOGRAPHS[name]
    if target.is_dir():
        return target
    with new_folder(target) as draft, _unpacked(name, archive, root) as source:
        if (source / CIFAR10.base_folder).is_dir():
            _write_batches(source, draft)
        else:
            _copy_folders(source, draft, dataset.classes, archive or dataset.url)
        if name == "imagenette":
            numbers = {wnid: index for index, wnid in enumerate(ImageNetInfo().label_names())}
            lines = [f"{wnid} {numbers[wnid]}\n" for wnid in sorted(dataset.classes)]
            (draft / CLASS_MAP).write_text("".join(lines))
    return target


@contextmanager
def _unpacked(name: str, archive: Path | None, root: Path) -> Iterator[Path]:
    """A folder with what is in the archive, or in the download; removed afterwards if it is not the user's own."""
    if archive and archive.is_dir():
        yield archive
        return
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root, ignore_cleanup_errors=True) as folder:
        if archive:
            _extract(archive, Path(folder))
        else:
            _download(name, Path(folder))
        yield Path(folder)


def _download(name: str, folder: Path) -> None:
    dataset = PHOTOGRAPHS[name]
    try:
        with urllib.request.urlopen(urllib.request.Request(dataset.url, method="HEAD"), timeout=_TIMEOUT):
            pass
        dataset.download(folder)
    except (OSError, RuntimeError) as error:  # the latter: what came has another checksum
        raise InputError(
            f"--dataset {name}: {dataset.url} cannot be downloaded ({getattr(error, 'reason', error)}); bring the file "
            f"{dataset.archive}, or a folder with train/ and val/, and name it with --dataset-archive"
        ) from error


def _extract(archive: Path, folder: Path) -> None:
    """Extract a tar archive; nothing of it gets outside `folder` (PEP 706)."""
    if not hasattr(tarfile, "data_filter"):  # Debian 12 has Python 3.11.2
        raise InputError(
            f"--dataset-archive {archive}: to unpack it safely Python 3.10.12, 3.11.4 or a newer one is needed; unpack "
            "it elsewhere and name the folder"
        )
    try:
        with archive.open("rb") as file:
            compressed = file.read(len(_ZSTD)) == _ZSTD
        if compressed:
            _extract_zstd(archive, folder)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
    except FileNotFoundError as error:
        if error.filename != "zstd":
            raise InputError(f"--dataset-archive {archive}: no such file or folder") from error
        raise InputError(
            f"--dataset-archive {archive}: the command zstd, which unpacks it, is not there; install it, or unpack the "
            "archive elsewhere and name the folder"
        ) from error
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"--dataset-archive {archive}: not a readable tar archive ({error})") from error


def _extract_zstd(archive: Path, folder: Path) -> None:
    """The same through the command zstd, as Python has no module for it before 3.14."""
    command = ["zstd", "-dcq", archive]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            tar.extractall(folder, filter="data")
        while process.stdout.read(2**20):  # what follows the archive's end; zstd fails if it cannot write it
            pass
    if process.returncode:
        raise EOFError("it is damaged, or not whole")


def _write_batches(source: Path, draft: Path) -> None:
    """Write torchvision's batches, whose checksums it compares before it unpickles anything, as PNG files."""
    for split, train in (("train", True), ("val", False)):
        try:
            images = CIFAR10(source, train=train)
        except RuntimeError as error:
            raise InputError(f"{source / CIFAR10.base_folder}: not the files of CIFAR-10 ({error})") from error
        for name in images.classes:
            (draft / split / name).mkdir(parents=True)
        for index, (pixels, label) in enumerate(zip(images.data, images.targets, strict=True)):
            Image.fromarray(pixels).save(draft / split / images.classes[label] / f"{index:05d}.png")


def _copy_folders(source: Path, draft: Path, classes: tuple[str, ...], origin: Path | str) -> None:
    """Copy the image files of the class folders; refuse what has other classes, or a class without images."""
    found = _find_splits(source)
    if not found:
        raise InputError(f"{origin}: expected folders train/ and val/ (or test/) in it, with one folder a class")
    for split, folder in found.items():
        names = {entry.name for entry in folder.iterdir() if entry.is_dir()}
        if names != set(classes):
            raise InputError(
                f"{origin}: expected the {len(classes)} class folders {', '.join(sorted(classes)[:3])}, ... in "
                f"{folder.name}/; found {len(names)} ({', '.join(sorted(names)[:3])})"
            )
        for name in classes:
            files = [file for file in (folder / name).iterdir() if file.suffix.lower() in IMG_EXTENSIONS]
            if not files:
                raise InputError(f"{origin}: expected images in {folder.name}/{name}/; found none")
            (draft / split / name).mkdir(parents=True)
            for file in files:
                shutil.copyfile(file, draft / split / name / file.name)


def _find_splits(source: Path) -> dict[str, Path]:
    """The folders of both splits, in `source` or in a folder in it; empty if there are none."""
    for parent in (source, *sorted(entry for entry in source.iterdir() if entry.is_dir())):
        found = {
            split: folder for split, names in SPLITS.items() for name in names if (folder := parent / name).is_dir()
        }
        if len(found) == len(SPLITS):
            return found
    return {}
