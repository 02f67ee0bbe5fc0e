"""Names to models: the paper's five, the project's two, and any other ViT, DeiT or Swin of timm."""

import difflib
import math
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform, resolve_data_config
from timm.models import deit, load_state_dict, swin_transformer, vision_transformer
from torch import Tensor, nn

from models.demo import demo_swin, demo_vit
from quant import UnsupportedModelError, check_supported
from utils.run.errors import InputError

# The paper's models: the exact timm tag, and the crop ratio of the published figures. timm's own ratio for DeiT is
# 0.9; an untagged swin_small would be another model, first trained on ImageNet-22k.
PAPER_MODELS = {
    "deit_tiny": ("deit_tiny_patch16_224.fb_in1k", 0.875),
    "deit_small": ("deit_small_patch16_224.fb_in1k", 0.875),
    "deit_base": ("deit_base_patch16_224.fb_in1k", 0.875),
    "swin_tiny": ("swin_tiny_patch4_window7_224.ms_in1k", 0.9),
    "swin_small": ("swin_small_patch4_window7_224.ms_in1k", 0.9),
}
DEMO_MODELS = {"demo_vit": demo_vit, "demo_swin": demo_swin}
_FOLDER = Path(__file__).parent

# timm's converters from the authors' own files, by model type
_CONVERTERS: dict[type[nn.Module], Callable] = {
    vision_transformer.VisionTransformer: vision_transformer.checkpoint_filter_fn,
    deit.VisionTransformerDistilled: vision_transformer.checkpoint_filter_fn,
    swin_transformer.SwinTransformer: swin_transformer.checkpoint_filter_fn,
}


def build_model(name: str, checkpoint: str | Path | None = None, pretrained: bool = True) -> nn.Module:
    """Build a timm model in evaluation mode, on the CPU.

    Args:
        name: deit_tiny, deit_small, deit_base, swin_tiny, swin_small, demo_vit, demo_swin, or a timm name.
        checkpoint: weights from a file (.pth or .safetensors, also the DeiT and Swin authors' own) instead of timm's.
            The number of classes is read from it.
        pretrained: with no checkpoint: trained weights, or random ones for tests and benchmarks.

    Raises:
        InputError: unknown name, weights that cannot be had, a checkpoint that does not fit.
    """
    tag, overlay = model_tag(name), {}
    if name in PAPER_MODELS:
        overlay = {"crop_pct": PAPER_MODELS[name][1]}
    if name in DEMO_MODELS:
        checkpoint = checkpoint or (_FOLDER / f"{name}.safetensors" if pretrained else None)
    state = read_checkpoint(checkpoint) if checkpoint else None
    if name not in DEMO_MODELS:
        _check_architecture(tag)  # before anything is downloaded

    options = {}
    if state is not None and (num_classes := _num_classes(state)):
        options["num_classes"] = num_classes
    model = _download(tag, overlay) if pretrained and state is None else build_architecture(tag, overlay, **options)
    if state is not None:
        _load_state(model, state, checkpoint)
    return model.eval()


def build_architecture(tag: str, config: dict, **options: Any) -> nn.Module:
    """A model with random weights, in evaluation mode.

    Args:
        tag: as `model_tag` returns it.
        config: what differs from timm's data configuration of the model, as in `data_config`.
        options: num_classes, img_size.
    """
    if tag in DEMO_MODELS:
        model = DEMO_MODELS[tag](**options)
        model.pretrained_cfg = {"crop_pct": 1.0, **config}  # images of exactly the model's size, as in its training
    else:
        model = timm.create_model(tag, pretrained_cfg_overlay=config, **options)
    return model.eval()


def model_tag(name: str) -> str:
    """The exact timm name, with its tag, of a model; a demo model's is its own name. Unknown names are refused."""
    if name in DEMO_MODELS:
        return name
    if name in PAPER_MODELS:
        return PAPER_MODELS[name][0]
    try:
        known = timm.is_model(name) and timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # a tag that the model does not have
        known = None
    if not known:
        ours = [*PAPER_MODELS, *DEMO_MODELS]
        near = difflib.get_close_matches(name, ours, 3, 0.6) or difflib.get_close_matches(
            name, timm.list_models() + timm.list_pretrained(), 3, 0.6
        )
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected {', '.join(ours)} or a timm name"
        raise InputError(f"unknown model '{name}': {hint}")
    return f"{known.architecture}.{known.tag}" if known.tag else known.architecture


def data_config(model: nn.Module) -> dict:
    """timm's data configuration of a model: input_size, interpolation, mean, std, crop_pct, crop_mode."""
    height, width = model.patch_embed.img_size
    return resolve_data_config({"input_size": (3, height, width)}, model=model)


def evaluation_transform(model: nn.Module) -> Callable:
    """Resize (bicubic), centre crop, normalise: PIL image -> (3, H, W)."""
    return create_transform(**data_config(model), is_training=False)


def resized_size(model: nn.Module) -> tuple[int, int]:
    """The size (H, W) to which the evaluation transform resizes a square image, before it crops the centre."""
    config = data_config(model)
    height, width = config["input_size"][1:]
    crop = config["crop_pct"] if config["crop_mode"] == "center" else 1.0  # others resize to the model's size
    return math.floor(height / crop), math.floor(width / crop)


def normalization(model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a model's pixels, each (3, 1, 1); ImageNet's for no model."""
    config = data_config(model) if model else {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return tuple(torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a file without executing any code in it."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path}: no such file")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except UnpicklingError as error:
        raise InputError(f"checkpoint {path}: refused, it is damaged or holds more than weights") from error
    except Exception as error:  # on damaged files the readers raise nearly everything
        raise InputError(f"checkpoint {path}: not a readable file of weights ({_line(error)})") from error
    state = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not state:
        raise InputError(f"checkpoint {path}: expected a state dict of tensors; found none")
    return state


def _num_classes(state: dict[str, Tensor]) -> int | None:
    for name in ("head.fc.weight", "head.weight"):
        if name in state and state[name].ndim == 2:
            return len(state[name])
    return None


def _load_state(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a state dict in timm's or the authors' names; any key or shape that does not fit is an error."""
    expected = model.state_dict()
    try:
        state = _CONVERTERS.get(type(model), lambda state, model: state)(state, model)
    except (RuntimeError, LookupError, ValueError, AttributeError, TypeError, AssertionError) as error:
        raise InputError(f"checkpoint {path}: not of this architecture ({_line(error)})") from error
    problems = []
    if missing := [name for name in expected if name not in state]:
        problems.append(f"{len(missing)} keys missing ({_first(missing)})")
    if unexpected := [name for name in state if name not in expected]:
        problems.append(f"{len(unexpected)} unknown ({_first(unexpected)})")
    shapes = [
        f"{name}: expected {tuple(expected[name].shape)}, got {tuple(state[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({_first(shapes, 1)})")
    if problems:
        raise InputError(f"checkpoint {path}: not of this architecture: {'; '.join(problems)}")
    model.load_state_dict(state)


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _first(names: list[str], count: int = 2) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _check_architecture(tag: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(tag)
    try:
        check_supported(model)
    except UnsupportedModelError as error:
        raise InputError(f"{tag} cannot be quantized: {error}") from error
    if not model.num_classes:
        raise InputError(f"{tag} has no classifier; expected a model that has one")


def _download(tag: str, overlay: dict) -> nn.Module:
    """timm's pretrained model: from the local cache where it is there, else from the hub."""
    config = timm.models.get_pretrained_cfg(tag)
    if not (config.hf_hub_id or config.url):
        raise InputError(f"{tag} has no pretrained weights; name them with --checkpoint FILE")
    if config.hf_hub_id:
        repo, _, revision = f"{config.hf_hub_id}{tag if config.hf_hub_id.endswith('/') else ''}".partition("@")
        names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        found = [huggingface_hub.try_to_load_from_cache(repo, name, revision=revision or None) for name in names]
        cached = next((path for path in found if isinstance(path, str)), None)
        if cached:  # asks the network nothing
            return timm.create_model(tag, pretrained=True, pretrained_cfg_overlay={**overlay, "file": cached})
    # huggingface_hub would try for most of a minute before it gives up, so ask first whether its host is there.
    endpoint = huggingface_hub.constants.ENDPOINT
    reason = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else _unreachable(endpoint)
    if not reason:
        try:
            return timm.create_model(tag, pretrained=True, pretrained_cfg_overlay=overlay)
        except (OSError, RuntimeError) as error:
            reason = _line(error)
    raise InputError(
        f"the weights of {tag} are neither in the cache ({huggingface_hub.constants.HF_HUB_CACHE}) nor to be had "
        f"({reason}); give a local file with --checkpoint, or set HF_HOME or HF_HUB_CACHE to a cache that holds them"
    )


def _unreachable(url: str) -> str:
    """Why the host of `url` cannot be reached within seconds; empty if it can, or if a proxy stands between."""
    address = urlsplit(url)
    if address.scheme in urllib.request.getproxies():
        return ""
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=5):
            return ""
    except OSError as error:
        return f"{address.hostname}: {error.strerror or error}"
