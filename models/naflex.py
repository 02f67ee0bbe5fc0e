"""NaFlexVit, timm's ViT for images of any size and shape, as the ViT that it is for images of one size."""

import torch
from timm.models.naflexvit import NaFlexEmbeds, NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from quant import UnsupportedModelError


def at_size(model: NaFlexVit, img_size: tuple[int, int]) -> VisionTransformer:
    """The ViT that gives what a NaFlexVit gives for whole images of one size, (height, width) in pixels.

    Its blocks, norms and classifier are the model's own, not copies; positions are resampled as the model would in
    each pass.

    Raises:
        UnsupportedModelError: it has parts that timm's VisionTransformer has no place for.
        ValueError: the size is not a multiple of the patch's.
    """
    embeds = model.embeds
    if any(side % patch for side, patch in zip(img_size, embeds.patch_size, strict=True)):
        raise ValueError(f"expected an image of whole patches of {embeds.patch_size}; got {img_size}")
    for name, part in (("rope", model.rope), ("embeds.norm_input", embeds.norm_input)):
        if part is not None:
            raise UnsupportedModelError(f"{name} is a {type(part).__name__}; expected a NaFlexVit without")
    vit = VisionTransformer(
        img_size=img_size,
        patch_size=embeds.patch_size,
        in_chans=model.in_chans,
        num_classes=0,
        global_pool="",
        embed_dim=model.embed_dim,
        depth=0,
        class_token=embeds.has_class_token,
        reg_tokens=embeds.num_reg_tokens,
        no_embed_class=True,
        pre_norm=embeds.proj.bias is None,
        pool_include_prefix=model.pool_include_prefix,
        weight_init="skip",
    )
    vit.patch_embed.proj.weight = nn.Parameter(kernel(embeds))
    vit.patch_embed.proj.bias = embeds.proj.bias
    vit.patch_embed.norm = embeds.norm
    vit.cls_token, vit.reg_token = embeds.cls_token, embeds.reg_token
    vit.pos_embed = None if embeds.pos_embed_type == "none" else nn.Parameter(positions(embeds, img_size))
    vit.norm_pre, vit.blocks, vit.norm = model.norm_pre, model.blocks, model.norm
    vit.attn_pool, vit.fc_norm, vit.head_drop, vit.head = model.attn_pool, model.fc_norm, model.head_drop, model.head
    vit.global_pool, vit.num_classes = model.global_pool, model.num_classes
    for name in ("pretrained_cfg", "default_cfg"):
        if hasattr(model, name):
            setattr(vit, name, getattr(model, name))
    return vit.train(model.training)


@torch.no_grad()
def kernel(embeds: NaFlexEmbeds) -> Tensor:
    """The weight of the patch embedding, which may be linear, as a convolution's: (out, in, height, width)."""
    weight, (height, width) = embeds.proj.weight.detach(), embeds.patch_size
    if not embeds.is_linear:
        return weight
    if embeds.channels_last:
        return weight.unflatten(1, (height, width, -1)).permute(0, 3, 1, 2).contiguous()
    return weight.unflatten(1, (-1, height, width))


@torch.no_grad()
def positions(embeds: NaFlexEmbeds, img_size: tuple[int, int]) -> Tensor:
    """The positions of the patches of an image: (1, N, D)."""
    height, width = embeds.dynamic_feat_size(img_size)
    add = {"learned": embeds._apply_learned_pos_embed, "factorized": embeds._apply_factorized_pos_embed}
    sums = embeds.proj.weight.new_zeros(1, height * width, embeds.embed_dim)
    add[embeds.pos_embed_type](sums, grid_size=(height, width))
    return sums
