"""MindRecord's index: SQLite tables that say where in the pages each row is.

    SHARD_NAME(NAME)                                       one row, the file's name
    INDEXES(ROW_ID, PAGE_ID_RAW, PAGE_OFFSET_RAW, …)       offsets within the page; for a column k that is listed also
                                                           INC_k and NAME_0, its values

All of it is in the file itself, so a lost index can be made again.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from puna.data.mindrecord.file import MindRecord
from puna.errors import PunaError
from puna.files import ASIDE, sync_file, sync_folder

#: What is added to a file's name.
SUFFIX = ".db"

#: Type of a column -> SQLite's.
_SQL_TYPES = {"int32": "INTEGER", "int64": "INTEGER", "float32": "REAL", "float64": "REAL", "string": "TEXT"}

_PLACES = (
    "ROW_ID", "PAGE_ID_RAW", "PAGE_OFFSET_RAW", "PAGE_OFFSET_RAW_END", "ROW_GROUP_ID", "PAGE_ID_BLOB",
    "PAGE_OFFSET_BLOB", "PAGE_OFFSET_BLOB_END",
)  # fmt: skip


def write_index(path: Path) -> Path:
    """Writes the index of a MindRecord file beside it, aside and renamed; an old one is replaced.

    Raises:
        PunaError: the file is damaged, or its index lists a column of a type that puna cannot list.

    Returns:
        The index's file.
    """
    record = MindRecord.open(path)
    target = path.with_name(path.name + SUFFIX)
    aside = target.with_name(target.name + ASIDE)
    aside.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(aside)) as base, base:
            for statement in _tables(record):
                base.execute(statement)
            base.execute("INSERT INTO SHARD_NAME VALUES (?)", (path.name,))
            marks = ", ".join("?" * (len(_PLACES) + 2 * len(record.index_fields)))
            base.executemany(f"INSERT INTO INDEXES VALUES ({marks})", _entries(record))
        sync_file(aside)
        aside.replace(target)
        sync_folder(target.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return target


def _tables(record: MindRecord) -> list[str]:
    """The statements that make the tables, as MindSpore words them, blanks apart."""
    columns = [f"{place} INT NOT NULL" for place in _PLACES]
    keys = ["ROW_ID"]
    for i, name in enumerate(record.index_fields):
        type = _SQL_TYPES.get(record.schema.get(name, {}).get("type", ""))
        if type is None or not name.isidentifier():
            raise PunaError(f"{record.path} lists the column {name!r} in its index, of a type that puna cannot list")
        columns += [f"INC_{i} INT", f"{name}_0 {type}"]
        keys.append(f"INC_{i}")
    return [
        "CREATE TABLE SHARD_NAME(NAME TEXT NOT NULL)",
        f"CREATE TABLE INDEXES({', '.join(columns)}, PRIMARY KEY({', '.join(keys)}))",
    ]


def _entries(record: MindRecord) -> Iterator[tuple[Any, ...]]:
    starts = {page.number: page.start for page in record.pages}
    for page in record.blob_pages:
        rows = zip(record.row_places(page), record.scalar_places(page), strict=True)
        for row, ((start, stop), (raw, first, last)) in enumerate(rows, page.rows[0]):
            offset = starts[raw]
            listed: list[Any] = []
            if record.index_fields:
                values = record.scalars(first, last)
                listed = [value for name in record.index_fields for value in (0, values.get(name))]
            in_raw = (raw, first - offset, last - offset)
            in_blob = (page.group, page.number, start - page.start, stop - page.start)
            yield (row, *in_raw, *in_blob, *listed)
