"""Quantization toolkits, each by its own calls: a float model and calibration images to a quantized model that runs.

Used by scripts/toolkits.py. The calls are those that docs/toolkits.md prints; what a toolkit chooses by itself is left
as it chooses it. All of them have a scale for each output channel of the weights, ORT's of weights alone one for each
32 of them, too.
"""

import copy
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn

from models.saved import export_onnx
from quant import RECIPES, calibrate, quantize_model
from quant.onnx import INPUT
from quant.recipes import Recipe
from scripts.runtimes import Bits, FloatModel, Program
from scripts.vendors_torch import apply_gptq, apply_learned_round, quantize_brevitas, quantize_torchao

Quantize = Callable[[FloatModel, Tensor, Path, Bits], tuple[Program, list[Path]]]
EIGHT = ((8, 8),)
FOUR = (*EIGHT, (4, 8), (4, 4))
ANY = (*EIGHT, (4, 8), (6, 6), (4, 4), (3, 3))
WEIGHTS = ((4, 16),)


@dataclass(frozen=True)
class Toolkit:
    """How a toolkit is called.

    Attributes:
        quantize: from a float model, images (N, 3, H, W), a folder and bits, to what the runtime opens and the files,
            in that folder, that one deploys; none if the toolkit only simulates.
        runtime: of RUNTIMES, what computes.
        packages: distributions that it needs, by the modules that they bring.
        bits: of weights and activations, what it can do; 16 is float.
    """

    quantize: Quantize
    runtime: str
    packages: dict[str, str] = field(default_factory=dict)
    bits: tuple[Bits, ...] = EIGHT

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [package for module, package in self.packages.items() if find_spec(module) is None]

    def versions(self) -> str:
        """The versions of its packages and of torch and timm, as a text."""
        names = dict.fromkeys([*self.packages.values(), "torch", "timm"])
        return ", ".join(f"{name} {version(name)}" for name in names)


def quantize_ours(
    source: FloatModel, images: Tensor, folder: Path, bits: Bits, recipe: Recipe
) -> tuple[Path, list[Path]]:
    """This project: calibrated, and exported to ONNX."""
    quantized = calibrate(quantize_model(copy.deepcopy(source.model), *bits, recipe=recipe), images)
    export_onnx(folder / "int8.onnx", quantized, source.name)
    return folder / "int8.onnx", [folder / "int8.onnx"]


def simulate_ours(
    source: FloatModel, images: Tensor, folder: Path, bits: Bits, recipe: Recipe
) -> tuple[nn.Module, list[Path]]:
    """This project: calibrated, and simulated."""
    return calibrate(quantize_model(copy.deepcopy(source.model), *bits, recipe=recipe), images), []


def quantize_onnxruntime(source: FloatModel, images: Tensor, folder: Path, bits: Bits) -> tuple[Path, list[Path]]:
    """ONNX Runtime's own static quantizer: min-max."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(images.numpy())

        def get_next(self) -> dict | None:
            image = next(self.images, None)
            return None if image is None else {INPUT: image[None]}

    weights, activations = {8: QuantType.QInt8, 4: QuantType.QInt4}, {8: QuantType.QUInt8, 4: QuantType.QUInt4}
    path, types = folder / "int8.onnx", {"weight_type": weights[bits[0]], "activation_type": activations[bits[1]]}
    quantize_static(source.onnx, path, Images(), quant_format=QuantFormat.QDQ, per_channel=True, **types)
    return path, [path]


def compress_onnxruntime(source: FloatModel, images: Tensor, folder: Path, bits: Bits) -> tuple[Path, list[Path]]:
    """ONNX Runtime's rounding of the weights of products to 4 bits, which looks at no image."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source.onnx), bits=bits[0], block_size=32, is_symmetric=True)
    quantizer.process()
    path = folder / "int4.onnx"
    quantizer.model.save_model_to_file(str(path))
    return path, [path]


def quantize_nncf(
    source: FloatModel, images: Tensor, folder: Path, bits: Bits, smooth_quant: bool
) -> tuple[Path, list[Path]]:
    """NNCF, for OpenVINO: as it comes, or with its SmoothQuant switched off. It knows 4 bits of NPUs alone."""
    import nncf
    import openvino
    from nncf.quantization.advanced_parameters import QuantizationParameters

    nncf.set_log_level(logging.ERROR)
    weights, activations = (QuantizationParameters(num_bits=bit) for bit in bits)
    advanced = nncf.AdvancedQuantizationParameters(
        weights_quantization_params=weights, activations_quantization_params=activations
    )
    if not smooth_quant:
        advanced.smooth_quant_alphas = nncf.AdvancedSmoothQuantParameters(matmul=-1)
    quantized = nncf.quantize(
        openvino.Core().read_model(source.onnx),
        nncf.Dataset([image[None] for image in images.numpy()]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
        preset=nncf.QuantizationPreset.PERFORMANCE if bits[1] == 4 else None,  # no zero points
        target_device=nncf.TargetDevice.ANY if bits == (8, 8) else nncf.TargetDevice.NPU,
        advanced_parameters=advanced,
    )
    return save_openvino(quantized, folder)


def compress_nncf(source: FloatModel, images: Tensor, folder: Path, bits: Bits) -> tuple[Path, list[Path]]:
    """NNCF's rounding of the weights of products to 4 bits, with scales that suit the images."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    how = {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": -1, "scale_estimation": True}
    how |= {"dataset": nncf.Dataset([image[None] for image in images.numpy()]), "subset_size": len(images)}
    # OpenVINO gives the thread that it is loaded in a stack for signals, and here frees it and leaves it set: the next
    # signal that is handled, such as that of a process's end, would end this process. So it is a thread that ends.
    with ThreadPoolExecutor(1) as thread:
        compressed = thread.submit(nncf.compress_weights, openvino.Core().read_model(source.onnx), **how).result()
    return save_openvino(compressed, folder)


def save_openvino(model: object, folder: Path) -> tuple[Path, list[Path]]:
    """An OpenVINO model as its two files."""
    import openvino

    path = folder / "quantized.xml"
    openvino.save_model(model, path)
    return path, [path, path.with_suffix(".bin")]


OURS, BEST = (partial(quantize_ours, recipe=RECIPES[name]) for name in ("paper", "best"))
BEST_SYMMETRIC = partial(quantize_ours, recipe=RECIPES["best"].without_zero_points())
# What torchao and Brevitas leave in float: the products of activations with each other
ATTENTION = ("*.act_query", "*.act_key", "*.act_probs", "*.act_value")
BEST_LAYERS = replace(RECIPES["best"], points=tuple(p for p in RECIPES["best"].points if p not in ATTENTION))
NNCF, NNCF_NO_SMOOTHQUANT = (partial(quantize_nncf, smooth_quant=smooth) for smooth in (True, False))
GPTQ = partial(quantize_brevitas, improve=apply_gptq)
LEARNED_ROUND = partial(quantize_brevitas, improve=apply_learned_round)
_ORT = {"onnxruntime": "onnxruntime", "onnx": "onnx", "onnxscript": "onnxscript"}
_OPENVINO = {"openvino": "openvino", "onnx": "onnx", "onnxscript": "onnxscript"}
_NNCF = {"nncf": "nncf", **_OPENVINO}
_BREVITAS = {"brevitas": "brevitas"}
TOOLKITS = {
    "ours": Toolkit(OURS, "onnxruntime", _ORT),
    "ours-best": Toolkit(BEST, "onnxruntime", _ORT),
    "ours-best-symmetric": Toolkit(BEST_SYMMETRIC, "onnxruntime", _ORT),
    "ours-best-layers": Toolkit(partial(simulate_ours, recipe=BEST_LAYERS), "simulation", bits=ANY),
    "ort": Toolkit(quantize_onnxruntime, "onnxruntime", _ORT, FOUR),
    "ort-weights": Toolkit(compress_onnxruntime, "onnxruntime", _ORT, WEIGHTS),
    "ours-openvino": Toolkit(OURS, "openvino", _OPENVINO),
    "ours-best-openvino": Toolkit(BEST, "openvino", _OPENVINO),
    "ours-best-symmetric-openvino": Toolkit(BEST_SYMMETRIC, "openvino", _OPENVINO),
    "nncf": Toolkit(NNCF, "openvino", _NNCF, FOUR),
    "nncf-no-smoothquant": Toolkit(NNCF_NO_SMOOTHQUANT, "openvino", _NNCF, FOUR),
    "nncf-weights": Toolkit(compress_nncf, "openvino", _NNCF, WEIGHTS),
    "torchao": Toolkit(quantize_torchao, "torch", {"torchao": "torchao"}, ANY),
    "brevitas": Toolkit(quantize_brevitas, "simulation", _BREVITAS, ANY),
    "brevitas-gptq": Toolkit(GPTQ, "simulation", _BREVITAS, ANY),
    "brevitas-learned-round": Toolkit(LEARNED_ROUND, "simulation", {**_BREVITAS, "accelerate": "accelerate"}, ANY),
}
