"""Generate images from a model alone: noise, optimised until the model's attention tells its patches apart.

    python generate_data.py --model deit_base --output images.safetensors

Section 3.2 of the paper. `generate_data` is the method, `GenerationSettings` holds its constants; the command line at
the end writes the images and a picture of them.
"""

import utils.run.environment  # isort: skip  # noqa: F401 - first: a broken installation is told in one line

import argparse
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from models import build_model, class_names, model_notes, model_tag, normalization, resized_size
from quant import is_calibrated
from quant.contrast import SHADED, add_shaded, stretch
from utils.attention import attention_outputs, frozen, where_not_finite
from utils.images import draw_noise, save_images
from utils.losses import TERMS, LossTerms, loss_terms, try_out
from utils.options import check_generation, parse_generation
from utils.plots import plot_losses
from utils.products import fast_products
from utils.run.compilation import repeated
from utils.run.distributed import by_first, first_process_first, gather, process_group, rank, world_size
from utils.run.errors import exit_cleanly
from utils.run.memory import what_fits
from utils.run.optimisation import Optimisation
from utils.run.options import pick_device
from utils.run.precision import default_precision, float32_products
from utils.run.progress import progress_bar
from utils.run.seeds import make_deterministic, stream
from utils.run.signals import stop_requests
from utils.run.state import digest, unfinished


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
    # How it is computed
    precision: str = "fp32"  # of the model's own products: fp32, tf32 or bf16; the losses are always float32
    compile: bool = False  # with torch.compile, where that works
    checkpoint_activations: bool = False  # compute them again in the backward pass: less memory, more time


@torch.inference_mode(False)
@torch.enable_grad()
def generate_data(
    model: nn.Module,
    num_images: int = 32,
    seed: int = 0,
    settings: GenerationSettings | None = None,
    progress: bool = True,
    losses: list[list[float]] | None = None,
    state: Path | None = None,
) -> Tensor:
    """Optimise Gaussian noise into images for `model`.

    More images than `settings.batch_size` are made in batches, each with losses of its own. The processes of a
    torchrun share the batches, and all return all images.

    Args:
        model: a timm ViT, DeiT or Swin in float, on the device to work on. It is left as it was.
        num_images: images to generate.
        seed: of noise, labels, jitter and TV target; the same seed gives the same images on one device.
        settings: None for the published ones.
        progress: show a bar with the terms of the loss.
        losses: a list that is extended by [L_PSE, L_OH, L_TV] of each step.
        state: a folder for finished and interrupted batches; what is there of this very computation is gone on from.

    Returns:
        (num_images, 3, H, W) on the CPU: normalised pixels of the model's input size, all within the valid range.

    Raises:
        TypeError: the model has no attention of timm's ViT or Swin, or is quantized: rounding has no gradient.
        FloatingPointError: a term of the loss is not finite; names it, and the layer.
        InputError: there is not the memory for a batch, or `state` holds another computation's.
        Stopped: SIGINT or SIGTERM came, and `state` is saved.
    """
    if is_calibrated(model):
        raise TypeError("generate_data expects a float model; got one that is calibrated")
    settings = settings or GenerationSettings()
    batches = list(enumerate(draw_labels(num_images, model.num_classes, seed).split(settings.batch_size)))
    mine, finished, total = batches[rank() :: world_size()], {}, settings.rounds * settings.steps
    device = next(model.parameters()).device
    identity = {"weights": digest(model.parameters()) if state else None, "seed": seed, **asdict(settings)}
    identity["img_size"] = list(model.patch_embed.img_size)
    with (
        frozen(model, settings.checkpoint_activations),
        float32_products(tf32=settings.precision == "tf32"),
        fast_products(model, settings.precision),
        attention_outputs(model) as outputs,  # once: other hooks would be compiled anew
        stop_requests() as stop,
        progress_bar(total=len(mine) * total, desc="generating", unit="step", disable=not progress) as bar,
    ):
        eager = loss_terms(model, outputs, settings.precision)
        if settings.checkpoint_activations:  # which keeps the state of random numbers, and that is no part of a graph
            fast, advice = nullcontext(eager), []
        else:
            begin = partial(bar.set_postfix_str, "compiling, for one to three minutes")
            fast = repeated(eager, device, settings.compile, try_out, begin)
            advice = ["--checkpoint-activations takes less"]
        with fast as terms:
            for index, labels in mine:
                batch = Batch(model, terms, labels, seed, index, settings)
                optimisation = Optimisation(
                    batch.step,
                    TERMS,
                    total,
                    tensors={"images": batch.images},
                    optimizers=[batch.optimizer],
                    random=batch.random,
                    file=state and state / f"batch-{index}.safetensors",
                    identity={**identity, "labels": labels.tolist()},
                    not_finite=partial(where_not_finite, model, batch.images, settings.precision),
                    out_of_memory=partial(what_fits, partial(batch.try_out, eager), len(labels), advice),
                )
                bar.update(optimisation.done)
                optimisation.run(bar, stop)
                finished[index] = batch.images.detach().cpu(), optimisation.losses
    finished = {index: result for some in gather(finished) for index, result in some.items()}
    if losses is not None:
        losses += [row for index in sorted(finished) for row in finished[index][1]]
    return torch.cat([finished[index][0] for index in sorted(finished)])


def draw_labels(num_images: int, num_classes: int, seed: int = 0) -> Tensor:
    """The classes, drawn uniformly, that `generate_data` makes its images for: (num_images,). 0 without any."""
    return torch.randint(max(num_classes, 1), (num_images,), generator=stream(seed, "labels"))


class Batch:
    """Images that share one loss, from noise on."""

    def __init__(
        self, model: nn.Module, terms: LossTerms, labels: Tensor, seed: int, index: int, settings: GenerationSettings
    ) -> None:
        device, size, B = next(model.parameters()).device, model.patch_embed.img_size, len(labels)
        self.model, self.terms, self.labels, self.settings = model, terms, labels.to(device), settings
        self.images = torch.randn(B, 3, *size, generator=stream(seed, "images", index)).to(device).requires_grad_()
        self.random = stream(seed, "augmentation", index)
        # TV grows with the root of the number of pixels in the batch; the published target is for 32 of 224x224.
        low, high = (target * math.sqrt(B * math.prod(size) / (32 * 224 * 224)) for target in settings.tv_target)
        self.tv_target = (low + (high - low) * torch.rand((), generator=self.random)).to(device)
        self.rate = (
            settings.swin_learning_rate
            if isinstance(model, (SwinTransformer, SwinTransformerV2))
            else settings.learning_rate
        )
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam([self.images], lr=self.rate, betas=settings.betas, fused=fused)
        self.weights = torch.tensor([1.0, settings.class_weight, settings.tv_weight], device=device)
        mean, std = normalization(model)
        self.valid = (-mean / std).to(device), ((1 - mean) / std).to(device)  # (3, 1, 1) each, of valid pixels

    def step(self, number: int) -> Tensor:
        """Augment, loss, Adam, clamp; returns the terms of the loss and the length of its gradient, (4,)."""
        turn, step = divmod(number, self.settings.steps)
        self.optimizer.param_groups[0]["lr"] = self.rate * learning_rate_factor(step, self.settings)
        images = self.augment(round(self.settings.jitter * (turn + 1) * self.images.shape[2]))
        values = self.terms(images, self.labels, self.tv_target)
        (gradient,) = torch.autograd.grad(values @ self.weights, self.images)
        self.images.grad = gradient.contiguous()  # fused Adam goes by places in memory; a compiled one may be permuted
        length = torch.linalg.vector_norm(self.images.grad)
        self.optimizer.step()
        with torch.no_grad():
            self.images.clamp_(*self.valid)
        return torch.cat([values.detach(), length[None]])

    def augment(self, reach: int) -> Tensor:
        """The images shifted cyclically, by the same random offset down and right, and flipped in half of all cases."""
        offset = torch.randint(-reach, reach + 1, (), generator=self.random).item()
        shifted = self.images.roll((offset, offset), dims=(2, 3))
        return shifted.flip(3) if torch.rand((), generator=self.random) < 0.5 else shifted

    def try_out(self, terms: LossTerms, size: int) -> Tensor:
        """The gradient of terms for the first `size` images."""
        return try_out(terms, self.images[:size], self.labels[:size], self.tv_target)


def learning_rate_factor(step: int, settings: GenerationSettings) -> float:
    """Learning rate of a round's step, as a fraction of the full one."""
    warmup = round(settings.warmup * settings.steps)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (settings.steps - warmup))) / 2


def generation_settings(options: argparse.Namespace, device: torch.device, model: nn.Module) -> GenerationSettings:
    """What the command line asks for, or else what is fast for the model on the device."""
    return GenerationSettings(
        steps=options.steps,
        precision=options.precision or default_precision(device, model),
        compile=options.compile,
        checkpoint_activations=options.checkpoint_activations,
    )


def run(options: argparse.Namespace) -> None:
    """Generate, and write the images, a picture of them, and plots if asked for."""
    if options.deterministic:
        make_deterministic()
    with first_process_first():
        model_tag(options.model)
        check_generation(options)
        device = pick_device(options.device)
    losses: list[list[float]] = []
    with unfinished(options.output.with_suffix(".unfinished"), options.resume) as state:
        with first_process_first():
            model = build_model(options.model, options.checkpoint, img_size=options.img_size).to(device)
        for line in model_notes(model):
            by_first(print)(line)
        settings = generation_settings(options, device, model)
        images = generate_data(model, options.num_images, options.seed, settings, losses=losses, state=state)
        write(options, model, images, losses)


@by_first
def write(options: argparse.Namespace, model: nn.Module, images: Tensor, losses: list[list[float]]) -> None:
    """Write what was generated, and say where it is."""
    if options.plots:
        noise = draw_noise(len(images), model.patch_embed.img_size, options.seed)
        plot_losses(options.output.with_suffix(".losses.png"), model, noise, images, losses)
    labels, range_ = draw_labels(len(images), model.num_classes, options.seed), normalization(model)
    if options.contrast:
        images, labels = add_shaded(stretch(images, *range_), *range_), torch.cat([labels, labels[::SHADED]])
    kept = {"labels": labels} if model.num_classes else {}
    where = save_images(options.output, *range_, images, class_names(model), resized_size(model), **kept)
    print(f"{len(images)} images: {where}")


def main() -> None:
    with process_group():
        with first_process_first():
            options = parse_generation()
        run(options)


if __name__ == "__main__":
    exit_cleanly(main)
