"""Learning lowers what quantization costs, and leaves a model as any calibrated one is."""

import copy
import os
import signal
from dataclasses import replace

import pytest
import torch

from models.zoo import build_model
from quant import activation_ranges, calibrate, quantize_model
from quant.convert import fit
from quant.integers import integer_state, load_integer_state
from quant.learning import BATCH, Student, block_outputs, round_learned
from quant.modules import named_activations, quantized_weights
from quant.quantizers import fake_quantize_, signed_grid
from quant.recipes import BEST, INPUTS, LEARNED
from utils.fractals import render_others
from utils.learning import learn
from utils.run.errors import InputError
from utils.run.signals import Stopped

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
RECIPE = replace(INPUTS, search_ranges=True, compensate=True, learn=3)


def student_of(model, w_bit=4, a_bit=4, recipe=RECIPE):
    quantized = quantize_model(copy.deepcopy(model), w_bit, a_bit, recipe=recipe)
    teacher = copy.deepcopy(quantized)
    return Student(fit(quantized, IMAGES, 32), teacher, IMAGES, recipe.learn, recipe.enlarge)


@torch.no_grad()
def test_a_model_learns_on_images_what_holds_for_others():
    model = build_model("demo_vit")
    images = torch.from_numpy(render_others(32, 64, 0)).permute(0, 3, 1, 2) / 127.5 - 1
    expected = model(images)
    best, learned = (
        calibrate(quantize_model(copy.deepcopy(model), 3, 3, recipe=replace(RECIPE, learn=steps)), images[:16])(images)
        for steps in (0, 200)
    )
    for some in (slice(16), slice(16, None)):
        errors = [(logits[some] - expected[some]).square().mean() for logits in (best, learned)]
        assert errors[1] < 0.8 * errors[0]


@torch.no_grad()
@pytest.mark.parametrize("recipe", [RECIPE, replace(BEST, learn=3, learn_bits=4).without_zero_points()])
def test_what_is_learned_is_loaded_bit_for_bit(model, recipe):
    saved = calibrate(quantize_model(copy.deepcopy(model), 4, 6, recipe=recipe), IMAGES)
    loaded = load_integer_state(quantize_model(model, 4, 6, recipe=recipe), integer_state(saved))
    assert torch.equal(loaded(IMAGES), saved(IMAGES))
    assert not any(parameter.requires_grad for parameter in saved.parameters())
    for name, layer in quantized_weights(saved):
        codes = layer.weight / layer.weight_scale
        low, high = signed_grid(layer.w_bit)
        torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
        assert low <= codes.round().min() and codes.round().max() <= high, name


def test_ranges_are_those_of_the_learned_scales(vit):
    model = calibrate(quantize_model(vit, 8, 5, recipe=RECIPE), IMAGES)
    ranges = activation_ranges(model)
    for name, act in named_activations(model):
        for found, end in zip(ranges[name], act.grid, strict=True):
            torch.testing.assert_close(torch.tensor(found), (end - act.zero_point) * act.scale)


def test_scales_biases_and_weights_are_learned_of_all_layers(model):
    student = student_of(model)
    before = {name: tensor.clone() for name, tensor in student.tensors.items()}
    kinds = {name.rpartition(".")[2] for name in before}
    student.step(0)
    still = [name for name, tensor in student.tensors.items() if torch.equal(tensor, before[name])]
    assert kinds == {"weight", "bias", "scale"} and not still


def test_logits_that_are_all_alike_teach_nothing_and_break_nothing(vit):
    torch.nn.init.zeros_(vit.head.weight)
    torch.nn.init.zeros_(vit.head.bias)
    model = calibrate(quantize_model(vit, 3, 3, recipe=RECIPE), IMAGES)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_an_error_that_is_not_finite_ends_learning(vit):
    student = student_of(vit)
    student.images = student.images * float("inf")
    with pytest.raises(FloatingPointError, match="learning: the error, or its gradient, is not finite"):
        student.learn()


def test_the_teacher_stays_what_it_is(vit):
    student = student_of(vit)
    student.learn()
    assert torch.equal(student.teacher(IMAGES), quantize_model(vit, 4, 4, recipe=RECIPE)(IMAGES))


def test_first_steps_undo_nothing_of_what_was_compensated(model):
    student = student_of(model)
    before = [layer.weight.clone() for layer in student.layers.values()]
    student.learn()
    student.round_weights()
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(student.layers.values(), before, strict=True))


@pytest.mark.parametrize(("zero_point", "grid"), [(3.0, (0, 15)), (0.0, (-8, 7))])
def test_rounding_is_the_usual_one_with_a_gradient(zero_point, grid):
    x = torch.linspace(-3.01, 3.02, 101, dtype=torch.float64).requires_grad_()
    log_scale = torch.tensor(0.25, dtype=torch.float64).log().requires_grad_()
    scale, zero_point = log_scale.detach().exp(), torch.tensor(zero_point, dtype=torch.float64)
    rounded = round_learned(log_scale, x, None, zero_point, grid)
    torch.testing.assert_close(rounded, fake_quantize_(x.detach().clone(), scale, zero_point, grid))
    to_x, to_scale = torch.autograd.grad(rounded.sum(), (x, log_scale))
    codes = x.detach() / scale + zero_point
    inside = (codes >= grid[0]) & (codes <= grid[1])
    torch.testing.assert_close(to_x, inside.double())
    # Esser et al., equation 3, times the scale, as its logarithm is learned; clipped values follow the end of the grid
    by_value = torch.where(inside, codes.round() - codes, codes.clamp(*grid) - zero_point)
    torch.testing.assert_close(to_scale, (by_value * scale).sum())


def test_every_step_sees_other_images_and_at_most_a_batch(vit):
    student = student_of(vit)
    student.images = torch.arange(BATCH + 8.0)[:, None, None, None].expand(-1, 3, 16, 16).contiguous()
    first, second = student.draw(), student.draw()
    assert first.shape == (BATCH, 3, 16, 16) and first[:, 0, 0, 0].unique().numel() == BATCH
    assert not torch.equal(first, second)


def test_images_are_moved_and_flipped(vit):
    student = student_of(vit)
    student.images = torch.arange(32.0).expand(16, 3, 32, 32).contiguous()
    rows = {tuple(row.tolist()) for _ in range(20) for row in student.draw()[:, 0, 0]}
    assert len(rows) > 10 and all(sorted(row) == list(range(32)) for row in rows)


def test_of_a_rounded_activation_what_it_read_and_gave_is_kept():
    kept, x, log_scale = [], torch.randn(8, 16, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = round_learned(log_scale, x, None, torch.tensor(3.0), (0, 15))
    assert [tensor.data_ptr() for tensor in kept if tensor.ndim] == [x.data_ptr(), y.data_ptr()]


@pytest.mark.parametrize("number", [1, 9])
def test_of_half_of_the_images_parts_are_seen(vit, number):
    student = student_of(vit, recipe=replace(RECIPE, enlarge=True))
    student.images = torch.arange(32.0).expand(number, 3, 32, 32).contiguous()
    seen = [student.draw() for _ in range(20)]
    for images in seen:
        whole = [sorted(row.tolist()) == list(range(32)) for row in images[:, 0, 0]]
        assert images.shape == (number, 3, 32, 32) and sum(whole) == number - number // 2
    if number > 1:
        assert not torch.equal(seen[0][0], seen[1][0])


def test_outputs_are_those_of_every_block_and_the_model(model):
    outputs = block_outputs(model, IMAGES)
    blocks = 2 if hasattr(model, "blocks") else 3
    assert len(outputs) == blocks + 1 and torch.equal(outputs[-1], model(IMAGES))


def test_nothing_is_learned_where_all_is_float(vit):
    expected = vit(IMAGES)
    model = calibrate(quantize_model(vit, 16, 16, recipe=RECIPE), IMAGES, learn=None)
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "w_bit", "a_bit", "steps"),
    [
        *((BEST, 4, 4, 0), (BEST, 3, 8, 100), (BEST, 8, 3, 100)),
        *((LEARNED, 8, 8, 0), (LEARNED, 7, 8, 400), (LEARNED, 8, 6, 400)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_recipe_learns_where_bits_are_few(vit, recipe, w_bit, a_bit, steps):
    students = []
    calibrate(quantize_model(vit, w_bit, a_bit, recipe=recipe), IMAGES, learn=students.append)
    assert sum(student.total for student in students) == steps


def test_learning_that_was_interrupted_goes_on(vit, tmp_path):
    whole, part, rest, other = student_of(vit), student_of(vit), student_of(vit), student_of(vit, a_bit=5)
    learn(whole, "fp32", tmp_path / "whole")
    step = part.step

    def interrupted(number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(number)

    part.step = interrupted
    with pytest.raises(Stopped, match="interrupted at step 2"):
        learn(part, "fp32", tmp_path / "part")
    longer = student_of(vit)
    longer.total += 1
    for another, precision in ((other, "fp32"), (longer, "fp32"), (student_of(vit), "bf16")):
        with pytest.raises(InputError, match="of another run"):
            learn(another, precision, tmp_path / "part")
    numbers, step = [], rest.step
    rest.step = lambda number: (numbers.append(number), step(number))[1]
    learn(rest, "fp32", tmp_path / "part")
    assert numbers == list(range(2, whole.total))
    assert all(torch.equal(tensor, rest.tensors[name]) for name, tensor in whole.tensors.items())


def test_steps_in_bf16_are_those_of_float32_but_for_roundings(vit):
    students = {precision: student_of(vit, recipe=replace(RECIPE, learn=8)) for precision in ("fp32", "bf16")}
    before = {name: tensor.detach().clone() for name, tensor in students["fp32"].tensors.items()}
    for precision, student in students.items():
        learn(student, precision)
        assert all(tensor.dtype == torch.float32 for tensor in student.tensors.values())
        assert student.error(IMAGES).dtype == torch.float32
    moved = [torch.cat([(s.tensors[n] - before[n]).flatten() for n in before]) for s in students.values()]
    assert not torch.equal(*moved) and torch.cosine_similarity(*moved, dim=0) > 0.8


def test_weights_that_a_step_changed_are_seen_by_the_next(vit, monkeypatch):
    """Autocast keeps what it has rounded of them until its end."""
    student, errors = student_of(vit), []
    layer, step = student.layers["blocks.0.mlp.fc1"], student.step
    for group in student.optimizer.param_groups:
        group["rate"] = 0.0

    def measured(number):
        layer.weight_scale *= 2  # and nothing else changes
        errors.append(step(number))
        return errors[-1]

    monkeypatch.setattr(student, "draw", lambda: IMAGES)
    monkeypatch.setattr(student, "step", measured)
    learn(student, "bf16")
    assert len({error[0].item() for error in errors}) == student.total
