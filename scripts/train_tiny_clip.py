"""Train the tiny CLIP that ships in ``src/pmpseg/assets/tiny_clip``: a genuine Hugging Face CLIP folder, made on two cores.

    python scripts/train_tiny_clip.py --minutes 30 --out src/pmpseg/assets/tiny_clip

It sees pairs (image, caption) of generated scenes, nothing else: no mask, no box, no class label. Its captions hold every word
and every pair of words, those too that segmentation training holds out, as a real CLIP's captions do. Beside the symmetric
contrastive loss, one linear head names the caption's words from the image (Joulin et al., 2016, arXiv 1511.02251) and from the
text: contrast alone is slow to look at shapes, and leaves "red circle" and "red square" at a cosine of 0.99. The head is dropped
at the end. Most steps use 64 px windows (an eighth of the patches of four, as FLIP drops patches: arXiv 2212.00794), placed
anywhere on the 128 px grid of position embeddings; the last ones whole 128 px scenes. ``log.txt`` and ``zero_shot.json`` are
written beside the weights; the accuracy is measured on scenes of another seed.
"""

import argparse
import json
import math
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from pmpseg.data.scene_drawing import COLOURS, KINDS, PATTERNS, SHAPES, SIZES, STUFF, draw_scene, group_of
from pmpseg.data.scene_phrases import caption
from pmpseg.models.query_decoder import sine_position

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
OTHER_WORDS = (
    "crosses circles squares triangles rings moons stars hearts a the of and on there is picture photo everything stripes dots "
    "two three four left right above below"
)
WORDS = [*SHAPES, *COLOURS, *STUFF, *PATTERNS, *SIZES, *OTHER_WORDS.split()]
UNNAMED = ("a", "the", "of", "there", "is", "picture", "photo", "and")
NAMED = [w for w in WORDS if w not in UNNAMED]  # by the word head; nouns first
PATCH, GRID = 8, 16  # pixels, patches


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-complete BPE: every caption word is one token, any other text falls into bytes and is never cut short."""
    byte = _byte_symbols()
    words = Counter((*w[:-1], w[-1] + "</w>") for w in WORDS)
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for w in words for pair in pairwise(w)):
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        words = Counter(_merge(w, best) for w in words)
    tokens = byte + [b + "</w>" for b in byte] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def _byte_symbols() -> list[str]:
    """The printable stand-in of each byte, as GPT-2's and CLIP's byte-level BPE define it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(shifted)) for b in range(256)]


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256, "projection_dim": 128}
    text = {**shape, **ids, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "max_position_embeddings": 77}
    vision = {**shape, "image_size": PATCH * GRID, "patch_size": PATCH, "num_hidden_layers": 6}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    # Learned as usual, but from sines: shapes are a matter of relative positions, which random vectors do not have.
    table = model.vision_model.embeddings.position_embedding.weight
    table.data[1:] = 0.3 * sine_position(torch.zeros(1, 128, GRID, GRID))
    return model


class Pairs(torch.utils.data.IterableDataset):
    """Endless (image uint8 (3, S, S), caption), each drawn anew.

    Every other batch shows one colour and one pattern only: with these of no use, the contrastive loss has to look at shapes,
    which it would learn last.
    """

    def __init__(self, seed: int, size: int, things: tuple[int, int], batch: int) -> None:
        self.seed, self.size, self.things, self.batch = seed, size, things, batch

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        step, batch = (info.num_workers, info.id) if info else (1, 0)
        while True:  # a worker makes whole batches
            rng = np.random.default_rng([self.seed, batch, 0])
            many = batch % 2 == 0
            colours, patterns = (tuple(rng.permutation(x)[: len(x) if many else 1].tolist()) for x in (list(COLOURS), PATTERNS))
            for index in range(batch * self.batch, (batch + 1) * self.batch):
                rng = np.random.default_rng([self.seed, index])
                kind = KINDS[int(rng.choice(3, p=[0.5, 0.2, 0.3]))]
                scene = draw_scene(self.seed, index, kind, self.size, self.things, colours, patterns)
                yield torch.from_numpy(scene.image).permute(2, 0, 1), caption(scene, rng)
            batch += step


def embed_images(model: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) uint8 -> (B, D) unit vectors. A window smaller than the grid takes position embeddings from a random place."""
    pixels = (images.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    vision = model.vision_model
    side = images.shape[-1] // PATCH
    if side == GRID:
        return F.normalize(model.visual_projection(vision(pixels).pooler_output), dim=-1)
    table = vision.embeddings.position_embedding.weight
    tokens = vision.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, side^2, E)
    top, left = torch.randint(0, GRID - side + 1, (2, len(images), 1, 1))
    rows, cols = top + torch.arange(side)[:, None], left + torch.arange(side)
    tokens = tokens + table[1 + (rows * GRID + cols).flatten(1)]
    first = (vision.embeddings.class_embedding + table[0]).expand(len(images), 1, -1)
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(torch.cat([first, tokens], 1))).last_hidden_state
    return F.normalize(model.visual_projection(vision.post_layernorm(hidden[:, 0])), dim=-1)


def guessed_shapes(said: torch.Tensor, named: torch.Tensor) -> float:
    """How often the likeliest noun is one of the caption's, for captions with a noun."""
    nouns = said[:, : len(SHAPES)]
    best = named[:, : len(SHAPES)].argmax(1, keepdim=True)
    return nouns.gather(1, best)[nouns.any(1)].mean().item()


def embed_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return F.normalize(model.get_text_features(**batch).pooler_output, dim=-1)


@torch.no_grad()
def zero_shot(model: CLIPModel, tokenizer: CLIPTokenizer, count: int = 120, seed: int = 7_000_000) -> dict[str, float]:
    """Accuracy of naming things among all 48 colour-shape pairs, by group, and empty scenes among the 7 kinds of stuff.

    A thing is shown alone in a window, or ("crop") cut out of a scene with its neighbours. "shape" counts a right noun with
    whatever colour (chance 1 / 8).
    """
    model.eval()
    names = [f"{c} {s}" for c in COLOURS for s in SHAPES]
    pairs = embed_texts(model, tokenizer, [f"a {n}" for n in names])
    right: dict[str, list[float]] = {}
    for index in range(count):
        for kind in KINDS:
            for where, scene in (("", draw_scene(seed, index, kind, 64, (1, 1))), ("crop ", draw_scene(seed, index, kind))):
                crops = [_crop(scene.image, t.x, t.y) for t in scene.things]
                best = (embed_images(model, torch.stack(crops)) @ pairs.T).argmax(1)
                for thing, b in zip(scene.things, best.tolist(), strict=True):
                    right.setdefault(where + group_of(thing.colour, thing.shape), []).append(names[b] == thing.name)
                    right.setdefault(where + "shape", []).append(names[b].split()[1] == thing.shape)
        image = draw_scene(seed, index, "word", 64, (0, 0))
        name = embed_texts(model, tokenizer, [f"a photo of {s}" for s in STUFF])
        guess = (embed_images(model, torch.from_numpy(image.image).permute(2, 0, 1)[None]) @ name.T).argmax().item()
        right.setdefault("stuff", []).append(guess in np.unique(image.stuff))
    model.train()
    return {k: round(float(np.mean(v)), 4) for k, v in right.items()}


def _crop(image: np.ndarray, x: float, y: float, side: int = 64) -> torch.Tensor:
    top, left = (int(np.clip(c - side / 2, 0, image.shape[0] - side)) for c in (y, x))
    return torch.from_numpy(image[top : top + side, left : left + side].copy()).permute(2, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("src/pmpseg/assets/tiny_clip"))
    parser.add_argument("--minutes", type=float, default=30, help="training time; the schedule follows the clock")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(args.out)
    model = build_model(tokenizer)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    words = torch.nn.Linear(128, len(NAMED))
    decayed.append(words.weight)
    plain.append(words.bias)
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)

    # (share of the time, image size, things, batch)
    phases = [(0.6, 64, (1, 1), args.batch), (0.8, 64, (1, 2), args.batch), (1.0, 128, (2, 5), args.batch // 2)]
    log, start, step, seen = [f"{sum(p.numel() for p in model.parameters()):,} parameters, {vars(args)}"], time.time(), 0, 0
    print(log[0])
    for number, (until, size, things, batch) in enumerate(phases):
        data = Pairs(args.seed + number, size, things, batch)
        ahead = 4 if args.workers else None
        for images, texts in torch.utils.data.DataLoader(data, batch, num_workers=args.workers, prefetch_factor=ahead):
            done = (time.time() - start) / (args.minutes * 60)
            if done >= until:
                break
            lr = args.lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            image = embed_images(model, images)
            sentence = embed_texts(model, tokenizer, list(texts))
            logits = model.logit_scale.exp() * image @ sentence.T
            target = torch.arange(len(logits))
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            said = torch.tensor([[w in text.split() for w in NAMED] for text in texts]).float()
            named = words(20 * image).log_softmax(-1)
            word_loss = -(said * (named + words(20 * sentence).log_softmax(-1))).sum() / said.sum()
            optimizer.zero_grad()
            (loss + 2 * word_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.logit_scale.data.clamp_(0, math.log(100))
            step, seen = step + 1, seen + len(images)
            if step % 25 == 0:
                line = f"step {step} pairs {seen:,} size {size} loss {loss.item():.3f} (chance {math.log(len(images)):.2f}) "
                line += f"words {word_loss.item():.3f} shapes right {guessed_shapes(said, named):.2f} "
                line += f"minutes {done * args.minutes:.1f}"
                if step % 250 == 0:
                    line += f" zero-shot {zero_shot(model, tokenizer, 20)}"
                    model.save_pretrained(args.out)
                print(line, flush=True)
                log.append(line)

    accuracy = zero_shot(model, tokenizer)
    log.append(f"final zero-shot accuracy on unseen scenes: {accuracy}")
    print(log[-1])
    model.half().save_pretrained(args.out)
    size = {"height": PATCH * GRID, "width": PATCH * GRID}
    CLIPImageProcessor(size=size, crop_size=size, image_mean=MEAN, image_std=STD).save_pretrained(args.out)
    (args.out / "zero_shot.json").write_text(json.dumps({"pairs_seen": seen, "steps": step, **accuracy}, indent=1) + "\n")
    (args.out / "log.txt").write_text("\n".join(log) + "\n")


if __name__ == "__main__":
    main()
