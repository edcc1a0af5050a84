"""Semantic, instance and panoptic maps: transformers' own answers with its detours, and Mask2Former's rules by hand without."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Mask2FormerImageProcessorPil

from pmpseg.inference import semantic_labels
from pmpseg.models import Prediction
from pmpseg.panoptic import instances, panoptic

IMAGE, SIZE = (96, 128), (75, 101)
THINGS = {0, 2}


def prediction(seed: int) -> Prediction:
    """Blobs of several sizes, some of them of one class, some sure and some not."""
    g = torch.Generator().manual_seed(seed)
    small = torch.randn(2, 12, 4, 5, generator=g) * 6 - 2
    masks = torch.nn.functional.interpolate(small, (24, 32), mode="bicubic")
    return Prediction(masks, torch.randn(2, 12, 5, generator=g) * 4)


def outputs(given: Prediction) -> SimpleNamespace:
    return SimpleNamespace(class_queries_logits=given.class_logits, masks_queries_logits=given.mask_logits.clone())


@pytest.mark.parametrize("seed", range(5))
def test_semantic_maps_are_transformers(seed):
    given = prediction(seed)
    want = Mask2FormerImageProcessorPil().post_process_semantic_segmentation(outputs(given), target_sizes=[SIZE] * 2)
    got = semantic_labels(given, IMAGE, SIZE, chunk=3, transformers=True)
    assert torch.equal(got, torch.stack(want)) and len(got.unique()) > 2


@pytest.mark.parametrize("seed", range(5))
def test_instances_are_transformers(seed):
    given = prediction(seed)
    processor = Mask2FormerImageProcessorPil()
    options = {"target_sizes": [SIZE] * 2, "return_binary_maps": True, "threshold": 0.3}
    want = processor.post_process_instance_segmentation(outputs(given), **options)
    for got, wanted in zip(instances(given, IMAGE, SIZE, threshold=0.3, transformers=True), want, strict=True):
        order = sorted(range(len(wanted["segments_info"])), key=lambda i: -wanted["segments_info"][i]["score"])
        infos = [wanted["segments_info"][i] for i in order]
        assert got.labels.tolist() == [info["label_id"] for info in infos] and len(infos) > 2
        assert got.scores.tolist() == pytest.approx([info["score"] for info in infos], abs=1e-5)
        assert torch.equal(got.masks, wanted["segmentation"][order] == 1)


@pytest.mark.parametrize("seed", range(8))
def test_panoptic_maps_are_transformers(seed):
    given = prediction(seed)
    options = {"target_sizes": [SIZE] * 2, "threshold": 0.4, "overlap_mask_area_threshold": 0.5}
    fused = set(range(4)) - THINGS
    want = Mask2FormerImageProcessorPil().post_process_panoptic_segmentation(outputs(given), label_ids_to_fuse=fused, **options)
    found = panoptic(given, IMAGE, SIZE, THINGS, threshold=0.4, overlap=0.5, transformers=True)
    for (ids, segments), wanted in zip(found, want, strict=True):
        assert torch.equal(ids, wanted["segmentation"])
        assert [(s.id, s.label) for s in segments] == [(i["id"], i["label_id"]) for i in wanted["segments_info"]]
        assert [s.score for s in segments] == pytest.approx([i["score"] for i in wanted["segments_info"]], abs=1e-5)


def boxes(*parts: tuple[slice, slice, float]) -> torch.Tensor:
    """One mask a box, its logit inside and -9 outside, 8 x 8 cells for an image of 32 x 32."""
    masks = torch.full((1, len(parts), 8, 8), -9.0)
    for i, (rows, columns, logit) in enumerate(parts):
        masks[0, i, rows, columns] = logit
    return masks


def named(*labels: int, classes: int = 3, logit: float = 9.0) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor([labels]), classes + 1).float() * logit


def test_stuff_is_one_segment_things_stay_apart_and_ids_are_unique():
    top, bottom, left, right = slice(0, 4), slice(4, 8), slice(0, 4), slice(4, 8)
    masks = boxes((top, left, 9.0), (top, right, 9.0), (bottom, left, 9.0), (bottom, right, 9.0))
    (ids, segments), = panoptic(Prediction(masks, named(1, 0, 1, 0)), (32, 32), things={0})
    assert [(s.id, s.label) for s in segments] == [(1, 1), (2, 0), (3, 0)]
    assert ids[4, 4] == ids[28, 4] == 1 and ids[4, 28] == 2 and ids[28, 28] == 3
    (ids, segments), = panoptic(Prediction(masks, named(1, 0, 3, 0)), (32, 32), things={0})  # class 3 is "no object"
    assert len(segments) == 3 and ids[28, 4] == 0


def test_a_query_that_loses_most_of_its_mask_is_left_out_and_unsure_pixels_belong_to_nobody():
    everything, strip = (slice(0, 8), slice(0, 8)), (slice(0, 8), slice(0, 7))
    masks = boxes((*everything, 2.0), (*strip, 9.0))
    (ids, segments), = panoptic(Prediction(masks, named(0, 1)), (32, 32), things={0, 1})
    assert [s.label for s in segments] == [1] and ids[4, 30] == 0  # the first keeps an eighth of its mask
    masks = boxes((slice(0, 8), slice(0, 4), 9.0))
    (ids, _), = panoptic(Prediction(masks, named(0)), (32, 32), things={0})
    assert ids[4, 4] == 1 and ids[4, 30] == 0  # it wins all pixels, there being no other, and has half of them


def test_instances_by_hand():
    masks = boxes((slice(0, 8), slice(0, 4), 9.0), (slice(0, 8), slice(4, 8), 9.0))
    (found,) = instances(Prediction(masks, named(2, 0, logit=3.0)), (32, 32), threshold=0.5)
    assert sorted(found.labels.tolist()) == [0, 2] and found.masks.shape == (2, 32, 32)
    which = found.labels.tolist().index(2)
    assert found.masks[which, 5, 3] and not found.masks[which, 5, 28]
    (none,) = instances(Prediction(-masks.abs(), named(2, 0)), (32, 32), (20, 30))
    assert none.masks.shape == (0, 20, 30)
