"""Which of timm's pre-trained architectures with attention are quantized, family by family.

    python scripts/architectures.py --refused

Every architecture that timm has weights for and that has attention between tokens is built without memory for its
weights, and checked as `build_model` does before it downloads anything. Prints a table, and with --refused the first
reason for each architecture that is not taken.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import inspect
from collections import defaultdict
from collections.abc import Callable
from importlib import import_module

import timm
import torch
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.naflex import at_size
from quant import UnsupportedModelError, check_supported
from utils.run.progress import progress_bar

# Of these names, but between channels, or of one query for all tokens at the end of a convolutional network
NOT_ATTENTION = ("SplitAttn", "AttentionPool2d", "RotAttentionPool2d", "AttentionPoolLatent")


# As all blocks of a model are of one kind, one of each stage tells as much as all, in a tenth of the time
SHORT = ({"depth": 1}, {"depths": (1, 1, 1, 1)}, {})
# What fills a tensor: for one without memory it would do nothing, and take most of the time
FILLING = ("uniform_", "normal_", "erfinv_", "mul_", "add_", "div_", "clamp_", "fill_", "zero_", "copy_")


class WithoutMemory(TorchFunctionMode):
    """Within the context, as within torch.device("meta"), nothing is filled."""

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Tensor:
        if getattr(function, "__name__", "") in FILLING:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def candidates() -> list[str]:
    """The architectures with weights of those of timm's files that mention attention at all."""
    modules = [name for name in timm.list_modules() if "ttention" in source(name) or "Attn" in source(name)]
    return [name for name in timm.list_models(module=modules) if timm.models.is_model_pretrained(name)]


def source(module: str) -> str:
    """The text of one of timm's files of models."""
    return inspect.getsource(import_module(f"timm.models.{module}"))


def outline(name: str) -> nn.Module:
    """An architecture without memory for its weights, with one block a stage where timm lets that be chosen."""
    for options in SHORT:
        try:
            with torch.device("meta"), WithoutMemory():
                return timm.create_model(name, **options)
        except Exception:  # it has no such argument, or not this value, which timm tells in every way
            if not options:
                raise


def has_attention(model: nn.Module) -> bool:
    """Whether any module's class is called attention."""
    names = {type(module).__name__ for module in model.modules()} - set(NOT_ATTENTION)
    return any("attention" in name.lower() or "attn" in name.lower() for name in names)


def reason(model: nn.Module) -> str:
    """Why a model is refused; empty if it is taken."""
    try:
        if isinstance(model, NaFlexVit):
            model = at_size(model, model.pretrained_cfg["input_size"][1:])
        check_supported(model)
    except UnsupportedModelError as error:
        return str(error)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--refused", action="store_true", help="list the architectures that are not taken, and why")
    options = parser.parse_args()
    families: dict[str, dict[str, str]] = defaultdict(dict)
    for name in progress_bar(candidates(), desc="checking", unit="model"):
        model = outline(name)
        if has_attention(model):
            families[type(model).__name__][name] = reason(model)
    print("| family | quantized | of |", "|---|---|---|", sep="\n")
    for family, reasons in sorted(families.items(), key=lambda item: -len(item[1])):
        print(f"| {family} | {sum(not why for why in reasons.values())} | {len(reasons)} |")
    everything = [why for reasons in families.values() for why in reasons.values()]
    print(f"| all | {sum(not why for why in everything)} | {len(everything)} |")
    print(f"timm {timm.__version__}, torch {torch.__version__}")
    if options.refused:
        for reasons in families.values():
            print(*(f"{name}: {why}" for name, why in reasons.items() if why), sep="\n")


if __name__ == "__main__":
    main()
