"""Windows: where all tokens of one are alike, as under a clear sky, its contexts are its values.

A context is a mean of values, weighted by softmax: it lies within their range, and the less the tokens of a window
differ, the less it averages out. Patches of generated images differ by design, so that ranges which are recorded on
them clip the contexts of photographs. For windows, then, the range of contexts reaches as far as that of values, and
when ranges are searched some windows count as if all of their tokens were alike. A ViT attends to the whole image,
which is alike all over in hardly any photograph.
"""

from collections.abc import Mapping

import torch
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import nn

from quant.modules import QuantAct

ALIKE = 8  # the windows of one image in so many count once more, as if alike, when ranges are searched
Contexts = Mapping[QuantAct, nn.Module]  # their quantizers, and the attention of each


def window_contexts(model: nn.Module) -> dict[QuantAct, nn.Module]:
    """The quantizers of a swapped model's contexts within windows, each with its attention."""
    windows = [module for module in model.modules() if isinstance(module, (WindowAttention, WindowAttentionV2))]
    placed = [one for one in windows if isinstance(one.act_context, QuantAct) and isinstance(one.act_value, QuantAct)]
    return {attention.act_context: attention for attention in placed}


def cover_values(contexts: Contexts) -> None:
    """Widen the observed range of each context to that of the values."""
    for context, attention in contexts.items():
        context.low = torch.minimum(context.low, attention.act_value.low)
        context.high = torch.maximum(context.high, attention.act_value.high)
