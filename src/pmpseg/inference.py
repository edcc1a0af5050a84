"""From a network's logits to answers: class maps for a list, one mask a phrase. Validation, ``predict`` and notebooks call these.

A network has ``encode(image)``, ``decode(features, prompts)`` and two constants: ``stride``, of its maps in pixels of the image,
and ``by_pixel``, which tells how a threshold makes a mask of them (``answers``).

Letters: B images, Q queries, K prompts, (h, w) the mask logits' size. ``image_size`` is (H, W) of the image that the network saw,
``size`` that of the answer, the image's own before it was resized; the same where it is left out.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InputError
from .models.clipseg import CLIPSeg, Tokens
from .models.closed_list import ClosedList, Proposals
from .models.pmp import MASK_STRIDE, PMP
from .models.prompts import PixelPrediction, Prediction, Prompts
from .models.query_decoder import Features
from .models.region import RegionClassifier, Regions, ensemble
from .vocabulary import Vocabulary

Size = tuple[int, int]
Network = PMP | CLIPSeg | ClosedList
Encoded = Features | Tokens | Proposals
Answer = Prediction | PixelPrediction
TRANSFORMERS_SIZE = (384, 384)  # through which its post-processing takes every mask


def with_synonyms(prompts: Sequence[str], vocabulary: Vocabulary | None) -> list[str | list[str]]:
    """Prompts for ``TextEncoder.encode``: the name of a class stands for all of its synonyms, anything else for itself."""
    if vocabulary is None:
        return list(prompts)
    synonyms = dict(zip(vocabulary.names, vocabulary.synonyms, strict=True))
    return [synonyms.get(prompt.strip(), prompt) for prompt in prompts]


def upsample(maps: Tensor, image_size: Size, size: Size | None = None, stride: int = MASK_STRIDE) -> Tensor:
    """(B, C, h, w) maps of the padded image -> (B, C, *size): bilinear, the padding cut off."""
    if stride > 1:
        padded = [stride * s for s in maps.shape[-2:]]
        maps = F.interpolate(maps, padded, mode="bilinear", align_corners=False)
    maps = maps[..., : image_size[0], : image_size[1]]
    if size is None or tuple(size) == tuple(image_size):
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def by_way_of_transformers(maps: Tensor) -> Tensor:
    """(B, C, h, w) maps at the size through which transformers' post-processing takes all of them, padding and all."""
    return F.interpolate(maps, TRANSFORMERS_SIZE, mode="bilinear", align_corners=False)


def semantic_labels(
    prediction: Answer,
    image_size: Size,
    size: Size | None = None,
    chunk: int = 64,
    transformers: bool = False,
    factors: Mapping[int, float] | None = None,
) -> Tensor:
    """The best prompt of a class list for every pixel -> (B, *size) int64 in 0..K-1.

    Mask2Former's rule: score of class k = sum over queries of p(k | query) * sigmoid(mask); p is a softmax over the whole list
    and "no object". Of a network without queries: the highest sigmoid. Classes are visited ``chunk`` at a time, which changes
    nothing but that a (K, H, W) product never exists. ``transformers``: scores at 384 x 384 pixels, then resized, as its
    ``post_process_semantic_segmentation`` does. ``factors``: of the scores of some classes.
    """
    count = len_of_list(prediction)
    scores: Callable[[slice], Tensor]
    if transformers and isinstance(prediction, Prediction):
        probabilities, masks = prediction.probabilities(), by_way_of_transformers(prediction.mask_logits).sigmoid()

        def scores(some: slice) -> Tensor:
            small = torch.einsum("bqk,bqhw->bkhw", probabilities[..., some], masks)
            return F.interpolate(small, size or image_size, mode="bilinear", align_corners=False)

    else:
        scores = class_scores(prediction, image_size, size)
    return best_of_chunks(weighed(scores, factors, count, prediction[0]), count, chunk)


def class_scores(prediction: Answer, image_size: Size, size: Size | None = None) -> Callable[[slice], Tensor]:
    """What gives the scores (B, k, *size) of some of the classes; the masks of queries are made at full size once for all."""
    if isinstance(prediction, PixelPrediction):
        logits = prediction.logits
        return lambda some: upsample(logits[:, some].sigmoid(), image_size, size, 1)
    probabilities, masks = prediction.probabilities(), upsample(prediction.mask_logits, image_size, size).sigmoid()
    return lambda some: torch.einsum("bqk,bqhw->bkhw", probabilities[..., some], masks)


def len_of_list(prediction: Answer) -> int:
    """How many prompts were asked."""
    return prediction.logits.shape[1] if isinstance(prediction, PixelPrediction) else prediction.class_logits.shape[-1] - 1


def weighed(
    scores: Callable[[slice], Tensor], factors: Mapping[int, float] | None, count: int, like: Tensor
) -> Callable[[slice], Tensor]:
    """``scores``, those of some of ``count`` classes times their factor."""
    if not factors:
        return scores
    weights = like.new_tensor([factors.get(k, 1.0) for k in range(count)])[:, None, None]
    return lambda some: scores(some) * weights[some]


def best_of_chunks(scores: Callable[[slice], Tensor], count: int, chunk: int) -> Tensor:
    """The class of the highest score for every pixel, (B, H, W) int64; the first of equals.

    ``scores`` gives (B, k, H, W) >= 0 of some of the ``count`` classes; ``chunk`` of them are looked at together.
    """
    top, labels = scores(slice(0, chunk)).max(1)
    for start in range(chunk, count, chunk):
        best, index = scores(slice(start, start + chunk)).max(1)
        labels = torch.where(best > top, index + start, labels)
        top = torch.maximum(top, best)
    return labels


def soft_masks(prediction: Answer) -> tuple[Tensor, Tensor]:
    """One soft mask a prompt -> masks (B, K, h, w) and scores (B, K), both in [0, 1].

    Of a network without queries the masks are its sigmoids, and a score is the highest of them.
    A pixel belongs to a prompt as much as the best query says that is named so and covers it: max over q of p(k | q) *
    sigmoid(mask_q). The score is the highest p(k | q): how sure the network is that there is something to find.
    """
    if isinstance(prediction, PixelPrediction):
        soft = prediction.logits.float().sigmoid()
        return soft, soft.flatten(2).amax(-1)
    probabilities = prediction.probabilities()  # (B, Q, K)
    masks = prediction.mask_logits.sigmoid()
    answers = torch.stack([(p[..., None, None] * masks).amax(1) for p in probabilities.unbind(-1)], 1)
    return answers, probabilities.amax(1)


def answers(soft: Tensor, scores: Tensor, by_pixel: bool = False) -> Tensor:
    """Soft masks (..., H, W) and scores (...) -> the answer at every threshold: the score inside the mask and 0 outside.

    ``by_pixel``: the soft masks themselves; whether something is there is then not asked apart, as in CLIPSeg. Otherwise:
    Whether something is there is one question, which ``score > threshold`` decides, and where it is another: all pixels that
    belong to the prompt at least half as much as the score. One threshold for both would erode the masks of unsure answers.
    """
    if by_pixel:
        return soft
    scores = scores[..., None, None]
    return torch.where(soft > 0.5 * scores, scores, torch.zeros_like(soft))


def ask_together(network: Network, features: Encoded, prompts: Prompts, regions: Regions | None = None) -> Answer:
    """The prompts as one list, of which every query is named by one; ``regions`` names them again by a second stage's CLIP.

    A list of one is weighed against ``regions.contrast``, as OVSeg's demo does: a softmax over one name would find it anywhere.
    """
    prediction: Answer = network.decode(features, prompts)  # type: ignore[arg-type]
    if regions is None or regions.classifier.weight == 0:  # whose names would count for nothing
        return prediction
    if isinstance(prediction, PixelPrediction):
        raise InputError("a second stage names the masks of queries, and this model has none: ask it without region")
    names = regions.names if len(regions.names) > 1 else torch.cat([regions.names, regions.contrast])
    return name_again(prediction, regions.classifier, regions.image, names[None])


def name_again(prediction: Prediction, classifier: RegionClassifier, image: Tensor, names: Tensor) -> Prediction:
    """The prediction with ``fused``: its queries named by a second stage, too (see ``region.ensemble``).

    ``image`` (B, 3, H, W) as the network saw it; ``names`` (1 or B, K, E), which may be followed by names to contrast them with.
    """
    masks = upsample(prediction.mask_logits.float().sigmoid(), (image.shape[-2], image.shape[-1]))
    region, valid = classifier(image, masks, names)
    return prediction._replace(fused=ensemble(prediction.class_logits.float(), region, valid, classifier.weight))


def ask_one_by_one(
    network: Network, features: Encoded, prompts: Prompts, at_once: int = 16, regions: Regions | None = None
) -> tuple[Tensor, Tensor]:
    """``soft_masks`` with every prompt decoded alone, so that none can hint at another's answer.

    The image is encoded once; ``at_once`` prompts share a batch of the decoder, which changes nothing but the speed. Padding
    prompts get zeros. With ``regions`` each is also weighed against ``regions.contrast`` by a second stage. Returns masks
    (B, K, h, w) and scores (B, K).
    """
    if isinstance(network, CLIPSeg):  # whose prompts never see each other
        masks, scores = soft_masks(ask_together(network, features, prompts, regions))
        return masks * prompts.valid[..., None, None], scores * prompts.valid
    batch, answers = len(prompts.valid), []
    if regions is not None:
        at_once = 1  # every prompt has masks of its own, at the image's size
    for start in range(0, prompts.valid.shape[1], at_once):
        some = prompts.select(slice(start, start + at_once))
        count = some.valid.shape[1]
        prediction = network.decode(features.repeat(count), some.one_by_one())  # type: ignore[arg-type]  # (B * count, ...), of one prompt each
        if regions is not None:
            names = torch.cat([regions.names[start, None], regions.contrast])[None]
            prediction = name_again(prediction, regions.classifier, regions.image, names)
        masks, scores = soft_masks(prediction)  # (B * count, 1, ...)
        answers.append((masks.reshape(batch, count, *masks.shape[2:]), scores.reshape(batch, count)))
    masks, scores = (torch.cat(x, 1) for x in zip(*answers, strict=True))
    return masks * prompts.valid[..., None, None], scores * prompts.valid
