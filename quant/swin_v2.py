"""timm's Swin V2 with quantized activations between its layers. See quant/vit.py and quant/swin.py.

It differs from Swin by scores that are cosines, by norms at the end of blocks, and by a bias that a small network
computes of relative positions. That depends on weights alone: the network runs in float, and its result is quantized.
"""

import math

import torch.nn.functional as F
from timm.models.swin_transformer_v2 import PatchMerging, SwinTransformerV2, SwinTransformerV2Block, WindowAttention
from torch import Tensor

from quant.beit import bias_of
from quant.blocks import PostNormBlock
from quant.swin import QuantSwinTransformer
from quant.vit import QuantAttention


class QuantWindowAttentionV2(WindowAttention):
    """Modifications: normalised queries and keys, scores, bias, their sum and the context quantized."""

    parts = ("qkv", "cpb_mlp", "proj", "softmax")
    untouched = ("cpb_mlp",)
    activations = (
        *("act_unit_query", "act_unit_key", "act_scores", "act_computed_bias", "act_biased_scores"),
        *("act_probs", "act_value", "act_context"),
    )
    qkv_of, heads, merge_heads = QuantAttention.qkv_of, QuantAttention.heads, QuantAttention.merge_heads

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        N = x.shape[1]
        q, k, v = self.heads(x)  # (B*W, h, N, d) each
        q, k = self.act_unit_query(F.normalize(q, dim=-1)), self.act_unit_key(F.normalize(k, dim=-1))
        scale = self.logit_scale.clamp(max=math.log(1 / 0.01)).exp()  # (h, 1, 1)
        scores = self.act_scores((q @ k.transpose(-2, -1)) * scale)  # (B*W, h, N, N)
        scores = self.act_biased_scores(scores + self._get_rel_pos_bias())
        if mask is not None:  # (W, N, N)
            scores = (scores.view(-1, len(mask), self.num_heads, N, N) + mask[:, None]).view(scores.shape)
        context = self.merge_heads(self.act_probs(scores.softmax(dim=-1)) @ self.act_value(v))  # (B*W, N, D)
        return self.proj(self.act_context(context))

    def _get_rel_pos_bias(self) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        # Less 8, which softmax does not see: a grid whose range is all above zero would begin there, and clip it
        return self.act_computed_bias(16 * bias_of(table, self.relative_position_index).sigmoid() - 8)  # (h, N, N)


class QuantSwinTransformerV2Block(PostNormBlock, SwinTransformerV2Block):
    """Modifications: as in PostNormBlock; no stochastic depth."""

    def attention(self, x: Tensor) -> Tensor:
        return self._attn(x)


class QuantPatchMergingV2(PatchMerging):
    """Modifications: the input quantized, which in Swin is a norm's output."""

    parts = ("reduction", "norm")
    activations = ("act_merged",)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.act_merged(x.clone()))


class QuantSwinTransformerV2(SwinTransformerV2):
    """Modifications: image and pooled feature quantized."""

    parts = QuantSwinTransformer.parts
    activations = QuantSwinTransformer.activations
    forward = QuantSwinTransformer.forward
