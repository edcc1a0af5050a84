"""What a network is asked with in an evaluation: the words of a prompt, images that show what they mean, or a mix of both."""

from collections.abc import Callable

from torch import Tensor

from .errors import InputError
from .models.prompts import Prompts
from .supports import Showing, embed_supports, mix

FORMS = ("text", "image", "mixed")


class PromptForm:
    """``text``, ``image``, or ``mixed``: ``text_weight`` * text + (1 - ``text_weight``) * image (see ``supports.mix``).

    ``embed`` and ``showing`` are what embeds supports and how they are shown to it, as a ``Segmenter`` has them; text needs
    neither. A prompt without a valid support is asked by its text in any form.
    """

    def __init__(
        self,
        form: str = "text",
        text_weight: float = 0.5,
        embed: Callable[[Tensor], Tensor] | None = None,
        showing: Showing | None = None,
    ) -> None:
        if form not in FORMS:
            raise InputError(f"prompt form: got {form!r}, want one of {', '.join(FORMS)}")
        if not 0 <= text_weight <= 1:
            raise InputError(f"text weight: got {text_weight}, want 0 (images only) to 1 (text only)")
        if form != "text" and (embed is None or showing is None):
            raise ValueError(f"a prompt form {form!r} wants embed and showing, as a Segmenter has them")
        self.form, self.embed, self.showing = form, embed, showing
        self.text_weight = {"text": 1.0, "image": 0.0, "mixed": text_weight}[form]

    def __call__(self, text: Prompts, image: Tensor, mask: Tensor, valid: Tensor, normalize: bool) -> tuple[Prompts, int]:
        """``text`` (B, K) with supports (B, K, S, 3, h, w) uint8, (B, K, S, h, w) and (B, K, S) bool -> prompts (B, K), and how
        many of them have no support. ``normalize`` as the text encoder's.
        """
        assert self.embed is not None and self.showing is not None
        shown, has = embed_supports(self.embed, self.showing, image, mask, valid)
        return mix(text, shown.to(text.pooled.dtype), has, self.text_weight, normalize), int((~has & text.valid).sum())
