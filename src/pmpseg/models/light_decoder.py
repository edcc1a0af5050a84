"""What CLIPSeg's light decoder is made of (arXiv 2112.10003, sec. 3): blocks for tokens, and ways from tokens to pixels.

Blocks map (N, T, D) to the same shape, upsamplings maps (N, D, h, w) to logits (N, 1, h * patch, w * patch).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention


class DecoderBlock(nn.Module):
    """A transformer block with its norms behind and dropout in four places, as PyTorch's default has it."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(dim, num_heads, dropout), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(ffn_dim, dim))
        self.ffn_norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, x, x)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class MLPBlock(nn.Sequential):
    """CLIP-Deconv's: each token by itself."""

    def __init__(self, dim: int, *_: Any) -> None:
        super().__init__(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, dim))


class Spread(nn.ConvTranspose2d):
    """A transposed convolution whose steps are as long as its kernel: every cell becomes a tile, and no two overlap."""

    def __init__(self, inputs: int, outputs: int, factor: int) -> None:
        super().__init__(inputs, outputs, factor, stride=factor)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, h, w) -> (B, O, h * f, w * f); one matrix product, several times as fast on a CPU as the general case."""
        tiles = torch.einsum("bchw,coij->bohiwj", x, self.weight)
        assert self.bias is not None
        return tiles.flatten(4).flatten(2, 3) + self.bias[:, None, None]


class Bilinear(nn.Module):
    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.project, self.patch = nn.Conv2d(dim, 1, 1), patch

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.project(x), scale_factor=self.patch, mode="bilinear", align_corners=False)


def _refined(dim: int, patch: int) -> nn.Module:
    step = max(1, patch // 4)
    convolution = nn.Conv2d(dim, dim, 3, padding=1)
    return nn.Sequential(convolution, nn.ReLU(), Spread(dim, dim // 2, step), nn.ReLU(), Spread(dim // 2, 1, step))


UPSAMPLINGS = {"transposed": lambda dim, patch: Spread(dim, 1, patch), "refined": _refined, "bilinear": Bilinear}
