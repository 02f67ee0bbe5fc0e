"""timm's BEiT with quantized activations between its layers. See quant/vit.py for the way it is written.

Its positions are a bias on the scores, of a table in each layer, of one for all layers, or both.
"""

import torch
from timm.models.beit import Attention, Beit, Block, RelativePositionBias
from torch import Tensor

from quant.blocks import GammaBlock
from quant.vit import QuantAttention, QuantVisionTransformer


class QuantBeitAttention(Attention):
    """Modifications: as in QuantAttention, and bias table and sum quantized, as in Swin."""

    parts = ("qkv", "proj")
    qkv_of, heads, merge_heads = QuantAttention.qkv_of, QuantAttention.heads, QuantAttention.merge_heads

    @property
    def activations(self) -> tuple[str, ...]:
        table = () if self.relative_position_bias_table is None else ("act_bias",)
        return (*QuantAttention.activations, *table, "act_biased_scores")

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        q, k, v = self.act_query(q), self.act_key(k), self.act_value(v)
        scores = self.act_scores((q @ k.transpose(-2, -1)) * self.scale)  # (B, h, N, N)
        biases = [] if shared_rel_pos_bias is None else [shared_rel_pos_bias]
        if self.relative_position_bias_table is not None:
            biases.append(self._get_rel_pos_bias())
        scores = self.act_biased_scores(sum(biases, start=scores))
        context = self.merge_heads(self.act_probs(scores.softmax(dim=-1)) @ v)  # (B, N, D)
        return self.proj(self.act_context(context))

    def _get_rel_pos_bias(self) -> Tensor:
        return bias_of(self.act_bias(self.relative_position_bias_table.clone()), self.relative_position_index)


class QuantRelativePositionBias(RelativePositionBias):
    """Modifications: the table, a parameter, is quantized as an activation."""

    parts = ()
    activations = ("act_bias",)

    def forward(self) -> Tensor:
        return bias_of(self.act_bias(self.relative_position_bias_table.clone()), self.relative_position_index)


class QuantBeitBlock(GammaBlock, Block):
    """Modifications: as in GammaBlock; no stochastic depth."""


class QuantBeit(Beit):
    """Modifications: image, tokens, position embedding, their sum and the classifier's input quantized."""

    parts = ("patch_embed", "rel_pos_bias", "blocks", "norm", "fc_norm", "head")
    float_outputs = QuantVisionTransformer.float_outputs
    activations = QuantVisionTransformer.activations

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(self.act_input(x.clone()))
        x = self.act_tokens(torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1))
        if self.pos_embed is not None:
            x = self.act_embedding(x + self.act_position(self.pos_embed.clone()))
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        for block in self.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        return self.head(self.act_pooled(self.forward_head(self.norm(x), pre_logits=True)))


def bias_of(table: Tensor, index: Tensor) -> Tensor:
    """The bias of each pair of tokens, (h, N, N), of a table (places, h) and its indices (N, N)."""
    return table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1)
