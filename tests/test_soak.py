"""Many runs in one process: none leaves memory, files or hooks behind."""

import copy
import os
from pathlib import Path

import pytest

from generate_data import GenerationSettings, generate_data
from models import evaluation_transform, normalization
from quant import calibrate, quantize_model
from utils.data import Images
from utils.evaluate import evaluate
from utils.images import load_images, save_images
from utils.loader import image_loader
from utils.run.files import write_json

RUNS, WARM_UP = 200, 50


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_is_flat_over_200_runs(vit, image_root, tmp_path):
    vit.pretrained_cfg = {"crop_pct": 1.0}
    images = Images(image_root, "val", evaluation_transform(vit), limit=6)
    images.labels = [label % vit.num_classes for label in images.labels]
    settings = GenerationSettings(steps=1)
    for number in range(RUNS):
        generated = generate_data(vit, 2, number, settings, progress=False)
        save_images(tmp_path / "images.safetensors", *normalization(vit), images=generated)
        quantized = quantize_model(copy.deepcopy(vit), w_bit=4)
        calibrate(quantized, load_images(tmp_path / "images.safetensors", (32, 32), *normalization(vit))["images"])
        results = evaluate({"float": vit, "quantized": quantized}, image_loader(images, 4, workers=0))
        write_json(tmp_path / "results.json", results)
        if number == WARM_UP:
            before, files = resident_bytes(), len(os.listdir("/proc/self/fd"))
    assert results["n"] == 6 and not any(module._forward_pre_hooks for module in vit.modules())
    assert len(os.listdir("/proc/self/fd")) == files
    assert resident_bytes() - before < 8 * 2**20  # a model and its images take 1 MB
    assert len(list(tmp_path.iterdir())) == 3
