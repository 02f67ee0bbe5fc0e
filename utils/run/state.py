"""The state of an unfinished computation on disk, to go on from."""

import hashlib
import json
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from utils.run.distributed import is_first
from utils.run.errors import InputError
from utils.run.files import check_writable, locked, read_tensors, replacing
from utils.run.signals import Stopped


def save_state(path: Path, tensors: dict[str, Tensor], identity: dict[str, Any]) -> None:
    """Write the tensors, and of what computation they are: what it depends on, by name."""
    check_writable(path.parent)
    with replacing(path) as draft:
        draft.write_bytes(save(tensors, {"identity": json.dumps(identity)}))


def load_state(path: Path, identity: dict[str, Any]) -> dict[str, Tensor]:
    """Read what `save_state` wrote of the same computation.

    Raises:
        InputError: the file is not readable, or is the state of another computation; names the difference.
    """
    try:
        tensors, about = read_tensors(path)
        found = json.loads(about["identity"])
        differences = [name for name, value in json.loads(json.dumps(identity)).items() if found.get(name) != value]
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected the state of an interrupted run ({error})") from error
    if differences:
        name = differences[0]
        raise InputError(f"{path}: of another run: expected {name} {identity[name]}, got {found.get(name)}")
    return tensors


@contextmanager
def unfinished(folder: Path, resume: bool) -> Iterator[Path]:
    """A folder for the states of a run, its own while the block runs, and removed when the block ends well.

    What an older run left there is gone on from where `resume` asks for it, and removed otherwise.

    Raises:
        InputError: there is nothing to resume, or another run has the folder.
        Stopped: Ctrl-C came between the computations that save a state and the end of the run.
    """
    if not is_first():
        yield folder
        return
    if resume and not _has_states(folder):
        raise InputError(f"--resume: expected the state of an interrupted run in {folder}; found none")
    check_writable(folder)
    try:
        with locked(folder):
            for file in [] if resume else folder.glob("**/*.safetensors"):
                file.unlink()
            yield folder
            for entry in folder.iterdir():
                if entry.name != ".lock":  # without which another run could begin before this one has ended
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    except KeyboardInterrupt as interrupt:
        if isinstance(interrupt, Stopped) or not _has_states(folder):
            raise
        raise Stopped(signal.SIGINT, f"interrupted; what is done is in {folder}: go on with --resume") from None
    finally:
        with suppress(OSError):  # there is something in it, or it is gone
            folder.rmdir()


def _has_states(folder: Path) -> bool:
    return any(folder.glob("**/[!.]*.safetensors"))  # hidden ones are drafts


def digest(tensors: Iterable[Tensor]) -> str:
    """A name for what tensors hold, such as the parameters of a model."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]
