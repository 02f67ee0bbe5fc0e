"""What is recorded, and when; tests/test_cuda.py replays it."""

import weakref

import pytest
import torch

from utils.run.replay import replayed


@pytest.fixture
def recorded(monkeypatch):
    """The arguments that graphs are recorded with; what is recorded doubles a function's result."""
    samples = []

    def record(function, arguments):
        samples.append(arguments)
        return lambda *arguments: 2 * function(*arguments)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return samples


def test_it_is_recorded_where_shapes_change(recorded):
    with replayed(torch.add) as function:
        for size in (2, 2, 3, 3, 2):
            assert torch.equal(function(torch.ones(size), torch.ones(size)), torch.full((size,), 4.0))
    assert [tuple(each.shape for each in arguments) for arguments in recorded] == [((n,), (n,)) for n in (2, 3, 2)]


def test_one_recording_is_held_at_a_time_and_none_in_the_end(monkeypatch):
    held, most = weakref.WeakSet(), []

    class Recording:
        def __init__(self, function, arguments):
            self.function, self.itself = function, self  # a cycle, as torch's have
            held.add(self)
            most.append(len(held))

        def __call__(self, *arguments):
            return self.function(*arguments)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", Recording)
    with replayed(torch.neg) as function:
        for size in (2, 3, 2):
            function(torch.ones(size))
    assert most == [1, 1, 1] and not held


def test_what_is_recorded_with_is_no_argument_but_asks_for_gradients_as_they_do(recorded):
    images, labels = torch.ones(2, requires_grad=True) * 3, torch.tensor([0, 1])
    with replayed(torch.mul) as function:
        function(images, labels)
    ((first, second),) = recorded
    assert first.is_leaf and first.requires_grad and not second.requires_grad
    assert torch.equal(first, images) and torch.equal(second, labels)
    assert first.data_ptr() != images.data_ptr() and second.data_ptr() != labels.data_ptr()


def test_without_a_graph_one_line_says_so_and_the_function_runs(monkeypatch, capsys):
    def fail(function, arguments):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    with replayed(torch.neg) as function:
        for value in (1.0, 2.0):
            assert function(torch.tensor(value)).item() == -value
    reason = "operation not permitted when stream is capturing"
    assert capsys.readouterr().err == f"no CUDA graph could be recorded; going on without it ({reason})\n"


def test_without_memory_nothing_is_tried_instead(monkeypatch):
    def fail(function, arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    with replayed(torch.neg) as function, pytest.raises(torch.OutOfMemoryError):
        function(torch.ones(1))
