"""``python -m pmpseg.predict``: what it writes, what it says, and what it does not import.

A stub stands in for ``pmpseg.segmenter``, so that nothing is trained or loaded here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmpseg import predict, rle
from pmpseg.errors import InputError

STUB = '''
"""Finds what is bright for every second prompt, and nothing for the others."""
from pathlib import Path
import numpy as np
from pmpseg import drawing, rle

class Segmentation:
    def __init__(self, image, prompts, threshold, together):
        self.image, self.prompts, self.threshold = image, prompts, threshold
        self.scores = np.full(len(prompts), float(together))
    def mask(self, index):
        return (np.asarray(self.image.convert("L")) > 255 * self.threshold) & (index % 2 == 0)
    def overlay(self):
        return drawing.overlay(self.image, [self.mask(i) for i in range(len(self.prompts))], self.prompts)
    def to_coco(self):
        return [{"prompt": p, "score": float(s), "segmentation": rle.encode(self.mask(i))}
                for i, (p, s) in enumerate(zip(self.prompts, self.scores))]

class Segmenter:
    threshold, vocabulary = 0.4, None
    def not_on_list(self, prompts):
        return []
    @classmethod
    def load(cls, folder, device):
        assert device == "cpu" and (Path(folder) / "config.json").is_file()
        return cls()
    def segment(self, image, prompts, threshold=None, together=False):
        return Segmentation(image, list(prompts), self.threshold if threshold is None else threshold, together)
'''
RUN = """
import sys, types
stub = types.ModuleType("pmpseg.segmenter")
exec(open("stub.py").read(), stub.__dict__)
sys.modules["pmpseg.segmenter"] = stub
from pmpseg import cli, predict
try:
    cli.run(predict.main)
finally:
    heavy = [name for name in ("torch", "lightning", "transformers") if name in sys.modules]
    print("imported:", *heavy, file=sys.stderr)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "stub.py").write_text(STUB)
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[5:10, 8:20] = 255
    for name in ("photos/a.jpg", "photos/a.png", "photos/A.bmp", "photos/sub/a.png", "photos/b.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / name)
    return tmp_path


def command(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(predict.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_folder(place: Path) -> None:
    (place / "photos" / "broken.jpg").write_bytes((place / "photos" / "a.jpg").read_bytes()[:300])
    (place / "photos" / "notes.txt").write_text("no image")
    done = command(
        place, "model", "photos", "--prompts", "Red/Circle; stripes", "--out", "photos/out", "--device", "cpu"
    )
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert sum("broken.jpg" in line and "skipped" in line for line in lines) == 1
    assert lines[-1] == "imported: torch"  # for the device; a run never imports lightning
    assert "5 images, 1 skipped" in done.stdout and "images/s" in done.stdout and "photos/out" in done.stdout

    out = place / "photos" / "out"
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    bases = ["A_bmp", "a_jpg", "a_png", "b", "sub/a"]
    ends = ["overlay", "mask_00_red-circle", "mask_01_stripes"]
    assert written == {"predictions.json", *(f"{base}_{end}.png" for base in bases for end in ends)}
    mask = np.asarray(Image.open(out / "sub" / "a_mask_00_red-circle.png"))
    assert mask.shape == (20, 30) and mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}

    found = json.loads((out / "predictions.json").read_text())
    assert [image["file_name"] for image in found["images"]] == [
        "A.bmp",
        "a.jpg",
        "a.png",
        "b.webp",
        "sub/a.png",
    ]
    assert found["categories"] == [{"id": 0, "name": "Red/Circle"}, {"id": 1, "name": "stripes"}]
    assert found["info"] == {"model": "model", "together": False, "threshold": 0.4}
    assert [a["id"] for a in found["annotations"]] == list(range(10))
    last = found["annotations"][-2]
    assert (last["image_id"], last["category_id"], last["prompt"]) == (4, 0, "Red/Circle")
    assert np.array_equal(rle.decode(last["segmentation"]), mask > 0)

    again = command(place, "model", "photos", "--prompts", "x", "--out", "photos/out", "--device", "cpu")
    assert "5 images, 1 skipped" in again.stdout  # not its own pictures


def test_one_image_and_names_from_a_file(place: Path) -> None:
    (place / "names.txt").write_text("0: sky\n1: road, street\n")
    one = ["model", "photos/a.png", "--names-from", "names.txt", "--device", "cpu"]
    done = command(place, *one, "--out", "o")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (place / "o").iterdir()} == {
        "a_overlay.png",
        "a_mask_00_sky.png",
        "a_mask_01_road.png",
        "predictions.json",
    }
    found = json.loads((place / "o" / "predictions.json").read_text())
    assert found["info"] == {"model": "model", "together": True, "threshold": None}
    assert [a["score"] for a in found["annotations"]] == [1, 1]  # the stub's way of saying that it was so asked
    done = command(place, *one, "--out", "o", "--no-together", "--threshold", "0.9")
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "o" / "predictions.json").read_text())
    assert found["info"] == {"model": "model", "together": False, "threshold": 0.9}
    assert [a["score"] for a in found["annotations"]] == [0, 0]
    (place / "bad.png").write_bytes(b"no image")
    done = command(place, "model", "bad.png", "--prompts", "x", "--out", "o2", "--device", "cpu")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "error" in line][-1].startswith(
        "pmpseg: error: bad.png"
    )
    assert not list((place / "o2").iterdir())


def test_help_and_bad_arguments_import_nothing_heavy(place: Path) -> None:
    done = command(place, "--help")
    assert done.returncode == 0 and "--names-from" in done.stdout
    assert done.stderr.splitlines()[-1] == "imported:"
    done = command(place, "modle", "photos", "--prompts", "x", "--out", "o")
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "imported:"
    assert not (place / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/modle", "{}/photos"], "no such folder"),
        (["{}/photos", "{}/photos"], "no config.json in"),
        (["{}", "{}/photos"], "is the folder of a run: give its model, .*model$"),
        (["{}/model", "{}/phots"], "no image or folder at .*phots"),
        (["{}/model", "{}/model"], "no images in .*model: want files that end in .bmp, "),
        (["{}/model", "{}/photos", "--threshold", "3"], r"--threshold must lie in 0 to 1 \(and below 1\), got 3"),
        (["{}/model", "{}/photos", "--threshold", "1"], "--threshold must lie in 0 to 1"),
        (["{}/model", "{}/photos", "--threshold", ".5", "--together"], "--threshold is for prompts asked alone"),
        (["{}/model", "{}/photos", "--prompts", " ; "], "no prompt in ' ; '"),
        (["{}/model", "{}/photos", "--out", "{}/photos"], "--out must not be the folder of the images"),
    ],
)
def test_bad_arguments(place: Path, arguments: list[str], message: str) -> None:
    defaults = ["--prompts", "x", "--out", str(place / "o")]
    with pytest.raises(InputError, match=message):
        predict.main([*defaults, *(argument.format(place) for argument in arguments)])
    assert not (place / "o").exists()


def test_names_never_clash(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a_jpg.png", "A.PNG", "sub/a.jpg", "sub/b.tar.png", "c.d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = predict.list_images(tmp_path, tmp_path / "out")
    assert len(names) == 7 and len({str(name).lower() for name in names.values()}) == 7
    assert names[tmp_path / "sub" / "a.jpg"] == Path("sub/a")
    assert names[tmp_path / "c.d.png"] == Path("c.d")
    assert names == predict.list_images(tmp_path, tmp_path / "out")


def test_package_is_lazy() -> None:
    import pmpseg

    assert pmpseg.__version__ and {"Segmenter", "Segmentation"} <= set(dir(pmpseg))
    with pytest.raises(AttributeError, match="no attribute 'Segmentor'"):
        _ = pmpseg.Segmentor
