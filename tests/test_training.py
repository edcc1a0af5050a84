"""The training step's own parts: which prompts are asked, what learns how fast."""

import torch

from pmpseg.training.pmp import keep_few


def test_few_prompts_are_one_to_three_of_the_real_ones():
    torch.manual_seed(0)
    valid, present = torch.rand(4000, 9) > 0.2, torch.zeros(4000, 9, dtype=torch.bool)
    present[:, 4] = valid[:, 4]  # at most one is there
    valid[0] = False
    asked = keep_few(valid, present, 0.5)
    assert not (asked & ~valid).any()
    few = (asked != valid).any(1)
    assert 0.47 < few.float().mean() < 0.53
    sizes = asked[few].sum(1)
    assert set(sizes.tolist()) == {1, 2, 3} and all(0.28 < (sizes == n).float().mean() < 0.39 for n in (1, 2, 3))
    # Half of them hold the present one for sure, the others as chance has it: alone, too, it may be absent.
    single = asked[few][(sizes == 1) & present[few].any(1)]
    assert 0.5 < (single & present[few][(sizes == 1) & present[few].any(1)]).any(1).float().mean() < 0.65
    every = asked[few & ~present.any(1)].float().mean(0)
    assert every[4] == 0 and every[[0, 1, 2, 3, 5, 6, 7, 8]].std() < 0.03


def test_few_prompts_are_off_and_on():
    valid = torch.ones(50, 6, dtype=torch.bool)
    assert torch.equal(keep_few(valid, valid, 0.0), valid)
    assert (keep_few(valid, valid, 1.0).sum(1) <= 3).all()


def test_norms_biases_and_embeddings_do_not_decay():
    from pmpseg.models import PMP
    from pmpseg.training.pmp import parameter_groups

    options = {"depths": [1, 1, 1, 1], "embed_dim": 12, "num_heads": [1, 1, 1, 1]}
    backbone = {"name": "swin_tiny_patch4_window7_224", "options": options}
    sizes = {"dim": 16, "num_heads": 4, "num_layers": 1, "text_dim": 8}
    network = PMP(backbone=backbone["name"], backbone_config=backbone, pixel_decoder="deformable", **sizes)
    names = {id(p): name for name, p in network.named_parameters()}
    groups = parameter_groups(network, 1.0, 0.1, 0.05)
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    spared = ("bias", "norm", "table", "embedding", "query_position")
    assert not [name for name in decayed if any(part in name for part in spared)]
    assert any("attn.qkv.weight" in name for name in decayed) and "query_decoder.name_head.0.weight" in decayed
    assert {group["lr"] for group in groups} == {1.0, 0.1}
