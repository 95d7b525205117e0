"""Tensors that stay on the disk until they are read, one at a time.

A `StoredTensor` knows its shape and dtype without touching its bytes; reading maps the file, so that a model of any
size passes through in the memory of its largest tensor. Readers of every format give dictionaries of them, the writer
of safetensors files takes them.

    open_safetensors(file) -> {name: StoredTensor} -> write_safetensors(file, {name: StoredTensor})

Where a tensor's values lie in a file as they are to be written, the system copies them from file to file.
"""

import contextlib
import errno
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.serialization import skip_data

from puna.errors import PunaError, UsageError
from puna.files import begin_sync, file_aside
from puna.progress import Progress

#: Our names for the dtypes of weights.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Memory that a tensor takes while it is copied, where it is read in pieces: small enough for the processor's cache,
#: and for the allocator to use it again instead of asking the system for every piece.
PIECE_BYTES = 1 << 19

#: Bytes that the system is asked to copy at once: few enough to be read ahead while those before are written.
COPIED_BYTES = 1 << 23

#: Errors of a system that cannot copy between two files; the bytes are then read and written.
_NOT_COPIED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK, errno.EOPNOTSUPP, errno.EXDEV}

#: Names of dtypes in the header of a safetensors file.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Extent:
    """A run of bytes in a file.

    Attributes:
        path: the file.
        start: where they begin, in bytes.
        size: how many they are.
    """

    path: str
    start: int
    size: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is read when asked.

    Attributes:
        shape: its size in every dim.
        dtype: as stored.
        where: the file that holds it, for messages.
        read: gives the tensor; it may lie in mapped memory, so copy what must outlive or change it.
        read_rows: gives the rows from `start` to `stop` of dim 0, where reading them takes less than reading all.
        extents: gives where its values lie in files, in order and little-endian; None: they lie nowhere like that.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str
    read: Callable[[], Tensor]
    read_rows: Callable[[int, int], Tensor] | None = None
    extents: Callable[[], Iterable[Extent]] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of dim 0."""
        return self.read()[start:stop] if self.read_rows is None else self.read_rows(start, stop)

    def part(self, index: tuple[slice, ...]) -> "StoredTensor":
        """A part of the tensor, a slice of every dim, without steps.

        For rows of a file the disk reads no other bytes. For columns it reads the whole tensor, which takes less time
        than as many small pieces; it does so once for all processes of a machine.
        """
        ranges = [range(*part.indices(size)) for part, size in zip(index, self.shape, strict=True)]
        return StoredTensor(tuple(map(len, ranges)), self.dtype, self.where, lambda: self._read_part(ranges))

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        """The values of a part."""
        return self.part(index).read()

    def _read_part(self, ranges: list[range]) -> Tensor:
        shape = tuple(map(len, ranges))
        extents = list(self.extents()) if self.extents is not None else []
        if shape == self.shape or shape[1:] != self.shape[1:] or len(extents) != 1:
            return self.read()[tuple(slice(part.start, part.stop) for part in ranges)]
        values = torch.empty(shape, dtype=self.dtype)
        start = extents[0].start + extents[0].size // self.shape[0] * ranges[0].start
        _read_alone(Extent(extents[0].path, start, values.nbytes), bytes_of(values))
        return values

    def pieces(self) -> Iterator[Tensor]:
        """The tensor in pieces of whole rows, in order, that take about `PIECE_BYTES` of memory each."""
        if self.read_rows is None or not self.shape or not self.size_bytes:
            yield self.read()
            return
        count = max(1, PIECE_BYTES * self.shape[0] // self.size_bytes)
        for start in range(0, self.shape[0], count):
            yield self.read_rows(start, min(start + count, self.shape[0]))

    def each(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> "StoredTensor":
        """The same tensor with `change` applied to its values, one by one, when they are read; it gives `dtype`."""
        rows = self.read_rows
        changed = None if rows is None else lambda start, stop: change(rows(start, stop))
        return StoredTensor(self.shape, dtype, self.where, lambda: change(self.read()), changed)

    @classmethod
    def by_rows(
        cls, shape: tuple[int, ...], dtype: torch.dtype, where: str, read_rows: Callable[[int, int], Tensor]
    ) -> "StoredTensor":
        """A tensor of at least one dim that is put together row by row."""
        return cls(shape, dtype, where, lambda: read_rows(0, shape[0]), read_rows)

    @classmethod
    def of(cls, tensor: Tensor, where: str = "memory") -> "StoredTensor":
        """A tensor that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, where, lambda: tensor.detach())


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype called `name`; dtypes and None pass through.

    Raises:
        UsageError: nothing is called so; the message lists the names.
    """
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise UsageError(f"no dtype is called {name!r}; there are {', '.join(DTYPES)}")
    return DTYPES[name]


def rounded(tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> dict[str, StoredTensor]:
    """The same tensors, rounded to `dtype` once they are read; None: as they are.

    Reading them raises a PunaError where a number is beyond what `dtype` can say, as those over 65,504 are in fp16.
    """
    return {
        name: tensor.each(partial(_rounded, name, tensor.where, dtype), dtype)
        if dtype not in (None, tensor.dtype)
        else tensor
        for name, tensor in tensors.items()
    }


def _rounded(name: str, where: str, dtype: torch.dtype, values: Tensor) -> Tensor:
    result = values.to(dtype)
    check_range(f"{where}: {name}", values, result)
    return result


def check_range(name: str, values: Tensor, result: Tensor) -> None:
    """Raises a PunaError where a finite number became infinite as it was rounded, to fp16 say."""
    if result.dtype == torch.float16 != values.dtype and result.isinf().any():
        lost = values[result.isinf().to(values.device) & values.isfinite()]
        if len(lost):
            raise PunaError(
                f"{name} holds {lost[0].item():g}, and fp16 has no numbers beyond "
                f"{torch.finfo(torch.float16).max:,.0f}; take bf16 instead"
            )


def are_copies(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, or both NaN, once the wider is rounded to the dtype of the other."""
    dtype = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return one.shape == other.shape and torch.allclose(one.to(dtype), other.to(dtype), rtol=0, atol=0, equal_nan=True)


def dtype_name(dtype: torch.dtype) -> str:
    """What Hugging Face calls a dtype, e.g. "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, mapped.

    Raises:
        PunaError: the file is missing, cut off or no safetensors file, or the system does not map one so large.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        header, start = _header(path)
        tensors = {}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            piece = file.get_slice(name)
            dtype = SAFETENSORS_DTYPES.get(piece.get_dtype())
            if dtype is None:
                raise PunaError(f"{path}: {name} is stored as {piece.get_dtype()}, which puna does not read")
            read = partial(file.get_tensor, name)  # a view of the mapped file
            rows = partial(_rows, read)
            first, end = header[name]["data_offsets"]
            extents = partial(tuple, [Extent(str(path), start + first, end - first)])
            tensors[name] = StoredTensor(tuple(piece.get_shape()), dtype, str(path), read, rows, extents)
        return tensors
    except FileNotFoundError:
        raise PunaError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise PunaError(f"{path} is damaged or cut off ({error}); fetch or make it again") from None
    except RuntimeError as error:  # torch's, where a mapping is larger than the machine's memory
        raise PunaError(
            f"the system does not map {path} ({error}); let it map files that are larger than its memory with "
            "sysctl vm.overcommit_memory=1, or take the model in several files"
        ) from None


def _rows(read: Callable[[], Tensor], start: int, stop: int) -> Tensor:
    return read()[start:stop]


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file; empty if the file is no safetensors file.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        return _header(path)[0].get("__metadata__") or {}
    except (ValueError, AttributeError):
        return {}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where the values begin."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError("the header is longer than the file")
        return json.loads(file.read(size)), 8 + size


def open_pickled(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that `torch.save` wrote (`.bin`, `.pth`), mapped; no code in it is run.

    Raises:
        PunaError: the file is missing, cut off, or holds more than named tensors.
    """
    import pickle

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise PunaError(f"{path} does not exist") from None
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise PunaError(f"{path} is damaged, or holds more than tensors and is not opened ({reason})") from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PunaError(f"{path} is damaged or cut off ({reason}); fetch or make it again") from None
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise PunaError(f"{path} does not hold a mapping of names to tensors; it is no file of weights")
    return {name: StoredTensor.of(tensor, str(path)) for name, tensor in content.items()}


def write_pickled(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Writes a file as `torch.save` does for a dictionary, reading one tensor at a time; aside, synced and renamed.

    Checksums inside the archive stay empty, as with `torch.serialization.set_crc32_options(False)`; `torch.load` does
    not look at them.

    Raises:
        ValueError: a tensor that was read has another shape or dtype than it promised.
    """
    with file_aside(path) as file:
        form = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}  # not touched
        with skip_data():
            torch.save(form, file)  # all but the values, with room for them
        file.flush()
        for number, (name, tensor) in enumerate(tensors.items()):
            file.seek(start_of_values(file.name, number))
            _write_values(file, name, tensor)


def start_of_values(archive: str | IO[bytes], number: int = 0) -> int:
    """Where the values of the n-th tensor begin in an archive that `torch.save` wrote."""
    reader: Any = torch._C.PyTorchFileReader(archive)
    return reader.get_record_offset(f"data/{number}")


@contextlib.contextmanager
def counted(title: str, tensors: Mapping[str, StoredTensor]) -> Iterator[dict[str, StoredTensor]]:
    """The same tensors; reading or copying them moves a progress bar."""
    total = sum(tensor.size_bytes for tensor in tensors.values())
    with Progress(title, total / 1e6, "MB") as progress:

        def count(values: Tensor) -> Tensor:
            progress.advance(values.nbytes / 1e6)
            return values

        def counted_extents(extents: Callable[[], Iterable[Extent]]) -> Iterator[Extent]:
            for extent in extents():
                yield extent
                progress.advance(extent.size / 1e6)

        def watched(tensor: StoredTensor) -> StoredTensor:
            extents = None if tensor.extents is None else partial(counted_extents, tensor.extents)
            return replace(tensor.each(count, tensor.dtype), extents=extents)

        yield {name: watched(tensor) for name, tensor in tensors.items()}


def write_safetensors(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Writes a safetensors file, reading one tensor at a time; aside, synced and renamed.

    They are read in order, except that those of odd sizes come last: so every tensor is aligned in the file.

    Raises:
        ValueError: a tensor that was read has another shape or dtype than it promised.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda item: _alignment(item[1]), reverse=True)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.size_bytes
        header[name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    with file_aside(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, tensor in ordered:
            _write_values(file, name, tensor)


def _alignment(tensor: StoredTensor) -> int:
    """The largest of 8, 4, 2 and 1 that divides a tensor's size: it keeps what follows aligned to that many bytes."""
    return next(n for n in (8, 4, 2, 1) if tensor.size_bytes % n == 0)


def _write_values(file: IO[bytes], name: str, tensor: StoredTensor) -> None:
    start = file.tell()
    if tensor.extents is None or not _copy(file, tensor.extents()):
        for values in tensor.pieces():
            if (values.shape[1:], values.dtype) != (tensor.shape[1:], tensor.dtype):
                raise ValueError(
                    f"{name} was to be {tensor.shape} {tensor.dtype}, came as {values.shape} {values.dtype}"
                )
            file.write(bytes_of(values))
    if (size := file.tell() - start) != tensor.size_bytes:
        raise ValueError(f"{name} was to have {tensor.size_bytes:,} bytes, came with {size:,}")
    if size > PIECE_BYTES:
        begin_sync(file, start)


def _copy(file: IO[bytes], extents: Iterable[Extent]) -> bool:
    """Has the system append bytes of other files to a file; False, with the file as before, if it cannot.

    Raises:
        PunaError: one of the files ends before its bytes do.
    """
    file.flush()
    target, began = file.fileno(), file.tell()
    with contextlib.ExitStack() as opened:
        sources: dict[str, int] = {}
        for extent in extents:
            if extent.path not in sources:
                sources[extent.path] = opened.enter_context(open(extent.path, "rb")).fileno()
            try:
                _send(sources[extent.path], target, extent)
            except OSError as error:
                if error.errno not in _NOT_COPIED:
                    raise
                file.seek(began)
                return False
    file.seek(os.lseek(target, 0, os.SEEK_CUR))  # the file object does not notice what the system wrote
    return True


def _send(source: int, target: int, extent: Extent) -> None:
    place, stop = extent.start, extent.start + extent.size
    while place < stop:
        if hasattr(os, "posix_fadvise"):  # let the next bytes be fetched meanwhile
            os.posix_fadvise(source, place, min(2 * COPIED_BYTES, stop - place), os.POSIX_FADV_WILLNEED)
        sent = os.sendfile(target, source, place, min(COPIED_BYTES, stop - place))
        if not sent:
            raise PunaError(f"{extent.path} is cut off; fetch or make it again")
        place += sent


def _read_alone(extent: Extent, into: memoryview) -> None:
    """Reads bytes of a file, and has the disk read none of those around them."""
    with open(extent.path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.seek(extent.start)
        while into:
            count = file.readinto(into)
            if not count:
                raise PunaError(f"{extent.path} is cut off; fetch or make it again")
            into = into[count:]


def bytes_of(values: Tensor) -> memoryview:
    """The bytes of a tensor's values."""
    if not values.numel():
        return memoryview(b"")
    return values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
