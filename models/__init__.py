"""Where models come from: names, weights, and the preprocessing that belongs to them."""

from models.small import DATASETS
from models.zoo import (
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
    "DATASETS",
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
