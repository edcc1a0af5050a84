"""Training CLIPSeg: loss and step by hand, gradients, rates, whole runs with examples, stop and continue, bad input."""

import contextlib
import copy
import csv
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from phrasecut_fixture import write_phrasecut
from PIL import Image
from test_several_processes import as_region_rank as as_one_of_two
from test_several_processes import free_port, needs_fork
from tiny_clip import make_tiny_clip
from tiny_clipseg import write_clipseg
from transformers import AutoTokenizer

from pmpseg import ImagePrompt, Segmenter, cli, evaluate, fit, predict
from pmpseg.data import PhraseCut, Scenes
from pmpseg.evaluation import Evaluator, best_threshold
from pmpseg.models import CLIPSeg
from pmpseg.models.token_towers import build_token_backbone
from pmpseg.supports import Showing
from pmpseg.training import CLIPSegModule, PMPModule, base
from pmpseg.training.callbacks import example_rows
from pmpseg.training.clipseg import mask_loss
from pmpseg.training.resume import LastCheckpoint
from pmpseg.visual_prompts import visual_prompt

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to `self.log"),  # steps without a trainer
    pytest.mark.filterwarnings("ignore:prompt .* cut off"),  # tests' CLIP reads 16 tokens
]
CONF = Path(__file__).parents[1] / "conf"
SMALL = {"dim": 16, "ffn_dim": 32, "dropout": 0.0}
QUIET = (
    "--data.num_workers 0 --trainer.enable_progress_bar false --trainer.accelerator cpu --trainer.log_every_n_steps 1 "
    "--trainer.check_val_every_n_epoch null"
).split()
MODULE = ["--model", "pmpseg.training.CLIPSegModule", *(f"--model.{k}={v}" for k, v in SMALL.items())]
SCENES = "--data pmpseg.data.Scenes --data.image_size 64 --data.train_length 9 --data.val_length 4 --data.test_length 6".split()
SCENES += "--data.num_prompts 3 --data.batch_size 2".split()
PMP = "--model pmpseg.training.PMPModule --model.backbone conv --model.backbone_weights null --model.dim 32"
VIT = {"backbone": "vit_tiny_patch16_224", "backbone_weights": None, "blocks": [0, 1]}
VIT |= {"backbone_options": {"depth": 3, "embed_dim": 24, "num_heads": 2}}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


def module_of(clip, **options) -> CLIPSegModule:
    torch.manual_seed(0)
    settings = {"text": str(clip), "backbone_weights": str(clip)} | SMALL | options
    module = CLIPSegModule(**settings)
    module.show_as(64)
    return module.train()


def batch_of(size: int = 40, **supports: int) -> dict:
    """Two images with four prompts, some of them padding; of the others not all have examples."""
    rng = np.random.default_rng(0)
    valid = torch.tensor([[[1, 1], [0, 1], [0, 0], [0, 0]], [[1, 0], [0, 0], [1, 1], [0, 0]]], dtype=torch.bool)
    masks = torch.zeros(2, 4, 2, size, size, dtype=torch.bool)
    masks[..., 4:30, 10:33] = True
    return {
        "image": torch.from_numpy(rng.integers(0, 256, (2, 3, 32, 48), dtype=np.uint8)),
        "labels": torch.full((2, 32, 48), 255),
        "prompts": [["red circle", "grass", "circle", ""], ["square", "red grass", "circle", ""]],
        "prompt_class": torch.full((2, 4), -1),
        "prompt_masks": torch.from_numpy(rng.random((2, 4, 32, 48)) < 0.3),
        "support_image": torch.from_numpy(rng.integers(0, 256, (2, 4, 2, 3, size, size), dtype=np.uint8)),
        "support_mask": masks,
        "support_valid": valid,
    }


def without_examples(batch: dict) -> dict:
    return {k: v for k, v in batch.items() if not k.startswith("support")}


# ---- the loss and the step


def cross_entropy(logit: float, truth: bool) -> float:
    return math.log1p(math.exp(-logit if truth else logit))


def test_the_loss_by_loop():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 3, 4, 5, generator=generator)
    masks, counted = (torch.rand(2, 3, 4, 5, generator=generator) < share for share in (0.4, 0.7))
    pixels = [(x, m) for x, m, c in zip(logits.flatten(), masks.flatten(), counted.flatten(), strict=True) if c]
    want = sum(cross_entropy(float(x), bool(m)) for x, m in pixels) / len(pixels)
    assert mask_loss(logits, masks, counted).item() == pytest.approx(want, rel=1e-5)
    assert mask_loss(logits, masks, counted & False).item() == 0
    assert mask_loss(logits.bfloat16(), masks, counted).dtype == torch.float32


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("share", [(0.0, 1.0), (0.2, 0.4), (1.0, 1.0), (0.0, 0.0)])
def test_a_step_by_hand(clip, share, after):
    module, batch = module_of(clip, text_weight=share, after_normalisation=after, prompt_size=40), batch_of()
    torch.manual_seed(5)
    got = module.training_step(batch, 0).item()
    torch.manual_seed(5)
    drawn = torch.rand(2, 4)  # the step draws nothing else
    mean = (0.5, 0.4, 0.3) if after else None  # of the tiny CLIP
    total, count = 0.0, 0
    for b, k in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]:
        prompt = module.text.encode([batch["prompts"][b][k]]).pooled[0, 0]
        shown = [
            module.network.embed(visual_prompt(batch["support_image"][b, k, s, None] / 255, mask, size=40, mean=mean))[0]
            for s in range(2)
            if batch["support_valid"][b, k, s]
            for mask in [batch["support_mask"][b, k, s, None]]
        ]
        if shown:
            weight = share[0] + (share[1] - share[0]) * drawn[b, k]
            prompt = weight * prompt + (1 - weight) * sum(shown) / len(shown)
        with torch.no_grad():
            logits = module.network(batch["image"][b, None] / 255, prompt[None])[0, 0]
        p = logits.sigmoid().double()
        truth = batch["prompt_masks"][b, k]
        total -= float(torch.where(truth, p, 1 - p).log().sum())
        count += truth.numel()
    assert got == pytest.approx(total / count, rel=1e-4)


def test_a_step_with_class_labels(clip):
    module, batch = module_of(clip), without_examples(batch_of())
    labels = torch.from_numpy(np.random.default_rng(1).choice([0, 1, 2, 255], (2, 32, 48)))
    classes = torch.tensor([[2, 0, 1, -1], [0, 2, 1, -1]])
    del batch["prompt_masks"]
    got = module.training_step(batch | {"labels": labels, "prompt_class": classes}, 0).item()
    with torch.no_grad():
        prompts = module.text.encode_batch([row[:3] for row in batch["prompts"]])
        logits = module.network(batch["image"] / 255, prompts)
    each = [
        cross_entropy(float(logits[b, k, y, x]), int(labels[b, y, x]) == int(classes[b, k]))
        for b, y, x in (labels != 255).nonzero().tolist()
        for k in range(3)
    ]
    assert got == pytest.approx(np.mean(each), rel=1e-4)


def test_shares_of_the_text_are_drawn_anew_for_every_prompt_within_their_range(clip, monkeypatch):
    module, batch, seen = module_of(clip, text_weight=(0.2, 0.6)), batch_of(), []
    mix = base.mix
    monkeypatch.setattr(base, "mix", lambda *args: seen.append(args[3]) or mix(*args))
    for _ in range(60):
        module.prompts_of(batch)
    seen = torch.stack(seen)
    assert seen.shape == (60, 2, 4) and seen.unique().numel() > 400
    assert 0.2 <= seen.min() < 0.22 and 0.58 < seen.max() <= 0.6 and abs(float(seen.mean()) - 0.4) < 0.03


def test_text_only_and_examples_only(clip):
    batch = batch_of()
    has = batch["support_valid"].any(2)
    words = copy.deepcopy(batch)
    words["prompts"] = [["grass", "square", "circle", ""], ["red", "red grass", "grass", ""]]  # where there are examples
    for old, new, changed in zip(batch["prompts"], words["prompts"], has.tolist(), strict=True):
        assert [a != b for a, b in zip(old, new, strict=True)] == changed
    step = {share: module_of(clip, text_weight=share).training_step for share in ((1.0, 1.0), (0.0, 0.0), (0.0, 1.0))}
    assert torch.equal(step[1.0, 1.0](batch, 0), step[1.0, 1.0](without_examples(batch), 0))
    assert torch.equal(step[0.0, 0.0](batch, 0), step[0.0, 0.0](words, 0))  # words that have an example have no part
    different = [step[0.0, 1.0](x, 0).item() for x in (batch, words, without_examples(batch)) if torch.manual_seed(3)]
    assert len(set(different)) == 3
    other = copy.deepcopy(batch)
    other["prompts"][0][2] = "red"  # which has no example
    assert not torch.equal(step[0.0, 0.0](batch, 0), step[0.0, 0.0](other, 0))


def test_one_batch_is_learned_by_heart(clip):
    """Far below what any constant can reach: what is learned depends on the prompts and on the image."""
    data = Scenes(image_size=64, train_length=4, num_prompts=4, batch_size=4, num_workers=0, supports=1)
    batch = next(iter(data.train_dataloader()))
    module = module_of(clip, text_weight=(0.5, 0.5), dim=32, ffn_dim=64)
    share = batch["prompt_masks"].float().mean().item()
    constant = -(share * math.log(share) + (1 - share) * math.log(1 - share))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * constant


# ---- what learns, and how fast


class NoneValid(Scenes):
    """Supports are asked for, and none is found."""

    @staticmethod
    def collate(items: list[dict]) -> dict:
        batch = Scenes.collate(items)
        batch["support_valid"] &= False
        return batch


def in_use(module, data, steps: int = 1, **hooks) -> CLIPSegModule:
    """The module after some steps; ``hooks`` are a callback's."""
    callback = Callback()
    for name, hook in hooks.items():
        setattr(callback, name, hook)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"limit_val_batches": 0, "use_distributed_sampler": False}
    Trainer(max_steps=steps, accelerator="cpu", callbacks=[callback], **quiet).fit(module, datamodule=data)
    return module


KINDS = {
    "CLIPSeg": {},
    "CLIP-Deconv": {"decoder": "mlp", "blocks": [2]},
    "ViTSeg": VIT,
    "ViTSeg, projection at random": VIT | {"image_projection": "fixed"},
    "ViTSeg, learning": VIT | {"backbone_frozen": False},
    "a ViT that pools by attention": VIT | {"backbone": "vit_base_patch16_siglip_224", "backbone_frozen": False},
    "learning": {"backbone_frozen": False},
    "conditional_layer 2": {"conditional_layer": 2, "blocks": [0, 1, 3]},
    "refined": {"upsampling": "refined"},
}


@pytest.mark.parametrize("examples", ["some", "none", "none valid"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_learns_gets_a_gradient_in_the_first_step(clip, kind, examples):
    """Else DDP waits for what never comes."""
    data = (NoneValid if examples == "none valid" else Scenes)(
        image_size=64, train_length=2, num_prompts=3, batch_size=2, num_workers=0, supports=int(examples != "none")
    )
    found = {}

    def look(trainer, module):
        learning = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
        found.update({name: None if grad is None else float(grad.abs().sum()) for name, grad in learning.items()})

    module = in_use(module_of(clip, **KINDS[kind]), data, on_after_backward=look)
    assert found and [name for name, size in found.items() if size is None] == []
    assert all(size > 0 for name, size in found.items() if "film_" in name or "upsample" in name)
    learned = {name.split(".")[1] for name in found}
    assert ("backbone" in learned) == ("learning" in kind or "attention" in kind)
    projection = module.network.image_projection
    if projection is not None:
        learns = examples != "none" and "random" not in kind
        assert projection.weight.requires_grad == learns
        assert not learns or (found["network.image_projection.weight"] > 0) == (examples == "some")


def test_rates_of_every_step(clip):
    """PyTorch's own cosine is the reference; a warm-up is a factor before it."""
    data = Scenes(image_size=64, train_length=4, num_prompts=1, batch_size=1, num_workers=0)
    for warmup in (0, 4):
        rates: list[list[float]] = []

        def note(trainer, *_, rates=rates):
            rates.append([g["lr"] for g in trainer.optimizers[0].param_groups])

        module = module_of(clip, lr=1e-3, min_lr=1e-4, backbone_frozen=False, backbone_lr_factor=0.1, warmup_steps=warmup)
        in_use(module, data, 11, on_train_batch_start=note)
        reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(reference, 11, 1e-4)
        for step, row in enumerate(rates):
            want = schedule.get_last_lr()[0] * min(1, (step + 1) / max(1, warmup))
            assert sorted(set(row)) == pytest.approx([0.1 * want, want]), (warmup, step)
            reference.step(), schedule.step()
        assert len(rates) == 11 and (warmup or max(rates[0]) == 1e-3)
        assert max(rates[5]) == pytest.approx(5.5e-4, rel=0.15) and 1e-4 < max(rates[10]) < 1.25e-4


@pytest.mark.parametrize("kind", ["learning", "ViTSeg, learning"])
def test_matrices_decay_and_the_rest_does_not(clip, kind):
    data = Scenes(image_size=64, train_length=2, num_prompts=1, batch_size=2, num_workers=0)
    groups = []
    module = in_use(
        module_of(clip, weight_decay=0.3, lr=1e-3, **KINDS[kind]), data,
        on_train_end=lambda trainer, _: groups.extend(trainer.optimizers[0].param_groups),
    )  # fmt: skip
    names = {id(p): name for name, p in module.network.named_parameters()}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] == 0.3 for p in g["params"]}
    spared = {names[id(p)] for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    learns = {name for name, p in module.network.named_parameters() if p.requires_grad}
    assert decayed | spared == learns and not decayed & spared
    odd = ("bias", "norm", "pos_embed", "cls_token", "position_embedding", "class_embedding")
    assert all(any(word in name for word in odd) for name in spared)
    assert not [name for name in decayed if any(word in name for word in odd)]
    slow = {names[id(p)] for g in groups if g["initial_lr"] == pytest.approx(1e-4) for p in g["params"]}
    assert slow == {name for name in learns if name.startswith("backbone.")} and slow


# ---- a whole run on PhraseCut


@pytest.fixture(scope="module")
def phrasecut(tmp_path_factory):
    return write_phrasecut(tmp_path_factory.mktemp("phrasecut") / "data", scenes=12, size=96)


@pytest.fixture(scope="module")
def run(tmp_path_factory, phrasecut):
    """60 steps with examples and negatives, on the shipped CLIP."""
    options = "--model pmpseg.training.CLIPSegModule --model.ffn_dim 64 --model.lr 5e-3 --model.after_normalisation true"
    options += " --model.visual_prompt crop_blur3 --model.prompt_size 48 --data pmpseg.data.PhraseCut --data.image_size 64"
    options += f" --data.root {phrasecut} --data.supports 1 --data.negatives 0.2 --data.batch_size 6 --data.prompts_per_image 4"
    options += " --trainer.max_steps 60 --trainer.val_check_interval 30"
    return fit.main([*options.split(), *QUIET, "--trainer.default_root_dir", str(tmp_path_factory.mktemp("run") / "run")])


def losses(root: Path) -> list[float]:
    with (root / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == list(range(len(rows)))
    return [float(row["train/loss"]) for row in rows]


def test_a_run_learns_and_leaves_its_record(run):
    found = losses(run)
    assert len(found) == 60 and np.mean(found[-10:]) < 0.75 * np.mean(found[:5])
    for name in ("config.yaml", "metrics.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "model/config.json"):
        assert (run / name).is_file(), name
    assert sorted(p.name for p in (run / "panels").iterdir()) == ["step_000030.png", "step_000060.png"]
    with Image.open(run / "panels" / "step_000060.png") as panel:
        assert min(panel.size) > 300
    history = json.loads((run / "metrics.json").read_text())["history"]
    assert [row["step"] for row in history] == [30, 60] and "miou" not in history[0]
    assert {"phrase_ap", "phrase_iou_attribute", "clipseg_miou@best"} <= history[0].keys()


def test_the_best_by_phrases_is_the_model(run):
    record = json.loads((run / "metrics.json").read_text())
    assert record["best"] == max(record["history"], key=lambda row: row["phrase_ap"])
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    (kept,) = (state for name, state in best["callbacks"].items() if name.startswith("BestCheckpoint"))
    assert kept["monitor"] == "val/phrase_ap" and best["global_step"] == record["best"]["step"]
    weights = Segmenter.load(run / "model").network.state_dict()
    assert all(torch.equal(weights[k.removeprefix("network.")], v) for k, v in best["state_dict"].items())


def test_checkpoints_hold_no_frozen_clip(run):
    path = run / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    assert not [name for name in state if ".tower." in name or name.startswith("text.")]
    learned = sum(v.numel() for v in state.values())
    assert path.stat().st_size < 4 * 3 * learned + 100_000  # with Adam's two moments
    assert learned < sum(v.numel() for v in Segmenter.load(run / "model").network.state_dict().values()) / 4


def test_the_model_shows_examples_as_it_was_trained(run):
    segmenter = Segmenter.load(run / "model")
    mean = segmenter.network.mean.flatten().tolist()
    assert segmenter.square and segmenter.image_size == 64 and not segmenter.text.normalize
    assert segmenter.showing.size == 48 and segmenter.showing.preset == "crop_blur3"
    assert list(segmenter.showing.mean) == pytest.approx(mean)


def test_the_threshold_is_the_best_of_the_validation(run, phrasecut):
    """No phrase of this validation is absent: the threshold is then the one of the best mean IoU."""
    segmenter = Segmenter.load(run / "model")
    data = PhraseCut(str(phrasecut), image_size=64, num_workers=0)
    items = [data.dataset("val")[n] for n in range(len(data.dataset("val")))]
    pairs = []
    for item in items:
        picture = item["image"].permute(1, 2, 0).numpy()
        answer = segmenter.segment(picture, item["prompts"])
        for k, truth in enumerate(item["prompt_masks"].float()):
            small = torch.from_numpy(answer.probability(k))[None, None]
            size = tuple(truth.shape)
            soft = torch.nn.functional.interpolate(small, size, mode="bilinear", align_corners=False)[0, 0]
            pairs.append((soft, truth.bool()))

    def iou(threshold: float) -> float:
        return np.mean([float((s > threshold)[t].sum() / ((s > threshold) | t).sum()) for s, t in pairs])

    best = max(iou(t) for t in np.arange(0.01, 1, 0.01))
    assert iou(segmenter.threshold) > 0.97 * best and segmenter.threshold > 0.02
    assert iou(segmenter.threshold) > iou(0.0) + 0.01  # which answers everything


def test_evaluate_and_predict_by_text_and_by_example(run, phrasecut, tmp_path, capsys):
    best = json.loads((run / "metrics.json").read_text())["best"]
    scores = {}
    for form in ("text", "image", "mixed"):
        out = tmp_path / f"{form}.json"
        options = ["--split", "val", "--device", "cpu", "--prompt-form", form, "--out", str(out)]
        scores[form] = evaluate.main([str(run / "model"), *options])["phrase_ap"]
        if form == "image":
            assert json.loads(out.read_text())["phrase_n_without_support"] >= 0
    assert scores["text"] == pytest.approx(best["phrase_ap"], abs=1e-6)
    assert len(set(scores.values())) == 3 and min(scores.values()) > 0
    item = PhraseCut(str(phrasecut), image_size=64, num_workers=0).dataset("val")[0]
    photo = phrasecut / "images" / item["name"]
    Image.fromarray(item["prompt_masks"][0].numpy()).save(tmp_path / "mask.png")
    command = [str(run / "model"), str(photo), "--out", str(tmp_path / "out"), "--prompts", item["prompts"][0]]
    assert predict.main([*command, "--prompt-image", str(photo), "--prompt-mask", str(tmp_path / "mask.png")]) == 0
    masks = sorted(p.name for p in (tmp_path / "out").glob("*_mask_*"))
    assert len(masks) == 2 and "example" in masks[1]
    with Image.open(tmp_path / "out" / masks[0]) as mask, Image.open(photo) as image:
        assert mask.size == image.size


def test_continued_at_its_end_a_run_writes_the_same_model_or_one_that_names_its_encoders(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    again = ["-c", str(run / "config.yaml"), "--trainer.default_root_dir", str(tmp_path / "run"), "--ckpt_path", "last"]
    fit.main([*again, "--encoders", "reference"])
    whole, named = Segmenter.load(run / "model"), Segmenter.load(tmp_path / "run" / "model")
    assert not (tmp_path / "run" / "model" / "text_encoder").exists()
    sizes = [(folder / "model" / "model.safetensors").stat().st_size for folder in (run, tmp_path / "run")]
    assert sizes[1] < sizes[0] / 4
    a, b = whole.network.state_dict(), named.network.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
    picture, mask = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8), np.zeros((50, 70), bool)
    mask[10:40, 20:50] = True
    answers = [s.segment(picture, ["circle", ImagePrompt(picture, mask)]) for s in (whole, named)]
    assert np.array_equal(answers[0].soft, answers[1].soft) and whole.threshold == named.threshold
    assert json.loads((run / "metrics.json").read_text()) == json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_a_finished_run_that_is_continued_keeps_its_best(clip, tmp_path, monkeypatch):
    compute, told = Evaluator.compute, iter([0.9, 0.1])
    monkeypatch.setattr(Evaluator, "compute", lambda self: compute(self) | {"phrase_ap": next(told)})
    options = [*MODULE, *SCENES, *QUIET, "--model.text", str(clip), "--model.backbone_weights", str(clip)]
    options += [*"--trainer.max_steps 2 --trainer.val_check_interval 1".split(), "--trainer.default_root_dir", str(tmp_path)]
    fit.main(options)
    before, ends = Segmenter.load(tmp_path / "model"), {}
    for name in ("best", "last"):
        state = torch.load(tmp_path / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
        ends[name] = {k.removeprefix("network."): v for k, v in state.items()}
    own = before.network.state_dict()
    assert all(torch.equal(own[k], v) for k, v in ends["best"].items())
    assert not all(torch.equal(own[k], v) for k, v in ends["last"].items())
    assert json.loads((tmp_path / "metrics.json").read_text())["best"]["step"] == 1
    fit.main([*options, "--ckpt_path", "last"])  # nothing is left to do
    assert json.loads((tmp_path / "metrics.json").read_text())["best"]["step"] == 1
    after = Segmenter.load(tmp_path / "model")
    assert all(torch.equal(v, after.network.state_dict()[k]) for k, v in before.network.state_dict().items())
    assert before.threshold == after.threshold


def test_thresholds_with_and_without_absent_phrases():
    grid, nan = torch.linspace(0, 1, 5), torch.full((5,), math.nan)
    iou, absent = torch.tensor([0.2, 0.6, 0.5, 0.1, 0.0]), torch.tensor([0.0, 0.1, 0.6, 0.9, 1.0])
    assert best_threshold({"phrase_curve": {"threshold": grid, "iou": iou, "absent_accuracy": absent}}) == 0.5
    assert best_threshold({"phrase_curve": {"threshold": grid, "iou": iou, "absent_accuracy": nan}}) == 0.25
    assert best_threshold({"phrase_curve": {"threshold": grid, "iou": nan, "absent_accuracy": absent}}) is None
    assert best_threshold({"miou": 0.5}) is None


def test_pictures_of_a_small_validation_are_all_different(run, phrasecut):
    dataset = PhraseCut(str(phrasecut), image_size=64, num_workers=0).dataset("val")
    assert len(dataset) < 8
    rows = example_rows(Segmenter.load(run / "model"), dataset, 8)
    assert len({np.asarray(row.image).tobytes() for row in rows}) == len(rows) == len(dataset)


# ---- the configs


def test_the_config_of_scenes(tmp_path):
    short = "--data.image_size 64 --data.val_length 4 --data.test_length 4 --data.batch_size 2 --data.num_prompts 4"
    short += " --trainer.max_steps 3 --trainer.val_check_interval 3"
    short += f" --trainer.default_root_dir {tmp_path / 'r'}"
    root = fit.main(["-c", str(CONF / "clipseg_scenes.yaml"), *short.split(), *QUIET])
    segmenter = Segmenter.load(root / "model")
    assert not segmenter.square and segmenter.showing == Showing(64) and len(losses(root)) == 3
    found = [evaluate.main([str(root / "model"), "--prompt-form", form])["phrase_ap"] for form in ("text", "image")]
    assert found[0] != found[1] and (root / "metrics_test.json").is_file()


def test_the_papers_config(tmp_path, phrasecut):
    """In bfloat16, on a small CLIP and its blocks: the rest is as on the GPU."""
    config = ["-c", str(CONF / "clipseg_phrasecut.yaml")]
    short = "--model.text tiny_clip --model.backbone_weights tiny_clip --model.blocks [1,3,5] --model.ffn_dim 64"
    short += f" --data.root {phrasecut} --data.image_size 64 --data.batch_size 4 --trainer.max_steps 2"
    short += f" --trainer.val_check_interval 2 --trainer.default_root_dir {tmp_path}/"
    half, whole = ([*config, *short.split(), *QUIET] for _ in range(2))
    half[-len(QUIET) - 1] += "half"
    whole[-len(QUIET) - 1] += "whole"
    roots = [fit.main(half), fit.main([*whole, "--trainer.precision", "32-true"])]
    a, b = (losses(root) for root in roots)
    assert a == pytest.approx(b, rel=0.02) and a != b
    segmenter = Segmenter.load(roots[0] / "model")
    mean = segmenter.network.mean.flatten().tolist()
    assert mean == pytest.approx([0.485, 0.456, 0.406]) == list(segmenter.showing.mean)


def test_the_config_of_coco(tmp_path, shared, monkeypatch):
    data, words = shared("data", "coco_small"), shared("weights", "minilm")
    short = "--data.image_size 64 --data.batch_size 4 --trainer.max_steps 2 --trainer.val_check_interval 2"
    short += " --trainer.limit_val_batches 3"
    own = ["--data.root", str(data), "--model.text", str(words), "--trainer.default_root_dir", str(tmp_path / "r")]
    root = fit.main(["-c", str(CONF / "clipseg_coco_small.yaml"), *short.split(), *QUIET, *own])
    segmenter = Segmenter.load(root / "model")
    assert segmenter.square and segmenter.network.image_projection is not None and len(losses(root)) == 2
    first = sorted((data / "images").rglob("*.jpg"))[0]
    answer = segmenter.segment(str(first), ["dog", ImagePrompt(str(first))])
    with Image.open(first) as image:
        assert answer.mask(1).shape == image.size[::-1]


def folder_data(root: Path) -> Path:
    """Labels from 0 to 2 and 255."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for n in range(count):
            Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(root / "images" / split / f"{n}.png")
            Image.fromarray(rng.choice([0, 1, 2, 255], (40, 50)).astype(np.uint8)).save(root / "masks" / split / f"{n}.png")
    (root / "classes.txt").write_text("cat\ndog\ngrass\n")
    return root


def test_masks_of_a_folder_are_judged_by_class(clip, tmp_path):
    options = [*MODULE, *QUIET, "--model.text", str(clip), "--model.backbone_weights", str(clip)]
    options += ["--data", "pmpseg.data.FolderData", "--data.root", str(folder_data(tmp_path / "data"))]
    options += "--data.image_size 32 --data.batch_size 2 --trainer.max_steps 4 --trainer.val_check_interval 2".split()
    root = fit.main([*options, "--trainer.default_root_dir", str(tmp_path / "run")])
    record = json.loads((root / "metrics.json").read_text())
    assert record["best"] == max(record["history"], key=lambda row: row["miou"]) and "phrase_ap" not in record["best"]
    best = torch.load(root / "checkpoints" / "best.ckpt", weights_only=True)
    (kept,) = (state for name, state in best["callbacks"].items() if name.startswith("BestCheckpoint"))
    assert kept["monitor"] == "val/miou" and best["global_step"] == record["best"]["step"]
    segmenter = Segmenter.load(root / "model")
    assert segmenter.threshold == 0.3  # no phrases to choose one by
    found = evaluate.main([str(root / "model"), "--split", "val", "--device", "cpu"])
    assert found["miou"] == pytest.approx(record["best"]["miou"], abs=1e-6)


# ---- stop and continue; several processes


CONTINUED = {
    "with examples": "--data.supports 1 --model.dropout 0.1",
    "an encoder at random": "--data.supports 1 --model.backbone_random true",
    "a learning encoder from nowhere": "--data.supports 1 --model.backbone_frozen false --model.backbone vit_tiny_patch16_224 "
    '--model.backbone_weights null --model.blocks [0,1] --model.backbone_options {"depth":3,"embed_dim":24,"num_heads":2}',
    "a projection at random": "--data.supports 1 --model.backbone vit_tiny_patch16_224 --model.backbone_weights null "
    '--model.image_projection fixed --model.blocks [0,1] --model.backbone_options {"depth":3,"embed_dim":24,"num_heads":2}',
}


@pytest.mark.parametrize("case", CONTINUED)
def test_a_run_goes_on_as_if_it_had_not_stopped(case, clip, tmp_path, monkeypatch):
    save = LastCheckpoint._save

    def save_and_copy(self, trainer):
        save(self, trainer)
        if trainer.global_step in (1, 3) and Path(trainer.default_root_dir).name == "whole":
            shutil.copytree(tmp_path / "whole", tmp_path / str(trainer.global_step))

    monkeypatch.setattr(LastCheckpoint, "_save", save_and_copy)
    options = [*MODULE, *SCENES, *QUIET, "--model.text", str(clip), "--save_every", "1"]
    if "vit" not in CONTINUED[case]:
        options += ["--model.backbone_weights", str(clip)]
    options += [*CONTINUED[case].split(), *"--trainer.max_steps 6 --trainer.val_check_interval 2".split()]
    whole = fit.main([*options, "--trainer.default_root_dir", str(tmp_path / "whole")])
    end = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    wanted = Segmenter.load(whole / "model").network.state_dict()
    assert any(".tower." in name for name in end) == (case != "with examples")  # what nobody can draw again
    assert ("network.image_projection.weight" in end) == ("vit" in CONTINUED[case])
    init = CLIPSeg.__init__

    def draw_others(self, **options):
        torch.manual_seed(99)
        init(self, **options)

    monkeypatch.setattr(CLIPSeg, "__init__", draw_others)  # all that was drawn must come from the checkpoint
    for step in ("1", "3"):
        again = fit.main([*options, "--trainer.default_root_dir", str(tmp_path / step), "--ckpt_path", "last"])
        assert losses(again) == losses(whole), step
        found = torch.load(again / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        assert found.keys() == end.keys() and all(torch.equal(found[k], v) for k, v in end.items()), step
        found = Segmenter.load(again / "model").network.state_dict()
        assert all(torch.equal(found[k], v) for k, v in wanted.items()), step


@needs_fork
def test_two_processes_learn_as_one(clip, tmp_path):
    """Where no random number differs between them: no dropout, one share of the text. Some prompts are padding."""
    options = [*MODULE, *SCENES, *QUIET, "--model.text", str(clip), "--model.backbone_weights", str(clip), "--data.supports", "1"]
    options += "--model.text_weight [0.4,0.4] --data.num_prompts 12 --data.negatives 0".split()
    options += "--trainer.max_steps 3 --trainer.val_check_interval 3".split()
    two = [*options, "--data.batch_size", "1", "--trainer.default_root_dir", str(tmp_path / "two")]
    context = torch.multiprocessing.start_processes(as_one_of_two, (free_port(), two), nprocs=2, start_method="fork", join=False)
    for _ in range(100):
        if context.join(1):
            break
    else:
        for process in context.processes:
            process.kill()
        pytest.fail("two processes hang")
    fit.main([*options, "--data.batch_size", "2", "--trainer.default_root_dir", str(tmp_path / "one")])
    one, both = (torch.load(tmp_path / n / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for n in ("one", "two"))
    start = module_of(clip).state_dict()
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, atol=2e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    assert sum(not torch.equal(v, start[k]) for k, v in one.items()) == len(one)
    scores = [json.loads((tmp_path / n / "metrics.json").read_text())["best"] for n in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


# ---- from transformers' weights; PMP


def test_fine_tuning_starts_with_the_answers_of_transformers(tmp_path):
    theirs = write_clipseg(tmp_path / "clipseg")
    module = CLIPSegModule(start_from=str(tmp_path / "clipseg")).eval()
    image, words = torch.rand(2, 3, 64, 64), ["red circle", "grass"]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "clipseg")(words, padding=True, return_tensors="pt")
    normal = (image - module.network.backbone.mean) / module.network.backbone.std
    with torch.no_grad():
        want = theirs(pixel_values=normal, **tokens).logits
        got = module.network(image, module.text.encode_batch([[w] for w in words]))[:, 0]
    assert (want - got).abs().max() <= 1e-4 * want.abs().max() and want.std() > 0.1
    options = ["--model", "pmpseg.training.CLIPSegModule", "--model.start_from", str(tmp_path / "clipseg"), *SCENES, *QUIET]
    options += "--data.supports 1 --trainer.max_steps 2 --trainer.val_check_interval 2".split()
    root = fit.main([*options, "--trainer.default_root_dir", str(tmp_path / "run")])
    old, new = module.network.state_dict(), Segmenter.load(root / "model").network.state_dict()
    moved = {name.split(".")[0] for name, value in old.items() if not torch.equal(value, new[name])}
    assert moved == {"reduce", "film_scale", "film_shift", "blocks", "upsample"}  # and CLIP stays


def test_pmp_learns_from_examples(tmp_path, clip):
    small = f"{PMP} --model.num_queries 6 --model.num_layers 1 --model.num_heads 4 --model.ffn_dim 32"
    small += f" --model.num_points 64 --model.examples true --model.text {clip} --data.supports 1"
    small += " --trainer.max_steps 4 --trainer.val_check_interval 4 --save_every 2"
    root = fit.main([*small.split(), *SCENES, *QUIET, "--trainer.default_root_dir", str(tmp_path / "run")])
    assert (root / "model" / "image_encoder.safetensors").is_file()
    state = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in state if name.startswith("image_encoder.")]  # it is frozen, and the text's CLIP
    segmenter = Segmenter.load(root / "model")
    own, theirs = segmenter.image_encoder.state_dict(), build_token_backbone("clip", clip).state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in own.items())
    found = [evaluate.main([str(root / "model"), "--prompt-form", form])["phrase_ap"] for form in ("text", "image")]
    assert found[0] != found[1]


def test_pmp_step_asks_with_examples(clip):
    torch.manual_seed(0)
    small = {"dim": 32, "num_queries": 6, "num_layers": 1, "num_heads": 4, "ffn_dim": 32, "num_points": 64}
    module = PMPModule(text=str(clip), backbone="conv", backbone_weights=None, examples=True, text_weight=(0.0, 0.0), **small)
    module.show_as(40)
    batch = batch_of()
    prompts = module.prompts_of(batch)
    norms = prompts.pooled.norm(dim=-1)[prompts.valid]
    torch.testing.assert_close(norms, torch.ones_like(norms))  # as PMP's texts are
    shown = visual_prompt(batch["support_image"][1, 0, :1] / 255, batch["support_mask"][1, 0, :1], size=40)
    want = torch.nn.functional.normalize(module.image_encoder.embed(shown)[0], dim=0)
    torch.testing.assert_close(prompts.pooled[1, 0], want, atol=1e-5, rtol=1e-5)
    assert torch.equal(prompts.pooled[0, 2], module.text.encode(["circle"]).pooled[0, 0])


# ---- bad input

BACKBONE = "--model.backbone_weights null --model.backbone"
FOLDER = "--data pmpseg.data.FolderData --data.root data"
BAD = {
    "shares in the wrong order": ("--model.text_weight [0.8,0.2]", r"text_weight: got \[0.8, 0.2\], want \[low, high\] within 0"),
    "a share above 1": ("--model.text_weight [0,2]", r"text_weight: got \[0.0, 2.0\]"),
    "three shares": ("--model.text_weight [0,0.5,1]", "model.text_weight: got"),
    "a visual prompt that is none": ("--model.visual_prompt crop_blurr1", "got 'crop_blurr1': did you mean 'crop_blur1'"),
    "an example of no pixels": ("--model.prompt_size 0", "prompt_size: got 0, want 1"),
    "supports of data that has none": (f"{FOLDER} --data.supports 1", "unknown key.*supports"),
    "PMP's examples of data that has none": (f"{PMP} --model.examples true {FOLDER}", "examples: got data of FolderData, which"),
    "PMP's examples without supports": (f"{PMP} --model.examples true", "examples: got data of Scenes, which gives none"),
    "a number of supports below 0": ("--data.supports -1", "supports: got -1"),
    "a backbone that is no ViT": (f"{BACKBONE} resnet18", "'resnet18' is no plain ViT; want one"),
    "a backbone behind convolutions": (f"{BACKBONE} vit_tiny_r_s16_p8_224", "'vit_tiny_r_s16_p8_224' is no plain ViT"),
    "a backbone of one size": (f"{BACKBONE} beit_base_patch16_224", "takes images of one size"),
    "blocks that are not there": ("--model.blocks [0,9]", r"blocks: got \[0, 9\], want some of 0 to 3"),
    "no decoder": ("--model.decoder conv", "decoder: got 'conv', want .*transformer.* or .*mlp"),
    "a rate that would rise": ("--model.lr 1e-5", "min_lr: got 0.0001, want 0 to the lr that falls to it, which is 1e-05"),
    "no CLIPSeg to start from": ("--model.start_from CLIP", "'clip' model; wanted a CLIPSeg"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_at_the_start(case, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_data(tmp_path / "data")
    steps = []
    for module in (CLIPSegModule, PMPModule):
        monkeypatch.setattr(module, "training_step", lambda *_: steps.append(1))
    given, pattern = BAD[case]
    own = ["--model.backbone_weights", str(clip)] if "backbone_weights" not in given else []
    model, data = ([] if name in given else default for name, default in (("--model pmp", MODULE), ("--data pmp", SCENES)))
    given = given.replace("CLIP", str(clip)) if "start_from" in given else given
    command = [*model, *data, *QUIET, "--model.text", str(clip), *own, *given.split(), "--trainer.default_root_dir", "run"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        cli.run(lambda: fit.main(command))
    lines = [line for line in said.getvalue().splitlines() if line.startswith("pmpseg: ")]
    assert end.value.code == 2 and len(lines) == 1 and "Traceback" not in said.getvalue()
    assert re.search(pattern, lines[0]) and len(lines[0]) < 400, lines[0]
    assert not steps and not [p for p in Path().rglob("*") if p.name.endswith((".tmp", ".ckpt", "metrics.json", ".csv"))]
