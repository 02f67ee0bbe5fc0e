"""Tables of accuracy: of the images, of their precision, and beside the paper's."""

import statistics
from collections.abc import Sequence

from scripts.pages.cells import (
    MODES,
    RESULTS,
    all_of,
    bit_widths,
    cell,
    computed_with,
    model_name,
    provenance,
    read_csv,
    spread_of,
    values,
    with_bits,
)
from scripts.rows import read_rows

OUTLIERS = "vit_small_patch14_dinov2"  # fine-tuned on CIFAR-10, with the outliers of a real pre-trained model
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
    """A larger model, of which scripts/ablation.py has measured images that were generated in either precision."""
    if not rows:
        return "Not run yet."
    lines = ["| recipe | images (float) | bits | top-1: fp32 | bf16 | difference | same prediction: fp32 | bf16 |"]
    lines.append("|---" * 8 + "|")
    bfloat16 = read_csv(RESULTS / "precision_large_bf16.csv")
    seeds = len({row["seed"] for row in rows})
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        first = next(row for row in rows if row["recipe"] == recipe)
        alike = {key: first[key] for key in ("model", "recipe", "n")}
        both = [[row for row in some if alike.items() <= row.items()] for some in (rows, bfloat16)]
        judged_on = f"{first['n']} ({float(first['float_top1']):.2f})"
        for w_bit, a_bit in bit_widths(both[0]):
            pairs = [with_bits(some, (w_bit, a_bit)) for some in both]
            top1, agreement = ([[float(row[name]) for row in some] for some in pairs] for name in ("top1", "agreement"))
            difference = f"{statistics.mean(top1[1]) - statistics.mean(top1[0]):+.2f}" if all(top1) else "-"
            cells = [spread_of(some, seeds) for some in (*top1, *agreement)]
            cells.insert(2, difference)
            lines.append(f"| {recipe} | {judged_on} | W{w_bit}/A{a_bit} | {' | '.join(cells)} |")
    about = f"{rows[0]['model']}; percent, mean and standard deviation of {seeds} seed{'s' * (seeds > 1)}; "
    about += f"{all_of(rows, 'calibration_images')} calibration images; "
    return "\n".join([*lines, "", about + computed_with(rows)])


def paper_table(rows: list[dict[str, str]]) -> str:
    """The paper's table: published, re-run by others, and ours."""
    lines = [
        "| model (float top-1) | bits | published | re-run: noise / real / generated | ours: noise | real | generated "
        "| generated - published | `best`: generated |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, w_bit, a_bit), (float_top1, published, rerun) in PUBLISHED.items():
        cells = [cell(rows, model, w_bit, a_bit, mode) for mode in MODES.values()]
        ours = values(rows, model, w_bit, a_bit, MODES["generated"])
        difference = f"{statistics.mean(ours) - published:+.2f}" if ours else "-"
        others = " / ".join(f"{value:.2f}" for value in rerun)
        lines.append(
            f"| {model} ({float_top1:.2f}) | W{w_bit}/A{a_bit} | {published:.2f} | {others} | {' | '.join(cells)} "
            f"| {difference} | {cell(rows, model, w_bit, a_bit, MODES['generated'], 'best')} |"
        )
    return "\n".join([*lines, "", provenance(rows)])


def bf16_table(rows: list[dict[str, str]]) -> str:
    """Top-1 with products in either precision, of float models and of their quantized forms."""
    if not rows:
        return "Not run yet."
    lines = ["| model | form | float32 | bf16 | same prediction |", "|---|---|---|---|---|"]
    for row in rows:
        top1 = " | ".join(f"{float(row[name]):.2f}" for name in ("fp32_top1", "top1"))
        lines.append(f"| {row['model']} | {row['form']} | {top1} | {float(row['agreement']):.2f} % |")
    about = f"Top-1 in percent on {all_of(rows, 'n')} images; {all_of(rows, 'calibration_images')} generated images "
    return "\n".join([*lines, "", f"{about}to calibrate with; {computed_with(rows)}"])
