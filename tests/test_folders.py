"""Folders as timm writes them, and repositories of the hub, which are folders once they are in the cache."""

import json

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import save_for_hf

from models import build_model, class_names, data_config, hub, model_tag
from models.saved import load_quantized, save_quantized
from quant import calibrate, quantize_model
from utils.run.errors import InputError

LABELS = [f"bird {index}" for index in range(7)]
DATA = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.9, "interpolation": "bilinear"}


def write(folder, **config):
    torch.manual_seed(0)
    options = {"num_classes": 7, "img_size": 96, "depth": 1, "embed_dim": 48, "num_heads": 3, "reg_tokens": 2}
    model = timm.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay=DATA, **options).eval()
    model.head.bias.data.normal_()
    save_for_hf(
        model,
        folder,
        safe_serialization=True,
        model_config={"label_names": LABELS} | config,
        model_args={key: value for key, value in options.items() if key != "num_classes"},
    )
    return model


@torch.no_grad()
def test_a_folder_of_timm_is_the_model_that_was_saved(tmp_path):
    theirs, images = write(tmp_path), torch.randn(2, 3, 96, 96)
    ours = build_model(f"local-dir:{tmp_path}")
    assert torch.equal(ours(images), theirs(images))
    assert model_tag(f"local-dir:{tmp_path}").startswith("vit_tiny_patch16_224")
    config = data_config(ours)
    assert {key: config[key] for key in DATA} == DATA and config["input_size"] == (3, 96, 96)
    assert class_names(ours) == LABELS


@torch.no_grad()
def test_a_folder_of_an_older_timm_is_read(tmp_path):
    theirs, path = write(tmp_path), tmp_path / "config.json"
    config = json.loads(path.read_text())
    flat = {**config["pretrained_cfg"], "architecture": config["architecture"], "model_args": config["model_args"]}
    path.write_text(json.dumps(flat))
    images = torch.randn(2, 3, 96, 96)
    assert torch.equal(build_model(f"local-dir:{tmp_path}")(images), theirs(images))


@torch.no_grad()
def test_a_model_of_a_folder_is_saved_and_loaded(tmp_path):
    write(tmp_path)
    name, images = f"local-dir:{tmp_path}", torch.randn(2, 3, 96, 96)
    model = calibrate(quantize_model(build_model(name)), images)
    save_quantized(tmp_path / "saved.safetensors", model, name)
    loaded, header = load_quantized(tmp_path / "saved.safetensors")
    assert torch.equal(loaded(images), model(images)) and data_config(loaded) == data_config(model)
    assert header["tag"].startswith("vit_tiny_patch16_224") and header["model_args"]["reg_tokens"] == 2
    assert class_names(loaded) == header["class_names"] == LABELS


def test_a_repository_of_the_hub_is_read_from_the_cache(tmp_path, monkeypatch):
    write(tmp_path)

    def cached(repo, name, revision=None):
        assert (repo, revision) == ("someone/birds", "v2")
        return str(tmp_path / name) if (tmp_path / name).exists() else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert class_names(build_model("hf-hub:someone/birds@v2")) == LABELS


def test_a_repository_that_cannot_be_had_is_told(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names, **options: None)
    with pytest.raises(InputError, match=r"config\.json is neither in the cache.*HF_HUB_OFFLINE is set"):
        build_model("hf-hub:someone/birds")


def test_of_several_files_the_first_that_the_hub_has_is_taken(tmp_path, monkeypatch):
    def download(repo, name, revision=None):
        if name == "config.json":
            raise LocalEntryNotFoundError("no network")
        if name == "model.safetensors":
            raise EntryNotFoundError("404")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names, **options: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "unreachable", lambda: "")
    assert hub.hub_file("someone/birds", hub.WEIGHTS) == tmp_path / "pytorch_model.bin"
    assert hub.hub_file("someone/birds", ("model.safetensors",)) is None
    with pytest.raises(InputError, match=r"config\.json is neither in the cache.*no network"):
        hub.hub_file("someone/birds", ("config.json",))


VIT = {"architecture": "vit_tiny_patch16_224"}
CONFIGS = {
    "no such name": ({"architecture": "vit_nonsense"}, "unknown model 'vit_nonsense'"),
    "a source as architecture": ({"architecture": "local-dir:."}, "unknown model 'local-dir:.'"),
    "no architecture": ({"x": 1}, r"expected timm's \(architecture\) or transformers' \(model_type\)"),
    "no dictionary": ([1], "expected an object in config.json; got list"),
    "not quantized": ({"architecture": "resnet18"}, "cannot be quantized"),
    "unknown argument": ({"architecture": "vit_tiny_patch16_224", "model_args": {"x": 1}}, "has no x 1"),
    "two means": (VIT | {"mean": [0.5, 0.5]}, r"mean: expected three numbers; got \(0.5, 0.5\)"),
    "no deviation": (VIT | {"std": [0, 1, 1]}, "std: expected three positive numbers"),
    "crop as text": (VIT | {"crop_pct": "0.9"}, "crop_pct: expected a positive number; got '0.9'"),
    "interpolation": (VIT | {"interpolation": "random"}, "interpolation: expected nearest.*; got 'random'"),
    "names": (VIT | {"label_names": 5}, "label_names: expected a list or an object; got 5"),
    "a download": (VIT | {"model_args": {"pretrained": True}}, "expected arguments of the model; got pretrained"),
    "grey images": (VIT | {"model_args": {"in_chans": 1}}, "expected a model of RGB images; it reads 1 channels"),
    "all tokens": (VIT | {"model_args": {"global_pool": ""}}, "global_pool '' gives all tokens"),
    "wrong kind": ({"architecture": "vit_tiny_patch16_224", "model_args": 5}, "not understood"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_is_not_understood_is_refused(tmp_path, case):
    content, message = CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as raised:
        build_model(f"local-dir:{tmp_path}")
    assert "\n" not in str(raised.value)


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(InputError, match="there is no such folder"):
        build_model(f"local-dir:{tmp_path / 'absent'}")
    with pytest.raises(InputError, match=r"expected config\.json"):
        build_model(f"local-dir:{tmp_path}")
    with pytest.raises(InputError, match="expected hf-hub:OWNER/NAME"):
        build_model("hf-hub:birds")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not readable"):
        build_model(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    with pytest.raises(InputError, match=r"expected model\.safetensors or pytorch_model\.bin"):
        build_model(f"local-dir:{tmp_path}")
