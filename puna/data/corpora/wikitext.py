"""Wikitext (`wiki.train.tokens`): tokenised articles made readable again; each paragraph is one document.

The rules of cleaning are those that came with GPT-2's evaluation on Wikitext and that Megatron and MindFormers use, so
that ids equal those of MindFormers' own tool:

    in    The keeper wrote " all is well " in the log [ page 1 ] , and left @-@ handed .
    out   The keeper wrote "all is well" in the log [page 1], and left-handed.

Headings (` = Heading = `) are left out. The rules look beyond the paragraph: quotation marks are paired through the
whole file, and a bracket is closed by the next closing one, however far away it is. So a piece of a file is cleaned
between stand-ins for what is open before it and closes behind it (`clean_piece`), which gives the same as cleaning the
whole file (`clean`) and cutting then.

Of a folder with `wiki.train.tokens`, what lies beside it as `wiki.valid.tokens` and `wiki.test.tokens` is left out: a
model that has learned from them can no longer be measured with them.
"""

import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from puna.data.documents import Document, LeftOut, Span, checksum, cut_file
from puna.data.folders import files_of
from puna.errors import PunaError

HELP = "Wikitext; a paragraph is a document. Of a folder with a train file, valid and test are left out."
OPTIONS = ()
DISTINCT = False

#: Names of the parts that models are measured with.
MEASURED = ("valid", "test")

#: What is opened -> what closes it.
_PAIRS = {"(": ")", "[": "]", "{": "}", '"': '"', "'": "'"}

#: Where a file may be cut: before a heading, after a line that ends in no bracket or quotation mark.
_CUT = re.compile(rb"[^\s()\[\]{}\"'] ?\n ?\n(?= ?= )")

_SPACED = {
    "s '": "s'",
    " @-@ ": "-",
    " @,@ ": ",",
    " @.@ ": ".",
    " : ": ": ",
    " ; ": "; ",
    " . ": ". ",
    " ! ": "! ",
    " ? ": "? ",
    " , ": ", ",
}
_REMAINING = {
    "= = = =": "====",
    "= = =": "===",
    "= =": "==",
    " \u00b0 ": "\u00b0",
    " \n": "\n",
    "\n ": "\n",
    " N ": " 1 ",
    " 's": "'s",
}


def clean(text: str) -> str:
    """A whole file made readable; the rules apply in this order. `puna.data.cleaning` does the same quickly."""
    for spaced, written in _SPACED.items():
        text = text.replace(spaced, written)
    for opening, closing in _PAIRS.items():
        text = _without_padding(text, opening, closing)
    for spaced, written in _REMAINING.items():
        text = text.replace(spaced, written)
    return text


def _without_padding(text: str, opening: str, closing: str) -> str:
    """A text without blanks inside a pair of marks: `( a (b )` becomes `(a (b)`.

    Behind the last closing mark nothing is a pair, and looking for its end from every opening one would take for ever.
    """
    stop = text.rfind(closing) + 1
    pair = re.compile(f"{re.escape(opening)}([^{re.escape(closing)}]*){re.escape(closing)}")
    return pair.sub(lambda found: opening + found[1].strip() + closing, text[:stop]) + text[stop:]


def clean_piece(data: bytes, opened: str, closing: str) -> bytes:
    """A piece of a file made readable, as it is within the whole.

    Args:
        data: the piece in UTF-8, cut where `spans` cuts.
        opened: the marks of `_PAIRS` that are open before it.
        closing: the marks that close what is open at its end, after it.
    """
    from puna.data.cleaning import clean_quickly

    before, behind = f"{opened}x\n".encode(), f"x{closing}".encode()
    whole = before + data + behind
    cleaned = clean_quickly(whole)
    if cleaned is None:
        cleaned = clean(whole.decode()).encode()
    return cleaned.removeprefix(before).removesuffix(behind)


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a cleaned text, without headings."""
    return [paragraph for paragraph in text.split("\n\n") if paragraph and not paragraph.lstrip().startswith("=")]


def spans(source: Path, options: Mapping[str, Any]) -> Iterator[Span | LeftOut]:
    """Pieces that begin with a heading; their state says what is open before and what closes behind."""
    files = list(files_of(source, suffixes=(".tokens", ".txt", ".raw")))
    trained_on = {file.path.parent for file in files if not file.refused and "train" in file.path.name.split(".")}
    for file in files:
        if file.refused or file.size == 0:
            yield LeftOut(file.name, source.name, file.refused or "empty")
            continue
        part = next((part for part in MEASURED if part in file.path.name.split(".")), None)
        if part is not None and file.path.parent in trained_on:
            yield LeftOut(file.name, source.name, f"the {part} part (name its file to take it)")
            continue
        last = _last_closing(file.path)
        opened = ""
        for start, data in cut_file(file.path, _last_cut):
            if start == 0 and data.partition(b"\n")[0].endswith(b"\r"):
                raise PunaError(f"{file.path} has line ends of Windows; convert it first: sed -i 's/\\r$//' FILE")
            stop = start + len(data)
            still_open = "".join(mark for mark in _PAIRS if _is_open(mark, mark in opened, data))
            closing = "".join(_PAIRS[mark] for mark in still_open if last[mark] >= stop)
            yield Span(str(file.path), file.name, source.name, start, stop, checksum(data), [opened, closing])
            opened = still_open


def read(span: Span, data: bytes, options: Mapping[str, Any]) -> Iterator[Document | LeftOut]:
    """The paragraphs of the piece."""
    try:
        text = clean_piece(data, *span.state).decode()
    except UnicodeDecodeError:
        raise _not_utf8(span, data) from None
    for number, paragraph in enumerate(paragraphs(text)):
        yield Document(f"{span.id}:{span.start}+{number}", span.source, paragraph)


def _not_utf8(span: Span, data: bytes) -> PunaError:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        start = span.start + error.start
    return PunaError(f"{span.path} is not UTF-8 (byte {start:,}); is it a Wikitext file?")


def _last_cut(data: bytes) -> int:
    candidate = len(data)
    while (candidate := max(data.rfind(b"\n =", 0, candidate), data.rfind(b"\n=", 0, candidate))) > 0:
        if match := _CUT.search(data, max(candidate - 4, 0), candidate + 4):
            return match.end()
    return 0


def _is_open(mark: str, was_open: bool, data: bytes) -> bool:
    opening, closing = mark.encode(), _PAIRS[mark].encode()
    if opening == closing:
        return was_open ^ (data.count(opening) % 2 == 1)
    last = data.rfind(closing)
    return opening in data[last + 1 :] or (was_open and last < 0)


def _last_closing(path: Path) -> dict[str, int]:
    """Mark -> the offset of the last one in the file that closes it."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return {mark: data.rfind(closing.encode()) for mark, closing in _PAIRS.items()}
