"""A long optimisation, which can be stopped at any step and gone on from, and is watched while it runs."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils.run.errors import InputError
from utils.run.memory import attempt, freed_memory_kept
from utils.run.signals import Stopped
from utils.run.state import load_state, save_state

READ_EVERY = 10  # steps: to read a term is to wait for the device
SAVE_EVERY = 300.0  # seconds: what a process that is killed loses at most


class Optimisation:
    """Steps that change tensors in place, and all that a computation of minutes or hours needs around them.

    Attributes:
        done: steps that are done; after the last it is `total`.
        losses: the terms of every step that is done, a row each.
    """

    def __init__(
        self,
        step: Callable[[int], Tensor],
        terms: Sequence[str],
        total: int,
        *,
        tensors: dict[str, Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        random: torch.Generator | None = None,
        file: Path | None = None,
        identity: dict[str, Any] | None = None,
        not_finite: Callable[[], str] | None = None,
        out_of_memory: Callable[[], str] | None = None,
        go_on: str = "--resume",
    ) -> None:
        """What is optimised; goes on from `file`, if that is there.

        Args:
            step: does the step of a number, from 0; returns the terms of its loss and then the length of its gradient,
                (len(terms) + 1,), on the device.
            terms: their names.
            total: steps in all.
            tensors: by name, what the steps change in place.
            optimizers: those that change them, with a state of their own.
            random: what the steps draw from.
            file: where the state is kept; None for nowhere.
            identity: what the computation depends on, by name: a file of another one is refused.
            not_finite: says where it came from when a term is not finite; the tensors are then those before.
            out_of_memory: says what would help.
            go_on: what the user does to go on from a state that is saved.

        Raises:
            InputError: `file` is damaged, or of another computation.
        """
        self.step, self.terms, self.total = step, tuple(terms), total
        self.tensors, self.optimizers, self.random = tensors, tuple(optimizers), random
        self.file, self.identity = file, identity or {}
        self.not_finite, self.out_of_memory, self.go_on = not_finite, out_of_memory, go_on
        self.done, self.losses = 0, []
        if file and file.exists():
            self.restore(load_state(file, self.identity))

    @freed_memory_kept()
    def run(self, bar: tqdm, stop: Callable[[], int | None]) -> None:
        """Do all steps that are left.

        Args:
            bar: is moved on by each step, and shows the terms.
            stop: tells whether a signal asks to stop after the present step.

        Raises:
            FloatingPointError: a term is not finite; names it and its step.
            InputError: there is not the memory for a step.
            Stopped: `stop` said so; the state is saved.
        """
        good, recent, saved = self.snapshot(), [], time.monotonic()
        while self.done < self.total:
            values = attempt(partial(self.step, self.done))
            if values is None:
                raise InputError(f"out of memory {self.out_of_memory() if self.out_of_memory else ''}".rstrip())
            self.done += 1
            recent.append(values)
            bar.update()
            if len(recent) == READ_EVERY or self.done == self.total or stop():
                self.read(recent, good)
                terms = zip(self.terms, self.losses[-1], strict=True)
                bar.set_postfix({name: f"{value:.3g}" for name, value in terms}, refresh=False)
                good, recent = self.snapshot(), []
            if stop():
                raise Stopped(stop(), self.save(good, f"interrupted at step {self.done}"))
            if not recent and time.monotonic() - saved > SAVE_EVERY:
                self.save(good)
                saved = time.monotonic()
        self.save(good)

    def read(self, recent: list[Tensor], good: dict[str, Tensor]) -> None:
        """Read the terms of the `recent` steps; go back to the `good` state at one that is not finite."""
        rows, first = torch.stack(recent).tolist(), self.done - len(recent) + 1
        for number, row in enumerate(rows, start=first):
            for name, value in zip((*self.terms, "the gradient"), row, strict=True):
                if not math.isfinite(value):
                    self.restore(good)
                    where = f"; {self.not_finite()}" if self.not_finite else ""
                    problem = f"{name} became {value} at step {number}; expected finite losses{where}"
                    raise FloatingPointError(self.save(good, problem))
        self.losses += [row[:-1] for row in rows]

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of everything that steps change."""
        kept = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        for place, optimizer in enumerate(self.optimizers):
            for number, moments in optimizer.state_dict()["state"].items():
                kept |= {f"optimizer.{place}.{number}.{name}": value.clone() for name, value in moments.items()}
        if self.random:
            kept["random"] = self.random.get_state()
        return kept | {"losses": torch.tensor(self.losses, dtype=torch.float64).view(-1, len(self.terms))}

    def restore(self, kept: dict[str, Tensor]) -> None:
        """Go back to a snapshot."""
        self.losses = kept["losses"].tolist()
        self.done = len(self.losses)
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(kept[name])
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for name, value in kept.items():
            if name.startswith("optimizer."):
                _, place, number, moment = name.split(".")
                states[int(place)].setdefault(int(number), {})[moment] = value
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        if self.random:
            self.random.set_state(kept["random"])

    def save(self, kept: dict[str, Tensor], why: str = "") -> str:
        """Write a snapshot to the file, if there is one; returns `why`, and where to go on from."""
        if not self.file:
            return why
        save_state(self.file, {name: tensor.cpu() for name, tensor in kept.items()}, self.identity)
        return f"{why}; the state of step {len(kept['losses'])} is in {self.file.parent}: go on with {self.go_on}"
