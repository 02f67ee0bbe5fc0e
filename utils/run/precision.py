"""How precisely a model's own matrix products are computed: float32, TF32 or bfloat16."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

PRECISIONS = ("fp32", "tf32", "bf16")


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
    """The context for a model's forward pass: bfloat16 products where asked for; softmax and norms stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def default_precision(device: torch.device) -> str:
    """What is fast on a device without a loss of accuracy: bf16 on a GPU that has it, else fp32."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp32"
