"""Opening models from Hugging Face folders and the hub: quietly, in float32, with errors a user can read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig
from transformers.utils import logging as hf_logging

from ..errors import InputError


def load_pretrained(kind: Any, name: str, config: PretrainedConfig, renamed: dict[str, str] | None = None) -> Any:
    """`kind.from_pretrained`, in float32 whatever the file holds; weights that are not there are an error.

    renamed: patterns in the file's names, and what stands for them in the model's.
    """
    options = {"config": config, "dtype": torch.float32, "output_loading_info": True, "key_mapping": renamed}
    model, info = kind.from_pretrained(name, **options)
    # Many sentence encoders come without BERT's pooler, which is not read here.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise InputError(f"{name} lacks {len(missing)} tensors of {type(model).__name__}, first {missing[0]}")
    if renamed:  # a model that remembers it would be saved under the file's names
        fresh = kind(config)
        fresh.load_state_dict(model.state_dict())
        return fresh.eval()
    return model


@contextmanager
def opening(name: str) -> Iterator[None]:
    """For reading the Hugging Face folder or hub id `name`: quiet, and what goes wrong is an InputError."""
    try:
        with quiet():
            yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot open {name!r} as a Hugging Face folder or hub id: {reason}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Mutes transformers' bars and load reports (to those, half of a whole CLIP is always "unexpected")."""
    verbosity, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()
