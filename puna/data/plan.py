"""How spans are grouped into units of work, and how those that were seen before are recognised."""

from collections.abc import Iterator

import numpy as np
import xxhash

from puna.data.documents import Span
from puna.data.units import Unit

#: Bytes of a unit: small at first, so that all processes soon have work; larger in a large corpus, so that its shards
#: are few. The size of unit n is a function of n, so that units do not depend on what comes after them.
SMALLEST_UNIT, LARGEST_UNIT, UNITS_OF_A_SIZE = 2_000_000, 64_000_000, 32


def cut_into_units(spans: Iterator[Span]) -> Iterator[Unit]:
    """Puts spans together until they reach the size of the unit."""
    number, held, size = 0, list[Span](), 0
    for span in spans:
        held.append(span)
        size += span.stop - span.start
        if size >= min(SMALLEST_UNIT << (number // UNITS_OF_A_SIZE), LARGEST_UNIT):
            yield _unit(number, held)
            number, held, size = number + 1, [], 0
    if held:
        yield _unit(number, held)


def _unit(number: int, spans: list[Span]) -> Unit:
    listed = "\n".join(f"{span.source}\n{span.id}\n{span.start}\n{span.checksum}" for span in spans)
    return Unit(number, spans, xxhash.xxh3_128_hexdigest(listed.encode()))


class Seen:
    """A set of 64-bit hashes that takes eight bytes each: a small Python set, emptied into sorted arrays.

    Among ten million files, one is taken for a copy by mistake with probability 3e-6.
    """

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._older: list[np.ndarray] = []

    def is_new(self, value: int) -> bool:
        """Adds the hash; returns whether it is new."""
        key = np.uint64(value)
        if value in self._recent or any(_holds(array, key) for array in self._older):
            return False
        self._recent.add(value)
        if len(self._recent) == 1 << 16:
            array = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._recent.clear()
            while self._older and len(self._older[-1]) <= len(array):
                array = np.concatenate([array, self._older.pop()])
            self._older.append(np.sort(array))
        return True


def _holds(array: np.ndarray, key: np.uint64) -> bool:
    place = int(np.searchsorted(array, key))
    return place < len(array) and array[place] == key
