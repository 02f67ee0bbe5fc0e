"""What each technique adds: scripts/ablation.py and its rows."""

import sys

import pytest
import torch

from models import build_model
from scripts import ablation
from scripts.pages.cells import read_csv
from scripts.pages.recipes import recipes_table
from utils.images import draw_noise, save_images
from utils.run.errors import InputError


@pytest.mark.parametrize(("bits", "rows"), [("4/9", "rows.csv"), ("8/8", "there")])
def test_what_cannot_be_measured_or_kept_is_refused_before_any_work(tmp_path, monkeypatch, bits, rows):
    monkeypatch.setattr(ablation, "open_case", lambda options: pytest.fail("builds the model"))
    (tmp_path / "there").mkdir()
    line = ["--dataset", ".", "--images", "x.npy", "--bits", "8/8", bits, "--rows", tmp_path / rows]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *map(str, line)])
    with pytest.raises(InputError, match=r"--bits: expected W/A, as 4/8; got '4/9'|there: not a file of rows"):
        ablation.main()


def test_recipes_are_measured_once(tmp_path, image_root, monkeypatch):
    images, rows = tmp_path / "images.npy", tmp_path / "rows.csv"
    save_images(
        images,
        torch.zeros(3, 1, 1),
        torch.ones(3, 1, 1),
        draw_noise(2, build_model("demo_vit").patch_embed.img_size, 0),
    )
    line = ["--model", "demo_vit", "--dataset", image_root, "--images", images, "--limit", 10, "--rows", rows]
    line += ["--device", "cpu", "--bits", "8/8", "2/2", "--recipes", "paper"]
    for names in ([], ["inputs"], ["inputs"]):
        monkeypatch.setattr(sys, "argv", ["ablation.py", *map(str, line), *names])
        ablation.main()
    found = read_csv(rows)
    measured = [(row["w_bit"], row["a_bit"], row["recipe"]) for row in found]
    names = "paper, 2 images", "inputs, 2 images"  # another number than theirs is another line of the tables
    assert measured == [(bits, bits, name) for name in names for bits in "82"]
    assert all(row["n"] == "10" and row["calibration_images"] == "2" and row["date"] and row["torch"] for row in found)
    assert float(found[0]["agreement"]) > float(found[1]["agreement"])
    assert "| paper, 2 images |" in recipes_table(found)
    monkeypatch.setattr(sys, "argv", ["ablation.py", *map(str, line), "--limit", "5"])
    ablation.main()
    assert [row["n"] for row in read_csv(rows)] == ["10"] * 4 + ["5"] * 2  # judged on others, it is another row
