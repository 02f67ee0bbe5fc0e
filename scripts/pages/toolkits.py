"""Tables of other quantization toolkits: accuracy by kind and number of images, and latency."""

import statistics

from scripts.pages.cells import all_of, spread, with_bits

KINDS = ("noise", "uniform", "fractals", "generated", "contrast", "real")  # of images, in the table of toolkits
CALIBRATION_IMAGES = "32"  # in it


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
        counts = all_of([row for row in usual if row["model"] == model], "n")
        name = f"{model} ({float(some[0]['float_top1']):.2f}, {counts})"
        lines.append(f"| {name} | {toolkit} | {some[0]['runtime']} | {size} | {' | '.join(cells)} |")
    errors = dict.fromkeys((row["model"], row["toolkit"], row["error"]) for row in rows if row["error"])
    failed = [f"- {toolkit} on {model} failed: `{error}`" for model, toolkit, error in errors]
    seeds = len({row["seed"] for row in usual})
    about = f"Top-1 in percent of one seed{f', or mean and standard deviation of {seeds}' * (seeds > 1)}; "
    about += f"{CALIBRATION_IMAGES} calibration images; {all_of(usual, 'device')}; {versions_of(rows)}."
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
    return "\n".join([*lines, "", f"Milliseconds a batch, int8 / float; {all_of(rows, 'device')}."])
