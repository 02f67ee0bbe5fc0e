"""Pictures of a run, for --plots: how images came about, what calibration saw, and where quantization hurts."""

import copy
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant import activation_ranges, calibrate, quantize_model
from utils.attention import layer_entropies
from utils.data import Images, draw_images
from utils.images import draw_noise
from utils.run.distributed import by_first
from utils.run.errors import InputError
from utils.run.files import replacing
from utils.run.record import Record

COLOURS = {"generated": "#1d4ed8", "noise": "#9ca3af", "real": "#d97706"}
INK, MUTED = "#1b1f24", "#6b7280"


def require_matplotlib() -> Any:
    """matplotlib.pyplot, drawing into files; an InputError if it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise InputError("--plots needs matplotlib: pip install -r requirements-plots.txt") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.edgecolor": MUTED, "text.color": INK, "axes.titleweight": "bold"})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150})
    return plt


def plot_generation(path: Path, losses: Tensor, before: list[float], after: list[float]) -> None:
    """Draw the three terms of the loss (steps, 3), and the entropy of every attention layer before and after."""
    plt = require_matplotlib()
    figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), layout="constrained")
    titles = ("$L_{PSE}$: patch similarity entropy", "$L_{OH}$: cross-entropy", "$L_{TV}$: distance from its target")
    for axis, values, title in zip(axes, losses.T, titles, strict=False):
        axis.plot(range(1, len(values) + 1), values, color=COLOURS["generated"], linewidth=0.8)
        axis.set(title=title, xlabel="step")
    axes[2].set_yscale("symlog", linthresh=1)
    layers = torch.arange(1, len(before) + 1)
    axes[3].bar(layers - 0.2, before, 0.4, color=COLOURS["noise"], label="noise")
    axes[3].bar(layers + 0.2, after, 0.4, color=COLOURS["generated"], label="generated")
    axes[3].axhline(0, color=MUTED, linewidth=0.5)
    axes[3].set(title="entropy $H_l$ of each layer", xlabel="attention layer")
    axes[3].legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.12), ncols=2)
    _save(figure, path)


def plot_losses(path: Path, model: nn.Module, noise: Tensor, images: Tensor, losses: list[list[float]]) -> None:
    """Draw how `images` came about from `noise` (B, 3, H, W): rows [L_PSE, L_OH, L_TV], one a step, and entropies."""
    plot_generation(path, torch.tensor(losses), layer_entropies(model, noise), layer_entropies(model, images))


def plot_ranges(path: Path, ranges: dict[str, dict[str, tuple[float, float]]]) -> None:
    """Draw the range of every activation quantizer, for each kind of calibration images side by side.

    Args:
        ranges: by kind ("noise", "generated", "real"), then by the quantizer's name.
    """
    plt = require_matplotlib()
    places, columns = _by_place(list(next(iter(ranges.values())))), 5
    rows = -(-len(places) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(12, 1.9 * rows), layout="constrained", squeeze=False)
    axes, width = axes.flatten().tolist(), 0.8 / len(ranges)
    for axis in axes[len(places) :]:
        axis.set_axis_off()
    for axis, (place, names) in zip(axes, places.items(), strict=False):
        axis.use_sticky_edges = False  # bars would end at the frame and look cut off
        for index, (kind, by_name) in enumerate(ranges.items()):
            low, high = torch.tensor([by_name[name] for name in names]).T
            x = torch.arange(1, len(names) + 1) + (index - (len(ranges) - 1) / 2) * width
            axis.bar(x, high - low, width * 0.85, bottom=low, color=COLOURS[kind], label=f"{kind} images")
        axis.axhline(0, color=MUTED, linewidth=0.5)
        axis.autoscale_view()
        axis.set(title=place, xticks=[])
        if len(names) > 1:
            axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True, nbins=6))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(ranges), frameon=False)
    figure.supxlabel("block", fontsize=9)
    _save(figure, path)


def plot_noise(path: Path, decibels: dict[str, float]) -> None:
    """Draw the signal-to-noise ratio (dB) at the output of every layer of the quantized model."""
    plt = require_matplotlib()
    names, places = list(decibels), _by_place(list(decibels))
    figure, axis = plt.subplots(figsize=(12, 3.4), layout="constrained")
    axis.plot(range(len(names)), decibels.values(), color=MUTED, linewidth=0.6, zorder=1)
    for place, members in places.items():
        axis.plot([names.index(name) for name in members], [decibels[name] for name in members], "o", ms=5, label=place)
    worst = min(decibels, key=decibels.get)
    axis.annotate(
        worst, (names.index(worst), decibels[worst]), xytext=(0, -14), textcoords="offset points", ha="center"
    )
    axis.set(xlabel="layer, from input to output", ylabel="signal-to-noise ratio (dB)", xticks=[])
    axis.margins(y=0.2)
    figure.legend(loc="outside right center", frameon=False)
    _save(figure, path)


def plot_sensitivity(path: Path, title: str, errors: dict[str, float]) -> None:
    """Draw the logit error of each group of quantizers that was quantized alone, the worst on top."""
    plt = require_matplotlib()
    figure, axis = plt.subplots(figsize=(7, 0.5 + 0.22 * len(errors)), layout="constrained")
    axis.barh(range(len(errors)), errors.values(), color=COLOURS["generated"])
    axis.set_yticks(range(len(errors)), errors)
    axis.invert_yaxis()
    axis.set(title=title, xlabel="logit error (RMS, relative to the spread of the float logits)")
    _save(figure, path)


@by_first
def plot_run(
    record: Record,
    model: nn.Module,
    quantized: nn.Module,
    images: Tensor,
    kind: str,
    real: Images | None,
    losses: list[list[float]],
    seed: int,
) -> None:
    """Draw what a run of test_quant.py has to show: generation.png, ranges.png and noise.png.

    Args:
        model, quantized: the float model and its calibrated copy.
        images, kind: what the run calibrated on, (B, 3, H, W), of kind "generated", "noise" or "real".
        real: photographs to draw as many of, to compare with; None where there are none.
        losses: rows [L_PSE, L_OH, L_TV], one a step; empty if nothing was generated.
        seed: of the noise and of the choice of photographs.
    """
    kinds = {"noise": draw_noise(len(images), model.patch_embed.img_size, seed), kind: images}
    if real:
        kinds["real"] = draw_images(real, min(len(images), len(real)), seed)
    if losses:
        plot_losses(record.folder / "generation.png", model, kinds["noise"], images, losses)
    ranges = {
        kind: activation_ranges(calibrate(quantize_model(copy.deepcopy(model)), kinds[kind]))
        for kind in COLOURS
        if kind in kinds
    }
    plot_ranges(record.folder / "ranges.png", ranges)
    plot_noise(record.folder / "noise.png", signal_to_noise(model, quantized, images))


@torch.no_grad()
def signal_to_noise(float_model: nn.Module, quantized: nn.Module, images: Tensor) -> dict[str, float]:
    """10 log10 of float power over error power at the output of every linear, convolution and block, by name.

    The error is what has come together up to there, not the layer's alone; scripts/sensitivity.py has the latter.
    """
    kinds = (nn.Linear, nn.Conv2d)
    names = [name for name, module in float_model.named_modules() if isinstance(module, kinds)]
    device = next(float_model.parameters()).device
    float_outputs, outputs = (_outputs(model, names, images.to(device)) for model in (float_model, quantized))
    ratios = {}
    for name in names:
        if name not in float_outputs:  # some families of timm read the layer's weight, and do not call it
            continue
        error = (outputs[name] - float_outputs[name]).square().mean().clamp(min=1e-20)
        ratios[name] = 10 * torch.log10(float_outputs[name].square().mean() / error).item()
    return ratios


def _outputs(model: nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        return lambda module, inputs, output: outputs.__setitem__(name, output.float().flatten().cpu())

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(keep(name)))
        model(images)
    return outputs


def _by_place(names: list[str]) -> dict[str, list[str]]:
    """Names that are equal but for the number of their block, together: {"attn.qkv": ["blocks.0.attn.qkv", ...]}."""
    places: dict[str, list[str]] = {}
    for name in names:
        place = re.sub(r"^(layers\.\d+\.)?blocks\.\d+\.|^layers\.\d+\.", "", name).removesuffix(".act_output")
        places.setdefault(place, []).append(name)
    return dict(sorted(places.items(), key=lambda item: (len(item[1]) == 1, names.index(item[1][0]))))


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as draft:
        figure.savefig(draft)
    require_matplotlib().close(figure)
