"""Train a demo model: python scripts/train_demo.py demo_vit. Interrupt it at will; the same command goes on.

Leaves models/<name>.safetensors when done, and a checkpoint in runs/train_demo/ on the way. Images, their order and
the initial weights follow from the seed. Both models at once, a thread each, take 40 minutes on two CPU cores.
"""

import argparse
import json
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import set_fused_attn
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import demo
from models.zoo import normalization
from utils.fractals import IMAGE_SIZE, IMAGES_PER_CLASS, NUM_CLASSES, render_round
from utils.run.files import replacing

ROUNDS = 1200  # of one image a class: 60,000 training images, none of them in data/demo
MAX_SHIFT = 6  # pixels, the only augmentation
# Images to train on, repeats counted: in one cosine cycle, or in two, the second with half the learning rate.
CYCLES = {"demo_vit": (320_000,), "demo_swin": (240_000, 120_000)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=CYCLES)
    parser.add_argument("--batch-size", type=int, default=64, help="images a step (64)")
    parser.add_argument("--lr", type=float, default=1e-3, help="largest learning rate (0.001)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of images (0)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (all cores)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = ROOT / "runs" / "train_demo"
    folder.mkdir(parents=True, exist_ok=True)

    train = load_training_images(folder / "images.npy", workers=options.threads)
    val = torch.from_numpy(np.concatenate([render_round("val", i) for i in range(IMAGES_PER_CLASS["val"])]))
    set_fused_attn(False)  # its bfloat16 CPU kernel is slower than two matrix products at this size
    torch.manual_seed(options.seed)
    model = getattr(demo, options.model)().to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.05)
    factors = learning_rate_factors([images // options.batch_size for images in CYCLES[options.model]])
    steps, start = len(factors), 0
    checkpoint = folder / f"{options.model}_seed{options.seed}.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        print(f"going on from step {start} of {steps}", flush=True)

    began, mean_loss = time.monotonic(), 0.0
    for step in range(start, steps):
        optimizer.param_groups[0]["lr"] = options.lr * factors[step]
        images, labels = draw_batch(train, options.batch_size, seed=[options.seed, step])
        images, labels = images.to(options.device), labels.to(options.device)
        model.train()
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean_loss = loss.item() if step == start else 0.98 * mean_loss + 0.02 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            rate = (step + 1 - start) * options.batch_size / (time.monotonic() - began)
            print(f"step {step + 1}/{steps}  loss {mean_loss:.3f}  {rate:.0f} images/s", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps}  val top-1 {top1(model, val, options.device):.2f} %", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            with replacing(checkpoint) as draft:
                torch.save(state, draft)

    record = {"seed": options.seed, "images": steps * options.batch_size, "val_top1": top1(model, val, options.device)}
    record |= {"torch": torch.__version__, "timm": timm.__version__, "device": options.device}
    target = ROOT / "models" / f"{options.model}.safetensors"
    weights = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    with replacing(target) as draft:
        save_file(weights, draft, metadata={"training": json.dumps(record)})
    print(f"wrote {target}: {json.dumps(record)}")


def learning_rate_factors(cycles: list[int]) -> list[float]:
    """The learning rate of every step as a fraction of the largest: warm-up, then cosine to zero, in each cycle."""
    return [
        min(1.0, (step + 1) / 400, (1 + math.cos(math.pi * step / steps)) / 2) / 2**cycle
        for cycle, steps in enumerate(cycles)
        for step in range(steps)
    ]


def load_training_images(path: Path, workers: int) -> np.ndarray:
    """Render the training images once into a file of about 740 MB; returns (ROUNDS, classes, size, size, 3)."""
    if not path.exists():
        draft = path.with_name(f".{os.getpid()}.npy")
        shape = (ROUNDS, NUM_CLASSES, IMAGE_SIZE, IMAGE_SIZE, 3)
        images = np.lib.format.open_memmap(draft, mode="w+", dtype=np.uint8, shape=shape)
        with ProcessPoolExecutor(workers) as pool:
            for index, rendered in enumerate(pool.map(render_round, ["training"] * ROUNDS, range(ROUNDS))):
                images[index] = rendered
        images.flush()
        os.replace(draft, path)
    return np.load(path)


def draw_batch(train: np.ndarray, size: int, seed: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw `size` training images, each shifted at random (borders reflected); returns images and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_CLASSES, size)
    images = torch.from_numpy(train[rng.integers(0, ROUNDS, size), labels])
    padded = F.pad(normalize(images), [MAX_SHIFT] * 4, mode="reflect")
    offsets = rng.integers(0, 2 * MAX_SHIFT + 1, (size, 2))
    shifted = [image[:, y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] for image, (y, x) in zip(padded, offsets, strict=True)]
    return torch.stack(shifted), torch.from_numpy(labels)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> normalised float (B, 3, H, W)."""
    mean, std = normalization()
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


@torch.inference_mode()
def top1(model: nn.Module, val: torch.Tensor, device: str) -> float:
    """Top-1 in percent on the validation images, in float32."""
    model.eval()
    labels = torch.arange(NUM_CLASSES).repeat(len(val) // NUM_CLASSES)
    predictions = [model(normalize(images).to(device)).argmax(1).cpu() for images in val.split(250)]
    return 100 * (torch.cat(predictions) == labels).float().mean().item()


if __name__ == "__main__":
    main()
