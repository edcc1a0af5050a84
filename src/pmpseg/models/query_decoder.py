"""Query decoder: learnable queries look at the image, **at the prompts**, and at each other; each ends as a mask and a name.

Sources: masked attention, layer order and deep supervision from Mask2Former (arXiv 2112.01527, sec. 3.2); the cross-attention
between text tokens and query tokens in every layer from PMP (arXiv 2412.10292), whose placement and form are unpublished and
ours (``prompt_place``). Naming by cosine to text embeddings with a learnable "no object" follows OVSeg (arXiv 2210.04150,
sec. 3.1), from features under the mask FC-CLIP (arXiv 2308.02487, sec. 3.3).

Letters: B images, Q queries, K prompts, T tokens a prompt, D decoder width, E text width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmpseg.errors import InputError

from .prompts import Prediction, Prompts

PROMPT_ATTENTION = ("none", "pooled", "tokens", "shuffled")
PROMPT_PLACE = ("first", "after_image")
NAMED_BY = ("query", "mask", "both")
MASK_POOLING = ("soft", "hard")
STRANGERS = 256  # prompts that "shuffled" keeps to read from when it is asked about a single image


class Features(NamedTuple):
    """An encoded image, good for any number of decodes: mask features (B, D, h, w) and levels, coarse first."""

    mask_features: Tensor
    levels: list[Tensor]
    area: Tensor  # (h, w) in [0, 1]: how much of each cell of the mask features is image, and not padding

    def repeat(self, count: int) -> "Features":
        """Each image ``count`` times in a row, for as many decodes in one batch."""
        levels = [x.repeat_interleave(count, 0) for x in self.levels]
        return Features(self.mask_features.repeat_interleave(count, 0), levels, self.area)

    def select(self, image: int) -> "Features":
        """One image of the batch, as a batch of its own."""
        return Features(self.mask_features[image, None], [level[image, None] for level in self.levels], self.area)


class QueryDecoder(nn.Module):
    """``prompt_attention``: ``pooled`` (one embedding a prompt) or ``tokens`` (its words) guide the queries in every layer;
    ``none`` is the blind baseline: the same queries propose without seeing a prompt, which then only picks by similarity.
    ``shuffled`` is a control: ``pooled``'s parameters and layers, but queries read another image's prompts.

    ``prompt_place``: ``first`` in every layer, before the mask is predicted that steers the layer's image attention, so that no
    look at the image is blind; or ``after_image``, where a query knows what it has just seen.

    ``named_by``: the ``query``, as in Mask2Former; the image features under its ``mask``; or ``both``, as in FC-CLIP. A query
    that has read a prompt can repeat it whatever is there; what is under the mask cannot. ``mask_pooling``: the mean weighted
    by the mask's probability, ``soft``, or over the pixels above one half, ``hard``, as FC-CLIP has it.
    """

    strangers: Tensor

    def __init__(
        self,
        dim: int = 256,
        text_dim: int = 512,
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
        if dim < 4 or num_heads < 1 or dim % 4 or dim % num_heads:
            raise InputError(f"dim: got {dim}, want a multiple of 4 and of num_heads ({num_heads})")
        for name, value in (("num_queries", num_queries), ("num_layers", num_layers), ("ffn_dim", ffn_dim)):
            if value < 1:
                raise InputError(f"{name}: got {value}, want 1 or more")
        chosen = {"prompt_attention": (prompt_attention, PROMPT_ATTENTION), "prompt_place": (prompt_place, PROMPT_PLACE)}
        chosen |= {"named_by": (named_by, NAMED_BY), "mask_pooling": (mask_pooling, MASK_POOLING)}
        for name, (choice, known) in chosen.items():
            if choice not in known:
                raise InputError(f"{name}: got {choice!r}, want one of {', '.join(known)}")
        self.prompt_attention, self.named_by, self.mask_pooling = prompt_attention, named_by, mask_pooling
        self.query = nn.Parameter(torch.randn(num_queries, dim) * 0.02)
        self.query_position = nn.Parameter(torch.randn(num_queries, dim) * 0.02)
        self.level_embedding = nn.Parameter(torch.randn(3, dim) * 0.02)
        guided = prompt_attention != "none"
        place = prompt_place if guided else None
        self.layers = nn.ModuleList(DecoderLayer(dim, num_heads, ffn_dim, place) for _ in range(num_layers))
        self.read_prompt = nn.Sequential(nn.Linear(text_dim, dim), nn.LayerNorm(dim)) if guided else None
        # Attended to when no prompt concerns a query; it also keeps the softmax defined when every prompt is padding.
        self.no_prompt = nn.Parameter(torch.zeros(dim)) if guided else None
        if prompt_attention == "shuffled":
            self.register_buffer("strangers", torch.zeros(STRANGERS, text_dim))

        self.norm = nn.LayerNorm(dim)
        self.mask_head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.under_mask = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim)) if named_by != "query" else None
        self.name_head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, text_dim))
        self.no_object = nn.Parameter(torch.randn(text_dim) * text_dim**-0.5)
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))
        # Names pixels directly. Only its loss is used: a backbone learns what things are faster than through matched queries.
        self.pixel_head = nn.Conv2d(dim, text_dim, 1) if pixel_head else None
        self.pixel_bias = nn.Parameter(torch.tensor(-2.0)) if pixel_head else None

    def forward(self, features: Features, prompts: Prompts) -> Prediction:
        batch = len(features.mask_features)
        levels = [level.flatten(2).transpose(1, 2) + self.level_embedding[i] for i, level in enumerate(features.levels)]
        positions = [sine_position(level) for level in features.levels]
        text = self._prompt_tokens(prompts)
        names = torch.cat([prompts.pooled, self.no_object.expand(batch, 1, -1)], 1)  # (B, K + 1, E)
        names = F.normalize(names.float(), dim=-1)

        query = self.query.expand(batch, -1, -1)  # (B, Q, D)
        outputs: list[tuple[Tensor, Tensor]] = []
        layer: DecoderLayer
        for i, layer in enumerate(self.layers):  # type: ignore[assignment]
            at = i % len(levels)
            if layer.prompt_place == "first":  # before the mask that steers the next look
                query = layer.read(query, self.query_position, text)
            outputs.append(self._predict(query, features, names, prompts.valid))
            blocked = self._blocked(outputs[-1][0], features.levels[at].shape[-2:])
            query = layer(query, self.query_position, levels[at], positions[at], blocked, text)
        outputs.append(self._predict(query, features, names, prompts.valid))
        masks, classes = outputs[-1]
        return Prediction(masks, classes, outputs[:-1], self._name_pixels(features.mask_features, names[:, :-1]))

    def _prompt_tokens(self, prompts: Prompts) -> tuple[Tensor, Tensor] | None:
        """What queries read: (B, N, D) and which of it is real (B, N); the last one is "no prompt"."""
        if self.read_prompt is None or self.no_prompt is None:
            return None
        pooled = F.normalize(prompts.pooled, dim=-1)
        if self.prompt_attention in ("pooled", "shuffled"):
            text, valid = pooled, prompts.valid
            if self.prompt_attention == "shuffled":
                text, valid = self._of_another_image(text, valid)
        else:
            # Each word also carries its phrase, or the words of several prompts would be one bag.
            text = (F.normalize(prompts.tokens, dim=-1) + pooled[:, :, None]).flatten(1, 2)
            valid = (prompts.token_valid & prompts.valid[..., None]).flatten(1)
        batch, text = len(text), text * text.shape[-1] ** 0.5  # unit variance, or the projection's bias would drown it
        text = torch.cat([self.read_prompt(text), self.no_prompt.expand(batch, 1, -1)], 1)
        return text, F.pad(valid, (0, 1), value=True)

    def _of_another_image(self, text: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """In training the prompts of the batch's image before; otherwise, as many as are asked, from the last training batch."""
        if self.training:
            if len(text) < 2:
                raise InputError("prompt_attention 'shuffled' reads another image's prompts: it needs a batch_size of 2 or more")
            with torch.no_grad():
                real = text[valid].to(self.strangers.dtype)
                self.strangers.copy_(real[torch.arange(STRANGERS, device=text.device) % len(real)])
            return text.roll(1, 0), valid.roll(1, 0)
        any_of_them = (torch.arange(valid.numel(), device=text.device) * 97 + 13) % STRANGERS
        return self.strangers[any_of_them].to(text.dtype).view_as(text), valid

    def _predict(self, query: Tensor, features: Features, names: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        query = self.norm(query)
        mask_logits = torch.einsum("bqd,bdhw->bqhw", self.mask_head(query), features.mask_features)
        embedding = F.normalize(self.name_head(self._evidence(query, mask_logits, features)).float(), dim=-1)  # (B, Q, E)
        with torch.autocast(query.device.type, enabled=False):  # cosines times 100 need more than 8 bits
            scale = self.log_scale.float().clamp(max=math.log(100.0)).exp()
            class_logits = scale * torch.einsum("bqe,bke->bqk", embedding, names)  # (B, Q, K + 1)
        return mask_logits, class_logits.masked_fill(~F.pad(valid, (0, 1), value=True)[:, None], -1e4)

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

    def _name_pixels(self, mask_features: Tensor, names: Tensor) -> Tensor | None:
        """(B, K, h, w) logits in training; nobody reads them afterwards."""
        if self.pixel_head is None or self.pixel_bias is None or not self.training:
            return None
        return torch.einsum("bkc,bchw->bkhw", names, self.pixel_head(mask_features)) + self.pixel_bias

    @staticmethod
    def _blocked(mask_logits: Tensor, size: torch.Size) -> Tensor:
        """Where a query may not look next: outside its own mask, or nowhere if that mask is empty. (B, Q, h * w) bool."""
        masks = F.interpolate(mask_logits.detach(), size=size, mode="bilinear", align_corners=False).flatten(2)
        blocked = masks < 0  # sigmoid < 0.5
        return blocked & ~blocked.all(-1, keepdim=True)


class DecoderLayer(nn.Module):
    """(Prompt attention ->) masked image attention (-> prompt attention) -> self-attention -> FFN, each with a residual and a
    norm after it."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, prompt_place: str | None) -> None:
        super().__init__()
        self.prompt_place, guided = prompt_place, prompt_place is not None
        self.image_attention, self.image_norm = Attention(dim, num_heads), nn.LayerNorm(dim)
        self.prompt_attention = Attention(dim, num_heads) if guided else None
        self.prompt_norm = nn.LayerNorm(dim) if guided else nn.Identity()
        self.self_attention, self.self_norm = Attention(dim, num_heads), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, dim))
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(
        self,
        query: Tensor,
        query_position: Tensor,
        image: Tensor,
        image_position: Tensor,
        blocked: Tensor,
        text: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        seen = self.image_attention(query + query_position, image + image_position, image, ~blocked[:, None])
        query = self.image_norm(query + seen)
        if self.prompt_place == "after_image":
            query = self.read(query, query_position, text)
        at = query + query_position
        query = self.self_norm(query + self.self_attention(at, at, query))
        return self.ffn_norm(query + self.ffn(query))

    def read(self, query: Tensor, query_position: Tensor, text: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.prompt_attention is None or text is None:
            return query
        tokens, valid = text
        return self.prompt_norm(query + self.prompt_attention(query + query_position, tokens, tokens, valid[:, None, None]))


class Attention(nn.Module):
    """Multi-head attention; ``allowed`` is bool, broadcastable to (B, heads, queries, keys), True where a query may look."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        for layer in (self.q, self.k, self.v):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        q, k, v = (self._heads(f(x)) for f, x in ((self.q, query), (self.k, key), (self.v, value)))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)  # (B, heads, Q, D / heads)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def sine_position(level: Tensor, temperature: float = 10000.0) -> Tensor:
    """DETR's sine position embedding for a map (B, D, h, w) -> (h * w, D); D is a multiple of 4."""
    dim, height, width = level.shape[1:]
    half = dim // 2
    steps = torch.arange(half, device=level.device, dtype=torch.float32)
    period = temperature ** (2 * (steps // 2) / half)

    def wave(length: int) -> Tensor:
        at = torch.arange(1, length + 1, device=level.device, dtype=torch.float32) / (length + 1e-6) * 2 * math.pi
        angle = at[:, None] / period
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], 2).flatten(1)  # (length, D / 2)

    y, x = wave(height), wave(width)
    grid = torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], -1)
    return grid.flatten(0, 1).to(level.dtype)
