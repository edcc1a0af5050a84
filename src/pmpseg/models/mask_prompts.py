"""Mask prompt tuning: learnable tokens where a region's crop shows nothing, around a Hugging Face CLIP vision tower.

Source: OVSeg (arXiv 2210.04150, sec. 3.3; code, ``model.py``); deeper prompts as in VPT (arXiv 2203.12119). Index 0 takes the
place of fully masked patches in the output of the patch embedding, before class token, positions and the first norm: prompts do
receive positions. Index d takes their place again in the output of block d, counted from 1. The class token is never replaced, no
token is added. Forward hooks do it, so that the tower's own code runs and nothing of it is repeated here.

Letters: N crops, P = g * g patches of a crop, W the tower's width.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel

from ..errors import InputError


class MaskPrompts(nn.Module):
    """``depth`` layers of ``num_patches`` tokens of ``width``, shared by all images; with depth 0 it does nothing.

        with prompts.replacing(vision, patches):  # patches (N, P) bool, False where a patch is wholly outside its region
            output = vision(pixels)
    """

    def __init__(self, depth: int, num_patches: int, width: int) -> None:
        super().__init__()
        if depth < 0:
            raise InputError(f"mask_prompt_depth: got {depth}, want 0 (none) or more; OVSeg has 3")
        self.tokens = nn.Parameter(torch.randn(depth, num_patches, width) * 0.02, requires_grad=depth > 0)

    @property
    def depth(self) -> int:
        return len(self.tokens)

    @contextmanager
    def replacing(self, vision: CLIPVisionModel, patches: Tensor) -> Iterator[None]:
        """Within it, ``vision`` sees the learned tokens where ``patches`` (N, P) is False; afterwards it is as before."""
        layers = vision.encoder.layers
        self._check(vision, patches)

        def embedded(_: nn.Module, __: Any, maps: Tensor) -> Tensor:  # (N, W, g, g)
            tokens = self._replace(maps.flatten(2).transpose(1, 2), patches, 0)
            return tokens.transpose(1, 2).unflatten(2, maps.shape[-2:])

        def after_block(depth: int) -> Any:
            def replaced(_: nn.Module, __: Any, states: Tensor) -> Tensor:  # (N, 1 + P, W)
                return torch.cat([states[:, :1], self._replace(states[:, 1:], patches, depth)], 1)

            return replaced

        with ExitStack() as hooks:
            if self.depth:
                hooks.callback(vision.embeddings.patch_embedding.register_forward_hook(embedded).remove)
            for depth in range(1, self.depth):
                hooks.callback(layers[depth - 1].register_forward_hook(after_block(depth)).remove)
            yield

    def _replace(self, tokens: Tensor, patches: Tensor, depth: int) -> Tensor:
        return torch.where(patches.unsqueeze(-1), tokens, self.tokens[depth].to(tokens.dtype))

    def _check(self, vision: CLIPVisionModel, patches: Tensor) -> None:
        layers, width, (_, own, wide) = len(vision.encoder.layers), vision.config.hidden_size, self.tokens.shape
        if self.depth and (wide != width or own != patches.shape[-1]):
            got = f"mask prompts of {own} patches and width {wide}"
            want = f"a CLIP of {patches.shape[-1]} patches and width {width}"
            raise InputError(f"{got} do not fit {want}: use the one they learned with")
        if self.depth > layers:
            raise InputError(f"mask_prompt_depth: got {self.depth}, want at most {layers}, the blocks of this CLIP")


def patches_of(mask: Tensor, patch: int) -> Tensor:
    """Masks (N, S, S) in [0, 1] -> (N, P) bool: False only where a patch holds no pixel of the region."""
    return F.avg_pool2d(mask.float().unsqueeze(1), patch).ceil().flatten(1) > 0
