"""pmpseg: image segmentation guided by text prompts, with PMP and the models it is compared with.

From Python: ``pmpseg.Segmenter.load(folder).segment(image, ["red circle", "stripes"])`` gives a
``Segmentation``. On the command line: ``python -m pmpseg.fit``, ``pmpseg.evaluate`` and ``pmpseg.predict``,
each with ``--help``. ``import pmpseg`` itself is light: torch is imported when ``Segmenter`` is first named,
and Lightning only to train.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pmpseg.image_prompts import ImagePrompt, MixedPrompt
    from pmpseg.segmenter import Segmentation, Segmenter

__version__ = "0.1.0"
__all__ = ["ImagePrompt", "MixedPrompt", "Segmentation", "Segmenter"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from pmpseg import image_prompts, segmenter

        return getattr(image_prompts if name.endswith("Prompt") else segmenter, name)
    raise AttributeError(f"module 'pmpseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
