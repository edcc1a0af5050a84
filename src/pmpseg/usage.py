"""What an evaluation costs: images a second, memory, parameters."""

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .processes import of_all

T = TypeVar("T")
GIB = 1024**3


class Meter:
    """Counts what passes through ``watch``: the time from one batch to the next is work, that before each is waiting for it.

    The first batch is left out of the times if there is another one: loaders start, and kernels are chosen, in it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.images = self.timed = 0
        self.waited = self.worked = 0.0
        forget_peak(device)

    def watch(self, batches: Iterable[T], size: Any) -> Iterator[T]:
        """``batches``, unchanged; ``size(batch)`` is its number of images."""
        iterator, first = iter(batches), True
        while True:
            start = self._now()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            ready = self._now()
            yield batch
            count, done = size(batch), self._now()
            if self.timed and first:
                self.waited, self.worked, self.timed, first = 0.0, 0.0, 0, False
            self.images += count
            self.timed += count
            self.waited += ready - start
            self.worked += done - ready

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def result(self) -> dict[str, Any]:
        """Of all processes together: their images in the time of the slowest, the most that one of them had in memory."""
        own = (self.images, self.timed, self.waited + self.worked, self.waited, peak_gib(self.device))
        images, timed, seconds, waited, peak = zip(*of_all(own), strict=True)
        return {
            "images": sum(images),
            "images_per_second": sum(timed) / max(seconds) if max(seconds) > 0 else None,
            "waiting_share": sum(waited) / sum(seconds) if sum(seconds) > 0 else None,
            "peak_memory_gib": max((one for one in peak if one is not None), default=None),
            "memory_of": "GPU" if self.device.type == "cuda" else "process",
            "processes": len(images),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }


def parameters(modules: dict[str, nn.Module | None]) -> dict[str, int]:
    """How many each of them has, and all of them, what they share once."""
    found = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items() if module is not None}
    every = {id(p): p.numel() for module in modules.values() if module is not None for p in module.parameters()}
    return found | {"all": sum(every.values())}


CPU = torch.device("cpu")


def forget_peak(device: torch.device = CPU) -> float | None:
    """The peak so far is forgotten, where the system can do so: on a GPU, and for a process on Linux. Returns what is held."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return peak_gib(device)


def peak_gib(device: torch.device = CPU) -> float | None:
    """The most memory held since ``forget_peak``: of tensors on a GPU, or of the process, libraries included; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024**2 for line in lines if line.startswith("VmHWM")), None)
