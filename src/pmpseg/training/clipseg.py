"""Training CLIPSeg: a batch of images, phrases and examples -> mixed prompts -> network -> binary cross-entropy -> log.

Source: arXiv 2112.10003, sec. 3.1 and appendix. Only the light decoder learns, on 20,000 batches of 64 at 1e-3. An image may
bring several phrases at once, which cost next to nothing, since it is encoded once.
"""

from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F

from pmpseg.errors import InputError
from pmpseg.hub import TINY_CLIP, shipped_or
from pmpseg.losses import mean_over_ranks
from pmpseg.models.clip import TextEncoder
from pmpseg.models.clipseg import CLIPSeg

from .base import EvaluatedModule, check_prompting, cosine, counted_pixels, parameter_groups, prompt_targets


class CLIPSegModule(EvaluatedModule):
    """CLIPSeg with its frozen text side, its loss and its metrics. The defaults are the paper's, but for the tiny CLIP.

    Args:
        text: Hugging Face folder or hub id of a CLIP, whose text side is read; "tiny_clip" ships with pmpseg.
        templates: each phrase is put into all of them and the embeddings averaged.
        start_from: folder or hub id of transformers' CLIPSeg, whose network, weights and text side are taken; what is said of the
            backbone and of the decoder is then not used.
        backbone: "clip", or a plain ViT of timm (ViTSeg).
        backbone_weights: for "clip" a folder or hub id; for a timm name "timm", a hub id, a local file, or null (random).
        backbone_frozen: the encoder does not learn, as in the paper.
        backbone_random: take the encoder's shape only and draw its weights anew, the paper's "no CLIP pre-training".
        backbone_mean: what images in [0, 1] are normalised with; null: the encoder's own. The paper's code has ImageNet's.
        backbone_std: likewise, the standard deviation.
        backbone_options: further arguments of a timm encoder, as {"patch_size": 8}.
        blocks: which blocks of the encoder, from 0, the decoder reads; null: where [3, 7, 9] of 12 lie.
        input_scale: what the encoder's tokens and the prompts are multiplied by; 1 suits CLIP, 0.2 the tiny CLIP's larger ones.
        dim: width of the decoder; 64 and 16 in the paper.
        conditional_layer: the decoder block before which the prompt acts, from 0.
        num_heads: heads of the decoder's attention.
        ffn_dim: hidden width of its feed-forward parts.
        dropout: share of the decoder's activations that is dropped.
        decoder: transformer blocks, or mlp, each token by itself (CLIP-Deconv, with one block).
        upsampling: from patches to pixels: transposed convolution, refined (a 3x3 convolution first), or bilinear.
        image_projection: of a timm encoder's embedding to the texts' space: learned, or fixed at random (the paper's code).
        text_weight: range from which the text's share is drawn in a prompt that has an example; the code's PC+ has [0, 0.5],
            [1, 1] is text only.
        visual_prompt: how an example's mask is shown: crop_blur_highlight, crop, highlight, ... (pmpseg.visual_prompts.PRESETS).
        after_normalisation: show it on the normalised image, as the paper's code does: darker is then nearer to the mean.
        prompt_size: side of the example as the encoder sees it; null: the data's image size.
        lr: learning rate of AdamW.
        min_lr: to which it falls as a cosine until the last step.
        backbone_lr_factor: how much slower the encoder learns, where it does.
        weight_decay: of matrices; norms, biases and embeddings have none.
        warmup_steps: steps of a linear warm-up; the paper has none.
        threshold: above which a pixel belongs to a prompt, in validation; the model that a run saves has one chosen there.
    """

    def __init__(
        self,
        text: str = "tiny_clip",
        templates: tuple[str, ...] = ("{}",),
        start_from: str | None = None,
        backbone: str = "clip",
        backbone_weights: str | None = "tiny_clip",
        backbone_frozen: bool = True,
        backbone_random: bool = False,
        backbone_mean: tuple[float, float, float] | None = None,
        backbone_std: tuple[float, float, float] | None = None,
        backbone_options: dict[str, Any] | None = None,
        blocks: list[int] | None = None,
        input_scale: float = 1.0,
        dim: int = 64,
        conditional_layer: int = 0,
        num_heads: int = 4,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        decoder: Literal["transformer", "mlp"] = "transformer",
        upsampling: Literal["transposed", "refined", "bilinear"] = "transposed",
        image_projection: Literal["learned", "fixed"] = "learned",
        text_weight: tuple[float, float] = (0.0, 1.0),
        visual_prompt: str = "crop_blur_highlight",
        after_normalisation: bool = False,
        prompt_size: int | None = None,
        lr: float = 1e-3,
        min_lr: float = 1e-4,
        backbone_lr_factor: float = 0.1,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        threshold: float = 0.3,
    ) -> None:
        super().__init__()
        if not 0 <= min_lr <= lr:
            raise InputError(f"min_lr: got {min_lr}, want 0 to the lr that falls to it, which is {lr}")
        check_prompting(text_weight, visual_prompt, prompt_size)
        if backbone != "clip" and backbone_weights == TINY_CLIP:
            want = "'timm', a hub id, a file in timm's keys, or null to draw them"
            raise InputError(f"backbone_weights: got {TINY_CLIP!r}, a CLIP's, for {backbone!r}: want {want}")
        self.save_hyperparameters()
        self.text = TextEncoder(shipped_or(start_from or text), templates, normalize=False)
        if start_from:
            self.network = CLIPSeg.from_transformers(shipped_or(start_from))
        else:
            self.network = CLIPSeg(
                text_dim=self.text.dim,
                backbone=backbone,
                backbone_weights=backbone_weights and shipped_or(backbone_weights),
                backbone_frozen=backbone_frozen,
                backbone_random=backbone_random,
                backbone_mean=backbone_mean,
                backbone_std=backbone_std,
                backbone_options=backbone_options,
                blocks=blocks,
                input_scale=input_scale,
                dim=dim,
                conditional_layer=conditional_layer,
                num_heads=num_heads,
                ffn_dim=ffn_dim,
                dropout=dropout,
                decoder=decoder,
                upsampling=upsampling,
                image_projection=image_projection,
            )
        #: What the frozen encoder was started from, where its weights are still those.
        self.backbone_source = None if start_from or backbone_random else backbone_weights

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not getattr(data, "supports", 0):
            if self.network.image_projection is not None:
                self.network.image_projection.requires_grad_(False)  # which texts never reach
        elif not self.network.backbone.frozen:
            self.network.backbone.tower.requires_grad_(True)  # examples go through all of it

    @property
    def embedder(self) -> Any:
        return self.network

    @property
    def monitor(self) -> str:
        """What the best checkpoint is chosen by: no threshold has a part in it."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return "val/phrase_ap" if getattr(data, "phrase_kinds", ()) else "val/miou"

    def from_elsewhere(self, name: str) -> bool:
        p = self.hparams
        drawn = not p["start_from"] and (p["backbone_random"] or p["backbone_weights"] is None)
        return not drawn and name.startswith("network.backbone.tower.")

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        prompts = self.prompts_of(batch)
        logits = self.network(batch["image"].float() / 255, prompts)
        masks = prompt_targets(batch)
        loss = mask_loss(logits, masks, counted_pixels(batch)[:, None] & prompts.valid[..., None, None])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(masks))
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        steps, p = self.trainer.estimated_stepping_batches, self.hparams
        groups = parameter_groups(self.network, p["lr"], p["backbone_lr_factor"], p["weight_decay"])
        factor = cosine(int(steps), p["warmup_steps"], p["min_lr"] / p["lr"] if p["lr"] else 0.0)
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def mask_loss(logits: Tensor, masks: Tensor, counted: Tensor) -> Tensor:
    """Binary cross-entropy over the pixels that count, their mean over all processes. All (B, K, H, W); the last two bool."""
    each = F.binary_cross_entropy_with_logits(logits.float(), masks.float(), reduction="none")
    return (each * counted).sum() / mean_over_ranks(counted.sum().float()).clamp(min=1)
