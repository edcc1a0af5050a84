"""What a network is asked with in an evaluation: the words of a prompt, images that show what they mean, or a mix of both.

Source: CLIPSeg (Lueddecke and Ecker 2022, sections 3.2 and 4; papers.md 3.2): condition = w * text + (1 - w) * image, the images'
embeddings averaged first.
Shapes: K prompts of one image with S supports each, as in the items of ``pmpseg.data``; embeddings (K, E).
"""

from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .image_prompts import visual_prompt
from .models.prompts import Prompts, as_prompts

FORMS = ("text", "image", "mixed")
AT_ONCE = 32  # supports that are embedded together


class PromptForm:
    """How prompts are asked: ``text`` (w = 1), ``image`` (w = 0) or ``mixed`` (w = ``text_weight``).

    ``preset`` is the visual prompt that supports are made into (see ``image_prompts``). A prompt without a valid support is asked
    by its text in any form.
    """

    def __init__(self, form: str = "text", text_weight: float = 0.5, preset: str = "crop_blur_highlight") -> None:
        if form not in FORMS:
            raise InputError(f"prompt form: got {form!r}, want one of {', '.join(FORMS)}")
        if not 0 <= text_weight <= 1:
            raise InputError(f"text weight: got {text_weight}, want 0 (images only) to 1 (text only)")
        self.form, self.preset = form, preset
        self.text_weight = {"text": 1.0, "image": 0.0, "mixed": text_weight}[form]

    def __call__(self, network: Any, text: Prompts, image: Tensor, mask: Tensor, valid: Tensor) -> tuple[Prompts, int]:
        """``text`` (1, K) with supports (K, S, 3, h, w) uint8, (K, S, h, w) and (K, S) bool -> prompts (1, K), and how many of
        them have no support.
        """
        words = text.pooled[0]  # (K, E)
        supports = self._embed(network, image[valid], mask[valid], words)
        shown = torch.zeros_like(words).index_add(0, valid.nonzero()[:, 0], supports)
        number = valid.sum(1)  # (K,)
        mean = shown / number.clamp(min=1)[:, None]
        mixed = torch.where(number[:, None] > 0, self.text_weight * words + (1 - self.text_weight) * mean, words)
        return as_prompts(mixed[None], 1), int((number == 0).sum())

    def _embed(self, network: Any, images: Tensor, masks: Tensor, like: Tensor) -> Tensor:
        """Embeddings (N, E) of N supports; their size stays, which ``image_size`` of the data decides."""
        if not hasattr(network, "embed"):
            raise InputError(f"{type(network).__name__} takes no image prompts: ask it with text, or use a CLIPSeg")
        made = [like.new_zeros(0, like.shape[1])]
        for start in range(0, len(images), AT_ONCE):
            some, where = images[start : start + AT_ONCE], masks[start : start + AT_ONCE]
            seen = visual_prompt(some.float() / 255, where, self.preset, size=some.shape[-1])
            made.append(network.embed(seen).to(like.dtype))
        return torch.cat(made)
