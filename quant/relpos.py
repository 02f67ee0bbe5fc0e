"""timm's ViT with relative positions, with quantized activations between its layers. See quant/vit.py.

Its positions are a bias on the scores, in each layer or one for all, of a table or computed by a small network. Either
depends on weights alone: it is computed in float, and its result is quantized.
"""

import torch
from timm.layers import RelPosBias, RelPosMlp
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor, nn

from quant.blocks import PostNormBlock
from quant.vit import QuantAttention, QuantBlock, QuantVisionTransformer


class ComputedBias(nn.Module):
    """Mixin: the bias of each pair of tokens, (1, h, N, N), is quantized.

    Less its mean, which softmax does not see: a grid whose range is all above zero would begin there, and clip it.
    """

    activations = ("act_computed_bias",)

    def get_bias(self) -> Tensor:
        bias = super().get_bias()
        return self.act_computed_bias(bias - bias.mean())


class QuantRelPosMlp(ComputedBias, RelPosMlp):
    """Modifications: as in ComputedBias."""

    parts = ("mlp", "bias_act")
    untouched = ("mlp",)


class QuantRelPosBias(ComputedBias, RelPosBias):
    """Modifications: as in ComputedBias."""

    parts = ()


class QuantRelPosAttention(RelPosAttention):
    """Modifications: as in QuantAttention, and the sum of scores and bias quantized, as in Swin."""

    parts = ("qkv", "q_norm", "k_norm", "rel_pos", "proj")
    activations = (*QuantAttention.activations, "act_biased_scores")
    split_heads, heads, qkv_of = QuantAttention.split_heads, QuantAttention.heads, QuantAttention.qkv_of
    merge_heads = QuantAttention.merge_heads

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        q, k, v = self.split_heads(x)
        scores = self.act_scores((q @ k.transpose(-2, -1)) * self.scale)  # (B, h, N, N)
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        scores = self.act_biased_scores(scores if bias is None else scores + bias)
        context = self.merge_heads(self.act_probs(scores.softmax(dim=-1)) @ v)  # (B, N, D)
        return self.proj(self.act_context(context))


class QuantRelPosBlock(RelPosBlock):
    """Modifications: as in QuantBlock."""

    parts, activations, forward = QuantBlock.parts, QuantBlock.activations, QuantBlock.forward


class QuantResPostRelPosBlock(PostNormBlock, ResPostRelPosBlock):
    """Modifications: as in PostNormBlock; no stochastic depth."""


class QuantVisionTransformerRelPos(VisionTransformerRelPos):
    """Modifications: image, tokens and the classifier's input quantized."""

    parts = ("patch_embed", "shared_rel_pos", "blocks", "norm", "fc_norm", "head")
    float_outputs = QuantVisionTransformer.float_outputs
    activations = ("act_input", "act_tokens", "act_pooled")

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(self.act_input(x.clone()))
        prefix = [] if self.cls_token is None else [self.cls_token.expand(x.shape[0], -1, -1)]
        x = self.act_tokens(torch.cat([*prefix, x], dim=1))
        bias = None if self.shared_rel_pos is None else self.shared_rel_pos.get_bias()
        for block in self.blocks:
            x = block(x, shared_rel_pos=bias)
        return self.head(self.act_pooled(self.forward_head(self.norm(x), pre_logits=True)))
