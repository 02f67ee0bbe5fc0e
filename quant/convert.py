"""Swap, calibrate, freeze: a float timm model becomes a quantized one, in place."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from quant import modules
from quant.balance import balance
from quant.biases import drop_key_biases
from quant.contrast import add_shaded, stretch
from quant.families import SWAPS, check_supported, untouched
from quant.learning import Student
from quant.parts import add_parts
from quant.quantizers import BIT_WIDTHS, FLOAT_BITS
from quant.ranges import search_ranges
from quant.recipes import PAPER, Recipe, matches
from quant.rounding import input_moments
from quant.streams import obstacle, rotate
from quant.windows import cover_values, window_contexts


def quantize_model(
    model: nn.Module, w_bit: int = 8, a_bit: int = 8, skip: Sequence[str] = (), recipe: Recipe = PAPER
) -> nn.Module:
    """Swap the layers of a timm ViT, DeiT or Swin for quantized ones, in place; returns the model.

    Until `calibrate` is called the model gives its float logits. The names of its state dict never change.

    Args:
        model: in evaluation mode afterwards.
        w_bit, a_bit: 2 to 8 for weights and activations; 16 leaves them in float.
        skip: patterns such as "blocks.0.*" or "*.act_scores"; quantizers, named as in `quantizer_bits`, that match
            one of them stay in float.
        recipe: which activations are quantized, and all that `calibrate` is to do.

    Raises:
        ValueError: a bit width out of range, or a pattern that matches nothing.
        UnsupportedModelError: a part of the model is not understood.

    Where it raises, the model is untouched.
    """
    for option, bits in (("w_bit", w_bit), ("a_bit", a_bit)):
        if bits not in BIT_WIDTHS:
            raise ValueError(f"{option}: expected 2 to 8, or 16 for float; got {bits}")
    check_patterns(model, recipe, skip)
    swap_layers(model, recipe)
    if (recipe.balance or recipe.drop_key_biases or recipe.rotate) and (reason := obstacle(model)):
        note(model, f"neither balanced nor rotated: {reason}")
    elif recipe.balance:
        balance(model)
    place_quantizers(model, recipe.assign(quantizer_bits(model), w_bit, a_bit))
    if model.num_classes == 1:  # the values of one logit may lie to one side of zero, where their zero point is clamped
        skip = (*skip, "head.act_output", "head.fc.act_output")
    assign_bits(model, {name: FLOAT_BITS for name in quantizer_bits(model) if matches(name, skip)})
    return model


def check_patterns(model: nn.Module, recipe: Recipe, skip: Sequence[str]) -> None:
    """Raise ValueError for a pattern that matches none of the quantizers that the model will have."""
    if isinstance(skip, str):
        raise ValueError(f"skip: expected a list of patterns; got the string '{skip}'")
    if not skip:
        return
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    swapped = swap_layers(copy.deepcopy(model, weights), recipe)  # which shares them
    names = list(recipe.assign(quantizer_bits(swapped), FLOAT_BITS, FLOAT_BITS))
    for pattern in skip:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"'{pattern}' matches no quantizer; there are {', '.join(names[:4])}, ...")


def swap_layers(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Give every layer of a float timm model its quantized class, and every place a quantizer, of 16 bits, in place.

    The model keeps the recipe, for `calibrate` and for its files.

    Raises:
        UnsupportedModelError: a part of the model is not understood; the model is untouched.
    """
    check_supported(model)
    model.eval()
    in_float = set(untouched(model))
    model.recipe = recipe
    for module in list(model.modules()):
        if type(module) not in SWAPS or module in in_float:
            continue
        module.__class__ = SWAPS[type(module)]
        if isinstance(module, modules.QuantizedWeight):
            module.w_bit = FLOAT_BITS
            module.register_buffer("weight_scale", None, persistent=False)
        if isinstance(module, modules.QuantizedOutput):
            module.act_output = modules.QuantAct(FLOAT_BITS)
        for name in getattr(module, "activations", ()):
            setattr(module, name, modules.QuantAct(FLOAT_BITS))
    for module in list(model.modules()):
        for name in getattr(module, "float_outputs", ()):  # which no recipe quantizes
            if isinstance(layer := getattr(module, name, None), modules.QuantizedOutput):
                layer.act_output = modules.NoAct()
    for name, act in modules.named_activations(model):
        act.symmetric = matches(name, recipe.symmetric)
    return model


def place_quantizers(model: nn.Module, bits: Mapping[str, int]) -> None:
    """Keep the activation quantizers of a swapped model that `bits` names, and give all that it names these bits."""
    for name, _ in list(modules.named_activations(model)):
        if name not in bits:
            model.set_submodule(name, modules.NoAct())
    assign_bits(model, bits)


def quantizer_bits(model: nn.Module) -> dict[str, int]:
    """Bits of every quantizer of a swapped model by name: activations, and weights as name.weight."""
    bits = {}
    for name, module in model.named_modules():
        if isinstance(module, modules.QuantAct):
            bits[name] = module.bits
        elif isinstance(module, modules.QuantizedWeight):
            bits[f"{name}.weight"] = module.w_bit
    return bits


def assign_bits(model: nn.Module, bits: Mapping[str, int]) -> None:
    """Give quantizers of a swapped model, named as in `quantizer_bits`, other bits."""
    for name, value in bits.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        setattr(module, "w_bit" if name.endswith(".weight") else "bits", value)


@torch.no_grad()
def calibrate(
    model: nn.Module, images: Tensor, batch_size: int = 32, learn: Callable[[Student], object] = Student.learn
) -> nn.Module:
    """Record every activation's range in full precision over `images`, then quantize and freeze, as the recipe says.

    Args:
        model: from `quantize_model`, not calibrated before.
        images: (B, 3, H, W), normalised, on the CPU or on the model's device.
        batch_size: images a forward pass; ranges do not depend on it.
        learn: does the steps of a student, where the recipe has one.

    Raises:
        RuntimeError: the model was not swapped, or is calibrated already; or the recipe needs gradients, which there
            are none of in torch.inference_mode.
        FloatingPointError: an activation, or the error of learning, is not finite.

    Whatever ends it early, Ctrl-C too, the model is not calibrated then.
    """
    if not any(True for _ in modules.named_activations(model)) or is_calibrated(model):
        raise RuntimeError("calibrate expects a model from quantize_model that was not calibrated before")
    if not len(images):
        raise ValueError("calibrate expects at least one image")
    recipe = model.recipe
    if torch.is_inference_mode_enabled() and (recipe.search_ranges or recipe.learn):
        raise RuntimeError(f"recipe {recipe.name} needs gradients: expected calibrate outside of torch.inference_mode")
    try:
        return follow(recipe, model, images, batch_size, learn)
    except BaseException:
        for _, act in modules.named_activations(model):
            act.low = act.high = act.scale = act.zero_point = None
            vars(act).pop("kernel", None)  # of learning
        raise


def follow(
    recipe: Recipe, model: nn.Module, images: Tensor, batch_size: int, learn: Callable[[Student], object]
) -> nn.Module:
    """All that a recipe has `calibrate` do, in order."""
    config = resolve_model_data_config(model)
    if recipe.stretch:
        images = stretch(images, config["mean"], config["std"])
    if recipe.shade:
        images = add_shaded(images, config["mean"], config["std"])
    if recipe.rotate and not obstacle(model):
        choose_rotation(model, images, batch_size)
    if not learns(model):
        return fit(model, images, batch_size)
    teacher = copy.deepcopy(model)
    student = Student(fit(model, images, batch_size), teacher, images, recipe.learn, recipe.enlarge)
    learn(student)
    student.finish()
    return model


def learns(model: nn.Module) -> bool:
    """Whether `calibrate` is to learn: of a swapped model's recipe, for its bits."""
    return bool(model.recipe.learn) and min(quantizer_bits(model).values()) <= model.recipe.learn_bits


def fit(model: nn.Module, images: Tensor, batch_size: int) -> nn.Module:
    """Drop biases, observe and search ranges, then round the weights; returns the model, calibrated."""
    recipe = model.recipe
    if recipe.drop_key_biases and not obstacle(model):
        drop_key_biases(model)
    with observing(model):
        forward(model, images, batch_size)
    for name, (low, high) in activation_ranges(model).items():
        if not (abs(low) < float("inf") and abs(high) < float("inf")):  # false for NaN as well
            raise FloatingPointError(f"{name} spans {low} to {high} in calibration; expected finite activations")
    layers = dict(modules.quantized_weights(model))
    contexts = window_contexts(model) if recipe.windows else {}
    cover_values(contexts)
    if recipe.search_ranges:
        search_ranges(model, images, batch_size, contexts)
    for _, act in modules.named_activations(model):
        act.freeze()
    moments = {}
    if recipe.compensate:
        seen = add_parts(images) if recipe.enlarge else images
        moments = input_moments(layers, partial(forward, model, seen, batch_size))
    for name, layer in layers.items():
        layer.freeze(moments.get(name))
    return model


def forward(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """What a model gives for `images` (B, 3, H, W), which may be on the CPU: (B, classes)."""
    device = next(model.parameters()).device
    return torch.cat([model(batch.to(device)) for batch in images.split(batch_size)])


def choose_rotation(model: nn.Module, images: Tensor, batch_size: int) -> None:
    """Rotate a swapped model in place, if its quantized logits are then nearer to the float ones on the images.

    The trials round weights to the nearest: compensation fits these very images, and would judge itself.
    """
    expected, errors = forward(model, images, batch_size), []
    for prepare in (lambda trial: None, rotate):
        trial = copy.deepcopy(model)
        trial.recipe = replace(model.recipe, compensate=False)
        prepare(trial)
        fit(trial, images, batch_size)
        errors.append((forward(trial, images, batch_size) - expected).square().mean().item())
    before, after = errors
    if after < before:
        rotate(model)
    done = "rotated" if after < before else "not rotated"
    note(model, f"{done}: squared error of the logits {after:.3g} with rotation, {before:.3g} without")


def note(model: nn.Module, text: str) -> None:
    """Keep a sentence on what was done to a model, for the report."""
    model.notes = [*getattr(model, "notes", []), text]


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Within the context every activation quantizer records what it sees."""
    try:
        for _, act in modules.named_activations(model):
            act.observing = True
        yield
    finally:
        for _, act in modules.named_activations(model):
            act.observing = False


def activation_ranges(model: nn.Module) -> dict[str, tuple[float, float]]:
    """The calibrated [low, high] of every activation quantizer, by name."""
    ranges = {name: torch.stack([act.low, act.high]) for name, act in modules.named_activations(model)}
    return dict(zip(ranges, map(tuple, torch.stack(list(ranges.values())).tolist()), strict=True))


def is_calibrated(model: nn.Module) -> bool:
    """Whether any range is recorded: the model is not, or not wholly, in float any more."""
    return any(act.low is not None for _, act in modules.named_activations(model))


def check_calibrated(model: nn.Module) -> None:
    """Raise RuntimeError for a swapped model whose ranges are not all recorded; a float model passes."""
    missing = [name for name, act in modules.named_activations(model) if act.low is None]
    if missing:
        raise RuntimeError(f"the model is not calibrated ({missing[0]} has no range); call quant.calibrate first")
