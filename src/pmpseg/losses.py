"""Set prediction loss: which query answers which prompt, and how well.

Source: Mask2Former (arXiv 2112.01527, sec. 3.3 and its criterion): Hungarian matching on classification, mask BCE and dice, all
masks judged at sampled points, the same loss on every layer. MaskFormer's (arXiv 2107.06278, sec. 4.1) is the same with a focal
loss for the BCE and all pixels for the points. Ours: a target is a *prompt that is present* (a class of the list or a phrase), or
a segment of one, so masks may overlap, and pixels marked as ignored count nowhere.

Letters: B images, Q queries, K prompts, M targets an image, N matched pairs, P points.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InputError
from .models.prompts import NOT_ASKED, MaskFactors, Prediction
from .point_losses import MASK_LOSSES, at_pixels, dice_loss, sample


class SetLoss(nn.Module):
    """Args are Mask2Former's weights; ``num_points`` per mask, of which ``importance`` lie where the mask is unsure; None for all
    pixels, as MaskFormer has it: those of the targets, and in the matching those of the mask logits. ``mask_loss``: binary
    cross-entropy, or MaskFormer's ``focal`` form of it.
    """

    def __init__(
        self,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        num_points: int | None = 12544,
        oversample: float = 3.0,
        importance: float = 0.75,
        pixel_weight: float = 0.0,
        mask_loss: str = "bce",
    ) -> None:
        super().__init__()
        if mask_loss not in MASK_LOSSES:
            raise InputError(f"mask_loss: got {mask_loss!r}, want one of {', '.join(MASK_LOSSES)}")
        self.each_point, self.pair_terms = MASK_LOSSES[mask_loss]
        self.weights = {"class": class_weight, "mask": mask_weight, "dice": dice_weight, "pixel": pixel_weight}
        self.no_object_weight = no_object_weight
        self.num_points, self.oversample, self.importance = num_points, oversample, importance

    def forward(
        self,
        prediction: Prediction,
        masks: Tensor,
        present: Tensor,
        counted: Tensor | None = None,
        valid: Tensor | None = None,
        prompt: Tensor | None = None,
        prompt_masks: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The weighted parts, summed over layers as in Mask2Former, and their sum ``loss``: scalars.

        Args:
            prediction: logits of all layers.
            masks: (B, M, H, W) bool, the pixels of each target, on the same area as the mask logits.
            present: (B, M) bool, which targets are to be found; the others are padding, or prompts that must go unnamed.
            counted: (B, H, W) bool, pixels with a known answer; None counts all.
            valid: (B, K) bool, which prompts are real, for ``prediction.pixel_logits``; None counts all. That loss, too, is
                divided by the number of ``present`` targets.
            prompt: (B, M) int64, the prompt of each target, which several may share; None: the targets are the K prompts.
            prompt_masks: (B, K, H, W) bool, the pixels of each prompt, for ``pixel_logits``; None where ``masks`` are those.
        """
        if masks.shape[:2] != present.shape or (prompt is not None and prompt.shape != present.shape):
            of_prompt = "" if prompt is None else f" and prompt {tuple(prompt.shape)}"
            got = f"{tuple(masks.shape)} for present {tuple(present.shape)}{of_prompt}"
            raise ValueError(f"masks: got {got}, want the same (B, M)")
        if prediction.pixel_logits is not None and prompt is not None and prompt_masks is None:
            raise ValueError("prompt_masks: got None with pixel_logits and targets of their own, want (B, K, H, W)")
        with torch.autocast(masks.device.type, enabled=False):  # in half precision other pairs would be matched
            if prompt is None:
                prompt = torch.arange(present.shape[1], device=present.device).expand_as(present)
            prompt_masks = masks if prompt_masks is None else prompt_masks
            return self._forward(prediction, masks, present, counted, valid, prompt, prompt_masks)

    def _forward(
        self,
        prediction: Prediction,
        masks: Tensor,
        present: Tensor,
        counted: Tensor | None,
        valid: Tensor | None,
        prompt: Tensor,
        prompt_masks: Tensor,
    ) -> dict[str, Tensor]:
        batch, num_prompts = len(present), prediction.class_logits.shape[-1] - 1
        layers = [*prediction.aux, (prediction.mask_logits, prediction.class_logits)]
        mask_logits: Masks | Products
        if prediction.factors is not None:
            mask_logits = Products(prediction.factors)
        else:
            mask_logits = Masks(torch.cat([m for m, _ in layers]).float())
        class_logits = torch.cat([c for _, c in layers]).float()  # (L * B, Q, K + 1)
        known = torch.ones_like(masks[:, :1], dtype=torch.float32) if counted is None else counted[:, None].float()
        row, query, target = self.match(mask_logits, class_logits, masks, present, known, prompt)
        image = row % batch

        name = torch.full(class_logits.shape[:2], num_prompts, device=masks.device)
        name[row, query] = prompt[image, target]
        weight = torch.where(name == num_prompts, self.no_object_weight, 1.0)
        named = F.cross_entropy(class_logits.flatten(0, 1), name.flatten(), reduction="none") * weight.flatten()
        # Normalisers are means over all processes: the gradient must not depend on how the batch was shared out.
        total_weight, total_masks = mean_over_ranks(torch.stack([weight.sum(), present.sum().float()]))
        parts = {"class": named.sum() / total_weight * len(layers)}

        chosen = mask_logits.of(row, query)  # (N, 1, h, w)
        if self.num_points is None:  # nothing is in between: a truth is 0 or 1
            logits, inside = at_pixels(chosen, masks.shape[-2:])[:, 0], known[image, 0].flatten(1)
            truth = within(masks[image, target], known[image, 0]).flatten(1)
        else:
            points = self.sample_points(chosen)
            logits = sample(chosen, points)[:, 0]
            truth, inside = torch.empty_like(logits), torch.empty_like(logits)
            for layer in range(len(layers)):  # one at a time, since whole masks are large
                at = row // batch == layer
                there = known[image[at]]
                inside[at] = sample(there, points[at])[:, 0]
                truth[at] = sample(within(masks[image[at], target[at], None], there), points[at])[:, 0]
            truth = truth / inside.clamp(min=1e-6)  # the share of what is known
        each = self.each_point(logits, truth) * inside
        parts["mask"] = (each.sum(1) / inside.sum(1).clamp(min=1)).sum() / total_masks.clamp(min=1)
        parts["dice"] = dice_loss(logits, truth, inside).sum() / total_masks.clamp(min=1)
        if prediction.pixel_logits is not None:
            real = torch.ones_like(prompt_masks[..., 0, 0]) if valid is None else valid
            pixels = pixel_loss(prediction.pixel_logits.float(), within(prompt_masks, known), known, real)
            parts["pixel"] = pixels / total_masks.clamp(min=1)
        parts = {name: value * self.weights[name] for name, value in parts.items()}
        return {"loss": sum(parts.values()), **parts}

    @torch.no_grad()
    def match(
        self,
        mask_logits: "Masks | Products",
        class_logits: Tensor,
        masks: Tensor,
        present: Tensor,
        known: Tensor,
        prompt: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The cheapest one-to-one pairs in every row of the (L * B) batch -> row, query, target, each (N,)."""
        rows, batch = len(class_logits), len(masks)
        # Of a long list few are present: those come first, and only they are looked at.
        most = max(1, int(present.sum(1).max()))
        index = present.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, M)
        masks = within(masks[torch.arange(batch, device=masks.device)[:, None], index], known)
        names = index if prompt is None else prompt.gather(1, index)
        every = names.repeat(rows // batch, 1)[:, None].expand(-1, class_logits.shape[1], -1)  # (L * B, Q, M)
        named = -class_logits.softmax(-1).gather(2, every)
        # The same points for all masks of an image; more would not change who is matched.
        points = None if self.num_points is None else torch.rand(batch, self.num_points, 2, device=masks.device)
        truth, inside = (at_pixels(x, mask_logits.size) if points is None else sample(x, points) for x in (masks, known))
        logits = mask_logits.at(points)  # (L * B, Q, P), of truth (B, M, P) and inside (B, 1, P)
        truth, inside = (x.repeat(rows // batch, 1, 1) for x in (truth, inside))
        count = inside.sum(-1, keepdim=True).clamp(min=1)
        # The mask loss of all pairs at once: outside(x) + difference(x) * y summed over points.
        outside, difference = self.pair_terms(logits)
        each = ((outside * inside).sum(-1)[..., None] + difference @ truth.mT) / count
        prob = logits.sigmoid() * inside
        dice = 1 - (2 * prob @ truth.mT + 1) / (prob.sum(-1)[..., None] + truth.sum(-1)[:, None] + 1)
        cost = self.weights["class"] * named + self.weights["mask"] * each + self.weights["dice"] * dice  # (L * B, Q, M)
        # A query that is not asked a prompt, where each has queries of its own, cannot answer it.
        cost = cost.masked_fill(class_logits.gather(2, every) <= NOT_ASKED, 1e6)
        cost = torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6).cpu()
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        counts, index = present.sum(1).tolist(), index.cpu()
        for at in range(rows):
            q, k = linear_sum_assignment(cost[at, :, : counts[at % batch]].numpy())
            found.append((torch.full((len(q),), at), torch.from_numpy(q), index[at % batch, torch.from_numpy(k)]))
        row, query, target = (torch.cat(x).to(masks.device) for x in zip(*found, strict=True))
        return row, query, target

    @torch.no_grad()
    def sample_points(self, logits: Tensor) -> Tensor:
        """Points for each of N masks (N, 1, h, w) -> (N, P, 2) in [0, 1]: mostly the least sure of many, the rest anywhere."""
        assert self.num_points is not None
        count = len(logits)
        many = torch.rand(count, int(self.num_points * self.oversample), 2, device=logits.device)
        unsure = int(self.num_points * self.importance)
        best = sample(logits, many)[:, 0].abs().topk(unsure, 1, largest=False).indices if count else many[:, :unsure, 0].long()
        anywhere = torch.rand(count, self.num_points - unsure, 2, device=logits.device)
        return torch.cat([many.gather(1, best[..., None].expand(-1, -1, 2)), anywhere], 1)


class Masks:
    """Mask logits (L * B, Q, h, w) as they are."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.size = logits, logits.shape[-2:]

    def at(self, points: Tensor | None) -> Tensor:
        """At points (B, P, 2) of each image, or at all pixels -> (L * B, Q, P)."""
        if points is None:
            return self.logits.flatten(2)
        return sample(self.logits, points.repeat(len(self.logits) // len(points), 1, 1))

    def of(self, row: Tensor, query: Tensor) -> Tensor:
        """The whole masks of N queries in N rows -> (N, 1, h, w)."""
        return self.logits[row, query, None]


class Products:
    """The same from their factors: bilinear values are linear, so that features are sampled once instead of every mask, and the
    only whole masks that are made, and have a gradient, are those that are matched.
    """

    def __init__(self, factors: MaskFactors) -> None:
        self.embedding, self.features = (x.float() for x in factors)
        self.size = self.features.shape[-2:]

    def at(self, points: Tensor | None) -> Tensor:
        features = self.features.flatten(2) if points is None else sample(self.features, points)
        return (self.embedding @ features).flatten(0, 1)

    def of(self, row: Tensor, query: Tensor) -> Tensor:
        image = row % len(self.features)
        order = image.argsort(stable=True)
        embedding = self.embedding.flatten(0, 1)[row, query][order].split(image.bincount(minlength=len(self.features)).tolist())
        masks = torch.cat([torch.einsum("nd,dhw->nhw", *pair) for pair in zip(embedding, self.features, strict=True)])
        return masks[order.argsort()][:, None]


def within(masks: Tensor, known: Tensor) -> Tensor:
    """Masks without what is not known: bilinear points beside it would see it. Bool (N, K, H, W) and (N, 1, H, W) -> float."""
    return masks.to(known.dtype) * known


def pixel_loss(logits: Tensor, masks: Tensor, known: Tensor, valid: Tensor) -> Tensor:
    """BCE of pixels named directly, present and absent prompts alike: means over known pixels, summed over prompts.

    logits (B, K, h, w), masks (B, K, H, W) within known (B, 1, H, W) in [0, 1], valid (B, K) bool.
    """
    truth, inside = (F.interpolate(x, logits.shape[-2:], mode="area") for x in (masks, known))
    truth = truth / inside.clamp(min=1e-6)
    bce = (F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * inside).flatten(2).sum(-1)
    return (bce / inside.flatten(2).sum(-1).clamp(min=1) * valid).sum()


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean over all processes; the value itself when there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value
