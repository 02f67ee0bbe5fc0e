"""Interrupted runs: what is saved, what goes on from it, and what is refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import generate_data as generation
import test_quant
from generate_data import GenerationSettings, generate_data
from utils.options import parse_generation, parse_run
from utils.run import optimisation
from utils.run.errors import InputError, exit_cleanly
from utils.run.files import locked
from utils.run.signals import Stopped
from utils.run.state import digest, load_state, save_state, unfinished

ROOT = Path(__file__).parent.parent
SETTINGS = GenerationSettings(steps=12, batch_size=2)  # 24 steps a batch, of which every tenth is kept


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(n): the n-th step from now gets a signal while it is computed."""

    def arm(at, number=signal.SIGINT, module=generation):
        factor, left = generation.learning_rate_factor, [at]

        def counted(step, settings):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)
            return factor(step, settings)

        monkeypatch.setattr(generation, "learning_rate_factor", counted)
        return left

    return arm


def raise_interrupt(*arguments):
    raise KeyboardInterrupt  # as Ctrl-C does, where the shell has not told the process to ignore it


def generate(model, state=None, num_images=3, seed=0, settings=SETTINGS):
    losses: list[list[float]] = []
    images = generate_data(model, num_images, seed, settings, progress=False, losses=losses, state=state)
    return images, losses


# What is in a file


def test_what_is_saved_is_loaded(tmp_path):
    tensors = {"a": torch.randn(2, 3), "empty": torch.tensor([], dtype=torch.float64)}
    save_state(tmp_path / "new" / "x.safetensors", tensors, {"seed": 0, "betas": (0.5, 0.9)})
    loaded = load_state(tmp_path / "new" / "x.safetensors", {"seed": 0, "betas": (0.5, 0.9)})
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with pytest.raises(InputError, match="of another run: expected seed 1, got 0"):
        load_state(tmp_path / "new" / "x.safetensors", {"seed": 1, "betas": (0.5, 0.9)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-5]),
        lambda file: file.write_bytes(file.read_bytes()[:20]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\x80\x02}q\x00."),
        lambda file: file.unlink() or file.mkdir(),
    ],
    ids=["short", "header", "empty", "pickle", "folder"],
)
def test_a_damaged_state_is_refused(tmp_path, damage):
    file = tmp_path / "x.safetensors"
    save_state(file, {"a": torch.randn(9)}, {"seed": 0})
    damage(file)
    with pytest.raises(InputError, match=r"x\.safetensors: expected the state of an interrupted run") as caught:
        load_state(file, {"seed": 0})
    assert "\n" not in str(caught.value)


def test_digest_tells_weights_apart(vit):
    before = digest(vit.parameters())
    vit.norm.bias.data[3] += 1e-6
    assert digest(vit.parameters()) != before


# Its folder


def test_the_folder_is_removed_after_success_and_kept_after_failure(tmp_path):
    folder = tmp_path / "a.unfinished"
    with unfinished(folder, resume=False):
        save_state(folder / "x.safetensors", {}, {})
    assert not folder.exists()
    with pytest.raises(KeyError), unfinished(folder, resume=False):
        raise KeyError
    assert not folder.exists()  # there was nothing to keep
    with pytest.raises(KeyError), unfinished(folder, resume=False):
        save_state(folder / "held-out" / "x.safetensors", {}, {})
        raise KeyError
    with unfinished(folder, resume=True):
        assert [path.name for path in folder.rglob("*.safetensors")] == ["x.safetensors"]
    assert not folder.exists()


def test_the_folder_stays_this_runs_until_the_block_has_ended(tmp_path, monkeypatch):
    """Another run that begins while the states are removed is refused, and does not lose its lock."""
    folder, remove = tmp_path / "run", Path.unlink

    def late(path, *arguments, **options):
        if path.suffix == ".safetensors":
            with pytest.raises(InputError, match="another run writes there"), unfinished(folder, resume=False):
                pass
        remove(path, *arguments, **options)

    with unfinished(folder, resume=False) as state:
        (state / "a.safetensors").write_text("")
        monkeypatch.setattr(Path, "unlink", late)
    assert not folder.exists()


def test_without_resume_an_older_state_is_discarded_and_nothing_else(tmp_path):
    save_state(tmp_path / "x.safetensors", {}, {})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(KeyError), unfinished(tmp_path, resume=False):
        assert not (tmp_path / "x.safetensors").exists()
        raise KeyError
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("make", [None, "empty", "draft"])
def test_resume_with_nothing_to_resume_is_refused(tmp_path, make):
    folder = tmp_path / "a.unfinished"
    if make:
        folder.mkdir()
    if make == "draft":  # which kill -9 left
        (folder / ".batch-0-0123abcd.safetensors").write_bytes(b"")
    with (
        pytest.raises(InputError, match="--resume: expected the state of an interrupted run in"),
        unfinished(folder, resume=True),
    ):
        pytest.fail("runs")


# Generation


@pytest.mark.parametrize("at", [1, 20, 25, 48])
def test_interrupted_at_any_step_the_images_are_the_same(vit, tmp_path, interrupt, at):
    """Of the first or second batch, in the first or second round, and after the very last step."""
    expected = generate(vit)
    interrupt(at)
    with pytest.raises(
        Stopped, match=f"interrupted at step {(at - 1) % 24 + 1}; the state of step .*--resume"
    ) as caught:
        generate(vit, tmp_path)
    assert caught.value.number == signal.SIGINT
    left = interrupt(1000)
    images, losses = generate(vit, tmp_path)
    assert torch.equal(images, expected[0]) and losses == expected[1]
    assert 1000 - left[0] == 48 - at  # no step was done again


def test_swin_interrupted_twice(swin, tmp_path, interrupt):
    expected = generate(swin)
    for at in (5, 14):
        interrupt(at, signal.SIGTERM)
        with pytest.raises(Stopped) as caught:
            generate(swin, tmp_path)
        assert caught.value.number == signal.SIGTERM
    images, losses = generate(swin, tmp_path)
    assert torch.equal(images, expected[0]) and losses == expected[1]


def test_a_signal_in_the_last_moment_is_not_lost(vit, tmp_path, monkeypatch):
    save = optimisation.save_state

    def late(*arguments):
        save(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(optimisation, "save_state", late)
    with pytest.raises(Stopped):
        generate(vit, tmp_path, num_images=2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "seed 4, got 0"),
        ({"settings": GenerationSettings(steps=13, batch_size=2)}, "steps 13, got 12"),
        ({"settings": GenerationSettings(steps=12, batch_size=2, precision="bf16")}, "precision bf16, got fp32"),
        ({"num_images": 1}, r"labels \[\d+\], got \[\d+, \d+\]"),
        ("weights", r"weights \w{16}, got \w{16}"),
    ],
    ids=["seed", "steps", "precision", "num_images", "weights"],
)
def test_the_state_of_another_run_is_refused(vit, tmp_path, interrupt, change, named):
    interrupt(3)
    with pytest.raises(Stopped):
        generate(vit, tmp_path)
    if change == "weights":
        vit.head.bias.data += 1
        change = {}
    with pytest.raises(InputError, match=f"of another run: expected {named}$"):
        generate(vit, tmp_path, **change)


# The command lines


def images_command(output, *arguments):
    line = ["--model", "demo_vit", "--num-images", "2", "--steps", "6", "--device", "cpu", "--output", str(output)]
    return parse_generation([*line, *arguments])


def code(run, options):
    with pytest.raises(SystemExit) as caught:
        exit_cleanly(lambda: run(options))
    return caught.value.code


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_generate_data_goes_on_where_it_was_stopped(tmp_path, interrupt, capsys, number, expected):
    generation.run(images_command(tmp_path / "whole.safetensors"))
    output, folder = tmp_path / "a.safetensors", tmp_path / "a.unfinished"
    interrupt(8, number)
    assert code(generation.run, images_command(output)) == expected
    assert "interrupted at step 8; the state of step 8 is in" in (said := capsys.readouterr().err)
    assert f"{folder}: go on with --resume" in said
    assert [path.name for path in folder.iterdir()] == ["batch-0.safetensors"] and not output.exists()
    left = interrupt(100)
    generation.run(images_command(output, "--resume"))
    assert 100 - left[0] == 4
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not folder.exists()
    assert code(generation.run, images_command(output, "--resume")) == 2
    assert f"error: --resume: expected the state of an interrupted run in {folder}" in capsys.readouterr().err


def test_a_damaged_or_foreign_state_ends_with_one_line(tmp_path, interrupt, capsys):
    output, file = tmp_path / "a.safetensors", tmp_path / "a.unfinished" / "batch-0.safetensors"
    interrupt(8)
    assert code(generation.run, images_command(output)) == 130
    capsys.readouterr()
    assert code(generation.run, images_command(output, "--resume", "--seed", "5")) == 2
    assert "of another run: expected seed 5, got 0\n" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:1000])
    assert code(generation.run, images_command(output, "--resume")) == 2
    assert "batch-0.safetensors: expected the state of an interrupted run" in capsys.readouterr().err
    generation.run(images_command(output))  # without --resume it is discarded
    assert output.exists() and not file.parent.exists()


def test_two_runs_with_one_output_are_refused(tmp_path, capsys):
    folder = tmp_path / "a.unfinished"
    folder.mkdir()
    with locked(folder):
        assert code(generation.run, images_command(tmp_path / "a.safetensors")) == 2
    assert f"error: {folder}: another run writes there" in capsys.readouterr().err
    assert not (tmp_path / "a.safetensors").exists()


def quantize_command(image_root, output_dir, *arguments):
    line = ["--model", "demo_vit", "--steps", "6", "--calib-batchsize", "2", "--num-workers", "0", "--device", "cpu"]
    return parse_run([*line, "--dataset", str(image_root), "--output-dir", str(output_dir), *arguments])


FILES = ("images.safetensors", "images.png", "ranges.json")


def test_test_quant_interrupted_in_generation(tmp_path, image_root, interrupt):
    expected = test_quant.run(quantize_command(image_root, tmp_path / "whole"))
    interrupt(5)
    assert code(test_quant.run, quantize_command(image_root, tmp_path / "a")) == 130
    assert not list((tmp_path / "a").iterdir())
    left = interrupt(100)
    results = test_quant.run(quantize_command(image_root, tmp_path / "a", "--resume"))
    assert 100 - left[0] == 7 and results["top1"] == expected["top1"]
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "whole"]


def test_test_quant_interrupted_in_evaluation_does_not_generate_again(
    tmp_path, image_root, interrupt, monkeypatch, capsys
):
    expected = test_quant.run(quantize_command(image_root, tmp_path / "whole"))
    measure = test_quant.measure
    monkeypatch.setattr(test_quant, "measure", raise_interrupt)
    assert code(test_quant.run, quantize_command(image_root, tmp_path / "a")) == 130
    assert [path.name for path in (tmp_path / "a.unfinished").iterdir()] == ["batch-0.safetensors"]
    left = f"interrupted; what is done is in {tmp_path / 'a.unfinished'}: go on with --resume\n"
    assert capsys.readouterr().err.endswith(left)
    monkeypatch.setattr(test_quant, "measure", measure)
    left = interrupt(100)
    results = test_quant.run(quantize_command(image_root, tmp_path / "a", "--resume"))
    assert left == [100] and results["top1"] == expected["top1"]
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "a.unfinished").exists()


def test_held_out_images_go_on_too(tmp_path, interrupt, monkeypatch):
    monkeypatch.setattr(test_quant, "DATASETS", {})  # which would bring their own data set
    monkeypatch.setattr(test_quant, "HELD_OUT", 2)
    line = ["--model", "demo_vit", "--steps", "3", "--calib-batchsize", "2", "--device", "cpu", "--output-dir"]
    expected = test_quant.run(parse_run([*line, str(tmp_path / "whole")]))
    interrupt(8)
    assert code(test_quant.run, parse_run([*line, str(tmp_path / "a")])) == 130
    left = interrupt(100)
    results = test_quant.run(parse_run([*line, str(tmp_path / "a"), "--resume"]))
    assert 100 - left[0] == 4 and results["logit_error"] == expected["logit_error"]
    tensors, whole = (load_file(tmp_path / name / "images.safetensors") for name in ("a", "whole"))
    assert all(torch.equal(tensors[name], whole[name]) for name in ("images", "held_out"))


def test_a_process_that_is_told_to_stop_saves_and_one_with_its_output_is_refused(tmp_path):
    """The real thing, while it runs: a second run with its output, then SIGTERM."""
    command = [sys.executable, "generate_data.py", "--model", "demo_vit", "--num-images", "33", "--steps", "100000"]
    command += ["--device", "cpu", "--output", str(tmp_path / "a.safetensors")]
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stderr=errors)
    try:
        end = time.monotonic() + 60
        while "step/s" not in (tmp_path / "errors").read_text():  # it generates
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        options = images_command(tmp_path / "a.safetensors")
        with pytest.raises(InputError, match=r"a\.unfinished: another run writes there"):
            generation.run(options)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
    last = (tmp_path / "errors").read_text().splitlines()[-1]
    assert "interrupted at step" in last and "go on with --resume" in last
    assert "Traceback" not in (tmp_path / "errors").read_text()
    state = load_file(tmp_path / "a.unfinished" / "batch-0.safetensors")
    assert state["images"].isfinite().all() and len(state["losses"]) > 0
