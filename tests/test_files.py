import errno
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from utils import cache
from utils.images import save_images
from utils.run import files
from utils.run.errors import InputError, exit_cleanly
from utils.run.files import check_writable, locked, new_run_folder, replacing, write_json

ROOT = Path(files.__file__).resolve().parents[2]
ZERO, ONE = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
fork = multiprocessing.get_context("fork")


class Pixels:
    """Decoded images of one grey level, as utils.cache writes them."""

    def __init__(self, level):
        self.level = level

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        return np.full((64, 64, 3), self.level, np.uint8), self.level


# For each kind of file: what writes version n of it, and what reads it and returns every version that is in it.
KINDS = {
    "json": (
        lambda path, n: write_json(path, {"versions": [n] * 100_000}),
        lambda path: set(json.loads(path.read_text())["versions"]),
    ),
    "safetensors": (
        lambda path, n: save_images(path, ZERO, ONE, torch.full((8, 3, 112, 112), n / 255)),
        lambda path: set((load_file(path)["images"].unique() * 255).round().int().tolist()),
    ),
    "png": (
        lambda path, n: save_images(path.with_suffix(".safetensors"), ZERO, ONE, torch.full((1, 3, 300, 300), n / 255)),
        lambda path: set(np.unique(np.asarray(Image.open(path))).tolist()) - {255},
    ),
    "npy": (
        lambda path, n: cache._write(path, Pixels(n), workers=0),
        lambda path: set(np.unique(np.load(path)).tolist()),
    ),
}


def write_forever(write, path):
    torch.set_num_threads(1)  # the threads of the parent are not in its fork
    tqdm.set_lock(threading.RLock())  # the default one is shared with the parent, and held when this process is killed
    for number in itertools.count():
        write(path, number % 250)


def hidden(folder):
    return [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_at_any_moment_leaves_whole_files(tmp_path, kind):
    write, read = KINDS[kind]
    path, delays = tmp_path / f"a.{kind}", random.Random(0)
    write(path, 0)
    visible = {entry.name for entry in tmp_path.iterdir()}
    for _ in range(12):
        process = fork.Process(target=write_forever, args=(write, path))
        process.start()
        before = path.stat().st_mtime_ns
        while path.stat().st_mtime_ns == before:  # until it writes
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(delays.uniform(0, 0.03))
        process.kill()
        process.join()
        assert len(read(path)) == 1  # of one version
    assert {entry.name for entry in tmp_path.iterdir()} - {entry.name for entry in hidden(tmp_path)} == visible
    write(path, 7)
    assert read(path) == {7} and not hidden(tmp_path)


def test_a_draft_of_a_process_that_was_killed_is_removed_and_one_in_use_is_not(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def die():
        with replacing(path) as draft:
            draft.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    process = fork.Process(target=die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert json.loads(path.read_text()) == {"old": 1} and len(hidden(tmp_path)) == 1
    with replacing(path) as draft:
        write_json(path, {"other": 2})
        assert hidden(tmp_path) == [draft]
        draft.write_text("{}")
    assert path.read_text() == "{}" and not hidden(tmp_path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(KeyError), replacing(path) as draft:
        draft.write_text("half")
        raise KeyError
    assert json.loads(path.read_text()) == {"old": 1}
    write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"new": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@contextmanager
def largest_file(size):
    """Within the block writing fails past `size` bytes, as on a full disk, with another errno."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_that_fails_is_told_and_keeps_the_old_file(tmp_path, kind, capfd):
    write, read = KINDS[kind]
    path = tmp_path / f"a.{kind}"
    write(path, 3)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    with largest_file(100), pytest.raises(InputError, match=r"cannot be written \(File too large\)"):
        write(path, 4)
    assert read(path) == {3} and {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def in_a_small_disk(folder, size, code):
    """Run Python code where `folder` is a disk of `size`; needs the right to mount."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare")
    mount = 'mount -t tmpfs -o "size=$1" tmpfs "$2" || exit 99; shift 2; exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "-", size, str(folder), sys.executable, "-c", code]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if process.returncode in (1, 99) and ("unshare" in process.stderr or "mount" in process.stderr):
        pytest.skip("may not mount")
    return process


def test_a_disk_that_fills_up_is_told_in_one_line(tmp_path):
    code = f"""
from pathlib import Path
from utils.run.errors import exit_cleanly
from utils.run.files import write_json
path = Path({str(tmp_path)!r}) / "a.json"
write_json(path, dict(old=1))
try:
    exit_cleanly(lambda: write_json(path, dict(new=list(range(10**6)))))
finally:
    print(path.read_text(), [entry.name for entry in path.parent.iterdir()])
"""
    process = in_a_small_disk(tmp_path, "2m", code)
    assert process.returncode == 2
    assert process.stderr == f"error: {tmp_path}/a.json: cannot be written (No space left on device)\n"
    assert process.stdout == "{\n  \"old\": 1\n}\n ['a.json']\n"


def test_a_full_disk_is_refused_before_the_work(tmp_path):
    code = (
        f"from pathlib import Path; from utils.run.files import check_writable; check_writable(Path({str(tmp_path)!r}))"
    )
    process = in_a_small_disk(tmp_path, "512k", code)
    assert "expected 1 MiB of free space; the disk has 0" in process.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_full_disk_anywhere_else_is_told_in_one_line(capsys, number):
    def write():
        raise OSError(number, os.strerror(number), "a.csv")

    with pytest.raises(SystemExit) as end:
        exit_cleanly(write)
    assert end.value.code == 2 and capsys.readouterr().err == f"error: a.csv: {os.strerror(number)}\n"


def test_other_errors_of_the_system_are_not_hidden():
    with pytest.raises(ConnectionError):
        exit_cleanly(lambda: (_ for _ in ()).throw(ConnectionError()))


def test_runs_never_share_a_folder(tmp_path):
    folders = [new_run_folder(tmp_path / "runs", "x") for _ in range(3)]
    assert [folder.name for folder in folders] == ["x", "x-2", "x-3"]


def test_a_folder_is_locked_for_one_run_at_a_time(tmp_path):
    with locked(tmp_path), pytest.raises(InputError, match="another run writes there"), locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    with locked(tmp_path):
        pass


def test_a_hidden_file_that_is_no_draft_stays(tmp_path):
    backup = tmp_path / ".model-backup.json"
    backup.write_text("{}")
    write_json(tmp_path / "model.json", {})
    assert backup.exists()


def test_a_lock_does_not_survive_kill_9(tmp_path):
    def die():
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    process = fork.Process(target=die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with locked(tmp_path), replacing(tmp_path / "a.json") as draft:
        write_json(tmp_path / "a.json", {"other": 1})
        draft.write_text("{}")  # is not taken for one that nobody writes to
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_cannot_be_made_or_has_no_space_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a folder to write to"):
        check_writable(tmp_path / "file" / "folder")
    check_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(InputError, match=r"expected \d+ MiB of free space; the disk has \d+"):
        check_writable(tmp_path, 2**62)
