"""Runs of several processes, started as users start them: by torchrun."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# Forks processes with the variables that torchrun sets, where each start under torchrun would import torch anew
FORKS = """
import json, multiprocessing, os, socket, sys
from pathlib import Path
import torch
from timm.models.vision_transformer import VisionTransformer
import test_quant
from generate_data import GenerationSettings, generate_data
from utils.data import UNREADABLE
from utils.loader import Shard, image_loader
from utils.run.distributed import is_first, process_group, world_size
from utils.run.errors import exit_cleanly
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

def share(output):
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
    with process_group():
        counts = [evaluate({"model": model}, image_loader(Shard(Fixed(n)), 4, workers=0)) for n in (3, 10, 101)]
        losses = []
        settings = GenerationSettings(steps=2, batch_size=2)
        images = generate_data(model, 7, settings=settings, losses=losses, progress=False)
        print("processes:", world_size(), flush=True)
        if is_first():
            Path(output).write_text(json.dumps([counts, losses, images.tolist()]))

def call_test_quant(*line):
    sys.argv[1:] = line
    exit_cleanly(test_quant.main)

def process(rank, environment, log, job, *arguments):
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    job(*arguments)

def fork(count, log, job, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start = multiprocessing.get_context("fork").Process
    processes = [start(target=process, args=(n, environment, log, job, *arguments)) for n in range(count)]
    [process.start() for process in processes]
    [process.join(60) for process in processes]
    return [process.exitcode for process in processes]

folder, lines = Path(sys.argv[1]), json.loads(sys.argv[2])
codes = {n: fork(n, folder / f"{n}", share, folder / f"{n}.json") for n in (1, 2, 3, 7)}
codes |= {name: fork(2, folder / name, call_test_quant, *line) for name, line in lines.items()}
(folder / "codes.json").write_text(json.dumps(codes))
"""

BAD = {
    "line": (["--mode", "5"], "error: argument --mode: invalid choice: 5"),
    "model": (["--mode", "1", "--skip-layers", "nothing"], "error: --skip-layers: 'nothing' matches no quantizer"),
    "images": (["--images", __file__], "error: "),
    "load": (["--load", __file__], "error: "),
}
DIES = """
from utils.run.distributed import gather, process_group, rank
with process_group():
    if rank() == 1:
        raise ValueError("the reason")
    gather(0)
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
def forked(tmp_path_factory, image_root):
    """The folder in which FORKS has left its logs and results."""
    folder = tmp_path_factory.mktemp("forked")
    common = ["--model", "demo_vit", "--device", "cpu", "--dataset", str(image_root), "--output-dir", str(folder / "o")]
    lines = {name: common + line for name, (line, _) in BAD.items()} | {"help": ["--help"]}
    command = [sys.executable, "-c", FORKS, str(folder), json.dumps(lines)]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=170)
    return folder


def shared(folder, processes):
    assert json.loads((folder / "codes.json").read_text())[str(processes)] == [0] * processes
    assert (folder / f"{processes}.out").read_text() == f"processes: {processes}\n"  # once
    return json.loads((folder / f"{processes}.json").read_text())


def test_one_process_sees_all(forked):
    (three, ten, more), losses, images = shared(forked, 1)
    assert [result["n"] for result in (three, ten, more)] == [3, 9, 99]
    assert ten["unreadable"] == ["4.png"] and more["unreadable"] == ["4.png", "97.png"]
    assert len(losses) == 4 * 4 and len(images) == 7


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_share_the_work_and_count_the_same(forked, processes):
    """Also where some have nothing to do: of three images, and of four batches."""
    assert shared(forked, processes) == shared(forked, 1)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_once(forked, name):
    first, other = json.loads((forked / "codes.json").read_text())[name]
    lines = (forked / f"{name}.err").read_text().splitlines()
    assert first == 2 and other == 1 and len(lines) == 1 and lines[0].startswith(BAD[name][1])


def test_help_is_printed_once_and_is_no_failure(forked):
    assert json.loads((forked / "codes.json").read_text())["help"] == [0, 0]
    assert (forked / "help.out").read_text().count("usage: ") == 1 and not (forked / "help.err").read_text()


def test_a_process_that_dies_ends_the_others_with_its_reason(tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    process = torchrun(2, tmp_path / "dies.py")
    assert process.returncode != 0
    reasons = [line for line in process.stderr.splitlines() if re.match(r"\[rank\d\]: \w*Error", line)]
    assert reasons == ["[rank1]: ValueError: the reason"]


def test_test_quant_reports_and_writes_once(tmp_path, image_root):
    line = ["test_quant.py", "--model", "demo_vit", "--steps", "1", "--limit", "20", "--calib-batchsize", "4"]
    line += ["--mode", "0", "--num-workers", "0", "--device", "cpu", "--dataset", image_root, "--output-dir"]
    command = [sys.executable, *map(str, line), str(tmp_path / "one")]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as one:
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
