import dataclasses
import functools
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

import generate_data as generation
from generate_data import GenerationSettings, draw_labels, generate_data, learning_rate_factor
from models import build_model, normalization
from quant import calibrate, quantize_model
from quant.recipes import BEST
from utils import losses as generation_losses
from utils.attention import attention_outputs
from utils.entropy import patch_similarity_entropy
from utils.losses import total_variation
from utils.options import parse_generation
from utils.run.errors import InputError, exit_cleanly

ROOT = Path(generation.__file__).parent
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


@pytest.mark.parametrize(("precision", "fused"), [("fp32", True), ("bf16", False)])
def test_attention_is_fused_on_a_cpu_in_float32_only(vit, precision, fused):
    attention, seen = vit.blocks[0].attn, set()
    attention.fused_attn = True
    attention.register_forward_pre_hook(lambda layer, inputs: seen.add(layer.fused_attn))
    generate_data(vit, 2, settings=GenerationSettings(steps=1, precision=precision), progress=False)
    assert seen == {fused} and attention.fused_attn


def test_valid_range_equals_golden(golden, vit):
    data = golden("losses")
    mean, std = normalization(vit)
    torch.testing.assert_close(data["clip_in"].clamp(-mean / std, (1 - mean) / std), data["clip_out"])


def test_half_of_all_steps_see_the_images_flipped(vit):
    batch = generation.Batch(vit, None, draw_labels(2, 10), 0, 0, QUICK)
    seen = [batch.augment(0) for _ in range(200)]
    flipped = sum(torch.equal(images, batch.images.flip(3)) for images in seen)
    unflipped = sum(torch.equal(images, batch.images) for images in seen)
    assert flipped + unflipped == 200 and 70 < flipped < 130  # 100, give or take four standard deviations


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
    model.patch_embed.eval()
    modes = [module.training for module in model.modules()]
    model.head.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    generate_data(model, 2, settings=QUICK, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_images_are_the_same_in_inference_mode(vit):
    expected = generate_data(vit, 2, settings=QUICK, progress=False)
    with torch.inference_mode():
        assert torch.equal(generate_data(vit, 2, settings=QUICK, progress=False), expected)


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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38], ids=["nan", "inf", "-inf", "overflow"])
@pytest.mark.parametrize(
    ("parameter", "term", "layer"),
    [
        ("head.bias", "L_OH", "head"),
        ("blocks.1.mlp.fc1.weight", "L_OH", r"blocks\.1\.mlp\.fc[12]"),
        ("blocks.0.attn.qkv.weight", "L_PSE", r"blocks\.0\.attn\.(qkv|proj)"),
        ("patch_embed.proj.bias", "L_PSE", r"patch_embed\.proj|blocks\.0\.norm1"),
    ],
    ids=["head", "mlp", "attention", "embedding"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_that_are_not_finite_stop_with_the_term_and_the_layer(
    vit, tmp_path, precision, value, parameter, term, layer
):
    vit.get_parameter(parameter).data[:] = value
    if parameter == "head.bias" and value == 1e38:
        pytest.skip("the same for all classes, and finite")
    message = rf"^{term} became (nan|-?inf) at step 1; expected finite losses; ({layer}) is the first layer that is not"
    with pytest.raises(FloatingPointError, match=message):
        generate_data(vit, 2, settings=dataclasses.replace(QUICK, precision=precision), progress=False, state=tmp_path)
    assert load_file(tmp_path / "batch-0.safetensors")["images"].isfinite().all()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("at", [7, 10, 14])
def test_a_step_that_is_not_finite_leaves_the_last_good_state(vit, tmp_path, monkeypatch, at, where):
    expected = generate_data(vit, 2, settings=GenerationSettings(steps=10), progress=False)
    variation, left = generation_losses.total_variation, [at]

    def once(images):
        left[0] -= 1
        value = variation(images)
        if left[0] or where == "loss":
            return value * (1 if left[0] else math.inf)
        value.register_hook(lambda gradient: gradient * math.nan)
        return value

    monkeypatch.setattr(generation_losses, "total_variation", once)
    what = {"loss": "L_TV became inf", "gradient": "the gradient became nan"}[where]
    message = f"{what} at step {at}; .*; all layers were finite before"
    with pytest.raises(FloatingPointError, match=f"{message}.*the state of step {at - 1 - (at - 1) % 10} is in"):
        generate_data(vit, 2, settings=GenerationSettings(steps=10), progress=False, state=tmp_path)
    resumed = generate_data(vit, 2, settings=GenerationSettings(steps=10), progress=False, state=tmp_path)
    assert torch.equal(resumed, expected)


def test_a_model_that_is_not_finite_ends_the_command_line_with_two(tmp_path, monkeypatch, capsys):
    weights = load_file(ROOT / "models" / "demo_vit.safetensors")
    weights["blocks.0.mlp.fc2.bias"][0] = math.nan
    save_file(weights, tmp_path / "nan.safetensors")
    line = ["--model", "demo_vit", "--checkpoint", tmp_path / "nan.safetensors", "--num-images", 2, "--device", "cpu"]
    line += ["--output", tmp_path / "images.safetensors"]
    monkeypatch.setattr("sys.argv", ["generate_data.py", *map(str, line)])
    with pytest.raises(SystemExit) as caught:
        exit_cleanly(generation.main)
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: L_PSE became nan at step 1; ") and "blocks.0.mlp.fc2 is the first layer" in last


@pytest.mark.parametrize(
    ("error", "reason"),
    [(RuntimeError("no C++\nat all"), "no C++"), (ImportError("no Triton"), "no Triton"), (KeyError, "KeyError")],
)
def test_where_compilation_fails_a_line_says_so_and_the_images_are_the_same(vit, monkeypatch, capsys, error, reason):
    def fail(graph, inputs, **options):
        raise error

    expected = generate_data(vit, 2, settings=QUICK, progress=False)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fail))
    images = generate_data(vit, 2, settings=dataclasses.replace(QUICK, compile=True), progress=False)
    assert torch.equal(images, expected)
    assert capsys.readouterr().err.splitlines() == [f"torch.compile failed; going on without it ({reason})"]


def test_batches_share_what_is_compiled(vit, monkeypatch):
    """More batches than torch.compile would compile one function anew for."""
    graphs = []

    def count(graph, inputs, **options):
        graphs.append(graph)
        return graph

    settings = GenerationSettings(steps=1, batch_size=2)
    expected = generate_data(vit, 21, settings=settings, progress=False)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    torch.compiler.reset()
    images = generate_data(vit, 21, settings=dataclasses.replace(settings, compile=True), progress=False)
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)
    assert 2 <= len(graphs) <= 4  # for two images, for one, and of images that are results of an operation


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_compiled_images_equal_eager(capsys):
    """The gradient of a compiled convolution lies in memory in an order of its own, which fused Adam does not see."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=10)
    eager, fast = [], []
    expected = generate_data(model, 2, settings=QUICK, progress=False, losses=eager)
    settings = dataclasses.replace(QUICK, compile=True)
    images = generate_data(model, 2, settings=settings, progress=False, losses=fast)
    assert not capsys.readouterr().err  # nor did it go on without being compiled
    torch.testing.assert_close(torch.tensor(fast), torch.tensor(eager), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)


def test_a_deterministic_run_and_its_repetition_give_the_same_bytes(tmp_path):
    """In processes of their own, for the option lasts as long as the process."""
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    line = ["--model", "demo_vit", "--num-images", "2", "--steps", "2", "--device", "cpu", "--deterministic"]
    command = [sys.executable, "generate_data.py", *line, "--output"]
    processes = [subprocess.Popen([*command, str(file)], cwd=ROOT, stderr=subprocess.PIPE) for file in files]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].with_suffix(".png").read_bytes() == files[1].with_suffix(".png").read_bytes()


def test_a_quantized_model_is_refused(vit):
    calibrate(quantize_model(vit), torch.randn(2, 3, 32, 32))
    with pytest.raises(TypeError, match="expects a float model"):
        generate_data(vit, 2, settings=QUICK, progress=False)


def test_tv_target_and_jitter_scale_with_size(vit, monkeypatch):
    """32x32 pixels: offsets up to 2, then 4; two images: the published target times sqrt(2 * 32^2 / (32 * 224^2))."""
    offsets, losses = [], []
    roll = torch.Tensor.roll
    monkeypatch.setattr(torch.Tensor, "roll", lambda x, shift, dims: offsets.append(shift) or roll(x, shift, dims))
    monkeypatch.setattr(generation_losses, "total_variation", lambda x: 0 * x.sum())
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


def test_contrast_writes_what_the_best_recipe_calibrates_on(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("quant.convert.fit", lambda model, images, batch_size: seen.append(images))
    line = ["--model", "demo_vit", "--steps", "1", "--num-images", "5", "--output"]
    files = [tmp_path / f"{name}.safetensors" for name in ("plain", "contrast")]
    for file, more in zip(files, ([], ["--contrast"]), strict=True):
        generation.run(parse_generation([*line, str(file), *more]))
    plain, contrast = map(load_file, files)
    calibrate(quantize_model(build_model("demo_vit"), recipe=dataclasses.replace(BEST, rotate=False)), plain["images"])
    torch.testing.assert_close(contrast["images"], seen[0], rtol=0, atol=1e-6)
    assert contrast["labels"].tolist() == [*plain["labels"].tolist(), *plain["labels"][[0, 4]].tolist()]


@pytest.mark.parametrize("output", ["calib.npy", "calib"], ids=["array", "folder"])
def test_images_for_other_tools(tmp_path, capsys, output):
    line = ["--model", "demo_swin", "--num-images", "2", "--steps", "1", "--device", "cpu", "--output"]
    generation.run(parse_generation([*line, str(tmp_path / output)]))
    assert str(tmp_path / output) in capsys.readouterr().out
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")]
    if output == "calib":
        labels = draw_labels(2, 50).tolist()
        assert sorted(files) == sorted(Path(f"calib/{label:05d}/{n:05d}.png") for n, label in enumerate(labels))
        with pytest.raises(InputError, match="expected a folder that is not there yet"):
            generation.run(parse_generation([*line, str(tmp_path / output)]))
    else:
        assert sorted(map(str, files)) == ["calib.npy", "calib.png"]


def test_an_output_of_another_kind_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "build_model", lambda *arguments: pytest.fail("builds the model"))
    with pytest.raises(InputError, match=r"--output: expected a name that ends in \.safetensors or \.npy"):
        generation.run(parse_generation(["--model", "demo_vit", "--output", str(tmp_path / "a.png")]))
