"""What to leave at higher precision: quantize one layer, or one kind of layer, at a time, and sort by the damage.

    python generate_data.py --model demo_vit --num-images 64 --output images.safetensors
    python scripts/sensitivity.py --model demo_vit --images images.safetensors --w_bit 4 --a_bit 4

The first half of the images calibrates, the other half measures: the error of the logits, and how often the first
prediction stays the float model's. The names are patterns for --skip-layers of test_quant.py.
"""

import copy
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils.run.environment  # isort: skip  # noqa: F401 - first: a broken installation is told in one line

from torch import Tensor, nn

from models import build_model, normalization
from quant import calibrate, quantize_model, quantizer_bits
from utils.evaluate import compare
from utils.images import check_picture, load_images
from utils.options import add_bits, add_checkpoint, add_model
from utils.plots import plot_sensitivity, require_matplotlib
from utils.run.errors import InputError, exit_cleanly
from utils.run.files import check_writable
from utils.run.options import DEVICE_HELP, Parser, pick_device, positive
from utils.run.progress import progress_bar

BLOCK = re.compile(r"^(?:layers\.\d+\.)?blocks\.\d+\.|^layers\.\d+\.")


def measure(model: nn.Module, images: Tensor, by: str, w_bit: int, a_bit: int) -> list[dict]:
    """Quantize each group of quantizers alone.

    Args:
        model: a float timm model, left as it is.
        images: (B, 3, H, W), the first half to calibrate with and the other to measure on.
        by: "kind", quantizers of one name in all blocks; "layer", each quantizer; "block", all of one block.

    Returns:
        For each group pattern, agreement (percent) and logit_error, the worst first.
    """
    names = list(quantizer_bits(quantize_model(copy.deepcopy(model))))
    groups: dict[str, list[str]] = {}
    for name in names:
        prefix = BLOCK.match(name)
        pattern = {"layer": name, "kind": BLOCK.sub("*", name), "block": f"{prefix[0]}*" if prefix else name}[by]
        groups.setdefault(pattern, []).append(name)
    half, rows = len(images) // 2, []
    for pattern, members in progress_bar(groups.items(), desc="quantizing", unit="group"):
        others = [name for name in names if name not in members]
        quantized = quantize_model(copy.deepcopy(model), w_bit, a_bit, skip=others)
        calibrate(quantized, images[:half])
        rows.append({"pattern": pattern, **compare(model, quantized, images[half:])})
    return sorted(rows, key=lambda row: -row["logit_error"])


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add_model(parser)
    add_checkpoint(parser)
    add_bits(parser)
    add = parser.add_argument
    add("--device", metavar="NAME", help=DEVICE_HELP)
    add(
        "--images", type=Path, required=True, metavar="FILE", help="images that generate_data.py or test_quant.py wrote"
    )
    add("--by", choices=["kind", "layer", "block"], default="kind", help="what is quantized at a time (kind)")
    add("--top", type=positive, default=20, metavar="N", help="rows to print and to plot (20)")
    add("--plot", type=Path, metavar="FILE", help="draw them into a .png file (needs requirements-plots.txt)")
    options = parser.parse_args()
    if options.plot:
        require_matplotlib()
        check_picture("--plot", options.plot)
        check_writable(options.plot.parent)
    device = pick_device(options.device)
    model = build_model(options.model, options.checkpoint).to(device)
    if not model.num_classes:
        raise InputError(f"--model {options.model}: expected a model with a classifier, whose logits tell; it has none")
    images = load_images(options.images, model.patch_embed.img_size, *normalization(model))["images"]
    if len(images) < 2:
        raise InputError(f"--images {options.images}: expected at least 2 images; got {len(images)}")
    rows = measure(model, images, options.by, options.w_bit, options.a_bit)
    title = f"{options.model}, W{options.w_bit}/A{options.a_bit}, one {options.by} quantized at a time"
    print(f"{title}, worst first")
    print(f"{'pattern':<44}{'logit error':>12}{'agreement %':>13}")
    for row in rows[: options.top]:
        print(f"{row['pattern']:<44}{row['logit_error']:>12.4f}{row['agreement']:>13.1f}")
    if options.plot:
        plot_sensitivity(options.plot, title, {row["pattern"]: row["logit_error"] for row in rows[: options.top]})


if __name__ == "__main__":
    exit_cleanly(main)
