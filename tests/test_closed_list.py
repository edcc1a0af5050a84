"""transformers' Mask2Former and MaskFormer as they lie: their own answers by their own words, and a CLIP for other words."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_from_transformers import MEAN, STD, mask2former, maskformer, noisy, resnet, swin
from tiny_clip import make_tiny_clip
from transformers import CLIPModel, Mask2FormerForUniversalSegmentation, MaskFormerForInstanceSegmentation

from pmpseg import Segmenter, evaluate, predict
from pmpseg.errors import InputError
from pmpseg.inference import ask_one_by_one, ask_together
from pmpseg.models import RegionClassifier, TextEncoder
from pmpseg.models.closed_list import ClosedWords
from pmpseg.models.prompts import NOT_ASKED, NOT_KNOWN
from pmpseg.models.region import ensemble
from pmpseg.region_stage import RegionStage

LABELS = ["wall", "door, double door", "Red Circle", "screen door, screen", "screen, silver screen", "tree-merged", "grass"]
KINDS = {"mask2former": Mask2FormerForUniversalSegmentation, "maskformer": MaskFormerForInstanceSegmentation}


def write_folder(kind: str, folder, size=None):
    torch.manual_seed(0)
    model = noisy(mask2former(resnet()) if kind == "mask2former" else maskformer(swin()), norms=False)
    with torch.no_grad():  # the names and masks of random queries are all alike otherwise
        for name, p in model.named_parameters():
            if "transformer_module" in name and p.ndim == 2:
                p *= 10 if len(p) == 10 else 4
            if "mask_embedder" in name:
                p *= 2
    picture = torch.from_numpy(photo()).permute(2, 0, 1)[None].float() / 255
    head, seen = model.class_predictor, []
    hook = head.register_forward_hook(lambda module, given, answer: seen.append(given[0]))
    with torch.no_grad():
        model((picture - MEAN) / STD)
        hook.remove()
        queries = seen[-1][0]  # (Q, D)
        head.weight.copy_(torch.randn_like(head.weight) / (queries - queries.mean(0)).norm(dim=1).mean() * 3)
        head.bias.copy_(-head.weight @ queries.mean(0))
    model.config.id2label = dict(enumerate(LABELS))
    model.save_pretrained(folder)
    processor = {"image_mean": MEAN.flatten().tolist(), "image_std": STD.flatten().tolist()}
    size = size or {"shortest_edge": 64, "longest_edge": 96}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"size": size}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write_folder(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = make_tiny_clip(tmp_path_factory.mktemp("clip"))
    model = CLIPModel.from_pretrained(folder)
    with torch.no_grad():  # a random one sees the same in every region otherwise
        for p in model.vision_model.parameters():
            p *= 8 if p.ndim > 1 else 1
    model.save_pretrained(folder)
    return folder


def photo(height: int = 64, width: int = 96) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.kron(rng.integers(0, 256, (height // 16, width // 16, 3)), np.ones((16, 16, 1))).astype(np.uint8)


@torch.no_grad()
def by_transformers(folder, kind: str, picture: np.ndarray):
    """Masks (Q, H, W) and p (Q, N + 1) of transformers' network, by nothing of ours."""
    model = KINDS[kind].from_pretrained(folder).eval()
    image = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
    answer = model(((image - MEAN) / STD)[None])
    masks = torch.nn.functional.interpolate(answer.masks_queries_logits, image.shape[1:], mode="bilinear", align_corners=False)
    return masks[0].sigmoid(), answer.class_queries_logits[0].softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_all_labels_asked_together_are_transformers_label_map(folders, kind):
    segmenter = Segmenter.load(folders[kind])
    assert (segmenter.image_size, segmenter.longest_side, segmenter.square, segmenter.threshold) == (64, 96, False, 0.5)
    masks, p = by_transformers(folders[kind], kind, photo())
    wanted = torch.einsum("qk,qhw->khw", p[:, :-1], masks)
    found = segmenter.segment(photo(), LABELS, together=True)
    assert len(wanted.argmax(0).unique()) > 2
    assert (found.labels == wanted.argmax(0).numpy()).mean() > 0.999
    assert np.abs(found.scores - p[:, :-1].amax(0).numpy()).max() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_prompt_has_the_sum_of_its_classes(folders, kind):
    """Some words of the list, synonyms, two classes at once, one that is unknown; padding beside."""
    segmenter = Segmenter.load(folders[kind])
    image = torch.from_numpy(photo()).permute(2, 0, 1)[None].float() / 255
    features = segmenter.network.encode(image)
    prompts = segmenter.text.encode(["DOUBLE DOOR", "zebra", ["lawn", "grass"], ["tree", "wall"]])
    _, p = by_transformers(folders[kind], kind, photo())
    wanted = torch.stack([p[:, 1], 0 * p[:, 0], p[:, 6], p[:, 5] + p[:, 0]], 1)
    together = ask_together(segmenter.network, features, prompts)
    assert (together.probabilities()[0] - wanted).abs().max() < 1e-3
    assert (together.class_logits.softmax(-1)[0, :, -1] - p[:, [2, 3, 4, 7]].sum(1)).abs().max() < 1e-3
    assert (together.class_logits[0, :, 1] == NOT_KNOWN).all() and (together.probabilities()[0, :, 1] == 0).all()
    masks, scores = ask_one_by_one(segmenter.network, features, prompts, at_once=3)
    torch.testing.assert_close(scores, together.probabilities().amax(1))
    by_hand = (together.probabilities()[0].T[:, :, None, None] * together.mask_logits[0].sigmoid()).amax(1)
    torch.testing.assert_close(masks[0], by_hand)
    prompts.valid[0, 0] = False
    padded = ask_together(segmenter.network, features, prompts)
    assert (padded.class_logits[0, :, 0] == NOT_ASKED).all()
    torch.testing.assert_close(padded.probabilities()[..., 1:], together.probabilities()[..., 1:])


@torch.no_grad()
def test_prompts_that_share_a_class_keep_their_order(folders):
    segmenter = Segmenter.load(folders["mask2former"])
    features = segmenter.network.encode(torch.rand(2, 3, 64, 64))
    p = features.class_logits.softmax(-1)
    found = ask_together(segmenter.network, features, segmenter.text.encode(["wall", "Wall", "grass"])).probabilities()
    torch.testing.assert_close(found, p[..., [0, 0, 6]] / (1 + p[..., :1]))


def test_which_words_mean_which_classes():
    words = ClosedWords([*LABELS, "wall", "floor-other-merged", "mirror-stuff", "window-blind"])
    for prompt, wanted in {
        "Wall": [0, 7],  # a label that is there twice
        "  red   circle ": [2],
        "red_circle": [2],
        "double door": [1],
        "screen": [4],  # its first word there, a synonym at 3
        "screen door, screen": [3],  # the whole label, though "screen" alone is 4
        "silver screen": [4],
        "tree": [5],
        "tree-merged": [5],
        "floor": [8],
        "mirror": [9],
        "blind": [],
        "window": [],
        "-": [],
        "doors": [],
    }.items():
        assert words.classes_of(prompt) == wanted, prompt
    assert words.classes_of(["lawn", "grass"]) == [6] and words.classes_of(["door", "double door"]) == [1]
    assert words.missing(["wall", ["lawn", "turf"], "grass"]) == ["lawn"]
    for bad, message in (([], "wanted a list of at least one phrase"), (["wall", " "], "not blank"), ([[]], "not blank")):
        with pytest.raises(InputError, match=message):
            words.encode(bad)


def test_words_that_are_on_no_list_need_a_second_stage(folders, clip):
    segmenter = Segmenter.load(folders["mask2former"])
    answer = segmenter.segment(photo(), ["grass", "zebra"])
    assert answer.scores[0] > 0 and answer.scores[1] == 0 and not answer.mask(1).any()
    for together in (False, True):
        with pytest.raises(InputError, match=r"has no class called zebra, lion; it knows its 7 classes only \('wall', 'd"):
            segmenter.segment(photo(), ["zebra", "lion"], together=together)
    for weight in (0.6, 1.0):
        segmenter.region = RegionStage(RegionClassifier(clip, weight=weight), TextEncoder(clip))
        assert (segmenter.segment(photo(), ["zebra", "lion"]).scores > 0).all()
        assert set(np.unique(segmenter.segment(photo(), ["zebra", "lion"], together=True).labels)) <= {0, 1}


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7, 1.0])
def test_a_name_off_the_list_has_what_the_list_leaves(weight):
    """By hand, one query: p of the known name 0.2, of all else 0.8, which two unknown names share with "no object"; the CLIP says
    0.1, 0.6 and 0.3."""
    first = torch.tensor([0.2, 1.0, 1.0, 0.8]).log()[None, None]
    first[..., 1:3] = NOT_KNOWN
    region = torch.tensor([0.1, 0.6, 0.3]).log()[None, None]
    found = ensemble(first, region, torch.ones(1, 1, dtype=torch.bool), weight)[0, 0]
    share = 0.8 / 3 if weight else 0.0
    wanted = [p ** (1 - weight) * phat**weight for p, phat in ((0.2, 0.1), (share, 0.6), (share, 0.3))]
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)
    first[..., 2] = NOT_ASKED
    assert ensemble(first, region, torch.ones(1, 1, dtype=torch.bool), weight)[0, 0, 2] == 0


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"height": 32, "width": 32}, (32, None, True)),
        ({"shortest_edge": 48}, (48, None, False)),
        (40, (40, 1333, False)),
        (None, (800, 1333, False)),
    ],
)
def test_sizes_are_the_image_processors(folders, tmp_path, given, wanted):
    for path in folders["maskformer"].iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "preprocessor_config.json").unlink()
    if given:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": given}))
    found = Segmenter.load(tmp_path)
    assert (found.image_size, found.longest_side, found.square) == wanted


def test_the_long_side_is_bounded_and_saving_is_refused(folders, monkeypatch, tmp_path):
    segmenter = Segmenter.load(folders["mask2former"])
    encode, seen = segmenter.network.encode, []
    monkeypatch.setattr(segmenter.network, "encode", lambda image: seen.append(tuple(image.shape[-2:])) or encode(image))
    for size in ((80, 96), (64, 192), (96, 32)):
        assert segmenter.segment(photo(*size), "wall").mask(0).shape == size
    assert seen == [(64, 77), (32, 96), (96, 32)]
    with pytest.raises(InputError, match="is a model of transformers, which is read as it lies: keep that folder"):
        segmenter.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture
def data(tmp_path):
    """FolderData in the names of the list, but for one; the truth is noise."""
    rng = np.random.default_rng(1)
    for kind in ("images", "masks"):
        (tmp_path / kind / "test").mkdir(parents=True)
        (tmp_path / kind / "train").mkdir()
    for name in ("train/a", "test/b", "test/c"):
        Image.fromarray(photo()).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(rng.integers(0, 3, (64, 96), dtype=np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "classes.txt").write_text("0: lawn, grass\n1: wall\n2: sky\n")
    config = {"class_path": "pmpseg.data.FolderData", "init_args": {"root": str(tmp_path), "image_size": 64, "num_workers": 0}}
    (tmp_path / "data.yaml").write_text(json.dumps({"data": config}))
    return tmp_path


def test_evaluate_and_predict_with_and_without_a_clip(folders, clip, data, capsys):
    stage = RegionStage(RegionClassifier(clip, weight=1.0), TextEncoder(clip)).save(data / "region")
    found = {}
    for name, options in {"alone": [], "clip": ["--region", str(clip)], "clip only": ["--region", str(stage)]}.items():
        out = data / f"{name}.json"
        args = [str(folders["maskformer"]), "-c", str(data / "data.yaml"), "--device", "cpu", "--out", str(out), *options]
        evaluate.main(args)
        found[name] = json.loads(out.read_text())["iou"]
    masks, p = by_transformers(folders["maskformer"], "maskformer", photo())
    labels = torch.einsum("qk,qhw->khw", p[:, [6, 0]], masks).argmax(0).numpy()
    truth = [np.array(Image.open(data / "masks" / "test" / f"{name}.png")) for name in "bc"]
    for k, name in enumerate(("lawn", "wall")):
        hit = sum(((labels == k) & (t == k)).sum() for t in truth)
        union = sum(((labels == k) | (t == k)).sum() for t in truth)
        assert found["alone"][name] == pytest.approx(hit / union, abs=2e-3)
    assert found["alone"]["sky"] == 0 and found["clip only"]["sky"] > 0

    picture, out = data / "images" / "test" / "b.png", data / "out"
    args = [str(picture), "--names-from", str(data / "classes.txt"), "--out", str(out), "--device", "cpu"]
    predict.main([str(folders["maskformer"]), *args])
    assert "1 of 3 prompts are no class of this model: sky" in capsys.readouterr().err
    saved = [np.array(Image.open(out / f"b_mask_0{k}_{name}.png")) > 0 for k, name in enumerate(("lawn", "wall", "sky"))]
    assert (saved[0] != (labels == 0)).mean() < 0.01 and (saved[1] != (labels == 1)).mean() < 0.01 and not saved[2].any()
