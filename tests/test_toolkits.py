"""Other toolkits: scripts/toolkits.py, and the code that docs/toolkits.md prints."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models import build_model
from models.saved import export_onnx
from quant import calibrate, quantize_model
from quant.recipes import INPUTS
from utils.images import draw_noise, save_images
from utils.run.errors import InputError

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from scripts import runtimes, toolkits, vendors  # noqa: E402
from scripts.pages.recipes import rivals_table  # noqa: E402
from scripts.pages.toolkits import latency_table, toolkits_table  # noqa: E402

PAGE = (Path(toolkits.ROOT) / "docs" / "toolkits.md").read_text()
BLOCKS = dict(re.findall(r"\n## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGE, re.DOTALL))
# What each block needs, and where it leaves the quantized model: in a file, or as `quantized`
NEEDS = {
    "ONNX Runtime": ("onnxruntime", "int8.onnx"),
    "NNCF and OpenVINO": ("nncf", "int8.xml"),
    "ModelOpt, torch": ("modelopt", None),
    "ModelOpt, ONNX": ("modelopt.onnx", "int8.onnx"),
    "torchao, PT2E": ("torchao", None),
    "Brevitas": ("brevitas", None),
    "AIMET": ("aimet_torch", None),
    "Quark": ("quark", "int8.onnx"),
    "Neural Compressor": ("neural_compressor", None),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """demo_vit in float, as torch and as ONNX, and calib.npy, as generate_data.py writes it, in one folder."""
    folder = tmp_path_factory.mktemp("demo")
    source = runtimes.FloatModel("demo_vit", build_model("demo_vit"), folder / "demo_vit.float.onnx")
    export_onnx(source.onnx, source.model, source.name)
    images = draw_noise(4, (64, 64), 0)
    save_images(folder / "calib.npy", torch.zeros(3, 1, 1), torch.ones(3, 1, 1), images)
    return source


def check_agreement(predict, source):
    """An int8 model is near the float one, and is not it."""
    images = draw_noise(8, (64, 64), 1)
    with torch.no_grad():
        logits, expected = torch.as_tensor(np.asarray(predict(images))), source.model(images)
    assert 0 < (logits - expected).norm() / expected.norm() < 0.3


def test_page_has_a_block_for_each_toolkit():
    assert BLOCKS.keys() == NEEDS.keys()
    assert all(len(code.splitlines()) < 30 and "calib.npy" in code for code in BLOCKS.values())


@pytest.mark.parametrize("name", NEEDS)
def test_printed_code_calibrates(name, demo, monkeypatch):
    module, file = NEEDS[name]
    pytest.importorskip(module)
    monkeypatch.chdir(demo.onnx.parent)
    names = {"__name__": "printed"}
    exec(BLOCKS[name], names)
    if file:
        runtime = "onnxruntime" if file.endswith(".onnx") else "openvino"
        check_agreement(runtimes.RUNTIMES[runtime](Path(file), 1), demo)
    else:
        check_agreement(names["quantized"], demo)


def test_our_graphs_run_in_openvino_as_in_onnx_runtime(demo, tmp_path):
    pytest.importorskip("openvino")
    images = draw_noise(8, (64, 64), 1)
    for call in (vendors.OURS, vendors.BEST):
        path, _ = call(demo, draw_noise(4, (64, 64), 0), tmp_path, (8, 8))
        first, second = (runtimes.RUNTIMES[name](path, 1)(images) for name in ("onnxruntime", "openvino"))
        with torch.no_grad():
            noise = (first - demo.model(images)).norm()
        # Not the best classes, which may tie, as logits are on a grid
        assert (first - second).norm() < min(0.05 * first.norm(), 0.5 * noise)


def test_openvino_multiplies_integers_in_every_product_of_best(demo, tmp_path):
    openvino = pytest.importorskip("openvino")
    path, _ = vendors.BEST(demo, draw_noise(4, (64, 64), 0), tmp_path, (8, 8))
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    about = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    kinds = [(str(info["layerType"].value), str(info["runtimePrecision"].value)) for info in about]
    products = [precision for kind, precision in kinds if kind in ("FullyConnected", "MatMul", "Subgraph")]
    assert len(products) >= 5 * len(demo.model.blocks) and set(products) <= {"u8", "i8"}  # attention's are a Subgraph


def test_openvino_fuses_what_follows_a_product_of_swin(tmp_path):
    openvino = pytest.importorskip("openvino")
    model = calibrate(quantize_model(build_model("demo_swin"), recipe=INPUTS), draw_noise(2, (64, 64), 0))
    export_onnx(tmp_path / "swin.onnx", model, "demo_swin")
    compiled = openvino.Core().compile_model(tmp_path / "swin.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    about = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    inside = {str(info["layerType"].value) for info in about if "gelu" in str(info["originalLayersNames"].value)}
    assert inside == {"FullyConnected"}


FEWER = [name for name, toolkit in vendors.TOOLKITS.items() if toolkit.bits != vendors.EIGHT]


@pytest.mark.parametrize("name", [name for name in FEWER if name != "brevitas-learned-round"])  # that takes minutes
def test_fewest_bits_move_the_logits_most(name, demo, tmp_path):
    toolkit = vendors.TOOLKITS[name]
    if toolkit.missing():
        pytest.skip(f"needs {', '.join(toolkit.missing())}")
    images, errors = draw_noise(8, (64, 64), 1), []
    with torch.no_grad():
        expected = demo.model(images)
    for bits in dict.fromkeys((toolkit.bits[0], toolkit.bits[-1])):
        program, files = toolkit.quantize(demo, draw_noise(4, (64, 64), 0), tmp_path, bits)
        logits = runtimes.RUNTIMES[toolkit.runtime](program, 1)(images)
        errors.append(((logits - expected).norm() / expected.norm()).item())
        assert all(file.parent == tmp_path and file.stat().st_size for file in files)
    assert 0 < errors[0] < 0.3 and errors == sorted(set(errors))


def test_signals_are_still_handled_after_nncf_has_compressed(demo, tmp_path):
    pytest.importorskip("nncf")
    lines = [
        "import signal, subprocess, sys, torch; from pathlib import Path",
        "from scripts import runtimes, vendors",
        "signal.signal(signal.SIGCHLD, lambda number, frame: None)",  # as a loader with workers sets one
        "source = runtimes.FloatModel('demo_vit', None, Path(sys.argv[1]))",
        "vendors.compress_nncf(source, torch.randn(2, 3, 64, 64), Path(sys.argv[2]), (4, 16))",
        "print(subprocess.run(['true']))",
    ]
    command = [sys.executable, "-c", "\n".join(lines), demo.onnx, tmp_path]
    assert subprocess.run(command, cwd=toolkits.ROOT, capture_output=True).returncode == 0


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["toolkits.py", *map(str, arguments)])
    toolkits.main()


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_measured_once_and_failures_are_rows(tmp_path, image_root, monkeypatch, capsys):
    size, rows = build_model("demo_vit").patch_embed.img_size, tmp_path / "rows.csv"
    save_images(tmp_path / "demo_vit-3.npy", torch.zeros(3, 1, 1), torch.ones(3, 1, 1), draw_noise(5, size, 0))
    line = ["--model", "demo_vit", "--dataset", image_root, "--limit", 4, "--calib-batchsize", 2, "--seed", 3]
    line += ["--rows", rows, "--images", tmp_path / "{model}-{seed}.npy"]
    call(monkeypatch, *line, "--toolkit", "ort", "--kinds", *toolkits.KINDS)
    call(monkeypatch, *line, "--toolkit", "ours", "ort", "--kinds", "noise")
    first = read(rows)
    expected = [("ort", kind) for kind in toolkits.KINDS]
    assert [(row["toolkit"], row["images"]) for row in first] == [*expected, ("ours", "noise")]
    for row in first:
        assert row["error"] == "" and row["n"] == "4" and 0 <= float(row["top1"]) <= 100 and row["float_top1"]
        assert int(row["bytes"]) < 0.35 * int(row["float_bytes"]) and "onnxruntime" in row["versions"]
        assert (row["w_bit"], row["a_bit"]) == ("8", "8") and float(row["quantize_s"]) > 0
    assert len({row["bytes"] for row in first}) > 1  # other images, other ranges: other zero points

    def fail(*arguments):
        raise RuntimeError("\nno such operator\nand so on")

    call(monkeypatch, *line, "--toolkit", "ours", "ort", "--kinds", "noise", "--bits", "8/8", "4/8")
    four = read(rows)[-1]
    assert read(rows)[:-1] == first and [four[key] for key in ("toolkit", "w_bit", "a_bit")] == ["ort", "4", "8"]
    assert int(four["bytes"]) < 0.8 * int(first[0]["bytes"])
    first = read(rows)

    monkeypatch.setitem(vendors.TOOLKITS, "broken", vendors.Toolkit(fail, "onnxruntime"))
    monkeypatch.setattr(toolkits, "installed", lambda names: {name: vendors.TOOLKITS[name] for name in names})
    for _ in range(2):
        call(monkeypatch, *line, "--limit", 3, "--toolkit", "ours", "broken", "--kinds", "noise")
    *before, fewer, broken = read(rows)
    assert before == first and broken["error"] == "RuntimeError: no such operator"
    assert (fewer["toolkit"], fewer["n"], broken["n"]) == ("ours", "3", "3")  # of other photographs: another row
    table = toolkits_table([row | {"calibration_images": "32"} for row in (*first, broken)])
    assert "| broken | onnxruntime | - | failed | - | - | - | - |" in table
    assert "broken on demo_vit failed: `RuntimeError: no such operator`" in table
    assert f"| {float(first[-2]['top1']):.2f} | " in table


def test_latencies_are_of_int8_and_float_in_one_runtime(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.evaluate_onnx.SECONDS", 0.1)
    monkeypatch.setattr("scripts.evaluate_onnx.TURN", 0.01)
    monkeypatch.setattr(toolkits, "available_cores", lambda: 1)
    line = ["--model", "demo_vit", "--toolkit", "ours", "ort", "--latency", "--latency-rows", tmp_path / "rows.csv"]
    for _ in range(2):
        call(monkeypatch, *line)
    found = read(tmp_path / "rows.csv")
    assert [(row["toolkit"], row["threads"], row["batch"]) for row in found] == [
        (name, "1", batch) for batch in ("1", "8") for name in ("ours", "ort")
    ]
    assert all(float(row["ms"]) > 0 and float(row["float_ms"]) > 0 and not row["error"] for row in found)
    assert "| ort | onnxruntime | " in latency_table(found)


def test_what_is_not_installed_is_left_out_or_refused_by_name(monkeypatch, capsys):
    broken = vendors.Toolkit(None, "torch", {"no_such_module": "no-such-package"})
    monkeypatch.setattr(toolkits, "TOOLKITS", {"ort": vendors.TOOLKITS["ort"], "absent": broken})
    assert list(toolkits.installed(None)) == ["ort"]
    (said,) = capsys.readouterr().out.splitlines()
    assert "not installed, left out: absent" in said and "requirements-toolkits.txt" in said
    with pytest.raises(InputError, match=r"absent needs no-such-package, not installed: pip install -r requirements-t"):
        toolkits.installed(["ort", "absent"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model", "demo_vit"], "--images: expected files of generated images"),
        (["--model", "demo_vit", "--random"], "--random: goes with --latency"),
        (["--model", "demo_vit", "--images", "absent-{seed}.npy"], r"--images absent-0\.npy: no such file"),
        (["--model", "deit_tiny", "--kinds", "noise"], "expected --dataset"),
        (["--model", "demo_vit", "demo_swin", "--checkpoint", "w.pth"], "--checkpoint: goes with one model; got 2"),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments, reason, monkeypatch):
    monkeypatch.setattr(toolkits, "build_model", lambda *arguments: pytest.fail("builds the model"))
    with pytest.raises(InputError, match=reason):
        call(monkeypatch, *arguments)


def test_tables_have_a_line_for_what_was_not_run():
    assert toolkits_table([]) == latency_table([]) == "Not run yet."
    row = dict.fromkeys(toolkits.COLUMNS, "") | {
        "model": "m",
        "toolkit": "t",
        "w_bit": "8",
        "a_bit": "8",
        "n": "50",
        "float_top1": "70",
        "images": "generated",
    }
    rows = [
        row | {"calibration_images": str(n), "top1": str(60 + n), "seed": str(seed)} for n in (8, 32) for seed in (0, 1)
    ]
    rows[-1]["top1"] = "94"
    last = row | {"calibration_images": "32", "top1": "1", "seed": "0"}
    text = toolkits_table([*rows, last | {"toolkit": "u"}, last | {"w_bit": "4", "top1": "1.23"}])
    assert "1.23" not in text  # this table is of 8 bits
    assert "| m | u |" not in text  # one number of images is no comparison
    assert "| m (70.00, 50) | t |  | - | - | - | - | 93.00 ± 1.41 | - |" in text
    assert "| m | t | 68.00 ± 0.00 | 93.00 ± 1.41 |" in text and "mean and standard deviation of 2;" in text


def test_rivals_stand_beside_the_recipes_on_the_same_images():
    ours = {"model": "m", "float_top1": "80", "w_bit": "4", "a_bit": "4"}
    recipes = [ours | {"recipe": "best", "seed": str(seed), "top1": str(76 + seed)} for seed in (0, 1, 2)]
    recipes += [ours | {"recipe": "best - rotate", "seed": "0", "top1": "1"}]
    assert rivals_table(recipes, []) == ""
    about = {"model": "m weights", "images": "generated", "calibration_images": "32", "error": "", "versions": "x 1"}
    rival = ours | about | {"toolkit": "ort", "top1": "40"}
    rows = [rival | {"seed": "0"}, rival | {"seed": "1", "top1": "44"}, rival | {"seed": "0", "images": "real"}]
    rows += [rival | {"toolkit": "brevitas", "seed": "0", "top1": "", "error": "RuntimeError: no"}]
    rows += [rival | {"toolkit": "nncf", "seed": "1", "w_bit": "8", "a_bit": "8"}, rival | {"model": "other"}]
    lines = rivals_table(recipes, [row | {"seed": row.get("seed", "0")} for row in rows]).splitlines()
    assert lines[0] == "| percent of float top-1 | quantized | W8/A8 | W4/A4 |"
    assert lines[2:6] == [
        "| m, best | all products | - | 95.62 ± 0.88 |",
        "| m, ort | all products | - | 52.50 ± 3.54 |",
        "| m, nncf | all products | 50.00 | - |",
        "| m, brevitas | layers | - | failed |",
    ]
    assert "mean and standard deviation of 2;" in lines[-1] and "32 generated images; x 1." in lines[-1]
