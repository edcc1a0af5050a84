"""Pixel decoders: a backbone's pyramid becomes per-pixel mask features and the levels that queries look at.

All take maps (B, C_i, H / s, W / s) at strides 4, 8, 16, 32, finest first, and give mask features (B, D, H / 4, W / 4) and
levels [(B, D, H / s, W / s) for s in 32, 16, 8].

- ``fpn``: MaskFormer's (arXiv 2107.06278, sec. 3.3; ``BasePixelDecoder``).
- ``fpn_light``: the same without 3x3 convolutions at its two ends, and bilinear: what a small model on a CPU can afford.
- ``deformable``: Mask2Former's (arXiv 2112.01527, sec. 3.2): deformable attention over the three coarse levels.
"""

from math import gcd

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .attention import flatten, sine_position
from .deformable import DeformableAttention, Sizes, places_in_pixels

Maps = tuple[Tensor, list[Tensor]]
PIXEL_DECODERS = ("fpn", "fpn_light", "deformable")


def build_pixel_decoder(
    name: str, channels: list[int], dim: int, num_heads: int, num_layers: int, ffn_dim: int
) -> "FPN | DeformablePixelDecoder":
    """A pixel decoder by name; the last three arguments are for ``deformable`` only. Raises InputError for an unknown name."""
    if name == "deformable":
        return DeformablePixelDecoder(channels, dim, num_heads, num_layers, ffn_dim)
    if name not in PIXEL_DECODERS:
        raise InputError(f"pixel_decoder: got {name!r}, want one of {', '.join(PIXEL_DECODERS)}")
    return FPN(channels, dim, light=name == "fpn_light")


class FPN(nn.Module):
    """From coarse to fine, each map is added to the upsampled one before it and smoothed."""

    def __init__(self, channels: list[int], dim: int, light: bool = False) -> None:
        super().__init__()
        groups = gcd(32, dim // 4) if light else gcd(32, dim)  # light: at least four channels in a group
        *finer, top = channels
        self.top = _norm(nn.Conv2d(top, dim, 1, bias=False), groups) if light else _smooth(top, dim, groups)
        self.lateral = nn.ModuleList(_norm(nn.Conv2d(c, dim, 1, bias=False), groups) for c in finer)
        self.output = nn.ModuleList(_smooth(dim, dim, groups) for _ in finer)
        self.mask_features = nn.Conv2d(dim, dim, 1) if light else nn.Conv2d(dim, dim, 3, padding=1)
        self.mode = "bilinear" if light else "nearest"

    def forward(self, maps: list[Tensor]) -> Maps:
        *finer, top = maps
        levels = [self.top(top)]
        for x, lateral, output in zip(reversed(finer), reversed(self.lateral), reversed(self.output), strict=True):
            levels.append(output(lateral(x) + F.interpolate(levels[-1], size=x.shape[-2:], mode=self.mode)))
        return self.mask_features(levels.pop()), levels


class DeformablePixelDecoder(nn.Module):
    """Deformable attention among the three coarse levels, then one step of an FPN to the finest."""

    def __init__(self, channels: list[int], dim: int, num_heads: int, num_layers: int, ffn_dim: int, points: int = 4) -> None:
        super().__init__()
        groups, (finest, *coarser) = gcd(32, dim), channels
        self.project = nn.ModuleList(_norm(nn.Conv2d(c, dim, 1), groups) for c in reversed(coarser))
        self.level_embedding = nn.Parameter(torch.randn(len(coarser), dim))
        self.layers = nn.ModuleList(
            DeformableLayer(dim, num_heads, len(coarser), points, ffn_dim) for _ in range(num_layers)
        )
        self.lateral = _norm(nn.Conv2d(finest, dim, 1, bias=False), groups)
        self.output = _smooth(dim, dim, groups)
        self.mask_features = nn.Conv2d(dim, dim, 1)

    def forward(self, maps: list[Tensor]) -> Maps:
        finest, *coarser = maps
        levels = [project(x) for project, x in zip(self.project, reversed(coarser), strict=True)]
        sizes: Sizes = [(x.shape[-2], x.shape[-1]) for x in levels]
        x = torch.cat([flatten(level) for level in levels], 1)  # (B, N, D)
        position = torch.cat([sine_position(level) + e for level, e in zip(levels, self.level_embedding, strict=True)])
        places = places_in_pixels(sizes, x)
        for layer in self.layers:
            x = layer(x, position, places, sizes)
        parts = x.split([h * w for h, w in sizes], 1)
        levels = [part.transpose(1, 2).unflatten(-1, size) for part, size in zip(parts, sizes, strict=True)]
        up = F.interpolate(levels[-1], size=finest.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_features(self.output(self.lateral(finest) + up)), levels


class DeformableLayer(nn.Module):
    """Deformable self-attention and a feed-forward part, each with a residual and a norm after it."""

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int, ffn_dim: int) -> None:
        super().__init__()
        self.attention, self.attention_norm = DeformableAttention(dim, num_heads, num_levels, num_points), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, dim))
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor, places: Tensor, sizes: Sizes) -> Tensor:
        x = self.attention_norm(x + self.attention(x, position, places, sizes))
        return self.ffn_norm(x + self.ffn(x))


def _norm(conv: nn.Conv2d, groups: int) -> nn.Sequential:
    return nn.Sequential(conv, nn.GroupNorm(groups, conv.out_channels))


def _smooth(inputs: int, outputs: int, groups: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(groups, outputs), nn.ReLU())
