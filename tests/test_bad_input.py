"""Bad input: one clear line each, exit code not 0, nothing half written. With PMPSEG_TABLE=FILE the lines are written there.

Every case runs against a copy of one small model and one small data folder; ``do`` spoils something and returns what to run:
a command with its arguments, or a function of the Python interface. What must *work*, however odd it looks, is at the end.
"""

import contextlib
import errno
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import make_tiny_clip

from pmpseg import Segmenter, cli, evaluate, fit, predict, rle
from pmpseg.errors import InputError
from pmpseg.losses import SetLoss
from pmpseg.metrics import ConfusionMetrics
from pmpseg.models import PMP, Prediction, TextEncoder
from pmpseg.vocabulary import Vocabulary

TINY = {"dim": 32, "num_queries": 6, "num_layers": 1, "num_heads": 4, "ffn_dim": 32}
MODEL = " ".join(f"--model.{k} {v}" for k, v in TINY.items()) + " --model.backbone test_resnet --model.backbone_weights null"
FIT = f"{MODEL} --model.num_points 32 --trainer.max_steps 2 --trainer.enable_progress_bar false --trainer.accelerator cpu".split()


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A model, an image, and a folder of data, all whole."""
    root = tmp_path_factory.mktemp("origin")
    clip = make_tiny_clip(root / "clip")
    torch.manual_seed(0)
    text = TextEncoder(clip)
    network = PMP(text_dim=text.dim, backbone="test_resnet", **TINY)
    Segmenter(network, text, Vocabulary.of(["red circle", "grass"]), 64, 0.3).save(root / "model")
    rng = np.random.default_rng(0)
    for folder in ("data/images", "data/masks"):
        (root / folder).mkdir(parents=True)
    for n in range(5):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(root / f"data/images/{n}.png")
        Image.fromarray(rng.integers(0, 2, (40, 50), dtype=np.uint8)).save(root / f"data/masks/{n}.png")
    (root / "data/classes.txt").write_text("red circle\ngrass\n")
    Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(root / "photo.jpg")
    return root


@pytest.fixture
def here(origin, tmp_path, monkeypatch):
    shutil.copytree(origin, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# ---- what is asked


def predicting(*args: str, model: str = "model", image: str = "photo.jpg", prompts: str | None = "grass") -> Callable:
    asked = [] if prompts is None else ["--prompts", prompts]
    return lambda: predict.main([model, image, *asked, "--out", "out", "--device", "cpu", *args])


def fitting(*args: str) -> Callable:
    data = "--data pmpseg.data.FolderData --data.root data --data.image_size 32 --data.batch_size 2 --data.num_workers 0".split()
    return lambda: fit.main([*FIT, *data, "--trainer.default_root_dir", "run", *args])


def evaluating(*args: str, model: str = "model") -> Callable:
    return lambda: evaluate.main([model, "--device", "cpu", *args])


def segmenting(image: Any, prompts: Any = "grass", **options: Any) -> Callable:
    return lambda: Segmenter.load("model").segment(image, prompts, **options)


def write(path: str, content: str | bytes, then: Callable) -> Callable:
    """Puts ``content`` into a file, then does the rest."""

    def both() -> Any:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
        return then()

    return both


def cut(path: str, then: Callable) -> Callable:
    """Leaves the first half of a file."""
    return lambda: write(path, Path(path).read_bytes()[: Path(path).stat().st_size // 2], then)()


def gone(path: str, then: Callable) -> Callable:
    def both() -> Any:
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
        return then()

    return both


def changed(edit: Callable[[dict], Any], then: Callable) -> Callable:
    """Changes the model's weights."""

    def both() -> Any:
        state = load_file("model/model.safetensors")
        save_file(edit(state) or state, "model/model.safetensors")
        return then()

    return both


def edited(key: str, value: Any, then: Callable) -> Callable:
    """Changes the model's config.json; None drops the key."""

    def both() -> Any:
        config = json.loads(Path("model/config.json").read_text())
        config.pop(key) if value is None else config.update({key: value})
        Path("model/config.json").write_text(json.dumps(config))
        return then()

    return both


def mask_of(array: np.ndarray, then: Callable) -> Callable:
    def both() -> Any:
        Image.fromarray(array).save("data/masks/0.png")
        return then()

    return both


def with_nan(state: dict) -> None:
    state["query_decoder.query"][0, 0] = float("nan")


def coco(content: Any, then: Callable) -> Callable:
    return gone("data/masks", write("data/annotations/instances_train.json", json.dumps(content), then))


def full_disk() -> Any:
    def save(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        return predicting()()


def interrupted() -> Any:
    def load(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segmenter, "load", load)
        return predicting()()


COCO = {"images": [{"id": 1, "file_name": "0.png", "width": 50, "height": 40}], "categories": [{"id": 1, "name": "grass"}]}
POLYGON = {"id": 7, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9]]}
LONG_MASKS = Prediction(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4))

# name -> (what to do, a pattern that the one line must match)
COMMANDS = {
    # predict: the image
    "no such image": (predicting(image="nowhere.jpg"), "no image or folder at nowhere.jpg"),
    "an empty file": (write("photo.jpg", b"", predicting()), "photo.jpg: cannot be read as an image"),
    "text called .jpg": (write("photo.jpg", "hello", predicting()), "photo.jpg: cannot be read as an image .not an image"),
    "half a JPEG": (cut("photo.jpg", predicting()), "photo.jpg: cannot be read as an image .*truncated"),
    "a folder without images": (predicting(image="model"), "no images in model: want files that end in"),
    "--out is the folder of images": (lambda: predict.main(["model", "data", "--prompts", "x", "--out", "data"]), "must not be the folder"),
    # predict: the prompts
    "no prompt": (predicting(prompts=""), "nothing is asked: give --prompts"),
    "only separators": (predicting(prompts=" ; ;"), "no prompt in"),
    "no class list": (predicting("--names-from", "no.txt", prompts=None), "cannot read the class list no.txt"),
    "an empty class list": (write("c.txt", "# none\n", predicting("--names-from", "c.txt", prompts=None)), "c.txt names no class"),
    "a binary class list": (predicting("--names-from", "photo.jpg", prompts=None), "photo.jpg is not UTF-8 text"),
    "a class twice": (write("c.txt", "cat\nCat\n", predicting("--names-from", "c.txt", prompts=None)), "c.txt: .Cat. stands for class 0"),
    # predict: its options
    "a threshold of 1.5": (predicting("--threshold", "1.5"), "--threshold must lie in 0 to 1"),
    "a threshold of nan": (predicting("--threshold", "nan"), "--threshold must lie in 0 to 1"),
    "a threshold for a partition": (predicting("--together", "--threshold", "0.5"), "--threshold is for prompts asked alone"),
    "--out is a file": (predicting("--out", "photo.jpg"), "photo.jpg.*a file stands where a folder is wanted: give another name"),
    "--out cannot be made": (predicting("--out", "/proc/pmpseg/out"), "/proc/pmpseg"),
    "a full disk": (full_disk, "No space left on device.*free some space, or write to another disk"),
    "Ctrl-C": (interrupted, "interrupted"),
    # predict: the model
    "no such model": (predicting(model="nowhere"), "nowhere: no such folder; want a model folder"),
    "a run instead of its model": (lambda: (Path("run").mkdir(), Path("model").rename("run/model"), predicting(model="run")())[-1], "give its model, run/model"),
    "config.json is no JSON": (write("model/config.json", "{", predicting()), "config.json: not readable as JSON"),
    "config.json of another system": (write("model/config.json", '{"architecture": "X"}', predicting()), "not the config of a pmpseg model"),
    "config.json lacks a key": (edited("threshold", None, predicting()), "misses threshold; save the model again"),
    "config.json has a strange network": (edited("network", {"depth": 3}, predicting()), "'network' does not describe a PMP"),
    "config.json has a wrong image_size": (edited("image_size", "big", predicting()), "config.json: image_size: got 'big', want"),
    "config.json has a wrong threshold": (edited("threshold", 7, predicting()), "config.json: threshold: got 7, want"),
    "no weights": (gone("model/model.safetensors", predicting()), "model.safetensors: no such file; the model folder is not complete"),
    "half the weights": (cut("model/model.safetensors", predicting()), "model.safetensors: not a whole safetensors file"),
    "a pickle called safetensors": (write("model/model.safetensors", pickle.dumps({"a": 1}), predicting()), "not a whole safetensors file"),
    "foreign weights": (changed(lambda state: {"x": torch.zeros(1)}, predicting()), "weights do not fit the network in config.json"),
    "weights of another width": (changed(lambda s: s.update({"query_decoder.query": torch.zeros(6, 8)}), predicting()), "1 of .* weights do not fit"),
    "NaN in the weights": (changed(with_nan, predicting()), "'query_decoder.query' holds NaN or infinity"),
    "no text encoder": (gone("model/text_encoder", predicting()), "text_encoder: no such folder; the model folder is not complete"),
    "half a text encoder": (cut("model/text_encoder/model.safetensors", predicting()), "cannot open .*text_encoder"),
    "no vocabulary": (gone("model/vocabulary.txt", predicting()), "vocabulary.txt"),
    # evaluate
    "a model that names no data": (evaluating(), "does not say what data it was trained with; give a config with -c"),
    "a model that names foreign data": (edited("data", {"class_path": "os.system"}, evaluating()), "os.system, no class of pmpseg"),
    "a config without data": (write("c.yaml", "model: {}\n", evaluating("-c", "c.yaml")), "c.yaml: no 'data' with a class_path"),
    "no such config": (evaluating("-c", "c.yaml"), "no configuration 'c.yaml'"),
    "--out of evaluate is a folder": (evaluating("--out", "data"), "--out data is a folder: give a file"),
    # fit: the configuration
    "an unknown key": (fitting("--model.promt_attention", "none"), "unknown key .*did you mean 'model.prompt_attention'"),
    "an unknown class": (fitting("--data", "pmpseg.data.Folder"), "did you mean 'pmpseg.data.FolderData'"),
    "a word for a number": (fitting("--model.lr", "fast"), "model.lr: got 'fast', want float"),
    "null for a number": (write("c.yaml", "data:\n  class_path: pmpseg.data.FolderData\n  init_args:\n    colour:\n", fitting("-c", "c.yaml")), "colour: got null, want float"),
    "YAML that is none": (write("c.yaml", "a: [", fitting("-c", "c.yaml")), "c.yaml is no valid YAML"),
    "no checkpoint to continue from": (fitting("--ckpt_path", "last"), "no last.ckpt in run"),
    "a checkpoint that is none": (write("x.ckpt", "x", fitting("--ckpt_path", "x.ckpt")), "x.ckpt: not a whole checkpoint"),
    "a width that heads do not divide": (fitting("--model.dim", "30"), "dim: got 30, want a multiple of 4"),
    "no queries": (fitting("--model.num_queries", "0"), "num_queries: got 0, want 1 or more"),
    "a share above 1": (fitting("--model.few_prompts", "3"), "few_prompts: got 3.0, want 0 to 1"),
    "a batch of none": (fitting("--data.batch_size", "0"), "batch_size: got 0, want 1 or more"),
    "an unknown backbone": (fitting("--model.backbone", "resnet5O"), "no backbone is called 'resnet5O'; did you mean"),
    "half the backbone's weights": (write("w.safetensors", b"\x10\0\0\0\0\0\0\0{", fitting("--model.backbone_weights", "w.safetensors")), "w.safetensors: not readable as weights"),
    "no such text encoder": (fitting("--model.text", "no/such"), "no/such"),
    "a template without a place": (fitting("--model.templates", "[a photo]"), "wanted at least one, each with one '{}'"),
    "a run in a file's place": (fitting("--trainer.default_root_dir", "photo.jpg"), "photo.jpg.*a file stands where a folder is wanted"),
    "save never": (fitting("--save_every", "0"), "save_every: got 0, want 1 step or more"),
    "a learning rate that diverges": (fitting("--model.lr", "1e30", "--trainer.max_steps", "30", "--trainer.gradient_clip_val", "0"), "the loss is (nan|inf) at step .*lower model.lr"),
    # fit: the data
    "no data folder": (fitting("--data.root", "nowhere"), "nowhere has neither a folder masks/"),
    "no class list in the data": (gone("data/classes.txt", fitting()), "classes.txt"),
    "an image without a mask": (gone("data/masks/3.png", fitting()), "no mask in data/masks for 3.png"),
    "a mask of another size": (mask_of(np.zeros((9, 9), np.uint8), fitting()), "0.png is 9x9, its image 50x40"),
    "a label out of range": (mask_of(np.full((40, 50), 7, np.uint8), fitting()), "0.png"),
    "a mask in colours": (mask_of(np.zeros((40, 50, 3), np.uint8), fitting()), "0.png is a RGB picture"),
    "half a mask": (cut("data/masks/0.png", fitting()), "0.png: cannot be read as an image"),
    "half a training image": (cut("data/images/0.png", fitting()), "0.png: cannot be read as an image"),
    "fewer images than a batch": (fitting("--data.batch_size", "50"), "4 training images make no batch of 50: lower batch_size"),
    "COCO that is no JSON": (gone("data/masks", write("data/annotations/instances_train.json", "{", fitting())), "instances_train.json is not a JSON file"),
    "COCO without annotations": (coco(COCO, fitting()), "instances_train.json is no COCO instances file: 'annotations' is missing"),
    "COCO with a bad polygon": (coco(COCO | {"annotations": [POLYGON]}, fitting()), "annotation 7 has a bad mask"),
    "COCO with a foreign category": (coco(COCO | {"annotations": [POLYGON | {"category_id": 9}]}, fitting()), "annotation 7 has category 9"),
}

CALLS = {
    "an array of two numbers": (segmenting(np.zeros(2)), "got an array .2,., want .H, W."),
    "an array of 5 channels": (segmenting(np.zeros((4, 4, 5))), "want .H, W., .H, W, 3. or .H, W, 4."),
    "an array in 0 to 255 as float": (segmenting(np.full((4, 4, 3), 200.0)), "values outside"),
    "an array with NaN": (segmenting(np.full((4, 4, 3), np.nan)), "values outside"),
    "an empty array": (segmenting(np.zeros((0, 4, 3), np.uint8)), "got an array"),
    "an array of int64": (segmenting(np.zeros((4, 4, 3), np.int64)), "got an array of int64, want uint8"),
    "None for an image": (segmenting(None), "image: got"),
    "no prompts": (segmenting("photo.jpg", []), "prompt"),
    "a blank prompt": (segmenting("photo.jpg", ["grass", " "]), "prompt"),
    "a number for a prompt": (segmenting("photo.jpg", [3]), "prompt.*3"),
    "None for prompts": (segmenting("photo.jpg", None), "prompts: got None, want"),
    "a threshold of 2": (segmenting("photo.jpg", threshold=2), "threshold: got 2, want"),
    "a mask that was not asked for": (lambda: segmenting("photo.jpg")().mask(4), "mask.4.: there are 1 prompts"),
    "a network given bytes": (lambda: PMP(**TINY, text_dim=8, backbone="test_resnet")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.ones(1, 8)), "want float"),
    "a network given NaN prompts": (lambda: PMP(**TINY, text_dim=8, backbone="test_resnet").eval()(torch.zeros(1, 3, 32, 32), torch.full((1, 8), torch.nan)), "NaN"),
    "a loss of other prompts": (lambda: SetLoss()(LONG_MASKS, torch.zeros(1, 3, 4, 4) > 0, torch.zeros(1, 2) > 0), "masks: got"),
    "labels of other sizes": (lambda: ConfusionMetrics(3).update(torch.zeros(2, 2).long(), torch.zeros(3, 3).long()), "wanted the same shape"),
    "a class out of range": (lambda: ConfusionMetrics(3).update(torch.full((2, 2), 3), torch.zeros(2, 2).long()), "got class 3 in labels"),
    "run lengths that are none": (lambda: rle.decode({"size": [2, 2], "counts": "????"}), "counts|run"),
    "saving over something else": (lambda: Segmenter.load("model").save("data"), "data exists and is no model"),
}


def record(what: str, line: str) -> None:
    if path := os.environ.get("PMPSEG_TABLE"):
        with open(path, "a") as file:
            file.write(f"| {what} | `{line.replace('|', '/')}` |\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_one_line_and_leaves_nothing(name, here):
    do, pattern = COMMANDS[name]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        cli.run(do)
    lines = [line for line in said.getvalue().splitlines() if line.startswith("pmpseg: ")]
    assert end.value.code == (130 if name == "Ctrl-C" else 2)
    assert len(lines) == 1 and "Traceback" not in said.getvalue()
    record(name, lines[0])
    assert re.search(pattern, lines[0]), lines[0]
    assert len(lines[0]) < 400, "too long to read"
    answers = [p.name for p in here.rglob("*") if p.suffix == ".tmp" or p.name.startswith(".model-") or "_mask_" in p.name]
    answers += [name for name in ("out/predictions.json", "run/metrics.json", "run/checkpoints/last.ckpt") if Path(name).exists()]
    assert answers == [], "half a result was left"


@pytest.mark.parametrize("name", CALLS)
def test_the_python_interface_raises_one_line(name, here):
    do, pattern = CALLS[name]
    with pytest.raises(ValueError, match=pattern) as error:
        do()
    assert "\n" not in str(error.value)
    record(f"Python: {name}", str(error.value))


# ---- what looks odd and works


@pytest.mark.parametrize("size", [(1, 1), (12000, 300), (2, 700)])
def test_any_size(here, size):
    Image.new("RGB", size, "green").save("odd.png")
    assert predicting(image="odd.png")() == 0
    assert Image.open("out/odd_mask_00_grass.png").size == size


def test_any_mode(here):
    modes = {"CMYK": "jpg", "L": "jpg", "P": "png", "RGBA": "png", "LA": "png", "I;16": "png", "1": "png", "F": "tiff"}
    Path("odd").mkdir()
    for mode, suffix in modes.items():
        Image.new(mode, (40, 30)).save(f"odd/{mode.replace(';', '')}.{suffix}")
    assert predicting(image="odd")() == 0
    found = json.loads(Path("out/predictions.json").read_text())
    assert len(found["images"]) == len(modes) and {(i["width"], i["height"]) for i in found["images"]} == {(40, 30)}


@pytest.mark.filterwarnings("ignore:.*too long")
@pytest.mark.parametrize("prompt", ["🐈 кошка 猫 قطة", "a " * 400 + "cat", "İ", "'; DROP TABLE masks", "../../etc", "\u200bcat", "<b>&"])
def test_any_prompt(here, prompt):
    assert predicting(prompts=f"grass; {prompt}" if ";" not in prompt else prompt)() == 0
    assert all(path.resolve().parent == (here / "out").resolve() for path in Path("out").rglob("*"))


def test_one_corrupt_image_of_a_thousand(here, capsys):
    Path("many").mkdir()
    small = io.BytesIO()
    Image.new("RGB", (8, 8), "green").save(small, "PNG")
    for n in range(1000):
        Path(f"many/{n:04d}.png").write_bytes(small.getvalue() if n != 357 else small.getvalue()[:40])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pmpseg.predict.write_pictures", lambda *_: None)  # 2,000 pictures say nothing more
        assert predicting(image="many")() == 1
    said = capsys.readouterr()
    assert len(json.loads(Path("out/predictions.json").read_text())["images"]) == 999
    named = [line for line in said.err.splitlines() if "skipped" in line and "pmpseg" in line]
    assert len(named) == 1 and "many/0357.png: cannot be read as an image" in named[0]
    assert "999 images, 1 skipped" in said.out


def test_ctrl_c_in_a_real_process(here):
    Path("many").mkdir()
    for n in range(300):
        shutil.copy("photo.jpg", f"many/{n:03d}.jpg")
    command = [sys.executable, "-m", "pmpseg.predict", "model", "many", "--prompts", "grass", "--out", "out", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while len(list(Path("out").glob("*.png"))) < 4 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.splitlines()[-1] == "pmpseg: interrupted" and "Traceback" not in said
    pictures = list(Path("out").iterdir())
    assert pictures and not [p for p in pictures if p.suffix != ".png"]
    for picture in pictures:
        Image.open(picture).load()  # whole


def test_an_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)
