"""MindRecord files of MindFormers' `llama_preprocess.py`: rows of token ids become documents of token ids.

    wiki   input_ids            BOS a b c EOS BOS d e | f EOS BOS …    cut before each BOS: a row holds several texts
    qa     input_ids, labels    BOS question answer EOS 0 0 0 …        padding goes; targets are where labels are ids

The old tool gave up on some dialogs and silently masked all their labels; these are left out, and listed. Ids stay as
they are, so the tokenizer must be the one that made them. `faithful` keeps rows as they are, padding included, and
masks what MindFormers' loss masks: what follows the id of padding, which is that of `<unk>`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.data.corpora import HELD_OUT, Option
from puna.data.documents import PIECE_BYTES, Document, LeftOut, Span, checksum
from puna.data.folders import files_of
from puna.errors import PunaError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from puna.data.mindrecord import MindRecord

HELP = "MindRecord files with rows of ids (input_ids, labels).\n\nThe .db is not needed."
OPTIONS = (
    HELD_OUT,
    Option("bos_id", int, 1, "Id that begins a text: a row without labels is cut before each; -1: it is one text."),
    Option("faithful", bool, False, "Keep rows as they are, and mask as MindFormers' loss does: what follows <unk>."),
    Option("rebuild_index", bool, False, "Write the .db of each file that has lost it."),
)
DISTINCT = False

#: In `labels`: not to be learnt.
_MASKED = -100

#: The id that fills rows.
_PADDING = 0


def spans(source: Path, options: Mapping[str, Any]) -> Iterator[Span | LeftOut]:
    """Pieces of whole rows of all shards of each file; their state is the number of the first row, and the columns."""
    from puna.data.mindrecord import MindRecord, write_index

    seen: set[Path] = set()
    for file in files_of(source):
        if file.path.suffix == ".db" or file.path in seen:
            continue
        if file.refused:
            yield LeftOut(file.name, source.name, file.refused)
            continue
        first = 0
        for record in MindRecord.open_all(file.path):
            seen.add(record.path)
            if options["rebuild_index"] and not record.path.with_name(f"{record.path.name}.db").exists():
                write_index(record.path)
            if "input_ids" not in record.blob_fields:
                raise PunaError(f"{record.path} has no column input_ids, only {', '.join(sorted(record.schema))}")
            columns = {name: record.schema[name] for name in record.blob_fields}
            name = file.name.removesuffix(file.path.name) + record.path.name
            for row, start, stop in _pieces(record):
                data = record.bytes(start, stop)
                state = [first + row, columns]
                yield Span(str(record.path), name, source.name, start, stop, checksum(data), state)
            first += len(record)


def read(span: Span, data: bytes, options: Mapping[str, Any]) -> Iterator[Document | LeftOut]:
    """One document a row with labels; of other rows, one for each text in it."""
    from puna.data.mindrecord.file import LENGTH_BYTES, ROWS_BYTES, decode_rows

    number, columns = span.state
    stop = 0
    while stop < len(data):
        places = list[tuple[int, int]]()
        start = stop
        while stop < len(data) and stop - start < ROWS_BYTES:
            begin = stop
            stop += LENGTH_BYTES + int.from_bytes(data[begin : begin + LENGTH_BYTES], "little")
            places.append((begin, stop))
        for row in decode_rows(data, places, list(columns), columns, span.path, only=("input_ids", "labels")):
            yield from _documents(f"{span.id}:{number}", span.source, row, options)
            number += 1


def _documents(id: str, source: str, row: dict[str, Any], options: Mapping[str, Any]) -> Iterator[Document | LeftOut]:
    import numpy as np

    tokens, labels = row["input_ids"].reshape(-1).astype(np.int32), row.get("labels")
    if labels is not None and labels.size != tokens.size:
        yield LeftOut(id, source, "labels of another length", f"{labels.size:,} labels, {tokens.size:,} ids")
        return
    is_target = np.ones(len(tokens), np.bool_) if labels is None else labels.reshape(-1) != _MASKED
    if labels is not None and np.any(labels.reshape(-1)[is_target] != tokens[is_target]):
        yield LeftOut(id, source, "labels that are not its ids")
        return
    if options["faithful"]:
        is_target[1:] &= tokens[:-1] != _PADDING
        yield Document(id, source, tokens=tokens, is_target=is_target)
        return
    used = np.flatnonzero((tokens != _PADDING) | (is_target if labels is not None else False))
    stop = int(used[-1]) + 1 if len(used) else 0
    tokens, is_target = tokens[:stop], is_target[:stop]
    if not is_target.any():
        yield LeftOut(id, source, "nothing to learn", "all of its labels are masked" if stop else "padding alone")
    elif labels is not None or options["bos_id"] < 0:
        yield Document(id, source, tokens=tokens, is_target=is_target)
    else:
        starts = _starts(tokens, options["bos_id"])
        for i, (start, end) in enumerate(zip(starts, [*starts[1:], stop], strict=True)):
            yield Document(f"{id}:{i}", source, tokens=tokens[start:end], is_target=is_target[start:end])


def _starts(tokens: "NDArray[np.int32]", bos_id: int) -> list[int]:
    """Where texts begin in a row; the first may be the rest of one."""
    found = (tokens == bos_id).nonzero()[0].tolist()
    return found if found and found[0] == 0 else [0, *found]


def _pieces(record: "MindRecord") -> Iterator[tuple[int, int, int]]:
    """Number of the first row, start and stop of runs of rows of about `PIECE_BYTES`."""
    for page in record.blob_pages:
        row, begin, stop = page.rows[0], page.start, page.start
        for number, (_, stop) in enumerate(record.row_places(page), page.rows[0] + 1):
            if stop - begin >= PIECE_BYTES:
                yield row, begin, stop
                row, begin = number, stop
        if stop > begin:
            yield row, begin, stop
