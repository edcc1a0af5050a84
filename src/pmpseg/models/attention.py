"""What both halves of the decoder are built from: multi-head attention and DETR's sine positions."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention; ``allowed`` is bool, broadcastable to (B, heads, queries, keys), True where a query may look.

    ``dropout``: share of the attention weights that are dropped in training.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        for layer in (self.q, self.k, self.v):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        q, k, v = (self._heads(f(x)) for f, x in ((self.q, query), (self.k, key), (self.v, value)))
        dropped = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropped)  # (B, heads, Q, D / heads)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def sine_position(level: Tensor, temperature: float = 10000.0) -> Tensor:
    """DETR's sine position embedding for a map (B, D, h, w) -> (h * w, D); D is a multiple of 4."""
    dim, height, width = level.shape[1:]
    half, dtype = dim // 2, torch.promote_types(level.dtype, torch.float32)
    steps = torch.arange(half, device=level.device, dtype=dtype)
    period = temperature ** (2 * (steps // 2) / half)

    def wave(length: int) -> Tensor:
        at = torch.arange(1, length + 1, device=level.device, dtype=dtype) / (length + 1e-6) * 2 * math.pi
        angle = at[:, None] / period
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], 2).flatten(1)  # (length, D / 2)

    y, x = wave(height), wave(width)
    grid = torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], -1)
    return grid.flatten(0, 1).to(level.dtype)


def flatten(level: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, h * w, D)."""
    return level.flatten(2).transpose(1, 2)
