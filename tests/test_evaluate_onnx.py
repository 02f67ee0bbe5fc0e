"""scripts/evaluate_onnx.py, and the commands that make what it measures."""

import argparse
import json
import sys

import pytest
import torch
from torch.utils.data import DataLoader

import test_quant
from models.saved import read_onnx_header
from test_quant import run
from utils.options import parse_run
from utils.run.errors import InputError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from scripts import evaluate_onnx  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory, image_root):
    """A run of test_quant.py with --save and --export-onnx."""
    folder = tmp_path_factory.mktemp("deployed")
    options = ["--model", "demo_vit", "--mode", "1", "--calib-batchsize", "4", "--num-workers", "0", "--device", "cpu"]
    options += ["--dataset", image_root, "--output-dir", folder / "run", "--limit", "4"]
    run(parse_run([*map(str, options), "--save", f"{folder}/m.safetensors", "--export-onnx", f"{folder}/m.onnx"]))
    return folder


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate_onnx.py", *map(str, arguments)])
    monkeypatch.setattr(evaluate_onnx, "SECONDS", 0.1)
    monkeypatch.setattr(evaluate_onnx, "TURN", 0.01)
    evaluate_onnx.main()


def test_everything_is_measured(folder, image_root, monkeypatch, capsys):
    call(monkeypatch, folder / "m.onnx", "--dataset", image_root, "--simulated", folder / "m.safetensors",
         "--limit", 30, "--threads", 1, "--json", folder / "m.json")  # fmt: skip
    results = json.loads((folder / "m.json").read_text())
    assert results["model"] == "demo_vit" and results["n"] == 30 and results["threads"] == 1
    assert set(results["top1"]) == {"onnx", "float", "simulated"} and results["same_as_onnx"]["simulated"] > 90
    assert set(results["latency_ms"]) == {"1", "8"} and results["bytes"]["onnx"] < 0.35 * results["bytes"]["float"]
    assert sum(results["products"]["integer"].values()) == 6 * 5 + 2 and sum(results["products"]["float"].values()) == 6
    assert {"torch", "timm", "onnx", "onnxruntime"} < set(results["versions"]) and results["machine"]
    printed = capsys.readouterr().out
    assert "products in integers: 32" in printed and "the method leaves softmax's output in float" in printed


def test_random_weights_will_do_for_latencies(monkeypatch, capsys):
    call(monkeypatch, "--random", "demo_swin")
    assert "products in integers: 47" in capsys.readouterr().out


def test_a_model_without_classifier_has_no_accuracy(folder, image_root):
    options = argparse.Namespace(file=folder / "m.onnx", dataset=None, limit=None)
    header = {**read_onnx_header(folder / "m.onnx"), "num_classes": 0}
    assert evaluate_onnx.open_images(options, header) is None  # though demo_vit has images of its own
    options.dataset = image_root
    with pytest.raises(InputError, match=r"--dataset: .*m\.onnx has no classifier"):
        evaluate_onnx.open_images(options, header)


def test_header_names_the_model(folder):
    header = read_onnx_header(folder / "m.onnx")
    assert (header["model"], header["num_classes"], header["img_size"]) == ("demo_vit", 50, [64, 64])


def test_agreement_and_accuracy_are_counted_by_image():
    logits = torch.eye(4)
    loader = DataLoader([(torch.tensor(float(i)), i if i != 2 else 0, i) for i in range(4)], batch_size=3)
    models = {
        "onnx": lambda images: logits[images.long()],
        "simulated": lambda images: logits[images.long().clamp(max=2)],
    }
    measured = evaluate_onnx.measure_accuracy(models, loader)
    assert measured["n"] == 4 and measured["top1"] == {"onnx": 75.0, "simulated": 50.0}
    assert measured["same_as_onnx"] == {"simulated": 75.0}


def test_what_is_no_such_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), tmp_path / "other.onnx")
    for arguments, reason in {
        ("absent.onnx",): "absent.onnx: no such file",
        (tmp_path / "bad.onnx",): "got no ONNX file",
        (tmp_path / "other.onnx",): "got an ONNX file of something else",
        (): "expected either FILE.onnx or --random NAME",
    }.items():
        with pytest.raises(InputError, match=reason):
            call(monkeypatch, *arguments)


@pytest.mark.parametrize("key", ["img_size", "bits"])
def test_files_of_another_model_are_refused(folder, monkeypatch, tmp_path, key):
    header = read_onnx_header(folder / "m.onnx")
    other = {**header[key], "act_input": 3} if key == "bits" else [32, 32]
    monkeypatch.setattr(evaluate_onnx, "load_quantized", lambda path: (None, {**header, key: other}))
    (tmp_path / "m.onnx").write_bytes((folder / "m.onnx").read_bytes())
    with pytest.raises(InputError, match=f"m.safetensors: of another model: expected {key} "):
        evaluate_onnx.evaluate_onnx(tmp_path / "m.onnx", header, None, folder / "m.safetensors", 1)


def test_a_float_file_of_another_model_is_refused(folder, monkeypatch, tmp_path):
    graph = onnx.load(folder / "m.float.onnx")
    (entry,) = [entry for entry in graph.metadata_props if "num_classes" in entry.value]
    entry.value = entry.value.replace('"num_classes": 50', '"num_classes": 49')
    onnx.save(graph, tmp_path / "m.float.onnx")
    (tmp_path / "m.onnx").write_bytes((folder / "m.onnx").read_bytes())
    with pytest.raises(InputError, match=r"m\.float\.onnx: of another model: expected num_classes 50; got 49"):
        evaluate_onnx.evaluate_onnx(tmp_path / "m.onnx", read_onnx_header(folder / "m.onnx"), None, None, 1)


def test_export_without_its_packages_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(test_quant, "build_model", lambda *arguments: pytest.fail("builds the model"))
    with pytest.raises(InputError, match=r"onnxscript is not installed: pip install -r requirements-export\.txt"):
        run(parse_run(["--model", "demo_vit", "--export-onnx", str(tmp_path / "m.onnx")]))


def test_a_loaded_model_is_exported_to_the_same_graph(folder, monkeypatch):
    monkeypatch.setattr(test_quant, "DATASETS", {})  # which would bring their own data set
    run(parse_run(["--load", f"{folder}/m.safetensors", "--export-onnx", f"{folder}/again.onnx", "--device", "cpu"]))
    first, again = (onnx.load(folder / name) for name in ("m.onnx", "again.onnx"))
    assert [tensor.raw_data for tensor in first.graph.initializer] == [
        tensor.raw_data for tensor in again.graph.initializer
    ]
    assert not (folder / "again.float.onnx").exists()
