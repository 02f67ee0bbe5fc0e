"""Files that are whole or absent, also after kill -9 and on a full disk; folders that one run writes to at a time."""

import fcntl
import glob
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from utils.run.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor  # which takes seconds to import, and scripts that only keep rows need no tensors

MEGABYTE = 2**20


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it takes the place of `path` when the block ends well, else it is removed.

    Whatever ends the process, `path` is the old file or the new one. A draft that kill -9 leaves behind is hidden, and
    is removed when that file is next written.

    Raises:
        InputError: the file cannot be written, as on a full disk.
    """
    draft = path.parent / f".{path.stem}-{secrets.token_hex(4)}{path.suffix}"
    try:
        _remove_abandoned(path)
        with draft.open("ab") as lock, _removed(draft):
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield draft
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            draft.chmod(0o644)
            os.replace(draft, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def read_tensors(path: Path) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """The tensors of a .safetensors file by name, and its metadata.

    Raises:
        SafetensorError, OSError: it is damaged, or not there.
    """
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return tensors, file.metadata() or {}


def write_json(path: Path, content: dict | list) -> None:
    """Write `content` as indented JSON."""
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, indent=2) + "\n")


def check_writable(folder: Path, space: int = MEGABYTE) -> None:
    """Create `folder` if need be, and make sure that `space` bytes can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise InputError(f"{folder}: expected a folder to write to ({error.strerror or error})") from error
    if free < space:
        raise InputError(
            f"{folder}: expected {space / MEGABYTE:.0f} MiB of free space; the disk has {free / MEGABYTE:.0f}"
        )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to write to; it becomes `path` when the block ends well, else it is removed.

    Where another process makes `path` meanwhile, that one stays: only for folders whose content is always the same.

    Raises:
        InputError: the folder cannot be written, as on a full disk.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            yield draft
            draft.chmod(0o755)
            os.rename(draft, path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        if not path.is_dir():
            raise InputError(f"{path}: cannot be written ({error})") from error


def new_run_folder(parent: Path, name: str) -> Path:
    """Create parent/name, or parent/name-2, -3, ... if that is there: a run never touches another's files."""
    check_writable(parent)
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep `folder` for this process within the block; the lock ends with the process, however that ends.

    Raises:
        InputError: another run has it.
    """
    path, taken_by = folder / ".lock", f"{folder}: another run writes there; expected a folder that no other run uses"
    try:
        opened = path.open("ab")
    except FileNotFoundError as error:  # the other run has removed the folder at this moment
        raise InputError(taken_by) from error
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):  # the latter: the other run ends at this moment
            taken = True
        except OSError:  # a file system without locks
            taken = False
        if taken:
            raise InputError(taken_by)
        with _removed(path):
            yield


@contextmanager
def _removed(path: Path) -> Iterator[None]:
    """Remove a file at the end of the block, if it is still there."""
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove the drafts of `path` that no living process has locked."""
    for draft in path.parent.glob(f".{glob.escape(path.stem)}-{'[0-9a-f]' * 8}{glob.escape(path.suffix)}"):
        with suppress(OSError), draft.open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft.unlink()
