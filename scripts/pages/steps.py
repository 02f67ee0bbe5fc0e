"""The table of how many steps and images are needed."""

import math
import statistics

from scripts.pages.cells import all_of, computed_with, model_name, spread_of

SMALL_MODELS = ("demo_vit", "demo_swin", "cifar_vit", "cifar_swin")
# Of scripts/steps.py, steps a round and images: one of the two varies at a time
BY_STEPS = tuple((steps, 32) for steps in (25, 50, 100, 250, 500))
BY_NUMBER = tuple((100, number) for number in (8, 16, 32, 64, 128))
PUBLISHED_SETTING = (500, 32)


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
        f"Top-1 in percent on {all_of(rows, 'n')} images, mean and standard deviation of {seeds} seeds, or of as many "
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
