"""What the networks are asked, and what they answer: the two types every network of this package shares.

A class list and a list of phrases are the same thing to a network: K prompts an image, each with one pooled
embedding and T word tokens, both of width D (`TextEncoder` makes them). K and T are padded so that images
with different prompts fit into one batch; `valid` and `token_valid` say what is real.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


class MaskFactors(NamedTuple):
    """Mask logits as products: embedding (L, B, Q, D), the L layers in order, and mask features (B, D, h, w)."""

    embedding: Tensor
    features: Tensor


NOT_ASKED = -1e4  # the class logit of a prompt that a query is not asked: padding, or another query's
NOT_KNOWN = -1e3  # of a prompt that is asked, and is not on the list of a network that has only that: its probability is 0


class Prediction(NamedTuple):
    """What a network of queries answers.

    mask_logits: (B, Q, h, w), one mask a query, before the sigmoid.
    class_logits: (B, Q, K + 1), every query against every prompt; the last column is "no object".
    aux: (mask_logits, class_logits) of the earlier decoder layers, for deep supervision.
    pixel_logits: (B, K, h, w), every pixel against every prompt, with no query between; for a further loss.
    factors: what all layers' mask logits are products of; a loss that looks at some of them is cheaper on these.
    fused: (B, Q, K) in [0, 1], in place of the softmax of class_logits, after a second stage (`region.py`) had its say.
    """

    mask_logits: Tensor
    class_logits: Tensor
    aux: Sequence[tuple[Tensor, Tensor]] = ()
    pixel_logits: Tensor | None = None
    factors: "MaskFactors | None" = None
    fused: Tensor | None = None

    def probabilities(self) -> Tensor:
        """(B, Q, K): how surely each query is named by each prompt."""
        return self.class_logits.softmax(-1)[..., :-1] if self.fused is None else self.fused


class PixelPrediction(NamedTuple):
    """What a network without queries answers: a mask for each prompt, which no other prompt has a part in.

    logits: (B, K, H, W), before the sigmoid, at the image's size.
    """

    logits: Tensor


@dataclass
class Prompts:
    """B images with K prompts each.

    tokens: (B, K, T, D) float, the word tokens of each prompt.
    token_valid: (B, K, T) bool, False where `tokens` is padding.
    pooled: (B, K, D) float, one embedding a prompt.
    valid: (B, K) bool, False where the whole prompt is padding.

    Raises ValueError if the four do not fit together or there is no prompt at all.
    """

    tokens: Tensor
    token_valid: Tensor
    pooled: Tensor
    valid: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(getattr(self, field.name).shape) for field in fields(self)]
        tokens = shapes[0]
        if len(tokens) != 4 or shapes != [tokens, tokens[:3], (*tokens[:2], tokens[3]), tokens[:2]]:
            raise ValueError(
                f"Prompts got tokens, token_valid, pooled, valid of shapes {', '.join(map(str, shapes))}; "
                "wanted (B, K, T, D), (B, K, T), (B, K, D), (B, K)"
            )
        if 0 in tokens:
            raise ValueError(f"Prompts got tokens of shape {tokens}; wanted one prompt or more, with tokens")

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Prompts":
        """The same prompts on `device`; `dtype` changes the embeddings only."""
        return Prompts(
            self.tokens.to(device=device, dtype=dtype),
            self.token_valid.to(device=device),
            self.pooled.to(device=device, dtype=dtype),
            self.valid.to(device=device),
        )

    def expand(self, batch: int) -> "Prompts":
        """One image's prompts (B = 1) for `batch` images, without copying; ValueError for any other B."""
        if len(self.valid) not in (1, batch):
            raise ValueError(f"got prompts for {len(self.valid)} images; wanted them for 1 or all {batch}")
        return Prompts(*(x.expand(batch, *x.shape[1:]) for x in self._tensors()))

    def select(self, index: Sequence[int] | slice | Tensor) -> "Prompts":
        """The prompts at `index` along K (a list, a slice, an integer or boolean tensor), in that order."""
        return Prompts(*(x[:, index] for x in self._tensors()))

    def one_by_one(self) -> "Prompts":
        """(B, K) prompts as (B * K, 1): each alone, so that none can see another. Images vary slowest."""
        return Prompts(*(x.flatten(0, 1).unsqueeze(1) for x in self._tensors()))

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.tokens, self.token_valid, self.pooled, self.valid


def as_prompts(prompts: Prompts | Tensor, batch: int) -> Prompts:
    """Whatever a network accepts as prompts, as `Prompts` for `batch` images.

    A plain tensor of embeddings, (P, D) for all images alike or (B, P, D), becomes prompts of one token each,
    all valid. Raises ValueError for another shape, no prompts, numbers that are not finite, or a B that is
    neither 1 nor `batch`.
    """
    if isinstance(prompts, Prompts):
        return prompts.expand(batch)
    if prompts.ndim not in (2, 3) or 0 in prompts.shape or not prompts.is_floating_point():
        raise ValueError(
            f"got prompts of shape {tuple(prompts.shape)}, {prompts.dtype}; "
            "wanted float embeddings (P, D) or (B, P, D) with at least one prompt"
        )
    # A look at the values cannot be traced, and an exported graph has no one to read the message.
    if not (torch.jit.is_tracing() or torch.compiler.is_compiling()) and not prompts.isfinite().all():
        raise ValueError("got prompts with NaN or infinite numbers; wanted finite embeddings")
    pooled = prompts if prompts.ndim == 3 else prompts.unsqueeze(0)
    valid = torch.ones(pooled.shape[:2], dtype=torch.bool, device=pooled.device)
    return Prompts(pooled.unsqueeze(2), valid.unsqueeze(2), pooled, valid).expand(batch)
