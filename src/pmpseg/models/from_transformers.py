"""Mask2Former and MaskFormer of transformers as a `PMP`: the same network under our names, with a timm backbone.

Every tensor of the original has a place here or stands on the short list of those that are not read; anything else is an error,
and so is a setting that has no counterpart. Nothing of transformers' networks is run.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Mask2FormerForUniversalSegmentation, MaskFormerForInstanceSegmentation
from transformers.image_processing_base import ImageProcessingMixin

from ..errors import InputError
from .hf import load_pretrained, opening

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
KINDS = {"mask2former": Mask2FormerForUniversalSegmentation, "maskformer": MaskFormerForInstanceSegmentation}
RESNETS = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
PROMPTS = {"prompt_attention": "pooled", "prompt_gate": "zero"}

# What has no place in a PMP: the criterion, a norm that nobody reads, tables of indices.
NOT_READ = re.compile(r"criterion\.|.*\.(swin|model)\.layernorm\.|.*relative_position_index$")
# From their names, the long ones shortened, to ours: the first that matches; <...> is computed.
SHORT = {"model.pixel_level_module.": "pixel.", "model.transformer_module.": "queries."}
SWIN = r"pixel\.encoder\.(?:swin|model)\."
RESNET = r"pixel\.encoder\.encoder\.stages\.(\d)\.layers\.(\d+)\."
NAMES = [
    (r"class_predictor\.", r"query_decoder.class_head."),
    (r"(?:queries\.decoder\.mask_predictor\.)?mask_embedder\.(\d)\.0\.", r"query_decoder.mask_head.<2*\1>."),
    (r"queries\.queries_embedder\.weight", r"query_decoder.query_position"),
    (r"queries\.queries_features\.weight", r"query_decoder.query"),
    (r"queries\.level_embed\.weight", r"query_decoder.level_embedding"),
    (r"queries\.input_projection\.", r"input_projection."),
    (r"queries\.decoder\.layernorm\.", r"query_decoder.norm."),
    (r"queries\.decoder\.layers\.(\d+)\.", r"query_decoder.layers.\1."),
    (r"pixel\.decoder\.level_embed", r"pixel_decoder.level_embedding"),
    (r"pixel\.decoder\.input_projections\.", r"pixel_decoder.project."),
    (r"pixel\.decoder\.encoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"pixel_decoder.layers.\1.attention_norm."),
    (r"pixel\.decoder\.encoder\.layers\.(\d+)\.self_attn\.", r"pixel_decoder.layers.\1.attention."),
    (r"pixel\.decoder\.encoder\.layers\.(\d+)\.", r"pixel_decoder.layers.\1."),
    (r"pixel\.decoder\.adapter_1\.", r"pixel_decoder.lateral."),
    (r"pixel\.decoder\.layer_1\.", r"pixel_decoder.output."),
    (r"pixel\.decoder\.mask_projection\.", r"pixel_decoder.mask_features."),
    (r"pixel\.decoder\.fpn\.stem\.", r"pixel_decoder.top."),
    (r"pixel\.decoder\.fpn\.layers\.(\d)\.proj\.", r"pixel_decoder.lateral.<2-\1>."),
    (r"pixel\.decoder\.fpn\.layers\.(\d)\.block\.", r"pixel_decoder.output.<2-\1>."),
    (r"pixel\.encoder\.hidden_states_norms\.stage(\d)\.", r"backbone.tower.norms.<\1-1>."),
    (r"pixel\.encoder\.hidden_states_norms\.(\d)\.", r"backbone.tower.norms.\1."),
    (rf"{SWIN}embeddings\.patch_embeddings\.projection\.", r"backbone.tower.net.patch_embed.proj."),
    (rf"{SWIN}embeddings\.norm\.", r"backbone.tower.net.patch_embed.norm."),
    # timm has the step from one stage to the next at the later one's beginning.
    (rf"{SWIN}encoder\.layers\.(\d)\.downsample\.", r"backbone.tower.net.layers_<\1+1>.downsample."),
    (rf"{SWIN}encoder\.layers\.(\d)\.blocks\.(\d+)\.", r"backbone.tower.net.layers_\1.blocks.\2."),
    (r"pixel\.encoder\.embedder\.embedder\.convolution\.", r"backbone.tower.net.conv1."),
    (r"pixel\.encoder\.embedder\.embedder\.normalization\.", r"backbone.tower.net.bn1."),
    (rf"{RESNET}shortcut\.convolution\.", r"backbone.tower.net.layer<\1+1>.\2.downsample.0."),
    (rf"{RESNET}shortcut\.normalization\.", r"backbone.tower.net.layer<\1+1>.\2.downsample.1."),
    (rf"{RESNET}layer\.(\d)\.convolution\.", r"backbone.tower.net.layer<\1+1>.\2.conv<\3+1>."),
    (rf"{RESNET}layer\.(\d)\.normalization\.", r"backbone.tower.net.layer<\1+1>.\2.bn<\3+1>."),
]
# What is left of a name within a layer.
PARTS = [
    (r"self_attn\.(?:out|o)_proj\.", "self_attention.out."),
    (r"self_attn\.([qkv])_proj\.", r"self_attention.\1."),
    (r"self_attn_layer_norm\.", "self_norm."),
    (r"(?:cross_attn|encoder_attn)\.(?:out|o)_proj\.", "image_attention.out."),
    (r"encoder_attn\.([qkv])_proj\.", r"image_attention.\1."),
    (r"(?:cross_attn|encoder_attn)_layer_norm\.", "image_norm."),
    (r"(blocks\.\d+\.)(?:mlp\.fc1|intermediate\.dense)\.", r"\1mlp.fc1."),
    (r"(blocks\.\d+\.)(?:mlp\.fc2|output\.dense)\.", r"\1mlp.fc2."),
    (r"(blocks\.\d+\.)attention\.(?:relative_position_bias|self)\.relative", r"\1attn.relative"),
    (r"(blocks\.\d+\.)attention\.(?:o_proj|output\.dense)\.", r"\1attn.proj."),
    (r"(blocks\.\d+\.)attention\.(?:self\.)?([qkv])(?:_proj|uery|ey|alue)\.", r"\1attn.\2."),
    (r"(blocks\.\d+\.)layernorm_before\.", r"\1norm1."),
    (r"(blocks\.\d+\.)layernorm_after\.", r"\1norm2."),
    (r"(layers\.\d+\.)(?:mlp\.)?fc1\.", r"\1ffn.0."),
    (r"(layers\.\d+\.)(?:mlp\.)?fc2\.", r"\1ffn.2."),
    (r"final_layer_norm\.", "ffn_norm."),
    (r"attention\.sampling_offsets\.", "attention.offsets."),
    (r"attention\.attention_weights\.", "attention.weights."),
    (r"attention\.value_proj\.", "attention.value."),
    (r"attention\.output_proj\.", "attention.out."),
]


def convert(network_class: Any, source: Any, text_dim: int, prompt_options: dict[str, Any]) -> Any:
    """See ``PMP.from_transformers``."""
    original: Any = source
    normal = IMAGENET
    if not isinstance(source, nn.Module):
        original, normal = _open(str(source))
    if type(original) not in KINDS.values():
        wanted = " or ".join(kind.__name__ for kind in KINDS.values())
        raise InputError(f"from_transformers: got a {type(original).__name__}, want a {wanted}")
    options = _decoders(original.config) | {"backbone_config": _backbone(original.config.backbone_config) | normal}
    options |= {"num_classes": original.config.num_labels, "text_dim": text_dim} | PROMPTS | prompt_options
    network = network_class(backbone=options["backbone_config"]["name"], **options)
    _fill(network, dict(_renamed(original.state_dict())))
    return network


def _open(name: str) -> tuple[Any, dict[str, list[float]]]:
    """The model, and how its images are normalised."""
    with opening(name):
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in KINDS:
            raise InputError(f"{name} is a {config.model_type!r} model; wanted one of {', '.join(KINDS)}")
        model = load_pretrained(KINDS[config.model_type], name, config)
        try:
            processor = ImageProcessingMixin.get_image_processor_dict(name)[0]
        except OSError:
            return model, IMAGENET
    return model, {key: processor.get(f"image_{key}", default) for key, default in IMAGENET.items()}


def _decoders(config: Any) -> dict[str, Any]:
    """The arguments of a PMP for both decoders."""
    if config.model_type == "mask2former":
        sizes = {config.feature_size, config.mask_feature_size, config.hidden_dim}
        _want("activation_function", config.activation_function, "relu")
        _want("pre_norm", config.pre_norm, False)
        _want("enforce_input_projection", config.enforce_input_projection, False)
        _want("feature_strides", list(config.feature_strides), [4, 8, 16, 32])
        options = {
            "pixel_decoder": "deformable",
            "encoder_layers": config.encoder_layers,
            "encoder_ffn_dim": config.encoder_feedforward_dim,
            "decoder": "masked",
            "num_queries": config.num_queries,
            "num_layers": config.decoder_layers - 1,
            "num_heads": config.num_attention_heads,
            "ffn_dim": config.dim_feedforward,
        }
    else:
        detr = config.decoder_config
        sizes = {config.fpn_feature_size, config.mask_feature_size, detr.d_model}
        _want("activation_function", detr.activation_function, "relu")
        _want("auxiliary_loss", detr.auxiliary_loss, False)
        options = {
            "pixel_decoder": "fpn",
            "decoder": "plain",
            "num_queries": detr.num_queries,
            "num_layers": detr.decoder_layers,
            "num_heads": detr.decoder_attention_heads,
            "ffn_dim": detr.decoder_ffn_dim,
        }
    if len(sizes) > 1:
        raise InputError(f"from_transformers: got decoders of widths {sorted(sizes)}, want one width for all")
    return options | {"dim": sizes.pop()}


def _backbone(config: Any) -> dict[str, Any]:
    """The ``Backbone.config`` of a Swin or ResNet of transformers, but for its mean and std."""
    if config.model_type in ("swin", "maskformer-swin"):
        _want("hidden_act", config.hidden_act, "gelu")
        _want("layer_norm_eps", config.layer_norm_eps, 1e-5)
        _want("use_absolute_embeddings", config.use_absolute_embeddings, False)
        _want("patch_size", config.patch_size, 4)
        keys = ("embed_dim", "window_size", "mlp_ratio", "qkv_bias", "drop_path_rate")
        options = {key: getattr(config, key) for key in keys}
        options |= {"depths": list(config.depths), "num_heads": list(config.num_heads)}
        return {"name": "swin_tiny_patch4_window7_224", "pad": 4, "norms": True, "options": options}
    if config.model_type == "resnet":
        _want("hidden_act", config.hidden_act, "relu")
        _want("downsample_in_first_stage", config.downsample_in_first_stage, False)
        _want("downsample_in_bottleneck", config.downsample_in_bottleneck, False)
        _want("embedding_size", config.embedding_size, 64)
        basic = config.layer_type == "basic"
        widths = [64, 128, 256, 512] if basic else [256, 512, 1024, 2048]
        _want("hidden_sizes", list(config.hidden_sizes), widths)
        depths = tuple(config.depths)
        name = "resnet18" if basic else RESNETS.get(depths, "resnet50")
        return {"name": name, "pad": 1, "options": {"layers": list(depths)}}
    raise InputError(f"from_transformers: got a {config.model_type!r} backbone, want a Swin or a ResNet")


def _want(name: str, got: Any, want: Any) -> None:
    if got != want:
        raise InputError(f"from_transformers: {name} is {got!r} in this model, which has no counterpart here; want {want!r}")


def _renamed(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Their tensors under our names; parts of Swin's qkv still apart."""
    for key, value in state.items():
        if NOT_READ.match(key):
            continue
        name = _our_name(key)
        if ".cross_attn.in_proj_" in name:
            kind = name.rpartition("_")[2]
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                yield f"{name.partition('.cross_attn.')[0]}.image_attention.{letter}.{kind}", part
        else:
            yield name, value


def _our_name(key: str) -> str:
    short = key
    for long, word in SHORT.items():
        short = short.replace(long, word, 1)
    for pattern, ours in NAMES:
        name, found = re.subn(rf"^{pattern}", ours, short)
        if found:
            name = re.sub(r"<(\d)([-+*])(\d)>", _compute, name)
            for part, our_part in PARTS:
                name = re.sub(part, our_part, name)
            return name
    raise InputError(f"from_transformers: {key} has no counterpart here")


def _compute(match: re.Match) -> str:
    a, sign, b = int(match[1]), match[2], int(match[3])
    return str({"+": a + b, "-": a - b, "*": a * b}[sign])


def _fill(network: nn.Module, state: dict[str, Tensor]) -> None:
    own = network.state_dict()
    for key in [key for key in state if re.search(r"blocks\.\d+\.attn\.q\.", key)]:
        parts = [state.pop(key.replace(".attn.q.", f".attn.{letter}.")) for letter in "qkv"]
        state[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    strange = sorted(key for key in state if key not in own or own[key].shape != state[key].shape)
    # What is not in the original is what prompts are for.
    new = re.compile(r"query_decoder\.(prompt_tokens|layers\.\d+\.guide|under_mask|name_head|no_object|log_scale|pixel_)")
    missing = sorted(key for key in own.keys() - state.keys() if not new.match(key))
    if strange or missing:
        first = (strange + missing)[0]
        raise InputError(f"from_transformers: {len(strange)} tensors do not fit and {len(missing)} lack, first {first}")
    network.load_state_dict(state, strict=False)
