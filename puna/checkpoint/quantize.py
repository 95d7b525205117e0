"""A model's folder becomes one whose layers hold their weights in few bits, tensor by tensor.

    model.layers.0.mlp.up_proj.weight  bf16   ->   …up_proj.weight  int8, …up_proj.weight_scale  bf16

One weight is in memory at a time, and what quantising it takes only for some of its rows. Scheme and group size go into
`quantization_config` of `config.json`, and `load` opens the folder like any other. It cannot be trained or converted:
keep the folder that it was made from.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.checkpoint.hub import resolve
from puna.checkpoint.huggingface import fit, load_config, load_tokenizer_of, write_model
from puna.checkpoint.tensors import StoredTensor, counted
from puna.checkpoint.weights import open_weights
from puna.errors import PunaError
from puna.files import folder_aside
from puna.quantized import Quantization, QuantizedLinear

#: Weights that are quantised at once: schemes need several times their bytes meanwhile, best in the cache.
WEIGHTS_AT_ONCE = 1 << 18


def quantize(
    model: Path | str, output: Path | str, *, scheme: str = "int8", group_size: int | None = None
) -> dict[str, Any]:
    """Writes a model with weights of few bits.

    Args:
        model: a folder in Hugging Face layout, or a hub id; its tokenizer goes along.
        output: the folder to make.
        scheme: a file of `puna/quantized/schemes`: "int8", "int4" or "fp8".
        group_size: neighbouring weights that share a scale, for schemes that have groups; None: the scheme's own.

    Returns:
        `{"folder", "scheme", "group_size", "size_bytes_before", "size_bytes"}`.

    Raises:
        PunaError: the model cannot be read or is quantised already, `output` exists, or the disk has no room for it.
        UsageError: there is no such scheme, or no such group size for this model.
    """
    folder, output = resolve(model), Path(output)
    config = load_config(folder)
    quantization = Quantization.of(scheme, group_size, config)
    source = fit(config, open_weights(folder))
    tensors = quantized_tensors(source, quantization)
    size_bytes = sum(tensor.size_bytes for tensor in tensors.values())
    _check_disk(output, size_bytes)
    with folder_aside(output) as aside, counted("quantising", tensors) as tensors:
        write_model(aside, config, tensors, load_tokenizer_of(folder), quantization)
    return {
        "folder": str(output),
        "scheme": scheme,
        "group_size": quantization.group_size,
        "size_bytes_before": sum(tensor.size_bytes for tensor in source.values()),
        "size_bytes": size_bytes,
    }


def quantized_tensors(tensors: Mapping[str, StoredTensor], quantization: Quantization) -> dict[str, StoredTensor]:
    """The tensors of a quantised model, quantised when they are read; best read all of one layer, then the next."""
    quantized: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        scheme = quantization.scheme_of(layer) if leaf == "weight" else None
        if scheme is None:
            quantized[name] = tensor
            continue
        group_size = quantization.group_size_of(scheme)
        read = _once(partial(_quantized, tensor, scheme, group_size))
        rows, columns = tensor.shape
        for part, (shape, dtype) in scheme.form(rows, columns, group_size).items():
            quantized[f"{layer}.{part}"] = StoredTensor(shape, dtype, tensor.where, partial(read, part))
    return quantized


def _quantized(tensor: StoredTensor, scheme: type[QuantizedLinear], group_size: int | None) -> dict[str, Tensor]:
    weight = tensor.read()
    pieces = [
        scheme.quantize(rows.float(), group_size) for rows in weight.split(max(1, WEIGHTS_AT_ONCE // weight.shape[1]))
    ]
    return {part: torch.cat([piece[part] for piece in pieces]) for part in pieces[0]}


def _once(quantized: Callable[[], dict[str, Tensor]]) -> Callable[[str], Tensor]:
    """Gives each part of a quantised weight; it is quantised once, unless a part is asked for a second time."""
    left: dict[str, Tensor] = {}

    def read(part: str) -> Tensor:
        if part not in left:
            left.update(quantized())
        return left.pop(part)

    return read


def _check_disk(output: Path, size_bytes: int) -> None:
    place = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    if free < size_bytes:
        raise PunaError(
            f"{output} needs {size_bytes / 1e9:,.1f} GB, and {place} has {free / 1e9:,.1f} GB free; "
            "free some space or choose another disk"
        )
