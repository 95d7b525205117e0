"""Documents, and the places in files that they come from.

A kind of corpus (`corpora/`) works in two steps. `spans` looks at a source once, in a fixed order, and says which
pieces of which files there are to read; it runs in the main process, so it does little more than read and compare.
`read` turns the bytes of one piece into documents; it runs in many processes at once. Both may leave things out, and
say why.

    jsonl   wiki.jsonl (5 GB)  ─ spans ─▶  bytes 0–2 MB, 2–4 MB, … each ending at the end of a line
                               ─ read ──▶  Document(id="wiki.jsonl:1", text="…"), LeftOut("wiki.jsonl:2", "not JSON"), …
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from puna.errors import PunaError

if TYPE_CHECKING:  # the command line reads what kinds there are, without NumPy
    import numpy as np
    from numpy.typing import NDArray

    from puna.prompts import Message

#: Files that may be cut are cut into pieces of about this size: large enough to be read fast, small in memory.
PIECE_BYTES = 2_000_000

#: The longest line or record; a file with a longer one is not of the kind that was named.
RECORD_BYTES = 32_000_000


@dataclass(frozen=True)
class Document:
    """One text, one dialog, or tokens that another tool made of either.

    Attributes:
        id: names it within its source, whatever else is there: the infilling cuts and, for files of code, the held-out
            split depend on it.
        source: the name of the source, its folder or file.
        text: the text, or None.
        messages: the dialog, or None.
        language: of a file of code, e.g. "python".
        tokens: (length,) int32 ids, or None.
        is_target: (length,) bool, which of the tokens are to be learnt; given with them.
    """

    id: str
    source: str
    text: str | None = None
    messages: "list[Message] | None" = None
    language: str | None = None
    tokens: "NDArray[np.int32] | None" = field(default=None, compare=False)
    is_target: "NDArray[np.bool_] | None" = field(default=None, compare=False)


@dataclass(frozen=True)
class LeftOut:
    """What does not become a document, and why.

    Attributes:
        id: as of the document that it would have been.
        source: likewise.
        reason: a short fixed sentence, so that it can be counted.
        detail: what differs from case to case.
    """

    id: str
    source: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `stop` of a file.

    Attributes:
        path: the file.
        id: the file's name within its source.
        source: the name of the source.
        start: offset of the first byte.
        stop: offset after the last byte.
        checksum: XXH3-64 of the bytes, in hex.
        state: what `read` must know of the bytes before, e.g. the number of the first line; must be JSON.
    """

    path: str
    id: str
    source: str
    start: int
    stop: int
    checksum: str
    state: Any = None

    def load(self) -> bytes:
        """The bytes.

        Raises:
            PunaError: they are no longer those that were seen at first.
        """
        with open(self.path, "rb") as file:
            file.seek(self.start)
            data = file.read(self.stop - self.start)
        if checksum(data) != self.checksum:
            raise PunaError(f"{self.path} changed while it was being prepared; run the same command again")
        return data


def checksum(data: bytes) -> str:
    """XXH3-64 in hex."""
    return xxhash.xxh3_64_hexdigest(data)


def cut_file(path: Path, last_cut: Callable[[bytes], int]) -> Iterator[tuple[int, bytes]]:
    """Reads a file in pieces of about `PIECE_BYTES` that end where a record ends.

    Args:
        path: the file.
        last_cut: the last offset in the given bytes where they may be cut; 0 where there is none.

    Yields:
        Offset and bytes of each piece.

    Raises:
        PunaError: no cut within `RECORD_BYTES`.
    """
    start, held = 0, b""
    with open(path, "rb") as file:
        while block := file.read(PIECE_BYTES):
            held += block
            cut = last_cut(held)
            if cut:
                yield start, held[:cut]
                start, held = start + cut, held[cut:]
            elif len(held) > RECORD_BYTES:
                raise PunaError(
                    f"{path}: what begins at byte {start:,} does not end within {RECORD_BYTES:,} bytes; "
                    "is the file of this kind?"
                )
        if held:
            yield start, held


def after_last_line(data: bytes) -> int:
    """A cut for `cut_file`: after the last newline; 0 where there is none."""
    return data.rfind(b"\n") + 1


def decoded(span: Span, data: bytes) -> str | LeftOut:
    """The bytes of a span as text, without a byte order mark; or that they are not UTF-8."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        return LeftOut(span.id, span.source, "not UTF-8", f"byte {span.start + error.start}")


def json_lines(data: bytes, first: int) -> Iterator[tuple[int, Any]]:
    """Number and content of every line that is not blank; the error in place of the content where it is not JSON.

    Args:
        data: whole lines.
        first: the number of the first line.
    """
    for number, line in enumerate(data.split(b"\n"), start=first):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8, or nested too deeply
                yield number, error


def is_spellable(text: str) -> bool:
    """Whether UTF-8 can encode a text; not so half of a surrogate pair, which JSON can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
