"""Where the seconds of whole runs of test_quant.py go, from its start to its table.

    python scripts/whole_runs.py --model demo_vit demo_swin
    python scripts/whole_runs.py --model deit_tiny --steps 50
    python scripts/whole_runs.py --model deit_base --recipe best  (a GPU)

A model that has no weights here gets random ones, and the demo's data set: the time depends on neither. One row a run
is appended to --rows. Data sets are there before the clock starts.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils.run.environment  # isort: skip  # noqa: F401 - first: a broken installation is told in one line

import torch
from safetensors.torch import save_file

from models import DATASETS, build_model
from quant.recipes import RECIPES
from scripts.accuracy import ORIGIN, origin
from scripts.rows import append_row, check_rows
from utils.photographs import find_dataset
from utils.run.errors import InputError, exit_cleanly
from utils.run.options import Parser, pick_device, positive

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "scripts" / "results" / "whole_runs.csv"
STAGES = ("build", "quantize", "images", "calibrate", "evaluate")
PARTS = ("start", *STAGES)  # of the total; the first is all that is in no stage: imports, and files at the end
RUN = ("model", "recipe", "precision", "steps", "calibration_images", "n")
COLUMNS = (*RUN, *(f"{part}_s" for part in (*PARTS, "total")), *ORIGIN)


def save_random(name: str, path: Path) -> None:
    """Write random weights of a model, with as many classes as the demo's data set has."""
    torch.manual_seed(0)
    model = build_model(name, pretrained=False)
    model.reset_classifier(build_model("demo_vit", pretrained=False).num_classes)
    save_file(model.state_dict(), path)


def whole_run(name: str, options: list[str]) -> dict:
    """The seconds of a run by part, and what it computed.

    Args:
        options: more of test_quant.py's.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["test_quant.py", "--model", name, "--output-dir", str(Path(folder) / "run"), *options]
        if name not in DATASETS:
            weights = Path(folder) / "random.safetensors"
            save_random(name, weights)
            command += ["--checkpoint", str(weights), "--dataset", "demo"]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        total = time.perf_counter() - start
        if done.returncode:
            raise InputError(f"{' '.join(command)}: {done.stderr.strip()}")
        results = json.loads((Path(folder) / "run" / "results.json").read_text())
    seconds = {stage: results["seconds"][stage] for stage in STAGES}
    seconds |= {"start": total - sum(seconds.values()), "total": total}
    row = {key: results[key] for key in ("model", "precision", "calibration_images", "n")}
    row |= {key: results["options"][key] for key in ("recipe", "steps")}
    return row | {f"{part}_s": round(value, 2) for part, value in seconds.items()}


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    names = ["demo_vit", "demo_swin"]
    add("--model", nargs="+", default=names, metavar="NAME", help=f"({' '.join(names)})")
    add("--recipe", choices=RECIPES, default="paper", help="(paper)")
    add("--steps", type=positive, default=500, metavar="N", help="generate with 2 x N steps (500)")
    add("--limit", type=positive, metavar="N", help="evaluate on N images (all)")
    add("--rows", type=Path, default=ROWS, metavar="FILE", help="append to it (scripts/results/whole_runs.csv)")
    options = parser.parse_args()
    check_rows(options.rows, COLUMNS)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # else the run would go on alone
    more = ["--recipe", options.recipe, "--steps", str(options.steps)]
    more += ["--limit", str(options.limit)] if options.limit else []
    for name in options.model:
        find_dataset(DATASETS.get(name, "demo"))
        row = whole_run(name, more) | origin(pick_device(None))
        append_row(options.rows, row, COLUMNS)
        print(", ".join(f"{column} {row[column]}" for column in COLUMNS[: -len(ORIGIN)]), flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
