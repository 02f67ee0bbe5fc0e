import copy

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.utils import prune

from quant import (
    UnsupportedModelError,
    activation_ranges,
    calibrate,
    check_calibrated,
    check_supported,
    quantize_model,
    quantizer_bits,
)
from quant.families import ROOTS
from quant.modules import QuantizedWeight, named_activations
from quant.quantizers import fake_quantize_
from quant.recipes import BEST, PAPER

MODELS = {"vit_model": VisionTransformer, "swin_model": SwinTransformer}


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)], ids="w{0[0]}a{0[1]}".format)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_equal_golden(golden, name, bits):
    data = golden(name)
    model = MODELS[name](**data["arch"]).eval()
    model.load_state_dict({key[3:]: value for key, value in data.items() if key.startswith("sd/")})
    torch.testing.assert_close(model(data["test"]), data["fp_logits"], rtol=0, atol=1e-4)

    calibrate(quantize_model(model, *bits), data["calib"])
    expected = data["w{}a{}_logits".format(*bits)]
    noise = (expected - data["fp_logits"]).square().mean().sqrt()
    assert (model(data["test"]) - expected).square().mean().sqrt() < 0.05 * noise


@pytest.mark.parametrize("name", MODELS)
def test_ranges_equal_golden(golden, name):
    """As many quantizers as the published model has, with the same ranges; only the names differ."""
    data = golden(name)
    model = MODELS[name](**data["arch"]).eval()
    model.load_state_dict({key[3:]: value for key, value in data.items() if key.startswith("sd/")})
    ranges = activation_ranges(calibrate(quantize_model(model), data["calib"]))
    ours, theirs = sorted(ranges.values()), sorted(map(tuple, data["act_ranges"].values()))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_quantized_model_overwrites_neither_images_nor_parameters(model):
    images = torch.randn(3, 3, 32, 32)
    calibrate(quantize_model(model), images)
    before = [tensor.clone() for tensor in (images, *model.state_dict().values())]
    logits = model(images)
    after = [images, *model.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(model(images), logits)


def test_a_quantized_model_still_has_a_gradient(model):
    """Rounding has none, but what is quantized in place must not hide what autograd has kept."""
    images = torch.randn(3, 3, 32, 32)
    calibrate(quantize_model(model), images)
    model(images).sum().backward()
    assert model.head.bias.grad.isfinite().all() if hasattr(model.head, "bias") else model.head.fc.bias.grad is not None


@torch.no_grad()
def test_swapped_model_is_the_float_model_until_calibrated(model):
    images, names = torch.randn(3, 3, 32, 32), list(model.state_dict())
    expected = model(images)
    assert quantize_model(model, 4, 4) is model
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-4)
    with pytest.raises(RuntimeError, match="not calibrated"):
        check_calibrated(model)
    calibrate(model, images)
    check_calibrated(model)
    assert not torch.allclose(model(images), expected, atol=1e-3)
    assert list(model.state_dict()) == names


@torch.no_grad()
def test_sixteen_bits_are_float(model):
    images = torch.randn(3, 3, 32, 32)
    expected = model(images)
    calibrate(quantize_model(model, 16, 16), images)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-4)


def test_ranges_do_not_depend_on_the_calibration_batch_size(model):
    images, other = torch.randn(5, 3, 32, 32), copy.deepcopy(model)
    whole = activation_ranges(calibrate(quantize_model(model), images, batch_size=5))
    parts = activation_ranges(calibrate(quantize_model(other), images, batch_size=2))
    assert whole.keys() == parts.keys()
    torch.testing.assert_close(torch.tensor(list(whole.values())), torch.tensor(list(parts.values())))


def test_calibration_leaves_no_observer_on(model):
    calibrate(quantize_model(model), torch.randn(2, 3, 32, 32))
    before = activation_ranges(model)
    with torch.no_grad():
        model(100 * torch.randn(2, 3, 32, 32))
    assert activation_ranges(model) == before


def test_calibrating_twice_or_unswapped_is_refused(model):
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(RuntimeError, match="quantize_model"):
        calibrate(model, images)
    calibrate(quantize_model(model), images)
    with pytest.raises(RuntimeError, match="not calibrated before"):
        calibrate(model, images)


def test_calibration_names_what_is_not_finite(model):
    quantize_model(model)
    model.get_parameter("head.bias" if hasattr(model, "cls_token") else "head.fc.bias").data[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"head\.(fc\.)?act_output"):
        calibrate(model, torch.randn(2, 3, 32, 32))
    with pytest.raises(RuntimeError, match="not calibrated"):
        check_calibrated(model)


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 32])
def test_bits_out_of_range_are_refused(vit, bits):
    with pytest.raises(ValueError, match=rf"w_bit: expected 2 to 8.*got {bits}"):
        quantize_model(vit, w_bit=bits)
    with pytest.raises(ValueError, match=rf"a_bit: expected 2 to 8.*got {bits}"):
        quantize_model(vit, a_bit=bits)


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "deit_base_distilled_patch16_224",
        "deit_base_patch16_384",
        "deit3_large_patch16_384",
        "vit_small_patch16_224",
        "vit_base_patch32_clip_quickgelu_224",
        "vit_betwixt_patch16_reg4_gap_256",
        "vit_so150m_patch16_reg4_map_256",
        "swin_base_patch4_window7_224",
        "swin_large_patch4_window12_384",
        "swin_s3_base_224",
    ],
)
def test_models_of_timm_are_swapped_whole(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        quantize_model(model)
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert layers and all(isinstance(layer, QuantizedWeight) for layer in layers)


UNSUPPORTED = {
    "resnet18": "expected a timm VisionTransformer,.*got ResNet",
    "cait_xxs24_224": "Cait",
    "vit_base_r26_s32_224": "patch_embed.*HybridEmbed.*expected PatchEmbed",
    "vit_base_patch16_xp_224": r"blocks\.0 is a .*ParallelScalingBlock.*expected Block",
    "xcit_nano_12_p16_224": "Xcit",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_models_that_are_not_understood_are_refused_by_name(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    types = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match=UNSUPPORTED[name]):
        quantize_model(model)
    assert [type(module) for module in model.modules()] == types  # never quantized in part


@pytest.mark.parametrize(
    "option", [{"act_layer": nn.Tanh}, {"mlp_layer": type("OtherMlp", (timm.layers.Mlp,), {})}], ids=str
)
def test_unknown_parts_of_a_known_model_are_refused(option):
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, **option)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.mlp"):
        check_supported(model)


def test_a_vit_that_has_neither_class_token_nor_pooling_is_refused():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "global_pool": "avg"}
    model = VisionTransformer(class_token=False, **options)
    model.global_pool = "token"
    with pytest.raises(UnsupportedModelError, match="expected a class token, or pooling"):
        check_supported(model)


def test_a_weight_that_is_computed_in_each_pass_is_refused(vit):
    prune.l1_unstructured(vit.blocks[0].mlp.fc1, "weight", 0.3)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.mlp\.fc1\.weight is computed in each pass"):
        quantize_model(vit)


def test_a_subclass_is_not_taken_for_its_parent(vit):
    class Attention(type(vit.blocks[0].attn)):
        pass

    vit.blocks[1].attn.__class__ = Attention
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.attn"):
        check_supported(vit)


@torch.no_grad()
def test_skipped_quantizers_stay_float(model):
    quantize_model(model, 4, 4, skip=["*fc1.weight", "*.act_scores"])
    images, weight = torch.randn(4, 3, 32, 32), dict(model.named_parameters())
    before = {name: value.clone() for name, value in weight.items()}
    calibrate(model, images)
    for name in quantizer_bits(model):
        skipped = name.endswith(("fc1.weight", ".act_scores"))
        if name.endswith(".weight"):
            assert torch.equal(weight[name], before[name]) == skipped, name
        else:
            assert (model.get_submodule(name).scale is None) == skipped, name


@torch.no_grad()
def test_skipping_everything_is_the_float_model(model):
    images = torch.randn(4, 3, 32, 32)
    expected = model(images)
    calibrate(quantize_model(model, 2, 2, skip=["*"]), images)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-4)


def test_a_pattern_that_matches_nothing_is_refused(vit):
    with pytest.raises(ValueError, match=r"'blocks\.9\.\*' matches no quantizer; there are patch_embed"):
        quantize_model(vit, skip=["blocks.9.*"])
    assert type(vit) in ROOTS  # it was not swapped
    with pytest.raises(ValueError, match="expected a list of patterns; got the string"):
        quantize_model(vit, skip="*.act_scores")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_precision_than_float32_is_refused(vit, dtype):
    with pytest.raises(UnsupportedModelError, match=rf"cls_token is {dtype}; expected torch.float32"):
        quantize_model(vit.to(dtype))


@pytest.mark.parametrize("recipe", [PAPER, BEST])
def test_what_ends_calibration_early_leaves_the_model_uncalibrated(vit, recipe):
    images = torch.randn(4, 3, 32, 32)
    model = quantize_model(vit, 3, 3, recipe=recipe)

    def interrupt(student):
        student.step(0)
        raise KeyboardInterrupt

    if recipe is PAPER:  # in the second batch
        calls = iter([None])
        hook = model.head.register_forward_hook(lambda *_: next(calls))
        with pytest.raises(StopIteration):
            calibrate(model, images, batch_size=2)
        hook.remove()
    else:
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, images, learn=interrupt)
    with pytest.raises(RuntimeError, match="not calibrated"):
        check_calibrated(model)
    check_calibrated(calibrate(model, images))
    assert all(act.scale is not None and act.kernel is fake_quantize_ for _, act in named_activations(model))


def test_a_single_logit_is_left_in_float(vit):
    """All its values may lie to one side of zero."""
    vit.reset_classifier(1)
    vit.head.bias.data.fill_(-20.0)
    images = torch.randn(8, 3, 32, 32)
    expected = vit(images)
    assert (calibrate(quantize_model(vit), images)(images) - expected).abs().max() < 1


def test_recipes_that_need_gradients_are_refused_in_inference_mode(vit):
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        calibrate(quantize_model(copy.deepcopy(vit)), images)
        with pytest.raises(RuntimeError, match="recipe best needs gradients"):
            calibrate(quantize_model(vit, recipe=BEST), images)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_images_give_finite_scales_and_logits(model, value):
    images = torch.full((3, 3, 32, 32), value)
    calibrate(quantize_model(model, 4, 4), images)
    scales = [buffer for name, buffer in model.named_buffers() if name.endswith(("scale", "zero_point"))]
    assert scales and all(scale.isfinite().all() for scale in scales)
    assert all((buffer > 0).all() for name, buffer in model.named_buffers() if name.endswith("scale"))
    assert model(images).isfinite().all() and model(torch.randn(2, 3, 32, 32)).isfinite().all()
