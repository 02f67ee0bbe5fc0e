import ctypes
import dataclasses
import mmap
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from generate_data import GenerationSettings, generate_data
from utils.run.errors import InputError
from utils.run.memory import freed_memory_kept, is_out_of_memory

QUICK = GenerationSettings(steps=3)
PATHS = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 12"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 2 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("memory"), False),
    ],
    ids=["cuda", "linux", "windows", "cublas", "python", "shapes", "other"],
)
def test_is_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def limit(model, monkeypatch, most, error=torch.OutOfMemoryError):
    """Have `model` fail as a GPU does above `most` images; returns the sizes that it was tried with."""
    forward, tried = model.forward, []

    def limited(images):
        tried.append(len(images))
        if len(images) > most:
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(images)

    monkeypatch.setattr(model, "forward", limited)
    return tried


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError], ids=lambda error: error.__name__)
@pytest.mark.parametrize(("most", "fits", "sizes"), [(5, 4, [8, 4]), (1, 1, [8, 4, 2, 1]), (0, 0, [8, 4, 2, 1])])
def test_generation_says_what_would_fit(model, monkeypatch, most, fits, sizes, error):
    tried = limit(model, monkeypatch, most, error)
    message = "out of memory with 8 images: --checkpoint-activations takes less"
    message += f", and {fits} images at a time would fit" if fits else ""
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        generate_data(model, 8, settings=QUICK, progress=False)
    assert tried == sizes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_with_checkpointed_activations_there_is_nothing_more_to_advise(vit, monkeypatch):
    limit(vit, monkeypatch, 0)
    settings = dataclasses.replace(QUICK, checkpoint_activations=True)
    with pytest.raises(InputError, match=r"^out of memory with 4 images: not even one would fit$"):
        generate_data(vit, 4, settings=settings, progress=False)


def test_another_error_of_the_model_is_not_taken_for_it(vit, monkeypatch):
    def fail(images):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(vit, "forward", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        generate_data(vit, 2, settings=QUICK, progress=False)


def test_checkpointed_activations_give_the_same_images_with_fewer_kept(model):
    images, losses, kept = {}, {}, {}
    for again in (False, True):
        sizes: list[int] = []
        settings = dataclasses.replace(QUICK, checkpoint_activations=again)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            losses[again] = []
            images[again] = generate_data(model, 2, settings=settings, progress=False, losses=losses[again])
        kept[again] = sum(sizes)
    assert torch.equal(images[True], images[False]) and losses[True] == losses[False]
    assert kept[True] < kept[False]


def resident():
    """Of this process, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 1e6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_freed_memory_is_kept_within_the_context_and_given_back_after_it():
    """In a process of its own, whose heap has no other gaps; a context within it changes nothing."""
    code = """import torch
from test_memory import freed_memory_kept, resident
with freed_memory_kept():
    with freed_memory_kept():
        pass
    kept = torch.ones(2**25)  # 134 MB
    before = resident()
    del kept
    within = resident()
print(before - within, within - resident())"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=PATHS, capture_output=True, text=True
    )
    kept_less, given_back = map(float, done.stdout.split())
    assert kept_less < 10 and given_back > 120


@pytest.mark.parametrize("system", ["musl", "win32", "darwin"])
def test_other_c_libraries_are_left_as_they_are(monkeypatch, system):
    monkeypatch.setattr("sys.platform", "linux" if system == "musl" else system)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # knows no function
    with freed_memory_kept():
        pass
