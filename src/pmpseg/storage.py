"""Model folders: how a ``Segmenter`` is written and read.

A folder holds ``config.json``, ``model.safetensors``, ``text_encoder/`` (a Hugging Face folder) and, where there are such,
``vocabulary.txt``, ``region/`` (a second stage) and ``image_encoder.safetensors``: all that is needed on another machine.
A folder of transformers' ``CLIPSegForImageSegmentation`` is read, too, and one of its Mask2Former or MaskFormer.
"""

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import InputError
from .hub import FORMAT, check_free, foreign_type, public_name, read_config, read_json, shipped_or
from .models.clip import TextEncoder
from .models.clipseg import CLIPSeg
from .models.closed_list import ClosedList, ClosedWords
from .models.pmp import PMP
from .models.token_towers import build_token_backbone
from .models.weights import load_state
from .region_stage import RegionStage
from .supports import Showing
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from .segmenter import Segmenter

CLIPSEG_SIZE, CLIPSEG_THRESHOLD = 352, 0.3  # of the paper; its table 3
CLOSED_SIZE, CLOSED_LONGEST = 800, 1333  # of transformers' image processor of both, where a folder says nothing
CLOSED_THRESHOLD = 0.5  # more likely than not; its post-processing has it, too
IMAGE_ENCODER, PROCESSOR = "image_encoder.safetensors", "preprocessor_config.json"
TOWER = "backbone.tower."  # the part of the network that may come from elsewhere


def write_model(segmenter: "Segmenter", folder: Path, encoders: str) -> Path:
    """See ``Segmenter.save``."""
    if isinstance(segmenter.network, ClosedList):
        raise InputError(f"{segmenter.text.name} is a model of transformers, which is read as it lies: keep that folder")
    if encoders not in ("copy", "reference"):
        raise InputError(f"encoders: got {encoders!r}, want 'copy' or 'reference'")
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    network, text = segmenter.network, segmenter.text
    config: dict[str, Any] = {
        "format": FORMAT,
        "architecture": type(network).__name__,
        "network": network.config,
        "text": {"templates": list(text.templates), "normalize": text.normalize},
        "image_size": segmenter.image_size,
        "threshold": segmenter.threshold,
        "square": segmenter.square,
        "showing": dataclasses.asdict(segmenter.showing),
        "data": segmenter.data,
    }
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        part = Path(work) / "new"
        part.mkdir()
        state = _weights(network)
        if encoders == "copy":
            text.save(part / "text_encoder")
        else:
            config["text"] |= _reference(text.name, text)
            if segmenter.backbone_weights and network.config["backbone_frozen"]:
                config["backbone_weights"] = _reference(segmenter.backbone_weights, network.backbone.tower)
                state = {k: v for k, v in state.items() if not k.startswith(TOWER)}
        save_file(state, part / "model.safetensors")
        if segmenter.image_encoder is not None:
            config["image_encoder"] = segmenter.image_encoder.config
            save_file(_weights(segmenter.image_encoder), part / IMAGE_ENCODER)
        if segmenter.region is not None:
            segmenter.region.write(part / "region", shared=text)
        if segmenter.vocabulary is not None:
            segmenter.vocabulary.write(part / "vocabulary.txt")
        (part / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        if folder.exists():
            folder.rename(Path(work) / "old")
        part.rename(folder)
    return folder


def read_model(folder: Path) -> dict[str, Any]:
    """The arguments of ``Segmenter`` that a folder describes; see ``Segmenter.load``."""
    if (foreign := foreign_type(folder)) == "clipseg":
        return _of_transformers(folder)
    if foreign in ("mask2former", "maskformer"):
        return _of_closed_list(folder)
    config = read_config(folder)
    text = _load_text(folder, config["text"])
    tower = config.get("backbone_weights")  # of a frozen one that is not in the folder
    kind: type[PMP] | type[CLIPSeg] = CLIPSeg if config["architecture"] == "CLIPSeg" else PMP
    try:
        network = kind(**config["network"], backbone_weights=tower and shipped_or(tower["name"]))
    except TypeError as error:
        raise InputError(f"{folder / 'config.json'}: 'network' does not describe a {kind.__name__} ({error})") from None
    if tower:
        _check_reference("backbone", tower, network.backbone.tower)
    load_state(network, folder / "model.safetensors", without=TOWER if tower else None)
    words, encoder = folder / "vocabulary.txt", None
    if shape := config.get("image_encoder"):
        encoder = build_token_backbone(shape["name"], config=shape)
        load_state(encoder, folder / IMAGE_ENCODER)
    return {
        "network": network,
        "text": text,
        "vocabulary": Vocabulary.read(words) if words.exists() or kind is PMP else None,
        "image_size": config["image_size"],
        "threshold": config["threshold"],
        "data": config.get("data"),
        "backbone_weights": tower and tower["name"],
        "region": RegionStage.read(folder / "region", shared=text) if (folder / "region").exists() else None,
        "square": config.get("square", False),
        "showing": Showing(**config.get("showing", {"size": config["image_size"]})),
        "image_encoder": encoder,
    }


def _of_transformers(folder: Path) -> dict[str, Any]:
    """A ``CLIPSegForImageSegmentation``'s: size and squeezing as its image processor has them, examples as the paper."""
    size = read_json(folder / PROCESSOR).get("size", {}) if (folder / PROCESSOR).is_file() else {}
    side = size.get("height", CLIPSEG_SIZE) if isinstance(size, dict) else size
    network = CLIPSeg.from_transformers(folder)
    return {
        "network": network,
        "text": TextEncoder(folder, normalize=False),
        "vocabulary": None,
        "image_size": side,
        "threshold": CLIPSEG_THRESHOLD,
        "square": True,
        "showing": Showing(side, mean=network.backbone.config["mean"]),
    }


def _of_closed_list(folder: Path) -> dict[str, Any]:
    """A Mask2Former's or MaskFormer's: its labels as config.json has them, sizes as its image processor's."""
    labels = read_json(folder / "config.json").get("id2label", {})
    network = ClosedList.from_transformers(folder)
    count = network.network.config["num_classes"]
    # transformers leaves its default out of the file: two classes, called LABEL_0 and LABEL_1.
    names = [str(labels.get(str(index), f"LABEL_{index}")) for index in range(count)]
    processor = read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
    size, longest = processor.get("size", CLOSED_SIZE), processor.get("max_size", CLOSED_LONGEST)
    if isinstance(size, dict) and "height" in size:  # a fixed size, which here is a square's
        size, longest, square = min(size["height"], size["width"]), None, True
    else:
        square = False
        if isinstance(size, dict):
            size, longest = size.get("shortest_edge", CLOSED_SIZE), size.get("longest_edge")
    return {
        "network": network,
        "text": ClosedWords(names, str(folder)),
        "vocabulary": None,
        "image_size": size,
        "longest_side": longest,
        "threshold": CLOSED_THRESHOLD,
        "square": square,
    }


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over the names and values of all weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _reference(name: str, module: nn.Module) -> dict[str, str]:
    return {"name": public_name(name), "sha256": weights_hash(module)}


def _check_reference(what: str, reference: dict[str, str], module: nn.Module) -> None:
    if weights_hash(module) != reference["sha256"]:
        name = reference["name"]
        raise InputError(f"{what} {name}: its weights are not those that the model was trained with (SHA-256 differs)")


def _load_text(folder: Path, config: dict[str, Any]) -> TextEncoder:
    name = shipped_or(config["name"]) if "name" in config else folder / "text_encoder"
    if "name" not in config and not Path(name).is_dir():
        raise InputError(f"{name}: no such folder; the model folder is not complete: copy or save the model again")
    text = TextEncoder(name, config["templates"], config["normalize"])
    if "name" in config:
        _check_reference("text encoder", config, text)
    return text
