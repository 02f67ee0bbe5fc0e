"""Evaluation in bfloat16: scripts/bf16.py and its rows."""

import sys

import torch

from models import build_model
from scripts import bf16
from scripts.pages.accuracy import bf16_table
from scripts.pages.cells import read_csv
from utils.images import draw_noise, save_images


def test_both_forms_are_measured_in_both_precisions(tmp_path, image_root, monkeypatch):
    images, rows = tmp_path / "images.npy", tmp_path / "rows.csv"
    noise = draw_noise(2, build_model("demo_vit").patch_embed.img_size, 0)
    save_images(images, torch.zeros(3, 1, 1), torch.ones(3, 1, 1), noise)
    line = ["--model", "demo_vit", "--dataset", image_root, "--images", images, "--limit", 10, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bf16.py", *map(str, line), "--rows", str(rows)])
    seen, predict = [], bf16.predict
    monkeypatch.setattr(
        "scripts.accuracy.predict", lambda *of: seen.append(torch.is_autocast_enabled("cpu")) or predict(*of)
    )
    bf16.main()
    found = read_csv(rows)
    assert seen == [True, True] and [row["form"] for row in found] == ["float", "W8/A8"]
    assert all(row["n"] == "10" and 0 <= float(row["agreement"]) <= 100 for row in found)
    assert f"| demo_vit | W8/A8 | {float(found[1]['fp32_top1']):.2f} |" in bf16_table(found)
