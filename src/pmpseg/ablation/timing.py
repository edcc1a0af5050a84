"""What a training step costs, fairly on a busy machine: CPU seconds, all variants in turns in one process, the median."""

import time
from typing import Any

import numpy as np
import torch


def step_seconds(models: dict[str, tuple[Any, Any]], repeat: int = 10, warm_up: int = 2) -> dict[str, float]:
    """CPU seconds of forward, loss and backward of each module on its batch, on one thread. Weights stay as they are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spent: dict[str, list[float]] = {name: [] for name in models}
    for module, _ in models.values():
        module.train()
        module.log = lambda *_, **__: None  # there is no trainer to log to
    for turn in range(warm_up + repeat):
        for name, (module, batch) in models.items():
            torch.manual_seed(turn)  # the same few prompts for all
            start = time.process_time()
            module.training_step(batch, 0).backward()
            spent[name].append(time.process_time() - start)
            module.zero_grad()
    torch.set_num_threads(threads)
    return {name: float(np.median(times[warm_up:])) for name, times in spent.items()}
