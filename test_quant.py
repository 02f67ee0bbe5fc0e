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
from quant import activation_ranges, calibrate, quantize_model
from utils.data import Images, check_dataset, draw_images
from utils.errors import InputError, exit_cleanly
from utils.evaluate import compare, evaluate
from utils.files import check_writable, new_run_folder, write_json
from utils.fractals import write_demo_data
from utils.images import load_images, save_images
from utils.options import Parser, add_common_options, available_cores, bit_width, pick_device, positive
from utils.seeds import stream

ROOT = Path(__file__).resolve().parent
MODES = {0: "generated images", 1: "Gaussian noise", 2: "real images"}
HELD_OUT = 32  # generated images to compare the two models on where there is no data set
HELD_OUT_SEED = 2**32  # added to the run's seed, which is smaller


def run(options: argparse.Namespace) -> dict:
    """Quantize a model, evaluate it, and leave a folder with the results; returns what results.json holds."""
    device, tag, dataset = check_options(options)
    seconds: dict[str, float] = {}
    with timed(seconds, "build"):
        model = build_model(options.model, options.checkpoint).to(device)
        transform = evaluation_transform(model)
        if dataset:
            val = Images(dataset, "val", transform, options.limit)
            val.check_classes(model.num_classes)
    print(f"{tag}: W{options.w_bit}/A{options.a_bit}, {MODES[options.mode]}, {utils.environment.device_name(device)}")

    with timed(seconds, "images"):
        if options.mode == 2:
            tensors = {
                "images": draw_images(Images(dataset, "train", transform), options.calib_batchsize, options.seed)
            }
        else:
            tensors = synthetic_images(model, options, held_out=not dataset)
        folder = options.output_dir or new_run_folder(ROOT / "runs", run_name(options))  # only now is there something
        if options.mode != 2:
            save_images(folder / "images.safetensors", *normalization(model), **tensors)
        images = tensors["images"][: options.calib_batchsize]
    with timed(seconds, "quantize"):
        quantized = quantize_model(copy.deepcopy(model), options.w_bit, options.a_bit)
    with timed(seconds, "calibrate"):
        calibrate(quantized, images)
        write_json(folder / "ranges.json", activation_ranges(quantized))
    with timed(seconds, "evaluate"):
        torch.backends.cudnn.allow_tf32 = False  # the headline numbers are float32's
        if dataset:
            workers = min(options.num_workers, available_cores())
            loader = DataLoader(val, options.val_batchsize, num_workers=workers, pin_memory=device.type == "cuda")
            measured = evaluate({"float": model, "quantized": quantized}, loader, options.print_freq)
        else:
            measured = compare(model, quantized, tensors["held_out"])

    results = {
        "model": options.model,
        "tag": tag,
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
        "unreadable": measured.get("unreadable", []),
        "calibration_images": len(images),
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "device": utils.environment.device_name(device),
        "versions": utils.environment.versions(),
        "commit": utils.environment.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
    }
    write_json(folder / "results.json", results)
    print(report(results), f"results: {folder}", sep="\n")
    if results["unreadable"] and not options.skip_bad:
        some = ", ".join(results["unreadable"][:5])
        raise InputError(
            f"{len(results['unreadable'])} images are not readable ({some}); leave them out with --skip-bad"
        )
    return results


def synthetic_images(model: nn.Module, options: argparse.Namespace, held_out: bool) -> dict[str, Tensor]:
    """Calibration images that need no data set: from a file, generated (mode 0) or noise (mode 1).

    With `held_out` there are as well generated images of another seed, to compare the two models on.
    """
    size, count, seed = model.patch_embed.img_size, options.calib_batchsize, options.seed
    settings = replace(GenerationSettings(), steps=options.steps)
    if options.images:
        tensors = load_images(options.images, size)
    elif options.mode == 0:
        tensors = {"images": generate_data(model, count, seed, settings)}
        tensors["labels"] = draw_labels(count, model.num_classes, seed)
    else:
        tensors = {"images": torch.randn(count, 3, *size, generator=stream(seed, "noise"))}
    if held_out and "held_out" not in tensors:
        print(f"no --dataset: {HELD_OUT} more images are generated, to compare float and quantized model on")
        tensors["held_out"] = generate_data(model, HELD_OUT, seed + HELD_OUT_SEED, settings)
    return tensors


def check_options(options: argparse.Namespace) -> tuple[torch.device, str, Path | None]:
    """Refuse what cannot work before any work is done; returns the device, the model's tag and the data set's root."""
    tag, device = model_tag(options.model), pick_device(options.device)
    if options.images and options.mode != 0:
        raise InputError(f"--images: goes with --mode 0; got --mode {options.mode}")
    for option, file in (("--images", options.images), ("--checkpoint", options.checkpoint)):
        if file and not file.is_file():
            raise InputError(f"{option} {file}: no such file")
    check_writable(options.output_dir or ROOT / "runs")
    dataset = options.dataset
    if not dataset and options.model in DEMO_MODELS:
        dataset = write_demo_data(ROOT / "data" / "demo")
    if dataset:
        check_dataset(dataset, ["val", "train"] if options.mode == 2 else ["val"])
    elif options.mode == 2:
        raise InputError("--mode 2 calibrates on real images: expected --dataset with train/ and val/; got none")
    return device, tag, dataset


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
    table = "\n".join(f"{name:<8}{top1:>9}{top5:>9}" for name, top1, top5 in rows)
    return f"{table}\n{results['n']} images in {seconds['evaluate']:.1f} s; {times}"


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long the block takes, as seconds[stage]."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Quantize a vision transformer without data (PSAQ-ViT) and measure its accuracy.")
    add_common_options(parser)
    add = parser.add_argument
    add("--dataset", type=Path, metavar="DIR", help="ImageNet root with train/ and val/ class folders (demo: its own)")
    add("--w_bit", "--w-bit", type=bit_width, default=8, metavar="BITS", help="weights: 2 to 8, or 16 for float (8)")
    add(
        "--a_bit", "--a-bit", type=bit_width, default=8, metavar="BITS", help="activations: 2 to 8, or 16 for float (8)"
    )
    add("--mode", type=int, choices=MODES, default=0, help="calibrate on 0 generated, 1 noise, 2 real images (0)")
    add("--calib-batchsize", type=positive, default=32, metavar="N", help="images to generate and calibrate with (32)")
    add("--val-batchsize", type=positive, default=200, metavar="N", help="images a batch in evaluation (200)")
    add("--limit", type=positive, metavar="N", help="evaluate on the first N validation images, in folder order (all)")
    add("--images", type=Path, metavar="FILE", help="images of an earlier run or of generate_data.py, not new ones")
    add("--output-dir", type=Path, metavar="DIR", help="folder for the results (a new one in runs/)")
    add("--skip-bad", action="store_true", help="leave unreadable validation images out instead of failing")
    add("--num-workers", type=int, default=16, metavar="N", help="processes that decode, at most one a core (16)")
    add("--print-freq", type=positive, default=100, metavar="N", help="batches between running accuracies (100)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    exit_cleanly(lambda: run(parse()))
