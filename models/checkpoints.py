"""Files of weights: read, measured, and fitted into a model.

What a file is for is read from it: how many classes from its classifier, which image size from its positions. timm
would resample positions, and the kernel of the patch embedding, to the model's size without a word; here that is done
where an image size was asked for, and told, and refused elsewhere.
"""

import math
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from timm.models import (
    beit,
    deit,
    eva,
    load_state_dict,
    naflexvit,
    swin_transformer,
    swin_transformer_v2,
    vision_transformer,
    vision_transformer_relpos,
)
from torch import Tensor, nn

from models.source import State
from utils.run.errors import InputError

# timm's converters from the authors' own files, by model type
_CONVERTERS: dict[type[nn.Module], Callable] = {
    vision_transformer.VisionTransformer: vision_transformer.checkpoint_filter_fn,
    deit.VisionTransformerDistilled: vision_transformer.checkpoint_filter_fn,
    swin_transformer.SwinTransformer: swin_transformer.checkpoint_filter_fn,
    swin_transformer_v2.SwinTransformerV2: swin_transformer_v2.checkpoint_filter_fn,
    beit.Beit: beit.checkpoint_filter_fn,
    eva.Eva: eva.checkpoint_filter_fn,
    naflexvit.NaFlexVit: naflexvit.checkpoint_filter_fn,
    vision_transformer_relpos.VisionTransformerRelPos: vision_transformer_relpos.checkpoint_filter_fn,
}
TABLE = "relative_position_bias_table"
RESAMPLED = ("pos_embed", TABLE, "patch_embed.proj.weight")  # by timm's converters, to fit the model


def read_checkpoint(path: str | Path) -> State:
    """Read a state dict from a file without executing any code in it."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path}: no such file")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except UnpicklingError as error:
        raise InputError(f"checkpoint {path}: refused, it is damaged or holds more than weights") from error
    except Exception as error:  # on damaged files the readers raise nearly everything
        raise InputError(f"checkpoint {path}: not a readable file of weights ({first_line(error)})") from error
    state = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not state:
        raise InputError(f"checkpoint {path}: expected a state dict of tensors; found none")
    return state


def num_classes(state: State) -> int:
    """How many classes the classifier has; 0 where there is none."""
    for name in ("head.fc.weight", "head.weight"):
        if name in state and state[name].ndim == 2:
            return len(state[name])
    return 0


def input_options(outline: nn.Module, state: State) -> dict[str, Any]:
    """The constructor's arguments, img_size and perhaps window_size, of the model that the weights belong to.

    Args:
        outline: the architecture, on the meta device.
        state: in timm's names, or in those of the DeiT and Swin authors.

    Returns:
        None of them where the weights do not tell, as with rotary positions and in Swin V2. A Swin's own size is taken
        where its tables are; where they are not, the last stage is taken for one window, as in all published models.

    Raises:
        ValueError: the weights are those of an image that is not square.
    """
    patch, own = outline.patch_embed.patch_size, outline.state_dict()
    tables = {name: state[name] for name in own if name.endswith(TABLE) and name in state}
    if getattr(outline, "pos_embed", None) is not None and "pos_embed" in state:
        if state["pos_embed"].shape == own["pos_embed"].shape:
            return {"img_size": outline.patch_embed.img_size}
        prefix = outline.pos_embed.shape[-2] - outline.patch_embed.num_patches
        side = _side(state["pos_embed"].shape[-2] - prefix, "pos_embed")
        return {"img_size": (side * patch[0], side * patch[1])}
    if not tables or all(table.shape == own[name].shape for name, table in tables.items()):
        return {"img_size": outline.patch_embed.img_size} if tables else {}
    windowed = isinstance(outline, swin_transformer.SwinTransformer)
    extra = 0 if windowed else 3  # of the class token
    sides = [(_side(len(table) - extra, name) + 1) // 2 for name, table in tables.items()]
    stride = 2 ** (len(outline.layers) - 1) if windowed else 1
    options = {"img_size": (sides[-1] * stride * patch[0], sides[-1] * stride * patch[1])}
    return options | ({"window_size": sides[0]} if windowed else {})


def load_state(model: nn.Module, state: State, path: str | Path, resample: bool = False) -> list[str]:
    """Load a state dict in timm's or the authors' names; any key or shape that does not fit is an error.

    Args:
        resample: whether timm may fit positions to the model's image size.

    Returns:
        The names of what timm has resampled.
    """
    expected = model.state_dict()
    try:
        with redirect_stdout(None):  # timm prints what it drops, of which some is meant to be
            fitted = _CONVERTERS.get(type(model), lambda state, model: state)(state, model)
    except (RuntimeError, LookupError, ValueError, AttributeError, TypeError, AssertionError) as error:
        raise InputError(f"checkpoint {path}: not of this architecture ({first_line(error)})") from error
    problems = []
    if missing := [name for name in expected if name not in fitted]:
        problems.append(f"{len(missing)} keys missing ({_first(missing)})")
    if unexpected := [name for name in fitted if name not in expected]:
        problems.append(f"{len(unexpected)} unknown ({_first(unexpected)})")
    if dropped := [name for name in state if _is_needed(name, state[name], expected)]:
        problems.append(f"{len(dropped)} that it has no place for ({_first(dropped)})")
    if others := [name for name, value in expected.items() if name in fitted and _kind(fitted[name]) != _kind(value)]:
        problems.append(f"{len(others)} no dense floating-point tensors ({_first(others)})")
    shapes = [
        f"{name}: expected {tuple(expected[name].shape)}, got {tuple(fitted[name].shape)}"
        for name in expected
        if name in fitted and fitted[name].shape != expected[name].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({_first(shapes, 1)})")
    changed = [name for name in fitted if name.endswith(RESAMPLED) and not _is_in(state, fitted[name])]
    if not problems and changed and not (resample and "patch_embed.proj.weight" not in changed):
        problems.append(f"{len(changed)} of another size ({_first(changed)}), which would have to be resampled")
    if problems:
        raise InputError(f"checkpoint {path}: not of this architecture: {'; '.join(problems)}")
    model.load_state_dict(fitted)
    return changed


def first_line(error: Exception) -> str:
    """An exception's message, as far as it fits into one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def _is_in(state: State, tensor: Tensor) -> bool:
    """Whether a file has these values, perhaps in another shape, or behind those of a class token."""
    flat = tensor.flatten()
    large = (value.flatten() for value in state.values() if value.numel() >= len(flat))
    return any(torch.equal(value[-len(flat) :].nan_to_num(), flat.nan_to_num()) for value in large)


def _is_needed(name: str, value: Tensor, expected: State) -> bool:
    """Whether a file's tensor does something in its own model that one with the keys `expected` has no part for.

    timm's converters leave out what few models have: a layer before the classifier of the oldest ViTs, and biases.
    """
    if name.startswith("pre_logits."):
        return True
    biased = any(key.endswith(("attn.qkv.bias", "attn.q_bias", "attn.q_proj.bias")) for key in expected)
    if biased or not name.endswith("attn.qkv.bias"):
        return False
    query, _, shift = value.chunk(3)  # softmax does not see that of the keys
    return bool(query.any() or shift.any())


def _kind(tensor: Tensor) -> tuple[bool, torch.layout]:
    return tensor.is_floating_point(), tensor.layout


def _side(count: int, name: str) -> int:
    """The side of a square of `count` places."""
    side = math.isqrt(max(count, 0))
    if side < 1 or side * side != count:
        raise ValueError(f"expected positions of a square image in {name}; got {count}")
    return side


def _first(names: list[str], count: int = 2) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
