"""Write the result tables of README and docs from the result rows.

python scripts/tables.py
"""

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from scripts.pages.accuracy import (
    OUTLIERS,
    bf16_table,
    paper_table,
    precision_large_table,
    precision_table,
    small_table,
)
from scripts.pages.cells import RESULTS, read_csv, read_json
from scripts.pages.onnx import onnx_table, read_files
from scripts.pages.recipes import recipes_table
from scripts.pages.speed import benchmark_table, machine_table, whole_runs_table
from scripts.pages.steps import steps_table
from scripts.pages.toolkits import latency_table, toolkits_table
from scripts.rows import read_rows
from utils.run.errors import exit_cleanly
from utils.run.options import Parser


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if a table is not what rows say")
    check = parser.parse_args().check
    for name, (table, page, read) in TABLES.items():
        text = (ROOT / page).read_text()
        begin, end = f"<!-- {name} table: scripts/tables.py -->\n", f"<!-- end of {name} table -->"
        before, rest = text.split(begin)
        written = before + begin + table(read(RESULTS / f"{name}.csv")) + "\n" + end + rest.split(end)[1]
        if not check:
            (ROOT / page).write_text(written)
        elif written != text:
            sys.exit(f"{page} is out of date: run python scripts/tables.py")


# By the name of their rows: what makes the table, the page that has it, and what reads the rows
TABLES = {
    "demo": (partial(small_table, ("demo_vit", "demo_swin")), "README.md", read_rows),
    "cifar": (partial(small_table, ("cifar_vit", "cifar_swin"), changes=True), "README.md", read_rows),
    "dino": (partial(small_table, (OUTLIERS,), changes=True), "docs/results.md", read_rows),
    "precision": (precision_table, "docs/results.md", read_rows),
    "precision_large_fp32": (precision_large_table, "docs/results.md", read_csv),
    "benchmark": (benchmark_table, "docs/results.md", read_json),
    "benchmark_zen4": (machine_table, "docs/results.md", read_json),
    "benchmark_gpu": (machine_table, "docs/results.md", read_json),
    "onnx": (onnx_table, "docs/deployment.md", read_files),
    "bf16": (bf16_table, "docs/results.md", read_csv),
    "whole_runs": (whole_runs_table, "docs/results.md", read_csv),
    "paper": (paper_table, "docs/results.md", read_rows),
    "steps": (steps_table, "docs/results.md", read_csv),
    "recipes": (recipes_table, "docs/recipes.md", read_csv),
    "toolkits": (toolkits_table, "docs/toolkits.md", read_csv),
    "toolkits_latency": (latency_table, "docs/toolkits.md", read_csv),
}

if __name__ == "__main__":
    exit_cleanly(main)
