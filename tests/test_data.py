import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.transforms.functional import to_tensor

from utils.data import (
    CLASS_MAP,
    UNREADABLE,
    Images,
    check_dataset,
    draw_images,
    open_data,
    read_class_map,
    read_image,
    spread,
    validation_images,
)
from utils.run.errors import InputError


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


def test_limit_is_spread_over_the_classes_and_drawn_with_the_seed(image_root):
    some = [Images(image_root, "val", transform, limit=70, seed=seed) for seed in (0, 0, 1)]
    for images in some:
        assert len(images) == 70 and len(images.classes) == 50
        assert images.files == sorted(images.files)  # in the order of the data set
        counts = Counter(images.labels)
        assert len(counts) == 50 and set(counts.values()) == {1, 2}  # 50 classes, and 20 of them twice
        assert all(f"class_{label:02d}/" in file for file, label in zip(images.files, images.labels, strict=True))
    assert some[0].files == some[1].files != some[2].files
    assert Counter(some[0].labels) != Counter(some[2].labels)  # which classes have one more is drawn, too
    few = Images(image_root, "val", transform, limit=5)
    assert len(set(few.labels)) == 5 and max(few.labels) > 4  # not those of the first folders
    assert len(Images(image_root, "val", transform, limit=1000)) == 100


def test_spread_goes_on_where_a_class_has_no_more():
    assert spread([0, 1, 1, 1, 1], 4, seed=0)[0] == 0
    assert len(spread([0, 1, 1, 1, 1], 4, seed=0)) == 4


@pytest.mark.parametrize(("num_classes", "labels"), [(20, [17, 4]), (2, [0, 1])])
def test_a_class_map_in_the_root_is_for_classifiers_of_more_classes(tmp_path, num_classes, labels):
    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "val" / name / "x.png")
    (tmp_path / CLASS_MAP).write_text("a 17\nb 4\n")
    assert validation_images(tmp_path, transform, num_classes).labels == labels
    (tmp_path / "mine.txt").write_text("a 1\nb 0\n")
    assert validation_images(tmp_path, transform, num_classes, tmp_path / "mine.txt").labels == [1, 0]


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "I;16", "1"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    Image.new(mode, (9, 9)).save(folder / ("x.tiff" if mode == "CMYK" else "x.png"))
    image, label, _ = Images(tmp_path, "val", transform)[0]
    assert image.shape == (3, 8, 8) and label == 0


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bit_grey_keeps_its_greys(tmp_path, suffix):
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / f"a{suffix}")
    for channel in np.moveaxis(np.asarray(read_image(tmp_path / f"a{suffix}")), 2, 0):
        assert np.array_equal(channel, grey // 256)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_have_no_white_and_are_marked(tmp_path, mode):
    make(tmp_path / "val", ["a"])
    Image.new(mode, (9, 9)).save(tmp_path / "val" / "a" / "x.tiff")
    assert [label for _, label, _ in Images(tmp_path, "val", transform)] == [0, UNREADABLE]


def test_exif_orientation_is_not_applied(tmp_path):
    image, exif = Image.new("RGB", (9, 5)), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (9, 5)


def test_all_that_pillow_reads_is_counted_and_nothing_else(tmp_path):
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    for name in ("a.gif", "b.JFIF", "c.avif", "d.jp2", "e.png", "f.txt", "g", "h.pdf"):
        (folder / name).write_bytes(b"")
    names = [Path(file).name for file in Images(tmp_path, "val", None).files]
    assert names == ["a.gif", "b.JFIF", "c.avif", "d.jp2", "e.png"]


def test_the_suffix_does_not_matter(tmp_path):
    image = Image.effect_noise((9, 9), 50).convert("RGB")
    image.save(tmp_path / "a.JPEG", "PNG")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.JPEG")), np.asarray(image))


@pytest.mark.parametrize("kind", ["grey", "CMYK", "palette"])
def test_colours_are_those_of_pillow(tmp_path, kind):
    image = Image.effect_noise((9, 9), 90)
    if kind == "CMYK":
        Image.merge("CMYK", [image, image, image.rotate(90), image]).save(tmp_path / "a.jpg")
    elif kind == "palette":
        image.quantize(7).save(tmp_path / "a.png")
    else:
        image.save(tmp_path / "a.png")
    (path,) = tmp_path.iterdir()
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(Image.open(path).convert("RGB")))


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


def imagenet_folders(folder, and_also):
    """Empty folders of ImageNet's 1,000 names, and one more with images; returns the names."""
    names = ImageNetInfo().label_names()
    make(folder, names, images=0)
    make(folder, [and_also])
    return names


def test_imagenet_folders_are_compared_by_name(tmp_path):
    names = imagenet_folders(tmp_path / "val", and_also="n99999999")
    with pytest.raises(InputError, match=r"1 unknown \(n99999999\)"):
        Images(tmp_path, "val", transform).check_classes(1000)
    shutil.rmtree(tmp_path / "val" / names[0])  # again 1000 folders, and every label off by one
    with pytest.raises(InputError, match=r"1 missing \(n01440764\); 1 unknown \(n99999999\)"):
        Images(tmp_path, "val", transform).check_classes(1000)
    make(tmp_path / "val", [names[0]])
    shutil.rmtree(tmp_path / "val" / "n99999999")
    Images(tmp_path, "val", transform).check_classes(1000)


def test_imagenet_folders_too_few_or_of_an_editor_are_refused(tmp_path):
    names = imagenet_folders(tmp_path / "val", and_also=".ipynb_checkpoints")
    with pytest.raises(InputError, match=r"found 1001: 1 unknown \(\.ipynb_checkpoints\)"):
        Images(tmp_path, "val", transform).check_classes(1000)
    for name in (".ipynb_checkpoints", names[7], names[9]):
        shutil.rmtree(tmp_path / "val" / name)
    make(tmp_path / "val", [names[9]])
    with pytest.raises(InputError, match=rf"found 999: 1 missing \({names[7]}\); a subset needs --class-map"):
        Images(tmp_path, "val", transform).check_classes(1000)


def test_hidden_folders_are_refused_though_the_number_fits(tmp_path):
    make(tmp_path / "val", ["a", "b", ".ipynb_checkpoints"])
    with pytest.raises(InputError, match=r"1 hidden \(\.ipynb_checkpoints\); remove them"):
        Images(tmp_path, "val", transform).check_classes(3)


def test_folders_are_matched_by_name_where_the_classifier_has_their_names(tmp_path, capsys):
    make(tmp_path / "val", ["a", "b", "c"])
    labels = [validation_images(tmp_path, transform, 3, names=names).labels for names in ("abc", "cab", "xyz", None)]
    assert labels == [[0, 1, 2], [1, 2, 0], [0, 1, 2], [0, 1, 2]]
    assert capsys.readouterr().err.count("class folders are matched by name") == 1


def test_numbers_out_of_order_are_refused(tmp_path):
    make(tmp_path / "val", map(str, range(11)))
    with pytest.raises(InputError, match=r"found numbers, which sort as 0, 1, 10, \.\.\.; .*--class-map"):
        Images(tmp_path, "val", transform).check_classes(11)
    make(tmp_path / "b" / "val", map(str, range(10)))
    Images(tmp_path / "b", "val", transform).check_classes(10)


def test_a_class_map_gives_the_labels(tmp_path):
    make(tmp_path / "val", ["cat", "dog", "great white"])
    (tmp_path / "map").write_text("great white 2\r\n\ndog\t0\n  cat 7  \n")
    images = Images(tmp_path, "val", transform)
    images.map_classes(tmp_path / "map", 8)
    assert [label for _, label, _ in images] == [7, 0, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "cat\ndog 1": "line 1: expected the name of a folder and the index of a class; got 'cat'",
        "cat 1\ndog one": "line 2: expected the name of a folder and the index of a class; got 'dog one'",
        "cat -1": "line 1: expected .*; got 'cat -1'",
        "cat 10": "line 1: expected a class from 0 to 9; got 10",
        "cat 1\n\ndog 2\ncat 3": "line 4: folder 'cat' again, after line 1",
        "cat 1\ndog 1": "line 2: class 1 again, after line 1",
        "cat 1\ndog 2\ncow 3": "line 3: no folder 'cow' in ",
        "cat 1": r"expected a line for every folder; 1 without \(dog\)$",
    }.items(),
)
def test_class_maps_that_do_not_fit_are_refused_by_line(tmp_path, text, message):
    make(tmp_path / "val", ["cat", "dog"])
    (tmp_path / "map").write_text(text)
    with pytest.raises(InputError, match=message):
        Images(tmp_path, "val", transform).map_classes(tmp_path / "map", 10)


def test_class_maps_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "map").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "map"):
        with pytest.raises(InputError, match="not a readable text file"):
            read_class_map(path, 10)


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


def test_a_class_map_without_a_classifier_is_refused(tmp_path):
    with pytest.raises(InputError, match="--class-map: orders the outputs of a classifier"):
        open_data(tmp_path, None, 0, class_map=tmp_path / "map.txt")
