"""How large the files of --save are beside the float models: python scripts/file_sizes.py [--model NAME ...]

Weights are random, and so are the images that calibrate: the size does not depend on them.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils.run.environment  # isort: skip  # noqa: F401 - first: a broken installation is told in one line

import torch
from safetensors.torch import save

from models import build_model, model_tag
from models.saved import save_quantized
from models.small import SMALL_MODELS
from models.zoo import PAPER_MODELS
from quant import calibrate, quantize_model
from utils.run.errors import exit_cleanly
from utils.run.options import Parser


def size_ratio(name: str, w_bit: int) -> float:
    """Bytes of the quantized model's file over those of its float state dict as safetensors."""
    model = build_model(name, pretrained=False)
    float_size = len(save(model.state_dict()))
    calibrate(quantize_model(model, w_bit), torch.randn(1, 3, *model.patch_embed.img_size))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_quantized(path, model, name)
        return path.stat().st_size / float_size


def main() -> None:
    parser = Parser(description=__doc__.split(":")[0])
    names = [*PAPER_MODELS, *SMALL_MODELS]
    parser.add_argument("--model", nargs="+", default=names, metavar="NAME", help=f"({' '.join(names)})")
    options = parser.parse_args()
    for name in options.model:
        model_tag(name)
    print(f"{'':<12}{'W8':>8}{'W4':>8}")
    for name in options.model:
        print(f"{name:<12}{size_ratio(name, 8):>8.3f}{size_ratio(name, 4):>8.3f}", flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
