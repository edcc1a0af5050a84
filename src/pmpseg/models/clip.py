"""CLIP and its kin from Hugging Face folders: phrases to embeddings, and the vision tower for `backbone.py`.

Sources: CLIP (Radford et al., 2021) as transformers implements it; the embeddings of several templates are
each normalised, averaged and normalised again, as in OVSeg (arXiv 2210.04150; code, `text_template.py`).
A plain sentence encoder can take the place of CLIP's text side.

Shapes: B images, K prompts an image, T tokens a prompt, D the width of tokens and pooled embeddings alike.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPSegTextConfig,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
)
from transformers.image_processing_base import ImageProcessingMixin

from ..errors import InputError
from .hf import load_pretrained, opening, quiet
from .prompts import Prompts

CACHED_PHRASES = 100_000  # some 1.6 GB at 8 tokens a phrase and 512 numbers a token
TEXTS_AT_ONCE = 256

Phrase = tuple[str, ...]  # a prompt with its synonyms
PADDING: Phrase = ("",)


class TextEncoder(nn.Module):
    """Phrases to `Prompts`, by the frozen text side of a CLIP or by a sentence encoder; cached by phrase.

    name: a Hugging Face folder or hub id: a CLIP (whole, or its text half), or an encoder for AutoModel.
    templates: texts that hold "{}" once, where the phrase goes.
    normalize: pooled embeddings have length 1. False: the mean of the raw ones, as CLIPSeg was trained on.

    Of a CLIP, the tokens are its last hidden states, projected like the pooled one, from the first word to
    the end-of-text token. The latter is kept because its state is the whole phrase's (`pooled` is made of
    it); the start token is left out because the causal tower gives it one and the same state in every phrase.
    Of a sentence encoder, the tokens are all last hidden states and `pooled` is their mean.

    With several templates or synonyms `pooled` is the mean over all of them, and the tokens are those of the
    first template with the first synonym. A text that is too long is cut, with a warning, but keeps its end.

    Raises InputError if the folder or a template cannot be used.
    """

    def __init__(self, name: str | Path, templates: Sequence[str] = ("{}",), normalize: bool = True) -> None:
        super().__init__()
        self.name = str(name)
        self.templates = (templates,) if isinstance(templates, str) else tuple(templates)
        self.normalize = normalize
        if not self.templates or any(template.count("{}") != 1 for template in self.templates):
            raise InputError(f"got templates {self.templates}; wanted at least one, each with one '{{}}'")

        with opening(self.name):
            config = AutoConfig.from_pretrained(self.name)
            self.is_clip = config.model_type in ("clip", "clip_text_model", "clipseg")
            if not self.is_clip and (hasattr(config, "vision_config") or config.is_encoder_decoder):
                got = config.model_type
                raise InputError(f"{self.name} is a {got!r} model; wanted a CLIP or a plain text encoder")
            within = {"^clip\\.": ""} if config.model_type == "clipseg" else None  # which holds a whole CLIP
            if config.model_type in ("clip", "clipseg"):
                # In a whole CLIP the outer number counts; the text half's own is often just the default.
                config.text_config.projection_dim = config.projection_dim
                config = config.text_config
            kind = CLIPTextModelWithProjection if self.is_clip else AutoModel
            self.model = load_pretrained(kind, self.name, config if within is None else as_clip(config), within)
            self.tokenizer = AutoTokenizer.from_pretrained(self.name)
        if self.is_clip:
            self._check_end_of_text()
        self.limit: int = min(self.tokenizer.model_max_length, config.max_position_embeddings)
        self.dim: int = config.projection_dim if self.is_clip else config.hidden_size
        self.requires_grad_(False)
        self.eval()
        self._cache: dict[tuple[tuple[str, ...], Phrase], tuple[Tensor, Tensor]] = {}

    def forget(self) -> None:
        """Empties the cache. An embedding's last bit depends on what it was encoded together with, and so on the cache."""
        self._cache.clear()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> "TextEncoder":
        return super().train(False)

    def encode(self, prompts: Sequence[str | Sequence[str]]) -> Prompts:
        """P prompts, each a phrase or a list of synonyms, to Prompts with B = 1 and K = P.

        Raises InputError for no prompts or a blank one.
        """
        if isinstance(prompts, str) or not prompts:
            raise InputError(f"got {prompts!r} as prompts; wanted a list of at least one phrase")
        phrases = []
        for prompt in prompts:
            synonyms = (prompt,) if isinstance(prompt, str) else prompt
            phrases.append(tuple(synonym.strip() for synonym in synonyms))
            if not phrases[-1] or not all(phrases[-1]):
                raise InputError(f"got {prompt!r} as a prompt; wanted a phrase that is not blank")
        return self._prompts([phrases])

    def encode_batch(self, prompts: Sequence[Sequence[str]]) -> Prompts:
        """B lists of K phrases to Prompts (B, K). "" is padding; shorter lists are padded at their ends."""
        longest = max((len(phrases) for phrases in prompts), default=0)
        if longest == 0 or any(isinstance(phrases, str) for phrases in prompts):
            raise InputError(f"got {prompts!r} as prompts; wanted a list of phrases an image, not all empty")
        batch = [[(phrase.strip(),) for phrase in phrases] for phrases in prompts]
        return self._prompts([phrases + [PADDING] * (longest - len(phrases)) for phrases in batch])

    def save(self, folder: str | Path) -> None:
        """Writes a Hugging Face folder for `TextEncoder(folder, templates)`: the text side, the tokenizer."""
        with quiet():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def _prompts(self, batch: list[list[Phrase]]) -> Prompts:
        """B lists of K phrases to Prompts: each distinct phrase is a row of a table, looked up by index."""
        distinct = dict.fromkeys(phrase for phrases in batch for phrase in phrases if phrase != PADDING)
        row = {phrase: i for i, phrase in enumerate(distinct)}
        entries = self._entries(list(row))
        index = torch.tensor([[row.get(phrase, -1) for phrase in phrases] for phrases in batch])  # (B, K)
        # The last row, which -1 finds, is padding: one token of zeros that does not count.
        tokens = pad_sequence([t for t, _ in entries] + [torch.zeros(1, self.dim)], batch_first=True)
        pooled = torch.stack([p for _, p in entries] + [torch.zeros(self.dim)])
        length = torch.tensor([len(t) for t, _ in entries] + [0])
        token_valid = torch.arange(tokens.shape[1]) < length.unsqueeze(1)
        index = index.to(self.device)
        tokens, token_valid, pooled = (x.to(self.device)[index] for x in (tokens, token_valid, pooled))
        return Prompts(tokens, token_valid, pooled, index >= 0)

    @torch.no_grad()
    def _entries(self, phrases: list[Phrase]) -> list[tuple[Tensor, Tensor]]:
        """tokens (T, D) and pooled (D,) of each phrase on the CPU, from the cache or encoded now."""
        new = [phrase for phrase in phrases if (self.templates, phrase) not in self._cache]
        texts = [template.replace("{}", s) for phrase in new for s in phrase for template in self.templates]
        encoded = self._encode(texts)
        for phrase in new:
            own = [next(encoded) for _ in range(len(phrase) * len(self.templates))]
            rows = torch.stack([pooled for _, pooled in own])
            mean = (F.normalize(rows, dim=-1) if self.normalize else rows).mean(0)
            pooled = F.normalize(mean, dim=-1) if self.normalize else mean
            self._cache[self.templates, phrase] = (own[0][0], pooled)
        entries = [self._cache[self.templates, phrase] for phrase in phrases]
        while len(self._cache) > CACHED_PHRASES:
            del self._cache[next(iter(self._cache))]  # the oldest
        return entries

    def _encode(self, texts: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """tokens (T, D) and pooled (D,) of each text on the CPU, not normalised."""
        device = self.device
        padding = self.tokenizer.pad_token_id or 0
        first = 1 if self.is_clip else 0  # without CLIP's start token
        rows = self._tokenize(texts)
        for start in range(0, len(rows), TEXTS_AT_ONCE):
            chunk = rows[start : start + TEXTS_AT_ONCE]
            ids = pad_sequence(chunk, batch_first=True, padding_value=padding).to(device)  # (N, T)
            length = torch.tensor([len(row) for row in chunk], device=device)
            mask = torch.arange(ids.shape[1], device=device) < length.unsqueeze(1)
            with torch.autocast(device.type, enabled=False):  # what is cached serves callers of any precision
                tokens = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state  # (N, T, D)
                if self.is_clip:
                    tokens = self.model.text_projection(tokens)
                    pooled = tokens[torch.arange(len(chunk), device=device), length - 1]
                else:
                    pooled = (tokens * mask.unsqueeze(-1)).sum(1) / length.unsqueeze(-1)
            tokens, pooled = tokens.float().cpu(), pooled.float().cpu()
            for i, row in enumerate(chunk):
                yield tokens[i, first : len(row)].clone(), pooled[i]  # a copy, not to keep the padding alive

    def _tokenize(self, texts: list[str]) -> list[Tensor]:
        rows = []
        for text, row in zip(texts, self.tokenizer(texts, verbose=False).input_ids, strict=True):
            if self.is_clip and self.tokenizer.eos_token_id in row[1:-1]:
                raise InputError(
                    f"prompt {text!r} holds characters that the tokenizer of {self.name} takes for the end "
                    "of the text; leave them out, or use a tokenizer that knows all bytes"
                )
            if len(row) > self.limit:
                warnings.warn(
                    f"prompt {text!r} has {len(row)} tokens, {self.name} reads {self.limit}: cut off",
                    stacklevel=2,
                )
                row = row[: self.limit - 1] + row[-1:]
            rows.append(torch.tensor(row))
        return rows

    def _check_end_of_text(self) -> None:
        """A CLIP's embedding is taken where its tokenizer ends the text; a config that disagrees is mended.

        transformers finds the place by the config's id, and where no text holds that id it takes the start
        token: all phrases get one embedding. Mended, since what the tokenizer writes is what texts end with.
        """
        end = self.tokenizer.eos_token_id
        ids = self.tokenizer("a").input_ids
        if ids[-1] != end or end in ids[:-1]:  # where there is none, transformers makes one without letters
            raise InputError(f"{self.name} lacks its tokenizer: tokenizer.json, or vocab.json and merges.txt")
        config = self.model.config
        # OpenAI's own folders say 2, which transformers takes to mean the highest id.
        meant = max(self.tokenizer.get_vocab().values()) if config.eos_token_id == 2 else config.eos_token_id
        if meant != end:
            warnings.warn(
                f"{self.name}: config.json has eos_token_id {config.eos_token_id}, the tokenizer {end}, "
                f"which is used (to mend the folder, set text_config.eos_token_id to {end})",
                stacklevel=3,
            )
            config.eos_token_id = self.model.text_model.eos_token_id = end


def as_clip(config: CLIPSegTextConfig) -> CLIPTextConfig:
    """The same numbers under CLIP's name."""
    known = set(CLIPTextConfig().to_dict()) - {"model_type"}
    return CLIPTextConfig(**{k: v for k, v in config.to_dict().items() if k in known})


def load_clip_vision(name: str | Path, kind: Any = CLIPVisionModel) -> tuple[Any, dict[str, list[float]]]:
    """The vision tower of a CLIP folder or hub id, in float32, and the mean and std that its images want.

    kind: CLIPVisionModel, or CLIPVisionModelWithProjection. The mean and std are "mean" and "std" (3 numbers
    each) of the folder's image processor; {} if there is none.
    Raises InputError if there is no CLIP.
    """
    name = str(name)
    with opening(name):
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in ("clip", "clip_vision_model"):
            raise InputError(f"{name} is a {config.model_type!r} model; wanted a CLIP")
        if config.model_type == "clip":
            config.vision_config.projection_dim = config.projection_dim  # in a whole CLIP the outer number counts
            config = config.vision_config
        model = load_pretrained(kind, name, config)
        try:
            processor = ImageProcessingMixin.get_image_processor_dict(name)[0]
        except OSError:
            return model, {}
    return model, {key: processor[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in processor}
