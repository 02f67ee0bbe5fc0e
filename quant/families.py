"""Which of timm's models and modules are understood, and the quantized class of each."""

from collections.abc import Iterator

import torch
from timm import layers as timm_layers
from timm.layers import pos_embed_sincos
from timm.models import beit as timm_beit
from timm.models import deit, swin_transformer, swin_transformer_v2, vision_transformer, vision_transformer_relpos
from timm.models import eva as timm_eva
from torch import Tensor, nn

from quant import beit, blocks, eva, modules, pooling, relpos, swin, swin_v2, vit

# Whole models, by family; then their parts. Exact types, not subclasses: what is not in one of these tables may compute
# something that is not quantized here.
ROOTS: dict[type[nn.Module], type[nn.Module]] = {
    vision_transformer.VisionTransformer: vit.QuantVisionTransformer,
    deit.VisionTransformerDistilled: vit.QuantVisionTransformerDistilled,
    swin_transformer.SwinTransformer: swin.QuantSwinTransformer,
    timm_eva.Eva: eva.QuantEva,
    timm_beit.Beit: beit.QuantBeit,
    swin_transformer_v2.SwinTransformerV2: swin_v2.QuantSwinTransformerV2,
    vision_transformer_relpos.VisionTransformerRelPos: relpos.QuantVisionTransformerRelPos,
}
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    **ROOTS,
    nn.Linear: modules.QuantLinear,
    nn.Conv2d: modules.QuantConv2d,
    nn.LayerNorm: modules.QuantLayerNorm,
    timm_layers.LayerNorm: modules.QuantLayerNorm,
    timm_layers.RmsNorm: modules.QuantRmsNorm,
    timm_layers.Mlp: vit.QuantMlp,
    timm_layers.GluMlp: blocks.QuantGluMlp,
    timm_layers.SwiGLU: blocks.QuantSwiGLU,
    timm_layers.AttentionPoolLatent: pooling.QuantAttentionPoolLatent,
    vision_transformer.Attention: vit.QuantAttention,
    vision_transformer.Block: vit.QuantBlock,
    vision_transformer.ResPostBlock: blocks.QuantResPostBlock,
    vision_transformer.ParallelThingsBlock: blocks.QuantParallelThingsBlock,
    swin_transformer.WindowAttention: swin.QuantWindowAttention,
    swin_transformer.SwinTransformerBlock: swin.QuantSwinTransformerBlock,
    swin_transformer_v2.WindowAttention: swin_v2.QuantWindowAttentionV2,
    swin_transformer_v2.SwinTransformerV2Block: swin_v2.QuantSwinTransformerV2Block,
    swin_transformer_v2.PatchMerging: swin_v2.QuantPatchMergingV2,
    timm_eva.EvaAttention: eva.QuantEvaAttention,
    timm_layers.AttentionRope: eva.QuantAttentionRope,
    timm_eva.EvaBlock: eva.QuantEvaBlock,
    timm_eva.EvaBlockPostNorm: eva.QuantEvaBlockPostNorm,
    timm_beit.Attention: beit.QuantBeitAttention,
    timm_beit.RelativePositionBias: beit.QuantRelativePositionBias,
    timm_beit.Block: beit.QuantBeitBlock,
    vision_transformer_relpos.RelPosAttention: relpos.QuantRelPosAttention,
    timm_layers.RelPosBias: relpos.QuantRelPosBias,
    timm_layers.RelPosMlp: relpos.QuantRelPosMlp,
    vision_transformer_relpos.RelPosBlock: relpos.QuantRelPosBlock,
    vision_transformer_relpos.ResPostRelPosBlock: relpos.QuantResPostRelPosBlock,
}
# Attention between tokens, whose output is the input of its `proj`
ATTENTION = (
    *(vision_transformer.Attention, swin_transformer.WindowAttention, swin_transformer_v2.WindowAttention),
    *(timm_eva.EvaAttention, timm_layers.AttentionRope, timm_beit.Attention),
    vision_transformer_relpos.RelPosAttention,
)
# Modules that stay: containers, and functions without weights. Learned rotations depend on no image.
INERT = (nn.Identity, nn.Dropout, timm_layers.DropPath, timm_layers.PatchDropout)
KEPT = (
    *(*INERT, nn.Sequential, nn.ModuleList, nn.Flatten, nn.Softmax),
    *(nn.GELU, timm_layers.GELU, timm_layers.GELUTanh, timm_layers.QuickGELU, nn.SiLU, nn.ReLU),
    *(timm_layers.PatchEmbed, timm_layers.LayerScale, timm_layers.ClassifierHead),
    *(timm_layers.SelectAdaptivePool2d, timm_layers.adaptive_avgmax_pool.FastAdaptiveAvgPool),
    *(swin_transformer.SwinTransformerStage, swin_transformer.PatchMerging),
    swin_transformer_v2.SwinTransformerV2Stage,
    *(timm_layers.RotaryEmbeddingCat, timm_layers.RotaryEmbeddingMixed, pos_embed_sincos.RotaryEmbeddingDinoV3),
)


class UnsupportedModelError(TypeError):
    """The model has a part that this project does not know how to quantize; it is never quantized in part."""


def check_supported(model: nn.Module) -> None:
    """Raise UnsupportedModelError, naming the part, unless `model` is one of ROOTS and every module is understood."""
    if type(model) not in ROOTS:
        expected = ", ".join(root.__name__ for root in ROOTS)
        raise UnsupportedModelError(f"expected a timm {expected}; got {type(model).__name__}")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise UnsupportedModelError(f"{name} is {parameter.dtype}; expected torch.float32, as model.float() has it")
    for name, module in model.named_modules():
        if type(module) not in SWAPS and type(module) not in KEPT:
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise UnsupportedModelError(f"{name} is a {kind}, which is not understood; expected {_expected(name)}")
        if isinstance(getattr(module, "weight", None), Tensor) and "weight" not in module._parameters:
            reason = "is computed in each pass, as a pruned or normalised one; expected a parameter"
            raise UnsupportedModelError(f"{name}.weight {reason}")
        swap = SWAPS.get(type(module))
        parts = getattr(swap, "parts", None)
        for child_name, child in module.named_children() if parts else ():
            if child_name not in parts and type(child) not in INERT:
                path = f"{name}.{child_name}".lstrip(".")
                raise UnsupportedModelError(
                    f"{path} ({type(child).__name__}) is not understood; {type(module).__name__} is expected to have "
                    f"only {', '.join(parts)}"
                )
        if reason := getattr(swap, "refusal", lambda module: None)(module):
            raise UnsupportedModelError(f"{name or type(model).__name__}: {reason}")


def untouched(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that compute something of weights alone, and stay in float with all that is in them."""
    for module in model.modules():
        for name in getattr(SWAPS.get(type(module)), "untouched", ()):
            yield from getattr(module, name).modules()


def _expected(name: str) -> str:
    """What the supported models have in the place of module `name`."""
    place = name.rpartition(".")[2]
    known = {
        "attn": "Attention or WindowAttention",
        "mlp": "Mlp, GluMlp or SwiGLU",
        "patch_embed": "PatchEmbed",
        "rope": "axial, mixed or DINOv3's positions",
    }
    known |= {"norm": "LayerNorm", "norm1": "LayerNorm", "norm2": "LayerNorm", "norm_pre": "LayerNorm"}
    return known.get(place, "Block" if place.isdigit() else "a layer of a plain ViT or Swin")
