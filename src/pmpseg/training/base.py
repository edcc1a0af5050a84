"""What modules share that are validated by class list and by phrase: evaluator, logs, and checkpoints without frozen weights."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F

from pmpseg.data.base import IGNORE
from pmpseg.errors import InputError
from pmpseg.evaluation import Evaluator, numbers
from pmpseg.models.clip import TextEncoder
from pmpseg.models.prompts import Prompts
from pmpseg.report import table
from pmpseg.supports import Showing, embed_supports, mix

# Parameters that are tables of embeddings, or an embedding, by a part of their names.
EMBEDDINGS = ("query_decoder.query", "level_embedding", "relative_position_bias_table", "pos_embed", "cls_token", "reg_token")


class EvaluatedModule(LightningModule):
    """A subclass sets ``text`` and ``network`` and has a hyperparameter ``threshold``. The classes are those of the data.

    One that can learn from examples has the hyperparameters ``text_weight``, ``visual_prompt``, ``after_normalisation`` and
    ``prompt_size``, and an ``embedder``.
    """

    text: TextEncoder
    network: Any
    #: The name or path of what a frozen encoder was started from, which ``Segmenter.save`` can name in its place.
    backbone_source: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints leave frozen weights out: they come from where they are named

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.evaluator = Evaluator.of_data(data, self.hparams["threshold"])
        data.supports_in_evaluation = False  # validation asks by text
        if self.embedder is not None:
            self.show_as(data.image_size)

    @property
    def embedder(self) -> Any:
        """What embeds examples, with ``embed`` and ``mean``; None if the network learns from words only."""
        return None

    def show_as(self, image_size: int) -> None:
        """How examples are shown, as the hyperparameters say; ``image_size`` is the data's."""
        p = self.hparams
        mean = self.embedder.mean.flatten().tolist() if p["after_normalisation"] else None
        self.showing = Showing(p["prompt_size"] or image_size, p["visual_prompt"], mean)

    def prompts_of(self, batch: dict[str, Any]) -> Prompts:
        """A training batch's prompts: its texts, mixed with its examples in random shares within ``text_weight``."""
        prompts = self.text.encode_batch(batch["prompts"])
        if "support_image" not in batch or self.embedder is None:
            return prompts
        supports = (batch[f"support_{key}"] for key in ("image", "mask", "valid"))
        shown, has = embed_supports(self.embedder.embed, self.showing, *supports)
        low, high = self.hparams["text_weight"]
        weight = low + (high - low) * torch.rand(has.shape, device=has.device)
        return mix(prompts, shown, has, weight, self.text.normalize)

    @property
    def monitor(self) -> str:
        """What the best checkpoint is chosen by; of data that has phrases only no threshold has a part in it."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return "val/miou" if getattr(data, "class_list", True) else "val/phrase_ap"

    def from_elsewhere(self, name: str) -> bool:
        """Whether a frozen parameter comes from a file that the run's settings name."""
        return True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.text.forget()  # as a run that is continued from here does
        left_out = {name for name, p in self.named_parameters() if not p.requires_grad and self.from_elsewhere(name)}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k not in left_out and not k.startswith("text.")}

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        self.evaluator.update(self.network, self.text, batch)

    def on_validation_epoch_end(self) -> None:
        self.scores = self.evaluator.compute()
        self.evaluator.reset()
        self.log_dict({f"val/{name}": value for name, value in numbers(self.scores).items()})
        if self.trainer.is_global_zero and not self.trainer.sanity_checking:
            self.print(f"\nstep {self.global_step}\n{table(self.scores, self.evaluator.vocabulary)}\n")


def check_prompting(text_weight: tuple[float, float], visual_prompt: str, prompt_size: int | None) -> None:
    """Raises InputError for settings of examples that would fail in the first step only."""
    Showing(1 if prompt_size is None else prompt_size, visual_prompt)
    low, high = text_weight
    if not 0 <= low <= high <= 1:
        raise InputError(f"text_weight: got {list(text_weight)}, want [low, high] within 0 to 1, the text's share")


def prompt_targets(batch: dict[str, Any]) -> Tensor:
    """The pixels of every prompt of a batch, (B, K, H, W) bool: given as masks, or made from labels on the device."""
    if "prompt_masks" in batch:
        return batch["prompt_masks"]
    return batch["labels"][:, None] == batch["prompt_class"][..., None, None]


class Targets(NamedTuple):
    """What is to be found in a batch of B images, M things at most in one: a prompt that is there, or a segment of one.

    masks (B, M, H, W) bool, present (B, M) bool (the others are padding), prompt (B, M) int64.
    """

    masks: Tensor
    present: Tensor
    prompt: Tensor

    def of_prompts(self, count: int) -> Tensor:
        """Which of ``count`` prompts are there, (B, K) bool."""
        there = self.present.new_zeros(len(self.present), count + 1)
        return there.scatter(1, torch.where(self.present, self.prompt, count), True)[:, :count]


def find_targets(batch: dict[str, Any], valid: Tensor) -> Targets:
    """The segments of a batch, where it has them, or its prompts; of ``valid`` (B, K) prompts only.

    Of a list of hundreds of classes a few are in an image: only their masks are made.
    """
    if "prompt_masks" in batch:
        masks = batch["prompt_masks"]
        prompt = torch.arange(masks.shape[1], device=masks.device).expand_as(valid)
        return Targets(masks, valid & masks.flatten(2).any(-1), prompt)
    if "segments" in batch:
        numbers, prompt = batch["segments"], F.pad(batch["segment_prompt"], (0, 1), value=-1)  # one column at least
        value = torch.arange(prompt.shape[1], device=prompt.device).expand_as(prompt)
        asked = (prompt >= 0) & valid.gather(1, prompt.clamp(min=0))
    else:
        numbers, value = batch["labels"], batch["prompt_class"]
        prompt = torch.arange(value.shape[1], device=value.device).expand_as(value)
        asked = (value >= 0) & valid
    # Which numbers occur, -1 in a column of its own: it costs one look at a map, where a mask of each prompt costs K.
    most = 1 + int(torch.maximum(numbers.max(), value.max()).clamp(min=0))
    occurs = torch.zeros(len(numbers), most + 1, dtype=torch.bool, device=numbers.device)
    occurs = occurs.scatter(1, torch.where(numbers < 0, most, numbers).flatten(1), True)
    present = asked & occurs.gather(1, value.clamp(min=0))
    count = max(1, int(present.sum(1).max()))
    index = present.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    value, present, prompt = (x.gather(1, index) for x in (value, present, prompt))
    masks = (numbers[:, None] == value[..., None, None]) & present[..., None, None]
    return Targets(masks, present, prompt.clamp(min=0))


def counted_pixels(batch: dict[str, Any]) -> Tensor:
    """The pixels that a loss looks at, (B, H, W) bool: the labelled ones; or all, where prompts bring their own masks, since
    what is outside of these is known not to be meant."""
    return torch.ones_like(batch["prompt_masks"][:, 0]) if "prompt_masks" in batch else batch["labels"] != IGNORE


def cosine(steps: int, warmup: int, lowest: float = 0.0) -> Callable[[int], float]:
    """The rate at each step, as a share of the highest: a linear warm-up, and a cosine that falls to ``lowest`` at the end."""

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, warmup))
        return warm * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    return factor


def poly(steps: int, warmup: int, first: float = 1e-6, power: float = 0.9) -> Callable[[int], float]:
    """The same for detectron2's WarmupPolyLR: a power of what is left, and a linear warm-up from the share ``first``."""

    def factor(step: int) -> float:
        warm = 1.0 if step >= warmup else first + (1 - first) * step / warmup
        return warm * max(0.0, 1 - step / steps) ** power

    return factor


def parameter_groups(network: Any, lr: float, backbone_lr_factor: float, weight_decay: float) -> list[dict[str, Any]]:
    """What learns, in four groups: pretrained or not, decayed (matrices) or not (norms, biases, embeddings)."""
    pretrained = {id(p) for p in network.backbone.tower.parameters()}
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, torch.nn.Embedding)}
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, p in network.named_parameters():
        if p.requires_grad:
            plain = p.ndim < 2 or id(p) in embeddings or any(part in name for part in EMBEDDINGS)
            groups.setdefault((id(p) in pretrained, plain), []).append(p)
    return [
        {"params": params, "lr": lr * (backbone_lr_factor if old else 1), "weight_decay": 0.0 if plain else weight_decay}
        for (old, plain), params in groups.items()
    ]
