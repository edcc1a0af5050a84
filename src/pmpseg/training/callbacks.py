"""What a run leaves behind: checkpoints, pictures at every validation, ``metrics.json``, and ``model/`` for users."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar

from pmpseg.cli import whole_file
from pmpseg.drawing import Row, panel
from pmpseg.evaluation import best_threshold, numbers
from pmpseg.segmenter import Segmenter


class RunCheckpoint(ModelCheckpoint):
    """The best checkpoint by ``monitor`` and the last one, in the run's own ``checkpoints/``."""

    def __init__(self, monitor: str = "val/miou") -> None:
        super().__init__(monitor=monitor, mode="max", filename="best", save_last=True, enable_version_counter=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = os.path.join(trainer.default_root_dir, "checkpoints")
        super().setup(trainer, pl_module, stage)


class PlainProgressBar(TQDMProgressBar):
    """Loss and speed, without the version number that Lightning adds."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        shown = super().get_metrics(trainer, pl_module)
        return {name.removeprefix("train/"): value for name, value in shown.items() if name != "v_num"}


class RunRecord(Callback):
    """Writes into the run's folder: ``panels/step_N.png`` at each validation, then ``metrics.json`` and ``model/``.

    ``data`` is how the data was chosen (class_path, init_args); it goes into the model's config for ``evaluate``.
    ``model/`` holds the best checkpoint's weights, and the threshold that suits the validation split.
    """

    def __init__(self, data: dict[str, Any] | None = None, pictures: int = 8) -> None:
        self.data, self.pictures = data, pictures
        self.history: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        self.history.append({"step": trainer.global_step, **numbers(pl_module.scores)})
        self.threshold = best_threshold(pl_module.scores)
        segmenter = self._segmenter(trainer, pl_module)
        training = pl_module.training
        rows = example_rows(segmenter, trainer.datamodule.dataset("val"), self.pictures)
        pl_module.train(training)
        folder = Path(trainer.default_root_dir) / "panels"
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / f"step_{trainer.global_step:06d}.png") as temporary:
            panel(rows, segmenter.vocabulary.names).save(temporary, "PNG")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not self.history:
            return
        root, best = Path(trainer.default_root_dir), trainer.checkpoint_callback.best_model_path
        if best:
            state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
            pl_module.load_state_dict(state, strict=False)
        monitor = trainer.checkpoint_callback.monitor.removeprefix("val/")
        chosen = max(self.history, key=lambda scores: scores.get(monitor, 0.0))
        report = {"best": chosen, "history": self.history}
        with whole_file(root / "metrics.json") as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
        self._segmenter(trainer, pl_module).save(root / "model")

    def _segmenter(self, trainer: Trainer, module: LightningModule) -> Segmenter:
        data = trainer.datamodule
        threshold = module.hparams.threshold if self.threshold is None else self.threshold
        return Segmenter(module.network, module.text, data.vocabulary, data.image_size, threshold, self.data)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = state["history"]


def example_rows(segmenter: Segmenter, dataset: Any, count: int) -> list[Row]:
    """Rows to look at: for images spread over a data set a phrase each, of every kind in turn, or the whole class list."""
    rows: list[Row] = []
    for n in range(min(count, len(dataset))):
        item = dataset[n * len(dataset) // count]
        image = item["image"].permute(1, 2, 0).numpy()
        phrases = [k for k, text in enumerate(item["prompts"]) if text] if "prompt_masks" in item else []
        if not phrases:
            names = segmenter.vocabulary.names
            rows.append(Row(image, item["name"], item["labels"].numpy(), segmenter.segment(image, names, together=True).labels))
            continue
        k = phrases[n % len(phrases)]
        truth = item["prompt_masks"][k].numpy()
        mask = segmenter.segment(image, [item["prompts"][k]]).mask(0)
        rows.append(Row(image, f"“{item['prompts'][k]}”", truth, mask, iou_caption(mask, truth)))
    return rows


def iou_caption(mask: Any, truth: Any) -> str:
    """"IoU 93", or what is right and wrong where there is nothing to find."""
    if not truth.any():
        return "nothing to find: " + ("found something" if mask.any() else "right, found nothing")
    return f"IoU {100 * (mask & truth).sum() / (mask | truth).sum():.0f}"
