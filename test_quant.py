"""PSAQ-ViT: quantize a vision transformer without data, and measure its accuracy.

    python test_quant.py --model deit_base --dataset /path/to/imagenet --w_bit 4 --a_bit 8 --mode 0

`run` reads as the method: build, calibration images, quantize, calibrate, evaluate. (This is a script, not a test.)
"""

import utils.environment  # isort: skip  # first: a broken installation is told in one line

import argparse
import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from generate_data import GenerationSettings, draw_labels, generate_data
from models import DEMO_MODELS, build_model, evaluation_transform, model_tag, normalization
from models.saved import export_onnx, load_quantized, require_onnx, save_quantized
from quant import activation_ranges, calibrate, quantize_model, quantizer_bits
from quant.quantizers import FLOAT_BITS
from utils.cache import CachedImages
from utils.data import Images, check_dataset, draw_images
from utils.errors import InputError, exit_cleanly
from utils.evaluate import compare, evaluate
from utils.files import check_writable, new_run_folder, write_json
from utils.fractals import write_demo_data
from utils.images import load_images, save_images
from utils.options import (
    Parser,
    add_bit_options,
    add_generation_options,
    add_model_options,
    available_cores,
    pick_device,
    positive,
)
from utils.plots import plot_run, require_matplotlib
from utils.seeds import stream

ROOT = Path(__file__).resolve().parent
MODES = {0: "generated", 1: "noise", 2: "real"}
HELD_OUT = 32  # generated images to compare the two models on where there is no data set
HELD_OUT_SEED = 2**32  # added to the run's seed, which is smaller


def run(options: argparse.Namespace) -> dict:
    """Quantize a model, evaluate it, and leave a folder with the results; returns what results.json holds."""
    if options.load:
        return run_saved(options)
    device, dataset = check_options(options)
    seconds: dict[str, float] = {}
    with timed(seconds, "build"):
        model = build_model(options.model, options.checkpoint).to(device)
        images = open_images(dataset, model, options)
    with timed(seconds, "quantize"):
        quantized = swap_layers(model, options)
    print(headline(options, device), flush=True)

    losses: list[list[float]] = []
    with timed(seconds, "images"):
        tensors = calibration_images(model, images, options, losses)
        folder = options.output_dir or new_run_folder(ROOT / "runs", run_name(options))  # only now is there something
        if options.mode != 2:
            save_images(folder / "images.safetensors", *normalization(model), **tensors)
    with timed(seconds, "calibrate"):
        calibrate(quantized, tensors["images"])
        write_json(folder / "ranges.json", activation_ranges(quantized))
    write_models(quantized, options.model, options, model)
    with timed(seconds, "evaluate"):
        torch.backends.cudnn.allow_tf32 = False  # the headline numbers are float32's
        if "val" in images:
            measured = measure({"float": model, "quantized": quantized}, images["val"], options)
        else:
            measured = compare(model, quantized, tensors["held_out"])

    results = collect(options, device, seconds, quantized, measured, len(tensors["images"]))
    write_json(folder / "results.json", results)
    print(report(results), f"results: {folder}", sep="\n")
    if options.plots:
        kinds = {
            "noise": draw_noise(model, len(tensors["images"]), options.seed),
            MODES[options.mode]: tensors["images"],
        }
        if "train" in images:
            kinds["real"] = draw_images(images["train"], len(tensors["images"]), options.seed)
        plot_run(folder, model, quantized, kinds, tensors["images"], losses)
    check_readable(results, options)
    return results


def run_saved(options: argparse.Namespace) -> dict:
    """Evaluate, or export, what --save wrote: without the original weights, so there is no float model to compare."""
    for option in ("save", "checkpoint", "images", "skip_layers", "plots"):
        if getattr(options, option):
            raise InputError(f"--load takes a model as it was saved; got --{option.replace('_', '-')} with it")
    device, seconds = pick_device(options.device), {}
    check_files(options)
    with timed(seconds, "build"):
        model, header = load_quantized(options.load)
    dataset = options.dataset
    if not dataset and header["model"] in DEMO_MODELS:
        dataset = write_demo_data(ROOT / "data" / "demo")
    if dataset:
        check_dataset(dataset, ["val"])
    elif not options.export_onnx:
        raise InputError("--load evaluates a model: expected --dataset; got none")
    write_models(model, header["model"], options)
    if not dataset:
        return header
    images = open_images(dataset, model, options)["val"]
    with timed(seconds, "evaluate"):
        torch.backends.cudnn.allow_tf32 = False
        measured = measure({"quantized": model.to(device)}, images, options)
    results = {
        "model": header["model"],
        "tag": header["tag"],
        "n": measured["n"],
        "top1": measured["quantized_top1"],
        "top5": measured["quantized_top5"],
        "unreadable": measured["unreadable"],
    } | provenance(options, device, seconds)
    folder = options.output_dir or new_run_folder(ROOT / "runs", options.load.stem)
    write_json(folder / "results.json", results)
    print(
        f"{header['tag']}, {options.load}: top-1 {results['top1']:.2f} %, top-5 {results['top5']:.2f} %",
        f"{results['n']} images in {seconds['evaluate']:.1f} s",
        f"results: {folder}",
        sep="\n",
    )
    check_readable(results, options)
    return results


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
    """Accuracy of the models on the images of a split."""
    workers = min(options.num_workers, available_cores())
    val = CachedImages(images, options.cache, workers) if options.cache else images
    loader = DataLoader(val, options.val_batchsize, num_workers=workers, pin_memory=torch.cuda.is_available())
    return evaluate(models, loader, options.print_freq)


def check_readable(results: dict, options: argparse.Namespace) -> None:
    """Fail at the end of a run that met unreadable images, unless they may be left out."""
    if results["unreadable"] and not options.skip_bad:
        count, some = len(results["unreadable"]), ", ".join(results["unreadable"][:5])
        raise InputError(f"{count} images are not readable ({some}); leave them out with --skip-bad")


def check_files(options: argparse.Namespace) -> None:
    """Refuse folders that cannot be written to, and --export-onnx without its packages."""
    if options.export_onnx:
        require_onnx()
    elif options.onnx_int4:
        raise InputError("--onnx-int4: goes with --export-onnx; got none")
    files = [file.parent for file in (options.save, options.export_onnx) if file]
    for folder in (options.output_dir or ROOT / "runs", options.cache, *files):
        if folder:
            check_writable(folder)


def check_options(options: argparse.Namespace) -> tuple[torch.device, Path | None]:
    """Refuse what cannot work before any work is done; returns the device and the data set's root."""
    model_tag(options.model)
    device = pick_device(options.device)
    if options.plots:
        require_matplotlib()
    if options.images and options.mode != 0:
        raise InputError(f"--images: goes with --mode 0; got --mode {options.mode}")
    for option, file in (("--images", options.images), ("--checkpoint", options.checkpoint)):
        if file and not file.is_file():
            raise InputError(f"{option} {file}: no such file")
    check_files(options)
    dataset = options.dataset
    if not dataset and options.model in DEMO_MODELS:
        dataset = write_demo_data(ROOT / "data" / "demo")
    if dataset:
        check_dataset(dataset, ["val", "train"] if options.mode == 2 else ["val"])
    elif options.mode == 2:
        raise InputError("--mode 2 calibrates on real images: expected --dataset with train/ and val/; got none")
    return device, dataset


def open_images(dataset: Path | None, model: nn.Module, options: argparse.Namespace) -> dict[str, Images]:
    """The splits of the data set that the run needs: val, and train for real images; none without a data set."""
    if not dataset:
        return {}
    transform = evaluation_transform(model)
    images = {"val": Images(dataset, "val", transform, options.limit)}
    images["val"].check_classes(model.num_classes)
    if options.mode == 2 or (options.plots and (dataset / "train").is_dir()):
        images["train"] = Images(dataset, "train", transform)
    return images


def swap_layers(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    """A copy of `model` with quantized layers, which gives the float logits until it is calibrated."""
    try:
        return quantize_model(copy.deepcopy(model), options.w_bit, options.a_bit, options.skip_layers)
    except ValueError as error:
        raise InputError(f"--skip-layers: {error}") from error


def calibration_images(
    model: nn.Module, images: dict[str, Images], options: argparse.Namespace, losses: list[list[float]]
) -> dict[str, Tensor]:
    """The images of the run's mode, (calib_batchsize, 3, H, W), with the labels that they were generated for.

    Where there is no data set, `held_out` are generated images of another seed, to compare the two models on.
    """
    count, seed = options.calib_batchsize, options.seed
    settings = replace(GenerationSettings(), steps=options.steps)
    if options.images:
        tensors = load_images(options.images, model.patch_embed.img_size)
        tensors |= {name: tensors[name][:count] for name in ("images", "labels") if name in tensors}
    elif options.mode == 0:
        tensors = {"images": generate_data(model, count, seed, settings, losses=losses)}
        tensors["labels"] = draw_labels(count, model.num_classes, seed)
    elif options.mode == 1:
        tensors = {"images": draw_noise(model, count, seed)}
    else:
        tensors = {"images": draw_images(images["train"], count, seed)}
    if "val" not in images and "held_out" not in tensors:
        print(f"no --dataset: {HELD_OUT} more images are generated, to compare float and quantized model on")
        tensors["held_out"] = generate_data(model, HELD_OUT, seed + HELD_OUT_SEED, settings)
    return tensors


def draw_noise(model: nn.Module, count: int, seed: int) -> Tensor:
    """Gaussian noise N(0, 1) of the model's input size: (count, 3, H, W)."""
    return torch.randn(count, 3, *model.patch_embed.img_size, generator=stream(seed, "noise"))


def collect(
    options: argparse.Namespace,
    device: torch.device,
    seconds: dict[str, float],
    quantized: nn.Module,
    measured: dict,
    calibration_images: int,
) -> dict:
    """What results.json holds; accuracies are None where they were not measured."""
    skipped = [name for name, bits in quantizer_bits(quantized).items() if bits == FLOAT_BITS]
    return {
        "model": options.model,
        "tag": model_tag(options.model),
        "w_bit": options.w_bit,
        "a_bit": options.a_bit,
        "mode": options.mode,
        "seed": options.seed,
        "n": measured.get("n", 0),
        "top1": measured.get("quantized_top1"),
        "top5": measured.get("quantized_top5"),
        "float_top1": measured.get("float_top1"),
        "float_top5": measured.get("float_top5"),
        "agreement": measured.get("agreement"),
        "logit_error": measured.get("logit_error"),
        "skipped": skipped if options.skip_layers else [],
        "unreadable": measured.get("unreadable", []),
        "calibration_images": calibration_images,
    } | provenance(options, device, seconds)


def provenance(options: argparse.Namespace, device: torch.device, seconds: dict[str, float]) -> dict:
    """What every results.json says of its run: times, machine, versions, options."""
    return {
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "device": utils.environment.device_name(device),
        "versions": utils.environment.versions(),
        "commit": utils.environment.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
    }


def headline(options: argparse.Namespace, device: torch.device) -> str:
    """What is about to be done."""
    where = utils.environment.device_name(device)
    return f"{model_tag(options.model)}: W{options.w_bit}/A{options.a_bit}, {MODES[options.mode]} images, {where}"


def run_name(options: argparse.Namespace) -> str:
    """Name of the folder of a run without --output-dir."""
    return f"{options.model}_w{options.w_bit}a{options.a_bit}_mode{options.mode}_seed{options.seed}"


def report(results: dict) -> str:
    """The results as a person reads them."""
    seconds = results["seconds"]
    times = f"images {seconds['images']:.1f} s, calibration {seconds['calibrate']:.1f} s"
    if results["top1"] is None:
        return (
            f"accuracy was not measured: no --dataset\n"
            f"on {HELD_OUT} held-out generated images: same top-1 as the float model on {results['agreement']:.1f} %, "
            f"logit error {results['logit_error']:.3f}\n{times}"
        )
    rows = [("", "top-1 %", "top-5 %")]
    for name, prefix in (("float", "float_"), (f"W{results['w_bit']}/A{results['a_bit']}", "")):
        rows.append((name, f"{results[prefix + 'top1']:.2f}", f"{results[prefix + 'top5']:.2f}"))
    skipped = f"\n{len(results['skipped'])} quantizers left in float" if results["skipped"] else ""
    table = "\n".join(f"{name:<8}{top1:>9}{top5:>9}" for name, top1, top5 in rows)
    return f"{table}\n{results['n']} images in {seconds['evaluate']:.1f} s; {times}{skipped}"


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long the block takes, as seconds[stage]."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Quantize a vision transformer without data (PSAQ-ViT) and measure its accuracy.")
    add_model_options(parser)
    add_bit_options(parser)
    add_generation_options(parser)
    add = parser.add_argument
    add("--dataset", type=Path, metavar="DIR", help="ImageNet root with train/ and val/ class folders (demo: its own)")
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
    add("--num-workers", type=int, default=16, metavar="N", help="processes that decode, at most one a core (16)")
    add("--print-freq", type=positive, default=100, metavar="N", help="batches between running accuracies (100)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    exit_cleanly(lambda: run(parse()))
