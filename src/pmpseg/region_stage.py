"""A second stage as users hold it: a region classifier, the text side of its CLIP, and what else a region may be.

A region model's folder holds ``config.json``, ``model.safetensors`` and ``text_encoder/``; training leaves one in RUN/model. A
``Segmenter`` keeps its own in ``region/``, without the text encoder where that is its own one. No lightning is imported here.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InputError
from .hub import FORMAT, shipped_or
from .models.clip import TextEncoder
from .models.region import RegionClassifier, Regions, cosines
from .models.weights import load_state

ARCHITECTURE = "RegionClassifier"


class RegionStage(nn.Module):
    """``classifier`` with ``text``, an encoder of the same CLIP. ``contrast``: what a region may be beside a prompt that is asked
    alone; OVSeg's demo has "others"."""

    def __init__(self, classifier: RegionClassifier, text: TextEncoder, contrast: Sequence[str] = ("others",)) -> None:
        super().__init__()
        if not text.is_clip or text.dim != classifier.dim:
            kind = "a CLIP" if text.is_clip else "no CLIP"
            got = f"text encoder {text.name} ({kind}, width {text.dim})"
            raise InputError(f"{got} cannot name regions of a CLIP of width {classifier.dim}: give the same CLIP's text side")
        is_list = isinstance(contrast, list | tuple) and len(contrast) > 0
        if not is_list or not all(isinstance(word, str) and word.strip() for word in contrast):
            raise InputError(f"contrast: got {contrast!r:.80}, want a list of one word or more, as ['others']")
        self.classifier, self.text, self.contrast = classifier, text, tuple(contrast)

    @torch.no_grad()
    def ask(self, image: Tensor, prompts: Sequence[str | Sequence[str]]) -> Regions:
        """What ``inference.ask_together`` and ``ask_one_by_one`` want: K prompts, or lists of synonyms; images (B, 3, H, W)."""
        names, contrast = (self.text.encode(words).pooled[0] for words in (prompts, self.contrast))
        return Regions(self.classifier, image, names, contrast)

    @torch.inference_mode()
    def best_regions(self, image: Tensor, masks: Tensor, nouns: Sequence[str]) -> tuple[Tensor, Tensor]:
        """For each of N nouns the mask that its CLIP scores highest, as OVSeg pairs them: cosines and indices, both (N,).

        ``image`` (3, H, W); ``masks`` (Q, H, W), probabilities. Where no mask is a region, the indices are -1.
        """
        regions, valid = self.classifier.embed(image[None], masks[None])
        likeness = cosines(F.normalize(self.text.encode(nouns).pooled[0], dim=-1), regions[0])  # (N, Q)
        best, index = likeness.masked_fill(~valid, -torch.inf).max(1)
        return best, index.where(best.isfinite(), -1)

    # ---- files

    def save(self, folder: str | Path) -> Path:
        """Writes a region model, whole or not at all; replaces an earlier one or an empty folder, and nothing else."""
        folder = Path(folder)
        if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _is_region_model(folder))):
            raise InputError(f"{folder} exists and is no region model: give a new or an empty folder to save into")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
            self.write(Path(work) / "new")
            if folder.exists():
                folder.rename(Path(work) / "old")
            (Path(work) / "new").rename(folder)
        return folder

    def write(self, folder: Path, shared: TextEncoder | None = None) -> None:
        """Fills a new folder; without the text encoder, if it is the ``shared`` one, which is saved elsewhere."""
        folder.mkdir()
        config: dict[str, Any] = {"format": FORMAT, "architecture": ARCHITECTURE, "network": self.classifier.config}
        config |= {"contrast": list(self.contrast), "text": None}
        if self.text is not shared:
            config["text"] = {"templates": list(self.text.templates), "normalize": self.text.normalize}
            self.text.save(folder / "text_encoder")
        state = {k: v.detach().cpu().contiguous() for k, v in self.classifier.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    @classmethod
    def load(cls, name: str | Path) -> "RegionStage":
        """A region model's folder (or the run's that left it), or a CLIP's folder or hub id, which is taken as it is."""
        folder = Path(shipped_or(str(name)))
        folder = folder / "model" if _is_region_model(folder / "model") else folder
        if _is_region_model(folder):
            return cls.read(folder)
        return cls(RegionClassifier(folder if folder.is_dir() else name), TextEncoder(folder if folder.is_dir() else name))

    @classmethod
    def read(cls, folder: Path, shared: TextEncoder | None = None) -> "RegionStage":
        """What ``write`` wrote. Raises InputError where something is missing, foreign or broken."""
        path = folder / "config.json"
        if not _is_region_model(folder):
            raise InputError(f"{path}: not the config of a region model; want 'architecture': {ARCHITECTURE!r}: save it again")
        config = json.loads(path.read_text(encoding="utf-8"))
        if missing := [key for key in ("network", "contrast", "text") if key not in config]:
            raise InputError(f"{path}: does not describe a region model, lacks {missing[0]!r}: save it again")
        contrast, own = config["contrast"], config["text"]
        if own is not None and not _is_text(own):
            raise InputError(f"{path}: text: got {own!r:.80}, want null, or a list of templates and normalize (true or false)")
        try:
            classifier = RegionClassifier(**config["network"])
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except Exception as error:  # torch and transformers have many kinds, some of several lines
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise InputError(f"{path}: 'network' does not describe a region model ({reason}): save it again") from None
        load_state(classifier, folder / "model.safetensors")
        if own is None:
            if shared is None:
                raise InputError(f"{folder} has its text encoder in the model around it: load that one, or save the region alone")
            return cls(classifier, shared, contrast)
        if not (folder / "text_encoder").is_dir():
            raise InputError(f"{folder / 'text_encoder'}: no such folder; the region model is not whole: copy or save it again")
        return cls(classifier, TextEncoder(folder / "text_encoder", own["templates"], own["normalize"]), contrast)


def _is_text(config: Any) -> bool:
    """Whether this is what ``write`` says of a text encoder of its own."""
    if not isinstance(config, dict) or not isinstance(config.get("normalize"), bool):
        return False
    templates = config.get("templates")
    return isinstance(templates, list) and all(isinstance(template, str) for template in templates)


def _is_region_model(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("architecture") == ARCHITECTURE and config.get("format") == FORMAT
