"""Which system and versions a run uses, checked on import: this module is imported before anything heavy."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

# From, and below: as in requirements.txt. The tests hold at both ends of what can be installed.
SUPPORTED = {"torch": ("2.11", None), "torchvision": ("0.26", None), "timm": ("1.0.31", "2")}


def unsupported(name: str, found: str) -> str:
    """What to say of a version of a package that is out of the supported range; empty for one within."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in re.match(r"[\d.]*\d", text)[0].split(".")]

    low, high = SUPPORTED[name]
    if numbers(low) <= numbers(found) and (high is None or numbers(found) < numbers(high)):
        return ""
    return f"expected {name} {low} or newer{f', below {high}' if high else ''}; found {found}"


if sys.platform == "win32":  # files are locked, and replaced while they are open
    print("error: expected Linux or macOS; got Windows, on which WSL is a Linux", file=sys.stderr)
    sys.exit(2)
try:
    for package in SUPPORTED:
        if message := unsupported(package, version(package)):
            print(f"error: {message}; run: pip install -r requirements.txt", file=sys.stderr)
            sys.exit(2)
    import timm
    import torch
    import torchvision
except ModuleNotFoundError as error:
    print(f"error: {error}; run: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)
except (RuntimeError, ImportError) as error:  # such as "operator torchvision::nms does not exist"
    found = f"torch {version('torch')} and torchvision {version('torchvision')}"
    print(f"error: {found} do not fit; install both from one source, in one command ({error})", file=sys.stderr)
    sys.exit(2)


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python} | {m.__name__: m.__version__ for m in (torch, torchvision, timm)}


def commit() -> str | None:
    """The project's git commit, with "+" if code or weights differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = [*git, "status", "--porcelain", "--", "*.py", "*.txt", "models"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def device_name(device: torch.device) -> str:
    """A device as a person names it: "cuda (NVIDIA H100)", "cpu (2 threads)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
