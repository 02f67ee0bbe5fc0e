"""Recipes: which values of a model are quantized, with how many bits, and what keeps the accuracy.

A swapped model has a quantizer at every place where some recipe wants one; a recipe says which of them are placed, and
which techniques prepare the weights, set the ranges and round. Each technique is a file of its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

EDGE_BITS = 8  # the least for what stands at a model's ends


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized. Patterns are of names, as in `quantizer_bits`."""

    name: str
    points: tuple[str, ...]  # activations that are quantized
    edges: tuple[str, ...] = ()  # activations and weights that have 8 bits at least
    symmetric: tuple[str, ...] = ()  # activations without zero points
    stretch: bool = False  # quant/contrast.py: the images, before anything is calibrated on them
    shade: bool = False  # quant/contrast.py: some of the images a second time, shaded
    balance: bool = False  # quant/balance.py, before anything is quantized
    rotate: bool = False  # quant/streams.py, after it, where that brings the logits nearer to the float ones
    drop_key_biases: bool = False  # quant/biases.py, after both, as a rotation moves the shifts of norms into biases
    windows: bool = False  # quant/windows.py: within windows contexts reach as far as values
    search_ranges: bool = False  # quant/ranges.py; without it smallest and largest value
    compensate: bool = False  # quant/rounding.py; without it weights are rounded to the nearest
    enlarge: bool = False  # quant/parts.py: compensation and learning see parts of each image, too, enlarged
    learn: int = 0  # steps of quant/learning.py, after all of it,
    learn_bits: int = 7  # where weights or activations have no more bits than these
    images: int = 32  # to calibrate on, if nobody says otherwise

    def without_zero_points(self) -> "Recipe":
        """The same with no activation that has one."""
        return replace(self, symmetric=("*",))

    def assign(self, names: Iterable[str], w_bit: int, a_bit: int) -> dict[str, int]:
        """Bits of every quantizer that is placed, by name: of `names`, all weights and the activations of `points`."""
        bits = {name: w_bit if name.endswith(".weight") else a_bit for name in names}
        # Norms at the end of what a block adds: where its products have inputs of their own, nothing else reads them.
        inputs = [name for name in bits if name.endswith(".act_attn_input") and matches(name, self.points)]
        added = tuple(name.replace("act_attn_input", "norm[12].act_output") for name in inputs)
        return {
            name: max(value, EDGE_BITS) if matches(name, self.edges) else value
            for name, value in bits.items()
            if name.endswith(".weight") or (matches(name, self.points) and not matches(name, added))
        }


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a quantizer's name fits one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


# The published scheme: the output of every layer but fc1, attention scores, and both residual sums.
PAPER = Recipe(
    name="paper",
    points=(
        *("act_input", "patch_embed.*", "act_tokens", "act_position", "act_embedding", "norm_pre.act_output"),
        *("*.norm1.act_output", "*.qkv.act_output", "*.act_scores", "*.act_bias", "*.act_biased_scores"),
        *("*.act_context", "*.attn.proj.act_output", "*.act_residual1"),
        *("*.norm2.act_output", "*.act_hidden", "*.fc2.act_output", "*.act_residual2", "*.downsample.*"),
        *("norm.act_output", "act_pooled", "head.*", "head_dist.*"),
        # Families that the paper does not have
        *("*.q_norm.act_output", "*.k_norm.act_output", "*.act_rotated_*", "*.act_unit_*", "*.act_computed_bias"),
        *("*.[qkv]_proj.act_output", "rel_pos_bias.act_bias", "*.attns.*.norm.act_output", "*.ffns.*.norm.act_output"),
        *("attn_pool.act_tokens_input", "attn_pool.act_latent", "attn_pool.*.act_output"),
    ),
)

# What enters a product, and nothing else, so that every product has two integer factors and the residual stream none
# to pass through. Where it is placed elsewhere, 8 bits at the ends are the rule: they are a small part of the work.
BEST = Recipe(
    name="best",
    points=(
        *("act_input", "*.norm1.act_output", "*.act_query", "*.act_key", "*.act_probs", "*.act_value"),
        *("*.act_context", "*.norm2.act_output", "*.act_hidden", "*.downsample.norm.act_output", "act_pooled"),
        # Families that the paper does not have
        *("*.act_rotated_*", "*.act_unit_*", "*.act_attn_input", "*.act_mlp_input", "*.act_merged"),
        *("*.attns.*.norm.act_output", "*.ffns.*.norm.act_output"),
        *("attn_pool.act_tokens_input", "attn_pool.act_latent", "attn_pool.norm.act_output"),
    ),
    edges=("act_input", "patch_embed.proj.weight", "act_pooled", "head.*", "head_dist.*"),
    # Two activations are multiplied in integers by OpenVINO only if neither has one. Softmax's output begins at 0, and
    # has none anyhow; queries, keys and values lie on both sides of it.
    symmetric=("*.act_query", "*.act_key", "*.act_value", "*.act_rotated_*", "*.act_unit_*"),
    stretch=True,
    shade=True,
    balance=True,
    rotate=True,
    drop_key_biases=True,
    windows=True,
    search_ranges=True,
    compensate=True,
    enlarge=True,
    learn=100,
    learn_bits=3,  # there it brings most, in less than a minute
)
# Of more images more can be learned; at W8/A8 nothing was, in half an hour of the ViT-S (docs/recipes.md)
LEARNED = replace(BEST, name="learned", learn=400, learn_bits=7, images=128)
# The placement alone: what the techniques are measured against.
INPUTS = Recipe("inputs", BEST.points, BEST.edges, BEST.symmetric)

RECIPES = {recipe.name: recipe for recipe in (PAPER, BEST, LEARNED)}
