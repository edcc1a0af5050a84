"""Prompts: shapes, choosing, and what is refused."""

import pytest
import torch

from pmpseg.models import Prediction, Prompts, as_prompts


def make(batch: int = 2, k: int = 3, t: int = 4, d: int = 5) -> Prompts:
    generator = torch.Generator().manual_seed(batch * 1000 + k * 100 + t)
    return Prompts(
        torch.randn(batch, k, t, d, generator=generator),
        torch.rand(batch, k, t, generator=generator) > 0.3,
        torch.randn(batch, k, d, generator=generator),
        torch.rand(batch, k, generator=generator) > 0.3,
    )


def test_plain_embeddings_become_prompts_of_one_token():
    x = torch.randn(3, 8)
    prompts = as_prompts(x, batch=2)
    assert prompts.tokens.shape == (2, 3, 1, 8)
    assert prompts.token_valid.shape == (2, 3, 1) and prompts.token_valid.all()
    assert prompts.valid.shape == (2, 3) and prompts.valid.all()
    assert torch.equal(prompts.pooled, torch.stack([x, x]))
    assert torch.equal(prompts.tokens[:, :, 0], prompts.pooled)

    per_image = torch.randn(2, 3, 8)
    assert torch.equal(as_prompts(per_image, batch=2).pooled, per_image)
    assert as_prompts(per_image[:1], batch=4).pooled.shape == (4, 3, 8)


def test_prompts_of_one_image_serve_a_batch():
    prompts = make(batch=1)
    assert as_prompts(prompts, 3).tokens.shape == (3, 3, 4, 5)
    same = make(batch=3)
    assert torch.equal(as_prompts(same, 3).tokens, same.tokens)
    with pytest.raises(ValueError, match="2 images; wanted them for 1 or all 3"):
        as_prompts(make(batch=2), 3)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.full((2, 4), float("nan")), "NaN"),
        (torch.full((2, 4), float("inf")), "infinite"),
        (torch.zeros(4), "wanted float embeddings"),
        (torch.zeros(1, 2, 3, 4), "wanted float embeddings"),
        (torch.zeros(0, 4), "at least one prompt"),
        (torch.zeros(2, 0, 4), "at least one prompt"),
        (torch.zeros(2, 4, dtype=torch.int64), "int64"),
        (torch.zeros(3, 2, 4), "3 images"),
    ],
)
def test_bad_embeddings_are_refused(x: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        as_prompts(x, batch=2)


def test_tensors_that_do_not_fit_together_are_refused():
    good = make()
    with pytest.raises(ValueError, match=r"wanted \(B, K, T, D\)"):
        Prompts(good.tokens, good.token_valid, good.pooled[:, :2], good.valid)
    with pytest.raises(ValueError, match="one prompt or more"):
        good.select([])


def test_to_changes_only_the_embeddings():
    prompts = make().to(dtype=torch.float64)
    assert prompts.tokens.dtype == prompts.pooled.dtype == torch.float64
    assert prompts.valid.dtype == prompts.token_valid.dtype == torch.bool
    assert make().to("cpu").tokens.dtype == torch.float32


def test_select_chooses_and_orders():
    prompts = make()
    chosen = prompts.select([2, 0])
    assert torch.equal(chosen.tokens, prompts.tokens[:, [2, 0]])
    assert torch.equal(chosen.valid, prompts.valid[:, [2, 0]])
    assert torch.equal(prompts.select(slice(1, None)).pooled, prompts.pooled[:, 1:])
    assert torch.equal(prompts.select(torch.tensor([True, False, True])).pooled, prompts.pooled[:, [0, 2]])


def test_one_by_one_keeps_each_prompt():
    prompts = make(batch=2, k=3)
    single = prompts.one_by_one()
    assert single.tokens.shape == (6, 1, 4, 5) and single.valid.shape == (6, 1)
    assert torch.equal(single.pooled[4, 0], prompts.pooled[1, 1])
    assert torch.equal(single.token_valid[4, 0], prompts.token_valid[1, 1])


def test_prediction_has_no_earlier_layers_by_default():
    assert Prediction(torch.zeros(1), torch.zeros(1)).aux == ()
