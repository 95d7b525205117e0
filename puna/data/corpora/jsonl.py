"""JSON lines; a field of a line is a document."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from puna.data.corpora import TEXT_OPTIONS, Option
from puna.data.documents import Document, LeftOut, Span, after_last_line, checksum, cut_file, is_spellable, json_lines
from puna.data.folders import files_of
from puna.errors import PunaError, UsageError

HELP = "JSON lines; a field of a line is a document."
OPTIONS = (Option("field", str, None, "The field that holds the text; text or content if not given."), *TEXT_OPTIONS)
DISTINCT = False

#: Where the text is looked for when nobody says.
_USUAL_FIELDS = ("text", "content")


def spans(source: Path, options: Mapping[str, Any]) -> Iterator[Span | LeftOut]:
    """Pieces of whole lines, with the number of the first line as state."""
    is_checked = False
    for file in files_of(source, suffixes=(".jsonl", ".ndjson", ".json")):
        if file.refused:
            yield LeftOut(file.name, source.name, file.refused)
            continue
        line = 1
        for start, data in cut_file(file.path, after_last_line):
            if start == 0 and data.lstrip().startswith(b"["):  # of any file: all of it may be one line
                raise PunaError(f"{file.path} holds an array; this kind wants one object a line")
            is_checked = is_checked or _is_of_this_kind(file.path, data, options["field"])
            yield Span(str(file.path), file.name, source.name, start, start + len(data), checksum(data), line)
            line += data.count(b"\n")


def read(span: Span, data: bytes, options: Mapping[str, Any]) -> Iterator[Document | LeftOut]:
    """One document a line; blank lines are passed over."""
    for number, record in json_lines(data, span.state):
        id, text = f"{span.id}:{number}", _text_of(record, options["field"])
        if isinstance(record, Exception):
            yield LeftOut(id, span.source, "not JSON", str(record))
        elif text is None:
            yield LeftOut(id, span.source, "no text in this field")
        elif not text.strip():
            yield LeftOut(id, span.source, "empty")
        elif not is_spellable(text):
            yield LeftOut(id, span.source, "half a surrogate pair")
        else:
            yield Document(id, span.source, text)


def _text_of(record: Any, field: str | None) -> str | None:
    if not isinstance(record, dict):
        return None
    fields = (field,) if field else _USUAL_FIELDS
    return next((record[name] for name in fields if isinstance(record.get(name), str)), None)


def _is_of_this_kind(path: Path, data: bytes, field: str | None) -> bool:
    """Looks at the first lines, so that a wrong field is found at once and not line by line; False: all are blank.

    Raises:
        PunaError: none of them is JSON, or an object.
        UsageError: none of them has the field.
    """
    records = [record for _, record in json_lines(data, 1)]
    if not records or any(_text_of(record, field) is not None for record in records):
        return bool(records)
    first = next((record for record in records if not isinstance(record, Exception)), records[0])
    if isinstance(first, Exception):
        raise PunaError(f"{path}: the first lines are not JSON ({first}); this kind wants one object a line")
    if isinstance(first, dict):
        wanted = f"field {field!r}" if field else " or ".join(map(repr, _USUAL_FIELDS))
        raise UsageError(f"{path}: no text in {wanted}; name the field with --field: it has {', '.join(sorted(first))}")
    raise PunaError(f"{path}: the first line is not a JSON object; this kind wants one object a line")
