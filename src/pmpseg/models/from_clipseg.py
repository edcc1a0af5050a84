"""CLIPSeg's weights from elsewhere as a `CLIPSeg`: transformers' ``CLIPSegForImageSegmentation``, and the paper's own files.

Every tensor has a place here or stands on the short list of those that are not read; anything else is an error.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, CLIPSegForImageSegmentation
from transformers.image_processing_base import ImageProcessingMixin

from ..errors import InputError
from .backbone import VISION_KEYS
from .from_transformers import IMAGENET
from .hf import load_pretrained, opening
from .weights import read_weights

# From their names to ours: the first that matches.
NAMES = [
    (r"clip\.vision_model\.", "backbone.tower.vision."),
    (r"clip\.visual_projection\.", "backbone.tower.projection."),
    (r"decoder\.reduces\.", "reduce."),
    (r"decoder\.film_mul\.", "film_scale."),
    (r"decoder\.film_add\.", "film_shift."),
    (r"decoder\.transposed_convolution\.", "upsample."),
    (r"decoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attention.out."),
    (r"decoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"blocks.\1.attention.\2."),
    (r"decoder\.layers\.(\d+)\.layer_norm1\.", r"blocks.\1.attention_norm."),
    (r"decoder\.layers\.(\d+)\.layer_norm2\.", r"blocks.\1.ffn_norm."),
    (r"decoder\.layers\.(\d+)\.mlp\.fc1\.", r"blocks.\1.ffn.0."),
    (r"decoder\.layers\.(\d+)\.mlp\.fc2\.", r"blocks.\1.ffn.3."),
]
# The text side is a `TextEncoder`'s, the scale that of CLIP's own training.
NOT_READ = re.compile(r"clip\.(text_model|text_projection)\.|clip\.logit_scale$|.*position_ids$")
ORIGINAL = [
    (r"reduces\.", "reduce."),
    (r"film_mul\.", "film_scale."),
    (r"film_add\.", "film_shift."),
    (r"trans_conv\.", "upsample."),
    (r"blocks\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attention.out."),
    (r"blocks\.(\d+)\.norm1\.", r"blocks.\1.attention_norm."),
    (r"blocks\.(\d+)\.norm2\.", r"blocks.\1.ffn_norm."),
    (r"blocks\.(\d+)\.linear1\.", r"blocks.\1.ffn.0."),
    (r"blocks\.(\d+)\.linear2\.", r"blocks.\1.ffn.3."),
]
# `reduce` is read by nothing in the original, and CLIP comes from elsewhere.
ORIGINAL_NOT_READ = re.compile(r"reduce\.|clip_model\.|model\.|precomputed_prompts|shift_vector$")
HEADS = 4  # which a state dict does not tell; all released weights have it


def convert(network_class: Any, source: Any) -> Any:
    """See ``CLIPSeg.from_transformers``."""
    model, normal = (source, IMAGENET) if hasattr(source, "state_dict") else _open(str(source))
    config = model.config
    if config.model_type != "clipseg" or not hasattr(model, "decoder"):
        raise InputError(f"got a {type(model).__name__}, want a CLIPSegForImageSegmentation")
    vision = config.vision_config
    if vision.layer_norm_eps != 1e-5 or getattr(vision, "attention_dropout", 0):
        raise InputError("a CLIPSeg with another layer_norm_eps than 1e-5, or with attention dropout, has no counterpart here")
    shape = {key: getattr(vision, key) for key in VISION_KEYS} | {"projection_dim": config.projection_dim}
    blocks = list(config.extract_layers)
    network = network_class(
        text_dim=config.projection_dim,
        backbone="clip",
        backbone_config={"name": "clip", "vision": shape, "blocks": blocks, **normal},
        dim=config.reduce_dim,
        conditional_layer=config.conditional_layer,
        num_heads=config.decoder_num_attention_heads,
        ffn_dim=config.decoder_intermediate_size,
        upsampling="refined" if config.use_complex_transposed_convolution else "transposed",
    )
    return _filled(network, model.state_dict(), NAMES, NOT_READ, type(model).__name__)


def convert_original(network_class: Any, weights: Any, clip: str, blocks: Sequence[int]) -> Any:
    """See ``CLIPSeg.from_original``."""
    name = str(weights) if isinstance(weights, str | Path) else "the state dict"
    state = read_weights(Path(weights)) if isinstance(weights, str | Path) else dict(weights)
    if "reduces.0.weight" not in state or "film_mul.weight" not in state:
        raise InputError(f"{name} holds no weights of the paper's CLIPSeg: want reduces.0.weight, film_mul.weight and others")
    count = len([key for key in state if re.fullmatch(r"reduces\.\d+\.weight", key)])
    if count != len(blocks):
        raise InputError(f"blocks: got {list(blocks)}, want {count} of them: {name} reads {count} blocks")
    dim, text_dim = state["film_mul.weight"].shape
    network = network_class(
        text_dim=text_dim,
        backbone="clip",
        backbone_weights=clip,
        backbone_mean=tuple(IMAGENET["mean"]),
        backbone_std=tuple(IMAGENET["std"]),
        blocks=blocks,
        dim=dim,
        num_heads=HEADS,
        ffn_dim=len(state["blocks.0.linear1.weight"]) if "blocks.0.linear1.weight" in state else 2048,
        upsampling="refined" if "trans_conv.0.weight" in state else "transposed",
    )
    split: dict[str, Tensor] = {}
    for key, value in state.items():
        if found := re.fullmatch(r"blocks\.(\d+)\.self_attn\.in_proj_(weight|bias)", key):
            split |= {f"blocks.{found[1]}.attention.{q}.{found[2]}": part for q, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            split[key] = value
    own = {k: v for k, v in network.state_dict().items() if k.startswith("backbone.")}  # CLIP's, which stay
    return _filled(network, split | own, ORIGINAL, ORIGINAL_NOT_READ, name)


def _open(name: str) -> tuple[Any, dict[str, list[float]]]:
    """The model of a folder or hub id, and the mean and std that its images want."""
    with opening(name):
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "clipseg":
            raise InputError(f"{name} is a {config.model_type!r} model; wanted a CLIPSeg")
        model = load_pretrained(CLIPSegForImageSegmentation, name, config)
        try:
            processor = ImageProcessingMixin.get_image_processor_dict(name)[0]
        except OSError:
            return model, IMAGENET
    return model, {key: processor.get(f"image_{key}", IMAGENET[key]) for key in IMAGENET}


def _filled(network: Any, state: dict[str, Tensor], names: list[tuple[str, str]], not_read: re.Pattern[str], source: str) -> Any:
    own = network.state_dict()
    found, strange = {}, []
    for key, value in state.items():
        ours = next((re.sub(old, new, key) for old, new in names if re.match(old, key)), key)
        if ours in own and own[ours].shape == value.shape:
            found[ours] = value
        elif not not_read.match(key):
            strange.append(f"{key} {tuple(value.shape)}")
    missing = [key for key in own if key not in found]
    if strange or missing:
        first = f"no place for {strange[0]}" if strange else f"nothing for {missing[0]}"
        raise InputError(f"{source} does not fit a CLIPSeg of its shape: {first}, and {len(strange) + len(missing) - 1} more")
    with torch.no_grad():
        network.load_state_dict(found, strict=False)
    return network
