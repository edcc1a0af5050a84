"""The set loss: against the plainest possible computation, and its invariances."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from pmpseg.errors import InputError
from pmpseg.inference import upsample
from pmpseg.losses import Masks, SetLoss, dice_loss, pixel_loss, sample
from pmpseg.models.backbone import pad_to
from pmpseg.models.prompts import MaskFactors, Prediction
from pmpseg.point_losses import focal_loss, focal_terms


def small(batch=2, queries=4, prompts=3, size=8, layers=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    masks = torch.rand(batch, prompts, size, size, generator=g) > 0.6
    present = masks.flatten(2).any(-1)
    shapes = (batch, queries, size, size), (batch, queries, prompts + 1)
    outputs = [tuple(torch.randn(*shape, generator=g) for shape in shapes) for _ in range(layers)]
    return Prediction(*outputs[-1], outputs[:-1]), masks, present


def test_the_matching_is_the_cheapest_of_all():
    prediction, masks, present = small(batch=1, queries=3, prompts=2)
    loss = SetLoss(num_points=4096)
    torch.manual_seed(0)
    known = torch.ones(1, 1, 8, 8)
    _, query, prompt = loss.match(Masks(prediction.mask_logits), prediction.class_logits, masks.float(), present, known)
    found = dict(zip(prompt.tolist(), query.tolist(), strict=True))

    def cost(q: int, k: int) -> float:
        truth, logits = masks[0, k].float(), prediction.mask_logits[0, q]
        bce = F.binary_cross_entropy_with_logits(logits, truth)
        p = logits.sigmoid()
        dice = 1 - (2 * (p * truth).sum() * 64 + 1) / (p.sum() * 64 + truth.sum() * 64 + 1)
        return float(-2 * prediction.class_logits[0, q].softmax(-1)[k] + 5 * bce + 5 * dice)

    best = min(itertools.permutations(range(3), 2), key=lambda qs: sum(cost(q, k) for k, q in enumerate(qs)))
    assert [found[0], found[1]] == list(best)


def test_a_perfect_answer_costs_almost_nothing():
    masks, present = torch.zeros(2, 3, 16, 16, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    for k in range(3):
        masks[:, k, :, 4 * k : 4 * k + 6] = True
    mask_logits = (masks.float() * 2 - 1) * 8
    class_logits = torch.full((2, 3, 4), -50.0)
    class_logits[:, range(3), range(3)] = 50.0
    loss = SetLoss(num_points=512, importance=0.0)
    losses = loss(Prediction(mask_logits, class_logits), masks, present)
    assert losses["class"] < 1e-6 and losses["mask"] < 1 and losses["dice"] < 0.5  # bilinear edges are all that is left
    worse = loss(Prediction(-mask_logits, class_logits), masks, present)
    assert worse["loss"] > 20 * losses["loss"]


def test_the_order_of_queries_and_prompts_does_not_matter():
    prediction, masks, present = small()
    whole = SetLoss(num_points=20000)
    torch.manual_seed(0)
    a = whole(prediction, masks, present)
    q, k = torch.tensor([2, 0, 3, 1]), torch.tensor([2, 0, 1])
    classes = prediction.class_logits[:, q][..., torch.cat([k, torch.tensor([3])])]
    torch.manual_seed(0)
    b = whole(Prediction(prediction.mask_logits[:, q], classes), masks[:, k], present[:, k])
    for name in a:  # points are drawn at random, hence not exactly
        assert torch.isclose(a[name], b[name], rtol=0.03), name


def test_padding_prompts_change_nothing():
    prediction, masks, present = small()
    torch.manual_seed(0)
    a = SetLoss(num_points=256)(prediction, masks, present)
    logits = prediction.class_logits
    padded_logits = torch.cat([logits[..., :3], torch.full((2, 4, 2), -1e4), logits[..., 3:]], -1)
    padded_masks = F.pad(masks, (0, 0, 0, 0, 0, 2))
    torch.manual_seed(0)
    b = SetLoss(num_points=256)(Prediction(prediction.mask_logits, padded_logits), padded_masks, F.pad(present, (0, 2)))
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-5), name


def test_ignored_pixels_have_no_gradient():
    prediction, masks, present = small()
    logits = prediction.mask_logits.clone().requires_grad_()
    counted = torch.ones(2, 8, 8, dtype=torch.bool)
    counted[:, :, :4] = False
    SetLoss(num_points=2000)(Prediction(logits, prediction.class_logits), masks, present, counted)["loss"].backward()
    assert logits.grad[..., :3].abs().max() == 0
    assert logits.grad[..., 5:].abs().max() > 0


@pytest.mark.parametrize("num_points", [64, None])
def test_images_without_objects(num_points):
    prediction, masks, present = small(layers=3)
    logits = prediction.class_logits.clone().requires_grad_()
    masks = masks.repeat_interleave(2, -1).repeat_interleave(2, -2)
    prediction, loss = prediction._replace(class_logits=logits), SetLoss(num_points=num_points)
    losses = loss(prediction, torch.zeros_like(masks), torch.zeros_like(present))
    assert losses["mask"] == 0 and losses["dice"] == 0 and losses["class"] > 0
    losses["loss"].backward()
    assert torch.isfinite(logits.grad).all()


def test_more_targets_than_queries():
    prediction, masks, present = small(queries=2, prompts=3)
    losses = SetLoss(num_points=64)(prediction, masks, present)
    assert torch.isfinite(losses["loss"])


def test_every_layer_is_counted():
    prediction, masks, present = small(layers=1)
    thrice = prediction._replace(aux=[(prediction.mask_logits, prediction.class_logits)] * 2)
    loss = SetLoss(num_points=20000)
    one, three = loss(prediction, masks, present), loss(thrice, masks, present)
    assert torch.isclose(three["class"], 3 * one["class"], rtol=1e-4)
    assert torch.isclose(three["dice"], 3 * one["dice"], rtol=0.02)


def test_dice_by_hand():
    logits = torch.tensor([[100.0, 100.0, -100.0, -100.0]])
    truth = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    everywhere = torch.ones(1, 4)
    assert torch.allclose(dice_loss(logits, truth, everywhere), torch.tensor([1 - 3 / 5]))
    first_two = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert torch.allclose(dice_loss(logits, truth, first_two), torch.tensor([1 - 3 / 4]))


def test_sample_reads_x_then_y():
    maps = torch.arange(8.0).reshape(1, 1, 2, 4)
    points = torch.tensor([[[0.875, 0.25], [0.125, 0.75]]])  # last column of row 0, first column of row 1
    assert sample(maps, points).tolist() == [[[3.0, 4.0]]]


def test_shapes_must_fit():
    prediction, masks, present = small()
    with pytest.raises(ValueError, match=r"masks: got \(2, 3"):
        SetLoss()(prediction, masks, present[:, :2])


def test_pixels_named_directly_by_hand():
    logits = torch.zeros(1, 2, 2, 2)
    masks = torch.zeros(1, 2, 4, 4)
    masks[0, 0, :2] = 1.0
    known, valid = torch.ones(1, 1, 4, 4), torch.tensor([[True, False]])
    assert torch.isclose(pixel_loss(logits, masks, known, valid), torch.tensor(2.0).log())  # the padding prompt counts nothing
    logits[0, 0, 0], logits[0, 0, 1] = 50.0, -50.0
    assert pixel_loss(logits, masks, known, valid) < 1e-6
    logits[0, 0, 1] = 50.0  # wrong below, but only where nothing is known
    known[:, :, 2:] = 0
    assert pixel_loss(logits, masks, known, valid) < 1e-6


def test_targets_of_a_padded_image_lie_where_its_logits_do():
    masks = torch.zeros(1, 1, 144, 100, dtype=torch.bool)
    masks[..., 60:110, 30:80] = True
    padded = pad_to(masks, 32)
    assert padded.shape[-2:] == (160, 128)
    perfect = F.interpolate(padded.float(), scale_factor=0.25, mode="area") * 20 - 10
    assert ((upsample(perfect, (144, 100)) > 0) == masks).float().mean() > 0.99
    names = torch.tensor([[[50.0, -50.0]]])
    loss = SetLoss(num_points=2000, importance=0.0)
    good = loss(Prediction(perfect, names), padded, torch.ones(1, 1, dtype=torch.bool))["loss"]
    askew = loss(Prediction(perfect, names), masks, torch.ones(1, 1, dtype=torch.bool))["loss"]
    assert good < 0.3 < 10 * good < askew


def test_the_masks_cross_entropy_takes_part_in_the_matching():
    # Query 0 is a little unsure everywhere; query 1 overlaps more, but is utterly wrong about a tenth of the pixels.
    logits = torch.full((1, 2, 10, 10), 0.5)
    logits[0, 1], logits[0, 1, 0] = 10.0, -50.0
    masks, present = torch.ones(1, 1, 10, 10), torch.ones(1, 1, dtype=torch.bool)
    for weight, wanted in ((5.0, 0), (0.0, 1)):
        loss = SetLoss(mask_weight=weight, num_points=2000)
        _, query, _ = loss.match(Masks(logits), torch.zeros(1, 2, 2), masks, present, masks)
        assert query.tolist() == [wanted]


def test_masks_as_products_are_the_same_masks():
    """The loss and all gradients, whether masks are given whole or as factors."""
    torch.manual_seed(0)
    features, classes = torch.randn(2, 6, 8, 12), [torch.randn(2, 5, 4) for _ in range(3)]
    embedding = torch.randn(3, 2, 5, 6)
    masks, present = torch.rand(2, 3, 32, 48) > 0.6, torch.tensor([[True, False, True], [False, True, False]])
    counted, results = torch.rand(2, 32, 48) > 0.1, []
    for as_products in (False, True):
        leaves = [x.clone().requires_grad_() for x in (features, embedding, *classes)]
        logits = torch.einsum("lbqd,bdhw->lbqhw", leaves[1], leaves[0])
        layers = list(zip(logits, leaves[2:], strict=True))
        factors = MaskFactors(leaves[1], leaves[0]) if as_products else None
        torch.manual_seed(1)  # of the points
        losses = SetLoss(num_points=500)(Prediction(*layers[-1], layers[:-1], None, factors), masks, present, counted)
        losses["loss"].backward()
        results.append([losses["loss"].detach(), *(x.grad for x in leaves)])
    for whole, product in zip(*results, strict=True):
        torch.testing.assert_close(whole, product, atol=1e-5, rtol=1e-4)


def test_of_a_long_list_only_what_is_present_is_looked_at():
    torch.manual_seed(0)
    masks, present = torch.rand(2, 40, 16, 16) > 0.5, torch.zeros(2, 40, dtype=torch.bool)
    present[0, [3, 31]] = present[1, 17] = True
    logits, classes = torch.randn(2, 6, 16, 16), torch.randn(2, 6, 41)
    loss, known = SetLoss(num_points=3000), torch.ones(2, 1, 16, 16)
    row, query, prompt = loss.match(Masks(logits), classes, masks, present, known)
    assert sorted(zip(row.tolist(), prompt.tolist(), strict=True)) == [(0, 3), (0, 31), (1, 17)]
    short = torch.tensor([3, 31, 17])  # the same with a short list
    listed = torch.cat([classes.softmax(-1)[..., short], 1 - classes.softmax(-1)[..., short].sum(-1, keepdim=True)], -1).log()
    again = loss.match(Masks(logits), listed, masks[:, short], present[:, short], known)
    assert query.tolist() == again[1].tolist() and short[again[2]].tolist() == prompt.tolist()


# segments as targets


def test_one_segment_a_prompt_is_the_prompt():
    prediction, masks, present = small(prompts=5, layers=2)
    present[0, 1] = present[1, 4] = False
    masks = masks & present[..., None, None]
    torch.manual_seed(1)
    wanted = SetLoss(num_points=64)(prediction, masks, present)
    # The same as segments, in another order for each image, with padding among them.
    order = torch.tensor([[3, 0, 1, 4, 2], [4, 2, 3, 1, 0]])
    which = masks.gather(1, order[..., None, None].expand(-1, -1, 8, 8)), present.gather(1, order)
    torch.manual_seed(1)
    found = SetLoss(num_points=64)(prediction, *which, prompt=order)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


def test_two_segments_of_one_prompt_get_a_query_each():
    """The class loss by hand: both queries are named by the one prompt, the third by nothing."""
    masks = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    masks[0, 0, :, :3] = masks[0, 1, :, 5:] = True
    logits = torch.stack([masks[0, 0] * -4.0, masks[0, 1] * 16.0 - 8, masks[0, 0] * 16.0 - 8])[None]
    classes = torch.randn(1, 3, 3)
    there, prompt = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[1, 1]])
    loss = SetLoss(num_points=500)
    _, query, target = loss.match(Masks(logits), classes, masks, there, torch.ones(1, 1, 8, 8), prompt)
    assert dict(zip(query.tolist(), target.tolist(), strict=True)) == {1: 1, 2: 0}
    found = loss(Prediction(logits, classes), masks, there, prompt=prompt)
    weight = torch.tensor([1.0, 1.0, 0.1])
    wanted = F.cross_entropy(classes[0], torch.tensor([2, 1, 1]), weight=torch.tensor([0.0, 1.0, 0.1]), reduction="sum")
    assert torch.isclose(found["class"], 2.0 * wanted / weight.sum())


def test_pixels_are_named_by_prompt_and_not_by_segment():
    prediction, masks, _ = small(prompts=3)
    pixels = torch.randn(2, 3, 8, 8)
    segments = torch.cat([masks, masks], 1) & torch.rand(2, 6, 8, 8).gt(0.5)
    loss, prompt = SetLoss(num_points=16, pixel_weight=1.0), torch.arange(3).repeat(2, 2)
    there = segments.flatten(2).any(-1)
    found = loss(prediction._replace(pixel_logits=pixels), segments, there, prompt=prompt, prompt_masks=masks)["pixel"]
    each = F.binary_cross_entropy_with_logits(pixels, masks.float(), reduction="none")
    assert torch.isclose(found, each.mean((2, 3)).sum() / there.sum())
    with pytest.raises(ValueError, match="prompt_masks: got None"):
        loss(prediction._replace(pixel_logits=pixels), segments, there, prompt=prompt)


# MaskFormer's loss: focal, of all pixels


def test_focal_loss_is_torchvisions():
    torch.manual_seed(0)
    logits, truth = torch.randn(3, 50) * 4, (torch.rand(3, 50) > 0.7).float()
    wanted = sigmoid_focal_loss(logits, truth)  # alpha 0.25, gamma 2
    torch.testing.assert_close(focal_loss(logits, truth), wanted)
    outside, difference = focal_terms(logits)
    torch.testing.assert_close(outside + difference * truth, wanted)
    soft = torch.rand(3, 50)
    torch.testing.assert_close(focal_loss(logits, soft), sigmoid_focal_loss(logits, soft))


@pytest.mark.parametrize("kind", ["bce", "focal"])
def test_maskformers_loss_by_the_plainest_way(kind):
    """Upsampled masks at every pixel, a cost for every pair, the cheapest pairs of all."""
    torch.manual_seed(2)
    logits, classes = torch.randn(1, 4, 6, 8) * 3, torch.randn(1, 4, 4)
    masks, present = torch.rand(1, 3, 24, 32) > 0.5, torch.tensor([[True, False, True]])
    masks[0, 0, :12], masks[0, 2, :, :20] = True, False
    loss = SetLoss(1.0, 20.0, 1.0, 0.1, num_points=None, mask_loss=kind)
    found = loss(Prediction(logits, classes), masks, present)

    def each(x, y):
        return sigmoid_focal_loss(x, y) if kind == "focal" else F.binary_cross_entropy_with_logits(x, y, reduction="none")

    def dice(x, y):
        return 1 - (2 * (x.sigmoid() * y).sum() + 1) / (x.sigmoid().sum() + y.sum() + 1)

    size = {"mode": "bilinear", "align_corners": False}
    small, large = F.interpolate(masks.float(), (6, 8), **size)[0], F.interpolate(logits, (24, 32), **size)[0]

    def cost(q, k):
        x, y = logits[0, q], small[k]
        mask = y * each(x, torch.ones_like(x)) + (1 - y) * each(x, torch.zeros_like(x))  # BCE is linear in the truth anyway
        return float(-classes[0, q].softmax(-1)[k] + 20 * mask.mean() + dice(x, y))

    best = min(itertools.permutations(range(4), 2), key=lambda qs: cost(qs[0], 0) + cost(qs[1], 2))
    pairs = list(zip(best, (0, 2), strict=True))
    assert torch.isclose(found["mask"], 20 * sum(each(large[q], masks[0, k].float()).mean() for q, k in pairs) / 2)
    assert torch.isclose(found["dice"], sum(dice(large[q], masks[0, k].float()) for q, k in pairs) / 2)


def middles(size):
    """The middles of all pixels (h, w) as points (1, h * w, 2)."""
    y, x = ((torch.arange(length) + 0.5) / length for length in size)
    return torch.stack([x.expand(size[0], -1), y[:, None].expand(-1, size[1])], -1).flatten(0, 1)[None]


@pytest.mark.parametrize("as_products", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (26, 48), (5, 7)])
def test_all_pixels_are_the_points_in_their_middles(as_products, size, monkeypatch):
    """The loss and all gradients are those of points that are given: of the logits' pixels to match, then of the targets'."""
    torch.manual_seed(0)
    features, classes = torch.randn(2, 6, 8, 12), [torch.randn(2, 5, 4) for _ in range(3)]
    embedding = torch.randn(3, 2, 5, 6)
    masks, present = torch.rand(2, 3, *size) > 0.6, torch.tensor([[True, False, True], [False, True, False]])
    counted, results = torch.rand(2, *size) > 0.2, []
    for num_points in (None, 1):
        leaves = [x.clone().requires_grad_() for x in (features, embedding, *classes)]
        logits = torch.einsum("lbqd,bdhw->lbqhw", leaves[1], leaves[0])
        layers = list(zip(logits, leaves[2:], strict=True))
        prediction = Prediction(*layers[-1], layers[:-1], None, MaskFactors(leaves[1], leaves[0]) if as_products else None)
        loss = SetLoss(1.0, 20.0, 1.0, 0.1, num_points=num_points, mask_loss="focal")
        if num_points:  # the sampled way, at those points
            monkeypatch.setattr(torch, "rand", lambda *size, device: middles((8, 12)).expand(2, -1, -1))
            monkeypatch.setattr(loss, "sample_points", lambda chosen: middles(size).expand(len(chosen), -1, -1))
        found = loss(prediction, masks, present, counted)
        found["loss"].backward()
        results.append([*(x.detach() for x in found.values()), *(x.grad for x in leaves)])
    assert all(x.abs().sum() > 0 for x in results[0])
    for pixels, points in zip(*results, strict=True):
        torch.testing.assert_close(pixels, points, atol=1e-5, rtol=1e-4)


def test_a_mask_loss_that_is_none():
    with pytest.raises(InputError, match="mask_loss: got 'fokal', want one of bce, focal"):
        SetLoss(mask_loss="fokal")
