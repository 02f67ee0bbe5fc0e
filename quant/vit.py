"""timm's ViT (and DeiT) with quantized activations between its layers.

Each class takes the place of the timm class it extends; only the lines that meet a quantizer are written anew. Its
`activations` are all the quantizers that a recipe may place; see quant/recipes.py for those that it does.
Shapes: B images, N tokens, D width, h heads, d = D / h. In full precision stay softmax itself, GELU's input (fc1's
output), layer norms inside, biases and the class token itself.
"""

import torch
from timm.layers import Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor


class QuantAttention(Attention):
    """Modifications: the factors of both products, scores and context quantized; attention is never fused."""

    parts = ("qkv", "proj")
    activations = ("act_query", "act_key", "act_scores", "act_probs", "act_value", "act_context")

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q, k, v = self.split_heads(x)
        scores = self.act_scores((q @ k.transpose(-2, -1)) * self.scale)  # (B, h, N, N)
        context = self.act_probs(scores.softmax(dim=-1)) @ v  # (B, h, N, d)
        context = self.act_context(context.transpose(1, 2).reshape(B, N, -1))  # (B, N, D)
        return self.proj(context)

    def split_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, (B, h, N, d) each."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.act_query(q), self.act_key(k), self.act_value(v)


class QuantMlp(Mlp):
    """Modifications: GELU's output quantized; its input, fc1's output, is not."""

    parts = ("fc1", "act", "fc2")
    activations = ("act_hidden",)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act_hidden(self.act(self.fc1(x))))


class QuantBlock(Block):
    """Modifications: both residual sums quantized; no stochastic depth."""

    parts = ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")
    activations = ("act_residual1", "act_residual2")

    def forward(self, x: Tensor) -> Tensor:
        x = self.act_residual1(x + self.ls1(self.attn(self.norm1(x))))
        return self.act_residual2(x + self.ls2(self.mlp(self.norm2(x))))


class QuantVisionTransformer(VisionTransformer):
    """Modifications: image, tokens, position embedding, their sum and the classifier's input quantized."""

    parts = ("patch_embed", "norm_pre", "blocks", "norm", "fc_norm", "head")
    activations = ("act_input", "act_tokens", "act_position", "act_embedding", "act_pooled")

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(self.act_input(x.clone())))

    def _prefix(self) -> list[Tensor]:
        """Tokens that stand before the patches: the class token, then registers."""
        return [token for token in (self.cls_token, self.reg_token) if token is not None]

    def _pos_embed(self, x: Tensor) -> Tensor:
        prefix = [token.expand(x.shape[0], -1, -1) for token in self._prefix()]
        position = self.act_position(self.pos_embed.clone())  # a parameter, quantized as an activation
        if self.no_embed_class:  # DeiT-III and others: the prefix has no position
            return self.act_tokens(torch.cat([*prefix, self.act_embedding(x + position)], dim=1))
        return self.act_embedding(self.act_tokens(torch.cat([*prefix, x], dim=1)) + position)  # (B, N, D)

    def forward_head(self, x: Tensor) -> Tensor:
        # Of the final norm only the rows that the classifier reads are quantized: the class token's.
        return self.head(self.act_pooled(self.fc_norm(self.pool(x))))  # (B, classes)


class QuantVisionTransformerDistilled(QuantVisionTransformer, VisionTransformerDistilled):
    """Modifications: as above, for two prefix tokens with a classifier each. Not in the paper."""

    parts = (*QuantVisionTransformer.parts, "head_dist")

    def _prefix(self) -> list[Tensor]:
        return [self.cls_token, self.dist_token]

    def forward_head(self, x: Tensor) -> Tensor:
        x = self.act_pooled(x[:, :2])  # (B, 2, D)
        return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
