"""Tables of what recipes keep, beside other toolkits, and of what each of their steps adds."""

from scripts.pages.cells import RESULTS, all_of, bit_widths, read_csv, spread_of, with_bits
from scripts.pages.toolkits import CALIBRATION_IMAGES, versions_of

RECIPES = ("paper", "best", "learned")  # which users choose from
# What stands beside the recipes, and what each quantizes: the inputs of all products, or of those of layers alone ...
RIVALS = {
    "paper": "outputs",
    **dict.fromkeys(("best", "ort", "nncf", "nncf-no-smoothquant"), "all products"),
    **dict.fromkeys(("ours-best-layers", "torchao", "brevitas", "brevitas-gptq", "brevitas-learned-round"), "layers"),
    **dict.fromkeys(("ort-weights", "nncf-weights"), "weights"),
}


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
        calibrated = all_of(some, "calibration_images").replace(", ", " or ")
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


def recipe_cell(row: dict[str, str]) -> str:
    """Top-1 and, in brackets, the agreement."""
    return f"{float(row['top1']):.2f} ({float(row['agreement']):.1f})"
