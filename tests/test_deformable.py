"""Deformable attention: both ways of sampling against a loop over single points."""

import math

import pytest
import torch

from pmpseg.models.deformable import DeformableAttention, places_in_pixels, sample_grids, sample_rows

SIZES = [(2, 3), (4, 6), (7, 5)]
COUNT = sum(h * w for h, w in SIZES)


def case(seed: int = 0, batch: int = 2, asked: int = 9, heads: int = 2, points: int = 4, width: int = 3):
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(batch, COUNT, heads, width, generator=g)
    extent = torch.tensor([(w, h) for h, w in SIZES])[:, None]
    # Some of them far outside, some exactly on centres and edges.
    pixels = torch.rand(batch, asked, heads, len(SIZES), points, 2, generator=g) * (extent + 4) - 2.5
    pixels[:, 0] = pixels[:, 0].round()
    pixels[:, 1] = -0.5
    weights = torch.rand(batch, asked, heads, len(SIZES), points, generator=g)
    return value, *pixels.unbind(-1), weights


def loop(value, xs, ys, weights):
    """One point after the other."""
    batch, asked, heads, _, points = xs.shape
    out = torch.zeros(batch, asked, heads, value.shape[-1])
    start = 0
    for level, (height, width) in enumerate(SIZES):
        table = value[:, start : start + height * width].unflatten(1, (height, width))
        start += height * width
        for b in range(batch):
            for n in range(asked):
                for h in range(heads):
                    for p in range(points):
                        x, y = xs[b, n, h, level, p].item(), ys[b, n, h, level, p].item()
                        for j in (math.floor(y), math.floor(y) + 1):
                            for i in (math.floor(x), math.floor(x) + 1):
                                if 0 <= j < height and 0 <= i < width:
                                    share = (1 - abs(x - i)) * (1 - abs(y - j))
                                    out[b, n, h] += weights[b, n, h, level, p] * share * table[b, j, i, h]
    return out.flatten(2)


@pytest.mark.parametrize("sample", [sample_rows, sample_grids])
def test_samples_are_those_of_a_loop(sample):
    given = case()
    torch.testing.assert_close(sample(*given, SIZES), loop(*given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sample", [sample_rows, sample_grids])
def test_places_stay_exact_in_half_precision(sample):
    """Only values and weights may be coarse: 8 bits of a place are half a pixel on a map of 128."""
    value, x, y, weights = case()
    found = sample(value.bfloat16(), x, y, weights.bfloat16(), SIZES)
    assert found.dtype == torch.bfloat16
    exact = sample(value.bfloat16().float(), x, y, weights.bfloat16().float(), SIZES)
    torch.testing.assert_close(found.float(), exact, atol=1e-2, rtol=1e-2)


def test_both_ways_have_one_gradient():
    gradients = []
    for sample in (sample_rows, sample_grids):
        given = [x.requires_grad_() for x in case(1)]
        sample(*given, SIZES).square().sum().backward()
        gradients.append([x.grad for x in given])
    for i, (a, b) in enumerate(zip(*gradients, strict=True)):
        keep = slice(2, None) if i in (1, 2) else slice(None)  # at points exactly on a pixel's centre the slope is either side's
        torch.testing.assert_close(a[:, keep], b[:, keep], atol=1e-4, rtol=1e-4)


def test_a_place_lies_at_the_same_share_of_every_level():
    places = places_in_pixels(SIZES, torch.zeros(1))
    assert places.shape == (COUNT, 3, 2)
    own = torch.tensor([(x, y) for h, w in SIZES for y in range(h) for x in range(w)])
    level = torch.repeat_interleave(torch.arange(3), torch.tensor([h * w for h, w in SIZES]))
    torch.testing.assert_close(places[torch.arange(COUNT), level], own.float(), atol=1e-5, rtol=0)
    # The first place of level 0, in level 1.
    torch.testing.assert_close(places[0, 1], torch.tensor([(0.5 / 3) * 6 - 0.5, (0.5 / 2) * 4 - 0.5]))


def test_the_first_look_goes_into_as_many_directions_as_there_are_heads():
    bias = DeformableAttention(16, 8, 3, 4).offsets.bias.view(8, 3, 4, 2)
    assert torch.equal(bias[:, 0], bias[:, 2])
    assert torch.allclose(bias.abs().amax(-1)[:, 0], torch.arange(1.0, 5.0).expand(8, 4))
    assert len({tuple(d) for d in bias[:, 0, 0].round(decimals=3).tolist()}) == 8


@pytest.mark.parametrize("sample", [sample_rows, sample_grids])
def test_what_is_not_a_number_comes_out_as_such_and_does_not_crash(sample):
    value, x, y, weights = case()
    x[0, 3], y[1, 4] = torch.nan, torch.inf
    found = sample(value, x, y, weights, SIZES)
    assert found[0, 3].isnan().all() and found[0, 4:].isfinite().all() and found[1, :4].isfinite().all()
