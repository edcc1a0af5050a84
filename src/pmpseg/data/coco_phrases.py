"""COCO instances as phrases: a phrase is a class name, its mask all of that class in the image.

So PhraseCut+'s options, and what trains on them, work on COCO too. (In CLIPSeg's code for "COCO+N" the query's mask stays full
where its class is replaced; here it is emptied, as in PhraseCut+.)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from pmpseg.errors import InputError
from pmpseg.images import read_image
from pmpseg.vocabulary import Vocabulary

from .phrase_dataset import PhraseSource
from .phrase_parts import SIZES
from .phrases import PhraseData
from .sources import CocoInstances, read_instances


class CocoPhrases(PhraseData):
    """Class names as phrases on COCO's images.

    ``root`` has images/ (perhaps split into folders) and annotations/instances_{train,val,test}.json, the ends being
    ``split_names``; a missing test split is the val split. ``classes`` is a vocabulary file, by default the category names in
    the order of their ids; a phrase is a class's name, and ``phrase_class`` its index. The other arguments are explained at
    ``PhraseData``. Everything is checked at start; raises ``InputError`` with the file's name for what is missing or wrong.
    """

    phrase_kinds = SIZES

    def __init__(
        self,
        root: str,
        classes: str | None = None,
        images: str = "images",
        annotations: str = "annotations",
        split_names: tuple[str, str, str] = ("train", "val", "test"),
        image_size: int = 352,
        negatives: float = 0.2,
        check_negatives: bool = True,
        supports: int = 0,
        support_may_be_query: bool = False,
        prefixes: Literal["plain", "fixed", "shuffle", "shuffle+"] = "shuffle+",
        crop: Literal["object", "none"] = "object",
        square: bool = True,
        resize_labels: bool = False,
        prompts_per_image: int = 1,
        phrases_at_once: int | None = None,
        eval_absent: int = 0,
        remove_classes: Sequence[str] = (),
        batch_size: int = 32,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(
            image_size=image_size,
            negatives=negatives,
            check_negatives=check_negatives,
            supports=supports,
            support_may_be_query=support_may_be_query,
            prefixes=prefixes,
            crop=crop,
            square=square,
            resize_labels=resize_labels,
            prompts_per_image=prompts_per_image,
            phrases_at_once=phrases_at_once,
            eval_absent=eval_absent,
            remove_classes=remove_classes,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.root = Path(root)
        names = dict(zip(("train", "val", "test"), split_names, strict=True))
        jsons = {split: self.root / annotations / f"instances_{name}.json" for split, name in names.items()}
        contents = {split: read_instances(path) for split, path in jsons.items() if path.is_file()}
        if not contents:
            wanted = " or ".join(f"{annotations}/{path.name}" for path in jsons.values())
            raise InputError(f"{self.root.resolve()} has no {wanted}")
        categories = next(iter(contents.values()))["categories"]
        self.vocabulary = Vocabulary.read(classes) if classes else Vocabulary.of([category["name"] for category in categories])
        self.phrase_classes = len(self.vocabulary)
        self._instances = {
            split: CocoInstances(jsons[split], content, self.root / images, names[split], self.vocabulary)
            for split, content in contents.items()
        }
        for instances in self._instances.values():
            instances.check_sizes()
        if "val" in self._instances:
            self._instances.setdefault("test", self._instances["val"])

    def read_source(self, split: str) -> "CocoPhraseSource":
        if split not in self._instances:
            raise InputError(f"{self.root} has no annotations for {split}: it has {' and '.join(self._instances)}")
        return CocoPhraseSource(self._instances[split], self.vocabulary)


class CocoPhraseSource(PhraseSource):
    """One phrase for each class that is annotated in an image."""

    def __init__(self, instances: CocoInstances, vocabulary: Vocabulary) -> None:
        self.instances = instances
        self.names = [file.name for file in instances.files]
        pairs = [(image, label) for image in range(len(instances)) for label in instances.classes(image)]
        if not pairs:
            raise InputError(f"{instances.path} annotates nothing")
        self.image_of, self.labels = np.array(pairs, dtype=np.int64).T
        self.classes = self.labels
        self.phrases = [vocabulary.names[label] for label in self.labels]
        self.forms = [""] * len(pairs)

    def image(self, image: int) -> np.ndarray:
        return np.array(read_image(self.instances.files[image]))

    def mask(self, sample: int) -> np.ndarray:
        return self.instances.class_mask(int(self.image_of[sample]), int(self.labels[sample]))
