"""The set loss: against the plainest possible computation, and its invariances."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from pmpseg.inference import upsample
from pmpseg.losses import Masks, SetLoss, dice_loss, pixel_loss, sample
from pmpseg.models.backbone import pad_to
from pmpseg.models.prompts import MaskFactors, Prediction


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


def test_images_without_objects():
    prediction, masks, present = small(layers=3)
    logits = prediction.class_logits.clone().requires_grad_()
    losses = SetLoss(num_points=64)(prediction._replace(class_logits=logits), torch.zeros_like(masks), torch.zeros_like(present))
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
