"""Folders as transformers writes them: the same logits, or a refusal that says what was expected."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import build_model, class_names, data_config, model_notes, model_tag, zoo
from models.transformers_config import preprocessing
from utils.run.errors import InputError

transformers = pytest.importorskip("transformers")

ROW = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
ROW |= {"patch_size": 8, "num_labels": 7}
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
WINDOWS |= {"num_labels": 7}
NAMES = {"id2label": {index: f"bird {index}" for index in range(7)}}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 99}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "vit": ("ViTForImageClassification", "ViTConfig", ROW),
    "vit without classifier": ("ViTModel", "ViTConfig", ROW),
    "vit, tanh": ("ViTForImageClassification", "ViTConfig", ROW | {"hidden_act": "gelu_pytorch_tanh"}),
    "deit": ("DeiTForImageClassification", "DeiTConfig", ROW),
    "deit with teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", ROW),
    "dinov2": ("Dinov2Model", "Dinov2Config", ROW),
    "dinov2, swiglu": ("Dinov2Model", "Dinov2Config", ROW | {"use_swiglu_ffn": True}),
    "dinov2 with registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", ROW),
    "beit": ("BeitForImageClassification", "BeitConfig", ROW | {"use_relative_position_bias": True}),
    "beit, class token, shared bias": (
        "BeitForImageClassification",
        "BeitConfig",
        ROW | {"use_shared_relative_position_bias": True, "use_mean_pooling": False, "use_mask_token": True},
    ),
    "swin": ("SwinForImageClassification", "SwinConfig", WINDOWS),
    "swinv2": ("Swinv2ForImageClassification", "Swinv2Config", WINDOWS),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", ROW),
    "siglip with classifier": (
        "SiglipForImageClassification",
        "SiglipConfig",
        {"vision_config": ROW, "text_config": TEXT, "num_labels": 7},
    ),
}


@pytest.fixture
def unchecked(monkeypatch):
    """Builds also what cannot be quantized: here it is names that matter."""
    monkeypatch.setattr(zoo, "check_supported", lambda model: None)


def write(folder, key, **more):
    """A folder with a model of random weights, biases and norms too; returns the model."""
    build, config, options = MODELS[key]
    torch.manual_seed(0)
    model = getattr(transformers, build)(getattr(transformers, config)(**options, **more)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("key", MODELS)
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path, unchecked, key):
    theirs, images = write(tmp_path, key), torch.randn(3, 3, 32, 32)
    ours = build_model(f"local-dir:{tmp_path}")
    output = theirs(pixel_values=images)
    if hasattr(output, "logits"):
        expected = output.logits
    else:
        expected = output.pooler_output if key == "siglip" else output.last_hidden_state[:, 0]
    assert ours.num_classes == (7 if hasattr(output, "logits") else 0)
    assert expected.std() > 0.05
    torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)


def test_names_of_classes_and_preprocessing_are_kept(tmp_path):
    write(tmp_path, "vit", **NAMES)
    content = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3, "resample": 3, "size": {"height": 40, "width": 40}}
    content |= {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    model = build_model(f"local-dir:{tmp_path}")
    assert class_names(model) == list(NAMES["id2label"].values()) and not model_notes(model)
    config = data_config(model)
    assert (config["mean"], config["std"], config["interpolation"]) == ((0.1,) * 3, (0.2,) * 3, "bicubic")
    assert (config["crop_pct"], config["crop_mode"], config["input_size"]) == (0.8, "squash", (3, 32, 32))


def test_preprocessing_that_is_not_given_is_told(tmp_path):
    write(tmp_path, "deit")
    model = build_model(f"local-dir:{tmp_path}")
    assert class_names(model) is None and "as usual for deit" in model_notes(model)[0]
    assert model_tag(f"local-dir:{tmp_path}").startswith("vit_base_patch16_224")


def test_preprocessing_of_transformers():
    plain = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224, "resample": 2}
    assert preprocessing(plain) == {
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    shortest = plain | {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224, "do_normalize": False}
    assert preprocessing(shortest)["crop_pct"] == 0.875 and preprocessing(shortest)["crop_mode"] == "center"
    assert preprocessing(shortest)["std"] == (1.0,) * 3
    for change, message in {
        ("rescale_factor", 0.5): "rescale_factor 1/255; got 0.5",
        ("resample", 9): "resample 0 to 5",
        ("size", None): "do_center_crop true",
    }.items():
        with pytest.raises(ValueError, match=message):
            preprocessing(plain | {change[0]: change[1] or {"shortest_edge": 224}})


REFUSED = {
    "dinov2 with classifier": ({"architectures": ["Dinov2ForImageClassification"]}, "expected a dinov2 without"),
    "another type": ({"model_type": "convnext"}, "expected model_type vit, deit.*got convnext"),
    "another activation": ({"hidden_act": "relu"}, "expected hidden_act gelu.*got relu"),
    "one channel": ({"num_channels": 1}, "expected num_channels 3; got 1"),
    "another width": ({"hidden_size": 48, "num_attention_heads": 3}, "not of this architecture"),
    "fewer blocks": ({"num_hidden_layers": 1}, r"unknown \(blocks\.1"),
    "heads that do not divide the width": ({"num_attention_heads": 5}, "has no embed_dim 32.*num_heads 5"),
    "nonsense": ({"hidden_size": "wide"}, "not understood|has no"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path, case):
    change, message = REFUSED[case]
    write(tmp_path, "dinov2")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message) as raised:
        build_model(f"local-dir:{tmp_path}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("swin", {"window_size": 3}, "one window or a multiple of window_size 3; got 16 in one of them"),
        ("swinv2", {"image_size": [32, 64]}, "image_size of a square"),
        ("swin", {"layer_norm_eps": 0.1}, "expected layer_norm_eps 1e-5"),
        ("beit", {"image_size": [32, 64]}, "image_size of a square, with relative positions"),
    ],
)
def test_what_timm_would_compute_otherwise_is_refused(tmp_path, key, change, message):
    write(tmp_path, key)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        build_model(f"local-dir:{tmp_path}")


def test_two_equal_sides_are_a_square(tmp_path):
    write(tmp_path, "swin", **NAMES)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_size": [32, 32]}))
    assert build_model(f"local-dir:{tmp_path}").patch_embed.img_size == (32, 32)


def test_weights_that_are_missing_or_unknown_are_named(tmp_path):
    write(tmp_path, "vit")
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    save_file({**state, "vit.extra": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"1 unknown \(extra\)"):
        build_model(f"local-dir:{tmp_path}")
    state.pop("vit.encoder.layer.1.attention.attention.key.weight")
    save_file(state, path)
    with pytest.raises(InputError, match=r"blocks\.1\.attn"):
        build_model(f"local-dir:{tmp_path}")
