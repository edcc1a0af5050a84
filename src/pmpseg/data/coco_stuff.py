"""CocoStuff: COCO-Stuff-164k, 171 classes of things and stuff, from folders or straight from the official zip files.

Source: Caesar et al., "COCO-Stuff", CVPR 2018, https://github.com/nightrome/cocostuff. Below ``root``:

    train2017/ val2017/                                          or train2017.zip val2017.zip
    stuffthingmaps/{train2017,val2017}/                          or stuffthingmaps_trainval2017.zip
    annotations/{instances,captions}_{train,val}2017.json        or annotations_trainval2017.zip
    annotations/panoptic_{train,val}2017.json and the PNGs in a folder or zip of that name
                                                                 or panoptic_annotations_trainval2017.zip
"""

from typing import Literal

from pmpseg.data.base import SegmentationData


class CocoStuff(SegmentationData):
    """Signature first; what is behind it follows."""

    def __init__(
        self,
        root: str = "../data/coco",
        classes: str | None = None,
        segments: Literal["class", "things"] = "class",
        captions: bool = False,
        expect: tuple[int, int] | None = None,
        image_size: int = 512,
        crop_size: tuple[int, int] | None = None,
        scale: tuple[float, float] = (0.5, 2.0),
        sizes: list[int] | None = None,
        max_size: int | None = None,
        max_class_share: float = 1.0,
        flip: float = 0.5,
        colour: float | Literal["ssd"] = 0.4,
        resize_labels: bool = False,
        num_prompts: int | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(image_size, num_prompts, batch_size, eval_batch_size, num_workers, seed)
