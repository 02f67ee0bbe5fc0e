"""Names to models: the paper's five, the project's own, those of timm, and folders with a config.json."""

import dataclasses
import difflib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform, resolve_data_config
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from models.checkpoints import first_line, input_options, load_state, num_classes, read_checkpoint
from models.folders import folder_source
from models.hub import CACHE_HELP, WEIGHTS, cached_file, unreachable
from models.naflex import at_size
from models.small import SMALL_MODELS
from models.source import Source
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
_FOLDER = Path(__file__).parent
_BUILD_ERRORS = (TypeError, ValueError, AssertionError, RuntimeError, AttributeError, LookupError, ArithmeticError)


def build_model(
    name: str, checkpoint: str | Path | None = None, pretrained: bool = True, img_size: int | None = None
) -> nn.Module:
    """Build a timm model in evaluation mode, on the CPU.

    The number of classes and the image size are those of the weights. A model without classifier has num_classes 0,
    and gives the pooled feature.

    Args:
        name: one of PAPER_MODELS or SMALL_MODELS, a timm name, local-dir:FOLDER or hf-hub:OWNER/NAME.
        checkpoint: weights from a file (.pth or .safetensors, also the DeiT and Swin authors' own) instead of timm's
            or the folder's.
        pretrained: with no checkpoint: trained weights, or random ones for tests and benchmarks.
        img_size: another image size, in pixels, than that of the weights; timm resamples positions for it, and
            `model_notes` says so.

    Raises:
        InputError: unknown name, weights that cannot be had, a checkpoint or an image size that does not fit.
    """
    source = find_source(name)
    outline = _outline(source)  # before anything is downloaded
    if checkpoint is None and source.weights and pretrained:
        checkpoint = source.weights()
    state = source.convert(read_checkpoint(checkpoint)) if checkpoint else None
    options = dict(source.options)
    if getattr(outline, "dynamic_img_size", False):  # else positions are computed anew, on the host, in each pass
        options["dynamic_img_size"] = False
    if state is not None:
        try:
            options |= {"num_classes": num_classes(state), **input_options(outline, state)}
        except ValueError as error:
            raise InputError(f"checkpoint {checkpoint}: {error}") from error
    if img_size:
        trained = _size(options.get("img_size", outline.patch_embed.img_size))
        options["img_size"] = _check_size(img_size, outline)
    try:
        if state is None and pretrained:
            model = _download(source.tag, source.config, options)
        else:
            model = _create(source.tag, source.config, options)
    except _BUILD_ERRORS as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"--model {name}: timm's {source.tag} has no {_told(options)} ({first_line(error)})"
        ) from error
    if state is not None:
        load_state(model, state, checkpoint, resample=bool(img_size))
    model = _of_one_size(model, options)
    model.notes = [*source.notes]
    if not model.num_classes:
        model.notes.append("no classifier: images are generated without L_OH, and embeddings are compared")
    if img_size and trained != model.patch_embed.img_size:
        (height, width), side = trained, model.patch_embed.img_size[0]
        model.notes.append(f"{side} x {side} pixels: timm has resampled positions of {height} x {width}")
    return model.eval()


def build_architecture(tag: str, config: dict, **options: Any) -> nn.Module:
    """A model with random weights, in evaluation mode.

    Args:
        tag: a small model's name, or a timm name.
        config: what differs from timm's data configuration of the model, as in `data_config`.
        options: arguments of the constructor, such as num_classes and img_size; norm_eps is the epsilon of all norms.
    """
    return _of_one_size(_create(tag, config, options), options)


def find_source(name: str) -> Source:
    """What a name stands for. Unknown names are refused."""
    if source := folder_source(name):
        return dataclasses.replace(source, tag=timm_tag(source.tag))
    if name in SMALL_MODELS:
        return Source(name, weights=lambda: _FOLDER / f"{name}.safetensors")
    if name in PAPER_MODELS:
        tag, crop_pct = PAPER_MODELS[name]
        return Source(tag, {"crop_pct": crop_pct})
    return Source(timm_tag(name))


def model_tag(name: str) -> str:
    """The exact timm name, with its tag, of a model; a small model's is its own name. Unknown names are refused."""
    return find_source(name).tag


def short_name(name: str) -> str:
    """A model's name as it can stand in that of a file: of a folder or a repository, the last part."""
    return name.partition("@")[0].rstrip("/").rpartition("/")[2] if name.startswith(("local-dir:", "hf-hub:")) else name


def timm_tag(name: str) -> str:
    """The exact name of an architecture, with its tag: of timm, or a small model's. Unknown names are refused."""
    if name in SMALL_MODELS:
        return name
    try:
        known = timm.is_model(name) and timm.models.get_pretrained_cfg(name)
    except (RuntimeError, ValueError):  # a tag that the model does not have, or a path
        known = None
    if not known:
        ours = [*PAPER_MODELS, *SMALL_MODELS]
        near = difflib.get_close_matches(name, ours, 3, 0.6) or difflib.get_close_matches(
            name, timm.list_models() + timm.list_pretrained(), 3, 0.6
        )
        expected = f"expected {', '.join(ours)}, a timm name, local-dir:FOLDER or hf-hub:OWNER/NAME"
        hint = f"did you mean {' or '.join(near)}?" if near else expected
        raise InputError(f"unknown model '{name}': {hint}")
    return f"{known.architecture}.{known.tag}" if known.tag else known.architecture


def data_config(model: nn.Module) -> dict:
    """timm's data configuration of a model: input_size, interpolation, mean, std, crop_pct, crop_mode."""
    height, width = model.patch_embed.img_size
    return resolve_data_config({"input_size": (3, height, width)}, model=model)


def evaluation_transform(model: nn.Module) -> Callable:
    """Resize, centre crop, normalise: PIL image -> (3, H, W)."""
    return create_transform(**data_config(model), is_training=False)


def resized_size(model: nn.Module) -> tuple[int, int]:
    """The size (H, W) to which the evaluation transform resizes a square image, before it crops the centre."""
    config = data_config(model)
    height, width = config["input_size"][1:]
    crop = 1.0 if config["crop_mode"] == "border" else config["crop_pct"]  # a border is added, nothing cropped
    return math.floor(height / crop), math.floor(width / crop)


def normalization(model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a model's pixels, each (3, 1, 1); ImageNet's for no model."""
    config = data_config(model) if model else {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return tuple(torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))


def class_names(model: nn.Module) -> list[str] | None:
    """What config.json calls the classes of a model, in the order of its outputs; None where it does not."""
    names = getattr(model, "pretrained_cfg", {}).get("label_names")
    if isinstance(names, dict):  # from the index, as text
        names = [names.get(str(index), str(index)) for index in range(model.num_classes)]
    return [str(name) for name in names] if names and len(names) == model.num_classes else None


def model_notes(model: nn.Module) -> list[str]:
    """What a run is to say of a model from `build_model`: resampled positions, preprocessing that was not given."""
    return list(getattr(model, "notes", []))


def _create(tag: str, config: dict, options: dict) -> nn.Module:
    """`build_architecture`, but that a model for any image size stays one."""
    arguments = {key: value for key, value in options.items() if key != "norm_eps"}
    if tag in SMALL_MODELS:
        model = SMALL_MODELS[tag](**arguments)
        model.pretrained_cfg = {"crop_pct": 1.0, **config}  # images of exactly the model's size, as in its training
    else:
        model = timm.create_model(tag, pretrained_cfg_overlay=config, **arguments)
    if "norm_eps" in options:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = options["norm_eps"]
    model.model_args = {key: value for key, value in options.items() if key not in ("num_classes", "img_size")}
    return model.eval()


def _of_one_size(model: nn.Module, options: dict) -> nn.Module:
    """The model, for images of the size that options or its own configuration name."""
    if not isinstance(model, NaFlexVit):
        return model
    vit = at_size(model, _size(options.get("img_size") or model.pretrained_cfg["input_size"][1:]))
    vit.model_args = getattr(model, "model_args", {})
    return vit


def _outline(source: Source) -> nn.Module:
    """The model on the meta device, refused if it cannot be quantized."""
    try:
        with torch.device("meta"):
            model = build_architecture(source.tag, source.config, **source.options)
        check_supported(model)
        if (channels := model.patch_embed.proj.in_channels) != 3:
            raise UnsupportedModelError(f"expected a model of RGB images; it reads {channels} channels")
        if model.global_pool == "":
            raise UnsupportedModelError("expected one feature of an image, or logits; global_pool '' gives all tokens")
    except UnsupportedModelError as error:
        raise InputError(f"{source.tag} cannot be quantized: {error}") from error
    except _BUILD_ERRORS as error:
        raise InputError(f"timm's {source.tag} has no {_told(source.options)} ({first_line(error)})") from error
    return model


def _check_size(img_size: int, outline: nn.Module) -> tuple[int, int]:
    patch = max(outline.patch_embed.patch_size)
    if img_size < patch or (img_size % patch and (img_size, img_size) != tuple(outline.patch_embed.img_size)):
        raise InputError(f"--img-size: expected a multiple of {patch}, the side of a patch; got {img_size}")
    return img_size, img_size


def _size(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _told(options: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items()) or "default arguments"


def _download(tag: str, overlay: dict, options: dict) -> nn.Module:
    """timm's pretrained model: from the local cache where it is there, else from the hub."""
    config = timm.models.get_pretrained_cfg(tag)
    if not (config.hf_hub_id or config.url):
        raise InputError(f"{tag} has no pretrained weights; name them with --checkpoint FILE")
    if config.hf_hub_id:
        repo, _, revision = f"{config.hf_hub_id}{tag if config.hf_hub_id.endswith('/') else ''}".partition("@")
        names = (config.hf_hub_filename,) if config.hf_hub_filename else WEIGHTS
        if cached := cached_file(repo, names, revision or None):
            overlay = {**overlay, "file": str(cached)}
            return timm.create_model(tag, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    reason = unreachable()
    if not reason:
        try:
            return timm.create_model(tag, pretrained=True, pretrained_cfg_overlay=overlay, **options)
        except (OSError, RuntimeError) as error:
            reason = first_line(error)
    raise InputError(f"the weights of {tag} are {CACHE_HELP.format(reason=reason)}")
