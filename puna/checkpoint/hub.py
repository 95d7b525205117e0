"""MODEL, as commands take it: a folder, or an id on the Hugging Face hub, which is downloaded."""

from pathlib import Path

from puna.errors import PunaError
from puna.tokenizer.base import TEMPLATE_FILE


def resolve(name: Path | str) -> Path:
    """The folder of MODEL: itself, or the download of a Hugging Face hub id.

    Raises:
        PunaError: there is no such folder, and the hub cannot be reached, is not installed or does not give access.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise PunaError(f"{folder} is a file; a model is a folder with config.json and its weights")
    if not is_hub_id(name):
        raise PunaError(f"there is no folder {name}; name a model's folder, or its id on the Hugging Face hub")
    return _download(str(name))


def is_hub_id(name: Path | str) -> bool:
    """Whether a name is OWNER/NAME, and not a path into a folder that is here."""
    owner, *rest = str(name).split("/")
    return len(rest) == 1 and all((owner, *rest)) and owner not in (".", "..", "~") and not Path(owner).is_dir()


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError:
        raise PunaError(
            f"there is no folder {name}; to fetch it from the Hugging Face hub: pip install huggingface_hub"
        ) from None
    patterns = ["*.json", "model*.safetensors", "tokenizer.model", TEMPLATE_FILE]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*patterns, "pytorch_model*.bin"]))
        return folder
    except GatedRepoError:
        raise PunaError(
            f"the hub gives {name} only to those who accepted its licence: accept it at "
            f"https://huggingface.co/{name} and run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise PunaError(f"there is no folder {name}, and no such model on the Hugging Face hub") from None
    except Exception as error:  # the hub's client passes on errors of whatever it is built upon
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PunaError(f"there is no folder {name}, and the Hugging Face hub cannot be reached ({reason})") from None
