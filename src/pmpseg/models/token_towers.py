"""Vision transformers as CLIPSeg reads them: the tokens, class token and all, after chosen blocks; one embedding of an image.

Source: CLIPSeg (arXiv 2112.10003, sec. 3; ViTSeg, sec. 4). No block is run that nobody reads: the tokens of an image take those
up to the last chosen one, an image prompt's embedding takes all.

Letters: B images, N = C + h * w tokens of which C come before the patches (a class token, registers), W the width.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ..errors import InputError
from .backbone import OPENAI, VISION_KEYS, is_file, network_of_timm, pad_to, plain
from .clip import load_clip_vision
from .weights import load_weights

PAPER_DEPTH, PAPER_BLOCKS = 12, (3, 7, 9)  # of a ViT-B/16


class ClipTokens(nn.Module):
    """A CLIP's vision tower with its projection."""

    extra = 1  # tokens before those of the patches

    def __init__(self, vision: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.vision, self.projection = vision.vision_model, vision.visual_projection
        config: Any = vision.config
        self.width, self.depth, self.patch = config.hidden_size, config.num_hidden_layers, config.patch_size
        self.out_dim = config.projection_dim

    def forward(self, x: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Normalised images (B, 3, H, W) of whole patches -> tokens (B, N, W) after each of ``blocks``, counted from 0."""
        x = self.vision.pre_layrnorm(self.vision.embeddings(x, interpolate_pos_encoding=True))
        tokens = {}
        for block, layer in enumerate(self.vision.encoder.layers[: max(blocks) + 1]):
            x = tokens[block] = layer(x, attention_mask=None)
        return [tokens[block] for block in blocks]

    def embed(self, x: Tensor) -> Tensor:
        """(B, E): the class token at the end, normed and projected, as CLIP compares it with texts."""
        (x,) = self(x, [self.depth - 1])
        return self.projection(self.vision.post_layernorm(x[:, 0]))

    def not_read(self, blocks: Sequence[int]) -> list[nn.Module]:
        """What only ``embed`` needs."""
        return [*self.vision.encoder.layers[max(blocks) + 1 :], self.vision.post_layernorm, self.projection]


class TimmTokens(nn.Module):
    """A plain ViT of timm."""

    def __init__(self, net: Any, name: str) -> None:
        super().__init__()
        if not hasattr(net, "blocks") or not isinstance(getattr(net, "patch_embed", None), PatchEmbed):
            raise InputError(f"backbone {name!r} is no plain ViT; want one, as vit_base_patch16_384, or 'clip'")
        self.net = net
        self.width, self.depth, self.patch = net.embed_dim, len(net.blocks), net.patch_embed.patch_size[0]
        self.out_dim, self.extra = self.width, net.num_prefix_tokens

    def forward(self, x: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """As ``ClipTokens``."""
        chosen = sorted(blocks)
        with_prefix = self.extra > 0  # where there is none, timm does not give pairs
        found = self.net.forward_intermediates(
            x, chosen, return_prefix_tokens=with_prefix, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        tokens = [torch.cat([prefix, patches], 1) for patches, prefix in found] if with_prefix else found
        by_block = dict(zip(chosen, tokens, strict=True))
        return [by_block[block] for block in blocks]

    def embed(self, x: Tensor) -> Tensor:
        """(B, W): what the network's classifier reads."""
        return self.net.forward_head(self.net.forward_features(x), pre_logits=True)

    def not_read(self, blocks: Sequence[int]) -> list[nn.Module]:
        pool = getattr(self.net, "attn_pool", None)
        return [*self.net.blocks[max(blocks) + 1 :], self.net.norm, self.net.fc_norm, *([pool] if pool else [])]


class TokenBackbone(nn.Module):
    """Images (B, 3, H, W), float in [0, 1], to tokens; normalises, and pads at the right and bottom to whole patches.

    blocks: those that are read, from 0.
    config: a plain dict for JSON; ``build_token_backbone(config["name"], config=config)`` makes the same network.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: ClipTokens | TimmTokens, config: dict) -> None:
        super().__init__()
        self.tower, self.config = tower, config
        self.blocks, self.frozen = tuple(config["blocks"]), bool(config["frozen"])
        self.pad = tower.patch
        unused = [tower] if self.frozen else tower.not_read(self.blocks)
        for module in unused:
            module.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        self.train()

    def train(self, mode: bool = True) -> "TokenBackbone":
        super().train(mode)
        if self.frozen:
            self.tower.eval()
        return self

    def forward(self, image: Tensor) -> list[Tensor]:
        """The tokens (B, N, W) after each of ``blocks``."""
        return self._run(lambda x: self.tower(x, self.blocks), image)

    def embed(self, image: Tensor) -> Tensor:
        """(B, E): one embedding an image."""
        return self._run(self.tower.embed, image)

    def _run(self, f: Any, image: Tensor) -> Any:
        if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
            got = f"{image.dtype} {tuple(image.shape)}"
            raise ValueError(f"image: got {got}, want float (B, 3, H, W) with values in [0, 1]")
        x = pad_to((image.to(self.mean.dtype) - self.mean) / self.std, self.pad)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return f(x)


def build_token_backbone(
    name: str,
    weights: str | Path | None = None,
    config: dict | None = None,
    *,
    blocks: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    frozen: bool | None = None,
    options: dict | None = None,
    random: bool = False,
) -> TokenBackbone:
    """A vision transformer by name.

    name: "clip" or a plain ViT of timm.
    weights: for "clip" a Hugging Face folder or hub id; for timm as in ``build_backbone``.
    config: the ``config`` of an earlier backbone, for all that is not given here. Needs no weights.
    blocks: those that are read, from 0. Default: what CLIPSeg's (3, 7, 9) of 12 are in a network of this depth.
    mean, std: 3 numbers each, of images in [0, 1]. Default: those the name or CLIP folder comes with.
    frozen: it does not learn. Default: True.
    options: further arguments of the timm network, as ``patch_size``.
    random: only the shape is taken, and the weights are drawn anew ("no CLIP weights" of the paper's ablation).

    Raises InputError for a name, weights or setting that cannot be used.
    """
    config = {"name": name, "frozen": True, "options": {}} | (config or {})
    if config["name"] != name:
        raise InputError(f"got the config of backbone {config['name']!r} for {name!r}; wanted the same name")
    given = {"blocks": blocks, "mean": mean, "std": std, "frozen": frozen, "options": options}
    config |= {key: value for key, value in given.items() if value is not None}
    tower, own = (_clip if name == "clip" else _timm)(config, None if weights is None else str(weights))
    if random:
        tower.apply(_draw_anew)
    depth = tower.depth
    config = own | config
    at_same_depth = sorted({math.floor((b + 1) * depth / PAPER_DEPTH + 0.5) - 1 for b in PAPER_BLOCKS})
    config["blocks"] = list(config.get("blocks") or at_same_depth)
    wrong = [b for b in config["blocks"] if not 0 <= b < depth]
    if wrong or sorted(set(config["blocks"])) != config["blocks"]:
        raise InputError(f"blocks: got {config['blocks']}, want some of 0 to {depth - 1} in rising order; {name!r} has {depth}")
    return TokenBackbone(tower, plain(config))


def _clip(config: dict, weights: str | None) -> tuple[ClipTokens, dict]:
    if config["options"]:
        raise InputError("backbone 'clip' got options; they are for timm's networks")
    if weights is not None:
        vision, own = load_clip_vision(weights, CLIPVisionModelWithProjection)
    elif "vision" in config:
        vision, own = CLIPVisionModelWithProjection(CLIPVisionConfig(**config["vision"])), {}
    else:
        raise InputError("backbone 'clip' got no weights; wanted a Hugging Face CLIP folder or hub id")
    shape = {key: getattr(vision.config, key) for key in (*VISION_KEYS, "projection_dim")}
    return ClipTokens(vision), OPENAI | own | {"vision": shape}


def _timm(config: dict, weights: str | None) -> tuple[TimmTokens, dict]:
    name = config["name"]
    net = network_of_timm(name, weights, config["options"], features_only=False)
    if is_file(weights):
        load_weights(net, weights, name)
    cfg = timm.get_pretrained_cfg(name)
    own = {"mean": cfg.mean, "std": cfg.std} if cfg else {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return TimmTokens(net, name), own


def _draw_anew(module: nn.Module) -> None:
    """As transformers and timm draw them: matrices from a narrow normal distribution; norms begin as the identity."""
    if isinstance(module, nn.LayerNorm):
        module.reset_parameters()
    else:
        for name, p in module.named_parameters(recurse=False):
            with torch.no_grad():
                p.zero_() if name == "bias" else p.normal_(std=0.02)
