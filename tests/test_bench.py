"""scripts/bench_clipseg.py at a small size: every part runs, and what it counts and compares is so."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench_clipseg as bench
from bench_clipseg import TINY


def test_clipseg_beside_transformers(capsys):
    bench.clipseg(1, TINY)
    out = capsys.readouterr().out
    differences = [float(found) for found in re.findall(r"largest difference (\S+) of", out)]
    assert len(differences) == len(TINY.counts) and max(differences) < 1e-4
    # 16 phrases and 6 images; a hook counts what is encoded.
    assert "texts encoded for every image (96 texts, 6 images)" in out and "texts encoded once (16 texts, 6 images)" in out
    assert "decode, prompts: 20" in out and "16 copies at a time" in out


def test_in_parts_transformers_answers_the_same():
    theirs = bench.transformers_clipseg(TINY)
    normal, embeddings = torch.randn(1, 3, 64, 64), torch.randn(5, 512)
    with torch.inference_mode():
        whole = bench.their_logits(theirs, normal, embeddings)
        assert whole.shape == (5, 64, 64) and whole.std() > 0
        torch.testing.assert_close(bench.their_logits(theirs, normal, embeddings, 2), whole, atol=1e-4, rtol=1e-4)


def test_parity_table(capsys):
    bench.clipseg_parity(1, TINY, (64, 96))
    out = capsys.readouterr().out
    found = re.findall(r"px (\S+) / (\S+) \((\S+)\)", out)
    assert len(found) == 8  # two heads, two patches, two sizes
    assert all(float(text) < 1e-4 and float(shown) < 1e-4 and float(spread) > 0.01 for text, shown, spread in found)


@pytest.mark.parametrize("side", ["transformers", "CLIPSeg"])
def test_peak(side):
    after, before = map(float, re.fullmatch(r"(\S+) \((\S+)\)", bench.peak(side, 2, TINY)).groups())
    assert after >= before > 0


def test_the_gpu_part_runs_on_a_cpu(capsys, monkeypatch):
    monkeypatch.setattr(bench.CLIPSeg, "compile", lambda self: torch.nn.Module.compile(self, backend="eager"))
    bench.clipseg_gpu(1, replace(TINY, counts=(1, 3)), device="cpu", batches=(2,))
    out = capsys.readouterr().out
    assert len(re.findall("images a second, peak", out)) == 2 * 2 * 3
    full, half = (float(found) for found in re.findall(r"largest difference (\S+) of", out))
    assert full < 1e-4 < half < 0.1
