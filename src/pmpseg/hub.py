"""Names become folders: the tiny CLIP that ships with pmpseg, model folders, and ids of the Hugging Face hub. No torch here."""

import json
from pathlib import Path
from typing import Any

from pmpseg.errors import InputError

FORMAT = 1  # of model folders
ARCHITECTURES = ("PMP", "CLIPSeg")
TINY_CLIP = "tiny_clip"
_SHIPPED = {TINY_CLIP: Path(__file__).parent / "assets" / "tiny_clip"}


def shipped_or(name: str) -> str:
    """The folder of an encoder that ships with pmpseg, or the name as it is (a folder or a hub id)."""
    return str(_SHIPPED.get(name, name))


def public_name(name: str) -> str:
    """The inverse of ``shipped_or``: a name that means the same on another machine, where there is one."""
    return next((short for short, folder in _SHIPPED.items() if str(folder) == name), name)


def model_folder(name: str | Path) -> Path:
    """The local folder of a model: the folder itself, or a copy of the hub's repository of that id.

    Raises InputError if there is neither, or no config.json in it.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _from_hub(name)
    if (folder / "config.json").is_file():
        return folder
    if (folder / "model" / "config.json").is_file():
        raise InputError(f"{folder} is the folder of a run: give its model, {folder / 'model'}")
    raise InputError(f"no config.json in {folder}: give a model folder, as a run leaves it in RUN/model")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder. Raises InputError where it is not one of ours, OSError where there is none."""
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or config.get("architecture") not in ARCHITECTURES or config.get("format") != FORMAT:
        kinds = " or ".join(map(repr, ARCHITECTURES))
        raise InputError(f"{path}: not the config of a pmpseg model; want 'architecture': {kinds} and 'format': {FORMAT}")
    missing = {"network", "text", "image_size", "threshold"} - set(config)
    if missing:
        raise InputError(f"{path}: misses {', '.join(sorted(missing))}; save the model again")
    size, threshold = config["image_size"], config["threshold"]
    if not isinstance(size, int) or size < 1:
        raise InputError(f"{path}: image_size: got {size!r}, want pixels, an integer of 1 or more")
    if not isinstance(threshold, int | float) or not 0 <= threshold < 1:
        raise InputError(f"{path}: threshold: got {threshold!r}, want a number from 0 to below 1")
    return config


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None


def foreign_type(folder: Path) -> str | None:
    """The ``model_type`` that transformers gives its own folders; None for ours."""
    config = read_json(folder / "config.json")
    return config.get("model_type") if isinstance(config, dict) else None


def check_free(folder: Path) -> None:
    """Raises InputError if something stands at ``folder`` that must not give way to a model: not an empty folder, not a model."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        read_config(folder)
    except (InputError, OSError):
        raise InputError(f"{folder} exists and is no model: give a new or an empty folder to save into") from None


def _from_hub(name: str | Path) -> Path:
    wanted = "want a model folder (with config.json and model.safetensors) or a Hugging Face hub id"
    if Path(name).exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise InputError(f"{name}: no such folder; {wanted}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name)))
    except Exception as error:  # the hub's client raises a dozen types; all mean that there is no model to be had
        raise InputError(f"{name}: no such folder, and the hub gave nothing ({type(error).__name__}); {wanted}") from None
