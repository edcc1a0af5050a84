"""The oracle analysis: toy cases worked out by hand, and plain numpy versions of both halves."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import make_tiny_clip
from torch.nn import functional as F

from pmpseg.models import RegionClassifier, TextEncoder
from pmpseg.oracle import name_by_truth, name_true_masks
from pmpseg.region_stage import RegionStage

X, WORDS = 255, ["red", "circle", ["square", "box"], "grass"]


@pytest.fixture(scope="module")
def region(tmp_path_factory):
    clip = make_tiny_clip(tmp_path_factory.mktemp("clip"))
    stage = RegionStage(RegionClassifier(clip), TextEncoder(clip))
    with torch.no_grad():  # a random CLIP sees the same in every image otherwise
        for p in stage.classifier.vision.parameters():
            p *= 8 if p.ndim > 1 else 1
    return stage


def blocks(height: int, width: int, seed: int, ignore: int = X) -> torch.Tensor:
    """Labels in patches of many sizes, 0..3 and ignored."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 5, (1, 1, 5, 4), generator=g)
    labels = F.interpolate(coarse.float(), (height, width), mode="nearest")[0].long()
    return torch.where(labels == 4, ignore, labels)


def masks_to_logits(masks) -> torch.Tensor:
    return (torch.as_tensor(masks, dtype=torch.float32) - 0.5)[None] * 200


def by_truth_in_numpy(masks: np.ndarray, truth: np.ndarray, ignore: int, overlap: str) -> np.ndarray:
    """Masks (Q, h, w) of probabilities, loops over queries and classes, sums in a dict."""
    known = truth != ignore
    scores: dict[int, np.ndarray] = {}
    for mask in masks:
        binary, best, name = (mask > 0.5) & known, 0.0, None
        for c in sorted(set(truth[known].tolist())):
            both = np.logical_and(binary, truth == c).sum()
            under = np.logical_or(binary, truth == c).sum() if overlap == "iou" else max(binary.sum(), 1)
            if both / under > best:
                best, name = both / under, c
        if name is not None:
            scores[name] = scores.get(name, 0) + mask
    if not scores:
        return np.full(truth.shape, ignore)
    names = sorted(scores)
    return np.array(names)[np.stack([scores[c] for c in names]).argmax(0)]


def test_a_proposal_gets_the_class_that_it_overlaps_best():
    """One row of 8 pixels, truth 0 0 0 0 0 0 1 1. By IoU, pixels 5 to 7 are class 1's (2/3 against 1/8); 0 to 3 are class 0's."""
    truth = torch.tensor([[[0, 0, 0, 0, 0, 0, 1, 1]]])
    masks = [[[1, 1, 1, 1, 0, 0, 0, 0]], [[0, 0, 0, 0, 0, 1, 1, 1]]]
    found = name_by_truth(masks_to_logits(masks), (1, 8), truth, stride=1)
    assert found[0, 0, [0, 1, 2, 3, 5, 6, 7]].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_the_two_overlaps_differ_where_the_larger_class_takes_the_larger_share():
    """Truth 0 0 0 0 0 0 0 0 1; the proposal has two pixels of class 0 and the one of class 1. IoU: 2/9 against 1/3; share: 2/3
    against 1/3."""
    truth = torch.tensor([[[0, 0, 0, 0, 0, 0, 0, 0, 1]]])
    logits = masks_to_logits([[[0, 0, 0, 0, 0, 0, 1, 1, 1]]])
    assert name_by_truth(logits, (1, 9), truth, stride=1)[0, 0, -1] == 1
    assert name_by_truth(logits, (1, 9), truth, stride=1, overlap="inside")[0, 0, -1] == 0


def test_ignored_pixels_count_in_no_area():
    """Truth 0 X X X 1 1; pixels 0 to 4: with the ignored ones as area, class 0 has 1/5 and class 1 1/6; without, 1/2 and 1/3.
    The other proposal, 1 to 3, covers nothing but ignored pixels and must not be named at all."""
    truth = torch.tensor([[[0, X, X, X, 1, 1]]])
    found = name_by_truth(masks_to_logits([[[1, 1, 1, 1, 1, 0]], [[0, 1, 1, 1, 0, 0]]]), (1, 6), truth, stride=1)
    assert found[0, 0, [0, 4, 5]].tolist() == [0, 0, X]  # nothing answers at 5: sigmoid(-100) is 0 in float32
    truth = torch.tensor([[[0, 1, X, X, X, X]]])  # pixels 1 to 5: class 1 by 1/1; by area it were 1/5 of "inside"
    two = masks_to_logits([[[1, 0, 0, 0, 0, 0]], [[1, 1, 1, 1, 1, 1]]])
    assert name_by_truth(two, (1, 6), truth, stride=1)[0, 0, :2].tolist() == [0, 0]  # a tie: 1/2 each, the lower class


def test_what_is_ignored_and_what_is_below_one_half_decides_no_name():
    """Pixels 0 to 5 of 0 1 1 X X X 1 1 1 1: 1/3 against 2/7; with the ignored ones as area 1/6 against 2/10. Then 0 1 1 1 with
    probabilities 0.9 0.4 0.4 0.4: only the first is inside; all of them would be class 1's, by 3/4."""
    truth = torch.tensor([[[0, 1, 1, X, X, X, 1, 1, 1, 1]]])
    logits = masks_to_logits([[[1, 1, 1, 1, 1, 1, 0, 0, 0, 0]]])
    assert name_by_truth(logits, (1, 10), truth, stride=1)[0, 0, :6].tolist() == [0] * 6
    soft = torch.tensor([0.9, 0.4, 0.4, 0.4]).logit().view(1, 1, 1, 4)
    assert name_by_truth(soft, (1, 4), torch.tensor([[[0, 1, 1, 1]]]), stride=1).tolist() == [[[0] * 4]]


def test_no_class_and_no_proposal_give_no_answer():
    logits = masks_to_logits(np.ones((3, 4, 4)))
    assert (name_by_truth(logits, (4, 4), torch.full((1, 4, 4), X), stride=1) == X).all()
    assert (name_by_truth(-logits, (4, 4), torch.zeros(1, 4, 4, dtype=torch.int64), stride=1) == X).all()


def test_perfect_proposals_give_the_truth_back():
    for ignore, shift in ((255, 0), (65535, 700)):
        truth = blocks(40, 36, 3, ignore)
        truth = torch.where(truth == ignore, truth, truth + shift)
        masks = torch.stack([truth[0] == c for c in truth.unique() if c != ignore])
        for overlap in ("iou", "inside"):
            found = name_by_truth(masks_to_logits(masks), (40, 36), truth, ignore, overlap, stride=1)
            assert torch.equal(found[truth != ignore], truth[truth != ignore]) and len(masks) == 4


@pytest.mark.parametrize("overlap", ["iou", "inside"])
def test_as_numpy_has_it_through_padding_and_resizing(overlap):
    """Images of 30 x 42, padded to 32 x 48, answered at stride 4, labels of 61 x 80."""
    g = torch.Generator().manual_seed(0)
    truth = torch.cat([blocks(61, 80, 1), blocks(61, 80, 2)])
    near = F.interpolate(torch.stack([truth == c for c in (0, 1, 2, 3, 1, 2)], 1).float(), (8, 12)) * 8 - 4
    logits = torch.cat([near, torch.full((2, 1, 8, 12), -9.0)], 1) + torch.randn(2, 7, 8, 12, generator=g) * 3
    found = name_by_truth(logits, (30, 42), truth, overlap=overlap)
    big = F.interpolate(logits, (32, 48), mode="bilinear", align_corners=False)[..., :30, :42]
    masks = F.interpolate(big, (61, 80), mode="bilinear", align_corners=False).sigmoid().numpy()
    for b in range(2):
        wanted = by_truth_in_numpy(masks[b], truth[b].numpy(), X, overlap)
        assert len(np.unique(wanted)) > 2 and (found[b].numpy() == wanted).mean() > 0.9999


def test_only_classes_that_occur_are_looked_at():
    """Labels near 65534: a table or a map of the whole list would be some 60 GB."""
    truth = torch.where(blocks(256, 256, 3) == 0, 3, 65534)
    masks = torch.stack([truth[0] == 3, truth[0] == 65534])
    assert torch.equal(name_by_truth(masks_to_logits(masks), (256, 256), truth, 65535, stride=1), truth)


# ---- true masks, named by a CLIP


class Colours:
    """A stand-in for a region classifier: a region is named by its colour, one channel a word."""

    dim = 3

    def __call__(self, image, masks, names):
        self.seen.append(masks)
        valid = masks.flatten(2).any(-1)
        mean = torch.einsum("bqhw,bchw->bqc", masks, image) / masks.flatten(2).sum(-1).clamp(min=1)[..., None]
        return mean, valid

    def __init__(self):
        self.seen = []


@pytest.fixture
def colours():
    text = SimpleNamespace(encode=lambda words: SimpleNamespace(pooled=torch.eye(3)[None]))
    return SimpleNamespace(classifier=Colours(), text=text)


def test_every_true_mask_gets_one_name_whatever_its_class(colours):
    """The left half is class 2 and red, the right one class 0 and blue, the stripe below ignored: names 0 and 2."""
    labels = torch.tensor([[[2, 2, 0, 0], [2, 2, 0, 0], [X, X, X, X]]])
    image = torch.zeros(1, 3, 6, 8)
    image[0, 0, :, :4] = image[0, 2, :, 4:] = 1
    found = name_true_masks(colours, image, labels, ["r", "g", "b"])
    assert found.tolist() == [[[0, 0, 2, 2], [0, 0, 2, 2], [X, X, X, X]]]
    assert colours.classifier.seen[0].shape == (1, 2, 6, 8)


def test_masks_come_in_chunks_and_those_that_vanish_have_no_answer(colours):
    labels = torch.zeros(1, 64, 64, dtype=torch.int64)
    labels[0, 0, 0], labels[0, :, 32:] = 2, 1  # one pixel of 64 x 64 is not there at 8 x 8
    found = name_true_masks(colours, torch.ones(1, 3, 8, 8) * torch.tensor([0, 1, 0]).view(3, 1, 1), labels, "rgb", chunk=2)
    assert found[0, 0, 0] == X and (found.flatten()[1:] == 1).all()
    assert [masks.shape[1] for masks in colours.classifier.seen] == [2, 1]


def test_labels_that_are_no_word_and_shapes_that_do_not_fit(colours):
    image = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"labels: got class 3, wanted 0 to 2, one a word, or 255"):
        name_true_masks(colours, image, torch.full((1, 8, 8), 3), ["r", "g", "b"])
    with pytest.raises(ValueError, match=r"labels torch.int32 \(1, 8, 8\)"):
        name_true_masks(colours, image, torch.zeros(1, 8, 8, dtype=torch.int32), ["r", "g", "b"])
    with pytest.raises(ValueError, match="overlap: got 'dice', want one of iou, inside"):
        name_by_truth(torch.zeros(1, 2, 2, 2), (8, 8), torch.zeros(1, 8, 8, dtype=torch.int64), overlap="dice")
    assert (name_true_masks(colours, image, torch.full((1, 9, 9), X), ["r", "g", "b"]) == X).all()


def test_a_clip_names_crops_as_made_by_hand(region):
    """Each class's mask cut out with numpy and PIL's plain indexing, filled, put through the CLIP, compared with every word."""
    image = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(5))
    labels = torch.cat([blocks(96, 128, 1), blocks(96, 128, 4)])
    found = name_true_masks(region, image, labels, WORDS, chunk=3)
    names = F.normalize(region.text.encode(WORDS).pooled[0], dim=-1)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3]))
    wanted, answers = np.full(labels.shape, X), set()
    for b in range(2):
        small = np.array(Image.fromarray(labels[b].numpy().astype(np.uint8)).resize((64, 48), Image.Resampling.NEAREST))
        for c in sorted(set(labels[b].unique().tolist()) - {X}):
            ys, xs = np.nonzero(small == c)
            box = (slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1))
            inside = torch.tensor(small[box] == c)
            cut = (torch.where(inside, image[b][:, *box], mean) - mean) / std
            pixels = F.interpolate(cut[None], (32, 32), mode="bicubic", align_corners=False)
            with torch.no_grad():
                embedding = region.classifier.vision(pixels).image_embeds[0]
            name = int((names @ F.normalize(embedding, dim=0)).argmax())
            wanted[b][labels[b].numpy() == c] = name
            answers.add(name)
    assert np.array_equal(found.numpy(), wanted) and len(answers) > 1
