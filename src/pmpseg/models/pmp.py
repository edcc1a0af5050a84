"""PMP: prompt-guided mask proposals (arXiv 2412.10292). The prompts guide the queries while they become masks.

``network(image, prompts) -> Prediction``: a plain module of tensors; it knows no strings, files or trainers.
The image is encoded once (``encode``) and may then be decoded for any prompts (``decode``).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import build_backbone
from .pixel_decoder import FPN
from .prompts import Prediction, Prompts, as_prompts
from .query_decoder import Features, QueryDecoder

STRIDE = 32  # images are padded to a multiple of it
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
        dim, num_queries, num_layers, num_heads, ffn_dim: of the decoders; Mask2Former has 256, 100, 9, 8, 2048.
        prompt_attention, prompt_place, named_by, mask_pooling: see ``QueryDecoder``; ``none`` for blind proposals.
        pixel_head: also name every pixel in training, for an auxiliary loss.
    """

    def __init__(
        self,
        text_dim: int = 512,
        backbone: str = "resnet50",
        backbone_weights: str | None = None,
        backbone_config: dict | None = None,
        backbone_frozen: bool = False,
        backbone_mean: tuple[float, float, float] | None = None,
        backbone_std: tuple[float, float, float] | None = None,
        dim: int = 256,
        num_queries: int = 100,
        num_layers: int = 9,
        num_heads: int = 8,
        ffn_dim: int = 2048,
        prompt_attention: str = "pooled",
        prompt_place: str = "first",
        named_by: str = "mask",
        mask_pooling: str = "soft",
        pixel_head: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(
            backbone, backbone_weights, backbone_config, mean=backbone_mean, std=backbone_std, frozen=backbone_frozen
        )
        self.pixel_decoder = FPN(list(self.backbone.channels), dim)
        self.query_decoder = QueryDecoder(
            dim=dim,
            text_dim=text_dim,
            num_queries=num_queries,
            num_layers=num_layers,
            num_heads=num_heads,
            ffn_dim=ffn_dim,
            prompt_attention=prompt_attention,
            prompt_place=prompt_place,
            named_by=named_by,
            mask_pooling=mask_pooling,
            pixel_head=pixel_head,
        )
        #: The arguments that rebuild this network with no weights at hand, as plain JSON values.
        self.config = {
            "text_dim": text_dim,
            "backbone": backbone,
            "backbone_config": self.backbone.config,
            "backbone_frozen": backbone_frozen,
            "dim": dim,
            "num_queries": num_queries,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "ffn_dim": ffn_dim,
            "prompt_attention": prompt_attention,
            "prompt_place": prompt_place,
            "named_by": named_by,
            "mask_pooling": mask_pooling,
            "pixel_head": pixel_head,
        }

    def forward(self, image: Tensor, prompts: Prompts | Tensor) -> Prediction:
        """``image`` (B, 3, H, W) RGB in [0, 1]; ``prompts`` a ``Prompts`` or a tensor (P, E) or (B, P, E).

        Returns mask logits (B, Q, h, w) at stride 4 of the image padded at its right and bottom to a multiple of 32, class
        logits (B, Q, K + 1) over the prompts and "no object", and both for every earlier layer in ``aux``.
        """
        return self.decode(self.encode(image), prompts)

    def encode(self, image: Tensor) -> Features:
        """The prompt-free part; ``image`` as in ``forward``."""
        if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
            raise ValueError(f"image: got {image.dtype} {tuple(image.shape)}, want float (B, 3, H, W) with values in [0, 1]")
        image = image.to(self.query_decoder.query.dtype)
        area = F.avg_pool2d(pad_to_stride(torch.ones_like(image[:1, :1])), MASK_STRIDE)[0, 0]
        mask_features, levels = self.pixel_decoder(self.backbone(pad_to_stride(image)))
        return Features(mask_features, levels, area)

    def decode(self, features: Features, prompts: Prompts | Tensor) -> Prediction:
        """The masks and names of all queries for these prompts."""
        return self.query_decoder(features, as_prompts(prompts, len(features.mask_features)))


def pad_to_stride(maps: Tensor) -> Tensor:
    """(..., H, W) with zeros (or False) added at the right and bottom, up to multiples of 32."""
    return F.pad(maps, (0, -maps.shape[-1] % STRIDE, 0, -maps.shape[-2] % STRIDE))
