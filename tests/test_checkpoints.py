"""The number of classes and the image size are those of the weights."""

import json

import pytest
import timm
import torch

from models import build_model, model_notes
from utils.run.errors import InputError

VIT, SWIN = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
SMALL = {
    VIT: {"depth": 1, "embed_dim": 48, "num_heads": 3},
    SWIN: {"depths": [1, 1, 1], "embed_dim": 12, "num_heads": [1, 2, 3]},
    "deit3_small_patch16_224": {"depth": 1, "embed_dim": 48, "num_heads": 3},
    "deit_tiny_distilled_patch16_224": {"depth": 1, "embed_dim": 48, "num_heads": 3},
    "vit_small_patch14_dinov2": {"depth": 1, "embed_dim": 48, "num_heads": 3},
}


@pytest.fixture
def small(tmp_path):
    """A folder of a small model by the name of a large one; returns its weights as `options` make them, and names."""

    def write(name, **options):
        torch.manual_seed(0)
        model = timm.create_model(name, **SMALL[name], **options).eval()
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "model_args": SMALL[name]}))
        return model, f"local-dir:{tmp_path}", tmp_path / "weights.pth"

    return write


@pytest.mark.parametrize(
    ("name", "options"),
    {
        "a vit at 96 pixels": (VIT, {"img_size": 96, "num_classes": 7}),
        "a vit without classifier": (VIT, {"num_classes": 0}),
        "dinov2 with a classifier": ("vit_small_patch14_dinov2", {"img_size": 98, "num_classes": 7}),
        "dinov2 as it is": ("vit_small_patch14_dinov2", {}),
        "no position for the class token": ("deit3_small_patch16_224", {"img_size": 128}),
        "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}),
        "swin as it is": (SWIN, {"num_classes": 7}),
        "a swin whose last windows shrink": (SWIN, {"img_size": 96}),
        "a swin with larger windows": (SWIN, {"img_size": 128, "window_size": 8}),
        "a swin without classifier": (SWIN, {"num_classes": 0}),
    }.values(),
    ids=str,
)
@torch.no_grad()
def test_classes_and_size_are_those_of_the_weights(small, name, options):
    theirs, model_name, weights = small(name, **options)
    ours = build_model(model_name, weights)
    size = theirs.patch_embed.img_size
    assert (ours.num_classes, ours.patch_embed.img_size) == (theirs.num_classes, size)
    without = ["no classifier: images are generated without L_OH, and embeddings are compared"]
    assert model_notes(ours) == ([] if theirs.num_classes else without)  # and nothing of resampling
    images = torch.randn(1, 3, *size)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize(("name", "size"), [(VIT, 96), (SWIN, 96)])
@torch.no_grad()
def test_another_size_is_timms_resampling_and_is_told(small, name, size):
    _, model_name, weights = small(name)
    model = build_model(model_name, weights, img_size=size)
    assert model_notes(model) == ["96 x 96 pixels: timm has resampled positions of 224 x 224"]
    options = {**SMALL[name], "img_size": size, "pretrained_cfg_overlay": {"file": str(weights)}}
    expected, images = timm.create_model(name, pretrained=True, **options).eval(), torch.randn(1, 3, size, size)
    assert torch.equal(model(images), expected(images))


def test_the_same_size_is_nothing_to_tell(small):
    _, name, weights = small(VIT, img_size=96)
    assert not model_notes(build_model(name, weights, img_size=96))


@pytest.mark.parametrize("size", [8, 100])
def test_sizes_that_patches_do_not_fill_are_refused(size):
    with pytest.raises(InputError, match=f"expected a multiple of 16, the side of a patch; got {size}"):
        build_model(VIT, pretrained=False, img_size=size)


def test_other_patches_are_refused_and_not_resampled(small):
    _, name, weights = small(VIT, patch_size=8, img_size=112)
    for img_size in (None, 96):
        with pytest.raises(InputError, match=r"patch_embed\.proj\.weight.*would have to be resampled"):
            build_model(name, weights, img_size=img_size)


@pytest.mark.parametrize("name", ["pre_logits.fc.weight", "blocks.0.attn.qkv.bias"])
def test_weights_that_timms_converter_drops_are_refused(small, name):
    model, tag, weights = small(VIT, qkv_bias=False)
    arguments = {"architecture": VIT, "model_args": SMALL[VIT] | {"qkv_bias": False}}
    (weights.parent / "config.json").write_text(json.dumps(arguments))
    assert build_model(tag, weights).blocks[0].attn.qkv.bias is None
    torch.save(model.state_dict() | {name: torch.ones(3 * model.embed_dim)}, weights)
    with pytest.raises(InputError, match=rf"1 that it has no place for \({name}\)"):
        build_model(tag, weights)


def test_integers_are_no_weights(small):
    model, tag, weights = small(VIT)
    torch.save({key: value.to(torch.int8) for key, value in model.state_dict().items()}, weights)
    with pytest.raises(InputError, match="no dense floating-point tensors"):
        build_model(tag, weights)


def test_nan_is_not_taken_for_another_size(small):
    model, tag, weights = small(VIT)
    state = model.state_dict()
    state["pos_embed"][0, 1, 2] = float("nan")
    torch.save(state, weights)
    assert build_model(tag, weights).pos_embed.isnan().any()  # generation names the layer


def test_images_that_are_not_square_are_refused(small):
    _, name, weights = small(VIT, img_size=(96, 64))
    with pytest.raises(InputError, match="expected positions of a square image in pos_embed; got 24"):
        build_model(name, weights)
