"""CLIPSeg: a light decoder on a frozen CLIP, asked by text or by image (arXiv 2112.10003), and its two baselines.

Tokens of some of the encoder's blocks, the deepest first, are projected to D numbers and added one after the other before a
decoder block each; before one of these the prompt scales and shifts all tokens (FiLM). At the end every token becomes the pixels
of its patch (sec. 3). Two baselines are settings of the same network (sec. 4):

- CLIP-Deconv: ``decoder="mlp"``, ``blocks=(9,)``: no attention behind CLIP;
- ViTSeg: ``backbone="vit_base_patch16_384"``: ImageNet's weights in place of CLIP's.

The image is encoded once for any number of prompts. Letters: B images, P prompts, N tokens of an image, D the decoder's width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .light_decoder import UPSAMPLINGS, DecoderBlock, MLPBlock
from .prompts import PixelPrediction, Prompts, as_prompts
from .token_towers import build_token_backbone

CHOICES = {"decoder": ("transformer", "mlp"), "upsampling": ("transposed", "refined", "bilinear")}
IMAGE_PROJECTIONS = ("learned", "fixed")
AT_ONCE = {"cpu": 2048}  # tokens of the decoder: more do not fit into a CPU's cache
AT_ONCE_ELSEWHERE = 131_072


class Tokens(NamedTuple):
    """An encoded image, good for any number of prompts: for each decoder block the tokens (B, N, D) that are added before it.

    ``grid`` (h, w) of the patches, ``size`` (H, W) of the image.
    """

    levels: list[Tensor]
    grid: tuple[int, int]
    size: tuple[int, int]

    def repeat(self, count: int) -> "Tokens":
        """Each image ``count`` times in a row."""
        return self._replace(levels=[x.repeat_interleave(count, 0) for x in self.levels])

    def select(self, image: int) -> "Tokens":
        """One image of the batch, as a batch of its own."""
        return self._replace(levels=[x[image, None] for x in self.levels])


class CLIPSeg(nn.Module):
    """Encoder -> FiLM by the prompt -> light decoder -> pixels.

    Args:
        text_dim: width E of the prompts' embeddings.
        backbone: ``clip`` or a plain ViT of timm.
        backbone_weights: a CLIP's folder or hub id; of timm as in ``build_backbone``. Not part of ``config``.
        backbone_config: what ``backbone.config`` gave, to build the same encoder without its weights' source.
        backbone_frozen: the encoder does not learn, as in the paper.
        backbone_random: take the encoder's shape only, and draw its weights anew.
        backbone_mean, backbone_std: of images in [0, 1]. Default: the encoder's own; the paper's code gives CLIP ImageNet's.
        backbone_options: further arguments of a timm encoder, as ``{"patch_size": 8}``.
        blocks: of the encoder, from 0, that the decoder reads, in rising order. Default: (3, 7, 9) of 12, as in the paper.
        input_scale: tokens and prompts are multiplied by it. 1 suits CLIP; larger ones (the tiny CLIP's are about five times as
            large) drown what the prompt has said where the next level is added, and the decoder hardly learns.
        dim: D; 64 and 16 in the paper.
        conditional_layer: the decoder block before which the prompt acts, from 0, which is the deepest level's.
        num_heads, ffn_dim, dropout: of the decoder blocks.
        decoder: ``transformer``, or ``mlp`` (CLIP-Deconv): a hidden layer of D, no attention.
        upsampling: ``transposed`` convolution over a patch, ``refined`` (a 3x3 convolution and two steps), or ``bilinear``.
        image_projection: of a timm encoder's image embedding to E (or a CLIP's, where the texts are not its own): ``learned``, or
            ``fixed``, random as the paper's code has it.
    """

    #: What is above the threshold of a prompt's map is its mask, pixel by pixel.
    by_pixel = True
    stride = 1

    def __init__(
        self,
        text_dim: int = 512,
        backbone: str = "clip",
        backbone_weights: str | None = None,
        backbone_config: dict | None = None,
        backbone_frozen: bool = True,
        backbone_random: bool = False,
        backbone_mean: tuple[float, float, float] | None = None,
        backbone_std: tuple[float, float, float] | None = None,
        backbone_options: dict | None = None,
        blocks: Sequence[int] | None = None,
        input_scale: float = 1.0,
        dim: int = 64,
        conditional_layer: int = 0,
        num_heads: int = 4,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        decoder: str = "transformer",
        upsampling: str = "transposed",
        image_projection: str = "learned",
    ) -> None:
        given = dict(locals())
        super().__init__()
        for name, choices in (CHOICES | {"image_projection": IMAGE_PROJECTIONS}).items():
            if given[name] not in choices:
                raise InputError(f"{name}: got {given[name]!r}, want one of {', '.join(choices)}")
        if dim < 1 or num_heads < 1 or (decoder == "transformer" and dim % num_heads):
            raise InputError(f"dim {dim} does not divide into {num_heads} heads: make it a multiple")
        self.backbone = build_token_backbone(
            backbone, backbone_weights, backbone_config, blocks=blocks, mean=backbone_mean, std=backbone_std,
            frozen=backbone_frozen, options=backbone_options, random=backbone_random,
        )  # fmt: skip
        tower, depth = self.backbone.tower, len(self.backbone.blocks)
        if not 0 <= conditional_layer < depth:
            raise InputError(f"conditional_layer: got {conditional_layer}, want 0 to {depth - 1}, one of the decoder's blocks")
        self.conditional_layer = conditional_layer
        self.reduce = nn.ModuleList(nn.Linear(tower.width, dim) for _ in range(depth))
        self.film_scale, self.film_shift = nn.Linear(text_dim, dim), nn.Linear(text_dim, dim)
        make = DecoderBlock if decoder == "transformer" else MLPBlock
        self.blocks = nn.ModuleList(make(dim, num_heads, ffn_dim, dropout) for _ in range(depth))
        self.upsample = UPSAMPLINGS[upsampling](dim, tower.patch)
        # A CLIP's own projection leads to its own texts.
        is_own = backbone == "clip" and tower.out_dim == text_dim
        self.image_projection = None if is_own else nn.Linear(tower.out_dim, text_dim)
        if self.image_projection is not None and image_projection == "fixed":
            self.image_projection.requires_grad_(False)
        self.text_dim, self.input_scale = text_dim, input_scale
        #: Images, and masks of their pixels, need no padding: logits have the image's size.
        self.pad = 1
        left_out = {"self", "__class__", "blocks"}
        left_out |= {f"backbone_{name}" for name in ("weights", "random", "mean", "std", "options")}  # the backbone's own config
        #: The arguments that rebuild this network with no weights at hand, as plain JSON values.
        self.config: dict[str, Any] = {k: v for k, v in given.items() if k not in left_out}
        self.config |= {"backbone_config": self.backbone.config}

    @property
    def mean(self) -> Tensor:
        """Of the images in [0, 1] that the encoder normalises, (1, 3, 1, 1)."""
        return self.backbone.mean

    @classmethod
    def from_transformers(cls, source: Any) -> "CLIPSeg":
        """A ``CLIPSegForImageSegmentation`` (a model, its folder or a hub id), plain or refined, with its weights and answers.

        Raises InputError for another model, or a setting of it that has no counterpart here.
        """
        from .from_clipseg import convert

        return convert(cls, source)

    @classmethod
    def from_original(cls, weights: Any, clip: str, blocks: Sequence[int] = (3, 6, 9)) -> "CLIPSeg":
        """The paper's released weights (``rd64-uni.pth`` and its kin: a path or a state dict) on the CLIP they belong to.

        ``clip``: folder or hub id of the same CLIP, openai/clip-vit-base-patch16. ``blocks`` are not in the file: the paper says
        (3, 7, 9), its quick start and transformers' copies use (3, 6, 9). Raises InputError where a weight has no place.
        """
        from .from_clipseg import convert_original

        return convert_original(cls, weights, clip, blocks)

    def forward(self, image: Tensor, prompts: Prompts | Tensor) -> Tensor:
        """``image`` (B, 3, H, W) RGB in [0, 1] of any size and aspect; ``prompts`` a ``Prompts``, or embeddings (P, E), (B, P, E)
        as CLIP gives them, not normalised. Returns logits (B, P, H, W): how surely a pixel belongs to a prompt.
        """
        return self.decode(self.encode(image), prompts).logits

    def encode(self, image: Tensor) -> Tokens:
        """The prompt-free part, up to the block that the prompt acts on; ``image`` as in ``forward``."""
        tokens = self.backbone(image)
        levels = [reduce(self.input_scale * x) for reduce, x in zip(self.reduce, reversed(tokens), strict=True)]
        for i in range(self.conditional_layer):
            levels[i + 1] = levels[i + 1] + self.blocks[i](levels[i])
        height, width = image.shape[-2:]
        grid = (-(-height // self.backbone.pad), -(-width // self.backbone.pad))
        return Tokens(levels[self.conditional_layer :], grid, (height, width))

    def decode(self, features: Tokens, prompts: Prompts | Tensor) -> PixelPrediction:
        """The masks of these prompts. Without gradients a few are decoded at a time, which changes nothing but the speed."""
        asked = as_prompts(prompts, len(features.levels[0])).pooled  # (B, P, E)
        asked = self.input_scale * asked.to(self.film_scale.weight.dtype)
        scale, shift = self.film_scale(asked), self.film_shift(asked)  # (B, P, D)
        at_once = asked.shape[1]
        if not (torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling()):
            tokens = features.levels[0][..., 0].numel()  # of all images, for one prompt
            at_once = max(1, AT_ONCE.get(asked.device.type, AT_ONCE_ELSEWHERE) // tokens)
        pairs = zip(scale.split(at_once, 1), shift.split(at_once, 1), strict=True)
        return PixelPrediction(torch.cat([self._decode(features, *some) for some in pairs], 1))

    def _decode(self, features: Tokens, scale: Tensor, shift: Tensor) -> Tensor:
        """Logits (B, P, H, W) of prompts that scale and shift by (B, P, D)."""
        first, *levels = features.levels
        asked = scale.shape[:2]
        x = (scale[:, :, None] * first[:, None] + shift[:, :, None]).flatten(0, 1)  # (B * P, N, D)
        first_block, *blocks = self.blocks[self.conditional_layer :]
        x = first_block(x)
        for level, block in zip(levels, blocks, strict=True):
            x = block((x.unflatten(0, asked) + level[:, None]).flatten(0, 1))
        maps = x[:, self.backbone.tower.extra :].transpose(1, 2).unflatten(2, features.grid)  # (B * P, D, h, w)
        logits = self.upsample(maps)
        padded = [side * self.backbone.pad for side in features.grid]
        if list(logits.shape[-2:]) != padded:  # the refined head's steps of a patch of 32 make 64
            logits = F.interpolate(logits, padded, mode="bilinear", align_corners=False)
        height, width = features.size
        return logits[:, 0, :height, :width].unflatten(0, asked)

    def embed(self, images: Tensor) -> Tensor:
        """Images (N, 3, h, w) in [0, 1] as prompts: (N, E), not normalised; ``image_prompts`` points at a thing in them."""
        embedding = self.backbone.embed(images)
        return embedding if self.image_projection is None else self.image_projection(embedding)
