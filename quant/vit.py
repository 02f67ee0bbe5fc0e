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
    """Modifications: the factors of both products, scores and context quantized; attention is never fused.

    Norms of queries and keys, a norm of the context and a gate are not in the paper. Other families borrow its methods.
    """

    parts = ("qkv", "q_norm", "k_norm", "norm", "gate", "proj")
    float_outputs = ("norm", "gate")
    activations = ("act_query", "act_key", "act_scores", "act_probs", "act_value", "act_context")

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.attend(*self.split_heads(x)), x)

    def split_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, (B, h, N, d) each, as they enter the products."""
        q, k, v = self.heads(x)
        return self.act_query(self.q_norm(q)), self.act_key(self.k_norm(k)), self.act_value(v)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, (B, h, N, d) each, as the layer puts them out."""
        B, N, _ = x.shape
        return self.qkv_of(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def qkv_of(self, x: Tensor) -> Tensor:
        """The layer's output, (B, N, 3 D). BEiT, EVA and Swin V2 keep its bias apart, as their keys have none."""
        if getattr(self, "q_bias", None) is None:
            return self.qkv(x)
        return self.qkv(x, torch.cat((self.q_bias, self.k_bias, self.v_bias)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(QK^T) V with heads merged, (B, N, D)."""
        scores = self.act_scores((q @ k.transpose(-2, -1)) * self.scale)  # (B, h, N, N)
        return self.merge_heads(self.act_probs(scores.softmax(dim=-1)) @ v)

    def merge_heads(self, context: Tensor) -> Tensor:
        """(B, h, N, d) to (B, N, D)."""
        return context.transpose(1, 2).flatten(2)

    def project(self, context: Tensor, x: Tensor) -> Tensor:
        """The output for a context, both (B, N, D); `x` is the layer's input, which a gate reads."""
        context = self.norm(context)
        if getattr(self, "gate", None) is not None:
            context = context * self.gate(x).sigmoid()
        return self.proj(self.act_context(context))


class QuantMlp(Mlp):
    """Modifications: the input of the second layer quantized; GELU's input, fc1's output, is not."""

    parts = ("fc1", "act", "norm", "fc2")
    float_outputs = ("fc1", "norm")
    activations = ("act_hidden",)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act_hidden(self.norm(self.act(self.fc1(x)))))


class QuantBlock(Block):
    """Modifications: both residual sums quantized; no stochastic depth."""

    parts = ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")
    activations = ("act_residual1", "act_residual2")

    def forward(self, x: Tensor, **attention: Tensor | None) -> Tensor:
        """`attention` is what another family's block hands on to its attention: a bias that all share."""
        x = self.act_residual1(x + self.ls1(self.attn(self.norm1(x), **attention)))
        return self.act_residual2(x + self.ls2(self.mlp(self.norm2(x))))


class QuantVisionTransformer(VisionTransformer):
    """Modifications: image, tokens, position embedding, their sum and the classifier's input quantized."""

    parts = ("patch_embed", "norm_pre", "blocks", "norm", "attn_pool", "fc_norm", "head")
    float_outputs = ("norm", "fc_norm")

    @property
    def activations(self) -> tuple[str, ...]:
        positions = () if self.pos_embed is None else ("act_position", "act_embedding")
        return ("act_input", "act_tokens", *positions, "act_pooled")

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(self.act_input(x.clone())))

    def _prefix(self) -> list[Tensor]:
        """Tokens that stand before the patches: the class token, then registers."""
        return [token for token in (self.cls_token, self.reg_token) if token is not None]

    def _pos_embed(self, x: Tensor) -> Tensor:
        prefix = [token.expand(x.shape[0], -1, -1) for token in self._prefix()]
        x = x.flatten(1, -2)  # (B, H, W, D) where timm would take images of any size
        if self.pos_embed is None:
            return self.act_tokens(torch.cat([*prefix, x], dim=1))
        position = self.act_position(self.pos_embed.clone())  # a parameter, quantized as an activation
        if self.no_embed_class:  # DeiT-III and others: the prefix has no position
            return self.act_tokens(torch.cat([*prefix, self.act_embedding(x + position)], dim=1))
        return self.act_embedding(self.act_tokens(torch.cat([*prefix, x], dim=1)) + position)  # (B, N, D)

    @staticmethod
    def refusal(model: VisionTransformer) -> str | None:
        """What of a model is not understood beyond the types of its modules."""
        if model.num_prefix_tokens == 0 and model.global_pool == "token":
            return "expected a class token, or pooling of the patches; the model has neither"
        return None

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
