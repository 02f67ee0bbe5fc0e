"""Folders that hold a model: config.json and weights, as timm or transformers write them."""

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from models.hub import WEIGHTS, hub_file
from models.source import Source
from models.transformers_config import INTERPOLATIONS, convert_config
from models.transformers_names import convert_state
from utils.run.errors import InputError

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_KNOWN = {field.name for field in fields(PretrainedCfg)}
# Arguments of timm.create_model that are not the model's: some would read a file or the network
_OF_FACTORY = {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
_OF_FACTORY |= {"features_only", "scriptable", "exportable", "no_jit"}
_PLACES = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"}  # of weights

Finder = Callable[[tuple[str, ...]], Path | None]  # finds the first of several files


def folder_source(name: str) -> Source | None:
    """What `local-dir:FOLDER` or `hf-hub:OWNER/NAME` stands for; None for a name of another form.

    Raises:
        InputError: config.json or weights are not to be had, or not understood.
    """
    kind, _, place = name.partition(":")
    if kind == "local-dir":
        if not Path(place).is_dir():
            raise InputError(f"--model {name}: expected a folder with {CONFIG}; there is no such folder")
        return _read(name, lambda files: _local_file(Path(place), files))
    if kind == "hf-hub":
        if "/" not in place:
            raise InputError(f"--model {name}: expected hf-hub:OWNER/NAME")
        return _read(name, lambda files: hub_file(place, files))
    return None


def _read(name: str, find: Finder) -> Source:
    """The source in a folder, of timm or of transformers: its config.json tells which."""

    def weights() -> Path:
        path = find(WEIGHTS)
        if path is None:
            raise InputError(f"--model {name}: expected {' or '.join(WEIGHTS)} beside {CONFIG}; found none")
        return path

    config = _read_json(name, find((CONFIG,)))
    try:
        if "model_type" in config:
            path = find((PREPROCESSOR,))
            architecture, settings, options, notes = convert_config(config, _read_json(name, path) if path else None)
            return Source(architecture, settings, options, weights, lambda state: convert_state(config, state), notes)
        return Source(*_timm_config(config), weights=weights)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"--model {name}: {CONFIG} is not understood: {reason}") from error


def _timm_config(config: dict[str, Any]) -> tuple[str, dict, dict]:
    """Architecture, data configuration and constructor's arguments of timm's config.json, of the older form too."""
    if not isinstance(config.get("architecture"), str):
        raise ValueError("expected timm's (architecture) or transformers' (model_type)")
    inner = config.get("pretrained_cfg", config)
    settings = {key: value for key, value in inner.items() if key in _KNOWN - _PLACES and value is not None}
    settings |= {key: config[key] for key in ("label_names", "label_descriptions") if key in config}
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    options = {key: value for key, value in config.get("model_args", {}).items() if value is not None}
    if "num_classes" in config or "num_classes" in inner:
        options["num_classes"] = settings["num_classes"] = config.get("num_classes", inner.get("num_classes"))
    if config.get("global_pool"):
        options.setdefault("global_pool", config["global_pool"])
    _check_settings(settings)
    if foreign := sorted(_OF_FACTORY & options.keys()):
        raise ValueError(f"model_args: expected arguments of the model; got {', '.join(foreign)}")
    if "input_size" in settings:
        options.setdefault("img_size", settings["input_size"][1:])
    return config["architecture"], settings, options


def _check_settings(settings: dict[str, Any]) -> None:
    """Refuse values of a data configuration that timm would stumble over, or compute nonsense with."""
    for key in ("mean", "std"):
        values = settings.get(key, (0.5,) * 3)
        if not (isinstance(values, tuple) and len(values) == 3 and all(map(_is_finite, values))):
            raise ValueError(f"{key}: expected three numbers; got {values}")
    if min(settings.get("std", (1,))) <= 0:
        raise ValueError(f"std: expected three positive numbers; got {settings['std']}")
    if not _is_finite(crop := settings.get("crop_pct", 1.0)) or crop <= 0:
        raise ValueError(f"crop_pct: expected a positive number; got {crop!r}")
    if (interpolation := settings.get("interpolation", "bicubic")) not in INTERPOLATIONS:
        raise ValueError(f"interpolation: expected {', '.join(INTERPOLATIONS)}; got {interpolation!r}")
    if not isinstance(settings.get("label_names", ()), tuple | dict):
        raise ValueError(f"label_names: expected a list or an object; got {settings['label_names']!r}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _local_file(folder: Path, files: tuple[str, ...]) -> Path | None:
    return next((folder / file for file in files if (folder / file).is_file()), None)


def _read_json(name: str, path: Path | None) -> dict:
    if path is None:
        raise InputError(f"--model {name}: expected {CONFIG}; found none")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--model {name}: {path.name} is not readable ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"--model {name}: expected an object in {path.name}; got {type(content).__name__}")
    return content
