import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from quant import calibrate, quantize_model
from utils.data import UNREADABLE
from utils.evaluate import compare, count_correct, evaluate


class Fixed(torch.utils.data.Dataset):
    """Random images with given labels."""

    def __init__(self, labels, size=32):
        generator = torch.Generator().manual_seed(0)
        self.images, self.labels = torch.randn(len(labels), 3, size, size, generator=generator), labels
        self.files = [f"{index}.png" for index in range(len(labels))]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index], index


def test_count_correct_by_hand():
    logits = torch.tensor([[3.0, 2, 1, 0, -1, -2, -3]] * 3)
    assert count_correct(logits, torch.tensor([0, 4, 5])).tolist() == [1, 2]
    assert count_correct(logits[:, :3], torch.tensor([2, 1, 0])).tolist() == [1, 3]  # fewer than five classes


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_accuracy_does_not_depend_on_the_batch_size(vit, batch_size):
    data = Fixed([index % 10 for index in range(20)])
    with torch.no_grad():
        expected = (vit(data.images).argmax(1) == torch.tensor(data.labels)).sum().item() / 20 * 100
    result = evaluate({"float": vit}, DataLoader(data, batch_size))
    assert result["n"] == 20 and result["float_top1"] == pytest.approx(expected)
    assert result["float_top5"] >= result["float_top1"]


def test_models_see_the_same_images(vit):
    class Count(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.weight = [], nn.Parameter(torch.zeros(1))

        def forward(self, x):
            self.seen.append(x.sum().item())
            return torch.zeros(len(x), 10)

    first, second = Count(), Count()
    evaluate({"a": first, "b": second}, DataLoader(Fixed([0] * 10), 4))
    assert first.seen == second.seen and len(first.seen) == 3


def test_unreadable_images_are_listed_and_not_counted(vit):
    labels = [1, UNREADABLE, 2, UNREADABLE, UNREADABLE, UNREADABLE, 3]
    result = evaluate({"float": vit}, DataLoader(Fixed(labels), 2))  # one batch has none that is readable
    assert result["n"] == 3 and result["unreadable"] == ["1.png", "3.png", "4.png", "5.png"]


def test_uncalibrated_model_is_refused(model):
    quantize_model(model)
    with pytest.raises(RuntimeError, match=r"not calibrated.*quant\.calibrate"):
        evaluate({"quantized": model}, DataLoader(Fixed([0] * 4), 2))
    with pytest.raises(RuntimeError, match="not calibrated"):
        compare(model, model, torch.randn(2, 3, 32, 32))


def test_compare_with_itself_and_with_a_quantized_model(vit):
    import copy

    images = torch.randn(40, 3, 32, 32)
    assert compare(vit, vit, images) == {"agreement": 100.0, "logit_error": 0.0}
    errors = []
    for bits in (8, 3):
        quantized = calibrate(quantize_model(copy.deepcopy(vit), bits, bits), images)
        errors.append(compare(vit, quantized, images))
    assert 0 < errors[0]["logit_error"] < errors[1]["logit_error"]
    assert errors[1]["agreement"] < errors[0]["agreement"] <= 100
