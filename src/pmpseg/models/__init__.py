"""Networks: plain modules, tensors in, a named output out. They know no files, loggers or trainers.

Names are imported when first used, so that `import pmpseg.models` costs nothing.
"""

from importlib import import_module

_HOME = {
    "CLIPSeg": "clipseg",
    "PMP": "pmp",
    "PixelPrediction": "prompts",
    "Prediction": "prompts",
    "Prompts": "prompts",
    "RegionClassifier": "region",
    "TextEncoder": "clip",
    "as_prompts": "prompts",
    "build_backbone": "backbone",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
