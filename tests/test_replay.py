"""What is recorded, and when; tests/test_cuda.py replays it."""

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


def test_each_set_of_shapes_is_recorded_once(recorded):
    function = replayed(torch.add)
    for size in (2, 3, 2, 3):
        assert torch.equal(function(torch.ones(size), torch.ones(size)), torch.full((size,), 4.0))
    assert [tuple(each.shape for each in arguments) for arguments in recorded] == [((2,), (2,)), ((3,), (3,))]


def test_what_is_recorded_with_is_no_argument_but_asks_for_gradients_as_they_do(recorded):
    images, labels = torch.ones(2, requires_grad=True) * 3, torch.tensor([0, 1])
    replayed(torch.mul)(images, labels)
    ((first, second),) = recorded
    assert first.is_leaf and first.requires_grad and not second.requires_grad
    assert torch.equal(first, images) and torch.equal(second, labels)
    assert first.data_ptr() != images.data_ptr() and second.data_ptr() != labels.data_ptr()


def test_without_a_graph_one_line_says_so_and_the_function_runs(monkeypatch, capsys):
    def fail(function, arguments):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    function = replayed(torch.neg)
    for value in (1.0, 2.0):
        assert function(torch.tensor(value)).item() == -value
    reason = "operation not permitted when stream is capturing"
    assert capsys.readouterr().err == f"no CUDA graph could be recorded; going on without it ({reason})\n"


def test_without_memory_nothing_is_tried_instead(monkeypatch):
    def fail(function, arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    with pytest.raises(torch.OutOfMemoryError):
        replayed(torch.neg)(torch.ones(1))
