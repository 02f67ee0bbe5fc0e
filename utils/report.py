"""What a run has to say: the contents of results.json, and its lines on the screen."""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import nn

import utils.environment
from models import model_tag
from quant import quantizer_bits
from quant.quantizers import FLOAT_BITS

MODES = {0: "generated", 1: "noise", 2: "real"}
HELD_OUT = 32  # generated images to compare the two models on where there is no data set


def collect(
    options: argparse.Namespace,
    device: torch.device,
    seconds: dict[str, float],
    quantized: nn.Module,
    measured: dict,
    calibration_images: int,
    precision: str | None,
) -> dict:
    """What results.json holds; accuracies are None where they were not measured, `precision` if none was generated."""
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
        "precision": precision,
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
    if results["unreadable"]:
        skipped += f"\n{len(results['unreadable'])} unreadable images skipped"
    table = "\n".join(f"{name:<8}{top1:>9}{top5:>9}" for name, top1, top5 in rows)
    return f"{table}\n{results['n']} images in {seconds['evaluate']:.1f} s; {times}{skipped}"


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long the block takes, as seconds[stage]."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
