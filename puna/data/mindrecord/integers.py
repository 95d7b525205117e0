"""MindRecord's compressed integers: each in as few bytes as hold it.

    00 00 00 05 | 04 00 | 01 ff 2c 01 07 00      5 values: 1, -1, 300, 7, 0
      count, big    codes   values, little-endian two's complement: of 1, 2, 4 or 8 bytes for a code of 0, 1, 2 or 3;
      endian                codes are of two bits, the first value's in the highest

`decode_integers` reads a field at once, not value by value; `decode_all` many fields, quicker where nearly all values
take two bytes, as the ids of most vocabularies do.
"""

import mmap
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

Buffer = bytes | mmap.mmap

_COUNT_BYTES = 4

#: Byte of codes -> the widths of its four values, as the bytes of one number.
_WIDTHS = (1 << ((np.arange(256)[:, None] >> np.array([6, 4, 2, 0])) & 3)).astype(np.uint8).view(np.uint32).reshape(-1)

#: Four codes of two bytes, and the bits that only codes of four and eight have.
_ALL_OF_TWO, _FOUR_OR_EIGHT = 0x55, 0xAA

#: With more bytes of codes that are not all of two, one field at a time is quicker.
_CODES_A_MIXED_ONE = 16

#: What makes two bytes of one that is not negative, of one that is, of none, and of two.
_FILLERS = (b"\x00", b"\xff", b"\x00\x00", b"")

#: Width -> how far right a value goes that stands at the upper end of eight bytes.
_SHIFTS = 64 - 8 * np.arange(9)

#: Values up to which 1, 2 and 4 bytes hold a number.
_LIMITS = np.array([1 << 7, 1 << 15, 1 << 31])


def decode_integers(data: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The values in a field.

    Args:
        data: (bytes,) the whole field.

    Raises:
        ValueError: the bytes are no such field.
    """
    count = int.from_bytes(data[:_COUNT_BYTES].tobytes(), "big")
    start = _COUNT_BYTES + -(-count // 4)
    if len(data) < max(start, _COUNT_BYTES):
        raise ValueError(f"{count:,} integers are announced in {len(data):,} bytes")
    widths = _WIDTHS[data[_COUNT_BYTES:start]].view(np.uint8)[:count]
    stops = np.cumsum(widths, dtype=np.int64)
    size = int(stops[-1]) if count else 0
    if size != len(data) - start:
        raise ValueError(f"{count:,} integers take {size:,} bytes, {len(data) - start:,} are there")
    # The eight bytes that end where a value ends, as a number; they overlap, and need not be aligned.
    padded = np.concatenate([np.zeros(8, np.uint8), data[start:]])
    words = np.ndarray((size + 1,), "<i8", padded, strides=(1,)).take(stops)
    return words >> _SHIFTS.take(widths)


def decode_all(data: Buffer, places: Sequence[tuple[int, int]], dtype: np.dtype[Any]) -> list[NDArray[Any]]:
    """`decode_integers` of many fields, as `dtype`; quicker where nearly all values take two bytes.

    The few that take one are widened on the way, and then all content is one array of numbers of two bytes.

    Args:
        data: what the fields are in; nothing else of it is read.
        places: start and stop of each.
        dtype: of the arrays.

    Raises:
        ValueError: the bytes of one are no such field.
    """
    raw = np.frombuffer(data, np.uint8)
    fields = _Fields(raw, np.array(places, np.int64).reshape(-1, 2))
    if not fields.are_of_two():
        return [decode_integers(raw[start:stop]).astype(dtype) for start, stop in places]
    values = np.frombuffer(fields.widened(memoryview(data)), "<i2").astype(dtype)
    firsts = fields.firsts.tolist()
    return [values[first : first + count] for first, count in zip(firsts, fields.counts.tolist(), strict=True)]


class _Fields:
    """Fields that are read together; places of values count all of them, each field filled up to a multiple of four."""

    def __init__(self, raw: NDArray[np.uint8], places: NDArray[np.int64]) -> None:
        self._raw, self._starts, self._stops = raw, places[:, 0], places[:, 1]
        if np.any(self._stops - self._starts < _COUNT_BYTES):
            raise ValueError("a field is too short for the count of its integers")
        head = raw[self._starts[:, None] + np.arange(_COUNT_BYTES)]
        self.counts = head.view(">u4").reshape(-1).astype(np.int64)
        self._code_counts = -(-self.counts // 4)
        self._contents = self._starts + _COUNT_BYTES + self._code_counts
        self._code_stops = np.cumsum(self._code_counts)
        self.firsts = (self._code_stops - self._code_counts) * 4
        self._codes = np.zeros(0, np.uint8)

    def are_of_two(self) -> bool:
        """Whether nearly all values take two bytes, none more, and no field is empty or ends within its codes."""
        if not self.counts.all() or np.any(self._contents > self._stops):
            return False
        view = self._raw.data
        places = zip((self._starts + _COUNT_BYTES).tolist(), self._contents.tolist(), strict=True)
        self._codes = np.frombuffer(b"".join([view[start:stop] for start, stop in places]), np.uint8)
        mixed = np.count_nonzero(self._codes != _ALL_OF_TWO)
        return bool(mixed * _CODES_A_MIXED_ONE < len(self._codes) and not (self._codes & _FOUR_OR_EIGHT).any())

    def widened(self, data: memoryview) -> bytes:
        """The content of all fields with two bytes for each value.

        Raises:
            ValueError: a field has more or less content than its codes say.
        """
        is_mixed = self._codes != _ALL_OF_TWO
        is_mixed[self._code_stops - 1] = True
        mixed = np.flatnonzero(is_mixed)
        at = (mixed[:, None] * 4 + np.arange(4)).reshape(-1)
        owner = np.repeat(np.arange(len(self.counts)), np.diff(np.searchsorted(mixed, self._code_stops), prepend=0) * 4)
        left = self.counts[owner] - (at - self.firsts[owner])  # how many values of the field come from here on
        widths = np.where(left > 0, _WIDTHS[self._codes[mixed]].view(np.uint8), 0).astype(np.int64)
        is_cut = (widths < 2) | (left == 1)  # after each of these a piece ends
        at, owner, widths, left = at[is_cut], owner[is_cut], widths[is_cut], left[is_cut]
        is_first = np.diff(owner, prepend=-1) != 0
        lost = np.cumsum(2 - widths)
        lost -= (lost - (2 - widths))[is_first][owner]  # by the field so far
        stops = self._contents[owner] + (at - self.firsts[owner] + 1) * 2 - lost
        if np.any(stops[left == 1] != self._stops):
            raise ValueError("a field has not as many bytes as its integers take")
        starts = np.where(is_first, self._contents[owner], np.roll(stops, 1))
        is_negative = self._raw[stops - 1] >> 7
        fillers = np.where(widths == 1, is_negative, 2 + widths // 2).tolist()
        pieces = [data[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
        return b"".join(chain.from_iterable(zip(pieces, map(_FILLERS.__getitem__, fillers), strict=True)))


def encode_integers(values: NDArray[np.integer]) -> bytes:
    """The field that holds (n,) values."""
    values = np.ascontiguousarray(values, "<i8")
    size = np.where(values < 0, ~values, values)
    codes = np.searchsorted(_LIMITS, size, side="right")
    padded = np.zeros(-(-len(values) // 4) * 4, np.uint8)
    padded[: len(values)] = codes
    packed = (padded.reshape(-1, 4) << np.array([6, 4, 2, 0], np.uint8)).sum(1, dtype=np.uint8)
    kept = np.arange(8) < (1 << codes)[:, None]
    content = values.view(np.uint8).reshape(-1, 8)[kept]
    return len(values).to_bytes(_COUNT_BYTES, "big") + packed.tobytes() + content.tobytes()
