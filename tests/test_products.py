import pytest
import torch
from families import FAMILIES, build

from quant import calibrate, quantize_model
from quant.families import ATTENTION
from utils.attention import attention_outputs, frozen
from utils.losses import loss_terms, try_out
from utils.products import attention_by_products, fast_products, linears_by_onednn, onednn_is_fast, patches_by_products


def test_attention_by_products_gives_the_same_and_is_undone(vit):
    images = torch.randn(2, 3, 32, 32)
    layers = [module for module in vit.modules() if isinstance(module, ATTENTION)]
    for layer in layers:
        layer.fused_attn = True
    expected = vit(images)
    with pytest.raises(KeyError), attention_by_products(vit):
        assert layers and not any(layer.fused_attn for layer in layers)
        torch.testing.assert_close(vit(images), expected)
        raise KeyError
    assert all(layer.fused_attn for layer in layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gives_the_same_faster_and_all_is_undone(family):
    model = build(family)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    arguments = torch.randn(2, 3, 32, 32), torch.tensor([0, 0]), torch.tensor(100.0)
    with frozen(model), attention_outputs(model) as outputs:
        terms = loss_terms(model, outputs, "fp32")
        expected = try_out(terms, *arguments)
        with pytest.raises(KeyError), fast_products(model, "fp32"):
            assert "forward" in vars(model.patch_embed.proj)
            found = try_out(terms, *arguments)
            assert (found - expected).norm() < 1e-3 * expected.norm()
            raise KeyError
    assert all(vars(module).keys() == before[name].keys() for name, module in model.named_modules())


@pytest.mark.parametrize("kernel", [4, (2, 4), (5, 3)], ids=str)  # the last leaves a row and two columns unread
@pytest.mark.parametrize("bias", [True, False])
def test_patches_by_products_are_those_of_the_convolution(kernel, bias):
    layer = torch.nn.Conv2d(3, 8, kernel, kernel, bias=bias)
    images = torch.randn(2, 3, 16, 20, requires_grad=True)
    expected = layer(images)
    slope = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(expected, images, slope)
    with patches_by_products(torch.nn.Sequential(layer)):
        found = layer(images)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, images, slope)[0], gradient)
        assert found.flatten(2).transpose(1, 2).is_contiguous()  # the tokens, without a copy


@pytest.mark.parametrize(
    "options",
    [{"padding": 1}, {"padding": "valid"}, {"stride": 2}, {"dilation": 2}, {"groups": 3}],
    ids=lambda options: next(iter(options)),
)
def test_other_convolutions_stay(options):
    layer = torch.nn.Conv2d(3, 6, 4, **{"stride": 4, **options})
    with patches_by_products(torch.nn.Sequential(layer)):
        assert "forward" not in vars(layer)


ONEDNN = pytest.mark.skipif(not onednn_is_fast(), reason="of CPUs with AVX-512")


@ONEDNN
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 4, 24)], ids=str)
def test_linears_by_onednn_give_the_same_and_are_undone(shape, bias):
    layer = torch.nn.Linear(24, 40, bias=bias).requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    expected = layer(x)
    slope = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(expected, x, slope)
    with pytest.raises(KeyError), linears_by_onednn(torch.nn.Sequential(layer)):
        found = layer(x)
        assert "OneDnn" in type(found.grad_fn).__name__
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, x, slope.expand_as(found))[0], gradient)
        torch.testing.assert_close(layer(x.detach().repeat_interleave(2, -1)[..., ::2]), expected)  # with strides
        raise KeyError
    assert "forward" not in vars(layer)


@ONEDNN
def test_quantized_layers_are_onednns_too(vit):
    images = torch.randn(2, 3, 32, 32)
    quantized = calibrate(quantize_model(vit, w_bit=8, a_bit=8), images)
    expected = quantized(images)
    with torch.inference_mode(), linears_by_onednn(quantized):
        assert all("forward" in vars(block.attn.qkv) for block in quantized.blocks)
        error = (quantized(images) - expected).norm() / expected.norm()
    assert error < 1e-2  # some activations are on the border between two integers


@ONEDNN
def test_in_bfloat16_and_while_compiled_linears_are_torchs(vit):
    images = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = vit(images)
        with linears_by_onednn(vit):
            assert torch.equal(vit(images), expected)


@pytest.mark.parametrize("missing", ["torch.backends.mkldnn.is_available", "torch.backends.cpu.get_cpu_capability"])
def test_other_cpus_keep_torchs_products(monkeypatch, missing):
    monkeypatch.setattr(missing, lambda: "")
    layer = torch.nn.Linear(3, 4)
    with linears_by_onednn(torch.nn.Sequential(layer)):
        assert "forward" not in vars(layer)
