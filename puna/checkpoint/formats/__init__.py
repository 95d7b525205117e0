"""Formats of checkpoints, one module each (see `puna.checkpoint.convert`), and what several of them need."""

import re
from collections.abc import Sequence

from torch import Tensor

from puna.checkpoint.tensors import StoredTensor, are_copies
from puna.errors import PunaError
from puna.model.config import ModelConfig


def pattern_of(name: str) -> tuple[str, str]:
    """The layer's number in a tensor's name, empty where there is none, and the name with a star in its place."""
    match = re.search(r"\blayers\.(\d+)\.", name)
    return (match[1], name.replace(match[0], "layers.*.")) if match else ("", name)


def one_of_copies(name: str, copies: Sequence[StoredTensor]) -> StoredTensor:
    """The tensor of which several files hold a copy; reading it compares them all.

    A copy that differs is a `PunaError` when it is read: files of different models or steps were mixed.
    """
    first = copies[0]

    def read() -> Tensor:
        values = first.read()
        for other in copies[1:]:
            if not are_copies(values, other.read()):
                raise PunaError(
                    f"{name} differs between {first.where} and {other.where}; they are of different models or steps"
                )
        return values

    return StoredTensor(first.shape, first.dtype, first.where, read)


def check_plain_llama(config: ModelConfig, target: str, more: dict[str, bool]) -> None:
    """Refuses a model that a format without Hugging Face's newer fields cannot describe.

    Args:
        config: of the model.
        target: the format's name, for the message.
        more: what else it cannot describe -> whether the model has it.

    Raises:
        PunaError: the model has any of this; the message names all of it.
    """
    reasons = {
        f"model_type {config.model_type!r}": config.model_type != "llama",
        "biases": config.attention_bias or config.attention_output_bias or config.mlp_bias,
        f"head_dim {config.head_dim}": config.head_dim * config.num_attention_heads != config.hidden_size,
        **more,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise PunaError(f"{target} has no place for {', '.join(found)}; keep the Hugging Face layout")
