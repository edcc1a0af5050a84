"""Tuning a CLIP on regions: batches of cut-outs and nouns -> contrastive loss -> log (OVSeg, arXiv 2210.04150, sec. 3 and 4).

The text side stays as it is. ``all`` tunes the whole image side, ``prompts`` the mask prompts alone, and ``all_then_prompts``,
OVSeg's best, one after the other. A run leaves a region model in RUN/model, which another run may begin from (``clip``).
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from pmpseg.errors import InputError
from pmpseg.hub import shipped_or
from pmpseg.models.clip import TextEncoder
from pmpseg.models.region import RegionClassifier, cosines
from pmpseg.region_metrics import RegionAccuracy
from pmpseg.region_stage import RegionStage

from .callbacks import RegionRecord

TUNE = ("prompts", "all", "all_then_prompts")
LARGEST_SCALE = 100.0


class RegionModule(LightningModule):
    """A region classifier and its training. The defaults are OVSeg's for a ViT-L/14, the paper's where its script differs.

    Args:
        clip: Hugging Face folder or hub id of a CLIP, or a region model (RUN/model) to go on from; "tiny_clip" ships with pmpseg.
        templates: each noun is put into all of them and the embeddings averaged.
        tune: what learns: the mask prompts, the whole image side (all), or that and then the prompts.
        all_share: of the steps, what ``all_then_prompts`` spends on the image side before its prompts.
        mask_prompt_depth: layers of mask prompts; none in a run of ``all``.
        lr: of the image side.
        weight_decay: of its matrices; norms, biases and the scale have none.
        prompt_lr: of the mask prompts (OVSeg's script has 0.05).
        prompt_weight_decay: of them.
        warmup_steps: of the linear warm-up that each stage begins with; then its rate falls to zero as a cosine.
        betas: of AdamW.
        eps: of AdamW.
        scale: of cosines in the loss, at the start; it learns, between 1 and 100.
        repeated_nouns: a noun twice in a batch is a negative of itself, as in OVSeg, or is left out of the sum (ignored).
        fill: of what lies outside a mask, see ``RegionClassifier``.
        weight: of the CLIP in the ensemble of the saved model.
        mask_threshold: of the saved model, above which a pixel is in a region; null: that of ``clip``, 0.5 if it has none.
    """

    prompts_began: Tensor  # to learn; until then they are noise, and neither validation nor the saved model has them
    #: what ``checkpoints/best.ckpt`` and ``model/`` are chosen by
    monitor = "val/accuracy"

    def __init__(
        self,
        clip: str = "tiny_clip",
        templates: tuple[str, ...] = ("{}",),
        tune: Literal["prompts", "all", "all_then_prompts"] = "all_then_prompts",
        all_share: float = 0.5,
        mask_prompt_depth: int = 3,
        lr: float = 5e-6,
        weight_decay: float = 0.2,
        prompt_lr: float = 2e-2,
        prompt_weight_decay: float = 0.0,
        warmup_steps: int = 100,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        scale: float = 100.0,
        repeated_nouns: Literal["negatives", "ignored"] = "negatives",
        fill: Literal["mean", "zero"] = "mean",
        weight: float = 0.7,
        mask_threshold: float | None = None,
    ) -> None:
        super().__init__()
        if tune not in TUNE or repeated_nouns not in ("negatives", "ignored"):
            got = f"got {tune!r}, {repeated_nouns!r}"
            raise InputError(f"tune, repeated_nouns: {got}, want one of {', '.join(TUNE)}, and negatives or ignored")
        if tune != "all" and mask_prompt_depth < 1:
            raise InputError(f"mask_prompt_depth: got {mask_prompt_depth}, want 1 or more for tune {tune!r}, or tune 'all'")
        if not 0 < all_share < 1 or not 1 <= scale <= LARGEST_SCALE:
            raise InputError(f"all_share, scale: got {all_share}, {scale}, want above 0 to below 1, and 1 to 100")
        self.save_hyperparameters()
        start = RegionStage.load(shipped_or(clip))
        # A run of "all" keeps no prompts: with the image side they were learned for, they would change, too.
        depth = 0 if tune == "all" else mask_prompt_depth
        options = {"mode": "crop", "fill": fill, "weight": weight, "mask_prompt_depth": depth}
        options |= {} if mask_threshold is None else {"mask_threshold": mask_threshold}
        self.classifier = RegionClassifier(**(start.classifier.config | options))
        self.classifier.vision.load_state_dict(start.classifier.vision.state_dict())
        known = depth > 0 and start.classifier.prompts.depth == depth
        if known:
            self.classifier.prompts.load_state_dict(start.classifier.prompts.state_dict())
        self.register_buffer("prompts_began", torch.tensor(known))
        self.text = TextEncoder(start.text.name, templates)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.classifier.vision.requires_grad_(tune != "prompts")
        self.strict_loading = False  # checkpoints leave frozen weights out: they come from ``clip``

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.accuracy = RegionAccuracy(data.vocabulary, getattr(data, "class_groups", None))

    # ---- training

    @property
    def stage_steps(self) -> dict[str, tuple[int, int]]:
        """The steps of each stage, "all" and "prompts": from, to."""
        steps, tune = int(self.trainer.estimated_stepping_batches), self.hparams["tune"]
        turn = {"all": steps, "prompts": 0}.get(tune, round(steps * self.hparams["all_share"]))
        return {"all": (0, turn), "prompts": (turn, steps)}

    @property
    def prompted(self) -> bool:
        """Whether this step tunes the mask prompts, and so sees them."""
        return self.global_step >= self.stage_steps["prompts"][0]

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        cuts = [(image.float() / 255, mask.float()) for image, mask in zip(batch["images"], batch["masks"], strict=True)]
        still = self._still()
        with without_gradients(still):
            regions = self.classifier.embed_crops(*self.classifier.prepare(cuts), self.prompted)  # (N, E)
        names = F.normalize(self.text.encode_batch([batch["nouns"]]).pooled[0], dim=-1)
        nouns = torch.tensor([noun_id(noun) for noun in batch["nouns"]], device=regions.device)
        several = self.trainer.world_size > 1
        if several:  # every region meets the nouns of all processes
            regions = self.all_gather(regions, sync_grads=True).flatten(0, 1)  # type: ignore[union-attr]
            names, nouns = (self.all_gather(x).flatten(0, 1) for x in (names, nouns))  # type: ignore[union-attr]
        same = nouns if self.hparams["repeated_nouns"] == "ignored" else None
        loss = contrastive_loss(regions, names, self.log_scale.exp(), same)
        right = cosines(regions.detach(), names).argmax(1) == torch.arange(len(regions), device=regions.device)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(regions))
        self.log("train/right", right.float().mean(), batch_size=len(regions))
        self.log("train/scale", self.log_scale.detach().exp(), batch_size=len(regions))
        # Several processes want every parameter in every loss.
        return loss + 0 * torch.stack([p.sum() for p in still]).sum() if several and still else loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What is not this stage's turn stays as it is, and leaves no trace in the optimizer."""
        for p in self._still():
            p.grad = None

    def _still(self) -> list[nn.Parameter]:
        """What learns in the run, but not in this step."""
        part = self.classifier.vision if self.prompted else self.classifier.prompts
        return [p for p in part.parameters() if p.requires_grad]

    def optimizer_step(self, *args: Any) -> None:
        """With the step what belongs to it: callbacks that save a checkpoint at the batch's end come before the module's hook."""
        prompted = self.prompted
        super().optimizer_step(*args)
        self.prompts_began.fill_(prompted)  # of the weights as they are now
        with torch.no_grad():
            self.log_scale.clamp_(0, math.log(LARGEST_SCALE))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        p, stages = self.hparams, self.stage_steps
        kinds: dict[tuple[str, float], list[Tensor]] = {}
        for name, value in self.named_parameters():
            if value.requires_grad and name != "log_scale":
                part = "prompts" if name.startswith("classifier.prompts") else "all"
                decay = p["prompt_weight_decay"] if part == "prompts" else p["weight_decay"] * (value.ndim >= 2)
                kinds.setdefault((part, decay), []).append(value)
        rates = {"all": p["lr"], "prompts": p["prompt_lr"]}
        factors = {part: stage_factor(*steps, p["warmup_steps"]) for part, steps in stages.items()}
        groups = [{"params": some, "lr": rates[part], "weight_decay": decay} for (part, decay), some in kinds.items()]
        schedules = [factors[part] for part, _ in kinds]
        # The scale learns in both stages, at the rate of each.
        groups.append({"params": [self.log_scale], "lr": 1.0, "weight_decay": 0.0})
        schedules.append(lambda step: sum(rates[part] * factors[part](step) for part in rates))
        optimizer = torch.optim.AdamW(groups, betas=tuple(p["betas"]), eps=p["eps"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.text.forget()  # as a run that is continued from here does
        learned = {name for name, p in self.named_parameters() if p.requires_grad} | {"prompts_began"}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k in learned}

    # ---- evaluation

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        self.accuracy.update(self.classifier, self.text, batch, prompted=bool(self.prompts_began))

    def on_validation_epoch_end(self) -> None:
        self.scores = self.accuracy.compute()
        self.accuracy.reset()
        self.log_dict({f"val/{name}": value for name, value in self.scores.items()})
        if self.trainer.is_global_zero and not self.trainer.sanity_checking:
            self.print(f"step {self.global_step}: " + ", ".join(f"{k} {100 * v:.1f}" for k, v in self.scores.items()))

    def record(self, data: dict[str, Any], encoders: str) -> RegionRecord:
        """What writes the run's folder, in place of PMP's ``RunRecord``."""
        return RegionRecord(data, encoders, self.monitor)

    def region_stage(self) -> RegionStage:
        if self.prompts_began or not self.classifier.prompts.depth:
            return RegionStage(self.classifier, self.text)
        plain = RegionClassifier(**(self.classifier.config | {"mask_prompt_depth": 0})).to(self.device)
        plain.vision = self.classifier.vision
        return RegionStage(plain, self.text)


@contextmanager
def without_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """What is computed within it has no gradients to these, which are as they were afterwards."""
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def contrastive_loss(regions: Tensor, names: Tensor, scale: Tensor | float, nouns: Tensor | None = None) -> Tensor:
    """CLIP's symmetric loss: of N unit embeddings (N, E) on each side, the i-th ones belong together.

    ``nouns`` (N,), numbers of the words: other pairs of the same word are then left out, instead of being negatives.
    """
    logits = scale * cosines(regions, names)  # (N, N)
    if nouns is not None:
        same = (nouns[:, None] == nouns) & ~torch.eye(len(nouns), dtype=torch.bool, device=nouns.device)
        logits = logits.masked_fill(same, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def stage_factor(begin: int, end: int, warmup: int) -> Any:
    """step -> factor of the learning rate: 0 outside the stage, a linear warm-up, then a cosine to 0 at its end."""
    warmup = min(warmup, end - begin)

    def factor(step: int) -> float:
        done = step - begin
        if not 0 <= done < end - begin:
            return 0.0
        if done < warmup:
            return (done + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (end - begin - warmup)))

    return factor


def noun_id(noun: str) -> int:
    """A number of a word that all processes agree on."""
    return int.from_bytes(hashlib.sha256(noun.encode()).digest()[:7], "big")
