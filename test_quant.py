"""PSAQ-ViT: quantize a vision transformer without data, and measure its accuracy.

    python test_quant.py --model deit_base --dataset /path/to/imagenet --w_bit 4 --a_bit 8 --mode 0

`quantize_and_evaluate` reads as the method: build, calibration images, quantize, calibrate, evaluate. (This is a
script, not a test.)
"""

import utils.environment  # isort: skip  # noqa: F401 - first: a broken installation is told in one line

import argparse
import copy
import math
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from generate_data import GenerationSettings, draw_labels, generate_data, generation_settings
from models import DEMO_MODELS, build_model, evaluation_transform, model_tag, normalization
from models.saved import export_onnx, load_quantized, require_onnx, save_quantized
from quant import activation_ranges, calibrate, fuse_activations, quantize_model
from utils.cache import CachedImages, check_cache
from utils.compilation import fused_rounding
from utils.data import Images, Shard, check_dataset, draw_images, image_loader
from utils.distributed import first_process_first, is_first, process_group
from utils.errors import InputError, exit_cleanly
from utils.evaluate import compare, evaluate
from utils.files import check_writable, locked, new_run_folder, write_json
from utils.fractals import write_demo_data
from utils.images import load_images, save_images
from utils.options import (
    Parser,
    add_bit_options,
    add_generation_options,
    add_model_options,
    available_cores,
    natural,
    pick_device,
    positive,
)
from utils.plots import plot_run, require_matplotlib
from utils.precision import float32_products
from utils.report import HELD_OUT, MODES, collect, headline, provenance, report, timed
from utils.seeds import make_deterministic, stream
from utils.state import unfinished

ROOT = Path(__file__).resolve().parent
HELD_OUT_SEED = 2**32  # added to the run's seed, which is smaller


def run(options: argparse.Namespace) -> dict:
    """Do what the command line asks for, and leave a folder with the results; returns what results.json holds."""
    if options.deterministic:
        make_deterministic()
    with first_process_first():
        device, dataset = check_options(options)
    alone = options.output_dir and is_first()  # in runs/ each run has a new folder
    with locked(options.output_dir) if alone else nullcontext():
        if options.load:
            return evaluate_saved(options, device, dataset)
        folder = options.output_dir or ROOT / "runs" / run_name(options)
        with unfinished(folder.parent / f"{folder.name}.unfinished", options.resume) as state:
            return quantize_and_evaluate(options, device, dataset, state)


def quantize_and_evaluate(options: argparse.Namespace, device: torch.device, dataset: Path | None, state: Path) -> dict:
    """The method, with options that are checked; `state` keeps what is generated until the run has ended."""
    seconds: dict[str, float] = {}
    with timed(seconds, "build"), first_process_first():
        model = build_model(options.model, options.checkpoint).to(device)
        images = open_images(dataset, model, options)
        pixels = options.calib_batchsize * 3 * math.prod(model.patch_embed.img_size)
        check_writable(options.output_dir or ROOT / "runs", 8 * pixels)  # in float32, and as much for their picture
    with timed(seconds, "quantize"), first_process_first():
        quantized = swap_layers(model, options)
    print(headline(options, device), flush=True)

    losses: list[list[float]] = []
    settings = generation_settings(options, device)
    with timed(seconds, "images"):
        tensors = calibration_images(model, images, options, settings, losses, state)
    with timed(seconds, "calibrate"), float32_products():
        calibrate(quantized, tensors["images"])
    if is_first():  # only now is there something
        folder = options.output_dir or new_run_folder(ROOT / "runs", run_name(options))
        if options.mode != 2:
            save_images(folder / "images.safetensors", *normalization(model), **tensors)
        write_json(folder / "ranges.json", activation_ranges(quantized))
        write_models(quantized, options.model, options, model)
    with timed(seconds, "evaluate"), float32_products():
        if settings.compile:
            fuse_activations(quantized, fused_rounding(device))
        if "val" in images:
            measured = measure({"float": model, "quantized": quantized}, images["val"], options)
        else:
            measured = compare(model, quantized, tensors["held_out"])

    precision = settings.precision if options.mode == 0 else None
    results = collect(options, device, seconds, quantized, measured, len(tensors["images"]), precision)
    if is_first():
        write_json(folder / "results.json", results)
        print(report(results), f"results: {folder}", sep="\n")
        if options.plots:
            kinds = images_by_kind(model, images, tensors, options)
            plot_run(folder, model, quantized, kinds, tensors["images"], losses)
        check_readable(results, options, folder)
    return results


def evaluate_saved(options: argparse.Namespace, device: torch.device, dataset: Path | None) -> dict:
    """Evaluate, or export, what --save wrote: without the original weights, so there is no float model to compare."""
    seconds: dict[str, float] = {}
    with timed(seconds, "build"), first_process_first():
        model, header = load_quantized(options.load)
        if not dataset and header["model"] in DEMO_MODELS:
            dataset = write_demo_data(ROOT / "data" / "demo")
        if not dataset and not options.export_onnx:
            raise InputError("--load evaluates a model: expected --dataset; got none")
    if is_first():
        write_models(model, header["model"], options)
    if not dataset:
        return header
    with first_process_first():
        images = open_images(dataset, model, options)["val"]
    model.to(device)
    with timed(seconds, "evaluate"), float32_products():
        if generation_settings(options, device).compile:
            fuse_activations(model, fused_rounding(device))
        measured = measure({"quantized": model}, images, options)
    results = {
        "model": header["model"],
        "tag": header["tag"],
        "n": measured["n"],
        "top1": measured["quantized_top1"],
        "top5": measured["quantized_top5"],
        "unreadable": measured["unreadable"],
    } | provenance(options, device, seconds)
    if is_first():
        folder = options.output_dir or new_run_folder(ROOT / "runs", options.load.stem)
        write_json(folder / "results.json", results)
        print(
            f"{header['tag']}, {options.load}: top-1 {results['top1']:.2f} %, top-5 {results['top5']:.2f} %",
            f"{results['n']} images in {seconds['evaluate']:.1f} s",
            f"results: {folder}",
            sep="\n",
        )
        check_readable(results, options, folder)
    return results


def check_options(options: argparse.Namespace) -> tuple[torch.device, Path | None]:
    """Refuse what cannot work before any work is done; returns the device and the data set's root."""
    if options.load:
        for option in ("save", "checkpoint", "images", "skip_layers", "plots", "resume"):
            if getattr(options, option):
                raise InputError(f"--load takes a model as it was saved; got --{option.replace('_', '-')} with it")
    else:
        model_tag(options.model)
    device = pick_device(options.device)
    if options.plots:
        require_matplotlib()
    if options.export_onnx:
        require_onnx()
    elif options.onnx_int4:
        raise InputError("--onnx-int4: goes with --export-onnx; got none")
    if options.images and options.mode != 0:
        raise InputError(f"--images: goes with --mode 0; got --mode {options.mode}")
    if options.class_map and not options.dataset:
        raise InputError("--class-map: goes with --dataset; got none")
    files = {"--images": options.images, "--checkpoint": options.checkpoint, "--class-map": options.class_map}
    for option, file in files.items():
        if file and not file.is_file():
            raise InputError(f"{option} {file}: no such file")
    outputs = [file.parent for file in (options.save, options.export_onnx) if file]
    for folder in (options.output_dir or ROOT / "runs", options.cache, *outputs):
        if folder:
            check_writable(folder)
    dataset = options.dataset
    if not dataset and not options.load and options.model in DEMO_MODELS:
        dataset = write_demo_data(ROOT / "data" / "demo")
    if dataset:
        check_dataset(dataset, ["val", "train"] if options.mode == 2 and not options.load else ["val"])
    elif options.mode == 2 and not options.load:
        raise InputError("--mode 2 calibrates on real images: expected --dataset with train/ and val/; got none")
    return device, dataset


def open_images(dataset: Path | None, model: nn.Module, options: argparse.Namespace) -> dict[str, Images]:
    """The splits of the data set that the run needs: val, and train for real images; none without a data set."""
    if not dataset:
        return {}
    transform = evaluation_transform(model)
    images = {"val": Images(dataset, "val", transform, options.limit)}
    if options.class_map:
        images["val"].map_classes(options.class_map, model.num_classes)
    else:
        images["val"].check_classes(model.num_classes)
    if options.cache:
        check_cache(images["val"], options.cache)
    if not options.load and (options.mode == 2 or (options.plots and (dataset / "train").is_dir())):
        images["train"] = Images(dataset, "train", transform)
    return images


def swap_layers(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    """A copy of `model` with quantized layers, which gives the float logits until it is calibrated."""
    try:
        return quantize_model(copy.deepcopy(model), options.w_bit, options.a_bit, options.skip_layers)
    except ValueError as error:
        raise InputError(f"--skip-layers: {error}") from error


def calibration_images(
    model: nn.Module,
    images: dict[str, Images],
    options: argparse.Namespace,
    settings: GenerationSettings,
    losses: list[list[float]],
    state: Path,
) -> dict[str, Tensor]:
    """The images of the run's mode, (calib_batchsize, 3, H, W), with the labels that they were generated for.

    Where there is no data set, `held_out` are generated images of another seed, to compare the two models on.
    """
    count, seed = options.calib_batchsize, options.seed
    if options.images:
        with first_process_first():
            tensors = load_images(options.images, model.patch_embed.img_size)
        tensors |= {name: tensors[name][:count] for name in ("images", "labels") if name in tensors}
    elif options.mode == 0:
        tensors = {"images": generate_data(model, count, seed, settings, losses=losses, state=state)}
        tensors["labels"] = draw_labels(count, model.num_classes, seed)
    elif options.mode == 1:
        tensors = {"images": draw_noise(model, count, seed)}
    else:
        with first_process_first():
            tensors = {"images": draw_images(images["train"], count, seed)}
    if "val" not in images and "held_out" not in tensors:
        print(f"no --dataset: {HELD_OUT} more images are generated, to compare float and quantized model on")
        tensors["held_out"] = generate_data(model, HELD_OUT, seed + HELD_OUT_SEED, settings, state=state / "held-out")
    return tensors


def draw_noise(model: nn.Module, count: int, seed: int) -> Tensor:
    """Gaussian noise N(0, 1) of the model's input size: (count, 3, H, W)."""
    return torch.randn(count, 3, *model.patch_embed.img_size, generator=stream(seed, "noise"))


def images_by_kind(
    model: nn.Module, images: dict[str, Images], tensors: dict[str, Tensor], options: argparse.Namespace
) -> dict[str, Tensor]:
    """Images of every kind that there are, to draw the ranges of: noise, the run's own, and real ones."""
    count = len(tensors["images"])
    kinds = {"noise": draw_noise(model, count, options.seed), MODES[options.mode]: tensors["images"]}
    if "train" in images:
        kinds["real"] = draw_images(images["train"], count, options.seed)
    return kinds


def write_models(
    quantized: nn.Module, name: str, options: argparse.Namespace, float_model: nn.Module | None = None
) -> None:
    """Write the files of --save and --export-onnx; beside FILE.onnx, FILE.float.onnx of the float model."""
    if options.save:
        save_quantized(options.save, quantized, name)
    if options.export_onnx:
        export_onnx(options.export_onnx, quantized, name, options.onnx_int4)
        if float_model:
            export_onnx(options.export_onnx.with_suffix(".float.onnx"), float_model, name)
    for file in (options.save, options.export_onnx):
        if file:
            print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def measure(models: dict[str, nn.Module], images: Images, options: argparse.Namespace) -> dict:
    """Accuracy of the models on the images of a split, which the processes of a torchrun share."""
    workers = min(options.num_workers, available_cores())
    with first_process_first():
        val = CachedImages(images, options.cache, workers) if options.cache else images
    loader = image_loader(Shard(val), options.val_batchsize, workers, pin_memory=torch.cuda.is_available())
    return evaluate(models, loader, options.print_freq)


def check_readable(results: dict, options: argparse.Namespace, folder: Path) -> None:
    """Fail at the end of a run that met unreadable images, unless they may be left out."""
    if results["unreadable"] and not (options.skip_bad and results["n"]):
        count, some = len(results["unreadable"]), ", ".join(results["unreadable"][:5])
        where = f", ..., all in {folder / 'results.json'}" if count > 5 else ""
        raise InputError(f"{count} images are not readable ({some}{where}); leave them out with --skip-bad")


def run_name(options: argparse.Namespace) -> str:
    """Name of the folder of a run without --output-dir."""
    return f"{options.model}_w{options.w_bit}a{options.a_bit}_mode{options.mode}_seed{options.seed}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Quantize a vision transformer without data (PSAQ-ViT) and measure its accuracy.")
    add_model_options(parser)
    add_bit_options(parser)
    add_generation_options(parser)
    add = parser.add_argument
    add("--dataset", type=Path, metavar="DIR", help="ImageNet root with train/ and val/ class folders (demo: its own)")
    add("--class-map", type=Path, metavar="FILE", help="lines 'folder index', for a subset or other folders (by name)")
    add("--mode", type=int, choices=MODES, default=0, help="calibrate on 0 generated, 1 noise, 2 real images (0)")
    add("--calib-batchsize", type=positive, default=32, metavar="N", help="images to generate and calibrate with (32)")
    add("--val-batchsize", type=positive, default=200, metavar="N", help="images a batch in evaluation (200)")
    add("--limit", type=positive, metavar="N", help="evaluate on the first N validation images, in folder order (all)")
    add("--images", type=Path, metavar="FILE", help="images of an earlier run or of generate_data.py, not new ones")
    add(
        "--skip-layers",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="quantizers left in float, as 'blocks.0.*' (none)",
    )
    add("--save", type=Path, metavar="FILE", help="write the quantized model, as integers, to a .safetensors file")
    add("--load", type=Path, metavar="FILE", help="evaluate, or export, what --save wrote: no weights, no calibration")
    add("--export-onnx", type=Path, metavar="FILE", help="write the quantized model to FILE.onnx, and FILE.float.onnx")
    add("--onnx-int4", action="store_true", help="4-bit weights as INT4 in the ONNX file: smaller, not faster (INT8)")
    add("--output-dir", type=Path, metavar="DIR", help="folder for the results (a new one in runs/)")
    add("--cache", type=Path, metavar="DIR", help="keep decoded validation images there for further runs (do not)")
    add("--skip-bad", action="store_true", help="leave unreadable validation images out instead of failing")
    add("--num-workers", type=natural, default=16, metavar="N", help="processes that decode, at most one a core (16)")
    add("--print-freq", type=positive, default=100, metavar="N", help="batches between running accuracies (100)")
    return parser.parse_args(arguments)


def main() -> None:
    with process_group():
        with first_process_first():
            options = parse()
        run(options)


if __name__ == "__main__":
    exit_cleanly(main)
