"""Blocks: the pages that keys and values are kept in, who holds them, and which hold a known beginning of a text.

    block 7:  tokens 32-63 of "import os …"   held by 2 sequences, known by the hash of tokens 0-63
    block 8:  free, but still known: the next prompt that begins so takes it up again
    block 9:  free

A block belongs to all sequences that begin with the same tokens; it is written once, by the first of them, and never
again while anyone holds it. Blocks that nobody holds are kept as long as no one needs them, the oldest go first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

#: Stands for the beginning of every text.
ROOT = b""

#: Places that are tried for a new sequence before it takes whatever block is free.
TRIES = 16


class OutOfBlocks(Exception):
    """No block is free; the scheduler takes some away from a sequence."""


class BlockPool:
    """Which of `n_blocks` blocks of `size` tokens are held, known or free.

    Attributes:
        size: tokens of a block.
        n_blocks: how many there are.
    """

    def __init__(self, n_blocks: int, size: int) -> None:
        self.n_blocks, self.size = n_blocks, size
        self._holders = [0] * n_blocks
        self._key_of: dict[int, bytes] = {}
        self._known: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(n_blocks))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._places = _spread(n_blocks)

    @property
    def n_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + len(self._kept)

    def take(self, after: int | None = None) -> int:
        """A block to write to; the neighbour of `after` where that is free, so that both can be read in place.

        Raises:
            OutOfBlocks: all are held.
        """
        if after is not None and after + 1 in self._free:
            block = after + 1
            del self._free[block]
        elif self._free:
            block = self._far_from_others() if after is None else next(reversed(self._free))
            del self._free[block]
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            del self._known[self._key_of.pop(block)]
        else:
            raise OutOfBlocks
        self._holders[block] = 1
        return block

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Known blocks that hold the beginning of `tokens`, in order; they are held once more from now on."""
        found = []
        key = ROOT
        for start in range(0, len(tokens) - self.size + 1, self.size):
            key = key_of(key, tokens[start : start + self.size])
            block = self._known.get(key)
            if block is None:
                break
            if self._holders[block] == 0:
                del self._kept[block]
            self._holders[block] += 1
            found.append(block)
        return found

    def remember(self, block: int, key: bytes) -> None:
        """Makes a full block known; where another block holds the same text already, that one stays the known one."""
        if key not in self._known and block not in self._key_of:
            self._known[key], self._key_of[block] = block, key

    def forget(self) -> None:
        """Makes all blocks unknown; who holds one still does."""
        self._known.clear()
        self._key_of.clear()
        self._free.update(self._kept)
        self._kept.clear()

    def release(self, block: int) -> None:
        """One holder less."""
        self._holders[block] -= 1
        if self._holders[block] == 0:
            (self._kept if block in self._key_of else self._free)[block] = None

    def _far_from_others(self) -> int:
        """Where a new sequence has many neighbours before it meets another one, as likely as not."""
        tried = (next(self._places) for _ in range(TRIES))
        return next((block for block in tried if block in self._free), next(iter(self._free)))


def _spread(n: int) -> Iterator[int]:
    """Numbers below n without end, each far from those before it: 0, n/2, n/4, 3n/4, n/8 …

    Source: van der Corput's sequence of base 2, the digits of a count in reverse behind the point.
    """
    bits = (n - 1).bit_length()
    while True:
        reversed_counts = (int(f"{count:0{bits}b}"[::-1], 2) for count in range(1 << bits))
        yield from (number for number in reversed_counts if number < n)


def key_of(before: bytes, tokens: Sequence[int]) -> bytes:
    """What a full block is known by: a hash of its tokens and of all before them, too long to meet another's."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()
