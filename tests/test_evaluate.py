import copy
import os
import signal
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from quant import calibrate, quantize_model
from quant.modules import QuantAct
from utils.data import UNREADABLE
from utils.evaluate import compare, count_correct, evaluate
from utils.loader import image_loader
from utils.run.errors import InputError


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


def test_of_equal_logits_the_lower_class_is_predicted():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (500, 10), generator=generator).float()  # several ties in each row
    labels = torch.randint(0, 10, (500,), generator=generator)
    ranking = [sorted(range(10), key=lambda c, row=row: (-row[c], c)) for row in logits.tolist()]
    places = [ranks.index(label) for ranks, label in zip(ranking, labels.tolist(), strict=True)]
    expected = [sum(place < k for place in places) for k in (1, 5)]
    assert count_correct(logits, labels).tolist() == expected
    assert expected[0] == (logits.argmax(1) == labels).sum()  # what compare calls the first prediction
    assert count_correct(torch.zeros(10, 10), torch.arange(10)).tolist() == [1, 5]


def test_a_logit_that_is_nan_makes_no_hit():
    nan = torch.full((3, 3), torch.nan)
    assert count_correct(nan, torch.arange(3)).tolist() == [0, 0]
    assert count_correct(torch.tensor([[torch.nan, 1.0, 0.0]]), torch.tensor([1])).tolist() == [0, 1]


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


def test_a_model_with_one_range_missing_is_refused(vit):
    quantized = calibrate(quantize_model(vit), torch.randn(2, 3, 32, 32))
    act = next(module for module in reversed(list(quantized.modules())) if isinstance(module, QuantAct))
    act.low = None
    with pytest.raises(RuntimeError, match=r"not calibrated.*has no range"):
        evaluate({"quantized": quantized}, DataLoader(Fixed([0] * 4), 2))


def cuda():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def host():
    torch.empty(2**46)


def windows():
    raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 2 bytes.")


def python():
    raise MemoryError


class Hungry(nn.Module):
    """Fails above `most` images; notes the first pixel of each that it has seen."""

    num_classes = 10

    def __init__(self, most, fail):
        super().__init__()
        self.weight, self.most, self.fail = nn.Parameter(torch.zeros(1)), most, fail
        self.seen, self.activation = [], lambda: None

    def forward(self, images):
        assert self.activation() is None  # the memory of the attempt that failed is free
        activation = images * 2
        self.activation = weakref.ref(activation)
        if len(images) > self.most:
            self.fail()
        self.seen += images[:, 0, 0, 0].tolist()
        return torch.eye(10).repeat(2, 1)[: len(images)]


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("fail", [cuda, host, windows, python], ids=lambda fail: fail.__name__)
def test_out_of_memory_halves_the_batch_and_counts_each_image_once(capsys, vit, fail, most):
    data = Fixed([0] * 23)
    hungry = Hungry(most, fail)
    results = evaluate({"float": vit, "hungry": hungry}, DataLoader(data, 10))
    expected = evaluate({"float": vit}, DataLoader(data, 10))
    assert {name: results[name] for name in expected} == expected and results["n"] == 23
    assert hungry.seen == data.images[:, 0, 0, 0].tolist()
    lines = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert lines == [f"out of memory with 10 images a batch; going on with {most}"]


def test_out_of_memory_in_comparison_goes_on_with_smaller_batches(vit):
    images = torch.randn(11, 3, 32, 32)
    hungry = Hungry(3, cuda)
    assert compare(hungry, hungry, images) == {"agreement": 100.0, "logit_error": 0.0}
    assert sorted(hungry.seen) == sorted(2 * images[:, 0, 0, 0].tolist())


def test_out_of_memory_with_one_image_ends(vit):
    with pytest.raises(InputError, match="out of memory with one image a batch"):
        evaluate({"hungry": Hungry(0, cuda)}, DataLoader(Fixed([0] * 4), 3))


def test_other_errors_of_a_model_are_not_taken_for_it():
    def fail():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        evaluate({"hungry": Hungry(0, fail)}, DataLoader(Fixed([0] * 4), 3))


def test_out_of_memory_in_loading_goes_on_with_smaller_batches(capsys):
    data = Fixed(list(range(10)) * 2)
    batches = []

    def collate(items):
        batches.append(len(items))
        if len(batches) == 3:
            host()
        return torch.utils.data.default_collate(items)

    counted = Hungry(20, cuda)
    assert evaluate({"a": counted}, DataLoader(data, 6, collate_fn=collate))["n"] == 20
    assert counted.seen == data.images[:, 0, 0, 0].tolist()
    assert "out of memory loading 6 images a batch; going on with 3" in capsys.readouterr().err


class Killed(Fixed):
    """Whose worker is killed at image 5, once, as by the kernel where memory is out."""

    def __init__(self, marker):
        super().__init__([0] * 12)
        self.marker = marker

    def __getitem__(self, index):
        if index == 5 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_worker_that_the_kernel_ends_is_replaced(tmp_path, capsys):
    data = Killed(tmp_path / "marker")
    model = Hungry(12, cuda)
    assert evaluate({"a": model}, image_loader(data, 4, workers=1))["n"] == 12
    assert model.seen == data.images[:, 0, 0, 0].tolist()
    assert "out of memory loading 4 images a batch" in capsys.readouterr().err


def test_compare_with_itself_and_with_a_quantized_model(vit):
    images = torch.randn(40, 3, 32, 32)
    assert compare(vit, vit, images) == {"agreement": 100.0, "logit_error": 0.0}
    errors = []
    for bits in (8, 3):
        quantized = calibrate(quantize_model(copy.deepcopy(vit), bits, bits), images)
        errors.append(compare(vit, quantized, images))
    assert 0 < errors[0]["logit_error"] < errors[1]["logit_error"]
    assert errors[1]["agreement"] < errors[0]["agreement"] <= 100


def test_a_single_logit_is_compared_across_images(vit):
    vit.reset_classifier(1)
    images = torch.randn(8, 3, 32, 32)
    error = compare(vit, calibrate(quantize_model(copy.deepcopy(vit), 4, 4), images), images)["logit_error"]
    assert 0 < error < 100
