"""What each technique of a recipe adds: leave one out, or start with none and add one after another.

    python generate_data.py --model demo_vit --output images.safetensors
    python scripts/ablation.py --model demo_vit --images images.safetensors --dataset data/demo --bits 8/8 4/4

One row a recipe and bit width is appended to --rows as it is measured, and a row that is there is not measured again.
Nothing is chosen here: a recipe's settings are those of quant/recipes.py whatever the validation images say.
"""

import copy
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils.run.environment  # isort: skip  # noqa: F401 - first: a broken installation is told in one line

from torch import Tensor, nn

from quant import calibrate, quantize_model
from quant.recipes import BEST, INPUTS, LEARNED, PAPER, Recipe
from scripts.accuracy import ORIGIN, add_case, measure, open_case, origin, parse_bits, predict
from scripts.pages.cells import read_csv
from scripts.rows import append_row, check_rows
from utils.learning import learn
from utils.run.errors import exit_cleanly
from utils.run.options import Parser, natural
from utils.run.precision import default_precision, float32_products
from utils.run.progress import progress_bar

ROWS = Path(__file__).resolve().parent / "results" / "recipes.csv"
TECHNIQUES = (
    "search_ranges",
    "stretch",
    "shade",
    "windows",
    "balance",
    "rotate",
    "drop_key_biases",
    "compensate",
    "enlarge",
)
KEY = ("model", "w_bit", "a_bit", "recipe", "seed", "n")
COLUMNS = (*KEY, "top1", "float_top1", "agreement", "calibrate_s", "calibration_images", *ORIGIN)


def variants() -> dict[str, Recipe]:
    """By name: the recipes, the placement with one technique after another, and the best without one of each."""
    recipes, recipe = {"paper": PAPER, "inputs": INPUTS}, INPUTS
    for technique in TECHNIQUES[:-1]:
        recipe = replace(recipe, **{technique: True})
        recipes[f"+ {technique}"] = recipe
    recipes |= {"best": BEST, "learned": LEARNED}  # best has the last of them
    recipes |= {f"best - {technique}": replace(BEST, **{technique: False}) for technique in (*TECHNIQUES[:-1], "learn")}
    return recipes | {f"{recipe.name} symmetric": recipe.without_zero_points() for recipe in (PAPER, BEST, LEARNED)}


def named(name: str, recipe: Recipe, number: int) -> str:
    """What a row calls a recipe that is calibrated on this number of images."""
    return name if number == recipe.images else f"{name}, {number} images"


def ablate(
    model: nn.Module, calibration: Tensor, val: tuple[Tensor, Tensor], w_bit: int, a_bit: int, names: list[str]
) -> Iterator[dict]:
    """What was measured of each recipe of `names` for a float model, which stays as it is."""
    images, labels = val
    expected, device = predict(model, images), next(model.parameters()).device
    train = partial(learn, precision=default_precision(device, model))
    for name in progress_bar(names, desc=f"W{w_bit}/A{a_bit}", unit="recipe"):
        quantized = quantize_model(copy.deepcopy(model), w_bit, a_bit, recipe=variants()[name])
        start = time.perf_counter()
        calibrate(quantized, calibration, learn=train)
        seconds = round(time.perf_counter() - start, 1)
        measured = measure(quantized, expected, images, labels)
        yield {"w_bit": w_bit, "a_bit": a_bit, "recipe": name, **measured, "calibrate_s": seconds}


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add_case(parser)
    add = parser.add_argument
    add("--bits", nargs="+", default=["8/8", "4/8", "6/6", "4/4"], metavar="W/A", help="bit widths (8/8 4/8 6/6 4/4)")
    add("--recipes", nargs="+", choices=variants(), default=list(variants()), metavar="NAME", help="which (all)")
    add("--seed", type=natural, default=0, metavar="N", help="seed of the images, for the rows (0)")
    add("--rows", type=Path, default=ROWS, metavar="FILE", help="CSV file to append to (scripts/results/recipes.csv)")
    options = parser.parse_args()
    check_rows(options.rows, COLUMNS)
    widths = list(dict.fromkeys(map(parse_bits, options.bits)))
    device, model, calibration, val = open_case(options)
    # Another number than the recipe's own is another line of the tables
    labels = {name: named(name, recipe, len(calibration)) for name, recipe in variants().items()}
    about = {"model": options.model, "seed": options.seed, "n": len(val[1]), "calibration_images": len(calibration)}
    about |= origin(device)
    done = {tuple(row[key] for key in KEY) for row in read_csv(options.rows)}
    for w_bit, a_bit in widths:
        cases = {name: about | {"w_bit": w_bit, "a_bit": a_bit, "recipe": labels[name]} for name in options.recipes}
        names = [name for name, case in cases.items() if tuple(str(case[key]) for key in KEY) not in done]
        with float32_products():
            for row in ablate(model, calibration, val, w_bit, a_bit, names):
                append_row(options.rows, about | row | {"recipe": labels[row["recipe"]]}, COLUMNS)
                print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
