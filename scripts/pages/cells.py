"""Rows of results: read, chosen, and put together in the cells of tables."""

import csv
import json
import statistics
from pathlib import Path

from utils.run.errors import InputError

RESULTS = Path(__file__).resolve().parent.parent / "results"
MODES = {"noise": "1", "real": "2", "generated": "0"}


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file as they are, none if it is absent."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def read_json(path: Path) -> list[dict]:
    """The rows of scripts/benchmark.py, which are beside the CSV files."""
    return json.loads(path.with_suffix(".json").read_text())


def values(
    rows: list[dict[str, str]], model: str, w_bit: str, a_bit: str, mode: str, recipe: str = "paper"
) -> list[float]:
    """Top-1 of every seed of one cell.

    Raises:
        InputError: the rows are of different options, which are not to be one mean.
    """
    wanted = {"model": model, "w_bit": w_bit, "a_bit": a_bit, "recipe": recipe, "mode": mode, "error": ""}
    chosen = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    if len(found := sorted({row["options"] for row in chosen})) > 1:
        listed = "; ".join(options or "none" for options in found)
        raise InputError(f"{model} W{w_bit}/A{a_bit}: expected rows of the same options in a file; got {listed}")
    return [float(row["top1"]) for row in chosen]


def cell(rows: list[dict[str, str]], model: str, w_bit: str, a_bit: str, mode: str, recipe: str = "paper") -> str:
    """Mean and standard deviation over the seeds."""
    top1 = values(rows, model, w_bit, a_bit, mode, recipe)
    return spread_of(top1, len(top1))


def model_name(rows: list[dict[str, str]], model: str) -> str:
    """A model's name, with its accuracy in float if there is a row of it."""
    floats = {row["float_top1"] for row in rows if row["model"] == model and row["float_top1"]}
    return f"{model} ({spread([float(value) for value in sorted(floats)])})" if floats else model


def with_bits(rows: list[dict[str, str]], bits: tuple[str, str]) -> list[dict[str, str]]:
    """The rows of these bits of weights and activations."""
    return [row for row in rows if (row["w_bit"], row["a_bit"]) == bits]


def bit_widths(rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Of weights and activations, the most bits first."""
    found = {(row["w_bit"], row["a_bit"]) for row in rows}
    return sorted(found, key=lambda bits: (-int(bits[0]) - int(bits[1]), int(bits[0])))


def spread(values: list[float]) -> str:
    """Mean, and standard deviation if there are several."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def spread_of(values: list[float], seeds: int, nothing: str = "not run") -> str:
    """The same, and how many values there are if that is less than the `seeds` of the table."""
    return spread(values) + f" ({len(values)} of {seeds})" * (len(values) < seeds) if values else nothing


def provenance(rows: list[dict[str, str]], what: str = "Top-1 in percent") -> str:
    """What the numbers are, and what they rest on, in one sentence."""
    rows = [row for row in rows if not row["error"]]
    if not rows:
        return "Ours: not run yet."
    seeds, n = len({row["seed"] for row in rows}), all_of(rows, "n")
    return (
        f"{what} on {n} images, mean and standard deviation of {seeds} seed{'s' * (seeds > 1)}; "
        f"{all_of(rows, 'calibration_images')} calibration images, 2 x {all_of(rows, 'steps')} steps; "
        f"{computed_with(rows)}"
    )


def computed_with(rows: list[dict[str, str]]) -> str:
    """On which devices, and with which versions."""
    return f"{all_of(rows, 'device')}, torch {all_of(rows, 'torch')}, timm {all_of(rows, 'timm')}."


def all_of(rows: list[dict[str, str]], key: str) -> str:
    """What a column holds, each value once."""
    return ", ".join(sorted({row[key] for row in rows if row[key]}))
