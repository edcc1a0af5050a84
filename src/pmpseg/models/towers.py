"""The kinds of image towers: normalised images (B, 3, H, W) to a list of maps in NCHW.

A hierarchical timm network gives its four maps of strides 4, 8, 16, 32; a plain timm ViT and a CLIP give one
map (B, D, h, w) for each block that is read, all of the stride of their patches.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModel

from ..errors import InputError

STRIDES = (4, 8, 16, 32)


class PyramidTower(nn.Module):
    """A timm feature network that has maps of strides 4, 8, 16, 32 among its own; ``norms`` puts a LayerNorm on each."""

    def __init__(self, net: Any, name: str, norms: bool = False) -> None:
        super().__init__()
        strides, channels = net.feature_info.reduction(), net.feature_info.channels()
        if not set(STRIDES) <= set(strides):
            raise InputError(f"backbone {name!r} has strides {strides}; wanted 4, 8, 16, 32, or a plain ViT")
        self.net = net
        self.picks = [max(i for i, s in enumerate(strides) if s == stride) for stride in STRIDES]
        self.channels = tuple(channels[i] for i in self.picks)
        self.nhwc = getattr(net, "output_fmt", "NCHW") == "NHWC"
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels) if norms else None

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.net(x)
        maps = [maps[i] for i in self.picks]
        if self.norms is not None:
            maps = [m if self.nhwc else m.permute(0, 2, 3, 1) for m in maps]
            maps = [norm(m) for norm, m in zip(self.norms, maps, strict=True)]
        return [m.permute(0, 3, 1, 2) for m in maps] if self.nhwc or self.norms is not None else maps


class ConvTower(nn.Module):
    """Nine 3x3 convolutions, two at each stride after the first: for training from scratch in minutes.

    On small images it learns shapes from far fewer of them than timm's small networks do, most of whose layers stand at
    strides 16 and 32.
    """

    channels = (48, 96, 128, 128)

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 24, stride=2)
        widths = (24, *self.channels)
        self.stages = nn.ModuleList(
            nn.Sequential(_conv(i, o, stride=2), _conv(o, o)) for i, o in zip(widths, self.channels, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class ViTTower(nn.Module):
    """A plain timm ViT: the maps (B, D, h, w) after the chosen blocks."""

    def __init__(self, net: Any, blocks: list[int], patch: int) -> None:
        super().__init__()
        self.net = net
        self.blocks = blocks
        self.patch = patch
        net.prune_intermediate_layers(blocks, prune_norm=True, prune_head=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = _fit(x, self.patch)
        return self.net.forward_intermediates(x, indices=self.blocks, intermediates_only=True)


class ClipTower(nn.Module):
    """A CLIP vision tower: the maps (B, D, h, w) after the chosen blocks, the class token left out."""

    def __init__(self, vision: CLIPVisionModel, blocks: list[int]) -> None:
        super().__init__()
        self.vision = vision
        self.blocks = blocks
        self.patch = vision.embeddings.patch_embedding.kernel_size[0]
        vision.encoder.layers = vision.encoder.layers[: max(blocks) + 1]
        vision.config.num_hidden_layers = len(vision.encoder.layers)
        # It reads only the class token, which nobody asks for.
        vision.post_layernorm = nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = _fit(x, self.patch)
        grid = (x.shape[-2] // self.patch, x.shape[-1] // self.patch)
        states = self.vision(x, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        return [states[block + 1][:, 1:].transpose(1, 2).unflatten(2, grid) for block in self.blocks]


def _fit(x: Tensor, patch: int) -> Tensor:
    """Stretches images to whole patches (a patch of 14 px does not divide a multiple of 32)."""
    size = [-(-side // patch) * patch for side in x.shape[-2:]]
    return x if list(x.shape[-2:]) == size else F.interpolate(x, size=size, mode="bilinear")
