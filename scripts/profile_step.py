"""Where the time goes: a training step and a prediction, by part, in CPU seconds and shares.

    python scripts/profile_step.py [-c conf/pmp_scenes.yaml] [--repeat 5]

CPU seconds (of all threads) move less on a busy machine than wall time does; the shares are what to read.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pmpseg import evaluate
from pmpseg.config import Schema
from pmpseg.inference import ask_one_by_one, upsample
from pmpseg.models.backbone import pad_to
from pmpseg.training import PMPModule
from pmpseg.training.pmp import prompt_targets


class Clock:
    """Adds up CPU time by name; keeps the fastest repeat of each."""

    def __init__(self) -> None:
        self.best: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        spent = time.process_time() - start
        self.best[name] = min(spent, self.best.get(name, spent))

    def report(self, title: str, per: int) -> None:
        total = sum(self.best.values())
        print(f"\n{title}: {1000 * total / per:.0f} CPU-ms an image")
        for name, spent in self.best.items():
            print(f"  {name:22}{1000 * spent / per:8.1f} ms {100 * spent / total:5.0f} %")


def training(module: PMPModule, data: Any, repeat: int) -> None:
    clock, dataset = Clock(), data.dataset("train")
    loader = iter(data.train_dataloader())
    network = module.network.train()
    optimizer = torch.optim.AdamW(p for p in network.parameters() if p.requires_grad)
    for _ in range(repeat):
        with clock("data (in a worker)"):
            for index in range(data.batch_size):
                dataset[1, index]
        batch = next(loader)
        with clock("text (cached later)"):
            prompts = module.text.encode_batch(batch["prompts"])
        with clock("backbone"):
            maps = network.backbone(batch["image"].float() / 255)
        with clock("pixel decoder"):
            features = network.features(maps, batch["image"].float())
        with clock("query decoder"):
            prediction = network.decode(features, prompts)
        with clock("matching and loss"):
            masks = prompt_targets(batch)
            loss = module.loss(prediction, masks, prompts.valid & masks.flatten(2).any(-1))["loss"]
        with clock("backward"):
            loss.backward()
        with clock("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
    clock.report(f"training step of {data.batch_size}", data.batch_size)


@torch.inference_mode()
def prediction(module: PMPModule, data: Any, repeat: int) -> None:
    clock, network = Clock(), module.network.eval()
    item = data.dataset("val")[0]
    image = pad_to(item["image"][None].float() / 255, 32)
    prompts = [p for p in item["prompts"] if p] or list(data.vocabulary.names)
    for _ in range(repeat):
        module.text.forget()
        with clock(f"text, {len(prompts)} prompts"):
            encoded = module.text.encode(prompts)
        with clock("backbone"):
            maps = network.backbone(image)
        with clock("pixel decoder"):
            features = network.features(maps, image)
        with clock(f"decoder, {len(prompts)} times"):
            soft, _ = ask_one_by_one(network, features, encoded)
        with clock("masks at image size"):
            upsample(soft, tuple(image.shape[-2:])).gt(0.5)
    clock.report("prediction of one image, prompts one by one", 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", default="conf/pmp_scenes.yaml")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    config = Schema({"model", "data", "trainer", "seed_everything"}, {}).read(args.config)
    torch.manual_seed(0)
    spec = config["data"] if isinstance(config["data"], dict) else {"class_path": config["data"]}
    data = evaluate.build_data({**spec, "init_args": {**spec.get("init_args", {}), "num_workers": 0}})
    module = PMPModule(**config["model"]["init_args"])
    training(module, data, args.repeat)
    prediction(module, data, args.repeat)


if __name__ == "__main__":
    main()
