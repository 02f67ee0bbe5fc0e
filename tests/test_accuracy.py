"""What the scripts share that quantize one model many times."""

import copy

import pytest
import torch

from quant import calibrate, quantize_model
from scripts import accuracy
from utils.data import validation_images
from utils.evaluate import count_correct
from utils.run.errors import InputError


def test_images_are_decoded_in_the_order_of_their_labels(image_root):
    data = validation_images(image_root, lambda image: torch.tensor([image.width]), 50, limit=10)
    images, labels = accuracy.decoded(data)
    assert images.flatten().tolist() == [90] * 10 and labels.tolist() == data.labels and len(set(data.labels)) == 10


def test_unreadable_images_end_a_script(tmp_path):
    (tmp_path / "val" / "a").mkdir(parents=True)
    (tmp_path / "val" / "a" / "0.png").write_bytes(b"broken")
    data = validation_images(tmp_path, lambda image: torch.tensor([image.width]), 1)
    with pytest.raises(InputError, match=r"1 images are not readable \(.*0\.png\)"):
        accuracy.decoded(data)


def test_predictions_do_not_depend_on_the_batch_and_ties_go_to_the_lower_class(vit, monkeypatch):
    images = torch.randn(7, 3, 32, 32)
    vit.head.bias.data -= vit(images).mean(0).detach()  # else it predicts one class
    expected = vit(images).argmax(1)
    monkeypatch.setattr(accuracy, "CPU_BATCH", 3)
    assert accuracy.predict(vit, images).tolist() == expected.tolist() and len(set(expected.tolist())) > 1
    torch.nn.init.zeros_(vit.head.weight)
    vit.head.bias.data = torch.tensor([0.0, 0, 5, 1, 5, 5, 0, 0, 0, 0])
    tied = accuracy.predict(vit, images)
    assert tied.tolist() == [2] * 7 and count_correct(vit(images).detach(), tied.clone())[0] == 7


def test_accuracy_and_agreement_are_percent(vit):
    images = torch.randn(8, 3, 32, 32)
    expected = accuracy.predict(vit, images)
    labels = torch.where(torch.arange(8) < 6, expected, (expected + 1) % 10)
    assert accuracy.measure(vit, expected, images, labels) == {
        "n": 8,
        "top1": 75.0,
        "float_top1": 75.0,
        "agreement": 100.0,
    }
    quantized = calibrate(quantize_model(copy.deepcopy(vit), 2, 2), images)
    measured = accuracy.measure(quantized, expected, images, expected)
    assert measured["float_top1"] == 100 and measured["top1"] == measured["agreement"] < 100


@pytest.mark.parametrize("text", ["8", "8/", "4/8/8", "1/8", "four/8", ""])
def test_bits_that_are_none_are_refused(text):
    with pytest.raises(InputError, match="--bits: expected W/A, as 4/8; got"):
        accuracy.parse_bits(text)
    assert accuracy.parse_bits("4/8") == (4, 8)
