"""How prompts guide queries: what queries read of them, and the layer in which they do.

Source: the cross-attention between text tokens and query tokens in every decoder layer is PMP's (arXiv 2412.10292); its
placement, direction, gate and form are unpublished and ours, so each is an option.

Letters: B images, Q queries, K prompts, N text tokens, D decoder width, E text width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .attention import Attention
from .prompts import Prompts

STRANGERS = 256  # prompts that "shuffled" keeps to read from when it is asked about a single image


class Text(NamedTuple):
    """What queries read: tokens (B, N, D), and which of them are real (B, N) bool; the last one is "no prompt"."""

    tokens: Tensor
    valid: Tensor


class PromptTokens(nn.Module):
    """Prompts -> ``Text``. ``kind``: ``pooled``, one token a prompt; ``tokens``, its words; ``shuffled``, another image's."""

    strangers: Tensor

    def __init__(self, kind: str, text_dim: int, dim: int) -> None:
        super().__init__()
        self.kind = kind
        self.project = nn.Sequential(nn.Linear(text_dim, dim), nn.LayerNorm(dim))
        # Attended to when no prompt concerns a query; it also keeps the softmax defined when every prompt is padding.
        self.no_prompt = nn.Parameter(torch.zeros(dim))
        if kind == "shuffled":
            self.register_buffer("strangers", torch.zeros(STRANGERS, text_dim))

    def forward(self, prompts: Prompts) -> Text:
        pooled = F.normalize(prompts.pooled, dim=-1)
        if self.kind == "tokens":
            # Each word also carries its phrase, or the words of several prompts would be one bag.
            text = (F.normalize(prompts.tokens, dim=-1) + pooled[:, :, None]).flatten(1, 2)
            valid = (prompts.token_valid & prompts.valid[..., None]).flatten(1)
        else:
            text, valid = pooled, prompts.valid
            if self.kind == "shuffled":
                text, valid = self._of_another_image(text, valid)
        batch, text = len(text), text * text.shape[-1] ** 0.5  # unit variance, or the projection's bias would drown it
        text = torch.cat([self.project(text), self.no_prompt.expand(batch, 1, -1)], 1)
        return Text(text, F.pad(valid, (0, 1), value=True))

    def _of_another_image(self, text: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """In training the prompts of the batch's image before; otherwise, as many as are asked, from the last training batch."""
        if self.training:
            if len(text) < 2:
                raise InputError("prompt_attention 'shuffled' reads another image's prompts: it needs a batch_size of 2 or more")
            with torch.no_grad():
                real = text[valid].to(self.strangers.dtype)
                self.strangers.copy_(real[torch.arange(STRANGERS, device=text.device) % len(real)])
            return text.roll(1, 0), valid.roll(1, 0)
        any_of_them = (torch.arange(valid.numel(), device=text.device) * 97 + 13) % STRANGERS
        return self.strangers[any_of_them].to(text.dtype).view_as(text), valid


class PromptAttention(nn.Module):
    """Queries read prompts, and with ``writes`` prompts then read queries, for the layers after this one.

    ``gated``: what is read is added through a gate that starts at zero, so that at first nothing changes, bit for bit; otherwise
    it is added and normed, as the other parts of a layer are.
    """

    def __init__(self, dim: int, num_heads: int, gated: bool, writes: bool) -> None:
        super().__init__()
        self.read = GatedAttention(dim, num_heads, gated)
        # Needs no gate: what is written changes nothing until it is read.
        self.write = GatedAttention(dim, num_heads, gated=False) if writes else None

    def forward(self, query: Tensor, query_position: Tensor, text: Text) -> tuple[Tensor, Text]:
        """query (B, Q, D), query_position (Q, D) -> the same queries and text, after each has read the other."""
        query = self.read(query, query_position, text.tokens, text.tokens, text.valid[:, None, None])
        if self.write is not None:
            text = text._replace(tokens=self.write(text.tokens, None, query + query_position, query, None))
        return query, text


class GatedAttention(nn.Module):
    """x + gate * attention(norm(x)), the gate one number a channel and at first 0; without a gate norm(x + attention(x))."""

    def __init__(self, dim: int, num_heads: int, gated: bool) -> None:
        super().__init__()
        self.attention, self.norm = Attention(dim, num_heads), nn.LayerNorm(dim)
        self.gate = nn.Parameter(torch.zeros(dim)) if gated else None

    def forward(self, x: Tensor, position: Tensor | None, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
        asks = self.norm(x) if self.gate is not None else x
        read = self.attention(asks if position is None else asks + position, key, value, allowed)
        return self.norm(x + read) if self.gate is None else x + self.gate * read
