"""A calibrated model as integers and back, and how integers are packed."""

import copy

import pytest
import torch
from torch import nn

from quant import calibrate, quantize_model
from quant.convert import assign_bits, quantizer_bits
from quant.integers import activation_codes, integer_state, load_integer_state, pack, unpack, weight_codes
from quant.modules import QuantAct, QuantLinear
from quant.quantizers import fake_quantize_, signed_grid, symmetric_scale, unsigned_grid

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def quantized(model, w_bit=8, a_bit=8, skip=()):
    return calibrate(quantize_model(copy.deepcopy(model), w_bit, a_bit, skip), IMAGES)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6], ids=lambda size: f"weights about {size:g}")
def test_integer_times_scale_over_scale_is_the_integer_again(bits, size):
    bottom, top = signed_grid(bits)
    layer = QuantLinear(top - bottom + 1, 64)
    layer.weight_scale = symmetric_scale(size * torch.randn(64, 10), bits)  # the first size is at the scale's floor
    integers = torch.arange(bottom, top + 1)
    layer.weight = nn.Parameter(integers * layer.weight_scale)
    assert torch.equal(weight_codes(layer), integers.to(torch.int8).expand(64, -1))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_of_an_activation_stand_for_its_rounded_values(bits):
    act, x = QuantAct(bits), torch.linspace(-3, 4, 5000)
    act.observe(x / 2)  # half of the values saturate
    act.freeze()
    codes = activation_codes(act, x)
    assert codes.dtype == torch.uint8 and codes.unique().tolist() == list(range(2**bits))
    expected = fake_quantize_(x.clone(), act.scale, act.zero_point, unsigned_grid(bits))
    assert torch.equal((codes.float() - act.zero_point) * act.scale, expected)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(6, 4), (5, 3, 1)], ids=["even", "odd"])
@pytest.mark.parametrize("grid", [signed_grid, unsigned_grid], ids=["signed", "unsigned"])
def test_packing_loses_nothing(bits, shape, grid):
    bottom, top = grid(bits)
    signed = grid is signed_grid
    codes = torch.randint(bottom, top + 1, shape).to(torch.int8 if signed else torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() == (codes.numel() if bits > 4 else (codes.numel() + 1) // 2)
    assert torch.equal(unpack(packed, bits, codes.shape, signed), codes.float())


@pytest.mark.parametrize(("w_bit", "a_bit"), [(8, 8), (4, 8), (3, 4), (16, 8), (8, 16)])
def test_a_loaded_model_gives_the_same_logits_bit_for_bit(model, w_bit, a_bit):
    saved = quantized(model, w_bit, a_bit)
    loaded = quantize_model(copy.deepcopy(model), w_bit, a_bit)
    for parameter in loaded.parameters():
        parameter.data.zero_()  # nothing comes from the float weights
    load_integer_state(loaded, integer_state(saved))
    assert torch.equal(loaded(IMAGES), saved(IMAGES))
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value) or "pos_embed" in name or "bias_table" in name


def test_quantizers_left_in_float_stay_so(vit):
    saved = quantized(vit, 4, 8, skip=["blocks.0.*", "act_position"])
    state = integer_state(saved)
    assert torch.equal(state["blocks.0.attn.qkv.weight"], vit.blocks[0].attn.qkv.weight)
    assert torch.equal(state["pos_embed"], vit.pos_embed)
    assert state["blocks.0.norm1.act_output"].shape == (2,) and state["blocks.1.norm1.act_output"].shape == (4,)
    assert "blocks.0.attn.qkv.weight_scale" not in state
    loaded = quantize_model(copy.deepcopy(vit))
    assign_bits(loaded, quantizer_bits(saved))
    assert torch.equal(load_integer_state(loaded, state)(IMAGES), saved(IMAGES))


def test_weights_and_quantized_parameters_are_integers(model):
    state = integer_state(quantized(model, 4, 8))
    floats = {name for name, value in state.items() if value.is_floating_point()}
    assert not any(name.endswith(("pos_embed", "bias_table")) for name in floats)
    assert all(state[name].ndim == 1 for name in floats if name.endswith(".weight"))  # those of norms


def test_an_uncalibrated_model_has_no_integers(vit):
    with pytest.raises(RuntimeError, match="not calibrated"):
        integer_state(quantize_model(vit))


def test_a_state_of_another_model_is_refused(vit, swin):
    with pytest.raises(KeyError):
        load_integer_state(quantize_model(copy.deepcopy(swin)), integer_state(quantized(vit)))
