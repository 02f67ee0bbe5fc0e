"""Independent random streams: what one part of a run draws never moves what another part draws."""

import os

import numpy as np
import torch

_PURPOSES = ("images", "labels", "augmentation", "noise", "real", "limit", "uniform")


def stream(seed: int, purpose: str, *index: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments.

    Args:
        seed: the run's seed.
        purpose: one of "images", "labels", "augmentation", "noise", "real", "limit", "uniform".
        index: tells streams of one purpose apart, such as the number of a batch.
    """
    entropy = np.random.SeedSequence([seed, _PURPOSES.index(purpose), *index])
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))


def make_deterministic() -> None:
    """Have CUDA give the same bits for the same input, too, or refuse; slower there. A CPU does without."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA's first matrix product is
    torch.use_deterministic_algorithms(True)
