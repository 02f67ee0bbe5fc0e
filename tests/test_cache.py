import os
import shutil

import pytest
import torch
from PIL import Image

from models import build_model, evaluation_transform
from utils import cache
from utils.cache import CachedImages, check_cache
from utils.data import UNREADABLE, Images
from utils.run.errors import InputError


@pytest.fixture
def images(image_root):
    return Images(image_root, "val", evaluation_transform(build_model("demo_vit", pretrained=False)), limit=9)


def test_cached_images_are_the_decoded_ones_bit_for_bit(images, tmp_path):
    cached = CachedImages(images, tmp_path, workers=0)
    assert len(cached) == 9
    for (expected, label, index), (actual, cached_label, cached_index) in zip(images, cached, strict=True):
        assert torch.equal(expected, actual) and (label, index) == (cached_label, cached_index)


def test_images_are_decoded_once_and_again_when_they_change(images, tmp_path, monkeypatch):
    CachedImages(images, tmp_path, workers=0)
    write, calls = cache._write, []
    monkeypatch.setattr(cache, "_write", lambda *arguments: calls.append(1) or write(*arguments))
    CachedImages(images, tmp_path, workers=0)
    assert not calls
    os.utime(images.files[3], (0, 0))
    CachedImages(images, tmp_path, workers=0)
    assert len(calls) == 1


def test_an_interrupted_decoding_leaves_nothing(images, tmp_path, monkeypatch):
    decode = images.decode

    def interrupt(index):
        if index == 5:
            raise KeyboardInterrupt
        return decode(index)

    monkeypatch.setattr(images, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        CachedImages(images, tmp_path, workers=0)
    assert not list(tmp_path.iterdir())


def test_unreadable_images_stay_marked(tmp_path, images):
    folder = tmp_path / "data" / "val" / "a"
    folder.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "0.png")
    (folder / "1.png").write_bytes(b"broken")
    cached = CachedImages(Images(tmp_path / "data", "val", images.transform), tmp_path / "cache", workers=0)
    assert [label for _, label, _ in (cached[0], cached[1])] == [0, UNREADABLE]


def test_an_image_that_can_be_read_again_is_read_again(tmp_path, images):
    folder = tmp_path / "data" / "val" / "a"
    folder.mkdir(parents=True)
    Image.effect_noise((9, 9), 50).convert("RGB").save(folder / "0.png")
    whole, time = (folder / "0.png").read_bytes(), os.stat(folder / "0.png").st_mtime_ns
    (folder / "0.png").write_bytes(bytes(len(whole)))
    os.utime(folder / "0.png", ns=(time, time))
    data = Images(tmp_path / "data", "val", images.transform)
    assert CachedImages(data, tmp_path / "cache", workers=0)[0][1] == UNREADABLE
    (folder / "0.png").write_bytes(whole)
    os.utime(folder / "0.png", ns=(time, time))
    image, label, _ = CachedImages(data, tmp_path / "cache", workers=0)[0]
    assert label == 0 and torch.equal(image, data[0][0])


def test_a_damaged_file_is_refused(images, tmp_path):
    CachedImages(images, tmp_path, workers=0)
    for path in sorted(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[:50])
        with pytest.raises(InputError, match=r"damaged .*remove it"):
            CachedImages(images, tmp_path, workers=0)


def test_an_image_that_is_gone_is_marked(images, tmp_path, image_root):
    images.files[2] = str(tmp_path / "gone.png")
    assert CachedImages(images, tmp_path / "cache", workers=0)[2][1] == UNREADABLE


def test_a_disk_too_small_is_refused_and_one_with_the_file_is_not(images, tmp_path, monkeypatch):
    size = 9 * 64 * 64 * 3
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=2**20 + size - 1))
    with pytest.raises(InputError, match="of free space"):
        check_cache(images, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=2**20 + size))
    CachedImages(images, tmp_path, workers=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=2**20))
    check_cache(images, tmp_path)
