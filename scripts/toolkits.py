"""Does calibration without data work with other toolkits, too? Each, given the same float model and the same images.

    python generate_data.py --model demo_vit --output runs/images/demo_vit_seed0.safetensors
    python scripts/toolkits.py --model demo_vit --images "runs/images/{model}_seed{seed}.safetensors"
    python scripts/toolkits.py --model demo_vit --bits 4/8 4/4 --kinds generated --images ...
    python scripts/toolkits.py --model demo_vit --latency
    python scripts/toolkits.py --model deit_tiny swin_tiny --random --latency

One row a model, toolkit, bit widths, kind of images and seed is appended to --rows as it is measured, and a row that
is there is not measured again. A toolkit that fails on a model is a row, too, with its error.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils.run.environment  # isort: skip

import torch
from torch import Tensor

from models import DATASETS, build_model, class_names, evaluation_transform, normalization, short_name
from models.saved import export_onnx, require_onnx
from quant.contrast import add_shaded, stretch
from scripts.accuracy import decoded
from scripts.evaluate_onnx import BATCH_SIZES, machine_name, measure_latency
from scripts.pages.cells import read_csv
from scripts.pages.toolkits import KINDS
from scripts.rows import append_row, check_rows
from scripts.runtimes import FAST, RUNTIMES, Bits, FloatModel, Predict, Program
from scripts.vendors import EIGHT, TOOLKITS, Quantize, Toolkit
from utils.data import Images, draw_images, open_data
from utils.evaluate import count_correct
from utils.fractals import render_others
from utils.images import draw_noise, load_images
from utils.options import add_checkpoint
from utils.photographs import find_dataset
from utils.run.errors import InputError, exit_cleanly
from utils.run.options import Parser, available_cores, natural, positive
from utils.run.seeds import stream

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "scripts" / "results" / "toolkits.csv"
LATENCIES = ROOT / "scripts" / "results" / "toolkits_latency.csv"
BATCH = 50  # images of a forward pass when accuracy is measured
KEY = ("model", "toolkit", "w_bit", "a_bit", "images", "calibration_images", "seed", "n")
ORIGIN = ("versions", "device", "commit", "date", "error")
COLUMNS = (*KEY, "runtime", "float_top1", "top1", "float_bytes", "bytes", "quantize_s", *ORIGIN)
LATENCY_KEY = ("model", "toolkit", "threads", "batch")
LATENCY_COLUMNS = (*LATENCY_KEY, "runtime", "float_ms", "ms", *ORIGIN)


class CalibrationImages:
    """Images of every kind for one model: (count, 3, H, W), normalised."""

    def __init__(self, source: FloatModel, count: int, pattern: str | None, train: Images | None) -> None:
        self.name, self.count, self.pattern, self.train = source.name, count, pattern, train
        self.size, self.normalization = source.model.patch_embed.img_size, normalization(source.model)

    def draw(self, kind: str, seed: int) -> Tensor:
        """Noise N(0, 1); pixels drawn uniformly; fractals of any class; what generate_data.py wrote, and what it would
        have written with --contrast; or photographs.
        """
        mean, std = self.normalization
        match kind:
            case "noise":
                return draw_noise(self.count, self.size, seed)
            case "uniform":
                return (torch.rand(self.count, 3, *self.size, generator=stream(seed, "uniform")) - mean) / std
            case "fractals":
                height, width = self.size
                pixels = torch.from_numpy(render_others(self.count, max(height, width), seed)).permute(0, 3, 1, 2)
                return ((pixels[..., :height, :width] / 255 - mean) / std).contiguous()
            case "generated":
                return self.generated(seed)
            case "contrast":
                return add_shaded(stretch(self.generated(seed), mean, std), mean, std)
            case "real":
                return draw_images(self.train, self.count, seed)

    def generated(self, seed: int) -> Tensor:
        """The first images of the seed's file."""
        path = images_path(self.pattern, self.name, seed)
        images = load_images(path, self.size, *self.normalization)["images"][: self.count]
        if len(images) < self.count:
            raise InputError(f"--images {path}: expected at least {self.count} images; found {len(images)}")
        return images


def images_path(pattern: str, name: str, seed: int) -> Path:
    """The file of a model and a seed; the pattern may name both, as {model} and {seed}."""
    return Path(pattern.replace("{model}", short_name(name)).replace("{seed}", str(seed)))


def accuracy(predict: Predict, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent on images (B, 3, H, W)."""
    hits = [count_correct(predict(x), y)[0] for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True)]
    return round(100 * sum(hits).item() / len(labels), 3)


Call = Callable[[Quantize, Bits], tuple[Program, list[Path], float]]


def quantizer(source: FloatModel, images: Tensor, folder: Path) -> Call:
    """What calls a toolkit's `quantize`, once, as its file may run in several runtimes; also the CPU time, seconds."""

    @cache
    def call(quantize: Quantize, bits: Bits) -> tuple[Program, list[Path], float]:
        start = time.process_time()
        program, files = quantize(source, images, Path(tempfile.mkdtemp(dir=folder)), bits)
        return program, files, time.process_time() - start

    return call


def measure_toolkit(
    toolkit: Toolkit, bits: Bits, call: Call, val: tuple[Tensor, Tensor]
) -> dict[str, float | int | str]:
    """Accuracy and size of the model that a toolkit makes, `call`ed; or the error that it ends with."""
    try:
        program, files, seconds = call(toolkit.quantize, bits)
        size = sum(file.stat().st_size for file in files)
        top1 = accuracy(RUNTIMES[toolkit.runtime](program, torch.get_num_threads()), *val)
    except Exception as error:  # whatever a toolkit raises is a result
        return {"error": first_line(error)}
    return {"top1": top1, "bytes": size or "", "quantize_s": round(seconds, 1)}


def measure_latencies(
    toolkits: dict[str, Toolkit], source: FloatModel, call: Call, threads: int
) -> Iterator[dict[str, float | int | str]]:
    """Milliseconds a batch of each toolkit, `call`ed, and of the float model, in turns, in one runtime."""
    (runtime,) = {toolkit.runtime for toolkit in toolkits.values()}
    size = source.model.patch_embed.img_size
    ready = {"float": FAST[runtime](float_program(source, runtime), threads)}
    for name, toolkit in toolkits.items():
        try:
            ready[name] = FAST[runtime](call(toolkit.quantize, *EIGHT)[0], threads)
            ready[name](draw_noise(1, size, 1))
        except Exception as error:
            yield {"toolkit": name, "threads": threads, "runtime": runtime, "error": first_line(error)}
            ready.pop(name, None)
    for batch in BATCH_SIZES:
        feed = draw_noise(batch, size, 1)
        calls: dict[str, Callable[[], object]] = {name: partial(predict, feed) for name, predict in ready.items()}
        for run in calls.values():  # compiled, and its threads started, on any core
            run()
        times = measure_latency(calls)
        for name in [name for name in toolkits if name in times]:
            about = {"toolkit": name, "threads": threads, "batch": batch, "runtime": runtime}
            yield about | {"float_ms": round(times["float"], 3), "ms": round(times[name], 3)}


def float_program(source: FloatModel, runtime: str) -> Program:
    """What a runtime opens of the float model."""
    return source.onnx if runtime in ("onnxruntime", "openvino") else source.model


def first_line(error: Exception) -> str:
    """An error's type and the first line of its text, 200 characters at most."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:200]


def installed(names: list[str] | None) -> dict[str, Toolkit]:
    """The toolkits of these names, which must be installed; for None all that are, and a line that names the others."""
    missing = {name: TOOLKITS[name].missing() for name in names or TOOLKITS}
    lacking = {name: packages for name, packages in missing.items() if packages}
    advice = "pip install -r requirements-toolkits.txt"
    if names and lacking:
        problem = "; ".join(f"{name} needs {', '.join(packages)}" for name, packages in lacking.items())
        raise InputError(f"--toolkit: {problem}, not installed: {advice}")
    if lacking:
        print(f"not installed, left out: {', '.join(lacking)} ({advice})")
    return {name: TOOLKITS[name] for name in missing if name not in lacking}


def find_data(options: argparse.Namespace) -> Path:
    """The root of the data set, looked at."""
    own = {DATASETS.get(name) for name in options.model}
    dataset = options.dataset or (own.pop() if len(own) == 1 else None)
    if not dataset:
        raise InputError("expected --dataset, as not all models have one, and the same, of their own; got none")
    return find_dataset(dataset, splits=["val", "train"] if "real" in options.kinds else ["val"])


def measure_accuracies(options: argparse.Namespace, source: FloatModel, toolkits: dict[str, Toolkit]) -> None:
    """Append the rows that are not there yet."""
    real = "real" in options.kinds
    dataset = find_data(options)
    transform, names = evaluation_transform(source.model), class_names(source.model)
    data = open_data(dataset, transform, source.model.num_classes, real, limit=options.limit, names=names)
    val = decoded(data["val"])
    images = CalibrationImages(source, options.calib_batchsize, options.images, data.get("train"))
    done = {tuple(row[key] for key in KEY) for row in read_csv(options.rows)}
    floats: dict[str, float] = {}
    about = {"model": label(options, source), "calibration_images": options.calib_batchsize, "n": len(val[1])}
    about["float_bytes"] = source.onnx.stat().st_size
    for seed in options.seed:
        for kind in options.kinds:
            left = []
            for (name, toolkit), bits in product(toolkits.items(), options.bits):
                case = {"toolkit": name, "w_bit": bits[0], "a_bit": bits[1], "images": kind, "seed": seed}
                if bits in toolkit.bits and tuple(str((about | case)[key]) for key in KEY) not in done:
                    left.append((toolkit, bits, about | case))
            if not left:
                continue
            with tempfile.TemporaryDirectory() as folder:
                call = quantizer(source, images.draw(kind, seed), Path(folder))
                for toolkit, bits, case in left:
                    runtime = toolkit.runtime
                    if runtime not in floats:
                        predict = RUNTIMES[runtime](float_program(source, runtime), torch.get_num_threads())
                        floats[runtime] = accuracy(predict, *val)
                    row = case | {"runtime": runtime, "float_top1": floats[runtime]}
                    row |= measure_toolkit(toolkit, bits, call, val)
                    append_row(options.rows, row | origin(toolkit), COLUMNS)
                    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def append_latencies(options: argparse.Namespace, source: FloatModel, toolkits: dict[str, Toolkit]) -> None:
    """Append the rows that are not there yet, of toolkits that do not only simulate."""
    done = {tuple(row[key] for key in LATENCY_KEY[:3]) for row in read_csv(options.latency_rows)}
    model = label(options, source)
    with tempfile.TemporaryDirectory() as folder:
        call = quantizer(source, draw_noise(8, source.model.patch_embed.img_size, 0), Path(folder))
        for threads, runtime in product(dict.fromkeys((1, available_cores())), FAST):
            some = {
                name: toolkit
                for name, toolkit in toolkits.items()
                if toolkit.runtime == runtime and (model, name, str(threads)) not in done
            }
            for measured in measure_latencies(some, source, call, threads) if some else ():
                about = origin(toolkits[measured["toolkit"]]) | {"device": machine_name()}
                append_row(options.latency_rows, {"model": model} | about | measured, LATENCY_COLUMNS)
                print(", ".join(f"{name} {value}" for name, value in measured.items()), flush=True)


def origin(toolkit: Toolkit) -> dict[str, str | None]:
    """Where and with what a row was measured."""
    return {
        "versions": toolkit.versions(),
        "device": utils.run.environment.device_name(torch.device("cpu")),
        "commit": utils.run.environment.commit(),
    }


def parse_bits(text: str) -> Bits:
    """Bits of weights and activations, written W/A, that a toolkit can do."""
    known = {f"{w_bit}/{a_bit}": (w_bit, a_bit) for toolkit in TOOLKITS.values() for w_bit, a_bit in toolkit.bits}
    if text not in known:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}; got {text}")
    return known[text]


def label(options: argparse.Namespace, source: FloatModel) -> str:
    """What rows call the model: its name, and that of its file of weights."""
    weights = options.checkpoint.stem if options.checkpoint else "random" if options.random else ""
    return f"{source.name} {weights}".rstrip()


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that do not go together, and files that are not there, before any work."""
    if options.checkpoint and len(options.model) > 1:
        raise InputError(f"--checkpoint: goes with one model; got {len(options.model)}")
    if options.random and not options.latency:
        raise InputError("--random: goes with --latency, as random weights have no accuracy; got none")
    if options.latency:
        return
    if {"generated", "contrast"} & set(options.kinds):
        if not options.images:
            raise InputError("--images: expected files of generated images, or other --kinds; got none")
        for name in options.model:
            for seed in options.seed:
                if not (path := images_path(options.images, name, seed)).is_file():
                    raise InputError(f"--images {path}: no such file")
    find_data(options)


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="NAME", help="models, by the names of test_quant.py")
    add_checkpoint(parser)
    add(
        "--toolkit", nargs="+", choices=TOOLKITS, metavar="NAME", help=f"{', '.join(TOOLKITS)} (all that are installed)"
    )
    add(
        "--bits",
        type=parse_bits,
        nargs="+",
        default=EIGHT,
        metavar="W/A",
        help="of weights and activations, 16 is float (8/8); a toolkit is left out at those that it cannot do",
    )
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=f"of images: {', '.join(KINDS)} (all)")
    add("--images", metavar="FILE", help="generated images; {model} and {seed} stand for those of a row")
    add("--calib-batchsize", type=positive, default=32, metavar="N", help="images to calibrate with (32)")
    add("--seed", type=natural, nargs="+", default=[0], metavar="N", help="seeds of the images (0)")
    add(
        "--dataset",
        type=Path,
        metavar="DIR",
        help="data set with val/, and train/ (small models: their own)",
    )
    add("--limit", type=positive, metavar="N", help="validate on N images (all)")
    add("--latency", action="store_true", help="measure latencies instead, in turns: nothing else may run meanwhile")
    add("--random", action="store_true", help="random weights: latencies do not depend on them (pre-trained)")
    add("--rows", type=Path, default=ROWS, metavar="FILE", help="accuracies (scripts/results/toolkits.csv)")
    add("--latency-rows", type=Path, default=LATENCIES, metavar="FILE", help="latencies (.../toolkits_latency.csv)")
    options = parser.parse_args()
    require_onnx()
    check_options(options)
    if options.latency:
        check_rows(options.latency_rows, LATENCY_COLUMNS)
    else:
        check_rows(options.rows, COLUMNS)
    toolkits = installed(options.toolkit)
    logging.disable(logging.WARNING)  # of what toolkits think of every norm
    for name in options.model:
        with tempfile.TemporaryDirectory() as folder:
            model = build_model(name, options.checkpoint, pretrained=not options.random)
            source = FloatModel(name, model, Path(folder) / "float.onnx")
            export_onnx(source.onnx, source.model, name)
            (append_latencies if options.latency else measure_accuracies)(options, source, toolkits)


if __name__ == "__main__":
    exit_cleanly(main)
