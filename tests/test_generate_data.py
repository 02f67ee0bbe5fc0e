import dataclasses

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import generate_data as generation
from generate_data import GenerationSettings, draw_labels, generate_data, learning_rate_factor
from models import normalization
from quant import calibrate, quantize_model
from utils.attention import attention_outputs
from utils.entropy import patch_similarity_entropy, total_variation

QUICK = GenerationSettings(steps=5)


def test_learning_rates_equal_golden(golden):
    expected = golden("losses")["lr_0.2_warmup100_of_500"]
    rates = [0.2 * learning_rate_factor(step, GenerationSettings()) for step in range(500)]
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), expected, rtol=0, atol=1e-9)


def test_images_are_normalised_and_of_the_models_size(model):
    images = generate_data(model, num_images=3, settings=QUICK, progress=False)
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.float32 and not images.requires_grad
    mean, std = normalization(model)
    pixels = images * std + mean
    assert pixels.min() >= -1e-5 and pixels.max() <= 1 + 1e-5


def test_valid_range_equals_golden(golden, vit):
    data = golden("losses")
    mean, std = normalization(vit)
    torch.testing.assert_close(data["clip_in"].clamp(-mean / std, (1 - mean) / std), data["clip_out"])


def test_same_seed_gives_the_same_images_whatever_ran_before(model):
    first = generate_data(model, 2, seed=3, settings=QUICK, progress=False)
    torch.manual_seed(99)
    torch.randn(7)
    again = generate_data(model, 2, seed=3, settings=QUICK, progress=False)
    other = generate_data(model, 2, seed=4, settings=QUICK, progress=False)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_global_random_state_is_left_alone(vit):
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    generate_data(vit, 2, settings=QUICK, progress=False)
    assert torch.equal(torch.randn(3), expected)


def test_batches_have_losses_of_their_own(vit):
    settings = dataclasses.replace(QUICK, batch_size=2)
    five = generate_data(vit, 5, settings=settings, progress=False)
    four = generate_data(vit, 4, settings=settings, progress=False)
    assert five.shape[0] == 5
    assert torch.equal(five[:4], four)


def test_model_is_left_as_it_was(model):
    model.train()
    model.head.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    generate_data(model, 2, settings=QUICK, progress=False)
    assert model.training and [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_optimisation_raises_entropy_and_approaches_the_labels(vit):
    """The loss falls on the images as they stand, unshifted: patches spread out, classes are met."""
    settings = GenerationSettings(steps=40)
    images = generate_data(vit, 4, settings=settings, progress=False)
    noise = generate_data(vit, 4, settings=GenerationSettings(steps=1, rounds=1, learning_rate=0.0), progress=False)
    labels = draw_labels(4, 10)

    def losses(x):
        with torch.no_grad(), attention_outputs(vit) as outputs:
            logits = vit(x)
        return sum(patch_similarity_entropy(f, 4) for f in outputs), torch.nn.functional.cross_entropy(logits, labels)

    (entropy, cross_entropy), (entropy_before, cross_entropy_before) = losses(images), losses(noise)
    assert entropy > entropy_before and cross_entropy < cross_entropy_before
    assert total_variation(images) < total_variation(noise)


def test_a_term_that_is_not_finite_stops_with_its_name(vit):
    vit.head.bias.data[:] = float("nan")
    with pytest.raises(FloatingPointError, match="L_OH became nan at step 1;"):
        generate_data(vit, 2, settings=QUICK, progress=False)


def test_a_quantized_model_is_refused(vit):
    calibrate(quantize_model(vit), torch.randn(2, 3, 32, 32))
    with pytest.raises(TypeError, match="expects a float model"):
        generate_data(vit, 2, settings=QUICK, progress=False)


def test_tv_target_and_jitter_scale_with_size(vit, monkeypatch):
    """32x32 pixels: offsets up to 2, then 4; two images: the published target times sqrt(2 * 32^2 / (32 * 224^2))."""
    offsets, losses = [], []
    roll = torch.Tensor.roll
    monkeypatch.setattr(torch.Tensor, "roll", lambda x, shift, dims: offsets.append(shift) or roll(x, shift, dims))
    monkeypatch.setattr(generation, "total_variation", lambda x: 0 * x.sum())
    generate_data(vit, 2, settings=GenerationSettings(steps=60), progress=False, losses=losses)
    assert len(losses) == 120
    assert all(down == right for down, right in offsets)
    assert {down for down, _ in offsets[:60]} == set(range(-2, 3))
    assert {down for down, _ in offsets[60:]} == set(range(-4, 5))
    scale = (2 * 32 * 32 / (32 * 224 * 224)) ** 0.5
    assert 2500 * scale <= losses[0][2] <= 3000 * scale


def test_command_line_writes_images_and_a_picture(tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "images.safetensors"
    arguments = ["--model", "demo_vit", "--num-images", "3", "--steps", "2", "--output", str(output), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["generate_data.py", *arguments])
    generation.main()
    tensors = load_file(output)
    assert tensors["images"].shape == (3, 3, 64, 64) and tensors["labels"].shape == (3,)
    assert Image.open(output.with_suffix(".png")).width > 3 * 64
    assert str(output) in capsys.readouterr().out
    assert sorted(path.name for path in output.parent.iterdir()) == ["images.png", "images.safetensors"]
