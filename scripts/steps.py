"""How many steps and images calibration needs: top-1 at W8/A8 and W4/A8 against both.

    python scripts/steps.py
    python scripts/steps.py --plot docs/steps.png        (needs requirements-plots.txt)

The steps vary with 32 images, and the number of images with 2 x 100 steps. One row a model, seed, setting and bit width
is appended to --rows as it is measured, and a row that is there is not measured again. Generated images are kept in
--images-folder, and those that are there are used: MODEL-SEED-STEPSxIMAGES.safetensors, as generate_data.py writes
them. The second command draws the rows, and measures nothing.
"""

import copy
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils.run.environment  # isort: skip  # noqa: F401 - first: a broken installation is told in one line

from torch import Tensor, nn

from generate_data import GenerationSettings, draw_labels, generate_data
from models import DATASETS, build_model, evaluation_transform, normalization
from quant import calibrate, quantize_model
from scripts.accuracy import ORIGIN, decoded, measure, origin, predict
from scripts.pages.cells import read_csv
from scripts.pages.steps import BY_NUMBER, BY_STEPS, PUBLISHED_SETTING, setting_top1
from scripts.rows import append_row, check_rows
from utils.data import validation_images
from utils.images import check_picture, load_images, save_images
from utils.photographs import find_dataset
from utils.plots import COLOURS, MUTED, require_matplotlib
from utils.run.errors import InputError, exit_cleanly
from utils.run.files import replacing
from utils.run.options import DEVICE_HELP, Parser, natural, pick_device, positive
from utils.run.precision import float32_products

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "scripts" / "results" / "steps.csv"
IMAGES = ROOT / "runs" / "steps"
BITS = ((8, 8), (4, 8))
# Steps a round; images to generate; how many of them, from the first, to calibrate with. Batches of 32 are independent:
# the first 32 of 128 images are those that 32 alone would be. Fewer share one loss, and are other images.
PLAN = (
    (25, 32, (32,)),
    (500, 32, (32,)),  # the published setting
    (50, 32, (32,)),
    (100, 128, (32, 64, 128)),
    (100, 16, (16,)),
    (100, 8, (8,)),
    (250, 32, (32,)),
)
KEY = ("model", "seed", "steps", "calibration_images", "w_bit", "a_bit", "n")
COLUMNS = (*KEY, "top1", "float_top1", "agreement", "images_s", *ORIGIN)


class Subject:
    """A small model with its validation images, decoded, and what it predicts of them in float."""

    def __init__(self, name: str, device: str | None, limit: int) -> None:
        self.name, self.model = name, build_model(name).to(pick_device(device))
        root, transform = find_dataset(DATASETS[name]), evaluation_transform(self.model)
        self.val = decoded(validation_images(root, transform, self.model.num_classes, limit=limit))
        self.expected = predict(self.model, self.val[0])

    def generated(self, folder: Path, seed: int, steps: int, count: int) -> tuple[Tensor, float | None]:
        """Images (count, 3, H, W), and the CPU's seconds for one of them; None if they were in the folder."""
        path = folder / f"{self.name}-{seed}-{steps}x{count}.safetensors"
        if path.is_file():
            return load_images(path, self.model.patch_embed.img_size, *normalization(self.model))["images"], None
        start = time.process_time()  # not of the clock, which other processes slow down
        images = generate_data(self.model, count, seed, GenerationSettings(steps=steps))
        seconds = (time.process_time() - start) / count
        path.parent.mkdir(parents=True, exist_ok=True)
        save_images(path, *normalization(self.model), images, labels=draw_labels(count, self.model.num_classes, seed))
        return images, seconds

    def quantized(self, images: Tensor, w_bit: int, a_bit: int) -> nn.Module:
        """A copy of the model, calibrated."""
        return calibrate(quantize_model(copy.deepcopy(self.model), w_bit, a_bit), images)


def measure_seed(subject: Subject, folder: Path, seed: int, done: set[tuple[str, ...]]) -> Iterator[dict]:
    """A row of each setting of PLAN and bit width but those whose KEY is among the `done`."""
    for steps, count, numbers in PLAN:
        keys = [(subject.name, seed, steps, number, *bits, len(subject.val[1])) for number in numbers for bits in BITS]
        keys = [key for key in keys if tuple(map(str, key)) not in done]
        if not keys:
            continue
        images, seconds = subject.generated(folder, seed, steps, count)
        for key in keys:
            row = dict(zip(KEY, key, strict=True))
            number = row["calibration_images"]
            with float32_products():
                quantized = subject.quantized(images[:number], row["w_bit"], row["a_bit"])
                row |= measure(quantized, subject.expected, *subject.val)
            yield row | {"images_s": "" if seconds is None else round(seconds * number, 2)}


def plot(path: Path, rows: list[dict[str, str]]) -> None:
    """Draw top-1 against steps, and below against images, a column a model."""
    plt = require_matplotlib()
    names = [name for name in DATASETS if any(row["model"] == name for row in rows)]
    size = {"figsize": (3 * len(names), 5), "layout": "constrained"}
    figure, axes = plt.subplots(2, len(names), sharey="col", squeeze=False, **size)
    panels = (BY_STEPS, "steps a round, 32 images"), (BY_NUMBER, "images, 2 x 100 steps")
    for line, (settings, label) in zip(axes, panels, strict=True):
        line[0].set(ylabel="top-1 (%)")
        for axis, name in zip(line, names, strict=True):
            axis.set(xlabel=label)
            draw_settings(axis, [row for row in rows if row["model"] == name], settings)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set(title=name)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    with replacing(path) as draft:
        figure.savefig(draft)
    plt.close(figure)


def draw_settings(axis: Any, rows: list[dict[str, str]], settings: tuple[tuple[int, int], ...]) -> None:
    """Top-1 of one model's rows, mean and standard deviation over the seeds, against the steps or images that vary.

    A band is the published setting's mean and deviation, the dashed line the float model's accuracy.
    """
    varied = 0 if len({steps for steps, _ in settings}) > 1 else 1
    axis.axhline(float(rows[0]["float_top1"]), color=MUTED, linestyle="--", linewidth=0.8)
    for bits, colour in zip(BITS, (COLOURS["generated"], COLOURS["real"]), strict=True):
        top1 = {setting: setting_top1(rows, bits, setting) for setting in (*settings, PUBLISHED_SETTING)}
        points = {setting[varied]: mean_and_deviation(top1[setting]) for setting in settings if top1[setting]}
        means, deviations = ([point[index] for point in points.values()] for index in (0, 1))
        about = {"label": f"W{bits[0]}/A{bits[1]}", "marker": "o", "markersize": 4, "linewidth": 1.2, "capsize": 2}
        axis.errorbar(list(points), means, deviations, color=colour, **about)
        if top1[PUBLISHED_SETTING]:
            mean, deviation = mean_and_deviation(top1[PUBLISHED_SETTING])
            axis.axhspan(mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
    axis.set(xscale="log")
    numbers = [setting[varied] for setting in settings]
    axis.set_xticks(numbers, numbers)
    axis.minorticks_off()


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """The deviation of one value is 0."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    names = list(DATASETS)
    add("--model", nargs="+", choices=names, default=names, metavar="NAME", help=f"{', '.join(names)} (all)")
    add("--seed", type=natural, nargs="+", default=[0, 1, 2], metavar="N", help="seeds of the images (0 1 2)")
    add("--limit", type=positive, default=2000, metavar="N", help="validate on N images, for all seeds the same (2000)")
    add("--device", metavar="NAME", help=DEVICE_HELP)
    add("--images-folder", type=Path, default=IMAGES, metavar="DIR", help="generated images (runs/steps)")
    add("--rows", type=Path, default=ROWS, metavar="FILE", help="CSV file to append to (scripts/results/steps.csv)")
    add("--plot", type=Path, metavar="FILE", help="draw the rows into a .png file, and measure nothing")
    options = parser.parse_args()
    check_rows(options.rows, COLUMNS)
    if options.plot:
        check_picture("--plot", options.plot)
        if not (rows := read_csv(options.rows)):
            raise InputError(f"--rows {options.rows}: expected rows to draw; found none")
        plot(options.plot, rows)
        return
    about = origin(pick_device(options.device))
    done = {tuple(row[key] for key in KEY) for row in read_csv(options.rows)}
    subjects = [Subject(name, options.device, options.limit) for name in options.model]
    for seed in options.seed:
        for subject in subjects:
            for row in measure_seed(subject, options.images_folder, seed, done):
                append_row(options.rows, row | about, COLUMNS)
                print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
