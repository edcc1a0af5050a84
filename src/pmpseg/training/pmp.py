"""Training PMP: a batch of images and prompts -> network -> set loss -> log; validation by class list and by phrase."""

from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from pmpseg.errors import InputError
from pmpseg.hub import shipped_or
from pmpseg.losses import SetLoss
from pmpseg.models.backbone import pad_to
from pmpseg.models.clip import TextEncoder
from pmpseg.models.pmp import PMP
from pmpseg.models.token_towers import build_token_backbone

from .base import EvaluatedModule, check_prompting, cosine, counted_pixels, find_targets, parameter_groups, poly, prompt_targets

SCHEDULES = ("cosine", "poly")


class PMPModule(EvaluatedModule):
    """PMP with its frozen text side, its loss and its metrics. What the classes are comes from the data module.

    Args:
        text: Hugging Face folder or hub id of a CLIP or a sentence encoder; "tiny_clip" ships with pmpseg.
        templates: each phrase is put into all of them and the embeddings averaged.
        start_from: folder or hub id of a Mask2Former or MaskFormer, whose network and weights are taken, with prompts on top;
            what is said of the backbone and of the decoders' sizes is then not used.
        backbone: "clip", "conv" (small, for training from scratch), or any timm name.
        backbone_weights: null (random), "timm", a hub id, or a local file or folder.
        backbone_frozen: leave the pretrained part of the backbone as it is.
        backbone_mean: of images in [0, 1], where it differs from what the name was trained with.
        backbone_std: likewise.
        backbone_norms: a LayerNorm on each of its four maps, as Mask2Former and MaskFormer have behind a Swin.
        backbone_options: further arguments of a timm network, as {"drop_path_rate": 0.3}.
        pixel_decoder: fpn (MaskFormer's), fpn_light (less at its ends), or deformable (Mask2Former's).
        encoder_layers: of a deformable pixel decoder; Mask2Former has 6.
        encoder_ffn_dim: of their feed-forward parts; Mask2Former has 1024.
        decoder: whether queries look inside their masks only, on three levels (masked, Mask2Former), or everywhere on one (plain,
            MaskFormer).
        dim: width of the decoders; Mask2Former has 256.
        num_queries: masks proposed for an image; Mask2Former has 100.
        num_layers: of the query decoder; Mask2Former has 9.
        num_heads: of its attentions.
        ffn_dim: of its feed-forward parts; Mask2Former has 2048.
        dropout: share of its activations and attentions that is dropped in training; MaskFormer has 0.1, Mask2Former none.
        prompt_attention: what queries read of a prompt in every layer: one pooled embedding, its word tokens, none of it (blind
            proposals), or, as a control, another image's (shuffled).
        prompt_place: whether they read first in a layer, after their look at the image, or after their look at each other.
        prompt_direction: whether only queries read prompts, or both read each other.
        prompt_gate: zero, where what is read is added through a gate that starts at zero, or none; null is zero with start_from.
        prompt_layers: the layers in which they read, from 0; null for all.
        prompt_queries: shared by all prompts, or repeated: each prompt is decoded alone, which costs as many decodes.
        named_by: what a query is named by: itself, the image features under its mask, or both.
        mask_pooling: whether those features are weighted by the mask's probability (soft), or those above one half count (hard).
        name_hidden: width of the hidden layer that makes what a query is named by an embedding; null: ``dim``; OVSeg has 1024.
        name_scale: what cosines are multiplied by in naming; null: it is learned, from 20 to 100 at most; OVSeg has 100.
        few_prompts: share of training images whose queries are asked one to three of the prompts only, as users ask; a pixel
            loss sees all of them nevertheless.
        lr: of AdamW, after a linear warm-up; then it falls to zero, as ``schedule`` says.
        backbone_lr_factor: how much slower the pretrained part of the backbone learns.
        weight_decay: of matrices; norms, biases and embeddings have none.
        warmup_steps: steps of the warm-up.
        schedule: cosine, or poly: detectron2's WarmupPolyLR, power 0.9.
        warmup_factor: of poly: the share of the rate that the warm-up begins with; OVSeg has 1e-6.
        class_weight: of the loss on names, as in Mask2Former.
        mask_weight: of ``mask_loss``.
        dice_weight: of their dice loss.
        no_object_weight: of queries that match nothing, in the loss on names.
        num_points: points at which a mask is judged; Mask2Former has 12,544. null: at all pixels, as MaskFormer has it.
        mask_loss: binary cross-entropy of masks, or its focal form, with alpha 0.25 and gamma 2 as MaskFormer has it.
        pixel_weight: of a further loss that names every pixel directly; 0 leaves it out.
        examples: prompts may also be images: those of the data's supports, embedded by the image side of ``text``, a CLIP.
        text_weight: range of the text's share in a prompt that has an example; [1, 1] is text only.
        visual_prompt: how an example's mask is shown: crop_blur_highlight, crop, highlight, ... (pmpseg.visual_prompts.PRESETS).
        after_normalisation: show it on the normalised image, as CLIPSeg's code does: darker is then nearer to the mean.
        prompt_size: side of the example as the encoder sees it; null: the data's image size.
        threshold: of phrase scores, in validation; the model that a run saves has one chosen on the validation split.
    """

    def __init__(
        self,
        text: str = "tiny_clip",
        templates: tuple[str, ...] = ("{}",),
        start_from: str | None = None,
        backbone: str = "clip",
        backbone_weights: str | None = "tiny_clip",
        backbone_frozen: bool = False,
        backbone_mean: tuple[float, float, float] | None = None,
        backbone_std: tuple[float, float, float] | None = None,
        backbone_norms: bool = False,
        backbone_options: dict[str, Any] | None = None,
        pixel_decoder: Literal["fpn", "fpn_light", "deformable"] = "fpn_light",
        encoder_layers: int = 6,
        encoder_ffn_dim: int = 1024,
        decoder: Literal["masked", "plain"] = "masked",
        dim: int = 128,
        num_queries: int = 32,
        num_layers: int = 3,
        num_heads: int = 8,
        ffn_dim: int = 512,
        dropout: float = 0.0,
        prompt_attention: Literal["none", "pooled", "tokens", "shuffled"] = "pooled",
        prompt_place: Literal["first", "after_image", "after_self"] = "first",
        prompt_direction: Literal["read", "both"] = "read",
        prompt_gate: Literal["none", "zero"] | None = None,
        prompt_layers: list[int] | None = None,
        prompt_queries: Literal["shared", "repeated"] = "shared",
        named_by: Literal["query", "mask", "both"] = "mask",
        mask_pooling: Literal["soft", "hard"] = "soft",
        name_hidden: int | None = None,
        name_scale: float | None = None,
        few_prompts: float = 0.0,
        lr: float = 1e-3,
        backbone_lr_factor: float = 0.3,
        weight_decay: float = 0.05,
        warmup_steps: int = 50,
        schedule: Literal["cosine", "poly"] = "cosine",
        warmup_factor: float = 1e-6,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        num_points: int | None = 1024,
        pixel_weight: float = 0.0,
        mask_loss: Literal["bce", "focal"] = "bce",
        examples: bool = False,
        text_weight: tuple[float, float] = (0.0, 1.0),
        visual_prompt: str = "crop_blur_highlight",
        after_normalisation: bool = False,
        prompt_size: int | None = None,
        threshold: float = 0.5,
    ) -> None:
        super().__init__()
        if not 0 <= few_prompts <= 1:
            raise InputError(f"few_prompts: got {few_prompts}, want 0 to 1, a share of the images")
        if schedule not in SCHEDULES or not 0 <= warmup_factor <= 1:
            got = f"got {schedule!r}, {warmup_factor}"
            raise InputError(f"schedule, warmup_factor: {got}, want one of {', '.join(SCHEDULES)}, and 0 to 1")
        if num_points is not None and num_points < 1:
            raise InputError(f"num_points: got {num_points}, want 1 or more, or null for all pixels")
        check_prompting(text_weight, visual_prompt, prompt_size)
        self.save_hyperparameters()
        self.text = TextEncoder(shipped_or(text), templates)
        guidance: dict[str, Any] = {
            "prompt_attention": prompt_attention,
            "prompt_place": prompt_place,
            "prompt_direction": prompt_direction,
            "prompt_gate": prompt_gate or ("zero" if start_from else "none"),
            "prompt_layers": prompt_layers,
            "prompt_queries": prompt_queries,
            "named_by": named_by,
            "mask_pooling": mask_pooling,
            "name_hidden": name_hidden,
            "name_scale": name_scale,
            "dropout": dropout,
            "pixel_head": pixel_weight > 0,
        }
        if start_from:
            self.network = PMP.from_transformers(start_from, self.text.dim, **guidance)
        else:
            self.network = PMP(
                text_dim=self.text.dim,
                backbone=backbone,
                backbone_weights=backbone_weights and shipped_or(backbone_weights),
                backbone_frozen=backbone_frozen,
                backbone_mean=backbone_mean,
                backbone_std=backbone_std,
                backbone_norms=backbone_norms,
                backbone_options=backbone_options,
                pixel_decoder=pixel_decoder,
                encoder_layers=encoder_layers,
                encoder_ffn_dim=encoder_ffn_dim,
                decoder=decoder,
                dim=dim,
                num_queries=num_queries,
                num_layers=num_layers,
                num_heads=num_heads,
                ffn_dim=ffn_dim,
                **guidance,
            )
        self.network.to(memory_format=torch.channels_last)  # several times faster for depthwise convolutions on CPUs
        self.backbone_source = backbone_weights
        self.image_encoder = build_token_backbone("clip", shipped_or(text)) if examples else None
        weights = class_weight, mask_weight, dice_weight, no_object_weight
        self.loss = SetLoss(*weights, num_points, pixel_weight=pixel_weight, mask_loss=mask_loss)

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.hparams["examples"] and not getattr(data, "supports", 0):
            got = f"{type(data).__name__}, which gives none"
            raise InputError(f"examples: got data of {got}: set data.supports of Scenes, PhraseCut or CocoPhrases to 1 or more")
        super().setup(stage)

    @property
    def embedder(self) -> Any:
        return self.image_encoder

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        prompts = self.prompts_of(batch)
        targets = find_targets(batch, prompts.valid)
        asked = keep_few(prompts.valid, targets.of_prompts(prompts.valid.shape[1]), self.hparams["few_prompts"])
        prediction = self.network(batch["image"].float() / 255, replace(prompts, valid=asked))
        present = targets.present & asked.gather(1, targets.prompt)
        # The network's masks cover the padded image.
        masks, counted = (pad_to(x, self.network.pad) for x in (targets.masks, counted_pixels(batch)))
        every = None  # prompt's mask, which naming pixels looks at, present or not
        if prediction.pixel_logits is not None:
            every = pad_to(prompt_targets(batch), self.network.pad)
        losses = self.loss(prediction, masks, present, counted, prompts.valid, targets.prompt, every)
        for name, value in losses.items():
            self.log(f"train/{name}", value.detach(), prog_bar=name == "loss", batch_size=len(masks))
        return losses["loss"]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        steps, p = self.trainer.estimated_stepping_batches, self.hparams
        backbone_lr_factor = p["backbone_lr_factor"] if p["start_from"] or p["backbone_weights"] else 1.0
        optimizer = torch.optim.AdamW(parameter_groups(self.network, p["lr"], backbone_lr_factor, p["weight_decay"]))
        if p["schedule"] == "poly":
            factor = poly(int(steps), p["warmup_steps"], p["warmup_factor"])
        else:
            factor = cosine(int(steps), p["warmup_steps"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def keep_few(valid: Tensor, present: Tensor, share: float) -> Tensor:
    """Which prompts the queries are asked, (B, K) bool: all ``valid`` ones, or in a share of the rows one to three of them.

    In half of those rows a ``present`` one is among the few, if there is one; otherwise chance decides.
    """
    rows = len(valid), 1
    noise = torch.rand(valid.shape, device=valid.device) + present * (torch.rand(rows, device=valid.device) < 0.5)
    first = noise.masked_fill(~valid, -1).argsort(1, descending=True)[:, :1]
    noise = torch.rand(valid.shape, device=valid.device).masked_fill(~valid, -1).scatter(1, first, 2.0)
    few = noise.argsort(1, descending=True).argsort(1) < torch.randint(1, 4, rows, device=valid.device)
    return torch.where(torch.rand(rows, device=valid.device) < share, few & valid, valid)
