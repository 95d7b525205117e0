"""MindSpore's `.ckpt`: named tensors as a run of Protocol Buffers messages, mapped and never read whole.

    0A size Value{tag "model.norm_out.weight", tensor{dims 64, type "Float16", content …}}
    0A size Value{tag "lm_head.weight", …}                      a tensor above 512 MiB: several messages of one tag,
    0A size Value{tag "lm_head.weight", …}                      each with all dims and the next part of the content
    "crc_num" and ten bytes                                     where the writer was asked to: CRC-32 of all before

Content is little-endian, in C order. A file keeps texts too (a `str`); they come and go as Python's.

Source: mindspore 2.7 `mindspore/ccsrc/utils/checkpoint.proto`, `train/serialization.py`.
"""

import math
import mmap
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from puna.checkpoint.formats.mindspore import wire
from puna.checkpoint.tensors import Extent, StoredTensor, bytes_of
from puna.errors import PunaError
from puna.files import file_aside, map_file

#: MindSpore's name of a dtype -> torch's.
DTYPES = {
    "Float16": torch.float16,
    "Float32": torch.float32,
    "Float64": torch.float64,
    "BFloat16": torch.bfloat16,
    "Int8": torch.int8,
    "Int16": torch.int16,
    "Int32": torch.int32,
    "Int64": torch.int64,
    "UInt8": torch.uint8,
    "UInt16": torch.uint16,
    "UInt32": torch.uint32,
    "UInt64": torch.uint64,
    "Bool": torch.bool,
}

#: The type of a text: NumPy's U-string, four bytes a character.
TEXT = "str"

#: Most bytes of content in one message.
MESSAGE_BYTES = 512 << 20

#: A tensor with more is a sign of damage.
_MOST_DIMS = 8

#: What stands before the ten bytes of a checksum.
CRC_MARK = b"crc_num"
_CRC_BYTES = len(CRC_MARK) + 10


def open_ckpt(path: Path) -> dict[str, StoredTensor | str]:
    """The tensors and texts of a `.ckpt`, in the file's order, mapped; a checksum is verified where there is one.

    Raises:
        PunaError: the file is missing, damaged, cut off or encrypted, or holds what is neither tensor nor text.
    """
    data = map_file(path)
    stop = _checked_end(path, data)
    try:
        parameters = _parameters(path, data, stop)
    except wire.BrokenMessage as error:
        raise PunaError(
            f"{path} is no checkpoint of MindSpore, or damaged, cut off or encrypted ({error}); fetch or make it again"
        ) from None
    return {tag: _opened(path, data, tag, parameter) for tag, parameter in parameters.items()}


def write_ckpt(path: Path, values: Mapping[str, StoredTensor | str]) -> None:
    """Writes tensors and texts by their tags as MindSpore does, without a checksum; aside, synced and renamed.

    One piece of a tensor is in memory at a time.

    Raises:
        PunaError: MindSpore has no such dtype.
    """
    types = {dtype: name for name, dtype in DTYPES.items()}
    with file_aside(path) as file:
        for tag, value in values.items():
            if isinstance(value, str):
                content = value.encode("utf-32-le")
                file.write(_head(tag, [0], TEXT, len(content)) + content)
            elif value.dtype not in types:
                raise PunaError(f"{tag}: MindSpore has no dtype {value.dtype}")
            else:
                _write_tensor(file, tag, value, types[value.dtype])


@dataclass
class _Parameter:
    """What the messages of one tag say."""

    dims: list[int]
    type: str
    parts: list[tuple[int, int]] = field(default_factory=list)  # start and stop of the content in the file

    @property
    def size_bytes(self) -> int:
        return sum(stop - start for start, stop in self.parts)


def _checked_end(path: Path, data: mmap.mmap) -> int:
    """Where the messages end: before the checksum, if there is one."""
    end = len(data) - _CRC_BYTES
    if end < 0 or data[end : end + len(CRC_MARK)] != CRC_MARK:
        return len(data)
    crc = 0
    with memoryview(data) as view:
        for start in range(0, end, 1 << 24):
            crc = zlib.crc32(view[start : min(start + (1 << 24), end)], crc)
    if crc != int.from_bytes(data[end + len(CRC_MARK) :], "big"):
        raise PunaError(f"{path} is damaged: its checksum is not that of its content; fetch or make it again")
    return end


def _parameters(path: Path, data: mmap.mmap, stop: int) -> dict[str, _Parameter]:
    found: dict[str, _Parameter] = {}
    last = None
    for number, kind, start, end in wire.fields(data, 0, stop):
        if (number, kind) != (1, wire.COUNTED):
            raise wire.BrokenMessage(f"field {number} is not one of a checkpoint")
        tag, parameter = _value(path, data, start, end)
        if tag not in found:
            found[tag] = parameter
        elif tag == last and (parameter.dims, parameter.type) == (found[tag].dims, found[tag].type):
            found[tag].parts += parameter.parts
        else:
            raise PunaError(f"{path} holds {tag} twice; fetch or make it again")
        last = tag
    return found


def _value(path: Path, data: mmap.mmap, start: int, stop: int) -> tuple[str, _Parameter]:
    tag, parameter = None, None
    for number, kind, first, end in wire.fields(data, start, stop):
        if kind != wire.COUNTED:
            raise wire.BrokenMessage(f"field {number} at byte {start:,} is not one of a parameter")
        if number == 1:
            tag = wire.text(data, first, end)
        elif number == 2:
            parameter = _tensor(data, first, end)
        elif number == 3:
            raise PunaError(f"{path} holds {tag}, a table of embeddings that grows; puna does not read it")
    if tag is None or parameter is None:
        raise wire.BrokenMessage(f"a parameter at byte {start:,} lacks its name or its values")
    return tag, parameter


def _tensor(data: mmap.mmap, start: int, stop: int) -> _Parameter:
    parameter = _Parameter([], "")
    for number, kind, first, end in wire.fields(data, start, stop):
        if number == 1:
            parameter.dims += [wire.signed(dim) for dim in wire.varints(data, kind, first, end)]
            if len(parameter.dims) > _MOST_DIMS:
                raise wire.BrokenMessage(f"a tensor at byte {start:,} has more than {_MOST_DIMS} dims")
        elif number == 2 and kind == wire.COUNTED:
            parameter.type = wire.text(data, first, end)
        elif number == 3 and kind == wire.COUNTED:
            parameter.parts.append((first, end))
    return parameter


def _opened(path: Path, data: mmap.mmap, tag: str, parameter: _Parameter) -> StoredTensor | str:
    size = parameter.size_bytes
    if parameter.type == TEXT:
        text = b"".join(data[start:stop] for start, stop in parameter.parts)
        return text.decode("utf-32-le", errors="replace").rstrip("\0")
    dtype = DTYPES.get(parameter.type)
    if dtype is None:
        raise PunaError(f"{path}: {tag} is stored as {parameter.type!r}, which puna does not read")
    shape = tuple(parameter.dims)
    if shape == (0,) and size == dtype.itemsize:
        shape = ()  # as old files spell a single number
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
        raise PunaError(
            f"{path}: {tag} of shape {shape} and type {parameter.type} has {size:,} bytes; the file is damaged"
        )
    content = _Content(data, parameter.parts)
    extents = [Extent(str(path), start, stop - start) for start, stop in parameter.parts]
    if not shape or not size:
        return StoredTensor(
            shape, dtype, str(path), lambda: content.read(0, size).view(dtype).view(shape), extents=lambda: extents
        )
    row_bytes = size // shape[0]

    def rows(start: int, stop: int) -> Tensor:
        return content.read(start * row_bytes, stop * row_bytes).view(dtype).view(-1, *shape[1:])

    return replace(StoredTensor.by_rows(shape, dtype, str(path), rows), extents=lambda: extents)


@dataclass(frozen=True)
class _Content:
    """Bytes that lie in several places of a mapped file."""

    data: mmap.mmap
    parts: list[tuple[int, int]]

    def read(self, start: int, stop: int) -> Tensor:
        """A copy of the bytes from `start` to `stop`: in the file they lie at odd addresses, where values may not."""
        copy = torch.empty(stop - start, dtype=torch.uint8)
        target, begin = copy.numpy(), 0
        for first, end in self.parts:
            a, b = max(start, begin), min(stop, begin + end - first)
            if a < b:
                target[a - start : b - start] = np.frombuffer(self.data, np.uint8, b - a, first + a - begin)
            begin += end - first
        return copy


def _write_tensor(file: IO[bytes], tag: str, tensor: StoredTensor, type: str) -> None:
    rest, room = tensor.size_bytes, 0
    if not rest:
        file.write(_head(tag, tensor.shape, type, 0))
    for data in map(bytes_of, tensor.pieces()):
        while data:
            if not room:
                room = min(rest, MESSAGE_BYTES)
                file.write(_head(tag, tensor.shape, type, room))
            taken = data[:room]
            file.write(taken)
            data, room, rest = data[len(taken) :], room - len(taken), rest - len(taken)
    if rest:
        raise ValueError(f"{tag} lacks {rest:,} bytes of the {tensor.size_bytes:,} that it was to have")


def _head(tag: str, dims: list[int] | tuple[int, ...], type: str, size: int) -> bytes:
    """The bytes of a message before its content, which is the last field of every message around it."""
    tensor = b"".join(wire.number_field(1, dim) for dim in dims) + wire.counted_field(2, type.encode())
    tensor += wire.counted_key(3, size)
    value = wire.counted_field(1, tag.encode()) + wire.counted_key(2, len(tensor) + size) + tensor
    return wire.counted_key(1, len(value) + size) + value
