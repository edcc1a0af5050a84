"""A small random CLIP in a genuine Hugging Face folder, for tests: some 300 kB, a fraction of a second."""

import json
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

WORDS = ("red", "circle", "square", "grass")


def make_tiny_clip(folder: Path, eos_token_id: int | None = None, patch_size: int = 8) -> Path:
    """Writes config, weights, tokenizer and preprocessor to `folder`; returns it.

    The tokenizer is a byte-level BPE: all 256 bytes, inside and at the end of a word, and a few whole words.
    eos_token_id: what the config claims; the tokenizer's own id (the highest) if not given.
    """
    vocab, merges = _bpe(WORDS)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)
    eos = tokenizer.eos_token_id
    text = {
        "vocab_size": len(vocab),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos if eos_token_id is None else eos_token_id,
        "pad_token_id": eos,
        "initializer_factor": 5.0,  # spreads the embeddings of a random model apart
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": patch_size,
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocessor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def _bpe(words: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary and its merges: each byte, each byte at the end of a word, `words` from left to right."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = dict.fromkeys(symbols + [symbol + "</w>" for symbol in symbols])
    merges = []
    for word in words:
        left = word[0]
        for i, letter in enumerate(word[1:], start=1):
            right = letter + "</w>" if i == len(word) - 1 else letter
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
            vocab[left] = None
    vocab |= dict.fromkeys(["<|startoftext|>", "<|endoftext|>"])
    return {symbol: i for i, symbol in enumerate(vocab)}, merges
