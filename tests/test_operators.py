"""The two operators, and modules that compute with them in a copy of a model."""

import pytest
import torch

from quant import calibrate, quantize_model
from quant.modules import named_activations
from quant.operators import OnnxAct, dequantize, prepare, quantize
from quant.quantizers import fake_quantize_, unsigned_grid
from quant.recipes import INPUTS

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_activations_saturate_at_the_grid(bits):
    x = torch.linspace(-3, 4, 5000)
    act = calibrated_act(bits, x / 2)
    codes = act.quantize(x)
    assert codes.min() == 0 and codes.max() == 2**bits - 1
    expected = fake_quantize_(x.clone(), act.scale, act.zero_point.float(), unsigned_grid(bits))
    assert ((act.dequantize(codes) - expected).abs() <= 1.01 * act.scale).all()  # a tie may fall to the other side
    assert (act.dequantize(codes) != expected).float().mean() < 0.01


def calibrated_act(bits, x):
    act = OnnxAct(bits)
    act.observe(x)
    act.freeze()
    act.prepare()
    return act


def test_operators_round_as_onnx_defines_them():
    """Half to even before the zero point is added, which is where the simulation differs: it gives 2, 2, 4, 4."""
    x, scale, zero = torch.tensor([0.5, 1.5, 2.5, 3.5, 300.0, -9.0]), torch.tensor(1.0), torch.tensor(1).to(torch.uint8)
    codes = quantize(x, scale, zero)
    assert codes.tolist() == [1, 3, 3, 5, 255, 0]
    assert dequantize(codes, scale, zero, 0).tolist() == [0, 2, 2, 4, 254, -1]


def test_model_is_left_as_it_is(model):
    simulated = calibrate(quantize_model(model), IMAGES)
    before = {name: value.clone() for name, value in simulated.state_dict().items()}
    kinds, logits = [type(module) for module in simulated.modules()], simulated(IMAGES)
    prepare(simulated)
    assert kinds == [type(module) for module in simulated.modules()]
    assert all(torch.equal(value, before[name]) for name, value in simulated.state_dict().items())
    assert torch.equal(simulated(IMAGES), logits)
    assert all(act.zero_point.dtype == torch.float32 for _, act in named_activations(simulated))


@torch.no_grad()
@pytest.mark.parametrize("width", [0, 1000], ids=["wide", "narrow"])
def test_queries_keys_and_values_are_those_of_the_simulation(vit, width, monkeypatch):
    monkeypatch.setattr("quant.operators.OnnxAttention.wide", width)
    simulated = calibrate(quantize_model(vit, recipe=INPUTS), IMAGES).blocks[0].attn
    prepared = prepare(vit).blocks[0].attn
    x = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(2))
    expected = simulated.split_heads(x)
    factors = simulated.scale, 1.0, 1.0  # 1 / sqrt(d) is in the scale of the queries
    for part, other, factor in zip(prepared.split_heads(x), expected, factors, strict=True):
        assert (part - other * factor).abs().mean() < 1e-3 * other.abs().mean() * factor
