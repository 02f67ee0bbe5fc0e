import torch

from quant.modules import QuantAct, QuantLinear
from quant.quantizers import quantize_weight


def calibrated(bits, *observed):
    act = QuantAct(bits)
    act.observing = True
    for x in observed:
        act(x)
    act.observing = False
    act.freeze()
    return act


def test_uncalibrated_quantizer_passes_values_through():
    act, x = QuantAct(8), torch.randn(4)
    assert act.scale is None and act.low is None
    assert act(x) is x
    assert act.low is None  # nothing is recorded outside calibration


def test_range_is_the_smallest_and_largest_value_of_all_batches():
    act = calibrated(8, torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 3.0]))
    assert (act.low.item(), act.high.item()) == (-1.0, 3.0)


def test_frozen_quantizer_has_few_values_and_clamps():
    act = calibrated(2, torch.linspace(0, 3, 10))
    assert sorted(set(act(torch.linspace(-5, 9, 99)).tolist())) == [0.0, 1.0, 2.0, 3.0]


def test_sixteen_bits_stay_float_but_record_the_range():
    act, x = calibrated(16, torch.tensor([-1.0, 2.0])), torch.randn(4)
    assert act(x) is x and act.high.item() == 2.0


def test_state_dict_has_no_quantizer_entries():
    act = calibrated(8, torch.randn(4))
    assert not act.state_dict()


def test_frozen_layer_multiplies_with_the_quantized_weight():
    layer = torch.nn.Linear(6, 3)
    expected, _ = quantize_weight(layer.weight.data, 4)
    layer.__class__, layer.w_bit, layer.act_output = QuantLinear, 4, torch.nn.Identity()
    layer.freeze()
    x = torch.randn(2, 6)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, expected, layer.bias))
    integers = layer.weight / layer.weight_scale
    torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-4)
