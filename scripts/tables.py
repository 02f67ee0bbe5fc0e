"""Write the result tables of README and docs from the result rows; with --check, fail if they are not what rows say.

python scripts/tables.py [--check]
"""

import csv
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scripts.rows import read_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results"
MODES = {"noise": "1", "real": "2", "generated": "0"}

# Top-1 on ImageNet as the paper gives it (table 1; one RTX 3090), and noise, real and generated of an independent
# re-run of the published implementation (repository ngrxmu/FDD-DFQ-ViT, README, seed 444).
PUBLISHED = {
    ("deit_tiny", "4", "8"): (72.21, 65.57, (7.83, 65.25, 65.68)),
    ("deit_tiny", "8", "8"): (72.21, 71.56, (10.31, 71.21, 71.62)),
    ("deit_small", "4", "8"): (79.85, 73.23, (7.57, 72.34, 72.32)),
    ("deit_small", "8", "8"): (79.85, 76.92, (11.86, 76.13, 76.17)),
    ("deit_base", "4", "8"): (81.85, 77.05, (12.14, 76.28, 76.53)),
    ("deit_base", "8", "8"): (81.85, 79.10, (15.73, 78.68, 78.96)),
    ("swin_tiny", "4", "8"): (81.35, 71.79, (0.47, 70.98, 71.48)),
    ("swin_tiny", "8", "8"): (81.35, 75.35, (0.51, 74.71, 75.00)),
    ("swin_small", "4", "8"): (83.20, 75.14, (0.74, 71.26, 74.89)),
    ("swin_small", "8", "8"): (83.20, 76.64, (0.80, 73.57, 76.54)),
}


def small_table(models: Sequence[str], rows: list[dict[str, str]]) -> str:
    """Small models: top-1 by bit width and kind of calibration images."""
    lines = ["| model (float top-1) | bits | noise | real | generated |", "|---|---|---|---|---|"]
    for model in models:
        for w_bit, a_bit in (("8", "8"), ("4", "8"), ("6", "6"), ("4", "4")):
            cells = [cell(rows, model, w_bit, a_bit, mode) for mode in MODES.values()]
            floats = {row["float_top1"] for row in rows if row["model"] == model and row["float_top1"]}
            name = f"{model} ({float(min(floats)):.2f})" if floats else model
            lines.append(f"| {name} | W{w_bit}/A{a_bit} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", provenance(rows)])


def precision_table(rows: list[dict[str, str]]) -> str:
    """Images generated as a CPU does it by default, as in the demo table, and as a GPU does."""
    lines = ["| model | bits | fp32, eager | bf16, compiled | difference |", "|---|---|---|---|---|"]
    float32 = read_rows(RESULTS / "demo.csv")
    for model in ("demo_vit", "demo_swin"):
        for bits in (("8", "8"), ("4", "8")):
            kinds = [values(some, model, *bits, MODES["generated"]) for some in (float32, rows)]
            difference = f"{statistics.mean(kinds[1]) - statistics.mean(kinds[0]):+.2f}" if all(kinds) else "-"
            cells = [cell(some, model, *bits, MODES["generated"]) for some in (float32, rows)]
            lines.append(f"| {model} | W{bits[0]}/A{bits[1]} | {' | '.join(cells)} | {difference} |")
    return "\n".join([*lines, "", provenance(rows)])


def paper_table(rows: list[dict[str, str]]) -> str:
    """The paper's table: published, re-run by others, and ours."""
    lines = [
        "| model (float top-1) | bits | published | re-run: noise / real / generated | ours: noise | real | generated "
        "| generated - published |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (model, w_bit, a_bit), (float_top1, published, rerun) in PUBLISHED.items():
        cells = [cell(rows, model, w_bit, a_bit, mode) for mode in MODES.values()]
        ours = values(rows, model, w_bit, a_bit, MODES["generated"])
        difference = f"{statistics.mean(ours) - published:+.2f}" if ours else "-"
        others = " / ".join(f"{value:.2f}" for value in rerun)
        lines.append(
            f"| {model} ({float_top1:.2f}) | W{w_bit}/A{a_bit} | {published:.2f} | {others} | {' | '.join(cells)} "
            f"| {difference} |"
        )
    return "\n".join([*lines, "", provenance(rows)])


def recipes_table(rows: list[dict[str, str]]) -> str:
    """What was measured of each recipe: a table for each model, a column for each bit width."""
    if not rows:
        return "Not run yet."
    tables = []
    for model in dict.fromkeys(row["model"] for row in rows):
        some = [row for row in rows if row["model"] == model]
        bits = list(dict.fromkeys((row["w_bit"], row["a_bit"]) for row in some))
        floats = float(some[0]["float_top1"])
        lines = [f"| {model} ({floats:.2f}) |" + "".join(f" W{w_bit}/A{a_bit} |" for w_bit, a_bit in bits)]
        lines.append("|---" * (len(bits) + 1) + "|")
        for recipe in dict.fromkeys(row["recipe"] for row in some):
            cells = [[row for row in some if (row["recipe"], row["w_bit"], row["a_bit"]) == (recipe, *b)] for b in bits]
            lines.append(f"| {recipe} |" + "".join(f" {recipe_cell(cell)} |" for cell in cells))
        seeds, last = len({row["seed"] for row in some}), some[-1]
        about = f"{last['n']} images, {seeds} seed{'s' * (seeds > 1)}, {last['calibration_images']} generated images"
        about += f"; {last['device']}, torch {last['torch']}, timm {last['timm']}."
        tables.append("\n".join([*lines, "", about]))
    return "\n\n".join(tables)


def recipe_cell(rows: list[dict[str, str]]) -> str:
    """Means over the seeds of top-1 and, in brackets, of the agreement."""
    if not rows:
        return "-"
    top1, agreement = (statistics.mean(float(row[key]) for row in rows) for key in ("top1", "agreement"))
    return f"{top1:.2f} ({agreement:.1f})"


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of scripts/ablation.py, none if the file is absent."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def values(rows: list[dict[str, str]], model: str, w_bit: str, a_bit: str, mode: str) -> list[float]:
    """Top-1 of every seed of one cell."""
    wanted = {"model": model, "w_bit": w_bit, "a_bit": a_bit, "mode": mode, "error": ""}
    return [float(row["top1"]) for row in rows if all(row[key] == value for key, value in wanted.items())]


def cell(rows: list[dict[str, str]], model: str, w_bit: str, a_bit: str, mode: str) -> str:
    """Mean and standard deviation over the seeds."""
    top1 = values(rows, model, w_bit, a_bit, mode)
    if not top1:
        return "not run"
    spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
    return f"{statistics.mean(top1):.2f}{spread}"


def provenance(rows: list[dict[str, str]]) -> str:
    """What the numbers rest on, in one sentence."""
    rows = [row for row in rows if not row["error"]]
    if not rows:
        return "Ours: not run yet."

    def all_of(key: str) -> str:
        return ", ".join(sorted({row[key] for row in rows}))

    seeds = len({row["seed"] for row in rows})
    return (
        f"Top-1 in percent on {all_of('n')} images, mean and standard deviation of {seeds} seed{'s' * (seeds > 1)}; "
        f"{all_of('calibration_images')} calibration images, 2 x {all_of('steps')} steps; {all_of('device')}, torch "
        f"{all_of('torch')}, timm {all_of('timm')}."
    )


def main() -> None:
    check = "--check" in sys.argv[1:]
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
    "cifar": (partial(small_table, ("cifar_swin",)), "docs/results.md", read_rows),
    "precision": (precision_table, "docs/results.md", read_rows),
    "paper": (paper_table, "docs/results.md", read_rows),
    "recipes": (recipes_table, "docs/recipes.md", read_csv),
}

if __name__ == "__main__":
    main()
