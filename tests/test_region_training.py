"""Tuning a CLIP on regions: the loss by loop, what learns in which stage, the data, and a run from the command line."""

import csv
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import make_tiny_clip
from torch.nn import functional as F

from pmpseg import fit, rle
from pmpseg.data import Pairs, SceneRegions
from pmpseg.data.pairs import COLUMNS, read_pairs
from pmpseg.data.regions import collate, cut
from pmpseg.errors import InputError
from pmpseg.models.region import RegionClassifier
from pmpseg.region_metrics import RegionAccuracy
from pmpseg.region_stage import RegionStage
from pmpseg.training import RegionModule
from pmpseg.training.region import contrastive_loss, noun_id, stage_factor
from pmpseg.vocabulary import Vocabulary

FIT = (
    "--model pmpseg.training.RegionModule --data pmpseg.data.SceneRegions --data.train_length 24 --data.val_length 3 "
    "--data.batch_size 2 --data.regions 2 --data.num_workers 0 --trainer.max_steps 4 --trainer.val_check_interval 2 "
    "--trainer.check_val_every_n_epoch null --trainer.enable_progress_bar false --trainer.accelerator cpu --model.warmup_steps 1 "
    "--trainer.log_every_n_steps 1"
).split()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


# ---- the loss


def units(seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("ignored", [False, True])
def test_the_loss_by_loop(ignored):
    regions, names, nouns = units(0), units(1), [3, 7, 3, 3, 9, 7]
    total = 0.0
    for i in range(6):
        others = [j for j in range(6) if j == i or not (ignored and nouns[j] == nouns[i])]
        to_names = sum(math.exp(20 * float(regions[i] @ names[j])) for j in others)
        to_regions = sum(math.exp(20 * float(regions[j] @ names[i])) for j in others)
        total += math.log(to_names) + math.log(to_regions) - 2 * 20 * float(regions[i] @ names[i])
    found = contrastive_loss(regions, names, 20.0, torch.tensor(nouns) if ignored else None)
    assert found.item() == pytest.approx(total / 12, rel=1e-4)


def test_the_loss_keeps_its_bits_under_autocast():
    regions, names = units(0), units(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(regions, names, 100.0)
    assert found.item() == pytest.approx(contrastive_loss(regions, names, 100.0).item(), rel=1e-6)


def test_repeated_nouns_alone_make_the_difference():
    regions, names = units(0), units(1)
    assert torch.equal(contrastive_loss(regions, names, 9.0), contrastive_loss(regions, names, 9.0, torch.arange(6)))
    assert contrastive_loss(regions, names, 9.0, torch.zeros(6)).item() == pytest.approx(0)  # one noun: nothing to tell apart
    assert noun_id("cat") == noun_id("cat") != noun_id("dog") and noun_id("dog") < 2**63


def test_the_rate_of_a_stage():
    factor = stage_factor(10, 30, 5)
    assert [factor(s) for s in (0, 9, 30, 99)] == [0, 0, 0, 0]
    assert [factor(s) for s in (10, 12, 14, 15)] == [pytest.approx(x) for x in (0.2, 0.6, 1.0, 1.0)]
    assert factor(20) == pytest.approx(0.5 * (1 + math.cos(math.pi / 3))) and 0 < factor(29) < 0.02
    assert stage_factor(0, 0, 5)(0) == 0.0


# ---- what learns


def weights_of(stage: RegionStage) -> dict[str, torch.Tensor]:
    return stage.classifier.state_dict()


def changed(run, before: RegionStage) -> set[str]:
    """The parts of the saved model that are not as they were: "vision", "prompts"."""
    old, new = weights_of(before), weights_of(RegionStage.load(run))
    assert old.keys() - {"prompts.tokens"} <= new.keys()
    different = {k.split(".")[0] for k in old if k in new and old[k].shape == new[k].shape and not torch.equal(old[k], new[k])}
    return different


@pytest.fixture(scope="module")
def runs(tmp_path_factory, clip):
    root, rows = tmp_path_factory.mktemp("runs"), {}
    for tune in ("prompts", "all", "all_then_prompts"):
        options = ["--model.clip", str(clip), "--model.tune", tune, "--model.lr", "1e-3", "--model.mask_prompt_depth", "2"]
        rows[tune] = fit.main([*FIT, *options, "--trainer.default_root_dir", str(root / tune)])
    return rows


def test_a_run_leaves_its_record_and_a_region_model(runs, clip):
    run = runs["all_then_prompts"]
    for name in ("config.yaml", "metrics.csv", "checkpoints/last.ckpt", "model/config.json", "model/text_encoder"):
        assert (run / name).exists(), name
    history = json.loads((run / "metrics.json").read_text())["history"]
    assert [row["step"] for row in history] == [2, 4] and all(0 <= row["accuracy"] <= 1 for row in history)
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [0, 1, 2, 3]
    assert not list(run.glob(".*"))


def test_each_way_of_tuning_changes_its_own_part(runs, clip):
    last = {tune: torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for tune, run in runs.items()}
    vision = {name for name in last["all"] if name.startswith("classifier.vision.")}
    assert set(last["prompts"]) == {"classifier.prompts.tokens", "log_scale", "prompts_began"}
    assert set(last["all"]) == vision | {"log_scale", "prompts_began"}
    plain = RegionClassifier(clip).state_dict()
    for tune in ("all", "all_then_prompts"):
        same = {name for name in vision if torch.equal(last[tune][name], plain[name.removeprefix("classifier.")])}
        assert not same, tune  # every tensor of the image side learned
    assert changed(runs["prompts"], RegionStage.load(clip)) == set()
    assert weights_of(RegionStage.load(runs["all"]))["prompts.tokens"].shape[0] == 0


def module_in_use(clip, tune: str, steps: int, callbacks=(), **options) -> tuple[RegionModule, list[dict[str, torch.Tensor]]]:
    """A module that has taken some steps, and its parameters before each."""
    from lightning import Callback, Trainer

    states = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            states.append({k: v.detach().clone() for k, v in pl_module.named_parameters()})

        def on_train_end(self, trainer, pl_module):
            self.on_train_batch_start(trainer, pl_module)

    torch.manual_seed(0)
    module = RegionModule(str(clip), **({"tune": tune, "mask_prompt_depth": 2, "lr": 1e-3, "warmup_steps": 1} | options))
    data = SceneRegions(train_length=20, val_length=2, regions=2, batch_size=2, num_workers=0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"limit_val_batches": 0, "use_distributed_sampler": False}
    trainer = Trainer(max_steps=steps, accelerator="cpu", callbacks=[Watch(), *callbacks], **quiet)
    trainer.fit(module, datamodule=data)
    return module, states


def moved(before: dict, after: dict) -> set[str]:
    return {name.split(".")[1] if "." in name else name for name in before if not torch.equal(before[name], after[name])}


def test_one_stage_after_the_other(clip):
    module, states = module_in_use(clip, "all_then_prompts", 6)
    steps = [moved(a, b) for a, b in pairwise(states)]
    assert steps[:3] == [{"vision", "log_scale"}] * 3
    assert steps[3:] == [{"prompts", "log_scale"}] * 3
    optimizer = module.optimizers(use_pl_optimizer=False)
    taken = {name: int(optimizer.state[p]["step"]) for name, p in module.named_parameters() if p.requires_grad}
    assert taken.pop("log_scale") == 6 and set(taken.values()) == {3}  # no trace of the other stage in Adam's moments


def test_no_gradient_is_computed_that_is_not_used(clip):
    """In the prompts' stage those of the image side would be thrown away."""
    from lightning import Callback

    reached = []

    class Look(Callback):
        def on_after_backward(self, trainer, pl_module):
            reached.append({name.split(".")[1] for name, p in pl_module.named_parameters() if "." in name and p.grad is not None})

    module, _ = module_in_use(clip, "all_then_prompts", 2, [Look()])
    assert reached == [{"vision"}, {"prompts"}]
    assert all(p.requires_grad for p in module.classifier.parameters())  # and a checkpoint has them all


def test_validation_leaves_out_prompts_that_have_not_begun(clip):
    module, _ = module_in_use(clip, "all_then_prompts", 1, all_share=0.9)
    batch = next(iter(SceneRegions(val_length=2, regions=2, num_workers=0).val_dataloader()))
    plain, own = RegionAccuracy(module.accuracy.vocabulary), []
    with torch.no_grad():
        module.classifier.prompts.tokens.fill_(math.nan)
    inner = module.classifier.embed_crops
    module.classifier.embed_crops = lambda *args: own.append(inner(*args)) or own[-1]
    module.validation_step(batch, 0)
    assert own and all(x.isfinite().all() for x in own)
    plain.update(module.region_stage().classifier, module.text, batch)
    assert torch.equal(module.accuracy.right, plain.right) and module.accuracy.total.sum() > 0


def test_the_second_stage_is_that_of_a_run_of_its_own(clip, tmp_path):
    """Prompts tuned after the image side in one run learn as prompts tuned on its result."""
    module, states = module_in_use(clip, "all_then_prompts", 4)
    vision = {k: v for k, v in states[2].items() if k.startswith("classifier.vision")}
    assert all(torch.equal(v, dict(module.named_parameters())[k]) for k, v in vision.items())
    folder = module.region_stage().save(tmp_path / "model")
    again = RegionModule(str(folder), tune="prompts", mask_prompt_depth=2)
    assert torch.equal(again.classifier.prompts.tokens, module.classifier.prompts.tokens)
    fresh = RegionModule(str(folder), tune="prompts", mask_prompt_depth=1)  # another depth begins anew, on the same image side
    assert fresh.classifier.prompts.tokens.shape[0] == 1 and not fresh.prompts_began
    old, new = module.classifier.vision.state_dict(), fresh.classifier.vision.state_dict()
    assert all(torch.equal(v, old[k]) for k, v in new.items())


def test_prompts_that_have_not_begun_are_not_saved(clip):
    module, _ = module_in_use(clip, "all_then_prompts", 4, all_share=0.9)  # its last step but none is the prompts'
    assert module.stage_steps == {"all": (0, 4), "prompts": (4, 4)}
    assert module.region_stage().classifier.prompts.depth == 0
    assert module_in_use(clip, "prompts", 1)[0].region_stage().classifier.prompts.depth == 2


def test_the_scale_stays_in_its_bounds(clip):
    module, _ = module_in_use(clip, "prompts", 2, scale=100.0, prompt_lr=5.0)
    assert 0 <= module.log_scale.item() <= math.log(100) + 1e-6


@pytest.mark.parametrize(("tune", "began"), [("prompts", [True, True]), ("all_then_prompts", [False, True])])
def test_what_a_checkpoint_is_made_of_is_as_the_next_step_finds_it(clip, tune, began):
    """Checkpoints are saved by callbacks, whose hooks at a batch's end come before the module's."""
    from lightning import Callback

    saved, found = [], []

    def state(module) -> tuple[bool, float]:
        return bool(module.prompts_began), module.log_scale.item()

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            saved.append(state(pl_module))

        def on_train_batch_start(self, trainer, pl_module, *_):
            found.append(state(pl_module))

    # Rates that take the scale past a bound at once, wherever its gradient points.
    module, _ = module_in_use(clip, tune, 2, [Save()], scale=100.0, prompt_lr=9.0, **({} if tune == "prompts" else {"lr": 9.0}))
    assert saved == [*found[1:], state(module)] and [b for b, _ in saved] == began
    assert all(s == 0 or s == pytest.approx(math.log(100)) for _, s in saved[:1])


def test_matrices_decay_and_the_rest_does_not(clip):
    module, _ = module_in_use(clip, "all_then_prompts", 1, all_share=0.5)
    for group in module.optimizers(use_pl_optimizer=False).param_groups:
        dims = {p.ndim for p in group["params"]}
        is_prompts = any(p is module.classifier.prompts.tokens for p in group["params"])
        assert group["weight_decay"] == (0.2 if min(dims) >= 2 and not is_prompts else 0.0)
        assert group["betas"] == (0.9, 0.98) and group["eps"] == 1e-6
    counted = sum(p.numel() for g in module.optimizers(use_pl_optimizer=False).param_groups for p in g["params"])
    assert counted == sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_a_killed_run_goes_on_as_if_it_had_not_stopped(runs, clip, tmp_path):
    options = ["--model.clip", str(clip), "--model.lr", "1e-3", "--model.mask_prompt_depth", "2"]
    folder = ["--trainer.default_root_dir", str(tmp_path / "run"), "--save_every", "3"]

    class Killed(Exception):
        pass

    def kill(self, *_):
        if self.global_step == 3:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RegionModule, "on_train_batch_start", kill)
        fit.main([*FIT, *options, *folder])
    run = fit.main([*FIT, *options, *folder, "--ckpt_path", "last"])
    whole, resumed = (torch.load(r / "checkpoints" / "last.ckpt", weights_only=True) for r in (runs["all_then_prompts"], run))
    assert whole["global_step"] == resumed["global_step"] == 4
    assert all(torch.equal(v, resumed["state_dict"][k]) for k, v in whole["state_dict"].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": "none"}, "tune, repeated_nouns: got 'none'"),
        ({"repeated_nouns": "yes"}, "got 'all_then_prompts', 'yes'"),
        ({"tune": "prompts", "mask_prompt_depth": 0}, "mask_prompt_depth: got 0, want 1 or more"),
        ({"mask_prompt_depth": 9}, "got 9, want at most 4"),
        ({"all_share": 1.0}, "all_share, scale: got 1.0"),
        ({"clip": "nowhere/at-all/x"}, "cannot open"),
    ],
)
def test_options_that_make_no_sense(clip, options, message):
    with pytest.raises(InputError, match=message) as caught:
        RegionModule(**({"clip": str(clip)} | options))
    assert "\n" not in str(caught.value)


# ---- accuracy


def test_accuracy_by_loop(clip):
    stage, data = RegionStage.load(clip), SceneRegions(test_length=6, eval_batch_size=4, num_workers=0)
    accuracy = RegionAccuracy(data.vocabulary, data.class_groups)
    names = stage.text.encode(data.vocabulary.names).pooled[0]
    right: dict[int, list[bool]] = {}
    for batch in data.test_dataloader():
        accuracy.update(stage.classifier, stage.text, batch)
        for image, mask, c in zip(batch["images"], batch["masks"], batch["classes"].tolist(), strict=True):
            with torch.no_grad():
                logits, _ = stage.classifier(image[None].float() / 255, mask[None, None].float(), names[None])
            right.setdefault(c, []).append(int(logits[0, 0].argmax()) == c)
    found = accuracy.compute()
    every = [x for some in right.values() for x in some]
    assert found["accuracy"] == pytest.approx(np.mean(every))
    assert found["class_accuracy"] == pytest.approx(np.mean([np.mean(some) for some in right.values()]))
    held = {c for some in data.class_groups.values() for c in some}
    assert found["accuracy_seen"] == pytest.approx(np.mean([x for c, some in right.items() if c not in held for x in some]))


def test_accuracy_leaves_out_what_is_undefined():
    accuracy = RegionAccuracy(Vocabulary.of(["a", "b"]), {"word": [1]})
    accuracy.total, accuracy.right = torch.tensor([4, 0]), torch.tensor([1, 0])
    with pytest.warns(UserWarning, match="update"):
        assert accuracy.compute() == {"accuracy": 0.25, "class_accuracy": 0.25, "accuracy_seen": 0.25}


# ---- data


def test_cuts_hold_the_region_and_enough_of_its_box():
    rng = np.random.default_rng(0)
    mask, image = torch.zeros(60, 80, dtype=torch.bool), torch.arange(60 * 80).reshape(1, 60, 80).expand(3, 60, 80)
    mask[10:50, 20:40] = True
    whole, inside = cut(image, mask, 1.0)
    assert torch.equal(whole, image[:, 10:50, 20:40]) and inside.all()
    assert cut(image, mask, 1.5)[0].shape[1:] == (60, 30)
    shapes = set()
    for _ in range(200):
        window, inside = cut(image, mask, 1.0, 0.8, rng)
        y, x = divmod(int(window[0, 0, 0]), 80)
        assert torch.equal(window, image[:, y : y + window.shape[1], x : x + window.shape[2]]) and inside.all()
        assert inside.numel() >= 0.76 * 800  # sides are whole pixels
        shapes.add(inside.shape)
    assert len(shapes) > 20
    mask[:] = False
    mask[0, 0] = mask[59, 79] = True
    assert all(cut(image, mask, 1.0, 0.5, rng)[1].any() for _ in range(100))


@pytest.mark.parametrize("names", ["class", "phrase"])
def test_scene_regions(names):
    data = SceneRegions(names, regions=3, train_length=10, val_length=4, test_length=6, num_workers=0)
    train, test = data.dataset("train"), data.dataset("test")
    item, again, later = train[(0, 2)], train[(0, 2)], train[(1, 2)]
    assert len(item["images"]) == len(item["nouns"]) == 3
    assert all(torch.equal(a, b) for a, b in zip(item["images"], again["images"], strict=True))
    assert item["nouns"] != later["nouns"] or item["images"][0].shape != later["images"][0].shape
    seen = {data.vocabulary.names[c] for c in data.vocabulary.seen}
    nouns = {noun for i in range(10) for noun in train[(0, i)]["nouns"]}
    assert nouns <= seen if names == "class" else nouns - seen
    assert not any(word in noun for noun in nouns for word in ("star", "heart", "gravel"))
    groups = {c for i in range(6) for c in test[i]["classes"]}
    assert groups & set(data.vocabulary.unseen)  # the test split asks what is held out, too
    batch = collate([test[0], test[1]])
    assert len(batch["images"]) == len(batch["masks"]) == len(batch["nouns"]) == len(batch["classes"])
    for noun, c in zip(batch["nouns"], batch["classes"].tolist(), strict=True):
        assert data.vocabulary.names[c] == noun


@pytest.fixture
def mined(tmp_path):
    """A file of 40 pairs of 20 images."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for n in range(20):
            Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(tmp_path / f"images/{n}.png")
            for noun in ("cat", ("dog", "tree", "sky")[n % 3]):
                mask = np.zeros((30, 40), bool)
                mask[n : n + 6, 5:25] = True
                size = {"image_width": 40, "image_height": 30, "x": 5, "y": n, "width": 20, "height": 6, "area": 120}
                row = {"image": f"{n}.png", "noun": noun, "score": round(0.1 + n / 100, 2), "caption": 'a, "b"'}
                writer.writerow(row | size | {"counts": rle.encode(mask)["counts"]})
    return tmp_path


def test_pairs(mined):
    data = Pairs(str(mined / "pairs.csv"), str(mined / "images"), val_fraction=0.3, batch_size=4, num_workers=0)
    assert data.vocabulary.names == ["cat", "dog", "sky", "tree"]
    train, val = data.dataset("train"), data.dataset("val")
    assert len(train) + len(val) == 40 and len(val) > 0
    assert not {row["image"] for row in train.rows} & {row["image"] for row in val.rows}
    item = val[0]
    assert item["images"][0].shape == (3, 6, 20) and item["masks"][0].all()
    assert data.vocabulary.names[item["classes"][0]] == item["nouns"][0]
    assert len(next(iter(data.train_dataloader()))["images"]) == 4
    assert len(Pairs(str(mined / "pairs.csv"), str(mined / "images"), 0.3, min_score=0.2).rows["train"]) < len(train)


def test_a_run_on_pairs(mined, clip):
    options = ["--data", "pmpseg.data.Pairs", "--data.pairs", str(mined / "pairs.csv"), "--data.images", str(mined / "images")]
    options += ["--data.val_fraction", "0.3", "--data.batch_size", "6", "--data.num_workers", "0", "--model.tune", "prompts"]
    short = "--model pmpseg.training.RegionModule --trainer.max_steps 2 --trainer.enable_progress_bar false"
    options += ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(mined / "run")]
    run = fit.main([*short.split(), "--model.clip", str(clip), *options])
    assert RegionStage.load(run).classifier.prompts.depth == 3


def spoil(path, line: int, old: str, new: str) -> None:
    lines = path.read_text().splitlines()
    assert old in lines[line]
    lines[line] = lines[line].replace(old, new, 1)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda p: (p / "pairs.csv").unlink(), "no such file: make it with"),
        (lambda p: (p / "pairs.csv").rename(p / "pairs.part.csv"), "run scripts/mine_pairs.py again to finish"),
        (lambda p: (p / "pairs.csv").write_text(",".join(COLUMNS) + "\n"), "holds no pair"),
        (lambda p: (p / "pairs.csv").write_text(""), "not a file of pairs"),
        (lambda p: (p / "pairs.csv").write_text("filepath,title\na,b\n"), "not a file of pairs: got columns"),
        (lambda p: spoil(p / "pairs.csv", 3, "cat,", ""), "line 4: it has not 12 columns"),
        (lambda p: spoil(p / "pairs.csv", 3, "cat,", " ,"), "line 4: the noun is empty"),
        (lambda p: spoil(p / "pairs.csv", 5, ",30,", ",31,"), "line 6: the runs of an RLE add up"),
        (lambda p: spoil(p / "pairs.csv", 5, ",0.12,", ",much,"), "line 6: could not convert"),
        (lambda p: spoil(p / "pairs.csv", 5, ",0.12,", ",nan,"), "line 6: the score is nan"),
        (lambda p: (p / "images/7.png").unlink(), "no image .*7.png"),
    ],
)
def test_broken_pairs_are_one_line(mined, do, message):
    do(mined)
    with pytest.raises(InputError, match=message) as caught:
        Pairs(str(mined / "pairs.csv"), str(mined / "images"), 0.3)
    assert "\n" not in str(caught.value)


def test_an_image_of_another_size(mined):
    assert len(read_pairs(mined / "pairs.csv")) == 40
    data = Pairs(str(mined / "pairs.csv"), str(mined / "images"), 0.3)
    first = data.dataset("train").rows[0]["image"]
    Image.new("RGB", (41, 30)).save(mined / "images" / first)
    with pytest.raises(InputError, match="41 x 30 pixels, its pair says 40 x 30"):
        data.dataset("train")[0]
    with pytest.raises(InputError, match="leave none for val"):
        Pairs(str(mined / "pairs.csv"), str(mined / "images"), 1e-6)
    with pytest.raises(InputError, match="no pair has a score"):
        Pairs(str(mined / "pairs.csv"), str(mined / "images"), min_score=0.9)
