"""The command lines: of test_quant.py and generate_data.py, by groups, and options that other commands have, too."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from quant.quantizers import BIT_WIDTHS
from quant.recipes import LEARNED, PAPER, RECIPES
from utils.images import check_format
from utils.plots import require_matplotlib
from utils.report import MODES
from utils.run.errors import InputError
from utils.run.files import check_writable
from utils.run.options import DEVICE_HELP, Parser, natural, positive
from utils.run.precision import LARGE, PRECISIONS
from utils.run.record import check_place

LEFT = ("images.safetensors", "images.png", "ranges.json", "results.json")  # what a run leaves in its folder
SETTLED = ("w_bit", "a_bit", "mode", "recipe")  # by what --save has written


def parse_run(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of test_quant.py."""
    usage = "%(prog)s [--model NAME] [--dataset DIR] [--w_bit BITS] [--a_bit BITS] [--mode MODE] [further options]"
    what = "Quantize a vision transformer without data (PSAQ-ViT) and measure its accuracy."
    parser = Parser(usage=usage, description=what)
    group = parser.add_argument_group("what the paper has")
    add_model(group)
    add = group.add_argument
    root = (
        "ImageNet root with train/ and val/ class folders; or cifar10 or imagenette, brought to data/ (small models: "
        "their own)"
    )
    add("--dataset", type=Path, metavar="DIR", help=root)
    add_bits(group)
    add("--mode", type=int, choices=MODES, default=0, help="calibrate on 0 generated, 1 noise, 2 real images (0)")
    add = parser.add_argument_group("how it is quantized").add_argument
    how = "how: best keeps more than paper; learned trains on, below 8 bits, for minutes to an hour (paper)"
    add("--recipe", choices=RECIPES, default="paper", help=how)
    add("--symmetric", action="store_true", help="activations without zero points, as TensorRT wants them")
    skip = "quantizers left in float, as 'blocks.0.*' (none)"
    add("--skip-layers", nargs="+", default=[], metavar="PATTERN", help=skip)
    group = parser.add_argument_group("calibration images")
    add = group.add_argument
    counts = f"images to generate and calibrate with, {LEARNED.images} for --recipe learned ({PAPER.images})"
    add("--calib-batchsize", type=positive, metavar="N", help=counts)
    add_steps_and_seed(group)
    add("--images", type=Path, metavar="FILE", help="images of an earlier run or of generate_data.py, not new ones")
    group = parser.add_argument_group("model files")
    add_checkpoint(group)
    add_image_size(group)
    add = group.add_argument
    add("--save", type=Path, metavar="FILE", help="write the quantized model, as integers, to a .safetensors file")
    add("--load", type=Path, metavar="FILE", help="evaluate, or export, what --save wrote: no weights, no calibration")
    add("--export-onnx", type=Path, metavar="FILE", help="write the quantized model to FILE.onnx, and FILE.float.onnx")
    add("--onnx-int4", action="store_true", help="4-bit weights as INT4 in the ONNX file: smaller, not faster (INT8)")
    add = parser.add_argument_group("evaluation").add_argument
    add("--class-map", type=Path, metavar="FILE", help="lines 'folder index', for a subset or other folders (by name)")
    archive = "take --dataset cifar10 or imagenette from this archive or folder, not from the network"
    add("--dataset-archive", type=Path, metavar="FILE", help=archive)
    spread = "evaluate on N validation images, drawn with the seed and spread over the classes (all)"
    add("--limit", type=positive, metavar="N", help=spread)
    add("--skip-bad", action="store_true", help="leave unreadable validation images out instead of failing")
    add("--cache", type=Path, metavar="DIR", help="keep decoded validation images there for further runs (do not)")
    add("--val-batchsize", type=positive, default=200, metavar="N", help="images a batch in evaluation (200)")
    add("--num-workers", type=natural, default=16, metavar="N", help="processes that decode, at most one a core (16)")
    add("--print-freq", type=positive, default=100, metavar="N", help="batches between running accuracies (100)")
    add_computation(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--output-dir", type=Path, metavar="DIR", help="folder for the results (a new one in runs/)")
    add_plots(group)
    options = parser.parse_args(arguments)
    options.calib_batchsize = options.calib_batchsize or RECIPES[options.recipe].images
    return options


def check_run(options: argparse.Namespace) -> None:
    """Refuse options of test_quant.py that do not go together, and files that are not or cannot be."""
    given = {"--" + name.replace("_", "-"): value for name, value in vars(options).items() if value}
    if options.load:
        usual = parse_run([])
        for option in SETTLED:
            if (value := getattr(options, option)) != getattr(usual, option):
                raise InputError(f"--load takes a model as it was saved; got --{option} {value} with it")
        for option in ("save", "checkpoint", "img-size", "images", "skip-layers", "symmetric", "plots", "resume"):
            if f"--{option}" in given:
                raise InputError(f"--load takes a model as it was saved; got --{option} with it")
    for option, needed in (("onnx-int4", "export-onnx"), ("class-map", "dataset")):
        if f"--{option}" in given and f"--{needed}" not in given:
            raise InputError(f"--{option}: goes with --{needed}; got none")
    check_computation(options)
    if options.images and options.mode != 0:
        raise InputError(f"--images: goes with --mode 0; got --mode {options.mode}")
    for option in ("--images", "--checkpoint", "--class-map"):
        if option in given and not given[option].is_file():
            raise InputError(f"{option} {given[option]}: no such file")
    if options.plots:
        require_matplotlib()
    read = [options.images, options.checkpoint, options.load, options.class_map, options.dataset_archive]
    left = [options.output_dir / name for name in LEFT] if options.output_dir else []
    exported = [options.export_onnx, options.export_onnx.with_suffix(".float.onnx")] if options.export_onnx else []
    check_files(read, [options.save, *exported, *left])
    check_place(options.output_dir)
    for folder in (options.cache, *(file and file.parent for file in (options.save, options.export_onnx))):
        if folder:
            check_writable(folder)


def check_files(read: Sequence[Path | None], written: Sequence[Path | None]) -> None:
    """Refuse files to write that are folders, or that are to be read or written already; None is no file."""
    taken = {path.resolve() for path in read if path}
    for path in filter(None, written):
        if path.suffix and path.is_dir():
            raise InputError(f"{path}: expected a file to write; it is a folder")
        if path.resolve() in taken:
            raise InputError(f"{path}: expected a file that is not read, or written, by the same command already")
        taken.add(path.resolve())


def parse_generation(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of generate_data.py."""
    usage = "%(prog)s [--model NAME] [--num-images N] [--output FILE] [further options]"
    parser = Parser(usage=usage, description="Generate images from a vision transformer, with no data.")
    images, output = parser.add_argument_group("images"), parser.add_argument_group("output")
    add_model(images)
    add_checkpoint(images)
    add_image_size(images)
    images.add_argument("--num-images", type=positive, default=32, metavar="N", help="images to generate (32)")
    add_steps_and_seed(images)
    contrast = "stretch each image to the whole range of pixels, and add one in four once more, shaded: what --recipe "
    contrast += "best does by itself, for other toolkits (as they are)"
    images.add_argument("--contrast", action="store_true", help=contrast)
    output.add_argument(
        "--output",
        type=Path,
        default=Path("images.safetensors"),
        metavar="FILE",
        help="file for the images, .safetensors or .npy, with a picture of them beside it; a name without suffix is a "
        "folder for PNG files, one folder a class (images.safetensors)",
    )
    add_plots(output)
    add_computation(parser)
    return parser.parse_args(arguments)


def check_generation(options: argparse.Namespace) -> None:
    """Refuse options of generate_data.py that cannot work."""
    check_computation(options)
    check_format(options.output)
    picture = [options.output.with_suffix(".png")] if options.output.suffix else []
    check_files([options.checkpoint], [options.output, *picture])
    if options.plots:
        require_matplotlib()
    check_writable(options.output.parent)


def check_computation(options: argparse.Namespace) -> None:
    """Refuse options of computation that do not go together."""
    if options.compile and options.checkpoint_activations:
        raise InputError("--compile: got --checkpoint-activations with it, whose steps are not compiled")


def add_model(group: argparse._ActionsContainer) -> None:
    """Add --model."""
    group.add_argument(
        "--model",
        default="deit_tiny",
        metavar="NAME",
        help="deit_tiny, deit_small, deit_base, swin_tiny, swin_small; demo_vit, demo_swin, cifar_vit, "
        "cifar_swin, which come with the project; any other vision transformer by its timm name; local-dir:FOLDER or "
        "hf-hub:OWNER/NAME, as timm or transformers wrote it (deit_tiny)",
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
        help="of products in generation and in learning; losses, and all of evaluation, are fp32 (bf16 on cuda, and, "
        f"for models from {LARGE // 10**6} million parameters, on a CPU that multiplies it natively; else fp32)",
    )
    add(
        "--compile",
        action="store_true",
        help="generate with torch.compile: one to three minutes that pay on a GPU from some 300 images of a large "
        "model on; on a cpu it gained nothing (do not; on cuda steps are recorded once and replayed)",
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
