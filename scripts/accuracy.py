"""Accuracy for scripts that quantize one model many times: its images are decoded once, its float predictions kept."""

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils.run.environment  # isort: skip

import torch
from torch import Tensor, nn

from models import build_model, class_names, evaluation_transform, normalization
from utils.data import UNREADABLE, Images, check_dataset, validation_images
from utils.images import load_images
from utils.options import add_checkpoint, add_model, bit_width
from utils.outputs import CPU_BATCH, inference
from utils.run.errors import InputError
from utils.run.options import DEVICE_HELP, pick_device, positive

ORIGIN = ("device", "torch", "timm", "commit", "date")  # columns of rows: `origin`, and the date


def add_case(parser: ArgumentParser) -> None:
    """Add the options that name a model, and what it is calibrated and validated on."""
    add_model(parser)
    add_checkpoint(parser)
    add = parser.add_argument
    add("--dataset", type=Path, required=True, metavar="DIR", help="data set with val/ class folders")
    add("--images", type=Path, required=True, metavar="FILE", help="generated images to calibrate with")
    add("--limit", type=positive, metavar="N", help="validate on N images (all)")
    add("--device", metavar="NAME", help=DEVICE_HELP)


def open_case(options: Namespace) -> tuple[torch.device, nn.Module, Tensor, tuple[Tensor, Tensor]]:
    """The device, the float model on it, the images to calibrate with, and validation images with their labels."""
    device = pick_device(options.device)
    check_dataset(options.dataset, ["val"])
    model = build_model(options.model, options.checkpoint).to(device)
    calibration = load_images(options.images, model.patch_embed.img_size, *normalization(model))["images"]
    if not model.num_classes:
        raise InputError(f"--model {options.model}: expected a model with a classifier; it has none")
    transform, names = evaluation_transform(model), class_names(model)
    data = validation_images(options.dataset, transform, model.num_classes, limit=options.limit, names=names)
    return device, model, calibration, decoded(data)


def decoded(data: Images) -> tuple[Tensor, Tensor]:
    """All images of a split and their labels: (B, 3, H, W) and (B,)."""
    items = [data[index] for index in range(len(data))]
    if unreadable := [data.files[index] for _, label, index in items if label == UNREADABLE]:
        raise InputError(f"{len(unreadable)} images are not readable ({', '.join(unreadable[:3])}); remove them")
    return torch.stack([item[0] for item in items]), torch.tensor([item[1] for item in items])


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The first prediction for each of `images` (B, 3, H, W), ties as in utils.evaluate.count_correct: (B,)."""
    device = next(model.parameters()).device
    with inference(model):
        return torch.cat([model(batch.to(device)).argmax(1).cpu() for batch in images.split(CPU_BATCH)])


def measure(quantized: nn.Module, expected: Tensor, images: Tensor, labels: Tensor) -> dict:
    """Accuracy of a quantized model, and how often it predicts what the float one does, `expected` (B,)."""
    predicted = predict(quantized, images)
    percent = {"top1": predicted == labels, "float_top1": expected == labels, "agreement": predicted == expected}
    return {"n": len(labels)} | {name: round(100 * hits.float().mean().item(), 3) for name, hits in percent.items()}


def origin(device: torch.device) -> dict[str, str | None]:
    """Where and with what rows are measured."""
    versions = utils.run.environment.versions()
    return {
        "device": utils.run.environment.device_name(device),
        "torch": versions["torch"],
        "timm": versions["timm"],
        "commit": utils.run.environment.commit(),
    }


def parse_bits(text: str) -> tuple[int, int]:
    """4/8 is 4 bits for weights and 8 for activations."""
    try:
        w_bit, a_bit = map(bit_width, text.split("/"))
    except (ValueError, ArgumentTypeError) as error:
        raise InputError(f"--bits: expected W/A, as 4/8; got '{text}'") from error
    return w_bit, a_bit
