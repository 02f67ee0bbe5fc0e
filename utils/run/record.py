"""What a run leaves: its folder, the seconds of its stages, where and with what it was computed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime, timezone
from pathlib import Path

import torch

import utils.run.environment
from utils.run.distributed import first_process_first, is_first
from utils.run.errors import InputError
from utils.run.files import check_writable, locked, new_run_folder, write_json
from utils.run.state import unfinished

RUNS = Path(__file__).resolve().parents[2] / "runs"


class Record:
    """The record of one run of a command.

    Attributes:
        state: a folder for what is unfinished, which is removed when the run ends well.
        seconds: of every stage that has ended, by name.
    """

    def __init__(self, folder: Path | None, name: str, state: Path | None) -> None:
        self._folder, self.name, self.state = folder, name, state
        self.seconds: dict[str, float] = {}

    @property
    def folder(self) -> Path:
        """Where the results go. In runs/ it is made when it is first asked for: only then there is something."""
        self._folder = self._folder or new_run_folder(RUNS, self.name)
        return self._folder

    @contextmanager
    def stage(self, name: str, in_turn: bool = False) -> Iterator[None]:
        """Time the block.

        Args:
            in_turn: of several processes the first runs it before the others: it downloads and fills caches for all.
        """
        start = time.perf_counter()
        with first_process_first() if in_turn else nullcontext():
            yield
        self.seconds[name] = time.perf_counter() - start

    def write(self, name: str, content: dict | list) -> None:
        """Write a JSON file into the folder."""
        write_json(self.folder / name, content)

    def provenance(self, device: torch.device, options: dict[str, object]) -> dict:
        """What every results.json says of its run: times, machine, versions, options."""
        return {
            "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()},
            "device": utils.run.environment.device_name(device),
            "versions": utils.run.environment.versions(),
            "commit": utils.run.environment.commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "options": {name: str(value) if isinstance(value, Path) else value for name, value in options.items()},
        }


def check_place(folder: Path | None) -> None:
    """Refuse a folder for results, None for runs/, that cannot be written to; none is left that was not there."""
    if not is_first():  # it is the first process that writes, and may be at it already
        return
    made = folder is not None and not folder.exists()
    check_writable(folder or RUNS)
    if made:
        folder.rmdir()


@contextmanager
def open_record(folder: Path | None, name: str, resume: bool | None = None) -> Iterator[Record]:
    """The record of a run that has its folder for itself.

    Args:
        folder: None for a new one of that name in runs/.
        resume: go on from the state that an interrupted run left; None for a run that keeps no state.

    Raises:
        InputError: the folder cannot be written to, another run has it, or there is nothing to resume.
    """
    place = folder or RUNS / name
    with first_process_first():
        made = folder is not None and not folder.exists()
        check_writable(folder or RUNS)
    try:
        with locked(folder) if folder and is_first() else nullcontext():
            if resume is None:
                yield Record(folder, name, None)
            else:
                with unfinished(place.parent / f"{place.name}.unfinished", resume) as state:
                    yield Record(folder, name, state)
    except InputError:
        if made and is_first():
            with suppress(OSError):  # there is something in it
                folder.rmdir()
        raise
