"""The same on a GPU: what a CPU computes, but for the order of sums; and what only a GPU has. Skipped without one."""

import copy
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build
from safetensors.torch import load_file

import generate_data as generation
import test_quant
from generate_data import GenerationSettings, generate_data
from models import build_model
from models.saved import load_quantized, save_quantized
from quant import calibrate, quantize_model
from quant.convert import fit
from quant.learning import Student
from quant.quantizers import asymmetric_scale, fake_quantize_, quantize_weight, unsigned_grid
from quant.recipes import BEST, LEARNED, PAPER
from utils.attention import attention_outputs, frozen
from utils.entropy import patch_similarity_entropy
from utils.learning import learn
from utils.losses import loss_terms, total_variation
from utils.options import parse_generation, parse_run
from utils.run.errors import InputError
from utils.run.precision import PRECISIONS, default_precision, float32_products
from utils.run.replay import replayed
from utils.run.signals import Stopped

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

ROOT = Path(test_quant.__file__).parent
QUICK = GenerationSettings(steps=5)
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def exact_products():
    with float32_products():
        yield


def on_gpu(function, *arguments):
    """What a function of tensors gives on the GPU, back on the CPU."""
    results = function(*(argument.cuda() if torch.is_tensor(argument) else argument for argument in arguments))
    return [result.cpu() for result in results] if isinstance(results, tuple) else results.cpu()


@pytest.mark.parametrize("name", ["vit", "swin"])  # of "narrow" the order of sums decides, which is a CPU's
def test_entropy_and_gradient_equal_golden(golden, name):
    data = golden("losses")
    features = data[f"{name}_attn"].cuda().requires_grad_()
    value = patch_similarity_entropy(features, num_images=4)
    (gradient,) = torch.autograd.grad(value, features)
    for found, expected in ((value, data[f"{name}_entropy"]), (gradient, data[f"{name}_grad"])):
        assert ((found.cpu() - expected).norm() / expected.norm()).item() < 1e-4


def test_total_variation_equals_that_of_a_cpu():
    torch.testing.assert_close(on_gpu(total_variation, IMAGES), total_variation(IMAGES))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_gives_the_bits_of_a_cpu(bits):
    weight = torch.randn(300, 77, generator=torch.Generator().manual_seed(bits))
    for found, expected in zip(on_gpu(quantize_weight, weight, bits), quantize_weight(weight, bits), strict=True):
        assert torch.equal(found, expected)

    def rounded(x):
        return fake_quantize_(x.clone(), *asymmetric_scale(x.min(), x.max(), bits), unsigned_grid(bits))

    assert torch.equal(on_gpu(rounded, weight), rounded(weight))


@pytest.mark.parametrize("recipe", [PAPER, BEST], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_is_calibrated_as_on_a_cpu(family, recipe):
    """As near to the float model: the order of a sum moves values to the next step of a grid, one way or the other."""
    model = build(family)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    expected, errors = model(images), []
    for device in ("cpu", "cuda"):
        quantized = calibrate(quantize_model(copy.deepcopy(model), recipe=recipe).to(device), images[:4])
        errors.append((quantized(images.to(device)).cpu() - expected).square().mean().sqrt().item())
    torch.testing.assert_close(on_gpu(model.cuda(), images), expected, rtol=1e-4, atol=1e-4)
    assert errors[1] == pytest.approx(errors[0], rel=0.25)


@pytest.mark.parametrize("w_bit", [3, 8])
@torch.no_grad()
def test_best_keeps_as_much_as_on_a_cpu(w_bit):
    model = build_model("demo_vit")
    images = generate_data(model, 8, settings=GenerationSettings(steps=20), progress=False)
    expected, errors = model(images), []
    for device in ("cpu", "cuda"):
        quantized = calibrate(quantize_model(copy.deepcopy(model), w_bit, w_bit, recipe=BEST).to(device), images)
        errors.append((quantized(images.to(device)).cpu() - expected).square().mean().item())
    assert errors[1] == pytest.approx(errors[0], rel=0.3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_learns_stops_and_goes_on(tmp_path, monkeypatch, precision):
    model = build_model("demo_vit").cuda()
    images = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    quantized = quantize_model(copy.deepcopy(model), 4, 4, recipe=LEARNED)
    teacher = copy.deepcopy(quantized)
    student = Student(fit(copy.deepcopy(quantized), images, 32), teacher, images, steps=60, parts=True)
    before = student.error(images.cuda()).item()
    with pytest.raises(Stopped), monkeypatch.context() as patch:
        steps = student.step

        def interrupted(number):
            if number == 30:
                os.kill(os.getpid(), 2)
            return steps(number)

        patch.setattr(student, "step", interrupted)
        learn(student, precision, tmp_path)
    again = Student(fit(quantized, images, 32), teacher, images, steps=60, parts=True)
    learn(again, precision, tmp_path)
    again.finish()
    assert again.error(images.cuda()).item() < 0.9 * before


@pytest.mark.parametrize("compile", [False, True], ids=["replayed", "compiled"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["demo_vit", "demo_swin"])
def test_images_begin_as_on_a_cpu_and_lower_the_loss(name, precision, compile, capfd):
    model, losses, expected = build_model(name), [], []
    generate_data(model, 4, settings=replace(QUICK, steps=1), progress=False, losses=expected)
    settings = GenerationSettings(steps=40, precision=precision, compile=compile)
    images = generate_data(model.cuda(), 4, settings=settings, progress=False, losses=losses)
    assert images.device.type == "cpu" and images.isfinite().all()
    assert "going on without it" not in capfd.readouterr().err
    tolerance = {"fp32": 1e-3, "tf32": 0.02, "bf16": 0.05}[precision]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(expected[0]), rtol=tolerance, atol=tolerance)
    assert sum(losses[-1][:2]) < sum(losses[0][:2]) - 1  # entropy and class


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["demo_vit", "demo_swin"])
def test_what_is_replayed_is_computed_anew_from_other_arguments(name, precision, recwarn):
    model = build_model(name).cuda()
    with frozen(model), attention_outputs(model) as outputs:
        terms = loss_terms(model, outputs, precision)
        with replayed(terms) as fast:
            for size in (4, 4, 2, 4):
                images, target = torch.randn(size, 3, 64, 64, device="cuda"), torch.rand((), device="cuda")
                arguments = images.requires_grad_(), torch.arange(size, device="cuda"), target
                expected, found = terms(*arguments), fast(*arguments)
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
                gradients = [torch.autograd.grad(values.sum(), images)[0] for values in (expected, found)]
                torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
    assert not any("AccumulateGrad" in str(warning.message) for warning in recwarn)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_second_gpu_replays_the_same():
    model, losses = build_model("demo_vit"), []
    for device in ("cuda:0", "cuda:1"):
        rows: list[list[float]] = []
        generate_data(model.to(device), 4, settings=GenerationSettings(steps=3), progress=False, losses=rows)
        losses.append(torch.tensor(rows))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)
    assert (losses[0].diff(dim=0).abs().amax(dim=1) > 0).all()


def test_what_was_recorded_holds_no_memory():
    model = build_model("deit_small", pretrained=False).cuda()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    generate_data(model, 40, settings=GenerationSettings(steps=1), progress=False)  # batches of two shapes
    most = torch.cuda.max_memory_allocated()
    assert torch.cuda.memory_allocated() - before < 0.2 * (most - before)  # cuBLAS keeps a workspace of each stream


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_generated_for_every_family(family, capfd):
    settings = GenerationSettings(steps=2, precision="bf16")
    assert generate_data(build(family).cuda(), 2, settings=settings, progress=False).isfinite().all()
    recorded = "going on without it" not in capfd.readouterr().err
    assert recorded == (family != "dinov3")  # for images of any size: each pass makes positions anew, on the host


def test_several_batches_are_compiled_once(capfd):
    settings = GenerationSettings(steps=3, batch_size=2, compile=True, precision="bf16")
    images = generate_data(build_model("demo_vit").cuda(), 5, settings=settings, progress=False)
    assert len(images) == 5 and images.isfinite().all() and "going on without" not in capfd.readouterr().err
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.pairwise(images))


def test_activations_are_computed_again_in_less_memory():
    peaks, model = [], build_model("deit_tiny", pretrained=False).cuda()
    for again in (False, True):
        before = torch.cuda.memory_allocated()  # with cuBLAS' workspaces, of all that was recorded until now
        torch.cuda.reset_peak_memory_stats()
        settings = GenerationSettings(steps=1, checkpoint_activations=again)
        assert generate_data(model, 32, settings=settings, progress=False).isfinite().all()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.7 * peaks[0]


def test_without_memory_a_line_says_how_many_images_fit():
    model = build_model("deit_tiny", pretrained=False).cuda()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 4e8) / total)
        with pytest.raises(
            InputError, match=r"--checkpoint-activations takes less, and \d+ images at a time would fit"
        ):
            generate_data(model, 32, settings=QUICK, progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("recipe", [PAPER, BEST], ids=lambda recipe: recipe.name)
@torch.no_grad()
def test_what_is_saved_is_the_same_on_a_cpu(tmp_path, recipe):
    quantized = quantize_model(build_model("demo_vit"), 4, 8, recipe=recipe).cuda()
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    calibrate(quantized, images)
    save_quantized(tmp_path / "model.safetensors", quantized, "demo_vit")
    loaded, _ = load_quantized(tmp_path / "model.safetensors")
    assert torch.equal(loaded.cuda()(images.cuda()), quantized(images.cuda()))
    here, there = loaded.cpu()(images), quantized(images.cuda()).cpu()
    assert (here - there).square().mean().sqrt() < 0.05 * there.std()


@pytest.mark.parametrize("recipe", ["paper", "best"])
def test_a_run_from_start_to_onnx(tmp_path, image_root, recipe):
    options = ["--model", "demo_vit", "--dataset", str(image_root), "--output-dir", str(tmp_path / "run")]
    options += ["--steps", "5", "--calib-batchsize", "4", "--num-workers", "2", "--recipe", recipe, "--plots"]
    options += ["--save", str(tmp_path / "model.safetensors"), "--export-onnx", str(tmp_path / "model.onnx")]
    results = test_quant.run(parse_run(options))
    assert results["device"].startswith("cuda:0 (") and results["precision"] == "bf16" and results["n"] == 100
    assert (tmp_path / "model.onnx").stat().st_size > 500_000
    again = ["--load", str(tmp_path / "model.safetensors"), "--dataset", str(image_root), "--num-workers", "0"]
    loaded = test_quant.run(parse_run([*again, "--output-dir", str(tmp_path / "again")]))
    assert loaded["top1"] == results["top1"]


def test_default_precision_is_bfloat16():
    assert default_precision(torch.device("cuda"), build_model("demo_vit")) == "bf16"


def test_deterministic_runs_give_the_same_bytes(tmp_path):
    """Compiled, in bfloat16; in processes of their own."""
    line = ["--model", "demo_vit", "--num-images", "4", "--steps", "20", "--deterministic", "--compile", "--output"]
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    processes = [
        subprocess.Popen([sys.executable, "generate_data.py", *line, str(file)], cwd=ROOT, stderr=subprocess.PIPE)
        for file in files
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert b"going on without it" not in errors
    assert files[0].read_bytes() == files[1].read_bytes()


def test_generation_stops_and_goes_on_to_the_same_images(tmp_path):
    """Deterministic, in one process each."""
    command = [sys.executable, "generate_data.py", "--model", "demo_vit", "--num-images", "4", "--deterministic"]
    command += ["--steps", "300"]
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    run = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run([*command, "--output", str(whole)]).returncode == 0
    process = subprocess.Popen([*command, "--output", str(parts)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    seen = ""
    while "L_PSE" not in seen:
        seen += process.stderr.read(1)
    process.send_signal(2)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "go on with --resume" in errors, errors
    again = run([*command, "--output", str(parts), "--resume"])
    assert again.returncode == 0, again.stderr
    assert torch.equal(load_file(parts)["images"], load_file(whole)["images"])


def test_two_processes_share_a_gpu_and_the_images(tmp_path):
    line = ["--model", "demo_vit", "--num-images", "40", "--steps", "2", "--deterministic", "--output"]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    images = []
    for command in ([sys.executable], start):
        file = tmp_path / f"{len(images)}.safetensors"
        done = subprocess.run(
            [*command, "generate_data.py", *line, str(file)], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        images.append(load_file(file)["images"])
    assert torch.equal(*images)


def test_the_command_line_generates_on_the_gpu(tmp_path, capsys):
    options = ["--model", "demo_swin", "--num-images", "2", "--steps", "2", "--output", str(tmp_path / "a.npy")]
    generation.run(parse_generation(options))
    assert "2 images" in capsys.readouterr().out and (tmp_path / "a.png").exists()


def test_benchmark_measures_a_gpu(tmp_path):
    command = [sys.executable, "scripts/benchmark.py", "--model", "deit_tiny", "--batch", "2", "--rounds", "1"]
    command += ["--eval-batch", "2", "--steps", "2", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["precision"] for row in rows] == ["fp32", "bf16"]
    for row in rows:
        assert row["device"].startswith("cuda:0 (") and row["generation_cold_s"] > 0 and row["peak_mb"] > 0
