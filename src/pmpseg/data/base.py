"""What every data set shares: its items and batches, prompts for training, samplers, and the DataModule.

An item is a dict: image (3, H, W) uint8, labels (H, W) int64 with 255 (the data's ``ignore_index``) = ignore, name str, index
int, prompts (a list of K strings, "" = padding), prompt_class (K,) int64 (-1 where a prompt is no class), and, where
prompts are phrases or classes that overlap, prompt_masks (K, H, W) bool and phrase_kind (K strings), perhaps
phrase_class (K,) int64. In evaluation labels and prompt_masks may be larger than the image: answers are scored
at the image's own size. Where an evaluation looks at several scales, ``scaled`` is a list of the image at each of them.

Where objects are told apart, an item of training has segments (H, W) int64, the number 0..N-1 of each pixel's segment or -1, and
segment_prompt (N,) int64, the place in ``prompts`` of each one's prompt, -1 where that is not asked. They become N masks on the
device.

With visual support an item also has, for each prompt, S other images of one size that show it: support_image
(K, S, 3, h, w) uint8, support_mask (K, S, h, w) bool, and support_valid (K, S) bool, False where there is none
(zeros). No preset is applied yet.

Everything random in an item comes from (seed, epoch, index), and the sampler hands out (epoch, index) pairs.
So the epoch reaches workers that live on between epochs, without state shared between processes or a race
with prefetching, and a batch is the same for any number of workers.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
import torch.distributed
from lightning import LightningDataModule
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from pmpseg.errors import InputError
from pmpseg.vocabulary import Vocabulary

IGNORE = 255


class SegmentationData(LightningDataModule):
    """Loaders of batches (see ``collate``) over the data sets that a subclass gives.

    A subclass sets ``vocabulary`` and gives ``dataset(split)`` for "train", "val" and "test". ``image_size``
    is the short side at which the network works; ``num_prompts`` (K) the prompts of a training image, None
    for all classes. Batches of several images in evaluation need images, and labels, of one size.

    ``supports_in_evaluation``: whether items of val and test come with visual support, where the data has it; set it to False
    before the loader is made where only texts are asked, since each support is one more image to read.

    ``eval_scales``: at how many times ``image_size`` an evaluation looks at each image; set before the loader is made.
    ``ignore_index``: the label of pixels that count nowhere; 255 leaves no room for 847 classes.
    """

    vocabulary: Vocabulary
    supports_in_evaluation: bool = True
    eval_scales: tuple[float, ...] = (1.0,)
    ignore_index: int = IGNORE

    def __init__(
        self,
        image_size: int,
        num_prompts: int | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"image_size": image_size, "num_prompts": num_prompts}
        sizes |= {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
        for name, value in (sizes | {"num_workers": num_workers, "seed": seed}).items():
            if value is not None and value < (name in sizes):
                raise InputError(f"{name}: got {value}, want {int(name in sizes)} or more")
        self.image_size = image_size
        self.num_prompts = num_prompts
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.continued = (0, 1)  # batches that a continued run has had, and how many make an epoch

    def state_dict(self) -> dict[str, int]:
        """How many training batches were taken, and of how many an epoch is made: where a continued run goes on."""
        assert self.trainer is not None
        return {"taken": self.trainer.fit_loop.total_batch_idx + 1, "per_epoch": int(self.trainer.num_training_batches)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.continued = state["taken"], state["per_epoch"]

    def dataset(self, split: str) -> "SegmentationDataset":
        raise NotImplementedError

    def has_supports(self, split: str) -> bool:
        """Whether items of a split come with visual support, if the data has it."""
        return split == "train" or self.supports_in_evaluation

    def train_dataloader(self) -> DataLoader:
        """Shuffled anew in each epoch; the last incomplete batch is dropped. A continued run's begins where it stopped."""
        dataset = self.dataset("train")
        taken, per_epoch = self.continued
        epoch, batches = divmod(taken, per_epoch)
        sampler = EpochSampler(dataset, self.seed, epoch, batches * self.batch_size)
        if len(sampler) < self.batch_size:
            raise InputError(
                f"{len(sampler)} training images make no batch of {self.batch_size}: lower batch_size"
            )
        return self._loader(dataset, sampler, self.batch_size, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        return self._eval_dataloader("test")

    def _eval_dataloader(self, split: str) -> DataLoader:
        dataset = self.dataset(split)
        _, world_size = _rank_and_world_size()
        if len(dataset) < world_size:  # a process without a batch would skip the evaluation that the others wait in
            few = f"{len(dataset)} {split} images for {world_size} processes"
            raise InputError(f"{few}: give each at least one, or use fewer devices")
        return self._loader(dataset, UnpaddedSampler(dataset), self.eval_batch_size, drop_last=False)

    def _loader(
        self, dataset: Dataset, sampler: DistributedSampler, batch_size: int, drop_last: bool
    ) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self.collate,
        )

    @staticmethod
    def collate(items: list[dict]) -> dict:
        """Items to a batch; of a class, so that a subclass can have items of another kind."""
        return collate(items)


class SegmentationDataset(Dataset):
    """Items by index, or by (epoch, index) in a training loader; subclasses give ``item``, ``__len__``."""

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.item(index, epoch)

    def __len__(self) -> int:
        raise NotImplementedError

    def item(self, index: int, epoch: int) -> dict:
        raise NotImplementedError


class EpochSampler(DistributedSampler):
    """A new order in each epoch, as (epoch, index) pairs, shared out among the ranks.

    Lightning calls ``set_epoch``, and leaves a DistributedSampler as it is. It asks for the first order before that, hence
    ``epoch``, the first one; of this one ``skip`` indices a rank are left out: those that a continued run has had. The length
    stays that of a whole epoch, since Lightning counts what was had.
    """

    def __init__(self, dataset: Dataset, seed: int, epoch: int = 0, skip: int = 0) -> None:
        rank, world_size = _rank_and_world_size()
        super().__init__(dataset, world_size, rank, shuffle=True, seed=seed, drop_last=True)
        self.set_epoch(epoch)
        self.first, self.skip = epoch, skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        order = ((epoch, index) for index in super().__iter__())
        return islice(order, self.skip if epoch == self.first else 0, None)


class UnpaddedSampler(DistributedSampler):
    """Each index once, in order, over all ranks: the usual sampler repeats some, which then count twice.

    Ranks may have different numbers of batches, so an evaluation step must not wait for the other ranks.
    """

    def __init__(self, dataset: SegmentationDataset) -> None:
        rank, world_size = _rank_and_world_size()
        super().__init__(dataset, world_size, rank, shuffle=False)
        self.own = range(rank, len(dataset), world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


def collate(samples: list[dict]) -> dict:
    """B items -> image (B, 3, H, W), labels (B, H, W), index (B,), prompt_class (B, K) and, where the items
    have them, prompt_masks (B, K, H, W), phrase_class (B, K), segments (B, H, W), segment_prompt (B, N), support_image
    (B, K, S, 3, h, w), support_mask and support_valid as tensors, scaled as a list of tensors; name, prompts and phrase_kind as
    lists of B. K is the most that an item has: others are padded
    with prompts "", classes -1, and zeros.
    """
    for key in ("image", "labels"):
        shapes = sorted({tuple(sample[key].shape[-2:]) for sample in samples})
        if len(shapes) > 1:
            raise InputError(
                f"{key} of {shapes[0]} and {shapes[1]} pixels make no batch: set eval_batch_size to 1"
            )
    keys = ["image", "labels", "prompt_class", "prompt_masks", "phrase_class", "segments", "segment_prompt"]
    keys += ["support_image", "support_mask", "support_valid"]
    batch: dict = {"name": [sample["name"] for sample in samples], "index": torch.tensor([sample["index"] for sample in samples])}
    for key in (key for key in keys if key in samples[0]):
        rows = [torch.as_tensor(sample[key]) for sample in samples]
        batch[key] = pad_sequence(rows, batch_first=True, padding_value=-1 if key.endswith(("_class", "segment_prompt")) else 0)
    if "scaled" in samples[0]:
        batch["scaled"] = [torch.stack(images) for images in zip(*(sample["scaled"] for sample in samples), strict=True)]
    count = max(len(sample["prompts"]) for sample in samples)
    for key in (key for key in ("prompts", "phrase_kind") if key in samples[0]):
        batch[key] = [sample[key] + [""] * (count - len(sample[key])) for sample in samples]
    return batch


def choose_prompts(
    present: Iterable[int],
    vocabulary: Vocabulary,
    num_prompts: int | None,
    rng: np.random.Generator,
) -> tuple[list[str], np.ndarray]:
    """Prompts of one training image: K strings, padded with "", and their classes (K,) int64, padded with -1.

    K is ``num_prompts`` whatever the image (None: the number of seen classes). First come the classes
    ``present``, then absent ones as negatives, a random choice of each where there is no room for all; then
    the order is shuffled, and each class speaks through a random synonym. Unseen classes and 255 are left
    out.
    """
    seen = np.array(vocabulary.seen)
    size = len(seen) if num_prompts is None else num_prompts
    is_present = np.isin(seen, np.array(list(present), dtype=np.int64))
    ranked = np.concatenate([rng.permutation(seen[is_present]), rng.permutation(seen[~is_present])])
    ranked = ranked[:size]
    chosen = rng.permutation(ranked)
    words = (vocabulary.synonyms[index] for index in chosen)
    prompts = [spoken[rng.integers(len(spoken))] for spoken in words]  # as rng.choice, which would first make an array of each
    padding = size - len(chosen)
    return prompts + [""] * padding, np.concatenate([chosen, np.full(padding, -1)]).astype(np.int64)


def ignore_unseen(labels: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Labels of a training image: the pixels of unseen classes become 255."""
    return np.where(np.isin(labels, vocabulary.unseen), IGNORE, labels) if vocabulary.unseen else labels


def _rank_and_world_size() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
