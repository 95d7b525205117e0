"""The Hugging Face layout as a source and target of `puna convert`: `.bin` to safetensors, another dtype."""

from pathlib import Path

from puna.checkpoint.huggingface import load_config, load_tokenizer_of, write_model
from puna.checkpoint.tensors import StoredTensor
from puna.checkpoint.weights import open_weights
from puna.files import folder_aside
from puna.model.config import ModelConfig
from puna.tokenizer import Tokenizer


def recognises(folder: Path) -> bool:
    """Whether the folder has a `config.json`."""
    return (folder / "config.json").exists()


def read(folder: Path, rope_theta: float | None) -> tuple[ModelConfig, dict[str, StoredTensor], Tokenizer | None]:
    """Shape, unread tensors and tokenizer of a folder; `rope_theta` is for a `config.json` that has none."""
    return load_config(folder, rope_theta=rope_theta), open_weights(folder), load_tokenizer_of(folder)


def write(folder: Path, config: ModelConfig, tensors: dict[str, StoredTensor], tokenizer: Tokenizer | None) -> None:
    """Writes the folder."""
    with folder_aside(folder) as aside:
        write_model(aside, config, tensors, tokenizer)
