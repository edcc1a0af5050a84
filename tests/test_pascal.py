"""Pascal VOC as a zero-shot class list: names, unseen pairs, masks with palettes."""

import numpy as np
import pytest
import torch
from voc_fixture import PICTURES, make_voc

from pmpseg.data import PascalZeroShot
from pmpseg.errors import InputError


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return make_voc(tmp_path_factory.mktemp("voc"), ("SegmentationClass", "SegmentationClassAug"))


def test_pairs_in_the_papers_order(voc):
    pairs = [("cow", "motorbike"), ("airplane", "sofa"), ("cat", "tvmonitor"), ("train", "bottle"), ("chair", "pottedplant")]
    for n in range(6):
        vocabulary = PascalZeroShot(str(voc), unseen_pairs=n, num_workers=0).vocabulary
        assert {vocabulary.names[i] for i in vocabulary.unseen} == {name for pair in pairs[:n] for name in pair}
        assert len(vocabulary) == 21 and vocabulary.names[0] == "background"


def test_names(voc):
    """In the order of the labels: checked by the numbers that VOC's development kit gives some of them."""
    paper = PascalZeroShot(str(voc), num_workers=0).vocabulary.names
    words = PascalZeroShot(str(voc), num_workers=0, paper_names=False).vocabulary.names
    assert (paper[1], paper[11], paper[16], paper[20]) == ("airplane", "diningtable", "pottedplant", "tvmonitor")
    assert (words[1], words[11], words[16], words[20]) == ("aeroplane", "dining table", "potted plant", "tv monitor")
    assert [words[i] for i in (4, 5, 8, 15, 19)] == ["boat", "bottle", "cat", "person", "train"]


def test_background_factor(voc):
    assert PascalZeroShot(str(voc), num_workers=0).class_factors == {0: 3.0}
    assert PascalZeroShot(str(voc), background_factor=1, num_workers=0).class_factors == {}
    assert not PascalZeroShot.__dict__.get("class_list") and getattr(PascalZeroShot, "class_list", True)


def test_items(voc):
    data = PascalZeroShot(str(voc), num_workers=0, image_size=48)
    for split in ("val", "test"):
        dataset = data.dataset(split)
        assert len(dataset) == len(PICTURES)
        for index, (size, boxes) in enumerate(PICTURES.values()):
            item = dataset[index]
            assert item["image"].shape == (3, 48, 48) and item["labels"].shape == size
            labels = item["labels"].numpy()
            for label, top, left, height, width in boxes:
                part = labels[top + 1 : top + height - 1, left : left + width]  # the line of another box may run along the edge
                assert (part == label).mean() > 0.95
            assert set(np.unique(labels)) == {0, 255, *(box[0] for box in boxes)}
            assert item["prompts"] == data.vocabulary.names and item["prompt_class"].equal(torch.arange(21))
            assert "prompt_masks" not in item
    aspect = PascalZeroShot(str(voc), num_workers=0, image_size=45, square=False, resize_labels=True).dataset("val")[0]
    assert aspect["image"].shape == (3, 45, 60) and aspect["labels"].shape == (45, 60)


def test_refusals(voc, tmp_path):
    with pytest.raises(InputError, match="for evaluation only"):
        PascalZeroShot(str(voc), num_workers=0).train_dataloader()
    with pytest.raises(InputError, match="unseen_pairs: got 6, want 0 to 5"):
        PascalZeroShot(str(voc), unseen_pairs=6)
    with pytest.raises(InputError, match="background_factor: got 0"):
        PascalZeroShot(str(voc), background_factor=0)
    bad = make_voc(tmp_path, ("SegmentationClass",))
    from PIL import Image

    Image.fromarray(np.full((90, 120), 30, np.uint8)).save(bad / "SegmentationClass" / "2007_000001.png")
    with pytest.raises(InputError, match=r"2007_000001.png has label 30: a VOC mask"):
        PascalZeroShot(str(bad), num_workers=0).dataset("val")[0]
    Image.fromarray(np.zeros((9, 12), np.uint8)).save(bad / "SegmentationClass" / "2007_000001.png")
    with pytest.raises(InputError, match="are 120x90 and 12x9: they must have one size"):
        PascalZeroShot(str(bad), num_workers=0).dataset("val")[0]
