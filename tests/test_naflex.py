"""A NaFlexVit at one image size is a ViT that gives the same."""

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import nn

from models import build_model, data_config, model_notes
from models.naflex import at_size
from models.saved import load_quantized, save_quantized
from quant import UnsupportedModelError, calibrate, check_supported, quantize_model

SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
VARIANTS = {
    "siglip": {"act_layer": "gelu_tanh", "pos_embed_interp_mode": "bilinear"},
    "radio": {"class_token": True, "reg_tokens": 3, "global_pool": "token", "final_norm": False}
    | {"pos_embed_grid_size": (12, 12), "pos_embed_interp_mode": "bilinear", "pos_embed_align_corners": True}
    | {"pos_embed_ar_preserving": True, "pos_embed_antialias": False, "init_values": 0.5},
    "averages": {"global_pool": "avg", "reg_tokens": 2, "pool_include_prefix": True, "patchify_channels_last": False},
    "factorized positions": {"pos_embed": "factorized", "global_pool": "avg", "fc_norm": True},
    "no positions": {"pos_embed": "none", "embed_proj_type": "conv", "pre_norm": True, "global_pool": "avg"},
}


def build(num_classes=10, **options):
    torch.manual_seed(0)
    model = NaFlexVit(cfg=NaFlexVitCfg(**SMALL | options), num_classes=num_classes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_whole_images_give_the_same(variant, size):
    model, images = build(**VARIANTS[variant]), torch.randn(3, 3, *size)
    expected = model(images)
    vit = at_size(model, size)
    torch.testing.assert_close(vit(images), expected, rtol=1e-5, atol=1e-6)
    assert vit.num_classes == 10 and not vit.training and vit.patch_embed.img_size == size
    check_supported(vit)
    quantize_model(vit)
    torch.testing.assert_close(vit(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "size", "error", "message"),
    [
        ({"rope_type": "axial"}, (32, 32), UnsupportedModelError, "rope is a RotaryEmbeddingCat; expected a NaFlexVit"),
        ({}, (32, 36), ValueError, r"expected an image of whole patches of \(8, 8\); got \(32, 36\)"),
    ],
)
def test_what_is_no_such_vit_is_refused(options, size, error, message):
    with pytest.raises(error, match=message):
        at_size(build(**options), size)


@torch.no_grad()
def test_a_folder_is_built_at_its_size_or_another_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    options = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    theirs = timm.create_model(
        "naflexvit_base_patch16_gap", pretrained_cfg_overlay={"input_size": (3, 64, 64)}, num_classes=7, **options
    ).eval()
    theirs.head.bias.data.normal_()
    save_for_hf(theirs, tmp_path, safe_serialization=True, model_config={}, model_args=options)
    name = f"local-dir:{tmp_path}"
    for side, notes in ((64, []), (96, ["96 x 96 pixels: timm has resampled positions of 64 x 64"])):
        images = torch.randn(4, 3, side, side)
        model = build_model(name, img_size=side if notes else None)
        assert data_config(model)["input_size"] == (3, side, side) and model_notes(model) == notes
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-4, atol=1e-5)
        calibrate(quantize_model(model), images)
        save_quantized(tmp_path / "saved.safetensors", model, name)
        loaded, _ = load_quantized(tmp_path / "saved.safetensors")
        assert torch.equal(loaded(images), model(images))


@torch.no_grad()
def test_a_file_of_a_vit_is_one_for_the_naflexvit_of_its_size(tmp_path):
    torch.manual_seed(0)
    options = {"depth": 1, "embed_dim": 48, "num_heads": 3, "reg_tokens": 4, "no_embed_class": True, "img_size": 256}
    vit = timm.models.vision_transformer.VisionTransformer(
        **options, class_token=False, global_pool="avg", init_values=0.5, num_classes=7
    ).eval()
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    folder = tmp_path / "folder"
    theirs = timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=48, num_heads=3, num_classes=7)
    save_for_hf(theirs, folder, model_config={}, model_args={"depth": 1, "embed_dim": 48, "num_heads": 3})
    model, images = build_model(f"local-dir:{folder}", tmp_path / "vit.pth"), torch.randn(2, 3, 256, 256)
    torch.testing.assert_close(model(images), vit(images), rtol=1e-4, atol=1e-5)
