import math

import pytest
import torch

from utils.run import optimisation
from utils.run.errors import InputError
from utils.run.optimisation import Optimisation
from utils.run.progress import progress_bar
from utils.run.signals import Stopped

STEPS = 25


class Descent:
    """Two tensors, an optimizer each, with a state; gradients with noise."""

    def __init__(self, file=None, seed=0, **options):
        self.x, self.y = torch.ones(3, requires_grad=True), torch.full((2, 2), 2.0, requires_grad=True)
        self.optimizers = [torch.optim.Adam([self.x], fused=True), torch.optim.SGD([self.y], lr=0.01, momentum=0.9)]
        self.random, self.numbers = torch.Generator().manual_seed(seed), []
        self.optimisation = Optimisation(
            self.step,
            ("a", "b"),
            STEPS,
            tensors={"x": self.x, "y": self.y},
            optimizers=self.optimizers,
            random=self.random,
            file=file,
            identity={"seed": seed},
            **options,
        )

    def step(self, number):
        self.numbers.append(number)
        a = (self.x * torch.randn(3, generator=self.random)).square().sum()
        b = self.y.square().sum()
        (a + b).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack([a.detach(), b.detach(), torch.ones(())])

    def run(self, stop_at=None):
        with progress_bar(total=STEPS, disable=True) as bar:
            self.optimisation.run(bar, lambda: 2 if self.optimisation.done == stop_at else None)
        return self

    def result(self):
        return self.x.tolist(), self.y.tolist(), self.optimisation.losses


@pytest.fixture
def expected():
    return Descent().run().result()


def test_each_step_is_done_once_in_order_and_its_terms_are_kept(expected):
    descent = Descent().run()
    assert descent.numbers == list(range(STEPS)) and descent.optimisation.done == STEPS
    assert [len(row) for row in descent.optimisation.losses] == [2] * STEPS
    assert descent.optimisation.losses[0][1] == 16.0 and descent.result() == expected


@pytest.mark.parametrize("at", [1, 9, 10, 24, 25])
def test_stopped_and_gone_on_from_it_ends_the_same(tmp_path, expected, at):
    """Tensors, the states of both optimizers, random numbers and losses go on."""
    file = tmp_path / "state.safetensors"
    with pytest.raises(Stopped, match=f"interrupted at step {at}; the state of step {at} is in {tmp_path}"):
        Descent(file).run(stop_at=at)
    again = Descent(file)
    assert again.optimisation.done == at
    assert again.run().result() == expected and again.numbers == list(range(at, STEPS))
    assert Descent(file).run().numbers == []  # what is finished is kept, too


def test_the_state_of_another_computation_is_refused(tmp_path):
    Descent(tmp_path / "state.safetensors").run()
    with pytest.raises(InputError, match="of another run: expected seed 1, got 0"):
        Descent(tmp_path / "state.safetensors", seed=1)


def test_what_is_not_finite_ends_it_with_the_last_good_state(tmp_path, expected):
    file = tmp_path / "state.safetensors"
    descent = Descent(file, not_finite=lambda: f"y was {descent.y[0, 0] < 2}")
    step = descent.step

    def fail(number):
        values = step(number)
        if number == 13:
            with torch.no_grad():
                descent.y.fill_(math.nan)
        return values if number < 13 else values * math.nan

    descent.optimisation.step = fail
    message = r"^a became nan at step 14; expected finite losses; y was True; the state of step 10 is in"
    with pytest.raises(FloatingPointError, match=message):
        descent.run()
    assert descent.y.isfinite().all() and descent.optimisation.done == 10
    assert Descent(file).run().result() == expected


def test_a_gradient_that_is_not_finite_is_named():
    descent = Descent()
    step = descent.step
    descent.optimisation.step = lambda number: step(number) * torch.tensor([1, 1, math.inf])
    with pytest.raises(FloatingPointError, match=r"^the gradient became inf at step 1; expected finite losses$"):
        descent.run()


@pytest.mark.parametrize(("advice", "said"), [(None, "out of memory"), (lambda: "of two", "out of memory of two")])
def test_out_of_memory_is_told_with_advice(advice, said):
    descent = Descent(out_of_memory=advice)

    def fail(number):
        raise torch.OutOfMemoryError

    descent.optimisation.step = fail
    with pytest.raises(InputError, match=f"^{said}$"):
        descent.run()


def test_it_is_saved_now_and_then_for_a_process_that_is_killed(tmp_path, monkeypatch, expected):
    monkeypatch.setattr(optimisation, "SAVE_EVERY", 0.0)
    file = tmp_path / "state.safetensors"
    descent = Descent(file)
    step = descent.step

    def kill(number):
        if number == 17:
            raise KeyboardInterrupt
        return step(number)

    descent.optimisation.step = kill
    with pytest.raises(KeyboardInterrupt):
        descent.run()
    again = Descent(file)
    assert again.optimisation.done == 10 and again.run().result() == expected
