"""The residual streams of a model: which layers write to one, which read it, and how all of them are rotated."""

import re

import torch
from timm.layers import RmsNorm
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer_relpos import RelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn

from quant.rotation import (
    fold_layer_scale,
    keeps_shift,
    mean_keeping_rotation,
    rotate_heads,
    rotate_output,
    rotate_reading,
)

Reading = tuple[nn.LayerNorm, list[nn.Linear], bool]  # a norm, what reads it, and whether that is padded with zeros
_LARGEST_SHIFT = 1e3  # of a norm's channel, in units of its gain
_VIT = (VisionTransformer, VisionTransformerRelPos)
_BLOCKS = (Block, RelPosBlock, SwinTransformerBlock)


def obstacle(model: nn.Module) -> str | None:
    """Why a model cannot be rotated without changing what it computes; None if it can."""
    if not isinstance(model, (*_VIT, SwinTransformer)):
        return f"{type(model).__name__.removeprefix('Quant')} is no ViT, DeiT or Swin"
    if not model.num_classes:
        return "without a classifier the stream's own basis is the result"
    if getattr(model, "attn_pool", None) is not None:
        return "expected no attention pooling"
    if isinstance(model, _VIT):
        if model.global_pool in ("max", "avgmax"):
            return f"what global_pool='{model.global_pool}' gives depends on the stream's basis"
        if not any(isinstance(norm, nn.LayerNorm) for norm in (model.norm, model.fc_norm)):
            return "expected a norm before the classifier"
    for name, module in model.named_modules():
        if re.fullmatch(r"(blocks|layers\.\d+\.blocks)\.\d+", name) and not isinstance(module, _BLOCKS):
            return f"{name} is not a ViT's or Swin's block"
        if isinstance(module, _BLOCKS) and not hasattr(module.mlp, "fc1"):
            return f"{name}.mlp has a gate in a layer of its own"
        if isinstance(module, nn.LayerNorm) and (module.weight is None or module.bias is None):
            return f"{name} is a norm without a weight or a bias"
        if hasattr(module, "qkv") and any(
            not isinstance(getattr(module, part, None), (nn.Identity, type(None)))
            for part in ("q_norm", "k_norm", "norm", "gate")
        ):
            return f"{name} has norms or a gate between its products"
        if isinstance(module, RmsNorm):
            return f"{name} is a root mean square norm"
    return None


@torch.no_grad()
def rotate(model: nn.Module) -> None:
    """Rotate all streams and heads of a timm ViT, DeiT or Swin in place, in which no value is quantized yet.

    The model has no `obstacle`.
    """
    if isinstance(model, SwinTransformer):
        _rotate_swin(model)
    else:
        _rotate_vit(model)
    for attention in [module for module in model.modules() if hasattr(module, "qkv")]:
        rotate_heads(attention)


def _rotate_vit(model: nn.Module) -> None:
    first = getattr(model, "norm_pre", None), model.patch_embed.norm
    if not all(isinstance(norm, nn.Identity | None) for norm in first):
        return  # its affine part writes to the stream, channel by channel
    heads = [head for name in ("head", "head_dist") if isinstance(head := getattr(model, name, None), nn.Linear)]
    norm = model.norm if isinstance(model.norm, nn.LayerNorm) else model.fc_norm
    if not all(map(_can_be_folded, readings := [*_readings(model.blocks), (norm, heads, False)])):
        return
    rotation = mean_keeping_rotation(model.embed_dim).to(model.patch_embed.proj.weight.device)
    rotate_output(model.patch_embed.proj, rotation)
    for name in ("cls_token", "reg_token", "dist_token", "pos_embed"):
        if (parameter := getattr(model, name, None)) is not None:
            parameter.copy_(parameter.double() @ rotation.T)
    _rotate_writers(model.blocks, rotation)
    for norm, readers, padded in readings:
        rotate_reading(norm, readers, rotation, padded)


def _rotate_swin(model: nn.Module) -> None:
    """All stages but the first, to which the patch embedding's norm writes, channel by channel."""
    stages = list(model.layers[1:])
    for stage, after in zip(stages, [*stages[1:], None], strict=False):
        last = (after.downsample.norm, [after.downsample.reduction]) if after else (model.norm, [model.head.fc])
        if not all(map(_can_be_folded, [*(readings := _readings(stage.blocks)), (*last, False)])):
            continue
        rotation = mean_keeping_rotation(stage.downsample.reduction.out_features)
        rotation = rotation.to(model.norm.weight.device)
        rotate_output(stage.downsample.reduction, rotation)
        _rotate_writers(stage.blocks, rotation)
        for norm, readers, padded in readings:
            rotate_reading(norm, readers, rotation, padded)
        rotate_reading(*last, torch.block_diag(*[rotation] * 4) if after else rotation)  # a merging reads 4 neighbours


def _readings(blocks: nn.Module) -> list[Reading]:
    """The norms of blocks with what reads them; Swin pads the output of the first where windows do not fill a stage."""
    readings: list[Reading] = []
    for block in blocks:
        window = zip(getattr(block, "input_resolution", ()), getattr(block, "window_size", ()), strict=True)
        readings.append((block.norm1, [block.attn.qkv], any(side % width for side, width in window)))
        readings.append((block.norm2, [block.mlp.fc1], False))
    return readings


def _can_be_folded(reading: Reading) -> bool:
    """Whether a norm's shift, if it stays there, in units of the gain, is not so large that float32 loses the rest."""
    norm, readers, padded = reading
    return not keeps_shift(readers, padded) or bool((norm.bias.abs() <= _LARGEST_SHIFT * norm.weight.abs()).all())


def _rotate_writers(blocks: nn.Module, rotation: Tensor) -> None:
    for block in blocks:
        for layer, scale in ((block.attn.proj, "ls1"), (block.mlp.fc2, "ls2")):
            fold_layer_scale(layer, getattr(block, scale, None))
            rotate_output(layer, rotation)
