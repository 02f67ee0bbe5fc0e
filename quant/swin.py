"""timm's Swin with quantized activations between its layers. See quant/vit.py for the way it is written.

Shapes: B images, W windows an image, N tokens a window, h heads, d head width; between blocks (B, H, W, D).
"""

from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import Tensor

from quant.vit import QuantAttention


class QuantWindowAttention(WindowAttention):
    """Modifications: as in QuantAttention, and bias table and sum quantized; the shift mask is added in float."""

    parts = ("qkv", "proj", "softmax")
    activations = (*QuantAttention.activations, "act_bias", "act_biased_scores")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        N = x.shape[1]
        q, k, v = self.split_heads(x)  # (B*W, h, N, d) each
        scores = self.act_scores((q * self.scale) @ k.transpose(-2, -1))  # (B*W, h, N, N)
        scores = self.act_biased_scores(scores + self._get_rel_pos_bias())
        if mask is not None:  # (W, N, N)
            scores = (scores.view(-1, len(mask), self.num_heads, N, N) + mask[:, None]).view(scores.shape)
        context = self.merge_heads(self.act_probs(scores.softmax(dim=-1)) @ v)  # (B*W, N, D)
        return self.proj(self.act_context(context))

    qkv_of, heads, merge_heads = QuantAttention.qkv_of, QuantAttention.heads, QuantAttention.merge_heads

    def split_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.heads(x)
        return self.act_query(q), self.act_key(k), self.act_value(v)

    def _get_rel_pos_bias(self) -> Tensor:
        table = self.act_bias(self.relative_position_bias_table.clone())  # a parameter, quantized as an activation
        N = self.window_area
        return table[self.relative_position_index.view(-1)].view(N, N, -1).permute(2, 0, 1)  # (h, N, N)


class QuantSwinTransformerBlock(SwinTransformerBlock):
    """Modifications: both residual sums quantized; no stochastic depth."""

    parts = ("norm1", "attn", "norm2", "mlp")
    activations = ("act_residual1", "act_residual2")

    def forward(self, x: Tensor) -> Tensor:
        x = self.act_residual1(x + self._attn(self.norm1(x)))
        return self.act_residual2(x + self.mlp(self.norm2(x)))


class QuantSwinTransformer(SwinTransformer):
    """Modifications: image and pooled feature quantized."""

    parts = ("patch_embed", "layers", "norm", "head")
    activations = ("act_input", "act_pooled")

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(self.act_input(x.clone()))
        return self.head.fc(self.act_pooled(self.head(x, pre_logits=True)))  # (B, classes)
