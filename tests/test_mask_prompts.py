"""Mask prompts around a real CLIP tower, against a loop over its submodules and against the plain CLIP."""

import pytest
import torch
from tiny_clip import make_tiny_clip
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection

from pmpseg.errors import InputError
from pmpseg.models.clip import load_clip_vision
from pmpseg.models.mask_prompts import MaskPrompts, patches_of


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """32 px, patches of 8, four blocks of width 32."""
    return load_clip_vision(make_tiny_clip(tmp_path_factory.mktemp("clip")), CLIPVisionModelWithProjection)[0].eval()


def prompts_of(depth: int) -> MaskPrompts:
    torch.manual_seed(1)
    return MaskPrompts(depth, 16, 32)


def reference(clip, prompts, pixels, patches) -> torch.Tensor:
    """The paper's rule written out over the tower's modules: tokens where a patch is masked, again after the first blocks."""
    vision = clip.vision_model
    keep = patches.float()[..., None]
    tokens = vision.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    if len(prompts):
        tokens = tokens * keep + prompts[0] * (1 - keep)
    cls = vision.embeddings.class_embedding.expand(len(pixels), 1, -1)
    states = torch.cat([cls, tokens], 1) + vision.embeddings.position_embedding.weight
    states = vision.pre_layrnorm(states)
    for number, layer in enumerate(vision.encoder.layers, start=1):
        states = layer(states, None)
        if number < len(prompts):
            states = torch.cat([states[:, :1], states[:, 1:] * keep + prompts[number] * (1 - keep)], 1)
    return clip.visual_projection(vision.post_layernorm(states[:, 0]))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 3, 32, 32), torch.rand(3, 16) > 0.5


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4])
def test_is_the_rule_written_out(clip, depth):
    pixels, patches = inputs()
    prompts = prompts_of(depth)
    with torch.no_grad(), prompts.replacing(clip.vision_model, patches):
        found = clip(pixels).image_embeds
    with torch.no_grad():
        torch.testing.assert_close(found, reference(clip, prompts.tokens, pixels, patches))
        if depth:  # or the comparison would see nothing
            assert not torch.allclose(found, clip(pixels).image_embeds, atol=1e-3)


@pytest.mark.parametrize(("depth", "whole"), [(0, False), (3, True)])
def test_without_depth_or_mask_it_is_the_plain_clip(clip, depth, whole):
    pixels, patches = inputs()
    with torch.no_grad():
        plain = clip(pixels).image_embeds
        with prompts_of(depth).replacing(clip.vision_model, torch.ones_like(patches) if whole else patches):
            assert torch.equal(clip(pixels).image_embeds, plain)


def test_the_tower_is_left_as_it_was_even_after_an_error(clip):
    pixels, patches = inputs()
    with torch.no_grad():
        plain = clip(pixels).image_embeds
        with pytest.raises(RuntimeError, match="stop"), prompts_of(3).replacing(clip.vision_model, patches):
            raise RuntimeError("stop")
        assert torch.equal(clip(pixels).image_embeds, plain)
    assert not clip.vision_model.embeddings.patch_embedding._forward_hooks
    assert not any(layer._forward_hooks for layer in clip.vision_model.encoder.layers)


def test_every_prompt_learns_where_it_was_used_and_nowhere_else(clip):
    pixels, _ = inputs()
    patches = torch.ones(3, 16, dtype=torch.bool)
    patches[0, 5] = patches[2, 7] = False
    prompts = prompts_of(3)
    with prompts.replacing(clip.vision_model, patches):
        clip(pixels).image_embeds.square().sum().backward()
    assert prompts.tokens.grad is not None
    used = prompts.tokens.grad.abs().sum(-1) > 0
    wanted = torch.zeros(3, 16, dtype=torch.bool)
    wanted[:, [5, 7]] = True
    assert torch.equal(used, wanted)


def test_a_patch_is_masked_only_if_every_pixel_is():
    mask = torch.zeros(1, 32, 32)
    mask[0, 8, 8] = 1  # the first pixel of the patch in the second row and column
    mask[0, 31, 31] = 1
    patches = patches_of(mask, 8)
    assert patches.nonzero()[:, 1].tolist() == [5, 15]
    many = torch.rand(20, 32, 32) > 0.99
    assert torch.equal(patches_of(many, 8), F.max_pool2d(many.float()[:, None], 8).flatten(1) > 0)


def test_starts_as_ovsegs_does():
    tokens = MaskPrompts(3, 256, 64).tokens.detach()
    assert tokens.shape == (3, 256, 64) and abs(float(tokens.std()) - 0.02) < 1e-3 and abs(float(tokens.mean())) < 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskPrompts(-1, 16, 32), "mask_prompt_depth: got -1"),
        (lambda: MaskPrompts(2, 16, 24), "mask prompts of 16 patches and width 24 do not fit"),
        (lambda: MaskPrompts(2, 9, 32), "mask prompts of 9 patches and width 32 do not fit"),
        (lambda: MaskPrompts(5, 16, 32), "got 5, want at most 4"),
    ],
)
def test_what_does_not_fit_is_one_line(clip, make, message):
    with pytest.raises(InputError, match=message) as caught, make().replacing(clip.vision_model, torch.ones(1, 16).bool()):
        pass
    assert "\n" not in str(caught.value)
