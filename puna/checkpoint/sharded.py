"""The format of torch.distributed.checkpoint: every rank writes its pieces of the tensors, any layout reads them.

    folder/__0_0.distcp, __1_0.distcp …     each rank's pieces, each a small zip archive as `torch.save` makes it
           .metadata                        of each tensor its shape, dtype and pieces; of each piece its file and place

Saving goes through pieces in host memory (`Piece`), which know where they belong in the whole tensor and nothing of
meshes or devices. Reading maps the files: an archive says where its values begin, and only those that are asked for are
read, so that neither loading on another layout nor an export ever holds more than one tensor. `.metadata` is a pickle,
and a run may come from anyone: what such a file does not consist of is not made, nor called.
"""

import contextlib
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.serialization import _get_layout, skip_data

from puna.checkpoint.collectives import Collectives
from puna.checkpoint.tensors import Extent, StoredTensor, start_of_values
from puna.errors import PunaError

#: The form of values that are not tensors.
PLAIN = "a plain value"


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a tensor, in host memory.

    Attributes:
        values: the piece.
        offsets: where it begins in the whole tensor, in every dim.
        shape: of the whole tensor.
    """

    values: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        """What torch.distributed.checkpoint is to write; ranks that hold the same piece agree on who does."""
        if self.values.numel() == 0 and torch.Size(self.shape).numel():
            return []  # more ranks than rows
        chunk = ChunkStorageMetadata(torch.Size(self.offsets), self.values.shape)
        data = TensorWriteData(chunk, TensorProperties(dtype=self.values.dtype), torch.Size(self.shape))
        return [WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]


def flat(content: dict[str, Any]) -> dict[str, Any]:
    """The values of nested dictionaries and lists under the names by which a checkpoint stores them, e.g. "model.x"."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(content)
    return planner.state_dict


def local_piece(tensor: Tensor) -> Piece | None:
    """What this rank holds of a tensor, not copied; None: it is not among the tensor's ranks.

    Raises:
        ValueError: the part that it holds has another shape than its placements say.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Piece(tensor, (0,) * tensor.dim(), tuple(tensor.shape))
    if tensor.device_mesh.get_coordinate() is None:
        return None
    values = tensor.to_local()
    (chunk,) = tensor.__create_chunk_list__()
    if values.shape != chunk.sizes:
        raise ValueError(
            f"a tensor of {tuple(tensor.shape)} placed {tensor.placements} on {tensor.device_mesh} has "
            f"{tuple(values.shape)} where {tuple(chunk.sizes)} belongs"
        )
    return Piece(values, tuple(chunk.offsets), tuple(tensor.shape))


def write_sharded(path: Path, values: dict[str, Any], ranks: Collectives) -> None:
    """Writes pieces and plain values by their names, synced; every rank calls it with its own.

    Args:
        path: the folder, on a file system that all ranks share.
        values: what several ranks hold alike is written by one of them.
        ranks: those that write together.
    """
    planner, writer = _PiecesPlanner(flatten_state_dict=False), FileSystemWriter(path, per_thread_copy_ahead=0)
    metadata = Metadata({})

    def plan() -> Any:
        planner.set_up_planner(values, is_coordinator=ranks.is_first)
        writer.set_up_storage_writer(ranks.is_first)
        return writer.prepare_local_plan(planner.create_local_plan())

    def share_out(plans: list[Any]) -> list[Any]:
        nonlocal metadata
        plans, metadata = planner.create_global_plan(plans)
        return writer.prepare_global_plan(plans)

    def write() -> Any:
        with _plain_errors(path):
            return writer.write_data(planner.finish_plan(share), planner).wait()

    share: Any = ranks.reduce_scatter(plan, share_out)
    ranks.all_reduce(write, lambda results: writer.finish(metadata, results))


def read_sharded(path: Path, content: dict[str, Any]) -> None:
    """Fills the tensors of nested dictionaries in place, and puts stored plain values there.

    Args:
        path: the folder that holds `.metadata`.
        content: names, shapes and dtypes must be those that were stored; of a sharded tensor only the local part is
            read.
    """
    reader, planner, metadata = _MappingReader(path), DefaultLoadPlanner(), _read_metadata(path)
    planner.set_up_planner(content, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    reader.read_data(planner.create_local_plan(), planner)


def open_sharded(path: Path, key: str) -> dict[str, StoredTensor]:
    """The tensors below one top-level key of a checkpoint.

    Args:
        path: the folder that holds `.metadata`.
        key: e.g. "model": the tensors `model.NAME` are given as `NAME`.
    """
    metadata = _read_metadata(path)
    files = _Files(path)
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        if name.startswith(f"{key}.") and isinstance(entry, TensorStorageMetadata):
            chunks = sorted(entry.chunks, key=lambda chunk: tuple(chunk.offsets))
            pieces = [(chunk, metadata.storage_data[MetadataIndex(name, chunk.offsets)]) for chunk in chunks]
            read = partial(_assemble, files, pieces, entry)
            extents = None
            if all(chunk.sizes[1:] == entry.size[1:] for chunk in chunks):
                extents = partial(map, files.extent, [info for _, info in pieces])
            stored = StoredTensor(tuple(entry.size), entry.properties.dtype, str(path), read, extents=extents)
            tensors[name.removeprefix(f"{key}.")] = stored
    return tensors


def stored_forms(path: Path) -> dict[str, str]:
    """Shape and dtype of every tensor in a folder, as a text to compare and to print."""
    entries = _read_metadata(path).state_dict_metadata
    return {
        name: _form(entry.size, entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else PLAIN
        for name, entry in entries.items()
    }


def forms(content: dict[str, Any]) -> dict[str, str]:
    """Likewise of nested dictionaries, of the whole tensors where they are sharded."""
    return {
        name: _form(value.shape, value.dtype) if isinstance(value, Tensor) else PLAIN
        for name, value in flat(content).items()
    }


def _form(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {dtype}"


def _read_metadata(path: Path) -> Metadata:
    with open(path / ".metadata", "rb") as file:
        return _MetadataUnpickler(file).load()


class _Properties(TensorProperties):
    """A stored tensor's, as any release of torch wrote them: from 2.15 on they are more, which torch before refuses."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]


class _MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but what `.metadata` consists of."""

    #: That by name, but for dtypes. Modules may differ: Python 3.13 has its paths in another one than 3.11.
    KNOWN: ClassVar[dict[str, Any]] = {
        "PosixPath": Path,
        "TensorProperties": _Properties,
        **{
            each.__name__: each
            for each in (
                Metadata, MetadataIndex, StorageMeta, _StorageInfo, _MEM_FORMAT_ENCODING, _get_layout,
                TensorStorageMetadata, BytesStorageMetadata, ChunkStorageMetadata, torch.Size,
            )
        },
    }  # fmt: skip

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._path = file.name

    def find_class(self, module: str, name: str) -> Any:
        if name in self.KNOWN:
            return self.KNOWN[name]
        if isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise PunaError(
            f"{self._path} asks for {module}.{name}, which no checkpoint needs and which was not called; fetch the run "
            "again from where it was trained"
        )


class _PiecesPlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state_dict[index.fqn]
        return value.values if isinstance(value, Piece) else value


class _MappingReader(FileSystemReader):
    """Reads of every piece only what is asked for, where torch's own reads the whole piece twice."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files = _Files(Path(self.path))
        pieces = [(self.storage_data[item.storage_index], item) for item in plan.items if _is_tensor(item)]
        for info, item in sorted(pieces, key=lambda pair: (pair[0].relative_path, pair[0].offset)):
            asked = _slices(item.storage_offsets, item.lengths)
            planner.resolve_tensor(item).detach().copy_(files.tensor(info, asked))
        return super().read_data(LoadPlan([item for item in plan.items if not _is_tensor(item)]), planner)


def _is_tensor(item: ReadItem) -> bool:
    return item.type == LoadItemType.TENSOR


class _Files:
    """The files of a checkpoint, each opened and mapped once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = FileSystemReader(folder)
        self._mapped: dict[str, Any] = {}

    def tensor(self, info: Any, part: tuple[slice, ...] = ()) -> Tensor:
        """What `torch.save` put at a place of a file, or a part of it, its values mapped."""
        path = self._folder / info.relative_path
        form, begin = self._found(info)
        if info.relative_path not in self._mapped:
            size = path.stat().st_size
            self._mapped[info.relative_path] = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
        mapped = self._mapped[info.relative_path]
        values = mapped[begin : begin + form.untyped_storage().nbytes()]
        tensor = torch.empty(0, dtype=form.dtype).set_(values, form.storage_offset(), form.shape, form.stride())
        tensor = tensor[part]
        _read_ahead(path, tensor.data_ptr() - mapped.data_ptr(), tensor)
        return tensor

    def extent(self, info: Any) -> Extent:
        """Where the values lie that `torch.save` put at a place of a file."""
        form, begin = self._found(info)
        assert form.is_contiguous()  # for it was a copy of its own when it was saved
        return Extent(str(self._folder / info.relative_path), begin, form.nbytes)

    def _found(self, info: Any) -> tuple[Tensor, int]:
        """A stored tensor's shape, strides and dtype, without its values, and where in the file these begin."""
        with open(self._folder / info.relative_path, "rb") as file:
            archive = self._reader._slice_file(file, info)
            with skip_data():
                form = torch.load(archive, weights_only=True)
            archive.seek(0)
            return form, info.offset + start_of_values(archive)


def _slices(offsets: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))


def _read_ahead(path: Path, begin: int, tensor: Tensor) -> None:
    """Asks the system to read the values of a mapped tensor in one go, rather than page by page as they are used."""
    if tensor.numel() and hasattr(os, "posix_fadvise"):
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), begin, (last + 1) * tensor.itemsize, os.POSIX_FADV_WILLNEED)


def _assemble(files: _Files, pieces: list[tuple[Any, Any]], entry: Any) -> Tensor:
    """A whole tensor: mapped where one rank wrote it, else copied together in the memory of this one tensor."""
    if len(pieces) == 1:
        return files.tensor(pieces[0][1])
    whole = torch.empty(entry.size, dtype=entry.properties.dtype)
    for chunk, info in pieces:
        whole[_slices(chunk.offsets, chunk.sizes)] = files.tensor(info)
    return whole


@contextlib.contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Raises the error of a full disk itself, which torch's zip writer hides in an error of its own."""
    try:
        yield
    except Exception as error:
        origin: BaseException | None = error
        while origin is not None:
            if isinstance(origin, OSError) and origin.errno is not None:
                raise OSError(origin.errno, origin.strerror, str(path)) from None
            origin = origin.__context__
        raise
