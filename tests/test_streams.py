"""Streams that are rotated: the same function, and of use against outliers."""

import copy

import pytest
import torch
from conftest import randomize
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos

from quant.streams import rotate

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
VARIANTS = {
    "plain": (VisionTransformer, {}),
    "distilled": (VisionTransformerDistilled, {}),
    "registers": (VisionTransformer, {"reg_tokens": 4}),
    "layer scale": (VisionTransformer, {"init_values": 0.5}),
    "average pooling": (VisionTransformer, {"global_pool": "avg", "class_token": False}),
    "pre-norm": (VisionTransformer, {"pre_norm": True}),
    "no bias": (VisionTransformer, {"qkv_bias": False}),
    "no positions": (VisionTransformer, {"pos_embed": "none"}),
    "relative positions": (VisionTransformerRelPos, {"class_token": True, "fc_norm": True}),
}


@torch.no_grad()
def check_same_function(model, images):
    expected, names = model(images), list(model.state_dict())
    before = copy.deepcopy(model.state_dict())
    rotate(model)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names
    return [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rotated_vit_is_the_same_function(variant):
    torch.manual_seed(0)
    build, options = VARIANTS[variant]
    same = check_same_function(randomize(build(**SMALL, **options)), torch.randn(4, 3, 32, 32))
    untouched = {"blocks.0.mlp.fc1.bias"} if variant == "pre-norm" else {"head.bias"} & set(same)
    assert untouched <= set(same)
    assert not any(name.endswith(("qkv.weight", "attn.proj.weight")) for name in same)
    if variant != "pre-norm":
        same = [name for name in same if "rel_pos" not in name]  # a network of its own
        assert not any(name.endswith((".fc1.weight", ".fc2.weight", "pos_embed", "norm1.weight")) for name in same)


def test_a_rotated_swin_is_the_same_function():
    torch.manual_seed(0)
    options = {"embed_dim": 24, "depths": (2, 2, 2), "num_heads": (2, 4, 4), "num_classes": 10}
    model = randomize(SwinTransformer(img_size=32, patch_size=2, window_size=4, **options))
    same = check_same_function(model, torch.randn(4, 3, 32, 32))
    assert "layers.0.blocks.0.mlp.fc1.weight" in same  # the patch embedding's norm writes to the first stage
    assert not any(name.endswith("fc1.weight") for name in same if not name.startswith("layers.0."))


@pytest.mark.parametrize("window", [3, 5])
def test_zeros_that_windows_are_padded_with_stay_zeros(window):
    torch.manual_seed(0)
    options = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 10}
    model = randomize(SwinTransformer(img_size=32, patch_size=2, window_size=window, **options))
    same = check_same_function(model, torch.randn(4, 3, 32, 32))
    assert "layers.1.blocks.0.mlp.fc1.weight" not in same


@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_a_stream_whose_norms_are_dead_in_a_channel_stays(architecture):
    torch.manual_seed(0)
    if architecture == "vit":
        model = randomize(VisionTransformer(**SMALL, qkv_bias=False))
        norms, layer = [block.norm1 for block in model.blocks], "blocks.0.mlp.fc1.weight"
    else:
        options = {"embed_dim": 24, "depths": (1, 1, 1), "num_heads": (2, 4, 4), "num_classes": 10}
        model = randomize(SwinTransformer(img_size=32, patch_size=2, window_size=4, **options))
        norms, layer = [model.layers[2].downsample.norm], "layers.1.blocks.0.mlp.fc1.weight"
    for norm in norms:
        norm.weight.data[7], norm.bias.data[7] = 0, 1
    assert layer in check_same_function(model, torch.randn(4, 3, 32, 32))


@torch.no_grad()
def test_a_large_channel_of_the_stream_is_spread(vit):
    vit.pos_embed[..., 7] += 100
    rotate(vit)
    size = vit.pos_embed.abs().amax(dim=(0, 1))
    assert size.max() < 60 and (size > 1).sum() > 40
