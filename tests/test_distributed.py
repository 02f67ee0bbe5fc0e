"""Runs of several processes, started as users start them: by torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# Evaluates 3, 10 and 101 images, some of them unreadable, and generates 7 in four batches
SHARED = """
import json, sys
from pathlib import Path
import torch
from timm.models.vision_transformer import VisionTransformer
from generate_data import GenerationSettings, generate_data
from utils.data import UNREADABLE, Shard, image_loader
from utils.distributed import is_first, process_group, rank, world_size
from utils.evaluate import evaluate

class Fixed(torch.utils.data.Dataset):
    def __init__(self, count):
        self.images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self.labels = [UNREADABLE if index in (4, 97) else index % 10 for index in range(count)]
        self.files = [f"{index}.png" for index in range(count)]
    def __len__(self):
        return len(self.files)
    def __getitem__(self, index):
        return self.images[index], self.labels[index], index

torch.manual_seed(0)
model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
with process_group():
    if len(sys.argv) > 2 and rank() == int(sys.argv[2]):
        raise ValueError("the reason")
    counts = [evaluate({"model": model}, image_loader(Shard(Fixed(n)), 4, workers=0)) for n in (3, 10, 101)]
    losses = []
    settings = GenerationSettings(steps=2, batch_size=2)
    images = generate_data(model, 7, settings=settings, losses=losses, progress=False)
    print("processes:", world_size())
    if is_first():
        Path(sys.argv[1]).write_text(json.dumps([counts, losses, images.tolist()]))
"""


def torchrun(processes, *command):
    command = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *map(str, command)]
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """shared(n): the script's output file of a run with n processes."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "shared.py").write_text(SHARED)

    def run(processes):
        output = folder / f"{processes}.json"
        process = torchrun(processes, folder / "shared.py", output)
        assert process.returncode == 0, process.stderr
        assert process.stdout == f"processes: {processes}\n"  # once
        return json.loads(output.read_text())

    return run


@pytest.fixture(scope="module")
def alone(shared):
    return shared(1)


def test_one_process_sees_all(alone):
    (three, ten, more), losses, images = alone
    assert [result["n"] for result in (three, ten, more)] == [3, 9, 99]
    assert ten["unreadable"] == ["4.png"] and more["unreadable"] == ["4.png", "97.png"]
    assert len(losses) == 4 * 4 and len(images) == 7


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_share_the_work_and_count_the_same(shared, alone, processes):
    """Also where some have nothing to do: of three images, and of four batches."""
    assert shared(processes) == alone


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_ends_the_others_with_its_reason(tmp_path, dies):
    (tmp_path / "shared.py").write_text(SHARED)
    process = torchrun(2, tmp_path / "shared.py", tmp_path / "out.json", dies)
    assert process.returncode != 0 and process.stdout == ""
    reasons = [line for line in process.stderr.splitlines() if "Error: " in line and "elastic" not in line]
    assert reasons == [f"[rank{dies}]: ValueError: the reason"]
    assert not (tmp_path / "out.json").exists()


def test_test_quant_reports_and_writes_once(tmp_path, image_root):
    line = ["test_quant.py", "--model", "demo_vit", "--steps", "1", "--limit", "20", "--calib-batchsize", "4"]
    line += ["--mode", "0", "--num-workers", "0", "--device", "cpu", "--dataset", image_root, "--output-dir"]
    one = subprocess.run(
        [sys.executable, *map(str, line), str(tmp_path / "one")], cwd=ROOT, env=ENVIRONMENT, timeout=120
    )
    two = torchrun(2, *line, tmp_path / "two")
    assert one.returncode == two.returncode == 0, two.stderr
    assert two.stdout.count("demo_vit: W8/A8") == two.stdout.count("20 images in") == two.stdout.count("results: ") == 1
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    for key in ("n", "top1", "top5", "float_top1", "float_top5"):
        assert results[0][key] == results[1][key]
    assert results[0]["n"] == 20
    for name in ("images.safetensors", "images.png", "ranges.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1] and sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--mode 5", "error: argument --mode: invalid choice: 5"),
        ("--mode 1 --skip-layers nothing", "error: --skip-layers: 'nothing' matches no quantizer"),
    ],
    ids=["command line", "model"],
)
def test_bad_input_is_told_once(tmp_path, image_root, line, message):
    command = ["test_quant.py", "--model", "demo_vit", "--dataset", image_root, "--output-dir", tmp_path]
    process = torchrun(2, *command, *line.split())
    assert process.returncode != 0 and process.stderr.count("error: ") == process.stderr.count(message) == 1
    assert "[rank" not in process.stderr  # no traceback of a process; torchrun has a report of its own
