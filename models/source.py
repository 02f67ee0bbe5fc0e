"""What a model's name stands for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

State = dict[str, Tensor]  # weights by name


@dataclass(frozen=True)
class Source:
    """An architecture, and where its weights are.

    Attributes:
        tag: the exact timm name, with its tag, or a demo model's name.
        config: what differs from timm's data configuration of it: mean, crop_pct, label_names, ...
        options: what differs from timm's arguments of its constructor: embed_dim, ...; norm_eps is of its norms.
        weights: finds, or downloads, a local file of weights; None for those that timm itself downloads.
        convert: from the names of the weights in the file to timm's, or to those that timm converts.
        notes: what there is to tell about it.
    """

    tag: str
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    weights: Callable[[], Path] | None = None
    convert: Callable[[State], State] = lambda state: state
    notes: tuple[str, ...] = ()
