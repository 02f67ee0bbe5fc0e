"""How precisely a model's own matrix products are computed: float32, TF32 or bfloat16."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

PRECISIONS = ("fp32", "tf32", "bf16")
LARGE = 5_000_000  # parameters; deit_tiny has 5.7 million. Of models of one million some gain by bf16, and some lose


@contextmanager
def float32_products(tf32: bool = False) -> Iterator[None]:
    """Within the context products and convolutions of float32 tensors are float32's, or TF32's where that exists."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


def model_products(precision: str, device: torch.device) -> torch.autocast | nullcontext:
    """The context for a model's forward pass: bfloat16 products where asked for; softmax and norms sum in float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def model_weights(model: nn.Module, precision: str) -> Iterator[None]:
    """Within the context the weights of products and convolutions are what `model_products` would make of them.

    Left to it, those that ask for no gradient would be rounded anew in each pass.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    weights = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
    kept = [(weight, weight.data) for weight in weights] if precision == "bf16" else []
    try:
        for weight, data in kept:
            weight.data = data.bfloat16()
        yield
    finally:
        for weight, data in kept:
            weight.data = data


def default_precision(device: torch.device, model: nn.Module) -> str:
    """What is fast for a model on a device without a loss of accuracy, else fp32.

    That is bf16 on a GPU that has it, and on a CPU that has it for a model of LARGE parameters or more.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and is_large(model) and native_bf16() else "fp32"


def is_large(model: nn.Module) -> bool:
    """Whether a model has LARGE parameters or more."""
    return sum(parameter.numel() for parameter in model.parameters()) >= LARGE


def native_bf16() -> bool:
    """Whether the CPU itself multiplies bfloat16, as oneDNN uses it: elsewhere it is emulated, and slow."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
