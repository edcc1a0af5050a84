"""PMP: prompt-guided mask proposals (arXiv 2412.10292). The prompts guide the queries while they become masks.

``network(image, prompts) -> Prediction``: a plain module of tensors; it knows no strings, files or trainers.
The image is encoded once (``encode``) and may then be decoded for any prompts (``decode``).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import build_backbone, pad_to
from .pixel_decoder import build_pixel_decoder
from .prompts import Prediction, Prompts, as_prompts
from .query_decoder import Features, QueryDecoder, check_sizes

MASK_STRIDE = 4  # of mask features and mask logits


class PMP(nn.Module):
    """Backbone -> pixel decoder -> prompt-guided query decoder.

    Args:
        text_dim: width E of the prompts' embeddings.
        backbone: ``clip`` or any timm name; see ``build_backbone``.
        backbone_weights: None (random), ``timm``, a hub id or a local file or folder. Not part of ``config``.
        backbone_config: what ``Backbone.config`` gave, to build the same backbone without its weights' source.
        backbone_frozen: leave the pretrained part of the backbone as it is.
        backbone_mean, backbone_std: of images in [0, 1], where they differ from what the name was trained with.
        backbone_norms, backbone_options: see ``build_backbone``; part of ``backbone_config``, too.
        pixel_decoder: ``fpn``, ``fpn_light`` or ``deformable``; the latter has ``encoder_layers`` of ``encoder_ffn_dim``.
        dim, num_queries, num_layers, num_heads, ffn_dim: of the decoders; Mask2Former has 256, 100, 9, 8, 2048.
        decoder: ``masked`` (Mask2Former) or ``plain`` (MaskFormer, DETR), which looks at the backbone's last map.
        prompt_*, named_by, mask_pooling, name_*, dropout: see ``QueryDecoder``; ``prompt_attention="none"`` for blind proposals.
        pixel_head: also name every pixel in training, for an auxiliary loss.
        num_classes: of a closed list, named where ``prompts`` is None.
    """

    #: A query's score says whether there is something, and its mask where: see ``inference.answers``.
    by_pixel = False
    stride = MASK_STRIDE

    def __init__(
        self,
        text_dim: int = 512,
        backbone: str = "resnet50",
        backbone_weights: str | None = None,
        backbone_config: dict | None = None,
        backbone_frozen: bool = False,
        backbone_mean: tuple[float, float, float] | None = None,
        backbone_std: tuple[float, float, float] | None = None,
        backbone_norms: bool | None = None,
        backbone_options: dict | None = None,
        pixel_decoder: str = "fpn_light",
        encoder_layers: int = 6,
        encoder_ffn_dim: int = 1024,
        dim: int = 256,
        num_queries: int = 100,
        num_layers: int = 9,
        num_heads: int = 8,
        ffn_dim: int = 2048,
        decoder: str = "masked",
        prompt_attention: str = "pooled",
        prompt_place: str = "first",
        prompt_direction: str = "read",
        prompt_gate: str = "none",
        prompt_layers: Sequence[int] | None = None,
        prompt_queries: str = "shared",
        named_by: str = "mask",
        mask_pooling: str = "soft",
        pixel_head: bool = False,
        num_classes: int | None = None,
        dropout: float = 0.0,
        name_hidden: int | None = None,
        name_scale: float | None = None,
    ) -> None:
        given = dict(locals())
        super().__init__()
        check_sizes(dim, num_heads, encoder_layers=encoder_layers, encoder_ffn_dim=encoder_ffn_dim)
        self.backbone = build_backbone(
            backbone,
            backbone_weights,
            backbone_config,
            mean=backbone_mean,
            std=backbone_std,
            frozen=backbone_frozen,
            norms=backbone_norms,
            options=backbone_options,
        )
        channels = list(self.backbone.channels)
        self.pixel_decoder = build_pixel_decoder(pixel_decoder, channels, dim, num_heads, encoder_layers, encoder_ffn_dim)
        # What a plain decoder's queries look at.
        self.input_projection = nn.Conv2d(channels[-1], dim, 1) if decoder == "plain" else None
        self.query_decoder = QueryDecoder(
            dim=dim,
            text_dim=text_dim,
            num_queries=num_queries,
            num_layers=num_layers,
            num_heads=num_heads,
            ffn_dim=ffn_dim,
            decoder=decoder,
            prompt_attention=prompt_attention,
            prompt_place=prompt_place,
            prompt_direction=prompt_direction,
            prompt_gate=prompt_gate,
            prompt_layers=prompt_layers,
            prompt_queries=prompt_queries,
            named_by=named_by,
            mask_pooling=mask_pooling,
            pixel_head=pixel_head,
            num_classes=num_classes,
            dropout=dropout,
            name_hidden=name_hidden,
            name_scale=name_scale,
        )
        #: Images, and masks of their pixels, are padded to multiples of it.
        self.pad = max(MASK_STRIDE, self.backbone.pad)
        # All that the arguments say of the backbone is in its own config; weights are no part of it.
        left_out = {"self", "__class__"} | {f"backbone_{x}" for x in ("weights", "mean", "std", "norms", "options")}
        own = {"backbone_config": self.backbone.config, "prompt_layers": prompt_layers and list(prompt_layers)}
        #: The arguments that rebuild this network with no weights at hand, as plain JSON values.
        self.config: dict[str, Any] = {k: v for k, v in given.items() if k not in left_out} | own

    @classmethod
    def from_transformers(cls, source: Any, text_dim: int = 512, **prompt_options: Any) -> "PMP":
        """A Mask2Former or MaskFormer from transformers (a model, its folder or a hub id) as a PMP with the same weights.

        With ``prompts=None`` it answers as the original does. ``prompt_options``: ``QueryDecoder``'s ``prompt_*``, ``named_by``,
        ``mask_pooling``, ``name_*`` and ``dropout``, which is not taken over; with the default gate the masks of any prompts are
        the original's at first, bit for bit. Raises InputError for another model, or for a setting of it that has no counterpart
        here.
        """
        from .from_transformers import convert

        return convert(cls, source, text_dim, prompt_options)

    def forward(self, image: Tensor, prompts: Prompts | Tensor | None, aux: bool | None = None) -> Prediction:
        """``image`` (B, 3, H, W) RGB in [0, 1]; ``prompts`` a ``Prompts``, a tensor (P, E) or (B, P, E), or None for the closed
        list of a network that has one.

        Returns mask logits (B, Q, h, w) at stride 4 of the image padded at its right and bottom to a multiple of ``self.pad``,
        and class logits (B, Q, K + 1) over the prompts and "no object"; with ``aux`` (default: in training) both for every
        earlier layer, too.
        """
        return self.decode(self.encode(image), prompts, aux)

    def encode(self, image: Tensor) -> Features:
        """The prompt-free part; ``image`` as in ``forward``."""
        if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
            raise ValueError(f"image: got {image.dtype} {tuple(image.shape)}, want float (B, 3, H, W) with values in [0, 1]")
        image = image.to(self.query_decoder.query_position.dtype)
        return self.features(self.backbone(image), image)

    def features(self, maps: list[Tensor], image: Tensor) -> Features:
        """A backbone's maps of ``image`` as what queries look at."""
        area = F.avg_pool2d(pad_to(torch.ones_like(image[:1, :1]), self.pad), MASK_STRIDE)[0, 0]
        mask_features, levels = self.pixel_decoder(maps)
        if self.input_projection is not None:
            return Features(mask_features, [self.input_projection(maps[-1])], [], area)
        sizes = [level.shape[-2:] for level in levels]
        guides = [F.interpolate(mask_features.detach(), size, mode="bilinear", align_corners=False) for size in sizes]
        return Features(mask_features, levels, guides, area)

    def decode(self, features: Features, prompts: Prompts | Tensor | None, aux: bool | None = None) -> Prediction:
        """The masks and names of all queries for these prompts."""
        asked = None if prompts is None else as_prompts(prompts, len(features.mask_features))
        return self.query_decoder(features, asked, aux)
