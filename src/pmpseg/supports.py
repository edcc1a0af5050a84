"""Prompts by example: support images become embeddings beside those of texts, and both are mixed (CLIPSeg, sec. 3.1 and 4).

``embed`` is what maps visually prompted images (N, 3, s, s) in [0, 1] to (N, E) in the space of the texts: a ``CLIPSeg``'s own
encoder, or a ``TokenBackbone`` of the texts' CLIP beside another network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InputError
from .image_prompts import ImagePrompt, MixedPrompt
from .models.prompts import Prompts
from .visual_prompts import VisualPrompt, settings_of, visual_prompt

AT_ONCE = 64  # images
FORMS = ("text", "image", "mixed")
Prompt = str | ImagePrompt | MixedPrompt


@dataclass(frozen=True)
class Showing:
    """How an example is brought before the encoder's eyes; see ``visual_prompts.visual_prompt``.

    ``size``: the side of the picture, to which the shorter side of a larger image is shrunk first, since a blur counts in pixels.
    ``mean``: None, or the encoder's own, for what the paper's code does, which also enlarges by the ``nearest`` pixel.
    """

    size: int
    preset: str | VisualPrompt = "crop_blur_highlight"
    mean: Sequence[float] | None = None
    nearest: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.preset, dict):  # from a model's config.json
            object.__setattr__(self, "preset", VisualPrompt(**self.preset))
        settings_of(self.preset)
        if self.size < 1:
            raise InputError(f"prompt_size: got {self.size}, want 1 pixel or more, as the encoder was trained with")

    def __call__(self, images: Tensor, masks: Tensor) -> Tensor:
        side = min(images.shape[-2:])
        if side > self.size:
            shape = [max(1, round(x * self.size / side)) for x in images.shape[-2:]]
            images = F.interpolate(images, shape, mode="bilinear", antialias=True)
            cover = F.interpolate(masks[:, None].float(), shape, mode="bilinear", antialias=True)[:, 0]
            masks = cover >= cover.flatten(1).amax(1).clamp(max=0.5)[:, None, None]  # what is thin keeps a pixel
        return visual_prompt(images, masks, self.preset, self.size, self.mean, self.nearest)


def embed_supports(
    embed: Callable[[Tensor], Tensor], showing: Showing, images: Tensor, masks: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """S examples of each of K prompts -> the mean of their embeddings (B, K, E), and (B, K) bool: whether there was any.

    images (B, K, S, 3, h, w) uint8, masks (B, K, S, h, w) bool and valid (B, K, S) bool as data modules give them. What is not
    valid is not embedded.
    """
    pictures, masks = images[valid], masks[valid]  # (N, 3, h, w) and (N, h, w)
    parts = [
        embed(showing(pictures[start : start + AT_ONCE].float() / 255, masks[start : start + AT_ONCE]))
        for start in range(0, len(pictures), AT_ONCE)
    ]
    if not parts:  # one black picture, so that its width is known, and every process runs the same network
        parts = [0 * embed(images.new_zeros(1, 3, showing.size, showing.size, dtype=torch.float32))[:0]]
    found = torch.cat(parts)
    sums = found.new_zeros(*valid.shape, found.shape[-1])
    sums[valid] = found
    return sums.sum(2) / valid.sum(2, keepdim=True).clamp(min=1), valid.any(2)


class PromptForm:
    """What an evaluation asks with: ``text``, ``image`` (a prompt's examples) or ``mixed``, with this share of the text.

    ``embed`` and ``showing`` are a ``Segmenter``'s.
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
            raise InputError(f"text weight: got {text_weight}, want 0 (examples only) to 1 (text only)")
        self.form, self.embed, self.showing = form, embed, showing
        self.text_weight = {"text": 1.0, "image": 0.0, "mixed": text_weight}[form]

    def __call__(self, text: Prompts, images: Tensor, masks: Tensor, valid: Tensor, normalize: bool = False) -> Prompts:
        """``text`` (B, K) with examples as in ``embed_supports`` -> prompts (B, K); without a valid example they stay texts."""
        assert self.embed and self.showing
        shown, has = embed_supports(self.embed, self.showing, images, masks, valid)
        return mix(text, shown.to(text.pooled.dtype), has, self.text_weight, normalize)


def mix(prompts: Prompts, shown: Tensor, has: Tensor, text_weight: Tensor | float, normalize: bool) -> Prompts:
    """``text_weight`` * text + (1 - ``text_weight``) * example, where a prompt has one; its text elsewhere.

    shown (B, K, E) and has (B, K) as from ``embed_supports``; text_weight (B, K) or a number, the text's share. ``normalize``:
    both sides and the sum have length 1, as the texts have. A mixed prompt has no words, hence one token.
    """
    weight = torch.as_tensor(text_weight, device=shown.device, dtype=shown.dtype).expand(has.shape)
    weight = torch.where(has, weight, 1.0).unsqueeze(-1)
    pooled = weight * prompts.pooled + (1 - weight) * (F.normalize(shown, dim=-1) if normalize else shown)
    pooled = F.normalize(pooled, dim=-1) if normalize else pooled
    only_text = weight == 1  # (B, K, 1)
    tokens = torch.where(only_text.unsqueeze(-1), prompts.tokens, pooled.unsqueeze(2))
    token_valid = prompts.token_valid.clone()
    token_valid[..., 1:] &= only_text
    token_valid[..., 0] |= ~only_text[..., 0]
    return Prompts(tokens, token_valid, torch.where(only_text, prompts.pooled, pooled), prompts.valid)


def list_of_prompts(given: Sequence[Prompt] | Prompt) -> list[Prompt]:
    prompts = [given] if isinstance(given, Prompt) else list(given) if isinstance(given, Sequence) else [given]
    if wrong := [p for p in prompts if not isinstance(p, Prompt)]:
        raise InputError(f"prompts: got {wrong[0]!r:.80}, want a string, an ImagePrompt, a MixedPrompt or a list of them")
    return prompts


def names_of(prompts: Sequence[Prompt], text_only: bool = False) -> list[str]:
    """What stands under a picture for each prompt; or the text that is encoded, in which an example has no part."""
    names = []
    for number, prompt in enumerate(prompts, 1):
        text = prompt if isinstance(prompt, str) else prompt.text if isinstance(prompt, MixedPrompt) else None
        mixed = isinstance(prompt, MixedPrompt) and prompt.images and not text_only
        names.append(f"example {number}" if text is None else f"{text} + example" if mixed else text)
    return names


def text_share(prompt: Prompt) -> float:
    """The text's part in a prompt: none in an example's, all in a string."""
    if isinstance(prompt, MixedPrompt):
        return prompt.text_weight if prompt.text is not None else 0.0
    return float(isinstance(prompt, str))


def examples_of(prompt: Prompt) -> Sequence[ImagePrompt]:
    return prompt.images if isinstance(prompt, MixedPrompt) else [prompt] if isinstance(prompt, ImagePrompt) else []
