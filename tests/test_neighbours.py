import copy

import pytest
import torch
from families import build

from quant import calibrate, quantize_model
from utils.data import UNREADABLE
from utils.neighbours import compare_embeddings, embeddings, neighbour_accuracy, vote


def test_votes_are_those_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(count, 6, generator=generator) for count in (50, 9))
    labels = torch.randint(4, (50,), generator=generator)
    expected = []
    for query in queries:
        cosines = [(torch.dot(query, row) / query.norm() / row.norm()).item() for row in bank]
        nearest = sorted(range(50), key=lambda index: -cosines[index])[:5]
        votes = [sum(2.718281828459045 ** (cosines[i] / 0.07) for i in nearest if labels[i] == c) for c in range(4)]
        expected.append(votes.index(max(votes)))
    assert vote(bank, labels, queries, neighbours=5).tolist() == expected


def test_length_does_not_count_and_few_neighbours_suffice():
    bank, labels = torch.eye(3), torch.tensor([2, 0, 1])
    assert vote(bank, labels, 1e-3 * torch.eye(3)).tolist() == [2, 0, 1]


@pytest.fixture
def models():
    model = build("vit without classifier")
    quantized = calibrate(quantize_model(copy.deepcopy(model), 4, 4), torch.randn(4, 3, 32, 32))
    return {"float": model, "quantized": quantized}


def test_cosines_are_one_of_a_model_with_itself(models):
    images = torch.randn(5, 3, 32, 32)
    assert compare_embeddings(models["float"], copy.deepcopy(models["float"]), images)["worst_cosine"] > 0.9999
    measured = compare_embeddings(*models.values(), images)
    assert -1 <= measured["worst_cosine"] < measured["cosine"] < 0.9999


class Loader(list):
    batch_size = 4

    class dataset:
        files = [f"{index}.png" for index in range(12)]


def test_unreadable_images_count_nowhere(models):
    images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 3
    labels[5] = UNREADABLE
    loader = Loader([(images[i : i + 4], labels[i : i + 4], torch.arange(i, i + 4)) for i in (0, 4, 8)])
    values, kept, unreadable = embeddings(models, loader)
    assert len(kept) == 11 and unreadable == ["5.png"] and values["quantized"].shape == (11, 48)
    torch.testing.assert_close(values["float"][5], models["float"](images)[6], rtol=1e-4, atol=1e-4)
    measured = neighbour_accuracy(models, loader, loader)  # the nearest of each is itself
    assert measured["n"] == 11 and measured["unreadable"] == ["5.png", "5.png"] and measured["float_knn"] > 90
