"""Weights of a timm network from a local file, checked: what does not fit is an error, not left random."""

import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import InputError

# Buffers that networks make themselves; some files hold them and some do not.
DERIVED = ("num_batches_tracked", "attn_mask", "relative_position_index")


def load_weights(net: nn.Module, path: str | Path, name: str) -> str:
    """Fills a timm (feature) network from a file in timm's keys; returns one line on what was used.

    The file must hold every tensor of the network in its shape. It may hold modules that the network has not
    got at all (a head, a final norm), but not more layers of a module: those belong to another network.
    Raises FileNotFoundError, or InputError for a file that cannot be read or does not fit.
    """
    state = {key: value for key, value in read_weights(Path(path)).items() if not key.endswith(DERIVED)}
    target = {key: value for key, value in net.state_dict().items() if not key.endswith(DERIVED)}
    found, unused = {}, []
    for key, value in state.items():
        # timm's feature networks rename: stages.0.x is stages_0.x, or x is model.x.
        names = (key, re.sub(r"^(\w+)\.(\d+)\.", r"\1_\2.", key), f"model.{key}")
        match = next((n for n in names if n in target), None)
        if match is None:
            unused.append(key)
        else:
            found[match] = value
    if not found:
        raise InputError(f"{path}: holds no tensor of {name!r}; its first is {next(iter(state), None)}")
    missing = [key for key in target if key not in found]
    if missing:
        count = f"{len(missing)} of {len(target)}"
        raise InputError(f"{path}: lacks {count} tensors of {name!r}, first {missing[0]}")
    for key, value in found.items():
        if value.shape != target[key].shape:
            got, wanted = tuple(value.shape), tuple(target[key].shape)
            raise InputError(f"{path}: {key} has shape {got}, {name!r} wants {wanted}: another network's")
    modules = {re.split(r"[._]\d|\.", key.removeprefix("model."))[0] for key in target}
    deeper = [key for key in unused if key.split(".")[0] in modules]
    if deeper:
        raise InputError(f"{path}: has layers that {name!r} has not, first {deeper[0]}: another network's")
    net.load_state_dict(found, strict=False)
    left = ", ".join(unused) or "none"
    return f"{path}: {len(found)} of {len(target)} tensors of {name!r}; not used: {left}"


def load_state(network: nn.Module, path: Path, without: str | None = None) -> None:
    """Fills a network from the model.safetensors of a model folder, but for the weights whose names start with ``without``."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; the model folder is not complete")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); copy or save the model again") from None
    wanted = {k: v for k, v in network.state_dict().items() if without is None or not k.startswith(without)}
    both = wanted.keys() & state.keys()
    wrong = sorted((wanted.keys() ^ state.keys()) | {k for k in both if state[k].shape != wanted[k].shape})
    if wrong:
        count = f"{len(wrong)} of {len(wanted)}"
        raise InputError(f"{path}: {count} weights do not fit the network in config.json, first {wrong[0]!r}")
    broken = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise InputError(f"{path}: {broken[0]!r} holds NaN or infinity; this training went wrong, use an earlier checkpoint")
    network.load_state_dict(state, strict=False)


def read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; wanted a .safetensors or .pth file that exists")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not readable as weights (cut short?): {reason}") from error
    for key in ("state_dict", "model"):
        state = state.get(key, state)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}
