"""Segmenter: any image in, masks of its own size out; folders that load elsewhere; clear errors for broken ones."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import make_tiny_clip

from pmpseg import Segmenter, hub, inference, rle
from pmpseg.errors import InputError
from pmpseg.evaluation import Evaluator
from pmpseg.models import PMP, TextEncoder
from pmpseg.segmenter import NOTHING
from pmpseg.storage import weights_hash
from pmpseg.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    make_tiny_clip(folder)
    return folder


def make_segmenter(clip, words=(["red circle"], ["grass"]), frozen=False, **options):
    torch.manual_seed(0)
    text = TextEncoder(clip)
    small = {"dim": 32, "num_queries": 6, "num_layers": 2, "num_heads": 4, "ffn_dim": 32}
    network = PMP(text_dim=text.dim, backbone="clip", backbone_weights=str(clip), backbone_frozen=frozen, **small)
    return Segmenter(network, text, Vocabulary([w[0] for w in words], list(words)), 64, 0.3, **options)


@pytest.fixture(scope="module")
def segmenter(clip):
    return make_segmenter(clip)


@pytest.fixture
def saved(segmenter, tmp_path):
    return segmenter.save(tmp_path / "model")


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(64, 64), (90, 50), (33, 200), (1, 1), (7, 300)])
def test_answers_have_the_images_own_size(segmenter, size):
    answer = segmenter.segment(noise(*size), ["red circle", "grass", "sky"])
    assert answer.labels.shape == size and answer.mask(2).shape == size and answer.mask(0).dtype == bool
    assert answer.scores.shape == (3,) and (answer.scores >= 0).all() and (answer.scores <= 1).all()
    assert set(np.unique(answer.labels)) <= {NOTHING, 0, 1, 2}


def test_labels_follow_from_the_masks(segmenter):
    answer = segmenter.segment(noise(60, 80), ["red circle", "grass"], threshold=0.0)
    soft = np.stack([answer.probability(0), answer.probability(1)])
    inside = soft > 0.5 * answer.scores[:, None, None]
    assert np.array_equal(answer.mask(0), inside[0]) and inside.any()
    expected = np.where(inside.any(0), (soft * inside).argmax(0), NOTHING)
    assert np.array_equal(answer.labels, expected)


def test_the_threshold_decides_whether_and_not_where(segmenter):
    image = noise(60, 80)
    score = float(segmenter.segment(image, ["grass"]).scores[0])
    below, above = (segmenter.segment(image, ["grass"], threshold=t).mask(0) for t in (score / 2, score + 0.01))
    assert np.array_equal(below, segmenter.segment(image, ["grass"], threshold=0.0).mask(0)) and below.any()
    assert not above.any()


def test_every_kind_of_image_is_the_same_image(segmenter, tmp_path):
    array = noise(40, 50)
    picture = Image.fromarray(array)
    picture.save(tmp_path / "a.png")
    images = (array, array / 255.0, picture, str(tmp_path / "a.png"), tmp_path / "a.png")
    answers = [segmenter.segment(x, ["grass"]).probability(0) for x in images]
    for other in answers[1:]:
        assert np.allclose(answers[0], other, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16", "LA", "F"])
def test_modes(segmenter, mode):
    picture = Image.fromarray(noise(20, 30))
    if mode == "I;16":
        picture = Image.fromarray(noise(20, 30)[..., 0].astype(np.uint16) * 257)
    elif mode == "F":
        picture = Image.fromarray((noise(20, 30)[..., 0] / 255).astype(np.float32))
    else:
        picture = picture.convert(mode)
    assert segmenter.segment(picture, ["grass"]).labels.shape == (20, 30)


def test_sixteen_bits_look_like_eight(segmenter):
    grey = noise(20, 30)[..., 0]
    a = segmenter.segment(grey, ["grass"]).probability(0)
    b = segmenter.segment(Image.fromarray(grey.astype(np.uint16) * 257), ["grass"]).probability(0)
    assert np.allclose(a, b, atol=1e-5)


def test_prompts_alone_do_not_see_each_other_and_together_they_may(segmenter):
    image = noise(64, 64)
    one = segmenter.segment(image, ["grass"]).probability(0)
    assert np.allclose(one, segmenter.segment(image, ["red circle", "grass", "sky"]).probability(1), atol=1e-5)
    together = segmenter.segment(image, ["red circle", "grass", "sky"], together=True)
    assert not np.allclose(one, together.probability(1), atol=1e-5)
    assert set(np.unique(together.labels)) <= {0, 1, 2}


def test_an_elongated_image_is_squeezed_for_the_network(segmenter, monkeypatch):
    encode, seen = segmenter.network.encode, []
    monkeypatch.setattr(segmenter.network, "encode", lambda image: seen.append(tuple(image.shape[-2:])) or encode(image))
    assert segmenter.segment(noise(2, 4000), ["grass"]).mask(0).shape == (2, 4000)
    segmenter.segment(noise(200, 50), ["grass"])
    assert seen == [(64, 512), (256, 64)]


def test_masks_of_prompts_asked_together_are_the_labels(segmenter, monkeypatch):
    decode, calls = segmenter.network.decode, []
    monkeypatch.setattr(segmenter.network, "decode", lambda *asked: calls.append(1) or decode(*asked))
    answer = segmenter.segment(noise(50, 70), ["red circle", "grass", "sky"], together=True)
    assert len(calls) == 1
    masks = np.stack([answer.mask(i) for i in range(3)])
    assert (masks.sum(0) == 1).all() and np.array_equal(masks.argmax(0), answer.labels)
    assert np.array_equal(answer.mask(-1), masks[2])
    assert [found["area"] for found in answer.to_coco()] == masks.sum((1, 2)).tolist()


def test_the_name_of_a_class_stands_for_its_synonyms(clip, segmenter):
    other = make_segmenter(clip, (["red circle", "square"], ["grass", "red"]))
    image = noise(64, 64)
    for prompt, same in (("grass", False), ("red", True), ("a ring", True)):
        a, b = (s.segment(image, [prompt]).probability(0) for s in (segmenter, other))
        assert np.allclose(a, b, atol=1e-6) == same
    assert np.array_equal(other.segment(image, [" grass "]).soft, other.segment(image, ["grass"]).soft)


@pytest.mark.parametrize("asked", ["class list", "phrases"])
def test_evaluation_asks_as_segment_does(clip, asked):
    segmenter = make_segmenter(clip, (["red circle", "square"], ["grass", "red"]))
    names, image = segmenter.vocabulary.names, noise(64, 64)
    prompts = names if asked == "class list" else ["grass", "a ring", "", "red circle"]
    real = [p for p in prompts if p]
    answer = segmenter.segment(image, real, threshold=0.05, together=asked == "class list")
    soft = np.stack([answer.probability(real.index(p)) if p else np.zeros((64, 64)) for p in prompts])
    scores = np.array([answer.scores[real.index(p)] if p else 0 for p in prompts])
    masks = inference.answers(torch.from_numpy(soft), torch.from_numpy(scores)) > 0.05
    batch = {
        "image": torch.from_numpy(image).permute(2, 0, 1)[None],
        "labels": torch.from_numpy(segmenter.segment(image, names, together=True).labels)[None],
        "prompts": [prompts],
        "prompt_masks": masks[None],
    }
    evaluator = Evaluator(segmenter.vocabulary, threshold=0.05)
    evaluator.update(segmenter.network, segmenter.text, batch)
    scores = evaluator.compute()
    assert scores["pixel_accuracy"] == 1 and scores["phrase_iou_with_absent"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 4, 5)), r"got an array \(3, 4, 5\)"),
        (np.full((4, 4, 3), 2.0), "outside"),
        (np.full((4, 4, 3), np.nan), "outside"),
        (np.zeros((4, 4, 3), np.int32), "int32"),
        ("nowhere.jpg", "nowhere.jpg: no such image"),
    ],
)
def test_bad_images(segmenter, image, message):
    with pytest.raises(InputError, match=message):
        segmenter.segment(image, ["grass"])


@pytest.mark.parametrize("prompts", [[], ["grass", " "], ""])
def test_bad_prompts(segmenter, prompts):
    with pytest.raises(InputError, match="prompt"):
        segmenter.segment(noise(8, 8), prompts)


def test_corrupt_file_is_named(segmenter, tmp_path):
    path = tmp_path / "broken.png"
    Image.fromarray(noise(40, 40)).save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"broken\.png: cannot be read"):
        segmenter.segment(path, ["grass"])


def test_coco_output_decodes_to_the_masks(segmenter):
    answer = segmenter.segment(noise(30, 41), ["red circle", "grass"], threshold=0.02)
    for i, found in enumerate(answer.to_coco()):
        mask = answer.mask(i)
        assert np.array_equal(rle.decode(found["segmentation"]), mask) and found["area"] == mask.sum()
        if mask.any():
            x, y, w, h = found["bbox"]
            assert mask[y : y + h, x : x + w].sum() == mask.sum() and mask[y].any() and mask[:, x + w - 1].any()
    assert json.dumps(answer.to_coco())


def test_overlay_is_a_picture(segmenter):
    assert segmenter.segment(noise(30, 41), ["red circle"]).overlay().mode == "RGB"


def test_a_saved_model_answers_the_same_elsewhere(segmenter, saved, tmp_path):
    moved = tmp_path / "elsewhere"
    saved.rename(moved)
    other = Segmenter.load(moved)
    a, b = (s.segment(noise(50, 60), ["grass", "a blue ring"]) for s in (segmenter, other))
    assert np.allclose(a.probability(1), b.probability(1), atol=1e-6)
    assert other.vocabulary == segmenter.vocabulary and other.threshold == 0.3 and other.image_size == 64
    assert {p.name for p in moved.iterdir()} == {"config.json", "model.safetensors", "vocabulary.txt", "text_encoder"}


def test_saving_over_a_model_leaves_one_whole_model(segmenter, saved):
    segmenter.save(saved)
    assert Segmenter.load(saved).image_size == 64
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_only_models_and_empty_folders_are_replaced(segmenter, saved, tmp_path):
    (tmp_path / "empty").mkdir()
    assert Segmenter.load(segmenter.save(tmp_path / "empty")).image_size == 64
    (tmp_path / "thesis").mkdir()
    for name in ("chapter1.tex", "config.json"):  # not every config.json is ours
        (tmp_path / "thesis" / name).write_text("{}")
        with pytest.raises(InputError, match="thesis exists and is no model: give a new or an empty folder"):
            segmenter.save(tmp_path / "thesis")
    with pytest.raises(InputError, match="exists and is no model"):
        segmenter.save(tmp_path / "thesis" / "chapter1.tex")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "{}"


def test_a_frozen_backbone_by_reference(clip, tmp_path, monkeypatch):
    monkeypatch.setitem(hub._SHIPPED, "tiny_clip", clip)
    segmenter = make_segmenter(clip, frozen=True, backbone_weights="tiny_clip")
    folder = segmenter.save(tmp_path / "small", encoders="reference")
    config = json.loads((folder / "config.json").read_text())
    assert config["text"]["name"] == config["backbone_weights"]["name"] == "tiny_clip"
    assert str(clip) not in json.dumps(config)
    stored = load_file(folder / "model.safetensors")
    assert not [k for k in stored if ".tower." in k] and any(".pyramid." in k for k in stored)
    other = Segmenter.load(folder)
    state = other.network.state_dict()
    assert all(torch.equal(state[k], v) for k, v in segmenter.network.state_dict().items())
    again = other.save(tmp_path / "again", encoders="reference")
    assert json.loads((again / "config.json").read_text()) == config

    config["backbone_weights"]["sha256"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="backbone tiny_clip: its weights are not those that the model was trained with"):
        Segmenter.load(folder)


@pytest.mark.parametrize("options", [{"frozen": True}, {"frozen": False, "backbone_weights": "x"}])
def test_a_backbone_that_cannot_be_found_again_is_kept(clip, tmp_path, options):
    folder = make_segmenter(clip, **options).save(tmp_path / "small", encoders="reference")
    assert any(".tower." in k for k in load_file(folder / "model.safetensors"))
    assert Segmenter.load(folder).image_size == 64


def test_encoders_by_reference(segmenter, clip, tmp_path):
    folder = segmenter.save(tmp_path / "small", encoders="reference")
    assert not (folder / "text_encoder").exists()
    assert weights_hash(Segmenter.load(folder).text) == weights_hash(segmenter.text)
    config = json.loads((folder / "config.json").read_text())
    config["text"]["sha256"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="not those that the model was trained with"):
        Segmenter.load(folder)


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _nan(folder):
    state = load_file(folder / "model.safetensors")
    state["query_decoder.query"][0, 0] = float("nan")
    save_file(state, folder / "model.safetensors")


def _foreign(folder):
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")


def _config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, r"model\.safetensors: not a whole safetensors file"),
        (_nan, "query_decoder.query.*NaN"),
        (_foreign, "do not fit the network"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04not a tensor"), "not a whole safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), "no such file"),
        (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
        (lambda f: (f / "config.json").unlink(), r"no config\.json"),
        (_config(architecture="Other"), "not the config of a pmpseg model"),
        (_config(network={"depth": 3}), "does not describe a PMP"),
    ],
)
def test_broken_folders(saved, damage, message):
    damage(saved)
    with pytest.raises(InputError, match=message):
        Segmenter.load(saved)


def test_the_folder_of_a_run_is_no_model(saved):
    with pytest.raises(InputError, match=r"is the folder of a run: give its model, .*model$"):
        Segmenter.load(saved.parent)


def test_missing_folder():
    with pytest.raises(InputError, match="no such folder"):
        Segmenter.load("runs/nowhere/model")


def test_panoptic_maps_have_the_images_size_and_name_their_segments(clip):
    segmenter = make_segmenter(clip)
    head = segmenter.network.query_decoder.name_head[-1]
    with torch.no_grad():  # every query is grass
        head.weight.zero_()
        head.bias.copy_(segmenter.text.encode(["grass"]).pooled[0, 0])
    image, prompts = noise(50, 70), ["red circle", "grass", "sky"]
    ids, segments = segmenter.panoptic(image, prompts, threshold=0.0, overlap=0.0)
    assert ids.shape == (50, 70) and ids.dtype == np.int32
    assert [(s.id, s.label) for s in segments] == [(1, 1)] and set(np.unique(ids)) == {0, 1}
    apart, segments = segmenter.panoptic(image, prompts, ["grass"], threshold=0.0, overlap=0.0)
    assert len(segments) > 1 and {s.label for s in segments} == {1} and np.array_equal(apart > 0, ids > 0)
    assert not segmenter.panoptic(image, prompts, threshold=1.0)[0].any()
    with pytest.raises(InputError, match="things: got 'dog', want some of the prompts: grass, sky"):
        segmenter.panoptic(image, ["grass", "sky"], ["dog"])
    assert segmenter.panoptic(image, "grass")[0].shape == (50, 70)  # one prompt, and not five letters
    with pytest.raises(InputError, match=r"prompts: got .*, want a string or a list of strings"):
        segmenter.panoptic(image, ["grass", 3])
    with pytest.raises(InputError, match="overlap: got 2, want 0 to 1"):
        segmenter.panoptic(image, ["grass"], overlap=2)
