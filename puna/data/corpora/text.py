"""Plain text: each file is one document.

A file beyond 2 MB is cut after a blank line (or a line, or a character) into documents of about that size, so that no
document is too large to be held.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from puna.data.corpora import TEXT_OPTIONS
from puna.data.documents import PIECE_BYTES, Document, LeftOut, Span, checksum, cut_file, decoded
from puna.data.folders import files_of

HELP = "Plain text; a file is a document."
OPTIONS = TEXT_OPTIONS
DISTINCT = False


def spans(source: Path, options: Mapping[str, Any]) -> Iterator[Span | LeftOut]:
    """One span a file, or several for a large one."""
    for file in files_of(source):
        if file.refused or file.size == 0:
            yield LeftOut(file.name, source.name, file.refused or "empty")
            continue
        try:
            for start, data in cut_file(file.path, _last_place_to_cut):
                id = file.name if file.size < PIECE_BYTES else f"{file.name}:{start}"
                yield Span(str(file.path), id, source.name, start, start + len(data), checksum(data))
        except OSError as error:
            yield LeftOut(file.name, source.name, "unreadable", error.strerror or "")


def read(span: Span, data: bytes, options: Mapping[str, Any]) -> Iterator[Document | LeftOut]:
    """The file as it is, without a byte order mark."""
    if b"\0" in data:
        yield LeftOut(span.id, span.source, "binary")
        return
    text = decoded(span, data)
    if isinstance(text, LeftOut):
        yield text
    elif text.strip():
        yield Document(span.id, span.source, text)
    else:
        yield LeftOut(span.id, span.source, "empty")


def _last_place_to_cut(data: bytes) -> int:
    """Behind a blank line or a line if one ends in the second half, else before the last character."""
    if len(data) < PIECE_BYTES:
        return 0
    for end in (b"\n\n", b"\n"):
        if (place := data.rfind(end)) > len(data) // 2:
            return place + len(end)
    return next((len(data) - i for i in range(1, 5) if data[-i] & 0xC0 != 0x80), len(data))
