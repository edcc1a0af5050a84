"""Mining pairs: nouns, the best proposal of each, a file that is the same after a kill, one-line errors."""

import csv
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import make_tiny_clip

from pmpseg import Segmenter, rle
from pmpseg.data.pairs import COLUMNS, read_pairs
from pmpseg.errors import InputError
from pmpseg.models import PMP, TextEncoder
from pmpseg.nouns import noun_parser, nouns_of
from pmpseg.region_stage import RegionStage
from pmpseg.vocabulary import Vocabulary

MINE = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "mine_pairs.py"))
CAPTIONS = [
    ["A red circle on grass.", "A circle."],
    ["Running quickly."],  # no noun
    ["Two dogs and a cat near the water"],
    ["the cat sat on the grass", "A dog"],
    ["An old tree."],
]


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    pytest.importorskip("textblob", reason="the default parser: pip install 'pmpseg[mining]'")
    root = tmp_path_factory.mktemp("mine")
    clip = make_tiny_clip(root / "clip")
    torch.manual_seed(0)
    text = TextEncoder(clip)
    network = PMP(text_dim=text.dim, backbone="test_resnet", dim=32, num_queries=5, num_layers=1, num_heads=4, ffn_dim=32)
    Segmenter(network, text, Vocabulary.of(["red circle", "grass"]), 64, 0.3).save(root / "model")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    images, rows = [], []
    for n, some in enumerate(CAPTIONS):
        Image.fromarray(rng.integers(0, 255, (40 + n, 50, 3), dtype=np.uint8)).save(root / f"images/{n}.png")
        images.append({"id": 100 - n, "file_name": f"{n}.png"})
        rows += [{"image_id": 100 - n, "id": 10 * n + i, "caption": caption} for i, caption in enumerate(some)]
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": rows[::-1]}))
    return root


def mine(root: Path, out: Path, *options: str, **changes: str) -> Path:
    given = {"images": root / "images", "captions": root / "captions.json", "proposals": root / "model", "clip": root / "clip"}
    words = [str(w) for key, value in (given | changes | {"out": out, "device": "cpu"}).items() for w in (f"--{key}", value)]
    return MINE["main"]([*words, "--templates", "a {}", *options])


@pytest.fixture(scope="module")
def whole(origin, tmp_path_factory):
    return mine(origin, tmp_path_factory.mktemp("out") / "pairs.csv")


def test_each_noun_has_the_best_proposal_of_its_image(origin, whole, capsys):
    rows = read_pairs(whole)
    # In the order of the images' ids, 4.png being the lowest; of each image the first caption only.
    nouns = [(row["image"], row["noun"]) for row in rows]
    assert nouns == [
        *[("4.png", "tree"), ("3.png", "cat"), ("3.png", "grass")],
        *[("2.png", "dogs"), ("2.png", "cat"), ("2.png", "water"), ("0.png", "circle"), ("0.png", "grass")],
    ]
    segmenter, stage = Segmenter.load(origin / "model"), RegionStage.load(origin / "clip")
    for row in rows:
        image = Image.open(origin / "images" / row["image"])
        asked = [noun for name, noun in nouns if name == row["image"]]
        scale = 64 / min(image.size)
        small = image.resize([round(s * scale) for s in image.size], Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            masks = segmenter.network(pixels, segmenter.text.encode(asked)).mask_logits.sigmoid()
            padded = [s + -s % 32 for s in (small.height, small.width)]
            masks = torch.nn.functional.interpolate(masks, padded, mode="bilinear")[..., : small.height, : small.width]
            masks = torch.nn.functional.interpolate(masks, (image.height, image.width), mode="bilinear")[0]
            text = stage.text.encode([f"a {row['noun']}"]).pooled[0, 0]
            best = (-2.0, None)
            for mask in masks:
                if (mask > 0.5).any():
                    full = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
                    region, _ = stage.classifier.embed(full[None], mask[None, None])
                    best = max(best, (float(region[0, 0] @ text), (mask > 0.5).numpy()), key=lambda pair: pair[0])
        assert float(row["score"]) == pytest.approx(best[0], abs=2e-3)
        found = rle.decode({"size": [image.height, image.width], "counts": row["counts"]})
        assert (found == best[1]).mean() > 0.999
        x, y, width, height = (int(row[key]) for key in ("x", "y", "width", "height"))
        assert found[y : y + height, x : x + width].sum() == found.sum() == int(row["area"])
        assert row["caption"] == CAPTIONS[int(row["image"][0])][0]


def test_more_captions_give_more_nouns(origin, tmp_path):
    rows = read_pairs(mine(origin, tmp_path / "pairs.csv", "--captions-per-image", "2"))
    assert ("3.png", "dog") in [(row["image"], row["noun"]) for row in rows]
    assert sum(row["noun"] == "circle" for row in rows) == 1  # in both captions of its image, and once in the file


def test_blind_proposals(origin, whole, tmp_path):
    blind = read_pairs(mine(origin, tmp_path / "pairs.csv", "--blind"))
    assert [row["noun"] for row in blind] == [row["noun"] for row in read_pairs(whole)]
    assert [row["counts"] for row in blind] != [row["counts"] for row in read_pairs(whole)]


@pytest.mark.parametrize("at", [0.0, 0.4, 0.7, 0.97])
def test_a_killed_run_ends_with_the_same_file(origin, whole, tmp_path, at):
    """Whatever the last bytes were that reached the disk."""
    class Killed(BaseException):
        pass

    out, calls = tmp_path / "pairs.csv", []
    best = RegionStage.best_regions

    def until_killed(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return best(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RegionStage, "best_regions", until_killed)
        mine(origin, out)
    part = tmp_path / "pairs.part.csv"
    assert part.is_file() and not out.exists()
    content = part.read_bytes()
    part.write_bytes(content[: round(len(content) * at)])  # what a power cut leaves
    assert mine(origin, out).read_bytes() == whole.read_bytes()
    assert not part.exists()


def test_another_question_is_not_a_continuation(origin, tmp_path):
    (tmp_path / "pairs.part.csv").write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(InputError, match="was begun with captions None"):
        mine(origin, tmp_path / "pairs.csv")


def test_other_captions_under_the_same_name_are_not_a_continuation(origin, whole, tmp_path):
    captions = tmp_path / "captions.json"
    captions.write_text((origin / "captions.json").read_text())
    out, part = tmp_path / "pairs.csv", tmp_path / "pairs.part.csv"
    mine(origin, out, captions=captions).rename(part)  # as if killed at the end
    before = part.read_bytes()
    content = json.loads(captions.read_text())
    for image in content["images"]:
        image["file_name"] = image["file_name"].replace("0.png", "zero.png")
    captions.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"has pairs of 0\.png, which is not in the captions") as caught:
        mine(origin, out, captions=captions)
    assert "\n" not in str(caught.value) and part.read_bytes() == before and not out.exists()


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_holds_the_noun_once(origin, tmp_path, template):
    with pytest.raises(InputError, match=r"--templates: got .*want texts with one '\{\}' each") as caught:
        mine(origin, tmp_path / "pairs.csv", "--templates", "a {}", template)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_what_is_done_is_kept(origin, whole):
    before = whole.read_bytes()
    with pytest.raises(InputError, match="is done: give another name"):
        mine(origin, whole)
    assert whole.read_bytes() == before


def test_a_missing_image_is_skipped_and_all_missing_is_an_error(origin, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match="none of the 5 images"):
        mine(origin, tmp_path / "pairs.csv", images=tmp_path / "images")
    Image.open(origin / "images/3.png").save(tmp_path / "images/3.png")
    (tmp_path / "images/0.png").write_bytes(b"no image")
    rows = read_pairs(mine(origin, tmp_path / "pairs.csv", images=tmp_path / "images"))
    assert {row["image"] for row in rows} == {"3.png"}
    assert "skipped" in capsys.readouterr().out


def test_a_mask2former_proposes(origin, tmp_path):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = SwinConfig(embed_dim=24, depths=[1, 1, 1, 1], num_heads=[2, 2, 4, 4], window_size=7, out_features=stages)
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32, "dim_feedforward": 32}
    sizes |= {"encoder_layers": 1, "decoder_layers": 3, "num_queries": 6, "num_labels": 3}
    config = Mask2FormerConfig(backbone_config=backbone, **sizes)
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path / "m2f")
    rows = read_pairs(mine(origin, tmp_path / "pairs.csv", "--image-size", "64", proposals=tmp_path / "m2f"))
    assert len(rows) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": "nowhere.json"}, "--captions nowhere.json: no such file"),
        ({"captions": __file__}, "not COCO captions"),
        ({"images": "nowhere"}, "--images nowhere: no such folder"),
        ({"proposals": "nowhere"}, "--proposals nowhere: no such folder"),
        ({"clip": "/nowhere"}, "cannot open '/nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_left(origin, tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        mine(origin, tmp_path / "pairs.csv", **changes)
    assert "\n" not in str(caught.value) and not (tmp_path / "pairs.csv").exists()


# ---- nouns


def test_nouns():
    tagged = [("Dogs", "NNS"), ("run", "VB"), ("3", "NN"), ("x", "NN"), ("dogs", "NNP"), ("t-shirt", "NN")]
    assert nouns_of(tagged) == ["dogs", "t-shirt"]
    pytest.importorskip("textblob")
    parse = noun_parser()
    assert parse("A man riding a wave with a surfboard.") == ["man", "wave", "surfboard"]
    assert parse("") == parse("...") == []


@pytest.mark.parametrize(("name", "mend"), [("nltk", "nltk"), ("spacy", "spacy")])
def test_a_parser_that_is_not_there_says_so(name, mend, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=f"parser {name} is not installed: pip install .*{mend}"):
        noun_parser(name)
    with pytest.raises(InputError, match="parser: got 'cat', want one of textblob, nltk, spacy"):
        noun_parser("cat")


def test_the_part_file_reads_as_a_table(whole):
    with whole.open(newline="") as file:
        assert next(csv.reader(file)) == list(COLUMNS)
