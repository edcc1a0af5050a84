"""Segmenter: a trained model as users hold it. Load it, give it an image and words, get masks.

    segmenter = Segmenter.load("runs/scenes/model")
    answer = segmenter.segment("photo.jpg", ["red circle", "grass"])
    answer.overlay().save("answer.png")

A model folder holds ``config.json``, ``model.safetensors``, ``vocabulary.txt`` and ``text_encoder/`` (a Hugging Face folder), and
``region/`` where there is a second stage: all that is needed on another machine. No lightning is imported here.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import InputError
from .hub import FORMAT, check_free, foreign_type, model_folder, public_name, read_config, read_json, shipped_or
from .images import read_image
from .inference import Encoded, Network, ask_one_by_one, ask_together, semantic_labels, soft_masks, with_synonyms
from .models.clip import TextEncoder
from .models.clipseg import CLIPSeg
from .models.pmp import PMP
from .models.prompts import PixelPrediction, Prompts
from .models.region import Regions
from .models.weights import load_state
from .panoptic import Segment, panoptic
from .region_stage import RegionStage
from .segmentation import NOTHING, Segmentation
from .vocabulary import Vocabulary

__all__ = ["NOTHING", "Segmentation", "Segmenter", "weights_hash", "working_image"]

MAX_ASPECT = 8  # an image more elongated than this is squeezed for the network
CLIPSEG_SIZE, CLIPSEG_THRESHOLD = 352, 0.3  # of the paper; its table 3
PROCESSOR = "preprocessor_config.json"
TOWER = "backbone.tower."  # the part of the network that may come from elsewhere


class Segmenter:
    """A network, its text side and its class list.

    Args:
        network, text, vocabulary: what was trained, a ``PMP`` or a ``CLIPSeg``; all are put into evaluation mode. Without a
            vocabulary no word has synonyms.
        image_size: the short side, in pixels, at which the network works.
        threshold: of scores, above which something is there; chosen on the validation split.
        data: ``class_path`` and ``init_args`` of the data that it was trained with, for ``evaluate``.
        backbone_weights: what the backbone was started from (see ``models.PMP``); ``save`` can name it in place of a frozen one.
        region: a second stage that names the network's masks again by what a CLIP sees in them. Scores change with it: choose the
            threshold anew.
        square: the network sees images squeezed to a square, as CLIPSeg's own code does; otherwise the aspect is kept.
    """

    def __init__(
        self,
        network: Network,
        text: TextEncoder,
        vocabulary: Vocabulary | None,
        image_size: int,
        threshold: float = 0.5,
        data: dict[str, Any] | None = None,
        backbone_weights: str | None = None,
        region: RegionStage | None = None,
        square: bool = False,
    ) -> None:
        self.network, self.text, self.vocabulary = network.eval(), text.eval(), vocabulary
        self.region = region and region.eval()
        self.image_size, self.threshold, self.square = image_size, threshold, square
        self.data, self.backbone_weights = data, backbone_weights

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: str | torch.device) -> "Segmenter":
        self.network.to(device)
        self.text.to(device)
        if self.region is not None:
            self.region.to(device)
        return self

    @torch.inference_mode()
    def segment(
        self,
        image: "str | Path | Image.Image | np.ndarray",
        prompts: Sequence[str] | str,
        threshold: float | None = None,
        together: bool = False,
    ) -> Segmentation:
        """The masks of ``prompts`` in ``image`` (see ``images.read_image``), at the image's own size.

        Each prompt is asked alone, the image being encoded once; its mask is empty unless its score is above ``threshold``
        (default: the model's own). ``together`` asks them as one list of classes, of which every pixel gets the best: faster,
        and right for a data set's class list. The name of a class of ``vocabulary`` stands for all of its synonyms.
        """
        if threshold is not None and not 0 <= threshold < 1:
            raise InputError(f"threshold: got {threshold}, want 0 to below 1, or None for the model's own")
        prompts = _list_of_strings("prompts", prompts)
        picture, tensor, features, encoded, regions = self._asked(image, prompts)
        image_size, size = (tensor.shape[-2], tensor.shape[-1]), (picture.height, picture.width)
        labels = None
        if together:
            prediction = ask_together(self.network, features, encoded, regions)
            labels = semantic_labels(prediction, image_size, size)[0].cpu().numpy()
            soft, scores = soft_masks(prediction)
        else:
            soft, scores = ask_one_by_one(self.network, features, encoded, regions=regions)
        threshold = self.threshold if threshold is None else threshold
        found = (scores[0].cpu().numpy(), soft[0].cpu(), threshold, image_size, labels)
        return Segmentation(picture, prompts, *found, stride=self.network.stride, by_pixel=self.network.by_pixel)

    def _asked(
        self, image: "str | Path | Image.Image | np.ndarray", prompts: list[str]
    ) -> tuple[Image.Image, Tensor, Encoded, Prompts, Regions | None]:
        """The picture, as the network sees it, what it sees in it, and what both stages are asked."""
        picture, words = read_image(image), with_synonyms(prompts, self.vocabulary)
        encoded = self.text.encode(words)
        tensor = working_image(picture, self.image_size, self.square).to(self.device)
        regions = None if self.region is None else self.region.ask(tensor, words)
        return picture, tensor, self.network.encode(tensor), encoded, regions

    @torch.inference_mode()
    def panoptic(
        self,
        image: "str | Path | Image.Image | np.ndarray",
        prompts: Sequence[str],
        things: Sequence[str] = (),
        threshold: float = 0.8,
        overlap: float = 0.8,
    ) -> tuple[np.ndarray, list[Segment]]:
        """A map (H, W) int32 of segment ids at the image's own size, 0 for none, and the segments; a label indexes ``prompts``.

        The prompts are asked together. ``things`` are those whose instances stay apart; each of the others is one segment.
        ``threshold`` and ``overlap`` as in ``pmpseg.panoptic.panoptic``.
        """
        prompts, things = _list_of_strings("prompts", prompts), _list_of_strings("things", things)
        if strange := [thing for thing in things if thing not in prompts]:
            raise InputError(f"things: got {strange[0]!r}, want some of the prompts: {', '.join(prompts)}")
        for name, value in (("threshold", threshold), ("overlap", overlap)):
            if not 0 <= value <= 1:
                raise InputError(f"{name}: got {value}, want 0 to 1")
        picture, tensor, features, encoded, regions = self._asked(image, prompts)
        prediction = ask_together(self.network, features, encoded, regions)
        if isinstance(prediction, PixelPrediction):
            raise InputError("panoptic: this model has no queries to tell instances apart; use segment, or a PMP")
        apart = {i for i, prompt in enumerate(prompts) if prompt in things}
        image_size, size = (tensor.shape[-2], tensor.shape[-1]), (picture.height, picture.width)
        (answer,) = panoptic(prediction, image_size, size, apart, threshold, overlap)
        return answer[0].cpu().numpy(), answer[1]

    # ---- files

    def save(self, folder: str | Path, encoders: str = "copy") -> Path:
        """Writes the model folder, whole or not at all; replaces an earlier model or an empty folder, and nothing else.

        ``encoders``: "copy" puts the text encoder into the folder; "reference" leaves its name and the hash of its weights, which
        must be found again, and be the same, where the model is loaded. So also for a frozen backbone with ``backbone_weights``.
        """
        if encoders not in ("copy", "reference"):
            raise InputError(f"encoders: got {encoders!r}, want 'copy' or 'reference'")
        folder = Path(folder)
        check_free(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "format": FORMAT,
            "architecture": type(self.network).__name__,
            "network": self.network.config,
            "text": {"templates": list(self.text.templates), "normalize": self.text.normalize},
            "image_size": self.image_size,
            "threshold": self.threshold,
            "square": self.square,
            "data": self.data,
        }
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
            part = Path(work) / "new"
            part.mkdir()
            state = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
            if encoders == "copy":
                self.text.save(part / "text_encoder")
            else:
                config["text"] |= _reference(self.text.name, self.text)
                if self.backbone_weights and self.network.config["backbone_frozen"]:
                    config["backbone_weights"] = _reference(self.backbone_weights, self.network.backbone.tower)
                    state = {k: v for k, v in state.items() if not k.startswith(TOWER)}
            save_file(state, part / "model.safetensors")
            if self.region is not None:
                self.region.write(part / "region", shared=self.text)
            if self.vocabulary is not None:
                self.vocabulary.write(part / "vocabulary.txt")
            (part / "config.json").write_text(json.dumps(config, indent=1) + "\n")
            if folder.exists():
                folder.rename(Path(work) / "old")
            part.rename(folder)
        return folder

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Segmenter":
        """Opens a model folder or a hub id, ours or transformers' of a CLIPSeg as it lies.

        Raises InputError where something is missing, foreign or broken.
        """
        folder = model_folder(folder)
        if foreign_type(folder) == "clipseg":
            return cls._of_transformers(folder).to(device)
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
        words = folder / "vocabulary.txt"
        vocabulary = Vocabulary.read(words) if words.exists() or kind is PMP else None
        data, source = config.get("data"), tower and tower["name"]
        region = RegionStage.read(folder / "region", shared=text) if (folder / "region").exists() else None
        size, threshold, square = config["image_size"], config["threshold"], config.get("square", False)
        return cls(network, text, vocabulary, size, threshold, data, source, region, square).to(device)

    @classmethod
    def _of_transformers(cls, folder: Path) -> "Segmenter":
        """A ``CLIPSegForImageSegmentation``'s folder: size and squeezing as its image processor has them."""
        size = read_json(folder / PROCESSOR).get("size", {}) if (folder / PROCESSOR).is_file() else {}
        side = size.get("height", CLIPSEG_SIZE) if isinstance(size, dict) else size
        network, text = CLIPSeg.from_transformers(folder), TextEncoder(folder, normalize=False)
        return cls(network, text, None, side, CLIPSEG_THRESHOLD, square=True)


def _list_of_strings(name: str, given: Sequence[str] | str) -> list[str]:
    if not isinstance(given, str | Sequence) or not all(isinstance(one, str) for one in given):
        raise InputError(f"{name}: got {given!r:.80}, want a string or a list of strings")
    return [given] if isinstance(given, str) else list(given)


def working_image(image: Image.Image, short_side: int, square: bool = False) -> Tensor:
    """(1, 3, h, w) in [0, 1]: the short side at ``short_side``, the long one at most ``MAX_ASPECT`` times that; or a square."""
    scale, longest = short_side / min(image.size), 1 if square else MAX_ASPECT
    width, height = (min(round(s * scale), longest * short_side) for s in image.size)
    resized = image if (width, height) == image.size else image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255


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
