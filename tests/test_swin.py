import pytest
import torch
from conftest import check_float_then_quantized, randomize
from timm.models.swin_transformer import SwinTransformer

from quant import activation_ranges, calibrate, quantize_model


@pytest.mark.parametrize("size", [32, 48, 40], ids="{0}px".format)  # 40: windows need padding
@torch.no_grad()
def test_other_sizes_are_their_float_model_until_calibrated(size):
    torch.manual_seed(0)
    model = SwinTransformer(
        img_size=size, patch_size=2, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=10
    )
    model, images = randomize(model), torch.randn(2, 3, size, size)
    check_float_then_quantized(model, images)


def test_values_are_quantized_where_the_paper_does(swin):
    calibrate(quantize_model(swin), torch.randn(2, 3, 32, 32))
    block = (
        "norm1.act_output attn.qkv.act_output attn.act_scores attn.act_bias attn.act_biased_scores attn.act_context "
        "attn.proj.act_output act_residual1 norm2.act_output mlp.act_hidden mlp.fc2.act_output act_residual2"
    )
    blocks = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]
    expected = {f"{prefix}.{name}" for prefix in blocks for name in block.split()}
    expected |= {"act_input", "patch_embed.proj.act_output", "patch_embed.norm.act_output"}
    expected |= {"layers.1.downsample.norm.act_output", "layers.1.downsample.reduction.act_output"}
    expected |= {"norm.act_output", "act_pooled", "head.fc.act_output"}
    assert set(activation_ranges(swin)) == expected
