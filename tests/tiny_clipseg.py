"""A small random CLIPSeg of transformers in a genuine Hugging Face folder, for tests."""

import json
from pathlib import Path

import torch
from tiny_clip import make_tiny_clip
from transformers import AutoTokenizer, CLIPConfig, CLIPSegConfig, CLIPSegForImageSegmentation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tiny_clipseg(clip: Path, refined: bool = False, **options) -> CLIPSegForImageSegmentation:
    """Of the shape of the CLIP in ``clip``; all weights have noise, so that none can be mixed up unseen."""
    shape = CLIPConfig.from_pretrained(clip)
    parts = {"text_config": shape.text_config.to_dict(), "vision_config": shape.vision_config.to_dict()}
    small = {"reduce_dim": 16, "extract_layers": [0, 1, 2], "decoder_intermediate_size": 32, "projection_dim": 24}
    torch.manual_seed(0)
    model = CLIPSegForImageSegmentation(CLIPSegConfig(**parts, **(small | options), use_complex_transposed_convolution=refined))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def write_clipseg(folder: Path, refined: bool = False, size: int = 64) -> CLIPSegForImageSegmentation:
    """Writes the model, its tokenizer and its image processor's settings; returns the model."""
    clip = make_tiny_clip(folder / "clip")
    model = tiny_clipseg(clip, refined)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(clip).save_pretrained(folder)
    settings = {"image_mean": MEAN, "image_std": STD, "size": {"height": size, "width": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model
