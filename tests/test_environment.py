import re
from pathlib import Path

import pytest

from utils.run import environment
from utils.run.environment import SUPPORTED, unsupported


@pytest.mark.parametrize(
    ("package", "found"),
    [("torch", "2.11.0"), ("torch", "2.15.0+cu132"), ("torch", "3.0"), ("timm", "1.0.31"), ("timm", "1.9.dev0")],
)
def test_versions_in_range(package, found):
    assert unsupported(package, found) == ""


@pytest.mark.parametrize(
    ("package", "found", "expected"),
    [
        ("torch", "2.9.1+cpu", "torch 2.11 or newer; found 2.9.1+cpu"),
        ("torchvision", "0.25", "torchvision 0.26 or newer; found 0.25"),
        ("timm", "1.0.30", "timm 1.0.31 or newer, below 2; found 1.0.30"),
        ("timm", "2.0.0rc1", "timm 1.0.31 or newer, below 2; found 2.0.0rc1"),
    ],
)
def test_versions_out_of_range(package, found, expected):
    assert unsupported(package, found) == f"expected {expected}"


def test_range_is_that_of_the_requirements():
    text = (Path(environment.__file__).parents[2] / "requirements.txt").read_text()
    found = {name: (low, high) for name, low, high in re.findall(r"^(\w+)>=([\d.]+)(?:,<([\d.]+))?$", text, re.M)}
    assert found == {name: (low, high or "") for name, (low, high) in SUPPORTED.items()}


def test_versions_are_those_of_the_modules():
    assert set(environment.versions()) == {"python", *SUPPORTED}
