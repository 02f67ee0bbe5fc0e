import os
import pickle
import time

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from models import build_model, data_config, evaluation_transform, model_tag, zoo
from models.checkpoints import load_state
from utils.run.errors import InputError


@pytest.mark.parametrize(
    ("name", "tag"),
    {
        "deit_tiny": "deit_tiny_patch16_224.fb_in1k",
        "deit_small": "deit_small_patch16_224.fb_in1k",
        "deit_base": "deit_base_patch16_224.fb_in1k",
        "swin_tiny": "swin_tiny_patch4_window7_224.ms_in1k",
        "swin_small": "swin_small_patch4_window7_224.ms_in1k",  # timm's default is .ms_in22k_ft_in1k
        "demo_vit": "demo_vit",
        "swin_base_patch4_window7_224.ms_in1k": "swin_base_patch4_window7_224.ms_in1k",
        "deit3_small_patch16_224": "deit3_small_patch16_224.fb_in1k",
    }.items(),
)
def test_names_stand_for_exact_tags(name, tag):
    assert model_tag(name) == tag


@pytest.mark.parametrize(("name", "resize"), [("deit_tiny", 256), ("swin_tiny", 248)])
def test_published_crop_ratio(name, resize):
    model = build_model(name, pretrained=False)
    assert not model.training and model.num_classes == 1000
    first = evaluation_transform(model).transforms[0]
    assert (first.size, first.interpolation.value) == (resize, "bicubic")
    assert data_config(model)["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("name", "size", "classes"),
    [("demo_vit", 64, 50), ("demo_swin", 64, 50), ("cifar_vit", 128, 10), ("cifar_swin", 128, 10)],
)
def test_small_models_see_whole_images(name, size, classes):
    model = build_model(name)
    assert evaluation_transform(model)(Image.new("RGB", (size, size))).shape == (3, size, size)
    assert data_config(model)["crop_pct"] == 1.0 and model.num_classes == classes


@pytest.mark.parametrize(
    ("name", "classes"),
    {
        "deit_tiny_distilled_patch16_224": 1000,
        "vit_tiny_patch16_384": 1000,
        "vit_small_patch14_reg4_dinov2.lvd142m": 0,
    }.items(),
)
def test_other_timm_models_are_built_with_a_classifier_and_without(name, classes):
    assert build_model(name, pretrained=False).num_classes == classes


@torch.no_grad()
def test_a_model_for_images_of_any_size_is_built_for_one():
    name, images = "vit_small_patch16_dinov3", torch.randn(1, 3, 64, 64)
    model, expected = build_model(name, pretrained=False, img_size=64), timm.create_model(name, img_size=64).eval()
    expected.load_state_dict(model.state_dict())
    assert expected.dynamic_img_size and not model.dynamic_img_size
    assert torch.equal(model(images), expected(images))


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "deit_tny": "did you mean deit_tiny",
        "DeiT_base": "did you mean deit_base",
        "deit_tiny_patch16_224.nonsense": "did you mean deit_tiny_patch16_224",
        "??": "expected deit_tiny, deit_small",
        "": "expected deit_tiny, deit_small",
        "resnet50": "cannot be quantized.*ResNet",
        "vit_base_r26_s32_224": "cannot be quantized.*patch_embed",
    }.items(),
)
def test_names_that_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        build_model(name)


def test_weights_from_the_cache_need_no_network(tmp_path, monkeypatch):
    model = timm.create_model("deit_tiny_patch16_224")
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda repo, name, revision: asked.append(repo) or str(path)
    )
    loaded = build_model("deit_tiny")
    assert asked[0] == "timm/deit_tiny_patch16_224.fb_in1k"
    assert torch.equal(loaded.head.weight, model.head.weight)


@pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "no network"])
def test_weights_that_cannot_be_had_are_told_at_once(tmp_path, monkeypatch, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://localhost:1")  # nothing listens there
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names, **options: None)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"--checkpoint.*HF_HOME") as raised:
        build_model("deit_tiny")
    assert "\n" not in str(raised.value) and time.monotonic() - start < 20


@pytest.fixture
def small(monkeypatch):
    """demo_vit and demo_swin have few weights; here they stand for any model."""
    torch.manual_seed(0)
    return build_model("demo_vit", pretrained=False)


@pytest.mark.parametrize(
    ("suffix", "wrapped"), [(".safetensors", None), (".pth", None), (".pth", "model"), (".pth", "state_dict")]
)
def test_local_checkpoints(tmp_path, small, suffix, wrapped):
    path, state = tmp_path / f"weights{suffix}", small.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save({wrapped: state} if wrapped else state, path)
    loaded = build_model("demo_vit", path)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_checkpoint_in_the_swin_authors_format(tmp_path):
    """Their file ends each stage with the downsampling that timm begins the next with, and holds buffers."""
    model = build_model("swin_tiny", pretrained=False)
    old = {}
    for name, value in model.state_dict().items():
        for stage in (1, 2, 3):
            name = name.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample")
        old[name.replace("head.fc.", "head.")] = value
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    old["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    torch.save({"model": old}, tmp_path / "swin.pth")
    loaded = build_model("swin_tiny", tmp_path / "swin.pth")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_number_of_classes_comes_from_the_checkpoint(tmp_path):
    path = tmp_path / "seven.pth"
    torch.save(zoo.SMALL_MODELS["demo_swin"](num_classes=7).state_dict(), path)
    assert build_model("demo_swin", path).num_classes == 7
    torch.save(timm.create_model("deit_tiny_patch16_224", num_classes=7).state_dict(), path)
    assert build_model("deit_tiny", path).num_classes == 7


def refused(path, message, name="demo_vit"):
    with pytest.raises(InputError, match=message) as raised:
        build_model(name, path)
    assert "\n" not in str(raised.value)


def test_checkpoints_that_do_not_fit_are_refused_with_the_keys(tmp_path, small):
    path = tmp_path / "weights.pth"
    refused(tmp_path / "absent.pth", "no such file")
    refused(tmp_path, "no such file")
    state = small.state_dict()
    torch.save({name: value for name, value in state.items() if "blocks.3.attn" not in name}, path)
    refused(path, r"4 keys missing \(blocks\.3\.attn\.qkv\.weight")
    torch.save({**state, "extra.weight": torch.zeros(1)}, path)
    refused(path, r"1 unknown \(extra\.weight\)")
    torch.save({**state, "norm.weight": torch.zeros(7)}, path)
    refused(path, r"norm\.weight: expected \(96,\), got \(7,\)")
    torch.save(build_model("demo_swin", pretrained=False).state_dict(), path)
    refused(path, "not of this architecture")
    torch.save({"epoch": 3}, path)
    refused(path, "found none")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04broken", b"\x80\x04."], ids=str)
def test_damaged_checkpoints_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    refused(path, str(path))


@pytest.mark.parametrize(
    "content",
    [torch.zeros(2), [1, 2], "text", None, {1: torch.zeros(1)}, {"model": 5}, {"state_dict": torch.zeros(1)}],
    ids=lambda content: str(type(content)),
)
def test_files_without_a_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth", "not a readable file of weights|found none")


def test_truncated_checkpoints_are_refused(tmp_path, small):
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"weights{suffix}"
        save_file(small.state_dict(), path) if suffix == ".safetensors" else torch.save(small.state_dict(), path)
        path.write_bytes(path.read_bytes()[:5000])
        refused(path, str(path))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_cannot_execute_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        path = tmp_path / "evil.pth"
        save({"model": Evil()}, path)
        refused(path, "more than weights|not a readable file")
    assert not (tmp_path / "executed").exists()


def test_model_without_converter_is_loaded_by_its_own_names(tmp_path):
    model = nn.Linear(2, 2)
    load_state(model, {"weight": torch.ones(2, 2), "bias": torch.ones(2)}, "file")
    assert model.bias.tolist() == [1.0, 1.0]
