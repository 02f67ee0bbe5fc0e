"""Command lines: errors in one line, types of numbers, devices and cores."""

import argparse
import os
from typing import NoReturn

import torch

from utils.run.distributed import local_rank
from utils.run.errors import InputError

DEVICE_HELP = "cuda, cuda:1, cpu, mps (cuda if there is one, else cpu)"


class Parser(argparse.ArgumentParser):
    """Tells a bad command line in one line, as all bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def pick_device(name: str | None) -> torch.device:
    """The device of that name, checked; cuda if there is one and cpu otherwise for None."""
    if name is None or name == "cuda":  # each process of a torchrun has its own
        count = torch.cuda.device_count()
        name = f"cuda:{local_rank() % count}" if count else name or "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--device {name}: expected a device of this machine, such as cpu ({reason})") from error
    return device


def own_cores() -> list[int]:
    """The numbers of the cores that this process may use; none where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def available_cores() -> int:
    """How many cores this process may use."""
    return len(own_cores()) or os.cpu_count() or 1


def positive(text: str) -> int:
    """argparse type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1; got '{text}'")
    return int(text)


def natural(text: str) -> int:
    """argparse type: a whole number from 0 below 2^32."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 4294967295; got '{text}'")
    return int(text)
