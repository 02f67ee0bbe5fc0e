"""Command-line options that more than one script has."""

import argparse
import os
from pathlib import Path
from typing import NoReturn

import torch

from quant.quantizers import BIT_WIDTHS
from utils.distributed import local_rank
from utils.errors import InputError
from utils.precision import PRECISIONS


class Parser(argparse.ArgumentParser):
    """Tells a bad command line in one line, as all bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add --model, --checkpoint and --device."""
    parser.add_argument(
        "--model",
        default="deit_tiny",
        metavar="NAME",
        help="deit_tiny, deit_small, deit_base, swin_tiny, swin_small; demo_vit, demo_swin, which come with the "
        "project; or any ViT, DeiT or Swin by its timm name (deit_tiny)",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights from a local .pth or .safetensors file, also the DeiT and Swin authors' own (timm's, downloaded)",
    )
    parser.add_argument("--device", metavar="NAME", help="cuda, cuda:1, cpu, mps (cuda if there is one, else cpu)")


def add_bit_options(parser: argparse.ArgumentParser) -> None:
    """Add --w_bit and --a_bit, each also with a hyphen."""
    add = parser.add_argument
    add("--w_bit", "--w-bit", type=bit_width, default=8, metavar="BITS", help="weights: 2 to 8, or 16 for float (8)")
    add(
        "--a_bit", "--a-bit", type=bit_width, default=8, metavar="BITS", help="activations: 2 to 8, or 16 for float (8)"
    )


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Add what both scripts have for generation: seed, steps, plots, and how it is computed."""
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="seed of all that is drawn at random (0)")
    parser.add_argument(
        "--steps", type=positive, default=500, metavar="N", help="optimisation steps in each of the two rounds (500)"
    )
    parser.add_argument("--plots", action="store_true", help="draw plots of the run (needs requirements-plots.txt)")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the model's products in generation; losses, and all of evaluation, are fp32 (bf16 on cuda, else fp32)",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="generate, and round activations, with torch.compile, which takes a minute or two (on cuda; not on a cpu)",
    )
    parser.add_argument(
        "--checkpoint-activations",
        action="store_true",
        help="generate with less memory, and a third more time: forward passes are repeated (keep activations)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from where this command was interrupted")
    parser.add_argument("--deterministic", action="store_true", help="the same bits in every run on a GPU, too; slower")


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


def bit_width(text: str) -> int:
    """argparse type: 2 to 8, or 16 for float."""
    if not text.isdecimal() or int(text) not in BIT_WIDTHS:
        raise argparse.ArgumentTypeError(f"expected 2 to 8, or 16 for float; got '{text}'")
    return int(text)
