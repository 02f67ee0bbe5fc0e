import oracle
import pytest
import torch

from utils.attention import attention_outputs
from utils.entropy import patch_similarity_entropy
from utils.losses import total_variation


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def test_total_variation_equals_golden(golden):
    data = golden("losses")
    images = data["image"].requires_grad_()
    value = total_variation(images)
    (gradient,) = torch.autograd.grad(value, images)
    assert relative(value, data["image_prior"]) < 1e-4
    assert relative(gradient, data["image_prior_grad"]) < 1e-4


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 5, 4), (1, 3, 3, 7)], ids=str)
def test_total_variation_equals_oracle(shape):
    images = torch.randn(shape)
    torch.testing.assert_close(total_variation(images), oracle.total_variation(images), rtol=1e-5, atol=1e-5)


def test_total_variation_of_a_constant_image_has_a_finite_gradient():
    images = torch.ones(2, 3, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(total_variation(images), images)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("colour", ["black", "white", "one colour an image", "one colour a channel"])
def test_images_of_one_colour_have_finite_losses_and_gradients(model, colour):
    images = {
        "black": torch.full((2, 3, 32, 32), -2.0),
        "white": torch.full((2, 3, 32, 32), 2.0),
        "one colour an image": torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 32, 32).clone(),
        "one colour a channel": torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(2, 3, 32, 32).clone(),
    }[colour].requires_grad_()
    with attention_outputs(model) as outputs:
        logits = model(images)
        terms = [sum(patch_similarity_entropy(features, 2) for features in outputs), total_variation(images)]
        terms.append(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])))
    for term in terms:
        (gradient,) = torch.autograd.grad(term, images, retain_graph=True)
        assert term.isfinite() and gradient.isfinite().all()
