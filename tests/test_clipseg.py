"""CLIPSeg: transformers' answers for the same weights, the paper's files, one encoding for all prompts, any size."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import make_tiny_clip
from tiny_clipseg import tiny_clipseg, write_clipseg
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel

from pmpseg import ImagePrompt, MixedPrompt, Segmenter, predict
from pmpseg.errors import InputError
from pmpseg.inference import answers, ask_one_by_one, ask_together, semantic_labels, soft_masks
from pmpseg.models import PMP, CLIPSeg, PixelPrediction, TextEncoder
from pmpseg.models.light_decoder import DecoderBlock, Spread
from pmpseg.models.token_towers import build_token_backbone
from pmpseg.segmenter import working_image
from pmpseg.supports import Showing, embed_supports, mix
from pmpseg.visual_prompts import visual_prompt
from pmpseg.vocabulary import Vocabulary

VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3}
VISION |= {"image_size": 224, "patch_size": 16, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 512}
SMALL = {"text_dim": 24, "dim": 16, "ffn_dim": 32}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


def small(clip, **options):
    torch.manual_seed(1)
    weights = {} if "backbone" in options else {"backbone_weights": str(clip)}
    return CLIPSeg(**(SMALL | weights | options)).eval()


# ---- transformers' weights


@pytest.mark.parametrize(("refined", "patch"), [(False, 8), (False, 16), (True, 16)])
@pytest.mark.parametrize("conditional", [0, 1])
def test_same_answers_as_transformers(tmp_path, refined, patch, conditional):
    theirs = tiny_clipseg(make_tiny_clip(tmp_path, patch_size=patch), refined, conditional_layer=conditional)
    ours = CLIPSeg.from_transformers(theirs).eval()
    text = torch.randn(3, 24)
    for side in (32, 64, 160):
        image, support = torch.rand(2, 3, side, side), torch.rand(3, 3, 48, 48)
        normal, seen = ((x - ours.backbone.mean) / ours.backbone.std for x in (image, support))
        with torch.no_grad():
            shown = theirs.get_conditional_embeddings(3, conditional_pixel_values=F.interpolate(seen, (32, 32)))
            assert torch.equal(ours.embed(F.interpolate(support, (32, 32))), shown)
            for prompts in (text, shown):
                want = [theirs(pixel_values=normal, conditional_embeddings=p.expand(2, -1)).logits for p in prompts]
                want, got = torch.stack(want, 1), ours(image, prompts)
                assert got.shape == (2, 3, side, side)
                assert (want - got).abs().max() <= 1e-4 * want.abs().max() and want.std() > 0.1


def test_twice_the_size_of_a_refined_head_is_taken_back(tmp_path):
    theirs = tiny_clipseg(make_tiny_clip(tmp_path, patch_size=32), refined=True, extract_layers=[0, 2])
    ours = CLIPSeg.from_transformers(theirs).eval()
    image, prompt = torch.rand(1, 3, 64, 64), torch.randn(1, 24)
    with torch.no_grad():
        want = theirs(pixel_values=(image - ours.backbone.mean) / ours.backbone.std, conditional_embeddings=prompt).logits
        assert want.shape == (1, 128, 128)
        torch.testing.assert_close(ours(image, prompt)[0], F.interpolate(want[None], (64, 64), mode="bilinear")[0])


def test_a_folder_of_transformers_is_opened_as_it_lies(tmp_path):
    theirs = write_clipseg(tmp_path)
    segmenter = Segmenter.load(tmp_path)
    assert (segmenter.image_size, segmenter.square, segmenter.vocabulary) == (64, True, None)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    answer = segmenter.segment(picture, ["red circle", "grass"])
    words = AutoTokenizer.from_pretrained(tmp_path)(["red circle", "grass"], padding=True, return_tensors="pt")
    image = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
    normal = (image - segmenter.network.backbone.mean) / segmenter.network.backbone.std
    with torch.no_grad():
        want = theirs(pixel_values=normal.expand(2, -1, -1, -1), **words).logits.sigmoid()
    got = np.stack([answer.probability(0), answer.probability(1)])
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
    assert (answer.mask(1) == (got[1] > 0.3)).all() and got[1].min() < 0.3 < got[1].max()
    # Saved and opened again, it is the same model in our format.
    again = Segmenter.load(segmenter.save(tmp_path / "ours"))
    assert again.square and np.array_equal(again.segment(picture, ["red circle", "grass"]).soft, answer.soft)


def test_what_is_no_clipseg_is_refused(tmp_path, clip):
    with pytest.raises(InputError, match="'clip' model; wanted a CLIPSeg"):
        CLIPSeg.from_transformers(clip)
    with pytest.raises(InputError, match="CLIPModel, want a CLIPSegForImageSegmentation"):
        CLIPSeg.from_transformers(CLIPModel.from_pretrained(clip))
    model = tiny_clipseg(clip)
    model.decoder.film_gate = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"no place for decoder.film_gate.weight \(2, 2\), and 1 more"):
        CLIPSeg.from_transformers(model)
    model = tiny_clipseg(clip, conditional_layer=3)
    with pytest.raises(InputError, match="conditional_layer: got 3, want 0 to 2"):
        CLIPSeg.from_transformers(model)


def test_a_folder_that_is_cut_short_is_one_line(tmp_path):
    write_clipseg(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot open"):
        Segmenter.load(tmp_path)


# ---- the paper's files


class Original(nn.Module):
    """The parts of the paper's decoder under its own names, run by PyTorch's own layers."""

    def __init__(self, dim=16, width=32, text_dim=24, patch=8):
        super().__init__()
        self.film_mul, self.film_add = nn.Linear(text_dim, dim), nn.Linear(text_dim, dim)
        self.reduce = nn.Linear(width, dim)  # which nothing reads
        self.trans_conv = nn.ConvTranspose2d(dim, 1, patch, patch)
        self.reduces = nn.ModuleList(nn.Linear(width, dim) for _ in range(3))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(dim, 4) for _ in range(3))

    def forward(self, activations, prompt):  # (N, B, W) each, the deepest first
        a = None
        for i, activation in enumerate(activations):
            a = self.reduces[i](activation) + (0 if a is None else a)
            if i == 0:
                a = self.film_mul(prompt) * a + self.film_add(prompt)
            a = self.blocks[i](a)
        a = a[1:].permute(1, 2, 0)
        side = round(a.shape[2] ** 0.5)
        return self.trans_conv(a.unflatten(2, (side, side)))


def test_the_papers_weights(clip, tmp_path):
    torch.manual_seed(3)
    original = Original().eval()
    torch.save(original.state_dict(), tmp_path / "rd64-uni.pth")
    for source in (original.state_dict(), tmp_path / "rd64-uni.pth"):
        network = CLIPSeg.from_original(source, str(clip), blocks=(0, 1, 3)).eval()
        assert network.config["ffn_dim"] == 2048 and network.config["dim"] == 16
        image, prompt = torch.rand(1, 3, 64, 64), torch.randn(1, 24)
        vision = CLIPModel.from_pretrained(clip).vision_model
        normal = (image - network.backbone.mean) / network.backbone.std
        assert network.backbone.mean.flatten()[0] == pytest.approx(0.485)
        with torch.no_grad():
            states = vision(normal, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
            want = original([states[block + 1].transpose(0, 1) for block in (3, 1, 0)], prompt)
            torch.testing.assert_close(network(image, prompt), want, atol=1e-5, rtol=1e-5)


def test_a_file_that_is_not_the_papers_is_one_line(clip, tmp_path):
    with pytest.raises(InputError, match="holds no weights of the paper's CLIPSeg"):
        CLIPSeg.from_original({"weight": torch.ones(2)}, str(clip))
    state = Original().state_dict()
    with pytest.raises(InputError, match=r"got \[0, 1\], want 3 of them"):
        CLIPSeg.from_original(state, str(clip), blocks=(0, 1))
    with pytest.raises(InputError, match="no place for extra_blocks"):
        CLIPSeg.from_original(state | {"extra_blocks.0.norm1.weight": torch.ones(16)}, str(clip), (0, 1, 2))
    del state["reduces.1.bias"]
    with pytest.raises(InputError, match=r"nothing for reduce.1.bias"):
        CLIPSeg.from_original(state, str(clip), (0, 1, 2))


# ---- the network


def test_the_papers_number_of_parameters():
    backbone = {"name": "clip", "vision": VISION}
    network = CLIPSeg(backbone_config=backbone)
    assert network.backbone.blocks == (3, 7, 9)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert trainable == 1_122_369 - 49_216  # the released class has a layer that nothing reads (papers.md 3.1)


def test_the_image_is_encoded_once_and_no_block_in_vain(clip):
    network = small(clip, blocks=(0, 2))
    ran = []
    for i, layer in enumerate(network.backbone.tower.vision.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    network(torch.rand(1, 3, 64, 64), torch.randn(40, 24))
    assert ran == [0, 1, 2]


@pytest.mark.parametrize("options", [{}, {"conditional_layer": 1}, {"decoder": "mlp"}, {"upsampling": "refined"}])
def test_prompts_do_not_see_each_other(clip, options):
    network, image, prompts = small(clip, **options), torch.rand(2, 3, 64, 96), torch.randn(2, 9, 24)
    with torch.no_grad():
        together = network(image, prompts)
        for k in range(9):
            torch.testing.assert_close(network(image, prompts[:, k : k + 1])[:, 0], together[:, k], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(network(image[1:], prompts[1])[0], together[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(network(image, prompts), together, atol=1e-5, rtol=1e-5)  # with gradients, all at once
    assert together.std(1).mean() > 1e-3


@pytest.mark.parametrize("upsampling", ["transposed", "refined", "bilinear"])
@pytest.mark.parametrize("size", [(64, 64), (41, 90), (9, 8), (1, 1), (64, 120)])
def test_logits_have_the_images_size(clip, upsampling, size):
    network, image = small(clip, upsampling=upsampling), torch.rand(1, 3, *size)
    with torch.no_grad():
        got = network(image, torch.ones(2, 24))
        assert got.shape == (1, 2, *size)
        # Padded by hand with the mean colour, which is zero once normalised, it is the same.
        whole = network.backbone.mean.expand(1, 3, -(-size[0] // 8) * 8, -(-size[1] // 8) * 8).clone()
        whole[..., : size[0], : size[1]] = image
        torch.testing.assert_close(network(whole, torch.ones(2, 24))[..., : size[0], : size[1]], got, atol=1e-5, rtol=1e-5)


def mirrored(network, axis):
    """The network whose kernels and positions are mirrored: it must answer a mirrored image with the mirrored answer."""
    other = copy.deepcopy(network)
    for module in other.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.data = module.weight.data.flip(axis)
    table = other.backbone.tower.vision.embeddings.position_embedding.weight
    side = round((len(table) - 1) ** 0.5)
    table.data[1:] = table.data[1:].unflatten(0, (side, side)).flip(axis % 4 - 2).flatten(0, 1)
    return other


@pytest.mark.parametrize("upsampling", ["transposed", "refined", "bilinear"])
@pytest.mark.parametrize("axis", [-1, -2])
def test_a_mirrored_network_on_a_mirrored_image(clip, upsampling, axis):
    network, image, prompt = small(clip, upsampling=upsampling), torch.rand(1, 3, 40, 96), torch.randn(1, 24)
    with torch.no_grad():
        got, want = mirrored(network, axis)(image.flip(axis), prompt), network(image, prompt).flip(axis)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (want - want.flip(axis)).abs().max() > 0.01


def test_inputs_are_scaled_before_the_first_layers(clip):
    network, image, prompts = small(clip, input_scale=0.3), torch.rand(1, 3, 32, 32), torch.randn(2, 24)
    with torch.no_grad():
        got = network(image, prompts)
        for layer in (*network.reduce, network.film_scale, network.film_shift):
            layer.weight *= 0.3
        network.input_scale = 1.0
        torch.testing.assert_close(network(image, prompts), got)
    assert network.config["input_scale"] == 0.3


def test_a_decoder_block_is_pytorchs():
    torch.manual_seed(0)
    theirs, ours = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), DecoderBlock(16, 4, 32, 0.1).eval()
    with torch.no_grad():
        for q, part in zip("qkv", theirs.self_attn.in_proj_weight.chunk(3), strict=True):
            getattr(ours.attention, q).weight.copy_(part)
            getattr(ours.attention, q).bias.zero_()
        ours.attention.out.load_state_dict(theirs.self_attn.out_proj.state_dict())
        ours.ffn[0].load_state_dict(theirs.linear1.state_dict())
        ours.ffn[3].load_state_dict(theirs.linear2.state_dict())
        x = torch.randn(2, 7, 16)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_a_decoder_block_drops_attention_weights_too():
    torch.manual_seed(0)
    block, x = DecoderBlock(16, 4, 32, 0.5).train(), torch.randn(2, 7, 16)
    block.dropout.p = block.ffn[2].p = 0.0  # the other places
    first, second = block(x), block(x)
    assert (first - second).abs().max() > 1e-3 and torch.equal(block.eval()(x), block(x))


def test_texts_of_another_width_than_the_clips_get_a_projection(clip):
    network = small(clip, text_dim=40)
    assert network.embed(torch.rand(2, 3, 32, 32)).shape == (2, 40) and small(clip).image_projection is None


def test_spread_is_a_transposed_convolution():
    layer, x = Spread(6, 2, 4), torch.randn(2, 6, 3, 5)
    torch.testing.assert_close(layer(x), nn.ConvTranspose2d.forward(layer, x))
    assert layer(x).shape == (2, 2, 12, 20)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoder": "mlp", "blocks": (2,)},
        {"backbone": "vit_tiny_patch16_224", "blocks": (1, 2)},
        {"upsampling": "refined", "conditional_layer": 2, "blocks": (0, 1, 3)},
        {"upsampling": "bilinear", "backbone_frozen": False},
    ],
)
def test_all_that_learns_gets_a_gradient_and_config_rebuilds(clip, options):
    network = small(clip, **options).train()
    image, shown = torch.rand(2, 3, 48, 64), torch.rand(2, 3, 32, 32)
    prompts = torch.stack([torch.randn(2, 24), network.embed(shown)], 1)
    network(image, prompts).square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    learned = [name for name, p in network.named_parameters() if p.grad is not None]
    assert any(name.startswith("backbone.") for name in learned) == ("backbone_frozen" in options)
    again = CLIPSeg(**json.loads(json.dumps(network.config)))
    again.load_state_dict(network.state_dict())
    network.eval(), again.eval()
    with torch.no_grad():
        assert torch.equal(again(image, prompts), network(image, prompts))


def test_a_frozen_encoder_stays_in_evaluation(clip):
    network = small(clip).train()
    assert not network.backbone.tower.training and network.blocks[0].training


def test_vitseg_reads_what_timm_gives():
    network = small(None, backbone="vit_tiny_patch16_224", blocks=(3, 7, 9), image_projection="fixed")
    net, image = network.backbone.tower.net, torch.rand(1, 3, 64, 96)
    tokens = []
    for block in (3, 7, 9):
        net.blocks[block].register_forward_hook(lambda _, __, out: tokens.append(out))
    got = network.backbone(image)
    assert len(tokens) == 3 and all(torch.equal(a, b) for a, b in zip(got, tokens, strict=True)) and got[0].shape == (1, 25, 192)
    assert not network.image_projection.weight.requires_grad
    normal = (image - network.backbone.mean) / network.backbone.std
    torch.testing.assert_close(network.embed(image), network.image_projection(net(normal)))


def test_random_weights_of_the_same_shape(clip):
    a, b = (build_token_backbone("clip", clip, random=random).tower.state_dict() for random in (False, True))
    assert a.keys() == b.keys()
    assert all(not torch.equal(a[k], b[k]) for k in a if k.endswith("weight") and "norm" not in k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "conv"}, "decoder: got 'conv', want one of transformer, mlp"),
        ({"upsampling": "nearest"}, "upsampling: got 'nearest'"),
        ({"dim": 18}, "dim 18 does not divide into 4 heads"),
        ({"blocks": (2, 1)}, r"blocks: got \[2, 1\], want some of 0 to 3 in rising order"),
        ({"blocks": (0, 4)}, r"blocks: got \[0, 4\], want some of 0 to 3 in rising"),
        ({"conditional_layer": 3, "blocks": (0, 1, 3)}, "conditional_layer: got 3, want 0 to 2"),
        ({"backbone": "resnet18"}, "is no plain ViT"),
        ({"backbone": "clip"}, "got no weights"),
    ],
)
def test_bad_settings_are_one_line(clip, options, message):
    with pytest.raises(InputError, match=message):
        small(clip, **options)


@pytest.mark.parametrize("image", [torch.rand(3, 32, 32), torch.rand(1, 1, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)])
def test_bad_images_are_one_line(clip, image):
    with pytest.raises(ValueError, match=r"want float \(B, 3, H, W\)"):
        small(clip)(image, torch.randn(1, 24))


# ---- answers


def test_answers_of_a_network_without_queries():
    logits = torch.tensor([[[[4.0, -1.0]], [[1.0, -0.5]], [[-3.0, -2.0]]]])
    prediction = PixelPrediction(logits)
    soft, scores = soft_masks(prediction)
    assert torch.equal(soft, logits.sigmoid()) and torch.equal(scores, logits.sigmoid().amax((2, 3)))
    assert torch.equal(answers(soft, scores, by_pixel=True), soft)
    assert semantic_labels(prediction, (1, 2)).tolist() == [[[0, 1]]]
    assert semantic_labels(prediction, (1, 2), chunk=1).tolist() == [[[0, 1]]]
    assert semantic_labels(prediction, (1, 2), factors={2: 100.0}).tolist() == [[[2, 2]]]
    assert semantic_labels(prediction, (1, 2), (2, 4)).shape == (1, 2, 4)


def test_alone_and_together_are_the_same(clip):
    network, text = small(clip), TextEncoder(clip, normalize=False)
    prompts = text.encode(["red circle", "grass", "a a"])
    with torch.no_grad():
        features = network.encode(torch.rand(1, 3, 32, 48))
        soft, scores = ask_one_by_one(network, features, prompts)
        assert torch.equal(soft, soft_masks(ask_together(network, features, prompts))[0]) and scores.shape == (1, 3)


def test_a_segmenter_of_clipseg_has_no_instances_and_no_second_stage(clip):
    segmenter = Segmenter(small(clip), TextEncoder(clip, normalize=False), None, 64)
    picture = np.zeros((20, 30, 3), np.uint8)
    assert segmenter.segment(picture, ["grass"], together=True).labels.shape == (20, 30)
    with pytest.raises(InputError, match="no queries to tell instances apart"):
        segmenter.panoptic(picture, ["grass"])


# ---- prompts by example


@pytest.fixture
def asked(clip):
    return Segmenter(small(clip), TextEncoder(clip, normalize=False), None, 64)


def picture_and_mask(seed=0):
    rng = np.random.default_rng(seed)
    mask = np.zeros((40, 56), bool)
    mask[8:30, 10:33] = True
    return rng.integers(0, 256, (40, 56, 3), dtype=np.uint8), mask


def test_examples_and_mixes_beside_words(asked):
    query = picture_and_mask(5)[0]
    one, two = ImagePrompt(*picture_and_mask(1)), ImagePrompt(*picture_and_mask(2))
    prompts = ["grass", one, MixedPrompt("grass", [one, two], 0.25), MixedPrompt(None, [two]), MixedPrompt("grass", [])]
    answer = asked.segment(query, prompts)
    assert answer.prompts == ["grass", "example 2", "grass + example", "example 4", "grass"]
    # By hand: raw embeddings, examples averaged first, the text's share in the sum.
    shown = [visual_prompt(*p.tensors(), size=64) for p in (one, two)]
    with torch.no_grad():
        a, b = (asked.network.embed(x)[0] for x in shown)
        grass = asked.text.encode(["grass"]).pooled[0, 0]
        by_hand = torch.stack([grass, a, 0.25 * grass + 0.75 * (a + b) / 2, b, grass])
        want = asked.network(working_image(Image.fromarray(query), 64), by_hand).sigmoid()
    torch.testing.assert_close(answer.soft, want[0])
    assert (answer.soft[0] - answer.soft[1]).abs().max() > 1e-3


def test_an_example_is_embedded_once(asked, monkeypatch):
    calls = []
    embed = asked.network.embed
    monkeypatch.setattr(asked.network, "embed", lambda x: calls.append(len(x)) or embed(x))
    example = ImagePrompt(*picture_and_mask(1))
    first, second = (asked.segment(picture_and_mask(seed)[0], [example]) for seed in (3, 4))
    assert calls == [1] and (first.soft - second.soft).abs().max() > 1e-3


def test_embeddings_of_supports(clip):
    network, showing = small(clip), Showing(32, "crop")
    images = torch.randint(0, 256, (2, 3, 2, 3, 40, 40), dtype=torch.uint8)
    masks = torch.zeros(2, 3, 2, 40, 40, dtype=torch.bool)
    masks[..., 5:20, 7:30] = True
    valid = torch.tensor([[[1, 1], [1, 0], [0, 0]], [[0, 1], [0, 0], [1, 1]]], dtype=torch.bool)
    with torch.no_grad():
        shown, has = embed_supports(network.embed, showing, images, masks, valid)
        assert torch.equal(has, valid.any(2)) and shown[~has].abs().max() == 0
        for b, k in has.nonzero().tolist():
            own = [network.embed(showing(images[b, k, s, None] / 255, masks[b, k, s, None])) for s in range(2) if valid[b, k, s]]
            torch.testing.assert_close(shown[b, k], torch.cat(own).mean(0), atol=1e-5, rtol=1e-5)
        none, has = embed_supports(network.embed, showing, images, masks, valid & False)
        assert not has.any() and none.shape == (2, 3, 24) and none.abs().max() == 0


@pytest.mark.parametrize("normalize", [False, True])
def test_mixing_leaves_what_has_no_example(clip, normalize):
    text = TextEncoder(clip, normalize=normalize).encode(["red circle", "grass", "a a a"])
    shown, has = torch.randn(1, 3, 24), torch.tensor([[True, False, True]])
    mixed = mix(text, shown, has, torch.tensor([[0.0, 0.0, 1.0]]), normalize)
    assert torch.equal(mixed.pooled[0, 1:], text.pooled[0, 1:]) and torch.equal(mixed.tokens[0, 1:], text.tokens[0, 1:])
    want = F.normalize(shown[0, 0], dim=0) if normalize else shown[0, 0]
    torch.testing.assert_close(mixed.pooled[0, 0], want)
    assert mixed.token_valid[0, 0].tolist() == [True] + [False] * (text.tokens.shape[2] - 1)
    torch.testing.assert_close(mixed.tokens[0, 0, 0], want)
    half = mix(text, shown, has, 0.5, normalize).pooled[0, 0]
    want = (text.pooled[0, 0] + want) / 2
    torch.testing.assert_close(half, F.normalize(want, dim=0) if normalize else want)


def test_a_model_of_words_refuses_examples(clip):
    network = PMP(text_dim=24, backbone="conv", dim=32, num_queries=4, num_layers=1, num_heads=4, ffn_dim=32)
    segmenter = Segmenter(network, TextEncoder(clip), Vocabulary.of(["grass"]), 64)
    with pytest.raises(InputError, match="takes no images as prompts"):
        segmenter.segment(picture_and_mask()[0], [ImagePrompt(*picture_and_mask())])
    # With an encoder beside it, it takes them, and keeps it in its folder.
    segmenter.image_encoder = build_token_backbone("clip", clip).eval()
    answer = segmenter.segment(picture_and_mask()[0], [ImagePrompt(*picture_and_mask())])
    assert answer.mask(0).shape == (40, 56)


def test_an_image_encoder_is_saved(clip, tmp_path):
    network = PMP(text_dim=24, backbone="conv", dim=32, num_queries=4, num_layers=1, num_heads=4, ffn_dim=32)
    made = Segmenter(network, TextEncoder(clip), Vocabulary.of(["grass"]), 64, image_encoder=build_token_backbone("clip", clip))
    again = Segmenter.load(made.save(tmp_path / "model"))
    query, example = picture_and_mask()[0], ImagePrompt(*picture_and_mask(1))
    torch.testing.assert_close(again.segment(query, [example]).soft, made.segment(query, [example]).soft, atol=1e-6, rtol=1e-5)


def test_predict_by_example(clip, tmp_path, capsys):
    model = Segmenter(small(clip), TextEncoder(clip, normalize=False), None, 64, square=True).save(tmp_path / "model")
    picture, mask = picture_and_mask(1)
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    command = [str(model), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    example = ["--prompt-image", str(tmp_path / "a.png"), "--prompt-mask", str(tmp_path / "m.png")]
    assert predict.main([*command, "--prompts", "grass", *example]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"a_overlay.png", "a_mask_00_grass.png", "a_mask_01_example-a.png", "predictions.json"}
    assert predict.main([*command, "--prompts", "grass", *example, "--text-weight", "0.3"]) == 0
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [c["name"] for c in found["categories"]] == ["grass + example"] and len(found["annotations"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing is asked"),
        (["--prompt-image", "no.png"], "no.png: no such file"),
        (["--prompt-image", "a.png", "--prompt-mask", "m.png", "--prompt-mask", "m.png"], "a mask for each, or none"),
        (["--prompts", "a; b", "--prompt-image", "a.png", "--text-weight", "0.5"], "got 2 prompts and 1 examples"),
        (["--prompts", "a", "--prompt-image", "a.png", "--text-weight", "2"], "text-weight: got 2, want 0"),
        (["--prompt-image", "a.png", "--prompt-mask", "small.png"], "got 5 x 5 pixels for an image of 56 x 40"),
    ],
)
def test_bad_examples_are_one_line_and_leave_nothing(clip, tmp_path, monkeypatch, options, message):
    model = Segmenter(small(clip), TextEncoder(clip, normalize=False), None, 64).save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    picture, mask = picture_and_mask(1)
    Image.fromarray(picture).save("a.png")
    Image.fromarray(mask).save("m.png")
    Image.fromarray(mask[:5, :5] | True).save("small.png")
    with pytest.raises(InputError, match=message):
        predict.main([str(model), "a.png", "--out", "out", *options])
    assert not Path("out").exists()
