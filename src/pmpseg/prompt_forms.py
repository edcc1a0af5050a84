"""What a network is asked with in an evaluation: the words of a prompt, images that show what they mean, or a mix of both."""

from typing import Any

from torch import Tensor

from .errors import InputError
from .models.prompts import Prompts
from .supports import Showing, embed_supports, mix

FORMS = ("text", "image", "mixed")


class PromptForm:
    """``text``, ``image``, or ``mixed``: ``text_weight`` * text + (1 - ``text_weight``) * image (see ``supports.mix``).

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

    def __call__(
        self, network: Any, text: Prompts, image: Tensor, mask: Tensor, valid: Tensor, normalize: bool = False
    ) -> tuple[Prompts, int]:
        """``text`` (B, K) with supports (B, K, S, 3, h, w) uint8, (B, K, S, h, w) and (B, K, S) bool -> prompts (B, K), and how
        many of them have no support. ``normalize`` as the text encoder's.
        """
        if not hasattr(network, "embed"):
            raise InputError(f"{type(network).__name__} takes no image prompts: ask it with text, or use a CLIPSeg")
        shown, has = embed_supports(network.embed, Showing(image.shape[-1], self.preset), image, mask, valid)
        return mix(text, shown.to(text.pooled.dtype), has, self.text_weight, normalize), int((~has & text.valid).sum())
