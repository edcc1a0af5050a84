"""Every file of conf/ makes one training step and one validation offline, under the debug presets, with tiny stand-ins.

(conf/eval is stepped in test_protocols.py, conf/ablation in test_ablate.py.)
"""

import csv
import json
import math
import socket
from pathlib import Path

import coco_stuff_fixture
import numpy as np
import pytest
import timm
import yaml
from phrasecut_fixture import write_phrasecut
from PIL import Image

from pmpseg import Segmenter, fit, rle
from pmpseg.data.pairs import COLUMNS
from pmpseg.losses import SetLoss
from pmpseg.region_stage import RegionStage
from pmpseg.vocabulary import Vocabulary

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
WHOLE, ON_TOP = [], []
for path in sorted(CONF.glob("*.yaml")):
    (WHOLE if "class_path" in yaml.safe_load(path.read_text())["model"] else ON_TOP).append(path.stem)
BASE = "pmp_coco_stuff"
RUNS = [[name] for name in WHOLE] + [[BASE, name] for name in ON_TOP] + [[BASE, "pmp_coco_stuff_swin_t", "pmp_coco_stuff_blind"]]
PRESETS = {"PMPModule": "offline_pmp", "CLIPSegModule": "offline_clipseg", "RegionModule": "offline_region"}
# A backbone of the same kind, in one layer of each stage.
SHALLOW = {
    "resnet": {"layers": [1, 1, 1, 1]},
    "swin": {"depths": [1, 1, 1, 1], "embed_dim": 16, "num_heads": [1, 1, 2, 2]},
    "convnext": {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32]},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What each data class is told besides its file: where its data lies, in the official layout, and that it is small."""
    root = tmp_path_factory.mktemp("data")
    small = {"image_size": 64, "batch_size": 2, "num_workers": 0}
    crop = small | {"crop_size": [64, 64]}
    things = str(write_things(root / "things"))
    return {
        "CocoStuff": crop | {"root": str(coco_stuff_fixture.make(root / "coco", 6, 2)), "expect": None},
        "PhraseCut": small | {"root": str(write_phrasecut(root / "phrasecut", scenes=4))},
        "Scenes": small | {"train_length": 4, "val_length": 2, "test_length": 2},
        "SceneRegions": {"train_length": 4, "val_length": 2, "batch_size": 2, "num_workers": 0},
        "Pairs": write_pairs(root / "pairs") | {"batch_size": 4, "val_fraction": 0.3, "num_workers": 0},
        "CocoPhrases": small | {"root": things},
        "pmp_camvid": crop | {"root": str(write_masks(root / "masks", 11))},
        "pmp_coco_small": crop | {"root": things},
    }


def write_masks(folder: Path, classes: int) -> Path:
    for stem in range(6):
        labels = np.random.default_rng(stem).integers(0, classes + 1, (4, 5), dtype=np.uint8).repeat(20, 0).repeat(20, 1)
        for kind, array in (("images", np.stack([labels * 20] * 3, -1)), ("masks", labels)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / kind / f"{stem}.png")
    return folder


def noise(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def write_things(folder: Path) -> Path:
    """COCO's 80 things: four images for training and two for validation, of two rectangles each."""
    names = Vocabulary.read(CONF / "vocab/coco_instances.txt").names
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for split, numbers in (("train", range(1, 5)), ("val", range(5, 7))):
        images, annotations = [], []
        for n in numbers:
            noise(n, 80, 100).save(folder / f"images/{n}.jpg")
            images.append({"id": n, "file_name": f"{n}.jpg", "height": 80, "width": 100})
            for k, x in enumerate((5, 55)):
                polygon = [x, 10, x + 40, 10, x + 40, 70, x, 70]
                about = {"id": 10 * n + k, "image_id": n, "category_id": 1 + (n + k) % 3, "iscrowd": 0, "area": 2400}
                annotations.append(about | {"bbox": [x, 10, 40, 60], "segmentation": [polygon]})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return folder


def write_pairs(folder: Path) -> dict:
    (folder / "images").mkdir(parents=True)
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for n in range(16):
            noise(n, 30, 40).save(folder / f"images/{n}.png")
            mask = np.zeros((30, 40), bool)
            mask[n : n + 6, 5:25] = True
            size = {"image_width": 40, "image_height": 30, "x": 5, "y": n, "width": 20, "height": 6, "area": 120}
            row = {"image": f"{n}.png", "noun": ("dog", "tree", "sky")[n % 3], "score": 0.3, "caption": "a"}
            writer.writerow(row | size | {"counts": rle.encode(mask)["counts"]})
    return {"pairs": str(folder / "pairs.csv"), "images": str(folder / "images")}


def merged(names: list[str]) -> dict:
    """The chosen classes and the backbone."""
    layers = [yaml.safe_load((CONF / f"{name}.yaml").read_text()) for name in names]
    arguments = {k: v for layer in layers for k, v in layer["model"].get("init_args", {}).items()}
    kind, data = (layers[0][key]["class_path"].rpartition(".")[2] for key in ("model", "data"))
    return {"model": kind, "data": data, "backbone": arguments.get("backbone", "")}


def no_network(*_):
    raise AssertionError("something asks the network")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.chdir(ROOT)  # where conf/vocab/... is found from
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)


def one_step(names: list[str], places: dict, folder: Path, **of_data) -> tuple[dict, Path]:
    """Runs the merged files under the presets; returns what they chose and the run's folder."""
    chosen = merged(names)
    tiny: dict = {"data": {"init_args": (places.get(names[0]) or places[chosen["data"]]) | of_data}}
    shallow = next((options for kind, options in SHALLOW.items() if chosen["backbone"].startswith(kind)), None)
    if shallow and chosen["model"] == "PMPModule":
        tiny["model"] = {"init_args": {"backbone_options": shallow}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    files = [CONF / f"{name}.yaml" for name in names]
    files += [CONF / f"debug/{name}.yaml" for name in ("one_batch", "cpu", PRESETS[chosen["model"]])] + [folder / "tiny.yaml"]
    last = "--trainer.enable_progress_bar false --trainer.log_every_n_steps 1 --encoders reference".split()
    last += ["--trainer.default_root_dir", str(folder / "run")]
    return chosen, fit.main([*(word for file in files for word in ("-c", str(file))), *last])


def losses_of(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.parametrize("names", RUNS, ids="+".join)
def test_one_step_offline(names, places, tmp_path, offline):
    chosen, run = one_step(names, places, tmp_path)
    (loss,) = losses_of(run)
    assert math.isfinite(loss)
    model = RegionStage.load(run) if chosen["model"] == "RegionModule" else Segmenter.load(run / "model")
    assert model.text.dim > 0


def test_one_step_on_instances(places, tmp_path, offline, monkeypatch):
    """data.segments things: each thing is a target of its own, and so there are more of them than prompts that are there."""
    seen, forward = [], SetLoss.forward

    def watched(self, *args):
        seen.append((args[2], args[5]))  # present and prompt, (B, M) each
        return forward(self, *args)

    monkeypatch.setattr(SetLoss, "forward", watched)
    monkeypatch.setattr("pmpseg.training.pmp.keep_few", lambda valid, *_: valid)
    _, run = one_step([BASE], places, tmp_path, segments="things", batch_size=6, scale=[0.5, 0.6])  # the whole image
    (loss,) = losses_of(run)
    assert math.isfinite(loss)
    ((present, prompt),) = seen
    shared = [len(row[here]) - len(row[here].unique()) for here, row in zip(present, prompt, strict=True)]
    assert sum(shared) > 0


def test_files_on_top_are_known():
    """Those that hold only what differs all belong to one base, and every preset is tried above, or below."""
    assert all(name.startswith(f"{BASE}_") for name in ON_TOP) and len(ON_TOP) >= 4
    assert {p.stem for p in (CONF / "debug").glob("*.yaml")} == {*PRESETS.values(), "cpu", "one_batch", "overfit"}


def test_ten_images_are_learned_by_heart(tmp_path, places, monkeypatch):
    """The preset on top of an experiment: ten images, the same in each epoch, and their loss falls."""
    monkeypatch.chdir(ROOT)
    files = ["-c", "conf/pmp_scenes.yaml", "-c", "conf/debug/overfit.yaml"]
    options = "--data.image_size 64 --data.train_length 40 --data.val_length 2 --data.num_workers 0 --trainer.max_epochs 8"
    options += " --trainer.enable_progress_bar false --trainer.log_every_n_steps 1 --model.num_points 128"
    run = fit.main([*files, *options.split(), "--trainer.default_root_dir", str(tmp_path)])
    losses = losses_of(run)
    assert len(losses) == 8 * 5 and np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_weights_of_timm_that_the_files_name_are_there():
    """Each name is one that timm has pretrained weights for."""
    names = set()
    for path in CONF.glob("*.yaml"):
        arguments = yaml.safe_load(path.read_text())["model"].get("init_args", {})
        if arguments.get("backbone_weights") == "timm" or path.stem in ON_TOP:
            names |= {arguments["backbone"]} if "backbone" in arguments else set()
    assert len(names) == 5 and names <= set(timm.list_models(pretrained=True))
