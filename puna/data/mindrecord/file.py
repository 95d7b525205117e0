"""A MindRecord file and its shards, mapped: header, pages, rows.

    0            u64 LE, bytes of the header; the header, JSON; zeros up to `header_size`
    header_size  page 0, page 1, … of `page_size` each, the last one as long as it is used

A row in a blob page: its size, u64 LE; then its arrays in the order of their names, each after its size, u64 BE (a
single array has none). A row in a raw page: its size, u64 LE; then its single values, a MessagePack map.
"""

import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from puna.data.mindrecord import messagepack
from puna.data.mindrecord.integers import Buffer, decode_all
from puna.errors import PunaError
from puna.files import map_file

#: Types of fields that are arrays -> NumPy's; integers are compressed.
ARRAY_TYPES: dict[str, np.dtype[Any]] = {
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
}

#: The size that a row begins with, and an array among several.
LENGTH_BYTES = 8

#: Bytes of rows that are decoded at once: enough to be fast, few enough to stay near the processor.
ROWS_BYTES = 1 << 18

#: The smallest sizes that MindRecord takes.
SMALLEST_HEADER, SMALLEST_PAGE = 16 << 10, 32 << 10

Schema = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        number: its place in the file.
        is_blob: whether it holds arrays, not single values.
        group: counts the blob pages.
        start: offset in the file.
        size_bytes: what is used of it.
        rows: the rows in it, first and last plus one; of blob pages only.
        groups: of raw pages: blob page whose rows' single values are here -> offset in the page.
    """

    number: int
    is_blob: bool
    group: int
    start: int
    size_bytes: int
    rows: tuple[int, int]
    groups: dict[int, int]


class MindRecord:
    """One file: all rows, or one shard of them.

    Attributes:
        path: the file.
        header: its JSON.
        schema: name of a column -> its type and, of an array, its shape.
        blob_fields: the columns that are arrays or bytes, in the order in which they lie.
        index_fields: the columns that the index lists.
        pages: all of them.
        shards: the names of all files of this data set, in order.
    """

    def __init__(self, path: Path, data: mmap.mmap, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self._data = data
        schemas = header["schema"]
        if len(schemas) != 1:
            raise PunaError(f"{path} has {len(schemas)} schemas; puna reads files of one")
        self.schema: Schema = schemas[0]["schema"]
        self.blob_fields: list[str] = schemas[0]["blob_fields"]
        self.index_fields = [entry["index_field"] for entry in header["index_fields"] or []]
        self.shards: list[str] = header["shard_addresses"]
        self.pages = [self._page(fields) for fields in header["page"]]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Maps a file.

        Raises:
            PunaError: it is missing, none of MindRecord's, or damaged.
        """
        data = map_file(path)
        try:
            size = int.from_bytes(data[:LENGTH_BYTES], "little")
            if size > len(data) - LENGTH_BYTES:
                raise ValueError(f"a header of {size:,} bytes is announced, {len(data):,} bytes are there")
            header = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + size])
            if header["version"] != "3.0":
                raise ValueError(f"version {header['version']!r}, not 3.0")
            return cls(path, data, header)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
            raise PunaError(f"{path} is no MindRecord file, or damaged ({error}); fetch or make it again") from None

    @classmethod
    def open_all(cls, path: Path) -> list[Self]:
        """Maps a file and the other shards of its data set, in order.

        Raises:
            PunaError: a shard is missing or damaged.
        """
        first = cls.open(path)
        if len(first.shards) == 1:  # whatever its name is now
            return [first]
        return [cls.open(path.with_name(name)) for name in first.shards]

    def __len__(self) -> int:
        return sum(stop - start for start, stop in (page.rows for page in self.blob_pages))

    @property
    def blob_pages(self) -> list[Page]:
        """The pages with arrays, in the order of the rows."""
        return sorted((page for page in self.pages if page.is_blob), key=lambda page: page.group)

    def row_places(self, page: Page) -> Iterator[tuple[int, int]]:
        """Start and stop of each row in a blob page: offsets in the file, its length included.

        Raises:
            PunaError: the page does not hold the rows that the header says it holds.
        """
        count, stop = page.rows[1] - page.rows[0], page.start + page.size_bytes
        yield from self._places(page.start, stop, count, f"page {page.number}")

    def scalar_places(self, page: Page) -> Iterator[tuple[int, int, int]]:
        """Raw page, start and stop of the single values of each row of a blob page."""
        count = page.rows[1] - page.rows[0]
        owner = next((raw for raw in self.pages if not raw.is_blob and page.group in raw.groups), None)
        if owner is None:
            raise PunaError(f"{self.path} is damaged: no page has the single values of page {page.number}")
        first = owner.groups[page.group]
        stop = min([owner.size_bytes, *(offset for offset in owner.groups.values() if offset > first)])
        for begin, end in self._places(owner.start + first, owner.start + stop, count, f"page {owner.number}"):
            yield owner.number, begin, end

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row: arrays, bytes and single values by column."""
        has_scalars = len(self.schema) > len(self.blob_fields)
        for page in self.blob_pages:
            scalars = self.scalar_places(page)
            rows = self._blob_rows(page)
            if has_scalars:
                rows = ({**row, **self.scalars(*next(scalars)[1:])} for row in rows)
            yield from rows

    def _blob_rows(self, page: Page) -> Iterator[dict[str, Any]]:
        places = list(self.row_places(page))
        at_once = 1 + len(places) * ROWS_BYTES // max(page.size_bytes, 1)
        for first in range(0, len(places), at_once):
            some = places[first : first + at_once]
            yield from decode_rows(self._data, some, self.blob_fields, self.schema, str(self.path))

    def scalars(self, start: int, stop: int) -> dict[str, Any]:
        """The single values that lie between two offsets."""
        try:
            values, _ = messagepack.decode(self._data[start + LENGTH_BYTES : stop])
        except (ValueError, IndexError, RecursionError) as error:
            raise PunaError(f"{self.path} is damaged: no single values at byte {start:,} ({error})") from None
        if not isinstance(values, dict):
            return {}
        return {name: value for name, value in values.items() if name in self.schema}

    def bytes(self, start: int, stop: int) -> bytes:
        """The bytes between two offsets."""
        return self._data[start:stop]

    def _places(self, start: int, stop: int, count: int, where: str) -> Iterator[tuple[int, int]]:
        for _ in range(count):
            size = int.from_bytes(self._data[start : start + LENGTH_BYTES], "little")
            end = start + LENGTH_BYTES + size
            if end > stop:
                raise PunaError(f"{self.path} is damaged: a row at byte {start:,} of {where} does not end within it")
            yield start, end
            start = end

    def _page(self, fields: dict[str, Any]) -> Page:
        number, size = int(fields["page_id"]), int(fields["page_size"])
        start = int(self.header["header_size"]) + number * int(self.header["page_size"])
        kind = fields["page_type"]
        first, last = int(fields["start_row_id"]), int(fields["end_row_id"])
        if kind not in ("BLOB_DATA", "RAW_DATA") or min(number, size, first) < 0 or last < first:
            raise ValueError(f"page {fields.get('page_id')!r} is {fields}")
        if start + size > len(self._data):
            raise ValueError(f"page {number} ends at byte {start + size:,} of {len(self._data):,}; it is cut off")
        if (last - first) * LENGTH_BYTES > size and kind == "BLOB_DATA":
            raise ValueError(f"page {number} has {size:,} bytes for {last - first:,} rows")
        groups = {int(entry["id"]): int(entry["offset"]) for entry in fields["row_group_ids"]}
        if any(not 0 <= offset <= size for offset in groups.values()):
            raise ValueError(f"page {number} has row groups at {groups}")
        is_blob = kind == "BLOB_DATA"
        return Page(number, is_blob, int(fields["page_type_id"]), start, size, (first, last), groups)


def decode_rows(
    data: Buffer,
    places: Sequence[tuple[int, int]],
    blob_fields: Sequence[str],
    schema: Schema,
    where: str,
    *,
    only: Sequence[str] | None = None,
) -> list[dict[str, NDArray[Any] | bytes]]:
    """The arrays and bytes of some rows of blob pages, which takes less than those of each by itself.

    Args:
        data: what the rows are in.
        places: start and stop of each row, its length included; `ROWS_BYTES` of rows are enough to be fast.
        blob_fields: the columns in the order in which they lie.
        schema: their types.
        where: the file, for messages.
        only: columns to decode; None: all.

    Raises:
        PunaError: a row is damaged.
    """
    if len(blob_fields) == 1:
        fields = {blob_fields[0]: [(start + LENGTH_BYTES, stop) for start, stop in places]}
    else:
        fields = _fields(data, places, blob_fields, where)
    columns = []
    names = [name for name in blob_fields if only is None or name in only]
    for name in names:
        try:
            columns.append(_values(data, fields[name], schema[name]))
        except (ValueError, KeyError, TypeError) as error:
            raise PunaError(f"{where} is damaged: {name} of a row ({error})") from None
    if len(names) == 1:
        return [{names[0]: value} for value in columns[0]]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _fields(
    data: Buffer, places: Sequence[tuple[int, int]], blob_fields: Sequence[str], where: str
) -> dict[str, list[tuple[int, int]]]:
    """Where each column lies, in rows of several columns."""
    fields: dict[str, list[tuple[int, int]]] = {name: [] for name in blob_fields}
    for place, stop in places:
        place += LENGTH_BYTES
        for name in blob_fields:
            size = int.from_bytes(data[place : min(place + LENGTH_BYTES, stop)], "big")
            place += LENGTH_BYTES
            if place + size > stop:
                raise PunaError(f"{where} is damaged: {name} of {size:,} bytes does not end within its row")
            fields[name].append((place, place + size))
            place += size
    return fields


def _values(data: Buffer, places: list[tuple[int, int]], column: dict[str, Any]) -> list[NDArray[Any]] | list[bytes]:
    type, shape = column["type"], column.get("shape")
    if type == "bytes":
        return [data[start:stop] for start, stop in places]
    dtype = ARRAY_TYPES[type]
    if dtype.kind == "i":
        arrays = decode_all(data, places, dtype)
    else:
        arrays = [np.frombuffer(data[start:stop], dtype) for start, stop in places]
    return arrays if shape == [-1] else [array.reshape(shape) for array in arrays]
