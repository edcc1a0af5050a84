"""A network with a class list of its own, asked with words: Mask2Former and MaskFormer of transformers as they lie.

The network names its masks before anyone asks; a prompt is answered by those of its classes that go by that name. It can be a
two-stage system's first half: a second stage (``region.py``) also finds what is not on the list, as OVSeg (arXiv 2210.04150).

Letters: B images, Q queries, K prompts, N classes of the list, (h, w) the mask logits' size.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from .pmp import MASK_STRIDE, PMP
from .prompts import NOT_ASKED, NOT_KNOWN, Prediction, Prompts, as_prompts

LEAST = 1e-30  # a known class is never as improbable as an unknown one
# COCO's panoptic stuff is called "tree-merged", "wall-other-merged", "door-stuff".
SUFFIX = re.compile(r"( (merged|other|stuff))+$")


class Proposals(NamedTuple):
    """An image's masks (B, Q, h, w) and what the network calls them, (B, Q, N + 1), before anything was asked; logits."""

    mask_logits: Tensor
    class_logits: Tensor

    def repeat(self, count: int) -> "Proposals":
        """Each image ``count`` times in a row."""
        return Proposals(*(x.repeat_interleave(count, 0) for x in self))

    def select(self, image: int) -> "Proposals":
        """One image of the batch, as a batch of its own."""
        return Proposals(*(x[image, None] for x in self))


class ClosedList(nn.Module):
    """``network``, a ``PMP`` with a closed list, behind the seam that all networks have; ``ClosedWords`` makes its prompts.

    ``encode`` does all the work, so that a prompt more costs next to nothing.
    """

    by_pixel = False
    stride = MASK_STRIDE

    def __init__(self, network: PMP) -> None:
        super().__init__()
        if network.query_decoder.class_head is None:
            raise InputError("a ClosedList wants a network with a class list of its own: give a PMP with num_classes")
        self.network, self.pad = network, network.pad

    @classmethod
    def from_transformers(cls, source: Any) -> "ClosedList":
        """See ``PMP.from_transformers``; without the parts that would read prompts."""
        return cls(PMP.from_transformers(source, text_dim=1, prompt_attention="none", named_by="query"))

    def forward(self, image: Tensor, prompts: Prompts | Tensor) -> Prediction:
        """``image`` (B, 3, H, W) RGB in [0, 1]; ``prompts`` as in ``decode``."""
        return self.decode(self.encode(image), prompts)

    def encode(self, image: Tensor) -> Proposals:
        answer = self.network(image, None, aux=False)
        return Proposals(answer.mask_logits, answer.class_logits.float())

    def decode(self, features: Proposals, prompts: Prompts | Tensor) -> Prediction:
        """``prompts``: ``pooled`` (1 or B, K, N) is 1 at the classes of a prompt, else 0.

        Class logits (B, Q, K + 1) are logarithms of probabilities: of a prompt the sum over its classes, in the last column all
        else, "no object" among it. So no prompt changes another's answer; but those that share a class sum to more than the
        whole, and the softmax makes them all smaller, by one factor a query. A prompt with no class is ``NOT_KNOWN``.
        """
        asked = as_prompts(prompts, len(features.class_logits))
        classes = asked.pooled.float() * asked.valid[..., None]  # (B, K, N)
        p = features.class_logits.softmax(-1)
        named = torch.einsum("bqn,bkn->bqk", p[..., :-1], classes)
        other = p[..., -1] + torch.einsum("bqn,bn->bq", p[..., :-1], 1 - classes.amax(1))
        logits = torch.cat([named, other[..., None]], -1).clamp(min=LEAST).log()
        unknown = torch.where(asked.valid, NOT_KNOWN, NOT_ASKED)[:, None].expand_as(named)
        has_none = ~classes.any(-1)[:, None]  # (B, 1, K)
        logits[..., :-1] = torch.where(has_none, unknown, logits[..., :-1])
        return Prediction(features.mask_logits, logits)


class ClosedWords(nn.Module):
    """Words to the classes of a list, where other networks have a text encoder.

    labels: the N classes' names as the model has them, each perhaps with synonyms after commas. name: of the model, for messages.

    Case, hyphens and COCO's "-merged", "-other" and "-stuff" make no difference. A prompt that is a whole label means that class
    only. Otherwise each of its words, its synonyms and what stands between its commas, means the classes that begin with it, or
    else those that have it among their synonyms; a label that occurs twice is both classes. Nothing is guessed beyond that.
    """

    where: Tensor
    is_clip = False
    normalize = False
    templates = ("{}",)

    def __init__(self, labels: Sequence[str], name: str = "this model") -> None:
        super().__init__()
        self.labels, self.name, self.dim = list(labels), name, len(labels)
        self.register_buffer("where", torch.zeros(0), persistent=False)  # knows the device
        parts = [_parts(label) for label in self.labels]
        self._whole = _index(parts, lambda words: [", ".join(words)])
        self._first = _index(parts, lambda words: words[:1])
        self._any = _index(parts, lambda words: words)

    def classes_of(self, prompt: str | Sequence[str]) -> list[int]:
        """The classes that a prompt, or a list of synonyms, means; none if it is not on the list."""
        phrases = [prompt] if isinstance(prompt, str) else list(prompt)
        words = [word for phrase in phrases for word in _parts(phrase)]
        if whole := self._whole.get(", ".join(words), []) if words else []:
            return whole
        found = {index for word in words for index in self._first.get(word, self._any.get(word, []))}
        return sorted(found)

    def missing(self, prompts: Sequence[str | Sequence[str]]) -> list[str]:
        """The prompts that are not on the list, by their first words."""
        return [p if isinstance(p, str) else p[0] for p in prompts if not self.classes_of(p)]

    def check(self, prompts: Sequence[str | Sequence[str]]) -> None:
        """Raises InputError if none of the prompts is on the list: without a second stage they cannot be found."""
        if len(missing := self.missing(prompts)) < len(prompts) or not missing:
            return
        asked = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        known = ", ".join(repr(label) for label in self.labels[:5]) + ", ..." * (self.dim > 5)
        want = f"it knows its {self.dim} classes only ({known}): ask for some of them, or name its masks by a CLIP with region"
        raise InputError(f"{self.name} has no class called {asked}; {want}")

    def encode(self, prompts: Sequence[str | Sequence[str]]) -> Prompts:
        """K prompts, each a phrase or a list of synonyms, to Prompts (1, K, N) with one token each.

        Raises InputError for no prompts or a blank one; one that is on no list is none.
        """
        if isinstance(prompts, str) or not prompts:
            raise InputError(f"got {prompts!r} as prompts; wanted a list of at least one phrase")
        pooled = torch.zeros(1, len(prompts), self.dim)
        for k, prompt in enumerate(prompts):
            phrases = [prompt] if isinstance(prompt, str) else prompt
            if not phrases or not all(phrase.strip() for phrase in phrases):
                raise InputError(f"got {prompt!r} as a prompt; wanted a phrase that is not blank")
            pooled[0, k, self.classes_of(prompt)] = 1
        pooled = pooled.to(self.where.device)
        valid = pooled.new_ones(1, len(prompts), dtype=torch.bool)
        return Prompts(pooled[:, :, None], valid[..., None], pooled, valid)


def _parts(phrase: str) -> list[str]:
    """What stands between the commas, as it is compared."""
    words = (" ".join(re.sub(r"[-_]", " ", word.casefold()).split()) for word in phrase.split(","))
    return [SUFFIX.sub("", word) for word in words if word]


def _index(parts: Sequence[Sequence[str]], keys: Callable[[Sequence[str]], Sequence[str]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, words in enumerate(parts):
        for key in dict.fromkeys(keys(words)):
            found.setdefault(key, []).append(index)
    return found
