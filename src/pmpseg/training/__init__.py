"""Everything that imports lightning: one module a method, callbacks and the command line's parser."""

from importlib import import_module

_HOME = {
    "CLIPSegModule": "pmpseg.training.clipseg",
    "PMPModule": "pmpseg.training.pmp",
    "RegionModule": "pmpseg.training.region",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'pmpseg.training' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
