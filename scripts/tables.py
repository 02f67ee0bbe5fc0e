"""Write the result tables of README and docs from the result rows; with --check, fail if they are not what rows say.

python scripts/tables.py [--check]
"""

import csv
import json
import math
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
KINDS = ("noise", "uniform", "fractals", "generated", "contrast", "real")  # of images, in the table of toolkits
CALIBRATION_IMAGES = "32"  # in it
RECIPES = ("paper", "best", "learned")  # which users choose from
OUTLIERS = "vit_small_patch14_dinov2"  # fine-tuned on CIFAR-10, with the outliers of a real pre-trained model
# What stands beside the recipes, and what each quantizes: the inputs of all products, or of those of layers alone ...
RIVALS = {
    "paper": "outputs",
    **dict.fromkeys(("best", "ort", "nncf", "nncf-no-smoothquant"), "all products"),
    **dict.fromkeys(("ours-best-layers", "torchao", "brevitas", "brevitas-gptq", "brevitas-learned-round"), "layers"),
    **dict.fromkeys(("ort-weights", "nncf-weights"), "weights"),
}
SMALL_MODELS = ("demo_vit", "demo_swin", "cifar_vit", "cifar_swin")
# Of scripts/steps.py, steps a round and images: one of the two varies at a time
BY_STEPS = tuple((steps, 32) for steps in (25, 50, 100, 250, 500))
BY_NUMBER = tuple((100, number) for number in (8, 16, 32, 64, 128))
PUBLISHED_SETTING = (500, 32)
# Of scripts/benchmark.py: a step in bf16 to the bare float32 model's, eager, on a CPU that multiplies bfloat16 itself
GOALS = {"deit_tiny": 0.62, "deit_small": 0.47, "deit_base": 0.40, "swin_tiny": 0.38}

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


def small_table(models: Sequence[str], rows: list[dict[str, str]], changes: bool = False) -> str:
    """Small models: top-1 by bit width and kind of calibration images; or its change, if float differs by the seed."""
    if changes:
        rows = [row | {"top1": row["top1"] and float(row["top1"]) - float(row["float_top1"])} for row in rows]
    lines = ["| model (float top-1) | bits | noise | real | generated |", "|---|---|---|---|---|"]
    for model in models:
        for w_bit, a_bit in (("8", "8"), ("4", "8"), ("6", "6"), ("4", "4")):
            cells = [cell(rows, model, w_bit, a_bit, mode) for mode in MODES.values()]
            lines.append(f"| {model_name(rows, model)} | W{w_bit}/A{a_bit} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", provenance(rows, "Change of top-1 in points" if changes else "Top-1 in percent")])


def model_name(rows: list[dict[str, str]], model: str) -> str:
    """A model's name, with its accuracy in float if there is a row of it."""
    floats = {row["float_top1"] for row in rows if row["model"] == model and row["float_top1"]}
    return f"{model} ({spread([float(value) for value in sorted(floats)])})" if floats else model


def precision_table(rows: list[dict[str, str]]) -> str:
    """Images of the small models in their default precision, as in their other tables, and in bfloat16, compiled."""
    lines = ["| model | bits | fp32, eager | bf16, compiled | difference |", "|---|---|---|---|---|"]
    float32 = read_rows(RESULTS / "demo.csv") + read_rows(RESULTS / "cifar.csv")
    for model in dict.fromkeys(row["model"] for row in rows):
        for bits in (("8", "8"), ("4", "8")):
            kinds = [values(some, model, *bits, MODES["generated"]) for some in (float32, rows)]
            difference = f"{statistics.mean(kinds[1]) - statistics.mean(kinds[0]):+.2f}" if all(kinds) else "-"
            cells = [cell(some, model, *bits, MODES["generated"]) for some in (float32, rows)]
            lines.append(f"| {model} | W{bits[0]}/A{bits[1]} | {' | '.join(cells)} | {difference} |")
    return "\n".join([*lines, "", provenance(rows)])


def precision_large_table(rows: list[dict[str, str]]) -> str:
    """A larger model, of which scripts/ablation.py has measured images that were generated in either precision.

    Those in bfloat16, its default, are among the rows of the recipes, or in a file of their own if they were judged on
    other images.
    """
    if not rows:
        return "Not run yet."
    lines = ["| recipe | images (float) | bits | top-1: fp32 | bf16 | difference | same prediction: fp32 | bf16 |"]
    lines.append("|---" * 8 + "|")
    by_default = read_csv(RESULTS / "recipes.csv") + read_csv(RESULTS / "precision_large_bf16.csv")
    seeds = len({row["seed"] for row in rows})
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        first = next(row for row in rows if row["recipe"] == recipe)
        alike = {key: first[key] for key in ("model", "recipe", "n")}
        both = [[row for row in some if alike.items() <= row.items()] for some in (rows, by_default)]
        judged_on = f"{first['n']} ({float(first['float_top1']):.2f})"
        for w_bit, a_bit in bit_widths(both[0]):
            pairs = [with_bits(some, (w_bit, a_bit)) for some in both]
            top1, agreement = ([[float(row[name]) for row in some] for some in pairs] for name in ("top1", "agreement"))
            difference = f"{statistics.mean(top1[1]) - statistics.mean(top1[0]):+.2f}" if all(top1) else "-"
            cells = [spread_of(some, seeds) for some in (*top1, *agreement)]
            cells.insert(2, difference)
            lines.append(f"| {recipe} | {judged_on} | W{w_bit}/A{a_bit} | {' | '.join(cells)} |")
    about = f"{rows[0]['model']}; percent, mean and standard deviation of {seeds} seed{'s' * (seeds > 1)}; "
    about += f"{_all_of(rows, 'calibration_images')} calibration images; "
    return "\n".join([*lines, "", about + computed_with(rows)])


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


def benchmark_table(rows: list[dict]) -> str:
    """What a step of generation takes in each precision, and evaluation, from what scripts/benchmark.py has written."""
    lines = ["| model | precision | bare ms | step ms | step / float32 bare | goal | step / bare | naive ms | bare MB "]
    lines[0] += "| step MB |"
    lines.append("|---" * 10 + "|")
    for row in rows:
        goal = f"{GOALS[row['model']]:.2f}" if row["precision"] == "bf16" and row["model"] in GOALS else ""
        naive = f"{row['transcription_ms']:.0f}" if row["transcription_ms"] else ""
        lines.append(
            f"| {row['model']} | {row['precision']} | {row['bare_ms']:.0f} | {row['step_ms']:.0f} "
            f"| {row['step_over_float32']:.2f} | {goal} | {row['step_over_bare']:.2f} | {naive} "
            f"| {row['bare_peak_mb']:.0f} | {row['peak_mb']:.0f} |"
        )
    about, packages = rows[0], rows[0]["versions"]
    where = f"{about['device']}, torch {packages['torch']}, timm {packages['timm']}"
    lines += ["", f"Batch {about['batch']}, {about['mode']}; {where}.", "", evaluation_table(rows)]
    return "\n".join(lines)


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


def onnx_rates(model: str) -> list[float | None]:
    """Images a second of the float and the int8 model in ONNX Runtime at batch 8, from scripts/evaluate_onnx.py."""
    path = RESULTS / "onnx" / f"{model}.json"
    if not path.exists():
        return [None, None]
    latency = json.loads(path.read_text())["latency_ms"]["8"]
    return [8000 / latency[kind] for kind in ("float", "onnx")]


def bf16_table(rows: list[dict[str, str]]) -> str:
    """Top-1 with products in either precision, of float models and of their quantized forms."""
    if not rows:
        return "Not run yet."
    lines = ["| model | form | float32 | bf16 | same prediction |", "|---|---|---|---|---|"]
    for row in rows:
        top1 = " | ".join(f"{float(row[name]):.2f}" for name in ("fp32_top1", "top1"))
        lines.append(f"| {row['model']} | {row['form']} | {top1} | {float(row['agreement']):.2f} % |")
    about = f"Top-1 in percent on {_all_of(rows, 'n')} images; {_all_of(rows, 'calibration_images')} generated images "
    return "\n".join([*lines, "", f"{about}to calibrate with; {computed_with(rows)}"])


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
        calibrated = f"Seconds; {_all_of(some, 'calibration_images')} calibration images; "
        tables.append("\n".join([*lines, "", calibrated + computed_with(some)]))
    return "\n\n".join(tables)


def recipes_table(rows: list[dict[str, str]]) -> str:
    """What the recipes keep; then, a table for each model, all that was measured with the images of its first seed."""
    if not rows:
        return "Not run yet."
    tables = []
    for model in dict.fromkeys(row["model"] for row in rows):
        seed = min((row["seed"] for row in rows if row["model"] == model), key=int)
        some = [row for row in rows if (row["model"], row["seed"]) == (model, seed)]
        bits = bit_widths(some)
        floats = float(some[0]["float_top1"])
        lines = [f"| {model} ({floats:.2f}) |" + "".join(f" W{w_bit}/A{a_bit} |" for w_bit, a_bit in bits)]
        lines.append("|---" * (len(bits) + 1) + "|")
        for recipe in dict.fromkeys(row["recipe"] for row in some):
            cells = {(row["w_bit"], row["a_bit"]): recipe_cell(row) for row in some if row["recipe"] == recipe}
            lines.append(f"| {recipe} |" + "".join(f" {cells.get(pair, '-')} |" for pair in bits))
        last = some[-1]
        calibrated = _all_of(some, "calibration_images").replace(", ", " or ")
        about = f"{last['n']} images, seed {seed}, {calibrated} generated images; "
        about += f"{last['device']}, torch {last['torch']}, timm {last['timm']}."
        tables.append("\n".join([*lines, "", about]))
    parts = [kept_table(rows), rivals_table(rows, read_csv(RESULTS / "toolkits.csv")), *tables]
    return "\n\n".join(part for part in parts if part)


def rivals_table(rows: list[dict[str, str]], toolkits: list[dict[str, str]]) -> str:
    """The same for other toolkits on the same images, beside the recipes with the same seeds; nothing if not run."""
    rivals = [
        row | {"model": row["model"].split()[0]}  # without the name of its file of weights
        for row in toolkits
        if (row["images"], row["calibration_images"]) == ("generated", CALIBRATION_IMAGES) and row["toolkit"] in RIVALS
    ]
    recipes = [row | {"toolkit": row["recipe"], "error": ""} for row in rows]
    bits, lines, seeds = bit_widths(rivals), [], {row["seed"] for row in rivals}
    for model in dict.fromkeys(row["model"] for row in rows):
        others = [row for row in rivals if row["model"] == model]
        ours = [row for row in recipes if row["model"] == model and row["seed"] in {row["seed"] for row in others}]
        for name, quantized in RIVALS.items():
            some = [row for row in ours + others if row["toolkit"] == name]
            cells = [rival_cell(with_bits(some, pair), len(seeds)) for pair in bits]
            if some:
                lines.append(f"| {model}, {name} | {quantized} | {' | '.join(cells)} |")
    if not lines:
        return ""
    head = "| percent of float top-1 | quantized |" + "".join(f" W{w_bit}/A{a_bit} |" for w_bit, a_bit in bits)
    several = f", or mean and standard deviation of {len(seeds)}" * (len(seeds) > 1)
    about = f"One seed{several}; "
    about += f"{CALIBRATION_IMAGES} generated images; {versions_of(rivals)}."
    return "\n".join([head, "|---" * (len(bits) + 2) + "|", *lines, "", about])


def rival_cell(rows: list[dict[str, str]], seeds: int) -> str:
    """Percent of float top-1 of the rows of one toolkit at the same bits, or that it failed."""
    measured = [row for row in rows if not row["error"]]
    several = seeds if len(measured) > 1 else 1
    return spread_of(kept(measured), several) if measured else "failed" if rows else "-"


def kept_table(rows: list[dict[str, str]]) -> str:
    """How many percent of the float model's top-1 the recipes keep, that users can choose, mean over the seeds."""
    bits = bit_widths(rows)
    lines = ["| percent of float top-1 |" + "".join(f" W{w_bit}/A{a_bit} |" for w_bit, a_bit in bits)]
    lines.append("|---" * (len(bits) + 1) + "|")
    seeds = len({row["seed"] for row in rows})
    for model in dict.fromkeys(row["model"] for row in rows):
        for recipe in (*RECIPES, *(f"{name} symmetric" for name in RECIPES)):
            some = [row for row in rows if (row["model"], row["recipe"]) == (model, recipe)]
            if some:
                cells = [spread_of(kept(with_bits(some, pair)), seeds, "-") for pair in bits]
                lines.append(f"| {model}, {recipe} | {' | '.join(cells)} |")
    about = f"Mean and standard deviation of {seeds} seed{'s' * (seeds > 1)}, or of as many as a cell says."
    return "\n".join([*lines, "", about])


def kept(rows: list[dict[str, str]]) -> list[float]:
    """Percent of the float model's top-1, of every row."""
    return [100 * float(row["top1"]) / float(row["float_top1"]) for row in rows if float(row["float_top1"])]


def with_bits(rows: list[dict[str, str]], bits: tuple[str, str]) -> list[dict[str, str]]:
    """The rows of these bits of weights and activations."""
    return [row for row in rows if (row["w_bit"], row["a_bit"]) == bits]


def bit_widths(rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Of weights and activations, the most bits first."""
    found = {(row["w_bit"], row["a_bit"]) for row in rows}
    return sorted(found, key=lambda bits: (-int(bits[0]) - int(bits[1]), int(bits[0])))


def recipe_cell(row: dict[str, str]) -> str:
    """Top-1 and, in brackets, the agreement."""
    return f"{float(row['top1']):.2f} ({float(row['agreement']):.1f})"


def toolkits_table(rows: list[dict[str, str]]) -> str:
    """Top-1 of every model and toolkit by kind of calibration images; what failed; and by number of images."""
    if not rows:
        return "Not run yet."
    rows = with_bits(rows, ("8", "8"))
    usual = [row for row in rows if row["calibration_images"] == CALIBRATION_IMAGES]
    lines = [
        "| model (float top-1, images) | toolkit | runtime | MB | " + " | ".join(KINDS) + " |",
        "|---" * (4 + len(KINDS)) + "|",
    ]
    for model, toolkit in models_and_toolkits(usual):
        some = [row for row in usual if (row["model"], row["toolkit"]) == (model, toolkit)]
        cells = [toolkit_cell([row for row in some if row["images"] == kind]) for kind in KINDS]
        sizes = [int(row["bytes"]) for row in some if row["bytes"]]
        size = f"{statistics.mean(sizes) / 1e6:.2f}" if sizes else "-"
        counts = _all_of([row for row in usual if row["model"] == model and row["n"]], "n")
        name = f"{model} ({float(some[0]['float_top1']):.2f}, {counts})"
        lines.append(f"| {name} | {toolkit} | {some[0]['runtime']} | {size} | {' | '.join(cells)} |")
    errors = dict.fromkeys((row["model"], row["toolkit"], row["error"]) for row in rows if row["error"])
    failed = [f"- {toolkit} on {model} failed: `{error}`" for model, toolkit, error in errors]
    seeds = len({row["seed"] for row in usual})
    about = f"Top-1 in percent of one seed{f', or mean and standard deviation of {seeds}' * (seeds > 1)}; "
    about += f"{CALIBRATION_IMAGES} calibration images; {_all_of(usual, 'device')}; {versions_of(rows)}."
    parts = ["\n".join(lines), "\n".join(failed), about, number_table(rows)]
    return "\n\n".join(part for part in parts if part)


def versions_of(rows: list[dict[str, str]]) -> str:
    """Every package and version that rows name, once."""
    return ", ".join(sorted({part for row in rows for part in row["versions"].split(", ")}))


def number_table(rows: list[dict[str, str]]) -> str:
    """Top-1 by the number of generated images, where more than one was tried."""
    rows = [row for row in rows if row["images"] == "generated"]
    others = {(row["model"], row["toolkit"]) for row in rows if row["calibration_images"] != CALIBRATION_IMAGES}
    rows = [row for row in rows if (row["model"], row["toolkit"]) in others]
    numbers = sorted({int(row["calibration_images"]) for row in rows})
    if not numbers:
        return ""
    lines = ["| generated images | toolkit |" + "".join(f" {number} |" for number in numbers)]
    lines.append("|---" * (2 + len(numbers)) + "|")
    for model, toolkit in models_and_toolkits(rows):
        some = [row for row in rows if (row["model"], row["toolkit"]) == (model, toolkit)]
        cells = [toolkit_cell([row for row in some if row["calibration_images"] == str(n)]) for n in numbers]
        lines.append(f"| {model} | {toolkit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def models_and_toolkits(rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Each pair once: a model's together, and toolkits in one order, that of their first rows."""
    models, toolkits = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "toolkit"))
    pairs = {(row["model"], row["toolkit"]) for row in rows}
    return sorted(pairs, key=lambda pair: (models.index(pair[0]), toolkits.index(pair[1])))


def toolkit_cell(rows: list[dict[str, str]]) -> str:
    """Mean and standard deviation over the seeds, or that it failed."""
    top1 = [float(row["top1"]) for row in rows if not row["error"]]
    return spread(top1) if top1 else "failed" if rows else "-"


def steps_table(rows: list[dict[str, str]]) -> str:
    """Top-1 of the small models by steps and by number of images, and the cheapest setting that loses nothing."""
    if not rows:
        return "Not run yet."
    by_model = {model: [row for row in rows if row["model"] == model] for model in SMALL_MODELS}
    cases = [(model, bits) for model in SMALL_MODELS for bits in ((8, 8), (4, 8))]
    heads = [f"2 x {steps}" for steps, _ in BY_STEPS], [f"{number} images" for _, number in BY_NUMBER]
    seeds, parts = len({row["seed"] for row in rows}), []
    for settings, head in zip((BY_STEPS, BY_NUMBER), heads, strict=True):
        lines = [f"| model (float top-1) | bits | {' | '.join(head)} |", "|---" * (2 + len(head)) + "|"]
        for model, bits in cases:
            top1 = [setting_top1(by_model[model], bits, setting) for setting in settings]
            cells = [spread_of(values, seeds) for values in top1]
            lines.append(f"| {model_name(rows, model)} | W{bits[0]}/A{bits[1]} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    lines = ["| model | bits | cheapest within the spread | its cost | its top-1 less the published setting's |"]
    lines.append("|---|---|---|---|---|")
    lines += [f"| {model} | W{bits[0]}/A{bits[1]} | {cheapest_cells(by_model[model], bits)} |" for model, bits in cases]
    about = (
        f"Top-1 in percent on {_all_of(rows, 'n')} images, mean and standard deviation of {seeds} seeds, or of as many "
    )
    about += f"as a cell says; {step_seconds(by_model)}; {computed_with(rows)}"
    return "\n\n".join([*parts, "\n".join(lines), about])


def setting_top1(rows: list[dict[str, str]], bits: tuple[int, int], setting: tuple[int, int]) -> list[float]:
    """Top-1 of every seed with these steps and images, of the rows of one model."""
    keys = ("w_bit", "a_bit", "steps", "calibration_images")
    return [float(row["top1"]) for row in rows if tuple(int(row[key]) for key in keys) == (*bits, *setting)]


def cheapest_cells(rows: list[dict[str, str]], bits: tuple[int, int]) -> str:
    """Of one model: the setting of the fewest steps times images that is within the spread of the published one, which
    is a mean at most one standard deviation of its seeds below its mean; the cost as a part of its, and the difference.
    """
    top1 = {setting: setting_top1(rows, bits, setting) for setting in {*BY_STEPS, *BY_NUMBER}}
    published = top1[PUBLISHED_SETTING]
    if len(published) < 2:
        return "not run | - | -"
    low = statistics.mean(published) - statistics.stdev(published) - 1e-9
    complete = [setting for setting, values in top1.items() if len(values) >= len(published)]
    within = [setting for setting in complete if statistics.mean(top1[setting]) >= low]
    steps, number = min(within, key=lambda setting: (math.prod(setting), setting))
    cost = 100 * steps * number / math.prod(PUBLISHED_SETTING)
    difference = statistics.mean(top1[steps, number]) - statistics.mean(published)
    return f"2 x {steps} steps, {number} images | {cost:.3g} % | {difference:+.2f}"


def step_seconds(by_model: dict[str, list[dict[str, str]]]) -> str:
    """Seconds of a step of 32 images."""
    parts = []
    for model, rows in by_model.items():
        timed = [row for row in rows if row["images_s"] and row["calibration_images"] == "32"]
        if timed:
            seconds = statistics.median(float(row["images_s"]) / (2 * int(row["steps"])) for row in timed)
            parts.append(f"{model} {seconds:.2f} s")
    return f"CPU time of a step of 32 images: {', '.join(parts)}" if parts else "no times of generation"


def latency_table(rows: list[dict[str, str]]) -> str:
    """Milliseconds of int8 and float, by threads and batch size."""
    if not rows:
        return "Not run yet."
    cases = list(dict.fromkeys((row["threads"], row["batch"]) for row in rows if not row["error"]))
    heads = [f"{threads} thread{'s' * (threads != '1')}, batch {batch}" for threads, batch in cases]
    lines = ["| model | toolkit | runtime | " + " | ".join(heads) + " |", "|---" * (3 + len(cases)) + "|"]
    for model, toolkit in models_and_toolkits(rows):
        some = [row for row in rows if (row["model"], row["toolkit"]) == (model, toolkit)]
        found = {
            (row["threads"], row["batch"]): (float(row["ms"]), float(row["float_ms"])) for row in some if row["ms"]
        }
        cells = [
            "{:.2f} / {:.2f} = {:.2f}".format(*found[case], found[case][0] / found[case][1]) if case in found else "-"
            for case in cases
        ]
        lines.append(f"| {model} | {toolkit} | {some[0]['runtime']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Milliseconds a batch, int8 / float; {_all_of(rows, 'device')}."])


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file as they are, none if it is absent."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def read_json(path: Path) -> list[dict]:
    """The rows of scripts/benchmark.py, which are beside the CSV files."""
    return json.loads(path.with_suffix(".json").read_text())


def values(rows: list[dict[str, str]], model: str, w_bit: str, a_bit: str, mode: str) -> list[float]:
    """Top-1 of every seed of one cell."""
    wanted = {"model": model, "w_bit": w_bit, "a_bit": a_bit, "mode": mode, "error": ""}
    return [float(row["top1"]) for row in rows if all(row[key] == value for key, value in wanted.items())]


def cell(rows: list[dict[str, str]], model: str, w_bit: str, a_bit: str, mode: str) -> str:
    """Mean and standard deviation over the seeds."""
    top1 = values(rows, model, w_bit, a_bit, mode)
    return spread_of(top1, len(top1))


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
    seeds, n = len({row["seed"] for row in rows}), _all_of(rows, "n")
    return (
        f"{what} on {n} images, mean and standard deviation of {seeds} seed{'s' * (seeds > 1)}; "
        f"{_all_of(rows, 'calibration_images')} calibration images, 2 x {_all_of(rows, 'steps')} steps; "
        f"{computed_with(rows)}"
    )


def computed_with(rows: list[dict[str, str]]) -> str:
    """On which devices, and with which versions."""
    return f"{_all_of(rows, 'device')}, torch {_all_of(rows, 'torch')}, timm {_all_of(rows, 'timm')}."


def _all_of(rows: list[dict[str, str]], key: str) -> str:
    return ", ".join(sorted({row[key] for row in rows if row[key]}))


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
    "cifar": (partial(small_table, ("cifar_vit", "cifar_swin"), changes=True), "README.md", read_rows),
    "dino": (partial(small_table, (OUTLIERS,), changes=True), "docs/results.md", read_rows),
    "precision": (precision_table, "docs/results.md", read_rows),
    "precision_large_fp32": (precision_large_table, "docs/results.md", read_csv),
    "benchmark": (benchmark_table, "docs/results.md", read_json),
    "bf16": (bf16_table, "docs/results.md", read_csv),
    "whole_runs": (whole_runs_table, "docs/results.md", read_csv),
    "paper": (paper_table, "docs/results.md", read_rows),
    "steps": (steps_table, "docs/results.md", read_csv),
    "recipes": (recipes_table, "docs/recipes.md", read_csv),
    "toolkits": (toolkits_table, "docs/toolkits.md", read_csv),
    "toolkits_latency": (latency_table, "docs/toolkits.md", read_csv),
}

if __name__ == "__main__":
    main()
