"""Formats of checkpoints, one module each (see `puna.checkpoint.convert`), and what several of them need."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from puna.checkpoint.tensors import StoredTensor
from puna.errors import PunaError


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
            if not torch.equal(values, other.read()):
                raise PunaError(
                    f"{name} differs between {first.where} and {other.where}; they are of different models or steps"
                )
        return values

    return StoredTensor(first.shape, first.dtype, first.where, read)
