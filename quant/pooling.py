"""timm's attention pooling, as SigLIP has it: a learned query collects the tokens. See quant/vit.py.

Shapes: B images, N tokens, L queries, D width, h heads, d head width.
"""

from timm.layers import AttentionPoolLatent
from torch import Tensor

from quant.vit import QuantAttention


class QuantAttentionPoolLatent(AttentionPoolLatent):
    """Modifications: tokens and query quantized, the products as in QuantAttention, the residual sum quantized."""

    parts = ("q", "kv", "q_norm", "k_norm", "proj", "norm", "mlp")
    attend, merge_heads = QuantAttention.attend, QuantAttention.merge_heads

    @property
    def activations(self) -> tuple[str, ...]:
        residual = () if self.mlp is None else ("act_residual1",)
        return ("act_tokens_input", "act_latent", *QuantAttention.activations, *residual)

    def forward(self, x: Tensor) -> Tensor:
        query = self.q(self.act_latent(self.latent.clone()).expand(x.shape[0], -1, -1))  # a parameter, as an activation
        keys, values = self.kv(self.act_tokens_input(x.clone())).chunk(2, dim=-1)  # (B, N, D) each
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (query, keys, values))
        q, k, v = self.act_query(self.q_norm(q)), self.act_key(self.k_norm(k)), self.act_value(v)
        x = self.proj(self.act_context(self.attend(q, k, v)))  # (B, L, D)
        if self.mlp is not None:
            x = self.act_residual1(x + self.mlp(self.norm(x)))
        return x[:, 0] if self.pool == "token" else x.mean(dim=1) if self.pool == "avg" else x

    @staticmethod
    def refusal(pool: AttentionPoolLatent) -> str | None:
        return None if pool.pos_embed is None else "expected no positions in it"
