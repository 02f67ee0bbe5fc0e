"""Train a model that comes with the project: python scripts/train.py cifar_vit. Interrupt it at will; the same command
goes on.

Leaves models/<name>.safetensors when done, and checkpoints in runs/train/ on the way. Images, their order and the
initial weights follow from the seed. Two models at once, a thread each, is how two CPU cores are used best.
"""

import json
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed, set_fused_attn
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import small
from models.zoo import normalization
from utils import fractals
from utils.photographs import DATA, prepare_dataset
from utils.run.environment import device_name
from utils.run.errors import exit_cleanly
from utils.run.files import check_writable, replacing
from utils.run.optimisation import Optimisation
from utils.run.options import DEVICE_HELP, Parser, natural, pick_device, positive
from utils.run.progress import note, progress_bar
from utils.run.signals import stop_requests

FOLDER = ROOT / "runs" / "train"  # of checkpoints
ROUNDS = 1200  # of fractals, one image a class: 60,000 training images, none of them in data/demo
MAX_SHIFT = 6  # pixels, of fractals: their only augmentation
PADDING = 4  # pixels around a photograph, of which a crop is taken


def cosine_cycles(*cycles: int, warm_up: int = 400) -> list[float]:
    """The learning rate of every step as a fraction of the largest: warm-up, then cosine to zero, in each cycle.

    Every cycle's largest rate is half of that before.
    """
    return [
        min(1.0, (step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2) / 2**cycle
        for cycle, steps in enumerate(cycles)
        for step in range(steps)
    ]


def trapezoid(steps: int, decay: int, warm_up: int = 400) -> list[float]:
    """The same with a constant rate between the warm-up and `decay` steps of a linear fall to zero."""
    return [min(1.0, (step + 1) / warm_up, (steps - step) / decay) for step in range(steps)]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    data: str  # fractals or photographs
    factors: list[float]  # one a step: the learning rate as a fraction of the largest
    batch_size: int
    lr: float  # AdamW's largest learning rate
    muon_lr: float | None  # Muon's, for the weights between patch embedding and classifier; None: AdamW for all
    dtype: torch.dtype  # of the weights in the file


RECIPES = {
    "demo_vit": Recipe("fractals", cosine_cycles(5000), 64, 1e-3, None, torch.float32),
    "demo_swin": Recipe("fractals", cosine_cycles(3750, 1875), 64, 1e-3, None, torch.float32),
    "cifar_vit": Recipe("photographs", trapezoid(7000, decay=2500), 128, 3e-3, 0.02, torch.float16),
    "cifar_swin": Recipe("photographs", trapezoid(7000, decay=2500), 128, 3e-3, 0.02, torch.float16),
}
# Where that differs from models/small.py; `enlarge` comes after
AS_TRAINED = {"cifar_vit": {"img_size": 32, "patch_size": 4}, "cifar_swin": {"img_size": 32, "patch_size": 2}}
KEPT_EVERY = 1000  # steps between the checkpoints that stay


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--seed", type=natural, default=0, help="seed of the weights and of the images (0)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads (all cores)")
    parser.add_argument("--device", metavar="NAME", help=DEVICE_HELP)
    options = parser.parse_args()
    device = pick_device(options.device)
    torch.set_num_threads(options.threads)
    check_writable(FOLDER)
    recipe = RECIPES[options.model]
    data = {"fractals": Fractals, "photographs": Photographs}[recipe.data](options.threads)
    torch.manual_seed(options.seed)
    model = build(options.model).to(device)

    name, total = f"{options.model}_seed{options.seed}", len(recipe.factors)
    optimisation = train(model, recipe, data, options.seed, FOLDER / name)
    with stop_requests() as stop, progress_bar(total=total, initial=optimisation.done, unit="step") as bar:
        optimisation.run(bar, stop)
    enlarge(model, options.model)
    model.to(recipe.dtype).float()  # the weights of the file
    record = {"seed": options.seed, "images": total * recipe.batch_size}
    record |= {"val_top1": top1(model, data.val), "val_images": len(data.val[0])}
    record |= {"torch": torch.__version__, "timm": timm.__version__, "device": device_name(device)}
    target = ROOT / "models" / f"{options.model}.safetensors"
    write_weights(model, recipe.dtype, target, record)
    print(f"wrote {target}: {json.dumps(record)}")


def train(model: nn.Module, recipe: Recipe, data: "Fractals | Photographs", seed: int, place: Path) -> Optimisation:
    """The training of a model, in place; weights on the way are kept as `place`_step1000.safetensors, ..."""
    device, optimizers = next(model.parameters()).device, make_optimizers(model, recipe)

    def step(number: int) -> Tensor:
        if number and number % KEPT_EVERY == 0:
            reached = {"step": number, "val_top1": top1(model, data.val)}
            write_weights(model, recipe.dtype, place.with_name(f"{place.name}_step{number}.safetensors"), reached)
            note(f"step {number}: top-1 {reached['val_top1']:.2f} %")
        images, labels = (tensor.to(device) for tensor in data.draw_batch(recipe.batch_size, seed, number))
        model.train()
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        loss.backward()
        length = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        for optimizer, lr in optimizers:
            optimizer.param_groups[0]["lr"] = lr * recipe.factors[number]
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack([loss.detach(), length])

    return Optimisation(
        step,
        ("loss",),
        len(recipe.factors),
        tensors=model.state_dict(),
        optimizers=[optimizer for optimizer, _ in optimizers],
        file=place.with_suffix(".safetensors"),
        identity={"seed": seed, **asdict(recipe), "dtype": str(recipe.dtype)},
        go_on="the same command",
    )


def build(name: str) -> nn.Module:
    """A model with random weights; the attention of cifar_vit starts local, as short training does not get it there.

    Its positions start as sinusoids, and each head's keys as its queries, so that a patch sees patches like it and
    near it (after Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", ICML 2023).
    """
    set_fused_attn(False)  # its bfloat16 CPU kernel is slower than two matrix products at this size
    model = getattr(small, name)(**AS_TRAINED.get(name, {}))  # which asks for that setting when it is made
    if name == "cifar_vit":
        with torch.no_grad():
            width, grid = model.embed_dim, list(model.patch_embed.grid_size)
            model.pos_embed[0, 1:] = build_sincos2d_pos_embed(grid, width)
            for block in model.blocks:
                queries, keys, _ = block.attn.qkv.weight.chunk(3)
                keys.copy_(queries.normal_(0, width**-0.5))
    return model


def enlarge(model: nn.Module, name: str) -> None:
    """Turn a model as it was trained into that of models/small.py: photographs and patches grow four times as large.

    It is nearly the same function. But over the 8 or 16 pixels of its patches, as many as a real model's have, noise
    averages out, which is why it calibrates badly; over 2 or 4 it hardly does. timm resamples the patch embedding as
    FlexiViT does (Beyer et al., CVPR 2023): of all weights that give the same tokens, the smallest.
    """
    final = getattr(small, name)().patch_embed
    model.set_input_size(final.img_size, patch_size=final.patch_size)


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[tuple[torch.optim.Optimizer, float]]:
    """The optimizers, each with its largest learning rate."""
    matrices = [value for name, value in model.named_parameters() if recipe.muon_lr and is_inner_matrix(name, value)]
    taken = {id(value) for value in matrices}
    rest = [value for value in model.parameters() if id(value) not in taken]
    optimizers = [(torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.05), recipe.lr)]
    if matrices:
        optimizers.append((torch.optim.Muon(matrices, weight_decay=0.02), recipe.muon_lr))
    return optimizers


def is_inner_matrix(name: str, value: Tensor) -> bool:
    """Is this the weight of a linear layer between patch embedding and classifier?"""
    return value.ndim == 2 and name.endswith(".weight") and not name.startswith("head.")


class Fractals:
    """The demo's classes, in images of their own."""

    def __init__(self, workers: int) -> None:
        self.train = render_training_images(FOLDER / "fractals.npy", workers)
        val = [fractals.render_round("val", i) for i in range(fractals.IMAGES_PER_CLASS["val"])]
        labels = torch.arange(fractals.NUM_CLASSES).repeat(len(val))
        self.val = torch.from_numpy(np.concatenate(val)), labels

    def draw_batch(self, size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Draw `size` images, each shifted at random (borders reflected); returns images and labels."""
        rng = np.random.default_rng([seed, step])
        labels = rng.integers(0, fractals.NUM_CLASSES, size)
        images = torch.from_numpy(self.train[rng.integers(0, ROUNDS, size), labels])
        padded = F.pad(normalize(images), [MAX_SHIFT] * 4, mode="reflect")
        offsets = rng.integers(0, 2 * MAX_SHIFT + 1, (size, 2))
        shifted = [
            image[:, y : y + fractals.IMAGE_SIZE, x : x + fractals.IMAGE_SIZE]
            for image, (y, x) in zip(padded, offsets, strict=True)
        ]
        return torch.stack(shifted), torch.from_numpy(labels)


def render_training_images(path: Path, workers: int) -> np.ndarray:
    """Render the training images once into a file of about 740 MB; returns (ROUNDS, classes, size, size, 3)."""
    if not path.exists():
        shape = (ROUNDS, fractals.NUM_CLASSES, fractals.IMAGE_SIZE, fractals.IMAGE_SIZE, 3)
        with replacing(path) as draft, ProcessPoolExecutor(workers) as pool:
            images = np.lib.format.open_memmap(draft, mode="w+", dtype=np.uint8, shape=shape)
            rendered = pool.map(fractals.render_round, ["training"] * ROUNDS, range(ROUNDS))
            for index, images_of_round in enumerate(rendered):
                images[index] = images_of_round
            images.flush()
    return np.load(path)


class Photographs:
    """CIFAR-10: every epoch has each of the 50,000 images at most once, in an order of its own."""

    def __init__(self, workers: int) -> None:
        root = prepare_dataset("cifar10", DATA)
        self.val = read_photographs(root / "val")
        images, self.labels = read_photographs(root / "train")
        padded = F.pad(images.permute(0, 3, 1, 2).float(), [PADDING] * 4, mode="reflect")
        self.padded = padded.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
        self.size = images.shape[1]

    def draw_batch(self, size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Draw `size` images, each cropped and mirrored at random; returns images and labels."""
        rng = np.random.default_rng([seed, step])
        epoch, batch = divmod(step, len(self.labels) // size)
        order = np.random.default_rng([seed, epoch, 1]).permutation(len(self.labels))
        chosen = torch.from_numpy(order[batch * size : (batch + 1) * size])
        side = np.arange(self.size)
        rows, columns = rng.integers(0, 2 * PADDING + 1, (2, size, 1)) + side
        columns = np.where(rng.random((size, 1)) < 0.5, columns, columns[:, ::-1])
        rows, columns = torch.from_numpy(rows)[:, :, None], torch.from_numpy(columns)[:, None]
        return normalize(self.padded[chosen[:, None, None], rows, columns]), self.labels[chosen]


def read_photographs(folder: Path) -> tuple[Tensor, Tensor]:
    """Read an image folder; returns uint8 (N, H, W, 3) and labels."""
    samples = ImageFolder(str(folder)).samples
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in samples])
    return torch.from_numpy(images), torch.tensor([label for _, label in samples])


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> normalised float (B, 3, H, W)."""
    mean, std = normalization()
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


@torch.inference_mode()
def top1(model: nn.Module, val: tuple[Tensor, Tensor]) -> float:
    """Top-1 in percent on the validation images, in float32; they are enlarged to the model's size."""
    device = next(model.eval().parameters()).device
    resize = partial(F.interpolate, size=model.patch_embed.img_size, mode="bicubic", antialias=True)
    predictions = [model(resize(normalize(images)).to(device)).argmax(1).cpu() for images in val[0].split(250)]
    return 100 * (torch.cat(predictions) == val[1]).float().mean().item()


def write_weights(model: nn.Module, dtype: torch.dtype, path: Path, record: dict) -> None:
    """Write a model's weights, with a record of their training in the file."""
    weights = {name: value.to(dtype).contiguous().cpu() for name, value in model.state_dict().items()}
    with replacing(path) as draft:
        save_file(weights, draft, metadata={"training": json.dumps(record)})


if __name__ == "__main__":
    exit_cleanly(main)
