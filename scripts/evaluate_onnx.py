"""What an exported model is worth on this machine's CPU: accuracy, latency and size, and what runs in integers.

    python test_quant.py --model demo_vit --save demo.safetensors --export-onnx demo.onnx
    python scripts/evaluate_onnx.py demo.onnx --simulated demo.safetensors

FILE.onnx is compared with FILE.float.onnx, which --export-onnx wrote beside it, where that is there. Without a data set
only latencies are measured; for these --random NAME exports a model with random weights, as they do not matter.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils.run.environment  # isort: skip  # first: a broken installation is told in one line

import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader

from models import DATASETS, build_model
from models.saved import export_onnx, load_quantized, read_onnx_header, require_onnx
from quant import calibrate, quantize_model
from quant.onnx import INPUT
from quant.recipes import INPUTS
from utils.data import UNREADABLE, validation_images
from utils.evaluate import count_correct
from utils.loader import image_loader
from utils.photographs import find_dataset
from utils.run.errors import InputError, exit_cleanly
from utils.run.files import check_writable, write_json
from utils.run.options import Parser, available_cores, own_cores, positive
from utils.run.progress import progress_bar

if TYPE_CHECKING:
    from onnx import GraphProto
    from onnxruntime import InferenceSession

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZES = (1, 8)
SECONDS = 15.0  # of measuring, for each batch size
TURN = 0.2  # seconds of a model in a round, before it is the other's turn
ABOUT = ("tag", "num_classes", "img_size", "transform")  # by which files of one model are known
# ONNX Runtime's operators for products, after its optimisation
INTEGER = {"MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "QLinearConv", "MatMulInteger", "ConvInteger"}
FLOAT = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv", "MatMulNBits"}


def open_session(path: Path, threads: int, optimized: Path | None = None) -> "InferenceSession":
    """A session on the CPU; the graph as ONNX Runtime optimised it is written to `optimized`.

    Its threads stay on a core each, where the system tells the cores: left to itself, now and then it runs all of a
    session's threads on one, and the latency doubles.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float activations stay float
    others = own_cores()[1:threads]  # the first is for the thread that calls
    if threads > 1 and len(others) == threads - 1:
        affinities = ";".join(str(core + 1) for core in others)  # it counts from 1
        options.add_session_config_entry("session.intra_op_thread_affinities", affinities)
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def machine_name() -> str:
    """The processor as it names itself, and whether it multiplies integers in one instruction (VNNI), on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{name} ({'VNNI' if 'vnni' in flags else 'no VNNI'})"


@contextmanager
def on_first_core() -> Iterator[None]:
    """Within the context the calling thread stays on the first of its cores."""
    cores = own_cores()
    if cores:
        os.sched_setaffinity(0, cores[:1])
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


def count_products(graph: "GraphProto") -> dict[str, dict[str, int]]:
    """The products of a graph that ONNX Runtime optimised: "integer" by operator, "float" by the reason for it."""
    producer = {output: node.op_type for node in graph.node for output in node.output}
    integer, floats = Counter(), Counter()
    for node in graph.node:
        if node.op_type in INTEGER:
            integer[node.op_type] += 1
        elif node.op_type in FLOAT:
            sources = {producer.get(name) for name in node.input}
            if "Softmax" in sources:
                floats["softmax's output times the values: the method leaves softmax's output in float"] += 1
            elif node.op_type == "MatMulNBits" or "DequantizeLinear" in sources:
                floats["weights dequantized first: ONNX Runtime has no integer product of these types"] += 1
            else:
                floats["weights or input left in float"] += 1
    return {"integer": dict(integer), "float": dict(floats)}


@on_first_core()
def measure_latency(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds a call in the best round: a round is a turn of each model, a turn's time the median of its calls.

    The round that was disturbed least is taken whole, as a machine may change its pace for seconds: a virtual one
    doubles the times of two threads when both of its processors are put on one core.

    Args:
        calls: by name, each computes the logits of one batch.
    """
    rounds: list[dict[str, float]] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        rounds.append({})
        for name, call in calls.items():
            call()  # not counted: the other's threads may still be spinning
            turn, stop = [], time.perf_counter() + TURN
            while (start := time.perf_counter()) < stop:
                call()
                turn.append(1000 * (time.perf_counter() - start))
            rounds[-1][name] = statistics.median(turn)
    return min(rounds, key=lambda times: sum(times.values()))


@torch.inference_mode()
def measure_accuracy(models: dict[str, Callable[[Tensor], Tensor]], loader: DataLoader) -> dict:
    """Top-1 and top-5 in percent of every model, and how often the others predict what "onnx" does.

    Args:
        models: by name, from images (B, 3, H, W) to logits (B, classes).
        loader: batches of (images, labels, indices) from utils.data.Images; unreadable ones are left out.
    """
    correct = {name: torch.zeros(2, dtype=torch.int64) for name in models}
    same, count = Counter(), 0
    for items in progress_bar(loader, desc="evaluating", unit="batch"):
        images, labels, _ = map(torch.as_tensor, items)  # arrays where the shared memory is small
        readable = labels != UNREADABLE
        images, labels = images[readable], labels[readable]
        logits = {name: model(images) for name, model in models.items()}
        for name in models:
            correct[name] += count_correct(logits[name], labels)
            same[name] += int((logits[name].argmax(1) == logits["onnx"].argmax(1)).sum())
        count += len(labels)
    percent = {name: [100 * hits / max(count, 1) for hits in correct[name].tolist()] for name in models}
    return {
        "n": count,
        "top1": {name: top1 for name, (top1, _) in percent.items()},
        "top5": {name: top5 for name, (_, top5) in percent.items()},
        "same_as_onnx": {name: 100 * same[name] / max(count, 1) for name in models if name != "onnx"},
    }


def check_same(path: Path, found: dict, expected: dict, keys: tuple[str, ...]) -> None:
    """Refuse a file whose header says that it is of another model than the ONNX file's."""
    for key in keys:
        if key in found and key in expected and json.loads(json.dumps(found[key])) != expected[key]:
            raise InputError(f"{path}: of another model: expected {key} {expected[key]}; got {found[key]}")


def evaluate_onnx(path: Path, header: dict, loader: DataLoader | None, simulated: Path | None, threads: int) -> dict:
    """All that is measured of one file, which has this header, with the machine and the versions."""
    import onnx
    import onnxruntime

    float_path, models = path.with_suffix(".float.onnx"), {}
    if simulated:
        models["simulated"], about = load_quantized(simulated)
        check_same(simulated, about, header, (*ABOUT, "bits", "recipe"))
    if float_path.is_file():
        check_same(float_path, read_onnx_header(float_path), header, ABOUT)
    with tempfile.TemporaryDirectory() as folder:
        sessions = {"onnx": open_session(path, threads, Path(folder) / "optimized.onnx")}
        products = count_products(onnx.load(Path(folder) / "optimized.onnx").graph)
    if float_path.is_file():
        sessions["float"] = open_session(float_path, threads)
    results = {
        "file": path.name,
        "bytes": {
            name: file.stat().st_size for name, file in (("onnx", path), ("float", float_path)) if file.is_file()
        },
        "products": products,
        "latency_ms": {size: measure_latency(_calls(sessions, size)) for size in BATCH_SIZES},
    }
    if loader:
        models = {name: _predictor(session) for name, session in sessions.items()} | models
        results |= measure_accuracy(models, loader)
    versions = utils.run.environment.versions() | {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    return results | {"threads": threads, "machine": machine_name(), "versions": versions}


def export_random(name: str, folder: Path) -> Path:
    """Export a model with random weights at W8/A8, the graph of `best`, calibrated on noise, and the same in float."""
    model = build_model(name, pretrained=False)
    path = folder / f"{name}.onnx"
    export_onnx(path.with_suffix(".float.onnx"), model, name)
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    export_onnx(path, calibrate(quantize_model(model, recipe=INPUTS), images), name)
    return path


def report(results: dict) -> str:
    """The results as a person reads them."""
    lines = [f"{results['file']}: {results['machine']}, {results['threads']} threads"]
    names = list(results["bytes"])
    lines.append(f"{'':<16}" + "".join(f"{name:>12}" for name in [*names, "ratio"][: len(names) + (len(names) > 1)]))
    rows = {"MB": {name: size / 1e6 for name, size in results["bytes"].items()}}
    rows |= {f"ms, batch {size}": values for size, values in results["latency_ms"].items()}
    for label, values in rows.items():
        ratio = [values["onnx"] / values["float"]] if "float" in values else []
        lines.append(f"{label:<16}" + "".join(f"{value:>12.2f}" for value in [*(values[n] for n in names), *ratio]))
    for name in results.get("top1", {}):
        same = f", same first prediction as onnx: {results['same_as_onnx'][name]:.2f} %" if name != "onnx" else ""
        lines.append(f"{name}: top-1 {results['top1'][name]:.2f} %, top-5 {results['top5'][name]:.2f} %{same}")
    products = results["products"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in products["integer"].items())
    lines.append(f"products in integers: {sum(products['integer'].values())} ({kinds or 'none'})")
    lines.append(f"products in float: {sum(products['float'].values())}")
    lines += [f"  {count}: {reason}" for reason, count in products["float"].items()]
    return "\n".join(lines)


def open_images(options: argparse.Namespace, header: dict) -> DataLoader | None:
    """Validation images as the model wants them; None without a data set."""
    if not header["num_classes"]:
        if options.dataset:
            raise InputError(f"--dataset: {options.file} has no classifier, of which an accuracy would be")
        return None
    dataset = options.dataset or DATASETS.get(header["model"])
    if not dataset:
        return None
    dataset = find_dataset(dataset)
    transform, names = create_transform(**header["transform"], is_training=False), header.get("class_names")
    images = validation_images(dataset, transform, header["num_classes"], limit=options.limit, names=names)
    return image_loader(images, 50, min(16, available_cores()))


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("file", type=Path, nargs="?", metavar="FILE.onnx", help="what test_quant.py --export-onnx wrote")
    add("--random", metavar="NAME", help="export a model with random weights, and measure its latency")
    add("--dataset", type=Path, metavar="DIR", help="ImageNet root with val/, cifar10 or imagenette (demo: its own)")
    add("--simulated", type=Path, metavar="FILE", help="compare with what test_quant.py --save wrote in the same run")
    add(
        "--limit",
        type=positive,
        metavar="N",
        help="evaluate on N validation images, those of test_quant.py --seed 0 (all)",
    )
    add("--threads", type=positive, default=available_cores(), metavar="N", help="threads of ONNX Runtime (all cores)")
    add("--json", type=Path, metavar="FILE", help="write the results there, too")
    options = parser.parse_args()
    require_onnx()
    if bool(options.file) == bool(options.random):
        raise InputError("expected either FILE.onnx or --random NAME (see --help)")
    if options.json:
        check_writable(options.json.parent)
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or export_random(options.random, Path(folder))
        header = read_onnx_header(path)
        loader = open_images(options, header) if options.file else None
        measured = evaluate_onnx(path, header, loader, options.simulated, options.threads)
        results = {"model": header["model"]} | measured
    print(report(results))
    if options.json:
        write_json(options.json, results)


def _predictor(session: "InferenceSession") -> Callable[[Tensor], Tensor]:
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def _calls(sessions: dict[str, "InferenceSession"], batch_size: int) -> dict[str, Callable[[], object]]:
    """What computes the logits of one batch of noise, by name."""
    shape = next(iter(sessions.values())).get_inputs()[0].shape[1:]
    feed = {INPUT: torch.randn(batch_size, *shape).numpy()}
    return {name: partial(session.run, None, feed) for name, session in sessions.items()}


if __name__ == "__main__":
    exit_cleanly(main)
