"""Quantization toolkits, each by its own calls: a float model and calibration images to an int8 model that runs.

Used by scripts/toolkits.py. The calls are those that docs/toolkits.md prints; what a toolkit chooses by itself is left
as it chooses it. All of them have int8 weights with a scale for each output channel, and 8-bit activations.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from models.saved import export_onnx
from quant import RECIPES, calibrate, quantize_model
from quant.onnx import INPUT
from quant.recipes import Recipe
from scripts.evaluate_onnx import open_session

Predict = Callable[[Tensor], Tensor]  # from images (B, 3, H, W) to logits (B, classes)


@dataclass(frozen=True)
class FloatModel:
    """A model, and the ONNX file of it that every toolkit for ONNX starts from."""

    name: str
    model: nn.Module
    onnx: Path


Program = Path | nn.Module  # what a runtime opens
Quantize = Callable[[FloatModel, Tensor, Path], tuple[Program, list[Path]]]


@dataclass(frozen=True)
class Toolkit:
    """How a toolkit is called.

    Attributes:
        quantize: from a float model, images (N, 3, H, W) and a folder, to what the runtime opens and the files, in
            that folder, that one deploys; none if the toolkit only simulates.
        runtime: of RUNTIMES, what computes.
        packages: distributions that it needs, by the modules that they bring.
    """

    quantize: Quantize
    runtime: str
    packages: dict[str, str] = field(default_factory=dict)

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [package for module, package in self.packages.items() if find_spec(module) is None]

    def versions(self) -> str:
        """The versions of its packages and of torch and timm, as a text."""
        names = dict.fromkeys([*self.packages.values(), "torch", "timm"])
        return ", ".join(f"{name} {version(name)}" for name in names)


def quantize_ours(source: FloatModel, images: Tensor, folder: Path, recipe: Recipe) -> tuple[Path, list[Path]]:
    """This project: calibrated, and exported to ONNX."""
    quantized = calibrate(quantize_model(copy.deepcopy(source.model), recipe=recipe), images)
    export_onnx(folder / "int8.onnx", quantized, source.name)
    return folder / "int8.onnx", [folder / "int8.onnx"]


def quantize_onnxruntime(source: FloatModel, images: Tensor, folder: Path) -> tuple[Path, list[Path]]:
    """ONNX Runtime's own static quantizer: min-max."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(images.numpy())

        def get_next(self) -> dict | None:
            image = next(self.images, None)
            return None if image is None else {INPUT: image[None]}

    path, types = folder / "int8.onnx", {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(source.onnx, path, Images(), quant_format=QuantFormat.QDQ, per_channel=True, **types)
    return path, [path]


def quantize_nncf(source: FloatModel, images: Tensor, folder: Path, smooth_quant: bool) -> tuple[Path, list[Path]]:
    """NNCF, for OpenVINO: as it comes, or with its SmoothQuant switched off."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    off = nncf.AdvancedQuantizationParameters(smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1))
    quantized = nncf.quantize(
        openvino.Core().read_model(source.onnx),
        nncf.Dataset([image[None] for image in images.numpy()]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
        advanced_parameters=None if smooth_quant else off,
    )
    path = folder / "int8.xml"
    openvino.save_model(quantized, path)
    return path, [path, path.with_suffix(".bin")]


def quantize_torchao(source: FloatModel, images: Tensor, folder: Path) -> tuple[nn.Module, list[Path]]:
    """Torchao's PT2E for x86: compiled by Inductor, or computed operator by operator."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    example, any_batch = (images[:2].clone(),), ({0: torch.export.Dim("batch")},)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(source.model, example, dynamic_shapes=any_batch).module(), quantizer)
    with torch.no_grad():
        prepared(images)
    converted = convert_pt2e(prepared)
    path = folder / "int8.pt2"
    torch.export.save(torch.export.export(converted, example, dynamic_shapes=any_batch), path)
    return converted, [path]


def quantize_brevitas(source: FloatModel, images: Tensor, folder: Path) -> tuple[nn.Module, list[Path]]:
    """Brevitas' post-training flow, layer by layer, which simulates."""
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
    from brevitas_examples.imagenet_classification.ptq.ptq_common import quantize_model

    quantized = quantize_model(
        copy.deepcopy(source.model),
        backend="layerwise",
        device="cpu",
        dtype=torch.float32,
        quant_format="int",
        scale_factor_type="float_scale",
        weight_bit_width=8,
        weight_param_method="stats",
        weight_quant_type="sym",
        weight_quant_granularity="per_channel",
        act_bit_width=8,
        act_param_method="stats",
        act_quant_percentile=99.999,
        act_quant_type="asym",
        act_quant_granularity="per_tensor",
        uint_sym_act_for_unsigned_values=True,
        layerwise_first_last_bit_width=8,
        bias_bit_width=None,
    )
    with torch.no_grad():
        with calibration_mode(quantized):
            quantized(images)
        with bias_correction_mode(quantized):
            quantized(images)
    return quantized, []


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

OURS, BEST = (partial(quantize_ours, recipe=RECIPES[name]) for name in ("paper", "best"))
BEST_SYMMETRIC = partial(quantize_ours, recipe=replace(RECIPES["best"], symmetric=True))
_ORT = {"onnxruntime": "onnxruntime", "onnx": "onnx", "onnxscript": "onnxscript"}
_OPENVINO = {"openvino": "openvino", "onnx": "onnx", "onnxscript": "onnxscript"}
_NNCF = {"nncf": "nncf", **_OPENVINO}
TOOLKITS = {
    "ours": Toolkit(OURS, "onnxruntime", _ORT),
    "ours-best": Toolkit(BEST, "onnxruntime", _ORT),
    "ours-best-symmetric": Toolkit(BEST_SYMMETRIC, "onnxruntime", _ORT),
    "ort": Toolkit(quantize_onnxruntime, "onnxruntime", _ORT),
    "ours-openvino": Toolkit(OURS, "openvino", _OPENVINO),
    "ours-best-openvino": Toolkit(BEST, "openvino", _OPENVINO),
    "ours-best-symmetric-openvino": Toolkit(BEST_SYMMETRIC, "openvino", _OPENVINO),
    "nncf": Toolkit(partial(quantize_nncf, smooth_quant=True), "openvino", _NNCF),
    "nncf-no-smoothquant": Toolkit(partial(quantize_nncf, smooth_quant=False), "openvino", _NNCF),
    "torchao": Toolkit(quantize_torchao, "torch", {"torchao": "torchao"}),
    "brevitas": Toolkit(quantize_brevitas, "simulation", {"brevitas": "brevitas"}),
}
