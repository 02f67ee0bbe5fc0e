"""The table of exported files, and how fast they are evaluated, from what scripts/evaluate_onnx.py has written."""

import json
import re
from pathlib import Path

from scripts.pages.cells import RESULTS, spread


def read_files(path: Path) -> list[dict]:
    """The rows of the folder onnx, a file each, beside the CSV files."""
    return [json.loads(file.read_text()) for file in sorted(path.with_suffix("").glob("*.json"))]


def onnx_table(rows: list[dict]) -> str:
    """Size, kinds of products, and what an exported file predicts beside the simulation, over the seeds."""
    lines = ["| model | MB: integers / float | products in integers, in float | top-1: ONNX | simulated | float "]
    lines[0] += "| same prediction as simulated, % |"
    lines.append("|---" * 7 + "|")
    rows = [row for row in rows if "top1" in row]  # the others have random weights
    for name in dict.fromkeys(name_of(row) for row in rows):
        some = [row for row in rows if name_of(row) == name]
        size, products, top1 = (some[0][key] for key in ("bytes", "products", "top1"))
        cells = [name, f"{size['onnx'] / 1e6:.2f} / {size['float'] / 1e6:.2f}"]
        cells.append(", ".join(str(sum(products[kind].values())) for kind in ("integer", "float")))
        cells += [spread([row["top1"][kind] for row in some]) for kind in ("onnx", "simulated")]
        cells += [f"{top1['float']:.2f}", spread([row["same_as_onnx"]["simulated"] for row in some])]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{key} {rows[0]['versions'][key]}" for key in ("onnxruntime", "torch", "timm"))
    return "\n".join([*lines, "", f"n = {rows[0]['n']}, mean and standard deviation of {len(some)} seeds; {versions}."])


def name_of(row: dict) -> str:
    """The model, and the bits of its weights, which are in the name of its file: demo_vit_w8_seed1.onnx."""
    (bits,) = re.findall(r"_w(\d)", row["file"])
    return f"{row['model']} W{bits}"


def onnx_rates(model: str) -> list[float | None]:
    """Images a second of the float and the int8 model in ONNX Runtime at batch 8."""
    path = RESULTS / "onnx" / f"{model}.json"
    if not path.exists():
        return [None, None]
    latency = json.loads(path.read_text())["latency_ms"]["8"]
    return [8000 / latency[kind] for kind in ("float", "onnx")]
