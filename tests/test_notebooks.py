"""The notebooks run from top to bottom, with two steps of training."""

from pathlib import Path

import pytest

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
