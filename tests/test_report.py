from argparse import Namespace
from pathlib import Path

import pytest
import torch

from utils.report import headline


@pytest.mark.parametrize(
    ("model", "tag", "checkpoint", "expected"),
    [
        ("deit_tiny", "deit_tiny_patch16_224.fb_in1k", None, "deit_tiny_patch16_224.fb_in1k: W4/A8, noise images, "),
        ("deit_tiny", "deit_tiny_patch16_224.fb_in1k", Path("a/b.pth"), "deit_tiny_patch16_224 of a/b.pth: W4/A8, "),
        ("local-dir:mine/x", "swin_base.ms_in1k", None, "mine/x as timm's swin_base: W4/A8, "),
        ("hf-hub:me/mine", "vit_tiny", None, "me/mine as timm's vit_tiny: W4/A8, "),
    ],
)
def test_weights_that_are_not_timms_are_not_called_so(model, tag, checkpoint, expected):
    options = Namespace(model=model, checkpoint=checkpoint, w_bit=4, a_bit=8, mode=1, recipe="paper", symmetric=False)
    assert headline(options, tag, torch.device("cpu")).startswith(expected)


def test_what_differs_from_the_paper_is_in_the_headline():
    options = Namespace(model="x", checkpoint=None, w_bit=4, a_bit=4, mode=0, recipe="best", symmetric=True)
    assert headline(options, "x", torch.device("cpu")).startswith("x: W4/A4, recipe best, symmetric, generated images")
