"""PMP as a network: shapes, what its answers may not depend on, and that every parameter learns."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pmpseg.inference import answers, ask_one_by_one, semantic_labels, soft_masks, upsample
from pmpseg.losses import Masks, SetLoss
from pmpseg.models import PMP, Prediction, Prompts
from pmpseg.models.attention import sine_position
from pmpseg.models.query_decoder import CHOICES, DecoderLayer, Features

NAMED_BY, PROMPT_ATTENTION, PROMPT_PLACE = (CHOICES[name] for name in ("named_by", "prompt_attention", "prompt_place"))

TINY = {"backbone": "test_resnet", "text_dim": 12, "dim": 32, "num_queries": 5, "num_layers": 3, "num_heads": 4, "ffn_dim": 32}


def build(prompt_attention: str = "pooled", seed: int = 0, prompt_place: str = "first") -> PMP:
    torch.manual_seed(seed)
    return PMP(**TINY, prompt_attention=prompt_attention, prompt_place=prompt_place).eval()


def prompts_of(batch: int = 2, count: int = 4, words: int = 3, seed: int = 1) -> Prompts:
    g = torch.Generator().manual_seed(seed)
    token_valid = torch.ones(batch, count, words, dtype=torch.bool)
    token_valid[:, 1, 2:] = False
    return Prompts(
        torch.randn(batch, count, words, 12, generator=g),
        token_valid,
        torch.randn(batch, count, 12, generator=g),
        torch.ones(batch, count, dtype=torch.bool),
    )


IMAGE = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("prompt_attention", PROMPT_ATTENTION)
@torch.no_grad()
def test_shapes(prompt_attention):
    found = build(prompt_attention)(IMAGE, prompts_of(), aux=True)
    assert isinstance(found, Prediction)
    assert found.mask_logits.shape == (2, 5, 16, 24) and found.class_logits.shape == (2, 5, 5)
    assert len(found.aux) == 3 and found.aux[0][0].shape == (2, 5, 16, 24)


@pytest.mark.parametrize("prompt_attention", [kind for kind in PROMPT_ATTENTION if kind != "shuffled"])
@torch.no_grad()
def test_the_order_of_prompts_does_not_matter(prompt_attention):
    network, prompts, order = build(prompt_attention), prompts_of(), torch.tensor([2, 0, 3, 1])
    a, b = network(IMAGE, prompts), network(IMAGE, prompts.select(order))
    assert torch.allclose(a.mask_logits, b.mask_logits, atol=1e-4)
    assert torch.allclose(a.class_logits[..., [2, 0, 3, 1, 4]], b.class_logits, atol=1e-4)


@pytest.mark.parametrize("prompt_attention", PROMPT_ATTENTION)
@torch.no_grad()
def test_padding_does_not_matter(prompt_attention):
    network, prompts = build(prompt_attention), prompts_of()
    garbage = prompts_of(count=3, words=5, seed=9)
    padded = Prompts(
        torch.cat([torch.nn.functional.pad(prompts.tokens, (0, 0, 0, 2), value=7.0), garbage.tokens], 1),
        torch.cat([torch.nn.functional.pad(prompts.token_valid, (0, 2)), garbage.token_valid], 1),
        torch.cat([prompts.pooled, garbage.pooled], 1),
        torch.tensor([[True] * 4 + [False] * 3] * 2),
    )
    a, b = network(IMAGE, prompts), network(IMAGE, padded)
    assert torch.allclose(a.mask_logits, b.mask_logits, atol=1e-4)
    assert torch.allclose(a.class_logits, b.class_logits[..., [0, 1, 2, 3, 7]], atol=1e-4)
    assert (b.class_logits.softmax(-1)[..., 4:7] == 0).all()


@torch.no_grad()
def test_prompts_guide_the_masks_only_when_attended():
    other = prompts_of(seed=5)
    for kind in PROMPT_ATTENTION:
        network = build(kind)
        same = torch.equal(network(IMAGE, prompts_of()).mask_logits, network(IMAGE, other).mask_logits)
        assert same == (kind in ("none", "shuffled"))


@torch.no_grad()
def test_prompts_that_are_read_first_guide_every_mask_and_later_ones_all_but_the_first():
    other = prompts_of(seed=5)
    for place in PROMPT_PLACE:
        network = build(prompt_place=place)
        a, b = network(IMAGE, prompts_of(), aux=True), network(IMAGE, other, aux=True)
        pairs = zip([m for m, _ in a.aux] + [a.mask_logits], [m for m, _ in b.aux] + [b.mask_logits], strict=True)
        same = [torch.equal(x, y) for x, y in pairs]
        assert same == [place != "first", False, False, False]


def test_shuffled_reads_the_other_images_prompts_in_training_and_theirs_later():
    network, prompts = build("shuffled").train(), prompts_of()
    assert network.query_decoder.prompt_tokens is not None
    other, strangers = prompts_of(seed=5), network.query_decoder.prompt_tokens.strangers
    mixed = Prompts(*(torch.cat([a[:1], b[1:]]) for a, b in zip(prompts._tensors(), other._tensors(), strict=True)))

    def masks(p):
        return network(IMAGE, p).mask_logits.detach()

    network.backbone.eval()  # batch norm would tie the images to each other
    assert torch.equal(masks(prompts)[1], masks(mixed)[1])  # image 1 reads image 0's, which are the same
    assert not torch.equal(masks(prompts)[0], masks(mixed)[0])
    kept = torch.nn.functional.normalize(mixed.pooled, dim=-1).flatten(0, 1)
    assert torch.equal(strangers[: len(kept)], kept) and torch.equal(strangers[len(kept)], kept[0])
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in build("pooled").parameters())


@torch.no_grad()
def test_words_matter_to_tokens_and_not_to_pooled():
    prompts, reworded = prompts_of(), prompts_of()
    reworded.tokens = reworded.tokens + torch.randn(reworded.tokens.shape)
    for kind in ("pooled", "tokens"):
        network = build(kind)
        same = torch.equal(network(IMAGE, prompts).mask_logits, network(IMAGE, reworded).mask_logits)
        assert same == (kind == "pooled")


@torch.no_grad()
def test_the_length_of_an_embedding_does_not_matter():
    prompts = prompts_of()
    scale = torch.tensor([1.0, 0.2, 5.0, 9.0])[:, None]
    longer = Prompts(prompts.tokens * 3, prompts.token_valid, prompts.pooled * scale, prompts.valid)
    network = build("pooled")
    a, b = network(IMAGE, prompts), network(IMAGE, longer)
    assert torch.allclose(a.class_logits, b.class_logits, atol=1e-4) and torch.allclose(a.mask_logits, b.mask_logits, atol=1e-4)


@torch.no_grad()
def test_queries_look_inside_their_masks_only_or_everywhere():
    torch.manual_seed(0)
    layer, query, image = DecoderLayer(16, 4, 16, True, None, "first").eval(), torch.randn(1, 3, 16), torch.randn(1, 20, 16)
    blocked = torch.zeros(1, 3, 20, dtype=torch.bool)
    blocked[:, :, 5:] = True

    def look(image):
        return layer(query, torch.zeros(3, 16), image, torch.zeros(20, 16), blocked, None)[0]

    outside, inside = image.clone(), image.clone()
    outside[:, 5:] += 1
    inside[:, :5] += 1
    assert torch.equal(look(image), look(outside)) and not torch.allclose(look(image), look(inside))
    decoder, guide, query = build().query_decoder, torch.randn(1, 32, 2, 3), torch.randn(1, 2, 32)
    masks = torch.einsum("bqd,bdhw->bqhw", decoder.mask_head(decoder.norm(query)), guide).flatten(2)
    assert torch.equal(decoder._blocked(query, guide)[0, 0], masks[0, 0] < 0)
    assert (masks[0, 0] < 0).any() and (masks[0, 0] > 0).any()
    guide = guide[..., masks[0, 1].reshape(2, 3)[0] < 0][:, :, :1]  # where the second query has no mask at all
    assert not decoder._blocked(query, guide)[0, 1].any()


@torch.no_grad()
def test_a_query_is_named_by_what_is_under_its_mask():
    torch.manual_seed(0)
    maps, logits, area = torch.randn(1, 32, 4, 6), torch.full((1, 5, 4, 6), -30.0), torch.ones(4, 6)
    logits[:, :, :, :3] = 30.0
    area[3] = 0  # padding
    elsewhere = maps.clone()
    elsewhere[..., 3:] = 9.0
    elsewhere[:, :, 3] = 9.0
    features, elsewhere = Features(maps, [], [], area), Features(elsewhere, [], [], area)
    query = torch.randn(1, 5, 32)
    for named_by in NAMED_BY:
        decoder = PMP(**TINY, named_by=named_by).eval().query_decoder
        found = decoder._evidence(query, logits, features)
        assert torch.allclose(found, decoder._evidence(query, logits, elsewhere), atol=1e-5)
        assert torch.allclose(found, decoder._evidence(query + 1, logits, features)) == (named_by == "mask")
        assert torch.allclose(found, decoder._evidence(query, -logits, features)) == (named_by == "query")
        if decoder.under_mask is not None:
            wanted = decoder.under_mask(maps[:, :, :3, :3].mean((2, 3)))[:, None].expand(1, 5, -1)
            assert torch.allclose(found if named_by == "mask" else found - query, wanted, atol=1e-4)


@torch.no_grad()
def test_an_image_does_not_see_its_neighbours():
    network, prompts = build(), prompts_of()
    alone = network(IMAGE[:1], Prompts(*(x[:1] for x in (prompts.tokens, prompts.token_valid, prompts.pooled, prompts.valid))))
    assert torch.allclose(network(IMAGE, prompts).mask_logits[:1], alone.mask_logits, atol=1e-4)


@torch.no_grad()
def test_a_plain_tensor_is_a_list_of_pooled_prompts():
    network, prompts = build(), prompts_of()
    shared = prompts.pooled[0]
    a = network(IMAGE, shared).mask_logits
    assert torch.equal(a, network(IMAGE, shared.expand(2, -1, -1)).mask_logits)


@pytest.mark.parametrize("named_by", NAMED_BY)
@pytest.mark.parametrize("prompt_attention", PROMPT_ATTENTION)
def test_every_parameter_learns_in_one_step(prompt_attention, named_by):
    torch.manual_seed(0)
    network = PMP(**TINY, prompt_attention=prompt_attention, named_by=named_by, pixel_head=True).train()
    masks = torch.rand(2, 4, 64, 96) > 0.5
    SetLoss(num_points=64, pixel_weight=1.0)(network(IMAGE, prompts_of()), masks, masks.flatten(2).any(-1))["loss"].backward()
    idle = [n for n, p in network.named_parameters() if p.requires_grad and (p.grad is None or not torch.isfinite(p.grad).all())]
    assert idle == []


@torch.no_grad()
def test_every_size_is_taken_and_padding_is_cut_off():
    network = build()
    for height, width in ((50, 70), (33, 64), (1, 7)):
        image = torch.rand(1, 3, height, width)
        found = network(image, prompts_of(1))
        assert upsample(found.mask_logits, (height, width)).shape == (1, 5, height, width)
        assert semantic_labels(found, (height, width), (41, 23)).shape == (1, 41, 23)


def test_upsample_keeps_a_linear_ramp():
    # Stride-4 cell centres lie at 1.5, 5.5, ...: a ramp sampled there must come back as the same ramp.
    ramp = (torch.arange(16) * 4 + 1.5).expand(1, 1, 8, 16)
    full = upsample(ramp, (30, 50))
    assert full.shape == (1, 1, 30, 50)
    assert torch.allclose(full[0, 0, 3, 2:50], torch.arange(2.0, 50.0), atol=1e-4)


def test_bad_images_are_named():
    network = build()
    with pytest.raises(ValueError, match=r"want float"):
        network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), prompts_of(1))
    with pytest.raises(ValueError, match="prompt_attention: got 'pool'"):
        PMP(**TINY, prompt_attention="pool")
    with pytest.raises(ValueError, match="named_by: got 'words', want one of query, mask, both"):
        PMP(**TINY, named_by="words")
    with pytest.raises(ValueError, match="prompt_place: got 'last', want one of first, after_image, after_self"):
        PMP(**TINY, prompt_place="last")


@torch.no_grad()
def test_chunks_of_classes_do_not_change_labels():
    network, prompts = build(), prompts_of(count=11)
    found = network(IMAGE, prompts)
    whole = semantic_labels(found, (64, 96), chunk=100)
    assert torch.equal(whole, semantic_labels(found, (64, 96), chunk=3))
    masks = upsample(found.mask_logits, (64, 96)).sigmoid()
    scores = torch.einsum("bqk,bqhw->bkhw", found.class_logits.softmax(-1)[..., :-1], masks)
    assert torch.equal(whole, scores.argmax(1))


def test_a_query_that_is_no_object_has_no_say_in_the_class_list():
    masks = torch.full((1, 2, 8, 8), 20.0)  # both cover all
    classes = torch.tensor([[[4.0, 0.0, 9.0], [0.0, 0.5, 0.0]]])  # the first is no object, or else class 0
    assert (semantic_labels(Prediction(masks, classes), (32, 32)) == 1).all()


@torch.no_grad()
def test_one_by_one_is_each_prompt_alone():
    network, prompts = build(), prompts_of()
    prompts.valid[1, 3] = False
    features = network.encode(IMAGE)
    masks, scores = ask_one_by_one(network, features, prompts)
    alone, score = soft_masks(network(IMAGE, prompts.select([2])))
    assert torch.allclose(masks[:, 2], alone[:, 0], atol=1e-5) and torch.allclose(scores[:, 2], score[:, 0], atol=1e-5)
    assert not masks[1, 3].any() and scores[1, 3] == 0


def test_soft_masks_by_hand():
    logits = torch.tensor([[[[10.0, -10.0]], [[-10.0, 10.0]]]])  # two queries, left and right
    names = torch.log(torch.tensor([[[0.9, 0.05, 0.05], [0.2, 0.7, 0.1]]]))
    masks, scores = soft_masks(Prediction(logits, names))
    assert torch.allclose(masks[0, :, 0], torch.tensor([[0.9, 0.2], [0.05, 0.7]]), atol=1e-3)
    assert torch.allclose(scores, torch.tensor([[0.9, 0.7]]), atol=1e-4)


def test_answers_by_hand():
    soft = torch.tensor([[[0.9, 0.5, 0.3]], [[0.1, 0.2, 0.05]]])
    scores = torch.tensor([0.8, 0.2])
    assert torch.equal(answers(soft, scores), torch.tensor([[[0.8, 0.8, 0.0]], [[0.0, 0.2, 0.0]]]))


def test_positions_differ_and_follow_the_axes():
    table = sine_position(torch.zeros(1, 32, 5, 7)).reshape(5, 7, 32)
    assert len(torch.unique(table.reshape(-1, 32).round(decimals=4), dim=0)) == 35
    assert torch.equal(table[0, :, 16:], table[3, :, 16:]) and torch.equal(table[:, 0, :16], table[:, 4, :16])


# ---- decoders and the options of prompt attention

OPTIONS = [
    {"decoder": "plain"},
    {"decoder": "plain", "prompt_place": "after_self", "pixel_decoder": "fpn"},
    {"pixel_decoder": "deformable", "encoder_layers": 2, "encoder_ffn_dim": 32},
    {"prompt_place": "after_self", "prompt_gate": "zero"},
    {"prompt_direction": "both"},
    {"prompt_direction": "both", "prompt_gate": "zero", "prompt_attention": "tokens"},
    {"prompt_layers": [0, 2], "prompt_direction": "both"},
    {"prompt_layers": [1]},
    {"prompt_queries": "repeated"},
    {"prompt_queries": "repeated", "prompt_attention": "tokens", "decoder": "plain"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(map(str, o.values())))
def test_every_option_trains_all_parameters_and_rebuilds_itself(options):
    torch.manual_seed(0)
    network = PMP(**TINY, **options).train()
    masks = torch.rand(2, 4, 64, 96) > 0.5
    SetLoss(num_points=64)(network(IMAGE, prompts_of()), masks, masks.flatten(2).any(-1))["loss"].backward()
    idle = [n for n, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert idle == []
    again = PMP(**json.loads(json.dumps(network.config)))
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        a, b = network.eval()(IMAGE, prompts_of()), again.eval()(IMAGE, prompts_of())
    assert torch.equal(a.mask_logits, b.mask_logits) and torch.equal(a.class_logits, b.class_logits) and a.aux == []


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"prompt_direction": "both"}, {"decoder": "plain"}, {"prompt_attention": "tokens"}])
def test_a_closed_gate_is_no_prompt_attention_bit_for_bit(options):
    torch.manual_seed(0)
    gated = PMP(**TINY, **options, prompt_gate="zero").eval()
    blind = PMP(**TINY, **options | {"prompt_attention": "none"}).eval()
    blind.load_state_dict({k: v for k, v in gated.state_dict().items() if k in blind.state_dict()})
    a, b = gated(IMAGE, prompts_of(), aux=True), blind(IMAGE, prompts_of(), aux=True)
    for (mask, names), (blind_mask, blind_names) in zip(
        [*a.aux, (a.mask_logits, a.class_logits)], [*b.aux, (b.mask_logits, b.class_logits)], strict=True
    ):
        assert torch.equal(mask, blind_mask) and torch.equal(names, blind_names)
    for name, p in gated.named_parameters():
        if name.endswith("gate"):
            p += 0.5
    assert not torch.allclose(gated(IMAGE, prompts_of()).mask_logits, b.mask_logits, atol=1e-3)


@torch.no_grad()
def test_repeated_queries_are_one_decode_a_prompt():
    torch.manual_seed(0)
    network, prompts = PMP(**TINY, prompt_queries="repeated").eval(), prompts_of()
    prompts.valid[1, 3] = False
    found = network(IMAGE, prompts, aux=True)
    assert found.mask_logits.shape == (2, 20, 16, 24) and found.class_logits.shape == (2, 20, 5)
    for k in range(4):
        alone, own = network(IMAGE, prompts.select([k]), aux=True), slice(5 * k, 5 * k + 5)
        assert torch.allclose(found.mask_logits[:, own], alone.mask_logits, atol=1e-5)
        assert torch.allclose(found.class_logits[:, own][..., [k, 4]], alone.class_logits, atol=1e-4)
        assert torch.allclose(found.aux[1][0][:, own], alone.aux[1][0], atol=1e-5)
        others = [j for j in range(4) if j != k]
        assert (found.class_logits[:, own][..., others] == -1e4).all()


def test_a_prompt_is_matched_to_its_own_queries():
    torch.manual_seed(0)
    masks = torch.rand(1, 2, 16, 16) > 0.5
    logits = torch.where(masks, 9.0, -9.0)[:, [1, 0]]  # each query has the mask of the prompt that it is not asked
    names = torch.tensor([[[0.0, -1e4, 0.0], [-1e4, 0.0, 0.0]]])
    there = torch.ones(1, 2, dtype=torch.bool)
    _, query, prompt = SetLoss(num_points=32).match(Masks(logits), names, masks.float(), there, torch.ones(1, 1, 16, 16))
    assert query.tolist() == prompt.tolist()


@torch.no_grad()
def test_both_directions_let_prompts_see_queries_and_the_layers_chosen_are_the_ones_that_read():
    torch.manual_seed(0)
    both = PMP(**TINY, prompt_direction="both", prompt_layers=[2, 0]).eval()
    layers = both.query_decoder.layers
    assert [layer.guide is not None for layer in layers] == [True, False, True]
    assert layers[0].guide.write is not None and layers[2].guide.write is None  # nobody would read what the last one wrote
    one = both(IMAGE, prompts_of()).mask_logits
    layers[0].guide.write.attention.out.bias += torch.randn(32)
    assert not torch.allclose(one, both(IMAGE, prompts_of()).mask_logits, atol=1e-4)


def test_a_network_without_a_list_of_its_own_wants_prompts_and_options_are_checked():
    with pytest.raises(ValueError, match="give prompts"):
        build()(IMAGE, None)
    for option, value in (("prompt_gate", "open"), ("prompt_direction", "write"), ("prompt_queries", "own"), ("decoder", "detr")):
        with pytest.raises(ValueError, match=f"{option}: got '{value}', want one of"):
            PMP(**TINY, **{option: value})
    with pytest.raises(ValueError, match="pixel_decoder: got 'unet', want one of fpn, fpn_light, deformable"):
        PMP(**TINY, pixel_decoder="unet")
    with pytest.raises(ValueError, match=r"'shuffled' .* wants prompt_queries 'shared'"):
        PMP(**TINY, prompt_attention="shuffled", prompt_queries="repeated")
    for sizes, message in (
        ({"dim": 2}, "dim: got 2, want a multiple of 4"),
        ({"num_heads": 0}, r"of num_heads \(0\)"),
        ({"encoder_layers": 0}, "encoder_layers: got 0, want 1 or more"),
        ({"encoder_ffn_dim": -1}, "encoder_ffn_dim: got -1, want 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            PMP(**TINY | {"pixel_decoder": "deformable"} | sizes)
    for layers in ([3], [-1], []):
        with pytest.raises(ValueError, match=r"prompt_layers: got .* want some of 0 to 2"):
            PMP(**TINY, prompt_layers=layers)


@torch.no_grad()
def test_masks_at_a_levels_size_are_masks_made_smaller():
    network = build()
    features = network.encode(IMAGE)
    query = torch.randn(2, 5, 32)
    decoder = network.query_decoder
    masks = torch.einsum("bqd,bdhw->bqhw", decoder.mask_head(decoder.norm(query)), features.mask_features)
    for level, guide in zip(features.levels, features.guides, strict=True):
        small = torch.nn.functional.interpolate(masks, size=level.shape[-2:], mode="bilinear").flatten(2)
        wanted = small < 0
        wanted &= ~wanted.all(-1, keepdim=True)
        assert (decoder._blocked(query, guide) == wanted)[small.abs() > 1e-4].all()


class Largest(TorchDispatchMode):
    """The number of elements of the largest floating tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return out


@torch.no_grad()
def test_no_map_of_every_class_is_ever_made():
    network, classes, (height, width) = build(), torch.randn(847, 12), (128, 160)
    with Largest() as largest:
        found = network(torch.rand(1, 3, height, width), classes)
        semantic_labels(found, (height, width))
    assert largest.elements <= 64 * height * width  # the chunk
    assert largest.elements < len(classes) * height * width / 10
    with Largest() as largest:
        torch.einsum("bqk,bqhw->bkhw", found.class_logits, upsample(found.mask_logits, (height, width)))
    assert largest.elements >= len(classes) * height * width  # it would be seen
