"""The benchmarks: every convention of label values against plain numpy, class lists against the official names, bad input."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_fixture import COUNTS, FOLDERS, SIZE, draw, make_benchmarks, make_context_release
from PIL import Image
from scipy.io import savemat

from pmpseg.benchmarks import BENCHMARKS, TABLE, VOCAB, parse_benchmarks
from pmpseg.data import Benchmark
from pmpseg.errors import InputError
from pmpseg.vocabulary import Vocabulary

IGNORED = {name: 65535 if name in ("ade20k_847", "pascal_context_459") else 255 for name in BENCHMARKS}
SIZES = {"ade20k_847": 847, "pascal_context_459": 459, "ade20k_150": 150, "pascal_context_59": 59, "pascal_voc_20": 20}
SIZES |= {"pascal_voc_21": 21, "coco_stuff_171": 171, "coco_stuff_156": 171}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    return folder, make_benchmarks(folder)


@pytest.fixture
def copy(root, tmp_path):
    """A root of its own, to be spoilt."""
    shutil.copytree(root[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def expected(name: str, values: np.ndarray) -> np.ndarray:
    """Labels by the rule of each benchmark, pixel by pixel, apart from the code under test."""
    rules = {
        "ade20k_847": lambda v: v,
        "pascal_context_459": lambda v: v,
        "ade20k_150": lambda v: 255 if v in (0, 255) else v - 1,
        "pascal_context_59": lambda v: 255 if v == 0 else v - 1,
        "pascal_voc_20": lambda v: 255 if v in (0, 255) else v - 1,
        "pascal_voc_21": lambda v: v,
    }
    return np.vectorize(rules[name])(values)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_convention_of_values(root, name):
    data = Benchmark(name, str(root[0]), image_size=32, num_workers=0)
    items = data.dataset("test")
    assert len(items) == len(root[1][name]) == COUNTS[name]
    for index, values in enumerate(root[1][name]):
        item = items[index]
        labels = item["labels"].numpy()
        np.testing.assert_array_equal(labels, expected(name, values))
        inside = labels[labels != data.ignore_index]
        assert inside.min() == 0 and inside.max() == SIZES[name] - 1 and (labels == data.ignore_index).any()
        assert item["image"].shape == (3, 32, round(32 * SIZE[1] / SIZE[0])) and item["labels"].shape == SIZE
        assert item["prompts"] == data.vocabulary.names and len(item["prompts"]) == SIZES[name]
    assert data.ignore_index == IGNORED[name] and data.title == BENCHMARKS[name].title
    assert data.remark == f"{COUNTS[name]} of {BENCHMARKS[name].counts[0]:,} images"


def test_batches_scales_squares_and_splits(root):
    data = Benchmark("ade20k_847", str(root[0]), image_size=24, square=True, resize_labels=True, eval_batch_size=3, num_workers=0)
    data.eval_scales = (1.0, 2.0)
    batch = next(iter(data.test_dataloader()))
    assert batch["image"].shape == (3, 3, 24, 24) and batch["labels"].shape == (3, 24, 24)
    assert [tuple(images.shape) for images in batch["scaled"]] == [(3, 3, 24, 24), (3, 3, 48, 48)]
    assert batch["labels"].max() == 65535 and batch["labels"].dtype == torch.int64
    assert len(data.dataset("val")) == 3
    with pytest.raises(InputError, match="A-847 is for evaluation only"):
        data.dataset("train")
    bounded = Benchmark("ade20k_150", str(root[0]), image_size=80, max_size=52, num_workers=0)
    assert bounded.dataset("test")[0]["image"].shape[-2:] == SIZE


def test_whole_benchmark_has_no_remark(root, monkeypatch):
    whole = dataclasses.replace(BENCHMARKS["ade20k_150"], counts=(9, 7))
    monkeypatch.setitem(BENCHMARKS, "ade20k_150", whole)
    assert Benchmark("ade20k_150", str(root[0])).remark is None


def test_other_layouts(root, tmp_path):
    # detectron2's: 16-bit TIFF of classes, and PC-59 and PAS-20 as classes from 0
    full, voc2010 = tmp_path / "ADE20K_2021_17_01", tmp_path / "VOCdevkit/VOC2010"
    shutil.copytree(root[0] / FOLDERS["ade20k_847"][0], full / "images_detectron2/validation")
    (full / "annotations_detectron2/validation").mkdir(parents=True)
    values = np.random.default_rng(0).choice([0, 846, 65535], SIZE)
    for image in (full / "images_detectron2/validation").iterdir():
        Image.fromarray(values.astype(np.uint16)).save(full / f"annotations_detectron2/validation/{image.stem}.tif")
    np.testing.assert_array_equal(Benchmark("ade20k_847", str(tmp_path)).dataset("test")[0]["labels"], values)
    shutil.copytree(root[0] / "VOCdevkit/VOC2010/JPEGImages", voc2010 / "JPEGImages")
    (voc2010 / "annotations_detectron2/pc59_val").mkdir(parents=True)
    values = np.random.default_rng(0).choice([0, 58, 255], SIZE)
    Image.fromarray(values.astype(np.uint8)).save(voc2010 / "annotations_detectron2/pc59_val/2008_000002.png")
    data = Benchmark("pascal_context_59", str(tmp_path))
    np.testing.assert_array_equal(data.dataset("test")[0]["labels"], values)
    assert data.remark == "1 of 5,105 images"


def test_detectron2_layouts_begin_at_0(tmp_path):
    # another first would make them one class less, and the first class nothing
    voc, ade = tmp_path / "VOCdevkit/VOC2012", tmp_path / "ADEChallengeData2016"
    values = draw([0, 1, 19], 255, np.random.default_rng(0))
    background_last = np.where(values == 255, 20, values)
    for images, maps, kept in (
        (voc / "JPEGImages", voc / "annotations_detectron2/val", values),
        (voc / "JPEGImages", voc / "annotations_detectron2_bg/val", background_last),
        (ade / "images/validation", ade / "annotations_detectron2/validation", values),
    ):
        for folder in (images, maps):
            folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(images / "a.jpg")
        Image.fromarray(kept.astype(np.uint8)).save(maps / "a.png")
    for name in ("pascal_voc_20", "ade20k_150"):
        np.testing.assert_array_equal(Benchmark(name, str(tmp_path)).dataset("test")[0]["labels"], values)
    with pytest.raises(InputError, match=r"PAS-21: .* has no folder .*SegmentationClass"):  # not the maps of 20 = background
        Benchmark("pascal_voc_21", str(tmp_path))


def test_real_samples(shared):
    folder = shared("data", "samples", "ade20k_sceneparsing")
    data = Benchmark("ade20k_150", str(folder.parent), image_size=64, num_workers=0)
    assert data.remark == "3 of 2,000 images"
    occur = set()
    for index, path in enumerate(sorted((folder / "annotations").iterdir())):
        values, item = np.asarray(Image.open(path)).astype(int), data.dataset("val")[index]
        assert item["name"] == f"{path.stem}.jpg"
        np.testing.assert_array_equal(item["labels"], np.where(values == 0, 255, values - 1))
        occur |= {data.vocabulary.names[label] for label in np.unique(values[values > 0] - 1)}
    assert {"wall", "sky"} <= occur


def label_map(name: str) -> str:
    stems = {"ade20k_150": "ADE_val_00000002", "pascal_voc_20": "2007_000002", "pascal_context_459": "2008_000002"}
    return f"{FOLDERS[name][1]}/{stems[name]}.png"


BAD = {
    "no folder": (
        "ade20k_847",
        lambda root: shutil.rmtree(root / FOLDERS["ade20k_847"][1]),
        r"A-847: .* has no folder ADE20K_2021_17_01/benchmark_847/validation/annotations .*scripts/prepare_ade20k_full.py --help",
    ),
    "no label map": (
        "ade20k_150",
        lambda root: (root / label_map("ade20k_150")).unlink(),
        "ADE_val_00000002, but there is no label",
    ),
    "no image": (
        "ade20k_150",
        lambda root: (root / FOLDERS["ade20k_150"][0] / "ADE_val_00000002.jpg").unlink(),
        "ADE_val_00000002, but there is no image",
    ),
    "listed, no map": (
        "pascal_voc_20",
        lambda root: (root / label_map("pascal_voc_20")).unlink(),
        "val.txt lists 2007_000002, but",
    ),
    "listed twice": (
        "pascal_voc_20",
        lambda root: (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text("2007_000001\n2007_000001\n"),
        "lists 2007_000001 twice",
    ),
    "no list": (
        "pascal_voc_20",
        lambda root: (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink(),
        "cannot read the list of images .*val.txt",
    ),
    "another size": (
        "pascal_context_459",
        lambda root: Image.fromarray(np.zeros((52, 40), np.uint16)).save(root / label_map("pascal_context_459")),
        "2008_000002.png is 40x52, its image 52x40",
    ),
    "colours": (
        "ade20k_150",
        lambda root: Image.new("RGB", SIZE[::-1]).save(root / label_map("ade20k_150")),
        "ADE_val_00000002.png is a RGB picture",
    ),
    "high value": (
        "ade20k_150",
        lambda root: Image.new("L", SIZE[::-1], 151).save(root / label_map("ade20k_150")),
        "ADE_val_00000002.png has value 151: A-150 has 1..150 here, and 0 for ignore",
    ),
    "a map that begins at 0 already": (
        "ade20k_150",
        lambda root: Image.new("L", SIZE[::-1], 255).save(root / label_map("ade20k_150")),
        "ADE_val_00000002.png has value 255: A-150 has 1..150 here, and 0 for ignore",
    ),
    "high class of 16 bits": (
        "pascal_context_459",
        lambda root: Image.fromarray(np.full(SIZE, 459, np.uint16)).save(root / label_map("pascal_context_459")),
        "has value 459: PC-459 has 0..458 here, and 65535",
    ),
    "cut short": (
        "ade20k_150",
        lambda root: (root / label_map("ade20k_150")).write_bytes((root / label_map("ade20k_150")).read_bytes()[:60]),
        "ADE_val_00000002.png: cannot be read",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(copy, case):
    name, spoil, message = BAD[case]
    Benchmark(name, str(copy))
    spoil(copy)
    with pytest.raises(InputError, match=message):
        Benchmark(name, str(copy))


def test_bad_arguments(root):
    with pytest.raises(InputError, match="did you mean 'ade20k_150'"):
        Benchmark("ade20k_15", str(root[0]))
    with pytest.raises(InputError, match="max_size: got 9"):
        Benchmark("ade20k_150", str(root[0]), max_size=9, square=True)


def test_parse_benchmarks():
    assert [spec.title for spec in parse_benchmarks("all")] == ["A-847", "PC-459", "A-150", "PC-59", "PAS-20"]
    assert [spec.name for spec in parse_benchmarks("a-150, pascal_voc_21,ade20k_150")] == ["ade20k_150", "pascal_voc_21"]
    assert [spec.region_weight for spec in parse_benchmarks("all")] == [0.7, 0.6, 0.7, 0.6, 0.6]  # OVSeg, appendix A.3
    for text, hint in (("pascal_voc_2", "did you mean 'pascal_voc_2[01]'"), ("A-15", "did you mean 'a-150'"), ("", "got ''")):
        with pytest.raises(InputError, match=hint):
            parse_benchmarks(text)


def test_table_is_cheap_to_import():
    code = "import sys, pmpseg.benchmarks; print(sorted({'torch', 'lightning'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# Class lists. An official name becomes ours by losing what says "as seen by the annotators", or by this table.
RENAMED = {
    "coco_stuff": {"playingfield": "playing field", "waterdrops": "water drops", "solid-other": "solid material"}
    | {"ceiling-tile": "tiled ceiling", "floor-tile": "tiled floor", "floor-wood": "wooden floor"}
    | {"structural-other": "structure", "wall-panel": "panelled wall", "wall-tile": "tiled wall", "wall-wood": "wooden wall"},
    "ade20k_150": {"windowpane": "window", "palm": "palm tree", "case": "display case", "television receiver": "television"}
    | {"apparel": "clothes", "washer": "washing machine", "plaything": "toy", "screen": "projection screen", "hood": "range hood"}
    | {"ashcan": "trash can", "glass": "drinking glass", "conveyer belt": "conveyor belt"},
    # of these no word is left
    "ade20k_847": {"fluorescent, fluorescent fixture": "fluorescent light", "trouser, pant": "trousers", "scarfs": "scarves"}
    | {"hairdresser chair": "hairdresser's chair", "post-it": "post-it note", "tools box": "toolbox"},
    "pascal_context_459": {"casetterecorder": "cassette recorder", "chopstick": "chopsticks", "eyeglass": "eyeglasses"}
    | {"headphone": "headphones", "ski": "skis", "stair": "stairs", "sunglass": "sunglasses", "tong": "tongs"},
    "pascal_voc_20": {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"},
}


def official(shared, name: str) -> list[str]:
    return [line.strip() for line in shared("data", "labels", f"{name}.txt").read_text().splitlines() if line.strip()]


def squeezed(word: str) -> str:
    return "".join(letter for letter in word.casefold() if letter.isalnum())


@pytest.mark.parametrize("name", SIZES)
def test_class_lists_have_their_length_and_no_word_twice(name):
    assert len(Vocabulary.read(VOCAB / f"{name}.txt")) == SIZES[name]  # which reads a word of two classes as an error


@pytest.mark.parametrize("name", ["coco_stuff_171", "coco_stuff_156"])
def test_coco_stuff_lists(shared, name):
    names = official(shared, "coco_stuff_171")
    vocabulary = Vocabulary.read(VOCAB / f"{name}.txt")
    for number, (was, now) in enumerate(zip(names, vocabulary.names, strict=True)):
        base, _, kind = was.partition("-")
        plain = base if kind in ("other", "stuff", "") else f"{base} {kind}" if base == "window" else f"{kind} {base}"
        assert now == RENAMED["coco_stuff"].get(was, plain), (number, was, now)
    unseen = "frisbee skateboard cardboard carrot scissors suitcase giraffe cow road wall-concrete tree grass river clouds"
    unseen += " playingfield"
    marked = [names[index] for index in vocabulary.unseen]
    assert sorted(marked) == (sorted(unseen.split()) if name == "coco_stuff_156" else [])


def test_ade20k_150_list(shared):
    vocabulary = Vocabulary.read(VOCAB / "ade20k_150.txt")
    for was, now in zip(official(shared, "ade20k_150"), vocabulary.names, strict=True):
        assert now == RENAMED["ade20k_150"].get(was, was), (was, now)


def test_ade20k_847_list(shared):
    """Each class keeps a word of its own official ones, but for those that are renamed."""
    names = official(shared, "ade20k_847")
    shipped = (VOCAB.parent / "benchmarks/ade20k_847.txt").read_text().splitlines()
    assert [line for line in shipped if not line.startswith("#")] == names
    vocabulary = Vocabulary.read(VOCAB / "ade20k_847.txt")
    for was, words in zip(names, vocabulary.synonyms, strict=True):
        theirs = {squeezed(word) for word in was.split(",")}
        if was in RENAMED["ade20k_847"]:
            assert words[0] == RENAMED["ade20k_847"][was] and squeezed(words[0]) not in theirs
        else:
            assert theirs & {squeezed(word) for word in words}, (was, words)


def test_pascal_lists(shared):
    voc, context, all_context = (
        Vocabulary.read(VOCAB / f"{name}.txt") for name in ("pascal_voc_20", "pascal_context_59", "pascal_context_459")
    )
    renamed = RENAMED["pascal_voc_20"]
    assert voc.names == [renamed.get(name, name) for name in official(shared, "pascal_voc_20")]
    of_context = renamed | {"diningtable": "table"}  # as it is called among the 459
    assert context.names == [of_context.get(name, name) for name in official(shared, "pascal_context_59")]
    for was, now in zip(official(shared, "pascal_context_459"), all_context.names, strict=True):
        assert squeezed(now) == squeezed(RENAMED["pascal_context_459"].get(was, was))  # spaces and hyphens apart
    with_background = Vocabulary.read(VOCAB / "pascal_voc_21.txt")
    assert with_background.names == ["background", *voc.names] and with_background.synonyms[1:] == voc.synonyms
    assert set(voc.names) - set(context.names) == {"dining table"} and set(context.names) <= set(all_context.names)
    for one in (context, all_context):
        assert "dining table" in one.synonyms[one.names.index("table")]


# The scripts


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    import check_benchmarks
    import prepare_ade20k_full
    import prepare_pascal_context

    return {"ade": prepare_ade20k_full, "context": prepare_pascal_context, "check": check_benchmarks}


def make_full_ade(root: Path, objects: list[dict[int, str]], size: tuple[int, int] = (60, 90)) -> list[np.ndarray]:
    """The full release's layout: for each image the numbers of its names, (H, W), from which the _seg.png was written."""
    numbers = []
    for index, names in enumerate(objects):
        folder = root / "images/ADE/validation/urban/street"
        folder.mkdir(parents=True, exist_ok=True)
        rng, stem = np.random.default_rng(index), f"ADE_val_{index:08}"
        values = rng.choice([0, *names], (size[0] // 6, size[1] // 6)).repeat(6, 0).repeat(6, 1)
        seg = np.stack([values // 256 * 10 + rng.integers(0, 5), values % 256, rng.integers(0, 256, size)], -1)
        Image.fromarray(seg.astype(np.uint8)).save(folder / f"{stem}_seg.png")
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(folder / f"{stem}.jpg")
        things = [{"name": name, "name_ndx": n, "parts": {"part_level": 0}} for n, name in names.items()]
        things.append({"name": "wheel", "name_ndx": 77, "parts": {"part_level": 1}})
        text = json.dumps({"annotation": {"object": things, "by": "\xe9"}}, ensure_ascii=False)
        (folder / f"{stem}.json").write_bytes(text.encode("latin-1"))
        numbers.append(values)
    return numbers


CAR = "car, auto, automobile, machine, motorcar"
OBJECTS = [{2978: "wall", 401: CAR}, {2978: "wall", 3000: "unheard-of thing"}, {1: "totaliser"}]


def test_prepare_ade20k_full(scripts, tmp_path, capsys):
    full = tmp_path / "ADE20K_2021_17_01"
    numbers = make_full_ade(full, OBJECTS)
    assert scripts["ade"].main([str(full), "--short-side", "30"]) == 0
    data = Benchmark("ade20k_847", str(tmp_path))
    for index, values in enumerate(numbers):
        wanted = np.full(values.shape, 65535)
        wanted[values == 2978] = 0
        wanted[values == 401] = 14
        item = data.dataset("test")[index]
        np.testing.assert_array_equal(item["labels"], wanted[::2, ::2])  # blocks of 6 pixels became 3
        stored = Image.open(data.source.maps[index])
        assert stored.mode == "I;16" and stored.size == Image.open(data.source.files[index]).size == (45, 30)
    out = capsys.readouterr().out
    share = np.mean([np.isin(values, (2978, 401)).mean() for values in numbers])
    assert f"{share:.1%} of the pixels have one of the 847 classes, of which 2 occur" in out
    assert "3 images, the release has 2,000" in out and "2 names of objects are not in the list" in out
    assert "unheard-of thing (1)" in out
    with pytest.raises(InputError, match="is there already: remove it"):
        scripts["ade"].main([str(full)])


def test_prepare_ade20k_full_goes_on_and_leaves_nothing_half_written(scripts, tmp_path, capsys, monkeypatch):
    make_full_ade(tmp_path, OBJECTS)
    broken = tmp_path / "images/ADE/validation/urban/street/ADE_val_00000001_seg.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:80])
    with pytest.raises(InputError, match=r"ADE_val_00000001_seg.png: cannot be read"):
        scripts["ade"].main([str(tmp_path), "--short-side", "0"])
    folder = tmp_path / "benchmark_847"
    assert not (folder / "validation").exists()
    assert [path.name for path in (folder / ".validation.part/annotations").iterdir()] == ["ADE_val_00000000.png"]
    broken.write_bytes(whole)
    with pytest.raises(InputError, match="begun with other settings"):
        scripts["ade"].main([str(tmp_path)])
    listed = scripts["ade"].find_images(tmp_path, "validation")
    with monkeypatch.context() as other:  # another image in the place of one that was made
        renamed = {stem.replace("00000000", "00000009"): path for stem, path in listed.items()}
        other.setattr(scripts["ade"], "find_images", lambda root, split: renamed)
        with pytest.raises(InputError, match="begun with other settings"):
            scripts["ade"].main([str(tmp_path), "--short-side", "0"])
    capsys.readouterr()
    assert scripts["ade"].main([str(tmp_path), "--short-side", "0"]) == 0
    assert "2 images made, 1 were there" in capsys.readouterr().out
    assert len(list((folder / "validation/annotations").iterdir())) == 3 and not (folder / ".validation.part").exists()
    copied = (folder / "validation/images/ADE_val_00000002.jpg").read_bytes()
    assert copied == (broken.parent / "ADE_val_00000002.jpg").read_bytes()


def test_prepare_ade20k_full_on_the_real_samples(scripts, shared, tmp_path, capsys):
    for path in shared("data", "samples", "ADE20K_2021_17_01", "images").rglob("ADE_train_*.*"):
        if "_parts_" not in path.name:
            (tmp_path / "images/ADE/training/street").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, tmp_path / "images/ADE/training/street" / path.name)
    assert scripts["ade"].main([str(tmp_path), "--split", "training"]) == 0
    out = capsys.readouterr().out
    assert "94.3% of the pixels" in out and "not in the list" not in out and "no name" not in out
    names = Vocabulary.read(VOCAB / "ade20k_847.txt").names
    values = np.asarray(Image.open(tmp_path / "benchmark_847/training/annotations/ADE_train_00016869.png"))
    assert values.shape == (512, 683)
    seen = {names[value] for value in np.unique(values) if value != 65535}
    assert {"building", "central reservation", "motorbike", "traffic light", "trash can", "streetlight"} <= seen


def test_prepare_ade20k_full_turned_odd_and_other_images(scripts, tmp_path, capsys):
    """EXIF would turn the copy of an image, its map stays; number 0 is nothing; other images are another preparation."""
    make_full_ade(tmp_path, [{0: "nothing", 2978: "wall"}, {2978: "wall"}])
    street = tmp_path / "images/ADE/validation/urban/street"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(street / "ADE_val_00000000.jpg") as image:
        image.load()
    image.save(street / "ADE_val_00000000.jpg", exif=exif)
    broken = street / "ADE_val_00000001_seg.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:80])
    with pytest.raises(InputError, match="cannot be read"):
        scripts["ade"].main([str(tmp_path), "--short-side", "0"])
    broken.write_bytes(whole)
    for path in list(street.glob("ADE_val_00000001*")):
        path.rename(path.with_name(path.name.replace("00000001", "00000002")))
    with pytest.raises(InputError, match="begun with other settings"):
        scripts["ade"].main([str(tmp_path), "--short-side", "0"])
    shutil.rmtree(tmp_path / "benchmark_847/.validation.part")
    assert scripts["ade"].main([str(tmp_path), "--short-side", "0"]) == 0
    with Image.open(tmp_path / "benchmark_847/validation/images/ADE_val_00000000.jpg") as image:
        assert image.size == (90, 60) and image.getexif().get(0x0112, 1) == 1


def test_a_few_other_names_do_not_end_the_preparation(scripts, monkeypatch, capsys):
    told = {f"{n}.json": {5: "wall", 7: "unheard-of"} for n in range(200)} | {"3.json": {5: "sky"}}
    monkeypatch.setattr(scripts["ade"], "read_objects", lambda path: told[path.name])
    name_of, unlisted = scripts["ade"].read_index([Path(f"{n}.jpg") for n in range(200)], {"wall": 0, "sky": 1})
    assert name_of == {5: "wall", 7: "unheard-of"} and unlisted == {"unheard-of": 199}
    assert "1 numbers have more than one name, and go by the most frequent: number 5 is 'wall'" in capsys.readouterr().out


def test_prepare_ade20k_full_bad_input(scripts, tmp_path):
    with pytest.raises(InputError, match=r"there is no folder .*images/ADE/validation: give the folder"):
        scripts["ade"].main([str(tmp_path)])
    make_full_ade(tmp_path, [{5: "wall"}, {5: "sky"}])
    with pytest.raises(InputError, match=r"number 5 is 'wall' in most JSON files, and 'sky' in others: is all of it"):
        scripts["ade"].main([str(tmp_path)])
    path = tmp_path / "images/ADE/validation/urban/street/ADE_val_00000001.json"
    path.write_text('{"annotation": {}}')
    with pytest.raises(InputError, match=r"ADE_val_00000001.json is not of ADE20K's full release"):
        scripts["ade"].main([str(tmp_path)])
    path.unlink()
    with pytest.raises(InputError, match=r"has no ADE_val_00000001.json beside it"):
        scripts["ade"].main([str(tmp_path)])


def test_prepare_pascal_context(scripts, shared, tmp_path, capsys):
    names = official(shared, "pascal_context_459")
    voc = tmp_path / "VOCdevkit/VOC2010"
    label_maps = make_context_release(voc, names)
    assert scripts["context"].main([str(voc)]) == 0
    out = capsys.readouterr().out
    assert "ImageSets/Main/val.txt: 3 images; the whole list has 5,105" in out
    of_59 = [{"diningtable": "table"}.get(name, name) for name in official(shared, "pascal_context_59")]
    whole, some = Benchmark("pascal_context_459", str(tmp_path)), Benchmark("pascal_context_59", str(tmp_path))
    for index, values in enumerate(label_maps.values()):
        np.testing.assert_array_equal(whole.dataset("test")[index]["labels"], np.where(values == 0, 65535, values - 1))
        wanted = np.full(values.shape, 255)
        for label, name in enumerate(of_59):
            wanted[values == names.index(name) + 1] = label
        np.testing.assert_array_equal(some.dataset("test")[index]["labels"], wanted)
    assert scripts["context"].main([str(voc)]) == 0 and "is there already" in capsys.readouterr().out


def test_prepare_pascal_context_takes_detectron2s_list_and_doubles_and_notices_another_list(scripts, shared, tmp_path, capsys):
    label_maps = make_context_release(tmp_path, official(shared, "pascal_context_459"))
    stems = list(label_maps)
    (tmp_path / "pascalcontext_val.txt").write_text("\n".join(stems[:2]))
    mat = tmp_path / f"trainval/{stems[1]}.mat"
    mat.write_bytes(b"no mat")
    with pytest.raises(InputError, match=r"cannot be read as a .mat file"):
        scripts["context"].main([str(tmp_path)])
    (tmp_path / "pascalcontext_val.txt").write_text("\n".join(stems[1:]))  # as many, others
    savemat(mat, {"LabelMap": label_maps[stems[1]].astype(np.float64)})
    with pytest.raises(InputError, match="begun with other settings"):
        scripts["context"].main([str(tmp_path)])
    for part in tmp_path.glob(".context_*"):
        shutil.rmtree(part)
    assert scripts["context"].main([str(tmp_path)]) == 0 and "pascalcontext_val.txt: 2 images" in capsys.readouterr().out
    for stem in stems[1:]:
        wanted = label_maps[stem]
        wanted = np.where(wanted == 0, 65535, wanted - 1)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"context_459_val/{stem}.png")), wanted)
    savemat(mat, {"LabelMap": np.full(SIZE, 0.5)})
    with pytest.raises(InputError, match=r"want .* of whole numbers 0\.\.459"):
        scripts["context"].read_mat(mat)


def test_prepare_pascal_context_bad_input(scripts, shared, tmp_path):
    names = official(shared, "pascal_context_459")
    with pytest.raises(InputError, match=r"there is no folder .*JPEGImages: give the folder VOC2010"):
        scripts["context"].main([str(tmp_path)])
    make_context_release(tmp_path, names)
    (tmp_path / "labels.txt").write_text("1: accordion\n2: sky\n")
    with pytest.raises(InputError, match=r"labels.txt has 2 names, want the numbers 1..459"):
        scripts["context"].main([str(tmp_path)])
    make_context_release(tmp_path, names)
    (tmp_path / "trainval/2008_000001.mat").write_bytes(b"no mat")
    with pytest.raises(InputError, match=r"2008_000001.mat: cannot be read as a .mat file"):
        scripts["context"].main([str(tmp_path)])
    (tmp_path / "trainval/2008_000001.mat").unlink()
    with pytest.raises(InputError, match=r"val.txt lists 2008_000001, but there is no .*2008_000001.mat"):
        scripts["context"].main([str(tmp_path)])
    assert not list(tmp_path.glob("context_*"))


def test_check_benchmarks(scripts, root, copy, capsys):
    assert scripts["check"].main([str(copy)]) == 1  # all is there, but not whole
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out] == [BENCHMARKS[name].title for name in TABLE] + ["COCO-Stuff"]
    assert out[-1].startswith(f"COCO-Stuff: MISSING or WRONG. {copy.resolve()}/coco has no images of train2017")
    values = np.stack(root[1]["ade20k_150"])
    share, occur = (values == 0).mean(), len(np.unique(values[values > 0]))
    assert f"7 of 2,000 images in {copy}/{FOLDERS['ade20k_150'][1]}; {occur} of 150 classes occur, {share:.1%} of the" in out[2]
    shutil.rmtree(copy / "VOCdevkit/VOC2010")
    Image.new("L", SIZE[::-1], 200).save(copy / label_map("ade20k_150"))
    scripts["check"].main([str(copy)])
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("PC-459: MISSING") and f"prepare_pascal_context.py {copy}/VOCdevkit/VOC2010" in out[1]
    assert out[2].startswith("A-150: WRONG") and "ADE_val_00000002.png has value 200" in out[2]
    photograph = copy / FOLDERS["pascal_voc_20"][0] / "2007_000003.jpg"
    photograph.write_bytes(photograph.read_bytes()[:-500])  # its header is whole
    for split, count in (("train2017", 2), ("val2017", 1)):
        for number in range(count):
            for folder, kind in ((split, "jpg"), (f"stuffthingmaps/{split}", "png")):
                (copy / "coco" / folder).mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 6)).save(copy / "coco" / folder / f"{number}.{kind}")
    scripts["check"].main([str(copy)])
    out = capsys.readouterr().out.splitlines()
    assert out[4].startswith("PAS-20: WRONG") and "2007_000003.jpg" in out[4]
    assert out[5].startswith(f"COCO-Stuff: 2 images of train2017 and 1 images of val2017 in {copy}/coco; the whole set has")
