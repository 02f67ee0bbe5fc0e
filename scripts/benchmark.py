"""How fast generation and evaluation are, against their limit: the bare model, in the same run.

    python scripts/benchmark.py --model deit_tiny swin_tiny --batch 8 --json FILE
    python scripts/benchmark.py --model deit_base swin_small --batch 32 --precision bf16 --compile --steps 500  (a GPU)

All precisions are measured side by side. The first line of a model is what counts: a step against the bare model's in
float32, and beside it the goal for a CPU that multiplies bfloat16.

bare           one forward and one backward pass of the frozen timm model, to the image
step           one whole step of image generation
transcription  a step with the formulas as one would write them down first (tests/oracle.py), all gradients on
peak memory    of each of the first two, in a process of its own: resident on a CPU, allocated on a GPU
evaluation     images a second of the float model, and of the quantized one, whose products are float32's
generation     with --steps: seconds for a batch from the first step to the last, and for one more, in a process of its
               own that finds nothing compiled before; what it compiles all others of the model find

On a CPU the bare model, too, keeps the memory that it frees, as generation does; its products are torch's own.
Weights are random: speed does not depend on them. Figures are medians; bare, step and transcription of all precisions
take turns, so that a slow minute of the machine is every one's, and ratios are the medians of the rounds'.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
CASE = ("model", "device", "batch", "precision", "mode")  # what a row is of
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # of torch.compile
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import oracle

from generate_data import Batch, GenerationSettings, draw_labels
from models import build_model
from quant import calibrate, quantize_model
from scripts.pages.speed import GOALS
from utils.attention import attention_outputs, frozen
from utils.losses import TERMS, LossTerms, loss_terms, try_out
from utils.outputs import CPU_BATCH, inference
from utils.products import fast_products
from utils.run.compilation import repeated
from utils.run.environment import commit, device_name, versions
from utils.run.errors import exit_cleanly
from utils.run.files import check_writable, write_json
from utils.run.memory import freed_memory_kept
from utils.run.optimisation import Optimisation
from utils.run.options import Parser, pick_device, positive
from utils.run.precision import PRECISIONS, float32_products, model_products
from utils.run.progress import progress_bar


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", nargs="+", default=["deit_tiny", "swin_tiny"], metavar="NAME", help="(deit_tiny swin_tiny)")
    add("--batch", type=positive, default=8, metavar="B", help="images a step (8)")
    add(
        "--eval-batch",
        type=positive,
        metavar="B",
        help=f"images a batch in evaluation ({CPU_BATCH}; GPU: 200)",
    )
    add("--device", metavar="NAME", help="cuda, cpu (cuda if there is one, else cpu)")
    what = "of the models' products in a step, side by side (fp32 bf16)"
    add("--precision", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"], help=what)
    add("--compile", action="store_true", help="compile bare model and step (eager; on a GPU replayed)")
    add("--rounds", type=positive, default=11, metavar="N", help="timings of each, after two to warm up (11)")
    add("--no-transcription", action="store_true", help="leave it out: it takes long, and 4 GB at batch 8")
    add("--steps", type=positive, metavar="N", help="time the generation of two batches, 2 x N steps each (do not)")
    add("--json", type=Path, metavar="FILE", help="write the figures there, in place of older ones of the same case")
    add("--alone", choices=ALONE, help=argparse.SUPPRESS)  # measure this and nothing else, in this process
    options = parser.parse_args()
    device = pick_device(options.device)
    if options.json:
        check_writable(options.json.parent)
    if options.alone:
        print(json.dumps(ALONE[options.alone](of_precision(options, options.precision[0]), device)))
        return
    print(device_name(device), json.dumps(versions()), flush=True)
    for name in options.model:
        rows = benchmark(name, options, device)
        show(rows, device)
        if options.json:  # after each model, as all of them can take an hour
            write_json(options.json, updated(options.json, rows))


def show(rows: list[dict], device: torch.device) -> None:
    """Print the figures of a model, a column a precision."""
    columns = ("step_over_float32", "bare_ms", "step_ms", "transcription_ms", "step_over_bare", "speedup")
    columns += ("bare_peak_mb", "peak_mb", "float_images_per_s", "quant_images_per_s")
    columns += ("generation_cold_s", "generation_warm_s")
    first, goal = rows[0], GOALS.get(rows[0]["model"])
    print(f"{first['model']}, batch {first['batch']}, {first['mode']}", end="")
    print(f"; goal of step_over_float32 in bf16: {goal}" if goal and device.type == "cpu" else "")
    print(" " * 20 + "".join(f"{row['precision']:>10}" for row in rows))
    for column in columns:
        figures = ["not run" if row[column] is None else format(row[column], ".2f") for row in rows]
        print(f"  {column:<18}" + "".join(f"{figure:>10}" for figure in figures), flush=True)


def updated(path: Path, rows: list[dict]) -> list[dict]:
    """The rows of a file, if it is there, and new ones, which take the place of those of the same case; models in order
    of their first rows.
    """
    old = json.loads(path.read_text()) if path.exists() else []
    found = {tuple(row[key] for key in CASE): row for row in [*old, *rows]}
    names = list(dict.fromkeys(row["model"] for row in found.values()))
    return sorted(found.values(), key=lambda row: names.index(row["model"]))


def of_precision(options: argparse.Namespace, precision: str) -> argparse.Namespace:
    """The options with one precision in place of all."""
    return argparse.Namespace(**{**vars(options), "precision": precision})


def benchmark(name: str, options: argparse.Namespace, device: torch.device) -> list[dict]:
    """All figures of one model: a row a precision."""
    kinds = ("bare", "step") if options.no_transcription else ("bare", "step", "transcription")
    wanted = [("fp32", "bare")] + [(precision, kind) for precision in options.precision for kind in kinds]
    with empty_cache():
        batches = {each: batch_seconds(name, of_precision(options, each)) for each in options.precision}
        with freed_memory_kept(), ExitStack() as contexts:
            steps = {}
            for precision, kind in dict.fromkeys(wanted):
                step = step_of(kind, random_model(name, device), of_precision(options, precision), contexts)
                steps[precision, kind] = partial(with_products, step, precision)
            times = take_turns(steps, options.rounds, device)
        measured = (batches, times, evaluation(name, options, device))
        return [row_of(name, *measured, of_precision(options, each), device) for each in options.precision]


@contextmanager
def empty_cache() -> Iterator[None]:
    """torch.compile finds nothing compiled before, here and in processes that start here."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, dict.fromkeys(CACHES, folder)):
        yield


def batch_seconds(name: str, options: argparse.Namespace) -> tuple[float | None, float | None]:
    """Seconds of a batch cold and warm, if they are asked for; also printed, as the rest can take minutes."""
    if not options.steps:
        return None, None
    cold, warm = in_own_process("generation", name, options)
    print(f"{name}, {options.precision}: a batch in {cold:.1f} s, one more in {warm:.1f} s", flush=True)
    return cold, warm


def with_products(step: Callable[[], object], precision: str) -> None:
    """A step, with products of the precision."""
    with float32_products(tf32=precision == "tf32"):
        step()


def row_of(
    name: str, batches: dict, times: dict, throughput: dict, options: argparse.Namespace, device: torch.device
) -> dict:
    """The figures of a model in one precision."""
    here = {kind: values for (precision, kind), values in times.items() if precision == options.precision}
    seconds = {kind: statistics.median(values) for kind, values in here.items()}
    bare, step, transcription = seconds["bare"], seconds["step"], seconds.get("transcription")
    peaks = {kind: in_own_process(kind, name, options) for kind in ("bare", "step")}
    cold, warm = batches[options.precision]
    return {
        "model": name,
        "device": device_name(device),
        "batch": options.batch,
        "precision": options.precision,
        "mode": "compiled" if options.compile else "replayed" if device.type == "cuda" else "eager",
        "bare_ms": 1000 * bare,
        "step_ms": 1000 * step,
        "transcription_ms": transcription and 1000 * transcription,
        "step_over_float32": median_ratio(here["step"], times["fp32", "bare"]),
        "step_over_bare": median_ratio(here["step"], here["bare"]),
        "speedup": transcription and transcription / step,
        "peak_mb": peaks["step"],
        "bare_peak_mb": peaks["bare"],
        "float_images_per_s": throughput[options.precision],
        "quant_images_per_s": throughput["quantized"],
        "steps": options.steps and 2 * options.steps,
        "generation_cold_s": cold,
        "generation_warm_s": warm,
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "versions": versions(),
    }


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median of the ratios of rounds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def random_model(name: str, device: torch.device) -> nn.Module:
    """A model with the same random weights in each run."""
    torch.manual_seed(0)
    return build_model(name, pretrained=False).to(device)


def step_of(kind: str, model: nn.Module, options: argparse.Namespace, contexts: ExitStack) -> Callable[[], object]:
    """The function that does one step of a kind, bare, step or transcription, as long as `contexts` are open."""
    if kind == "transcription":
        batch = new_batch(model, loss_terms(model, [], options.precision), options)
        return lambda: transcribed_step(model, batch, options.precision)
    contexts.enter_context(frozen(model))
    if kind == "bare":
        batch = new_batch(model, loss_terms(model, [], options.precision), options)
        return bare_step(model, batch, options, contexts)
    batch = new_batch(model, step_terms(model, options, contexts), options)
    return lambda: batch.step(0)


def step_terms(model: nn.Module, options: argparse.Namespace, contexts: ExitStack) -> LossTerms:
    """The loss of generation as long as `contexts` are open, compiled or replayed as there."""
    contexts.enter_context(fast_products(model, options.precision))
    terms = loss_terms(model, contexts.enter_context(attention_outputs(model)), options.precision)
    device = next(model.parameters()).device
    return contexts.enter_context(repeated(terms, device, options.compile, try_out))


def new_batch(model: nn.Module, terms: LossTerms, options: argparse.Namespace) -> Batch:
    """Noise, as generation begins with it."""
    settings = GenerationSettings(steps=options.steps or 500, precision=options.precision, compile=options.compile)
    return Batch(model, terms, draw_labels(options.batch, model.num_classes), 0, 0, settings)


def bare_step(model: nn.Module, batch: Batch, options: argparse.Namespace, contexts: ExitStack) -> Callable[[], object]:
    """Forward and backward to the image, and nothing else; compiled or replayed as the step is."""

    def loss(images: Tensor) -> Tensor:
        with model_products(options.precision, images.device):
            return nn.functional.cross_entropy(model(images).float(), batch.labels)

    def gradient(loss: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(images), images)

    fast = contexts.enter_context(repeated(loss, batch.images.device, options.compile, gradient))
    return lambda: gradient(fast, batch.images)


def transcribed_step(model: nn.Module, batch: Batch, precision: str) -> None:
    """The published way: broadcast cosines, the whole density in autograd, gradients of all weights, two host waits."""
    with attention_outputs(model) as outputs:
        with model_products(precision, batch.images.device):
            logits = model(batch.images)
        loss = nn.functional.cross_entropy(logits.float(), batch.labels)
        loss = loss - sum(oracle.entropy(features.float(), len(batch.images)) for features in outputs)
        outputs.clear()
    differences = (batch.images.diff(dim=3), batch.images.diff(dim=2))
    loss = loss + 0.05 * sum(torch.linalg.vector_norm(difference) for difference in differences)
    loss.backward()
    batch.optimizer.step()


def take_turns(steps: dict[Hashable, Callable], rounds: int, device: torch.device) -> dict[Hashable, list[float]]:
    """Seconds of each in every round, after two to warm up; the transcription's in every third."""
    seconds: dict[Hashable, list[float]] = {kind: [] for kind in steps}
    for turn in range(-2, rounds):
        for kind, step in steps.items():
            if "transcription" in kind and turn % 3:
                continue
            start = time.perf_counter()
            step()
            wait(device)
            if turn >= 0:
                seconds[kind].append(time.perf_counter() - start)
    return seconds


def evaluation(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Images a second of the float model in each precision, and of the quantized model (W8/A8), in float32."""
    model = random_model(name, device)
    size = options.eval_batch or (CPU_BATCH if device.type == "cpu" else 200)
    images = torch.randn(size, 3, *model.patch_embed.img_size, device=device)
    quantized = calibrate(quantize_model(build_model(name, pretrained=False)).to(device), images[:8])

    def forward(model: nn.Module, precision: str) -> None:
        with float32_products(tf32=precision == "tf32"), model_products(precision, device):
            model(images)

    passes = {precision: partial(forward, model, precision) for precision in options.precision}
    with inference(model, quantized):
        seconds = take_turns(passes | {"quantized": partial(forward, quantized, "fp32")}, options.rounds, device)
    return {kind: size / statistics.median(values) for kind, values in seconds.items()}


def in_own_process(what: str, name: str, options: argparse.Namespace) -> float | list[float]:
    """What a function of ALONE measures of a model in a fresh process."""
    command = [sys.executable, __file__, "--alone", what, "--model", name, "--batch", str(options.batch)]
    command += ["--precision", options.precision, *(["--device", options.device] if options.device else [])]
    command += ["--steps", str(options.steps)] if options.steps else []
    command += ["--compile"] if options.compile else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def generation(options: argparse.Namespace, device: torch.device) -> list[float]:
    """Seconds for all steps of a batch, what is compiled included, and of a second one."""
    model, seconds = random_model(options.model[0], device), []
    with frozen(model), float32_products(tf32=options.precision == "tf32"), ExitStack() as contexts:
        terms, total = step_terms(model, options, contexts), 2 * options.steps
        for _ in range(2):
            start = time.perf_counter()
            batch = new_batch(model, terms, options)
            kept = {"tensors": {"images": batch.images}, "optimizers": [batch.optimizer], "random": batch.random}
            with progress_bar(total=total, desc="generating", unit="step") as bar:
                Optimisation(batch.step, TERMS, total, **kept).run(bar, lambda: None)
            seconds.append(time.perf_counter() - start)
    return seconds


def peak_memory(kind: str, options: argparse.Namespace, device: torch.device) -> float:
    """What three steps of a kind add to the memory of a process that holds the model, at most, in MB."""
    model, before = random_model(options.model[0], device), 0.0
    with freed_memory_kept(), ExitStack() as contexts, float32_products(tf32=options.precision == "tf32"):
        if device.type == "cpu":
            ctypes.CDLL(None).malloc_trim(0)  # hands back what building has left
            Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts anew from VmRSS
            before = resident("VmRSS")
        step = step_of(kind, model, options, contexts)
        for _ in range(3):
            step()
        return resident("VmHWM") - before if device.type == "cpu" else torch.cuda.max_memory_allocated(device) / 1e6


def resident(name: str) -> float:
    """A line of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1e3 for line in lines if line.startswith(name))


def wait(device: torch.device) -> None:
    """For the device to have done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# What is measured in a process of its own, which holds nothing else
ALONE = {kind: partial(peak_memory, kind) for kind in ("bare", "step")} | {"generation": generation}

if __name__ == "__main__":
    exit_cleanly(main)
