"""Windows, scales and mirror images: against loops in numpy, and against the one look that they must agree with."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pmpseg.errors import InputError
from pmpseg.inference import semantic_labels
from pmpseg.models import PMP
from pmpseg.models.prompts import PixelPrediction, Prediction
from pmpseg.views import Views, edge_weights, look, merged_labels, starts

K = 70  # more than one chunk


class Known:
    """Answers by the pixels it is shown, so that where a look lies, and which way round, is seen in them."""

    def __init__(self, by_pixel=False, classes=K):
        g = torch.Generator().manual_seed(0)
        self.mix = torch.randn(classes, 3, generator=g) * 4
        self.queries = torch.randn(30, 3, generator=g) * 20
        self.names = torch.randn(30, classes + 1, generator=g) * 4
        self.by_pixel, self.shown = by_pixel, []

    def __call__(self, image):
        self.shown.append(tuple(image.shape))
        if self.by_pixel:
            return PixelPrediction(torch.einsum("kc,bchw->bkhw", self.mix, image - 0.5))
        small = F.avg_pool2d(F.pad(image, (0, -image.shape[-1] % 4, 0, -image.shape[-2] % 4)), 4)
        masks = torch.einsum("qc,bchw->bqhw", self.queries, small - 0.5)
        return Prediction(masks, self.names.expand(len(image), -1, -1))


def picture(height=96, width=128, batch=1):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("by_pixel", [False, True])
@pytest.mark.parametrize("size", [None, (50, 77)])
def test_one_look_is_no_change(by_pixel, size):
    network, image = Known(by_pixel), picture(batch=2)
    wanted = semantic_labels(network(image), (96, 128), size)
    assert torch.equal(merged_labels(list(look([image], Views(), network)), size), wanted)
    assert torch.equal(merged_labels(list(look([image], Views(window=128), network)), size), wanted)  # covers everything


@pytest.mark.parametrize("by_pixel", [False, True])
def test_chunks_change_nothing(by_pixel):
    looks = list(look([picture(), picture(64, 96)], Views(48, scales=(1, 0.7), flip=True), Known(by_pixel)))
    whole = merged_labels(looks, (61, 90), chunk=1000)
    assert len(whole.unique()) > 5
    assert torch.equal(whole, merged_labels(looks, (61, 90), chunk=7))
    assert torch.equal(whole, merged_labels(looks, (61, 90), chunk=1))


@pytest.mark.parametrize("weights", ["triangle", "uniform"])
def test_windows_against_a_loop(weights):
    """By hand: every window's scores times its weights, summed and divided, in numpy."""
    network, image, views = Known(by_pixel=True, classes=5), picture(70, 100), Views(40, 0.25, weights)
    rows, columns = starts(70, 40, 0.25), starts(100, 40, 0.25)
    assert rows == [0, 30] and columns == [0, 30, 60]  # the fewest that overlap by 10 pixels or more
    total, weight = np.zeros((5, 70, 100)), np.zeros((70, 100))
    tent = np.array([1 - abs((i + 0.5) / 20 - 1) for i in range(40)])
    w = np.outer(tent, tent) if weights == "triangle" else np.ones((40, 40))
    for y in rows:
        for x in columns:
            logits = network(image[..., y : y + 40, x : x + 40]).logits[0].numpy().astype(np.float64)
            total[:, y : y + 40, x : x + 40] += w / (1 + np.exp(-logits))
            weight[y : y + 40, x : x + 40] += w
    found = merged_labels(list(look([image], views, network)))[0].numpy()
    wanted = (total / weight).argmax(0)
    assert weight.min() > 0 and (found == wanted).mean() > 0.999  # float32 beside float64


def test_windows_of_two_scales_against_a_loop():
    """Each scale counts alike, however many windows cover a pixel."""
    network, images = Known(by_pixel=True, classes=5), [picture(64, 96), picture(32, 48)]
    total, weight = np.zeros((5, 64, 96)), np.zeros((64, 96))
    tent = 1 - np.abs((np.arange(40) + 0.5) / 20 - 1)
    for y in starts(64, 40, 0.6):
        for x in starts(96, 40, 0.6):
            part = network(images[0][..., y : y + 40, x : x + 40]).logits[0].sigmoid().double().numpy()
            total[:, y : y + 40, x : x + 40] += part * np.outer(tent, tent)
            weight[y : y + 40, x : x + 40] += np.outer(tent, tent)
    covered, small_weight = np.zeros((1, 5, 32, 48)), np.zeros((32, 48))
    rows = 1 - np.abs((np.arange(32) + 0.5) / 16 - 1)  # windows as high as the image
    for x in starts(48, 40, 0.6):
        part = network(images[1][..., x : x + 40]).logits.sigmoid().double().numpy()
        covered[..., x : x + 40] += part * np.outer(rows, tent)
        small_weight[:, x : x + 40] += np.outer(rows, tent)
    small = torch.from_numpy(covered / small_weight)
    wanted = total / weight + F.interpolate(small, (64, 96), mode="bilinear", align_corners=False)[0].numpy()
    assert weight.max() > 1.5 * weight.min()
    found = merged_labels(list(look(images, Views(40, 0.6, scales=(1, 0.5)), network)))[0].numpy()
    assert (found == wanted.argmax(0)).mean() > 0.999


def test_a_network_that_sees_pixels_only_does_not_mind_windows():
    network, image = Known(by_pixel=True), picture(90, 130)
    wanted = semantic_labels(network(image), (90, 130))
    found = merged_labels(list(look([image], Views(40), network)))
    assert (found == wanted).float().mean() > 0.999
    assert {shape[-2:] for shape in network.shown} == {(90, 130), (40, 40)}


@pytest.mark.parametrize("by_pixel", [False, True])
def test_a_mirror_image_is_turned_back(by_pixel):
    """A network whose answers do not depend on the side gives the same map with flips, whatever the padding."""
    network, image = Known(by_pixel), picture(64, 96)
    plain = merged_labels(list(look([image], Views(), network)))
    flipped = list(look([image], Views(flip=True), network))
    assert [one.mirrored for one in flipped] == [False, True]
    assert torch.equal(merged_labels(flipped), plain)
    odd = picture(62, 94)  # the padding, at the right, is another side's pixels in the mirror
    both = list(look([odd], Views(flip=True), network))
    mirror = semantic_labels(network(odd.flip(-1)), (62, 94)).flip(-1)
    assert torch.equal(merged_labels(both[1:]), mirror)


def test_scales_are_means_at_the_answers_size():
    network, images = Known(by_pixel=True, classes=4), [picture(48, 64), picture(24, 32)]
    found = merged_labels(list(look(images, Views(scales=(1, 0.5)), network)), (48, 64))
    small = F.interpolate(network(images[1]).logits.sigmoid(), (48, 64), mode="bilinear", align_corners=False)
    assert torch.equal(found, (network(images[0]).logits.sigmoid() + small).argmax(1))


def test_factors_reach_every_look():
    looks = list(look([picture()], Views(48), Known(by_pixel=True)))
    assert (merged_labels(looks, factors={3: 1e6}) == 3).all()


@pytest.mark.parametrize(
    ("length", "window", "overlap"), [(100, 40, 0.3), (41, 40, 0.0), (640, 512, 1 / 3), (1000, 32, 0.9), (7, 9, 0.5)]
)
def test_windows_cover_everything_and_overlap(length, window, overlap):
    found = starts(length, window, overlap)
    side = min(window, length)
    assert found[0] == 0 and found[-1] == length - side
    steps = np.diff(found)
    assert (steps > 0).all() and (steps <= max(1, math.floor(window * (1 - overlap))) + 1).all()  # rounded to pixels


def test_windows_are_asked_several_at_a_time():
    network = Known()
    looks = list(look([picture(96, 128, batch=2)], Views(64), network, at_once=6))
    assert len(looks) == 2 * 3 == sum(shape[0] // 2 for shape in network.shown) and network.shown[0][0] == 6
    again = list(look([picture(96, 128, batch=2)], Views(64), network, at_once=1))
    assert torch.equal(merged_labels(looks), merged_labels(again))


def test_edge_weights():
    weights = edge_weights((3, 4), "triangle")
    assert weights.shape == (3, 4) and weights.min() > 0
    assert torch.allclose(weights, weights.flip(0)) and torch.allclose(weights, weights.flip(1))
    assert weights.max() == weights[1, 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 8}, "window: got 8, want pixels, 32 or more"),
        ({"overlap": 1.0}, "overlap: got 1, want a share"),
        ({"weights": "gauss"}, "got 'gauss', want triangle or uniform"),
        ({"scales": ()}, "scales: got none"),
        ({"scales": (1, 0)}, "scales: got 1, 0, want factors"),
    ],
)
def test_bad_views(wrong, message):
    with pytest.raises(InputError, match=message):
        Views(**wrong)


def test_data_of_one_scale_cannot_be_asked_at_two():
    with pytest.raises(InputError, match="images of 1 scales for scales"):
        list(look([picture()], Views(scales=(1, 2)), Known()))


def test_a_real_network_with_windows():
    torch.manual_seed(0)
    network = PMP(backbone="test_resnet", text_dim=12, dim=32, num_queries=5, num_layers=2, num_heads=4, ffn_dim=32).eval()
    prompts = torch.randn(K, 12)
    with torch.no_grad():
        looks = list(look([picture(batch=2)], Views(64, flip=True), lambda image: network(image, prompts)))
        labels = merged_labels(looks, (40, 50))
    assert labels.shape == (2, 40, 50) and labels.min() >= 0 and labels.max() < K
