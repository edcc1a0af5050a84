"""The training step's own parts: which prompts are asked, what learns how fast."""

import pytest
import torch

from pmpseg.errors import InputError
from pmpseg.models import PMP
from pmpseg.models.prompts import as_prompts
from pmpseg.models.query_decoder import Features, QueryDecoder
from pmpseg.training.base import find_targets, poly
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


# what is to be found


def batch_of(seed: int, segments: bool) -> tuple[dict, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 6, (3, 5, 7), generator=g)
    labels[labels == 5] = 255
    batch = {"labels": labels, "prompt_class": torch.tensor([[4, -1, 9, 0, 2], [1, 0, 8, 7, -1], [9, 8, 7, 6, -1]])}
    if segments:
        batch |= {"segments": torch.randint(-1, 4, (3, 5, 7), generator=g)}
        batch |= {"segment_prompt": torch.tensor([[3, 3, -1, 0, 1, 2], [4, -1, 1, 1, 0, -1], [-1] * 6])}
    valid = batch["prompt_class"] >= 0
    valid[0, 0] = False
    return batch, valid


@pytest.mark.parametrize("segments", [False, True])
def test_targets_by_loop(segments):
    for seed in range(5):
        batch, valid = batch_of(seed, segments)
        masks, present, prompt = found = find_targets(batch, valid)
        for b in range(3):
            if segments:
                pairs = [(k, batch["segments"][b] == n) for n, k in enumerate(batch["segment_prompt"][b].tolist()) if k >= 0]
            else:
                pairs = [(k, batch["labels"][b] == c) for k, c in enumerate(batch["prompt_class"][b].tolist())]
            wanted = [(k, m.tolist()) for k, m in pairs if valid[b, k] and m.any()]
            assert [(int(prompt[b, m]), masks[b, m].tolist()) for m in range(len(present[b])) if present[b, m]] == wanted
            assert not masks[b, ~present[b]].any()
            assert found.of_prompts(5)[b].nonzero().flatten().tolist() == sorted({k for k, _ in wanted})
        assert present.shape[1] == max(1, int(present.sum(1).max()))


def test_targets_of_a_batch_in_which_nothing_is():
    batch, valid = batch_of(0, segments=True)
    no_segment = {"segments": batch["segments"], "segment_prompt": torch.zeros(3, 0, dtype=torch.long)}
    for some in (no_segment, {"labels": batch["labels"] * 0 + 255}):
        masks, present, prompt = find_targets({"prompt_class": batch["prompt_class"]} | some, valid)
        assert masks.shape == (3, 1, 5, 7) and not masks.any() and not present.any() and prompt.shape == (3, 1)


def test_a_step_on_segments_learns_each_instance():
    """Through the module: two things of one class are two masks, and all that learns gets a gradient."""
    from pmpseg.training import PMPModule

    module = PMPModule(backbone="conv", backbone_weights=None, dim=16, num_heads=2, num_queries=4, num_layers=1, ffn_dim=16)
    module.log = lambda *_, **__: None
    seen = {}
    loss = module.loss.forward
    module.loss.forward = lambda *args: seen.update(args=args) or loss(*args)
    segments = torch.full((1, 64, 64), -1)
    segments[0, :8, :8], segments[0, 52:, 52:] = 0, 1
    batch = {"image": torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8), "labels": torch.where(segments < 0, 255, 3)}
    batch |= {"prompts": [["sky", "car"]], "prompt_class": torch.tensor([[0, 3]])}
    batch |= {"segments": segments, "segment_prompt": torch.tensor([[1, 1]])}
    module.training_step(batch, 0).backward()
    _, masks, present, counted, _, prompt, every = seen["args"]
    assert masks.sum((0, 2, 3)).tolist() == [64, 144] and present.all() and prompt.tolist() == [[1, 1]] and every is None
    assert counted.sum() == 208
    assert not [n for n, p in module.network.named_parameters() if p.requires_grad and p.grad is None]


# options of the decoder and of the schedule


def test_warm_up_and_power():
    """detectron2's WarmupPolyLR by its formula."""
    rate = poly(100, 10, 1e-3)
    assert rate(0) == pytest.approx(1e-3) and rate(100) == 0
    assert rate(5) == pytest.approx((1e-3 * 0.5 + 0.5) * 0.95**0.9) and rate(55) == pytest.approx(0.45**0.9)
    assert poly(100, 0)(0) == 1


def decoder(**options):
    torch.manual_seed(0)
    return QueryDecoder(dim=16, text_dim=8, num_queries=3, num_layers=2, num_heads=2, ffn_dim=32, decoder="plain", **options)


def test_dropout_is_there_in_training_only():
    features = Features(torch.randn(1, 16, 4, 4), [torch.randn(1, 16, 2, 2)], [], torch.ones(4, 4))
    prompts = as_prompts(torch.randn(2, 8), 1)
    plain, dropped = decoder(), decoder(dropout=0.5)
    assert plain.state_dict().keys() == dropped.state_dict().keys()
    answers = [net(features, prompts).mask_logits for net in (plain, plain, dropped, dropped)]
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[2], answers[3])
    assert torch.equal(dropped.eval()(features, prompts).mask_logits, plain.eval()(features, prompts).mask_logits)


def test_the_head_of_names_as_ovseg_has_it():
    net = decoder(name_hidden=20, name_scale=100.0, named_by="query", prompt_attention="none")
    assert [tuple(p.shape) for p in net.name_head.parameters()] == [(20, 16), (20,), (8, 20), (8,)]
    assert not net.log_scale.requires_grad
    features, asked = Features(torch.randn(1, 16, 4, 4), [torch.randn(1, 16, 2, 2)], [], torch.ones(4, 4)), torch.randn(2, 8)
    logits = net(features, as_prompts(asked, 1)).class_logits
    net.log_scale.data.fill_(0.0)  # cosines
    torch.testing.assert_close(logits, 100 * net(features, as_prompts(asked, 1)).class_logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, "dropout: got 1"),
        ({"name_hidden": 0}, "name_hidden: got 0"),
        ({"name_scale": 101.0}, "name_scale: got 101"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        decoder(**options)


def test_a_network_of_before_these_options_loads():
    """Its config lacks them; its weights are the same."""
    network = PMP(backbone="conv", dim=16, num_heads=2, num_layers=1, num_queries=3, ffn_dim=16, text_dim=8)
    config = {k: v for k, v in network.config.items() if k not in ("dropout", "name_hidden", "name_scale")}
    PMP(**config).load_state_dict(network.state_dict())
