"""Generate images from a model alone: noise, optimised until the model's attention tells its patches apart.

    python generate_data.py --model deit_base --output images.safetensors

Section 3.2 of the paper. `generate_data` is the method, `GenerationSettings` holds its constants; the command line at
the end writes the images and a picture of them.
"""

import utils.environment  # isort: skip  # noqa: F401 - first: a broken installation is told in one line

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from tqdm import tqdm

from models import build_model, model_tag, normalization
from quant import is_calibrated
from utils.attention import attention_outputs, layer_entropies
from utils.entropy import patch_similarity_entropy, total_variation
from utils.errors import InputError, exit_cleanly
from utils.files import check_writable
from utils.images import save_images
from utils.options import Parser, add_generation_options, add_model_options, pick_device, positive
from utils.plots import plot_generation, require_matplotlib
from utils.progress import progress_bar
from utils.seeds import stream

__all__ = ["GenerationSettings", "draw_labels", "generate_data", "patch_similarity_entropy", "total_variation"]


@dataclass(frozen=True)
class GenerationSettings:
    """The constants of image generation. Those that the paper does not give are the published implementation's."""

    learning_rate: float = 0.20  # ViT and DeiT
    swin_learning_rate: float = 0.25
    betas: tuple[float, float] = (0.5, 0.9)  # of Adam, whose state lasts through both rounds
    rounds: int = 2  # the second repeats the learning rates with twice the jitter
    steps: int = 500  # a round
    warmup: float = 0.2  # of a round: the learning rate rises linearly, then falls to zero as a cosine
    jitter: float = 15 / 224  # of the image's side: the largest cyclic shift in round one
    class_weight: float = 1.0  # of L_OH
    tv_weight: float = 0.05  # of L_TV
    tv_target: tuple[float, float] = (2500.0, 3000.0)  # drawn uniformly; for 32 images of 224x224
    batch_size: int = 32  # images that share one loss: TV and the end points of the density see all of them


def generate_data(
    model: nn.Module,
    num_images: int = 32,
    seed: int = 0,
    settings: GenerationSettings | None = None,
    progress: bool = True,
    losses: list[list[float]] | None = None,
) -> Tensor:
    """Optimise Gaussian noise into images for `model`.

    More images than `settings.batch_size` are made in batches, each with losses of its own.

    Args:
        model: a timm ViT, DeiT or Swin in float, on the device to work on. It is left as it was.
        num_images: images to generate.
        seed: of noise, labels, jitter and TV target; the same seed gives the same images on one device.
        settings: None for the published ones.
        progress: show a bar with the terms of the loss.
        losses: a list that each step extends by its [L_PSE, L_OH, L_TV].

    Returns:
        (num_images, 3, H, W) on the CPU: normalised pixels of the model's input size, all within the valid range.

    Raises:
        TypeError: the model has no attention of timm's ViT or Swin, or is quantized: rounding has no gradient.
        FloatingPointError: a term of the loss is not finite; names it.
    """
    if is_calibrated(model):
        raise TypeError("generate_data expects a float model; got one that is calibrated")
    settings = settings or GenerationSettings()
    batches = draw_labels(num_images, model.num_classes, seed).split(settings.batch_size)
    steps = len(batches) * settings.rounds * settings.steps
    with frozen(model), progress_bar(total=steps, desc="generating", unit="step", disable=not progress) as bar:
        losses = [] if losses is None else losses
        return torch.cat([_optimise(model, labels, seed, i, settings, bar, losses) for i, labels in enumerate(batches)])


def draw_labels(num_images: int, num_classes: int, seed: int = 0) -> Tensor:
    """The classes, drawn uniformly, that `generate_data` makes its images for: (num_images,)."""
    return torch.randint(num_classes, (num_images,), generator=stream(seed, "labels"))


def learning_rate_factor(step: int, settings: GenerationSettings) -> float:
    """Learning rate of a round's step, as a fraction of the full one."""
    warmup = round(settings.warmup * settings.steps)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (settings.steps - warmup))) / 2


def _optimise(
    model: nn.Module, labels: Tensor, seed: int, batch: int, settings: GenerationSettings, bar: tqdm, losses: list
) -> Tensor:
    """Generate one batch, an image a label."""
    device, size = next(model.parameters()).device, model.patch_embed.img_size
    mean, std = normalization(model)
    darkest, brightest = (-mean / std).to(device), ((1 - mean) / std).to(device)  # (3, 1, 1), of valid pixels
    B, labels = len(labels), labels.to(device)
    images = torch.randn(B, 3, *size, generator=stream(seed, "images", batch)).to(device).requires_grad_()
    random = stream(seed, "augmentation", batch)
    # TV grows with the square root of the number of pixels in the batch; the published target is for 32 of 224x224.
    low, high = (target * math.sqrt(B * math.prod(size) / (32 * 224 * 224)) for target in settings.tv_target)
    tv_target = low + (high - low) * torch.rand((), generator=random).item()

    full_rate = settings.swin_learning_rate if isinstance(model, SwinTransformer) else settings.learning_rate
    optimizer = torch.optim.Adam([images], lr=full_rate, betas=settings.betas)
    recent: list[Tensor] = []
    with attention_outputs(model) as outputs:
        for turn in range(settings.rounds):
            reach = round(settings.jitter * (turn + 1) * size[0])
            for step in range(settings.steps):
                optimizer.param_groups[0]["lr"] = full_rate * learning_rate_factor(step, settings)
                offset = torch.randint(-reach, reach + 1, (), generator=random).item()
                shifted = images.roll((offset, offset), dims=(2, 3))
                if torch.rand((), generator=random) < 0.5:
                    shifted = shifted.flip(3)

                logits = model(shifted)  # (B, classes)
                entropy = sum(patch_similarity_entropy(features, B) for features in outputs)
                terms = {
                    "L_PSE": -entropy,
                    "L_OH": F.cross_entropy(logits.float(), labels),
                    "L_TV": (total_variation(shifted) - tv_target).abs(),
                }
                loss = terms["L_PSE"] + settings.class_weight * terms["L_OH"] + settings.tv_weight * terms["L_TV"]
                (images.grad,) = torch.autograd.grad(loss, images)
                optimizer.step()
                with torch.no_grad():
                    images.clamp_(darkest, brightest)
                outputs.clear()

                recent.append(torch.stack(list(terms.values())).detach())
                bar.update()
                if len(recent) == 10 or step + 1 == settings.steps:  # seldom: reading them waits for the device
                    losses += _read(list(terms), recent, turn * settings.steps + step + 1, bar)
                    recent.clear()
    return images.detach().cpu()


def _read(names: list[str], recent: list[Tensor], last_step: int, bar: tqdm) -> list[list[float]]:
    """Read the terms of the `recent` steps; show the last in the bar, and stop at the first that is not finite."""
    rows = torch.stack(recent).tolist()
    for step, row in enumerate(rows, start=last_step - len(rows) + 1):
        for name, value in zip(names, row, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} became {value} at step {step}; expected finite losses")
    bar.set_postfix({name: f"{value:.3g}" for name, value in zip(names, rows[-1], strict=True)})
    return rows


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in evaluation mode and no parameter asks for a gradient."""
    training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        model.train(training)
        for parameter in trainable:
            parameter.requires_grad_(True)


def plot_losses(path: Path, model: nn.Module, images: Tensor, seed: int, losses: list[list[float]]) -> None:
    """Draw how `images` came about: the terms of the loss, and the entropies of the noise and of the images."""
    noise = torch.randn(images.shape, generator=stream(seed, "noise"))
    plot_generation(path, torch.tensor(losses), layer_entropies(model, noise), layer_entropies(model, images))


def main() -> None:
    parser = Parser(description="Generate images from a vision transformer, with no data.")
    add_model_options(parser)
    add_generation_options(parser)
    add = parser.add_argument
    add("--num-images", type=positive, default=32, metavar="N", help="images to generate (32)")
    add(
        "--output",
        type=Path,
        default=Path("images.safetensors"),
        metavar="FILE",
        help="file for the images; a picture of them goes beside it (images.safetensors)",
    )
    options = parser.parse_args()
    model_tag(options.model)
    if options.output.suffix != ".safetensors":
        raise InputError(f"--output: expected a name that ends in .safetensors; got {options.output}")
    if options.plots:
        require_matplotlib()
    device = pick_device(options.device)
    check_writable(options.output.parent)
    model = build_model(options.model, options.checkpoint).to(device)

    settings, losses = replace(GenerationSettings(), steps=options.steps), []
    images = generate_data(model, options.num_images, options.seed, settings, losses=losses)
    labels = draw_labels(options.num_images, model.num_classes, options.seed)
    picture = save_images(options.output, *normalization(model), images=images, labels=labels)
    if options.plots:
        plot_losses(options.output.with_suffix(".losses.png"), model, images, options.seed, losses)
    print(f"{len(images)} images: {options.output}, and to look at: {picture}")


if __name__ == "__main__":
    exit_cleanly(main)
