"""Query decoder: learnable queries look at the image, **at the prompts**, and at each other; each ends as a mask and a name.

Sources: ``masked`` attention, layer order and deep supervision from Mask2Former (arXiv 2112.01527, sec. 3.2), ``plain`` from
MaskFormer (arXiv 2107.06278, sec. 3.3), which is DETR's; the cross-attention between text tokens and query tokens from PMP
(arXiv 2412.10292), see ``prompt_attention``. Naming by cosine to text embeddings with a learnable "no object" follows OVSeg
(arXiv 2210.04150, sec. 3.1), from features under the mask FC-CLIP (arXiv 2308.02487, sec. 3.3).

Letters: B images, Q queries, K prompts, D decoder width, E text width.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .attention import Attention, flatten, sine_position
from .prompt_attention import PromptAttention, PromptTokens, Text
from .prompts import NOT_ASKED, MaskFactors, Prediction, Prompts

CHOICES = {
    "decoder": ("masked", "plain"),
    "prompt_attention": ("none", "pooled", "tokens", "shuffled"),
    "prompt_place": ("first", "after_image", "after_self"),
    "prompt_direction": ("read", "both"),
    "prompt_gate": ("none", "zero"),
    "prompt_queries": ("shared", "repeated"),
    "named_by": ("query", "mask", "both"),
    "mask_pooling": ("soft", "hard"),
}

LARGEST_SCALE = 100.0  # CLIP's, of cosines


class Features(NamedTuple):
    """An encoded image, good for any number of decodes: mask features (B, D, h, w) and levels, coarse first.

    ``guides`` are the mask features at the levels' sizes: what a mask is at a level is linear in them.
    """

    mask_features: Tensor
    levels: list[Tensor]
    guides: list[Tensor]
    area: Tensor  # (h, w) in [0, 1]: how much of each cell of the mask features is image, and not padding

    def repeat(self, count: int) -> "Features":
        """Each image ``count`` times in a row, for as many decodes in one batch."""
        return self._each(lambda x: x.repeat_interleave(count, 0))

    def select(self, image: int) -> "Features":
        """One image of the batch, as a batch of its own."""
        return self._each(lambda x: x[image, None])

    def _each(self, f) -> "Features":
        return Features(f(self.mask_features), [f(x) for x in self.levels], [f(x) for x in self.guides], self.area)


class QueryDecoder(nn.Module):
    """``decoder``: ``masked``, where a query looks only inside its mask so far, level after level; or ``plain``, where it looks
    everywhere on one level, and queries start as zeros.

    ``prompt_attention``: ``pooled`` (one embedding a prompt) or ``tokens`` (its words) guide the queries; ``none`` is the blind
    baseline: the same queries propose without seeing a prompt, which then only picks by similarity. ``shuffled`` is a control:
    ``pooled``'s parameters and layers, but queries read another image's prompts.

    ``prompt_place``: ``first`` in a layer, before the mask is predicted that steers the layer's image attention, so that no
    look at the image is blind; or ``after_image``, where a query knows what it has just seen; or ``after_self``.
    ``prompt_direction``: queries ``read`` prompts; in ``both`` prompts read queries as well, for the next layers.
    ``prompt_gate``: ``zero`` starts exactly as the decoder without prompts. ``prompt_layers``: which of the layers; None for all.
    ``prompt_queries``: ``shared`` by all prompts, or ``repeated``: each prompt is decoded alone, with its own copy of them; time
    and memory grow with the number of prompts, padding included.

    ``named_by``: the ``query``, as in Mask2Former; the image features under its ``mask``; or ``both``, as in FC-CLIP. A query
    that has read a prompt can repeat it whatever is there; what is under the mask cannot. ``mask_pooling``: the mean weighted
    by the mask's probability, ``soft``, or over the pixels above one half, ``hard``, as FC-CLIP has it.

    A two-layer MLP makes an embedding of that, ``name_hidden`` wide between (None: ``dim``; OVSeg has 1024). ``name_scale``: what
    its cosines are multiplied by, fixed (OVSeg has 100), or None: learned, from 20 to 100 at most.

    ``dropout``: of attentions and activations in training, where DETR has it; MaskFormer has 0.1, Mask2Former none.

    ``num_classes``: of a closed list, named by a linear layer where no prompts are given; None for no such list.
    """

    def __init__(
        self,
        dim: int = 256,
        text_dim: int = 512,
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
        super().__init__()
        check_sizes(dim, num_heads, num_queries=num_queries, num_layers=num_layers, ffn_dim=ffn_dim)
        given = locals()
        if not 0 <= dropout < 1:
            raise InputError(f"dropout: got {dropout}, want 0 to below 1")
        if name_hidden is not None and name_hidden < 1:
            raise InputError(f"name_hidden: got {name_hidden}, want 1 or more, or null for dim ({dim})")
        if name_scale is not None and not 0 < name_scale <= LARGEST_SCALE:
            raise InputError(f"name_scale: got {name_scale}, want above 0 to {LARGEST_SCALE:g}, or null to learn it")
        for name, known in CHOICES.items():
            if given[name] not in known:
                raise InputError(f"{name}: got {given[name]!r}, want one of {', '.join(known)}")
        if prompt_attention == "shuffled" and prompt_queries == "repeated":
            raise InputError("prompt_attention 'shuffled' reads another image's prompts: it wants prompt_queries 'shared'")
        self.masked, self.named_by, self.mask_pooling = decoder == "masked", named_by, mask_pooling
        self.repeated = prompt_queries == "repeated" and prompt_attention != "none"
        reading = _reading(prompt_layers, num_layers) if prompt_attention != "none" else []

        self.query = nn.Parameter(torch.randn(num_queries, dim) * 0.02) if self.masked else None
        self.query_position = nn.Parameter(torch.randn(num_queries, dim) * 0.02)
        self.level_embedding = nn.Parameter(torch.randn(3, dim) * 0.02) if self.masked else None
        self.prompt_tokens = PromptTokens(prompt_attention, text_dim, dim) if reading else None
        layers = []
        for i in range(num_layers):
            # What prompts read in the last layer that reads them nobody would read.
            writes = prompt_direction == "both" and i in reading[:-1]
            guide = PromptAttention(dim, num_heads, prompt_gate == "zero", writes) if i in reading else None
            layers.append(DecoderLayer(dim, num_heads, ffn_dim, self.masked, guide, prompt_place, dropout))
        self.layers = nn.ModuleList(layers)

        self.norm = nn.LayerNorm(dim)
        self.mask_head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.under_mask = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim)) if named_by != "query" else None
        hidden = name_hidden or dim
        self.name_head = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, text_dim))
        self.no_object = nn.Parameter(torch.randn(text_dim) * text_dim**-0.5)
        self.log_scale = nn.Parameter(torch.tensor(math.log(name_scale or 20.0)), requires_grad=name_scale is None)
        # Not trained with prompts, which is what this package trains: every trainable parameter must reach the loss.
        self.class_head = nn.Linear(dim, num_classes + 1).requires_grad_(False) if num_classes else None
        # Names pixels directly. Only its loss is used: a backbone learns what things are faster than through matched queries.
        self.pixel_head = nn.Conv2d(dim, text_dim, 1) if pixel_head else None
        self.pixel_bias = nn.Parameter(torch.tensor(-2.0)) if pixel_head else None

    def forward(
        self, features: Features, prompts: Prompts | None, aux: bool | None = None, name_pixels: bool = True
    ) -> Prediction:
        """``prompts`` None: class logits over the closed list, nothing guides. ``aux``: also answer for every earlier layer, by
        default in training only, which is where they are needed. ``name_pixels``: with the pixel head, if there is one.
        """
        if prompts is not None and self.repeated and prompts.valid.shape[1] > 1:
            return self._decode_repeated(features, prompts, aux)
        batch, aux = len(features.mask_features), self.training if aux is None else aux
        levels = [flatten(level) for level in features.levels]
        if self.level_embedding is not None:
            levels = [level + e for level, e in zip(levels, self.level_embedding, strict=True)]
        positions = [sine_position(level) for level in features.levels]
        text = None if prompts is None or self.prompt_tokens is None else self.prompt_tokens(prompts)
        names = self._names(prompts, batch)

        start = torch.zeros_like(self.query_position) if self.query is None else self.query
        query, position = start.expand(batch, -1, -1), self.query_position  # (B, Q, D)
        outputs: list[tuple[Tensor, Tensor, Tensor]] = []
        layer: DecoderLayer
        for i, layer in enumerate(self.layers):  # type: ignore[assignment]
            at, blocked = i % len(levels), None
            query, text = layer.read_at("first", query, position, text)  # before the mask that steers the next look
            if aux and (i > 0 or self.masked):
                outputs.append(self._predict(query, features, prompts, names))
            if self.masked:
                blocked = self._blocked(query, features.guides[at])
            query, text = layer(query, position, levels[at], positions[at], blocked, text)
        outputs.append(self._predict(query, features, prompts, names))
        (*earlier, (masks, classes)), embeddings = [o[:2] for o in outputs], [o[2] for o in outputs]
        factors = MaskFactors(torch.stack(embeddings), features.mask_features)
        pixels = self._name_pixels(features.mask_features, names) if name_pixels else None
        return Prediction(masks, classes, earlier, pixels, factors)

    def _decode_repeated(self, features: Features, prompts: Prompts, aux: bool | None) -> Prediction:
        """Every prompt alone, with its own copy of the queries: (B, K * Q) queries, each of which is asked one prompt."""
        batch, count = prompts.valid.shape
        single = self(features.repeat(count), prompts.one_by_one(), aux, name_pixels=False)
        own = torch.eye(count, dtype=torch.bool, device=prompts.valid.device)[:, None]  # (K, 1, K)

        def merge(masks: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
            classes = classes.unflatten(0, (batch, count))  # (B, K, Q, 2)
            asked = torch.where(own, classes[..., :1], NOT_ASKED)
            classes = torch.cat([asked, classes[..., 1:]], -1).flatten(1, 2)  # (B, K * Q, K + 1)
            return masks.unflatten(0, (batch, count)).flatten(1, 2), classes

        assert single.factors is not None
        embedding = single.factors.embedding.unflatten(1, (batch, count)).flatten(2, 3)  # (L, B, K * Q, D)
        masks, classes = merge(single.mask_logits, single.class_logits)
        pixels = self._name_pixels(features.mask_features, self._names(prompts, batch))
        factors = MaskFactors(embedding, features.mask_features)
        return Prediction(masks, classes, [merge(*layer) for layer in single.aux], pixels, factors)

    def _names(self, prompts: Prompts | None, batch: int) -> Tensor | None:
        """What queries may be called: the prompts and "no object", (B, K + 1, E), of length 1."""
        if prompts is None:
            if self.class_head is None:
                raise InputError("prompts: got None, but this network has no list of classes of its own: give prompts")
            return None
        names = torch.cat([prompts.pooled, self.no_object.expand(batch, 1, -1)], 1)
        return F.normalize(names.float(), dim=-1)

    def _predict(
        self, query: Tensor, features: Features, prompts: Prompts | None, names: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask logits (B, Q, h, w), class logits (B, Q, K + 1), and what the masks are made of (B, Q, D)."""
        query = self.norm(query)
        mask_embedding = self.mask_head(query)
        mask_logits = torch.einsum("bqd,bdhw->bqhw", mask_embedding, features.mask_features)
        if prompts is None or names is None:
            assert self.class_head is not None
            return mask_logits, self.class_head(query), mask_embedding
        embedding = F.normalize(self.name_head(self._evidence(query, mask_logits, features)).float(), dim=-1)  # (B, Q, E)
        with torch.autocast(query.device.type, enabled=False):  # cosines times 100 need more than 8 bits
            scale = self.log_scale.float().clamp(max=math.log(LARGEST_SCALE)).exp()
            class_logits = scale * torch.einsum("bqe,bke->bqk", embedding, names)  # (B, Q, K + 1)
        class_logits = class_logits.masked_fill(~F.pad(prompts.valid, (0, 1), value=True)[:, None], NOT_ASKED)
        return mask_logits, class_logits, mask_embedding

    def _evidence(self, query: Tensor, mask_logits: Tensor, features: Features) -> Tensor:
        """What a query is named by, (B, Q, D): itself, the mean features under its mask, or their sum."""
        if self.under_mask is None:
            return query
        inside = mask_logits.detach().float().sigmoid() * features.area
        if self.mask_pooling == "hard":
            above = (inside > 0.5).to(inside.dtype)
            inside = torch.where(above.flatten(2).any(-1)[..., None, None], above, inside)
        # Divided before the sum, which would overflow half precision.
        weight = inside / inside.flatten(2).sum(-1)[..., None, None].clamp(min=1e-3)
        seen = self.under_mask(torch.einsum("bqhw,bdhw->bqd", weight.to(features.mask_features.dtype), features.mask_features))
        return seen if self.named_by == "mask" else query + seen

    def _name_pixels(self, mask_features: Tensor, names: Tensor | None) -> Tensor | None:
        """(B, K, h, w) logits in training; nobody reads them afterwards."""
        if self.pixel_head is None or self.pixel_bias is None or names is None or not self.training:
            return None
        return torch.einsum("bkc,bchw->bkhw", names[:, :-1], self.pixel_head(mask_features)) + self.pixel_bias

    @torch.no_grad()
    def _blocked(self, query: Tensor, guide: Tensor) -> Tensor:
        """Where a query may not look next: outside its own mask, or nowhere if that mask is empty. (B, Q, h * w) bool.

        The mask at the level's size, without making it at its own size first.
        """
        masks = self.mask_head(self.norm(query)) @ guide.flatten(2)
        blocked = masks < 0  # sigmoid < 0.5
        return blocked & ~blocked.all(-1, keepdim=True)


class DecoderLayer(nn.Module):
    """Image attention and self-attention (in the other order if not ``masked``), then FFN, each with a residual and a norm after
    it; the prompts are read at ``prompt_place``, if there is a ``guide``. ``dropout`` of attentions, of the FFN's hidden layer,
    and of what is added to the residual.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        masked: bool,
        guide: PromptAttention | None,
        prompt_place: str,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.order = ("image", "self") if masked else ("self", "image")
        self.guide, self.prompt_place = guide, prompt_place
        self.image_attention, self.image_norm = Attention(dim, num_heads, dropout), nn.LayerNorm(dim)
        self.self_attention, self.self_norm = Attention(dim, num_heads, dropout), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, dim))
        self.ffn_norm = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        query: Tensor,
        query_position: Tensor,
        image: Tensor,
        image_position: Tensor,
        blocked: Tensor | None,
        text: Text | None,
    ) -> tuple[Tensor, Text | None]:
        for part in self.order:
            at = query + query_position
            if part == "image":
                allowed = None if blocked is None else ~blocked[:, None]
                query = self.image_norm(query + self.drop(self.image_attention(at, image + image_position, image, allowed)))
            else:
                query = self.self_norm(query + self.drop(self.self_attention(at, at, query)))
            query, text = self.read_at(f"after_{part}", query, query_position, text)
        hidden = self.drop(self.ffn[:2](query))
        return self.ffn_norm(query + self.drop(self.ffn[2](hidden))), text

    def read_at(self, place: str, query: Tensor, query_position: Tensor, text: Text | None) -> tuple[Tensor, Text | None]:
        """Queries and text after they have read each other, if ``place`` is where they do."""
        if self.guide is None or text is None or place != self.prompt_place:
            return query, text
        return self.guide(query, query_position, text)


def check_sizes(dim: int, num_heads: int, **counts: int) -> None:
    """Raises InputError for a width that does not fit the heads, or a count (by its argument's name) below 1."""
    if dim < 4 or num_heads < 1 or dim % 4 or dim % num_heads:
        raise InputError(f"dim: got {dim}, want a multiple of 4 and of num_heads ({num_heads})")
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"{name}: got {value}, want 1 or more")


def _reading(prompt_layers: Sequence[int] | None, num_layers: int) -> list[int]:
    """The layers that read prompts, from 0, in rising order."""
    layers = list(range(num_layers)) if prompt_layers is None else sorted(set(prompt_layers))
    if not layers or layers[0] < 0 or layers[-1] >= num_layers:
        raise InputError(f"prompt_layers: got {prompt_layers}, want some of 0 to {num_layers - 1}, or null for all")
    return layers
