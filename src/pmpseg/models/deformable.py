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
        # x and y apart: arithmetic on every second number is several times slower.
        weight, bias = self.offsets.weight.unflatten(0, (-1, 2)), self.offsets.bias.unflatten(0, (-1, 2))
        pixels = [F.linear(at, weight[:, i], bias[:, i]).unflatten(-1, self.shape) for i in (0, 1)]  # (B, N, H, L, P)
        pixels = [offset + place[:, None, :, None] for offset, place in zip(pixels, places.unbind(-1), strict=True)]
        weights = self.weights(at).unflatten(-1, (heads, levels * points)).softmax(-1).unflatten(-1, (levels, points))
        # On a CPU one gather is faster; on CUDA grid_sample has the better gradient.
        sample = sample_rows if x.device.type == "cpu" else sample_grids
        return self.out(sample(value, pixels[0], pixels[1], weights, sizes))


def places_in_pixels(sizes: Sizes, like: Tensor) -> Tensor:
    """Where the centre of each place lies in every level, (x, y) in its pixels, the first one's centre at 0: (N, L, 2)."""
    dtype, centres = torch.promote_types(like.dtype, torch.float32), []
    for height, width in sizes:
        y, x = ((torch.arange(n, device=like.device, dtype=dtype) + 0.5) / n for n in (height, width))
        centres.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1))
    extent = torch.tensor([(w, h) for h, w in sizes], device=like.device, dtype=dtype)
    return torch.cat(centres)[:, None] * extent - 0.5


def sample_rows(value: Tensor, x: Tensor, y: Tensor, weights: Tensor, sizes: Sizes) -> Tensor:
    """Weighted sums of bilinear values, all levels in one gather; zeros beyond the edges.

    value (B, N, H, d); x, y in pixels and weights (B, M, H, L, P) -> (B, M, H * d). Bilinear interpolation is itself a weighted
    sum of four rows, so that the whole answer of a head is one bag of 4 L P rows of a table: ``embedding_bag``. A frame of zeros
    around every level spares the question whether a row lies inside.
    """
    batch, _, heads, width = value.shape
    device, points = value.device, x.shape[-1]
    dtype = torch.promote_types(value.dtype, torch.float32)  # places need more than 8 bits
    parts = value.to(dtype).flatten(2).split([h * w for h, w in sizes], 1)
    framed = [F.pad(part.unflatten(1, size), (0, 0, 1, 1, 1, 1)) for part, size in zip(parts, sizes, strict=True)]
    # A point beyond the last row asks for rows after it, with weight 0.
    table = F.pad(torch.cat([level.flatten(1, 2) for level in framed], 1), (0, 0, 0, max(w for _, w in sizes) + 4))

    def per_point(values: list[int], kind: torch.dtype = dtype) -> Tensor:
        return torch.tensor(values, device=device, dtype=kind).repeat_interleave(points)  # (L * P,)

    start = [0]
    for h, w in sizes[:-1]:
        start.append(start[-1] + (h + 2) * (w + 2))
    outside = torch.full((len(sizes) * points,), -1.0, device=device, dtype=dtype)
    x = torch.clamp(x.to(dtype).flatten(3), outside, per_point([w for _, w in sizes]))  # (B, M, H, L * P)
    y = torch.clamp(y.to(dtype).flatten(3), outside, per_point([h for h, _ in sizes]))
    left, top = x.floor(), y.floor()
    right_share, low_share = x - left, y - top
    weights = weights.to(dtype).flatten(3)
    low = weights * low_share
    high = weights - low
    high_right, low_right = high * right_share, low * right_share
    weight = torch.stack([high - high_right, high_right, low - low_right, low_right], 3)  # (B, M, H, 4, L * P)

    # Rows of the table are (image, place, head); the frame is row and column -1. Whole numbers, exact in float32 up to 2^24.
    stride = [(w + 2) * heads for _, w in sizes]
    origin = [s * heads + step + heads for s, step in zip(start, stride, strict=True)]
    first = top * per_point(stride, dtype) + left * heads + per_point(origin)
    first = first.nan_to_num().to(torch.int32)  # a NaN reaches the answer by its weight
    image = torch.arange(batch, device=device, dtype=torch.int32) * (table.shape[1] * heads)
    first += image[:, None, None, None] + torch.arange(heads, device=device, dtype=torch.int32)[:, None]
    steps = [[0] * len(stride), [heads] * len(stride), stride, [step + heads for step in stride]]
    row = first[:, :, :, None] + torch.stack([per_point(step, torch.int32) for step in steps])  # (B, M, H, 4, L * P)
    bags = Bags.apply(table.view(-1, width), weight.flatten(0, 2).flatten(1), row.flatten(0, 2).flatten(1))
    return bags.to(value.dtype).view(batch, x.shape[1], heads * width)


class Bags(torch.autograd.Function):
    """table (R, d), weight (N, S), row (N, S) of int32 -> (N, d): for each of N bags the weighted sum of S rows.

    ``embedding_bag`` with another gradient: what a row of the table gets is a bag, too, of all that asked for it. A sort and the
    forward's own kernel make it several times faster than torch's loop over rows.
    """

    @staticmethod
    def forward(ctx, table: Tensor, weight: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(table, weight, row)
        return F.embedding_bag(row, table, mode="sum", per_sample_weights=weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        table, weight, row = ctx.saved_tensors
        to_table = to_weight = None
        if ctx.needs_input_grad[0]:
            asked, order = row.flatten().sort()
            start = torch.searchsorted(asked, torch.arange(len(table), dtype=row.dtype, device=row.device))
            bag = order.div(row.shape[1], rounding_mode="floor")
            to_table = F.embedding_bag(bag, gradient, start, mode="sum", per_sample_weights=weight.flatten()[order])
        if ctx.needs_input_grad[1]:
            with torch.enable_grad():
                leaf = weight.detach().requires_grad_()
                bags = F.embedding_bag(row, table, mode="sum", per_sample_weights=leaf)
                (to_weight,) = torch.autograd.grad(bags, leaf, gradient)
        return to_table, to_weight, None


def sample_grids(value: Tensor, x: Tensor, y: Tensor, weights: Tensor, sizes: Sizes) -> Tensor:
    """The same as ``sample_rows``, by ``grid_sample`` a level."""
    batch, _, heads, width = value.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in sizes], -1)  # L of (B * H, d, h * w)
    mixed: Tensor | int = 0
    for level, (height, wide) in enumerate(sizes):
        at = [(c[:, :, :, level].to(dtype) + 0.5) * (2 / length) - 1 for c, length in ((x, wide), (y, height))]
        grid = torch.stack(at, -1).transpose(1, 2).flatten(0, 1)  # (B * H, M, P, 2)
        here = F.grid_sample(maps[level].unflatten(-1, (height, wide)), grid, align_corners=False)  # (B * H, d, M, P)
        weight = weights[:, :, :, level].to(dtype).transpose(1, 2).flatten(0, 1)[:, None]
        mixed = mixed + (here * weight).sum(-1)
    assert isinstance(mixed, Tensor)
    return mixed.to(value.dtype).view(batch, heads * width, -1).transpose(1, 2)
