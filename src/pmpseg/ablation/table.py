"""The table of an ablation: a row a run as CSV; mean, spread and the difference to the base, paired by seed, as Markdown."""

import csv
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from pmpseg.ablation.spec import Ablation
from pmpseg.cli import whole_file

Row = dict[str, Any]
# What Markdown and pictures show in percent, where the rows have it.
MEASURES = {
    "iou_at_50": "IoU at 50 %",
    "iou_at_60": "IoU at 60 %",
    "recall": "best proposal",
    "text_iou": "IoU by text",
    "text_ap": "AP by text",
    "text_iou_at_50": "by text at 50 %",
    "image_iou": "IoU by example",
    "image_ap": "AP by example",
    "image_iou_at_50": "by example at 50 %",
    "miou_seen": "mIoU seen",
    "miou": "mIoU",
}
COSTS = {"parameters": "parameters", "step_seconds": "CPU-s a step", "image_seconds": "CPU-s an image"}
PHRASES = (
    "IoU: of phrases on the test split, at thresholds of the validation split that answer 50 or 60 % of its absent phrases with "
    "nothing. Best proposal: the best IoU of any query, chosen by the truth."
)
FORMS = (
    "Of phrases on the test split, asked by text or by an example: mean IoU of those that are there, at the threshold that is "
    "best on the validation split; average precision over the pixels of all; mean IoU at the threshold that answers half of the "
    "validation split's absent phrases with nothing."
)
CHANCE = (
    "With {pairs} pairs a difference is outside of chance (95 %, one comparison) where it exceeds {factor:.1f} times its "
    "standard deviation; of twenty variants without an effect, one does."
)
FIRST = ("variant", "factor", "seed", *list(MEASURES)[:4], *COSTS, "steps", "seconds", "commit")


def collect(ablation: Ablation, out: Path) -> list[Row]:
    """A row of every run in ``out`` that is scored, in the order of the file."""
    timed = out / "step_seconds.json"
    seconds = json.loads(timed.read_text(encoding="utf-8")) if timed.is_file() else {}
    rows = []
    for name in ablation.rows:
        folders = [path for path in out.glob(f"{name}_*") if re.fullmatch(r"\d+", path.name.removeprefix(f"{name}_"))]
        for folder in sorted(folders, key=lambda path: int(path.name.rpartition("_")[2])):
            if not (folder / "scores.json").is_file():
                continue
            scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
            row = {"variant": name, "factor": ablation.factor(name), "seed": int(folder.name.rpartition("_")[2])}
            row |= scores["numbers"] | scores["record"] | {"step_seconds": seconds.get(name)}
            rows.append({k: row.get(k) for k in FIRST} | row)
    return rows


def write(rows: Sequence[Row], out: Path, title: str) -> None:
    """OUT/table.csv and OUT/table.md."""
    write_rows(out / "table.csv", [{k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows])
    with whole_file(out / "table.md") as temporary:
        temporary.write_text(markdown(rows, title), encoding="utf-8")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as CSV; a row may lack a column of the others."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read(path: str | Path) -> list[Row]:
    """The rows of a table.csv; numbers as numbers, and None where there is none."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{k: v if k in ("variant", "factor", "commit") else _number(v) for k, v in row.items()} for row in rows]


def _number(text: str) -> float | int | None:
    return None if not text else int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def by_variant(rows: Sequence[Row], measure: str) -> dict[str, dict[int, float]]:
    """variant -> seed -> value; the base first, as in the rows."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.get(measure) is not None:
            found.setdefault(row["variant"], {})[int(row["seed"])] = float(row[measure])
    return found


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1), which is NaN for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def differences(values: dict[str, dict[int, float]], base: str) -> dict[str, list[float]]:
    """variant -> its value minus the base's for each seed that both have."""
    of_base = values.get(base, {})
    return {
        name: [value - of_base[seed] for seed, value in sorted(own.items()) if seed in of_base]
        for name, own in values.items()
        if name != base
    }


def shown(rows: Sequence[Row]) -> list[str]:
    """The measures of ``MEASURES`` that the rows have; mIoU of all classes only where there is no other."""
    have = [m for m in MEASURES if any(row.get(m) is not None for row in rows)]
    return [m for m in have if m != "miou" or "miou_seen" not in have]


def markdown(rows: Sequence[Row], title: str) -> str:
    """Two tables: values, and differences to the first variant."""
    if not rows:
        return f"# {title}\n\nNo run is done yet.\n"
    base, measures = rows[0]["variant"], shown(rows)
    factor = {row["variant"]: row["factor"] or "" for row in rows}
    values = {m: by_variant(rows, m) for m in (*measures, *COSTS)}
    costs = [c for c in COSTS if values[c]]
    labels = [MEASURES[m] for m in measures]
    lines = [f"# {title}", "", *_head(["factor", "variant", "seeds", *labels, *(COSTS[c] for c in costs)])]
    for name in factor:
        cells = [factor[name], name, str(sum(row["variant"] == name for row in rows))]
        cells += [_percent(list(values[m].get(name, {}).values())) for m in measures]
        cells += [_cost(c, list(values[c].get(name, {}).values())) for c in costs]
        lines.append(_line(cells))
    gains = {m: differences(values[m], base) for m in measures}
    lines += ["", f"Difference to {base}, paired by seed:", "", *_head(["factor", "variant", "pairs", *labels])]
    pairs = []
    for name in factor:
        if name != base:
            pairs.append(max(len(gains[m].get(name, [])) for m in measures))
            cells = [_percent(gains[m].get(name, []), sign=True) for m in measures]
            lines.append(_line([factor[name], name, str(pairs[-1]), *cells]))
    return "\n".join([*lines, "", *_reading(max(pairs, default=0), measures)]) + "\n"


def _reading(pairs: int, measures: Sequence[str]) -> list[str]:
    lines = ["Percent; mean ± standard deviation over seeds, which change the weights and the training data."]
    if "recall" in measures:
        lines.append(PHRASES)
    if "text_iou" in measures:
        lines.append(FORMS)
    if pairs > 1:
        factor = float(student.ppf(0.975, pairs - 1)) / math.sqrt(pairs)
        lines.append(CHANCE.format(pairs=pairs, factor=factor))
    return lines


def _percent(values: Sequence[float], sign: bool = False) -> str:
    if not values:
        return "-"
    mean, spread = mean_and_spread([100 * v for v in values])
    return f"{mean:{'+' if sign else ''}.1f}" + ("" if math.isnan(spread) else f" ± {spread:.1f}")


def _cost(name: str, values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{values[0]:,.0f}" if name == "parameters" else f"{np.mean(values):.3f}"


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), "|" + "---|" * len(cells)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
