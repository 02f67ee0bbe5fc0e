import dataclasses

import pytest
import torch
from families import FAMILIES, build

from generate_data import GenerationSettings, generate_data, generation_settings
from models import build_model
from utils.attention import attention_outputs, frozen
from utils.losses import loss_terms, try_out
from utils.options import parse_generation
from utils.run.precision import (
    LARGE,
    PRECISIONS,
    default_precision,
    float32_products,
    model_products,
    model_weights,
)


def flags():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("before", [("highest", False), ("medium", True)], ids=["strict", "loose"])
@pytest.mark.parametrize("tf32", [False, True], ids=["fp32", "tf32"])
def test_products_are_as_asked_and_the_flags_are_put_back(monkeypatch, before, tf32):
    original = flags()
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    try:
        with pytest.raises(KeyError), float32_products(tf32):
            assert flags() == (("high", True) if tf32 else ("highest", False))
            raise KeyError
        assert flags() == before
    finally:
        torch.set_float32_matmul_precision(original[0])
        torch.backends.cudnn.allow_tf32 = original[1]


def test_bf16_rounds_products_and_the_others_do_not():
    weight, x = torch.randn(8, 8), torch.randn(8, 8)
    results = {}
    for precision in PRECISIONS:
        with model_products(precision, x.device):
            results[precision] = x @ weight
    assert results["bf16"].dtype == torch.bfloat16
    assert torch.equal(results["fp32"], x @ weight) and torch.equal(results["tf32"], x @ weight)


def test_images_are_finite_and_losses_float32_in_every_precision(model, monkeypatch):
    """The terms of the first step are about the same; a CPU has no TF32."""
    before, terms = flags(), {}
    for precision in PRECISIONS:
        settings = dataclasses.replace(GenerationSettings(steps=3), precision=precision)
        losses: list[list[float]] = []
        images = generate_data(model, 2, settings=settings, progress=False, losses=losses)
        assert images.isfinite().all() and images.dtype == torch.float32
        terms[precision] = torch.tensor(losses)
        assert flags() == before and not torch.is_autocast_enabled("cpu")
    assert torch.equal(terms["fp32"], terms["tf32"])
    assert not torch.equal(terms["fp32"][0], terms["bf16"][0])
    torch.testing.assert_close(terms["bf16"][0], terms["fp32"][0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_rounded_once_give_what_those_rounded_in_each_pass_give(family):
    model = build(family)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    arguments = torch.randn(2, 3, 32, 32), torch.tensor([0, 0]), torch.tensor(100.0)
    with frozen(model), attention_outputs(model) as outputs:
        terms = loss_terms(model, outputs, "bf16")
        expected = try_out(terms, *arguments)
        with pytest.raises(KeyError), model_weights(model, "bf16"):
            assert sum(weight.dtype == torch.bfloat16 for weight in model.parameters()) > 10
            assert torch.equal(try_out(terms, *arguments), expected)
            raise KeyError
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_weights_of_other_precisions_are_the_models_own(model, precision):
    with model_weights(model, precision):
        assert all(weight.dtype == torch.float32 for weight in model.parameters())


class Sized(torch.nn.Module):
    """A model of so many parameters, which take no memory."""

    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(size, device="meta"))


@pytest.mark.parametrize(
    ("capabilities", "size", "expected"),
    [
        ({"avx512_bf16": True}, LARGE, "bf16"),
        ({"amx_bf16": True}, LARGE, "bf16"),
        ({"avx512_bf16": True}, LARGE - 1, "fp32"),
        ({"avx512_bf16": False, "avx512_f": True}, LARGE, "fp32"),
        ({}, LARGE, "fp32"),
    ],
)
def test_a_cpu_computes_large_models_in_bf16_where_it_has_it(monkeypatch, capabilities, size, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert default_precision(torch.device("cpu"), Sized(size)) == expected


def test_a_torch_that_does_not_tell_computes_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert default_precision(torch.device("cpu"), Sized(LARGE)) == "fp32"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("options", [[], ["--compile"]], ids=["default", "compile"])
def test_steps_are_compiled_where_that_is_asked_for(device, options):
    parsed = parse_generation(["--model", "demo_vit", "--precision", "fp32", *options])
    assert generation_settings(parsed, torch.device(device), Sized(LARGE)).compile is bool(options)


@pytest.mark.parametrize("name", ["demo_vit", "demo_swin", "cifar_vit", "cifar_swin"])
def test_the_small_models_stay_float32_on_every_cpu(name):
    assert default_precision(torch.device("cpu"), build_model(name, pretrained=False)) == "fp32"
