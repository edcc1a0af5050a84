"""timm's Swin, run as its authors, detectron2 and transformers run it: pad to whole windows, then shift.

timm 1.0.31 shifts, then pads, so that its windows are others wherever a map is not a multiple of the window; and it stops
shifting where a stage was as small as a window at the image size it was built for. `always_partition` turns the latter off.
"""

from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention, window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional as F


def pad_then_shift(net: nn.Module) -> None:
    """Changes all blocks of a timm Swin in place; their weights and names stay."""
    for module in net.modules():
        if isinstance(module, SwinTransformerBlock):
            module.__class__ = PadThenShift
        if isinstance(module, WindowAttention):
            module.fused_attn = True  # type: ignore[misc]  # the same, some percent faster


class PadThenShift(SwinTransformerBlock):
    """A block of timm's Swin with another order in its attention."""

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        window, shift = self.window_size, self.shift_size
        x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
        padded = x.shape[1:3]
        mask = None
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
            mask = apart(padded, window, shift, x)
        windows = window_partition(x, window).flatten(1, 2)  # (B * windows, area, C)
        windows = self.attn(windows, mask=mask).unflatten(1, window)
        x = window_reverse(windows, window, *padded)
        if any(shift):
            x = x.roll(shift, (1, 2))
        return x[:, :height, :width]


def apart(size: Any, window: tuple[int, int], shift: tuple[int, int], like: Tensor) -> Tensor:
    """After a shift: -100 between places of one window that are not neighbours in the image. (windows, area, area)."""
    regions = []
    for length, span, step in zip(size, window, shift, strict=True):
        at = torch.arange(length, device=like.device)
        regions.append((at >= length - span).to(like.dtype) + (at >= length - step).to(like.dtype))
    region = window_partition((3 * regions[0][:, None] + regions[1])[None, ..., None], window).flatten(1)
    return -100.0 * (region[:, None] != region[:, :, None]).to(like.dtype)
