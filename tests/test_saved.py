"""Files of quantized models: what is in them, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import saved
from models.saved import load_quantized, save_quantized
from models.zoo import build_model, data_config
from quant import calibrate, quantize_model, quantizer_bits
from quant.recipes import INPUTS
from utils.run.errors import InputError

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["demo_vit", "demo_swin"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def file(tmp_path_factory, name):
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    model = calibrate(quantize_model(build_model(name), 4, 8, ["head.*"]), IMAGES)
    save_quantized(path, model, name)
    return path, model


def test_the_same_model_comes_back(file, name):
    path, model = file
    loaded, header = load_quantized(path)
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert quantizer_bits(loaded) == quantizer_bits(model) and data_config(loaded) == data_config(model)
    assert (header["model"], header["tag"], header["num_classes"]) == (name, name, 50)
    assert header["img_size"] == [64, 64] and set(header["versions"]) == {"python", "torch", "torchvision", "timm"}


def test_older_files_say_symmetric_of_all_activations_or_of_none(tmp_path, name):
    for was, patterns in ((True, ("*",)), (False, ())):
        model = calibrate(quantize_model(build_model(name), 8, 8, recipe=replace(INPUTS, symmetric=patterns)), IMAGES)
        model.recipe = replace(INPUTS, symmetric=was)
        save_quantized(tmp_path / "old.safetensors", model, name)
        loaded, _ = load_quantized(tmp_path / "old.safetensors")
        assert torch.equal(loaded(IMAGES), model(IMAGES)) and loaded.recipe.symmetric == patterns


def test_a_file_is_the_same_byte_for_byte(file, name, tmp_path):
    save_quantized(tmp_path / "again.safetensors", file[1], name)
    assert (tmp_path / "again.safetensors").read_bytes() == file[0].read_bytes()


@pytest.mark.parametrize("w_bit", [8, 4])
def test_size_is_bounded_for_a_model_of_the_paper(tmp_path, w_bit):
    model = build_model("deit_tiny", pretrained=False)
    save_file(model.state_dict(), tmp_path / "float.safetensors")
    quantized = calibrate(quantize_model(model, w_bit, 8), torch.randn(1, 3, 224, 224))
    save_quantized(tmp_path / "integer.safetensors", quantized, "deit_tiny")
    ratio = (tmp_path / "integer.safetensors").stat().st_size / (tmp_path / "float.safetensors").stat().st_size
    assert ratio < {8: 0.27, 4: 0.15}[w_bit]


def test_another_number_of_classes_and_timms_configuration_are_kept(tmp_path):
    seven = saved.build_architecture("deit_tiny_patch16_224.fb_in1k", {}, num_classes=7)
    torch.save(seven.state_dict(), tmp_path / "w")
    model = build_model("deit_tiny", tmp_path / "w")
    images = torch.randn(1, 3, 224, 224)
    calibrate(quantize_model(model), images)
    save_quantized(tmp_path / "model.safetensors", model, "deit_tiny")
    loaded, header = load_quantized(tmp_path / "model.safetensors")
    assert header["num_classes"] == 7 and torch.equal(loaded(images), model(images))
    assert data_config(loaded) == data_config(model) and data_config(loaded)["crop_pct"] == 0.875


def rewrite(path, target, change):
    """Copy a file with its header changed, and the checksum made to fit."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["psaq-vit"])
    state = load_file(path)
    header.pop("sha256")
    change(header, state)
    header["sha256"] = saved._digest(header, state)
    save_file(state, target, {"psaq-vit": json.dumps(header)})


def test_what_is_no_such_file_is_refused(file, tmp_path):
    content, target = file[0].read_bytes(), tmp_path / "bad.safetensors"

    def refused(content, reason):
        if content is not None:
            target.write_bytes(content)
        with pytest.raises(InputError, match=reason) as caught:
            load_quantized(target)
        assert "\n" not in str(caught.value) and "bad.safetensors" in str(caught.value)

    refused(None, "no such file")
    refused(b"", "damaged")
    refused(b"\x80\x04not a model", "damaged")
    refused(content[:-1], "damaged")
    refused(content[:100], "damaged")
    for place in (len(content) - 1, len(content) // 2):  # one bit of a tensor
        refused(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :], "damaged.*checksum")
    refused(content.replace(b'\\"num_classes\\": 50', b'\\"num_classes\\": 51'), "damaged.*checksum")
    save_file(load_file(file[0]), target)
    refused(None, "something else")


def test_another_version_or_architecture_is_refused(file, tmp_path):
    target = tmp_path / "bad.safetensors"
    changes = {
        "expected format version 1; got 2": lambda header, state: header.update(format_version=2),
        "unknown model 'hf-hub:some/model'": lambda header, state: header.update(tag="hf-hub:some/model"),
        "does not fit": lambda header, state: state.pop("patch_embed.proj.bias"),
        r"does not fit .*\(.*act_input": lambda header, state: state.pop("act_input"),
    }
    for reason, change in changes.items():
        rewrite(file[0], target, change)
        with pytest.raises(InputError, match=reason):
            load_quantized(target)
