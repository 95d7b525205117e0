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
from collections.abc import Sequence

#: Stands for the beginning of every text.
ROOT = b""


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
            block = self._middle_of_the_longest_run() if after is None else next(reversed(self._free))
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

    def _middle_of_the_longest_run(self) -> int:
        """Where a new sequence has most neighbours before it meets another one."""
        best_start, best_length, start, previous = 0, 0, -1, -2
        for block in sorted(self._free):
            if block != previous + 1:
                start = block
            previous = block
            if block - start + 1 > best_length:
                best_start, best_length = start, block - start + 1
        is_next_to_another = best_start > 0
        return best_start + (best_length // 2 if is_next_to_another else 0)


def key_of(before: bytes, tokens: Sequence[int]) -> bytes:
    """What a full block is known by: a hash of its tokens and of all before them, too long to meet another's."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()
