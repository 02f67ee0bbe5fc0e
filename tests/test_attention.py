import pytest
import torch

from utils.attention import attention_outputs, layer_entropies, where_not_finite


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_attention_outputs_are_softmax_qk_v(vit, fused):
    attention = vit.blocks[1].attn
    attention.fused_attn = fused
    kept = {}
    attention.register_forward_hook(lambda module, inputs, output: kept.update(x=inputs[0], y=output))
    with torch.no_grad(), attention_outputs(vit) as outputs:
        vit(torch.randn(2, 3, 32, 32))
        qkv = attention.qkv(kept["x"]).reshape(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
        expected = torch.softmax(qkv[0] @ qkv[1].transpose(2, 3) / 4, dim=3) @ qkv[2]
    assert len(outputs) == 2
    torch.testing.assert_close(outputs[1], expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_attention_is_refused():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    with pytest.raises(TypeError, match="attention"), attention_outputs(model):
        pass


def test_hooks_are_gone_afterwards(model):
    with pytest.raises(KeyError), attention_outputs(model) as outputs:
        model(torch.randn(2, 3, 32, 32))
        raise KeyError
    count = len(outputs)
    model(torch.randn(2, 3, 32, 32))
    assert len(outputs) == count
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layer_entropies_has_one_value_a_layer(swin):
    entropies = layer_entropies(swin, torch.randn(3, 3, 32, 32))
    assert len(entropies) == 3 and all(isinstance(value, float) for value in entropies)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_the_earliest_layer_that_is_not_finite_is_named(request, name, value):
    model, images = request.getfixturevalue(name), torch.randn(2, 3, 32, 32)
    assert where_not_finite(model, images, "fp32") == "all layers were finite before"
    layers = [layer for layer, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for layer in reversed(layers):  # those after it are not finite either
        model.get_submodule(layer).weight.data[0] = value
        assert where_not_finite(model, images, "fp32") == f"{layer} is the first layer that is not"
    assert not any(module._forward_hooks for module in model.modules())
