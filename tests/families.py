"""Small models of every family that is quantized, with the parts that it may have."""

import torch
from conftest import randomize
from timm.layers import SwiGLUPacked
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos

ROW = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
STAGES = {"img_size": 32, "patch_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 10}
ROTARY = {"use_abs_pos_emb": False, "use_rot_pos_emb": True}
FAMILIES = {
    "vit": (VisionTransformer, ROW),
    "distilled": (VisionTransformerDistilled, ROW),
    "vit without positions": (VisionTransformer, ROW | {"pos_embed": "none", "global_pool": "avg"}),
    "vit of any size": (VisionTransformer, ROW | {"dynamic_img_size": True}),
    "vit without classifier": (VisionTransformer, ROW | {"num_classes": 0}),
    "dinov2": (VisionTransformer, ROW | {"init_values": 0.5, "mlp_layer": SwiGLUPacked, "reg_tokens": 2}),
    "siglip": (VisionTransformer, ROW | {"global_pool": "map", "class_token": False, "act_layer": "gelu_tanh"}),
    "siglip without classifier": (VisionTransformer, ROW | {"global_pool": "map", "num_classes": 0}),
    "norms inside": (VisionTransformer, ROW | {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "rms norm": (VisionTransformer, ROW | {"norm_layer": "rmsnorm", "qk_norm": True}),
    "post-norm": (VisionTransformer, ROW | {"block_fn": ResPostBlock}),
    "parallel": (VisionTransformer, ROW | {"block_fn": ParallelThingsBlock, "init_values": 0.5}),
    "swin": (SwinTransformer, STAGES | {"window_size": 4}),
    "swin v2": (SwinTransformerV2, STAGES | {"window_size": 4}),
    "swin v2, pre-trained on smaller windows": (
        SwinTransformerV2,
        STAGES | {"window_size": 8, "pretrained_window_sizes": (4, 4)},
    ),
    "swin v2, padded windows": (SwinTransformerV2, STAGES | {"window_size": 3}),
    "beit": (Beit, ROW | {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.5}),
    "beit, one bias for all": (Beit, ROW | {"use_shared_rel_pos_bias": True, "swiglu_mlp": True, "scale_mlp": True}),
    "beit, both biases": (Beit, ROW | {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": True}),
    "relative positions": (VisionTransformerRelPos, ROW | {"init_values": 0.5, "fc_norm": True, "rel_pos_dim": 16}),
    "relative positions, one bias for all": (
        VisionTransformerRelPos,
        ROW | {"shared_rel_pos": True, "class_token": True, "global_pool": "token", "qk_norm": True},
    ),
    "relative positions, post-norm": (
        VisionTransformerRelPos,
        ROW | {"block_fn": ResPostRelPosBlock, "rel_pos_type": "bias", "class_token": True},
    ),
    "eva": (Eva, ROW | {"use_fc_norm": True}),
    "eva-02": (
        Eva,
        ROW
        | {"use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False}
        | {"scale_attn_inner": True, "ref_feat_shape": (4, 4)},
    ),
    "eva-02, packed": (Eva, ROW | {"use_rot_pos_emb": True, "swiglu_mlp": True, "init_values": 0.5}),
    "eva, post-norm": (Eva, ROW | {"use_post_norm": True}),
    "dinov3": (
        Eva,
        ROW
        | ROTARY
        | {"rope_type": "dinov3", "rope_rotate_half": True, "num_reg_tokens": 4, "init_values": 0.5}
        | {"dynamic_img_size": True, "swiglu_mlp": True, "swiglu_align_to": 8, "num_classes": 0},
    ),
    "mixed rotation": (Eva, ROW | ROTARY | {"rope_type": "mixed", "no_embed_class": True, "num_reg_tokens": 1}),
    "perception encoder": (
        Eva,
        ROW
        | {"use_rot_pos_emb": True, "attn_type": "rope", "global_pool": "map", "attn_pool_num_heads": 2}
        | {"use_pre_transformer_norm": True, "rope_grid_offset": 1.0},
    ),
    "shared keys": (
        Eva,
        ROW | ROTARY | {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1, "qk_norm": True},
    ),
}


def build(family):
    """A model with random weights, (B, 3, 32, 32) to (B, 10) or, without classifier, (B, 48).

    Weights keep the size of what passes through them, as trained ones do: with timm's first ones hardly anything of
    the image reaches the logits.
    """
    torch.manual_seed(0)
    architecture, options = FAMILIES[family]
    model = randomize(architecture(**options))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel() if parameter.shape[0] > 1 and parameter.ndim != 3 else 4
            parameter.data.normal_(std=fan_in**-0.5)
    return model
