"""Names become folders: the tiny CLIP that ships with pmpseg, local folders, and ids of the Hugging Face hub."""

from pathlib import Path

from pmpseg.errors import InputError

TINY_CLIP = "tiny_clip"
_SHIPPED = {TINY_CLIP: Path(__file__).parent / "assets" / "tiny_clip"}


def shipped_or(name: str) -> str:
    """The folder of an encoder that ships with pmpseg, or the name as it is (a folder or a hub id)."""
    return str(_SHIPPED.get(name, name))


def model_folder(name: str | Path) -> Path:
    """The local folder of a model: the folder itself, or a copy of the hub's repository of that id.

    Raises InputError if there is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    wanted = "want a model folder (with config.json and model.safetensors) or a Hugging Face hub id"
    if folder.exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise InputError(f"{name}: no such folder; {wanted}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name)))
    except Exception as error:  # the hub's client raises a dozen types; all mean that there is no model to be had
        raise InputError(f"{name}: no such folder, and the hub gave nothing ({type(error).__name__}); {wanted}") from None
