"""How many steps and images are needed: scripts/steps.py, its rows, its table and its plot."""

import sys

import pytest
import torch

from generate_data import GenerationSettings, draw_labels, generate_data
from models import build_model, normalization
from quant import calibrate
from scripts import steps
from scripts.pages.cells import read_csv
from scripts.pages.steps import BY_NUMBER, BY_STEPS, PUBLISHED_SETTING, steps_table
from utils.images import draw_noise, load_images, save_images
from utils.run.errors import InputError

PLAN = ((1, 4, (2, 4)), (2, 2, (2,)))  # in place of what takes minutes


@pytest.fixture
def call(monkeypatch, image_root, tmp_path):
    """Run the script on the tests' images with PLAN; returns its rows."""
    monkeypatch.setattr(steps, "PLAN", PLAN)
    monkeypatch.setattr(steps, "find_dataset", lambda name: image_root)

    def run(*arguments):
        places = ["--rows", tmp_path / "rows.csv", "--images-folder", tmp_path / "images", "--device", "cpu"]
        line = ["steps.py", "--limit", 10, "--seed", 3, *places, "--model", "demo_vit", *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, line)))
        steps.main()
        return read_csv(tmp_path / "rows.csv")

    return run


def test_plan_has_every_setting_of_the_table_once():
    settings = [(number, count) for number, _, counts in steps.PLAN for count in counts]
    assert len(settings) == len(set(settings)) and set(settings) == {*BY_STEPS, *BY_NUMBER}
    published = GenerationSettings()
    assert (published.steps, published.batch_size) == PUBLISHED_SETTING
    assert all(count % published.batch_size == 0 for _, made, counts in steps.PLAN for count in counts if count < made)


def test_first_images_of_many_are_those_of_their_batch_alone(model):
    settings = GenerationSettings(steps=1, batch_size=2)
    many, one = (generate_data(model, count, 5, settings, progress=False) for count in (6, 2))
    assert torch.equal(many[:2], one) and not torch.equal(many[2:4], one)
    assert draw_labels(128, 50, 5)[:32].tolist() == draw_labels(32, 50, 5).tolist()


def test_settings_are_measured_once_and_images_kept(call, monkeypatch, tmp_path):
    first = call()
    keys = [(row["steps"], row["calibration_images"], row["w_bit"]) for row in first]
    assert keys == [(*setting, bits) for setting in (("1", "2"), ("1", "4"), ("2", "2")) for bits in ("8", "4")]
    for row in first:
        assert row["n"] == "10" and row["seed"] == "3" and row["a_bit"] == "8" and float(row["images_s"]) > 0
        assert 0 <= float(row["top1"]) <= 100 and row["torch"] and row["date"] and "cpu" in row["device"]
    assert {path.name for path in (tmp_path / "images").glob("*.safetensors")} == {
        "demo_vit-3-1x4.safetensors",
        "demo_vit-3-2x2.safetensors",
    }
    monkeypatch.setattr(steps, "generate_data", lambda *arguments: pytest.fail("generates again"))
    assert call() == first
    lines = (tmp_path / "rows.csv").read_text().splitlines(keepends=True)
    (tmp_path / "rows.csv").write_text("".join(lines[:3] + lines[4:]))
    *others, again = call()
    measured = ("calibration_images", "w_bit", "top1", "float_top1", "agreement")
    assert others == first[:2] + first[3:] and [again[key] for key in measured] == [first[2][key] for key in measured]
    assert again["images_s"] == ""  # they were there


def test_images_that_are_there_are_calibrated_with(call, tmp_path, monkeypatch):
    model, (path, seen) = build_model("demo_vit"), (tmp_path / "images" / "demo_vit-3-1x4.safetensors", [])
    monkeypatch.setattr(
        steps, "calibrate", lambda quantized, images: seen.append(images) or calibrate(quantized, images)
    )
    path.parent.mkdir()
    images = draw_noise(4, model.patch_embed.img_size, 0)
    save_images(path, *normalization(model), images)
    call()
    assert [len(found) for found in seen] == [2, 2, 4, 4, 2, 2] and torch.equal(seen[2], images)
    assert torch.equal(seen[0], images[:2]) and torch.equal(seen[5], load_images(*images_of(tmp_path, model))["images"])


def images_of(tmp_path, model):
    path = tmp_path / "images" / "demo_vit-3-2x2.safetensors"
    return path, model.patch_embed.img_size, *normalization(model)


def rows_of(**by_setting):
    """Rows of demo_vit at W8/A8: top-1 of each seed, by setting as s100x32."""
    base = {"model": "demo_vit", "w_bit": "8", "a_bit": "8", "n": "2000", "float_top1": "77.0", "images_s": "10.0"}
    rows = []
    for name, values in by_setting.items():
        number, images = name[1:].split("x")
        about = dict.fromkeys(steps.COLUMNS, "") | base | {"steps": number, "calibration_images": images}
        rows += [about | {"seed": str(seed), "top1": str(value)} for seed, value in enumerate(values)]
    return rows


def test_table_has_the_cheapest_setting_within_the_spread():
    rows = rows_of(s500x32=(76, 77, 78), s250x32=(76, 76, 76), s100x32=(75.9, 76, 76), s25x32=(78, 78), s100x8=(75,))
    table = steps_table(rows)
    assert (
        "| demo_vit (77.00) | W8/A8 | 78.00 ± 0.00 (2 of 3) | not run | 75.97 ± 0.06 | 76.00 ± 0.00 | 77.00 ± 1.00 |"
        in table
    )
    assert "| demo_vit (77.00) | W8/A8 | 75.00 (1 of 3) | not run | 75.97 ± 0.06 | not run | not run |" in table
    assert "| demo_vit | W8/A8 | 2 x 250 steps, 32 images | 50 % | -1.00 |" in table
    assert "| demo_vit | W4/A8 | not run | - | - |" in table and "| cifar_swin | W8/A8 | not run |" in table
    assert "a step of 32 images: demo_vit 0.02 s;" in table
    assert steps_table([]) == "Not run yet."
    enough = rows + rows_of(s100x16=(76, 76, 79))
    assert "| demo_vit | W8/A8 | 2 x 100 steps, 16 images | 10 % | +0.00 |" in steps_table(enough)


def test_plot_is_drawn_from_rows_alone(call, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(steps, "build_model", lambda *arguments: pytest.fail("builds the model"))
    with pytest.raises(InputError, match=r"rows\.csv: expected rows to draw; found none"):
        call("--plot", tmp_path / "steps.png")
    for row in rows_of(s500x32=(76, 77, 78), s25x32=(75,)):
        steps.append_row(tmp_path / "rows.csv", row, steps.COLUMNS)
    call("--plot", tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
