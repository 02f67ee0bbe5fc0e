import shutil

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.transforms.functional import to_tensor

from utils.data import UNREADABLE, Images, check_dataset, draw_images
from utils.errors import InputError


def transform(image):
    return to_tensor(image.resize((8, 8)))


def make(root, names, images=1):
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(images):
            Image.new("RGB", (9, 9), (index, 0, 0)).save(root / name / f"{index}.png")


def test_images_come_by_class_then_name(image_root):
    images = Images(image_root, "val", transform)
    assert len(images) == 100 and images.labels == sorted(images.labels) and images.classes[3] == "class_03"
    image, label, index = images[7]
    assert image.shape == (3, 8, 8) and (label, index) == (3, 7)
    assert images.files[7].endswith("class_03/1.png")


def test_limit_takes_the_first(image_root):
    images = Images(image_root, "val", transform, limit=5)
    assert images.labels == [0, 0, 1, 1, 2] and len(images.classes) == 50


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "I;16", "1"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    Image.new(mode, (9, 9)).save(folder / ("x.tiff" if mode == "CMYK" else "x.png"))
    image, label, _ = Images(tmp_path, "val", transform)[0]
    assert image.shape == (3, 8, 8) and label == 0


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\nbroken"], ids=str)
def test_damaged_images_are_marked_not_replaced(tmp_path, content):
    make(tmp_path / "val", ["a"])
    (tmp_path / "val" / "a" / "bad.png").write_bytes(content)
    assert [label for _, label, _ in Images(tmp_path, "val", transform)] == [0, UNREADABLE]


def test_truncated_jpeg_is_marked(tmp_path):
    make(tmp_path / "val", ["a"])
    path = tmp_path / "val" / "a" / "cut.jpg"
    Image.effect_noise((99, 99), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    assert [label for _, label, _ in Images(tmp_path, "val", transform)] == [0, UNREADABLE]


def test_folders_that_are_missing_or_empty_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        check_dataset(tmp_path / "absent", ["val"])
    with pytest.raises(InputError, match="expected a folder val/"):
        check_dataset(tmp_path, ["val"])
    (tmp_path / "val").mkdir()
    with pytest.raises(InputError, match="expected a folder train/"):
        check_dataset(tmp_path, ["val", "train"])
    with pytest.raises(InputError, match="one folder a class; found none"):
        Images(tmp_path, "val", transform)
    (tmp_path / "val" / "a").mkdir()
    with pytest.raises(InputError, match="expected images in its 1 class folders; found none"):
        Images(tmp_path, "val", transform)


def test_another_number_of_classes_is_refused(image_root):
    images = Images(image_root, "val", transform)
    images.check_classes(50)
    with pytest.raises(InputError, match=r"expected 10 class folders.*found 50 \(class_00, class_01, class_02"):
        images.check_classes(10)


def test_imagenet_folders_are_compared_by_name(tmp_path):
    names = ImageNetInfo().label_names()
    make(tmp_path / "val", names, images=0)
    make(tmp_path / "val", ["n99999999"])
    with pytest.raises(InputError, match=r"1 unknown \(n99999999\)"):
        Images(tmp_path, "val", transform).check_classes(1000)
    shutil.rmtree(tmp_path / "val" / names[0])  # again 1000 folders, and every label off by one
    with pytest.raises(InputError, match=r"1 missing \(n01440764\); 1 unknown \(n99999999\)"):
        Images(tmp_path, "val", transform).check_classes(1000)
    make(tmp_path / "val", [names[0]])
    shutil.rmtree(tmp_path / "val" / "n99999999")
    Images(tmp_path, "val", transform).check_classes(1000)


def test_drawn_images_follow_the_seed_and_are_different(image_root):
    images = Images(image_root, "train", transform)
    drawn = draw_images(images, 20, seed=1)
    assert drawn.shape == (20, 3, 8, 8)
    assert torch.equal(drawn, draw_images(images, 20, seed=1))
    assert not torch.equal(drawn, draw_images(images, 20, seed=2))
    assert len({tuple(image.flatten().tolist()) for image in drawn}) == 20


def test_too_few_images_to_draw_from_is_refused(image_root):
    with pytest.raises(InputError, match="at least 101 images to calibrate with; found 100"):
        draw_images(Images(image_root, "train", transform), 101, seed=0)
