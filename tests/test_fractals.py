import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from utils import fractals
from utils.fractals import IMAGE_SIZE, NUM_CLASSES, render_others, render_round, write_demo_data


def test_rendering_is_deterministic_and_streams_differ():
    first = render_round("val", 0)
    assert first.shape == (NUM_CLASSES, IMAGE_SIZE, IMAGE_SIZE, 3) and first.dtype == np.uint8
    assert np.array_equal(first, render_round("val", 0))
    for stream, index in (("val", 1), ("train", 0), ("training", 0)):
        assert not np.array_equal(first, render_round(stream, index))


def test_images_have_contrast_and_differ_between_classes():
    images = render_round("train", 0).astype(float)
    assert (images.std(axis=(1, 2, 3)) > 10).all()
    flat = images.reshape(NUM_CLASSES, -1)
    assert np.linalg.norm(flat[:, None] - flat[None], axis=2)[~np.eye(NUM_CLASSES, dtype=bool)].min() > 1000


def test_other_classes_have_any_size_and_another_class_for_each_image():
    images = render_others(NUM_CLASSES + 2, 24, seed=0)
    assert images.shape == (NUM_CLASSES + 2, 24, 24, 3) and images.dtype == np.uint8
    assert np.array_equal(images[:3], render_others(3, 24, seed=0))
    assert not np.array_equal(images[:2], images[NUM_CLASSES:]) and len(render_others(1, 96, seed=0)) == 1
    assert not np.array_equal(images[:3], render_others(3, 24, seed=1))
    assert not np.array_equal(render_others(NUM_CLASSES, IMAGE_SIZE, seed=0), render_round("train", 0))


def test_data_set_is_written_once_in_imagenets_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(fractals, "IMAGES_PER_CLASS", {"train": 1, "val": 2})
    root = write_demo_data(tmp_path / "data" / "demo")
    for split, count in (("train", 50), ("val", 100)):
        folder = ImageFolder(str(root / split))
        assert len(folder) == count and len(folder.classes) == NUM_CLASSES
    assert np.array_equal(np.asarray(ImageFolder(str(root / "val"))[3][0]), render_round("val", 1)[1])
    written = (root / "val" / "class_00" / "0000.png").stat().st_mtime_ns
    write_demo_data(root)
    assert (root / "val" / "class_00" / "0000.png").stat().st_mtime_ns == written


def test_an_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def render(stream, index):
        calls.append(stream)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return render_round(stream, index)

    monkeypatch.setattr(fractals, "render_round", render)
    with pytest.raises(KeyboardInterrupt):
        write_demo_data(tmp_path / "demo")
    assert not list(tmp_path.iterdir())
