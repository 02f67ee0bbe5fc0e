import torch

from utils.run.seeds import stream


def test_a_stream_depends_on_its_arguments_alone():
    first = torch.rand(3, generator=stream(0, "noise"))
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(3, generator=stream(0, "noise")))
    others = [
        stream(1, "noise"),
        stream(0, "real"),
        stream(0, "images", 0),
        stream(0, "images", 1),
        stream(2**32, "real"),
    ]
    values = [first, *(torch.rand(3, generator=other) for other in others)]
    assert len({tuple(value.tolist()) for value in values}) == len(values)
