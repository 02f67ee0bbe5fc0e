"""PSAQ-ViT: quantize a vision transformer without data, and measure its accuracy.

    python test_quant.py --model deit_base --dataset /path/to/imagenet --w_bit 4 --a_bit 8 --mode 0

`quantize_and_evaluate` reads as the method: build, calibration images, quantize, calibrate, evaluate. (This is a
script, not a test.)
"""

import utils.run.environment  # isort: skip  # noqa: F401 - first: a broken installation is told in one line

import argparse
import copy
import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from generate_data import GenerationSettings, draw_labels, generate_data, generation_settings
from models import (
    DATASETS,
    build_model,
    class_names,
    evaluation_transform,
    model_notes,
    model_tag,
    normalization,
    short_name,
)
from models.saved import load_quantized, require_onnx, write_models
from quant import RECIPES, activation_ranges, calibrate, learns, quantize_model
from utils import report
from utils.cache import check_cache
from utils.data import Images, draw_images, open_data
from utils.evaluate import compare, measure
from utils.images import draw_noise, load_images, save_images
from utils.learning import learn
from utils.options import SETTLED, check_run, parse_run
from utils.photographs import find_dataset
from utils.plots import plot_run
from utils.report import HELD_OUT, MODES
from utils.run.distributed import by_first, first_process_first, process_group
from utils.run.errors import InputError, exit_cleanly
from utils.run.files import check_writable
from utils.run.memory import attempt, freed_memory_kept
from utils.run.options import pick_device
from utils.run.precision import float32_products
from utils.run.progress import note
from utils.run.record import RUNS, Record, open_record
from utils.run.seeds import make_deterministic

HELD_OUT_SEED = 2**32  # added to the run's seed, which is smaller


def quantize_and_evaluate(
    options: argparse.Namespace, device: torch.device, dataset: Path | None, record: Record
) -> dict:
    """The method, with options that are checked; returns what results.json holds."""
    losses, tag = [], model_tag(options.model)
    loading = options.val_batchsize, options.num_workers, options.cache, options.print_freq
    with record.stage("build", in_turn=True):
        model = build_model(options.model, options.checkpoint, img_size=options.img_size).to(device)
        settings = generation_settings(options, device, model)
        trained = options.mode == 2 or (options.plots and dataset and (dataset / "train").is_dir())
        data = open_splits(options, dataset, model, trained)
    with record.stage("quantize", in_turn=True):
        quantized = swap_layers(options, model)
    print(report.headline(options, tag, device), *model_notes(quantized), sep="\n", flush=True)
    with record.stage("images"):
        images = calibration_images(options, model, data, settings, losses, record)
    with record.stage("calibrate"), float32_products(), freed_memory_kept():
        train = partial(learn, precision=settings.precision, state=record.state)
        do = partial(calibrate, quantized, images["images"], learn=train)
        if attempt(do) is None:
            raise InputError("out of memory in calibration; expected more memory, or a smaller --calib-batchsize")
    leave_files(options, model, quantized, images, record)
    write_models(quantized, model, options.model, options.save, options.export_onnx, options.onnx_int4)
    with record.stage("evaluate"), float32_products():
        if "val" in data:
            measured = measure({"float": model, "quantized": quantized}, data, *loading)
        else:
            measured = compare(model, quantized, images["held_out"])
    results = report.collect(options, tag, settings.precision, quantized, images["images"], measured)
    results |= {"img_size": list(model.patch_embed.img_size), "notes": model_notes(quantized)}
    results |= record.provenance(device, vars(options))
    report.publish(record, results, report.describe(results))
    if options.plots:
        kind, real = MODES[options.mode], data.get("train")
        plot_run(record, model, quantized, images["images"], kind, real, losses, options.seed)
    return results


def evaluate_saved(options: argparse.Namespace, device: torch.device, dataset: Path | None, record: Record) -> dict:
    """Evaluate, or export, what --save wrote: without the original weights, so there is no float model to compare."""
    with record.stage("build", in_turn=True):
        model, header = load_quantized(options.load)
        if options.model not in (parse_run([]).model, header["model"]):
            raise InputError(f"{options.load} holds {header['model']}; got --model {options.model}")
        if not dataset and header["model"] in DATASETS:
            dataset = find_dataset(DATASETS[header["model"]], options.dataset_archive)
        if not dataset and not options.export_onnx:
            raise InputError("--load evaluates a model: expected --dataset; got none")
        data = open_splits(options, dataset, model, train=False)
    write_models(model, None, header["model"], onnx=options.export_onnx, int4=options.onnx_int4)
    if not dataset:
        return header
    with record.stage("evaluate"), float32_products():
        loading = options.val_batchsize, options.num_workers, options.cache, options.print_freq
        measured = measure({"quantized": model.to(device)}, data, *loading)
    chosen = {name: value for name, value in vars(options).items() if name not in ("model", *SETTLED)}
    results = report.collect_saved(header, measured) | record.provenance(device, chosen)
    report.publish(record, results, report.describe_saved(results, options.load))
    return results


def swap_layers(options: argparse.Namespace, model: nn.Module) -> nn.Module:
    """A copy of `model` with quantized layers, which gives the float logits until it is calibrated."""
    try:
        recipe = RECIPES[options.recipe]
        recipe = recipe.without_zero_points() if options.symmetric else recipe
        swapped = quantize_model(copy.deepcopy(model), options.w_bit, options.a_bit, options.skip_layers, recipe)
    except ValueError as error:
        raise InputError(f"--skip-layers: {error}") from error
    if options.recipe == "learned" and not learns(swapped):
        told = "nothing is learned, as nothing has fewer than 8 bits: the same as --recipe best on as many images"
        swapped.notes.append(told)
    return swapped


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
            images = load_images(options.images, size, *normalization(model))
        if (there := len(images["images"])) < count:
            note(f"--images {options.images}: {there} images, fewer than the {count} of --calib-batchsize")
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


@by_first
def leave_files(
    options: argparse.Namespace, model: nn.Module, quantized: nn.Module, images: dict[str, Tensor], record: Record
) -> None:
    """Write the images, unless they are the user's own, and the ranges."""
    if options.mode != 2:
        save_images(record.folder / "images.safetensors", *normalization(model), names=class_names(model), **images)
    record.write("ranges.json", activation_ranges(quantized))


def open_splits(options: argparse.Namespace, dataset: Path | None, model: nn.Module, train: bool) -> dict[str, Images]:
    """The splits of the data set, none without one; refuses places that have no space for what will be written."""
    check_writable(options.output_dir or RUNS, 8 * options.calib_batchsize * 3 * math.prod(model.patch_embed.img_size))
    if not dataset:
        return {}
    about = options.class_map, options.limit, options.seed, class_names(model)
    data = open_data(dataset, evaluation_transform(model), model.num_classes, train, *about)
    if options.cache:
        check_cache(data["val"], options.cache)
    return data


def find_data(options: argparse.Namespace) -> Path | None:
    """The root of the data set, looked at; None without one. A small model has its own, a saved one perhaps another."""
    real = options.mode == 2 and not options.load
    dataset = options.dataset or (None if options.load else DATASETS.get(options.model))
    if dataset:
        return find_dataset(dataset, options.dataset_archive, ["val", "train"] if real else ["val"])
    if real:
        raise InputError("--mode 2 calibrates on real images: expected --dataset with train/ and val/; got none")
    if options.dataset_archive and not options.load:
        raise InputError("--dataset-archive: goes with --dataset; got none")
    return None


def run(options: argparse.Namespace) -> dict:
    """Do what the command line asks for, and leave a folder with the results; returns what results.json holds."""
    if options.deterministic:
        make_deterministic()
    with first_process_first():
        check_run(options)
        if not options.load:
            model_tag(options.model)
        if options.export_onnx:
            require_onnx()
        device, dataset = pick_device(options.device), find_data(options)
    method, name, resume = quantize_and_evaluate, report.run_name(options, short_name(options.model)), options.resume
    if options.load:
        method, name, resume = evaluate_saved, options.load.stem, None  # no state is kept
    with open_record(options.output_dir, name, resume) as record:
        results = method(options, device, dataset, record)
        report.check_readable(results, options.skip_bad, record)
    return results


def main() -> None:
    with process_group():
        with first_process_first():
            options = parse_run()
        run(options)


if __name__ == "__main__":
    exit_cleanly(main)
