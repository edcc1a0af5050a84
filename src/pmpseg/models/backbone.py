"""Image backbones: any timm name, or the vision tower of any CLIP, as a pyramid of four maps.

Three kinds of towers give one kind of answer, maps of strides 4, 8, 16 and 32 in NCHW:
- hierarchical timm networks (CNNs, Swin, ...) have them: the right ones are picked and put into NCHW;
- plain timm ViTs and CLIP have maps of one stride: `ViTPyramid` builds the rest.

Every backbone normalises inside itself. Its `config` rebuilds it without weights or network.
"""

import difflib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from ..errors import InputError
from .clip import load_clip_vision
from .pyramid import ViTPyramid
from .swin import pad_then_shift
from .towers import STRIDES, ClipTower, ConvTower, PyramidTower, ViTTower
from .weights import load_weights

WIDTH = 96
SWIN = ("swin_tiny_", "swin_small_", "swin_base_", "swin_large_", "swin_s3_")  # not swinv2
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
# What a CLIP vision tower is built from; the rest of its config is not about its shape.
VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


class Backbone(nn.Module):
    """image (B, 3, H, W), float in [0, 1], to maps (B, C_i, H / s_i, W / s_i), rounded up.

    strides: (4, 8, 16, 32).
    channels: the four C_i.
    pad: images are padded with their mean colour at the right and bottom, to multiples of it.
    config: a plain dict for JSON; `build_backbone(config["name"], config=config)` makes the same network.
    loaded: one line on which tensors of a local file of weights were used; None without such a file.

    A frozen tower is in evaluation mode and has no gradients; a pyramid on top of it is trained all the same.
    """

    strides = STRIDES
    mean: Tensor
    std: Tensor

    def __init__(
        self, tower: nn.Module, config: dict, channels: tuple[int, ...], pyramid: ViTPyramid | None = None
    ) -> None:
        super().__init__()
        self.tower = tower
        self.pyramid = pyramid
        self.config = config
        self.channels = channels
        self.loaded: str | None = None
        self.frozen: bool = config["frozen"]
        self.pad: int = config["pad"]
        if self.frozen:
            tower.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        self.train()  # what comes from Hugging Face is in evaluation mode

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        if self.frozen:
            self.tower.eval()
        return self

    def forward(self, image: Tensor) -> list[Tensor]:
        """Raises ValueError for an image of another type or shape."""
        if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
            got = f"{image.dtype} {tuple(image.shape)}"
            raise ValueError(f"got an image {got}; wanted float (B, 3, H, W) with values in [0, 1]")
        x = pad_to((image - self.mean) / self.std, self.pad)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.tower(x)
        return self.pyramid(x, maps) if self.pyramid else maps


def pad_to(maps: Tensor, multiple: int) -> Tensor:
    """(..., H, W) with zeros (or False) added at the right and bottom, up to multiples of ``multiple``."""
    return F.pad(maps, (0, -maps.shape[-1] % multiple, 0, -maps.shape[-2] % multiple))


def build_backbone(
    name: str,
    weights: str | Path | None = None,
    config: dict | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    blocks: Sequence[int] | None = None,
    width: int | None = None,
    frozen: bool | None = None,
    pad: int | None = None,
    norms: bool | None = None,
    options: dict | None = None,
) -> Backbone:
    """A backbone by name.

    name: a timm name, "clip", or "conv" for a few plain convolutions that learn from scratch in minutes.
    weights: for timm None (random), "timm" (timm's own, downloaded), "hf-hub:owner/name", or a local
        .safetensors or .pth file in timm's keys. For "clip" a Hugging Face folder or hub id.
    config: the `config` of an earlier backbone, for all that is not given here. Needs no weights.
    mean, std: 3 numbers each, of images in [0, 1]. Default: those the name or CLIP folder comes with.
    blocks: of a ViT, the blocks to read, from 0; those above the last are cut off. Default: the last one and
        two more, a quarter of the depth apart.
    width: of a ViT, the channels of each level of the pyramid, a multiple of 32. Default: 96.
    frozen: trains only what stands on top of the tower. Default: False.
    pad: images are padded to multiples of it. Default: 32, with which all maps fit together exactly.
    norms: a LayerNorm on each of the four maps, as Mask2Former and MaskFormer have behind a Swin. Default: False.
    options: further arguments of the timm network, as `drop_path_rate`, or `depths` of one that timm has no name for.

    Raises InputError for a name, weights or setting that cannot be used, FileNotFoundError for a file that is
    not there.
    """
    config = {"name": name, "frozen": False, "pad": 32, "norms": False, "options": {}} | (config or {})
    if config["name"] != name:
        raise InputError(f"got the config of backbone {config['name']!r} for {name!r}; wanted the same name")
    given: dict[str, Any] = {"mean": mean, "std": std, "blocks": blocks, "width": width, "frozen": frozen}
    given |= {"pad": pad, "norms": norms, "options": options}
    config |= {key: value for key, value in given.items() if value is not None}
    if config["pad"] < 1:
        raise InputError(f"backbone got pad {config['pad']}; wanted 1 or more")
    if name in ("clip", "conv") and (config["norms"] or config["options"]):
        raise InputError(f"backbone {name!r} got norms or options; they are for timm's networks")
    build = {"clip": _build_clip, "conv": _build_conv}.get(name, _build_timm)
    return build(config, None if weights is None else str(weights))


def _build_clip(config: dict, weights: str | None) -> Backbone:
    if weights is not None:
        vision, own = load_clip_vision(weights)
        if missing := [key for key in OPENAI if key not in own | config]:
            warnings.warn(
                f"{weights} has no image processor (preprocessor_config.json), nor is {' or '.join(missing)} "
                "given: images are normalised as OpenAI's CLIP wants them",
                stacklevel=3,
            )
    elif "vision" in config:
        vision, own = CLIPVisionModel(CLIPVisionConfig(**config["vision"])), {}
    else:
        raise InputError("backbone 'clip' got no weights; wanted a Hugging Face CLIP folder or hub id")
    tower = ClipTower(vision, _blocks(config, vision.config.num_hidden_layers))
    vision_config = {key: getattr(vision.config, key) for key in VISION_KEYS}
    config = OPENAI | own | config | {"vision": vision_config}
    return _on_vit(tower, vision.config.hidden_size, config)


def _build_conv(config: dict, weights: str | None) -> Backbone:
    if weights is not None or "blocks" in config or "width" in config:
        raise InputError("backbone 'conv' is trained from scratch; weights, blocks and width are not for it")
    config = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)} | config
    return Backbone(ConvTower(), plain(config), ConvTower.channels)


def _build_timm(config: dict, weights: str | None) -> Backbone:
    net = network_of_timm(config["name"], weights, config["options"])
    loaded = load_weights(net, weights, config["name"]) if is_file(weights) else None
    config = {"mean": net.pretrained_cfg["mean"], "std": net.pretrained_cfg["std"]} | config
    if len(set(net.feature_info.reduction())) == 1:
        blocks = net.feature_info.info
        tower = ViTTower(net.model, _blocks(config, len(blocks)), patch=blocks[-1]["reduction"])
        backbone = _on_vit(tower, blocks[-1]["num_chs"], config)
        if config["norms"]:
            raise InputError(f"backbone {config['name']!r} is a plain ViT; 'norms' are not for it")
    elif "blocks" in config or "width" in config:
        raise InputError(f"backbone {config['name']!r} is no plain ViT; 'blocks' and 'width' are for those")
    else:
        if any(isinstance(module, SwinTransformerBlock) for module in net.modules()):
            pad_then_shift(net)
        pyramid = PyramidTower(net, config["name"], config["norms"])
        backbone = Backbone(pyramid, plain(config), pyramid.channels)
    backbone.loaded = loaded
    return backbone


def _on_vit(tower: ViTTower | ClipTower, dim: int, config: dict) -> Backbone:
    config = {"width": WIDTH} | config | {"blocks": tower.blocks}
    if config["width"] < 32 or config["width"] % 32:
        raise InputError(f"backbone got width {config['width']}; wanted a multiple of 32")
    width = config["width"]
    return Backbone(tower, plain(config), (width,) * 4, ViTPyramid(dim, len(tower.blocks), width))


def _blocks(config: dict, depth: int) -> list[int]:
    """The chosen blocks in rising order; by default up to three, a quarter of the depth apart."""
    step = max(1, round(depth / 4))
    blocks = sorted(set(config.get("blocks") or range(depth - 1, -1, -step)[:3]))
    if blocks[0] < 0 or blocks[-1] >= depth:
        raise InputError(f"backbone {config['name']!r} got blocks {blocks}; wanted 0 to {depth - 1}")
    return blocks


def network_of_timm(name: str, weights: str | None, arguments: dict, features_only: bool = True) -> Any:
    """The network, with random weights or with those that timm itself fetches; as a feature network, or whole."""
    base = name.partition(".")[0]
    if not timm.is_model(base):
        near = ", ".join(difflib.get_close_matches(base, timm.list_models(), n=3)) or "clip"
        raise InputError(f"no backbone is called {name!r}; did you mean {near}? (timm.list_models() has all)")
    fetched = None if is_file(weights) else weights
    options: dict = {"features_only": True} if features_only else {"num_classes": 0}
    options["pretrained"] = fetched is not None
    if fetched is not None and fetched != "timm":
        options["pretrained_cfg_overlay"] = {"hf_hub_id": fetched.removeprefix("hf-hub:")}
    pretrained_cfg = timm.get_pretrained_cfg(name)
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        options["dynamic_img_size"] = True
    if base.startswith(SWIN):
        options["always_partition"] = True
    try:
        return timm.create_model(name, **options, **arguments)
    except TypeError as error:
        if arguments:
            raise InputError(f"backbone {name!r} does not take options {arguments} ({error})") from error
        if "dynamic_img_size" not in options:
            raise
        raise InputError(f"backbone {name!r} takes images of one size; wanted one that takes any") from error
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot build backbone {name!r} with weights {weights!r}: {reason}") from error


def is_file(weights: str | None) -> TypeGuard[str]:
    return weights is not None and weights != "timm" and not weights.startswith("hf-hub:")


def plain(config: dict) -> dict:
    """Lists for tuples, so that JSON gives back the same dict."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
