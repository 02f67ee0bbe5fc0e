"""Runtimes: what opens a float model, or what a toolkit made of it, and predicts. Used by scripts/toolkits.py."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quant.onnx import INPUT
from scripts.evaluate_onnx import open_session

Predict = Callable[[Tensor], Tensor]  # from images (B, 3, H, W) to logits (B, classes)
Program = Path | nn.Module  # what a runtime opens
Bits = tuple[int, int]  # of weights and of activations


@dataclass(frozen=True)
class FloatModel:
    """A model, and the ONNX file of it that every toolkit for ONNX starts from."""

    name: str
    model: nn.Module
    onnx: Path


def open_onnxruntime(path: Path, threads: int) -> Predict:
    """A file for ONNX Runtime."""
    session = open_session(path, threads)
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def open_openvino(path: Path, threads: int) -> Predict:
    """A file for OpenVINO. What is in float is computed in float32: on some processors it would take bfloat16."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda images: torch.from_numpy(compiled(images.numpy())[0].copy())


def open_torch(model: nn.Module, threads: int) -> Predict:
    """A module as it is."""
    torch.set_num_threads(threads)
    return torch.inference_mode()(model)


def open_inductor(model: nn.Module, threads: int) -> Predict:
    """A module compiled with its weights as constants, without which Inductor does not multiply integers."""
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return open_torch(torch.compile(model), threads)


# By name: what computes accuracies, and what computes latencies. A simulation's would say nothing.
RUNTIMES: dict[str, Callable[[Program, int], Predict]] = {
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
    "torch": open_torch,
    "simulation": open_torch,
}
FAST = {**RUNTIMES, "torch": open_inductor}
del FAST["simulation"]
