"""What the benchmarks share: sides run in turns, and how they are printed."""

import time
from collections.abc import Callable

import torch


def in_turns(sides: dict[str, Callable[[], object]], repeat: int, device: str = "cpu", warm_up: bool = True) -> dict[str, float]:
    """The median seconds of each side."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeat + warm_up):
        for name, run in sides.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn or not warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: sorted(spent)[len(spent) // 2] for name, spent in times.items()}


def show(title: str, seconds: dict[str, float], first: str | None = None, unit: float = 1.0) -> None:
    """Each side's seconds and how many times as fast as the first it is."""
    reference = seconds[first or next(iter(seconds))]
    print(f"\n{title}")
    for name, spent in seconds.items():
        print(f"  {name:44}{spent / unit:9.3f} s   {reference / spent:6.2f}x", flush=True)
