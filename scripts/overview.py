"""Draw overview.png: how a model sees a real image, noise, and an image generated from the model itself.

    python test_quant.py --model demo_vit --output-dir runs/overview
    python scripts/overview.py --run runs/overview              (needs requirements-plots.txt)

One row each: the image; the patch-similarity matrix of one block; the density of these similarities.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import DATASETS, build_model, evaluation_transform, normalization
from quant.families import ATTENTION
from utils.attention import attention_outputs
from utils.data import Images
from utils.entropy import gaussian_kernel, patch_similarity, patch_similarity_entropy, patch_tokens
from utils.images import check_picture, draw_noise, load_images
from utils.photographs import find_dataset
from utils.plots import require_matplotlib
from utils.run.errors import InputError, exit_cleanly

plt = require_matplotlib()
INK, MUTED, ACCENT = "#1b1f24", "#6b7280", "#1d4ed8"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "overview", metavar="DIR", help="folder of a run")
    parser.add_argument("--model", default="demo_vit", help="the run's model (demo_vit)")
    parser.add_argument("--block", type=int, default=3, metavar="N", help="attention layer, from 0 (3)")
    parser.add_argument("--image", type=int, default=3, metavar="N", help="generated image to show (3)")
    parser.add_argument("--output", type=Path, default=ROOT / "overview.png", metavar="FILE")
    options = parser.parse_args()
    check_picture("--output", options.output)
    if options.model not in DATASETS:
        raise InputError(f"--model: expected {', '.join(DATASETS)}, which have a data set; got {options.model}")

    model = build_model(options.model).requires_grad_(False)
    size = model.patch_embed.img_size
    tensors = load_images(options.run / "images.safetensors", size, *normalization(model))
    layers = sum(isinstance(module, ATTENTION) for module in model.modules())
    for option, value, there in (("image", options.image, len(tensors["images"])), ("block", options.block, layers)):
        if not 0 <= value < there:
            raise InputError(f"--{option}: expected 0 to {there - 1}; got {value}")
    label = int(tensors["labels"][options.image])
    val = Images(find_dataset(DATASETS[options.model]), "val", evaluation_transform(model))
    count = len(tensors["images"])
    kinds = {
        "real image": torch.stack([val[i][0] for i in torch.arange(0, len(val), len(val) // count)[:count].tolist()]),
        "Gaussian noise": draw_noise(count, size, seed=0),
        "generated image": tensors["images"],
    }
    shown = {"real image": val[val.labels.index(label)][0], "generated image": tensors["images"][options.image]}

    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "axes.edgecolor": MUTED, "text.color": INK})
    figure, axes = plt.subplots(3, 3, figsize=(8.5, 7.4), width_ratios=(1, 1.12, 1.5), layout="constrained")
    headings = ("image", f"patch similarity, block {options.block + 1}", "density over the batch")
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, fontsize=11, fontweight="bold", pad=8)
    for row, (kind, images) in zip(axes, kinds.items(), strict=True):
        draw_row(row, model, kind, shown.get(kind, images[0]), images, options.block)
    axes[2, 2].set_xlabel("cosine similarity of two patches")
    figure.savefig(options.output, dpi=200)
    print(f"wrote {options.output}")


def draw_row(row: list, model: nn.Module, kind: str, image: Tensor, images: Tensor, block: int) -> None:
    """Draw one image (3, H, W), its similarities, and the density of those of all `images` (B, 3, H, W)."""
    mean, std = normalization(model)
    pixels = (image * std + mean).clamp(0, 1).permute(1, 2, 0)
    row[0].imshow(pixels, interpolation="nearest")
    row[0].set_ylabel(kind, fontsize=11, fontweight="bold", labelpad=8)

    (tokens,), _ = patch_tokens(features_of(model, image[None], block))  # (N-1, d)
    picture = row[1].imshow(tokens @ tokens.T, cmap="magma", vmin=-1, vmax=1, interpolation="nearest")
    plt.colorbar(picture, ax=row[1], fraction=0.046, pad=0.04, ticks=[-1, 0, 1]).outline.set_visible(False)
    for axis in row[:2]:
        axis.set(xticks=[], yticks=[])

    features = features_of(model, images, block)
    points = torch.linspace(-1, 1, 500)
    similarity = patch_similarity(patch_tokens(features)[0], len(images))
    density = gaussian_kernel(*similarity, points).sum(dim=2).mean(dim=0)
    row[2].fill_between(points, density, color=ACCENT, alpha=0.15, linewidth=0)
    row[2].plot(points, density, color=ACCENT, linewidth=1.6)
    entropy = patch_similarity_entropy(features, len(images)).item()
    row[2].text(0.04, 0.86, f"entropy $H$ = {entropy:.2f}", transform=row[2].transAxes, fontsize=11)
    row[2].set(xlim=(-1, 1.01), xticks=[-1, -0.5, 0, 0.5, 1], ylim=(0, 1.25 * density.max()), yticks=[])
    row[2].spines[["top", "right", "left"]].set_visible(False)
    row[2].tick_params(color=MUTED, labelcolor=MUTED)


@torch.no_grad()
def features_of(model: nn.Module, images: Tensor, block: int) -> Tensor:
    """softmax(QK^T) V of one attention layer: (B*W, h, N, d)."""
    with attention_outputs(model) as outputs:
        model(images)
    return outputs[block]


if __name__ == "__main__":
    exit_cleanly(main)
