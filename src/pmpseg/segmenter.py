"""Segmenter: a trained model as users hold it. Load it, give it an image and words, or examples, get masks.

    segmenter = Segmenter.load("runs/scenes/model")
    answer = segmenter.segment("photo.jpg", ["red circle", "grass"])
    answer.overlay().save("answer.png")

Model folders are described in ``storage``. No lightning is imported here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import InputError
from .hub import model_folder
from .image_prompts import ImagePrompt
from .images import read_image
from .inference import Encoded, Network, ask_one_by_one, ask_together, semantic_labels, soft_masks, with_synonyms
from .models.clip import TextEncoder
from .models.clipseg import CLIPSeg
from .models.closed_list import ClosedWords
from .models.prompts import PixelPrediction, Prompts
from .models.region import Regions
from .models.token_towers import TokenBackbone
from .panoptic import Segment, panoptic
from .region_stage import RegionStage
from .segmentation import NOTHING, Segmentation
from .storage import read_model, write_model
from .supports import Prompt, Showing, examples_of, list_of_prompts, mix, names_of, text_share
from .vocabulary import Vocabulary

__all__ = ["NOTHING", "Segmentation", "Segmenter", "working_image"]

MAX_ASPECT = 8  # an image more elongated than this is squeezed for the network


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
        longest_side: what the long side may be, by which the short one becomes shorter; None for no such limit.
        square: the network sees images squeezed to a square, as CLIPSeg's own code does; otherwise the aspect is kept.
        showing: how examples are shown to the encoder that embeds them, where it is not the default.
        image_encoder: what embeds them beside a network that does not, as a PMP.
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
        showing: Showing | None = None,
        image_encoder: TokenBackbone | None = None,
        longest_side: int | None = None,
    ) -> None:
        self.network, self.text, self.vocabulary = network.eval(), text.eval(), vocabulary
        self.showing, self.image_encoder = showing or Showing(image_size), image_encoder and image_encoder.eval()
        self.region = region and region.eval()
        self._embeddings: WeakKeyDictionary[ImagePrompt, Tensor] = WeakKeyDictionary()
        self.image_size, self.threshold, self.square = image_size, threshold, square
        self.longest_side = longest_side
        self.data, self.backbone_weights = data, backbone_weights

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: str | torch.device) -> "Segmenter":
        self.network.to(device)
        self.text.to(device)
        if self.image_encoder is not None:
            self.image_encoder.to(device)
        if self.region is not None:
            self.region.to(device)
        return self

    @torch.inference_mode()
    def segment(
        self,
        image: "str | Path | Image.Image | np.ndarray",
        prompts: Sequence[Prompt] | Prompt,
        threshold: float | None = None,
        together: bool = False,
    ) -> Segmentation:
        """The masks of ``prompts`` in ``image`` (see ``images.read_image``), at the image's own size.

        A prompt is a string; an ``ImagePrompt``, an example; or a ``MixedPrompt`` of both.

        Each prompt is asked alone, the image being encoded once; its mask is empty unless its score is above ``threshold``
        (default: the model's own). ``together`` asks them as one list of classes, of which every pixel gets the best: faster,
        and right for a data set's class list. The name of a class of ``vocabulary`` stands for all of its synonyms.
        """
        if threshold is not None and not 0 <= threshold < 1:
            raise InputError(f"threshold: got {threshold}, want 0 to below 1, or None for the model's own")
        asked = list_of_prompts(prompts)
        picture, tensor, features, encoded, regions = self._asked(image, asked)
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
        return Segmentation(picture, names_of(asked), *found, stride=self.network.stride, by_pixel=self.network.by_pixel)

    def _asked(
        self, image: "str | Path | Image.Image | np.ndarray", prompts: list[Prompt]
    ) -> tuple[Image.Image, Tensor, Encoded, Prompts, Regions | None]:
        """The picture, as the network sees it, what it sees in it, and what both stages are asked."""
        picture = read_image(image)
        words = with_synonyms(names_of(prompts, text_only=True), self.vocabulary)
        if isinstance(self.text, ClosedWords) and self.region is None:
            self.text.check(words)
        encoded = self._with_examples(self.text.encode(words), prompts)
        tensor = working_image(picture, self.image_size, self.square, self.longest_side).to(self.device)
        regions = None if self.region is None else self.region.ask(tensor, words)
        return picture, tensor, self.network.encode(tensor), encoded, regions

    @property
    def takes_examples(self) -> bool:
        """Whether images may be prompts."""
        return self.image_encoder is not None or isinstance(self.network, CLIPSeg)

    def not_on_list(self, prompts: Sequence[str]) -> list[str]:
        """Those of ``prompts`` that a model with a class list of its own does not know; only a second stage can find them."""
        words = with_synonyms(prompts, self.vocabulary)
        return self.text.missing(words) if isinstance(self.text, ClosedWords) else []

    def embed(self, images: Tensor) -> Tensor:
        """Visually prompted images (N, 3, s, s) in [0, 1] -> (N, E). Raises InputError where the model takes words only."""
        if self.image_encoder is not None:
            return self.image_encoder.embed(images)
        if isinstance(self.network, CLIPSeg):
            return self.network.embed(images)
        raise InputError("this model takes no images as prompts: ask it with words, or use a CLIPSeg")

    def _with_examples(self, encoded: Prompts, prompts: list[Prompt]) -> Prompts:
        """``encoded`` texts, with the examples of those prompts that have some in their place, or mixed in."""
        examples = [examples_of(prompt) for prompt in prompts]
        if not any(examples):
            return encoded
        if self.region is not None:
            raise InputError("a second stage names masks by words only: ask with words, or leave region out")
        shown, has = torch.zeros_like(encoded.pooled), torch.zeros_like(encoded.valid)
        for k, some in enumerate(examples):
            if some:
                shown[0, k], has[0, k] = torch.cat([self._embedding(one) for one in some]).mean(0), True
        weight = [text_share(prompt) for prompt in prompts]
        return mix(encoded, shown, has, torch.tensor([weight], device=self.device), self.text.normalize)

    def _embedding(self, example: ImagePrompt) -> Tensor:
        """(1, E), remembered as long as the example lives: a folder of images is asked with one."""
        if example not in self._embeddings:
            picture = self.showing(*(x.to(self.device) for x in example.tensors()))
            self._embeddings[example] = self.embed(picture)
        return self._embeddings[example].to(self.device)

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
        picture, tensor, features, encoded, regions = self._asked(image, list(prompts))
        prediction = ask_together(self.network, features, encoded, regions)
        if isinstance(prediction, PixelPrediction):
            raise InputError("panoptic: this model has no queries to tell instances apart; use segment, or a PMP")
        apart = {i for i, prompt in enumerate(prompts) if prompt in things}
        image_size, size = (tensor.shape[-2], tensor.shape[-1]), (picture.height, picture.width)
        (answer,) = panoptic(prediction, image_size, size, apart, threshold, overlap)
        return answer[0].cpu().numpy(), answer[1]

    def save(self, folder: str | Path, encoders: str = "copy") -> Path:
        """Writes the model folder, whole or not at all; replaces an earlier model or an empty folder, and nothing else.

        ``encoders``: "copy" puts the text encoder into the folder; "reference" leaves its name and the hash of its weights, which
        must be found again, and be the same, where the model is loaded. So also for a frozen backbone with ``backbone_weights``.
        """
        return write_model(self, Path(folder), encoders)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Segmenter":
        """Opens a model folder or a hub id, ours, or transformers' as it lies: a CLIPSeg, Mask2Former or MaskFormer.

        Raises InputError where something is missing, foreign or broken.
        """
        return cls(**read_model(model_folder(folder))).to(device)


def _list_of_strings(name: str, given: Sequence[str] | str) -> list[str]:
    if not isinstance(given, str | Sequence) or not all(isinstance(one, str) for one in given):
        raise InputError(f"{name}: got {given!r:.80}, want a string or a list of strings")
    return [given] if isinstance(given, str) else list(given)


def working_image(image: Image.Image, short_side: int, square: bool = False, longest_side: int | None = None) -> Tensor:
    """(1, 3, h, w) in [0, 1]: the short side at ``short_side``, the long one at most ``MAX_ASPECT`` times that; or a square.

    Where the long side would exceed ``longest_side``, both are smaller.
    """
    if longest_side and not square:
        short_side = max(1, min(short_side, round(longest_side * min(image.size) / max(image.size))))
    scale, longest = short_side / min(image.size), 1 if square else MAX_ASPECT
    width, height = (min(round(s * scale), longest * short_side) for s in image.size)
    resized = image if (width, height) == image.size else image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255


