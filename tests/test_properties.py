"""Properties that hold for any input, searched by hypothesis: metrics, losses, vocabulary, run lengths, sizes, samplers."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from pmpseg import rle
from pmpseg.data import base
from pmpseg.data.base import EpochSampler, UnpaddedSampler
from pmpseg.inference import answers, soft_masks, upsample
from pmpseg.losses import Masks, SetLoss
from pmpseg.metrics import PhraseMetrics, confusion_matrix, confusion_scores
from pmpseg.models import PMP, Prediction
from pmpseg.models.backbone import pad_to
from pmpseg.training.pmp import keep_few
from pmpseg.vocabulary import Vocabulary, parse_prompts

settings.register_profile("pmpseg", deadline=None, max_examples=60, derandomize=True)  # the same cases on every machine
settings.load_profile("pmpseg")

seeds = st.integers(0, 2**31)
sides = st.integers(1, 40)


@st.composite
def label_maps(draw):
    """Predicted and true labels of C classes, 255 among both."""
    classes, shape = draw(st.integers(1, 6)), draw(st.tuples(sides, sides))
    values = st.sampled_from([*range(classes), 255])
    predicted, truth = (draw(hnp.arrays(np.int64, shape, elements=values)) for _ in range(2))
    return classes, torch.from_numpy(predicted), torch.from_numpy(truth)


# ---- metrics


@given(label_maps(), seeds)
def test_confusion_counts_each_known_pixel_once_wherever_it_lies(maps, seed):
    classes, predicted, truth = maps
    matrix = confusion_matrix(predicted, truth, classes)
    assert matrix.sum() == (truth != 255).sum()
    assert torch.equal(matrix.sum(1), torch.bincount(truth[truth != 255], minlength=classes))
    order = torch.randperm(truth.numel(), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(matrix, confusion_matrix(predicted.flatten()[order], truth.flatten()[order], classes))
    cut = seed % truth.numel()
    parts = [confusion_matrix(predicted.flatten()[s], truth.flatten()[s], classes) for s in (slice(cut), slice(cut, None))]
    assert torch.equal(matrix, parts[0] + parts[1])


@given(label_maps(), seeds)
def test_iou_follows_its_class_and_the_two_rules_are_ordered(maps, seed):
    classes, predicted, truth = maps
    scores = confusion_scores(confusion_matrix(predicted, truth, classes))
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    table = torch.cat([order, torch.full((256 - classes,), 255)])
    renamed = confusion_scores(confusion_matrix(table[predicted], table[truth], classes))
    assert torch.equal(renamed["iou"][order].nan_to_num(-1), scores["iou"].nan_to_num(-1))
    if (truth != 255).any():
        assert 0 <= scores["miou_v06"] <= scores["miou"] + 1e-12 and scores["miou"] <= 1
        for k in range(classes):
            there, found = truth == k, (predicted == k) & (truth != 255)
            if there.any():
                wanted = (there & found).sum() / (there | found).sum()
                assert abs(scores["iou"].reshape(-1)[k] - wanted) < 1e-6
        perfect = confusion_scores(confusion_matrix(truth, truth, classes))
        assert perfect["miou"] == perfect["miou_v06"] == perfect["pixel_accuracy"] == 1


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 5), sides, sides), elements=st.floats(0, 1, width=32)), seeds)
def test_phrase_scores_do_not_depend_on_order_or_batches(scores, seed):
    scores = torch.from_numpy(scores)
    g = torch.Generator().manual_seed(seed)
    truth = torch.rand(scores.shape, generator=g) > torch.rand(len(scores), 1, 1, generator=g) * 1.3
    whole, parts = PhraseMetrics(0.3), PhraseMetrics(0.3)
    whole.update(scores, truth)
    for i in torch.randperm(len(scores), generator=g):
        parts.update(scores[i, None], truth[i, None])
    a, b = whole.compute(), parts.compute()
    for key in ("iou", "cumulative_iou", "ap", "absent_accuracy", "iou_with_absent"):
        assert torch.equal(a[key].nan_to_num(-1), b[key].nan_to_num(-1)), key
    found = scores > 0.3
    ious = [(f & t).sum() / (f | t).sum() for f, t in zip(found, truth, strict=True) if t.any()]
    if ious:
        assert abs(a["iou"] - torch.stack(ious).mean()) < 1e-6


# ---- losses


@st.composite
def predictions(draw):
    """(Prediction, masks, present): B images, Q queries, K prompts of which some have nothing to find."""
    batch, queries, prompts, size = (draw(st.integers(*ends)) for ends in ((1, 3), (1, 5), (1, 4), (2, 9)))
    g = torch.Generator().manual_seed(draw(seeds))
    masks = torch.rand(batch, prompts, 4 * size, 4 * size, generator=g) > torch.rand(batch, prompts, 1, 1, generator=g)
    masks &= torch.rand(batch, prompts, 1, 1, generator=g) > 0.3
    outputs = [
        (torch.randn(batch, queries, size, size, generator=g) * 3, torch.randn(batch, queries, prompts + 1, generator=g))
        for _ in range(draw(st.integers(1, 3)))
    ]
    return Prediction(*outputs[-1], outputs[:-1]), masks, masks.flatten(2).any(-1)


def matched(loss, prediction, masks, present, seed=0):
    torch.manual_seed(seed)
    known = torch.ones(len(masks), 1, *masks.shape[2:])
    row, query, prompt = loss.match(Masks(prediction.mask_logits), prediction.class_logits, masks.float(), present, known)
    return set(zip(row.tolist(), query.tolist(), prompt.tolist(), strict=True))


@given(predictions(), seeds)
def test_matching_is_one_to_one_and_follows_any_reordering(given_, seed):
    prediction, masks, present = given_
    loss = SetLoss(num_points=64)
    pairs = matched(loss, prediction, masks, present)
    for image in range(len(masks)):
        of_image = [(q, k) for b, q, k in pairs if b == image]
        assert len({q for q, _ in of_image}) == len({k for _, k in of_image}) == len(of_image)
        assert len(of_image) == min(prediction.mask_logits.shape[1], int(present[image].sum()))
        assert all(present[image, k] for _, k in of_image)
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randperm(n, generator=g) for n in (prediction.mask_logits.shape[1], masks.shape[1]))
    with_none = torch.cat([k, torch.tensor([len(k)])])
    other = Prediction(prediction.mask_logits[:, q], prediction.class_logits[:, q][..., with_none])
    found = matched(loss, other, masks[:, k], present[:, k])
    assert {(b, int(q[i]), int(k[j])) for b, i, j in found} == pairs


@given(predictions(), st.integers(1, 3))
def test_padding_prompts_change_no_match_and_no_loss(given_, extra):
    prediction, masks, present = given_

    def padded(c: torch.Tensor) -> torch.Tensor:
        return torch.cat([c[..., :-1], torch.full((*c.shape[:2], extra), -1e4), c[..., -1:]], -1)

    more = Prediction(prediction.mask_logits, padded(prediction.class_logits), [(m, padded(c)) for m, c in prediction.aux])
    masks_ = torch.cat([masks, torch.zeros(len(masks), extra, *masks.shape[2:], dtype=torch.bool)], 1)
    present_ = torch.cat([present, torch.zeros(len(masks), extra, dtype=torch.bool)], 1)
    loss = SetLoss(num_points=64)
    assert matched(loss, more, masks_, present_) == matched(loss, prediction, masks, present)
    torch.manual_seed(1)
    a = loss(prediction, masks, present)
    torch.manual_seed(1)
    b = loss(more, masks_, present_)
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


@given(predictions())
def test_the_loss_is_finite_and_moves_every_output_even_without_targets(given_):
    prediction, masks, present = given_
    outputs = [t.clone().requires_grad_() for pair in [*prediction.aux, prediction[:2]] for t in pair]
    pairs = list(zip(outputs[0::2], outputs[1::2], strict=True))
    for there in (present, torch.zeros_like(present)):
        loss = SetLoss(num_points=32)(Prediction(*pairs[-1], pairs[:-1]), masks & there[..., None, None], there)
        assert all(torch.isfinite(v) and v >= 0 for v in loss.values())
        assert there.any() or loss["mask"] == loss["dice"] == 0
        grads = torch.autograd.grad(loss["loss"], outputs)
        assert all(torch.isfinite(g).all() for g in grads)
        assert all((g != 0).any() for g in grads[1::2])  # every layer's names
        assert all((g != 0).any() == there.any() for g in grads[0::2])  # and masks, where there is something to find


@given(predictions(), seeds)
def test_what_is_ignored_counts_nowhere(given_, seed):
    prediction, masks, present = given_
    g = torch.Generator().manual_seed(seed)
    known = torch.rand(len(masks), *masks.shape[2:], generator=g) > 0.4
    garbage = torch.where(known[:, None], masks, torch.rand(masks.shape, generator=g) > 0.5)
    pixels = torch.randn(*masks.shape[:2], 4, 4, generator=g)
    found = []
    for m in (masks, garbage):
        torch.manual_seed(2)
        loss = SetLoss(num_points=32, pixel_weight=1.0)
        found.append(loss(prediction._replace(pixel_logits=pixels), m, present, known))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@given(st.integers(0, 1), st.floats(0.1, 0.9))
def test_beside_the_ignored_the_truth_is_that_of_the_known(value, share):
    known = torch.rand(1, 12, 12, generator=torch.Generator().manual_seed(4)) < share
    masks = torch.full((1, 1, 12, 12), bool(value))
    logits = torch.full((1, 1, 3, 3), 20.0 if value else -20.0)
    loss = SetLoss(num_points=200, pixel_weight=1.0)
    found = loss(Prediction(logits, torch.zeros(1, 1, 2), (), logits), masks, torch.ones(1, 1, dtype=torch.bool), known)
    assert found["mask"] < 1e-4 and found["pixel"] < 1e-4  # sure and right, whatever share of the pixels is known


# ---- words


letters = st.characters(exclude_characters=",#:;\r\n[]", exclude_categories=("Cs", "Cc", "Zl", "Zp"))
words = st.text(letters, min_size=1, max_size=12).map(lambda w: " ".join(w.split())).filter(bool)


@given(st.lists(words, min_size=1, max_size=8, unique_by=str.casefold), st.data())
def test_a_vocabulary_survives_being_written(tmp_path_factory, names, data):
    unseen = data.draw(st.lists(st.integers(0, len(names) - 1), max_size=len(names) - 1, unique=True))
    vocabulary = Vocabulary.of(names, unseen)
    path = tmp_path_factory.mktemp("vocabulary") / "classes.txt"
    vocabulary.write(path)
    assert Vocabulary.read(path) == vocabulary
    assert sorted(vocabulary.seen + vocabulary.unseen) == list(range(len(names)))


@given(st.lists(words, min_size=1, max_size=6))
def test_prompts_survive_being_joined(prompts):
    parsed = parse_prompts(" ;  ".join(prompts) + ";")
    assert parsed == list(dict.fromkeys(prompts)) and parse_prompts("; ".join(parsed)) == parsed


# ---- masks


@given(hnp.arrays(bool, st.tuples(sides, sides)))
def test_run_lengths_are_cocos_and_come_back(mask):
    encoded = rle.encode(mask)
    wanted = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert encoded["size"] == list(wanted["size"]) and encoded["counts"] == wanted["counts"].decode()
    assert np.array_equal(rle.decode(encoded), mask)
    assert np.array_equal(rle.decode(encoded), coco.decode(wanted).astype(bool))


# ---- sizes


@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 90), st.integers(1, 90))
def test_any_size_comes_back_as_asked(height, width, to_height, to_width):
    image = torch.rand(1, 1, height, width)
    padded = pad_to(image, 32)
    assert padded.shape[-2] % 32 == padded.shape[-1] % 32 == 0
    assert padded.shape[-2] - height < 32 and padded.shape[-1] - width < 32
    assert torch.equal(padded[..., :height, :width], image)
    assert not padded[..., height:, :].any() and not padded[..., width:].any()
    maps = torch.rand(1, 2, padded.shape[-2] // 4, padded.shape[-1] // 4)
    assert upsample(maps, (height, width)).shape == (1, 2, height, width)
    assert upsample(maps, (height, width), (to_height, to_width)).shape == (1, 2, to_height, to_width)
    constant = upsample(torch.full_like(maps, 0.7), (height, width), (to_height, to_width))
    assert torch.allclose(constant, torch.tensor(0.7))


NETWORK = PMP(backbone="test_resnet", text_dim=8, dim=16, num_queries=4, num_layers=1, num_heads=2, ffn_dim=16).eval()


@settings(max_examples=12)
@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 5))
def test_the_network_takes_any_size_and_answers_in_bounds(height, width, count):
    with torch.inference_mode():
        prediction = NETWORK(torch.rand(1, 3, height, width), torch.randn(count, 8))
    soft, scores = soft_masks(prediction)
    found = answers(upsample(soft, (height, width)), scores)
    assert found.shape == (1, count, height, width) and scores.shape == (1, count)
    assert found.min() >= 0 and (found.flatten(2).amax(-1) <= scores + 1e-6).all() and scores.max() <= 1


@given(st.integers(1, 6), st.integers(1, 8), st.floats(0, 1), seeds)
def test_few_prompts_are_always_real_ones(rows, count, share, seed):
    g = torch.Generator().manual_seed(seed)
    valid = torch.rand(rows, count, generator=g) > 0.3
    torch.manual_seed(seed)
    asked = keep_few(valid, valid & (torch.rand(rows, count, generator=g) > 0.5), share)
    assert not (asked & ~valid).any() and torch.equal(asked.any(1), valid.any(1))


# ---- samplers


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 4), st.integers(0, 30), seeds)
def test_samplers_share_out_everything_once_and_go_on_anywhere(length, world, epoch, skip, seed):
    kept, dataset = base._rank_and_world_size, [None] * length
    try:
        shares, evaluated = [], []
        for rank in range(world):
            base._rank_and_world_size = lambda rank=rank: (rank, world)
            sampler = EpochSampler(dataset, seed)  # type: ignore[arg-type]
            sampler.set_epoch(epoch)
            order = list(sampler)
            assert order == list(EpochSampler(dataset, seed, epoch)) and len(order) == length // world == len(sampler)  # type: ignore[arg-type]
            assert list(EpochSampler(dataset, seed, epoch, skip)) == order[skip:]  # type: ignore[arg-type]
            shares += [index for _, index in order]
            evaluated += list(UnpaddedSampler(dataset))  # type: ignore[arg-type]
    finally:
        base._rank_and_world_size = kept
    assert len(set(shares)) == len(shares) and sorted(evaluated) == list(range(length))
