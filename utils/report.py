"""What a run has to say: the contents of results.json, and its lines on the screen."""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import utils.run.environment
from quant import quantizer_bits
from quant.quantizers import FLOAT_BITS
from utils.run.distributed import by_first
from utils.run.errors import InputError
from utils.run.record import Record

MODES = {0: "generated", 1: "noise", 2: "real"}
EMBEDDING_RESULTS = ("cosine", "worst_cosine", "float_knn", "quantized_knn")  # of models without a classifier
HELD_OUT = 32  # generated images to compare the two models on where there is no data set


def collect(
    options: argparse.Namespace, tag: str, precision: str, quantized: nn.Module, images: Tensor, measured: dict
) -> dict:
    """What results.json says of the method; accuracies are None where they were not measured.

    Args:
        tag: of the model, exactly.
        precision: of generation's products, if the images are of this run.
        images: those that were calibrated on.
        measured: what utils.evaluate returned.
    """
    skipped = [name for name, bits in quantizer_bits(quantized).items() if bits == FLOAT_BITS]
    return {
        "model": options.model,
        "tag": tag,
        "w_bit": options.w_bit,
        "a_bit": options.a_bit,
        "recipe": options.recipe,
        "symmetric": options.symmetric,
        "mode": options.mode,
        "seed": options.seed,
        "n": measured.get("n", 0),
        "top1": measured.get("quantized_top1"),
        "top5": measured.get("quantized_top5"),
        "float_top1": measured.get("float_top1"),
        "float_top5": measured.get("float_top5"),
        "agreement": measured.get("agreement"),
        "logit_error": measured.get("logit_error"),
        **{name: measured[name] for name in EMBEDDING_RESULTS if name in measured},
        "skipped": skipped if options.skip_layers else [],
        "unreadable": measured.get("unreadable", []),
        "calibration_images": len(images),
        "precision": precision if options.mode == 0 and not options.images else None,
    }


def collect_saved(header: dict, measured: dict) -> dict:
    """What results.json says of a model that was loaded with the header of its file."""
    return {
        "model": header["model"],
        "tag": header["tag"],
        "recipe": header["recipe"] and header["recipe"]["name"],
        "bits": header["bits"],
        "n": measured["n"],
        "top1": measured.get("quantized_top1"),
        "top5": measured.get("quantized_top5"),
        **{name: measured[name] for name in ("quantized_knn",) if name in measured},
        "unreadable": measured["unreadable"],
    }


def run_name(options: argparse.Namespace, model: str) -> str:
    """The name of a run's folder in runs/."""
    recipe = f"_{options.recipe}" * (options.recipe != "paper") + "_symmetric" * options.symmetric
    return f"{model}_w{options.w_bit}a{options.a_bit}{recipe}_mode{options.mode}_seed{options.seed}"


def headline(options: argparse.Namespace, tag: str, device: torch.device) -> str:
    """What is about to be done. Of weights that are the user's own, timm's tag would say that they are timm's."""
    architecture = tag.partition(".")[0]
    if options.model.startswith(("local-dir:", "hf-hub:")):
        tag = f"{options.model.partition(':')[2]} as timm's {architecture}"
    elif options.checkpoint:
        tag = f"{architecture} of {options.checkpoint}"
    where = utils.run.environment.device_name(device)
    how = [f"recipe {options.recipe}"] * (options.recipe != "paper") + ["symmetric"] * options.symmetric
    return ", ".join([f"{tag}: W{options.w_bit}/A{options.a_bit}", *how, f"{MODES[options.mode]} images", where])


def describe(results: dict) -> str:
    """The results as a person reads them."""
    seconds = results["seconds"]
    times = f"images {seconds['images']:.1f} s, calibration {seconds['calibrate']:.1f} s"
    if "cosine" in results:
        return f"{_describe_embeddings(results)}\n{times}"
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
    if results["unreadable"]:
        skipped += f"\n{len(results['unreadable'])} unreadable images skipped"
    table = "\n".join(f"{name:<8}{top1:>9}{top5:>9}" for name, top1, top5 in rows)
    return f"{table}\n{results['n']} images in {seconds['evaluate']:.1f} s; {times}{skipped}"


def _describe_embeddings(results: dict) -> str:
    """The results of a model without a classifier."""
    rows, where = [], f"on {HELD_OUT} held-out generated images"
    if "quantized_knn" in results:
        where = f"on {results['n']} images"
        rows = [f"{'':<8}{'k-NN %':>9}", f"{'float':<8}{results['float_knn']:>9.2f}"]
        rows.append(f"{'W{w_bit}/A{a_bit}'.format(**results):<8}{results['quantized_knn']:>9.2f}")
    cosines = f"cosine {results['cosine']:.4f}, at worst {results['worst_cosine']:.4f}"
    return "\n".join([*rows, f"float and quantized embeddings {where}: {cosines}"])


def describe_saved(results: dict, file: Path) -> str:
    """The results of a model from a file, as a person reads them."""
    accuracy = (
        f"k-NN {results['quantized_knn']:.2f} %"
        if "quantized_knn" in results
        else (f"top-1 {results['top1']:.2f} %, top-5 {results['top5']:.2f} %")
    )
    return f"{results['tag']}, {file}: {accuracy}\n{results['n']} images in {results['seconds']['evaluate']:.1f} s"


@by_first
def publish(record: Record, results: dict, text: str) -> None:
    """Write results.json, and print what a person reads."""
    record.write("results.json", results)
    print(text, f"results: {record.folder}", sep="\n")


@by_first
def check_readable(results: dict, skip_bad: bool, record: Record) -> None:
    """Fail at the end of a run that met unreadable images, unless they may be left out."""
    unreadable = results.get("unreadable")
    if unreadable and not (skip_bad and results["n"]):
        count, some = len(unreadable), ", ".join(unreadable[:5])
        where = f", ..., all in {record.folder / 'results.json'}" if count > 5 else ""
        raise InputError(f"{count} images are not readable ({some}{where}); leave them out with --skip-bad")
