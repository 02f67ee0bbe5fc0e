import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import to_tensor

from utils import loader
from utils.data import Images
from utils.loader import image_loader


def transform(image):
    return to_tensor(image.resize((8, 8)))


@pytest.mark.parametrize("shared_memory", ["large", "small"])
@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_images_in_order(image_root, monkeypatch, workers, shared_memory):
    monkeypatch.setattr(loader, "_shared_memory_holds", lambda size: shared_memory == "large")
    images = Images(image_root, "val", transform, limit=7)
    loaded = list(image_loader(images, 3, workers))
    for position, expected in enumerate(zip(*images, strict=True)):
        actual = torch.cat([torch.as_tensor(batch[position]) for batch in loaded])
        assert torch.equal(actual, torch.stack([torch.as_tensor(item) for item in expected]))
    assert isinstance(loaded[0][0], np.ndarray) == (workers > 0 and shared_memory == "small")


def test_shared_memory_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "SHARED_MEMORY", tmp_path)
    free = shutil.disk_usage(tmp_path).free
    assert loader._shared_memory_holds(free // 2) and not loader._shared_memory_holds(free * 2)
    monkeypatch.setattr(loader, "SHARED_MEMORY", Path("/absent"))
    assert loader._shared_memory_holds(2**62)  # not Linux
