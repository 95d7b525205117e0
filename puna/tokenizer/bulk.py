r"""Encoding large corpora: words are split into pieces once and remembered.

Byte-pair merging never reaches across a place that no piece of the vocabulary spans. In Llama's vocabulary a space
stands only at the beginning of a piece, no piece holds a newline, and none holds an ASCII letter beside an ASCII sign
or digit; so a text may be cut at those places, and the ids of the parts laid end to end are the ids of the whole:

    "    return x + f(1)\n"   ->   "    return" | " x" | " +" | " f" | "(1)\n"

Code repeats itself, so nearly all parts have been seen before. Which cuts a vocabulary allows is checked, never
assumed; where it allows none, `BulkEncoder` is `Tokenizer.encode`.
"""

import re
from array import array

import numpy as np

from puna.tokenizer.base import SPACE_MARK, Tokenizer

#: Cut before a run of spaces and after a run of newlines.
_WORDS = re.compile(r" *[^ \n]*\n*")

#: A piece that forbids `_WORDS`: it holds a space or the end of a line inside.
_SPANS_WORDS = re.compile(f"[^{SPACE_MARK}]{SPACE_MARK}|\n[^\n]")

#: For ASCII text: cut also between letters and everything else.
_LETTERS = re.compile(r" *(?:[A-Za-z]+|[^A-Za-z \n]*)\n*")

#: A piece that forbids `_LETTERS`: it holds an ASCII letter beside an ASCII character that is none.
_SPANS_LETTERS = re.compile(r"[A-Za-z][\x00-@\[-`{-\x7f]|[\x00-@\[-`{-\x7f][A-Za-z]")

#: Everything is forgotten once about this much is remembered.
MEMORY_BYTES = 60_000_000

#: What Python needs for one remembered part beside its characters and ids.
_ENTRY_BYTES = 200


class BulkEncoder:
    """`tokenizer.encode`, several times faster on text that repeats itself; remembers at most about 60 MB.

    Attributes:
        remembers: whether the vocabulary allows to cut texts.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        unmerged = {*tokenizer.control, *tokenizer.byte_ids.values(), tokenizer.unk_id}
        pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size) if i not in unmerged]
        self.remembers = tokenizer.merges_plain_text and not any(map(_SPANS_WORDS.search, pieces))
        self._cuts_letters = not any(map(_SPANS_LETTERS.search, pieces))
        self._memory = _Memory(tokenizer)

    def encode(self, text: str, *, leading_space: bool = True) -> np.ndarray:
        """The ids of `tokenizer.encode(text, leading_space=...)` as int32; the array may be read-only."""
        if not self.remembers or SPACE_MARK in text:
            return np.array(self.tokenizer.encode(text, leading_space=leading_space), dtype=np.int32)
        if text and leading_space and self.tokenizer.adds_leading_space:
            text = " " + text
        cut = _LETTERS if self._cuts_letters and text.isascii() else _WORDS
        ids = self._memory.ids(cut.findall(text))
        return np.frombuffer(ids, dtype=np.int32)


class _Memory:
    """Part of a text -> its ids as int32 bytes, filled when asked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode_batch = tokenizer.encode_batch
        self._known: dict[str, bytes] = {}
        self._size_bytes = 0

    def __len__(self) -> int:
        return len(self._known)

    def ids(self, parts: list[str]) -> bytes:
        """The ids of the parts laid end to end."""
        # All new parts in one call; set.difference asks a dict itself, but would copy a subclass of it.
        if new := list(set(parts).difference(self._known)):
            spelled = [array("i", ids).tobytes() for ids in self._encode_batch(new, leading_space=False)]
            self._known.update(zip(new, spelled, strict=True))
            self._size_bytes += sum(map(len, new)) + sum(map(len, spelled)) + _ENTRY_BYTES * len(new)
        joined = b"".join(map(self._known.__getitem__, parts))
        if self._size_bytes > MEMORY_BYTES:
            self._known.clear()
            self._size_bytes = 0
        return joined
