"""The command line of test_quant.py, end to end on the small demo models."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Subset

import test_quant
from models import build_model, evaluation_transform, model_notes
from models.small import SMALL_MODELS
from test_quant import run
from utils import photographs
from utils.data import Images
from utils.evaluate import evaluate
from utils.options import parse_run
from utils.run.errors import InputError
from utils.run.files import locked
from utils.run.options import available_cores

ROOT = Path(test_quant.__file__).parent
QUICK = ["--steps", "2", "--calib-batchsize", "4", "--num-workers", "0", "--device", "cpu"]


def quick(*arguments, model="demo_vit"):
    return run(parse_run(["--model", model, *QUICK, *map(str, arguments)]))


@pytest.fixture(autouse=True)
def no_demo_data(monkeypatch):
    """These tests bring their own data set; the demo's is not written for them."""
    monkeypatch.setattr(photographs, "write_demo_data", lambda root: pytest.fail("writes the demo data"))


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("model", ["demo_vit", "demo_swin"])
def test_a_run_leaves_its_results(tmp_path, image_root, capsys, mode, model):
    results = quick("--dataset", image_root, "--output-dir", tmp_path, "--mode", mode, "--w_bit", 4, model=model)
    assert results == json.loads((tmp_path / "results.json").read_text())
    expected = {"model": model, "tag": model, "w_bit": 4, "a_bit": 8, "mode": mode, "seed": 0, "n": 100}
    assert {key: results[key] for key in expected} == expected
    for key in ("top1", "top5", "float_top1", "float_top5"):
        assert 0 <= results[key] <= 100
    assert results["top5"] >= results["top1"]
    assert set(results["seconds"]) == {"build", "images", "quantize", "calibrate", "evaluate"}
    assert set(results["versions"]) == {"python", "torch", "torchvision", "timm"}
    assert results["device"].startswith("cpu") and "commit" in results and results["options"]["steps"] == 2
    ranges = json.loads((tmp_path / "ranges.json").read_text())
    assert ranges and all(low <= high for low, high in ranges.values())
    images = {"images.safetensors", "images.png"} if mode != 2 else set()
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "ranges.json"} | images
    printed = capsys.readouterr().out
    assert f"{results['float_top1']:.2f}" in printed and f"{results['top1']:.2f}" in printed and "W4/A8" in printed


def test_same_seed_same_results_and_images(tmp_path, image_root):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = (quick("--dataset", image_root, "--output-dir", tmp_path / name) for name in ("a", "b"))
    assert first["top1"] == second["top1"]
    for name in ("images.safetensors", "images.png", "ranges.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_saved_images_replace_generation(tmp_path, image_root):
    first = quick("--dataset", image_root, "--output-dir", tmp_path / "a")
    images = tmp_path / "a" / "images.safetensors"
    second = quick("--dataset", image_root, "--output-dir", tmp_path / "b", "--images", images, "--steps", 400)
    assert second["top1"] == first["top1"] and second["calibration_images"] == 4
    assert (first["precision"], second["precision"]) == ("fp32", None)  # of what another run made nothing is known
    assert (tmp_path / "a" / "ranges.json").read_bytes() == (tmp_path / "b" / "ranges.json").read_bytes()


@pytest.mark.parametrize("mode", [0, 1])
def test_without_a_data_set_the_models_are_compared_on_held_out_images(tmp_path, vit, capsys, monkeypatch, mode):
    monkeypatch.setattr(test_quant, "DATASETS", {})  # which would bring their own data set
    monkeypatch.setattr(test_quant, "HELD_OUT", 3)
    results = quick("--output-dir", tmp_path, "--mode", mode)
    assert results["top1"] is None and results["float_top1"] is None and results["n"] == 0
    assert 0 <= results["agreement"] <= 100 and results["logit_error"] > 0
    tensors = load_file(tmp_path / "images.safetensors")
    assert tensors["images"].shape[0] == 4 and tensors["held_out"].shape[0] == 3
    assert not torch.equal(tensors["images"][:3], tensors["held_out"])
    assert "accuracy was not measured" in capsys.readouterr().out


def test_limit_is_the_number_of_images_counted(tmp_path, image_root):
    assert quick("--dataset", image_root, "--output-dir", tmp_path, "--mode", 1, "--limit", 7)["n"] == 7


def test_photographs_by_name_come_from_an_archive_and_then_from_data(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "DATA", tmp_path / "data")
    for split in ("train", "test"):
        for name in photographs.PHOTOGRAPHS["cifar10"].classes:
            (tmp_path / "mine" / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), "green").save(tmp_path / "mine" / split / name / "0.png")
    torch.save(SMALL_MODELS["demo_vit"](num_classes=10).state_dict(), tmp_path / "ten.pth")
    arguments = ["--checkpoint", tmp_path / "ten.pth", "--mode", 1, "--dataset", "cifar10"]
    first = quick(*arguments, "--output-dir", tmp_path / "a", "--dataset-archive", tmp_path / "mine")
    again = quick(*arguments, "--output-dir", tmp_path / "b")
    assert first["n"] == again["n"] == 10 and first["top1"] == again["top1"] == 10  # ten images alike, ten classes
    with pytest.raises(
        InputError, match="--dataset-archive: goes with --dataset cifar10 or imagenette; got --dataset demo"
    ):
        quick("--dataset-archive", tmp_path / "mine")


def test_unreadable_images_fail_the_run_at_its_end_unless_skipped(tmp_path, image_root):
    root = shutil.copytree(image_root, tmp_path / "data")
    (root / "val" / "class_03" / "0.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"1 images are not readable .*class_03/0\.png.*--skip-bad"):
        quick("--dataset", root, "--output-dir", tmp_path / "a", "--mode", 1)
    results = json.loads((tmp_path / "a" / "results.json").read_text())  # nothing is lost
    assert results["n"] == 99
    assert (
        quick("--dataset", root, "--output-dir", tmp_path / "b", "--mode", 1, "--skip-bad")
        | {key: results[key] for key in ("options", "seconds", "date")}
        == results
    )


def test_out_of_memory_in_calibration_is_told(tmp_path, image_root, monkeypatch):
    def calibrate(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(test_quant, "calibrate", calibrate)
    with pytest.raises(InputError, match="out of memory in calibration; expected more memory, or a smaller --calib"):
        quick("--dataset", image_root, "--output-dir", tmp_path)


def test_skipped_images_are_reported_and_none_left_is_refused(tmp_path, image_root, capsys):
    root = shutil.copytree(image_root, tmp_path / "data")
    for file in list((root / "val").glob("*/*"))[:7]:
        file.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"7 images are not readable .*\.\.\., all in .*results\.json"):
        quick("--dataset", root, "--output-dir", tmp_path / "a", "--mode", 1)
    quick("--dataset", root, "--output-dir", tmp_path / "a", "--mode", 1, "--skip-bad")
    assert "93 images in" in (printed := capsys.readouterr().out) and "7 unreadable images skipped" in printed
    for file in (root / "val").glob("*/*"):
        file.write_bytes(b"broken")
    with pytest.raises(InputError, match="100 images are not readable"):
        quick("--dataset", root, "--output-dir", tmp_path / "a", "--mode", 1, "--skip-bad")


def test_a_class_map_lets_a_subset_in_another_order_be_evaluated(tmp_path, image_root):
    names = {f"part {label}": f"class_{label:02d}" for label in (41, 5, 17)}
    for new, old in names.items():
        shutil.copytree(image_root / "val" / old, tmp_path / "data" / "val" / new)
    arguments = ["--dataset", tmp_path / "data", "--mode", 1, "--output-dir", tmp_path / "a"]
    with pytest.raises(InputError, match=r"expected 50 class folders.*found 3 \(.*--class-map"):
        quick(*arguments)
    (tmp_path / "map").write_text("".join(f"{new} {old[-2:]}\n" for new, old in names.items()))
    mapped = quick(*arguments, "--class-map", tmp_path / "map")
    images = Images(image_root, "val", evaluation_transform(build_model("demo_vit")))
    kept = [index for index, label in enumerate(images.labels) if label in (5, 17, 41)]
    expected = evaluate({"float": build_model("demo_vit")}, DataLoader(Subset(images, kept), 4))
    assert (mapped["n"], mapped["float_top1"], mapped["float_top5"]) == (6, *list(expected.values())[2:])


def test_two_runs_never_write_into_one_folder(tmp_path, image_root):
    with locked(tmp_path), pytest.raises(InputError, match="another run writes there"):
        quick("--dataset", image_root, "--output-dir", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--output-dir", "--cache"])
def test_a_disk_too_small_is_refused_before_generation(tmp_path, image_root, monkeypatch, option):
    monkeypatch.setattr(test_quant, "generate_data", lambda *arguments: pytest.fail("generates images"))
    (tmp_path / "full").mkdir()
    usage = shutil.disk_usage(tmp_path)
    full = lambda folder: usage._replace(free=2**20 + 1000 if Path(folder).name == "full" else usage.free)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", full)
    others = ["--output-dir", tmp_path / "a"] if option == "--cache" else []
    with pytest.raises(InputError, match=r"full: expected \d MiB of free space; the disk has 1"):
        quick("--dataset", image_root, *others, option, tmp_path / "full", "--calib-batchsize", 32)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model demo_vit --class-map absent", "--class-map: goes with --dataset; got none"),
        ("--model demo_vit --dataset . --class-map absent", "--class-map absent: no such file"),
        ("--model deit_tny", "did you mean deit_tiny"),
        ("--model demo_vit --checkpoint absent.pth", "--checkpoint absent.pth: no such file"),
        ("--model demo_vit --images absent.safetensors", "--images absent.safetensors: no such file"),
        ("--model demo_vit --images absent.safetensors --mode 1", "--images: goes with --mode 0"),
        ("--model demo_vit --dataset absent", "--dataset absent: no such folder"),
        ("--model demo_vit --compile --checkpoint-activations", "--compile: got --checkpoint-activations with it"),
        ("--model deit_tiny --mode 2", "--mode 2 calibrates on real images: expected --dataset"),
        ("--model demo_vit --device cuda:99", "--device cuda:99"),
        ("--model demo_vit --output-dir test_quant.py/x", "expected a folder to write to"),
        ("--model demo_vit --checkpoint overview.png --save ./overview.png", "expected a file that is not read, or"),
        ("--model demo_vit --save x.float.onnx --export-onnx x.onnx", "x.float.onnx: expected a file that is not read"),
        (
            "--model demo_vit --output-dir docs --save docs/images.safetensors",
            "images.safetensors: expected a file that",
        ),
    ],
)
def test_bad_input_is_refused_before_any_work(monkeypatch, line, message):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(test_quant, "build_model", lambda *arguments: pytest.fail("builds the model"))
    with pytest.raises(InputError, match=message):
        run(parse_run(line.split()))


def test_a_data_set_of_other_classes_is_refused_before_generation(tmp_path, image_root, monkeypatch):
    monkeypatch.setattr(test_quant, "generate_data", lambda *arguments: pytest.fail("generates images"))
    checkpoint = tmp_path / "seven.pth"
    torch.save(SMALL_MODELS["demo_vit"](num_classes=7).state_dict(), checkpoint)
    with pytest.raises(InputError, match="expected 7 class folders, as the classifier has; found 50"):
        quick("--checkpoint", checkpoint, "--dataset", image_root, "--output-dir", tmp_path)


def shell(*arguments, **options):
    command = [sys.executable, "test_quant.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


def test_bad_input_exits_with_two_and_one_line():
    process = shell("--model", "deit_tny", "--w_bit", 4)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr == "error: unknown model 'deit_tny': did you mean deit_tiny?\n"


def test_help_names_every_option_with_its_default():
    process = shell("--help")
    assert process.returncode == 0
    text = " ".join(process.stdout.split())
    for default in ("(deit_tiny)", "(8)", "(0)", "(32)", "(200)", "(16)", "(100)", "(500)", "(all)"):
        assert default in text
    for option in ("--model", "--dataset", "--w_bit", "--w-bit", "--a_bit", "--mode", "--checkpoint", "--images"):
        assert option in text
    groups = (
        "what the paper has:",
        "calibration images:",
        "model files:",
        "evaluation:",
        "how it is computed:",
        "output:",
    )
    places = [text.index(group) for group in groups]
    assert places == sorted(places)
    for option in ("--model NAME", "--dataset DIR", "--w_bit BITS", "--a_bit BITS", "--mode {0,1,2}"):
        assert places[0] < text.index(option, places[0]) < places[1]


def test_torchvision_that_does_not_fit_is_told_in_one_line(tmp_path):
    """A torchvision that fails on import, as one built for another torch does."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    process = shell(env={"PYTHONPATH": str(tmp_path), "PATH": ""})
    assert process.returncode == 2
    assert process.stderr.startswith("error: torch ") and "do not fit" in process.stderr
    assert len(process.stderr.splitlines()) == 1


def test_another_system_is_told_in_one_line():
    command = "import sys; sys.platform = 'win32'; import test_quant"
    process = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == "error: expected Linux or macOS; got Windows, on which WSL is a Linux\n"


@pytest.mark.parametrize(("package", "found"), [("torch", "2.10.1"), ("timm", "0.9.16"), ("timm", "2.0.0")])
def test_versions_out_of_range_are_refused_before_they_are_imported(tmp_path, package, found):
    metadata = tmp_path / f"{package}-{found}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {found}\n")
    (tmp_path / f"{package}.py").write_text("raise AssertionError('is imported')")
    process = shell(env={"PYTHONPATH": str(tmp_path), "PATH": ""})
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith(f"error: expected {package} ") and f"found {found}; run: pip" in process.stderr
    assert len(process.stderr.splitlines()) == 1


def test_ctrl_c_ends_with_130_and_no_traceback(tmp_path, image_root):
    command = [sys.executable, "test_quant.py", "--model", "demo_vit", "--dataset", image_root, "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--output-dir", tmp_path], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert "demo_vit: W8/A8" in process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def children(pid):
    """Living child processes, by Linux's /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_worker_is_left_behind_and_none_is_more_than_the_cores(tmp_path, image_root):
    """Each run is stopped while a worker waits for ever, for an image that is a pipe."""
    root = shutil.copytree(image_root, tmp_path / "data")
    os.mkfifo(root / "val" / "class_00" / "2.png")
    command = [sys.executable, "test_quant.py", *QUICK, "--num-workers", 64, "--model", "demo_vit", "--mode", 1]
    command += ["--dataset", root, "--print-freq", 1, "--output-dir"]
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
    runs = [
        subprocess.Popen([*map(str, command), tmp_path / number.name], cwd=ROOT, stderr=subprocess.PIPE)
        for number in signals
    ]
    try:
        for process, number in zip(runs, signals, strict=True):
            wait_until(lambda process=process: len(children(process.pid)) == available_cores())
            time.sleep(1)  # for one that too many would be started in
            workers = children(process.pid)
            assert len(workers) == available_cores()
            process.send_signal(number)
            process.communicate(timeout=60)
            assert process.returncode != 0
            wait_until(lambda workers=workers: not any(map(alive, workers)))
    finally:
        for process in runs:
            process.kill()


def test_workers_get_by_with_next_to_no_shared_memory(tmp_path, image_root):
    if not shutil.which("unshare"):
        pytest.skip("no unshare")
    mount = 'mount -t tmpfs -o size=256k tmpfs /dev/shm || exit 99; exec "$@"'
    arguments = [*QUICK, "--num-workers", 2, "--model", "demo_vit", "--mode", 1, "--dataset", image_root]
    arguments += ["--output-dir", tmp_path, "--cache", tmp_path / "cache"]
    command = ["unshare", "-m", "sh", "-c", mount, "-", sys.executable, "test_quant.py", *map(str, arguments)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if process.returncode in (1, 99) and ("unshare" in process.stderr or "mount" in process.stderr):
        pytest.skip("may not mount")
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    expected = quick("--model", "demo_vit", "--mode", 1, "--dataset", image_root, "--output-dir", tmp_path / "a")
    assert [results[key] for key in ("n", "top1", "top5")] == [expected[key] for key in ("n", "top1", "top5")]


def test_plots_are_drawn(tmp_path, image_root):
    pytest.importorskip("matplotlib")
    quick("--dataset", image_root, "--output-dir", tmp_path, "--plots")
    for name in ("generation.png", "ranges.png", "noise.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_plots_without_matplotlib_are_refused_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(test_quant, "build_model", lambda *arguments: pytest.fail("builds the model"))
    with pytest.raises(InputError, match=r"--plots needs matplotlib: pip install -r requirements-plots\.txt"):
        quick("--plots")


@pytest.mark.parametrize(
    ("recipe", "w_bit", "a_bit", "told"),
    [("learned", 8, 8, True), ("learned", 16, 8, True), ("learned", 8, 4, False), ("best", 8, 8, False)],
)
def test_where_nothing_is_learned_a_line_says_so(recipe, w_bit, a_bit, told):
    options = parse_run(["--model", "demo_vit", "--recipe", recipe, "--w_bit", str(w_bit), "--a_bit", str(a_bit)])
    swapped = test_quant.swap_layers(options, build_model("demo_vit"))
    assert any("nothing is learned" in note for note in model_notes(swapped)) == told


def test_skipped_layers_are_reported(tmp_path, image_root, capsys):
    arguments = [
        "--dataset",
        image_root,
        "--output-dir",
        tmp_path,
        "--mode",
        1,
        "--skip-layers",
        "blocks.0.*",
        "head.*",
    ]
    results = quick(*arguments)
    assert "head.weight" in results["skipped"] and "blocks.0.act_residual1" in results["skipped"]
    assert not any(name.startswith("blocks.1") for name in results["skipped"])
    assert f"{len(results['skipped'])} quantizers left in float" in capsys.readouterr().out
    with pytest.raises(InputError, match="--skip-layers: 'nothing' matches no quantizer"):
        quick(*arguments[:6], "--skip-layers", "nothing")


def test_cached_images_give_the_same_accuracy(tmp_path, image_root):
    arguments = ["--dataset", image_root, "--mode", 1, "--output-dir", tmp_path / "run", "--limit", 30]
    first = quick(*arguments)
    for _ in range(2):
        cached = quick(*arguments, "--cache", tmp_path / "cache")
        assert [cached[key] for key in ("n", "top1", "float_top1")] == [
            first[key] for key in ("n", "top1", "float_top1")
        ]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_saved_model_is_evaluated_without_its_weights(tmp_path, image_root, capsys, monkeypatch):
    arguments = ["--dataset", image_root, "--output-dir"]
    first = quick(*arguments, tmp_path / "a", "--save", tmp_path / "model.safetensors", "--mode", 1, "--w_bit", 4)
    monkeypatch.setattr(test_quant, "build_model", lambda *arguments: pytest.fail("builds the float model"))
    second = quick(*arguments, tmp_path / "b", "--load", tmp_path / "model.safetensors", model="deit_tiny")
    assert {key: second[key] for key in ("model", "n", "top1", "top5")} == {
        key: first[key] for key in ("model", "n", "top1", "top5")
    }
    assert second["bits"]["blocks.0.mlp.fc1.weight"] == 4 and "w_bit" not in second["options"]
    assert second == json.loads((tmp_path / "b" / "results.json").read_text())
    with pytest.raises(InputError, match="holds demo_vit; got --model demo_swin"):
        quick(*arguments, tmp_path / "c", "--load", tmp_path / "model.safetensors", model="demo_swin")
    assert f"top-1 {second['top1']:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--load", "absent.safetensors"], "absent.safetensors: no such file"),
        (["--load", "m.safetensors", "--save", "n.safetensors"], "got --save with it"),
        (["--load", "m.safetensors", "--skip-layers", "*"], "got --skip-layers with it"),
        (["--load", "m.safetensors", "--w_bit", "4"], "got --w_bit 4 with it"),
        (["--load", "m.safetensors", "--recipe", "best"], "got --recipe best with it"),
        (["--onnx-int4"], "--onnx-int4: goes with --export-onnx"),
        (["--save", "test_quant.py/m.safetensors"], "expected a folder to write to"),
    ],
)
def test_bad_use_of_saved_models_is_refused_before_any_work(monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(test_quant, "build_model", lambda *arguments: pytest.fail("builds the model"))
    with pytest.raises(InputError, match=message):
        quick(*arguments)
