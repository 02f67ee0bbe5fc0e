"""timm's Eva with quantized activations between its layers: EVA, EVA-02, DINOv3, Perception Encoder, ViTs with RoPE.

See quant/vit.py for the way it is written, and for shapes. It differs from a ViT by positions that rotate queries and
keys, by norms and gates inside attention and MLP, and by its layers' names.
"""

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from quant.blocks import GammaBlock, PostNormBlock
from quant.vit import QuantAttention, QuantVisionTransformer


class RotaryAttention(nn.Module):
    """Mixin: the factors of both products quantized, queries and keys where they are rotated; scores and context too.

    Rotation takes a quantized value off its grid, so that the output of the layer before is not enough.
    """

    parts = ("qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "norm", "gate", "proj")
    float_outputs = ("q_norm", "k_norm", "norm", "gate")
    activations = ("act_rotated_query", "act_rotated_key", "act_scores", "act_probs", "act_value", "act_context")
    qkv_of, attend, project = QuantAttention.qkv_of, QuantAttention.attend, QuantAttention.project
    merge_heads = QuantAttention.merge_heads

    def forward(self, x: Tensor, rope: Tensor | None = None, **masks: None) -> Tensor:
        q, k, v = self.heads(x)
        q = self.act_rotated_query(self.rotate(self.q_norm(q), rope))  # (B, h, N, d)
        k = self.act_rotated_key(self.rotate(self.k_norm(k), rope))
        v = self.act_value(v)
        if q.shape[1] != k.shape[1]:  # several queries share a key and a value
            k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for y in (k, v))
        return self.project(self.attend(q, k, v), x)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.qkv is not None:
            return QuantAttention.heads(self, x)
        layers = (self.q_proj, self.k_proj, self.v_proj)
        return tuple(layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in layers)

    def rotate(self, x: Tensor, rope: Tensor | None) -> Tensor:
        """Queries or keys with the patches', not the prefix's, rotated by their positions."""
        if rope is None:
            return x
        prefix, half = self.num_prefix_tokens, getattr(self, "rotate_half", False)
        return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)], dim=2)


class QuantEvaAttention(RotaryAttention, EvaAttention):
    """Modifications: as in RotaryAttention."""


class QuantAttentionRope(RotaryAttention, AttentionRope):
    """Modifications: as in RotaryAttention."""


class QuantEvaBlock(GammaBlock, EvaBlock):
    """Modifications: as in GammaBlock; no stochastic depth."""


class QuantEvaBlockPostNorm(PostNormBlock, EvaBlockPostNorm):
    """Modifications: as in PostNormBlock; no stochastic depth."""


class QuantEva(Eva):
    """Modifications: as in QuantVisionTransformer."""

    parts = (*QuantVisionTransformer.parts, "rope")
    float_outputs = QuantVisionTransformer.float_outputs
    activations = QuantVisionTransformer.activations
    _prefix = QuantVisionTransformer._prefix
    forward_head = QuantVisionTransformer.forward_head

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(self.act_input(x.clone())))

    def _pos_embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        _, rope = super()._pos_embed(x)
        return QuantVisionTransformer._pos_embed(self, x), rope
