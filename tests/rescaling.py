"""The same function with outliers: channels rescaled, or tokens shifted, so that no float logit moves.

As large channels are what real vision transformers have, and small ones trained for an hour do not, this is the
property that a recipe is tested on.
"""

import torch

from quant.learning import block_outputs

LARGEST = 100.0


@torch.no_grad()
def rescale(model, seed=0, largest=LARGEST):
    """Multiply one channel in twelve by up to `largest`, in place, and divide where it is read.

    Layer norm's affine part against the columns of the layers after it, and values against the projection's columns.
    """
    generator = torch.Generator().manual_seed(seed)

    def factors(count):
        chosen = torch.rand(count, generator=generator) < 1 / 12
        return torch.where(chosen, largest ** torch.rand(count, generator=generator), 1.0)

    for block in [module for module in model.modules() if hasattr(module, "norm1")]:
        for norm, reader in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            scale = factors(len(norm.weight))
            norm.weight.mul_(scale), norm.bias.mul_(scale)
            reader.weight.div_(scale)
        scale = factors(block.attn.proj.in_features)
        values = slice(-len(scale), None)
        block.attn.qkv.weight[values] *= scale[:, None]
        block.attn.qkv.bias[values] *= scale
        block.attn.proj.weight.div_(scale)
    return model


@torch.no_grad()
def shift_tokens(model, images, deviations=30.0):
    """Add to all channels of one token in thirty what is `deviations` of the residual stream's standard deviations.

    A token's own mean is what every layer norm takes away, so nothing else of the stream could be shifted.
    """
    tokens = model.pos_embed[:, ::30]
    tokens += deviations * block_outputs(model, images)[0].std()
    return model
