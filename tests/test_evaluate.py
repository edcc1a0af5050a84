"""``evaluate`` on benchmarks: an independent score in numpy, several processes, what it saves, refuses, and never sees."""

import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_several_processes import free_port, needs_fork

from pmpseg import Segmenter, evaluate
from pmpseg.benchmarks import BENCHMARKS
from pmpseg.data import Benchmark, Scenes
from pmpseg.errors import InputError
from pmpseg.models import PMP, CLIPSeg, Prompts, TextEncoder
from pmpseg.models.prompts import PixelPrediction
from pmpseg.report import rows
from pmpseg.views import Views
from pmpseg.vocabulary import TEMPLATES, Vocabulary

TINY = {"backbone": "conv", "dim": 32, "num_queries": 16, "num_layers": 2, "num_heads": 4, "ffn_dim": 32}
COUNT = 847
ONE = ("--benchmark", "pascal_voc_20")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of a PMP that nobody trained, and that has learned the names of two classes of VOC."""
    torch.manual_seed(0)
    text = TextEncoder(evaluate_text())
    network = PMP(text_dim=text.dim, **TINY, named_by="query")
    decoder = network.query_decoder
    with torch.no_grad():  # queries that differ in what they are called and in where they are, and seldom name nothing
        for weight in (decoder.query, decoder.query_position):
            weight.normal_()
        for layer in (decoder.mask_head[0], decoder.mask_head[2], decoder.name_head[0]):
            layer.weight.normal_(0, 0.3)
        decoder.name_head[-1].weight.normal_()
        decoder.mask_head[-1].weight.mul_(10)
        decoder.log_scale.fill_(4.6)
        decoder.no_object.copy_(-text.encode(["dog", "sky", "chair"]).pooled[0].mean(0))
    folder = tmp_path_factory.mktemp("pmp") / "model"
    Segmenter(network, text, Vocabulary.of(["dog", "cow", "grass"], unseen=[1]), 48).save(folder)
    return folder


def evaluate_text() -> str:
    from pmpseg.hub import shipped_or

    return shipped_or("tiny_clip")


def classes_in(folder: Path) -> int:
    """How many classes occur in saved class maps: a map of one class would hide what is tested."""
    return len(set().union(*(np.unique(np.array(Image.open(path))).tolist() for path in folder.rglob("*.png"))))


def make_847(root: Path, count: int) -> Path:
    """A-847 as it is prepared: PNGs whose colours tell the class, 16-bit label maps, some pixels ignored."""
    rng = np.random.default_rng(0)
    base = root / "ADE20K_2021_17_01" / "benchmark_847" / "validation"
    for kind in ("images", "annotations"):
        (base / kind).mkdir(parents=True)
    for n in range(count):
        classes = rng.choice(COUNT, 12, replace=False)
        labels = classes[rng.integers(0, 12, (6, 8))].repeat(6, 0).repeat(6, 1).astype(np.uint16)  # blocks of 6 pixels
        colour = np.stack([labels // 30 * 8, labels % 30 * 8, np.full_like(labels, n)], -1).astype(np.uint8)
        labels[rng.random(labels.shape) < 0.1] = 65535
        Image.fromarray(colour).save(base / "images" / f"{n:03}.png")
        Image.fromarray(labels).save(base / "annotations" / f"{n:03}.png")
    return root


class Reader(torch.nn.Module):
    """A network that reads the class off a pixel's colour, and is wrong at a third of the pixels."""

    by_pixel, stride, pad = True, 1, 1

    def __init__(self):
        super().__init__()
        self.some = torch.nn.Parameter(torch.zeros(3))

    def encode(self, image):
        red, green = (image[:, :2] * 255).round().long().unbind(1)
        right = red // 8 * 30 + green // 8  # (B, H, W)
        g = torch.Generator().manual_seed(int(image.sum()))
        other = torch.randint(0, COUNT, right.shape, generator=g)
        return torch.where(torch.rand(right.shape, generator=g) < 1 / 3, other, right)

    def decode(self, labels, prompts):
        scores = torch.full((len(labels), prompts.valid.shape[1], *labels.shape[1:]), -5.0)
        return PixelPrediction(scores.scatter(1, labels[:, None], 5.0))


class Nothing(torch.nn.Module):
    normalize, templates = True, ("{}",)

    def encode(self, words):
        count, valid = len(words), torch.ones(1, len(words), dtype=torch.bool)
        return Prompts(torch.zeros(1, count, 1, 4), valid[..., None], torch.zeros(1, count, 4), valid)


def test_847_classes_against_plain_numpy(tmp_path):
    """50 predicted maps, read back from disk and scored by a few lines: both rules, to 1e-6."""
    data = Benchmark("ade20k_847", str(make_847(tmp_path, 50)), image_size=36, num_workers=0)
    assert data.remark == "50 of 2,000 images"
    segmenter = Segmenter(Reader(), Nothing(), None, 36)
    scores = evaluate.evaluate(segmenter, data, save_labels=tmp_path / "labels")

    matrix = np.zeros((COUNT, COUNT), dtype=np.int64)
    for path in sorted((tmp_path / "labels").iterdir()):
        truth = np.array(Image.open(tmp_path / "ADE20K_2021_17_01/benchmark_847/validation/annotations" / path.name)).astype(int)
        found = np.array(Image.open(path)).astype(int)
        counted = truth != 65535
        np.add.at(matrix, (truth[counted], found[counted]), 1)
    hit, truth, found = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    union = truth + found - hit
    iou = hit / np.maximum(union, 1)
    assert 0.4 < iou[truth > 0].mean() < 0.7 and ((truth == 0) & (found > 0)).sum() > 50  # classes that are only predicted
    assert scores["miou"] == pytest.approx(iou[truth > 0].mean(), abs=1e-6)
    assert scores["miou_v06"] == pytest.approx(iou[union > 0].mean(), abs=1e-6)
    assert scores["pixel_accuracy"] == pytest.approx(hit.sum() / matrix.sum(), abs=1e-6)
    assert scores["fwiou"] == pytest.approx((iou * truth).sum() / truth.sum(), abs=1e-6)
    np.testing.assert_allclose(scores["iou"].numpy(), np.where(truth > 0, iou, np.nan), atol=1e-6)
    assert scores["usage"]["images"] == 50

    evaluate.evaluate(segmenter, data, save_labels=tmp_path / "whole", chunk=COUNT)  # all classes at once: the same labels
    assert all(path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes() for path in (tmp_path / "labels").iterdir())


def test_the_truth_is_not_seen(model, tmp_path, monkeypatch):
    """With other label maps the same images give the same answers: prompts are the list, whatever is on the image."""
    from pmpseg.data.benchmark import BenchmarkDataset

    data = Benchmark("ade20k_847", str(make_847(tmp_path, 3)), image_size=36, num_workers=0)
    segmenter = Segmenter.load(model)
    evaluate.evaluate(segmenter, data, save_labels=tmp_path / "true")
    item = BenchmarkDataset.item

    def shuffled(self, index, epoch):
        found = item(self, index, epoch)
        return found | {"labels": (found["labels"] + 100) % COUNT}

    monkeypatch.setattr(BenchmarkDataset, "item", shuffled)
    evaluate.evaluate(segmenter, data, save_labels=tmp_path / "false")
    assert classes_in(tmp_path / "true") > 1
    for path in (tmp_path / "true").iterdir():
        assert path.read_bytes() == (tmp_path / "false" / path.name).read_bytes()


# ---- the command


def make_voc(root: Path, count: int = 7) -> Path:
    """VOC 2012 as it was released, images of several sizes."""
    rng = np.random.default_rng(1)
    base = root / "VOCdevkit" / "VOC2012"
    for kind in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / kind).mkdir(parents=True)
    for n in range(count):
        size = (40 + n, 52)
        labels = rng.integers(0, 21, (5, 4)).repeat(10, 0).repeat(13, 1)[: size[0]].astype(np.uint8)
        labels = np.pad(labels, ((0, max(0, size[0] - len(labels))), (0, 0)), constant_values=255)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(base / "JPEGImages" / f"{n}.jpg")
        Image.fromarray(labels).save(base / "SegmentationClass" / f"{n}.png")
    (base / "ImageSets/Segmentation/val.txt").write_text("\n".join(map(str, range(count))))
    return root


@pytest.fixture(scope="module")
def voc(tmp_path_factory) -> Path:
    return make_voc(tmp_path_factory.mktemp("data"))


def options(model, voc, out, *more) -> list[str]:
    common = [str(model), "--root", str(voc), "--out", str(out), "--device", "cpu", "--num-workers", "0"]
    return [*common, "--benchmark", "pascal_voc_20,pascal_voc_21", *more]


def test_the_command_prints_and_saves(model, voc, tmp_path, capsys):
    found = evaluate.main(options(model, voc, tmp_path, "--name", "untrained", "--save-labels", str(tmp_path / "labels")))
    printed = capsys.readouterr().out
    saved = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("pascal_voc_20", "pascal_voc_21")}
    for name, scores in found.items():
        assert saved[name]["miou"] == pytest.approx(scores["miou"], abs=1e-5)
        assert {"miou", "miou_v06", "miou_seen", "miou_unseen", "hiou", "pixel_accuracy"} <= scores.keys()
        one = saved[name]
        assert one["benchmark"] == name and one["root"] == str(voc) and one["remark"] == "7 of 1,449 images"
        assert one["image_size"] == 48 and one["views"]["scales"] == [1.0] and len(one["weights_sha256"]) == 64
        assert one["versions"]["torch"] == version("torch")
        assert one["usage"]["images"] == 7 and one["usage"]["images_per_second"] > 0 and one["usage"]["peak_memory_gib"] > 0.1
        network = Segmenter.load(model).network
        assert one["usage"]["parameters"]["network"] == sum(p.numel() for p in network.parameters())
    names = list(saved["pascal_voc_20"]["classes"])
    assert set(names) - set(saved["pascal_voc_20"]["unseen"]) == {"dog"}  # "cow" had no masks in training
    percent = [f"{100 * found[name]['miou']:.1f}" for name in saved]
    wanted = f"| untrained | classes in the ground truth (miou: detectron2 since July 2022) | {' | '.join(percent)} |"
    assert wanted in printed and wanted in (tmp_path / "table.md").read_text()
    assert "not the whole benchmark: 7 of 1,449 images" in printed and "images/s" in printed
    labels = np.array(Image.open(tmp_path / "labels" / "pascal_voc_20" / "3.png"))
    assert labels.shape == (43, 52) and labels.dtype == np.uint8 and labels.max() < 20


def as_rank(rank: int, world: int, port: int, args: list[str]) -> None:
    torch.set_num_threads(1)
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in values.items()})
    evaluate.main(args)


def in_processes(world: int, args: list[str], timeout: float = 100) -> None:
    """As torchrun would start them."""
    context = torch.multiprocessing.start_processes(
        as_rank, (world, free_port(), args), nprocs=world, start_method="fork", join=False
    )
    deadline = time.monotonic() + timeout
    while not context.join(1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{world} processes hang")


@needs_fork
def test_any_number_of_processes_gives_the_same_numbers(model, voc, tmp_path):
    """7 images on 1, 2 and 3 processes: all numbers, by class too, are equal, and no image counts twice."""
    evaluate.main(options(model, voc, tmp_path / "1", "--flip", "--save-labels", str(tmp_path / "labels")))
    assert classes_in(tmp_path / "labels") > 3
    one = json.loads((tmp_path / "1" / "pascal_voc_20.json").read_text())
    for world in (2, 3):
        in_processes(world, options(model, voc, tmp_path / str(world), "--flip"))
        for name in ("pascal_voc_20", "pascal_voc_21"):
            one, many = (json.loads((tmp_path / str(n) / f"{name}.json").read_text()) for n in (1, world))
            assert many["usage"]["images"] == 7 and many["usage"]["processes"] == world
            scores = {key for key in one if "iou" in key or "accuracy" in key}
            assert scores >= {"miou", "miou_v06", "miou_seen", "miou_unseen", "hiou", "pixel_accuracy", "iou"}
            assert {key: many[key] for key in scores} == {key: one[key] for key in scores}, (world, name)
        assert (tmp_path / str(world) / "table.md").read_text() == (tmp_path / "1" / "table.md").read_text()


def run(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pmpseg.evaluate", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_devices_2_on_the_command_line(model, voc, tmp_path):
    found = run(*options(model, voc, tmp_path, "--devices", "2"))
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.count("saved: ") == 2 and found.stdout.count("| model |") == 1  # one process speaks
    assert json.loads((tmp_path / "pascal_voc_20.json").read_text())["usage"]["processes"] == 2


def test_what_goes_wrong_in_one_process_only(model, tmp_path):
    """The others wait for it in vain; what is said is its own reason, and not that the connection is lost."""
    root = make_voc(tmp_path / "data", 24)
    broken = root / "VOCdevkit/VOC2012/SegmentationClass/5.png"  # of rank 1, and not one of the maps that are read at start
    Image.fromarray(np.full((45, 52), 77, np.uint8)).save(broken)
    found = run(*options(model, root, tmp_path / "out", "--devices", "2", *ONE))
    lines = [line for line in found.stderr.splitlines() if line.startswith("pmpseg: ")]
    assert found.returncode == 2 and len(lines) == 1 and "Traceback" not in found.stderr
    assert "process 1 of 2 failed: " in lines[0] and "5.png" in lines[0] and "77" in lines[0]
    assert not (tmp_path / "out").exists()


def test_windows_and_scales_reach_the_network(model, voc, tmp_path):
    """The command's views are those of ``Views``: the same labels as from the parts put together by hand."""
    from pmpseg.inference import ask_together, with_synonyms
    from pmpseg.views import look, merged_labels

    views = Views(window=32, overlap=0.25, weights="uniform", scales=(1.0, 1.5), flip=True)
    more = "--window 32 --overlap 0.25 --window-weights uniform --scales 1,1.5 --flip".split()
    evaluate.main(options(model, voc, tmp_path, *more, "--save-labels", str(tmp_path / "labels")))
    assert json.loads((tmp_path / "pascal_voc_20.json").read_text())["views"]["scales"] == [1, 1.5]
    segmenter, data = Segmenter.load(model), Benchmark("pascal_voc_20", str(voc), 48, num_workers=0)
    data.eval_scales = views.scales
    item = data.dataset("test")[2]
    images = [image[None].float() / 255 for image in item["scaled"]]
    assert [tuple(image.shape[-2:]) for image in images] == [(48, 59), (72, 89)]
    prompts = segmenter.text.encode(with_synonyms(data.vocabulary.names, data.vocabulary))

    def ask(image):
        return ask_together(segmenter.network, segmenter.network.encode(image), prompts)

    with torch.no_grad():
        wanted = merged_labels(list(look(images, views, ask)), tuple(item["labels"].shape))[0].numpy()
    assert len(np.unique(wanted)) > 1
    assert np.array_equal(np.array(Image.open(tmp_path / "labels" / "pascal_voc_20" / "2.png")), wanted)
    evaluate.main(options(model, voc, tmp_path, "--save-labels", str(tmp_path / "plain"), *ONE))
    assert not np.array_equal(np.array(Image.open(tmp_path / "plain" / "pascal_voc_20" / "2.png")), wanted)


def test_two_stages_and_their_weight(model, tmp_path):
    """Weight 0 is the first stage by itself, CLIP says something else, and "paper" is OVSeg's weight of the benchmark."""
    few = make_voc(tmp_path / "data", 2)
    scores = {}
    for weight in ("0", "1", "paper"):
        evaluate.main(options(model, few, tmp_path / weight, "--region", "tiny_clip", "--ensemble-weight", weight, *ONE))
        scores[weight] = json.loads((tmp_path / weight / "pascal_voc_20.json").read_text())
    evaluate.main(options(model, few, tmp_path / "alone", *ONE))
    alone = json.loads((tmp_path / "alone" / "pascal_voc_20.json").read_text())
    assert scores["0"]["iou"] == alone["iou"] and "second_stage" not in alone
    assert scores["paper"]["second_stage"]["weight"] == BENCHMARKS["pascal_voc_20"].region_weight == 0.6
    assert scores["1"]["iou"] != alone["iou"] != scores["paper"]["iou"]
    assert scores["1"]["usage"]["parameters"]["region"] > 0
    args = ["--region", "tiny_clip", "--ensemble-weight", "1", "--region-templates", "vild", *ONE]
    evaluate.main(options(model, few, tmp_path / "vild", *args))
    vild = json.loads((tmp_path / "vild" / "pascal_voc_20.json").read_text())
    assert len(vild["second_stage"]["templates"]) == 14 == len(set(TEMPLATES["vild"])) and vild["text"]["templates"] == ["{}"]
    assert vild["iou"] != scores["1"]["iou"]


def test_clipseg_is_asked_in_squares(voc, tmp_path):
    torch.manual_seed(0)
    text = TextEncoder(evaluate_text(), normalize=False)
    network = CLIPSeg(text_dim=text.dim, backbone="clip", backbone_weights=evaluate_text(), blocks=(1, 2), dim=16, ffn_dim=32)
    Segmenter(network, text, None, 64, square=True).save(tmp_path / "model")
    found = evaluate.main(options(tmp_path / "model", voc, tmp_path / "out"))
    saved = json.loads((tmp_path / "out" / "pascal_voc_21.json").read_text())
    assert saved["square"] and saved["miou"] == pytest.approx(found["pascal_voc_21"]["miou"], abs=1e-5)
    assert "miou_unseen" not in saved  # nobody says what it learned from masks


def test_chunks_of_classes_change_nothing(model, voc, tmp_path):
    for chunk in ("1", "64"):
        args = ["--class-chunk", chunk, "--save-labels", str(tmp_path / chunk), "--window", "32"]
        evaluate.main(options(model, voc, tmp_path / f"out{chunk}", *args))
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.png"))
    assert len(files) == 14 and classes_in(tmp_path / "1") > 3
    assert all((tmp_path / "1" / file).read_bytes() == (tmp_path / "64" / file).read_bytes() for file in files)


def test_oracles(model, voc, tmp_path):
    """Proposals with the truth's classes beat the same ones with their own; true masks are named by the second stage alone."""
    plain = evaluate.main(options(model, voc, tmp_path))["pascal_voc_20"]
    best = evaluate.main(options(model, voc, tmp_path, "--oracle", "classes"))["pascal_voc_20"]
    assert best["pixel_accuracy"] > plain["pixel_accuracy"] + 0.02
    args = ["--oracle", "masks", "--region", "tiny_clip", "--save-labels", str(tmp_path / "labels")]
    evaluate.main(options(model, voc, tmp_path, *args))
    assert json.loads((tmp_path / "pascal_voc_20.json").read_text())["options"]["oracle"] == "masks"
    truth = np.array(Image.open(voc / "VOCdevkit/VOC2012/SegmentationClass/0.png")).astype(int)
    found = np.array(Image.open(tmp_path / "labels" / "pascal_voc_20" / "0.png"))
    for value in set(np.unique(truth)) - {0, 255}:
        assert len(np.unique(found[truth == value])) == 1  # a true mask has one name
    assert (found[truth == 255] == 255).all()


def test_names_only(model, voc, tmp_path):
    evaluate.main(options(model, voc, tmp_path, "--names-only"))
    names = json.loads((tmp_path / "pascal_voc_20.json").read_text())
    assert all(words == [name] for name, words in names["classes"].items()) and len(names["classes"]) == 20
    evaluate.main(options(model, voc, tmp_path))
    assert names["unseen"] == json.loads((tmp_path / "pascal_voc_20.json").read_text())["unseen"]  # seen is what was learned


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--benchmark", "ade20k_15"], "got 'ade20k_15', want all or some of .*did you mean 'ade20k_150'"),
        (["--benchmark", "all", "-c", "x.yaml"], "got both -c and --benchmark"),
        (["--benchmark", "all", "--overlap", "0.3"], "--overlap and --window-weights are for sliding windows"),
        (["--benchmark", "all", "--scales", "1,big"], "--scales: got 'big', want a number"),
        (["--benchmark", "all", "--ensemble-weight", "2"], "--ensemble-weight: got 2, want 0 .* to 1"),
        (["--benchmark", "all", "--ensemble-weight", "0.5"], "this model has none: add --region"),
        (["--benchmark", "all", "--devices", "0"], "--devices: got 0, want 1 or more"),
        (["--benchmark", "all", "--oracle", "classes", "--flip"], "an oracle looks once: leave windows, scales and flips out"),
        (["--benchmark", "all", "--class-chunk", "0"], "--class-chunk: got 0, want 1 or more"),
        (["--benchmark", "all", "--prompt-form", "image"], "--prompt-form is for phrases, and benchmarks have class lists"),
        (["--benchmark", "all", "--threshold", "0.3"], "--threshold is for phrases"),
        (["--benchmark", "all", "--image-size", "0"], "--image-size: got 0, want pixels"),
        (["--benchmark", "all", "--scales", ""], "--scales: got '', want a number"),
        (["--benchmark", "all", "--out", "/dev/null/x"], "/dev/null is no folder that may be written"),
        (["--root", "x"], "--root is for benchmarks: add --benchmark"),
        (["--ensemble-weight", "paper"], "--ensemble-weight is for benchmarks"),
        (["--benchmark", "ade20k_847", "--root", "nowhere"], "nowhere.*prepare_ade20k_full"),
    ],
)
def test_what_it_refuses(model, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        evaluate.main([str(model), "--device", "cpu", *args])


def test_labels_are_not_mixed_with_others(model, voc, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "0.png").write_text("")
    with pytest.raises(InputError, match="is not empty: give a new folder"):
        evaluate.main(options(model, voc, tmp_path, "--save-labels", str(tmp_path / "old")))


def test_data_of_one_scale_is_not_asked_at_another(model):
    data = Scenes(image_size=64, test_length=1, num_workers=0)
    with pytest.raises(InputError, match="this data gives its images at one scale only"):
        evaluate.evaluate(Segmenter.load(model), data, views=Views(scales=(0.5,)))


def test_rows_of_a_table():
    text = rows("ours|2", {"A-847": {"miou": 0.0912, "miou_v06": 0.05}, "PAS-20": {"miou": 0.9}})
    lines = text.splitlines()
    assert "ours\\|2" in text
    assert lines[0] == "| model | mIoU over | A-847 | PAS-20 |" and re.fullmatch(r"\|(---\|)+", lines[1])
    assert lines[2].endswith("| 5.0 | - |") and "miou_v06" in lines[2]
    assert lines[3].endswith("| 9.1 | 90.0 |") and "(miou:" in lines[3]
