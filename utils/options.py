"""Command-line options that more than one command has, each given to a group of a parser."""

import argparse
from pathlib import Path

from quant.quantizers import BIT_WIDTHS
from utils.run.options import DEVICE_HELP, natural, positive
from utils.run.precision import PRECISIONS


def add_model(group: argparse._ActionsContainer) -> None:
    """Add --model."""
    group.add_argument(
        "--model",
        default="deit_tiny",
        metavar="NAME",
        help="deit_tiny, deit_small, deit_base, swin_tiny, swin_small; demo_vit, demo_swin, which come with the "
        "project; any other vision transformer by its timm name; local-dir:FOLDER or hf-hub:OWNER/NAME, as timm or "
        "transformers wrote it (deit_tiny)",
    )


def add_checkpoint(group: argparse._ActionsContainer) -> None:
    """Add --checkpoint."""
    group.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights from a local .pth or .safetensors file, also the DeiT and Swin authors' own (timm's, downloaded)",
    )


def add_image_size(group: argparse._ActionsContainer) -> None:
    """Add --img-size."""
    what = "side of the images in pixels; timm resamples the model's positions for it (that of the weights)"
    group.add_argument("--img-size", type=positive, metavar="N", help=what)


def add_bits(group: argparse._ActionsContainer) -> None:
    """Add --w_bit and --a_bit, each also with a hyphen."""
    for option, what in (("w", "weights"), ("a", "activations")):
        names, meaning = (f"--{option}_bit", f"--{option}-bit"), f"{what}: 2 to 8, or 16 for float (8)"
        group.add_argument(*names, type=bit_width, default=8, metavar="BITS", help=meaning)


def add_steps_and_seed(group: argparse._ActionsContainer) -> None:
    """Add --steps and --seed."""
    add = group.add_argument
    add("--steps", type=positive, default=500, metavar="N", help="steps in each of the two rounds of generation (500)")
    add("--seed", type=natural, default=0, metavar="N", help="seed of all that is drawn at random (0)")


def add_computation(parser: argparse.ArgumentParser) -> None:
    """Add the group of what changes speed, memory and safety, and results by their last bits at most."""
    add = parser.add_argument_group("how it is computed").add_argument
    add("--device", metavar="NAME", help=DEVICE_HELP)
    add(
        "--precision",
        choices=PRECISIONS,
        help="of the model's products in generation; losses, and all of evaluation, are fp32 (bf16 on cuda, else fp32)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="generate, and round activations, with torch.compile, which takes a minute or two (on cuda; not on a cpu)",
    )
    add(
        "--checkpoint-activations",
        action="store_true",
        help="generate with less memory, and a third more time: forward passes are repeated (keep activations)",
    )
    add("--deterministic", action="store_true", help="the same bits in every run on a GPU, too; slower")
    add("--resume", action="store_true", help="go on from where this command was interrupted")


def add_plots(group: argparse._ActionsContainer) -> None:
    """Add --plots."""
    group.add_argument("--plots", action="store_true", help="draw plots of the run (needs requirements-plots.txt)")


def bit_width(text: str) -> int:
    """argparse type: 2 to 8, or 16 for float."""
    if not text.isdecimal() or int(text) not in BIT_WIDTHS:
        raise argparse.ArgumentTypeError(f"expected 2 to 8, or 16 for float; got '{text}'")
    return int(text)
