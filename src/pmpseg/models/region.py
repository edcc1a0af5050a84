"""OVSeg's second stage: a CLIP names the regions that masks cut out of an image.

Source: OVSeg (arXiv 2210.04150, sec. 3.1 and 3.3; code, ``adapter.py`` and ``utils.py``). Two ways to look at a region:

- ``crop``, OVSeg's: the mask is binarised, its tight box cut out, what is outside the mask filled, and the rest resized to the
  CLIP's own input, whatever its aspect; one CLIP pass a region, with mask prompts (``mask_prompts.py``) if there are any.
- ``pool``: one CLIP pass an image. Dense features are the last block's patch tokens, through the final norm and the projection
  that the class token takes, averaged under each mask, as FC-CLIP (arXiv 2308.02487) averages its convolutional CLIP's; cheap,
  but a ViT's patch tokens were never trained to be named (MaskCLIP, arXiv 2112.01071, discusses it).

Letters: B images, Q masks, K names, E width of the CLIP's embeddings, N regions in a chunk, S side of the CLIP's input.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ..errors import InputError
from .backbone import OPENAI, VISION_KEYS
from .clip import load_clip_vision
from .mask_prompts import MaskPrompts, patches_of
from .prompts import NOT_ASKED, NOT_KNOWN

MODES, FILLS = ("crop", "pool"), ("mean", "zero")
Picture = tuple[Tensor, Tensor]  # a region's box of an image, (3, h, w) in [0, 1], and of its mask, (h, w) in [0, 1]


class RegionClassifier(nn.Module):
    """Names regions by their likeness to text embeddings of the same CLIP. The defaults are OVSeg's.

    Args:
        clip: Hugging Face folder or hub id of a CLIP; None to build it from ``clip_config``, without weights.
        clip_config: what ``RegionClassifier.config`` holds under this name: vision, mean and std.
        mode: ``crop`` or ``pool``, see above.
        mask_threshold: a pixel belongs to a region where its mask is above it; OVSeg has 0.5 (R101c), 0.4 (Swin-B), 0.35 (demo).
        expand: the box's sides, as a multiple of the tight box's; 1 has no context.
        fill: what lies outside the mask: ``mean`` is the CLIP's mean colour, ``zero`` black.
        matting: fade into the fill as the mask's probability says, instead of cutting at the threshold.
        weight: of the CLIP in ``ensemble``, lambda; 1 means CLIP only.
        temperature: of the cosines.
        mask_prompt_depth: layers of mask prompts; 0 leaves the CLIP as it is. OVSeg tunes 3; untrained ones only do harm.
        chunk: regions in one CLIP pass; it changes the memory and the speed only.
        pool_size: the short side at which ``pool`` reads an image; None for the CLIP's own input size.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        clip: str | Path | None = None,
        clip_config: dict[str, Any] | None = None,
        mode: str = "crop",
        mask_threshold: float = 0.5,
        expand: float = 1.0,
        fill: str = "mean",
        matting: bool = False,
        weight: float = 0.7,
        temperature: float = 100.0,
        mask_prompt_depth: int = 0,
        chunk: int = 32,
        pool_size: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, known in (("mode", mode, MODES), ("fill", fill, FILLS)):
            if value not in known:
                raise InputError(f"{name}: got {value!r}, want one of {', '.join(known)}")
        bounds: dict[str, tuple[float, float, float]] = {"mask_threshold": (mask_threshold, 0, 1), "weight": (weight, 0, 1)}
        bounds |= {"expand": (expand, 1, 100), "temperature": (temperature, 1e-6, 1e6), "chunk": (chunk, 1, 1e6)}
        for name, (number, low, high) in bounds.items():
            if not low <= number <= high:
                raise InputError(f"{name}: got {number}, want {low:g} to {high:g}")
        if mode == "pool" and mask_prompt_depth:
            raise InputError(f"mode 'pool' cuts nothing out: got mask_prompt_depth {mask_prompt_depth}, want 0, or mode 'crop'")
        if (clip is None) == (clip_config is None):
            raise InputError("a region classifier wants a CLIP: give clip (a folder or hub id), or else clip_config")
        if clip is not None:
            self.vision, own = load_clip_vision(clip, CLIPVisionModelWithProjection)
            vision = {key: getattr(self.vision.config, key) for key in (*VISION_KEYS, "projection_dim")}
            clip_config = {"vision": vision} | {key: list((own or OPENAI).get(key, OPENAI[key])) for key in OPENAI}
        else:
            assert clip_config is not None
            self.vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**clip_config["vision"]))
        shape = clip_config["vision"]
        self.size, self.patch, self.dim = shape["image_size"], shape["patch_size"], shape["projection_dim"]
        depth = shape["num_hidden_layers"]
        if mask_prompt_depth > depth:
            raise InputError(f"mask_prompt_depth: got {mask_prompt_depth}, want at most {depth}, the blocks of this CLIP")
        self.prompts = MaskPrompts(mask_prompt_depth, (self.size // self.patch) ** 2, shape["hidden_size"])
        for key in OPENAI:
            self.register_buffer(key, torch.tensor(clip_config[key]).view(3, 1, 1), persistent=False)
        self.mode, self.mask_threshold, self.expand, self.fill, self.matting = mode, mask_threshold, expand, fill, matting
        self.weight, self.temperature, self.chunk, self.pool_size = weight, temperature, chunk, pool_size
        #: The arguments that rebuild this module with no weights at hand, as plain JSON values.
        self.config: dict[str, Any] = {
            "clip_config": clip_config,
            "mode": mode,
            "mask_threshold": mask_threshold,
            "expand": expand,
            "fill": fill,
            "matting": matting,
            "weight": weight,
            "temperature": temperature,
            "mask_prompt_depth": mask_prompt_depth,
            "chunk": chunk,
            "pool_size": pool_size,
        }
        self.eval()

    def forward(self, image: Tensor, masks: Tensor, names: Tensor) -> tuple[Tensor, Tensor]:
        """``image`` (B, 3, H, W) RGB in [0, 1]; ``masks`` (B, Q, H, W), probabilities and not logits; ``names`` (1 or B, K, E).

        Returns logits (B, Q, K), the cosines times the temperature, and which masks are regions at all (B, Q): of the others,
        that have no pixel above the threshold, the logits are 0.
        """
        regions, valid = self.embed(image, masks)
        if names.shape[-1] != self.dim:
            want = f"this CLIP's embeddings have {self.dim}: encode them with its own text side"
            raise InputError(f"names have width {names.shape[-1]}, {want}")
        names = F.normalize(names.float(), dim=-1).expand(len(image), -1, -1)
        return self.temperature * cosines(regions, names), valid

    def embed(self, image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings (B, Q, E) of the regions, 0 where a mask is none, and which are regions (B, Q)."""
        if masks.ndim != 4 or image.ndim != 4 or masks.shape[-2:] != image.shape[-2:] or len(masks) != len(image):
            got = f"image {tuple(image.shape)}, masks {tuple(masks.shape)}"
            raise ValueError(f"got {got}; wanted (B, 3, H, W) and (B, Q, H, W), of one size")
        inside = masks > self.mask_threshold
        valid = inside.flatten(2).any(-1)
        if self.mode == "pool":
            return self._pool(image, inside), valid
        where = valid.nonzero()
        regions = image.new_zeros(*valid.shape, self.dim, dtype=torch.float32)
        found = []
        boxes = boxes_of(inside[valid], self.expand).tolist()
        for start in range(0, len(boxes), self.chunk):
            some = zip(where[start : start + self.chunk].tolist(), boxes[start : start + self.chunk], strict=True)
            cuts = [(image[b, :, y0:y1, x0:x1], masks[b, q, y0:y1, x0:x1]) for (b, q), (x0, y0, x1, y1) in some]
            found.append(self.embed_crops(*self.prepare(cuts)))
        if found:
            regions[valid] = torch.cat(found)
        return regions, valid

    def prepare(self, cuts: Sequence[Picture]) -> tuple[Tensor, Tensor]:
        """N regions of any sizes, an image and its mask each, as what the CLIP reads: (N, 3, S, S) and (N, S, S) bool.

        Filled, then normalised, then resized, the image bicubic and the mask nearest.
        """
        pixels, regions = [], []
        for image, mask in cuts:
            inside = (mask > self.mask_threshold).float()
            alpha = mask if self.matting else inside
            fill = self.mean if self.fill == "mean" else torch.zeros_like(self.mean)
            filled = (torch.lerp(fill, image.float(), alpha.float()) - self.mean) / self.std
            size = (self.size, self.size)
            pixels.append(F.interpolate(filled[None], size, mode="bicubic", align_corners=False)[0])
            regions.append(F.interpolate(inside[None, None], size, mode="nearest")[0, 0] > 0)
        return torch.stack(pixels), torch.stack(regions)

    def embed_crops(self, pixels: Tensor, regions: Tensor, prompted: bool = True) -> Tensor:
        """What ``prepare`` gave -> unit embeddings (N, E) in float32; without mask prompts if not ``prompted``."""
        if prompted and self.prompts.depth:
            with self.prompts.replacing(self.vision.vision_model, patches_of(regions, self.patch)):
                embedding = self.vision(pixels).image_embeds
        else:
            embedding = self.vision(pixels).image_embeds
        return F.normalize(embedding.float(), dim=-1)

    def dense(self, image: Tensor) -> Tensor:
        """``image`` (B, 3, H, W) in [0, 1] -> (B, E, h, w), an embedding of the CLIP a patch; not normalised."""
        height, width = image.shape[-2:]
        scale = (self.pool_size or self.size) / min(height, width)
        grid = [max(1, round(side * scale / self.patch)) for side in (height, width)]
        size = [cells * self.patch for cells in grid]
        pixels = F.interpolate((image - self.mean) / self.std, size, mode="bicubic", align_corners=False, antialias=True)
        states = self.vision.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
        tokens = self.vision.visual_projection(self.vision.vision_model.post_layernorm(states))  # (B, P, E)
        return tokens.transpose(1, 2).unflatten(2, grid).float()

    def _pool(self, image: Tensor, inside: Tensor) -> Tensor:
        """Unit embeddings (B, Q, E): the dense features, averaged by how much of a patch each mask covers."""
        dense = self.dense(image)
        cover = F.interpolate(inside.float(), dense.shape[-2:], mode="area")
        return F.normalize(torch.einsum("bqhw,behw->bqe", cover, dense), dim=-1)


def cosines(regions: Tensor, names: Tensor) -> Tensor:
    """Of unit embeddings (..., N, E) and (..., K, E) -> (..., N, K) in float32, under autocast as well.

    Names are told apart by cosines times 100, which need more than bfloat16's 8 bits.
    """
    with torch.autocast(regions.device.type, enabled=False):
        return torch.einsum("...ne,...ke->...nk", regions.float(), names.float())


def boxes_of(inside: Tensor, expand: float = 1.0) -> Tensor:
    """Masks (N, H, W) bool, none of them empty -> boxes (N, 4) int x0, y0, x1, y1, the ends excluded.

    Tight, then each side ``expand`` times as long about the same centre, to whole pixels outwards, and clipped to the image.
    """
    ends = []
    for along in (inside.any(1), inside.any(2)):  # columns (N, W), rows (N, H)
        length = along.shape[1]
        first = along.int().argmax(1)
        last = length - along.flip(1).int().argmax(1)
        more = (last - first) * (expand - 1) / 2
        ends.append(((first - more).floor().clamp(min=0), (last + more).ceil().clamp(max=length)))
    (x0, x1), (y0, y1) = ends
    return torch.stack([x0, y0, x1, y1], 1).long()


def ensemble(first: Tensor, region: Tensor, valid: Tensor, weight: float) -> Tensor:
    """Both stages' opinions as one -> (B, Q, K) probabilities, p^(1 - weight) * phat^weight (OVSeg, sec. 3.1 and its code).

    first: (B, Q, K + 1) class logits; p is their softmax, then without "no object". region: (B, Q, K) logits of the second stage;
    phat is their softmax. Further columns of it are other things a region may be: they take their share, and are dropped.
    valid: (B, Q); other queries keep their p^(1 - weight), or, where the CLIP alone decides (``weight`` 1), are dropped.
    What a query is not asked stays 0. Names that the first stage cannot know (``NOT_KNOWN``) would be found by no weight below 1:
    they and "no object" get even shares of its last column, which is all that it finds to be none of the names it knows.
    """
    asked = first[..., :-1] > NOT_ASKED  # (B, Q, K)
    count = asked.shape[-1]
    p = first.softmax(-1)
    unknown = asked & (first[..., :-1] <= NOT_KNOWN)
    if weight > 0:  # else the first stage decides alone
        p = torch.where(unknown, p[..., -1:] / (1 + unknown.sum(-1, keepdim=True)), p[..., :-1])
    p = p[..., :count] * asked
    known = F.pad(asked.any(1, keepdim=True), (0, region.shape[-1] - count), value=True)  # no query is asked padding
    phat = region.masked_fill(~known, NOT_ASKED).softmax(-1)[..., :count]
    if weight == 1:
        return phat * asked * valid[..., None]
    return p ** (1 - weight) * torch.where(valid[..., None], phat**weight, 1.0) * asked


class Regions(NamedTuple):
    """What the second stage needs beside a network's answer: the classifier, images (B, 3, H, W) in [0, 1], the names of the K
    prompts (K, E), and what else a region may be (C, E), for prompts that are asked alone."""

    classifier: RegionClassifier
    image: Tensor
    names: Tensor
    contrast: Tensor
