"""The scripts around the method: rows, tables, sweeps, sensitivity."""

import csv
import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

from quant import quantize_model, quantizer_bits
from scripts import benchmark, file_sizes, rows, sensitivity, tables, whole_runs
from scripts.pages import onnx
from scripts.pages.accuracy import paper_table
from scripts.pages.cells import cell, read_csv
from scripts.pages.speed import benchmark_table, evaluation_table, machine_table, whole_runs_table
from utils.run.errors import InputError

ROOT = Path(tables.__file__).resolve().parent.parent


def row(**values):
    base = {"model": "demo_vit", "w_bit": "8", "a_bit": "8", "recipe": "paper", "mode": "0", "seed": "0"}
    return {**dict.fromkeys(rows.COLUMNS, ""), **base, "n": "10", "top1": "50.0", "steps": "500", **values}


def test_rows_are_appended_and_a_repeated_run_replaces_its_failure(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    assert rows.read_rows(path) == []
    for values in ({"error": "out, of\nmemory", "top1": ""}, {"seed": "1"}, {"top1": "60.0"}):
        rows.append_row(path, row(**values))
    first, second = rows.read_rows(path)
    assert (first["seed"], first["top1"], first["error"]) == ("0", "60.0", "")
    assert second["seed"] == "1"


def test_a_row_is_dated_when_it_is_appended(tmp_path):
    def written(name, values, columns):
        rows.append_row(tmp_path / name, values, columns)
        return (tmp_path / name).read_text().splitlines()[1]

    now = written("now", {"model": "a"}, ("model", "date"))
    assert datetime.fromisoformat(now.removeprefix("a,")).tzinfo == timezone.utc
    assert written("given", {"date": "then"}, ("date",)) == "then"
    assert written("no column", {"n": 1}, ("n",)) == "1"


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"model,seed\nx,1\n", ",".join(rows.COLUMNS).encode() + b"\n1,2\n"],
    ids=["no text", "other columns", "torn row"],
)
def test_rows_that_are_damaged_are_refused(tmp_path, content):
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"rows\.csv"):
        rows.read_rows(tmp_path / "rows.csv")


def test_a_row_that_cannot_be_written_leaves_none_torn(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    rows.append_row(path, row())
    before, write = path.read_bytes(), os.write

    def fill_up(file, content):
        write(file, content[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", fill_up)
    with pytest.raises(InputError, match="No space left on device"):
        rows.append_row(path, row(seed="1"))
    assert path.read_bytes() == before


def test_runs_side_by_side_append_whole_rows(tmp_path):
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(rows.append_row, [tmp_path / "rows.csv"] * 40, [row(seed=str(seed)) for seed in range(40)]))
    assert sorted(int(found["seed"]) for found in rows.read_rows(tmp_path / "rows.csv")) == list(range(40))


def test_cells_are_mean_and_standard_deviation_over_seeds():
    data = [row(seed=str(seed), top1=str(top1)) for seed, top1 in enumerate((50, 52, 54))]
    data.append(row(seed="3", top1="", error="failed"))
    assert cell(data, "demo_vit", "8", "8", "0") == "52.00 ± 2.00"
    assert cell(data[:1], "demo_vit", "8", "8", "0") == "50.00"
    assert cell(data, "demo_vit", "8", "8", "1") == "not run"
    with pytest.raises(InputError, match="expected rows of the same options in a file; got none; --steps 50"):
        cell([*data, row(seed="4", options="--steps 50")], "demo_vit", "8", "8", "0")


def test_paper_table_has_the_difference_where_there_is_a_run():
    data = [row(model="deit_tiny", w_bit="4", top1="65.00"), row(model="deit_tiny", recipe="best", top1="72.00")]
    lines = paper_table(data).splitlines()
    assert len(lines) == 2 + 10 + 2
    assert lines[2].endswith("| not run | not run | 65.00 | -0.57 | not run |") and "| 65.57 |" in lines[2]
    assert lines[3].endswith("| not run | not run | not run | - | 72.00 |")


def test_pages_show_what_the_rows_say():
    process = subprocess.run([sys.executable, "scripts/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_the_list_of_files_names_every_file():
    text = (ROOT / "docs" / "code.md").read_text()
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    named = [file for file in files if file.startswith(("quant/", "models/", "utils/", "scripts/")) or "/" not in file]
    skipped = ("__init__.py", ".csv", ".json", ".gitignore", "README.md", "pyproject.toml")
    assert [file for file in named if not file.endswith(skipped) and Path(file).name not in text] == []


def sweep(tmp_path, image_root, bits, recipes="paper", modes="0 1", limit=10):
    settings = {"MODELS": "demo_vit", "SEEDS": "0", "BITS": bits, "DATASET": str(image_root)}
    settings |= {"RECIPES": recipes, "MODES": modes}
    settings |= {"ROWS": str(tmp_path / "rows.csv"), "RUNS": str(tmp_path / "runs"), "PYTHON": sys.executable}
    settings["OPTIONS"] = f"--limit {limit} --num-workers 0 --steps 1 --calib-batchsize 2 --device cpu"
    command = ["sh", "scripts/sweep.sh", "demo"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=300)


def test_sweep_keeps_rows_skips_what_is_there_and_goes_on_after_a_failure(tmp_path, image_root):
    process = sweep(tmp_path, image_root, "9/9 8/8")
    assert process.returncode == 1, process.stderr
    with (tmp_path / "rows.csv").open(newline="") as file:
        found = {(row["w_bit"], row["mode"]): row for row in csv.DictReader(file)}
    assert set(found) == {("9", "0"), ("8", "0"), ("9", "1"), ("8", "1")}
    assert "expected 2 to 8" in found["9", "0"]["error"] and found["9", "0"]["top1"] == ""
    assert found["8", "1"]["error"] == "" and 0 <= float(found["8", "1"]["top1"]) <= 100
    (images,) = (tmp_path / "runs").glob("demo_vit_seed0_*.safetensors")
    assert images.stem.rpartition("_")[2].isdecimal()  # of the options
    again = sweep(tmp_path, image_root, "8/8")
    assert again.returncode == 0 and again.stdout == ""
    other = sweep(tmp_path, image_root, "8/8", modes="1", limit=5)
    assert other.returncode == 0, other.stderr
    last = rows.read_rows(tmp_path / "rows.csv")[-1]
    assert last["n"] == "5" and last["options"].startswith(f"--dataset {image_root} --limit 5 --num-workers 0")


def test_sweep_makes_a_row_of_each_recipe_from_the_same_images(tmp_path, image_root):
    process = sweep(tmp_path, image_root, "8/8", "paper best", modes="0")
    assert process.returncode == 0, process.stderr
    started = [line for line in process.stdout.splitlines() if line.startswith("== ")]
    assert ["--images" in line for line in started] == [False, True]
    found = rows.read_rows(tmp_path / "rows.csv")
    assert [(one["recipe"], one["error"]) for one in found] == [("paper", ""), ("best", "")]


def test_sweep_ends_where_rows_cannot_be_kept(tmp_path, image_root):
    (tmp_path / "rows.csv").write_text("model,other\ndemo_vit,1\n")
    process = sweep(tmp_path, image_root, "8/8")
    assert process.returncode == 2 and process.stdout == ""
    assert "expected the columns model,w_bit" in process.stderr
    assert (tmp_path / "rows.csv").read_text() == "model,other\ndemo_vit,1\n"


def test_rows_that_cannot_be_appended_are_refused_before_they_are_measured(tmp_path):
    rows.check_rows(tmp_path / "new" / "rows.csv")
    rows.append_row(tmp_path / "new" / "rows.csv", {"model": "demo_vit"})
    rows.check_rows(tmp_path / "new" / "rows.csv")
    with pytest.raises(InputError, match="expected the columns a,b; got model,w_bit"):
        rows.check_rows(tmp_path / "new" / "rows.csv", ("a", "b"))
    with pytest.raises(InputError, match="not a file of rows that can be written"):
        rows.check_rows(tmp_path / "new")


def test_sweep_explains_itself():
    process = subprocess.run(["sh", "scripts/sweep.sh"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and "scripts/sweep.sh demo" in process.stdout


@pytest.mark.parametrize("by", ["kind", "layer", "block"])
def test_sensitivity_measures_every_group_alone(vit, by):
    measured = sensitivity.measure(vit, torch.randn(6, 3, 32, 32), by, w_bit=4, a_bit=4)
    errors = [row["logit_error"] for row in measured]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0
    names = list(quantizer_bits(quantize_model(vit)))
    if by == "layer":
        assert {row["pattern"] for row in measured} == set(names)
    else:
        assert 0 < len(measured) < len(names)
    if by == "block":
        assert {"blocks.0.*", "blocks.1.*"} < {row["pattern"] for row in measured}


def test_benchmark_writes_what_it_prints(tmp_path):
    line = ["--model", "demo_vit", "--batch", "2", "--rounds", "1", "--eval-batch", "2", "--steps", "1"]
    command = [sys.executable, "scripts/benchmark.py", *line, "--device", "cpu", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["precision"] for row in rows] == ["fp32", "bf16"]
    expected = {"model", "device", "batch", "bare_ms", "step_ms", "transcription_ms", "step_over_float32"}
    expected |= {"step_over_bare", "speedup"}
    expected |= {"peak_mb", "bare_peak_mb", "float_images_per_s", "quant_images_per_s", "threads", "versions"}
    for row in rows:
        assert expected <= row.keys() and all(row[key] for key in expected)
        assert f"{row['step_ms']:.2f}" in done.stdout and row["generation_warm_s"] > 0
    assert rows[0]["step_over_float32"] == rows[0]["step_over_bare"]


def test_benchmark_rows_take_the_place_of_those_of_the_same_case(tmp_path):
    path = tmp_path / "rows.json"
    old = [dict.fromkeys(benchmark.CASE, "x") | {"model": model, "step_ms": 1} for model in ("a", "b")]
    assert benchmark.updated(path, old) == old
    path.write_text(json.dumps(old))
    new = [old[0] | {"step_ms": 2}, old[0] | {"precision": "y", "step_ms": 3}]
    assert benchmark.updated(path, new) == [*new, old[1]]


def test_a_whole_run_is_split_into_parts(tmp_path):
    path = tmp_path / "rows.csv"
    command = [sys.executable, "scripts/whole_runs.py", "--model", "demo_vit", "--steps", "2", "--limit", "8"]
    done = subprocess.run([*command, "--rows", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = read_csv(path)
    seconds = {part: float(row[f"{part}_s"]) for part in (*whole_runs.PARTS, "total")}
    assert seconds["start"] > 0 and seconds["images"] > 0 and seconds["evaluate"] > 0
    assert seconds["total"] == pytest.approx(sum(seconds[part] for part in whole_runs.PARTS), abs=0.05)
    assert f"| demo_vit | paper | {row['precision']} | 2 x 2 | 8 |" in whole_runs_table([row])


@pytest.mark.parametrize(("w_bit", "limit"), [(8, 0.27), (4, 0.15)])
def test_files_of_integers_are_a_fraction_of_the_float_size(w_bit, limit):
    assert 0 < file_sizes.size_ratio("deit_tiny", w_bit) <= limit


def test_benchmark_table_has_goals_of_bf16_only_and_extrapolates_evaluation(tmp_path, monkeypatch):
    row = {"model": "deit_tiny", "bare_ms": 100.0, "step_ms": 110.0, "step_over_bare": 1.1, "transcription_ms": None}
    row |= {"bare_peak_mb": 1.0, "peak_mb": 2.0, "float_images_per_s": 50.0, "quant_images_per_s": 25.0, "batch": 8}
    row |= {"mode": "eager", "device": "cpu", "versions": {"torch": "2", "timm": "1"}}
    kinds = [{"precision": "fp32", "step_over_float32": 1.1}, {"precision": "bf16", "step_over_float32": 0.61}]
    kinds[1]["float_images_per_s"] = 80.0
    path = tmp_path / "onnx" / "deit_tiny.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"latency_ms": {"8": {"float": 100, "onnx": 50}}}))
    monkeypatch.setattr(onnx, "RESULTS", tmp_path)
    table = benchmark_table([row | kind for kind in kinds])
    assert "| deit_tiny | fp32 | 100 | 110 | 1.10 |  | 1.10 | 1 | 2 |" in table
    assert "| deit_tiny | bf16 | 100 | 110 | 0.61 | 0.62 | 1.10 | 1 | 2 |" in table
    assert table.count("| deit_tiny | 50.0 | 80.0 | 25.0 | 80.0 | 160.0 | 50 min | 16 min | 5 min |") == 1
    path.unlink()
    assert "| deit_tiny | 50.0 | 80.0 | 25.0 | not run | not run | 50 min | - | - |" in evaluation_table(
        [row | kind for kind in kinds]
    )
    seconds = {"generation_cold_s": None, "generation_warm_s": None}
    table = machine_table([row | kind | seconds for kind in kinds])
    assert "| deit_tiny | bf16 | eager | 100.0 | 110.0 | 0.61 | 1.10 | 1 | 2 | 80.0 | 25.0 |" in table
    table = machine_table([row | kinds[0] | seconds, row | kinds[1] | dict.fromkeys(seconds, 3.0)])
    assert "| 1 | 2 |  |  | 50.0 | 25.0 |" in table and "| 1 | 2 | 3.0 | 3.0 | 80.0 | 25.0 |" in table
