"""The CLIP that ships: a genuine Hugging Face folder, small, and with an embedding of its own for every prompt."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from pmpseg.data.scenes import CLASSES, Scenes
from pmpseg.hub import shipped_or
from pmpseg.models import TextEncoder, build_backbone

FOLDER = Path(shipped_or("tiny_clip"))


@pytest.fixture(scope="module")
def text():
    return TextEncoder(FOLDER)


def test_it_is_small_and_comes_with_its_record():
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) < 4 * 2**20
    measured = json.loads((FOLDER / "zero_shot.json").read_text())
    assert measured["stuff"] > 0.5 and (FOLDER / "log.txt").stat().st_size > 1000


def test_transformers_opens_it_as_any_clip():
    model = CLIPModel.from_pretrained(FOLDER)
    assert model.config.vision_config.patch_size == 8 and model.config.projection_dim == 128


def test_no_two_prompts_share_an_embedding(text):
    data = Scenes(num_workers=0)
    phrases = {p for i in range(60) for p in data.dataset("test")[i]["prompts"] if p} | set(CLASSES)
    phrases |= {"a zebra", "a giraffe", "zebra", "red zebra", "RED-ish", "red circle!", "🦓", "красный круг", "红色的圆"}
    assert len(phrases) > 300
    pooled = text.encode(sorted(phrases)).pooled[0]
    closest = (pooled @ pooled.T).fill_diagonal_(-1).max()
    assert closest < 1 - 1e-5


@pytest.mark.parametrize("word", ["zebra", "🦓", "круг", "<x>"])
def test_a_foreign_word_does_not_cut_a_prompt(text, word):
    a, b = text.encode([f"red {word} circle", f"red {word} square"]).pooled[0]
    assert not torch.allclose(a, b, atol=1e-3)


def test_words_of_a_name_tell_it_apart(text):
    """Names that differ in their shape only must not be neighbours: a mask could not be named."""
    a, b, c = text.encode(["red circle", "red square", "grass"]).pooled[0]
    assert a @ b < 0.95 and a @ c < 0.8


def test_it_serves_as_a_backbone():
    backbone = build_backbone("clip", str(FOLDER), frozen=True)
    assert [tuple(m.shape[-2:]) for m in backbone(torch.rand(1, 3, 128, 160))] == [(32, 40), (16, 20), (8, 10), (4, 5)]
