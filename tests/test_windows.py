"""Contexts of windows whose tokens are alike: how far they reach, and how they count in a search."""

import math

import pytest
import torch
from families import build

from quant import calibrate, quantize_model
from quant.convert import forward, observing
from quant.modules import named_activations
from quant.recipes import BEST, INPUTS, PAPER
from quant.slopes import slope_histogram, slope_histograms
from quant.windows import ALIKE, cover_values, window_contexts

IMAGES = torch.randn(2 * ALIKE + 3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_where_all_tokens_of_a_window_are_alike_its_contexts_are_its_values(swin):
    quantize_model(swin, recipe=INPUTS)
    seen = {}
    for context, attention in window_contexts(swin).items():
        for act in (context, attention.act_value):
            act.register_forward_pre_hook(lambda act, inputs: seen.update({act: inputs[0].clone()}))
    swin(torch.full((1, 3, 32, 32), 0.7))  # every patch is the same
    context, attention = next(iter(window_contexts(swin).items()))
    torch.testing.assert_close(seen[context], attention.merge_heads(seen[attention.act_value]))


@pytest.mark.parametrize(("family", "recipe", "blocks"), [("swin", BEST, 4), ("swin v2", BEST, 4), ("swin", PAPER, 0)])
def test_windows_are_those_of_swin_where_values_are_quantized(family, recipe, blocks):
    assert len(window_contexts(quantize_model(build(family), recipe=recipe))) == blocks


def test_a_vit_has_no_windows(vit):
    assert not window_contexts(quantize_model(vit, recipe=BEST))


@torch.no_grad()
def test_contexts_reach_as_far_as_values_where_ranges_are_those_seen(swin):
    model = calibrate(quantize_model(swin, recipe=BEST), IMAGES)
    for context, attention in window_contexts(model).items():
        assert context.low <= attention.act_value.low and context.high >= attention.act_value.high


@pytest.mark.parametrize("batch_size", [5, 32])
def test_windows_of_some_images_count_once_more_with_each_value_for_its_context(swin, monkeypatch, batch_size):
    monkeypatch.setattr("quant.slopes.SAMPLES", len(IMAGES))
    quantize_model(swin, 16, 4, recipe=INPUTS)
    with observing(swin), torch.no_grad():
        forward(swin, IMAGES, 32)
    contexts = window_contexts(swin)
    cover_values(contexts)
    plain, more = (slope_histograms(swin, IMAGES, batch_size, some) for some in ({}, contexts))
    for _, act in named_activations(swin):
        assert len(more[act]) == len(IMAGES) + (math.ceil(len(IMAGES) / ALIKE) if act in contexts else 0)
        if act not in contexts:
            torch.testing.assert_close(more[act], plain[act])

    (context, attention), slopes, kept = next(iter(contexts.items())), [], {}
    context.register_forward_pre_hook(lambda act, inputs: inputs[0].register_hook(slopes.append) and None)
    attention.act_value.register_forward_pre_hook(lambda act, inputs: kept.update(values=inputs[0].detach()))
    generator = torch.Generator().manual_seed(0)
    r = torch.cat([torch.randn(len(some), 10, generator=generator) for some in IMAGES.split(batch_size)])
    torch.autograd.grad(swin(IMAGES.clone().requires_grad_()), swin.parameters(), r, allow_unused=True)
    values = attention.merge_heads(kept["values"]).reshape(len(IMAGES), -1)
    expected = slope_histogram(context, values, slopes[0].reshape(len(IMAGES), -1))[::ALIKE]
    found = [row for row in more[context] if not any(torch.allclose(row, other) for other in plain[context])]
    torch.testing.assert_close(torch.stack(found), expected, atol=1e-4, rtol=1e-3)
