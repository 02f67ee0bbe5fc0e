"""How many steps and images calibration needs: top-1 at W8/A8 and W4/A8 against both.

    python scripts/steps.py
    python scripts/steps.py --plot docs/steps.png        (needs requirements-plots.txt)

The steps vary with 32 images, and the number of images with 2 x 100 steps. One row a model, seed, setting and bit width
is appended to --rows as it is measured, and a row that is there is not measured again. Generated images are kept in
--images-folder, and those that are there are used: MODEL-SEED-STEPSxIMAGES.safetensors, as generate_data.py writes
them. The second command draws the rows, and measures nothing.
"""

import copy
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils.run.environment  # isort: skip  # noqa: F401 - first: a broken installation is told in one line

from torch import Tensor, nn

from generate_data import GenerationSettings, draw_labels, generate_data
from models import DATASETS, build_model, evaluation_transform, normalization
from quant import calibrate, quantize_model
from scripts.accuracy import ORIGIN, decoded, measure, origin, predict
from scripts.rows import append_row
from scripts.tables import read_csv
from utils.data import validation_images
from utils.images import load_images, save_images
from utils.photographs import find_dataset
from utils.run.errors import exit_cleanly
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
    (50, 32, (32,)),
    (100, 128, (32, 64, 128)),
    (100, 16, (16,)),
    (100, 8, (8,)),
    (250, 32, (32,)),
    (500, 32, (32,)),  # the published setting
)
KEY = ("model", "seed", "steps", "calibration_images", "w_bit", "a_bit")
COLUMNS = (*KEY, "n", "top1", "float_top1", "agreement", "images_s", *ORIGIN)


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
            return load_images(path, self.model.patch_embed.img_size)["images"], None
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
        keys = [(subject.name, seed, steps, number, *bits) for number in numbers for bits in BITS]
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
            yield row | {"images_s": "" if seconds is None else round(seconds * number, 1)}


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
    options = parser.parse_args()
    about = origin(pick_device(options.device))
    done = {tuple(row[key] for key in KEY) for row in read_csv(options.rows)}
    subjects = [Subject(name, options.device, options.limit) for name in options.model]
    for seed in options.seed:
        for subject in subjects:
            for row in measure_seed(subject, options.images_folder, seed, done):
                date = datetime.now(timezone.utc).isoformat(timespec="seconds")
                append_row(options.rows, row | about | {"date": date}, COLUMNS)
                print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
