"""PascalZeroShot: generalised zero-shot segmentation of Pascal VOC, as a class list of 21 with the background.

Source: Lueddecke and Ecker 2022, section 5.2, and its code on JoEm's data set (papers.md 3.8). The pairs of unseen classes are
ZS3Net's, in its order.
"""

from pmpseg.data.base import SegmentationData, SegmentationDataset
from pmpseg.data.items import class_list_item
from pmpseg.data.removal import ZERO_SHOT_PAIRS
from pmpseg.data.transforms import eval_transform, square_transform
from pmpseg.data.voc import VOC_NAMES, VocImages
from pmpseg.errors import InputError
from pmpseg.vocabulary import Vocabulary

# The words that the paper's code prompts with; the rest are VOC_NAMES.
PAPER_NAMES = {
    "aeroplane": "airplane",
    "dining table": "diningtable",
    "potted plant": "pottedplant",
    "tv monitor": "tvmonitor",
}


class PascalZeroShot(SegmentationData):
    """The images of VOC 2012's val list (1,449), each asked for all 21 classes; for evaluation only.

    ``unseen_pairs`` n: the classes of the first n of ZS3Net's five pairs are the vocabulary's unseen ones, so that ``evaluate``
    gives miou_seen (the background among the seen), miou_unseen and their harmonic mean hiou. The model must have been trained
    without them (``remove_classes``: zero-shot-n); nothing here can check that. The paper's "unseen-10" is 5 pairs, its
    "unseen-4" is 2.

    ``class_factors`` multiplies the probability of class 0 by ``background_factor`` before the best class is taken: the paper's
    code has 3, the paper does not mention it; 1 is none. Prompts are bare class names. ``paper_names`` writes them as that code
    does ("diningtable", "pottedplant", "tvmonitor", "airplane"), False as words.

    **The paper's table 4 is not to be compared with as it is printed.** Its code gives JoEm's scorer the unseen classes where it
    wants the seen ones, so the columns S and U of CLIPSeg's rows are probably exchanged, and it asks JoEm for unseen splits 5 and
    2, of which 5 is SPNet's other split. This is an inference (papers.md 3.8) that the authors have not confirmed. We score the
    classes named above, and offer nothing exchanged.

    Other differences from that code: labels keep the image's own size (``resize_labels``: made ``image_size`` as there), the mean
    is over classes in the ground truth (the same where all 21 are in it, as in the whole val list). ``square`` squashes images to
    ``image_size`` as there; False keeps the aspect, ``image_size`` being the short side. ``masks`` is the folder of the masks.
    """

    def __init__(
        self,
        root: str,
        unseen_pairs: int = 5,
        background_factor: float = 3.0,
        paper_names: bool = True,
        images: str = "val",
        masks: str = "SegmentationClass",
        image_size: int = 352,
        square: bool = True,
        resize_labels: bool = False,
        eval_batch_size: int = 1,
        num_workers: int = 2,
    ) -> None:
        super().__init__(image_size, None, eval_batch_size=eval_batch_size, num_workers=num_workers)
        if not 0 <= unseen_pairs <= len(ZERO_SHOT_PAIRS):
            raise InputError(f"unseen_pairs: got {unseen_pairs}, want 0 to {len(ZERO_SHOT_PAIRS)}")
        if not background_factor > 0:
            raise InputError(f"background_factor: got {background_factor}, want more than 0 (1: none)")
        names = [PAPER_NAMES.get(name, name) if paper_names else name for name in VOC_NAMES]
        unseen = [1 + VOC_NAMES.index(name) for pair in ZERO_SHOT_PAIRS[:unseen_pairs] for name in pair]
        self.vocabulary = Vocabulary.of(["background", *names], unseen)
        self.class_factors = {} if background_factor == 1 else {0: background_factor}
        self.source = VocImages(root, images, masks)
        self.square, self.resize_labels = square, resize_labels

    def dataset(self, split: str) -> "PascalDataset":
        if split == "train":
            raise InputError("PascalZeroShot is for evaluation only: train on other data, without its unseen classes")
        return PascalDataset(self)


class PascalDataset(SegmentationDataset):
    """Images of VOC with all classes as prompts."""

    def __init__(self, data: PascalZeroShot) -> None:
        self.source, self.vocabulary = data.source, data.vocabulary
        resized = square_transform if data.square else eval_transform
        self.transform = resized(data.image_size, resize_labels=data.resize_labels, scales=data.eval_scales)

    def __len__(self) -> int:
        return len(self.source)

    def item(self, index: int, epoch: int) -> dict:
        sample = self.transform(self.source.read(index))
        return class_list_item(sample, self.vocabulary, self.source.files[index].name, index)
