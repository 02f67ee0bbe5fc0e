import copy
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from quant import calibrate, quantize_model

GOLDEN = Path(__file__).parent / "golden"


def pytest_configure():
    # Ctrl-C is tested: a shell has what it starts in the background ignore it, which its processes would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:  # as many threads as cores each would wait for one another, and keep the cores busy with that
        threads = max(1, os.cpu_count() // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start


@pytest.fixture(scope="session")
def golden():
    """Outputs of the published implementation, as tensors: golden("losses")["vit_attn"]."""

    def load(name):
        with np.load(GOLDEN / f"{name}.npz") as file:
            return {
                key: json.loads(str(value)) if value.dtype.kind == "U" else torch.from_numpy(value)
                for key, value in file.items()
            }

    return load


@pytest.fixture
def vit():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
    return randomize(model)


@pytest.fixture
def swin():
    torch.manual_seed(0)
    model = SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=24, depths=(2, 1), num_heads=(2, 4), num_classes=10
    )
    return randomize(model)


@pytest.fixture(params=["vit", "swin"])
def model(request):
    return request.getfixturevalue(request.param)


def randomize(model):
    """timm starts with biases of zero and norms of one, which would hide a layer that is left out."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def check_float_then_quantized(model, images):
    """Swapped, `model` gives its float logits; calibrated, others, which are further off with fewer bits."""
    expected = model(images)
    errors = []
    for bits in (8, 4):
        quantized = quantize_model(copy.deepcopy(model), bits, bits)
        torch.testing.assert_close(quantized(images), expected, rtol=1e-4, atol=1e-4)
        calibrate(quantized, images)
        errors.append((quantized(images) - expected).square().mean().sqrt() / expected.std())
    assert 0 < errors[0] < errors[1] / 2


@pytest.fixture(scope="session")
def image_root(tmp_path_factory):
    """A data set in ImageNet's layout: 50 classes (as the demo models have), 2 images each in train and val."""
    root, rng = tmp_path_factory.mktemp("dataset"), np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(50):
            folder = root / split / f"class_{label:02d}"
            folder.mkdir(parents=True)
            for index in range(2):
                Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return root
