"""Prepared folders: documents as token ids, in Arrow IPC files that are mapped into memory rather than read.

    DIR/dataset.json          what is in it, and from what it was made
    DIR/shard-00000.arrow …   one record a document: id, source, tokens and, for dialogs, is_target
    DIR/tokenizer/            the tokenizer that made the ids
    DIR/held_out/             the same again for the documents kept from training, where some were

pyarrow, datasets, polars and duckdb open a shard as it is. `write_shard` writes one, `Dataset` reads a folder of them
as one line of tokens: documents laid end to end in the order of the shards,

    documents  a a a | b b | c c c c c        starts  0 3 5 10

so that `tokens(2, 6)` is `a b b c`, copied only where the piece spans two record batches.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import xxhash

from puna.errors import PunaError
from puna.files import checksum_of, file_aside, read_json
from puna.progress import Progress

#: The number in dataset.json; another one is refused.
FORMAT = 1

#: The file that makes a folder a prepared one; it is written last.
DATASET_FILE = "dataset.json"

#: What `puna prepare` keeps in a folder until it is finished.
WORK_FOLDER = "unfinished"

#: Tokens after which the writer closes a record batch: bounds its memory, not what a shard holds.
BATCH_TOKENS = 1 << 20


class ShardWriter:
    """Collects documents and writes them as record batches; made by `write_shard`."""

    def __init__(self, file: Any, *, dialogs: bool) -> None:
        fields = [("id", pa.string()), ("source", pa.string()), ("tokens", pa.list_(pa.int32()))]
        self.schema = pa.schema([*fields, ("is_target", pa.list_(pa.bool_()))] if dialogs else fields)
        self.documents = self.tokens = self.targets = 0
        self._arrow = pa.ipc.new_file(file, self.schema)
        self._held: list[tuple[str, str, np.ndarray, Any]] = []  # of the next batch, as `add` gets them
        self._held_tokens = 0

    def add(self, id: str, source: str, tokens: np.ndarray, is_target: np.ndarray | None = None) -> None:
        """Appends one document.

        Args:
            id: names the document within its source.
            source: where it came from.
            tokens: (length,) int32, not empty.
            is_target: (length,) bool, whether the model learns to write the token; given for dialogs only.
        """
        self._held.append((id, source, tokens, is_target))
        self.documents += 1
        self.tokens += len(tokens)
        self.targets += len(tokens) if is_target is None else int(np.count_nonzero(is_target))
        self._held_tokens += len(tokens)
        if self._held_tokens >= BATCH_TOKENS:
            self._write_batch()

    def finish(self) -> None:
        """Writes what is still held, and the file's footer."""
        if self._held:
            self._write_batch()
        self._arrow.close()

    def _write_batch(self) -> None:
        ids, sources, tokens, is_target = zip(*self._held, strict=True)
        offsets = np.zeros(len(ids) + 1, np.int32)
        np.cumsum([len(one) for one in tokens], out=offsets[1:])
        columns = [
            pa.array(ids, pa.string()),
            pa.array(sources, pa.string()),
            _lists(pa.int32(), offsets, np.concatenate(tokens)),
        ]
        if "is_target" in self.schema.names:
            bits = np.packbits(np.concatenate(is_target), bitorder="little")
            columns.append(_lists(pa.bool_(), offsets, bits))
        self._arrow.write_batch(pa.record_batch(columns, schema=self.schema))
        self._held, self._held_tokens = [], 0


def _lists(type: Any, offsets: np.ndarray, values: np.ndarray) -> Any:
    """Arrow's lists of the bytes as they are; `pa.array` would load NumPy's masked arrays first."""
    flat = pa.Array.from_buffers(type, int(offsets[-1]), [None, pa.py_buffer(values)])
    return pa.Array.from_buffers(pa.list_(type), len(offsets) - 1, [None, pa.py_buffer(offsets)], children=[flat])


@contextlib.contextmanager
def write_shard(path: Path | str, *, dialogs: bool = False) -> Iterator[ShardWriter]:
    """Opens a shard for writing; the file appears, whole, when the block ends without an error.

    Args:
        path: the file.
        dialogs: whether documents come with `is_target`.
    """
    try:
        with file_aside(path) as file:
            writer = ShardWriter(file, dialogs=dialogs)
            yield writer
            writer.finish()
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file it was
        raise


def shard_entry(path: Path, writer: ShardWriter) -> dict[str, Any]:
    """What dataset.json says of one finished shard."""
    return {
        "file": path.name,
        "documents": writer.documents,
        "tokens": writer.tokens,
        "targets": writer.targets,
        "size_bytes": path.stat().st_size,
        "checksum": checksum_of(path),
    }


class Dataset:
    """A prepared folder, read-only and mapped into memory.

    Attributes:
        folder: where it is.
        info: dataset.json.
        starts: (documents + 1,) int64, the first token of every document, and the number of tokens.
        lengths: (documents,) int32, tokens per document.
    """

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.folder, self.info = folder, info
        self._first_token = _running_total([shard["tokens"] for shard in info["shards"]])
        self._first_document = _running_total([shard["documents"] for shard in info["shards"]])
        self._open: dict[int, list[_Batch]] = {}

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Opens a prepared folder.

        Raises:
            PunaError: it is not one, is unfinished, of another format, or a shard is missing or cut off.
        """
        folder = Path(folder)
        if not (folder / DATASET_FILE).exists():
            raise PunaError(_why_not_prepared(folder))
        info = read_json(folder / DATASET_FILE)
        if not isinstance(info, dict) or info.get("format") != FORMAT:
            found = info.get("format") if isinstance(info, dict) else None
            raise PunaError(f"{folder / DATASET_FILE}: format {FORMAT} expected, {found} found; prepare the data again")
        for shard in info["shards"]:
            _check_size(folder / shard["file"], shard["size_bytes"])
        return cls(folder, info)

    def __len__(self) -> int:
        return int(self._first_document[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).open, (self.folder,)  # a mapping cannot be pickled; its folder can

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(documents,) int32, tokens per document."""
        parts = [np.diff(batch.offsets) for shard in range(len(self.info["shards"])) for batch in self._batches(shard)]
        return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32, copy=False)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """(documents + 1,) int64, the first token of every document, and the number of tokens."""
        return _running_total(self.lengths)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of all documents laid end to end, as (stop - start,) int32; read-only."""
        return _joined([batch.tokens[a:b] for batch, a, b in self._pieces(start, stop)], np.int32)

    def is_target(self, start: int, stop: int) -> np.ndarray | None:
        """Whether each of these tokens is to be learnt, (stop - start,) bool; None where all are (no dialogs)."""
        parts = []
        for batch, a, b in self._pieces(start, stop):
            if batch.is_target is None:
                return None
            parts.append(batch.is_target.slice(a, b - a).to_numpy(zero_copy_only=False))
        return _joined(parts, np.bool_)

    def document(self, index: int) -> tuple[str, str, np.ndarray]:
        """Id, source and tokens of one document."""
        index = range(len(self))[index]
        shard = int(np.searchsorted(self._first_document, index, side="right")) - 1
        index -= int(self._first_document[shard])
        for batch in self._batches(shard):
            if index < len(batch.ids):
                tokens = batch.tokens[batch.offsets[index] : batch.offsets[index + 1]]
                return batch.ids[index].as_py(), batch.sources[index].as_py(), tokens
            index -= len(batch.ids)
        raise _does_not_match(self.folder / self.info["shards"][shard]["file"])

    @property
    def fingerprint(self) -> str:
        """A hash of the shards' checksums and of how they fill rows; equal for data sets whose rows are the same."""
        facts = [*(shard["checksum"] for shard in self.info["shards"]), str(self.info.get("fill"))]
        return xxhash.xxh3_128_hexdigest("\n".join(facts).encode())

    def verify(self, *, rank: int = 0, size: int = 1) -> None:
        """Reads the shards and compares them with their checksums; each of `size` ranks reads its part of them.

        Raises:
            PunaError: a shard is damaged; the message names it.
        """
        shards = self.info["shards"][rank::size]
        with Progress(f"checking {self.folder}", sum(s["size_bytes"] for s in shards) / 1e6, "MB") as progress:
            for shard in shards:
                path = self.folder / shard["file"]
                if checksum_of(path) != shard["checksum"]:
                    raise PunaError(
                        f"{path} is damaged (its checksum differs from {DATASET_FILE}); prepare the data again"
                    )
                progress.advance(shard["size_bytes"] / 1e6)

    def _pieces(self, start: int, stop: int) -> "Iterator[tuple[_Batch, int, int]]":
        """The record batches that hold tokens `start` to `stop`, with the piece of each."""
        if not 0 <= start <= stop <= self._first_token[-1]:
            raise IndexError(f"tokens {start}:{stop} of {self.folder}, which has {self._first_token[-1]}")
        shard = int(np.searchsorted(self._first_token, start, side="right")) - 1
        while start < stop:
            base = int(self._first_token[shard])
            for batch in self._batches(shard):
                end = base + len(batch.tokens)
                if start < min(stop, end):
                    yield batch, start - base, min(stop, end) - base
                    start = min(stop, end)
                base = end
            shard += 1

    def _batches(self, shard: int) -> "list[_Batch]":
        if shard not in self._open:
            entry = self.info["shards"][shard]
            path = self.folder / entry["file"]
            batches = _map(path)
            if sum(len(batch.tokens) for batch in batches) != entry["tokens"]:
                raise _does_not_match(path)
            self._open[shard] = batches
        return self._open[shard]


class _Batch(NamedTuple):
    """One record batch, as views of the mapped file."""

    ids: Any
    sources: Any
    offsets: np.ndarray
    tokens: np.ndarray
    is_target: Any | None


def _map(path: Path) -> list[_Batch]:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return [_views(reader.get_batch(index)) for index in range(reader.num_record_batches)]
    except (pa.ArrowInvalid, KeyError) as error:
        raise PunaError(f"{path} is not a shard of puna ({error}); prepare the data again") from None


def _views(batch: Any) -> _Batch:
    tokens = batch.column("tokens")
    is_target = batch.column("is_target").values if "is_target" in batch.schema.names else None
    return _Batch(
        batch.column("id"), batch.column("source"), tokens.offsets.to_numpy(), tokens.values.to_numpy(), is_target
    )


def _joined(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _running_total(counts: Any) -> np.ndarray:
    totals = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=totals[1:])
    return totals


def _check_size(path: Path, expected: int) -> None:
    if not path.exists():
        raise PunaError(f"{path} is missing although {DATASET_FILE} lists it; prepare the data again")
    found = path.stat().st_size
    if found != expected:
        raise PunaError(
            f"{path} has {found:,} bytes instead of {expected:,}: it is cut off or damaged; prepare the data again"
        )


def _does_not_match(path: Path) -> PunaError:
    return PunaError(f"{path} does not hold what {DATASET_FILE} says; prepare the data again")


def _why_not_prepared(folder: Path) -> str:
    if not folder.exists():
        return f"{folder} does not exist; make it with `puna prepare`"
    if (folder / WORK_FOLDER).exists():
        return f"{folder} is not finished; run the `puna prepare` that makes it again, it continues where it stopped"
    return f"{folder} is not a prepared folder (no {DATASET_FILE}); make one with `puna prepare`"
