"""Does top-1 stay if evaluation multiplies in bfloat16? The float model, and its quantized form, simulated.

    python scripts/bf16.py --model demo_vit --images images.safetensors --dataset data/demo

Two rows a model, float and W8/A8, are appended to --rows. The images are those to calibrate with.
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils.run.environment  # isort: skip  # noqa: F401 - first: a broken installation is told in one line

from quant import calibrate, quantize_model
from scripts.accuracy import ORIGIN, add_case, measure, open_case, origin, predict
from scripts.rows import append_row, check_rows
from utils.run.errors import exit_cleanly
from utils.run.options import Parser
from utils.run.precision import float32_products, model_products

ROWS = Path(__file__).resolve().parent / "results" / "bf16.csv"
COLUMNS = ("model", "form", "n", "top1", "fp32_top1", "agreement", "calibration_images", *ORIGIN)


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add_case(parser)
    add = parser.add_argument
    add("--rows", type=Path, default=ROWS, metavar="FILE", help="CSV file to append to (scripts/results/bf16.csv)")
    options = parser.parse_args()
    check_rows(options.rows, COLUMNS)
    device, model, calibration, (images, labels) = open_case(options)
    with float32_products():
        forms = {"float": model, "W8/A8": calibrate(quantize_model(copy.deepcopy(model)), calibration)}
        for form, each in forms.items():
            expected = predict(each, images)
            with model_products("bf16", device):
                measured = measure(each, expected, images, labels)
            row = {"model": options.model, "form": form, "calibration_images": len(calibration)} | measured
            row["fp32_top1"] = row.pop("float_top1")
            append_row(options.rows, row | origin(device), COLUMNS)
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
