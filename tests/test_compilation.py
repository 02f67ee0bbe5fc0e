"""Which way a function that is called very often goes; that compilation works is tested with what is compiled."""

import contextlib

import pytest
import torch

import generate_data as generation
from generate_data import GenerationSettings, generate_data
from utils.run import compilation


@pytest.mark.parametrize(
    ("device", "compile", "expected"),
    [("cuda", False, "replayed"), ("cpu", False, "eager"), ("cuda", True, "compiled"), ("cpu", True, "compiled")],
)
def test_a_gpu_replays_unless_it_is_to_compile(monkeypatch, device, compile, expected):
    monkeypatch.setattr(compilation, "replayed", lambda function: contextlib.nullcontext("replayed"))
    monkeypatch.setattr(compilation, "compiled_when_called", lambda function, trial, begin: "compiled")
    with compilation.repeated("eager", torch.device(device), compile, "trial") as function:
        assert function == expected


def test_activations_that_are_computed_again_are_neither_replayed_nor_compiled(vit, monkeypatch):
    monkeypatch.setattr(generation, "repeated", None)
    settings = GenerationSettings(steps=1, checkpoint_activations=True)
    assert generate_data(vit, 2, settings=settings, progress=False).isfinite().all()
