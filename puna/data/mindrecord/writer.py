"""Writes MindRecord files that MindSpore reads, rows in the order in which they come.

One blob page and one raw page are filled at a time: arrays go to the first, single values (or the schema's number,
where there are none) to the second. Pages are numbered in the order in which they are begun: 0 blob, 1 raw, 2 blob, …
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from puna.data.mindrecord.file import ARRAY_TYPES, LENGTH_BYTES, SMALLEST_HEADER, SMALLEST_PAGE, Schema
from puna.data.mindrecord.index import SUFFIX, write_index
from puna.data.mindrecord.integers import encode_integers
from puna.data.mindrecord.messagepack import encode_map
from puna.errors import PunaError
from puna.files import file_aside

#: MindSpore's own sizes.
HEADER_BYTES, PAGE_BYTES = 16 << 20, 32 << 20


def write_mindrecord(
    path: Path,
    desc: str,
    schema: Schema,
    rows: Iterable[Mapping[str, Any]],
    *,
    index_fields: Iterable[str] = (),
    header_bytes: int = HEADER_BYTES,
    page_bytes: int = PAGE_BYTES,
) -> int:
    """Writes a file and its index, aside, synced and renamed; old ones are replaced.

    Zeros between pages take no room on most disks.

    Args:
        path: the file.
        desc: a word on the schema, e.g. "wiki".
        schema: column -> {"type": "int32", "shape": [-1]} of an array, {"type": "bytes"}, or {"type": "int64"} of a
            single number or text ("string").
        rows: column -> value, of every column.
        index_fields: single values that the index lists too.
        header_bytes: room for the header.
        page_bytes: size of a page; no row may be larger.

    Returns:
        The number of rows.

    Raises:
        PunaError: there are no rows, or one does not fit.
    """
    if header_bytes < SMALLEST_HEADER or page_bytes < SMALLEST_PAGE:
        raise ValueError(f"header_bytes must be {SMALLEST_HEADER} or more, page_bytes {SMALLEST_PAGE} or more")
    with file_aside(path) as file:
        pages = _Pages(file, path, schema, header_bytes, page_bytes)
        for row in rows:
            pages.add(row)
        if not pages.rows:
            raise PunaError(f"there are no rows to write to {path}")
        listed = [{"index_field": name, "schema_id": 0} for name in index_fields]
        header = {
            "header_size": header_bytes,
            "index_fields": listed or None,
            "page": pages.pages,
            "page_size": page_bytes,
            "compression_size": pages.saved_bytes,
            "schema": [{"blob_fields": pages.blob_fields, "desc": desc, "schema": _sorted(schema)}],
            "shard_addresses": [path.name],
            "shard_id": 0,
            "statistics": None,
            "version": "3.0",
        }
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if LENGTH_BYTES + len(content) > header_bytes:
            raise PunaError(f"{path} has too many pages for its header; write fewer rows to a file")
        file.seek(0)
        file.write(len(content).to_bytes(LENGTH_BYTES, "little") + content)
        path.with_name(path.name + SUFFIX).unlink(missing_ok=True)  # an old index of other rows
    write_index(path)
    return pages.rows


class _Pages:
    """The pages of a file that is being written, of which one blob page and one raw page are open.

    Attributes:
        pages: what the header says of each.
        blob_fields: the columns that are arrays or bytes, by name.
        rows: how many were written.
        saved_bytes: what compressing integers has saved, which the header says too.
    """

    def __init__(self, file: IO[bytes], path: Path, schema: Schema, header_bytes: int, page_bytes: int) -> None:
        self._file, self._path, self._schema = file, path, schema
        self._header_bytes, self._page_bytes = header_bytes, page_bytes
        self.blob_fields = sorted(
            name for name, column in schema.items() if "shape" in column or column["type"] == "bytes"
        )
        self._scalars = sorted(schema.keys() - set(self.blob_fields))
        self.rows = self.saved_bytes = 0
        self.pages: list[dict[str, Any]] = []
        self._groups = self._raws = 0
        self._blob: dict[str, Any] | None = None
        self._raw: dict[str, Any] | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        if row.keys() != self._schema.keys():
            raise PunaError(f"row {self.rows} has the columns {sorted(row)}, not {sorted(self._schema)}")
        parts = [self._encoded(name, row[name]) for name in self.blob_fields]
        body = parts[0] if len(parts) == 1 else b"".join(len(x).to_bytes(LENGTH_BYTES, "big") + x for x in parts)
        scalars = {name: row[name] for name in self._scalars} or {"id": 0}
        blob, raw = (len(x).to_bytes(LENGTH_BYTES, "little") + x for x in (body, encode_map(scalars)))
        if max(len(blob), len(raw)) > self._page_bytes:
            raise PunaError(f"row {self.rows} takes {len(blob):,} bytes; a page holds {self._page_bytes:,}")
        self._make_room(len(blob), len(raw))
        assert self._blob is not None
        assert self._raw is not None
        self._put(self._blob, blob)
        self._put(self._raw, raw)
        self.rows += 1
        self._blob["end_row_id"] = self.rows

    def _make_room(self, blob_bytes: int, raw_bytes: int) -> None:
        """Begins new pages where the open ones have no room; a blob page's single values lie in one raw page."""
        raw_is_full = self._raw is not None and self._raw["page_size"] + raw_bytes > self._page_bytes
        if self._blob is None or raw_is_full or self._blob["page_size"] + blob_bytes > self._page_bytes:
            self._blob = self._begin("BLOB_DATA", self._groups)
            self._groups += 1
            if self._raw is None or raw_is_full:
                self._raw = self._begin("RAW_DATA", self._raws)
                self._raws += 1
            self._raw["row_group_ids"].append({"id": self._groups - 1, "offset": self._raw["page_size"]})

    def _begin(self, type: str, number: int) -> dict[str, Any]:
        is_blob = type == "BLOB_DATA"
        page = {
            "end_row_id": 0,
            "page_id": len(self.pages),
            "page_size": 0,
            "page_type": type,
            "page_type_id": number,
            "row_group_ids": [{"id": 0, "offset": 0}] if is_blob else [],
            "shard_id": 0,
            "start_row_id": self.rows if is_blob else 0,
        }
        self.pages.append(page)
        return page

    def _put(self, page: dict[str, Any], data: bytes) -> None:
        self._file.seek(self._header_bytes + page["page_id"] * self._page_bytes + page["page_size"])
        self._file.write(data)
        page["page_size"] += len(data)

    def _encoded(self, name: str, value: Any) -> bytes:
        column = self._schema[name]
        if column["type"] == "bytes":
            return bytes(value)
        array = np.ascontiguousarray(value, ARRAY_TYPES[column["type"]])
        if array.dtype.kind != "i":
            return array.tobytes()
        encoded = encode_integers(array.reshape(-1))
        self.saved_bytes += array.nbytes - len(encoded)
        return encoded


def _sorted(schema: Schema) -> Schema:
    """The columns, and the fields of each, sorted by name, as MindSpore writes them."""
    return {name: {key: schema[name][key] for key in sorted(schema[name])} for name in sorted(schema)}
