"""A calibrated model as integers, and back again without a change of a bit.

The state of a model has the names of its float state dict. Weights are integer codes there, and so are parameters that
are quantized as activations; beside them stand name.weight_scale and, by its own name, every activation quantizer.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from quant.convert import check_calibrated
from quant.modules import QuantAct, QuantizedWeight, named_activations, quantized_weights
from quant.quantizers import FLOAT_BITS

# The quantizers whose input is a parameter, with the name of that parameter beside them.
PARAMETERS = {"act_position": "pos_embed", "act_bias": "relative_position_bias_table", "act_latent": "latent"}


def integer_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a calibrated model, by name.

    Returns:
        weights: int8, or packed where they have 4 bits or less; name.weight_scale: (out_channels, 1, ...) float32;
        parameters that are quantized as activations: uint8, int8 if symmetric, or packed; activation quantizers: (4,)
        float32, [low, high, scale, zero point], or (2,) if left in float. All else as it is.

    Raises:
        RuntimeError: the model is not calibrated.
    """
    check_calibrated(model)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    for name, act in named_activations(model):
        values = [value for value in (act.low, act.high, act.scale, act.zero_point) if value is not None]
        state[name] = torch.stack(values).cpu()
    for name, module in quantized_weights(model):
        state[f"{name}.weight"] = pack(weight_codes(module).cpu(), module.w_bit)
        state[f"{name}.weight_scale"] = module.weight_scale.cpu()
    for name, parameter, act in quantized_parameters(model):
        state[name] = pack(activation_codes(act, parameter.detach()).cpu(), act.bits)
    return state


def load_integer_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Calibrate a model from `quantize_model`, of the same bits, with what `integer_state` returned; in place.

    Raises:
        KeyError, ValueError, RuntimeError: the state is not one of this model.
    """
    state = dict(state)
    for name, act in named_activations(model):
        act.low, act.high, *grid = state.pop(name).unbind()
        if act.bits != FLOAT_BITS:
            act.scale, act.zero_point = grid
    for name, module in quantized_weights(model):
        module.weight_scale = state.pop(f"{name}.weight_scale")
        codes = unpack(state[f"{name}.weight"], module.w_bit, module.weight.shape, signed=True)
        state[f"{name}.weight"] = codes * module.weight_scale
    for name, parameter, act in quantized_parameters(model):
        codes = unpack(state[name], act.bits, parameter.shape, signed=act.symmetric)
        state[name] = (codes - act.zero_point) * act.scale
    model.load_state_dict(state)
    return model


def quantized_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, QuantAct]]:
    """Parameters that are quantized as activations, with their names and quantizers."""
    for name, act in named_activations(model):
        owner, _, place = name.rpartition(".")
        if place in PARAMETERS and act.bits != FLOAT_BITS:
            path = f"{owner}.{PARAMETERS[place]}".lstrip(".")
            yield path, model.get_parameter(path), act


def weight_codes(layer: QuantizedWeight) -> Tensor:
    """The integers of a frozen weight, int8. Exact: integer * scale / scale is off by two roundings at most."""
    return (layer.weight.detach() / layer.weight_scale).round().to(torch.int8)


def activation_codes(act: QuantAct, x: Tensor) -> Tensor:
    """The integers that a calibrated quantizer rounds `x` to: uint8, or int8 of a symmetric one."""
    return (act(x.clone()) / act.scale + act.zero_point).round().to(torch.int8 if act.symmetric else torch.uint8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Two codes of 4 bits or less to a byte, the first in the lower half: (ceil(n / 2),) uint8. Others as they are."""
    if bits > 4:
        return codes.contiguous()  # of a model in channels_last they are not
    halves = codes.flatten().view(torch.uint8) & 15
    if len(halves) % 2:
        halves = torch.cat([halves, halves.new_zeros(1)])
    return halves[0::2] | (halves[1::2] << 4)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...], signed: bool) -> Tensor:
    """What `pack` was given, as float32 of `shape`."""
    if bits > 4:
        return packed.float().view(shape)
    halves = torch.stack([packed & 15, packed >> 4], dim=1).flatten()[: shape.numel()].float()
    return (halves - 16 * (halves > 7) if signed else halves).view(shape)
