"""config.json and preprocessor_config.json of Hugging Face's transformers, as timm would have them."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

# What transformers takes where config.json does not say it.
_VIT = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
}
_SWIN = {
    "embed_dim": 96,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "window_size": 7,
    "mlp_ratio": 4.0,
    "image_size": 224,
    "patch_size": 4,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "qkv_bias": True,
    "use_absolute_embeddings": False,
}
_DINOV2 = _VIT | {
    "patch_size": 14,
    "mlp_ratio": 4,
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
}
_BEIT = _VIT | {
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
    "use_mean_pooling": True,
    "layer_scale_init_value": 0.1,
}
_SIGLIP = _VIT | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True}
DEFAULTS = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2 | {"num_register_tokens": 4},
    "beit": _BEIT,
    "swin": _SWIN,
    "swinv2": _SWIN | {"pretrained_window_sizes": (0, 0, 0, 0)},
    "siglip_vision_model": _SIGLIP,
}
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers

# What the models of each type on the hub have in their preprocessor_config.json: (from, to) of resizing and cropping.
_IMAGENET = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
_HALF = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
_CROPPED = {"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": 224}
_SHORTEST = _CROPPED | {"size": {"shortest_edge": 256}}
PREPROCESSORS = {
    "vit": _HALF | {"resample": 2, "size": 224},
    "deit": _IMAGENET | {"resample": 3} | _CROPPED,
    "dinov2": _IMAGENET | {"resample": 3} | _SHORTEST,
    "dinov2_with_registers": _IMAGENET | {"resample": 3} | _SHORTEST,
    "beit": _HALF | {"resample": 2} | _CROPPED,
    "swin": _IMAGENET | {"resample": 3, "size": 224},
    "swinv2": _IMAGENET | {"resample": 3, "size": 256},
    "siglip_vision_model": _HALF | {"resample": 3, "size": 224},
}


def convert_config(config: dict[str, Any], preprocessor: dict[str, Any] | None) -> tuple[str, dict, dict, tuple]:
    """What timm calls the model that config.json describes.

    Args:
        config: as in config.json.
        preprocessor: as in preprocessor_config.json; None for what is usual for models of this type.

    Returns:
        A timm architecture; what differs from its data configuration; what differs from its constructor's arguments,
        and from the epsilon of its norms; and what there is to say.

    Raises:
        ValueError: the model has a part that timm's has not; says what was expected.
    """
    if config["model_type"] == "siglip":
        config = {**config, **config.get("vision_config", {}), "model_type": "siglip_vision_model"}
    kind = config["model_type"]
    if kind not in DEFAULTS:
        raise ValueError(f"expected model_type {', '.join(DEFAULTS)} or siglip; got {kind}")
    task = (config.get("architectures") or [""])[0]
    classifies = "ForImageClassification" in task
    config = {**DEFAULTS[kind], **config}
    architecture, options = (_swin if kind.startswith("swin") else _vit)(kind, task, config)
    options |= {"img_size": config["image_size"], "patch_size": config["patch_size"]}
    options |= {"norm_eps": config["layer_norm_eps"], "num_classes": len(config.get("id2label") or (0, 1)) * classifies}
    _expect(config["num_channels"] == 3, "num_channels 3", config["num_channels"])

    notes = ()
    if preprocessor is None:
        preprocessor = PREPROCESSORS[kind]
        notes = (f"no preprocessor_config.json: images are resized, cropped and normalised as usual for {kind}",)
    settings = preprocessing(preprocessor)
    labels = [label for _, label in sorted((config.get("id2label") or {}).items(), key=lambda item: int(item[0]))]
    if classifies and not all(label == f"LABEL_{index}" for index, label in enumerate(labels)):
        settings["label_names"] = tuple(labels)
    return architecture, settings, options, notes


def preprocessing(config: dict[str, Any]) -> dict[str, Any]:
    """timm's data configuration for a preprocessor_config.json: mean, std, interpolation, crop_pct, crop_mode."""
    scale = config.get("rescale_factor", 1 / 255)
    _expect(config.get("do_rescale", True) and abs(scale * 255 - 1) < 1e-6, "rescale_factor 1/255", scale)
    _expect(config.get("do_resize", True), "do_resize true", False)
    size, resample = config["size"], config.get("resample", 2)
    _expect(resample in range(len(INTERPOLATIONS)), "resample 0 to 5", resample)
    squash = not isinstance(size, dict) or "height" in size
    side = size if not isinstance(size, dict) else size.get("height", size.get("shortest_edge"))
    crop = config.get("crop_size", side) if config.get("do_center_crop", False) else side
    crop = crop["height"] if isinstance(crop, dict) else crop
    _expect(squash or config.get("do_center_crop", False), "do_center_crop true with a shortest_edge", False)
    normalise = config.get("do_normalize", True)
    return {
        "mean": tuple(config["image_mean"]) if normalise else (0.0,) * 3,
        "std": tuple(config["image_std"]) if normalise else (1.0,) * 3,
        "interpolation": INTERPOLATIONS[resample],
        "crop_pct": crop / side,
        "crop_mode": "squash" if squash else "center",
    }


def _vit(kind: str, task: str, config: dict[str, Any]) -> tuple[str, dict]:
    """Architecture and constructor's arguments of a model whose blocks stand in one row."""
    width, act = config["hidden_size"], config["hidden_act"]
    options = {
        "embed_dim": width,
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / width,
        "qkv_bias": config["qkv_bias"],
    }
    if kind == "beit":
        _expect(act == "gelu", "hidden_act gelu", act)
        if config["use_relative_position_bias"] or config["use_shared_relative_position_bias"]:
            _side(config)
        options |= {
            "use_abs_pos_emb": config["use_absolute_position_embeddings"],
            "use_rel_pos_bias": config["use_relative_position_bias"],
            "use_shared_rel_pos_bias": config["use_shared_relative_position_bias"],
            "init_values": config["layer_scale_init_value"],
            "global_pool": "avg" if config["use_mean_pooling"] else "token",
        }
        return "beit_base_patch16_224", options
    _expect(act in ACTIVATIONS, f"hidden_act {', '.join(ACTIVATIONS)}", act)
    options["act_layer"] = ACTIVATIONS[act]
    if kind.startswith("dinov2"):
        if task.endswith("ForImageClassification"):
            raise ValueError(
                f"expected a {kind} without classifier, as transformers' reads the class token and the mean of the "
                f"patches and timm's one of both; got {task}"
            )
        options |= {"init_values": config["layerscale_value"], "mlp_ratio": config["mlp_ratio"]}
        if config["use_swiglu_ffn"]:  # of two thirds of the width, rounded up to a multiple of 8
            hidden = (int(int(width * config["mlp_ratio"]) * 2 / 3) + 7) // 8 * 8
            del options["act_layer"]
            options["mlp_ratio"] = 2 * hidden / width
        registers = "reg4_" if kind == "dinov2_with_registers" else ""
        if registers:
            options["reg_tokens"] = config["num_register_tokens"]
        return f"vit_{'giant' if config['use_swiglu_ffn'] else 'base'}_patch14_{registers}dinov2", options
    if kind == "siglip_vision_model":
        pooled = config["vision_use_head"] and not task.endswith("ForImageClassification")
        options |= {"global_pool": "map"} if pooled else {"global_pool": "avg", "fc_norm": False}
        return "vit_base_patch16_siglip_224", options
    if kind == "deit" and task.endswith("WithTeacher"):
        return "deit_base_distilled_patch16_224", options
    return "vit_base_patch16_224", options | ({"reg_tokens": 1} if kind == "deit" else {})


def _swin(kind: str, task: str, config: dict[str, Any]) -> tuple[str, dict]:
    """Architecture and constructor's arguments of a Swin."""
    _expect(config["hidden_act"] == "gelu", "hidden_act gelu", config["hidden_act"])
    _expect(not config["use_absolute_embeddings"], "use_absolute_embeddings false", True)
    names = ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias")
    options = {name: tuple(value) if isinstance(value := config[name], list) else value for name in names}
    eps = config["layer_norm_eps"]  # transformers leaves that of some norms at torch's
    _expect(eps == 1e-5, "layer_norm_eps 1e-5", eps)
    side, window = _side(config), options["window_size"]
    for stage in range(len(options["depths"])):  # where windows do not fill it, transformers pads before it shifts
        places = side // config["patch_size"] // 2**stage
        filled = places <= window or places % window == 0
        _expect(filled, f"stages of one window or a multiple of window_size {window}", f"{places} in one of them")
    if kind == "swin":
        return "swin_base_patch4_window7_224", options
    sizes = tuple(config["pretrained_window_sizes"])[: len(options["depths"])]
    return "swinv2_base_window8_256", options | {"pretrained_window_sizes": sizes}


def _side(config: dict[str, Any]) -> int:
    """The side of the images of a model whose relative positions timm has as transformers does for squares alone."""
    size = config["image_size"]
    sides = {size} if isinstance(size, int) else set(size)
    _expect(len(sides) == 1, "image_size of a square, with relative positions", size)
    return sides.pop()


def _expect(met: bool, expected: str, got: Any) -> None:
    if not met:
        raise ValueError(f"expected {expected}; got {got}")
