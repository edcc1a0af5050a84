"""CLIPSeg's protocols from a YAML to the numbers, with a tiny CLIPSeg: the numbers computed again from the network's logits."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from phrasecut_fixture import write_phrasecut
from tiny_clipseg import write_clipseg
from torch.nn import functional as F
from voc_fixture import make_voc

from pmpseg import evaluate
from pmpseg.data import Pascal5i, PascalZeroShot, PhraseCut
from pmpseg.data.base import collate
from pmpseg.errors import InputError
from pmpseg.evaluation import Evaluator, numbers
from pmpseg.models import PMP
from pmpseg.report import table
from pmpseg.segmenter import Segmenter
from pmpseg.supports import PromptForm, Showing
from pmpseg.visual_prompts import visual_prompt

pytestmark = pytest.mark.filterwarnings("ignore:prompt .* cut off")  # the tiny CLIP reads 16 tokens
CONFIGS = Path(__file__).parents[1] / "conf" / "eval"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of random weights, but its prompts have a say: it answers otherwise to each."""
    folder = tmp_path_factory.mktemp("clipseg")
    model = write_clipseg(folder)
    for layer in model.decoder.reduces[1:]:
        layer.weight.data *= 0.05  # of the blocks that the prompt has no part in
    model.decoder.film_add.weight.data *= 3
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def segmenter(folder):
    return Segmenter.load(folder)


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return make_voc(tmp_path_factory.mktemp("voc"), ("SegmentationClass", "SegmentationClassAug"))


def sigmoids(segmenter, image, embeddings, size):
    """(P, H, W) of one image (3, h, w) uint8, from ``forward``."""
    with torch.no_grad():
        logits = segmenter.network(image[None].float() / 255, embeddings)
    return F.interpolate(logits.sigmoid(), size, mode="bilinear", align_corners=False)[0]


def words(segmenter, prompts):
    return segmenter.text.encode(prompts).pooled[0]


def paper_numbers(found, data):
    """mIoU by class, IoU_FG and IoU_BIN at 0.3 of [(scores, item)], in plain numpy."""
    tp, fp, fn, tn = (np.zeros(20) for _ in range(4))
    for scores, item in found:
        keep, label = item["labels"].numpy() != 255, int(item["phrase_class"])
        answer, truth = scores.numpy()[keep] > np.float32(0.3), item["labels"].numpy()[keep] == 1
        tp[label] += (answer & truth).sum()
        fp[label] += (answer & ~truth).sum()
        fn[label] += (~answer & truth).sum()
        tn[label] += (~answer & ~truth).sum()
    asked = tp + fp + fn + tn > 0
    fg = tp.sum() / (1 + tp.sum() + fp.sum() + fn.sum())
    background = tn.sum() / (1 + tn.sum() + fp.sum() + fn.sum())
    miou = (tp / (1 + tp + fp + fn))[asked].mean()
    return {"clipseg_miou@0.3": miou, "clipseg_iou_fg@0.3": fg, "clipseg_iou_bin@0.3": (fg + background) / 2}


@pytest.mark.parametrize("form", ["text", "image", "mixed"])
def test_one_shot_from_yaml_to_numbers(segmenter, folder, voc, tmp_path, form, capsys):
    options = {"shots": 2, "image_size": 64, "num_workers": 0, "template": "{label}"}
    spec = {"class_path": "pmpseg.data.Pascal5i", "init_args": {"root": str(voc), **options}}
    (tmp_path / "eval.yaml").write_text(json.dumps({"data": spec}))
    out = tmp_path / "scores.json"
    args = [str(folder), "-c", str(tmp_path / "eval.yaml"), "--out", str(out), "--prompt-form", form, "--device", "cpu"]
    got = evaluate.main(args + ["--text-weight", "0.25"] * (form == "mixed"))
    data = Pascal5i(str(voc), **options)
    found, without = [], 0
    for index in range(5):
        item = data.dataset("test")[index]
        asked = words(segmenter, item["prompts"])
        valid = item["support_valid"][0]
        without += not valid.any()
        if form != "text" and valid.any():
            with torch.no_grad():
                mean = segmenter.network.mean.flatten().tolist()  # a folder of transformers' is shown examples as the paper does
                shown = visual_prompt(item["support_image"][0][valid] / 255, item["support_mask"][0][valid], size=64, mean=mean)
                mean = torch.stack([segmenter.network.embed(one[None])[0] for one in shown]).mean(0)
            asked = mean[None] if form == "image" else 0.25 * asked + 0.75 * mean
        if form == "text" or valid.any():  # what has no example is left out where examples are asked with
            found.append((sigmoids(segmenter, item["image"], asked, item["labels"].shape)[0], item))
    for name, value in paper_numbers(found, data).items():
        assert got[name] == pytest.approx(value, abs=2e-4), name  # a pixel at the threshold may fall either way
    assert {"clipseg_ap", "clipseg_miou@best", "phrase_iou", "phrase_iou_large"} <= got.keys() and "miou" not in got
    saved, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert saved["prompt_form"] == form and "iou" not in saved and len(saved["clipseg_curve"]["miou"]) == 49
    assert saved.get("phrase_n_without_support") == (None if form == "text" else without) and without == 1
    assert ("1 phrases have no support image" in printed) == (form != "text") and "clipseg_miou@0.3" in printed
    assert saved.get("text_weight") == (0.25 if form == "mixed" else None)


def test_phrasecut(segmenter, tmp_path):
    """Each phrase is a class by itself, at its own size, and labels of 255 mean nothing."""
    data = PhraseCut(str(write_phrasecut(tmp_path / "pc", scenes=6)), image_size=64, num_workers=0)
    dataset, ious = data.dataset("test"), []
    for item in (dataset[i] for i in range(len(dataset))):
        found = sigmoids(segmenter, item["image"], words(segmenter, item["prompts"]), item["labels"].shape)
        for scores, truth in zip(found.numpy(), item["prompt_masks"].numpy(), strict=True):
            answer = scores > np.float32(0.3)
            ious.append((answer & truth).sum() / (1 + (answer | truth).sum()))
    scores = evaluate.evaluate(segmenter, data)
    assert len(ious) > 4 and scores["clipseg_miou@0.3"] == pytest.approx(np.mean(ious), abs=2e-4)
    assert "miou" not in scores and scores["phrase_n_relation"] > 0


def test_analysis(segmenter, folder, voc, tmp_path, capsys):
    """Tables of a model folder and a config; the IoUs computed again."""
    script = runpy.run_path(str(CONFIGS.parents[1] / "scripts" / "clipseg_analysis.py"))
    spec = {"class_path": "pmpseg.data.Pascal5i", "init_args": {"root": str(voc), "image_size": 64, "num_workers": 0}}
    (tmp_path / "data.yaml").write_text(json.dumps({"data": spec}))
    out = tmp_path / "analysis.md"
    args = [str(folder), "-c", str(tmp_path / "data.yaml"), "--threshold", "0.3", "--device", "cpu"]
    rows = script["main"]([*args, "--out", str(out)])
    forms = ("{}", "a photo of the {}.")
    wanted = {form: [] for form in forms}
    data = Pascal5i(str(voc), image_size=64, num_workers=0, template="{label}")
    for item in (data.dataset("test")[i] for i in range(5)):
        keep, truth = item["labels"].numpy() != 255, item["prompt_masks"][0].numpy()
        for form in forms:
            asked = words(segmenter, [form.format(item["prompts"][0])])
            answer = (sigmoids(segmenter, item["image"], asked, truth.shape)[0].numpy() > 0.3) & keep
            wanted[form].append((answer & truth).sum() / (answer | truth).sum())
    for form in forms:
        assert [row.iou for row in rows if row.form == form] == pytest.approx(wanted[form], abs=1e-3)
    text = out.read_text()
    assert text in capsys.readouterr().out
    lines = text.splitlines()
    assert f"| {{}} | {100 * np.mean(wanted['{}']):.1f} | 5 |" in lines
    assert sum(line.startswith("| (support images) |") and line.endswith("| 4 |") for line in lines) == 1  # one has none
    assert len([row for row in rows if row.form == "{}"]) == 5 and len({row.form for row in rows}) == 11
    large = [row.iou for row in rows if row.form == "{}" and row.size == "large"]
    assert any(line.startswith(f"| large (20% and more) | {100 * np.mean(large):.1f} | {len(large)} |") for line in lines)
    assert any(line.startswith("| bicycle |") for line in lines)
    assert len(script["main"]([*args, "--images", "2"])) == 2 * 10 + 2 - 1  # the first and the last, which has no support
    with pytest.raises(InputError, match="--images: got 0"):
        script["main"]([*args, "--images", "0"])
    spec["class_path"] = "pmpseg.data.PascalZeroShot"
    (tmp_path / "data.yaml").write_text(json.dumps({"data": spec}))
    with pytest.raises(InputError, match="the data has no phrases"):
        script["main"](args)


def test_forms_differ(segmenter, voc):
    data = Pascal5i(str(voc), shots=1, image_size=64, num_workers=0)
    scores = [evaluate.evaluate(segmenter, data, prompt_form=form)["phrase_curve"]["iou"] for form in ("text", "image", "mixed")]
    assert not torch.equal(scores[0], scores[1]) and not torch.equal(scores[1], scores[2])
    two = evaluate.evaluate(segmenter, data, prompt_form="mixed", text_weight=0.0)["phrase_curve"]["iou"]
    assert torch.allclose(two, scores[1], atol=1e-3)


def test_batches_do_not_matter(segmenter, voc):
    results = []
    for size in (1, 3):
        options = {"image_size": 64, "num_workers": 0, "pad": False, "resize_labels": True, "eval_batch_size": size}
        scores = evaluate.evaluate(segmenter, Pascal5i(str(voc), **options), prompt_form="image")
        results.append(numbers(scores))
    assert results[0].keys() == results[1].keys()
    assert all(results[0][k] == pytest.approx(results[1][k], abs=1e-3) for k in results[0])


@pytest.mark.parametrize("form", ["text", "image"])
def test_batches_of_images_with_more_and_fewer_phrases(segmenter, tmp_path, form):
    root, results = str(write_phrasecut(tmp_path / "pc", scenes=6)), []
    for size in (1, 2):
        data = PhraseCut(root, image_size=64, resize_labels=True, supports=1, num_workers=0, eval_batch_size=size)
        results.append(numbers(evaluate.evaluate(segmenter, data, prompt_form=form)))
    assert len({len(data.dataset("test")[i]["prompts"]) for i in range(len(data.dataset("test")))}) > 1
    assert results[0].keys() == results[1].keys()
    assert all(results[0][k] == pytest.approx(results[1][k], abs=1e-3) for k in results[0])


def test_a_prompt_form_by_itself(segmenter):
    g = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 2, 3, 48, 48), generator=g, dtype=torch.uint8)
    mask = torch.zeros(3, 2, 48, 48, dtype=torch.bool)
    mask[..., 10:30, 12:40] = True
    valid = torch.tensor([[True, True], [False, False], [False, True]])
    text = segmenter.text.encode(["red circle", "square", "grass"])
    with torch.no_grad():
        single = [segmenter.network.embed(visual_prompt(image[k, s, None].float() / 255, mask[k, s, None], size=48))[0]
                  for k, s in ((0, 0), (0, 1), (2, 1))]  # fmt: skip
        def form(kind, weight=0.5):
            return PromptForm(kind, weight, segmenter.embed, Showing(48))

        asked = form("image")(text, image[None], mask[None], valid[None])
        mixed = form("mixed", 0.3)(text, image[None], mask[None], valid[None])
    wanted = torch.stack([(single[0] + single[1]) / 2, text.pooled[0, 1], single[2]])
    assert asked.pooled.shape == text.pooled.shape and asked.valid.all()
    torch.testing.assert_close(asked.pooled[0], wanted, rtol=1e-4, atol=1e-4)
    expected = torch.where(torch.tensor([[True], [False], [True]]), 0.3 * text.pooled[0] + 0.7 * wanted, wanted)
    torch.testing.assert_close(mixed.pooled[0], expected, rtol=1e-4, atol=1e-4)
    nothing = form("image")(text, image[None], mask[None], torch.zeros(1, 3, 2, dtype=torch.bool))
    assert torch.equal(nothing.pooled, text.pooled)


def test_zero_shot_with_a_factor(segmenter, voc):
    """The label map is the argmax of factor x sigmoid; seen and unseen IoUs are of these pixels."""
    data = PascalZeroShot(str(voc), image_size=64, num_workers=0, unseen_pairs=1, background_factor=1.4)
    matrix = np.zeros((21, 21))
    embeddings = words(segmenter, data.vocabulary.names)
    for index in range(len(data.dataset("test"))):
        item = data.dataset("test")[index]
        found = sigmoids(segmenter, item["image"], embeddings, item["labels"].shape)
        found[0] *= 1.4
        labels, truth = found.argmax(0).numpy(), item["labels"].numpy()
        keep = truth != 255
        np.add.at(matrix, (truth[keep], labels[keep]), 1)
    hit, there = np.diag(matrix), matrix.sum(1) > 0
    iou = hit / np.maximum(matrix.sum(0) + matrix.sum(1) - hit, 1)
    seen = np.array([k for k in range(21) if there[k] and k not in (10, 14)])
    unseen = np.array([k for k in (10, 14) if there[k]])
    scores = evaluate.evaluate(segmenter, data)
    assert scores["miou_seen"] == pytest.approx(iou[seen].mean(), abs=2e-4)
    assert scores["miou_unseen"] == pytest.approx(iou[unseen].mean(), abs=2e-4) and len(unseen) == 2 and iou[unseen].any()
    assert "hiou" in scores and "clipseg_ap" not in scores and "phrase_iou" not in scores
    plain = evaluate.evaluate(segmenter, PascalZeroShot(str(voc), image_size=64, num_workers=0, background_factor=1))
    assert plain["iou"].nan_to_num().ne(scores["iou"].nan_to_num()).any()
    assert "(* no masks of it in training)" in table(scores, data.vocabulary)


def test_255_is_scored_where_the_data_does_not_ignore(segmenter, voc):
    """Other data has labels of 255 all over, where there are phrases but no classes."""
    data = Pascal5i(str(voc), image_size=64, num_workers=0)
    batch = collate([data.dataset("test")[0]])
    batch["labels"][:] = 255
    scored = Evaluator(data.vocabulary, phrase_kinds=data.phrase_kinds, class_list=False, paper_metrics="clipseg")
    scored.update(segmenter.network, segmenter.text, batch)
    total = scored.paper.counts.sum()
    assert total == batch["labels"].numel() and scored.phrases.present == 1
    nothing = Evaluator.of_data(data)
    nothing.update(segmenter.network, segmenter.text, batch)
    assert nothing.paper.counts.sum() == 0 and nothing.phrases.present == 0
    scored.reset()
    assert scored.paper.counts.sum() == 0


def test_refusals(segmenter, voc, folder, tmp_path):
    bare = Pascal5i(str(voc), shots=0, image_size=64, num_workers=0)
    with pytest.raises(InputError, match="the data gives no support images: set its shots"):
        evaluate.evaluate(segmenter, bare, prompt_form="image")
    assert "clipseg_ap" in evaluate.evaluate(segmenter, bare)
    data = Pascal5i(str(voc), image_size=64, num_workers=0)
    network = PMP(backbone="test_resnet", text_dim=24, dim=32, num_queries=5, num_layers=2, num_heads=4, ffn_dim=32)
    with pytest.raises(InputError, match="takes no images as prompts"):
        evaluate.evaluate(Segmenter(network, segmenter.text, None, 64), data, prompt_form="image")
    with pytest.raises(InputError, match="ask with --prompt-form text, or leave --region out"):
        evaluate.main([str(folder), "--prompt-form", "image", "--region", "tiny_clip"])
    with pytest.raises(InputError, match="--text-weight: got 2"):
        evaluate.main([str(folder), "--prompt-form", "mixed", "--text-weight", "2"])
    with pytest.raises(InputError, match="--text-weight is for mixed prompts"):
        evaluate.main([str(folder), "--text-weight", "0.2"])
    with pytest.raises(InputError, match="prompt form: got 'picture'"):
        PromptForm("picture")
    with pytest.raises(ValueError, match="paper_metrics: got 'pmp'"):
        Evaluator(data.vocabulary, paper_metrics="pmp")


def test_the_configs(voc, tmp_path):
    """Each is whole but for its root; what it says of the paper's settings is what the classes' defaults say."""
    phrasecut = write_phrasecut(tmp_path / "phrasecut", scenes=2)
    for name, root in (("pascal5i", voc), ("pascal_zero_shot", voc), ("phrasecut", phrasecut)):
        spec = evaluate.read_data(str(CONFIGS / f"{name}.yaml"))
        spec["init_args"]["root"] = str(root)
        data = evaluate.build_data(spec)
        batch = next(iter(data.test_dataloader()))
        assert batch["image"].shape == (1, 3, 352, 352)
        assert (batch["labels"].shape == (1, 352, 352)) == (name != "pascal5i")  # PFENet's code scores at the image's own size
    with pytest.raises(InputError, match=r"there is no .*instances_val2014"):
        spec = evaluate.read_data(str(CONFIGS / "coco20i.yaml"))
        spec["init_args"]["root"] = str(tmp_path)
        evaluate.build_data(spec)
