"""MindRecord's compressed integers: each in as few bytes as hold it.

    00 00 00 05 | 04 00 | 01 ff 2c 01 07 00      5 values: 1, -1, 300, 7, 0
      count, big    codes   values, little-endian two's complement: of 1, 2, 4 or 8 bytes for a code of 0, 1, 2 or 3;
      endian                codes are of two bits, the first value's in the highest

`decode_integers` reads a field at once, not value by value; `decode_all` many fields, quicker where nearly all values
take two bytes, as the ids of most vocabularies do.
"""

import mmap
from collections.abc import Sequence
from itertools import pairwise
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

#: Number of values in the last byte of codes (0: four) -> codes of two bytes for those that are not there.
_FILLERS = np.array([0b0, 0b010101, 0b0101, 0b01], np.uint8)

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

    The content of all is laid end to end with one more byte behind each value of one: an array of numbers of two bytes.

    Args:
        data: what the fields are in; nothing else of it is read.
        places: start and stop of each.
        dtype: of the arrays.

    Raises:
        ValueError: the bytes of one are no such field.
    """
    view = memoryview(data)
    lengths, code_fields, contents = list[int](), list[memoryview](), list[memoryview]()
    for start, stop in places:
        first = start + _COUNT_BYTES
        length = int.from_bytes(view[start:first], "big")
        middle = first + (length + 3) // 4
        if middle > stop:
            raise ValueError(f"{length:,} integers are announced in {stop - start:,} bytes")
        lengths.append(length)
        code_fields.append(view[first:middle])
        contents.append(view[middle:stop])
    counts = np.array(lengths, np.int64)
    codes = np.frombuffer(bytearray().join(code_fields), np.uint8)
    mixed = np.flatnonzero(codes != _ALL_OF_TWO)
    is_quick = len(mixed) * _CODES_A_MIXED_ONE < len(codes) and counts.all()
    if not is_quick or np.any(codes[mixed] & _FOUR_OR_EIGHT):
        return [decode_integers(np.frombuffer(view[start:stop], np.uint8)).astype(dtype) for start, stop in places]
    ones, ones_of_field = _of_one_byte(codes, mixed, counts)
    if np.any(2 * counts - ones_of_field != [*map(len, contents)]):
        raise ValueError("a field has not as many bytes as its integers take")
    content = memoryview(b"".join(contents))
    cuts = [0, *(2 * ones + 1 - np.arange(len(ones))).tolist(), len(content)]
    widened = bytearray(b"\x00").join([content[start:stop] for start, stop in pairwise(cuts)])
    values = np.frombuffer(widened, "<i2").astype(dtype)
    values[ones] = values[ones].astype(np.int8)  # below zero, the byte more is another one
    return [values[start:stop] for start, stop in pairwise([0, *np.cumsum(counts).tolist()])]


def _of_one_byte(
    codes: NDArray[np.uint8], mixed: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The places of values of one byte among all values, and how many each field has.

    Args:
        codes: of all fields, each of which has one at least; those behind the last value are overwritten.
        mixed: places of those that are not all of two.
        counts: of the fields.
    """
    code_counts = -(-counts // 4)
    code_stops = np.cumsum(code_counts)
    codes[code_stops - 1] |= _FILLERS[counts % 4]
    found = np.flatnonzero(_WIDTHS[codes[mixed]].view(np.uint8) == 1)
    places = mixed[found >> 2] * 4 + (found & 3)  # each field filled up to a multiple of four
    ones_of_field = np.diff(np.searchsorted(places, code_stops * 4), prepend=0)
    filled = 4 * (code_stops - code_counts) - (np.cumsum(counts) - counts)
    return places - np.repeat(filled, ones_of_field), ones_of_field


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
