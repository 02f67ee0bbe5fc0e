import pytest
import torch
from conftest import check_float_then_quantized, randomize
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from quant import activation_ranges, calibrate, quantize_model

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 10}
VARIANTS = {
    "distilled": (VisionTransformerDistilled, {}),
    "registers": (VisionTransformer, {"reg_tokens": 4}),
    "registers without position": (VisionTransformer, {"reg_tokens": 4, "no_embed_class": True}),
    "layer scale": (VisionTransformer, {"init_values": 0.5}),
    "average pooling": (VisionTransformer, {"global_pool": "avg", "class_token": False}),
    "pre-norm": (VisionTransformer, {"pre_norm": True}),
    "stochastic depth": (VisionTransformer, {"drop_path_rate": 0.2, "drop_rate": 0.1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_variants_are_their_float_model_until_calibrated(variant):
    torch.manual_seed(0)
    build, options = VARIANTS[variant]
    model, images = randomize(build(**SMALL, **options)), torch.randn(4, 3, 32, 32)
    check_float_then_quantized(model, images)


def test_values_are_quantized_where_the_paper_does(vit):
    quantize_model(vit)
    calibrate(vit, torch.randn(2, 3, 32, 32))
    block = (
        "norm1.act_output attn.qkv.act_output attn.act_scores attn.act_context attn.proj.act_output act_residual1 "
        "norm2.act_output mlp.act_hidden mlp.fc2.act_output act_residual2"
    )
    expected = {f"blocks.{i}.{name}" for i in range(2) for name in block.split()}
    expected |= {"act_input", "patch_embed.proj.act_output", "act_tokens", "act_position", "act_embedding"}
    expected |= {"act_pooled", "head.act_output"}
    assert set(activation_ranges(vit)) == expected


def test_only_the_class_token_of_the_final_norm_is_quantized(vit):
    quantize_model(vit, 8, 2)
    images = torch.randn(2, 3, 32, 32)
    calibrate(vit, images)
    with torch.no_grad():
        tokens = vit.forward_features(vit.act_input(images))
    assert tokens.unique().numel() > 100
