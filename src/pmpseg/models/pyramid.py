"""A feature pyramid from a plain ViT, which has maps of a single, coarse stride.

The meaning comes from the ViT's blocks, the sharp edges from a light convolutional stem on the image itself;
every level is the sum of the two. After ViTDet's simple feature pyramid (Li et al., 2022, arXiv 2203.16527),
but the fine levels are not grown from the ViT's grid alone, and widths are small so that all this costs a
fraction of the ViT.

Shapes: normalised image (B, 3, H, W) and maps (B, D, h, w) in; out come maps (B, width, H / s, W / s) for
s = 4, 8, 16, 32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ViTPyramid(nn.Module):
    """`num_maps` maps of `dim` channels, joined with a stem of its own to four levels of `width` channels."""

    def __init__(self, dim: int, num_maps: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(num_maps))  # blocks differ in scale
        self.lateral = nn.Linear(dim * num_maps, 4 * width)  # for all levels, on the ViT's small grid
        self.stem = nn.Sequential(_conv(3, width // 4, stride=2), _conv(width // 4, width, stride=2))
        self.down = nn.ModuleList(_conv(width, width, stride=2) for _ in range(3))
        self.mix = nn.ModuleList(_conv(width, width, depthwise=True) for _ in range(4))

    def forward(self, image: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        # (B, h, w, D)
        tokens = [norm(x.permute(0, 2, 3, 1)) for norm, x in zip(self.norms, maps, strict=True)]
        laterals = self.lateral(torch.cat(tokens, dim=-1)).permute(0, 3, 1, 2).chunk(4, dim=1)
        detail = self.stem(image)
        levels = []
        for level, lateral in enumerate(laterals):
            if level > 0:
                detail = self.down[level - 1](detail)
            levels.append(self.mix[level](detail + _resize(lateral, detail.shape[-2:])))
        return levels


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, or the mean over each cell where the grid gets coarser."""
    if x.shape[-2:] == size:
        return x
    if size[0] < x.shape[-2]:
        return F.interpolate(x, size=size, mode="area")
    return F.interpolate(x, size=size, mode="bilinear")


def _conv(inputs: int, outputs: int, stride: int = 1, depthwise: bool = False) -> nn.Sequential:
    """A 3x3 convolution, or a depthwise one and a 1x1; then normalised and bent."""
    if depthwise:
        layers = [nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)]
        layers.append(nn.Conv2d(inputs, outputs, 1, bias=False))
    else:
        layers = [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.GroupNorm(8, outputs), nn.GELU())
