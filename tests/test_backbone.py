"""Backbones: four maps from every kind of tower, normalisation inside, weights, rebuilding from config."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import make_tiny_clip
from transformers import CLIPVisionModel

from pmpseg.errors import InputError
from pmpseg.models import build_backbone
from pmpseg.models.backbone import Backbone
from pmpseg.models.weights import load_weights

NAMES = ["resnet18", "convnext_atto", "tf_efficientnet_lite0", "swin_tiny_patch4_window7_224"]
VITS = ["vit_tiny_patch16_224", "test_vit"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


def build(name: str, clip: Path) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(name, weights=clip if name == "clip" else None)


@pytest.mark.parametrize("name", [*NAMES, *VITS, "clip"])
def test_every_kind_of_tower(name: str, clip: Path):
    backbone = build(name, clip)
    assert backbone.strides == (4, 8, 16, 32) and len(backbone.channels) == 4
    # The square that the ViTs and Swin were made for, then one that they were not.
    for height, width in [(224, 224), (96, 160)] if name in (NAMES[3], VITS[0]) else [(96, 160)]:
        maps = backbone(torch.rand(2, 3, height, width))
        levels = zip(backbone.channels, backbone.strides, strict=True)
        sizes = [(2, c, height // s, width // s) for c, s in levels]
        assert [tuple(m.shape) for m in maps] == sizes
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    unreached = [key for key, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert unreached == []

    config = json.loads(json.dumps(backbone.config))
    assert config == backbone.config
    again = build_backbone(name, config=config)
    assert list(again.state_dict()) == list(backbone.state_dict()) and again.config == config
    again.load_state_dict(backbone.state_dict())
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(backbone.eval()(image), again.eval()(image), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("name", "nhwc"), [("resnet18", False), ("swin_tiny_patch4_window7_224", True)])
def test_is_timm_on_a_normalised_image(name: str, nhwc: bool):
    backbone = build_backbone(name).eval()
    # At 224 px all maps are whole windows, where timm's order of padding and shifting is as good as ours.
    net = timm.create_model(name, features_only=True, **({"always_partition": True} if nhwc else {})).eval()
    net.load_state_dict(backbone.tower.net.state_dict())
    image = torch.rand(1, 3, 224, 224)
    mean, std = (torch.tensor(net.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        wanted = [m.permute(0, 3, 1, 2) if nhwc else m for m in net((image - mean) / std)][-4:]
        for got, want in zip(backbone(image), wanted, strict=True):
            torch.testing.assert_close(got, want)


def test_vit_reads_the_chosen_blocks_only():
    torch.manual_seed(0)
    backbone = build_backbone("test_vit", blocks=[3, 1], width=32).eval()
    assert backbone.config["blocks"] == [1, 3] and backbone.channels == (32,) * 4
    assert len(backbone.tower.net.blocks) == 4
    net = timm.create_model("test_vit", dynamic_img_size=True, num_classes=0).eval()
    net.load_state_dict(backbone.tower.net.state_dict(), strict=False)
    x = torch.rand(1, 3, 96, 160)
    with torch.no_grad():
        wanted = net.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
        for got, want in zip(backbone.tower(x), wanted, strict=True):
            torch.testing.assert_close(got, want)
    with pytest.raises(InputError, match="wanted 0 to 5"):
        build_backbone("test_vit", blocks=[6])
    with pytest.raises(InputError, match="multiple of 32"):
        build_backbone("test_vit", width=40)


def test_frozen_clip_is_transformers_own(clip: Path):
    backbone = build_backbone("clip", weights=clip, blocks=[0, 2], frozen=True)
    assert backbone.config["mean"] == [0.5, 0.4, 0.3]  # of the folder's preprocessor
    assert len(backbone.tower.vision.encoder.layers) == 3  # block 3 is not read, so not kept
    assert not backbone.tower.training and backbone.pyramid.training and backbone.training
    model = CLIPVisionModel.from_pretrained(clip).eval()
    image = torch.rand(2, 3, 64, 96)
    x = (image - backbone.mean) / backbone.std
    with torch.no_grad():
        states = model(x, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    maps = backbone.tower(x)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 8, 12)] * 2
    for got, want in zip(maps, (states[1], states[3]), strict=True):
        torch.testing.assert_close(got.flatten(2).transpose(1, 2), want[:, 1:])

    before = [p.clone() for p in backbone.tower.parameters()]
    sum(m.square().sum() for m in backbone(image)).backward()
    assert all(p.grad is None and not p.requires_grad for p in backbone.tower.parameters())
    assert all(p.grad is not None for p in backbone.pyramid.parameters())
    assert all(torch.equal(p, b) for p, b in zip(backbone.tower.parameters(), before, strict=True))


@pytest.mark.parametrize("patch_size", [14, 16, 32])
def test_clip_of_any_patch(patch_size: int, tmp_path: Path):
    backbone = build_backbone("clip", weights=make_tiny_clip(tmp_path, patch_size=patch_size))
    sizes = [tuple(m.shape[-2:]) for m in backbone(torch.rand(1, 3, 64, 96))]
    assert sizes == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_mean_and_std_can_be_given():
    backbone = build_backbone("test_resnet", mean=[0.498] * 3, std=[0.502] * 3)
    assert backbone.config["mean"] == [0.498] * 3
    torch.testing.assert_close(build_backbone("test_resnet", config=backbone.config).std, backbone.std)
    assert "mean" not in backbone.state_dict()


def test_clip_without_its_image_processor_is_named(clip: Path, tmp_path: Path):
    shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match="nor is mean or std given: .* OpenAI's"):
        backbone = build_backbone("clip", weights=tmp_path)
    assert backbone.config["mean"] == [0.48145466, 0.4578275, 0.40821073]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = build_backbone("clip", weights=tmp_path, mean=[0.5] * 3, std=[0.2] * 3)
        build_backbone("clip", weights=clip)
        build_backbone("clip", config=given.config)
    assert given.config["mean"] == [0.5] * 3


def test_published_weights_fit(shared: Callable[..., Path]):
    lite0 = shared("weights", "tf_efficientnet_lite0.imagenet.safetensors")
    backbone = build_backbone("tf_efficientnet_lite0", weights=lite0, mean=[0.498] * 3, std=[0.502] * 3)
    assert "classifier.weight" in backbone.loaded and "of 240 tensors" in backbone.loaded
    wanted = load_file(lite0)
    state = backbone.tower.net.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in state.items() if "num_batches" not in key)
    with pytest.raises(InputError, match="lacks"):
        build_backbone("tf_efficientnet_lite1", weights=lite0)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "swin_tiny_patch4_window7_224"])
def test_local_weights_of_each_naming(name: str, tmp_path: Path):
    """timm's feature networks name things as their classifiers do, or flattened, or under "model."."""
    source = timm.create_model(name)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pth")
    net = timm.create_model(name, features_only=True)
    report = load_weights(net, tmp_path / "w.pth", name)
    assert ("fc.weight" if name == "test_resnet" else "head") in report.partition("not used: ")[2]
    wanted = {tuple(value.flatten()[:5].tolist()) for value in source.state_dict().values()}
    assert all(tuple(value.flatten()[:5].tolist()) in wanted for value in net.state_dict().values())


def test_weights_that_do_not_fit_are_refused(tmp_path: Path):
    good = timm.create_model("test_resnet").state_dict()
    file = tmp_path / "w.safetensors"

    def message(state: dict[str, torch.Tensor]) -> str:
        save_file({key: value.contiguous() for key, value in state.items()}, file)
        with pytest.raises(InputError) as error:
            build_backbone("test_resnet", weights=file)
        assert "\n" not in str(error.value) and str(file) in str(error.value)
        return str(error.value)

    assert "holds no tensor of 'test_resnet'" in message({"x": torch.zeros(1)})
    without = {key: value for key, value in good.items() if key != "layer1.0.conv1.weight"}
    assert "first layer1.0.conv1.weight" in message(without)
    assert "has shape (1, 1), " in message(good | {"layer1.0.conv1.weight": torch.zeros(1, 1)})
    assert "has layers that" in message(good | {"layer1.9.conv1.weight": torch.zeros(1, 1)})

    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="cut short"):
        build_backbone("test_resnet", weights=file)
    torch.save({"state_dict": good, "trainer": Path("x")}, tmp_path / "pickled.pth")
    with pytest.raises(InputError, match="not readable"):
        build_backbone("test_resnet", weights=tmp_path / "pickled.pth")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        build_backbone("test_resnet", weights=tmp_path / "nothing.pth")


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match="did you mean resnet18"):
        build_backbone("resnet1888")
    with pytest.raises(InputError, match="got no weights"):
        build_backbone("clip")
    with pytest.raises(InputError, match="no plain ViT"):
        build_backbone("resnet18", width=64)
    with pytest.raises(InputError, match="one size"):
        build_backbone("mixer_s32_224")
    with pytest.raises(InputError, match="wanted the same name"):
        build_backbone("resnet18", config={"name": "resnet34"})


@torch.no_grad()
def test_images_are_padded_with_their_mean_colour():
    image = torch.rand(1, 3, 61, 90)
    for pad in (1, 4, 32):
        backbone = build_backbone("test_resnet", pad=pad).eval()
        height, width = 61 + -61 % pad, 90 + -90 % pad
        padded = backbone.mean.expand(1, 3, height, width).clone()
        padded[..., :61, :90] = image
        for got, want in zip(backbone(image), backbone(padded), strict=True):
            torch.testing.assert_close(got, want)
        assert backbone(image)[0].shape[-2:] == (-(-height // 4), -(-width // 4))
    with pytest.raises(InputError, match="pad 0; wanted 1 or more"):
        build_backbone("test_resnet", pad=0)


def test_norms_and_options_are_kept_in_the_config():
    backbone = build_backbone("resnet18", norms=True, options={"layers": [1, 1, 1, 1]}).eval()
    again = build_backbone("resnet18", config=json.loads(json.dumps(backbone.config))).eval()
    again.load_state_dict(backbone.state_dict())
    image = torch.rand(1, 3, 64, 64)
    for got, want in zip(again(image), backbone(image), strict=True):
        assert torch.equal(got, want) and want.mean(1).abs().max() < 1e-5  # normed over channels
    for name in ("clip", "conv"):
        with pytest.raises(InputError, match="norms or options; they are for timm's"):
            build_backbone(name, options={"depths": [1]})
    with pytest.raises(InputError, match="plain ViT; 'norms' are not for it"):
        build_backbone("test_vit", norms=True)
    with pytest.raises(InputError, match=r"does not take options {'windows': 3}"):
        build_backbone("resnet18", options={"windows": 3})


def test_bad_images_are_refused():
    backbone = build_backbone("test_resnet")
    with pytest.raises(ValueError, match="uint8"):
        backbone(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="wanted float"):
        backbone(torch.rand(3, 64, 64))


def test_conv_learns_from_scratch_and_rebuilds():
    backbone = build_backbone("conv")
    maps = backbone(torch.rand(2, 3, 64, 96))
    sizes = [(2, c, 64 // s, 96 // s) for c, s in zip(backbone.channels, backbone.strides, strict=True)]
    assert [tuple(m.shape) for m in maps] == sizes
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    again = build_backbone("conv", config=backbone.config)
    assert again.state_dict().keys() == backbone.state_dict().keys()
    with pytest.raises(InputError, match="trained from scratch"):
        build_backbone("conv", "somewhere.safetensors")
