"""PSAQ-ViT: quantize a vision transformer without data, and measure its accuracy.

    python test_quant.py --model deit_base --dataset /path/to/imagenet --w_bit 4 --a_bit 8 --mode 0

`quantize_and_evaluate` reads as the method: build, calibration images, quantize, calibrate, evaluate. (This is a
script, not a test.)
"""

import utils.run.environment  # isort: skip  # noqa: F401 - first: a broken installation is told in one line

import argparse
import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from generate_data import GenerationSettings, draw_labels, generate_data, generation_settings
from models import (
    DEMO_MODELS,
    build_model,
    class_names,
    evaluation_transform,
    model_notes,
    model_tag,
    normalization,
    short_name,
)
from models.saved import export_onnx, load_quantized, require_onnx, save_quantized
from quant import RECIPES, activation_ranges, calibrate, quantize_model
from utils.cache import check_cache, validation_loader
from utils.data import Images, check_dataset, check_same_classes, draw_images, validation_images
from utils.evaluate import compare, evaluate, fuse_rounding
from utils.fractals import write_demo_data
from utils.images import draw_noise, load_images, save_images
from utils.neighbours import compare_embeddings, neighbour_accuracy
from utils.options import (
    add_bits,
    add_checkpoint,
    add_computation,
    add_image_size,
    add_model,
    add_plots,
    add_steps_and_seed,
)
from utils.photographs import find_dataset
from utils.plots import plot_run, require_matplotlib
from utils.report import (
    HELD_OUT,
    MODES,
    check_readable,
    collect,
    collect_saved,
    headline,
    publish,
    report,
    report_saved,
)
from utils.run.distributed import by_first, first_process_first, process_group
from utils.run.errors import InputError, exit_cleanly
from utils.run.files import check_writable
from utils.run.options import Parser, natural, pick_device, positive
from utils.run.precision import float32_products
from utils.run.record import RUNS, Record, check_place, open_record
from utils.run.seeds import make_deterministic

DEMO_DATA = Path(__file__).resolve().parent / "data" / "demo"
HELD_OUT_SEED = 2**32  # added to the run's seed, which is smaller


def quantize_and_evaluate(
    options: argparse.Namespace, device: torch.device, dataset: Path | None, record: Record
) -> dict:
    """The method, with options that are checked; returns what results.json holds."""
    settings, losses = generation_settings(options, device), []
    with record.stage("build", in_turn=True):
        model = build_model(options.model, options.checkpoint, img_size=options.img_size).to(device)
        data = open_data(options, dataset, model)
    with record.stage("quantize", in_turn=True):
        quantized = swap_layers(options, model)
    print(headline(options, model_tag(options.model), device), *model_notes(quantized), sep="\n", flush=True)
    with record.stage("images"):
        images = calibration_images(options, model, data, settings, losses, record)
    with record.stage("calibrate"), float32_products():
        calibrate(quantized, images["images"])
    leave_files(options, model, quantized, images, record)
    with record.stage("evaluate"), float32_products():
        if settings.compile:
            fuse_rounding(quantized)
        if "val" in data:
            measured = measure({"float": model, "quantized": quantized}, data, options)
        else:
            measured = (compare if model.num_classes else compare_embeddings)(model, quantized, images["held_out"])
    results = collect(options, model_tag(options.model), settings.precision, quantized, images["images"], measured)
    results |= {"img_size": list(model.patch_embed.img_size), "notes": model_notes(quantized)}
    results |= record.provenance(device, vars(options))
    publish(record, results, report(results))
    if options.plots:
        kind, real = MODES[options.mode], data.get("train")
        plot_run(record, model, quantized, images["images"], kind, real, losses, options.seed)
    return results


def evaluate_saved(options: argparse.Namespace, device: torch.device, dataset: Path | None, record: Record) -> dict:
    """Evaluate, or export, what --save wrote: without the original weights, so there is no float model to compare."""
    with record.stage("build", in_turn=True):
        model, header = load_quantized(options.load)
        if not dataset and header["model"] in DEMO_MODELS:
            dataset = write_demo_data(DEMO_DATA)
        if not dataset and not options.export_onnx:
            raise InputError("--load evaluates a model: expected --dataset; got none")
        data = open_data(options, dataset, model)
    export(options, {"": model}, header["model"])
    if not dataset:
        return header
    with record.stage("evaluate"), float32_products():
        if generation_settings(options, device).compile:
            fuse_rounding(model.to(device))
        measured = measure({"quantized": model.to(device)}, data, options)
    results = collect_saved(header, measured) | record.provenance(device, vars(options))
    publish(record, results, report_saved(results, options.load))
    return results


def swap_layers(options: argparse.Namespace, model: nn.Module) -> nn.Module:
    """A copy of `model` with quantized layers, which gives the float logits until it is calibrated."""
    try:
        recipe = replace(RECIPES[options.recipe], symmetric=options.symmetric)
        return quantize_model(copy.deepcopy(model), options.w_bit, options.a_bit, options.skip_layers, recipe)
    except ValueError as error:
        raise InputError(f"--skip-layers: {error}") from error


def calibration_images(
    options: argparse.Namespace,
    model: nn.Module,
    data: dict[str, Images],
    settings: GenerationSettings,
    losses: list[list[float]],
    record: Record,
) -> dict[str, Tensor]:
    """The images of the run's mode, (calib_batchsize, 3, H, W), with the labels that they were generated for.

    Where there is no data set, `held_out` are generated images of another seed, to compare the two models on.
    """
    count, seed, size = options.calib_batchsize, options.seed, model.patch_embed.img_size
    if options.images:
        with first_process_first():
            images = load_images(options.images, size)
        images |= {name: images[name][:count] for name in ("images", "labels") if name in images}
    elif options.mode == 0:
        images = {"images": generate_data(model, count, seed, settings, losses=losses, state=record.state)}
        if model.num_classes:
            images["labels"] = draw_labels(count, model.num_classes, seed)
    elif options.mode == 1:
        images = {"images": draw_noise(count, size, seed)}
    else:
        with first_process_first():
            images = {"images": draw_images(data["train"], count, seed)}
    if "val" not in data and "held_out" not in images:
        print(f"no --dataset: {HELD_OUT} more images are generated, to compare float and quantized model on")
        state = record.state / "held-out"
        images["held_out"] = generate_data(model, HELD_OUT, seed + HELD_OUT_SEED, settings, state=state)
    return images


def open_data(options: argparse.Namespace, dataset: Path | None, model: nn.Module) -> dict[str, Images]:
    """The splits of the data set that the run needs: val, and train for real images; none without a data set."""
    check_writable(options.output_dir or RUNS, 8 * options.calib_batchsize * 3 * math.prod(model.patch_embed.img_size))
    if not dataset:
        return {}
    transform = evaluation_transform(model)
    if model.num_classes:
        classes, class_map, limit = model.num_classes, options.class_map, options.limit
        data = {"val": validation_images(dataset, transform, classes, class_map, limit, options.seed)}
    else:
        data = {"val": Images(dataset, "val", transform, options.limit, options.seed)}
    if options.cache:
        check_cache(data["val"], options.cache)
    trained = not options.load and (options.mode == 2 or (options.plots and (dataset / "train").is_dir()))
    if trained or not model.num_classes:
        check_dataset(dataset, ["train"])
        data["train"] = Images(dataset, "train", transform)
    if not model.num_classes:
        check_same_classes(data["train"], data["val"])
    return data


def measure(models: dict[str, nn.Module], data: dict[str, Images], options: argparse.Namespace) -> dict:
    """Accuracy of the models on the images of val, which the processes of a torchrun share.

    Without a classifier it is that of the nearest neighbours in train.
    """
    loader = partial(validation_loader, batch_size=options.val_batchsize, workers=options.num_workers)
    val = loader(data["val"], cache=options.cache)
    if next(iter(models.values())).num_classes:
        return evaluate(models, val, options.print_freq)
    return neighbour_accuracy(models, loader(data["train"]), val)


@by_first
def leave_files(
    options: argparse.Namespace, model: nn.Module, quantized: nn.Module, images: dict[str, Tensor], record: Record
) -> None:
    """Write what there is after calibration: images, ranges, and the files of --save and --export-onnx."""
    if options.mode != 2:
        save_images(record.folder / "images.safetensors", *normalization(model), names=class_names(model), **images)
    record.write("ranges.json", activation_ranges(quantized))
    if options.save:
        save_quantized(options.save, quantized, options.model)
    export(options, {"": quantized, ".float": model}, options.model)


@by_first
def export(options: argparse.Namespace, models: dict[str, nn.Module], name: str) -> None:
    """Write the files of --export-onnx, the float model's beside the quantized one's; tell what was written."""
    for suffix, model in models.items() if options.export_onnx else ():
        file = options.export_onnx.with_suffix(f"{suffix}.onnx") if suffix else options.export_onnx
        export_onnx(file, model, name, options.onnx_int4 and not suffix)
    for file in (options.save, options.export_onnx):
        if file:
            print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def check_options(options: argparse.Namespace) -> tuple[torch.device, Path | None]:
    """Refuse what cannot work before any work is done; returns the device and the data set's root."""
    dataset, loads = options.dataset, options.load is not None
    if loads:
        for option in ("save", "checkpoint", "img_size", "images", "skip_layers", "symmetric", "plots", "resume"):
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
    if options.class_map and not dataset:
        raise InputError("--class-map: goes with --dataset; got none")
    if options.dataset_archive and not dataset:
        raise InputError("--dataset-archive: goes with --dataset; got none")
    for option in ("images", "checkpoint", "class_map"):
        if (file := getattr(options, option)) and not file.is_file():
            raise InputError(f"--{option.replace('_', '-')} {file}: no such file")
    check_place(options.output_dir)
    for folder in (options.cache, *(file and file.parent for file in (options.save, options.export_onnx))):
        if folder:
            check_writable(folder)
    if not dataset and not loads and options.model in DEMO_MODELS:
        dataset = write_demo_data(DEMO_DATA)
    if dataset:
        dataset = find_dataset(dataset, options.dataset_archive)
        check_dataset(dataset, ["val", "train"] if options.mode == 2 and not loads else ["val"])
    elif options.mode == 2 and not loads:
        raise InputError("--mode 2 calibrates on real images: expected --dataset with train/ and val/; got none")
    return device, dataset


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    usage = "%(prog)s [--model NAME] [--dataset DIR] [--w_bit BITS] [--a_bit BITS] [--mode MODE] [further options]"
    what = "Quantize a vision transformer without data (PSAQ-ViT) and measure its accuracy."
    parser = Parser(usage=usage, description=what)
    group = parser.add_argument_group("what the paper has")
    add_model(group)
    add = group.add_argument
    root = (
        "ImageNet root with train/ and val/ class folders; or cifar10 or imagenette, brought to data/ (demo: its own)"
    )
    add("--dataset", type=Path, metavar="DIR", help=root)
    add_bits(group)
    add("--mode", type=int, choices=MODES, default=0, help="calibrate on 0 generated, 1 noise, 2 real images (0)")
    add = parser.add_argument_group("how it is quantized").add_argument
    add("--recipe", choices=RECIPES, default="paper", help="how to quantize; best keeps more of the accuracy (paper)")
    add("--symmetric", action="store_true", help="activations without zero points, as TensorRT wants them")
    skip = "quantizers left in float, as 'blocks.0.*' (none)"
    add("--skip-layers", nargs="+", default=[], metavar="PATTERN", help=skip)
    group = parser.add_argument_group("calibration images")
    add = group.add_argument
    add("--calib-batchsize", type=positive, default=32, metavar="N", help="images to generate and calibrate with (32)")
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
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict:
    """Do what the command line asks for, and leave a folder with the results; returns what results.json holds."""
    if options.deterministic:
        make_deterministic()
    with first_process_first():
        device, dataset = check_options(options)
    recipe = f"_{options.recipe}" * (options.recipe != "paper") + "_symmetric" * options.symmetric
    what = f"{short_name(options.model)}_w{options.w_bit}a{options.a_bit}{recipe}"
    name = f"{what}_mode{options.mode}_seed{options.seed}"
    method, name, resume = quantize_and_evaluate, name, options.resume
    if options.load:
        method, name, resume = evaluate_saved, options.load.stem, None  # no state is kept
    with open_record(options.output_dir, name, resume) as record:
        results = method(options, device, dataset, record)
        check_readable(results, options.skip_bad, record)
    return results


def main() -> None:
    with process_group():
        with first_process_first():
            options = parse()
        run(options)


if __name__ == "__main__":
    exit_cleanly(main)
