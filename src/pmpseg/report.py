"""Scores as people read them: a table in the terminal, and a row of a paper's."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from .evaluation import numbers
from .vocabulary import Vocabulary

# The same name for two rules has filled tables with numbers that cannot be compared.
RULES = {
    "miou_v06": "classes in the ground truth or predicted (miou_v06: OVSeg, SAN, MAFT+)",
    "miou": "classes in the ground truth (miou: detectron2 since July 2022)",
}
LONGEST = 200  # classes that are told one by one in the terminal


def rows(model: str, scores: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table with one row for each rule of mIoU; ``scores`` of each benchmark by its title, in percent there."""
    head = ["model", "mIoU over", *scores]
    lines = [head, ["---"] * len(head)]
    for rule, meaning in RULES.items():
        lines.append([model.replace("|", "\\|"), meaning, *(_percent(found.get(rule, math.nan)) for found in scores.values())])
    return "\n".join(f"| {' | '.join(cells)} |".replace("| ---", "|---").replace("--- |", "---|") for cells in lines)


def usage_line(usage: Mapping[str, Any]) -> str:
    """What an evaluation cost, in one line."""
    said = [f"{usage['images']} images"]
    if usage["images_per_second"]:
        said.append(f"{usage['images_per_second']:.3g} images/s, reading, answering and scoring")
        said.append(f"{usage['waiting_share']:.0%} of the time waiting for images")
    if usage["peak_memory_gib"] is not None:
        said.append(f"peak {usage['peak_memory_gib']:.2f} GiB ({usage['memory_of']})")
    said.append(f"{usage['parameters']['all'] / 1e6:.1f} M parameters")
    return "; ".join(said)


def table(scores: dict[str, Any], vocabulary: Vocabulary, unseen: Collection[int] | None = None) -> str:
    """IoU by class ("-" where a class is absent), phrase IoU by kind and group, then every other number; all in percent.

    A list too long to be read is left out. ``unseen``: where it is not the vocabulary's own.
    """
    lines = []
    if "iou" in scores and len(vocabulary) <= LONGEST:
        unseen = set(vocabulary.unseen if unseen is None else unseen)
        names = [name + "*" * (i in unseen) for i, name in enumerate(vocabulary.names)]
        lines = _in_columns(dict(zip(names, scores["iou"].reshape(-1).tolist(), strict=True)), 4)
        lines += ["(* no masks of it in training)", ""] if unseen else [""]
    others = numbers(scores)
    crossed = {k: k.removeprefix("phrase_iou_").split("_") for k in others}
    crossed = {k: words for k, words in crossed.items() if len(words) == 2 and all(f"phrase_iou_{w}" in others for w in words)}
    if crossed:
        columns = list(dict.fromkeys(words[1] for words in crossed.values()))
        lines += [f"{'phrase IoU':12}" + "".join(f"{c:>14}" for c in columns)]
        for kind in dict.fromkeys(words[0] for words in crossed.values()):
            row = [others.get(f"phrase_iou_{kind}_{c}", math.nan) for c in columns]
            lines.append(f"{kind:12}" + "".join(f"{_percent(v):>14}" for v in row))
        lines.append("")
    return "\n".join([*lines, *_in_columns({k: v for k, v in others.items() if k not in crossed}, 3)])


def _in_columns(values: dict[str, float], columns: int) -> list[str]:
    if not values:
        return []
    width = max(map(len, values)) + 2
    cells = [f"{name:<{width}}{_percent(value):>5}" for name, value in values.items()]
    rows = -(-len(cells) // max(1, min(columns, 118 // (width + 8))))
    return ["   ".join(cells[row::rows]) for row in range(rows)]


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"
