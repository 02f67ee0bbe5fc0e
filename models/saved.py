"""Quantized models as files: integers in safetensors, to be loaded again; ONNX, to be deployed."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

import utils.run.environment
from models.zoo import build_architecture, class_names, data_config, model_tag, timm_tag
from quant import quantizer_bits
from quant.convert import place_quantizers, swap_layers
from quant.integers import integer_state, load_integer_state
from quant.onnx import to_onnx
from quant.recipes import PAPER, Recipe
from utils.run.distributed import by_first
from utils.run.errors import InputError
from utils.run.files import read_tensors, replacing

FORMAT_VERSION = 1
_KEY = "psaq-vit"  # of the header among safetensors' metadata


def describe(model: nn.Module, name: str) -> dict:
    """What a deployed file says of its model: name, tag, classes, image size, preprocessing, bits, recipe, versions."""
    return {
        "model": name,
        "tag": model_tag(name),
        "num_classes": model.num_classes,
        "img_size": list(model.patch_embed.img_size),
        "model_args": getattr(model, "model_args", {}),
        "transform": data_config(model),
        "class_names": class_names(model),
        "bits": quantizer_bits(model),
        "recipe": asdict(model.recipe) if hasattr(model, "recipe") else None,
        "versions": utils.run.environment.versions(),
    }


def save_quantized(path: Path, model: nn.Module, name: str) -> None:
    """Write a calibrated model, built by the name `name`, to a .safetensors file."""
    state = integer_state(model)
    header = {"format_version": FORMAT_VERSION, **describe(model, name)}
    header["sha256"] = _digest(header, state)
    with replacing(path) as draft:
        draft.write_bytes(save(state, {_KEY: json.dumps(header)}))


def export_onnx(path: Path, model: nn.Module, name: str, int4: bool = False) -> None:
    """Write a calibrated or a float model, built by the name `name`, to an .onnx file; see quant.onnx.to_onnx.

    What `describe` says of it is among the file's metadata.
    """
    graph = to_onnx(model, int4)
    graph.metadata_props.add(key=_KEY, value=json.dumps(describe(model, name)))
    with replacing(path) as draft:
        draft.write_bytes(graph.SerializeToString())


@by_first
def write_models(
    quantized: nn.Module,
    float_model: nn.Module | None,
    name: str,
    save: Path | None = None,
    onnx: Path | None = None,
    int4: bool = False,
) -> None:
    """Write a calibrated model, built by the name `name`, to the files that are asked for, and tell how large they are.

    Args:
        float_model: is written beside the ONNX file, as FILE.float.onnx; None for none.
    """
    if save:
        save_quantized(save, quantized, name)
    if onnx:
        export_onnx(onnx, quantized, name, int4)
    if onnx and float_model:
        export_onnx(onnx.with_suffix(".float.onnx"), float_model, name)
    for file in filter(None, (save, onnx)):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def read_onnx_header(path: Path) -> dict:
    """What `describe` said of the model in a file that `export_onnx` wrote."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    except DecodeError as error:
        raise InputError(f"{path}: expected a file that --export-onnx wrote; got no ONNX file ({error})") from error
    if _KEY not in properties:
        raise InputError(f"{path}: expected a file that --export-onnx wrote; got an ONNX file of something else")
    return json.loads(properties[_KEY])


def require_onnx() -> None:
    """Raise an InputError if a package for ONNX is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install -r requirements-export.txt") from error


def load_quantized(path: Path) -> tuple[nn.Module, dict]:
    """Build the model that `save_quantized` wrote, on the CPU; its logits are the same bit for bit.

    Returns:
        The calibrated model in evaluation mode, and the file's header.

    Raises:
        InputError: the file is damaged, truncated, of something else or of another format version.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        state, about = read_tensors(path)
        header = json.loads(about.get(_KEY, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: expected a whole file that --save wrote; got a damaged one ({error})") from error
    version = header.get("format_version")
    if version is None:
        raise InputError(f"{path}: expected a file that --save wrote; got a safetensors file of something else")
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: expected format version {FORMAT_VERSION}; got {version}")
    if header.pop("sha256", None) != _digest(header, state):
        raise InputError(f"{path}: damaged, its content is not what was written (checksum)")
    config = _tuples(header["transform"])
    if names := header.get("class_names"):  # files of older versions have none
        config["label_names"] = tuple(names)
    options = {"num_classes": header["num_classes"], "img_size": tuple(header["img_size"])}
    options |= header.get("model_args", {})  # files of older versions have none
    try:
        model = swap_layers(build_architecture(timm_tag(header["tag"]), config, **options), _recipe(header))
        place_quantizers(model, header["bits"])
        return load_integer_state(model, state), header
    except (
        KeyError,
        ValueError,
        TypeError,
        RuntimeError,
        AttributeError,
    ) as error:  # as of another timm
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path}: does not fit {header['tag']} of this timm ({reason})") from error


def _tuples(values: dict) -> dict:
    """Lists, which is what JSON makes of tuples, are tuples again."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _recipe(header: dict) -> Recipe:
    """The recipe of a file. Older files have none, or one whose `symmetric` is of all activations or of none."""
    if "recipe" not in header:
        return PAPER
    values = _tuples(header["recipe"])
    if isinstance(values["symmetric"], bool):
        values["symmetric"] = ("*",) if values["symmetric"] else ()
    return Recipe(**values)


def _digest(header: dict, state: dict[str, Tensor]) -> str:
    """SHA-256 of the header, and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(header).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy() if tensor.ndim else tensor.numpy())
    return digest.hexdigest()
