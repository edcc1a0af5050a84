"""Multi-scale deformable attention in pure PyTorch: each place looks at a few points of every level, wherever it wants.

Source: Deformable DETR (arXiv 2010.04159, sec. 4.1) as the encoder of Mask2Former's pixel decoder uses it (arXiv 2112.01527).

Letters: B images, N places over all levels, H heads, L levels, P points a level, d = D / H.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Sizes = list[tuple[int, int]]  # (h, w) of each level


class DeformableAttention(nn.Module):
    """Every place asks ``num_points`` points of each level, each beside it by a learnt offset in that level's pixels."""

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.shape = (num_heads, num_levels, num_points)
        count = num_heads * num_levels * num_points
        self.offsets, self.weights = nn.Linear(dim, 2 * count), nn.Linear(dim, count)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        # As in Deformable DETR: at first each head looks into a direction of its own, each point one pixel further.
        angle = torch.arange(num_heads) * (2 * math.pi / num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # (H, 2)
        start = direction[:, None, None] * torch.arange(1, num_points + 1)[:, None]  # (H, 1, P, 2)
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.offsets.bias.copy_(start.expand(-1, num_levels, -1, -1).flatten())
        for layer in (self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, position: Tensor, places: Tensor, sizes: Sizes) -> Tensor:
        """x (B, N, D), position (N, D), places (N, L, 2) from ``places_in_pixels`` -> (B, N, D)."""
        heads, levels, points = self.shape
        at = x + position
        value = self.value(x).unflatten(-1, (heads, -1))  # (B, N, H, d)
        pixels = places[:, None, :, None] + self.offsets(at).unflatten(-1, (heads, levels, points, 2))  # (B, N, H, L, P, 2)
        weights = self.weights(at).unflatten(-1, (heads, levels * points)).softmax(-1).unflatten(-1, (levels, points))
        # On a CPU one gather is faster; on CUDA grid_sample has the better gradient.
        sample = sample_rows if x.device.type == "cpu" else sample_grids
        return self.out(sample(value, pixels, weights, sizes))


def places_in_pixels(sizes: Sizes, like: Tensor) -> Tensor:
    """Where the centre of each place lies in every level, (x, y) in its pixels, the first one's centre at 0: (N, L, 2)."""
    dtype, centres = torch.promote_types(like.dtype, torch.float32), []
    for height, width in sizes:
        y, x = ((torch.arange(n, device=like.device, dtype=dtype) + 0.5) / n for n in (height, width))
        centres.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1))
    extent = torch.tensor([(w, h) for h, w in sizes], device=like.device, dtype=dtype)
    return torch.cat(centres)[:, None] * extent - 0.5


def sample_rows(value: Tensor, pixels: Tensor, weights: Tensor, sizes: Sizes) -> Tensor:
    """Weighted sums of bilinear values, all levels in one gather; zeros beyond the edges.

    value (B, N, H, d), pixels (B, M, H, L, P, 2), weights (B, M, H, L, P) -> (B, M, H * d). Bilinear interpolation is itself a
    weighted sum of four rows, so that the whole answer of a head is one bag of 4 L P rows of a table: ``embedding_bag``.
    """
    batch, count, heads, width = value.shape
    dtype = torch.promote_types(value.dtype, torch.float32)  # places need more than 8 bits
    pixels, weights, table = pixels.to(dtype), weights.to(dtype), value.to(dtype).flatten(0, 2)
    extent = torch.tensor([(w, h) for h, w in sizes], device=value.device, dtype=dtype)[:, None]  # (L, 1, 2)
    start = torch.tensor([0, *[h * w for h, w in sizes[:-1]]], device=value.device).cumsum(0)

    low = pixels.floor()
    upper = pixels - low
    corner = torch.stack([low, low + 1], -1)  # (..., 2 axes, 2 corners)
    share = torch.stack([1 - upper, upper], -1) * ((corner >= 0) & (corner < extent[..., None]))
    corner = corner.clamp_(min=0).minimum(extent[..., None] - 1)
    x, y = corner.unbind(-2)  # (B, M, H, L, P, 2)
    in_x, in_y = share.unbind(-2)
    # Whole numbers below 2^24, exact in float32: (..., corner of y, corner of x).
    at = (y * extent[..., :1] + start[:, None, None])[..., None] + x[..., None, :]
    weight = (in_y * weights[..., None])[..., None] * in_x[..., None, :]
    image = torch.arange(batch, device=value.device)[:, None, None, None] * count
    head = torch.arange(heads, device=value.device)[:, None]
    # Rows of the table are (image, place, head).
    row = (at.flatten(3).to(torch.long) + image) * heads + head
    bags = F.embedding_bag(row.flatten(0, 2), table, mode="sum", per_sample_weights=weight.flatten(3).flatten(0, 2))
    return bags.to(value.dtype).view(batch, pixels.shape[1], heads * width)


def sample_grids(value: Tensor, pixels: Tensor, weights: Tensor, sizes: Sizes) -> Tensor:
    """The same as ``sample_rows``, by ``grid_sample`` a level."""
    batch, _, heads, width = value.shape
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in sizes], -1)  # L of (B * H, d, h * w)
    mixed: Tensor | int = 0
    for level, (height, wide) in enumerate(sizes):
        extent = torch.tensor([wide, height], device=value.device, dtype=pixels.dtype)
        grid = (pixels[..., level, :, :] + 0.5) * 2 / extent - 1  # (B, M, H, P, 2)
        grid = grid.transpose(1, 2).flatten(0, 1).to(value.dtype)
        here = F.grid_sample(maps[level].unflatten(-1, (height, wide)), grid, align_corners=False)  # (B * H, d, M, P)
        weight = weights[..., level, :].transpose(1, 2).flatten(0, 1)[:, None]
        mixed = mixed + (here * weight).sum(-1)
    assert isinstance(mixed, Tensor)
    return mixed.view(batch, heads * width, -1).transpose(1, 2)
