"""PMP beside a peer on photographs: CamVid, segmentation_models.pytorch's FPN with the same backbone, weights, images and budget.

    pip install -e '.[bench]'
    python scripts/bench_camvid.py --data ../shared/data/camvid --weights ../shared/weights --epochs 14

Parts, each in OUT/PART, done once and then only reported: ``fpn`` (the peer), ``pmp`` (conf/pmp_camvid.yaml), and ``pmp_unseen``,
which leaves "car" and "tree" out of training and prompts them in testing all the same. Both see the same images in the same
augmentation and number, at half resolution, in channels_last, with AdamW, one warm-up and one cosine; the network after the last
step is scored on the test split. At the end come the tables, and step times taken in turns.

Another --epochs wants another --out: parts that are done are not made again.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
UNSEEN = ("tree", "car")
PARTS = ("fpn", "pmp", "pmp_unseen")
LR, WEIGHT_DECAY, WARM_UP, BACKBONE_FACTOR = 8e-4, 0.05, 50, 0.3  # of both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/camvid")
    parser.add_argument("--weights", type=Path, default=ROOT / "../shared/weights")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_camvid"))
    parser.add_argument("--epochs", type=int, default=14, help="of 367 images, for every part")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--report", action="store_true", help="only the tables of the parts that are there")
    args = parser.parse_args()
    for path in (args.data / "images", args.weights / "minilm"):
        if not path.is_dir():
            raise SystemExit(f"no {path}: say where CamVid and the weights lie with --data and --weights")
    args.out.mkdir(parents=True, exist_ok=True)
    for part in () if args.report else args.parts:
        if not (args.out / part / "scores.json").exists():
            train_fpn(args) if part == "fpn" else train_pmp(args, part)
    report(args)


def data_of(args: argparse.Namespace, classes: Path | None = None) -> Any:
    from pmpseg.data import FolderData

    options = yaml.safe_load((ROOT / "conf/pmp_camvid.yaml").read_text())["data"]["init_args"]
    options |= {"root": str(args.data), "classes": str(classes or ROOT / "conf/vocab/camvid.txt")}
    for key in ("crop_size", "scale"):
        options[key] = tuple(options[key])
    return FolderData(**options)


def build_fpn(weights: Path) -> nn.Module:
    import segmentation_models_pytorch as smp

    from pmpseg.models.weights import load_weights

    network = smp.FPN("tu-tf_efficientnet_lite0", encoder_weights=None, classes=11)
    load_weights(network.encoder.model, weights / "tf_efficientnet_lite0.imagenet.safetensors", "tf_efficientnet_lite0")
    return network.to(memory_format=torch.channels_last)


def fpn_optimizer(network: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in network.named_parameters():
        groups.setdefault((name.startswith("encoder."), p.ndim < 2), []).append(p)
    optimizer = torch.optim.AdamW(
        {"params": ps, "lr": LR * (BACKBONE_FACTOR if old else 1), "weight_decay": 0.0 if plain else WEIGHT_DECAY}
        for (old, plain), ps in groups.items()
    )
    factor = lambda step: min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def fpn_logits(network: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> (B, 11, H, W); padded to whole strides as PMP pads."""
    from pmpseg.models.backbone import pad_to

    x = (image.float() / 255 - 0.498) / 0.502
    return network(pad_to(x, 32).contiguous(memory_format=torch.channels_last))[..., : image.shape[-2], : image.shape[-1]]


def train_fpn(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from pmpseg.metrics import ConfusionMetrics

    torch.manual_seed(0)
    data = data_of(args)
    network, loader = build_fpn(args.weights).train(), data.train_dataloader()
    steps = args.epochs * len(loader)
    optimizer, schedule = fpn_optimizer(network, steps)
    with tqdm(total=steps, desc="fpn", unit="step") as bar:
        for epoch in range(args.epochs):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                loss = F.cross_entropy(fpn_logits(network, batch["image"]), batch["labels"], ignore_index=255)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")
    metric = ConfusionMetrics(11)
    network.eval()
    with torch.inference_mode():
        for batch in tqdm(data.test_dataloader(), desc="fpn test"):
            logits = F.interpolate(fpn_logits(network, batch["image"]), batch["labels"].shape[-2:], mode="bilinear")
            metric.update(logits.argmax(1), batch["labels"])
    save_scores(args.out / "fpn", data.vocabulary.names, metric.compute(), network)


def train_pmp(args: argparse.Namespace, part: str) -> None:
    from pmpseg import Segmenter
    from pmpseg.evaluate import evaluate

    folder = args.out / part
    folder.mkdir(parents=True, exist_ok=True)
    classes = ROOT / "conf/vocab/camvid.txt"
    if part == "pmp_unseen":
        text = classes.read_text()
        for name in UNSEEN:
            text = re.sub(rf"(?m)^(\d+: {name}\b.*)$", r"\1 [unseen]", text)
        classes = folder / "classes.txt"
        classes.write_text(text)
    command = [sys.executable, "-m", "pmpseg.fit", "-c", str(ROOT / "conf/pmp_camvid.yaml"), "--data.root", str(args.data)]
    command += ["--model.text", str(args.weights / "minilm"), "--data.classes", str(classes)]
    command += ["--model.backbone_weights", str(args.weights / "tf_efficientnet_lite0.imagenet.safetensors")]
    command += ["--trainer.default_root_dir", str(folder), "--trainer.max_epochs", str(args.epochs)]
    command += ["--trainer.check_val_every_n_epoch", str(args.epochs)]  # once, at the end: nothing is chosen
    if (folder / "checkpoints/last.ckpt").exists():
        command += ["--ckpt_path", "last"]
    subprocess.run(command, check=True)
    segmenter = Segmenter.load(folder / "model")
    data = data_of(args, classes)
    scores = evaluate(segmenter, data, "test")
    save_scores(folder, data.vocabulary.names, scores, segmenter.network)


def save_scores(folder: Path, names: list[str], scores: dict[str, Any], network: nn.Module) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = {k: float(scores[k]) for k in ("miou", "miou_v06", "pixel_accuracy", "mean_accuracy")}
    found |= {"iou": dict(zip(names, map(float, scores["iou"]), strict=True))}
    found |= {"parameters": sum(p.numel() for p in network.parameters())}
    (folder / "scores.json").write_text(json.dumps(found, indent=1) + "\n")


def report(args: argparse.Namespace) -> None:
    found = {p: json.loads((args.out / p / "scores.json").read_text()) for p in PARTS if (args.out / p / "scores.json").exists()}
    if not found:
        raise SystemExit(f"no part is done in {args.out}: leave out --report")
    print("\nCamVid test split, IoU in percent (* not trained on by pmp_unseen)")
    print(f"  {'':16}" + "".join(f"{p:>12}" for p in found))
    for name in next(iter(found.values()))["iou"]:
        print(f"  {name + '*' * (name in UNSEEN):16}" + "".join(f"{100 * f['iou'][name]:12.1f}" for f in found.values()))
    for key in ("miou", "pixel_accuracy", "mean_accuracy"):
        print(f"  {key:16}" + "".join(f"{100 * f[key]:12.1f}" for f in found.values()))
    print(f"  {'parameters':16}" + "".join(f"{f['parameters']:12,}" for f in found.values()))
    fpn, pmp = step_seconds(args)
    print(f"\nA training step of 8 images, CPU-s, taken in turns: fpn {fpn:.2f}, pmp {pmp:.2f}, ratio {pmp / fpn:.2f}")


def step_seconds(args: argparse.Namespace, repeat: int = 8) -> tuple[float, float]:
    """Median CPU seconds of a step (forward, loss, backward, optimizer) of both, in turns, on one batch."""
    from pmpseg.models.backbone import pad_to
    from pmpseg.training import PMPModule
    from pmpseg.training.pmp import parameter_groups, prompt_targets

    batch = next(iter(data_of(args).train_dataloader()))
    peer = build_fpn(args.weights).train()
    peer_optimizer, _ = fpn_optimizer(peer, 100)
    options = yaml.safe_load((ROOT / "conf/pmp_camvid.yaml").read_text())["model"]["init_args"]
    options |= {"text": str(args.weights / "minilm")}
    options |= {"backbone_weights": str(args.weights / "tf_efficientnet_lite0.imagenet.safetensors")}
    module = PMPModule(**options).train()
    own_optimizer = torch.optim.AdamW(parameter_groups(module.network, LR, BACKBONE_FACTOR, WEIGHT_DECAY))

    def fpn_step() -> None:
        F.cross_entropy(fpn_logits(peer, batch["image"]), batch["labels"], ignore_index=255).backward()
        peer_optimizer.step()
        peer_optimizer.zero_grad()

    def pmp_step() -> None:
        prompts, masks = module.text.encode_batch(batch["prompts"]), prompt_targets(batch)
        known = pad_to(batch["labels"] != 255, 32)
        prediction = module.network(batch["image"].float() / 255, prompts)
        module.loss(prediction, pad_to(masks, 32), prompts.valid & masks.flatten(2).any(-1), known)["loss"].backward()
        own_optimizer.step()
        own_optimizer.zero_grad()

    spent: list[list[float]] = [[], []]
    for _ in range(repeat):
        for step, times in zip((fpn_step, pmp_step), spent, strict=True):
            start = time.process_time()
            step()
            times.append(time.process_time() - start)
    return float(np.median(spent[0][2:])), float(np.median(spent[1][2:]))


if __name__ == "__main__":
    main()
