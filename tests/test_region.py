"""The second stage: crops, pooling and the ensemble against slow loops; a Segmenter with one; folders; one-line errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import make_tiny_clip
from torch.nn import functional as F
from transformers import CLIPModel

from pmpseg import Segmenter, predict
from pmpseg.errors import InputError
from pmpseg.evaluation import Evaluator
from pmpseg.inference import ask_one_by_one, ask_together, semantic_labels, soft_masks, upsample
from pmpseg.models import PMP, Prediction, Prompts, TextEncoder
from pmpseg.models.prompts import NOT_ASKED
from pmpseg.models.region import RegionClassifier, boxes_of, cosines, ensemble
from pmpseg.region_stage import RegionStage
from pmpseg.vocabulary import Vocabulary

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)  # the tiny CLIP's


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def model(clip):
    return CLIPModel.from_pretrained(clip).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Two images of 40 x 56 with four masks each: a blob, a sliver at the edge, none at all, everything."""
    rng = torch.Generator().manual_seed(0)
    image, masks = torch.rand(2, 3, 40, 56, generator=rng), torch.rand(2, 4, 40, 56, generator=rng) * 0.4
    masks[:, 0, 10:31, 5:22] += 0.3
    masks[:, 1, :, 54:] = 0.9
    masks[:, 3] = 1
    return image, masks


def crop_by_hand(image, mask, expand=1.0, fill="mean", matting=False, threshold=0.5):
    """One region as OVSeg's text says, with numpy's nonzero and one interpolate of a cut-out."""
    ys, xs = np.nonzero((mask > threshold).numpy())
    box = []
    for values, length in ((ys, mask.shape[0]), (xs, mask.shape[1])):
        low, high = values.min(), values.max() + 1
        centre, half = (low + high) / 2, (high - low) / 2 * expand
        box.append((max(0, int(np.floor(centre - half))), min(length, int(np.ceil(centre + half)))))
    (y0, y1), (x0, x1) = box
    cut, region = image[:, y0:y1, x0:x1], mask[y0:y1, x0:x1]
    inside = (region > threshold).float()
    alpha = region if matting else inside
    background = MEAN if fill == "mean" else torch.zeros(3, 1, 1)
    filled = cut * alpha + background * (1 - alpha)
    pixels = F.interpolate(((filled - MEAN) / STD)[None], (32, 32), mode="bicubic")
    seen = np.array(Image.fromarray(inside.numpy().astype(np.uint8)))
    rows, columns = (np.arange(32) * seen.shape[i] // 32 for i in (0, 1))
    return pixels[0], torch.from_numpy(seen[rows][:, columns]) > 0


CROPS = [{}, {"expand": 1.5}, {"fill": "zero"}, {"matting": True}, {"mask_threshold": 0.35}, {"expand": 9.0, "fill": "zero"}]


@pytest.mark.parametrize("options", CROPS)
def test_crops_are_those_cut_by_hand(clip, model, options):
    image, masks = inputs()
    classifier = RegionClassifier(clip, **options)
    by_hand = {k.removeprefix("mask_"): v for k, v in options.items()}
    seen = []
    inner = classifier.embed_crops
    classifier.embed_crops = lambda pixels, regions: seen.append((pixels, regions)) or inner(pixels, regions)
    with torch.no_grad():
        found, valid = classifier.embed(image, masks)
    empty = masks.amax((2, 3)) <= options.get("mask_threshold", 0.5)
    assert torch.equal(valid, ~empty)
    pixels, regions = (torch.cat(x) for x in zip(*seen, strict=True))
    n = 0
    for b, q in [(b, q) for b in range(2) for q in range(4)]:
        if empty[b, q]:
            assert not found[b, q].any()
            continue
        wanted, region = crop_by_hand(image[b], masks[b, q], **by_hand)
        torch.testing.assert_close(pixels[n], wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(regions[n], region)
        with torch.no_grad():
            own = F.normalize(model.get_image_features(wanted[None]).pooler_output[0], dim=-1)
        torch.testing.assert_close(found[b, q], own, atol=1e-4, rtol=1e-4)
        n += 1
    assert n == len(pixels)


def test_logits_are_cosines_times_the_temperature(clip):
    image, masks = inputs()
    classifier = RegionClassifier(clip, temperature=50.0)
    names = torch.randn(1, 5, 24)
    with torch.no_grad():
        logits, valid = classifier(image, masks, names)
        regions, _ = classifier.embed(image, masks)
    assert logits.shape == (2, 4, 5) and not logits[~valid].any() and valid.sum() == 6
    wanted = 50 * F.cosine_similarity(regions[:, :, None], names[:, None], dim=-1)
    torch.testing.assert_close(logits, wanted * valid[..., None], atol=1e-4, rtol=1e-4)


def test_cosines_keep_their_bits_under_autocast(clip):
    """Two names a thousandth apart, as an open vocabulary has many: bfloat16 could not order them."""
    rng = torch.Generator().manual_seed(0)
    regions = F.normalize(torch.randn(2, 50, 24, generator=rng), dim=-1)
    names = F.normalize(torch.randn(2, 7, 24, generator=rng), dim=-1)
    wanted = (regions.double()[:, :, None] * names.double()[:, None]).sum(-1)
    image, masks = inputs()
    classifier = RegionClassifier(clip)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = cosines(regions, names)
        embedded, valid = classifier.embed(image, masks)
        logits, _ = classifier(image, masks, names)
    assert found.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=0)
    by_hand = 100 * (embedded.double()[:, :, None] * names.double()[:, None]).sum(-1)
    torch.testing.assert_close(logits[valid].double(), by_hand[valid], atol=1e-4, rtol=0)


@pytest.mark.parametrize("depth", [0, 2])
def test_chunks_change_nothing(clip, depth):
    image, masks = inputs()
    whole = RegionClassifier(clip, mask_prompt_depth=depth)
    parts = RegionClassifier(clip, mask_prompt_depth=depth, chunk=2)
    parts.load_state_dict(whole.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(parts.embed(image, masks)[0], whole.embed(image, masks)[0], atol=1e-6, rtol=1e-5)


def test_mask_prompts_are_used_in_crops(clip):
    image, masks = inputs()
    plain, prompted = RegionClassifier(clip), RegionClassifier(clip, mask_prompt_depth=3)
    with torch.no_grad():
        a, b = (c.embed(image, masks)[0] for c in (plain, prompted))
    torch.testing.assert_close(a[:, 3], b[:, 3])  # the whole image: nothing is masked
    masks[:, 0] = 0
    masks[:, 0, 0, 0] = masks[:, 0, 39, 55] = 1  # two corners: most patches are masked
    with torch.no_grad():
        a, b = (c.embed(image, masks)[0] for c in (plain, prompted))
    assert not torch.allclose(a[:, 0], b[:, 0], atol=1e-3)


def test_pooling_is_a_mean_over_patches(clip, model):
    torch.manual_seed(0)
    image, masks = torch.rand(2, 3, 32, 48), torch.rand(2, 3, 32, 48)
    masks[:, 1] = 0
    masks[0, 2], masks[1, 2] = 0, 0
    masks[0, 2, 3, 9] = masks[1, 2, 31, 47] = 1  # single pixels count as much as their patch
    classifier = RegionClassifier(clip, mode="pool")
    calls = []
    classifier.vision.register_forward_hook(lambda *_: calls.append("whole"))
    classifier.vision.vision_model.register_forward_hook(lambda *_: calls.append("tower"))
    with torch.no_grad():
        found, valid = classifier.embed(image, masks)
        states = model.vision_model((image - MEAN) / STD, interpolate_pos_encoding=True).last_hidden_state
        dense = model.visual_projection(model.vision_model.post_layernorm(states))[:, 1:]
    assert calls == ["tower"]  # one pass for all masks
    assert valid.tolist() == [[True, False, True]] * 2 and not found[:, 1].any()
    for b in range(2):
        for q in (0, 2):
            total = torch.zeros(24)
            for y in range(4):
                for x in range(6):
                    covered = (masks[b, q, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] > 0.5).float().mean()
                    total += covered * dense[b, 6 * y + x]
            torch.testing.assert_close(found[b, q], total / total.norm(), atol=1e-4, rtol=1e-4)


def test_pooling_reads_images_of_any_size(clip):
    classifier = RegionClassifier(clip, mode="pool", pool_size=64)
    assert classifier.dense(torch.rand(1, 3, 50, 75)).shape == (1, 24, 8, 12)
    assert RegionClassifier(clip, mode="pool").dense(torch.rand(1, 3, 5, 200)).shape == (1, 24, 4, 160)


def test_boxes_by_loop():
    masks = torch.rand(30, 17, 23) > 0.98
    masks[:, 4, 5] = True
    for mask, box in zip(masks, boxes_of(masks).tolist(), strict=True):
        ys, xs = np.nonzero(mask.numpy())
        assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


# ---- the ensemble


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7, 1.0])
def test_ensemble_by_loop(weight):
    torch.manual_seed(0)
    first, region, valid = torch.randn(2, 4, 4) * 3, torch.randn(2, 4, 3) * 3, torch.rand(2, 4) > 0.4
    found = ensemble(first, region, valid, weight)
    assert valid.any() and not valid.all()
    for b, q, k in np.ndindex(2, 4, 3):
        p = (first[b, q, k].exp() / first[b, q].exp().sum()).item()
        phat = (region[b, q, k].exp() / region[b, q].exp().sum()).item() if valid[b, q] else 1.0
        wanted = p ** (1 - weight) * phat**weight
        if weight == 1 and not valid[b, q]:
            wanted = 0.0  # CLIP only: what it cannot see is dropped
        assert found[b, q, k].item() == pytest.approx(wanted, rel=1e-4)


def test_ensemble_leaves_out_what_is_not_asked_and_drops_the_contrast():
    torch.manual_seed(0)
    first, region, valid = torch.randn(1, 3, 4), torch.randn(1, 3, 5), torch.ones(1, 3, dtype=torch.bool)
    first[..., 2] = NOT_ASKED  # padding
    first[0, 1, 0] = NOT_ASKED  # asked of the other queries only
    for weight in (0.7, 1.0):
        found = ensemble(first, region, valid, weight)
        assert found.shape == (1, 3, 3) and not found[..., 2].any() and found[0, 1, 0] == 0
        phat = region[0, 0, [0, 1, 3, 4]].softmax(0)  # without the padding, with both contrasts
        p = first[0, 0, [0, 1, 3]].softmax(0)
        torch.testing.assert_close(found[0, 0, 0], p[0] ** (1 - weight) * phat[0] ** weight)


def test_probabilities_are_fused_ones_where_there_are():
    masks, classes = torch.randn(1, 2, 8, 8), torch.randn(1, 2, 4)
    plain = Prediction(masks, classes)
    assert torch.equal(plain.probabilities(), classes.softmax(-1)[..., :-1])
    fused = plain._replace(fused=torch.tensor([[[0.0, 0.9, 0.0], [0.0, 0.8, 0.1]]]))
    assert (semantic_labels(fused, (32, 32)) == 1).all()
    torch.testing.assert_close(soft_masks(fused)[1], torch.tensor([[0.0, 0.9, 0.1]]))


# ---- in use


def make_segmenter(clip, region=None) -> Segmenter:
    torch.manual_seed(0)
    text = TextEncoder(clip)
    small = {"dim": 32, "num_queries": 6, "num_layers": 2, "num_heads": 4, "ffn_dim": 32}
    network = PMP(text_dim=text.dim, backbone="clip", backbone_weights=str(clip), **small)
    words = [["red circle", "circle"], ["grass"], ["square"]]
    return Segmenter(network, text, Vocabulary([w[0] for w in words], words), 64, 0.3, region=region)


def stage(clip, text=None, **options) -> RegionStage:
    return RegionStage(RegionClassifier(clip, **options), text or TextEncoder(clip), ("others", "a cat"))


def photo(height: int = 60, width: int = 80) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("options", [{}, {"mode": "pool"}, {"mask_prompt_depth": 2, "weight": 1.0}])
def test_asked_together_is_the_ensemble(clip, options):
    own = stage(clip, **options)
    segmenter = make_segmenter(clip)
    image = torch.rand(2, 3, 64, 96)
    prompts, words = segmenter.text.encode(["grass", "red circle"]), ["grass", "red circle"]
    with torch.no_grad():
        features = segmenter.network.encode(image)
        plain = segmenter.network.decode(features, prompts)
        found = ask_together(segmenter.network, features, prompts, own.ask(image, words))
        masks = upsample(plain.mask_logits.sigmoid(), (64, 96))
        region, valid = own.classifier(image, masks, own.text.encode(words).pooled)
    wanted = ensemble(plain.class_logits, region, valid, own.classifier.weight)
    torch.testing.assert_close(found.fused, wanted)
    assert torch.equal(found.class_logits, plain.class_logits)
    assert ask_together(segmenter.network, features, prompts).fused is None


def test_a_list_of_one_meets_the_contrast(clip):
    """A softmax over a single name is 1 whatever the region shows, and with weight 1 would be the score of all of them."""
    own, segmenter = stage(clip, weight=1.0), make_segmenter(clip)
    image, prompts = torch.rand(2, 3, 64, 96), segmenter.text.encode(["grass"])
    with torch.no_grad():
        features = segmenter.network.encode(image)
        found = ask_together(segmenter.network, features, prompts, own.ask(image, ["grass"])).fused
        masks = upsample(segmenter.network.decode(features, prompts).mask_logits.sigmoid(), (64, 96))
        regions, valid = own.classifier.embed(image, masks)
        phat = (100 * regions @ own.text.encode(["grass", "others", "a cat"]).pooled[0].T).softmax(-1)[..., :1]
    assert valid.any() and found.shape == phat.shape and (found[valid] < 0.999).all()
    torch.testing.assert_close(found, phat * valid[..., None], atol=1e-5, rtol=1e-4)


def test_asked_alone_each_prompt_meets_the_contrast(clip):
    own, segmenter = stage(clip), make_segmenter(clip)
    image, words = torch.rand(2, 3, 64, 96), ["grass", "red circle"]
    prompts = segmenter.text.encode(words).expand(2)
    with torch.no_grad():
        features = segmenter.network.encode(image)
        masks, scores = ask_one_by_one(segmenter.network, features, prompts, regions=own.ask(image, words))
        for k, word in enumerate(words):
            one = segmenter.network.decode(features, prompts.select([k]))
            regions = upsample(one.mask_logits.sigmoid(), (64, 96))
            logits, valid = own.classifier(image, regions, own.text.encode([word, "others", "a cat"]).pooled)
            fused = ensemble(one.class_logits, logits, valid, 0.7)
            alone, score = soft_masks(one._replace(fused=fused))
            torch.testing.assert_close(masks[:, k], alone[:, 0])
            torch.testing.assert_close(scores[:, k], score[:, 0])


def test_a_segmenter_with_a_region_stage(clip, tmp_path):
    plain, region = make_segmenter(clip), make_segmenter(clip, stage(clip, mask_prompt_depth=2))
    for together in (False, True):
        a, b = (s.segment(photo(), ["grass", "red circle"], together=together) for s in (plain, region))
        assert b.labels.shape == (60, 80) and not np.allclose(a.scores, b.scores, atol=1e-3)
        again = Segmenter.load(region.save(tmp_path / "model")).segment(photo(), ["grass", "red circle"], together=together)
        assert np.array_equal(again.scores, b.scores) and torch.equal(again.soft, b.soft)
    assert Segmenter.load(plain.save(tmp_path / "model")).region is None  # replaced, nothing left over
    answer = region.segment(np.zeros((3, 50, 3), np.uint8), ["grass"])
    assert answer.mask(0).shape == (3, 50) and np.isfinite(answer.scores).all()


def test_a_shared_text_encoder_is_saved_once(clip, tmp_path):
    segmenter = make_segmenter(clip)
    segmenter.region = stage(clip, segmenter.text)
    folder = segmenter.save(tmp_path / "model")
    assert (folder / "text_encoder").is_dir() and not (folder / "region" / "text_encoder").exists()
    loaded = Segmenter.load(folder)
    assert loaded.region.text is loaded.text and loaded.region.contrast == ("others", "a cat")
    with pytest.raises(InputError, match="has its text encoder in the model around it"):
        RegionStage.load(folder / "region")


def test_a_region_model_comes_back_bit_for_bit(clip, tmp_path):
    first = stage(clip, mask_prompt_depth=3, weight=0.6, fill="zero")
    image, masks = inputs()
    names = torch.randn(1, 2, 24)
    for _ in range(2):  # the second save replaces the first
        folder = first.save(tmp_path / "region")
    assert json.loads(json.dumps(first.classifier.config)) == first.classifier.config
    second = RegionStage.load(folder)
    assert second.classifier.config == first.classifier.config and second.contrast == first.contrast
    with torch.no_grad():
        assert torch.equal(first.classifier(image, masks, names)[0], second.classifier(image, masks, names)[0])
    assert RegionStage.load(tmp_path / "region").text.templates == ("{}",)


def test_a_clip_folder_is_a_region_model_as_it_is(clip):
    own = RegionStage.load(clip)
    assert own.classifier.prompts.depth == 0 and own.contrast == ("others",) and own.classifier.weight == 0.7


def test_the_evaluator_uses_it(clip):
    segmenter, own = make_segmenter(clip), stage(clip, weight=1.0)
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 3, (2, 64, 64)))
    batch = {"image": torch.from_numpy(rng.integers(0, 255, (2, 3, 64, 64), dtype=np.uint8)), "labels": labels}
    batch |= {"prompts": [["red circle", "grass", ""], ["square", "", ""]], "prompt_masks": torch.rand(2, 3, 64, 64) > 0.5}
    scores = []
    for region in (None, own):
        evaluator = Evaluator(segmenter.vocabulary, threshold=0.2)
        evaluator.update(segmenter.network, segmenter.text, batch, region)
        scores.append(evaluator.compute())
    image = batch["image"].float() / 255
    with torch.no_grad():
        words = segmenter.vocabulary.synonyms
        features = segmenter.network.encode(image)
        found = ask_together(segmenter.network, features, segmenter.text.encode(words), own.ask(image, words))
    right = [((semantic_labels(found, (64, 64)) == c) & (labels == c)).sum() for c in range(3)]
    either = [((semantic_labels(found, (64, 64)) == c) | (labels == c)).sum() for c in range(3)]
    torch.testing.assert_close(scores[1]["iou"].float(), torch.stack(right) / torch.stack(either))
    assert scores[0]["phrase_iou_with_absent"] != scores[1]["phrase_iou_with_absent"]


def test_predict_takes_a_second_stage(clip, tmp_path):
    make_segmenter(clip).save(tmp_path / "model")
    Image.fromarray(photo()).save(tmp_path / "a.png")
    region = stage(clip, weight=1.0).save(tmp_path / "region")
    scores = []
    for options in ([], ["--region", str(clip)], ["--region", str(region)]):
        asked = ["--prompts", "grass", "--out", str(tmp_path / "out"), "--device", "cpu", "--threshold", "0"]
        predict.main([str(tmp_path / "model"), str(tmp_path / "a.png"), *asked, *options])
        scores.append(json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"][0]["score"])
    assert len({round(score, 4) for score in scores}) == 3


def test_each_noun_gets_the_region_its_clip_likes_best(clip):
    image, masks = inputs()
    own = stage(clip)
    with torch.no_grad():
        regions, _ = own.classifier.embed(image[:1], masks[:1])
        cosines = own.text.encode(["grass", "circle"]).pooled[0] @ regions[0].T
    cosines[:, 2] = -2
    best, index = own.best_regions(image[0], masks[0], ["grass", "circle"])
    torch.testing.assert_close(best, cosines.amax(1))
    assert index.tolist() == cosines.argmax(1).tolist()
    assert own.best_regions(image[0], masks[0, 2:3], ["grass"])[1].tolist() == [-1]


# ---- one line each


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "crops"}, "mode: got 'crops', want one of crop, pool"),
        ({"fill": "blur"}, "fill: got 'blur'"),
        ({"weight": 1.5}, "weight: got 1.5, want 0 to 1"),
        ({"chunk": 0}, "chunk: got 0"),
        ({"expand": 0.5}, "expand: got 0.5"),
        ({"mask_prompt_depth": 9}, "got 9, want at most 4"),
        ({"mode": "pool", "mask_prompt_depth": 1}, "mode 'pool' cuts nothing out"),
    ],
)
def test_options_that_make_no_sense(clip, options, message):
    with pytest.raises(InputError, match=message) as caught:
        RegionClassifier(clip, **options)
    assert "\n" not in str(caught.value)


def test_what_is_no_clip(clip, tmp_path):
    with pytest.raises(InputError, match="cannot open"):
        RegionClassifier(tmp_path / "nowhere")
    with pytest.raises(InputError, match="wants a CLIP"):
        RegionClassifier()
    with pytest.raises(InputError, match="names have width 8, this CLIP's embeddings have 24"):
        RegionClassifier(clip)(*inputs(), torch.zeros(1, 2, 8))
    with pytest.raises(InputError, match="width 128"):
        RegionStage(RegionClassifier(clip), RegionStage.load("tiny_clip").text)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError):
        RegionStage.load(tmp_path)
    with pytest.raises(InputError, match="is no region model"):
        stage(clip).save(tmp_path)


def test_broken_region_folders(clip, tmp_path):
    folder = stage(clip).save(tmp_path / "region")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        RegionStage.load(folder)
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"network": {"mode": "crop", "what": 1}}))
    with pytest.raises(InputError, match="does not describe a region model"):
        RegionStage.load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "text_encoder").rename(folder / "gone")
    with pytest.raises(InputError, match="the region model is not whole"):
        RegionStage.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": {}}, "config.json: text: got {}, want null, or a list of templates"),
        ({"text": 5}, "config.json: text: got 5"),
        ({"text": {"templates": [1], "normalize": True}}, r"config.json: text: got {'templates': \[1\]"),
        ({"text": {"templates": ["a photo"], "normalize": True}}, "got templates"),
        ({"contrast": 5}, "contrast: got 5, want a list"),
        ({"contrast": [1]}, r"contrast: got \[1\], want a list"),
        ({"contrast": []}, r"contrast: got \[\], want a list"),
        ({"contrast": "others"}, "contrast: got 'others', want a list"),
        ({"contrast": [" "]}, r"contrast: got \[' '\], want a list"),
        ({"network": 5}, "config.json: 'network' does not describe a region model"),
        ({"network": {"weight": 9}}, "config.json: weight: got 9"),
        ({"network": {"weight": "a"}}, "config.json: 'network' does not describe a region model"),
        ({"vision": {"hidden_size": 131}}, r"config.json: 'network' does not describe a region model .*131"),
        ({"vision": {"hidden_size": "wide"}}, "config.json: 'network' does not describe a region model"),
        ({"vision": {"patch_size": 0}}, "config.json: 'network' does not describe a region model"),
        ({"vision": 5}, "config.json: 'network' does not describe a region model"),
    ],
)
def test_broken_configs_are_one_line(clip, tmp_path, change, message):
    folder = stage(clip).save(tmp_path / "region")
    config = json.loads((folder / "config.json").read_text())
    network = config["network"]
    if "vision" in change:
        vision = change["vision"]
        own = network["clip_config"]
        changed = own | {"vision": own["vision"] | vision if isinstance(vision, dict) else vision}
        change = {"network": network | {"clip_config": changed}}
    elif isinstance(change.get("network"), dict):
        change = {"network": network | change["network"]}
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message) as caught:
        RegionStage.load(folder)
    assert "\n" not in str(caught.value)


def test_prompts_that_are_padding_get_nothing(clip):
    own, segmenter = stage(clip), make_segmenter(clip)
    one = segmenter.text.encode(["grass", "square"])
    prompts = Prompts(one.tokens, one.token_valid, one.pooled, torch.tensor([[True, False]]))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = ask_together(segmenter.network, segmenter.network.encode(image), prompts, own.ask(image, ["grass", "square"]))
    assert not found.fused[..., 1].any() and found.fused[..., 0].any()
