"""Data sets as Lightning DataModules; names are imported when used, since lightning takes seconds."""

from importlib import import_module

_HOME = {
    "Scenes": "pmpseg.data.scenes",
    "Benchmark": "pmpseg.data.benchmark",
    "FolderData": "pmpseg.data.folder",
    "Coco20i": "pmpseg.data.one_shot",
    "CocoStuff": "pmpseg.data.coco_stuff",
    "CocoPhrases": "pmpseg.data.coco_phrases",
    "Pairs": "pmpseg.data.pairs",
    "Pascal5i": "pmpseg.data.one_shot",
    "PascalZeroShot": "pmpseg.data.pascal",
    "PhraseCut": "pmpseg.data.phrasecut",
    "PhraseData": "pmpseg.data.phrases",
    "SceneRegions": "pmpseg.data.scene_regions",
    "SegmentationData": "pmpseg.data.base",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'pmpseg.data' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
