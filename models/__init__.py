"""Where models come from: names, weights, and the preprocessing that belongs to them."""

from models.zoo import (
    DEMO_MODELS,
    build_model,
    class_names,
    data_config,
    evaluation_transform,
    model_notes,
    model_tag,
    normalization,
    resized_size,
    short_name,
)

__all__ = [
    "DEMO_MODELS",
    "build_model",
    "class_names",
    "data_config",
    "evaluation_transform",
    "model_notes",
    "model_tag",
    "normalization",
    "resized_size",
    "short_name",
]
