from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.datasets import ImageFolder

from models import evaluation_transform, normalization, resized_size
from utils.images import check_picture, draw_grid, load_images, save_folder, save_images
from utils.run.errors import InputError

MEAN, STD = torch.full((3, 1, 1), 0.4), torch.full((3, 1, 1), 0.2)


def test_images_are_read_back_bit_for_bit(tmp_path):
    images, labels = torch.randn(5, 3, 8, 8), torch.arange(5)
    told = save_images(tmp_path / "a.safetensors", MEAN, STD, images, labels=labels, held_out=images[:2].clone())
    assert (tmp_path / "a.png").is_file() and told == f"{tmp_path}/a.safetensors, and to look at: {tmp_path}/a.png"
    tensors = load_images(tmp_path / "a.safetensors", (8, 8), MEAN, STD)
    assert torch.equal(tensors["images"], images) and torch.equal(tensors["labels"], labels)
    assert torch.equal(tensors["held_out"], images[:2])


def test_picture_shows_pixels_not_normalised_values():
    pixels = torch.zeros(1, 3, 112, 112)
    pixels[:, 0] = 1.0
    colours = np.asarray(draw_grid(pixels, ["class 7"])).reshape(-1, 3)
    assert (colours == [255, 0, 0]).all(axis=1).sum() == 112 * 112


def test_small_images_are_enlarged_and_rows_have_eight():
    grid = draw_grid(torch.rand(9, 3, 32, 32), None)
    assert grid.width > 8 * 112 and 2 * 112 < grid.height < 3 * 112


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.zeros(1)}, "expected images of shape .*; got none"),
        ({"images": torch.zeros(2, 3, 16, 16)}, r"expected images of shape \(N, 3, 8, 8\); got \(2, 3, 16, 16\)"),
        ({"images": torch.zeros(0, 3, 8, 8)}, r"got \(0, 3, 8, 8\)"),
        ({"images": torch.full((1, 3, 8, 8), float("nan"))}, "expected finite floats"),
        ({"images": torch.zeros(1, 3, 8, 8, dtype=torch.int32)}, "expected finite floats"),
        ({"images": torch.zeros(1, 3, 8, 8, dtype=torch.float8_e4m3fn)}, "expected finite floats"),
        ({"held_out": torch.zeros(1, 3, 8, 8)}, "expected images of shape .*; got none"),
        ({"images": torch.zeros(2, 3, 8, 8), "labels": torch.zeros(1, dtype=torch.int64)}, "an int64 label for each"),
        ({"images": torch.zeros(2, 3, 8, 8), "labels": torch.zeros(2)}, "an int64 label for each of the 2 images"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=message):
        load_images(tmp_path / "a.safetensors", (8, 8), MEAN, STD)


def test_images_for_a_model_of_other_normalisation_are_refused(tmp_path):
    save_images(tmp_path / "a.safetensors", MEAN, STD, torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match=r"mean 0\.5, 0\.5, 0\.5 .*; got mean 0\.4, 0\.4, 0\.4 and deviation 0\.2"):
        load_images(tmp_path / "a.safetensors", (8, 8), MEAN + 0.1, STD)


def test_pixels_beyond_black_and_white_are_told(tmp_path, capsys):
    for pixels, told in ((255.0, True), (1.0, False), (0.0, False)):
        np.save(tmp_path / "a.npy", ((torch.full((1, 3, 8, 8), pixels) - MEAN) / STD).numpy())
        load_images(tmp_path / "a.npy", (8, 8), MEAN, STD)
        assert ("pixels from 255.00 to 255.00, where" in capsys.readouterr().err) == told


def test_pictures_are_png_files(tmp_path):
    check_picture("--plot", tmp_path / "a.png")
    with pytest.raises(InputError, match=r"--plot: expected a name that ends in \.png; got a\.txt"):
        check_picture("--plot", Path("a.txt"))


def test_tensors_of_other_names_are_left_out(tmp_path):
    save_file({"images": torch.zeros(1, 3, 8, 8), "mean": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert set(load_images(tmp_path / "a.safetensors", (8, 8), MEAN, STD)) == {"images"}


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_images(tmp_path / "absent", (8, 8), MEAN, STD)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"generate_data\.py wrote"):
        load_images(tmp_path / "a.png", (8, 8), MEAN, STD)


def test_an_array_is_what_other_tools_read(tmp_path):
    images, (mean, std) = torch.randn(3, 3, 8, 8), normalization()
    told = save_images(tmp_path / "calib.npy", mean, std, images, labels=torch.tensor([1, 2, 3]))
    array = np.load(tmp_path / "calib.npy")
    assert array.dtype == np.float32 and np.array_equal(array, images.numpy())
    assert torch.equal(load_images(tmp_path / "calib.npy", (8, 8), mean, std)["images"], images)
    assert (tmp_path / "calib.png").is_file() and told == f"{tmp_path}/calib.npy, and to look at: {tmp_path}/calib.png"


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
def test_a_folder_gives_the_images_back_through_the_models_transform(tmp_path, vit, crop_pct):
    """It resizes and crops, which would cut what has the model's size already."""
    vit.pretrained_cfg = {"crop_pct": crop_pct}
    mean, std = normalization(vit)
    images = (torch.rand(4, 3, 32, 32) - mean) / std
    save_folder(tmp_path / "new" / "calib", mean, std, images, torch.tensor([7, 10, 7, 2]), resized_size(vit))
    folder = ImageFolder(str(tmp_path / "new" / "calib"), evaluation_transform(vit))
    assert folder.classes == ["00002", "00007", "00010"]
    back = torch.stack([image for image, _ in folder])[[1, 3, 2, 0]]  # by class, then by number
    assert ((back - images).abs() * std).max() <= 0.5 / 255 + 1e-6
