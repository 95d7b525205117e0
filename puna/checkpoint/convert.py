"""Checkpoints of other systems become ours, and ours become theirs: strictly, tensor by tensor.

Every format is a module in `formats/`, found because it is there, with three functions:

    recognises(folder) -> bool                                  from the names of its files
    read(folder, rope_theta) -> ModelConfig, tensors, tokenizer tensors by Hugging Face names, unread
    write(folder, config, tensors, tokenizer)                   one tensor in memory at a time

Tensors pass between them under Hugging Face's names and in its layout; a name that one side does not know is an error.
"""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import torch

from puna.checkpoint import formats
from puna.checkpoint.huggingface import fit, resolve
from puna.checkpoint.tensors import counted, dtype_of
from puna.errors import PunaError, UsageError


def convert(
    source: Path | str,
    output: Path | str,
    *,
    to: str = "hf",
    dtype: torch.dtype | str | None = None,
    rope_theta: float | None = None,
) -> Path:
    """Writes a checkpoint in another format.

    Args:
        source: a folder in any format that `formats/` reads, told apart by its files, or a hub id.
        output: the folder to make.
        to: "hf" or another name of a format, e.g. "meta".
        dtype: "fp32", "bf16", "fp16" or a torch dtype to round the weights to; None: as stored.
        rope_theta: wavelength base of the rotary positions, where the source does not state one.

    Returns:
        `output`.

    Raises:
        PunaError: the source is in no known format, incomplete or damaged, holds what the target cannot say, or
            `output` exists.
    """
    output, dtype = Path(output), dtype_of(dtype)
    known = format_modules()
    if to not in known:
        raise UsageError(f"no format is called {to!r}; there are {', '.join(known)}")
    if output.exists():
        raise PunaError(f"{output} exists already; choose another place or remove it first")
    folder = resolve(source)
    reader = next((module for module in known.values() if module.recognises(folder)), None)
    if reader is None:
        raise PunaError(f"{folder} is in no format that is known ({', '.join(known)}); it holds {_content(folder)}")
    config, tensors, tokenizer = reader.read(folder, rope_theta)
    if tokenizer is not None:
        tokenizer.check_vocab_size(config.vocab_size)
    tensors = {name: tensor.to(dtype) for name, tensor in fit(config, tensors).items()}
    with counted("converting", tensors) as tensors:
        known[to].write(output, config, tensors, tokenizer)
    return output


def format_modules() -> dict[str, ModuleType]:
    """Name -> module of every format."""
    names = sorted(module.name for module in pkgutil.iter_modules(formats.__path__))
    return {name: importlib.import_module(f"{formats.__name__}.{name}") for name in names}


def _content(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return (", ".join(names[:5]) + (", …" if len(names) > 5 else "")) or "nothing"
