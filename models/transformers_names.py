"""Weights of Hugging Face's transformers under timm's names.

Only names differ, and what is one tensor in timm and several in transformers: query, key and value.
"""

import re

import torch

from models.source import State

# Applied in this order, each to what the one before has left.
RENAMES = [
    (r"^(vit|deit|dinov2|dinov2_with_registers|beit|swin|swinv2|vision_model)\.", ""),
    # Embeddings
    (r"^embeddings\.patch_embeddings\.projection\.|^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.", ""),
    # Blocks: of Swin in layers, of all others in one row
    (r"^encoder\.layers\.(\d+)\.(blocks|downsample)\.", r"layers.\1.\2."),
    (r"^encoder\.layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.output\.dense\.|\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.attention\.(attention|self)\.|\.self_attn\.", ".attn."),
    (r"\.attn\.(query|q_proj)\.", ".attn.q."),
    (r"\.attn\.(key|k_proj)\.", ".attn.k."),
    (r"\.attn\.(value|v_proj)\.", ".attn.v."),
    (r"\.attn\.relative_position_bias\.", ".attn."),
    (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
    (r"\.continuous_position_bias_mlp\.", ".cpb_mlp."),
    (r"\.layernorm_before\.|\.layer_norm1\.", ".norm1."),
    (r"\.layernorm_after\.|\.layer_norm2\.", ".norm2."),
    (r"\.intermediate\.dense\.|\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.output\.dense\.|\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_(\d)$", r".gamma_\1"),
    # Pooling and classifiers
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.attention\.in_proj_", "attn_pool.qkv."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.", "attn_pool."),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^(post_)?layernorm\.", "norm."),
    (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
]
# What timm has not: training's masks, a pooled output's own layer, texts, and what is computed from the sizes.
DROPPED = r"mask_token$|pooler\.dense\.|text_model\.|logit_(scale|bias)$|.*relative_(position_index|coords_table)$"


def convert_state(config: dict, state: State) -> State:
    """Weights under timm's names.

    Args:
        config: of transformers, as in config.json.
        state: as in its file of weights; names that are not known stay, for the loader to refuse.
    """
    renamed = {_rename(name): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in renamed.items() if not re.match(DROPPED, name)}
    kind = config["model_type"]
    join_attention(state, bias_apart=kind in ("beit", "swinv2"))
    if kind == "deit" and "head_dist.weight" not in state and "dist_token" in state:
        state["reg_token"] = state.pop("dist_token")  # a token that no classifier reads
    if kind == "dinov2_with_registers" and {"pos_embed", "cls_token"} <= set(state):  # in timm the prefix has none
        position = state["pos_embed"]
        state |= {"cls_token": state["cls_token"] + position[:, :1], "pos_embed": position[:, 1:]}
    if kind.startswith("siglip"):
        if "pos_embed" in state:
            state["pos_embed"] = state["pos_embed"].unsqueeze(0)  # (1, N, D)
        if "head.weight" in state:  # the classifier reads the mean of all tokens
            state = {name: tensor for name, tensor in state.items() if not name.startswith("attn_pool.")}
    return {_place(name) if kind in ("swin", "swinv2") else name: tensor for name, tensor in state.items()}


def join_attention(state: State, bias_apart: bool) -> None:
    """Make one tensor of each layer's query, key and value, and two of an attention pooling's; in place.

    Args:
        bias_apart: keys have no bias, and the others' are q_bias and v_bias.
    """
    for name in [name for name in state if re.search(r"\.attn\.q\.(weight|bias)$", name)]:
        layer, part = name.rsplit(".q.", 1)
        apart = bias_apart and part == "bias"
        parts = [f"{layer}.{which}.{part}" for which in ("qv" if apart else "qkv")]
        if not all(part in state for part in parts):
            continue  # the loader tells what is missing
        tensors = [state.pop(part) for part in parts]
        if apart:
            state[f"{layer}.q_bias"], state[f"{layer}.v_bias"] = tensors
        else:
            state[f"{layer}.qkv.{part}"] = torch.cat(tensors)
    for part in ("weight", "bias"):
        if (joined := state.pop(f"attn_pool.qkv.{part}", None)) is not None:
            query, *rest = joined.chunk(3)
            state |= {f"attn_pool.q.{part}": query, f"attn_pool.kv.{part}": torch.cat(rest)}


def _rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _place(name: str) -> str:
    """Swin's classifier has another name, and timm merges patches at the start of a stage, not at its end."""
    name = re.sub(r"^head\.", "head.fc.", name)
    return re.sub(r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample", name)
