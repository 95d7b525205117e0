"""Encoding large corpora: words are split into pieces once and remembered.

Byte-pair merging never looks beyond a place that no piece of the vocabulary spans. In Llama's vocabulary a space only
stands at the beginning of a piece and no piece holds a newline, so a text may be cut before each run of spaces and
after each newline, and the ids of the parts laid end to end are the ids of the whole:

    "    return x + 1\\n    return x"   ->   "    return" | " x" | " +" | " 1\\n" | "    return" | " x"

Code repeats itself, so nearly all parts have been seen before. Whether a vocabulary allows this is checked, never
assumed; where it does not, `BulkEncoder` is `Tokenizer.encode`.
"""

import re
from array import array

import numpy as np

from puna.tokenizer.base import SPACE_MARK, Tokenizer

#: Parts: spaces, then anything else, then the newlines that end a line.
_PART = re.compile(r" *[^ \n]*\n*")

#: Forget everything when about this much is remembered.
MEMORY_BYTES = 60_000_000

#: What Python needs for one remembered part beside its characters and ids.
_ENTRY_BYTES = 200


class BulkEncoder:
    """`tokenizer.encode`, several times faster on text that repeats itself; keeps at most about 60 MB.

    Attributes:
        remembers: whether the vocabulary allows it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.remembers = _splits_part_by_part(tokenizer)
        self._memory = _Memory(tokenizer)

    def encode(self, text: str, *, leading_space: bool = True) -> np.ndarray:
        """The ids of `tokenizer.encode(text, leading_space=...)` as int32; the array may be read-only."""
        if not self.remembers or SPACE_MARK in text:
            return np.array(self.tokenizer.encode(text, leading_space=leading_space), dtype=np.int32)
        if text and leading_space and self.tokenizer.adds_leading_space:
            text = " " + text
        if self._memory.size_bytes > MEMORY_BYTES:
            self._memory.clear()
        ids = b"".join(map(self._memory.__getitem__, _PART.findall(text)))
        return np.frombuffer(ids, dtype=np.int32)


class _Memory(dict[str, bytes]):
    """Part -> its ids as int32 bytes, filled when asked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.size_bytes = 0

    def __missing__(self, part: str) -> bytes:
        ids = array("i", self.tokenizer.encode(part, leading_space=False)).tobytes()
        self[part] = ids
        self.size_bytes += len(part) + len(ids) + _ENTRY_BYTES
        return ids

    def clear(self) -> None:
        super().clear()
        self.size_bytes = 0


def _splits_part_by_part(tokenizer: Tokenizer) -> bool:
    """Whether no piece spans a place where a text is cut, and the splitting is byte-pair merging and nothing else."""
    is_plain = getattr(tokenizer, "is_plain_bpe", False) and getattr(tokenizer, "has_byte_fallback", False)
    spans = re.compile(f"[^{SPACE_MARK}]{SPACE_MARK}|\n[^\n]")
    return is_plain and not any(
        spans.search(tokenizer.piece(i)) for i in range(tokenizer.vocab_size) if i not in tokenizer.control
    )
