"""The training script: its schedules, batches and steps; not its results."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from quant import check_supported
from scripts import train
from utils.photographs import PHOTOGRAPHS
from utils.run.progress import progress_bar
from utils.run.signals import Stopped


def test_schedules_warm_up_and_end_at_zero():
    cosine = train.cosine_cycles(100, 50, warm_up=10)
    assert len(cosine) == 150 and cosine[0] == 0.1 and max(cosine[100:]) == pytest.approx(0.4, abs=0.1)
    assert cosine[50] == pytest.approx(0.5) and cosine[125] == pytest.approx(0.25)
    assert cosine[99] == pytest.approx((1 + math.cos(math.pi * 0.99)) / 2)
    flat = train.trapezoid(100, decay=20, warm_up=10)
    assert flat[0] == 0.1 and flat[10:80] == [1.0] * 70 and flat[90] == 0.5 and flat[99] == 0.05


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in PHOTOGRAPHS["cifar10"].classes:
            folder = tmp_path / "cifar10" / split / name
            folder.mkdir(parents=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "0.png")
    monkeypatch.setattr(train, "DATA", tmp_path)
    return train.Photographs(workers=1)


def test_an_epoch_has_every_photograph_once_cropped_and_mirrored(photographs):
    labels = torch.cat([photographs.draw_batch(5, seed=0, step=step)[1] for step in range(4)])
    assert sorted(labels[:5].tolist() + labels[5:10].tolist()) == list(range(10))
    assert labels[:10].tolist() != labels[10:].tolist()  # another order in the next epoch
    images, labels = photographs.draw_batch(10, seed=0, step=7)
    assert torch.equal(images, photographs.draw_batch(10, seed=0, step=7)[0])
    places = {False: 0, True: 0}
    for image, label in zip(images, labels.tolist(), strict=True):
        padded = train.normalize(photographs.padded[label : label + 1])[0]
        found = [
            mirrored
            for mirrored in places
            for top in range(9)
            for left in range(9)
            if torch.equal(image.flip(2) if mirrored else image, padded[:, top : top + 32, left : left + 32])
        ]
        assert len(found) == 1
        places[found[0]] += 1
    assert min(places.values()) > 0


@pytest.mark.parametrize("name", ["cifar_vit", "cifar_swin"])
def test_training_moves_every_weight_and_goes_on_where_it_was_stopped(photographs, tmp_path, name):
    recipe = dataclasses.replace(train.RECIPES[name], factors=[1.0] * 2, batch_size=5)

    def trained(place, stop_after):
        torch.manual_seed(0)
        model = train.build(name)
        check_supported(model)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        optimisation = train.train(model, recipe, photographs, 0, tmp_path / place)
        with progress_bar(disable=True) as bar:
            optimisation.run(bar, lambda: 15 if optimisation.done == stop_after else None)
        return before, model.state_dict()

    before, whole = trained("whole", stop_after=None)
    assert not [key for key, _ in train.build(name).named_parameters() if torch.equal(before[key], whole[key])]
    with pytest.raises(Stopped):
        trained("parts", stop_after=1)
    _, parts = trained("parts", stop_after=None)
    assert all(torch.equal(parts[key], whole[key]) for key in whole)


@pytest.mark.parametrize("name", ["cifar_vit", "cifar_swin"])
def test_enlarging_keeps_the_tokens_of_photographs_and_quiets_noise(name):
    torch.manual_seed(0)
    model = train.build(name)
    side, count = model.patch_embed.patch_size[0], model.patch_embed.grid_size[0]
    patches, bias = torch.randn(10, 3, side, side), model.patch_embed.proj.bias.detach().clone()
    model.patch_embed.norm = torch.nn.Identity()  # of the Swin: it would scale noise up again
    tokens, of_noise = (model.patch_embed(x) for x in (patches.repeat(1, 1, count, count), torch.randn(8, 3, 32, 32)))
    train.enlarge(model, name)
    # Each patch is enlarged by itself: beside others, bicubic interpolation mixes their pixels at the border
    patches = F.interpolate(patches, scale_factor=4, mode="bicubic", antialias=True)
    torch.testing.assert_close(model.patch_embed(patches.repeat(1, 1, count, count)), tokens, rtol=0, atol=1e-5)
    ratio = [(x.flatten(0, -2) - bias).std() for x in (model.patch_embed(torch.randn(8, 3, 128, 128)), of_noise)]
    assert ratio[0] < 0.35 * ratio[1]


def test_accuracy_is_of_images_as_large_as_the_model_s(photographs):
    torch.manual_seed(0)
    model = train.build("cifar_vit").eval()
    train.enlarge(model, "cifar_vit")
    images = photographs.val[0]
    resized = [
        np.asarray(Image.fromarray(image.numpy()).resize((128, 128), Image.Resampling.BICUBIC)) for image in images
    ]
    predicted = model(train.normalize(torch.from_numpy(np.stack(resized)))).argmax(1)
    assert len(predicted.unique()) > 1
    assert train.top1(model, (images, predicted)) == 100


def test_muon_has_the_weights_between_embedding_and_classifier():
    model = train.build("cifar_swin")
    (_, lr), (muon, muon_lr) = train.make_optimizers(model, train.RECIPES["cifar_swin"])
    names = {id(value): key for key, value in model.named_parameters()}
    taken = {names[id(value)] for value in muon.param_groups[0]["params"]}
    assert lr != muon_lr and len(taken) == 4 * 8 + 2  # four in each block, and two patch mergings
    assert not [key for key in taken if "bias" in key or "head" in key or "patch_embed" in key]
