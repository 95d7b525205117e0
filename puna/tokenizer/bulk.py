r"""Encoding large corpora: words are split into pieces once and remembered.

Byte-pair merging never reaches across a place that no piece of the vocabulary spans. In Llama's vocabulary a space
stands only at the beginning of a piece, no piece holds a newline, and none holds an ASCII letter beside an ASCII sign
or digit; so a text may be cut at those places, and the ids of the parts laid end to end are the ids of the whole:

    "    return x + f(1)\n"   ->   "    return" | " x" | " +" | " f" | "(1)\n"

Text repeats itself, so nearly all parts have been seen before. Many texts are encoded at once: their bytes are cut all
together by NumPy, Arrow finds the distinct parts and lays their ids out again, and only these parts are Python's.
Which cuts a vocabulary allows is checked, never assumed; where it allows none, `BulkEncoder` is `Tokenizer.encode`.
"""

import re
from array import array
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from puna.tokenizer.base import SPACE_MARK, Tokenizer

if TYPE_CHECKING:  # most who load a tokenizer do without Arrow
    import pyarrow as pa

#: A piece that forbids all cuts: it holds a space or the end of a line inside. Pieces are searched as one text, with
#: NULs between them, which is quicker; so a NUL in a piece forbids all cuts too.
_SPANS_WORDS = re.compile(f"[^{SPACE_MARK}\0]{SPACE_MARK}|\n[^\n\0]")

#: A piece that forbids cuts between letters and what is none: it holds both, in ASCII, side by side.
_SPANS_LETTERS = re.compile(r"[A-Za-z][\x01-@\[-`{-\x7f]|[\x01-@\[-`{-\x7f][A-Za-z]")

#: Everything is forgotten once about this much is remembered.
MEMORY_BYTES = 60_000_000

#: What Python needs for one remembered part beside its bytes and ids.
_ENTRY_BYTES = 200

_SPACE, _NEWLINE = b" \n"

_ID_BYTES = array("i").itemsize


class BulkEncoder:
    """`tokenizer.encode`, many times faster on text that repeats itself; remembers at most about 60 MB.

    Attributes:
        remembers: whether the vocabulary allows to cut texts.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        unmerged = {*tokenizer.control, *tokenizer.byte_ids.values(), tokenizer.unk_id}
        pieces = [piece for i, piece in enumerate(tokenizer.pieces) if i not in unmerged]
        listed = "\0".join(pieces)
        is_listed = listed.count("\0") < len(pieces)
        self.remembers = tokenizer.merges_plain_text and is_listed and not _SPANS_WORDS.search(listed)
        self._cuts_letters = not _SPANS_LETTERS.search(listed)
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
        except UnicodeEncodeError:  # the tokenizer has the words for it
            return [self._encode_plainly(text, leading_space) for text in texts]
        return [
            self._encode_plainly(text, leading_space) if odd else ids
            for text, odd, ids in zip(texts, is_odd, self._encode_bytes(spelled), strict=True)
        ]

    def _encode_plainly(self, text: str, leading_space: bool) -> NDArray[np.int32]:
        return np.array(self.tokenizer.encode(text, leading_space=leading_space), dtype=np.int32)

    def _encode_bytes(self, texts: list[bytes]) -> list[NDArray[np.int32]]:
        import pyarrow as pa

        data = b"".join(texts)
        starts = np.array([0, *accumulate(map(len, texts))])
        cuts = np.append(_cuts(np.frombuffer(data, np.uint8), starts[:-1], self._cuts_letters), len(data))
        offsets = pa.py_buffer(cuts.astype(np.int32))
        parts = pa.Array.from_buffers(pa.binary(), len(cuts) - 1, [None, offsets, pa.py_buffer(data)])
        distinct = parts.dictionary_encode()
        laid_out = self._memory.ids(distinct.dictionary.to_pylist()).take(distinct.indices)
        ids = laid_out.values.to_numpy()
        places = laid_out.offsets.to_numpy()[np.searchsorted(cuts, starts)].tolist()
        return [ids[start:stop] for start, stop in pairwise(places)]


def _cuts(data: NDArray[np.uint8], starts: NDArray[np.int64], letters: bool) -> NDArray[np.int64]:
    """Where parts begin: texts, runs of spaces, what follows a newline, and, if asked, letters and what is none."""
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
    """Part of a text -> its ids as int32 bytes, filled when asked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode_batch = tokenizer.encode_batch
        self._known: dict[bytes, bytes] = {}
        self._size_bytes = 0

    def __len__(self) -> int:
        return len(self._known)

    def ids(self, parts: list[bytes]) -> "pa.ListArray":
        """The ids of each part."""
        import pyarrow as pa

        if self._size_bytes > MEMORY_BYTES:
            self._known.clear()
            self._size_bytes = 0
        # All new parts in one call; set.difference asks a dict itself, but would copy a subclass of it.
        if new := list(set(parts).difference(self._known)):
            ids = self._encode_batch([part.decode() for part in new], leading_space=False)
            spelled = [array("i", row).tobytes() for row in ids]
            self._known.update(zip(new, spelled, strict=True))
            self._size_bytes += sum(map(len, new)) + sum(map(len, spelled)) + _ENTRY_BYTES * len(new)
        known = list(map(self._known.__getitem__, parts))
        offsets = np.array([0, *accumulate(map(len, known))]) // _ID_BYTES
        return pa.ListArray.from_arrays(offsets.astype(np.int32), np.frombuffer(b"".join(known), np.int32))
