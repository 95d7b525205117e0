"""Converts checkpoints of other systems to the Hugging Face layout and back: strictly, tensor by tensor.

Every format is a module in `formats/`, found because it is there, with three functions:

    recognises(place) -> bool                                   from the names of its files, or its own if it is a file
    read(place, rope_theta) -> ModelConfig, tensors, tokenizer  tensors by Hugging Face names, unread
    write(folder, config, tensors, tokenizer)                   one tensor in memory at a time

and, where `read` or `write` takes options of its own, their names in READ_OPTIONS and WRITE_OPTIONS.

Tensors pass between them under Hugging Face's names and in its layout; a name that one side does not know is an error.
"""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from puna.checkpoint import formats
from puna.checkpoint.hub import is_hub_id, resolve
from puna.checkpoint.huggingface import fit
from puna.checkpoint.tensors import counted, dtype_of, rounded
from puna.errors import PunaError, UsageError
from puna.garbage import seldom_collected
from puna.progress import say


@seldom_collected()
def convert(
    source: Path | str,
    output: Path | str,
    *,
    to: str = "hf",
    dtype: torch.dtype | str | None = None,
    rope_theta: float | None = None,
    **options: Any,
) -> Path:
    """Writes a checkpoint in another format.

    Args:
        source: a folder or file in any format that `formats/` reads, told apart by its files, or a hub id.
        output: the folder to make.
        to: "hf" or another name of a format, e.g. "meta", "mindspore".
        dtype: "fp32", "bf16", "fp16" or a torch dtype to round the weights to; None: as stored.
        rope_theta: wavelength base of the rotary positions, where the source does not state one.
        options: what only some formats take; None: not given. For MindSpore's: `config`, `strategy` and `pick` to read
            it, `layout` to write it.

    Returns:
        `output`.

    Raises:
        UsageError: no such format, or an option that neither side takes.
        PunaError: the source is in no known format, incomplete or damaged, holds what the target cannot say, as fp16
            weights over 65,504, or `output` exists.
    """
    output, dtype = Path(output), dtype_of(dtype)
    known = format_modules()
    if to not in known:
        raise UsageError(f"no format is called {to!r}; there are {', '.join(known)}")
    if output.exists():
        raise PunaError(f"{output} exists already; choose another place or remove it first")
    if not Path(source).exists() and not is_hub_id(source):
        raise PunaError(f"there is no file or folder {source}; name a checkpoint's folder, or its file")
    place = Path(source) if Path(source).is_file() else resolve(source)
    if (place / "checkpoints").is_dir():
        raise PunaError(f"{place} is a training run; write its weights with `puna export {place} -o DIR` first")
    reader = next((name for name, module in known.items() if module.recognises(place)), None)
    if reader is None:
        raise PunaError(f"{place} is in no format that is known ({', '.join(known)}){_content(place)}")
    for_read, for_write = _shared_out(options, known[reader], known[to])
    config, tensors, tokenizer = known[reader].read(place, rope_theta, **for_read)
    if tokenizer is not None:
        tokenizer.check_vocab_size(config.vocab_size)
    with counted("converting", rounded(fit(config, tensors), dtype)) as tensors:
        known[to].write(output, config, tensors, tokenizer, **for_write)
    if tokenizer is None:
        say(f"{source} has no tokenizer; copy tokenizer.model or tokenizer.json to {output}")
    return output


def format_modules() -> dict[str, ModuleType]:
    """Name -> module of every format."""
    names = sorted(module.name for module in pkgutil.iter_modules(formats.__path__))
    return {name: importlib.import_module(f"{formats.__name__}.{name}") for name in names}


def _shared_out(
    options: dict[str, Any], reader: ModuleType, writer: ModuleType
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that were given, for the reader and for the writer.

    Raises:
        UsageError: neither takes one of them.
    """
    given = {name: value for name, value in options.items() if value is not None}
    takes = getattr(reader, "READ_OPTIONS", ()), getattr(writer, "WRITE_OPTIONS", ())
    if unknown := [name for name in given if name not in (*takes[0], *takes[1])]:
        names = [module.__name__.rpartition(".")[2] for module in (reader, writer)]
        raise UsageError(f"{unknown[0]} is no option of reading {names[0]} or writing {names[1]}; leave it out")
    for_read, for_write = ({name: given[name] for name in names if name in given} for names in takes)
    return for_read, for_write


def _content(place: Path) -> str:
    if place.is_file():
        return ""
    names = sorted(path.name for path in place.iterdir())
    return "; it holds " + ((", ".join(names[:5]) + (", …" if len(names) > 5 else "")) or "nothing")
