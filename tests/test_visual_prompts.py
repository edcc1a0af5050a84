"""scripts/visual_prompts.py: P(object) by hand, a fair choice of targets, its table and its picture."""

import re
import runpy
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from pmpseg.hub import shipped_or
from pmpseg.visual_prompts import PRESETS

SCRIPT = Path(__file__).parents[1] / "scripts" / "visual_prompts.py"
TINY = shipped_or("tiny_clip")
TABLE = runpy.run_path(str(SCRIPT))


def command(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["visual_prompts.py", *arguments])
    TABLE["main"]()


def test_the_score_is_what_the_whole_clip_says():
    clip = TABLE["Clip"](TINY, "a {}")
    model, tokenizer = CLIPModel.from_pretrained(TINY).float().eval(), AutoTokenizer.from_pretrained(TINY)
    scores = TABLE["measure"](clip, 3)
    assert scores.shape == (3, 2, len(PRESETS)) and (scores > 0).all() and (scores < 1).all()
    for row, (scene, names, target, mask) in zip(scores, TABLE["cases"](3), strict=True):
        plain = torch.from_numpy(scene.image).permute(2, 0, 1)[None] / 255
        dark = plain * torch.from_numpy(mask)
        text = tokenizer([f"a {name}" for name in names], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(pixel_values=(torch.cat([plain, dark]) - 0.5) / 0.25, **text).logits_per_image
        expected = logits.softmax(-1)[:, target].numpy()
        given = row[0][[list(PRESETS).index(preset) for preset in ("none", "darken0")]]
        assert np.abs(given - expected).max() < 1e-4 and abs(given[0] - given[1]) > 1e-3


def test_targets_are_any_of_the_names_and_masks_are_theirs():
    places = []
    for scene, names, target, mask in islice(TABLE["cases"](60), 60):
        assert names == sorted({t.name for t in scene.things}) and len(names) >= 3
        own = [t.name for i, t in enumerate(scene.things) if mask[scene.owner == i + 1].any()]
        assert set(own) == {names[target]} and not mask[scene.owner == 0].any()
        places.append(target / (len(names) - 1))
    assert 0.35 < np.mean(places) < 0.65 and {0.0, 1.0} <= set(places)


def test_the_table_has_a_row_for_each_preset(monkeypatch, capsys):
    command(monkeypatch, "--count", "2")
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("|")[1].strip() for line in lines if re.search(r"[+-]\d+\.\d ± \d+\.\d", line)}
    assert rows == set(PRESETS) - {"none"}
    with pytest.raises(ValueError, match="--count: got 1, want 2"):
        command(monkeypatch, "--count", "1")


def test_the_picture_that_ships_is_what_the_script_draws(monkeypatch, tmp_path):
    command(monkeypatch, "--picture", str(tmp_path / "new" / "presets.jpg"))
    drawn = Image.open(tmp_path / "new" / "presets.jpg").convert("RGB")
    path = SCRIPT.parents[1] / "docs" / "visual_prompts.jpg"
    shipped = Image.open(path).convert("RGB")
    assert path.stat().st_size < 150_000 and drawn.size == shipped.size
    assert np.abs(np.asarray(drawn, float) - np.asarray(shipped, float)).mean() < 3
