"""The notebooks run from top to bottom, with two steps of training, or on a tiny table."""

from pathlib import Path

import pytest

from pmpseg.ablation.table import write_rows

nbformat = pytest.importorskip("nbformat", reason="notebooks are run where the test extras are installed")
nbclient = pytest.importorskip("nbclient", reason="notebooks are run where the test extras are installed")
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def test_first_look(tmp_path):
    notebook = nbformat.read(NOTEBOOKS / "first_look.ipynb", as_version=4)
    setting = next(c for c in notebook.cells if "STEPS = 60" in c.source)
    setting.source = setting.source.replace("STEPS = 60", "STEPS = 2")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    scores = notebook.cells[-1].outputs[-1]["data"]["text/plain"]
    assert "'miou'" in scores and "'phrase_iou'" in scores
    assert sum("image/png" in o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs) == 2


def test_ablation(tmp_path):
    rows = []
    for name, factor, gain in (("pooled", "", 0.0), ("blind", "what is read", -0.0625)):
        numbers = {"recall": 0.6, "step_seconds": 1 + gain}
        rows += [{"variant": name, "factor": factor, "seed": s, "iou_at_50": 0.3 + s / 100 + gain, **numbers} for s in range(2)]
    write_rows(tmp_path / "table.csv", rows)
    notebook = nbformat.read(NOTEBOOKS / "ablation.ipynb", as_version=4)
    notebook.cells[1].source = f"TABLE = {str(tmp_path / 'table.csv')!r}"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert "4 runs of 2 variants; the base is pooled" in outputs[0]["text"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3  # two measures, and the one cost that differs
    assert "| what is read | blind | 2 | -6.2 ± 0.0 | +0.0 ± 0.0 |" in outputs[-1]["data"]["text/markdown"]
