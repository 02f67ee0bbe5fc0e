import oracle
import pytest
import torch

from quant.quantizers import asymmetric_scale, fake_quantize_, quantize_weight, symmetric_scale, unsigned_grid

BITS = (2, 3, 4, 6, 8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_weights_equal_golden(golden, name, bits):
    data = golden("quantizers")
    quantized, _ = quantize_weight(data[name], bits)
    torch.testing.assert_close(quantized, data[f"weight_{name}_{bits}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["mixed", "positive", "negative"])
def test_activations_equal_golden(golden, name, bits):
    data = golden("quantizers")
    x = data[name]
    scale, zero_point = asymmetric_scale(x.min(), x.max(), bits)
    quantized = fake_quantize_(x.clone(), scale, zero_point, unsigned_grid(bits))
    torch.testing.assert_close(quantized, data[f"act_{name}_{bits}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (4, 3, 2, 2)], ids=str)
def test_equal_oracle_on_random_shapes(shape, bits):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    assert torch.equal(quantize_weight(weight, bits)[0], oracle.quantize_weight(weight, bits))
    x = 3 * weight + 1
    low, high = x.min() - 0.1, x.max() - 0.2
    quantized = fake_quantize_(x.clone(), *asymmetric_scale(low, high, bits), unsigned_grid(bits))
    assert torch.equal(quantized, oracle.quantize_activation(x, low, high, bits))


def test_scale_divides_by_half_the_number_of_steps():
    weight = torch.tensor([[-2.0, 1.0], [0.5, 4.0]])
    torch.testing.assert_close(symmetric_scale(weight, 8), torch.tensor([[2 / 127.5], [4 / 127.5]]))


def test_rounding_adds_the_zero_point_before_rounding():
    # -0.5 and 0.5 lie half-way; round to even of x + 1 gives 0 and 2, where 1 + round(x) would give 1 and 1.
    x = torch.tensor([-0.5, 0.5])
    assert fake_quantize_(x.clone(), torch.tensor(1.0), torch.tensor(1.0), (0, 255)).tolist() == [-1.0, 1.0]


def test_constant_tensors_have_finite_scales():
    zeros = torch.zeros(3, 4)
    quantized, scale = quantize_weight(zeros, 4)
    assert torch.equal(quantized, zeros) and (scale > 0).all()
    for value in (0.0, 5.0, -5.0):
        low = high = torch.tensor(value)
        scale, zero_point = asymmetric_scale(low, high, 8)
        assert scale.isfinite() and zero_point.isfinite()
        assert fake_quantize_(low.clone(), scale, zero_point, unsigned_grid(8)).isfinite()


def test_input_is_overwritten_and_weights_are_not():
    x = torch.randn(5)
    assert fake_quantize_(x, torch.tensor(0.1), torch.tensor(3.0), (0, 15)) is x
    weight = torch.randn(3, 4)
    before = weight.clone()
    quantize_weight(weight, 4)
    assert torch.equal(weight, before)
