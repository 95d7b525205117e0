r"""Encoding large corpora: words are split into pieces once and remembered.

Byte-pair merging never reaches across a place that no piece of the vocabulary spans. In Llama's vocabulary a space
stands only at the beginning of a piece, no piece holds a newline, and none holds an ASCII letter beside an ASCII sign
or digit; so a text may be cut at those places, and the ids of the parts laid end to end are the ids of the whole:

    "    return x + f(1)\n"   ->   "    return" | " x" | " +" | " f" | "(1)\n"

Text repeats itself, so nearly all parts have been seen before. Many texts are encoded at once: their bytes are cut all
together by NumPy, Arrow finds the distinct parts and lays their ids out again, and Python sees only these parts.
Which cuts a vocabulary allows is checked, never assumed; where it allows none, `BulkEncoder` is `Tokenizer.encode`.
"""

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise, repeat
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from puna.tokenizer.base import SPACE_MARK, Tokenizer

if TYPE_CHECKING:  # most who load a tokenizer do without Arrow
    import pyarrow as pa

#: The memory is emptied when it is about this large.
MEMORY_BYTES = 60_000_000

#: What one entry takes besides its text and ids.
_ENTRY_BYTES = 130

_SPACE, _NEWLINE = b" \n"


class BulkEncoder:
    """`tokenizer.encode`, many times faster on text that repeats itself; remembers at most about 60 MB.

    Attributes:
        remembers: whether texts may be cut; else each is encoded as a whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._cuts_letters = _cuts_no_piece(tokenizer, letters=True)
        self.remembers = tokenizer.merges_plain_text and (
            self._cuts_letters or _cuts_no_piece(tokenizer, letters=False)
        )
        self._memory = _Memory(tokenizer)

    def encode(self, text: str, *, leading_space: bool = True) -> NDArray[np.int32]:
        """The ids of `tokenizer.encode(text, leading_space=...)`; the array may be read-only."""
        return self.encode_all([text], leading_space=leading_space)[0]

    def encode_all(self, texts: Sequence[str], *, leading_space: bool = True) -> list[NDArray[np.int32]]:
        """`encode` of each text, which is faster for many at once; memory grows with all of them."""
        if not self.remembers:
            return [self._encode_plainly(text, leading_space) for text in texts]
        before = " " if leading_space and self.tokenizer.adds_leading_space else ""
        is_odd = [SPACE_MARK in text for text in texts]
        try:
            spelled = [
                b"" if odd or not text else (before + text).encode() for text, odd in zip(texts, is_odd, strict=True)
            ]
        except UnicodeEncodeError:  # the tokenizer raises the error that says what is wrong
            return [self._encode_plainly(text, leading_space) for text in texts]
        return [
            self._encode_plainly(text, leading_space) if odd else ids
            for text, odd, ids in zip(texts, is_odd, self._encode_bytes(spelled), strict=True)
        ]

    def _encode_plainly(self, text: str, leading_space: bool) -> NDArray[np.int32]:
        return np.array(self.tokenizer.encode(text, leading_space=leading_space), dtype=np.int32)

    def _encode_bytes(self, texts: list[bytes]) -> list[NDArray[np.int32]]:
        import pyarrow as pa
        from pyarrow._compute import (
            call_function,  # pyarrow.compute itself takes 40 ms to load, for help on all functions
        )

        data = b"".join(texts)
        starts = np.array([0, *accumulate(map(len, texts))])
        cuts = np.append(_cuts(np.frombuffer(data, np.uint8), starts[:-1], self._cuts_letters), len(data))
        offsets = pa.py_buffer(cuts.astype(np.int32))
        parts = pa.Array.from_buffers(pa.utf8(), len(cuts) - 1, [None, offsets, pa.py_buffer(data)])
        distinct = call_function("dictionary_encode", [parts])
        rows, table = self._memory.look_up(distinct.dictionary.to_pylist())
        laid_out = call_function("take", [table, _arrow(rows[distinct.indices.to_numpy()])])
        ids = laid_out.values.to_numpy()
        places = laid_out.offsets.to_numpy()[np.searchsorted(cuts, starts)].tolist()
        return [ids[start:stop] for start, stop in pairwise(places)]


def _arrow(values: NDArray[np.int32]) -> "pa.Int32Array":
    """The same numbers; `pa.array` would load NumPy's masked arrays to see whether it has one."""
    import pyarrow as pa

    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])


def _cuts_no_piece(tokenizer: Tokenizer, *, letters: bool) -> bool:
    """Whether no piece of a vocabulary spans a cut: laid end to end, they are cut only where one begins."""
    unmerged = {*tokenizer.control, *tokenizer.byte_ids.values(), tokenizer.unk_id}
    spelled = [spelling for i, spelling in enumerate(tokenizer.spellings) if spelling and i not in unmerged]
    starts = np.array([0, *accumulate(map(len, spelled))])[:-1]
    return len(_cuts(np.frombuffer(b"".join(spelled), np.uint8), starts, letters)) == len(starts)


def _cuts(data: NDArray[np.uint8], starts: NDArray[np.int64], letters: bool) -> NDArray[np.int64]:
    """Where parts begin: at texts, runs of spaces, after newlines and, if `letters`, at the edges of ASCII words."""
    is_start = np.zeros(len(data) + 1, np.bool_)
    is_start[starts] = True
    is_space, is_newline = data == _SPACE, data == _NEWLINE
    before, after = slice(None, -1), slice(1, None)
    is_start[1:-1] |= is_space[after] & ~is_space[before] | is_newline[before] & ~is_newline[after]
    if letters:
        is_letter, is_ascii = ((data | 32) - ord("a")) < 26, data < 128
        changes = (is_letter[after] != is_letter[before]) & is_ascii[after] & is_ascii[before]
        is_start[1:-1] |= changes & ~is_space[before] & ~is_newline[after]
    return np.flatnonzero(is_start[:-1])


class _Memory:
    """Part of a text -> its ids, encoded when it is first looked up."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode_batch = tokenizer.encode_batch
        self._rows: dict[str, int] = {}
        self._offsets, self._ids = np.zeros(1, np.int32), np.zeros(0, np.int32)
        self._size_bytes = 0

    def look_up(self, parts: list[str]) -> "tuple[NDArray[np.int32], pa.ListArray]":
        """The row of each part in a table, and the table, whose rows are ids."""
        import pyarrow as pa

        if self._size_bytes > MEMORY_BYTES:
            self._rows.clear()
            self._offsets, self._ids = self._offsets[:1], self._ids[:0]
            self._size_bytes = 0
        rows = np.fromiter(map(self._rows.get, parts, repeat(-1)), np.int32, len(parts))
        if len(unknown := np.flatnonzero(rows < 0)):
            rows[unknown] = self._learn([parts[i] for i in unknown.tolist()])
        return rows, pa.ListArray.from_arrays(_arrow(self._offsets), _arrow(self._ids))

    def _learn(self, parts: list[str]) -> range:
        """Adds a row for each part."""
        ids = self._encode_batch(parts, leading_space=False)
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        self._offsets = np.concatenate([self._offsets, self._offsets[-1] + np.cumsum(lengths, dtype=np.int32)])
        self._ids = np.concatenate([self._ids, np.fromiter(chain.from_iterable(ids), np.int32)])
        rows = range(len(self._rows), len(self._rows) + len(parts))
        self._rows.update(zip(parts, rows, strict=True))
        self._size_bytes += sum(map(len, parts)) + self._ids.itemsize * int(lengths.sum()) + _ENTRY_BYTES * len(parts)
        return rows
