"""Tables of speed and memory, and of where the seconds of whole runs go."""

from scripts.pages.cells import all_of, computed_with
from scripts.pages.onnx import onnx_rates

# Of scripts/benchmark.py: a step in bf16 to the bare float32 model's, eager, on a CPU that multiplies bfloat16 itself
GOALS = {"deit_tiny": 0.62, "deit_small": 0.47, "deit_base": 0.40, "swin_tiny": 0.38}


def benchmark_table(rows: list[dict]) -> str:
    """What a step of generation takes in each precision, and evaluation, from what scripts/benchmark.py has written."""
    lines = ["| model | precision | bare ms | step ms | step / float32 bare | goal | step / bare | bare MB | step MB |"]
    lines.append("|---" * 9 + "|")
    for row in rows:
        goal = f"{GOALS[row['model']]:.2f}" if row["precision"] == "bf16" and row["model"] in GOALS else ""
        lines.append(
            f"| {row['model']} | {row['precision']} | {row['bare_ms']:.0f} | {row['step_ms']:.0f} "
            f"| {row['step_over_float32']:.2f} | {goal} | {row['step_over_bare']:.2f} "
            f"| {row['bare_peak_mb']:.0f} | {row['peak_mb']:.0f} |"
        )
    lines += ["", f"Batch {rows[0]['batch']}, {rows[0]['mode']}; {measured_with(rows[0])}.", "", evaluation_table(rows)]
    return "\n".join(lines)


def machine_table(rows: list[dict]) -> str:
    """The same of another machine: in each mode, with images a second of the float model and of the simulation.

    Batches from the first step to the last have columns where they were measured.
    """
    whole = {"first batch s": "generation_cold_s", "one more s": "generation_warm_s"}
    whole = {title: key for title, key in whole.items() if any(row[key] for row in rows)}
    titles = ["model", "precision", "mode", "bare ms", "step ms", "step / float32 bare", "step / bare"]
    titles += ["bare MB", "step MB", *whole, "float, images/s", "simulated W8/A8, images/s"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row["model"], row["precision"], row["mode"]]
        cells += [f"{row[key]:.1f}" for key in ("bare_ms", "step_ms")]
        cells += [f"{row[key]:.2f}" for key in ("step_over_float32", "step_over_bare")]
        cells += [f"{row[key]:.0f}" for key in ("bare_peak_mb", "peak_mb")]
        cells += [f"{row[key]:.1f}" if row[key] else "" for key in whole.values()]
        cells += [f"{row[key]:.1f}" for key in ("float_images_per_s", "quant_images_per_s")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Batch {rows[0]['batch']}; {measured_with(rows[0])}."])


def measured_with(row: dict) -> str:
    """The device and the versions of a row of scripts/benchmark.py."""
    return f"{row['device']}, torch {row['versions']['torch']}, timm {row['versions']['timm']}"


def evaluation_table(rows: list[dict]) -> str:
    """Images a second by what computes them, and the minutes that ImageNet's validation images take at these rates."""
    lines = [
        "| model | float32 | bf16 | simulated W8/A8 | ONNX float32 | ONNX int8 | 50,000 images: float32 + simulated "
    ]
    lines[0] += "| ONNX float32 + int8 | ONNX int8 |"
    lines.append("|---" * 9 + "|")
    for model in dict.fromkeys(row["model"] for row in rows):
        by_precision = {row["precision"]: row for row in rows if row["model"] == model}
        rates = [by_precision[name]["float_images_per_s"] for name in ("fp32", "bf16")]
        rates += [by_precision["fp32"]["quant_images_per_s"], *onnx_rates(model)]
        cells = [f"{rate:.1f}" if rate else "not run" for rate in rates]
        for some in ((rates[0], rates[2]), rates[3:], rates[4:]):
            cells.append(f"{sum(50000 / rate for rate in some) / 60:.0f} min" if all(some) else "-")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def whole_runs_table(rows: list[dict[str, str]]) -> str:
    """The last run of each model and recipe on each device: its seconds by part, from rows of scripts/whole_runs.py."""
    parts = ("start", "build", "quantize", "images", "calibrate", "evaluate", "total")
    about, cases = ("model", "recipe", "precision", "steps"), ("model", "recipe", "device")
    last, tables = {tuple(row[key] for key in cases): row for row in rows}.values(), []
    for device in dict.fromkeys(row["device"] for row in last):
        some = [row for row in last if row["device"] == device]
        lines = [f"| {' | '.join(about)} | images evaluated | {' | '.join(parts)} |"]
        lines.append("|---" * (len(about) + 1 + len(parts)) + "|")
        for row in some:
            cells = [row["model"], row["recipe"], row["precision"], f"2 x {row['steps']}", row["n"]]
            cells += [f"{float(row[f'{part}_s']):.1f}" for part in parts]
            lines.append(f"| {' | '.join(cells)} |")
        calibrated = f"Seconds; {all_of(some, 'calibration_images')} calibration images; "
        tables.append("\n".join([*lines, "", calibrated + computed_with(some)]))
    return "\n\n".join(tables)
