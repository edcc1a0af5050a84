"""PhraseCut in its official layout: masks, places of images, clear errors, and the script that checks the files."""

import errno
import json
import pickle
import runpy
import socket
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from phrasecut_fixture import (
    make,
    phrases_of,
    same,
    scene_of,
    structure_of,
    write_phrasecut,
    write_phrasecut_of_coco,
    write_squares,
)
from PIL import Image

from pmpseg.data import PhraseCut
from pmpseg.data.image_store import ImageStore
from pmpseg.data.phrasecut import frequent
from pmpseg.errors import InputError

PREPARE = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "prepare_phrasecut.py"))
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_phrasecut(tmp_path_factory.mktemp("phrasecut") / "scenes")


# ---- the official layout


def test_phrases_masks_and_forms_are_those_of_the_scenes(scenes):
    source = make(scenes).source("train")
    sample, kinds = 0, set()
    for image, name in enumerate(source.names):
        scene = scene_of(int(Path(name).stem))
        for phrase in phrases_of(scene, int(Path(name).stem)):
            assert source.phrases[sample] == phrase.text and source.image_of[sample] == image
            assert np.array_equal(source.mask(sample), phrase.mask(scene))
            assert source.forms[sample] == structure_of(phrase)["type"]
            kinds.add(source.forms[sample])
            sample += 1
        assert abs(source.image(image).astype(int) - scene.image).mean() < 8  # JPEG
    assert sample == len(source.phrases) > 50 and kinds == {"name", "attribute", "relation"}


def test_masks_against_pycocotools_on_scenes(scenes):
    reference = pytest.importorskip("pycocotools.mask", reason="pycocotools is the reference")
    source, tasks = make(scenes).source("val"), json.loads((scenes / "refer_val.json").read_text())
    for sample, task in enumerate(tasks):
        assert iou(source.mask(sample), theirs(reference, task, 128, 128)) > 0.97


def test_masks_against_pycocotools_on_photographs(shared, tmp_path):
    reference = pytest.importorskip("pycocotools.mask", reason="pycocotools is the reference")
    root = write_phrasecut_of_coco(tmp_path / "pc", shared("data", "coco_small"))
    source, tasks = make(root).source("train"), json.loads((root / "refer_train.json").read_text())
    ious = []
    for sample, task in enumerate(tasks):
        width, height = source.sizes[source.image_of[sample]]
        mask, other = source.mask(sample), theirs(reference, task, int(height), int(width))
        ious += [iou(mask, other)] if other.sum() > 200 else []
        assert source.phrases[sample] == task["phrase"] and mask.shape == other.shape
    assert len(ious) > 20 and min(ious) > 0.9 and np.mean(ious) > 0.98
    item = make(root, square=False, image_size=100).dataset("val")[0]
    assert min(item["image"].shape[1:]) == 100 and item["prompt_masks"].shape[1:] == item["labels"].shape
    assert item["labels"].shape == Image.open(root / "images" / item["name"]).size[::-1] and min(item["labels"].shape) > 100


def theirs(reference, task: dict, height: int, width: int) -> np.ndarray:
    flat = [np.ravel(polygon).tolist() for instance in task["Polygons"] for polygon in instance]
    return reference.decode(reference.merge(reference.frPyObjects(flat, height, width))) > 0


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


def test_several_polygons_and_instances_are_united(tmp_path):
    root = write_squares(tmp_path)
    tasks = json.loads((root / "refer_train.json").read_text())
    boxes = [[[x, y], [x + 4, y], [x + 4, y + 4], [x, y + 4]] for x, y in ((0, 0), (2, 2), (50, 40))]
    tasks[0]["Polygons"] = [boxes[:2], boxes[2:], [[[7, 7], [9, 9]]]]  # they overlap; a polygon of 2 points has no pixel
    (root / "refer_train.json").write_text(json.dumps(tasks))
    wanted = np.zeros((60, 100), bool)
    wanted[0:4, 0:4] = wanted[2:6, 2:6] = wanted[40:44, 50:54] = True
    assert np.array_equal(make(root).source("train").mask(0), wanted)


def test_zips_equal_folders_and_two_workers_equal_none(scenes, tmp_path):
    for name in ("image_data_split.json", "refer_train.json", "refer_val.json"):
        (tmp_path / name).write_bytes((scenes / name).read_bytes())
    for number, folder in enumerate(("VG_100K", "VG_100K_2")):
        with zipfile.ZipFile(tmp_path / ("images.zip", "images2.zip")[number], "w") as file:
            for path in sorted((scenes / "images").iterdir())[number::2]:
                file.write(path, f"{folder}/{path.name}")
    options = {"supports": 1, "negatives": 0.5, "prefixes": "shuffle+", "prompts_per_image": 2}
    batches = {}
    for root, workers in ((scenes, 0), (tmp_path, 0), (tmp_path, 2)):
        loader = make(root, num_workers=workers, **options).train_dataloader()
        found = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            found += list(loader)
        batches[root, workers] = found
    dataset = make(tmp_path, **options).dataset("train")
    item = dataset[0, 3]  # its zips are open now
    assert same(pickle.loads(pickle.dumps(dataset))[0, 3], item)
    first, *others = batches.values()
    assert len(first) == 6 and all(len(other) == 6 and all(map(same, first, other)) for other in others)
    assert first[0]["support_image"].shape == (4, 2, 1, 3, 64, 64) and first[0]["support_valid"].shape == (4, 2, 1)


def test_images_in_other_places(scenes, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("image_data_split.json", "refer_train.json"):
        (tmp_path / name).write_bytes((scenes / name).read_bytes())
    for folder in ("VG_100K", "VG_100K_2"):
        (tmp_path / "photos" / folder).mkdir()
    for path in (scenes / "images").iterdir():
        folder = ("VG_100K", "VG_100K_2")[int(path.stem) % 2]
        (tmp_path / "photos" / folder / path.name).write_bytes(path.read_bytes())
    one, other = make(scenes).dataset("train"), make(tmp_path, images=str(tmp_path / "photos")).dataset("train")
    assert all(same(one[index], other[index]) for index in (0, 20, 40))


def test_wrong_sizes_are_left_out(scenes, tmp_path):
    root = copy(scenes, tmp_path)
    before = make(root).source("train")
    first = Path(before.names[0]).stem
    (root / "wrong_size.json").write_text(f"[{first}]")
    after = make(root).source("train")
    assert f"{first}.jpg" not in after.names and len(after.names) == len(before.names) - 1
    assert after.phrases == before.phrases[int((before.image_of == 0).sum()) :]


def test_a_wrong_size_not_among_the_first_checked(scenes, tmp_path):
    edit("image_data_split.json", lambda c: c[2].update(width=99))(copy(scenes, tmp_path))
    source = make(tmp_path).source("train")
    with pytest.raises(InputError, match=r"images/3.jpg is 128x128, but .* says 99x128: scripts/prepare_phrasecut.py finds"):
        source.image(2)


def copy(root: Path, folder: Path) -> Path:
    for path in [*root.glob("*.json"), *root.glob("images/*")]:
        target = folder / path.relative_to(root)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder


def edit(name: str, change) -> "callable":
    def damage(root: Path) -> None:
        content = json.loads((root / name).read_text())
        change(content)
        (root / name).write_text(json.dumps(content))

    return damage


def spoil(root: Path) -> None:
    (root / "images/1.jpg").unlink()
    (root / "images").rename(root / "VG_100K")
    (root / "images.zip").write_bytes(b"PK")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "image_data_split.json").unlink(), r"there is no \S+image_data_split.json"),
        (lambda root: (root / "image_data_split.json").write_text("{"), "image_data_split.json is not a JSON file"),
        (edit("image_data_split.json", lambda c: c[0].pop("width")), "split.json is not PhraseCut's: 'width' is missing"),
        (edit("image_data_split.json", lambda c: c[1].update(width=99)), r"images/\d+.jpg is 128x128, but .* says 99x128"),
        (edit("image_data_split.json", lambda c: c.pop(0)), r"refer_train.json: task 1__1000 is on image 1, which"),
        (lambda root: (root / "refer_train.json").write_text('{"a": 1}'), "refer_train.json is not PhraseCut's: it holds a dict"),
        (lambda root: (root / "refer_train.json").unlink(), "there is no .*refer_train.json: scripts/prepare_phrasecut.py"),
        (lambda root: (root / "refer_train.json").write_text("[]"), "holds no phrase"),
        (edit("refer_train.json", lambda c: c[2].pop("Polygons")), "task 1__1002 is no PhraseCut task: 'Polygons' is missing"),
        (edit("refer_train.json", lambda c: c[2].update(phrase=7)), "task 1__1002 is no PhraseCut task"),
        (edit("refer_train.json", lambda c: c[2].update(Polygons=[[[1, 2, 3, 4]]])), "task 1__1002 is no PhraseCut task"),
        (edit("refer_train.json", lambda c: c[2].update(Polygons=[[[[1, 2], [3]]]])), "1__1002 .* a polygon is a list of points"),
        (edit("refer_train.json", lambda c: c[2].update(Polygons=[[[[1, float("nan")]]]])), "a point that is no number"),
        (lambda root: (root / "images/1.jpg").unlink(), "1 of the 12 images of .*refer_train.json are not in .*, as 1.jpg"),
        (lambda root: (root / "images/1.jpg").write_text("no picture"), "images/1.jpg: cannot be read as an image"),
        (spoil, "images.zip: cannot be read as images .no zip file"),
        (lambda root: (root / "images").rename(root / "pictures"), "has no images: want one of images, VG_100K"),
        (lambda root: (root / "wrong_size.json").write_text("x"), "wrong_size.json is not a JSON file"),
    ],
)
def test_what_is_wrong_is_said_with_the_name(scenes, tmp_path, damage, message):
    damage(copy(scenes, tmp_path))
    with pytest.raises(InputError, match=message) as caught:
        make(tmp_path).dataset("train")
    assert "\n" not in str(caught.value)


def test_a_broken_image_in_a_zip_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("VG_100K/1.jpg", b"no picture")
        file.writestr("VG_100K/3.jpg", bytes(range(256)) * 99)
    content = bytearray((tmp_path / "images.zip").read_bytes())
    start = content.index(b"3.jpg") + 5
    content[start : start + 40] = bytes(40)  # what is packed is broken
    (tmp_path / "images.zip").write_bytes(content)
    store = ImageStore([tmp_path / "images.zip"])
    with pytest.raises(InputError, match=r"images.zip: VG_100K/3.jpg in it cannot be read as an image"):
        store.read("3.jpg")
    for ask in (store.read, store.size):
        with pytest.raises(InputError, match=r"images.zip: VG_100K/1.jpg in it cannot be read as an image"):
            ask("1.jpg")
    with pytest.raises(InputError, match=r"there is no image 2.jpg in \S+images.zip"):
        store.read("2.jpg")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"negatives": 1.5}, "negatives: got 1.5"),
        ({"supports": -1}, "supports: got -1"),
        ({"phrases_at_once": 0}, "phrases_at_once: got 0"),
        ({"prefixes": "some"}, "prefixes: got 'some', want one of plain, fixed"),
        ({"crop": "random"}, "crop: got 'random'"),
        ({"split_names": ("train", "valid", "test")}, "split_names: got 'valid'"),
    ],
)
def test_bad_options(scenes, option, message):
    with pytest.raises(InputError, match=message):
        make(scenes, **option)


def test_the_whole_validation_split_is_two_files(scenes):
    parts = [make(scenes, split_names=("train", name, "test")).source("val").phrases for name in ("val", "miniv", "val_miniv")]
    assert parts[2] == parts[0] + parts[1]


def test_the_vocabulary_is_a_short_list_of_frequent_nouns(scenes):
    nouns = [task["phrase_structure"]["name"] for task in json.loads((scenes / "refer_val.json").read_text())]
    names = make(scenes).vocabulary.names
    assert not PhraseCut.class_list and set(names) == set(nouns) and nouns.count(names[0]) == max(map(nouns.count, nouns))
    nouns = ["b"] * 3 + ["a", "A ", "c#", "d,e", "", "f"] + [str(n) for n in range(200)]
    assert frequent(nouns)[:3] == ["b", "a", "0"] and len(frequent(nouns)) == 100


# ---- the script


def prepare(capsys, *arguments: object) -> tuple[int, str]:
    status = PREPARE["main"]([str(argument) for argument in arguments])
    return status, capsys.readouterr().out


@pytest.fixture
def counted(scenes, monkeypatch):
    """The counts that the script expects, for the fixture."""
    for split in PREPARE["PHRASES"]:
        tasks = json.loads((scenes / f"refer_{split}.json").read_text())
        monkeypatch.setitem(PREPARE["PHRASES"], split, len(tasks))
        monkeypatch.setitem(PREPARE["IMAGES"], split, len({task["image_id"] for task in tasks}))


def test_prepare_checks_counts(scenes, capsys):
    status, out = prepare(capsys, scenes, "--check-only", "--splits", "val")
    phrases = len(json.loads((scenes / "refer_val.json").read_text()))
    assert status == 1 and f"refer_val.json: {phrases} phrases, not 20,316" in out and "4 images, not 2,971" in out


def test_prepare_says_what_is_missing_or_wrong(scenes, tmp_path, counted, capsys):
    root = copy(scenes, tmp_path)
    assert prepare(capsys, root, "--check-only")[0] == 0
    (root / "images/3.jpg").unlink()
    (root / "images/4.jpg").write_text("no picture")
    Image.new("RGB", (90, 80)).save(root / "images/5.jpg")
    (root / "refer_test.json").unlink()
    edit("refer_val.json", lambda c: (c[0].update(phrase=" "), c[1].update(Polygons=[])))(root)
    status, out = prepare(capsys, root, "--check-only")
    assert status == 1 and "refer_test.json is missing" in out and "1 of 20 images, as 3.jpg; images: Visual Genome" in out
    assert "1 images cannot be read" in out and "4.jpg" in out and "1 tasks without a word in the phrase" in out
    assert "1 tasks without a polygon" in out and "1 of them of another size" in out
    assert json.loads((root / "wrong_size.json").read_text()) == [5]
    edit("refer_train.json", lambda c: c[0].pop("Polygons"))(root)
    with pytest.raises(InputError, match=r"refer_train.json is not PhraseCut's: a task of it lacks 'Polygons'"):
        prepare(capsys, root, "--check-only")


def test_prepare_fetches_what_is_missing_whole_or_not_at_all(scenes, tmp_path, counted, capsys):
    links = [f"--url={path.name}={path.as_uri()}" for path in scenes.glob("*.json")]
    status, out = prepare(capsys, tmp_path / "new", "--images", scenes, *links)
    assert status == 0 and "all is as expected" in out
    assert {p.name for p in (tmp_path / "new").iterdir()} == set(PREPARE["URLS"])
    (tmp_path / "page").write_text("<html>sign in</html>")
    for file, message in (("page", "gives something else"), ("no", "cannot be fetched")):
        with pytest.raises(InputError, match=f"image_data_split.json: .*{message}") as caught:
            prepare(capsys, tmp_path / "other", f"--url=image_data_split.json={(tmp_path / file).as_uri()}")
        assert not list((tmp_path / "other").iterdir()) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"--url: got 'refer_tset.json=x', .* did you mean 'refer_test.json'"):
        prepare(capsys, tmp_path, "--url", "refer_tset.json=x")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.0 200 OK\r\nContent-Length: 90\r\n\r\n[1, 2]", r"gave 6 of 90 bytes: try again"),
        (b"HTTP/1.0 200 OK\r\n\r\n[1, 2", r"gave 5 bytes and then stopped: try again"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\n[1, 2]\r\n", r"cannot be fetched from \S+ \(IncompleteRead"),
        (b"", r"cannot be fetched from \S+ \(Remote end closed connection"),
        (b"nonsense\r\n\r\n", r"cannot be fetched from \S+ \(nonsense"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\n[1, 2]", None),
        (b"HTTP/1.0 200 OK\r\n\r\n[1, 2]\n", None),
    ],
)
def test_prepare_leaves_nothing_of_a_broken_answer(tmp_path, answer, message):
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer_once, args=(server, answer))
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        if message is None:
            PREPARE["fetch"](url, tmp_path / "x.json")
        else:
            with pytest.raises(InputError, match=f"^x.json: .*{message}") as caught:
                PREPARE["fetch"](url, tmp_path / "x.json")
            assert "\n" not in str(caught.value)
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ([] if message else ["x.json"])


def test_prepare_does_not_blame_the_link_for_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "y").write_text("[]")
    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        PREPARE["fetch"]((tmp_path / "y").as_uri(), tmp_path / "x.json")
    assert [path.name for path in tmp_path.iterdir()] == ["y"]


def answer_once(server: socket.socket, answer: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(answer)
