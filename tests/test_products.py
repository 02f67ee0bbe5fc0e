import pytest
import torch
from families import FAMILIES, build

from quant.families import ATTENTION
from utils.attention import attention_outputs, frozen
from utils.losses import loss_terms, try_out
from utils.products import attention_by_products, fast_products, patches_by_products


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
