import oracle
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.entropy import (
    CACHE,
    POINTS,
    _float32_product,
    _opaque_product,
    patch_similarity,
    patch_similarity_entropy,
    patch_tokens,
)
from utils.losses import total_variation
from utils.run.errors import InputError


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ["vit", "narrow", "swin"])
def test_entropy_and_gradient_equal_golden(golden, name):
    data = golden("losses")
    features = data[f"{name}_attn"].requires_grad_()
    value = patch_similarity_entropy(features, num_images=4)
    (gradient,) = torch.autograd.grad(value, features)
    assert relative(value, data[f"{name}_entropy"]) < 1e-4
    assert relative(gradient, data[f"{name}_grad"]) < 1e-4


@pytest.mark.parametrize("shape", [(1, 1, 4, 3), (2, 3, 10, 8), (3, 1, 50, 5), (2, 2, 41, 64)], ids=str)
@pytest.mark.parametrize("windows", [1, 3])
def test_entropy_and_gradient_equal_oracle(shape, windows):
    torch.manual_seed(0)
    B = shape[0]
    features = torch.randn(B * windows, *shape[1:], requires_grad=True)
    ours, naive = patch_similarity_entropy(features, B), oracle.entropy(features, B)
    assert relative(ours, naive) < 1e-4
    assert relative(torch.autograd.grad(ours, features)[0], torch.autograd.grad(naive, features)[0]) < 1e-4


def test_entropy_is_the_same_however_many_images_the_cache_holds(monkeypatch):
    features, results = torch.randn(4 * 3, 2, 9, 5, requires_grad=True), []
    for values in (1, 2 * POINTS * 3 * 36, CACHE):  # one image at a time, two, all four
        monkeypatch.setattr("utils.entropy.CACHE", values)
        value = patch_similarity_entropy(features, num_images=4)
        results.append((value, *torch.autograd.grad(value, features)))
    for value, gradient in results[:-1]:
        torch.testing.assert_close(value, results[-1][0])
        torch.testing.assert_close(gradient, results[-1][1])


def test_similarities_are_cosines_of_all_pairs_but_token_zero():
    features = torch.randn(2, 3, 5, 7)
    tokens = features.mean(1)[:, 1:]
    similarity, log_weight = patch_similarity(patch_tokens(features)[0], num_images=2)
    expected = torch.nn.functional.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=3)  # (2, 4, 4)
    count = (16 * log_weight.exp2()).long()  # of the 16 ordered pairs of 4 tokens
    ordered = similarity.repeat_interleave(count, dim=1)
    torch.testing.assert_close(ordered.sort().values, expected.flatten(1).sort().values)


def test_windows_of_an_image_are_pooled():
    tokens, _ = patch_tokens(torch.randn(6, 2, 5, 7))
    separate, log_weight = patch_similarity(tokens, num_images=6)
    pooled, log_weights = patch_similarity(tokens, num_images=2)
    assert torch.equal(pooled, separate.reshape(2, -1))
    torch.testing.assert_close(log_weights.exp2(), log_weight.exp2().repeat(3) / 3)


def test_nearly_equal_tokens_are_summed_as_in_cosine_similarity():
    """Roundings included: a matrix product sums in another order."""
    features = torch.ones(1, 1, 40, 64) + 1e-3 * torch.randn(1, 1, 40, 64)
    tokens, _ = patch_tokens(features)
    row, column = torch.triu_indices(39, 39)
    expected = (tokens[:, row] * tokens[:, column]).sum(2)
    assert torch.equal(patch_similarity(tokens, num_images=1)[0], expected)
    assert not torch.equal((tokens @ tokens.mT)[:, row, column], expected)


@pytest.mark.parametrize("features", [torch.zeros(2, 2, 5, 4), torch.ones(2, 2, 5, 4)], ids=["zero", "equal"])
def test_equal_patches_have_finite_entropy_and_gradient(features):
    features.requires_grad_()
    value = patch_similarity_entropy(features, 2)
    (gradient,) = torch.autograd.grad(value, features)
    assert value.isfinite() and gradient.isfinite().all()


def test_windows_of_one_token_are_refused():
    with pytest.raises(InputError, match="expected 2 in each"):
        patch_similarity_entropy(torch.randn(4, 2, 1, 3), 1)


def test_half_precision_features_are_compared_in_float32():
    features = torch.randn(2, 2, 9, 8)
    half = features.bfloat16()
    assert patch_tokens(half)[0].dtype == torch.float32
    torch.testing.assert_close(patch_similarity_entropy(half, 2), patch_similarity_entropy(half.float(), 2))


def test_product_is_one_operator_to_a_compiler():
    """Its precision is then not the model's: a product in the graph would become TF32's with the model's own."""
    a, b = torch.randn(3, 5, 4), torch.randn(3, 4, 6)
    torch.library.opcheck(_opaque_product, (a, b))
    assert torch.equal(torch.compile(_float32_product, backend="eager", fullgraph=True)(a, b), a @ b)
    operators = []

    def record(graph, inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(_float32_product, backend=record, fullgraph=True)(a, b)
    (operator,) = operators
    assert operator.removesuffix(".default") == "psaq.float32_product"


def test_a_gpu_neither_waits_for_the_host_nor_reads_from_it():
    """On tensors of a GPU that have no data: to read one fails, and no operator may see one of the host."""

    class OneDevice(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            assert {tensor.device.type for tensor in tensors} == {"cuda"}, function
            return result

    with FakeTensorMode(), torch.no_grad():
        features, images = torch.empty(4, 3, 10, 8, device="cuda"), torch.empty(2, 3, 9, 9, device="cuda")
        with OneDevice():
            entropy, variation = patch_similarity_entropy(features, 2), total_variation(images)
    assert entropy.device.type == variation.device.type == "cuda"


def test_no_temporary_of_all_pairs_and_channels(monkeypatch):
    """The largest tensor made is far below (B, N, N, d), forward and backward."""
    B, N, d = 2, 129, 64
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                    largest = max(largest, tensor.numel())
            return result

    features = torch.randn(B, 1, N, d, requires_grad=True)
    with Watch():
        torch.autograd.grad(patch_similarity_entropy(features, B), features)
    assert largest <= B * N * N * d / 4
