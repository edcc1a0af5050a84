"""What a run leaves behind: checkpoints, pictures at every validation, ``metrics.json``, and ``model/`` for users."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from PIL import Image

from pmpseg.cli import whole_file
from pmpseg.drawing import Row, iou_caption, panel
from pmpseg.errors import InputError
from pmpseg.evaluation import best_threshold, numbers
from pmpseg.segmenter import Segmenter


class BestCheckpoint(ModelCheckpoint):
    """``checkpoints/best.ckpt`` in the run's own folder, by ``monitor``, or what the model says of itself."""

    def __init__(self, monitor: str = "val/miou") -> None:
        super().__init__(monitor=monitor, mode="max", filename="best", save_top_k=1, enable_version_counter=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = os.path.join(trainer.default_root_dir, "checkpoints")
        self.monitor = getattr(pl_module, "monitor", self.monitor)
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning forgets the best score where the folder has been moved."""
        old, new, best = str(state_dict["dirpath"]), str(self.dirpath), state_dict["best_model_path"]
        if best and not Path(best.replace(old, new, 1)).is_file():  # continued elsewhere, not moved
            super().load_state_dict(state_dict)
            return
        moved = {k: v.replace(old, new, 1) if isinstance(v, str) else v for k, v in state_dict.items()}
        moved["best_k_models"] = {path.replace(old, new, 1): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(moved)


class FiniteLoss(Callback):
    """Ends a training that has diverged, with one line. On a GPU the loss is looked at only when it is logged anyway."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        loss, step = outputs["loss"], trainer.global_step
        look = loss.device.type == "cpu" or step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if look and not torch.isfinite(loss):
            advice = f"lower model.lr (now {pl_module.hparams.get('lr')}), or look for broken images and masks"
            raise InputError(f"the loss is {loss.item()} at step {step}: {advice}")


class PlainProgressBar(TQDMProgressBar):
    """Loss and speed, without the version number that Lightning adds; continued inside an epoch, it begins where that stopped."""

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        taken, per_epoch = getattr(trainer.datamodule, "continued", (0, 1))  # type: ignore[attr-defined]
        if had := taken % per_epoch:
            bar = self.train_progress_bar
            bar.reset(total=per_epoch)
            bar.initial = bar.n = had  # the speed is that of what is done now
            bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        self.train_progress_bar.initial = 0
        super().on_train_epoch_start(trainer, *args)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        shown = super().get_metrics(trainer, pl_module)
        return {name.removeprefix("train/"): value for name, value in shown.items() if name != "v_num"}


class RunRecord(Callback):
    """Writes into the run's folder: ``panels/step_N.png`` at each validation, then ``metrics.json`` and ``model/``.

    ``data`` is how the data was chosen (class_path, init_args); it goes into the model's config for ``evaluate``. ``encoders``
    as in ``Segmenter.save``. ``model/`` holds the weights of the best validation by ``monitor``, and the threshold chosen there.
    """

    def __init__(
        self, data: dict[str, Any] | None = None, encoders: str = "copy", monitor: str = "val/miou", pictures: int = 8
    ) -> None:
        self.data, self.encoders, self.monitor, self.pictures = data, encoders, monitor, pictures
        self.history: list[dict[str, float]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.monitor = getattr(pl_module, "monitor", self.monitor)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        threshold = best_threshold(pl_module.scores)
        chosen = {"threshold": pl_module.hparams.threshold if threshold is None else threshold}
        self.history.append({"step": trainer.global_step, **numbers(pl_module.scores), **chosen})
        if not trainer.is_global_zero:
            return
        training = pl_module.training
        segmenter = self._segmenter(trainer, pl_module, chosen["threshold"])
        data = trainer.datamodule  # type: ignore[attr-defined]
        rows = example_rows(segmenter, data.dataset("val"), self.pictures)
        pl_module.train(training)
        folder = Path(trainer.default_root_dir) / "panels"
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / f"step_{trainer.global_step:06d}.png") as temporary:
            panel(rows, data.vocabulary.names).save(temporary, "PNG")

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        root, chosen = Path(trainer.default_root_dir), self._take_best(trainer, pl_module)
        threshold = chosen.get("threshold", pl_module.hparams.threshold)
        self._segmenter(trainer, pl_module, threshold).save(root / "model", self.encoders)

    def _take_best(self, trainer: Trainer, pl_module: Any) -> dict[str, float]:
        """Loads the weights of the best validation, writes ``metrics.json``, and returns its row; {} without one."""
        keepers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor == self.monitor]
        best = keepers[0].best_model_path if keepers else ""
        if best:
            state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
            pl_module.load_state_dict(state, strict=False)
        if not self.history:
            return {}
        chosen = max(self.history, key=lambda scores: scores.get(self.monitor.removeprefix("val/"), 0.0))
        with whole_file(Path(trainer.default_root_dir) / "metrics.json") as temporary:
            temporary.write_text(json.dumps({"best": chosen, "history": self.history}, indent=1) + "\n")
        return chosen

    def _segmenter(self, trainer: Trainer, module: Any, threshold: float) -> Segmenter:
        data = trainer.datamodule  # type: ignore[attr-defined]
        made = (module.network, module.text, data.vocabulary, data.image_size, threshold, self.data, module.backbone_source)
        return Segmenter(
            *made,
            square=getattr(data, "square", False),
            showing=getattr(module, "showing", None),
            image_encoder=getattr(module, "image_encoder", None),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = state["history"]


class RegionRecord(RunRecord):
    """Of a run that tunes a CLIP on regions: ``metrics.json``, and ``model/`` with the best validation's weights."""

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.history.append({"step": trainer.global_step, **pl_module.scores})

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._take_best(trainer, pl_module)
            pl_module.region_stage().save(Path(trainer.default_root_dir) / "model")


def example_rows(segmenter: Segmenter, dataset: Any, count: int) -> list[Row]:
    """Rows to look at, of images spread over a data set: the class list, or one phrase, every fourth with nothing to find."""
    rows: list[Row] = []
    count = min(count, len(dataset))
    for n in range(count):
        item = dataset[n * len(dataset) // count]
        height, width = item["labels"].shape  # the image's own size, which the item's image may have lost
        image = Image.fromarray(item["image"].permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BILINEAR)
        if "prompt_masks" not in item:
            assert segmenter.vocabulary is not None
            names = segmenter.vocabulary.names
            rows.append(Row(image, item["name"], item["labels"].numpy(), segmenter.segment(image, names, together=True).labels))
            continue
        asked = [(p, m) for p, m in zip(item["prompts"], item["prompt_masks"].numpy(), strict=True) if p]
        wanted = [(p, m) for p, m in asked if m.any() != (n % 4 == 3)] or asked
        prompt, truth = wanted[n % len(wanted)]
        mask = segmenter.segment(image, [prompt]).mask(0)
        rows.append(Row(image, f"“{prompt}”", truth, mask, iou_caption(mask, truth)))
    return rows
