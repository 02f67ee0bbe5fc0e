"""Normalised images as files: tensors to use again, what other tools read, and a picture to look at."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from utils.run.errors import InputError
from utils.run.files import new_folder, read_tensors, replacing
from utils.run.progress import note
from utils.run.seeds import stream

FORMATS = (".safetensors", ".npy", "")  # of files of images; a name without suffix is a folder
NORMALISED = "normalised with"  # what metadata call mean and standard deviation
ROUNDING = 0.01  # of pixels from 0 to 1: bfloat16 has steps of 0.004 there
TILE = 112  # pixels, at least; smaller images are enlarged by a whole factor


def check_format(path: Path) -> None:
    """Refuse a path that `save_images` cannot write to."""
    if path.suffix not in FORMATS:
        expected = "a name that ends in .safetensors or .npy, or a folder's name without suffix"
        raise InputError(f"--output: expected {expected}; got {path}")
    if not path.suffix and path.exists():
        raise InputError(f"--output {path}: expected a folder that is not there yet; it is")


def check_picture(option: str, path: Path) -> None:
    """Refuse a name for a picture that is not one of a .png file."""
    if path.suffix != ".png":
        raise InputError(f"{option}: expected a name that ends in .png; got {path}")


def save_images(
    path: Path,
    mean: Tensor,
    std: Tensor,
    images: Tensor,
    names: list[str] | None = None,
    padded: tuple[int, int] | None = None,
    **more: Tensor,
) -> str:
    """Write normalised images (B, 3, H, W) to a file, and a grid of them beside it; or to a folder.

    Args:
        path: a .safetensors file; a .npy file, which has `images` alone, as float32; or a folder for PNG files, which
            must not be there yet.
        names: of the classes, to stand under the pictures in place of their numbers.
        padded: the size (H, W) of PNG files, see `save_folder`; that of the images for None.
        more: further tensors for the .safetensors file; `labels` (B,) stand under the pictures, and name folders.

    Returns:
        What was written, in words.
    """
    if not path.suffix:
        labels = more.get("labels", torch.zeros(len(images), dtype=torch.int64))
        save_folder(path, mean, std, images, labels, padded or images.shape[2:])
        return str(path)
    with replacing(path) as draft:
        if path.suffix == ".npy":
            np.save(draft, images.float().numpy())
        else:
            tensors = {name: tensor.contiguous() for name, tensor in {"images": images, **more}.items()}
            # save_file would write to a draft of its own, which kill -9 leaves behind
            draft.write_bytes(save(tensors, {NORMALISED: _told(mean, std)}))
    picture = path.with_suffix(".png")
    with replacing(picture) as draft:
        labels = more["labels"].tolist() if "labels" in more else None
        named = dict(enumerate(names or []))  # images of another model may have labels beyond
        captions = labels and [named.get(label, f"class {label}") for label in labels]
        draw_grid(images * std + mean, captions).save(draft)
    return f"{path}, and to look at: {picture}"


def save_folder(path: Path, mean: Tensor, std: Tensor, images: Tensor, labels: Tensor, padded: tuple[int, int]) -> None:
    """Write normalised images (B, 3, H, W) as 8-bit PNG files in a new folder, one folder a class.

    Args:
        labels: (B,); the names of the folders, with leading zeros.
        padded: the size (H, W) that they get, by repeating what is at their borders: that to which an evaluation
            transform resizes before it crops, so that its crop is the image.
    """
    top, left = ((outer - inner) / 2 for outer, inner in zip(padded, images.shape[2:], strict=True))
    top, left = round(top), round(left)  # as a centre crop rounds
    bottom, right = padded[0] - images.shape[2] - top, padded[1] - images.shape[3] - left
    large = F.pad(images * std + mean, (left, right, top, bottom), mode="replicate")
    with new_folder(path) as draft:
        for number, (pixels, label) in enumerate(zip(_to_bytes(large), labels.tolist(), strict=True)):
            folder = draft / f"{label:05d}"
            folder.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number:05d}.png")


def load_images(path: Path, size: tuple[int, int], mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """Read the tensors that `save_images` wrote: `images` and perhaps `held_out` (B, 3, *size), `labels` (B,).

    Args:
        mean, std: (3, 1, 1) each, of the model: a file that says that its images were normalised with others is
            refused; of pixels that are then not from 0 to 1 a line is said.
    """
    if not path.is_file():
        raise InputError(f"--images {path}: no such file")
    try:
        npy = path.suffix == ".npy"
        found, about = ({"images": torch.from_numpy(np.load(path))}, {}) if npy else read_tensors(path)
        tensors = {name: tensor for name, tensor in found.items() if name in ("images", "held_out", "labels")}
    except (SafetensorError, OSError, ValueError, LookupError, RuntimeError, TypeError, EOFError) as error:
        raise InputError(f"--images {path}: expected a file that generate_data.py wrote ({error})") from error
    for name in {"images", *tensors} - {"labels"}:
        images = tensors.get(name)
        if images is None or images.ndim != 4 or images.shape[1:] != (3, *size) or not len(images):
            shape = "none" if images is None else str(tuple(images.shape))
            raise InputError(f"--images {path}: expected {name} of shape (N, 3, {size[0]}, {size[1]}); got {shape}")
        if images.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise InputError(f"--images {path}: expected finite floats in {name}; got {images.dtype}")
        if not (images := images.float()).isfinite().all():
            raise InputError(f"--images {path}: expected finite floats in {name}; got infinities or NaN")
        if (made := about.get(NORMALISED, _told(mean, std))) != _told(mean, std):
            raise InputError(f"--images {path}: expected images normalised with {_told(mean, std)}; got {made}")
        low, high = (images * std + mean).aminmax()
        if low < -ROUNDING or high > 1 + ROUNDING:
            told = f"pixels from {low:.2f} to {high:.2f}, where those of photographs are from 0 to 1"
            note(f"--images {path}: normalised with {_told(mean, std)} these are {told}")
        tensors[name] = images
    labels = tensors.get("labels")
    if labels is not None and (labels.dtype != torch.int64 or labels.shape != tensors["images"].shape[:1]):
        raise InputError(f"--images {path}: expected an int64 label for each of the {len(tensors['images'])} images")
    return tensors


def _told(mean: Tensor, std: Tensor) -> str:
    numbers = (", ".join(f"{value:.4g}" for value in values.flatten().tolist()) for values in (mean, std))
    return "mean {} and deviation {}".format(*numbers)


def draw_noise(count: int, size: tuple[int, int], seed: int) -> Tensor:
    """Gaussian noise N(0, 1): (count, 3, *size)."""
    return torch.randn(count, 3, *size, generator=stream(seed, "noise"))


def draw_grid(pixels: Tensor, captions: list[str] | None) -> Image.Image:
    """Draw images (B, 3, H, W), values 0 to 1, as a grid, eight in a row, with a caption under each tile."""
    columns = min(8, len(pixels))
    zoom = -(-TILE // pixels.shape[3])
    tiles = _to_bytes(pixels)
    height, width = tiles.shape[1] * zoom, tiles.shape[2] * zoom
    gap, caption = max(4, width // 28), 0 if captions is None else max(14, width // 9)
    rows = -(-len(tiles) // columns)
    size = (columns * (width + gap) + gap, rows * (height + caption + gap) + gap)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for index, tile in enumerate(tiles):
        x, y = gap + index % columns * (width + gap), gap + index // columns * (height + caption + gap)
        grid.paste(Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST), (x, y))
        if captions is not None:
            text, size = captions[index], caption * 0.75
            size *= min(1.0, width / max(1.0, draw.textlength(text, font_size=size)))  # long names are set smaller
            draw.text((x + width / 2, y + height + caption / 2), text, "black", anchor="mm", font_size=size)
    return grid


def _to_bytes(pixels: Tensor) -> np.ndarray:
    """Values 0 to 1, (B, 3, H, W), as uint8 (B, H, W, 3)."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
