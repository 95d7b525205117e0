"""The tensors of a training checkpoint, mapped: read one at a time, without the process that wrote them or its memory.

torch.distributed.checkpoint keeps every tensor, or each rank's part of it, as a small zip archive inside the rank's
file. The archive says where the values begin; those are mapped, so that a tensor which one rank wrote whole is read
without a copy.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import skip_data

from puna.checkpoint.tensors import StoredTensor, start_of_values


def open_sharded(path: Path, key: str) -> dict[str, StoredTensor]:
    """The tensors below one top-level key of a checkpoint.

    Args:
        path: the folder that holds `.metadata`.
        key: e.g. "model": the tensors `model.NAME` are given as `NAME`.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(path)
    metadata = reader.read_metadata()
    files = _Files(path, reader)
    return {
        name.removeprefix(f"{key}."): StoredTensor(
            tuple(entry.size),
            entry.properties.dtype,
            str(path),
            partial(_read, files, metadata.storage_data, name, entry),
        )
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith(f"{key}.") and isinstance(entry, TensorStorageMetadata)
    }


class _Files:
    """The files of a checkpoint, each mapped once."""

    def __init__(self, folder: Path, reader: Any) -> None:
        self._folder, self._reader = folder, reader
        self._mapped: dict[str, Any] = {}

    def tensor(self, info: Any) -> Tensor:
        """What `torch.save` put at a place of a file, its values mapped."""
        path = self._folder / info.relative_path
        with open(path, "rb") as file:
            archive = self._reader._slice_file(file, info)
            with skip_data():
                form = torch.load(archive, weights_only=True)  # all but the values
            archive.seek(0)
            begin = info.offset + start_of_values(archive)
        if info.relative_path not in self._mapped:
            size = path.stat().st_size
            self._mapped[info.relative_path] = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
        values = self._mapped[info.relative_path][begin : begin + form.untyped_storage().nbytes()]
        return torch.empty(0, dtype=form.dtype).set_(values, form.storage_offset(), form.shape, form.stride())


def _read(files: _Files, places: dict[Any, Any], name: str, entry: Any) -> Tensor:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    parts = [(chunk, files.tensor(places[MetadataIndex(name, chunk.offsets)])) for chunk in entry.chunks]
    if len(parts) == 1:
        return parts[0][1]
    whole = torch.empty(entry.size, dtype=entry.properties.dtype)
    for chunk, values in parts:
        place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[place] = values
    return whole
