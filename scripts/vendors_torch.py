"""The calls of the toolkits that quantize a torch model: torchao and Brevitas. Used by scripts/vendors.py."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from scripts.runtimes import Bits, FloatModel

Loader = list[tuple[Tensor, None]]  # batches and their labels, which no toolkit reads


def quantize_torchao(source: FloatModel, images: Tensor, folder: Path, bits: Bits) -> tuple[nn.Module, list[Path]]:
    """Torchao's PT2E for x86: compiled by Inductor, or computed operator by operator. Fewer bits are kept in int8."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    (w_bit, a_bit), config = bits, x86.get_default_x86_inductor_quantization_config()
    activation = replace(config.input_activation, quant_max=2**a_bit - 1)
    weight = replace(config.weight, quant_min=-(2 ** (w_bit - 1)), quant_max=2 ** (w_bit - 1) - 1)
    config = replace(config, input_activation=activation, output_activation=activation, weight=weight)
    example, any_batch = (images[:2].clone(),), ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(source.model, example, dynamic_shapes=any_batch)
    prepared = prepare_pt2e(exported.module(), x86.X86InductorQuantizer().set_global(config))
    with torch.no_grad():
        prepared(images)
    converted = convert_pt2e(prepared)
    path = folder / "int8.pt2"
    torch.export.save(torch.export.export(converted, example, dynamic_shapes=any_batch), path)
    return converted, [path]


def quantize_brevitas(
    source: FloatModel,
    images: Tensor,
    folder: Path,
    bits: Bits,
    improve: Callable[[nn.Module, Loader], None] | None = None,
) -> tuple[nn.Module, list[Path]]:
    """Brevitas' post-training flow, layer by layer, which simulates; `improve` changes the rounding of the weights."""
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
    from brevitas_examples.imagenet_classification.ptq.ptq_common import quantize_model

    quantized = quantize_model(
        copy.deepcopy(source.model),
        backend="layerwise",
        device="cpu",
        dtype=torch.float32,
        quant_format="int",
        scale_factor_type="float_scale",
        weight_bit_width=bits[0],
        weight_param_method="stats",
        weight_quant_type="sym",
        weight_quant_granularity="per_channel",
        act_bit_width=bits[1],
        act_param_method="stats",
        act_quant_percentile=99.999,
        act_quant_type="asym",
        act_quant_granularity="per_tensor",
        uint_sym_act_for_unsigned_values=True,
        layerwise_first_last_bit_width=8,
        bias_bit_width=None,
    )
    with torch.no_grad():
        quantized(images)  # without which the scales of the weights are not there yet
        with calibration_mode(quantized):
            quantized(images)
    if improve:
        improve(quantized, [(images, None)])
    # A layer without bias would get one of a wrong shape where images are (B, H, W, C), as in Swin
    with torch.no_grad(), bias_correction_mode(quantized, skip_if_no_bias=True):
        quantized(images)
    return quantized, []


def apply_gptq(model: nn.Module, loader: Loader) -> None:
    """GPTQ as the example of Brevitas calls it, with the order of columns that did best in its own tables."""
    from brevitas_examples.imagenet_classification.ptq import ptq_common

    ptq_common.apply_gptq(loader, model, act_order=True, create_weight_orig=True)


def apply_learned_round(model: nn.Module, loader: Loader) -> None:
    """Learned rounding as the example of Brevitas calls it: its defaults, 1,000 steps a layer."""
    from brevitas_examples.imagenet_classification.ptq import learned_round_utils
    from brevitas_examples.imagenet_classification.ptq.ptq_imagenet_args import create_args_parser

    torch.manual_seed(0)  # of the order of the images
    settings = create_args_parser().parse_args(["--learned-round", "hard_sigmoid"])
    learned_round_utils.apply_learned_round(model, loader, settings)
