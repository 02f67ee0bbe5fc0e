"""Generate images from a model alone: noise, optimised until the model's attention tells its patches apart.

    python generate_data.py --model deit_base --output images.safetensors

Section 3.2 of the paper. `generate_data` is the method, `GenerationSettings` holds its constants; the command line at
the end writes the images and a picture of them.
"""

import utils.environment  # isort: skip  # noqa: F401 - first: a broken installation is told in one line

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from tqdm import tqdm

from models import build_model, model_tag, normalization
from quant import is_calibrated
from utils.attention import attention_outputs, first_not_finite, layer_entropies
from utils.compilation import REPEATED, compiled
from utils.distributed import first_process_first, gather, is_first, process_group, rank, world_size
from utils.entropy import patch_similarity_entropy, total_variation
from utils.errors import InputError, exit_cleanly
from utils.files import check_writable
from utils.images import save_images
from utils.memory import attempt
from utils.options import Parser, add_generation_options, add_model_options, pick_device, positive
from utils.plots import plot_generation, require_matplotlib
from utils.precision import float32_products, model_products
from utils.progress import progress_bar
from utils.seeds import make_deterministic, stream
from utils.signals import Stopped, stop_requests
from utils.state import digest, load_state, save_state, unfinished

__all__ = ["GenerationSettings", "draw_labels", "generate_data", "patch_similarity_entropy", "total_variation"]


LossTerms = Callable[[Tensor, Tensor, Tensor], Tensor]  # see loss_terms


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
    mine, finished = batches[rank() :: world_size()], {}
    steps = len(mine) * settings.rounds * settings.steps
    with (
        frozen(model, settings.checkpoint_activations),
        float32_products(tf32=settings.precision == "tf32"),
        attention_outputs(model) as outputs,  # once: other hooks would be compiled anew
        stop_requests() as stop,
        progress_bar(total=steps, desc="generating", unit="step", disable=not progress) as bar,
    ):
        terms = loss_terms(model, outputs, settings.precision)
        compile = settings.compile and not settings.checkpoint_activations
        for index, labels in mine:
            batch = Batch(model, labels, seed, index, settings, state)
            bar.update(batch.step)
            if compile and batch.step < settings.rounds * settings.steps:  # once, and not for batches that are finished
                bar.set_postfix_str("compiling, for a minute or two")
                terms, compile = compiled(terms, batch.try_out, **REPEATED), False
            finished[index] = batch.optimise(terms, bar, stop)
    finished = {index: result for some in gather(finished) for index, result in some.items()}
    if losses is not None:
        losses += [row for index in sorted(finished) for row in finished[index][1]]
    return torch.cat([finished[index][0] for index in sorted(finished)])


def draw_labels(num_images: int, num_classes: int, seed: int = 0) -> Tensor:
    """The classes, drawn uniformly, that `generate_data` makes its images for: (num_images,)."""
    return torch.randint(num_classes, (num_images,), generator=stream(seed, "labels"))


def learning_rate_factor(step: int, settings: GenerationSettings) -> float:
    """Learning rate of a round's step, as a fraction of the full one."""
    warmup = round(settings.warmup * settings.steps)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (settings.steps - warmup))) / 2


class Batch:
    """Images that share one loss, under optimisation: all that a step reads and writes, in memory and on disk."""

    def __init__(
        self, model: nn.Module, labels: Tensor, seed: int, index: int, settings: GenerationSettings, state: Path | None
    ) -> None:
        device, size, B = next(model.parameters()).device, model.patch_embed.img_size, len(labels)
        self.model, self.labels, self.settings = model, labels.to(device), settings
        self.images = torch.randn(B, 3, *size, generator=stream(seed, "images", index)).to(device).requires_grad_()
        self.random = stream(seed, "augmentation", index)
        # TV grows with the root of the number of pixels in the batch; the published target is for 32 of 224x224.
        low, high = (target * math.sqrt(B * math.prod(size) / (32 * 224 * 224)) for target in settings.tv_target)
        self.tv_target = (low + (high - low) * torch.rand((), generator=self.random)).to(device)
        self.rate = settings.swin_learning_rate if isinstance(model, SwinTransformer) else settings.learning_rate
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam([self.images], lr=self.rate, betas=settings.betas, fused=fused)
        self.weights = torch.tensor([1.0, settings.class_weight, settings.tv_weight], device=device)
        mean, std = normalization(model)
        self.valid = (-mean / std).to(device), ((1 - mean) / std).to(device)  # (3, 1, 1) each, of valid pixels
        self.step, self.losses = 0, []
        self.file = state and state / f"batch-{index}.safetensors"
        if self.file:
            self.identity = {"weights": digest(model), "seed": seed, "labels": labels.tolist(), **asdict(settings)}
            if self.file.exists():
                self.restore(load_state(self.file, self.identity))

    def optimise(self, terms: LossTerms, bar: tqdm, stop: Callable[[], int | None]) -> tuple[Tensor, list[list[float]]]:
        """Do all steps that are left.

        Args:
            stop: tells whether a signal asks to stop after the present step.

        Returns:
            The images, on the CPU, and the terms of every step.
        """
        good, recent, total = self.snapshot(), [], self.settings.rounds * self.settings.steps
        while self.step < total:
            values = attempt(lambda: self.advance(terms))
            if values is None:
                raise InputError(self.what_fits(terms))
            recent.append(values)
            bar.update()
            if len(recent) == 10 or self.step == total or stop():  # seldom: it waits for the device
                self.read(recent, bar, good)
                good, recent = self.snapshot(), []
            if stop():
                raise Stopped(stop(), self.keep(good, f"interrupted at step {self.step}"))
        self.keep(good, "finished")
        return self.images.detach().cpu(), self.losses

    def advance(self, terms: LossTerms) -> Tensor:
        """One step; returns the terms of its loss and the length of its gradient, (4,)."""
        turn, step = divmod(self.step, self.settings.steps)
        self.optimizer.param_groups[0]["lr"] = self.rate * learning_rate_factor(step, self.settings)
        images = self.augment(round(self.settings.jitter * (turn + 1) * self.images.shape[2]))
        values = terms(images, self.labels, self.tv_target)
        (gradient,) = torch.autograd.grad(values @ self.weights, self.images)
        self.images.grad = gradient.contiguous()  # fused Adam goes by places in memory; a compiled one may be permuted
        length = torch.linalg.vector_norm(self.images.grad)
        self.optimizer.step()
        with torch.no_grad():
            self.images.clamp_(*self.valid)
        self.step += 1
        return torch.cat([values.detach(), length[None]])

    def augment(self, reach: int) -> Tensor:
        """The images shifted cyclically, by the same random offset down and right, and flipped in half of all cases."""
        offset = torch.randint(-reach, reach + 1, (), generator=self.random).item()
        shifted = self.images.roll((offset, offset), dims=(2, 3))
        return shifted.flip(3) if torch.rand((), generator=self.random) < 0.5 else shifted

    def read(self, recent: list[Tensor], bar: tqdm, good: dict[str, Tensor]) -> None:
        """Read the terms of the `recent` steps and show the last; stop at the first that is not finite."""
        rows, names = torch.stack(recent).tolist(), ("L_PSE", "L_OH", "L_TV", "the gradient")
        for step, row in enumerate(rows, start=self.step - len(rows) + 1):
            for name, value in zip(names, row, strict=True):
                if not math.isfinite(value):
                    layer = first_not_finite(self.model, good["images"])
                    where = f"{layer} is the first layer that is not" if layer else "all layers were finite before"
                    problem = f"{name} became {value} at step {step}; expected finite losses; {where}"
                    raise FloatingPointError(self.keep(good, problem))
        bar.set_postfix({name: f"{value:.3g}" for name, value in zip(names[:3], rows[-1], strict=False)})
        self.losses += [row[:3] for row in rows]

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of everything that steps change."""
        moments = self.optimizer.state.get(self.images, {})
        return {
            "images": self.images.detach().clone(),
            **{name: moments[name].clone() for name in ("exp_avg", "exp_avg_sq") if name in moments},
            "random": self.random.get_state(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go back to a snapshot."""
        self.step, self.losses = len(tensors["losses"]), tensors["losses"].tolist()
        self.images.data = tensors["images"].to(self.images.device)
        self.random.set_state(tensors["random"])
        if self.step:
            moments = {name: tensors[name].to(self.images.device) for name in ("exp_avg", "exp_avg_sq")}
            device = self.images.device if self.optimizer.defaults["fused"] else None
            self.optimizer.state[self.images] = moments | {"step": torch.tensor(float(self.step), device=device)}

    def keep(self, snapshot: dict[str, Tensor], why: str) -> str:
        """Write a snapshot to the batch's file, if it has one; returns `why`, and where to go on from."""
        if not self.file:
            return why
        save_state(self.file, {name: value.cpu() for name, value in snapshot.items()}, self.identity)
        return f"{why}; the state of step {len(snapshot['losses'])} is in {self.file.parent}: go on with --resume"

    def try_out(self, terms: LossTerms, size: int | None = None) -> Tensor:
        """The gradient for the first `size` images, which changes nothing: to see whether it can be had."""
        images = self.images[:size].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(terms(images, self.labels[:size], self.tv_target).sum(), images)
        return gradient

    @torch.compiler.set_stance("force_eager")  # compiling for each number of images would take minutes
    def what_fits(self, terms: LossTerms) -> str:
        """Say that the memory does not suffice, and for how many images it would."""
        torch.compiler.reset()  # CUDA graphs hold memory
        size = len(self.labels) // 2
        while size and attempt(partial(self.try_out, terms, size)) is None:
            size //= 2
        advice = [] if self.settings.checkpoint_activations else ["--checkpoint-activations takes less"]
        advice += [f"{size} images at a time would fit"] if size else []
        return f"out of memory with {len(self.labels)} images: {', and '.join(advice) or 'not even one would fit'}"


def loss_terms(model: nn.Module, outputs: list[Tensor], precision: str) -> LossTerms:
    """The function from images (B, 3, H, W), labels (B,) and TV target (0-d) to [L_PSE, L_OH, L_TV]: (3,) in float32.

    Args:
        outputs: the list to which `attention_outputs` appends.
    """

    def terms(images: Tensor, labels: Tensor, tv_target: Tensor) -> Tensor:
        outputs.clear()
        variation = total_variation(images)  # first: its backward pass is then the last, when activations are gone
        with model_products(precision, images.device):
            logits = model(images)  # (B, classes)
        entropies = [patch_similarity_entropy(features, len(images)) for features in outputs]
        outputs.clear()
        cross_entropy = F.cross_entropy(logits.float(), labels)
        return torch.stack([-sum(entropies), cross_entropy, (variation - tv_target).abs()])

    return terms


@contextmanager
def frozen(model: nn.Module, checkpoint_activations: bool = False) -> Iterator[None]:
    """Within the context the model is in evaluation mode and no parameter asks for a gradient."""
    training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval().requires_grad_(False)
        model.set_grad_checkpointing(checkpoint_activations)
        yield
    finally:
        model.set_grad_checkpointing(False)
        model.train(training)
        for parameter in trainable:
            parameter.requires_grad_(True)


def plot_losses(path: Path, model: nn.Module, images: Tensor, seed: int, losses: list[list[float]]) -> None:
    """Draw how `images` came about: the terms of the loss, and the entropies of the noise and of the images."""
    noise = torch.randn(images.shape, generator=stream(seed, "noise"))
    plot_generation(path, torch.tensor(losses), layer_entropies(model, noise), layer_entropies(model, images))


def generation_settings(options: argparse.Namespace, device: torch.device) -> GenerationSettings:
    """What the command line asks for, or else what is fast on the device: a CPU gains by neither on small models."""
    cuda = device.type == "cuda"
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return GenerationSettings(
        steps=options.steps,
        precision=options.precision or ("bf16" if bf16 else "fp32"),
        compile=cuda if options.compile is None else options.compile,
        checkpoint_activations=options.checkpoint_activations,
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
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
    return parser.parse_args(arguments)


def check_options(options: argparse.Namespace) -> torch.device:
    """Refuse what cannot work before any work is done; returns the device."""
    model_tag(options.model)
    if options.output.suffix != ".safetensors":
        raise InputError(f"--output: expected a name that ends in .safetensors; got {options.output}")
    if options.plots:
        require_matplotlib()
    device = pick_device(options.device)
    check_writable(options.output.parent)
    return device


def run(options: argparse.Namespace) -> None:
    """Generate, and write the images, a picture of them, and plots if asked for."""
    if options.deterministic:
        make_deterministic()
    with first_process_first():
        device = check_options(options)
    losses: list[list[float]] = []
    with unfinished(options.output.with_suffix(".unfinished"), options.resume) as state:
        with first_process_first():
            model = build_model(options.model, options.checkpoint).to(device)
        settings = generation_settings(options, device)
        images = generate_data(model, options.num_images, options.seed, settings, losses=losses, state=state)
        if not is_first():
            return
        labels = draw_labels(options.num_images, model.num_classes, options.seed)
        picture = save_images(options.output, *normalization(model), images=images, labels=labels)
        if options.plots:
            plot_losses(options.output.with_suffix(".losses.png"), model, images, options.seed, losses)
        print(f"{len(images)} images: {options.output}, and to look at: {picture}")


def main() -> None:
    with process_group():
        with first_process_first():
            options = parse()
        run(options)


if __name__ == "__main__":
    exit_cleanly(main)
