"""Quantization of timm's vision transformers: swap layers, calibrate, freeze."""

from quant.convert import (
    activation_ranges,
    calibrate,
    check_calibrated,
    is_calibrated,
    learns,
    quantize_model,
    quantizer_bits,
)
from quant.families import UnsupportedModelError, check_supported
from quant.recipes import RECIPES

__all__ = [
    "RECIPES",
    "UnsupportedModelError",
    "activation_ranges",
    "calibrate",
    "check_calibrated",
    "check_supported",
    "is_calibrated",
    "learns",
    "quantize_model",
    "quantizer_bits",
]
