"""Pixel decoder: a backbone's pyramid becomes per-pixel mask features and the levels that queries look at.

Source: the FPN of MaskFormer (arXiv 2107.06278, sec. 3.3; ``BasePixelDecoder``), feeding three levels as Mask2Former does.
"""

from math import gcd

from torch import Tensor, nn
from torch.nn import functional as F


class FPN(nn.Module):
    """Maps at strides 4, 8, 16, 32 -> mask features at stride 4 and levels at strides 32, 16, 8, all ``dim`` channels."""

    def __init__(self, channels: list[int], dim: int) -> None:
        super().__init__()
        groups = gcd(32, dim // 4)  # at least four channels in a group
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, dim, 1, bias=False), nn.GroupNorm(groups, dim)) for c in channels
        )
        self.output = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(groups, dim), nn.ReLU())
            for _ in channels[:-1]
        )
        self.mask_features = nn.Conv2d(dim, dim, 1)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """4 maps (B, C_i, H / s, W / s), finest first -> (B, D, H / 4, W / 4) and [(B, D, H / s, W / s) for s in 32, 16, 8]."""
        *finer, top = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        levels = [top]
        for x, output in zip(reversed(finer), reversed(self.output), strict=True):
            up = F.interpolate(levels[-1], size=x.shape[-2:], mode="bilinear", align_corners=False)
            levels.append(output(x + up))
        return self.mask_features(levels.pop()), levels
