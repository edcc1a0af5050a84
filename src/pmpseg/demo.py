"""The demo: ``make demo`` or ``python -m pmpseg.demo`` trains on generated scenes, evaluates, and writes a page of pictures.

Everything goes into ``runs/demo``: the run as ``pmpseg.fit`` leaves it, ``metrics_test.json``, and ``page/index.html``.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pmpseg import cli
from pmpseg.drawing import Row, iou_caption, write_page

SHOWN = {
    "miou_seen": "mIoU of classes seen in training (30 colour-shape pairs and 6 kinds of stuff)",
    "miou_combination": "mIoU of unseen combinations (both words known, never together)",
    "miou_word": "mIoU of unseen words (star, heart, gravel)",
    "phrase_iou_seen": "mean IoU of phrases of seen words",
    "phrase_iou_combination": "mean IoU of phrases with an unseen combination",
    "phrase_iou_word": "mean IoU of phrases with an unseen word",
    "phrase_absent_accuracy": "phrases with nothing to find that are answered with nothing",
}


def main(args: Sequence[str] | None = None) -> Path:
    """Trains, evaluates and draws; returns the page's path. ``args`` beside ``--out`` go to ``pmpseg.fit``."""
    what = "Train on scenes, evaluate, write a page of pictures."
    parser = argparse.ArgumentParser(prog="python -m pmpseg.demo", description=what)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    parser.add_argument("--pictures", type=int, default=14, help="rows of the page; default: 14")
    options, rest = parser.parse_known_args(args)

    from pmpseg import evaluate, fit
    from pmpseg.segmenter import Segmenter

    print("Training PMP on generated scenes; the pictures come at the end.")
    start = time.time()
    fit.main(["--trainer.default_root_dir", str(options.out), *rest])
    minutes = (time.time() - start) / 60
    model = options.out / "model"
    scores = evaluate.main([str(model), "--split", "test"])
    segmenter = Segmenter.load(model)
    data = evaluate.build_data(evaluate.own_data(segmenter.data, str(model)))
    rows = phrase_rows(segmenter, data.dataset("test"), options.pictures)
    validation = json.loads((options.out / "metrics.json").read_text())["best"]["miou"]
    figures = f"{100 * validation:5.1f}  mIoU on validation scenes, which show seen combinations only\n"
    figures += "\n".join(f"{100 * scores[name]:5.1f}  {text}" for name, text in SHOWN.items() if name in scores)
    intro = f"Trained for {minutes:.1f} minutes on this machine. Scenes that it never saw, in percent; "
    intro += f"the test split unless said otherwise:\n{figures}"
    page, picture = write_page(options.out / "page", rows, "pmpseg: words become masks", intro)
    print(f"\n{intro}\n\npage:     {page}\npicture:  {picture}\nmodel:    {model}")
    return page


def phrase_rows(segmenter: Any, dataset: Any, count: int) -> list[Row]:
    """A phrase of each kind in turn, from test scenes about seen things, unseen combinations and unseen words in turn."""
    kinds = ("attributes", "relation", "part", "group", "thing", "stuff", "absent")
    rows: list[Row] = []
    for index in range(len(dataset)):
        if len(rows) == count:
            break
        item, wanted = dataset[index], kinds[len(rows) % len(kinds)]
        for prompt, kind, truth in zip(item["prompts"], item["phrase_kind"], item["prompt_masks"].numpy(), strict=True):
            if prompt and (not truth.any() if wanted == "absent" else truth.any() and kind.startswith(wanted)):
                image = np.ascontiguousarray(item["image"].permute(1, 2, 0).numpy())
                mask = segmenter.segment(image, [prompt]).mask(0)
                group = kind.split()[1]
                what = f"{wanted}, {'seen words' if group == 'seen' else 'unseen ' + group}"
                rows.append(Row(image, f"“{prompt}”", truth, mask, f"{what} · {iou_caption(mask, truth)}"))
                break
    return rows


if __name__ == "__main__":
    cli.run(main)
