"""What several families after ViT have: gated MLPs, blocks with scales of their own, blocks with norms at their end.

See quant/vit.py for the way it is written. None of it is in the paper: quantizers stand at the corresponding places.
"""

from timm.layers import GluMlp, SwiGLU
from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn


class QuantGluMlp(GluMlp):
    """Modifications: the input of the second layer quantized; both halves of the first one's output are not."""

    parts = ("fc1", "act", "norm", "fc2")
    float_outputs = ("fc1", "norm")
    activations = ("act_hidden",)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fc1(x).chunk(2, dim=-1)
        x = first * self.act(second) if self.gate_last else self.act(first) * second
        return self.fc2(self.act_hidden(self.norm(x)))

    @staticmethod
    def refusal(mlp: GluMlp) -> str | None:
        return None if isinstance(mlp.fc1, nn.Linear) else "expected linear layers in it"


class QuantSwiGLU(SwiGLU):
    """Modifications: the input of the second layer quantized; the outputs of both first ones are not."""

    parts = ("fc1_g", "fc1_x", "act", "norm", "fc2")
    float_outputs = ("fc1_g", "fc1_x", "norm")
    activations = ("act_hidden",)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act_hidden(self.norm(self.act(self.fc1_g(x)) * self.fc1_x(x))))


class GammaBlock(nn.Module):
    """Mixin for blocks whose layer scales are parameters of their own: both residual sums quantized."""

    parts = ("norm1", "attn", "norm2", "mlp")
    activations = ("act_residual1", "act_residual2")

    def forward(self, x: Tensor, **attention: Tensor | None) -> Tensor:
        """`attention` is what timm's block hands on to its attention: rotations or a shared bias."""
        y = self.attn(self.norm1(x), **attention)
        x = self.act_residual1(x + (y if self.gamma_1 is None else self.gamma_1 * y))
        y = self.mlp(self.norm2(x))
        return self.act_residual2(x + (y if self.gamma_2 is None else self.gamma_2 * y))


class PostNormBlock(nn.Module):
    """Mixin for blocks that normalise what they add: both residual sums quantized.

    The products read the residual stream itself. For recipes that leave it in float there are quantizers of their own
    on the way to the products; they get copies, as what they are given is overwritten.
    """

    parts = ("norm1", "attn", "norm2", "mlp")
    activations = ("act_attn_input", "act_residual1", "act_mlp_input", "act_residual2")

    def forward(self, x: Tensor, **attention: Tensor | None) -> Tensor:
        x = self.act_residual1(x + self.norm1(self.attention(self.act_attn_input(x.clone()), **attention)))
        return self.act_residual2(x + self.norm2(self.mlp(self.act_mlp_input(x.clone()))))

    def attention(self, x: Tensor, **attention: Tensor | None) -> Tensor:
        return self.attn(x, **attention)


class QuantResPostBlock(PostNormBlock, ResPostBlock):
    """Modifications: as in PostNormBlock; no stochastic depth."""


class QuantParallelThingsBlock(ParallelThingsBlock):
    """Modifications: both residual sums quantized; no stochastic depth."""

    parts = ("attns", "ffns")
    activations = ("act_residual1", "act_residual2")

    def forward(self, x: Tensor) -> Tensor:
        x = self.act_residual1(x + sum(branch(x) for branch in self.attns))
        return self.act_residual2(x + sum(branch(x) for branch in self.ffns))
